"""Evaluation: images to instances beside Hugging Face's Mask2Former with the same weights, and instances to
AP beside pycocotools as its own examples use it.

    python benchmarks/evaluate.py                      # R50, 512 x 512, one image at a time
    python benchmarks/evaluate.py --size 1024 --rounds 3
    python benchmarks/evaluate.py --only ours hugging_face compiled exported onnx    # in some minutes

It prints median seconds, and their ratio to the peer's. Hugging Face's masks go through 384 x 384 pixels.
Ours are made at the size of the image, as in the official code. Both become COCO's run-length encoding
(RLE)."""

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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (
    NUM_CLASSES,
    Clock,
    load_hugging_face,
    load_ours,
    make_batch,
    make_parser,
    normalize,
    parse_flags,
    print_headline,
    print_table,
    ratios,
    take_turns,
)

from data import CocoDataset
from evaluate import coco_results, instances, mask_ap
from tools.export import write_programs
from training.distributed import autocast, compile_model, init_distributed


def encode(masks) -> list:
    """Encode masks (N, H, W) bool as RLE."""
    return rle_tools.encode(np.asfortranarray(masks.permute(1, 2, 0).to(torch.uint8).numpy()))


def ours(flags, precision="fp32", called=lambda model: model):
    """Run our model on images, and encode its instances."""
    env = init_distributed("cpu", precision)
    model, clock, sizes = load_ours(flags.folder).eval(), Clock(), [(flags.size, flags.size)] * flags.batch
    images, _ = make_batch(flags.size, flags.batch, 0)
    run = called(model)

    @torch.inference_mode()
    def step():
        with clock("forward"), autocast(env):
            outputs = run(images)
        with clock("instances"):
            results = instances(outputs, sizes)
        with clock("encoding"):
            for number, result in enumerate(results):
                coco_results(number, result, range(NUM_CLASSES))

    return step, clock


def ours_bf16(flags):
    return ours(flags, "bf16")


def compiled(flags):
    """Run our model after torch.compile."""
    return ours(flags, called=compile_model)


def exported(flags):
    """Run model.pt2, which gives scores, labels and masks of an image."""
    return program(flags, lambda folder: torch.export.load(folder / "model.pt2").module())


def onnx(flags):
    """Run model.onnx with ONNX Runtime."""
    import onnxruntime

    def load(folder):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = flags.threads
        session = onnxruntime.InferenceSession(folder / "model.onnx", options)
        return lambda image: map(torch.from_numpy, session.run(None, {"image": image.numpy()}))

    return program(flags, load)


def program(flags, load):
    """Run a program of tools/export.py on images, and encode its instances."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        write_programs(load_ours(flags.folder).eval(), Path(folder), (flags.size, flags.size))
        run = load(Path(folder))
    images, _ = make_batch(flags.size, flags.batch, 0)

    @torch.inference_mode()
    def step():
        for number, image in enumerate(images.split(1)):
            with clock("forward"):
                scores, labels, masks = run(image)
            with clock("encoding"):
                result = {"scores": scores, "labels": labels, "masks": masks}
                coco_results(number, result, range(NUM_CLASSES))

    return step, clock


def hugging_face(flags):
    """Run Hugging Face's model on images, and encode its instances."""
    from transformers import Mask2FormerImageProcessor

    model, clock = load_hugging_face(flags.folder).eval(), Clock()
    sizes = [(flags.size, flags.size)] * flags.batch
    processor = Mask2FormerImageProcessor()
    images, _ = make_batch(flags.size, flags.batch, 0)

    @torch.inference_mode()
    def step():
        with clock("forward"):
            outputs = model(normalize(images))
        with clock("instances"):
            results = processor.post_process_instance_segmentation(
                outputs, threshold=0.0, target_sizes=sizes, return_binary_maps=True
            )
        with clock("encoding"):
            for result in results:
                encode(result["segmentation"])

    return step, clock


def make_detections(size: int, num_images: int, num_objects=7, num_detections=14):
    """Make synthetic ground truth in COCO form, and detections: for each object its own mask, shifted at
    random, `num_detections` times."""
    annotations, detections, generator = [], [], np.random.default_rng(0)
    for image in range(num_images):
        _, [target] = make_batch(size, 1, num_objects, seed=image)
        for label, rle in zip(target["labels"].tolist(), encode(target["masks"])):
            shared = {"image_id": image, "category_id": label + 1}
            annotation = {**shared, "id": len(annotations) + 1, "iscrowd": 0}
            annotation["segmentation"] = {**rle, "counts": rle["counts"].decode()}
            annotation |= {"area": float(rle_tools.area(rle)), "bbox": rle_tools.toBbox(rle).tolist()}
            annotations.append(annotation)
            mask = rle_tools.decode(rle)
            for shift in generator.integers(-size // 20, size // 20 + 1, (num_detections, 2)):
                shifted = rle_tools.encode(np.asfortranarray(np.roll(mask, shift, (0, 1))))
                detections.append({**shared, "segmentation": shifted, "score": float(generator.random())})
    images = [{"id": i, "file_name": f"{i}.png", "height": size, "width": size} for i in range(num_images)]
    categories = [{"id": k + 1, "name": str(k)} for k in range(NUM_CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def time_ap(flags) -> dict:
    """Return the seconds per image from detections to AP, of ours and of pycocotools."""
    truth, detections = make_detections(flags.size, flags.images)
    seconds = {"ours": [], "pycocotools": []}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder) / "truth.json"
        file.write_text(json.dumps(truth))
        dataset = CocoDataset(file, Path(folder))
        for _ in range(flags.rounds):
            start = time.perf_counter()
            our_ap = mask_ap(dataset, [dict(d) for d in detections])["AP"]
            middle = time.perf_counter()
            coco = COCO(str(file))
            coco_eval = COCOeval(coco, coco.loadRes([dict(d) for d in detections]), "segm")
            coco_eval.evaluate()
            coco_eval.accumulate()
            coco_eval.summarize()
            seconds["ours"].append(middle - start)
            seconds["pycocotools"].append(time.perf_counter() - middle)
    assert abs(our_ap - 100 * coco_eval.stats[0]) < 1e-3
    return {side: {"AP": statistics.median(values) / flags.images} for side, values in seconds.items()}


def main():
    default = ours, hugging_face, ours_bf16
    sides = {side.__name__: side for side in (*default, compiled, exported, onnx)}
    parser = make_parser(__doc__, size=512, batch=1, objects=0, rounds=5, threads=2)
    parser.add_argument(
        "--images", type=int, default=200, help="images of the AP part, each with 98 detections"
    )
    flags = parse_flags(parser, sides, [side.__name__ for side in default])
    print_headline(flags)
    rows, columns = (
        take_turns(__file__, sides, flags),
        ["step", "forward", "instances", "encoding", "peak GiB"],
    )
    print_table("seconds", rows, columns)
    if "hugging_face" in rows:
        print_table("relative", ratios(rows), columns, digits=2)
    rows = time_ap(flags)
    print_table("seconds per image", rows, ["AP"], digits=5)
    print_table("relative", ratios(rows, "pycocotools"), ["AP"], digits=2)


if __name__ == "__main__":
    main()
