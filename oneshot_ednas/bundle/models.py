"""An operation of a latency table as a network of one or several copies of it.

A file with one operation times mostly the call into the interpreter and the transfer. So an
operation is timed as the difference between files with many and with few copies of it.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneshot_ednas.architecture import BlockArchitecture
from oneshot_ednas.bundle.manifest import Layout
from oneshot_ednas.export.calibration import Ranges
from oneshot_ednas.export.graph import Add, Conv, Graph, Op, Shape, trace
from oneshot_ednas.latency.operations import Operation
from oneshot_ednas.models.blocks import BRANCHES, ElasticBlock
from oneshot_ednas.models.layers import BN_MOMENTUM, ConvBN, ElasticBatchNorm, SeparableConv
from oneshot_ednas.space import BlockSpec


class _Block(nn.Module):
    """A block with one option."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.option = BlockArchitecture(
            op=operation.op,
            kernel_size=operation.kernel_size,
            filters=operation.out_channels,
            expand_ratio=operation.expand_ratio,
        )
        spec = BlockSpec(
            stride=operation.stride,
            base=self.option,
            ops=(operation.op,),
            kernel_sizes=(operation.kernel_size,),
            expand_ratios=(operation.expand_ratio,),
            filters=(operation.out_channels,),
        )
        self.block = ElasticBlock(spec, (operation.in_channels,), momentum=BN_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.option)


class _Add(nn.Module):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + other


class _MaxPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2, ceil_mode=True)


class _Resize(nn.Module):
    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=self.size, mode="nearest")


def operation_module(operation: Operation, seed: int) -> nn.Module:
    """The operation, built of the network's own classes, with random weights, to evaluate.

    Args:
        operation: what to build; an addition takes two maps, all else one.
        seed: of the weights and the BN statistics.

    Raises:
        ValueError: for a kind of operation that no network has.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _build(operation)
        for layer in module.modules():
            if isinstance(layer, ElasticBatchNorm):
                # Near 1 and 0, so that activations stay in range; not equal, so that folding shows.
                layer.running_mean.normal_(std=0.1)
                layer.running_var.uniform_(0.5, 1.5)
                nn.init.normal_(layer.bias, std=0.1)
    return module.eval()


def _build(operation: Operation) -> nn.Module:
    in_channels, out_channels = operation.in_channels, operation.out_channels
    if operation.op in BRANCHES:
        return _Block(operation)
    # The table knows one form of each convolution. The network has it with and without ReLU6, and
    # the classifier without BN; all cost the same: devices fuse ReLU6, and BN is folded away.
    if operation.op == "conv":
        return ConvBN(
            in_channels, out_channels, kernel_size=operation.kernel_size, stride=operation.stride
        )
    if operation.op == "separable_conv":
        return SeparableConv(in_channels, out_channels, use_relu6=True, momentum=BN_MOMENTUM)
    if operation.op == "add":
        return _Add()
    if operation.op == "max_pool":
        return _MaxPool()
    if operation.op == "resize":
        return _Resize((operation.out_height, operation.out_width))
    raise ValueError(f"no module for operation {operation.op}")


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibratedGraph:
    """A float graph and the ranges of its tensors: what `write_tflite` needs."""

    graph: Graph
    ranges: Ranges

    @property
    def weight_bytes(self) -> int:
        """Bytes of int8 weights and int32 biases."""
        convs = [op for op in self.graph.ops if isinstance(op, Conv)]
        return sum(conv.weight.numel() + 4 * conv.bias.numel() for conv in convs)


@torch.inference_mode()
def operation_graph(operation: Operation, seed: int) -> CalibratedGraph:
    """The graph of one copy, calibrated on normal noise."""
    size = (operation.in_height, operation.in_width)
    shape: Shape = (1, operation.in_channels, *size)
    shapes = [shape] * (2 if operation.op == "add" else 1)
    graph = trace(operation_module(operation, seed), *shapes)
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    ranges: Ranges = {}
    for name, value in graph.tensors(*inputs):
        low, high = torch.aminmax(value)
        ranges[name] = (float(low), float(high))
    return CalibratedGraph(graph=graph, ranges=ranges)


def layout_of(operation: Operation) -> Layout:
    """How copies of the operation can hang together."""
    before = (operation.in_channels, operation.in_height, operation.in_width)
    if before == (operation.out_channels, operation.out_height, operation.out_width):
        return "chain"
    return "ladder" if operation.op in ("max_pool", "resize") else "sum"


def layout_adds(operation: Operation) -> tuple[Operation, ...]:
    """The additions that one more copy brings along."""
    layout = layout_of(operation)
    if layout == "chain":
        return ()
    out = (operation.out_channels, operation.out_height, operation.out_width)
    if layout == "sum":
        return (addition(*out),)
    return (
        addition(operation.in_channels, operation.in_height, operation.in_width),
        addition(*out),
    )


def addition(channels: int, height: int, width: int) -> Operation:
    """The addition of two maps."""
    return Operation(
        op="add",
        in_channels=channels,
        out_channels=channels,
        in_height=height,
        in_width=width,
        out_height=height,
        out_width=width,
    )


def repeated(single: CalibratedGraph, copies: int, layout: Layout) -> CalibratedGraph:
    """A graph of several copies of an operation, with one input x and one output.

    - `chain`: each copy reads the one before: y_1 = op_1(x), y_i = op_i(y_{i-1}).
    - `sum`: all read the input, and the results are added up: y_1 = op_1(x),
      y_i = y_{i-1} + op_i(x).
    - `ladder`, for an operation without weights, whose copies would be merged into one if they
      read the same: x_1 = x, x_i = x_{i-1} + x; y_1 = op(x_1), y_i = y_{i-1} + op(x_i).

    A second input of the operation (an addition has one) is x in every copy. Each copy has the
    weights of the first shifted by one more place, so that no two are equal.

    Args:
        single: one copy, from `operation_graph`.
        copies: how many, at least 1.
        layout: how they hang together; `chain` needs an operation that keeps the shape.

    Raises:
        ValueError: if there is no copy, or the shapes do not suit the layout.
    """
    graph, ranges = single.graph, single.ranges
    first, *_ = graph.inputs
    (result,) = graph.outputs.values()
    in_shape, out_shape = graph.inputs[first], graph.shapes[result]
    if copies < 1:
        raise ValueError(f"copies: expected at least 1, got {copies}")
    if layout == "chain" and in_shape != out_shape:
        raise ValueError(f"a chain needs equal shapes, got {in_shape} and {out_shape}")
    ops: list[Op] = []
    found: Ranges = {first: ranges[first]}

    def add(name: str, terms: tuple[str, str], shape: Shape) -> str:
        lows, highs = zip(*(found[term] for term in terms), strict=True)
        found[name] = (sum(lows), sum(highs))
        ops.append(Add(name=name, inputs=terms, shape=shape))
        return name

    source, total = first, ""
    for number in range(1, copies + 1):
        prefix = f"copy_{number}/"
        if layout == "ladder" and number > 1:
            source = add(f"input_{number}", (source, first), in_shape)
        names = dict.fromkeys(graph.inputs, first) | {first: source}
        for op in graph.ops:
            names[op.name] = prefix + op.name
            ops.append(_copy(op, names, shift=number - 1))
            low, high = ranges[op.name]
            # In a ladder the input grows with each rung, and the result with it.
            growth = number if layout == "ladder" else 1
            found[names[op.name]] = (growth * low, growth * high)
        if layout == "chain":
            source = total = names[result]
        elif number == 1:
            total = names[result]
        else:
            total = add(f"sum_{number}", (total, names[result]), out_shape)
    outputs = dict.fromkeys(graph.outputs, total)
    return CalibratedGraph(
        graph=Graph(inputs={first: in_shape}, ops=tuple(ops), outputs=outputs), ranges=found
    )


def _copy(op: Op, names: dict[str, str], *, shift: int) -> Op:
    """An operation under its new names; its weights shifted, so that they differ per copy."""
    inputs = tuple(names[name] for name in op.inputs)
    if not isinstance(op, Conv):
        return replace(op, name=names[op.name], inputs=inputs)
    weight, bias = op.weight.roll(shift), op.bias.roll(shift)
    return replace(op, name=names[op.name], inputs=inputs, weight=weight, bias=bias)
