"""Checkpoint files of other code: the official Mask2Former's, Guided Distillation's, Hugging Face's.

    python distill.py --data my_dataset --init model_final_3c8ec9.pkl    # start from published weights
    python evaluate.py model_final_3c8ec9.pkl --data coco                # their AP

Which kind a file is shows in its contents. Nothing in a file is ever executed."""

import pickle
import re

import numpy as np
import safetensors.torch
import torch

from checkpoints import check_archive
from model import Mask2Former, convert_state_dict


def read_weights(path) -> dict:
    """A checkpoint file of any known kind -> {"student": state dictionary of `Mask2Former`, "teacher":
    another or None, "model_args": what `Mask2Former` takes to have these parameters}. One of ours is returned
    as it is, with all that it holds besides. Raises ValueError for any other file.

    Kinds: ours; the official Mask2Former's (.pkl of numpy arrays, .pth, or these names in .safetensors);
    Guided Distillation's (.pth with modelTeacher. and modelStudent.); Hugging Face's (.safetensors, .bin)."""
    content = _read(path)
    if "student" in content and "model_args" in content:
        return content
    state_dict = content.get("model", content)
    if not isinstance(state_dict, dict) or not all(isinstance(v, torch.Tensor) for v in state_dict.values()):
        raise ValueError(f"{path} holds no state dictionary")
    teacher = _below(state_dict, "modelTeacher.")
    try:
        student = convert_state_dict(_below(state_dict, "modelStudent.") or state_dict)
        teacher = convert_state_dict(teacher) if teacher else None
        return {"student": student, "teacher": teacher, "model_args": model_args(student)}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _below(state_dict: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): v for name, v in state_dict.items() if name.startswith(prefix)}


def model_args(state_dict: dict) -> dict:
    """The arguments with which `Mask2Former` has these parameters. Raises ValueError for a backbone that has
    no official checkpoint."""
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


def initialise(model: Mask2Former, state_dict: dict) -> list[str]:
    """Loads a state dictionary into a model that may have other classes (the class head then stays as it is)
    or another number of queries (the first ones are taken). Returns a line for each of the two.

    Raises ValueError for any other difference, naming it."""
    own, state_dict, notes = model.state_dict(), dict(state_dict), []
    head, queries = "decoder.class_head.bias", "decoder.query_features.weight"
    known, needed = len(state_dict.get(head, own[head])) - 1, len(own[head]) - 1
    if known != needed:
        notes.append(f"it knows {known} classes, the data has {needed}: the class head starts afresh")
        state_dict |= {name: own[name] for name in (head, "decoder.class_head.weight")}
    known, needed = len(state_dict.get(queries, own[queries])), len(own[queries])
    if known != needed:
        notes.append(f"it has {known} queries, the model {needed}: the first {min(known, needed)} are taken")
        for name in {queries, "decoder.query_positions.weight"} & state_dict.keys():
            if state_dict[name].shape[1:] == own[name].shape[1:]:
                state_dict[name] = torch.cat([state_dict[name][:needed], own[name][known:]])
    for name, value in own.items():
        if name.endswith("num_batches_tracked"):  # a counter that most files leave out
            state_dict.setdefault(name, value)
        elif name not in state_dict:
            raise ValueError(f"the parameter {name!r} is missing")
        elif state_dict[name].shape != value.shape:
            found = tuple(state_dict[name].shape)
            raise ValueError(f"the parameter {name!r} is {found}, the model's {tuple(value.shape)}")
    unknown = state_dict.keys() - own.keys()
    if unknown:
        raise ValueError(f"the model has no parameter {min(unknown)!r}")
    model.load_state_dict(state_dict)
    return notes


# ---------------------------------------------------------------------------------------------------- files


TORCH_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # of torch.save before its zip format


def _read(path) -> dict:
    """What a file holds: a dictionary of tensors, or of such dictionaries and plain values."""
    try:
        with open(path, "rb") as file:
            first = file.read(16)
            file.seek(0)
            if first[8:9] == b"{":  # behind the length of a header in JSON
                content = safetensors.torch.load_file(path)
            elif first[:2] == b"PK" or TORCH_MAGIC in first:
                if first[:2] == b"PK":
                    check_archive(path)
                content = torch.load(file, map_location="cpu", weights_only=True)
            else:
                content = _tensors(_ArraysOnly(file, encoding="latin1").load())
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise pickle.UnpicklingError("it holds no dictionary with names")
        return content
    except FileNotFoundError:
        raise ValueError(f"no checkpoint {str(path)!r}") from None
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} was refused: {str(error).splitlines()[0]}") from None
    except Exception as error:  # each reader raises many kinds for a damaged file
        raise ValueError(f"{path} is not a checkpoint, or is damaged: {type(error).__name__}") from None


def _tensors(content):
    """Arrays in nested dictionaries -> tensors."""
    if isinstance(content, dict):
        return {name: _tensors(value) for name, value in content.items()}
    return torch.from_numpy(content.value) if isinstance(content, _Array) else content


class _Dtype:
    """Stands for numpy.dtype in a pickle."""

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
    """Stands for numpy.ndarray: none of numpy's own code for pickles runs, which trusts what it reads."""

    def __init__(self, *_):
        self.value = None

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data, dtype: _Dtype, shape, order):
        data = data.encode("latin1") if isinstance(data, str) else data  # as Python 2 wrote bytes
        native = dtype.numpy().newbyteorder("=")
        self.value = np.frombuffer(data, dtype.numpy()).reshape(shape, order=order).astype(native, order="C")
        return self


class _ArraysOnly(pickle._Unpickler):  # the one in C takes memory for whatever index a file names
    """Reads dictionaries, lists, numbers, strings and numpy arrays. Every other name is refused before
    anything is called."""

    def find_class(self, module, name):
        admitted = {
            "numpy.ndarray": _Array,
            "numpy.dtype": _Dtype,
            "numpy.core.multiarray._reconstruct": _Array,
            "numpy.core.numeric._frombuffer": lambda *state: _Array().fill(*state),
            "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes in pickles of protocol 2
            "collections.OrderedDict": dict,
        }
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if full not in admitted:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, only numpy arrays are read")
        return admitted[full]
