"""Of benchmarks/: the operations of a training step, which a GPU has to launch, do not become more, and the
script for a GPU runs."""

import importlib
import json
import re

import pytest
from commands import ROOT, run

MEASURED = 4327  # R50, 100 queries, 2 + 2 images, with torch 2.15


def test_a_guided_step_needs_no_more_launches_than_measured():
    printed = run("benchmarks/launches.py", processes=1).stdout
    numbers = {name: int(n) for name, n in re.findall(r"^(.*\S) +(\d+)$", printed, re.MULTILINE)}
    assert numbers["student backward, decoder"] > 500 and numbers["matching"] > 100, "each part is counted"
    assert numbers.pop("on the host, not counted") > 100
    total = numbers.pop("all")
    assert total == sum(numbers.values()) <= 1.03 * MEASURED


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


def test_a_part_of_the_gpu_script_ends_within_its_limit_and_stops_no_other(gpu):
    command = ["A=1", "B=2", "-c", "import os; print(os.environ['A']); print(os.environ['B'])"]
    assert gpu.run_part("a", 60, command)["output"] == ["1", "2"]
    failed = gpu.run_part("b", 60, ["-c", "print('so far'); 1 / 0"])
    assert "so far" in failed["error"] and "ZeroDivisionError" in failed["error"]
    child = "import subprocess; print('so far'); subprocess.run(['sleep', '60'])"  # holds the pipe too
    slow = gpu.run_part("c", 2, ["-uc", child])
    assert slow["error"] == "stopped after 2 s: so far\n" and slow["seconds"] < 30


def test_the_gpu_script_takes_less_than_nine_minutes_and_its_commands_exist(gpu):
    assert gpu.CHECK_SECONDS + sum(limit for limit, _, _ in gpu.TIMES.values()) < 9 * 60
    for command in (*gpu.CHECKS.values(), *(command for _, command, _ in gpu.TIMES.values())):
        files = [word for word in command.split() if word.endswith(".py")]
        assert files and all((ROOT / file).exists() for file in files)
    printed = json.loads(run("benchmarks/gpu.py", "--part", "inference", "--dry-run", processes=1).stdout)
    assert printed["milliseconds"] > printed["model"] > 0
