"""Tests of tools/method_figure.py on a tiny run."""

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image

from data import labeled_split
from layouts import load_data
from tools.method_figure import CAPTIONS, SIDE, draw, draw_rows
from training.visualize import COLORS

SMALL = "--preset shapes --ratio 0.5 --steps 2 --batch 2 --crop 64,96 --num-queries 5 --hidden-dim 32"
SMALL += " --encoder-ffn 32 --decoder-layers 1 --decoder-ffn 32 --num-points 32 --score-threshold 0.2"


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """Return the folder of a finished run, the ids of its labeled images, and those of the others."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    run("distill.py", "--data", shapes, *SMALL.split(), "--device", "cpu", "--out", out)
    image_ids = load_data(str(shapes))[0].image_ids
    labeled = labeled_split(image_ids, 0.5, seed=0)
    return out, labeled, sorted(set(image_ids) - set(labeled))


def test_the_first_three_unlabeled_images_are_drawn(finished, tmp_path):
    out, _, unlabeled = finished
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    run("tools.method_figure", out, tmp_path / "a.png")
    run("tools.method_figure", out, tmp_path / "b.png", "--images", *unlabeled[:3])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}, "the run is not changed"
    picture = Image.open(tmp_path / "a.png")
    assert picture.width >= len(CAPTIONS) * SIDE and picture.height >= 3 * SIDE * 64 / 96


def test_a_row_shows_one_crop_in_weak_and_strong_views(finished):
    rows = [*draw_rows(finished[0], finished[2])]
    assert len(rows) == 6
    for row in rows:
        assert len(row) == len(CAPTIONS) and {picture.size for picture in row} == {(SIDE, SIDE * 64 // 96)}
        pixels = [np.asarray(picture).astype(float) for picture in row]
        # Outlines and texts cover a small part of the view below them.
        for view, drawing in ((0, 1), (2, 3), (2, 4)):
            assert (pixels[view] == pixels[drawing]).all(-1).mean() > 0.5
    assert any(row[0].tobytes() != row[1].tobytes() for row in rows), "there are pseudo-labels"
    assert any(row[0].tobytes() != row[2].tobytes() for row in rows), "strong views differ from weak ones"


@pytest.mark.parametrize("image_id", ["labeled", 999])
def test_other_images_are_an_error_of_one_line(finished, tmp_path, image_id):
    image_id = finished[1][0] if image_id == "labeled" else image_id
    error = run("tools.method_figure", finished[0], tmp_path / "a.png", "--images", image_id, code=2).stderr
    assert error == f"error: cannot draw image {image_id}: it is no unlabeled training image of this run\n"


def test_a_run_without_checkpoints_is_an_error_of_one_line(tmp_path):
    error = run("tools.method_figure", tmp_path, tmp_path / "a.png", code=2).stderr
    assert error == f"error: no checkpoint '{tmp_path}/burnin.pt'\n"


def test_instances_are_outlined_at_any_resolution_of_masks():
    """Those with a low score or an empty mask are left out."""
    view = torch.full((3, 64, 64), 7, dtype=torch.uint8)
    for stride in (1, 4):
        masks = torch.zeros(3, 64 // stride, 64 // stride, dtype=torch.bool)
        masks[:2, 16 // stride : 48 // stride, 16 // stride : 48 // stride] = True
        instances = {
            "labels": torch.tensor([1, 2, 3]),
            "scores": torch.tensor([0.9, 0.4, 0.9]),
            "masks": masks,
        }
        picture = draw(list("abcd"), view, instances, min_score=0.5)
        colors = {color for _, color in picture.getcolors(10_000)}
        assert picture.size == (SIDE, SIDE) and COLORS[1] in colors and not {COLORS[2], COLORS[3]} & colors
        rows, columns = np.nonzero((np.asarray(picture) == COLORS[1]).all(-1))
        for places in (rows, columns):
            assert places.min() == pytest.approx(SIDE / 4, abs=3)
            assert places.max() == pytest.approx(SIDE * 3 / 4, abs=3)
