"""Mask AP of a checkpoint's student and teacher.

    python evaluate.py runs/shapes-0.1/distill.pt                              # AP by size and by class
    python evaluate.py runs/coco-0.01/distill.pt --json ap.json                # also written to a file
    torchrun --nproc_per_node=8 evaluate.py runs/coco-0.01/distill.pt
    python evaluate.py model_final_3c8ec9.pkl --data coco                      # a published checkpoint

Pictures and files of what a model finds in any images: python -m tools.predict.

Letters in shapes: B images, Q queries, K classes, N detections of one image, H W pixels, h w = a quarter
of the padded image's."""

if __name__ == "__main__":
    from training.cli import answer_early

    answer_early()

import argparse
import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from tqdm import tqdm

from data import CocoDataset, DataError, encode_rle, shortest_edge_size, to_tensor
from interop.load import load_any_checkpoint
from layouts import load_data
from layouts.cityscapes import cityscapes_ap, is_cityscapes, label_file, official_evaluation
from layouts.images import inspect_images
from model import resize
from training.checkpoint import check_classes, load_model
from training.cli import Parser, add_data_flags, data_args, expected_errors, parse_numbers
from training.distributed import (
    Env,
    all_gather_list,
    autocast,
    init_distributed,
    print_rank0,
    rank,
    rank0_first,
    warn_once,
    world_size,
)
from training.tiles import predict_tiles
from training.visualize import draw_instances, draw_predictions, make_grid

CPU = Env(torch.device("cpu"))
MAX_DETECTIONS = 100  # that COCO's AP counts for an image and class
MIN_SCORE = 0.05  # of instances of a window; the many below it would make joining windows slow
MAX_PIXELS_PER_CHUNK = 2**24  # of upsampled masks that are in memory at once


def instances(
    outputs: dict, image_sizes, output_sizes=None, top_k: int = MAX_DETECTIONS, rle: bool = False
) -> list[dict]:
    """Turn predictions into instances: the top_k pairs of query and class by class probability (Mask2Former,
    section 4.1).

    Args:
        outputs: of Mask2Former.
        image_sizes: [(H, W)] of the images before padding.
        output_sizes: [(H, W)] of the masks; default: image_sizes.

    Returns per image, best first: "scores" (N,), class probability times mean mask probability inside the
    mask, in [0, 1]; "labels" (N,) int64; "masks" (N, H, W) bool. With rle, "rles" takes the place of
    "masks": N compressed RLEs of COCO. Then only a few masks are in memory at once."""
    results = []
    for b, image_size in enumerate(image_sizes):
        output_size = output_sizes[b] if output_sizes is not None else image_size
        probabilities = outputs["pred_logits"][b].float().softmax(-1)[:, :-1]  # (Q, K)
        K = probabilities.shape[1]
        scores, pairs = probabilities.flatten().topk(min(top_k, probabilities.numel()))
        queries, inverse = (pairs // K).unique(return_inverse=True)  # a query may appear with several classes
        masks, mask_scores = [], []
        for chunk, chunk_scores in upsample_masks(outputs["pred_masks"][b, queries], image_size, output_size):
            masks += encode_masks(chunk) if rle else [chunk]
            mask_scores.append(chunk_scores)
        scores, order = (scores * torch.cat(mask_scores)[inverse]).sort(descending=True)
        labels = pairs[order] % K
        order = inverse[order]
        found = {"rles": [masks[q] for q in order.tolist()]} if rle else {"masks": torch.cat(masks)[order].mT}
        results.append({"scores": scores, "labels": labels, **found})
    return results


def upsample_masks(mask_logits: Tensor, image_size, output_size):
    """Upsample mask logits (N, h, w), cut off the padding, and resize them from image_size to output_size,
    both (H, W).

    Yields, for a few queries at a time, their masks (n, W, H) bool and the mean probability inside each
    mask (n,). The masks are transposed, as COCO's RLE runs down the columns."""
    H, W = output_size
    num_queries = max(1, min(8, MAX_PIXELS_PER_CHUNK // (H * W)))  # 8 masks fit a CPU's cache
    for chunk in mask_logits.float().mT.split(num_queries):
        chunk = resize(chunk[None], [4 * side for side in chunk.shape[-2:]])
        chunk = chunk[..., : image_size[1], : image_size[0]]
        if chunk.shape[-2:] != (W, H):
            chunk = resize(chunk, (W, H))
        masks = chunk[0] > 0
        inside = chunk[0].sigmoid().mul_(masks).sum((1, 2))
        yield masks, inside / (masks.sum((1, 2)) + 1e-6)


def encode_masks(masks: Tensor) -> list[dict]:
    """Encode transposed masks (N, W, H) bool as RLEs."""
    return rle_tools.encode(masks.contiguous().view(torch.uint8).cpu().numpy().transpose(2, 1, 0))


@torch.no_grad()
def predict_batch(
    model: nn.Module, images: list[Tensor], output_sizes, env: Env = CPU, top_k: int = 0, rle: bool = True
) -> list[dict]:
    """Return the `instances` of uint8 images (3, H, W) of one size. top_k: 0 means one for each query, and at
    least 100."""
    with autocast(env):
        outputs = model(torch.stack(images).to(env.device))
    top_k = top_k or max(MAX_DETECTIONS, outputs["pred_logits"].shape[1])
    return instances(outputs, [image.shape[-2:] for image in images], output_sizes, top_k, rle)


def predict_image(
    model: nn.Module, image: Image.Image, env: Env = CPU, *, test_size=(0, 0), tile=0, threshold=0.0,
    batch_size=8,
) -> dict:  # fmt: skip
    """Return the `instances` of one image as RLEs, those with a score above the threshold.

    test_size: to which the image is resized for the model. tile: the side of overlapping windows that are
    predicted, batch_size at once, and joined (training.tiles); 0: the whole image."""
    threshold = max(threshold, MIN_SCORE) if tile else threshold

    def predict(images: list[Image.Image]) -> list[dict]:
        resized = [to_tensor(resize_for_test(image, test_size, tile)) for image in images]
        results = predict_batch(model, resized, [(image.height, image.width) for image in images], env)
        counts = [int((result["scores"] > threshold).sum()) for result in results]  # the best come first
        return [{k: v[:count] for k, v in result.items()} for result, count in zip(results, counts)]

    return predict_tiles(predict, image, tile, batch_size) if tile else predict([image])[0]


def resize_for_test(image: Image.Image, sides=(0, 0), tile=0) -> Image.Image:
    """Resize an image to the size it has at test time (data.shortest_edge_size). sides: shorter side and
    limit of the longer one, pixels."""
    height, width = shortest_edge_size(image.height, image.width, *sides, tile)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def evaluate(
    model: nn.Module, dataset: CocoDataset, *, env: Env = CPU, test_size=(0, 0), tile=0, batch_size=4
) -> dict:
    """Evaluate mask AP by the rules of COCO, in percent. Each rank takes a share of the images; all
    return the same.

    Args:
        test_size: shorter side and limit of the longer side to which images are resized, pixels; 0: as
        they are.
        tile: side of the windows that are predicted and joined, pixels; 0: whole images (`predict_image`).
        batch_size: images per forward pass, where neighbors have the same size, or windows of an image.

    Returns {"AP", "AP50", "AP75", "APs", "APm", "APl", "per_class": {name: AP}}; -1 where there is no
    object. If an image has more than 100 objects, also "AP_all", which counts all detections. On Cityscapes
    also "Cityscapes AP" and "Cityscapes AP50", by its own rules."""
    training = model.training
    model.eval()
    most = most_objects(dataset)
    if most == 0:
        warn_once(f"{dataset.json_file}: AP is '-', because no image has an object to find")
    elif most > MAX_DETECTIONS:
        warn_once(
            f"{dataset.json_file}: an image has {most} objects, but COCO's AP counts at most "
            f"{MAX_DETECTIONS} detections of a class in an image; AP_all counts all of them"
        )
    # The official Mask2Former also keeps 100 instances, of 200 queries too.
    top_k = MAX_DETECTIONS if most <= MAX_DETECTIONS else 0
    sizes = {i: shortest_edge_size(*dataset.size(i), *test_size) for i in dataset.image_ids}
    shard = sorted(dataset.image_ids[rank() :: world_size()], key=lambda i: (sizes[i], i))
    detections = []
    bar = tqdm(total=len(shard), desc="images", leave=False, disable=None if rank() == 0 else True)
    while shard:
        batch = [i for i in shard[: 1 if tile else batch_size] if sizes[i] == sizes[shard[0]]]
        shard = shard[len(batch) :]
        if tile:
            settings = {"test_size": test_size, "tile": tile, "batch_size": batch_size}
            results = [predict_image(model, dataset.image(batch[0]), env, **settings)]
        else:
            images = [to_tensor(resize_for_test(dataset.image(i), test_size)) for i in batch]
            results = predict_batch(model, images, [dataset.size(i) for i in batch], env, top_k)
        for i, result in zip(batch, results):
            detections += coco_results(i, result, dataset.category_ids)
        bar.update(len(batch))
    bar.close()
    model.train(training)
    detections = all_gather_list(detections)
    # Rank 0 computes the AP and sends it to the others.
    return all_gather_list([compute_ap(dataset, detections)] if rank() == 0 else [])[0]


def most_objects(dataset: CocoDataset) -> int:
    """Return the largest number of objects in an image."""
    return max((len(dataset.objects(image_id)) for image_id in dataset.image_ids), default=0)


def coco_results(image_id, result: dict, category_ids) -> list[dict]:
    """Convert an image's instances to COCO's result form: original category ids, masks as RLE."""
    rles = result["rles"] if "rles" in result else encode_masks(result["masks"].mT)
    return [
        {"image_id": image_id, "category_id": category_ids[label], "segmentation": rle, "score": score}
        for rle, label, score in zip(rles, result["labels"].tolist(), result["scores"].tolist())
        if rle_tools.area(rle) > 0
    ]


def compute_ap(dataset: CocoDataset, detections: list[dict]) -> dict:
    """Compute AP from detections in COCO's result form: pycocotools', and on Cityscapes also that of its
    own code."""
    result = mask_ap(dataset, detections)
    if is_cityscapes(dataset):
        root = dataset.image_folder.parent
        files = {i: label_file(root, dataset.path(i)) for i in dataset.image_ids}
        cityscapes = cityscapes_ap(files, detections)
        result |= {"Cityscapes AP": cityscapes["AP"], "Cityscapes AP50": cityscapes["AP50"]}
    return result


def mask_ap(dataset: CocoDataset, detections: list[dict]) -> dict:
    """Compute pycocotools' mask AP."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        annotations = []
        for image_id in dataset.image_ids:
            for annotation in dataset.annotations(image_id):
                rle = encode_rle(annotation["segmentation"], *dataset.size(image_id))
                area = annotation["area"] or float(rle_tools.area(rle))
                number = len(annotations) + 1  # pycocotools takes an id of 0 for "not matched"
                annotations.append({**annotation, "id": number, "segmentation": rle, "area": area})
        images = {i: dataset.size(i) for i in dataset.image_ids}
        categories = [{"id": i, "name": n} for i, n in zip(dataset.category_ids, dataset.class_names)]
        truth.dataset = {
            "images": [{"id": i, "height": H, "width": W} for i, (H, W) in images.items()],
            "annotations": annotations,
            "categories": categories,
        }
        truth.createIndex()
        predicted = COCO()
        predicted.dataset = {**truth.dataset, "annotations": []}
        for number, detection in enumerate(detections, start=1):
            area = float(rle_tools.area(detection["segmentation"]))
            predicted.dataset["annotations"].append({**detection, "id": number, "area": area, "iscrowd": 0})
        predicted.createIndex()
        coco_eval = COCOeval(truth, predicted, "segm")
        if most_objects(dataset) > MAX_DETECTIONS:
            coco_eval.params.maxDets.append(max(len(detections), MAX_DETECTIONS + 1))  # after 1, 10 and 100
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    precision = coco_eval.eval["precision"][:, :, :, 0, 2:]  # (IoU, recall, class, limit), all sizes
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    result = {name: _percent(value) for name, value in zip(names, coco_eval.stats)}
    if precision.shape[3] > 1:
        result["AP_all"] = _mean_percent(precision[..., 1])
    per_class = np.moveaxis(precision[..., 0], 2, 0)
    result["per_class"] = {n: _mean_percent(values) for n, values in zip(dataset.class_names, per_class)}
    return result


def _mean_percent(precision: np.ndarray) -> float:
    """Average the precision where there are objects: -1 marks classes without any."""
    return _percent(precision[precision > -1].mean() if (precision > -1).any() else -1)


def _percent(value) -> float:
    return round(100 * float(value), 4) if value >= 0 else -1.0


# --------------------------------------------------------------------------------------- tables and pictures


def ap_line(ap: dict) -> str:
    """Format an AP dictionary as one line, without classes."""
    return "  ".join(f"{name} {_format(value)}" for name, value in ap.items() if name != "per_class")


def ap_table(columns: dict[str, dict], by_class=True) -> str:
    """Format named AP dictionaries side by side."""
    width = max(8, *(len(name) for name in columns)) + 2
    first = next(iter(columns.values()))
    rows = [[name] + [c.get(name, -1) for c in columns.values()] for name in first if name != "per_class"]
    if by_class:
        rows += [
            ["  " + name] + [c["per_class"][name] for c in columns.values()] for name in first["per_class"]
        ]
    label = max(len(row[0]) for row in rows) + 2
    lines = [" " * label + "".join(name.rjust(width) for name in columns)]
    lines += [row[0].ljust(label) + "".join(_format(value).rjust(width) for value in row[1:]) for row in rows]
    return "\n".join(lines)


def _format(value: float) -> str:
    return "-" if value < 0 else f"{value:.1f}"


def compare_predictions(
    models: dict, dataset: CocoDataset, *, env: Env = CPU, test_size=(0, 0), tile=0, count=6
) -> list:
    """Return rows of pictures of `count` images: image, ground truth, and the predictions of each named
    model with a score above 0.5. The longer side of a picture has at most 1,000 pixels."""
    rows = []
    for image_id in dataset.image_ids[:: max(1, len(dataset) // count)][:count]:
        size, image = dataset.size(image_id), dataset.image(image_id)
        scale = min(max(1, 240 // max(size)), 1000 / max(size))
        rles = [encode_rle(o["segmentation"], *size) for o in dataset.objects(image_id)]
        names = [dataset.class_names[label] for label in dataset.labels(image_id)]
        row = [draw_instances(image, scale=scale, dim=1), draw_instances(image, rles, names, scale)]
        for model in models.values():
            predictions = predict_image(model, image, env, test_size=test_size, tile=tile, threshold=0.5)
            row.append(draw_predictions(image, predictions, dataset.class_names, 0.5, scale=scale))
        rows.append(row)
    return rows


# -------------------------------------------------------------------------------------------------- program


def parse_arguments(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="file or folder: ours, the official Mask2Former's, or Hugging Face's")
    add("--data", help="shapes, coco, cityscapes or a folder; default: that of the training run")
    add_data_flags(parser)
    add_model_arguments(parser)
    add("--batch", type=int, default=4, help="images per forward pass [4]")
    add("--json", help="write the APs to this file")
    add("--picture", help="write a picture of predictions beside ground truth to this file")
    for moved in MOVED:
        add(moved, nargs="+", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    for moved, command in MOVED.items():
        if getattr(flags, moved.strip("-")):
            parser.error(f"{moved} has moved: {command.format(flags.checkpoint)}")
    return flags


MOVED = {
    "--images": "python -m tools.predict {} photos/",
    "--pseudo": "python -m tools.predict {} photos/ --pseudo-labels new_labels/",
    "--export": "python -m tools.export {} my_model",
}
MOVED |= dict.fromkeys(("--out", "--threshold", "--which"), MOVED["--images"])


def add_model_arguments(parser) -> None:
    """Add the flags of programs that run a checkpoint's model on images."""
    add = parser.add_argument
    sides = "shorter side and limit of the longer side at test time, pixels; 0: no resizing"
    add("--test-size", type=parse_numbers, help=f"{sides}; default: as trained, or 800,1333")
    tile = "predict windows of N x N pixels and join them; 0: whole images; default: as trained"
    add("--tile", type=int, metavar="N", help=tile)
    add("--device", default="", help="cuda, mps or cpu; default: the best available")
    add("--precision", help="bf16 or fp32; default: that of the training run")
    for old in ("--short-side", "--long-side"):  # former spellings of the two numbers of --test-size
        add(old, type=int, help=argparse.SUPPRESS)


def model_settings(flags, config: dict) -> dict:
    """Return the environment, test size and tile as keyword arguments of `predict_image`, from the flags of
    `add_model_arguments` or the training run's config. Raises ValueError."""
    default = flags.test_size or config.get("test_size") or (800, 1333)
    if len(default) != 2:
        raise ValueError(f"--test-size must be two numbers, found {default}")
    given = flags.short_side, flags.long_side
    test_size = tuple(d if side is None else side for d, side in zip(default, given))
    tile = config.get("tile", 0) if flags.tile is None else flags.tile
    if tile and tile < 32:
        raise ValueError(f"--tile must be 0 or at least 32 pixels, found {tile}")
    env = init_distributed(flags.device, flags.precision or config.get("precision", ""))
    return {"env": env, "test_size": test_size, "tile": tile}


def main(argv=None) -> None:
    flags = parse_arguments(argv)
    with expected_errors():
        if flags.batch < 1:
            raise ValueError(f"--batch must be at least 1, found {flags.batch}")
        checkpoint = load_any_checkpoint(flags.checkpoint)
        config = checkpoint.get("config", {})
        settings = model_settings(flags, config)
        dataset = validation_set(flags, config)
        check_classes(checkpoint, dataset.class_names)
        dataset.pixel_range = checkpoint.get("pixel_range")
        dataset.exif_stored = inspect_images(dataset).exif_stored
        if is_cityscapes(dataset):
            official_evaluation()  # raises if cityscapesscripts is not installed
        models = {}
        for which in ("model", "teacher"):
            if checkpoint[which] is not None:
                trained = "teacher" if checkpoint.get("phase") == "teacher" else "student"
                models[trained if which == "model" else which] = load_model(
                    checkpoint, settings["env"].device, which
                )
    with expected_errors(DataError):
        aps = {
            name: evaluate(model, dataset, batch_size=flags.batch, **settings)
            for name, model in models.items()
        }
    print_rank0(ap_table(aps))
    with expected_errors():
        if rank() == 0 and flags.json:
            Path(flags.json).write_text(json.dumps(aps, indent=1))
        if rank() == 0 and flags.picture:
            rows = compare_predictions(models, dataset, **settings)
            make_grid(rows, ["image", "ground truth", *models]).save(flags.picture)


def run_data_args(config: dict, data: str) -> dict:
    """Return the arguments of layouts.load_data of a training run: all for its own data, and those that are
    no paths for other data."""
    given = config.get("data_args") or {}
    same = os.path.realpath(data) == os.path.realpath(config.get("data", ""))
    paths = ("root", "train_json", "val_json", "image_folder", "val_image_folder")
    return {name: value for name, value in given.items() if same or name not in paths}


def validation_set(flags, config: dict) -> CocoDataset:
    """Read the validation set of --data, or that of the training run with this config. Raises ValueError."""
    data = flags.data or config.get("data")
    if not data:
        raise ValueError(f"cannot infer the dataset from {flags.checkpoint}; pass --data")
    with rank0_first():
        _, val = load_data(data, **run_data_args(config, data) | data_args(vars(flags)))
    if val is None:
        raise ValueError(f"{data} has no validation set; pass --val-json, or --val-ratio above 0")
    if not len(val):
        raise ValueError(f"cannot evaluate: {str(val.json_file)!r} has no image; pass another --val-json")
    return val


if __name__ == "__main__":
    main()
