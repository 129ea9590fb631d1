"""Tests of tools/predict.py: pictures and result files of any images, and pseudo-labels to correct."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from commands import run
from conftest import TINY
from PIL import Image
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import CocoDataset, labeled_split, read_image, split_hash
from evaluate import predict_image
from layouts import load_data
from tools.predict import find_pseudo_labels
from training.checkpoint import REQUIRED_KEYS, load_checkpoint, load_model, save_checkpoint
from training.cli import parse_config
from training.distributed import Env

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
        triples = zip(*(expected[name] for name in ("labels", "rles", "scores")))
        kept = [(IDS[label], rle) for label, rle, score in triples if score > 0.01]
        results = found.imgToAnns[number]
        kept = [(category, rle) for category, rle in kept if rle_tools.area(rle)]
        assert kept and len(results) == len(kept)
        for result, (category, rle) in zip(results, kept):
            assert result["category_id"] == category
            assert np.array_equal(rle_tools.decode(result["segmentation"]), rle_tools.decode(rle))
        assert Image.open(out / f"{number:06}-{file.split('/')[-1].split('.')[0]}.jpg").size == image.size


def test_a_high_threshold_leaves_no_objects(checkpoint, photos, tmp_path):
    out = tmp_path / "predictions"
    flags = [checkpoint, photos / "a.png", photos / "b.jpg", "--out", out, "--threshold", "0.99"]
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
    dataset = CocoDataset(out / "instances_train.json", out / "images")
    assert dataset.class_names == NAMES and len(dataset) == 3
    assert all(dataset.image(image_id).size[::-1] == dataset.size(image_id) for image_id in dataset.image_ids)
    # The configuration of this checkpoint names no data, so there are no labels to merge with.
    command = f"python distill.py --data {out} --unannotated background"
    assert done.stdout.splitlines()[-2].endswith(command)
    assert done.stdout.splitlines()[-1].endswith(f"{command} --teacher-checkpoint {checkpoint}")
    assert not (out / "instances_val.json").exists()


def test_pseudo_labels_follow_the_threshold_that_was_asked_for(checkpoint, photos, tmp_path):
    def scores(name, *flags):
        done = run("tools.predict", checkpoint, photos, "--pseudo-labels", tmp_path / name, *flags)
        content = json.loads((tmp_path / name / "instances_train.json").read_text())
        return sorted(a["score"] for a in content["annotations"]), content, done

    everything, *_ = scores("all", "--threshold", "0")
    default, *_ = scores("default")
    assert default == [score for score in everything if score > 0.26]  # --score-threshold of the run
    middle = default[len(default) // 2]
    assert scores("middle", "--threshold", middle)[0] == [score for score in default if score > middle]
    nothing, content, done = scores("nothing", "--threshold", "0.95")
    assert nothing == []
    highest = content["images"][0]["doubt"]
    assert everything[-1] <= highest + 1e-3 < 0.95
    assert f"the highest score is {highest:.2f}; pass a --threshold below it" in done.stdout


def test_a_minimum_area_may_be_a_share_of_the_image(checkpoint, photos):
    model, image = load_model(load_checkpoint(checkpoint), "cpu"), read_image(photos / "a.png")
    settings = {"env": Env(torch.device("cpu")), "test_size": (64, 96), "score_threshold": 0.0}

    def shares(min_area):
        rles = find_pseudo_labels(model, image, min_area=min_area, **settings)["rles"]
        return [rle_tools.area(rle) / (image.width * image.height) for rle in rles]

    largest = max(shares(0))
    assert 0.01 < largest < 0.3
    assert shares(largest / 3) and not shares(3 * largest)


@pytest.fixture
def trained(make_model, shapes, tmp_path):
    """Return the path of a checkpoint of a run on four of the twelve training images of shapes, and its
    training and validation set and labeled images."""
    flags = ["--data", str(shapes), "--preset", "shapes", "--ratio", "0.34", "--score-threshold", "0.2"]
    train, val = load_data(str(shapes))
    labeled = labeled_split(train.image_ids, 0.34, seed=0)
    content = dict.fromkeys(REQUIRED_KEYS, 0) | {"phase": "distill", "teacher": None}
    del content["format"]
    content |= {"config": dataclasses.asdict(parse_config(flags)), "split": split_hash(labeled)}
    content |= {"class_names": train.class_names, "category_ids": train.category_ids}
    content |= {"model_args": TINY | {"num_classes": 4}, "model": make_model(num_classes=4).state_dict()}
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run/distill.pt", content)
    return tmp_path / "run/distill.pt", train, val, labeled


def test_pseudo_labels_are_merged_with_the_labels_of_the_run(trained, photos, tmp_path):
    checkpoint, train, val, labeled = trained
    (checkpoint.parent / "settings.json").touch()  # as a run has it
    assert len(labeled) == 4
    (checkpoint.parent / "teacher.pt").touch()
    out = tmp_path / "merged"
    done = run("tools.predict", checkpoint, photos, "--pseudo-labels", out)
    content = json.loads((out / "instances_train.json").read_text())
    folders = [entry["file_name"].split("/")[0] for entry in content["images"]]
    assert folders == ["new"] * 3 + ["train"] * 4
    for part in ("images", "annotations"):
        assert len({entry["id"] for entry in content[part]}) == len(content[part])

    merged = CocoDataset(out / "instances_train.json", out / "images")
    assert merged.category_ids == train.category_ids and merged.class_names == train.class_names
    by_name = {merged.file_name(image_id): image_id for image_id in merged.image_ids}
    num_labels = 0
    for image_id in labeled:
        copy = by_name[f"train/{train.file_name(image_id)}"]
        assert merged.image(copy).tobytes() == train.image(image_id).tobytes()
        pairs = list(zip(merged.annotations(copy), train.annotations(image_id), strict=True))
        for ours, theirs in pairs:
            assert all(ours[key] == theirs[key] for key in ("category_id", "segmentation", "area", "iscrowd"))
        num_labels += len(pairs)
    new = [a for a in content["annotations"] if "score" in a]
    assert len(content["annotations"]) == len(new) + num_labels and new

    validation = CocoDataset(out / "instances_val.json", out / "images")
    assert [validation.image(i).tobytes() for i in validation.image_ids] == [
        val.image(i).tobytes() for i in val.image_ids
    ]
    assert [validation.labels(i) for i in validation.image_ids] == [val.labels(i) for i in val.image_ids]

    counts, first, second = done.stdout.splitlines()[-3:]
    expected = f"{len(new)} pseudo-labels of 3 new images, {num_labels} labels of 4 labeled images"
    assert counts == f"{expected} -> {out / 'instances_train.json'}"
    command = f"python distill.py --data {out} --unannotated background --settings-from {checkpoint}"
    assert first.endswith(command)
    assert second.endswith(f"{command} --teacher-checkpoint {checkpoint}")


def test_images_with_labels_get_no_pseudo_labels(trained, tmp_path):
    """Neither twice in the training set nor from the validation set."""
    checkpoint, train, val, labeled = trained
    done = run("tools.predict", checkpoint, train.image_folder, "--pseudo-labels", tmp_path / "merged")
    assert f"skipping {len(labeled) + len(val)} images" in done.stdout
    content = json.loads((tmp_path / "merged/instances_train.json").read_text())
    names = [entry["file_name"] for entry in content["images"] if entry["file_name"].startswith("new/")]
    unlabeled = set(train.image_ids) - set(labeled)
    assert sorted(names) == sorted(f"new/{train.file_name(image_id)}" for image_id in unlabeled)
    file = train.path(labeled[0])
    error = run("tools.predict", checkpoint, file, "--pseudo-labels", tmp_path / "b", code=2).stderr
    assert "no image is left" in error and error.count("\n") == 1


def test_the_labels_to_merge_are_those_of_the_run(trained, photos, shapes, tmp_path):
    checkpoint, *_ = trained
    content = load_checkpoint(checkpoint)
    content["config"]["ratio"] = 0.5
    save_checkpoint(checkpoint, {name: value for name, value in content.items() if name != "format"})
    error = run("tools.predict", checkpoint, photos, "--pseudo-labels", tmp_path / "out", code=2).stderr
    assert "was trained on other labeled images" in error and error.count("\n") == 1


def test_earlier_results_are_not_overwritten_by_accident(checkpoint, photos, tmp_path):
    for flag, file in (("--out", "results.json"), ("--pseudo-labels", "instances_train.json")):
        flags = [checkpoint, photos / "a.png", flag, tmp_path / "out"]
        run("tools.predict", *flags)
        before = (tmp_path / "out" / file).read_text()
        (tmp_path / "out" / file).write_text("corrected by hand")
        error = run("tools.predict", *flags, code=2).stderr
        assert f"has {file} already; pass another {flag}, or --overwrite" in error
        assert error.count("\n") == 1 and (tmp_path / "out" / file).read_text() == "corrected by hand"
        run("tools.predict", *flags, "--overwrite")
        assert (tmp_path / "out" / file).read_text() == before


def test_an_image_that_loses_most_of_its_pixels_is_pointed_out_once(checkpoint, photos, tmp_path):
    """The test size is 64 x 96."""
    large = tmp_path / "large"
    large.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (400, 300)).save(large / name)
    done = run("tools.predict", checkpoint, photos, large, "--out", tmp_path / "a")
    assert done.stdout.count("--tile") == 1 and "300 x 400 pixels is 64 pixels high" in done.stdout
    done = run("tools.predict", checkpoint, large, "--out", tmp_path / "b", "--tile", "96")
    assert "--tile" not in done.stdout
    assert Image.open(tmp_path / "b/000001-a.jpg").size == (400, 300)


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
    assert [entry["file_name"] for entry in content["images"]] == [f"new/{file.name}"]


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
        (["bad.png", "--threshold", "50"], "--threshold must be in [0, 1), found 50; 50 % is 0.5"),
        (["bad.png", "--threshold", "nan"], "--threshold must be in [0, 1)"),
        (["bad.png", "--tile", "8"], "--tile must be 0 or at least 32 pixels, found 8"),
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
        flags = ["--out", tmp_path / "out", "--test-size", "0,0", "--overwrite"]
        run("tools.predict", tmp_path / "a.pt", photos / "a.png", *flags)
        categories = json.loads((tmp_path / "out/images.json").read_text())["categories"]
        assert categories == [{"id": k + 1, "name": f"class {k}"} for k in range(num_classes)]
        done = run("tools.predict", tmp_path / "a.pt", photos / "a.png", *flags, "--data", shapes, code=code)
        if code:
            assert done.stderr == "error: the checkpoint has 3 classes, the data has 4\n"
        else:
            names = [c["name"] for c in json.loads((tmp_path / "out/images.json").read_text())["categories"]]
            assert names == load_data(str(shapes))[0].class_names
