"""Command on multi-trial searches: evolve."""

from dataclasses import replace
from pathlib import Path

import click

from oneshot_ednas.cli.common import (
    bad_input,
    data_option,
    json_option,
    main,
    out_option,
    print_results,
    resume_option,
    set_option,
    uncalibrated_option,
    with_consent,
    with_data,
    workers_option,
)
from oneshot_ednas.config import ExperimentConfig, load_config
from oneshot_ednas.multi_trial.benchmark_run import BenchmarkSearch
from oneshot_ednas.pipeline import MultiTrialRun, run_all
from oneshot_ednas.schema import find_file
from oneshot_ednas.workers import open_workers


@main.command()
@click.argument("config")
@out_option
@click.option(
    "--algorithm",
    type=click.Choice(["evolution", "random"]),
    help="Regularized evolution or uniform draws  [default: method of the config, or evolution]",
)
@click.option(
    "--benchmark",
    type=click.Path(path_type=Path),
    help="Take the outcome of trials from this benchmark instead of training.",
)
@data_option
@set_option
@uncalibrated_option
@workers_option
@resume_option
@json_option
@bad_input
def evolve(
    config: str,
    out: Path,
    algorithm: str | None,
    benchmark: Path | None,
    data: Path | None,
    overrides: tuple[str, ...],
    allow_uncalibrated: bool,
    workers: str,
    resume: bool,
    as_json: bool,
) -> None:
    """Find an architecture by trials, each trained and scored, then retrain and evaluate it.

    Example: oneshot-ednas evolve configs/demo.yaml --out runs/evolution --workers 2
    --set multi_trial.num_trials=20 --set multi_trial.steps=200
    """
    overrides = with_consent(overrides, is_given=allow_uncalibrated)
    settings = _with_method(load_config(Path(config), overrides), algorithm)
    if benchmark is not None:
        if workers != "1" or data is not None:
            raise ValueError("--benchmark trains nothing: leave out --workers and --data")
        search = BenchmarkSearch(settings, out, find_file(benchmark))
        search.open(resume=resume)
        results = search.run()
    else:
        one = MultiTrialRun(with_data(settings, data), out)
        with open_workers(workers) as one.workers:
            one.open(resume=resume)
            results = run_all(one)
    print_results(results, out, as_json=as_json)


def _with_method(config: ExperimentConfig, algorithm: str | None) -> ExperimentConfig:
    if algorithm == "random":
        return replace(config, method="random")
    if algorithm == "evolution" or config.method == "one_shot":
        return replace(config, method="evolution")
    return config
