"""What the benchmarks share: made-up images and targets, ours and Hugging Face's Mask2Former with the same
weights, and processes that take turns, each as a user would start it."""

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

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import Mask2Former, convert_state_dict
from weights import _read

CLASSES = 80
CPU = torch.device("cpu")
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}


def make_batch(size: int, batch: int, objects: int, seed: int = 0):
    """Images (B, 3, H, W) uint8, and per image labels (N,) and masks (N, H, W) bool: ellipses."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    images = (255 * rand(batch, 3, size, size)).to(torch.uint8)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    targets = []
    for _ in range(batch):
        centre, radius = size * rand(objects, 2, 1, 1), size * (0.03 + 0.2 * rand(objects, 2, 1, 1))
        masks = ((y - centre[:, 0]) / radius[:, 0]) ** 2 + ((x - centre[:, 1]) / radius[:, 1]) ** 2 < 1
        labels = (CLASSES * rand(objects)).long()
        targets.append({"labels": labels, "masks": masks})
    return images, targets


def save_theirs(folder, queries: int = 100) -> None:
    """Hugging Face's model with a ResNet-50 and random weights."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, TimmBackboneConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    backbone = TimmBackboneConfig(backbone="resnet50", out_indices=(1, 2, 3, 4))
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES, dropout=0.0, num_queries=queries)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)


def load_theirs(folder):
    from transformers import Mask2FormerForUniversalSegmentation

    return Mask2FormerForUniversalSegmentation.from_pretrained(folder)


def normalised(images):
    """As theirs wants them."""
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    mean, std = (torch.tensor(v).view(3, 1, 1).to(images.device, non_blocking=True) for v in (mean, std))
    return (images - mean) / std


def load_ours(folder) -> Mask2Former:
    weights = convert_state_dict(_read(Path(folder) / "model.safetensors"))
    model = Mask2Former(CLASSES, "resnet50", num_queries=len(weights["decoder.query_features.weight"]))
    model.load_state_dict(weights)
    return model


def mark(device):
    """A moment, as the device sees it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Clock:
    """Seconds by name, `with clock("name"):` or within the forward pass of modules."""

    def __init__(self, device=CPU, **modules):
        self.device, self.marks, self.name = device, [], None
        for name, module in modules.items():
            module.register_forward_pre_hook(lambda *_, name=name: self(name).__enter__())
            module.register_forward_hook(lambda *_: self.__exit__())

    def __call__(self, name):
        self.name = name
        return self

    def __enter__(self):
        self.started = mark(self.device)

    def __exit__(self, *_):
        self.marks.append((self.name, self.started, mark(self.device)))

    def seconds(self) -> dict:
        """Of all parts since the last call."""
        total = {}
        for name, start, end in self.marks:
            total[name] = total.get(name, 0.0) + seconds_between(start, end)
        self.marks.clear()
        return total


def parse(description, sides, usual=None, **defaults):
    """The flags; or, in a process of take_turns, never back from here: it serves its side."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {"size": 512, "batch": 2, "objects": 7, "rounds": 5, "threads": 2, **defaults}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--allocator", action="store_true", help="all keep freed memory (environment variables)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=sides, default=usual or list(sides), help="time these alone"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.side:
        serve(sides[flags.side], flags)
        sys.exit()
    return flags


def serve(side, flags):
    """A step for every line on standard input, and its figures on standard output."""
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    step, clock = side(flags)
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        if clock.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        more = step()
        if clock.device.type == "cuda":
            torch.cuda.synchronize()
        result = {"step": time.perf_counter() - start, **clock.seconds(), **(more or {})}
        result["peak GiB"] = peak(clock.device)
        print(json.dumps(result), flush=True)


def peak(device=CPU) -> float:
    """GiB so far: of this process's memory, or of its tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def take_turns(script, sides, flags, *, queries=100, **changed) -> dict:
    """The sides' figures, {side: {name: median}}: each in a process of its own, a step in turn. changed:
    flags that differ."""
    flags = argparse.Namespace(**vars(flags) | changed)
    with tempfile.TemporaryDirectory() as folder:
        save_theirs(folder, queries)
        processes = {side: start(script, side, folder, flags) for side in sides if side in flags.only}
        for process in processes.values():
            answer(process)
        results = {side: [] for side in processes}
        for number in range(flags.rounds + 1):
            for side, process in processes.items():
                process.stdin.write("step\n")
                process.stdin.flush()
                result = answer(process)
                if number:  # the first warms up
                    results[side].append(result)
        for process in processes.values():
            process.stdin.close()
            process.wait()
    return {
        side: {name: statistics.median(r[name] for r in found) for name in found[0]}
        for side, found in results.items()
    }


def start(script, side, folder, flags):
    arguments = [sys.executable, script, "--side", side, "--folder", folder]
    for name, value in vars(flags).items():
        if isinstance(value, int) and name != "allocator" or name == "device":
            arguments += [f"--{name}", str(value)]
    return subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | (KEEP if flags.allocator else {}),
    )


def answer(process):
    line = process.stdout.readline()
    if not line:
        sys.exit(f"a side ended with code {process.wait()}")
    return json.loads(line)


def table(title, rows: dict, names, digits=3) -> None:
    print(f"\n{title:17}" + "".join(f"{name:>17}" for name in names))
    for label, row in rows.items():
        cells = (f"{row[name]:17.{digits}f}" if name in row else " " * 17 for name in names)
        print(f"{label:17}" + "".join(cells))


def ratios(rows: dict, peer="theirs") -> dict:
    return {
        label: {name: value / rows[peer][name] for name, value in row.items() if name in rows[peer]}
        for label, row in rows.items()
        if label != peer
    }


def headline(flags) -> None:
    print(f"R50, {flags.batch} images of {flags.size} x {flags.size}, {flags.objects} objects each")
    print(f"{where(flags)}, torch {torch.__version__}", flush=True)


def where(flags) -> str:
    on_gpu = flags.device.startswith("cuda")
    return torch.cuda.get_device_name(flags.device) if on_gpu else f"{flags.threads} threads"
