"""Hugging Face's Mask2Former gives the same numbers with the same weights: features, predictions, gradients,
assignments, losses. It was found bit-equal to the official code in fp32."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
    TimmBackboneConfig,
)

from interop.names import HUGGING_FACE, OFFICIAL, OURS, convert_state_dict, translate_state_dict
from matcher import SetCriterion
from model import Mask2Former

K, Q = 5, 12
SIZES = [
    (256, 288),
    (250, 301),
]  # windows of Swin's last stage fit into both: Hugging Face shrinks those that do not
BACKBONES = {
    "resnet50": TimmBackboneConfig(backbone="resnet50", out_indices=(1, 2, 3, 4)),
    "swin_t": SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    ),
}


@pytest.fixture(scope="module", params=BACKBONES)
def pair(request, tmp_path_factory):
    """Hugging Face's model with random weights, and ours with the same, read from the file that it writes."""
    torch.manual_seed(0)
    config = Mask2FormerConfig(backbone_config=BACKBONES[request.param], num_labels=K, num_queries=Q)
    theirs = Mask2FormerForUniversalSegmentation(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    for name, value in theirs.named_buffers():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    state_dict = load_file(folder / "model.safetensors")
    ours = Mask2Former(K, request.param, num_queries=Q).eval()
    ours.load_state_dict(convert_state_dict(state_dict))
    return theirs, ours, state_dict


def normalized(ours, images):
    """What our model does inside: (image - mean) / std, then zeros to multiples of 32."""
    H, W = images.shape[-2:]
    images = (images - ours.pixel_mean) / ours.pixel_std
    return torch.nn.functional.pad(images, (0, -W % 32, 0, -H % 32))


def predictions(theirs, pixels):
    """Theirs under our names."""
    mask = torch.ones(len(pixels), *pixels.shape[-2:], dtype=torch.long)
    out = theirs(pixels, pixel_mask=mask, output_auxiliary_logits=True)
    last = {
        "class_queries_logits": out.class_queries_logits,
        "masks_queries_logits": out.masks_queries_logits,
    }
    return [
        {"pred_logits": o["class_queries_logits"], "pred_masks": o["masks_queries_logits"]}
        for o in [*out.auxiliary_logits, last]
    ]


def layers(outputs):
    return [*outputs["aux_outputs"], outputs]


def close(found, expected, tolerance=1e-5):
    """Equal up to a share of the largest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1, expected.abs().max().item()))


@pytest.mark.parametrize("H, W", SIZES)
def test_features_and_the_predictions_of_every_layer(pair, H, W):
    theirs, ours, _ = pair
    images = torch.randint(0, 256, (2, 3, H, W)).float()
    pixels = normalized(ours, images)
    with torch.no_grad():
        features = ours.backbone(pixels)
        for found, expected in zip(features, theirs.model.pixel_level_module.encoder(pixels).feature_maps):
            close(found, expected)
        mask_features, levels = ours.pixel_decoder(features)
        expected = theirs.model.pixel_level_module(pixels)
        close(mask_features, expected.decoder_last_hidden_state)
        for found, level in zip(levels, expected.decoder_hidden_states):
            close(found, level)
        for found, expected in zip(layers(ours(images)), predictions(theirs, pixels), strict=True):
            close(found["pred_logits"], expected["pred_logits"])
            close(found["pred_masks"], expected["pred_masks"])


def test_gradients_of_all_parameters(pair):
    """In float64: in fp32 a ReLU within rounding of zero passes the gradient in one model and not in both."""
    theirs, ours = copy.deepcopy(pair[0]).double(), copy.deepcopy(pair[1]).double()
    images = torch.randint(0, 256, (1, 3, *SIZES[0])).double()

    def backward(outputs):
        generator = torch.Generator().manual_seed(0)
        values = [
            outputs_of_layer[key] for outputs_of_layer in outputs for key in ("pred_logits", "pred_masks")
        ]
        sum((value * torch.randn(value.shape, generator=generator)).mean() for value in values).backward()

    backward(layers(ours(images)))
    backward(predictions(theirs, normalized(ours, images)))
    found = translate_state_dict({n: p.grad for n, p in ours.named_parameters()}, OURS, HUGGING_FACE)
    expected = {n.replace("encoder.swin.", "encoder."): p.grad for n, p in theirs.named_parameters()}
    compared = found.keys() & expected.keys()  # Swin's attention has other names in memory than in a file
    assert len(compared) > 380
    for name in compared:
        scale = max(1e-6, expected[name].abs().max().item())
        torch.testing.assert_close(found[name] / scale, expected[name] / scale, rtol=0, atol=1e-9, msg=name)


def fixed_points(monkeypatch):
    """torch.rand gives the same points for every object, layer and image."""
    drawn = {}

    def rand(*size, device=None, **_):
        generator = torch.Generator().manual_seed(size[-2])
        points = drawn.setdefault(size[-2:], torch.rand(size[-2:], generator=generator))
        return points.expand(*size).clone()

    original = torch.rand

    def patched(*size, **how):
        return original(*size, **how) if "generator" in how else rand(*size, **how)

    monkeypatch.setattr(torch, "rand", patched)


@pytest.mark.parametrize("counts", [(3, 7), (4, 0), (0, 0), (2, Q + 5)])
def test_assignments_and_losses(pair, monkeypatch, counts):
    """Also without objects, and with more of them than queries."""
    theirs, ours, _ = pair
    torch.manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 128, 160)).float()
    targets = []
    for N in counts:
        corners = torch.randint(0, 90, (N, 2))
        masks = torch.zeros(N, 128, 160, dtype=torch.bool)
        for mask, (y, x) in zip(masks, corners.tolist()):
            mask[y : y + 30, x : x + 40] = True
        targets.append({"labels": torch.randint(0, K, (N,)), "masks": masks})
    fixed_points(monkeypatch)
    with torch.no_grad():
        outputs = ours(images)
        criterion = SetCriterion(K)
        found = criterion(outputs, targets)
        labels, masks = [t["labels"] for t in targets], [t["masks"].float() for t in targets]
        aux = [
            {"class_queries_logits": o["pred_logits"], "masks_queries_logits": o["pred_masks"]}
            for o in outputs["aux_outputs"]
        ]
        expected = theirs.get_loss_dict(outputs["pred_masks"], outputs["pred_logits"], masks, labels, aux)
        assignment = theirs.criterion.matcher(outputs["pred_masks"], outputs["pred_logits"], masks, labels)
    for (query, target), (their_query, their_target) in zip(criterion.matcher(outputs, targets), assignment):
        assert torch.equal(query, their_query) and torch.equal(target, their_target)
    assert len(found) == len(expected) == 30
    for name, value in expected.items():
        mine = found[name.replace("cross_entropy", "ce")]
        torch.testing.assert_close(mine, value, rtol=1e-5, atol=1e-6, msg=name)


def test_names_round_trip_bit_exactly(pair):
    _, ours, state_dict = pair
    for column in (HUGGING_FACE, OFFICIAL):
        other = translate_state_dict(ours.state_dict(), OURS, column)
        again = convert_state_dict(other)
        assert again.keys() == ours.state_dict().keys()
        assert all(torch.equal(again[name], value) for name, value in ours.state_dict().items())
    theirs = translate_state_dict(ours.state_dict(), OURS, HUGGING_FACE)
    assert all(torch.equal(value, state_dict[name]) for name, value in theirs.items())


def test_a_renamed_parameter_is_refused_by_name(pair):
    state_dict = translate_state_dict(pair[1].state_dict(), OURS, OFFICIAL)
    state_dict["sem_seg_head.predictor.query_feet.weight"] = state_dict.pop(
        "sem_seg_head.predictor.query_feat.weight"
    )
    with pytest.raises(ValueError, match="query_feet"):
        convert_state_dict(state_dict)


def test_official_names_of_a_few_parameters():
    """As they stand in the published files."""
    names = {
        "backbone.stem.conv1.norm.running_var": "backbone.body.bn1.running_var",
        "backbone.res4.5.conv3.norm.weight": "backbone.body.layer3.5.bn3.weight",
        "backbone.res2.0.shortcut.weight": "backbone.body.layer1.0.downsample.0.weight",
        "backbone.norm3.bias": "backbone.norms.3.bias",
        "backbone.layers.2.downsample.reduction.weight": "backbone.body.layers_3.downsample.reduction.weight",
        "sem_seg_head.pixel_decoder.adapter_1.norm.weight": "pixel_decoder.lateral.1.weight",
        "sem_seg_head.pixel_decoder.transformer.level_embed": "pixel_decoder.level_embed",
        "sem_seg_head.predictor.transformer_ffn_layers.8.norm.bias": "decoder.layers.8.norm3.bias",
        "sem_seg_head.predictor.mask_embed.layers.2.weight": "decoder.mask_head.4.weight",
    }
    value = torch.zeros(1)
    assert list(convert_state_dict(dict.fromkeys(names, value))) == list(names.values())
