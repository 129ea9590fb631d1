"""Exported programs beside the model that they were made of, on real images: labels, scores and masks.

    python bench/export.py photos/ --images 5

Each model has random weights, all a little off their initial values so that no part of it is idle, and sees
the images at several sizes, none of which was traced. Compared are the detections that have a mask, each with
the nearest of the same label whose score is the same to 1e-5: the order of equal scores is not defined."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from burnin import PRESETS  # noqa: E402
from data import image_files, read_image, test_size, to_tensor  # noqa: E402
from evaluate import instances  # noqa: E402
from model import Mask2Former  # noqa: E402
from tools.export import write_programs  # noqa: E402

SMALL = dict(hidden_dim=64, encoder_layers=2, encoder_ffn=128, decoder_layers=3, decoder_ffn=128)
SHAPES = "backbone backbone_args norm num_queries hidden_dim encoder_layers encoder_ffn decoder_layers"
SHAPES = {name: PRESETS["shapes"][name] for name in [*SHAPES.split(), "decoder_ffn"]}
MODELS = {  # arguments, and shorter and longer sides of the images
    "ResNet-50, all of it": (dict(backbone="resnet50"), [(100, 200), (480, 640), (800, 1333)]),
    "preset shapes": (SHAPES, [(96, 128), (480, 640)]),
    "swin_t": (dict(backbone="swin_t", **SMALL), [(230, 460), (512, 704)]),
    "mobilenetv2_100": (
        dict(backbone="mobilenetv2_100", backbone_args={"pad_type": "same"}, **SMALL),
        [(96, 128), (480, 640)],
    ),
    "deit_tiny_patch16_224": (dict(backbone="deit_tiny_patch16_224", **SMALL), [(96, 128), (480, 640)]),
}


@torch.no_grad()
def off_the_start(model: Mask2Former) -> Mask2Former:
    for parameter in model.parameters():
        parameter += 0.1 * parameter.std(correction=0).clamp(min=0.02) * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def compare(model: Mask2Former, files: list, sizes: list, folder: Path) -> list:
    """Cells of the table's row."""
    started = time.time()
    write_programs(model, folder, sizes[-1])
    seconds = time.time() - started
    eager = torch.export.load(folder / "model.pt2").module()
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    found = lost = pixels = 0
    scores, masks = [0.0, 0.0], [0, 0]
    for short, long in sizes:
        for file in files:
            image = read_image(file)
            image = image.resize(test_size(image.height, image.width, short, long)[::-1], Image.BILINEAR)
            image = to_tensor(image)[None]
            expected = instances(model(image), [image.shape[2:]])[0]
            number = int(expected["masks"].any(dim=(1, 2)).sum())
            found, pixels = found + number, pixels + expected["masks"][:number].numel()
            programs = eager(image), map(torch.from_numpy, session.run(None, {"image": image.numpy()}))
            for index, (score, label, mask) in enumerate(programs):
                scores[index] = max(scores[index], float((score - expected["scores"]).abs().max()))
                for n in range(number):
                    label_n, score_n, mask_n = (expected[x][n] for x in ("labels", "scores", "masks"))
                    alike = ((score - score_n).abs() < 1e-5) & (label == label_n)
                    places = sorted(alike.nonzero()[:, 0].tolist(), key=lambda place: abs(place - n))
                    best = None
                    for place in places:  # the same place first, which nearly always is it
                        differing = int((mask[place] != mask_n).sum())
                        best = differing if best is None else min(best, differing)
                        if best < 1e-3 * mask_n.numel():
                            break
                    lost, masks[index] = lost + (best is None), masks[index] + (best or 0)
    share = " / ".join(f"{1e6 * number / pixels:.2g}" for number in masks)
    return [found, lost, " / ".join(f"{score:.0e}" for score in scores), share, f"{seconds:.0f}"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    flags = parser.parse_args()
    files = image_files(flags.folder)[: flags.images]
    print(
        "| model | shorter sides | detections | of which a program lacks | largest difference of a score, "
        "model.pt2 / .onnx | mask pixels that differ, in a million | seconds to write both |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in flags.models:
        args, sizes = MODELS[name]
        torch.manual_seed(0)
        model = off_the_start(Mask2Former(num_classes=80, **args))
        with tempfile.TemporaryDirectory() as folder:
            cells = compare(model, files, sizes, Path(folder))
        print(
            f"| {name} |",
            " | ".join(map(str, [", ".join(str(s) for s, _ in sizes), *cells])),
            "|",
            flush=True,
        )


if __name__ == "__main__":
    main()
