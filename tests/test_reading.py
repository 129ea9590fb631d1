"""Files of strangers: annotations, images and lists are right, or refused in one line that says what is wrong
and where."""

import io
import json
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO

import data
from data import (
    CocoDataset,
    DataError,
    Packed,
    Pool,
    View,
    Views,
    find_data,
    listed_split,
    load_data,
    read_image,
    rle_runs,
    stream,
)

H, W = 12, 20
POLYGON = [[2, 2, 15, 2, 15, 9, 2, 9]]


def encoded(mask):
    rle = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def content(**annotation):
    """A data set of one image with one annotation, which the arguments change."""
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


def read(folder, what, **how):
    text = what if isinstance(what, str) else json.dumps(what)
    (folder / "a.json").write_text(text)
    return CocoDataset(folder / "a.json", folder / "images", **how)


# ----------------------------------------------------------------------------------------- annotations


def test_what_is_right_is_read(folder):
    dataset = read(folder, content())
    assert dataset.size(7) == (H, W) and dataset.labels(7) == [0] and not dataset.dropped
    assert dataset.annotations(7)[0] == content()["annotations"][0] | {"area": 91.0}


ones = np.ones((H, W), dtype=bool)
REFUSED = {
    "an unknown category": ({"category_id": 3}, "annotation 5: its category_id 3 is not in the file"),
    "an unknown image": ({"image_id": 8}, "annotation 5: its image_id 8 is not in the file"),
    "an image id that is no number": ({"image_id": [7]}, r"annotation 5: its image_id \[7\] is not"),
    "an RLE of another size": (
        {"segmentation": encoded(ones.T)},
        r"annotation 5: \(image 7\) its RLE is of \(height, width\) \[20, 12\], the image of \[12, 20\]",
    ),
    "an RLE with a wrong sum": (
        {"segmentation": {"size": [H, W], "counts": [3, 4]}},
        "sum to 7, the image has 240",
    ),
    "a compressed RLE with a wrong sum": (
        {"segmentation": {"size": [H, W], "counts": encoded(ones[:, :3])["counts"]}},
        "sum to 36, the image has 240 pixels",
    ),
    "an RLE with negative runs": ({"segmentation": {"size": [H, W], "counts": [-3, 243]}}, "no counts"),
    "an RLE of text": ({"segmentation": {"size": [H, W], "counts": "hello world"}}, "are damaged|sum to"),
    "an RLE that ends early": ({"segmentation": {"size": [H, W], "counts": "0o"}}, "are damaged"),
    "an RLE of huge runs": ({"segmentation": {"size": [H, W], "counts": "o" * 30 + "0"}}, "are damaged"),
    "an absurd RLE": ({"segmentation": {"size": [10**9, 10**9], "counts": [10**18]}}, "its RLE is of"),
    "an RLE without counts": ({"segmentation": {"size": [H, W]}}, "no counts"),
    "no segmentation": ({"segmentation": None}, "neither polygons nor an RLE"),
    "a number as segmentation": ({"segmentation": 3}, "neither polygons nor an RLE"),
    "a crowd that is text": ({"iscrowd": "0"}, "its iscrowd is '0', not 0 or 1"),
    "no id": ({"id": None}, "annotation None: its id is no whole number"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_an_annotation_at_odds_with_its_file_is_refused_with_its_id(folder, change, message):
    with pytest.raises(DataError, match=message) as caught:
        read(folder, content(**change))
    assert "a.json" in str(caught.value) and "\n" not in str(caught.value)


DROPPED = {
    "no polygon": [],
    "two corners": [[1, 1, 5, 5]],
    "an odd number of values": [[1, 1, 5, 5, 5, 1, 7]],
    "not a number": [[1, 1, 5, 5, 5, float("nan")]],
    "infinity": [[1, 1, 5, 5, 5, float("inf")]],
    "far away": [[1, 1, 5e9, 5, 5, 1]],
    "text": [["1", "1", "5", "5", "5", "1"]],
    "a list of numbers": [1, 1, 5, 5, 5, 1],
    "lists in lists": [[[1, 1], [5, 5], [5, 1]]],
    "an absurd number": [[1, 1, 5, 5, 5, 10**400]],
    "an empty RLE": encoded(~ones),
    "an empty uncompressed RLE": {"size": [H, W], "counts": [H * W]},
}


@pytest.mark.parametrize("segmentation", DROPPED.values(), ids=DROPPED)
def test_an_annotation_without_a_mask_is_left_out_and_counted(folder, segmentation):
    what = content(segmentation=segmentation)
    what["annotations"].append(content(id=6)["annotations"][0])
    dataset = read(folder, what)
    assert [a["id"] for a in dataset.annotations(7)] == [6]
    assert dataset.dropped == ["annotation 5 (image 7) has no mask"]


def test_good_polygons_stay_when_a_bad_one_goes(folder):
    dataset = read(folder, content(segmentation=[[1, 1, 5, 5], *POLYGON]))
    assert dataset.annotations(7)[0]["segmentation"] == POLYGON and not dataset.dropped


def changed(key, **change):
    what = content()
    what[key][0] = what[key][0] | change
    return what


def doubled(key):
    what = content()
    what[key] = what[key][:1] * 2
    return what


BROKEN = {
    "a duplicate annotation": (doubled("annotations"), "annotation 5: another one has the same id"),
    "a duplicate image": (doubled("images"), "image 7: another one has the same id"),
    "a duplicate category": (doubled("categories"), "category 2: another one has the same id"),
    "two categories of one name": (
        {**content(), "categories": [{"id": i, "name": "cell"} for i in (2, 3)]},
        "category 3: another one has the name 'cell' too",
    ),
    "a category without a name": (changed("categories", name=None), "category 2: its name is None"),
    "a height of 0": (changed("images", height=0), r"image 7: height and width \(0, 20\) are no size"),
    "a width that is text": (changed("images", width="20"), "are no size"),
    "an absurd size": (changed("images", height=10**9, width=10**9), "are no size"),
    "a missing file": (changed("images", file_name="b.png"), "image 7: its file 'b.png' is not in"),
    "a folder as file": (changed("images", file_name="."), "image 7: its file '.' is not in"),
    "no file name": (changed("images", file_name=None), "its file_name is None"),
    "half a character in the file name": (changed("images", file_name="\ud800.png"), "is not in"),
    "a zero in the file name": (changed("images", file_name="a\0.png"), "its file_name is"),
    "a way out": (changed("images", file_name="../secret.png"), "'../secret.png' leads out of"),
    "an absolute path": (changed("images", file_name="/etc/passwd"), "'/etc/passwd' leads out of"),
    "a link that leads out": (changed("images", file_name="link.png"), "'link.png' leads out of"),
    "a folder that leads out": (changed("images", file_name="way/secret.png"), "leads out of"),
    "an image that is a number": ({**content(), "images": [3]}, "image 3: its id is no whole number"),
    "images as a dictionary": ({**content(), "images": {}}, "not a COCO instances file"),
    "no categories": ({"images": [], "annotations": []}, "not a COCO instances file"),
    "a deep nest": ("[" * 100_000, "not a COCO instances file"),
    "a long number": ('{"images": ' + "9" * 5000 + "}", "not a COCO instances file"),
}


@pytest.mark.parametrize("what, message", BROKEN.values(), ids=BROKEN)
def test_a_file_at_odds_with_itself_or_its_images_is_refused(folder, what, message):
    (folder / "secret.png").write_bytes((folder / "images" / "a.png").read_bytes())
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    (folder / "images" / "way").symlink_to(folder)
    with pytest.raises(DataError, match=message) as caught:
        read(folder, what)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_link_within_the_folder_is_a_file_like_any_other(folder):
    (folder / "images" / "b.png").symlink_to(folder / "images" / "a.png")
    assert read(folder, changed("images", file_name="b.png")).image(7).size == (W, H)


def test_all_problems_are_counted_and_can_be_listed(folder):
    what = content(category_id=3)
    what["annotations"] += [content(id=6, image_id=8)["annotations"][0], content(id=8)["annotations"][0]]
    with pytest.raises(DataError, match="2 problems in all"):
        read(folder, what)
    dataset = read(folder, what, strict=False)
    assert len(dataset.errors) == 2 and [a["id"] for a in dataset.annotations(7)] == [8]


@pytest.mark.parametrize("kind, change", [("images", {"file_name": "gone.png"}), ("categories", {"name": 3})])
def test_annotations_of_what_is_refused_are_no_further_problems(folder, kind, change):
    dataset = read(folder, changed(kind, **change), strict=False)
    assert len(dataset.errors) == 1
    assert [annotation for i in dataset.image_ids for annotation in dataset.annotations(i)] == []


def mutated(rng, value):
    """The value with something in it changed: a leaf, a key, an element, or a whole part."""
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
def test_mutated_files_are_read_or_refused(folder, tally, count):
    """And what is read can be used: no mask crashes pycocotools, which trusts its input."""
    rng, loaded, refused = random.Random(0), 0, 0
    forms = POLYGON, encoded(ones), {"size": [H, W], "counts": [7, 200, 33]}
    for number, segmentation in enumerate(forms):
        for _ in range(number, count, len(forms)):
            what = content(segmentation=segmentation)
            for _ in range(rng.randrange(1, 3)):
                what = mutated(rng, what)
            text = json.dumps(what)
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
            views = Views(dataset, View((32, 32)))
            for image_id in dataset.image_ids:
                for annotation in dataset.annotations(image_id):
                    rle_tools.decode(data.to_rle(annotation["segmentation"], *dataset.size(image_id)))
                try:
                    assert len(views[image_id, 1]["labels"]) <= len(dataset.objects(image_id))
                except DataError as error:
                    assert "its annotations are for" in str(error)
    assert loaded > 0.05 * count and refused > 0.3 * count
    tally("mutated annotation files read or refused", loaded + refused, count, f"{loaded:,} of them read")


@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (300, 200)])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_runs_of_a_compressed_rle_equal_those_of_its_mask(shape, share):
    mask = np.random.default_rng(0).random(shape) < share
    if shape == (300, 200) and share == 0.5:
        mask = np.indices(shape).sum(0) % 300 < 149  # long runs
    flat = mask.flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    expected = np.diff(edges, prepend=0, append=flat.size)
    found = rle_runs(encoded(mask)["counts"])
    assert found.tolist() == expected[: len(found)].tolist() and not expected[len(found) :].any()


def test_every_annotation_of_a_file_has_the_mask_of_pycocotools(shapes):
    train, _ = load_data(str(shapes))
    coco = COCO(train.json_file)
    for image_id in train.image_ids:
        by_id = {annotation["id"]: annotation for annotation in train.annotations(image_id)}
        theirs = {annotation["id"]: annotation for annotation in coco.imgToAnns[image_id]}
        assert by_id.keys() == theirs.keys()
        for number, annotation in by_id.items():
            mask = rle_tools.decode(data.to_rle(annotation["segmentation"], *train.size(image_id)))
            assert np.array_equal(mask, coco.annToMask(theirs[number]))


# ---------------------------------------------------------------------------------------------- images


def marked(mode_values=(200, 30, 60)):
    """A dark image with a bright upper left corner."""
    pixels = np.full((H, W, 3), 10, dtype=np.uint8)
    pixels[:4, :6] = mode_values
    return pixels


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_images_of_every_mode_have_the_right_pixels(tmp_path, mode, suffix):
    if mode in ("CMYK", "I"):  # a PNG has none
        suffix = ".tif"
    grey = marked((200, 200, 200))
    if mode.startswith("I"):
        dtype = np.uint16 if mode == "I;16" else np.int32
        image = Image.fromarray((grey[..., 0].astype(dtype) * 257).astype(dtype))
    elif mode in ("L", "LA"):
        image = Image.fromarray(grey).convert("L").convert(mode)
    elif mode == "1":
        image = Image.fromarray(grey).convert("L").point(lambda value: 255 * (value > 99)).convert("1")
    else:
        image = Image.fromarray(marked()).convert(mode, palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / f"a{suffix}")
    found = np.asarray(read_image(tmp_path / f"a{suffix}", (H, W)))
    expected = {"RGB": marked(), "RGBA": marked(), "P": marked(), "CMYK": marked()}.get(mode, grey)
    expected = 255 * (grey > 99) if mode == "1" else expected
    assert found.shape == (H, W, 3) and np.abs(found.astype(int) - expected).max() <= 1


def odd_image(rng) -> bytes:
    """An image file of any mode and format, down to one pixel, often damaged in one way or another."""
    mode, kind = rng.choice(MODES), rng.choice(["PNG", "TIFF", "JPEG", "WEBP", "BMP", "GIF", "PPM"])
    H, W = (rng.choice([1, 2, 7, 33]) for _ in range(2))
    pixels = np.frombuffer(rng.randbytes(H * W * 3), dtype=np.uint8).reshape(H, W, 3)
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16)) if mode == "I;16" else image.convert(mode)
    file = io.BytesIO()
    exif = image.getexif()
    exif[data.ORIENTATION] = rng.randrange(0, 12)
    try:
        image.save(file, kind, **({"exif": exif} if kind in ("PNG", "TIFF", "JPEG", "WEBP") else {}))
    except (OSError, ValueError):  # a format that does not know the mode
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
@pytest.mark.filterwarnings("ignore")  # Pillow's, about the damages
def test_odd_images_are_read_or_refused(tmp_path, tally, count):
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


def test_transparency_is_left_out(tmp_path):
    pixels = np.concatenate([marked(), np.zeros((H, W, 1), dtype=np.uint8)], axis=2)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), marked())


@pytest.mark.parametrize(
    "orientation, shown", [(o, True) for o in range(1, 9)] + [(o, False) for o in range(5, 9)]
)
def test_an_image_is_turned_as_its_annotations_are(tmp_path, orientation, shown):
    """Annotations are for the image as it is shown; those for the stored pixels are known by their size."""
    image = Image.fromarray(marked())
    exif = image.getexif()
    exif[data.ORIENTATION] = orientation
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


def test_an_image_of_another_size_than_its_annotations_is_refused(folder):
    with pytest.raises(DataError, match="is 12 x 20, its annotations are for 20 x 13"):
        read_image(folder / "images" / "a.png", (20, 13))


def truncated(path):
    path.write_bytes(path.read_bytes()[:200])


def emptied(path):
    path.write_bytes(b"")


def bomb(path):
    """A PNG that claims 100,000 x 100,000 pixels."""
    whole = bytearray(path.read_bytes())
    whole[16:24] = (100_000).to_bytes(4, "big") * 2
    path.write_bytes(whole)


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif' has floating-point pixels"):
        read_image(tmp_path / "a.tif")


DAMAGES = [truncated, emptied, bomb, lambda path: path.write_text("hello"), lambda path: path.unlink()]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_image_is_named(folder, damage):
    damage(folder / "images" / "a.png")
    with pytest.raises(DataError, match=r"a\.png"):
        read_image(folder / "images" / "a.png")


@pytest.fixture
def many(tmp_path):
    """A data set of 250 small images."""
    (tmp_path / "images").mkdir()
    what = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    for number in range(250):
        Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(tmp_path / f"images/{number}.png")
        what["images"].append({"id": number, "file_name": f"{number}.png", "height": 8, "width": 8})
    (tmp_path / "a.json").write_text(json.dumps(what))
    return CocoDataset(tmp_path / "a.json", tmp_path / "images")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_gives_way_to_another_one_and_is_named_once(many, capsys, workers):
    emptied(many.path(3))
    views = Views(many, View((32, 32), scale=(1.0, 1.0)))
    whole = Views(many, View((32, 32), scale=(1.0, 1.0)))
    batches = stream(views, many.image_ids, 50, seed=0, workers=workers)
    values = [int(item["image"][0, 0, 0]) for _ in range(15) for item in next(batches)]
    assert len(values) == 750 and 3 not in values
    assert all(values.count(number) >= 3 for number in range(250) if number != 3)
    error = capsys.readouterr().err
    assert error.count("warning") == 1 and "3.png" in error
    assert all(set(item) == {"file", "image", "labels", "masks"} for item in next(batches))
    assert torch.equal(whole[4, 1]["image"], views[4, 1]["image"])


def test_the_only_other_image_takes_the_place_of_a_damaged_one(folder):
    """However often it is drawn: one damaged image never ends a run."""
    (folder / "images" / "b.png").write_text("hello")
    what = content()
    what["images"].append(what["images"][0] | {"id": 8, "file_name": "b.png"})
    batches = stream(Views(read(folder, what), View((32, 32))), [7, 8], 50, seed=0)
    for _ in range(20):
        assert len(next(batches)) == 50


def test_more_than_one_percent_of_damaged_images_end_the_stream(many):
    for number in range(3):
        emptied(many.path(number))
    batches = stream(Views(many, View((32, 32))), many.image_ids, 50, seed=0)
    with pytest.raises(DataError, match=r"3 of 250 images cannot be used, such as: .*0\.png"):
        for _ in range(5):
            next(batches)


# ------------------------------------------------------------------------------------- lists and folders


def test_the_pool_has_the_images_of_the_data_set_and_those_of_folders(folder):
    dataset = read(folder, content())
    (folder / "more" / "deep").mkdir(parents=True)
    for name in ("more/b.png", "more/deep/C.PNG", "more/deep/d.jpg", "more/e.gif", "more/f.jp2"):
        Image.fromarray(marked()).save(folder / name)
    (folder / "more" / "notes.txt").write_text("no image")
    pool = Pool(dataset, [folder / "more"])
    names = [os.path.basename(pool.path(i)) for i in pool.image_ids]
    assert names == ["a.png", "b.png", "C.PNG", "d.jpg", "e.gif", "f.jp2"]
    assert [pool.size(i) for i in pool.image_ids] == [(H, W)] + 5 * [None]
    assert pool.image(0).size == pool.image(2).size == (W, H)
    views = Views(pool, View((32, 32)), labels=False, strong=True)
    assert all(set(views[i, 0]) == {"image", "strong"} for i in pool.image_ids)


def test_images_of_an_annotation_file_do_not_join_the_pool_again(folder):
    Image.fromarray(marked()).save(folder / "images" / "b.png")
    dataset = read(folder, content())
    pool = Pool(dataset, [folder / "images"], known=[dataset, None])
    assert len(pool.image_ids) == 2
    (folder / "images" / "b.png").unlink()
    with pytest.raises(DataError, match="no further image below"):
        Pool(dataset, [folder / "images"], known=[dataset])
    with pytest.raises(DataError, match="no folder '.*nowhere'"):
        Pool(dataset, [folder / "nowhere"])


def test_links_are_followed_and_nothing_joins_the_pool_twice(folder):
    """Else an image for validation could slip in under another name."""
    dataset = read(folder, content())
    (folder / "farm" / "deep").mkdir(parents=True)
    (folder / "else").mkdir()
    Image.fromarray(marked()).save(folder / "else" / "b.png")
    (folder / "farm" / "known.png").symlink_to(folder / "images" / "a.png")
    (folder / "farm" / "deep" / "else").symlink_to(folder / "else")
    (folder / "farm" / "deep" / "loop").symlink_to(folder / "farm")
    pool = Pool(dataset, [folder / "farm", folder / "else", folder / "farm"], known=[dataset])
    assert [os.path.basename(pool.path(i)) for i in pool.image_ids] == ["a.png", "b.png"]


def test_a_packed_list_is_the_list():
    items = [{"a": [1.5, None]}, "", 3, [], "x" * 1000]
    packed = Packed(items)
    assert len(packed) == 5 and [packed[i] for i in range(5)] == items
    assert len(Packed([])) == 0


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
    ],
)
def test_a_split_is_a_list_of_names(cities, tmp_path, text, expected):
    (tmp_path / "split.txt").write_text(text)
    assert listed_split(tmp_path / "split.txt", cities) == expected


def test_what_fits_exactly_comes_first(tmp_path):
    """Numbered files, two endings of one name, a dot within a name."""
    names = ["0.png", "1.png", "2.png", "c.jpg", "c.png", "a.b.png"]
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
    ):
        (tmp_path / "split.txt").write_text(line)
        assert listed_split(tmp_path / "split.txt", dataset) == [number]


@pytest.mark.parametrize(
    "text, message",
    [
        ("ulm\n\nnobody.png", "line 3: 'nobody.png' names 0 images"),
        ("x.png", "line 1: 'x.png' names 2 images, not one"),
        ("\n \n", "lists no image"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_split_that_names_no_image_or_several_is_refused(cities, tmp_path, text, message):
    (tmp_path / "split.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        listed_split(tmp_path / "split.txt", cities)


def test_parts_of_a_folder_can_lie_elsewhere(tmp_path):
    folder = tmp_path / "mine"
    with pytest.raises(DataError, match="neither shapes"):
        find_data(str(folder), train_json="t.json")
    found = find_data(str(folder), train_json="t.json", val_json="v.json", images="i")
    assert found == [("t.json", "i"), ("v.json", "i")]
    folder.mkdir()
    assert find_data(str(folder)) == [(folder / "instances_train.json", folder / "images"), ()]
    (folder / "instances_val.json").write_text("{}")
    assert find_data(str(folder), images="i")[1] == (folder / "instances_val.json", "i")
    with pytest.raises(DataError, match="go with a folder"):
        find_data("coco", train_json="t.json")


def test_coco_lies_where_its_archives_put_it(tmp_path):
    assert find_data("coco", tmp_path) == [
        (tmp_path / f"annotations/instances_{part}2017.json", tmp_path / f"{part}2017")
        for part in ("train", "val")
    ]
