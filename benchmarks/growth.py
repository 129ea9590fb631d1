"""How time and memory of our training step grow with image size, objects, queries, unlabeled images and
processes. One of these varies at a time. Otherwise the step is: R50, fp32, 2 images of 256 x 256, 7 objects
each, 100 queries.

    python benchmarks/growth.py                                # some minutes on two cores
    python benchmarks/growth.py --plot benchmarks/growth.png   # needs matplotlib

The guided step has one labeled image. Every process has one thread and its own batch (weak scaling, gloo).
"power" is the exponent with which the time grows from the row above."""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import NUM_CLASSES, load_ours, make_batch, peak_memory, save_hugging_face, take_turns

from matcher import SetCriterion
from training.distributed import init_distributed, print_rank0, rank

STEP = str(Path(__file__).parent / "step.py")
# Name: (side of step.py, values, what they replace, expected power of the time).
GROWTH = {
    "image side, pixels": ("ours", (128, 256, 512, 1024), "size", 2.0),
    "objects per image": ("ours", (0, 1, 10, 30, 100, 300), "objects", 1.0),
    "queries": ("ours", (25, 50, 100, 200, 400), "num_queries", 1.0),
    "unlabeled images": ("guided", (1, 2, 4, 8), "unlabeled", 1.0),
}


def measure(rounds: int) -> dict:
    """Return {name: [(value, seconds, GiB)]}."""
    flags = dict(size=256, batch=2, objects=7, unlabeled=0, threads=2, device="cpu", allocator=False)
    flags = argparse.Namespace(rounds=rounds, only=["ours", "guided"], **flags)
    rows = {}
    for name, (side, values, changed, _) in GROWTH.items():
        rows[name] = []
        for value in values:
            changes = {changed: value} | ({"batch": 1} if side == "guided" else {})
            row = take_turns(STEP, [side], flags, **changes)[side]
            rows[name].append((value, row["step"], row["peak GiB"]))
            print(".", end="", file=sys.stderr, flush=True)
    rows["processes"] = [(number, *measure_processes(number, rounds)) for number in (1, 2)]
    return rows


def measure_processes(number: int, rounds: int) -> tuple[float, float]:
    """Start this script under torchrun. Returns the seconds of a step and the GiB of a process."""
    with tempfile.TemporaryDirectory() as folder:
        save_hugging_face(folder)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
        command = [sys.executable, *launcher, __file__, "--rounds", str(rounds), "--folder", folder]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True
        )
    return json.loads(done.stdout)


def run_process(flags) -> None:
    """Time the step in one process of torchrun; rank 0 prints [seconds, GiB]."""
    torch.set_num_threads(1)
    init_distributed("cpu", "fp32")
    model, criterion = load_ours(flags.folder).train(), SetCriterion(NUM_CLASSES)
    model = torch.nn.parallel.DistributedDataParallel(model)
    images, targets = make_batch(256, 2, 7, seed=rank())
    seconds = []
    for _ in range(flags.rounds + 1):
        start = time.perf_counter()
        model.zero_grad(set_to_none=True)
        sum(criterion(model(images), targets).values()).backward()
        seconds.append(time.perf_counter() - start)
    print_rank0(json.dumps([statistics.median(seconds[1:]), peak_memory()]))


def expected_power(name: str) -> float:
    return GROWTH[name][3] if name in GROWTH else 0.0


def print_growth(rows: dict) -> None:
    print(f"torch {torch.__version__}\n")
    print(f"{'':24}{'':>8}{'seconds':>10}{'power':>8}{'GiB':>8}{'expected power of the time':>30}")
    for name, points in rows.items():
        power, previous = expected_power(name), None
        for value, seconds, memory in points:
            measured = ""
            if previous and previous[0]:
                measured = f"{math.log(seconds / previous[1]) / math.log(value / previous[0]):.2f}"
            expected = "" if previous else f"{'at most ' if power else ''}{power:g}"
            label = "" if previous else name
            print(f"{label:24}{value:8}{seconds:10.2f}{measured:>8}{memory:8.2f}{expected:>30}")
            previous = value, seconds


def plot_growth(rows: dict, file) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = 3 * len(rows), 3.2
    figure, axes = plt.subplots(1, len(rows), figsize=size, sharey=True, layout="constrained")
    for axis, (name, points) in zip(axes, rows.items()):
        values, seconds, memory = zip(*(point for point in points if point[0]))  # 0 has no logarithm
        power = expected_power(name)
        line = [seconds[-1] * (value / values[-1]) ** power for value in values]
        axis.loglog(values, seconds, "o-", label="seconds")
        axis.loglog(values, memory, "s-", label="GiB")
        axis.loglog(values, line, "k:", label=f"power {power:g}")
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.set_xlabel(name)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.legend(fontsize=7)
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.folder:
        return run_process(flags)
    rows = measure(flags.rounds)
    print_growth(rows)
    if flags.plot:
        plot_growth(rows, flags.plot)


if __name__ == "__main__":
    main()
