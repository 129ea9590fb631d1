"""What several test files need: a tiny model, tiny datasets, and bilinear interpolation as plain formulas."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from data import CocoDataset
from model import Mask2Former
from shapes import write_shapes

torch.set_num_threads(1)


def pytest_configure(config):
    """Only tests marked gpu see one (make test-gpu): the others compare bits, which a GPU does not keep."""
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


TABLE = {}  # rows of what was tried and held


@pytest.fixture
def tally():
    """tally(row, held, tried, *remarks) adds to the table that is shown after the tests."""

    def tally(row, held, tried, *remarks):
        TABLE[row] = f"{held:,} of {tried:,}" + "".join(f", {remark}" for remark in remarks)
        assert held == tried, f"{row}: {TABLE[row]}"

    return tally


def pytest_terminal_summary(terminalreporter):
    for row, text in TABLE.items():
        terminalreporter.write_line(f"{row:<62} {text}")


@pytest.fixture(autouse=True)
def own_signals():
    """Those of pytest, whatever a test has started in this process."""
    before = {number: signal.getsignal(number) for number in engine.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    """And one thread on every machine, unless a test asks otherwise: tests compare numbers."""
    torch.set_num_threads(1)
    monkeypatch.setattr(engine, "bfloat16", False)


@pytest.fixture
def make_model():
    """A tiny Mask2Former of a seed; arguments replace those of TINY."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        return Mask2Former(**{**TINY, **changes})

    return make


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """The folder of a tiny shapes dataset; tests only read it."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, num_train=12, num_val=6, size=64)
    return folder


@pytest.fixture
def make_dataset(tmp_path):
    """Writes images, {id: (H, W, 3) uint8 array}, and COCO annotations into a folder and reads them back."""

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
    """bilinear(map, x, y): the value of a (..., H, W) map at pixel coordinates, where (0, 0) is the centre of
    the first pixel. Beyond the pixels it is zero, or with border=True that of the nearest pixel."""

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
    """resize(map, (H, W)): bilinear resizing of a (..., h, w) map where the outer edges of both coincide."""

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
