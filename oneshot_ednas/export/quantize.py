"""A float graph with ranges as a full-int8 TFLite model, in plain arrays.

The scheme is TensorFlow Lite's 8-bit specification: activations int8 with a scale and zero point
per tensor, weights int8 with one scale per output channel and zero point 0, biases int32 with the
product of both scales. Resize and pooling keep their input's scale, as their kernels demand.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from oneshot_ednas.export.calibration import Ranges
from oneshot_ednas.export.graph import Activation, Add, Conv, Graph, Op, Pool, Relu, Resize, Shape

IoType = Literal["int8", "uint8"]
VERSIONS: Mapping[str, int] = {
    "ADD": 2,
    "AVERAGE_POOL_2D": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "MAX_POOL_2D": 2,
    "PAD": 2,
    "QUANTIZE": 2,
    "RELU": 2,
    "RELU6": 2,
    "RESIZE_BILINEAR": 2,
    "RESIZE_NEAREST_NEIGHBOR": 2,
}
"""Versions that are written: the oldest that take int8, so that old readers take them too."""
HALF_PIXEL_BILINEAR_VERSION = 3
MIN_REQUANTIZATION = 2.0**-30
"""Kernels refuse smaller ratios of product scale to output scale (XNNPACK below 2^-32)."""
MIN_RANGE = 1e-6


class Quantization(NamedTuple):
    """Real value = scale * (integer - zero point), along `axis` where there are several."""

    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int64]
    axis: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorSpec:
    """A tensor of the file: NHWC for maps, OHWI for weights, 1HWO for depthwise ones."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["int8", "uint8", "int32"]
    quantization: Quantization | None = None
    data: npt.NDArray[Any] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class OperatorSpec:
    """An operator of the file; inputs and outputs are positions of tensors."""

    code: str
    version: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, int | bool] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedModel:
    """What a file holds."""

    tensors: list[TensorSpec]
    operators: list[OperatorSpec]
    inputs: list[int]
    outputs: list[int]


def quantize(graph: Graph, ranges: Ranges, *, io: IoType = "int8") -> QuantizedModel:
    """Choose scales and quantize the weights.

    Args:
        graph: operations in float.
        ranges: smallest and largest value of every tensor of the graph.
        io: type of the model's inputs and outputs; `uint8` adds a QUANTIZE op to each.

    Raises:
        ValueError: for a grouped convolution or another operation that TFLite has no int8 form of.
    """
    if io not in ("int8", "uint8"):
        raise ValueError(f"io: expected int8 or uint8, got {io}")
    return _Quantizer(graph, ranges).model(io)


def activation_quantization(low: float, high: float) -> Quantization:
    """Asymmetric int8 over a range that is widened to hold 0, so that padding is exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low < MIN_RANGE:
        high = low + 1.0  # all but zero: a scale that kernels take, rather than digits of noise
    scale = np.float32((high - low) / 255)
    zero_point = int(np.clip(round(-128 - low / float(scale)), -128, 127))
    return Quantization(np.array([scale]), np.array([zero_point]))


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Pixels that TFLite's SAME adds before and after an axis."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2


class _Quantizer:
    def __init__(self, graph: Graph, ranges: Ranges) -> None:
        self.graph, self.ranges, self.shapes = graph, ranges, graph.shapes
        self.tensors: list[TensorSpec] = []
        self.operators: list[OperatorSpec] = []
        self.index: dict[str, int] = {}
        self.scales: dict[str, Quantization] = {}
        self.public = {tensor: name for name, tensor in graph.outputs.items()}

    def model(self, io: IoType) -> QuantizedModel:
        wraps = io == "uint8"
        inputs = [self._input(name, wraps=wraps) for name in self.graph.inputs]
        for op in self.graph.ops:
            self._op(op, wraps=wraps)
        outputs = [
            self._output(name, tensor, wraps=wraps) for name, tensor in self.graph.outputs.items()
        ]
        return QuantizedModel(
            tensors=self.tensors, operators=self.operators, inputs=inputs, outputs=outputs
        )

    # Ends -----------------------------------------------------------------------------------

    def _input(self, name: str, *, wraps: bool) -> int:
        quantization = self._range(name)
        if not wraps:
            return self._activation(name, quantization)
        outside = self._tensor(name, _nhwc(self.shapes[name]), "uint8", _as_uint8(quantization))
        inside = self._activation(name, quantization, label=f"{name}/int8")
        self._operator("QUANTIZE", (outside,), inside)
        return outside

    def _output(self, public: str, name: str, *, wraps: bool) -> int:
        if not wraps:
            return self.index[name]
        scale = _as_uint8(self.scales[name])
        outside = self._tensor(public, _nhwc(self.shapes[name]), "uint8", scale)
        self._operator("QUANTIZE", (self.index[name],), outside)
        return outside

    # Operations -----------------------------------------------------------------------------

    def _op(self, op: Op, *, wraps: bool) -> None:
        inputs = tuple(self.index[name] for name in op.inputs)
        before = self.scales[op.inputs[0]]
        keeps_scale = isinstance(op, (Pool, Resize))
        after = before if keeps_scale else self._range(op.name)
        label = op.name if wraps else self.public.get(op.name, op.name)
        if isinstance(op, Conv):
            inputs, options = self._conv(op, inputs[0], before, after)
            code = "DEPTHWISE_CONV_2D" if op.is_depthwise else "CONV_2D"
        elif isinstance(op, Add):
            code, options = "ADD", {"FusedActivationFunction": _activation_code(op.activation)}
        elif isinstance(op, Pool):
            code = {"max": "MAX_POOL_2D", "average": "AVERAGE_POOL_2D"}[op.mode]
            options = self._pool_options(op)
        elif isinstance(op, Resize):
            self._resize(op, inputs[0], self._activation(op.name, after, label=label))
            return
        elif isinstance(op, Relu):
            code, options = op.activation.upper(), {}
        else:
            raise ValueError(f"{op.name}: {type(op).__name__} has no TFLite form here")
        self._operator(code, inputs, self._activation(op.name, after, label=label), options)

    def _conv(
        self, op: Conv, source: int, before: Quantization, after: Quantization
    ) -> tuple[tuple[int, ...], dict[str, int | bool]]:
        if op.groups > 1 and not op.is_depthwise:
            raise ValueError(
                f"{op.name}: a convolution in {op.groups} groups; the Edge TPU has only ordinary "
                f"and depthwise convolutions"
            )
        padding, source = self._conv_padding(op, source, before)
        weight, bias = self._weights(op, before, after)
        options: dict[str, int | bool] = {
            "Padding": _PADDING[padding],
            "StrideW": op.stride,
            "StrideH": op.stride,
            "DilationWFactor": op.dilation,
            "DilationHFactor": op.dilation,
            "FusedActivationFunction": _activation_code(op.activation),
        }
        if op.is_depthwise:
            options["DepthMultiplier"] = 1
        return (source, weight, bias), options

    def _conv_padding(self, op: Conv, source: int, scale: Quantization) -> tuple[str, int]:
        """SAME, VALID, or a PAD op before VALID where torch pads in another way than TFLite."""
        batch, height, width, channels = self.tensors[source].shape
        left, right, top, bottom = op.padding
        rows, columns = (op.dilation * (size - 1) + 1 for size in op.weight.shape[2:])
        same = same_padding(width, columns, op.stride) + same_padding(height, rows, op.stride)
        if op.padding == same:
            return "SAME", source
        if not any(op.padding):
            return "VALID", source
        amounts = np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32)
        sizes = self._tensor(f"{op.name}/padding", (4, 2), "int32", data=amounts)
        shape = (batch, height + top + bottom, width + left + right, channels)
        padded = self._tensor(f"{op.name}/padded", shape, "int8", scale)
        self._operator("PAD", (source, sizes), padded)
        return "VALID", padded

    def _weights(self, op: Conv, before: Quantization, after: Quantization) -> tuple[int, int]:
        weight = op.weight.detach().cpu().float().numpy()
        bias = op.bias.detach().cpu().double().numpy()
        in_scale, out_scale = float(before.scale[0]), float(after.scale[0])
        flat = weight.reshape(len(weight), -1)
        largest = np.maximum(flat.max(axis=1), -flat.min(axis=1))
        # Channels that BN switched off have tiny weights and a bias that must still fit int32.
        smallest = np.maximum(np.abs(bias) / 2**30, MIN_REQUANTIZATION * out_scale) / in_scale
        scale = np.maximum(largest / 127, smallest).astype(np.float32)
        axes = (1, 2, 3, 0) if op.is_depthwise else (0, 2, 3, 1)
        # In single precision and in place: five times faster, and bundles are made of weights.
        scaled = weight / scale[:, None, None, None]
        np.clip(np.rint(scaled, out=scaled), -127, 127, out=scaled)
        whole = np.ascontiguousarray(scaled.astype(np.int8).transpose(axes))
        zeros = np.zeros(len(scale), np.int64)
        weights = self._tensor(
            f"{op.name}/weight",
            whole.shape,
            "int8",
            Quantization(scale, zeros, 3 if op.is_depthwise else 0),
            whole,
        )
        bias_scale = np.float32(in_scale) * scale
        limit = 2**31 - 1
        biases = np.clip(np.rint(bias / bias_scale), -limit, limit).astype(np.int32)
        return weights, self._tensor(
            f"{op.name}/bias", biases.shape, "int32", Quantization(bias_scale, zeros), biases
        )

    def _pool_options(self, op: Pool) -> dict[str, int | bool]:
        before, k, s = self.shapes[op.inputs[0]], op.kernel_size, op.stride
        padding = "SAME"
        sizes = zip(before[2:], op.shape[2:], strict=True)
        if all(out == (size - k) // s + 1 for size, out in sizes):
            padding = "VALID"
        elif any(same_padding(size, k, s)[0] for size in before[2:]):
            raise ValueError(
                f"{op.name}: TFLite would pad a {k}x{k} pooling of {before[2]}x{before[3]} at the "
                f"left and top too; use sizes that the stride divides"
            )
        return {
            "Padding": _PADDING[padding],
            "StrideW": s,
            "StrideH": s,
            "FilterWidth": k,
            "FilterHeight": k,
            "FusedActivationFunction": 0,
        }

    def _resize(self, op: Resize, source: int, target: int) -> None:
        data = np.array(op.shape[2:], np.int32)
        size = self._tensor(f"{op.name}/size", (2,), "int32", data=data)
        if op.mode == "nearest":  # floor(i * in / out), as torch's
            options = {"AlignCorners": False, "HalfPixelCenters": False}
            self._operator("RESIZE_NEAREST_NEIGHBOR", (source, size), target, options)
            return
        options = {"AlignCorners": op.align_corners, "HalfPixelCenters": not op.align_corners}
        version = None if op.align_corners else HALF_PIXEL_BILINEAR_VERSION
        self._operator("RESIZE_BILINEAR", (source, size), target, options, version)

    # Parts ----------------------------------------------------------------------------------

    def _range(self, name: str) -> Quantization:
        if name not in self.ranges:
            raise ValueError(f"no range for {name}; calibrate this graph")
        return activation_quantization(*self.ranges[name])

    def _activation(
        self, name: str, quantization: Quantization, *, label: str | None = None
    ) -> int:
        self.scales[name] = quantization
        shape = _nhwc(self.shapes[name])
        self.index[name] = self._tensor(label or name, shape, "int8", quantization)
        return self.index[name]

    def _tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: Literal["int8", "uint8", "int32"],
        quantization: Quantization | None = None,
        data: npt.NDArray[Any] | None = None,
    ) -> int:
        self.tensors.append(
            TensorSpec(name=name, shape=shape, dtype=dtype, quantization=quantization, data=data)
        )
        return len(self.tensors) - 1

    def _operator(
        self,
        code: str,
        inputs: tuple[int, ...],
        output: int,
        options: Mapping[str, int | bool] | None = None,
        version: int | None = None,
    ) -> None:
        self.operators.append(
            OperatorSpec(
                code=code,
                version=version or VERSIONS[code],
                inputs=inputs,
                outputs=(output,),
                options=options or {},
            )
        )


_PADDING = {"SAME": 0, "VALID": 1}


def _activation_code(activation: Activation | None) -> int:
    return {None: 0, "relu": 1, "relu6": 3}[activation]


def _nhwc(shape: Shape) -> Shape:
    return shape[0], shape[2], shape[3], shape[1]


def _as_uint8(quantization: Quantization) -> Quantization:
    return quantization._replace(zero_point=quantization.zero_point + 128)
