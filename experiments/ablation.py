"""Compare recipes of Guided Distillation over labeled fractions and seeds.

All recipes of a seed have the same labeled images. Unless a recipe says otherwise, they also have the same
teacher and the same initial weights of the student.

    python experiments/ablation.py --quick                               # a small table: shapes and cells
    python experiments/ablation.py --ratio 0.02 0.05 0.1 --seeds 0 1 2   # on shapes
    python experiments/ablation.py --data animals --ratio 0.05 0.1 --recipes paper robust labels-as-long
    python experiments/ablation.py --tables                              # pages from the committed records

Every finished run appends a line to the file --results, and is not run again. An interrupted run resumes from
its last checkpoint. At the end the file is printed as tables.

--data animals and nuclei need a folder of that name in COCO form in the current folder (docs/RESULTS.md says
what they are), and tf_efficientnet_lite2.safetensors, the ImageNet weights of timm's model of that name.
--data nuclei starts from cells.pt, a model that has learned drawn cells:
    python experiments/cells.py cells 2000
    python distill.py --data cells --ratio 1 --backbone tf_efficientnet_lite2 \\
        --pretrained tf_efficientnet_lite2.safetensors --hours 0 --recipe paper --tile 96 --crop 96,96 \\
        --num-queries 40 --supervised-only --steps 400 --out runs/cells
    mv runs/cells/supervised.pt cells.pt
--data nuclei-fresh starts from the ImageNet weights alone, as animals does.
--data tiles needs mobilenetv2_100.safetensors, and tiles/, which experiments/tiles.py cuts from nuclei:

    python experiments/tiles.py nuclei tiles --size 96 --ratio 0.05 0.1 --seeds 0 1 2"""

import argparse
import itertools
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import recipes
import robust_tables
from ablation_tables import final_aps, group_by_row, make_table, read_json_lines, read_records, write_page
from cells import write_cells
from recipes import DUPLICATES, QUICK_STEPS, RECIPES, RUNNABLE, STARTS, command

from training.checkpoint import load_checkpoint, lock
from training.cli import expected_errors

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments/ablation.jsonl"


class Ablation:
    """Run recipes, several at once, each after those that it starts from.

    Args:
        folder: of all runs.
        results: the file of their records.
        steps: of the three phases, in place of those in recipes.DATA."""

    def __init__(self, folder: Path, results: Path, steps: tuple | None = None):
        self.folder, self.results, self.steps = folder, results, steps
        self.recorded = {key(run) for run in read_records(results)}
        self.lock, self.run_locks = threading.Lock(), {}
        self.stopped, self.processes = False, set()

    def run(self, data: str, ratio: float, seed: int, recipe: str) -> None:
        """Run a recipe, unless it has a record."""
        if (data, ratio, seed, recipe) not in self.recorded:
            self.complete(data, ratio, seed, recipe)

    def complete(self, data: str, ratio: float, seed: int, recipe: str) -> None:
        """Run a recipe, unless it has a record and all checkpoints that others start from. The recipes that
        it starts from itself run first."""
        group = self.folder / f"{data}-{ratio:g}-{seed}"
        with self.lock:
            run_lock = self.run_locks.setdefault((group, recipe), threading.Lock())
        with run_lock:
            checkpoints = [group / place for place in STARTS.values() if place.startswith(f"{recipe}/")]
            recorded = (data, ratio, seed, recipe) in self.recorded
            if recorded and all(checkpoint.exists() for checkpoint in checkpoints):
                return
            text = " ".join(RECIPES[recipe][1])
            for start in {place.split("/")[0] for name, place in STARTS.items() if f"{{{name}}}" in text}:
                self.complete(data, ratio, seed, start)
            self.execute(data, ratio, seed, recipe, group / recipe)

    def execute(self, data: str, ratio: float, seed: int, recipe: str, own: Path) -> None:
        """Run the commands of a recipe in the folder `own`, and append its record. Raises RuntimeError if a
        command fails, after `stop`, and if the log lacks the end of a phase."""
        steps = self.steps or recipes.DATA[data][1]
        commands = [command(text, data, ratio, seed, steps, own) for text in RECIPES[recipe][1]]
        if self.stopped:
            raise RuntimeError("stopped")
        own.mkdir(parents=True, exist_ok=True)
        title = f"{data} {ratio:g} seed {seed} {recipe}"
        print(f"{time.strftime('%H:%M')} {title} ...", flush=True)
        with open(own / "log", "a") as log:
            for line in commands:
                script, *flags = shlex.split(line)
                words = [sys.executable, str(ROOT / script), *flags]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                self.call(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
        run = {"data": data, "ratio": ratio, "seed": seed, "recipe": recipe}
        run |= {"steps": steps, "commands": commands, "hours": round(training_hours(own), 3)}
        run |= {"machine": describe_machine(), "date": time.strftime("%Y-%m-%d"), "curve": read_curve(own)}
        for last in {point["phase"]: point for point in run["curve"]}.values():
            folder = own if (own / f"{last['phase']}.pt").exists() else own.with_name(own.name + "-start")
            saved = load_checkpoint(folder / f"{last['phase']}.pt")
            if saved["step"] != last["step"] or abs(saved["ap"]["AP"] - last["ap"]) > 0.01:
                end = f"the end of phase {last['phase']}"
                raise RuntimeError(f"{folder}/metrics.jsonl lacks {end}; remove the folder to run it again")
        with self.lock:
            if key(run) not in self.recorded:
                self.recorded.add(key(run))
                append_line(self.results, json.dumps(run))
        print(f"{time.strftime('%H:%M')} {title}: {final_aps(run)}", flush=True)

    def call(self, words: list[str], **kwargs) -> None:
        """Run a command. Raises RuntimeError if it fails, and after `stop`."""
        if self.stopped:
            raise RuntimeError("stopped")
        with subprocess.Popen(words, **kwargs) as process:
            self.processes.add(process)
            if self.stopped:  # while the process started
                process.terminate()
            code = process.wait()
            self.processes.discard(process)
        if code:
            raise RuntimeError(f"{shlex.join(words)} ended with {code}; see its log")

    def stop(self, *_) -> None:
        """Let all runs save and exit, and start no others."""
        self.stopped = True
        for process in list(self.processes):
            process.terminate()


def key(run: dict) -> tuple:
    return run["data"], run["ratio"], run["seed"], run["recipe"]


def append_line(path: Path, line: str) -> None:
    """Append a line to a file whose last line may have been cut short."""
    complete = not path.exists() or path.read_text()[-1:] in ("", "\n")
    with open(path, "a") as file:
        file.write("\n" * (not complete) + line + "\n")


def describe_machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpus = Path("/proc/cpuinfo")
    names = [x for x in cpus.read_text().splitlines() if x.startswith("model name")] if cpus.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"one thread of {name}, torch {torch.__version__}"


def read_metrics(own: Path) -> list[dict]:
    """Read what the commands of a run have logged, in their order."""
    folders = own.with_name(own.name + "-start"), own
    return [
        line | {"folder": folder.name}
        for folder in folders
        for line in read_json_lines(folder / "metrics.jsonl")
    ]


def read_curve(own: Path) -> list[dict]:
    """Read the evaluations of a run, in the form that ablation_tables.py describes."""
    points = {}
    for line in read_metrics(own):
        if "ap" in line:
            point = {"phase": line["phase"], "step": line["step"], "ap": line["ap"]["AP"]}
            point |= {"teacher_ap": line["teacher_ap"]["AP"]} if "teacher_ap" in line else {}
            for prefix in ("", "student_"):
                quality = line.get(prefix + "pseudo", {})
                names = {"kept", "recall"} | ({"precision", "mask_iou"} if quality.get("kept") else set())
                point |= {prefix + name: quality[name] for name in sorted(names & quality.keys())}
                for size, numbers in quality.get("sizes", {}).items():
                    point |= {f"{prefix}{size}_{name}": value for name, value in numbers.items()}
            point = {name: round(v, 2) if isinstance(v, float) else v for name, v in point.items()}
            points[line["folder"], line["phase"], line["step"]] = point
    return list(points.values())


def training_hours(own: Path, batch: int = 8) -> float:
    """Return the hours of training, without evaluations, from the logged images per second. batch: that of
    all recipes."""
    seconds, previous = 0.0, {}
    for line in read_metrics(own):
        if "images_per_second" in line:
            phase, step = (line["folder"], line["phase"]), line["step"]
            images = batch * (2 if "unlabeled_loss" in line else 1)
            seconds += images * max(0, step - previous.get(phase, 0)) / line["images_per_second"]
            previous[phase] = max(step, previous.get(phase, 0))
    return seconds / 3600


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=recipes.DATA, nargs="+", default=["shapes"])
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.02], help="labeled fractions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=RUNNABLE, default=RUNNABLE)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="file of the records; default: results.jsonl there")
    parser.add_argument(
        "--quick", action="store_true", help=f"paper, robust and labels only; {QUICK_STEPS} steps, 2 seeds"
    )
    parser.add_argument(
        "--tables", action="store_true", help="write ABLATION.md, ROBUST.md and figures, run nothing"
    )
    flags = parser.parse_args()
    if flags.quick:
        parser.set_defaults(**recipes.QUICK, runs=Path("runs/ablation-quick"))
        flags = parser.parse_args()  # other flags override those of --quick
    if flags.tables:
        write_page(read_records(RESULTS), RESULTS.parent)
        return robust_tables.write_page(read_records(RESULTS.with_name("robust.jsonl")), RESULTS.parent)
    chosen = list(itertools.product(flags.data, flags.ratio, flags.recipes, flags.seeds))
    for data, recipe in sorted({(data, recipe) for data, _, recipe, _ in chosen} & DUPLICATES):
        print(f"{recipe} is skipped: on {data} it repeats another recipe", file=sys.stderr)
    if "cells" in flags.data and not Path("datasets/cells").exists():
        write_cells("datasets/cells", radius=(9, 18))
    results = flags.results or flags.runs / "results.jsonl"
    ablation = Ablation(flags.runs, results, QUICK_STEPS if flags.quick else None)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ablation.stop)
    with expected_errors():
        lock(flags.runs)
    with ThreadPoolExecutor(flags.jobs) as pool:
        jobs = [
            pool.submit(ablation.run, data, ratio, seed, recipe)
            # All seeds of the paper's first: others wait for its checkpoints.
            for data, ratio, recipe, seed in chosen
            if (data, recipe) not in DUPLICATES
        ]
        errors = [job.exception() for job in jobs]
    if any(errors):
        sys.exit("\n".join(sorted({f"error: {error}" for error in errors if error})))
    for (data, ratio), rows in group_by_row(read_records(results)).items():
        print(f"\n{data}, {100 * ratio:g} % of the labels\n", *make_table(rows), sep="\n")


if __name__ == "__main__":
    main()
