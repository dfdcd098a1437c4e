"""From measurements of a bundle to a latency table with a known error.

A model that holds an operation c times takes

    T(c) = t0 + i * input bytes + o * output bytes + c * row + (c - 1) * additions + s * streamed(c)

so a row is the slope over copies less the additions that a copy brings along, and the call into
the interpreter cancels. What is left at no copy, over all operations, gives i and o. Whole
networks of the same sitting give what a table of single operations cannot know: fixed time,
streaming s, and one factor in all rows, since an operation costs another time inside a network
than in a loop of its own. Every second network is kept back and tells the table's error.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from oneshot_ednas.bundle.manifest import (
    COMPILED,
    MANIFEST,
    MIN_NETWORKS,
    Bundle,
    CompiledModel,
    OperationModels,
    read_bundle,
    read_compiled,
    read_space,
)
from oneshot_ednas.bundle.measurements import Measurements, ModelTime, read_measurements
from oneshot_ednas.bundle.robust import Array, fit_nonnegative, jackknife
from oneshot_ednas.correlation import kendall_tau, spearman
from oneshot_ednas.latency.operations import Operation, network_io_bytes, network_operations
from oneshot_ednas.latency.table import UNIT, LatencyTable, TableHeader, TableRow

RESOLUTION_MS = 1e-6
"""The clock's: times are written in whole nanoseconds."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """A fitted per-network term."""

    value: float
    standard_error: float
    """From the jackknife."""


@dataclass(frozen=True, kw_only=True)
class ScoredNetwork:
    """A whole network: measured, and as the table has it."""

    model: str
    measured_ms: float
    predicted_ms: float
    is_held_out: bool


@dataclass(frozen=True, kw_only=True)
class Report:
    """How well a table fits, and what it lacks."""

    held_out_mape: float
    """Percent."""
    held_out_spearman: float | None
    held_out_kendall_tau: float | None
    held_out_networks: int
    fit_networks: int
    fit_mape: float
    """Percent, on the networks of the fit: what is far below the held-out error is overfitted."""
    terms: dict[str, Term]
    """`fixed_ms`, `row_scale` and `streaming_ms_per_byte` from networks; `single_ms` (of a model
    with nothing in it), `input_ms_per_byte` and `output_ms_per_byte` from operations."""
    num_rows: int
    spread_percent: dict[str, float]
    """Median spread of the rows of each kind, in percent of their time."""
    clamped: tuple[Operation, ...]
    """Rows whose time was not above its noise, and is now taken to be as large as that."""
    missing: tuple[Operation, ...]
    """Operations without a row."""
    failures: dict[str, str]
    """Models that did not run, and why."""
    partly_mapped: tuple[str, ...]
    """Measured models of which some operators ran on the host: their times are not the device's."""
    networks: tuple[ScoredNetwork, ...]

    def text(self) -> str:
        """A few lines to read."""

        def rank(value: float | None) -> str:
            return "-" if value is None else f"{value:.3f}"

        lines = [
            f"{self.held_out_networks} networks kept back: MAPE {self.held_out_mape:.2f} %, "
            f"Spearman {rank(self.held_out_spearman)}, "
            f"Kendall tau {rank(self.held_out_kendall_tau)}",
            f"{self.fit_networks} networks fitted: MAPE {self.fit_mape:.2f} %",
            *(
                f"{name}: {term.value:.4g} +- {term.standard_error:.2g}"
                for name, term in self.terms.items()
            ),
            f"{self.num_rows} rows; {len(self.clamped)} not above their noise, "
            f"{len(self.missing)} operations without a row, {len(self.failures)} models failed, "
            f"{len(self.partly_mapped)} ran in part on the host",
            "median spread: "
            + ", ".join(f"{kind} {value:.1f} %" for kind, value in self.spread_percent.items()),
        ]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Assembled:
    """A table, and how it came about."""

    table: LatencyTable
    report: Report


def assemble_table(
    folder: Path, paths: Sequence[Path], *, seed: int = 0, allow_missing: bool = False
) -> Assembled:
    """Make a latency table of measurements of a bundle.

    Args:
        folder: the bundle, with `compiled.jsonl` where the models were compiled.
        paths: files that `measure.py` wrote on one machine.
        seed: of the choice of the networks that are kept back.
        allow_missing: leave out the rows of operations that were not measured, with a warning.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for damaged or mixed measurements, those of another bundle, fewer than 16
            whole networks, or operations without a time.
    """
    bundle, measured = read_bundle(folder), read_measurements(paths)
    if measured.session.bundle != bundle.digest:
        raise ValueError(
            f"the measurements are of the bundle {measured.session.bundle[:12]}, {folder} is "
            f"{bundle.digest[:12]}; name the bundle that was copied to the device"
        )
    unknown = sorted(measured.times.keys() - set(bundle.models))
    if unknown:
        raise ValueError(f"measured {unknown[0]}, which {folder} does not list")
    compiled = _compiled_models(folder, measured)
    partly_mapped = tuple(m for m in bundle.models if m in compiled and compiled[m].unmapped)
    if partly_mapped:
        warnings.warn(
            f"{len(partly_mapped)} of {len(compiled)} models ran in part on the host, such as "
            f"{', '.join(partly_mapped[:3])}: these times are not the device's alone",
            stacklevel=2,
        )
    costs, missing = _operation_costs(bundle, measured, compiled, allow_missing=allow_missing)
    networks = _networks(bundle, folder, measured, compiled, costs)
    terms = _fit_transfers(list(costs.values()))
    order = np.random.default_rng(seed).permutation(len(networks))
    for index in order[1::2]:
        networks[index].is_held_out = True
    terms |= _fit_networks([network for network in networks if not network.is_held_out], terms)
    return _assembled(bundle, measured, costs, missing, partly_mapped, networks, terms)


def _compiled_models(folder: Path, measured: Measurements) -> dict[str, CompiledModel]:
    """What the compiler said of the measured models; nothing where they ran as exported.

    Raises:
        FileNotFoundError: if they were compiled and the bundle does not say how.
        ValueError: if it says it of other models or another compiler's.
    """
    session = measured.session
    if session.compiler is None and "edgetpu" not in (session.delegate or ""):
        return {}
    compiled = read_compiled(folder)
    if not compiled:
        raise FileNotFoundError(
            f"{folder} holds no {COMPILED}, and compiled models were measured; bring it back "
            f"beside {MANIFEST} from where the bundle was compiled"
        )
    versions = ", ".join(sorted({entry.compiler for entry in compiled.values()}))
    if versions != session.compiler:
        raise ValueError(
            f"{folder / COMPILED} is of edgetpu_compiler {versions}, the measured models are of "
            f"{session.compiler}; bring the file of the bundle that was measured"
        )
    for model in measured.times:
        if model not in compiled:
            raise ValueError(
                f"{model} was measured, but {COMPILED} in {folder} does not say what it "
                f"streams; bring the file of the bundle that was measured"
            )
    return {model: compiled[model] for model in measured.times}


# Operations ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Slope:
    """What one more copy of an operation costs, and what a model costs without any.

    Both before streaming is taken out: ms less `s` times the streamed bytes is without.
    """

    ms: float
    error_ms: float
    spread_ms: float
    streamed_bytes: float
    parameter_bytes: float | None
    """As the compiler reports them; None where there was none."""
    base_ms: float
    base_error_ms: float
    is_streamed: bool


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """An operation before the terms of whole networks are known."""

    operation: Operation
    ms: float
    """One more copy, without additions; streaming included. At least `floor_ms`."""
    floor_ms: float
    """The noise of `ms`: a shorter time cannot be told from none, yet nothing is free."""
    is_clamped: bool
    spread_ms: float
    streamed_bytes: float
    """Parameter bytes that one more copy streams."""
    parameter_bytes: float
    base_ms: float
    """A model without a copy: the call and the transfers."""
    base_error_ms: float
    is_streamed: bool
    is_row: bool

    @property
    def input_bytes(self) -> int:
        """Int8 bytes that go in."""
        o = self.operation
        return o.in_channels * o.in_height * o.in_width

    @property
    def output_bytes(self) -> int:
        """Int8 bytes that come out."""
        o = self.operation
        return o.out_channels * o.out_height * o.out_width

    def row(self, terms: Mapping[str, Term]) -> tuple[TableRow, bool]:
        """The row, and whether it had to be raised to the noise of its time."""
        scale = terms["row_scale"].value
        ms = self.ms - terms["streaming_ms_per_byte"].value * self.streamed_bytes
        row = TableRow(
            latency_ms=scale * max(ms, self.floor_ms),
            spread_ms=scale * self.spread_ms,
            parameter_bytes=max(0, round(self.parameter_bytes)),
        )
        return row, self.is_clamped or ms < self.floor_ms


def _operation_costs(
    bundle: Bundle,
    measured: Measurements,
    compiled: Mapping[str, CompiledModel],
    *,
    allow_missing: bool,
) -> tuple[dict[Operation, _Cost], list[Operation]]:
    """What the operations cost, and those of the space that no cost is known of.

    Raises:
        ValueError: if there are such and they are not allowed.
    """
    times = _operation_times(bundle, measured)
    slopes = {}
    for entry in bundle.operations:
        files = [file for file in entry.files if file.model in times]
        if len(files) >= 2:
            reports = [compiled[file.model] for file in files] if compiled else []
            copies = [file.copies for file in files]
            slopes[entry.operation] = _slope(copies, [times[f.model] for f in files], reports)
    costs, missing = {}, []
    for entry in bundle.operations:
        if all(operation in slopes for operation in (entry.operation, *entry.adds)):
            costs[entry.operation] = _cost(entry, slopes)
        elif entry.is_row:
            missing.append(entry.operation)
    if missing:
        untimed = [e.operation for e in bundle.operations if e.operation not in slopes]
        _tell_missing(untimed, missing, measured, allow_missing=allow_missing)
    return costs, missing


def _operation_times(bundle: Bundle, measured: Measurements) -> dict[str, ModelTime]:
    """Times of the operations' models, no error below what is usual among them."""
    models = [file.model for entry in bundle.operations for file in entry.files]
    times = {model: measured.times[model] for model in models if model in measured.times}
    if not times:
        return {}
    # A few rounds that agree by chance say less of a model's error than all models together.
    usual = float(np.median([time.error_ms / time.ms for time in times.values()]))
    return {
        model: replace(time, error_ms=max(time.error_ms, usual * time.ms))
        for model, time in times.items()
    }


def _slope(
    copies: Sequence[int], times: Sequence[ModelTime], reports: Sequence[CompiledModel]
) -> _Slope:
    """Least squares over copies; through both points where there are two."""
    count = np.array(copies, dtype=float)
    per_copy = (count - count.mean()) / ((count - count.mean()) ** 2).sum()
    at_none = 1 / len(count) - count.mean() * per_copy
    ms = np.array([time.ms for time in times])
    error_ms = np.array([time.error_ms for time in times])
    spread_ms = np.array([time.spread_ms for time in times])
    off_chip = np.array([report.off_chip_bytes for report in reports])
    on_chip = np.array([report.on_chip_bytes for report in reports])
    return _Slope(
        ms=float(per_copy @ ms),
        error_ms=float(np.linalg.norm(per_copy * error_ms)),
        spread_ms=float(np.linalg.norm(per_copy * spread_ms)),
        streamed_bytes=float(per_copy @ off_chip) if reports else 0.0,
        parameter_bytes=float(per_copy @ (on_chip + off_chip)) if reports else None,
        base_ms=float(at_none @ ms),
        base_error_ms=float(np.linalg.norm(at_none * error_ms)),
        is_streamed=bool(off_chip.any()),
    )


def _cost(entry: OperationModels, slopes: Mapping[Operation, _Slope]) -> _Cost:
    slope, adds = slopes[entry.operation], [slopes[add] for add in entry.adds]
    adds_ms = sum(add.ms for add in adds)
    ms = slope.ms - adds_ms
    reported = slope.parameter_bytes
    floor_ms = max(RESOLUTION_MS, math.hypot(slope.error_ms, *(add.error_ms for add in adds)))
    return _Cost(
        operation=entry.operation,
        ms=max(ms, floor_ms),
        floor_ms=floor_ms,
        is_clamped=ms < floor_ms,
        spread_ms=slope.spread_ms,
        streamed_bytes=slope.streamed_bytes,
        parameter_bytes=float(entry.weight_bytes) if reported is None else reported,
        # The first copy comes without additions.
        base_ms=slope.base_ms + adds_ms,
        base_error_ms=slope.base_error_ms,
        is_streamed=slope.is_streamed,
        is_row=entry.is_row,
    )


def _tell_missing(
    untimed: Sequence[Operation],
    missing: Sequence[Operation],
    measured: Measurements,
    *,
    allow_missing: bool,
) -> None:
    text = (
        f"no times of {len(untimed)} operations (such as {untimed[0]}), which {len(missing)} rows "
        f"need"
    )
    if measured.failures:
        model, error = next(iter(measured.failures.items()))
        text += f"; {len(measured.failures)} models failed (such as {model}: {error})"
    if not allow_missing:
        raise ValueError(
            f"{text}; start measure.py again, it goes on where it stopped, or go on without "
            f"these rows with --allow-missing"
        )
    warnings.warn(f"{text}; a search that needs one of them will say so", stacklevel=4)


def _fit_transfers(costs: Sequence[_Cost]) -> dict[str, Term]:
    """Overhead of a call and time per byte, from what is left of all operations at no copy."""
    # Where weights are streamed, what is left holds a part of that too.
    chosen = [cost for cost in costs if not cost.is_streamed]
    columns = np.array([[1.0, cost.input_bytes, cost.output_bytes] for cost in chosen])
    target = np.array([cost.base_ms for cost in chosen])
    deviation = np.array([cost.base_error_ms for cost in chosen])
    if not deviation.all():  # only where nothing varied at all
        deviation = np.ones(len(chosen))

    def fit(part: npt.NDArray[np.bool_]) -> Array:
        return fit_nonnegative(columns[part], target[part], deviation[part])

    names = ("single_ms", "input_ms_per_byte", "output_ms_per_byte")
    return _terms(names, fit, len(chosen))


def _terms(
    names: Sequence[str], fit: Callable[[npt.NDArray[np.bool_]], Array], count: int
) -> dict[str, Term]:
    values, errors = fit(np.ones(count, dtype=bool)), jackknife(fit, count)
    return {
        name: Term(value=float(value), standard_error=float(error))
        for name, value, error in zip(names, values, errors, strict=True)
    }


# Whole networks -----------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Network:
    """A measured network and the sums over its operations."""

    model: str
    ms: float
    input_bytes: int
    output_bytes: int
    operations: list[Operation]
    rows_ms: float
    rows_streamed_bytes: float
    """Streamed bytes that are in the times of the rows."""
    parameter_bytes: float
    streamed_bytes: float
    """As the compiler reports them for the network."""
    is_held_out: bool = False


def _networks(
    bundle: Bundle,
    folder: Path,
    measured: Measurements,
    compiled: Mapping[str, CompiledModel],
    costs: Mapping[Operation, _Cost],
) -> list[_Network]:
    """The networks that were measured and whose operations were.

    Raises:
        ValueError: if there are too few.
    """
    space = read_space(folder)
    input_bytes, output_bytes = network_io_bytes(space, bundle.image_size, bundle.out_channels)
    networks = []
    for entry in bundle.networks:
        placed = network_operations(
            space, entry.architecture, bundle.image_size, bundle.out_channels
        )
        operations = [operation for _, operation in placed]
        if entry.model not in measured.times or not all(o in costs for o in operations):
            continue
        held = [costs[operation] for operation in operations]
        networks.append(
            _Network(
                model=entry.model,
                ms=measured.times[entry.model].ms,
                input_bytes=input_bytes,
                output_bytes=output_bytes,
                operations=operations,
                rows_ms=sum(cost.ms for cost in held),
                rows_streamed_bytes=sum(cost.streamed_bytes for cost in held),
                parameter_bytes=sum(cost.parameter_bytes for cost in held),
                streamed_bytes=float(compiled[entry.model].off_chip_bytes) if compiled else 0.0,
            )
        )
    if len(networks) < MIN_NETWORKS:
        raise ValueError(
            f"expected times of at least {MIN_NETWORKS} whole networks and of all their "
            f"operations, got {len(networks)} of the bundle's {len(bundle.networks)}; start "
            f"measure.py again, it goes on where it stopped, or export a bundle with more "
            f"--networks"
        )
    return networks


def _fit_networks(networks: Sequence[_Network], terms: Mapping[str, Term]) -> dict[str, Term]:
    """Fixed time, scale of the rows and streaming, by relative errors.

    Raises:
        ValueError: if the rows say nothing about the networks.
    """
    target = np.array([network.ms - _transfer_ms(network, terms) for network in networks])
    rows_ms = np.array([network.rows_ms for network in networks])
    rows_streamed = np.array([network.rows_streamed_bytes for network in networks])
    streamed = np.array([network.streamed_bytes for network in networks], dtype=float)
    deviation = np.array([network.ms for network in networks])

    def fit(part: npt.NDArray[np.bool_]) -> Array:
        coefficients, scale = np.zeros(3), 1.0
        # The rows are free of streaming only once `s` is known, so scale and `s` take turns.
        for _ in range(100):
            columns = np.column_stack(
                [np.ones(len(networks)), rows_ms, streamed - scale * rows_streamed]
            )
            coefficients = fit_nonnegative(columns[part], target[part], deviation[part])
            if math.isclose(coefficients[1], scale, rel_tol=1e-12):
                break
            scale = float(coefficients[1])
        return coefficients

    fitted = _terms(("fixed_ms", "row_scale", "streaming_ms_per_byte"), fit, len(networks))
    if fitted["row_scale"].value == 0:
        raise ValueError(
            "the times of whole networks do not grow with those of their operations; the machine "
            "was busy, or the files do not belong together: measure anew"
        )
    return fitted


def _transfer_ms(network: _Network, terms: Mapping[str, Term]) -> float:
    return (
        terms["input_ms_per_byte"].value * network.input_bytes
        + terms["output_ms_per_byte"].value * network.output_bytes
    )


# The table ----------------------------------------------------------------------------------


def _assembled(
    bundle: Bundle,
    measured: Measurements,
    costs: Mapping[Operation, _Cost],
    missing: Sequence[Operation],
    partly_mapped: tuple[str, ...],
    networks: Sequence[_Network],
    terms: Mapping[str, Term],
) -> Assembled:
    rows, clamped = {}, []
    for operation, cost in costs.items():
        if cost.is_row:
            rows[operation], is_clamped = cost.row(terms)
            clamped += [operation] if is_clamped else []
    streaming = terms["streaming_ms_per_byte"].value
    cache_bytes = _cache_bytes([n for n in networks if not n.is_held_out]) if streaming else 0.0
    scored = []
    for network in networks:
        held = [rows[operation] for operation in network.operations]
        excess = sum(row.parameter_bytes for row in held) - cache_bytes
        predicted_ms = (
            terms["fixed_ms"].value
            + _transfer_ms(network, terms)
            + sum(row.latency_ms for row in held)
            + streaming * max(0.0, excess)
        )
        scored.append(
            ScoredNetwork(
                model=network.model,
                measured_ms=network.ms,
                predicted_ms=predicted_ms,
                is_held_out=network.is_held_out,
            )
        )
    report = _report(scored, rows, clamped, missing, partly_mapped, measured, terms)
    session = measured.session
    header = TableHeader(
        device=session.device,
        source="measured",
        host=session.host,
        runtime=f"{session.runtime} {session.runtime_version}",
        machine=session.machine,
        delegate=session.delegate,
        kernels=session.kernels,
        threads=session.threads,
        clock_mhz=None if session.clock_mhz is None else float(session.clock_mhz),
        compiler=session.compiler,
        date=measured.date,
        unit=UNIT,
        runs=int(np.median([time.runs for time in measured.times.values()])),
        rows=len(rows),
        row_scale=terms["row_scale"].value,
        note=f"{len(partly_mapped)} of {len(measured.times)} models ran in part on the host"
        if partly_mapped
        else "",
        space=bundle.space,
        image_height=bundle.image_height,
        image_width=bundle.image_width,
        out_channels=dict(bundle.out_channels),
        fixed_ms=terms["fixed_ms"].value,
        input_ms_per_byte=terms["input_ms_per_byte"].value,
        output_ms_per_byte=terms["output_ms_per_byte"].value,
        cache_bytes=cache_bytes,
        streaming_ms_per_byte=streaming,
        held_out_mape=round(report.held_out_mape, 4),
        held_out_spearman=_rounded(report.held_out_spearman),
        held_out_kendall_tau=_rounded(report.held_out_kendall_tau),
        held_out_networks=report.held_out_networks,
        fit_networks=report.fit_networks,
        held_out_note="random networks of the space",
    )
    return Assembled(LatencyTable(header, rows, f"measured {bundle.space}"), report)


def _cache_bytes(networks: Sequence[_Network]) -> float:
    """What the compiler keeps on the chip when it does not keep all.

    It evicts whole layers, so this differs between networks. Where none streams, the cache holds
    the largest.
    """
    kept = [n.parameter_bytes - n.streamed_bytes for n in networks if n.streamed_bytes > 0]
    if not kept:
        return max(network.parameter_bytes for network in networks)
    return max(0.0, float(np.median(kept)))


def _rounded(correlation: float | None) -> float | None:
    return None if correlation is None else round(correlation, 4)


def _report(
    networks: Sequence[ScoredNetwork],
    rows: Mapping[Operation, TableRow],
    clamped: Sequence[Operation],
    missing: Sequence[Operation],
    partly_mapped: tuple[str, ...],
    measured: Measurements,
    terms: Mapping[str, Term],
) -> Report:
    truth = np.array([network.measured_ms for network in networks])
    predicted = np.array([network.predicted_ms for network in networks])
    percent = 100 * np.abs(predicted / truth - 1)
    kept = np.array([network.is_held_out for network in networks])
    spreads = defaultdict(list)
    for operation in sorted(rows):
        row = rows[operation]
        spreads[operation.op].append(100 * row.spread_ms / row.latency_ms)
    return Report(
        held_out_mape=float(percent[kept].mean()),
        held_out_spearman=spearman(predicted[kept], truth[kept]),
        held_out_kendall_tau=kendall_tau(predicted[kept], truth[kept]),
        held_out_networks=int(kept.sum()),
        fit_networks=int((~kept).sum()),
        fit_mape=float(percent[~kept].mean()),
        terms=dict(terms),
        num_rows=len(rows),
        spread_percent={kind: float(np.median(values)) for kind, values in spreads.items()},
        clamped=tuple(clamped),
        missing=tuple(missing),
        failures=dict(measured.failures),
        partly_mapped=partly_mapped,
        networks=tuple(networks),
    )
