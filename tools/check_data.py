"""Check a dataset before spending GPU days on it.

    python -m tools.check_data my_dataset            # counts, problems, a page of images with their masks
    python -m tools.check_data coco --root datasets/coco --ratio 0.01 --unlabeled datasets/coco/unlabeled2017

Every image is read and every mask is decoded. The exit code is 2 if there are errors. Warnings do not prevent
training."""

import argparse
import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle_tools
from tqdm import tqdm

from data import CocoDataset, DataError, UnlabeledImages, encode_rle, labeled_split, split_from_file
from layouts import load_data
from layouts.images import find_unlabeled
from training.cli import Parser, add_data_flags, data_args, expected_errors
from training.visualize import draw_instances

MAX_LISTED = 100  # messages of one kind that are printed
COUNTS = ("objects", "small", "medium", "large", "crowds", "images")  # columns of the table of classes


def parse_arguments(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("data", help="a folder with instances_train.json and images/, or shapes, coco, cityscapes")
    add_data_flags(parser)
    add("--unlabeled", nargs="+", default=[], help="folders of unlabeled images")
    add("--labeled-list", default="", help="file with the labeled images, one per line")
    add("--ratio", type=float, default=0.1, help="labeled fraction of the training images [0.1]")
    add("--seed", type=int, default=0, help="seed of the labeled split [0]")
    add("--num-queries", type=int, default=100, help="number of queries of the model to train [100]")
    add("--sheet", default="sheet.png", help="file for a page of images with their masks [sheet.png]")
    hidden = dict(default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # former spellings
    add("--unlabelled", nargs="+", dest="unlabeled", **hidden)
    add("--split", dest="labeled_list", **hidden)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_arguments(argv)
    with expected_errors():
        train, val = load_data(args.data, **data_args(vars(args)), strict=False)
    errors, warnings = check_all(train, val, args)
    print()
    for kind, messages in (("warning", warnings), ("error", errors)):
        for message in messages[:MAX_LISTED]:
            print(f"{kind}: {message}")
        if len(messages) > MAX_LISTED:
            print(f"{kind}: {len(messages) - MAX_LISTED} more")
    print(f"{len(errors)} errors, {len(warnings)} warnings")
    with expected_errors():
        write_sheet(train, args.sheet)
        print(f"images with their masks: {args.sheet}")
    sys.exit(2 if errors else 0)


def check_all(train: CocoDataset, val: CocoDataset | None, args) -> tuple[list[str], list[str]]:
    """Check both datasets, the labeled split and the unlabeled images. Prints counts, returns errors and
    warnings."""
    errors, warnings, origins = [], [], {}
    for name, dataset in (("training", train), ("validation", val)):
        if dataset is None:
            warnings.append("there is no validation set, so training cannot show AP")
            continue
        print(f"\n{name}: {dataset.json_file}, {len(dataset)} images")
        print(class_table(dataset))
        new_errors, new_warnings = check_dataset(dataset, name, args.num_queries, origins)
        errors += new_errors
        warnings += new_warnings
    if val and val.class_names != train.class_names:
        errors.append(f"training has the classes {train.class_names}, validation {val.class_names}")
    try:
        warnings += check_split(train, args)
        paths, _, _ = find_unlabeled(args.unlabeled, train, val)
        errors += check_unlabeled(UnlabeledImages(train, paths))
    except ValueError as error:
        errors.append(str(error))
    return errors, warnings


def check_dataset(
    dataset: CocoDataset, name: str, num_queries: int, origins: dict
) -> tuple[list[str], list[str]]:
    """Check the images and masks of a dataset. Returns errors and warnings.

    origins: {hash of an image file: where it was first seen}, extended here."""
    file = dataset.json_file.name
    errors = [f"{file}: {message}" for message in dataset.errors]
    warnings = [f"{file}: {note}" for note in dataset.notes]
    checks = map_in_threads(dataset.image_ids, lambda image_id: check_image(dataset, image_id), name)
    for image_id, (digest, error, empty_masks) in checks:
        where = f"{file}: image {image_id}"
        if error:
            errors.append(f"{where}: {error}")
        for annotation_id in empty_masks:
            warnings.append(f"{file}: annotation {annotation_id} (image {image_id}) has an empty mask")
        if digest in origins:
            warnings.append(
                f"{where} ({dataset.file_name(image_id)!r}) is the same file as {origins[digest]}"
            )
        elif digest:
            origins[digest] = f"{where} ({dataset.file_name(image_id)!r})"
        num_objects = len(dataset.objects(image_id))
        if num_objects > num_queries:
            warnings.append(f"{where} has {num_objects} objects, the model has only {num_queries} queries")
    return errors, warnings


def check_image(dataset: CocoDataset, image_id) -> tuple[str, str, list]:
    """Read an image and its masks. Returns the hash of the file, an error or "", and the ids of annotations
    with an empty mask."""
    try:
        digest = hashlib.sha256(dataset.path(image_id).read_bytes()).hexdigest()
        dataset.image(image_id)
    except (DataError, OSError) as error:
        return "", str(error), []
    size = dataset.size(image_id)
    rles = {o["id"]: encode_rle(o["segmentation"], *size) for o in dataset.objects(image_id)}
    return digest, "", [annotation_id for annotation_id, rle in rles.items() if not rle_tools.area(rle)]


def class_table(dataset: CocoDataset) -> str:
    """Format a table with the objects (by size), crowds and images of each class."""
    class_names = dataset.class_names
    counts = {name: np.zeros(len(class_names), dtype=int) for name in COUNTS}
    objects_per_image = [len(dataset.objects(image_id)) for image_id in dataset.image_ids]
    for image_id in dataset.image_ids:
        labels = set()
        for annotation in dataset.annotations(image_id):
            label = dataset.category_ids.index(annotation["category_id"])
            labels.add(label)
            if annotation["iscrowd"]:
                counts["crowds"][label] += 1
                continue
            rle = encode_rle(annotation["segmentation"], *dataset.size(image_id))
            area = annotation["area"] or float(rle_tools.area(rle))
            # The sizes of COCO's APs, APm and APl.
            size = "small" if area < 32**2 else "medium" if area < 96**2 else "large"
            counts["objects"][label] += 1
            counts[size][label] += 1
        counts["images"][list(labels)] += 1
    totals = {name: values.sum() for name, values in counts.items()} | {"images": len(dataset)}
    width = max(len(name) for name in [*class_names, "all"]) + 2
    rows = [*zip(class_names, *counts.values()), ("all", *totals.values())]
    lines = [" " * width + "".join(f"{name:>9}" for name in COUNTS)]
    lines += [f"{name:{width}}" + "".join(f"{number:9}" for number in numbers) for name, *numbers in rows]
    highest, empty = max(objects_per_image, default=0), objects_per_image.count(0)
    lines.append(f"at most {highest} objects in an image, {empty} images without objects")
    return "\n".join(lines)


def check_split(train: CocoDataset, args) -> list[str]:
    """Print the size of the labeled split. Returns a warning if classes are missing from it."""
    if args.labeled_list:
        labeled = split_from_file(args.labeled_list, train)
    else:
        labeled = labeled_split(train.image_ids, args.ratio, args.seed)
    labels = {label for image_id in labeled for label in train.labels(image_id)}
    missing = [name for label, name in enumerate(train.class_names) if label not in labels]
    classes = f"{len(labels)} of {len(train.class_names)} classes"
    print(f"\nlabeled: {len(labeled)} of {len(train)} images, with {classes}")
    return [f"{len(missing)} classes are in no labeled image: {', '.join(missing[:20])}"] if missing else []


def check_unlabeled(images: UnlabeledImages) -> list[str]:
    """Read the unlabeled images that come from folders. Returns errors."""
    in_folders = images.image_ids[len(images.dataset) :]
    print(f"unlabeled: {len(images.image_ids)} images, {len(in_folders)} of them from folders")

    def check(image_id):
        try:
            images.image(image_id)
        except DataError as error:
            return str(error)

    return [error for _, error in map_in_threads(in_folders, check, "unlabeled") if error]


def map_in_threads(items, function, name: str):
    """Yield (item, function(item)) in order, and show a progress bar."""
    with ThreadPoolExecutor() as threads, tqdm(total=len(items), desc=name, leave=False, disable=None) as bar:
        for first in range(0, len(items), 1000):  # A million tasks at once would need much memory.
            part = items[first : first + 1000]
            yield from zip(part, threads.map(function, part))
            bar.update(len(part))


def write_sheet(dataset: CocoDataset, path, columns: int = 4, rows: int = 3, side: int = 320) -> None:
    """Draw images from all parts of the dataset, with masks and classes, on one page and save it."""
    page = Image.new("RGB", (columns * side, rows * side), "white")
    place = 0
    for image_id in dataset.image_ids[:: max(1, len(dataset) // (columns * rows))]:
        if place == columns * rows:
            break
        try:
            image, (H, W) = dataset.image(image_id), dataset.size(image_id)
        except DataError:
            continue
        masks = [rle_tools.decode(encode_rle(o["segmentation"], H, W)) > 0 for o in dataset.objects(image_id)]
        names = [dataset.class_names[label] for label in dataset.labels(image_id)]
        factor = (side - 6) / max(H, W)
        size = max(1, round(W * factor)), max(1, round(H * factor))
        masks = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
        picture = draw_instances(image.resize(size), masks, names, dim=0.5)
        page.paste(picture, (place % columns * side + 3, place // columns * side + 3))
        place += 1
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


if __name__ == "__main__":
    main()
