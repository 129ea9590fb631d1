"""Exported programs compared with the model that they were exported from, on real images: labels, scores and
masks.

    python benchmarks/export.py photos/ --images 5

Each model has random weights, moved a little from their initial values so that every part has an effect. It
sees the images at several sizes, none of which was traced. The comparison is over the detections that have a
mask. Each is compared with the nearest one of the same label whose score is the same to 1e-5, because the
order of equal scores is not defined."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import read_image, shortest_edge_size, to_tensor
from evaluate import instances
from layouts.images import list_image_files
from model import Mask2Former
from tools.export import write_programs
from training.config import PRESETS

SMALL = dict(hidden_dim=64, encoder_layers=2, encoder_ffn=128, decoder_layers=3, decoder_ffn=128)
SHAPES = {name: PRESETS["shapes"][name] for name in ("backbone", "norm", "num_queries")}
MODELS = {  # Arguments of Mask2Former, and the (shorter side, limit of the longer side) of the images.
    "ResNet-50, full size": (dict(backbone="resnet50"), [(100, 200), (480, 640), (800, 1333)]),
    "preset shapes": (SHAPES | PRESETS["shapes"]["model_args"], [(96, 128), (480, 640)]),
    "swin_t": (dict(backbone="swin_t", **SMALL), [(230, 460), (512, 704)]),
    "mobilenetv2_100": (
        dict(backbone="mobilenetv2_100", backbone_args={"pad_type": "same"}, **SMALL),
        [(96, 128), (480, 640)],
    ),
    "deit_tiny_patch16_224": (dict(backbone="deit_tiny_patch16_224", **SMALL), [(96, 128), (480, 640)]),
}


@torch.no_grad()
def perturb(model: Mask2Former) -> Mask2Former:
    """Move all parameters a little from their initial values."""
    for parameter in model.parameters():
        parameter += 0.1 * parameter.std(correction=0).clamp(min=0.02) * torch.randn_like(parameter)
    return model.eval()


def fewest_different_pixels(expected: dict, number: int, program: tuple) -> int | None:
    """Compare the mask of an expected detection with those of a program that have the same label and the same
    score to 1e-5. Returns the number of pixels by which the nearest one differs, or None without any."""
    label, score, mask = (expected[name][number] for name in ("labels", "scores", "masks"))
    scores, labels, masks = program
    places = (((scores - score).abs() < 1e-5) & (labels == label)).nonzero()[:, 0].tolist()
    fewest = None
    for place in sorted(
        places, key=lambda place: abs(place - number)
    ):  # It nearly always has the same place.
        different = int((masks[place] != mask).sum())
        fewest = different if fewest is None else min(fewest, different)
        if fewest < 1e-3 * mask.numel():
            break
    return fewest


@torch.no_grad()
def compare(model: Mask2Former, files: list, sizes: list, folder: Path) -> list:
    """Export a model to a folder, and return the cells of its row in the table."""
    started = time.time()
    write_programs(model, folder, sizes[-1])
    seconds = time.time() - started
    exported = torch.export.load(folder / "model.pt2").module()
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    num_detections = num_missing = num_pixels = 0
    score_errors, different_pixels = [0.0, 0.0], [0, 0]  # of model.pt2 and model.onnx
    for sides in sizes:
        for file in files:
            image = read_image(file)
            height, width = shortest_edge_size(image.height, image.width, *sides)
            image = to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))[None]
            expected = instances(model(image), [image.shape[2:]])[0]
            with_mask = int(expected["masks"].any(dim=(1, 2)).sum())
            num_detections += with_mask
            num_pixels += expected["masks"][:with_mask].numel()
            onnx_outputs = map(torch.from_numpy, session.run(None, {"image": image.numpy()}))
            for index, program in enumerate((exported(image), tuple(onnx_outputs))):
                error = float((program[0] - expected["scores"]).abs().max())
                score_errors[index] = max(score_errors[index], error)
                for number in range(with_mask):
                    different = fewest_different_pixels(expected, number, program)
                    num_missing += different is None
                    different_pixels[index] += different or 0
    pixels = " / ".join(f"{1e6 * number / num_pixels:.2g}" for number in different_pixels)
    errors = " / ".join(f"{error:.0e}" for error in score_errors)
    return [num_detections, num_missing, errors, pixels, f"{seconds:.0f}"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    flags = parser.parse_args()
    files = list_image_files(flags.folder)[: flags.images]
    columns = ["model", "shorter sides", "detections", "missing in a program"]
    columns += ["largest difference of a score, model.pt2 / .onnx"]
    columns += ["different mask pixels per million, model.pt2 / .onnx", "seconds to write both"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for name in flags.models:
        args, sizes = MODELS[name]
        torch.manual_seed(0)
        model = perturb(Mask2Former(num_classes=80, **args))
        with tempfile.TemporaryDirectory() as folder:
            cells = compare(model, files, sizes, Path(folder))
        shorter_sides = ", ".join(str(short) for short, _ in sizes)
        print(f"| {name} | {shorter_sides} | {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
