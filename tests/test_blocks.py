"""Elastic blocks: padding, kernels, widths, residuals, and the two ways to run them."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.architecture import BlockArchitecture
from oneshot_ednas.latency.operations import block_options
from oneshot_ednas.models.blocks import ElasticBlock, SharingConfig
from oneshot_ednas.models.layers import (
    BN_EPS,
    ConvBN,
    ElasticBatchNorm,
    SeparableConv,
    centre,
    conv_same,
    conv_weight,
    pad_same,
)
from oneshot_ednas.relaxation import BlockGates
from oneshot_ednas.space import CHOICE_FIELDS, BlockSpec


def spec_of(*, stride=1, ops=("ibn", "fused_ibn"), expand_ratios=(2, 3), filters=(4, 6, 8)):
    base = BlockArchitecture(
        op=ops[0], kernel_size=3, expand_ratio=expand_ratios[0], filters=filters[0]
    )
    return BlockSpec(
        stride=stride,
        base=base,
        ops=ops,
        kernel_sizes=(3, 5),
        expand_ratios=expand_ratios,
        filters=filters,
    )


def gates_of(spec: BlockSpec, block: BlockArchitecture, dtype=torch.float32) -> BlockGates:
    vectors = []
    for field in CHOICE_FIELDS:
        options = spec.options(field)
        vectors.append(torch.eye(len(options), dtype=dtype)[options.index(getattr(block, field))])
    return BlockGates(*vectors)


def randomised(block: ElasticBlock, seed: int) -> ElasticBlock:
    """BN away from its identity start, so that a wrong channel shows."""
    source = torch.Generator().manual_seed(seed)
    for layer in block.modules():
        if isinstance(layer, ElasticBatchNorm):
            for tensor in (layer.weight, layer.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=source)
            for tensor in (layer.bias, layer.running_mean):
                tensor.data.normal_(generator=source)
    for branch in block.branches.values():
        for parameter in branch.kernel_maps.values():
            parameter.data.normal_(std=0.2, generator=source)
    return block


@settings(max_examples=50)
@given(st.integers(1, 17), st.integers(1, 17), st.sampled_from([1, 3, 5]), st.sampled_from([1, 2]))
def test_padding_follows_tensorflow_s_same_rule(height, width, kernel_size, stride):
    x = torch.ones(1, 1, height, width)
    padded = pad_same(x, kernel_size, stride)[0, 0]
    for axis, size in ((0, height), (1, width)):
        # TensorFlow: pad = max((ceil(n / s) - 1) s + k - n, 0), the odd pixel at the end.
        out = math.ceil(size / stride)
        total = max((out - 1) * stride + kernel_size - size, 0)
        assert padded.shape[axis] == size + total
        line = padded.amax(1 - axis).tolist()
        assert line == [0.0] * (total // 2) + [1.0] * size + [0.0] * (total - total // 2)
    y = conv_same(x, torch.ones(1, 1, kernel_size, kernel_size), stride)
    assert y.shape[2:] == (math.ceil(height / stride), math.ceil(width / stride))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
def test_convolution_and_depthwise_match_sums_in_numpy(stride, size):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(1, 3, *size))
    full, depthwise = generator.normal(size=(2, 3, 3, 3)), generator.normal(size=(3, 1, 3, 3))
    padded = pad_same(torch.from_numpy(x), 3, stride).numpy()[0]
    rows, columns = (math.ceil(n / stride) for n in size)
    for weight, is_depthwise in ((full, False), (depthwise, True)):
        y = conv_same(
            torch.from_numpy(x), torch.from_numpy(weight), stride, depthwise=is_depthwise
        ).numpy()[0]
        for c, i, j in itertools.product(range(len(weight)), range(rows), range(columns)):
            window = padded[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
            picked = window[c : c + 1] if is_depthwise else window
            assert y[c, i, j] == pytest.approx((picked * weight[c]).sum())


def test_the_centre_of_a_kernel_is_its_middle():
    weight = torch.arange(25.0).view(1, 1, 5, 5)
    assert centre(weight, 3).flatten().tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    assert centre(weight, 5) is not None
    assert torch.equal(centre(weight, 5), weight)


def test_weights_start_with_he_s_deviation_over_the_fan_out():
    torch.manual_seed(0)
    assert conv_weight(64, 32, 5, 5).std().item() == pytest.approx((2 / (64 * 25)) ** 0.5, rel=0.02)
    # A depthwise output channel feeds one kernel: its fan-out is the area alone.
    assert conv_weight(2000, 1, 3, 3).std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.02)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("channels", [3, 8])
def test_batch_norm_of_leading_channels_matches_numpy(is_training, channels):
    layer = ElasticBatchNorm(8, momentum=0.25)
    with torch.no_grad():
        for tensor in (layer.weight, layer.running_var):
            tensor.uniform_(0.5, 1.5)
        layer.bias.normal_()
        layer.running_mean.normal_()
    old_mean, old_var = layer.running_mean.clone().numpy(), layer.running_var.clone().numpy()
    layer.train(is_training)
    x = torch.randn(4, channels, 5, 6)
    y = layer(x).detach().numpy()
    values = x.numpy()
    mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3))
    if not is_training:
        mean, var = old_mean[:channels], old_var[:channels]
    shape = (1, -1, 1, 1)
    normal = (values - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + BN_EPS)
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    expected = normal * weight[:channels].reshape(shape) + bias[:channels].reshape(shape)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    if is_training:
        old_mean[:channels] += 0.25 * (mean - old_mean[:channels])
        unbiased = var * 120 / 119
        old_var[:channels] += 0.25 * (unbiased - old_var[:channels])
    np.testing.assert_allclose(layer.running_mean.numpy(), old_mean, atol=1e-6)
    np.testing.assert_allclose(layer.running_var.numpy(), old_var, rtol=1e-5)


def test_batch_norm_without_momentum_uses_the_batch_and_keeps_no_statistics():
    layer, x = ElasticBatchNorm(4, momentum=0.0), torch.randn(4, 4, 3, 3)
    reference = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=BN_EPS)
    assert torch.equal(layer(x), reference)
    assert layer.running_mean.tolist() == [0.0] * 4
    assert layer.running_var.tolist() == [1.0] * 4


def test_batch_norm_with_sets_uses_the_option_s_or_mixes_them_by_gates():
    steps = (torch.arange(6) < torch.tensor([[2, 4], [3, 6]]).unsqueeze(-1)).float()
    layer = ElasticBatchNorm(6, momentum=0.0, option_steps=steps)
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    sets = layer.weight.detach().numpy()
    weight, bias = layer.affine((1, 0))
    assert np.array_equal(weight.detach().numpy(), sets[1, 0])
    assert torch.equal(bias, layer.bias[1, 0])
    gates = torch.outer(torch.tensor([0.3, 0.7]), torch.tensor([0.6, 0.4]))
    expected = np.zeros(6)
    for i, e, c in itertools.product(range(2), range(2), range(6)):
        # Beyond an option's width its own numbers are never trained: the largest option's count.
        own = c < (2, 4, 3, 6)[2 * i + e]
        expected[c] += gates[i, e] * (sets[i, e, c] if own else sets[1, 1, c])
    np.testing.assert_allclose(layer.affine(gates)[0].detach().numpy(), expected, rtol=1e-5)
    x = torch.randn(3, 6, 4, 4)
    normal = F.batch_norm(x, None, None, training=True, eps=BN_EPS)
    mixed = normal * layer.affine(gates)[0].view(-1, 1, 1) + layer.affine(gates)[1].view(-1, 1, 1)
    torch.testing.assert_close(layer(x, gates), mixed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["ibn", "fused_ibn"])
def test_smaller_kernels_are_maps_of_the_next_larger_one_s_centre(op):
    spec = replace(spec_of(), kernel_sizes=(3, 5, 7))
    block = ElasticBlock(spec, (4,), momentum=0.0, sharing=SharingConfig(kernel_transform=True))
    branch = block.branches[op]
    assert set(branch.kernel_maps) == {"5", "3"}
    torch.manual_seed(1)
    for parameter in branch.kernel_maps.values():
        assert not parameter.any()
        torch.nn.init.normal_(parameter)
    largest = getattr(branch, branch.kernel_name)
    kernels = {7: largest.detach().double().numpy()}
    for size in (5, 3):
        larger = kernels[size + 2][:, :, 1:-1, 1:-1]
        full = np.eye(size**2) + branch.kernel_maps[str(size)].detach().double().numpy()
        kernels[size] = np.einsum("oit,tu->oiu", larger.reshape(*larger.shape[:2], -1), full)
        kernels[size] = kernels[size].reshape(larger.shape)
    for size, expected in kernels.items():
        got = branch._kernel(largest, size).detach().numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_conv_bn_reads_the_leading_channels_and_clips_if_wished():
    layer = ConvBN(6, 4, kernel_size=3, stride=2).eval()
    x = 100 * torch.randn(2, 3, 8, 8)
    y = layer(x)
    assert y.shape == (2, 4, 4, 4)
    assert y.min() == 0
    assert y.max() == 6
    layer.use_relu6 = False
    z = layer(x)
    assert z.min() < 0
    torch.testing.assert_close(F.relu6(z), y)
    torch.testing.assert_close(layer(F.pad(x, (0, 0, 0, 0, 0, 3))), z)


def test_a_separable_convolution_is_a_depthwise_and_a_pointwise_one():
    layer = SeparableConv(4, 7, use_relu6=False, momentum=0.0).eval()
    x = torch.randn(1, 4, 5, 6)
    weight = torch.einsum("oi,ikl->oikl", layer.pointwise.weight[:, :, 0, 0], layer.depthwise[:, 0])
    expected = F.conv2d(x, weight, padding=1) / (1 + BN_EPS) ** 0.5
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "sharing",
    [SharingConfig(), SharingConfig(bn_affine="per_width", kernel_transform=True)],
    ids=["plain", "own"],
)
def test_one_hot_relaxed_equals_sliced_for_every_option_and_in_width(stride, is_training, sharing):
    spec, in_filters = spec_of(stride=stride), (4, 8)
    block = ElasticBlock(spec, in_filters, momentum=0.0, sharing=sharing)
    block = randomised(block, 0).train(is_training)
    x = torch.randn(2, max(in_filters), 7, 6)
    for index, width in enumerate(in_filters):
        only = F.pad(x[:, :width], (0, 0, 0, 0, 0, max(in_filters) - width))
        in_gate = torch.eye(len(in_filters))[index]
        for option in block_options(spec):
            sliced = block(x[:, :width], option)
            relaxed = block(only, gates_of(spec, option), in_gate)
            assert sliced.shape[1] == option.filters
            torch.testing.assert_close(relaxed[:, : option.filters], sliced, rtol=1e-5, atol=1e-5)
            assert not relaxed[:, option.filters :].any()


def test_an_ibn_of_expansion_one_has_no_expanding_convolution():
    spec = spec_of(ops=("ibn",), expand_ratios=(1,))
    names = dict(ElasticBlock(spec, (4,), momentum=0.0).branches["ibn"].named_parameters())
    assert "expand" not in names
    names = dict(ElasticBlock(spec_of(), (4,), momentum=0.0).branches["ibn"].named_parameters())
    assert "expand" in names


@pytest.mark.parametrize("op", ["ibn", "fused_ibn"])
@pytest.mark.parametrize(
    ("stride", "width", "filters", "adds"),
    [(1, 8, 8, True), (1, 4, 4, True), (1, 4, 8, False), (1, 8, 4, False), (2, 8, 8, False)],
)
def test_the_residual_adds_only_at_stride_1_and_equal_widths(op, stride, width, filters, adds):
    spec = spec_of(stride=stride)
    block = ElasticBlock(spec, (4, 8), momentum=0.0)
    torch.nn.init.zeros_(block.branches[op].project)
    option = BlockArchitecture(op=op, kernel_size=5, expand_ratio=2, filters=filters)
    x = torch.randn(2, width, 6, 6)
    y = block(x, option)
    assert torch.equal(y, x) if adds else y.abs().max() == 0


def test_soft_gates_mix_kernels_in_weight_space_and_mask_widths():
    spec = spec_of(ops=("fused_ibn",), filters=(4, 8))
    block = randomised(ElasticBlock(spec, (8,), momentum=0.0), 1).eval()
    branch = block.branches["fused_ibn"]
    gates = BlockGates(
        torch.ones(1), torch.tensor([0.3, 0.7]), torch.tensor([0.6, 0.4]), torch.tensor([0.2, 0.8])
    )
    x = torch.randn(1, 8, 5, 5)
    kernel = 0.7 * branch.expand + 0.3 * F.pad(centre(branch.expand, 3), (1, 1, 1, 1))
    h = F.relu6(branch.expand_bn(F.conv2d(x, kernel, padding=2)))
    # 16 hidden channels serve both ratios, the last 8 only the larger; widths likewise.
    h = h * torch.tensor([1.0] * 16 + [0.4] * 8).view(-1, 1, 1)
    y = branch.project_bn(F.conv2d(h, branch.project))
    y = y * torch.tensor([1.0] * 4 + [0.8] * 4).view(-1, 1, 1)
    expected = y + 0.8 * x  # the residual exists only at width 8
    torch.testing.assert_close(block(x, gates, torch.ones(1)), expected, rtol=1e-5, atol=1e-5)


def test_soft_op_gates_mix_the_two_branches():
    spec = spec_of(filters=(6,))
    block = randomised(ElasticBlock(spec, (4,), momentum=0.0), 2).eval()
    x = torch.randn(1, 4, 5, 5)
    outputs = [
        block(x, BlockArchitecture(op=op, kernel_size=5, expand_ratio=3, filters=6))
        for op in spec.ops
    ]
    gates = BlockGates(
        torch.tensor([0.25, 0.75]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([0.0, 1.0]),
        torch.ones(1),
    )
    expected = 0.25 * outputs[0] + 0.75 * outputs[1]
    torch.testing.assert_close(block(x, gates, torch.ones(1)), expected)
