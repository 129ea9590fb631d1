"""Every dataset as COCO JSON: reading, the split into labelled and unlabelled images, weak and strong
views, and endless streams of batches.

    train, val = load_data("shapes")            # or "coco", "cityscapes", or the folder of a dataset
    labelled = labelled_split(train.image_ids, ratio=0.1, seed=0)
    batches = stream(Views(train, View(crop=(96, 96))), labelled, batch=8, seed=seed_of(0, "labelled"))
    batch = next(batches)                                    # [{"image", "labels", "masks"}] * 8

    python data.py my_dataset                                # checks a data set before it costs days

Nothing here draws from a global random generator: the view of an image is a function of the stream's seed
and the position in the stream, so neither the number of workers nor a restart changes it. This file needs
torch, torchvision, numpy, Pillow and pycocotools and can be copied out alone.

Letters in shapes: N objects of one image, H W pixels."""

import atexit
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from pycocotools import mask as rle_tools
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF

GREY = 128  # what lies outside an image within a crop
# Of an image; Pillow refuses larger ones as decompression bombs, unless it is told not to.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)
ORIENTATION = 0x0112  # the EXIF tag
# Not PostScript, for which Pillow would run a program.
FORMATS = "JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000"


def seed_of(*key) -> int:
    """A 63-bit seed from any plain values: the same on every machine, in every process, in any order of
    calls."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


# --------------------------------------------------------------------------------------------------- reading


class DataError(ValueError):
    """Something about the data that its owner can put right, in one line."""


class CocoDataset:
    """Images and instance masks of one COCO JSON file, checked. A mask is a list of polygons or a run-length
    encoding (RLE): the lengths of the runs of 0 and 1 in turn, column by column. A crowd is one mask for many
    objects that nobody told apart.

    image_ids: ascending. class_names, category_ids: label k is the k-th category in the order of ids, which
    may have gaps. Images without annotations are images like any other. Crowds are no training targets, and
    evaluation neither asks for them nor counts what lies in them as wrong. dropped: a line for each
    annotation that is left out because it has no mask. Raises DataError for a file that is missing, not of
    this form, or at odds with itself or its images. With strict=False what is wrong is left out and listed in
    errors."""

    def __init__(self, json_file, image_folder, strict: bool = True):
        self.json_file, self.image_folder = Path(json_file), Path(image_folder)
        categories, images, annotations, self.errors, self.dropped = read_coco(json_file, image_folder)
        if self.errors and strict:
            more = f" ({len(self.errors)} problems in all; python data.py lists them)"
            raise DataError(f"{json_file}: {self.errors[0]}{more if len(self.errors) > 1 else ''}")
        self.category_ids = sorted(categories)
        self.class_names = [categories[category_id]["name"] for category_id in self.category_ids]
        self.image_ids = sorted(images)
        self._label = {category_id: label for label, category_id in enumerate(self.category_ids)}
        self._row = {image_id: row for row, image_id in enumerate(self.image_ids)}
        sizes = [(images[i]["height"], images[i]["width"]) for i in self.image_ids]
        self._sizes = np.array(sizes, dtype=int).reshape(-1, 2)
        self._names = Packed(images[i]["file_name"] for i in self.image_ids)
        by_image = {image_id: [] for image_id in self.image_ids}
        for annotation in annotations:
            by_image[annotation["image_id"]].append(annotation)
        self._annotations = Packed(by_image.values())

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, image_id) -> str:
        return self._names[self._row[image_id]]

    def path(self, image_id) -> Path:
        return self.image_folder / self.file_name(image_id)

    def size(self, image_id) -> tuple[int, int]:
        """(H, W)"""
        return tuple(self._sizes[self._row[image_id]].tolist())

    def image(self, image_id) -> Image.Image:
        return read_image(self.path(image_id), self.size(image_id))

    def annotations(self, image_id) -> list[dict]:
        return self._annotations[self._row[image_id]]

    def objects(self, image_id) -> list[dict]:
        """The annotations of an image that are single objects, not crowds."""
        return [annotation for annotation in self.annotations(image_id) if not annotation["iscrowd"]]

    def labels(self, image_id) -> list[int]:
        return [self._label[annotation["category_id"]] for annotation in self.objects(image_id)]


class Pool:
    """Unlabelled images: those of a dataset, and all image files below some folders, except those that
    `known` datasets hold. image_ids: 0, 1, 2, ..."""

    def __init__(self, dataset: CocoDataset, folders=(), known=()):
        self.dataset = dataset
        leave_out = {os.path.realpath(d.path(i)) for d in known if d for i in d.image_ids} if folders else ()
        paths = {}
        for folder in folders:
            if not Path(folder).is_dir():
                raise DataError(f"no folder {str(folder)!r} of unlabelled images")
            found = [path for path in image_files(folder) if path not in leave_out]
            if not found:
                raise DataError(f"no further image below {str(folder)!r}")
            paths |= dict.fromkeys(found)
        self._paths = Packed(paths)
        self.image_ids = range(len(dataset) + len(self._paths))

    def image(self, image_id) -> Image.Image:
        return read_image(self.path(image_id), self.size(image_id))

    def path(self, image_id):
        number = image_id - len(self.dataset)
        return self._paths[number] if number >= 0 else self.dataset.path(self.dataset.image_ids[image_id])

    def size(self, image_id) -> tuple[int, int] | None:
        in_dataset = image_id < len(self.dataset)
        return self.dataset.size(self.dataset.image_ids[image_id]) if in_dataset else None


class Packed:
    """A list that never changes, pickled into two arrays. Of a million Python objects every loader process
    would in time make its own copy, because counting references writes to their pages; of arrays it does not.
    """

    def __init__(self, items):
        parts = [pickle.dumps(item, pickle.HIGHEST_PROTOCOL) for item in items]
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.bytes = np.frombuffer(b"".join(parts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int):
        start = self.ends[index - 1] if index else 0
        return pickle.loads(self.bytes[start : self.ends[index]].tobytes())


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".jp2")


def image_files(folder) -> list[str]:
    """The real paths of all image files below a folder, in order; links are followed."""
    paths, seen, folders = set(), set(), [os.path.realpath(folder)]
    while folders:
        parent = folders.pop()
        if parent in seen:
            continue
        seen.add(parent)
        with os.scandir(parent) as entries:
            for entry in entries:
                path = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                if entry.is_dir():
                    folders.append(path)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    paths.add(path)
    return sorted(paths)


def read_image(path, size: tuple[int, int] | None = None) -> Image.Image:
    """An image file of any mode as RGB.

    16-bit values are scaled to 8 bits; transparency is left out. An EXIF orientation is applied, as tools for
    annotation do, unless only the stored pixels have the `size` (H, W) of the annotations (a TIFF's always:
    Pillow turns it as it loads). Raises DataError for a file that cannot be read, has another size, or
    floating-point pixels."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            turned = ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
            if size in (None, (turned.height, turned.width)):
                image = turned
            elif size != (image.height, image.width):
                found = f"{turned.height} x {turned.width}"
                raise DataError(
                    f"image {str(path)!r} is {found}, its annotations are for {size[0]} x {size[1]}"
                )
            if image.mode.startswith("I"):  # 16 bits
                values = np.asarray(image).astype(np.float32) / 257
                image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
            elif image.mode == "F":
                raise DataError(f"image {str(path)!r} has floating-point pixels")
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"image {str(path)!r} is gone") from None
    except DataError:
        raise
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise DataError(f"image {str(path)!r} cannot be read: {error or type(error).__name__}") from None


# -------------------------------------------------------------------------------------------------- checking


def read_coco(json_file, image_folder) -> tuple[dict, dict, list[dict], list[str], list[str]]:
    """The categories and images of a COCO JSON file by their ids, its annotations, what is wrong with it, and
    what of it is left out because it has no mask. What is returned can be trusted: pycocotools' C code checks
    nothing. Raises DataError for a file that is not of this form at all."""
    try:
        if not Path(json_file).is_file():  # nor a device without end
            raise FileNotFoundError
        content = json.loads(Path(json_file).read_text(encoding="utf-8"))
        lists = [content[name] for name in ("categories", "images", "annotations")]
        if not all(isinstance(entries, list) for entries in lists):
            raise TypeError("categories, images and annotations are lists")
    except FileNotFoundError:
        raise DataError(f"no annotation file {str(json_file)!r}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise DataError(f"{json_file} is not a COCO instances file: {error!r}"[:500]) from None
    errors, dropped, names = [], [], set()

    def passed(entries, kind, check):
        """The entries that pass the check, by id; None for one that is left out."""
        result = {}
        for entry in entries:
            name = f"{kind} {entry.get('id')!r}" if isinstance(entry, dict) else f"{kind} {entry!r}"
            try:
                if not isinstance(entry, dict) or type(entry.get("id")) is not int:
                    raise DataError("its id is no whole number")
                if entry["id"] in result:
                    raise DataError("another one has the same id")
                result[entry["id"]] = None
                result[entry["id"]] = check(entry)
            except DataError as error:
                errors.append(f"{name[:80]}: {error}")
        return result

    def check_category(entry):
        name = entry.get("name")
        if not isinstance(name, str):
            raise DataError(f"its name is {name!r}"[:200])
        if name in names:
            raise DataError(f"another one has the name {name!r} too"[:200])
        names.add(name)
        return entry

    def check_annotation(entry):
        for key, known in (("image_id", images), ("category_id", categories)):
            if type(entry.get(key)) is not int or entry[key] not in known:
                raise DataError(f"its {key} {entry.get(key)!r} is not in the file"[:200])
        image, category = images[entry["image_id"]], categories[entry["category_id"]]
        if not image or not category:  # it has been said already what is wrong with them
            return None
        area = entry.get("area")
        usable = {"id": entry["id"], "image_id": entry["image_id"], "category_id": entry["category_id"]}
        usable["iscrowd"] = entry.get("iscrowd") or 0
        if usable["iscrowd"] not in (0, 1):
            raise DataError(f"its iscrowd is {usable['iscrowd']!r}, not 0 or 1"[:200])
        usable["area"] = float(area) if isinstance(area, (int, float)) and 0 < area < MAX_PIXELS else None
        try:
            mask = usable_mask(entry.get("segmentation"), image["height"], image["width"])
        except DataError as error:
            raise DataError(f"(image {entry['image_id']}) {error}") from None
        if mask is None:
            dropped.append(f"annotation {entry['id']} (image {entry['image_id']}) has no mask")
            return None
        return {**usable, "segmentation": mask}

    categories = passed(lists[0], "category", check_category)
    images = passed(lists[1], "image", image_check(image_folder))
    annotations = passed(lists[2], "annotation", check_annotation)
    categories, images = ({i: e for i, e in entries.items() if e} for entries in (categories, images))
    return categories, images, [entry for entry in annotations.values() if entry], errors, dropped


def image_check(folder):
    """A function that takes an image's entry and returns it, or raises DataError: its size must make sense,
    and its file must lie in the folder, not only be linked from there."""
    root = os.path.realpath(folder)
    within = {}  # for each folder in it: whether it is no link that leads out

    def is_within(path):
        real = os.path.realpath(path)
        return real == root or real.startswith(os.path.join(root, ""))

    def check(entry):
        name, size = entry.get("file_name"), (entry.get("height"), entry.get("width"))
        if not all(type(side) is int and side > 0 for side in size) or size[0] * size[1] > MAX_PIXELS:
            raise DataError(f"height and width {size!r} are no size of an image"[:200])
        if not isinstance(name, str) or not name or "\0" in name:
            raise DataError(f"its file_name is {name!r}"[:200])
        path = os.path.join(root, name)
        parent = os.path.dirname(path)
        if parent not in within:
            within[parent] = is_within(parent)
        try:
            link = stat.S_ISLNK(os.lstat(path).st_mode)
            if not within[parent] or (link and not is_within(path)):
                raise DataError(f"its file {name!r} leads out of {folder}")
            found = stat.S_ISREG(os.stat(path).st_mode)
        except (OSError, UnicodeError):  # the latter for a name that no file system can hold
            found = False
        if not found:
            raise DataError(f"its file {ascii(name)} is not in {folder}"[:500])
        return {key: entry[key] for key in ("height", "width", "file_name")}

    return check


def usable_mask(segmentation, H: int, W: int):
    """A segmentation whose every number makes sense in an image (H, W), without those of its polygons that
    `is_polygon` refuses; None if no mask is left. Raises DataError for what is no segmentation of this image.
    """
    if isinstance(segmentation, list):
        return [polygon for polygon in segmentation if is_polygon(polygon, max(H, W))] or None
    if not isinstance(segmentation, dict):
        raise DataError("its segmentation is neither polygons nor an RLE")
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [H, W]:
        raise DataError(f"its RLE is of (height, width) {size!r}, the image of {[H, W]}"[:200])
    if isinstance(counts, str):
        counts = rle_runs(counts).tolist()
    elif not isinstance(counts, list) or not all(type(run) is int and run >= 0 for run in counts):
        raise DataError("its RLE has no counts")
    if sum(counts) != H * W:
        raise DataError(f"the runs of its RLE sum to {sum(counts)}, the image has {H * W} pixels"[:200])
    return {"size": size, "counts": segmentation["counts"]} if any(counts[1::2]) else None


def is_polygon(polygon, reach: int) -> bool:
    """Whether it is a list x, y, x, y, ... of three corners or more, none further than `reach` outside, whose
    outline is not absurdly long: pycocotools takes memory for every pixel of it."""
    try:
        enough = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        near = enough and math.isfinite(sum(polygon)) and -reach <= min(polygon) and max(polygon) <= 2 * reach
        if near and len(polygon) > 600:
            return np.abs(np.diff(np.reshape(polygon, (-1, 2)), axis=0)).sum() <= 2000 * reach
        return near
    except (TypeError, OverflowError):
        return False


def rle_runs(counts: str) -> np.ndarray:
    """The lengths of the runs of 0 and 1 in turn of a compressed RLE. COCO's format: a character is 48 plus a
    number of 6 bits, of which 5 belong to the run, lowest first, and the sixth says that more follow; from
    the fourth run on it is the difference to the last but one. Raises DataError for characters that are
    none."""
    digits = np.frombuffer(counts.encode("ascii", "ignore"), dtype=np.uint8).astype(np.int64) - 48
    if not counts.isascii() or not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise DataError("the counts of its RLE are damaged")
    ends = np.flatnonzero(digits & 32 == 0) + 1
    starts = np.concatenate([[0], ends[:-1]])
    lengths = ends - starts
    place = np.arange(len(digits)) - np.repeat(starts, lengths)
    if lengths.max() > 6:
        raise DataError("the counts of its RLE are damaged")
    runs = np.add.reduceat((digits & 31) << (5 * place), starts)
    runs -= ((digits[ends - 1] & 16) != 0).astype(np.int64) << (5 * lengths)  # the sign
    runs[2::2], runs[1::2] = runs[2::2].cumsum(), runs[1::2].cumsum()
    if runs.min() < 0:
        raise DataError("the counts of its RLE are damaged")
    return runs


def to_rle(segmentation, height: int, width: int) -> dict:
    """A polygon list, an uncompressed or a compressed RLE -> compressed RLE of (height, width)."""
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        return rle_tools.merge(rle_tools.frPyObjects(polygons or [[0.0] * 6], height, width))
    if isinstance(segmentation["counts"], list):
        return rle_tools.frPyObjects(segmentation, height, width)
    return segmentation


# --------------------------------------------------------------------------------------------- which images


def find_data(data: str, root=None, *, train_json="", val_json="", images="") -> list[tuple]:
    """The arguments of `CocoDataset` for the training and the validation set of `data`: "shapes", "coco",
    "cityscapes", or the path of a folder with instances_train.json, instances_val.json and images/, of which
    the last three arguments replace one. Empty for the validation set of a folder without its file. root:
    where COCO or Cityscapes lies, or where shapes is written (default: datasets/). Raises DataError."""
    folder = Path(data)
    if (train_json or val_json or images) and data in ("shapes", "coco", "cityscapes"):
        raise DataError(
            f"--train-json, --val-json and --image-folder go with a folder as --data, not with {data!r}"
        )
    if data == "coco":
        root = Path(root or "datasets/coco")
        return [(root / f"annotations/instances_{p}2017.json", root / f"{p}2017") for p in ("train", "val")]
    if data == "cityscapes":
        from cityscapes import convert

        root = Path(root or "datasets/cityscapes")
        return [(json_file, root / "leftImg8bit") for json_file in convert(root)]
    if data == "shapes":
        from shapes import write_shapes

        folder = Path(root or "datasets") / "shapes"
        if not folder.exists():
            write_shapes(folder)
    elif root:
        raise DataError(f"--root goes with shapes, coco or cityscapes as --data, not with {data!r}")
    elif not folder.is_dir() and not (train_json and images):
        raise DataError(f"--data {data!r} is neither shapes, coco, cityscapes nor a folder that exists")
    images = images or folder / "images"
    validation = val_json or folder / "instances_val.json"
    has_validation = val_json or validation.exists()
    return [
        (train_json or folder / "instances_train.json", images),
        (validation, images) if has_validation else (),
    ]


def load_data(data: str, root=None, **files) -> tuple:
    """The training and the validation set that `find_data` finds; the latter may be None."""
    return tuple(CocoDataset(*found) if found else None for found in find_data(data, root, **files))


def labelled_split(image_ids, ratio: float, seed: int) -> list:
    """The labelled share of a training set, a function of (seed, ratio, image ids) alone and nested: the
    images of 1 % are among those of 2 %."""
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio {ratio} must be in (0, 1]: 0.05 is 5 %")
    order = sorted(image_ids, key=lambda image_id: seed_of(seed, "split", image_id))
    return sorted(order[: max(1, round(ratio * len(order)))])


def listed_split(file, dataset: CocoDataset) -> list:
    """The images of a data set that a file lists, a line each: the file name or its last part, with or
    without its ending (the names of Cityscapes' *_gtFine_instanceIds.png also mean their images), or the id.
    What fits exactly comes first. Raises DataError for a line that names no image, or several."""

    def stem(name):
        return re.sub(r"(_leftImg8bit|_gtFine_\w+)?\.\w+$", "", name)

    forms = [{}, {}, {}, {}, {}]
    for image_id in dataset.image_ids:
        name = dataset.file_name(image_id)
        last = Path(name).name
        for form, key in zip(forms, (name, last, stem(name), stem(last), str(image_id))):
            form.setdefault(key, []).append(image_id)
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"the split {str(file)!r} cannot be read: {error}") from None
    split = set()
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        keys = line, stem(line), stem(Path(line).name)
        found = next((form[key] for key in keys for form in forms if key in form), [])
        if line and len(found) != 1:
            raise DataError(f"{file}, line {number}: {line!r} names {len(found)} images, not one"[:500])
        split.update(found if line else [])
    if not split:
        raise DataError(f"{file} lists no image")
    return sorted(split)


def split_hash(image_ids) -> str:
    """Eight letters that tell two splits apart."""
    return hashlib.sha256(repr(sorted(image_ids)).encode()).hexdigest()[:8]


# ----------------------------------------------------------------------------------------------------- views


@dataclass(frozen=True)
class View:
    """How a training crop is taken: large-scale jitter (Ghiasi et al., CVPR 2021, arXiv 2012.07177), or a
    shortest side, then crop and flip.

    crop: (H, W) of the result, multiples of 32. scale: the image is first resized to fit the crop times a
    factor drawn from this range. short_side: instead, it is resized so that its shorter side is one of
    these lengths. flip: mirror half of the images.
    colour: a photometric jitter of the weak view after SSD (arXiv 1512.02325, section 2.2), with brightness
    as a factor. blur: sigmas of the strong view, in pixels."""

    crop: tuple[int, int]
    scale: tuple[float, float] = (0.1, 2.0)
    short_side: tuple[int, ...] = ()
    flip: bool = True
    colour: bool = False
    blur: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self):
        if len(self.crop) != 2 or any(side % 32 or side < 32 for side in self.crop):
            raise ValueError(f"a crop is height and width, multiples of 32, found {self.crop}")
        for name, pair in (("scale", self.scale), ("blur", self.blur)):
            if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise ValueError(f"{name} is a range of two numbers above 0, found {pair}")
        if any(side < 1 for side in self.short_side):
            raise ValueError(f"short_side has lengths in pixels, found {self.short_side}")

    def factors(self, H: int, W: int) -> tuple[float, float]:
        """The range of what an image (H, W) is resized by."""
        if self.short_side:
            return min(self.short_side) / min(H, W), max(self.short_side) / min(H, W)
        fit = min(self.crop[0] / H, self.crop[1] / W)
        return self.scale[0] * fit, self.scale[1] * fit


@dataclass(frozen=True)
class Geometry:
    """One way to cut a crop: the image (H, W) is resized to `resized`, the window at (top, left) of size
    `window` is cut out, mirrored if `flip`, and laid into the upper left corner of `crop`."""

    resized: tuple[int, int]
    top: int
    left: int
    window: tuple[int, int]
    flip: bool
    crop: tuple[int, int]

    @staticmethod
    def draw(view: View, H: int, W: int, rng: np.random.Generator) -> "Geometry":
        if view.short_side:
            factor = rng.choice(view.short_side) / min(H, W)
        else:
            factor = rng.uniform(*view.scale) * min(view.crop[0] / H, view.crop[1] / W)
        resized = max(1, round(H * factor)), max(1, round(W * factor))
        window = min(resized[0], view.crop[0]), min(resized[1], view.crop[1])
        top, left = (int(rng.integers(0, r - w + 1)) for r, w in zip(resized, window))
        return Geometry(resized, top, left, window, view.flip and rng.random() < 0.5, view.crop)

    def region(self, image: Image.Image) -> tuple[Image.Image, tuple, float]:
        """The part of an image that the window shows, made smaller here if it has to be; the box in it that
        is the window (left, top, right, bottom, in its pixels); and its pixels per pixel of the crop, at most
        1. Colour and blur cost least here, before `lay` enlarges it."""
        y, x = image.height / self.resized[0], image.width / self.resized[1]
        (h, w), top, left = self.window, self.top, self.left
        box = left * x, top * y, (left + w) * x, (top + h) * y
        if x >= 1:
            return image.resize((w, h), Image.Resampling.BILINEAR, box), (0, 0, w, h), 1.0
        x0, y0 = max(0, int(box[0]) - 2), max(0, int(box[1]) - 2)  # what the box's edge is interpolated from
        part = image.crop((x0, y0, min(image.width, int(box[2]) + 3), min(image.height, int(box[3]) + 3)))
        return part, (box[0] - x0, box[1] - y0, box[2] - x0, box[3] - y0), x

    def lay(self, region: Image.Image, box: tuple) -> Image.Image:
        """The crop: the box of a region, at its size and place, on grey."""
        window = region.resize(self.window[::-1], Image.Resampling.BILINEAR, box)
        window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else window
        if self.window == self.crop:
            return window
        canvas = Image.new("RGB", self.crop[::-1], (GREY,) * 3)
        canvas.paste(window)
        return canvas

    def mask_part(self, segmentation, H: int, W: int) -> tuple[np.ndarray, int, int]:
        """A part of the mask in the crop with all of it that is in the window, and its top and left."""
        h, w = self.window
        if isinstance(segmentation, list):  # move the corners, then rasterise once, and no more than needed
            polygons = [np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation]
            scale, start = (self.resized[1] / W, self.resized[0] / H), (self.left, self.top)
            polygons = [polygon * scale - start for polygon in polygons]
            if self.flip:
                polygons = [(w, 0) + polygon * (-1, 1) for polygon in polygons]
            corners = np.concatenate(polygons)
            left, top = np.floor(corners.min(0)).clip(0).astype(int).tolist()
            right, bottom = (np.ceil(corners.max(0)) + 1).clip(max=(w, h)).astype(int).tolist()
            if right <= left or bottom <= top:
                return np.zeros((0, 0), dtype=bool), 0, 0
            polygons = [(polygon - (left, top)).flatten().tolist() for polygon in polygons]
            return rle_tools.decode(to_rle(polygons, bottom - top, right - left)).view(bool), top, left
        # The nearest pixel of each; only the columns of the window are decoded.
        rows = ((self.top + np.arange(h) + 0.5) * (H / self.resized[0])).astype(int)
        columns = ((self.left + np.arange(w) + 0.5) * (W / self.resized[1])).astype(int)
        counts = segmentation["counts"]
        ends = np.cumsum(rle_runs(counts) if isinstance(counts, str) else counts)
        first, last = columns[0] * H, (columns[-1] + 1) * H
        runs = np.diff(ends.clip(first, last), prepend=first)
        part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(-1, H).T
        part = part[np.ix_(rows, columns - columns[0])]
        return part[:, ::-1] if self.flip else part, 0, 0


def strong_view(image: Image.Image, rng: np.random.Generator, blur=(0.1, 2.0)) -> Image.Image:
    """Colour jitter, grey, blur: nothing that moves a pixel, so that masks of the weak view fit. As in
    SimCLR (arXiv 2002.05709, appendix A) with the strengths of the paper: (.4, .4, .4, .1) with p .8, grey
    with p .2, blur with p .5."""
    if rng.random() < 0.8:
        image = colour_jitter(image, rng, 0.4, 0.4, 0.4, 0.1)
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*blur)))
    return image


def colour_jitter(image, rng, brightness, contrast, saturation, hue, probability=1.0):
    """Factors of 1 +- the given strengths and a turn of the hue by +- its strength, each with the given
    probability, in random order."""
    changes = [
        (TF.adjust_brightness, 1 + rng.uniform(-brightness, brightness)),
        (TF.adjust_contrast, 1 + rng.uniform(-contrast, contrast)),
        (TF.adjust_saturation, 1 + rng.uniform(-saturation, saturation)),
        (TF.adjust_hue, rng.uniform(-hue, hue)),
    ]
    for index in rng.permutation(len(changes)):
        adjust, strength = changes[index]
        if probability == 1 or rng.random() < probability:
            image = adjust(image, strength)
    return image


class Views(Dataset):
    """Training views of a dataset. Asked for (image_id, seed) it gives {"image": (3, H, W) uint8} and

    - if `strong`: "strong" (3, H, W) uint8, the strong view of the same crop;
    - if `labels`: "labels" (N,) int64 and "masks" (N, H, W) bool, of the objects visible in the crop.
    """

    def __init__(self, dataset: CocoDataset | Pool, view: View, *, labels: bool = True, strong: bool = False):
        self.dataset, self.view, self.with_labels, self.with_strong = dataset, view, labels, strong

    def __getitem__(self, key) -> dict:
        image_id, seed = key
        rng = np.random.default_rng(seed)
        image = self.dataset.image(image_id)
        H, W = image.height, image.width
        geometry = Geometry.draw(self.view, H, W, rng)
        region, box, scale = geometry.region(image)
        if self.view.colour:
            # The recipe's 32 and 18 are of OpenCV's 8 bits, where brightness ends at 255 and hue at 180.
            region = colour_jitter(region, rng, 32 / 255, 0.5, 0.5, 18 / 180, probability=0.5)
        item = {"image": to_tensor(geometry.lay(region, box))}
        if self.with_strong:
            blur = [scale * sigma for sigma in self.view.blur]
            item["strong"] = to_tensor(geometry.lay(strong_view(region, rng, blur), box))
        if self.with_labels:
            objects = zip(self.dataset.labels(image_id), self.dataset.objects(image_id))
            parts = [(label, *geometry.mask_part(o["segmentation"], H, W)) for label, o in objects]
            parts = [part for part in parts if part[1].any()]
            masks = np.zeros((len(parts), *self.view.crop), dtype=bool)
            for mask, (_, part, top, left) in zip(masks, parts):
                mask[top : top + part.shape[0], left : left + part.shape[1]] = part
            item["labels"] = torch.tensor([label for label, *_ in parts], dtype=torch.int64)
            item["masks"] = torch.from_numpy(masks)
        return item


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# --------------------------------------------------------------------------------------------------- streams


def stream(
    views: Dataset,
    image_ids,
    batch: int,
    seed: int,
    *,
    rank=0,
    world_size=1,
    workers=0,
    timeout=0,
    first_step=0,
    pin_memory=False,
    **sampling,
):
    """An endless iterator over batches, each a list of `batch` items of `views`, which have the path of their
    image besides, as "file". With several processes each takes its own part of a common batch. first_step:
    where to go on. pin_memory: for copies to a GPU. sampling: arguments of `StepSampler`.

    A damaged image gives way to another one and is named on standard error; DataError ends the stream when
    they are more than one and more than 1 % of all. The DataLoader raises RuntimeError when a worker dies, or
    gives nothing for `timeout` seconds (0: it waits for ever)."""
    sampler = StepSampler(image_ids, batch, seed, rank, world_size, first_step, **sampling)
    loader = DataLoader(
        Replacing(views, image_ids),
        batch_sampler=sampler,
        num_workers=workers,
        timeout=timeout if workers else 0,
        collate_fn=list,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # or it would draw from the global one
        worker_init_fn=_leave_signals_to_the_main_process,
    )
    others = multiprocessing.active_children()
    batches = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    atexit.register(_end, workers)
    return _watched(batches, workers, len(image_ids))


def _watched(batches, workers, number: int):
    damaged = set()
    while True:
        try:
            batch = next(batches)
        except RuntimeError:  # one of them died or is stuck
            _end(workers)
            raise
        new = {message for item in batch for message in item.pop("damaged")} - damaged
        damaged |= new
        for message in sorted(new):
            print(f"warning: {message}; another image takes its place", file=sys.stderr, flush=True)
        if len(damaged) > max(1, number / 100) or not all(batch):
            raise DataError(f"{len(damaged)} of {number} images cannot be used, such as: {min(damaged)}")
        yield batch


class Replacing(Dataset):
    """Views in which a damaged image gives way to another one of image_ids, drawn by its seed. Items have the
    messages besides, as "damaged", and the path of the image, as "file"."""

    def __init__(self, views: Views, image_ids):
        self.views, self.image_ids = views, image_ids

    def __getitem__(self, key) -> dict:
        (image_id, seed), damaged, tried = key, [], []
        for attempt in range(min(5, len(self.image_ids))):
            try:
                file = str(self.views.dataset.path(image_id))
                return {**self.views[image_id, seed], "file": file, "damaged": damaged}
            except DataError as error:
                damaged.append(str(error))
                tried.append(image_id)
            place = seed_of(seed, "instead", attempt)
            while image_id in tried and len(tried) < len(self.image_ids):
                place = (place + 1) % len(self.image_ids)
                image_id = self.image_ids[place]
        return {"damaged": damaged}


def _leave_signals_to_the_main_process(_) -> None:
    """When all processes of a job are told to stop, it may want to end its step first, and to save."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _end(workers) -> None:
    """Kills the loader processes: DataLoader would send them a SIGTERM, which they ignore, and wait for
    ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where DataLoader looks for workers that died
    for worker in workers:
        worker.kill()


class StepSampler:
    """Yields for step after step the (image_id, seed) of a batch, without end.

    The stream is one epoch after another, each a permutation of the images in which image i stands repeats[i]
    times on average. Position p of the stream is a function of (seed, p), and step s of all processes
    together takes the positions s * G to (s + 1) * G - 1, where G = batch * world_size; so two processes with
    half the batch see what one process sees."""

    def __init__(self, image_ids, batch, seed, rank=0, world_size=1, first_step=0, repeats=None):
        if not len(image_ids):
            raise ValueError("no image to sample from")
        self.image_ids = image_ids
        self.batch, self.seed, self.rank, self.world_size = batch, seed, rank, world_size
        self.first_step = first_step
        repeats = np.ones(len(self.image_ids)) if repeats is None else np.asarray(repeats, dtype=float)
        self.epoch_length = max(1, round(repeats.sum()))
        self.bounds = np.cumsum(repeats) * (self.epoch_length / repeats.sum())

    def epoch(self, epoch: int) -> np.ndarray:
        """Indices into image_ids: systematic sampling rounds every image's repeats up or down at random,
        but their sum never changes."""
        rng = np.random.default_rng(seed_of(self.seed, "epoch", epoch))
        counts = np.diff(np.floor(self.bounds + rng.random() * (1 - 1e-6)), prepend=0).astype(int)
        counts[-1] += self.epoch_length - counts.sum()
        return rng.permutation(np.repeat(np.arange(len(self.image_ids)), counts))

    def __iter__(self):
        current, order = None, None
        for step in itertools.count(self.first_step):
            keys = []
            for position in range(self.batch):
                position += (step * self.world_size + self.rank) * self.batch
                epoch, place = divmod(position, self.epoch_length)
                if epoch != current:
                    current, order = epoch, self.epoch(epoch)
                keys.append((self.image_ids[order[place]], seed_of(self.seed, position)))
            yield keys


def repeat_factors(dataset: CocoDataset, image_ids, threshold: float) -> list[float]:
    """Repeat-factor sampling (LVIS, Gupta et al., CVPR 2019, arXiv 1908.03195, section 4): how often each
    image should be seen so that rare classes count for more: the largest max(1, sqrt(threshold / share of
    images with the class)) of its classes, and 1 without any. LVIS has a threshold of 0.001, so only rarer
    classes come more often; the paper's 10 is above every share, so that between all classes it is the root
    that counts, and images without objects come least."""
    classes = [set(dataset.labels(image_id)) for image_id in image_ids]
    counts = np.bincount([label for labels in classes for label in labels], minlength=1)
    factors = np.sqrt(threshold * len(image_ids) / np.maximum(counts, 1)).clip(min=1)
    return [max((factors[label] for label in labels), default=1.0) for labels in classes]


def test_size(H: int, W: int, short_side: int = 800, long_side: int = 1333) -> tuple[int, int]:
    """(H, W) of an image at test time: the shorter side becomes short_side unless the longer one would pass
    long_side (0: no limit). A short_side of 0 keeps the size."""
    if not short_side:
        return H, W
    factor = min(short_side / min(H, W), (long_side or math.inf) / max(H, W))
    return max(1, round(H * factor)), max(1, round(W * factor))


if __name__ == "__main__":
    from tools.check import main

    main()
