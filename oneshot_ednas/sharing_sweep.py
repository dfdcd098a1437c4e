"""A run per lambda, and gain against cost side by side."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from oneshot_ednas.config import TaskSharingConfig
from oneshot_ednas.report.sharing_curves import tradeoff_plot
from oneshot_ednas.sharing_methods import BranchRun, ShareRun
from oneshot_ednas.sharing_run import SharingRun
from oneshot_ednas.store import write_bytes, write_json


def sweep(
    run_class: type[SharingRun],
    config: TaskSharingConfig,
    folder: Path,
    lambdas: Sequence[float],
    *,
    resume: bool,
) -> dict[str, Any]:
    """A run for each lambda, in a folder of its own, and what they found side by side.

    The first trains the baselines for all. Writes `sweep.json` and `sweep.png`.

    Args:
        run_class: the method.
        config: the config, of which lambda is replaced: `branching.resource_weight`, with the
            objective `weighted`, or `operators.regularization`.
        folder: holds the runs' folders.
        lambdas: the values.
        resume: go on with runs that are there.

    Returns:
        As of `SharingRun.evaluate`, with each run's found network under the name of its lambda.

    Raises:
        ValueError: for a lambda out of range, or given twice; all are checked before the first run.
    """
    if len({f"{value:g}" for value in lambdas}) != len(lambdas) or not lambdas:
        raise ValueError(f"--lambdas: expected different values, got {list(lambdas)}")
    runs = {}
    for number, value in enumerate(lambdas):
        one = _with_lambda(run_class, config, value)
        if number:
            one = replace(one, baselines=())
        runs[f"lambda {value:g}"] = run_class(one, folder / f"lambda_{value:g}")
    for run in runs.values():
        run.open(resume=resume)
    merged: dict[str, Any] = {}
    seconds = dict[str, float]()
    for name, run in runs.items():
        results = run.run_all()
        seconds |= {f"{name}.{stage}": spent for stage, spent in results["seconds"].items()}
        row = results["networks"].pop(run.found)
        merged = merged or {**results, "found": name, "baseline": name}
        merged["networks"][name] = row
    merged["seconds"] = seconds
    if "separate" in merged["networks"]:
        merged["baseline"] = "separate"
    next(iter(runs.values())).set_gains(merged["networks"])
    write_json(folder / "sweep.json", merged)
    plot = tradeoff_plot(merged["networks"], baseline=merged["baseline"])
    write_bytes(folder / "sweep.png", plot)
    return merged


def _with_lambda(
    run_class: type[SharingRun], config: TaskSharingConfig, value: float
) -> TaskSharingConfig:
    if run_class is BranchRun and config.branching is not None:
        branching = replace(config.branching, objective="weighted", resource_weight=value)
        return replace(config, branching=branching)
    if run_class is ShareRun and config.operators is not None:
        return replace(config, operators=replace(config.operators, regularization=value))
    return config  # the run says which section it lacks
