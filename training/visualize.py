"""Pictures of images with their instances."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle_tools
from scipy.ndimage import minimum_filter

from data import rle_runs

COLORS = [(255, 255, 255), (255, 220, 60), (90, 220, 255), (255, 130, 200), (140, 255, 140), (255, 160, 80)]


def draw_instances(
    image: Image.Image, masks=(), names=(), scale: float = 1, dim: float = 0.35
) -> Image.Image:
    """Draw an image resized by `scale`, with masks outlined and named. Lines and text grow with the picture,
    but not beyond an object.

    Args:
        masks: of the image, each a bool array (H, W) or an RLE of COCO.
        dim: pixels outside all masks are multiplied by this."""
    W, H = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    covered, outlines, centers = np.zeros((H, W), dtype=bool), np.zeros((H, W), dtype=np.uint8), []
    for number, mask in enumerate(masks):
        mask, top, left = decode_box(mask)
        if scale != 1 and mask.size:
            top, left = min(H - 1, round(top * scale)), min(W - 1, round(left * scale))
            size = [max(1, round(side * scale)) for side in mask.shape[::-1]]
            mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
            mask = mask[: H - top, : W - left]
        centers.append(None)
        if mask.any():
            line = max(1, round(min(max(H, W) / 600, min(mask.shape) / 10)))
            box = slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1])
            inner = minimum_filter(mask, 2 * line + 1, mode="constant")
            covered[box] |= mask
            outlines[box][mask & ~inner] = number % len(COLORS) + 1
            y, x = (np.average(np.arange(n), weights=mask.sum(1 - a)) for a, n in enumerate(mask.shape))
            centers[-1] = left + x, top + y, mask.shape[1]
    image = image.resize((W, H))
    pixels = np.asarray(image.point(lambda value: int(value * dim))).copy()
    pixels[covered] = np.asarray(image)[covered]
    for number, color in enumerate(COLORS, start=1):
        pixels[outlines == number] = color
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    for center, name in zip(centers, names):
        if center:
            x, y, width = center
            size = max(10, round(min(max(H, W) / 60, 2 * width / max(1, len(name)))))  # as wide as the object
            font = ImageFont.load_default(size)
            half = min(draw.textlength(name, font) / 2, W / 2)
            place = min(max(x, half), W - half), y  # not across the sides
            draw.text(place, name, "white", font, "mm", stroke_width=max(1, size // 10), stroke_fill="black")
    return picture


def decode_box(mask) -> tuple[np.ndarray, int, int]:
    """Decode the bounding box of a mask, a bool array (H, W) or an RLE: only the columns of the box are in
    memory.

    Returns (part, top, left): a bool array with all of the mask, and its place in the image."""
    rle = mask if isinstance(mask, dict) else rle_tools.encode(np.asfortranarray(mask, dtype=np.uint8))
    left, top, width, height = rle_tools.toBbox(rle).astype(int).tolist()
    H, counts = rle["size"][0], rle["counts"]
    ends = np.cumsum(rle_runs(counts.decode() if isinstance(counts, bytes) else counts))
    first, last = left * H, (left + width) * H
    runs = np.diff(ends.clip(first, last), prepend=first)
    part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, H).T
    return part[top : top + height], top, left


def draw_predictions(image: Image.Image, predictions: dict, class_names, score_threshold: float, **kwargs):
    """Draw the instances of one image (evaluate.predict_image) with a score above the threshold, their
    classes and scores. kwargs go to draw_instances."""
    columns = (predictions["labels"].tolist(), predictions["scores"].tolist(), predictions["rles"])
    kept = [(label, score, rle) for label, score, rle in zip(*columns) if score > score_threshold]
    names = [f"{class_names[label]} {score:.2f}" for label, score, _ in kept]
    return draw_instances(image, [rle for *_, rle in kept], names, **kwargs)


def make_grid(rows: list[list[Image.Image]], names: list[str]) -> Image.Image:
    """Combine rows of pictures into one, with the names of the columns above them."""
    widths = [max((row[c].width for row in rows), default=114) + 6 for c in range(len(names))]
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
