"""The command that measures what a search costs."""

import json
from pathlib import Path

import click
import torch
from rich.table import Table

from oneshot_ednas.cli.common import bad_input, console, json_option, main
from oneshot_ednas.performance.page import COLUMNS, table_cells, update_page
from oneshot_ednas.performance.plan import Plan, Row
from oneshot_ednas.performance.profiling import profile_tables
from oneshot_ednas.performance.run import MEASUREMENTS, environment, measure
from oneshot_ednas.performance.shares import finished_run
from oneshot_ednas.store import write_json
from oneshot_ednas.training import choose_device, note


@main.command()
@click.option("--only", multiple=True, metavar="NAME", help=f"Some of {', '.join(MEASUREMENTS)}.")
@click.option("--repeats", type=click.IntRange(min=1), help="Rounds that count; 3, quick 1.")
@click.option("--quick", is_flag=True, help="Small sizes: to see that it runs, not to judge.")
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.json", help="JSON to write.")
@click.option("--page", type=click.Path(path_type=Path), help="Page whose table to replace.")
@click.option(
    "--run",
    "run_folder",
    type=click.Path(path_type=Path),
    help="A finished run, whose search is held against its retraining.",
)
@click.option("--profile", "is_profile", is_flag=True, help="Profile steps instead.")
@json_option
@bad_input
def bench(
    only: tuple[str, ...],
    repeats: int | None,
    quick: bool,
    device: str,
    threads: int,
    out: Path | None,
    page: Path | None,
    run_folder: Path | None,
    is_profile: bool,
    as_json: bool,
) -> None:
    """Measure what the steps of a search cost, side by side, as ratios with bounds.

    Each ratio comes from interleaved repeats in this one process. A bound that does not hold is
    a finding, not a failure: the exit status is 0.

    Example: oneshot-ednas bench --only supernet_step --out bench.json
    """
    chosen, before = choose_device(device), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plan = Plan.quick(chosen) if quick else Plan.full(chosen)
        plan = plan if repeats is None else plan.repeated(repeats)
        if is_profile:
            if only or page is not None:
                raise ValueError("--profile measures nothing: leave out --only and --page")
            _print_profiles(plan, out, as_json=as_json)
            return
        # First, since a folder that is no run is told before the measurements' minutes.
        rows = [] if run_folder is None else finished_run(run_folder)
        rows += measure(plan, only, _show_progress)
    finally:
        torch.set_num_threads(before)
    results = {
        "command": _command(),
        "environment": environment(chosen) | {"threads": threads},
        "rows": [row.to_json() for row in rows],
    }
    if out is not None:
        write_json(out, results)
    if page is not None:
        update_page(page, results)
    if as_json:
        print(json.dumps(results))
        return
    table = Table(title="what a search costs")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("name", "what") else "right")
    for row in rows:
        table.add_row(*table_cells(row.to_json()))
    console().print(table)


def _print_profiles(plan: Plan, out: Path | None, *, as_json: bool) -> None:
    tables: dict[str, str] = {}
    for workload in plan.profiled:
        tables |= profile_tables(workload)
    if out is not None:
        write_json(out, tables)
    if as_json:
        print(json.dumps(tables))
        return
    for name, text in tables.items():
        print(f"{name}\n{text}")


def _show_progress(row: Row) -> None:
    note(f"bench: {' '.join(cell for cell in table_cells(row.to_json()) if cell)}")


def _command() -> str:
    context = click.get_current_context()
    given = []
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if value in (None, False, ()) or value == option.get_default(context):
            continue
        for one in value if isinstance(value, tuple) else (value,):
            given.append(option.opts[0] if one is True else f"{option.opts[0]} {one}")
    return " ".join(["oneshot-ednas bench", *given])
