"""Tests of how pixels are read (depth, channels, pages, EXIF) and images inspected, and which files of a
folder are unlabeled images."""

import io
import json
import os

import numpy as np
import PIL
import pytest
from PIL import Image, TiffImagePlugin

from data import EXIF_ORIENTATION, CocoDataset, DataError, UnlabeledImages, read_image
from layouts import images
from layouts.images import (
    find_copies,
    find_unlabeled,
    inspect_images,
    list_image_files,
    measure_pixel_range,
)

H, W = 12, 20
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 98765\n"


def gray(low=0, high=255, dtype=np.uint8, seed=0):
    """Draw an image (H, W) with values from low to high, both of which occur."""
    values = np.random.default_rng(seed).uniform(low, high, (H, W))
    values[0, 0], values[-1, -1], values[-1, -2] = low, high, high
    return values.astype(dtype)


def save(pixels, path, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **kwargs)
    return path


def save_tiff(pixels, path, photometric=2, extra=None):
    """Write an uncompressed TIFF with any number of bands. extra: the kinds of the bands beyond colors."""
    height, width, bands = pixels.shape
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[256], tags[257], tags[258], tags[259] = width, height, bands * (8 * pixels.itemsize,), 1
    tags[262], tags[273], tags[277], tags[278], tags[279] = photometric, 0, bands, height, pixels.nbytes
    if extra:
        tags[338] = extra
    file = io.BytesIO()
    file.write(b"II*\0\x08\0\0\0")
    tags.save(file)
    path.write_bytes(file.getvalue() + pixels.tobytes())
    return path


def write_dataset(folder, sizes, name="a.json"):
    """Write a COCO file for the images {path: (H, W)}, ids 0, 1, ..., and read it."""
    images = [
        {"id": number, "file_name": path.name, "height": height, "width": width}
        for number, (path, (height, width)) in enumerate(sizes.items())
    ]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (folder / name).write_text(json.dumps(content))
    return CocoDataset(folder / name, folder)


# -------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize("suffix, dtype", [("tif", "<u2"), ("tif", ">u2"), ("png", "<u2"), ("tif", "<i4")])
def test_images_of_12_bits_are_read_by_12_bits(tmp_path, suffix, dtype):
    values = [gray(1440, 1904, dtype, seed) for seed in range(3)]
    paths = [save(pixels, tmp_path / f"{n}.{suffix}") for n, pixels in enumerate(values)]
    assert measure_pixel_range(paths) == (0.0, 4095.0)
    for pixels, path in zip(values, paths, strict=True):
        found = np.asarray(read_image(path, pixel_range=(0.0, 4095.0)))
        assert found.shape == (H, W, 3)
        assert np.abs(found - pixels[..., None] * (255 / 4095)).max() <= 0.5


@pytest.mark.parametrize(
    "highest, limit",
    [(0, 255), (255, 255), (256, 1023), (1023, 1023), (4095, 4095), (4096, 16383), (16384, 65535)],
)
def test_the_highest_value_is_rounded_up_to_the_depth_of_a_camera(tmp_path, highest, limit):
    paths = [save(gray(0, high, np.uint16), tmp_path / f"{high}.png") for high in {0, highest}]
    assert measure_pixel_range(paths) == (0.0, limit)


def test_a_defective_pixel_does_not_change_the_range(tmp_path):
    pixels = gray(0, 900, np.uint16)
    pixels[5, 5] = 65535
    path = save(pixels, tmp_path / "a.tif")
    assert measure_pixel_range([path]) == (0.0, 1023.0)
    assert read_image(path, pixel_range=(0.0, 1023.0)).getpixel((5, 5)) == (255, 255, 255)


def test_a_range_does_not_depend_on_defective_files(tmp_path):
    paths = [save(gray(0, 900, np.uint16), tmp_path / f"{name}.tif") for name in "ab"]
    paths[0].write_bytes(paths[0].read_bytes()[:-30])
    assert measure_pixel_range([*paths, tmp_path / "gone.tif"]) == (0.0, 1023.0)


def test_floating_point_values_have_the_range_of_the_set(tmp_path):
    paths = [save(gray(0, 1, np.float32), tmp_path / "unit.tif")]
    assert measure_pixel_range(paths) == (0.0, 1.0)
    assert read_image(paths[0], pixel_range=(0.0, 1.0)).getextrema() == 3 * ((0, 255),)
    values = np.linspace(-300, 700, H * W, dtype=np.float32).reshape(H, W)
    values[3, 4] = np.nan
    paths.append(save(values, tmp_path / "wide.tif"))
    low, high = measure_pixel_range(paths[1:])
    assert (low, high) == pytest.approx((-299, 699), abs=3)
    found = np.asarray(read_image(paths[1], pixel_range=(low, high)))[..., 0]
    assert found[0, 0] == found[3, 4] == 0 and found[-1, -1] == 255
    assert found[H // 2, 0] == pytest.approx(127.5, abs=1)
    assert measure_pixel_range([save(np.full((H, W), 7.5, np.float32), tmp_path / "flat.tif")]) == (7.5, 8.5)


def test_signed_values_have_the_range_of_the_set(tmp_path):
    path = save(np.linspace(-1000, 3000, H * W).reshape(H, W).astype(np.int32), tmp_path / "a.tif")
    low, high = measure_pixel_range([path])
    assert (low, high) == pytest.approx((-1000, 3000), abs=20)
    assert read_image(path, pixel_range=(low, high)).getextrema() == 3 * ((0, 255),)


def test_a_range_is_a_tuple_of_plain_floats(tmp_path):
    for low, high, dtype in ((0, 900, np.uint16), (0, 1, np.float32), (-5, 9, np.float32), (-5, 9, np.int32)):
        found = measure_pixel_range([save(gray(low, high, dtype), tmp_path / "a.tif")])
        assert type(found) is tuple and [type(value) for value in found] == [float, float]


def test_without_a_range_unsigned_16_bits_are_scaled_and_others_refused(tmp_path):
    pixels = gray(0, 65535, np.uint16)
    found = np.asarray(read_image(save(pixels, tmp_path / "a.png")))
    assert np.array_equal(found[..., 0], (pixels / 257).round())
    for kind, values in (
        ("floating-point", gray(0, 1, np.float32)),
        ("signed or 32-bit", gray(-5, 9, np.int32)),
        ("signed or 32-bit", gray(0, 70_000, np.int32)),
    ):
        path = save(values, tmp_path / "a.tif")
        with pytest.raises(
            DataError, match=rf"a\.tif': it has {kind} pixels of unknown range; convert it to 8"
        ):
            read_image(path)


def test_images_of_8_bits_have_no_range_and_are_not_scaled(tmp_path):
    pixels = gray(0, 90)
    path = save(pixels, tmp_path / "a.png")
    assert measure_pixel_range([path]) is None and measure_pixel_range([]) is None
    assert np.array_equal(np.asarray(read_image(path, pixel_range=(0.0, 90.0)))[..., 0], pixels)


def test_only_a_sample_at_even_distances_is_opened(tmp_path, monkeypatch):
    path = save(gray(), tmp_path / "a.png")
    opened, open_image = [], images.open_image
    monkeypatch.setattr(images, "open_image", lambda number: opened.append(number) or open_image(path))
    assert measure_pixel_range(range(100_000), max_images=50) is None
    assert sorted(opened) == list(range(0, 100_000, 2000))


def test_all_images_of_a_pool_are_read_with_the_range_of_the_dataset(tmp_path):
    labeled = save(gray(0, 4000, np.uint16), tmp_path / "a.png")
    pixels = gray(0, 1000, np.uint16)
    further = save(pixels, tmp_path / "more" / "b.png")
    dataset = write_dataset(tmp_path, {labeled: (H, W)})
    pool = UnlabeledImages(dataset, [further])
    assert dataset.pixel_range is None
    assert np.array_equal(np.asarray(pool.image(1))[..., 0], (pixels / 257).round())
    dataset.pixel_range = inspect_images(dataset).pixel_range
    assert dataset.pixel_range == (0.0, 4095.0)
    assert pool.image(0) == dataset.image(0) == read_image(labeled, pixel_range=(0.0, 4095.0))
    assert np.array_equal(np.asarray(pool.image(1))[..., 0], (pixels * (255 / 4095)).round())


# ----------------------------------------------------------------------------------- channels and pages


def test_extra_channels_and_pages_are_dropped_with_a_note_for_each_kind(tmp_path):
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (H, W, 5)).astype(np.uint8)
    save_tiff(colors[..., :4], tmp_path / "a.tif", extra=(0,))
    save_tiff(colors[..., :4], tmp_path / "b.tif")
    save_tiff(colors, tmp_path / "c.tif", extra=(2, 0))
    save_tiff(colors[..., :3].astype(np.uint16) * 256, tmp_path / "e.tif")
    for name in ("f.tif", "g.gif"):
        save(
            gray(),
            tmp_path / name,
            save_all=True,
            append_images=[Image.new("L", (W, H), 200 + ord(name[0]) % 9)],
        )
    dataset = write_dataset(tmp_path, {tmp_path / name: (H, W) for name in sorted(os.listdir(tmp_path))})
    found = inspect_images(dataset)
    assert found.unreadable == [] and found.pixel_range is None and not found.exif_stored
    a, f, e = (str(tmp_path / f"{name}.tif") for name in "afe")
    assert found.notes == [
        f"3 images (such as {a!r}) have extra channels; only the first three (in gray images one) are read",
        f"2 images (such as {f!r}) have several pages; only the first one is read",
        f"1 images (such as {e!r}) have 16 bits per color; only the upper 8 are read, so convert images that "
        "look dark",
    ]
    for image_id in range(4):
        assert np.array_equal(np.asarray(dataset.image(image_id)), colors[..., :3]), image_id
    assert np.array_equal(np.asarray(dataset.image(4))[..., 0], gray())


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="older Pillow cannot read such a file")
def test_the_extra_channel_of_a_gray_image_is_dropped_with_a_note(tmp_path):
    bands = np.stack([gray(), gray(seed=1)], axis=-1)
    save_tiff(bands, tmp_path / "a.tif", photometric=1, extra=(0,))
    dataset = write_dataset(tmp_path, {tmp_path / "a.tif": (H, W)})
    assert [note.split(";")[1] for note in inspect_images(dataset).notes] == [
        " only the first three (in gray images one) are read"
    ]
    assert np.array_equal(np.asarray(dataset.image(0))[..., 0], gray())


def test_there_are_no_notes_about_alpha_and_usual_modes(tmp_path):
    image, paths = Image.fromarray(gray()).convert("RGB"), []
    for number, mode in enumerate(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"]):
        for suffix in ("png", "tif") if mode not in ("CMYK", "YCbCr") else ("tif",):
            paths.append(tmp_path / f"{number}.{suffix}")
            image.convert(mode).save(paths[-1])
    image.save(tmp_path / "a.jpg")
    found = inspect_images(write_dataset(tmp_path, dict.fromkeys([*paths, tmp_path / "a.jpg"], (H, W))))
    assert found == images.Inspection(pixel_range=None, exif_stored=False, notes=[], unreadable=[])


@pytest.mark.filterwarnings("ignore")  # Pillow warns about the damage
@pytest.mark.parametrize("bands, dtype, bits", [(5, np.uint16, 16), (4, np.float32, 32), (1, np.float64, 64)])
def test_a_tiff_that_cannot_be_read_is_named_by_bands_and_bits(tmp_path, bands, dtype, bits):
    path = save_tiff(np.zeros((H, W, bands), dtype), tmp_path / "a.tif", photometric=1 + (bands > 1))
    expected = (
        f"cannot read image {str(path)!r}: it is a TIFF of {bands} bands of {bits} bits; convert it to gray"
    )
    with pytest.raises(DataError) as error:
        read_image(path)
    assert str(error.value).startswith(expected)
    path.write_bytes(path.read_bytes()[:12])
    with pytest.raises(DataError, match="cannot identify image file"):
        read_image(path)


def test_images_that_cannot_be_read_are_found_before_training(tmp_path):
    names = "good", "empty", "text", "pointer", "gone", "high"
    paths = {name: save(gray(), tmp_path / f"{name}.png") for name in names}
    paths["empty"].write_bytes(b"")
    paths["text"].write_text("hello")
    paths["pointer"].write_text(POINTER)
    paths["gone"].unlink()
    dataset = write_dataset(tmp_path, {path: (H + (name == "high"), W) for name, path in paths.items()})
    problems = {
        "empty": "the file is empty",
        "text": f"cannot identify image file {str(paths['text'])!r}",
        "pointer": "it is a Git LFS pointer; run `git lfs pull` to get the image",
        "gone": "no such file",
    }
    *unreadable, last = inspect_images(dataset).unreadable
    assert unreadable == [f"cannot read image {str(paths[n])!r}: {text}" for n, text in problems.items()]
    assert last.endswith("high.png': it is 12 x 20, its annotations are for 13 x 20 (height x width)")


# --------------------------------------------------------------------------------------------- EXIF


def save_turned(path, orientation, pixels=None):
    """Write an image with an EXIF orientation and a bright upper left corner."""
    if pixels is None:
        pixels = np.full((H, W, 3), 10, dtype=np.uint8)
        pixels[:4, :6] = 200
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return save(pixels, path, exif=exif)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_an_orientation_that_sizes_do_not_decide_follows_the_other_images(tmp_path, suffix):
    """The images a, b, c are turned by 180 degrees or mirrored. Image z is turned by 90."""
    sizes = {save_turned(tmp_path / f"{name}.{suffix}", o): (H, W) for name, o in zip("abc", (3, 2, 4))}
    other = save_turned(tmp_path / "z.jpg", 6)
    for size, stored in (((H, W), True), ((W, H), False)):
        dataset = write_dataset(tmp_path, sizes | {other: size})
        found = inspect_images(dataset)
        assert found.exif_stored == stored and found.notes == found.unreadable == []
        dataset.exif_stored = found.exif_stored
        for image_id, shown in zip(range(3), ((H - 2, W - 2), (2, W - 2), (H - 2, 2)), strict=True):
            pixels = np.asarray(dataset.image(image_id))[..., 0]
            y, x = (2, 2) if stored else shown
            assert pixels[y, x] > 150 and (pixels > 100).sum() == pytest.approx(24, abs=6)


def test_orientations_that_nothing_decides_are_counted(tmp_path):
    sizes = {save_turned(tmp_path / f"{n}.jpg", 3): (H, W) for n in range(3)}
    sizes[save_turned(tmp_path / "3.jpg", 6, gray()[:, :H])] = (H, H)
    [note] = inspect_images(write_dataset(tmp_path, sizes)).notes
    assert note.startswith(
        f"4 images (such as {str(tmp_path / '0.jpg')!r}) have an EXIF orientation that their size"
    )
    for name, size in (("y", (H, W)), ("z", (W, H))):  # they contradict each other
        sizes[save_turned(tmp_path / f"{name}.jpg", 6)] = size
    found = inspect_images(write_dataset(tmp_path, sizes))
    assert not found.exif_stored and found.notes == [note]


@pytest.mark.parametrize("orientation", [6, 8])
def test_a_tiff_is_turned_by_90_degrees_whatever_its_annotations(tmp_path, orientation):
    path = save_turned(tmp_path / "a.tif", orientation)
    assert read_image(path, (W, H), exif_stored=True).size == (H, W)
    with pytest.raises(DataError, match=f"it is {W} x {H}, its annotations are for {H} x {W}"):
        read_image(path, (H, W))
    assert inspect_images(write_dataset(tmp_path, {path: (W, H)})).notes == []


def test_of_many_images_a_sample_is_inspected(tmp_path):
    sizes = {save_turned(tmp_path / f"{n}.jpg", 3): (H, W) for n in range(9)}
    dataset = write_dataset(tmp_path, sizes)
    [note] = inspect_images(dataset, max_images=4).notes
    assert note.startswith(f"4 of 4 sampled images (such as {str(tmp_path / '0.jpg')!r}) have an EXIF")
    [note] = inspect_images(dataset, dataset.image_ids[7:]).notes
    assert note.startswith(f"2 images (such as {str(tmp_path / '7.jpg')!r}) have an EXIF")


# ---------------------------------------------------------------------------------- files of a folder


def test_hidden_files_and_those_of_archive_programs_are_no_images(tmp_path):
    folder = tmp_path / ".cache" / "photos"
    for name in (
        "b.jpg",
        "a.png",
        "deep/c.jpg",
        "._b.jpg",
        ".ipynb_checkpoints/b.jpg",
        "__MACOSX/b.jpg",
        ".git/d.png",
    ):
        save(gray(), folder / name)
    names = [os.path.relpath(path, folder.resolve()) for path in list_image_files(folder)]
    assert names == ["a.png", "b.jpg", "deep/c.jpg"]


@pytest.fixture
def split(tmp_path):
    """Write a training and a validation image, and return their datasets."""
    paths = [
        save(gray(seed=seed), tmp_path / "images" / name)
        for seed, name in enumerate(("train.png", "val.png"))
    ]
    return [write_dataset(tmp_path / "images", {path: (H, W)}, f"{path.stem}.json") for path in paths]


def test_copies_of_labeled_and_validation_images_are_left_out_and_counted(tmp_path, split):
    train, val = split
    for name in ("x/renamed.png", "x/again.png", "y/third.png"):
        save(gray(), tmp_path / name).write_bytes(val.path(0).read_bytes())
    save(gray(), tmp_path / "y" / "fourth.png").write_bytes(train.path(0).read_bytes())
    same_size = bytearray(val.path(0).read_bytes())
    same_size[20] ^= 1
    for name in ("x/new.png", "y/new.png", "y/new too.png"):
        save(gray(seed=9), tmp_path / name)
    (tmp_path / "y" / "same size.png").write_bytes(same_size)
    paths, counts, notes = find_unlabeled([tmp_path / "x", tmp_path / "y"], train, val)
    names = [os.path.relpath(path, tmp_path) for path in paths]
    assert names == ["x/new.png", "y/new too.png", "y/new.png", "y/same size.png"]
    assert counts == {str(tmp_path / "x"): 1, str(tmp_path / "y"): 3}
    examples = str(tmp_path / "y" / "fourth.png"), str(tmp_path / "x" / "again.png")
    assert notes == [
        f"1 unlabeled files (such as {examples[0]!r}) are left out: copies of training images",
        f"3 unlabeled files (such as {examples[1]!r}) are left out: copies of validation images",
    ]
    (tmp_path / "x" / "new.png").unlink()
    with pytest.raises(
        DataError, match="no further image below '.*x'; .*3 unlabeled files .* are left out: copies of val"
    ):
        find_unlabeled([tmp_path / "x", tmp_path / "y"], train, val)


def test_without_folders_no_file_is_read(split, monkeypatch):
    monkeypatch.setattr(images, "_file_key", lambda path, part: pytest.fail(f"{path} is read"))
    assert find_unlabeled([], *split) == ([], {}, [])
    pool = UnlabeledImages(split[0])
    assert list(pool.image_ids) == [0] and pool.path(0) == split[0].path(0)


def test_only_files_of_equal_size_and_middle_are_read_whole(tmp_path, monkeypatch):
    contents = {
        "a": b"x" * 20_000,
        "b": b"x" * 20_000,
        "c": b"x" * 10_000 + b"y" * 10_000,
        "d": b"x" * 19_999,
    }
    contents |= {"e": b"y" + b"x" * 19_999, "empty": b"", "void": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    keys, file_key = [], images._file_key
    monkeypatch.setattr(
        images, "_file_key", lambda path, part: keys.append((path.name, part)) or file_key(path, part)
    )
    files = [tmp_path / name for name in ("b", "c", "d", "e", "empty", "gone")]
    copies = find_copies(files, [tmp_path / "a", tmp_path / "void", tmp_path / "missing"])
    assert copies == {tmp_path / "b": tmp_path / "a"}
    assert {name for name, part in keys if part == "middle"} == {"a", "b", "c", "e"}
    assert {name for name, part in keys if part == "all"} == {"a", "b", "e"}


def test_git_lfs_pointers_are_named_and_left_out_of_a_pool(tmp_path, split):
    for name in ("a.tif", "b.png"):
        save(gray(), tmp_path / "more" / name).write_text(POINTER)
    with pytest.raises(
        DataError, match=r"a\.tif': it is a Git LFS pointer; run `git lfs pull` to get the image"
    ):
        read_image(tmp_path / "more" / "a.tif")
    with pytest.raises(
        DataError, match="no further image below '.*more'; 2 unlabeled files .* are left out: Git LFS"
    ):
        find_unlabeled([tmp_path / "more"], split[0], None)
    save(gray(seed=9), tmp_path / "more" / "c.png")
    paths, _, notes = find_unlabeled([tmp_path / "more"], split[0], None)
    assert paths == [os.path.realpath(tmp_path / "more" / "c.png")]
    example = str(tmp_path / "more" / "a.tif")
    assert notes == [
        f"2 unlabeled files (such as {example!r}) are left out: Git LFS pointers; run `git lfs pull` to get "
        "the images"
    ]
