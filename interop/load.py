"""Read checkpoints: ours, the official Mask2Former's, Guided Distillation's, Hugging Face's, and those that
Lightning and other trainers make of them.

    checkpoint = load_any_checkpoint("model_final_3c8ec9.pkl")
    model = Mask2Former(**checkpoint["model_args"])
    model.load_state_dict(checkpoint["model"])

The kind of a file is found from its contents. Nothing in a file is executed."""

import json
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from interop.legacy import current_options, upgrade_checkpoint
from interop.names import convert_state_dict
from model import Mask2Former


def load_any_checkpoint(path) -> dict:
    """Read a checkpoint of any known kind, to the CPU.

    Kinds: ours, of format 2 or 1; the official Mask2Former's (.pkl of numpy arrays, .pth, or the same names
    in .safetensors); Guided Distillation's (.pth with modelTeacher. and modelStudent.); Hugging Face's
    (.safetensors, .bin, sharded). The latter three may be an entry such as "state_dict" and have prefixes
    such as "module." or Lightning's "model."; EMA weights are preferred, and a line is printed.

    path: a file, the folder of a run (its last result is read), or a folder of Hugging Face's.
    Returns {"model": state dict of `Mask2Former`, "teacher": another one or None, "model_args": the arguments
    of `Mask2Former` that fit "model"}. A checkpoint of ours is returned in format 2 with all its entries.
    Raises ValueError for anything else."""
    content = read_checkpoint(path)
    if content.get("format") == 1:
        content = upgrade_checkpoint(content)
    if content.get("format") == 2 and "model" in content and "model_args" in content:
        return {**content, "config": current_options(content.get("config") or {})}
    try:
        state_dict, entry = find_state_dict(content)
        models = _split_models(state_dict)
        prefix = _choose_model(models)
        for name in (entry, prefix):
            if _is_ema(name):
                print_note(f"{path}: the EMA weights are used, those in {name.rstrip('.')[:100]!r}")
        teacher = (
            models.get(re.sub(r"modelStudent\.$", "modelTeacher.", prefix)) if "Student" in prefix else None
        )
        student = convert_state_dict(models[prefix])
        teacher = convert_state_dict(teacher) if teacher else None
        return {"model": student, "teacher": teacher, "model_args": infer_model_args(student)}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# Entries of other trainers' checkpoints that hold weights, the preferred ones first.
ENTRIES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema")
ENTRIES += ("model", "state_dict", "model_state_dict", "module", "net", "network", "weights")


def find_state_dict(content: dict, entries=ENTRIES) -> tuple[dict, str]:
    """Find the state dict in the content of a checkpoint, and the entry that it is from, such as "model" or
    "ema.module". Raises ValueError if there is none."""
    path = []
    for _ in range(4):
        if content and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()):
            return content, ".".join(path)
        path += [entry for entry in entries if isinstance(content.get(entry), dict)][:1] or [None]
        if path[-1] is None:
            break
        content = content[path[-1]]
    raise ValueError("it holds no state dict")


def _split_models(state_dict: dict) -> dict[str, dict]:
    """Return {prefix: state dict without it} for each Mask2Former in a state dict. Names without any of the
    prefixes belong to something else, such as a metric. Raises ValueError for more than four."""
    state_dict = {name.replace("_orig_mod.", ""): value for name, value in state_dict.items()}
    if any(re.search(r"(^|\.)(panoptic|bbox|decode)_head\.", name) for name in state_dict):
        raise ValueError(OPENMMLAB)
    head = re.compile(r"((?:\w+\.)*?)(sem_seg_head|model\.pixel_level_module)\.")
    prefixes = sorted({match[1] for match in map(head.match, state_dict) if match}) or [""]
    if len(prefixes) > 4:
        raise ValueError(f"it holds {len(prefixes)} models")
    models = {prefix: {} for prefix in prefixes}
    for name, value in state_dict.items():
        prefix = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
        if prefix is not None:
            models[prefix][name.removeprefix(prefix)] = value
    return models


def _choose_model(models: dict[str, dict]) -> str:
    """Choose a prefix of _split_models: the only one, EMA weights, or Guided Distillation's student."""
    for is_preferred in (
        _is_ema,
        lambda prefix: prefix.endswith("modelStudent."),
        lambda _: len(models) == 1,
    ):
        chosen = sorted(filter(is_preferred, models))
        if chosen:
            return chosen[0]
    names = ", ".join(repr(prefix) for prefix in sorted(models))
    raise ValueError(
        f"it holds {len(models)} models, with the prefixes {names[:200]}; save one of them alone"
    )


def _is_ema(name: str) -> bool:
    return "ema" in re.split(r"[._]", name.lower())


def print_note(text: str) -> None:
    """Print a line, on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


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
RESULTS = (
    "finetune.pt",
    "distill.pt",
    "burnin.pt",
    "teacher.pt",
    "supervised.pt",
)  # of a run, last phase first
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pkl")  # of Hugging Face
OPENMMLAB = (
    "it is a checkpoint of MMDetection or another OpenMMLab project, whose parameters are others; use one of "
    "the official Mask2Former or of Hugging Face"
)


def read_checkpoint(path) -> dict:
    """Read a file as `read_file` does, or the checkpoint in the folder of a run or of Hugging Face."""
    path = Path(path)
    if path.is_dir():
        indices = [f"{name}.index.json" for name in WEIGHTS]
        found = next(
            (path / name for name in (*RESULTS, *WEIGHTS, *indices) if (path / name).is_file()), None
        )
        if found is None:
            names = ", ".join((*RESULTS, *WEIGHTS))
            raise ValueError(
                f"the folder {str(path)!r} has no checkpoint: none of {names}, nor an index of shards"
            )
        print_note(f"{path}: reading {found.name}")
        path = found
    if path.name.endswith(".index.json"):
        return {name: value for shard in _find_shards(path) for name, value in read_file(shard).items()}
    return read_file(path)


def _find_shards(index: Path) -> list[Path]:
    """Return the files that an index names. Raises ValueError for one that is not in the index's folder."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        shards = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        raise ValueError(f"{index} is not an index of shards: it has no 'weight_map'") from None
    for name, shard in zip(names, shards):
        if Path(name).name != name or shard.resolve().parent != index.parent.resolve():
            raise ValueError(f"{index} was refused: the shard {name[:100]!r} is outside of its folder")
    return shards


def read_file(path) -> dict:
    """Read a dictionary of tensors, or of such dictionaries and plain values.

    Raises ValueError for a file that is missing, damaged, refused or something else."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
            file.seek(0)
            if start[8:9] == b"{":  # safetensors: the length of a JSON header, then the header
                content = safetensors.torch.load_file(path)
            elif start[:2] == b"PK" or TORCH_MAGIC in start[:16]:
                if start[:2] == b"PK":
                    check_archive(path)
                if torch.__version__ < (2, 10) and not Path(path).with_name("metrics.jsonl").exists():
                    warnings.warn(UNSAFE_TORCH, stacklevel=3)  # only a run's own folder has the log
                content = torch.load(file, map_location="cpu", weights_only=True)
            elif start.lstrip()[:1] == b"<":
                raise pickle.UnpicklingError("it is a web page; download the file that the page links to")
            elif start.startswith(b"version https://git-lfs"):
                raise pickle.UnpicklingError("it is a pointer of Git LFS; run git lfs pull")
            else:
                content = _to_tensors(_ArrayUnpickler(file, encoding="latin1").load())
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise pickle.UnpicklingError("it holds no dictionary with names")
        return content
    except FileNotFoundError:
        raise ValueError(f"no checkpoint {str(path)!r}{_hub_hint(path)}") from None
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} was refused: {_explain_refusal(str(error))}") from None
    except Exception as error:  # Each reader raises many kinds of errors for a damaged file.
        raise ValueError(f"{path} is not a checkpoint, or is damaged: {type(error).__name__}") from None


def _hub_hint(path) -> str:
    """Explain how to download a model if a path without a file looks like a name of the Hugging Face hub."""
    path = Path(path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) or path.parent.exists() or path.suffix:
        return ""
    return (
        f"; if it is a model of the Hugging Face hub, run hf download {path} --local-dir {path.name} and "
        f"pass the folder {path.name}"
    )


def _explain_refusal(text: str) -> str:
    """Shorten torch's text on an object that is no tensor and no plain value to its type and a remedy."""
    refused = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", text)
    if not refused:
        return text.splitlines()[0]
    if refused[1].startswith(("mmengine.", "mmcv.", "mmdet.")):
        return OPENMMLAB
    return (
        f"it holds an object of the type {refused[1][:100]!r}, and only tensors and plain values are read; "
        "if you trust the file, save its weights alone: "
        'torch.save(torch.load(FILE, weights_only=False)["state_dict"], NEW_FILE)'
    )


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
