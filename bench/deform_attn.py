"""Multi-scale deformable attention, forward and backward, of ours beside the plain form of Hugging Face's
Mask2Former (grid_sample, as in the official code's fallback), in turn in one process.

    python bench/deform_attn.py                      # a layer of the pixel decoder: 2 images of 512 x 512
    python bench/deform_attn.py --size 1024 --batch 1
    python bench/deform_attn.py --size 1024 --batch 16 --device cuda         # the Triton kernels
    python bench/deform_attn.py --size 1024 --batch 16 --device cuda --bf16  # with values in bfloat16

It prints medians in milliseconds, their ratio, and how much is kept for the backward pass."""

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from sides import mark, seconds_between, where

import engine
from model import ms_deform_attn, pixel_centres

M, D, P = 8, 32, 4


def make_inputs(size: int, batch: int):
    """value, shapes, locations (a normal deviation of 2 pixels around each position), weights."""
    torch.manual_seed(0)
    shapes = [(size // stride, size // stride) for stride in (32, 16, 8)]
    centres = torch.cat([pixel_centres(H, W) for H, W in shapes])
    S, sizes = len(centres), torch.tensor(shapes, dtype=torch.float32)
    offsets = 2 * torch.randn(batch, S, M, len(shapes), P, 2) / sizes[:, None]
    weights = torch.randn(batch, S, M, len(shapes) * P).softmax(-1).unflatten(-1, (len(shapes), P))
    return torch.randn(batch, S, M, D), shapes, centres[:, None, None, None] + offsets, weights


def main():
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="ours with values in bfloat16")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    device = engine.start_processes(flags.device, "fp32")  # memory is kept on a CPU, for both
    value, shapes, locations, weights = make_inputs(flags.size, flags.batch)
    inputs = [tensor.to(device).requires_grad_() for tensor in (value, locations, weights)]
    grad = torch.randn(flags.batch, value.shape[1], M * D).to(device)
    sides = {"ours": ms_deform_attn, "theirs": multi_scale_deformable_attention}
    seconds, kept = {name: [] for name in sides}, {}
    for _ in range(flags.rounds + 1):
        for name, attention in sides.items():
            storages, ours_in_bf16 = {}, flags.bf16 and name == "ours"
            given = [inputs[0].detach().bfloat16().requires_grad_(), *inputs[1:]] if ours_in_bf16 else inputs
            start = mark(device)
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, storages=storages: storages.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
            ):
                output = attention(given[0], shapes, *given[1:])
            middle = mark(device)
            torch.autograd.grad(output, given, grad.to(output.dtype))
            end = mark(device)
            seconds[name].append((seconds_between(start, middle), seconds_between(middle, end)))
            kept[name] = sum(storages.values()) / 2**20
    print(
        f"one layer, {flags.batch} images of {flags.size} x {flags.size}: {value.shape[1]} queries, 3 levels"
    )
    print(f"{M} heads x {D}, {P} points; {where(flags)}, torch {torch.__version__}\n")
    print(f"{'ms':10}{'forward':>10}{'backward':>10}{'both':>10}{'kept MiB':>10}")
    rows, digits = {}, 2 if device.type == "cuda" else 0
    for name, values in seconds.items():
        values = values[1:]  # the first warms up
        rows[name] = [1e3 * statistics.median(v) for v in (*zip(*values), [sum(v) for v in values])]
        rows[name].append(kept[name])
        print(f"{name:10}" + "".join(f"{value:10.{digits}f}" for value in rows[name]))
    print(f"{'ratio':10}" + "".join(f"{a / b:10.2f}" for a, b in zip(rows["ours"], rows["theirs"])))


if __name__ == "__main__":
    main()
