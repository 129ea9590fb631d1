"""Tests of data.py on tiny datasets: reading, the labeled split, views and batches."""

import inspect
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import same
from PIL import Image, ImageDraw
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO

import data
from data import (
    Augmentation,
    AugmentedDataset,
    CocoDataset,
    CropTransform,
    ResumableSampler,
    collate,
    encode_rle,
    endless_batches,
    labeled_split,
    repeat_factors,
    split_hash,
    stable_seed,
)

POLYGON = [[12.5, 7.0, 51.0, 13.5, 40.0, 44.0, 17.0, 38.5], [60.0, 30.0, 75.0, 32.0, 66.0, 48.0]]


def black(H=48, W=80):
    return np.zeros((H, W, 3), dtype=np.uint8)


def rectangle(top, left, bottom, right):
    """Return a rectangle as a list of one COCO polygon."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def uncompressed(mask):
    """Encode a mask as an uncompressed RLE: the lengths of the runs of 0 and 1, column by column."""
    counts, last = [0], 0
    for value in mask.T.flatten().tolist():
        if value != last:
            counts.append(0)
            last = value
        counts[-1] += 1
    return {"counts": counts, "size": list(mask.shape)}


def compressed(mask):
    """Encode a mask as a compressed RLE."""
    rle = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"counts": rle["counts"].decode(), "size": rle["size"]}


def near_edge(mask, width=1):
    """Return the pixels within `width` of the outline of a mask or of the border of the image."""
    mask = torch.as_tensor(np.asarray(mask)).float()[None, None]
    padded = F.pad(mask, (width,) * 4, value=0.5)
    grown = F.max_pool2d(padded, 2 * width + 1, stride=1)
    shrunk = -F.max_pool2d(-padded, 2 * width + 1, stride=1)
    return (grown != shrunk)[0, 0].numpy()


def agree(a, b, width=1):
    """Check that two masks differ only near their outlines."""
    a, b = np.asarray(a), np.asarray(b)
    return not ((a != b) & ~near_edge(a, width) & ~near_edge(b, width)).any()


# ------------------------------------------------------------------------------------------ reading


def test_all_forms_of_a_segmentation_give_the_mask_of_pycocotools(make_dataset):
    mask = rle_tools.decode(rle_tools.merge(rle_tools.frPyObjects(POLYGON, 48, 80)))
    assert 1000 < mask.sum() < 2000
    forms = [POLYGON, uncompressed(mask), compressed(mask)]
    dataset = make_dataset(
        {1: black()}, [{"image_id": 1, "category_id": 1, "segmentation": form} for form in forms]
    )
    coco = COCO(dataset.json_file)
    for annotation, form in zip(dataset.annotations(1), forms, strict=True):
        decoded = rle_tools.decode(encode_rle(annotation["segmentation"], 48, 80))
        np.testing.assert_array_equal(decoded, mask)
        np.testing.assert_array_equal(decoded, coco.annToMask({"image_id": 1, "segmentation": form}))


@pytest.mark.parametrize("segmentation", [[], [[3.0, 3.0, 9.0, 9.0]]])
def test_polygons_without_an_area_are_empty_masks(segmentation):
    assert rle_tools.decode(encode_rle(segmentation, 20, 30)).sum() == 0


def test_labels_are_consecutive_although_category_ids_have_gaps(make_dataset):
    """Label k is the k-th category in the order of ids. category_ids maps back."""
    annotations = [
        {"image_id": 1, "category_id": i, "segmentation": rectangle(5, 5, 20, 20)} for i in (90, 7, 3)
    ]
    dataset = make_dataset({1: black()}, annotations, category_ids=(90, 3, 7))
    assert dataset.category_ids == [3, 7, 90]
    assert dataset.class_names == ["class 3", "class 7", "class 90"]
    assert dataset.labels(1) == [2, 1, 0]
    assert [dataset.category_ids[label] for label in dataset.labels(1)] == [90, 7, 3]


def test_crowds_are_not_training_targets(make_dataset):
    box = rectangle(8, 8, 30, 30)
    annotations = [
        {"image_id": 1, "category_id": 2, "segmentation": box, "iscrowd": 1},
        {"image_id": 1, "category_id": 3, "segmentation": box},
    ]
    dataset = make_dataset({1: black()}, annotations)
    assert dataset.labels(1) == [2] and len(dataset.objects(1)) == 1
    assert len(dataset.annotations(1)) == 2
    item = AugmentedDataset(dataset, Augmentation((64, 64), lsj_scale=(1.0, 1.0)))[(1, 0)]
    assert item["labels"].tolist() == [2] and len(item["masks"]) == 1


def test_images_without_annotations_give_empty_targets(make_dataset):
    dataset = make_dataset({1: black()}, [])
    item = AugmentedDataset(dataset, Augmentation((32, 64)))[(1, 0)]
    assert dataset.labels(1) == []
    assert item["labels"].shape == (0,) and item["labels"].dtype == torch.int64
    assert item["masks"].shape == (0, 32, 64) and item["masks"].dtype == torch.bool
    assert item["image"].shape == (3, 32, 64) and item["image"].dtype == torch.uint8


def test_optional_keys_of_annotations_have_defaults(make_dataset):
    segmentation = rectangle(8, 8, 30, 30)
    dataset = make_dataset({1: black()}, [{"image_id": 1, "category_id": 2, "segmentation": segmentation}])
    content = json.loads(dataset.json_file.read_text())
    del content["annotations"][0]["iscrowd"]
    dataset.json_file.write_text(json.dumps(content))
    dataset = CocoDataset(dataset.json_file, dataset.image_folder)
    annotation = {"id": 1, "image_id": 1, "category_id": 2, "segmentation": segmentation}
    assert dataset.annotations(1) == [annotation | {"iscrowd": 0, "area": None}]
    assert dataset.errors == dataset.notes == [] and dataset.bins == {}


def test_given_content_replaces_the_file(make_dataset):
    written = make_dataset({1: black(), 2: black()}, [])
    content = json.loads(written.json_file.read_text())
    content["images"] = content["images"][1:]
    written.json_file.unlink()
    assert CocoDataset(written.json_file, written.image_folder, content).image_ids == [2]


def test_image_ids_are_sorted_and_images_are_rgb(make_dataset):
    images = {30: np.full((8, 9), 77), 4: black(5, 6), 17: black(7, 3)}  # the first one is gray
    dataset = make_dataset(images, [])
    assert dataset.image_ids == [4, 17, 30] and len(dataset) == 3
    assert dataset.size(30) == (8, 9)
    assert np.array_equal(np.asarray(dataset.image(30)), np.full((8, 9, 3), 77))


# ------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("image_ids", [range(1000), [f"image {i}" for i in range(300)]])
def test_smaller_splits_are_subsets_of_larger_ones(image_ids):
    splits = [set(labeled_split(image_ids, ratio, 0)) for ratio in (0.01, 0.02, 0.05, 0.5, 1)]
    assert all(small < large for small, large in itertools.pairwise(splits))
    assert splits[-1] == set(image_ids)


def test_the_split_depends_on_the_seed_but_not_on_the_order_of_images():
    image_ids = list(range(500))
    shuffled = np.random.default_rng(0).permutation(500).tolist()
    assert labeled_split(shuffled, 0.1, 0) == labeled_split(image_ids, 0.1, 0)
    assert labeled_split(image_ids, 0.1, 0) != labeled_split(image_ids, 0.1, 1)


@pytest.mark.parametrize(
    "number, ratio, count", [(1000, 0.01, 10), (999, 0.1, 100), (7, 1, 7), (20, 0.01, 1)]
)
def test_the_split_has_the_requested_fraction_and_at_least_one_image(number, ratio, count):
    split = labeled_split(range(number), ratio, 0)
    assert len(split) == count and split == sorted(set(split))


@pytest.mark.parametrize("ratio", [0, -1, math.nan, 5, math.inf])
def test_a_ratio_outside_0_to_1_is_an_error(ratio):
    with pytest.raises(ValueError, match="ratio"):
        labeled_split(range(10), ratio, 0)


def test_splits_and_seeds_are_the_same_on_every_machine():
    assert split_hash([3, 1, 2]) == split_hash([1, 2, 3]) == "a36b1f2c"
    assert split_hash([1, 2]) != split_hash([1, 2, 3])
    assert labeled_split(range(10), 0.3, 0) == [3, 6, 9]
    assert stable_seed(0, "labelled") == 5772112698953114449


# -------------------------------------------------------------------------------------------- views


def blob_image(side=100):
    """Return a picture of a bright ellipse on black, and its mask."""
    image = Image.new("L", (side, side))
    ImageDraw.Draw(image).ellipse((25, 35, 60, 55), fill=255)
    pixels = np.repeat(np.asarray(image)[..., None], 3, axis=2)
    return pixels, pixels[..., 0] > 127


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("color", [False, True])
def test_a_strong_view_does_not_change_the_weak_view_and_its_masks(shapes, flip, color):
    train = CocoDataset(shapes / "instances_train.json", shapes / "images")
    view = Augmentation((64, 96), lsj_scale=(0.5, 2.0), flip=flip, color_jitter=color)
    both, weak, unlabeled = (
        AugmentedDataset(train, view, strong=True),
        AugmentedDataset(train, view),
        AugmentedDataset(train, view, labels=False),
    )
    for key in itertools.product(train.image_ids[:6], range(4)):
        item, alone = both[key], weak[key]
        assert set(item) == {"image", "file", "strong", "labels", "masks"}
        assert set(alone) == {"image", "file", "labels", "masks"}
        assert set(unlabeled[key]) == {"image", "file"}
        assert all(same(item[name], value) for name, value in alone.items())
        assert torch.equal(item["image"], unlabeled[key]["image"])
        assert item["strong"].shape == item["image"].shape == (3, 64, 96)


@pytest.mark.parametrize("color", [False, True])
def test_both_views_show_an_object_where_its_mask_is(make_dataset, color):
    """The crop is scaled, cut and mirrored. Blur moves the outline by at most two pixels."""
    pixels, mask = blob_image()
    dataset = make_dataset({1: pixels}, [{"image_id": 1, "category_id": 2, "segmentation": compressed(mask)}])
    views = AugmentedDataset(
        dataset, Augmentation((64, 64), lsj_scale=(1.0, 2.0), color_jitter=color), strong=True
    )
    seen, changed = 0, 0
    for seed in range(60):
        item = views[(1, seed)]
        if len(item["masks"]):
            for name, width in (("image", 1), ("strong", 3)):
                brightness = item[name].float().mean(0)
                halfway = (brightness.min() + brightness.max()) / 2
                assert agree(brightness > halfway, item["masks"][0], width), (seed, name)
            seen, changed = seen + 1, changed + (not torch.equal(item["image"], item["strong"]))
    assert seen > 40 and changed > 30


@pytest.mark.parametrize("change", ["noise", "erase"])
def test_a_strong_view_changes_gray_images_too(make_dataset, change):
    """Colors do not. Gamma and noise keep an object where its mask is; what is erased is gray."""
    pixels, mask = blob_image()
    dataset = make_dataset({1: pixels}, [{"image_id": 1, "category_id": 2, "segmentation": compressed(mask)}])
    augmentation = Augmentation((64, 64), lsj_scale=(1.0, 1.2))
    views = AugmentedDataset(dataset, augmentation, strong=[change])
    changed = 0
    for seed in range(60):
        item = views[1, seed]
        different = (item["image"] != item["strong"]).any(0)
        changed += different.any().item()
        if change == "erase":
            assert (item["strong"][:, different] == data.PAD_VALUE).all() and different.float().mean() < 0.4
        elif len(item["masks"]):
            assert agree(item["strong"].float().mean(0) > 127, item["masks"][0], 1), seed
        assert same(views[1, seed], item), "the same seed gives the same view"
    assert 20 < changed < 45, "about half of the images"


def test_a_view_is_a_function_of_the_image_and_the_seed(shapes):
    train = CocoDataset(shapes / "instances_train.json", shapes / "images")
    views = AugmentedDataset(train, Augmentation((64, 64), color_jitter=True), strong=True)
    np.random.seed(1)
    torch.manual_seed(1)
    first = views[(3, 7)]
    np.random.seed(2)
    torch.manual_seed(2)
    views[(4, 8)]
    assert same(views[(3, 7)], first)
    assert not torch.equal(views[(3, 8)]["image"], first["image"])


def random_crops(count, H, W, seed=0):
    rng = np.random.default_rng(seed)
    views = [Augmentation((64, 96), lsj_scale=(0.2, 3.0)), Augmentation((96, 64), short_sides=(40, 64, 130))]
    return [CropTransform.random(views[i % 2], H, W, rng) for i in range(count)]


def apply_to_image(transform, image):
    """Crop an image."""
    region, box, _ = transform.region(image)
    return transform.paste(region, box)


def apply_to_mask(transform, segmentation, H, W):
    """Crop the mask of an object in an image (H, W). Returns a bool array of the size of the crop."""
    part, top, left = transform.crop_mask(segmentation, H, W)
    mask = np.zeros(transform.crop, dtype=bool)
    mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    return mask


def test_crops_stay_within_the_resized_image():
    for transform in random_crops(200, 70, 110):
        for start, window, resized, crop in zip(
            (transform.top, transform.left), transform.window, transform.resized, transform.crop
        ):
            assert start >= 0 and start + window <= resized and window == min(resized, crop)


def test_a_polygon_and_an_rle_of_one_rectangle_have_the_same_cropped_mask():
    H, W = 70, 110
    mask = np.zeros((H, W), dtype=np.uint8)
    mask[20:55, 30:90] = 1
    shown = 0
    for transform in random_crops(200, H, W):
        from_polygon = apply_to_mask(transform, rectangle(20, 30, 55, 90), H, W)
        from_rle = apply_to_mask(transform, compressed(mask), H, W)
        assert (
            from_polygon.shape == from_rle.shape == transform.crop
            and from_rle.dtype == from_polygon.dtype == bool
        )
        assert agree(from_polygon, from_rle), transform
        shown += from_rle.any()
    assert shown > 150


@pytest.mark.parametrize("H, W", [(70, 110), (300, 200), (40, 500)])
def test_a_tile_sets_the_scale_whatever_the_size_of_the_image(H, W):
    """In training a window of 48 pixels fits the crop, times the jitter. When tested it has the test size."""
    view, rng = Augmentation((96, 96), lsj_scale=(0.7, 1.3), tile=48), np.random.default_rng(0)
    assert view.scale_range(H, W) == (pytest.approx(1.4), pytest.approx(2.6))
    for _ in range(50):
        transform = CropTransform.random(view, H, W, rng)
        assert 1.39 * H - 1 < transform.resized[0] < 2.61 * H + 1
    assert data.shortest_edge_size(H, W, 96, 96, tile=48) == (2 * H, 2 * W)
    assert data.shortest_edge_size(H, W, 0, 0, tile=48) == (H, W)


def test_a_crop_shows_the_point_that_it_has_to():
    H, W, rng = 200, 300, np.random.default_rng(0)
    points = [(0, 0), (199.9, 299.9), (100, 20), (60.5, 150.5)]
    starts = set()
    for n in range(400):
        y, x = points[n % 4]
        transform = CropTransform.random(Augmentation((64, 96), tile=64), H, W, rng, shown=(y, x))
        y, x = y * transform.resized[0] / H, x * transform.resized[1] / W
        assert transform.top <= y < transform.top + transform.window[0]
        assert transform.left <= x < transform.left + transform.window[1]
        assert transform.top + transform.window[0] <= transform.resized[0]
        starts.add((n % 4, transform.top))
    assert len({top for n, top in starts if n == 2}) > 20, "the point is anywhere in the crop"


def test_windows_near_objects_show_one(make_dataset):
    """One object of 10 x 10 pixels in an image of 600 x 600: a window of 60 rarely shows it by chance."""
    mask = np.zeros((600, 600), np.uint8)
    mask[300:310, 500:510] = 1
    annotation = {"image_id": 1, "category_id": 3, "segmentation": compressed(mask)}
    dataset = make_dataset({1: np.zeros((600, 600, 3), np.uint8)}, [annotation], category_ids=(3,))
    augmentation = Augmentation((64, 64), lsj_scale=(0.9, 1.1), tile=60)
    shares = {}
    for near in (0.0, 0.5, 1.0):
        views = AugmentedDataset(dataset, augmentation, near_objects=near)
        shares[near] = np.mean([len(views[1, seed]["labels"]) for seed in range(60)])
    assert shares[0.0] < 0.1 and 0.3 < shares[0.5] < 0.75 and shares[1.0] == 1


def test_masks_are_cropped_like_their_image():
    """A picture of the mask is cropped as an image. What lies outside the image is gray."""
    H, W = 70, 110
    mask = rle_tools.decode(encode_rle(POLYGON, H, W))
    picture = Image.fromarray(255 * np.repeat(mask[..., None], 3, axis=2))
    for transform in random_crops(200, H, W):
        pixels = np.asarray(apply_to_image(transform, picture))
        beyond = np.ones(transform.crop, dtype=bool)
        beyond[: transform.window[0], : transform.window[1]] = False
        assert (pixels[beyond] == data.PAD_VALUE).all()
        for segmentation in (POLYGON, compressed(mask)):
            found = apply_to_mask(transform, segmentation, H, W)
            assert not found[beyond].any()
            assert agree((pixels[..., 0] > data.PAD_VALUE) & ~beyond, found), transform


def test_cropped_polygons_equal_those_rasterized_by_pycocotools():
    """Every pixel is equal, although only the visible part is rasterized. Some polygons leave their image."""
    H, W, rng = 70, 110, np.random.default_rng(0)
    for transform in random_crops(200, H, W):
        polygons = [rng.uniform((-20, -20), (W + 20, H + 20), (5, 2)) for _ in range(rng.integers(1, 3))]
        moved = []
        for polygon in polygons:
            x = polygon[:, 0] * (transform.resized[1] / W) - transform.left
            y = polygon[:, 1] * (transform.resized[0] / H) - transform.top
            moved.append(
                np.stack([transform.window[1] - x if transform.flip else x, y], axis=1).flatten().tolist()
            )
        expected = rle_tools.decode(encode_rle(moved, *transform.crop)).astype(bool)
        expected[transform.window[0] :] = expected[:, transform.window[1] :] = False
        assert np.array_equal(
            apply_to_mask(transform, [p.flatten().tolist() for p in polygons], H, W), expected
        ), transform


def test_cropping_before_enlarging_equals_enlarging_before_cropping():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 110, 3)).astype(np.uint8))
    for transform in random_crops(100, 70, 110):
        (h, w), top, left = transform.window, transform.top, transform.left
        whole = np.asarray(image.resize(transform.resized[::-1], Image.Resampling.BILINEAR)).astype(int)
        expected = whole[top : top + h, left : left + w]
        expected = expected[:, ::-1] if transform.flip else expected
        assert np.abs(np.asarray(apply_to_image(transform, image))[:h, :w] - expected).max() <= 2, transform


def test_a_flip_mirrors_only_the_window():
    plain = CropTransform(resized=(60, 80), top=5, left=10, window=(50, 60), flip=False, crop=(64, 64))
    mirrored = CropTransform(resized=(60, 80), top=5, left=10, window=(50, 60), flip=True, crop=(64, 64))
    pixels, mask = blob_image()
    image = Image.fromarray(pixels)
    for cut in (
        lambda g: np.asarray(apply_to_image(g, image)),
        lambda g: apply_to_mask(g, compressed(mask), 100, 100),
    ):
        assert cut(plain).any()
        assert np.array_equal(cut(mirrored)[:50, :60], cut(plain)[:50, :60][:, ::-1])


def test_objects_outside_the_crop_are_dropped(make_dataset):
    """The image is four times as large as the crop and has objects in two corners."""
    annotations = [
        {"image_id": 1, "category_id": 1, "segmentation": rectangle(2, 2, 30, 30)},
        {"image_id": 1, "category_id": 3, "segmentation": rectangle(70, 70, 98, 98)},
    ]
    views = AugmentedDataset(
        make_dataset({1: black(100, 100)}, annotations),
        Augmentation((64, 64), lsj_scale=(4.0, 4.0), flip=False),
    )
    found = []
    for seed in range(60):
        item = views[(1, seed)]
        assert len(item["labels"]) == len(item["masks"]) and item["masks"].any(2).any(1).all()
        found.append(tuple(item["labels"].tolist()))
    assert set(found) == {(), (0,), (2,)}


@pytest.mark.parametrize("crop", [(64, 65), (33, 64), (100, 100)])
def test_a_crop_that_is_not_a_multiple_of_32_is_an_error(make_dataset, crop):
    with pytest.raises(ValueError, match="multiples of 32"):
        AugmentedDataset(make_dataset({1: black()}, []), Augmentation(crop))


# ------------------------------------------------------------------------------------------ streams


def first_steps(sampler, steps):
    return list(itertools.islice(sampler, steps))


@pytest.mark.parametrize("number, batch", [(10, 5), (10, 4), (7, 3), (3, 8)])
def test_every_epoch_shows_every_image_once(number, batch):
    image_ids = [100 + i for i in range(number)]
    keys = list(itertools.chain(*first_steps(ResumableSampler(image_ids, batch, seed=0), 6 * number)))
    assert len(keys) == 6 * number * batch
    epochs = [[image_id for image_id, _ in keys[i : i + number]] for i in range(0, 5 * number, number)]
    assert all(sorted(epoch) == image_ids for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert len({seed for _, seed in keys}) == len(keys)


@pytest.mark.parametrize("repeats", [None, [1.0, 2.5, 1.3, 4.0, 1.0]])
@pytest.mark.parametrize("processes", [2, 4])
def test_several_ranks_together_see_the_images_of_one_rank(repeats, processes):
    image_ids, batch = [5, 6, 7, 8, 9], 8
    alone = first_steps(ResumableSampler(image_ids, batch, seed=3, repeats=repeats), 20)
    parts = [
        first_steps(ResumableSampler(image_ids, batch // processes, 3, rank, processes, repeats=repeats), 20)
        for rank in range(processes)
    ]
    assert [list(itertools.chain(*step)) for step in zip(*parts)] == alone


@pytest.mark.parametrize("first_step", [0, 1, 7, 33])
def test_a_resumed_sampler_continues_where_it_stopped(first_step):
    arguments = dict(image_ids=range(11), batch_size=4, seed=1, repeats=np.linspace(1, 3, 11))
    whole = first_steps(ResumableSampler(**arguments), 50)
    assert (
        first_steps(ResumableSampler(**arguments, first_step=first_step), 50 - first_step)
        == whole[first_step:]
    )


def test_another_seed_gives_another_order():
    assert first_steps(ResumableSampler(range(9), 3, seed=0), 3) != first_steps(
        ResumableSampler(range(9), 3, seed=1), 3
    )


def test_images_are_repeated_as_requested_on_average():
    """Each epoch rounds the repeats of an image up or down. All epochs have the same length."""
    repeats = np.array([1.0, 1.5, 2.25, 1.0, 3.7, 1.05])
    sampler = ResumableSampler(range(6), 4, seed=0, repeats=repeats)
    assert sampler.epoch_length == round(repeats.sum())
    wanted = repeats * sampler.epoch_length / repeats.sum()
    counts = np.array([np.bincount(sampler.epoch(epoch), minlength=6) for epoch in range(2000)])
    assert (counts.sum(1) == sampler.epoch_length).all()
    assert (np.abs(counts - wanted) < 1).all()
    np.testing.assert_allclose(counts.mean(0), wanted, atol=0.06)


def test_sampling_from_no_images_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        ResumableSampler([], 4, seed=0)


def test_a_single_image_is_shown_to_all_ranks():
    parts = [first_steps(ResumableSampler([7], 1, 0, rank, 3), 4) for rank in range(3)]
    assert [image_id for part in parts for ((image_id, _),) in part] == [7] * 12
    assert len({seed for part in parts for ((_, seed),) in part}) == 12


def test_repeat_factors_equal_the_formula_of_lvis(make_dataset):
    """r(image) = max over its classes c of max(1, sqrt(t / f(c))), f(c) = fraction of images with c."""
    labels_of = {1: [1], 2: [1, 1, 2], 3: [1, 3], 4: [2], 5: [], 6: [1]}
    annotations = [
        {"image_id": image_id, "category_id": label, "segmentation": rectangle(3, 3, 30, 30)}
        for image_id, labels in labels_of.items()
        for label in labels
    ]
    dataset = make_dataset({image_id: black() for image_id in labels_of}, annotations)
    for threshold, image_ids in itertools.product((0.3, 0.6, 10.0), ([1, 2, 3, 4, 5, 6], [1, 2, 5])):
        expected = []
        for image_id in image_ids:
            factor = 1.0
            for label in labels_of[image_id]:
                share = sum(label in labels_of[i] for i in image_ids) / len(image_ids)
                factor = max(factor, math.sqrt(threshold / share))
            expected.append(factor)
        assert repeat_factors(dataset, image_ids, threshold) == pytest.approx(expected)


def test_images_without_objects_are_not_repeated(make_dataset):
    assert repeat_factors(make_dataset({1: black(), 2: black()}, []), [1, 2], 10.0) == [1.0, 1.0]


def test_the_number_of_workers_does_not_change_the_batches(shapes):
    train = CocoDataset(shapes / "instances_train.json", shapes / "images")
    views = AugmentedDataset(train, Augmentation((64, 64)), strong=True)
    in_process, with_workers = (
        list(
            itertools.islice(
                endless_batches(views, train.image_ids, 3, seed=0, num_workers=num_workers, first_step=2),
                5,
            )
        )
        for num_workers in (0, 2)
    )
    expected = first_steps(ResumableSampler(train.image_ids, 3, 0, first_step=2), 5)
    for keys, batch, other in zip(expected, in_process, with_workers, strict=True):
        assert batch["file"] == [str(train.path(image_id)) for image_id, _ in keys]
        assert same(batch, other) and same(batch, collate([views[key] for key in keys]))


@pytest.mark.parametrize("labels, strong", list(itertools.product([False, True], repeat=2)))
def test_a_batch_has_the_documented_keys_shapes_and_types(shapes, labels, strong):
    train = CocoDataset(shapes / "instances_train.json", shapes / "images")
    views = AugmentedDataset(train, Augmentation((64, 96)), labels=labels, strong=strong)
    batch = next(endless_batches(views, train.image_ids, 3, seed=0))
    keys = {"image", "file"} | ({"strong"} if strong else set()) | ({"targets"} if labels else set())
    assert batch.keys() == keys
    for key in keys & {"image", "strong"}:
        assert batch[key].shape == (3, 3, 64, 96) and batch[key].dtype == torch.uint8
    assert len(batch["file"]) == 3 and all(map(os.path.isfile, batch["file"]))
    for target in batch.get("targets", ()):
        N = len(target["labels"])
        assert target.keys() == {"labels", "masks"}
        assert target["labels"].shape == (N,) and target["labels"].dtype == torch.int64
        assert target["masks"].shape == (N, 64, 96) and target["masks"].dtype == torch.bool
    assert len(batch.get("targets", [0] * 3)) == 3


@pytest.mark.parametrize(
    "size, sides, expected",
    [
        ((480, 640), (800, 1333), (800, 1067)),
        ((640, 480), (800, 1333), (1067, 800)),
        ((427, 640), (800, 1333), (800, 1199)),
        ((300, 1000), (800, 1333), (400, 1333)),
        ((1000, 300), (800, 1333), (1333, 400)),
        ((1600, 1600), (800, 1333), (800, 800)),
        ((1024, 2048), (1024, 2048), (1024, 2048)),
        ((123, 457), (0, 1333), (123, 457)),
        ((123, 4570), (0, 0), (123, 4570)),
        ((1, 5000), (800, 1333), (1, 1333)),
    ],
)
def test_the_test_size_follows_the_shorter_side_unless_the_longer_side_is_too_long(size, sides, expected):
    assert data.shortest_edge_size(*size, *sides) == expected


def test_an_rle_with_non_ascii_characters_is_an_error():
    """pycocotools would read the bytes of their UTF-8 encoding, which are more than the characters."""
    assert data.rle_runs(":7?").sum() == 32
    for counts in (":7\u20ac", ":7\u00ff", "\u0130"):
        with pytest.raises(data.DataError, match="damaged"):
            data.rle_runs(counts)


def test_the_docstring_examples_run_with_data_py_alone(shapes, tmp_path):
    """data.py lies in an empty folder with a dataset, without the other files of the project."""
    shutil.copy(data.__file__, tmp_path)
    shutil.copytree(shapes, tmp_path / "my_dataset")
    lines = inspect.getdoc(data).splitlines()
    example = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))
    assert "CocoDataset(" in example and "endless_batches(" in example
    check = 'assert batch["image"].shape == (8, 3, 96, 96) and len(batch["targets"]) == 8'
    command = [sys.executable, "-c", f"from data import *\n{example}\n{check}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
