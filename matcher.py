"""Hungarian matching and the set loss of Mask2Former (Cheng et al., CVPR 2022, arXiv 2112.01527, sections
3.1, 3.3 and 4.1).

    import torch
    from matcher import SetCriterion

    outputs = {
        "pred_logits": torch.randn(1, 100, 81, requires_grad=True),         # (B, Q, K+1) class logits
        "pred_masks": torch.randn(1, 100, 56, 80, requires_grad=True),      # (B, Q, h, w) mask logits
    }
    targets = [{"labels": torch.tensor([17]), "masks": torch.rand(1, 224, 320) > 0.5}]
    losses = SetCriterion(num_classes=80)(outputs, targets)
    assert set(losses) == {"loss_ce", "loss_mask", "loss_dice"}             # and those of "aux_outputs"
    sum(losses.values()).backward()

As in DETR (Carion et al., ECCV 2020, arXiv 2005.12872), every query predicts a class and a mask and is
matched to at most one object. Matched queries learn that object's class and mask, the others "no object".
The same holds for the predictions of the earlier decoder layers in "aux_outputs" (deep supervision).
Masks are compared on random points, because all pixels would need several times the memory (section 3.3).

This file needs torch and scipy and can be copied out alone. It computes in fp32 under autocast too,
except the product of mask embeddings and mask features, which has the precision of the model's outputs.
Where the paper is silent, numerics follow the official code (facebookresearch/Mask2Former at 9b0651c).

Letters in shapes: B images, C channels, Q queries, K classes, N objects of one image, P points, H W pixels,
h w = H/4 W/4, T predictions (one per layer and one before them), G matched pairs over all predictions and
images. Points are (x, y) in [0, 1]."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

# Mask logits compared in one chunk: 8 MB of fp32 stay in a CPU's cache, a GPU wants few large kernels.
MAX_LOGITS_PER_CHUNK = {"cpu": 2**21, "cuda": 2**27}


class HungarianMatcher(nn.Module):
    """Match queries to objects one to one, at minimum total cost per image.

    The cost of a pair is cost_class * -p(class) + cost_mask * mean BCE + cost_dice * dice. Masks are
    compared on num_points random points per image, the same for all queries and predictions."""

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
        """Match one prediction.

        Args:
            outputs: "pred_logits" (B, Q, K+1) and "pred_masks" (B, Q, h, w) logits. Instead of
                "pred_masks" it may hold their factors "mask_embed" (B, Q, C) and "mask_features" (B, C,
                h, w).
            targets: per image "labels" (N,) int64 in 0..K-1 and "masks" (N, H, W) bool, which cover the
                same area as pred_masks.

        Returns per image (queries, objects): two int64 tensors of length min(Q, N) on the CPU, queries
        ascending."""
        return self.match([outputs], targets)[0]

    @torch.no_grad()
    def match(self, predictions: list[dict], targets: list[dict]) -> list[list[tuple[Tensor, Tensor]]]:
        """Match T predictions, with a single copy from the GPU. Returns T lists of B pairs, as `forward`
        does."""
        if not targets:
            return [[] for _ in predictions]
        maps = predictions[0]["mask_features" if "mask_embed" in predictions[0] else "pred_masks"]
        points = torch.stack([torch.rand(self.num_points, 2, device=maps.device) for _ in targets])
        # The pixels around the points of all images at once: that takes a GPU a third fewer launches.
        sizes = {maps.shape[2:], *(target["masks"].shape[1:] for target in targets)}
        corners = {size: bilinear_corners(points, *size) for size in sizes}
        costs = []  # B times (T, Q, N)
        for b, target in enumerate(targets):
            class_logits = torch.stack([p["pred_logits"][b] for p in predictions])
            if "mask_embed" in predictions[0]:
                features = maps[b]  # the same for all predictions
                embed = torch.cat([p["mask_embed"][b] for p in predictions])
            else:
                features, embed = torch.cat([p["pred_masks"][b] for p in predictions]), None
            own = {size: (index[b], weights[b]) for size, (index, weights) in corners.items()}
            costs.append(self.cost_matrix(class_logits, features, embed, target, points[b], own))
        flat = torch.cat([cost.flatten() for cost in costs]).cpu()
        flat = flat.nan_to_num(1e9, 1e9)  # scipy refuses non-finite costs; the losses will show them
        costs = [part.view(cost.shape) for part, cost in zip(flat.split([c.numel() for c in costs]), costs)]
        pairs = [[linear_sum_assignment(cost[t].numpy()) for cost in costs] for t in range(len(predictions))]
        return [[tuple(torch.as_tensor(i, dtype=torch.int64) for i in pair) for pair in row] for row in pairs]

    def cost_matrix(self, class_logits, maps, embed, target, points, corners=None) -> Tensor:
        """Return the costs (T, Q, N) of one image.

        Args:
            class_logits: (T, Q, K+1). points: (P, 2).
            maps, embed: mask logits (T * Q, h, w) and None; or their factors (C, h, w) and (T * Q, C).
            corners: `bilinear_corners` of the points, by the size of maps and of masks; default: computed."""
        labels, masks = target["labels"], target["masks"]
        sizes = maps.shape[1:], masks.shape[1:]
        corners = corners or {size: bilinear_corners(points, *size) for size in sizes}
        (map_index, map_weights), (mask_index, mask_weights) = (corners[size] for size in sizes)
        with torch.autocast(maps.device.type, enabled=False):
            rows = maps.float().flatten(1).T.contiguous()
            softplus, p_sum, t_sum, t_x, t_p = 0, 0, 0, 0, 0  # sums over the points
            chunk = MAX_LOGITS_PER_CHUNK.get(maps.device.type, 2**21) // class_logits[:, :, 0].numel()
            for start in range(0, len(points), max(1, chunk)):
                part = slice(start, start + max(1, chunk))
                x = sample_rows(rows, map_index[part], map_weights[part])  # (P, T * Q) or (P, C)
                if embed is not None:  # sampling commutes with the product of embeddings and features
                    x = x @ embed.float().T  # (P, T * Q)
                t = (masks.flatten(1)[:, mask_index[part]] * mask_weights[part]).sum(2)  # (N, P)
                p = x.sigmoid()
                softplus, p_sum, t_sum = softplus + F.softplus(x).sum(0), p_sum + p.sum(0), t_sum + t.sum(1)
                t_x, t_p = t_x + t @ x, t_p + t @ p
            # As in DETR, the class cost is -p instead of -log p. The BCE of logit x and target t is
            # softplus(x) - x * t.
            cost_class = -class_logits.float().softmax(-1)[:, :, labels]  # (T, Q, N)
            cost_mask = (softplus - t_x).T / len(points)  # (T * Q, N)
            cost_dice = 1 - ((2 * t_p + 1) / (p_sum + t_sum[:, None] + 1)).T  # (T * Q, N)
        weight_class, weight_mask, weight_dice = self.weights
        cost_masks = weight_mask * cost_mask + weight_dice * cost_dice
        return weight_class * cost_class + cost_masks.view_as(cost_class)


class SetCriterion(nn.Module):
    """Compute Mask2Former's loss: classification of every query, BCE and dice of matched masks, for every
    prediction.

    Args:
        num_classes: K.
        weight_class, weight_mask, weight_dice: weights of the three losses, and of the costs of matching.
        no_object_weight: weight of "no object" in the class loss.
        num_points: points per mask. Of these, the fraction importance_sample_ratio are the most uncertain of
            oversample_ratio * num_points random candidates; the others are uniform (PointRend, section 3.1).
        matcher: an object with the method `match` of HungarianMatcher."""

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

    def forward(self, outputs: dict, targets: list[dict], num_objects=None) -> dict[str, Tensor]:
        """Compute all losses. Images without objects are allowed: every output takes part in the loss.

        Args:
            outputs: of `Mask2Former`; targets: as for HungarianMatcher.
            num_objects: divisor of the mask losses, at least 1 is used; default: the objects of this
                batch. With several processes pass their mean over processes, a number or a tensor.

        Returns every loss times its weight, so that their sum is minimized: "loss_ce", "loss_mask" and
        "loss_dice" of the last prediction, and with suffix _0, _1, ... those of aux_outputs."""
        for target in targets:
            if len(target["labels"]) != len(target["masks"]):
                raise ValueError(f"{len(target['labels'])} labels for {len(target['masks'])} masks")
        predictions = [*outputs.get("aux_outputs", []), outputs]
        class_logits = torch.stack([prediction["pred_logits"] for prediction in predictions]).float()
        pairs = self.matcher.match(predictions, targets)
        num_objects = sum(len(t["labels"]) for t in targets) if num_objects is None else num_objects
        num_objects = torch.as_tensor(num_objects).clamp(min=1)

        with torch.autocast(class_logits.device.type, enabled=False):
            indices = self.matched_indices(pairs, targets, num_queries=class_logits.shape[2])  # (4, G)
            max_repeats = max(indices[3].tolist(), default=-1) + 1  # pairs of one object
            layer, slot, objects, repeat = indices.to(class_logits.device, non_blocking=True)
            labels = torch.cat([target["labels"] for target in targets])[objects]
            masks = torch.cat([target["masks"] for target in targets])
            loss_ce = self.class_loss(class_logits, slot, labels)  # (T,)
            mask_logits = self.gather_mask_logits(predictions, slot, pairs)
            mask_losses = self.mask_losses(mask_logits, masks, objects, repeat, max_repeats)  # (2, G)
            T = len(predictions)
            loss_mask, loss_dice = mask_losses.new_zeros(2, T).index_add(1, layer, mask_losses) / num_objects

        suffixes = [f"_{t}" for t in range(T - 1)] + [""]
        losses = zip(("loss_ce", "loss_mask", "loss_dice"), self.weights, (loss_ce, loss_mask, loss_dice))
        # unbind(), because indexing has a backward pass for each element.
        rows = [(key, (weight * loss).unbind()) for key, weight, loss in losses]
        return {f"{key}{suffix}": value for key, row in rows for suffix, value in zip(suffixes, row)}

    def matched_indices(self, pairs, targets, num_queries: int) -> Tensor:
        """Return (4, G) on the CPU, image by image: each pair's prediction, its query (counted over all
        predictions and images) and its object (counted over the batch), and its number among the pairs of
        that object, of which there are up to T."""
        starts = torch.tensor([0] + [len(target["labels"]) for target in targets]).cumsum(0)
        parts = [
            torch.stack(
                [torch.full_like(query, t), (t * len(targets) + b) * num_queries + query, target + starts[b]]
            )
            for b, images in enumerate(zip(*pairs))
            for t, (query, target) in enumerate(images)
        ]
        matched = torch.cat(parts, dim=1)
        objects, order = matched[2].sort(stable=True)
        repeat = torch.empty_like(objects)
        repeat[order] = torch.arange(len(objects)) - torch.searchsorted(objects, objects)
        return torch.cat([matched, repeat[None]])

    def gather_mask_logits(self, predictions: list[dict], slot: Tensor, pairs) -> Tensor:
        """Return the mask logits (G, h, w) of the matched queries. slot: (G,), as in `matched_indices`.
        pairs: of `HungarianMatcher.match`."""
        if "mask_embed" not in predictions[0]:
            chosen = [
                (p, b, q) for b, images in enumerate(zip(*pairs)) for p, (q, _) in zip(predictions, images)
            ]
            return torch.cat([p["pred_masks"][b, q.to(slot.device)] for p, b, q in chosen]).float()
        features = predictions[0]["mask_features"]
        rows = features.flatten(2).mT.unbind()  # B times (h * w, C), without a copy if channels are last
        embed = torch.stack([p["mask_embed"] for p in predictions]).flatten(0, 2).index_select(0, slot)
        counts = [sum(len(queries) for queries, _ in images) for images in zip(*pairs)]
        mask_logits = torch.cat([e @ row.T for e, row in zip(embed.split(counts), rows)])
        return mask_logits.float().unflatten(1, features.shape[2:])

    def class_loss(self, class_logits, slot, labels) -> Tensor:
        """Return the cross-entropy (T,) over all queries of each prediction, a mean weighted by class."""
        classes = torch.full(class_logits.shape[:3], self.num_classes, device=class_logits.device)
        classes.view(-1)[slot] = labels
        weights = self.class_weights[classes]  # (T, B, Q)
        losses = F.cross_entropy(class_logits.flatten(0, 2), classes.flatten(), reduction="none")
        losses = weights * losses.view_as(weights)
        return losses.sum((1, 2)) / weights.sum((1, 2)).clamp(min=1e-6)

    def mask_losses(self, mask_logits, masks, objects, repeat, max_repeats) -> Tensor:
        """Return BCE and dice (2, G) of mask_logits (G, h, w) and masks[objects], on points.

        masks: of all objects of the batch, (N, H, W). objects: (G,). repeat: (G,), each pair's number
        among those of its object, below max_repeats."""
        points = self.uncertain_points(mask_logits.detach())  # (G, P, 2)
        x = sample_points(mask_logits, points)  # (G, P)
        # Each mask is sampled once at the points of all its pairs, a few masks at a time: they become
        # floats there.
        by_object = points.new_zeros(len(masks), max_repeats, *points.shape[1:])
        by_object[objects, repeat] = points
        chunks = zip(masks.split(16), by_object.flatten(1, 2).split(16))
        t = torch.cat([sample_points(*chunk) for chunk in chunks]).view(by_object.shape[:3])[objects, repeat]
        bce = F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(1)
        p = x.sigmoid()
        dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
        return torch.stack([bce, dice])

    def uncertain_points(self, mask_logits: Tensor) -> Tensor:
        """Return points (G, P, 2) for masks (G, h, w): mostly where the logit is closest to zero, the
        others uniform. The candidates are the same for all masks."""
        G, device = len(mask_logits), mask_logits.device
        candidates = torch.rand(int(self.num_points * self.oversample_ratio), 2, device=device)
        num_uncertain = int(self.num_points * self.importance_sample_ratio)
        uncertainty = -sample_points(mask_logits, candidates[None]).abs()
        points = candidates[uncertainty.topk(num_uncertain, dim=1, sorted=False).indices]
        return torch.cat([points, torch.rand(G, self.num_points - num_uncertain, 2, device=device)], dim=1)


# ------------------------------------------------------------------------------------------------- sampling


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Sample maps (G, H, W) bilinearly at points (G, P, 2), or (1, P, 2) for all maps; zero outside.
    Returns (G, P).
    Source: PointRend (Kirillov et al., CVPR 2020, arXiv 1912.08193), section 3.1."""
    grid = (2 * points[:, :, None] - 1).expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps[:, None].to(points.dtype), grid, align_corners=False)[:, 0, :, 0]


def sample_rows(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sample C maps bilinearly at the same points, zero outside. rows: the maps pixel by pixel, (H * W, C).
    index, weights: of `bilinear_corners`, (P, 4).
    Returns (P, C). Each sample is a weighted sum of four rows, which is faster than grid_sample."""
    return F.embedding_bag(index, rows, per_sample_weights=weights, mode="sum")


def bilinear_corners(points: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
    """Return the four pixels around each of the points (..., 2), counted row by row in a map of H x W
    pixels, and their bilinear weights, zero for those outside the map: both (..., 4)."""
    pixels = points * torch.tensor([W, H]).to(points.device, non_blocking=True) - 0.5
    corner = pixels.floor()
    (x, y), (left, upper) = (pixels - corner).unbind(-1), corner.int().unbind(-1)
    x0, x1 = (1 - x) * (left >= 0), x * (left < W - 1)
    y0, y1 = (1 - y) * (upper >= 0), y * (upper < H - 1)
    left, right = left.clamp(min=0), (left + 1).clamp(max=W - 1)
    upper, lower = W * upper.clamp(min=0), W * (upper + 1).clamp(max=H - 1)
    index = torch.stack([upper + left, upper + right, lower + left, lower + right], dim=-1)
    return index, torch.stack([y0 * x0, y0 * x1, y1 * x0, y1 * x1], dim=-1)
