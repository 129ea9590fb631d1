"""Multi-scale deformable attention for GPUs: `ms_deform_attn` of model.py as two Triton kernels, forward
and backward.

model.py takes it for tensors on a GPU if this file and Triton are there; without the file everything still
runs. On a CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is how `make test` tests
them; `make test-gpu` runs them on a GPU. bench/RESULTS.md has their times.

Equation 3 of Deformable DETR (Zhu et al., ICLR 2021, arXiv 2010.04159). A program takes one image, one head,
a block of queries, and for each sample the four pixels around it. Values may be half precision;
coordinates, weights and sums are fp32. The backward pass reads the pixels again, so nothing is kept but the
arguments, and adds to the value's gradient by fp32 atomics.

Letters: B images, S positions of all levels, M heads, D channels of a head, N queries, L levels, P points."""

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # queries of a program


@triton.jit
def _sample(locations, levels, sample, query, level, inside, N, LP: tl.constexpr):
    """Of a sample of each query of the block: its place among all samples, the level's size and start, the
    upper left pixel, and how far the sample is from it."""
    W = tl.load(levels + 3 * level)
    H = tl.load(levels + 3 * level + 1)
    start = tl.load(levels + 3 * level + 2)
    place = query * LP + sample
    x = tl.load(locations + 2 * place, mask=inside, other=0.0) * W - 0.5
    y = tl.load(locations + 2 * place + 1, mask=inside, other=0.0) * H - 0.5
    # Farther outside there is only zero. What is no number goes there too, and never into an address.
    x = tl.where((x > -1) & (x < W), x, -2.0)
    y = tl.where((y > -1) & (y < H), y, -2.0)
    column = tl.floor(x).to(tl.int32)
    row = tl.floor(y).to(tl.int32)
    return place, W, H, start, column, row, x - column, y - row


@triton.jit
def _corner(column, row, W, H, start, image, head, inside, S, M: tl.constexpr, D: tl.constexpr):
    """Where a pixel's first channel is in the value, and whether there is one."""
    exists = inside & (column >= 0) & (column < W) & (row >= 0) & (row < H)
    position = start + row * W + column
    return ((image * S + position) * M + head) * D, exists


@triton.jit
def _forward(
    value, locations, weights, output, levels, S, N,
    M: tl.constexpr, D: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(1).to(tl.int64), tl.program_id(2)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    query = (image * N + n) * M + head
    channel = tl.arange(0, LANES)
    total = tl.zeros((BLOCK, LANES), tl.float32)
    for sample in range(L * P):
        place, W, H, start, column, row, x, y = _sample(
            locations, levels, sample, query, sample // P, inside, N, L * P
        )
        weight = tl.load(weights + place, mask=inside, other=0.0).to(tl.float32)
        for corner in tl.static_range(4):
            at, exists = _corner(
                column + corner % 2, row + corner // 2, W, H, start, image, head, inside, S, M, D
            )
            share = (x if corner % 2 == 1 else 1 - x) * (y if corner >= 2 else 1 - y)
            mask = exists[:, None] & (channel < D)[None]
            pixel = tl.load(value + at[:, None] + channel[None], mask=mask, other=0.0).to(tl.float32)
            total += (weight * share)[:, None] * pixel
    mask = inside[:, None] & (channel < D)[None]
    tl.store(output + query[:, None] * D + channel[None], total, mask=mask)


@triton.jit
def _backward(
    value, locations, weights, grad_output, grad_value, grad_locations, grad_weights,
    levels, S, N,
    M: tl.constexpr, D: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(1).to(tl.int64), tl.program_id(2)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    query = (image * N + n) * M + head
    channel = tl.arange(0, LANES)
    mask = inside[:, None] & (channel < D)[None]
    grad = tl.load(grad_output + query[:, None] * D + channel[None], mask=mask, other=0.0).to(tl.float32)
    for sample in range(L * P):
        place, W, H, start, column, row, x, y = _sample(
            locations, levels, sample, query, sample // P, inside, N, L * P
        )
        weight = tl.load(weights + place, mask=inside, other=0.0).to(tl.float32)
        by_weight = tl.zeros((BLOCK,), tl.float32)
        by_x = tl.zeros((BLOCK,), tl.float32)
        by_y = tl.zeros((BLOCK,), tl.float32)
        for corner in tl.static_range(4):
            at, exists = _corner(
                column + corner % 2, row + corner // 2, W, H, start, image, head, inside, S, M, D
            )
            share_x = x if corner % 2 == 1 else 1 - x
            share_y = y if corner >= 2 else 1 - y
            mask = exists[:, None] & (channel < D)[None]
            pixel = tl.load(value + at[:, None] + channel[None], mask=mask, other=0.0).to(tl.float32)
            product = tl.sum(pixel * grad, axis=1)
            by_weight += share_x * share_y * product
            by_x += (share_y if corner % 2 == 1 else -share_y) * product
            by_y += (share_x if corner >= 2 else -share_x) * product
            add = (weight * share_x * share_y)[:, None] * grad
            tl.atomic_add(grad_value + at[:, None] + channel[None], add, mask=mask, sem="relaxed")
        tl.store(grad_weights + place, by_weight, mask=inside)
        tl.store(grad_locations + 2 * place, weight * by_x * W, mask=inside)
        tl.store(grad_locations + 2 * place + 1, weight * by_y * H, mask=inside)


def _launch(kernel, value, locations, weights, *more, spatial_shapes):
    B, S, M, D = value.shape
    _, N, _, L, P, _ = locations.shape
    areas = [H * W for H, W in spatial_shapes]
    levels = [(W, H, start) for (H, W), start in zip(spatial_shapes, accumulate([0, *areas]))]
    levels = torch.tensor(levels, dtype=torch.int32).to(value.device, non_blocking=True)
    grid = triton.cdiv(N, BLOCK), B, M
    lanes = triton.next_power_of_2(D)
    arguments = value, locations, weights, *more, levels, S, N
    with torch.cuda.device_of(value):  # Triton launches on the current device
        kernel[grid](*arguments, M=M, D=D, L=L, P=P, LANES=lanes, BLOCK=BLOCK)


# Operators of torch.library: torch.compile sees a box with known shapes. spatial_shapes: H, W, H, W, ...


@torch.library.custom_op("guided_distillation::ms_deform_attn", mutates_args=())
def ms_deform_attn_op(value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: list[int]) -> Tensor:
    """value (B, S, M, D), locations (B, N, M, L, P, 2) and weights (B, N, M, L, P), both fp32 ->
    (B, N, M * D) of value's type."""
    value, locations, weights = value.contiguous(), locations.float().contiguous(), weights.contiguous()
    output = value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])
    _launch(_forward, value, locations, weights, output, spatial_shapes=_pairs(spatial_shapes))
    return output


@ms_deform_attn_op.register_fake
def _(value, locations, weights, spatial_shapes):
    return value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])


@torch.library.custom_op("guided_distillation::ms_deform_attn_backward", mutates_args=())
def ms_deform_attn_backward_op(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, locations and weights."""
    value, locations, weights = value.contiguous(), locations.float().contiguous(), weights.contiguous()
    grads = (
        torch.zeros_like(value, dtype=torch.float32),
        torch.empty_like(locations),
        torch.empty_like(weights),
    )
    pairs = _pairs(spatial_shapes)
    _launch(_backward, value, locations, weights, grad.contiguous(), *grads, spatial_shapes=pairs)
    return grads[0].to(value.dtype), grads[1], grads[2]


@ms_deform_attn_backward_op.register_fake
def _(grad, value, locations, weights, spatial_shapes):
    return tuple(torch.empty_like(tensor) for tensor in (value, locations, weights))


def _keep(ctx, inputs, output):
    *tensors, ctx.spatial_shapes = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad):
    return *ms_deform_attn_backward_op(grad, *ctx.saved_tensors, ctx.spatial_shapes), None


ms_deform_attn_op.register_autograd(_gradients, setup_context=_keep)


def _pairs(flat: list[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2]))


def ms_deform_attn(
    value: Tensor, spatial_shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """What `ms_deform_attn` of model.py does, with its arguments and result."""
    flat = [side for shape in spatial_shapes for side in shape]
    return ms_deform_attn_op(value, sampling_locations, attention_weights, flat)
