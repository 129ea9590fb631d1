"""Matching and loss: planted answers are found, and every number equals a plain formula."""

import itertools
import math

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
    """The points that the matcher and the criterion draw: the results of torch.rand without a generator."""
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


def mask_terms(logits, mask, sure=None):
    """Mean binary cross-entropy, weighted by how sure one is of each, and dice of two lists of values at the
    same points."""
    pairs, sure = [(sigmoid(x), t) for x, t in zip(logits, mask)], sure or [1.0] * len(mask)
    terms = [t * math.log(p) + (1 - t) * math.log(1 - p) for p, t in pairs]
    bce = -sum(s * term for s, term in zip(sure, terms)) / len(pairs)
    dice = 1 - (2 * sum(p * t for p, t in pairs) + 1) / (sum(p for p, _ in pairs) + sum(mask) + 1)
    return bce, dice


def sample(values, points, bilinear):
    """A (H, W) map at points (P, 2) in [0, 1]."""
    values = values.detach().double().numpy()
    H, W = values.shape
    return [float(bilinear(values, x * W - 0.5, y * H - 0.5)) for x, y in points.double().tolist()]


def costs_by_formulas(logits, masks, target, points, bilinear, weights=(2.0, 5.0, 5.0)):
    """(Q, N) of one prediction of one image."""
    costs = np.zeros((len(logits), len(target["labels"])))
    for q, n in np.ndindex(costs.shape):
        probability = softmax(logits[q].tolist())[target["labels"][n]]
        terms = mask_terms(
            sample(masks[q], points, bilinear), sample(target["masks"][n].float(), points, bilinear)
        )
        costs[q, n] = np.dot(weights, (-probability, *terms))
    return costs


def cheapest_assignment(costs):
    """By trying all: [(query, target)], queries ascending."""
    Q, N = costs.shape
    if N <= Q:
        choices = ([(q, n) for n, q in enumerate(p)] for p in itertools.permutations(range(Q), N))
    else:
        choices = (list(enumerate(p)) for p in itertools.permutations(range(N), Q))
    return sorted(min(choices, key=lambda pairs: sum(costs[pair] for pair in pairs)))


def losses_by_loops(outputs, targets, drawn, bilinear, criterion, num_objects):
    """The criterion's losses, in float64, with the random points that it has drawn."""
    predictions = [*outputs["aux_outputs"], outputs]
    *matching_points, candidates, anywhere = drawn
    total, weights = np.zeros((3, len(predictions))), np.zeros(len(predictions))  # of class, BCE, dice
    pair_number = 0
    for b, target in enumerate(targets):
        for t, prediction in enumerate(predictions):
            logits, masks = prediction["pred_logits"][b].detach(), prediction["pred_masks"][b].detach()
            costs = costs_by_formulas(logits, masks, target, matching_points[b], bilinear)
            pairs = cheapest_assignment(costs)
            classes = {q: int(target["labels"][n]) for q, n in pairs}
            object_weights = target.get("weights", torch.ones(len(target["labels"]))).tolist()
            for q in range(len(logits)):
                weight = 1.0 if q in classes else 0.1
                sure = object_weights[dict(pairs)[q]] if q in classes else 1.0
                total[0, t] -= (
                    sure * weight * math.log(softmax(logits[q].double().tolist())[classes.get(q, K)])
                )
                weights[t] += weight
            for q, n in pairs:
                certainty = np.abs(sample(masks[q], candidates, bilinear))
                count = int(criterion.num_points * criterion.importance_sample_ratio)
                least_certain = candidates[np.argsort(certainty)[:count].tolist()]
                points = torch.cat([least_certain, anywhere[pair_number]])
                truth = sample(target["masks"][n].float(), points, bilinear)
                sure = "pixel_weights" in target and sample(target["pixel_weights"][n], points, bilinear)
                terms = mask_terms(sample(masks[q], points, bilinear), truth, sure)
                total[1:, t] += object_weights[n] * np.array(terms)
                pair_number += 1
    losses = {}
    for t in range(len(predictions)):
        suffix = f"_{t}" if t < len(predictions) - 1 else ""
        losses[f"loss_ce{suffix}"] = 2 * total[0, t] / weights[t]
        losses[f"loss_mask{suffix}"] = 5 * total[1, t] / num_objects
        losses[f"loss_dice{suffix}"] = 5 * total[2, t] / num_objects
    return losses


# ----------------------------------------------------------------------------------------- matching


def test_points_are_sampled_bilinearly_and_zero_lies_outside(bilinear):
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
    costs = HungarianMatcher(*weights).costs(logits, masks, None, target, points)
    expected = costs_by_formulas(logits[0], masks, target, points, bilinear, weights)
    np.testing.assert_allclose(costs[0].detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries, objects", [(4, 3), (4, 4), (3, 5), (5, 1), (2, 6)])
def test_the_assignment_is_the_cheapest_of_all(drawn, bilinear, queries, objects):
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


def test_images_without_objects_are_matched_with_nothing():
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


@pytest.mark.parametrize("names", [["weights"], ["pixel_weights"], ["weights", "pixel_weights"]])
def test_weights_of_objects_and_of_their_pixels_enter_as_in_plain_loops(drawn, bilinear, names):
    torch.manual_seed(0)
    outputs, targets = random_outputs(), random_targets([2, 3])
    for target in targets:
        shapes = {"weights": target["labels"].shape, "pixel_weights": target["masks"].shape}
        target |= {name: torch.randn(shapes[name]).sigmoid() for name in names}
    criterion = SetCriterion(K, num_points=P)
    losses = criterion(outputs, targets)
    expected = losses_by_loops(outputs, targets, drawn, bilinear, criterion, 5)
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_an_object_of_weight_0_is_as_if_its_query_learned_nothing():
    """Neither class nor mask; and it is no reason to call the query "no object"."""
    torch.manual_seed(0)
    outputs, targets = random_outputs(images=1, layers=0), random_targets([1])
    outputs = {
        name: value.detach().requires_grad_() for name, value in outputs.items() if name != "aux_outputs"
    }
    criterion = SetCriterion(K, num_points=P)
    pairs = criterion.match(outputs, targets)
    [[(query, _)]] = pairs
    targets[0]["weights"] = torch.zeros(1)
    sum(criterion(outputs, targets, pairs=pairs).values()).backward()
    assert not outputs["pred_masks"].grad.any() and not outputs["pred_logits"].grad[0, query].any()
    assert outputs["pred_logits"].grad.any(), "the other queries learn that they have no object"


def test_costs_of_some_points_after_others_are_those_of_all_at_once(monkeypatch):
    """What stays in the cache is a matter of speed alone."""
    torch.manual_seed(0)
    outputs, [target] = random_outputs(images=1, layers=0), random_targets([3])
    arguments = outputs["pred_logits"], outputs["pred_masks"][0], None, target, torch.rand(P, 2)
    together = HungarianMatcher().costs(*arguments)
    for points in (1, 3, P - 1):
        monkeypatch.setattr(matcher, "AT_ONCE", {"cpu": points * Q})
        torch.testing.assert_close(HungarianMatcher().costs(*arguments), together)


@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (0, 0), (6, 1)])
def test_masks_as_embeddings_and_features_give_the_same_as_their_product(counts):
    """Losses, assignments and gradients."""
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


def test_an_object_may_have_several_queries(monkeypatch):
    """With a matcher of one's own: the mask losses of both pairs add up. The points are fixed."""
    outputs, targets = random_outputs(images=1, layers=0), random_targets([2])
    points = torch.rand(3 * P, 2)
    monkeypatch.setattr(matcher.torch, "rand", lambda *size, **_: points[: size[-2]].expand(size))
    criterion, losses = SetCriterion(K, num_points=P), []
    for queries, objects in ([0], [1]), ([2], [1]), ([0, 2], [1, 1]):
        pairs = [[(torch.tensor(queries), torch.tensor(objects))]]
        losses.append(criterion(outputs, targets, num_objects=1, pairs=pairs))
    for name in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(losses[0][name] + losses[1][name], losses[2][name])


def test_outputs_without_auxiliary_predictions_are_welcome():
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
    """Only at the edges of masks, where pixels are half in and half out, something is left."""
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


def test_batches_without_any_object_have_no_mask_loss_but_every_gradient(make_model):
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
def test_all_outputs_have_finite_gradients_whatever_the_number_of_objects(counts):
    outputs = random_outputs()
    sum(SetCriterion(K, num_points=P)(outputs, random_targets(counts)).values()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves(outputs))


@pytest.mark.parametrize("given, used", [(None, 5), (5, 5), (2.5, 2.5), (10, 10), (0.25, 1), (0, 1)])
def test_num_objects_divides_the_mask_losses(given, used):
    """By default the objects of the batch; at least 1."""
    outputs, targets, criterion = random_outputs(), random_targets([2, 3]), SetCriterion(K, num_points=P)
    torch.manual_seed(0)
    of_one = criterion(outputs, targets, num_objects=1)
    torch.manual_seed(0)
    for name, value in criterion(outputs, targets, num_objects=given).items():
        expected = of_one[name] if name.startswith("loss_ce") else of_one[name] / used
        torch.testing.assert_close(value, expected)


def test_nothing_to_learn_is_a_loss_of_zero():
    """ "No object" weighs nothing, and there is no object."""
    losses = SetCriterion(K, num_points=P, no_object_weight=0.0)(random_outputs(), random_targets([0, 0]))
    assert all(value == 0 for value in losses.values())


def test_everything_runs_in_fp32_under_autocast():
    """bf16 outputs are taken as they are; the arithmetic on them does not change."""
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
    expected = HungarianMatcher().costs(logits, maps, embed, target, points)
    with torch.autocast("cpu", torch.bfloat16):
        found = HungarianMatcher().costs(logits, maps, embed, target, points)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.75, 1.0])
def test_the_points_of_the_loss_are_the_least_certain_candidates_and_some_others(drawn, bilinear, share):
    torch.manual_seed(0)
    mask_logits = 3 * torch.randn(3, *MAP)
    criterion = SetCriterion(K, num_points=P, importance_sample_ratio=share)
    points = criterion.uncertain_points(mask_logits)
    candidates, anywhere = drawn
    assert points.shape == (3, P, 2) and candidates.shape == (3 * P, 2)
    assert not points.requires_grad
    count = int(share * P)
    for g in range(3):
        certainty = np.abs(sample(mask_logits[g], candidates, bilinear))
        best = candidates[np.argsort(certainty)[:count].tolist()]
        assert sorted(points[g, :count].tolist()) == sorted(best.tolist())
    assert torch.equal(points[:, count:], anywhere)


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
def test_outputs_that_are_not_finite_are_matched_and_their_losses_tell(name, value, monkeypatch):
    """So that all processes of a job can leave out the step together. The solver never sees a NaN."""
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


def test_labels_and_masks_of_unequal_number_are_refused():
    [target] = random_targets([3])
    target["labels"] = target["labels"][:2]
    with pytest.raises(ValueError, match="2 labels for 3 masks"):
        SetCriterion(K, num_points=P)(random_outputs(images=1), [target])
