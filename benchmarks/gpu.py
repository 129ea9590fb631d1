"""Everything that has to be asked of a GPU, in one run of less than nine minutes: the most valuable first.

    python benchmarks/gpu.py               # on one GPU; prints a line of JSON for each part
    python benchmarks/gpu.py --dry-run     # the benchmarks alone, at tiny sizes on a CPU, to check the script

Every part is a process of its own and has its own time limit; one that fails or takes too long does not stop
the others. A line has the "part", its "seconds", and what it measured, or "error": the end of its output."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Part: (limit in seconds, command, flags that make it tiny on a CPU; None: it needs a GPU).
SIZE = "--size 1024 --rounds 3 --device cuda"
PARTS = {
    "parity with the CPU": (70, "-m pytest -q -m gpu tests/test_gpu.py -k equal", None),
    "steps of 2 images": (
        110,
        f"benchmarks/step.py {SIZE} --batch 2 --only ours_bf16 hugging_face_bf16 guided_bf16",
        "--size 64 --rounds 1 --device cpu",
    ),
    "guided step of 2 images, compiled": (
        120,
        f"benchmarks/step.py {SIZE} --batch 2 --only guided_compiled",
        "--size 64 --rounds 1 --device cpu",
    ),
    "launches of a guided step": (45, "benchmarks/gpu.py --part launches", "--dry-run"),
    "steps of 16 images": (
        80,
        f"benchmarks/step.py {SIZE} --batch 16 --only ours_bf16 hugging_face_bf16",
        "--size 64 --rounds 1 --device cpu --batch 2",
    ),
    "cut and resumed under NCCL": (45, "-m pytest -q -m gpu tests/test_gpu.py -k resume", None),
    "Triton kernels": (40, "-m pytest -q -m gpu tests/test_triton.py", None),
    "inference": (25, "benchmarks/gpu.py --part inference", "--dry-run"),
}


def count_launches(device: str, size: int) -> dict:
    """Count the kernel launches of a guided step, and the milliseconds for which the GPU is busy."""
    from common import save_hugging_face
    from step import guided_bf16

    with tempfile.TemporaryDirectory() as folder:
        save_hugging_face(folder)
        flags = argparse.Namespace(folder=folder, device=device, size=size, batch=2, unlabeled=2, objects=7)
        step, _ = guided_bf16(flags)
    for _ in range(3):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    events = profiler.key_averages()
    launches = sum(e.count for e in events if "LaunchKernel" in e.key)
    return {"launches": launches, "busy ms": sum(e.self_device_time_total for e in events) / 1e3}


def time_inference(device: str, size: tuple[int, int]) -> dict:
    """Return the milliseconds an image takes with its post-processing, and the peak memory in GiB."""
    from evaluate import predict_batch
    from model import Mask2Former
    from training.distributed import init_distributed

    env = init_distributed(device, "bf16")
    model = Mask2Former(80).eval().to(env.device)
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        predict_batch(model, [image], [size], env)
        times.append(1e3 * (time.perf_counter() - started))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return {"milliseconds": sorted(times[1:])[2], "peak GiB": peak}


def run_part(name: str, limit: int, command: list[str]) -> dict:
    """Run a part in a process of its own. Returns its line."""
    started, output = time.time(), ""
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=limit
        )
        output = done.stdout
        error = None if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]
    except subprocess.TimeoutExpired as stopped:
        error = f"stopped after {limit} s: {(stopped.stdout or b'').decode()[-1000:]}"
    line = {"part": name, "seconds": round(time.time() - started, 1)}
    return line | ({"error": error} if error else {"output": output.strip().splitlines()[-12:]})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--part", choices=["launches", "inference"], help=argparse.SUPPRESS)
    flags = parser.parse_args()
    device = "cpu" if flags.dry_run else "cuda"
    if flags.part == "launches":
        print(json.dumps(count_launches(device, 64 if flags.dry_run else 1024)))
    elif flags.part == "inference":
        print(json.dumps(time_inference(device, (64, 96) if flags.dry_run else (800, 1333))))
    else:
        name = "dry run on a CPU" if flags.dry_run else torch.cuda.get_device_name()
        print(json.dumps({"machine": name, "torch": torch.__version__}), flush=True)
        for part, (limit, command, tiny) in PARTS.items():
            if not flags.dry_run or tiny is not None:
                words = command.split() + (tiny.split() if flags.dry_run else [])
                print(json.dumps(run_part(part, limit, words)), flush=True)


if __name__ == "__main__":
    main()
