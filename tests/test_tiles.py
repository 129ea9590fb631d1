"""Tests of training/tiles.py: windows that overlap find each object of an image once."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_tools

from training.tiles import place, predict_tiles, window_starts

SIZE = (300, 420)  # height and width of the scenes


def draw(rectangles, size=SIZE):
    """Draw objects (top, left, bottom, right, class), the later ones on top. Returns an image whose red is
    the number of the object at each pixel, 0 for none, and whose green is its class."""
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    for number, (top, left, bottom, right, label) in enumerate(rectangles, start=1):
        pixels[top:bottom, left:right] = number, label, 0
    return Image.fromarray(pixels)


def perfect(image):
    """Segment a scene perfectly. The score of an instance grows with its area."""
    pixels = np.asarray(image)
    numbers = [number for number in np.unique(pixels[..., 0]) if number]
    masks = [pixels[..., 0] == number for number in numbers]
    labels = [int(pixels[..., 1][mask][0]) for mask in masks]
    return {
        "scores": torch.tensor([1 - 1 / mask.sum() for mask in masks]),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "rles": [rle_tools.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks],
    }


def each(predict):
    """Predict windows one by one."""
    return lambda windows: [predict(window) for window in windows]


def found(result):
    """Return the instances of a result as a sorted list of (label, counts of the RLE)."""
    return sorted(zip(result["labels"].tolist(), (rle["counts"] for rle in result["rles"])))


SCENES = {
    "small objects": [
        (y, x, y + 12, x + 15, (x + y) % 2) for y in range(3, 290, 17) for x in range(5, 400, 31)
    ],
    "larger than the overlap": [(20, 30, 110, 390, 0), (130, 10, 290, 90, 1), (150, 100, 280, 410, 1)],
    "larger than a window": [(0, 0, 300, 420, 2), (50, 60, 250, 300, 1)],
    "long and thin": [(100, 0, 104, 420, 0), (0, 200, 300, 203, 1), (210, 0, 212, 420, 0)],
    "side by side": [(90, 10 * n, 200, 10 * n + 10, 0) for n in range(42)],
    "a ring": [(40, 40, 260, 380, 0), (60, 60, 240, 360, 1), (80, 80, 220, 340, 0)],
    "nothing": [],
}


@pytest.mark.parametrize("side", [96, 128, 200, 500])
@pytest.mark.parametrize("scene", SCENES)
def test_a_perfect_model_finds_each_object_of_the_image_once(scene, side):
    image = draw(SCENES[scene])
    whole, tiled = perfect(image), predict_tiles(each(perfect), image, side)
    assert found(tiled) == found(whole) and (found(whole) or scene == "nothing")
    assert (tiled["scores"][:-1] >= tiled["scores"][1:]).all()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_windows_are_predicted_in_batches_of_one_size(batch_size):
    image, batches = draw(SCENES["small objects"]), []

    def predict(windows):
        batches.append([window.size for window in windows])
        return each(perfect)(windows)

    assert found(predict_tiles(predict, image, 128, batch_size)) == found(perfect(image))
    count = len(window_starts(image.width, 128)) * len(window_starts(image.height, 128))
    assert sum(map(len, batches)) == count and set(sum(batches, [])) == {(128, 128)}
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (math.ceil(count / batch_size) - 1)


def test_objects_of_other_classes_are_not_joined():
    """Two windows call the same object by two names."""
    image = draw([(100, 100, 200, 300, 0)])
    windows = iter(range(100))

    def undecided(window):
        result = perfect(window)
        return {**result, "labels": result["labels"] + next(windows)}

    assert len(set(predict_tiles(each(undecided), image, 250)["labels"].tolist())) > 1


def test_a_cut_piece_within_an_object_of_another_window_is_dropped():
    """The left window finds the right half of what it sees of the object. Its IoU with the object is too low
    to join them."""
    image = draw([(100, 150, 200, 350, 0)], size=(200, 350))

    def half(window):
        if window.getpixel((0, 150))[0]:  # the object reaches the left side of the right window
            return perfect(window)
        pixels = np.array(window)
        pixels[:, :180] = 0
        return perfect(Image.fromarray(pixels))

    [starts] = [window_starts(350, 200)]
    assert starts == [0, 150]
    result = predict_tiles(each(half), image, 200)
    assert found(result) == found(perfect(image))


def test_the_joined_object_has_the_highest_score():
    scores = iter([0.3, 0.9, 0.6])
    image = draw([(0, 0, 100, 250, 1)], size=(100, 250))
    best = each(lambda window: {**perfect(window), "scores": torch.tensor([next(scores)])})
    result = predict_tiles(best, image, 100)
    assert result["scores"].tolist() == pytest.approx([0.9]) and next(scores, None) is None


@pytest.mark.parametrize(
    "length, side", [(300, 100), (301, 100), (1000, 128), (129, 128), (128, 128), (5, 128)]
)
def test_windows_overlap_by_a_quarter_and_cover_all(length, side):
    starts = window_starts(length, side)
    assert starts[0] == 0 and starts[-1] + side == max(length, side)
    assert all(0 < b - a <= side - side // 4 + 1 for a, b in zip(starts, starts[1:]))


def test_the_mask_of_a_window_is_placed_in_the_image():
    """As if the whole image were encoded, also where runs reach the upper and lower side."""
    rng = np.random.default_rng(0)
    for H, box in ((40, (7, 11, 37, 31)), (20, (0, 0, 30, 20)), (25, (10, 5, 50, 25))):
        window = rng.random((box[3] - box[1], box[2] - box[0])) < 0.7
        whole = np.zeros((H, 50), dtype=np.uint8, order="F")
        whole[box[1] : box[3], box[0] : box[2]] = window
        rle = rle_tools.encode(np.asfortranarray(window, dtype=np.uint8))
        assert place(rle, box, 50, H) == rle_tools.encode(whole)


def test_a_window_may_have_hundreds_of_objects():
    """pycocotools computes the areas of at most 255 masks at once."""
    boxes = [(y, x, y + 3, x + 4) for y in range(1, 96, 5) for x in range(1, 145, 6)]

    def specks(window):
        numbers = np.asarray(window)[..., 0] + 256 * np.asarray(window)[..., 1].astype(int)
        masks = [numbers == number for number in np.unique(numbers) if number]
        rles = [rle_tools.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
        labels = torch.zeros(len(rles), dtype=torch.int64)
        return {"scores": torch.full((len(rles),), 0.9), "labels": labels, "rles": rles}

    pixels = np.zeros((100, 150, 3), dtype=np.uint8)
    for number, (top, left, bottom, right) in enumerate(boxes, start=1):
        pixels[top:bottom, left:right, :2] = number % 256, number // 256
    image = Image.fromarray(pixels)
    assert len(specks(image.crop((0, 0, 100, 100)))["rles"]) > 300
    assert found(predict_tiles(each(specks), image, 100)) == found(specks(image))
