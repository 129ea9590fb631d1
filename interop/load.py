"""Read checkpoint files: ours, the official Mask2Former's, Guided Distillation's, Hugging Face's.

    checkpoint = load_any_checkpoint("model_final_3c8ec9.pkl")
    model = Mask2Former(**checkpoint["model_args"])
    model.load_state_dict(checkpoint["model"])

The kind of a file is found from its contents. Nothing in a file is executed."""

import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from interop.legacy import move_data_args, upgrade_checkpoint
from interop.names import convert_state_dict
from model import Mask2Former


def load_any_checkpoint(path) -> dict:
    """Read a checkpoint file of any known kind, to the CPU.

    Kinds: ours, of format 2 or 1; the official Mask2Former's (.pkl of numpy arrays, .pth, or the same names
    in .safetensors); Guided Distillation's (.pth with modelTeacher. and modelStudent.); Hugging Face's
    (.safetensors, .bin).

    Returns {"model": state dict of `Mask2Former`, "teacher": another one or None, "model_args": the arguments
    of `Mask2Former` that fit "model"}. A checkpoint of ours is returned in format 2 with all its entries.
    Raises ValueError for any other file."""
    content = _read_file(path)
    if content.get("format") == 1:
        content = upgrade_checkpoint(content)
    if content.get("format") == 2 and "model" in content and "model_args" in content:
        return {**content, "config": move_data_args(content.get("config") or {})}
    state_dict = content.get("model", content)
    if not isinstance(state_dict, dict) or not all(isinstance(v, torch.Tensor) for v in state_dict.values()):
        raise ValueError(f"{path} holds no state dict")
    teacher = _with_prefix(state_dict, "modelTeacher.")
    try:
        student = convert_state_dict(_with_prefix(state_dict, "modelStudent.") or state_dict)
        teacher = convert_state_dict(teacher) if teacher else None
        return {"model": student, "teacher": teacher, "model_args": infer_model_args(student)}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _with_prefix(state_dict: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): v for name, v in state_dict.items() if name.startswith(prefix)}


def infer_model_args(state_dict: dict) -> dict:
    """Infer the arguments of `Mask2Former` from the shapes of its parameters.

    Raises ValueError if a parameter is missing, or the backbone is not one that has official checkpoints."""
    shapes = {name: tuple(value.shape) for name, value in state_dict.items()}

    def count(pattern):
        return len({match[0] for match in (re.match(pattern, name) for name in shapes) if match})

    try:
        if "backbone.body.conv1.weight" in shapes:
            backbone = {6: "resnet50", 23: "resnet101"}[count(r"backbone\.body\.layer3\.\d+")]
        else:
            kind = shapes["backbone.body.patch_embed.proj.weight"][0], count(r".*layers_2\.blocks\.\d+")
            backbone = {(96, 6): "swin_t", (96, 18): "swin_s", (128, 18): "swin_b", (192, 18): "swin_l"}[kind]
    except KeyError:
        raise ValueError(
            "its backbone is none of resnet50, resnet101, swin_t, swin_s, swin_b, swin_l"
        ) from None
    missing = {"decoder.query_features.weight", "decoder.class_head.weight"} - shapes.keys()
    missing |= {f"{part}.layers.0.ffn.0.weight" for part in ("pixel_decoder", "decoder")} - shapes.keys()
    if missing:
        raise ValueError(f"the parameter {min(missing)!r} is missing")
    num_queries, hidden_dim = shapes["decoder.query_features.weight"]
    return {
        "num_classes": shapes["decoder.class_head.weight"][0] - 1,
        "backbone": backbone,
        "num_queries": num_queries,
        "hidden_dim": hidden_dim,
        "encoder_layers": count(r"pixel_decoder\.layers\.\d+"),
        "encoder_ffn": shapes["pixel_decoder.layers.0.ffn.0.weight"][0],
        "decoder_layers": count(r"decoder\.layers\.\d+"),
        "decoder_ffn": shapes["decoder.layers.0.ffn.0.weight"][0],
    }


def load_partial(model: Mask2Former, state_dict: dict) -> list[str]:
    """Load a state dict into a model that may have other classes or another number of queries.

    With another number of classes the class head of the model is left unchanged. With another number of
    queries the first ones are loaded. Returns one line about each of these two that applies.
    Raises ValueError for any other difference and names it."""
    target, source, notes = model.state_dict(), dict(state_dict), []
    head, queries = "decoder.class_head.bias", "decoder.query_features.weight"
    found, needed = len(source.get(head, target[head])) - 1, len(target[head]) - 1
    if found != needed:
        notes.append(f"the checkpoint has {found} classes, the model {needed}: the class head is not loaded")
        source |= {name: target[name] for name in (head, "decoder.class_head.weight")}
    found, needed = len(source.get(queries, target[queries])), len(target[queries])
    if found != needed:
        notes.append(
            f"the checkpoint has {found} queries, the model {needed}: the first {min(found, needed)} are "
            "loaded"
        )
        for name in {queries, "decoder.query_positions.weight"} & source.keys():
            if source[name].shape[1:] == target[name].shape[1:]:
                source[name] = torch.cat([source[name][:needed], target[name][found:]])
    for name, value in target.items():
        if name.endswith("num_batches_tracked"):  # Most files leave this counter out.
            source.setdefault(name, value)
        elif name not in source:
            raise ValueError(f"the parameter {name!r} is missing")
        elif source[name].shape != value.shape:
            shape = tuple(source[name].shape)
            raise ValueError(f"the parameter {name!r} is {shape}, the model's {tuple(value.shape)}")
    unexpected = source.keys() - target.keys()
    if unexpected:
        raise ValueError(f"the model has no parameter {min(unexpected)!r}")
    model.load_state_dict(source)
    return notes


# ---------------------------------------------------------------------------------------------------- files

# The first bytes of files that torch.save wrote before PyTorch 1.6.
TORCH_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
UNSAFE_TORCH = (
    "torch before 2.10 has a hole through which a checkpoint of somebody else may execute code "
    "(CVE-2026-24747); open only files that you trust, or install torch 2.10"
)


def _read_file(path) -> dict:
    """Read a dictionary of tensors, or of such dictionaries and plain values.

    Raises ValueError for a file that is missing, damaged, refused or something else."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
            file.seek(0)
            if start[8:9] == b"{":  # safetensors: the length of a JSON header, then the header
                content = safetensors.torch.load_file(path)
            elif start[:2] == b"PK" or TORCH_MAGIC in start:
                if start[:2] == b"PK":
                    check_archive(path)
                if torch.__version__ < (2, 10) and not Path(path).with_name("metrics.jsonl").exists():
                    warnings.warn(UNSAFE_TORCH, stacklevel=3)  # only a run's own folder has the log
                content = torch.load(file, map_location="cpu", weights_only=True)
            else:
                content = _to_tensors(_ArrayUnpickler(file, encoding="latin1").load())
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise pickle.UnpicklingError("it holds no dictionary with names")
        return content
    except FileNotFoundError:
        raise ValueError(f"no checkpoint {str(path)!r}") from None
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} was refused: {str(error).splitlines()[0]}") from None
    except Exception as error:  # Each reader raises many kinds of errors for a damaged file.
        raise ValueError(f"{path} is not a checkpoint, or is damaged: {type(error).__name__}") from None


def check_archive(path) -> None:
    """Check a file of torch.save before torch reads it.

    Raises zipfile.BadZipFile for a wrong checksum, which torch does not verify, and for compressed entries,
    which could unpack to more than the memory holds."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
            raise zipfile.BadZipFile("compressed")
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(damaged)


def _to_tensors(content):
    """Convert arrays in nested dictionaries to tensors."""
    if isinstance(content, dict):
        return {name: _to_tensors(value) for name, value in content.items()}
    return torch.from_numpy(content.value) if isinstance(content, _Array) else content


class _Dtype:
    """Take the place of numpy.dtype in a pickle."""

    def __init__(self, code, *_):
        self.code, self.order = code, "="

    def __setstate__(self, state):
        self.order = state[1]

    def numpy(self) -> np.dtype:
        dtype = np.dtype(self.code).newbyteorder(self.order)
        if dtype.kind not in "fiub":
            raise pickle.UnpicklingError(f"an array of {dtype}, not of numbers")
        return dtype


class _Array:
    """Take the place of numpy.ndarray in a pickle, because numpy's unpickling code trusts what it reads."""

    def __init__(self, *_):
        self.value = None

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data, dtype: _Dtype, shape, order):
        data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote bytes as text.
        native = dtype.numpy().newbyteorder("=")
        self.value = np.frombuffer(data, dtype.numpy()).reshape(shape, order=order).astype(native, order="C")
        return self


class _ArrayUnpickler(pickle._Unpickler):  # The C version allocates memory for any index that a file names.
    """Read dictionaries, lists, numbers, strings and numpy arrays. Refuse every other name before a call."""

    def find_class(self, module, name):
        allowed = {
            "numpy.ndarray": _Array,
            "numpy.dtype": _Dtype,
            "numpy.core.multiarray._reconstruct": _Array,
            "numpy.core.numeric._frombuffer": lambda *state: _Array().fill(*state),
            "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes in pickles of protocol 2
            "collections.OrderedDict": dict,
        }
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if full not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, only numpy arrays are read")
        return allowed[full]
