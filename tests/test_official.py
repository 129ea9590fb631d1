"""What the official code does before it has seen an image, written down parameter by parameter: initial
values, and the optimizer's groups. Parameters go by their official names."""

import math
import re

import pytest
import timm
import torch
from scipy.stats import kstest
from torch import nn

from interop.names import OFFICIAL, OURS, translate_state_dict
from model import BACKBONES, STRIDES, Mask2Former, build_backbone
from training.config import Config
from training.optimization import build_optimizer


def official_parameters(model):
    """Official name -> parameter."""
    numbers = {name: torch.tensor(number) for number, (name, _) in enumerate(model.named_parameters())}
    parameters = list(model.parameters())
    names = translate_state_dict(numbers, OURS, OFFICIAL)
    return {name: parameters[number] for name, number in names.items()}


# --------------------------------------------------------------------------------------------- initial values


def uniform(bound):
    return lambda x: kstest(x.flatten().numpy(), "uniform", (-bound(x), 2 * bound(x))).pvalue > 1e-4


def fans(weight):
    """The inputs and outputs of a linear layer or a convolution."""
    area = weight[0, 0].numel()
    return weight.shape[1] * area, weight.shape[0] * area


xavier = uniform(lambda x: math.sqrt(6 / sum(fans(x))))
kaiming = uniform(lambda x: math.sqrt(3 / fans(x)[0]))  # detectron2's c2_xavier_fill
linear = uniform(lambda x: 1 / math.sqrt(fans(x)[0]))  # of PyTorch's layers


def bias_of(inputs):
    """PyTorch's bias of a layer with so many inputs."""
    return uniform(lambda x: 1 / math.sqrt(inputs))


def normal(x):
    return kstest(x.flatten().numpy(), "norm").pvalue > 1e-4


def zeros(x):
    return (x == 0).all()


def ones(x):
    return (x == 1).all()


def ring(x):
    """Eight directions, one for each head; four points, one to four pixels away; three levels alike."""
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    expected = torch.tensor(directions).view(8, 1, 1, 2) * torch.arange(1, 5).view(1, 1, 4, 1)
    return torch.allclose(x.view(8, 3, 4, 2), expected.expand(8, 3, 4, 2).float(), atol=1e-6)


# In each line the first pattern that is found in the name counts.
INITIAL_VALUES = {
    r"input_proj\.\d\.0\.weight": xavier,
    r"input_proj\.\d\.0\.bias": zeros,
    r"(norm\d?|input_proj\.\d\.1|decoder_norm)\.weight": ones,
    r"(norm\d?|input_proj\.\d\.1|decoder_norm)\.bias": zeros,
    r"level_embed|query_feat|query_embed": normal,
    r"sampling_offsets\.weight|attention_weights": zeros,
    r"sampling_offsets\.bias": ring,
    r"(value_proj|output_proj|in_proj_|out_proj).*weight": xavier,
    r"(value_proj|output_proj|in_proj_|out_proj).*bias": zeros,
    r"linear[12]\.weight": xavier,
    r"linear1\.bias": bias_of(256),
    r"pixel_decoder.*linear2\.bias": bias_of(1024),
    r"predictor.*linear2\.bias": bias_of(2048),
    r"(mask_features|adapter_1|layer_1)\.weight": kaiming,
    r"mask_features\.bias": zeros,
    r"(class_embed|mask_embed).*weight": linear,
    r"(class_embed|mask_embed).*bias": bias_of(256),
}


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return Mask2Former(80, "resnet50")


def test_initial_values_are_drawn_as_officially(resnet):
    """Each parameter's values against its distribution (Kolmogorov-Smirnov), or its constant."""
    parameters = official_parameters(resnet)
    heads = {name: p.detach() for name, p in parameters.items() if name.startswith("sem_seg_head.")}
    assert len(heads) == 345 - 53
    for name, values in heads.items():
        rules = [rule for pattern, rule in INITIAL_VALUES.items() if re.search(pattern, name)]
        assert rules and rules[0](values), name


def test_a_wrong_distribution_would_be_seen():
    torch.manual_seed(0)
    weight = torch.empty(256, 256)
    assert xavier(nn.init.xavier_uniform_(weight)) and not linear(weight)
    assert not xavier(1.05 * weight) and not xavier(0.05 * torch.randn(256, 256))
    assert normal(torch.randn(100, 256)) and not normal(0.9 * torch.randn(100, 256))


# ----------------------------------------------------------------------------------------- parameter groups

NORMS = r"norm\d?\.(weight|bias)$|decoder_norm|input_proj\.\d\.1\."
TABLES = r"predictor\.(query_feat|query_embed|level_embed)|relative_position_bias_table"


@pytest.mark.parametrize(
    "name, counts",
    [
        ("resnet50", {(0.1, 0.05): 53, (1.0, 0.05): 199, (1.0, 0.0): 93}),
        ("swin_t", {(0.1, 0.05): 101, (0.1, 0.0): 76, (1.0, 0.05): 199, (1.0, 0.0): 93}),
    ],
)
def test_parameter_groups_are_the_official_ones(name, counts, resnet):
    """The backbone learns at a tenth; norms, embeddings and position tables do not decay; the pixel
    decoder's level embedding, which is a bare parameter, does."""
    model = resnet if name == "resnet50" else Mask2Former(80, name)
    groups = build_optimizer(model, Config(lr=1.0)).param_groups
    assert len(groups) == len(counts)
    found = {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    for official, parameter in official_parameters(model).items():
        factor = 0.1 if official.startswith("backbone.") else 1.0
        decay = 0.0 if re.search(f"{NORMS}|{TABLES}", official) else 0.05
        assert found.pop(parameter) == (factor, decay), official
    assert not found
    assert {(g["lr"], g["weight_decay"]): len(g["params"]) for g in groups} == counts


# ---------------------------------------------------------------------------------------- the backbones


def test_timm_has_the_pretraining_of_the_paper():
    assert set(BACKBONES.values()) <= set(timm.list_pretrained())


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_learns_from_images_of_any_size(name):
    """Feature maps at strides 4 to 32 of the padded image, and gradients. The decoders are small: it is the
    backbone that differs. The largest of each family has its full width, but few layers: the others of the
    family have all of theirs."""
    torch.manual_seed(0)
    sizes = dict(hidden_dim=32, encoder_layers=1, encoder_ffn=32, decoder_layers=2, decoder_ffn=32)
    layers = {"depth": 2} if name.startswith(("dinov2", "dinov3_l")) else {"depths": (2, 2, 2, 2)}
    model = Mask2Former(
        3, name, num_queries=5, norm="batch", **sizes, backbone_args=layers if name.endswith("_l") else {}
    )
    model.train().requires_grad_(True)
    seen = []
    model.pixel_decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for (H, W), padded in (((128, 160), (128, 160)), ((130, 97), (160, 128))):
        outputs = model(torch.randint(0, 256, (1, 3, H, W)))
        assert outputs["pred_masks"].shape == (1, 5, padded[0] // 4, padded[1] // 4)
        for feature, channels, stride in zip(seen.pop(), model.backbone.channels, STRIDES, strict=True):
            assert feature.shape == (1, channels, padded[0] // stride, padded[1] // stride)
        predictions = [*outputs["aux_outputs"], outputs]
        sum(p["pred_logits"].sum() + p["pred_masks"].square().mean() for p in predictions).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert sum(p.grad.any().item() for p in model.backbone.parameters()) > 20
        model.zero_grad()


@pytest.mark.parametrize("pool", [{"global_pool": "map", "class_token": False}, {"global_pool": "avg"}])
def test_a_plain_vit_has_no_parameter_of_its_classifier(pool):
    """Several processes would wait for its gradient."""
    args = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2, **pool}
    body = build_backbone("vit_tiny_patch16_224", **args)
    sum(feature.sum() for feature in body(torch.rand(1, 3, 32, 32))).backward()
    assert not [name for name, parameter in body.named_parameters() if parameter.grad is None]
