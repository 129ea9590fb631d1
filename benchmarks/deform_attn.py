"""Multi-scale deformable attention, forward and backward: ours and the plain form of Hugging Face's
Mask2Former (grid_sample, as in the official code's fallback), in turn in one process.

    python benchmarks/deform_attn.py                      # one layer for 2 images of 512 x 512
    python benchmarks/deform_attn.py --size 1024 --batch 1
    python benchmarks/deform_attn.py --size 1024 --batch 16 --device cuda         # the Triton kernels
    python benchmarks/deform_attn.py --size 1024 --batch 16 --device cuda --bf16  # with values in bfloat16

It prints median milliseconds, their ratio, and the memory that is kept for the backward pass."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import describe_machine, make_parser, medians, now, print_table, ratios, seconds_between

from model import fastest_ms_deform_attn, pixel_centers
from training.distributed import init_distributed

M, D, P = 8, 32, 4  # heads, channels of a head, points


def make_inputs(size: int, batch: int):
    """Make the arguments of the operator: value, shapes, locations and weights. The locations have a standard
    deviation of 2 pixels around each query's position."""
    torch.manual_seed(0)
    shapes = [(size // stride, size // stride) for stride in (32, 16, 8)]
    centers = torch.cat([pixel_centers(H, W) for H, W in shapes])
    S, sizes = len(centers), torch.tensor(shapes, dtype=torch.float32)
    offsets = 2 * torch.randn(batch, S, M, len(shapes), P, 2) / sizes[:, None]
    weights = torch.randn(batch, S, M, len(shapes) * P).softmax(-1).unflatten(-1, (len(shapes), P))
    return torch.randn(batch, S, M, D), shapes, centers[:, None, None, None] + offsets, weights


def main():
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

    parser = make_parser(__doc__, size=512, batch=2, rounds=9, threads=2)
    parser.add_argument("--bf16", action="store_true", help="run ours with values in bfloat16")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    device = init_distributed(flags.device, "fp32").device  # On a CPU, both sides keep freed memory.
    value, shapes, locations, weights = make_inputs(flags.size, flags.batch)
    inputs = [tensor.to(device).requires_grad_() for tensor in (value, locations, weights)]
    value_in_bf16 = inputs[0].detach().bfloat16().requires_grad_()
    grad = torch.randn(flags.batch, value.shape[1], M * D).to(device)
    sides = {
        "ours": (fastest_ms_deform_attn(device), [value_in_bf16, *inputs[1:]] if flags.bf16 else inputs),
        "hugging_face": (multi_scale_deformable_attention, inputs),
    }
    seconds, kept = {name: [] for name in sides}, {}
    for _ in range(flags.rounds + 1):
        for name, (attention, arguments) in sides.items():
            storages = {}
            start = now(device)
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, storages=storages: storages.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
            ):
                output = attention(arguments[0], shapes, *arguments[1:])
            middle = now(device)
            torch.autograd.grad(output, arguments, grad.to(output.dtype))
            end = now(device)
            seconds[name].append((seconds_between(start, middle), seconds_between(middle, end)))
            kept[name] = sum(storages.values()) / 2**20
    images = f"{flags.batch} images of {flags.size} x {flags.size}"
    print(f"one layer, {images}: {value.shape[1]} queries, 3 levels")
    print(f"{M} heads x {D}, {P} points; {describe_machine(flags)}, torch {torch.__version__}")
    rows = {name: {**medians(seconds[name], 1e3), "kept MiB": kept[name]} for name in sides}
    columns = ["forward", "backward", "both", "kept MiB"]
    print_table("ms", rows, columns, digits=2 if device.type == "cuda" else 0)
    print_table("relative", ratios(rows), columns, digits=2)


if __name__ == "__main__":
    main()
