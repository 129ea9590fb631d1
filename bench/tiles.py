"""Cuts a data set in COCO form into square tiles: many small images in place of fewer large ones, for
experiments that two cores can pay for.

    python bench/tiles.py my_dataset my_tiles --size 128 --ratio 0.05 0.1 --seeds 0 1 2

Tiles lie side by side, the last one flush with the edge; images smaller than a tile, and what is left of an
object below 20 pixels, are left out. splits/0.05-0.txt lists all tiles of 5 % of the images, drawn with the
seed 0: so the labels of few images are used, and not of parts of many."""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from pycocotools import mask as rle_tools

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import CocoDataset, labelled_split, to_rle  # noqa: E402

LEAST_AREA = 20


def cut(source: Path, target: Path, split: str, size: int) -> dict:
    """Returns the names of the tiles of each image, by its id."""
    dataset = CocoDataset(source / f"instances_{split}.json", source / "images")
    images, annotations, names = [], [], {}
    for image_id in dataset.image_ids:
        image, (H, W) = dataset.image(image_id), dataset.size(image_id)
        masks = [rle_tools.decode(to_rle(o["segmentation"], H, W)) for o in dataset.objects(image_id)]
        for top in starts(H, size):
            for left in starts(W, size):
                number = len(images) + 1
                name = f"{split}-{image_id}-{top}-{left}.png"
                image.crop((left, top, left + size, top + size)).save(target / "images" / name)
                names.setdefault(image_id, []).append(name)
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
    return names


def starts(length: int, size: int) -> list[int]:
    return sorted({*range(0, length - size + 1, size), length - size}) if length >= size else []


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--ratio", type=float, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    flags = parser.parse_args()
    (flags.target / "images").mkdir(parents=True)
    (flags.target / "splits").mkdir()
    names = cut(flags.source, flags.target, "train", flags.size)
    cut(flags.source, flags.target, "val", flags.size)
    for ratio, seed in itertools.product(flags.ratio, flags.seeds):
        lines = [name for image_id in labelled_split(list(names), ratio, seed) for name in names[image_id]]
        (flags.target / f"splits/{ratio:g}-{seed}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
