"""The method: pseudo-labels, the training steps of phases 2 and 3, the EMA teacher."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from commands import same
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import burnin
import distill
from burnin import pseudo_labels
from distill import ema_update
from matcher import SetCriterion
from training.config import Config
from training.distributed import Env, num_objects
from training.micro_batches import MicroBatched, concat_outputs, split_outputs
from training.robust import (
    clean_pseudo_labels,
    cutmix,
    full_res_masks,
    large_masks,
    mask_nms,
    mix_views,
    turn,
)

K = 3
ENV = Env(torch.device("cpu"))


# ---------------------------------------------------------------------------------------- pseudo-labels


def logits_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def mask_of(area, size=(6, 8)):
    """Return mask logits whose first `area` pixels are just above zero, the others at zero and below."""
    logits = torch.full(size, -3.0)
    logits.view(-1)[:area] = 1e-3
    logits.view(-1)[area : area + 10] = 0.0
    return logits


# Class probabilities, "no object" last; pixels of the mask; the label, or why the query is dropped.
QUERIES = [
    ((0.90, 0.05, 0.03, 0.02), 12, 0),
    ((0.10, 0.75, 0.10, 0.05), 6, 1),  # one pixel above min_area
    ((0.02, 0.03, 0.90, 0.05), 5, "min_area exactly"),
    ((0.02, 0.03, 0.90, 0.05), 0, "an empty mask"),
    ((0.01, 0.01, 0.01, 0.97), 20, "no object"),
    ((0.20, 0.60, 0.10, 0.10), 20, "a low score"),
    ((0.05, 0.05, 0.85, 0.05), 30, 2),
    ((0.05, 0.05, 0.85, 0.05), 30, 2),  # duplicates are kept
]


def test_pseudo_labels_are_the_teachers_confident_predictions():
    logits = logits_of(*[probabilities for probabilities, _, _ in QUERIES])
    masks = torch.stack([mask_of(area) for _, area, _ in QUERIES])
    nothing = torch.zeros_like(logits), torch.full_like(masks, -1.0)
    outputs = {
        "pred_logits": torch.stack([logits, nothing[0]]),
        "pred_masks": torch.stack([masks, nothing[1]]),
    }
    found, empty = pseudo_labels(outputs, score_threshold=0.7, min_area=5)

    kept = [q for q, (_, _, verdict) in enumerate(QUERIES) if not isinstance(verdict, str)]
    assert found["labels"].tolist() == [QUERIES[q][2] for q in kept] and found["labels"].dtype == torch.int64
    assert found["scores"].tolist() == pytest.approx([max(QUERIES[q][0]) for q in kept], abs=1e-5)
    assert found["masks"].dtype == torch.bool
    assert torch.equal(found["masks"], masks[kept] > 0)
    assert found["masks"].sum((1, 2)).tolist() == [QUERIES[q][1] for q in kept]

    assert empty["labels"].shape == empty["scores"].shape == (0,) and empty["masks"].shape == (0, 6, 8)
    assert empty["labels"].dtype == torch.int64 and empty["masks"].dtype == torch.bool


@pytest.mark.parametrize("threshold, kept", [(0.4999, 1), (0.5, 0)])
def test_a_score_must_exceed_the_threshold(threshold, kept):
    """Logits (0, 0) give a probability of exactly one half."""
    outputs = {"pred_logits": torch.tensor([[[0.0, -math.inf, 0.0]]]), "pred_masks": torch.ones(1, 1, 4, 4)}
    [found] = pseudo_labels(outputs, score_threshold=threshold, min_area=0)
    assert len(found["labels"]) == kept


@pytest.mark.parametrize("min_area", [0, 1, 5])
def test_masks_are_larger_than_min_area(min_area):
    areas = [0, 1, 2, 5, 6]
    outputs = {
        "pred_logits": torch.tensor([9.0, 0, 0, 0]).expand(1, len(areas), -1),
        "pred_masks": torch.stack([mask_of(area) for area in areas])[None],
    }
    [found] = pseudo_labels(outputs, min_area=min_area)
    assert found["masks"].sum((1, 2)).tolist() == [area for area in areas if area > min_area]


@pytest.mark.parametrize("iou_threshold", [0.3, 0.5, 0.99, 1.0])
def test_mask_nms_keeps_the_highest_score_among_overlapping_masks(iou_threshold):
    """As a loop over all pairs does. Queries that are no pseudo-labels suppress none."""
    torch.manual_seed(0)
    masks = torch.full((2, 30, 8, 8), -1.0)
    for mask in masks.flatten(0, 1):
        y, x = torch.randint(0, 4, (2,)).tolist()
        mask[y : y + 4, x : x + 4] = 1.0
    outputs = {"pred_logits": 4 * torch.randn(2, 30, 4), "pred_masks": masks}
    targets = pseudo_labels(outputs, min_area=0)
    for before, after in zip(targets, mask_nms(targets, iou_threshold)):
        expected = []
        for score, mask in zip(before["scores"], before["masks"]):
            ious = (before["masks"] & mask).sum((1, 2)) / (before["masks"] | mask).sum((1, 2))
            if not any(ious[before["scores"] > score] > iou_threshold):
                expected.append(score.item())
        assert after["scores"].tolist() == expected
        assert (len(expected) < len(before["scores"])) == (iou_threshold < 1)
        assert {name: len(value) for name, value in after.items()} == dict.fromkeys(before, len(expected))


def test_full_resolution_masks_are_closer_to_a_small_object():
    """A disc 17 pixels wide, from logits that are its signed distance, averaged over 4 x 4 pixels."""
    y, x = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    distance = 8.5 - ((y - 21.3) ** 2 + (x - 33.7) ** 2).sqrt()
    low = torch.nn.functional.avg_pool2d(distance[None, None], 4)
    logits = torch.stack([logits_of((0.8, 0.1, 0.05, 0.05)), logits_of((0.1, 0.1, 0.05, 0.75))])
    outputs = {"pred_logits": logits, "pred_masks": low.expand(2, 1, 12, 16)}
    targets = pseudo_labels(outputs, min_area=0)
    fine, empty = full_res_masks(targets)
    assert fine["masks"].shape == (1, 48, 64) and empty["masks"].shape == (0, 48, 64)
    assert fine["masks"].dtype == torch.bool

    def iou(mask):
        return ((mask & (distance > 0)).sum() / (mask | (distance > 0)).sum()).item()

    coarse = targets[0]["masks"].repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert iou(fine["masks"]) > 0.93 > 0.87 > iou(coarse)
    outputs = {"pred_logits": logits[:1], "pred_masks": low}
    assert sum(SetCriterion(K, num_points=32)(outputs, [fine]).values()).isfinite()


@pytest.mark.parametrize("size", [16, 64])
def test_a_share_of_the_crop_is_the_same_at_every_size(size):
    """Objects of a quarter and of a sixteenth of the crop."""
    masks = torch.zeros(2, size, size, dtype=torch.bool)
    masks[0, : size // 2, : size // 2] = True
    masks[1, : size // 4, : size // 4] = True
    target = {"labels": torch.tensor([5, 6]), "masks": masks}
    assert [large_masks([target], s)[0]["labels"].tolist() for s in (0.01, 0.1, 0.25)] == [[5, 6], [5], []]
    assert clean_pseudo_labels([target], Config(min_area=0.1))[0]["labels"].tolist() == [5]
    nothing = {"labels": torch.zeros(0), "masks": masks[:0]}
    assert len(large_masks([nothing], 0.1)[0]["masks"]) == 0


def mixing_batch(stride, B=3, H=64, W=96):
    """Return images whose channels are the image number, row and column, and two masks per image, one of them
    a rectangle and the other the rest. Labels are unique in the batch."""
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    images = torch.stack([torch.stack([torch.full_like(y, b), y, x]) for b in range(B)]).to(torch.uint8)
    targets = []
    for b in range(B):
        mask = torch.zeros(H // stride, W // stride, dtype=torch.bool)
        mask[2:9, 3 + b : 12] = True
        targets.append({"labels": torch.tensor([2 * b, 2 * b + 1]), "masks": torch.stack([mask, ~mask])})
    return images, targets


@pytest.mark.parametrize("stride", [1, 4])
def test_cutmix_moves_pixels_and_masks_together(stride):
    """The first channel tells which image a pixel is from, and so which of the masks it must be in."""
    torch.manual_seed(0)
    images, targets = mixing_batch(stride)
    before = images.clone()
    pasted = 0
    for _ in range(20):
        mixed, results = cutmix(images, targets)
        assert torch.equal(images, before), "the views are not changed in place"
        for b, (image, result) in enumerate(zip(mixed, results)):
            assert torch.equal(image[1:], before[b, 1:]), "pixels keep their place"
            sources = image[0, ::stride, ::stride]
            assert set(sources.unique().tolist()) <= {b, (b + 1) % 3}, "nothing else leaks into an image"
            assert result["masks"].sum(0).eq(1).all(), "every pixel has one owner, as before"
            for label, mask in zip(result["labels"].tolist(), result["masks"]):
                original = targets[label // 2]["masks"][label % 2]
                assert torch.equal(mask, original & (sources == label // 2)) and mask.any()
            pasted += (sources != b).any().item()
    assert 15 < pasted < 45, "about half of the images"


def test_cutmix_of_a_single_image_and_of_nothing_changes_nothing():
    images, targets = mixing_batch(4, B=1)
    mixed, [result] = cutmix(images, targets, probability=1.0)
    assert torch.equal(mixed, images)
    for name in ("labels", "masks"):
        assert torch.equal(result[name], targets[0][name])
    nothing = [{"labels": t["labels"][:0], "masks": t["masks"][:0]} for t in targets]
    assert len(cutmix(images, nothing, probability=1.0)[1][0]["labels"]) == 0


@pytest.mark.parametrize("H, W", [(64, 64), (64, 96)])
def test_masks_turn_with_their_images(H, W):
    torch.manual_seed(0)
    images, targets = mixing_batch(1, B=8, H=H, W=W)
    for target, image in zip(targets, images):
        target["masks"] = image[1:2] > 20  # the rows below 20
    turned, results = turn(images, targets)
    for image, result in zip(turned, results):
        assert torch.equal(result["masks"], image[1:2] > 20)
    different = sum(not torch.equal(a, b) for a, b in zip(turned, images))
    assert 0 < different < 8 and turned.shape == images.shape


def test_mixing_is_off_by_default_and_follows_the_seed():
    images, targets = mixing_batch(4)
    unchanged = mix_views(images, targets, Config())
    assert unchanged[0] is images and unchanged[1] is targets
    torch.manual_seed(3)
    first = mix_views(images, targets, Config(strong_view="turn,cutmix"))
    torch.manual_seed(3)
    assert same(first, mix_views(images, targets, Config(strong_view="turn,cutmix")))
    assert not torch.equal(first[0], images)


def test_equal_masks_with_equal_scores_leave_one_pseudo_label():
    outputs = {
        "pred_logits": torch.tensor([9.0, 0, 0, 0]).expand(1, 2, -1),
        "pred_masks": torch.ones(1, 2, 8, 8),
    }
    [target] = mask_nms(pseudo_labels(outputs), 0.5)
    assert len(target["labels"]) == 1


def test_options_beyond_the_paper_are_off_by_default(make_model):
    with torch.inference_mode():
        outputs = make_model().eval()(255 * torch.rand(2, 3, 64, 96))
    targets = pseudo_labels(outputs, 0.3, 0)
    assert sum(len(target["labels"]) for target in targets) > 0
    assert clean_pseudo_labels(targets, Config()) is targets
    refined = clean_pseudo_labels(targets, Config(mask_nms_iou=0.2, full_res_masks=True))
    assert same(refined, full_res_masks(mask_nms(targets, 0.2)))


def test_no_gradient_flows_through_pseudo_labels():
    outputs = {
        "pred_logits": (9 * torch.eye(4)[None]).requires_grad_(),
        "pred_masks": torch.ones(1, 4, 6, 6, requires_grad=True),
    }
    [found] = pseudo_labels(outputs)
    assert len(found["labels"]) == 3
    assert not any(value.requires_grad for value in found.values())


def test_pseudo_labels_are_targets_of_the_criterion(make_model):
    """Masks at stride 4 cover the same area as pred_masks, so the criterion takes them without resizing."""
    tiny = make_model()
    outputs = tiny(255 * torch.rand(2, 3, 64, 96))
    targets = pseudo_labels(outputs, score_threshold=0.0, min_area=0)
    assert all(target["masks"].shape[1:] == (16, 24) for target in targets)
    assert sum(SetCriterion(K, num_points=32)(outputs, targets).values()).isfinite()


# ------------------------------------------------------------------------------------- the training steps


class Recorder:
    """Runs one step of a phase on fixed batches, and records what it used: models, losses, gradients."""

    def __init__(self, monkeypatch, make_model, phase, with_strong_view=True, num_images=2, **options):
        options = {"score_threshold": 0.34, "steps": (1, 1, 1), "clip_grad_norm": 0.0, "lr": 0.0, **options}
        self.cfg = Config(num_points=32, eval_every=0, **options)
        self.student, self.teacher = make_model(seed=1), make_model(seed=2).eval().requires_grad_(False)
        with torch.no_grad():
            self.teacher.decoder.class_head.bias[-1] -= 10  # hardly ever "no object"
        self.criterion = SetCriterion(K, num_points=32)
        self.seen = {"student": [], "teacher": []}
        for name, model in (("student", self.student), ("teacher", self.teacher)):
            model.register_forward_pre_hook(lambda _, args, name=name: self.seen[name].append(args[0]))
        self.teacher.register_forward_hook(lambda _, args, outputs: setattr(self, "outputs", outputs))
        self.x, u = batches(num_images)
        self.u = u if with_strong_view else {**u, "strong": u["image"]}
        data = SimpleNamespace(
            env=ENV,
            train=SimpleNamespace(class_names=["a", "b", "c"]),
            labeled_batches=lambda *_, **__: iter([self.x]),
            unlabeled_batches=lambda *_: iter([self.u]),
        )
        module = {"guided_burn_in": burnin, "distill": distill}[phase]
        models = iter([self.teacher] if phase == "guided_burn_in" else [self.student, self.teacher])
        checkpoint = {"model_args": {}, "optimizer": None}
        replacements = {
            "load_model": lambda *_: next(models),
            "build_model": lambda *_: self.student,
            "describe": lambda *_: {},
            "model_arguments": lambda *_: {},
            "load_teacher_checkpoint": lambda *_: checkpoint,
            "load_student_checkpoint": lambda *_: checkpoint,
            "load_moments": lambda *_: None,
            "Checkpointer": FakeCheckpointer,
            "Metrics": lambda *_: None,
            "log_guided_step": self.log,
            "evaluate_if_due": lambda *_: None,
            "finish_phase": lambda *_: None,
            "seed_step": lambda *_: self.before_step(),
            "GuardedStep": lambda *_: self.optimizer_step,
        }
        for name, replacement in replacements.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replacement)
        self.reads = None
        getattr(module, phase)(self.cfg, ENV, data, self.criterion)

    def before_step(self):
        torch.manual_seed(5)
        self.host = HostReads()
        if not self.cfg.compile:  # which would trace it too
            self.host.__enter__()

    def optimizer_step(self, where, losses, files):
        if not self.cfg.compile:
            self.host.__exit__(None, None, None)
        self.reads, self.losses, self.files = self.host.reads, losses, files
        return True

    def log(self, metrics, step, losses_x, losses_u, pseudo, *_):
        self.losses_x, self.losses_u, self.pseudo = losses_x, losses_u, pseudo


class FakeCheckpointer:
    def __init__(self, *_):
        pass

    def resume(self, _):
        return 0

    def save_if_due(self, _):
        pass


def batches(B=2, H=64, W=96, seed=0):
    """Return a labeled and an unlabeled batch."""
    generator = torch.Generator().manual_seed(seed)

    def images():
        return torch.randint(0, 256, (B, 3, H, W), generator=generator).to(torch.uint8)

    targets = [
        {"labels": torch.tensor([b, 2]), "masks": torch.rand(2, H, W, generator=generator) > 0.5}
        for b in range(B)
    ]
    x = {"image": images(), "targets": targets, "file": ["x.png"] * B}
    return x, {"image": images(), "strong": images(), "file": ["u.png"] * B}


class HostReads(TorchFunctionMode):
    """Counts the reads that would make a program wait for its GPU, of tensors that may lie there.

    Tensors made without a device or by .cpu(), and what is computed from these alone, lie on the host. Copies
    to the GPU are not counted."""

    READS = ("cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self):
        super().__init__()
        self.host, self.reads = {}, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_host = all(id(t) in self.host for t in tensors) and kwargs.get("device") is None
        by_mask = name in ("__getitem__", "__setitem__") and any(
            t.dtype == torch.bool for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)
        )
        if tensors and not on_host and (name in self.READS or by_mask):
            self.reads.append(name)
        result = function(*args, **kwargs)
        if name == "cpu":
            result = result.clone()  # on a CPU it was the same tensor
        if name == "cpu" or (on_host and name != "to"):
            self.host |= {id(t): t for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        return result


@pytest.fixture(params=["guided_burn_in", "distill"])
def run_step(request, monkeypatch, make_model):
    """run_step(**options) runs one step of phase 2 or 3; both are written out, so both are tested."""
    return lambda **options: Recorder(monkeypatch, make_model, request.param, **options)


def test_the_teacher_sees_the_weak_view_and_the_student_the_strong_view(run_step):
    step = run_step()
    assert len(step.seen["teacher"]) == 1 and torch.equal(step.seen["teacher"][0], step.u["image"])
    assert torch.equal(torch.cat(step.seen["student"]), torch.cat([step.x["image"], step.u["strong"]]))


def test_without_a_strong_view_the_student_sees_the_weak_view(run_step):
    step = run_step(with_strong_view=False)
    assert torch.equal(torch.cat(step.seen["student"])[2:], step.u["image"])


def test_the_student_gets_all_gradients_and_the_teacher_none(run_step):
    step = run_step()
    assert not any(value.requires_grad for value in step.outputs.values() if torch.is_tensor(value))
    assert all(parameter.grad is None for parameter in step.teacher.parameters())
    for name, parameter in step.student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_pseudo_labels_come_from_the_teachers_weak_view(run_step):
    step = run_step()
    expected = pseudo_labels(step.outputs, step.cfg.score_threshold, step.cfg.min_area)
    assert sum(len(target["labels"]) for target in expected) > 0
    for found, target in zip(step.pseudo, expected, strict=True):
        assert all(torch.equal(found[name], target[name]) for name in ("labels", "masks", "scores"))


def test_pseudo_labels_are_refined_as_the_options_say(run_step):
    step = run_step(mask_nms_iou=0.2, full_res_masks=True)
    expected = pseudo_labels(step.outputs, step.cfg.score_threshold, step.cfg.min_area)
    assert same(step.pseudo, full_res_masks(mask_nms(expected, 0.2)))


def test_both_losses_have_every_part_of_every_prediction(run_step):
    step = run_step()
    names = {f"loss_{part}{suffix}" for part in ("ce", "mask", "dice") for suffix in ("", "_0", "_1")}
    assert set(step.losses_x) == set(step.losses_u) == names
    assert set(step.losses) == names | {f"unlabeled_{name}" for name in names}
    assert all(value.isfinite() and value.ndim == 0 for value in step.losses.values())
    assert step.files == ["x.png"] * 2 + ["u.png"] * 2


def test_the_gradient_is_that_of_the_supervised_loss_plus_the_weighted_loss_on_pseudo_labels(
    run_step, make_model
):
    """Each computed as if its images had gone through the student alone, with the same random points."""
    step = run_step(unsupervised_weight=3.0)
    student = make_model(seed=1).train(step.student.training)
    torch.manual_seed(5)
    losses_x = step.criterion(student(step.x["image"]), step.x["targets"])
    losses_u = step.criterion(student(step.u["strong"]), step.pseudo)
    for name in losses_x:
        torch.testing.assert_close(step.losses_x[name], losses_x[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(step.losses_u[name], losses_u[name], rtol=1e-4, atol=1e-4)
    (sum(losses_x.values()) + 3.0 * sum(losses_u.values())).backward()
    for found, expected in zip(step.student.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("micro_batches, sizes", [(2, [3, 3]), (4, [2, 2, 2]), (9, [1] * 6)])
def test_micro_batches_have_the_losses_and_the_gradient_of_the_whole_batch(run_step, micro_batches, sizes):
    whole, parts = run_step(num_images=3), run_step(num_images=3, grad_accum_steps=micro_batches)
    assert sum(len(target["labels"]) for target in parts.pseudo) > 0
    seen = sorted(len(images) for images in parts.seen["student"])
    assert seen == sorted(2 * sizes), "each runs forward, and again for the backward pass"
    for name in whole.losses:
        torch.testing.assert_close(parts.losses[name], whole.losses[name], rtol=1e-4, atol=1e-4)
    for found, expected in zip(parts.student.parameters(), whole.student.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4)


@pytest.fixture
def graphs_only(monkeypatch):
    """torch.compile captures its graphs, forward and backward, but generates no code, which takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("micro_batches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_compiled_step_has_the_losses_and_the_gradient_of_an_eager_one(
    run_step, graphs_only, micro_batches
):
    eager = run_step(grad_accum_steps=micro_batches)
    compiled = run_step(grad_accum_steps=micro_batches, compile=True)
    assert sum(len(target["labels"]) for target in compiled.pseudo) > 0
    for name in eager.losses:
        torch.testing.assert_close(compiled.losses[name], eager.losses[name], rtol=1e-5, atol=0)
    assert relative_difference(compiled.student, eager.student) < 1e-5


def relative_difference(one, other):
    """Return how far the gradients of two models are apart, relative to the norm of the second."""
    one, other = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (one, other))
    return (one - other).norm() / other.norm()


def test_a_guided_step_reads_from_a_gpu_three_times(run_step):
    """Once for the number of pseudo-labels, and once for each of the two matchings."""
    assert run_step().reads == ["cpu", "cpu", "cpu"]


def test_the_criterion_reads_from_a_gpu_once(make_model):
    x, _ = batches()
    outputs = make_model()(x["image"])
    with HostReads() as host:
        sum(
            SetCriterion(K, num_points=32)(outputs, x["targets"], num_objects(x["targets"], ENV)).values()
        ).backward()
    assert host.reads == ["cpu"]


def test_reads_from_a_gpu_are_counted():
    mask, values = torch.ones(3, device="cpu") > 0, torch.ones(3, device="cpu")
    with HostReads() as host:
        values[mask], values.sum().item(), values.cpu().sum().item(), bool(values.sum() > 0)
        assert not values.cpu().sum() < 0
    assert host.reads == ["__getitem__", "item", "cpu", "__bool__", "cpu"]


def test_a_teacher_without_confident_predictions_gives_no_mask_loss(run_step):
    step = run_step(score_threshold=1.0)
    assert all(len(target["labels"]) == 0 for target in step.pseudo)
    for name, value in step.losses_u.items():
        assert (value == 0) == (not name.startswith("loss_ce")), name


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_the_teacher_of_phase_3_follows_the_student_after_each_step(monkeypatch, make_model, decay):
    start = copies(make_model(seed=2))
    start["decoder.class_head.bias"][-1] -= 10
    step = Recorder(monkeypatch, make_model, "distill", ema_decay=decay)
    for name, value in step.teacher.state_dict().items():
        expected = decay * start[name] + (1 - decay) * step.student.state_dict()[name]
        torch.testing.assert_close(value, expected.to(value.dtype))


def test_the_teacher_of_phase_2_is_frozen(monkeypatch, make_model):
    start = copies(make_model(seed=2))
    start["decoder.class_head.bias"][-1] -= 10
    assert same(dict(Recorder(monkeypatch, make_model, "guided_burn_in").teacher.state_dict()), start)


def test_a_skipped_step_leaves_the_teacher_alone(monkeypatch, make_model):
    monkeypatch.setattr(
        Recorder, "optimizer_step", lambda self, *_: self.host.__exit__(None, None, None) and False
    )
    step = Recorder(monkeypatch, make_model, "distill", ema_decay=0.0)
    assert not hasattr(step, "pseudo"), "nothing is logged"
    assert not torch.equal(step.teacher.decoder.class_head.bias, step.student.decoder.class_head.bias)


def test_a_skipped_first_step_keeps_the_statistics_of_the_resumed_checkpoint(monkeypatch, make_model):
    model = make_model(norm="batch")
    statistics = [m.running_mean for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert statistics

    class Resuming(FakeCheckpointer):
        def __init__(self, *_, **__):
            pass

        def resume(self, _):
            for mean in statistics:
                mean.fill_(7.0)
            return 0

    data = SimpleNamespace(labeled_batches=lambda *_, **__: iter([batches()[0]]))
    for name, value in {
        "Checkpointer": Resuming,
        "Metrics": lambda *_: None,
        "describe": lambda *_: {},
    }.items():
        monkeypatch.setattr(burnin, name, value)
    monkeypatch.setattr(burnin, "finish_phase", lambda *_, **__: None)
    nothing = {"loss_ce": torch.tensor(math.nan, requires_grad=True)}

    def criterion(outputs, *_):
        return {name: value * outputs["pred_logits"].sum() for name, value in nothing.items()}

    burnin.train_supervised(Config(steps=(1, 1, 1)), ENV, data, criterion, "teacher", 1, model)
    assert all(torch.equal(mean, torch.full_like(mean, 7.0)) for mean in statistics)


# ------------------------------------------------------------------------------- splitting and concatenating


def test_shared_tensors_are_concatenated_once(make_model):
    images = 255 * torch.rand(3, 3, 64, 64)
    model = make_model().eval()
    parts = [model(images[:1]), model(images[1:])]
    whole = concat_outputs(parts)
    assert all(p["mask_features"] is whole["mask_features"] for p in whole["aux_outputs"])
    assert len(whole["pred_logits"]) == 3 and len(whole["aux_outputs"]) == len(parts[0]["aux_outputs"])
    for b, part in enumerate(parts[0]["pred_masks"]):
        assert torch.equal(whole["pred_masks"][b], part)


def test_outputs_are_split_by_image(make_model):
    outputs = make_model()(255 * torch.rand(3, 3, 64, 64))
    first, others = split_outputs(outputs, 1)
    for whole, a, b in zip(
        [outputs, *outputs["aux_outputs"]], [first, *first["aux_outputs"]], [others, *others["aux_outputs"]]
    ):
        for name in ("pred_logits", "pred_masks"):
            assert torch.equal(a[name], whole[name][:1]) and torch.equal(b[name], whole[name][1:])


def test_micro_batched_returns_what_the_model_returns(make_model):
    model, images = make_model().eval(), 255 * torch.rand(3, 3, 64, 64)
    for name in ("pred_logits", "pred_masks"):
        torch.testing.assert_close(
            MicroBatched(model, 2)(images)[name], model(images)[name], rtol=1e-4, atol=1e-4
        )


def test_a_single_process_divides_by_its_own_objects():
    x, _ = batches()
    assert num_objects(x["targets"], ENV) == 4


# --------------------------------------------------------------------------------------- the EMA teacher


def network(seed):
    """Return a module with parameters, floating-point buffers and an integer buffer."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    module.train()(torch.randn(8, 4))
    return module


def copies(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9996, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_the_teacher_approaches_a_constant_student_in_closed_form(decay, steps):
    """After n steps the teacher is decay^n of its start plus 1 - decay^n of the student."""
    teacher, student = network(0).requires_grad_(False), network(1)
    start = copies(teacher)
    for _ in range(steps):
        ema_update(teacher, student, decay)
    for name, value in teacher.state_dict().items():
        target = student.state_dict()[name]
        if value.is_floating_point():
            left = decay**steps
            expected = left * start[name].double() + (1 - left) * target.double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_teacher_follows_a_moving_student():
    teacher, students = network(0).requires_grad_(False), [network(seed) for seed in range(1, 5)]
    expected = {name: value.double() for name, value in copies(teacher).items()}
    for student in students:
        ema_update(teacher, student, 0.9)
        for name, value in student.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value.double()
    for name, value in teacher.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_integer_buffers_are_copied(decay):
    teacher, student = network(0), network(1)
    student[1].num_batches_tracked += 41
    ema_update(teacher, student, decay)
    assert teacher[1].num_batches_tracked.item() == 42
    assert teacher[1].num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("decay, which", [(0.0, "student"), (1.0, "teacher")])
def test_decay_0_copies_the_student_and_decay_1_keeps_the_teacher(decay, which):
    teacher, student = network(0), network(1)
    expected = {"teacher": copies(teacher), "student": copies(student)}[which]
    ema_update(teacher, student, decay)
    for name, value in teacher.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, expected[name]), name


def test_the_teacher_never_requires_a_gradient_and_no_graph_grows():
    teacher, student = network(0).requires_grad_(False), network(1)
    before = copies(student)
    for _ in range(3):
        student(torch.randn(8, 4)).sum().backward()
        before = copies(student)
        ema_update(teacher, student, 0.9)
    for value in [*teacher.parameters(), *teacher.buffers()]:
        assert not value.requires_grad and value.grad_fn is None and value.grad is None
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in student.parameters())


def test_the_teacher_shares_no_memory_with_the_student(make_model):
    teacher, student = make_model(seed=0).requires_grad_(False), make_model(seed=1)
    ema_update(teacher, student, 0.0)
    kept = copies(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 1
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())


def test_a_teacher_of_another_architecture_is_an_error():
    with pytest.raises((ValueError, RuntimeError)):
        ema_update(network(0), nn.Linear(4, 5), 0.9)
