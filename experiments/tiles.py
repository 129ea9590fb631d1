"""Cut a dataset in COCO form into square tiles: many small images instead of few large ones, for experiments
that fit two CPU cores.

    python experiments/tiles.py my_dataset my_tiles --size 128 --ratio 0.05 0.1 --seeds 0 1 2

Tiles lie side by side, the last one flush with the edge. Images smaller than a tile are left out, and so are
parts of objects below 20 pixels. splits/0.05-0.txt lists all tiles of 5 % of the images, drawn with seed 0: a
few images are labeled completely, instead of parts of many."""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from pycocotools import mask as rle_tools

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import encode_rle, labeled_split
from layouts.validate import load_coco

MIN_AREA = 20  # pixels


def cut(source: Path, target: Path, part: str, size: int) -> dict:
    """Cut the part "train" or "val" of a dataset. Returns {image id: file names of its tiles}."""
    dataset = load_coco(source / f"instances_{part}.json", source / "images")
    images, annotations, names = [], [], {}
    for image_id in dataset.image_ids:
        image, (H, W) = dataset.image(image_id), dataset.size(image_id)
        masks = [rle_tools.decode(encode_rle(o["segmentation"], H, W)) for o in dataset.objects(image_id)]
        for top, left in itertools.product(tile_starts(H, size), tile_starts(W, size)):
            number = len(images) + 1
            name = f"{part}-{image_id}-{top}-{left}.png"
            image.crop((left, top, left + size, top + size)).save(target / "images" / name)
            names.setdefault(image_id, []).append(name)
            images.append({"id": number, "file_name": name, "height": size, "width": size})
            for label, mask in zip(dataset.labels(image_id), masks):
                visible = mask[top : top + size, left : left + size]
                if visible.sum() >= MIN_AREA:
                    rle = rle_tools.encode(np.asfortranarray(visible))
                    annotation = {"id": len(annotations) + 1, "image_id": number, "iscrowd": 0}
                    annotation |= {"category_id": dataset.category_ids[label], "area": int(visible.sum())}
                    annotation["segmentation"] = {"size": [size, size], "counts": rle["counts"].decode()}
                    annotations.append(annotation)
    categories = [{"id": i, "name": n} for i, n in zip(dataset.category_ids, dataset.class_names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (target / f"instances_{part}.json").write_text(json.dumps(content))
    print(f"{part}: {len(images)} tiles, {len(annotations)} objects")
    return names


def tile_starts(length: int, size: int) -> list[int]:
    """Return the first pixels of the tiles along a side; none if the side is shorter than a tile."""
    return sorted({*range(0, length - size + 1, size), length - size}) if length >= size else []


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--size", type=int, default=128, help="side of a tile, pixels")
    parser.add_argument("--ratio", type=float, nargs="*", default=[], help="labeled fractions of the images")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="seeds of the labeled images")
    flags = parser.parse_args()
    (flags.target / "images").mkdir(parents=True)
    (flags.target / "splits").mkdir()
    names = cut(flags.source, flags.target, "train", flags.size)
    cut(flags.source, flags.target, "val", flags.size)
    for ratio, seed in itertools.product(flags.ratio, flags.seeds):
        lines = [name for image_id in labeled_split(list(names), ratio, seed) for name in names[image_id]]
        (flags.target / f"splits/{ratio:g}-{seed}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
