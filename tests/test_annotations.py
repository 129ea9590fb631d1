"""What annotation tools write is read as it was meant, and counted: encodings, ids, file names, sizes,
crowds, forms of masks and classes. What contradicts the images is refused before training."""

import json
import math
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_tools

from data import EXIF_ORIENTATION, DataError, encode_rle, labeled_split
from evaluate import mask_ap
from layouts.validate import BINS, format_bins, load_coco

H, W = 24, 30
TRIANGLE = [3, 2, 20.5, 4, 11, 18]
SQUARE = [22, 15, 28, 15, 28, 21, 22, 21]


def annotation(number, image_id, category_id=1, segmentation=(TRIANGLE,), **change):
    entry = {"id": number, "image_id": image_id, "category_id": category_id, "iscrowd": 0}
    return entry | {"segmentation": list(segmentation)} | change


def content(num_images=4):
    """Return the content of a file with one triangle in each image and a square in the first."""
    names = [f"img_{i}.png" for i in range(1, num_images + 1)]
    images = [{"id": i, "file_name": n, "height": H, "width": W} for i, n in enumerate(names, start=1)]
    triangles = [annotation(image["id"], image["id"]) for image in images]
    square = annotation(len(images) + 1, 1, 2, [SQUARE])
    categories = [{"id": 1, "name": "rock"}, {"id": 2, "name": "bolt"}]
    return {"images": images, "annotations": [*triangles, square], "categories": categories}


def save_image(path, height=H, width=W, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "gray").save(path, **kwargs)


@pytest.fixture
def folder(tmp_path):
    for number in range(1, 5):
        save_image(tmp_path / f"images/img_{number}.png")
    return tmp_path


def read(folder, coco, strict=True, **options):
    return load_coco(folder / "a.json", folder / "images", strict, content=coco, **options)


def refused(folder, coco, **options) -> str:
    """Return the message of the error, which is one line."""
    with pytest.raises(DataError) as caught:
        read(folder, coco, **options)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    return str(caught.value)


def num_objects(dataset) -> int:
    return sum(len(dataset.objects(image_id)) for image_id in dataset.image_ids)


def bitmap(segmentation):
    return rle_tools.decode(encode_rle(segmentation, H, W))


# ------------------------------------------------------------------------------------- the JSON as a file


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_every_unicode_encoding_is_read(folder, codec):
    coco = content()
    coco["categories"][0]["name"] = "裂缝 / é"
    (folder / "a.json").write_bytes(json.dumps(coco, ensure_ascii=False).encode(codec))
    dataset = load_coco(folder / "a.json", folder / "images")
    assert dataset.class_names == ["裂缝 / é", "bolt"] and num_objects(dataset) == 5


TEXT = json.dumps(content())
PANOPTIC = content() | {"annotations": [{"image_id": 1, "segments_info": []}]}
CAPTIONS = {"images": content()["images"], "annotations": [{"id": 1, "image_id": 1, "caption": "a rock"}]}
DETECTIONS = [{"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": {}}]
OTHER_FILES = {
    "another encoding": (TEXT.replace("rock", "裂").encode("gbk"), "byte [0-9]+ is not utf-8"),
    "half of UTF-16": (TEXT.encode("utf-16")[:-1], "byte [0-9]+ is not utf-16"),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "nothing": (b" \n", "it is empty"),
    "cut off in a list": (TEXT[:300].encode(), "it is cut off, it ends early at character 300"),
    "cut off in a text": (TEXT[:15].encode(), "it is cut off"),
    "cut off in a number": (b'{"images": [], "annotations": [12', "it is cut off"),
    "cut off in a word": (b'{"images": [], "annotations": [fal', "it is cut off"),
    "an error in the middle": (
        TEXT.replace(":", "=", 1).encode(),
        "not JSON, Expecting ':' .* line 1, column",
    ),
    "a pickle": (b"\x80\x04\x95", "it is a pickle"),
    "an archive": (b"PK\x03\x04....", "it is a ZIP archive; unpack it"),
    "a web page": (b"<!DOCTYPE html>", "it is XML or a web page"),
    "panoptic": (PANOPTIC, "it is a panoptic file"),
    "captions": (CAPTIONS, "it is a captions file"),
    "detections": (DETECTIONS, "a list of detections"),
    "labelme": ({"shapes": [], "imagePath": "a.png"}, "labelme's own JSON"),
    "no categories": ({"images": [], "annotations": []}, "it has no 'categories'"),
    "no list": (content() | {"images": {}}, "its 'images' is a dict, not a list"),
    "a number": (3, "it is a int, not a dictionary"),
}


@pytest.mark.parametrize("text, message", OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_of_another_kind_is_called_by_its_name(folder, monkeypatch, text, message):
    monkeypatch.chdir(folder)
    (folder / "a.json").write_bytes(text if isinstance(text, bytes) else json.dumps(text).encode())
    with pytest.raises(DataError, match=rf"^a\.json is not a COCO instances file: .*{message}") as caught:
        load_coco("a.json", "images")
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ ids


def with_ids(change, parts=("id", "image_id", "category_id")):
    """Return content with all ids replaced by change(id)."""
    coco = content()
    for entries in coco.values():
        for entry in entries:
            entry |= {key: change(entry[key]) for key in parts if key in entry}
    return coco


@pytest.mark.parametrize(
    "change, image_ids",
    [
        (lambda i: i, [1, 2, 3, 4]),
        (float, [1, 2, 3, 4]),
        (str, ["1", "2", "3", "4"]),
        (lambda i: f"im{i}", ["im1", "im2", "im3", "im4"]),
        (lambda i: i if i % 2 else f"im{i}", ["1", "3", "im2", "im4"]),
    ],
)
def test_ids_may_be_numbers_or_text(folder, change, image_ids):
    dataset = read(folder, with_ids(change))
    assert dataset.image_ids == image_ids and num_objects(dataset) == 5 and not dataset.notes
    assert set(labeled_split(dataset.image_ids, 0.5, seed=0)) < set(image_ids)
    detections = []
    for image_id in dataset.image_ids:
        for o in dataset.objects(image_id):
            rle = encode_rle(o["segmentation"], H, W)
            ids = {"image_id": image_id, "category_id": o["category_id"]}
            detections.append({**ids, "segmentation": rle, "score": 0.9})
    assert mask_ap(dataset, detections)["AP"] == pytest.approx(100)


def test_ids_that_look_alike_are_the_same(folder):
    coco = content()
    for entry in coco["annotations"]:
        entry |= {"image_id": str(entry["image_id"]), "category_id": float(entry["category_id"])}
    dataset = read(folder, coco)
    assert dataset.image_ids == [1, 2, 3, 4] and dataset.labels(1) == [0, 1]


@pytest.mark.parametrize("key", ["id of all", "id of one"])
def test_annotations_without_ids_are_numbered(folder, key):
    coco = content()
    for entry in coco["annotations"] if key == "id of all" else coco["annotations"][-1:]:
        del entry["id"]
    dataset = read(folder, coco)
    assert sorted(a["id"] for i in dataset.image_ids for a in dataset.annotations(i)) == [1, 2, 3, 4, 5]
    number = 5 if key == "id of all" else 1
    assert f"annotation ids: {number} repeated or missing" in dataset.notes[0]


def test_repeated_annotation_ids_are_numbered_anew(folder):
    coco = content()
    coco["annotations"][3]["id"] = coco["annotations"][4]["id"] = 1
    dataset = read(folder, coco)
    assert len({a["id"] for i in dataset.image_ids for a in dataset.annotations(i)}) == 5
    assert "annotation ids: 2 repeated or missing" in dataset.notes[0]


def test_numbers_may_be_text_or_whole_floats(folder):
    coco = content()
    for image in coco["images"]:
        image |= {"height": str(H), "width": float(W)}
    for entry, iscrowd in zip(coco["annotations"], ["0", False, 0.0, None, 0]):
        entry["iscrowd"] = iscrowd
    dataset = read(folder, coco)
    assert dataset.size(1) == (H, W) and dataset.bins == {"trained": 5} and not dataset.notes


def test_entries_of_one_file_become_one_image(folder):
    coco = content()
    for number, entry in enumerate(coco["annotations"], start=1):
        entry |= {"image_id": number, "segmentation": [[number, *TRIANGLE[1:]]]}
    coco["images"] = [coco["images"][i // 3] | {"id": i + 1} for i in range(5)]
    dataset = read(folder, coco)
    assert dataset.image_ids == [1, 4] and [len(dataset.objects(i)) for i in (1, 4)] == [3, 2]
    assert dataset.bins == {"trained": 5}
    assert "image entries: 3 for a file that has an earlier entry" in " ".join(dataset.notes)
    coco["images"][1]["height"] = 9
    assert "image 2: it has the file of image 1 and another size" in refused(folder, coco)


# ------------------------------------------------------------------------------------------------ file names

NAMES = [  # on the disk, in the annotations
    ("sub/a b.png", "a b.png"),
    ("sub/a b.png", "elsewhere/sub/a b.png"),
    ("sub/a b.png", "sub\\a b.png"),
    ("sub/a b.png", "C:\\Users\\me\\images\\a b.png"),
    ("sub/a b.png", "..\\label\\a b.png"),
    ("sub/a b.png", "../images/a b.png"),
    ("sub/a b.png", "sub/a%20b.png"),
    ("a%20b.png", "a b.png"),
    ("sub/a b.png", "SUB/A b.PNG"),
    (unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png")),
    ("sub/a.png", "https://host/bucket/sub/a.png?X-Signature=1"),
    ("sub/a.png", "s3://bucket/a.png"),
    ("ab12cd34-a.png", "/data/upload/1/ab12cd34-a.png"),
    ("a.png", "/data/upload/1/ab12cd34-a.png"),
    ("ab12cd34-a.png", "a.png"),
    ("x/y.png", "/data/local-files/?d=x%2Fy.png"),
    ("x/y.png", "/data/local-files/?d=x/y.png"),
]


@pytest.mark.parametrize("file, name", NAMES)
def test_a_name_of_another_machine_finds_the_only_file_that_fits(folder, file, name):
    save_image(folder / "images" / file)
    coco = content()
    coco["images"][3]["file_name"] = name
    dataset = read(folder, coco)
    assert dataset.file_name(4) == file and dataset.image(4).size == (W, H)
    note = f"image file names: 1 found under another name, such as {name!r}, taken as {file!r}"
    assert dataset.notes == [note]


def test_absolute_names_of_files_in_the_folder_are_read(folder):
    coco = content()
    coco["images"][3]["file_name"] = str(folder / "images/img_4.png")
    assert read(folder, coco).file_name(4) == "img_4.png"


def test_the_name_with_more_of_the_path_wins(folder):
    save_image(folder / "images/train/a.png")
    save_image(folder / "images/val/a.png")
    coco = content()
    coco["images"][3]["file_name"] = "export\\val\\a.png"
    assert read(folder, coco).file_name(4) == "val/a.png"


@pytest.mark.parametrize("name, files", [("x/a.png", ["b/a.png", "c/a.png"]), ("x/img_3.png", [])])
def test_a_name_that_fits_several_files_or_that_of_another_image_is_missing(folder, name, files):
    for file in files:
        save_image(folder / "images" / file)
    coco = content()
    coco["images"][3]["file_name"] = name
    dataset = read(folder, coco)
    assert dataset.image_ids == [1, 2, 3] and dataset.bins == {"trained": 4, "image missing": 1}
    assert f"1 of 4 images are missing and left out, such as image 4: its file {name!r}" in dataset.notes[0]


@pytest.mark.parametrize("name", ["../secret.png", "{}/secret.png", "a/../../secret.png", "../nothing.png"])
def test_no_file_outside_of_the_folder_is_opened(folder, name):
    save_image(folder / "secret.png")
    (folder / "images/a").mkdir()
    save_image(folder / "images/other/secret.png")  # must not take its place
    coco = content()
    coco["images"][3]["file_name"] = name.format(folder)
    assert "image 4: its file" in refused(folder, coco, allow_missing=True)
    assert "is outside of" in refused(folder, coco)


@pytest.mark.parametrize("kind", ["each file", "a folder", "the folder"])
def test_links_are_followed_unless_told_otherwise(folder, kind):
    images, store, coco = folder / "images", folder / "store", content()
    images.rename(store)
    if kind == "the folder":
        images.symlink_to(store)
    else:
        images.mkdir()
    if kind == "each file":
        for file in store.iterdir():
            (images / file.name).symlink_to(file)
    if kind == "a folder":
        (images / "train").symlink_to(store)
        (images / "train/loop").symlink_to(images)  # does not end a search
        for image in coco["images"]:
            image["file_name"] = f"train/{image['file_name']}"
        coco["images"][3]["file_name"] = "TRAIN/img_4.png"
    dataset = read(folder, coco)
    assert len(dataset) == 4 and num_objects(dataset) == 5
    if kind != "the folder":
        assert "is outside of" in refused(folder, coco, follow_links=False)


def test_lvis_names_its_files_by_url(folder):
    coco = content()
    for image in coco["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
    assert read(folder, coco).file_name(2) == "img_2.png"


# ------------------------------------------------------------------------------------- images and their sizes


def missing_images(number, total=12):
    coco = content(total)
    for image in coco["images"][:number]:
        image["file_name"] = "gone_" + image["file_name"]
    return coco


@pytest.fixture
def many(tmp_path):
    for number in range(1, 41):
        save_image(tmp_path / f"images/img_{number}.png")
    return tmp_path


@pytest.mark.parametrize("number, total", [(1, 12), (3, 12), (4, 40)])
def test_some_missing_images_are_left_out(many, number, total):
    dataset = read(many, missing_images(number, total))
    assert len(dataset) == total - number
    assert dataset.bins == {"trained": total - number, "image missing": number + 1}
    text = f"{number} of {total} images are missing and left out, such as image 1: its file 'gone_img_1.png'"
    assert text in dataset.notes[0] and "the nearest file is 'img_1.png'" in dataset.notes[0]


@pytest.mark.parametrize("number, total", [(4, 12), (5, 40), (2, 4)])
def test_many_missing_images_need_a_flag(many, number, total):
    coco = missing_images(number, total)
    assert f"{number} of {total} images are missing" in (error := refused(many, coco))
    assert "--allow-missing" in error
    assert len(read(many, coco, allow_missing=True)) == total - number


def test_a_set_without_any_image_file_is_refused(many):
    assert "none of its 3 images is there" in refused(many, missing_images(3, 3), allow_missing=True)
    os.rename(many / "images", many / "pictures")
    assert "there is no image folder" in refused(many, content(), allow_missing=True)


@pytest.mark.parametrize("change", [{"height": None}, {"height": 0, "width": 0}, {"width": None}])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_missing_sizes_are_those_of_the_files_as_viewers_show_them(folder, change, suffix):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    save_image(folder / f"images/img_1.{suffix}", exif=exif)
    coco = content()
    coco["images"][0] |= change | {"file_name": f"img_1.{suffix}"}
    dataset = read(folder, coco)
    assert dataset.size(1) == (W, H) and dataset.image(1).size == (H, W)
    assert f"image sizes: 1 missing and taken from the image files, such as 'img_1.{suffix}'" in dataset.notes


def test_a_damaged_image_without_a_size_is_left_out(folder):
    coco = content()
    del coco["images"][3]["height"]
    (folder / "images/img_4.png").write_text("hello")
    dataset = read(folder, coco)
    assert dataset.image_ids == [1, 2, 3] and dataset.bins == {"trained": 4, "image missing": 1}
    assert "such as image 4: it has no size, and cannot read image" in dataset.notes[0]
    (folder / "images/img_4.png").write_text("version https://git-lfs.github.com/spec/v1")
    assert "git lfs pull" in refused(folder, coco)


def test_images_of_another_size_are_refused_before_training(folder):
    coco = content()
    coco["images"][2] |= {"height": 2 * H, "width": 2 * W}
    error = refused(folder, coco)
    assert "1 of 4 images have another size than their annotations: image 3 ('img_3.png') is 24 x 30" in error
    assert "annotations are for 48 x 60 (height x width); images were resized after annotation" in error


def test_exchanged_heights_and_widths_are_refused(folder):
    coco = content()
    for image in coco["images"]:
        image |= {"height": W, "width": H}
    assert "height and width are exchanged" in refused(folder, coco)
    rle = {"size": [W, H], "counts": [100, H * W - 100]}
    coco = content() | {"annotations": [annotation(1, 1, segmentation=()) | {"segmentation": rle}]}
    assert "of its RLE is [30, 24], that of its image [24, 30]; they are exchanged" in refused(folder, coco)


@pytest.mark.parametrize("size", [(H, W), (W, H)])
def test_a_rotated_photo_may_have_the_size_of_either_way(folder, size):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    save_image(folder / "images/img_1.png", exif=exif)
    coco = content()
    coco["images"][0] |= {"height": size[0], "width": size[1]}
    assert read(folder, coco).size(1) == size


def test_images_that_are_lfs_pointers_are_refused(folder):
    for number in (2, 4):
        text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        (folder / f"images/img_{number}.png").write_text(text)
    error = refused(folder, content())
    assert "2 images, such as 'img_2.png', are each a Git LFS pointer" in error and "git lfs pull" in error


def test_images_of_which_none_can_be_read_are_refused(folder):
    for number in (1, 2, 3):
        (folder / f"images/img_{number}.png").write_text("../store/img.png")
    assert len(read(folder, content())) == 4  # Training replaces damaged images.
    (folder / "images/img_4.png").write_text("../store/img.png")
    assert "none of 4 images can be read" in refused(folder, content())


# ----------------------------------------------------------------------------------------------------- masks

pairs = [[x, y] for x, y in zip(TRIANGLE[::2], TRIANGLE[1::2])]
rle = encode_rle([TRIANGLE], H, W)
rle = {"size": [H, W], "counts": rle["counts"].decode()}
flat = bitmap([TRIANGLE]).flatten(order="F")
runs = np.diff(np.flatnonzero(np.diff(flat, prepend=0, append=1 - flat[-1])), prepend=0).tolist()
FORMS = {
    "plain": ([TRIANGLE], False),
    "closed": ([[*TRIANGLE, *TRIANGLE[:2]]], False),
    "with a part of two corners": ([[1, 1, 9, 9], TRIANGLE], False),
    "numbers": (TRIANGLE, True),
    "numbers as text": ([list(map(str, TRIANGLE))], True),
    "corners": (pairs, True),
    "corners of one polygon": ([pairs], True),
    "corners as text": ([[list(map(str, corner)) for corner in pairs]], True),
    "one list too many": ([[TRIANGLE]], True),
    "OpenCV's contour": ([[corner] for corner in pairs], True),
    "OpenCV's contours": ([[[corner] for corner in pairs]], True),
    "a compressed RLE": (rle, False),
    "an RLE": ({"size": [H, W], "counts": runs}, False),
    "an RLE of text": ({"size": [str(H), float(W)], "counts": list(map(str, runs))}, False),
    "an RLE in a list": ([rle], True),
}


@pytest.mark.parametrize("segmentation, is_unusual", FORMS.values(), ids=FORMS)
def test_every_unambiguous_form_gives_the_same_mask(folder, segmentation, is_unusual):
    coco = content()
    coco["annotations"][1]["segmentation"] = segmentation
    dataset = read(folder, json.loads(json.dumps(coco)))
    assert np.array_equal(bitmap(dataset.objects(2)[0]["segmentation"]), bitmap([TRIANGLE]))
    note = (
        "masks: 1 nested otherwise than COCO's, or with numbers as text, read as meant, such as annotation 2"
    )
    assert dataset.notes == [f"{note} (image 2)"] * is_unusual and dataset.bins == {"trained": 5}


def test_several_polygons_keep_their_parts_in_every_form(folder):
    corners = [[SQUARE[i : i + 2] for i in range(0, 8, 2)], pairs]
    for segmentation in (
        [SQUARE, TRIANGLE],
        corners,
        [[SQUARE], [TRIANGLE]],
        [SQUARE, [1, 1], TRIANGLE, None],
    ):
        coco = content()
        coco["annotations"][1]["segmentation"] = segmentation
        mask = read(folder, coco).objects(2)[0]["segmentation"]
        assert np.array_equal(bitmap(mask), bitmap([SQUARE, TRIANGLE]))


DEFECTS = {
    "boxes only": [None, [], {}, [[]]],
    "unreadable form": [7, "text", [{"x": 1, "y": 2}], [[1, 1, 5, 5, 5, 1, 3]]],
    "fewer than three corners": [[[1, 1, 9, 9]], [1, 1, 9, 9], [[1, 1], [9, 9]]],
    "not numbers": [[[1, 1, 9, 9, math.nan, 3]], [["a", 1, 9, 9, 4, 3]], [[1, 1, 9, 9, 4, None]]],
    "outside": [[[40, 2, 50, 2, 50, 9]], [[-9, -9, -1, -9, -1, 0]]],
    "empty": [[[1, 1, 5, 5, 9, 9]], [[4, 4] * 5], [[1.1, 1, 9.9, 1, 3.3, 1, 4, 1]]],
    "duplicate": [[TRIANGLE]],
    "crowd": [[SQUARE]],
}


def test_every_annotation_ends_in_one_bin(folder):
    coco = content()
    for bin, masks in DEFECTS.items():
        for mask in masks:
            number = len(coco["annotations"]) + 1
            entry = annotation(number, 2, segmentation=(), iscrowd=int(bin == "crowd"))
            coco["annotations"] += [entry | {"segmentation": mask}]
    missing = {key: value for key, value in entry.items() if key != "segmentation"}
    coco["annotations"] += [missing | {"id": 90}, missing | {"id": 91, "image_id": 99}]
    coco["annotations"] += [
        annotation(number, number % 4 + 1, 2, [[number - 90, 1, 9, 1, 9, 9]]) for number in range(100, 120)
    ]
    dataset = read(folder, coco, strict=False)
    expected = {bin: len(masks) for bin, masks in DEFECTS.items()}
    expected |= {"trained": 25, "invalid": 1, "boxes only": 5}
    assert dataset.bins == expected and sum(dataset.bins.values()) == len(coco["annotations"])
    assert num_objects(dataset) == 25 and len(dataset.annotations(2)) == len(dataset.objects(2)) + 1
    for bin, count in expected.items():
        if BINS[bin]:
            assert sum(f"annotations left out: {count} {BINS[bin]}" in note for note in dataset.notes) == 1


def test_bins_are_printed_as_a_table_or_a_line():
    bins = {"trained": 1200, "boxes only": 3}
    assert format_bins(bins) == "1,200  trained\n    3  boxes only"
    assert format_bins(bins, one_line=True) == "1,203 annotations: 1,200 trained, 3 boxes only"


@pytest.mark.parametrize("segmentation", [None, [], {}])
def test_boxes_alone_are_refused_alike(folder, segmentation):
    coco = content()
    for entry in coco["annotations"]:
        entry |= {"bbox": [1, 1, 5, 5], "keypoints": [1, 1, 2], "segmentation": segmentation}
    text = "it has no object to train on (5 annotations: 0 trained, 5 boxes only); boxes are not enough"
    assert text in refused(folder, coco)


@pytest.mark.parametrize(
    "factor, message", [(4, "lie outside of their images"), (0.01, "no coordinate above 1")]
)
def test_coordinates_of_another_size_are_refused(folder, factor, message):
    coco = content()
    for entry in coco["annotations"]:
        entry["segmentation"] = [[factor * value for value in polygon] for polygon in entry["segmentation"]]
    error = refused(folder, coco)
    assert "of 5 objects, such as annotation" in error and message in error


def test_single_objects_that_leave_their_images_are_read(folder):
    """Annotators move corners beyond the border. Only a file with most objects outside is suspicious."""
    coco = content()
    coco["annotations"][0]["segmentation"] = [[-20, -20, 4, 2, 2, 8]]
    coco["annotations"][1]["segmentation"] = [[-0.2, 0, W + 0.2, 0, W + 0.2, H]]
    dataset = read(folder, coco)
    assert dataset.bins == {"trained": 5} and not dataset.notes


# ------------------------------------------------------------------------------------- crowds and categories


def with_crowds(number, total=5):
    coco = content()
    coco["annotations"] += [annotation(i, 3, 1, [[i, 0, 29, 0, 29, 9]]) for i in range(6, total + 1)]
    for entry in coco["annotations"][:number]:
        entry["iscrowd"] = 1
    return coco


def test_crowds_alone_are_refused_and_become_objects_by_a_flag(folder):
    error = refused(folder, with_crowds(5))
    assert "its masks are 5 crowds (iscrowd 1)" in error and "--crowd-is-object" in error
    dataset = read(folder, with_crowds(5), crowd_is_object=True)
    assert num_objects(dataset) == 5 and dataset.bins == {"trained": 5} and not dataset.notes


@pytest.mark.parametrize("number, total, is_noted", [(3, 5, True), (1, 20, False)])
def test_many_crowds_are_noted(folder, number, total, is_noted):
    dataset = read(folder, with_crowds(number, total))
    assert dataset.bins == {"trained": total - number, "crowd": number}
    assert num_objects(dataset) == total - number
    assert len(dataset.notes) == is_noted
    assert not is_noted or "3 of 5 masks are crowds" in dataset.notes[0]


UNUSED = {
    "another's name": [{"id": 0, "name": "rock", "supercategory": "none"}],
    "another's supercategory": [
        {"id": 0, "name": "things"},
        {"id": 1, "name": "rock", "supercategory": "things"},
    ],
    "the background": [{"id": 0, "name": "_background_"}],
    "Background": [{"id": "7", "name": "Background"}],
}


@pytest.mark.parametrize("categories", UNUSED.values(), ids=UNUSED)
def test_unused_categories_that_are_no_classes_are_left_out(folder, categories):
    coco = content()
    coco["categories"] = categories[:1] + (categories[1:] or coco["categories"][:1]) + coco["categories"][1:]
    dataset = read(folder, coco)
    assert dataset.class_names == ["rock", "bolt"] and dataset.labels(1) == [0, 1]
    assert "categories left out, as no annotation uses them" in dataset.notes[0]
    assert dataset.notes[0].endswith(f": {categories[0]['name']!r}")


def test_other_unused_categories_stay(folder):
    coco = content()
    coco["categories"] += [{"id": 9, "name": "person", "supercategory": "person"}]
    assert read(folder, coco).class_names == ["rock", "bolt", "person"]


# ---------------------------------------------------------------------------------------------- validation


@pytest.fixture
def train(folder):
    return read(folder, content())


def test_classes_of_validation_are_matched_by_name(folder, train):
    save_image(folder / "images/val.png")
    coco = {"images": [{"id": "v", "file_name": "val.png", "height": H, "width": W}]}
    coco["categories"] = [{"id": 1, "name": "nut"}, {"id": 2, "name": "rock"}]
    coco["annotations"] = [annotation(1, "v", 2), annotation(2, "v", 1, [SQUARE])]
    val = read(folder, coco, like=train)
    assert (val.class_names, val.category_ids) == (["rock", "bolt"], [1, 2])
    assert val.labels("v") == [0] and val.bins == {"trained": 1, "class not in training": 1}
    assert val.notes[0] == "classes left out: 1 not in the training set: 'nut'"
    assert "annotations left out: 1 of classes that are not in the training set" in val.notes[1]
    coco["categories"][1]["name"] = "stone"
    error = refused(folder, coco, like=train)
    assert "training has the classes ['rock', 'bolt'], validation ['nut', 'stone']" in error


def test_validation_files_that_are_training_files_are_noted(folder, train):
    save_image(folder / "images/val.png")
    (folder / "images/link.png").symlink_to("img_1.png")
    coco = content(3)
    for image, name in zip(coco["images"], ["val.png", "link.png", "img_3.png"]):
        image["file_name"] = name
    notes = read(folder, coco, like=train).notes
    assert notes == ["2 validation files are training files, so AP will be too high, such as 'link.png'"]


def test_empty_sets_are_refused_for_training_and_noted_for_validation(folder, train):
    empty = content() | {"images": [], "annotations": []}
    without_objects = content(1) | {"annotations": []}
    save_image(folder / "images/val.png")
    without_objects["images"][0]["file_name"] = "val.png"
    assert "it has no image" in refused(folder, empty)
    assert "it has no object to train on" in refused(folder, without_objects)
    val = read(folder, empty, like=train)
    assert len(val) == 0 and val.notes == ["it has no image, so AP is '-'"]
    val = read(folder, without_objects, like=train)
    assert len(val) == 1 and "it has no object to find" in val.notes[0]
    assert val.class_names == train.class_names
