"""A quantized model as the bytes of a `.tflite` file (schema version 3, identifier TFL3)."""

from collections.abc import Callable, Sequence
from typing import Any

import flatbuffers
import numpy as np
import tflite

from oneshot_ednas.export.calibration import Ranges
from oneshot_ednas.export.graph import Graph
from oneshot_ednas.export.quantize import (
    IoType,
    OperatorSpec,
    QuantizedModel,
    TensorSpec,
    quantize,
)

SCHEMA_VERSION = 3
IDENTIFIER = b"TFL3"
BUFFER_ALIGNMENT = 16
OPTIONS = {
    "ADD": "AddOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "PAD": "PadOptions",
    "QUANTIZE": "QuantizeOptions",
    "RESIZE_BILINEAR": "ResizeBilinearOptions",
    "RESIZE_NEAREST_NEIGHBOR": "ResizeNearestNeighborOptions",
}
"""Table of options per operator; an activation has none."""


def write_tflite(
    graph: Graph, ranges: Ranges, *, io: IoType = "int8", description: str = "oneshot_ednas"
) -> bytes:
    """Quantize a graph and write the file's bytes.

    Raises:
        ValueError: as in `quantize`.
    """
    return to_flatbuffer(quantize(graph, ranges, io=io), description=description)


def to_flatbuffer(model: QuantizedModel, *, description: str = "oneshot_ednas") -> bytes:
    """The bytes of a model."""
    held = [tensor.data for tensor in model.tensors if tensor.data is not None]
    builder = flatbuffers.Builder(1024 + 2 * sum(data.nbytes for data in held))
    buffers = [_buffer(builder, None)]  # buffer 0 is empty by convention
    tensors = []
    for tensor in model.tensors:
        position = 0
        if tensor.data is not None:
            position = len(buffers)
            buffers.append(_buffer(builder, tensor.data))
        tensors.append(_tensor(builder, tensor, position))
    codes = list(dict.fromkeys((op.code, op.version) for op in model.operators))
    operators = [
        _operator(builder, op, codes.index((op.code, op.version))) for op in model.operators
    ]
    graph = _subgraph(builder, model, tensors, operators)
    operator_codes = [_operator_code(builder, *code) for code in codes]
    subgraphs = _vector(builder, tflite.ModelStartSubgraphsVector, [graph])
    code_vector = _vector(builder, tflite.ModelStartOperatorCodesVector, operator_codes)
    buffer_vector = _vector(builder, tflite.ModelStartBuffersVector, buffers)
    text = builder.CreateString(description)
    tflite.ModelStart(builder)
    tflite.ModelAddVersion(builder, SCHEMA_VERSION)
    tflite.ModelAddOperatorCodes(builder, code_vector)
    tflite.ModelAddSubgraphs(builder, subgraphs)
    tflite.ModelAddDescription(builder, text)
    tflite.ModelAddBuffers(builder, buffer_vector)
    builder.Finish(tflite.ModelEnd(builder), IDENTIFIER)
    return bytes(builder.Output())


def _subgraph(
    builder: flatbuffers.Builder, model: QuantizedModel, tensors: list[int], operators: list[int]
) -> int:
    tensor_vector = _vector(builder, tflite.SubGraphStartTensorsVector, tensors)
    operator_vector = _vector(builder, tflite.SubGraphStartOperatorsVector, operators)
    inputs, outputs = _integers(builder, model.inputs), _integers(builder, model.outputs)
    name = builder.CreateString("main")
    tflite.SubGraphStart(builder)
    tflite.SubGraphAddTensors(builder, tensor_vector)
    tflite.SubGraphAddInputs(builder, inputs)
    tflite.SubGraphAddOutputs(builder, outputs)
    tflite.SubGraphAddOperators(builder, operator_vector)
    tflite.SubGraphAddName(builder, name)
    return int(tflite.SubGraphEnd(builder))


def _buffer(builder: flatbuffers.Builder, data: np.ndarray | None) -> int:
    vector = None
    if data is not None:
        content = np.ascontiguousarray(data).tobytes()
        # The builder has no aligned byte vector of its own; readers map weights in place.
        builder.StartVector(1, len(content), BUFFER_ALIGNMENT)
        builder.head -= len(content)
        builder.Bytes[builder.head : builder.head + len(content)] = content
        vector = builder.EndVector()
    tflite.BufferStart(builder)
    if vector is not None:
        tflite.BufferAddData(builder, vector)
    return int(tflite.BufferEnd(builder))


def _tensor(builder: flatbuffers.Builder, tensor: TensorSpec, buffer: int) -> int:
    name = builder.CreateString(tensor.name)
    shape = _integers(builder, tensor.shape)
    quantization = None
    if tensor.quantization is not None:
        scale = builder.CreateNumpyVector(tensor.quantization.scale)
        zero_point = builder.CreateNumpyVector(tensor.quantization.zero_point)
        tflite.QuantizationParametersStart(builder)
        tflite.QuantizationParametersAddScale(builder, scale)
        tflite.QuantizationParametersAddZeroPoint(builder, zero_point)
        tflite.QuantizationParametersAddQuantizedDimension(builder, tensor.quantization.axis)
        quantization = tflite.QuantizationParametersEnd(builder)
    tflite.TensorStart(builder)
    tflite.TensorAddShape(builder, shape)
    tflite.TensorAddType(builder, getattr(tflite.TensorType, tensor.dtype.upper()))
    tflite.TensorAddBuffer(builder, buffer)
    tflite.TensorAddName(builder, name)
    if quantization is not None:
        tflite.TensorAddQuantization(builder, quantization)
    return int(tflite.TensorEnd(builder))


def _operator(builder: flatbuffers.Builder, op: OperatorSpec, code: int) -> int:
    inputs, outputs = _integers(builder, op.inputs), _integers(builder, op.outputs)
    table, options = OPTIONS.get(op.code), None
    if table is not None:
        getattr(tflite, f"{table}Start")(builder)
        for name, value in op.options.items():
            getattr(tflite, f"{table}Add{name}")(builder, value)
        options = getattr(tflite, f"{table}End")(builder)
    tflite.OperatorStart(builder)
    tflite.OperatorAddOpcodeIndex(builder, code)
    tflite.OperatorAddInputs(builder, inputs)
    tflite.OperatorAddOutputs(builder, outputs)
    if table is not None:
        tflite.OperatorAddBuiltinOptionsType(builder, getattr(tflite.BuiltinOptions, table))
        tflite.OperatorAddBuiltinOptions(builder, options)
    return int(tflite.OperatorEnd(builder))


def _operator_code(builder: flatbuffers.Builder, name: str, version: int) -> int:
    code = getattr(tflite.BuiltinOperator, name)
    tflite.OperatorCodeStart(builder)
    # Readers before TensorFlow 2.4 know only the byte-sized field.
    tflite.OperatorCodeAddDeprecatedBuiltinCode(builder, min(code, 127))
    tflite.OperatorCodeAddBuiltinCode(builder, code)
    tflite.OperatorCodeAddVersion(builder, version)
    return int(tflite.OperatorCodeEnd(builder))


def _integers(builder: flatbuffers.Builder, values: Sequence[int]) -> int:
    return int(builder.CreateNumpyVector(np.asarray(values, np.int32)))


def _vector(
    builder: flatbuffers.Builder,
    start: Callable[[flatbuffers.Builder, int], Any],
    offsets: Sequence[int],
) -> int:
    start(builder, len(offsets))
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())
