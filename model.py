"""Mask2Former (Cheng et al., CVPR 2022, arXiv 2112.01527) for instance segmentation, in plain PyTorch.

    model = Mask2Former(num_classes=80, backbone="resnet50", pretrained=True)
    outputs = model(images)                 # (B, 3, H, W) RGB, 0..255, any H and W

Three parts, each a module of its own. A timm backbone gives feature maps at strides 4, 8, 16, 32. The
`PixelDecoder` mixes the three coarser ones, which are called levels from there on, by multi-scale deformable
attention, and makes the mask features: C numbers for each pixel at stride 4. The `TransformerDecoder` has Q
queries, learned vectors each of which may claim one object. Layer by layer they read one level after the
other, and before the first layer and after each they predict: class logits, and a mask embedding whose
product with the mask features is the query's mask. The last prediction is the result; the earlier ones,
"aux_outputs", are there for the loss alone (deep supervision).

This file needs torch, torchvision and timm and can be copied out alone. Where the paper is silent the
numerics follow the official code (facebookresearch/Mask2Former at 9b0651c).

Letters in shapes: B images, C hidden_dim, H W pixels of the images, which from the backbone on are padded to
multiples of 32, h w = a quarter of these, K classes, Q queries, M heads, D = C/M, L levels (strides 32, 16, 8
in this order), P points, S = sum of H_l * W_l over levels, N queries of an attention, of any kind."""

import math
import re
import warnings

import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

try:  # a faster ms_deform_attn for GPUs
    from deform_attn_triton import ms_deform_attn as triton_attention
except ImportError:  # no such file beside this one, or no Triton
    triton_attention = None

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
STRIDES = (4, 8, 16, 32)
BACKBONES = {  # the paper's names, and the timm models with the paper's pretraining
    "resnet50": "resnet50.tv_in1k",
    "resnet101": "resnet101.tv_in1k",
    "swin_t": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_s": "swin_small_patch4_window7_224.ms_in1k",
    "swin_b": "swin_base_patch4_window12_384.ms_in22k",
    "swin_l": "swin_large_patch4_window12_384.ms_in22k",
    "deit_b": "deit_base_patch16_384.fb_in1k",
    "dinov2_b": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_l": "vit_large_patch14_dinov2.lvd142m",
}


class Mask2Former(nn.Module):
    """Images in, a class and a mask for each of Q queries out.

    num_classes: K, without "no object", which is the last class logit (index K).
    backbone: a name of BACKBONES, or a timm model that has feature maps at strides 4 to 32 or is a plain ViT,
        and takes images of any size.
    pretrained: start from timm's ImageNet weights (downloads them). backbone_weights: from this local file of
        timm's names instead.
    norm: what becomes of the backbone's batch norms: "frozen" (statistics, factors and shifts stay as they
        were pretrained), "batch" (trained; engine.py synchronises them over GPUs), or "group" (replaced by
        group norms: for training from scratch).
    pixel_mean, pixel_std: per RGB channel in 0..255; None takes them from timm's configuration.
    backbone_args: further arguments for timm.create_model."""

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pretrained: bool = False,
        *,
        num_queries: int = 100,
        hidden_dim: int = 256,
        num_heads: int = 8,
        encoder_layers: int = 6,
        encoder_ffn: int = 1024,
        decoder_layers: int = 9,
        decoder_ffn: int = 2048,
        norm: str = "frozen",
        backbone_weights: str | None = None,
        backbone_args: dict | None = None,
        pixel_mean: list[float] | None = None,
        pixel_std: list[float] | None = None,
    ):
        super().__init__()
        if hidden_dim % 4 or hidden_dim % num_heads:
            raise ValueError(f"hidden_dim {hidden_dim} must be a multiple of 4 and of num_heads, {num_heads}")
        self.backbone = build_backbone(backbone, pretrained, backbone_weights, norm, **(backbone_args or {}))
        self.pixel_decoder = PixelDecoder(
            self.backbone.channels, hidden_dim, num_heads, encoder_layers, encoder_ffn
        )
        self.decoder = TransformerDecoder(
            num_classes, num_queries, hidden_dim, num_heads, decoder_layers, decoder_ffn
        )
        config = timm.data.resolve_model_data_config(self.backbone.body)
        mean = pixel_mean or [255 * value for value in config["mean"]]
        std = pixel_std or [255 * value for value in config["std"]]
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> dict:
        """images: (B, 3, H, W) RGB, uint8 or float in 0..255, any H and W.

        Returns a `Prediction`: "pred_logits" (B, Q, K+1) class logits, "pred_masks" (B, Q, h, w) mask logits
        at stride 4 of the image padded right and below to multiples of 32 (h = 8 * ceil(H / 32)), and
        "aux_outputs": the same two for each earlier prediction, the first from the queries before any
        layer."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), found {tuple(images.shape)}")
        images = (images - self.pixel_mean) / self.pixel_std
        H, W = (32 * ((side + 31) // 32) for side in images.shape[2:])
        images = F.pad(images, (0, W - images.shape[3], 0, H - images.shape[2]))
        if images.is_cuda or fast_convolutions(images):
            images = images.contiguous(memory_format=torch.channels_last)  # faster there, slower on others
        mask_features, levels = self.pixel_decoder(self.backbone(images))
        return self.decoder(levels, mask_features)


def build_backbone(name, pretrained=False, weights=None, norm="frozen", **kwargs) -> nn.Module:
    """A `Pyramid` or `PlainViT` around a timm model: images (B, 3, H, W), H and W multiples of 32 -> its
    feature maps at strides 4, 8, 16, 32, each (B, channels, H / stride, W / stride). kwargs go to
    timm.create_model."""
    name = BACKBONES.get(name, name)
    if norm not in ("frozen", "batch", "group"):
        raise ValueError(f"unknown norm {norm!r}: one of frozen, batch, group")
    if not timm.is_model(name):
        raise ValueError(f"unknown backbone {name!r}: one of {', '.join(BACKBONES)}, or any timm model")
    with torch.device("meta"):  # a look at it, without weights
        plain = timm.create_model(name, **kwargs)
    if weights is not None:
        known, found = plain.state_dict().keys(), timm.models.load_state_dict(weights).keys()
        if 2 * len(known & found) < len(known):  # timm would only warn
            raise ValueError(f"{weights} has {len(known & found)} of the {len(known)} tensors of {name}")
        pretrained, kwargs["pretrained_cfg_overlay"] = True, {"file": weights}
    if isinstance(plain, timm.models.VisionTransformer):
        kwargs = {"dynamic_img_size": True, "num_classes": 0, **kwargs}
        body = timm.create_model(name, pretrained=pretrained, **kwargs)
        body.attn_pool, body.fc_norm = None, nn.Identity()  # of its classifier: nothing here uses them
        return PlainViT(body)
    # Swin: any image size, windows shifted in every stage, the paper's stochastic depth.
    if name.startswith("swin_"):
        kwargs = {"strict_img_size": False, "always_partition": True, "drop_path_rate": 0.3, **kwargs}
    with torch.device("meta"):
        strides = timm.create_model(name, features_only=True, **kwargs).feature_info.reduction()
    if not set(STRIDES) <= set(strides):
        raise ValueError(f"backbone {name!r} has feature maps at strides {strides}, needed are {STRIDES}")
    indices = [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES]  # the last map of each
    body = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=indices, **kwargs)
    if norm == "frozen":
        body = timm.layers.freeze_batch_norm_2d(body)
        _fold_frozen_norms(body)
    elif norm == "group":
        _replace_batch_norm(body)
    for module in body.modules():
        if isinstance(module, SwinTransformerBlock):
            module.__class__ = PadThenShiftBlock
    return Pyramid(body)


class PadThenShiftBlock(SwinTransformerBlock):
    """timm shifts the windows, then pads; the official Swin pads, then shifts. It differs where the windows
    do not divide the feature map."""

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        (H, W), (h, w) = x.shape[1:3], self.window_size
        right, below = w * ((W + w - 1) // w) - W, h * ((H + h - 1) // h) - H
        padded = F.pad(self.norm1(x), (0, 0, 0, right, 0, below))
        x = x + self.drop_path1(F.pad(self._attn(padded), (0, 0, 0, -right, 0, -below)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Pyramid(nn.Module):
    """A timm model with feature maps. Those of Swin come channels last, and each through a norm of its
    own."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body, self.channels = body, body.feature_info.channels()
        self.channels_last = getattr(body, "output_fmt", "NCHW") == "NHWC"
        self.norms = nn.ModuleList(nn.LayerNorm(C) for C in self.channels if self.channels_last)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.body(images)
        if self.channels_last:
            features = [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, features)]
        return features


class PlainViT(nn.Module):
    """A vision transformer: its last patch tokens through a 1 x 1 convolution for each stride, then resized
    to it, as Guided Distillation does with DeiT and DINOv2. An image is resized where its sides are no
    multiples of the patch's."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body, self.channels = body, [128, 256, 512, 1024]
        self.pyramid = nn.ModuleList(nn.Conv2d(body.embed_dim, C, 1) for C in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        H, W = images.shape[-2:]
        patch = self.body.patch_embed.patch_size[0]
        h, w = -(-H // patch), -(-W // patch)
        if STRIDES[-1] % patch:
            images = resize(images, (h * patch, w * patch))
        tokens = self.body.forward_features(images)[:, self.body.num_prefix_tokens :]  # (B, h * w, C)
        grid = tokens.transpose(1, 2).unflatten(2, (h, w))
        return [resize(conv(grid), (H // s, W // s)) for conv, s in zip(self.pyramid, STRIDES)]


def resize(maps: Tensor, size) -> Tensor:
    """Bilinear, (B, C, H, W) -> (B, C, *size)."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def fast_convolutions(x: Tensor) -> bool:
    """Whether x is on a CPU that convolves with channels last near its peak rate."""
    return x.device.type == "cpu" and AVX512 and not torch.compiler.is_exporting()


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear, for many tokens (B, S, C) on such a CPU by a 1 x 1 convolution, which is faster there."""
    if x.ndim == 3 and fast_convolutions(x) and x.shape[1] > 2000 and x.dtype != torch.float64:
        image = x.flatten(0, 1)[None, None].permute(0, 3, 1, 2)  # (1, C, 1, B * S)
        tokens = F.conv2d(image, weight[:, :, None, None], bias).squeeze((0, 2)).T
        return tokens.unflatten(0, x.shape[:2])
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear for few tokens and for many."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class FoldedConv2d(nn.Conv2d):
    """A convolution and the frozen batch norm behind it, which only scales and shifts its channels."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm[0]  # in a tuple, so that parameters keep their names
        factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * factor
        weight = self.weight * factor.view(-1, 1, 1, 1)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen batch norm that its convolution has done already."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _fold_frozen_norms(body: nn.Module) -> None:
    """In place, where a norm follows its convolution by name, as in all ResNets: conv1, bn1; 0, 1."""
    for module in body.modules():
        children = dict(module.named_children())
        for name, conv in children.items():
            behind = str(int(name) + 1) if name.isdecimal() else name.replace("conv", "bn")
            norm = children.get(behind)
            if type(conv) is nn.Conv2d and conv.bias is None and type(norm) is FrozenBatchNorm2d:
                conv.__class__, norm.__class__, conv.norm = FoldedConv2d, FoldedNorm, (norm,)


def _replace_batch_norm(module: nn.Module) -> None:
    """Every batch norm of the module, in place, by a group norm of eight channels a group if that divides."""
    for name, child in module.named_children():
        if isinstance(child, timm.layers.BatchNormAct2d):
            size = math.gcd(8, child.num_features)
            group_norm = timm.layers.GroupNormAct(child.num_features, group_size=size)
            group_norm.drop, group_norm.act = child.drop, child.act
            setattr(module, name, group_norm)
        elif isinstance(child, nn.BatchNorm2d):
            size = math.gcd(8, child.num_features)
            setattr(module, name, nn.GroupNorm(child.num_features // size, child.num_features))
        else:
            _replace_batch_norm(child)


# --------------------------------------------------------------------------------------------- pixel decoder


class PixelDecoder(nn.Module):
    """Feature maps at strides 4, 8, 16, 32 -> mask features (B, C, h, w) and the levels [stride 32, 16, 8],
    each (B, C, H_l, W_l).

    Sections 3.2.2 and 4.1 of the paper; the encoder is that of Deformable DETR (Zhu et al., ICLR 2021, arXiv
    2010.04159).
    in_channels: of the four feature maps."""

    def __init__(
        self,
        in_channels,
        hidden_dim=256,
        num_heads=8,
        num_layers=6,
        ffn_dim=1024,
        num_points=4,
    ):
        super().__init__()
        stride_4, *coarser = in_channels
        groups = math.gcd(32, hidden_dim)
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, hidden_dim, 1), nn.GroupNorm(groups, hidden_dim))
            for channels in reversed(coarser)
        )
        self.level_embed = nn.Parameter(torch.empty(len(coarser), hidden_dim))
        self.layers = nn.ModuleList(
            EncoderLayer(hidden_dim, num_heads, ffn_dim, len(coarser), num_points) for _ in range(num_layers)
        )
        self.lateral = nn.Sequential(
            nn.Conv2d(stride_4, hidden_dim, 1, bias=False), nn.GroupNorm(groups, hidden_dim)
        )
        self.output = nn.Sequential(
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, bias=False),
            nn.GroupNorm(groups, hidden_dim),
            nn.ReLU(),
        )
        self.mask_features = nn.Conv2d(hidden_dim, hidden_dim, 1)

        nn.init.normal_(self.level_embed)
        for proj in self.input_proj:
            nn.init.xavier_uniform_(proj[0].weight)
            nn.init.zeros_(proj[0].bias)
        for conv in (self.lateral[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        stride_4, *coarser = features
        levels = [proj(feature) for proj, feature in zip(self.input_proj, reversed(coarser))]
        shapes = [tuple(level.shape[-2:]) for level in levels]
        positions = torch.cat(
            [sine_positions(level).flatten(1).T + embed for level, embed in zip(levels, self.level_embed)]
        )  # (S, C)
        dtype = self.level_embed.dtype
        reference_points = torch.cat(
            [pixel_centres(H, W, stride_4.device, dtype) for H, W in shapes]
        )  # (S, 2)

        x = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)  # (B, S, C)
        for layer in self.layers:
            x = layer(x, positions, reference_points, shapes)
        parts = x.split([H * W for H, W in shapes], dim=1)
        levels = [part.unflatten(1, shape).permute(0, 3, 1, 2) for part, shape in zip(parts, shapes)]

        stride_8 = resize(levels[-1], stride_4.shape[-2:])
        return self.mask_features(self.output(self.lateral(stride_4) + stride_8)), levels


class EncoderLayer(nn.Module):
    """Of the pixel decoder: multi-scale deformable self-attention, in which every position of every level is
    a query, then a feed-forward network, each with a residual and a norm behind it."""

    def __init__(self, hidden_dim, num_heads, ffn_dim, num_levels, num_points):
        super().__init__()
        self.self_attn = MSDeformAttn(hidden_dim, num_heads, num_levels, num_points)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.ffn = FeedForward(hidden_dim, ffn_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)

    def forward(self, x, positions, reference_points, spatial_shapes):
        x = self.norm1(x + self.self_attn(x + positions, reference_points, x, spatial_shapes))
        return self.norm2(x + self.ffn(x))


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention: each query looks at P points of every level, which it chooses
    around its reference point (here the place of the query in the image).

    query (B, N, C), reference_points (N, 2) as (x, y) in [0, 1], value (B, S, C), spatial_shapes
    [(H_l, W_l)] -> (B, N, C)"""

    def __init__(self, hidden_dim=256, num_heads=8, num_levels=3, num_points=4):
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim {hidden_dim} must be a multiple of num_heads {num_heads}")
        self.sizes = num_heads, num_levels, num_points
        self.sampling_offsets = Linear(hidden_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = Linear(hidden_dim, num_heads * num_levels * num_points)
        self.value_proj = Linear(hidden_dim, hidden_dim)
        self.output_proj = Linear(hidden_dim, hidden_dim)

        # At first each head looks in a direction of its own, 1, 2, ... P pixels far, all points alike.
        angles = torch.arange(num_heads) * (2 * math.pi / num_heads)
        ring = torch.stack([angles.cos(), angles.sin()], dim=-1)
        ring = ring / ring.abs().amax(dim=-1, keepdim=True)  # (M, 2), on the unit square
        offsets = ring[:, None, None, :] * torch.arange(1, num_points + 1).view(1, 1, -1, 1)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.data = offsets.expand(-1, num_levels, -1, -1).reshape(-1).clone()
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for proj in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(proj.weight)
            nn.init.zeros_(proj.bias)

    def forward(self, query, reference_points, value, spatial_shapes):
        (B, N, C), (M, L, P) = query.shape, self.sizes
        value = self.value_proj(value).view(B, -1, M, C // M)
        # A bfloat16 offset would be off by up to 0.06 pixels: under autocast too this is fp32.
        with torch.autocast(query.device.type, enabled=False):
            query = query.to(self.sampling_offsets.weight.dtype)
            sizes = torch.tensor([(W, H) for H, W in spatial_shapes], dtype=query.dtype)
            sizes = sizes.to(query.device, non_blocking=True)[:, None].expand(M, L, P, 2).reshape(-1)
            offsets = (self.sampling_offsets(query) / sizes).view(B, N, M, L, P, 2)
            locations = reference_points[:, None, None, None, :] + offsets  # (B, N, M, L, P, 2)
            weights = self.attention_weights(query).view(B, N, M, L * P).transpose(2, 3)
            weights = weights.contiguous().softmax(2)  # not last: CPUs are slow on a short last dimension
            weights = weights.transpose(2, 3).unflatten(3, (L, P))
        return self.output_proj(ms_deform_attn(value, spatial_shapes, locations, weights))


def ms_deform_attn(value: Tensor, spatial_shapes, sampling_locations: Tensor, attention_weights: Tensor):
    """The core of multi-scale deformable attention: a weighted sum of bilinear samples (Deformable DETR,
    equation 3).

    value: (B, S, M, D), the levels one after the other, each row by row. spatial_shapes: [(H_l, W_l)] of
    the levels.
    sampling_locations: (B, N, M, L, P, 2) as (x, y); 0 and 1 are the outer edges of a level, what lies
    outside counts as zero.
    attention_weights: (B, N, M, L, P).
    Returns (B, N, M * D)."""
    if sum(H * W for H, W in spatial_shapes) != value.shape[1]:
        raise ValueError(
            f"value has {value.shape[1]} positions, spatial_shapes {list(spatial_shapes)} do not"
        )
    if triton_attention and value.is_cuda and torch.cuda.get_device_capability(value.device) >= (8, 0):
        return triton_attention(value, spatial_shapes, sampling_locations, attention_weights)
    value = value.to(sampling_locations.dtype)
    return DeformableSum.apply(value, sampling_locations, attention_weights, spatial_shapes)


class DeformableSum(torch.autograd.Function):
    """`ms_deform_attn` as the product of a sparse matrix with the value: a row of it is a query and a head,
    a column a position of a level and a head, and every sample puts four bilinear weights into its row. The
    matrix is made again for the backward pass, so that nothing is kept but the arguments."""

    @staticmethod
    def forward(ctx, value, locations, weights, spatial_shapes):
        ctx.save_for_backward(value, locations, weights)
        ctx.canvas = canvas = Canvas(spatial_shapes, value.shape[2])
        outputs = []
        for v, where, a in zip(value, locations, weights):  # an image's part fits the cache
            rows = canvas.draw(v)
            index, x, y, _ = canvas.corners(where)
            shares = bilinear(a.reshape(index.shape), x, y)
            parts = (
                F.embedding_bag(index, rows[shift:], per_sample_weights=share, mode="sum")
                for shift, share in zip(canvas.shifts, shares)
            )
            total = next(parts)
            for part in parts:
                total += part
            outputs.append(total.view(where.shape[0], -1))  # (N * M, D) -> (N, M * D)
        return torch.stack(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        canvas, grads = ctx.canvas, []
        for v, where, weights, grad in zip(*ctx.saved_tensors, grad_output):
            rows, grad = canvas.draw(v), grad.reshape(-1, v.shape[-1])  # (N * M, D)
            index, x, y, per_location = canvas.corners(where)
            a = weights.reshape(index.shape)
            # By the four entries of each sample: the output's gradient times the corner's row.
            g00, g10, g01, g11 = (products(grad, index, rows[shift:]) for shift in canvas.shifts)
            upper, lower = g00.lerp(g10, x), g01.lerp(g11, x)
            grad_weights = upper.lerp(lower, y)
            grad_x, grad_y = a * (g10 - g00).lerp(g11 - g01, y), a * (lower - upper)
            grad_where = torch.stack([grad_x, grad_y], dim=-1).view_as(per_location) * per_location
            # The transposed product: a position sums over the samples with their upper left corner there.
            positions, order = index.flatten().sort()
            bags, first = (order // index.shape[1]).int(), torch.arange(len(rows), device=rows.device).int()
            first = torch.searchsorted(positions, first, out_int32=True)
            grad_rows = torch.zeros_like(rows)
            for shift, share in zip(canvas.shifts, bilinear(a, x, y)):
                share = share.flatten().index_select(0, order)
                part = F.embedding_bag(bags, grad, first, per_sample_weights=share, mode="sum")
                grad_rows[shift:] += part[: len(rows) - shift]
            grads.append((canvas.cut(grad_rows), grad_where.view_as(where), grad_weights.view_as(weights)))
        return *map(torch.stack, zip(*grads)), None


class Canvas:
    """The levels of an image stacked vertically, each within a border of zeros. Samples outside a level read
    that border, and the four corners of any sample are always `shifts` rows apart. A row is a position and a
    head, (D,)."""

    def __init__(self, spatial_shapes, M):
        self.spatial_shapes, self.M = [tuple(shape) for shape in spatial_shapes], M
        self.width = 2 + max(W for H, W in self.spatial_shapes)
        self.shifts = 0, M, self.width * M, (self.width + 1) * M

    def draw(self, value: Tensor) -> Tensor:  # (S, M, D) -> (rows, D)
        parts = value.flatten(1).split([H * W for H, W in self.spatial_shapes])
        parts = [
            F.pad(part.view(H, W, -1), (0, 0, 1, self.width - W - 1, 1, 1))
            for part, (H, W) in zip(parts, self.spatial_shapes)
        ]
        return torch.cat(parts).view(-1, value.shape[2])

    def cut(self, rows: Tensor) -> Tensor:  # (rows, D) -> (S, M, D)
        lines = rows.view(-1, self.width, self.M, rows.shape[1])
        parts = lines.split([H + 2 for H, W in self.spatial_shapes])
        return torch.cat([p[1:-1, 1 : W + 1].flatten(0, 1) for p, (H, W) in zip(parts, self.spatial_shapes)])

    def corners(self, locations: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(N, M, L, P, 2) -> the row of each sample's upper left corner, (N * M, L * P) int32; how far the
        sample is from there in x and in y, in [0, 1], likewise; and the derivative of the last two by the
        locations, (N, M * L * P * 2)."""
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
        inside = pixels.clamp(torch.full_like(sizes, -1), sizes).nan_to_num(-1)  # beyond there is only zero
        per_location = torch.where(inside == pixels, sizes, 0)
        corner = inside.floor().minimum(sizes - 1)
        x, y = (inside - corner).view(-1, L * P, 2).unbind(-1)
        column, line = corner.int().view(N, -1, 2).unbind(-1)
        index = line * (self.width * M) + column * M + starts.expand(M, L, P).reshape(-1)
        return index.view(-1, L * P), x.contiguous(), y.contiguous(), per_location


def bilinear(weights: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each weight, divided among the corners (0, 0), (1, 0), (0, 1), (1, 1) of a pixel in which the sample
    is at (x, y)."""
    right, lower = weights * x, weights * y
    lower_right = right * y
    upper_right = right - lower_right
    return weights - lower - upper_right, upper_right, lower - lower_right, lower_right


def products(left: Tensor, index: Tensor, right: Tensor) -> Tensor:
    """(n, D), (n, k) rows of right, (m, D) -> (n, k): the dot products left[i] @ right[index[i, j]]."""
    if left.device.type != "cpu":
        return (F.embedding(index, right) * left[:, None]).sum(-1)
    n, k = index.shape
    first = torch.arange(0, n * k + 1, k, dtype=torch.int32)
    zeros, size = left.new_zeros(n * k), (n, len(right))
    wanted = torch.sparse_csr_tensor(first, index.flatten(), zeros, size, check_invariants=False)
    return torch.sparse.sampled_addmm(wanted, left, right.T, beta=0).values().view(n, k)


def pixel_centres(H: int, W: int, device=None, dtype=None) -> Tensor:
    """(H * W, 2): the centre of each pixel, row by row, as (x, y) in [0, 1]."""
    y = (torch.arange(H, device=device, dtype=dtype) + 0.5) / H
    x = (torch.arange(W, device=device, dtype=dtype) + 0.5) / W
    return torch.stack([x.expand(H, W), y[:, None].expand(H, W)], dim=-1).flatten(0, 1)


def sine_positions(feature: Tensor, temperature: float = 10000.0) -> Tensor:
    """The sine position embedding of DETR for a feature map (B, C, H, W) -> (C, H, W): y in the first C/2
    channels, x in the others."""
    C, H, W = feature.shape[1:]
    how = {"device": feature.device, "dtype": torch.promote_types(feature.dtype, torch.float32)}
    index = torch.arange(C // 2, **how)
    frequency = temperature ** (2 * (index // 2) / (C // 2))

    def embed(size):  # (size, C/2): sines in the even channels, cosines in the odd ones
        position = torch.arange(1, size + 1, **how) / (size + 1e-6) * (2 * math.pi)
        angle = position[:, None] / frequency
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)

    y = embed(H).T[:, :, None].expand(-1, H, W)
    x = embed(W).T[:, None, :].expand(-1, H, W)
    return torch.cat([y, x])


# --------------------------------------------------------------------------------------- transformer decoder


class TransformerDecoder(nn.Module):
    """Learned queries read the levels in turn, each only where its last mask was, and predict a class and a
    mask after every layer.

    Sections 3.2.1 to 3.2.3 of the paper. levels: [stride 32, 16, 8], each (B, C, H_l, W_l); mask_features:
    (B, C, h, w). Returns what `Mask2Former` returns."""

    def __init__(
        self,
        num_classes,
        num_queries=100,
        hidden_dim=256,
        num_heads=8,
        num_layers=9,
        ffn_dim=2048,
        num_levels=3,
    ):
        super().__init__()
        self.query_features = nn.Embedding(num_queries, hidden_dim)
        self.query_positions = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(num_levels, hidden_dim)
        self.layers = nn.ModuleList(DecoderLayer(hidden_dim, num_heads, ffn_dim) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.class_head = nn.Linear(hidden_dim, num_classes + 1)  # the last one is "no object"
        self.mask_head = nn.Sequential(
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
        )

    def forward(self, levels: list[Tensor], mask_features: Tensor) -> dict:
        B = mask_features.shape[0]
        memories = [
            level.flatten(2).transpose(1, 2) + embed for level, embed in zip(levels, self.level_embed.weight)
        ]  # (B, H_l * W_l, C)
        keys = [
            memory + sine_positions(level).flatten(1).T.to(memory.dtype)
            for memory, level in zip(memories, levels)
        ]
        queries = self.query_features.weight.expand(B, -1, -1)  # (B, Q, C)
        query_positions = self.query_positions.weight

        # A mask is wanted at the size of a level: resizing and the product with the features commute.
        resized = [resize(mask_features.detach(), level.shape[-2:]) for level in levels]

        predictions = [self.predict(queries, mask_features)]
        for index, layer in enumerate(self.layers):
            level = index % len(levels)
            attend = attention_mask(predictions[-1]["mask_embed"], resized[level])
            queries = layer(queries, query_positions, keys[level], memories[level], attend)
            predictions.append(self.predict(queries, mask_features))
        return Prediction(predictions[-1], aux_outputs=predictions[:-1])

    def predict(self, queries: Tensor, mask_features: Tensor) -> "Prediction":
        queries = self.norm(queries)
        return Prediction(
            pred_logits=self.class_head(queries),
            mask_embed=self.mask_head(queries),
            mask_features=mask_features,
        )


class Prediction(dict):
    """What the queries predict: "pred_logits" (B, Q, K+1), "mask_embed" (B, Q, C), "mask_features"
    (B, C, h, w), and "pred_masks" (B, Q, h, w), the product of these two, which is made when it is first
    read as prediction["pred_masks"]: the losses of matcher.py want it of the few matched queries only. Until
    then it is not among the keys, and get("pred_masks") is None."""

    def __missing__(self, name: str) -> Tensor:
        if name != "pred_masks":
            raise KeyError(name)
        self[name] = torch.einsum("bqc,bchw->bqhw", self["mask_embed"], self["mask_features"])
        return self[name]


def attention_mask(mask_embed: Tensor, mask_features: Tensor) -> Tensor:
    """(B, Q, C) and (B, C, H_l, W_l) -> (B, 1, Q, H_l * W_l) bool for every head: True where a query may
    attend, which is where its mask is at least 0.5, or everywhere if that is nowhere. No gradient flows
    through it (section 3.2.1)."""
    mask_logits = mask_embed.detach() @ mask_features.detach().flatten(2)
    attend = mask_logits.float().sigmoid() >= 0.5
    return (attend | ~attend.any(dim=-1, keepdim=True)).unsqueeze(1)


class DecoderLayer(nn.Module):
    """Masked cross-attention to a level, self-attention among the queries, feed-forward; each with a
    residual and a norm behind it."""

    def __init__(self, hidden_dim, num_heads, ffn_dim):
        super().__init__()
        self.cross_attn = Attention(hidden_dim, num_heads)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.self_attn = Attention(hidden_dim, num_heads)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.ffn = FeedForward(hidden_dim, ffn_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)

    def forward(self, x, query_positions, key, value, attend):
        x = self.norm1(x + self.cross_attn(x + query_positions, key, value, attend))
        query = x + query_positions
        x = self.norm2(x + self.self_attn(query, query, x))
        return self.norm3(x + self.ffn(x))


class Attention(nn.Module):
    """Multi-head attention of nn.MultiheadAttention's parameters, query (B, N, C), key and value (B, S, C) ->
    (B, N, C); attend: (B, 1, N, S) bool, True where allowed."""

    def __init__(self, hidden_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_dim, hidden_dim))  # query, key, value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_dim))
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query, key, value, attend=None):
        projections = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        heads = [
            linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in projections
        ]  # three of (B, M, N or S, D)
        output = F.scaled_dot_product_attention(*heads, attn_mask=attend)
        return self.out_proj(output.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Linear, ReLU, linear."""

    def __init__(self, hidden_dim, ffn_dim):
        super().__init__(Linear(hidden_dim, ffn_dim), nn.ReLU(), Linear(ffn_dim, hidden_dim))
        nn.init.xavier_uniform_(self[0].weight)
        nn.init.xavier_uniform_(self[2].weight)

    def forward(self, x: Tensor) -> Tensor:
        first, _, second = self  # the ReLU in place where no graph is wanted
        return second(F.relu(first(x), inplace=not torch.is_grad_enabled()))


# ------------------------------------------------------------------------------------ weights of other code

# Names of the same parameter: here | in the official code | in Hugging Face's files. Lines that are not
# indented are prefixes of those below. # is a number and @ a word that all three share, as is what follows a
# name (.weight, .bias, ...). {q,k,v} are three parameters that are one elsewhere.
_NAMES = """
pixel_decoder. | sem_seg_head.pixel_decoder. | model.pixel_level_module.decoder.
    input_proj.#.#        | input_proj.#.#          | input_projections.#.#
    level_embed           | transformer.level_embed | level_embed
    lateral.0             | adapter_1               | adapter_1.0
    lateral.1             | adapter_1.norm          | adapter_1.1
    output.0              | layer_1                 | layer_1.0
    output.1              | layer_1.norm            | layer_1.1
    mask_features         | mask_features           | mask_projection
pixel_decoder. | sem_seg_head.pixel_decoder.transformer.encoder. | model.pixel_level_module.decoder.encoder.
    layers.#.self_attn.@  | layers.#.self_attn.@    | layers.#.self_attn.@
    layers.#.norm1        | layers.#.norm1          | layers.#.self_attn_layer_norm
    layers.#.ffn.0        | layers.#.linear1        | layers.#.fc1
    layers.#.ffn.2        | layers.#.linear2        | layers.#.fc2
    layers.#.norm2        | layers.#.norm2          | layers.#.final_layer_norm
decoder. | sem_seg_head.predictor. | model.transformer_module.
    query_features        | query_feat              | queries_features
    query_features        | static_query            | queries_features
    query_positions       | query_embed             | queries_embedder
    level_embed           | level_embed             | level_embed
    norm                  | decoder_norm            | decoder.layernorm
    mask_head.0           | mask_embed.layers.0     | decoder.mask_predictor.mask_embedder.0.0
    mask_head.2           | mask_embed.layers.1     | decoder.mask_predictor.mask_embedder.1.0
    mask_head.4           | mask_embed.layers.2     | decoder.mask_predictor.mask_embedder.2.0
decoder. | sem_seg_head.predictor. |
    class_head            | class_embed             | class_predictor
decoder.layers.#. | sem_seg_head.predictor.transformer_cross_attention_layers.#. | model.transformer_module.decoder.layers.#.
    cross_attn            | multihead_attn          | cross_attn
    cross_attn.out_proj   | multihead_attn.out_proj | cross_attn.out_proj
    norm1                 | norm                    | cross_attn_layer_norm
decoder.layers.#. | sem_seg_head.predictor.transformer_self_attention_layers.#. | model.transformer_module.decoder.layers.#.
    self_attn.in_proj_weight | self_attn.in_proj_weight | self_attn.{q,k,v}_proj.weight
    self_attn.in_proj_bias   | self_attn.in_proj_bias   | self_attn.{q,k,v}_proj.bias
    self_attn.out_proj    | self_attn.out_proj      | self_attn.out_proj
    norm2                 | norm                    | self_attn_layer_norm
decoder.layers.#. | sem_seg_head.predictor.transformer_ffn_layers.#. | model.transformer_module.decoder.layers.#.
    ffn.0                 | linear1                 | fc1
    ffn.2                 | linear2                 | fc2
    norm3                 | norm                    | final_layer_norm
backbone.body. | backbone. | model.pixel_level_module.encoder._backbone.
    conv1                 | stem.conv1              | conv1
    bn1                   | stem.conv1.norm         | bn1
    layer<n>.#.conv#      | res<n+1>.#.conv#        | layer<n>.#.conv#
    layer<n>.#.bn#        | res<n+1>.#.conv#.norm   | layer<n>.#.bn#
    layer<n>.#.downsample.0 | res<n+1>.#.shortcut   | layer<n>.#.downsample.0
    layer<n>.#.downsample.1 | res<n+1>.#.shortcut.norm | layer<n>.#.downsample.1
backbone. | backbone. | model.pixel_level_module.encoder.
    body.patch_embed.proj | patch_embed.proj        | embeddings.patch_embeddings.projection
    body.patch_embed.norm | patch_embed.norm        | embeddings.norm
    body.layers_<n>.downsample.@ | layers.<n-1>.downsample.@ | encoder.layers.<n-1>.downsample.@
    norms.<n>             | norm<n>                 | hidden_states_norms.stage<n+1>
backbone.body.layers_#.blocks.#. | backbone.layers.#.blocks.#. | model.pixel_level_module.encoder.encoder.layers.#.blocks.#.
    norm1                 | norm1                   | layernorm_before
    norm2                 | norm2                   | layernorm_after
    attn                  | attn                    | attention.self
    attn.qkv.weight       | attn.qkv.weight         | attention.self.{query,key,value}.weight
    attn.qkv.bias         | attn.qkv.bias           | attention.self.{query,key,value}.bias
    attn.proj             | attn.proj               | attention.output.dense
    mlp.fc1               | mlp.fc1                 | intermediate.dense
    mlp.fc2               | mlp.fc2                 | output.dense
"""  # noqa: E501
OURS, OFFICIAL, HUGGING_FACE = 0, 1, 2  # columns
# Such files hold besides: constants, counters, and a last norm of Swin that nothing uses.
_NO_PARAMETERS = re.compile(
    r".*\.(num_batches_tracked|relative_position_index)|criterion\.empty_weight|pixel_(mean|std)"
    r"|model\.pixel_level_module\.encoder\.(swin\.)?layernorm\.(weight|bias)"
)


def convert_state_dict(state_dict: dict) -> dict:
    """A state dictionary of the official Mask2Former or in Hugging Face's form -> one of `Mask2Former`, for
    ResNet and Swin backbones. Raises ValueError for a name that it does not know."""
    if any(name.startswith("sem_seg_head.") for name in state_dict):
        return translate_state_dict(state_dict, OFFICIAL, OURS)
    if any(name.startswith("model.pixel_level_module.") for name in state_dict):
        return translate_state_dict(state_dict, HUGGING_FACE, OURS)
    raise ValueError("these are neither the official Mask2Former's parameters nor Hugging Face's")


def translate_state_dict(state_dict: dict, source: int, target: int) -> dict:
    """From the names of one column of _NAMES to those of another. Raises ValueError for a name that is not
    there."""
    rules = []
    for row in _name_rows():
        for part, name in enumerate(_expand(row[source])):
            pattern = re.escape(name).replace(r"\#", r"(\d+)").replace("@", r"(\w+)") + r"(\.\w+)?"
            rules.append((re.compile(pattern), _expand(row[target]), part if "{" in row[source] else None))
    result, merged = {}, {}
    for name, value in state_dict.items():
        if _NO_PARAMETERS.fullmatch(name):
            continue
        found = [(pattern.fullmatch(name), *rule) for pattern, *rule in rules if pattern.fullmatch(name)]
        if not found:
            raise ValueError(f"unknown parameter {name!r}")
        match, targets, part = found[0]
        *words, ending = match.groups(default="")
        names = [re.sub("[#@]", "{}", target).format(*words) + ending for target in targets]
        if len(names) > 1:  # one becomes q, k, v
            result.update(zip(names, value.chunk(len(names))))
        elif part is not None:  # q, k, v become one
            merged.setdefault(names[0], {})[part] = value
        else:
            result[names[0]] = value
    for name, parts in merged.items():
        if len(parts) < 3:
            raise ValueError(f"one of the three parameters that make {name!r} is missing")
        result[name] = torch.cat([parts[part] for part in range(3)])
    return result


def _name_rows() -> list[list[str]]:
    """_NAMES with the prefixes put before, a row for each n of <n>."""
    rows, prefixes = [], []
    for line in _NAMES.strip().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if not line.startswith(" "):
            prefixes = cells
            continue
        for n in range(5) if "<n" in line else [0]:
            numbered = [re.sub(r"<n([+-]1)?>", lambda m, n=n: str(n + int(m[1] or 0)), c) for c in cells]
            rows.append([prefix + cell for prefix, cell in zip(prefixes, numbered)])
    return rows


def _expand(name: str) -> list[str]:
    """ "a.{q,k,v}.b" -> ["a.q.b", "a.k.b", "a.v.b"]; a name without braces stays one."""
    match = re.search(r"{(.*)}", name)
    return [name.replace(match[0], word) for word in match[1].split(",")] if match else [name]
