"""The command that tries whether a run goes on exactly after a kill."""

import json
from pathlib import Path

import click
from rich.table import Table

from oneshot_ednas.cli.common import bad_input, console, data_option, json_option, main
from oneshot_ednas.schema import to_plain
from oneshot_ednas.verify_resume import StageCheck
from oneshot_ednas.verify_resume import verify_resume as verify


@main.command("verify-resume")
@click.argument("run_folder", type=click.Path(path_type=Path))
@click.option("--steps", default=20, show_default=True, help="Steps to take.")
@click.option("--kills", default=3, show_default=True, help="How often to kill.")
@click.option("--seed", default=0, show_default=True, help="Of the moments of the kills.")
@data_option
@json_option
@bad_input
def verify_resume(
    run_folder: Path, steps: int, kills: int, seed: int, data: Path | None, as_json: bool
) -> None:
    """Try whether a run goes on exactly after SIGKILL, on a copy of it.

    Takes some steps of the search and of the newest retraining twice: without a stop, and killed
    at random moments and resumed. Exit status 1 if anything differs in the end.

    Example: oneshot-ednas verify-resume runs/demo
    """
    checks = verify(run_folder, num_steps=steps, num_kills=kills, seed=seed, data=data)
    if as_json:
        print(json.dumps({"run": str(run_folder), "stages": [to_plain(check) for check in checks]}))
    else:
        for check in checks:
            _print(check)
    for check in checks:
        if check.difference:
            raise RuntimeError(
                f"{check.stage} does not end as without kills: {check.difference}; {check.cause}"
            )
    if not as_json:
        print(f"all {sum(len(check.parts) for check in checks)} parts are equal")


def _print(check: StageCheck) -> None:
    kills = ", ".join(map(str, check.kills)) or "none"
    title = f"{check.stage}: steps {check.first_step} to {check.last_step}, killed at {kills}"
    table = Table(title=title)
    for column in ("part", "equal", "SHA-256", "difference"):
        table.add_column(column)
    for part in check.parts:
        is_equal = part.difference is None
        shown = part.uninterrupted[:16]
        table.add_row(
            part.name,
            "yes" if is_equal else "no",
            shown if is_equal else f"{shown} / {part.killed[:16]}",
            part.difference or "",
        )
    console().print(table)
