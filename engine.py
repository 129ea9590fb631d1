"""What every phase shares and no phase is about: flags, processes, optimiser, schedule, checkpoints, logs.

Runs alike in one process (`python script.py`) and in many (`torchrun --nproc_per_node=8 script.py`). This
file knows nothing of the method."""

import argparse
import atexit
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import functools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
import zipfile
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


def knob(default, help: str, least: float = 0, most: float = math.inf):
    """A field of a Config: its default, a sentence with unit and reason, which --help shows, and the range of
    its numbers."""
    return dataclasses.field(default=default, metadata={"help": help, "range": (least, most)})


def check_ranges(cfg) -> None:
    """Raises ValueError for a number of a Config that is not in its range, or infinite."""
    for field in dataclasses.fields(cfg):
        value, (least, most) = getattr(cfg, field.name), field.metadata["range"]
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, (int, float)) and not (least <= number <= most and abs(number) < math.inf):
                limits = f"at least {least:g}" + f" and at most {most:g}" * (most < math.inf)
                raise ValueError(f"--{field.name.replace('_', '-')} must be {limits}, found {number}")


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
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"an object in JSON, found {text!r} ({error})") from None


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, found {text!r}")
    return text.lower() == "true"


def refuse(message, code: int = 2) -> None:
    """Ends the program with one line. Exit codes: 0 done; 1 a bug, which alone shows a traceback, or the end
    of another process; 2 what a user can put right; 3 losses that stay infinite or NaN; 143 a signal."""
    process = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
    print(f"error{process}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextlib.contextmanager
def user_errors(kinds=(ValueError, OSError)):
    """Around what reads a user's flags and files: an error of these kinds there is theirs to put right, not a
    bug. Nor is the end of another process, or of one that loads data."""
    try:
        yield
    except kinds as error:
        refuse(error)
    except RuntimeError as error:
        if re.match(r"DataLoader (worker \(pid|timed out)", str(error)):
            advice = "fewer --workers need less memory, --loader-timeout is for slow disks"
            refuse(f"loading data: {error}; {advice}")
        if re.search(r"Connection (closed|reset) by peer|Broken pipe", str(error)):
            refuse("another process has ended, see its message", code=1)
        raise


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
    for number in STOP_SIGNALS:
        signal.signal(number, _on_signal)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # tensors from loader processes are open files
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # torchrun may be killed
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        place = {name: int(os.environ[name.upper()]) for name in ("rank", "world_size")}
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if restarts != "0" and os.environ["GROUP_WORLD_SIZE"] == "1":
            # torchrun's store still has the addresses of processes that are gone
            place["store"] = dist.PrefixStore(f"restart {restarts}", next(dist.rendezvous("env://"))[0])
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30), **place)
        if backend == "gloo":
            atexit.register(dist.destroy_process_group)  # or its threads may abort a process that ends
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


def wait_for_all() -> None:
    """A barrier. Python runs no signal handler within torch's own, so that it could not be left."""
    if dist.is_initialized():
        barrier = dist.barrier(async_op=True)
        while not barrier.is_completed():
            time.sleep(0.01)
        barrier.wait()


@contextlib.contextmanager
def rank_zero_first():
    """The others enter when rank 0 is through."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


STOP_SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
STOPPED = 128 + signal.SIGTERM  # the exit code
PR_SET_PDEATHSIG = 1

stop_asked = False  # by a signal to this process
stop_at_once = True  # or only after the training step that is under way


def _on_signal(number, _) -> None:
    global stop_asked
    stop_asked = True
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C waits for nothing
    if stop_at_once:
        print(f"stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        os._exit(STOPPED)  # Python's own way out would wait for what it has begun with other processes


def leave() -> None:
    """Ends the program after a signal, between two steps, when all is saved."""
    print("stopped by a signal", file=sys.stderr, flush=True)
    sys.exit(STOPPED)


def say(*words, sep=" ") -> None:
    """Prints on rank 0."""
    if rank() == 0:
        print(*words, sep=sep, flush=True)


@functools.cache
def warn(message: str) -> None:
    """Once for each message, on rank 0."""
    say("warning:", message)


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


def one_by_one(_, bucket):
    """DDP's mean of gradients over processes. Gloo rounds the sum of three values as their place in a bucket
    has it, and DDP fills its buckets anew after the first step. So the gradient of each parameter is summed
    alone: a run that goes on equals one that was never cut."""
    sums = [dist.all_reduce(gradient, async_op=True).get_future() for gradient in bucket.gradients()]
    return torch.futures.collect_all(sums).then(lambda _: bucket.buffer().div_(world_size()))


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
    saves after it. In the body, `run.update(loss, ...)` makes the optimiser's step; `run.log(name=value)`
    adds to the log line.

    phase: its name, and that of its checkpoint, out/<phase>.pt; while it lasts, the last cfg.keep of
    out/<phase>.step-<step>.pt hold all that is needed to go on. Seeds and the positions in the streams of
    images are functions of the step, so no generator has a state to be kept.
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
        self.optimizer = make_optimizer(student, cfg.lr, cfg.weight_decay, cfg.backbone_lr_factor)
        if optimizer_state:
            self.optimizer.load_state_dict(optimizer_state)
        self.first_step = self.saved = 0
        path, checkpoint = newest(self.out, phase)
        if checkpoint:
            self.model.load_state_dict(checkpoint["student"])
            if teacher is not None:
                teacher.load_state_dict(checkpoint["teacher"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.first_step = self.saved = checkpoint["step"]
            say(f"{phase}: resumed at step {self.first_step} of {steps} from {path}")
            if checkpoint["world_size"] != world_size():
                change = f"{checkpoint['world_size']} processes before, {world_size()} now"
                warn(f"{change}: the images of each step stay the same, random points and rounding do not")
        if world_size() > 1 and device.type == "cuda":
            self.model = timm.layers.convert_sync_batchnorm(student)
        self.student = InParts(self.model, cfg.accumulate) if cfg.accumulate > 1 else self.model
        if world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.student = nn.parallel.DistributedDataParallel(self.student, device_ids=ids)
            if device.type == "cpu":
                self.student.register_comm_hook(None, one_by_one)
        self.values, self.counts, self.means = {}, {}, {}  # means: of the last log line
        self.stop, self.skipped = False, 0  # whether any process shall stop; steps skipped in a row
        self.warned = False  # of what the log shows

    def __iter__(self):
        global stop_at_once
        stop_at_once = False
        self.model.train()
        started = time.time()
        last_time, last_step = started, self.first_step
        for step in range(self.first_step, self.steps):
            torch.manual_seed(seed_of(self.cfg.seed, self.phase, step, rank()))
            first, length = self.schedule
            factor = lr_factor(self.cfg.schedule, (first + step) / length, self.cfg.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            self.step = step
            yield step

            done = step + 1
            if done % self.cfg.log_every == 0 or done == self.steps:
                now = time.time()
                left = (now - started) / (done - self.first_step) * (self.steps - done)
                self._write(done, (now - last_time) / (done - last_step), left)
                last_time, last_step = now, done
            last = done == self.steps  # saved too: what follows may fail
            if self.stop or last or done % self.cfg.save_every == 0:
                self.save_step(done)
            if self.stop:
                say(f"{self.phase}: saved at step {self.saved}; the same command goes on from here")
                leave()
        stop_at_once = True
        if stop_asked:  # since the last step
            leave()

    def update(self, loss: Tensor, terms: dict, batch: list[dict]) -> None:
        """Backward, clipping of the whole model's gradient norm, and a step of the optimiser; no step, on no
        process, if the gradient is not finite on any. Ten of these in a row end the program.

        terms: those of the loss, by name, and batch: its images, for the message then."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        flags = torch.stack([1.0 - norm.isfinite().float(), torch.full_like(norm, stop_asked)])
        if world_size() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        not_finite, self.stop = map(bool, flags.tolist())
        self.skipped = self.skipped + 1 if not_finite else 0
        if not_finite:
            return self._explain(terms, batch)
        if self.cfg.clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.cfg.clip, norm)
        self.optimizer.step()

    def _explain(self, terms, batch):
        """Why a step is skipped."""
        names = ", ".join(name for name, term in terms.items() if not term.isfinite())
        files = ", ".join(repr(item["file"]) for item in batch)
        if names or rank() == 0:
            what = f"{names} not finite with the images {files}" if names else "the gradient is not finite"
            place = f"{self.phase} step {self.step + 1}, process {rank()}"
            print(f"warning: {place}: {what}; the step is skipped", file=sys.stderr, flush=True)
        if self.skipped == MOST_SKIPPED:
            advice = "a lower --lr or --precision fp32 may help"
            refuse(f"{self.skipped} such steps in a row; saved at step {self.saved}; {advice}", code=3)

    def log(self, **values) -> None:
        """Adds values to be averaged in the next log line, unless the step has been skipped."""
        for name, value in values.items() if not self.skipped else ():
            value = value.detach() if isinstance(value, Tensor) else value
            self.values[name] = self.values.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def _write(self, step, seconds, left):
        names = list(self.values)
        means = [float(self.values[name]) / self.counts[name] for name in names]
        means = mean_over_processes(torch.tensor(means, device=self.device)).tolist()
        self.means = means = dict(zip(names, means))
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
            with user_errors(OSError), open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(values) + "\n")

    @contextlib.contextmanager
    def safe(self, step):
        """Around what takes long between two steps: the run is saved first, so a signal need not wait."""
        global stop_at_once
        self.save_step(step)
        stop_at_once = True
        if stop_asked:
            leave()
        yield
        stop_at_once = False

    def save_step(self, step) -> None:
        """Saves what is needed to go on, and removes all but the last cfg.keep; not while steps are
        skipped."""
        if self.saved == step or self.skipped:
            return
        self.save(self.out / f"{self.phase}.step-{step:07}.pt", step)
        self.saved = step
        if rank() == 0:
            for old in step_files(self.out, self.phase)[self.cfg.keep :]:
                old.unlink()
        wait_for_all()  # nobody leaves while rank 0 is writing

    def save(self, path, step, **results) -> None:
        if rank() == 0:
            save_checkpoint(
                path,
                {
                    "format": FORMAT,
                    "phase": self.phase,
                    "step": step,
                    "world_size": world_size(),
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
            for old in step_files(self.out, self.phase):
                old.unlink()
        wait_for_all()


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


# ----------------------------------------------------------------------------------------------- checkpoints


# What may differ between a run and the one that goes on from its checkpoints.
BOOKKEEPING = {"root", "out", "preset", "workers", "device", "labels_only", "loader_timeout", "keep"}
BOOKKEEPING |= {"accumulate", "log_every", "save_every", "eval_every"}
ENTRIES = ("format", "phase", "step", "world_size", "config", "model_args", "student", "teacher", "optimizer")
MOST_SKIPPED = 10  # steps in a row whose gradient is not finite


def finished(cfg, phase: str, **same) -> bool:
    """Whether out/<phase>.pt is there. Raises ValueError if it, or what is left of a run cut short, was made
    with other settings, or has other values than `same`."""
    final = Path(cfg.out) / f"{phase}.pt"
    try:
        whole = load_checkpoint(final) if final.exists() else None
    except ValueError as error:
        raise ValueError(f"{error}; remove it to run its phase again") from None
    for path, checkpoint in ((final, whole), newest(cfg.out, phase)):
        if checkpoint:
            before = checkpoint["config"] | {name: checkpoint.get(name) for name in same}
            now = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in same} | same
            for name in now:  # flags first, then what follows from them
                if name in before.keys() - BOOKKEEPING and before[name] != now[name]:
                    change = f"{name} {before[name]!r}, now {now[name]!r}"
                    raise ValueError(f"{path} was made with other settings ({change}); choose another --out")
    return final.exists()


def step_files(out, phase: str) -> list[Path]:
    """Newest first."""
    return sorted(Path(out).glob(f"{phase}.step-*.pt"), reverse=True)


def newest(out, phase: str) -> tuple:
    """Path and content of the newest checkpoint of a phase that is whole, (None, None) if it has none. Raises
    ValueError if it has some and all are damaged."""
    files = step_files(out, phase)
    for path in files:
        try:
            return path, load_checkpoint(path)
        except ValueError as error:
            warn(f"{error}; the one before it is tried")
    if files:
        raise ValueError(
            f"all checkpoints {out}/{phase}.step-*.pt are damaged; remove them to begin the phase anew"
        )
    return None, None


locks = {}  # open files by folder


def lock(folder: Path) -> None:
    """Makes a folder this process's own as long as it lives: the system gives it back however that ends.
    Raises ValueError if another process has it, or if nothing can be written there."""
    if folder in locks:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"nothing can be written into --out {str(folder)!r}: {error.strerror}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # not for a file system that knows no locks
            file.seek(0)
            raise ValueError(f"--out {str(folder)!r} is in use by {file.read()!r}; choose another") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    locks[folder] = file


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Whole or not at all, also if the machine fails: written beside, flushed to the disk, renamed, and the
    name flushed too. Ends the program where the disk has no room."""
    temporary = path.with_name(path.name.split(".")[0] + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:  # the latter is how torch says that the disk is full
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = f"{shutil.disk_usage(path.parent).free:,} bytes are free there; {error}"
        refuse(f"{path} cannot be written, what was saved before is untouched: {reason}")


def load_checkpoint(path) -> dict:
    """A checkpoint on the CPU; plain types only, nothing in it is executed. Raises ValueError for a file
    that is damaged or not one of ours."""
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint {str(path)!r}") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{path} is not a checkpoint, or is damaged: {type(error).__name__}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this project, format {FORMAT}")
    missing = [name for name in ENTRIES if name not in checkpoint]
    if missing:
        raise ValueError(f"{path} is not whole: it has no {missing[0]!r}")
    return checkpoint


def check_archive(path) -> None:
    """Raises zipfile.BadZipFile for a file of torch.save with a wrong checksum, which torch does not look at,
    or with more in it than the file is long."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
            raise zipfile.BadZipFile("compressed")
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(damaged)
