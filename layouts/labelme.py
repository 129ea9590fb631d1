"""labelme: a JSON file for each image, with shapes of several types, converted to COCO form in memory.

Polygons, circles and masks are objects. A rectangle is a box without a mask. Points and lines have no
area. Shapes of one label and group are one object."""

import base64
import io
import json
import math
import posixpath
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle_tools

from layouts.files import (
    Found,
    Source,
    files_below,
    has_keys,
    image_size,
    printable,
    split_of,
)

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 2**26  # of an image whose size is in its JSON file
CIRCLE_CORNERS = 40


def find(folder: Path) -> Found | None:
    """Find and convert the JSON files below a folder. Subfolders such as train/ and valid/ are splits.

    Returns None if there is no such file among the first ten JSON files."""
    files = files_below(folder, (".json",))
    if not any(has_keys(folder / file, "shapes", "imagePath") for file in files[:10]):
        return None
    images = files_below(folder)
    shapes, sizes, errors = read_shapes(folder, files, images)
    splits = {"train": [], "val": [], "test": []}
    for name in sorted({*images, *shapes}):
        splits[split_of(posixpath.dirname(name)) or "train"].append(name)
    if not splits["train"]:
        return None
    unused = "; test is not used" if splits.pop("test") else ""
    objects = [shape for names in splits.values() for name in names for shape in shapes.get(name, [])]
    labels = sorted({label for label, _ in objects})
    sources = []
    for names in filter(None, splits.values()):
        content = build_content(names, shapes, sizes, labels, folder)
        sources.append(Source(folder, folder, content, () if sources else errors))
    return Found(f"labelme (a JSON file per image){unused}", *sources)


def read_shapes(folder: Path, files: list[str], images: list[str]):
    """Read JSON files of labelme. Returns {image: [(label, segmentation)]}, {image: size}, and a message for
    each file or shape that is not valid. Other JSON files are skipped."""
    shapes, sizes, errors = {}, {}, []
    images, by_stem = set(images), {posixpath.splitext(name)[0]: name for name in images}
    for file in files:
        try:
            content = json.loads((folder / file).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            errors.append(f"{printable(file)}: {error}"[:300])
            continue
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            continue
        name = image_of(file, str(content.get("imagePath")), images, by_stem)
        H, W = content.get("imageHeight"), content.get("imageWidth")
        is_size = type(H) is type(W) is int and H > 0 and W > 0 and H * W <= MAX_PIXELS
        sizes[name] = {"height": H, "width": W} if is_size else image_size(folder / name)
        objects = {}
        for number, shape in enumerate(content["shapes"] if sizes[name] else []):
            try:
                add_shape(objects, number, shape, **sizes[name])
            except Exception as error:  # A form may differ anywhere, and Pillow raises many kinds.
                errors.append(f"{printable(file)}, shape {number}: {error!r}"[:300])
        shapes.setdefault(name, []).extend((key[0], segmentation) for key, segmentation in objects.items())
    return shapes, sizes, tuple(errors)


def image_of(file: str, image_path: str, images: set, by_stem: dict) -> str:
    """Return the image of a JSON file: the one that it names, else the one beside it with that name, else
    the one with the name of the file."""
    folder, image_path = posixpath.dirname(file), image_path.replace("\\", "/")
    beside = posixpath.join(folder, posixpath.basename(image_path))
    named = posixpath.normpath(posixpath.join(folder, image_path))
    stem = by_stem.get(posixpath.splitext(file)[0])
    return next((name for name in (named, beside, stem) if name in images), beside)


def add_shape(objects: dict, number: int, shape: dict, height: int, width: int) -> None:
    """Add a shape to {(label, ...): segmentation of an object}. Raises errors of several kinds."""
    label, group = shape["label"], shape.get("group_id")
    if not isinstance(label, str) or not label:
        raise ValueError("its label is not text")
    segmentation = convert_shape(shape, height, width)
    if group is None or not segmentation or isinstance(segmentation, str):
        objects[label, number] = segmentation
        return
    key = label, str(group), type(segmentation)
    before = objects.get(key)
    if before and isinstance(segmentation, list):
        segmentation = before + segmentation
    elif before:
        segmentation = to_text(rle_tools.merge([before, segmentation]))
    objects[key] = segmentation


def convert_shape(shape: dict, height: int, width: int) -> list | dict | str:
    """Convert a shape to polygons or an RLE. Returns [] for a box, and the type of a shape without area."""
    kind = shape.get("shape_type") or "polygon"
    points = [(float(x), float(y)) for x, y in shape["points"]]
    if kind in ("rectangle", "oriented_rectangle", "rotation"):
        return []
    if kind == "polygon":
        return [[value for point in points for value in point]]
    if kind == "circle" and len(points) == 2:
        (x, y), radius = points[0], math.dist(*points)
        angles = [2 * math.pi * corner / CIRCLE_CORNERS for corner in range(CIRCLE_CORNERS)]
        return [[v for a in angles for v in (x + radius * math.cos(a), y + radius * math.sin(a))]]
    if kind == "mask":
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"])), formats=["PNG"]) as image:
            if image.width > width or image.height > height:
                raise ValueError("its mask is larger than its image")
            inside = np.asarray(image.convert("L")) > 0
        left, top = (round(value) for value in points[0])
        if left < 0 or top < 0 or left + inside.shape[1] > width or top + inside.shape[0] > height:
            raise ValueError("its mask leaves its image")
        mask = np.zeros((height, width), dtype=np.uint8, order="F")
        mask[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        return to_text(rle_tools.encode(mask))
    return str(kind)[:40]  # The validation counts it as an unreadable form.


def to_text(rle: dict) -> dict:
    """Make an RLE of pycocotools one of COCO's files, whose counts are text."""
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def build_content(names: list[str], shapes: dict, sizes: dict, labels: list[str], folder: Path) -> dict:
    """Build the content of a set in COCO form. Images without a JSON file have no annotation."""
    ids = {label: number for number, label in enumerate(labels, start=1)}
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": number, "name": label} for label, number in ids.items()]
    for image_id, name in enumerate(names, start=1):
        size = sizes.get(name) or image_size(folder / name)
        content["images"].append({"id": image_id, "file_name": name, **size})
        for label, segmentation in shapes.get(name, []):
            annotation = {"image_id": image_id, "category_id": ids[label], "segmentation": segmentation}
            content["annotations"].append({"id": len(content["annotations"]) + 1, **annotation})
    return content
