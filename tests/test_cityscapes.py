"""Tests of layouts/cityscapes.py on a small generated dataset: conversion, training, and AP by Cityscapes'
rules."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import run
from PIL import Image, ImageDraw
from pycocotools import mask as rle_tools

import evaluate
from data import CocoDataset, DataError, encode_rle, split_from_file
from layouts import load_data
from layouts.cityscapes import CLASSES, cityscapes_ap, convert, is_cityscapes, label_file

H, W = 64, 128


def draw_ids(rng):
    """Draw ids (H, W): road, void, objects of several classes, a group, and a caravan, which is not
    evaluated."""
    canvas = Image.new("I", (W, H), 7)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, W, 8), fill=0)
    for number in range(rng.integers(4, 8)):
        label = int(rng.choice([24, 26, 26, 33]))
        x, y = int(rng.integers(0, W - 30)), int(rng.integers(8, H - 20))
        draw.ellipse(
            (x, y, x + int(rng.integers(6, 30)), y + int(rng.integers(6, 20))), fill=label * 1000 + number
        )
    x = int(rng.integers(0, W - 30))
    draw.rectangle((x, 40, x + 20, 55), fill=int(rng.choice([24, 26])))  # a group
    draw.rectangle((100, 10, 110, 20), fill=29_000)  # a caravan
    return np.asarray(canvas).astype(np.uint16)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cityscapes")
    rng = np.random.default_rng(0)
    for split, city, count in (("train", "ulm", 3), ("train", "bonn", 3), ("val", "lindau", 4)):
        for kind in ("leftImg8bit", "gtFine"):
            (root / kind / split / city).mkdir(parents=True)
        for number in range(count):
            name = f"{city}_{number:06d}_000019"
            ids = draw_ids(rng)
            Image.fromarray(ids).save(root / f"gtFine/{split}/{city}/{name}_gtFine_instanceIds.png")
            pixels = np.stack([ids % 256, ids // 256, 7 * ids % 256], axis=2).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png")
    return root


def ids_of(root, dataset, image_id):
    return np.asarray(Image.open(label_file(root, dataset.path(image_id)))).astype(int)


def test_conversion_keeps_every_object_with_its_class_and_mask(root):
    train, val = load_data("cityscapes", root)
    assert (len(train), len(val)) == (6, 4) and train.class_names == list(CLASSES.values())
    for dataset in (train, val):
        for image_id in dataset.image_ids:
            ids = ids_of(root, dataset, image_id)
            assert dataset.size(image_id) == ids.shape == (H, W)
            values = [v for v in np.unique(ids).tolist() if (v // 1000 if v >= 1000 else v) in CLASSES]
            annotations = dataset.annotations(image_id)
            assert len(annotations) == len(values) > 2
            for value, annotation in zip(values, annotations):
                assert annotation["category_id"] == (value // 1000 if value >= 1000 else value)
                assert annotation["iscrowd"] == (value < 1000)
                mask = rle_tools.decode(encode_rle(annotation["segmentation"], H, W))
                assert np.array_equal(mask, ids == value) and annotation["area"] == mask.sum()


def test_existing_annotation_files_are_not_written_again(root):
    before = [path.stat().st_mtime_ns for path in convert(root)]
    assert [path.stat().st_mtime_ns for path in convert(root)] == before
    assert not list(root.glob("*.tmp"))


def test_the_published_lists_of_labeled_images_can_be_read(root, tmp_path):
    train, _ = load_data("cityscapes", root)
    lines = ["ulm_000002_000019_gtFine_instanceIds.png", "bonn_000000_000019_gtFine_instanceIds.png"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    names = [train.file_name(image_id) for image_id in split_from_file(tmp_path / "list.txt", train)]
    assert names == [
        "train/bonn/bonn_000000_000019_leftImg8bit.png",
        "train/ulm/ulm_000002_000019_leftImg8bit.png",
    ]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="leftImg8bit/train"):
        convert(tmp_path)
    (tmp_path / "leftImg8bit/train/ulm").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "leftImg8bit/train/ulm/ulm_0_0_leftImg8bit.png")
    with pytest.raises(
        ValueError, match="1 label files are missing, such as .*ulm_0_0_gtFine_instanceIds.png"
    ):
        convert(tmp_path)


# --------------------------------------------------------------------------------------------------------- AP


def truth_as_detections(dataset, rng=None):
    """Turn the ground truth into detections. With rng they are shifted, doubled, missing, or of other
    classes."""
    detections = []
    for image_id in dataset.image_ids:
        for annotation in dataset.objects(image_id):
            mask = rle_tools.decode(encode_rle(annotation["segmentation"], H, W))
            category, score = annotation["category_id"], 1.0
            for _ in range(1 if rng is None else rng.integers(0, 3)):
                if rng is not None:
                    mask = np.roll(mask, rng.integers(-2, 3, 2), (0, 1))
                    category = int(rng.choice([category, category, category, 26]))
                    score = float(rng.choice([0.3, 0.5, rng.random()]))  # ties too
                rle = rle_tools.encode(np.asfortranarray(mask))
                entry = {"image_id": image_id, "category_id": category, "segmentation": rle, "score": score}
                detections.append(entry)
        if rng is not None:  # on a group, on void, and of a class without objects
            for box, category in (((0, 0, 40, 8), 24), ((40, 5, 60, 50), 26), ((3, 3, 9, 9), 28)):
                mask = np.zeros((H, W), dtype=np.uint8)
                mask[box[1] : box[3], box[0] : box[2]] = 1
                rle = rle_tools.encode(np.asfortranarray(mask))
                detections.append(
                    {"image_id": image_id, "category_id": category, "segmentation": rle, "score": 0.4}
                )
    return detections


def files_of(root, dataset):
    return {image_id: label_file(root, dataset.path(image_id)) for image_id in dataset.image_ids}


def test_perfect_predictions_score_100_by_both_rules(root):
    _, val = load_data("cityscapes", root)
    detections = truth_as_detections(val)
    ap = cityscapes_ap(files_of(root, val), detections)
    assert ap["AP"] == ap["AP50"] == 100.0
    assert ap["per_class"]["car"] == 100.0 and ap["per_class"]["bus"] == -1.0
    assert evaluate.mask_ap(val, detections)["AP"] == 100.0


def test_no_prediction_scores_0(root):
    _, val = load_data("cityscapes", root)
    assert cityscapes_ap(files_of(root, val), [])["AP"] == 0.0


COMMAND = """
import numpy, sys
# Without this the published package fails with NumPy 2.4.
count = numpy.count_nonzero
numpy.in1d, numpy.count_nonzero = numpy.isin, lambda *args: int(count(*args))
from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as evaluation
evaluation.args.gtInstancesFile = sys.argv.pop()
evaluation.main()
"""


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ap_equals_that_of_the_command_of_cityscapesscripts(root, tmp_path, seed):
    """Both evaluate the same predictions. The command reads them from PNG files."""
    _, val = load_data("cityscapes", root)
    detections = truth_as_detections(val, np.random.default_rng(seed))
    found = cityscapes_ap(files_of(root, val), detections)

    results = tmp_path / "results"
    results.mkdir()
    lines = {image_id: [] for image_id in val.image_ids}
    for number, detection in enumerate(detections):
        mask = 255 * rle_tools.decode(detection["segmentation"])
        Image.fromarray(mask).save(results / f"{number}.png")
        lines[detection["image_id"]].append(
            f"{number}.png {detection['category_id']} {detection['score']!r}\n"
        )
    for image_id, text in lines.items():
        stem = Path(val.file_name(image_id)).name.removesuffix("_leftImg8bit.png")
        (results / f"{stem}_pred.txt").write_text("".join(text))
    environment = {**os.environ, "CITYSCAPES_DATASET": str(root), "CITYSCAPES_RESULTS": str(results)}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(tmp_path / "gt.json")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    averages = json.loads((root / "evaluationResults/resultInstanceLevelSemanticLabeling.json").read_text())[
        "averages"
    ]
    assert 5 < found["AP"] < 95 and len(detections) > 20
    assert found["AP"] == pytest.approx(100 * averages["allAp"], abs=1e-3)
    assert found["AP50"] == pytest.approx(100 * averages["allAp50%"], abs=1e-3)
    for name, value in found["per_class"].items():
        expected = averages["classes"][name]["ap"]
        assert value == -1.0 if np.isnan(expected) else value == pytest.approx(100 * expected, abs=1e-3)


def test_training_and_evaluation_show_both_aps(root, tmp_path):
    flags = "--data cityscapes --preset cityscapes --ratio 0.5 --steps 1 --batch 2 --workers 0 --device cpu"
    flags += " --crop 32,64 --short-sides 32,64 --test-size 64,128 --num-points 32 --backbone resnet10t"
    flags += " --norm group --pretrained false --num-queries 5 --hidden-dim 32 --encoder-layers 1"
    flags += " --encoder-ffn 32 --decoder-layers 1 --decoder-ffn 32"
    printed = run("burnin.py", *flags.split(), "--root", root, "--out", tmp_path).stdout
    assert "6 training images, 3 of them labeled" in printed and "burnin done" in printed
    assert "Cityscapes AP50" in printed
    flags = ["--root", root, "--device", "cpu", "--json", tmp_path / "ap.json"]
    assert "Cityscapes AP50" in run("evaluate.py", tmp_path / "burnin.pt", *flags).stdout
    assert "Cityscapes AP50" in json.loads((tmp_path / "ap.json").read_text())["student"]


def test_a_damaged_label_file_is_named(root, tmp_path):
    _, val = load_data("cityscapes", root)
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(DataError, match="label file .*a.png"):
        cityscapes_ap({val.image_ids[0]: tmp_path / "a.png"}, [])


def test_a_data_set_with_other_classes_in_its_folders_is_not_cityscapes(root):
    _, val = load_data("cityscapes", root)
    assert is_cityscapes(val)
    val.category_ids = [1, 2, 3]
    assert not is_cityscapes(val) and not is_cityscapes(None)


def test_the_missing_package_is_an_error_that_says_what_to_install(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "cityscapesscripts.evaluation", None)
    _, val = load_data("cityscapes", root)
    assert isinstance(val, CocoDataset)
    with pytest.raises(ValueError, match="pip install cityscapesscripts"):
        cityscapes_ap(files_of(root, val), [])
