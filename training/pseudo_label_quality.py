"""Pseudo-label quality, measured against the held-out annotations of unlabeled training images. These
annotations are never used for training."""

import textwrap
from collections import Counter

import torch
from torch import Tensor, nn

from data import AugmentedDataset, SkipDamaged, collate, stable_seed
from training.distributed import all_gather_list, rank, to_device, world_size
from training.run_data import Data

# Sizes of objects: the largest share of the crop's area. 1 % is a tenth of its side, 10 % about a third.
SIZES = {"small": 0.01, "medium": 0.1, "large": 1.0}


def match_pseudo_labels(pseudo: dict, target: dict, min_iou: float = 0.5) -> dict[int, tuple[int, float]]:
    """Match the pseudo-labels of an image to its objects. A pseudo-label is correct if it has the class of
    an object and an IoU of at least min_iou with it, and no pseudo-label of a higher score has found that
    object.

    pseudo: of one image, as `pseudo_labels` returns it. target: "labels" (N,), "masks" (N, h, w) bool.
    Returns {pseudo-label: (object, mask IoU)} of the correct ones."""
    predicted, objects = (t["masks"].flatten(1).float() for t in (pseudo, target))
    intersection = predicted @ objects.T
    union = predicted.sum(1)[:, None] + objects.sum(1) - intersection
    ious = intersection / union.clamp(min=1)
    ious[pseudo["labels"][:, None] != target["labels"]] = 0
    matches = {}
    for row in pseudo["scores"].argsort(descending=True).tolist() if len(objects) else ():
        iou, best = ious[row].max(0)
        if iou >= min_iou:
            matches[row] = int(best), float(iou)
            ious[:, best] = 0
    return matches


def count_by_size(pseudo: dict, target: dict) -> Counter:
    """Count what the pseudo-labels of an image have found, as (name, size) and as (name, "all"): "pseudo",
    all pseudo-labels, and "right" by their own size; "objects", "found" and "iou", the sum of the mask IoUs,
    by the size of the object. Arguments: as of `match_pseudo_labels`."""
    sizes, objects = size_names(pseudo["masks"]), size_names(target["masks"])
    counts = Counter([("pseudo", size) for size in sizes] + [("objects", size) for size in objects])
    for row, (best, iou) in match_pseudo_labels(pseudo, target).items():
        counts["right", sizes[row]] += 1
        counts["found", objects[best]] += 1
        counts["iou", objects[best]] += iou
    for (name, _), count in list(counts.items()):
        counts[name, "all"] += count
    return counts


def size_names(masks: Tensor) -> list[str]:
    """Return the key of SIZES of each of the masks (N, h, w)."""
    limits = torch.tensor(list(SIZES.values()))
    shares = masks.flatten(1).float().mean(1)
    return [list(SIZES)[index] for index in torch.bucketize(shares, limits).tolist()]


def quality(counts: Counter, size: str) -> dict:
    """Return "objects", the number of objects of a size, and "precision", "recall" and "mask_iou" in percent,
    from sums of `count_by_size`."""

    def percent(part, whole):
        return 100 * counts[part, size] / max(1, counts[whole, size])

    return {
        "objects": counts["objects", size],
        "precision": percent("right", "pseudo"),
        "recall": percent("found", "objects"),
        "mask_iou": percent("iou", "found"),
    }


@torch.no_grad()
def measure_pseudo_labels(predict, data: Data, num_images: int = 200) -> dict:
    """Measure a model's pseudo-labels on weak views of `num_images` training images, always the same ones.

    predict: from images (B, 3, H, W) uint8 to pseudo-labels, as `pseudo_labels` returns them.
    Returns "images"; "kept", pseudo-labels per image; "score", their mean score; and "classes", their class
    frequencies, beside "labeled_classes", those of the labeled images. If some unlabeled training images have
    annotations, also "objects", "precision", "recall" and "mask_iou" of the correct pseudo-labels, in percent
    (`match_pseudo_labels`), and "sizes": the same for each of SIZES."""
    cfg, num_classes = data.cfg, data.num_classes
    # Without annotations an image may show objects that nobody has marked yet.
    held_out = [i for i in sorted(set(data.train.image_ids) - set(data.labeled)) if data.train.annotations(i)]
    dataset, ids = (data.train, held_out) if held_out else (data.unlabeled, data.unlabeled.image_ids)
    ids = sorted(ids, key=lambda i: stable_seed(cfg.seed, "held-out", i))[:num_images]
    views = SkipDamaged(AugmentedDataset(dataset, data.augmentation, labels=bool(held_out)), ids)
    shard = ids[rank() :: world_size()]
    sums, classes = torch.zeros(3, dtype=torch.float64), torch.zeros(num_classes, dtype=torch.float64)
    counts = Counter()
    batch_size = cfg.batch // world_size()
    for first in range(0, len(shard), batch_size):
        items = [views[i, stable_seed(cfg.seed, "held-out", i)] for i in shard[first : first + batch_size]]
        items = [item for item in items if "image" in item]  # none if all images that were tried are damaged
        if not items:
            continue
        batch = collate(items)
        for b, pseudo in enumerate(predict(to_device(batch["image"], data.env))):
            pseudo = {name: value.cpu() for name, value in pseudo.items()}
            sums += torch.tensor([1, len(pseudo["labels"]), pseudo["scores"].sum()])
            classes += torch.bincount(pseudo["labels"], minlength=num_classes)
            if held_out:
                target = batch["targets"][b]
                stride = target["masks"].shape[1] // pseudo["masks"].shape[1]
                masks = nn.functional.avg_pool2d(target["masks"][:, None].float(), stride)[:, 0] > 0.5
                counts += count_by_size(pseudo, {"labels": target["labels"], "masks": masks})
    images, kept, scores = sum(all_gather_list([sums])).tolist()
    labels = [label for image_id in data.labeled for label in data.train.labels(image_id)]
    labeled = torch.bincount(torch.tensor(labels, dtype=torch.int64), minlength=num_classes)
    result = {"images": int(images), "kept": kept / max(1, images), "score": scores / max(1, kept)}
    result["classes"] = class_frequencies(sum(all_gather_list([classes])), data.train.class_names)
    result["labeled_classes"] = class_frequencies(labeled, data.train.class_names)
    if held_out:
        counts = sum(all_gather_list([counts]), Counter())
        result |= quality(counts, "all") | {"sizes": {size: quality(counts, size) for size in SIZES}}
    return result


def class_frequencies(counts: Tensor, names: list[str]) -> dict:
    """Return {name: share}. Shares sum to 1, or are 0 if nothing was counted."""
    return dict(zip(names, (counts / counts.sum().clamp(min=1)).tolist()))


def format_quality(result: dict, max_classes: int = 5) -> list[str]:
    """Format what `measure_pseudo_labels` returns, in lines of at most 99 columns, with the classes whose
    frequencies differ most."""
    if not result["kept"]:
        return [f"  no pseudo-labels on {result['images']} images"]
    parts = [f"{result['kept']:.1f} per image", f"mean score {result['score']:.2f}"]
    if "precision" in result:
        parts += [f"{name} {result[name]:.1f}" for name in ("precision", "recall", "mask_iou")]
    pseudo, labeled = result["classes"], result["labeled_classes"]
    chosen = sorted(pseudo, key=lambda name: -abs(pseudo[name] - labeled[name]))[:max_classes]
    classes = [f"{name} {100 * pseudo[name]:.0f} ({100 * labeled[name]:.0f})" for name in chosen]
    texts = [
        f"pseudo-labels of {result['images']} images: {', '.join(parts)}".replace("mask_iou", "mask IoU"),
        f"their classes in percent (in labeled images): {', '.join(classes)}",
    ]
    kwargs = dict(width=99, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
    return [line for text in texts for line in textwrap.wrap(text, **kwargs)]
