"""Commands on latency: check the simulator, make a table."""

import json
from pathlib import Path

import click
from rich.table import Table

from oneshot_ednas.cli.common import (
    DEFAULT_TASKS,
    bad_input,
    console,
    json_option,
    main,
    read_channels,
)
from oneshot_ednas.latency.published import score_networks
from oneshot_ednas.latency.simulate import simulate_table
from oneshot_ednas.space import named_space
from oneshot_ednas.store import write_text

HEAD_CHANNELS = 64
"""Simulated tables hold classifier rows for 1 to this many output channels."""


@main.group()
def latency() -> None:
    """Latency tables and the Edge TPU simulator."""


@latency.command("check")
@click.argument("networks_json", type=click.Path(path_type=Path))
@json_option
@bad_input
def latency_check(networks_json: Path, as_json: bool) -> None:
    """Score the simulator on published measurements.

    Example: oneshot-ednas latency check networks.json --json
    """
    scores = score_networks(networks_json)
    if as_json:
        print(json.dumps(scores))
        return
    table = Table(title=f"simulator against {networks_json.name}, errors in percent")
    for column in ("group", "n", "MAPE", "median", "max", "Spearman", "left out: MAPE", "Spearman"):
        table.add_column(column, justify="left" if column == "group" else "right")
    left_out = scores["leave_one_out"]
    rows = {"all": (scores["all"], left_out.get("all"))}
    for name, row in scores["groups"].items():
        rows[name] = (row, left_out.get("groups", {}).get(name))
    for name, (row, left) in rows.items():
        cells = [f"{row[key]:.1f}" for key in ("mape", "median_ape", "max_ape")]
        table.add_row(
            name,
            str(row["n"]),
            *cells,
            _number(row["spearman"], 3),
            _number(left and left["mape"], 1),
            _number(left and left["spearman"], 3),
        )
    console().print(table)
    print("left out: each network predicted by constants fitted without it (stored with the fit)")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


@latency.command("table")
@click.argument("space")
@click.option("--image-size", nargs=2, type=int, required=True, metavar="H W")
@click.option("--host", default="usb3-desktop", show_default=True, help="Host and bus.")
@click.option("--clock-mhz", type=int, default=500, show_default=True)
@click.option("--tasks", default=DEFAULT_TASKS, show_default=True, help="Assumed outputs.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="CSV to write.")
@json_option
@bad_input
def latency_table(
    space: str,
    image_size: tuple[int, int],
    host: str,
    clock_mhz: int,
    tasks: str,
    out: Path,
    as_json: bool,
) -> None:
    """Simulate a latency table for every operation of a search space.

    Example: oneshot-ednas latency table ednas_b0 --image-size 256 256 --host usb3-desktop
    --out edgetpu_sim_256x256.csv
    """
    if min(image_size) < 16:
        raise ValueError(f"--image-size: expected at least 16 16, got {image_size}")
    table = simulate_table(
        named_space(space),
        image_size,
        read_channels(tasks),
        head_channels=range(1, HEAD_CHANNELS + 1),
        host=host,
        clock_mhz=clock_mhz,
    )
    write_text(out, table.to_text())
    if as_json:
        print(json.dumps({"table": str(out), "operations": len(table.rows)}))
        return
    print(f"{out}: {len(table.rows)} operations, simulated for {host} at {clock_mhz} MHz")
    if table.header.held_out_mape is None:
        note = table.header.held_out_note
        print(f"error {note}; a search takes this table with --allow-uncalibrated only")
