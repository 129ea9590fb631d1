"""Tests of layouts/: one drawn dataset in every layout that is read, the validation set that is held out, and
the generated shapes."""

import base64
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw
from pycocotools import mask as rle_tools

from data import DataError, encode_rle
from layouts import MIN_ANNOTATED, find_data, load_data, select_images
from layouts.files import files_below, image_size, split_of
from layouts.shapes import SHAPES, write_shapes

CLASSES = ["bolt", "rock"]


def draw(number, part):
    """Draw images: [(name, image, [(class, polygon)])]. The last one is not annotated.

    pycocotools rounds corners to fifths of a pixel. They are off that grid, so that YOLO's six decimals move
    no pixel of a mask."""
    rng = np.random.default_rng(len(part))
    images = []
    for index in range(number):
        H, W = 40 + 2 * index, 64 - index
        image, objects = Image.new("RGB", (W, H)), []
        for label in (0, 1) if index < number - 1 else ():
            x, y = rng.integers(2, W - 22), rng.integers(2, H - 22)
            polygon = np.array([0, 0, 18, 2, 14, 17, 3, 12]) + 4 * [x, y] + 0.42
            objects.append((label, polygon.tolist()))
            ImageDraw.Draw(image).polygon(objects[-1][1], fill=(200, 90 * label, 40))
        images.append((f"{part}_{index:03d}.png", image, objects))
    return images


@pytest.fixture(scope="module")
def drawn():
    return {"train": draw(7, "train"), "val": draw(4, "val")}


def coco_form(images, name="{}", first_id=1, root=None):
    """Return the content of a JSON file. name: the form of a file name; root: a category without objects."""
    content = {"images": [], "annotations": [], "categories": [root] if root else []}
    content["categories"] += [
        {"id": i + 1, "name": n, "supercategory": "stones"} for i, n in enumerate(CLASSES)
    ]
    for image_id, (file, image, objects) in enumerate(images, start=first_id):
        size = {"height": image.height, "width": image.width}
        content["images"].append({"id": image_id, "file_name": name.format(file), **size})
        for label, polygon in objects:
            annotation = {"id": len(content["annotations"]) + 1, "image_id": image_id, "iscrowd": 0}
            annotation |= {"category_id": label + 1, "segmentation": [polygon], "area": 200.0}
            content["annotations"].append(annotation | {"bbox": [*polygon[:2], 18.0, 17.0]})
    return content


def write(folder, files):
    """Write {path: content}: dictionaries and lists as JSON, text, or images."""
    for path, content in files.items():
        path = Path(folder) / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Image.Image):
            content.save(path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return Path(folder)


def image_files(images, form):
    return {form.format(name): image for name, image, _ in images}


def own(sets):
    files = {f"instances_{part}.json": coco_form(images) for part, images in sets.items()}
    return {k: v for images in sets.values() for k, v in image_files(images, "images/{}").items()} | files


def coco_tree(sets):
    files = {}
    for part, images in sets.items():
        files[f"annotations/instances_{part}2014.json"] = coco_form(images)
        files[f"annotations/captions_{part}2014.json"] = {"images": [], "annotations": []}
        files[f"annotations/person_keypoints_{part}2014.json"] = coco_form(images[:1])
        files |= image_files(images, part + "2014/{}")
    return files


def roboflow(sets):
    files = {"README.dataset.txt": "x", "test/_annotations.coco.json": coco_form(draw(1, "test"))}
    files |= image_files(draw(1, "test"), "test/{}")
    for part, images in sets.items():
        folder = {"val": "valid"}.get(part, part)
        root = {"id": 0, "name": "stones", "supercategory": "none"}
        files[f"{folder}/_annotations.coco.json"] = coco_form(images, first_id=0, root=root)
        files |= image_files(images, folder + "/{}")
    return files


def cvat(sets):
    files = {}
    for part, images in sets.items():
        subset = part.title()
        files[f"annotations/instances_{subset}.json"] = coco_form(images)
        files |= image_files(images, f"images/{subset}/{{}}")
    return files


def cvat_default(sets):
    files = image_files(sets["train"], "images/default/{}")
    return files | {"annotations/instances_default.json": coco_form(sets["train"])}


def label_studio(sets):
    names = {name: f"ab12cd{i:02d}-{name}" for i, (name, _, _) in enumerate(sets["train"])}
    images = [(names[name], image, objects) for name, image, objects in sets["train"]]
    return image_files(images, "images/{}") | {"result.json": coco_form(images, "images\\0/{}")}


def single_json(sets):
    content = coco_form(sets["train"], "http%3A//host/photos/{}")
    return image_files(sets["train"], "photos/day 1/{}") | {
        "export-7.json": content,
        "package.json": {"a": 1},
    }


def json_below(sets):
    return image_files(sets["train"], "photos/{}") | {"labels/all.json": coco_form(sets["train"])}


def named_jsons(sets):
    files = {"annotations_test.json": coco_form(sets["val"])}
    for part, images in sets.items():
        name = {"train": "my_train-v2.json", "val": "my_validation-v2.json"}[part]
        files |= {name: coco_form(images)} | image_files(images, "pictures/{}")
    return files


def yolo(sets, **config):
    files = {}
    for part, images in sets.items():
        files |= image_files(images, f"images/{part}/{{}}")
        for name, image, objects in images:
            scale = [image.width, image.height] * 4
            lines = [
                " ".join([str(label), *(f"{v / s:.6f}" for v, s in zip(polygon, scale))])
                for label, polygon in objects
            ]
            if lines:
                files[f"labels/{part}/{Path(name).stem}.txt"] = "\n".join(lines) + "\n"
    config = {"path": "../datasets/rocks", "train": "images/train", "val": "images/val"} | config
    return files | {"data.yaml": yaml.safe_dump({"names": dict(enumerate(CLASSES)), **config})}


def yolo_of_roboflow(sets):
    files = {}
    for path, content in yolo(sets).items():
        kind, *rest = path.split("/")
        files["/".join([{"val": "valid"}.get(rest[0], rest[0]), kind, *rest[1:]]) if rest else path] = content
    config = {"train": "../train/images", "val": "../valid/images", "test": "../test/images", "nc": 2}
    return files | {"data.yaml": yaml.safe_dump({**config, "names": CLASSES})}


def yolo_lists(sets):
    """The paths are those of another machine."""
    lists = {
        f"{part}.txt": "\n".join(f"/home/me/rocks/images/{part}/{name}" for name, _, _ in images)
        for part, images in sets.items()
    }
    return yolo(sets, path="/home/me/rocks", train=["train.txt"], val="val.txt") | lists


def labelme_json(name, image, objects, **shape):
    shapes = [
        {"label": CLASSES[label], "points": np.reshape(p, (-1, 2)).tolist(), "shape_type": "polygon", **shape}
        for label, p in objects
    ]
    size = {"imageHeight": image.height, "imageWidth": image.width}
    return {"version": "5.5.0", "shapes": shapes, "imagePath": name, "imageData": None, **size}


def labelme(sets):
    files = {}
    for part, images in sets.items():
        files |= image_files(images, part + "/{}")
        for name, image, objects in images:
            if objects:
                content = labelme_json(f"..\\{part}\\{name}", image, objects)
                files[f"{part}/{Path(name).stem}.json"] = content
    return files


def read_masks(dataset):
    """Return {name: [(class, mask)]}, with the last part of the names as drawn."""
    masks = {}
    for image_id in dataset.image_ids:
        names = [dataset.class_names[label] for label in dataset.labels(image_id)]
        rles = [encode_rle(o["segmentation"], *dataset.size(image_id)) for o in dataset.objects(image_id)]
        decoded = [rle_tools.decode(rle).tobytes() for rle in rles]
        assert np.asarray(dataset.image(image_id)).shape[:2] == dataset.size(image_id)
        name = re.sub("^ab12cd..-", "", Path(dataset.file_name(image_id)).name)
        masks[name] = sorted(zip(names, decoded))
    return masks


@pytest.fixture(scope="module")
def expected(drawn, tmp_path_factory):
    """The masks of the drawn dataset, which the test of our own form checks."""
    sets = {}
    for part, images in drawn.items():
        sets[part] = {
            name: sorted(
                (CLASSES[label], rle_tools.decode(encode_rle([p], image.height, image.width)).tobytes())
                for label, p in objects
            )
            for name, image, objects in images
        }
    assert sum(map(len, sets["train"].values())) == 12
    return sets


@pytest.mark.parametrize(
    "export, layout",
    [
        (own, "folder in COCO form (instances_{train,val}.json; images in images)"),
        (coco_tree, "COCO (annotations/instances_{train,val}2014.json; images in {train,val}2014)"),
        (
            roboflow,
            "Roboflow export ({train,valid}/_annotations.coco.json; images in {train,valid}); {unused}",
        ),
        (cvat, "CVAT export (annotations/instances_{Train,Val}.json; images in images/{Train,Val})"),
        (named_jsons, "COCO JSON (my_{train,validation}-v2.json; images in this folder); {unused}"),
        (yolo, "YOLO segmentation (data.yaml)"),
        (yolo_of_roboflow, "YOLO segmentation (data.yaml); {unused}"),
        (yolo_lists, "YOLO segmentation (data.yaml)"),
        (labelme, "labelme (a JSON file per image)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_dataset_is_the_same_in_every_layout(drawn, expected, tmp_path, export, layout):
    train, val = load_data(str(write(tmp_path, export(drawn))))
    layout = layout.replace("{unused}", "test is not used")  # and a{b,c} is "ab, ac"
    assert train.layout == re.sub(r"([^ ({]*){(\w+),(\w+)}([^ ;)]*)", r"\1\2\4, \1\3\4", layout)
    assert train.class_names == val.class_names == CLASSES
    assert read_masks(train) == expected["train"]
    assert read_masks(val) == expected["val"]


@pytest.mark.parametrize(
    "export, layout",
    [
        (cvat_default, "CVAT export (annotations/instances_default.json; images in images/default)"),
        (label_studio, "Label Studio export (result.json; images in images)"),
        (single_json, "COCO JSON (export-7.json; images in this folder)"),
        (json_below, "COCO JSON (labels/all.json; images in this folder)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_export_without_splits_is_divided(drawn, expected, tmp_path, export, layout):
    write(tmp_path, export(drawn))
    train, val = load_data(str(tmp_path), val_ratio=0)
    assert train.layout == layout and val is None
    assert train.class_names == CLASSES and read_masks(train) == expected["train"]
    train, val = load_data(str(tmp_path), val_ratio=0.2)
    assert {**read_masks(train), **read_masks(val)} == expected["train"]
    held_out = f"{len(val)} of 6 annotated images are held out (--val-ratio 0.2)"
    assert train.layout == f"{layout}; no validation set: {held_out}"


def test_an_archive_that_unpacks_into_a_folder_of_its_own_is_found(drawn, expected, tmp_path):
    write(tmp_path / "rocks-3", roboflow(drawn))
    write(tmp_path, {"__MACOSX/._x.json": "", ".DS_Store": ""})
    train, val = load_data(str(tmp_path))
    assert read_masks(train) == expected["train"] and read_masks(val) == expected["val"]


def test_classes_of_the_validation_set_are_matched_by_name(drawn, expected, tmp_path):
    files = own(drawn)
    val = files["instances_val.json"]
    val["categories"] = [{"id": 3 - c["id"], "name": c["name"]} for c in val["categories"]]
    for annotation in val["annotations"]:
        annotation["category_id"] = 3 - annotation["category_id"]
    train, val = load_data(str(write(tmp_path, files)))
    assert train.class_names == val.class_names and read_masks(val) == expected["val"]


# --------------------------------------------------------------------------------------- files that are given


def test_a_json_file_is_data(drawn, expected, tmp_path):
    write(tmp_path, own(drawn))
    train, val = load_data(str(tmp_path / "instances_train.json"))
    assert read_masks(train) == expected["train"] and read_masks(val) == expected["val"]
    train, _ = load_data(str(tmp_path / "instances_val.json"))
    assert {**read_masks(train)}.keys() <= expected["val"].keys() and train.notes  # three annotated images


@pytest.mark.parametrize("image_folder", ["", "train", "."])
def test_validation_images_are_found_beside_their_json_file(drawn, expected, tmp_path, image_folder):
    """Roboflow's folders have one image folder per split."""
    write(tmp_path, roboflow(drawn))
    train, val = load_data(
        str(tmp_path),
        train_json=str(tmp_path / "train/_annotations.coco.json"),
        val_json=str(tmp_path / "valid/_annotations.coco.json"),
        image_folder=str(tmp_path / image_folder) if image_folder else "",
    )
    assert read_masks(train) == expected["train"] and read_masks(val) == expected["val"]
    assert train.layout.startswith("files of the command line (train/_annotations.coco.json, valid/")
    assert val.image_folder == tmp_path / "valid"


def test_the_files_of_a_folder_can_be_replaced(drawn, expected, tmp_path):
    write(tmp_path, own(drawn))
    write(tmp_path / "other", {"v.json": coco_form(drawn["train"][:2])})
    write(tmp_path / "copies", image_files(drawn["train"][:2], "{}"))
    given = dict(val_json=str(tmp_path / "other/v.json"), val_image_folder=str(tmp_path / "copies"))
    train, val = load_data(str(tmp_path), **given)
    assert read_masks(train) == expected["train"] and len(val) == 2
    assert val.image_folder == tmp_path / "copies" and train.image_folder == tmp_path / "images"
    train, val = load_data(str(tmp_path), train_json=str(tmp_path / "other/v.json"))
    assert len(train) == 2 and read_masks(val) == expected["val"]


def test_train_json_and_image_folder_need_no_other_folder(drawn, expected, tmp_path):
    write(tmp_path, own(drawn))
    given = dict(train_json=str(tmp_path / "instances_train.json"), image_folder=str(tmp_path / "images"))
    train, _ = load_data("nowhere", **given, val_ratio=0)
    assert read_masks(train) == expected["train"]
    with pytest.raises(DataError, match="neither shapes"):
        load_data("nowhere", train_json=given["train_json"])


@pytest.mark.parametrize("name", ["shapes", "coco", "cityscapes"])
def test_only_the_files_of_a_folder_can_be_replaced(name):
    with pytest.raises(DataError, match=f"need a folder as --data, found '{name}'"):
        load_data(name, train_json="t.json")


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(root="elsewhere"), "--root needs shapes, coco or cityscapes as --data"),
        (dict(val_ratio=1.0), "--val-ratio 1.0 must be at least 0 and less than 1"),
        (dict(image_folder="gone"), "no folder --image-folder 'gone'"),
        (dict(val_image_folder="tests"), "--val-image-folder needs a validation set; pass --val-json too"),
        (dict(train_json="gone.json"), "no annotation file 'gone.json'"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(drawn, tmp_path, given, message):
    write(tmp_path, label_studio(drawn))
    with pytest.raises(DataError, match=re.escape(message)):
        load_data(str(tmp_path), **given)


# ---------------------------------------------------------------------------------- what cannot be found


@pytest.mark.parametrize(
    "data, message",
    [
        ("nowhere", "'nowhere' is neither shapes, coco, cityscapes nor a folder that exists$"),
        ("shapse", "a folder that exists; did you mean shapes?"),
    ],
)
def test_data_that_does_not_exist_is_an_error(data, message):
    with pytest.raises(DataError, match=message):
        load_data(data)


@pytest.mark.parametrize(
    "data, archives",
    [
        ("coco", ["cocodataset.org", "train2017.zip", "val2017.zip", "annotations_trainval2017.zip"]),
        ("cityscapes", ["cityscapes-dataset.com", "leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"]),
    ],
)
def test_a_missing_dataset_is_an_error_that_says_where_it_is(tmp_path, data, archives):
    with pytest.raises(DataError) as error:
        load_data(data, str(tmp_path))
    assert all(word in str(error.value) for word in [*archives, str(tmp_path), "--root"])


def test_an_archive_has_to_be_unpacked(tmp_path):
    write(tmp_path, {"export.zip": "PK"})
    with pytest.raises(DataError, match="export.zip': it is a file; unpack it and pass the folder"):
        load_data(str(tmp_path / "export.zip"))


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "which has nothing; export the annotations as COCO"),
        ({"a/b.png": "", "c.txt": ""}, "which has a/, c.txt; export the annotations as COCO"),
        ({"Annotations/1.xml": "", "JPEGImages/1.jpg": ""}, "this looks like Pascal VOC"),
        ({"meta.json": "{}", "ann/1.png.json": "{}", "img/1.png": ""}, "this looks like Supervisely"),
        ({"labels/1.txt": "0 0 0 1 1", "images/1.png": ""}, "YOLO without its data.yaml"),
        ({f"{n}.txt": "" for n in range(10)}, "6.txt, 7.txt and 2 more;"),
    ],
)  # fmt: skip
def test_a_folder_of_another_layout_is_an_error_that_says_what_it_has(tmp_path, files, message):
    write(tmp_path, files)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        load_data(str(tmp_path))
    assert "Layouts that are read: COCO form" in str(error.value) and "\n" not in str(error.value)


def test_several_files_that_could_be_the_training_set_are_an_error(drawn, tmp_path):
    write(tmp_path, {"a.json": coco_form(drawn["train"]), "b.json": coco_form(drawn["val"])})
    with pytest.raises(DataError, match="choose with --train-json and --val-json"):
        load_data(str(tmp_path))


def test_a_dataset_that_lies_deeper_is_named(drawn, tmp_path):
    write(tmp_path / "export", roboflow(drawn))
    write(tmp_path, {"notes.txt": ""})
    with pytest.raises(DataError, match="pass --data '.*/export', which has some"):
        load_data(str(tmp_path))


def test_the_only_json_file_is_read_whatever_it_is(tmp_path):
    write(tmp_path, {"annotations.json": "version https://git-lfs.github.com/spec/v1", "images/1.png": ""})
    with pytest.raises(DataError, match="annotations.json"):
        load_data(str(tmp_path))


def test_names_tell_the_splits():
    names = {
        "train": ["instances_train2017.json", "Training.json", "train/_annotations.coco.json"],
        "val": [
            "valid/_annotations.coco.json",
            "my-val.json",
            "train/validation.json",
            "a/instances_Val.json",
        ],
        "test": ["test/_annotations.coco.json", "image_info_test-dev2017.json"],
        "": ["instances_default.json", "trains.json", "result.json", "latest/interval.json"],
    }
    assert {split: [split_of(n) for n in of_split] for split, of_split in names.items()} == {
        split: [split] * len(of_split) for split, of_split in names.items()
    }


# ------------------------------------------------------------------------------------------- YOLO and labelme


def test_lines_of_a_yolo_file_that_are_wrong_are_named(drawn, tmp_path):
    write(tmp_path, yolo(drawn))
    lines = ["0 .1 .1 .5 .1 .5 .5", "1 .1 .1 x .1 .5 .5", "2 .1 .1 .5 .1 .5 .5", "0 .1 .1 .5 .1 .5", ""]
    write(tmp_path, {"labels/train/train_000.txt": "\n".join([*lines, "nan 0 0 1 1"])})
    with pytest.raises(DataError, match=r"labels/train/train_000.txt, line 2: .*'x' \(4 problems in all"):
        load_data(str(tmp_path))
    train, _ = load_data(str(tmp_path), strict=False)
    assert [message.split(":")[0] for message in train.errors] == [
        f"labels/train/train_000.txt, line {number}" for number in (2, 3, 4, 6)
    ]
    assert "class 2 is not among the 2 names" in train.errors[1] and "found 5 numbers" in train.errors[2]
    assert len(train.objects(1)) == 1


def test_a_yolo_line_with_four_numbers_is_a_box_without_a_mask(drawn, tmp_path):
    write(tmp_path, yolo(drawn))
    write(tmp_path, {"labels/train/train_000.txt": "0 .5 .5 .2 .2\n1 .1 .1 .5 .1 .5 .5\n"})
    train, _ = load_data(str(tmp_path))
    assert train.labels(1) == [1]


def test_huge_numbers_of_a_yolo_file_are_no_mask(drawn, tmp_path):
    write(tmp_path, yolo(drawn))
    write(tmp_path, {"labels/train/train_000.txt": "0 1e308 1e308 .5 .1 .5 .5\n0 inf 0 nan .1 .5 .5\n"})
    train, _ = load_data(str(tmp_path))
    assert train.labels(1) == [] and train.labels(2) == [0, 1]


@pytest.mark.parametrize("export", [yolo, labelme])
def test_a_damaged_image_whose_size_only_its_file_has_is_left_out(drawn, tmp_path, export):
    files = export(drawn)
    damaged = next(path for path in files if path.endswith("train_000.png"))
    write(tmp_path, files | {damaged: "hello"})
    for file in tmp_path.glob("train/train_000.json"):
        write(tmp_path, {file: json.loads(file.read_text()) | {"imageHeight": None}})
    train, _ = load_data(str(tmp_path))
    assert len(train) == 6 and train.bins["trained"] == 10
    assert train.notes[0].startswith("1 of 7 images are missing and left out")


@pytest.mark.parametrize(
    "text, message",
    [
        ("train: [", "cannot read '.*data.yaml': while parsing"),
        ("train: images/train\nnames: 3", "its names are no list or mapping"),
        ("train: gone\nnames: [a]", "no image where its 'train' is"),
        ("train: images/train\nnames: [a]\nkpt_shape: [17, 3]", "it has poses"),
        ("a: &a [x, x]\nb: &b [*a, *a]\ntrain: *b\nnames: [a]", "no image where its 'train' is"),
    ],
)
def test_a_wrong_data_yaml_is_an_error(drawn, tmp_path, text, message):
    write(tmp_path, yolo(drawn) | {"data.yaml": text})
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path))


@pytest.mark.parametrize("val", ["images/train", "images/gone", None])
def test_yolo_without_a_validation_set_of_its_own(drawn, tmp_path, val):
    """Examples of Ultralytics have the same images in both sets."""
    write(tmp_path, yolo(drawn, val=val))
    train, val_set = load_data(str(tmp_path), val_ratio=0.2)
    assert len(train) + len(val_set) == 7 and "annotated images are held out" in train.layout
    assert ("val is train" in train.layout) == (val == "images/train")


def test_the_size_of_a_rotated_photo_is_what_annotation_tools_show(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "tif", "png"):
        Image.new("RGB", (30, 20)).save(tmp_path / f"a.{suffix}", exif=exif)
        assert image_size(tmp_path / f"a.{suffix}") == {"height": 30, "width": 20}
    assert image_size(write(tmp_path, {"b.png": "x"}) / "b.png") == {}


def labelme_folder(tmp_path, shapes, **fields):
    """Write one image of 40 x 60 with labelme's shapes, and load it. Returns {label: [mask]}, and how many
    annotations ended in which bin."""
    content = labelme_json("a.png", Image.new("RGB", (60, 40)), []) | {"shapes": shapes, **fields}
    write(tmp_path, {"a.png": Image.new("RGB", (60, 40)), "a.json": content})
    train, _ = load_data(str(tmp_path))
    masks = {}
    for o, label in zip(train.objects(train.image_ids[0]), train.labels(train.image_ids[0])):
        mask = rle_tools.decode(encode_rle(o["segmentation"], 40, 60)) > 0
        masks.setdefault(train.class_names[label], []).append(mask)
    return masks, train.bins


def square(x, y, side=8):
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]


def test_shapes_of_labelme_become_masks(tmp_path):
    brush = np.zeros((6, 9), dtype=bool)
    brush[1:5, 2:7] = True
    file = io.BytesIO()
    Image.fromarray(brush).save(file, "PNG")
    shapes = [
        {"label": "circle", "shape_type": "circle", "points": [[20, 20], [30, 20]]},
        {"label": "brush", "shape_type": "mask", "points": [[40, 10], [48, 15]],
         "mask": base64.b64encode(file.getvalue()).decode()},
        {"label": "old", "points": square(2, 2)},
        {"label": "box", "shape_type": "rectangle", "points": [[1, 1], [9, 9]]},
        {"label": "line", "shape_type": "linestrip", "points": [[1, 1], [9, 9], [20, 3]]},
    ]  # fmt: skip
    masks, bins = labelme_folder(tmp_path, shapes)
    assert masks.keys() == {"circle", "brush", "old"}
    assert bins == {"trained": 3, "boxes only": 1, "unreadable form": 1}
    expected = np.zeros((40, 60), dtype=bool)
    expected[10:16, 40:49] = brush
    assert (masks["brush"][0] == expected).all() and masks["old"][0].sum() == 64
    y, x = np.mgrid[:40, :60] + 0.5
    disc = np.hypot(x - 20, y - 20) < 10
    assert (masks["circle"][0] & disc).sum() / (masks["circle"][0] | disc).sum() > 0.95
    assert masks["circle"][0].sum() == pytest.approx(math.pi * 100, rel=0.03)


def test_shapes_of_one_group_are_one_object(tmp_path):
    shapes = [
        {"label": label, "points": square(x, 2), "group_id": group}
        for label, x, group in [
            ("cup", 2, 1),
            ("cup", 12, 1),
            ("cup", 22, 2),
            ("lid", 32, 1),
            ("cup", 42, None),
        ]
    ]
    masks, _ = labelme_folder(tmp_path, shapes)
    assert [mask.sum() for mask in masks["cup"]] == [128, 64, 64] and len(masks["lid"]) == 1


@pytest.mark.parametrize(
    "shape",
    [
        {"label": "a", "points": [[1, 2, 3]]},
        {"label": "a", "points": [["x", 2]]},
        {"label": 5, "points": square(2, 2)},
        {"label": "a", "points": [[10**400, 2]]},
        {"label": "a", "shape_type": "mask", "points": [[0, 0], [5, 5]], "mask": "AAAA"},
        "a",
    ],
)
def test_a_wrong_shape_of_labelme_is_named(tmp_path, shape):
    with pytest.raises(DataError, match=r"a.json, shape 1: "):
        labelme_folder(tmp_path, [{"label": "a", "points": square(2, 2)}, shape])


def test_a_mask_of_labelme_stays_inside_its_image(tmp_path):
    file = io.BytesIO()
    Image.new("1", (10, 10), 1).save(file, "PNG")
    shape = {"label": "a", "shape_type": "mask", "mask": base64.b64encode(file.getvalue()).decode()}
    with pytest.raises(DataError, match="leaves its image"):
        labelme_folder(tmp_path, [shape | {"points": [[55, 0], [64, 9]]}])


def test_the_image_of_a_labelme_file_never_lies_outside(tmp_path):
    write(tmp_path, {"outside.png": Image.new("RGB", (60, 40))})
    shapes = [{"label": "a", "points": square(2, 2)}]
    masks, _ = labelme_folder(tmp_path / "in", shapes, imagePath="../outside.png")
    assert masks["a"][0].sum() == 64  # of a.png, which has the name of the JSON file


# ------------------------------------------------------------------------------------------------- hold-out


def split(folder, **kwargs):
    train, val = load_data(str(folder), **kwargs)
    return set(read_masks(train)), set(read_masks(val)) if val else set()


def test_a_held_out_image_stays_one_when_images_are_added(tmp_path):
    images = draw(31, "photo")
    write(tmp_path, image_files(images, "images/{}"))
    seen = set()
    for number in (9, 16, 31):
        content = coco_form(images[:number])
        content["images"].reverse()  # The order in the file does not matter, nor do the ids.
        write(tmp_path, {"instances_train.json": content})
        train, val = split(tmp_path, val_ratio=0.2)
        assert train | val == {name for name, _, _ in images[:number]} and not train & val
        assert val >= seen and 0 < len(val) < number / 2
        seen = val
    assert split(tmp_path, val_ratio=0.5)[1] > seen > split(tmp_path, val_ratio=0.05)[1] > set()
    assert split(tmp_path, val_ratio=0)[1] == set()


def test_images_without_objects_are_never_held_out(tmp_path):
    annotated, others = draw(7, "a")[:6], [(n, image, []) for n, image, _ in draw(40, "other")]
    write(tmp_path, image_files(annotated + others, "images/{}"))
    write(tmp_path, {"instances_train.json": coco_form(annotated + others)})
    _, val = split(tmp_path, val_ratio=0.5)
    assert val and val < {name for name, _, _ in annotated}


def test_few_annotated_images_are_all_for_training(tmp_path):
    images = draw(MIN_ANNOTATED, "a")  # The last one is not annotated.
    write(tmp_path, image_files(images, "images/{}") | {"instances_train.json": coco_form(images)})
    train, val = load_data(str(tmp_path))
    assert val is None and len(train) == MIN_ANNOTATED
    [note] = train.notes
    assert note.startswith("there is no validation set, and 19 annotated images are few, so none is held out")


def test_a_share_of_enough_annotated_images_is_held_out(tmp_path):
    images = draw(MIN_ANNOTATED + 1, "a")
    write(tmp_path, image_files(images, "images/{}") | {"instances_train.json": coco_form(images)})
    train, val = load_data(str(tmp_path))
    assert val and len(train) + len(val) == MIN_ANNOTATED + 1 and not train.notes
    with pytest.raises(
        DataError, match="--val-ratio 0.999 would hold out all annotated images, 20 in number"
    ):
        load_data(str(tmp_path), val_ratio=0.999)


def test_augmented_copies_of_an_image_stay_together(tmp_path):
    images = [
        (f"{name[:-4]}_png.rf.{copy * 32}.png", image, objects)
        for name, image, objects in draw(21, "a")[:20]
        for copy in "0f"
    ]
    write(tmp_path, image_files(images, "train/{}") | {"train/_annotations.coco.json": coco_form(images)})
    train, val = split(tmp_path, val_ratio=0.3)
    sources = [{name.split(".rf.")[0] for name in names} for names in (train, val)]
    assert len(train) + len(val) == 40 and val and not sources[0] & sources[1]


def test_what_the_validation_reports_is_reported_once(tmp_path):
    images = draw(9, "a")
    content = coco_form(images)
    content["annotations"][0]["segmentation"] = []
    write(tmp_path, image_files(images, "images/{}") | {"instances_train.json": content})
    train, val = load_data(str(tmp_path), val_ratio=0.3)
    assert train.bins == {"trained": 15, "boxes only": 1} and len(train.notes) == 1
    assert val.bins == {} and val.notes == val.errors == []


def test_selected_images_keep_their_annotations(shapes):
    train, _ = load_data(str(shapes))
    some = select_images(train, train.image_ids[::3])
    assert some.image_ids == train.image_ids[::3] and some.class_names == train.class_names
    for image_id in some.image_ids:
        assert some.annotations(image_id) == train.annotations(image_id)
        assert some.path(image_id) == train.path(image_id) and some.size(image_id) == train.size(image_id)


def test_links_are_followed_and_hidden_files_left_out(tmp_path):
    write(
        tmp_path / "store",
        {"a.png": "", "deep/b.JPG": "", ".hidden.png": "", "__MACOSX/._a.png": "", "c.txt": ""},
    )
    write(tmp_path / "images", {"d.png": ""})
    (tmp_path / "images/linked").symlink_to(tmp_path / "store")
    (tmp_path / "store/back").symlink_to(tmp_path / "images")
    assert files_below(tmp_path / "images") == ["d.png", "linked/a.png", "linked/deep/b.JPG"]


# ----------------------------------------------------------------------------------- COCO, Cityscapes, shapes


def test_coco_is_found_where_its_archives_unpack(tmp_path):
    write(tmp_path, {"annotations/instances_train2017.json": "{}"})
    layout, *sources = find_data("coco", tmp_path)
    assert layout == "COCO (annotations/, train2017/, val2017/)"
    assert [(source.json_file, source.image_folder) for source in sources] == [
        (tmp_path / f"annotations/instances_{part}2017.json", tmp_path / f"{part}2017")
        for part in ("train", "val")
    ]


def test_cityscapes_is_found_in_a_folder(tmp_path):
    ids = np.zeros((32, 64), dtype=np.uint16)
    ids[4:20, 6:30] = 26_000
    for part in ("train", "val"):
        name = f"{part}/ulm/ulm_000000_000019"
        image, label = f"leftImg8bit/{name}_leftImg8bit.png", f"gtFine/{name}_gtFine_instanceIds.png"
        write(tmp_path, {image: Image.new("RGB", (64, 32)), label: Image.fromarray(ids)})
    for _ in range(2):  # The second time instances_train.json is there already.
        train, val = load_data(str(tmp_path))
        assert train.layout == "Cityscapes (leftImg8bit/, gtFine/)" and len(train) == len(val) == 1
        assert read_masks(train).popitem()[1] == [("car", (ids > 0).astype(np.uint8).tobytes())]


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
