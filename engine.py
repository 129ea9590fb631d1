"""The training loop and what it needs: processes, optimiser, schedule, steps, logs.

Runs alike in one process (`python script.py`) and in many (`torchrun --nproc_per_node=8 script.py`). This
file knows nothing of the method."""

import atexit
import contextlib
import ctypes
import dataclasses
import functools
import json
import math
import os
import platform
import resource
import shlex
import signal
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints import newest, save_checkpoint, step_files
from data import seed_of
from flags import refuse, user_errors

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
        torch.backends.cuda.matmul.allow_tf32 = False  # costs, losses and sampling locations are fp32
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
    for number in STOP_SIGNALS:
        signal.signal(number, _on_signal)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # tensors from loader processes are open files
    with contextlib.suppress(ValueError):  # macOS refuses "unlimited"
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
        wait_for_all()  # rank 0 has the store: if it refused and left, others could not even join
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


def check_alike(number: int, what: str, device: torch.device) -> None:
    """Ends the program where processes differ in a number: of a folder that machines share, one may see an
    older state."""
    if dist.is_initialized():
        ends = torch.tensor([number, -number], device=device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        most, least = ends[0].item(), -ends[1].item()
        if most != least:
            refuse(f"processes see {what} {least} and {most}: is --out the same folder on all machines?")


def wait_for_all() -> None:
    """A barrier that a signal can interrupt: Python runs no handler within dist.barrier()."""
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
    """Prints on rank 0, above the progress line if there is one."""
    if rank() == 0:
        tqdm.write(sep.join(map(str, words)))
        sys.stdout.flush()


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
            table = "relative_position_bias_table" in name or "pos_embed" in name
            kind = name.startswith("backbone."), isinstance(module, no_decay) or table
            groups.setdefault(kind, []).append(parameter)
    lrs, decays = (lr, lr * backbone_lr_factor), (weight_decay, 0.0)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": lrs[b], "initial_lr": lrs[b], "weight_decay": decays[n]}
            for (b, n), parameters in groups.items()
        ],
        fused=next(model.parameters()).device.type in ("cuda", "cpu"),
    )


def lr_factor(schedule: str, progress: float, warmup: float = 0.0, drops=(0.8889, 0.963)) -> float:
    """What the learning rate is multiplied by after the share `progress` in [0, 1] of a run.

    "poly": (1 - progress) ** 0.9. "step": times 0.1 at each of `drops` (327,778 and
    355,092 of COCO's 368,750 steps, Mask2Former's schedule). "cosine": half a cosine. All rise
    linearly over `warmup` first."""
    if progress < warmup:
        return min(1.0, max(progress, 1e-3) / warmup)  # the first step shall count
    if schedule == "poly":
        return (1 - progress) ** 0.9
    if schedule == "step":
        return 0.1 ** sum(progress >= drop for drop in drops)
    if schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1 - warmup))
    raise ValueError(f"unknown schedule {schedule!r}: one of poly, step, cosine")


def takes_bfloat16(device: torch.device) -> bool:
    """Whether passes are in bfloat16: as start_processes was told, or where the device does it well."""
    if bfloat16 is not None:
        return bfloat16
    if device.type == "cpu":
        return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=takes_bfloat16(device))


def one_by_one(_, bucket):
    """DDP's mean of gradients over processes. How gloo rounds a sum depends on the place in its bucket, and
    DDP rearranges its buckets after the first step. So each parameter's gradient is summed alone, and a
    resumed run stays bit-equal to one that was never cut."""
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


MOST_SKIPPED = 10  # steps in a row whose gradient is not finite


class Run:
    """One phase of training: `for step in run:` sets seed and learning rate before the body, and logs and
    saves after it. In the body, `run.update(loss, ...)` makes the optimiser's step; `run.log(shown, ...)`
    adds to the next log line.

    phase: its name, and that of its checkpoint, out/<phase>.pt; while it lasts, the last cfg.keep of
    out/<phase>.step-<step>.pt hold all that is needed to go on. Seeds and the positions in the streams of
    images are functions of the step, so no generator has a state to be kept.
    student: a raw model; run.student is what to call, run.model the raw one. teacher: a raw model that is
    saved along, or None.
    steps: of this phase. schedule: (first, length): where this phase begins in a learning-rate schedule,
    and that schedule's length. later: the work of the phases to come, in steps of this one.
    describe: plain values that are written into every checkpoint. lr_scale: what cfg.lr is multiplied by."""

    def __init__(
        self,
        cfg,
        phase,
        student,
        device,
        steps,
        schedule,
        teacher=None,
        optimizer_state=None,
        describe=None,
        later=0.0,
        lr_scale=1.0,
    ):
        self.cfg, self.phase, self.device, self.steps, self.schedule = cfg, phase, device, steps, schedule
        self.model, self.teacher, self.describe, self.later = student, teacher, describe or {}, later
        self.out = Path(cfg.out)
        self.optimizer = make_optimizer(student, lr_scale * cfg.lr, cfg.weight_decay, cfg.backbone_lr_factor)
        if optimizer_state:  # its moments; it may have been made with another lr
            groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
            self.optimizer.load_state_dict(optimizer_state)
            for group, ours in zip(self.optimizer.param_groups, groups):
                group.update(ours)
        self._go_on()
        self._distribute()
        self.sums, self.means = {}, {}  # since the last log line; of the last one
        self.shown = []  # names of what stands in it
        self.board = None  # TensorBoard's
        if cfg.tensorboard and rank() == 0:
            folder = self.out / "tensorboard" / phase
            self.board = tensorboard_writer()(folder, purge_step=self.first_step)
        self.stop, self.skipped = False, 0  # whether any process shall stop; steps skipped in a row
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.statistics = [v for m in norms if m.track_running_stats for v in (m.running_mean, m.running_var)]
        self.finite_statistics = [value.clone() for value in self.statistics]  # of the last step that counted
        self.paused = 0.0  # seconds of evaluations since the last log line
        self.warned = False  # of what the log shows

    def _go_on(self) -> None:
        """Resumes from the newest whole checkpoint of this phase, if there is one."""
        self.first_step = self.saved = self.step = 0
        path, checkpoint = newest(self.out, self.phase, warn)
        check_alike(checkpoint["step"] if checkpoint else 0, "checkpoints of step", self.device)
        if not checkpoint:
            return
        self.model.load_state_dict(checkpoint["student"])
        if self.teacher is not None:
            self.teacher.load_state_dict(checkpoint["teacher"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.first_step = self.saved = checkpoint["step"]
        self.step = self.first_step - 1  # the last one that was made
        say(f"{self.phase}: resumed at step {self.first_step} of {self.steps} from {path}")
        if checkpoint["world_size"] != world_size():
            change = f"{checkpoint['world_size']} processes before, {world_size()} now"
            warn(f"{change}: the images of each step stay the same, random points and rounding do not")

    def _distribute(self) -> None:
        """The model over the parts of a batch and over processes."""
        on_gpus = self.device.type == "cuda"
        if world_size() > 1 and on_gpus:
            self.model = timm.layers.convert_sync_batchnorm(self.model)
        self.student = self.model if self.cfg.accumulate == 1 else InParts(self.model, self.cfg.accumulate)
        if world_size() > 1:
            ids = [self.device.index] if on_gpus else None
            self.student = nn.parallel.DistributedDataParallel(self.student, device_ids=ids)
            if not on_gpus:
                self.student.register_comm_hook(None, one_by_one)

    def __iter__(self):
        global stop_at_once
        stop_at_once = False
        self.model.train()
        line = ProgressLine(self.phase, self.first_step, self.steps, self.later)
        last_time, last_step = time.time(), self.first_step
        for step in range(self.first_step, self.steps):
            torch.manual_seed(seed_of(self.cfg.seed, self.phase, step, rank()))
            first, length = self.schedule
            factor = lr_factor(self.cfg.schedule, (first + step) / length, self.cfg.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            self.step = step
            yield step

            done = step + 1
            line.update(done)
            if done % self.cfg.log_every == 0 or done == self.steps:
                seconds = (time.time() - last_time - self.paused) / (done - last_step)
                last_time, last_step, self.paused = time.time(), done, 0.0
                line.write(done, self._means(done, seconds))
            last = done == self.steps  # saved too: what follows may fail
            if self.stop or last or done % self.cfg.save_every == 0:
                self.save_step(done)
            if self.stop:
                line.close()
                say(f"{self.phase}: saved at step {self.saved}; the same command goes on from here")
                leave()
        line.close()
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
        if self.statistics:  # of trained batch norms: the forward pass has changed them
            now, before = self.statistics, self.finite_statistics
            torch._foreach_copy_(*((now, before) if not_finite else (before, now)))
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

    def log(self, shown: dict, **values) -> None:
        """Adds values to be averaged for the next line of metrics.jsonl, of which those `shown` stand in the
        progress line too; unless the step has been skipped. A pair is a sum and how many were summed.
        "images": of this process in this step."""
        self.shown = list(shown)
        for name, value in (shown | values).items() if not self.skipped else ():
            value, number = value if isinstance(value, tuple) else (value, 1)
            value = value.detach() if isinstance(value, Tensor) else value
            before = self.sums.get(name, (0.0, 0))
            self.sums[name] = before[0] + value, before[1] + number

    def _means(self, step, seconds) -> dict:
        """Of what has been logged since the last time, None of no values; those for the progress line."""
        sums = torch.tensor([[float(value), number] for value, number in self.sums.values()]).to(self.device)
        sums = mean_over_processes(sums).tolist()
        means = {name: value / number if number else None for name, (value, number) in zip(self.sums, sums)}
        self.means, self.sums = means, {}
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        images = means.pop("images", 0) * world_size() / seconds
        self.record(step, **means, lr=lr, images_per_second=images)
        return {name: means.get(name) for name in self.shown} | {"speed_img/s": images}

    def record(self, step, **values) -> None:
        """A line of out/metrics.jsonl, and points of TensorBoard's curves."""
        record(self.out, phase=self.phase, step=step, **values)
        if self.board:
            for name, value in _flat(values):
                self.board.add_scalar(name, value, step)

    @contextlib.contextmanager
    def safe(self, step):
        """Around what takes long between two steps: the run is saved first, so a signal need not wait."""
        global stop_at_once
        started = time.time()
        self.save_step(step)
        stop_at_once = True
        if self.stop or stop_asked:  # any process, this one
            leave()
        yield
        stop_at_once = False
        self.paused += time.time() - started

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
            checkpoint = {
                "phase": self.phase,
                "step": step,
                "world_size": world_size(),
                "config": dataclasses.asdict(self.cfg),
                "student": self.model.state_dict(),
                "teacher": self.teacher.state_dict() if self.teacher is not None else None,
                "optimizer": self.optimizer.state_dict(),
                **self.describe,
                **results,
            }
            with user_errors(OSError):
                save_checkpoint(path, checkpoint)

    def finish(self, **results) -> None:
        """Writes the phase's final checkpoint; results go into it and into metrics.jsonl."""
        self.record(self.steps, **results)  # first, and once more if the save is cut short
        self.save(self.out / f"{self.phase}.pt", self.steps, **results)
        if self.board:
            self.board.close()
        if rank() == 0:
            for old in step_files(self.out, self.phase):
                old.unlink()
        wait_for_all()


# ------------------------------------------------------------------------------------------------------- logs


class ProgressLine:
    """One line of a phase: on a terminal it is drawn anew after each step, with a bar if there is room; in a
    log file it is a new line for each `write`, and the names of its columns stand above every twentieth."""

    def __init__(self, phase, first_step: int, steps: int, later: float):
        self.phase, self.steps, self.later, self.rows = phase, steps, later, 0
        self.columns, self.values = [], {}
        self.started, self.first_step = time.time(), first_step
        on_terminal = rank() == 0 and sys.stdout.isatty()
        form = dict(file=sys.stdout, bar_format="{desc} {bar}", dynamic_ncols=True)
        self.bar = tqdm(total=steps, initial=first_step, **form) if on_terminal else None

    def update(self, step: int) -> None:
        if self.bar is not None:
            row = self._row(step) if self.rows else f"{self.phase} {step}"
            self.bar.set_description_str(row, refresh=False)
            self.bar.update(step - self.bar.n)

    def write(self, step: int, values: dict) -> None:
        """values: numbers or None by name, whose first word stands in a line of its own above the others."""
        self.values = values
        self.columns = [(self.phase, "step"), *(name.split("_", 1) for name in values)]
        self.columns += [("phase", "left"), ("whole", "left")]
        if self.bar is None and self.rows % 20 == 0 or self.rows == 0:
            say(self._line(first for first, _ in self.columns))
            say(self._line(second for _, second in self.columns))
        self.rows += 1
        if self.bar is None:
            say(self._row(step))
        else:
            self.update(step)

    def _row(self, step: int) -> str:
        pace = (time.time() - self.started) / max(1, step - self.first_step)
        left = pace * (self.steps - step)
        numbers = ["-" if v is None else f"{v:.{2 if abs(v) < 100 else 0}f}" for v in self.values.values()]
        return self._line([str(step), *numbers, duration(left), duration(left + pace * self.later)])

    def _line(self, cells) -> str:
        widths = [max(5, *map(len, names)) for names in self.columns]
        widths[-2:] = 6, 6
        return " ".join(cell.rjust(width) for cell, width in zip(cells, widths))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def record(out, **values) -> None:
    """A line of out/metrics.jsonl."""
    if rank() == 0:
        with user_errors(OSError), open(Path(out) / "metrics.jsonl", "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a process was killed while it wrote
                    file.write(b"\n")
            file.write(json.dumps(values).encode() + b"\n")


def banner(out, title: str, device: torch.device, **lines) -> None:
    """What a run is, in a few lines on the screen, and in metrics.jsonl."""
    on_gpu, threads = device.type == "cuda", torch.get_num_threads()
    name = (
        torch.cuda.get_device_name(device) if on_gpu else f"{device}, {threads} thread{'s' * (threads > 1)}"
    )
    lines |= {
        "device": f"{world_size()} x {name}, {'bf16' if takes_bfloat16(device) else 'fp32'}",
        "versions": f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}",
    }
    say(title)
    for name, text in lines.items():
        text = text.replace(" ", "\xa0").replace(",\xa0", ", ")  # lines end after a comma
        indents = dict(initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)
        text = textwrap.fill(text, 80, break_on_hyphens=False, **indents)
        say(text.replace("\xa0", " "))
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    started = time.strftime("%Y-%m-%d %H:%M")
    record(out, banner={"command": command, "started": started, **lines})


def tensorboard_writer():
    """The class. Raises ValueError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs: pip install tensorboard") from None
    return SummaryWriter


def _flat(values: dict, prefix=""):
    """(name, number) of all numbers in nested dictionaries."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif value is not None:
            yield prefix + name, value


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d{hours % 24:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
