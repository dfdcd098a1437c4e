"""The command describe: figures of a network or a space."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.cli.common import (
    DEFAULT_TASKS,
    bad_input,
    console,
    json_option,
    main,
    read_channels,
)
from oneshot_ednas.config import load_config
from oneshot_ednas.describe import describe_network, describe_space
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.schema import find_file, read_text
from oneshot_ednas.space import SearchSpace, named_space
from oneshot_ednas.tasks import make_tasks

DEFAULT_IMAGE_SIZE = (256, 256)


@main.command()
@click.argument("what")
@click.option("--space", help="Search space of an architecture JSON, if not the one it names.")
@click.option("--tasks", help="Output channels per task, as segmentation=19,depth=1.")
@click.option("--image-size", nargs=2, type=int, metavar="H W", help="Size of the image.")
@click.option("--table", "table_path", help="Latency table; without one there are no latencies.")
@json_option
@bad_input
def describe(
    what: str,
    space: str | None,
    tasks: str | None,
    image_size: tuple[int, int] | None,
    table_path: str | None,
    as_json: bool,
) -> None:
    """Parameters, multiply-adds and latency, one row per block.

    WHAT is an architecture JSON, an experiment config, a run folder, a search space YAML, or the
    name of a shipped space; of a config or space, the base network is described.

    Example: oneshot-ednas describe ednas_b0 --tasks segmentation=19,depth=1
    --table latency_tables/edgetpu_sim_256x256.csv
    """
    subject = _subject(what, space)
    channels = (
        read_channels(tasks) if tasks else subject.out_channels or read_channels(DEFAULT_TASKS)
    )
    table = LatencyTable.load(find_file(table_path)) if table_path else subject.table
    size = image_size or subject.image_size or (table.image_size if table else DEFAULT_IMAGE_SIZE)
    figures = describe_network(
        subject.space, subject.architecture, out_channels=channels, image_size=size, table=table
    )
    if subject.is_space:
        figures |= describe_space(subject.space, out_channels=channels, table=table)
    if as_json:
        print(json.dumps(figures))
    else:
        _print_description(figures)


class _Subject:
    """What `describe` was pointed at."""

    def __init__(self, space: SearchSpace, architecture: Architecture | None = None) -> None:
        self.space = space
        self.is_space = architecture is None
        self.architecture = architecture or space.base_architecture
        self.out_channels: dict[str, int] | None = None
        self.image_size: tuple[int, int] | None = None
        self.table: LatencyTable | None = None


def _subject(what: str, space: str | None) -> _Subject:
    path = Path(what)
    if path.is_dir():
        subject = _config_subject(path / "config.yaml")
        subject.space = SearchSpace.load(path / "space.yaml")
        found = path / "architecture.json"
        if found.exists():
            subject.architecture, subject.is_space = Architecture.load(found), False
        return subject
    if path.suffix == ".json":
        architecture = Architecture.load(find_file(path))
        if not (space or architecture.space):
            raise ValueError(f"{what}: names no search space; give it with --space")
        return _Subject(named_space(space or architecture.space), architecture)
    if space:
        raise ValueError(f"--space is for an architecture JSON, {what} has its own")
    if path.suffix in (".yaml", ".yml"):
        path = find_file(path)
        if "\nblocks:" in "\n" + read_text(path):
            return _Subject(SearchSpace.load(path))
        return _config_subject(path)
    return _Subject(named_space(what))


def _config_subject(path: Path) -> _Subject:
    config = load_config(path)
    subject = _Subject(named_space(config.space))
    tasks = make_tasks(config.tasks)
    subject.out_channels = {name: task.out_channels for name, task in tasks.items()}
    subject.image_size = config.data.image_size
    subject.table = LatencyTable.load(find_file(config.latency.table, beside=path.parent))
    return subject


def _print_description(figures: Mapping[str, Any]) -> None:
    height, width = figures["image_size"]
    tasks = ", ".join(f"{name}={count}" for name, count in figures["out_channels"].items())
    table = Table(title=f"{figures['space']}, {height}x{width}, {tasks}")
    for column in ("part", "layer", "stride", "kernel", "filters", "expansion"):
        table.add_column(column, justify="left" if column in ("part", "layer") else "right")
    for column in ("params", "MMACs", "ms"):
        table.add_column(column, justify="right")
    names = {"ibn": "IBN", "fused_ibn": "FusedIBN"}
    for row in figures["rows"]:
        cells = [row.get(key) for key in ("stride", "kernel_size", "filters", "expand_ratio")]
        table.add_row(
            row["name"],
            names.get(row.get("op", ""), ""),
            *("" if cell is None else str(cell) for cell in cells),
            f"{row['parameters']:,}",
            f"{row['gmacs'] * 1e3:.2f}",
            "" if row["latency_ms"] is None else f"{row['latency_ms']:.4f}",
        )
    console().print(table)
    print(
        f"parameters {figures['parameters'] / 1e6:.2f} M   multiply-adds "
        f"{figures['gmacs']:.3f} G   GFLOPs {figures['gflops']:.2f}"
    )
    if figures["latency_ms"] is not None:
        print(f"latency {figures['latency_ms']:.3f} ms (with transfers and streaming)")
    if "num_architectures" in figures:
        print(f"architectures in the space: {figures['num_architectures']}")
        if figures["min_latency_ms"] is not None:
            print(
                f"latency over the space: {figures['min_latency_ms']:.3f} to "
                f"{figures['max_latency_ms']:.3f} ms"
            )
