"""Export a checkpoint's model: as programs that run without this repository, and as weights for other code.

    python -m tools.export runs/coco-0.01/distill.pt my_model
    python -m tools.export runs/coco-0.01/distill.pt my_model --which teacher

It writes to my_model/:

- model.pt2, a program of torch.export;
- model.onnx, if onnx and onnxscript are installed;
- for ResNet-50 and ResNet-101 with batch norms, and for Swin: config.json, preprocessor_config.json and
  model.safetensors for Hugging Face's transformers, and official.safetensors in the names of the official
  Mask2Former.

    image = torch.from_numpy(np.array(Image.open("photo.jpg").convert("RGB"))).permute(2, 0, 1)[None]
    detector = torch.export.load("my_model/model.pt2").module()
    scores, labels, masks = detector(image)
    session = onnxruntime.InferenceSession("my_model/model.onnx")
    scores, labels, masks = session.run(None, {"image": image.numpy()})
    model = Mask2FormerForUniversalSegmentation.from_pretrained("my_model")

The programs do not resize the image. To get the results of evaluate.py, resize it before, to
data.shortest_edge_size(H, W, *test_size) with the test_size of the training run.

Letters in shapes: Q queries, K classes, N = min(100, Q * K) detections, H W pixels of the image, h w = a
quarter of the padded image's."""

if __name__ == "__main__":
    from training.cli import answer_early

    answer_early()

import json
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import Conv2dSame
from torch import Tensor, nn

from interop.load import load_any_checkpoint
from interop.names import HUGGING_FACE, OFFICIAL, OURS, translate_state_dict
from model import BACKBONES, Mask2Former, SwinBlockPadFirst, resize
from training.checkpoint import load_model
from training.cli import Parser, expected_errors

MAX_SIDE = 4096  # of an image that a program accepts, pixels


def main(argv=None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", help="ours, the official Mask2Former's, or Hugging Face's")
    parser.add_argument("folder", help="folder to write to")
    which = dict(choices=("student", "teacher"), default="student")
    parser.add_argument("--which", **which, help="model to export [student]")
    flags = parser.parse_args(argv)
    with expected_errors():
        export(load_any_checkpoint(flags.checkpoint), flags.which, Path(flags.folder))


def export(checkpoint: dict, which: str, folder: Path) -> None:
    """Write the programs and weights of a checkpoint's model to a folder, and print what was written and
    what was left out.

    Args:
        checkpoint: as `load_any_checkpoint` returns it.
        which: "student", the model that the phase trained, or "teacher".

    Raises ValueError if the checkpoint has no such model, or torch is too old."""
    key = "model" if which == "student" else which
    if checkpoint[key] is None:
        raise ValueError(f"cannot export the {which}: the checkpoint has only one model; use --which student")
    model = load_model(checkpoint, "cpu", key)
    model_args = checkpoint["model_args"]
    if which == "teacher":  # In guided burn-in it may have another architecture than the student.
        model_args = checkpoint.get("teacher_args") or model_args
    config = checkpoint.get("config", {})
    test_size = config.get("test_size") or (800, 1333)
    K = model.decoder.class_head.out_features - 1
    class_names = checkpoint.get("class_names") or [f"class {k}" for k in range(K)]
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{which} -> {folder}: {write_programs(model, folder, test_size)}")
    try:
        configs = {
            "config.json": hugging_face_config(model, model_args, class_names),
            "preprocessor_config.json": preprocessor_config(model, *test_size),
        }
        official = translate_state_dict(model.state_dict(), OURS, OFFICIAL)
        hugging_face = translate_state_dict(model.state_dict(), OURS, HUGGING_FACE)
    except ValueError as error:
        print(f"{which} -> {folder}: no weights for other code; {error}")
        return
    hugging_face |= unused_entries(hugging_face, model.backbone.channels[-1])
    class_weights = [1.0] * K + [config.get("no_object_weight", 0.1)]
    hugging_face["criterion.empty_weight"] = torch.tensor(class_weights)
    for name, content in configs.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    weights = {"model.safetensors": hugging_face, "official.safetensors": official}
    for name, tensors in weights.items():
        tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    print(f"{which} -> {folder}: {', '.join([*configs, *weights])}")


# -------------------------------------------------------------------------------------------------- programs


class Detector(nn.Module):
    """Find the instances of one image, like `evaluate.instances`, in operations whose shapes follow from
    the shape of the image alone.

    image: (1, 3, H, W) RGB uint8. Returns, best first, scores (N,) in [0, 1], labels (N,) int64 and masks
    (N, H, W) bool. Detections with equal scores, such as all those with an empty mask, have no defined
    order."""

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
        for mask_logits in outputs["pred_masks"].split(8, dim=1):  # in chunks, because full masks are large
            h, w = mask_logits.shape[-2:]
            mask_logits = resize(mask_logits, (4 * h, 4 * w))[0]
            # Pad by a negative amount instead of slicing. torch.export would specialize a slice to images
            # with padding, or to images without.
            mask_logits = F.pad(mask_logits, (0, W - 4 * w, 0, H - 4 * h))
            masks.append(mask_logits > 0)
            inside = (mask_logits.sigmoid() * masks[-1]).sum((1, 2))
            mask_scores.append(inside / (masks[-1].sum((1, 2)) + 1e-6))
        masks, mask_scores = torch.cat(masks), torch.cat(mask_scores)  # (Q, H, W), (Q,)
        scores, order = (scores * mask_scores[best // K]).sort(descending=True)
        return scores, best[order] % K, masks[best[order] // K]


def write_programs(model: Mask2Former, folder: Path, test_size: tuple[int, int]) -> str:
    """Write model.pt2 and model.onnx, the `Detector` of a model in fp32. Returns a description of them.

    test_size: shorter and longer side in pixels of the only images that the programs accept if the
    backbone's code cannot be traced for images of any size. Raises ValueError if torch is too old."""
    if torch.__version__ < (2, 9):
        raise ValueError(f"cannot export: it needs torch >= 2.9, found {torch.__version__}; install it")
    program, accepted = trace(Detector(model), test_size)
    torch.export.save(program, folder / "model.pt2")
    if not (find_spec("onnx") and find_spec("onnxscript")):
        return f"model.pt2 for {accepted}; model.onnx needs: pip install onnx onnxscript"
    names = {"input_names": ["image"], "output_names": ["scores", "labels", "masks"]}
    torch.onnx.export(program, **names, verbose=False, optimize=False).save(folder / "model.onnx")
    return f"model.pt2 and model.onnx for {accepted}"


class ConvSamePadding(Conv2dSame):
    """timm's convolution with TensorFlow's padding, for feature maps whose sides the stride divides.

    That is always so behind images that are padded to multiples of 32. Then the padding follows from the
    kernel alone. Deriving it from the sizes took torch.export more than ten minutes for MobileNetV2."""

    def forward(self, x: Tensor) -> Tensor:
        padding = []
        for size, stride, dilation in zip(self.weight.shape[:1:-1], self.stride[::-1], self.dilation[::-1]):
            total = max(0, dilation * (size - 1) + 1 - stride)
            padding += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, padding), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


@torch.no_grad()
def trace(detector: Detector, test_size: tuple[int, int]) -> tuple[torch.export.ExportedProgram, str]:
    """Trace a detector for images of any size, or of test_size if that fails.

    Returns the program and a description of the images that it accepts. In the detector, convolutions with
    TensorFlow's padding become ConvSamePadding."""
    for module in detector.modules():
        if type(module) is Conv2dSame:
            module.__class__ = ConvSamePadding
    # A side has more than one pixel, or more than one window, at stride 32: torch traces sides of length 1
    # as another program.
    blocks = [module for module in detector.modules() if isinstance(module, SwinBlockPadFirst)]
    min_side = 32 * max((side for block in blocks for side in block.window_size), default=1) + 1
    image = torch.zeros(1, 3, min_side + 32, min_side + 96, dtype=torch.uint8)
    H, W = (torch.export.Dim(name, min=min_side, max=MAX_SIDE) for name in "HW")
    # Conditions that torch cannot prove are checked when the program runs.
    kwargs = dict(dynamic_shapes=({2: H, 3: W},), prefer_deferred_runtime_asserts_over_guards=True)
    try:
        program = torch.export.export(detector, (image,), **kwargs)
        return program, f"images of {min_side} to {MAX_SIDE} pixels a side"
    except Exception:  # Code of timm that needs sizes as numbers raises many kinds of errors.
        H, W = test_size[0] or 800, test_size[1] or 1333
        program = torch.export.export(detector, (torch.zeros(1, 3, H, W, dtype=torch.uint8),))
        return program, f"images of {H} x {W} pixels only, because the backbone cannot be traced for others"


# --------------------------------------------------------------------------------------------------- weights


def unused_entries(hugging_face: dict, channels: int) -> dict:
    """Return the entries that transformers expects and does not use: the counters of batch norms, and the
    last norm of a Swin with `channels` channels."""
    counters = [
        name.replace("running_var", "num_batches_tracked") for name in hugging_face if "running_var" in name
    ]
    if counters:
        return {name: torch.tensor(0) for name in counters}
    norm = "model.pixel_level_module.encoder.swin.layernorm"
    return {f"{norm}.weight": torch.ones(channels), f"{norm}.bias": torch.zeros(channels)}


def hugging_face_config(model: Mask2Former, model_args: dict, class_names: list[str]) -> dict:
    """Return the content of config.json, the fields of transformers' Mask2FormerConfig. Raises ValueError
    for a backbone that transformers lacks."""
    encoder, decoder = model.pixel_decoder, model.decoder
    hidden_dim = decoder.norm.normalized_shape[0]
    return {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "backbone_config": backbone_config(model, model_args),
        "feature_size": hidden_dim,
        "mask_feature_size": hidden_dim,
        "hidden_dim": hidden_dim,
        "num_attention_heads": encoder.layers[0].self_attn.num_heads,
        "encoder_layers": len(encoder.layers),
        "encoder_feedforward_dim": encoder.layers[0].ffn[0].out_features,
        "decoder_layers": len(decoder.layers) + 1,  # transformers counts the prediction before the first
        "dim_feedforward": decoder.layers[0].ffn[0].out_features,
        "num_queries": decoder.query_features.num_embeddings,
        "dropout": 0.0,
        "id2label": {str(label): name for label, name in enumerate(class_names)},
        "label2id": {name: label for label, name in enumerate(class_names)},
        "torch_dtype": "float32",
    }


def backbone_config(model: Mask2Former, model_args: dict) -> dict:
    body = model.backbone.body
    name = BACKBONES.get(model_args["backbone"], model_args["backbone"]).split(".")[0]
    if hasattr(body, "layers_0"):
        stages = [getattr(body, f"layers_{stage}").blocks for stage in range(4)]
        return {
            "model_type": "swin",
            "embed_dim": model.backbone.channels[0],
            "depths": [len(blocks) for blocks in stages],
            "num_heads": [blocks[0].attn.num_heads for blocks in stages],
            "window_size": stages[0][0].attn.window_size[0],
            "out_features": [f"stage{stage}" for stage in range(1, 5)],
        }
    if name in ("resnet50", "resnet101") and model_args.get("norm") != "group":
        return {
            "model_type": "timm_backbone",
            "backbone": name,
            "out_indices": [1, 2, 3, 4],
            "use_pretrained_backbone": False,
        }
    norms = " with group norms" if model_args.get("norm") == "group" else ""
    kinds = "resnet50 or resnet101 with batch norms, or with swin"
    raise ValueError(f"transformers has Mask2Former with {kinds}, not with {name}{norms}")


def preprocessor_config(model: Mask2Former, short_side: int, long_side: int) -> dict:
    """Return the content of preprocessor_config.json, the fields of transformers'
    Mask2FormerImageProcessor."""
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


if __name__ == "__main__":
    main()
