"""Latency tables: one row per distinct operation, and the terms that a network pays once.

File: a YAML header in comment lines (device, runtime, date, per-network terms, known error), then
CSV. Latency of a network = fixed + input and output transfer + the rows of its operations +
streaming of the parameter bytes that do not fit the on-chip cache. All times are milliseconds.
"""

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from reprlib import repr as clipped
from typing import Literal

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.latency.costs import SpaceCosts, space_costs
from oneshot_ednas.latency.operations import OPERATION_KINDS, Operation
from oneshot_ednas.parsing import one_line, read_limited
from oneshot_ednas.schema import dump_yaml, parse_yaml, to_plain
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.store import write_text

FORMAT = 1
UNIT = "ms"
TABLE_BYTES = 2**24
"""Files of more are refused; the table of a large space has a hundred thousand."""
MOST = 1e12
"""Of times in ms and of bytes: no device comes near, and sums over networks stay finite."""
_KEY = [field.name for field in fields(Operation)]
_WHOLE = re.compile("[0-9]{1,12}")
_COLUMNS = [*_KEY, "latency_ms", "spread_ms", "parameter_bytes"]


@dataclass(frozen=True, kw_only=True)
class TableHeader:
    """Where a table comes from, and what a network pays once."""

    format: int = FORMAT
    device: str
    """What the times are of, for example `Coral Edge TPU`."""
    source: Literal["simulated", "measured"]
    host: str
    """Host and bus of the device."""
    runtime: str
    """Interpreter or simulator, with its version."""
    machine: str | None = None
    """Processor or board, operating system and architecture that measured."""
    delegate: str | None = None
    """Library that the interpreter handed the models to, for example `libedgetpu.so.1`."""
    kernels: str | None = None
    """Set of CPU kernels of the interpreter."""
    threads: int | None = None
    clock_mhz: float | None = None
    """Clock of the device, as stated by who measured."""
    compiler: str | None = None
    """Version of the compiler of the models."""
    date: str
    """When the times were made, `YYYY-MM-DD`."""
    unit: str | None = None
    """Unit of all times: `ms`, also where it is not stated."""
    runs: int = 1
    """Timed runs behind each row."""
    rows: int | None = None
    """Number of rows, which shows a file that was cut off between two of them."""
    row_scale: float | None = None
    """Factor in all rows: how an operation's time in whole networks relates to its own."""
    note: str = ""
    space: str
    """Search space whose operations the rows are."""
    image_height: int
    image_width: int
    out_channels: dict[str, int]
    """Output channels per task assumed where none are given."""
    fixed_ms: float
    """Paid once per inference."""
    input_ms_per_byte: float
    output_ms_per_byte: float
    cache_bytes: float
    """Parameter bytes that stay on the chip."""
    streaming_ms_per_byte: float
    """Per parameter byte beyond the cache, every inference."""
    held_out_mape: float | None = None
    """Mean absolute error in percent on networks that took no part in the calibration."""
    held_out_spearman: float | None = None
    """Rank correlation on the same networks, from -1 to 1."""
    held_out_kendall_tau: float | None = None
    """Kendall's tau-b on the same networks, from -1 to 1."""
    held_out_networks: int | None = None
    """How many networks these are."""
    fit_networks: int | None = None
    """How many other networks the per-network terms were fitted to."""
    held_out_note: str = ""
    """What the held-out error was measured on."""

    def __post_init__(self) -> None:
        """Times and sizes are finite and not negative; a measured table says where."""
        if self.format != FORMAT:
            raise ValueError(
                f"format: expected {FORMAT}, got {self.format}; "
                f"another version of oneshot_ednas wrote this table"
            )
        if self.unit not in (None, UNIT):
            raise ValueError(f"unit: expected {UNIT}, got {self.unit}")
        if self.source == "measured":
            for name in ("machine", "runtime"):
                if not getattr(self, name):
                    raise ValueError(f"{name}: a measured table names it, got nothing")
        for name in ("image_height", "image_width", "runs", "threads"):
            self._check_at_least(name, 1)
        for name in (
            "fixed_ms",
            "input_ms_per_byte",
            "output_ms_per_byte",
            "cache_bytes",
            "streaming_ms_per_byte",
            "row_scale",
            "held_out_mape",
            "clock_mhz",
            "rows",
            "held_out_networks",
            "fit_networks",
        ):
            self._check_at_least(name, 0)
        for name in ("held_out_spearman", "held_out_kendall_tau"):
            value = getattr(self, name)
            if value is not None and not -1 <= value <= 1:
                raise ValueError(f"{name}: expected a number from -1 to 1, got {value}")

    def _check_at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and not least <= value <= MOST:
            expected = f"a finite number >= {least}" if least == 0 else f"at least {least}"
            expected += f", at most {MOST:g}" if MOST < value < math.inf else ""
            raise ValueError(f"{name}: expected {expected}, got {value}")

    def to_yaml(self) -> str:
        """YAML text, without the keys that hold nothing."""
        values = {key: value for key, value in to_plain(self).items() if value not in (None, "")}
        return dump_yaml(values)


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """What one operation costs."""

    latency_ms: float
    spread_ms: float = 0.0
    """Half the interquartile range over runs; 0 for a simulator."""
    parameter_bytes: int
    """Bytes of weights and biases as the device keeps them."""


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Operations with their times, for one device and one image size."""

    header: TableHeader
    rows: Mapping[Operation, TableRow]
    name: str = "table"

    def __post_init__(self) -> None:
        """As many rows as the header says."""
        if self.header.rows not in (None, len(self.rows)):
            raise ValueError(
                f"{self.name}: expected {self.header.rows} rows, as the header says, got "
                f"{len(self.rows)}; the file may be truncated"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image that the rows are for."""
        return self.header.image_height, self.header.image_width

    def row(self, operation: Operation) -> TableRow:
        """The row of an operation.

        Raises:
            ValueError: if there is none; the message names the operation and the cure.
        """
        try:
            return self.rows[operation]
        except KeyError:
            tool = self._tool("SPACE", *self.image_size, tasks=" --tasks NAME=CHANNELS,...")
            raise ValueError(
                f"no row in {self.name} for {operation}; it is for the space {self.header.space} "
                f"with {dict(self.header.out_channels)}: use that, or build a table for your space "
                f"and tasks with {tool}"
            ) from None

    def check_image_size(self, height: int, width: int) -> None:
        """Refuse to price images of another size.

        Raises:
            ValueError: naming both sizes.
        """
        if (height, width) != self.image_size:
            raise ValueError(
                f"{self.name} is for images of {self.header.image_height}x"
                f"{self.header.image_width}, got {height}x{width}; build one with "
                f"{self._tool('SPACE', height, width)}"
            )

    def check_calibrated(self, *, allowed: bool) -> None:
        """Refuse a table whose error on whole networks is unknown, unless that is allowed.

        Raises:
            ValueError: naming the ways out.
        """
        if self.header.held_out_mape is None and not allowed:
            raise ValueError(
                f"the error of {self.name} on whole networks is unknown (its header has no "
                f"held_out_mape); use a calibrated table, or go on with --allow-uncalibrated or, "
                f"where a command lacks it, --set latency.allow_uncalibrated=true"
            )

    def _tool(self, space: str, height: int, width: int, *, tasks: str = "") -> str:
        """What makes a table of this one's source."""
        if self.header.source == "measured":
            return "tools/build_latency_table.py"
        size = f"--image-size {height} {width}"
        return f"oneshot-ednas latency table {space} {size}{tasks} --out CSV"

    def costs(
        self, space: SearchSpace, out_channels: Mapping[str, int] | None = None
    ) -> SpaceCosts:
        """The table laid out over a space: one array of costs per block.

        Args:
            space: the search space.
            out_channels: output channels per task; the header's where not given.

        Raises:
            ValueError: if a row is missing.
        """
        channels = self.header.out_channels if out_channels is None else out_channels
        return _costs(self, space, tuple(channels.items()))

    def latency_ms(
        self,
        space: SearchSpace,
        architecture: Architecture,
        out_channels: Mapping[str, int] | None = None,
    ) -> float:
        """Latency of one architecture, in milliseconds.

        Raises:
            ValueError: if a row is missing or the architecture is not in the space.
        """
        return self.costs(space, out_channels).latency_ms(architecture)

    def save(self, path: str | Path) -> None:
        """Write the file."""
        write_text(Path(path), self.to_text())

    def to_text(self) -> str:
        """The file's text."""
        header = "".join(f"# {line}\n" for line in self.header.to_yaml().splitlines())
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for operation in sorted(self.rows):
            row = self.rows[operation]
            key = [getattr(operation, name) for name in _KEY]
            key[-1] = int(key[-1])
            writer.writerow(
                [*key, f"{row.latency_ms:.6g}", f"{row.spread_ms:.3g}", row.parameter_bytes]
            )
        return header + out.getvalue()

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        """Read a table.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for a damaged file, with the line.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no latency table {path}; build one with oneshot-ednas latency table SPACE "
                f"--image-size H W --out CSV"
            )
        return cls.from_text(read_limited(Path(path), TABLE_BYTES), name=Path(path).name)

    @classmethod
    def from_text(cls, text: str, *, name: str) -> "LatencyTable":
        """Like `load`, for text."""
        lines = text.splitlines()
        count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
        header_text = "\n".join(line[1:].removeprefix(" ") for line in lines[:count])
        header = parse_yaml(header_text, TableHeader, source=name)
        if count == len(lines) or lines[count].split(",") != _COLUMNS:
            got = lines[count] if count < len(lines) else "the end of the file"
            raise ValueError(
                one_line(f"{name}:{count + 1}: expected {','.join(_COLUMNS)}, got {got}")
            )
        if not text.endswith("\n"):
            # A last number that lost digits would pass for a whole one.
            raise ValueError(f"{name}:{len(lines)}: no end of line; the file may be truncated")
        rows: dict[Operation, TableRow] = {}
        for number, line in enumerate(lines[count + 1 :], start=count + 2):
            try:
                operation, row = _read_row(line.split(","))
            except ValueError as error:
                raise ValueError(one_line(f"{name}:{number}: {error}")) from None
            if operation in rows:
                raise ValueError(f"{name}:{number}: a second row for {operation}")
            rows[operation] = row
        return cls(header, rows, name)


@lru_cache(maxsize=64)
def _costs(
    table: LatencyTable, space: SearchSpace, out_channels: tuple[tuple[str, int], ...]
) -> SpaceCosts:
    header, channels = table.header, dict(out_channels)
    return space_costs(
        space,
        table.image_size,
        channels,
        price=lambda operation: _price(table.row(operation)),
        fixed_ms=header.fixed_ms,
        input_ms_per_byte=header.input_ms_per_byte,
        output_ms_per_byte=header.output_ms_per_byte,
        cache_bytes=header.cache_bytes,
        streaming_ms_per_byte=header.streaming_ms_per_byte,
    )


def _price(row: TableRow) -> tuple[float, float]:
    return row.latency_ms, float(row.parameter_bytes)


def _read_row(cells: list[str]) -> tuple[Operation, TableRow]:
    if len(cells) != len(_COLUMNS):
        raise ValueError(
            f"expected {len(_COLUMNS)} columns, got {len(cells)}; the file may be truncated"
        )
    values = dict(zip(_COLUMNS, cells, strict=True))
    op = values.pop("op")
    if op not in OPERATION_KINDS:
        known = ", ".join(OPERATION_KINDS)
        raise ValueError(f"op: expected one of {known}, got {op[:40]}")
    latency_ms, spread_ms = _number(values, "latency_ms"), _number(values, "spread_ms")
    parameter_bytes = _whole(values, "parameter_bytes")
    numbers = {name: _whole(values, name) for name in _KEY if name not in ("op", "residual")}
    residual = bool(_whole(values, "residual"))
    operation = Operation(op=op, residual=residual, **numbers)
    return operation, TableRow(
        latency_ms=latency_ms, spread_ms=spread_ms, parameter_bytes=parameter_bytes
    )


def _number(values: Mapping[str, str], name: str) -> float:
    try:
        value = float(values[name])
    except ValueError:
        raise ValueError(f"{name}: expected a number, got {clipped(values[name])}") from None
    if not 0 <= value <= MOST:
        most = f", at most {MOST:g}" if MOST < value < math.inf else ""
        raise ValueError(f"{name}: expected a finite number >= 0{most}, got {value}")
    return value


def _whole(values: Mapping[str, str], name: str) -> int:
    if not _WHOLE.fullmatch(values[name]):
        raise ValueError(f"{name}: expected a whole number >= 0, got {clipped(values[name])}")
    return int(values[name])
