"""Synthetic batches, our model and Hugging Face's with the same weights, clocks, and sides that take turns:
what the benchmarks share.

A side is one of the programs that a benchmark compares. It is a function of the flags that returns (step,
clock): step() does the work to be timed and may return further values by name, and clock has the seconds of
its parts. Every side runs in a process of its own, as a user would start it."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from interop.load import load_any_checkpoint
from model import Mask2Former

NUM_CLASSES = 80
CPU = torch.device("cpu")
# What training.distributed.tune_glibc_malloc sets, for any program.
MALLOC_VARIABLES = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}

# ------------------------------------------------------------------------------------------ data and models


def make_batch(size: int, batch: int, objects: int, seed: int = 0) -> tuple[torch.Tensor, list[dict]]:
    """Make random images (B, 3, H, W) uint8, and targets whose masks are ellipses: per image "labels" (N,)
    and "masks" (N, H, W) bool."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    images = (255 * rand(batch, 3, size, size)).to(torch.uint8)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    targets = []
    for _ in range(batch):
        center, radius = size * rand(objects, 2, 1, 1), size * (0.03 + 0.2 * rand(objects, 2, 1, 1))
        masks = ((y - center[:, 0]) / radius[:, 0]) ** 2 + ((x - center[:, 1]) / radius[:, 1]) ** 2 < 1
        labels = (NUM_CLASSES * rand(objects)).long()
        targets.append({"labels": labels, "masks": masks})
    return images, targets


def save_hugging_face(folder, num_queries: int = 100) -> None:
    """Write Hugging Face's model with a ResNet-50 and random weights to a folder."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, TimmBackboneConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    backbone = TimmBackboneConfig(backbone="resnet50", out_indices=(1, 2, 3, 4))
    config = Mask2FormerConfig(
        backbone_config=backbone, num_labels=NUM_CLASSES, dropout=0.0, num_queries=num_queries
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)


def load_hugging_face(folder):
    """Load the model of `save_hugging_face`."""
    from transformers import Mask2FormerForUniversalSegmentation

    return Mask2FormerForUniversalSegmentation.from_pretrained(folder)


def load_ours(folder) -> Mask2Former:
    """Load the weights of `save_hugging_face` into our model."""
    checkpoint = load_any_checkpoint(Path(folder) / "model.safetensors")
    model = Mask2Former(**checkpoint["model_args"])
    model.load_state_dict(checkpoint["model"])
    return model


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Normalize images, which Hugging Face's model leaves to the caller."""
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    mean, std = (torch.tensor(v).view(3, 1, 1).to(images.device, non_blocking=True) for v in (mean, std))
    return (images - mean) / std


# --------------------------------------------------------------------------------------------- measurements


def now(device: torch.device):
    """Return the time on a CPU, or an event in the GPU's queue of work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end) -> float:
    """Return the seconds between two results of `now`."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Clock:
    """Measure named parts: blocks, `with clock("name"):`, and the forward passes of modules."""

    def __init__(self, device=CPU, **modules):
        self.device, self.times, self.name = device, [], None
        for name, module in modules.items():
            module.register_forward_pre_hook(lambda *_, name=name: self(name).__enter__())
            module.register_forward_hook(lambda *_: self.__exit__())

    def __call__(self, name):
        self.name = name
        return self

    def __enter__(self):
        self.started = now(self.device)

    def __exit__(self, *_):
        self.times.append((self.name, self.started, now(self.device)))

    def seconds(self) -> dict:
        """Return the seconds of all parts since the last call."""
        total = {}
        for name, start, end in self.times:
            total[name] = total.get(name, 0.0) + seconds_between(start, end)
        self.times.clear()
        return total


def peak_memory(device=CPU) -> float:
    """Return the peak memory so far in GiB: of this process, or of its tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def medians(seconds: list[tuple[float, float]], scale: float = 1.0) -> dict:
    """Return the medians of (forward, backward) and of their sums, times `scale`. The first pair is left out,
    because it warms up."""
    seconds = seconds[1:]
    columns = {"forward": [f for f, _ in seconds], "backward": [b for _, b in seconds]}
    columns["both"] = [sum(pair) for pair in seconds]
    return {name: scale * statistics.median(values) for name, values in columns.items()}


# ------------------------------------------------------------------------------------------ sides take turns


def make_parser(description: str, **defaults: int) -> argparse.ArgumentParser:
    """Build a parser with --device and a flag for each whole number of `defaults`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser


def parse_flags(parser: argparse.ArgumentParser, sides: dict, default: list[str]) -> argparse.Namespace:
    """Parse the flags of a benchmark whose sides take turns. In the process of a side this function does not
    return: it serves the side and exits.

    sides: {name: side}. default: the names of those that are timed unless --only names others."""
    help = "set the allocator of every side to keep freed memory (environment variables)"
    parser.add_argument("--allocator", action="store_true", help=help)
    parser.add_argument("--only", nargs="+", choices=sides, default=default, help="time these sides only")
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.side:
        serve(sides[flags.side], flags)
        sys.exit()
    return flags


def serve(side, flags) -> None:
    """Run a step of a side for every line on standard input, and print its measurements as a line of JSON."""
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    step, clock = side(flags)
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        if clock.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        values = step()
        if clock.device.type == "cuda":
            torch.cuda.synchronize()
        result = {"step": time.perf_counter() - start, **clock.seconds(), **(values or {})}
        result["peak GiB"] = peak_memory(clock.device)
        print(json.dumps(result), flush=True)


def take_turns(script, names, flags, *, num_queries=100, **changes) -> dict:
    """Time sides of a script in turn, one step each, and return {side: {name: median}}.

    names: of the sides; those that --only leaves out are not started. changes: values that replace flags."""
    flags = argparse.Namespace(**vars(flags) | changes)
    with tempfile.TemporaryDirectory() as folder:
        save_hugging_face(folder, num_queries)
        processes = {name: start_side(script, name, folder, flags) for name in names if name in flags.only}
        for name, process in processes.items():
            read_answer(process, Path(folder) / f"{name}.err")
        results = {name: [] for name in processes}
        for round_number in range(flags.rounds + 1):
            for name, process in processes.items():
                process.stdin.write("step\n")
                process.stdin.flush()
                result = read_answer(process, Path(folder) / f"{name}.err")
                if round_number:  # The first round warms up.
                    results[name].append(result)
        for process in processes.values():
            process.stdin.close()
            process.wait()
    return {
        name: {key: statistics.median(r[key] for r in rows) for key in rows[0]}
        for name, rows in results.items()
    }


def start_side(script, name: str, folder, flags) -> subprocess.Popen:
    command = [sys.executable, script, "--side", name, "--folder", folder]
    for flag, value in vars(flags).items():
        if isinstance(value, int) and flag != "allocator" or flag == "device":
            command += [f"--{flag}", str(value)]
    with open(Path(folder) / f"{name}.err", "w") as errors:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | (MALLOC_VARIABLES if flags.allocator else {}),
        )


def read_answer(process: subprocess.Popen, errors: Path):
    """Read a line of JSON from a side. Exits with the end of its errors if there is none."""
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{errors.read_text()[-1500:]}\nerror: {errors.stem} ended with code {process.wait()}")
    return json.loads(line)


# --------------------------------------------------------------------------------------------------- output


def print_table(title: str, rows: dict, columns: list[str], digits: int = 3) -> None:
    """Print {row: {column: value}}. A value that a row does not have is left blank."""
    width = max(17, *(len(name) + 1 for name in (title, *rows)))
    print(f"\n{title:{width}}" + "".join(f"{name:>17}" for name in columns))
    for name, row in rows.items():
        cells = (f"{row[column]:17.{digits}f}" if column in row else " " * 17 for column in columns)
        print(f"{name:{width}}" + "".join(cells))


def ratios(rows: dict, peer: str = "hugging_face") -> dict:
    """Divide all rows but the peer's by the peer's."""
    return {
        name: {column: value / rows[peer][column] for column, value in row.items() if column in rows[peer]}
        for name, row in rows.items()
        if name != peer
    }


def print_headline(flags) -> None:
    print(f"R50, {flags.batch} images of {flags.size} x {flags.size}, {flags.objects} objects each")
    print(f"{describe_machine(flags)}, torch {torch.__version__}", flush=True)


def describe_machine(flags) -> str:
    on_gpu = flags.device.startswith("cuda")
    return torch.cuda.get_device_name(flags.device) if on_gpu else f"{flags.threads} threads"
