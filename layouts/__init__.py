"""Find the images and annotations of a dataset, and read them.

    train, val = load_data("shapes")            # or "coco", "cityscapes", or the path of a folder
    print(train.layout)                         # what was found

For a folder, the functions of `FINDERS` are tried in order. Each looks for one layout and returns None for
another one. A layout whose annotations have another form converts them to COCO form. To add one, write a file
with such a function."""

import difflib
import os
import re
from pathlib import Path

from data import CocoDataset, DataError, stable_seed
from layouts import cityscapes, coco, labelme, shapes, yolo
from layouts.files import Found, Source, has_keys, is_visible, printable
from layouts.validate import load_coco

FINDERS = (cityscapes.find, coco.find, yolo.find, labelme.find)
LAYOUTS = (
    "COCO form (instances_train.json and images/, or an export of Roboflow, CVAT, Label Studio and others), "
    "Cityscapes, YOLO segmentation, labelme"
)
OTHER_LAYOUTS = {  # files that only another layout has
    "Annotations/*.xml": "Pascal VOC",
    "SegmentationObject/*.png": "Pascal VOC",
    "*.xml": "Pascal VOC",
    "meta.json": "Supervisely",
    "labels/*.txt": "YOLO without its data.yaml",
    "masks/*.png": "mask images",
}
MIN_ANNOTATED = 20  # With fewer annotated images, none is held out by default: each is needed for training.
DEFAULT_VAL_RATIO = 0.2


def find_shapes(root: Path) -> Found:
    """Find shapes in its folder, or generate it there first."""
    folder = root / "shapes"
    if not folder.exists():
        shapes.write_shapes(folder)
    sources = (Source(folder / f"instances_{part}.json", folder / "images") for part in ("train", "val"))
    return Found("shapes, a generated dataset", *sources)


NAMES = {  # the datasets that have a name: how they are found, and their default root
    "shapes": (find_shapes, "datasets"),
    "coco": (coco.find_coco, "datasets/coco"),
    "cityscapes": (cityscapes.find_cityscapes, "datasets/cityscapes"),
}


def load_data(
    data: str,
    root="",
    *,
    train_json="",
    val_json="",
    image_folder="",
    val_image_folder="",
    val_ratio: float | None = None,
    allow_missing: bool = False,
    crowd_is_object: bool = False,
    follow_links: bool = True,
    strict: bool = True,
) -> tuple[CocoDataset, CocoDataset | None]:
    """Find, read and validate the training and the validation set. The attribute `layout` of the first is a
    phrase that says what was found.

    Args:
        data: "shapes", "coco", "cityscapes", or the path of a folder, or of a JSON file in COCO form.
        root: the folder with COCO or Cityscapes, or the one that shapes is written into. Default: datasets/.
        train_json, val_json, image_folder, val_image_folder: replace what is found in a folder.
        val_ratio: without a validation set, hold out this fraction of the annotated images (see `hold_out`).
            By default 0.2 of at least 20, none of fewer.
        allow_missing, crowd_is_object, follow_links, strict: see layouts.validate.load_coco.

    Raises DataError for data that are not found or not valid, and for arguments that do not fit together."""
    if val_ratio is not None and not 0 <= val_ratio < 1:
        raise DataError(f"--val-ratio {val_ratio} must be at least 0 and less than 1: 0.2 is 20 %")
    found = find_data(
        data,
        root,
        train_json=train_json,
        val_json=val_json,
        image_folder=image_folder,
        val_image_folder=val_image_folder,
    )

    def load(source: Source, like=None) -> CocoDataset:
        if source.errors and strict:
            more = f" ({len(source.errors)} problems in all; python -m tools.check_data lists them)"
            raise DataError(
                f"{source.image_folder}: {source.errors[0]}{more if len(source.errors) > 1 else ''}"
            )
        dataset = load_coco(
            source.json_file,
            source.image_folder,
            strict,
            content=source.content,
            like=like,
            allow_missing=allow_missing,
            crowd_is_object=crowd_is_object,
            follow_links=follow_links,
        )
        dataset.errors = [*source.errors, *dataset.errors]
        return dataset

    train = load(found.train)
    train.layout = found.layout
    if found.val and val_ratio:
        raise DataError(f"--val-ratio {val_ratio:g} is for data without a validation set; drop it")
    return (train, load(found.val, like=train)) if found.val else hold_out(train, val_ratio)


def find_data(
    data: str, root="", *, train_json="", val_json="", image_folder="", val_image_folder=""
) -> Found:
    """Find the training and the validation set. The arguments and errors are those of `load_data`."""
    if data in NAMES:
        if train_json or val_json or image_folder or val_image_folder:
            raise DataError(
                f"--train-json, --val-json and --image-folder need a folder as --data, found {data!r}"
            )
        find, default_root = NAMES[data]
        return find(Path(root or default_root))
    if root:
        raise DataError(f"--root needs shapes, coco or cityscapes as --data, found {data!r}")
    if data.lower().endswith(".json") and os.path.isfile(data):
        data, train_json = os.path.dirname(data), train_json or data
    if not (train_json and image_folder):
        check_folder(data)
    for flag, path in (("--image-folder", image_folder), ("--val-image-folder", val_image_folder)):
        if path and not os.path.isdir(path):
            raise DataError(f"cannot read images: no folder {flag} {path!r}")

    folder = Path(data)
    if train_json:
        layout, train, val = "", coco_source(train_json, folder), None
        file = coco.find_json(folder, "val")
        if file and os.path.realpath(file) != os.path.realpath(train_json):
            val = coco_source(file, folder)
    else:
        layout, train, val = search(folder)
    if val_json:
        val = coco_source(val_json, folder)
    if image_folder:
        train = train._replace(image_folder=Path(image_folder))
        if val and not val.content:
            # Validation images may be in the same folder, or beside their JSON file as Roboflow has them.
            val = coco_source(val.json_file, folder, image_folder)
    if val_image_folder:
        if not val:
            raise DataError("--val-image-folder needs a validation set; pass --val-json too")
        val = val._replace(image_folder=Path(val_image_folder))
    if train_json or val_json or image_folder or val_image_folder:
        layout = coco.describe("files of the command line", folder, train, val)
    return Found(layout, train, val)


def coco_source(json_file, folder: Path, *image_folders) -> Source:
    return Source(Path(json_file), coco.image_folder(Path(json_file), folder, *image_folders))


def check_folder(data: str) -> None:
    """Raises DataError, which says what to do, if data is not the path of a folder."""
    if os.path.isfile(data):
        is_archive = data.lower().endswith((".zip", ".tar", ".gz", ".tgz", ".rar", ".7z"))
        todo = "unpack it and pass the folder" if is_archive else "pass the folder of the dataset"
        raise DataError(f"cannot read --data {data!r}: it is a file; {todo}")
    if not os.path.isdir(data or "."):
        close = difflib.get_close_matches(data, NAMES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise DataError(f"--data {data!r} is neither shapes, coco, cityscapes nor a folder that exists{hint}")


def search(folder: Path) -> Found:
    """Find the layout of a folder. Raises DataError if it has none that is read."""
    entries = [path for path in sorted(folder.iterdir()) if is_visible(path.name)]
    if len(entries) == 1 and entries[0].is_dir():  # what some archives unpack into
        return search(entries[0])
    for find in FINDERS:
        if found := find(folder):
            return found
    other = next((name for pattern, name in OTHER_LAYOUTS.items() if next(folder.glob(pattern), None)), None)
    if not other and (found := coco.find(folder, only_coco=False)):
        return found  # Reading this file will say what it is instead.
    names = [printable(path.name) + "/" * path.is_dir() for path in entries]
    listing = ", ".join(names[:8]) + f" and {len(names) - 8} more" * (len(names) > 8) or "nothing"
    is_found = [p for p in entries if p.is_dir() and ((p / "data.yaml").is_file() or coco.find(p))]
    if is_found:
        todo = f"pass --data {str(is_found[0])!r}, which has some"
    elif other:
        todo = f"this looks like {other}: export or convert it as COCO with instance masks"
    elif any(has_keys(file, *coco.KEYS) for level in coco.LEVELS for file in coco.list_json(folder, level)):
        todo = "several JSON files could be the training set: choose with --train-json and --val-json"
    else:
        todo = "export the annotations as COCO with instance masks"
    raise DataError(
        f"cannot find annotations in {str(folder)!r}, which has {listing}; {todo}. Layouts that are read: "
        f"{LAYOUTS}"
    )


def hold_out(dataset: CocoDataset, ratio: float | None) -> tuple[CocoDataset, CocoDataset | None]:
    """Split a dataset without a validation set: hold out about this fraction of its annotated images, one at
    least.

    A hash of its file name alone decides about an image. So the choice does not depend on the seed or the
    machine, and a held-out image stays one when images are added or the ratio grows. The copies of an image
    that Roboflow has augmented stay together."""
    annotated = [image_id for image_id in dataset.image_ids if dataset.objects(image_id)]
    if ratio is None:
        ratio = DEFAULT_VAL_RATIO if len(annotated) >= MIN_ANNOTATED else 0
        if not ratio:
            few = f"there is no validation set, and {len(annotated)} annotated images are few"
            dataset.notes = [*dataset.notes, f"{few}, so none is held out; --val-ratio 0.2 would do so"]
    if not ratio:
        return dataset, None
    names = {i: re.sub(r"\.rf\.\w+(\.\w+)$", r"\1", dataset.file_name(i)) for i in annotated}
    place = {i: stable_seed("validation", name) / 2**63 for i, name in names.items()}
    limit = max(ratio, min(place.values(), default=1))
    held_out = {image_id for image_id in annotated if place[image_id] <= limit}
    if len(held_out) == len(annotated):
        problem = f"--val-ratio {ratio:g} would hold out all annotated images"
        raise DataError(f"{problem}, {len(annotated)} in number; lower it or annotate more")
    train = select_images(dataset, [i for i in dataset.image_ids if i not in held_out])
    val = select_images(dataset, sorted(held_out))
    # What the validation found in the file is reported once, with the training set.
    train.errors, train.notes, train.bins = dataset.errors, dataset.notes, dataset.bins
    share = f"{len(held_out)} of {len(annotated)} annotated images are held out (--val-ratio {ratio:g})"
    train.layout = f"{dataset.layout}; no validation set: {share}"
    return train, val


def select_images(dataset: CocoDataset, image_ids) -> CocoDataset:
    """Return a dataset with some of the images, and the same classes."""
    images = []
    for image_id in image_ids:
        H, W = dataset.size(image_id)
        images.append({"id": image_id, "file_name": dataset.file_name(image_id), "height": H, "width": W})
    content = {
        "images": images,
        "annotations": [annotation for i in image_ids for annotation in dataset.annotations(i)],
        "categories": [{"id": i, "name": n} for i, n in zip(dataset.category_ids, dataset.class_names)],
    }
    return CocoDataset(dataset.json_file, dataset.image_folder, content)
