"""Tests of tools/predict.py: pictures and result files of any images, and pseudo-labels to correct."""

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

from data import CocoDataset, read_image
from evaluate import predict_image
from layouts import load_data
from tools.predict import training_command
from training.checkpoint import REQUIRED_KEYS, load_checkpoint, load_model, save_checkpoint
from training.cli import parse_config

IDS, NAMES = [3, 8, 21], ["cat", "dog", "cow"]


@pytest.fixture
def checkpoint(make_model, tmp_path):
    """Return the path of a checkpoint with random weights, whose teacher is another model."""
    content = dict.fromkeys(REQUIRED_KEYS, 0) | {"phase": "distill"}
    del content["format"]
    content["config"] = {"test_size": (64, 96), "score_threshold": 0.26, "min_area": 5}
    content |= {"model_args": TINY, "class_names": NAMES, "category_ids": IDS}
    content |= {"model": make_model(0).state_dict(), "teacher": make_model(1).state_dict()}
    path = tmp_path / "distill.pt"
    save_checkpoint(path, content)
    return path


@pytest.fixture
def photos(tmp_path):
    """Write a folder with images of several sizes, one of them in a subfolder, and a damaged one."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for name, size in (("a.png", (40, 60)), ("b.jpg", (90, 50)), ("below/a.png", (64, 64))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "c.png").write_bytes(b"no image")
    return folder


def test_pictures_and_a_file_that_pycocotools_reads(checkpoint, photos, tmp_path):
    out = tmp_path / "predictions"
    flags = [checkpoint, photos, "--out", out, "--threshold", "0.01", "--device", "cpu"]
    done = run("tools.predict", *flags)
    assert "cannot read image" in done.stdout and "c.png" in done.stdout and "in 3 images" in done.stdout
    truth = COCO(str(out / "images.json"))
    files = {entry["id"]: entry["file_name"] for entry in truth.dataset["images"]}
    assert [name[len(str(photos)) + 1 :] for name in files.values()] == ["a.png", "b.jpg", "below/a.png"]
    pictures = sorted(path.name for path in out.glob("*.jpg"))
    assert pictures == ["000001-a.jpg", "000002-b.jpg", "000003-a.jpg"]
    found = truth.loadRes(str(out / "results.json"))
    evaluation = COCOeval(truth, found, "segm")
    evaluation.evaluate()
    model = load_model(load_checkpoint(checkpoint), "cpu")
    for number, file in files.items():
        image = read_image(file)
        expected = predict_image(model, image, test_size=(64, 96))
        triples = zip(*(expected[name] for name in ("labels", "masks", "scores")))
        kept = [(IDS[label], mask) for label, mask, score in triples if score > 0.01]
        results = found.imgToAnns[number]
        kept = [(category, mask.numpy()) for category, mask in kept if mask.any()]
        assert kept and len(results) == len(kept)
        for result, (category, mask) in zip(results, kept):
            assert result["category_id"] == category
            assert np.array_equal(rle_tools.decode(result["segmentation"]) > 0, mask)
        assert Image.open(out / f"{number:06}-{file.split('/')[-1].split('.')[0]}.jpg").size == image.size


def test_a_high_threshold_leaves_no_objects(checkpoint, photos, tmp_path):
    out = tmp_path / "predictions"
    flags = [checkpoint, photos / "a.png", photos / "b.jpg", "--out", out, "--threshold", "2"]
    assert "0 objects in 2 images" in run("tools.predict", *flags).stdout
    assert json.loads((out / "results.json").read_text()) == []


def test_the_most_doubtful_pseudo_labels_come_first_and_all_are_a_data_set(checkpoint, photos, tmp_path):
    out = tmp_path / "labels"
    done = run("tools.predict", checkpoint, photos, "--pseudo-labels", out, "--device", "cpu")
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


def test_the_command_that_trains_on_corrected_labels_has_the_options_of_the_run(tmp_path):
    flags = "--data a --preset shapes --crop 64,128 --steps 5,6,7 --pretrained true --blur 0.5,2 --ratio 0.1"
    flags += " --scale-to-batch --batch 16 --ema-decay 0.998 --finetune-steps 4 --mask-nms-iou 0.8"
    flags = [*flags.split(), "--backbone-args", '{"depth": 3}', "--out", "b", "--init-from", "c.pt"]
    before = dataclasses.asdict(parse_config(flags))
    words = shlex.split(training_command(before, tmp_path / "new labels", tmp_path))
    assert words[:2] == ["python", "distill.py"]
    now = dataclasses.asdict(parse_config(words[2:]))
    different = {name for name in now if now[name] != before[name]}
    assert different == {"data", "image_folder", "ratio", "out", "init_from", "scale_to_batch"}
    assert now["data"] == str(tmp_path / "new labels") and now["ratio"] == 1


def test_a_link_to_an_image_is_the_image(checkpoint, photos, tmp_path):
    file = sorted(path for path in photos.rglob("*") if path.is_file())[0]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link.png").symlink_to(file)
    run(
        "tools.predict",
        checkpoint,
        tmp_path / "elsewhere/link.png",
        file,
        "--pseudo-labels",
        tmp_path / "out",
    )
    content = json.loads((tmp_path / "out/instances_train.json").read_text())
    assert [entry["file_name"] for entry in content["images"]] == [file.name]


def test_the_student_or_the_teacher_predicts(checkpoint, photos, tmp_path):
    for which in ("student", "teacher"):
        flags = ["--out", tmp_path / which, "--which", which, "--threshold", "0.01"]
        run("tools.predict", checkpoint, photos, *flags)
    results = [(tmp_path / which / "results.json").read_text() for which in ("student", "teacher")]
    assert results[0] != results[1]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["nowhere"], "no file or folder 'nowhere'"),
        (["--pseudo-labels", "out"], "the following arguments are required: DIR|FILE"),
        (["empty"], "no image below 'empty'"),
        (["bad.png"], "none of the 1 images can be read"),
        (["bad.png", "--val-json", "a.json"], "pass --data"),
    ],
)
def test_a_mistake_of_the_user_is_one_line(checkpoint, tmp_path, flags, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no image")
    error = run("tools.predict", checkpoint, *flags, cwd=tmp_path, code=2).stderr
    assert words in error and error.count("\n") == 1


def test_a_model_without_a_teacher_cannot_predict_as_teacher(make_model, photos, tmp_path):
    content = {"format": 2, "model": make_model().state_dict(), "teacher": None, "model_args": TINY}
    torch.save(content, tmp_path / "a.pt")
    error = run("tools.predict", tmp_path / "a.pt", photos, "--which", "teacher", code=2).stderr
    assert "has only one model; use --which student" in error and error.count("\n") == 1
    run("tools.predict", tmp_path / "a.pt", photos / "a.png", "--pseudo-labels", tmp_path / "out")


def test_classes_come_from_a_data_set(make_model, shapes, photos, tmp_path):
    """A checkpoint of other code has numbers instead of names."""
    for num_classes, code in ((4, 0), (3, 2)):
        model = make_model(num_classes=num_classes)
        content = {"format": 2, "model": model.state_dict(), "teacher": None}
        torch.save(content | {"model_args": {**TINY, "num_classes": num_classes}}, tmp_path / "a.pt")
        flags = ["--out", tmp_path / "out", "--test-size", "0,0"]
        run("tools.predict", tmp_path / "a.pt", photos / "a.png", *flags)
        categories = json.loads((tmp_path / "out/images.json").read_text())["categories"]
        assert categories == [{"id": k + 1, "name": f"class {k}"} for k in range(num_classes)]
        done = run("tools.predict", tmp_path / "a.pt", photos / "a.png", *flags, "--data", shapes, code=code)
        if code:
            assert done.stderr == "error: the checkpoint has 3 classes, the data has 4\n"
        else:
            names = [c["name"] for c in json.loads((tmp_path / "out/images.json").read_text())["categories"]]
            assert names == load_data(str(shapes))[0].class_names
