import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_SPACE as SMALL_YAML
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oneshot_ednas import (
    SearchSpace,
    build_network,
    ednas_b0,
    ednas_tiny,
    export_tflite,
    recalibrate_bn,
)
from oneshot_ednas.architecture import BlockArchitecture
from oneshot_ednas.export.calibration import calibrate
from oneshot_ednas.export.contents import read_contents
from oneshot_ednas.export.edgetpu import MAX_VERSIONS
from oneshot_ednas.export.flatbuffer import write_tflite
from oneshot_ednas.export.graph import Conv, Graph, trace
from oneshot_ednas.export.quantize import activation_quantization, quantize, same_padding
from oneshot_ednas.export.runtime import TfliteNetwork
from oneshot_ednas.models.blocks import ElasticBlock
from oneshot_ednas.models.layers import pad_same
from oneshot_ednas.space import BlockSpec

SMALL_SPACE = SearchSpace.from_yaml(SMALL_YAML)
laws = settings(deadline=None, derandomize=True, max_examples=60)
TASKS = {"segmentation": 5, "depth": 1}


def images(count, *size, seed=0):
    return torch.rand(count, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def network(space, seed=0, size=(32, 64), tasks=TASKS):
    """A random architecture with BN statistics of its own."""
    torch.manual_seed(seed)
    architecture = space.sample(np.random.default_rng(seed))
    net = build_network(space.fix(architecture), tasks)
    recalibrate_bn(net, [images(4, 3, *size, seed=i) for i in range(3)])
    return net.eval()


class Function(nn.Module):
    """A module of one function, for operations that need no weights."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def exported(module, x, io="int8"):
    graph = trace(module, (1, *x.shape[1:]))
    return write_tflite(graph, calibrate(graph, [x]), io=io)


def run_file(data, x, kernels="builtin"):
    return TfliteNetwork(data, kernels=kernels)(x)


def error_in_steps(module, x, kernels="default"):
    """SQNR in dB and the largest error in output steps, both for the input that the file reads."""
    data = exported(module, x)
    contents = read_contents(data)
    seen = torch.fake_quantize_per_tensor_affine(
        x, contents.inputs[0].scale[0], contents.inputs[0].zero_point[0], -128, 127
    )
    with torch.no_grad():
        expected = module(seen)
    (got,) = run_file(data, x, kernels).values()
    error = got - expected
    sqnr = 10 * torch.log10(expected.square().sum() / error.square().sum())
    return float(sqnr), float(error.abs().max() / contents.outputs[0].scale[0])


# ---- the float graph


@pytest.mark.parametrize("seed", range(3))
def test_the_graph_computes_what_the_network_does(seed):
    net = network(ednas_tiny(), seed)
    x = images(2, 3, 32, 64, seed=9)
    graph = trace(net, (1, 3, 32, 64))
    values = graph.run(x)
    with torch.no_grad():
        for task, expected in net(x).items():
            torch.testing.assert_close(values[graph.outputs[task]], expected, rtol=1e-3, atol=1e-4)
    assert {name: value.shape[1:] for name, value in values.items()} == {
        name: shape[1:] for name, shape in graph.shapes.items()
    }


def test_odd_sizes_keep_same_padding_and_pooling():
    net = network(ednas_tiny(), 1, size=(42, 70))
    x = images(1, 3, 42, 70, seed=3)
    graph = trace(net, (1, 3, 42, 70))
    with torch.no_grad():
        for task, expected in net(x).items():
            torch.testing.assert_close(
                graph.run(x)[graph.outputs[task]], expected, rtol=1e-3, atol=1e-4
            )
    assert "PAD" not in read_contents(write_tflite(graph, calibrate(graph, [x]))).counts


def test_tracing_leaves_mode_and_weights_alone():
    net = network(SMALL_SPACE).train()
    net.bifpn.eval()  # frozen by its owner
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trace(net, (1, 3, 32, 64))
    assert net.training
    assert not net.bifpn.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_names_are_paths_of_the_modules():
    graph = trace(network(ednas_tiny()), (1, 3, 32, 64))
    names = [op.name for op in graph.ops]
    assert len(set(names)) == len(names)
    assert names[0] == "backbone/stem"
    for part in ("backbone/block_8/", "bifpn/layer_1/top_down_1/add", "bifpn/layer_1/resize"):
        assert any(name.startswith(part) for name in names), part
    assert graph.outputs == {
        "segmentation": "heads/segmentation/classifier",
        "depth": "heads/depth/classifier",
    }


def test_batch_norm_folds_and_activations_fuse():
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(6)
    nn.init.uniform_(bn.running_mean, -1, 1)
    nn.init.uniform_(bn.running_var, 0.5, 2)
    nn.init.uniform_(bn.weight, 0.5, 2)
    nn.init.uniform_(bn.bias, -1, 1)
    module = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), bn, nn.ReLU6()).eval()
    graph = trace(module, (1, 3, 8, 8))
    (op,) = graph.ops
    assert isinstance(op, Conv)
    assert op.activation == "relu6"
    x = images(2, 3, 8, 8) * 3
    with torch.no_grad():
        torch.testing.assert_close(graph.run(x)[op.name], module(x), rtol=1e-5, atol=1e-5)


# ---- integers and bytes


@laws
@given(st.floats(-1e4, 1e4, allow_subnormal=False), st.floats(0, 1e4, allow_subnormal=False))
def test_an_activation_range_holds_zero_exactly_and_both_ends_within_a_step(low, width):
    scale, zero_point, _ = activation_quantization(low, low + width)
    assert -128 <= zero_point[0] <= 127
    assert scale[0] > 0
    for end in (low, low + width):
        step = np.clip(np.rint(end / scale[0]) + zero_point[0], -128, 127)
        assert abs((step - zero_point[0]) * scale[0] - end) <= scale[0] * 1.001


@laws
@given(st.integers(1, 60), st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 2]))
def test_same_padding_is_the_networks(size, kernel, stride):
    x = torch.zeros(1, 1, size, size)
    before, after = same_padding(size, kernel, stride)
    assert pad_same(x, kernel, stride).shape[2] == size + before + after
    assert (size + before + after - kernel) // stride + 1 == -(-size // stride)


@pytest.mark.parametrize("io", ["int8", "uint8"])
def test_a_network_is_integer_throughout_with_old_versions_and_task_names(io, tmp_path):
    report = export_tflite(
        network(ednas_tiny()),
        tmp_path / "m.tflite",
        calibration_images=images(12, 3, 32, 64),
        io=io,
    )
    contents = read_contents(tmp_path / "m.tflite")
    assert contents.is_integer
    assert [t.name for t in contents.inputs] == ["images"]
    assert [t.name for t in contents.outputs] == list(TASKS)
    assert {t.dtype for t in contents.inputs + contents.outputs} == {io}
    assert not {"PAD", "TRANSPOSE"} & set(contents.counts)
    assert all(report.versions[name] <= MAX_VERSIONS[name] for name in contents.counts)
    assert contents.counts.get("QUANTIZE", 0) == (3 if io == "uint8" else 0)
    assert report.size_bytes == (tmp_path / "m.tflite").stat().st_size
    names = [t.name for t in contents.tensors]
    assert len(set(names)) == len(names)


def test_weights_are_symmetric_per_channel_and_biases_have_the_product_scale():
    graph = trace(network(SMALL_SPACE), (1, 3, 32, 64))
    model = quantize(graph, calibrate(graph, [images(4, 3, 32, 64)]))
    convolutions = [op for op in model.operators if "CONV" in op.code]
    assert convolutions
    for op in convolutions:
        x, weight, bias = (model.tensors[i] for i in op.inputs)
        axis = weight.quantization.axis
        assert axis == (3 if op.code == "DEPTHWISE_CONV_2D" else 0)
        assert weight.data.min() >= -127
        assert not weight.quantization.zero_point.any()
        assert len(weight.quantization.scale) == weight.shape[axis]
        np.testing.assert_allclose(
            bias.quantization.scale, x.quantization.scale * weight.quantization.scale, rtol=1e-6
        )


def test_one_convolution_equals_integer_arithmetic_in_numpy():
    torch.manual_seed(1)
    conv = nn.Conv2d(5, 7, 3, padding=1)
    x = images(1, 5, 9, 11)
    graph = trace(conv, (1, 5, 9, 11))
    model = quantize(graph, calibrate(graph, [x]))
    source, weight, bias = (model.tensors[i] for i in model.operators[0].inputs)
    target = model.tensors[model.operators[0].outputs[0]]
    scale, zero_point, _ = source.quantization
    whole = np.clip(np.rint(x.numpy() / scale) + zero_point, -128, 127) - zero_point
    accumulated = F.conv2d(
        torch.from_numpy(whole).double(),
        torch.from_numpy(weight.data.transpose(0, 3, 1, 2).astype(np.float64)),
        torch.from_numpy(bias.data.astype(np.float64)),
        padding=1,
    ).numpy()
    ratio = (scale * weight.quantization.scale / target.quantization.scale)[None, :, None, None]
    expected = np.clip(np.rint(accumulated * ratio) + target.quantization.zero_point, -128, 127)
    got = run_file(exported(conv, x), x)["output"].numpy()
    steps = got / target.quantization.scale + target.quantization.zero_point
    assert np.abs(steps - expected).max() <= 1.001  # kernels round halves in their own way
    assert np.mean(np.abs(steps - expected) > 0.5) < 0.02


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("ordinary", nn.Conv2d(8, 12, 3, padding=1)),
        ("1x1", nn.Conv2d(8, 12, 1)),
        ("valid", nn.Conv2d(8, 12, 3)),
        ("depthwise", nn.Conv2d(8, 8, 5, padding=2, groups=8)),
        ("symmetric stride 2", nn.Conv2d(8, 12, 3, padding=1, stride=2)),
        ("dilated", nn.Conv2d(8, 12, 3, padding=2, dilation=2)),
        ("same", nn.Conv2d(8, 12, 5, padding="same")),
        ("relu", nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU())),
        ("max pool", Function(lambda x: F.max_pool2d(x, 2, ceil_mode=True))),
        ("max pool, dropping the rest", Function(lambda x: F.max_pool2d(x, 2))),
        ("average pool", Function(lambda x: F.avg_pool2d(x, 2))),
        ("nearest", Function(lambda x: F.interpolate(x, size=(31, 22)))),
        ("nearest down", Function(lambda x: F.interpolate(x, size=(6, 5)))),
        (
            "bilinear",
            Function(
                lambda x: F.interpolate(x, size=(30, 22), mode="bilinear", align_corners=True)
            ),
        ),
        ("half-pixel", Function(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"))),
        ("add", Function(lambda x: F.relu6(x + x))),
        ("relu6 that stands alone", Function(lambda x: F.relu6(x) + x)),
    ],
)
def test_each_operation_runs_in_the_interpreter_as_in_torch(name, module):
    torch.manual_seed(0)
    sqnr, steps = error_in_steps(module, images(4, 8, 15, 11) * 4)
    assert sqnr > 35, name
    assert steps <= 3, name


class Reused(nn.Module):
    """A convolution's result, read by what could be merged into it, and once more as it is."""

    def __init__(self, after):
        super().__init__()
        self.conv, self.after = nn.Conv2d(3, 3, 1), after

    def forward(self, x):
        y = self.conv(x)
        return self.after(F.dropout(y, training=False).contiguous()) + y


def test_an_activation_is_not_fused_into_what_others_read_too():
    torch.manual_seed(0)
    module, x = Reused(nn.ReLU6()), images(2, 3, 8, 8) * 4
    with torch.no_grad():
        torch.testing.assert_close(trace(module, (1, 3, 8, 8)).run(x)["add"], module(x))


def test_batch_norm_is_not_folded_into_what_others_read_too():
    with pytest.raises(ValueError, match="whose output nothing else reads"):
        trace(Reused(nn.BatchNorm2d(3)), (1, 3, 8, 8))


def test_a_negative_padding_is_refused():
    module = nn.Sequential(Function(lambda x: F.pad(x, (-1, -1, -1, -1))), nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match="expected zero padding"):
        trace(module, (1, 3, 8, 8))


def test_torchs_own_padding_at_stride_two_costs_a_pad_operation():
    data = exported(nn.Conv2d(3, 4, 3, padding=1, stride=2), images(2, 3, 8, 8))
    assert read_contents(data).counts == {"PAD": 1, "CONV_2D": 1}


def test_switched_off_channels_keep_their_bias():
    conv = nn.Conv2d(4, 6, 1)
    with torch.no_grad():
        conv.weight[::2] = 0
        conv.weight[1] = 1e-12
        conv.bias.copy_(torch.linspace(-3, 3, 6))
    sqnr, steps = error_in_steps(conv, images(4, 4, 8, 8))
    assert sqnr > 35
    assert steps <= 2


def test_a_map_that_is_always_zero_is_exact():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6())
    nn.init.constant_(module[0].bias, -100)
    (got,) = run_file(exported(module, images(2, 3, 8, 8)), images(2, 3, 8, 8)).values()
    assert not got.any()


def block(seed, space):
    """A random block of the space with random BN parameters, and its input."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    index = int(rng.integers(1, len(space.blocks)))
    spec = space.blocks[index]
    one = {
        "op": str(rng.choice(spec.ops)),
        "kernel_size": int(rng.choice(spec.kernel_sizes)),
        "expand_ratio": int(rng.choice(spec.expand_ratios)),
        "filters": int(rng.choice(spec.filters)),
    }
    in_filters = int(rng.choice(space.in_filters(index)))
    choice = BlockArchitecture(**one)
    fixed = BlockSpec(
        stride=spec.stride,
        base=choice,
        ops=(choice.op,),
        kernel_sizes=(choice.kernel_size,),
        expand_ratios=(choice.expand_ratio,),
        filters=(choice.filters,),
    )
    elastic = ElasticBlock(fixed, (in_filters,), momentum=1.0)
    module = Function(lambda x: elastic(x, choice))
    module.elastic = elastic
    with torch.no_grad():
        for name, parameter in elastic.named_parameters():
            if "_bn.weight" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
            elif "_bn.bias" in name:
                nn.init.normal_(parameter, std=0.3)
        x = torch.randn(4, in_filters, 24, 24)
        module.train()(x)
    return module.eval(), x


@pytest.mark.parametrize(
    "count", [pytest.param(12, id="few"), pytest.param(200, marks=pytest.mark.slow, id="many")]
)
def test_blocks_lose_little_by_quantization(count):
    errors = np.array([error_in_steps(*block(seed, ednas_b0())) for seed in range(count)])
    assert errors[:, 0].min() >= 31, errors[:, 0].min()
    assert errors[:, 1].max() <= 6, errors[:, 1].max()


def test_uint8_ends_are_the_int8_ones_shifted(tmp_path):
    net, x = network(SMALL_SPACE), images(12, 3, 32, 64)
    for io in ("int8", "uint8"):
        export_tflite(net, tmp_path / io, calibration_images=x, io=io, input_range=(-1.0, 1.0))
    one, other = (
        TfliteNetwork(tmp_path / io, kernels="builtin")(x[:2]) for io in ("int8", "uint8")
    )
    for task in TASKS:
        torch.testing.assert_close(one[task], other[task], rtol=0, atol=0)


def test_input_range_lets_pixels_in_as_they_are(tmp_path):
    net = network(SMALL_SPACE)
    dark = images(12, 3, 32, 64) * 0.1
    report = export_tflite(
        net, tmp_path / "m", calibration_images=dark, io="uint8", input_range=(-1.0, 1.0)
    )
    ends = report.inputs["images"]
    pixels = np.arange(256)
    error = ends.scale * (pixels - ends.zero_point) - (pixels / 127.5 - 1)
    assert np.abs(error).max() <= 0.51 / 127.5


# ---- what is refused


def test_an_unknown_operation_is_named_with_its_module():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid())
    with pytest.raises(ValueError, match=r"module 1, operation sigmoid: aten\.sigmoid"):
        trace(module, (1, 3, 8, 8))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x + 1, "sum of two maps"),
        (lambda x: x + x[:, :1], "slice"),
        (lambda x: F.pad(x, (1, 1, 1, 1)) + F.pad(x, (1, 1, 1, 1)), "zero padding"),
        (lambda x: F.hardtanh(x + x, -1, 1), "clip to 0..6"),
        (lambda x: F.max_pool2d(x, 3, stride=2, padding=1), "without padding"),
        (lambda x: F.max_pool2d(x, (2, 1)), "one kernel_size"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=1), "without padding, dilation and divisor"),
        (lambda x: torch.add(x, x, alpha=0), "sum of two maps"),
        (lambda x: F.interpolate(x, scale_factor=1.7), "factors that give whole sizes"),
        (lambda x: torch.ones(1, 3, 8, 8), "expected a computed map, got a constant"),
        (lambda x: x, "nothing would compute it"),
    ],
)
def test_operations_without_a_plain_form_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        trace(Function(function), (1, 3, 8, 8))


def test_batch_norm_without_its_convolution_is_refused():
    with pytest.raises(ValueError, match="folded into a convolution right before it"):
        trace(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), (1, 3, 8, 8))


def test_a_grouped_convolution_is_refused_by_name():
    module = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2))
    with pytest.raises(ValueError, match="0: a convolution in 2 groups"):
        exported(module, images(1, 8, 8, 8))


def test_a_supernet_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a supernet cannot be exported"):
        export_tflite(
            build_network(SMALL_SPACE, TASKS),
            tmp_path / "m",
            calibration_images=images(12, 3, 32, 64),
        )
    assert not list(tmp_path.iterdir())


def test_calibration_needs_images(tmp_path):
    net = network(SMALL_SPACE)
    for none in ([], torch.empty(0, 3, 32, 64)):
        with pytest.raises(ValueError, match="at least one image"):
            export_tflite(net, tmp_path / "m", calibration_images=none)
    with pytest.raises(ValueError, match="expected \\[images, channels, height, width\\]"):
        export_tflite(net, tmp_path / "m", calibration_images=torch.zeros(3, 32, 64))
    with pytest.warns(UserWarning, match="calibrated on 9 images only"):
        export_tflite(
            net, tmp_path / "m", calibration_images=[images(4, 3, 32, 64), images(5, 3, 32, 64)]
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough = [torch.empty(0, 3, 32, 64), images(10, 3, 32, 64)]
        export_tflite(net, tmp_path / "m", calibration_images=enough)


def test_an_input_range_has_a_lower_and_a_higher_end(tmp_path):
    for wrong in ((1.0, -1.0), (0.0, 0.0), (0.0, torch.inf)):
        with pytest.raises(ValueError, match="expected a low and a higher end"):
            export_tflite(
                network(SMALL_SPACE),
                tmp_path / "m",
                calibration_images=images(12, 3, 32, 64),
                input_range=wrong,
            )


def test_values_that_are_not_finite_are_named(tmp_path):
    net = network(SMALL_SPACE)
    with torch.no_grad():
        net.bifpn.down_laterals[0].weight[0] = torch.nan
    with pytest.raises(ValueError, match="bifpn/down_lateral_1 holds values from nan"):
        export_tflite(net, tmp_path / "m", calibration_images=images(10, 3, 32, 64))
    assert not list(tmp_path.iterdir())


def test_other_and_damaged_files_are_refused():
    data = exported(nn.Conv2d(3, 4, 1), images(1, 3, 8, 8))
    with pytest.raises(ValueError, match="no TFLite file"):
        read_contents(b"not a model at all")
    with pytest.raises(ValueError, match="damaged TFLite file of 40 bytes"):
        read_contents(data[:40])


def test_a_graph_checks_its_inputs():
    graph = trace(nn.Conv2d(3, 4, 1), (1, 3, 8, 8))
    assert isinstance(graph, Graph)
    with pytest.raises(ValueError, match="expected 1 inputs, got 0"):
        graph.run()
    with pytest.raises(ValueError, match=r"expected \[batch, 3, 8, 8\], got \[1, 3, 8, 9\]"):
        graph.run(torch.zeros(1, 3, 8, 9))


def test_quantization_is_unmoved_by_how_calibration_is_batched():
    net, x = network(SMALL_SPACE), images(12, 3, 32, 64)
    graph = trace(net, (1, 3, 32, 64))
    whole, parts = calibrate(graph, [x]), calibrate(graph, x.split(5))
    for name, ends in whole.items():
        np.testing.assert_allclose(parts[name], ends, rtol=1e-4, atol=1e-5)
