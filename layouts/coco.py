"""JSON files in COCO form: COCO itself, our own folder layout, and the exports of annotation tools.

Names tell the splits: train, val, valid, validation and test count as words of a file's name, and then of its
folder's. The images are in images/, in a folder with the name of the split, or beside the JSON file."""

import json
import mmap
import os
import re
from itertools import islice
from pathlib import Path

from data import IMAGE_SUFFIXES, DataError
from layouts.files import Found, Source, has_keys, is_visible, printable, split_of

KINDS = {  # what wrote a training file of this name
    r"instances_train\.json": "folder in COCO form",
    r"annotations/instances_train\d{4}\.json": "COCO",
    r"(\w+/)?_annotations\.coco\.json": "Roboflow export",
    r"annotations/instances_.+\.json": "CVAT export",
    r"result\.json": "Label Studio export",
    r".*": "COCO JSON",
}
KEYS = ("images", "annotations", "categories")
LEVELS = ("*.json", "*/*.json")
MANY = 20  # A folder with more JSON files has one per image, as labelme writes them.


def find_coco(root: Path) -> Found:
    """Find COCO where its archives unpack. Raises DataError."""
    file = root / "annotations/instances_train2017.json"
    if not file.is_file():
        raise DataError(
            f"cannot find COCO: no annotation file {str(file)!r}; unpack train2017.zip, val2017.zip and "
            "annotations_trainval2017.zip of cocodataset.org into one folder, which then has annotations/, "
            "train2017/ and val2017/, and set --root to it"
        )
    folders = {name: root / f"{name}2017" for name in ("train", "val")}
    files = {name: root / f"annotations/instances_{name}2017.json" for name in folders}
    return Found(
        "COCO (annotations/, train2017/, val2017/)", *(Source(files[n], folders[n]) for n in folders)
    )


def find(folder: Path, only_coco: bool = True) -> Found | None:
    """Find the JSON files of a folder: in it, or else one level below.

    only_coco: skip files that do not have the keys of COCO's instances form.

    Returns None if there is no training file, or if several files could be it."""
    train = find_json(folder, "train", only_coco)
    if not train:
        return None
    level = LEVELS[len(train.relative_to(folder).parts) - 1]
    val = find_json(folder, "val", only_coco, [level])
    sources = [Source(file, image_folder(file, folder)) for file in (train, val) if file]
    kind = next(kind for name, kind in KINDS.items() if re.fullmatch(name, relative(train, folder)))
    splits = [split_of(file.relative_to(folder)) for file in list_json(folder, level)]
    unused = "; test is not used" if "test" in splits else ""
    return Found(describe(kind, folder, *sources) + unused, *sources)


def find_json(folder: Path, split: str, only_coco: bool = True, levels=LEVELS) -> Path | None:
    """Find the only annotation file of a split, "train" or "val". A file that names no split is for
    training."""
    for level in levels:
        by_split = {"train": [], "val": [], "test": [], "": []}
        for file in list_json(folder, level):
            by_split[split_of(file.relative_to(folder))].append(file)
        files = by_split[split] or (by_split[""] if split == "train" else [])
        exports = [file for file in files if file.name.startswith(("instances", "_annotations.coco"))]
        if len(exports) == 1:
            return exports[0]
        if only_coco:
            files = [file for file in files if has_keys(file, *KEYS)]
        if len(files) == 1:
            return files[0]
    return None


def list_json(folder: Path, pattern: str) -> list[Path]:
    """List the JSON files that match a pattern, without those of folders with one JSON file per image."""
    by_parent = {}
    for file in sorted(folder.glob(pattern)):
        if is_visible(file.name) and is_visible(file.parent.name):
            by_parent.setdefault(file.parent, []).append(file)
    return [file for files in by_parent.values() if len(files) <= MANY for file in files]


def image_folder(file: Path, root: Path, *given) -> Path:
    """Choose the folder that the file names in a JSON file start from: of `given` and the usual folders, the
    first with most of its first images."""
    split = file.stem.removeprefix("instances_")
    usual = [root / "images" / split, root / split, root / "images"]
    if file.parent.is_dir():
        is_beside = any(f.suffix.lower() in IMAGE_SUFFIXES for f in islice(file.parent.iterdir(), 1000))
        usual += [file.parent] if is_beside else []
    folders = [*map(Path, given), *filter(Path.is_dir, usual), root]
    names = first_file_names(file)
    return max(folders, key=lambda folder: sum(os.path.isfile(os.path.join(folder, name)) for name in names))


def first_file_names(file: Path, number: int = 20) -> list[str]:
    """Return the first file names in a JSON file without parsing it."""
    names = []
    try:
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for match in islice(re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', content), number):
                names.append(json.loads(match[1]))
    except (OSError, ValueError):  # an error that reading the annotations will explain
        pass
    return names


def describe(kind: str, root: Path, train: Source, val: Source | None = None) -> str:
    """Return a phrase: kind (the annotation files; where the images are)."""
    sources = [source for source in (train, val) if source]
    files, folders = (
        ", ".join(dict.fromkeys(relative(path, root) for path in paths))
        for paths in ([s.json_file for s in sources], [s.image_folder for s in sources])
    )
    return f"{kind} ({files}; images in {folders})"


def relative(path: Path, root: Path) -> str:
    """Return a path as it is below a folder, if it is there."""
    if path == root:
        return "this folder"
    return printable(path.relative_to(root).as_posix() if path.is_relative_to(root) else path)
