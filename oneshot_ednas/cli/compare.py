"""The command that compares runs."""

import json
from pathlib import Path

import click
from rich.table import Table

from oneshot_ednas.cli.common import bad_input, console, json_option, main
from oneshot_ednas.comparison.page import compare_runs, to_json
from oneshot_ednas.comparison.tables import DIFFERENCE_HEAD, difference_rows, result_rows, verdict
from oneshot_ednas.training import note


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for the comparison."
)
@click.option(
    "--baseline", metavar="METHOD", help="What gains are relative to.  [default: base, if trained]"
)
@json_option
@bad_input
def compare(runs: tuple[Path, ...], out: Path, baseline: str | None, as_json: bool) -> None:
    """Compare methods over the seeds of finished runs: tables, plots, one HTML page.

    Example: oneshot-ednas compare runs/one_shot_* runs/evolution_* --out runs/comparison
    """
    found = compare_runs(runs, out, baseline=baseline)
    for text in found.notes:
        note(f"compare: warning: {text}")
    if as_json:
        print(json.dumps(to_json(found)))
        return
    predicted = ", predicted by the benchmark" if found.is_predicted else ""
    methods = Table(title=f"test split{predicted}, target {found.target_ms:g} ms")
    for label in ["", *(method.label for method in found.methods)]:
        methods.add_column(label, justify="right" if label else "left")
    for row in result_rows(found):
        methods.add_row(*row)
    console().print(methods)
    if found.differences:
        differences = Table()
        for label in DIFFERENCE_HEAD:
            differences.add_column(label)
        for row in difference_rows(found):
            differences.add_row(*row)
        console().print(differences)
    print(verdict(found))
    print(f"comparison: {out / 'comparison.html'}")
