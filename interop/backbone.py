"""Pretrained weights of backbones: download timm's, and read files of timm, torchvision, Detectron and
Detectron2, DINO, MoCo.

    weights = load_backbone_weights("R-50.pkl", "resnet50")
    model = Mask2Former(num_classes=80, backbone="resnet50", backbone_weights=weights)

Nothing in a file is executed."""

import contextlib
import inspect
import io
import re
import threading

import huggingface_hub  # comes with timm
import timm
import torch

from interop.load import ENTRIES, find_state_dict, read_checkpoint
from interop.names import OFFICIAL, OURS, translate_state_dict
from model import BACKBONES

CONNECTION_TIMEOUT = 8.0  # seconds within which a server for pretrained weights must answer

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
_HEADS = "head", "fc", "classifier", "mask_token"  # what pretraining needs beside the backbone
_CAFFE2_LAYERS = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}


def download_pretrained(backbone: str) -> None:
    """Download timm's pretrained weights of a backbone, unless they are in the local cache.

    Raises ValueError in one line for a download that fails. If there is no network, it is raised within ten
    seconds; huggingface_hub alone would retry for minutes."""
    config = timm.get_pretrained_cfg(BACKBONES.get(backbone, backbone))
    scratch = "train from scratch with --pretrained false"
    if config is None or not (config.hf_hub_id or config.url):
        raise ValueError(f"timm has no pretrained weights of {backbone!r}; {scratch}")
    repo, _, revision = (config.hf_hub_id or "").partition("@")
    file = config.hf_hub_filename or "model.safetensors"
    page = f"{file} from {huggingface_hub.constants.ENDPOINT}/{repo}" if repo else config.url
    names = (file, config.hf_hub_filename or "pytorch_model.bin")  # timm looks for them in this order
    try:
        if not repo:
            torch.hub.load_state_dict_from_url(config.url, map_location="cpu", weights_only=True)
        elif not any(_is_cached(repo, name, revision or None) for name in names):
            _check_connection(huggingface_hub.hf_hub_url(repo, file, revision=revision or None))
            timm.models.load_state_dict_from_hf(config.hf_hub_id, names[1])
    except Exception as error:  # The clients for downloads raise errors of many kinds.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise ValueError(
            f"cannot download the pretrained weights of {backbone!r} ({reason}); download {page} elsewhere "
            f"and pass it as --pretrained, or {scratch}"
        ) from None


def _is_cached(repo: str, file: str, revision: str | None) -> bool:
    return isinstance(huggingface_hub.try_to_load_from_cache(repo, file, revision=revision), str)


def _check_connection(url: str) -> None:
    """Raise the error of a connection that gets no answer in time. An answer may be an error."""
    errors = [TimeoutError(f"no answer in {CONNECTION_TIMEOUT:g} seconds")]

    def connect():
        try:
            huggingface_hub.get_hf_file_metadata(url)
            errors.clear()
        except huggingface_hub.errors.HfHubHTTPError:
            errors.clear()
        except Exception as error:
            errors[:] = [error]

    thread = threading.Thread(target=connect, daemon=True)  # No timeout of a client bounds a DNS lookup.
    thread.start()
    thread.join(CONNECTION_TIMEOUT)
    for error in errors:
        raise error


def load_backbone_weights(path, backbone: str, backbone_args: dict | None = None) -> dict:
    """Read a file of pretrained weights, as Mask2Former's backbone_weights takes them.

    backbone, backbone_args: those of the `Mask2Former`, which decide what timm converts.

    Prefixes of trainers are removed, and Detectron's and Detectron2's ResNets get timm's names. Where these
    expect BGR and a standard deviation of 1 (Detectron's R-50.pkl of MSRA, Detectron2's model zoo), the first
    convolution is converted to RGB and ImageNet's deviation. MSRA's have the stride in the first 1 x 1
    convolution of a block, timm's in the 3 x 3 convolution: their features are close, not the same.

    Names and sizes of the backbone's authors are converted if timm can do it, such as those of DINOv2.

    Returns a state dict with timm's names. Raises ValueError for a file that is damaged, refused or something
    else; whether the tensors are those of the backbone is checked by `Mask2Former`."""
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
        return _from_authors(state_dict, backbone, backbone_args or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _from_authors(state_dict: dict, backbone: str, backbone_args: dict) -> dict:
    """Convert weights as timm does when it downloads those of a backbone's authors, and drop other heads."""
    with torch.device("meta"):
        model = timm.create_model(BACKBONES.get(backbone, backbone), **backbone_args)
    convert = getattr(inspect.getmodule(type(model)), "checkpoint_filter_fn", None)
    if convert:
        # If this fails, Mask2Former tells which tensor does not fit.
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            state_dict = convert(dict(state_dict), model)
    known = model.state_dict().keys()
    return {name: v for name, v in state_dict.items() if name in known or not name.startswith(_HEADS)}


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
