"""Matching and losses, forward and backward, of ours beside Hugging Face's Mask2Former on the same outputs
and targets, in turn in one process. Both begin at query embeddings and mask features, laid out in memory as
their models do it; theirs makes the masks of all queries of these, ours those that it needs.

    python bench/criterion.py                      # 512 x 512, 2 images, 7 objects each
    python bench/criterion.py --objects 100
    python bench/criterion.py --device cuda --size 1024 --batch 8

It prints medians in seconds and their ratio."""

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from sides import CLASSES, make_batch, mark, seconds_between, where

import engine
from burnin import to_device
from matcher import SetCriterion
from model import fast_convolutions


def hugging_face(num_points):
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    config = Mask2FormerConfig(num_labels=CLASSES, train_num_points=num_points)
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    criterion = Mask2FormerLoss(config, weights)

    def loss(outputs, targets):
        masks, labels = [t["masks"].float() for t in targets], [t["labels"] for t in targets]
        aux = [
            {"class_queries_logits": a["pred_logits"], "masks_queries_logits": a["pred_masks"]}
            for a in outputs["aux_outputs"]
        ]
        losses = criterion(outputs["pred_masks"], outputs["pred_logits"], masks, labels, aux)
        return sum(
            value * next(w for key, w in weights.items() if key in name) for name, value in losses.items()
        )

    return loss


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--objects", type=int, default=7)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--points", type=int, default=12544)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    device = engine.start_processes(flags.device, "fp32")  # memory is kept on a CPU, for both
    targets = to_device(make_batch(flags.size, flags.batch, flags.objects)[1], device)
    torch.set_default_device(device)
    torch.manual_seed(0)
    side, C = flags.size // 4, 256
    their_features = (torch.randn(flags.batch, C, side, side) / C**0.5).requires_grad_()
    features = their_features.detach().clone()
    if device.type == "cuda" or fast_convolutions(features):
        features = features.contiguous(memory_format=torch.channels_last)
    features.requires_grad_()
    predictions = [
        {
            "pred_logits": torch.randn(flags.batch, flags.queries, CLASSES + 1).requires_grad_(),
            "mask_embed": (3 * torch.randn(flags.batch, flags.queries, C)).requires_grad_(),
            "mask_features": features,
        }
        for _ in range(10)
    ]
    inputs = [p[name] for p in predictions for name in ("pred_logits", "mask_embed")]
    criterion = SetCriterion(CLASSES, num_points=flags.points).to(device)
    peer = hugging_face(flags.points)

    def ours():
        return sum(criterion({**predictions[-1], "aux_outputs": predictions[:-1]}, targets).values())

    def theirs():
        made = [
            {
                "pred_logits": p["pred_logits"],
                "pred_masks": torch.einsum("bqc,bchw->bqhw", p["mask_embed"], their_features),
            }
            for p in predictions
        ]
        return peer({**made[-1], "aux_outputs": made[:-1]}, targets)

    sides = {"ours": (ours, features), "theirs": (theirs, their_features)}
    seconds = {name: [] for name in sides}
    for _ in range(flags.rounds + 1):
        for name, (loss, maps) in sides.items():
            start = mark(device)
            value = loss()
            middle = mark(device)
            torch.autograd.grad(value, [maps, *inputs])
            end = mark(device)
            seconds[name].append((seconds_between(start, middle), seconds_between(middle, end)))
    print(f"{flags.batch} images of {flags.size} x {flags.size}, {flags.objects} objects each")
    print(f"{flags.queries} queries, {flags.points} points, 10 predictions")
    print(f"{where(flags)}, torch {torch.__version__}\n")
    print(f"{'seconds':10}{'forward':>10}{'backward':>10}{'both':>10}")
    rows = {}
    for name, values in seconds.items():
        values = values[1:]  # the first warms up
        rows[name] = [statistics.median(v) for v in (*zip(*values), [sum(v) for v in values])]
        print(f"{name:10}" + "".join(f"{value:10.3f}" for value in rows[name]))
    print(f"{'ratio':10}" + "".join(f"{a / b:10.2f}" for a, b in zip(rows["ours"], rows["theirs"])))


if __name__ == "__main__":
    main()
