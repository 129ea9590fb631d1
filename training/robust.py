"""What goes beyond the paper: functions that clean pseudo-labels and that mix strong views. Each is an option
that is off in the recipe `paper`.

Letters in shapes: B images, N pseudo-labels of one image, H W pixels, h w = H W or H/4 W/4."""

import torch
from torch import Tensor

from model import resize
from training.config import Config

# --------------------------------------------------------------------------------------------- pseudo-labels


def clean_pseudo_labels(targets: list[dict], cfg: Config) -> list[dict]:
    """Apply the options beyond the paper to pseudo-labels, as `burnin.pseudo_labels` returns them."""
    if cfg.mask_nms_iou < 1:
        targets = mask_nms(targets, cfg.mask_nms_iou)
    if cfg.full_res_masks:
        targets = full_res_masks(targets)
    return large_masks(targets, cfg.min_area) if 0 < cfg.min_area < 1 else targets


def mask_nms(targets: list[dict], iou_threshold: float) -> list[dict]:
    """Remove pseudo-labels whose mask has an IoU above iou_threshold with one of a higher score, of any
    class (Fast NMS: YOLACT, Bolya et al., ICCV 2019, arXiv 1904.02689, section 3.3)."""
    kept = []
    for target in targets:
        flat, scores = target["masks"].flatten(1).float(), target["scores"]
        intersection, area = flat @ flat.T, flat.sum(1)
        union = area[:, None] + area - intersection  # (N, N)
        rank = scores.argsort(descending=True, stable=True).argsort()  # unique, also for equal scores
        suppressed = (rank < rank[:, None]) & (intersection > iou_threshold * union)
        kept.append(select(target, ~suppressed.any(1)))
    return kept


def full_res_masks(targets: list[dict]) -> list[dict]:
    """Threshold the masks of pseudo-labels after upsampling their logits to full resolution (N, H, W),
    which is finer for objects of few pixels (PL-DC, Lin et al., 2025, arXiv 2505.11075)."""
    size = [4 * side for side in targets[0]["mask_logits"].shape[1:]]
    upsampled = [resize(target["mask_logits"].float()[:, None], size)[:, 0] for target in targets]
    return [{**target, "masks": logits > 0} for target, logits in zip(targets, upsampled)]


def large_masks(targets: list[dict], min_share: float) -> list[dict]:
    """Keep masks that cover more than a share of the crop, in [0, 1), whatever its size."""
    return [select(t, t["masks"].float().mean((1, 2)) > min_share) for t in targets]


def select(target: dict, keep: Tensor) -> dict:
    """Keep some of the pseudo-labels of an image. keep: (N,) bool."""
    return {name: value[keep] for name, value in target.items()}


# ----------------------------------------------------------------------------------------------- strong views


def mix_views(images: Tensor, targets: list[dict], cfg: Config) -> tuple[Tensor, list[dict]]:
    """Turn and mix strong views (B, 3, H, W) together with their pseudo-labels, as --strong-view asks."""
    if "turn" in cfg.strong_view:
        images, targets = turn(images, targets)
    return cutmix(images, targets) if "cutmix" in cfg.strong_view else (images, targets)


def turn(images: Tensor, targets: list[dict]) -> tuple[Tensor, list[dict]]:
    """Turn each image and its masks by a random multiple of 90 degrees, or of 180 if it is not square."""
    step = 1 if images.shape[2] == images.shape[3] else 2
    turns = (step * torch.randint(0, 4 // step, (len(images),))).tolist()
    images = torch.stack([image.rot90(k, (1, 2)) for image, k in zip(images, turns)])
    return images, [{**t, "masks": t["masks"].rot90(k, (1, 2))} for t, k in zip(targets, turns)]


def cutmix(images: Tensor, targets: list[dict], probability: float = 0.5) -> tuple[Tensor, list[dict]]:
    """Paste a rectangle of the next image of the batch into some images, and the parts of its masks there
    (CutMix, Yun et al., ICCV 2019, arXiv 1905.04899; for segmentation French et al., BMVC 2020, arXiv
    1906.01916).

    Returns the images, and targets with "labels" and "masks" alone. Objects that are covered are dropped. A
    batch of one image has no other to paste."""
    B, _, H, W = images.shape
    mixed, results = images.clone(), []
    for b in range(B):
        own, other = targets[b], targets[(b + 1) % B]
        inside = torch.zeros(H, W, dtype=torch.bool, device=images.device)
        if B > 1 and torch.rand(()) < probability:
            # Corners are multiples of 4 pixels, because masks may have a stride of 4.
            h, w = (4 * int(side / 4 * (0.3 + 0.6 * torch.rand(()))) for side in (H, W))
            top, left = (4 * int(torch.randint(0, (side - n) // 4 + 1, ())) for side, n in ((H, h), (W, w)))
            inside[top : top + h, left : left + w] = True
        mixed[b] = torch.where(inside, images[(b + 1) % B], images[b])
        stride = H // own["masks"].shape[1]
        inside = inside[::stride, ::stride]
        masks = torch.cat([own["masks"] & ~inside, other["masks"] & inside])
        visible = masks.flatten(1).any(1)
        labels = torch.cat([own["labels"], other["labels"]])
        results.append({"labels": labels[visible], "masks": masks[visible]})
    return mixed, results
