"""Processes and devices: one process (`python script.py`) or many (`torchrun --nproc_per_node=8
script.py`)."""

import atexit
import contextlib
import ctypes
import functools
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from training import signals
from training.cli import exit_with_error
from training.micro_batches import MicroBatched

PR_SET_PDEATHSIG = 1  # Linux's prctl: a signal for this process when its parent dies


@dataclass(frozen=True)
class Env:
    """The device of this process, and whether forward passes use bfloat16 autocast."""

    device: torch.device
    bf16: bool = False


def init_distributed(device: str = "", precision: str = "") -> Env:
    """Join the processes of torchrun, if any, and choose the device.

    Args:
        device: "cuda", "mps", "cpu", or "" for the best available.
        precision: "bf16", "fp32" (which also disables TF32), or "" for bf16 where the device is fast at it.

    Raises ValueError for a device or precision that is unknown or unavailable."""
    if precision not in ("", "bf16", "fp32"):
        raise ValueError(f"unknown --precision {precision!r}; choose bf16 or fp32")
    if not device:
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        number = "; CUDA_VISIBLE_DEVICES=0 before the command chooses a GPU" if device.isdecimal() else ""
        raise ValueError(f"unknown --device {device!r}; choose cuda, mps or cpu{number}") from None
    if device.type == "cpu":
        tune_glibc_malloc()
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("cannot use --device cuda: torch finds no GPU")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False  # costs, losses and sampling locations are fp32
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
    signals.install()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # each tensor from a loader process is an open file
    with contextlib.suppress(ValueError):  # macOS refuses "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # If torchrun is killed, its processes would train on without it.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        _join_process_group(device)
    return Env(device, use_bf16(device, precision))


def _join_process_group(device: torch.device) -> None:
    kwargs = {name: int(os.environ[name.upper()]) for name in ("rank", "world_size")}
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != "0" and os.environ["GROUP_WORLD_SIZE"] == "1":
        # After a restart torchrun's store still has the addresses of processes that are gone.
        kwargs["store"] = dist.PrefixStore(f"restart {restarts}", next(dist.rendezvous("env://"))[0])
    # Tensors on the CPU go through gloo on GPU machines too, so that flags need not wait for a GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30), **kwargs)
    if device.type != "cuda":
        atexit.register(dist.destroy_process_group)  # gloo's threads may abort a process that exits
        atexit.register(time.sleep, 0.2)  # before that: in torch 2.6 they would wait for each other forever
    barrier()  # rank 0 holds the store: if it failed before the others join, they could not


def use_bf16(device: torch.device, precision: str = "") -> bool:
    """Return whether to use bfloat16: as `precision` says, or if it is "", where the device is fast at it."""
    if precision:
        return precision == "bf16"
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 and older lack it
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(env: Env):
    """Return the autocast context of a forward pass."""
    return torch.autocast(env.device.type, torch.bfloat16, enabled=env.bf16)


def compile_model(model: nn.Module, compiled: bool = True) -> nn.Module:
    """Return what to call in place of the model: one compiled graph for batches of one size. The model
    itself is unchanged, for checkpoints, the EMA and evaluation."""
    if not compiled:
        return model
    torch.compiler.reset()  # the graphs of the former phase, which count towards a limit
    return torch.compile(model, fullgraph=True, dynamic=False)


def check_compiler(device: torch.device) -> None:
    """Raises ValueError if torch.compile does not work on this machine."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds: without a C++ compiler, without Triton, on an old GPU
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--compile: torch.compile does not work here: {reason}") from None


def tune_glibc_malloc() -> None:
    """Keep freed memory in the process: otherwise every step on a CPU faults its pages in again, which took a
    quarter of its time (benchmarks/RESULTS.md)."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
            ctypes.CDLL(None).mallopt(parameter, value)


def to_device(batch, env: Env):
    """Move the tensors of nested dictionaries and lists to the device."""
    if isinstance(batch, dict):
        return {name: to_device(value, env) for name, value in batch.items()}
    if isinstance(batch, list):
        return [to_device(value, env) for value in batch]
    return batch.to(env.device, non_blocking=True) if isinstance(batch, Tensor) else batch


# ----------------------------------------------------------------------------------------- several processes


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap_ddp(model: nn.Module, env: Env, grad_accum_steps: int = 1, compiled: bool = False) -> nn.Module:
    """Return what to call in place of the model: it averages gradients over ranks, synchronizes batch
    norms on GPUs, and runs a batch in `grad_accum_steps` micro-batches, compiled or not. The model keeps its
    parameters and their names."""
    on_gpus = env.device.type == "cuda"
    if world_size() > 1 and on_gpus:
        model = timm.layers.convert_sync_batchnorm(model)
    model = compile_model(model, compiled)
    if grad_accum_steps > 1:
        model = MicroBatched(model, grad_accum_steps)
    if world_size() > 1:
        device_ids = [env.device.index] if on_gpus else None
        # Buffers are frozen statistics, or synchronized ones that are the same on all ranks already.
        options = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
        model = nn.parallel.DistributedDataParallel(model, device_ids=device_ids, **options)
        if not on_gpus:
            model.register_comm_hook(None, per_parameter_allreduce_hook)
    return model


def per_parameter_allreduce_hook(_, bucket):
    """Average the gradients of each parameter by an all-reduce of its own.

    Rounding in gloo depends on a number's place in its bucket, and DDP rearranges its buckets after the
    first step, so a resumed run would differ in the last bits from an uninterrupted one."""
    sums = [dist.all_reduce(gradient, async_op=True).get_future() for gradient in bucket.gradients()]
    return torch.futures.collect_all(sums).then(lambda _: bucket.buffer().div_(world_size()))


def all_reduce_mean(value: Tensor) -> Tensor:
    """Average a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= world_size()
    return value


def num_objects(targets: list[dict], env: Env) -> Tensor:
    """Return the mean number of objects per rank, by which mask losses are divided."""
    count = sum(len(target["labels"]) for target in targets)
    return all_reduce_mean(torch.full((), float(count), device=env.device))


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank, without waiting for a GPU."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def all_gather_list(items: list) -> list:
    """Return the items of all ranks, on every rank."""
    if world_size() == 1:
        return items
    barrier()
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def assert_same_on_all_ranks(number: int, what: str, env: Env) -> None:
    """Exit with an error if ranks disagree on a number: one machine may see an old state of a shared
    folder."""
    if dist.is_initialized():
        extremes = torch.tensor([number, -number], device=env.device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        high, low = extremes[0].item(), -extremes[1].item()
        if high != low:
            exit_with_error(f"ranks see {what} {low} and {high}; make --out the same folder on all machines")


def barrier() -> None:
    """Wait for all ranks; a signal can interrupt it, as it cannot interrupt dist.barrier()."""
    if dist.is_initialized():
        work = dist.barrier(async_op=True)
        while not work.is_completed():
            time.sleep(0.01)
        work.wait()


@contextlib.contextmanager
def rank0_first():
    """Run the block on rank 0, then on the other ranks."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def print_rank0(*values, sep=" ") -> None:
    """Print on rank 0, above the progress bar if there is one."""
    if rank() == 0:
        tqdm.write(sep.join(map(str, values)))
        sys.stdout.flush()


@functools.cache
def warn_once(message: str) -> None:
    """Print a warning on rank 0, each message once."""
    print_rank0("warning:", message)
