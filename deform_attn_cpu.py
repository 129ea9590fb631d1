"""Multi-scale deformable attention for CPUs, forward and backward, and a faster linear map for many tokens.

    import torch
    from deform_attn_cpu import ms_deform_attn

    shapes = [(16, 16), (8, 8)]                        # (H_l, W_l) of each level
    value = torch.randn(2, 320, 8, 32)                 # (B, S, M, D): 16 * 16 + 8 * 8 positions
    locations = torch.rand(2, 100, 8, 2, 4, 2)         # (B, N, M, L, P, 2): (x, y) in [0, 1]
    weights = torch.rand(2, 100, 8, 2, 4)              # (B, N, M, L, P)
    output = ms_deform_attn(value, shapes, locations, weights)
    assert output.shape == (2, 100, 256)               # (B, N, M * D)

The operator is equation 3 of Deformable DETR (Zhu et al., ICLR 2021, arXiv 2010.04159). Here each
level gets a border of zeros and becomes a list of rows, one per position and head. The output of a query and
head is then a weighted sum of rows: four embedding_bag calls, one for each corner of the samples. The
backward pass computes indices and corner weights again, so only the arguments are saved.

model.py uses this file for tensors on the CPU and runs without it. The file needs only torch and can be
copied out alone.

Letters in shapes: B images, S positions of all levels, M heads, D channels of a head, N queries, L levels,
P points, R rows of the padded levels."""

import warnings
from typing import Sequence  # noqa: UP035, because torch 2.6 takes no other list in an operator's signature

import torch
import torch.nn.functional as F
from torch import Tensor

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
MIN_TOKENS = 2000  # With fewer tokens per image, the matrix product is as fast as the convolution.


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

    Returns (B, N, M * D) with the dtype of sampling_locations.
    Raises ValueError if the sizes of the levels do not add up to S."""
    if sum(H * W for H, W in spatial_shapes) != value.shape[1]:
        raise ValueError(
            f"cannot split value: it has {value.shape[1]} positions, which are not those of the levels "
            f"{list(spatial_shapes)}"
        )
    sizes = [side for size in spatial_shapes for side in size]
    return attend(value.to(sampling_locations.dtype), sampling_locations, attention_weights, sizes)


# Sums of rows (embedding_bag), image by image: the rows of one image fit into the CPU's cache. Registered as
# operators of torch.library, so that torch.compile can treat them as black boxes. sizes: of the levels, one
# after the other.


@torch.library.custom_op("guided_distillation::ms_deform_attn_cpu", mutates_args=())
def attend(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    levels, outputs = PaddedLevels(sizes, value.shape[2]), []
    for v, loc, w in zip(value, locations, weights):
        rows = levels.pad(v)
        index, x, y, _ = levels.corners(loc)
        corner_weights = split_to_corners(w.reshape(index.shape), x, y)
        parts = (
            F.embedding_bag(index, rows[shift:], per_sample_weights=corner_weight, mode="sum")
            for shift, corner_weight in zip(levels.shifts, corner_weights)
        )
        total = next(parts)
        for part in parts:
            total += part
        outputs.append(total.view(loc.shape[0], -1))  # (N * M, D) -> (N, M * D)
    return torch.stack(outputs)


@attend.register_fake
def _(value, locations, weights, sizes):
    (B, _, M, D), N = value.shape, locations.shape[1]
    return value.new_empty(B, N, M * D)


@torch.library.custom_op("guided_distillation::ms_deform_attn_cpu_backward", mutates_args=())
def attend_backward(
    value: Tensor, locations: Tensor, weights: Tensor, grad_output: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    levels, grads = PaddedLevels(sizes, value.shape[2]), []
    for v, loc, w, grad in zip(value, locations, weights, grad_output):
        rows, grad = levels.pad(v), grad.reshape(-1, v.shape[-1])  # (R, D), (N * M, D)
        index, x, y, pixels_per_location = levels.corners(loc)
        a = w.reshape(index.shape)  # (N * M, L * P)
        # The derivative by each of a sample's four matrix entries, named g<column><line>.
        g00, g10, g01, g11 = (gathered_dot(grad, index, rows[shift:]) for shift in levels.shifts)
        upper, lower = g00.lerp(g10, x), g01.lerp(g11, x)
        grad_w = upper.lerp(lower, y)
        grad_x, grad_y = a * (g10 - g00).lerp(g11 - g01, y), a * (lower - upper)
        grad_loc = torch.stack([grad_x, grad_y], dim=-1).view_as(pixels_per_location)
        grad_loc = grad_loc * pixels_per_location
        # The product with the transposed matrix: samples are sorted by the row of their upper left
        # corner, so that each row sums over one bag of samples.
        positions, order = index.flatten().sort()
        bags, first = (order // index.shape[1]).int(), torch.arange(len(rows), device=rows.device).int()
        first = torch.searchsorted(positions, first, out_int32=True)
        grad_rows = torch.zeros_like(rows)
        for shift, corner_weight in zip(levels.shifts, split_to_corners(a, x, y)):
            corner_weight = corner_weight.flatten().index_select(0, order)
            part = F.embedding_bag(bags, grad, first, per_sample_weights=corner_weight, mode="sum")
            grad_rows[shift:] += part[: len(rows) - shift]
        grads.append((levels.unpad(grad_rows), grad_loc.view_as(loc), grad_w.view_as(w)))
    return tuple(map(torch.stack, zip(*grads)))


@attend_backward.register_fake
def _(value, locations, weights, grad_output, sizes):
    return tuple(x.new_empty(x.shape) for x in (value, locations, weights))


def _save(ctx, inputs, output):
    *tensors, ctx.sizes = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return *attend_backward(*ctx.saved_tensors, grad, ctx.sizes), None


attend.register_autograd(_backward, setup_context=_save)


class PaddedLevels:
    """Lay out the levels of one image below each other, each in a border of zeros.

    Samples outside a level read the border, so no sample needs a bounds check. The four corners of any sample
    are always `shifts` rows apart. A row holds the D channels of one position and one head."""

    def __init__(self, sizes: Sequence[int], num_heads: int):
        self.spatial_shapes, self.num_heads = list(zip(sizes[::2], sizes[1::2])), num_heads
        self.width = 2 + max(W for H, W in self.spatial_shapes)
        self.shifts = 0, num_heads, self.width * num_heads, (self.width + 1) * num_heads

    def pad(self, value: Tensor) -> Tensor:
        """Add the borders: (S, M, D) -> (R, D)."""
        parts = value.flatten(1).split([H * W for H, W in self.spatial_shapes])
        parts = [
            F.pad(part.view(H, W, -1), (0, 0, 1, self.width - W - 1, 1, 1))
            for part, (H, W) in zip(parts, self.spatial_shapes)
        ]
        return torch.cat(parts).view(-1, value.shape[2])

    def unpad(self, rows: Tensor) -> Tensor:
        """Remove the borders: (R, D) -> (S, M, D)."""
        lines = rows.view(-1, self.width, self.num_heads, rows.shape[1])
        parts = lines.split([H + 2 for H, W in self.spatial_shapes])
        return torch.cat([p[1:-1, 1 : W + 1].flatten(0, 1) for p, (H, W) in zip(parts, self.spatial_shapes)])

    def corners(self, locations: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find the upper left corner of each sample. locations: (N, M, L, P, 2).

        Returns the row of the corner, (N * M, L * P) int32; the distance of the sample from it in x and in y,
        in [0, 1], of the same shape; and the derivative of these distances by the locations,
        (N, M * L * P * 2)."""
        N, M, L, P = locations.shape[:4]
        device = locations.device
        starts, top = [], 1
        for H, _ in self.spatial_shapes:
            starts.append((top * self.width + 1) * M)
            top += H + 2
        heads = torch.arange(M, dtype=torch.int32, device=device)[:, None, None]
        starts = heads + torch.tensor(starts, dtype=torch.int32, device=device)[:, None]  # (M, L, 1)
        sizes = torch.tensor([(W, H) for H, W in self.spatial_shapes]).to(locations)
        sizes = sizes[:, None].expand(M, L, P, 2).reshape(-1)

        pixels = locations.reshape(N, -1) * sizes - 0.5
        # Every sample farther outside, and every NaN, moves to the border, where it reads only zeros.
        inside = pixels.clamp(torch.full_like(sizes, -1), sizes).nan_to_num(-1)
        pixels_per_location = torch.where(inside == pixels, sizes, 0)
        corner = inside.floor().minimum(sizes - 1)
        x, y = (inside - corner).view(-1, L * P, 2).unbind(-1)
        column, line = corner.int().view(N, -1, 2).unbind(-1)
        index = line * (self.width * M) + column * M + starts.expand(M, L, P).reshape(-1)
        return index.view(-1, L * P), x.contiguous(), y.contiguous(), pixels_per_location


def split_to_corners(weights: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distribute each weight over the four corners around a sample at (x, y) in [0, 1].

    Returns the weights of the corners at (x, y) = (0, 0), (1, 0), (0, 1), (1, 1), each of the input's
    shape."""
    right, lower = weights * x, weights * y
    lower_right = right * y
    upper_right = right - lower_right
    return weights - lower - upper_right, upper_right, lower - lower_right, lower_right


def gathered_dot(left: Tensor, index: Tensor, right: Tensor) -> Tensor:
    """Compute the dot products left[i] @ right[index[i, j]] without gathering the rows of right.

    left: (n, D), index: (n, k) int32, right: (m, D). Returns (n, k)."""
    n, k = index.shape
    first = torch.arange(0, n * k + 1, k, dtype=torch.int32)
    zeros, size = left.new_zeros(n * k), (n, len(right))
    pattern = torch.sparse_csr_tensor(first, index.flatten(), zeros, size, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0).values().view(n, k)


def prefers_channels_last(x: Tensor) -> bool:
    """Return whether x is on a CPU whose convolutions are fastest with channels last (AVX-512). An export is
    for any machine; torch.compile is no export, although in torch 2.11 it says that it is."""
    fast = x.device.type == "cpu" and AVX512
    return fast and (
        torch.compiler.is_dynamo_compiling() or not getattr(torch.compiler, "is_exporting", bool)()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute F.linear, for many tokens (B, S, C) as a 1 x 1 convolution where channels last are fastest."""
    if x.ndim == 3 and prefers_channels_last(x) and x.shape[1] > MIN_TOKENS and x.dtype != torch.float64:
        image = x.flatten(0, 1)[None, None].permute(0, 3, 1, 2)  # (1, C, 1, B * S)
        tokens = F.conv2d(image, weight[:, :, None, None], bias).squeeze((0, 2)).T
        return tokens.unflatten(0, x.shape[:2])
    return F.linear(x, weight, bias)
