"""A checkpoint's model in the forms of other code: a folder for Hugging Face's transformers, and a file with
the official Mask2Former's names.

    python evaluate.py runs/coco-0.01/distill.pt --export my_model
    Mask2FormerForUniversalSegmentation.from_pretrained("my_model")"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from evaluate import load_model
from model import BACKBONES, HUGGING_FACE, OFFICIAL, OURS, Mask2Former, translate_state_dict


def export(checkpoint: dict, which: str, folder: Path) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors for transformers, and
    official.safetensors. which: "student" or "teacher".

    Raises ValueError for a backbone other than ResNet-50 and -101 with batch norms, or Swin."""
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
    written = {
        "config.json": hugging_face_config(model, args, names),
        "preprocessor_config.json": preprocessor_config(model, *sizes),
    }
    state_dict = model.state_dict()
    theirs = translate_state_dict(state_dict, OURS, HUGGING_FACE)
    theirs |= unused(theirs, model.backbone.channels[-1])
    theirs["criterion.empty_weight"] = torch.tensor(
        [1.0] * len(names) + [config.get("no_object_weight", 0.1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    for name, tensors in (
        ("model.safetensors", theirs),
        ("official.safetensors", translate_state_dict(state_dict, OURS, OFFICIAL)),
    ):
        tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    print(f"{which} -> {folder}: {', '.join([*written, 'model.safetensors', 'official.safetensors'])}")


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
        raise ValueError(f"--export knows resnet50, resnet101 (with batch norms) and swin, not {name}")
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
