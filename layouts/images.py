"""Look at image files before training: which files of folders are new images, and how to read images.

    paths, counts, notes = find_unlabeled(["photos"], train, val)
    unlabeled = UnlabeledImages(train, paths)
    found = inspect_images(train)
    train.pixel_range, train.exif_stored = found.pixel_range, found.exif_stored

Files are read in threads, which mostly wait for the disk."""

import hashlib
import itertools
import os
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import TiffImagePlugin

from data import IMAGE_SUFFIXES, LFS_POINTER, CocoDataset, DataError, find_orientation, is_deep, open_image


def find_unlabeled(
    folders, train: CocoDataset, val: CocoDataset | None
) -> tuple[list[str], dict[str, int], list[str]]:
    """Find all image files below some folders that can be unlabeled images.

    Training and validation images and copies of them are left out: a validation image must not enter
    training under another name. Git LFS pointers are left out too.

    Returns the real paths, {folder: number of paths that it adds}, and one line for each kind of file that
    is left out. Raises DataError for a folder that does not exist or has no such file."""
    if not folders:
        return [], {}, []
    originals = {}  # {real path: kind}
    for kind, dataset in (("training", train), ("validation", val)):
        for image_id in dataset.image_ids if dataset else ():
            originals[os.path.realpath(dataset.path(image_id))] = kind
    files = {}
    for folder in map(str, folders):
        if not Path(folder).is_dir():
            raise DataError(f"cannot read unlabeled images: no folder {folder!r}")
        files[folder] = [path for path in list_image_files(folder) if path not in originals]
    paths = list(dict.fromkeys(itertools.chain(*files.values())))
    copies = find_copies(paths, originals)
    left_out = {path: f"copies of {originals[copy]} images" for path, copy in copies.items()}
    pointers = itertools.compress(paths, _map_in_threads(_is_lfs_pointer, paths))
    left_out |= dict.fromkeys(pointers, "Git LFS pointers; run `git lfs pull` to get the images")
    notes = []
    for reason in sorted(set(left_out.values())):
        which = [path for path in paths if left_out.get(path) == reason]
        notes.append(f"{len(which)} unlabeled files (such as {which[0]!r}) are left out: {reason}")
    kept, counts = {}, {}
    for folder, found in files.items():
        usable = [path for path in found if path not in left_out]
        if not usable:
            problem = f"cannot read unlabeled images: no further image below {folder!r}"
            raise DataError("; ".join([problem, *notes]))
        counts[folder] = len(set(usable) - kept.keys())
        kept |= dict.fromkeys(usable)
    return list(kept), counts, notes


def list_image_files(folder) -> list[str]:
    """Return the sorted real paths of all image files below a folder. Links are followed.

    Names that begin with a dot and folders __MACOSX are skipped: they are the notes of other programs."""
    paths, visited, folders = set(), set(), [os.path.realpath(folder)]
    while folders:
        parent = folders.pop()
        if parent in visited:  # a link may lead back to a parent folder
            continue
        visited.add(parent)
        with os.scandir(parent) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                path = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                if entry.is_dir():
                    folders.append(path)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    paths.add(path)
    return sorted(paths)


def find_copies(paths, originals) -> dict[str, str]:
    """Find the files with the same content as one of the `originals`. Returns {file: original}.

    Most files are not read: they differ in their size, or else in the 4 KB in their middle."""
    paths, originals = list(paths), list(originals)
    for part in ("size", "middle", "all"):
        files = paths + originals
        keys = dict(zip(files, _map_in_threads(_file_key, files, itertools.repeat(part))))
        by_key = {keys[original]: original for original in originals}
        by_key.pop(None, None)
        paths = [path for path in paths if keys[path] in by_key]
        wanted = {keys[path] for path in paths}
        originals = [original for original in originals if keys[original] in wanted]
    return {path: by_key[keys[path]] for path in paths}


def _file_key(path, part: str):
    """Return the size of a file, or a hash of its middle or of all of it. None: empty or not readable."""
    with suppress(OSError):
        size = os.path.getsize(path)
        if part == "size":
            return size or None
        with open(path, "rb") as file:
            if part == "middle":
                file.seek(size // 2)
                return hash(file.read(4096))
            digest = hashlib.blake2b()
            while chunk := file.read(2**20):
                digest.update(chunk)
            return digest.digest()


def _is_lfs_pointer(path) -> bool:
    with suppress(OSError):
        return os.path.getsize(path) < 1024 and Path(path).read_bytes().startswith(LFS_POINTER)
    return False


class Inspection(NamedTuple):
    """What the headers of images show before training."""

    pixel_range: tuple[float, float] | None  # for CocoDataset.pixel_range, see `measure_pixel_range`
    exif_stored: bool  # The annotations are for the stored pixels, for CocoDataset.exif_stored.
    notes: list[str]  # a line for each kind of images that are not read as a whole or perhaps turned wrongly
    unreadable: list[str]  # a line for each image that cannot be read


def inspect_images(dataset, image_ids=None, max_images: int = 5000) -> Inspection:
    """Read the headers of the images of a CocoDataset or UnlabeledImages, or of those in `image_ids`: of at
    most max_images, at even distances, and the pixels of some of more than 8 bits.

    Where the EXIF orientation swaps height and width, the size tells which pixels the annotations are for.
    If they are for the stored pixels in all of these images, exif_stored assumes so for the others too."""
    image_ids = dataset.image_ids if image_ids is None else image_ids
    ids = _sample(image_ids, max_images)
    headers = _map_in_threads(_inspect_header, map(dataset.path, ids), map(dataset.size, ids))
    paths = {}  # {property: paths of the images that have it}
    for image_id, (_, properties) in zip(ids, headers):
        for name in properties:
            paths.setdefault(name, []).append(dataset.path(image_id))
    problems = {
        "channels": "have extra channels; only the first three (in gray images one) are read",
        "pages": "have several pages; only the first one is read",
        "deep colors": "have 16 bits per color; only the upper 8 are read, so convert images that look dark",
    }
    if ("stored" in paths) == ("turned" in paths):
        problems["both"] = (
            "have an EXIF orientation that their size does not decide, and are turned by it; if masks do not "
            "lie on their objects, remove the tag"
        )
    sampled = f" of {len(ids)} sampled" if len(ids) < len(image_ids) else ""
    notes = [
        f"{len(paths[name])}{sampled} images (such as {str(paths[name][0])!r}) {problem}"
        for name, problem in problems.items()
        if name in paths
    ]
    pixel_range = measure_pixel_range(paths.get("deep", []))
    exif_stored = "stored" in paths and "turned" not in paths
    return Inspection(pixel_range, exif_stored, notes, [error for error, _ in headers if error])


def _inspect_header(path, size: tuple[int, int] | None) -> tuple[str, list[str]]:
    """Return an error or "", and the properties of an image that `inspect_images` counts."""
    try:
        with open_image(path) as image:
            tags = getattr(image, "tag_v2", {})  # of a TIFF
            colors = {2: 3, 5: 4, 6: 3, 8: 3}.get(tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION), 1)
            alpha = sum(kind in (1, 2) for kind in tags.get(TiffImagePlugin.EXTRASAMPLES, ()))
            properties = {
                "deep": is_deep(image),
                "deep colors": not is_deep(image) and ";16" in str(image.tile),
                "channels": tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1) > colors + alpha,
                # The other pictures of a phone's MPO are previews and depth maps.
                "pages": getattr(image, "is_animated", False) and image.format != "MPO",
                find_orientation(image, path, size): True,
            }
            return "", [name for name, is_there in properties.items() if is_there]
    except DataError as error:
        return str(error), []


def measure_pixel_range(paths, max_images: int = 200) -> tuple[float, float] | None:
    """Measure the range of values of a set of images, for `read_image`. Returns None if all have 8 bits.

    Unsigned values: from 0 to the highest one, rounded up to the 8, 10, 12, 14 or 16 bits of a camera. The
    highest 0.01 % of each image do not count, as pixels of a sensor may be defective. Floating-point values
    within [0, 1]: from 0 to 1. Others: from percentile 0.1 to 99.9. At most max_images are read, at even
    distances."""
    values = [part for part in _map_in_threads(_read_deep_values, _sample(paths, max_images)) if len(part)]
    if not values:
        return None
    floating, lowest = any(part.dtype.kind == "f" for part in values), min(part.min() for part in values)
    if floating and lowest >= 0 and max(part.max() for part in values) <= 1:
        return 0.0, 1.0
    highest = max(np.percentile(part, 99.99, method="lower") for part in values)
    if not floating and lowest >= 0 and highest < 2**16:
        return 0.0, float(next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if highest < 2**bits))
    low, high = np.percentile(np.concatenate(values), (0.1, 99.9)).tolist()
    return low, high if high > low else low + 1


def _read_deep_values(path) -> np.ndarray:
    """Return about 100,000 finite values of an image, none if it has 8 bits or cannot be read."""
    with suppress(DataError), open_image(path) as image:
        if is_deep(image):
            values = np.asarray(image).ravel()
            values = values[:: 1 + len(values) // 100_000]
            return values[np.isfinite(values)]
    return np.empty(0)


def _sample(items, number: int) -> list:
    """Return at most so many items, at even distances."""
    number = min(number, len(items))
    return [items[place * len(items) // number] for place in range(number)]


def _map_in_threads(function, *arguments) -> list:
    """Return list(map(function, *arguments))."""
    with ThreadPool(16) as threads:
        return threads.starmap(function, zip(*arguments))
