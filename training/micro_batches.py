"""Batches in parts: run a batch in micro-batches, and split or concatenate outputs along the batch."""

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from model import Outputs


class MicroBatched(nn.Module):
    """A model that runs a batch in micro-batches, one after another, and recomputes each in the backward
    pass. The gradient is that of the whole batch, with the activations of one micro-batch in memory, at the
    cost of one more forward pass."""

    def __init__(self, model: nn.Module, num_micro_batches: int):
        super().__init__()
        self.model, self.num_micro_batches = model, num_micro_batches

    def forward(self, images: Tensor):
        checkpoint = torch.utils.checkpoint.checkpoint
        chunks = images.chunk(self.num_micro_batches)
        return concat_outputs([checkpoint(self.model, chunk, use_reentrant=False) for chunk in chunks])


def concat_outputs(parts: list, joined: dict | None = None):
    """Concatenate the outputs of micro-batches, which are tensors with the batch first in `Outputs` and
    lists. A tensor that several predictions share is concatenated once."""
    joined = {} if joined is None else joined
    first = parts[0]
    if isinstance(first, Outputs):
        stored = {
            name: concat_outputs([part.stored[name] for part in parts], joined) for name in first.stored
        }
        return Outputs(**stored)
    if isinstance(first, list):
        return [concat_outputs(rows, joined) for rows in zip(*parts)]
    if id(first) not in joined:
        joined[id(first)] = torch.cat(parts)
    return joined[id(first)]


def split_outputs(outputs: Outputs, first: int) -> tuple[Outputs, Outputs]:
    """Split the outputs of a batch into those of its first images and those of the others."""
    sizes, halves = (first, len(outputs["pred_logits"]) - first), ([], [])
    for prediction in (outputs, *outputs["aux_outputs"]):
        parts = {name: v.split(sizes) for name, v in prediction.stored.items() if name != "aux_outputs"}
        for half, predictions in enumerate(halves):
            predictions.append({name: part[half] for name, part in parts.items()})
    return tuple(Outputs(**last, aux_outputs=[Outputs(**p) for p in aux]) for last, *aux in halves)
