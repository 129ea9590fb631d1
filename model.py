"""Mask2Former (Cheng et al., CVPR 2022, arXiv 2112.01527) for instance segmentation, in plain PyTorch.

    model = Mask2Former(num_classes=80, backbone="resnet50", pretrained=True)
    outputs = model(images)                 # (B, 3, H, W) RGB, 0..255, any H and W

Three parts, each a module of its own: a timm backbone gives feature maps at strides 4, 8, 16, 32; the
`PixelDecoder` mixes the upper three by multi-scale deformable attention and makes mask features at stride
4; the `TransformerDecoder` turns learned queries into class logits and mask logits. This file needs torch
and timm and can be copied out alone. Where the paper is silent the numerics follow the official code
(facebookresearch/Mask2Former at 9b0651c).

Letters in shapes: B images, C hidden_dim, H W pixels of the padded image, h w = H/4 W/4, K classes, Q
queries, M heads, D = C/M, L levels (strides 32, 16, 8 in this order), P points, S = sum of H_l * W_l over
levels, N queries of an attention."""

import math

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (4, 8, 16, 32)
BACKBONES = {  # the paper's names, and the timm models with the paper's pretraining
    "resnet50": "resnet50.tv_in1k",
    "resnet101": "resnet101.tv_in1k",
    "swin_t": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_s": "swin_small_patch4_window7_224.ms_in1k",
    "swin_b": "swin_base_patch4_window12_384.ms_in22k",
    "swin_l": "swin_large_patch4_window12_384.ms_in22k",
}


class Mask2Former(nn.Module):
    """Images in, a class and a mask for each of Q queries out.

    num_classes: K, without "no object", which is the last class logit (index K).
    backbone: a name of BACKBONES or any timm model with feature maps at strides 4, 8, 16 and 32.
    pretrained: start from timm's ImageNet weights (downloads), or from `backbone_weights`, a local file of
    timm's names.
    norm: what becomes of the backbone's batch norms: "frozen" (fixed statistics, the usual choice with
        pretraining), "batch" (trained; engine.py synchronises them over GPUs), or "group" (group norm: for
        training from scratch with any batch).
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
        channels = self.backbone.feature_info.channels()
        self.pixel_decoder = PixelDecoder(channels, hidden_dim, num_heads, encoder_layers, encoder_ffn)
        self.decoder = TransformerDecoder(
            num_classes, num_queries, hidden_dim, num_heads, decoder_layers, decoder_ffn
        )
        config = timm.data.resolve_model_data_config(self.backbone)
        mean = pixel_mean or [255 * value for value in config["mean"]]
        std = pixel_std or [255 * value for value in config["std"]]
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> dict:
        """images: (B, 3, H, W) RGB, uint8 or float in 0..255.

        Returns "pred_logits" (B, Q, K+1) class logits, "pred_masks" (B, Q, h, w) mask logits at stride 4 of
        the image padded right and below to multiples of 32 (h = 8 * ceil(H / 32)), and "aux_outputs": the
        same two for each earlier prediction, the first from the queries before any layer."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), found {tuple(images.shape)}")
        images = (images - self.pixel_mean) / self.pixel_std
        images = F.pad(images, (0, -images.shape[3] % 32, 0, -images.shape[2] % 32))
        features = self.backbone(images)
        if getattr(self.backbone, "output_fmt", "NCHW") == "NHWC":  # Swin
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        mask_features, levels = self.pixel_decoder(features)
        return self.decoder(levels, mask_features)


def build_backbone(name, pretrained=False, weights=None, norm="frozen", **kwargs) -> nn.Module:
    """A timm model that returns its feature maps at strides 4, 8, 16, 32 as a list."""
    name = BACKBONES.get(name, name)
    if not timm.is_model(name):
        raise ValueError(f"unknown backbone {name!r}: one of {', '.join(BACKBONES)}, or any timm model")
    if name.startswith("swin"):
        kwargs = {"strict_img_size": False, **kwargs}  # any image size, not only that of the pretraining
    with torch.device("meta"):  # a look at the strides, without weights
        strides = timm.create_model(name, features_only=True, **kwargs).feature_info.reduction()
    if not set(STRIDES) <= set(strides):
        raise ValueError(f"backbone {name!r} has feature maps at strides {strides}, needed are {STRIDES}")
    indices = [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES]  # the last map of each
    if weights is not None:
        pretrained, kwargs["pretrained_cfg_overlay"] = True, {"file": weights}
    backbone = timm.create_model(
        name, pretrained=pretrained, features_only=True, out_indices=indices, **kwargs
    )
    if norm == "frozen":
        backbone = timm.layers.freeze_batch_norm_2d(backbone)
    elif norm == "group":
        _replace_batch_norm(backbone)
    elif norm != "batch":
        raise ValueError(f"unknown norm {norm!r}: one of frozen, batch, group")
    return backbone


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

    Section 3.2.1 of the paper; the encoder is that of Deformable DETR (Zhu et al., ICLR 2021, arXiv
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
        mask_dim=None,
    ):
        super().__init__()
        stride_4, *upper = in_channels
        groups = math.gcd(32, hidden_dim)
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, hidden_dim, 1), nn.GroupNorm(groups, hidden_dim))
            for channels in reversed(upper)
        )
        self.level_embed = nn.Parameter(torch.empty(len(upper), hidden_dim))
        self.layers = nn.ModuleList(
            EncoderLayer(hidden_dim, num_heads, ffn_dim, len(upper), num_points) for _ in range(num_layers)
        )
        self.lateral = nn.Sequential(
            nn.Conv2d(stride_4, hidden_dim, 1, bias=False), nn.GroupNorm(groups, hidden_dim)
        )
        self.output = nn.Sequential(
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, bias=False),
            nn.GroupNorm(groups, hidden_dim),
            nn.ReLU(),
        )
        self.mask_features = nn.Conv2d(hidden_dim, mask_dim or hidden_dim, 1)

        nn.init.normal_(self.level_embed)
        for proj in self.input_proj:
            nn.init.xavier_uniform_(proj[0].weight)
            nn.init.zeros_(proj[0].bias)
        for conv in (self.lateral[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        stride_4, *upper = features
        levels = [proj(feature) for proj, feature in zip(self.input_proj, reversed(upper))]
        shapes = [tuple(level.shape[-2:]) for level in levels]
        positions = torch.cat(
            [sine_positions(level).flatten(1).T + embed for level, embed in zip(levels, self.level_embed)]
        )  # (S, C)
        reference_points = torch.cat([pixel_centres(H, W, stride_4.device) for H, W in shapes])  # (S, 2)

        x = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)  # (B, S, C)
        for layer in self.layers:
            x = layer(x, positions, reference_points, shapes)
        parts = x.split([H * W for H, W in shapes], dim=1)
        levels = [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes)]

        stride_8 = F.interpolate(levels[-1], size=stride_4.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_features(self.output(self.lateral(stride_4) + stride_8)), levels


class EncoderLayer(nn.Module):
    """Multi-scale deformable self-attention, then a feed-forward network, each with a residual and a norm
    behind it."""

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
    around its reference point.

    query (B, N, C), reference_points (N, 2) or (B, N, L, 2) as (x, y) in [0, 1], value (B, S, C),
    spatial_shapes [(H_l, W_l)] -> (B, N, C)"""

    def __init__(self, hidden_dim=256, num_heads=8, num_levels=3, num_points=4):
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim {hidden_dim} must be a multiple of num_heads {num_heads}")
        self.sizes = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(hidden_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(hidden_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)

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
            offsets = self.sampling_offsets(query).view(B, N, M, L, P, 2)
            weights = self.attention_weights(query).view(B, N, M, L * P).softmax(-1).view(B, N, M, L, P)
            sizes = torch.tensor([(W, H) for H, W in spatial_shapes], dtype=query.dtype, device=query.device)
            if reference_points.ndim == 4:
                reference_points = reference_points[:, :, None, :, None, :]
            else:
                reference_points = reference_points[:, None, None, None, :]
            locations = reference_points + offsets / sizes[:, None, :]  # (B, N, M, L, P, 2)
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
    B, S, M, D = value.shape
    N, L = sampling_locations.shape[1], len(spatial_shapes)
    if sum(H * W for H, W in spatial_shapes) != S:
        raise ValueError(f"value has {S} positions, spatial_shapes {list(spatial_shapes)} do not")
    grid = (2 * sampling_locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B * M, N, P, 2)
    weights = attention_weights.permute(3, 0, 2, 1, 4).reshape(L, B * M, 1, N, -1)
    values = value.permute(0, 2, 3, 1).flatten(0, 1).split([H * W for H, W in spatial_shapes], dim=-1)
    output = 0
    for level, (H, W) in enumerate(spatial_shapes):
        samples = F.grid_sample(
            values[level].unflatten(-1, (H, W)), grid[level].to(value.dtype), align_corners=False
        )
        output = output + (samples * weights[level]).sum(-1)  # (B * M, D, N, P) -> (B * M, D, N)
    return output.view(B, M * D, N).transpose(1, 2)


def pixel_centres(H: int, W: int, device=None) -> Tensor:
    """(H * W, 2): the centre of each pixel, row by row, as (x, y) in [0, 1]."""
    y = (torch.arange(H, device=device) + 0.5) / H
    x = (torch.arange(W, device=device) + 0.5) / W
    return torch.stack([x.expand(H, W), y[:, None].expand(H, W)], dim=-1).flatten(0, 1)


def sine_positions(feature: Tensor, temperature: float = 10000.0) -> Tensor:
    """The sine position embedding of DETR for a feature map (B, C, H, W) -> (C, H, W): y in the first C/2
    channels, x in the others."""
    C, H, W = feature.shape[1:]
    index = torch.arange(C // 2, device=feature.device)
    frequency = temperature ** (2 * (index // 2) / (C // 2))

    def embed(size):  # (size, C/2): sines in the even channels, cosines in the odd ones
        position = torch.arange(1, size + 1, device=feature.device) / (size + 1e-6) * (2 * math.pi)
        angle = position[:, None] / frequency
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)

    y = embed(H).T[:, :, None].expand(-1, H, W)
    x = embed(W).T[:, None, :].expand(-1, H, W)
    return torch.cat([y, x])


# --------------------------------------------------------------------------------------- transformer decoder


class TransformerDecoder(nn.Module):
    """Learned queries read the levels in turn, each only where its last mask was, and predict a class and a
    mask after every layer.

    Section 3.2.1 and 3.2.2 of the paper. levels: [stride 32, 16, 8], each (B, C, H_l, W_l); mask_features:
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
        mask_dim=None,
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
            nn.Linear(hidden_dim, mask_dim or hidden_dim),
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

        predictions = [self.predict(queries, mask_features)]
        for index, layer in enumerate(self.layers):
            level = index % len(levels)
            attend = attention_mask(predictions[-1]["pred_masks"], levels[level].shape[-2:])
            queries = layer(queries, query_positions, keys[level], memories[level], attend)
            predictions.append(self.predict(queries, mask_features))
        return {**predictions[-1], "aux_outputs": predictions[:-1]}

    def predict(self, queries: Tensor, mask_features: Tensor) -> dict:
        queries = self.norm(queries)
        mask_embed = self.mask_head(queries)
        return {
            "pred_logits": self.class_head(queries),
            "pred_masks": torch.einsum("bqc,bchw->bqhw", mask_embed, mask_features),
        }


def attention_mask(mask_logits: Tensor, size) -> Tensor:
    """(B, Q, h, w) mask logits -> (B, 1, Q, H_l * W_l) bool for every head: True where a query may attend,
    which is where its mask is at least 0.5, or everywhere if that is nowhere. No gradient flows through it
    (section 3.2.1)."""
    mask_logits = F.interpolate(mask_logits.detach().float(), size=size, mode="bilinear", align_corners=False)
    attend = (mask_logits.sigmoid() >= 0.5).flatten(2)
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
    """Multi-head attention, query (B, N, C), key and value (B, S, C) -> (B, N, C); attend: (B, 1, N, S)
    bool, True where allowed."""

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
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in projections
        ]  # three of (B, M, N or S, D)
        output = F.scaled_dot_product_attention(*heads, attn_mask=attend)
        return self.out_proj(output.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Linear, ReLU, linear."""

    def __init__(self, hidden_dim, ffn_dim):
        super().__init__(nn.Linear(hidden_dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, hidden_dim))
        nn.init.xavier_uniform_(self[0].weight)
        nn.init.xavier_uniform_(self[2].weight)
