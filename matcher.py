"""Hungarian matching and the set loss of Mask2Former (Cheng et al., CVPR 2022, arXiv 2112.01527, sections
3.1, 3.3 and 4.1).

    criterion = SetCriterion(num_classes=80)
    losses = criterion(outputs, targets)    # {"loss_ce": ..., "loss_mask": ..., "loss_dice": ..., ...}
    sum(losses.values()).backward()

A query is one of the model's slots, which all predict a class and a mask, as in DETR (Carion et al., ECCV
2020, arXiv 2005.12872). Every query is matched to at most one object, by class probability and by the mask on
random points; matched queries learn that object's class and mask, the others "no object". The same holds for
the earlier predictions in "aux_outputs", one from each decoder layer (deep supervision). Masks are compared
on random points because all pixels would cost several times the memory (section 3.3). This file needs torch
and scipy and can be copied out alone. All of it runs in fp32, whatever autocast says, but for the
product of embeddings and features that gives the mask logits of matched queries, which has the precision of
the model's outputs. Where the paper is silent the numerics follow the official code
(facebookresearch/Mask2Former at 9b0651c).

Letters in shapes: B images, C channels, Q queries, K classes, N objects of one image, P points, H W pixels,
h w = H/4 W/4, T predictions (one a layer and one before them), G matched pairs over all predictions and
images. Points are (x, y) in [0, 1]."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

# Mask logits compared at once: 8 MB of fp32 stay in a CPU's cache; a GPU wants few large kernels.
AT_ONCE = {"cpu": 2**21, "cuda": 2**27}


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of maps (G, H, W) at points (G, P, 2), or (1, P, 2) for all, zero outside -> (G, P).
    Source: PointRend (arXiv 1912.08193), section 3.1."""
    grid = (2 * points[:, :, None] - 1).expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps[:, None].to(points.dtype), grid, align_corners=False)[:, 0, :, 0]


def sample_together(rows: Tensor, H: int, W: int, points: Tensor) -> Tensor:
    """Bilinear samples of C maps at the same points (P, 2), zero outside -> (P, C). rows: the maps pixel by
    pixel, (H * W, C); each sample is a sum of four of them."""
    index, shares = bilinear_taps(points, H, W)
    return F.embedding_bag(index, rows, per_sample_weights=shares, mode="sum")


def bilinear_taps(points: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
    """points (..., 2) in [0, 1] on a map of H x W pixels -> the four pixels around each, counted row by row,
    and their bilinear shares, zero for those outside the map: both (..., 4)."""
    pixels = points * torch.tensor([W, H]).to(points.device, non_blocking=True) - 0.5
    corner = pixels.floor()
    (x, y), (left, upper) = (pixels - corner).unbind(-1), corner.int().unbind(-1)
    x0, x1 = (1 - x) * (left >= 0), x * (left < W - 1)
    y0, y1 = (1 - y) * (upper >= 0), y * (upper < H - 1)
    left, right = left.clamp(min=0), (left + 1).clamp(max=W - 1)
    upper, lower = W * upper.clamp(min=0), W * (upper + 1).clamp(max=H - 1)
    index = torch.stack([upper + left, upper + right, lower + left, lower + right], dim=-1)
    return index, torch.stack([y0 * x0, y0 * x1, y1 * x0, y1 * x1], dim=-1)


class HungarianMatcher(nn.Module):
    """Finds for each image the one-to-one matching of queries to objects that costs least.

    The cost of a pair is cost_class * -p(class) + cost_mask * mean BCE + cost_dice * dice, the masks
    compared on num_points random points of the image, the same for all predictions."""

    def __init__(
        self,
        cost_class: float = 2.0,
        cost_mask: float = 5.0,
        cost_dice: float = 5.0,
        num_points: int = 12544,
    ):
        super().__init__()
        self.weights = cost_class, cost_mask, cost_dice
        self.num_points = num_points

    @torch.no_grad()
    def forward(self, outputs: dict, targets: list[dict]) -> list[tuple[Tensor, Tensor]]:
        """outputs: "pred_logits" (B, Q, K+1), "pred_masks" (B, Q, h, w) logits. targets: per image "labels"
        (N,) int64 in 0..K-1 and "masks" (N, H, W) bool, over the same area as pred_masks. In place of
        "pred_masks" there may be "mask_embed" (B, Q, C) and "mask_features" (B, C, h, w), whose product it
        is; all predictions of a model share the features.

        Returns per image (query, target): two int64 tensors of length min(Q, N) on the CPU; query ascends.
        """
        return self.match([outputs], targets)[0]

    @torch.no_grad()
    def match(self, predictions: list[dict], targets: list[dict]) -> list[list]:
        """The same for T predictions at once -> T lists of B pairs. All costs travel to the CPU in one
        copy."""
        costs = []  # B times (T, Q, N)
        for b, target in enumerate(targets):
            class_logits = torch.stack([p["pred_logits"][b] for p in predictions])
            if "mask_embed" in predictions[0]:
                maps = predictions[0]["mask_features"][b]
                embed = torch.cat([p["mask_embed"][b] for p in predictions])
            else:
                maps, embed = torch.cat([p["pred_masks"][b] for p in predictions]), None
            points = torch.rand(self.num_points, 2, device=maps.device)
            costs.append(self.costs(class_logits, maps, embed, target, points))
        flat = torch.cat([cost.flatten() for cost in costs]).cpu()
        flat = flat.nan_to_num(1e9, 1e9)  # of outputs that are not finite: the losses will show it
        costs = [part.view(cost.shape) for part, cost in zip(flat.split([c.numel() for c in costs]), costs)]
        pairs = [[linear_sum_assignment(cost[t].numpy()) for cost in costs] for t in range(len(predictions))]
        return [[tuple(torch.as_tensor(i, dtype=torch.int64) for i in pair) for pair in row] for row in pairs]

    def costs(self, class_logits, maps, embed, target, points) -> Tensor:
        """Of one image (section 4.1 has the weights): class logits (T, Q, K+1), points (P, 2), and the mask
        logits of all predictions, maps (T * Q, h, w), or embed (T * Q, C) and maps (C, h, w), whose product
        they are -> (T, Q, N)."""
        labels, masks = target["labels"], target["masks"]
        with torch.autocast(maps.device.type, enabled=False):
            rows = maps.float().flatten(1).T.contiguous()
            softplus, p_sum, t_sum, t_x, t_p = 0, 0, 0, 0, 0  # sums over the points
            at_once = AT_ONCE.get(maps.device.type, 2**21)
            for part in points.split(max(1, at_once // class_logits[:, :, 0].numel())):
                x = sample_together(rows, *maps.shape[1:], part)
                if embed is not None:  # sampling and the product with the queries' embeddings commute
                    x = x @ embed.float().T  # (P, T * Q)
                index, shares = bilinear_taps(part, *masks.shape[1:])
                t = (masks.flatten(1)[:, index] * shares).sum(2)  # (N, P)
                p = x.sigmoid()
                softplus, p_sum, t_sum = softplus + F.softplus(x).sum(0), p_sum + p.sum(0), t_sum + t.sum(1)
                t_x, t_p = t_x + t @ x, t_p + t @ p
            # As in DETR, the class cost is -p and not -log p. The BCE of logit x and target t is
            # softplus(x) - x * t.
            cost_class = -class_logits.float().softmax(-1)[:, :, labels]
            cost_mask = (softplus - t_x).T / len(points)
            cost_dice = 1 - ((2 * t_p + 1) / (p_sum + t_sum[:, None] + 1)).T
        weight_class, weight_mask, weight_dice = self.weights
        cost_masks = weight_mask * cost_mask + weight_dice * cost_dice  # (T * Q, N)
        return weight_class * cost_class + cost_masks.view_as(cost_class)


def all_predictions(outputs: dict) -> list[dict]:
    return [*outputs.get("aux_outputs", []), outputs]


class SetCriterion(nn.Module):
    """Mask2Former's loss: classification of every query, BCE and dice of the matched masks, for every
    prediction.

    num_classes: K. The weights are of the three losses and of the "no object" class within the first. Masks
    are compared on num_points points. The share importance_sample_ratio of these are the ones where the
    prediction is least certain, of oversample_ratio * num_points random candidates; the others are drawn
    apart (PointRend, section 3.1). matcher: anything with the method `match` of HungarianMatcher."""

    def __init__(
        self,
        num_classes: int,
        *,
        weight_class: float = 2.0,
        weight_mask: float = 5.0,
        weight_dice: float = 5.0,
        no_object_weight: float = 0.1,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        matcher: HungarianMatcher | None = None,
    ):
        super().__init__()
        self.weights = weight_class, weight_mask, weight_dice
        self.num_classes, self.num_points = num_classes, num_points
        self.oversample_ratio, self.importance_sample_ratio = oversample_ratio, importance_sample_ratio
        self.matcher = matcher or HungarianMatcher(weight_class, weight_mask, weight_dice, num_points)
        class_weights = torch.ones(num_classes + 1)
        class_weights[num_classes] = no_object_weight
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(
        self, outputs: dict, targets: list[dict], num_objects=None, pairs: list | None = None
    ) -> dict:
        """outputs: as `Mask2Former` returns them; targets: as for the matcher, and for objects that one is
        not sure of, in all images or none, "weights" (N,) of each object's losses and "pixel_weights" (N, H,
        W) of its mask BCE. num_objects: what the mask losses are divided by, by default the objects of this
        batch. With several processes, pass the mean over processes, a number or a tensor of one. At least 1
        is used. pairs: what `match` has found, if it has been asked already.

        Returns every loss times its weight, so that their sum is what is minimised: "loss_ce", "loss_mask",
        "loss_dice" of the last prediction, and with suffix _0, _1, ... those of aux_outputs. Images without
        objects are welcome: every output takes part."""
        for target in targets:
            if len(target["labels"]) != len(target["masks"]):
                raise ValueError(f"{len(target['labels'])} labels for {len(target['masks'])} masks")
        predictions = all_predictions(outputs)
        class_logits = torch.stack([prediction["pred_logits"] for prediction in predictions]).float()
        pairs = pairs or self.match(outputs, targets)
        num_objects = sum(len(t["labels"]) for t in targets) if num_objects is None else num_objects
        num_objects = torch.as_tensor(num_objects).clamp(min=1)

        with torch.autocast(class_logits.device.type, enabled=False):
            matched = self.matched(pairs, targets)
            most = max(matched[4].tolist(), default=-1) + 1  # pairs of one object
            layer, image, query, objects, earlier = matched.to(class_logits.device, non_blocking=True)
            labels = torch.cat([target["labels"] for target in targets])[objects]
            masks, weights, pixel_weights = (
                torch.cat([target[name] for target in targets]) if name in targets[0] else None
                for name in ("masks", "weights", "pixel_weights")
            )
            weights = None if weights is None else weights[objects]
            loss_ce = self.class_losses(class_logits, layer, image, query, labels, weights)  # (T,)
            T, numbers = len(predictions), [[len(query) for query, _ in images] for images in zip(*pairs)]
            mask_logits = self.matched_masks(predictions, query, numbers)
            mask_losses = self.mask_losses(mask_logits, masks, objects, earlier, most, pixel_weights)
            mask_losses = mask_losses if weights is None else mask_losses * weights  # (2, G)
            loss_mask, loss_dice = mask_losses.new_zeros(2, T).index_add(1, layer, mask_losses) / num_objects

        names = [f"_{t}" for t in range(T - 1)] + [""]
        losses = zip(("loss_ce", "loss_mask", "loss_dice"), self.weights, (loss_ce, loss_mask, loss_dice))
        return {f"{key}{name}": w * loss[t] for key, w, loss in losses for t, name in enumerate(names)}

    def matched(self, pairs, targets) -> Tensor:
        """(5, G) on the CPU: per matched pair its prediction, image, query, and object, counted over the
        batch, and how many earlier pairs have the same object; image after image."""
        starts = torch.tensor([0] + [len(target["labels"]) for target in targets]).cumsum(0)
        parts = [
            torch.stack([torch.full_like(query, t), torch.full_like(query, b), query, target + starts[b]])
            for b, images in enumerate(zip(*pairs))
            for t, (query, target) in enumerate(images)
        ]
        matched = torch.cat(parts, dim=1)
        objects, order = matched[3].sort(stable=True)
        earlier = torch.empty_like(objects)
        earlier[order] = torch.arange(len(objects)) - torch.searchsorted(objects, objects)
        return torch.cat([matched, earlier[None]])

    def matched_masks(self, predictions: list[dict], query: Tensor, numbers: list[list[int]]) -> Tensor:
        """(G, h, w) mask logits of the matched queries (G,), of which an image has numbers[b][t] in each
        prediction."""
        queries = iter(query.split([n for image in numbers for n in image]))
        chosen = [[(p, next(queries)) for p, _ in zip(predictions, image)] for image in numbers]
        if "mask_embed" not in predictions[0]:
            return torch.cat(
                [p["pred_masks"][b, q] for b, image in enumerate(chosen) for p, q in image]
            ).float()
        features = predictions[0]["mask_features"]
        rows = features.flatten(2).mT.unbind()  # B times (h * w, C), without a copy if channels are last
        embed = [torch.cat([p["mask_embed"][b, q] for p, q in image]) for b, image in enumerate(chosen)]
        mask_logits = torch.cat([e @ row.T for e, row in zip(embed, rows)])
        return mask_logits.float().unflatten(1, features.shape[2:])

    def match(self, outputs: dict, targets: list[dict]) -> list[list]:
        """The pairs of every prediction and image, with one copy to the CPU, all that is read from a GPU."""
        return self.matcher.match(all_predictions(outputs), targets)

    def class_losses(self, class_logits, layer, image, query, labels, object_weights):
        """(T,): cross-entropy over all queries of a prediction, the mean weighted by class; an object's times
        its weight."""
        classes = torch.full(class_logits.shape[:3], self.num_classes, device=class_logits.device)
        classes[layer, image, query] = labels
        weights = self.class_weights[classes]  # (T, B, Q)
        losses = F.cross_entropy(class_logits.flatten(0, 2), classes.flatten(), reduction="none")
        losses = weights * losses.view_as(weights)
        if object_weights is not None:
            matched = layer, image, query
            losses = losses.index_put(matched, losses[matched] * object_weights)
        return losses.sum((1, 2)) / weights.sum((1, 2)).clamp(min=1e-6)

    def mask_losses(self, mask_logits, masks, objects, earlier, most, pixel_weights=None):
        """(2, G): BCE and dice, on points, of mask_logits (G, h, w) with masks[objects].

        masks: of all objects of the batch, (N, H, W); objects: (G,) indices; earlier: (G,), each pair's
        number among those of its object, below `most`; pixel_weights (N, H, W): of the BCE."""

        def sampled(maps):  # (N, H, W) -> (G, P): each map once at all its points, and few of them as floats
            chunks = zip(maps.split(16), by_object.flatten(1, 2).split(16))
            values = torch.cat([sample_points(*chunk) for chunk in chunks])
            return values.view(by_object.shape[:3])[objects, earlier]

        points = self.uncertain_points(mask_logits.detach())
        x = sample_points(mask_logits, points)  # (G, P)
        by_object = points.new_zeros(len(masks), most, *points.shape[1:])
        by_object[objects, earlier] = points
        t = sampled(masks)
        bce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
        if pixel_weights is not None:
            bce = bce * sampled(pixel_weights)
        p = x.sigmoid()
        dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
        return torch.stack([bce.mean(1), dice])

    def uncertain_points(self, mask_logits):
        """(G, h, w) -> (G, P, 2): most points where the logit is closest to zero, the rest anywhere. The
        candidates are the same for all masks."""
        G, device = len(mask_logits), mask_logits.device
        candidates = torch.rand(int(self.num_points * self.oversample_ratio), 2, device=device)
        num_uncertain = int(self.num_points * self.importance_sample_ratio)
        uncertainty = -sample_points(mask_logits, candidates[None]).abs()
        points = candidates[uncertainty.topk(num_uncertain, dim=1, sorted=False).indices]
        return torch.cat([points, torch.rand(G, self.num_points - num_uncertain, 2, device=device)], dim=1)
