"""Does guided distillation work, and what makes it work? Recipes over ratios and seeds. All recipes of a
seed have the same labelled images and, where they do not say otherwise, the same teacher and a student with
the same initial weights.

    python bench/ablation.py --quick                               # a small table in a quarter of an hour
    python bench/ablation.py --ratio 0.02 0.05 0.1 --seeds 0 1 2   # on shapes
    python bench/ablation.py --data nuclei --ratio 0.05 0.1 --recipes paper labels-only
    python bench/ablation.py --tables                              # ABLATION.md of bench/ablation.jsonl

Every run that finishes is a line of the file --results, which ends as tables on the screen, and is not run
again; one that was stopped goes on from its last checkpoint. nuclei needs in the current folder
mobilenetv2_100.safetensors, ImageNet weights of timm's model of that name, and tiles/, made of real images
(RESULTS.md):

    python bench/tiles.py nuclei tiles --size 96 --ratio 0.05 0.1 --seeds 0 1 2"""

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import recipes  # noqa: E402
from ablation_tables import gather, results_of, table, write_page  # noqa: E402
from recipes import MAIN, QUICK, RECIPES, SAME, STARTS, command  # noqa: E402

from checkpoints import load_checkpoint, lock  # noqa: E402
from flags import user_errors  # noqa: E402

RESULTS = HERE / "ablation.jsonl"


class Ablation:
    """Runs recipes. folder: of all runs. results: the file of their records. steps: of the phases, in place
    of those in recipes.DATA."""

    def __init__(self, folder: Path, results: Path, steps: tuple | None = None):
        self.folder, self.results, self.steps = folder, results, steps
        self.recorded = {key(run) for run in read(results)}
        self.lock, self.making = threading.Lock(), {}
        self.stopped, self.processes = False, set()

    def run(self, data: str, ratio: float, seed: int, recipe: str) -> None:
        """A recipe that has no record yet."""
        if (data, ratio, seed, recipe) not in self.recorded:
            self.make(data, ratio, seed, recipe)

    def make(self, data: str, ratio: float, seed: int, recipe: str) -> None:
        """A recipe that lacks its record or a checkpoint that others start from, after those from which it
        starts itself."""
        group = self.folder / f"{data}-{ratio:g}-{seed}"
        with self.lock:
            one_at_a_time = self.making.setdefault((group, recipe), threading.Lock())
        with one_at_a_time:
            checkpoints = [group / place for place in STARTS.values() if place.startswith(f"{recipe}/")]
            recorded = (data, ratio, seed, recipe) in self.recorded
            if recorded and all(checkpoint.exists() for checkpoint in checkpoints):
                return
            text = " ".join(RECIPES[recipe][1])
            for start in {place.split("/")[0] for name, place in STARTS.items() if f"{{{name}}}" in text}:
                self.make(data, ratio, seed, start)
            self.execute(data, ratio, seed, recipe, group / recipe)

    def execute(self, data: str, ratio: float, seed: int, recipe: str, own: Path) -> None:
        steps = self.steps or recipes.DATA[data][1]
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
                end = f"the end of phase {last['phase']}"
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=recipes.DATA, default="shapes")
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
        return write_page(read(RESULTS), RESULTS.parent)
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
