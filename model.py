"""Mask2Former (Cheng et al., CVPR 2022, arXiv 2112.01527) for instance segmentation, in plain PyTorch.

    import torch
    from model import Mask2Former

    model = Mask2Former(num_classes=80, backbone="resnet50")  # pretrained=True downloads ImageNet weights
    images = torch.randint(0, 256, (1, 3, 200, 300))          # (B, 3, H, W) RGB in 0..255, any H and W
    outputs = model(images)
    assert outputs["pred_logits"].shape == (1, 100, 81)       # (B, Q, K+1) class logits
    assert outputs["pred_masks"].shape == (1, 100, 56, 80)    # (B, Q, h, w) mask logits

The model has three parts. A timm backbone computes feature maps at strides 4, 8, 16, 32. The `PixelDecoder`
mixes the three coarser ones, the levels, by multi-scale deformable attention, and computes the mask features
at stride 4. The `TransformerDecoder` updates Q learned queries, which attend to one level after the other.
Before the first layer and after each layer every query predicts class logits and a mask embedding. The mask
logits are the product of mask embeddings and mask features. The last prediction is the result. The earlier
ones, "aux_outputs", are for the loss (deep supervision).

The file needs torch, torchvision and timm and can be copied out alone. deform_attn_cpu.py and
deform_attn_triton.py make it faster if they are in the same folder. Where the paper is silent, the numerics
follow the official code (facebookresearch/Mask2Former at 9b0651c).

Letters in shapes: B images, C hidden_dim, H W pixels of the padded images, h w = H/4 W/4, K classes,
Q queries, M heads, D = C/M, L levels (strides 32, 16, 8 in this order), P points, S = sum of H_l * W_l over
the levels, N queries of an attention layer."""

import functools
import inspect
import math
from collections.abc import Iterator, Mapping

import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

try:
    from deform_attn_triton import ms_deform_attn as ms_deform_attn_triton
except ImportError:  # The file is not there, or Triton is not installed.
    ms_deform_attn_triton = None
try:
    from deform_attn_cpu import linear, prefers_channels_last
    from deform_attn_cpu import ms_deform_attn as ms_deform_attn_cpu
except ImportError:  # The file is not there.
    ms_deform_attn_cpu, linear = None, F.linear

    def prefers_channels_last(x: Tensor) -> bool:
        return False


STRIDES = (4, 8, 16, 32)
BACKBONES = {  # The paper's names, and the timm models with the paper's pretraining.
    "resnet50": "resnet50.tv_in1k",
    "resnet101": "resnet101.tv_in1k",
    "swin_t": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_s": "swin_small_patch4_window7_224.ms_in1k",
    "swin_b": "swin_base_patch4_window12_384.ms_in22k",
    "swin_l": "swin_large_patch4_window12_384.ms_in22k",
    "deit_b": "deit_base_patch16_384.fb_in1k",
    "dinov2_b": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_l": "vit_large_patch14_dinov2.lvd142m",
    # Newer than the paper.
    "dinov3_s": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3_b": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3_l": "vit_large_patch16_dinov3.lvd1689m",
    "dinov3_convnext_t": "convnext_tiny.dinov3_lvd1689m",
    "dinov3_convnext_s": "convnext_small.dinov3_lvd1689m",
    "dinov3_convnext_b": "convnext_base.dinov3_lvd1689m",
    "dinov3_convnext_l": "convnext_large.dinov3_lvd1689m",
}


class Mask2Former(nn.Module):
    """Predict a class and a mask with each of Q queries.

    Args:
        num_classes: K, without "no object", which is the last class logit (index K).
        backbone: a name of BACKBONES, or a timm model. It must take images of any size, and be a plain ViT
            (all feature maps at one stride) or have feature maps at strides 4, 8, 16, 32.
        pretrained: load timm's pretrained weights (downloads them).
        num_queries, hidden_dim, num_heads: Q, C, M. C must be a multiple of 4 and of M.
        encoder_layers, encoder_ffn: deformable attention layers of the pixel decoder, width of their FFN.
        decoder_layers, decoder_ffn: layers of the transformer decoder, width of their FFN.
        norm: the backbone's batch norms. "frozen": statistics and affine parameters keep their pretrained
            values. "batch": they are trained. "group": group norms replace them, for training from scratch.
        backbone_weights: load these instead of a download: a file or a state dict with timm's names.
        backbone_args: further keyword arguments of timm.create_model.
        pixel_mean, pixel_std: three numbers in 0..255, in the order RGB. None takes them from timm's config.

    Raises ValueError for an unknown backbone or norm, or if backbone, weights or hidden_dim do not fit."""

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
        backbone_weights: str | Mapping | None = None,
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

    def forward(self, images: Tensor) -> "Outputs":
        """Normalize the images, pad them right and below with zeros to multiples of 32, and predict.

        images: (B, 3, H, W) RGB, uint8 or float in 0..255, any H and W. Returns `Outputs` with "aux_outputs".
        Its masks are at stride 4 of the padded image: h = 8 * ceil(H / 32)."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), found {tuple(images.shape)}")
        images = (images - self.pixel_mean) / self.pixel_std
        H, W = (32 * ((side + 31) // 32) for side in images.shape[2:])
        images = F.pad(images, (0, W - images.shape[3], 0, H - images.shape[2]))
        if images.is_cuda or prefers_channels_last(images):
            images = images.contiguous(memory_format=torch.channels_last)  # Elsewhere this would be slower.
        mask_features, levels = self.pixel_decoder(self.backbone(images))
        return self.decoder(levels, mask_features)


class Outputs(Mapping):
    """Hold the predictions of the queries: a read-only mapping that computes "pred_masks" when it is read.

    Keys:
        "pred_logits": (B, Q, K+1) class logits; the last one is "no object".
        "pred_masks": (B, Q, h, w) mask logits.
        "mask_embed", "mask_features": (B, Q, C) and (B, C, h, w), the factors of the mask logits.
        "aux_outputs": the `Outputs` of the earlier predictions, the first from the queries before any layer.
            Only the model's result has this key.

    Construct it with the two factors or with pred_masks. The product of the factors is large, and the loss
    needs it for the matched queries only. It is therefore computed at the first access and then kept. Reading
    all items, `dict(outputs)` or `**outputs` computes it too. Use `stored`, a dictionary of what the object
    was constructed with, to split or concatenate outputs without computing masks."""

    def __init__(
        self,
        pred_logits: Tensor,
        mask_embed: Tensor | None = None,
        mask_features: Tensor | None = None,
        pred_masks: Tensor | None = None,
        aux_outputs: list["Outputs"] | None = None,
    ):
        entries = {
            "pred_logits": pred_logits,
            "mask_embed": mask_embed,
            "mask_features": mask_features,
            "pred_masks": pred_masks,
            "aux_outputs": aux_outputs,
        }
        if pred_masks is None and (mask_embed is None or mask_features is None):
            raise ValueError("Outputs needs pred_masks, or mask_embed and mask_features")
        self.stored = {key: value for key, value in entries.items() if value is not None}
        self._pred_masks = pred_masks

    def __getitem__(self, key: str):
        if key != "pred_masks":
            return self.stored[key]
        masks = self._pred_masks
        if masks is None:
            embed, features = self.stored["mask_embed"], self.stored["mask_features"]
            masks = torch.einsum("bqc,bchw->bqhw", embed, features)
            # Masks that were first read under no_grad must not hide the gradient from a later loss.
            if masks.requires_grad or not (embed.requires_grad or features.requires_grad):
                self._pred_masks = masks
        return masks

    def __contains__(self, key: object) -> bool:  # Mapping's own would read the entry.
        return key == "pred_masks" or key in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter({**self.stored, "pred_masks": None})

    def __len__(self) -> int:
        return len(self.stored.keys() | {"pred_masks"})


def cached(function):
    """Remember the last results of a function whose arguments are numbers, a device and a dtype. They are no
    inference tensors, so that training may use them, and a graph that is traced computes them anew."""

    @functools.lru_cache(maxsize=16)
    def compute(*args):
        with torch.inference_mode(False), torch.no_grad():
            return function(*args)

    @functools.wraps(function)
    def call(*args):
        return function(*args) if torch.compiler.is_compiling() else compute(*args)

    return call


# -------------------------------------------------------------------------------------------------- backbone


def build_backbone(
    name: str, pretrained: bool = False, weights: str | Mapping | None = None, norm: str = "frozen", **kwargs
) -> nn.Module:
    """Build a timm model with feature maps at strides 4, 8, 16, 32.

    Args: as for `Mask2Former`; kwargs go to timm.create_model.
    Returns a `FeaturePyramid` or `PlainViT`: images (B, 3, H, W), H and W multiples of 32 -> four feature
    maps (B, channels, H / stride, W / stride).
    Raises ValueError for an unknown name or norm, other strides, images of one size only, other weights."""
    name = BACKBONES.get(name, name)
    if norm not in ("frozen", "batch", "group"):
        raise ValueError(f"unknown norm {norm!r}: one of frozen, batch, group")
    if not timm.is_model(name):
        raise ValueError(f"unknown backbone {name!r}: one of {', '.join(BACKBONES)}, or any timm model")
    with torch.device("meta"):  # Inspect the model without allocating it.
        whole = timm.create_model(name, **kwargs)
        if "dynamic_img_size" in inspect.signature(type(whole)).parameters:
            kwargs = {"dynamic_img_size": True, **kwargs}
        if name.startswith("swin_"):  # shifted windows in every stage, the paper's stochastic depth
            kwargs = {"always_partition": True, "drop_path_rate": 0.3, **kwargs}
        strides = [info["reduction"] for info in whole.feature_info]
        patch = strides[0] if len(set(strides)) == 1 else None
        if patch:  # a plain ViT
            kwargs = {"num_classes": 0, **kwargs}
        elif set(STRIDES) <= set(strides):
            last = [len(strides) - 1 - strides[::-1].index(s) for s in STRIDES]  # the last map of each stride
            kwargs = {**kwargs, "features_only": True, "out_indices": last}
        else:
            raise ValueError(f"backbone {name!r} has feature maps at strides {strides}, needed are {STRIDES}")
        multiple = find_size_multiple(name, timm.create_model(name, **kwargs), patch)
    body = timm.create_model(name, pretrained=pretrained and weights is None, **kwargs)
    if weights is not None:
        load_backbone_weights(name, body, whole, weights)
    if patch:
        return PlainViT(body, patch)
    if norm == "frozen":
        body = timm.layers.freeze_batch_norm_2d(body)
        fold_frozen_batch_norms(body)
    elif norm == "group":
        replace_batch_norms(body)
    for module in body.modules():
        if isinstance(module, SwinTransformerBlock):
            module.__class__ = SwinBlockPadFirst  # the parameters and their names stay
    return FeaturePyramid(body, multiple)


def find_size_multiple(name: str, meta_body: nn.Module, patch: int | None) -> int:
    """Return what the sides of images must be multiples of: 32, or the size that the model was made for, as
    for the windows of a MaxViT. Raises ValueError if it takes no other size."""
    native = max(timm.data.resolve_model_data_config(meta_body)["input_size"])
    H, W, problems = 32 * (native // 32 + 2), 160, []  # no side is a multiple of the native size
    for multiple in (32, native) if native % 32 == 0 else (32,):
        backbone = PlainViT(meta_body, patch) if patch else FeaturePyramid(meta_body, multiple)
        try:
            sizes = [tuple(x.shape[2:]) for x in backbone.eval()(torch.empty(2, 3, H, W))]
            if sizes == [(H // s, W // s) for s in STRIDES]:
                return multiple
            problems.append(f"its feature maps would be {sizes}")
        except (AssertionError, RuntimeError, ValueError) as error:
            problems.append(" ".join(str(error).split())[:100])
    other = f"not of {H} x {W} ({problems[0]}); choose one that takes any size, such as resnet50 or dinov3_s"
    raise ValueError(f"backbone {name!r} takes images of {native} x {native}, but {other}")


@torch.no_grad()
def load_backbone_weights(name: str, body: nn.Module, whole: nn.Module, weights: str | Mapping) -> None:
    """Copy a file or a state dict into a timm model, or its feature extractor with names such as "layers_0".
    Raises ValueError for tensors that are not those of `whole`, the model with its classifier."""

    def by_flat_name(tensors):
        flat = {k.removeprefix("model.").removeprefix("body.").replace(".", "_"): k for k in tensors}
        return {key: tensors[k] for key, k in flat.items() if "num_batches_tracked" not in key}

    weights = by_flat_name(weights if isinstance(weights, Mapping) else timm.models.load_state_dict(weights))
    target, known = by_flat_name(body.state_dict()), by_flat_name(whole.state_dict())
    for key in sorted(target.keys() | (weights.keys() - known.keys())):
        found, needed = (tuple(part[key].shape) if key in part else None for part in (weights, target))
        if found != needed:
            raise ValueError(
                f"{len(weights.keys() & target.keys())} of the {len(target)} tensors of {name!r} are there; "
                f"the shape of {key[:100]!r} is {found}, not {needed}"
            )
        target[key].copy_(weights[key])


class SwinBlockPadFirst(SwinTransformerBlock):
    """Pad the feature map, then shift the windows, as the official Swin does.

    timm shifts first. The results differ where the windows do not divide the feature map."""

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        (H, W), (h, w) = x.shape[1:3], self.window_size
        right, below = w * ((W + w - 1) // w) - W, h * ((H + h - 1) // h) - H
        padded = F.pad(self.norm1(x), (0, 0, 0, right, 0, below))
        x = x + self.drop_path1(F.pad(self._attn(padded), (0, 0, 0, -right, 0, -below)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class FeaturePyramid(nn.Module):
    """Wrap a timm model with feature maps. Swin's maps have channels last, and each gets a layer norm. Images
    are padded right and below to sides that are multiples of `multiple`, if the model needs that."""

    def __init__(self, body: nn.Module, multiple: int = STRIDES[-1]):
        super().__init__()
        self.body, self.channels, self.multiple = body, body.feature_info.channels(), multiple
        self.channels_last = getattr(body, "output_fmt", "NCHW") == "NHWC"
        self.norms = nn.ModuleList(nn.LayerNorm(C) for C in self.channels if self.channels_last)
        self.folded_convs = [module for module in body.modules() if isinstance(module, ConvFrozenBN)]

    def forward(self, images: Tensor) -> list[Tensor]:
        H, W = images.shape[2:]
        if self.multiple != STRIDES[-1]:
            images = F.pad(images, (0, -W % self.multiple, 0, -H % self.multiple))
        if not torch.compiler.is_compiling():  # An exported or compiled graph folds each on its own.
            for conv, folded in zip(self.folded_convs, fold_norms(self.folded_convs)):
                conv.folded = folded
        features = self.body(images)
        for conv in self.folded_convs:
            conv.folded = None  # Weights may change before the next pass.
        if self.channels_last:
            features = [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, features)]
        if self.multiple != STRIDES[-1]:
            features = [x[..., : H // s, : W // s] for x, s in zip(features, STRIDES)]
        return features


class PlainViT(nn.Module):
    """Make four feature maps of a vision transformer's last patch tokens, as Guided Distillation does.

    Each stride has a 1 x 1 convolution; its result is resized to the stride. An image whose sides are not
    multiples of the patch size is resized first.
    body: its forward_features returns prefix tokens and patch tokens (B, N, C), or a map (B, C, h, w)."""

    def __init__(self, body: nn.Module, patch: int):
        super().__init__()
        self.body, self.patch, self.channels = body, patch, [128, 256, 512, 1024]
        self.prefix_tokens = getattr(body, "num_prefix_tokens", 0)
        for name in {"attn_pool", "fc_norm"} & vars(body)["_modules"].keys():
            setattr(body, name, nn.Identity())  # These belong to the classifier and stay unused.
        self.pyramid = nn.ModuleList(nn.Conv2d(body.num_features, C, 1) for C in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        H, W = images.shape[-2:]
        h, w = -(-H // self.patch), -(-W // self.patch)
        if STRIDES[-1] % self.patch:
            images = resize(images, (h * self.patch, w * self.patch))
        grid = self.body.forward_features(images)
        if grid.ndim == 3:
            grid = grid[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, (h, w))  # (B, C, h, w)
        return [resize(conv(grid), (H // s, W // s)) for conv, s in zip(self.pyramid, STRIDES)]


class ConvFrozenBN(nn.Conv2d):
    """Compute a convolution and the frozen batch norm after it in one step, by scaling the weights."""

    def forward(self, x: Tensor) -> Tensor:
        scale, bias = self.folded or fold_norm(self.norm[0])
        weight = self.weight * scale.view(-1, 1, 1, 1)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def fold_norm(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a frozen norm as a scale and a bias."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def fold_norms(convs: list[ConvFrozenBN]) -> list[tuple[Tensor, Tensor]]:
    """Do what `fold_norm` does for the norms of all convolutions, in a few kernel launches."""
    if not convs:
        return []
    norms = [conv.norm[0] for conv in convs]
    variances = torch._foreach_add([n.running_var for n in norms], [n.eps for n in norms])
    scales = torch._foreach_div([n.weight for n in norms], torch._foreach_sqrt(variances))
    shifts = torch._foreach_mul([n.running_mean for n in norms], scales)
    return list(zip(scales, torch._foreach_sub([n.bias for n in norms], shifts)))


class IdentityNorm(FrozenBatchNorm2d):
    """Keep the parameters of a frozen batch norm that a `ConvFrozenBN` applies."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def fold_frozen_batch_norms(body: nn.Module) -> None:
    """Fold frozen batch norms into their convolutions, in place.

    The pairs are found by name, as in all ResNets: conv1 and bn1, or 0 and 1."""
    for module in body.modules():
        children = dict(module.named_children())
        for name, conv in children.items():
            norm_name = str(int(name) + 1) if name.isdecimal() else name.replace("conv", "bn")
            norm = children.get(norm_name)
            if type(conv) is nn.Conv2d and conv.bias is None and type(norm) is FrozenBatchNorm2d:
                conv.__class__, norm.__class__ = ConvFrozenBN, IdentityNorm
                conv.norm = (norm,)  # In a tuple it is not a submodule, so parameters keep their names.
                conv.folded = None


def replace_batch_norms(module: nn.Module) -> None:
    """Replace batch norms by group norms, in place, with eight channels per group where that divides."""
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
            replace_batch_norms(child)


# --------------------------------------------------------------------------------------------- pixel decoder


class PixelDecoder(nn.Module):
    """Mix the three coarser feature maps by deformable attention and compute the mask features.

    Source: sections 3.2.2 and 4.1 of the paper. The encoder is that of Deformable DETR (Zhu et al., ICLR
    2021, arXiv 2010.04159).
    in_channels: channels of the four feature maps at strides 4, 8, 16, 32."""

    def __init__(
        self,
        in_channels: list[int],
        hidden_dim: int = 256,
        num_heads: int = 8,
        num_layers: int = 6,
        ffn_dim: int = 1024,
        num_points: int = 4,
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
        """Decode the feature maps at strides 4, 8, 16, 32, each (B, channels, H / stride, W / stride).

        Returns the mask features (B, C, h, w) and the levels [stride 32, 16, 8], each (B, C, H_l, W_l)."""
        stride_4, *coarser = features
        levels = [proj(feature) for proj, feature in zip(self.input_proj, reversed(coarser))]
        shapes = [tuple(level.shape[-2:]) for level in levels]
        positions = torch.cat(
            [position_rows(level) + embed for level, embed in zip(levels, self.level_embed)]
        )  # (S, C)
        device, dtype = stride_4.device, self.level_embed.dtype
        reference_points = torch.cat([pixel_centers(H, W, device, dtype) for H, W in shapes])  # (S, 2)

        x = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)  # (B, S, C)
        for layer in self.layers:
            x = layer(x, positions, reference_points, shapes)
        parts = x.split([H * W for H, W in shapes], dim=1)
        levels = [part.unflatten(1, shape).permute(0, 3, 1, 2) for part, shape in zip(parts, shapes)]

        stride_8 = resize(levels[-1], stride_4.shape[-2:])
        return self.mask_features(self.output(self.lateral(stride_4) + stride_8)), levels


class EncoderLayer(nn.Module):
    """Apply deformable self-attention, in which every position of every level is a query, then an FFN.

    Each of the two is followed by a residual connection and a layer norm."""

    def __init__(self, hidden_dim: int, num_heads: int, ffn_dim: int, num_levels: int, num_points: int):
        super().__init__()
        self.self_attn = MSDeformAttn(hidden_dim, num_heads, num_levels, num_points)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.ffn = FeedForward(hidden_dim, ffn_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)

    def forward(self, x: Tensor, positions: Tensor, reference_points: Tensor, spatial_shapes) -> Tensor:
        x = self.norm1(x + self.self_attn(x + positions, reference_points, x, spatial_shapes))
        return self.norm2(x + self.ffn(x))


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention: each query samples P points of every level.

    The points are offsets from the query's reference point, which here is its own position in the image."""

    def __init__(self, hidden_dim: int = 256, num_heads: int = 8, num_levels: int = 3, num_points: int = 4):
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim {hidden_dim} must be a multiple of num_heads {num_heads}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = Linear(hidden_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = Linear(hidden_dim, num_heads * num_levels * num_points)
        self.value_proj = Linear(hidden_dim, hidden_dim)
        self.output_proj = Linear(hidden_dim, hidden_dim)

        # Initially each head samples in a different direction, at 1, 2, ..., P pixels, with equal weights.
        angles = torch.arange(num_heads) * (2 * math.pi / num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)  # (M, 2), on the unit square
        offsets = directions[:, None, None, :] * torch.arange(1, num_points + 1).view(1, 1, -1, 1)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.data = offsets.expand(-1, num_levels, -1, -1).reshape(-1).clone()
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for proj in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(proj.weight)
            nn.init.zeros_(proj.bias)

    def forward(self, query: Tensor, reference_points: Tensor, value: Tensor, spatial_shapes) -> Tensor:
        """Attend with query (B, N, C) to value (B, S, C), the levels of sizes spatial_shapes [(H_l, W_l)].

        reference_points: (N, 2) as (x, y) in [0, 1]. Returns (B, N, C)."""
        (B, N, C), M, L, P = query.shape, self.num_heads, self.num_levels, self.num_points
        value = self.value_proj(value).view(B, -1, M, C // M)
        # A bfloat16 offset would be off by up to 0.06 pixels, so this part is fp32 under autocast too.
        with torch.autocast(query.device.type, enabled=False):
            query = query.to(self.sampling_offsets.weight.dtype)
            sizes = level_sizes(tuple(spatial_shapes), query.device, query.dtype)
            sizes = sizes[:, None].expand(M, L, P, 2).reshape(-1)
            offsets = (self.sampling_offsets(query) / sizes).view(B, N, M, L, P, 2)
            locations = reference_points[:, None, None, None, :] + offsets  # (B, N, M, L, P, 2)
            weights = self.attention_weights(query).view(B, N, M, L * P).transpose(2, 3)
            weights = weights.contiguous().softmax(2)  # CPUs are slow on a short last dimension.
            weights = weights.transpose(2, 3).unflatten(3, (L, P))  # (B, N, M, L, P)
        attend = fastest_ms_deform_attn(value.device)
        return self.output_proj(attend(value, spatial_shapes, locations, weights))


@cached
def level_sizes(spatial_shapes: tuple, device, dtype) -> Tensor:
    """Return the sizes of the levels as (W, H): (L, 2)."""
    return torch.tensor([(W, H) for H, W in spatial_shapes], device=device, dtype=dtype)


def ms_deform_attn(
    value: Tensor, spatial_shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sum weighted bilinear samples of every level for each query (Deformable DETR, equation 3).

    Args:
        value: (B, S, M, D), the levels one after the other, each row by row.
        spatial_shapes: [(H_l, W_l)], the sizes of the levels.
        sampling_locations: (B, N, M, L, P, 2) as (x, y). 0 and 1 are the outer edges of a level. Outside a
            level the value is zero.
        attention_weights: (B, N, M, L, P).

    Returns (B, N, M * D) with the dtype of sampling_locations.
    Raises ValueError if the sizes of the levels do not add up to S."""
    (B, S, M, D), (_, N, _, L, P, _) = value.shape, sampling_locations.shape
    areas = [H * W for H, W in spatial_shapes]
    if sum(areas) != S:
        raise ValueError(
            f"cannot split value: it has {S} positions, which are not those of the levels "
            f"{list(spatial_shapes)}"
        )
    # The clamped samples are outside in any case; NaN moves outside too, as in the official operator.
    grids = 2 * sampling_locations.clamp(-1, 2).nan_to_num(-1) - 1  # grid_sample's range is [-1, 1].
    samples = []
    for level, (part, (H, W)) in enumerate(zip(value.to(grids.dtype).split(areas, dim=1), spatial_shapes)):
        maps = part.permute(0, 2, 3, 1).reshape(B * M, D, H, W)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B * M, N, P, 2)
        samples.append(F.grid_sample(maps, grid, align_corners=False))  # (B * M, D, N, P)
    weights = attention_weights.flatten(3).transpose(1, 2).reshape(B * M, 1, N, L * P)
    output = (torch.cat(samples, dim=-1) * weights).sum(-1)  # (B * M, D, N)
    return output.view(B, M * D, N).transpose(1, 2)


def fastest_ms_deform_attn(device: torch.device):
    """Return the fastest form of `ms_deform_attn` for a device.

    An export needs operations that every machine has: it traces the plain form. torch.compile is no export,
    although in torch 2.11 it says that it is."""
    if not torch.compiler.is_dynamo_compiling() and getattr(torch.compiler, "is_exporting", bool)():
        return ms_deform_attn
    if device.type == "cpu" and ms_deform_attn_cpu:
        return ms_deform_attn_cpu
    if device.type == "cuda" and ms_deform_attn_triton and torch.cuda.get_device_capability(device) >= (8, 0):
        return ms_deform_attn_triton
    return ms_deform_attn


# --------------------------------------------------------------------------------------- transformer decoder


class TransformerDecoder(nn.Module):
    """Update learned queries with masked attention to the levels in turn, and predict after every layer.

    Source: sections 3.2.1 to 3.2.3 of the paper."""

    def __init__(
        self,
        num_classes: int,
        num_queries: int = 100,
        hidden_dim: int = 256,
        num_heads: int = 8,
        num_layers: int = 9,
        ffn_dim: int = 2048,
        num_levels: int = 3,
    ):
        super().__init__()
        self.query_features = nn.Embedding(num_queries, hidden_dim)
        self.query_positions = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(num_levels, hidden_dim)
        self.layers = nn.ModuleList(DecoderLayer(hidden_dim, num_heads, ffn_dim) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.class_head = nn.Linear(hidden_dim, num_classes + 1)  # The last logit is "no object".
        self.mask_head = nn.Sequential(
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
        )

    def forward(self, levels: list[Tensor], mask_features: Tensor) -> Outputs:
        """Decode levels [stride 32, 16, 8], each (B, C, H_l, W_l), and mask_features (B, C, h, w).

        Returns `Outputs` with "aux_outputs", the predictions before each layer."""
        B = mask_features.shape[0]
        values = [
            level.flatten(2).transpose(1, 2) + embed for level, embed in zip(levels, self.level_embed.weight)
        ]  # (B, H_l * W_l, C)
        keys = [value + position_rows(level).to(value.dtype) for value, level in zip(values, levels)]
        # Three layers attend to each level. Autocast would cast it for each of them.
        keys, values = ([cast_like_autocast(x) for x in tensors] for tensors in (keys, values))
        queries = self.query_features.weight.expand(B, -1, -1)  # (B, Q, C)
        query_positions = self.query_positions.weight

        # Attention masks have the size of a level. Resizing the features before the product with the mask
        # embeddings gives the same as resizing the masks, and is cheaper.
        resized = [resize(mask_features.detach(), level.shape[-2:]) for level in levels]

        predictions = [self.predict(queries, mask_features)]
        for index, layer in enumerate(self.layers):
            level = index % len(levels)
            mask = attention_mask(predictions[-1]["mask_embed"], resized[level])
            queries = layer(queries, query_positions, keys[level], values[level], mask)
            predictions.append(self.predict(queries, mask_features))
        return Outputs(**predictions[-1].stored, aux_outputs=predictions[:-1])

    def predict(self, queries: Tensor, mask_features: Tensor) -> Outputs:
        """Predict class logits and mask embeddings from queries (B, Q, C)."""
        queries = self.norm(queries)
        return Outputs(self.class_head(queries), self.mask_head(queries), mask_features)


def attention_mask(mask_embed: Tensor, mask_features: Tensor) -> Tensor:
    """Let a query attend where its mask has a probability of at least 0.5, or everywhere if that is nowhere.

    mask_embed: (B, Q, C), mask_features: (B, C, H_l, W_l). Returns (B, 1, Q, H_l * W_l) bool, True where a
    query may attend, the same for all heads. It carries no gradient (section 3.2.1)."""
    attend = mask_embed.detach() @ mask_features.detach().flatten(2) >= 0  # a probability of at least 0.5
    return (attend | ~attend.any(dim=-1, keepdim=True)).unsqueeze(1)


class DecoderLayer(nn.Module):
    """Apply masked cross-attention to a level, self-attention among the queries, then an FFN.

    Each of the three is followed by a residual connection and a layer norm."""

    def __init__(self, hidden_dim: int, num_heads: int, ffn_dim: int):
        super().__init__()
        self.cross_attn = Attention(hidden_dim, num_heads)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.self_attn = Attention(hidden_dim, num_heads)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.ffn = FeedForward(hidden_dim, ffn_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)

    def forward(self, x: Tensor, query_positions: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.cross_attn(x + query_positions, key, value, mask))
        query = x + query_positions
        x = self.norm2(x + self.self_attn(query, query, x))
        return self.norm3(x + self.ffn(x))


class Attention(nn.Module):
    """Multi-head attention with the parameters of nn.MultiheadAttention."""

    def __init__(self, hidden_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_dim, hidden_dim))  # query, key, value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_dim))
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend with query (B, N, C) to key and value (B, S, C). Returns (B, N, C).

        mask: (B, 1, N, S) bool, True where a query may attend."""
        # Cast as a whole, because autocast would cast each of the three views at each of its uses.
        weight, bias = cast_like_autocast(self.in_proj_weight), cast_like_autocast(self.in_proj_bias)
        projections = zip((query, key, value), weight.chunk(3), bias.chunk(3))
        heads = [
            linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in projections
        ]  # three of (B, M, N or S, D)
        output = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        return self.out_proj(output.transpose(1, 2).flatten(2))


# ---------------------------------------------------------------------------------------------- shared parts


def cast_like_autocast(x: Tensor) -> Tensor:
    """Cast as autocast casts the weight of a linear layer, if it is enabled."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Linear(nn.Linear):
    """An nn.Linear that is also fast for thousands of tokens on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class FeedForward(nn.Sequential):
    """Two linear layers with a ReLU between them (FFN)."""

    def __init__(self, hidden_dim: int, ffn_dim: int):
        super().__init__(Linear(hidden_dim, ffn_dim), nn.ReLU(), Linear(ffn_dim, hidden_dim))
        nn.init.xavier_uniform_(self[0].weight)
        nn.init.xavier_uniform_(self[2].weight)

    def forward(self, x: Tensor) -> Tensor:
        first, _, second = self
        return second(F.relu(first(x), inplace=not torch.is_grad_enabled()))  # In place it saves memory.


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (B, C, H, W) bilinearly to (B, C, *size). The outer edges of both coincide."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


@cached
def pixel_centers(H: int, W: int, device=None, dtype=None) -> Tensor:
    """Return the center of each pixel, row by row, as (x, y) in [0, 1]: (H * W, 2)."""
    y = (torch.arange(H, device=device, dtype=dtype) + 0.5) / H
    x = (torch.arange(W, device=device, dtype=dtype) + 0.5) / W
    return torch.stack([x.expand(H, W), y[:, None].expand(H, W)], dim=-1).flatten(0, 1)


def position_rows(feature: Tensor) -> Tensor:
    """Return the `sine_positions` of a feature map (B, C, H, W), row by row: (H * W, C)."""
    dtype = torch.promote_types(feature.dtype, torch.float32)
    return sine_positions(*feature.shape[1:], feature.device, dtype).flatten(1).T


@cached
def sine_positions(C: int, H: int, W: int, device=None, dtype=None, temperature: float = 10000.0) -> Tensor:
    """Compute DETR's sine position embedding for a feature map of C channels.

    Returns (C, H, W): y in the first C/2 channels, x in the others; sines in even channels, cosines in odd
    ones."""
    kwargs = {"device": device, "dtype": dtype}
    index = torch.arange(C // 2, **kwargs)
    frequency = temperature ** (2 * (index // 2) / (C // 2))

    def embed(size):  # (size, C/2)
        position = torch.arange(1, size + 1, **kwargs) / (size + 1e-6) * (2 * math.pi)
        angle = position[:, None] / frequency
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)

    y = embed(H).T[:, :, None].expand(-1, H, W)
    x = embed(W).T[:, None, :].expand(-1, H, W)
    return torch.cat([y, x])
