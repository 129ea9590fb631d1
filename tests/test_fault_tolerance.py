"""Tests with injected faults: killed processes, full disks, damaged and hostile files. Each test
asserts that its fault happened, and that a resumed run ends exactly like an uninterrupted one.

`make test-faults` runs all of them. `make test` leaves out those marked slow, which have a shorter
version."""

import builtins
import fcntl
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from commands import ROOT, same
from faults import TINY, Job
from PIL import Image

import burnin
import training.checkpoint
from data import Augmentation, AugmentedDataset, SerializedList, endless_batches
from interop.load import load_any_checkpoint
from layouts import load_data
from layouts.shapes import write_shapes
from layouts.validate import load_coco
from matcher import SetCriterion
from training.checkpoint import REQUIRED_KEYS, Checkpointer, load_checkpoint, save_checkpoint, step_files
from training.config import Config
from training.distributed import init_distributed
from training.metrics import Metrics
from training.optimization import build_optimizer

slow = pytest.mark.slow
PHASES = "teacher", "burnin", "distill"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    write_shapes(folder, num_train=12, num_val=7, size=64)
    return folder


@pytest.fixture(scope="module")
def train_only(data, tmp_path_factory):
    """The same dataset without a validation set, for tests that need no evaluation."""
    folder = tmp_path_factory.mktemp("data") / "train_only"
    folder.mkdir()
    (folder / "images").symlink_to(data / "images")
    shutil.copy(data / "instances_train.json", folder)
    return folder


def train(data, out, *flags, steps=4, **kwargs):
    return Job(out, "--data", data, *TINY, "--out", out, "--steps", steps, "--workers", 0, *flags, **kwargs)


@pytest.fixture(scope="module")
def uninterrupted(train_only, tmp_path_factory):
    """uninterrupted(processes) returns the folder of an uninterrupted run."""
    folders = {}

    def run(processes):
        if processes not in folders:
            folders[processes] = tmp_path_factory.mktemp("uninterrupted") / str(processes)
            job = train(train_only, folders[processes], processes=processes)
            assert job.wait() == [0] * processes, job.text()
        return folders[processes]

    return run


def differences(one, other, phases=PHASES) -> list[str]:
    """Return what is not bit-equal in the checkpoints of two runs, or in their logged losses."""
    found = []
    for phase in phases:
        a, b = (load_checkpoint(out / f"{phase}.pt") for out in (one, other))
        names = ("model", "teacher", "optimizer", "step", "split")
        found += [f"{phase} {name}" for name in names if not same(a[name], b[name])]
    losses = [
        {
            (r["phase"], r["step"]): {k: v for k, v in r.items() if "loss" in k or "pseudo" in k}
            for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            if r.get("phase") in phases and "loss" in r
        }
        for out in (one, other)
    ]
    return found + ["losses"] * (losses[0] != losses[1])


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 2), (2, 0), (2, 1), (3, 0)])
@pytest.mark.parametrize("cuts", ["some", pytest.param("all", marks=slow)])
def test_a_run_stopped_many_times_ends_bit_equal(
    train_only, uninterrupted, tmp_path, tally, processes, workers, cuts
):
    """A signal to the last rank stops the run in every phase, and in several epochs of both streams."""
    places = [(phase, step) for phase in PHASES for step in range(4)]
    places = places if cuts == "all" else [places[number] for number in (2, 4, 9)]
    for phase, step in places:
        fault = ("at_step", processes - 1, phase, step, "SIGTERM")
        job = train(train_only, tmp_path, "--workers", workers, processes=processes, fault=fault)
        assert job.wait() == [143] * processes, job.text()
        assert "fault: SIGTERM" in job.text(processes - 1)
        assert f"saved at step {step + 1}; the same command resumes from here" in job.text(0)
    job = train(train_only, tmp_path, "--workers", workers, processes=processes)
    assert job.wait() == [0] * processes and "resumed at step" in job.text(0)
    assert differences(uninterrupted(processes), tmp_path) == []
    row = f"stops resumed bit-exact, {processes} processes, {workers} workers"
    tally(row, len(places), len(places))


@slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_compiled_run_that_is_stopped_ends_bit_equal(train_only, tmp_path, tally, processes):
    flags = "--compile", "true", "--grad-accum-steps", processes
    job = train(train_only, tmp_path / "once", *flags, processes=processes)
    assert job.wait(500) == [0] * processes, job.text()
    for phase in PHASES:
        fault = ("at_step", processes - 1, phase, 1, "SIGTERM")
        job = train(train_only, tmp_path / "cut", *flags, processes=processes, fault=fault)
        assert job.wait(500) == [143] * processes and "saved at step 2" in job.text(), job.text()
    job = train(train_only, tmp_path / "cut", *flags, processes=processes)
    assert job.wait(500) == [0] * processes and "resumed at step" in job.text(), job.text()
    assert differences(tmp_path / "once", tmp_path / "cut") == []
    row = f"stops of a compiled run resumed bit-exact, {processes} process{'es' * (processes > 1)}"
    tally(row, 3, 3)


def test_fine_tuning_can_be_added_to_a_completed_run_and_resumed(train_only, uninterrupted, tmp_path):
    before = load_checkpoint(uninterrupted(1) / "distill.pt")
    for out in ("once", "cut"):
        shutil.copytree(uninterrupted(1), tmp_path / out)
    flags = "--finetune-steps", 3
    job = train(train_only, tmp_path / "once", *flags)
    assert job.wait() == [0] and "fine-tuning: labels only" in job.text(), job.text()
    assert "phase 3" not in job.text()
    job = train(train_only, tmp_path / "cut", *flags, fault=("at_step", 0, "finetune", 1, "SIGTERM"))
    assert job.wait() == [143] and "saved at step 2" in job.text(), job.text()
    job = train(train_only, tmp_path / "cut", *flags)
    assert job.wait() == [0] and "resumed at step 2" in job.text(), job.text()
    assert differences(tmp_path / "once", tmp_path / "cut", ["finetune"]) == []

    after = load_checkpoint(tmp_path / "cut/finetune.pt")
    assert after["teacher"] is None and not same(after["model"], before["model"])
    rates = [[g["initial_lr"] for g in phase["optimizer"]["param_groups"]] for phase in (before, after)]
    assert [0.1 * rate for rate in rates[0]] == pytest.approx(rates[1])
    steps = {state["step"].item() for state in after["optimizer"]["state"].values()}
    assert steps == {3}, "the optimizer is a fresh one"
    job = train(train_only, tmp_path / "cut", "--finetune-steps", 4)
    assert job.wait() == [0] and "teacher, burnin, distill kept" in job.text(), job.text()
    assert same(load_checkpoint(tmp_path / "cut/finetune.previous.pt"), after)
    job = train(train_only, tmp_path / "cut")
    assert job.wait() == [0] and "all phases are done" in job.text(), job.text()


def test_every_entry_of_a_checkpoint_is_needed(train_only, uninterrupted, tmp_path, tally):
    """An entry that is reset to its value at the start of the phase changes the result."""
    job = train(train_only, tmp_path / "cut", fault=("at_step", 0, "distill", 1, "SIGTERM"))
    assert job.wait() == [143], job.text()
    [file, *_] = step_files(tmp_path / "cut", "distill")
    assert file.name == "distill.step-0000002.pt"
    before = load_checkpoint(tmp_path / "cut/burnin.pt")
    reset = {
        "model": before["model"],
        "teacher": before["model"],
        "optimizer": before["optimizer"],
        "step": 0,
    }
    faults = {"streams": ("streams_from_the_start",)}
    wrong = 0
    for entry in [None, *reset, *faults]:
        out = tmp_path / str(entry)
        shutil.copytree(tmp_path / "cut", out)
        if entry in reset:
            save_checkpoint(out / file.name, load_checkpoint(file) | {entry: reset[entry]})
        job = train(train_only, out, fault=faults.get(entry, ()))
        assert job.wait() == [0] and "resumed at step" in job.text(), job.text()
        found = differences(uninterrupted(1), out, ["distill"])
        assert bool(found) == (entry is not None), (entry, found)
        wrong += bool(found)
    tally("negative controls: without an entry the result differs", wrong, len(reset) + len(faults))


@pytest.mark.parametrize("entry", REQUIRED_KEYS)
def test_a_checkpoint_without_an_entry_is_refused(uninterrupted, tmp_path, entry):
    checkpoint = load_checkpoint(uninterrupted(1) / "distill.pt")
    del checkpoint[entry]
    torch.save(checkpoint, tmp_path / "a.pt")
    message = "not a checkpoint of this project" if entry == "format" else f"incomplete: it has no '{entry}'"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "a.pt")


def test_another_number_of_processes_resumes_with_the_same_images(train_only, uninterrupted, tmp_path):
    """The number goes from 2 to 1 to 2. A warning says so, and the result is close but not bit-equal."""
    for processes, phase in ((2, "teacher"), (1, "burnin")):
        job = train(train_only, tmp_path, processes=processes, fault=("at_step", 0, phase, 1, "SIGTERM"))
        assert job.wait() == [143] * processes, job.text()
    assert "warning: 2 processes before, 1 now: each step has the same images, but other" in job.text()
    job = train(train_only, tmp_path, processes=2)
    assert job.wait() == [0, 0]
    assert "warning: 1 processes before, 2 now" in job.text(0)
    end, other = (load_checkpoint(out / "teacher.pt") for out in (uninterrupted(2), tmp_path))
    assert not same(end["model"], other["model"])
    for name, value in end["model"].items():
        torch.testing.assert_close(other["model"][name], value, rtol=0, atol=0.01)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=slow)])
def test_a_run_of_two_processes_killed_at_random_ends_bit_equal(
    train_only, uninterrupted, tmp_path, tally, kills
):
    """SIGKILL ends one of the processes or both. The other one ends by itself."""
    rng, killed, runs, slowest = random.Random(kills), 0, 0, 0.0
    while killed < kills:
        out = tmp_path / str(runs)
        while True:
            job = train(train_only, out, "--save-every", 1, processes=2)
            if killed < kills:
                job.wait_for(rng.choice(["12 training images", "/4  loss "]))  # before or within training
                time.sleep(rng.uniform(0, 1.2))
                victims = rng.choice([[0], [1], [0, 1]])
                for victim in victims:
                    job.processes[victim].kill()
            started = time.time()
            codes = job.wait()
            if codes == [0, 0]:
                break
            slowest = max(slowest, time.time() - started)
            assert -signal.SIGKILL in codes, job.text()
            killed += 1
        assert differences(uninterrupted(2), out) == []
        runs += 1
    tally("random kills of two processes, resumed bit-exact", killed, kills, f"in {runs} runs")
    tally("processes that ended after another was killed", killed, kills, f"the last after {slowest:.1f} s")


# --------------------------------------------------------------------------------- atomic and damaged files


class Disk:
    """Count the operations on files, and end the process at operation number `last`.

    The end is like that of SIGKILL, or of a power cut, after which all that was not flushed is lost."""

    def __init__(self, last, power_cut):
        self.last, self.power_cut, self.count, self.names = last, power_cut, 0, []
        self.dirty, self.renamed = set(), []
        self.real = os.fsync, os.replace, os.unlink
        os.fsync, os.replace, os.unlink = self.fsync, self.replace, self.unlink
        training.checkpoint.open = self.open

    def tick(self, name):
        self.names.append(name)
        self.count += 1
        if self.count == self.last:
            if self.power_cut:
                for new, old in reversed(self.renamed):  # names that were not flushed
                    self.real[1](new, old)
                for file in self.dirty:
                    if os.path.exists(file):
                        os.truncate(file, os.path.getsize(file) // 2)
            os._exit(9)

    def open(self, path, mode="r", **kwargs):
        file = builtins.open(path, mode, **kwargs)  # noqa: SIM115
        if "w" not in mode:
            return file
        self.dirty.add(str(path))
        write, disk = file.write, self

        class Counting:
            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, content):
                done = write(content)
                disk.tick("write")
                return done

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

        return Counting()

    def fsync(self, file):
        self.real[0](file)
        name = os.readlink(f"/proc/self/fd/{file}")
        if os.path.isdir(name):
            self.renamed = []
        self.dirty.discard(name)
        self.tick("flush-folder" if os.path.isdir(name) else "flush-file")

    def replace(self, old, new):
        self.dirty = {str(new) if file == str(old) else file for file in self.dirty}
        self.real[1](old, new)
        self.renamed.append((new, old))
        self.tick("rename")

    def unlink(self, path, **_):
        self.real[2](path)
        self.tick("remove")


def save(out, steps, final=False):
    """Save a small model at some of the three steps of phase 1, and then, if `final`, end the phase."""
    cfg, model = Config(out=str(out)), torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, cfg)
    checkpoints = Checkpointer(cfg, "teacher", 3, model, optimizer, description={"model_args": {}})
    for step in steps:
        checkpoints.save_step(step)
    if final:
        burnin.evaluate_phase = lambda *_: {"ap": {"AP": 1.0}}
        metrics = Metrics(cfg, "teacher", 3, 0, optimizer, init_distributed("cpu"))
        burnin.finish_phase(metrics, checkpoints, cfg, None, model, None)


def in_a_fork(function, seconds=20) -> int:
    """Call a function in a forked process. Returns 0, 1 after an exception, or a negative number if the
    process was killed or took too long."""
    child = os.fork()
    if not child:
        code = 1
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        try:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("power_cut", [False, True])
def test_a_save_that_is_cut_anywhere_leaves_a_checkpoint_that_loads(tmp_path, tally, power_cut):
    """The results are in metrics.jsonl before the final checkpoint is there: no later run would add
    them."""
    points, code = 0, 9
    while code == 9:
        out = tmp_path / str(points)
        out.mkdir()
        save(out, [1, 2])

        def cut(out=out, last=points + 1):
            disk = Disk(last, power_cut)
            save(out, [3], final=True)
            (out / "operations").write_text(" ".join(disk.names))

        code = in_a_fork(cut)
        files = [*out.glob("teacher.pt"), *out.glob("teacher.step-*.pt")]
        assert files and all(load_checkpoint(file) for file in files), files
        if (out / "teacher.pt").exists():
            assert '"AP": 1.0' in (out / "metrics.jsonl").read_text()
        points += code == 9
    assert code == 0 and [file.name for file in files] == ["teacher.pt"], "only the final one is left"
    names = (out / "operations").read_text().split()
    order = [name for before, name in zip(["", *names], names) if name != before]
    one = ["write", "flush-file", "rename", "flush-folder"]
    assert order == [*one, "remove", *one, "remove"] and points == len(names) > 50
    kind = "power cuts" if power_cut else "kills"
    tally(f"{kind} within a save after which a checkpoint loads", points, points)


def damaged(content: bytes, rng) -> bytes:
    """Cut the content, change a byte, or remove, zero, randomize or double a part."""
    place, length = rng.randrange(len(content)), rng.randrange(1, 2000)
    before, part, after = content[:place], content[place : place + length], content[place + length :]
    return rng.choice(
        [
            before,
            before + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :],
            before + after,
            before + bytes(len(part)) + after,
            before + rng.randbytes(len(part)) + after,
            before + part + part + after,
        ]
    )


def test_a_thousand_damaged_checkpoints_are_detected(tmp_path, tally):
    """Torch alone does not verify checksums. A changed byte that no reader uses may pass."""
    save(tmp_path, [1])
    [file] = step_files(tmp_path, "teacher")
    content, sound = file.read_bytes(), load_checkpoint(file)
    rng, refused, harmless, tried = random.Random(0), 0, 0, 0
    while tried < 1000:
        file.write_bytes(damaged(content, rng))
        if file.read_bytes() == content:
            continue
        tried += 1
        try:
            harmless += same(load_checkpoint(file), sound)
        except ValueError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            refused += 1
            with pytest.raises(ValueError, match="teacher.step"):
                load_any_checkpoint(file)
    assert refused > 900
    remark = f"{harmless} of them without a difference"
    tally("damaged checkpoints detected", refused + harmless, tried, remark)


def test_a_damaged_checkpoint_is_replaced_by_the_one_before_it(train_only, uninterrupted, tmp_path):
    job = train(train_only, tmp_path, fault=("at_step", 0, "burnin", 3, "SIGKILL"))
    assert job.wait() == [-9] and "fault" in job.text()
    shutil.copy(tmp_path / "burnin.step-0000002.pt", tmp_path / "burnin.step-0000003.pt")
    os.truncate(tmp_path / "burnin.step-0000003.pt", 5000)
    job = train(train_only, tmp_path)
    assert job.wait() == [0]
    assert job.text().count("is damaged") == 1, "the warning is printed once"
    warning = (
        "burnin.step-0000003.pt is not a checkpoint, or is damaged: BadZipFile; trying the one before it"
    )
    assert warning in job.text()
    assert "burnin: resumed at step 2 of 4" in job.text()
    assert differences(uninterrupted(1), tmp_path) == []


@pytest.mark.parametrize("name", ["teacher.pt", "distill.step-0000001.pt"])
def test_no_phase_is_silently_trained_again(train_only, uninterrupted, tmp_path, name):
    """A run ends with an error if a final checkpoint, or every checkpoint to resume from, is damaged."""
    shutil.copytree(uninterrupted(1), tmp_path / "run")
    if "step" in name:
        (tmp_path / "run/distill.pt").unlink()
    (tmp_path / "run" / name).write_bytes(b"hello")
    job = train(train_only, tmp_path / "run")
    assert job.wait() == [2]
    error = job.text().splitlines()[-1]
    assert error.startswith("error: ") and "damaged" in error and "remove" in error
    assert (tmp_path / "run" / name).read_bytes() == b"hello"


def test_a_damaged_checkpoint_of_the_user_is_refused(data, train_only, uninterrupted, tmp_path):
    file = tmp_path / "teacher.pt"
    content = bytearray((uninterrupted(1) / "teacher.pt").read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for job in (
        train(train_only, tmp_path / "teacher", "--teacher-checkpoint", file),
        train(train_only, tmp_path / "student", "--student-checkpoint", file),
        train(train_only, tmp_path / "init", "--init-from", file),
        Job(tmp_path / "evaluation", file, "--data", data, script="evaluate"),
    ):
        assert job.wait() == [2]
        assert job.text().endswith(f"error: {file} is not a checkpoint, or is damaged: BadZipFile\n")
        assert job.text().count("error") == 1 and "Traceback" not in job.text()


# ------------------------------------------------------------------------------------------------ signals


def test_a_signal_saves_and_ends_the_run_at_once(data, tmp_path, tally):
    """The signal arrives during training, during an evaluation between two steps or at the end of a
    phase, or in evaluate.py; at one of two processes, or at a single one."""
    latency, saved = [], 0

    def check_end(job, codes, started):
        assert job.wait() == codes, job.text()
        latency.append(time.time() - started)
        assert "Traceback" not in job.text(), job.text()

    for number, name in enumerate(("SIGTERM", "SIGUSR1", "SIGINT")):
        for processes in (1, 2):
            out = tmp_path / f"{name}-{processes}"
            job = train(data, out, "--save-every", 100, processes=processes, steps=1000)
            victim = (number + processes) % processes
            assert job.wait_for("teacher 3/1000 ", 0)
            started = time.time()
            os.kill(job.processes[victim].pid, getattr(signal, name))
            check_end(job, [143] * processes, started)
            [file] = step_files(out, "teacher")
            done = load_checkpoint(file)["step"]
            assert 3 <= done < 100 and f"saved at step {done}" in job.text(0)
            saved += 1
    for name, steps, flags in (("SIGTERM", 5, ["--eval-every", 3]), ("SIGUSR1", 3, [])):
        out = tmp_path / f"evaluation-{name}"
        job = train(data, out, *flags, "--save-every", 100, steps=steps, fault=("slow_evaluation", 30))
        assert job.wait_for("evaluating")
        started = time.time()
        os.kill(job.processes[0].pid, getattr(signal, name))
        check_end(job, [143], started)
        assert f"stopped by {name}" in job.text()
        assert [file.name for file in step_files(out, "teacher")] == ["teacher.step-0000003.pt"]
        saved += 1
    out = tmp_path / "SIGTERM-1"
    file = step_files(out, "teacher")[0]
    for name, victim, processes in (("SIGTERM", 0, 1), ("SIGUSR1", 1, 2)):
        job = Job(
            tmp_path / f"evaluate-{name}",
            file,
            processes=processes,
            fault=("slow_evaluation", 1 if processes == 2 else 30),
            script="evaluate",
        )
        assert job.wait_for("evaluating", victim)
        started = time.time()
        os.kill(job.processes[victim].pid, getattr(signal, name))
        check_end(job, [143] if processes == 1 else [1, 143], started)
        saved += 1
    job = Job(tmp_path / "waiting", file, processes=2, fault=("slow_evaluation", 30, 0), script="evaluate")
    assert job.wait_for("evaluating", 0)
    time.sleep(1)  # long enough for rank 1 to finish its share and wait for rank 0
    started = time.time()
    os.kill(job.processes[1].pid, signal.SIGTERM)
    job.processes[1].join(10)
    latency.append(time.time() - started)
    assert job.processes[1].exitcode == 143 and "stopped by SIGTERM" in job.text(1), job.text()
    job.kill()
    saved += 1
    tally("signals that saved and ended the run", saved, len(latency), f"the last after {max(latency):.1f} s")


def test_a_second_ctrl_c_ends_the_process_at_once(data, tmp_path):
    job = train(data, tmp_path, steps=1000, fault=("slow_step", "teacher", 3))
    assert job.wait_for("a slow step")
    os.kill(job.processes[0].pid, signal.SIGINT)
    time.sleep(0.5)
    assert job.processes[0].is_alive(), "the first one waits for the end of the step"
    os.kill(job.processes[0].pid, signal.SIGINT)
    assert job.wait(5) == [-signal.SIGINT]


# ------------------------------------------------------------------------------------------------ numbers


def test_a_non_finite_step_of_one_process_is_skipped_on_all(train_only, tmp_path):
    job = train(train_only, tmp_path, processes=2, fault=("not_finite", 1, "burnin", [1, 2]))
    assert job.wait() == [0, 0], job.text()
    error = job.text(1)
    for step in (2, 3):
        assert f"warning: burnin step {step}, rank 1: loss_ce, loss_mask" in error
    assert "unlabeled_loss_ce not finite, images of the step: '" in error
    assert error.count(".png'") == 2 * 6
    for step in (2, 3):
        warning = f"warning: burnin step {step}, rank 0: the gradient is not finite; skipping the step"
        assert warning in job.text(0)
    state = load_checkpoint(tmp_path / "burnin.pt")["optimizer"]["state"]
    assert {moments["step"].item() for moments in state.values()} == {2.0}, "two of four steps were skipped"
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r.get("phase") == "burnin" and "loss" in r] == [1, 4]
    for phase in PHASES:
        checkpoint = load_checkpoint(tmp_path / f"{phase}.pt")
        assert all(value.isfinite().all() for value in checkpoint["model"].values())


def test_a_skipped_step_does_not_change_the_ema_teacher(train_only, tmp_path):
    """All steps of phase 3 but the first are skipped, so the teacher is that of a phase of one step."""
    job = train(train_only, tmp_path, fault=("not_finite", 0, "distill", [1, 2, 3]))
    assert job.wait() == [0] and job.text().count("skipping the step") == 3, job.text()
    burnt_in, last = (load_checkpoint(tmp_path / f"{phase}.pt") for phase in ("burnin", "distill"))
    decay = last["config"]["ema_decay"]
    for name, start in burnt_in["model"].items():
        if start.is_floating_point():
            expected = decay * start + (1 - decay) * last["model"][name]
            torch.testing.assert_close(last["teacher"][name], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("processes", [1, 2])
def test_ten_skipped_steps_in_a_row_end_the_run_and_keep_the_last_checkpoint(train_only, tmp_path, processes):
    fault = ("not_finite", processes - 1, "teacher", range(5, 20))
    job = train(train_only, tmp_path, steps=30, processes=processes, fault=fault)
    assert job.wait() == [3] * processes
    assert job.text(processes - 1).count("skipping the step") == 10
    assert "10 steps in a row were not finite; the last checkpoint before them is kept; try" in job.text(0)
    assert "Traceback" not in job.text()
    file = step_files(tmp_path, "teacher")[0]
    assert file.name == "teacher.step-0000004.pt"
    fault = ("at_step", 0, "teacher", 6, "SIGTERM")
    job = train(train_only, tmp_path, steps=30, processes=processes, fault=fault)
    assert job.wait() == [143] * processes and "resumed at step 4" in job.text(0)


@pytest.mark.parametrize(
    "threshold, words, every",
    [
        (0.999, ": 0.0 pseudo-labels per image;", 1),
        (0.0, " pseudo-labels per image;", 1),
        (0.0, " pseudo-labels per image;", 9),  # the last step writes the only log line
    ],
)
def test_a_phase_warns_once_of_no_or_too_many_pseudo_labels(train_only, tmp_path, threshold, words, every):
    flags = "--score-threshold", threshold, "--min-area", 0, "--log-every", every
    job = train(train_only, tmp_path, *flags)
    assert job.wait() == [0]
    for phase in ("burnin", "distill"):
        lines = [line for line in job.text().splitlines() if line.startswith(f"warning: {phase}: ")]
        assert len(lines) == 1 and words in lines[0], job.text()
        assert "the teacher's highest score per step averages 0." in lines[0]
        assert f"--score-threshold is {threshold}" in lines[0]


# ---------------------------------------------------------------------------------------------- processes


def test_a_fault_on_one_process_ends_all_processes_with_its_message(train_only, tmp_path, tally):
    loader = "--workers", 1
    faults = [
        (1, ("at_step", 1, "teacher", 2, "raise"), "KeyError: 'planted'", ()),
        (-9, ("at_step", 1, "burnin", 2, "SIGKILL"), "fault: SIGKILL", ()),
        (2, ("loader", 1, "dead"), "is killed by signal: Killed", loader),
        (2, ("loader", 1, "stuck"), "DataLoader timed out after 3.0 seconds", loader),
    ]
    held, longest = 0, 0
    for number, (code, fault, words, flags) in enumerate(faults):
        job = train(train_only, tmp_path / str(number), *flags, steps=100, processes=2, fault=fault)
        assert job.wait_for("fault: ", 1)
        started = time.time()
        codes = job.wait()
        longest = max(longest, time.time() - started)
        assert codes[1] == code and codes[0] == 1, (codes, job.text())
        assert words in job.text(1)
        error = "error (process 0): another process has failed; see its message\n"
        assert job.text(0).endswith(error), job.text(0)
        assert ("Traceback" in job.text()) == (fault[-1] == "raise"), "only a bug has a traceback"
        held += 1
    assert longest < 10, "the timeout of a stuck loader is three seconds of this"
    remark = f"the last ended after {longest:.1f} s"
    tally("faults on one of two processes without a hang", held, len(faults), remark)


@pytest.mark.parametrize(
    "flags, codes, words",
    [
        (["--norm", "batch"], [2, 2], "--norm batch is synchronized on GPUs only"),
        (["--batch", 5], [2, 2], "--batch 5 must be a multiple of the 2 processes"),
        (
            ["--data", "coco", "--root", "/nowhere"],
            [2, 1],
            "cannot find COCO: no annotation file '/no",
        ),
    ],
)
def test_an_expected_error_is_one_line_per_process(train_only, tmp_path, flags, codes, words):
    """This also holds where rank 0 reads the data first and the other ranks wait for it."""
    job = train(train_only, tmp_path, *flags, processes=2)
    assert job.wait() == codes
    lines = [line for line in job.text(0).splitlines() if "folder in COCO form" not in line]
    assert len(lines) == 1 and lines[0].startswith("error (process 0): " + words)
    waiting = "another process has failed; see its message"
    assert job.text(1).startswith("error (process 1): " + (words if codes[1] == 2 else waiting))
    assert job.text(1).count("\n") == 1, job.text(1)


def test_a_process_without_objects_and_pseudo_labels_can_train(train_only, tmp_path):
    """The only labeled image is shared by two processes."""
    job = train(train_only, tmp_path, "--ratio", 0.1, processes=2, fault=("few_objects",))
    assert job.wait() == [0, 0], job.text()
    assert "fault: no objects" in job.text(1)
    assert "warning: a batch has 6 images, but only 1 are labeled" in job.text(0)


@pytest.mark.parametrize("checkpoint", ["teacher.pt", "distill.pt"])
def test_ap_is_bit_equal_on_one_two_and_three_processes(data, uninterrupted, tmp_path, tally, checkpoint):
    """Each of the seven images is evaluated once. The detections are those of the model and noisy
    ground truth."""
    printed, results = [], []
    for processes in (1, 2, 3):
        file = tmp_path / f"{processes}.json"
        flags = uninterrupted(1) / checkpoint, "--data", data, "--json", file, "--device", "cpu"
        out, fault = tmp_path / str(processes), ("noisy_truth",)
        job = Job(out, *flags, script="evaluate", processes=processes, fault=fault)
        assert job.wait() == [0] * processes, job.text()
        models = 1 if checkpoint == "teacher.pt" else 2
        assert job.text().count("image ") == 7 * models
        printed.append({line for line in job.text(0).splitlines() if line.startswith("detections")})
        results.append(json.loads(file.read_text()))
    assert results[0] == results[1] == results[2] and printed[0] == printed[1] == printed[2]
    assert 0 < results[0][checkpoint.replace(".pt", "").replace("distill", "student")]["AP"] < 90
    tally(f"AP of {checkpoint} on 1, 2, 3 processes equal to the last bit", 3, 3)


# --------------------------------------------------------------------------------------- disk and folders


def test_a_full_disk_is_an_error_of_one_line_and_no_checkpoint_is_lost(train_only, uninterrupted, tmp_path):
    job = train(train_only, tmp_path, fault=("no_space", "burnin", 4))
    assert job.wait() == [2] and "fault: no space" in job.text()
    error = job.text().splitlines()[-1]
    assert error.startswith(
        f"error: cannot write {tmp_path}/burnin.step-0000004.pt, earlier checkpoints are intact: "
    )
    assert sorted(file.name for file in tmp_path.glob("*.pt")) == ["burnin.step-0000002.pt", "teacher.pt"]
    assert not list(tmp_path.glob("*.tmp")) and "Traceback" not in job.text()
    job = train(train_only, tmp_path)
    assert job.wait() == [0] and "burnin: resumed at step 2 of 4" in job.text()
    assert differences(uninterrupted(1), tmp_path) == []


def test_a_read_only_folder_is_refused(train_only):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o555)
        out = Path(folder) / "run"
        for where in (Path(folder), out):
            logs = Path(tempfile.mkdtemp())
            job = Job(logs, "--data", train_only, *TINY, "--out", where, fault=("nobody",))
            assert job.wait() == [2] and "fault: user" in job.text()
            error = job.text().splitlines()[-1]
            assert error == f"error: cannot write to '{where}': Permission denied"


def test_a_folder_is_locked_as_long_as_the_process_of_its_run_lives(train_only, tmp_path):
    first = train(train_only, tmp_path / "run", steps=500)
    assert first.wait_for("teacher 3/500 ")
    second = Job(tmp_path / "second", "--data", train_only, *TINY, "--out", tmp_path / "run", "--steps", 500)
    assert second.wait() == [2]
    pid = first.processes[0].pid
    owner = f"process {pid} on {socket.gethostname()}"
    error = f"error: '{tmp_path}/run' is in use by {owner!r}; choose another folder"
    assert second.text().splitlines()[1:] == [error]
    assert first.processes[0].is_alive()
    first.kill()
    third = train(train_only, tmp_path / "run", steps=500, fault=("at_step", 0, "teacher", 10, "SIGTERM"))
    assert third.wait() == [143] and "resumed at step" in third.text()


def test_ranks_that_see_different_checkpoints_are_refused(train_only, tmp_path):
    """This can happen when several machines share a folder."""
    job = train(train_only, tmp_path, processes=2, fault=("at_step", 0, "burnin", 2, "SIGTERM"))
    assert job.wait() == [143, 143]
    for function, words in (
        ("running", "checkpoints of step 0 and 3"),
        ("completed", "numbers of completed phases 0 and 1"),
    ):
        job = train(train_only, tmp_path, processes=2, fault=("stale", function))
        assert job.wait() == [2, 2], job.text()
        assert f"ranks see {words}; make --out the same folder on all machines" in job.text(), job.text()
    job = train(train_only, tmp_path, processes=2)
    assert job.wait() == [0, 0], job.text()


# ------------------------------------------------------------------------------------------------ torchrun


@pytest.mark.parametrize("pairs", [1, pytest.param(20, marks=slow)])
def test_processes_exit_with_their_own_code(tally, pairs):
    """gloo's threads would abort about one pair in six if the process group were not destroyed at
    exit."""
    script = "import sys, torch\n"
    script += "from training.distributed import all_reduce_mean, init_distributed\n"
    script += "init_distributed('cpu')\n"
    script += "[all_reduce_mean(torch.ones(1000)) for _ in range(50)]; sys.exit(143)"
    held = 0
    for _ in range(pairs):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        environment = {**os.environ, **place, "OMP_NUM_THREADS": "1"}
        both = [
            subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment | {"RANK": rank})
            for rank in "01"
        ]
        codes = [process.wait(60) for process in both]
        assert codes == [143, 143]
        held += 1
    tally("pairs of processes that exited with their own code", held, pairs)


def torchrun(script, *flags, launcher, log):
    """Start a script under torchrun, with the arguments `launcher`, and write all output to a log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, script, *flags]
    with open(log, "w") as output:
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )


def printed(log, words, seconds=60) -> bool:
    """Wait until a log has some words, and return whether it has."""
    end = time.time() + seconds
    while words not in log.read_text() and time.time() < end:
        time.sleep(0.02)
    return words in log.read_text()


TWO = "--standalone", "--nproc_per_node=2"


@pytest.mark.parametrize(
    "name, code",
    [("SIGTERM", 1), pytest.param("SIGUSR1", -10, marks=slow), pytest.param("SIGINT", 1, marks=slow)],
)
def test_a_signal_to_torchrun_saves_too(train_only, tmp_path, tally, name, code):
    """torchrun forwards SIGTERM and SIGINT, and has exit codes of its own. SIGUSR1 kills it."""
    log = tmp_path / "log.txt"
    flags = "--data", train_only, *TINY, "--out", tmp_path / "run", "--steps", 3000, "--save-every", 3000
    process = torchrun("burnin.py", *flags, "--workers", 1, launcher=TWO, log=log)
    assert printed(log, "teacher 3/3000 ")
    started = time.time()
    process.send_signal(getattr(signal, name))
    assert process.wait(30) == code
    assert printed(log, "the same command resumes from here", 10), log.read_text()
    latency = time.time() - started
    while is_locked(tmp_path / "run/lock"):
        time.sleep(0.02)
    [file] = step_files(tmp_path / "run", "teacher")
    assert f"saved at step {load_checkpoint(file)['step']}" in log.read_text()
    assert "DataLoader" not in log.read_text()
    tally(f"{name} to torchrun, saved", 1, 1, f"after {latency:.1f} s")


def is_locked(lock) -> bool:
    """Return whether a process holds the lock."""
    with open(lock, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


KILLED_ONCE = """
import os, sys, pathlib
sys.path[:0] = {paths}
import burnin, distill, faults
marker = pathlib.Path({marker!r})
rank = int(os.environ["RANK"])
if rank == 1 and not marker.exists():
    marker.touch()
    faults.at_step(1, 1, "burnin", 2, "SIGKILL")
distill.main()
"""


def test_torchrun_restarts_a_run_whose_process_was_killed(train_only, uninterrupted, tmp_path):
    script, log = tmp_path / "script.py", tmp_path / "log.txt"
    paths = [str(ROOT), str(ROOT / "tests")]
    script.write_text(KILLED_ONCE.format(paths=paths, marker=str(tmp_path / "killed")))
    flags = "--data", train_only, *TINY, "--out", tmp_path / "run", "--steps", 4, "--workers", 0
    process = torchrun(script, *flags, launcher=[*TWO, "--max-restarts=1"], log=log)
    assert process.wait(120) == 0, log.read_text()
    assert "fault: SIGKILL" in log.read_text() and "burnin: resumed at step 2 of 4" in log.read_text()
    assert differences(uninterrupted(2), tmp_path / "run") == []


def test_two_machines_give_the_result_of_one(train_only, uninterrupted, tmp_path):
    """The machines are two launchers of one process each, which find each other through the network."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{port}",
    ]
    flags = "--data", train_only, *TINY, "--out", tmp_path / "run", "--steps", 4, "--workers", 0
    logs = [tmp_path / f"log-{number}.txt" for number in range(2)]
    nodes = [torchrun("distill.py", *flags, launcher=launcher, log=log) for log in logs]
    assert [node.wait(120) for node in nodes] == [0, 0], "".join(log.read_text() for log in logs)
    assert sorted("distill done" in log.read_text() for log in logs) == [False, True], "one has rank 0"
    assert differences(uninterrupted(2), tmp_path / "run") == []


# ----------------------------------------------------------------------------------------- hostile files


class Executes:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def archive(path, content: bytes, compressed=b""):
    """Write any content as a file of torch.save."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", "3")
        file.writestr("archive/byteorder", "little")
        if compressed:
            file.writestr("archive/data/0", compressed, compress_type=zipfile.ZIP_DEFLATED)


def hostile_checkpoints(folder, trace):
    """Write files that would execute code, or allocate huge memory, in a reader that trusts them."""
    for protocol in (0, 2, 4):  # the last one in a valid frame
        content = pickle.dumps({"model": Executes(trace), "format": 1}, protocol)
        (folder / f"pickle-{protocol}.pkl").write_bytes(content)
        archive(folder / f"pickle-{protocol}.pt", content)
    torch.save({"format": 1, "student": Executes(trace)}, folder / "format-1.pt")
    torch.save({"format": 2, "model": Executes(trace)}, folder / "format-2.pt")
    torch.save({"model": Executes(trace)}, folder / "old.pth", _use_new_zipfile_serialization=False)
    huge = (2**27).to_bytes(4, "little")  # the C unpickler allocates 2 GiB for this index
    (folder / "index.pkl").write_bytes(b"\x80\x02}r" + huge + b".")
    (folder / "length.pkl").write_bytes(b"\x80\x04\x8e" + (2**45).to_bytes(8, "little") + b"x.")
    (folder / "frame.pkl").write_bytes(b"\x80\x04\x95" + (2**45).to_bytes(8, "little") + b"}.")
    archive(folder / "index.pt", b"\x80\x02}r" + huge + b".")
    archive(folder / "bomb.pt", pickle.dumps({"format": 1}, 2), compressed=bytes(500_000_000))
    (folder / "header.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    (folder / "text.pt").write_bytes(b"hello" * 1000)
    (folder / "nothing.pt").write_bytes(b"")


def hostile_data(folder, secret):
    """Return {name: change} of a dataset of one image of 40 x 40 pixels with one annotation. A change
    is a file name, the text of a JSON file, or new entries."""
    (folder / "zero.json").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.json")
    (folder / "images/out.png").symlink_to(secret)
    pixels = bytearray((folder / "images/a.png").read_bytes())
    pixels[16:24] = (100_000).to_bytes(4, "big") * 2
    (folder / "images/bomb.png").write_bytes(pixels)
    (folder / "images/script.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n"
    )
    zigzag = [value for x in range(5000) for value in (x % 40, 40 * (x % 2))]
    image = {"id": 1, "height": 40, "width": 40}
    return {
        "a device as JSON": "zero.json",
        "a pipe as JSON": "pipe.json",
        "JSON in JSON": "[" * 200_000,
        "JSON of a long number": '{"images": ' + "9" * 100_000 + "}",
        "JSON that ends": '{"images": [',
        "a path upwards": {"images": [image | {"file_name": "../secret.png"}]},
        "an absolute path": {"images": [image | {"file_name": str(secret)}]},
        "a link out of the folder": {"images": [image | {"file_name": "out.png"}]},
        "a huge image": {"images": [image | {"file_name": "a.png", "height": 10**9, "width": 10**9}]},
        "a decompression bomb": {"images": [image | {"file_name": "bomb.png"}]},
        "PostScript": {"images": [image | {"file_name": "script.png"}]},
        "an RLE of huge runs": {"segmentation": {"size": [40, 40], "counts": [0, 10**15]}},
        "a compressed RLE of huge runs": {"segmentation": {"size": [40, 40], "counts": "o" * 50 + "0"}},
        "an RLE of a huge size": {"segmentation": {"size": [10**6, 10**6], "counts": [10**12]}},
        "an RLE of negative runs": {"segmentation": {"size": [40, 40], "counts": [-1600, 3200]}},
        "a polygon far away": {"segmentation": [[0, 0, 1e9, 0, 1e9, 1e9]]},
        "a polygon of no numbers": {"segmentation": [[0, 0, float("nan"), 0, float("inf"), 9]]},
        "a polygon without end": {"segmentation": [zigzag * 20]},
    }


def in_bounds(function, *arguments, megabytes=300):
    """Call a function in a forked process, and return the message of its ValueError. Raises
    AssertionError if it raises none, or takes more time or memory."""
    read, write = os.pipe()

    def call():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            text = f"not refused: {function(*arguments)!r}"[:200]
        except ValueError as error:
            text = f"refused: {error}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        os.write(write, f"{text}\n{grown}".encode())

    assert in_a_fork(call) == 0, arguments
    os.close(write)
    text, grown = os.read(read, 100_000).decode().rsplit("\n", 1)
    os.close(read)
    assert text.startswith("refused: ") and int(grown) < megabytes, (arguments, text, grown)
    return text.removeprefix("refused: ")


def read_views(json_file, images):
    """Read a dataset as training does, with a view of every image, but do not follow links out of the
    folder."""
    dataset = load_coco(json_file, images, follow_links=False)
    views = AugmentedDataset(dataset, Augmentation((64, 64)))
    for image_id in dataset.image_ids:
        views[image_id, 0]
    return dataset


def test_hostile_checkpoints_are_refused_and_nothing_is_executed(tmp_path, tally):
    """The refusal is one line that names the file. It takes little time and memory."""
    trace, refused = tmp_path / "trace", 0
    (tmp_path / "checkpoints").mkdir()
    hostile_checkpoints(tmp_path / "checkpoints", trace)
    with pytest.raises(FileExistsError):  # the control: a reader that trusts the file executes it
        for _ in range(2):
            pickle.loads((tmp_path / "checkpoints/pickle-4.pkl").read_bytes())
    trace.rmdir()
    for file in sorted((tmp_path / "checkpoints").iterdir()):
        for read in (load_checkpoint, load_any_checkpoint):
            error = in_bounds(read, file)
            assert str(file) in error and "\n" not in error
            assert "BadZipFile" in error or file.name != "bomb.pt", "refused before it is unpacked"
            refused += 1
        assert not trace.exists(), file
    tally("hostile checkpoints refused", refused, 2 * len(list((tmp_path / "checkpoints").iterdir())))


def test_hostile_data_is_refused(tmp_path, tally, monkeypatch):
    """Nothing is executed, not even Ghostscript, which Pillow looks for in the PATH."""
    trace = tmp_path / "trace"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {trace}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "images").mkdir()
    for file in (tmp_path / "images/a.png", tmp_path / "secret.png"):
        Image.new("RGB", (40, 40)).save(file)
    whole = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 40}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 30, 1, 30, 30]]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(whole))
    assert read_views(tmp_path / "a.json", tmp_path / "images").image_ids == [1]
    cases = hostile_data(tmp_path, tmp_path / "secret.png")
    for name, change in cases.items():
        file = tmp_path / "a.json"
        if isinstance(change, dict):
            annotation = whole["annotations"][0] | {k: v for k, v in change.items() if k == "segmentation"}
            content = (
                whole | {"annotations": [annotation]} | {k: v for k, v in change.items() if k == "images"}
            )
            file.write_text(json.dumps(content))
        elif change.endswith(".json"):
            file = tmp_path / change
        else:
            file.write_text(change)
        error = in_bounds(read_views, file, tmp_path / "images")
        assert "\n" not in error and len(error) < 1000, name
        assert not trace.exists(), name
    tally("hostile data refused", len(cases), len(cases))


# ---------------------------------------------------------------- failures that users of other code report


@pytest.mark.parametrize("number", [0, 20])
def test_every_parameter_has_a_gradient_for_any_number_of_objects(make_model, number):
    """DistributedDataParallel would fail on unused parameters. 20 objects are more than there are
    queries."""
    model = make_model()
    targets = [{"labels": torch.zeros(number).long(), "masks": torch.ones(number, 64, 64).bool()}]
    losses = SetCriterion(3, num_points=16)(model(torch.zeros(1, 3, 64, 64)), targets)
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_large_batches_do_not_run_out_of_open_files(train_only):
    """Each tensor from a loader process is an open file, and the default limit is often 1024."""

    def load(ask):
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        if ask:
            init_distributed("cpu")
        train, _ = load_data(str(train_only))
        views = AugmentedDataset(train, Augmentation((32, 32)))
        batches = endless_batches(views, train.image_ids, 60, seed=0, num_workers=2, timeout=3)
        assert len([next(batches) for _ in range(3)]) == 3

    assert in_a_fork(lambda: load(ask=False)) != 0
    assert in_a_fork(lambda: load(ask=True)) == 0


def dirty() -> int:
    """Return the memory that this process does not share with others, in MiB."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_Dirty")) // 1024


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_loader_processes():
    """Processes share the arrays of a SerializedList, which they only read. Counting references to
    Python objects would copy an ordinary list."""
    items = [{"id": i, "segmentation": [[float(i + j) for j in range(30)]]} for i in range(30_000)]
    serialized = SerializedList(items)

    def read(rows):
        before = dirty()
        for i in range(len(rows)):
            assert rows[i]["segmentation"][0][0] == i
        assert dirty() - before < 5

    assert in_a_fork(lambda: read(serialized)) == 0
    assert in_a_fork(lambda: read(items)) == 1, "the control: a list is copied"
