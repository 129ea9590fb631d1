"""Fixtures of several test files: a tiny model, tiny datasets, and bilinear interpolation as plain
formulas."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from data import CocoDataset
from layouts.shapes import write_shapes
from model import Mask2Former
from training import signals

torch.set_num_threads(1)


def pytest_configure(config):
    """Hide GPUs from all tests but those marked gpu (make test-gpu): the others compare bits, and sums
    on a GPU are not bit-exact."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


TINY = dict(
    num_classes=3,
    backbone="resnet10t",
    norm="group",
    num_queries=6,
    hidden_dim=32,
    num_heads=4,
    encoder_layers=1,
    encoder_ffn=32,
    decoder_layers=2,
    decoder_ffn=32,
    backbone_args={"stem_type": "", "channels": [16, 16, 32, 32]},
)


TABLE = {}  # the rows of the fixture tally


@pytest.fixture
def tally():
    """Return tally(row, held, tried, *remarks): it asserts that all attempts held, and adds a row to
    the table that is printed after the tests."""

    def tally(row, held, tried, *remarks):
        TABLE[row] = f"{held:,} of {tried:,}" + "".join(f", {remark}" for remark in remarks)
        assert held == tried, f"{row}: {TABLE[row]}"

    return tally


def pytest_terminal_summary(terminalreporter):
    for row, text in TABLE.items():
        terminalreporter.write_line(f"{row:<62} {text}")


@pytest.fixture(autouse=True)
def restored_signals():
    """Restore the signal handlers of pytest, which a run in this process replaces."""
    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    """Use fp32 and one thread on every machine, because tests compare numbers. A test may change it."""
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {}, raising=False)


@pytest.fixture
def make_model():
    """Return make(seed, **changes): a tiny Mask2Former whose weights are drawn from the seed, with
    arguments that replace those of TINY."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        return Mask2Former(**{**TINY, **changes})

    return make


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """The folder of a tiny shapes dataset. Tests do not change it."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, num_train=12, num_val=6, size=64)
    return folder


@pytest.fixture
def make_dataset(tmp_path):
    """Return make(images, annotations, category_ids): a CocoDataset that is written to a folder and read.
    images: {id: (H, W, 3) uint8 array}."""

    def make(images, annotations, category_ids=(1, 2, 3)):
        (tmp_path / "images").mkdir()
        for image_id, pixels in images.items():
            Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(tmp_path / f"images/{image_id}.png")
        content = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "height": len(pixels), "width": len(pixels[0])}
                for i, pixels in images.items()
            ],
            "annotations": [{"id": n, "iscrowd": 0, **a} for n, a in enumerate(annotations, start=1)],
            "categories": [{"id": i, "name": f"class {i}"} for i in category_ids],
        }
        (tmp_path / "instances.json").write_text(json.dumps(content))
        return CocoDataset(tmp_path / "instances.json", tmp_path / "images")

    return make


@pytest.fixture(scope="session")
def bilinear():
    """Return bilinear(map, x, y): the value of a (..., H, W) map at pixel coordinates, where (0, 0) is
    the center of the first pixel. Outside the map it is zero, or with border=True that of the nearest
    pixel."""

    def bilinear(values, x, y, border=False):
        H, W = values.shape[-2:]
        x0, y0 = math.floor(x), math.floor(y)
        total = 0 * values[..., 0, 0]
        for i, j in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
            weight = (1 - abs(y - i)) * (1 - abs(x - j))
            if border:
                total = total + weight * values[..., min(max(i, 0), H - 1), min(max(j, 0), W - 1)]
            elif 0 <= i < H and 0 <= j < W:
                total = total + weight * values[..., i, j]
        return total

    return bilinear


@pytest.fixture(scope="session")
def resize(bilinear):
    """Return resize(map, (H, W)): a (..., h, w) map resized bilinearly, with the same outer edges."""

    def resize(values, size):
        (h, w), (H, W) = values.shape[-2:], size
        rows = [
            np.stack(
                [bilinear(values, (j + 0.5) * w / W - 0.5, (i + 0.5) * h / H - 0.5, True) for j in range(W)],
                axis=-1,
            )
            for i in range(H)
        ]
        return np.stack(rows, axis=-2)

    return resize
