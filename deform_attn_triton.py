"""Multi-scale deformable attention for GPUs: two Triton kernels, forward and backward.

    import torch
    from deform_attn_triton import ms_deform_attn

    shapes = [(16, 16), (8, 8)]                                     # (H_l, W_l) of each level
    value = torch.randn(2, 320, 8, 32, device="cuda")               # (B, S, M, D): 16 * 16 + 8 * 8 positions
    locations = torch.rand(2, 100, 8, 2, 4, 2, device="cuda")       # (B, N, M, L, P, 2): (x, y) in [0, 1]
    weights = torch.rand(2, 100, 8, 2, 4, device="cuda")            # (B, N, M, L, P)
    output = ms_deform_attn(value, shapes, locations, weights)
    assert output.shape == (2, 100, 256)                            # (B, N, M * D)

The operator is equation 3 of Deformable DETR (Zhu et al., ICLR 2021, arXiv 2010.04159). A program takes one
image, one head and a block of queries, and for each sample the four pixels around it. Values may be half
precision; coordinates, weights and sums are fp32. The backward pass reads the pixels again, so only the
arguments are saved. It adds to the value's gradient by fp32 atomics, so this gradient varies with the order
of the additions.

model.py uses this file for tensors on GPUs of compute capability 8.0 and higher, and runs without it. The
file needs only torch and Triton and can be copied out alone. On a CPU the kernels run in Triton's interpreter
(TRITON_INTERPRET=1), as in the tests.

Letters in shapes: B images, S positions of all levels, M heads, D channels of a head, N queries, L levels,
P points."""

import functools
from itertools import accumulate
from typing import Sequence  # noqa: UP035, because torch 2.6 takes no other list in an operator's signature

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # queries of a program


@triton.jit
def _sample(locations, levels, sample, query, level, query_exists, N, LP: tl.constexpr):
    """Locate one sample of each query of the block.

    Returns its index among all samples, the level's width, height and first position, the column and row of
    the pixel at the upper left of the sample, and the distance of the sample from it in x and y."""
    W = tl.load(levels + 3 * level)
    H = tl.load(levels + 3 * level + 1)
    start = tl.load(levels + 3 * level + 2)
    index = query * LP + sample
    x = tl.load(locations + 2 * index, mask=query_exists, other=0.0) * W - 0.5
    y = tl.load(locations + 2 * index + 1, mask=query_exists, other=0.0) * H - 0.5
    # Every sample farther outside reads only zeros. It is moved to -2, and so is NaN, which must never become
    # part of an address.
    x = tl.where((x > -1) & (x < W), x, -2.0)
    y = tl.where((y > -1) & (y < H), y, -2.0)
    column = tl.floor(x).to(tl.int32)
    row = tl.floor(y).to(tl.int32)
    return index, W, H, start, column, row, x - column, y - row


@triton.jit
def _pixel(column, row, W, H, start, image, head, query_exists, S, M: tl.constexpr, D: tl.constexpr):
    """Return the offset of a pixel's first channel in the value, and whether the level has this pixel."""
    exists = query_exists & (column >= 0) & (column < W) & (row >= 0) & (row < H)
    position = start + row * W + column
    return ((image * S + position) * M + head) * D, exists


@triton.jit
def _forward_kernel(
    value, locations, weights, output, levels, S, N,
    M: tl.constexpr, D: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(1).to(tl.int64), tl.program_id(2)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    query_exists = n < N
    query = (image * N + n) * M + head
    channel = tl.arange(0, LANES)
    total = tl.zeros((BLOCK, LANES), tl.float32)
    for sample in range(L * P):
        index, W, H, start, column, row, x, y = _sample(
            locations, levels, sample, query, sample // P, query_exists, N, L * P
        )
        weight = tl.load(weights + index, mask=query_exists, other=0.0).to(tl.float32)
        for corner in tl.static_range(4):  # upper left, upper right, lower left, lower right
            offset, exists = _pixel(
                column + corner % 2, row + corner // 2, W, H, start, image, head, query_exists, S, M, D
            )
            bilinear = (x if corner % 2 == 1 else 1 - x) * (y if corner >= 2 else 1 - y)
            mask = exists[:, None] & (channel < D)[None]
            pixel = tl.load(value + offset[:, None] + channel[None], mask=mask, other=0.0).to(tl.float32)
            total += (weight * bilinear)[:, None] * pixel
    mask = query_exists[:, None] & (channel < D)[None]
    tl.store(output + query[:, None] * D + channel[None], total, mask=mask)


@triton.jit
def _backward_kernel(
    value, locations, weights, grad_output, grad_value, grad_locations, grad_weights,
    levels, S, N,
    M: tl.constexpr, D: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(1).to(tl.int64), tl.program_id(2)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    query_exists = n < N
    query = (image * N + n) * M + head
    channel = tl.arange(0, LANES)
    mask = query_exists[:, None] & (channel < D)[None]
    grad = tl.load(grad_output + query[:, None] * D + channel[None], mask=mask, other=0.0).to(tl.float32)
    for sample in range(L * P):
        index, W, H, start, column, row, x, y = _sample(
            locations, levels, sample, query, sample // P, query_exists, N, L * P
        )
        weight = tl.load(weights + index, mask=query_exists, other=0.0).to(tl.float32)
        grad_weight = tl.zeros((BLOCK,), tl.float32)
        grad_x = tl.zeros((BLOCK,), tl.float32)  # by the sample's distance in pixels, without its weight
        grad_y = tl.zeros((BLOCK,), tl.float32)
        for corner in tl.static_range(4):
            offset, exists = _pixel(
                column + corner % 2, row + corner // 2, W, H, start, image, head, query_exists, S, M, D
            )
            bilinear_x = x if corner % 2 == 1 else 1 - x
            bilinear_y = y if corner >= 2 else 1 - y
            mask = exists[:, None] & (channel < D)[None]
            pixel = tl.load(value + offset[:, None] + channel[None], mask=mask, other=0.0).to(tl.float32)
            dot = tl.sum(pixel * grad, axis=1)
            grad_weight += bilinear_x * bilinear_y * dot
            grad_x += (bilinear_y if corner % 2 == 1 else -bilinear_y) * dot
            grad_y += (bilinear_x if corner >= 2 else -bilinear_x) * dot
            grad_pixel = (weight * bilinear_x * bilinear_y)[:, None] * grad
            tl.atomic_add(grad_value + offset[:, None] + channel[None], grad_pixel, mask=mask, sem="relaxed")
        tl.store(grad_weights + index, grad_weight, mask=query_exists)
        tl.store(grad_locations + 2 * index, weight * grad_x * W, mask=query_exists)
        tl.store(grad_locations + 2 * index + 1, weight * grad_y * H, mask=query_exists)


@functools.lru_cache(maxsize=256)
def _describe_levels(spatial_shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return width, height and first position of each level (L, 3), int32. It is remembered, because copying
    it to the device would be a launch of its own. spatial_shapes: H, W, H, W, ..."""
    shapes = list(zip(spatial_shapes[::2], spatial_shapes[1::2]))
    starts = accumulate([0, *(H * W for H, W in shapes)])
    levels = [(W, H, start) for (H, W), start in zip(shapes, starts)]
    return torch.tensor(levels, dtype=torch.int32).to(device, non_blocking=True)


def _launch(kernel, value, locations, weights, *others, spatial_shapes: list[int]) -> None:
    """Run a kernel for every block of queries, image and head. spatial_shapes: H, W, H, W, ..."""
    B, S, M, D = value.shape
    _, N, _, L, P, _ = locations.shape
    levels = _describe_levels(tuple(spatial_shapes), value.device)
    grid = triton.cdiv(N, BLOCK), B, M
    lanes = triton.next_power_of_2(D)
    arguments = value, locations, weights, *others, levels, S, N
    with torch.cuda.device_of(value):  # Triton launches on the current device.
        kernel[grid](*arguments, M=M, D=D, L=L, P=P, LANES=lanes, BLOCK=BLOCK)


# The kernels are registered as operators of torch.library, so that torch.compile can treat them as a black
# box with known shapes. Such operators take lists of integers, hence spatial_shapes is H, W, H, W, ...


@torch.library.custom_op("guided_distillation::ms_deform_attn", mutates_args=())
def ms_deform_attn_op(
    value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: Sequence[int]
) -> Tensor:
    """Run the forward kernel: value (B, S, M, D), locations (B, N, M, L, P, 2), weights (B, N, M, L, P).

    Returns (B, N, M * D) with value's dtype."""
    value, locations, weights = value.contiguous(), locations.float().contiguous(), weights.contiguous()
    output = value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])
    _launch(_forward_kernel, value, locations, weights, output, spatial_shapes=spatial_shapes)
    return output


@ms_deform_attn_op.register_fake
def _(value, locations, weights, spatial_shapes):
    return value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])


@torch.library.custom_op("guided_distillation::ms_deform_attn_backward", mutates_args=())
def ms_deform_attn_backward_op(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernel with the output's gradient (B, N, M * D).

    Returns the gradients of value, locations and weights."""
    value, locations, weights = value.contiguous(), locations.float().contiguous(), weights.contiguous()
    grads = (
        torch.zeros_like(value, dtype=torch.float32),
        torch.empty_like(locations),
        torch.empty_like(weights),
    )
    arguments = value, locations, weights, grad.contiguous(), *grads
    _launch(_backward_kernel, *arguments, spatial_shapes=spatial_shapes)
    return grads[0].to(value.dtype), grads[1], grads[2]


@ms_deform_attn_backward_op.register_fake
def _(grad, value, locations, weights, spatial_shapes):
    return (
        value.new_empty(value.shape),
        locations.new_empty(locations.shape, dtype=torch.float32),
        weights.new_empty(weights.shape),
    )


def _save_arguments(ctx, inputs, output):
    *tensors, ctx.spatial_shapes = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return *ms_deform_attn_backward_op(grad, *ctx.saved_tensors, ctx.spatial_shapes), None


ms_deform_attn_op.register_autograd(_backward, setup_context=_save_arguments)


def ms_deform_attn(
    value: Tensor, spatial_shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sum weighted bilinear samples of every level for each query.

    Args:
        value: (B, S, M, D), the levels one after the other, each row by row.
        spatial_shapes: [(H_l, W_l)], the sizes of the levels.
        sampling_locations: (B, N, M, L, P, 2) as (x, y). 0 and 1 are the outer edges of a level. Outside a
            level the value is zero.
        attention_weights: (B, N, M, L, P).

    Returns (B, N, M * D) with value's dtype.
    Raises ValueError if the sizes of the levels do not add up to S."""
    if sum(H * W for H, W in spatial_shapes) != value.shape[1]:
        raise ValueError(
            f"cannot split value: it has {value.shape[1]} positions, which are not those of the levels "
            f"{list(spatial_shapes)}"
        )
    sides = [side for shape in spatial_shapes for side in shape]
    return ms_deform_attn_op(value, sampling_locations, attention_weights, sides)
