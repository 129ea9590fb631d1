"""The dataset checker: what is in a data set, and what is wrong with it, before it costs days.

    python data.py my_dataset                        # counts, problems, a sheet of images with their masks
    python data.py coco --root datasets/coco --ratio 0.01 --unlabelled datasets/coco/unlabeled2017

Every image is read and every mask decoded. Errors end it with exit code 2; warnings are things that training
can do with."""

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle_tools
from tqdm import tqdm

from data import CocoDataset, DataError, Pool, find_data, labelled_split, listed_split, to_rle
from evaluate import draw_instances
from flags import Parser, user_errors

SHOWN = 100  # problems of a kind that are listed


def main(argv=None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "data", help="a folder with instances_train.json and images/, or shapes, coco, cityscapes"
    )
    parser.add_argument("--root", help="where COCO or Cityscapes lies")
    for name in ("train-json", "val-json", "image-folder"):
        parser.add_argument(f"--{name}", default="", help="in place of the folder's own")
    parser.add_argument("--unlabelled", nargs="+", default=[], help="folders of unlabelled images")
    parser.add_argument("--split", help="file with the labelled images, a line each")
    parser.add_argument(
        "--ratio", type=float, default=0.1, help="labelled share of the training images [0.1]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the labelled split [0]")
    parser.add_argument("--num-queries", type=int, default=100, help="of the model to be trained [100]")
    parser.add_argument(
        "--sheet", default="sheet.png", help="where to write images with their masks [sheet.png]"
    )
    flags = parser.parse_args(argv)
    with user_errors():
        files = {"train_json": flags.train_json, "val_json": flags.val_json, "images": flags.image_folder}
        found = find_data(flags.data, flags.root, **files)
        parts = [CocoDataset(*arguments, strict=False) if arguments else None for arguments in found]
    errors, warnings = report(*parts, flags)
    print()
    for kind, messages in (("warning", warnings), ("error", errors)):
        print(*(f"{kind}: {message}" for message in messages[:SHOWN]), sep="\n", end="\n" if messages else "")
        if len(messages) > SHOWN:
            print(f"{kind}: {len(messages) - SHOWN} more")
    print(f"{len(errors)} errors, {len(warnings)} warnings")
    with user_errors():
        sheet(parts[0], flags.sheet)
        print(f"images with their masks: {flags.sheet}")
    sys.exit(2 if errors else 0)


def report(train: CocoDataset, val: CocoDataset | None, flags) -> tuple[list[str], list[str]]:
    """Prints the counts, and returns errors and warnings."""
    errors, warnings, seen = [], [], {}
    for name, dataset in (("training", train), ("validation", val)):
        if dataset is None:
            warnings.append("there is no validation set: training will show no AP")
            continue
        print(f"\n{name}: {dataset.json_file}, {len(dataset)} images")
        file = dataset.json_file.name
        errors += [f"{file}: {message}" for message in dataset.errors]
        warnings += [f"{file}: {message}, it is left out" for message in dataset.dropped]
        print(counts(dataset))
        checks = in_threads(dataset.image_ids, lambda i, dataset=dataset: check_image(dataset, i), name)
        for image_id, (digest, error, empty) in checks:
            where = f"{file}: image {image_id}"
            errors += [f"{where}: {error}"] if error else []
            warnings += [
                f"{file}: annotation {number} (image {image_id}) has an empty mask" for number in empty
            ]
            if digest in seen:
                warnings.append(
                    f"{where} ({dataset.file_name(image_id)!r}) is the same file as {seen[digest]}"
                )
            elif digest:
                seen[digest] = f"{file}: image {image_id} ({dataset.file_name(image_id)!r})"
            number = len(dataset.objects(image_id))
            if number > flags.num_queries:
                warnings.append(f"{where} has {number} objects, the model {flags.num_queries} queries")
    if val and val.class_names != train.class_names:
        errors.append(f"training has the classes {train.class_names}, validation {val.class_names}")
    try:
        warnings += split_warnings(train, flags)
        errors += pool_errors(Pool(train, flags.unlabelled, known=[train, val]))
    except ValueError as error:
        errors.append(str(error))
    return errors, warnings


def counts(dataset: CocoDataset) -> str:
    """A table: of each class its objects by size, crowds, and images."""
    names = ("objects", "small", "medium", "large", "crowds", "images")
    table = np.zeros((len(dataset.class_names), len(names)), dtype=int)
    objects, empty = [], 0
    for image_id in dataset.image_ids:
        classes = set()
        for annotation in dataset.annotations(image_id):
            label = dataset.category_ids.index(annotation["category_id"])
            classes.add(label)
            if annotation["iscrowd"]:
                table[label, 4] += 1
                continue
            rle = to_rle(annotation["segmentation"], *dataset.size(image_id))
            area = annotation["area"] or float(rle_tools.area(rle))
            table[label, 0] += 1
            table[label, 1 + (area >= 32**2) + (area >= 96**2)] += 1
        table[list(classes), 5] += 1
        objects.append(len(dataset.objects(image_id)))
        empty += not objects[-1]
    width = max(len(name) for name in [*dataset.class_names, "all"]) + 2
    lines = [" " * width + "".join(f"{name:>9}" for name in names)]
    rows = [*zip(dataset.class_names, table), ("all", [*table[:, :5].sum(0), len(dataset)])]
    lines += [f"{name:{width}}" + "".join(f"{value:9}" for value in row) for name, row in rows]
    lines.append(f"{max(objects, default=0)} objects in an image at most, {empty} images without objects")
    return "\n".join(lines)


def check_image(dataset: CocoDataset, image_id) -> tuple[str, str, list]:
    """The hash of an image's file, what is wrong with it, and the ids of annotations with an empty mask."""
    try:
        digest = hashlib.sha256(dataset.path(image_id).read_bytes()).hexdigest()
        dataset.image(image_id)
    except (DataError, OSError) as error:
        return "", str(error), []
    rles = [(o["id"], to_rle(o["segmentation"], *dataset.size(image_id))) for o in dataset.objects(image_id)]
    return digest, "", [number for number, rle in rles if not rle_tools.area(rle)]


def split_warnings(train: CocoDataset, flags) -> list[str]:
    """About the labelled images."""
    if flags.split:
        labelled = listed_split(flags.split, train)
    else:
        labelled = labelled_split(train.image_ids, flags.ratio, flags.seed)
    known = {label for image_id in labelled for label in train.labels(image_id)}
    missing = [name for label, name in enumerate(train.class_names) if label not in known]
    with_classes = f"with {len(known)} of {len(train.class_names)} classes"
    print(f"\nlabelled: {len(labelled)} images of {len(train)}, {with_classes}")
    return [f"{len(missing)} classes are in no labelled image: {', '.join(missing[:20])}"] if missing else []


def pool_errors(pool: Pool) -> list[str]:
    """Reads the unlabelled images that are in no annotation file."""
    numbers = pool.image_ids[len(pool.dataset) :]
    print(f"unlabelled pool: {len(pool.image_ids)} images, {len(numbers)} of them from folders")

    def check(number):
        try:
            pool.image(number)
        except DataError as error:
            return str(error)

    return [error for _, error in in_threads(numbers, check, "unlabelled") if error]


def in_threads(items, function, name: str):
    """Yields each item with what the function makes of it, and shows how far it is."""
    with ThreadPoolExecutor() as threads, tqdm(total=len(items), desc=name, leave=False, disable=None) as bar:
        for first in range(0, len(items), 1000):  # or a million would wait at once
            part = items[first : first + 1000]
            yield from zip(part, threads.map(function, part))
            bar.update(len(part))


def sheet(dataset: CocoDataset, path, columns: int = 4, rows: int = 3, side: int = 320) -> None:
    """Writes images, spread over the data set, with their masks and classes."""
    page = Image.new("RGB", (columns * side, rows * side), "white")
    place = 0
    for image_id in dataset.image_ids[:: max(1, len(dataset) // (columns * rows))]:
        if place == columns * rows:
            break
        try:
            image, (H, W) = dataset.image(image_id), dataset.size(image_id)
        except DataError:
            continue
        masks = [rle_tools.decode(to_rle(o["segmentation"], H, W)) > 0 for o in dataset.objects(image_id)]
        names = [dataset.class_names[label] for label in dataset.labels(image_id)]
        factor = (side - 6) / max(H, W)
        size = max(1, round(W * factor)), max(1, round(H * factor))
        masks = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
        picture = draw_instances(image.resize(size), masks, names, dim=0.5)
        page.paste(picture, (place % columns * side + 3, place // columns * side + 3))
        place += 1
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
