"""Shapes, a generated dataset: textured circles, squares, triangles and stars that occlude one another.

    write_shapes("datasets/shapes")     # 1,000 training and 200 validation images of 96 x 96, in COCO form

The backgrounds are cluttered. The drawing is seeded, so the files are identical on every machine."""

import colorsys
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as rle_tools

SHAPES = ("circle", "square", "triangle", "star")


def write_shapes(folder, num_train=1000, num_val=200, size=96, seed=0) -> None:
    """Generate the dataset in COCO form."""
    write_dataset(folder, draw_shapes, SHAPES, num_train, num_val, size, seed)


def write_dataset(folder, draw, names: tuple, num_train: int, num_val: int, size: int, seed=0) -> None:
    """Write drawn images as PNG files of size x size pixels and COCO JSON with RLE masks.

    draw: a function such as `draw_shapes`. names: of the classes. A folder that another process has written
    meanwhile is kept."""
    folder = Path(folder)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    (temporary / "images").mkdir(parents=True)
    for part, count in (("train", num_train), ("val", num_val)):
        images, annotations = [], []
        for index in range(count):
            key = hashlib.sha256(repr((seed, "shapes", part, index)).encode()).digest()
            pixels, objects = draw(size, np.random.default_rng(int.from_bytes(key[:8], "big") >> 1))
            name = f"{part}_{index:05d}.png"
            Image.fromarray(pixels).save(temporary / "images" / name)
            images.append({"id": index, "file_name": name, "height": size, "width": size})
            for label, mask in objects:
                rle = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": label + 1,
                        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                        "area": int(mask.sum()),
                        "bbox": rle_tools.toBbox(rle).tolist(),
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(names)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (temporary / f"instances_{part}.json").write_text(json.dumps(content))
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(temporary)  # Another process was faster and has written the same bytes.


def draw_shapes(size: int, rng: np.random.Generator):
    """Draw one image. Returns its pixels (size, size, 3) uint8 and its objects [(label, visible mask)],
    back to front."""
    pixels = _texture(size, rng, [_color(rng, rng.random(), (0, 0.5)) for _ in range(2)])
    for _ in range(rng.integers(2, 6)):  # clutter: thin lines of any color that belong to no object
        pixels[_polygon_mask(_line(size, rng), size)] = _color(rng, rng.random())
    objects = []
    for _ in range(rng.integers(2, 5)):
        label, radius = int(rng.integers(len(SHAPES))), size * rng.uniform(0.13, 0.26)
        center = rng.uniform(0.6 * radius, size - 0.6 * radius, 2)
        mask = _polygon_mask(_outline(label, center, radius, rng.uniform(0, 2 * math.pi)), size)
        if any((mask & other).sum() > 0.4 * min(mask.sum(), other.sum()) for _, other in objects):
            continue
        hue = label / len(SHAPES) + rng.normal(0, 0.06)
        pixels = np.where(mask[..., None], _texture(size, rng, [_color(rng, hue) for _ in range(2)]), pixels)
        objects = [(other_label, other & ~mask) for other_label, other in objects] + [(label, mask)]
    pixels = pixels + rng.normal(0, 6, pixels.shape)
    objects = [(label, mask) for label, mask in objects if mask.sum() >= 30]
    return pixels.clip(0, 255).astype(np.uint8), objects


def _outline(label, center, radius, angle):
    """Return the corners (n, 2) of a shape. All four shapes have about the same area."""
    if SHAPES[label] == "circle":
        corners, radii = 40, 0.85
    elif SHAPES[label] == "square":
        corners, radii = 4, 1.05
    elif SHAPES[label] == "triangle":
        corners, radii = 3, 1.3
    else:
        corners, radii = 10, np.where(np.arange(10) % 2, 0.5, 1.25)
    angles = angle + np.arange(corners) * (2 * math.pi / corners)
    return center + radius * np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _line(size, rng):
    """Draw the corners (4, 2) of a thin line."""
    start, end = rng.uniform(0, size, 2), rng.uniform(0, size, 2)
    across = (end - start)[::-1] * (1, -1) / (np.linalg.norm(end - start) + 1e-6) * rng.uniform(0.5, 1.5)
    return np.stack([start - across, start + across, end + across, end - across])


def _polygon_mask(corners, size, oversample=4):
    """Rasterize a polygon (n, 2). Returns the mask (size, size) bool."""
    image = Image.new("L", (size * oversample,) * 2)
    ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners * oversample], fill=255)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX)) >= 128


def _color(rng, hue, saturation=(0.4, 1.0)):
    """Draw a color of a hue in [0, 1]. Returns RGB (3,) in 0..255."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(0.3, 1.0)))


def _texture(size, rng, colors):
    """Mix two colors in stripes, checks, dots, blots or a gradient. Returns (size, size, 3) float in
    0..255."""
    y, x = np.mgrid[:size, :size]
    angle, period = rng.uniform(0, math.pi), size * rng.uniform(0.06, 0.15)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    a, b = np.sin(2 * math.pi * u / period), np.sin(2 * math.pi * v / period)
    coarse = Image.fromarray(rng.uniform(0, 255, (5, 5)).astype(np.uint8))
    blots = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255
    gradient = (u - u.min()) / (u.max() - u.min())
    mix = (a > 0, a * b > 0, a + b > 0.9, blots, gradient)[rng.integers(5)]
    return colors[0] + (colors[1] - colors[0]) * mix[..., None]
