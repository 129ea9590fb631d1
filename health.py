"""How good pseudo-labels are: by the labels of training images that are not in the labelled split, from which
nothing learns."""

import textwrap

import torch
from torch import Tensor, nn

import engine
from data import Replacing, Views, seed_of
from evaluate import gather


def count_right(pseudo: dict, truth: dict, least_iou: float = 0.5) -> tuple[int, float]:
    """How many pseudo-labels of an image are right, and the sum of their mask IoUs. Right is one that has the
    class of an object and an IoU of least_iou with it, if no pseudo-label of a higher score has found it.

    pseudo: of an image, as `pseudo_labels` returns it. truth: "labels" (N,), "masks" (N, h, w) bool."""
    found, objects = (t["masks"].flatten(1).float() for t in (pseudo, truth))
    common = found @ objects.T
    ious = common / (found.sum(1)[:, None] + objects.sum(1) - common).clamp(min=1)
    ious[pseudo["labels"][:, None] != truth["labels"]] = 0
    right, total = 0, 0.0
    for row in pseudo["scores"].argsort(descending=True) if len(objects) else ():
        iou, best = ious[row].max(0)
        if iou >= least_iou:
            right, total = right + 1, total + float(iou)
            ious[:, best] = 0
    return right, total


@torch.no_grad()
def health(teacher: nn.Module, setting, find, number: int = 200) -> dict:
    """How good a model's pseudo-labels are, on weak views of `number` images, always the same ones: "images",
    "kept" of each, mean "score", and the shares of "classes" beside those of the labelled images. Training
    images that are not labelled have hidden labels, from which nothing learns; by these, in percent:
    "precision", "recall", and the mean "mask_iou" of those that are right (`count_right`).

    setting: a Setting. find: burnin.teacher_labels."""
    cfg, device, K = setting.cfg, setting.device, setting.num_classes
    hidden = sorted(set(setting.train.image_ids) - set(setting.labelled))
    dataset, ids = (setting.train, hidden) if hidden else (setting.pool, setting.pool.image_ids)
    ids = sorted(ids, key=lambda i: seed_of(cfg.seed, "health", i))[:number]
    views = Replacing(Views(dataset, setting.view, labels=bool(hidden)), ids)
    mine = ids[engine.rank() :: engine.world_size()]
    sums, classes = torch.zeros(6, dtype=torch.float64), torch.zeros(K, dtype=torch.float64)
    training = teacher.training
    teacher.eval()
    size = cfg.batch // engine.world_size()
    for first in range(0, len(mine), size):
        batch = [views[i, seed_of(cfg.seed, "health", i)] for i in mine[first : first + size]]
        batch = [item for item in batch if "image" in item]  # not where all that were tried are damaged
        if not batch:
            continue
        images = torch.stack([item["image"] for item in batch]).to(device)
        for item, pseudo in zip(batch, find(teacher, images, cfg, device)):
            pseudo = {name: value.cpu() for name, value in pseudo.items()}
            sums[:3] += torch.tensor([1, len(pseudo["labels"]), pseudo["scores"].sum()])
            classes += torch.bincount(pseudo["labels"], minlength=K)
            if hidden:
                stride = item["masks"].shape[1] // pseudo["masks"].shape[1]
                masks = nn.functional.avg_pool2d(item["masks"][:, None].float(), stride)[:, 0] > 0.5
                right, ious = count_right(pseudo, {"labels": item["labels"], "masks": masks})
                sums[3:] += torch.tensor([len(masks), right, ious])
    teacher.train(training)
    images, kept, scores, objects, right, ious = sum(gather([sums])).tolist()
    labels = [label for image_id in setting.labelled for label in setting.train.labels(image_id)]
    result = {"images": int(images), "kept": kept / max(1, images), "score": scores / max(1, kept)}
    result["classes"] = shares(sum(gather([classes])), setting.train.class_names)
    counts = torch.bincount(torch.tensor(labels, dtype=torch.int64), minlength=K)
    result["labelled_classes"] = shares(counts, setting.train.class_names)
    if hidden:
        result["precision"] = 100 * right / max(1, kept)
        result["recall"] = 100 * right / max(1, objects)
        result["mask_iou"] = 100 * ious / max(1, right)
    return result


def shares(counts: Tensor, names: list[str]) -> dict:
    """{name: share}, which sum to 1, or are 0 where nothing was counted."""
    return dict(zip(names, (counts / counts.sum().clamp(min=1)).tolist()))


def health_lines(result: dict, most: int = 5) -> list[str]:
    """What `health` found, for people, in lines of 79 columns at most; of the classes those whose shares
    differ most."""
    if not result["kept"]:
        return [f"  no pseudo-labels on {result['images']} images"]
    parts = [f"{result['kept']:.1f} an image, mean score {result['score']:.2f}"]
    if "precision" in result:
        parts += [f"{name} {result[name]:.1f}" for name in ("precision", "recall", "mask_iou")]
    ours, theirs = result["classes"], result["labelled_classes"]
    furthest = sorted(ours, key=lambda name: -abs(ours[name] - theirs[name]))[:most]
    classes = [f"{name} {100 * ours[name]:.0f} ({100 * theirs[name]:.0f})" for name in furthest]
    texts = [
        f"pseudo-labels of {result['images']} images: {', '.join(parts)}".replace("mask_iou", "mask IoU"),
        f"their classes in percent (labelled): {', '.join(classes)}",
    ]
    how = dict(width=79, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
    return [line for text in texts for line in textwrap.wrap(text, **how)]
