"""Read pretrained weights of backbones: files of timm, torchvision, Detectron and Detectron2, DINO, MoCo.

    weights = load_backbone_weights("R-50.pkl")
    model = Mask2Former(num_classes=80, backbone="resnet50", backbone_weights=weights)

Nothing in a file is executed."""

import re

import torch

from interop.load import ENTRIES, find_state_dict, read_checkpoint
from interop.names import OFFICIAL, OURS, translate_state_dict

# What trainers put in front of a backbone's names. Of MoCo's two networks this order chooses the query
# encoder, as its authors do. "body." is ours.
_PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "base_encoder.",
    "encoder_q.",
    "backbone.",
    "bottom_up.",
    "encoder.",
    "body.",
)
_STD = 57.375, 57.12, 58.395  # of ImageNet's blue, green, red in 0..255, which our models divide by
_CAFFE2_LAYERS = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}


def load_backbone_weights(path) -> dict:
    """Read a file of pretrained weights, as Mask2Former's backbone_weights takes them.

    Prefixes of trainers are removed, and Detectron's and Detectron2's ResNets get timm's names. Where these
    expect BGR and a standard deviation of 1 (Detectron's R-50.pkl of MSRA, Detectron2's model zoo), the first
    convolution is converted to RGB and ImageNet's deviation. MSRA's have the stride in the first 1 x 1
    convolution of a block, timm's in the 3 x 3 convolution: their features are close, not the same.

    Returns a state dict with the names of timm, or of the authors where timm converts them.
    Raises ValueError for a file that is damaged, refused or something else."""
    content = read_checkpoint(path)
    try:
        is_caffe2 = isinstance(content.get("blobs"), dict) or "conv1_w" in content
        state_dict, _ = find_state_dict(content, (*ENTRIES, "blobs", "teacher", "student"))
        state_dict = _strip_prefixes(state_dict)
        if is_caffe2 or "conv1_w" in state_dict:
            is_caffe2, state_dict = True, _from_caffe2(state_dict)
        if "stem.conv1.weight" in state_dict:
            is_bgr = is_caffe2 or content.get("__author__") in ("Caffe2", "Detectron2 Model Zoo")
            return _from_detectron2(state_dict, is_bgr)
        return state_dict
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _strip_prefixes(state_dict: dict) -> dict:
    """Keep the names behind a prefix of _PREFIXES without it, until none is left."""
    while True:
        names = list(state_dict)
        prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in names)), None)
        if prefix is None:
            return state_dict
        state_dict = {n.removeprefix(prefix): v for n, v in state_dict.items() if n.startswith(prefix)}


def _from_caffe2(blobs: dict) -> dict:
    """Rename Detectron's blobs as Detectron2 does: res2_0_branch2a_bn_s -> res2.0.conv1.norm.weight."""
    result = {}
    for name, value in blobs.items():
        block = re.fullmatch(r"res(\d)_(\d+)_(branch1|branch2[abc])(_bn)?_(w|s|b)", name)
        if block:
            stage, number, branch, norm, kind = block.groups()
            layer = f"res{stage}.{number}.{_CAFFE2_LAYERS[branch]}"
        elif name in ("conv1_w", "res_conv1_bn_s", "res_conv1_bn_b"):
            layer, norm, kind = "stem.conv1", name != "conv1_w", name[-1]
        else:
            continue  # The classifier, and momentum of the optimizer.
        result[layer + ".norm" * bool(norm) + (".bias" if kind == "b" else ".weight")] = value
    return result


def _from_detectron2(state_dict: dict, is_bgr: bool) -> dict:
    """Convert a ResNet of Detectron2 to timm's names."""
    result = {name: v for name, v in state_dict.items() if re.match(r"stem\.conv1\.|res\d\.", name)}
    for name in [name for name in result if name.endswith(".norm.weight")]:
        stem, zeros = name.removesuffix("weight"), torch.zeros_like(result[name])
        result.setdefault(stem + "running_mean", zeros)
        result.setdefault(stem + "running_var", zeros + 1 - 1e-5)  # 1 together with the norm's epsilon
    conv = result["stem.conv1.weight"]
    if is_bgr and conv.ndim == 4 and conv.shape[1] == 3:
        result["stem.conv1.weight"] = (conv * conv.new_tensor(_STD).view(3, 1, 1)).flip(1)
    result = translate_state_dict({f"backbone.{name}": v for name, v in result.items()}, OFFICIAL, OURS)
    return {name.removeprefix("backbone.body."): value for name, value in result.items()}
