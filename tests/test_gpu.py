"""Tests that need a GPU: `make test-gpu`. Those of the Triton kernels are in test_triton.py."""

import copy
import itertools
import json
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from commands import ROOT
from test_training import TINY

import distill
from data import collate
from matcher import SetCriterion
from training.config import Config
from training.distributed import Env, autocast, init_distributed, to_device

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def without_tf32():
    init_distributed("cuda", "fp32")


def make_batch(number, objects, size=64, seed=0):
    """Return a batch with images, strong views and targets."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (number, 3, size, size), generator=generator, dtype=torch.uint8)
    masks = torch.rand(number, objects, size, size, generator=generator) > 0.7
    labels = torch.randint(3, (number, objects), generator=generator)
    items = zip(images, labels, masks)
    return collate(
        [{"image": i, "strong": 255 - i, "labels": t, "masks": m, "file": "a.png"} for i, t, m in items]
    )


class FixedPoints:
    """Replaces torch.rand by one that draws the same numbers on every device."""

    def __init__(self, monkeypatch):
        self.generator, self.rand = torch.Generator(), torch.rand
        monkeypatch.setattr(torch, "rand", self)

    def __call__(self, *shape, device=None, **_):
        return self.rand(*shape, generator=self.generator).to(device or "cpu")


def losses_and_gradients(model, criterion, batch, env):
    model, criterion = copy.deepcopy(model).to(env.device).train(), copy.deepcopy(criterion).to(env.device)
    batch = to_device(batch, env)
    with autocast(env):
        outputs = model(batch["image"])
    losses = criterion(outputs, batch["targets"])
    sum(losses.values()).backward()
    return losses, {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision, tolerance", [("fp32", 2e-3), ("bf16", 5e-2)])
def test_losses_and_gradients_equal_those_of_a_cpu(make_model, monkeypatch, precision, tolerance):
    model, batch = make_model(num_classes=3), make_batch(2, 4)
    criterion, points = SetCriterion(3, num_points=400), FixedPoints(monkeypatch)
    results = []
    for env in (Env(torch.device("cpu")), Env(GPU, bf16=precision == "bf16")):
        points.generator.manual_seed(0)
        results.append(losses_and_gradients(model, criterion, batch, env))
    (expected, gradients), (losses, found) = results
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=tolerance, abs=tolerance), name
    assert found.keys() == gradients.keys()
    if precision == "fp32":  # rounding to bf16 may match a query to another object
        whole = torch.cat([g.flatten() for g in gradients.values()])
        error = torch.cat([g.flatten() for g in found.values()]) - whole
        assert error.norm() < 1e-2 * whole.norm()


def pinned(batch):
    """Move the tensors of a batch to pinned memory, as a loader does."""
    if isinstance(batch, dict):
        return {name: pinned(value) for name, value in batch.items()}
    if isinstance(batch, list):
        return [pinned(value) for value in batch]
    return batch.pin_memory() if isinstance(batch, torch.Tensor) else batch


def test_a_step_of_distillation_waits_for_the_gpu_four_times(make_model, monkeypatch):
    """For the pseudo-labels, the matching of labeled and of unlabeled images, and the gradient norm.
    The first step compiles kernels, the second one is measured."""
    cfg = Config(steps=(1, 1, 2), score_threshold=0.3, device="cuda")
    env, criterion = Env(GPU), SetCriterion(3, num_points=400).to(GPU)
    labeled, unlabeled = pinned(make_batch(2, 4)), pinned(make_batch(2, 0, seed=1))
    del labeled["strong"], unlabeled["targets"]
    data = SimpleNamespace(
        env=env,
        train=SimpleNamespace(class_names=["a", "b", "c"]),
        labeled_batches=lambda *_: itertools.repeat(labeled),
        unlabeled_batches=lambda *_: itertools.repeat(unlabeled),
    )
    checkpoints = SimpleNamespace(resume=lambda _: 0, save_if_due=lambda _: None)
    seed_step, measured = distill.seed_step, []

    def start(seed, phase, step):
        seed_step(seed, phase, step)
        torch.cuda.set_sync_debug_mode("warn" if step == 1 else "default")

    def stop(_, step, *__):
        torch.cuda.set_sync_debug_mode("default")
        measured.append(step)

    for name, replacement in {
        "load_student_checkpoint": lambda *_: {"optimizer": None},
        "load_model": lambda *_: make_model().to(GPU).eval().requires_grad_(False),
        "load_moments": lambda *_: None,
        "model_arguments": lambda *_: {},
        "describe": lambda *_: {},
        "Checkpointer": lambda *_: checkpoints,
        "Metrics": lambda *_: None,
        "seed_step": start,
        "log_guided_step": stop,
        "evaluate_if_due": lambda *_: None,
        "finish_phase": lambda *_: None,
    }.items():
        monkeypatch.setattr(distill, name, replacement)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            distill.distill(cfg, env, data, criterion)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert measured == [1, 2], "no step was skipped"
    where = [f"{w.filename}:{w.lineno}" for w in seen if "synchronizing" in str(w.message)]
    assert 0 < len(where) <= 4, where


def weights(checkpoint):
    """Return all weights of a checkpoint's model in one row."""
    model = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    return torch.cat([value.float().flatten() for value in model.values()])


@pytest.mark.parametrize(
    "launcher", [[], ["-m", "torch.distributed.run", "--standalone"]], ids=["alone", "NCCL"]
)
def test_all_phases_run_on_a_gpu_and_are_resumed_where_they_were_stopped(shapes, tmp_path, launcher):
    def start(out):
        flags = ["--data", shapes, "--out", tmp_path / out, *TINY, "--steps", "5,5,40", "--precision", "bf16"]
        command = map(str, [sys.executable, *launcher, ROOT / "distill.py", *flags])
        return subprocess.Popen([*command], stdout=subprocess.PIPE, text=True)

    def steps(out):
        path = tmp_path / out / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line["step"] for line in lines if line.get("phase") == "distill" and "lr" in line]

    for run in ("whole", "again"):
        printed, _ = start(run).communicate()
        assert torch.cuda.get_device_name() in printed and "bf16" in printed
    cut = start("cut")
    while len(steps("cut")) < 10 and cut.poll() is None:
        time.sleep(0.02)
    cut.terminate()
    cut.communicate()
    done = len(steps("cut"))
    assert 10 <= done < 40
    printed, _ = start("cut").communicate()
    assert steps("cut") == [*range(1, 41)], (done, printed)
    whole, again, cut = (weights(tmp_path / run / "distill.pt") for run in ("whole", "again", "cut"))
    # Sums on a GPU are not bit-exact: the second uninterrupted run differs too.
    assert (cut - whole).norm() <= 2 * (again - whole).norm()
