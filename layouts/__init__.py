"""Find the images and annotations of a dataset, and read them.

    train, val = load_data("shapes")            # or "coco", "cityscapes", or the path of a folder

Each layout is one file here with a function `find`. It returns two pairs (annotation file in COCO form,
image folder) for training and validation. The second is None without a validation set. A layout whose
annotations have another form converts them first (see cityscapes.py). To add the layout of an annotation
tool, write such a file, let its `find` return None for folders with another layout, and call it at the end
of `find_data`."""

from pathlib import Path

from data import CocoDataset, DataError
from layouts import cityscapes, coco, folder, shapes
from layouts.validate import load_coco

Files = tuple[Path, Path]  # annotation file, image folder


def find_data(
    data: str, root=None, *, train_json="", val_json="", image_folder=""
) -> tuple[Files, Files | None]:
    """Find the (annotation file, image folder) of the training and of the validation set, or None for the
    latter.

    Args:
        data: "shapes", "coco", "cityscapes" or the path of a folder.
        root: the folder with COCO or Cityscapes, or the one that shapes is written into. Default: datasets/.
        train_json, val_json, image_folder: replace the files of a folder.

    Raises DataError for data that does not exist and for arguments that do not fit together."""
    if data in ("shapes", "coco", "cityscapes"):
        if train_json or val_json or image_folder:
            raise DataError(
                f"--train-json, --val-json and --image-folder need a folder as --data, found {data!r}"
            )
        if data == "shapes":
            return shapes.find(Path(root or "datasets") / "shapes")
        if data == "coco":
            return coco.find(Path(root or "datasets/coco"))
        return cityscapes.find(Path(root or "datasets/cityscapes"))
    if root:
        raise DataError(f"--root needs shapes, coco or cityscapes as --data, found {data!r}")
    if not Path(data).is_dir() and not (train_json and image_folder):
        raise DataError(f"--data {data!r} is neither shapes, coco, cityscapes nor a folder that exists")
    return folder.find(Path(data), train_json, val_json, image_folder)


def load_data(
    data: str,
    root="",
    *,
    train_json="",
    val_json="",
    image_folder="",
    val_image_folder="",
    val_ratio: float = 0.2,
    allow_missing: bool = False,
    crowd_is_object: bool = False,
    follow_links: bool = True,
    strict: bool = True,
) -> tuple[CocoDataset, CocoDataset | None]:
    """Read and validate the training and the validation set that `find_data` finds. Raises DataError."""
    files = dict(train_json=train_json, val_json=val_json, image_folder=image_folder)
    train, val = find_data(data, root, **files)
    return load_coco(*train, strict), load_coco(*val, strict) if val else None
