"""Tables, figures and the page ABLATION.md, from the records of ablation.py.

A record is a finished run: "data", "ratio", "seed", "recipe", "steps" of the phases, "commands", "hours" of
training, "machine", "date", and "curve", its evaluations in order.

An evaluation is {"phase", "step", "ap"}. Where it was measured, "teacher_ap" is the AP of the EMA teacher.
Of the teacher's pseudo-labels it has "kept", their number per image, and "precision", "recall" and
"mask_iou" in percent, and, since objects are told apart by size, "small_precision" and so on for each of
pseudo_label_quality.SIZES. In guided burn-in the same keys with the prefix student_ are those of the
pseudo-labels that the student would give."""

import itertools
import json
import math
import re
import statistics
import textwrap
from collections import Counter
from pathlib import Path

from recipes import DATA, LAST_COMMIT_OF_REMOVED, RECIPES, REMOVED, STARTS, step_numbers

FORMER_PHASES = {"labels_only": "supervised"}  # as records up to commit 5b0a3ca name them

# -------------------------------------------------------------------------------------------------- records


def read_json_lines(file: Path) -> list[dict]:
    """Read a file of JSON lines. A line that was cut short, because its process was killed, is left out."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def read_records(file: Path) -> list[dict]:
    """Read the records of finished runs, with the present names of the phases."""
    records = read_json_lines(file)
    for record in records:
        for point in record.get("curve", ()):
            point["phase"] = FORMER_PHASES.get(point["phase"], point["phase"])
    return records


def final_aps(run: dict) -> dict:
    """Return {row of the table: AP at the end of training}."""
    last = {point["phase"]: point for point in run["curve"]}
    aps = {phase: point["ap"] for phase, point in last.items()}
    if run["recipe"] == "paper":
        rows = {"teacher": aps["teacher"], "burnt-in": aps["burnin"], "paper": aps["distill"]}
        return rows | {"paper, EMA teacher": last["distill"]["teacher_ap"]}
    # The teacher of "frozen" is the burnt-in student. Earlier runs of "robust" end with fine-tuning.
    ends_with_distillation = run["curve"][-1]["phase"] == "distill" or run["recipe"] == "robust"
    if ends_with_distillation and run["recipe"] != "frozen":
        burnt_in = {"unguided, burnt-in": aps["burnin"]} if run["recipe"] == "unguided" else {}
        teacher = {run["recipe"] + ", EMA teacher": last["distill"]["teacher_ap"]}
        fine_tuned = {run["recipe"] + ", fine-tuned": aps["finetune"]} if "finetune" in aps else {}
        return {run["recipe"]: aps["distill"], **burnt_in, **teacher, **fine_tuned}
    return {run["recipe"]: run["curve"][-1]["ap"]}


def group_by_row(runs: list[dict]) -> dict:
    """Return {(data, ratio): {row: {seed: AP}}}."""
    groups = {}
    for run in runs:
        for row, ap in final_aps(run).items():
            rows = groups.setdefault((run["data"], run["ratio"]), {})
            rows.setdefault(row, {})[run["seed"]] = ap
    return groups


# --------------------------------------------------------------------------------------------------- tables


def format_mean(values: list[float]) -> str:
    """Format mean, standard deviation, and number of values."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation} ({len(values)})"


def format_difference(row: dict, reference: dict) -> str:
    """Format the mean of the paired differences {seed: AP}, its standard error, and the number of pairs."""
    differences = [row[seed] - reference[seed] for seed in row.keys() & reference.keys()]
    if not differences:
        return ""
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    error = f" ± {error:.1f}" if error is not None else ""
    return f"{statistics.mean(differences):+.1f}{error} ({len(differences)})"


DESCRIPTIONS = {"teacher": "teacher, after phase 1", "burnt-in": "burnt-in student, after phase 2"}
DESCRIPTIONS |= {name: text for name, (text, _) in RECIPES.items()} | {"paper": "**Guided Distillation**"}
DESCRIPTIONS |= {name: f"{DESCRIPTIONS[name]}; earlier version, {LAST_COMMIT_OF_REMOVED}" for name in REMOVED}


def row_label(row: str) -> str:
    """Return the first two columns of a row: its recipe, and its description."""
    name, _, part = row.partition(", ")
    parts = {"EMA teacher": "— its EMA teacher", "burnt-in": "— its burnt-in student"}
    parts |= {"fine-tuned": "— fine-tuned on labels"}
    recipe = f"`{name}`" if name in RECIPES and not part else ""
    return f"{recipe} | {parts[part] if part else DESCRIPTIONS[name]}"


def make_table(rows: dict) -> list[str]:
    """Make the table of one dataset and ratio, in the order of RECIPES. rows: {row: {seed: AP}}."""
    names = ["teacher", "burnt-in", *RECIPES]
    order = sorted(rows, key=lambda row: (names.index(row.partition(", ")[0]), "," in row))
    columns = (
        "AP: mean ± standard deviation (seeds)",
        "difference from labels only",
        "difference from Guided Distillation",
    )
    control = "labels-as-long" if "labels-as-long" in rows else "labels-only"
    lines = [f"| recipe | | {' | '.join(columns)} |", "|---|---|---|---|---|"]
    for row in order:
        differences = [
            format_difference(rows[row], rows[other]) if other in rows and other != row else ""
            for other in (control, "paper")
        ]
        cells = [row_label(row), format_mean(list(rows[row].values())), *differences]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# -------------------------------------------------------------------------------------------------- figures

STYLES = {
    "paper": ("Guided Distillation", "C0"),
    "unguided": ("unguided burn-in", "C1"),
    "no-distillation": ("no distillation", "C2"),
    "labels-only": ("labels only", "C3"),
}


def curve_values(run: dict, phase: str, name: str) -> dict:
    """Return {step: value} of one phase and key of a run's curve. Steps count from the start of phase 1."""
    steps = [re.search(r"--steps (\d+),(\d+),", command) for command in run["commands"]]
    t, b = next((map(int, found.groups()) for found in steps if found), (0, 0))
    finetunes = not steps[-1]  # Fine-tuning has one number of steps, and starts where phase 3 ended.
    first = {"teacher": 0, "supervised": finetunes * sum(run["steps"]), "burnin": t, "distill": t + b}[phase]
    if phase == "distill" and re.search(r"--student(-checkpoint)? \S+/distill\.pt", run["commands"][-1]):
        first = sum(run["steps"])  # The run starts where phase 3 of another run ended.
    return {first + p["step"]: p[name] for p in run["curve"] if p["phase"] == phase and name in p}


def draw_curves(axis, runs: list[dict], names: dict, label: str | None, color: str) -> None:
    """Draw a line for each phase of `names`, {phase: key of the curve}: the mean over seeds, and a band of
    one standard deviation."""
    for phase, name in names.items():
        curves = [curve_values(run, phase, name) for run in runs]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        rows = [[curve[step] for curve in curves] for step in steps]
        means = [statistics.mean(row) for row in rows]
        deviations = [statistics.stdev(row) if len(row) > 1 else 0.0 for row in rows]
        axis.plot(steps, means, ".-", color=color, label=label if steps else None)
        lower = [mean - deviation for mean, deviation in zip(means, deviations)]
        upper = [mean + deviation for mean, deviation in zip(means, deviations)]
        axis.fill_between(steps, lower, upper, color=color, alpha=0.15, linewidth=0)
        label = None if steps else label


def import_pyplot():
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def plot_phases(runs: list[dict], file: Path) -> None:
    """Plot AP over all phases, and pseudo-label quality with guided and with unguided burn-in: in burn-in of
    the pseudo-labels that the student would give, in distillation of the EMA teacher's. runs: of one data
    set and ratio."""
    pyplot = import_pyplot()
    by_recipe = {recipe: [run for run in runs if run["recipe"] == recipe] for recipe in RECIPES}
    t, b, d = by_recipe["paper"][0]["steps"]
    axes = pyplot.subplots(1, 4, figsize=(14, 3.6), layout="constrained")[1]
    for recipe, (label, color) in STYLES.items():
        phases = ("supervised", "teacher", "burnin", "distill")
        draw_curves(axes[0], by_recipe[recipe], dict.fromkeys(phases, "ap"), label, color)
    axes[0].set_title("mask AP", fontsize=10)
    for axis, name in zip(axes[1:], ("precision", "recall", "mask_iou")):
        for recipe in ("paper", "unguided"):
            names = {"burnin": f"student_{name}", "distill": name}
            draw_curves(axis, by_recipe[recipe], names, *STYLES[recipe])
        teachers = [curve_values(run, "teacher", name).get(t) for run in by_recipe["paper"]]
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


def plot_recipes(runs: list[dict], file: Path) -> None:
    """Plot the AP of each recipe over the steps in a panel, with that of the paper's recipe in gray."""
    pyplot = import_pyplot()
    by_recipe = {recipe: [run for run in runs if run["recipe"] == recipe] for recipe in RECIPES}
    phases = dict.fromkeys(("supervised", "teacher", "burnin", "distill"), "ap")
    shown = [recipe for recipe in RECIPES if by_recipe[recipe] and recipe != "paper"]
    rows = math.ceil(len(shown) / 5)
    size = dict(figsize=(14, 2.2 * rows), sharex=True, sharey=True, squeeze=False, layout="constrained")
    axes = pyplot.subplots(rows, 5, **size)[1].flat
    for axis, recipe in itertools.zip_longest(axes, shown):
        axis.set_axis_off() if recipe is None else axis.set_title(recipe, fontsize=9)
        axis.tick_params(labelbottom=True)
        if recipe:
            draw_curves(axis, by_recipe["paper"], phases, None, "grey")
            draw_curves(axis, by_recipe[recipe], phases, None, "C0")
    pyplot.savefig(file, dpi=90)
    pyplot.close()


# ----------------------------------------------------------------------------------------------------- page

INTRODUCTION = f"""\
`python experiments/ablation.py --tables` makes this page from the runs in `ablation.jsonl`. That file has the
commands and the evaluations of every run.

The row "Guided Distillation" is the method with the options under "Commands". All other options are those of
the preset `shapes` (`PRESETS` in `training/config.py`). The preset has a score threshold of 0.9 and an EMA
decay of 0.998. The paper has 0.7 and 0.9996, in much longer runs. Every other row changes only what its
description says. The supervised rows also sample labeled images uniformly, where Guided Distillation
uses repeat factors in phases 2 and 3 (`--repeat-threshold`). The recipe `uniform`, which separates the
two, was not run.

AP is the mask AP of the final student (no checkpoint selection). Teachers and burnt-in students are measured
at the end of their phase. For burnt-in students that is in the middle of the learning-rate schedule.

All recipes of a seed have the same labeled images. Unless the description says otherwise, they also have the
same teacher and the same initial weights of the student. Recipes are therefore compared seed by seed: the two
columns on the right are means of the paired differences, with their standard error and the number of seeds.
For n = 3, the 95 % confidence interval is ±4.3 standard errors.

All runs were made with versions up to commit {LAST_COMMIT_OF_REMOVED}. Three recipes use options that have
been removed since: {", ".join(f"`{recipe}`" for recipe in REMOVED)}. Their rows are marked "earlier version".
To repeat them, check out that commit."""


def wrap(text: str) -> str:
    """Wrap every paragraph of a text at 100 columns."""
    kwargs = dict(width=100, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join(textwrap.fill(paragraph, **kwargs) for paragraph in text.split("\n\n"))


def list_figures(data: str, ratio: float, recipes: set[str]) -> list[tuple]:
    """Return (file name, caption, plot function) of the figures of one dataset and ratio."""
    name, figures = f"ablation-{data}-{100 * ratio:g}", []
    if {"paper", "unguided"} <= recipes:
        figures.append((f"{name}.png", "AP and pseudo-label quality over the steps", plot_phases))
    if recipes > {"paper"}:
        caption = "AP of each recipe during training; gray: Guided Distillation"
        figures.append((f"{name}-curves.png", caption, plot_recipes))
    return figures


def describe_machines(runs: list[dict]) -> str:
    """Name the machine of most runs, and the others with their recipes."""
    counts = Counter(run["machine"] for run in runs)
    main, *others = [name for name, _ in counts.most_common()]
    text = f"Machine: {main}."
    for other in others:
        recipes = sorted({f"`{run['recipe']}`" for run in runs if run["machine"] == other})
        places = sorted(
            {f"{run['data']}, {100 * run['ratio']:g} %" for run in runs if run["machine"] == other}
        )
        number = "1 run" if counts[other] == 1 else f"{counts[other]} runs"
        text += f" {number} of {', '.join(recipes)} ({'; '.join(places)}): {other}."
    return text


def make_section(data: str, ratio: float, runs: list[dict]) -> list[str]:
    """Make the section of one dataset and ratio, of which the runs are: table, cost, figures."""
    rows, dates = group_by_row(runs)[data, ratio], sorted({run["date"] for run in runs})
    hours, period = sum(run["hours"] for run in runs), " to ".join(sorted({dates[0], dates[-1]}))
    cost = f"{len(runs)} runs, {hours:.1f} hours of training without evaluations, {period}."
    lines = [f"## {data}, {100 * ratio:g} % of the labels", "", *make_table(rows), ""]
    lines += [wrap(f"{cost} {describe_machines(runs)}"), ""]
    for name, caption, _ in list_figures(data, ratio, {run["recipe"] for run in runs}):
        lines += [f"![{caption}]({name})", "", f"{caption}.", ""]
    return lines


def make_commands(runs: list[dict], note: str) -> list[str]:
    """Make the section with the commands of all recipes that have been run. note: about their spelling."""
    lines = ["## Commands", "", "Unless a recipe overrides them, its commands also have these flags:", ""]
    lines += ["| data | flags |", "|---|---|"]
    datasets = sorted({run["data"] for run in runs})
    for data in datasets:
        flags, (t, b, d) = DATA[data]
        flags += f" --ratio RATIO --seed SEED --steps {t},{b},{d} --out OUT"
        lines.append(f"| {data} | `{flags}` |")
    names = {"own": "OUT"} | {name: name.upper() for name in STARTS}
    example = "shapes" if "shapes" in datasets else datasets[0]
    numbers, recorded = step_numbers(*DATA[example][1]), {run["recipe"] for run in runs}
    rows = [f"| recipe | description | commands, with the steps of {example} |", "|---|---|---|"]
    for recipe, (_, commands) in RECIPES.items():
        if recipe in recorded:
            code = "<br>".join(f"`{command.format(**names, **numbers)}`" for command in commands)
            rows.append(f"| `{recipe}` | {DESCRIPTIONS[recipe].strip('*')} | {code} |")
    starts = {name.upper(): path.split("/") for name, path in STARTS.items()}
    starts = [f"{name} is {file} of `{recipe}`." for name, (recipe, file) in starts.items()
              if f" {name}" in " ".join(rows)]  # fmt: skip
    single = "A single number as `--steps` is the length of each of the three phases."
    return lines + ["", wrap(" ".join([*starts, single])), "", wrap(note), "", *rows]


def group_runs(runs: list[dict]) -> dict:
    """Return {(data, ratio): runs}, sorted."""
    groups = {}
    for run in runs:
        groups.setdefault((run["data"], run["ratio"]), []).append(run)
    return dict(sorted(groups.items()))


def make_page(runs: list[dict]) -> str:
    """Return the text of ABLATION.md."""
    lines = ["# What makes Guided Distillation work", "", wrap(INTRODUCTION), ""]
    for (data, ratio), group in group_runs(runs).items():
        lines += make_section(data, ratio, group)
    spelling = (
        "Flags have their present names here, except in the three rows of an earlier version. "
        "`ablation.jsonl` has the commands as they were run."
    )
    return "\n".join(lines + make_commands(runs, spelling)) + "\n"


def write_page(runs: list[dict], folder: Path) -> None:
    """Write ABLATION.md and its figures."""
    (folder / "ABLATION.md").write_text(make_page(runs))
    for (data, ratio), group in group_runs(runs).items():
        for name, _, plot in list_figures(data, ratio, {run["recipe"] for run in group}):
            plot(group, folder / name)
