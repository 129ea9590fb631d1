"""COCO, as its archives from cocodataset.org unpack: train2017/, val2017/ and annotations/."""

from pathlib import Path


def find(root: Path):
    """Return the (annotation file, image folder) of the training and of the validation set."""
    train, val = (
        (root / f"annotations/instances_{part}2017.json", root / f"{part}2017") for part in ("train", "val")
    )
    return train, val
