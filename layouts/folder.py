"""A folder with instances_train.json and images/, and instances_val.json if there is a validation set."""

from pathlib import Path


def find(folder: Path, train_json="", val_json="", image_folder=""):
    """Return the (annotation file, image folder) of the training and of the validation set, or None for the
    latter.

    The last three arguments replace the files of the folder."""
    image_folder = Path(image_folder or folder / "images")
    train = Path(train_json or folder / "instances_train.json"), image_folder
    val = Path(val_json or folder / "instances_val.json"), image_folder
    return train, val if val_json or val[0].exists() else None
