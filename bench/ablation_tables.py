"""Tables, figures and the page ABLATION.md, of the records of bench/ablation.py."""

import itertools
import math
import re
import statistics
from collections import Counter
from pathlib import Path

from recipes import DATA, RECIPES, STARTS, numbers_of


def results_of(run: dict) -> dict:
    """{row of the table: AP at the end}."""
    last = {point["phase"]: point for point in run["curve"]}
    aps = {phase: point["ap"] for phase, point in last.items()}
    if run["recipe"] == "paper":
        rows = {"teacher": aps["teacher"], "burnt-in": aps["burnin"], "paper": aps["distill"]}
        return rows | {"paper, EMA teacher": last["distill"]["teacher_ap"]}
    # The teacher of "frozen" is the burnt-in student, that of a refined one is behind it.
    if run["curve"][-1]["phase"] == "distill" and run["recipe"] != "frozen":
        more = {"unguided, burnt-in": aps["burnin"]} if run["recipe"] == "unguided" else {}
        more[run["recipe"] + ", EMA teacher"] = last["distill"]["teacher_ap"]
        return {run["recipe"]: aps["distill"], **more}
    return {run["recipe"]: run["curve"][-1]["ap"]}


def gather(runs: list[dict]) -> dict:
    """{(data, ratio): {row: {seed: AP}}}"""
    table = {}
    for run in runs:
        for row, ap in results_of(run).items():
            rows = table.setdefault((run["data"], run["ratio"]), {})
            rows.setdefault(row, {})[run["seed"]] = ap
    return table


def spread(values: list[float]) -> str:
    """Mean, standard deviation, and how many."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation} ({len(values)})"


def difference(ours: dict, theirs: dict) -> str:
    """Mean and standard error of the difference, seed by seed, and of how many."""
    pairs = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    if not pairs:
        return ""
    error = f" ± {statistics.stdev(pairs) / len(pairs) ** 0.5:.1f}" if len(pairs) > 1 else ""
    return f"{statistics.mean(pairs):+.1f}{error} ({len(pairs)})"


LABELS = {"teacher": "teacher, after phase 1", "burnt-in": "burnt-in student, after phase 2"}
LABELS |= {name: text for name, (text, _) in RECIPES.items()} | {"paper": "**Guided Distillation**"}


def label(row: str) -> str:
    """Its first two columns: the recipe, and what it is."""
    name, _, part = row.partition(", ")
    parts = {"EMA teacher": "— its EMA teacher", "burnt-in": "— its burnt-in student"}
    recipe = f"`{name}`" if name in RECIPES and not part else ""
    return f"{recipe} | {parts[part] if part else LABELS[name]}"


def table(rows: dict) -> list[str]:
    """Of one data set and ratio, in the order of RECIPES."""
    names = ["teacher", "burnt-in", *RECIPES]
    order = sorted(rows, key=lambda row: (names.index(row.partition(", ")[0]), "," in row))
    columns = (
        "AP: mean ± standard deviation (seeds)",
        "more than labels only",
        "more than Guided Distillation",
    )
    lines = [f"| recipe | | {' | '.join(columns)} |", "|---|---|---|---|---|"]
    for row in order:
        others = [
            difference(rows[row], rows[other]) if other in rows and other != row else ""
            for other in ("labels-only", "paper")
        ]
        lines.append(f"| {label(row)} | {spread(list(rows[row].values()))} | {others[0]} | {others[1]} |")
    return lines


CURVES = {
    "paper": ("Guided Distillation", "C0"),
    "unguided": ("unguided burn-in", "C1"),
    "no-distillation": ("no distillation", "C2"),
    "labels-only": ("labels only", "C3"),
}


def values_of(run: dict, phase: str, name: str) -> dict:
    """{step, counted from the beginning of phase 1: the value of this name}"""
    steps = [re.search(r"--steps (\d+),(\d+),", command) for command in run["commands"]]
    t, b = next((map(int, found.groups()) for found in steps if found), (0, 0))
    refines = not steps[-1]  # a last phase on labels has one number: it begins where phase 3 ended
    first = {"teacher": 0, "labels_only": refines * sum(run["steps"]), "burnin": t, "distill": t + b}[phase]
    if phase == "distill" and re.search(r"--student \S+/distill\.pt", run["commands"][-1]):
        first = sum(run["steps"])  # it goes on behind the end of another run
    return {first + p["step"]: p[name] for p in run["curve"] if p["phase"] == phase and name in p}


def draw(axis, runs: list[dict], names: dict, label: str, colour: str) -> None:
    """A line for each phase of names, {phase: name of the value}: the mean over seeds, and a band of one
    standard deviation."""
    for phase, name in names.items():
        curves = [values_of(run, phase, name) for run in runs]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        rows = [[curve[step] for curve in curves] for step in steps]
        means = [statistics.mean(row) for row in rows]
        spreads = [statistics.stdev(row) if len(row) > 1 else 0.0 for row in rows]
        axis.plot(steps, means, ".-", color=colour, label=label if steps else None)
        lower = [mean - spread for mean, spread in zip(means, spreads)]
        upper = [mean + spread for mean, spread in zip(means, spreads)]
        axis.fill_between(steps, lower, upper, color=colour, alpha=0.15, linewidth=0)
        label = None if steps else label


def plotting():
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def figure(runs: list[dict], file: Path) -> None:
    """AP over all phases, and how good pseudo-labels are after a guided and an unguided burn-in: those that
    the student in burn-in would give, then those that the EMA teacher gives. runs: of one data set and
    ratio."""
    pyplot = plotting()
    of = {recipe: [run for run in runs if run["recipe"] == recipe] for recipe in RECIPES}
    t, b, d = of["paper"][0]["steps"]
    axes = pyplot.subplots(1, 4, figsize=(14, 3.6), layout="constrained")[1]
    for recipe, (label, colour) in CURVES.items():
        phases = ("labels_only", "teacher", "burnin", "distill")
        draw(axes[0], of[recipe], dict.fromkeys(phases, "ap"), label, colour)
    axes[0].set_title("mask AP", fontsize=10)
    for axis, name in zip(axes[1:], ("precision", "recall", "mask_iou")):
        for recipe in ("paper", "unguided"):
            draw(axis, of[recipe], {"burnin": f"student_{name}", "distill": name}, *CURVES[recipe])
        teachers = [values_of(run, "teacher", name).get(t) for run in of["paper"]]
        if None not in teachers:
            mean = statistics.mean(teachers)
            axis.axhline(mean, color="grey", linestyle="--", label="teacher of phase 1")
        axis.set_title(f"pseudo-labels: {name.replace('_iou', ' IoU')}, %", fontsize=10)
    for axis in axes:
        axis.set_xlabel("step")
        for border in (t, t + b):
            axis.axvline(border, color="grey", linewidth=0.8, linestyle=":")
    for axis in axes[:2]:
        axis.legend(fontsize=8)
    pyplot.savefig(file, dpi=110)
    pyplot.close()


def curves(runs: list[dict], file: Path) -> None:
    """A small picture for each recipe but the paper's: its AP over the steps, and the paper's in grey."""
    pyplot = plotting()
    of = {recipe: [run for run in runs if run["recipe"] == recipe] for recipe in RECIPES}
    phases = dict.fromkeys(("labels_only", "teacher", "burnin", "distill"), "ap")
    shown = [recipe for recipe in RECIPES if of[recipe] and recipe != "paper"]
    rows = math.ceil(len(shown) / 5)
    size = dict(figsize=(14, 2.2 * rows), sharex=True, sharey=True, squeeze=False, layout="constrained")
    axes = pyplot.subplots(rows, 5, **size)[1].flat
    for axis, recipe in itertools.zip_longest(axes, shown):
        axis.set_axis_off() if recipe is None else axis.set_title(recipe, fontsize=9)
        axis.tick_params(labelbottom=True)
        if recipe:
            draw(axis, of["paper"], phases, None, "grey")
            draw(axis, of[recipe], phases, None, "C0")
    pyplot.savefig(file, dpi=90)
    pyplot.close()


INTRO = """# What makes it work

Made by `python bench/ablation.py --tables` from the runs in `ablation.jsonl`, which has the commands and the
evaluations of each. Guided Distillation is the method with the settings under "Commands", and where these say
nothing those of the preset shapes (`PRESETS` in burnin.py and distill.py: a threshold of 0.9 and an EMA decay
of 0.998, where the paper has 0.7 and 0.9996 in far longer runs); every other row changes what it says. AP is
that of the student at the end of training, never the best on the way. Teacher and burnt-in students are
measured where their phase ends, the latter in the middle of the learning rate's schedule.
All recipes of a seed have the same labelled images and, where they do not say otherwise, the same teacher and
a student with the same initial weights; so recipes are compared seed by seed: the two columns on the right
are means of such differences, with their standard error and number. With three seeds, the 95 % interval is
4.3 standard errors to both sides.
"""


def machines(runs: list[dict]) -> str:
    """That of most runs, and those of the others with their recipes."""
    used = Counter(run["machine"] for run in runs)
    main, *others = [name for name, _ in used.most_common()]
    text = f"Machine: {main}"
    for other in others:
        names = sorted({f"`{run['recipe']}`" for run in runs if run["machine"] == other})
        number = "1 run is" if used[other] == 1 else f"{used[other]} runs are"
        text += f"; {other}, of which {number}, of {', '.join(names)}"
    return text + "."


def write_page(runs: list[dict], folder: Path) -> None:
    """ABLATION.md and its figures, into the folder."""
    parts = [INTRO]
    for (data, ratio), rows in sorted(gather(runs).items()):
        here = [run for run in runs if (run["data"], run["ratio"]) == (data, ratio)]
        dates = sorted({run["date"] for run in here})
        parts += [f"## {data}, {100 * ratio:g} % of the labels", "", *table(rows), ""]
        hours, when = sum(run["hours"] for run in here), " to ".join(sorted({dates[0], dates[-1]}))
        paid = f"{len(here)} runs, {hours:.1f} hours of training without evaluations"
        parts += [f"{paid}, {when}. {machines(here)}", ""]
        found = {run["recipe"] for run in here}
        if {"paper", "unguided"} <= found:
            name = f"ablation-{data}-{100 * ratio:g}.png"
            figure(here, folder / name)
            parts += [f"![AP and pseudo-labels over the steps]({name})", ""]
        if found > {"paper"}:
            name = f"ablation-{data}-{100 * ratio:g}-curves.png"
            curves(here, folder / name)
            text = "AP of each recipe on the way, by its name below; in grey that of Guided Distillation"
            parts += [f"![{text}]({name})", "", f"{text}.", ""]
    parts += ["## Commands", "", "All of them have besides, where they do not say otherwise:", ""]
    for data in sorted({run["data"] for run in runs}):
        flags, (t, b, d) = DATA[data]
        parts.append(f"- {data}: `{flags} --ratio RATIO --seed SEED --steps {t},{b},{d} --out OUT`")
    parts += [
        "",
        "TEACHER, STUDENT and DISTILLED are teacher.pt, burnin.pt and distill.pt of Guided Distillation;",
        "CLEAN and LABELS are the last checkpoints of `clean` and `labels-only`.",
        "One number as `--steps` is that of each of three phases.",
        "",
    ]
    t, b, d = DATA["shapes"][1]
    names = {"own": "OUT"} | {name: name.upper() for name in STARTS}
    parts += ["| recipe | what it is | commands, with the steps of shapes |", "|---|---|---|"]
    recorded = {run["recipe"] for run in runs}
    for recipe, (text, commands) in RECIPES.items():
        lines = "<br>".join(f"`{line.format(**names, **numbers_of(t, b, d))}`" for line in commands)
        parts += [f"| `{recipe}` | {text} | {lines} |"] if recipe in recorded else []
    others = ", ".join(f"`{recipe}`" for recipe in RECIPES if recipe not in recorded)
    parts += ["", f"In recipes.py, and not run yet: {others}."] if others else []
    (folder / "ABLATION.md").write_text("\n".join(parts) + "\n")
