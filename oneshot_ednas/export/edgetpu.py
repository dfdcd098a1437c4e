"""What the Edge TPU takes: a warning before a file is written, and its compiler's verdict after.

The compiler is closed and runs on x86-64 Linux only, so a graph is checked here against what is
known of it, and compiled where `edgetpu_compiler` is installed.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from math import prod
from pathlib import Path

from oneshot_ednas.export.graph import Conv, Graph, Op, Resize
from oneshot_ednas.latency.edgetpu import ON_CHIP_BYTES

COMPILER = "edgetpu_compiler"
LARGEST_SURE_RESIZE = 128
"""Height or width to which a resize was always seen mapped."""
SMALLEST_REFUSED_RESIZE = 512
"""Height or width to which resizes (256 to 512, 33 to 513) were seen left to the CPU."""
MAX_VERSIONS = {
    "ADD": 3,
    "AVERAGE_POOL_2D": 3,
    "CONV_2D": 5,
    "DEPTHWISE_CONV_2D": 6,
    "MAX_POOL_2D": 3,
    "PAD": 3,
    "QUANTIZE": 2,
    "RELU": 2,
    "RELU6": 2,
    "RESIZE_BILINEAR": 4,
    "RESIZE_NEAREST_NEIGHBOR": 4,
}
"""Newest version of each operator that `edgetpu_compiler` 16, of TensorFlow 2.5, accepts."""
MAPPED = "Mapped to Edge TPU"
_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_NOISE = ("Edge TPU Compiler version", "Started a compilation", "Compilation child process")


def unmapped_ops(graph: Graph) -> list[str]:
    """Operations that the Edge TPU does not map, or may not, each with its reason.

    The device runs the operations up to the first one that is not mapped; all after it run on the
    host's CPU.

    Returns:
        One line per operation, in order of execution: `NAME is not mapped: ...` where that is
        known, `NAME may not be mapped: ...` where it was seen to depend on more than is known.

    Source:
        The list of supported operations at coral.ai/docs/edgetpu/models-intro, and reports in
        google-coral/edgetpu (issues 31, 187, 206, 420 on resizing, 439 and 512 on activations).
    """
    shapes = graph.shapes
    found = []
    for op in graph.ops:
        reasons = [*_refusals(op)]
        doubts = [*_doubts(op, sum(prod(shapes[name]) for name in {*op.inputs, op.name}))]
        if reasons:
            found.append(f"{op.name} is not mapped: {'; '.join(reasons)}")
        elif doubts:
            found.append(f"{op.name} may not be mapped: {'; '.join(doubts)}")
    return found


def _refusals(op: Op) -> list[str]:
    if isinstance(op, Conv) and op.groups > 1 and not op.is_depthwise:
        return [
            f"a convolution in {op.groups} groups; the device has plain and depthwise ones, so use "
            f"one of these"
        ]
    if isinstance(op, Resize):
        if op.mode == "bilinear" and not op.align_corners:
            return [
                "bilinear resize with half-pixel centres is a newer version of the operation; use "
                "nearest, or align_corners=True"
            ]
        if max(op.shape[2:]) >= SMALLEST_REFUSED_RESIZE:
            return [f"a resize to {op.shape[2]}x{op.shape[3]}; leave it to the host"]
    return []


def _doubts(op: Op, num_bytes: int) -> list[str]:
    doubts = []
    if isinstance(op, Resize) and max(op.shape[2:]) > LARGEST_SURE_RESIZE:
        doubts.append(f"a resize to {op.shape[2]}x{op.shape[3]}")
    if num_bytes > ON_CHIP_BYTES:
        doubts.append(
            f"its input and output take {num_bytes / 2**20:.1f} MiB of the "
            f"{ON_CHIP_BYTES / 2**20:g} MiB activation memory; it may take twice its time, or "
            f"the compiler give up"
        )
    return doubts


# The compiler -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OperationCount:
    """A row of the compiler's table of operations."""

    name: str
    """TFLite name, for example `CONV_2D`."""
    count: int
    status: str
    """`Mapped to Edge TPU`, or why not, in the compiler's words."""


@dataclass(frozen=True, kw_only=True)
class CompilerReport:
    """What the compiler says of a model that it has compiled."""

    version: str
    on_chip_bytes: int
    """Parameters that stay in the device's memory, to the two digits that the compiler prints."""
    off_chip_bytes: int
    """Parameters that are streamed to the device every inference."""
    subgraphs: int
    """Parts of the model that run on the device; 0 where nothing is mapped."""
    operations: tuple[OperationCount, ...]

    @property
    def mapped(self) -> int:
        """Operations that run on the device."""
        return sum(row.count for row in self.operations if row.status == MAPPED)

    @property
    def unmapped(self) -> int:
        """Operations that run on the host's CPU."""
        return sum(row.count for row in self.operations if row.status != MAPPED)


def find_compiler() -> str | None:
    """Path of the Edge TPU compiler, or None where it is not installed."""
    return shutil.which(COMPILER)


def compiled_path(path: Path, folder: Path) -> Path:
    """Where the compiler writes the compiled form of a model."""
    return folder / f"{path.stem}_edgetpu.tflite"


def compile_model(path: Path, folder: Path, *, timeout_s: float = 300.0) -> CompilerReport:
    """Compile a model for the Edge TPU.

    Args:
        path: the full-int8 `.tflite`.
        folder: where `<name>_edgetpu.tflite` and its log go; made if it is not there.
        timeout_s: how long the compiler may take; it gives up by itself after 180 s.

    Raises:
        FileNotFoundError: if the compiler is not installed, or there is no such model.
        RuntimeError: if the compiler cannot be run, or fails, with its own last words; if it takes
            too long; or if it says what is not understood.
    """
    compiler = find_compiler()
    if compiler is None:
        raise FileNotFoundError(
            f"no {COMPILER} on PATH; it runs on x86-64 Linux, see "
            f"https://coral.ai/docs/edgetpu/compiler"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no model {path}")
    folder.mkdir(parents=True, exist_ok=True)
    # Some failures exit with 0, and show only in that no file is written.
    compiled_path(path, folder).unlink(missing_ok=True)
    command = [compiler, "-s", "-o", str(folder), str(path)]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{COMPILER} took more than {timeout_s:g} s for {path}") from None
    except OSError as error:
        raise RuntimeError(
            f"{compiler} cannot be run ({error.strerror}); it is for x86-64 Linux"
        ) from None
    if done.returncode or not compiled_path(path, folder).is_file():
        raise RuntimeError(
            f"{COMPILER} failed on {path} (exit status {done.returncode}): "
            f"{_last_words(done.stdout)}"
        )
    return parse_report(done.stdout)


def parse_report(text: str) -> CompilerReport:
    """Read what `edgetpu_compiler -s` prints.

    Raises:
        RuntimeError: if it reports no success, or a figure is missing or of an unknown unit.
    """
    if "Model compiled successfully" not in text:
        raise RuntimeError(f"{COMPILER} reports no success: {_last_words(text)}")
    rows = re.findall(r"^([A-Z][A-Z0-9_]*)[ \t]+(\d+)[ \t]+(\S.*?)[ \t]*$", text, re.MULTILINE)
    report = CompilerReport(
        version=_figure(text, r"Edge TPU Compiler version (\S+)"),
        on_chip_bytes=_size(text, "On-chip memory used for caching model parameters"),
        off_chip_bytes=_size(text, "Off-chip memory used for streaming uncached model parameters"),
        subgraphs=int(_figure(text, r"Number of Edge TPU subgraphs: (\d+)")),
        operations=tuple(
            OperationCount(name=name, count=int(count), status=status)
            for name, count, status in rows
        ),
    )
    total = int(_figure(text, r"Total number of operations: (\d+)"))
    if report.mapped + report.unmapped != total:
        raise RuntimeError(
            f"{COMPILER} {report.version}: expected a table of {total} operations, got "
            f"{report.mapped + report.unmapped}; this version prints another format"
        )
    return report


def _figure(text: str, pattern: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"{COMPILER}: expected '{pattern}' in its report, got {text[-300:]!r}")
    return found[1]


def _size(text: str, label: str) -> int:
    number, unit = re.fullmatch(r"([\d.]*)(\S*)", _figure(text, rf"{label}: (\S+)")).groups()  # type: ignore[union-attr]
    if unit not in _BYTES or not number:
        raise RuntimeError(
            f"{COMPILER}: {label}: expected a number of {', '.join(_BYTES)}, got {number}{unit}"
        )
    return round(float(number) * _BYTES[unit])


def _last_words(text: str) -> str:
    lines = [" ".join(line.split()) for line in text.splitlines()]
    said = [line for line in lines if line and not line.startswith(_NOISE)]
    return " | ".join(said[-3:]) or "it said nothing"
