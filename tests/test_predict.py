"""Pictures and result files of any images, and pseudo-labels to be corrected."""

import dataclasses
import json
import shlex

import numpy as np
import pytest
import torch
from commands import run
from conftest import TINY
from PIL import Image
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import checkpoints
import distill
from data import CocoDataset, read_image
from evaluate import find, load_model
from flags import parse_config
from tools.predict import training_command

IDS, NAMES = [3, 8, 21], ["cat", "dog", "cow"]


@pytest.fixture
def checkpoint(make_model, tmp_path):
    """The path of one with random weights, whose teacher is another model."""
    entries = dict.fromkeys(checkpoints.ENTRIES, 0)
    config = {"test_short_side": 64, "test_long_side": 96, "score_threshold": 0.26, "min_area": 5}
    entries |= {"format": checkpoints.FORMAT, "model_args": TINY, "class_names": NAMES, "category_ids": IDS}
    models = {"student": make_model(0).state_dict(), "teacher": make_model(1).state_dict()}
    path = tmp_path / "distill.pt"
    checkpoints.save_checkpoint(path, {**entries, **models, "phase": "distill", "config": config})
    return path


@pytest.fixture
def photos(tmp_path):
    """A folder with images of several sizes, one below, and one that is damaged."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for name, size in (("a.png", (40, 60)), ("b.jpg", (90, 50)), ("below/a.png", (64, 64))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "c.png").write_bytes(b"no image")
    return folder


def test_pictures_and_a_file_that_pycocotools_reads(checkpoint, photos, tmp_path):
    out = tmp_path / "found"
    flags = [checkpoint, "--images", photos, "--out", out, "--threshold", "0.01", "--device", "cpu"]
    done = run("evaluate.py", *flags)
    assert "c.png' cannot be read" in done.stdout and "in 3 images" in done.stdout
    truth = COCO(str(out / "images.json"))
    files = {entry["id"]: entry["file_name"] for entry in truth.dataset["images"]}
    assert [name[len(str(photos)) + 1 :] for name in files.values()] == ["a.png", "b.jpg", "below/a.png"]
    pictures = sorted(path.name for path in out.glob("*.jpg"))
    assert pictures == ["000001-a.jpg", "000002-b.jpg", "000003-a.jpg"]
    found = truth.loadRes(str(out / "results.json"))
    evaluation = COCOeval(truth, found, "segm")
    evaluation.evaluate()
    model = load_model(checkpoints.load_checkpoint(checkpoint), "student", "cpu")
    for number, file in files.items():
        image = read_image(file)
        expected = find(model, image, torch.device("cpu"), short_side=64, long_side=96)
        triples = zip(*(expected[name] for name in ("labels", "masks", "scores")))
        kept = [(IDS[label], mask) for label, mask, score in triples if score > 0.01]
        results = found.imgToAnns[number]
        kept = [(category, mask.numpy()) for category, mask in kept if mask.any()]
        assert kept and len(results) == len(kept)
        for result, (category, mask) in zip(results, kept):
            assert result["category_id"] == category
            assert np.array_equal(rle_tools.decode(result["segmentation"]) > 0, mask)
        assert Image.open(out / f"{number:06}-{file.split('/')[-1].split('.')[0]}.jpg").size == image.size


def test_a_high_threshold_finds_nothing_and_says_so(checkpoint, photos, tmp_path):
    out = tmp_path / "found"
    flags = [checkpoint, "--images", photos / "a.png", photos / "b.jpg", "--out", out, "--threshold", "2"]
    assert "0 objects in 2 images" in run("evaluate.py", *flags).stdout
    assert json.loads((out / "results.json").read_text()) == []


def test_pseudo_labels_are_most_doubtful_first_and_can_be_trained_on(checkpoint, photos, tmp_path):
    out = tmp_path / "labels"
    done = run("evaluate.py", checkpoint, "--images", photos, "--pseudo", out, "--device", "cpu")
    content = json.loads((out / "instances_train.json").read_text())
    doubts = [entry["doubt"] for entry in content["images"]]
    assert doubts == sorted(doubts, reverse=True) and len(doubts) == 3
    assert [category["id"] for category in content["categories"]] == IDS
    assert content["annotations"] and all(a["score"] > 0.26 for a in content["annotations"])
    for entry in content["images"]:
        scores = [a["score"] for a in content["annotations"] if a["image_id"] == entry["id"]]
        if scores:
            assert entry["doubt"] == pytest.approx(1 - min(scores), abs=1e-3) and scores == sorted(scores)
    dataset = CocoDataset(out / "instances_train.json", photos)
    assert dataset.class_names == NAMES and len(dataset) == 3
    assert f"--data {out} --image-folder {photos} --ratio 1" in done.stdout


def test_the_command_that_trains_on_corrected_labels_has_the_settings_of_the_run(tmp_path):
    flags = "--data a --preset shapes --crop 64,128 --steps 5,6,7 --pretrained true --blur 0.5,2 --ratio 0.1"
    flags = [*flags.split(), "--backbone-args", '{"depth": 3}', "--out", "b", "--init", "c.pt"]
    before = dataclasses.asdict(parse_config(distill.Config, distill.PRESETS, flags))
    words = shlex.split(training_command(before, tmp_path / "new labels", tmp_path))
    assert words[:2] == ["python", "distill.py"]
    now = dataclasses.asdict(parse_config(distill.Config, distill.PRESETS, words[2:]))
    different = {name for name in now if now[name] != before[name]}
    assert different == {"data", "image_folder", "ratio", "out", "init"}
    assert now["data"] == str(tmp_path / "new labels") and now["ratio"] == 1


def test_pseudo_labels_of_an_image_that_is_a_link_are_those_of_its_file(checkpoint, photos, tmp_path):
    file = sorted(path for path in photos.rglob("*") if path.is_file())[0]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link.png").symlink_to(file)
    flags = ["--images", tmp_path / "elsewhere/link.png", file, "--pseudo", tmp_path / "out"]
    run("evaluate.py", checkpoint, *flags)
    content = json.loads((tmp_path / "out/instances_train.json").read_text())
    assert [entry["file_name"] for entry in content["images"]] == [file.name]


def test_which_model_predicts_is_a_choice(checkpoint, photos, tmp_path):
    for which in ("student", "teacher"):
        flags = ["--images", photos, "--out", tmp_path / which, "--which", which, "--threshold", "0.01"]
        run("evaluate.py", checkpoint, *flags)
    results = [(tmp_path / which / "results.json").read_text() for which in ("student", "teacher")]
    assert results[0] != results[1]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--images", "nowhere"], "no file or folder --images 'nowhere'"),
        (["--pseudo", "out"], "--pseudo needs the images"),
        (["--images", "empty"], "no image below --images 'empty'"),
        (["--images", "bad.png"], "none of the images can be read"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(checkpoint, tmp_path, flags, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no image")
    error = run("evaluate.py", checkpoint, *flags, cwd=tmp_path, code=2).stderr
    assert words in error and error.count("\n") == 1
