"""What the layouts share: what their `find` returns, and how files are looked for."""

import mmap
import re
from pathlib import Path
from typing import NamedTuple

from data import IMAGE_SUFFIXES, DataError
from layouts.file_names import list_files, read_sizes

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}


class Source(NamedTuple):
    """Where the annotations of one set are.

    json_file: a file in COCO form, or the file or folder that `content` was converted from.
    image_folder: the folder that the file names of the images start from.
    content: the converted annotations in COCO form, None if json_file has them.
    errors: a message, with file and line, for each annotation that could not be converted."""

    json_file: Path
    image_folder: Path
    content: dict | None = None
    errors: tuple[str, ...] = ()


class Found(NamedTuple):
    """A dataset that was found: a phrase for its layout, and its training and validation set."""

    layout: str
    train: Source
    val: Source | None = None


def split_of(name) -> str:
    """Return the split that a relative path names, "train", "val", "test" or "". The last part counts
    first."""
    for part in reversed(Path(name).parts):
        for word in re.findall("[a-z]+", part.lower()):
            if word in SPLITS or word in ("test", "testing"):
                return SPLITS.get(word, "test")
    return ""


def files_below(folder, suffixes=IMAGE_SUFFIXES) -> list[str]:
    """Return the sorted paths, relative to a folder, of all files below it with one of these suffixes."""
    paths = list_files(str(folder), follow_links=True)
    return sorted(path for path in paths if path.lower().endswith(suffixes))


def is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def has_keys(file, *keys: str) -> bool:
    """Check that these keys occur in a JSON file, without parsing it."""
    try:
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            # In UTF-16, a zero byte comes before or after each ASCII character.
            forms = [[f'"{key}"'.encode(encoding) for key in keys] for encoding in ("utf-8", "utf-16-le")]
            return any(all(content.find(key) >= 0 for key in form) for form in forms)
    except (OSError, ValueError):  # ValueError: an empty file
        return False


def image_size(path) -> dict[str, int]:
    """Read the size of an image from its header, as annotation tools show it: rotated by its EXIF
    orientation. Returns {"height", "width"}. Returns {} for a file that is no image: load_coco leaves out
    images without a size."""
    try:
        (H, W), _ = read_sizes(path)
        return {"height": H, "width": W}
    except DataError:
        return {}


def printable(name) -> str:
    """Return a name of at most 100 printable characters."""
    name = str(name)
    return name if name.isprintable() and len(name) <= 100 else repr(name)[:100]
