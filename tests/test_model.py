"""The model: every formula against a plain one, and what the whole of it promises."""

import inspect
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import TINY
from torch import nn

import deform_attn_cpu
import matcher
import model
from model import (
    Attention,
    DecoderLayer,
    Mask2Former,
    MSDeformAttn,
    Outputs,
    attention_mask,
    pixel_centers,
    sine_positions,
)

SHAPES = [(3, 5), (4, 2), (1, 6)]  # three levels, none of them square


def image_batch(B=2, H=64, W=96, seed=0):
    return torch.randint(0, 256, (B, 3, H, W), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def flat(outputs):
    """All tensors of the outputs, aux_outputs first."""
    predictions = [*outputs["aux_outputs"], outputs]
    return [prediction[name] for prediction in predictions for name in ("pred_logits", "pred_masks")]


# ----------------------------------------------------------------------------- deformable attention


def attention_inputs(B=2, N=4, M=2, D=3, P=2, seed=0):
    """value, locations (some outside the map) and weights in float64."""
    rng = np.random.default_rng(seed)
    S = sum(H * W for H, W in SHAPES)
    value = torch.tensor(rng.normal(size=(B, S, M, D)))
    locations = torch.tensor(rng.uniform(-0.3, 1.3, (B, N, M, len(SHAPES), P, 2)))
    weights = torch.tensor(rng.dirichlet(np.ones(len(SHAPES) * P), (B, N, M)))
    return value, locations, weights.view(B, N, M, len(SHAPES), P)


def deformable_attention_by_loops(value, shapes, locations, weights, bilinear):
    """Equation 3 of Deformable DETR, one sample after the other."""
    B, _, M, D = value.shape
    _, N, _, L, P, _ = locations.shape
    output = torch.zeros(B, N, M, D, dtype=value.dtype)
    starts = np.cumsum([0] + [H * W for H, W in shapes])
    for b, n, m, level, p in np.ndindex(B, N, M, L, P):
        H, W = shapes[level]
        maps = value[b, starts[level] : starts[level + 1], m].T.reshape(D, H, W)
        x, y = locations[b, n, m, level, p].tolist()
        output[b, n, m] += weights[b, n, m, level, p] * bilinear(maps, x * W - 0.5, y * H - 0.5)
    return output.flatten(2)


@pytest.fixture(params=[model, deform_attn_cpu], ids=["plain", "cpu"])
def ms_deform_attn(request):
    """Two of the three forms of the operator; test_triton.py compares the third with the plain one."""
    return request.param.ms_deform_attn


def test_deformable_attention_equals_a_loop_over_samples(ms_deform_attn, bilinear):
    value, locations, weights = attention_inputs()
    assert ((locations < 0) | (locations > 1)).any()
    expected = deformable_attention_by_loops(value, SHAPES, locations, weights, bilinear)
    torch.testing.assert_close(ms_deform_attn(value, SHAPES, locations, weights), expected)


def test_deformable_attention_has_the_right_gradients(ms_deform_attn):
    inputs = [tensor.requires_grad_() for tensor in attention_inputs(B=1, N=2)]
    assert torch.autograd.gradcheck(lambda v, x, w: ms_deform_attn(v, SHAPES, x, w), inputs)


@pytest.mark.oracle
@pytest.mark.parametrize("spread", [0.3, 3.0, 1e6])
def test_deformable_attention_and_its_gradients_equal_those_of_other_code(ms_deform_attn, spread):
    """Also where nearly all samples are outside; edges between pixels are met by chance alone."""
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

    value, locations, weights = attention_inputs(B=3, N=50, M=4, D=8, P=4)
    inputs = value, 0.5 + spread * (locations - 0.5), weights
    results = []
    for attention in (ms_deform_attn, multi_scale_deformable_attention):
        value, locations, weights = (tensor.clone().requires_grad_() for tensor in inputs)
        output = attention(value, SHAPES, locations, weights)
        output.square().sum().backward()
        results.append([output, value.grad, locations.grad, weights.grad])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(
            ours, theirs, atol=1e-10 * max(1.0, float(theirs.detach().abs().max())), rtol=1e-9
        )


def test_the_cpu_form_keeps_no_samples_for_the_backward_pass():
    inputs = [tensor.requires_grad_() for tensor in attention_inputs()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        deform_attn_cpu.ms_deform_attn(inputs[0], SHAPES, *inputs[1:])
    assert sum(t.numel() for t in kept) <= sum(t.numel() for t in inputs)


def test_deformable_attention_of_locations_that_are_not_numbers_is_zero(ms_deform_attn):
    value, locations, weights = attention_inputs()
    locations[0, 1], locations[0, 2] = math.nan, math.inf
    output = ms_deform_attn(value, SHAPES, locations, weights)
    assert (output[0, 1:3] == 0).all() and output.isfinite().all()


def test_gathered_dot_products_equal_those_of_gathered_rows():
    left, right, index = (
        torch.randn(7, 5),
        torch.randn(20, 5),
        torch.randint(0, 20, (7, 3), dtype=torch.int32),
    )
    expected = (right[index.long()] * left[:, None]).sum(-1)
    torch.testing.assert_close(deform_attn_cpu.gathered_dot(left, index, right), expected)


def test_deformable_attention_refuses_shapes_that_do_not_fit_the_value(ms_deform_attn):
    value, locations, weights = attention_inputs()
    with pytest.raises(ValueError, match="positions"):
        ms_deform_attn(value[:, 1:], SHAPES, locations, weights)


def test_the_form_of_deformable_attention_follows_from_the_device(monkeypatch):
    """Triton needs a GPU of capability 8.0; an export and a missing file leave the plain form."""
    choose = model.fastest_ms_deform_attn
    monkeypatch.setattr(model, "ms_deform_attn_triton", "triton")
    for capability, expected in (((7, 5), model.ms_deform_attn), ((8, 0), "triton"), ((9, 0), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert choose(torch.device("cuda")) is expected
    assert choose(torch.device("mps")) is model.ms_deform_attn
    assert choose(torch.device("cpu")) is deform_attn_cpu.ms_deform_attn
    monkeypatch.setattr(model, "ms_deform_attn_cpu", None)
    monkeypatch.setattr(model, "ms_deform_attn_triton", None)
    assert choose(torch.device("cpu")) is choose(torch.device("cuda")) is model.ms_deform_attn
    monkeypatch.undo()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True, raising=False)
    assert choose(torch.device("cpu")) is model.ms_deform_attn


def test_a_compiled_model_has_the_fast_deformable_attention_and_memory_layout(monkeypatch):
    """While torch.compile of torch 2.11 traces a function, torch.compiler.is_exporting() is true."""
    tracing = torch.compiler.is_dynamo_compiling
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: tracing(), raising=False)
    monkeypatch.setattr(deform_attn_cpu, "AVX512", True)

    def chosen(x):
        fast = model.fastest_ms_deform_attn(x.device) is deform_attn_cpu.ms_deform_attn
        return x + 2 * fast + deform_attn_cpu.prefers_channels_last(x)

    assert torch.compile(chosen, fullgraph=True, backend="eager")(torch.zeros(1)) == 3


@pytest.mark.parametrize("num_heads", [1, 4, 8])
def test_at_first_each_head_looks_in_its_own_direction_and_weighs_all_points_alike(num_heads):
    L, P = 3, 4
    module = MSDeformAttn(16, num_heads, L, P)
    query = torch.randn(5, 16)
    offsets = module.sampling_offsets(query).view(5, num_heads, L, P, 2)
    for head, level, point in np.ndindex(num_heads, L, P):
        angle = 2 * math.pi * head / num_heads
        direction = torch.tensor([math.cos(angle), math.sin(angle)])
        expected = (point + 1) * direction / direction.abs().max()
        torch.testing.assert_close(offsets[:, head, level, point], expected.expand(5, 2))
        assert offsets[0, head, level, point].abs().max().item() == pytest.approx(point + 1)
    assert (module.attention_weights(query) == 0).all()


def test_deformable_attention_samples_around_its_reference_points(bilinear):
    """Location = reference + offset / (W, H) of the level; weights are a softmax over levels and points."""
    torch.manual_seed(0)
    B, N, C, M, L, P = 2, 4, 8, 2, len(SHAPES), 2
    module = MSDeformAttn(C, M, L, P).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    S = sum(H * W for H, W in SHAPES)
    query, value = torch.randn(B, N, C).double(), torch.randn(B, S, C).double()
    reference = torch.rand(N, 2).double()

    offsets = module.sampling_offsets(query).view(B, N, M, L, P, 2)
    logits = module.attention_weights(query).view(B, N, M, L * P)
    weights = (logits.exp() / logits.exp().sum(-1, keepdim=True)).view(B, N, M, L, P)
    locations = torch.zeros(B, N, M, L, P, 2).double()
    for b, n, m, level, p in np.ndindex(B, N, M, L, P):
        H, W = SHAPES[level]
        locations[b, n, m, level, p] = reference[n] + offsets[b, n, m, level, p] / torch.tensor([W, H])
    heads = module.value_proj(value).view(B, S, M, C // M)
    expected = deformable_attention_by_loops(heads, SHAPES, locations, weights, bilinear)
    torch.testing.assert_close(module(query, reference, value, SHAPES), module.output_proj(expected))


def test_a_width_that_does_not_divide_into_heads_is_refused():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        MSDeformAttn(hidden_dim=10, num_heads=4)


# ---------------------------------------------------------------------------------------- positions


def test_pixel_centers_run_row_by_row():
    expected = [((x + 0.5) / 4, (y + 0.5) / 3) for y in range(3) for x in range(4)]
    torch.testing.assert_close(pixel_centers(3, 4), torch.tensor(expected))


@pytest.mark.parametrize("C, H, W", [(8, 3, 5), (32, 7, 4)])
def test_sine_positions_equal_the_formula_of_detr(C, H, W):
    """y in the first half of the channels; sine in even channels, cosine in odd ones."""
    positions = sine_positions(C, H, W, None, torch.float64)
    assert positions.shape == (C, H, W)
    for c, i, j in np.ndindex(C, H, W):
        count, size, channel = (i + 1, H, c) if c < C // 2 else (j + 1, W, c - C // 2)
        angle = 2 * math.pi * count / (size + 1e-6) / 10000 ** (2 * (channel // 2) / (C // 2))
        expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
        assert positions[c, i, j].item() == pytest.approx(expected, abs=1e-5)


# ----------------------------------------------------------------------------- the masked attention


def attend_by(logits):
    """attention_mask of mask logits (B, Q, H, W): one feature for each query, which is its logits."""
    return attention_mask(torch.eye(logits.shape[1]).expand(len(logits), -1, -1), logits)


def test_attention_mask_equals_a_loop():
    """A query attends where its mask has a probability of at least one half, or everywhere."""
    logits = torch.tensor(np.random.default_rng(0).normal(size=(2, 3, 3, 4)), dtype=torch.float32)
    logits[1, 2] = -1
    attend = attend_by(logits)
    assert attend.shape == (2, 1, 3, 12) and attend.dtype == torch.bool
    for b, q in np.ndindex(2, 3):
        expected = [1 / (1 + math.exp(-x)) >= 0.5 for x in logits[b, q].flatten().tolist()]
        assert attend[b, 0, q].tolist() == (expected if any(expected) else [True] * len(expected))


def test_a_query_that_masks_everything_attends_everywhere():
    logits = torch.full((1, 2, 4, 4), -5.0)
    logits[0, 1, :2] = 5
    attend = attend_by(logits)[0, 0].view(2, 4, 4)
    assert attend[0].all()
    assert attend[1, :2].all() and not attend[1, 2:].any()


def test_a_probability_of_one_half_may_be_attended():
    assert attend_by(torch.zeros(1, 1, 2, 2)).all()
    assert attend_by(torch.tensor([[[[0.0, -1.0]]]])).flatten().tolist() == [True, False]


def test_attention_masks_carry_no_gradient():
    embed, features = torch.randn(1, 2, 3, requires_grad=True), torch.randn(1, 3, 4, 4, requires_grad=True)
    attend = attention_mask(embed, features)
    assert not attend.requires_grad and attend.grad_fn is None


def test_queries_read_only_where_they_may_attend():
    """What lies elsewhere may change as it likes; without a mask it would be seen."""
    torch.manual_seed(0)
    layer = DecoderLayer(hidden_dim=16, num_heads=4, ffn_dim=8)
    x, positions = torch.randn(2, 5, 16), torch.randn(5, 16)
    key, value = torch.randn(2, 12, 16), torch.randn(2, 12, 16)
    attend = (torch.arange(12) < 7).expand(2, 1, 5, 12)
    hidden = torch.zeros(12, 1)
    hidden[7:] = 1
    changed = key + 3 * hidden, value - 2 * hidden
    expected = layer(x, positions, key, value, attend)
    assert torch.equal(layer(x, positions, *changed, attend), expected)
    everywhere = torch.ones_like(attend)
    assert not torch.allclose(
        layer(x, positions, *changed, everywhere), layer(x, positions, key, value, everywhere), atol=1e-3
    )


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_that_of_pytorch(masked):
    torch.manual_seed(0)
    B, N, S, C, M = 2, 5, 7, 12, 3
    ours, theirs = Attention(C, M), nn.MultiheadAttention(C, M, batch_first=True)
    nn.init.normal_(ours.in_proj_bias)
    nn.init.normal_(ours.out_proj.bias)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(B, N, C), torch.randn(B, S, C), torch.randn(B, S, C)
    attend = forbidden = None
    if masked:
        attend = torch.rand(B, 1, N, S) > 0.5
        attend[..., 0] = True
        forbidden = ~attend.expand(-1, M, -1, -1).flatten(0, 1)
    expected, _ = theirs(query, key, value, attn_mask=forbidden, need_weights=False)
    torch.testing.assert_close(ours(query, key, value, attend), expected, atol=1e-6, rtol=1e-5)


def test_decoder_layers_read_stride_32_16_8_in_turn_where_the_last_mask_was(make_model, monkeypatch, resize):
    seen = []

    def spy(mask_embed, mask_features):
        seen.append((mask_embed, mask_features))
        return attention_mask(mask_embed, mask_features)

    monkeypatch.setattr(model, "attention_mask", spy)
    outputs = make_model(decoder_layers=4)(image_batch(1, 64, 96))
    sizes = [(2, 3), (4, 6), (8, 12), (2, 3)]
    for (embed, features), prediction, size in zip(seen, outputs["aux_outputs"], sizes, strict=True):
        expected = resize(prediction["pred_masks"].detach().double().numpy(), size)
        found = torch.einsum("bqc,bchw->bqhw", embed, features)
        np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-4)


# ---------------------------------------------------------------------------------- the whole model


@pytest.mark.parametrize("H, W", [(64, 96), (130, 97), (32, 32), (1, 33)])
def test_outputs_have_the_documented_shapes_for_any_size(make_model, H, W):
    outputs = make_model()(image_batch(2, H, W))
    assert set(outputs) == {"pred_logits", "pred_masks", "mask_embed", "mask_features", "aux_outputs"}
    assert len(outputs["aux_outputs"]) == TINY["decoder_layers"]
    for prediction in [outputs, *outputs["aux_outputs"]]:
        assert prediction["pred_logits"].shape == (2, 6, 3 + 1)
        assert prediction["pred_masks"].shape == (2, 6, 8 * math.ceil(H / 32), 8 * math.ceil(W / 32))


@pytest.fixture
def products(monkeypatch):
    """A list with an entry for each time that masks are computed."""
    products, einsum = [], torch.einsum
    monkeypatch.setattr(torch, "einsum", lambda *args: products.append(args) or einsum(*args))
    return products


def factors(B=2, Q=3, C=4, K=5):
    return dict(
        pred_logits=torch.randn(B, Q, K + 1),
        mask_embed=torch.randn(B, Q, C),
        mask_features=torch.randn(B, C, 6, 7),
    )


def test_masks_are_computed_when_they_are_asked_for_and_then_kept(make_model, products):
    outputs = make_model()(image_batch())
    for prediction in [outputs, *outputs["aux_outputs"]]:
        assert "pred_masks" in prediction and "pred_masks" in list(prediction) and len(prediction) >= 4
        assert {"pred_masks"} <= prediction.keys() and "pred_masks" not in prediction.stored
        assert not products
        masks = prediction["pred_masks"]
        assert len(products) == 1 and prediction["pred_masks"] is masks and len(products) == 1
        expected = (prediction["mask_embed"] @ prediction["mask_features"].flatten(2)).view_as(masks)
        torch.testing.assert_close(masks, expected)
        products.clear()


@pytest.mark.parametrize("late", [True, False])
def test_outputs_are_a_mapping_in_every_way(late):
    entries = factors()
    masks = torch.einsum("bqc,bchw->bqhw", entries["mask_embed"], entries["mask_features"])
    if late:
        make, whole = lambda: Outputs(**entries), {**entries, "pred_masks": masks}
    else:
        whole = {"pred_logits": entries["pred_logits"], "pred_masks": masks}
        make = lambda: Outputs(**whole)  # noqa: E731

    def same(found):
        return found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)

    assert isinstance(make(), Mapping) and same(make()) and same(dict(make())) and same({**make()})
    assert same(dict(make().items())) and same((lambda **kwargs: kwargs)(**make()))
    assert same(dict(zip(make(), make().values()))) and len(make()) == len(whole) == len(list(make()))
    assert same(Outputs(**make())) and same({key: make().get(key) for key in whole})
    assert all(key in make() for key in whole) and "pred_mask" not in make() and 3 not in make()
    assert make().get("pred_mask") is None and make().get("aux_outputs", []) == []
    with pytest.raises(KeyError, match="pred_mask"):
        make()["pred_mask"]
    with pytest.raises(TypeError):
        make()["pred_masks"] = masks


def test_outputs_hold_the_earlier_predictions_where_there_are_some():
    earlier, entries = [Outputs(**factors())], factors()
    assert "aux_outputs" not in Outputs(**entries)
    assert Outputs(**entries, aux_outputs=earlier)["aux_outputs"] is earlier
    assert Outputs(**entries, aux_outputs=[])["aux_outputs"] == []


def test_outputs_need_masks_or_both_of_their_factors():
    for missing in ("mask_embed", "mask_features"):
        entries = factors()
        del entries[missing]
        with pytest.raises(ValueError, match="mask_embed and mask_features"):
            Outputs(**entries)


def test_masks_that_are_read_without_gradient_first_have_one_later():
    entries = factors()
    entries["mask_embed"].requires_grad_()
    outputs = Outputs(**entries)
    with torch.no_grad():
        assert not outputs["pred_masks"].requires_grad
    outputs["pred_masks"].sum().backward()
    assert entries["mask_embed"].grad.any()


@pytest.mark.parametrize("name", ["resnet10t", "resnet50", "resnet50d", "resnext50_32x4d"])
def test_a_frozen_norm_within_its_convolution_changes_nothing(name, monkeypatch):
    """Against timm's own model, with the norms behind the convolutions; gradients too."""
    torch.manual_seed(0)
    folded = model.build_backbone(name).double()
    monkeypatch.setattr(model, "fold_frozen_batch_norms", lambda body: None)
    plain = model.build_backbone(name).double()
    for key, value in folded.state_dict().items():
        if key.endswith("running_mean"):
            value.normal_(0, 0.1)
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    plain.load_state_dict(folded.state_dict())
    types = [type(module) for module in folded.modules()]
    assert types.count(model.ConvFrozenBN) == types.count(model.IdentityNorm) > 8
    assert not any(isinstance(module, model.ConvFrozenBN) for module in plain.modules())
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for found, expected in zip(folded(images), plain(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for backbone in (folded, plain):
        sum(feature.square().mean() for feature in backbone(images)).backward()
    for found, expected in zip(folded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-7, atol=1e-9)


def test_bytes_and_floats_give_the_same(make_model):
    tiny, batch = make_model(), image_batch()
    for of_bytes, of_floats in zip(flat(tiny(batch)), flat(tiny(batch.float()))):
        assert torch.equal(of_bytes, of_floats)


def test_images_are_normalised_and_then_padded_with_zeros(make_model):
    """Right and below, and with the mean and standard deviation that were asked for."""
    tiny = make_model(pixel_mean=[100.0, 110.0, 120.0], pixel_std=[50.0, 60.0, 70.0])
    seen = []
    tiny.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = image_batch(1, 50, 40)
    tiny(batch)
    assert seen[0].shape == (1, 3, 64, 64)
    for c, (mean, std) in enumerate([(100, 50), (110, 60), (120, 70)]):
        torch.testing.assert_close(seen[0][0, c, :50, :40], (batch[0, c].float() - mean) / std)
    assert (seen[0][..., 50:, :] == 0).all() and (seen[0][..., 40:] == 0).all()


@pytest.mark.parametrize("norm", ["group", "frozen"])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_equals_its_images_one_by_one(make_model, norm, training):
    tiny, batch = make_model(norm=norm).train(training), image_batch(3, 70, 64)
    together = flat(tiny(batch))
    for b in range(3):
        for expected, whole in zip(flat(tiny(batch[b : b + 1])), together):
            torch.testing.assert_close(whole[b], expected[0], atol=1e-5, rtol=1e-5)


def test_every_parameter_gets_a_gradient(make_model):
    tiny = make_model(decoder_layers=3)
    with torch.no_grad():  # away from the initial zeros, through which no gradient flows
        for parameter in tiny.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    sum(tensor.sum() for tensor in flat(tiny(image_batch()))).backward()
    for name, parameter in tiny.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_frozen_norms_have_nothing_to_learn_and_keep_their_statistics(make_model):
    tiny = make_model(norm="frozen").train()
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    tiny(image_batch())
    assert all(torch.equal(before[name], value) for name, value in tiny.state_dict().items())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in tiny.modules())


@pytest.mark.parametrize(
    "changes, found",
    [
        (dict(backbone_args={**TINY["backbone_args"], "output_stride": 16}), "strides"),
        (dict(backbone="resnet_of_my_dreams"), "resnet_of_my_dreams"),
        (dict(norm="layer"), "'layer'"),
        (dict(hidden_dim=30), "num_heads"),
    ],
)
def test_what_cannot_be_built_is_refused(make_model, changes, found):
    with pytest.raises(ValueError, match=found):
        make_model(**changes)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64), (1, 64, 64, 3)])
def test_images_of_another_form_are_refused(make_model, shape):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        make_model()(torch.zeros(shape))


SWIN = dict(
    backbone="swin_tiny_patch4_window7_224",
    norm="frozen",
    backbone_args=dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4)),
)


def test_swin_takes_images_of_the_size_it_was_made_for(make_model):
    swin = make_model(**{**SWIN, "backbone_args": {**SWIN["backbone_args"], "img_size": 64}})
    assert swin(image_batch(2, 64, 64))["pred_masks"].shape == (2, 6, 16, 16)


@pytest.mark.parametrize("H, W", [(64, 64), (130, 97)])
def test_swin_takes_images_of_any_size(make_model, H, W):
    swin = make_model(**SWIN)
    outputs = swin(image_batch(2, H, W))
    assert outputs["pred_masks"].shape == (2, 6, 8 * math.ceil(H / 32), 8 * math.ceil(W / 32))


def test_a_state_dict_rebuilds_the_same_outputs(make_model, tmp_path):
    first, second, batch = make_model(seed=1), make_model(seed=2), image_batch()
    assert not torch.equal(flat(first(batch))[-1], flat(second(batch))[-1])
    torch.save(first.state_dict(), tmp_path / "model.pt")
    second.load_state_dict(torch.load(tmp_path / "model.pt"))
    for expected, found in zip(flat(first(batch)), flat(second(batch))):
        assert torch.equal(expected, found)


def test_local_backbone_weights_are_read(make_model, tmp_path):
    """A file of timm's names, without a download."""
    names = dict(norm="batch", backbone_args=TINY["backbone_args"])
    first = make_model(seed=1, **names)
    torch.save(first.backbone.body.state_dict(), tmp_path / "weights.pt")
    second = make_model(seed=2, backbone_weights=str(tmp_path / "weights.pt"), **names)
    for name, value in first.backbone.state_dict().items():
        assert torch.equal(value, second.backbone.state_dict()[name]), name


@pytest.mark.parametrize(
    "name, other, words",
    [
        ("resnet18", "resnet34", r"the shape of 'layer1_2_bn1_bias' is \(64,\), not None"),
        (
            "resnet34",
            "resnet18",
            "100 of the 180 tensors of 'resnet34' are there; the shape of 'layer1_2_bn1_b",
        ),
        ("test_resnet", "test_vit", "0 of the 75 tensors"),
    ],
)
def test_weights_of_another_architecture_are_refused(name, other, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        model.build_backbone(name, weights=timm.create_model(other).state_dict())


def test_a_tensor_of_another_shape_is_named():
    weights = timm.create_model("test_vit").state_dict()
    weights["blocks.1.mlp.fc1.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"the shape of 'blocks_1_mlp_fc1_bias' is \(3,\), not \(192,\)"):
        model.build_backbone("test_vit", weights=weights)


def test_register_tokens_for_a_vit_without_are_refused():
    weights = timm.create_model("test_vit").state_dict()
    width = weights["cls_token"].shape[-1]
    weights["register_tokens"] = torch.zeros(1, 4, width)
    with pytest.raises(ValueError, match=r"the shape of 'register_tokens' is \(1, 4, 64\), not None"):
        model.build_backbone("test_vit", weights=weights)


# ------------------------------------------------------------------------------------- backbones of today


def dinov3(**changes):
    torch.manual_seed(0)
    changes = {**TINY, "backbone": "dinov3_s", "backbone_args": {"depth": 2}, **changes}
    return Mask2Former(**changes)


def test_dinov3_has_the_features_of_a_timm_model_made_for_the_image():
    """The image is padded to 64 x 96, which is 4 x 6 patches."""
    ours = dinov3().eval()
    timms = timm.create_model(
        "vit_small_patch16_dinov3", depth=2, img_size=(64, 96), num_classes=0, dynamic_img_size=False
    )
    timms.load_state_dict(ours.backbone.body.state_dict())
    images = image_batch(1, 50, 90)
    mean, std = (torch.tensor(timms.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    padded = nn.functional.pad((images / 255 - mean) / std, (0, 6, 0, 14))
    grid = timms.eval().forward_features(padded)[:, -24:].mT.reshape(1, 384, 4, 6)
    features = ours.backbone(padded)
    assert [x.shape for x in features] == [
        (1, 128 * 2**i, 64 // s, 96 // s) for i, s in enumerate(model.STRIDES)
    ]
    torch.testing.assert_close(features[2], ours.backbone.pyramid[2](grid), rtol=1e-4, atol=1e-5)
    seen = []
    ours.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ours(images)
    torch.testing.assert_close(seen[0], padded)


def test_a_dinov3_model_learns_in_every_parameter():
    vit = dinov3()
    for parameter in vit.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    sum(tensor.sum() for tensor in flat(vit(image_batch()))).backward()
    for name, parameter in vit.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_dinov3_checkpoint_is_read_back(tmp_path):
    args = {**TINY, "backbone": "dinov3_s", "backbone_args": {"depth": 2}}
    first = dinov3().eval()
    torch.save({"model_args": args, "model": first.state_dict()}, tmp_path / "model.pt")
    checkpoint = torch.load(tmp_path / "model.pt")
    second = Mask2Former(**checkpoint["model_args"]).eval()
    second.load_state_dict(checkpoint["model"])
    for expected, found in zip(flat(first(image_batch())), flat(second(image_batch()))):
        assert torch.equal(expected, found)


def test_the_short_names_are_models_with_pretrained_weights():
    assert all(timm.is_model(name) and timm.is_model_pretrained(name) for name in model.BACKBONES.values())


@pytest.mark.parametrize("name", ["dinov3_s", "dinov3_convnext_t"])
def test_dinov3_takes_images_of_any_size(name):
    with torch.device("meta"):
        backbone = model.build_backbone(name)
        sizes = [x.shape[2:] for x in backbone(torch.empty(1, 3, 96, 352))]
    assert sizes == [(96 // s, 352 // s) for s in model.STRIDES]


ANY_SIZE = {
    "test_vit2": {},
    "test_convnext": {},
    "test_maxvit": {},  # padded to multiples of 160
    "eva02_tiny_patch14_224": {"depth": 1},
    "vit_small_patch14_reg4_dinov2": {"depth": 1, "img_size": 98},
    "samvit_base_patch16": {"depth": 2, "embed_dim": 96, "num_heads": 2},
    "xcit_nano_12_p8_224": {"depth": 1},
    "swinv2_tiny_window8_256": {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)},
}


@pytest.mark.parametrize("name", ANY_SIZE)
def test_backbones_of_many_kinds_take_images_of_any_size(make_model, name):
    outputs = make_model(backbone=name, backbone_args=ANY_SIZE[name]).eval()(image_batch(1, 70, 180))
    assert outputs["pred_masks"].shape == (1, 6, 24, 48)
    assert outputs["pred_masks"].isfinite().all()


def test_a_padded_backbone_has_the_features_of_timm():
    """Windows of MaxViT divide 160 only. Within a larger image the features of the image are returned."""
    backbone = model.build_backbone("test_maxvit", norm="batch").eval()
    images = torch.randn(1, 3, 64, 192)
    expected = backbone.body(nn.functional.pad(images, (0, 128, 0, 96)))
    for found, whole, stride in zip(backbone(images), expected, model.STRIDES, strict=True):
        assert whole.shape[2:] == (160 // stride, 320 // stride)
        assert torch.equal(found, whole[..., : 64 // stride, : 192 // stride])


@pytest.mark.parametrize(
    "name, args, words",
    [
        ("beit_base_patch16_224", {"depth": 1}, "takes images of 224 x 224, but not of 288 x 160 .*; choose"),
        ("hiera_tiny_224", {}, "takes images of 224 x 224, but not"),
        ("coatnet_0_rw_224", {}, "takes images of 224 x 224, but not"),
        ("inception_v3", {}, "its feature maps would be"),
        ("visformer_tiny", {}, "strides"),
    ],
)
def test_a_backbone_for_images_of_one_size_is_refused_in_one_line(name, args, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words) as caught:
        model.build_backbone(name, **args)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "file, names",
    [
        ("model.py", "Mask2Former, ms_deform_attn"),
        ("deform_attn_cpu.py", "ms_deform_attn, linear, prefers_channels_last"),
        ("matcher.py", "HungarianMatcher, SetCriterion"),
        ("data.py", "CocoDataset, endless_batches"),
        ("layouts/shapes.py", "write_shapes"),
    ],
)
def test_a_module_can_be_copied_out_alone(tmp_path, file, names):
    run_alone(tmp_path, [file], f"from {Path(file).stem} import {names}")


def run_alone(folder, files, code):
    """Run code in a folder with nothing but these files of the project."""
    for file in files:
        shutil.copy(Path(model.__file__).parent / file, folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", [model, matcher, deform_attn_cpu])
def test_the_example_in_a_docstring_runs_alone(tmp_path, module):
    lines = inspect.getdoc(module).splitlines()
    code = "\n".join(line.removeprefix("    ") for line in lines if line.startswith("    "))
    assert "import" in code and "assert" in code
    run_alone(tmp_path, [Path(module.__file__).name], code)


def test_the_model_is_the_same_without_its_fast_kernels(make_model, monkeypatch):
    """As if deform_attn_cpu.py were not there: outputs and gradients."""
    results = []
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(model, "ms_deform_attn_cpu", None)
            monkeypatch.setattr(model, "linear", nn.functional.linear)
            monkeypatch.setattr(model, "prefers_channels_last", lambda _: False)
        tiny = make_model().double()
        with torch.no_grad():  # Initially samples lie on pixel centers, where the gradient has a step.
            for parameter in tiny.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        outputs = tiny(image_batch().double())
        sum(tensor.square().mean() for tensor in flat(outputs)).backward()
        results.append([*flat(outputs), *(parameter.grad for parameter in tiny.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_the_model_is_seeded_by_torch_alone(make_model):
    first, second = make_model(seed=3), make_model(seed=3)
    assert isinstance(first, Mask2Former)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_many_tokens_through_a_convolution_are_the_same_linear_map(monkeypatch, fast, dtype, tolerance):
    """Values and gradients, also of tokens that are not contiguous."""
    monkeypatch.setattr(deform_attn_cpu, "prefers_channels_last", lambda _: fast)
    torch.manual_seed(0)
    layer = model.Linear(6, 5).to(dtype)
    x = torch.randn(2, 6, 2001, dtype=dtype).mT.requires_grad_()
    grad = torch.randn(2, 2001, 5, dtype=dtype)
    found = layer(x)
    expected = x @ layer.weight.T + layer.bias
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    inputs = x, layer.weight, layer.bias
    pairs = zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=100 * tolerance, atol=100 * tolerance)


def test_under_autocast_samples_are_taken_where_fp32_takes_them():
    """A location rounded to bfloat16 would be off by up to an eighth of a pixel on a level 128 wide."""
    torch.manual_seed(0)
    attention = MSDeformAttn(8, 2, num_levels=1, num_points=2)
    value = torch.arange(256.0).view(1, 256, 1).expand(-1, -1, 8) % 2  # 0 1 0 1 ...: a sample tells its x
    with torch.no_grad():
        attention.sampling_offsets.weight.normal_()
        for proj in (attention.value_proj, attention.output_proj):
            proj.weight.copy_(torch.eye(8))
        query, centers = torch.randn(1, 256, 8), pixel_centers(2, 128)
        expected = attention(query, centers, value, [(2, 128)])
        with torch.autocast("cpu", torch.bfloat16):
            found = attention(query, centers, value, [(2, 128)])
    # 0 and 1 are exact in bfloat16; what is left is the rounding of the output.
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=2**-8)
