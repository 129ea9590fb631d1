"""What a run says of itself: banner, progress line, help, how good pseudo-labels are, another batch."""

import fcntl
import itertools
import json
import os
import pty
import shutil
import struct
import sys
import termios
import time

import pytest
import torch
from commands import run
from torch import nn

import burnin
import distill
import engine
from data import Views, seed_of
from health import count_right, health, health_lines
from model import Prediction
from setting import scaled_to_batch

SMALL = "--crop 64,64 --num-queries 5 --hidden-dim 32 --encoder-ffn 32 --decoder-layers 1 --decoder-ffn 32 "
SMALL += "--num-points 32 --batch 2 --log-every 1 --device cpu --ratio 0.5"

VALUES = dict(loss_ce=12.345, loss_mask=1.0, loss_dice=0.0, guided_ce=123.4, guided_mask=99.994)
VALUES |= dict(guided_dice=0.5, pseudo_labels=12.3, mean_score=0.987)
VALUES["speed_img/s"] = 1234.5


def parse(*flags, script=distill):
    return burnin.parse(script.Config, script.PRESETS, list(flags))


# ----------------------------------------------------------------------------------------- the progress line


def test_lines_of_a_log_fit_into_80_columns_and_their_columns_have_names(capsys):
    line = engine.ProgressLine("distill", 0, 343_750, 0)
    for step in range(300_000, 300_021):
        line.update(step)
        line.write(step, VALUES)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 79, "tqdm keeps the last column free"
    first, second, row = (" ".join(line.split()) for line in lines[:3])
    assert first == "distill loss loss loss guided guided guided pseudo mean speed phase whole"
    assert second == "step ce mask dice ce mask dice labels score img/s left left"
    assert row.startswith("300000 12.35 1.00 0.00 123 99.99 0.50 12.30 0.99 1234 ")
    assert lines[22:24] == lines[:2] and len(lines) == 21 + 4, "again above every twentieth line"


def read(screen) -> str:
    """The next piece of what was written to a terminal that is closed now; "" at the end."""
    try:
        return os.read(screen, 100_000).decode()
    except OSError:
        return ""


def test_a_terminal_shows_one_line_that_is_drawn_anew(monkeypatch):
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(terminal, "w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        line = engine.ProgressLine("distill", 0, 3, 0)
        for step in (1, 2, 3):
            line.update(step)
            line.write(step, VALUES)
            time.sleep(0.11)  # tqdm draws ten times a second
        engine.say("a message")
        line.close()
    shown = "".join(iter(lambda: read(screen), ""))
    os.close(screen)
    assert shown.count("speed") == 1 and "a message\r\n" in shown
    rows = [row for row in shown.replace("\n", "\r").split("\r") if "12.35" in row]
    assert {row.split()[0] for row in rows} >= {"2", "3"} and max(len(row.rstrip()) for row in rows) <= 80
    assert all(row.split()[10:12] == ["0m00s", "0m00s"] for row in rows), "nothing is cut off"


def test_the_time_left_of_the_whole_counts_the_phases_to_come(monkeypatch, capsys):
    clock = itertools.count()
    monkeypatch.setattr(engine.time, "time", lambda: 10.0 * next(clock))
    line = engine.ProgressLine("teacher", 5, 10, later=12)
    line.write(6, {"loss_ce": 1.0})  # ten seconds for a step
    assert capsys.readouterr().out.splitlines()[-1].split()[-2:] == ["0m40s", "2m40s"]


def test_the_work_of_later_phases():
    setting = object.__new__(burnin.Setting)
    setting.cfg = parse("--steps", "10,20,30")
    for setting.last, expected in (("burnin", (50, 0)), ("distill", (125, 30))):
        assert (setting.later("teacher"), setting.later("burnin")) == expected
    assert setting.later("distill") == setting.later("labels_only") == 0


def test_a_line_that_was_cut_off_does_not_take_the_next_one_along(tmp_path):
    engine.record(tmp_path, a=1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"b": ')
    for number in (2, 3):
        engine.record(tmp_path, a=number)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"a": 1}', '{"b": ', '{"a": 2}', '{"a": 3}']


def test_durations():
    seconds = 0, 59.6, 3599, 3600, 359_999, 360_000
    assert [engine.duration(s) for s in seconds] == ["0m00s", "1m00s", "59m59s", "1h00m", "99h59m", "4d04h"]


# -------------------------------------------------------------------------------------------- flags and help


def test_help_is_in_groups_with_the_values_of_the_chosen_preset(capsys):
    texts = {}
    for data in ("shapes", "coco"):
        with pytest.raises(SystemExit) as done:
            parse("--data", data, "--help")
        assert done.value.code == 0
        texts[data] = " ".join(capsys.readouterr().out.split())
    groups = (
        "data: model: optimisation, all phases: guidance, phases 2 and 3: the run: distillation, phase 3:"
    )
    for text in texts.values():
        places = [text.index(f"{group}: --") for group in groups.rstrip(":").split(": ")]
        assert places == sorted(places)
    assert "AdamW's learning rate [0.001]" in texts["shapes"] and "of the preset 'shapes'" in texts["shapes"]
    assert "AdamW's learning rate [0.0001]" in texts["coco"] and "[1024,1024]" in texts["coco"]
    assert "kept at each step [0.998]" in texts["shapes"] and "kept at each step [0.9996]" in texts["coco"]


@pytest.mark.parametrize("script", ["distill.py", "burnin.py", "evaluate.py"])
def test_a_mistyped_flag_suggests_the_right_one(script):
    known = {"evaluate.py": ("x.pt", "--imagse", "a")}.get(script, ("--bacth", "3"))
    error = run(script, *known, code=2).stderr
    assert f"did you mean {'--images' if script == 'evaluate.py' else '--batch'}?" in error


def test_numbers_with_exponents_are_whole_where_they_must_be():
    assert parse("--steps", "1e3").steps == (1000,) * 3 and isinstance(parse("--steps", "1e3").steps[0], int)
    with pytest.raises(ValueError, match="whole"):
        parse("--steps", "1.5")
    assert parse("--scale", "0.5,2").scale == (0.5, 2)


# -------------------------------------------------------------------------------------------- another batch


def test_scaling_to_a_batch_changes_what_flags_leave_open():
    paper, half = parse("--data", "coco"), parse("--data", "coco", "--batch", "8", "--scale-to-batch")
    assert half.steps == tuple(2 * steps for steps in paper.steps)
    assert half.lr == pytest.approx(paper.lr / 2**0.5) and half.ema_decay**2 == pytest.approx(paper.ema_decay)
    assert half.weight_decay == paper.weight_decay and half.batch == 8
    given = parse("--data", "coco", "--batch", "8", "--scale-to-batch", "--lr", "1", "--steps", "5")
    assert given.lr == 1 and given.steps == (5, 5, 5) and given.ema_decay == half.ema_decay
    assert parse("--data", "coco", "--batch", "16", "--scale-to-batch").lr == paper.lr
    assert parse("--batch", "8", "--data", "coco").lr == paper.lr
    twice = parse("--batch", "4", "--scale-to-batch", script=burnin)
    assert twice.steps == tuple(2 * steps for steps in burnin.PRESETS["shapes"]["steps"])


def test_as_many_images_are_seen_and_the_teacher_is_as_many_images_behind():
    paper = parse("--data", "coco")
    for batch in (1, 2, 4, 32, 64):
        other = scaled_to_batch(paper, batch)
        images = [batch * steps for steps in other["steps"]]
        assert images == pytest.approx([16 * steps for steps in paper.steps], rel=1e-3)
        one_image = other["ema_decay"] ** (1 / batch)
        assert one_image == pytest.approx(paper.ema_decay ** (1 / 16), abs=1e-12)


# ------------------------------------------------------------------------------------------------ a real run


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """The folder of a short run with everything that can be watched, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "watched"
    flags = ["--data", shapes, "--preset", "shapes", *SMALL.split(), "--steps", "3", "--eval-every", "2"]
    return out, run("distill.py", *flags, "--tensorboard", "--out", out).stdout


def test_the_banner_says_what_the_run_is(finished):
    out, printed = finished
    assert max(map(len, printed.split("phase 1 of 3")[0].splitlines()[1:])) <= 80
    words = "12 training images, 6 of them labelled (split |6 for validation|4 classes|resnet10t, 5 queries|"
    words += "million parameters|2 labelled and 2 unlabelled images a step|lr 0.001|the preset is for 8|"
    words += "--scale-to-batch would take --lr 0.0005|--steps 2000,2800,3600|--ema-decay 0.9995|"
    words += "3 teacher burn-in|3 distillation|1 x cpu|fp32|torch 2|timm 1|Python 3"
    for word in words.split("|"):
        assert word in " ".join(printed.split()), word
    banner = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["banner"]
    assert banner["command"].startswith("distill.py --data ") and banner["started"].startswith("20")


def test_each_evaluation_tells_ap_and_how_good_the_pseudo_labels_are(finished):
    out, printed = finished
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for phase in ("teacher", "burnin", "distill"):
        found = [r for r in records if r.get("phase") == phase and "pseudo" in r]
        assert [r["step"] for r in found] == [2, 3]
        for pseudo in (r["pseudo"] for r in found):
            assert pseudo["images"] == 6 and 0 <= pseudo["precision"] <= 100
            assert sum(pseudo["labelled_classes"].values()) == pytest.approx(1)
        steps = [r for r in records if r.get("phase") == phase and "loss" in r]
        assert [r["step"] for r in steps] == [1, 2, 3] and all("lr" in r for r in steps)
        assert ("mean_score" in steps[0]) == ("guided_dice" in steps[0]) == (phase != "teacher")
    assert printed.count("pseudo-labels") >= 6


def test_tensorboard_has_curves_and_pictures(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for phase in ("teacher", "burnin", "distill"):
        events = EventAccumulator(str(finished[0] / "tensorboard" / phase))
        events.Reload()
        tags = events.Tags()
        assert {"loss_ce", "lr", "ap/AP", "pseudo/precision"} <= set(tags["scalars"])
        assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
        assert tags["images"] == ["predictions"]


def test_tensorboard_that_is_not_installed_is_one_line(shapes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    flags = ["--data", shapes, "--preset", "shapes", *SMALL.split(), "--out", tmp_path, "--tensorboard"]
    assert run("distill.py", *flags, code=2).stderr == "error: --tensorboard needs: pip install tensorboard\n"


def test_without_the_tools_a_run_ends_without_a_report(finished, shapes, monkeypatch):
    out, _ = finished
    assert (out / "report.html").exists()
    (out / "report.html").unlink()
    engine.warn.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith(("tools.report", "matplotlib."))]:
        monkeypatch.delitem(sys.modules, name)
    flags = ["--data", shapes, "--preset", "shapes", *SMALL.split(), "--steps", "3", "--eval-every", "2"]
    printed = run("distill.py", *flags, "--out", out).stdout
    assert "warning: no report.html" in printed and "mask AP on 6 images" in printed


# -------------------------------------------------------------------------------- how good pseudo-labels are


def masks(*rows):
    return torch.tensor(rows, dtype=torch.bool)[:, None]  # (N, 1, w)


def pseudo(labels, scores, *rows):
    return {"labels": torch.tensor(labels), "scores": torch.tensor(scores), "masks": masks(*rows)}


TRUTH = {"labels": torch.tensor([0, 1]), "masks": masks([1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1])}


@pytest.mark.parametrize(
    "found, expected",
    [
        (pseudo([0, 1], [0.9, 0.8], [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0]), (2, 1.75)),
        (pseudo([1, 0], [0.9, 0.8], [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]), (0, 0)),  # classes
        (pseudo([0, 0], [0.8, 0.9], [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]), (1, 0.75)),  # twice
        (pseudo([0], [0.9], [1, 0, 0, 0, 0, 0, 0, 0]), (0, 0)),  # IoU 1/4
        (pseudo([0], [0.9], [1, 1, 0, 0, 0, 0, 0, 0]), (1, 0.5)),
    ],
)
def test_a_pseudo_label_is_right_if_it_is_the_first_to_find_an_object_of_its_class(found, expected):
    assert count_right(found, TRUTH) == pytest.approx(expected)


def test_nothing_to_find_and_nothing_found():
    none = {"labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros((0, 1, 8), dtype=torch.bool)}
    nothing = none | {"scores": torch.zeros(0)}
    assert count_right(nothing, TRUTH) == (0, 0.0) == count_right(nothing, none)
    assert count_right(pseudo([0], [0.9], [1] * 8), none) == (0, 0.0)


class Oracle(nn.Module):
    """Knows the truth of each view, but for those objects whose number it is told to miss."""

    def __init__(self, setting, ids, miss=0):
        super().__init__()
        views = Views(setting.train, setting.view)
        items = [views[i, seed_of(setting.cfg.seed, "health", i)] for i in ids]
        self.truth = {item["image"].numpy().tobytes(): item for item in items}
        self.miss = miss

    def forward(self, images):
        Q, K, (H, W) = 30, 4, images.shape[-2:]
        logits, masks = torch.zeros(len(images), Q, K + 1), torch.full((len(images), Q, H // 4, W // 4), -9.0)
        logits[..., K] = 20
        for b, image in enumerate(images):
            item = self.truth[image.numpy().tobytes()]
            small = nn.functional.avg_pool2d(item["masks"][:, None].float(), 4)[:, 0] > 0.5
            for q in range(self.miss, len(small)):
                logits[b, q, K], logits[b, q, item["labels"][q]] = 0, 20
                masks[b, q][small[q]] = 9.0
        return Prediction(pred_logits=logits, pred_masks=masks, aux_outputs=[])


def test_health_measures_on_hidden_labels(shapes, tmp_path):
    flags = f"--data {shapes} --preset shapes {SMALL} --batch 4 --min-area 0 --out {tmp_path}"
    setting = burnin.Setting(parse(*flags.split(), script=burnin))
    hidden = sorted(set(setting.train.image_ids) - set(setting.labelled))
    oracle = Oracle(setting, hidden)
    result = health(oracle, setting, burnin.teacher_labels)
    assert oracle.training, "as it was before"
    assert result["images"] == len(hidden) == 6 and result["score"] == pytest.approx(1)
    assert result["precision"] == pytest.approx(100) == result["mask_iou"] and result["recall"] > 90
    missing = health(Oracle(setting, hidden, miss=1), setting, burnin.teacher_labels)
    assert missing["precision"] == pytest.approx(100) and missing["recall"] < result["recall"]
    assert missing["kept"] == pytest.approx(result["kept"] - 1)
    lines = health_lines(result)
    assert max(map(len, lines)) < 80, "a terminal's width"
    said = " ".join(line.strip() for line in lines)
    assert "precision 100.0, recall" in said and "mask IoU 100.0 their classes" in said and "circle" in said
    assert health_lines(result | {"kept": 0}) == ["  no pseudo-labels on 6 images"]


def test_health_takes_images_without_objects(shapes, tmp_path):
    shutil.copytree(shapes, tmp_path / "data")
    file = tmp_path / "data/instances_train.json"
    content = json.loads(file.read_text())
    flags = f"--data {tmp_path / 'data'} --preset shapes {SMALL} --min-area 0 --out {tmp_path / 'out'}"
    setting = burnin.Setting(parse(*flags.split(), script=burnin))
    empty, *others = sorted(set(setting.train.image_ids) - set(setting.labelled))
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != empty]
    file.write_text(json.dumps(content))
    setting = burnin.Setting(setting.cfg)
    result = health(Oracle(setting, [empty, *others]), setting, burnin.teacher_labels)
    assert result["images"] == 6 and result["precision"] == pytest.approx(100)


def test_health_does_without_images_that_are_damaged(shapes, tmp_path):
    shutil.copytree(shapes, tmp_path / "data")
    flags = f"--data {tmp_path / 'data'} --preset shapes {SMALL} --out {tmp_path / 'out'}"
    setting = burnin.Setting(parse(*flags.split(), script=burnin))
    for image_id in set(setting.train.image_ids) - set(setting.labelled):
        setting.train.path(image_id).write_bytes(b"no image")
    result = health(nn.Identity(), setting, burnin.teacher_labels)
    assert result["images"] == result["kept"] == result["precision"] == 0


def test_without_hidden_labels_health_tells_how_many_are_kept(shapes, tmp_path):
    flags = f"--data {shapes} --preset shapes {SMALL} --ratio 1 --out {tmp_path}"
    setting = burnin.Setting(parse(*flags.split(), script=burnin))
    result = health(Oracle(setting, setting.train.image_ids), setting, burnin.teacher_labels)
    assert result["images"] == 12 and "precision" not in result and result["kept"] > 1
