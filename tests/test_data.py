"""Reading, splitting, cutting, ordering: what the data code promises, on tiny datasets."""

import itertools
import json
import math
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO

import data
from data import (
    CocoDataset,
    Geometry,
    StepSampler,
    View,
    Views,
    labelled_split,
    load_data,
    repeat_factors,
    seed_of,
    split_hash,
    stream,
    to_rle,
)
from shapes import SHAPES, write_shapes

POLYGON = [[12.5, 7.0, 51.0, 13.5, 40.0, 44.0, 17.0, 38.5], [60.0, 30.0, 75.0, 32.0, 66.0, 48.0]]


def black(H=48, W=80):
    return np.zeros((H, W, 3), dtype=np.uint8)


def rectangle(top, left, bottom, right):
    """As a COCO polygon."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def uncompressed(mask):
    """RLE as a list: lengths of runs of 0 and 1 in turn, column by column."""
    counts, last = [0], 0
    for value in mask.T.flatten().tolist():
        if value != last:
            counts.append(0)
            last = value
        counts[-1] += 1
    return {"counts": counts, "size": list(mask.shape)}


def compressed(mask):
    rle = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"counts": rle["counts"].decode(), "size": rle["size"]}


def near_edge(mask, width=1):
    """Pixels within `width` of the mask's outline, or of the border of the image."""
    mask = torch.as_tensor(np.asarray(mask)).float()[None, None]
    padded = F.pad(mask, (width,) * 4, value=0.5)
    grown = F.max_pool2d(padded, 2 * width + 1, stride=1)
    shrunk = -F.max_pool2d(-padded, 2 * width + 1, stride=1)
    return (grown != shrunk)[0, 0].numpy()


def agree(a, b, width=1):
    """Two masks differ near their outline only."""
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
        ours = rle_tools.decode(to_rle(annotation["segmentation"], 48, 80))
        np.testing.assert_array_equal(ours, mask)
        np.testing.assert_array_equal(ours, coco.annToMask({"image_id": 1, "segmentation": form}))


@pytest.mark.parametrize("segmentation", [[], [[3.0, 3.0, 9.0, 9.0]]])
def test_polygons_without_an_area_are_empty_masks(segmentation):
    assert rle_tools.decode(to_rle(segmentation, 20, 30)).sum() == 0


def test_labels_count_categories_without_gaps(make_dataset):
    """The k-th category in the order of ids is label k, and category_ids leads back."""
    annotations = [
        {"image_id": 1, "category_id": i, "segmentation": rectangle(5, 5, 20, 20)} for i in (90, 7, 3)
    ]
    dataset = make_dataset({1: black()}, annotations, category_ids=(90, 3, 7))
    assert dataset.category_ids == [3, 7, 90]
    assert dataset.class_names == ["class 3", "class 7", "class 90"]
    assert dataset.labels(1) == [2, 1, 0]
    assert [dataset.category_ids[label] for label in dataset.labels(1)] == [90, 7, 3]


def test_crowds_are_no_training_targets(make_dataset):
    box = rectangle(8, 8, 30, 30)
    annotations = [
        {"image_id": 1, "category_id": 2, "segmentation": box, "iscrowd": 1},
        {"image_id": 1, "category_id": 3, "segmentation": box},
    ]
    dataset = make_dataset({1: black()}, annotations)
    assert dataset.labels(1) == [2] and len(dataset.objects(1)) == 1
    assert len(dataset.annotations(1)) == 2
    item = Views(dataset, View((64, 64), scale=(1.0, 1.0)))[(1, 0)]
    assert item["labels"].tolist() == [2] and len(item["masks"]) == 1


def test_images_without_annotations_give_empty_targets(make_dataset):
    dataset = make_dataset({1: black()}, [])
    item = Views(dataset, View((32, 64)))[(1, 0)]
    assert dataset.labels(1) == []
    assert item["labels"].shape == (0,) and item["labels"].dtype == torch.int64
    assert item["masks"].shape == (0, 32, 64) and item["masks"].dtype == torch.bool
    assert item["image"].shape == (3, 32, 64) and item["image"].dtype == torch.uint8


def test_images_are_read_in_the_order_of_their_ids_as_rgb(make_dataset):
    images = {30: np.full((8, 9), 77), 4: black(5, 6), 17: black(7, 3)}  # the first one is grey
    dataset = make_dataset(images, [])
    assert dataset.image_ids == [4, 17, 30] and len(dataset) == 3
    assert dataset.size(30) == (8, 9)
    assert np.array_equal(np.asarray(dataset.image(30)), np.full((8, 9, 3), 77))


def test_a_missing_image_is_named(make_dataset):
    dataset = make_dataset({1: black(), 2: black()}, [])
    (dataset.image_folder / "2.png").unlink()
    with pytest.raises(ValueError, match=r"2\.png"):
        CocoDataset(dataset.json_file, dataset.image_folder)


def test_a_missing_annotation_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        CocoDataset(tmp_path / "nowhere.json", tmp_path)


BROKEN = {
    "not JSON": '{"images": [',
    "not text": b"\xff\xfe\x00",
    "an empty file": "",
    "a list": "[]",
    "no categories": '{"images": [], "annotations": []}',
    "an annotation of no image": json.dumps(
        {"images": [], "annotations": [{"image_id": 1}], "categories": []}
    ),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_annotation_file_is_named(tmp_path, content):
    (tmp_path / "broken.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"broken\.json"):
        CocoDataset(tmp_path / "broken.json", tmp_path)


def test_a_folder_in_coco_form_is_read_as_data(shapes):
    train, val = load_data(str(shapes))
    assert (len(train), len(val)) == (12, 6)


def test_it_can_be_copied_where_pillow_is_told_to_refuse_no_image(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert runpy.run_path(data.__file__, run_name="copy")["MAX_PIXELS"] > 10**8


def test_data_that_is_neither_known_nor_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither shapes, coco, cityscapes nor a folder"):
        load_data(str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("image_ids", [range(1000), [f"image {i}" for i in range(300)]])
def test_smaller_splits_lie_within_larger_ones(image_ids):
    splits = [set(labelled_split(image_ids, ratio, 0)) for ratio in (0.01, 0.02, 0.05, 0.5, 1)]
    assert all(small < large for small, large in itertools.pairwise(splits))
    assert splits[-1] == set(image_ids)


def test_the_split_depends_on_seed_and_ids_but_not_on_their_order():
    image_ids = list(range(500))
    shuffled = np.random.default_rng(0).permutation(500).tolist()
    assert labelled_split(shuffled, 0.1, 0) == labelled_split(image_ids, 0.1, 0)
    assert labelled_split(image_ids, 0.1, 0) != labelled_split(image_ids, 0.1, 1)


@pytest.mark.parametrize(
    "number, ratio, count", [(1000, 0.01, 10), (999, 0.1, 100), (7, 1, 7), (20, 0.01, 1)]
)
def test_the_split_has_the_share_asked_for_and_at_least_one_image(number, ratio, count):
    split = labelled_split(range(number), ratio, 0)
    assert len(split) == count and split == sorted(set(split))


@pytest.mark.parametrize("ratio", [0, -1, math.nan, 5, math.inf])
def test_a_ratio_that_is_no_share_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio"):
        labelled_split(range(10), ratio, 0)


def test_split_and_seed_are_the_same_on_every_machine():
    assert split_hash([3, 1, 2]) == split_hash([1, 2, 3]) == "a36b1f2c"
    assert split_hash([1, 2]) != split_hash([1, 2, 3])
    assert labelled_split(range(10), 0.3, 0) == [3, 6, 9]
    assert seed_of(0, "labelled") == 5772112698953114449


# -------------------------------------------------------------------------------------------- views


def blob_image(side=100):
    """A bright ellipse on black, and its mask."""
    image = Image.new("L", (side, side))
    ImageDraw.Draw(image).ellipse((25, 35, 60, 55), fill=255)
    pixels = np.repeat(np.asarray(image)[..., None], 3, axis=2)
    return pixels, pixels[..., 0] > 127


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("colour", [False, True])
def test_a_strong_view_changes_neither_weak_view_nor_masks(shapes, flip, colour):
    train, _ = load_data(str(shapes))
    view = View((64, 96), scale=(0.5, 2.0), flip=flip, colour=colour)
    both, weak, unlabelled = (
        Views(train, view, strong=True),
        Views(train, view),
        Views(train, view, labels=False),
    )
    for key in itertools.product(train.image_ids[:6], range(4)):
        item, alone = both[key], weak[key]
        assert set(item) == {"image", "strong", "labels", "masks"} and set(unlabelled[key]) == {"image"}
        assert set(alone) == {"image", "labels", "masks"}
        assert all(torch.equal(item[name], value) for name, value in alone.items())
        assert torch.equal(item["image"], unlabelled[key]["image"])
        assert item["strong"].shape == item["image"].shape == (3, 64, 96)


@pytest.mark.parametrize("colour", [False, True])
def test_weak_and_strong_view_show_an_object_where_its_mask_is(make_dataset, colour):
    """Also when the crop is scaled, cut and mirrored. A blur moves the outline by two pixels at most."""
    pixels, mask = blob_image()
    dataset = make_dataset({1: pixels}, [{"image_id": 1, "category_id": 2, "segmentation": compressed(mask)}])
    views = Views(dataset, View((64, 64), scale=(1.0, 2.0), colour=colour), strong=True)
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


def test_the_view_is_a_function_of_image_and_seed(shapes):
    train, _ = load_data(str(shapes))
    views = Views(train, View((64, 64), colour=True), strong=True)
    np.random.seed(1)
    torch.manual_seed(1)
    first = views[(3, 7)]
    np.random.seed(2)
    torch.manual_seed(2)
    views[(4, 8)]
    assert all(torch.equal(value, first[name]) for name, value in views[(3, 7)].items())
    assert not torch.equal(views[(3, 8)]["image"], first["image"])


def random_geometries(count, H, W, seed=0):
    rng = np.random.default_rng(seed)
    views = [View((64, 96), scale=(0.2, 3.0)), View((96, 64), short_side=(40, 64, 130))]
    return [Geometry.draw(views[i % 2], H, W, rng) for i in range(count)]


def cut_image(geometry, image):
    """The crop of an image."""
    region, box, _ = geometry.region(image)
    return geometry.lay(region, box)


def cut_mask(geometry, segmentation, H, W):
    """The mask in the crop of a segmentation of the image (H, W)."""
    part, top, left = geometry.mask_part(segmentation, H, W)
    mask = np.zeros(geometry.crop, dtype=bool)
    mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    return mask


def test_geometries_stay_within_image_and_crop():
    for geometry in random_geometries(200, 70, 110):
        for start, window, resized, crop in zip(
            (geometry.top, geometry.left), geometry.window, geometry.resized, geometry.crop
        ):
            assert start >= 0 and start + window <= resized and window == min(resized, crop)


def test_a_polygon_and_an_rle_of_the_same_rectangle_have_the_same_mask_in_the_crop():
    H, W = 70, 110
    mask = np.zeros((H, W), dtype=np.uint8)
    mask[20:55, 30:90] = 1
    shown = 0
    for geometry in random_geometries(200, H, W):
        of_polygon = cut_mask(geometry, rectangle(20, 30, 55, 90), H, W)
        of_rle = cut_mask(geometry, compressed(mask), H, W)
        assert of_polygon.shape == of_rle.shape == geometry.crop and of_rle.dtype == of_polygon.dtype == bool
        assert agree(of_polygon, of_rle), geometry
        shown += of_rle.any()
    assert shown > 150


def test_the_mask_of_a_crop_is_the_crop_of_the_mask():
    """The picture of a mask, cut as an image, is where the mask is, and grey lies beyond the image."""
    H, W = 70, 110
    mask = rle_tools.decode(to_rle(POLYGON, H, W))
    picture = Image.fromarray(255 * np.repeat(mask[..., None], 3, axis=2))
    for geometry in random_geometries(200, H, W):
        pixels = np.asarray(cut_image(geometry, picture))
        beyond = np.ones(geometry.crop, dtype=bool)
        beyond[: geometry.window[0], : geometry.window[1]] = False
        assert (pixels[beyond] == data.GREY).all()
        for segmentation in (POLYGON, compressed(mask)):
            found = cut_mask(geometry, segmentation, H, W)
            assert not found[beyond].any()
            assert agree((pixels[..., 0] > data.GREY) & ~beyond, found), geometry


def test_the_mask_of_polygons_is_that_of_pycocotools_at_the_size_of_the_crop():
    """To the pixel, though only a part is rasterised; also of polygons that leave their image."""
    H, W, rng = 70, 110, np.random.default_rng(0)
    for geometry in random_geometries(200, H, W):
        polygons = [rng.uniform((-20, -20), (W + 20, H + 20), (5, 2)) for _ in range(rng.integers(1, 3))]
        moved = []
        for polygon in polygons:
            x = polygon[:, 0] * (geometry.resized[1] / W) - geometry.left
            y = polygon[:, 1] * (geometry.resized[0] / H) - geometry.top
            moved.append(
                np.stack([geometry.window[1] - x if geometry.flip else x, y], axis=1).flatten().tolist()
            )
        expected = rle_tools.decode(to_rle(moved, *geometry.crop)).astype(bool)
        expected[geometry.window[0] :] = expected[:, geometry.window[1] :] = False
        assert np.array_equal(cut_mask(geometry, [p.flatten().tolist() for p in polygons], H, W), expected), (
            geometry
        )


def test_an_enlarged_image_is_cut_as_if_it_were_enlarged_whole():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 110, 3)).astype(np.uint8))
    for geometry in random_geometries(100, 70, 110):
        (h, w), top, left = geometry.window, geometry.top, geometry.left
        whole = np.asarray(image.resize(geometry.resized[::-1], Image.Resampling.BILINEAR)).astype(int)
        expected = whole[top : top + h, left : left + w]
        expected = expected[:, ::-1] if geometry.flip else expected
        assert np.abs(np.asarray(cut_image(geometry, image))[:h, :w] - expected).max() <= 2, geometry


def test_mirroring_mirrors_the_window_and_nothing_else():
    plain = Geometry(resized=(60, 80), top=5, left=10, window=(50, 60), flip=False, crop=(64, 64))
    mirrored = Geometry(resized=(60, 80), top=5, left=10, window=(50, 60), flip=True, crop=(64, 64))
    pixels, mask = blob_image()
    image = Image.fromarray(pixels)
    for cut in (lambda g: np.asarray(cut_image(g, image)), lambda g: cut_mask(g, compressed(mask), 100, 100)):
        assert cut(plain).any()
        assert np.array_equal(cut(mirrored)[:50, :60], cut(plain)[:50, :60][:, ::-1])


def test_objects_outside_the_crop_are_left_out(make_dataset):
    """Four times as large as the crop, an image with objects in two corners shows one of them or none."""
    annotations = [
        {"image_id": 1, "category_id": 1, "segmentation": rectangle(2, 2, 30, 30)},
        {"image_id": 1, "category_id": 3, "segmentation": rectangle(70, 70, 98, 98)},
    ]
    views = Views(
        make_dataset({1: black(100, 100)}, annotations), View((64, 64), scale=(4.0, 4.0), flip=False)
    )
    found = []
    for seed in range(60):
        item = views[(1, seed)]
        assert len(item["labels"]) == len(item["masks"]) and item["masks"].any(2).any(1).all()
        found.append(tuple(item["labels"].tolist()))
    assert set(found) == {(), (0,), (2,)}


@pytest.mark.parametrize("crop", [(64, 65), (33, 64), (100, 100)])
def test_a_crop_that_is_no_multiple_of_32_is_refused(make_dataset, crop):
    with pytest.raises(ValueError, match="multiples of 32"):
        Views(make_dataset({1: black()}, []), View(crop))


# ------------------------------------------------------------------------------------------ streams


def first_steps(sampler, steps):
    return list(itertools.islice(sampler, steps))


@pytest.mark.parametrize("number, batch", [(10, 5), (10, 4), (7, 3), (3, 8)])
def test_an_epoch_shows_every_image_once_even_if_it_ends_within_a_batch(number, batch):
    image_ids = [100 + i for i in range(number)]
    keys = list(itertools.chain(*first_steps(StepSampler(image_ids, batch, seed=0), 6 * number)))
    assert len(keys) == 6 * number * batch
    epochs = [[image_id for image_id, _ in keys[i : i + number]] for i in range(0, 5 * number, number)]
    assert all(sorted(epoch) == image_ids for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert len({seed for _, seed in keys}) == len(keys)


@pytest.mark.parametrize("repeats", [None, [1.0, 2.5, 1.3, 4.0, 1.0]])
@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_see_what_one_sees(repeats, processes):
    image_ids, batch = [5, 6, 7, 8, 9], 8
    alone = first_steps(StepSampler(image_ids, batch, seed=3, repeats=repeats), 20)
    parts = [
        first_steps(StepSampler(image_ids, batch // processes, 3, rank, processes, repeats=repeats), 20)
        for rank in range(processes)
    ]
    assert [list(itertools.chain(*step)) for step in zip(*parts)] == alone


@pytest.mark.parametrize("first_step", [0, 1, 7, 33])
def test_a_stream_goes_on_where_it_was_cut(first_step):
    arguments = dict(image_ids=range(11), batch=4, seed=1, repeats=np.linspace(1, 3, 11))
    whole = first_steps(StepSampler(**arguments), 50)
    assert first_steps(StepSampler(**arguments, first_step=first_step), 50 - first_step) == whole[first_step:]


def test_streams_of_other_seeds_are_others():
    assert first_steps(StepSampler(range(9), 3, seed=0), 3) != first_steps(
        StepSampler(range(9), 3, seed=1), 3
    )


def test_images_are_repeated_as_often_as_asked_on_average():
    """Each epoch rounds every image's repeats up or down, and all epochs have the same length."""
    repeats = np.array([1.0, 1.5, 2.25, 1.0, 3.7, 1.05])
    sampler = StepSampler(range(6), 4, seed=0, repeats=repeats)
    assert sampler.epoch_length == round(repeats.sum())
    wanted = repeats * sampler.epoch_length / repeats.sum()
    counts = np.array([np.bincount(sampler.epoch(epoch), minlength=6) for epoch in range(2000)])
    assert (counts.sum(1) == sampler.epoch_length).all()
    assert (np.abs(counts - wanted) < 1).all()
    np.testing.assert_allclose(counts.mean(0), wanted, atol=0.06)


def test_nothing_to_sample_from_is_an_error():
    with pytest.raises(ValueError, match="no image"):
        StepSampler([], 4, seed=0)


def test_fewer_images_than_processes_are_shown_to_all():
    parts = [first_steps(StepSampler([7], 1, 0, rank, 3), 4) for rank in range(3)]
    assert [image_id for part in parts for ((image_id, _),) in part] == [7] * 12
    assert len({seed for part in parts for ((_, seed),) in part}) == 12


def test_repeat_factors_equal_the_formula_of_lvis(make_dataset):
    """r(image) = max over its classes c of max(1, sqrt(t / f(c))), f the share of images with the class."""
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


def test_the_number_of_workers_changes_nothing(shapes):
    train, _ = load_data(str(shapes))
    views = Views(train, View((64, 64)), strong=True)
    alone, with_workers = (
        list(itertools.islice(stream(views, train.image_ids, 3, seed=0, workers=workers, first_step=2), 5))
        for workers in (0, 2)
    )
    expected = first_steps(StepSampler(train.image_ids, 3, 0, first_step=2), 5)
    for keys, batch, other in zip(expected, alone, with_workers, strict=True):
        for key, a, b in zip(keys, batch, other, strict=True):
            item = views[key]
            assert a.pop("file") == b.pop("file") == str(train.path(key[0]))
            assert a.keys() == b.keys() == item.keys()
            assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], item[name]) for name in item)


# ------------------------------------------------------------------------------------------- shapes


def test_the_shapes_are_the_same_byte_for_byte(shapes, tmp_path):
    write_shapes(tmp_path / "again", num_train=12, num_val=6, size=64)
    files = sorted(path.relative_to(shapes) for path in shapes.rglob("*") if path.is_file())
    assert len(files) == 12 + 6 + 2
    assert files == sorted(
        p.relative_to(tmp_path / "again") for p in tmp_path.rglob("again/**/*") if p.is_file()
    )
    for file in files:
        assert (shapes / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_two_processes_may_write_the_shapes_at_once(tmp_path, monkeypatch):
    """The slower one keeps what the faster one wrote."""
    rename = Path.rename

    def after_another(self, target):
        shutil.copytree(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", after_another)
    write_shapes(tmp_path / "shapes", num_train=1, num_val=1, size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    assert (tmp_path / "shapes/images/train_00000.png").exists()


def test_another_seed_draws_other_shapes(tmp_path):
    for seed in (0, 1):
        write_shapes(tmp_path / str(seed), num_train=1, num_val=1, size=64, seed=seed)
    first, second = (np.asarray(Image.open(tmp_path / f"{s}/images/train_00000.png")) for s in (0, 1))
    assert first.shape == second.shape == (64, 64, 3) and (first != second).any()


def test_shapes_of_every_class_are_there_and_their_masks_do_not_overlap(shapes):
    train, val = load_data(str(shapes))
    labels = set()
    for dataset in (train, val):
        assert dataset.class_names == list(SHAPES)
        for image_id in dataset.image_ids:
            objects = dataset.objects(image_id)
            masks = [rle_tools.decode(to_rle(o["segmentation"], *dataset.size(image_id))) for o in objects]
            assert np.asarray(dataset.image(image_id)).shape[:2] == dataset.size(image_id) == (64, 64)
            assert sum(masks, np.zeros((64, 64), dtype=np.uint8)).max() <= 1
            assert [mask.sum() for mask in masks] == [o["area"] for o in objects]
            labels |= set(dataset.labels(image_id))
    assert labels == set(range(len(SHAPES)))


def test_train_and_val_share_no_image(shapes):
    contents = [path.read_bytes() for path in (shapes / "images").iterdir()]
    assert len(set(contents)) == len(contents) == 18


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
def test_at_test_time_the_shorter_side_counts_unless_the_longer_gets_too_long(size, sides, expected):
    assert data.test_size(*size, *sides) == expected


def test_an_rle_with_characters_of_other_alphabets_is_damaged():
    """pycocotools would read the bytes of their encoding, of which there are more than characters."""
    assert data.rle_runs(":7?").sum() == 32
    for counts in (":7\u20ac", ":7\u00ff", "\u0130"):
        with pytest.raises(data.DataError, match="damaged"):
            data.rle_runs(counts)
