"""What only a GPU can show: `make test-gpu`. The kernels' own tests are in test_triton.py."""

import copy
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

import engine
from burnin import guided_step, to_device
from distill import ema_update
from matcher import SetCriterion

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
PSEUDO = dict(mask_threshold=0.0, max_overlap=1.0, fine_masks=False, pixel_weights=False, score_power=0.0)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    engine.start_processes("cuda", "fp32")  # without TF32


def make_batch(number, objects, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (number, 3, size, size), generator=generator, dtype=torch.uint8)
    masks = torch.rand(number, objects, size, size, generator=generator) > 0.7
    labels = torch.randint(3, (number, objects), generator=generator)
    return [{"image": i, "labels": t, "masks": m} for i, t, m in zip(images, labels, masks)]


class FixedPoints:
    """torch.rand of a fixed sequence, the same on every device."""

    def __init__(self, monkeypatch):
        self.generator, self.rand = torch.Generator(), torch.rand
        monkeypatch.setattr(torch, "rand", self)

    def __call__(self, *shape, device=None, **_):
        return self.rand(*shape, generator=self.generator).to(device or "cpu")


def losses_and_gradients(model, criterion, batch, device):
    model, criterion = copy.deepcopy(model).to(device).train(), copy.deepcopy(criterion).to(device)
    images = torch.stack([item["image"] for item in batch]).to(device)
    targets = to_device(batch, device)
    with engine.autocast(device):
        outputs = model(images)
    losses = criterion(outputs, targets)
    sum(losses.values()).backward()
    return losses, {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision, tolerance", [("fp32", 2e-3), ("bf16", 5e-2)])
def test_losses_and_gradients_are_those_of_a_cpu(make_model, monkeypatch, precision, tolerance):
    model, batch = make_model(num_classes=3), make_batch(2, 4)
    criterion, points = SetCriterion(3, num_points=400), FixedPoints(monkeypatch)
    results = []
    for device, bf16 in ((torch.device("cpu"), False), (GPU, precision == "bf16")):
        monkeypatch.setattr(engine, "bfloat16", bf16)
        points.generator.manual_seed(0)
        results.append(losses_and_gradients(model, criterion, batch, device))
    (expected, gradients), (losses, found) = results
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=tolerance, abs=tolerance), name
    assert found.keys() == gradients.keys()
    if precision == "fp32":  # rounding to bf16 may match a query to another object
        whole = torch.cat([g.flatten() for g in gradients.values()])
        error = torch.cat([g.flatten() for g in found.values()]) - whole
        assert error.norm() < 1e-2 * whole.norm()


def test_a_guided_step_waits_for_the_gpu_twice(make_model, monkeypatch):
    """For the teacher's scores, and for the matching. `Run.update` waits once more, to see whether the
    gradient is finite."""
    monkeypatch.setattr(engine, "bfloat16", None)
    student, criterion = make_model().to(GPU).train(), SetCriterion(3, num_points=400).to(GPU)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = engine.make_optimizer(student, 1e-4, 0.05, 0.1)
    cfg = SimpleNamespace(score_threshold=0.3, min_area=5, **PSEUDO)

    def pinned(batch):
        return [{name: tensor.pin_memory() for name, tensor in item.items()} for item in batch]

    labelled, unlabelled = pinned(make_batch(2, 4)), pinned(make_batch(2, 0, seed=1))

    def step():
        losses, guided, _ = guided_step(student, teacher, criterion, labelled, unlabelled, cfg, GPU)
        optimizer.zero_grad(set_to_none=True)
        (sum(losses.values()) + 2 * sum(guided.values())).backward()
        norm = torch.nn.utils.get_total_norm(p.grad for p in student.parameters() if p.grad is not None)
        torch.nn.utils.clip_grads_with_norm_(student.parameters(), 0.01, norm)
        optimizer.step()
        ema_update(teacher, student, 0.999)

    step()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    where = [f"{w.filename}:{w.lineno}" for w in seen if "synchronizing" in str(w.message)]
    assert len(where) <= 2, where


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone"]], ids=["", "NCCL"])
def test_all_phases_run_on_a_gpu_and_go_on_where_they_were_cut(shapes, tmp_path, launcher):
    def start(out):
        flags = ["--data", shapes, "--out", tmp_path / out, *TINY, "--steps", "5,5,40", "--precision", "bf16"]
        command = map(str, [sys.executable, *launcher, ROOT / "distill.py", *flags])
        return subprocess.Popen([*command], stdout=subprocess.PIPE, text=True)

    def steps(out):
        path = tmp_path / out / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line["step"] for line in lines if line.get("phase") == "distill" and "lr" in line]

    printed, _ = start("whole").communicate()
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
    whole, cut = (torch.load(tmp_path / run / "distill.pt", weights_only=False) for run in ("whole", "cut"))
    for name, value in whole["student"].items():  # a GPU's sums differ from one time to the next
        error = (cut["student"][name].float() - value.float()).norm()
        assert error <= 0.05 * value.float().norm() + 1e-3, name
