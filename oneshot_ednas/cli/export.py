"""The command export: a trained network as a file for the device."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import click
from rich.table import Table

from oneshot_ednas.cli.common import (
    DETAILS,
    bad_input,
    console,
    data_option,
    json_option,
    main,
)
from oneshot_ednas.cli.runs import reopen
from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.deploy import compiler_text, difference_text, latency_text
from oneshot_ednas.export.edgetpu import find_compiler
from oneshot_ednas.export.quantize import IoType
from oneshot_ednas.pipeline import Run
from oneshot_ednas.run_folder import RunFiles
from oneshot_ednas.schema import read_json

SUFFIX = ".tflite"


@main.command()
@click.argument("run_or_checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="File to write, *.tflite."
)
@click.option("--io", type=click.Choice(["int8", "uint8"]), default="int8", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), help="Which training of a run; the first is 0.")
@click.option("--baseline", help="Export this baseline of a run instead.")
@click.option(
    "--split",
    type=click.Choice(["validation", "test"]),
    default="validation",
    show_default=True,
    help="Frames to score the float network and the file on; the network was retrained on those "
    "of validation, too.",
)
@click.option(
    "--num-calibration",
    type=click.IntRange(min=0),
    default=128,
    show_default=True,
    help="Training frames that the ranges of activations come from.",
)
@data_option
@json_option
@bad_input
def export(
    run_or_checkpoint: Path,
    out: Path,
    io: str,
    seed: int | None,
    baseline: str | None,
    split: str,
    num_calibration: int,
    data: Path | None,
    as_json: bool,
) -> None:
    """Write a trained network as full-int8 .tflite, and check the file.

    The report is written beside it, as JSON: operators, metrics in int8 and in float, predicted
    and measured latency, and the verdict of the Edge TPU compiler where it is installed.

    Example: oneshot-ednas export runs/demo --out model.tflite
    """
    folder, stage = _training(run_or_checkpoint, seed, baseline)
    report_path = _report_path(out, folder)
    run = reopen(folder, data)
    report = run.deploy(
        stage,
        out,
        report_path,
        splits={split: _split(run, split)},
        io=cast(IoType, io),
        num_calibration=num_calibration,
    )
    if as_json:
        print(json.dumps(report))
    else:
        _print_export(report)
        print(f"file: {out}; report: {report_path}")
    if report["not_compiled"] and find_compiler():
        raise RuntimeError(report["not_compiled"])


def _training(path: Path, seed: int | None, baseline: str | None) -> tuple[Path, str]:
    """The run folder and the name of the training.

    Raises:
        ValueError: for options that contradict each other, or a folder or file without trainings.
        FileNotFoundError: for no such file.
    """
    if seed is not None and baseline is not None:
        raise ValueError("--seed and --baseline exclude each other: a baseline has one training")
    if path.is_dir():
        if not RunFiles(path).checkpoint("search").parent.is_dir():
            raise ValueError(
                f"{path} is no run folder with trained networks: it has no checkpoints"
            )
        return path, f"baseline.{baseline}" if baseline else f"retrain.seed_{seed or 0}"
    if not path.is_file():
        raise FileNotFoundError(f"no run folder and no checkpoint {path}")
    if seed is not None or baseline is not None:
        raise ValueError(f"{path} is one training; --seed and --baseline are for a run folder")
    folder = path.absolute().parent.parent
    files = RunFiles(folder)
    if files.checkpoint(path.stem) != path.absolute() or not files.config.is_file():
        raise ValueError(
            f"{path}: expected a run folder, or a file such as "
            f"RUN/checkpoints/retrain.seed_0.safetensors inside one"
        )
    if path.stem == "search":
        raise ValueError(
            f"{path} holds a supernet: derive and retrain first (oneshot-ednas derive {folder}; "
            f"oneshot-ednas retrain {folder}), then export {folder}"
        )
    return folder, path.stem


def _report_path(out: Path, folder: Path) -> Path:
    """Where the report goes.

    Raises:
        ValueError: if the file has another suffix or is the run's own, or the report would
            overwrite something else.
    """
    if out.suffix != SUFFIX or out.is_dir():
        raise ValueError(f"--out: expected a file named *{SUFFIX}, got {out}")
    if out.resolve() == RunFiles(folder).model.resolve():
        raise ValueError(
            f"--out: {out} is the run's own export, which oneshot-ednas evaluate {folder} writes; "
            f"choose another file"
        )
    path = out.with_suffix(".json")
    if path.exists():
        held = read_json(path)
        if not isinstance(held, dict) or held.get("file") != out.name:
            raise ValueError(f"the report would overwrite {path}; choose another --out")
    return path


def _split(run: Run, name: str) -> PackedSplit:
    return run.test if name == "test" else run.part(name)


def _print_export(report: Mapping[str, Any]) -> None:
    """The report for people."""
    print(f"{report['file']}: {report['network']}, {report['architecture']}")
    table = Table()
    for column in ("operator", "count", "version"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    for name, operator in report["operators"].items():
        table.add_row(name, str(operator["count"]), str(operator["version"]))
    console().print(table)
    print(
        f"{report['size_bytes'] / 2**20:.2f} MiB, all integers, {report['io']} in and out, "
        f"calibrated on {report['num_calibration_images']} training frames"
    )
    for line in report["unmapped"]:
        print(f"on the Edge TPU, {line}")
    for split, tasks in (report["metrics"] or {}).items():
        _print_metrics(split, tasks)
    if report["metrics"] and report["note"]:
        print(f"note: {report['note']}")
    print(f"latency: {latency_text(report)}")
    print(f"Edge TPU compiler: {compiler_text(report)}")
    if report["not_verified"]:
        print(f"not verified: {report['not_verified']}")


def _print_metrics(split: str, tasks: Mapping[str, Any]) -> None:
    table = Table(title=f"{split} split")
    for column in ("metric", "float", "int8", "difference"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for task, metrics in tasks.items():
        for metric, row in metrics.items():
            if metric not in DETAILS:
                numbers = [f"{row[key]:.4f}" for key in ("float", "int8")]
                table.add_row(f"{task} {metric}", *numbers, difference_text(row))
    console().print(table)
