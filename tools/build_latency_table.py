"""Build a latency table by measuring: export, compile, measure, assemble.

    python tools/build_latency_table.py export ednas_tiny --image-size 64 128 --out bundle
    python tools/build_latency_table.py compile bundle            # Edge TPU only
    python tools/build_latency_table.py measure bundle --out measured.jsonl
    python tools/build_latency_table.py assemble bundle measured.jsonl --out table.csv

The steps can run on different machines; on the device, `measure.py` in the bundle does without this
package.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from oneshot_ednas import measure as measuring
from oneshot_ednas.bundle.assemble import assemble_table
from oneshot_ednas.bundle.build import build_bundle, random_networks
from oneshot_ednas.bundle.compile import compile_bundle
from oneshot_ednas.bundle.manifest import MIN_NETWORKS, Progress
from oneshot_ednas.cli.common import DEFAULT_TASKS, bad_input, json_option, read_channels
from oneshot_ednas.schema import to_plain
from oneshot_ednas.space import named_space
from oneshot_ednas.store import write_text

_PATH = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Build a latency table from measurements: export, compile, measure, assemble.

    Example: build_latency_table.py export ednas_tiny --image-size 64 128 --out bundle
    """


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    """A progress bar on a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        bar = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


@main.command("export")
@click.argument("space")
@click.option("--image-size", nargs=2, type=int, required=True, metavar="H W")
@click.option("--tasks", default=DEFAULT_TASKS, show_default=True, help="Output channels.")
@click.option("--out", type=_PATH, required=True, help="Folder to make.")
@click.option("--networks", type=int, default=64, show_default=True, help="Random whole networks.")
@click.option("--seed", type=int, default=0, show_default=True)
@json_option
@bad_input
def export_command(
    space: str,
    image_size: tuple[int, int],
    tasks: str,
    out: Path,
    networks: int,
    seed: int,
    as_json: bool,
) -> None:
    """Write every operation of SPACE and random whole networks as .tflite models.

    Example: build_latency_table.py export ednas_tiny --image-size 64 128
    --tasks segmentation=10,depth=1,normals=3 --out bundle
    """
    searched = named_space(space)
    _check_networks(networks, len(random_networks(searched, max(0, networks), seed)))
    torch.set_num_threads(1)  # the maps are small: threads cost more than they give
    with _bar("exporting") as progress:
        bundle = build_bundle(
            searched,
            image_size,
            read_channels(tasks),
            out,
            num_networks=networks,
            seed=seed,
            progress=progress,
        )
    num_bytes = sum((out / model).stat().st_size for model in bundle.models)
    summary = {
        "bundle": str(out),
        "digest": bundle.digest,
        "operations": sum(entry.is_row for entry in bundle.operations),
        "networks": len(bundle.networks),
        "models": len(bundle.models),
        "bytes": num_bytes,
    }
    if as_json:
        print(json.dumps(summary))
    else:
        print(
            f"{out}: {summary['operations']} operations and {summary['networks']} networks as "
            f"{summary['models']} models, {num_bytes / 1e6:.0f} MB; next: compile for an Edge TPU, "
            f"else measure"
        )


def _check_networks(wanted: int, count: int) -> None:
    """Tell before hours of measuring what `assemble` would tell after them."""
    if wanted == 0:
        warnings.warn("without whole networks no table can be assembled", stacklevel=2)
    elif count < MIN_NETWORKS:
        got = wanted if wanted < MIN_NETWORKS else f"{count} in the whole space"
        raise ValueError(
            f"--networks: a table needs times of at least {MIN_NETWORKS} whole ones, got {got}"
        )


@main.command("compile")
@click.argument("bundle", type=_PATH)
@json_option
@bad_input
def compile_command(bundle: Path, as_json: bool) -> None:
    """Compile BUNDLE for the Edge TPU with edgetpu_compiler; goes on where it was stopped.

    Example: build_latency_table.py compile bundle
    """
    with _bar("compiling") as progress:
        summary = compile_bundle(bundle, progress=progress)
    if as_json:
        print(json.dumps(to_plain(summary)))
    else:
        partly = summary.partly_mapped
        print(
            f"{bundle}: {summary.num_models - len(summary.failures)} of {summary.num_models} "
            f"models compiled by edgetpu_compiler {summary.compiler}; "
            f"{len(partly)} run in part on the host{f' (such as {partly[0]})' if partly else ''}, "
            f"{len(summary.streaming)} stream parameters"
        )
    if summary.failures:
        model, error = next(iter(summary.failures.items()))
        raise RuntimeError(
            f"{len(summary.failures)} models were not compiled, the first is {model}: {error}"
        )


@main.command(
    "measure",
    context_settings={"ignore_unknown_options": True},
    add_help_option=False,  # --help goes to measure.py, which has the options
    short_help="Time the models of BUNDLE on this machine.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def measure_command(arguments: tuple[str, ...]) -> None:
    """Pass the arguments on to `measure.py`."""
    sys.exit(measuring.main(list(arguments)))


@main.command("assemble")
@click.argument("bundle", type=_PATH)
@click.argument("measurements", nargs=-1, required=True, type=_PATH)
@click.option("--out", type=_PATH, required=True, help="CSV to write.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which networks are held out.")
@click.option("--allow-missing", is_flag=True, help="Leave out rows of models that failed.")
@json_option
@bad_input
def assemble_command(
    bundle: Path,
    measurements: tuple[Path, ...],
    out: Path,
    seed: int,
    allow_missing: bool,
    as_json: bool,
) -> None:
    """Make a latency table of MEASUREMENTS of BUNDLE, with its error on networks held out.

    Example: build_latency_table.py assemble bundle measured.jsonl --out cpu_litert_64x128.csv
    """
    assembled = assemble_table(bundle, measurements, seed=seed, allow_missing=allow_missing)
    table = replace(assembled.table, name=out.name)
    write_text(out, table.to_text())
    if as_json:
        print(json.dumps({"table": str(out), **to_plain(assembled.report)}))
    else:
        print(f"{out}: {len(table.rows)} rows\n{assembled.report.text()}")


if __name__ == "__main__":
    main()
