"""Check untrusted COCO annotations before pycocotools' C code, which checks nothing, reads them.

    dataset = load_coco("my_dataset/instances_train.json", "my_dataset/images")

Shapes: H W pixels."""

import json
import math
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image

from data import CocoDataset, DataError, rle_runs

# Pillow refuses larger images as decompression bombs, unless its limit is switched off.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)


def load_coco(json_file, image_folder, strict: bool = True) -> CocoDataset:
    """Read and validate a COCO JSON file and check that its images exist.

    Annotations without a mask are left out and listed in the `dropped` attribute of the result. Raises
    DataError for a file that is missing or invalid, or contradicts itself or its images. With strict=False
    invalid entries are left out and listed in the attribute `errors`."""
    content, errors, dropped = validate(read_json(json_file), image_folder)
    if errors and strict:
        more = f" ({len(errors)} problems in all; python -m tools.check_data lists them)"
        raise DataError(f"{json_file}: {errors[0]}{more if len(errors) > 1 else ''}")
    dataset = CocoDataset(json_file, image_folder, content)
    dataset.errors, dataset.dropped = errors, dropped
    return dataset


def read_json(json_file) -> dict[str, list]:
    """Return the lists "images", "annotations" and "categories" of a COCO JSON file. Raises DataError."""
    try:
        if not Path(json_file).is_file():  # A device such as /dev/zero would never end.
            raise FileNotFoundError
        content = json.loads(Path(json_file).read_text(encoding="utf-8"))
        lists = {name: content[name] for name in ("images", "annotations", "categories")}
        if not all(isinstance(entries, list) for entries in lists.values()):
            raise TypeError("images, annotations and categories must be lists")
        return lists
    except FileNotFoundError:
        raise DataError(f"cannot read annotations: no annotation file {str(json_file)!r}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise DataError(f"{json_file} is not a COCO instances file: {error!r}"[:500]) from None


def validate(content: dict[str, list], image_folder) -> tuple[dict[str, list], list[str], list[str]]:
    """Check every entry of a COCO file.

    Returns the valid entries {"images", "annotations", "categories"}, a message for each invalid one, and a
    message for each annotation that is left out because it has no mask."""
    errors, dropped, names, inside = [], [], set(), {}
    root = os.path.realpath(image_folder)
    categories = keep_valid(
        content["categories"], "category", lambda entry: validate_category(entry, names), errors
    )
    images = keep_valid(content["images"], "image", lambda entry: validate_image(entry, root, inside), errors)
    annotations = keep_valid(
        content["annotations"],
        "annotation",
        lambda entry: validate_annotation(entry, images, categories, dropped),
        errors,
    )
    valid = {"images": images, "annotations": annotations, "categories": categories}
    return {name: [e for e in entries.values() if e] for name, entries in valid.items()}, errors, dropped


def keep_valid(entries: list, kind: str, validate_entry, errors: list[str]) -> dict:
    """Validate entries one by one and append a message to `errors` for each invalid one.

    Returns {id: entry as validate_entry returns it}, with None for an entry that is left out."""
    result = {}
    for entry in entries:
        name = f"{kind} {entry.get('id')!r}" if isinstance(entry, dict) else f"{kind} {entry!r}"
        try:
            if not isinstance(entry, dict) or type(entry.get("id")) is not int:
                raise DataError("its id is not an integer")
            if entry["id"] in result:
                raise DataError("its id is used twice")
            result[entry["id"]] = None
            result[entry["id"]] = validate_entry(entry)
        except DataError as error:
            errors.append(f"{name[:80]}: {error}")
    return result


def validate_category(entry: dict, names: set) -> dict:
    """Check that a category has a name that is not among `names`, and add it there. Raises DataError."""
    name = entry.get("name")
    if not isinstance(name, str):
        raise DataError(f"its name {name!r} is not text"[:200])
    if name in names:
        raise DataError(f"its name {name!r} is used twice"[:200])
    names.add(name)
    return {"id": entry["id"], "name": name}


def validate_image(entry: dict, root: str, inside: dict) -> dict:
    """Check that an image has a sensible size and that its file lies in the image folder. Raises DataError.

    Args:
        root: the real path of the image folder. A link from there to a file outside is refused.
        inside: a cache, filled here: {subfolder: True if its real path is below root}."""

    def is_inside(path):
        real = os.path.realpath(path)
        return real == root or real.startswith(os.path.join(root, ""))

    name, size = entry.get("file_name"), (entry.get("height"), entry.get("width"))
    if not all(type(side) is int and side > 0 for side in size) or size[0] * size[1] > MAX_PIXELS:
        raise DataError(f"height and width {size!r} are not a valid image size"[:200])
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"its file_name {name!r} is not a file name"[:200])
    path = os.path.join(root, name)
    parent = os.path.dirname(path)
    if parent not in inside:
        inside[parent] = is_inside(parent)
    try:
        is_link = stat.S_ISLNK(os.lstat(path).st_mode)
        if not inside[parent] or (is_link and not is_inside(path)):
            raise DataError(f"its file {name!r} is outside of {root}"[:500])
        exists = stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, UnicodeError):  # UnicodeError: no file system has such a name.
        exists = False
    if not exists:
        raise DataError(f"its file {ascii(name)} is not in {root}"[:500])
    return {key: entry[key] for key in ("id", "height", "width", "file_name")}


def validate_annotation(entry: dict, images: dict, categories: dict, dropped: list[str]) -> dict | None:
    """Check an annotation against its image and category. Raises DataError.

    Returns the annotation with the keys that training needs. Returns None if its image or category is
    invalid, which has been reported already, and if it has no mask, which is appended to `dropped`."""
    for key, entries in (("image_id", images), ("category_id", categories)):
        if type(entry.get(key)) is not int or entry[key] not in entries:
            raise DataError(f"its {key} {entry.get(key)!r} is not in the file"[:200])
    image = images[entry["image_id"]]
    if not image or not categories[entry["category_id"]]:
        return None
    iscrowd, area = entry.get("iscrowd") or 0, entry.get("area")
    if iscrowd not in (0, 1):
        raise DataError(f"its iscrowd {iscrowd!r} is not 0 or 1"[:200])
    try:
        mask = validate_mask(entry.get("segmentation"), image["height"], image["width"])
    except DataError as error:
        raise DataError(f"(image {entry['image_id']}) {error}") from None
    if mask is None:
        dropped.append(f"annotation {entry['id']} (image {entry['image_id']}) has no mask")
        return None
    valid = {key: entry[key] for key in ("id", "image_id", "category_id")}
    valid["area"] = float(area) if isinstance(area, (int, float)) and 0 < area < MAX_PIXELS else None
    return {**valid, "iscrowd": iscrowd, "segmentation": mask}


def validate_mask(segmentation, H: int, W: int):
    """Check the segmentation of an object in an image (H, W). Raises DataError for one that is invalid.

    Returns a segmentation that pycocotools can read safely, without the polygons that `is_polygon` refuses,
    or None if no mask is left."""
    if isinstance(segmentation, list):
        return [polygon for polygon in segmentation if is_polygon(polygon, max(H, W))] or None
    if not isinstance(segmentation, dict):
        raise DataError("its segmentation is neither polygons nor an RLE")
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [H, W]:
        raise DataError(f"the (height, width) of its RLE is {size!r}, that of its image {[H, W]}"[:200])
    if isinstance(counts, str):
        counts = rle_runs(counts).tolist()
    elif not isinstance(counts, list) or not all(type(run) is int and run >= 0 for run in counts):
        raise DataError("its RLE has no valid counts")
    if sum(counts) != H * W:
        raise DataError(f"the runs of its RLE sum to {sum(counts)}, the image has {H * W} pixels"[:200])
    return {"size": size, "counts": segmentation["counts"]} if any(counts[1::2]) else None


def is_polygon(polygon, longest_side: int) -> bool:
    """Check that a polygon is a list x, y, x, y, ... of at least three corners near its image.

    No corner may be further outside than the longest side of the image. The outline of a polygon with many
    corners may not be absurdly long, because pycocotools needs memory for every pixel of it."""
    try:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return False
        if not math.isfinite(sum(polygon)) or min(polygon) < -longest_side or max(polygon) > 2 * longest_side:
            return False
        if len(polygon) > 600:
            length = np.abs(np.diff(np.reshape(polygon, (-1, 2)), axis=0)).sum()
            return bool(length <= 2000 * longest_side)
        return True
    except (TypeError, OverflowError):  # an element that is no number, or too large for a float
        return False
