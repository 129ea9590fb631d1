"""Predict an image in overlapping windows, for small objects and for large images.

    result = predict_tiles(predict, image, side=512)     # "scores", "labels", "rles" of the whole image

Each window is predicted like an image of its own (evaluate.predict_image sets its scale).

Windows overlap by at least a quarter of their side, and the pieces of an object that they cut are joined.
Masks are kept as RLEs of their windows, so memory does not grow with the size of the image.

Letters in shapes: N and M instances of two windows, H W pixels."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from tqdm import tqdm

from training.distributed import rank

OVERLAP = 0.25  # of two neighboring windows, relative to their side
MIN_IOU = 0.5  # of two pieces of an object, in the pixels that their windows share
MIN_INSIDE = 0.8  # share of a cut piece within an instance of another window, for the piece to be dropped

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Piece:
    """An instance of one window. is_cut: it touches a side of the window that is no side of the image."""

    score: float
    label: int
    rle: dict
    box: Box
    is_cut: bool


def predict_tiles(predict, image: Image.Image, side: int, batch_size: int = 8) -> dict:
    """Predict the instances of an image from windows of side x side pixels.

    Instances of two windows are one object if they have the same class and, in the pixels that the windows
    share, a mask IoU above 0.5 and no better partner. The object is their union, with the highest score. An
    instance that its window cuts is dropped if it has no partner but lies within an instance of the same
    class in another window.

    Args:
        predict: a function from a list of windows, which have one size, to the instances {"scores" (N,),
            "labels" (N,), "rles"} of each. It should leave out low scores, because all pieces are compared.
        batch_size: windows that are predicted at once.

    Returns the same for the whole image, best first."""
    W, H = image.size
    tops, lefts = window_starts(H, side), window_starts(W, side)
    windows = [(x, y, min(x + side, W), min(y + side, H)) for y in tops for x in lefts]
    pieces, members = [], []  # members: the indices of the pieces of each window
    many = len(windows) > 50 and rank() == 0
    bar = tqdm(total=len(windows), desc="windows", leave=False, disable=None if many else True)
    for n in range(0, len(windows), batch_size):
        boxes = windows[n : n + batch_size]
        for box, result in zip(boxes, predict([image.crop(box) for box in boxes])):
            first = len(pieces)
            values = result["scores"].tolist(), result["labels"].tolist(), result["rles"]
            for score, label, rle in zip(*values):
                if rle_tools.area(rle):
                    pieces.append(Piece(score, label, rle, box, is_cut(rle, box, W, H)))
            members.append(range(first, len(pieces)))
        bar.update(len(boxes))
    bar.close()

    joined, containers = [], [[] for _ in pieces]
    for (box_a, a), (box_b, b) in itertools.combinations(zip(windows, members), 2):
        left, top = map(max, box_a[:2], box_b[:2])
        right, bottom = map(min, box_a[2:], box_b[2:])
        if a and b and left < right and top < bottom:
            compare(pieces, a, b, (left, top, right, bottom), joined, containers)

    objects = []
    for group in without_contained(connected_groups(len(pieces), joined), pieces, containers):
        rle = rle_tools.merge([place(pieces[n].rle, pieces[n].box, W, H) for n in group])
        objects.append((max(pieces[n].score for n in group), pieces[group[0]].label, rle))
    objects.sort(key=lambda entry: -entry[0])
    scores, labels, rles = zip(*objects) if objects else ((), (), ())
    scores, labels = torch.tensor(scores), torch.tensor(labels, dtype=torch.int64)
    return {"scores": scores, "labels": labels, "rles": list(rles)}


def window_starts(length: int, side: int) -> list[int]:
    """Return where windows start along one side of an image: evenly spaced, from end to end."""
    if length <= side:
        return [0]
    count = math.ceil((length - OVERLAP * side) / (side - OVERLAP * side))
    return np.linspace(0, length - side, count).astype(int).tolist()


def is_cut(rle: dict, box: Box, W: int, H: int) -> bool:
    """Return whether a mask touches a side of its window that is no side of the image."""
    x, y, w, h = rle_tools.toBbox(rle).astype(int).tolist()
    left, top, right, bottom = box
    touches_left, touches_top = x == 0 and left > 0, y == 0 and top > 0
    return touches_left or touches_top or (left + x + w == right < W) or (top + y + h == bottom < H)


def compare(pieces: list[Piece], a: range, b: range, shared: Box, joined: list, containers: list):
    """Compare the pieces of two windows in the pixels that both show. Appends the pairs to join to `joined`,
    and to containers[n] the pieces that piece n lies within."""
    cut_a, cut_b = ([cut_out(pieces[n], shared) for n in window] for window in (a, b))
    same_class = np.equal.outer([pieces[n].label for n in a], [pieces[n].label for n in b])  # (N, M)
    iou = same_class * rle_tools.iou(cut_a, cut_b, [False] * len(b))
    best_b, best_a = iou.argmax(1), iou.argmax(0)
    joined += [(a[n], b[m]) for n, m in enumerate(best_b) if iou[n, m] > MIN_IOU and best_a[m] == n]
    for inner, outer, cut_inner, cut_outer, same in (
        (a, b, cut_a, cut_b, same_class),
        (b, a, cut_b, cut_a, same_class.T),
    ):
        # With a crowd pycocotools divides the intersection by the area of the first mask alone.
        inside = same * rle_tools.iou(cut_inner, cut_outer, [True] * len(outer))
        inside *= (areas(cut_inner) / areas([pieces[n].rle for n in inner]))[:, None]
        for n, m in np.argwhere(inside > MIN_INSIDE):
            if pieces[inner[n]].is_cut:
                containers[inner[n]].append(outer[m])


def areas(rles: list[dict]) -> np.ndarray:
    """Return the areas of masks. One by one, because pycocotools takes no more than 255 masks."""
    return np.array([int(rle_tools.area(rle)) for rle in rles])


def cut_out(piece: Piece, box: Box) -> dict:
    """Return the RLE of the part of a piece that lies in a box of the image."""
    left, top, right, bottom = box
    x, y = piece.box[:2]
    return rle_tools.encode(
        np.asfortranarray(rle_tools.decode(piece.rle)[top - y : bottom - y, left - x : right - x])
    )


def connected_groups(count: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Return the connected components of a graph with nodes 0 to count - 1, each as a list of nodes."""
    group = {n: [n] for n in range(count)}
    for n, m in pairs:
        if group[n] is not group[m]:
            group[n] += group[m]
            group |= dict.fromkeys(group[m], group[n])
    return list({id(nodes): nodes for nodes in group.values()}.values())


def without_contained(groups: list[list[int]], pieces: list[Piece], containers: list) -> list[list[int]]:
    """Drop each group whose pieces all lie within pieces of other groups. Smaller ones are dropped first, so
    that one of two equal groups stays."""
    dropped, kept = set(), []
    for group in sorted(groups, key=lambda nodes: sum(int(rle_tools.area(pieces[n].rle)) for n in nodes)):
        if all(any(m not in group and m not in dropped for m in containers[n]) for n in group):
            dropped.update(group)
        else:
            kept.append(group)
    return kept


def place(rle: dict, box: Box, W: int, H: int) -> dict:
    """Return the mask of a window as the RLE of the whole image, without decoding the whole image."""
    left, top = box[:2]
    columns = np.pad(rle_tools.decode(rle).T.astype(np.int8), ((0, 0), (1, 1)))  # (w, h + 2)
    x, y = np.nonzero(np.diff(columns, axis=1))  # the starts and ends of the runs, column by column
    edges, times = np.unique((left + x) * H + top + y, return_counts=True)
    edges = edges[times == 1]  # A run that ends with its column may go on in the next one.
    runs = np.diff(edges, prepend=0, append=W * H)
    runs = runs if runs[-1] else runs[:-1]
    return rle_tools.frPyObjects({"size": [H, W], "counts": runs.tolist()}, H, W)
