"""Predict the instances in any images, or write pseudo-labels that people can correct.

    python -m tools.predict runs/coco-0.01/distill.pt photos/ --out predictions/
    python -m tools.predict runs/parts-1/distill.pt photos/ --tile 512      # trained on parts of such photos
    python -m tools.predict runs/my_dataset-1/distill.pt photos/ --pseudo-labels to_correct/

The first two commands write a picture of each image with its instances, and results.json, a list of
detections that pycocotools reads: original category ids, masks as RLE, and image ids that number the files.

The last command writes a dataset: the teacher's pseudo-labels (burnin.pseudo_labels), with the most doubtful
images first, then the labels of the run. Train on it after people have corrected the pseudo-labels.

One image is in memory at a time, and one of its masks."""

if __name__ == "__main__":
    from training.cli import answer_early

    answer_early()

import functools
import json
import os
import shlex
import tempfile
from pathlib import Path

import torch
from PIL import Image
from pycocotools import mask as rle_tools
from tqdm import tqdm

from burnin import pseudo_labels
from data import (
    CocoDataset,
    DataError,
    encode_rle,
    read_image,
    shortest_edge_size,
    split_hash,
    to_tensor,
)
from evaluate import (
    CPU,
    add_model_arguments,
    coco_results,
    encode_masks,
    model_settings,
    predict_image,
    resize_for_test,
    run_data_args,
    upsample_masks,
    validation_set,
)
from interop.load import load_any_checkpoint
from layouts.images import find_copies, list_image_files
from training.checkpoint import check_classes, load_model
from training.cli import Parser, add_data_flags, data_args, expected_errors
from training.config import Config
from training.distributed import Env, autocast, warn_once, world_size
from training.robust import large_masks, mask_nms
from training.run_data import Data, read_data
from training.tiles import predict_tiles
from training.visualize import draw_predictions

MAX_PICTURE_SIDE = 4000  # pixels


def parse_arguments(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="file or folder: ours, the official Mask2Former's, or Hugging Face's")
    add("images", nargs="+", metavar="DIR|FILE", help="image files, and folders, searched recursively")
    add("--out", default="predictions", help="folder for pictures and results.json [predictions]")
    threshold = "keep scores above this, in [0, 1) [0.5; --score-threshold of the run for --pseudo-labels]"
    add("--threshold", type=float, help=threshold)
    add("--pseudo-labels", metavar="DIR", help="write the teacher's pseudo-labels there, to correct them")
    add("--overwrite", action="store_true", help="replace the files of an earlier call")
    add("--which", choices=("student", "teacher"), help="model to use [student; teacher for --pseudo-labels]")
    add("--data", help="take the classes, and the labels of the run, from this dataset [from the checkpoint]")
    add_data_flags(parser)
    add_model_arguments(parser)
    return parser.parse_args(argv)


def check_flags(flags) -> None:
    """Raises ValueError for flags out of range, and for an output folder that is in use."""
    if flags.threshold is not None and not 0 <= flags.threshold < 1:
        raise ValueError(f"--threshold must be in [0, 1), found {flags.threshold:g}; 50 % is 0.5")
    flag, folder, file = "--out", flags.out, "results.json"
    if flags.pseudo_labels:
        flag, folder, file = "--pseudo-labels", flags.pseudo_labels, "instances_train.json"
    if (Path(folder) / file).exists() and not flags.overwrite:
        raise ValueError(f"{folder} has {file} already; pass another {flag}, or --overwrite to replace it")


def main(argv=None) -> None:
    flags = parse_arguments(argv)
    with expected_errors():
        check_flags(flags)
        checkpoint = load_any_checkpoint(flags.checkpoint)
        config = checkpoint.get("config", {})
        settings = model_settings(flags, config)
        if world_size() > 1:
            raise ValueError("tools.predict runs in one process; start it without torchrun")
        # A phase without a teacher has trained a model that can be one.
        has_teacher = checkpoint["teacher"] is not None
        which = flags.which or ("teacher" if flags.pseudo_labels and has_teacher else "student")
        if which == "teacher" and not has_teacher:
            raise ValueError(f"{flags.checkpoint} has only one model; use --which student")
        model = load_model(checkpoint, settings["env"].device, "model" if which == "student" else "teacher")
        pixel_range = checkpoint.get("pixel_range")  # of the training images, if they have more than 8 bits
        files = find_images(flags.images)
        if flags.pseudo_labels:
            run = read_run(checkpoint, flags) if config.get("data") else None
            categories = find_categories(checkpoint, flags, run)
            names = ("score_threshold", "min_area", "mask_nms_iou")
            options = {name: config[name] for name in names if name in config}
            if flags.threshold is not None:
                options["score_threshold"] = flags.threshold
            predict = functools.partial(find_pseudo_labels, model, **settings, **options)
            write_pseudo_labels(predict, files, categories, Path(flags.pseudo_labels), run, pixel_range)
            print_training_commands(flags, run)
        else:
            threshold = 0.5 if flags.threshold is None else flags.threshold
            predict = functools.partial(predict_image, model, threshold=threshold, **settings)
            test_size = None if settings["tile"] else settings["test_size"]
            categories = find_categories(checkpoint, flags)
            write_predictions(predict, files, categories, Path(flags.out), test_size, pixel_range)


def find_categories(checkpoint: dict, flags, run: Data | None = None) -> list[dict]:
    """Return the categories of a run, a checkpoint or --data in COCO's form, in the order of labels. Raises
    ValueError if --data has other classes than the checkpoint."""
    K = checkpoint["model_args"]["num_classes"]
    names = checkpoint.get("class_names") or [f"class {k}" for k in range(K)]
    ids = checkpoint.get("category_ids") or list(range(1, K + 1))
    if run:
        names, ids = run.train.class_names, run.train.category_ids
    elif flags.data or data_args(vars(flags)):
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


def read_images(files: list[Path], pixel_range=None):
    """Yield (number, file, image) of the images that can be read, and warn about the others. Raises
    DataError at the end if none could be read.

    pixel_range: of the training images, see data.read_image."""
    unreadable = 0
    for number, file in enumerate(tqdm(files, desc="images", disable=None), start=1):
        try:
            image = read_image(file, pixel_range=pixel_range)
        except DataError as error:
            unreadable += 1
            warn_once(f"{error}; skipping it")
            continue
        yield number, file, image
    if unreadable == len(files):
        raise DataError(f"none of the {len(files)} images can be read")


def write_predictions(predict, files, categories, out: Path, test_size=None, pixel_range=None) -> None:
    """Write out/<number>-<name>.jpg with the instances of each image, and out/results.json with the same
    instances in COCO's result form. out/images.json is a COCO file without annotations, for
    COCO("images.json").loadRes("results.json").

    Args:
        predict: from an image to {"scores", "labels", "rles"}.
        test_size: to which whole images are resized, for a warning if little remains of one."""
    out.mkdir(parents=True, exist_ok=True)
    category_ids, class_names = zip(*((category["id"], category["name"]) for category in categories))
    count, images = 0, []
    with open(out / "results.json", "w") as results:
        for number, file, image in read_images(files, pixel_range):
            height = shortest_edge_size(image.height, image.width, *test_size or (0, 0))[0]
            if height < image.height / 4:
                warn_once(
                    f"{str(file)!r} of {image.height} x {image.width} pixels is {height} pixels high for the "
                    "model, so small objects get lost; if the training images were smaller, pass --tile and "
                    "their side"
                )
                test_size = None  # One such line is enough.
            predictions = predict(image)
            for result in coco_results(number, predictions, category_ids):
                results.write(("," if count else "[") + "\n" + json.dumps(to_json(result)))
                count += 1
            scale = min(1, MAX_PICTURE_SIDE / max(image.size))
            picture = draw_predictions(image, predictions, class_names, 0, scale=scale, dim=0.5)
            picture.save(out / f"{number:06}-{file.stem}.jpg", quality=90)
            images.append(image_entry(number, str(file), image))
        results.write("\n]\n" if count else "[]\n")
    write_coco(out / "images.json", images, [], categories)
    print(f"{count} objects in {len(images)} images -> {out}: pictures, results.json, images.json")


@torch.no_grad()
def find_pseudo_labels(
    model, image: Image.Image, *, env: Env, test_size, tile=0,
    score_threshold=0.7, min_area=5, mask_nms_iou=1.0,
) -> dict:  # fmt: skip
    """Return the pseudo-labels of an image {"scores" (N,), "labels" (N,), "rles"}, and "highest", the highest
    class probability of a query. Masks have the resolution of the image, because people will correct them.

    test_size, tile: as in `evaluate.predict_image`."""
    highest = []

    def predict(images: list[Image.Image]) -> list[dict]:
        resized, results = [resize_for_test(image, test_size, tile) for image in images], []
        with autocast(env):
            outputs = model(torch.stack([to_tensor(image) for image in resized]).to(env.device))
        highest.append(float(outputs["pred_logits"].float().softmax(-1)[..., :-1].max()))
        found = mask_nms(pseudo_labels(outputs, score_threshold, min_area), mask_nms_iou)
        found = large_masks(found, min_area) if 0 < min_area < 1 else found
        for image, small, pseudo in zip(images, resized, found):
            rles = []
            if len(pseudo["scores"]):
                sizes = (small.height, small.width), (image.height, image.width)
                for masks, _ in upsample_masks(pseudo["mask_logits"], *sizes):
                    rles += encode_masks(masks)
            results.append({"scores": pseudo["scores"], "labels": pseudo["labels"], "rles": rles})
        return results

    result = predict_tiles(predict, image, tile) if tile else predict([image])[0]
    return {**result, "highest": max(highest)}


def write_pseudo_labels(predict, files, categories, out: Path, run: Data | None, pixel_range=None) -> None:
    """Write a dataset to a folder: out/instances_train.json has the pseudo-labels of images and the labels of
    a run, out/instances_val.json the validation set of the run. out/images has links to the image folders.

    Besides COCO's keys, pseudo-labels have a "score" and new images a "doubt": 1 minus the lowest score of
    their pseudo-labels, or the highest class probability of a query if they have none. Images with the
    highest doubt come first, and those of the run last. Images that the run has labels for are left out.

    Args:
        predict: as `find_pseudo_labels`, from an image alone.
        run: the data of the training run; None for a checkpoint of other code."""
    files = without_labeled(files, run)
    folder = Path(os.path.commonpath([file.parent for file in files]))
    link(out / "images/new", folder)
    category_ids = [category["id"] for category in categories]
    images, annotations = [], []
    for number, file, image in read_images(files, pixel_range):
        result = predict(image)
        for pseudo in coco_results(number, result, category_ids):
            annotations.append({"id": len(annotations) + 1, **with_box(to_json(pseudo))})
        doubt = 1 - float(result["scores"].min()) if len(result["scores"]) else result["highest"]
        name = f"new/{file.relative_to(folder)}"
        images.append({**image_entry(number, name, image), "doubt": round(doubt, 4)})
    images.sort(key=lambda entry: -entry["doubt"])
    position = {entry["id"]: number for number, entry in enumerate(images)}
    annotations.sort(key=lambda entry: (position[entry["image_id"]], entry["score"]))
    count = f"{len(annotations)} pseudo-labels of {len(images)} new images"
    if not annotations:
        highest = f"the highest score is {images[0]['doubt']:.2f}"
        advice = "pass a --threshold below it, or train the teacher longer"
        print(f"warning: no prediction became a pseudo-label, {highest}; {advice}")
    if run:
        link(out / "images/train", run.train.image_folder)
        content = coco_entries(run.train, run.labeled, "train", len(files) + 1, len(annotations) + 1)
        images, annotations = images + content[0], annotations + content[1]
        count += f", {len(content[1])} labels of {len(content[0])} labeled images"
        if run.val:
            link(out / "images/val", run.val.image_folder)
            content = coco_entries(run.val, run.val.image_ids, "val")
            write_coco(out / "instances_val.json", *content, categories)
    write_coco(out / "instances_train.json", images, annotations, categories)
    print(f"{count} -> {out / 'instances_train.json'}")


def without_labeled(files: list[Path], run: Data | None) -> list[Path]:
    """Leave out the labeled images of a run and its validation images. Raises DataError if none remain."""
    if not run:
        return files
    known = [run.train.path(image_id) for image_id in run.labeled]
    known += [run.val.path(image_id) for image_id in run.val.image_ids] if run.val else []
    known = set(map(os.path.realpath, known))
    paths = [str(file) for file in files if str(file) not in known]
    copies = find_copies(paths, known)
    new = [Path(path) for path in paths if path not in copies]
    if len(new) < len(files):
        number = len(files) - len(new)
        print(f"warning: skipping {number} images that are labeled in the run or in its validation set")
    if not new:
        raise DataError("cannot write pseudo-labels: no image is left; pass images that have no labels")
    return new


def read_run(checkpoint: dict, flags) -> Data:
    """Read the data that a checkpoint was trained on, or the same from --data. Raises ValueError if other
    images are labeled there."""
    config = checkpoint["config"]
    data = flags.data or config["data"]
    reading = run_data_args(config, data) | data_args(vars(flags))
    with tempfile.TemporaryDirectory() as out:  # reading the data reserves the folder of a run
        changes = {"out": out, "data": data, "data_args": reading, "unlabeled": None}
        cfg = Config(**config | changes)
        cfg.given = frozenset(config)
        run = read_data(cfg, CPU)
    check_classes(checkpoint, run.train.class_names)
    if checkpoint.get("split") not in (None, split_hash(run.labeled)):
        raise ValueError(f"{flags.checkpoint} was trained on other labeled images than {data}'s; pass --data")
    return run


def coco_entries(
    dataset: CocoDataset, image_ids, folder: str, image_number: int = 1, annotation_number: int = 1
) -> tuple[list[dict], list[dict]]:
    """Return images of a dataset and their annotations, numbered from the given numbers on. The names of the
    files start with a folder."""
    images, annotations = [], []
    for number, image_id in enumerate(image_ids, start=image_number):
        H, W = dataset.size(image_id)
        name = f"{folder}/{dataset.file_name(image_id)}"
        images.append({"id": number, "file_name": name, "width": W, "height": H})
        for annotation in dataset.annotations(image_id):
            numbers = {"id": annotation_number + len(annotations), "image_id": number}
            annotations.append(with_box({**annotation, **numbers}, H, W))
    return images, annotations


def with_box(annotation: dict, H: int = 0, W: int = 0) -> dict:
    """Add what annotation tools read: "bbox", and "iscrowd" and "area" if they are missing. H, W: size of the
    image, for polygons."""
    rle = encode_rle(annotation["segmentation"], H, W)
    area = annotation.get("area") or int(rle_tools.area(rle))
    return {"iscrowd": 0, **annotation, "area": area, "bbox": rle_tools.toBbox(rle).tolist()}


def link(path: Path, folder: Path) -> None:
    """Make path a symbolic link to a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(folder.resolve(), target_is_directory=True)


def print_training_commands(flags, run: Data | None) -> None:
    """Print the commands that train on the corrected pseudo-labels: from the start, and with the model of the
    checkpoint as the teacher."""
    # People have looked at all images, so that one without annotations has no object.
    words = ["python", "distill.py", "--data", flags.pseudo_labels, "--unannotated", "background"]
    folder = Path(flags.checkpoint) if Path(flags.checkpoint).is_dir() else Path(flags.checkpoint).parent
    if run and (folder / "settings.json").exists():
        words += ["--settings-from", flags.checkpoint]
    print(f"to train on them after correction: {shlex.join(words)}")
    words += ["--teacher-checkpoint", flags.checkpoint]
    print(f"with this model as the teacher: {shlex.join(words)}")


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
