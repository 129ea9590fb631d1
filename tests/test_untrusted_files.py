"""Tests with files from strangers: annotations, images and lists are read correctly, or refused with one
line that names the file and the problem."""

import io
import json
import os
import random
import runpy

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO

import data
from data import (
    Augmentation,
    AugmentedDataset,
    CocoDataset,
    DataError,
    SerializedList,
    UnlabeledImages,
    encode_rle,
    endless_batches,
    read_image,
    rle_runs,
    split_from_file,
)
from layouts import load_data, validate
from layouts.images import find_unlabeled
from layouts.validate import load_coco

H, W = 12, 20
POLYGON = [[2, 2, 15, 2, 15, 9, 2, 9]]


def encoded(mask):
    rle = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def content(**annotation):
    """Return the content of a COCO file with one image and one annotation, which the arguments change."""
    first = {"id": 5, "image_id": 7, "category_id": 2, "segmentation": POLYGON, "iscrowd": 0, "area": 91}
    return {
        "images": [{"id": 7, "file_name": "a.png", "height": H, "width": W}],
        "annotations": [first | annotation],
        "categories": [{"id": 2, "name": "cat"}, {"id": 9, "name": "dog"}],
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (H, W, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    return tmp_path


def read(folder, coco, strict=True, **options):
    """Write a COCO file, or any text, and read it."""
    text = coco if isinstance(coco, str) else json.dumps(coco)
    (folder / "a.json").write_text(text)
    return load_coco(folder / "a.json", folder / "images", strict, **options)


# ----------------------------------------------------------------------------------------- annotations


def test_a_valid_file_is_read(folder):
    dataset = read(folder, content())
    assert dataset.size(7) == (H, W) and dataset.labels(7) == [0]
    assert dataset.errors == dataset.notes == [] and dataset.bins == {"trained": 1}
    assert dataset.annotations(7)[0] == content()["annotations"][0] | {"area": 91.0}


def test_validated_and_trusted_reading_give_the_same_data_set(shapes):
    files = shapes / "instances_train.json", shapes / "images"
    validated, trusted = load_coco(*files), CocoDataset(*files)
    assert validated.image_ids == trusted.image_ids
    assert validated.class_names == trusted.class_names
    for image_id in trusted.image_ids:
        assert validated.annotations(image_id) == trusted.annotations(image_id)
        assert validated.path(image_id) == trusted.path(image_id)


def test_a_missing_annotation_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no annotation file '.*nowhere\.json'"):
        load_coco(tmp_path / "nowhere.json", tmp_path)


MALFORMED = {
    "not JSON": b'{"images": [',
    "not text": b"\xff\xfe\x00",
    "an empty file": b"",
    "a list": b"[]",
    "no categories": b'{"images": [], "annotations": []}',
    "an annotation without an image": b'{"images": [], "annotations": [{"image_id": 1}], "categories": []}',
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_annotation_file_is_named(tmp_path, text):
    (tmp_path / "broken.json").write_bytes(text)
    with pytest.raises(DataError, match=r"broken\.json"):
        load_coco(tmp_path / "broken.json", tmp_path)


def test_image_sizes_have_a_limit_although_pillow_has_none(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert runpy.run_path(validate.__file__, run_name="copy")["MAX_PIXELS"] > 10**8


ones = np.ones((H, W), dtype=bool)
REFUSED = {
    "an unknown category": ({"category_id": 3}, "annotation 5: its category_id 3 is not in the file"),
    "an unknown image": ({"image_id": 8}, "annotation 5: its image_id 8 is not in the file"),
    "an image id that is not a number": ({"image_id": [7]}, r"annotation 5: its image_id \[7\] is not"),
    "an RLE of another size": (
        {"segmentation": encoded(ones.T)},
        r"annotation 5: \(image 7\) the \(height, width\) of its RLE is \[20, 12\], "
        r"that of its image \[12, 20\]",
    ),
    "an RLE with a wrong sum": (
        {"segmentation": {"size": [H, W], "counts": [3, 4]}},
        "sum to 7, the image has 240",
    ),
    "a compressed RLE with a wrong sum": (
        {"segmentation": {"size": [H, W], "counts": encoded(ones[:, :3])["counts"]}},
        "sum to 36, the image has 240 pixels",
    ),
    "an RLE with negative runs": ({"segmentation": {"size": [H, W], "counts": [-3, 243]}}, "no valid counts"),
    "an RLE of text": ({"segmentation": {"size": [H, W], "counts": "hello world"}}, "are damaged|sum to"),
    "an RLE that ends early": ({"segmentation": {"size": [H, W], "counts": "0o"}}, "are damaged"),
    "an RLE of huge runs": ({"segmentation": {"size": [H, W], "counts": "o" * 30 + "0"}}, "are damaged"),
    "an absurd RLE": ({"segmentation": {"size": [10**9, 10**9], "counts": [10**18]}}, "of its RLE is"),
    "an RLE without counts": ({"segmentation": {"size": [H, W]}}, "no valid counts"),
    "an RLE of text in a list": ({"segmentation": {"size": [H, W], "counts": ["x"]}}, "no valid counts"),
    "no segmentation": ({"segmentation": None}, "no object to train on .* 1 boxes only"),
    "a number as segmentation": ({"segmentation": 3}, "no object to train on .* 1 unreadable form"),
    "a crowd that is a word": ({"iscrowd": "maybe"}, "annotation 5: its iscrowd 'maybe' is not 0 or 1"),
    "a crowd of several": ({"iscrowd": 2}, "its iscrowd 2 is not 0 or 1"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_an_invalid_annotation_is_refused_and_named_by_its_id(folder, change, message):
    with pytest.raises(DataError, match=message) as caught:
        read(folder, content(**change))
    assert "a.json" in str(caught.value) and "\n" not in str(caught.value)


LEFT_OUT = {
    "no polygon": ([], "boxes only"),
    "a number": (3, "unreadable form"),
    "two corners": ([[1, 1, 5, 5]], "fewer than three corners"),
    "an odd number of values": ([[1, 1, 5, 5, 5, 1, 7]], "unreadable form"),
    "not a number": ([[1, 1, 5, 5, 5, float("nan")]], "not numbers"),
    "infinity": ([[1, 1, 5, 5, 5, float("inf")]], "not numbers"),
    "far away": ([[1, 1, 5e9, 5, 5, 1]], "outside"),
    "words": ([["a", "b", "5", "5", "5", "1"]], "not numbers"),
    "dictionaries": ([[{"x": 1, "y": 1}, {"x": 5, "y": 5}, {"x": 5, "y": 1}]], "unreadable form"),
    "a deep nest": ([[[[[[[1, 1], [5, 5], [5, 1]]]]]]], "unreadable form"),
    "an absurd number": ([[1, 1, 5, 5, 5, 10**400]], "not numbers"),
    "an absurdly long outline": (
        [[v for x in range(5000) for v in (x % 20, 12 * (x % 2))]],
        "unreadable form",
    ),
    "an empty RLE": (encoded(~ones), "empty"),
    "an empty uncompressed RLE": ({"size": [H, W], "counts": [H * W]}, "empty"),
}


@pytest.mark.parametrize("segmentation, bin", LEFT_OUT.values(), ids=LEFT_OUT)
def test_an_annotation_without_a_mask_is_left_out_and_counted(folder, segmentation, bin):
    coco = content(segmentation=segmentation)
    coco["annotations"].append(content(id=6)["annotations"][0])
    dataset = read(folder, coco)
    assert [a["id"] for a in dataset.annotations(7)] == [6]
    assert dataset.bins == {"trained": 1, bin: 1} and len(dataset.notes) == 1
    assert f"left out: 1 {validate.BINS[bin]}, such as annotation 5 (image 7)" in dataset.notes[0]


def test_valid_polygons_are_kept_when_an_invalid_one_is_dropped(folder):
    dataset = read(folder, content(segmentation=[[1, 1, 5, 5], None, *POLYGON]))
    assert dataset.annotations(7)[0]["segmentation"] == POLYGON and dataset.bins == {"trained": 1}


def changed(key, **change):
    coco = content()
    coco[key][0] = coco[key][0] | change
    return coco


def doubled(key, **change):
    coco = content()
    coco[key] = [coco[key][0], coco[key][0] | change]
    return coco


def two_cells():
    coco = doubled("annotations", category_id=9)
    return coco | {"categories": [{"id": i, "name": "cell"} for i in (2, 9)]}


BROKEN = {
    "a duplicate image": (doubled("images"), "image 7: its id is used twice"),
    "a duplicate category": (doubled("categories"), "category 2: its id is used twice"),
    "an image id as number and text": (doubled("images", id="7"), "image '7': its id is used twice"),
    "two used categories of one name": (two_cells(), "category 9: its name 'cell' is used twice"),
    "no category at all": ({**content(), "categories": []}, "it has no category"),
    "a category without a name": (changed("categories", name=None), "category 2: its name None is not text"),
    "a height of 0": (changed("images", height=0), r"image 7: height and width \(0, 20\) are not a valid"),
    "a width that is a word": (changed("images", width="wide"), "are not a valid image size"),
    "an absurd size": (changed("images", height=10**9, width=10**9), "are not a valid image size"),
    "a missing file": (changed("images", file_name="b.png"), "image 7: its file 'b.png' is not in"),
    "a folder as file": (changed("images", file_name="."), "image 7: its file '.' is not in"),
    "no file name": (changed("images", file_name=None), "its file_name None is not a file name"),
    "half a character in the file name": (changed("images", file_name="\ud800.png"), "is not in"),
    "a zero in the file name": (
        changed("images", file_name="a\0.png"),
        "its file_name .* is not a file name",
    ),
    "a way out": (changed("images", file_name="../secret.png"), "'../secret.png' is outside of"),
    "an absolute path": (changed("images", file_name="/etc/passwd"), "'/etc/passwd' is outside of"),
    "a way out without a file": (changed("images", file_name="../none.png"), "'../none.png' is outside of"),
    "a link that leads out": (changed("images", file_name="link.png"), "'link.png' is outside of"),
    "a folder that leads out": (changed("images", file_name="way/secret.png"), "is outside of"),
    "an image that is a number": ({**content(), "images": [3]}, "image 3: it is not a dictionary"),
    "images as a dictionary": ({**content(), "images": {}}, "not a COCO instances file"),
    "no categories": ({"images": [], "annotations": []}, "not a COCO instances file"),
    "a deep nest": ("[" * 100_000, "not a COCO instances file"),
    "a long number": ('{"images": ' + "9" * 5000 + "}", "not a COCO instances file"),
}


@pytest.mark.parametrize("coco, message", BROKEN.values(), ids=BROKEN)
def test_a_file_that_contradicts_itself_or_its_images_is_refused(folder, coco, message):
    (folder / "secret.png").write_bytes((folder / "images" / "a.png").read_bytes())
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    (folder / "images" / "way").symlink_to(folder)
    with pytest.raises(DataError, match=message) as caught:
        read(folder, coco, follow_links=False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_link_to_an_image_within_the_folder_is_followed(folder):
    (folder / "images" / "b.png").symlink_to(folder / "images" / "a.png")
    for follow_links in (True, False):
        dataset = read(folder, changed("images", file_name="b.png"), follow_links=follow_links)
        assert dataset.image(7).size == (W, H)


def test_all_problems_are_counted_and_can_be_listed(folder):
    coco = content(category_id=3)
    coco["annotations"] += [content(id=6, image_id=8)["annotations"][0], content(id=8)["annotations"][0]]
    with pytest.raises(DataError, match="2 problems in all"):
        read(folder, coco)
    dataset = read(folder, coco, strict=False)
    assert dataset.bins == {"trained": 1, "invalid": 2}
    assert len(dataset.errors) == 2 and [a["id"] for a in dataset.annotations(7)] == [8]


@pytest.mark.parametrize("kind, change", [("images", {"file_name": "gone.png"}), ("categories", {"name": 3})])
def test_annotations_of_an_invalid_image_or_category_are_not_reported_again(folder, kind, change):
    dataset = read(folder, changed(kind, **change), strict=False)
    assert len(dataset.errors) == 1
    assert [annotation for i in dataset.image_ids for annotation in dataset.annotations(i)] == []


def mutated(rng, value):
    """Return a copy of a value with one random change: of a leaf, a key, an element or a whole part."""
    odd = [None, -1, 0, 3, 1e300, float("nan"), "", "x", [], {}, [[]], True, 10**30, "0" * 50, [1, 2]]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {("new" if k == key else k): v for k, v in value.items()}
        return value | {key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        index = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.1:
            return value[:index] + value[index + 1 :]
        if kind < 0.2:
            return value[: index + 1] + value[index:]
        return [mutated(rng, v) if i == index else v for i, v in enumerate(value)]
    if isinstance(value, str) and value and rng.random() < 0.5:
        index = rng.randrange(len(value))
        return value[:index] + chr(rng.randrange(1, 500)) + value[index + 1 :]
    return rng.choice(odd)


@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_files_are_either_read_or_refused(folder, tally, count):
    """A file that is read is safe to use: no mask crashes pycocotools, which trusts its input."""
    rng, loaded, refused = random.Random(0), 0, 0
    forms = POLYGON, encoded(ones), {"size": [H, W], "counts": [7, 200, 33]}
    for number, segmentation in enumerate(forms):
        for _ in range(number, count, len(forms)):
            coco = content(segmentation=segmentation)
            for _ in range(rng.randrange(1, 3)):
                coco = mutated(rng, coco)
            text = json.dumps(coco)
            if rng.random() < 0.1:
                cut = rng.randrange(len(text))
                text = text[:cut] + rng.choice(["", "}", "\\", "\ud800".encode("utf-8", "replace").decode()])
            try:
                dataset = read(folder, text)
            except DataError as error:
                assert "\n" not in str(error)
                refused += 1
                continue
            loaded += 1
            views = AugmentedDataset(dataset, Augmentation((32, 32)))
            for image_id in dataset.image_ids:
                for annotation in dataset.annotations(image_id):
                    rle_tools.decode(encode_rle(annotation["segmentation"], *dataset.size(image_id)))
                try:
                    assert len(views[image_id, 1]["labels"]) <= len(dataset.objects(image_id))
                except DataError as error:
                    assert "its annotations are for" in str(error)
    assert loaded > 0.05 * count and refused > 0.3 * count
    tally("mutated annotation files read or refused", loaded + refused, count, f"{loaded:,} of them read")


@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (300, 200)])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_the_runs_of_a_compressed_rle_equal_those_of_its_mask(shape, share):
    mask = np.random.default_rng(0).random(shape) < share
    if shape == (300, 200) and share == 0.5:
        mask = np.indices(shape).sum(0) % 300 < 149  # long runs
    flat = mask.flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    expected = np.diff(edges, prepend=0, append=flat.size)
    found = rle_runs(encoded(mask)["counts"])
    assert found.tolist() == expected[: len(found)].tolist() and not expected[len(found) :].any()


def test_every_annotation_has_the_mask_that_pycocotools_reads(shapes):
    train, _ = load_data(str(shapes))
    coco = COCO(train.json_file)
    for image_id in train.image_ids:
        by_id = {annotation["id"]: annotation for annotation in train.annotations(image_id)}
        expected = {annotation["id"]: annotation for annotation in coco.imgToAnns[image_id]}
        assert by_id.keys() == expected.keys()
        for number, annotation in by_id.items():
            mask = rle_tools.decode(encode_rle(annotation["segmentation"], *train.size(image_id)))
            assert np.array_equal(mask, coco.annToMask(expected[number]))


# ---------------------------------------------------------------------------------------------- images


def marked(mode_values=(200, 30, 60)):
    """Return a dark image with a bright upper left corner."""
    pixels = np.full((H, W, 3), 10, dtype=np.uint8)
    pixels[:4, :6] = mode_values
    return pixels


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_images_of_every_mode_have_the_right_pixels(tmp_path, mode, suffix):
    if mode in ("CMYK", "I"):  # a PNG has none
        suffix = ".tif"
    gray = marked((200, 200, 200))
    if mode.startswith("I"):
        dtype = np.uint16 if mode == "I;16" else np.int32
        image = Image.fromarray((gray[..., 0].astype(dtype) * 257).astype(dtype))
    elif mode in ("L", "LA"):
        image = Image.fromarray(gray).convert("L").convert(mode)
    elif mode == "1":
        image = Image.fromarray(gray).convert("L").point(lambda value: 255 * (value > 99)).convert("1")
    else:
        image = Image.fromarray(marked()).convert(mode, palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / f"a{suffix}")
    found = np.asarray(read_image(tmp_path / f"a{suffix}", (H, W)))
    expected = {"RGB": marked(), "RGBA": marked(), "P": marked(), "CMYK": marked()}.get(mode, gray)
    expected = 255 * (gray > 99) if mode == "1" else expected
    assert found.shape == (H, W, 3) and np.abs(found.astype(int) - expected).max() <= 1


def odd_image(rng) -> bytes:
    """Return an image file of any mode and format, down to one pixel, often damaged in some way."""
    mode, kind = rng.choice(MODES), rng.choice(["PNG", "TIFF", "JPEG", "WEBP", "BMP", "GIF", "PPM"])
    H, W = (rng.choice([1, 2, 7, 33]) for _ in range(2))
    pixels = np.frombuffer(rng.randbytes(H * W * 3), dtype=np.uint8).reshape(H, W, 3)
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16)) if mode == "I;16" else image.convert(mode)
    file = io.BytesIO()
    exif = image.getexif()
    exif[data.EXIF_ORIENTATION] = rng.randrange(0, 12)
    try:
        image.save(file, kind, **({"exif": exif} if kind in ("PNG", "TIFF", "JPEG", "WEBP") else {}))
    except (OSError, ValueError):  # a format without this mode
        image.convert("RGB").save(file, kind)
    content = bytearray(file.getvalue())
    for _ in range(rng.choice([0, 0, 1, 1, 2, 5])):
        place = rng.randrange(min(len(content), rng.choice([30, 10_000])))
        damage = rng.randrange(4)
        if damage == 0:
            content[place] ^= 1 << rng.randrange(8)
        elif damage == 1:
            content[place : place + 4] = rng.randbytes(4)
        elif damage == 2:
            content[place : place + 4] = b"\xff\xff\xff\xff"
        elif len(content) > 20:
            del content[place:]
            content += bytes(10)
    return bytes(content)


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB", "HSV"]


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # Pillow warns about the damage
def test_odd_images_are_either_read_or_refused(tmp_path, tally, count):
    rng, read_well, refused = random.Random(0), 0, 0
    for number in range(count):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(odd_image(rng))
        try:
            image = read_image(path)
            assert image.mode == "RGB" and np.asarray(image).shape == (image.height, image.width, 3)
            read_well += 1
        except DataError as error:
            assert repr(str(path)) in str(error) and "\n" not in str(error), str(error)
            refused += 1
    assert read_well > 0.3 * count and refused > 0.1 * count
    tally("odd images read or refused", read_well + refused, count, f"{read_well} of them read")


def test_transparency_is_dropped(tmp_path):
    pixels = np.concatenate([marked(), np.zeros((H, W, 1), dtype=np.uint8)], axis=2)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), marked())


@pytest.mark.parametrize(
    "orientation, shown", [(o, True) for o in range(1, 9)] + [(o, False) for o in range(5, 9)]
)
def test_an_image_is_rotated_like_its_annotations(tmp_path, orientation, shown):
    """Annotations are for the image as viewers show it. Those for the stored pixels are recognized by their
    size."""
    image = Image.fromarray(marked())
    exif = image.getexif()
    exif[data.EXIF_ORIENTATION] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    turns = [
        lambda x: x, lambda x: x[:, ::-1], lambda x: x[::-1, ::-1], lambda x: x[::-1],
        lambda x: x.swapaxes(0, 1), lambda x: x.swapaxes(0, 1)[:, ::-1],
        lambda x: x.swapaxes(0, 1)[::-1, ::-1], lambda x: x.swapaxes(0, 1)[::-1],
    ]  # fmt: skip
    upright = turns[orientation - 1](marked())
    if shown:
        for size in (None, upright.shape[:2]):
            assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", size)), upright)
    else:
        assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", (H, W))), marked())


def test_an_image_whose_annotations_have_another_size_is_refused(folder):
    with pytest.raises(DataError, match="it is 12 x 20, its annotations are for 20 x 13"):
        read_image(folder / "images" / "a.png", (20, 13))


def truncated(path):
    path.write_bytes(path.read_bytes()[:200])


def emptied(path):
    path.write_bytes(b"")


def bomb(path):
    """Let a PNG claim 100,000 x 100,000 pixels."""
    whole = bytearray(path.read_bytes())
    whole[16:24] = (100_000).to_bytes(4, "big") * 2
    path.write_bytes(whole)


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif': it has floating-point pixels"):
        read_image(tmp_path / "a.tif")


DAMAGES = [truncated, emptied, bomb, lambda path: path.write_text("hello"), lambda path: path.unlink()]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_image_is_named(folder, damage):
    damage(folder / "images" / "a.png")
    with pytest.raises(DataError, match=r"a\.png"):
        read_image(folder / "images" / "a.png")


@pytest.fixture
def many(tmp_path):
    """Write a dataset of 250 small images."""
    (tmp_path / "images").mkdir()
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    for number in range(250):
        Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(tmp_path / f"images/{number}.png")
        coco["images"].append({"id": number, "file_name": f"{number}.png", "height": 8, "width": 8})
    (tmp_path / "a.json").write_text(json.dumps(coco))
    return CocoDataset(tmp_path / "a.json", tmp_path / "images")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_is_replaced_and_named_once(many, capsys, num_workers):
    emptied(many.path(3))
    views = AugmentedDataset(many, Augmentation((32, 32), lsj_scale=(1.0, 1.0)))
    others = AugmentedDataset(many, Augmentation((32, 32), lsj_scale=(1.0, 1.0)))
    batches = endless_batches(views, many.image_ids, 50, seed=0, num_workers=num_workers)
    values = [value for _ in range(15) for value in next(batches)["image"][:, 0, 0, 0].tolist()]
    assert len(values) == 750 and 3 not in values
    assert all(values.count(number) >= 3 for number in range(250) if number != 3)
    error = capsys.readouterr().err
    assert error.count("warning") == 1 and "3.png" in error
    batch = next(batches)
    assert set(batch) == {"file", "image", "targets"} and len(batch["file"]) == len(batch["targets"]) == 50
    assert torch.equal(others[4, 1]["image"], views[4, 1]["image"])


def test_the_only_other_image_replaces_a_damaged_one(folder):
    """One damaged image never ends a run, however often it is drawn."""
    (folder / "images" / "b.png").write_text("hello")
    coco = content()
    coco["images"].append(coco["images"][0] | {"id": 8, "file_name": "b.png"})
    views = AugmentedDataset(read(folder, coco), Augmentation((32, 32)))
    batches = endless_batches(views, [7, 8], 50, seed=0)
    for _ in range(20):
        assert next(batches)["image"].shape == (50, 3, 32, 32)


def test_an_image_without_a_usable_replacement_is_an_error(many):
    for image_id in many.image_ids[:100]:
        emptied(many.path(image_id))
    batches = endless_batches(AugmentedDataset(many, Augmentation((32, 32))), range(100), 1, seed=0)
    with pytest.raises(DataError, match="5 of 100 images cannot be used"):
        next(batches)


def test_more_than_one_percent_of_damaged_images_is_an_error(many):
    for number in range(3):
        emptied(many.path(number))
    batches = endless_batches(AugmentedDataset(many, Augmentation((32, 32))), many.image_ids, 50, seed=0)
    with pytest.raises(DataError, match=r"3 of 250 images cannot be used, such as: .*0\.png"):
        for _ in range(5):
            next(batches)


# ------------------------------------------------------------------------------------- lists and folders


def test_unlabeled_images_are_those_of_the_data_set_and_of_the_folders(folder):
    dataset = read(folder, content())
    (folder / "more" / "deep").mkdir(parents=True)
    for name in ("more/b.png", "more/deep/C.PNG", "more/deep/d.jpg", "more/e.gif", "more/f.jp2"):
        Image.fromarray(marked()).save(folder / name)
    (folder / "more" / "notes.txt").write_text("no image")
    paths, counts, notes = find_unlabeled([folder / "more"], dataset, None)
    assert counts == {str(folder / "more"): 5} and notes == []
    unlabeled = UnlabeledImages(dataset, paths)
    names = [os.path.basename(unlabeled.path(i)) for i in unlabeled.image_ids]
    assert names == ["a.png", "b.png", "C.PNG", "d.jpg", "e.gif", "f.jp2"]
    assert [unlabeled.size(i) for i in unlabeled.image_ids] == [(H, W)] + 5 * [None]
    assert unlabeled.image(0).size == unlabeled.image(2).size == (W, H)
    views = AugmentedDataset(unlabeled, Augmentation((32, 32)), labels=False, strong=True)
    assert all(set(views[i, 0]) == {"image", "file", "strong"} for i in unlabeled.image_ids)


def test_images_of_the_data_set_are_not_added_from_folders(folder):
    Image.fromarray(marked()).save(folder / "images" / "b.png")
    dataset = read(folder, content())
    paths, _, _ = find_unlabeled([folder / "images"], dataset, None)
    assert paths == [os.path.realpath(folder / "images" / "b.png")]
    (folder / "images" / "b.png").unlink()
    with pytest.raises(DataError, match="no further image below"):
        find_unlabeled([folder / "images"], dataset, None)
    with pytest.raises(DataError, match="cannot read unlabeled images: no folder '.*nowhere'"):
        find_unlabeled([folder / "nowhere"], dataset, None)


def test_links_are_followed_and_no_image_is_added_twice(folder):
    """Otherwise a validation image could enter training under another name."""
    dataset = read(folder, content())
    (folder / "farm" / "deep").mkdir(parents=True)
    (folder / "else").mkdir()
    Image.fromarray(marked()).save(folder / "else" / "b.png")
    (folder / "farm" / "known.png").symlink_to(folder / "images" / "a.png")
    (folder / "farm" / "deep" / "else").symlink_to(folder / "else")
    (folder / "farm" / "deep" / "loop").symlink_to(folder / "farm")
    folders = [folder / "farm", folder / "else", folder / "farm"]
    paths, counts, _ = find_unlabeled(folders, dataset, None)
    assert paths == [os.path.realpath(folder / "else" / "b.png")]
    assert counts == {str(folder / "farm"): 1, str(folder / "else"): 0}


def test_a_serialized_list_equals_the_list():
    items = [{"a": [1.5, None]}, "", 3, [], "x" * 1000]
    serialized = SerializedList(items)
    assert len(serialized) == 5 and [serialized[i] for i in range(5)] == items
    assert len(SerializedList([])) == 0


@pytest.fixture
def cities(tmp_path):
    names = [f"train/ulm/ulm_00000{n}_000019_leftImg8bit.png" for n in range(4)] + [
        "other/ulm.png",
        "a/x.png",
        "b/x.png",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(marked()).save(tmp_path / name)
    images = [{"id": 10 + i, "file_name": name, "height": H, "width": W} for i, name in enumerate(names)]
    (tmp_path / "a.json").write_text(json.dumps({**content(), "images": images, "annotations": []}))
    return CocoDataset(tmp_path / "a.json", tmp_path)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("ulm_000001_000019_gtFine_instanceIds.png\nulm_000000_000019_gtFine_instanceIds.png", [10, 11]),
        ("train/ulm/ulm_000001_000019_gtFine_instanceIds.png\r\n\r\n", [11]),
        ("train/ulm/ulm_000003_000019_leftImg8bit.png\n", [13]),
        ("ulm_000003_000019\n11\n", [11, 13]),
        ("a/x.png\nother/ulm", [14, 15]),
        ("ulm.png\nulm.png\n", [14]),
        ("\ufeffa/x.png\n", [15]),
    ],
)
def test_a_labeled_list_is_read_by_names_or_ids(cities, tmp_path, text, expected):
    (tmp_path / "split.txt").write_text(text)
    assert split_from_file(tmp_path / "split.txt", cities) == expected


def test_an_exact_match_wins_over_looser_ones(tmp_path):
    """The names are numbers, differ in their suffix only, contain a dot, or begin like JSON."""
    names = ["0.png", "1.png", "2.png", "c.jpg", "c.png", "a.b.png", "[1].png"]
    for name in names:
        Image.fromarray(marked()).save(tmp_path / name)
    images = [{"id": i, "file_name": n, "height": H, "width": W} for i, n in enumerate(names, start=1)]
    (tmp_path / "a.json").write_text(json.dumps({**content(), "images": images, "annotations": []}))
    dataset = CocoDataset(tmp_path / "a.json", tmp_path)
    for line, number in (
        ("2.png", 3),
        ("2", 3),
        ("6", 6),
        ("c.png", 5),
        ("c.jpg", 4),
        ("a.b", 6),
        ("1.jpg", 2),
        ("[1].png", 7),
    ):
        (tmp_path / "split.txt").write_text(line)
        assert split_from_file(tmp_path / "split.txt", dataset) == [number]


JSON_LIST = (
    r"^the labeled list '.*split\.txt' is a JSON file; write one image per line \(a file name or an id\)$"
)


@pytest.mark.parametrize(
    "text, message",
    [
        ("ulm\n\nnobody.png", "line 3: 'nobody.png' matches 0 images"),
        ("x.png", "line 1: 'x.png' matches 2 images, not one"),
        ("\n \n", "is empty; write one image per line"),
        (b"\xff\xfe", "cannot read the labeled list"),
        ('["ulm.png"]', JSON_LIST),
        ("\n [\n  15,\n  16\n]\n", JSON_LIST),
        ('\ufeff{"images": []}', JSON_LIST),
    ],
)
def test_a_line_that_matches_no_image_or_several_is_refused(cities, tmp_path, text, message):
    (tmp_path / "split.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        split_from_file(tmp_path / "split.txt", cities)
