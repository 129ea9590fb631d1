"""Tests of reading and writing checkpoints of other code. The files are made here, with the names and shapes
of the official model."""

import argparse
import json
import logging
import os
import pickle
import re
import threading
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from commands import run, same
from conftest import TINY
from safetensors.torch import load_file, save_file
from torch.torch_version import TorchVersion

import distill
import evaluate
from interop import backbone
from interop.backbone import download_pretrained, load_backbone_weights
from interop.legacy import current_options, upgrade_checkpoint
from interop.load import infer_model_args, load_any_checkpoint, load_partial, read_file
from interop.names import HUGGING_FACE, OFFICIAL, OURS, convert_state_dict, translate_state_dict
from model import Mask2Former
from tools import export
from training import setup
from training.cli import parse_config
from training.config import Config, read_settings

ROOT = Path(distill.__file__).parent


def official_resnet(blocks, num_classes=80, num_queries=100, C=256) -> dict:
    """Return {name: shape} of the entries of an official Mask2Former with a ResNet."""
    shapes = {}

    def conv_with_frozen_norm(name, *weight):
        shapes[f"{name}.weight"] = weight
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.norm.{part}"] = weight[:1]

    conv_with_frozen_norm("backbone.stem.conv1", 64, 3, 7, 7)
    before = 64
    for stage, count in enumerate(blocks):
        inner, after = 64 * 2**stage, 256 * 2**stage
        for block in range(count):
            name = f"backbone.res{stage + 2}.{block}"
            if block == 0:
                conv_with_frozen_norm(f"{name}.shortcut", after, before, 1, 1)
            conv_with_frozen_norm(f"{name}.conv1", inner, before, 1, 1)
            conv_with_frozen_norm(f"{name}.conv2", inner, inner, 3, 3)
            conv_with_frozen_norm(f"{name}.conv3", after, inner, 1, 1)
            before = after
    return shapes | official_head([256, 512, 1024, 2048], num_classes, num_queries, C)


def official_swin(width, depths, heads, window, num_classes=80, num_queries=100, C=256) -> dict:
    """Return {name: shape} of the entries of an official Mask2Former with a Swin."""
    shapes = {}

    def layer(name, *weight, bias=True):
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    layer("backbone.patch_embed.proj", width, 3, 4, 4)
    layer("backbone.patch_embed.norm", width)
    for stage, (depth, M) in enumerate(zip(depths, heads)):
        D = width * 2**stage
        for block in range(depth):
            name = f"backbone.layers.{stage}.blocks.{block}"
            for norm in ("norm1", "norm2"):
                layer(f"{name}.{norm}", D)
            shapes[f"{name}.attn.relative_position_bias_table"] = (2 * window - 1) ** 2, M
            shapes[f"{name}.attn.relative_position_index"] = window**2, window**2
            layer(f"{name}.attn.qkv", 3 * D, D)
            layer(f"{name}.attn.proj", D, D)
            layer(f"{name}.mlp.fc1", 4 * D, D)
            layer(f"{name}.mlp.fc2", D, 4 * D)
        if stage < 3:
            layer(f"backbone.layers.{stage}.downsample.reduction", 2 * D, 4 * D, bias=False)
            layer(f"backbone.layers.{stage}.downsample.norm", 4 * D)
        layer(f"backbone.norm{stage}", D)
    channels = [width * 2**stage for stage in range(4)]
    return shapes | official_head(channels, num_classes, num_queries, C)


def official_head(channels, num_classes, num_queries, C) -> dict:
    shapes = {}

    def layer(name, *weight, bias=True):
        shapes[f"sem_seg_head.{name}.weight"] = weight
        if bias:
            shapes[f"sem_seg_head.{name}.bias"] = weight[:1]

    for level in range(3):
        layer(f"pixel_decoder.input_proj.{level}.0", C, channels[3 - level], 1, 1)
        layer(f"pixel_decoder.input_proj.{level}.1", C)
    shapes["sem_seg_head.pixel_decoder.transformer.level_embed"] = 3, C
    for number in range(6):
        name = f"pixel_decoder.transformer.encoder.layers.{number}"
        layer(f"{name}.self_attn.sampling_offsets", 8 * 3 * 4 * 2, C)
        layer(f"{name}.self_attn.attention_weights", 8 * 3 * 4, C)
        layer(f"{name}.self_attn.value_proj", C, C)
        layer(f"{name}.self_attn.output_proj", C, C)
        layer(f"{name}.linear1", 1024, C)
        layer(f"{name}.linear2", C, 1024)
        layer(f"{name}.norm1", C)
        layer(f"{name}.norm2", C)
    layer("pixel_decoder.mask_features", C, C, 1, 1)
    layer("pixel_decoder.adapter_1", C, channels[0], 1, 1, bias=False)
    layer("pixel_decoder.adapter_1.norm", C)
    layer("pixel_decoder.layer_1", C, C, 3, 3, bias=False)
    layer("pixel_decoder.layer_1.norm", C)
    for number in range(9):
        for kind, attention in (("self", "self_attn"), ("cross", "multihead_attn")):
            name = f"predictor.transformer_{kind}_attention_layers.{number}"
            shapes[f"sem_seg_head.{name}.{attention}.in_proj_weight"] = 3 * C, C
            shapes[f"sem_seg_head.{name}.{attention}.in_proj_bias"] = (3 * C,)
            layer(f"{name}.{attention}.out_proj", C, C)
            layer(f"{name}.norm", C)
        name = f"predictor.transformer_ffn_layers.{number}"
        layer(f"{name}.linear1", 2048, C)
        layer(f"{name}.linear2", C, 2048)
        layer(f"{name}.norm", C)
    layer("predictor.decoder_norm", C)
    layer("predictor.query_feat", num_queries, C, bias=False)
    layer("predictor.query_embed", num_queries, C, bias=False)
    layer("predictor.level_embed", 3, C, bias=False)
    layer("predictor.class_embed", num_classes + 1, C)
    for number in range(3):
        layer(f"predictor.mask_embed.layers.{number}", C, C)
    shapes["criterion.empty_weight"] = (num_classes + 1,)
    return shapes


SHAPES = {  # with the published numbers of parameters, in millions
    "resnet50": (official_resnet([3, 4, 6, 3]), 44.0),
    "resnet101": (official_resnet([3, 4, 23, 3]), 63.0),
    "swin_t": (official_swin(96, [2, 2, 6, 2], [3, 6, 12, 24], 7), 47.4),
    "swin_s": (official_swin(96, [2, 2, 18, 2], [3, 6, 12, 24], 7), 68.7),
    "swin_b": (official_swin(128, [2, 2, 18, 2], [4, 8, 16, 32], 12), 106.9),
    "swin_l": (official_swin(192, [2, 2, 18, 2], [6, 12, 24, 48], 12, num_queries=200), 215.5),
}


@pytest.mark.parametrize("name", SHAPES)
def test_official_files_of_every_backbone_fit(name):
    """Names and shapes agree, the backbone is recognized, and the size is the published one."""
    shapes, millions = SHAPES[name]
    with torch.device("meta"):
        model = Mask2Former(80, name, num_queries=200 if name == "swin_l" else 100)
        found = convert_state_dict({key: torch.empty(shape) for key, shape in shapes.items()})
    args = infer_model_args(found)
    assert args["backbone"] == name and args["num_queries"] == (200 if name == "swin_l" else 100)
    own = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in found.items()} == own
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.fixture(scope="module")
def official():
    """Return an official R50 state dict with 80 classes as numpy arrays with small random values."""
    rng = np.random.default_rng(0)
    return {
        name: rng.uniform(0.01, 0.02, shape).astype(np.float32)
        for name, shape in SHAPES["resnet50"][0].items()
    }


def holds(found, official):
    """Return whether a state dict of this project has the same bits as an official one."""
    expected = convert_state_dict({name: torch.from_numpy(value) for name, value in official.items()})
    return found.keys() == expected.keys() and all(torch.equal(found[n], v) for n, v in expected.items())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_an_official_pkl_is_read(official, tmp_path, protocol):
    with open(tmp_path / "model.pkl", "wb") as file:
        pickle.dump({"model": official, "__author__": "someone", "matching_heuristics": True}, file, protocol)
    checkpoint = load_any_checkpoint(tmp_path / "model.pkl")
    assert holds(checkpoint["model"], official) and checkpoint["teacher"] is None
    Mask2Former(**checkpoint["model_args"]).load_state_dict(checkpoint["model"])


def test_the_older_name_of_the_query_features_is_read(official, tmp_path):
    older = dict(official)
    older["sem_seg_head.predictor.static_query.weight"] = older.pop(
        "sem_seg_head.predictor.query_feat.weight"
    )
    with open(tmp_path / "model.pkl", "wb") as file:
        pickle.dump({"model": older}, file)
    assert holds(load_any_checkpoint(tmp_path / "model.pkl")["model"], official)


def test_a_checkpoint_of_guided_distillation_has_a_student_and_a_teacher(official, tmp_path):
    other = {name: value + 1 for name, value in official.items()}
    both = {f"modelStudent.{name}": torch.from_numpy(value) for name, value in official.items()}
    both |= {f"modelTeacher.{name}": torch.from_numpy(value) for name, value in other.items()}
    torch.save({"model": both, "optimizer": {"state": {}}, "iteration": 9}, tmp_path / "model_0000009.pth")
    checkpoint = load_any_checkpoint(tmp_path / "model_0000009.pth")
    assert holds(checkpoint["model"], official) and holds(checkpoint["teacher"], other)


@pytest.mark.parametrize(
    "dtype, order",
    [("float64", "C"), (">f4", "C"), ("float16", "F"), ("int64", "C"), ("bool", "C"), ("uint8", "F")],
)
def test_arrays_of_every_kind_come_out_of_a_pickle_as_they_went_in(tmp_path, dtype, order):
    array = np.asfortranarray(np.arange(6).reshape(2, 3) % 2, dtype=dtype)
    array = np.array(array, order=order)
    scalar = np.array(3, dtype=dtype)
    for protocol in range(6):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": array, "b": [scalar], "c": scalar}, protocol))
        found = read_file(tmp_path / "a.pkl")
        assert np.array_equal(found["a"].numpy(), array) and found["c"].item() == scalar


class Call:
    """An object that is pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "content, word",
    [
        (Call(os.system, "touch ran"), "system"),
        (Call(eval, "open('ran', 'w')"), "eval"),
        (Call(np.load, "ran"), "only numpy arrays"),
        ({"model": {"x": Path("ran")}}, "Path"),
        ({"model": {"x": np.array([Call(os.system, "touch ran")], dtype=object)}}, "system"),
        ({"model": {"x": np.array([None])}}, "not of numbers"),
        ({"model": {"x": np.array([(1, 2)], dtype="i4,i4")}}, "not of numbers"),
    ],
)
def test_a_pickle_that_asks_for_more_than_arrays_is_refused_before_anything_runs(
    tmp_path, monkeypatch, content, word
):
    monkeypatch.chdir(tmp_path)
    Path("model.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=word):
        load_any_checkpoint("model.pkl")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        (torch.zeros(3), "no dictionary"),
        ([torch.zeros(3)], "no dictionary"),
        ({0: torch.zeros(3)}, "no dictionary"),
        ({"model": 3}, "no state dict"),
        ({"model": {"sem_seg_head.predictor.query_feat.weight": 3}}, "no state dict"),
        ({"sem_seg_head.predictor.query_feat.weight": torch.zeros(3, 4)}, "backbone is none of"),
        ({"some.name": torch.zeros(3)}, "neither the official"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=words):
        load_any_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("missing", ["predictor.query_feat.weight", "predictor.class_embed.weight"])
def test_a_missing_parameter_is_named(official, tmp_path, missing):
    less = {name: torch.from_numpy(value) for name, value in official.items() if missing not in name}
    torch.save(less, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="'decoder.(query_features|class_head).weight' is missing"):
        load_any_checkpoint(tmp_path / "a.pth")


def test_a_query_without_its_key_is_refused():
    part = "model.transformer_module.decoder.layers.0.self_attn.q_proj.weight"
    names = {part: torch.zeros(4, 4), "model.pixel_level_module.decoder.level_embed": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match="self_attn.in_proj_weight' is missing"):
        convert_state_dict(names)


def test_the_name_of_a_file_says_nothing(official, tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"model": official}))
    torch.save({n: torch.from_numpy(v) for n, v in official.items()}, tmp_path / "b.pkl")
    legacy = {n: torch.from_numpy(v) for n, v in official.items()}
    torch.save(legacy, tmp_path / "c.safetensors", _use_new_zipfile_serialization=False)
    for name in ("a.pth", "b.pkl", "c.safetensors"):
        assert holds(load_any_checkpoint(tmp_path / name)["model"], official)


@pytest.mark.parametrize("name", ["a.pkl", "a.pth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x05\x95\xff\xff\xff\xff", b"PK\x03\x04 hello"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_any_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "version, file, warns",
    [("2.9.1", "a.pt", True), ("2.9.1", "run/a.pt", False), ("2.10.0", "a.pt", False)],
)
def test_a_torch_with_a_hole_is_named_before_it_reads_a_file_of_somebody_else(
    version, file, warns, tmp_path, make_model, monkeypatch
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").touch()
    checkpoint = {"format": 2, "model": make_model().state_dict(), "teacher": None, "model_args": TINY}
    torch.save(checkpoint, tmp_path / file)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_any_checkpoint(tmp_path / file)["model_args"] == TINY
    assert ["CVE-2026-24747" in str(warning.message) for warning in caught] == [True] * warns


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint.*gone.pkl"):
        load_any_checkpoint(tmp_path / "gone.pkl")


# ------------------------------------------------------------------------------ checkpoints of trainers


@pytest.fixture(scope="module")
def small():
    """A state dict with the names of an official R50 and tensors of at most 3 values on a side."""
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES["resnet50"][0].items()
    return {name: torch.rand([min(side, 3) for side in shape], generator=generator) for name, shape in shapes}


def prefixed(prefix, state_dict):
    return {prefix + name: value for name, value in state_dict.items()}


def hugging_face(official):
    return translate_state_dict(convert_state_dict(official), OURS, HUGGING_FACE)


def equals(found, official):
    expected = convert_state_dict(official)
    return found.keys() == expected.keys() and all(torch.equal(found[n], v) for n, v in expected.items())


WRAPPED = {
    "DDP": lambda names: {"model": prefixed("module.", names)},
    "a compiled model": lambda names: {"state_dict": prefixed("_orig_mod.", names), "epoch": 3},
    "a compiled backbone": lambda names: {
        n.replace("backbone.", "backbone._orig_mod."): v for n, v in names.items()
    },
    "DDP of Guided Distillation": lambda names: {"model": prefixed("module.modelStudent.", names)},
    "Lightning": lambda names: {
        "state_dict": {**prefixed("model.", hugging_face(names)), "metric.count": torch.ones(1)},
        "hyper_parameters": {"lr": 1e-4},
        "loops": None,
    },
    "Lightning in DDP": lambda names: {"state_dict": prefixed("net.module.", names)},
    "accelerate": hugging_face,
    "DeepSpeed": lambda names: {"module": prefixed("module.", names), "dp_world_size": 2},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_wrapping_of_a_trainer_is_removed(small, tmp_path, capsys, name):
    torch.save(WRAPPED[name](small), tmp_path / "a.ckpt")
    checkpoint = load_any_checkpoint(tmp_path / "a.ckpt")
    assert equals(checkpoint["model"], small) and checkpoint["teacher"] is None
    assert checkpoint["model_args"]["backbone"] == "resnet50"
    assert capsys.readouterr().out == ""


EMA = {
    "ema_state_dict": lambda names, ema: {"model": names, "ema_state_dict": prefixed("module.", ema)},
    "model_ema": lambda names, ema: {"model_ema": ema, "model": names},
    "ema.module": lambda names, ema: {"ema": {"module": ema, "decay": 0.9}, "state_dict": names},
    "ema_model": lambda names, ema: {
        "state_dict": {**prefixed("model.", names), **prefixed("ema_model.", ema)}
    },
}


@pytest.mark.parametrize("name", EMA)
def test_ema_weights_are_preferred_and_a_line_names_them(small, tmp_path, capsys, name):
    ema = {name: value + 1 for name, value in small.items()}
    torch.save(EMA[name](small, ema), tmp_path / "a.pth")
    assert equals(load_any_checkpoint(tmp_path / "a.pth")["model"], ema)
    printed = capsys.readouterr().out
    assert printed == f"{tmp_path / 'a.pth'}: the EMA weights are used, those in {name!r}\n"


def test_several_models_in_one_state_dict_are_refused(small, tmp_path):
    torch.save({**prefixed("a.", small), **prefixed("b.", small)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"it holds 2 models, with the prefixes 'a.', 'b.'; save one"):
        load_any_checkpoint(tmp_path / "a.pth")


class HyperParameters:
    """Stands for a class of another project."""


@pytest.mark.parametrize("value", [argparse.Namespace(lr=1e-4), HyperParameters(), Path("a")])
def test_an_object_in_a_checkpoint_is_refused_by_its_type_with_a_remedy(tmp_path, value):
    torch.save({"state_dict": {"a": torch.ones(1)}, "hyper_parameters": value}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"save its weights alone: torch\.save\(torch\.load\(") as caught:
        load_any_checkpoint(tmp_path / "a.ckpt")
    text = str(caught.value)
    assert type(value).__qualname__ in text or "PosixPath" in text
    assert "\n" not in text and "\x1b" not in text and len(text) < 400


def test_a_checkpoint_of_mmdetection_is_called_by_its_name(tmp_path):
    names = {"backbone.conv1.weight": torch.ones(1), "panoptic_head.query_feat.weight": torch.ones(1)}
    torch.save({"meta": {"mmdet_version": "3.3.0"}, "state_dict": names}, tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"a\.pth: it is a checkpoint of MMDetection .*; use one of the official"
    ):
        load_any_checkpoint(tmp_path / "a.pth")


def test_a_name_of_the_hub_is_answered_with_the_command_that_downloads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="run hf download facebook/mask2former-swin-tiny --local-dir mask2"):
        load_any_checkpoint("facebook/mask2former-swin-tiny")
    Path("runs").mkdir()
    for path in ("runs/coco", "somewhere/model.pt", "/facebook/mask2former"):
        with pytest.raises(ValueError, match="^no checkpoint '[^']*'$"):
            load_any_checkpoint(path)


@pytest.mark.parametrize(
    "start, words", [("<!DOCTYPE html>", "a web page"), ("version https://git-lfs", "git lfs")]
)
def test_what_a_failed_download_leaves_is_called_by_its_name(tmp_path, start, words):
    (tmp_path / "a.pth").write_text(f"{start}\n")
    with pytest.raises(ValueError, match=words):
        load_any_checkpoint(tmp_path / "a.pth")


def test_the_folder_of_a_run_means_its_last_result(make_model, tmp_path, capsys):
    for seed, phase in enumerate(("supervised", "teacher", "burnin", "distill", "finetune")):
        model = make_model(seed=seed)
        torch.save({"format": 2, "model": model.state_dict(), "model_args": TINY}, tmp_path / f"{phase}.pt")
        found = load_any_checkpoint(tmp_path)["model"]
        assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())
        assert capsys.readouterr().out == f"{tmp_path}: reading {phase}.pt\n"


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint: none of finetune.pt, distill.pt, .*safetensors"):
        load_any_checkpoint(tmp_path)


def write_shards(folder, names, form):
    """Write a state dict as Hugging Face does, in two files with an index."""
    halves = {f"a-{i}-of-2.{form}": dict(list(names.items())[i::2]) for i in range(2)}
    for file, half in halves.items():
        save_file(half, folder / file) if form == "safetensors" else torch.save(half, folder / file)
    index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
    stem = "model" if form == "safetensors" else "pytorch_model"
    (folder / f"{stem}.{form}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_folder_of_hugging_face_is_read_with_and_without_shards(small, tmp_path, form):
    names = hugging_face(small)
    write_shards(tmp_path, names, form)
    assert equals(load_any_checkpoint(tmp_path)["model"], small)
    assert equals(load_any_checkpoint(next(tmp_path.glob("*.json")))["model"], small)
    other = {name: value + 1 for name, value in names.items()}
    torch.save(other, tmp_path / "pytorch_model.bin")
    assert equals(load_any_checkpoint(tmp_path)["model"], {name: v + 1 for name, v in small.items()})


@pytest.mark.parametrize("shard", ["../secret.bin", "/etc/passwd", "folder/a.bin", "link.bin", "..", "", "."])
def test_a_shard_outside_of_its_folder_is_refused(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "secret.bin")
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match="the shard .* is outside of its folder"):
        load_any_checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000]
)
def test_a_broken_index_of_shards_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is not an index of shards"):
        load_any_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------ weights of backbones


@pytest.fixture(scope="module")
def resnet():
    """The state dict of timm's resnet18, with statistics that are not those of a new model."""
    torch.manual_seed(0)
    state_dict = timm.create_model("resnet18").state_dict()
    return {name: value + 0.1 * torch.rand(value.shape) for name, value in state_dict.items()}


def detectron2(resnet):
    """Rename timm's ResNet as Detectron2 does."""
    body = {
        f"backbone.body.{n}": v for n, v in resnet.items() if not n.startswith("fc.") and "num_b" not in n
    }
    return {n.removeprefix("backbone."): v for n, v in translate_state_dict(body, OURS, OFFICIAL).items()}


def backbone_file(folder, content, backbone="resnet18", backbone_args=None):
    torch.save(content, folder / "weights.pth")
    return load_backbone_weights(folder / "weights.pth", backbone, backbone_args)


FORMS = {
    "timm and torchvision": lambda names: names,
    "MoCo": lambda names: {
        "arch": "resnet18",
        "state_dict": {
            **prefixed("module.encoder_q.", names),
            **prefixed("module.encoder_k.", {n: v + 1 for n, v in names.items()}),
            "module.queue": torch.ones(3),
        },
    },
    "MoCo v3": lambda names: {
        "state_dict": {
            **prefixed("module.momentum_encoder.", {n: v + 1 for n, v in names.items()}),
            **prefixed("module.base_encoder.", names),
        }
    },
    "DINO": lambda names: {
        "student": prefixed("module.backbone.", {n: v + 1 for n, v in names.items()}),
        "teacher": {**prefixed("backbone.", names), "head.mlp.0.weight": torch.ones(1)},
    },
    "Detectron2": lambda names: {"model": detectron2(names), "__author__": "torchvision"},
    "the official Mask2Former": lambda names: {
        "model": {**prefixed("backbone.", detectron2(names)), "sem_seg_head.a": torch.ones(1)}
    },
    "ours": lambda names: {"model": prefixed("backbone.body.", names), "format": 2, "model_args": {}},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_a_backbone_are_read_from_the_files_of_other_code(resnet, tmp_path, form):
    args = {**TINY, "backbone": "resnet18", "backbone_args": None, "norm": "frozen"}
    model = Mask2Former(**args, backbone_weights=backbone_file(tmp_path, FORMS[form](resnet)))
    found = model.backbone.body.state_dict()
    assert len(found) == 100 and all(torch.equal(value, resnet[name]) for name, value in found.items())


def test_a_pickle_of_detectron2_is_read(resnet, tmp_path):
    arrays = {name: value.numpy() for name, value in detectron2(resnet).items()}
    content = {"model": {**arrays, "stem.fc.weight": np.ones(3)}, "__author__": "torchvision"}
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(content, protocol=2))
    found = load_backbone_weights(tmp_path / "R-18.pkl", "resnet18")
    expected = {n: v for n, v in resnet.items() if not n.startswith("fc.") and "num_batches" not in n}
    assert found.keys() == expected.keys() and all(torch.equal(found[n], v) for n, v in expected.items())


def caffe2(resnet):
    """Name the arrays of a ResNet as Detectron does: scale and bias are all that its norms have."""
    blobs = {}
    for name, value in detectron2(resnet).items():
        if name.endswith(("weight", "bias")):
            name = (
                re.sub(r"stem\.conv1\.norm", "res_conv1_bn", name)
                .replace("stem.", "")
                .replace(".norm", "_bn")
            )
            for layer, branch in {"conv1": "branch2a", "conv2": "branch2b", "shortcut": "branch1"}.items():
                name = re.sub(rf"(res\d\.\d)\.{layer}", rf"\1_{branch}", name)
            suffix = {"weight": "s" if "_bn" in name else "w", "bias": "b"}[name.split(".")[-1]]
            blobs[f"{name.rsplit('.', 1)[0].replace('.', '_')}_{suffix}"] = value.numpy()
    return blobs


def test_detectrons_backbone_for_bgr_computes_the_same_from_our_images(resnet, tmp_path):
    """It subtracts a mean from BGR and divides by nothing, and its norms only scale and shift."""
    blobs = caffe2(resnet)
    assert {"conv1_w", "res_conv1_bn_s", "res2_0_branch2a_w", "res4_0_branch1_bn_b"} <= blobs.keys()
    content = {"blobs": {**blobs, "conv1_w_momentum": blobs["conv1_w"], "fc1000_w": np.ones(3)}}
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(content, protocol=2))
    weights = load_backbone_weights(tmp_path / "R-18.pkl", "resnet18")
    args = {**TINY, "backbone": "resnet18", "backbone_args": None, "norm": "batch"}
    model = Mask2Former(**args, backbone_weights=weights).eval()

    rgb = torch.randint(0, 256, (1, 3, 32, 64)).float()
    bgr = rgb.flip(1) - torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
    conv = torch.nn.functional.conv2d(bgr, resnet["conv1.weight"], stride=2, padding=3)
    scale, shift = (resnet[f"bn1.{part}"].view(-1, 1, 1) for part in ("weight", "bias"))
    body = model.backbone.body
    found = body.bn1(body.conv1((rgb - model.pixel_mean) / model.pixel_std))
    torch.testing.assert_close(found, conv * scale + shift, rtol=1e-4, atol=1e-3)
    for name in ("layer1.0.conv2.weight", "layer2.0.downsample.0.weight", "layer3.1.bn1.bias"):
        assert torch.equal(body.state_dict()[name], resnet[name])


def test_official_dinov2_weights_with_registers_are_read(tmp_path):
    """The first position is that of the class token, which timm adds to it."""
    name, args = "vit_small_patch14_reg4_dinov2", {"depth": 1, "img_size": 28}
    torch.manual_seed(0)
    expected = timm.create_model(name, num_classes=0, **args).state_dict()
    official = {n: v for n, v in expected.items() if n != "reg_token"}
    official |= {"register_tokens": expected["reg_token"], "mask_token": torch.ones(1, 384)}
    position = torch.randn(1, 1, 384)
    official["cls_token"] = expected["cls_token"] - position
    official["pos_embed"] = torch.cat([position, expected["pos_embed"]], dim=1)
    weights = backbone_file(tmp_path, official, name, args)
    model = Mask2Former(**{**TINY, "backbone": name, "backbone_args": args}, backbone_weights=weights)
    for key, value in model.backbone.body.state_dict().items():
        torch.testing.assert_close(value, expected[key], msg=key)


@pytest.mark.parametrize(
    "content, words",
    [
        ({"model": 3}, "weights.pth: it holds no state dict"),
        (
            {"model": {"res2.0.gate.weight": torch.ones(1), "stem.conv1.weight": torch.ones(1)}},
            "unknown parameter",
        ),
        ({"state_dict": {"a": torch.ones(1)}, "args": argparse.Namespace()}, "'argparse.Namespace'"),
    ],
)
def test_other_files_of_weights_are_refused_in_one_line(tmp_path, content, words):
    with pytest.raises(ValueError, match=words) as caught:
        backbone_file(tmp_path, content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "backbone, content, words",
    [
        ("resnet18", b"<html></html>", "it is a web page"),
        ("resnet34", "resnet18", "100 of the 180 tensors of 'resnet34' are there; "),
        ("test_vit", "resnet18", "0 of the 78 tensors of 'test_vit'"),
    ],
)
def test_backbone_weights_are_checked_before_training(shapes, tmp_path, backbone, content, words):
    """One line, before the banner: only the line about the data is printed before it."""
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(timm.create_model(content).state_dict(), file)
    flags = ["--data", shapes, "--preset", "shapes", "--backbone", backbone, "--pretrained", file]
    done = run("distill.py", *flags, "--out", tmp_path / "run", code=2)
    assert done.stdout.startswith(f"{shapes}: ") and done.stdout.count("\n") == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr and str(file) in done.stderr


def test_training_starts_from_backbone_weights_of_other_code(shapes, tmp_path, resnet):
    """With a learning rate of 0 the backbone stays what it was in the file."""
    torch.save({"state_dict": prefixed("module.encoder_q.", resnet)}, tmp_path / "moco.pth")
    small = TRAINED.replace("resnet50", "resnet18").split()
    flags = ["--data", shapes, *small, "--backbone-weights", tmp_path / "moco.pth", "--lr", "0"]
    run("burnin.py", *flags, "--supervised-only", "--out", tmp_path)
    found = load_any_checkpoint(tmp_path / "supervised.pt")["model"]
    names = [name for name in resnet if not name.startswith("fc.") and "num_batches" not in name]
    assert all(torch.equal(found[f"backbone.body.{name}"], resnet[name]) for name in names)


# ------------------------------------------------------------------------------------ timm's own weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the Hugging Face hub, and no server. The calls to the latter are listed."""
    calls = []

    def no_server(url, **_):
        calls.append(url)
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", no_server)
    return calls


@pytest.fixture
def cached(hub, tmp_path):
    """The weights of test_vit in the cache, with a tensor more than the model has."""
    folder = tmp_path / "hub/models--timm--test_vit.r160_in1k"
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    torch.manual_seed(1)
    weights = timm.create_model("test_vit", num_classes=1000).state_dict()
    save_file({**weights, "unexpected": torch.ones(1)}, folder / "snapshots/abc/model.safetensors")
    return weights


PRETRAINED = (
    "--preset shapes --supervised-only --pretrained true --lr 0 --steps 2 --batch 2 --crop 64,64 --workers 0 "
)
PRETRAINED += (
    "--hidden-dim 32 --encoder-ffn 32 --decoder-layers 1 --decoder-ffn 32 --num-points 32 --device cpu"
)


def test_without_a_network_one_line_says_what_to_download(hub, shapes, tmp_path):
    """Before the banner: only the line about the data is printed before it."""
    flags = ["--data", shapes, "--out", tmp_path / "run", "--backbone", "dinov3_s", *PRETRAINED.split()]
    done = run("burnin.py", *flags, code=2)
    repo = "https://huggingface.co/timm/vit_small_patch16_dinov3.lvd1689m"
    assert hub == [f"{repo}/resolve/main/model.safetensors"]
    assert done.stdout.count("\n") == done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: cannot download the pretrained weights of 'dinov3_s' (OSError: ")
    for word in (
        f"model.safetensors from {repo} ",
        "pass it as --pretrained",
        "--pretrained false",
        "not known",
    ):
        assert word in done.stderr


def test_a_run_from_cached_weights_is_silent_and_is_resumed_without_them(
    hub, cached, shapes, tmp_path, caplog, monkeypatch
):
    """With a learning rate of 0 the backbone stays what it was in the file."""
    out, built = tmp_path / "run", []
    monkeypatch.setattr(setup, "Mask2Former", lambda **args: built.append(args) or Mask2Former(**args))
    caplog.set_level(logging.INFO)
    flags = ["--data", shapes, "--out", out, "--backbone", "test_vit", *PRETRAINED.split()]
    run("burnin.py", *flags)
    found = load_any_checkpoint(out / "supervised.pt")["model"]
    names = {name.removeprefix("backbone.body."): name for name in found if ".body." in name}
    assert len(names) > 70 and all(torch.equal(found[n], cached[name]) for name, n in names.items())
    assert not hub and not [record for record in caplog.records if record.name.startswith("timm")]
    assert [args["pretrained"] for args in built if "pretrained" in args] == [True]

    (out / "supervised.pt").rename(out / "supervised.step-0000006.pt")  # as if it had been stopped here
    (tmp_path / "hub").rename(tmp_path / "elsewhere")
    built.clear()
    assert "resumed at step 6 of 6" in run("burnin.py", *flags).stdout
    assert not hub and built and not any("pretrained" in args for args in built)


def test_a_student_that_is_a_copy_of_the_teacher_needs_no_download(hub, shapes, tmp_path):
    sizes = dict(hidden_dim=32, encoder_layers=1, encoder_ffn=32, decoder_layers=1, decoder_ffn=32)
    args = dict(num_classes=4, backbone="test_vit", norm="group", num_queries=3, **sizes)
    checkpoint = {"format": 2, "model": Mask2Former(**args).state_dict(), "model_args": args}
    torch.save(checkpoint, tmp_path / "teacher.pt")
    flags = PRETRAINED.replace("--supervised-only ", "").replace("--steps 2", "--hours 0.0001").split()
    flags += ["--preset", "auto", "--student-from-teacher", "true", "--data", shapes]
    flags += ["--teacher-checkpoint", tmp_path / "teacher.pt", "--out", tmp_path / "run"]
    run("burnin.py", *flags)
    found = load_any_checkpoint(tmp_path / "run/burnin.pt")["model"]
    assert not hub and same(dict(found), dict(checkpoint["model"])), "the learning rate is 0"


def test_pretrained_weights_of_another_size_are_refused_in_one_line(hub, cached, tmp_path, capsys):
    flags = ["--backbone", "test_vit", "--pretrained", "true", "--out", str(tmp_path)]
    cfg = parse_config([*flags, "--model-args", '{"backbone_args": {"embed_dim": 32}}'])
    data = argparse.Namespace(num_classes=3, env=argparse.Namespace(device="cpu"))
    with pytest.raises(SystemExit, match="2"):
        setup.build_model(cfg, data, "teacher")
    printed = capsys.readouterr().err
    assert printed.startswith("error: cannot use the pretrained weights of 'test_vit': ")
    assert "size mismatch" in printed and printed.count("\n") == 1


def test_a_server_that_does_not_answer_is_not_waited_for(hub, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(backbone, "CONNECTION_TIMEOUT", 0.05)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: answer.wait())
    with pytest.raises(ValueError, match="no answer in 0.05 seconds"):
        download_pretrained("test_resnet")
    answer.set()


def test_a_server_that_answers_is_asked_for_the_weights(hub, monkeypatch):
    """Even if it answers that this file is not there: timm knows other names."""
    answer = huggingface_hub.errors.HfHubHTTPError.__new__(huggingface_hub.errors.HfHubHTTPError)
    asked = []
    monkeypatch.setattr(timm.models, "load_state_dict_from_hf", lambda *args: asked.append(args))
    for answered in (lambda url: None, lambda url: (_ for _ in ()).throw(answer)):
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answered)
        download_pretrained("test_resnet")
    assert asked == [("timm/test_resnet.r160_in1k", "pytorch_model.bin")] * 2


def test_a_download_that_breaks_off_is_one_line(hub, monkeypatch):
    def break_off(*_):
        raise RuntimeError("peer closed\nconnection")

    monkeypatch.setattr(timm.models, "load_state_dict_from_hf", break_off)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    with pytest.raises(
        ValueError, match=r"weights of 'resnet50' \(RuntimeError: peer closed connection\); do"
    ):
        download_pretrained("resnet50")


def test_cached_weights_need_no_server(hub, cached):
    download_pretrained("test_vit")
    assert not hub


def test_a_backbone_without_pretrained_weights_is_named(monkeypatch):
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: timm.models.PretrainedCfg())
    with pytest.raises(
        ValueError, match="no pretrained weights of 'test_resnet'; train from scratch with --p"
    ):
        download_pretrained("test_resnet")


# ---------------------------------------------------------------------------------------- our own checkpoints


def format_1(make_model, phase="distill", **config):
    """A checkpoint as the former training code wrote it, with every key of its configuration."""
    tiny = make_model()
    paths = dict(root="d", train_json="t.json", val_json="", image_folder="", out="runs/shapes-0.02")
    model = dict(
        hidden_dim=32, encoder_layers=1, encoder_ffn=48, decoder_layers=2, decoder_ffn=64,
        backbone_args=None, pixel_mean=(), pixel_std=(),
    )  # fmt: skip
    renamed = dict(
        unlabelled=["photos"], split="ids.txt", scale=(0.8, 1.25), short_side=(64, 80), colour=True,
        init="a.pkl", clip=1.0, accumulate=2, labels_only=False, max_overlap=0.8, fine_masks=True,
        teacher="t.pt", student="s.pt", refine=50, test_short_side=100, test_long_side=200,
    )  # fmt: skip
    dropped = dict(
        mask_threshold=0.0, pixel_weights=False, score_power=0.0, keep=2, loader_timeout=300.0, warmup=0.05
    )
    kept = dict(data="shapes", preset="shapes", ratio=0.02, crop=(96, 96), lr=1e-3, steps=(500, 700, 900))
    return {
        "format": 1, "phase": phase, "step": 900, "world_size": 2,
        "config": paths | model | renamed | dropped | kept | config,
        "model_args": TINY, "student": tiny.state_dict(), "teacher": make_model(seed=1).state_dict(),
        "optimizer": {"state": {}, "param_groups": []}, "class_names": ["a", "b", "c"],
        "category_ids": [1, 2, 3], "split": "f00d", "ap": {"AP": 44.0},
    }  # fmt: skip


def test_a_checkpoint_of_format_1_is_upgraded(make_model):
    checkpoint = format_1(make_model)
    before = {**checkpoint, "config": dict(checkpoint["config"])}
    upgraded = upgrade_checkpoint(checkpoint)
    assert checkpoint == before, "the argument is not changed"
    assert upgraded.pop("model") is checkpoint["student"] and upgraded["teacher"] is checkpoint["teacher"]
    assert upgraded.pop("format") == 2
    assert upgraded.pop("config") == dict(
        data="shapes", preset="shapes", ratio=0.02, crop=(96, 96), lr=1e-3, steps=(500, 700, 900),
        data_args=dict(root="d", train_json="t.json"), out="runs/shapes-0.02",
        unlabeled=["photos"], labeled_list="ids.txt", lsj_scale=(0.8, 1.25), short_sides=(64, 80),
        color_jitter=True, init_from="a.pkl", clip_grad_norm=1.0, grad_accum_steps=2, supervised_only=False,
        mask_nms_iou=0.8, full_res_masks=True, teacher_checkpoint="t.pt", student_checkpoint="s.pt",
        finetune_steps=50, test_size=(100, 200),
        model_args=dict(hidden_dim=32, encoder_layers=1, encoder_ffn=48, decoder_layers=2, decoder_ffn=64),
    )  # fmt: skip
    others = checkpoint.keys() - {"format", "student", "config"}
    assert upgraded == {name: checkpoint[name] for name in others}


@pytest.mark.parametrize(
    "former, phase",
    [
        ("labels_only", "supervised"),
        ("refine", "finetune"),
        ("teacher", "teacher"),
        ("distill", "distill"),
    ],
)
def test_phases_of_format_1_get_their_new_names(make_model, former, phase):
    assert upgrade_checkpoint(format_1(make_model, former))["phase"] == phase


def test_model_arguments_of_format_1_move_into_one_dictionary(make_model):
    given = dict(pixel_mean=(1.0, 2.0, 3.0), pixel_std=(4.0, 5.0, 6.0), backbone_args={"stem_type": ""})
    config = upgrade_checkpoint(format_1(make_model, **given))["config"]
    assert config["model_args"].items() >= given.items() and not config.keys() & given.keys()
    empty = upgrade_checkpoint(format_1(make_model, backbone_args={}))["config"]
    assert not empty["model_args"].keys() & given.keys() and not empty.keys() & given.keys()


def test_only_format_1_is_upgraded(make_model):
    upgraded = upgrade_checkpoint(format_1(make_model))
    with pytest.raises(ValueError, match="format is 2, not 1"):
        upgrade_checkpoint(upgraded)


def test_our_checkpoints_of_both_formats_are_read_in_format_2(make_model, tmp_path):
    checkpoint = format_1(make_model)
    torch.save(checkpoint, tmp_path / "1.pt")
    torch.save(upgrade_checkpoint(checkpoint), tmp_path / "2.pt")
    for file in ("1.pt", "2.pt"):
        found = load_any_checkpoint(tmp_path / file)
        assert found["format"] == 2 and found["config"]["lsj_scale"] == (0.8, 1.25)
        assert found.keys() == upgrade_checkpoint(checkpoint).keys()
        model = Mask2Former(**found["model_args"])
        model.load_state_dict(found["model"])
        model.load_state_dict(found["teacher"])


# ------------------------------------------------------------------------------------------- starting from it


def test_other_classes_and_queries_are_taken_in_and_said(make_model):
    source, model = make_model(seed=1, num_classes=7, num_queries=4), make_model(seed=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    notes = load_partial(model, source.state_dict())
    assert len(notes) == 2 and "7 classes, the model 3" in notes[0] and "4 queries, the model 6" in notes[1]
    for name, value in model.state_dict().items():
        if "class_head" in name:
            assert torch.equal(value, before[name])
        elif "query_" in name:
            assert torch.equal(value[:4], source.state_dict()[name])
            assert torch.equal(value[4:], before[name][4:])
        else:
            assert torch.equal(value, source.state_dict()[name])


def test_fewer_queries_are_the_first_ones(make_model):
    source, model = make_model(seed=1, num_queries=9), make_model(seed=2)
    assert len(load_partial(model, source.state_dict())) == 1
    name = "decoder.query_features.weight"
    assert torch.equal(model.state_dict()[name], source.state_dict()[name][:6])


def test_the_same_model_is_taken_over_silently(make_model):
    source, model = make_model(seed=1), make_model(seed=2)
    assert load_partial(model, source.state_dict()) == []
    assert all(torch.equal(v, source.state_dict()[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("decoder.norm.weight"), "'decoder.norm.weight' is missing"),
        (lambda s: s.pop("decoder.class_head.bias"), "'decoder.class_head.weight'|'decoder.class_head.bias'"),
        (lambda s: s.update({"decoder.nrm.weight": torch.ones(1)}), "no parameter 'decoder.nrm.weight'"),
        (lambda s: s.update({"decoder.norm.bias": torch.ones(9)}), r"'decoder.norm.bias' is \(9,\)"),
        (
            lambda s: s.update({"decoder.query_features.weight": torch.ones(9, 8)}),
            r"is \(9, 8\), the model's",
        ),
    ],
)
def test_any_other_difference_is_an_error_that_names_it(make_model, change, words):
    state_dict = make_model().state_dict()
    change(state_dict)
    with pytest.raises(ValueError, match=words):
        load_partial(make_model(), state_dict)


def test_a_checkpoint_of_other_code_needs_the_name_of_the_data(pkl):
    path, _ = pkl
    error = run("evaluate.py", path, code=2).stderr
    assert error == f"error: cannot infer the dataset from {path}; pass --data\n"


TRAINED = "--preset shapes --ratio 0.5 --steps 1 --crop 64,64 --num-queries 6 --hidden-dim 32 --batch 2"
TRAINED += " --encoder-ffn 32 --decoder-layers 2 --decoder-ffn 32 --num-points 64 --norm frozen"
TRAINED += " --backbone resnet50 --backbone-args {}"


@pytest.fixture(scope="module")
def pkl(tmp_path_factory):
    """A small model of 7 classes and 9 queries in an official file."""
    torch.manual_seed(0)
    sizes = dict(hidden_dim=32, encoder_layers=1, encoder_ffn=32, decoder_layers=2, decoder_ffn=32)
    model = Mask2Former(7, "resnet50", num_queries=9, **sizes)
    names = translate_state_dict(model.state_dict(), OURS, OFFICIAL)
    path = tmp_path_factory.mktemp("official") / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": {name: value.numpy() for name, value in names.items()}}))
    return path, model


def test_training_starts_from_an_official_file(pkl, shapes, tmp_path):
    """Both fresh models do, and what was not loaded is printed once. A learning rate of 0 changes nothing."""
    path, source = pkl
    flags = ["--data", shapes, *TRAINED.split(), "--init-from", path, "--lr", "0", "--out", tmp_path]
    printed = run("burnin.py", *flags).stdout
    assert printed.count("7 classes, the model 4") == printed.count("9 queries, the model 6") == 1
    for phase in ("teacher", "burnin"):
        found = load_any_checkpoint(tmp_path / f"{phase}.pt")["model"]
        for name, value in source.state_dict().items():
            if "query_" in name:
                assert torch.equal(found[name], value[:6])
            elif "class_head" not in name:
                assert torch.equal(found[name], value), name


def test_an_official_file_can_be_the_teacher_only_with_the_classes_of_the_data(pkl, shapes, tmp_path):
    flags = ["--data", shapes, *TRAINED.split(), "--teacher-checkpoint", pkl[0], "--out", tmp_path]
    error = run("burnin.py", *flags, code=2).stderr
    assert error == "error: the checkpoint has 7 classes, the data has 4\n"


def test_an_official_file_teaches_to_the_end(shapes, tmp_path):
    """All phases run, with the table and the picture at the end."""
    sizes = dict(hidden_dim=32, encoder_layers=1, encoder_ffn=32, decoder_layers=1, decoder_ffn=32)
    model = Mask2Former(4, "resnet50", num_queries=3, **sizes)
    names = translate_state_dict(model.state_dict(), OURS, OFFICIAL)
    path = tmp_path / "teacher.pkl"
    path.write_bytes(pickle.dumps({"model": {name: value.numpy() for name, value in names.items()}}))
    small = TRAINED.replace("resnet50", "resnet10t").replace("frozen", "group").split()
    printed = run(
        "distill.py", "--data", shapes, *small, "--teacher-checkpoint", path, "--out", tmp_path
    ).stdout
    assert "burnt-in" in printed and (tmp_path / "predictions.png").exists()


def test_an_official_file_is_evaluated(pkl, make_dataset, tmp_path, capsys):
    """Like the model itself."""
    path, source = pkl
    rng = np.random.default_rng(0)
    images = {number: rng.integers(0, 256, (64, 64, 3)) for number in range(2)}
    square = [[8, 8, 40, 8, 40, 40, 8, 40]]
    annotations = [
        dict(image_id=i, category_id=1, segmentation=square, area=1024, bbox=[8, 8, 32, 32]) for i in images
    ]
    dataset = make_dataset(images, annotations, category_ids=range(1, 8))
    for split in ("train", "val"):
        (tmp_path / f"instances_{split}.json").write_text((tmp_path / "instances.json").read_text())
    evaluate.main([str(path), "--data", str(tmp_path), "--test-size", "0,0", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert evaluate.ap_table({"student": evaluate.evaluate(source, dataset)}) in printed
    with pytest.raises(SystemExit):
        evaluate.main([str(path)])
    assert "--data" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- export


@pytest.fixture
def without_programs(monkeypatch):
    """Export the weights only. test_export.py tests the programs, which take long to trace."""
    monkeypatch.setattr("tools.export.write_programs", lambda *_: "no programs")


def perturbed(model):
    """Change every value of a model a little, so that no two parameters have the same values."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value += 0.02 * torch.rand_like(value) if "var" in name else 0.02 * torch.randn_like(value)
    return model.eval()


SMALL_SWIN = dict(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), window_size=4)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "which, arguments",
    [
        ("student", dict(backbone="resnet50")),
        ("teacher", dict(backbone="resnet50", norm="batch")),
        ("student", dict(backbone="swin_t", num_queries=7)),
        ("student", dict(backbone="swin_t", backbone_args=SMALL_SWIN, hidden_dim=32)),
    ],
)
@pytest.mark.usefixtures("without_programs")
def test_an_exported_model_is_the_same_in_transformers(tmp_path, which, arguments):
    from transformers import Mask2FormerForUniversalSegmentation

    arguments = dict(num_classes=3, encoder_layers=1, decoder_layers=2, decoder_ffn=64, **arguments)
    torch.manual_seed(0)
    model, other = perturbed(Mask2Former(**arguments)), Mask2Former(**arguments).state_dict()
    checkpoint = {
        "format": 2, "model": other, "teacher": other, "model_args": arguments,
        "class_names": ["a", "b", "c"], {"student": "model"}.get(which, which): model.state_dict(),
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / "distill.pt")
    export.main([str(tmp_path / "distill.pt"), str(tmp_path / "out"), "--which", which])

    exported, report = Mask2FormerForUniversalSegmentation.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report
    assert exported.config.id2label == {0: "a", 1: "b", 2: "c"}
    images = torch.randint(0, 256, (1, 3, 256, 288))
    pixels = (images - model.pixel_mean) / model.pixel_std
    with torch.no_grad():
        found, expected = exported.eval()(pixels), model(images)
    for name, other in (("pred_logits", "class_queries_logits"), ("pred_masks", "masks_queries_logits")):
        scale = expected[name].abs().max()
        torch.testing.assert_close(found[other] / scale, expected[name] / scale, rtol=0, atol=1e-5)

    for file in ("model.safetensors", "official.safetensors"):  # both are read back with the same bits
        again = convert_state_dict(load_file(tmp_path / "out" / file))
        own = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
        assert again.keys() == own.keys() and all(torch.equal(again[n], v) for n, v in own.items())


@pytest.mark.usefixtures("without_programs")
def test_a_teacher_of_another_architecture_is_exported_with_its_own(tmp_path):
    sizes = dict(num_classes=2, hidden_dim=32, encoder_layers=1, decoder_layers=1)
    student, teacher = ({**sizes, "backbone": name} for name in ("resnet50", "resnet101"))
    checkpoint = {
        "format": 2, "model": Mask2Former(**student).state_dict(), "model_args": student,
        "teacher": Mask2Former(**teacher).state_dict(), "teacher_args": teacher,
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / "burnin.pt")
    export.main([str(tmp_path / "burnin.pt"), str(tmp_path / "out"), "--which", "teacher"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["backbone_config"]["backbone"] == "resnet101"


@pytest.mark.usefixtures("without_programs")
def test_the_official_form_read_and_written_again_has_the_same_bytes(tmp_path, official):
    tensors = {
        name: torch.from_numpy(value) for name, value in official.items() if name != "criterion.empty_weight"
    }
    save_file(tensors, tmp_path / "first.safetensors", metadata={"format": "pt"})
    export.main([str(tmp_path / "first.safetensors"), str(tmp_path)])
    found = load_file(tmp_path / "official.safetensors")
    assert found.keys() == tensors.keys()
    assert (tmp_path / "official.safetensors").read_bytes() == (tmp_path / "first.safetensors").read_bytes()


def test_a_missing_teacher_cannot_be_exported(tmp_path, make_model, capsys):
    model = make_model()
    checkpoint = {"format": 2, "model": model.state_dict(), "teacher": None, "model_args": TINY}
    torch.save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(SystemExit):
        export.main([str(tmp_path / "a.pt"), str(tmp_path / "out"), "--which", "teacher"])
    assert "cannot export the teacher" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_that_an_earlier_version_had_are_left_out(tmp_path):
    former = {"mask_quality": 0.5, "scale_to_batch": True, "strong_view": True, "seed": 7}
    cfg = Config(**current_options(former))
    assert (cfg.seed, cfg.strong_view) == (7, "color")
    content = {"options": former | {"crop": [64, 64]}, "choices": {"mask_quality": [0.0, "recipe robust"]}}
    (tmp_path / "settings.json").write_text(json.dumps(content))
    settings = read_settings(tmp_path)
    assert settings["choices"] == {}
    expected = {"strong_view": "color", "seed": 7, "crop": (64, 64), "data_args": {}}
    assert settings["options"] == expected
    for pretrained, file, now in ((True, "", "true"), (False, "", "false"), (False, "a.pth", "a.pth")):
        assert current_options({"pretrained": pretrained, "backbone_weights": file})["pretrained"] == now
