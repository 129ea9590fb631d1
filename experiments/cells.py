"""Cells, a generated dataset for ablation.py --quick: gray images of crowded, blurred and noisy nuclei, as a
fluorescence microscope shows them. Half of the cells are less than 13 pixels across.

    python experiments/cells.py cells          # 400 + 100 images of 96 x 96, in COCO form
    python experiments/cells.py cells 2000     # 2,000 + 100 images"""

import functools
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from layouts.shapes import write_dataset


def write_cells(folder, num_train=400, num_val=100, size=96, radius=(4, 9)) -> None:
    """Generate the dataset, the same files on every machine. radius: range of the typical radius of the cells
    of an image, in pixels."""
    draw = functools.partial(draw_cells, radius=radius)
    write_dataset(folder, draw, ("cell",), num_train, num_val, size)


def draw_cells(size: int, rng: np.random.Generator, radius=(4, 9)):
    """Draw one image. Returns its pixels (size, size, 3) uint8 and its objects [(0, mask)], which may touch
    but do not overlap."""
    taken, light, objects = np.zeros((size, size), bool), np.zeros((size, size)), []
    typical = rng.uniform(*radius)
    for _ in range(rng.integers(3, 25)):
        mask = _ellipse(
            size, rng.uniform(0, size, 2), typical * rng.uniform(0.6, 1.4, 2), rng.uniform(0, 180)
        )
        visible = mask & ~taken
        if visible.sum() < max(20, 0.7 * mask.sum()):
            continue
        taken |= mask
        objects.append((0, visible))
        light[visible] = rng.uniform(0.25, 1)
    y, x = np.mgrid[:size, :size] / size
    haze = rng.uniform(0.05, 0.3) + rng.uniform(-0.1, 0.1) * x + rng.uniform(-0.1, 0.1) * y
    light = _blur(light + haze, rng.uniform(0.5, 1.5))
    light = rng.uniform(80, 220) * light + rng.normal(0, rng.uniform(3, 15), light.shape)
    return np.repeat(light.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2), objects


def _ellipse(size: int, center, radii, degrees: float) -> np.ndarray:
    """Rasterize an ellipse. Returns the mask (size, size) bool."""
    image = Image.new("L", (size, size))
    ImageDraw.Draw(image).ellipse([*(center - radii), *(center + radii)], fill=255)
    return np.asarray(image.rotate(degrees, center=tuple(center))) > 0


def _blur(values: np.ndarray, sigma: float) -> np.ndarray:
    """Blur values in [0, 2] with a Gaussian."""
    image = Image.fromarray(np.uint8(127 * values.clip(0, 2)))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(sigma)), dtype=float) / 127


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    write_cells(sys.argv[1], *map(int, sys.argv[2:]))
