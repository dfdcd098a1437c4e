"""Torch networks to full-int8 `.tflite` files for the Edge TPU, written directly.

module -> `graph` (float operations) -> `calibration` (ranges) -> `quantize` (integers) ->
`flatbuffer` (bytes); `contents` and `runtime` read a file back and run it.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from oneshot_ednas.export.calibration import calibrate
from oneshot_ednas.export.contents import FileTensor, read_contents
from oneshot_ednas.export.edgetpu import unmapped_ops
from oneshot_ednas.export.flatbuffer import write_tflite
from oneshot_ednas.export.graph import Graph, trace
from oneshot_ednas.export.quantize import IoType
from oneshot_ednas.models.network import Network
from oneshot_ednas.store import write_bytes

MIN_CALIBRATION_IMAGES = 10
"""Fewer leave the ranges of activations to chance."""

__all__ = [
    "ExportReport",
    "Graph",
    "export_tflite",
    "read_contents",
    "trace",
    "write_tflite",
]


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written."""

    path: str
    size_bytes: int
    io: IoType
    num_calibration_images: int
    operators: Mapping[str, int]
    """How often each operator occurs."""
    versions: Mapping[str, int]
    """Newest version of each operator."""
    inputs: Mapping[str, "Ends"]
    outputs: Mapping[str, "Ends"]
    unmapped: tuple[str, ...]
    """Operations that the Edge TPU does not map, or may not; see `unmapped_ops`."""


@dataclass(frozen=True, kw_only=True)
class Ends:
    """An input or output: real value = scale * (integer - zero_point)."""

    shape: tuple[int, ...]
    """Batch, height, width, channels."""
    scale: float
    zero_point: int


def export_tflite(
    network: nn.Module,
    path: str | Path,
    *,
    calibration_images: Tensor | Iterable[Tensor],
    io: IoType = "int8",
    input_range: tuple[float, float] | None = None,
) -> ExportReport:
    """Write a network as a full-int8 `.tflite` file.

    The file has the batch size 1 and the images' height and width. Raw maps come out at the
    network's own stride: resize them and take the argmax on the host.

    Warns, before anything is written, of each operation that the Edge TPU would not map.

    Args:
        network: a derived network, or any module of operations that `graph.trace` knows; it is
            exported in evaluation mode.
        path: the file to write, atomically.
        calibration_images: `[images, 3, height, width]`, or batches of such, as the network is
            trained on; 100 or more of the training split are usual.
        io: type of input and output. `uint8` adds a QUANTIZE op to each end.
        input_range: range of the input instead of the observed one; (-1, 1) lets 8-bit pixels in
            as they are where the network takes pixel / 127.5 - 1.

    Returns:
        What the written file holds.

    Raises:
        ValueError: for a supernet, no images, or an operation without an Edge TPU form.
    """
    if isinstance(network, Network) and not network.space.is_fixed:
        raise ValueError(
            "a supernet cannot be exported: derive an architecture, and export "
            "derived_network(supernet, architecture) or its retrained network"
        )
    if input_range is not None and not -math.inf < input_range[0] < input_range[1] < math.inf:
        raise ValueError(f"input_range: expected a low and a higher end, got {input_range}")
    batches = _batches(calibration_images)
    first = next(batches, None)
    if first is None:
        raise ValueError("calibration_images: expected at least one image, got none")
    channels, height, width = map(int, first.shape[1:])
    graph = trace(network, (1, channels, height, width))
    unmapped = tuple(unmapped_ops(graph))
    for line in unmapped:
        warnings.warn(f"on the Edge TPU, {line}", stacklevel=2)
    num_images = 0

    def counted() -> Iterator[Tensor]:
        nonlocal num_images
        for batch in itertools.chain([first], batches):
            num_images += len(batch)
            yield batch

    ranges = calibrate(graph, counted())
    if num_images < MIN_CALIBRATION_IMAGES:
        warnings.warn(
            f"calibrated on {num_images} images only; {MIN_CALIBRATION_IMAGES} or more "
            f"(100 are usual) keep rare activations inside the ranges",
            stacklevel=2,
        )
    if input_range is not None:
        (name,) = graph.inputs
        ranges[name] = input_range
    data = write_tflite(graph, ranges, io=io)
    write_bytes(Path(path), data)
    return _report(Path(path), data, io, num_images, unmapped)


def _report(
    path: Path, data: bytes, io: IoType, num_images: int, unmapped: tuple[str, ...]
) -> ExportReport:
    """The report, from the bytes that were written rather than from what was meant."""
    contents = read_contents(data)
    versions: dict[str, int] = {}
    for op in contents.operators:
        versions[op.name] = max(op.version, versions.get(op.name, 0))

    def ends(tensors: Iterable[FileTensor]) -> dict[str, Ends]:
        return {
            t.name: Ends(shape=t.shape, scale=t.scale[0], zero_point=t.zero_point[0])
            for t in tensors
        }

    return ExportReport(
        path=str(path),
        size_bytes=len(data),
        io=io,
        num_calibration_images=num_images,
        operators=contents.counts,
        versions=versions,
        inputs=ends(contents.inputs),
        outputs=ends(contents.outputs),
        unmapped=unmapped,
    )


def _batches(images: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Batches that hold something, on the CPU, where the graph is."""
    for batch in (images,) if isinstance(images, Tensor) else images:
        if batch.dim() != 4:
            raise ValueError(
                f"calibration_images: expected [images, channels, height, width], "
                f"got {list(batch.shape)}"
            )
        if len(batch):
            yield batch.detach().cpu()
