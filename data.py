"""Datasets in COCO form, the labeled split, weak and strong views, and endless batches.

    train = CocoDataset("my_dataset/instances_train.json", "my_dataset/images")
    labeled = labeled_split(train.image_ids, ratio=0.1, seed=0)
    views = AugmentedDataset(train, Augmentation(crop=(96, 96)))
    batches = endless_batches(views, labeled, batch_size=8, seed=stable_seed(0, "labeled"))
    batch = next(batches)    # {"image": (8, 3, 96, 96), "file": [...], "targets": [{"labels", "masks"}] * 8}

Nothing here draws from a global random generator. The view of an image is a function of the seed and of the
position in the stream. Therefore neither the number of loader processes nor a restart changes it.

This file needs torch, torchvision, numpy, Pillow and pycocotools, and can be copied out alone.

Shapes: B images of a batch, N objects of one image, H W pixels."""

import atexit
import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import pickle
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps, TiffImagePlugin, UnidentifiedImageError
from pycocotools import mask as rle_tools
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF

PAD_VALUE = 128  # gray level of the part of a crop that lies outside the image
EXIF_ORIENTATION = 0x0112
# PostScript (EPS) is missing on purpose: Pillow would run Ghostscript to read it.
IMAGE_FORMATS = "JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".jp2")
# The first bytes of the placeholder that Git LFS leaves where it did not fetch the content.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class DataError(ValueError):
    """A problem with the data that the user can fix. The message is one line."""


def stable_seed(*key) -> int:
    """Derive a 63-bit seed from plain values. It is the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


# ------------------------------------------------------------------------------------------------- datasets


class CocoDataset:
    """The images and instance masks of one COCO JSON file.

    A mask is a list of polygons or a run-length encoding (RLE): the lengths of the runs of 0 and 1 in turn,
    column by column. A crowd is one mask for many objects. Crowds are not used as targets, and the
    evaluation ignores them. Images without annotations are kept.

    Args:
        json_file: path of the JSON file.
        image_folder: the folder that the file names of the images start from.
        content: the parsed and validated content {"images", "annotations", "categories"} of the file. By
            default the file is read here and trusted: pycocotools' C code checks nothing. For untrusted
            files use layouts.validate.load_coco.

    Attributes:
        image_ids: in ascending order.
        class_names, category_ids: label k is the k-th category in the order of ids, which may have gaps.
        errors, notes, bins: what layouts.validate.load_coco found, empty by default: messages about invalid
            entries; lines about repairs, what is left out and suspicions; {bin: number of annotations}.
        layout: what layouts.load_data found, as a phrase.
        pixel_range, exif_stored: how `read_image` reads the images; layouts/images.py finds out."""

    def __init__(self, json_file, image_folder, content: dict | None = None):
        self.json_file, self.image_folder = Path(json_file), Path(image_folder)
        self.errors, self.notes, self.bins, self.layout = [], [], {}, ""
        self.pixel_range, self.exif_stored = None, False
        if content is None:
            content = json.loads(self.json_file.read_text(encoding="utf-8"))
        categories = {category["id"]: category["name"] for category in content["categories"]}
        images = {image["id"]: image for image in content["images"]}
        self.category_ids = sorted(categories)
        self.class_names = [categories[category_id] for category_id in self.category_ids]
        self.image_ids = sorted(images)
        self._label = {category_id: label for label, category_id in enumerate(self.category_ids)}
        self._row = {image_id: row for row, image_id in enumerate(self.image_ids)}
        sizes = [(images[i]["height"], images[i]["width"]) for i in self.image_ids]
        self._sizes = np.array(sizes, dtype=int).reshape(-1, 2)
        self._names = SerializedList(images[i]["file_name"] for i in self.image_ids)
        by_image = {image_id: [] for image_id in self.image_ids}
        for annotation in content["annotations"]:
            by_image[annotation["image_id"]].append(annotation)
        self._annotations = SerializedList(map(_select_keys, by_image.values()))

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, image_id) -> str:
        return self._names[self._row[image_id]]

    def path(self, image_id) -> Path:
        return self.image_folder / self.file_name(image_id)

    def size(self, image_id) -> tuple[int, int]:
        """Return (H, W)."""
        return tuple(self._sizes[self._row[image_id]].tolist())

    def image(self, image_id) -> Image.Image:
        return read_image(self.path(image_id), self.size(image_id), self.pixel_range, self.exif_stored)

    def annotations(self, image_id) -> list[dict]:
        """Return dictionaries with "id", "image_id", "category_id", "segmentation", "iscrowd" and "area"
        (or None)."""
        return self._annotations[self._row[image_id]]

    def objects(self, image_id) -> list[dict]:
        """Return the annotations of single objects, without crowds."""
        return [annotation for annotation in self.annotations(image_id) if not annotation["iscrowd"]]

    def labels(self, image_id) -> list[int]:
        """Return the label of each of `objects`."""
        return [self._label[annotation["category_id"]] for annotation in self.objects(image_id)]


def _select_keys(annotations: list[dict]) -> list[dict]:
    """Drop the keys that nothing here reads, such as "bbox", and fill in the optional ones."""
    keys, optional = ("id", "image_id", "category_id", "segmentation"), {"iscrowd": 0, "area": None}
    return [
        {key: annotation[key] for key in keys}
        | {key: annotation.get(key, default) for key, default in optional.items()}
        for annotation in annotations
    ]


class UnlabeledImages:
    """Images without labels: those of a dataset, and further image files.

    All are read with the pixel range of the dataset. image_ids: 0, 1, 2, ..., first those of the dataset. To
    choose the files of a folder that are no copies of validation images, see layouts/images.py."""

    def __init__(self, dataset: CocoDataset, paths=()):
        self.dataset, self._paths = dataset, SerializedList(paths)
        self.image_ids = range(len(dataset) + len(self._paths))

    def image(self, image_id) -> Image.Image:
        exif_stored = self.dataset.exif_stored
        return read_image(self.path(image_id), self.size(image_id), self.dataset.pixel_range, exif_stored)

    def path(self, image_id):
        index = image_id - len(self.dataset)
        return self._paths[index] if index >= 0 else self.dataset.path(self.dataset.image_ids[image_id])

    def size(self, image_id) -> tuple[int, int] | None:
        """Return (H, W) as the annotations have it, None for a further file."""
        in_dataset = image_id < len(self.dataset)
        return self.dataset.size(self.dataset.image_ids[image_id]) if in_dataset else None


class SerializedList:
    """An immutable list that is stored in two arrays.

    It avoids copy-on-write growth in loader processes. There, counting references to Python objects would
    touch, and so copy, every page of an ordinary list."""

    def __init__(self, items):
        parts = [pickle.dumps(item, pickle.HIGHEST_PROTOCOL) for item in items]
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.bytes = np.frombuffer(b"".join(parts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int):
        start = self.ends[index - 1] if index else 0
        return pickle.loads(self.bytes[start : self.ends[index]].tobytes())


# --------------------------------------------------------------------------------------------------- images


def read_image(
    path, size: tuple[int, int] | None = None, pixel_range: tuple | None = None, exif_stored: bool = False
) -> Image.Image:
    """Read an image file of any mode as RGB: its first page, without transparency and extra channels.

    The EXIF orientation is applied, as annotation tools do, unless only the stored pixels have the `size`
    (H, W) of the annotations. Pillow always applies that of a TIFF if it swaps height and width.

    Args:
        pixel_range: two floats, the values that become 0 and 255 in images of more than 8 bits. By default
            0 and 65535, for unsigned 16-bit images only.
        exif_stored: do not apply the EXIF orientation if the stored and the turned pixels have the size.

    Raises DataError for a file that cannot be read, has another size, or has floating-point or signed pixels
    and no pixel_range is given."""
    with open_image(path) as image:
        if image.format == "PNG":
            image.load()  # Its EXIF may follow the pixels.
        fit = find_orientation(image, path, size)
        if fit == "stored" or (fit == "both" and exif_stored):
            image.getexif().pop(EXIF_ORIENTATION)  # before `load`, which turns a TIFF
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if is_deep(image):
            values = np.asarray(image).astype(np.float32)
            if pixel_range is None and (image.mode == "F" or values.min() < 0 or values.max() > 65535):
                kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
                problem = f"it has {kind} pixels of unknown range; convert it to 8 bits or unsigned 16 bits"
                raise DataError(f"cannot use image {str(path)!r}: {problem}")
            low, high = pixel_range or (0, 65535)
            values = np.nan_to_num((values - low) * (255 / (high - low)))
            image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


@contextlib.contextmanager
def open_image(path):
    """Open an image file. Turns all errors of the block into a DataError that names the file."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            yield image
    except FileNotFoundError:
        raise DataError(f"cannot read image {str(path)!r}: no such file") from None
    except DataError:
        raise
    except Exception as error:  # Pillow raises many kinds of exceptions for damaged files.
        problem = isinstance(error, UnidentifiedImageError) and _find_problem(path)
        problem = problem or error or type(error).__name__
        raise DataError(f"cannot read image {str(path)!r}: {problem}") from None


def _find_problem(path) -> str:
    """Return why Pillow does not identify a file as an image, and what to do, or ""."""
    with contextlib.suppress(Exception), open(path, "rb") as file:
        header = file.read(40)
        if not header:
            return "the file is empty"
        if header.startswith(LFS_POINTER):
            return "it is a Git LFS pointer; run `git lfs pull` to get the image"
        # It raises if this is no TIFF, or a damaged one. 43 is for BigTIFF.
        tags = TiffImagePlugin.ImageFileDirectory_v2(header[: 16 if header[2] == 43 else 8])
        file.seek(tags.next)
        tags.load(file)
        bands, bits = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1), max(tags[TiffImagePlugin.BITSPERSAMPLE])
        if (bands, bits) not in ((1, 8), (1, 16), (3, 8), (4, 8)):  # Pillow reads these.
            return f"it is a TIFF of {bands} bands of {bits} bits; convert it to gray or RGB of 8 bits"
    return ""


def is_deep(image: Image.Image) -> bool:
    """Return whether an image has one channel of more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def find_orientation(image: Image.Image, path, size: tuple[int, int] | None) -> str:
    """Return "stored" or "turned" if only the stored pixels, or those turned by the EXIF orientation, have
    the `size` (H, W) of the annotations, "both" if both have it, "turned" without a size, "" without an
    orientation. Raises DataError for an image that cannot be read at this size."""
    orientation = Image.Image.getexif(image).get(EXIF_ORIENTATION)  # PngImageFile's would load the pixels.
    stored = turned = image.height, image.width
    if orientation in (5, 6, 7, 8):
        # Pillow gives the turned size of a TIFF, and cannot read its stored pixels.
        stored, turned = (None, turned) if image.format == "TIFF" else (stored, stored[::-1])
    if size not in (None, stored, turned):
        found, expected = f"{turned[0]} x {turned[1]}", f"{size[0]} x {size[1]}"
        problem = f"it is {found}, its annotations are for {expected} (height x width)"
        raise DataError(f"cannot use image {str(path)!r}: {problem}")
    if orientation not in range(2, 9):
        return ""
    if size is None or size != stored:
        return "turned"
    return "both" if stored == turned else "stored"


# ----------------------------------------------------------------------------------------------------- masks


def rle_runs(counts: str) -> np.ndarray:
    """Decode a compressed RLE into the lengths of its runs of 0 and 1 in turn. Raises DataError for invalid
    text.

    COCO's format (maskApi.c, rleFrString): a character is 48 plus a number of 6 bits. Five bits belong to
    the run, lowest first, and the sixth means that more follow. From the fourth run on, the number is the
    difference to the run before the last one."""
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


def encode_rle(segmentation, height: int, width: int) -> dict:
    """Convert a list of polygons, or an RLE of either form, to a compressed RLE of size (height, width)."""
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        return rle_tools.merge(rle_tools.frPyObjects(polygons or [[0.0] * 6], height, width))
    if isinstance(segmentation["counts"], list):
        return rle_tools.frPyObjects(segmentation, height, width)
    return segmentation


# --------------------------------------------------------------------------------------------- labeled split


def labeled_split(image_ids, ratio: float, seed: int) -> list:
    """Draw the labeled fraction `ratio` in (0, 1] of a training set, at least one image.

    The result depends on (seed, ratio, image ids) alone, and splits are nested: the images of 1 % are among
    those of 2 %. Raises ValueError for a ratio outside (0, 1]."""
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio {ratio} must be in (0, 1]: 0.05 is 5 %")
    order = sorted(image_ids, key=lambda image_id: stable_seed(seed, "split", image_id))
    return sorted(order[: max(1, round(ratio * len(order)))])


def split_from_file(file, dataset: CocoDataset) -> list:
    """Read the labeled images from a text file with one image per line. Returns sorted image ids.

    A line is the file name or its last part, with or without its suffix, or the image id. The names of
    Cityscapes' *_gtFine_instanceIds.png also select their images. An exact match wins over the others.

    Raises DataError for a file that cannot be read or has JSON, and for a line that matches no image, or
    several."""

    def stem(name):
        return re.sub(r"(_leftImg8bit|_gtFine_\w+)?\.\w+$", "", name)

    tables = [{}, {}, {}, {}, {}]  # from the strictest kind of match to the loosest
    for image_id in dataset.image_ids:
        name = dataset.file_name(image_id)
        last = Path(name).name
        for table, key in zip(tables, (name, last, stem(name), stem(last), str(image_id))):
            table.setdefault(key, []).append(image_id)
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the labeled list {str(file)!r}: {error}") from None
    split = set()
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line:
            continue
        keys = line, stem(line), stem(Path(line).name)
        # Only a whole line is an id: 11.png is not the image with the id 11.
        found = (table[key] for key in keys for table in tables[: 5 if key == line else 4] if key in table)
        matches = next(found, [])
        if not matches and text.lstrip().startswith(("{", "[")):
            advice = "write one image per line (a file name or an id)"
            raise DataError(f"the labeled list {str(file)!r} is a JSON file; {advice}")
        if len(matches) != 1:
            raise DataError(f"{file}, line {number}: {line!r} matches {len(matches)} images, not one"[:500])
        split.update(matches)
    if not split:
        raise DataError(f"the labeled list {str(file)!r} is empty; write one image per line")
    return sorted(split)


def split_hash(image_ids) -> str:
    """Return eight hexadecimal digits that identify a set of images."""
    return hashlib.sha256(repr(sorted(image_ids)).encode()).hexdigest()[:8]


def labels_hash(dataset: CocoDataset, image_ids) -> str:
    """Return eight hexadecimal digits that identify the objects of a set of images."""
    digest = hashlib.sha256()
    for image_id in sorted(image_ids):
        for label, entry in zip(dataset.labels(image_id), dataset.objects(image_id)):
            digest.update(repr((image_id, label, entry["segmentation"])).encode())
    return digest.hexdigest()[:8]


def repeat_factors(dataset: CocoDataset, image_ids, threshold: float) -> list[float]:
    """Compute how often to show each image, so that rare classes count for more.

    Repeat-factor sampling (LVIS, Gupta et al., CVPR 2019, arXiv 1908.03195, section 4): the factor of an
    image is the largest max(1, sqrt(threshold / fraction of images with the class)) of its classes, and 1
    without any.

    LVIS has a threshold of 0.001, which repeats only rare classes. The threshold of Guided Distillation,
    10, is above every fraction. So the square root applies to all classes, and images without objects are
    shown least."""
    classes = [set(dataset.labels(image_id)) for image_id in image_ids]
    counts = np.bincount([label for labels in classes for label in labels], minlength=1)
    factors = np.sqrt(threshold * len(image_ids) / np.maximum(counts, 1)).clip(min=1)
    return [max((factors[label] for label in labels), default=1.0) for labels in classes]


# ----------------------------------------------------------------------------------------------------- views


@dataclass(frozen=True)
class Augmentation:
    """The distribution of training crops: resize at random, crop, flip.

    Args:
        crop: (H, W) of the result, multiples of 32.
        lsj_scale: the image is resized to fit the crop, times a factor from this range: large-scale jitter
            (Ghiasi et al., CVPR 2021, arXiv 2012.07177).
        short_sides: if given, the image is resized instead so that its shorter side has one of these lengths.
        tile: if given, a window of tile x tile pixels of the image fits the crop, not the whole image.
        flip: mirror half of the images.
        color_jitter: change the colors of the weak view too (SSD, arXiv 1512.02325, section 2.2), with
            brightness as a factor.
        blur: range of the sigma of the strong view's blur, in pixels of the crop."""

    crop: tuple[int, int]
    lsj_scale: tuple[float, float] = (0.1, 2.0)
    short_sides: tuple[int, ...] = ()
    tile: int = 0
    flip: bool = True
    color_jitter: bool = False
    blur: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self):
        if len(self.crop) != 2 or any(side % 32 or side < 32 for side in self.crop):
            raise ValueError(f"crop must be a height and a width that are multiples of 32, found {self.crop}")
        for name, pair in (("lsj_scale", self.lsj_scale), ("blur", self.blur)):
            if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise ValueError(f"{name} must be two positive numbers in ascending order, found {pair}")
        if any(side < 1 for side in self.short_sides):
            raise ValueError(f"short_sides must be lengths in pixels, at least 1, found {self.short_sides}")
        if self.short_sides and self.tile:
            raise ValueError("short_sides and tile both set the scale of a crop; drop one")
        if 0 < self.tile < 32:
            raise ValueError(f"tile must be 0 or at least 32 pixels, found {self.tile}")

    def scale_range(self, H: int, W: int) -> tuple[float, float]:
        """Return the range of the factors by which an image (H, W) is resized."""
        if self.short_sides:
            return min(self.short_sides) / min(H, W), max(self.short_sides) / min(H, W)
        H, W = (self.tile, self.tile) if self.tile else (H, W)
        fit = min(self.crop[0] / H, self.crop[1] / W)
        return self.lsj_scale[0] * fit, self.lsj_scale[1] * fit


@dataclass(frozen=True)
class CropTransform:
    """One particular crop.

    The image (H, W) is resized to `resized`. The window of size `window` at (top, left) is cut out,
    mirrored if `flip`, and pasted into the upper left corner of a canvas of size `crop`. All sizes are
    (height, width)."""

    resized: tuple[int, int]
    top: int
    left: int
    window: tuple[int, int]
    flip: bool
    crop: tuple[int, int]

    @classmethod
    def random(
        cls, augmentation: Augmentation, H: int, W: int, rng: np.random.Generator, shown: tuple = ()
    ) -> "CropTransform":
        """Draw a crop of an image (H, W). shown: a point (y, x) of the image that the crop has to show."""
        crop = augmentation.crop
        if augmentation.short_sides:
            factor = rng.choice(augmentation.short_sides) / min(H, W)
        else:
            factor = rng.uniform(*augmentation.scale_range(H, W))
        resized = max(1, round(H * factor)), max(1, round(W * factor))
        window = min(resized[0], crop[0]), min(resized[1], crop[1])
        ranges = [(0, r - w) for r, w in zip(resized, window)]
        for axis, (position, length) in enumerate(zip(shown, (H, W))):
            pixel, (first, last) = int(position / length * resized[axis]), ranges[axis]
            ranges[axis] = max(first, pixel - window[axis] + 1), min(last, pixel)
        top, left = (int(rng.integers(first, last + 1)) for first, last in ranges)
        return cls(resized, top, left, window, augmentation.flip and rng.random() < 0.5, crop)

    def region(self, image: Image.Image) -> tuple[Image.Image, tuple, float]:
        """Cut out the part of an image that the window shows, and shrink it if the crop is smaller.

        Color changes and blur are cheapest on this region, before `paste` enlarges it.

        Returns the region, the window as a box (left, top, right, bottom) in pixels of the region, and the
        number of region pixels per crop pixel, at most 1."""
        y, x = image.height / self.resized[0], image.width / self.resized[1]
        (h, w), top, left = self.window, self.top, self.left
        box = left * x, top * y, (left + w) * x, (top + h) * y
        if x >= 1:
            return image.resize((w, h), Image.Resampling.BILINEAR, box), (0, 0, w, h), 1.0
        # A margin of two pixels: the pixels at the edge of the box are interpolated from it.
        x0, y0 = max(0, int(box[0]) - 2), max(0, int(box[1]) - 2)
        part = image.crop((x0, y0, min(image.width, int(box[2]) + 3), min(image.height, int(box[3]) + 3)))
        return part, (box[0] - x0, box[1] - y0, box[2] - x0, box[3] - y0), x

    def paste(self, region: Image.Image, box: tuple) -> Image.Image:
        """Resize and mirror the box of a region, and paste it onto a gray canvas. Returns the crop."""
        window = region.resize(self.window[::-1], Image.Resampling.BILINEAR, box)
        window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else window
        if self.window == self.crop:
            return window
        canvas = Image.new("RGB", self.crop[::-1], (PAD_VALUE,) * 3)
        canvas.paste(window)
        return canvas

    def crop_mask(self, segmentation, H: int, W: int) -> tuple[np.ndarray, int, int]:
        """Transform the mask of an object like its image (H, W).

        Returns (part, top, left): a bool array with all of the mask that the window shows, and its place in
        the crop."""
        h, w = self.window
        if isinstance(segmentation, list):  # Move the corners first, then rasterize the visible part only.
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
            return rle_tools.decode(encode_rle(polygons, bottom - top, right - left)).view(bool), top, left
        # Nearest-neighbor sampling. Only the columns of the window are decoded.
        rows = ((self.top + np.arange(h) + 0.5) * (H / self.resized[0])).astype(int)
        columns = ((self.left + np.arange(w) + 0.5) * (W / self.resized[1])).astype(int)
        counts = segmentation["counts"]
        ends = np.cumsum(rle_runs(counts) if isinstance(counts, str) else counts)
        first, last = columns[0] * H, (columns[-1] + 1) * H
        runs = np.diff(ends.clip(first, last), prepend=first)
        part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(-1, H).T
        part = part[np.ix_(rows, columns - columns[0])]
        return part[:, ::-1] if self.flip else part, 0, 0


def strong_view(
    image: Image.Image, rng: np.random.Generator, blur=(0.1, 2.0), changes=("color",)
) -> Image.Image:
    """Change an image at random without moving a pixel, so that the masks of the weak view fit.

    changes: "color" is the paper's: colors, gray and blur as in SimCLR (arXiv 2002.05709, appendix A), with
    the strengths of Guided Distillation. "noise" and "erase" also change gray images."""
    if "color" in changes:
        if rng.random() < 0.8:
            image = color_jitter(image, rng, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
        if rng.random() < 0.2:
            image = image.convert("L").convert("RGB")
        if rng.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*blur)))
    if "noise" in changes and rng.random() < 0.5:
        image = gamma_and_noise(image, rng)
    if "erase" in changes and rng.random() < 0.5:
        image = erase(image, rng)
    return image


def gamma_and_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Raise the pixels, in [0, 1], to a power within a factor of 2, and add Gaussian noise."""
    pixels = np.asarray(image, dtype=np.float32) / 255
    pixels = pixels ** (2 ** rng.uniform(-1, 1))
    pixels += rng.uniform(0, 0.1) * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.uint8(255 * pixels.clip(0, 1) + 0.5))


def erase(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cover up to three rectangles, of 2 to 10 % of the image each, with gray (Random Erasing, Zhong et al.,
    AAAI 2020, arXiv 1708.04896). Masks stay as they are."""
    image = image.copy()
    for _ in range(rng.integers(1, 4)):
        area, aspect = rng.uniform(0.02, 0.1), 2 ** rng.uniform(-1, 1)
        sides = np.sqrt([area * aspect, area / aspect]) * image.size  # width, height
        left, top = rng.uniform(0, 1, 2) * (image.size - sides)
        image.paste((PAD_VALUE,) * 3, np.int64([left, top, left + sides[0], top + sides[1]]).tolist())
    return image


def color_jitter(image, rng, brightness, contrast, saturation, hue, probability=1.0):
    """Multiply brightness, contrast and saturation by factors within 1 +- strength, and rotate the hue by
    up to `hue` turns. Each change is applied with the given probability, in random order."""
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


class AugmentedDataset(Dataset):
    """Training views of a dataset. The item of the key (image_id, seed) is a dictionary:

    - "image": (3, H, W) uint8, the weak view, and "file", the path of the image;
    - with `strong` (True, or the changes of `strong_view`) also "strong": (3, H, W) uint8, the strong view of
      the same crop;
    - with `labels` also "labels": (N,) int64 and "masks": (N, H, W) bool, of the objects that the crop
      shows.

    near_objects: share of the crops that are sure to show the center of an object, in [0, 1]."""

    def __init__(
        self, dataset: CocoDataset | UnlabeledImages, augmentation: Augmentation, *, labels=True,
        strong=False, near_objects=0.0,
    ):  # fmt: skip
        self.dataset, self.augmentation = dataset, augmentation
        self.with_labels, self.near_objects = labels, near_objects
        self.strong = ("color",) if strong is True else strong

    def __getitem__(self, key) -> dict:
        image_id, seed = key
        rng = np.random.default_rng(seed)
        image = self.dataset.image(image_id)
        H, W = image.height, image.width
        shown = ()
        if self.near_objects and rng.random() < self.near_objects and self.dataset.objects(image_id):
            objects = self.dataset.objects(image_id)
            mask = encode_rle(objects[rng.integers(len(objects))]["segmentation"], H, W)
            x, y, w, h = rle_tools.toBbox(mask)
            shown = y + h / 2, x + w / 2
        transform = CropTransform.random(self.augmentation, H, W, rng, shown)
        region, box, scale = transform.region(image)
        if self.augmentation.color_jitter:
            # SSD's 32 and 18 are for OpenCV's 8 bits, where brightness ends at 255 and hue at 180.
            region = color_jitter(region, rng, 32 / 255, 0.5, 0.5, 18 / 180, probability=0.5)
        item = {"image": to_tensor(transform.paste(region, box)), "file": str(self.dataset.path(image_id))}
        if self.strong:
            blur = [scale * sigma for sigma in self.augmentation.blur]
            item["strong"] = to_tensor(transform.paste(strong_view(region, rng, blur, self.strong), box))
        if self.with_labels:
            objects = zip(self.dataset.labels(image_id), self.dataset.objects(image_id))
            parts = [(label, *transform.crop_mask(o["segmentation"], H, W)) for label, o in objects]
            parts = [part for part in parts if part[1].any()]
            masks = np.zeros((len(parts), *self.augmentation.crop), dtype=bool)
            for mask, (_, part, top, left) in zip(masks, parts):
                mask[top : top + part.shape[0], left : left + part.shape[1]] = part
            item["labels"] = torch.tensor([label for label, *_ in parts], dtype=torch.int64)
            item["masks"] = torch.from_numpy(masks)
        return item


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert an RGB image to a tensor (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def shortest_edge_size(
    H: int, W: int, short_side: int = 800, long_side: int = 1333, tile: int = 0
) -> tuple[int, int]:
    """Return the size (H, W) of an image at test time.

    The shorter side becomes `short_side`, unless the longer one would then exceed `long_side` (0: no
    limit). With `tile`, `tile` pixels become short_side, for images of any size. A short_side of 0 keeps the
    size."""
    if not short_side:
        return H, W
    factor = min(short_side / min(H, W), (long_side or math.inf) / max(H, W))
    factor = short_side / tile if tile else factor
    return max(1, round(H * factor)), max(1, round(W * factor))


# --------------------------------------------------------------------------------------------------- batches


def endless_batches(
    views: Dataset,
    image_ids,
    batch_size: int,
    seed: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    timeout: float = 0,
    first_step: int = 0,
    pin_memory: bool = False,
    repeats=None,
):
    """Yield batches of an AugmentedDataset without end, as `collate` returns them.

    A damaged image is replaced by another one, with a warning on standard error.

    Args:
        views: an AugmentedDataset, or any dataset with its keys and items.
        image_ids: the images to draw from, ids of the dataset of `views`.
        seed: determines the order of the images and the seed of each view.
        batch_size, rank, world_size: each rank gets its own batch_size images of the global batch.
        timeout: seconds after which a loader process counts as stuck, 0: never.
        first_step: the number of batches to skip, to resume a run.
        repeats: how often to show each image, relative to the others; see `repeat_factors`.

    Raises DataError when more than one image and more than 1 % of all images are damaged, and RuntimeError
    (from DataLoader) when a loader process dies or is stuck."""
    loader = DataLoader(
        SkipDamaged(views, image_ids),
        batch_sampler=ResumableSampler(image_ids, batch_size, seed, rank, world_size, first_step, repeats),
        num_workers=num_workers,
        timeout=timeout if num_workers else 0,
        collate_fn=_collate_undamaged,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # By default DataLoader draws from the global generator.
        worker_init_fn=_ignore_signals,
    )
    other_processes = multiprocessing.active_children()
    batches = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in other_processes]
    atexit.register(_kill, workers)
    return _report_damaged(batches, workers, len(image_ids))


def collate(items: list[dict]) -> dict:
    """Collate B items of an AugmentedDataset.

    Returns {"image": (B, 3, H, W) uint8, "file": [str] * B}. Strong views add "strong": (B, 3, H, W) uint8.
    Labels add "targets": [{"labels": (N,) int64, "masks": (N, H, W) bool}] * B."""
    batch = {
        "image": torch.stack([item["image"] for item in items]),
        "file": [item["file"] for item in items],
    }
    if "strong" in items[0]:
        batch["strong"] = torch.stack([item["strong"] for item in items])
    if "labels" in items[0]:
        batch["targets"] = [{"labels": item["labels"], "masks": item["masks"]} for item in items]
    return batch


def _collate_undamaged(items: list[dict]) -> tuple[dict | None, list[str]]:
    """Return the batch, or None if an image found no replacement, and the messages about damaged images."""
    damaged = [message for item in items for message in item.pop("damaged")]
    return collate(items) if all(items) else None, damaged


def _report_damaged(batches, workers, num_images: int):
    """Yield the batches, warn once about each damaged image, and stop when they are too many."""
    damaged = set()
    while True:
        try:
            batch, messages = next(batches)
        except RuntimeError:  # A loader process died or is stuck.
            _kill(workers)
            raise
        for message in sorted(set(messages) - damaged):
            print(f"warning: {message}; another image takes its place", file=sys.stderr, flush=True)
        damaged.update(messages)
        if len(damaged) > max(1, num_images / 100) or batch is None:
            raise DataError(f"{len(damaged)} of {num_images} images cannot be used, such as: {min(damaged)}")
        yield batch


class SkipDamaged(Dataset):
    """An AugmentedDataset in which another image of image_ids, drawn by the seed, replaces a damaged one.

    Items have "damaged" as well, the list of messages. It is their only key when five images in a row are
    damaged."""

    def __init__(self, views: AugmentedDataset, image_ids):
        self.views, self.image_ids = views, image_ids

    def __getitem__(self, key) -> dict:
        (image_id, seed), damaged, tried = key, [], []
        for attempt in range(min(5, len(self.image_ids))):
            try:
                return {**self.views[image_id, seed], "damaged": damaged}
            except DataError as error:
                damaged.append(str(error))
                tried.append(image_id)
            place = stable_seed(seed, "instead", attempt)
            while image_id in tried and len(tried) < len(self.image_ids):
                place = (place + 1) % len(self.image_ids)
                image_id = self.image_ids[place]
        return {"damaged": damaged}


def _ignore_signals(_) -> None:
    """Leave signals to the main process. A scheduler sends them to all processes of a job, but the main
    process still needs its loaders to finish the step and save."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _kill(workers) -> None:
    """Kill the loader processes. DataLoader would send SIGTERM, which they ignore, and wait forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would report the dead processes.
    for worker in workers:
        worker.kill()


class ResumableSampler:
    """Yield the keys [(image_id, seed)] of one batch after another, without end.

    The stream is a sequence of epochs. Each is a permutation of the images in which image i occurs
    repeats[i] times on average. Position p of the stream is a function of (seed, p). Step s of all ranks
    together takes the positions s * G to (s + 1) * G - 1, with G = batch_size * world_size. Therefore two
    ranks with half the batch size see the same images as one rank, and a run can resume at any step. Raises
    ValueError without images."""

    def __init__(self, image_ids, batch_size, seed, rank=0, world_size=1, first_step=0, repeats=None):
        if not len(image_ids):
            raise ValueError("cannot sample: there are no images")
        self.image_ids = image_ids
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.first_step = first_step
        repeats = np.ones(len(self.image_ids)) if repeats is None else np.asarray(repeats, dtype=float)
        self.epoch_length = max(1, round(repeats.sum()))
        self.bounds = np.cumsum(repeats) * (self.epoch_length / repeats.sum())

    def epoch(self, epoch: int) -> np.ndarray:
        """Return the indices into image_ids of one epoch. Systematic sampling rounds the repeats of each
        image up or down at random and keeps their sum."""
        rng = np.random.default_rng(stable_seed(self.seed, "epoch", epoch))
        # Below 1, so that floor never passes the epoch's length; the last image takes the rounding error.
        counts = np.diff(np.floor(self.bounds + rng.random() * (1 - 1e-6)), prepend=0).astype(int)
        counts[-1] += self.epoch_length - counts.sum()
        return rng.permutation(np.repeat(np.arange(len(self.image_ids)), counts))

    def __iter__(self):
        current, order = None, None
        for step in itertools.count(self.first_step):
            keys = []
            for position in range(self.batch_size):
                position += (step * self.world_size + self.rank) * self.batch_size
                epoch, place = divmod(position, self.epoch_length)
                if epoch != current:
                    current, order = epoch, self.epoch(epoch)
                keys.append((self.image_ids[order[place]], stable_seed(self.seed, position)))
            yield keys
