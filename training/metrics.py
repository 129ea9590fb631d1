"""Logs of a phase: metrics.jsonl, TensorBoard, one printed line every --log-every steps, and a progress
bar."""

import contextlib
import json
import os
import platform
import shlex
import sys
import textwrap
import time
from pathlib import Path

import timm
import torch
from torch import Tensor
from tqdm import tqdm

from training import signals
from training.auto import GUIDED_STEP_COST
from training.cli import expected_errors
from training.config import Config
from training.distributed import Env, all_reduce_mean, print_rank0, rank, world_size


class Metrics:
    """Average what is logged between two log lines, over steps and ranks, and write it.

    Each log line (phase, step, values) is one line of out/metrics.jsonl and points in TensorBoard.

    Args:
        phase, steps: its name and length. first_step: where this process starts.
        optimizer: for the learning rate."""

    def __init__(self, cfg: Config, phase: str, steps: int, first_step: int, optimizer, env: Env):
        self.out, self.log_every, self.phase, self.steps = Path(cfg.out), cfg.log_every, phase, steps
        self.optimizer, self.env = optimizer, env
        self.sums = {}  # name -> (sum, count) since the last log line
        self.last = {}  # the means of the last log line
        self.printed = []  # the names of those that it printed
        self.warned = False
        self.last_time, self.last_step, self.paused_seconds = time.time(), first_step, 0.0
        self.cfg, self.first_step, self.started = cfg, first_step, self.last_time
        self.board = None
        if cfg.tensorboard and rank() == 0:
            self.board = tensorboard_writer()(self.out / "tensorboard" / phase, purge_step=first_step)
        on_terminal = rank() == 0 and sys.stdout.isatty()
        bar = dict(total=steps, initial=first_step, desc=phase, file=sys.stdout, dynamic_ncols=True)
        self.bar = tqdm(**bar) if on_terminal else None

    def log(self, step: int, num_images: int, printed: dict, **values) -> None:
        """Add the values of a step, and every `log_every` steps write the means since the last time.

        Values are numbers, tensors of one number, or pairs of a sum and a count. Those in `printed` are
        printed as well. num_images: the images of this rank."""
        self.printed = list(printed)
        values |= printed
        values["images"] = num_images
        for name, value in values.items():
            value, count = value if isinstance(value, tuple) else (value, 1)
            value = value.detach() if isinstance(value, Tensor) else value
            previous = self.sums.get(name, (0.0, 0))
            self.sums[name] = previous[0] + value, previous[1] + count
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
        if step == self.first_step + 2:  # the first steps are slow
            self.started = time.time()
        if step == self.first_step + 10:
            self._print_expected_time(step, (time.time() - self.started) / 8)
        if step % self.log_every == 0 or step == self.steps:
            self._log_means(step)

    def _print_expected_time(self, step: int, seconds: float) -> None:
        """Print the time that is left at the speed of the first steps."""
        left, later = expected_seconds(self.cfg, self.phase, self.steps - step, seconds)
        text = f"{self.phase}: {seconds:.2g} s per step, about {format_duration(left)} left"
        print_rank0(text + (f", and {format_duration(later)} for the phases after it" if later else ""))

    def _log_means(self, step: int) -> None:
        sums = torch.tensor([[float(value), count] for value, count in self.sums.values()])
        sums = all_reduce_mean(sums.to(self.env.device)).tolist()
        means = {name: value / count if count else None for name, (value, count) in zip(self.sums, sums)}
        seconds = (time.time() - self.last_time - self.paused_seconds) / (step - self.last_step)
        speed = means.pop("images") * world_size() / seconds
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.sums, self.last = {}, means
        self.last_time, self.last_step, self.paused_seconds = time.time(), step, 0.0
        self.write(step, **means, lr=lr, images_per_second=speed)
        left = format_duration(seconds * (self.steps - step))
        text = format_values({name: means[name] for name in self.printed})
        print_rank0(f"{self.phase} {step}/{self.steps}  {text}  {format_number(speed)} img/s  {left} left")

    def write(self, step: int, **values) -> None:
        """Write values as a line of metrics.jsonl and to TensorBoard."""
        append_record(self.out, phase=self.phase, step=step, **values)
        if self.board:
            for name, value in _flatten(values):
                self.board.add_scalar(name, value, step)

    def warn_once(self, message: str) -> None:
        """Print the phase's first warning; later ones would repeat it."""
        if not self.warned:
            self.warned = True
            print_rank0(f"warning: {self.phase}: {message}")

    @contextlib.contextmanager
    def paused(self):
        """Leave an evaluation between two steps out of the speed. In it a signal ends the process at
        once, so the step must have been saved."""
        started = time.time()
        signals.act_at_once()
        yield
        signals.defer()
        self.paused_seconds += time.time() - started

    def end_training(self) -> None:
        """End the progress bar after the last step, which is saved: from here on a signal ends the
        process at once."""
        if self.bar is not None:
            self.bar.close()
        signals.act_at_once()

    def close(self) -> None:
        """Flush TensorBoard's curves."""
        if self.board:
            self.board.close()


def expected_seconds(cfg: Config, phase: str, steps: int, seconds: float) -> tuple[float, float]:
    """Return the time of the remaining steps of a phase, and that of the phases after it."""
    guided = seconds if phase in ("burnin", "distill") else GUIDED_STEP_COST * seconds
    later = {"teacher": cfg.steps[1] + cfg.steps[2], "burnin": cfg.steps[2]}.get(phase, 0) * guided
    if phase in ("teacher", "burnin", "distill"):
        later += cfg.finetune_steps * guided / GUIDED_STEP_COST
    return steps * seconds, later


def format_values(values: dict) -> str:
    """Format the means of a log line: "loss_ce", "loss_mask" as "loss ce 1.88 mask 1.66"."""
    text, previous = "", ""
    for name, value in values.items():
        group, part = name.rsplit("_", 1)
        # The losses on unlabeled images go without the word "loss", so that a line has at most 140 columns.
        name = name.replace("unlabeled_loss", "unlabeled").replace("_", " ")
        text += f" {part} " if group == previous else f"  {name} "
        text += "-" if value is None else format_number(value)
        previous = group
    return text.strip()


def format_number(value: float) -> str:
    """Format a number with two decimals below 10, one below 100, none above: 1.88, 18.8, 1880."""
    return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def append_record(out, **values) -> None:
    """Append a line to out/metrics.jsonl."""
    if rank() == 0:
        with expected_errors(OSError), open(Path(out) / "metrics.jsonl", "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a process was killed while it wrote
                    file.write(b"\n")
            file.write(json.dumps(values).encode() + b"\n")


def print_banner(out, title: str, env: Env, **lines) -> None:
    """Print the settings of a run, one named line each, and append them to metrics.jsonl."""
    on_gpu, threads = env.device.type == "cuda", torch.get_num_threads()
    name = (
        torch.cuda.get_device_name(env.device)
        if on_gpu
        else f"{env.device}, {threads} thread{'s' * (threads > 1)}"
    )
    lines |= {
        "device": f"{world_size()} x {name}, {'bf16' if env.bf16 else 'fp32'}",
        "versions": f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}",
    }
    print_rank0(title)
    for name, text in lines.items():
        text = text.replace(" ", "\xa0").replace(",\xa0", ", ")  # break lines after a comma only
        indents = dict(initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)
        text = textwrap.fill(text, 100, break_on_hyphens=False, **indents)
        print_rank0(text.replace("\xa0", " "))
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    started = time.strftime("%Y-%m-%d %H:%M")
    append_record(out, banner={"command": command, "started": started, **lines})


def tensorboard_writer():
    """Return TensorBoard's SummaryWriter. Raises ValueError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs: pip install tensorboard") from None
    return SummaryWriter


def _flatten(values: dict, prefix=""):
    """Yield (name, number) for all numbers in nested dictionaries."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        elif value is not None:
            yield prefix + name, value


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d{hours % 24:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
