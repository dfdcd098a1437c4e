"""DeepLabv3+ encoders: published sizes, dilation against striding, tracing, gradients."""

import copy
import math

import jaxtyping
import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from oneshot_ednas.models.backbones import InvertedResidual, ResidualBlock, convolution, scaled
from oneshot_ednas.models.deeplab import ASPP, ENCODERS, Decoder, named_encoder
from oneshot_ednas.models.encoder import Chain, Encoder, output_norms

SMALL = {"width": 0.25, "aspp_channels": 16, "low_level_channels": 8, "decoder_channels": 16}
# The 1x1 convolution with BN from 320 to 1280 channels that both end with before the classifier.
LAST_CONVOLUTION = 320 * 1280 + 2 * 1280


def small(name: str, **options) -> Encoder:
    torch.manual_seed(0)
    return named_encoder(name, **SMALL | options)


def with_statistics(module: nn.Module) -> nn.Module:
    """In evaluation mode with running statistics that are not the identity."""
    source = torch.Generator().manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low in ((layer.running_mean, -0.2), (layer.running_var, 0.5)):
                assert tensor is not None
                tensor.uniform_(low, low + 0.5, generator=source)
    return module.eval()


def outputs(chain: Chain, images: Tensor) -> list[Tensor]:
    """Of every layer; here each reads the one before."""
    found, x = [], images
    for layer in chain.layers.values():
        x = layer(x)
        found.append(x)
    return found


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def gmacs(module: nn.Module, *inputs: Tensor) -> tuple[float, tuple[Tensor, ...] | Tensor]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found = module.eval()(*inputs)
    return counter.get_total_flops() / 2e9, found


@pytest.mark.parametrize(
    ("name", "published", "num_layers"),
    [
        ("mobilenet_v2", 2_223_872 - LAST_CONVOLUTION, 1 + 17 + 1),
        ("mnasnet", 3_102_312 - LAST_CONVOLUTION, 1 + 17 + 1),
        ("resnet34", 21_284_672, 1 + 16 + 1),
        ("resnet50", 23_508_032, 1 + 16 + 1),
    ],
)
def test_backbones_have_their_published_sizes(name, published, num_layers):
    """Parameters of the classifiers without their last layers."""
    chain = Chain(named_encoder(name))
    assert len(chain.layers) == num_layers
    aspp = chain.layers["aspp"]
    assert num_parameters(chain) - num_parameters(aspp) == published


# Table of BMTAS with one-image multiply-adds at 512 x 512, tasks of 21, 7, 2, 3 and 1 channels.
@pytest.mark.parametrize(
    ("name", "single", "shared", "tolerance"),
    [("mobilenet_v2", 15.7, 6.0, 0.011), ("resnet50", 345.7, 154.6, 0.001)],
)
def test_multiply_adds_are_near_the_published_ones(name, single, shared, tolerance):
    encoder = named_encoder(name)
    images = torch.zeros(1, 3, 512, 512, device="meta")
    once, features = gmacs(Chain(encoder).to("meta"), images)
    decoders = sum(
        gmacs(encoder.build_decoder(channels).to("meta"), *features)[0]
        for channels in (21, 7, 2, 3, 1)
    )
    assert 5 * once + decoders == pytest.approx(single, rel=tolerance)
    assert once + decoders == pytest.approx(shared, rel=tolerance)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(48, 64), (33, 65), (7, 5)])
@pytest.mark.parametrize("name", ENCODERS)
def test_sizes_follow_the_strides(name, size, output_stride):
    """Also odd ones, and images smaller than the stride; the raw map is at stride 4."""
    encoder = small(name, output_stride=output_stride)
    low, pooled = Chain(encoder).eval()(torch.zeros(2, 3, *size))
    assert low.shape[2:] == tuple(math.ceil(s / 4) for s in size)
    assert pooled.shape == (2, 16, *(math.ceil(s / output_stride) for s in size))
    assert encoder.build_decoder(5).eval()(low, pooled).shape == (2, 5, *low.shape[2:])


@pytest.mark.parametrize("name", ENCODERS)
def test_low_level_features_are_the_last_at_stride_4(name):
    encoder = small(name)
    low, last = encoder.decoder_reads
    sizes = [x.shape[-1] for x in outputs(Chain(encoder).eval(), torch.zeros(1, 3, 64, 64))]
    assert sizes[low] == 16
    assert sizes[low + 1] == 8
    assert (
        encoder.layers[low].name
        == {
            "mobilenet_v2": "block_3",
            "mnasnet": "block_4",
            "resnet34": "block_3",
            "resnet50": "block_3",
        }[name]
    )
    assert encoder.layers[last].name == "aspp"


# At a width of 0.03 most stages are as wide as the one before: a block that dilates instead of
# striding must not gain a plain shortcut by that.
@pytest.mark.parametrize("width", [0.03, 0.25])
@pytest.mark.parametrize("size", [(64, 64), (33, 71)])
@pytest.mark.parametrize("name", ENCODERS)
def test_dilation_computes_what_striding_does_and_what_lies_between(name, size, width):
    """The same weights at output stride 8 give, at every second pixel, those of 16, and so on."""
    torch.manual_seed(2)
    images = torch.randn(1, 3, *size)
    strided = with_statistics(Chain(small(name, width=width, output_stride=32)))
    coarse = outputs(strided, images)[-2]
    for output_stride in (16, 8):
        dilated = Chain(small(name, width=width, output_stride=output_stride))
        dilated.load_state_dict(strided.state_dict())
        fine = outputs(dilated.eval(), images)[-2]
        every = 32 // output_stride
        assert fine.shape[-1] == math.ceil(size[1] / output_stride)
        assert fine.std() > 0
        torch.testing.assert_close(fine[..., ::every, ::every], coarse, rtol=1e-4, atol=1e-5)


def test_atrous_rates_reach_as_far_in_the_image_at_each_output_stride():
    for output_stride, rates in ((8, [12, 24, 36]), (16, [6, 12, 18]), (32, [3, 6, 9])):
        aspp = small("resnet34", output_stride=output_stride).layers[-1].build()
        assert [branch.conv.dilation[0] for branch in aspp.atrous] == rates


def test_the_atrous_branches_see_their_rate_and_the_image_branch_everything():
    """By which inputs an output's gradient reaches."""
    torch.manual_seed(0)
    aspp = ASPP(3, 4, rates=(2,), activation="relu").eval()
    x = torch.randn(1, 3, 9, 9, requires_grad=True)
    reached = {}
    for name, branch in (("point", aspp.point), ("atrous", aspp.atrous[0])):
        # Before the activation, which may be off.
        (gradient,) = torch.autograd.grad(branch.bn(branch.conv(x))[..., 4, 4].sum(), x)
        reached[name] = gradient.abs().sum((0, 1)).nonzero().tolist()
    assert reached["point"] == [[4, 4]]
    assert reached["atrous"] == [[i, j] for i in (2, 4, 6) for j in (2, 4, 6)]
    shifted = x.roll((3, 2), (2, 3))
    assert torch.allclose(
        aspp.image(x.mean((2, 3), keepdim=True)), aspp.image(shifted.mean((2, 3), keepdim=True))
    )
    # All branches come to the projection: each slice of its input's weights gets a gradient.
    aspp(x).square().sum().backward()
    by_branch = aspp.project.conv.weight.grad.abs().sum((0, 2, 3)).reshape(3, 4).sum(1)
    assert (by_branch > 0).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_torch_fx_traces_the_chain(name, monkeypatch):
    """One graph for any size, in which every convolution and BN is a module call."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # tracing runs on proxies
    chain = with_statistics(Chain(small(name)))
    traced = fx.symbolic_trace(chain)
    operators = (nn.Conv2d, nn.BatchNorm2d)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    held = [path for path, layer in chain.named_modules() if isinstance(layer, operators)]
    called = [path for path in called if isinstance(chain.get_submodule(path), operators)]
    assert sorted(called) == sorted(held)
    for size in ((48, 64), (33, 65)):
        images = torch.randn(2, 3, *size)
        for got, expected in zip(traced(images), chain(images), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_gets_a_gradient(name):
    encoder = small(name)
    chain, decoders = Chain(encoder), [encoder.build_decoder(4), encoder.build_decoder(1)]
    torch.manual_seed(3)
    features = chain(torch.randn(4, 3, 64, 64))
    torch.stack([decoder(*features).square().mean() for decoder in decoders]).sum().backward()
    for module in (chain, *decoders):
        for path, parameter in module.named_parameters():
            assert parameter.grad is not None, path
            assert parameter.grad.isfinite().all(), path
            assert parameter.grad.any(), path


@pytest.mark.parametrize(("groups", "fan_out"), [(1, 9 * 512), (512, 9)])
def test_convolutions_are_drawn_by_their_fan_out(groups, fan_out):
    """Also depthwise ones, whose inputs reach one channel each."""
    torch.manual_seed(4)
    weight = convolution(512, 512, kernel_size=3, groups=groups).weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)


@pytest.mark.parametrize("name", ENCODERS)
def test_output_norms_set_what_a_layer_adds(name):
    """With zero scale and a shift of 3, a block gives its shortcut and 3, any other layer 3."""
    chain = Chain(small(name)).train()
    x = torch.randn(4, 3, 64, 64)
    for path, layer in chain.layers.items():
        expected = torch.full_like(layer(x), 3.0)
        if isinstance(layer, ResidualBlock):
            expected = (expected + (x if layer.shortcut is None else layer.shortcut(x))).relu()
        elif isinstance(layer, InvertedResidual) and layer.has_residual:
            expected = expected + x
        silenced = copy.deepcopy(layer)
        (norm,) = output_norms(silenced)
        nn.init.zeros_(norm.weight)
        nn.init.constant_(norm.bias, 3.0)
        torch.testing.assert_close(silenced(x), expected, msg=path)
        x = layer(x).detach()


def test_decoders_of_tasks_are_their_own():
    encoder = small("mobilenet_v2")
    first, second = encoder.build_decoder(3), encoder.build_decoder(3)
    assert isinstance(first, Decoder)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


def test_scaled_widths_are_multiples_of_8_that_lose_at_most_a_tenth():
    for channels in (16, 24, 32, 40, 64, 80, 96, 160, 192, 320, 512, 2048):
        assert scaled(channels, 1.0) == channels
        for width in (0.05, 0.1, 0.35, 0.5, 0.75, 1.3, 1.4):
            found = scaled(channels, width)
            assert found % 8 == 0
            assert found >= max(8, 0.9 * channels * width)
            assert found < 1.1 * channels * width + 8
    # Of MobileNetV2 at 0.35 and 1.4 as published.
    assert [scaled(c, 0.35) for c in (32, 24, 160, 320)] == [16, 8, 56, 112]
    assert [scaled(c, 1.4) for c in (32, 16, 24, 96)] == [48, 24, 32, 136]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg16", {}, "no backbone 'vgg16'; expected one of mobilenet_v2, mnasnet, resnet34, res"),
        ("mnasnet", {"depth": 3}, "mnasnet has no option depth; expected width, output_stride"),
        ("resnet34", {"width": 0.0}, "resnet34: width 0.0; expected a multiplier above 0"),
        ("resnet50", {"width": -1.0}, "resnet50: width -1.0; expected"),
        ("mobilenet_v2", {"width": math.nan}, "mobilenet_v2: width nan; expected"),
        ("mobilenet_v2", {"width": math.inf}, "mobilenet_v2: width inf; expected"),
        ("mnasnet", {"output_stride": 4}, "mnasnet: output_stride 4; expected 8, 16 or 32"),
        ("resnet50", {"aspp_channels": 0}, "resnet50: aspp_channels 0; expected a whole number"),
        ("resnet50", {"low_level_channels": -8}, "resnet50: low_level_channels -8; expected"),
        ("mnasnet", {"decoder_channels": 0}, "mnasnet: decoder_channels 0; expected"),
    ],
)
def test_wrong_names_and_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        named_encoder(name, **options)
