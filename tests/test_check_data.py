"""Tests of tools/check_data.py, and of training on a user's folder with 6 labeled and 30 unlabeled images of
all modes."""

import contextlib
import io
import json

import numpy as np
import pytest
from commands import run
from PIL import Image

from data import EXIF_ORIENTATION
from tools import check_data
from training.cli import parse_config
from training.setup import choice_lines, print_setup, set_up

MODES = ["RGB", "L", "LA", "P", "RGBA", "1", "CMYK", "I;16"]
POLYGON = [[4, 4, 30, 4, 30, 30, 4, 30]]


def picture(rng, H=40, W=48):
    pixels = rng.integers(0, 100, (H, W, 3)).astype(np.uint8)
    pixels[4:30, 4:30] = rng.integers(150, 256, 3)
    return pixels


def save(pixels, path, mode="RGB", orientation=1):
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    exif = image.getexif()
    exif[EXIF_ORIENTATION] = orientation
    image.save(path, **({"exif": exif} if orientation > 1 else {}))


@pytest.fixture
def user_folder(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "mine"
    (folder / "images").mkdir(parents=True)
    (folder / "plain" / "deep").mkdir(parents=True)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
    }
    for number in range(6):
        mode = MODES[number]
        save(picture(rng), folder / f"images/{number}.png", mode)
        content["images"].append({"id": number, "file_name": f"{number}.png", "height": 40, "width": 48})
        entry = {
            "id": number,
            "image_id": number,
            "category_id": 3 + 5 * (number % 2),
            "segmentation": POLYGON,
        }
        content["annotations"].append(entry | {"iscrowd": 0, "area": 676, "bbox": [4, 4, 26, 26]})
    for number in range(30):
        mode = MODES[number % len(MODES)]
        suffix = {"CMYK": "tif", "RGB": "jpg"}.get(mode, "png")
        place = "plain/deep" if number % 3 else "plain"
        save(picture(rng), folder / f"{place}/{number}.{suffix}", mode, orientation=1 + number % 8)
    (folder / "instances_train.json").write_text(json.dumps(content))
    return folder, content


def check(folder, *flags) -> tuple[int, str]:
    """Run the checker. Returns its exit code and all that it prints. The page is sheet.png in the folder."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.raises(SystemExit) as stop:
        check_data.main([str(folder), "--sheet", str(folder / "sheet.png"), *map(str, flags)])
    return stop.value.code, out.getvalue()


TINY = (
    "--preset shapes --ratio 1 --steps 2 --crop 32,32 --num-queries 5 --hidden-dim 32 --batch 2 --log-every 1"
)
TINY += " --encoder-ffn 32 --decoder-layers 1 --decoder-ffn 32 --num-points 32 --device cpu --val-ratio 0"


def test_training_takes_images_of_all_modes_and_needs_no_validation_set(user_folder, tmp_path):
    folder, _ = user_folder
    flags = ["--data", folder, "--unlabeled", folder / "plain", "--out", tmp_path / "run", *TINY.split()]
    done = run("distill.py", *flags)
    assert "6 training images, 6 of them labeled" in done.stdout
    assert "36 in the unlabeled pool" in done.stdout
    assert "no validation set, so no AP" in done.stdout and "distill done" in done.stdout
    assert "AP " not in done.stdout.replace("no AP will", "") and not done.stderr
    again = run("distill.py", *flags)
    assert "all phases are done" in again.stdout
    error = run("evaluate.py", tmp_path / "run/distill.pt", code=2).stderr
    assert error == f"error: {folder} has no validation set; pass --val-json, or --val-ratio above 0\n"


def test_too_many_damaged_images_are_refused_before_training(user_folder, tmp_path):
    folder, _ = user_folder
    for number in (1, 2):
        (folder / f"images/{number}.png").write_text("hello")
    flags = ["--data", folder, "--out", tmp_path / "run", *TINY.split(), "--steps", "20", "--save-every", "5"]
    error = run("distill.py", *flags, code=2).stderr
    assert error.startswith("error: 2 training images cannot be read, such as: cannot read image")
    assert error.count("\n") == 1 and not (tmp_path / "run/metrics.jsonl").exists()


def test_a_valid_folder_has_no_errors_and_its_counts_are_shown(user_folder, tmp_path):
    folder, _ = user_folder
    flags = ["--unlabeled", folder / "plain", "--ratio", "1", "--sheet", tmp_path / "a/sheet.png"]
    flags += ["--val-ratio", "0"]
    printed = run("tools.check_data", folder, *flags, "--device", "cpu").stdout
    assert printed.startswith(f"{folder}: folder in COCO form (instances_train.json; images in images)\n")
    for line in (
        "cat          3        3        0        0        0        3",
        "all          6        6        0        0        0        6",
        "annotations: 6\n6  trained\n",
        "at most 1 objects in an image, 0 images without objects, 0 with more than the 20 queries",
        "image sizes (height x width): smallest 40 x 48, median 40 x 48, largest 40 x 48",
        "labeled: 6 of 6 images, with 2 of 2 classes",
        f"unlabeled: 36 images: 6 training images, 30 of {folder / 'plain'}",
        f"warning: {folder} has no validation set, so no AP will be shown; --val-json names one",
        "warning: a batch has 8 images, but only 6 are labeled",
        "\n0 errors, 2 warnings",
    ):
        assert line in printed, printed
    assert np.asarray(Image.open(tmp_path / "a/sheet.png")).std() > 10


def test_every_planted_defect_is_named(user_folder, tmp_path):
    folder, content = user_folder
    train, val = content, json.loads(json.dumps(content))
    for entry in (train, val):
        entry["images"] = [dict(image) for image in entry["images"]]
    val["images"] = [{"id": 90, "file_name": "copy.png", "height": 40, "width": 48}]
    val["annotations"] = []
    (folder / "images/copy.png").write_bytes((folder / "images/0.png").read_bytes())
    (folder / "images/1.png").write_text("hello")
    train["images"][2]["height"] = 39
    train["images"].append({"id": 60, "file_name": "gone.png", "height": 40, "width": 48})
    train["categories"].append({"id": 9, "name": "cow"})
    extra = [
        {"image_id": 3, "segmentation": [[1, 1, 2, 2]]},
        {"image_id": 3, "segmentation": [[5.1, 5.1, 5.1, 5.1, 5.1, 5.1]]},
        {"image_id": 3, "segmentation": {"size": [40, 48], "counts": [3]}},
        {"image_id": 77},
        {"image_id": 3, "category_id": 4},
        {"image_id": 4, "iscrowd": 1},
        {"image_id": 3, "segmentation": [[1, 1, 9, 1, 9, 9]]},
    ]
    for number, change in enumerate(extra, start=100):
        train["annotations"].append(train["annotations"][3] | {"id": number} | change)
    (folder / "instances_train.json").write_text(json.dumps(train))
    (folder / "instances_val.json").write_text(json.dumps(val))
    (folder / "plain/0.jpg").write_bytes((folder / "plain/0.jpg").read_bytes()[:300])
    flags = ["--unlabeled", folder / "plain", "--ratio", "1", "--num-queries", "1"]
    flags += ["--sheet", tmp_path / "sheet.png"]
    done = run("tools.check_data", folder, *flags, code=2)
    train_json, val_json = folder / "instances_train.json", folder / "instances_val.json"
    for line in (
        f"error: cannot read image '{folder}/images/1.png': ",
        "is 40 x 48, its annotations are for 39 x 48 (height x width)",
        f"error: {train_json}: 1 of 6 images have another size than their annotations: image 2 ('2.png')",
        "error: 2 training images cannot be read, such as: cannot read image '",
        f"warning: {train_json}: 1 of 7 images are missing and left out, such as image 60: its file",
        f"warning: {train_json}: annotations left out: 1 with polygons of fewer than three corners",
        f"warning: {train_json}: annotations left out: 1 with an empty mask, such as annotation 101",
        f"error: {train_json}: annotation 102: (image 3) the runs of its RLE sum to 3, the image has",
        f"error: {train_json}: annotation 103: its image_id 77 is not in the file",
        f"error: {train_json}: annotation 104: its category_id 4 is not in the file",
        "warning: instances_val.json: image 90 ('copy.png') is the same file as instances_train.json: image",
        "at most 2 objects in an image, 0 images without objects, 1 with more than the 1 queries",
        "warning: an image has 2 objects, the model 1 queries; pass --num-queries 2",
        "warning: 1 classes are in no labeled image: cow; they cannot be learned, unless --ratio or",
        f"warning: {val_json}: it has no object to find (0 annotations: 0 trained), so AP is '-'",
        "annotations: 13\n7  trained\n1  crowd\n1  fewer than three corners\n1  empty\n3  invalid\n",
    ):
        assert line in done.stdout, done.stdout
    assert f"error: cannot read image '{folder}/plain/0.jpg'" in done.stdout
    assert "Traceback" not in done.stderr
    assert "\n8 errors" in done.stdout, done.stdout


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--unlabeled", "nowhere"], "no folder 'nowhere'"),
        (["--labeled-list", "gone.txt"], "cannot read the labeled list 'gone.txt'"),
        (["--backbone", "resnet1"], "resnet1"),
        (["--sheet", "s.foo"], "foo"),
    ],
)
def test_a_bad_flag_does_not_suppress_the_report(user_folder, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    code, printed = check(user_folder[0], "--val-ratio", "0", *flags)
    assert code == 2 and "annotations: 6" in printed and words in printed


def test_former_spellings_of_flags_are_accepted():
    flags = "my_dataset --split few.txt --unlabelled a b --sheet page.png"
    cfg, sheet = check_data.parse_arguments(flags.split())
    assert (cfg.data, cfg.labeled_list, cfg.unlabeled, sheet) == (
        "my_dataset",
        "few.txt",
        ["a", "b"],
        "page.png",
    )


def test_flags_mean_what_they_mean_for_a_run():
    flags = "--unlabeled a --unannotated background --val-ratio 0.3 --num-queries 7 --crop 64,64"
    cfg, sheet = check_data.parse_arguments(["my_dataset", *flags.split()])
    assert (cfg, sheet) == (parse_config(["--data", "my_dataset", *flags.split()]), "sheet.png")
    assert (cfg.preset, cfg.ratio, cfg.data_args) == ("auto", 1, {"val_ratio": 0.3})


def test_the_labeled_list_is_checked(user_folder, tmp_path):
    (tmp_path / "few.txt").write_text("0.png\n2.png\n")
    flags = ["--labeled-list", str(tmp_path / "few.txt"), "--sheet", str(tmp_path / "sheet.png")]
    flags += ["--val-ratio", "0"]
    _, printed = check(user_folder[0], *flags)
    assert "labeled: 2 of 6 images, with 1 of 2 classes" in printed
    assert "warning: 1 classes are in no labeled image: dog" in printed


def remove_images(folder, content):
    for number in (1, 2):
        (folder / f"images/{number}.png").unlink()


def damage_image(folder, content):
    (folder / "images/5.png").write_text("hello")


def make_crowds(folder, content):
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


def make_boxes(folder, content):
    for annotation in content["annotations"]:
        annotation["segmentation"] = []


def clear_annotations(folder, content):
    del content["annotations"][2:]


def damage_validation(folder, content):
    validation = content | {"images": content["images"][3:], "annotations": []}
    (folder / "instances_val.json").write_text(json.dumps(validation))
    damage_image(folder, content)


@pytest.mark.parametrize(
    "change, flags, refused, words",
    [
        (remove_images, "", True, "error: {train}: 2 of 6 images are missing, such as image 1"),
        (remove_images, "--allow-missing", False, "warning: {train}: 2 of 6 images are missing and left out"),
        (damage_image, "", False, "; another image takes its place"),
        (damage_validation, "", True, "error: 1 validation images cannot be read"),
        (make_crowds, "", True, "error: {train}: its masks are 6 crowds (iscrowd 1)"),
        (make_crowds, "--crowd-is-object --ratio 1", False, "\n6  trained\n"),
        (make_boxes, "", True, "(6 annotations: 0 trained, 6 boxes only); boxes are not enough"),
        (clear_annotations, "", False, "warning: 4 images without annotations are unlabeled; if they show"),
        (
            clear_annotations,
            "--unannotated background --ratio 0.01 --seed 1",
            True,
            "no labeled image has an",
        ),
        (clear_annotations, '--model-args {"hidden_dim":30}', True, "hidden_dim 30 must be a multiple of 4"),
    ],
)
def test_the_exit_code_is_2_exactly_when_a_run_refuses(user_folder, tmp_path, change, flags, refused, words):
    folder, content = user_folder
    change(folder, content)
    (folder / "instances_train.json").write_text(json.dumps(content))
    flags = f"--pretrained false --hours 0 --device cpu --out {tmp_path / 'run'} {flags}".split()
    flags += ["--val-ratio", "0"]
    code, printed = check(folder, *flags)
    assert words.format(train=folder / "instances_train.json") in printed, printed
    try:
        set_up(parse_config(["--data", str(folder), *flags]))
        was_refused = False
    except ValueError:
        was_refused = True
    assert (code, was_refused) == (2 if refused else 0, refused)


def test_damaged_images_that_would_end_a_run_later_are_an_error(user_folder):
    """The headers can be read, so that a run begins."""
    folder, _ = user_folder
    for number in (0, 3):
        path = folder / f"images/{number}.png"
        path.write_bytes(path.read_bytes()[:-2000])
    code, printed = check(folder, "--val-ratio", "0", "--ratio", "1", "--device", "cpu")
    assert code == 2 and "error: 2 labeled images cannot be read, such as: cannot read image" in printed


def test_the_settings_that_preset_auto_chooses_are_those_of_a_run(user_folder, tmp_path):
    flags = f"--pretrained false --hours 0 --device cpu --batch 3 --out {tmp_path / 'run'}".split()
    flags += ["--val-ratio", "0"]
    _, printed = check(user_folder[0], *flags)
    cfg = parse_config(["--data", str(user_folder[0]), *flags])
    env, data, _ = set_up(cfg)
    assert (cfg.precision, env.bf16, data.env.bf16) == ("fp32", False, False)  # whatever this CPU can do
    lines = list(choice_lines(cfg))
    assert "\n".join(lines) in printed and len(lines) > 15
    assert any(line.startswith("    --crop 96,96  (the median object is ") for line in lines)
    assert "--batch 3" not in printed


def test_the_page_shows_images_of_twelve_bits_as_training_sees_them(user_folder):
    folder, _ = user_folder
    for number in range(6):
        pixels = np.full((40, 48), 3000, dtype=np.uint16)
        pixels[4:30, 4:30] = 4000
        Image.fromarray(pixels).save(folder / f"images/{number}.png")
    code, _ = check(folder, "--val-ratio", "0")
    # The object of the first image, which is not dimmed: 4000 of 4095 is 249 of 255.
    page = np.asarray(Image.open(folder / "sheet.png").convert("L"))
    assert code == 0 and page[60, 60] == round(4000 / 4095 * 255)


def test_an_empty_validation_set_is_named(user_folder):
    folder, content = user_folder
    (folder / "instances_val.json").write_text(json.dumps(content | {"images": [], "annotations": []}))
    code, printed = check(folder)
    assert code == 0 and "instances_val.json: it has no image, so AP is '-'" in printed
    assert "has no validation set" not in printed


def test_missing_data_is_an_error_of_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        check_data.main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "neither shapes, coco, cityscapes nor a folder" in capsys.readouterr().err


def test_training_uses_a_list_of_labeled_images(user_folder, tmp_path):
    folder, _ = user_folder
    (tmp_path / "few.txt").write_text("0.png\n5.png\n")
    flags = ["--data", folder, "--labeled-list", tmp_path / "few.txt", *TINY.split()]
    printed = run("burnin.py", *flags, cwd=tmp_path).stdout
    assert "6 training images, 2 of them labeled" in printed
    assert (tmp_path / "runs/mine-few/burnin.pt").exists()


def test_training_starts_with_warnings_about_its_data(user_folder, tmp_path, capsys):
    """Annotations are left out, classes have no labels, and there are more objects than queries."""
    folder, content = user_folder
    content["categories"].append({"id": 9, "name": "cow"})
    box = [1, 1, 9, 1, 9, 9]
    many = [
        content["annotations"][0] | {"id": 100 + n, "segmentation": [box, [n, 0, 9, 0, 9, 9]]}
        for n in range(9)
    ]
    content["annotations"] += [*many, content["annotations"][0] | {"id": 99, "segmentation": []}]
    (folder / "instances_train.json").write_text(json.dumps(content))
    flags = ["--data", str(folder), "--out", str(tmp_path / "run"), *TINY.split()]
    cfg = parse_config(flags)
    _, data, _ = set_up(cfg)
    print_setup(cfg, data, last_phase=2)
    printed = capsys.readouterr().out
    for line in (
        "annotations left out: 1 without a mask (boxes only), such as annotation 99 (image 0)",
        "1 classes are in no labeled image: cow",
        "an image has 10 objects, the model 5 queries",
    ):
        assert line in printed


def test_a_damaged_image_ends_an_evaluation(user_folder, tmp_path):
    folder, content = user_folder
    (folder / "instances_val.json").write_text(json.dumps(content))
    flags = ["--data", folder, "--out", tmp_path / "run", *TINY.split(), "--steps", "1"]
    run("burnin.py", *flags)
    (folder / "images/3.png").write_text("hello")
    error = run("evaluate.py", tmp_path / "run/teacher.pt", code=2).stderr
    assert error.startswith("error: cannot read image '") and "3.png" in error and error.count("\n") == 1


def test_an_evaluation_uses_the_files_of_its_run_unless_flags_replace_them(user_folder, tmp_path):
    """--data may name the same folder again. A file that cannot be written is an error of one line."""
    folder, content = user_folder
    for name, count in (("instances_val", 6), ("other", 1)):
        few = content | {"images": content["images"][:count], "annotations": content["annotations"][:count]}
        (folder / f"{name}.json").write_text(json.dumps(few))
    flags = ["--data", folder, "--val-json", folder / "other.json", "--out", tmp_path / "run", *TINY.split()]
    assert "1 for validation" in run("burnin.py", *flags, "--steps", "1").stdout
    (folder / "images/5.png").write_text("hello")  # only instances_val.json has this image
    checkpoint = tmp_path / "run/teacher.pt"
    run("evaluate.py", checkpoint, "--data", folder)
    val = folder / "instances_val.json"
    assert "5.png" in run("evaluate.py", checkpoint, "--val-json", val, code=2).stderr
    error = run("evaluate.py", checkpoint, "--json", tmp_path / "gone/ap.json", code=2).stderr
    assert error.startswith("error: ") and error.count("\n") == 1
