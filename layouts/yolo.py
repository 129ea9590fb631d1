"""Ultralytics' YOLO form for segmentation: data.yaml, images/ and labels/, converted to COCO form in memory.

A label file has one line per object: class x1 y1 x2 y2 ..., a polygon in fractions of the image's width and
height. A line with four numbers after the class is a box without a mask."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import yaml

from data import DataError
from layouts.files import Found, Source, files_below, image_size, printable


def find(folder: Path) -> Found | None:
    """Find data.yaml, or another YAML file with its keys, and convert its training and validation set.

    Returns None for a folder without one. Raises DataError for a file that cannot be used."""
    for file in sorted(folder.glob("*.y*ml"), key=lambda file: file.stem != "data"):
        config = read_yaml(file)
        if {"train", "names"} <= config.keys():
            break
    else:
        return None
    if "kpt_shape" in config:
        raise DataError(f"cannot train on {str(file)!r}: it has poses, and masks are needed")
    classes = read_classes(file, config["names"])
    # The path is often that of another machine, so the folder of the file comes first.
    root = config["path"] if isinstance(config.get("path"), str) else ""
    for base in (folder, folder / root):
        if train := list_images(base, root, config["train"]):
            break
    else:
        raise DataError(f"cannot read {str(file)!r}: no image where its 'train' is, below {str(folder)!r}")
    val = list_images(base, root, config.get("val", config.get("valid")))
    same = "; val is train, so it is not used" if val == train else ""
    unused = "; test is not used" if config.get("test") else ""
    sources = [Source(file, base, *convert(base, names, classes)) for names in (train, val) if names]
    layout = f"YOLO segmentation ({printable(file.name)}){same}{unused}"
    return Found(layout, *sources[: 1 if same else 2])


def read_yaml(file: Path) -> dict:
    """Return a YAML file's mapping with its keys in lower case, or {} if it has another form. Raises
    DataError for a data.yaml that cannot be parsed."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        keys = content if isinstance(content, dict) else {}
        return {key.lower(): content[key] for key in keys if isinstance(key, str)}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        if file.stem != "data":
            return {}
        raise DataError(f"cannot read {str(file)!r}: {' '.join(str(error).split())}"[:500]) from None


def read_classes(file: Path, names) -> dict[int, str]:
    """Return {class: name} of a list or a mapping of names. Raises DataError."""
    classes = dict(enumerate(names)) if isinstance(names, list) else names
    is_valid = isinstance(classes, dict) and all(
        type(number) is int and type(name) in (str, int) for number, name in classes.items()
    )
    if not is_valid:
        raise DataError(f"cannot read {str(file)!r}: its names are no list or mapping of class names")
    return {number: str(name) for number, name in classes.items()}


def locate(base: Path, name: str) -> str | None:
    """Return the part of a path that exists below a folder: the path itself, or with leading folders left
    out. None: no part of it does."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in (".", "..", "/")]
    tails = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((tail for tail in tails if os.path.exists(base / tail)), None) if parts else "."


def list_images(base: Path, root: str, entry) -> list[str]:
    """Return the file names, below `base`, of what data.yaml has for a split: a folder, a text file of
    image paths, or a list of these. What does not exist has none."""
    names = {}
    for part in entry if isinstance(entry, list) else [entry]:
        path = locate(base, f"{root}/{part}") if isinstance(part, str) else None
        if path is None:
            continue
        if os.path.isdir(base / path):
            found = [os.path.normpath(os.path.join(path, name)) for name in files_below(base / path)]
        else:
            lines = (base / path).read_text(encoding="utf-8", errors="replace").splitlines()
            # A path that leads nowhere in the folder keeps its last part, so that it counts as missing.
            found = [locate(base, line) or Path(line).name for line in map(str.strip, lines) if line]
        names |= dict.fromkeys(found)
    return list(names)


def convert(base: Path, names: list[str], classes: dict[int, str]) -> tuple[dict, tuple[str, ...]]:
    """Convert the labels of images to COCO form. Returns the content, and a message for each line that is not
    valid."""
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": number, "name": name} for number, name in classes.items()]
    errors = []
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        sizes = threads.map(lambda name: image_size(base / name), names)
        for image_id, (name, size) in enumerate(zip(names, sizes), start=1):
            content["images"].append({"id": image_id, "file_name": name, **size})
            file = label_file(name)
            for number, line in enumerate(read_lines(base / file) if size else [], start=1):
                try:
                    annotation = parse_line(line, classes, **size) if line.strip() else None
                except ValueError as error:
                    errors.append(f"{printable(file)}, line {number}: {error}"[:300])
                    continue
                if annotation:
                    ids = {"id": len(content["annotations"]) + 1, "image_id": image_id}
                    content["annotations"].append(ids | annotation)
    return content, tuple(errors)


def label_file(image: str) -> str:
    """Return the label file of an image: a/labels/b.txt of a/images/b.jpg, or the one beside it."""
    *folders, name = PurePosixPath(image).with_suffix(".txt").parts
    if "images" in folders:
        folders[-1 - folders[::-1].index("images")] = "labels"
    return "/".join([*folders, name])


def read_lines(file: Path) -> list[str]:
    """Read a label file. An image without one has no annotation. Raises DataError."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"cannot read the label file {str(file)!r}: {error}") from None


def parse_line(line: str, classes: dict[int, str], height: int, width: int) -> dict:
    """Convert one line to an annotation without ids. Raises ValueError."""
    label, *numbers = map(float, line.split())
    if label not in classes:
        raise ValueError(f"class {label:g} is not among the {len(classes)} names of data.yaml")
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        raise ValueError(
            f"found {len(numbers)} numbers after the class, expected 4 or the x and y of 3 or more corners"
        )
    corners = [number * (height if index % 2 else width) for index, number in enumerate(numbers)]
    return {"category_id": int(label), "segmentation": [] if len(numbers) == 4 else [corners]}
