"""Checkpoints that are written whole or not at all, and are read only when they are. Imports nothing of ours.

Of a phase that is under way, out/<phase>.step-<step>.pt hold all that is needed to go on; of one that is
through, out/<phase>.pt has what came of it."""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import zipfile
from pathlib import Path

import torch

FORMAT = 1
ENTRIES = ("format", "phase", "step", "world_size", "config", "model_args", "student", "teacher", "optimizer")


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Whole or not at all, also if the machine fails: written to a temporary file, flushed to the disk,
    renamed, and the name flushed too. Raises OSError if the disk has no room."""
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
    except (OSError, RuntimeError) as error:  # the latter is how torch says that the disk is full
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = f"{shutil.disk_usage(path.parent).free:,} bytes are free there; {error}"
        raise OSError(f"{path} cannot be written, what was saved before is untouched: {reason}") from None


def load_checkpoint(path) -> dict:
    """A checkpoint on the CPU, with all of ENTRIES; plain types only, nothing in it is executed. Raises
    ValueError for a file that is damaged or not one of ours, OSError for one that cannot be read."""
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint {str(path)!r}") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE):
            raise OSError(f"{path} cannot be read: {error.strerror}") from None
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


def step_files(out, phase: str) -> list[Path]:
    """Newest first."""
    return sorted(Path(out).glob(f"{phase}.step-*.pt"), reverse=True)


def newest(out, phase: str, warn=print) -> tuple:
    """Path and content of the newest checkpoint of a phase that is whole, (None, None) if it has none. Raises
    ValueError if it has some and all are damaged. warn: is called with what is said of a damaged one."""
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
        raise ValueError(f"nothing can be written into {str(folder)!r}: {error.strerror}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # not for a file system that knows no locks
            file.seek(0)
            raise ValueError(f"{str(folder)!r} is in use by {file.read()!r}; choose another folder") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    locks[folder] = file
