"""Commands that search what tasks share: branch and share."""

import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from oneshot_ednas.cli.common import (
    DETAILS,
    bad_input,
    console,
    data_option,
    json_option,
    main,
    out_option,
    resume_option,
    set_option,
    uncalibrated_option,
    with_consent,
    with_data,
)
from oneshot_ednas.config import TaskSharingConfig, load_config
from oneshot_ednas.sharing_methods import BranchRun, ShareRun
from oneshot_ednas.sharing_run import SharingRun
from oneshot_ednas.sharing_sweep import sweep


def _command(name: str, run_class: type[SharingRun], help_text: str, example: str) -> None:
    @main.command(name, help=f"{help_text}\n\nExample: {example}")
    @click.argument("config")
    @out_option
    @data_option
    @set_option
    @uncalibrated_option
    @click.option(
        "--lambdas",
        metavar="X,Y,...",
        help="A run for each of these values of lambda, in folders under --out: the weight of the "
        "expected cost (branch, with objective: weighted) or of the regularization (share).",
    )
    @resume_option
    @json_option
    @bad_input
    def command(
        config: str,
        out: Path,
        data: Path | None,
        overrides: tuple[str, ...],
        allow_uncalibrated: bool,
        lambdas: str | None,
        resume: bool,
        as_json: bool,
    ) -> None:
        settings = load_config(
            Path(config),
            with_consent(overrides, is_given=allow_uncalibrated),
            kind=TaskSharingConfig,
        )
        settings = with_data(settings, data)
        if lambdas is not None:
            results = sweep(run_class, settings, out, _numbers(lambdas), resume=resume)
            print_networks(results, out / "sweep.json", as_json=as_json)
            return
        one = run_class(settings, out)
        one.open(resume=resume)
        print_networks(one.run_all(), out / "report.html", as_json=as_json)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--lambdas: expected numbers as 0.02,0.05,0.1; got {text!r}") from None


_command(
    "branch",
    BranchRun,
    "Search where tasks part in the encoder (BMTAS), train the branched network and its baselines "
    "from scratch, and report. With backbone.architecture: search, blocks and branching are "
    "searched together.",
    "oneshot-ednas branch configs/sharing_streets_tiny.yaml --out runs/branch",
)
_command(
    "share",
    ShareRun,
    "Search which operators each task shares, copies or skips (AutoMTL), train the network and its "
    "baselines from scratch, and report.",
    "oneshot-ednas share configs/sharing_streets_tiny.yaml --out runs/share",
)


def print_networks(results: dict[str, Any], written: Path, *, as_json: bool) -> None:
    """The networks of a run as a table, or as one JSON object."""
    if as_json:
        print(json.dumps(results))
        return
    networks = results["networks"]
    target = "" if results["target_ms"] is None else f", target {results['target_ms']:g} ms"
    table = Table(title=f"test split, {results['backbone']}{target}")
    for column in (
        "network",
        f"gain over {results['baseline']}",
        "params",
        "shared",
        "GMACs",
        "ms",
    ):
        table.add_column(column, justify="left" if column == "network" else "right")
    first = next(iter(networks.values()))
    columns = [(task, name) for task, values in first["metrics"].items() for name in values]
    shown = [column for column in columns if column[1] not in DETAILS]
    for task, name in shown:
        table.add_column(f"{task}\n{name}", justify="right")
    for name, row in networks.items():
        table.add_row(
            name,
            "" if row["delta"] is None else f"{row['delta']['overall']:+.2f} %",
            f"{row['parameters'] / 1e6:.3f} M",
            f"{row['shared_parameters']:.0%}",
            f"{row['gmacs']:.4f}",
            "" if row["latency_ms"] is None else f"{row['latency_ms']:.3f}",
            *(f"{row['metrics'][task][metric]:.3f}" for task, metric in shown),
        )
    console().print(table)
    print(f"{results['found']}: {networks[results['found']]['what']}")
    seconds = sum(results["seconds"].values())
    print(f"{seconds:.0f} s without export and report; {written.stem}: {written}")
