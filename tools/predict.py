"""Predict the instances in any images, or write pseudo-labels that people can correct.

    python -m tools.predict runs/coco-0.01/distill.pt photos/ --out predictions/
    python -m tools.predict runs/coco-0.01/distill.pt photos/ --pseudo-labels new_labels/

The first command writes a picture of each image with its instances, and results.json, a list of detections
that pycocotools reads: original category ids, masks as RLE, and image ids that number the files.

The second command writes the teacher's pseudo-labels (burnin.pseudo_labels) to instances_train.json, with
the most doubtful images first. After people have corrected it, the file and the images are a dataset to
train on.

One image is in memory at a time."""

import dataclasses
import json
import os
import shlex
from pathlib import Path

import torch
from PIL import Image
from pycocotools import mask as rle_tools
from tqdm import tqdm

from burnin import full_res_masks, mask_nms, pseudo_labels
from data import DataError, read_image, to_tensor
from evaluate import (
    add_model_arguments,
    coco_results,
    model_settings,
    predict_image,
    resize_for_test,
    validation_set,
)
from interop.load import load_any_checkpoint
from layouts.images import list_image_files
from model import resize
from training.checkpoint import check_classes, load_model
from training.cli import Parser, add_data_flags, data_args, expected_errors, format_value
from training.config import PRESETS, Config
from training.distributed import Env, autocast, warn_once, world_size
from training.visualize import draw_predictions

# Options that describe a run's data and start, which training on other data does not share. The values that
# --scale-to-batch sets are in the other options.
NOT_SHARED = "data data_args unlabeled labeled_list ratio preset out init_from"
NOT_SHARED += " teacher_checkpoint student_checkpoint supervised_only device scale_to_batch"
NOT_SHARED = set(NOT_SHARED.split())


def parse_arguments(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="ours, the official Mask2Former's, or Hugging Face's")
    add("images", nargs="+", metavar="DIR|FILE", help="image files, and folders, searched recursively")
    add("--out", default="predictions", help="folder for pictures and results.json [predictions]")
    add("--threshold", type=float, default=0.5, help="minimum score of an instance [0.5]")
    add("--pseudo-labels", metavar="DIR", help="write the teacher's pseudo-labels there, to correct them")
    add("--which", choices=("student", "teacher"), help="model to use [student; teacher for --pseudo-labels]")
    add("--data", help="take names and ids of the classes from this dataset [from the checkpoint]")
    add_data_flags(parser)
    add_model_arguments(parser)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    flags = parse_arguments(argv)
    with expected_errors():
        checkpoint = load_any_checkpoint(flags.checkpoint)
        config = checkpoint.get("config", {})
        env, test_size = model_settings(flags, config)
        if world_size() > 1:
            raise ValueError("tools.predict runs in one process; start it without torchrun")
        # A phase without a teacher has trained a model that can be one.
        has_teacher = checkpoint["teacher"] is not None
        which = flags.which or ("teacher" if flags.pseudo_labels and has_teacher else "student")
        if which == "teacher" and not has_teacher:
            raise ValueError(f"{flags.checkpoint} has only one model; use --which student")
        model = load_model(checkpoint, env.device, "model" if which == "student" else "teacher")
        categories = find_categories(checkpoint, flags)
        files = find_images(flags.images)
        if flags.pseudo_labels:
            out = Path(flags.pseudo_labels)
            folder = write_pseudo_labels(model, files, categories, out, env, test_size, config)
            print(f"to train on them after correction: {training_command(config, out, folder)}")
        else:
            write_predictions(model, files, categories, Path(flags.out), env, test_size, flags.threshold)


def find_categories(checkpoint: dict, flags) -> list[dict]:
    """Return the categories of a checkpoint or of --data in COCO's form, in the order of labels. Raises
    ValueError if both have different classes."""
    K = checkpoint["model_args"]["num_classes"]
    names = checkpoint.get("class_names") or [f"class {k}" for k in range(K)]
    ids = checkpoint.get("category_ids") or list(range(1, K + 1))
    if flags.data or data_args(vars(flags)):
        dataset = validation_set(flags, {})
        check_classes(checkpoint, dataset.class_names)
        names, ids = dataset.class_names, dataset.category_ids
    return [{"id": i, "name": name} for i, name in zip(ids, names)]


def find_images(places: list[str]) -> list[Path]:
    """Return the real paths of image files, and of those below folders, in order and each once. Raises
    DataError for a place that does not exist or has no image."""
    files = []
    for place in map(Path, places):
        if not place.exists():
            raise DataError(f"cannot read images: no file or folder {str(place)!r}")
        found = [Path(path) for path in list_image_files(place)] if place.is_dir() else [place.resolve()]
        if not found:
            raise DataError(f"cannot read images: no image below {str(place)!r}")
        files += found
    return list(dict.fromkeys(files))


def read_images(files: list[Path]):
    """Yield (number, file, image) of the images that can be read, and warn about the others. Raises
    DataError at the end if none could be read."""
    unreadable = 0
    for number, file in enumerate(tqdm(files, desc="images", disable=None), start=1):
        try:
            image = read_image(file)
        except DataError as error:
            unreadable += 1
            warn_once(f"{error}; skipping it")
            continue
        yield number, file, image
    if unreadable == len(files):
        raise DataError(f"none of the {len(files)} images can be read")


def write_predictions(model, files, categories, out: Path, env: Env, test_size, threshold: float) -> None:
    """Write out/<number>-<name>.jpg with the instances whose score is above the threshold, and
    out/results.json with the same instances in COCO's result form. out/images.json is a COCO file without
    annotations, for COCO("images.json").loadRes("results.json")."""
    out.mkdir(parents=True, exist_ok=True)
    category_ids, class_names = zip(*((category["id"], category["name"]) for category in categories))
    count, images = 0, []
    with open(out / "results.json", "w") as results:
        for number, file, image in read_images(files):
            predictions = predict_image(model, image, env, test_size=test_size)
            keep = predictions["scores"] > threshold
            predictions = {name: values[keep] for name, values in predictions.items()}
            for result in coco_results(number, predictions, category_ids):
                results.write(("," if count else "[") + "\n" + json.dumps(to_json(result)))
                count += 1
            picture = draw_predictions(image, predictions, class_names, threshold, dim=0.5)
            picture.save(out / f"{number:06}-{file.stem}.jpg", quality=90)
            images.append(image_entry(number, str(file), image))
        results.write("\n]\n" if count else "[]\n")
    write_coco(out / "images.json", images, [], categories)
    print(f"{count} objects in {len(images)} images -> {out}: pictures, results.json, images.json")


@torch.no_grad()
def write_pseudo_labels(model, files, categories, out: Path, env: Env, test_size, config: dict) -> Path:
    """Write out/instances_train.json with the pseudo-labels of images.

    Besides COCO's keys, annotations have a "score" and images a "doubt": 1 minus the lowest score of their
    pseudo-labels, or the highest class probability of a query if they have none. Images with the highest
    doubt come first.

    config: of the training run, for the options of pseudo-labels; {} for a checkpoint of other code.
    Returns the folder that the file names start from."""
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(os.path.commonpath([file.parent for file in files]))
    options = {name: config[name] for name in ("score_threshold", "min_area") if name in config}
    category_ids = [category["id"] for category in categories]
    images, annotations = [], []
    for number, file, image in read_images(files):
        resized = resize_for_test(image, test_size)
        with autocast(env):
            outputs = model(to_tensor(resized)[None].to(env.device))
        targets = mask_nms(pseudo_labels(outputs, **options), config.get("mask_nms_iou", 1.0))
        [pseudo] = full_res_masks(targets)  # fine masks, because people will correct them
        masks = pseudo["masks"][None, :, : resized.height, : resized.width].float()
        if masks.shape[1]:
            masks = resize(masks, (image.height, image.width))
        for result in coco_results(number, {**pseudo, "masks": masks[0] > 0.5}, category_ids):
            area = int(rle_tools.area(result["segmentation"]))
            bbox = rle_tools.toBbox(result["segmentation"]).tolist()
            keys = {"id": len(annotations) + 1, "iscrowd": 0, "area": area, "bbox": bbox}
            annotations.append({**to_json(result), **keys})
        if len(pseudo["scores"]):
            doubt = 1 - float(pseudo["scores"].min())
        else:
            doubt = float(outputs["pred_logits"].float().softmax(-1)[..., :-1].max())
        name = str(file.relative_to(folder))
        images.append({**image_entry(number, name, image), "doubt": round(doubt, 4)})
    images.sort(key=lambda entry: -entry["doubt"])
    position = {entry["id"]: number for number, entry in enumerate(images)}
    annotations.sort(key=lambda entry: (position[entry["image_id"]], entry["score"]))
    write_coco(out / "instances_train.json", images, annotations, categories)
    print(f"{len(annotations)} pseudo-labels of {len(images)} images -> {out / 'instances_train.json'}")
    return folder


def training_command(config: dict, data, images) -> str:
    """Return the command that trains on a dataset with the options of another run.

    config: of that run; {} for a checkpoint of other code. data, images: the folder of the annotations, and
    that of the images."""
    words = ["python", "distill.py", "--data", str(data), "--image-folder", str(images), "--ratio", "1"]
    if "preset" in config:
        words += ["--preset", config["preset"]]
        preset = dataclasses.asdict(Config(**PRESETS[config["preset"]]))
        for name, value in config.items():
            if name not in NOT_SHARED and name in preset and value != preset[name]:
                words += ["--" + name.replace("_", "-"), format_value(value)]
    return shlex.join(words)


def to_json(result: dict) -> dict:
    """Convert the RLE of a result from bytes to a string, for JSON."""
    rle = result["segmentation"]
    return {**result, "segmentation": {**rle, "counts": rle["counts"].decode()}}


def image_entry(number: int, name: str, image: Image.Image) -> dict:
    return {"id": number, "file_name": name, "width": image.width, "height": image.height}


def write_coco(path: Path, images, annotations, categories) -> None:
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
