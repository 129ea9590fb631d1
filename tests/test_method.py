"""The method itself: pseudo-labels, the guided step, the teacher that follows the student."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import engine
from burnin import guided_step, pseudo_labels, set_losses, split_outputs, supervised_step
from distill import ema_update
from matcher import SetCriterion

K = 3
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------- pseudo-labels


def logits_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def mask_of(area, size=(6, 8)):
    """Mask logits whose first `area` pixels are just above zero, the others at zero and below."""
    logits = torch.full(size, -3.0)
    logits.view(-1)[:area] = 1e-3
    logits.view(-1)[area : area + 10] = 0.0
    return logits


# Class probabilities, the last of "no object"; pixels of the mask; the label, or why it is dropped.
QUERIES = [
    ((0.90, 0.05, 0.03, 0.02), 12, 0),
    ((0.10, 0.75, 0.10, 0.05), 6, 1),  # one pixel more than min_area
    ((0.02, 0.03, 0.90, 0.05), 5, "min_area exactly"),
    ((0.02, 0.03, 0.90, 0.05), 0, "an empty mask"),
    ((0.01, 0.01, 0.01, 0.97), 20, "no object"),
    ((0.20, 0.60, 0.10, 0.10), 20, "not sure enough"),
    ((0.05, 0.05, 0.85, 0.05), 30, 2),
    ((0.05, 0.05, 0.85, 0.05), 30, 2),  # a duplicate, which is not suppressed
]


def test_pseudo_labels_are_what_the_teacher_is_sure_of():
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
def test_the_threshold_itself_is_not_enough(threshold, kept):
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


def test_a_mask_that_is_not_sure_enough_of_its_inside_is_left_out():
    """The mean mask probability inside: 0.9 and 0.6; what lies outside does not count."""
    inside = torch.tensor([0.9, 0.6]).logit()
    masks = torch.where(mask_of(6) > 0, inside[:, None, None], -9.0)
    outputs = {"pred_logits": torch.tensor([9.0, 0, 0, 0]).expand(1, 2, -1), "pred_masks": masks[None]}
    for threshold, kept in ((0.0, 2), (0.59, 2), (0.61, 1), (0.89, 1), (0.91, 0)):
        [found] = pseudo_labels(outputs, mask_threshold=threshold)
        assert len(found["labels"]) == kept, threshold


@pytest.mark.parametrize("max_overlap", [0.3, 0.5, 0.99, 1.0])
def test_of_pseudo_labels_that_overlap_the_best_stays(max_overlap):
    """By a loop over all pairs. Queries that are not kept anyway push out none."""
    torch.manual_seed(0)
    masks = torch.full((2, 30, 8, 8), -1.0)
    for mask in masks.flatten(0, 1):
        y, x = torch.randint(0, 4, (2,)).tolist()
        mask[y : y + 4, x : x + 4] = 1.0
    outputs = {"pred_logits": 4 * torch.randn(2, 30, 4), "pred_masks": masks}
    kept_anyway = pseudo_labels(outputs, min_area=0)
    found = pseudo_labels(outputs, min_area=0, max_overlap=max_overlap)
    for all_of_them, kept in zip(kept_anyway, found):
        expected = []
        for score, mask in zip(all_of_them["scores"], all_of_them["masks"]):
            ious = (all_of_them["masks"] & mask).sum((1, 2)) / (all_of_them["masks"] | mask).sum((1, 2))
            if not any(ious[all_of_them["scores"] > score] > max_overlap):
                expected.append(score.item())
        assert kept["scores"].tolist() == expected
        assert (len(expected) < len(all_of_them["scores"])) == (max_overlap < 1)


def test_fine_masks_are_the_teachers_at_full_resolution():
    """Of a disc 17 pixels wide, from logits that are its signed distance, a mean of 4 x 4 pixels each."""
    y, x = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    distance = 8.5 - ((y - 21.3) ** 2 + (x - 33.7) ** 2).sqrt()
    low = torch.nn.functional.avg_pool2d(distance[None, None], 4)
    logits = torch.stack([logits_of((0.8, 0.1, 0.05, 0.05)), logits_of((0.1, 0.1, 0.05, 0.75))])
    outputs = {"pred_logits": logits, "pred_masks": low.expand(2, 1, 12, 16)}
    [found, empty] = pseudo_labels(outputs, min_area=0, fine_masks=True, pixel_weights=True)
    assert found["masks"].shape == (1, 48, 64) and empty["masks"].shape == (0, 48, 64)
    assert found["masks"].dtype == torch.bool and found["pixel_weights"].shape == (1, 12, 16)

    def iou(mask):
        return ((mask & (distance > 0)).sum() / (mask | (distance > 0)).sum()).item()

    [coarse, _] = pseudo_labels(outputs, min_area=0)
    coarse = coarse["masks"].repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert iou(found["masks"]) > 0.93 > 0.87 > iou(coarse)
    outputs = {"pred_logits": logits[:1], "pred_masks": low}
    losses = SetCriterion(K, num_points=32)(outputs, [found])
    assert sum(losses.values()).isfinite()


def test_pseudo_labels_may_say_how_sure_the_teacher_is_of_object_and_pixel():
    probabilities = torch.linspace(0.05, 0.95, 48).view(1, 1, 6, 8)
    outputs = {"pred_logits": logits_of((0.8, 0.1, 0.05, 0.05))[None], "pred_masks": probabilities.logit()}
    [found] = pseudo_labels(outputs, pixel_weights=True, score_power=3)
    assert found["weights"].tolist() == pytest.approx([0.8**3], rel=1e-4)
    uncertainty = 1 - 2 * (probabilities[0] - 0.5).abs()
    torch.testing.assert_close(found["pixel_weights"], 1 - uncertainty)
    [found] = pseudo_labels(outputs)
    assert not {"weights", "pixel_weights"} & found.keys(), "not in the paper"


def test_no_gradient_flows_through_pseudo_labels():
    outputs = {
        "pred_logits": (9 * torch.eye(4)[None]).requires_grad_(),
        "pred_masks": torch.ones(1, 4, 6, 6, requires_grad=True),
    }
    [found] = pseudo_labels(outputs)
    assert len(found["labels"]) == 3
    assert not any(value.requires_grad for value in found.values())


def test_pseudo_labels_are_targets_of_the_criterion(make_model):
    """Masks at stride 4 cover what pred_masks cover, so that the losses take them as they are."""
    tiny = make_model()
    outputs = tiny(255 * torch.rand(2, 3, 64, 96))
    targets = pseudo_labels(outputs, score_threshold=0.0, min_area=0)
    assert all(target["masks"].shape[1:] == (16, 24) for target in targets)
    assert sum(SetCriterion(K, num_points=32)(outputs, targets).values()).isfinite()


# --------------------------------------------------------------------------------------- the guided step


class Spy(nn.Module):
    """Passes on what the model gives, and remembers what it was shown and gave."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen, self.outputs = model, [], []

    def forward(self, images):
        self.seen.append(images)
        self.outputs.append(self.model(images))
        return self.outputs[-1]


def batches(B=2, H=64, W=96, seed=0):
    """A labelled and an unlabelled batch."""
    generator = torch.Generator().manual_seed(seed)

    def image():
        return torch.randint(0, 256, (3, H, W), generator=generator).to(torch.uint8)

    labelled = [
        {
            "image": image(),
            "labels": torch.tensor([b, 2]),
            "masks": torch.rand(2, H, W, generator=generator) > 0.5,
        }
        for b in range(B)
    ]
    return labelled, [{"image": image(), "strong": image()} for _ in range(B)]


NOT_IN_THE_PAPER = {
    "mask_threshold": 0.0,
    "max_overlap": 1.0,
    "fine_masks": False,
    "pixel_weights": False,
    "score_power": 0.0,
}


@pytest.fixture
def step(make_model):
    """A guided step of a student and a teacher who finds something, with all that it used and returned."""
    torch.manual_seed(0)
    student, teacher = Spy(make_model(seed=1)), Spy(make_model(seed=2))
    with torch.no_grad():
        teacher.model.decoder.class_head.bias[-1] -= 10  # hardly ever "no object"
    labelled, unlabelled = batches()
    cfg = SimpleNamespace(score_threshold=0.34, min_area=5, **NOT_IN_THE_PAPER)
    criterion = SetCriterion(K, num_points=32)
    losses, guided_losses, targets = guided_step(student, teacher, criterion, labelled, unlabelled, cfg, CPU)
    return SimpleNamespace(
        student=student,
        teacher=teacher,
        criterion=criterion,
        labelled=labelled,
        unlabelled=unlabelled,
        cfg=cfg,
        losses=losses,
        guided_losses=guided_losses,
        targets=targets,
    )


def test_the_teacher_sees_the_weak_and_the_student_the_strong_view(step):
    weak, strong = (torch.stack([item[name] for item in step.unlabelled]) for name in ("image", "strong"))
    assert len(step.teacher.seen) == 1 and torch.equal(step.teacher.seen[0], weak)
    shown_to_student = torch.cat(step.student.seen)
    labelled = torch.stack([item["image"] for item in step.labelled])
    assert torch.equal(shown_to_student, torch.cat([labelled, strong]))


def test_without_a_strong_view_the_student_sees_the_weak_one(step):
    for item in step.unlabelled:
        del item["strong"]
    step.student.seen.clear()
    arguments = step.labelled, step.unlabelled, step.cfg, CPU
    guided_step(step.student, step.teacher, step.criterion, *arguments)
    weak = torch.stack([item["image"] for item in step.unlabelled])
    assert torch.equal(torch.cat(step.student.seen)[-len(weak) :], weak)


def test_the_teacher_gets_no_gradient_and_the_student_does(step):
    assert not any(
        value.requires_grad for value in step.teacher.outputs[0].values() if torch.is_tensor(value)
    )
    (sum(step.losses.values()) + 2 * sum(step.guided_losses.values())).backward()
    assert all(parameter.grad is None for parameter in step.teacher.parameters())
    for name, parameter in step.student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_pseudo_labels_are_those_of_the_teachers_weak_view(step):
    expected = pseudo_labels(step.teacher.outputs[0], step.cfg.score_threshold, step.cfg.min_area)
    assert sum(len(target["labels"]) for target in expected) > 0
    for found, target in zip(step.targets, expected, strict=True):
        assert all(torch.equal(found[name], target[name]) for name in ("labels", "masks", "scores"))


def test_both_losses_have_every_part_of_every_prediction(step):
    names = {f"loss_{part}{suffix}" for part in ("ce", "mask", "dice") for suffix in ("", "_0", "_1")}
    assert set(step.losses) == set(step.guided_losses) == names
    assert all(value.isfinite() and value.ndim == 0 for value in step.losses.values())


def test_the_guided_step_is_the_supervised_loss_and_the_loss_against_pseudo_labels(make_model, step):
    """Each as if its images had gone through the student alone, with the same random points."""
    student = step.student.model
    strong = torch.stack([item["strong"] for item in step.unlabelled])
    torch.manual_seed(5)
    losses, guided_losses, _ = guided_step(
        student, step.teacher, step.criterion, step.labelled, step.unlabelled, step.cfg, CPU
    )
    torch.manual_seed(5)
    outputs = student(torch.stack([item["image"] for item in step.labelled])), student(strong)
    pairs = [step.criterion.match(*both) for both in zip(outputs, (step.labelled, step.targets))]
    expected = step.criterion(outputs[0], step.labelled, pairs=pairs[0])
    guided_expected = step.criterion(outputs[1], step.targets, pairs=pairs[1])
    for name in losses:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(guided_losses[name], guided_expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts, sizes", [(2, [3, 3]), (4, [2, 2, 2]), (9, [1] * 6)])
def test_a_batch_in_parts_has_the_losses_and_the_gradient_of_the_whole(make_model, step, parts, sizes):
    labelled, unlabelled = batches(3)
    results = []
    for wrap in (lambda model: model, lambda model: engine.InParts(model, parts)):
        spy = Spy(make_model(seed=1))
        torch.manual_seed(5)
        losses, guided_losses, targets = guided_step(
            wrap(spy), step.teacher, step.criterion, labelled, unlabelled, step.cfg, CPU
        )
        (sum(losses.values()) + 2 * sum(guided_losses.values())).backward()
        results.append([*losses.values(), *guided_losses.values(), *(p.grad for p in spy.parameters())])
    assert sum(len(target["labels"]) for target in targets) > 0
    assert sorted(len(images) for images in spy.seen) == sorted(2 * sizes)  # forward, and again for backward
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_predictions_share_is_joined_once():
    parts = [{"x": torch.ones(n, 2), "rest": [{"y": torch.zeros(n)}]} for n in (1, 2)]
    for part in parts:
        part["rest"][0]["x"] = part["x"]
    whole = engine.join(parts)
    assert whole["x"].shape == (3, 2) and whole["rest"][0]["y"].shape == (3,)
    assert whole["x"] is whole["rest"][0]["x"]


class HostReads(TorchFunctionMode):
    """Counts what would make a program wait for results of its GPU: reading a tensor that is not known to be
    on the host. Known are tensors made without a device and by .cpu(), and what follows from these alone.
    Copies to the GPU are not counted."""

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


def test_a_guided_step_reads_from_a_gpu_twice(step):
    """For the pseudo-labels, whose number is needed, and for all matching of the step."""
    with HostReads() as host:
        guided_step(step.student, step.teacher, step.criterion, step.labelled, step.unlabelled, step.cfg, CPU)
    assert host.reads == ["cpu", "cpu"]


def test_a_supervised_step_reads_from_a_gpu_once(step):
    with HostReads() as host:
        losses = supervised_step(step.student, step.criterion, step.labelled, CPU)
        sum(losses.values()).backward()
    assert host.reads == ["cpu"]


def test_what_reads_from_a_gpu_is_counted():
    mask, values = torch.ones(3, device=CPU) > 0, torch.ones(3, device=CPU)
    with HostReads() as host:
        values[mask], values.sum().item(), values.cpu().sum().item(), bool(values.sum() > 0)
        assert not values.cpu().sum() < 0
    assert host.reads == ["__getitem__", "item", "cpu", "__bool__", "cpu"]


def test_a_teacher_that_is_sure_of_nothing_guides_to_no_mask(step):
    cfg = SimpleNamespace(score_threshold=1.0, min_area=5, **NOT_IN_THE_PAPER)
    _, guided_losses, targets = guided_step(
        step.student, step.teacher, step.criterion, step.labelled, step.unlabelled, cfg, CPU
    )
    assert all(len(target["labels"]) == 0 for target in targets)
    for name, value in guided_losses.items():
        assert (value == 0) == (not name.startswith("loss_ce")), name


def test_outputs_are_split_by_image(make_model):
    outputs = make_model()(255 * torch.rand(3, 3, 32, 32))
    first, others = split_outputs(outputs, 1)
    for whole, a, b in zip(
        [outputs, *outputs["aux_outputs"]], [first, *first["aux_outputs"]], [others, *others["aux_outputs"]]
    ):
        for name in ("pred_logits", "pred_masks"):
            assert torch.equal(a[name], whole[name][:1]) and torch.equal(b[name], whole[name][1:])


def test_alone_a_process_divides_by_its_own_objects(make_model):
    labelled, _ = batches()
    outputs = make_model()(torch.stack([item["image"] for item in labelled]))
    criterion = SetCriterion(K, num_points=32)
    torch.manual_seed(0)
    expected = criterion(outputs, labelled, num_objects=4)
    torch.manual_seed(0)
    for name, value in set_losses(criterion, outputs, labelled).items():
        torch.testing.assert_close(value, expected[name])


# --------------------------------------------------------------------------------------- the EMA teacher


def network(seed):
    """With parameters, a running mean and variance, and a whole number that counts batches."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    module.train()(torch.randn(8, 4))
    return module


def copies(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9996, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_the_teacher_follows_a_resting_student_in_closed_form(decay, steps):
    """After n steps: decay^n of what it was, 1 - decay^n of the student."""
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
def test_whole_numbers_are_copied(decay):
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


def test_a_teacher_of_another_form_is_an_error():
    with pytest.raises((ValueError, RuntimeError)):
        ema_update(network(0), nn.Linear(4, 5), 0.9)
