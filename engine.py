"""What every phase shares and no phase is about: flags, processes, optimiser, schedule, checkpoints, logs.

Runs alike in one process (`python script.py`) and in many (`torchrun --nproc_per_node=8 script.py`). This
file knows nothing of the method."""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn

from data import seed_of

FORMAT = 1  # of a checkpoint

# ----------------------------------------------------------------------------------------------------- flags


def knob(default, help: str):
    """A field of a Config: its default, and a sentence with unit and reason, which --help shows."""
    return dataclasses.field(default=default, metadata={"help": help})


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def __init__(self, description):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter)

    def error(self, message):
        if message.startswith("unrecognized"):
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            near = difflib.get_close_matches(message.split()[2].split("=")[0], flags, n=1)
            message += f"; did you mean {near[0]}?" if near else "."
            message += f" Valid flags: {' '.join(flags)}"
        refuse(message)


def parse_config(config_class, presets: dict, argv=None, description=None):
    """A config_class from its defaults, then the preset, then the flags. Every field is a flag; presets
    name values of fields.

    The preset is the one that --preset names, or that of the data set, or "coco" for a folder of one's own.
    """
    parser = Parser(description)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for name, field in fields.items():
        kind = {tuple: _values, bool: _boolean, dict: _json, list: str}.get(field.type, field.type)
        more = {bool: {"nargs": "?", "const": True}, list: {"nargs": "+"}}.get(field.type, {})
        text = field.metadata.get("help", "").replace("%", "%%") + f" [{field.default}]"
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=None, help=text, **more)
    flags = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    data = flags.get("data", fields["data"].default)
    preset = flags.get("preset") or (data if data in presets else "coco")
    if preset not in presets:
        refuse(f"unknown preset {preset!r}: one of {', '.join(presets)}")
    values = {**presets[preset], **flags, "preset": preset}
    return config_class(**values)


def _values(text: str) -> tuple:
    """ "1,2.5" -> (1, 2.5)"""
    try:
        return tuple(float(part) if set(part) & set(".e") else int(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers with commas between, found {text!r}") from None


def _json(text: str) -> dict:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"JSON, found {text!r} ({error})") from None


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, found {text!r}")
    return text.lower() == "true"


def refuse(message) -> None:
    """Ends the program because of something a user can put right: one line, exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


@contextlib.contextmanager
def user_errors(kinds=(ValueError, OSError)):
    """Around what reads a user's flags and files: an error of these kinds there is theirs to put right, not a
    bug."""
    try:
        yield
    except kinds as error:
        refuse(error)


# ------------------------------------------------------------------------------------------------- processes


def keep_freed_memory() -> None:
    """Asks glibc not to hand freed blocks back to the system: on a CPU a step would fault them in again and
    again. bench/RESULTS.md has what it brings."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
            ctypes.CDLL(None).mallopt(parameter, value)


bfloat16 = None  # whether `autocast` is in bfloat16; None: where the device does it well


def start_processes(device: str = "", precision: str = "") -> torch.device:
    """Joins the processes of torchrun, if any, and returns this process's device. device: "cuda", "mps",
    "cpu", or "" for the best there is. precision: of the model's passes in this process: "bf16",
    "fp32" (then without TF32), or "" for bf16 where the device does it well."""
    global bfloat16
    if precision not in ("", "bf16", "fp32"):
        raise ValueError(f"unknown --precision {precision!r}: bf16 or fp32")
    bfloat16 = precision == "bf16" if precision else None
    if not device:
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown --device {device!r}: cuda, mps or cpu") from None
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch finds no GPU that it can use")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_processes(value: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= world_size()
    return value


@contextlib.contextmanager
def rank_zero_first():
    """The others enter when rank 0 is through."""
    if dist.is_initialized() and rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank() == 0:
        dist.barrier()


def say(*words, sep=" ") -> None:
    """Prints on rank 0."""
    if rank() == 0:
        print(*words, sep=sep, flush=True)


# -------------------------------------------------------------------------------------------------- training


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, backbone_lr_factor: float):
    """AdamW with the parameter groups of Mask2Former: the backbone learns at lr * backbone_lr_factor;
    norms, embeddings and position tables do not decay."""
    no_decay = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Embedding)
    groups = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if not parameter.requires_grad:
                continue
            factor = backbone_lr_factor if name.startswith("backbone.") else 1.0
            table = "relative_position_bias_table" in name or "pos_embed" in name
            decay = 0.0 if isinstance(module, no_decay) or table else weight_decay
            groups.setdefault((factor, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr * factor, "initial_lr": lr * factor, "weight_decay": decay}
            for (factor, decay), parameters in groups.items()
        ],
        fused=next(model.parameters()).device.type in ("cuda", "cpu"),
    )


def lr_factor(schedule: str, progress: float, warmup: float = 0.0, drops=(0.8889, 0.963)) -> float:
    """What the learning rate is multiplied by after the share `progress` in [0, 1] of a run.

    "poly": (1 - progress) ** 0.9. "step": times 0.1 at each of `drops`. "cosine": half a cosine. All rise
    linearly over `warmup` first."""
    if progress < warmup:
        return max(progress, 1e-3) / warmup
    if schedule == "poly":
        return (1 - progress) ** 0.9
    if schedule == "step":
        return 0.1 ** sum(progress >= drop for drop in drops)
    if schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1 - warmup))
    raise ValueError(f"unknown schedule {schedule!r}: one of poly, step, cosine")


def autocast(device: torch.device):
    """bfloat16 or fp32, as start_processes was told, or bfloat16 where the device does it well."""
    if device.type == "cpu":
        does_it_well = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    else:
        does_it_well = device.type == "cuda" and torch.cuda.is_bf16_supported()
    enabled = does_it_well if bfloat16 is None else bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


class InParts(nn.Module):
    """A model through which a batch goes in parts, one after the other. What a part needs for its backward
    pass is made again then: memory of one part, one forward pass more, the gradient of the whole batch."""

    def __init__(self, model: nn.Module, parts: int):
        super().__init__()
        self.model, self.parts = model, parts

    def forward(self, images: Tensor):
        keep_little = torch.utils.checkpoint.checkpoint
        return join([keep_little(self.model, part, use_reentrant=False) for part in images.chunk(self.parts)])


def join(parts: list, joined: dict | None = None):
    """The outputs of a batch from those of its parts: tensors with the batch first, in dictionaries and
    lists. A tensor that is there several times is joined once."""
    joined = {} if joined is None else joined
    first = parts[0]
    if isinstance(first, dict):
        return type(first)({name: join([part[name] for part in parts], joined) for name in first})
    if isinstance(first, list):
        return [join(rows, joined) for rows in zip(*parts)]
    if id(first) not in joined:
        joined[id(first)] = torch.cat(parts)
    return joined[id(first)]


class Run:
    """One phase of training: `for step in run:` sets seed and learning rate before the body, and logs and
    saves after it. In the body, `run.update(loss)` makes the optimiser's step; `run.log(name=value)` adds
    to the log line.

    phase: its name, and that of its checkpoint, out/<phase>.pt; while it lasts, out/<phase>.partial.pt
    holds all that is needed to go on.
    student: a raw model; run.student is what to call, run.model the raw one. teacher: a raw model that is
    saved along, or None.
    steps: of this phase. schedule: (first, length): where this phase begins in a learning-rate schedule,
    and that schedule's length.
    describe: plain values that are written into every checkpoint."""

    def __init__(
        self, cfg, phase, student, device, steps, schedule, teacher=None, optimizer_state=None, describe=None
    ):
        self.cfg, self.phase, self.device, self.steps, self.schedule = cfg, phase, device, steps, schedule
        self.model, self.teacher, self.describe = student, teacher, describe or {}
        self.out = Path(cfg.out)
        self.partial = self.out / f"{phase}.partial.pt"
        self.optimizer = make_optimizer(student, cfg.lr, cfg.weight_decay, cfg.backbone_lr_factor)
        if optimizer_state:
            self.optimizer.load_state_dict(optimizer_state)
        self.first_step = 0
        if self.partial.exists():
            checkpoint = load_checkpoint(self.partial)
            self.model.load_state_dict(checkpoint["student"])
            if teacher is not None:
                teacher.load_state_dict(checkpoint["teacher"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.first_step = checkpoint["step"]
            say(f"{phase}: resumed at step {self.first_step} of {steps} from {self.partial}")
        if world_size() > 1 and device.type == "cuda":
            self.model = timm.layers.convert_sync_batchnorm(student)
        self.student = InParts(self.model, cfg.accumulate) if cfg.accumulate > 1 else self.model
        if world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.student = nn.parallel.DistributedDataParallel(self.student, device_ids=ids)
        self.values, self.counts = {}, {}
        self.stop_signal = None

    def __iter__(self):
        previous = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
        self.model.train()
        started = time.time()
        last_time, last_step = started, self.first_step
        for step in range(self.first_step, self.steps):
            torch.manual_seed(seed_of(self.cfg.seed, self.phase, step, rank()))
            first, length = self.schedule
            factor = lr_factor(self.cfg.schedule, (first + step) / length, self.cfg.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            yield step

            done = step + 1
            if done % self.cfg.log_every == 0 or done == self.steps:
                now = time.time()
                left = (now - started) / (done - self.first_step) * (self.steps - done)
                self._write(done, (now - last_time) / (done - last_step), left)
                last_time, last_step = now, done
            stop = self._agree_to_stop()
            if stop or done % self.cfg.save_every == 0 or done == self.steps:  # the last: evaluation may fail
                self.save(self.partial, done)
            if stop:
                say(f"{self.phase}: stopped at step {done} and saved; the same command goes on from here")
                if dist.is_initialized():
                    dist.barrier()  # nobody leaves while rank 0 is writing
                sys.exit(128 + stop)
        for number, handler in previous.items():
            signal.signal(number, handler)

    def update(self, loss: Tensor) -> None:
        """Backward, clipping of the whole model's gradient norm, and a step of the optimiser."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.cfg.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip)
        self.optimizer.step()

    def log(self, **values) -> None:
        """Adds values to be averaged in the next log line."""
        for name, value in values.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self.values[name] = self.values.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def _write(self, step, seconds, left):
        names = list(self.values)
        means = [float(self.values[name]) / self.counts[name] for name in names]
        means = mean_over_processes(torch.tensor(means, device=self.device)).tolist()
        means = dict(zip(names, means))
        self.values, self.counts = {}, {}
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        images = means.pop("images", 0) * world_size() / seconds
        record = {"phase": self.phase, "step": step, **means, "lr": lr, "images_per_second": images}
        self.record(**record)
        words = [f"{name} {value:.3f}" for name, value in means.items()]
        words += [f"lr {lr:.1e}", f"{images:.0f} images/s", f"{duration(left)} left"]
        say(f"{self.phase} {step}/{self.steps}", *words, sep="  ")

    def record(self, **values) -> None:
        """A line of out/metrics.jsonl."""
        if rank() == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(values) + "\n")

    def _stop(self, number, _):
        self.stop_signal = number

    def _agree_to_stop(self) -> int:
        """The number of the signal that any process got, or 0, the same on every process."""
        if world_size() == 1:
            return self.stop_signal or 0
        flag = torch.tensor([float(self.stop_signal or 0)], device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag.item())

    def save(self, path, step, **results) -> None:
        if rank() == 0:
            save_checkpoint(
                path,
                {
                    "format": FORMAT,
                    "phase": self.phase,
                    "step": step,
                    "config": dataclasses.asdict(self.cfg),
                    "student": self.model.state_dict(),
                    "teacher": self.teacher.state_dict() if self.teacher is not None else None,
                    "optimizer": self.optimizer.state_dict(),
                    **self.describe,
                    **results,
                },
            )

    def finish(self, **results) -> None:
        """Writes the phase's final checkpoint; results go into it and into metrics.jsonl."""
        self.save(self.out / f"{self.phase}.pt", self.steps, **results)
        self.record(phase=self.phase, step=self.steps, **results)
        if rank() == 0:
            self.partial.unlink(missing_ok=True)
        if dist.is_initialized():
            dist.barrier()


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


# ----------------------------------------------------------------------------------------------- checkpoints


# What may differ between a run and the one that goes on from its checkpoints.
BOOKKEEPING = {"root", "out", "preset", "workers", "device", "labels_only"}
BOOKKEEPING |= {"accumulate", "log_every", "save_every", "eval_every"}


def finished(cfg, phase: str, **same) -> bool:
    """Whether out/<phase>.pt is there. Raises ValueError if it, or what is left of a run cut short, was made
    with other settings, or has other values than `same`."""
    final = Path(cfg.out) / f"{phase}.pt"
    for path in (final, final.with_suffix(".partial.pt")):
        if path.exists():
            checkpoint = load_checkpoint(path)
            before = checkpoint["config"] | {name: checkpoint.get(name) for name in same}
            now = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in same} | same
            for name in now:  # flags first, then what follows from them
                if name in before.keys() - BOOKKEEPING and before[name] != now[name]:
                    change = f"{name} {before[name]!r}, now {now[name]!r}"
                    raise ValueError(f"{path} was made with other settings ({change}); choose another --out")
    return final.exists()


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Whole or not at all: written beside, flushed to the disk, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path) -> dict:
    """A checkpoint on the CPU; plain types only, nothing in it is executed. Raises ValueError for a file
    that is not one of ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint {str(path)!r}") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{path} is not a checkpoint, or is damaged: {type(error).__name__}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this project, format {FORMAT}")
    return checkpoint
