"""Does guided distillation work, and what makes it work? Recipes over ratios and seeds, each against the
same labels: the split, the initial weights and the views of a seed are the same in all of them.

    python bench/ablation.py --quick                              # a small table in a quarter of an hour
    python bench/ablation.py --data shapes --ratio 0.02 0.05 0.1 --seeds 0 1 2 --jobs 2
    python bench/ablation.py --data nuclei --ratio 0.05 --seeds 0 --recipes paper labels-only
    python bench/ablation.py --tables                             # writes ABLATION.md from what has finished

Every run that finishes is a line of bench/ablation.jsonl, and is not run again; one that was stopped goes on
from its last checkpoint. Runs share what they have in common: all students of a seed have the same teacher.
nuclei needs tiles/ (bench/tiles.py, RESULTS.md) and mobilenetv2_100.safetensors in the current folder."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "ablation.jsonl", HERE / "ABLATION.md"

# flags, and the steps of teacher burn-in, guided burn-in, distillation
DATA = {
    "shapes": ("--data shapes --eval-every 250", (500, 700, 900)),
    "nuclei": (
        "--data tiles --preset shapes --backbone mobilenetv2_100 --norm frozen --backbone-lr-factor 0.5 "
        '--backbone-weights mobilenetv2_100.safetensors --backbone-args \'{"pad_type": "same"}\' '
        "--pixel-mean 127.5,127.5,127.5 --pixel-std 127.5,127.5,127.5 "
        "--crop 128,128 --num-queries 30 --num-points 512 --score-threshold 0.95 --eval-every 500",
        (1000, 1500, 1500),
    ),
}
QUICK = (200, 280, 360)

# Commands of each recipe. {teacher}, {burnt_in}: the checkpoints of phases 1 and 2 of the paper's recipe with
# the same seed, {own} the folder of the run, {t}, {b}, {d}, {bd} the steps of the phases, and of both guided
# ones. A word on each stands in the tables.
RECIPES = {
    "paper": ("the paper's recipe", ["distill.py"]),
    "labels-only": ("labels only, as many steps as all phases", ["distill.py --labels-only"]),
    "unguided": (
        "unguided burn-in: the student's burn-in on labels only, then distillation",
        [
            "burnin.py --teacher {teacher} --unsupervised-weight 0 --out {own}-start",
            "distill.py --student {own}-start/burnin.pt",
        ],
    ),
    "no-distillation": (
        "no distillation: guided burn-in for the whole length, the teacher of phase 1 throughout",
        ["burnin.py --teacher {teacher} --steps {t},{bd},1"],
    ),
    "from-teacher": (
        "the student starts from the teacher instead of fresh",
        ["distill.py --teacher {teacher} --init {teacher}"],
    ),
    "frozen": (
        "distillation from a frozen copy of the burnt-in student",
        ["distill.py --student {burnt_in} --ema-decay 1"],
    ),
    "ema-0.99": ("EMA decay 0.99", ["distill.py --student {burnt_in} --ema-decay 0.99"]),
    "ema-0.9996": ("EMA decay 0.9996", ["distill.py --student {burnt_in} --ema-decay 0.9996"]),
    "threshold-0.5": ("threshold 0.5", ["distill.py --teacher {teacher} --score-threshold 0.5"]),
    "threshold-0.7": ("threshold 0.7", ["distill.py --teacher {teacher} --score-threshold 0.7"]),
    "weight-1": ("unsupervised weight 1", ["distill.py --teacher {teacher} --unsupervised-weight 1"]),
    "weight-4": ("unsupervised weight 4", ["distill.py --teacher {teacher} --unsupervised-weight 4"]),
    "weak-view": (
        "strong view off: the student sees the teacher's view",
        ["distill.py --teacher {teacher} --strong-view false"],
    ),
    "burn-in-shorter": (
        "guided burn-in half as long, distillation longer by as much",
        ["distill.py --teacher {teacher} --steps {t},{half_b},{more_d}"],
    ),
    "burn-in-longer": (
        "guided burn-in longer by half of the distillation",
        ["distill.py --teacher {teacher} --steps {t},{more_b},{half_d}"],
    ),
}
MAIN = ["paper", "labels-only", "unguided", "no-distillation"]


def steps_of(t: int, b: int, d: int) -> dict:
    """The numbers that stand in RECIPES' commands."""
    halves = {"half_b": b // 2, "more_d": d + b - b // 2, "half_d": d // 2, "more_b": b + d - d // 2}
    return {"t": t, "b": b, "d": d, "bd": b + d - 1} | halves


class Ablation:
    """runs: the folder of all runs. steps: of the three phases, in place of DATA's."""

    def __init__(self, runs: Path, results: Path, steps: tuple | None = None):
        self.runs, self.results, self.steps = runs, results, steps
        self.recorded = {key(row) for row in read(results)}
        self.lock, self.one_paper = threading.Lock(), defaultdict(threading.Lock)

    def run(self, data: str, ratio: float, seed: int, recipe: str) -> None:
        """A recipe, and first the paper's if it needs that; nothing that has been recorded."""
        if (data, ratio, seed, recipe) in self.recorded:
            return
        group = self.runs / f"{data}-{ratio:g}-{seed}"
        paper = group / "paper"
        if any("{teacher}" in command or "{burnt_in}" in command for command in RECIPES[recipe][1]):
            with self.one_paper[group]:
                if not (paper / "distill.pt").exists():
                    self.execute(data, ratio, seed, "paper", group)
        if recipe == "paper":
            with self.one_paper[group]:
                if not (paper / "distill.pt").exists():
                    self.execute(data, ratio, seed, "paper", group)
        else:
            self.execute(data, ratio, seed, recipe, group)

    def execute(self, data, ratio, seed, recipe, group: Path) -> None:
        flags, steps = DATA[data]
        own, steps = group / recipe, self.steps or steps
        paths = {"teacher": group / "paper/teacher.pt", "burnt_in": group / "paper/burnin.pt", "own": own}
        commands = [self.command(c, flags, steps, ratio, seed, own, paths) for c in RECIPES[recipe][1]]
        own.mkdir(parents=True, exist_ok=True)
        print(f"{time.strftime('%H:%M')} {data} {ratio:g} seed {seed} {recipe}", flush=True)
        for command in commands:
            script, *rest = shlex.split(command)
            with open(own / "log", "a") as log:
                words = [sys.executable, str(HERE.parent / script), *rest]
                env = os.environ | {"OMP_NUM_THREADS": "1"}
                subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=env, check=True)
        row = {"data": data, "ratio": ratio, "seed": seed, "recipe": recipe, "steps": list(steps)}
        row |= {"commands": commands, "machine": machine(), "date": time.strftime("%Y-%m-%d")}
        row |= {"hours": hours(own), "curve": curve(own)}
        with self.lock:
            if key(row) not in self.recorded:
                self.recorded.add(key(row))
                with open(self.results, "a") as file:
                    file.write(json.dumps(row) + "\n")

    def command(self, text, flags, steps, ratio, seed, own, paths) -> str:
        """With all its flags; those of the recipe come last, so that they hold."""
        script, _, more = text.format(**paths, **steps_of(*steps)).partition(" ")
        length = "" if "--steps" in more else f"--steps {','.join(map(str, steps))}"
        out = "" if "--out" in more else f"--out {own}"
        return f"{script} {flags} --ratio {ratio:g} --seed {seed} {length} {more} {out}".strip()


def key(row: dict) -> tuple:
    return row["data"], row["ratio"], row["seed"], row["recipe"]


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in open(file)] if file.exists() else []


def machine() -> str:
    cpus = Path("/proc/cpuinfo")
    names = [x for x in cpus.read_text().splitlines() if x.startswith("model name")] if cpus.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"one thread of {name}, torch {torch.__version__}"


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def folders(own: Path) -> list[Path]:
    return [f for f in (own.with_name(own.name + "-start"), own) if (f / "metrics.jsonl").exists()]


def curve(own: Path) -> list[dict]:
    """The evaluations of a run in their order: AP, that of the EMA teacher where it was taken, and the health
    of the pseudo-labels."""
    points = {}
    for folder in folders(own):
        for line in metrics(folder):
            if "ap" in line:
                point = {"phase": line["phase"], "step": line["step"], "ap": line["ap"]["AP"]}
                point |= {"teacher_ap": line["teacher_ap"]["AP"]} if "teacher_ap" in line else {}
                names = ("kept", "precision", "recall", "mask_iou")
                point |= {name: line["pseudo"][name] for name in names if name in line["pseudo"]}
                rounded = {k: round(v, 2) if isinstance(v, float) else v for k, v in point.items()}
                points[folder, line["phase"], line["step"]] = rounded
    return list(points.values())


def hours(own: Path) -> float:
    """Of training, from images per second; without evaluations."""
    seconds = 0.0
    for folder in folders(own):
        before = {}
        for line in metrics(folder):
            if "images_per_second" in line:
                phase, step = line["phase"], line["step"]
                images = 8 if "guided_loss" not in line else 16
                seconds += images * (step - before.get(phase, 0)) / line["images_per_second"]
                before[phase] = step
    return round(seconds / 3600, 3)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=DATA, default="shapes")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.02])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    flags = parser.parse_args()
    ablation = Ablation(flags.runs, RESULTS)
    with ThreadPoolExecutor(flags.jobs) as pool:
        jobs = [
            pool.submit(ablation.run, flags.data, ratio, seed, recipe)
            for ratio in flags.ratio
            for seed in flags.seeds
            for recipe in flags.recipes
        ]
        for job in jobs:
            job.result()


if __name__ == "__main__":
    main()
