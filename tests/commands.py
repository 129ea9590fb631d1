"""Run the scripts as a user runs them, and compare what they write."""

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
    """Run a script such as "distill.py", or a module such as "tools.predict".

    Args:
        processes: 0 runs it in this process, which is fast because everything is imported; 1 runs it as a
            command, and more run it under torchrun.
        code: the expected exit code.

    Returns an object with "stdout" and "stderr". Raises AssertionError for another exit code."""
    flags = [str(flag) for flag in flags]
    if processes == 0:
        done = _here(str(script), flags, cwd)
    else:
        program = [str(ROOT / script)] if str(script).endswith(".py") else ["-m", script]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else ()), *program, *flags]
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
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__", alter_sys=False)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        os.chdir(before)
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue(), returncode=code)


def same(a, b):
    """Return whether two nested structures of tensors and plain values are bit-equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
