"""Tests of what a run prints and records: log lines, the progress bar, help, the banner, evaluations and
TensorBoard."""

import fcntl
import json
import os
import pty
import shutil
import struct
import sys
import termios
from types import SimpleNamespace

import pytest
import torch
from commands import run
from torch import nn

import burnin
from data import AugmentedDataset, stable_seed
from training import metrics
from training.cli import parse_config
from training.config import PRESETS, Config, rescale_for_batch_size
from training.distributed import Env, print_rank0, warn_once
from training.metrics import Metrics, append_record, format_duration, format_values
from training.pseudo_label_quality import (
    count_by_size,
    format_quality,
    match_pseudo_labels,
    measure_pseudo_labels,
    quality,
)
from training.setup import set_up

SMALL = "--crop 64,64 --num-queries 5 --hidden-dim 32 --encoder-ffn 32 --decoder-layers 1 --decoder-ffn 32 "
SMALL += "--num-points 32 --batch 2 --log-every 1 --device cpu --ratio 0.5"

LOSSES = dict(loss_ce=12.345, loss_mask=1.0, loss_dice=0.0)
LOSSES |= dict(unlabeled_loss_ce=123.4, unlabeled_loss_mask=99.994, unlabeled_loss_dice=0.5)
VALUES = LOSSES | dict(pseudo_labels=12.3)


@pytest.fixture
def make_metrics(tmp_path, monkeypatch):
    """Return make(phase, steps, first_step, *flags): Metrics on a clock that stands still.
    metrics.clock.now is its time in seconds."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(metrics.time, "time", lambda: clock.now)

    def make(phase="distill", steps=10, first_step=0, *flags):
        cfg = parse_config(["--out", str(tmp_path), *flags])
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.25)
        made = Metrics(cfg, phase, steps, first_step, optimizer, Env(torch.device("cpu")))
        made.clock = clock
        return made

    return make


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------- log lines


def test_each_log_step_prints_one_line_with_names_speed_and_time_left(make_metrics, capsys):
    log = make_metrics("distill", 343_750, 300_000, "--log-every", "50")
    for step in range(300_001, 300_101):
        log.clock.now += 0.0821
        log.log(step, 16, VALUES, loss=3.0, highest_score=1.0)
    expected, first, second = capsys.readouterr().out.splitlines()
    assert expected == "distill: 0.082 s per step, about 59m51s left"
    assert first == (
        "distill 300050/343750  loss ce 12.3 mask 1.00 dice 0.00  unlabeled ce 123 mask 100.0 dice 0.50  "
        "pseudo labels 12.3  195 img/s  59m48s left"
    )
    assert second.startswith("distill 300100/343750  loss ce 12.3 ") and len(first) <= 140


def test_a_log_line_has_the_means_of_its_steps(make_metrics, tmp_path, capsys):
    """Values are numbers, tensors, or sums with a count. The mean of nothing is shown as a hyphen."""
    log = make_metrics("burnin", 5, 0, "--log-every", "2")
    steps = [
        {"loss_ce": torch.tensor(1.0, requires_grad=True), "mean_score": (torch.tensor(1.5), 2)},
        {"loss_ce": torch.tensor(4.0), "mean_score": (torch.tensor(0.9), 1)},
        {"loss_ce": 7, "mean_score": (0.0, 0)},
        {"loss_ce": 9.0, "mean_score": (0.0, 0)},
        {"pseudo_labels": 0, "mean_score": (0.0, 0)},
    ]
    for step, printed in enumerate(steps, start=1):
        log.clock.now += 4
        log.log(step, 2, printed, loss=10.0)
    assert [line.split("  ")[:-2] for line in capsys.readouterr().out.splitlines()] == [
        ["burnin 2/5", "loss ce 2.50", "mean score 0.80"],
        ["burnin 4/5", "loss ce 8.00", "mean score -"],
        ["burnin 5/5", "pseudo labels 0.00", "mean score -"],
    ]
    first, second, last = records(tmp_path)
    assert first == {
        "phase": "burnin", "step": 2, "loss": 10, "loss_ce": 2.5, "mean_score": pytest.approx(0.8),
        "lr": 0.25, "images_per_second": 0.5,
    }  # fmt: skip
    assert second["mean_score"] is None and second["loss_ce"] == 8 and last["step"] == 5
    assert log.last == {"loss": 10, "pseudo_labels": 0, "mean_score": None}


def test_a_line_follows_every_log_step_and_the_last_step(make_metrics, tmp_path):
    log = make_metrics("teacher", 10, 3, "--log-every", "4")
    for step in range(4, 11):
        log.clock.now += 1
        log.log(step, 2, {"loss_ce": 1.0})
    assert [record["step"] for record in records(tmp_path)] == [4, 8, 10]
    assert all(record["images_per_second"] == 2 for record in records(tmp_path))


def test_the_time_of_an_evaluation_is_not_in_speed_and_time_left(make_metrics, capsys):
    log = make_metrics("teacher", 10, 5, "--log-every", "1")
    with log.paused():
        log.clock.now += 1000
    log.clock.now += 10
    log.log(6, 20, {"loss_ce": 1.0})
    assert capsys.readouterr().out == "teacher 6/10  loss ce 1.00  2.00 img/s  0m40s left\n"


def test_a_phase_prints_its_first_warning_only(make_metrics, capsys):
    log = make_metrics("burnin")
    for message in ("0.0 pseudo-labels", "0.1 pseudo-labels"):
        log.warn_once(message)
    assert capsys.readouterr().out == "warning: burnin: 0.0 pseudo-labels\n"


def test_losses_of_one_kind_are_one_group():
    assert format_values(LOSSES) == (
        "loss ce 12.3 mask 1.00 dice 0.00  unlabeled ce 123 mask 100.0 dice 0.50"
    )
    assert format_values({"loss_ce": 1.0, "pseudo_labels": None}) == "loss ce 1.00  pseudo labels -"


def read(screen) -> str:
    """Return the next piece of what was written to a terminal that is closed now; "" at the end."""
    try:
        return os.read(screen, 100_000).decode()
    except OSError:
        return ""


def test_a_terminal_has_a_progress_bar_below_the_lines(make_metrics, monkeypatch):
    """The bar is redrawn. Messages and log lines are printed above it."""
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 140, 0, 0))
    with open(terminal, "w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        log = make_metrics("distill", 3, 0, "--log-every", "3")
        log.bar.mininterval = 0  # draw at each step
        for step in (1, 2, 3):
            log.clock.now += 1
            log.log(step, 2, VALUES)
            if step == 2:
                print_rank0("a message")
        log.end_training()
    shown = "".join(iter(lambda: read(screen), ""))
    os.close(screen)
    rows = [row.rstrip() for row in shown.replace("\n", "\r").split("\r") if row.strip()]
    assert max(map(len, rows)) <= 140
    bars = [row.split("|")[-1].split()[0] for row in rows if row.startswith("distill: ")]
    assert list(dict.fromkeys(bars)) == ["0/3", "1/3", "2/3", "3/3"]
    assert "\ra message\r\n\rdistill: " in shown, "the bar is cleared, and drawn again below the message"
    assert shown.count("distill 3/3  loss ce 12.3 ") == 1 and shown.endswith("\r\n")


def test_no_terminal_has_no_progress_bar(make_metrics, capsys):
    log = make_metrics()
    assert log.bar is None
    log.log(1, 2, VALUES)
    log.end_training()
    assert capsys.readouterr() == ("", "")


def test_an_incomplete_line_does_not_swallow_the_next_record(tmp_path):
    """A killed process may leave one."""
    append_record(tmp_path, a=1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"b": ')
    for number in (2, 3):
        append_record(tmp_path, a=number)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"a": 1}', '{"b": ', '{"a": 2}', '{"a": 3}']


def test_durations():
    seconds = 0, 59.6, 3599, 3600, 359_999, 360_000
    assert [format_duration(s) for s in seconds] == ["0m00s", "1m00s", "59m59s", "1h00m", "99h59m", "4d04h"]


# -------------------------------------------------------------------------------------------- flags and help


def test_help_is_in_groups_with_the_values_of_the_chosen_preset(capsys):
    texts = {}
    for data in ("shapes", "coco"):
        with pytest.raises(SystemExit) as done:
            parse_config(["--data", data, "--help"], "Describes the script.")
        assert done.value.code == 0
        texts[data] = " ".join(capsys.readouterr().out.split())
    groups = ("method", "beyond the paper", "data", "model", "loss", "optimizer", "run")
    for text in texts.values():
        places = [text.index(f"{group}: --") for group in groups]
        assert places == sorted(places) and "Describes the script." in text[: places[0]]
    assert "learning rate of AdamW [0.001]" in texts["shapes"]
    assert "the values of the preset 'shapes'" in texts["shapes"]
    assert "learning rate of AdamW [0.0001]" in texts["coco"] and "[1024,1024]" in texts["coco"]
    assert "per step, phase 3 [0.998]" in texts["shapes"] and "per step, phase 3 [0.9996]" in texts["coco"]


@pytest.mark.parametrize(
    "script, typo, flag",
    [
        ("distill.py", "--bacth", "--batch"),
        ("burnin.py", "--bacth", "--batch"),
        ("evaluate.py", "--picutre", "--picture"),
        ("tools.predict", "--psuedo-labels", "--pseudo-labels"),
        ("tools.export", "--whihc", "--which"),
        ("tools.check_data", "--unlabled", "--unlabeled"),
    ],
)
def test_a_mistyped_flag_suggests_the_right_one(script, typo, flag):
    arguments = ["a.pt", "b"] if script.startswith("tools") else ["a.pt"] if script == "evaluate.py" else []
    arguments = arguments[:1] if script == "tools.check_data" else arguments
    error = run(script, *arguments, typo, "3", code=2).stderr
    assert f"did you mean {flag}?" in error and error.count("\n") == 1


def test_numbers_with_exponents_are_whole_where_they_must_be():
    steps = parse_config(["--steps", "1e3"]).steps
    assert steps == (1000,) * 3 and isinstance(steps[0], int)
    with pytest.raises(ValueError, match="whole"):
        parse_config(["--steps", "1.5"])
    assert parse_config(["--lsj-scale", "0.5,2"]).lsj_scale == (0.5, 2)


# ---------------------------------------------------------------------------------------- another batch size


def test_scaling_to_a_batch_changes_what_flags_leave_open():
    def parse(*flags):
        return parse_config(["--data", "coco", *flags])

    paper, half = parse(), parse("--batch", "8", "--scale-to-batch")
    assert half.steps == tuple(2 * steps for steps in paper.steps)
    assert half.lr == pytest.approx(paper.lr / 2**0.5) and half.ema_decay**2 == pytest.approx(paper.ema_decay)
    assert half.weight_decay == paper.weight_decay and half.batch == 8
    given = parse("--batch", "8", "--scale-to-batch", "--lr", "1", "--steps", "5")
    assert given.lr == 1 and given.steps == (5, 5, 5) and given.ema_decay == half.ema_decay
    assert parse("--batch", "16", "--scale-to-batch").lr == paper.lr
    assert parse("--batch", "8").lr == paper.lr
    twice = parse_config(["--batch", "4", "--scale-to-batch"])
    assert twice.steps == tuple(2 * steps for steps in PRESETS["shapes"]["steps"])


def test_another_batch_size_keeps_the_number_of_images_and_the_lag_of_the_teacher():
    paper = Config(**PRESETS["coco"])
    for batch in (1, 2, 4, 32, 64):
        scaled = rescale_for_batch_size(paper, batch)
        images = [batch * steps for steps in scaled["steps"]]
        assert images == pytest.approx([16 * steps for steps in paper.steps], rel=1e-3)
        decay_per_image = scaled["ema_decay"] ** (1 / batch)
        assert decay_per_image == pytest.approx(paper.ema_decay ** (1 / 16), abs=1e-12)


# ------------------------------------------------------------------------------------------------ a real run


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """Return the folder of a short run with TensorBoard and evaluations, and the printed text."""
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--data", shapes, "--preset", "shapes", *SMALL.split(), "--steps", "3", "--eval-every", "2"]
    return out, run("distill.py", *flags, "--tensorboard", "--out", out).stdout


def test_the_banner_describes_the_run(finished):
    out, printed = finished
    banner = printed.split("phase 1 of 3")[0].splitlines()[2:]
    assert max(len(line) for line in banner if not line.startswith("warning")) <= 100
    words = "12 training images, 6 of them labeled (split |6 for validation|4 classes|resnet10t, 5 queries|"
    words += "million parameters|2 labeled and 2 unlabeled images per step|lr 0.001|the preset is for 8|"
    words += "--scale-to-batch would set --lr 0.0005|--steps 2000,2800,3600|--ema-decay 0.9995|"
    words += "3 teacher burn-in|3 distillation|1 x cpu|fp32|torch 2|timm 1|Python 3"
    for word in words.split("|"):
        assert word in " ".join(printed.split()), word
    banner = records(out)[0]["banner"]
    assert banner["command"].startswith("distill.py --data ") and banner["started"].startswith("20")


def test_every_evaluation_measures_ap_and_pseudo_label_quality(finished):
    out, printed = finished
    for phase in ("teacher", "burnin", "distill"):
        of_phase = [record for record in records(out) if record.get("phase") == phase]
        evaluations = [record for record in of_phase if "pseudo" in record]
        assert [record["step"] for record in evaluations] == [2, 3]
        for record in evaluations:
            assert record["pseudo"]["images"] == 6 and 0 <= record["pseudo"]["precision"] <= 100
            assert sum(record["pseudo"]["labeled_classes"].values()) == pytest.approx(1)
            assert "AP50" in record["ap"] and ("student_pseudo" in record) == (phase == "burnin")
        assert ("teacher_ap" in evaluations[-1]) == (phase == "distill")
        steps = [record for record in of_phase if "loss" in record]
        assert [record["step"] for record in steps] == [1, 2, 3] and all("lr" in record for record in steps)
        for name in ("mean_score", "highest_score", "unlabeled_loss", "unlabeled_loss_dice", "pseudo_labels"):
            assert (name in steps[0]) == (phase != "teacher")
    assert printed.count("pseudo-labels of 6 images") + printed.count("no pseudo-labels on 6 images") == 6


def test_the_log_lines_of_a_run_fit_into_140_columns(finished):
    lines = [line for line in finished[1].splitlines() if line.endswith(" left")]
    assert len(lines) == 9 and max(map(len, lines)) <= 140


def test_an_evaluation_keeps_the_training_mode(shapes, tmp_path, make_model):
    cfg = parse_config(f"--data {shapes} --preset shapes {SMALL} --out {tmp_path}".split())
    env, data, _ = set_up(cfg)
    log = SimpleNamespace(phase="teacher", board=None)
    for training in (True, False):
        model = make_model(num_classes=4).train(training)
        assert burnin.evaluate_phase(1, log, cfg, data, model, teacher=model).keys() == {"ap", "pseudo"}
        assert model.training == training


def test_tensorboard_has_curves_and_pictures(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for phase in ("teacher", "burnin", "distill"):
        events = EventAccumulator(str(finished[0] / "tensorboard" / phase))
        events.Reload()
        tags = events.Tags()
        assert {"loss_ce", "lr", "ap/AP", "pseudo/precision"} <= set(tags["scalars"])
        assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
        assert tags["images"] == ["predictions"]


def test_missing_tensorboard_is_an_error_of_one_line(shapes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    flags = ["--data", shapes, "--preset", "shapes", *SMALL.split(), "--out", tmp_path, "--tensorboard"]
    assert run("distill.py", *flags, code=2).stderr == "error: --tensorboard needs: pip install tensorboard\n"


def test_without_matplotlib_a_run_ends_without_a_report(finished, shapes, monkeypatch):
    out, _ = finished
    assert (out / "report.html").exists()
    (out / "report.html").unlink()
    warn_once.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith(("tools.report", "matplotlib."))]:
        monkeypatch.delitem(sys.modules, name)
    flags = ["--data", shapes, "--preset", "shapes", *SMALL.split(), "--steps", "3", "--eval-every", "2"]
    printed = run("distill.py", *flags, "--out", out).stdout
    assert "warning: cannot write report.html: matplotlib is missing" in printed
    assert "mask AP on 6 images" in printed and not (out / "report.html").exists()


def test_a_missing_checkpoint_is_an_error_of_one_line(finished, shapes, tmp_path):
    """The report needs those of all phases."""
    out = shutil.copytree(finished[0], tmp_path / "run")
    (out / "teacher.pt").unlink()
    flags = ["--data", shapes, "--preset", "shapes", *SMALL.split(), "--steps", "3", "--eval-every", "2"]
    error = run("distill.py", *flags, "--out", out, code=2).stderr
    assert error == f"error: no checkpoint '{out}/teacher.pt'\n"


# -------------------------------------------------------------------------------------- pseudo-label quality


def masks(*rows):
    return torch.tensor(rows, dtype=torch.bool)[:, None]  # (N, 1, w)


def pseudo(labels, scores, *rows):
    return {"labels": torch.tensor(labels), "scores": torch.tensor(scores), "masks": masks(*rows)}


TRUTH = {"labels": torch.tensor([0, 1]), "masks": masks([1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1])}


@pytest.mark.parametrize(
    "predicted, expected",
    [
        (
            pseudo([0, 1], [0.9, 0.8], [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0]),
            {0: (0, 1.0), 1: (1, 0.75)},
        ),
        (pseudo([1, 0], [0.9, 0.8], [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]), {}),  # classes
        (pseudo([0, 0], [0.8, 0.9], [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]), {1: (0, 0.75)}),
        (pseudo([0], [0.9], [1, 0, 0, 0, 0, 0, 0, 0]), {}),  # IoU 1/4
        (pseudo([0], [0.9], [1, 1, 0, 0, 0, 0, 0, 0]), {0: (0, 0.5)}),
    ],
)
def test_a_pseudo_label_is_correct_if_it_is_the_first_to_find_an_object_of_its_class(predicted, expected):
    assert match_pseudo_labels(predicted, TRUTH) == expected


def test_images_without_objects_or_without_pseudo_labels_have_no_matches():
    none = {"labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros((0, 1, 8), dtype=torch.bool)}
    nothing = none | {"scores": torch.zeros(0)}
    assert match_pseudo_labels(nothing, TRUTH) == {} == match_pseudo_labels(nothing, none)
    assert match_pseudo_labels(pseudo([0], [0.9], [1] * 8), none) == {}


def test_quality_by_size_counts_pseudo_labels_by_their_own_size_and_finds_by_that_of_the_object():
    def rows(*numbers):
        return [[1] * number + [0] * (200 - number) for number in numbers]

    truth = {"labels": torch.tensor([0, 1]), "masks": masks(*rows(2, 21))}  # 1 % and 10.5 % of the crop
    found = pseudo([0, 1, 1], [0.9, 0.8, 0.7], *rows(2, 18, 40))  # IoU 1, 18/21; and 40, which is too large
    counts = count_by_size(found, truth)
    assert quality(counts, "small") == {"objects": 1, "precision": 100, "recall": 100, "mask_iou": 100}
    found_a_large_one = {"objects": 0, "precision": 100, "recall": 0, "mask_iou": 0}
    assert quality(counts, "medium") == found_a_large_one
    large = {"objects": 1, "precision": 0, "recall": 100, "mask_iou": 100 * 18 / 21}
    assert quality(counts, "large") == pytest.approx(large)
    assert quality(counts, "all")["precision"] == pytest.approx(200 / 3)
    assert quality(counts, "all")["mask_iou"] == pytest.approx(50 * (1 + 18 / 21))


class Oracle(nn.Module):
    """A model that finds the ground truth of each view, except the first `miss` objects."""

    def __init__(self, data, ids, miss=0):
        super().__init__()
        views = AugmentedDataset(data.train, data.augmentation)
        items = [views[i, stable_seed(data.cfg.seed, "held-out", i)] for i in ids]
        self.truth = {hash(item["image"].numpy().tobytes()): item for item in items}
        self.miss = miss

    def forward(self, images):
        Q, K, (H, W) = 30, 4, images.shape[-2:]
        logits, masks = torch.zeros(len(images), Q, K + 1), torch.full((len(images), Q, H // 4, W // 4), -9.0)
        logits[..., K] = 20
        for b, image in enumerate(images):
            item = self.truth[hash(image.numpy().tobytes())]
            small = nn.functional.avg_pool2d(item["masks"][:, None].float(), 4)[:, 0] > 0.5
            for q in range(self.miss, len(small)):
                logits[b, q, K], logits[b, q, item["labels"][q]] = 0, 20
                masks[b, q][small[q]] = 9.0
        return {"pred_logits": logits, "pred_masks": masks}


@pytest.fixture
def measure(tmp_path):
    """Return measure(folder, *flags, make=Oracle, **kwargs): the quality of the pseudo-labels of
    make(data, held_out, **kwargs), and the ids of the held-out images."""

    def measure(folder, *flags, make=Oracle, **kwargs):
        flags = [*f"--data {folder} --preset shapes {SMALL} --min-area 0 --batch 4".split(), *flags]
        cfg = parse_config([*flags, "--out", str(tmp_path / "out")])
        env, data, _ = set_up(cfg)
        held_out = sorted(set(data.train.image_ids) - set(data.labeled))
        model = make(data, held_out or data.train.image_ids, **kwargs)
        predict = lambda images: burnin.predict_pseudo_labels(model, images, cfg, env)  # noqa: E731
        return measure_pseudo_labels(predict, data), held_out

    return measure


def test_quality_is_measured_on_held_out_annotations(shapes, measure):
    result, held_out = measure(shapes)
    assert result["images"] == len(held_out) == 6 and result["score"] == pytest.approx(1)
    assert result["precision"] == pytest.approx(100) == result["mask_iou"] and result["recall"] > 90
    assert list(result["sizes"]) == ["small", "medium", "large"]
    assert result["sizes"]["medium"]["precision"] == pytest.approx(100)
    missing, _ = measure(shapes, miss=1)
    assert missing["precision"] == pytest.approx(100) and missing["recall"] < result["recall"]
    assert missing["kept"] == pytest.approx(result["kept"] - 1)
    lines = format_quality(result)
    assert max(map(len, lines)) <= 99
    text = " ".join(line.strip() for line in lines)
    assert "precision 100.0, recall" in text and "mask IoU 100.0 their classes" in text and "circle" in text
    assert format_quality(result | {"kept": 0}) == ["  no pseudo-labels on 6 images"]


def test_quality_is_not_measured_on_images_without_annotations(shapes, tmp_path, measure):
    folder = shutil.copytree(shapes, tmp_path / "data")
    empty = measure(folder)[1][0]
    content = json.loads((folder / "instances_train.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != empty]
    (folder / "instances_train.json").write_text(json.dumps(content))
    result, held_out = measure(folder)
    assert result["images"] == 5 and empty in held_out and result["precision"] == pytest.approx(100)


def test_quality_is_measured_without_damaged_images(shapes, tmp_path, measure):
    folder = shutil.copytree(shapes, tmp_path / "data")

    def damage(data, held_out):
        for image_id in held_out:
            data.train.path(image_id).write_bytes(b"no image")

    result, _ = measure(folder, make=damage)
    assert result["images"] == result["kept"] == result["precision"] == 0


def test_without_held_out_annotations_quality_has_no_precision(shapes, measure):
    result, held_out = measure(shapes, "--ratio", "1")
    assert not held_out and result["images"] == 12 and "precision" not in result and result["kept"] > 1
