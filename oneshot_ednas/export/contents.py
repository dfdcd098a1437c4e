"""What a `.tflite` file holds, read back for checks."""

import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tflite

from oneshot_ednas.export.flatbuffer import IDENTIFIER

_OPERATORS = {
    value: name for name, value in vars(tflite.BuiltinOperator).items() if isinstance(value, int)
}
_TYPES = {value: name for name, value in vars(tflite.TensorType).items() if isinstance(value, int)}
# What reading a damaged file may raise.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
    struct.error,
)
INTEGER_TYPES = ("int8", "uint8", "int32")
"""Of tensors in a file that the Edge TPU takes."""


@dataclass(frozen=True, kw_only=True)
class FileTensor:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As in the schema, in lower case: `int8`, `int32`, `float32`."""
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    num_bytes: int
    """Of constant data; 0 for an activation."""


@dataclass(frozen=True, kw_only=True)
class FileOperator:
    """One operator of a file; inputs and outputs are names."""

    name: str
    version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The main graph of a file."""

    tensors: tuple[FileTensor, ...]
    operators: tuple[FileOperator, ...]
    inputs: tuple[FileTensor, ...]
    outputs: tuple[FileTensor, ...]
    description: str

    @property
    def counts(self) -> dict[str, int]:
        """How often each operator occurs, most frequent first."""
        return dict(Counter(op.name for op in self.operators).most_common())

    @property
    def is_integer(self) -> bool:
        """Whether no tensor is of a floating type."""
        return all(tensor.dtype in INTEGER_TYPES for tensor in self.tensors)


def read_contents(source: bytes | Path | str) -> Contents:
    """Read the main graph of a file.

    Raises:
        ValueError: if it is no TFLite file, or a damaged one.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if data[4:8] != IDENTIFIER:
        raise ValueError(f"no TFLite file: expected {IDENTIFIER!r} at byte 4, got {data[4:8]!r}")
    try:
        return _read(data)
    except _DAMAGE as error:
        raise ValueError(f"damaged TFLite file of {len(data)} bytes ({error})") from None


def _read(data: bytes) -> Contents:
    model = tflite.Model.GetRootAsModel(data, 0)
    if model.SubgraphsLength() != 1:
        raise ValueError(f"expected one graph, got {model.SubgraphsLength()}")
    graph = model.Subgraphs(0)
    tensors = tuple(_tensor(model, graph.Tensors(i)) for i in range(graph.TensorsLength()))
    operators = tuple(
        _operator(model, graph.Operators(i), tensors) for i in range(graph.OperatorsLength())
    )
    return Contents(
        tensors=tensors,
        operators=operators,
        inputs=_at(tensors, graph.InputsAsNumpy()),
        outputs=_at(tensors, graph.OutputsAsNumpy()),
        description=(model.Description() or b"").decode(),
    )


def _tensor(model: tflite.Model, tensor: tflite.Tensor) -> FileTensor:
    quantization = tensor.Quantization()
    scale: tuple[float, ...] = ()
    zero_point: tuple[int, ...] = ()
    if quantization is not None and quantization.ScaleLength():
        scale = tuple(map(float, quantization.ScaleAsNumpy()))
        zero_point = tuple(map(int, quantization.ZeroPointAsNumpy()))
    return FileTensor(
        name=tensor.Name().decode(),
        shape=tuple(map(int, np.atleast_1d(tensor.ShapeAsNumpy()))),
        dtype=_TYPES[tensor.Type()].lower(),
        scale=scale,
        zero_point=zero_point,
        num_bytes=model.Buffers(tensor.Buffer()).DataLength(),
    )


def _operator(
    model: tflite.Model, operator: tflite.Operator, tensors: tuple[FileTensor, ...]
) -> FileOperator:
    code = model.OperatorCodes(operator.OpcodeIndex())
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    return FileOperator(
        name=_OPERATORS[number],
        version=code.Version(),
        inputs=tuple(tensor.name for tensor in _at(tensors, operator.InputsAsNumpy())),
        outputs=tuple(tensor.name for tensor in _at(tensors, operator.OutputsAsNumpy())),
    )


def _at(tensors: tuple[FileTensor, ...], indices: np.ndarray | int) -> tuple[FileTensor, ...]:
    if isinstance(indices, int):  # there are none
        return ()
    # -1 stands for an input that is left out; other negative ones are refused, not counted back.
    if min(indices, default=0) < -1:
        raise ValueError(f"expected indices of tensors, got {min(indices)}")
    return tuple(tensors[i] for i in indices if i >= 0)
