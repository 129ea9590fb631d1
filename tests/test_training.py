"""The commands as a user runs them, on a tiny dataset, and what holds over whole runs."""

import errno
import json
import shutil
import sys

import pytest
import torch
from commands import run, same
from torch import nn

import burnin
import checkpoints
import distill
import engine
from data import CocoDataset, View, Views
from evaluate import evaluate, main
from flags import parse_config
from matcher import SetCriterion
from model import Mask2Former
from shapes import write_shapes

TINY = [
    "--preset",
    "shapes",
    "--ratio",
    "0.5",
    "--crop",
    "64,64",
    "--num-queries",
    "6",
    "--hidden-dim",
    "32",
    "--encoder-ffn",
    "32",
    "--decoder-layers",
    "2",
    "--decoder-ffn",
    "32",
    "--num-points",
    "64",
    "--batch",
    "2",
    "--log-every",
    "1",
    "--save-every",
    "2",
    "--score-threshold",
    "0.3",
] + ["--backbone-args", '{"stem_type": "", "channels": [16, 16, 32, 32]}']


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    write_shapes(folder, num_train=12, num_val=4, size=64)
    return folder


def train(tiny, out, *flags, **how):
    return run("distill.py", "--data", tiny, *TINY, "--out", out, *flags, **how)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The output folder of an uninterrupted run, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, train(tiny, out, "--steps", "5", processes=1).stdout


def test_distill_runs_the_three_phases_and_shows_table_and_picture(finished):
    out, printed = finished
    for words in ("phase 1 of 3", "phase 2 of 3", "phase 3 of 3", "12 training images, 6 of them labelled"):
        assert words in printed
    assert all((out / name).exists() for name in ("teacher.pt", "burnin.pt", "distill.pt", "predictions.png"))
    assert not list(out.glob("*.step-*.pt"))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r.get("phase") == "burnin" and "loss" in r] == [1, 2, 3, 4, 5]
    assert any("pseudo_labels" in record for record in records)


def test_run_again_it_says_that_all_is_done_and_repeats_the_table(tiny, finished):
    out, printed = finished
    again = train(tiny, out, "--steps", "5").stdout
    assert "all phases are done" in again and "phase 1" not in again
    table = printed[printed.index("mask AP") : printed.index("picture")]
    assert table in again


def test_refinement_has_a_column_a_picture_and_a_place_in_the_report(tiny, finished, tmp_path):
    out, _ = finished
    shutil.copytree(out, tmp_path / "run")
    printed = train(tiny, tmp_path / "run", "--steps", "5", "--refine", "2").stdout
    header, ap = printed[printed.index("mask AP") :].splitlines()[2:4]
    assert header.split() == ["teacher", "burnt-in", "student", "EMA", "teacher", "refined"]
    refined = checkpoints.load_checkpoint(tmp_path / "run/refine.pt")
    assert ap.split()[-1] == f"{refined['ap']['AP']:.1f}"
    page = (tmp_path / "run/report.html").read_text()
    assert "refinement" in page and "refined" in page
    assert (tmp_path / "run/predictions.png").read_bytes() != (out / "predictions.png").read_bytes()


def test_a_disk_without_room_for_the_report_is_one_line(tiny, finished, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    out, _ = finished
    monkeypatch.setattr(distill, "write_report", full)
    with pytest.raises(SystemExit) as stopped:
        distill.cli(["--data", str(tiny), *TINY, "--out", str(out), "--steps", "5"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert (stopped.value.code, error) == (2, "error: [Errno 28] No space left on device")


def test_evaluate_prints_ap_of_student_and_teacher_by_size_and_class(tiny, finished, tmp_path):
    out, _ = finished
    file = tmp_path / "ap.json"
    printed = run("evaluate.py", out / "distill.pt", "--data", tiny, "--json", file).stdout
    for word in ("student", "teacher", "AP50", "AP75", "APs", "APm", "APl", "circle", "star"):
        assert word in printed
    aps = json.loads(file.read_text())
    assert aps["student"] == checkpoints.load_checkpoint(out / "distill.pt")["ap"]
    assert aps["teacher"] == checkpoints.load_checkpoint(out / "distill.pt")["teacher_ap"]


def test_the_student_of_phase_2_is_fresh_and_phase_3_begins_with_two_copies(finished):
    out, _ = finished
    teacher, burnt_in, last = (
        checkpoints.load_checkpoint(out / f"{phase}.pt") for phase in ("teacher", "burnin", "distill")
    )
    assert same(burnt_in["teacher"], teacher["student"]), "the teacher of phase 2 must not change"
    assert not same(last["teacher"], burnt_in["student"]) and not same(last["teacher"], last["student"])
    steps = [state["step"].item() for state in last["optimizer"]["state"].values()]
    assert set(steps) == {10}, "phases 2 and 3 are one run of the optimiser"


SAVE_EVERY_RANK = """
import torch, distill, engine, flags
original = engine.Run.finish
def finish(run, **results):
    torch.save([run.model.state_dict(), run.teacher and run.teacher.state_dict(), results], f"{run.cfg.out}/{run.phase}.rank{engine.rank()}")
    original(run, **results)
engine.Run.finish = finish
distill.main(flags.parse_config(distill.Config, distill.PRESETS))
"""  # noqa: E501


def test_two_processes_end_with_the_same_weights(tiny, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SAVE_EVERY_RANK)
    out = tmp_path / "out"
    printed = run(
        script, "--data", tiny, *TINY, "--out", out, "--steps", "3", "--device", "cpu", processes=2
    ).stdout
    assert printed.count("picture:") == 1, "rank 0 alone speaks"
    for phase in ("teacher", "burnin", "distill"):
        first, second = (torch.load(out / f"{phase}.rank{rank}", weights_only=True) for rank in (0, 1))
        assert same(first, second), phase


ONE_STEP = """
import sys, torch, burnin, engine, flags, matcher
def grid(*size, device=None):  # the same points for every object, however the batch is divided
    side = int(size[-2] ** 0.5) + 1
    centres = (torch.arange(side) + 0.5) / side
    points = torch.cartesian_prod(centres, centres)
    return points[: size[-2]].expand(*size)
class torch_with_grid:
    def __getattr__(self, name):
        return grid if name == "rand" else getattr(torch, name)
matcher.torch = torch_with_grid()
cfg = flags.parse_config(burnin.Config, burnin.PRESETS, sys.argv[2:])
setting = burnin.Setting(cfg)
run = engine.Run(cfg, "x", setting.fresh_model("student"), setting.device, 1, (0, 1))
teacher = setting.fresh_model("teacher")
generator = torch.Generator().manual_seed(0)
def batch():
    items = []
    for _ in range(4):
        corner = torch.randint(0, 40, (3, 2), generator=generator).tolist()
        masks = torch.zeros(3, 64, 64, dtype=torch.bool)
        for mask, (y, x) in zip(masks, corner):
            mask[y : y + 20, x : x + 24] = True
        image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8, generator=generator)
        items.append(dict(image=image, strong=255 - image, labels=torch.tensor([0, 1, 2]), masks=masks))
    return items[engine.rank() :: engine.world_size()]
burnin.pseudo_labels = lambda outputs, **_: [item for item in pseudo]
labelled, pseudo = batch(), batch()
criterion, device = setting.criterion, setting.device
losses, guided, _ = burnin.guided_step(run.student, teacher, criterion, labelled, pseudo, cfg, device)
run.update(sum(losses.values()) + 2 * sum(guided.values()), losses, labelled)
if engine.rank() == 0:
    torch.save({n: p.grad for n, p in run.model.named_parameters()}, sys.argv[1])
"""


def test_one_step_of_two_processes_equals_one_step_of_one(tiny, tmp_path):
    """Half the batch each, and that in two parts, the same objects in either half: the gradients agree."""
    script = tmp_path / "script.py"
    script.write_text(ONE_STEP)
    for processes in (1, 2):
        flags = [tmp_path / f"{processes}.pt", "--data", tiny, *TINY, "--device", "cpu", "--clip", "0"]
        flags += ["--accumulate", processes]
        run(script, *flags, "--out", tmp_path / "out", processes=processes, cwd=tmp_path)
    one, two = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5 * max(1, one[name].abs().max()))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--ratio", "5"], "--ratio 5 must be in (0, 1]"),
        (["--ratio", "nan"], "must be in (0, 1]"),
        (["--ratio", "many"], "argument --ratio: invalid float value: 'many'"),
        (["--data", "nonsense"], "'nonsense' is neither shapes, coco, cityscapes nor a folder"),
        (["--bakbone", "resnet50"], "unrecognized arguments: --bakbone resnet50; did you mean --backbone?"),
        (["--backb", "resnet50"], "unrecognized arguments: --backb"),
        (["--backbone", "resnet5"], "unknown backbone 'resnet5'"),
        (["--preset", "coca"], "unknown preset 'coca': one of shapes, coco, cityscapes"),
        (["--norm", "layer"], "unknown norm 'layer'"),
        (["--schedule", "linear"], "unknown schedule 'linear': one of poly, step, cosine"),
        (["--steps", "1,2"], "--steps is one number or three"),
        (["--crop", "65,64"], "multiples of 32"),
        (["--data", "coco", "--root", "/nowhere"], "no annotation file"),
        (["--root", "/nowhere"], "--root goes with shapes, coco or cityscapes as --data, not with '/"),
        (["--labels-only", "--teacher", "a.pt"], "--labels-only trains a fresh model, without --teacher"),
        (["--student", "a.pt", "--teacher", "b.pt"], "--student begins with phase 3"),
        (["--encoder-layers", "0"], "--encoder-layers must be at least 1, found 0"),
        (["--backbone", "swinv2_tiny_window8_256", "--backbone-args", "{}"], "takes no images of 96 x 96: "),
        (["--teacher", "missing.pt"], "no checkpoint 'missing.pt'"),
        (["--student", "missing.pt"], "no checkpoint 'missing.pt'"),
        (["--init", "missing.pkl"], "no checkpoint 'missing.pkl'"),
        (["--split", "missing.txt"], "the split 'missing.txt' cannot be read"),
        (["--unlabelled", "missing"], "no folder 'missing' of unlabelled images"),
        (["--save-every", "0"], "--save-every must be at least 1, found 0"),
        (["--accumulate", "2", "--norm", "batch"], "--accumulate is 1 with --norm batch"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--workers", "-1"], "--workers must be at least 0"),
        (["--lr", "nan"], "--lr must be at least 0, found nan"),
        (["--clip", "inf"], "--clip must be at least 0, found inf"),
        (["--ema-decay", "2"], "--ema-decay must be at least 0 and at most 1, found 2"),
        (["--repeat-threshold", "-1"], "--repeat-threshold must be at least 0"),
        (["--loss-weights", "2,5"], "--loss-weights must be three numbers, found (2, 5)"),
        (["--pixel-mean", "1,2"], "--pixel-mean must be three numbers, found (1, 2)"),
        (["--backbone-args", "3"], "an object in JSON, found '3'"),
        (["--backbone-args", "{"], "an object in JSON, found '{'"),
        (["--backbone-args", '{"nonsense": 1}'], "unexpected keyword argument 'nonsense'"),
        (["--backbone-weights", "missing.pt"], "no file --backbone-weights 'missing.pt'"),
        (["--hidden-dim", "30"], "hidden_dim 30 must be a multiple of 4"),
        (["--labels-only", "yes"], "true or false, found 'yes'"),
        (["--labels-only", "--refine", "3"], "--refine is a phase after distillation"),
        (["--steps", "a,b"], "numbers with commas between, found 'a,b'"),
        (["--short-side", "0"], "short_side has lengths in pixels, found (0,)"),
        (["--scale", "2.0"], "scale is a range of two numbers"),
        (["--scale", "2,1"], "scale is a range of two numbers"),
        (["--device", "cuda"], "torch finds no GPU"),
        (["--device", "tpu"], "unknown --device 'tpu'"),
        (["--precision", "fp16"], "unknown --precision 'fp16': bf16 or fp32"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line_and_exit_code_2(tiny, tmp_path, capsys, flags, words):
    arguments = ["--data", str(tiny), *TINY, "--out", str(tmp_path / "out"), "--steps", "1", *flags]
    with pytest.raises(SystemExit) as stopped:
        distill.cli(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_bad_flags_end_the_real_command_with_one_line():
    done = run("distill.py", "--ratio", "5", processes=1, code=2)
    assert done.stderr == "error: --ratio 5 must be in (0, 1]; 5 % is 0.05\n" and done.stdout == ""


def test_an_output_folder_of_other_settings_is_refused(tiny, finished, capsys):
    out, _ = finished
    with pytest.raises(SystemExit) as stopped:
        distill.cli(["--data", str(tiny), *TINY, "--out", str(out), "--steps", "5", "--seed", "1"])
    assert stopped.value.code == 2
    assert "made with other settings (seed 0, now 1)" in capsys.readouterr().err


def test_another_split_under_the_same_name_is_refused(tiny, tmp_path, capsys):
    flags = ["--data", str(tiny), *TINY, "--out", str(tmp_path), "--steps", "1", "--split"]
    flags += [str(tmp_path / "split.txt")]
    for lines in ("0\n1\n", "0\n2\n"):
        (tmp_path / "split.txt").write_text(lines)
        if lines == "0\n1\n":
            distill.cli(flags)
        else:
            with pytest.raises(SystemExit):
                distill.cli(flags)
            assert "was made with other settings (split '" in capsys.readouterr().err


def test_classes_of_training_and_validation_must_agree(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "data")
    file = tmp_path / "data/instances_val.json"
    file.write_text(file.read_text().replace('"star"', '"moon"'))
    with pytest.raises(SystemExit):
        distill.cli(["--data", str(tmp_path / "data"), *TINY, "--out", str(tmp_path / "out")])
    assert "validation ['circle', 'square', 'triangle', 'moon']" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        ({"annotations": []}, "no labelled image has an object\n"),
        ({"annotations": [], "images": []}, "no labelled image has an object\n"),
        ({"categories": []}, "annotation 1: its category_id 3 is not in the file"),
        ({"segmentation": [1, 1, 9, 1, 9, 9]}, "; 33 annotations are left out, such as: annotation 1 (image"),
    ],
)
def test_labels_without_an_object_are_refused(tiny, tmp_path, capsys, change, words):
    shutil.copytree(tiny, tmp_path / "data")
    file = tmp_path / "data/instances_train.json"
    content = json.loads(file.read_text())
    for part in content["annotations"] if "segmentation" in change else [content]:
        part |= change
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stopped:
        distill.cli(["--data", str(tmp_path / "data"), *TINY, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and words in error


def test_many_labelled_images_without_objects_are_said(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "data")
    file = tmp_path / "data/instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 0]
    file.write_text(json.dumps(content))
    flags = ["--data", str(tmp_path / "data"), *TINY, "--ratio", "1", "--out", str(tmp_path / "out")]
    distill.Setting(parse_config(distill.Config, distill.PRESETS, flags)).show(distill.PRESETS)
    assert "warning: 11 of 12 labelled images have no object\n" in capsys.readouterr().out


def test_a_teacher_of_ones_own_may_be_another_model(tiny, finished, tmp_path):
    out, _ = finished
    flags = ["--teacher", out / "teacher.pt", "--hidden-dim", "16", "--steps", "2"]
    printed = train(tiny, tmp_path, *flags).stdout
    assert "phase 1" not in printed and "phase 2" in printed
    table = run("evaluate.py", tmp_path / "burnin.pt", "--data", tiny).stdout
    assert "student" in table and "teacher" in table


def test_distillation_from_a_student_of_ones_own_is_what_follows_its_burn_in(tiny, finished, tmp_path):
    out, _ = finished
    flags = ["--student", out / "burnin.pt", "--steps", "5"]
    printed = train(tiny, tmp_path, *flags, processes=1).stdout  # like that of `finished`
    assert "phase 2" not in printed and "phase 3" in printed and (tmp_path / "predictions.png").exists()
    assert "guided burn-in" not in printed and "  steps     5 distillation\n" in printed
    assert "burnt-in" not in printed[printed.index("mask AP") :], "its AP may be of other images"
    ours, theirs = (checkpoints.load_checkpoint(folder / "distill.pt") for folder in (tmp_path, out))
    assert all(same(ours[name], theirs[name]) for name in ("student", "teacher", "optimizer"))


def test_distillation_from_a_student_of_ones_own_takes_its_moments_but_not_its_settings(
    tiny, finished, tmp_path
):
    out, _ = finished
    flags = ["--steps", "5,5,2", "--lr", "1e-6", "--backbone-lr-factor", "0.5", "--weight-decay", "0.25"]
    train(tiny, tmp_path, "--student", out / "burnin.pt", *flags)
    optimizer = checkpoints.load_checkpoint(tmp_path / "distill.pt")["optimizer"]
    assert {group["initial_lr"] for group in optimizer["param_groups"]} == {1e-6, 0.5e-6}
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0.0, 0.25}
    assert {state["step"].item() for state in optimizer["state"].values()} == {5 + 2}


def test_a_checkpoint_of_an_earlier_phase_that_is_gone_is_one_line(tiny, finished, tmp_path, capsys):
    out, _ = finished
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out/teacher.pt").unlink()
    with pytest.raises(SystemExit) as stopped:
        distill.cli(["--data", str(tiny), *TINY, "--out", str(tmp_path / "out"), "--steps", "5"])
    assert stopped.value.code == 2 and "no checkpoint" in capsys.readouterr().err


def test_a_phase_that_was_killed_in_its_last_evaluation_goes_on_with_it(tiny, tmp_path, monkeypatch):
    flags = ["--data", str(tiny), *TINY, "--steps", "1", "--tensorboard", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(burnin, "measure", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            distill.cli(flags)
    assert (tmp_path / "teacher.step-0000001.pt").exists()
    checkpoints.locks.clear()
    distill.cli(flags)
    assert (tmp_path / "distill.pt").exists()


def test_a_model_of_one_query_has_not_too_many_pseudo_labels_before_it_has_any(tiny, tmp_path):
    flags = [*TINY, "--num-queries", "1", "--steps", "1", "--log-every", "5", "--out", tmp_path]
    run("burnin.py", "--data", tiny, *flags)


def test_a_skipped_step_leaves_the_statistics_of_batch_norms_as_they_were(tmp_path):
    cfg = burnin.parse(burnin.Config, burnin.PRESETS, ["--out", str(tmp_path), *TINY])
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    run = engine.Run(cfg, "teacher", model, torch.device("cpu"), 2, (0, 2))
    run.step = 0

    def update(images):
        loss = model(images).square().sum() + model[0].weight.sum()
        run.update(loss, {"loss": loss}, [{"file": "a.png"}])
        return model[1].running_mean.clone()

    first = update(torch.randn(8, 3))
    assert first.any(), "a step that counts changes them"
    assert torch.equal(update(torch.full((8, 3), torch.nan)), first)
    assert model[1].running_var.isfinite().all()


def test_what_is_logged_is_averaged_over_what_was_counted(tmp_path):
    cfg = burnin.parse(burnin.Config, burnin.PRESETS, ["--out", str(tmp_path), *TINY])
    run = engine.Run(cfg, "burnin", nn.Linear(3, 3), torch.device("cpu"), 2, (0, 2))
    for number, scores in enumerate(([0.8, 0.9], [], [0.7])):
        run.log({"score": (torch.tensor(scores).sum(), len(scores)), "none": (0.0, 0)}, number=number)
    shown = run._means(3, 1.0)
    assert shown["score"] == pytest.approx(0.8) and shown["none"] is None
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["number"] == 1 and found["score"] == shown["score"] and found["none"] is None


def test_a_student_of_ones_own_that_is_another_model_is_refused(tiny, finished, tmp_path, capsys):
    out, _ = finished
    flags = ["--student", str(out / "burnin.pt"), "--hidden-dim", "16", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        distill.cli(["--data", str(tiny), *TINY, *flags])
    assert "is a model with hidden_dim 32, not 16" in capsys.readouterr().err


def test_without_a_strong_view_the_student_sees_what_the_teacher_sees(tiny):
    cfg = burnin.parse(
        distill.Config, distill.PRESETS, ["--data", str(tiny), *TINY, "--strong-view", "false"]
    )
    _, unlabelled = burnin.Setting(cfg).both_streams("burnin", 0)
    assert not any("strong" in item for item in next(unlabelled))


def test_labels_only_trains_for_the_steps_of_all_phases(tiny, finished, tmp_path):
    printed = train(tiny, tmp_path, "--steps", "2,1,1", "--labels-only").stdout
    assert "labels_only done" in printed and "phase 2" not in printed
    assert (tmp_path / "labels_only.pt").exists() and not (tmp_path / "teacher.pt").exists()


def test_a_flag_overrides_the_preset_and_the_preset_the_default():
    def parse(*flags):
        return parse_config(distill.Config, distill.PRESETS, flags)

    assert parse("--data", "coco").lr == 1e-4 and parse().lr == distill.PRESETS["shapes"]["lr"]
    assert parse("--lr", "0.5").lr == 0.5
    assert parse("--data", "somewhere").crop == (1024, 1024), "a folder of one's own takes COCO's preset"
    assert parse("--data", "somewhere", "--preset", "cityscapes").crop == (512, 1024)
    assert parse("--steps", "300").steps == (300, 300, 300)
    assert parse("--data", "a/b/", "--ratio", "0.25").out == "runs/b-0.25"


def test_sizes_at_test_time_are_in_proportion_to_the_crop(tiny, tmp_path, capsys):
    def sizes(*flags):
        cfg = parse_config(distill.Config, distill.PRESETS, flags)
        return cfg.test_short_side, cfg.test_long_side

    assert sizes("--data", "coco") == (800, 1333), "as the field has them"
    assert sizes("--data", "somewhere", "--crop", "512,512") == (400, 666)
    assert sizes("--data", "somewhere", "--crop", "512,512", "--test-short-side", "300") == (300, 666)
    assert sizes("--data", "cityscapes", "--crop", "256,512") == (1024, 2048), "the preset's own"
    for more, said in ([], False), (["--test-short-side", "200", "--test-long-side", "0"], True):
        flags = ["--data", str(tiny), *TINY, "--out", str(tmp_path), *more]
        cfg = parse_config(distill.Config, distill.PRESETS, flags)
        distill.Setting(cfg, last="distill").show(distill.PRESETS)
        warning = "an image of 64 x 64 is resized by 3.12 at test time, in training by 0.8 to 1.25"
        assert (warning in capsys.readouterr().out) is said


@pytest.mark.parametrize(
    "precision, capable, expected",
    [
        ("bf16", False, torch.bfloat16),
        ("fp32", True, torch.float32),
        ("", True, torch.bfloat16),
        ("", False, torch.float32),
    ],
)
def test_models_run_in_the_precision_asked_for_or_in_bf16_where_it_is_fast(
    monkeypatch, precision, capable, expected
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable})
    device = engine.start_processes("cpu", precision)
    with engine.autocast(device):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected


def test_bf16_that_a_gpu_only_emulates_is_not_taken(monkeypatch):
    monkeypatch.setattr(engine, "bfloat16", None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not engine.takes_bfloat16(torch.device("cuda"))


def test_a_run_is_evaluated_in_its_precision_unless_asked_otherwise(finished):
    out, _ = finished
    for flags, expected in ([], False), (["--precision", "bf16"], True):
        main([str(out / "distill.pt"), *flags])
        assert engine.bfloat16 is expected


def test_learning_rate_schedules_are_fractions_of_the_run():
    assert engine.lr_factor("poly", 0.5) == 0.5**0.9
    assert [round(engine.lr_factor("step", p), 6) for p in (0, 0.88, 0.89, 0.97)] == [1, 1, 0.1, 0.01]
    assert engine.lr_factor("cosine", 1.0) == 0 and engine.lr_factor("cosine", 0.0) == 1
    assert engine.lr_factor("cosine", 0.05, warmup=0.1) == 0.5


def test_a_checkpoint_that_is_damaged_or_foreign_is_named(tmp_path):
    for name, content in (("text.pt", b"hello"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            checkpoints.load_checkpoint(tmp_path / name)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        checkpoints.load_checkpoint(tmp_path / "other.pt")


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    """Or its owner would be told to remove it."""

    def refused(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoints, "check_archive", refused)
    with pytest.raises(OSError, match="a.pt cannot be read: Permission denied"):
        checkpoints.load_checkpoint(tmp_path / "a.pt")


def test_four_images_are_learnt_by_heart(tmp_path):
    """Over-fitted to AP above 90: every part, from file to AP, fits together."""
    write_shapes(tmp_path / "four", num_train=4, num_val=1, size=96, seed=1)
    dataset = CocoDataset(tmp_path / "four/instances_train.json", tmp_path / "four/images")
    preset = burnin.PRESETS["shapes"]
    torch.manual_seed(0)
    torch.set_num_threads(2)
    names = "backbone backbone_args norm num_queries hidden_dim encoder_layers encoder_ffn"
    names += " decoder_layers decoder_ffn"
    model = Mask2Former(4, **{name: preset[name] for name in names.split()})
    criterion = SetCriterion(4, num_points=256)
    views = Views(dataset, View(crop=(96, 96), scale=(1.0, 1.0), flip=False))
    batch = [views[image_id, 0] for image_id in dataset.image_ids]
    images = torch.stack([item["image"] for item in batch])
    optimizer = engine.make_optimizer(model, 1e-3, 0.05, 1.0)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * engine.lr_factor("cosine", step / 150, 0.05)
        optimizer.zero_grad()
        sum(criterion(model(images), batch).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert evaluate(model, dataset)["AP"] > 90
