"""Pictures of images with their instances."""

import numpy as np
from PIL import Image, ImageDraw

COLORS = [(255, 255, 255), (255, 220, 60), (90, 220, 255), (255, 130, 200), (140, 255, 140), (255, 160, 80)]


def draw_instances(image: Image.Image, masks=(), names=(), scale: int = 1, dim: float = 0.35) -> Image.Image:
    """Draw an image enlarged `scale` times, with masks (N, H, W) bool outlined and named. Pixels outside
    all masks are multiplied by `dim`."""
    pixels = np.asarray(image.resize((image.width * scale, image.height * scale))).astype(float)
    masks = [np.kron(np.asarray(mask), np.ones((scale, scale), dtype=bool)) for mask in masks]
    pixels[~np.any([np.zeros(pixels.shape[:2], dtype=bool), *masks], axis=0)] *= dim
    for number, mask in enumerate(masks):
        inner = mask.copy()
        for axis in (0, 1):
            for shift in (-1, 1):
                inner &= np.roll(mask, shift, axis)
        pixels[mask & ~inner] = COLORS[number % len(COLORS)]
    picture = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for mask, name in zip(masks, names):
        if mask.any():
            y, x = (int(values.mean()) for values in np.nonzero(mask))
            draw.text((x, y), name, fill="white", anchor="mm", stroke_width=1, stroke_fill="black")
    return picture


def draw_predictions(image: Image.Image, predictions: dict, class_names, score_threshold: float, **kwargs):
    """Draw the instances of one image (evaluate.instances) with a score above the threshold, their
    classes and scores. kwargs go to draw_instances."""
    keep = predictions["scores"] > score_threshold
    labels, scores = predictions["labels"][keep].tolist(), predictions["scores"][keep].tolist()
    names = [f"{class_names[label]} {score:.2f}" for label, score in zip(labels, scores)]
    return draw_instances(image, predictions["masks"][keep].cpu().numpy(), names, **kwargs)


def make_grid(rows: list[list[Image.Image]], names: list[str]) -> Image.Image:
    """Combine rows of pictures into one, with the names of the columns above them."""
    widths = [max(row[c].width for row in rows) + 6 for c in range(len(names))]
    heights = [row[0].height + 6 for row in rows]
    page = Image.new("RGB", (sum(widths), sum(heights) + 20), "white")
    draw, x = ImageDraw.Draw(page), 0
    for c, (name, width) in enumerate(zip(names, widths)):
        draw.text((x + width // 2, 10), name, fill="black", anchor="mm")
        y = 20
        for row, height in zip(rows, heights):
            page.paste(row[c], (x + 3, y))
            y += height
        x += width
    return page
