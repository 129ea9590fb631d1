"""A checkpoint's model for other code: programs that run without this repository, one of torch.export and one
of ONNX, and files of weights, a folder for Hugging Face's transformers and the official Mask2Former's names.

    python evaluate.py runs/coco-0.01/distill.pt --export my_model

    image = torch.from_numpy(np.array(Image.open("photo.jpg").convert("RGB"))).permute(2, 0, 1)[None]
    detect = torch.export.load("my_model/model.pt2").module()
    scores, labels, masks = detect(image)
    session = onnxruntime.InferenceSession("my_model/model.onnx")
    scores, labels, masks = session.run(None, {"image": image.numpy()})

    Mask2FormerForUniversalSegmentation.from_pretrained("my_model")

The programs keep the image's size: resize it before, as `data.test_size` says. model.onnx is written where
onnx and onnxscript are installed.

Letters in shapes: Q queries, K classes, N = min(100, Q * K) detections, H W pixels of the image, h w = a
quarter of the padded image's."""

import json
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import Conv2dSame
from torch import Tensor, nn

from evaluate import load_model
from model import (
    BACKBONES,
    HUGGING_FACE,
    OFFICIAL,
    OURS,
    Mask2Former,
    PadThenShiftBlock,
    resize,
    translate_state_dict,
)

LARGEST_SIDE = 4096  # of an image that a program takes, pixels


def export(checkpoint: dict, which: str, folder: Path) -> None:
    """Writes model.pt2, and if it can be model.onnx; for ResNet-50 and -101 with batch norms, and for Swin,
    also config.json, preprocessor_config.json and model.safetensors for transformers, and in the official
    names official.safetensors. Says what it has written and why something is left out. which: "student" or
    "teacher".

    Raises ValueError if the checkpoint has no such model."""
    if checkpoint[which] is None:
        raise ValueError(f"the checkpoint has no {which}")
    model = load_model(checkpoint, which, "cpu")
    args = checkpoint["model_args"]
    if which == "teacher":  # which may be another model
        args = checkpoint.get("teacher_args") or args
    config = checkpoint.get("config", {})
    sizes = config.get("test_short_side", 800), config.get("test_long_side", 1333)
    names = checkpoint.get("class_names") or [
        f"class {k}" for k in range(model.decoder.class_head.out_features - 1)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{which} -> {folder}: {write_programs(model, folder, sizes)}")
    try:
        written = {
            "config.json": hugging_face_config(model, args, names),
            "preprocessor_config.json": preprocessor_config(model, *sizes),
        }
        official, theirs = (
            translate_state_dict(model.state_dict(), OURS, column) for column in (OFFICIAL, HUGGING_FACE)
        )
    except ValueError as error:
        print(f"{which} -> {folder}: no files for transformers, {error}")
        return
    theirs |= unused(theirs, model.backbone.channels[-1])
    theirs["criterion.empty_weight"] = torch.tensor(
        [1.0] * len(names) + [config.get("no_object_weight", 0.1)]
    )
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    for name, tensors in (("model.safetensors", theirs), ("official.safetensors", official)):
        tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    print(f"{which} -> {folder}: {', '.join([*written, 'model.safetensors', 'official.safetensors'])}")


# -------------------------------------------------------------------------------------------------- programs


class Detector(nn.Module):
    """One image in, `evaluate.instances` out, in operations whose shapes follow from the image's alone.

    image: (1, 3, H, W) RGB uint8. Returns, best first, scores (N,) in [0, 1], labels (N,) int64 and masks
    (N, H, W) bool. The order of detections with one score, as all with an empty mask have, is not defined."""

    def __init__(self, model: Mask2Former, top_k: int = 100):
        super().__init__()
        self.model, self.top_k = model, top_k

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        H, W = image.shape[-2:]
        outputs = self.model(image)
        probabilities = outputs["pred_logits"][0].softmax(-1)[:, :-1]  # (Q, K)
        K = probabilities.shape[1]
        scores, best = probabilities.flatten().topk(min(self.top_k, probabilities.numel()))
        masks, mask_scores = [], []
        for mask_logits in outputs["pred_masks"].split(8, dim=1):  # few at a time: they are large
            h, w = mask_logits.shape[-2:]
            mask_logits = resize(mask_logits, (4 * h, 4 * w))[0]
            # A slice would ask whether it leaves anything out, and so end in programs for one of the cases.
            mask_logits = F.pad(mask_logits, (0, W - 4 * w, 0, H - 4 * h))
            masks.append(mask_logits > 0)
            inside = (mask_logits.sigmoid() * masks[-1]).sum((1, 2))
            mask_scores.append(inside / (masks[-1].sum((1, 2)) + 1e-6))
        masks, mask_scores = torch.cat(masks), torch.cat(mask_scores)  # (Q, H, W), (Q,)
        scores, order = (scores * mask_scores[best // K]).sort(descending=True)
        return scores, best[order] % K, masks[best[order] // K]


def write_programs(model: Mask2Former, folder: Path, test_sizes: tuple[int, int]) -> str:
    """Writes model.pt2 and model.onnx of a model's `Detector`, in fp32; returns what is to be said of them.
    test_sizes: shorter and longer side, pixels, of the only images they take where the backbone's code cannot
    be traced for others."""
    program, takes = trace(Detector(model), test_sizes)
    torch.export.save(program, folder / "model.pt2")
    if not (find_spec("onnx") and find_spec("onnxscript")):
        return f"model.pt2 for {takes}; model.onnx needs onnx and onnxscript"
    program = program.run_decompositions({torch.ops.aten.embedding_bag.padding_idx: embedding_bag})
    names = {"input_names": ["image"], "output_names": ["scores", "labels", "masks"]}
    torch.onnx.export(program, **names, verbose=False, optimize=False).save(folder / "model.onnx")
    return f"model.pt2 and model.onnx for {takes}"


class EvenConv2d(Conv2dSame):
    """timm's convolution with TensorFlow's padding, of a feature map whose sides its stride divides, as it
    always does behind images padded to multiples of 32: then the padding follows from the kernel alone, and
    a program for any size need not find it (for MobileNetV2 torch.export took more than ten minutes)."""

    def forward(self, x: Tensor) -> Tensor:
        padding = []
        for size, stride, dilation in zip(self.weight.shape[:1:-1], self.stride[::-1], self.dilation[::-1]):
            total = max(0, dilation * (size - 1) + 1 - stride)
            padding += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, padding), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


@torch.no_grad()
def trace(detector: Detector, test_sizes: tuple[int, int]) -> tuple[torch.export.ExportedProgram, str]:
    """The program and, in words, the images that it takes. The detector's convolutions with TensorFlow's
    padding become EvenConv2d."""
    for module in detector.modules():
        if type(module) is Conv2dSame:
            module.__class__ = EvenConv2d
    # More than one pixel or window at stride 32: torch has another program for sides of length 1.
    blocks = [module for module in detector.modules() if isinstance(module, PadThenShiftBlock)]
    least = 32 * max((side for block in blocks for side in block.window_size), default=1) + 1
    image = torch.zeros(1, 3, least + 32, least + 96, dtype=torch.uint8)
    H, W = (torch.export.Dim(name, min=least, max=LARGEST_SIDE) for name in "HW")
    how = {"prefer_deferred_runtime_asserts_over_guards": True}  # for what holds but torch cannot prove
    try:
        program = torch.export.export(detector, (image,), dynamic_shapes=({2: H, 3: W},), **how)
        return program, f"images of {least} to {LARGEST_SIDE} pixels a side"
    except Exception:  # code of timm that needs its sizes as numbers ends in many kinds of errors
        short, long = test_sizes[0] or 800, test_sizes[1] or 1333
        program = torch.export.export(detector, (torch.zeros(1, 3, short, long, dtype=torch.uint8),))
        return program, f"images of {short} x {long} pixels alone, as the backbone has no form for any size"


def embedding_bag(weight, indices, offsets, _freq, _mode, _sparse, per_sample_weights, *_):
    """torch's, as model.py uses it, the sum of bags of one size: ONNX has none. Its last three results, which
    nothing uses, are anything."""
    rows = weight.index_select(0, indices) * per_sample_weights[:, None]
    return rows.unflatten(0, (offsets.shape[0], -1)).sum(1), offsets, offsets, offsets


# --------------------------------------------------------------------------------------------------- weights


def unused(theirs: dict, channels: int) -> dict:
    """What their model holds besides and would miss: counters of batch norms, Swin's last norm."""
    counters = [
        name.replace("running_var", "num_batches_tracked") for name in theirs if "running_var" in name
    ]
    result = {name: torch.tensor(0) for name in counters}
    if not counters:
        norm = "model.pixel_level_module.encoder.swin.layernorm"
        result |= {f"{norm}.weight": torch.ones(channels), f"{norm}.bias": torch.zeros(channels)}
    return result


def hugging_face_config(model: Mask2Former, model_args: dict, class_names: list[str]) -> dict:
    """The fields of transformers' Mask2FormerConfig."""
    encoder, decoder, body = model.pixel_decoder, model.decoder, model.backbone.body
    hidden_dim = decoder.norm.normalized_shape[0]
    name = BACKBONES.get(model_args["backbone"], model_args["backbone"]).split(".")[0]
    if hasattr(body, "layers_0"):
        stages = [getattr(body, f"layers_{stage}").blocks for stage in range(4)]
        backbone = {
            "model_type": "swin",
            "embed_dim": model.backbone.channels[0],
            "depths": [len(blocks) for blocks in stages],
            "num_heads": [blocks[0].attn.num_heads for blocks in stages],
            "window_size": stages[0][0].attn.window_size[0],
            "out_features": [f"stage{stage}" for stage in range(1, 5)],
        }
    elif name in ("resnet50", "resnet101") and model_args.get("norm") != "group":
        backbone = {
            "model_type": "timm_backbone",
            "backbone": name,
            "out_indices": [1, 2, 3, 4],
            "use_pretrained_backbone": False,
        }
    else:
        norms = " with group norms" if model_args.get("norm") == "group" else ""
        raise ValueError(
            f"which are made of resnet50 and resnet101 with batch norms, and swin, not {name}{norms}"
        )
    return {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "backbone_config": backbone,
        "feature_size": hidden_dim,
        "mask_feature_size": hidden_dim,
        "hidden_dim": hidden_dim,
        "num_attention_heads": encoder.layers[0].self_attn.sizes[0],
        "encoder_layers": len(encoder.layers),
        "encoder_feedforward_dim": encoder.layers[0].ffn[0].out_features,
        "decoder_layers": len(decoder.layers) + 1,  # theirs counts the prediction before the first
        "dim_feedforward": decoder.layers[0].ffn[0].out_features,
        "num_queries": decoder.query_features.num_embeddings,
        "dropout": 0.0,
        "id2label": {str(number): name for number, name in enumerate(class_names)},
        "label2id": {name: number for number, name in enumerate(class_names)},
        "torch_dtype": "float32",
    }


def preprocessor_config(model: Mask2Former, short_side: int, long_side: int) -> dict:
    """The fields of transformers' Mask2FormerImageProcessor."""
    size = {"shortest_edge": short_side, "longest_edge": long_side or 10 * short_side}
    return {
        "image_processor_type": "Mask2FormerImageProcessor",
        "do_resize": bool(short_side),
        **({"size": size} if short_side else {}),
        "size_divisor": 32,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in model.pixel_mean.flatten().tolist()],
        "image_std": [value / 255 for value in model.pixel_std.flatten().tolist()],
        "ignore_index": 255,
    }
