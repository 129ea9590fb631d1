"""Check a mask of untrusted annotations and read it as it was meant.

    mask, remarks = read_mask([[1, 1], [9, 1], [9, 9]], H=10, W=10)   # [[1, 1, 9, 1, 9, 9]], ["unusual form"]

Shapes: H W pixels."""

import math

import numpy as np

from data import DataError, rle_runs

USABLE = "", "mostly outside", "fractions"  # what `polygon_problem` says of a polygon that is kept


def read_mask(segmentation, H: int, W: int) -> tuple[list | dict | str, list[str]]:
    """Read the segmentation of an object in an image (H, W).

    Returns (mask, remarks). The mask is one that pycocotools can read safely: a list of polygons, without the
    parts that `polygon_problem` refuses, or an RLE. If nothing is left it is the reason, a bin of
    validate.BINS. Remarks on an object:

    - "unusual form": other lists in lists than COCO's, or numbers as text;
    - "mostly outside": most polygons lie outside of the image, or most of their corners do;
    - "fractions": most polygons have no coordinate above 1.

    Raises DataError for an RLE that is damaged or belongs to an image of another size."""
    if not segmentation:
        return "boxes only", []
    if is_list(segmentation, 1) and isinstance(segmentation[0], dict) and "counts" in segmentation[0]:
        return read_rle(segmentation[0], H, W), ["unusual form"]
    if isinstance(segmentation, dict):
        return read_rle(segmentation, H, W), []
    if not isinstance(segmentation, list):
        return "unreadable form", []
    polygons, remarks = segmentation, []
    problems = [polygon_problem(polygon, H, W) for polygon in segmentation]
    if any(problems):
        polygons = read_polygons(segmentation)
        problems = [polygon_problem(polygon, H, W) for polygon in polygons]
    if any(problems):
        most = len(problems) / 2
        remarks += ["mostly outside"] * (sum("outside" in problem for problem in problems) > most)
        remarks += ["fractions"] * (problems.count("fractions") > most)
    mask = [polygon for polygon, problem in zip(polygons, problems) if problem in USABLE]
    if not mask:
        return problems[0], remarks
    return mask, remarks + ["unusual form"] * (polygons != segmentation)


def read_rle(segmentation: dict, H: int, W: int) -> dict | str:
    """Check an RLE. Returns it with integers in place of numbers as text, or "empty". Raises DataError."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    numbers = [whole_number(side) for side in size] if isinstance(size, list) else size
    if numbers != [H, W]:
        hint = "; they are exchanged" if numbers == [W, H] else ""
        sizes = f"{size!r}"[:80] + f", that of its image {[H, W]}"
        raise DataError(f"the (height, width) of its RLE is {sizes}{hint}")
    if isinstance(counts, str):
        runs = rle_runs(counts).tolist()
    else:
        if isinstance(counts, list) and not all(type(run) is int for run in counts):
            counts = list(map(whole_number, counts))
        if not isinstance(counts, list) or None in counts or min(counts, default=-1) < 0:
            raise DataError("its RLE has no valid counts")
        runs = counts
    if sum(runs) != H * W:
        raise DataError(f"the runs of its RLE sum to {sum(runs)}, the image has {H * W} pixels"[:200])
    return {"size": numbers, "counts": counts} if any(runs[1::2]) else "empty"


def whole_number(value) -> int | None:
    """Return an integer, a whole float or text of one as an integer, None for anything else."""
    if isinstance(value, str):
        value = to_number(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if type(value) is int else None


def to_number(value) -> float:
    """Return a number or the number in a text, NaN for anything else."""
    try:
        return value if isinstance(value, (int, float)) else float(value)
    except (TypeError, ValueError):
        return math.nan


def polygon_problem(polygon, H: int, W: int) -> str:
    """Check that a polygon is a list x, y, x, y, ... of at least three corners near its image (H, W).

    Returns one of USABLE, or the problem, a bin of validate.BINS. A polygon is outside if it does not touch
    the image, or has a corner that is further away than the longest side of the image. The outline of a
    polygon with many corners may not be absurdly long, because pycocotools needs memory for every pixel of
    it."""
    if not isinstance(polygon, list) or len(polygon) % 2:
        return "unreadable form"
    if not polygon:
        return "boxes only"
    if len(polygon) < 6:
        return "fewer than three corners"
    longest = max(H, W)
    try:
        if not math.isfinite(sum(polygon)):
            return "not numbers"
    except (TypeError, OverflowError):  # an element that is no number, or too large for a float
        return "not numbers"
    xs, ys = polygon[::2], polygon[1::2]
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    if min(left, top) < -longest or max(right, bottom) > 2 * longest:
        return "outside"
    if right <= 0 or bottom <= 0 or left >= W or top >= H:
        return "outside"
    if len(polygon) > 600:
        length = np.abs(np.diff(np.reshape(polygon, (-1, 2)), axis=0)).sum()
        if not length <= 2000 * longest:
            return "unreadable form"
    if is_line(xs, ys):
        return "empty"
    margin = 0.01 * longest
    if left < -margin or top < -margin or right > W + margin or bottom > H + margin:
        corners = zip(xs, ys)
        inside = sum(-margin <= x <= W + margin and -margin <= y <= H + margin for x, y in corners)
        return "mostly outside" if inside < len(xs) / 2 else ""
    return "fractions" if right <= 1 and bottom <= 1 and min(H, W) > 4 else ""


def is_line(xs: list, ys: list) -> bool:
    """Check that all corners lie on one line, so that they enclose nothing."""
    x0, y0 = xs[0], ys[0]
    if abs((xs[1] - x0) * (ys[2] - y0) - (ys[1] - y0) * (xs[2] - x0)) > 1e-6:  # the usual case, fast
        return False
    for x1, y1 in zip(xs, ys):
        if x1 != x0 or y1 != y0:
            break
    dx, dy = x1 - x0, y1 - y0
    return all(abs(dx * (y - y0) - dy * (x - x0)) <= 1e-9 * (dx * dx + dy * dy) for x, y in zip(xs, ys))


def read_polygons(values: list, depth: int = 0) -> list:
    """Read polygons from every unambiguous nesting of lists. Returns lists x, y, x, y, ... of numbers, and
    None for a part that is no polygon.

    Forms: a list of numbers, a list of corners [x, y], OpenCV's [[x, y]] for a corner, lists of any of these,
    and numbers as text."""
    if not any(isinstance(value, (list, dict)) for value in values):
        return [[to_number(value) for value in values]]
    corners = [value[0] if is_list(value, 1) and is_list(value[0], 2) else value for value in values]
    if all(is_list(corner, 2) and not any(isinstance(v, (list, dict)) for v in corner) for corner in corners):
        return [[to_number(value) for corner in corners for value in corner]]
    polygons = []
    for value in values:
        polygons += read_polygons(value, depth + 1) if isinstance(value, list) and depth < 4 else [None]
    return polygons


def is_list(value, length: int) -> bool:
    return isinstance(value, list) and len(value) == length
