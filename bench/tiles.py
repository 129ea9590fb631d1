"""Cuts a data set in COCO form into square tiles: many small images in place of fewer large ones, for
experiments that two cores can pay for.

    python bench/tiles.py my_dataset my_tiles --size 128

Tiles lie side by side, the last one flush with the edge; images smaller than a tile, and what is left of an
object below 20 pixels, are left out."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from pycocotools import mask as rle_tools

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import CocoDataset, to_rle  # noqa: E402

LEAST_AREA = 20


def cut(source: Path, target: Path, split: str, size: int) -> None:
    dataset = CocoDataset(source / f"instances_{split}.json", source / "images")
    images, annotations = [], []
    for image_id in dataset.image_ids:
        image, (H, W) = dataset.image(image_id), dataset.size(image_id)
        masks = [rle_tools.decode(to_rle(o["segmentation"], H, W)) for o in dataset.objects(image_id)]
        for top in starts(H, size):
            for left in starts(W, size):
                number = len(images) + 1
                name = f"{split}-{image_id}-{top}-{left}.png"
                image.crop((left, top, left + size, top + size)).save(target / "images" / name)
                images.append({"id": number, "file_name": name, "height": size, "width": size})
                for label, mask in zip(dataset.labels(image_id), masks):
                    part = mask[top : top + size, left : left + size]
                    if part.sum() >= LEAST_AREA:
                        rle = rle_tools.encode(np.asfortranarray(part))
                        entry = {"id": len(annotations) + 1, "image_id": number, "iscrowd": 0}
                        entry |= {"category_id": dataset.category_ids[label], "area": int(part.sum())}
                        entry["segmentation"] = {"size": [size, size], "counts": rle["counts"].decode()}
                        annotations.append(entry)
    categories = [{"id": i, "name": n} for i, n in zip(dataset.category_ids, dataset.class_names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (target / f"instances_{split}.json").write_text(json.dumps(content))
    print(f"{split}: {len(images)} tiles, {len(annotations)} objects")


def starts(length: int, size: int) -> list[int]:
    return sorted({*range(0, length - size + 1, size), length - size}) if length >= size else []


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--size", type=int, default=128)
    flags = parser.parse_args()
    (flags.target / "images").mkdir(parents=True)
    for split in ("train", "val"):
        cut(flags.source, flags.target, split, flags.size)


if __name__ == "__main__":
    main()
