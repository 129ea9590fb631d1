"""Tests of tools/export.py: the programs of torch.export and ONNX find in an image what evaluate.py finds."""

import pytest
import torch
from commands import run
from conftest import TINY
from timm.layers import Conv2dSame
from torch import nn
from torch.torch_version import TorchVersion

from evaluate import instances
from model import Mask2Former
from tools.export import ConvSamePadding, main, trace

SIZES = [(192, 256), (150, 235)]  # neither was traced


needs_export = pytest.mark.skipif(torch.__version__ < (2, 9), reason="export needs torch 2.9")


@pytest.fixture(scope="module", params=["group", "frozen"])
def exported(request, tmp_path_factory):
    """Return a tiny model, its program, the folder, and the printed text."""
    torch.manual_seed(1)
    model_args = {**TINY, "norm": request.param}
    model, folder = Mask2Former(**model_args).eval(), tmp_path_factory.mktemp("exported")
    checkpoint = {"format": 2, "model": model.state_dict(), "teacher": None, "model_args": model_args}
    torch.save(checkpoint, folder / "distill.pt")
    printed = run("tools.export", folder / "distill.pt", folder / "out").stdout
    return model, torch.export.load(folder / "out/model.pt2"), folder / "out", printed


def check(model, image, scores, labels, masks):
    """Compare detections with those of the model. Rounding may move a few pixels of a mask across its
    threshold."""
    with torch.no_grad():
        expected = instances(model(image), [image.shape[2:]])[0]
    assert (labels.dtype, masks.dtype) == (torch.int64, torch.bool)
    torch.testing.assert_close(scores, expected["scores"], rtol=0, atol=1e-5)
    assert torch.equal(labels, expected["labels"])
    assert masks.shape == expected["masks"].shape and 0 < masks.float().mean() < 1
    assert (masks != expected["masks"]).sum() <= 1e-4 * masks.numel()


def images():
    generator = torch.Generator().manual_seed(0)
    for H, W in SIZES:  # in the memory layout of a file, rows of pixels
        yield torch.randint(0, 256, (1, H, W, 3), generator=generator).byte().permute(0, 3, 1, 2)


@needs_export
def test_a_program_finds_what_the_model_finds_in_images_of_any_size(exported):
    model, program, *_ = exported
    for image in images():
        check(model, image, *program.module()(image))
    operations = {node.target for graph in program.graph_module.modules() for node in graph.graph.nodes}
    spaces = {operation.namespace for operation in operations if isinstance(operation, torch._ops.OpOverload)}
    assert spaces == {"aten"}, "the program needs no custom operators"


@needs_export
def test_an_onnx_model_finds_what_the_model_finds_in_images_of_any_size(exported):
    import onnxruntime

    model, _, folder, _ = exported
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    for image in images():
        check(model, image, *map(torch.from_numpy, session.run(None, {"image": image.numpy()})))


@needs_export
def test_a_backbone_that_transformers_lacks_has_programs_and_no_files_of_weights(exported):
    *_, folder, printed = exported
    assert (folder / "model.pt2").exists() and not (folder / "config.json").exists()
    assert "images of 33 to 4096 pixels a side" in printed and "not with resnet10t" in printed


@needs_export
def test_code_that_needs_sizes_as_numbers_is_traced_for_the_test_size():
    class Halves(nn.Module):
        def forward(self, image):
            return image[..., : int(image.shape[-1]) // 2]

    program, accepted = trace(Halves(), (40, 60))
    assert "40 x 60" in accepted and program.module()(torch.zeros(1, 3, 40, 60).byte()).shape[-1] == 30
    assert "800 x 1333" in trace(Halves(), (0, 0))[1]


@needs_export
def test_a_side_that_is_too_short_is_an_error(exported):
    with pytest.raises(AssertionError, match="33"):
        exported[1].module()(torch.zeros(1, 3, 64, 32, dtype=torch.uint8))


def test_a_torch_that_is_too_old_is_an_error(tmp_path, make_model, monkeypatch, capsys):
    checkpoint = {"format": 2, "model": make_model().state_dict(), "teacher": None, "model_args": TINY}
    torch.save(checkpoint, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.8.0"))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "a.pt"), str(tmp_path / "out")])
    assert "cannot export: it needs torch >= 2.9, found 2.8.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "size, stride, dilation", [(3, 2, 1), (3, 1, 1), (5, 2, 1), (1, 2, 1), ((3, 5), 1, 2)]
)
def test_tensorflows_padding_needs_no_sizes_where_the_stride_divides_them(size, stride, dilation):
    torch.manual_seed(0)
    conv = Conv2dSame(2, 3, size, stride=stride, dilation=dilation)
    image = torch.randn(2, 2, 12, 20)
    expected = conv(image)
    conv.__class__ = ConvSamePadding
    torch.testing.assert_close(conv(image), expected)
