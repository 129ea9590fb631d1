"""Everything that has to be asked of a GPU, in one run of less than nine minutes.

    python benchmarks/gpu.py               # on one GPU; prints a line of JSON for each part
    python benchmarks/gpu.py --dry-run     # at tiny sizes on a CPU, without compiling, to check the script

The checks, which are not timed, run at once, then the measurements one after the other. Every part is a
process of its own and has its own time limit; one that fails or takes too long does not stop the others. A
line has the "part", its "seconds", and what it measured, or "error": the end of its output."""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZE = "--size 1024 --rounds 3 --device cuda"
ON_CPU = "--size 64 --rounds 1 --device cpu"
# These run at once, at most 200 seconds. They compile what is timed afterwards: TorchInductor caches it.
CHECK_SECONDS = 200
CHECKS = {
    "parity with the CPU": "-m pytest -q -m gpu tests/test_gpu.py -k equal",
    "waiting for the GPU": "-m pytest -q -m gpu tests/test_gpu.py -k waits",
    "cut and resumed": "-m pytest -q -m gpu tests/test_gpu.py -k alone",
    "cut and resumed under NCCL": "-m pytest -q -m gpu tests/test_gpu.py -k NCCL",
    "Triton kernels": "-m pytest -q -m gpu tests/test_triton.py",
    "compiling a guided step": f"benchmarks/step.py {SIZE} --only guided_compiled",
    "compiling a step": f"benchmarks/step.py {SIZE} --only ours_compiled",
}
# Then these, one after the other: (limit in seconds, command, flags for a dry run; None: it needs a GPU).
COMPILED = f"benchmarks/step.py {SIZE} --only ours_compiled guided_compiled"
EAGER = f"benchmarks/step.py {SIZE} --only ours_bf16 hugging_face_bf16"
TIMES = {
    "compiled steps of 2 images": (90, COMPILED, None),
    "steps of 2 images": (60, f"{EAGER} guided_bf16", ON_CPU),
    "launches of a guided step": (30, "benchmarks/gpu.py --part launches", "--dry-run"),
    "compiled steps with CUDA graphs": (80, f"TORCHINDUCTOR_CUDAGRAPHS=1 {COMPILED}", None),
    "steps of 16 images": (60, f"{EAGER} --batch 16", f"{ON_CPU} --batch 2"),
    "inference": (18, "benchmarks/gpu.py --part inference", "--dry-run"),
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
    kernels = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU]
    return {"launches": launches, "busy ms": sum(e.self_device_time_total for e in kernels) / 1e3}


def time_inference(device: str, size: tuple[int, int]) -> dict:
    """Return the milliseconds an image takes, those of the model alone, and the peak memory in GiB. The masks
    of random weights are noise, which takes longer to encode than a trained model's."""
    from common import Clock, peak_memory

    from evaluate import predict_batch
    from model import Mask2Former
    from training.distributed import init_distributed

    env = init_distributed(device, "bf16")
    model = Mask2Former(80).eval().to(env.device)
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    clock, times = Clock(env.device, model=model), []
    for _ in range(6):
        started = time.perf_counter()
        predict_batch(model, [image], [size], env)
        times.append((time.perf_counter() - started, clock.seconds()["model"]))
    seconds, of_model = map(statistics.median, zip(*times[1:]))
    return {"milliseconds": 1e3 * seconds, "model": 1e3 * of_model, "peak GiB": peak_memory(env.device)}


def run_part(name: str, limit: int, command: list[str]) -> dict:
    """Run a part in a process of its own. Returns its line. command: of Python, after NAME=VALUE of the
    environment."""
    started = time.time()
    variables = dict(word.split("=") for word in itertools.takewhile(lambda word: "=" in word, command))
    words = [sys.executable, *command[len(variables) :]]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = os.environ | variables
    with subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=limit)
            error = (output + errors)[-2000:] if process.returncode else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            error = f"stopped after {limit} s: {''.join(process.communicate())[-1000:]}"
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
        if not flags.dry_run:
            with ThreadPoolExecutor(len(CHECKS)) as pool:
                commands = [command.split() for command in CHECKS.values()]
                for line in pool.map(run_part, CHECKS, [CHECK_SECONDS] * len(CHECKS), commands):
                    print(json.dumps(line), flush=True)
        for part, (limit, command, tiny) in TIMES.items():
            if not flags.dry_run or tiny is not None:
                words = command.split() + (tiny.split() if flags.dry_run else [])
                print(json.dumps(run_part(part, limit, words)), flush=True)


if __name__ == "__main__":
    main()
