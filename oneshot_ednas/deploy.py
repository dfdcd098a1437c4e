"""A trained network as a file for the device, and whether that file does what the network does.

The file is read back, run in a TFLite interpreter on the frames that the float network is scored
on, timed on this machine, and compiled for the Edge TPU where its compiler is installed. What
cannot be checked here is said, never passed over.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.export import export_tflite
from oneshot_ednas.export.contents import INTEGER_TYPES, Contents, read_contents
from oneshot_ednas.export.edgetpu import (
    COMPILER,
    MAPPED,
    MAX_VERSIONS,
    compile_model,
    compiled_path,
    find_compiler,
)
from oneshot_ednas.export.quantize import IoType
from oneshot_ednas.export.runtime import TfliteNetwork
from oneshot_ednas.latency.table import LatencyTable, TableHeader
from oneshot_ednas.measure import (
    KERNELS,
    MissingRuntime,
    describe_session,
    fill_inputs,
    open_interpreter,
    summarize,
    time_invocations,
)
from oneshot_ednas.reward import SMALLEST_ERROR
from oneshot_ednas.schema import to_plain
from oneshot_ednas.store import write_json
from oneshot_ednas.tasks import Task
from oneshot_ednas.training import Metrics, evaluate, numpy_generator

PIXEL_RANGE = (-1.0, 1.0)
"""Of the images: pixel / 127.5 - 1, so that a scale of 1 / 127.5 takes 8-bit pixels as they are."""
FORBIDDEN = ("PAD", "TRANSPOSE")
"""Operators that a network of this package has no need of, and that cost time on the device."""
TIMED_RUNS = 50


def deploy(
    network: nn.Module,
    path: Path,
    report_path: Path,
    *,
    name: str,
    architecture: str,
    calibration: PackedSplit,
    splits: Mapping[str, PackedSplit],
    tasks: Mapping[str, Task],
    table: LatencyTable,
    predicted_ms: float,
    io: IoType = "int8",
    num_calibration: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    device: torch.device,
    trained_sha256: str | None = None,
) -> dict[str, Any]:
    """Export a trained network as full-int8 `.tflite`, check the file, and report.

    Args:
        network: images to raw maps by task.
        path: the file to write; what the Edge TPU compiler makes goes beside it.
        report_path: the report, as JSON.
        name: of the network, for the report.
        architecture: what it is, for the report.
        calibration: frames that the network is trained on; the ranges of activations come from
            some of them, without augmentation.
        splits: by name, the frames to score the network and the file on.
        tasks: the tasks.
        table: the latency table that the network was searched with.
        predicted_ms: what it says of this network.
        io: type of input and output.
        num_calibration: how many of the calibration frames.
        batch_size: frames at a time.
        seed: of the choice of calibration frames.
        device: where the network is.
        trained_sha256: SHA-256 of the network's checkpoint, for the report.

    Returns:
        The report: `sha256` of the file, `operators`, `size_bytes`, `metrics` (by split, task and
        metric, see `compare`), `note` on splits that the network was trained on, `latency`,
        `compiler`, and in `not_verified` and `not_compiled` the reason where a check could not be
        made, else null. It is written before the compiler is called, and again after.

    Raises:
        ValueError: for no calibration frames.
        RuntimeError: if the file is not what the Edge TPU takes; it does not stay then.
    """
    export = export_tflite(
        network,
        path,
        calibration_images=_some_images(calibration, num_calibration, batch_size, seed),
        io=io,
        input_range=PIXEL_RANGE,
    )
    # What an earlier file has left behind is not of this one.
    for stale in (report_path, compiled_path(path, path.parent)):
        stale.unlink(missing_ok=True)
    try:
        check_contents(read_contents(path), path.name)
    except RuntimeError:
        path.unlink()
        raise
    report = {
        "file": path.name,
        "sha256": file_digest(path),
        "network": name,
        "trained_sha256": trained_sha256,
        "architecture": architecture,
        "size_bytes": export.size_bytes,
        "io": io,
        "num_calibration_images": export.num_calibration_images,
        "operators": {
            operator: {"count": count, "version": export.versions[operator]}
            for operator, count in export.operators.items()
        },
        "inputs": to_plain(export.inputs),
        "outputs": to_plain(export.outputs),
        "unmapped": list(export.unmapped),
        "metrics": None,
        "note": _note(calibration, splits),
        "latency": {"predicted_ms": predicted_ms, "predicted_for": _device_of(table.header)},
        "not_verified": None,
        "compiler": None,
        "not_compiled": f"{COMPILER} has not come to its end",
    }
    try:
        quantized = TfliteNetwork(path)
        report["latency"] |= measure_latency(path, table.header, predicted_ms)
    except MissingRuntime as missing:
        report["not_verified"] = str(missing)
    else:
        report["metrics"] = {
            part: compare(
                evaluate(network, split, tasks, batch_size=batch_size, device=device),
                evaluate(quantized, split, tasks, batch_size=batch_size, device=device),
                tasks,
            )
            for part, split in splits.items()
        }
    if find_compiler() is not None:  # a compilation takes minutes, and may be interrupted
        write_json(report_path, report)
    report |= _compile(path)
    write_json(report_path, report)
    return report


def file_digest(path: Path) -> str:
    """SHA-256 of a file, which ties a report to the file that it is of."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _note(trained_on: PackedSplit, splits: Mapping[str, PackedSplit]) -> str | None:
    """A warning of splits with frames that the network was trained on."""
    known = set(trained_on.sources)
    seen = [name for name, split in splits.items() if known.intersection(split.sources)]
    if not seen:
        return None
    return (
        f"the network was trained on frames of the {' and '.join(seen)} split: metrics there tell "
        f"what quantization changes, not how good the network is on new frames"
    )


def _some_images(
    split: PackedSplit, num_images: int, batch_size: int, seed: int
) -> Iterator[Tensor]:
    count = min(num_images, len(split))
    chosen = np.sort(numpy_generator(seed, "export").choice(len(split), count, replace=False))
    for start in range(0, count, batch_size):
        yield split.batch(chosen[start : start + batch_size])["image"]


def check_contents(contents: Contents, name: str) -> None:
    """Refuse operators, versions and types beyond what the Edge TPU compiler accepts.

    Whether it maps what it accepts depends on shapes and options too, see `unmapped_ops`.

    Raises:
        RuntimeError: naming the operator or tensor.
    """
    for operator in contents.operators:
        newest = MAX_VERSIONS.get(operator.name)
        if operator.name in FORBIDDEN or newest is None or operator.version > newest:
            expected = f"at most {newest}" if newest else f"one of {', '.join(MAX_VERSIONS)}"
            what = "no such operator" if operator.name in FORBIDDEN else expected
            raise RuntimeError(
                f"{name}: {operator.outputs[0]} is written by {operator.name} version "
                f"{operator.version}, expected {what}"
            )
    for tensor in contents.tensors:
        if tensor.dtype not in INTEGER_TYPES:
            raise RuntimeError(f"{name}: {tensor.name} is {tensor.dtype}, expected integers only")


def compare(
    exact: Metrics, quantized: Metrics, tasks: Mapping[str, Task]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Metrics of the float network beside those of the file.

    Returns:
        Per task and metric `float`, `int8`, and what quantization changed, as `difference`: of an
        error in percent of it (`unit` is `%`, positive is worse), of a share in percentage points
        (`unit` is `points`, negative is worse).
    """
    return {
        task: {
            metric: _compared(
                value, quantized[task][metric], is_error=metric in tasks[task].lower_is_better
            )
            for metric, value in values.items()
        }
        for task, values in exact.items()
    }


def _compared(exact: float, quantized: float, *, is_error: bool) -> dict[str, Any]:
    change = 100 * (quantized - exact)
    if is_error:
        change /= max(exact, SMALLEST_ERROR)
    unit = "%" if is_error else "points"
    return {"float": exact, "int8": quantized, "difference": change, "unit": unit}


# Latency ------------------------------------------------------------------------------------


def measure_latency(path: Path, header: TableHeader, predicted_ms: float) -> dict[str, Any]:
    """Time a file in this machine's interpreter, with the threads and kernels of the table.

    Returns:
        `measured_ms` (the median), `spread_ms` (half the interquartile range), `runs`,
        `measured_on`, and `error_percent` of the prediction, which is null unless the table was
        measured on this very machine and runtime, with the same kernels and threads: other times
        say nothing of these.
    """
    threads = header.threads or 1
    kernels = header.kernels if header.kernels in KERNELS else "default"
    interpreter = open_interpreter(path, threads=threads, kernels=kernels)
    fill_inputs(interpreter)
    times = summarize(time_invocations(interpreter, runs=TIMED_RUNS))
    session = describe_session({"device": None, "delegate": None})
    runtime = f"{session['runtime']} {session['runtime_version']}"
    is_same = (
        header.source == "measured"
        and header.delegate is None
        and (header.machine, header.runtime) == (session["machine"], runtime)
        and (header.kernels, header.threads) == (kernels, threads)
    )
    error = 100 * (predicted_ms - times["median_ms"]) / times["median_ms"]
    return {
        "measured_ms": times["median_ms"],
        "spread_ms": times["spread_ms"],
        "runs": times["runs"],
        "measured_on": f"{session['device']}, {session['machine']}, {runtime}, {kernels} kernels, "
        f"{threads} thread{'s' * (threads > 1)}",
        "error_percent": error if is_same else None,
    }


def _device_of(header: TableHeader) -> str:
    where = header.host if header.source == "simulated" else f"{header.machine}, {header.runtime}"
    return f"{header.device}, {where} ({header.source})"


# Compiler -----------------------------------------------------------------------------------


def _compile(path: Path) -> dict[str, Any]:
    """The compiler's report, or why there is none."""
    if find_compiler() is None:
        reason = f"{COMPILER} is not on PATH; compile {path.name} where it is (x86-64 Linux)"
        return {"compiler": None, "not_compiled": reason}
    try:
        report = compile_model(path, path.parent)
    except RuntimeError as error:  # the file is written and verified all the same
        return {"compiler": None, "not_compiled": str(error)}
    figures = to_plain(report) | {"mapped": report.mapped, "unmapped": report.unmapped}
    figures["file"] = compiled_path(path, path.parent).name
    return {"compiler": figures, "not_compiled": None}


# In words -----------------------------------------------------------------------------------


def difference_text(row: Mapping[str, Any]) -> str:
    """What quantization changed of one metric."""
    space = "" if row["unit"] == "%" else " "
    return f"{row['difference']:+.2f}{space}{row['unit']}"


def latency_text(report: Mapping[str, Any]) -> str:
    """The prediction beside what was measured here, and whether they can be compared."""
    latency = report["latency"]
    text = f"{latency['predicted_ms']:.3f} ms predicted for {latency['predicted_for']}"
    if "measured_ms" not in latency:
        return f"{text}; not measured here"
    text += (
        f"; {latency['measured_ms']:.3f} ms ± {latency['spread_ms']:.3f} measured here on "
        f"{latency['measured_on']}"
    )
    if latency["error_percent"] is None:
        return f"{text}. Not one device and runtime, so the one says nothing of the other."
    return f"{text}. The prediction is off by {latency['error_percent']:+.1f} %."


def compiler_text(report: Mapping[str, Any]) -> str:
    """The verdict of the Edge TPU compiler."""
    found = report["compiler"]
    if found is None:
        return f"not compiled: {report['not_compiled']}"
    text = (
        f"{found['mapped']} operations mapped, {found['unmapped']} left to the CPU, "
        f"{found['on_chip_bytes'] / 2**20:.2f} MiB of parameters on the chip, "
        f"{found['off_chip_bytes'] / 2**20:.2f} MiB streamed (version {found['version']})"
    )
    left = [row for row in found["operations"] if row["status"] != MAPPED]
    return "; ".join([text, *(f"{row['count']} {row['name']}: {row['status']}" for row in left)])
