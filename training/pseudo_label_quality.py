"""Pseudo-label quality, measured against the held-out annotations of unlabeled training images. These
annotations are never used for training."""

import textwrap

import torch
from torch import Tensor, nn

from data import AugmentedDataset, SkipDamaged, collate, stable_seed
from training.distributed import all_gather_list, rank, to_device, world_size
from training.run_data import Data


def match_pseudo_labels(pseudo: dict, target: dict, min_iou: float = 0.5) -> tuple[int, float]:
    """Count the correct pseudo-labels of an image, and sum their mask IoUs. A pseudo-label is correct if
    it has the class of an object and an IoU of at least min_iou with it, and no pseudo-label of a higher
    score has found that object.

    pseudo: of one image, as `pseudo_labels` returns it. target: "labels" (N,), "masks" (N, h, w) bool."""
    predicted, objects = (t["masks"].flatten(1).float() for t in (pseudo, target))
    intersection = predicted @ objects.T
    union = predicted.sum(1)[:, None] + objects.sum(1) - intersection
    ious = intersection / union.clamp(min=1)
    ious[pseudo["labels"][:, None] != target["labels"]] = 0
    correct, iou_sum = 0, 0.0
    for row in pseudo["scores"].argsort(descending=True) if len(objects) else ():
        iou, best = ious[row].max(0)
        if iou >= min_iou:
            correct, iou_sum = correct + 1, iou_sum + float(iou)
            ious[:, best] = 0
    return correct, iou_sum


@torch.no_grad()
def measure_pseudo_labels(predict, data: Data, num_images: int = 200) -> dict:
    """Measure a model's pseudo-labels on weak views of `num_images` training images, always the same ones.

    predict: from images (B, 3, H, W) uint8 to pseudo-labels, as `pseudo_labels` returns them.
    Returns "images"; "kept", pseudo-labels per image; "score", their mean score; and "classes", their class
    frequencies, beside "labeled_classes", those of the labeled images. If some unlabeled training images have
    annotations, also "precision", "recall" and "mask_iou" of the correct pseudo-labels, in percent
    (`match_pseudo_labels`)."""
    cfg, num_classes = data.cfg, data.num_classes
    # Without annotations an image may show objects that nobody has marked yet.
    held_out = [i for i in sorted(set(data.train.image_ids) - set(data.labeled)) if data.train.annotations(i)]
    dataset, ids = (data.train, held_out) if held_out else (data.unlabeled, data.unlabeled.image_ids)
    ids = sorted(ids, key=lambda i: stable_seed(cfg.seed, "held-out", i))[:num_images]
    views = SkipDamaged(AugmentedDataset(dataset, data.augmentation, labels=bool(held_out)), ids)
    shard = ids[rank() :: world_size()]
    # Images, pseudo-labels, sum of scores; objects, correct pseudo-labels, sum of their IoUs.
    sums, classes = torch.zeros(6, dtype=torch.float64), torch.zeros(num_classes, dtype=torch.float64)
    batch_size = cfg.batch // world_size()
    for first in range(0, len(shard), batch_size):
        items = [views[i, stable_seed(cfg.seed, "held-out", i)] for i in shard[first : first + batch_size]]
        items = [item for item in items if "image" in item]  # none if all images that were tried are damaged
        if not items:
            continue
        batch = collate(items)
        for b, pseudo in enumerate(predict(to_device(batch["image"], data.env))):
            pseudo = {name: value.cpu() for name, value in pseudo.items()}
            sums[:3] += torch.tensor([1, len(pseudo["labels"]), pseudo["scores"].sum()])
            classes += torch.bincount(pseudo["labels"], minlength=num_classes)
            if held_out:
                target = batch["targets"][b]
                stride = target["masks"].shape[1] // pseudo["masks"].shape[1]
                masks = nn.functional.avg_pool2d(target["masks"][:, None].float(), stride)[:, 0] > 0.5
                correct, ious = match_pseudo_labels(pseudo, {"labels": target["labels"], "masks": masks})
                sums[3:] += torch.tensor([len(masks), correct, ious])
    images, kept, scores, objects, correct, ious = sum(all_gather_list([sums])).tolist()
    labels = [label for image_id in data.labeled for label in data.train.labels(image_id)]
    counts = torch.bincount(torch.tensor(labels, dtype=torch.int64), minlength=num_classes)
    result = {"images": int(images), "kept": kept / max(1, images), "score": scores / max(1, kept)}
    result["classes"] = class_frequencies(sum(all_gather_list([classes])), data.train.class_names)
    result["labeled_classes"] = class_frequencies(counts, data.train.class_names)
    if held_out:
        result["precision"] = 100 * correct / max(1, kept)
        result["recall"] = 100 * correct / max(1, objects)
        result["mask_iou"] = 100 * ious / max(1, correct)
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
