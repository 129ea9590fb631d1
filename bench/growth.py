"""How time and memory of a training step of ours grow, each with one thing, and with which power of it: R50,
fp32, 2 images of 256 x 256, 7 objects each and 100 queries where nothing else is said.

    python bench/growth.py                         # some minutes on two cores
    python bench/growth.py --plot bench/growth.png # needs matplotlib

The guided step's labelled batch is one image. Processes have a thread and a batch each (weak scaling, gloo).
"""

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

sys.path.insert(0, str(Path(__file__).parent.parent))
from sides import CLASSES, load_ours, make_batch, peak, save_theirs, take_turns

import engine
from matcher import SetCriterion

STEP = str(Path(__file__).parent / "step.py")
# By name: what the step is, its values, which flag they are, the expected power of them
GROWTH = {
    "image side, pixels": ("ours", (128, 256, 512, 1024), "size", 2.0),
    "objects an image": ("ours", (0, 1, 10, 30, 100, 300), "objects", 1.0),
    "queries": ("ours", (25, 50, 100, 200, 400), "queries", 1.0),
    "unlabelled images": ("guided", (1, 2, 4, 8), "unlabelled", 1.0),
}


def measure(flags) -> dict:
    """{name: [(value, seconds, GiB)]}"""
    base = dict(size=256, batch=2, objects=7, unlabelled=0, threads=2, device="cpu", allocator=False)
    base |= dict(only=["ours", "guided"])
    base, found = argparse.Namespace(rounds=flags.rounds, **base), {}
    for name, (side, values, flag, _) in GROWTH.items():
        found[name] = []
        for value in values:
            changed = {flag: value} | ({"batch": 1} if side == "guided" else {})
            row = take_turns(STEP, [side], base, **changed)[side]
            found[name].append((value, row["step"], row["peak GiB"]))
            print(".", end="", file=sys.stderr, flush=True)
    found["processes"] = [(n, *side_by_side(n, flags.rounds)) for n in (1, 2)]
    return found


def side_by_side(processes: int, rounds: int):
    """Seconds and GiB of a process."""
    with tempfile.TemporaryDirectory() as folder:
        save_theirs(folder)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *launch, __file__, "--rounds", str(rounds), "--folder", folder]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True
        )
    return json.loads(done.stdout)


def one_of_several(flags):
    torch.set_num_threads(1)
    engine.start_processes("cpu", "fp32")
    model, criterion = load_ours(flags.folder).train(), SetCriterion(CLASSES)
    model = torch.nn.parallel.DistributedDataParallel(model)
    images, targets = make_batch(256, 2, 7, seed=engine.rank())
    seconds = []
    for _ in range(flags.rounds + 1):
        start = time.perf_counter()
        model.zero_grad(set_to_none=True)
        sum(criterion(model(images), targets).values()).backward()
        seconds.append(time.perf_counter() - start)
    engine.say(json.dumps([statistics.median(seconds[1:]), peak()]))


def print_table(found):
    print(f"torch {torch.__version__}\n")
    print(f"{'':24}{'':>8}{'seconds':>10}{'power':>8}{'GiB':>8}{'expected power of the time':>30}")
    for name, rows in found.items():
        expected = GROWTH[name][3] if name in GROWTH else 0.0
        before = None
        for value, seconds, memory in rows:
            power = (
                math.log(seconds / before[1]) / math.log(value / before[0]) if before and before[0] else None
            )
            words = f"{power:8.2f}" if power is not None else " " * 8
            last = f"{'at most ' if expected else ''}{expected:g}" if not before else ""
            print(f"{name if not before else '':24}{value:8}{seconds:10.2f}{words}{memory:8.2f}{last:>30}")
            before = value, seconds


def plot(found, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = 3 * len(found), 3.2
    figure, axes = plt.subplots(1, len(found), figsize=size, sharey=True, layout="constrained")
    for axis, (name, rows) in zip(axes, found.items()):
        values, seconds, memory = zip(*(row for row in rows if row[0]))  # 0 has no logarithm
        expected = GROWTH[name][3] if name in GROWTH else 0.0
        line = [seconds[-1] * (value / values[-1]) ** expected for value in values]
        axis.loglog(values, seconds, "o-", label="seconds")
        axis.loglog(values, memory, "s-", label="GiB")
        axis.loglog(values, line, "k:", label=f"power {expected:g}")
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
        return one_of_several(flags)
    found = measure(flags)
    print_table(found)
    if flags.plot:
        plot(found, flags.plot)


if __name__ == "__main__":
    main()
