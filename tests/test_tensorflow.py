"""The exporter held against TensorFlow's own converter; runs where tensorflow-cpu is installed."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_export import Function, block, images
from torch import nn

from oneshot_ednas import ednas_b0
from oneshot_ednas.export.calibration import calibrate
from oneshot_ednas.export.contents import read_contents
from oneshot_ednas.export.flatbuffer import write_tflite
from oneshot_ednas.export.graph import Add, Conv, Graph, Pool, Resize, trace
from oneshot_ednas.export.quantize import same_padding
from oneshot_ednas.export.runtime import TfliteNetwork
from oneshot_ednas.models.layers import SeparableConv

pytestmark = pytest.mark.tensorflow


@pytest.fixture(scope="module")
def tf():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("tensorflow")


def activated(tf, y, activation):
    return {None: lambda x: x, "relu": tf.nn.relu, "relu6": tf.nn.relu6}[activation](y)


def in_tensorflow(tf, graph: Graph, x):
    """The graph's operations in TensorFlow, on NHWC."""
    values = {next(iter(graph.inputs)): x}
    for op in graph.ops:
        inputs = [values[name] for name in op.inputs]
        height, width = inputs[0].shape[1:3]
        if isinstance(op, Conv):
            rows, columns = op.weight.shape[2:]
            same = same_padding(width, columns, op.stride) + same_padding(height, rows, op.stride)
            assert op.padding in (same, (0, 0, 0, 0))
            padding = "SAME" if op.padding == same else "VALID"
            convolve = tf.nn.depthwise_conv2d if op.is_depthwise else tf.nn.conv2d
            axes = (2, 3, 0, 1) if op.is_depthwise else (2, 3, 1, 0)
            kernel = op.weight.permute(*axes).numpy()
            strides = [1, op.stride, op.stride, 1]
            y = convolve(inputs[0], kernel, strides=strides, padding=padding)
            y = activated(tf, tf.nn.bias_add(y, op.bias.numpy()), op.activation)
        elif isinstance(op, Add):
            y = activated(tf, inputs[0] + inputs[1], op.activation)
        elif isinstance(op, Pool):
            y = tf.nn.max_pool2d(inputs[0], op.kernel_size, op.stride, "SAME")
        elif isinstance(op, Resize):
            y = tf.compat.v1.image.resize_nearest_neighbor(inputs[0], op.shape[2:])
        values[op.name] = y
    (output,) = graph.outputs.values()
    return values[output]


def converted(tf, graph, x):
    """TensorFlow's full-int8 file of a graph, calibrated on the same images."""
    nhwc = x.permute(0, 2, 3, 1).numpy()
    function = tf.function(
        lambda batch: in_tensorflow(tf, graph, batch),
        input_signature=[tf.TensorSpec((1, *nhwc.shape[1:]), tf.float32)],
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [function.get_concrete_function()], tf.Module()
    )
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[None]] for image in nhwc)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()


def down_and_up(x):
    return F.relu6(F.interpolate(F.max_pool2d(x, 2, ceil_mode=True), size=x.shape[2:]) + x)


def separable():
    torch.manual_seed(0)
    module = SeparableConv(8, 12, use_relu6=True, momentum=1.0)
    x = images(4, 8, 24, 24)
    with torch.no_grad():
        module.train()(x)
    return module.eval(), x


CASES = {f"block {seed}": lambda seed=seed: block(seed, ednas_b0()) for seed in range(10)} | {
    "separable": separable,
    "pool, resize, add": lambda: (Function(down_and_up), images(4, 8, 15, 11) * 4),
    "stem": lambda: (nn.Conv2d(3, 8, 3, stride=1, padding=1), images(4, 3, 16, 16)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_files_agree_with_tensorflows_converter(tf, case):
    module, x = CASES[case]()
    graph = trace(module, (1, *x.shape[1:]))
    ours = write_tflite(graph, calibrate(graph, [x]))
    theirs = converted(tf, graph, x)
    mine, other = read_contents(ours), read_contents(theirs)
    assert mine.counts == other.counts
    for one, two in zip(mine.inputs + mine.outputs, other.inputs + other.outputs, strict=True):
        assert one.shape == two.shape
        np.testing.assert_allclose(one.scale, two.scale, rtol=1e-5)
        assert one.zero_point == two.zero_point
    weights = [sorted(t.scale for t in c.tensors if t.num_bytes) for c in (mine, other)]
    np.testing.assert_allclose(np.concatenate(weights[0]), np.concatenate(weights[1]), rtol=1e-4)
    results = [
        next(iter(TfliteNetwork(data, kernels="builtin")(x).values())) for data in (ours, theirs)
    ]
    steps = (results[0] - results[1]).abs() / mine.outputs[0].scale[0]
    assert steps.max() <= 1.01
    assert (steps > 0.5).float().mean() < 0.02
