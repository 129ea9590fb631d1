"""Tests of the commands as a user runs them, on a tiny dataset, and of the parts in training/."""

import dataclasses
import errno
import json
import re
import shlex
import shutil
import sys

import pytest
import torch
from commands import run, same
from torch import nn

import distill
import evaluate
import training.checkpoint
from data import Augmentation, AugmentedDataset, CocoDataset, collate
from layouts.shapes import write_shapes
from matcher import SetCriterion
from model import Mask2Former
from training.checkpoint import completed_phases, load_checkpoint, load_student_checkpoint, save_checkpoint
from training.cli import ALIASES, MODEL_ARGS, TEST_SIZE, parse_config
from training.config import PRESETS, Config
from training.distributed import Env, autocast, init_distributed, use_bf16
from training.metrics import Metrics
from training.optimization import GuardedStep, build_optimizer, lr_multiplier, set_lr
from training.setup import build_model, model_arguments, print_setup, set_up

CPU = Env(torch.device("cpu"))
TINY = shlex.split(
    "--preset shapes --ratio 0.5 --crop 64,64 --num-queries 6 --hidden-dim 32 --encoder-ffn 32 "
    "--decoder-layers 2 --decoder-ffn 32 --num-points 64 --batch 2 --log-every 1 --save-every 2 "
    """--score-threshold 0.3 --backbone-args '{"stem_type": "", "channels": [16, 16, 32, 32]}'"""
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    write_shapes(folder, num_train=12, num_val=4, size=64)
    return folder


def train(tiny, out, *flags, script="distill.py", **kwargs):
    return run(script, "--data", tiny, *TINY, "--out", out, *flags, **kwargs)


@pytest.fixture(scope="module")
def completed(tiny, tmp_path_factory):
    """The folder of an uninterrupted run, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "completed"
    return out, train(tiny, out, "--steps", "5", processes=1).stdout


# ------------------------------------------------------------------------------------------------ whole runs


def test_distill_runs_the_three_phases_and_writes_a_table_and_a_picture(completed):
    out, printed = completed
    for words in ("phase 1 of 3", "phase 2 of 3", "phase 3 of 3", "12 training images, 6 of them labeled"):
        assert words in printed
    assert all((out / name).exists() for name in ("teacher.pt", "burnin.pt", "distill.pt", "predictions.png"))
    assert not list(out.glob("*.step-*.pt"))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r.get("phase") == "burnin" and "loss" in r] == [1, 2, 3, 4, 5]
    assert any("pseudo_labels" in record for record in records)


def test_a_completed_run_trains_nothing_and_prints_its_table_again(tiny, completed):
    out, printed = completed
    again = train(tiny, out, "--steps", "5").stdout
    assert "all phases are done" in again and "phase 1" not in again
    table = printed[printed.index("mask AP") : printed.index("picture")]
    assert table in again


def test_fine_tuning_is_in_the_table_the_picture_and_the_report(tiny, completed, tmp_path):
    out, _ = completed
    shutil.copytree(out, tmp_path / "run")
    printed = train(tiny, tmp_path / "run", "--steps", "5", "--finetune-steps", "2").stdout
    header, ap = printed[printed.index("mask AP") :].splitlines()[2:4]
    assert header.split() == ["teacher", "burnt-in", "student", "EMA", "teacher", "fine-tuned"]
    fine_tuned = load_checkpoint(tmp_path / "run/finetune.pt")
    assert ap.split()[-1] == f"{fine_tuned['ap']['AP']:.1f}"
    page = (tmp_path / "run/report.html").read_text()
    assert "fine-tuning" in page and "fine-tuned" in page
    assert (tmp_path / "run/predictions.png").read_bytes() != (out / "predictions.png").read_bytes()


def test_a_disk_that_is_too_full_for_the_report_is_an_error_of_one_line(tiny, completed, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    out, _ = completed
    monkeypatch.setattr("tools.report.write_report", full)
    with pytest.raises(SystemExit) as stop:
        distill.main(["--data", str(tiny), *TINY, "--out", str(out), "--steps", "5"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert (stop.value.code, error) == (2, "error: [Errno 28] No space left on device")


def test_evaluate_prints_the_ap_of_student_and_teacher_by_size_and_class(tiny, completed, tmp_path):
    out, _ = completed
    file = tmp_path / "ap.json"
    printed = run("evaluate.py", out / "distill.pt", "--data", tiny, "--json", file).stdout
    for word in ("student", "teacher", "AP50", "AP75", "APs", "APm", "APl", "circle", "star"):
        assert word in printed
    aps = json.loads(file.read_text())
    assert aps["student"] == load_checkpoint(out / "distill.pt")["ap"]
    assert aps["teacher"] == load_checkpoint(out / "distill.pt")["teacher_ap"]


def test_phase_2_keeps_the_teacher_and_phase_3_continues_its_optimizer(completed):
    out, _ = completed
    teacher, burnt_in, last = (
        load_checkpoint(out / f"{phase}.pt") for phase in ("teacher", "burnin", "distill")
    )
    assert same(burnt_in["teacher"], teacher["model"]), "the teacher of phase 2 is frozen"
    assert not same(last["teacher"], burnt_in["model"]) and not same(last["teacher"], last["model"])
    steps = [state["step"].item() for state in last["optimizer"]["state"].values()]
    assert set(steps) == {10}, "phases 2 and 3 are one run of the optimizer"


def test_a_student_can_start_as_a_copy_of_the_teacher(tiny, completed, tmp_path):
    """At a learning rate of 0 it stays one; a teacher of another architecture cannot be copied."""
    teacher = completed[0] / "teacher.pt"
    flags = ["--student-from-teacher", "true", "--teacher-checkpoint", teacher, "--lr", "0", "--steps", "1"]
    train(tiny, tmp_path / "run", *flags, script="burnin.py")
    burnt_in = load_checkpoint(tmp_path / "run/burnin.pt")
    assert same(burnt_in["model"], load_checkpoint(teacher)["model"])
    error = train(tiny, tmp_path / "other", *flags, "--num-queries", "7", script="burnin.py", code=2).stderr
    start = f"error: the student cannot start as a copy of the teacher: {teacher} has num_queries 6, this run"
    assert error == f"{start} has 7; for a fresh student pass --student-from-teacher false\n"


def test_teacher_and_student_start_from_different_weights(tiny, tmp_path):
    cfg = parse_config(["--data", str(tiny), *TINY, "--out", str(tmp_path)])
    _, data, _ = set_up(cfg)
    teacher, student = (build_model(cfg, data, name).state_dict() for name in ("teacher", "student"))
    assert same(build_model(cfg, data, "student").state_dict(), student)
    assert not same(teacher, student)


SAVE_EVERY_RANK = """
import torch, distill
from training.checkpoint import Checkpointer
from training.distributed import rank
original = Checkpointer.finish
def finish(self, **results):
    teacher = self.teacher and self.teacher.state_dict()
    torch.save([self.model.state_dict(), teacher, results], f"{self.cfg.out}/{self.phase}.rank{rank()}")
    original(self, **results)
Checkpointer.finish = finish
distill.main()
"""


def test_two_processes_end_with_the_same_weights(tiny, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SAVE_EVERY_RANK)
    out, flags = tmp_path / "out", ["--steps", "3", "--device", "cpu"]
    printed = train(tiny, out, *flags, script=script, processes=2).stdout
    assert printed.count("picture:") == 1, "only rank 0 prints"
    for phase in ("teacher", "burnin", "distill"):
        first, second = (torch.load(out / f"{phase}.rank{rank}", weights_only=True) for rank in (0, 1))
        assert same(first, second), phase


ONE_STEP = """
import sys, torch, burnin, matcher
from data import collate
from training.cli import parse_config
from training.distributed import rank, world_size
from training.optimization import GuardedStep
from training.setup import build_model, model_arguments, set_up
def grid(*size, device=None):  # the same points for every object, however the batch is divided
    side = int(size[-2] ** 0.5) + 1
    centers = (torch.arange(side) + 0.5) / side
    points = torch.cartesian_prod(centers, centers)
    return points[: size[-2]].expand(*size)
class torch_with_grid:
    def __getattr__(self, name):
        return grid if name == "rand" else getattr(torch, name)
matcher.torch = torch_with_grid()
generator = torch.Generator().manual_seed(0)
def batch():
    items = []
    for _ in range(4):
        corner = torch.randint(0, 40, (3, 2), generator=generator).tolist()
        masks = torch.zeros(3, 64, 64, dtype=torch.bool)
        for mask, (y, x) in zip(masks, corner):
            mask[y : y + 20, x : x + 24] = True
        image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8, generator=generator)
        item = dict(image=image, strong=255 - image, labels=torch.tensor([0, 1, 2]), masks=masks)
        items.append(item | {"file": ""})
    return collate(items[rank() :: world_size()])
class FixedData:  # two fixed batches instead of streams
    def __init__(self, data):
        self.data, self.labeled, self.unlabeled = data, batch(), batch()
    def __getattr__(self, name):
        return getattr(self.data, name)
    def labeled_batches(self, *_):
        yield self.labeled
    def unlabeled_batches(self, *_):
        yield self.unlabeled
def save_gradients(self, *_):
    if rank() == 0:
        torch.save({name: p.grad for name, p in self.model.named_parameters()}, sys.argv[1])
    sys.exit(0)
cfg = parse_config(sys.argv[2:])
env, data, criterion = set_up(cfg)
data = FixedData(data)
burnin.load_teacher_checkpoint = lambda *_: {"model_args": model_arguments(cfg, data)}
burnin.load_model = lambda *_: build_model(cfg, data, "teacher")
burnin.describe = lambda *_: {}
burnin.pseudo_labels = lambda *_: data.unlabeled["targets"]
GuardedStep.__call__ = save_gradients
burnin.guided_burn_in(cfg, env, data, criterion)
"""


def test_a_step_of_two_processes_has_the_gradient_of_one_process(tiny, tmp_path):
    """Each process gets half of the batch, with as many objects, and runs it in two micro-batches."""
    script = tmp_path / "script.py"
    script.write_text(ONE_STEP)
    for processes in (1, 2):
        flags = [tmp_path / f"{processes}.pt", "--data", tiny, *TINY, "--device", "cpu"]
        flags += ["--grad-accum-steps", processes]
        run(script, *flags, "--out", tmp_path / "out", processes=processes, cwd=tmp_path)
    one, two = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert sum(bool(gradient.any()) for gradient in one.values()) > 0.9 * len(one)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5 * max(1, one[name].abs().max()))


# ------------------------------------------------------------------------------------------ expected errors


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--ratio 5", "--ratio 5 must be in (0, 1]"),
        ("--ratio nan", "must be in (0, 1]"),
        ("--ratio many", "argument --ratio: invalid float value: 'many'"),
        ("--data nonsense", "'nonsense' is neither shapes, coco, cityscapes nor a folder"),
        ("--bakbone resnet50", "unrecognized arguments: --bakbone resnet50; did you mean --backbone?"),
        ("--backb resnet50", "unrecognized arguments: --backb"),
        ("--backbone resnet5", "unknown backbone 'resnet5'"),
        ("--preset coca", "unknown preset 'coca'; choose one of auto, cityscapes, coco, shapes"),
        ("--norm layer", "unknown norm 'layer'"),
        ("--schedule linear", "unknown schedule 'linear'; choose one of poly, step, cosine"),
        ("--steps 1,2", "--steps must be one or three whole numbers, at least 1, found (1, 2)"),
        ("--crop 65,64", "multiples of 32"),
        ("--data coco --root /nowhere", "no annotation file"),
        ("--root /nowhere", "--root needs shapes, coco or cityscapes as --data, found '/"),
        ("--supervised-only --teacher-checkpoint a.pt", "--supervised-only trains a fresh model; drop the"),
        ("--supervised-only --student-checkpoint a.pt", "--supervised-only trains a fresh model; drop the"),
        (
            "--student-checkpoint a.pt --teacher-checkpoint b.pt",
            "--student-checkpoint starts at phase 3; drop",
        ),
        ("--encoder-layers 0", "--model-args: encoder_layers must be at least 1, found 0"),
        (
            "--backbone beit_base_patch16_224 --backbone-args {}",
            "takes images of 224 x 224, but not of 288 x",
        ),
        ("--teacher-checkpoint missing.pt", "no checkpoint 'missing.pt'"),
        ("--student-checkpoint missing.pt", "no checkpoint 'missing.pt'"),
        ("--init-from missing.pkl", "no checkpoint 'missing.pkl'"),
        ("--labeled-list missing.txt", "cannot read the labeled list 'missing.txt'"),
        ("--unlabeled missing", "cannot read unlabeled images: no folder 'missing'"),
        ("--save-every 0", "--save-every must be at least 1, found 0"),
        ("--grad-accum-steps 2 --norm batch", "--grad-accum-steps must be 1 with --norm batch"),
        ("--batch 0", "--batch must be at least 1"),
        ("--workers -1", "--workers must be at least 0"),
        ("--lr nan", "--lr must be at least 0, found nan"),
        ("--clip-grad-norm inf", "--clip-grad-norm must be at least 0, found inf"),
        ("--ema-decay 2", "--ema-decay must be at least 0 and at most 1, found 2"),
        ("--repeat-threshold -1", "--repeat-threshold must be at least 0"),
        ("--loss-weights 2,5", "--loss-weights must be three numbers, found (2, 5)"),
        ("--test-size 2,5,3", "--test-size must be two numbers, found (2, 5, 3)"),
        ("--model-args 3", "expected a JSON object, found '3'"),
        ("--model-args {", "expected a JSON object, found '{'"),
        ("""--model-args '{"nonsense": 1}'""", "unexpected keyword argument 'nonsense'"),
        ("""--model-args '{"num_classes": 7}'""", "--model-args: cannot set num_classes here"),
        ("""--model-args '{"pixel_mean": [1, 2]}'""", "--model-args: shape '[3, 1, 1]' is invalid"),
        ("""--backbone-args '{"channels": [1]}'""", "has feature maps at strides [2, 4], needed are"),
        ("--backbone-args 3", "expected a JSON object, found '3'"),
        ("--backbone-args {", "expected a JSON object, found '{'"),
        ("""--backbone-args '{"nonsense": 1}'""", "unexpected keyword argument 'nonsense'"),
        ("--pretrained missing.pt", "--pretrained must be true, false or a file, found 'missing.pt'"),
        ("--hidden-dim 30", "hidden_dim 30 must be a multiple of 4"),
        ("--supervised-only yes", "expected true or false, found 'yes'"),
        ("--supervised-only --finetune-steps 3", "--finetune-steps follows distillation"),
        ("--steps a,b", "expected numbers separated by commas, found 'a,b'"),
        ("--short-sides 0", "short_sides must be lengths in pixels, at least 1, found (0,)"),
        ("--lsj-scale 2.0", "lsj_scale must be two positive numbers in ascending order, found (2,)"),
        ("--lsj-scale 2,1", "lsj_scale must be two positive numbers in ascending order, found (2, 1)"),
        ("--device cuda", "cannot use --device cuda: torch finds no GPU"),
        ("--device tpu", "unknown --device 'tpu'; choose cuda, mps or cpu"),
        ("--device 0", "unknown --device '0'; choose cuda, mps or cpu; CUDA_VISIBLE_DEVICES=0 before the"),
        ("--gpus 8", "there is no --gpus: start one process per GPU: torchrun --nproc_per_node=8"),
        ("--epochs 10", "there is no --epochs: the length is --steps"),
        ("--imgsz 640", "there is no --imgsz: the size of training crops is --crop"),
        ("--resume", "there is no --resume: no flag is needed: the same command resumes"),
        ("--unannotated maybe", "--unannotated must be background or unlabeled, found 'maybe'"),
        ("--precision fp16", "unknown --precision 'fp16'; choose bf16 or fp32"),
    ],
)
def test_a_mistake_of_the_user_is_an_error_of_one_line_and_exit_code_2(tiny, tmp_path, capsys, flags, words):
    arguments = ["--data", str(tiny), *TINY, "--out", str(tmp_path / "out"), "--steps", "1"]
    with pytest.raises(SystemExit) as stop:
        distill.main([*arguments, *shlex.split(flags)])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


@pytest.mark.parametrize("flags", [["--student-checkpoint", "a.pt"], ["--finetune-steps", "3"]])
def test_burnin_refuses_options_of_phase_3(tiny, tmp_path, flags):
    done = train(tiny, tmp_path, *flags, script="burnin.py", code=2)
    assert done.stderr.startswith("error: --student-checkpoint and --finetune-steps belong to phase 3")


def test_cutmix_of_batches_of_one_image_is_a_warning(tiny, tmp_path):
    flags = ["--steps", "1", "--batch", "1", "--strong-view", "color,cutmix"]
    warning = "warning: CutMix does nothing"
    assert warning in train(tiny, tmp_path / "guided", *flags).stdout
    assert warning not in train(tiny, tmp_path / "labels", *flags, "--supervised-only").stdout
    assert warning not in train(tiny, tmp_path / "two", *flags, "--batch", "2").stdout


def test_bad_flags_end_the_real_command_with_one_line():
    done = run("distill.py", "--ratio", "5", processes=1, code=2)
    assert done.stderr == "error: --ratio 5 must be in (0, 1]; 5 % is 0.05\n" and done.stdout == ""


def test_a_folder_of_a_run_with_other_options_is_refused(tiny, completed, capsys):
    out, _ = completed
    with pytest.raises(SystemExit) as stop:
        distill.main(["--data", str(tiny), *TINY, "--out", str(out), "--steps", "5", "--seed", "1"])
    assert stop.value.code == 2
    assert "made with other options (seed 0, now 1); choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, kept, again",
    [
        ("--steps 5,5,7", ["teacher", "burnin"], ["distill"]),
        ("--ema-decay 0.5", ["teacher", "burnin"], ["distill"]),
        ("--score-threshold 0.3 --min-area 1", ["teacher"], ["burnin", "distill"]),
    ],
)
def test_options_of_later_phases_may_change_after_the_earlier_ones(
    tiny, completed, tmp_path, flags, kept, again
):
    out, _ = completed
    shutil.copytree(out, tmp_path / "run")
    printed = train(tiny, tmp_path / "run", "--steps", "5", *flags.split()).stdout
    assert f"{', '.join(kept)} kept, the others are run again" in printed
    assert ("phase 2 of 3" in printed) == ("burnin" in again) and "phase 1 of 3" not in printed
    for phase in kept:
        assert (tmp_path / f"run/{phase}.pt").read_bytes() == (out / f"{phase}.pt").read_bytes()
    for phase in again:
        assert (tmp_path / f"run/{phase}.previous.pt").read_bytes() == (out / f"{phase}.pt").read_bytes()
    result = load_checkpoint(tmp_path / "run/distill.pt")
    assert result["step"] == (7 if "7" in flags else 5)
    assert "all phases are done" in train(tiny, tmp_path / "run", "--steps", "5", *flags.split()).stdout


def test_a_running_burn_in_keeps_the_schedule_that_it_shares_with_phase_3(tiny, completed, tmp_path):
    shutil.copytree(completed[0], tmp_path / "run")
    burnt_in = load_checkpoint(tmp_path / "run/burnin.pt") | {"step": 3}
    for phase in ("burnin", "distill"):
        (tmp_path / f"run/{phase}.pt").unlink()
    save_checkpoint(tmp_path / "run/burnin.step-0000003.pt", burnt_in)
    error = train(tiny, tmp_path / "run", "--steps", "5,5,7", code=2).stderr
    assert "burnin.step-0000003.pt was made with other options (steps (5, 5), now (5, 7))" in error


def test_labels_that_were_corrected_are_noticed(tiny, completed, tmp_path):
    """The images are the same, so the split is, too."""
    shutil.copytree(tiny, tmp_path / "data")
    train(tmp_path / "data", tmp_path / "run", "--steps", "1")
    file = tmp_path / "data/instances_train.json"
    content = json.loads(file.read_text())
    labeled = load_checkpoint(tmp_path / "run/teacher.pt")["labels"]
    for annotation in content["annotations"]:
        annotation["category_id"] = annotation["category_id"] % 4 + 1
    file.write_text(json.dumps(content))
    for _ in range(2):
        error = train(tmp_path / "data", tmp_path / "run", "--steps", "1", code=2).stderr
        assert f"teacher.pt was made before the labels changed (hash {labeled}, now " in error
        assert error.count("\n") == 1 and "choose another --out" in error
        (tmp_path / "run/distill.pt").unlink(missing_ok=True)


def test_another_labeled_list_under_the_same_name_is_refused(tiny, tmp_path, capsys):
    flags = ["--data", str(tiny), *TINY, "--out", str(tmp_path), "--steps", "1", "--labeled-list"]
    flags += [str(tmp_path / "list.txt")]
    (tmp_path / "list.txt").write_text("0\n1\n")
    distill.main(flags)
    (tmp_path / "list.txt").write_text("0\n2\n")
    with pytest.raises(SystemExit):
        distill.main(flags)
    assert "was made with other options (split '" in capsys.readouterr().err


def test_training_and_validation_must_share_a_class(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "data")
    file = tmp_path / "data/instances_val.json"
    file.write_text(re.sub('"(circle|square|triangle|star)"', r'"red \1"', file.read_text()))
    with pytest.raises(SystemExit):
        distill.main(["--data", str(tmp_path / "data"), *TINY, "--out", str(tmp_path / "out")])
    assert "validation ['red circle', 'red square', 'red triangle', 'red star']" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        ({"annotations": []}, "no object to train on (0 annotations: 0 trained)\n"),
        ({"annotations": [], "images": []}, "it has no image\n"),
        ({"categories": []}, "it has no category"),
        ({"segmentation": [1, 1, 9, 1]}, "(33 annotations: 0 trained, 33 fewer than three corners)"),
    ],
)
def test_labeled_images_without_any_object_are_refused(tiny, tmp_path, capsys, change, words):
    shutil.copytree(tiny, tmp_path / "data")
    file = tmp_path / "data/instances_train.json"
    content = json.loads(file.read_text())
    for part in content["annotations"] if "segmentation" in change else [content]:
        part |= change
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stop:
        distill.main(["--data", str(tmp_path / "data"), *TINY, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error


def test_a_warning_counts_the_labeled_images_without_objects(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "data")
    file = tmp_path / "data/instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 0]
    file.write_text(json.dumps(content))
    flags = ["--data", str(tmp_path / "data"), *TINY, "--ratio", "1", "--out", str(tmp_path / "out")]
    cfg = parse_config([*flags, "--unannotated", "background"])
    _, data, _ = set_up(cfg)
    print_setup(cfg, data, last_phase=3)
    assert "warning: 11 of 12 labeled images have no object\n" in capsys.readouterr().out


def test_a_missing_checkpoint_of_an_earlier_phase_is_an_error_of_one_line(tiny, completed, tmp_path, capsys):
    out, _ = completed
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out/teacher.pt").unlink()
    with pytest.raises(SystemExit) as stop:
        distill.main(["--data", str(tiny), *TINY, "--out", str(tmp_path / "out"), "--steps", "5"])
    assert stop.value.code == 2 and "no checkpoint" in capsys.readouterr().err


def test_a_checkpoint_that_is_damaged_or_of_other_code_is_named(tmp_path):
    for name, content in (("text.pt", b"hello"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load_checkpoint(tmp_path / name)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_checkpoint(tmp_path / "other.pt")


def test_a_checkpoint_without_read_permission_is_not_called_damaged(tmp_path, monkeypatch):
    """The error for a damaged file advises to remove it."""

    def refused(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(training.checkpoint, "check_archive", refused)
    with pytest.raises(OSError, match="cannot read .*a.pt: Permission denied"):
        load_checkpoint(tmp_path / "a.pt")


# ------------------------------------------------------------------------------------------ starting points


def test_the_teacher_may_be_another_model_than_the_student(tiny, completed, tmp_path):
    out, _ = completed
    flags = ["--teacher-checkpoint", out / "teacher.pt", "--hidden-dim", "16", "--steps", "2"]
    printed = train(tiny, tmp_path, *flags).stdout
    assert "phase 1" not in printed and "phase 2" in printed
    table = run("evaluate.py", tmp_path / "burnin.pt", "--data", tiny).stdout
    assert "student" in table and "teacher" in table


def test_distillation_of_a_given_student_equals_that_of_the_whole_run(tiny, completed, tmp_path):
    out, _ = completed
    flags = ["--student-checkpoint", out / "burnin.pt", "--steps", "5"]
    printed = train(tiny, tmp_path, *flags, processes=1).stdout  # a command like that of `completed`
    assert "phase 2" not in printed and "phase 3" in printed and (tmp_path / "predictions.png").exists()
    assert "guided burn-in" not in printed and "  steps     5 distillation\n" in printed
    assert "burnt-in" not in printed[printed.index("mask AP") :], "its AP may be of other images"
    found, expected = (load_checkpoint(folder / "distill.pt") for folder in (tmp_path, out))
    assert all(same(found[name], expected[name]) for name in ("model", "teacher", "optimizer"))


def test_distillation_of_a_given_student_keeps_its_moments_but_not_its_options(tiny, completed, tmp_path):
    out, _ = completed
    flags = ["--steps", "5,5,2", "--lr", "1e-6", "--backbone-lr-factor", "0.5", "--weight-decay", "0.25"]
    train(tiny, tmp_path, "--student-checkpoint", out / "burnin.pt", *flags)
    optimizer = load_checkpoint(tmp_path / "distill.pt")["optimizer"]
    assert {group["initial_lr"] for group in optimizer["param_groups"]} == {1e-6, 0.5e-6}
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0.0, 0.25}
    assert {state["step"].item() for state in optimizer["state"].values()} == {5 + 2}


def test_a_given_student_of_another_model_is_refused(tiny, completed, tmp_path, capsys):
    out, _ = completed
    flags = ["--student-checkpoint", str(out / "burnin.pt"), "--hidden-dim", "16", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        distill.main(["--data", str(tiny), *TINY, *flags])
    assert "has hidden_dim 32, this run has 16" in capsys.readouterr().err


def test_a_phase_that_ended_in_its_last_evaluation_resumes_there(tiny, tmp_path, monkeypatch):
    flags = ["--data", str(tiny), *TINY, "--steps", "1", "--tensorboard", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr("burnin.evaluate_phase", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            distill.main(flags)
    assert (tmp_path / "teacher.step-0000001.pt").exists()
    training.checkpoint._locks.clear()
    distill.main(flags)
    assert (tmp_path / "distill.pt").exists()


def test_a_model_of_one_query_can_train_before_the_first_log_line(tiny, tmp_path):
    flags = ["--num-queries", "1", "--steps", "1", "--log-every", "5"]
    train(tiny, tmp_path, *flags, script="burnin.py")


def test_without_strong_views_the_student_sees_the_weak_ones(tiny, tmp_path):
    for flags, equal in (["--strong-view", "false"], True), ([], False):
        cfg = parse_config(["--data", str(tiny), *TINY, "--out", str(tmp_path), *flags])
        _, data, _ = set_up(cfg)
        batch = next(data.unlabeled_batches("burnin", 0))
        assert torch.equal(batch["strong"], batch["image"]) == equal


def test_supervised_only_trains_for_the_steps_of_all_phases(tiny, tmp_path):
    printed = train(tiny, tmp_path, "--steps", "2,1,1", "--supervised-only").stdout
    assert "supervised done" in printed and "phase 2" not in printed
    assert "  steps     4 supervised training\n" in printed
    assert load_checkpoint(tmp_path / "supervised.pt")["step"] == 4
    assert not (tmp_path / "teacher.pt").exists()


# -------------------------------------------------------------------------------------------------- options


def test_there_are_at_most_55_options():
    assert len(dataclasses.fields(Config)) <= 55


def test_a_flag_overrides_the_preset_and_the_preset_the_default():
    def parse(*flags):
        return parse_config(flags)

    assert parse("--data", "coco").lr == 1e-4 and parse().lr == PRESETS["shapes"]["lr"]
    assert parse("--lr", "0.5").lr == 0.5
    assert parse("--data", "somewhere").crop == (1024, 1024), "the preset of a folder is that of COCO"
    assert parse("--data", "somewhere", "--preset", "cityscapes").crop == (512, 1024)
    assert parse("--steps", "300").steps == (300, 300, 300)
    assert parse("--data", "a/b/", "--ratio", "0.25").out == "runs/b-0.25"


FORMER_FLAGS = {
    "accumulate": "2",
    "clip": "0.5",
    "colour": "true",
    "fine_masks": "true",
    "init": "a.pt",
    "labels_only": "true",
    "max_overlap": "0.5",
    "refine": "3",
    "scale": "0.5,1.5",
    "short_side": "40,48",
    "split": "list.txt",
    "student": "a.pt",
    "teacher": "a.pt",
    "unlabelled": "a b",
}


def test_a_file_of_backbone_weights_is_an_alias_of_pretrained():
    """Also together with the --pretrained of commands of that version."""
    for more in ([], ["--pretrained", "true"]):
        assert parse_config(["--backbone-weights", "a.pt", *more]).pretrained == "a.pt"


@pytest.mark.parametrize("old", ALIASES)
def test_a_former_spelling_sets_the_same_option(old):
    former, current = (
        parse_config([f"--{name.replace('_', '-')}", *FORMER_FLAGS[old].split()])
        for name in (old, ALIASES[old])
    )
    assert former == current != parse_config([])


@pytest.mark.parametrize("name", MODEL_ARGS)
def test_sizes_of_the_model_are_flags_as_well(name):
    former = parse_config([f"--{name.replace('_', '-')}", "48"])
    assert former == parse_config(["--model-args", json.dumps({name: 48})])
    assert former.model_args == PRESETS["shapes"]["model_args"] | {name: 48}


def test_backbone_args_are_a_flag_as_well():
    value = {"stem_type": "deep"}
    former = parse_config(["--backbone-args", json.dumps(value)])
    assert former == parse_config(["--model-args", json.dumps({"backbone_args": value})])
    assert former.model_args == PRESETS["shapes"]["model_args"] | {"backbone_args": value}


def test_the_two_sides_of_the_test_size_are_flags_as_well():
    flags = [f"--{name.replace('_', '-')}" for name in TEST_SIZE]
    assert parse_config([flags[0], "300", flags[1], "500"]) == parse_config(["--test-size", "300,500"])


def test_former_spellings_are_not_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    words = capsys.readouterr().out.replace("[", " ").split()
    for name in (*ALIASES, *MODEL_ARGS, *TEST_SIZE, "backbone_args"):
        assert f"--{name.replace('_', '-')}" not in words
    assert "--grad-accum-steps" in words and "--model-args" in words


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv2_100", "resnet50", "swin_t", "deit_b"])
def test_the_backbone_arguments_of_a_preset_belong_to_its_backbone(tiny, tmp_path, backbone):
    """--backbone with the preset of shapes builds timm's model, as without the preset."""
    flags = ["--data", str(tiny), "--out", str(tmp_path), "--preset", "shapes", "--backbone", backbone]
    cfg = parse_config(flags)
    _, data, _ = set_up(cfg)
    sizes = {name: v for name, v in PRESETS["shapes"]["model_args"].items() if name != "backbone_args"}
    with torch.device("meta"):
        found = Mask2Former(**model_arguments(cfg, data))
        expected = Mask2Former(4, backbone=backbone, norm="group", num_queries=12, **sizes)
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (found, expected)]
    assert shapes[0] == shapes[1]


def test_backbone_arguments_of_the_command_line_are_kept():
    value = json.dumps({"backbone_args": {"channels": [8, 16, 16, 32]}})
    cfg = parse_config(["--backbone", "resnet18", "--model-args", value])
    assert cfg.model_args["backbone_args"] == {"channels": [8, 16, 16, 32]}
    cfg = parse_config(["--backbone", "resnet10t"])
    assert cfg.model_args == PRESETS["shapes"]["model_args"], "the backbone of the preset"


def test_the_test_size_is_in_proportion_to_the_crop(tiny, tmp_path, capsys):
    def size(*flags):
        return parse_config(flags).test_size

    assert size("--data", "coco") == (800, 1333), "the usual one for crops of 1024"
    assert size("--data", "somewhere", "--crop", "512,512") == (400, 666)
    assert size("--data", "somewhere", "--crop", "512,512", "--test-short-side", "300") == (300, 666)
    assert size("--data", "cityscapes", "--crop", "256,512") == (1024, 2048), "that of the preset"
    assert size("--data", "cityscapes", "--test-long-side", "1500") == (1024, 1500)
    for flags, warned in ([], False), (["--test-size", "200,0"], True):
        cfg = parse_config(["--data", str(tiny), *TINY, "--out", str(tmp_path), *flags])
        _, data, _ = set_up(cfg)
        print_setup(cfg, data, last_phase=3)
        warning = "an image of 64 x 64 is resized by 3.12 at test time, in training by 0.8 to 1.25"
        assert (warning in capsys.readouterr().out) is warned


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize(
    "precision, capable, expected",
    [
        ("bf16", False, torch.bfloat16),
        ("fp32", True, torch.float32),
        ("", True, torch.bfloat16),
        ("", False, torch.float32),
    ],
)
def test_models_run_in_the_chosen_precision_or_in_bf16_where_it_is_fast(
    monkeypatch, precision, capable, expected
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable}, raising=False)
    with autocast(init_distributed("cpu", precision)):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected


def test_emulated_bf16_of_a_gpu_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not use_bf16(torch.device("cuda"))


def test_a_run_is_evaluated_in_its_precision_unless_a_flag_changes_it(completed, monkeypatch):
    out, _ = completed
    original, used = evaluate.evaluate, []

    def spy(*args, env, **kwargs):
        used.append(env.bf16)
        return original(*args, env=env, **kwargs)

    monkeypatch.setattr(evaluate, "evaluate", spy)
    for flags, expected in ([], False), (["--precision", "bf16"], True):
        used.clear()
        evaluate.main([str(out / "distill.pt"), *flags])
        assert used == [expected, expected], "student and teacher"


# ----------------------------------------------------------------------------------- optimization and metrics


def test_the_learning_rate_is_a_function_of_the_progress():
    assert lr_multiplier("poly", 0.5) == 0.5**0.9
    assert [round(lr_multiplier("step", p), 6) for p in (0, 0.88, 0.89, 0.97)] == [1, 1, 0.1, 0.01]
    assert lr_multiplier("cosine", 1.0) == 0 and lr_multiplier("cosine", 0.05) == 1
    assert lr_multiplier("cosine", 0.025) == 0.5, "half of the warmup"
    assert 0 < lr_multiplier("cosine", 0.0) < 0.05, "the first step counts"


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}, {"backbone_lr_factor": 1.0, "lr": 0.0}])
def test_parameter_groups_do_not_depend_on_the_values_of_options(make_model, options):
    """Or phase 3 could not take over the moments of a run with other values."""
    model = make_model()
    expected = build_optimizer(model, Config()).state_dict()["param_groups"]
    groups = build_optimizer(model, Config(**options)).state_dict()["param_groups"]
    assert [group["params"] for group in groups] == [group["params"] for group in expected]


def test_a_skipped_step_leaves_weights_and_statistics_of_batch_norms_unchanged():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = build_optimizer(model, Config())
    clip_and_step = GuardedStep(model, optimizer, max_norm=1.0)

    def step(images):
        loss = model(images).square().sum() + model[0].weight.sum()
        optimizer.zero_grad()
        loss.backward()
        done = clip_and_step("teacher step 1", {"loss": loss}, ["a.png"])
        return done, model[0].weight.detach().clone(), model[1].running_mean.clone()

    start = model[0].weight.detach().clone()
    done, weight, mean = step(torch.randn(8, 3))
    assert done and mean.any() and not torch.equal(weight, start), "a finite step changes them"
    done, weight_after, mean_after = step(torch.full((8, 3), torch.nan))
    assert not done and torch.equal(weight_after, weight) and torch.equal(mean_after, mean)
    assert model[1].running_var.isfinite().all()


def test_logged_values_are_averaged_over_what_was_counted(tmp_path, capsys):
    cfg = Config(out=str(tmp_path), log_every=3)
    optimizer = build_optimizer(nn.Linear(3, 3), cfg)
    metrics = Metrics(cfg, "burnin", 9, 0, optimizer, CPU)
    for number, scores in enumerate(([0.8, 0.9], [], [0.7])):
        printed = {"mean_score": (torch.tensor(scores).sum(), len(scores)), "mean_nothing": (0.0, 0)}
        metrics.log(number + 1, 4, printed, number=number)
    assert metrics.last["mean_score"] == pytest.approx(0.8) and metrics.last["mean_nothing"] is None
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["number"] == 1 and record["mean_score"] == metrics.last["mean_score"]
    assert record["mean_nothing"] is None and record["step"] == 3
    assert capsys.readouterr().out.startswith("burnin 3/9  mean score 0.80 nothing -  ")


# --------------------------------------------------------------------------------------- former checkpoints

REMOVED_OPTIONS = dict(
    mask_threshold=0.0, pixel_weights=False, score_power=0.0, keep=2, loader_timeout=300.0, warmup=0.05
)
MODEL_SIZES = dict(hidden_dim=256, encoder_layers=6, encoder_ffn=1024, decoder_layers=9, decoder_ffn=2048)


def to_format_1(checkpoint: dict) -> dict:
    """Convert a checkpoint to the format of the former code, which stored every option of the model."""
    former = {new: old for old, new in ALIASES.items()}
    config = {former.get(name, name): value for name, value in checkpoint["config"].items()}
    config["test_short_side"], config["test_long_side"] = config.pop("test_size")
    if not config["test_short_side"]:  # the limit of the longer side had a default of its own
        config["test_long_side"] = round(1333 / 1024 * max(config["crop"]))
    config |= {**REMOVED_OPTIONS, "backbone_args": None, **MODEL_SIZES, **config.pop("model_args")}
    config |= {"pixel_mean": (), "pixel_std": ()}
    everything = {"backbone_args": None, "pixel_mean": None, "pixel_std": None, **MODEL_SIZES}
    model_args = everything | checkpoint["model_args"]
    checkpoint = {("student" if name == "model" else name): value for name, value in checkpoint.items()}
    return checkpoint | {"format": 1, "config": config, "model_args": model_args}


def write_format_1(source, path):
    """Write a checkpoint file in the former format. path may be source."""
    temporary = path.with_suffix(".tmp")  # the tensors of the source are mapped from its file
    torch.save(to_format_1(load_checkpoint(source)), temporary)
    return temporary.rename(path)


STOPPED_IN_PHASE_3 = """
import sys, distill
def stop(step, metrics, *_):
    if step == 2:
        sys.exit(9)
distill.evaluate_if_due = stop
distill.main()
"""


def test_a_run_of_format_1_is_resumed(tiny, completed, tmp_path):
    out, _ = completed
    (tmp_path / "script.py").write_text(STOPPED_IN_PHASE_3)
    train(tiny, tmp_path / "run", "--steps", "5", script=tmp_path / "script.py", processes=1, code=9)
    files = ["burnin.pt", "distill.step-0000002.pt", "teacher.pt"]
    assert sorted(file.name for file in (tmp_path / "run").glob("*.pt")) == files
    for name in files:
        write_format_1(tmp_path / "run" / name, tmp_path / "run" / name)
    printed = train(tiny, tmp_path / "run", "--steps", "5", processes=1).stdout
    assert "distill: resumed at step 2 of 5" in printed
    found, expected = (load_checkpoint(folder / "distill.pt") for folder in (tmp_path / "run", out))
    assert all(same(found[name], expected[name]) for name in ("model", "teacher", "optimizer"))


def test_a_checkpoint_of_format_1_is_evaluated(tiny, completed, tmp_path):
    out, _ = completed
    file = write_format_1(out / "distill.pt", tmp_path / "former.pt")
    run("evaluate.py", file, "--json", tmp_path / "ap.json")
    expected = load_checkpoint(out / "distill.pt")
    aps = json.loads((tmp_path / "ap.json").read_text())
    assert aps == {"student": expected["ap"], "teacher": expected["teacher_ap"]}


def test_a_teacher_of_format_1_gives_the_same_student(tiny, completed, tmp_path):
    out, _ = completed
    file = write_format_1(out / "teacher.pt", tmp_path / "former.pt")
    flags = ["--teacher-checkpoint", file, "--steps", "5"]
    train(tiny, tmp_path / "run", *flags, script="burnin.py", processes=1)
    found, expected = (load_checkpoint(folder / "burnin.pt") for folder in (tmp_path / "run", out))
    assert all(same(found[name], expected[name]) for name in ("model", "teacher", "optimizer"))


@pytest.mark.parametrize("flags", ["--preset shapes", "--preset coco", "--preset cityscapes"])
def test_a_completed_phase_of_format_1_belongs_to_the_same_options(tiny, tmp_path, flags):
    """Former configs held the sizes of the model that were not changed, too."""
    flags = ["--data", str(tiny), "--out", str(tmp_path), "--pretrained", "false", *shlex.split(flags)]
    cfg = parse_config(flags)
    env, data, _ = set_up(cfg)
    model_args = model_arguments(cfg, data)
    checkpoint = {"phase": "burnin", "step": 3, "world_size": 1, "model": {}, "teacher": {}, "optimizer": {}}
    checkpoint |= {"config": dataclasses.asdict(cfg), "model_args": model_args}
    checkpoint["split"] = data.hashes["split"]
    torch.save(to_format_1(checkpoint), tmp_path / "burnin.pt")
    assert completed_phases(cfg, env, data.hashes) == {"burnin"}
    assert load_student_checkpoint(cfg, data.train.class_names, model_args)["format"] == 2
    for change in (["--decoder-layers", "2"], ["--lr", "1"]):
        with pytest.raises(ValueError, match="was made with other options"):
            completed_phases(parse_config([*flags, *change]), env, data.hashes)


# ------------------------------------------------------------------------------------------------ overfitting


def test_four_images_are_overfitted_to_an_ap_above_90(tmp_path):
    """All parts fit together, from the files to the AP."""
    write_shapes(tmp_path / "four", num_train=4, num_val=1, size=96, seed=1)
    dataset = CocoDataset(tmp_path / "four/instances_train.json", tmp_path / "four/images")
    preset = PRESETS["shapes"]
    torch.manual_seed(0)
    args = {name: preset[name] for name in ("backbone", "norm", "num_queries")}
    model = Mask2Former(4, **args, **preset["model_args"])
    criterion = SetCriterion(4, num_points=256)
    views = AugmentedDataset(dataset, Augmentation(crop=(96, 96), lsj_scale=(1.0, 1.0), flip=False))
    batch = collate([views[image_id, 0] for image_id in dataset.image_ids])
    optimizer = build_optimizer(model, Config(lr=1e-3, weight_decay=0.05, backbone_lr_factor=1.0))
    for step in range(150):
        set_lr(optimizer, "cosine", step / 150)
        optimizer.zero_grad()
        sum(criterion(model(batch["image"]), batch["targets"]).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert evaluate.evaluate(model, dataset)["AP"] > 90
