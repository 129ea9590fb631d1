"""Matching and loss: planted answers are found, and every number equals a plain formula."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import matcher
from matcher import HungarianMatcher, SetCriterion, sample_points

B, Q, K, LAYERS, P = 2, 4, 3, 2, 16  # LAYERS: predictions before the last one
MAP, SIZE = (5, 7), (20, 28)


def random_outputs(seed=0, layers=LAYERS, queries=Q, images=B, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def prediction():
        logits = torch.randn(images, queries, K + 1, generator=generator).to(dtype)
        masks = 3 * torch.randn(images, queries, *MAP, generator=generator).to(dtype)
        return {"pred_logits": logits.requires_grad_(), "pred_masks": masks.requires_grad_()}

    return {**prediction(), "aux_outputs": [prediction() for _ in range(layers)]}


def random_targets(counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "labels": torch.randint(0, K, (count,), generator=generator),
            "masks": torch.rand(count, *SIZE, generator=generator) > 0.5,
        }
        for count in counts
    ]


def leaves(outputs):
    predictions = [*outputs["aux_outputs"], outputs]
    return [prediction[name] for prediction in predictions for name in ("pred_logits", "pred_masks")]


@pytest.fixture
def drawn(monkeypatch):
    """Record the points that matcher and criterion draw: the results of torch.rand without a generator."""
    results, rand = [], torch.rand

    def record(*args, generator=None, **kwargs):
        if generator is not None:
            return rand(*args, generator=generator, **kwargs)
        results.append(rand(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(matcher.torch, "rand", record)
    return results


# ----------------------------------------------------------------------------------- plain formulas


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softmax(logits):
    exponentials = [math.exp(x) for x in logits]
    return [e / sum(exponentials) for e in exponentials]


def mask_terms(logits, mask):
    """Return mean binary cross-entropy and dice of two lists of values at the same points."""
    pairs = [(sigmoid(x), t) for x, t in zip(logits, mask)]
    bce = -sum(t * math.log(p) + (1 - t) * math.log(1 - p) for p, t in pairs) / len(pairs)
    dice = 1 - (2 * sum(p * t for p, t in pairs) + 1) / (sum(p for p, _ in pairs) + sum(mask) + 1)
    return bce, dice


def sample(values, points, bilinear):
    """Sample a map (H, W) at points (P, 2) in [0, 1]."""
    values = values.detach().double().numpy()
    H, W = values.shape
    return [float(bilinear(values, x * W - 0.5, y * H - 0.5)) for x, y in points.double().tolist()]


def costs_by_formulas(logits, masks, target, points, bilinear, weights=(2.0, 5.0, 5.0)):
    """Return the costs (Q, N) of one prediction of one image."""
    costs = np.zeros((len(logits), len(target["labels"])))
    for q, n in np.ndindex(costs.shape):
        probability = softmax(logits[q].tolist())[target["labels"][n]]
        terms = mask_terms(
            sample(masks[q], points, bilinear), sample(target["masks"][n].float(), points, bilinear)
        )
        costs[q, n] = np.dot(weights, (-probability, *terms))
    return costs


def cheapest_assignment(costs):
    """Return [(query, object)], queries ascending, found by trying all assignments."""
    Q, N = costs.shape
    if N <= Q:
        choices = ([(q, n) for n, q in enumerate(p)] for p in itertools.permutations(range(Q), N))
    else:
        choices = (list(enumerate(p)) for p in itertools.permutations(range(N), Q))
    return sorted(min(choices, key=lambda pairs: sum(costs[pair] for pair in pairs)))


def losses_by_loops(outputs, targets, drawn, bilinear, criterion, num_objects):
    """Compute the criterion's losses in float64, with the random points that it has drawn."""
    predictions = [*outputs["aux_outputs"], outputs]
    *matching_points, candidates, uniform = drawn
    total, weights = np.zeros((3, len(predictions))), np.zeros(len(predictions))  # of class, BCE, dice
    pair_number = 0
    for b, target in enumerate(targets):
        for t, prediction in enumerate(predictions):
            logits, masks = prediction["pred_logits"][b].detach(), prediction["pred_masks"][b].detach()
            costs = costs_by_formulas(logits, masks, target, matching_points[b], bilinear)
            pairs = cheapest_assignment(costs)
            classes = {q: int(target["labels"][n]) for q, n in pairs}
            for q in range(len(logits)):
                weight = 1.0 if q in classes else 0.1
                total[0, t] -= weight * math.log(softmax(logits[q].double().tolist())[classes.get(q, K)])
                weights[t] += weight
            for q, n in pairs:
                certainty = np.abs(sample(masks[q], candidates, bilinear))
                count = int(criterion.num_points * criterion.importance_sample_ratio)
                uncertain = candidates[np.argsort(certainty)[:count].tolist()]
                points = torch.cat([uncertain, uniform[pair_number]])
                truth = sample(target["masks"][n].float(), points, bilinear)
                total[1:, t] += mask_terms(sample(masks[q], points, bilinear), truth)
                pair_number += 1
    losses = {}
    for t in range(len(predictions)):
        suffix = f"_{t}" if t < len(predictions) - 1 else ""
        losses[f"loss_ce{suffix}"] = 2 * total[0, t] / weights[t]
        losses[f"loss_mask{suffix}"] = 5 * total[1, t] / num_objects
        losses[f"loss_dice{suffix}"] = 5 * total[2, t] / num_objects
    return losses


# ----------------------------------------------------------------------------------------- matching


def test_points_are_sampled_bilinearly_with_zeros_outside(bilinear):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, *MAP, generator=generator)
    points = 1.4 * torch.rand(2, 30, 2, generator=generator, dtype=torch.float64) - 0.2
    expected = [sample(maps[g], points[g], bilinear) for g in range(2)]
    torch.testing.assert_close(sample_points(maps, points), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_permutation_is_found(seed):
    """Queries that predict the targets' masks and classes in another order are matched in that order."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(5, 8, 8, generator=generator) > 0.5
    labels = torch.randint(0, K, (5,), generator=generator)
    order = torch.randperm(5, generator=generator)
    logits = torch.zeros(1, 5, K + 1)
    logits[0, torch.arange(5), labels[order]] = 5
    outputs = {"pred_logits": logits, "pred_masks": 20 * masks[order][None].float() - 10}
    [(query, target)] = HungarianMatcher(num_points=256)(outputs, [{"labels": labels, "masks": masks}])
    assert query.tolist() == [0, 1, 2, 3, 4] and target.tolist() == order.tolist()


@pytest.mark.parametrize("weights", [(2.0, 5.0, 5.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_costs_equal_plain_formulas(bilinear, weights):
    torch.manual_seed(0)
    outputs, [target] = random_outputs(images=1, layers=0), random_targets([3])
    logits, masks, points = outputs["pred_logits"], outputs["pred_masks"][0], torch.rand(P, 2)
    costs = HungarianMatcher(*weights).cost_matrix(logits, masks, None, target, points)
    expected = costs_by_formulas(logits[0], masks, target, points, bilinear, weights)
    np.testing.assert_allclose(costs[0].detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries, objects", [(4, 3), (4, 4), (3, 5), (5, 1), (2, 6)])
def test_the_assignment_has_the_lowest_cost_of_all(drawn, bilinear, queries, objects):
    torch.manual_seed(0)
    for seed in range(3):
        outputs = random_outputs(seed, images=1, layers=0, queries=queries)
        [target] = random_targets([objects], seed)
        [(query, found)] = HungarianMatcher(num_points=P)(outputs, [target])
        logits, masks = outputs["pred_logits"][0], outputs["pred_masks"][0]
        costs = costs_by_formulas(logits, masks, target, drawn[-1], bilinear)
        assert list(zip(query.tolist(), found.tolist())) == cheapest_assignment(costs)
        assert len(query) == min(queries, objects)
        assert query.dtype == found.dtype == torch.int64 and query.device.type == "cpu"


def test_images_without_objects_have_no_matches():
    pairs = HungarianMatcher(num_points=P)(random_outputs(), random_targets([0, 2]))
    assert [(len(query), len(target)) for query, target in pairs] == [(0, 0), (2, 2)]


# ------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (3, 0), (6, 1)])
def test_losses_equal_plain_loops_at_the_same_points(drawn, bilinear, counts):
    torch.manual_seed(0)
    outputs, targets = random_outputs(), random_targets(counts)
    criterion = SetCriterion(K, num_points=P)
    losses = criterion(outputs, targets)
    expected = losses_by_loops(outputs, targets, drawn, bilinear, criterion, sum(counts))
    assert set(losses) == set(expected)
    assert set(losses) == {
        f"loss_{name}{suffix}" for name in ("ce", "mask", "dice") for suffix in ("", "_0", "_1")
    }
    for name, value in losses.items():
        assert value.ndim == 0
        assert value.item() == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_costs_do_not_depend_on_the_chunks_they_are_computed_in(monkeypatch):
    torch.manual_seed(0)
    outputs, [target] = random_outputs(images=1, layers=0), random_targets([3])
    arguments = outputs["pred_logits"], outputs["pred_masks"][0], None, target, torch.rand(P, 2)
    together = HungarianMatcher().cost_matrix(*arguments)
    for points in (1, 3, P - 1):
        monkeypatch.setattr(matcher, "MAX_LOGITS_PER_CHUNK", {"cpu": points * Q})
        torch.testing.assert_close(HungarianMatcher().cost_matrix(*arguments), together)


@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (0, 0), (6, 1)])
def test_factored_masks_give_the_same_losses_and_gradients_as_their_product(counts):
    torch.manual_seed(0)
    C, targets, criterion = 8, random_targets(counts), SetCriterion(K, num_points=P)
    features = torch.randn(B, C, *MAP, requires_grad=True)
    embeds = [torch.randn(B, Q, C, requires_grad=True) for _ in range(LAYERS + 1)]
    logits = [torch.randn(B, Q, K + 1) for _ in embeds]
    results = []
    for product in (False, True):
        predictions = []
        for class_logits, embed in zip(logits, embeds):
            masks = {"mask_embed": embed, "mask_features": features}
            if product:
                masks = {"pred_masks": torch.einsum("bqc,bchw->bqhw", embed, features)}
            predictions.append({"pred_logits": class_logits, **masks})
        torch.manual_seed(1)
        losses = criterion({**predictions[-1], "aux_outputs": predictions[:-1]}, targets)
        grads = torch.autograd.grad(sum(losses.values()), [features, *embeds])
        results.append([*losses.values(), *grads])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_custom_matcher_may_give_an_object_several_queries(monkeypatch):
    """The mask losses of both pairs add up. The points are fixed."""
    outputs, targets = random_outputs(images=1, layers=0), random_targets([2])
    points = torch.rand(3 * P, 2)
    monkeypatch.setattr(matcher.torch, "rand", lambda *size, **_: points[: size[-2]].expand(size))
    losses = []
    for queries, objects in ([0], [1]), ([2], [1]), ([0, 2], [1, 1]):
        pairs = [[(torch.tensor(queries), torch.tensor(objects))]]
        matcher_ = SimpleNamespace(match=lambda *_, pairs=pairs: pairs)
        criterion = SetCriterion(K, num_points=P, matcher=matcher_)
        losses.append(criterion(outputs, targets, num_objects=1))
    for name in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(losses[0][name] + losses[1][name], losses[2][name])


def test_outputs_may_have_no_auxiliary_predictions():
    outputs = random_outputs(layers=0)
    del outputs["aux_outputs"]
    losses = SetCriterion(K, num_points=P)(outputs, random_targets([1, 2]))
    assert set(losses) == {"loss_ce", "loss_mask", "loss_dice"}


def test_weights_multiply_the_losses():
    outputs, targets, matcher_ = random_outputs(), random_targets([2, 3]), HungarianMatcher(num_points=P)
    torch.manual_seed(0)
    plain = SetCriterion(K, weight_class=1, weight_mask=1, weight_dice=1, num_points=P, matcher=matcher_)(
        outputs, targets
    )
    torch.manual_seed(0)
    weighted = SetCriterion(K, weight_class=3, weight_mask=4, weight_dice=7, num_points=P, matcher=matcher_)(
        outputs, targets
    )
    factor = {"loss_ce": 3, "loss_mask": 4, "loss_dice": 7}
    for name, value in weighted.items():
        torch.testing.assert_close(value, factor["_".join(name.split("_")[:2])] * plain[name])


def test_perfect_predictions_cost_almost_nothing():
    """A small loss remains at the edges of masks, where samples lie between both values."""
    side = 64
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    masks = torch.stack([x < side // 2, y >= side // 2, (x - 32) ** 2 + (y - 32) ** 2 < 400])
    labels = torch.tensor([2, 0, 1])
    logits = torch.full((1, 5, K + 1), -10.0)
    logits[0, [0, 1, 2, 3, 4], [K, 2, K, 0, 1]] = 10
    mask_logits = torch.full((1, 5, side, side), -10.0)
    mask_logits[0, [1, 3, 4]] = 20 * masks.float() - 10
    criterion = SetCriterion(K, num_points=2048, importance_sample_ratio=0.0)
    targets = [{"labels": labels, "masks": masks}]
    torch.manual_seed(0)
    perfect = criterion({"pred_logits": logits, "pred_masks": mask_logits}, targets)
    assert perfect["loss_ce"] < 1e-4
    assert perfect["loss_mask"] < 0.5 and perfect["loss_dice"] < 0.2
    wrong = criterion({"pred_logits": -logits, "pred_masks": -mask_logits}, targets)
    assert all(value > 10 * perfect[name] for name, value in wrong.items())


def test_batches_without_objects_have_no_mask_loss_but_all_gradients(make_model):
    tiny = make_model()
    empty = {"labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 64, 64, dtype=torch.bool)}
    losses = SetCriterion(K, num_points=P)(tiny(255 * torch.rand(2, 3, 64, 64)), [empty, empty])
    for name, value in losses.items():
        assert value.isfinite()
        assert (value == 0) == (not name.startswith("loss_ce")), name
    sum(losses.values()).backward()
    for name, parameter in tiny.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (9, 1), (0, 0)])
def test_all_outputs_have_finite_gradients_for_any_number_of_objects(counts):
    outputs = random_outputs()
    sum(SetCriterion(K, num_points=P)(outputs, random_targets(counts)).values()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves(outputs))


@pytest.mark.parametrize("given, used", [(None, 5), (5, 5), (2.5, 2.5), (10, 10), (0.25, 1), (0, 1)])
def test_num_objects_divides_the_mask_losses(given, used):
    """The default is the objects of the batch. At least 1 is used."""
    outputs, targets, criterion = random_outputs(), random_targets([2, 3]), SetCriterion(K, num_points=P)
    torch.manual_seed(0)
    of_one = criterion(outputs, targets, num_objects=1)
    torch.manual_seed(0)
    for name, value in criterion(outputs, targets, num_objects=given).items():
        expected = of_one[name] if name.startswith("loss_ce") else of_one[name] / used
        torch.testing.assert_close(value, expected)


def test_no_objects_and_a_no_object_weight_of_zero_give_zero_loss():
    losses = SetCriterion(K, num_points=P, no_object_weight=0.0)(random_outputs(), random_targets([0, 0]))
    assert all(value == 0 for value in losses.values())


def test_everything_runs_in_fp32_under_autocast():
    """Outputs may be bf16, but the arithmetic on them is the same with and without autocast."""
    outputs, targets = random_outputs(dtype=torch.bfloat16), random_targets([2, 3])
    criterion = SetCriterion(K, num_points=P)
    torch.manual_seed(0)
    expected = criterion(outputs, targets)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = criterion(outputs, targets)
        pairs = criterion.matcher(outputs, targets)
    assert [len(query) for query, _ in pairs] == [2, 3]
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name


def test_sampled_features_are_multiplied_in_fp32_under_autocast():
    torch.manual_seed(0)
    logits, maps, embed = torch.randn(1, Q, K + 1), torch.randn(8, *MAP), torch.randn(Q, 8)
    [target], points = random_targets([3]), torch.rand(P, 2)
    expected = HungarianMatcher().cost_matrix(logits, maps, embed, target, points)
    with torch.autocast("cpu", torch.bfloat16):
        found = HungarianMatcher().cost_matrix(logits, maps, embed, target, points)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.75, 1.0])
def test_points_of_the_loss_are_the_most_uncertain_candidates_and_uniform_ones(drawn, bilinear, share):
    torch.manual_seed(0)
    mask_logits = 3 * torch.randn(3, *MAP)
    criterion = SetCriterion(K, num_points=P, importance_sample_ratio=share)
    points = criterion.uncertain_points(mask_logits)
    candidates, uniform = drawn
    assert points.shape == (3, P, 2) and candidates.shape == (3 * P, 2)
    assert not points.requires_grad
    count = int(share * P)
    for g in range(3):
        certainty = np.abs(sample(mask_logits[g], candidates, bilinear))
        best = candidates[np.argsort(certainty)[:count].tolist()]
        assert sorted(points[g, :count].tolist()) == sorted(best.tolist())
    assert torch.equal(points[:, count:], uniform)


def test_the_order_of_targets_within_an_image_does_not_matter():
    outputs, targets = random_outputs(), random_targets([3, 4])
    shuffled = []
    for target, order in zip(targets, ([2, 0, 1], [3, 1, 0, 2])):
        shuffled.append({name: value[order] for name, value in target.items()})
    criterion = SetCriterion(K, num_points=P)
    torch.manual_seed(0)
    expected = criterion(outputs, targets)
    torch.manual_seed(0)
    for name, value in criterion(outputs, shuffled).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pred_logits", "pred_masks"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_outputs_are_matched_and_give_non_finite_losses(name, value, monkeypatch):
    """Training can then skip the step on all ranks. The solver never gets a NaN."""
    seen = []
    solve = matcher.linear_sum_assignment
    monkeypatch.setattr(matcher, "linear_sum_assignment", lambda cost: seen.append(cost) or solve(cost))
    outputs, targets = random_outputs(), random_targets([2, 3])
    outputs[name] = torch.full_like(outputs[name], value)
    pairs = HungarianMatcher(num_points=P)(outputs, targets)
    assert [len(query) for query, _ in pairs] == [2, 3]
    assert seen and all(np.isfinite(cost).all() for cost in seen)
    losses = SetCriterion(K, num_points=P)(outputs, targets)
    assert not sum(losses.values()).isfinite()
    del outputs["aux_outputs"]
    losses = SetCriterion(K, num_points=P)(outputs, targets)
    wrong = {loss for loss, value in losses.items() if not value.isfinite()}
    assert wrong and wrong <= ({"loss_ce"} if name == "pred_logits" else {"loss_mask", "loss_dice"})


def test_different_numbers_of_labels_and_masks_are_refused():
    [target] = random_targets([3])
    target["labels"] = target["labels"][:2]
    with pytest.raises(ValueError, match="2 labels for 3 masks"):
        SetCriterion(K, num_points=P)(random_outputs(images=1), [target])
