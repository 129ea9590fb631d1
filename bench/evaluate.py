"""Evaluation of ours beside its peers: images to instances beside Hugging Face's Mask2Former with the same
weights, and instances to AP beside pycocotools as its own examples use it.

    python bench/evaluate.py                       # R50, 512 x 512, one image at a time
    python bench/evaluate.py --size 1024 --rounds 3

It prints medians in seconds, and what share of theirs they are. Theirs makes masks by way of 384 x 384
pixels, ours at the image's size as the official code does; both then become COCO's run-length encoding."""

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

sys.path.insert(0, str(Path(__file__).parent.parent))
from sides import (
    CLASSES,
    Clock,
    headline,
    load_ours,
    load_theirs,
    make_batch,
    normalised,
    parse,
    ratios,
    table,
    take_turns,
)

import engine
from data import CocoDataset
from evaluate import coco_results, instances, mask_ap


def encode(masks) -> list:
    """(N, H, W) bool"""
    return rle_tools.encode(np.asfortranarray(masks.permute(1, 2, 0).to(torch.uint8).numpy()))


def ours(flags, precision="fp32"):
    device = engine.start_processes("cpu", precision)
    model, clock, sizes = load_ours(flags.folder).eval(), Clock(), [(flags.size, flags.size)] * flags.batch
    images, _ = make_batch(flags.size, flags.batch, 0)

    @torch.inference_mode()
    def step():
        with clock("forward"), engine.autocast(device):
            outputs = model(images)
        with clock("instances"):
            results = instances(outputs, sizes)
        with clock("encoding"):
            for number, result in enumerate(results):
                coco_results(number, result, range(CLASSES))

    return step, clock


def ours_bf16(flags):
    return ours(flags, "bf16")


def theirs(flags):
    from transformers import Mask2FormerImageProcessor

    model, clock, sizes = load_theirs(flags.folder).eval(), Clock(), [(flags.size, flags.size)] * flags.batch
    processor = Mask2FormerImageProcessor()
    images, _ = make_batch(flags.size, flags.batch, 0)

    @torch.inference_mode()
    def step():
        with clock("forward"):
            outputs = model(normalised(images))
        with clock("instances"):
            results = processor.post_process_instance_segmentation(
                outputs, threshold=0.0, target_sizes=sizes, return_binary_maps=True
            )
        with clock("encoding"):
            for result in results:
                encode(result["segmentation"])

    return step, clock


def instances_to_ap(flags, number_of_images=200):
    """Seconds for each image, of which there are 200, made up: 7 objects of 80 classes in each, and for each
    object 14 detections that are its mask, moved."""
    boxes = []
    for image in range(number_of_images):
        _, [target] = make_batch(flags.size, 1, 7, seed=image)
        rles = encode(target["masks"])
        boxes += [(image, label, rle) for label, rle in zip(target["labels"].tolist(), rles)]
    annotations, detections, generator = [], [], np.random.default_rng(0)
    for number, (image, label, rle) in enumerate(boxes, start=1):
        text = {**rle, "counts": rle["counts"].decode()}
        annotations.append(
            {"id": number, "image_id": image, "category_id": label + 1, "segmentation": text, "iscrowd": 0}
            | {"area": float(rle_tools.area(rle)), "bbox": rle_tools.toBbox(rle).tolist()}
        )
        mask = rle_tools.decode(rle)
        for shift in generator.integers(-flags.size // 20, flags.size // 20 + 1, (14, 2)):
            moved = rle_tools.encode(np.asfortranarray(np.roll(mask, shift, (0, 1))))
            score = float(generator.random())
            detections.append(
                {"image_id": image, "category_id": label + 1, "segmentation": moved, "score": score}
            )
    images = [
        {"id": i, "file_name": f"{i}.png", "height": flags.size, "width": flags.size}
        for i in range(number_of_images)
    ]
    categories = [{"id": k + 1, "name": str(k)} for k in range(CLASSES)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    seconds = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder) / "truth.json"
        file.write_text(json.dumps(truth))
        for image in images:
            (Path(folder) / image["file_name"]).touch()
        dataset = CocoDataset(file, Path(folder))
        for _ in range(flags.rounds):
            start = time.perf_counter()
            mine = mask_ap(dataset, [dict(d) for d in detections])["AP"]
            middle = time.perf_counter()
            coco = COCO(str(file))
            evaluation = COCOeval(coco, coco.loadRes([dict(d) for d in detections]), "segm")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            seconds["ours"].append(middle - start)
            seconds["theirs"].append(time.perf_counter() - middle)
    assert abs(mine - 100 * evaluation.stats[0]) < 1e-3
    return {side: {"AP": statistics.median(found) / number_of_images} for side, found in seconds.items()}


def main():
    flags = parse(__doc__, {side.__name__: side for side in (ours, theirs, ours_bf16)}, batch=1, objects=0)
    headline(flags)
    rows, names = take_turns(__file__, ("ours", "theirs", "ours_bf16"), flags), ["step"]
    names += ["forward", "instances", "encoding"]
    table("seconds", rows, [*names, "peak GiB"])
    if "theirs" in rows:
        table("of theirs", ratios(rows), [*names, "peak GiB"], digits=2)
    rows = instances_to_ap(flags)
    table("seconds", rows, ["AP"], digits=5)
    table("of theirs", ratios(rows), ["AP"], digits=2)


if __name__ == "__main__":
    main()
