"""Find the image files that annotations name, and read sizes from their headers.

    paths, missing, refused = find_files(["../export/a%20b.PNG"], "images")   # {"../export/...": "a b.png"}

Annotation tools write names for the machine they run on. A name that is no file is compared without what
machines change: kind of slash, percent encoding, Unicode form, case, URL and leading folders."""

import difflib
import os
import re
import stat
import unicodedata
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from data import EXIF_ORIENTATION, IMAGE_FORMATS, DataError
from layouts.json_files import LFS_POINTER

UPLOAD_PREFIX = re.compile("^[0-9a-f]{8}-")  # Label Studio puts it before the name of an uploaded file.


class UnreadableError(DataError):
    """An image file that cannot be read."""


def find_files(names, folder, follow_links: bool = True) -> tuple[dict, dict, dict]:
    """Find the file of each name below an image folder. Nothing outside of the folder is opened, unless links
    in the folder lead there and are followed.

    Returns ({name: path relative to the folder}, {name: why it is missing}, {name: why it is refused}).
    Where the first path is not the name, it is the only file that fits the name."""
    root = os.path.realpath(folder)
    paths, missing, refused, leaving, inside = {}, {}, {}, [], {}
    for name in names:
        path = os.path.join(root, name)
        leaves = os.path.isabs(name) or ".." in name.replace(os.sep, "/").split("/")
        real = real_path(path) if leaves else path
        if not is_file(real):
            missing[name] = f"its file {ascii(name)} is {'outside of' if leaves else 'not in'} {root}"[:500]
            leaving += [name] if leaves else []
        elif leaves and is_below(real, root):
            paths[name] = os.path.relpath(real, root)
        elif leaves or not (follow_links or is_inside(path, root, inside)):
            refused[name] = f"its file {name!r} is outside of {root}"[:500]
        else:
            paths[name] = os.path.normpath(name)
    if missing:
        paths |= fit_names(missing, root, follow_links, taken=set(paths.values()))
        missing = {name: why for name, why in missing.items() if name not in paths}
        refused |= {name: missing.pop(name) for name in leaving if name in missing}
    return paths, missing, refused


def real_path(path: str) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:  # No file system has such a name.
        return path


def is_below(path: str, root: str) -> bool:
    return path.startswith(os.path.join(root, ""))


def is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # ValueError: no file system has such a name.
        return False


def is_inside(path: str, root: str, inside: dict) -> bool:
    """Check that the real path of a file is below root. `inside` caches the answers for folders."""
    parent = os.path.dirname(path)
    if parent not in inside:
        inside[parent] = is_below(os.path.join(os.path.realpath(parent), ""), root)
    return inside[parent] and (not os.path.islink(path) or is_below(os.path.realpath(path), root))


def fit_names(names, root: str, follow_links: bool, taken: set[str]) -> dict[str, str]:
    """Return {name: file} for the names that exactly one file below root fits.

    No file is given to two names, nor one of `taken` to any: its objects would be those of another image."""
    exact, without_prefix = {}, {}
    for path in list_files(root, follow_links):
        parts = comparable(path)
        exact.setdefault(parts[-1], []).append((path, parts))
        without_prefix.setdefault(UPLOAD_PREFIX.sub("", parts[-1]), []).append((path, parts))
    fits = {}
    for name in names:
        parts = comparable(name)
        last = parts[-1] if parts else ""
        found = exact.get(last) or without_prefix.get(UPLOAD_PREFIX.sub("", last), [])
        shared = [len(os.path.commonprefix([parts[::-1], other[::-1]])) for _, other in found]
        if found and shared.count(max(shared)) == 1:
            fits[name] = found[shared.index(max(shared))][0]
    counts = Counter(fits.values())
    return {name: path for name, path in fits.items() if counts[path] == 1 and path not in taken}


def comparable(name: str) -> tuple[str, ...]:
    """Return the folders and the last part of a file name or URL, without what machines change."""
    if query := re.search(r"\?d=([^&]+)", name):  # Label Studio: /data/local-files/?d=folder/name.png
        name = query[1]
    parts = unquote(re.sub(r"^\w+://|\?.*", "", name)).replace("\\", "/").split("/")
    return tuple(unicodedata.normalize("NFC", p).casefold() for p in parts if p not in ("", ".", ".."))


def list_files(root: str, follow_links: bool):
    """Yield the path of every file below a folder, relative to it, without hidden ones."""
    visited = set()
    for parent, folders, files in os.walk(root, followlinks=follow_links):
        real = os.path.realpath(parent)
        if real in visited:  # a link may lead back to a parent folder
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
        for name in files:
            path = os.path.join(parent, name)
            if name[0] != "." and (follow_links or not os.path.islink(path)):
                yield os.path.relpath(path, root)


def nearest_file(name: str, folder, follow_links: bool = True) -> str:
    """Return the file below a folder whose last part is most like that of a name, or ""."""
    files = {os.path.basename(path): path for path in list_files(os.path.realpath(folder), follow_links)}
    last = (comparable(name) or ("",))[-1][:200]
    return next((files[match] for match in difflib.get_close_matches(last, files, n=1)), "")


def read_sizes(path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Read an image file's size (H, W) from its header, as viewers show it and as its pixels are stored.

    They differ if the EXIF orientation turns the image by 90 degrees. Raises UnreadableError."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            stored = image.height, image.width
            # Pillow itself turns a TIFF.
            turned = image.format != "TIFF" and image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            return (stored[::-1] if turned else stored), stored
    except Exception as error:  # Pillow raises many kinds of exceptions for damaged files.
        problem = str(error) or type(error).__name__
        raise UnreadableError(f"cannot read image {str(path)!r}: {problem}"[:500]) from None


def is_lfs_pointer(path) -> bool:
    """Check for the text file that Git leaves in place of a large file."""
    try:
        is_small = os.path.getsize(path) < 1000  # A pointer has about 130 bytes.
        return is_small and Path(path).read_bytes().startswith(LFS_POINTER)
    except OSError:
        return False


def file_identities(paths) -> set[tuple[int, int]]:
    """Return what identifies the files themselves, whatever links or names lead to them."""
    return {(status.st_dev, status.st_ino) for status in map(os.stat, paths)}
