"""Tests of --preset auto, --hours and --settings-from: options that are chosen, fitted and taken over."""

import dataclasses
import json
import math
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import ROOT, run

from layouts import load_data
from training.auto import (
    GUIDED_STEP_COST,
    Facts,
    choose_options,
    count_in_windows,
    ema_decay,
    fit_steps,
    measure_facts,
)
from training.checkpoint import load_checkpoint
from training.cli import parse_config
from training.config import RECIPES, Config, read_settings, write_settings
from training.metrics import expected_seconds

PHOTOS = Facts(
    long_side=640, object_side=0.1, large_object_side=0.5, num_objects=(12, 30), num_labeled=300,
    num_cores=2,
)  # fmt: skip
ON_GPU = dataclasses.replace(PHOTOS, gpu_memory=80.0, num_cores=16)


def values(facts, start=None, **given):
    return {name: value for name, (value, _) in choose_options(facts, given, start).items()}


def test_every_choice_is_an_option_and_has_a_reason():
    options = {field.name for field in dataclasses.fields(Config)}
    for facts in (PHOTOS, ON_GPU):
        choices = choose_options(facts, {})
        assert choices.keys() <= options
        assert all(reason for _, reason in choices.values())
        Config(preset="auto", **values(facts))  # raises for a wrong value


def test_an_option_that_is_given_is_not_chosen_and_others_follow_it():
    chosen = values(ON_GPU, crop=(512, 512), pretrained="false")
    assert "crop" not in chosen and chosen["norm"] == "group" and chosen["score_threshold"] == 0.9
    assert chosen["batch"] == 16 and values(dataclasses.replace(ON_GPU, gpu_memory=8.0))["batch"] < 16
    assert values(PHOTOS, model_args={"hidden_dim": 32})["model_args"]["hidden_dim"] == 32


def test_a_checkpoint_to_start_from_chooses_the_model():
    stored = {"num_classes": 7, "backbone": "resnet10t", "norm": "group", "num_queries": 40, "hidden_dim": 32}
    for facts in (PHOTOS, ON_GPU):
        chosen = values(facts, stored)
        assert [chosen[name] for name in ("backbone", "norm", "num_queries")] == ["resnet10t", "group", 40]
        assert chosen["model_args"] == {"hidden_dim": 32}
    full_size = {"num_classes": 7, "backbone": "resnet50", "norm": "frozen", "num_queries": 100}
    chosen = values(PHOTOS, full_size)
    assert not {"model_args", "precision", "clip_grad_norm"} & chosen.keys() and chosen["lr"] < 1e-4
    del full_size["norm"]  # as in an official checkpoint
    assert values(PHOTOS, full_size, pretrained="false")["norm"] == "frozen"
    chosen = values(PHOTOS, stored, backbone="resnet34")
    assert chosen["norm"] == "frozen" and chosen["num_queries"] == 20
    assert chosen["model_args"]["hidden_dim"] == 96


def test_the_crop_fits_the_images():
    assert values(ON_GPU)["crop"] == (640, 640)
    assert values(dataclasses.replace(ON_GPU, long_side=4000))["crop"] == (1024, 1024)
    assert values(dataclasses.replace(PHOTOS, long_side=70))["crop"] == (160, 160)
    assert values(dataclasses.replace(PHOTOS, long_side=40))["crop"] == (96, 96), "enlarged about twice"


# 32 nuclei of 14 pixels in an image of 256, on a grid of 8 x 4.
GRID = np.array([[32.0 * x, 64.0 * y, 14, 14] for x in range(8) for y in range(4)])
NUCLEI = dataclasses.replace(
    PHOTOS, long_side=256, object_side=0.055, large_object_side=0.13, num_objects=(49, 50), boxes=(GRID,)
)


def test_small_objects_are_learned_in_windows():
    chosen = values(NUCLEI)
    assert (chosen["tile"], chosen["crop"], chosen["test_size"]) == (96, (96, 96), (96, 96))
    assert chosen["batch"] == 8 and chosen["full_res_masks"]
    # From crops of 224 a model for a CPU learns much slower (docs/RESULTS.md).
    larger = dataclasses.replace(NUCLEI, object_side=16 / 256, large_object_side=36 / 256)
    assert values(larger)["tile"] == 96
    # A window has up to 96 / 0.7 = 137 pixels: 5 columns and 3 rows of the grid.
    assert max(count_in_windows([GRID], 96 / 0.7)) == 15 and chosen["num_queries"] == 30
    assert values(dataclasses.replace(NUCLEI, gpu_memory=80.0))["crop"] == (512, 512)
    assert values(dataclasses.replace(NUCLEI, gpu_memory=80.0))["tile"] == 0, "the whole image fits"
    survey = dataclasses.replace(NUCLEI, gpu_memory=80.0, long_side=4000, object_side=0.005)
    survey = dataclasses.replace(survey, large_object_side=0.01)
    assert values(survey)["tile"] == 320 and values(survey)["crop"] == (512, 512)


def test_large_objects_are_not_cut_into_windows():
    """Whole images get a larger crop instead, and fewer of them per step."""
    chosen = values(dataclasses.replace(NUCLEI, large_object_side=0.5))
    assert (chosen["tile"], chosen["crop"]) == (0, (256, 256)) and chosen["lsj_scale"] == (0.7, 1.3)
    assert (chosen["batch"], chosen["num_points"], chosen["num_queries"]) == (4, 2621, 80)
    assert (values(PHOTOS)["batch"], values(PHOTOS)["num_points"]) == (8, 1024)


def test_windows_follow_the_flags():
    assert values(NUCLEI, tile=64)["num_queries"] == 20 and "tile" not in values(NUCLEI, tile=64)
    assert values(NUCLEI, tile=0)["crop"] == (256, 256)
    assert values(NUCLEI, short_sides=(128,))["tile"] == 0
    assert values(NUCLEI, crop=(192, 192))["tile"] == 192 and values(NUCLEI, crop=(256, 256))["tile"] == 0


@pytest.mark.parametrize("side", [10.0, 40.0, 100.0])
def test_objects_of_windows_are_counted_pixel_by_pixel(side):
    boxes = np.random.default_rng(0).uniform(0, 100, (20, 4))
    expected = []
    for x, y, w, h in boxes:
        left, top = x + w / 2 - side / 2, y + h / 2 - side / 2
        shown = [a < left + side and a + c > left and b < top + side and b + d > top for a, b, c, d in boxes]
        expected.append(sum(shown))
    assert count_in_windows([boxes[:0], boxes], side) == expected
    assert count_in_windows([np.repeat(boxes, 200, 0)], 1000.0) == [4000] * 1000


@pytest.mark.parametrize("processes", [1, 3, 8])
def test_the_batch_is_a_multiple_of_the_processes(processes):
    for facts in (PHOTOS, ON_GPU):
        assert values(dataclasses.replace(facts, num_processes=processes))["batch"] % processes == 0


def test_facts_are_those_of_the_drawn_images(shapes):
    train, _ = load_data(str(shapes))
    facts = measure_facts(train, train.image_ids, torch.device("cpu"))
    counts = [len(train.labels(image_id)) for image_id in train.image_ids]
    areas = [o["area"] for image_id in train.image_ids for o in train.objects(image_id)]
    assert len(facts.boxes) == len([i for i in train.image_ids if train.objects(i)])
    assert sum(map(len, facts.boxes)) == len(areas) and facts.large_object_side >= facts.object_side
    assert facts.long_side == 64 and facts.num_objects[1] == max(counts)
    assert (facts.num_labeled, facts.gpu_memory) == (12, 0.0)
    assert facts.object_side == pytest.approx(
        sorted(math.sqrt(a) / 64 for a in areas)[len(areas) // 2], abs=0.02
    )


def config(given=(), **options):
    cfg = Config(preset="auto", **options)
    cfg.given = frozenset(given)
    return cfg


def test_steps_fit_the_hours():
    cfg = config(given={"hours"}, hours=1.0, steps=(100, 100, 200), finetune_steps=50)
    fitted = fit_steps(cfg, seconds=1.0)
    t, b, d = fitted["steps"]
    total = t + GUIDED_STEP_COST * (b + d) + fitted["finetune_steps"]
    assert total == pytest.approx(0.9 * 3600, rel=0.01) and b / t == pytest.approx(1, rel=0.01)
    assert fitted["ema_decay"] == ema_decay(d)


@pytest.mark.parametrize("hours, scaled", [(1.0, True), (0.1, False)])
def test_steps_of_fine_tuning_that_are_given_stay_and_the_others_fit_the_rest(hours, scaled):
    cfg = config(given={"hours", "finetune_steps"}, hours=hours, steps=(100, 100, 200), finetune_steps=500)
    fitted = fit_steps(cfg, seconds=1.0)
    t, b, d = fitted["steps"]
    assert "finetune_steps" not in fitted
    if scaled:
        assert t + GUIDED_STEP_COST * (b + d) + 500 == pytest.approx(0.9 * 3600, rel=0.01)
    else:
        assert (t, b, d) == (1, 1, 1), "fine-tuning alone takes longer"


def test_hours_refit_the_steps_of_another_run(tmp_path):
    options = dataclasses.asdict(Config(preset="auto", steps=(100, 100, 200), finetune_steps=50))
    (tmp_path / "settings.json").write_text(json.dumps({"options": options, "choices": {}}))
    flags = ["--data", "my_dataset", "--settings-from", str(tmp_path)]
    cfg = parse_config([*flags, "--hours", "1"])
    fitted = fit_steps(cfg, seconds=1.0)
    assert fitted["steps"] != (100, 100, 200) and {"finetune_steps", "ema_decay"} <= fitted.keys()
    assert {"steps", "finetune_steps", "ema_decay"} <= parse_config(flags).given


def test_hours_that_auto_chose_are_a_limit_only():
    cfg = config(hours=1.0, steps=(100, 100, 200))
    assert fit_steps(cfg, seconds=0.01) == {}
    assert fit_steps(cfg, seconds=100.0)["steps"] == (4, 4, 9)


def test_auto_takes_the_options_of_a_recipe():
    robust = values(PHOTOS)
    for name, value in RECIPES["robust"].items():
        assert robust[name] == value
    assert values(PHOTOS, mask_nms_iou=0.7).get("mask_nms_iou") is None
    paper = parse_config(["--data", "my_dataset", "--recipe", "paper"])
    given = {name: getattr(paper, name) for name in paper.given}
    assert RECIPES["paper"].items() <= given.items()
    assert not RECIPES["paper"].keys() & values(PHOTOS, **given).keys()


def test_another_recipe_for_a_run_that_has_begun_is_not_ignored(shapes, tmp_path):
    """A run keeps what auto chose. Phase 2 is run again with other options, as it is for any flag."""
    flags = ["--data", shapes, *FEW_STEPS.split()]
    flags += ["--model-args", SMALL, "--out", tmp_path / "run"]
    run("burnin.py", *flags)
    assert "phases 1 and 2 are done" in run("burnin.py", *flags, "--recipe", "robust").stdout
    done = run("burnin.py", *flags, "--recipe", "paper").stdout
    assert "burnin.pt in" in done
    assert "was made with other options (unsupervised_weight 0.5, now 2.0)" in done
    assert "teacher kept" in done and (tmp_path / "run/burnin.previous.pt").exists()


def test_a_recipe_is_a_set_of_plain_options():
    for name, value in vars(parse_config(["--data", "coco", "--recipe", "paper"])).items():
        assert value == getattr(Config(preset="coco", data="coco"), name) or name == "given"
    robust = parse_config(["--recipe", "robust", "--steps", "30,30,60", "--mask-nms-iou", "0.7"])
    assert robust.mask_nms_iou == 0.7
    assert robust.strong_view == RECIPES["robust"]["strong_view"]


@pytest.mark.parametrize("given, expected", [("true", "color"), ("false", ""), ("turn,noise", "turn,noise")])
def test_the_strong_view_is_a_list_of_changes(given, expected):
    assert parse_config(["--strong-view", given]).strong_view == expected


def test_steps_that_are_given_have_no_limit():
    assert "hours" in values(PHOTOS) and "hours" not in values(PHOTOS, steps=(100, 100, 200))


def test_only_the_phases_that_run_count():
    """With a teacher of another run, or labels only, there is time for more steps."""
    limits = dict(given={"hours"}, hours=1.0, steps=(100, 100, 200))
    t, b, d = fit_steps(config(**limits, teacher_checkpoint="t.pt"), seconds=1.0)["steps"]
    assert GUIDED_STEP_COST * (b + d) == pytest.approx(0.9 * 3600, rel=0.01)
    assert sum(fit_steps(config(**limits, supervised_only=True), seconds=1.0)["steps"]) == 3240
    limits["given"] = set()  # the limit of preset auto: the baseline has as many steps as the guided run
    expected = fit_steps(config(**limits), seconds=10.0)
    assert fit_steps(config(**limits, supervised_only=True), seconds=10.0) == expected


def test_a_refused_call_and_the_supervised_baseline_leave_the_settings_of_a_run(shapes, tmp_path):
    flags = ["--data", shapes, *FEW_STEPS.split(), "--out", tmp_path / "run"]
    flags += ["--model-args", SMALL]
    run("burnin.py", *flags)
    before = (tmp_path / "run/settings.json").read_text()
    refused = run("burnin.py", *flags[:-1], '{"hidden_dim": 64}', code=2)
    assert "was made with other options (model_args" in refused.stderr
    assert (tmp_path / "run/settings.json").read_text() == before
    run("distill.py", *flags, "--supervised-only", "--recipe", "robust")
    assert (tmp_path / "run/settings.json").read_text() == before, "unchanged"


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--strong-view x", "must be of color, noise, erase, turn, cutmix, or false, found 'x'"),
        ("--hours 1 --steps 5", "--hours fits --steps to a time; drop one"),
        ("""--data-args '{"foo": 1}'""", "--data-args: unknown name 'foo'"),
        ("""--data-args '{"val_ratio": "x"}'""", "--data-args: val_ratio must be float, found 'x'"),
    ],
)
def test_a_wrong_combination_is_an_error_of_one_line(flags, words):
    done = run("distill.py", *shlex.split(flags), code=2)
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_the_expected_time_counts_all_phases():
    cfg = Config(steps=(10, 20, 30), finetune_steps=4)
    assert expected_seconds(cfg, "teacher", 10, 1.0) == (10, pytest.approx(50 * GUIDED_STEP_COST + 4))
    left, later = expected_seconds(cfg, "distill", 3, GUIDED_STEP_COST)
    assert (left, later) == (pytest.approx(3 * GUIDED_STEP_COST), pytest.approx(4))
    assert expected_seconds(cfg, "finetune", 4, 1.0) == (4, 0)


def test_settings_are_read_back_as_they_were(tmp_path):
    cfg = Config(out=str(tmp_path), crop=(64, 96), unlabeled=["a"], model_args={"hidden_dim": 32})
    write_settings(cfg)
    assert Config(**read_settings(tmp_path)["options"]) == cfg
    assert Config(**read_settings(tmp_path / "distill.pt")["options"]) == cfg


def test_settings_from_takes_the_settings_of_a_run_but_not_its_data(tmp_path):
    write_settings(Config(out=str(tmp_path), data="coco", ratio=0.02, crop=(64, 96), preset="coco", batch=4))
    flags = ["--data", "my_dataset", "--settings-from", str(tmp_path), "--lr", "0.5"]
    cfg = parse_config(flags)
    assert (cfg.crop, cfg.batch, cfg.lr, cfg.data, cfg.ratio) == ((64, 96), 4, 0.5, "my_dataset", 1.0)
    assert cfg.out == "runs/my_dataset-1"


def test_settings_that_are_missing_are_an_error_of_one_line(tmp_path):
    done = run("distill.py", "--settings-from", tmp_path / "nowhere", code=2)
    assert (
        done.stderr.startswith("error: cannot read the settings of the run") and done.stderr.count("\n") == 1
    )


FEW_STEPS = "--backbone resnet10t --pretrained false --crop 64,64 --batch 2 --num-points 16 --steps 2,2,2"
FEW_STEPS += " --device cpu --precision fp32"
SMALL = '{"hidden_dim": 32, "num_heads": 4, "backbone_args": {"stem_type": "", "channels": [16, 16, 32, 32]}}'


def test_a_folder_needs_no_preset_and_keeps_its_settings_when_resumed(shapes, tmp_path):
    flags = ["--data", shapes, *FEW_STEPS.split(), "--out", tmp_path / "run"]
    flags += ["--model-args", SMALL]
    first = run("distill.py", *flags)
    assert "chosen from the images and the machine" in first.stdout
    assert "--norm group  (for training from scratch)" in first.stdout
    settings = json.loads((tmp_path / "run/settings.json").read_text())["options"]
    assert settings["preset"] == "auto" and settings["crop"] == [64, 64]
    assert settings["model_args"]["hidden_dim"] == 32 and settings["model_args"]["decoder_layers"] == 3
    again = run("distill.py", *flags)
    assert "all phases are done" in again.stdout
    [command] = [line for line in first.stdout.splitlines() if "the same as flags" in line]
    assert "--norm group" in command and "--hours" not in command


@pytest.fixture(scope="module")
def small_student(shapes, tmp_path_factory):
    out = tmp_path_factory.mktemp("small")
    flags = ["--model-args", SMALL, "--num-queries", "7", "--norm", "group", "--steps", "1,1,1"]
    run("distill.py", "--data", shapes, *FEW_STEPS.split(), *flags, "--out", out)
    return out / "burnin.pt"


@pytest.mark.parametrize("option", ["init-from", "teacher-checkpoint", "student-checkpoint"])
def test_a_run_that_starts_from_a_small_checkpoint_has_its_model(option, small_student, shapes, tmp_path):
    flags = FEW_STEPS.replace("--backbone resnet10t ", "").split() + ["--steps", "1,1,1"]
    run("distill.py", "--data", shapes, *flags, f"--{option}", small_student, "--out", tmp_path)
    found = load_checkpoint(tmp_path / "distill.pt")["model_args"]
    assert found == load_checkpoint(small_student)["model_args"]


def test_steps_that_were_fitted_stay_when_the_command_is_repeated(shapes, tmp_path):
    few = FEW_STEPS.replace(" --steps 2,2,2", "")
    flags = ["--data", shapes, *few.split(), "--hours", "0.0001", "--out", tmp_path / "run"]
    flags += ["--model-args", SMALL]
    first = run("burnin.py", *flags)
    assert "(fit 0.0001 hours at" in first.stdout
    again = run("burnin.py", *flags)
    assert "phases 1 and 2 are done" in again.stdout


def test_other_unlabeled_images_mean_that_all_labels_are_used(shapes, tmp_path):
    assert parse_config(["--unlabeled", "photos"]).ratio == 1.0
    assert parse_config(["--unlabeled", "photos", "--ratio", "0.2"]).ratio == 0.2


def test_images_without_annotations_join_the_unlabeled_pool(shapes, tmp_path):
    """A third of the images is annotated. --ratio is 1 by default and counts the annotated images alone."""
    folder = tmp_path / "half"
    shutil.copytree(shapes, folder)
    content = json.loads((folder / "instances_train.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] < 4]
    (folder / "instances_train.json").write_text(json.dumps(content))
    flags = ["--data", folder, *FEW_STEPS.split(), "--model-args", SMALL]
    done = run("distill.py", *flags, "--out", tmp_path / "run")
    assert "12 training images, 4 of them labeled" in done.stdout
    assert "8 images without annotations are unlabeled" in done.stdout
    results = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert not any("precision" in line["pseudo"] for line in results if "pseudo" in line)
    background = run(
        "distill.py", *flags, "--ratio", "1", "--unannotated", "background", "--out", tmp_path / "b"
    )
    assert "12 training images, 12 of them labeled" in background.stdout


def test_help_needs_no_torch():
    """It answers at once: the imports of a phase script take seconds."""
    code = "import runpy, sys\nsys.argv = ['distill.py', '--help']\n"
    code += "try:\n    runpy.run_path('distill.py', run_name='__main__')\n"
    code += "except SystemExit:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--score-threshold" in done.stdout
