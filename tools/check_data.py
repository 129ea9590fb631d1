"""Check a dataset before spending GPU days on it.

    python -m tools.check_data my_dataset            # what a run would see, and a page of images with masks
    python -m tools.check_data my_dataset --unlabeled my_images/ --sheet my_dataset.png
    python -m tools.check_data coco --root datasets/coco --ratio 0.01 --unlabeled datasets/coco/unlabeled2017

The dataset comes first. The flags are those of a run (python distill.py --help), and mean the same. --sheet
FILE is the page of images with their masks [sheet.png].

Every image is read and every mask is decoded. The exit code is 2 if a run with these flags would be refused,
or would end because it cannot read its images. Warnings do not prevent training."""

import hashlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle_tools
from tqdm import tqdm

from data import CocoDataset, DataError, encode_rle
from layouts import load_data
from layouts.validate import format_bins
from training.cli import Parser, expected_errors, parse_config
from training.config import Config
from training.distributed import Env
from training.run_data import Data, bins_of_run, data_warnings, select_data, too_many_unreadable
from training.setup import choice_lines, complete_settings, join_processes
from training.visualize import draw_instances

MAX_LISTED = 100  # messages of one kind that are printed
COUNTS = ("objects", "small", "medium", "large", "crowds", "images")  # columns of the table of classes


def parse_arguments(argv=None) -> tuple[Config, str]:
    """Return the Config of a run with these flags, and the file for the page of images."""
    own_flags = Parser(None, add_help=False)
    own_flags.add_argument("--sheet", default="sheet.png")
    own, flags = own_flags.parse_known_args(argv)
    if flags and not flags[0].startswith("-"):
        flags = ["--data", *flags]
    return parse_config(flags, __doc__), own.sheet


def main(argv=None) -> None:
    with expected_errors():
        cfg, sheet = parse_arguments(argv)
        env = join_processes(cfg)
        train, val = load_data(cfg.data, **cfg.data_args, strict=False)
    print(f"{cfg.data}: {train.layout}")
    errors, warnings = check(cfg, env, train, val)
    print()
    for kind, messages in (("warning", warnings), ("error", errors)):
        messages = list(dict.fromkeys(messages))
        for message in messages[:MAX_LISTED]:
            print(f"{kind}: {message}")
        if len(messages) > MAX_LISTED:
            print(f"{kind}: {len(messages) - MAX_LISTED} more")
    print(f"{len(set(errors))} errors, {len(set(warnings))} warnings")
    with expected_errors():
        write_sheet(train, sheet)
        print(f"images with their masks: {sheet}")
    sys.exit(2 if errors else 0)


def check(cfg: Config, env: Env, train: CocoDataset, val: CocoDataset | None) -> tuple[list[str], list[str]]:
    """Check datasets, their images, and the settings of a run. Prints tables, returns errors and warnings."""
    datasets = {"training": train} if val is None else {"training": train, "validation": val}
    errors = [f"{d.json_file}: {message}" for d in datasets.values() for message in d.errors]
    data, warnings = None, []
    try:
        data = select_data(cfg, env, train, val)
        complete_settings(cfg, data)
        warnings += data_warnings(cfg, data)
    except (ValueError, OSError) as error:
        errors.append(str(error))
    origins, unreadable = {}, {}
    for name, dataset in datasets.items():
        bins = bins_of_run(data) if data and dataset is train else dataset.bins
        print(f"\n{name}: {dataset.json_file}, {len(dataset)} images")
        print("\n".join(dataset_lines(dataset, bins, cfg.num_queries)))
        unreadable[name], found = check_images(dataset, name, origins)
        warnings += found
    errors += unreadable.get("validation", {}).values()
    damaged, too_many = list(unreadable["training"].values()), []
    if data:
        print("\n".join(("", *split_lines(data), *choice_lines(cfg))))
        damaged += read_unlabeled(data)
        of_labeled = [unreadable["training"][i] for i in data.labeled if i in unreadable["training"]]
        too_many = [
            *data.errors,
            *too_many_unreadable("labeled", of_labeled, len(data.labeled)),
            *too_many_unreadable("unlabeled", damaged, len(data.unlabeled.image_ids)),
        ]
    errors += too_many[:1]
    if too_many:
        errors += damaged
    else:
        warnings += [f"{error}; another image takes its place" for error in damaged]
    return errors, warnings


def dataset_lines(dataset: CocoDataset, bins: dict[str, int], num_queries: int) -> Iterator[str]:
    """Yield lines about the classes, annotations, objects and sizes of the images of a dataset."""
    yield class_table(dataset)
    if bins:
        yield f"annotations: {sum(bins.values()):,}\n{format_bins(bins)}"
    counts = [len(dataset.objects(image_id)) for image_id in dataset.image_ids]
    highest, many = max(counts, default=0), sum(count > num_queries for count in counts)
    yield (
        f"at most {highest} objects in an image, {counts.count(0)} images without objects, {many} with more "
        f"than the {num_queries} queries of the model"
    )
    sizes = sorted(map(dataset.size, dataset.image_ids), key=lambda size: size[0] * size[1])
    if sizes:
        places = {"smallest": 0, "median": len(sizes) // 2, "largest": -1}
        named = [f"{name} {sizes[place][0]} x {sizes[place][1]}" for name, place in places.items()]
        yield f"image sizes (height x width): {', '.join(named)}"


def check_images(dataset: CocoDataset, name: str, origins: dict) -> tuple[dict, list[str]]:
    """Read the images and masks of a dataset. Returns {image id: why it cannot be read}, and warnings.

    origins: {hash of an image file: where it was first seen}, extended here."""
    unreadable, warnings = {}, []
    checks = map_in_threads(dataset.image_ids, lambda image_id: check_image(dataset, image_id), name)
    for image_id, (digest, error, empty_masks) in checks:
        where = f"{dataset.json_file.name}: image {image_id} ({dataset.file_name(image_id)!r})"
        if error:
            unreadable[image_id] = error
        for annotation_id in empty_masks:
            warnings.append(f"{where}: the mask of annotation {annotation_id} has no pixel")
        if digest in origins:
            warnings.append(f"{where} is the same file as {origins[digest]}")
        elif digest:
            origins[digest] = where
    return unreadable, warnings


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
    return "\n".join(lines)


def split_lines(data: Data) -> Iterator[str]:
    """Yield the number of labeled and of unlabeled images."""
    train = data.train
    labels = {label for image_id in data.labeled for label in train.labels(image_id)}
    classes = f"{len(labels)} of {data.num_classes} classes"
    yield f"labeled: {len(data.labeled):,} of {len(train):,} images, with {classes}"
    folders = "".join(f", {count:,} of {folder}" for folder, count in data.folder_counts.items())
    yield f"unlabeled: {len(data.unlabeled.image_ids):,} images: {len(train):,} training images{folders}"


def read_unlabeled(data: Data) -> list[str]:
    """Read the images of --unlabeled. Returns why some cannot be read."""

    def check(image_id) -> str:
        try:
            data.unlabeled.image(image_id)
            return ""
        except DataError as error:
            return str(error)

    in_folders = data.unlabeled.image_ids[len(data.train) :]
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
