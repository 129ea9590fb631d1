"""Tests of layouts/: where the files of a dataset are, and the generated shapes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_tools

from data import DataError, encode_rle
from layouts import find_data, load_data
from layouts.shapes import SHAPES, write_shapes


def test_a_folder_in_coco_form_is_recognized(shapes):
    train, val = load_data(str(shapes))
    assert (len(train), len(val)) == (12, 6)


def test_data_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(DataError, match="neither shapes, coco, cityscapes nor a folder"):
        load_data(str(tmp_path / "nowhere"))


def test_the_files_of_a_folder_can_be_replaced(tmp_path):
    folder = tmp_path / "mine"
    with pytest.raises(DataError, match="neither shapes"):
        find_data(str(folder), train_json="t.json")
    found = find_data(str(folder), train_json="t.json", val_json="v.json", image_folder="i")
    assert found == ((Path("t.json"), Path("i")), (Path("v.json"), Path("i")))
    folder.mkdir()
    assert find_data(str(folder)) == ((folder / "instances_train.json", folder / "images"), None)
    (folder / "instances_val.json").write_text("{}")
    assert find_data(str(folder), image_folder="i")[1] == (folder / "instances_val.json", Path("i"))


@pytest.mark.parametrize("name", ["shapes", "coco", "cityscapes"])
def test_only_the_files_of_a_folder_can_be_replaced(name):
    with pytest.raises(DataError, match=f"need a folder as --data, found '{name}'"):
        find_data(name, train_json="t.json")


def test_a_folder_needs_no_root(tmp_path):
    with pytest.raises(DataError, match="--root needs shapes, coco or cityscapes as --data"):
        find_data(str(tmp_path), root="elsewhere")


def test_coco_is_found_where_its_archives_unpack(tmp_path):
    assert find_data("coco", tmp_path) == tuple(
        (tmp_path / f"annotations/instances_{part}2017.json", tmp_path / f"{part}2017")
        for part in ("train", "val")
    )


def test_a_validation_set_is_optional(shapes, tmp_path):
    shutil.copytree(shapes, tmp_path / "mine")
    (tmp_path / "mine/instances_val.json").unlink()
    train, val = load_data(str(tmp_path / "mine"))
    assert len(train) == 12 and val is None


def test_shapes_are_generated_once(monkeypatch, tmp_path):
    def write_few(folder):
        write_shapes(folder, num_train=2, num_val=1, size=64)

    monkeypatch.setattr("layouts.shapes.write_shapes", write_few)
    train, val = load_data("shapes", tmp_path)
    assert train.image_folder == val.image_folder == tmp_path / "shapes/images"
    monkeypatch.setattr("layouts.shapes.write_shapes", None)
    assert [len(dataset) for dataset in load_data("shapes", tmp_path)] == [2, 1]


def test_generated_files_are_identical_every_time(shapes, tmp_path):
    write_shapes(tmp_path / "again", num_train=12, num_val=6, size=64)
    files = sorted(path.relative_to(shapes) for path in shapes.rglob("*") if path.is_file())
    assert len(files) == 12 + 6 + 2
    assert files == sorted(
        p.relative_to(tmp_path / "again") for p in tmp_path.rglob("again/**/*") if p.is_file()
    )
    for file in files:
        assert (shapes / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_two_processes_may_generate_the_shapes_at_once(tmp_path, monkeypatch):
    """The slower process keeps the files of the faster one."""
    rename = Path.rename

    def rename_after_another_process(self, target):
        shutil.copytree(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_after_another_process)
    write_shapes(tmp_path / "shapes", num_train=1, num_val=1, size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    assert (tmp_path / "shapes/images/train_00000.png").exists()


def test_another_seed_draws_other_shapes(tmp_path):
    for seed in (0, 1):
        write_shapes(tmp_path / str(seed), num_train=1, num_val=1, size=64, seed=seed)
    first, second = (np.asarray(Image.open(tmp_path / f"{s}/images/train_00000.png")) for s in (0, 1))
    assert first.shape == second.shape == (64, 64, 3) and (first != second).any()


def test_all_classes_occur_and_masks_do_not_overlap(shapes):
    train, val = load_data(str(shapes))
    labels = set()
    for dataset in (train, val):
        assert dataset.class_names == list(SHAPES)
        for image_id in dataset.image_ids:
            objects = dataset.objects(image_id)
            masks = [
                rle_tools.decode(encode_rle(o["segmentation"], *dataset.size(image_id))) for o in objects
            ]
            assert np.asarray(dataset.image(image_id)).shape[:2] == dataset.size(image_id) == (64, 64)
            assert sum(masks, np.zeros((64, 64), dtype=np.uint8)).max() <= 1
            assert [mask.sum() for mask in masks] == [o["area"] for o in objects]
            labels |= set(dataset.labels(image_id))
    assert labels == set(range(len(SHAPES)))


def test_training_and_validation_share_no_image(shapes):
    contents = [path.read_bytes() for path in (shapes / "images").iterdir()]
    assert len(set(contents)) == len(contents) == 18
