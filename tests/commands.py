"""The commands as a user gives them, and whether what they leave is the same."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent


def run(script, *flags, processes=0, code=0, cwd=ROOT):
    """Runs a script and returns what it printed, "stdout" and "stderr". AssertionError for another exit code.

    With processes=0 it runs in this process, which has imported everything, from its file and as the main
    program; with 1 as a command of its own, with more by torchrun."""
    script, flags = str(ROOT / script), [str(flag) for flag in flags]
    if processes == 0:
        done = _here(script, flags, cwd)
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else ()), script, *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def _here(script, flags, cwd):
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = os.getcwd()
    os.chdir(cwd)
    try:
        arguments = mock.patch.object(sys, "argv", [script, *flags])
        with arguments, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code or 0
    finally:
        os.chdir(before)
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue(), returncode=code)


def same(a, b):
    """Bit-equal, however nested."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
