"""Does guided distillation work, and what makes it work? Recipes over ratios and seeds. All recipes of a
seed have the same labelled images and, where they do not say otherwise, the same teacher and a student with
the same initial weights.

    python bench/ablation.py --quick                               # a small table in a quarter of an hour
    python bench/ablation.py --ratio 0.02 0.05 0.1 --seeds 0 1 2   # on shapes
    python bench/ablation.py --data nuclei --recipes paper labels-only
    python bench/ablation.py --tables                              # ABLATION.md of bench/ablation.jsonl

Every run that finishes is a line of the file --results, which ends as tables on the screen, and is not run
again; one that was stopped goes on from its last checkpoint. nuclei needs in the current folder
mobilenetv2_100.safetensors, ImageNet weights of timm's model of that name, and tiles/, made of real images
(RESULTS.md):

    python bench/tiles.py nuclei tiles --size 96 --ratio 0.05 0.1 --seeds 0 1 2"""

import argparse
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from checkpoints import load_checkpoint, lock  # noqa: E402
from flags import user_errors  # noqa: E402

RESULTS, PAGE = HERE / "ablation.jsonl", HERE / "ABLATION.md"

# flags, and the steps of teacher burn-in, guided burn-in and distillation
DATA = {
    "shapes": ("--data shapes --eval-every 250", (500, 700, 900)),
    "nuclei": (
        "--data tiles --split tiles/splits/RATIO-SEED.txt --preset shapes --crop 96,96 --num-queries 30 "
        "--num-points 512 --score-threshold 0.7 --eval-every 750 --backbone mobilenetv2_100 --backbone-args "
        '\'{"pad_type": "same"}\' --backbone-weights mobilenetv2_100.safetensors --norm frozen '
        "--pixel-mean 127.5,127.5,127.5 --pixel-std 127.5,127.5,127.5 --backbone-lr-factor 0.5",
        (2500, 1500, 1500),
    ),
}
QUICK = (200, 280, 360)

# What each recipe is, and its commands. {teacher}, {student} and {distilled} are the checkpoints of the three
# phases of the recipe "paper" with the same seed, {own} is the folder of the run, and {t}, {b}, {d} are the
# steps of the phases, {whole} those of the guided ones together.
RECIPES = {
    "paper": ("Guided Distillation", ["distill.py"]),
    "labels-only": ("labels only, for the steps of all phases", ["distill.py --labels-only"]),
    "unguided": (
        "unguided burn-in: the student's on labels only, then distillation",
        [
            "burnin.py --teacher {teacher} --unsupervised-weight 0 --out {own}-start",
            "distill.py --student {own}-start/burnin.pt",
        ],
    ),
    "no-distillation": (
        "no distillation: guided burn-in all the way, the first teacher stays",
        ["burnin.py --teacher {teacher} --steps {t},{whole},1"],
    ),
    "two-phase": (
        "no student's burn-in: the teacher goes on as student and EMA teacher",
        ["distill.py --student {teacher} --steps {t},1,{whole}"],
    ),
    "labels-only-jitter": (
        "labels only for all steps, and colour jitter of their images",
        ["distill.py --labels-only --colour"],
    ),
    "from-teacher": (
        "the student starts from the teacher, not fresh",
        ["distill.py --teacher {teacher} --init {teacher}"],
    ),
    "frozen": (
        "distillation from a copy of the burnt-in student that stays",
        ["distill.py --student {student} --ema-decay 1"],
    ),
    "ema-0.99": ("EMA decay 0.99", ["distill.py --student {student} --ema-decay 0.99"]),
    "ema-0.9996": ("EMA decay 0.9996", ["distill.py --student {student} --ema-decay 0.9996"]),
    "paper-values": (
        "threshold 0.7 and EMA decay 0.9996, as in the paper's far longer runs",
        ["distill.py --teacher {teacher} --score-threshold 0.7 --ema-decay 0.9996"],
    ),
    "uniform": (
        "labelled images sampled uniformly in all phases",
        ["distill.py --teacher {teacher} --repeat-threshold 0"],
    ),
    "threshold-0.5": ("threshold 0.5", ["distill.py --teacher {teacher} --score-threshold 0.5"]),
    "threshold-0.7": ("threshold 0.7", ["distill.py --teacher {teacher} --score-threshold 0.7"]),
    "threshold-0.9": ("threshold 0.9", ["distill.py --teacher {teacher} --score-threshold 0.9"]),
    "threshold-0.95": ("threshold 0.95", ["distill.py --teacher {teacher} --score-threshold 0.95"]),
    "lower-later": (
        "threshold 0.7 in distillation alone",
        ["distill.py --student {student} --score-threshold 0.7"],
    ),
    "unguided-lower-later": (
        "unguided burn-in, and threshold 0.7 in distillation",
        [
            "burnin.py --teacher {teacher} --unsupervised-weight 0 --out {own}-start",
            "distill.py --student {own}-start/burnin.pt --score-threshold 0.7",
        ],
    ),
    "weight-1": ("unsupervised weight 1", ["distill.py --teacher {teacher} --unsupervised-weight 1"]),
    "weight-4": ("unsupervised weight 4", ["distill.py --teacher {teacher} --unsupervised-weight 4"]),
    "weak-view": (
        "strong view off: the student sees what the teacher sees",
        ["distill.py --teacher {teacher} --strong-view false"],
    ),
    "shorter": (
        "guided burn-in half as long, distillation longer by as much",
        ["distill.py --teacher {teacher} --steps {t},{b_half},{d_more}"],
    ),
    "longer": (
        "distillation half as long, guided burn-in longer by as much",
        ["distill.py --teacher {teacher} --steps {t},{b_more},{d_half}"],
    ),
    "mask-quality": (
        "only pseudo-labels with a mean mask probability of 0.9 (PL-DC)",
        ["distill.py --teacher {teacher} --mask-threshold 0.9"],
    ),
    "pixel-weights": (
        "mask BCE weighted by how sure the teacher is of a pixel (PL-DC)",
        ["distill.py --teacher {teacher} --pixel-weights"],
    ),
    "soft-weights": (
        "threshold 0.5, losses weighted by the score to the power of 4 (PAIS)",
        ["distill.py --teacher {teacher} --score-threshold 0.5 --score-power 4"],
    ),
    "refined": (
        "a third of phase 3 more, on labels only at a tenth of the learning rate (CAST)",
        ["distill.py --labels-only --init {distilled} --lr 1e-4 --steps {refine}"],
    ),
    "more-distillation": (
        "phase 3 a third longer",
        ["distill.py --student {student} --steps {t},{b},{d_third_more}"],
    ),
}
# Recipes that repeat what another does there, because that is its threshold.
SAME = {("shapes", "threshold-0.9"), ("nuclei", "threshold-0.7"), ("nuclei", "paper-values")}
SAME |= {("nuclei", "lower-later"), ("nuclei", "unguided-lower-later")}
MAIN = ["paper", "labels-only", "unguided", "no-distillation"]


def numbers_of(t: int, b: int, d: int) -> dict:
    """The numbers that stand in the commands of RECIPES, from the steps of the phases."""
    numbers = {"t": t, "b": b, "d": d, "whole": b + d - 1, "refine": max(1, d // 9)}
    numbers["d_third_more"] = d + 3 * numbers["refine"]
    return numbers | {"b_half": b // 2, "d_more": d + b - b // 2, "d_half": d // 2, "b_more": b + d - d // 2}


def command(text: str, data: str, ratio: float, seed: int, steps: tuple, own: Path) -> str:
    """A recipe's command for a run, with all flags; its own come last, so that they hold."""
    t, b, d = steps
    paper = own.parent / "paper"
    paths = {
        "own": own,
        "teacher": paper / "teacher.pt",
        "student": paper / "burnin.pt",
        "distilled": paper / "distill.pt",
    }
    paths = {name: shlex.quote(str(path)) for name, path in paths.items()}
    script, _, more = text.format(**paths, **numbers_of(t, b, d)).partition(" ")
    more += "" if "--steps" in more else f" --steps {t},{b},{d}"
    more += "" if "--out" in more else f" --out {paths['own']}"
    flags = DATA[data][0].replace("RATIO", f"{ratio:g}").replace("SEED", str(seed))
    return f"{script} {flags} --ratio {ratio:g} --seed {seed} {more.strip()}"


class Ablation:
    """Runs recipes. folder: of all runs. results: the file of their records. steps: of the phases, in place
    of those in DATA."""

    def __init__(self, folder: Path, results: Path, steps: tuple | None = None):
        self.folder, self.results, self.steps = folder, results, steps
        self.recorded = {key(run) for run in read(results)}
        self.lock, self.papers = threading.Lock(), {}
        self.stopped, self.processes = False, set()

    def run(self, data: str, ratio: float, seed: int, recipe: str) -> None:
        """A recipe that has no record yet, after the paper's if it starts from its checkpoints."""
        if (data, ratio, seed, recipe) in self.recorded:
            return
        group = self.folder / f"{data}-{ratio:g}-{seed}"
        with self.lock:
            one_at_a_time = self.papers.setdefault(group, threading.Lock())
        needed = ("{teacher}", "{student}", "{distilled}")
        if recipe == "paper" or any(name in text for text in RECIPES[recipe][1] for name in needed):
            with one_at_a_time:
                recorded = (data, ratio, seed, "paper") in self.recorded
                if not (recorded and (group / "paper/distill.pt").exists()):
                    self.execute(data, ratio, seed, "paper", group / "paper")
        if recipe != "paper":
            self.execute(data, ratio, seed, recipe, group / recipe)

    def execute(self, data: str, ratio: float, seed: int, recipe: str, own: Path) -> None:
        steps = self.steps or DATA[data][1]
        commands = [command(text, data, ratio, seed, steps, own) for text in RECIPES[recipe][1]]
        if self.stopped:
            raise RuntimeError("stopped")
        own.mkdir(parents=True, exist_ok=True)
        print(f"{time.strftime('%H:%M')} {data} {ratio:g} seed {seed} {recipe} ...", flush=True)
        with open(own / "log", "a") as log:
            for line in commands:
                script, *flags = shlex.split(line)
                words = [sys.executable, str(HERE.parent / script), *flags]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                self.call(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
        run = {"data": data, "ratio": ratio, "seed": seed, "recipe": recipe}
        run |= {"steps": steps, "commands": commands, "hours": round(hours(own), 3)}
        run |= {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "curve": curve(own)}
        for last in {point["phase"]: point for point in run["curve"]}.values():
            folder = own if (own / f"{last['phase']}.pt").exists() else own.with_name(own.name + "-start")
            saved = load_checkpoint(folder / f"{last['phase']}.pt")
            if saved["step"] != last["step"] or abs(saved["ap"]["AP"] - last["ap"]) > 0.01:
                end = f"the end of phase {last['phase']}"  # it was killed between saving and logging
                raise RuntimeError(f"{folder}/metrics.jsonl lacks {end}; remove the folder")
        with self.lock:
            if key(run) not in self.recorded:
                self.recorded.add(key(run))
                whole = not self.results.exists() or self.results.read_text()[-1:] in ("", "\n")
                with open(self.results, "a") as file:
                    file.write("\n" * (not whole) + json.dumps(run) + "\n")
        print(
            f"{time.strftime('%H:%M')} {data} {ratio:g} seed {seed} {recipe}: {results_of(run)}", flush=True
        )

    def call(self, words: list[str], **how) -> None:
        if self.stopped:
            raise RuntimeError("stopped")
        with subprocess.Popen(words, **how) as process:
            self.processes.add(process)
            if self.stopped:  # meanwhile
                process.terminate()
            code = process.wait()
            self.processes.discard(process)
        if code:
            raise RuntimeError(f"{shlex.join(words)} ended with {code}, see its log")

    def stop(self, *_) -> None:
        """All runs save and leave."""
        self.stopped = True
        for process in list(self.processes):
            process.terminate()


def key(run: dict) -> tuple:
    return run["data"], run["ratio"], run["seed"], run["recipe"]


def read(file: Path) -> list[dict]:
    """The lines of a file of JSON but for one that was cut short when its process was killed."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpus = Path("/proc/cpuinfo")
    names = [x for x in cpus.read_text().splitlines() if x.startswith("model name")] if cpus.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"one thread of {name}, torch {torch.__version__}"


def metrics(own: Path) -> list[dict]:
    """What the commands of a run have logged, in their order."""
    folders = own.with_name(own.name + "-start"), own
    return [line | {"folder": folder.name} for folder in folders for line in read(folder / "metrics.jsonl")]


def curve(own: Path) -> list[dict]:
    """The evaluations of a run in their order: AP, that of the EMA teacher where it was taken, and the health
    of the pseudo-labels, in guided burn-in also of those that the student would give."""
    points = {}
    for line in metrics(own):
        if "ap" in line:
            point = {"phase": line["phase"], "step": line["step"], "ap": line["ap"]["AP"]}
            point |= {"teacher_ap": line["teacher_ap"]["AP"]} if "teacher_ap" in line else {}
            for prefix in ("", "student_"):
                health = line.get(prefix + "pseudo", {})
                names = {"kept", "recall"} | ({"precision", "mask_iou"} if health.get("kept") else set())
                names &= health.keys()
                point |= {prefix + name: health[name] for name in sorted(names)}
            point = {name: round(v, 2) if isinstance(v, float) else v for name, v in point.items()}
            points[line["folder"], line["phase"], line["step"]] = point
    return list(points.values())


def hours(own: Path, batch: int = 8) -> float:
    """Of training, without evaluations, from the images per second that were logged. batch: of the presets
    used here."""
    seconds, before = 0.0, {}
    for line in metrics(own):
        if "images_per_second" in line:
            phase, step = (line["folder"], line["phase"]), line["step"]
            images = batch * (2 if "guided_loss" in line else 1)
            seconds += images * max(0, step - before.get(phase, 0)) / line["images_per_second"]
            before[phase] = max(step, before.get(phase, 0))
    return seconds / 3600


# -------------------------------------------------------------------------------------------------- tables


def results_of(run: dict) -> dict:
    """{row of the table: AP at the end}."""
    last = {point["phase"]: point for point in run["curve"]}
    aps = {phase: point["ap"] for phase, point in last.items()}
    if run["recipe"] == "paper":
        rows = {"teacher": aps["teacher"], "burnt-in": aps["burnin"], "paper": aps["distill"]}
        return rows | {"paper, EMA teacher": last["distill"]["teacher_ap"]}
    if "distill" in aps and run["recipe"] != "frozen":  # whose teacher is the burnt-in student
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


LABELS = {"teacher": "labels only, for the teacher's steps", "burnt-in": "guided burn-in"}
LABELS |= {name: text for name, (text, _) in RECIPES.items()} | {"paper": "**Guided Distillation**"}


def label(row: str) -> str:
    name, _, part = row.partition(", ")
    parts = {"EMA teacher": "— its EMA teacher", "burnt-in": "— its student before distillation"}
    return parts[part] if part else LABELS[name]


def table(rows: dict) -> list[str]:
    """Of one data set and ratio, in the order of RECIPES."""
    names = ["teacher", "burnt-in", *RECIPES]
    order = sorted(rows, key=lambda row: (names.index(row.partition(", ")[0]), "," in row))
    lines = [
        "| | AP: mean ± standard deviation (seeds) | more than labels only | more than Guided Distillation |"
    ]
    lines.append("|---|---|---|---|")
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
    own = re.search(r"--steps (\d+),(\d+),", run["commands"][-1])
    t, b = map(int, own.groups()) if own else (0, 0)
    first = {"teacher": 0, "labels_only": 0, "burnin": t, "distill": t + b}[phase]
    first += 0 if own else sum(run["steps"])  # of a run that begins where the paper's ends
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
evaluations of each. Guided Distillation is the method with the settings under "Commands"; every other row
changes what it says. AP is that of the student at the end of training, never the best on the way.
All recipes of a seed have the same labelled images and, where they do not say otherwise, the same teacher and
a student with the same initial weights; so recipes are compared seed by seed: the two columns on the right
are means of such differences, with their standard error and number. With three seeds, the 95 % interval is
4.3 standard errors to both sides.
"""


def write_page(runs: list[dict]) -> None:
    """ABLATION.md and its figures."""
    parts = [INTRO]
    for (data, ratio), rows in sorted(gather(runs).items()):
        here = [run for run in runs if (run["data"], run["ratio"]) == (data, ratio)]
        machines, dates = sorted({run["machine"] for run in here}), sorted({run["date"] for run in here})
        parts += [f"## {data}, {100 * ratio:g} % of the labels", "", *table(rows), ""]
        hours, when = sum(run["hours"] for run in here), " to ".join(sorted({dates[0], dates[-1]}))
        parts += [f"{len(here)} runs, {hours:.1f} hours of training. {'; '.join(machines)}; {when}.", ""]
        if {"paper", "unguided"} <= {run["recipe"] for run in here}:
            name = f"ablation-{data}-{100 * ratio:g}.png"
            figure(here, HERE / name)
            parts += [f"![AP and pseudo-labels over the steps]({name})", ""]
            name = f"ablation-{data}-{100 * ratio:g}-curves.png"
            curves(here, HERE / name)
            text = "AP of each recipe on the way, by its name below; in grey that of Guided Distillation"
            parts += [f"![{text}]({name})", "", f"{text}.", ""]
    parts += ["## Commands", "", "All of them have besides, where they do not say otherwise:", ""]
    for data in sorted({run["data"] for run in runs}):
        flags, (t, b, d) = DATA[data]
        parts.append(f"- {data}: `{flags} --ratio RATIO --seed SEED --steps {t},{b},{d} --out OUT`")
    parts += [
        "",
        "TEACHER, STUDENT and DISTILLED are teacher.pt, burnin.pt and distill.pt of Guided Distillation.",
        "",
    ]
    t, b, d = DATA["shapes"][1]
    names = {"own": "OUT", "teacher": "TEACHER", "student": "STUDENT", "distilled": "DISTILLED"}
    parts += ["| recipe | what it is | commands, with the steps of shapes |", "|---|---|---|"]
    for recipe, (text, commands) in RECIPES.items():
        lines = "<br>".join(f"`{line.format(**names, **numbers_of(t, b, d))}`" for line in commands)
        parts.append(f"| {recipe} | {text} | {lines} |")
    PAGE.write_text("\n".join(parts) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=DATA, default="shapes")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.02])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="their folder")
    parser.add_argument("--results", type=Path, help="where they are recorded; default: results.jsonl there")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(MAIN)}, {QUICK} steps, 2 seeds")
    parser.add_argument("--tables", action="store_true")
    flags = parser.parse_args()
    if flags.tables:
        return write_page(read(RESULTS))
    if flags.quick:
        flags.recipes, flags.seeds, flags.runs = MAIN, [0, 1], Path("runs/ablation-quick")
    for recipe in flags.recipes:
        if (flags.data, recipe) in SAME:
            print(f"{recipe} is left out: on {flags.data} it repeats another recipe", file=sys.stderr)
    results = flags.results or flags.runs / "results.jsonl"
    ablation = Ablation(flags.runs, results, QUICK if flags.quick else None)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ablation.stop)
    with user_errors():
        lock(flags.runs)
    with ThreadPoolExecutor(flags.jobs) as pool:
        jobs = [
            pool.submit(ablation.run, flags.data, ratio, seed, recipe)
            for ratio in flags.ratio
            for recipe in flags.recipes  # first the paper's of all seeds: others wait for its checkpoints
            for seed in flags.seeds
            if (flags.data, recipe) not in SAME
        ]
        errors = [job.exception() for job in jobs]
    if any(errors):
        sys.exit("\n".join(sorted({f"error: {error}" for error in errors if error})))
    for (data, ratio), rows in gather(read(results)).items():
        print(f"\n{data}, {100 * ratio:g} % of the labels\n", *table(rows), sep="\n")


if __name__ == "__main__":
    main()
