"""Checkpoints that are written completely or not at all, and resuming from them.

While a phase runs, out/<phase>.step-<step>.pt hold everything needed to resume it. When it is done,
out/<phase>.pt holds its result, and the others are removed. Their entries:

    file            "model"             "teacher"
    teacher.pt      the teacher         None
    burnin.pt       the student         the frozen teacher
    distill.pt      the student         the EMA teacher
    finetune.pt     the student         None
    supervised.pt   the baseline        None"""

import contextlib
import dataclasses
import errno
import fcntl
import inspect
import os
import shutil
import socket
from pathlib import Path

import torch

from interop.legacy import current_options, upgrade_checkpoint
from interop.load import check_archive, load_any_checkpoint
from model import Mask2Former
from training import signals
from training.cli import expected_errors
from training.config import Config, write_settings
from training.distributed import (
    Env,
    any_rank,
    assert_same_on_all_ranks,
    barrier,
    print_rank0,
    rank,
    warn_once,
    world_size,
)

FORMAT = 2
REQUIRED_KEYS = (
    "format",
    "phase",
    "step",
    "world_size",
    "config",
    "model_args",
    "model",
    "teacher",
    "optimizer",
)
PHASES = ("teacher", "burnin", "distill", "finetune", "supervised")
KEEP = 2  # checkpoints of a running phase: the newest may be damaged
# Options that may change when a run is resumed. The supervised baseline shares the folder of a run, and
# --scale-to-batch shows in lr, steps and ema_decay.
MAY_CHANGE_ON_RESUME = {"out", "preset", "workers", "device", "supervised_only"}
MAY_CHANGE_ON_RESUME |= {
    "hours",
    "grad_accum_steps",
    "compile",
    "log_every",
    "save_every",
    "eval_every",
    "tensorboard",
}


# Options that a phase does not use, so that they may change after it.
GUIDED = {"unlabeled", "score_threshold", "min_area", "unsupervised_weight", "strong_view", "blur"}
GUIDED |= {"repeat_threshold", "mask_nms_iou", "full_res_masks", "student_from_teacher", "teacher_checkpoint"}
UNUSED = {"finetune": MAY_CHANGE_ON_RESUME}
UNUSED["distill"] = UNUSED["finetune"] | {"finetune_steps"}
UNUSED["burnin"] = UNUSED["distill"] | {"ema_decay", "student_checkpoint"}
UNUSED["teacher"] = UNUSED["supervised"] = UNUSED["burnin"] | GUIDED


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint completely or not at all, even if the machine fails: write a temporary file,
    flush it to the disk, rename it, and flush the new name. Raises OSError if the disk is full."""
    temporary = path.with_name(path.name.split(".")[0] + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = f"{shutil.disk_usage(path.parent).free:,} bytes are free there; {error}"
        raise OSError(f"cannot write {path}, earlier checkpoints are intact: {reason}") from None


def load_checkpoint(path) -> dict:
    """Load a checkpoint of this project onto the CPU. Nothing in the file is executed.

    Returns a dictionary with all of REQUIRED_KEYS; one of the former format is converted. Raises
    ValueError for a file that is damaged or not ours, OSError for one that cannot be read."""
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint {str(path)!r}") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE):
            raise OSError(f"cannot read {path}: {error.strerror}") from None
        raise ValueError(f"{path} is not a checkpoint, or is damaged: {type(error).__name__}") from None
    if isinstance(checkpoint, dict) and checkpoint.get("format") == 1:
        checkpoint = upgrade_checkpoint(checkpoint)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this project, format {FORMAT}")
    missing = [name for name in REQUIRED_KEYS if name not in checkpoint]
    if missing:
        raise ValueError(f"{path} is incomplete: it has no {missing[0]!r}")
    return {**checkpoint, "config": current_options(checkpoint["config"])}


def load_model(checkpoint: dict, device, which: str = "model") -> Mask2Former:
    """Build the "model" or the "teacher" of a checkpoint on a device, frozen and in evaluation mode."""
    # In guided burn-in the teacher may have another architecture than the student.
    teacher_args = which == "teacher" and checkpoint.get("teacher_args")
    model = Mask2Former(**(teacher_args or checkpoint["model_args"]))
    model.load_state_dict(checkpoint[which])
    return model.to(device).eval().requires_grad_(False)


def check_classes(checkpoint: dict, class_names: list[str]) -> None:
    """Raises ValueError unless a checkpoint has the classes of the data, or as many if it has no names."""
    names, number = checkpoint.get("class_names"), checkpoint["model_args"]["num_classes"]
    if names and names != class_names:
        raise ValueError(f"the checkpoint has the classes {names}, the data has {class_names}")
    if number != len(class_names):
        raise ValueError(f"the checkpoint has {number} classes, the data has {len(class_names)}")


def load_teacher_checkpoint(cfg: Config, class_names: list[str]) -> dict:
    """Load the teacher of phase 2: that of --teacher-checkpoint, which may be a file of other code, or of
    phase 1."""
    path = cfg.teacher_checkpoint
    checkpoint = load_any_checkpoint(path) if path else load_checkpoint(Path(cfg.out) / "teacher.pt")
    check_classes(checkpoint, class_names)
    return checkpoint


def with_defaults(model_args: dict) -> dict:
    """Return arguments of Mask2Former together with the defaults of those that are not given."""
    parameters = inspect.signature(Mask2Former).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | model_args


def load_student_checkpoint(cfg: Config, class_names: list[str], model_args: dict) -> dict:
    """Load the burnt-in student of phase 3. Raises ValueError if it differs from the configured model."""
    path = cfg.student_checkpoint or Path(cfg.out) / "burnin.pt"
    checkpoint = load_checkpoint(path)
    check_classes(checkpoint, class_names)
    check_same_model(path, checkpoint["model_args"], model_args)
    return checkpoint


def check_same_model(path, stored_args: dict, model_args: dict) -> None:
    """Raises ValueError if the model of a checkpoint is not that of the run."""
    stored_args, model_args = with_defaults(stored_args), with_defaults(model_args)
    for name in sorted(stored_args.keys() | model_args.keys()):
        value, stored = model_args.get(name), stored_args.get(name)
        if value != stored:
            raise ValueError(f"{path} has {name} {stored!r}, this run has {value!r}")


class Checkpointer:
    """Save and resume one phase.

    Everything random is a function of seed and step, so weights, optimizer and step are the whole state.

    Args:
        phase: its name, one of PHASES. steps: its length.
        model, teacher: raw modules; teacher may be None.
        description: plain values that are written into every checkpoint, "model_args" at least."""

    def __init__(self, cfg: Config, phase: str, steps: int, model, optimizer, teacher=None, description=None):
        self.cfg, self.phase, self.steps, self.out = cfg, phase, steps, Path(cfg.out)
        self.model, self.optimizer, self.teacher = model, optimizer, teacher
        self.description = description or {}
        self.last_saved = None

    def resume(self, env: Env) -> int:
        """Load the newest intact checkpoint of the phase, if there is one, and return the step to start
        at. From here on a stop signal waits for the end of the step."""
        path, checkpoint = latest_checkpoint(self.out, self.phase)
        step = checkpoint["step"] if checkpoint else 0
        assert_same_on_all_ranks(step, "checkpoints of step", env)
        if checkpoint:
            self.model.load_state_dict(checkpoint["model"])
            if self.teacher is not None:
                self.teacher.load_state_dict(checkpoint["teacher"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.last_saved = step
            print_rank0(f"{self.phase}: resumed at step {step} of {self.steps} from {path}")
            if checkpoint["world_size"] != world_size():
                change = f"{checkpoint['world_size']} processes before, {world_size()} now"
                warn_once(f"{change}: each step has the same images, but other random points and rounding")
        signals.defer()
        return step

    def save_if_due(self, step: int) -> None:
        """Save every `save_every` steps, before an evaluation, at the end of the phase, and when any rank has
        received a stop signal, after which the program exits."""
        stop = any_rank(signals.stop_requested())
        every = [number for number in (self.cfg.save_every, self.cfg.eval_every) if number]
        if stop or step == self.steps or any(step % number == 0 for number in every):
            self.save_step(step)
        if stop:
            print_rank0(f"{self.phase}: saved at step {step}; the same command resumes from here")
            signals.exit_after_save()

    def save_step(self, step: int) -> None:
        """Write a checkpoint to resume from, and remove all but the last KEEP."""
        if self.last_saved != step:
            self.save(self.out / f"{self.phase}.step-{step:07}.pt", step)
            if rank() == 0:
                for old in step_files(self.out, self.phase)[KEEP:]:
                    old.unlink()
            barrier()  # no rank may exit while rank 0 writes
            self.last_saved = step

    def save(self, path: Path, step: int, **results) -> None:
        if rank() == 0:
            checkpoint = {
                "phase": self.phase,
                "step": step,
                "world_size": world_size(),
                "config": dataclasses.asdict(self.cfg),
                "model": self.model.state_dict(),
                "teacher": self.teacher.state_dict() if self.teacher is not None else None,
                "optimizer": self.optimizer.state_dict(),
                **self.description,
                **results,
            }
            with expected_errors(OSError):
                save_checkpoint(path, checkpoint)

    def finish(self, **results) -> None:
        """Write the phase's final checkpoint with its results, and remove those to resume from."""
        self.save(self.out / f"{self.phase}.pt", self.steps, **results)
        if rank() == 0:
            for old in step_files(self.out, self.phase):
                old.unlink()
        barrier()
        print_rank0(f"{self.phase} done -> {self.out / (self.phase + '.pt')}")


def step_files(out, phase: str) -> list[Path]:
    """Return the checkpoints to resume a phase from, newest first."""
    return sorted(Path(out).glob(f"{phase}.step-*.pt"), reverse=True)


def latest_checkpoint(out, phase: str) -> tuple:
    """Return path and content of the newest intact checkpoint of a running phase, (None, None) without any.
    Raises ValueError if all are damaged."""
    files = step_files(out, phase)
    for path in files:
        try:
            return path, load_checkpoint(path)
        except ValueError as error:
            warn_once(f"{error}; trying the one before it")
    if files:
        raise ValueError(
            f"all checkpoints {out}/{phase}.step-*.pt are damaged; remove them to restart the phase"
        )
    return None, None


def has_checkpoints(out) -> bool:
    """Return whether a phase of a run has begun or is completed."""
    return any((Path(out) / f"{phase}.pt").exists() or step_files(out, phase) for phase in PHASES)


def completed_phases(cfg: Config, env: Env, hashes: dict) -> set[str]:
    """Return the phases whose final checkpoint exists and was made with the options of this run.

    hashes: "split" and "labels", which identify the labeled images and their objects. If options have changed
    that only later phases use, these phases are run again: their results are renamed to
    <phase>.previous.pt. Options that are accepted are written to settings.json. Raises ValueError if options
    of the first phase have changed, or if a phase that is running was started with others."""
    phases = ["supervised"] if cfg.supervised_only else [p for p in PHASES if p != "supervised"]
    phases = [phase for phase in phases if phase != "finetune" or cfg.finetune_steps]
    completed, outdated, why = [], [], ""
    for phase in phases:
        path, final = Path(cfg.out) / f"{phase}.pt", None
        if path.exists():
            try:
                final = load_checkpoint(path)
            except ValueError as error:
                raise ValueError(f"{error}; remove it to run its phase again") from None
            change = changed_option(cfg, final, hashes, phase)
            if change and not completed:
                raise ValueError(f"{path} {change}; choose another --out")
            why = why or change
            (outdated if why else completed).append(phase)
        running, checkpoint = latest_checkpoint(cfg.out, phase)
        if checkpoint and not final:
            change = changed_option(cfg, checkpoint, hashes, phase)
            if change or why:
                raise ValueError(f"{running} {change or why}; choose another --out")
    assert_same_on_all_ranks(len(completed), "numbers of completed phases", env)
    barrier()  # every rank has read the checkpoints
    if outdated:
        files = ", ".join(f"{phase}.pt" for phase in outdated)
        print_rank0(f"{files} in {cfg.out} {why}: {', '.join(completed)} kept, the others are run again")
        print_rank0(f"the former results stay as {files.replace('.pt', '.previous.pt')}")
        for phase in outdated if rank() == 0 else ():
            os.replace(Path(cfg.out) / f"{phase}.pt", Path(cfg.out) / f"{phase}.previous.pt")
    files = [Path(cfg.out) / f"{phase}.pt" for phase in ("teacher", "burnin", "distill")]
    # The supervised baseline in the folder of a run leaves that run's settings.
    if rank() == 0 and not (cfg.supervised_only and any(file.exists() for file in files)):
        write_settings(cfg)
    return set(completed)


def changed_option(cfg: Config, checkpoint: dict, hashes: dict, phase: str) -> str:
    """Say which option that a phase uses has changed since its checkpoint, "" if none has."""
    before = checkpoint["config"] | {name: checkpoint[name] for name in hashes if name in checkpoint}
    now = dataclasses.asdict(cfg)
    # The labeled images and their objects count, not how they are found.
    del now["labeled_list"], now["unannotated"], now["data_args"]
    now |= hashes  # last, because the other options explain more
    for options in (before, now):
        options["model_args"] = with_defaults(options["model_args"])
        t, b, d = options["steps"]
        # Guided burn-in has the first part of a schedule that it shares with phase 3.
        burn_in = b if checkpoint["step"] == b else (b, d)
        options["steps"] = {"teacher": t, "burnin": burn_in, "distill": d, "supervised": t + b + d}.get(phase)
    for name in now:
        if name in before.keys() - UNUSED[phase] and before[name] != now[name]:
            if name == "labels":
                return f"was made before the labels changed (hash {before[name]}, now {now[name]})"
            return f"was made with other options ({name} {before[name]!r}, now {now[name]!r})"
    return ""


_locks = {}  # open files by folder


def lock(folder: Path) -> None:
    """Reserve a folder for this process as long as it lives; the system releases it however the process ends.
    Raises ValueError if another process has it, or if it cannot be written."""
    if folder in _locks:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"cannot write to {str(folder)!r}: {error.strerror}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # some file systems have no locks: go without
            file.seek(0)
            raise ValueError(f"{str(folder)!r} is in use by {file.read()!r}; choose another folder") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _locks[folder] = file
