"""Matching and losses, forward and backward: ours and Hugging Face's, on the same predictions and targets, in
turn in one process. Both start from mask embeddings and mask features, in the memory layout of their models.
Hugging Face's computes the masks of all queries from these, ours those that it needs.

    python benchmarks/criterion.py                     # 2 images of 512 x 512, 7 objects each
    python benchmarks/criterion.py --objects 100
    python benchmarks/criterion.py --device cuda --size 1024 --batch 8

It prints median seconds and their ratio."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (
    NUM_CLASSES,
    describe_machine,
    make_batch,
    make_parser,
    medians,
    now,
    print_table,
    ratios,
    seconds_between,
)

from matcher import SetCriterion
from model import prefers_channels_last
from training.distributed import init_distributed, to_device


def make_peer(num_points: int):
    """Return Hugging Face's matching and losses as a function of our outputs and targets."""
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    config = Mask2FormerConfig(num_labels=NUM_CLASSES, train_num_points=num_points)
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


def make_predictions(flags, channels=256, num_predictions=10):
    """Make the factors of random predictions. Returns (predictions, mask features for the peer)."""
    side, queries = flags.size // 4, (flags.batch, flags.queries)
    peer_features = (torch.randn(flags.batch, channels, side, side) / channels**0.5).requires_grad_()
    features = peer_features.detach().clone()
    if features.is_cuda or prefers_channels_last(features):
        features = features.contiguous(memory_format=torch.channels_last)
    features.requires_grad_()
    predictions = [
        {
            "pred_logits": torch.randn(*queries, NUM_CLASSES + 1).requires_grad_(),
            "mask_embed": (3 * torch.randn(*queries, channels)).requires_grad_(),
            "mask_features": features,
        }
        for _ in range(num_predictions)
    ]
    return predictions, peer_features


def main():
    numbers = dict(size=512, batch=2, objects=7, queries=100, points=12544, rounds=9, threads=2)
    flags = make_parser(__doc__, **numbers).parse_args()
    torch.set_num_threads(flags.threads)
    env = init_distributed(flags.device, "fp32")  # On a CPU, both sides keep freed memory.
    targets = to_device(make_batch(flags.size, flags.batch, flags.objects)[1], env)
    torch.set_default_device(env.device)
    torch.manual_seed(0)
    predictions, peer_features = make_predictions(flags)
    criterion = SetCriterion(NUM_CLASSES, num_points=flags.points).to(env.device)
    peer = make_peer(flags.points)

    def ours():
        return sum(criterion({**predictions[-1], "aux_outputs": predictions[:-1]}, targets).values())

    def hugging_face():
        with_masks = [
            {
                "pred_logits": p["pred_logits"],
                "pred_masks": torch.einsum("bqc,bchw->bqhw", p["mask_embed"], peer_features),
            }
            for p in predictions
        ]
        return peer({**with_masks[-1], "aux_outputs": with_masks[:-1]}, targets)

    inputs = [p[name] for p in predictions for name in ("pred_logits", "mask_embed")]
    sides = {"ours": (ours, predictions[0]["mask_features"]), "hugging_face": (hugging_face, peer_features)}
    seconds = {name: [] for name in sides}
    for _ in range(flags.rounds + 1):
        for name, (loss, features) in sides.items():
            start = now(env.device)
            value = loss()
            middle = now(env.device)
            torch.autograd.grad(value, [features, *inputs])
            end = now(env.device)
            seconds[name].append((seconds_between(start, middle), seconds_between(middle, end)))
    print(f"{flags.batch} images of {flags.size} x {flags.size}, {flags.objects} objects each")
    print(f"{flags.queries} queries, {flags.points} points, {len(predictions)} predictions")
    print(f"{describe_machine(flags)}, torch {torch.__version__}")
    rows = {name: medians(pairs) for name, pairs in seconds.items()}
    columns = ["forward", "backward", "both"]
    print_table("seconds", rows, columns)
    print_table("relative", ratios(rows), columns, digits=2)


if __name__ == "__main__":
    main()
