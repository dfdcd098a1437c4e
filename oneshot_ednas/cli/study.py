"""Commands on studies: the tabular benchmark, and rank correlation."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import click
from rich.table import Table

from oneshot_ednas.benchmark.build import Study, given_by
from oneshot_ednas.benchmark.table import Benchmark
from oneshot_ednas.cli.common import (
    bad_input,
    console,
    data_option,
    json_option,
    main,
    out_option,
    resume_option,
    set_option,
    with_data,
    workers_option,
)
from oneshot_ednas.config import load_config
from oneshot_ednas.rank_study import (
    correlation_rows,
    open_search,
    rank_results,
    supernet_scores,
    write_rank,
)
from oneshot_ednas.run_folder import Experiment, RunFiles
from oneshot_ednas.schema import find_file
from oneshot_ednas.training import note
from oneshot_ednas.workers import open_workers


@main.command()
@click.argument("config")
@out_option
@data_option
@set_option
@workers_option
@resume_option
@json_option
@bad_input
def benchmark(
    config: str,
    out: Path,
    data: Path | None,
    overrides: tuple[str, ...],
    workers: str,
    resume: bool,
    as_json: bool,
) -> None:
    """Train stratified architectures stand-alone and keep the results as a tabular benchmark.

    Example: oneshot-ednas benchmark configs/benchmark_streets_tiny.yaml --out runs/benchmark
    """
    experiment = Experiment(with_data(load_config(Path(config), overrides), data), out)
    with open_workers(workers) as pool:
        experiment.open(resume=resume)
        study = Study(experiment)
        study.run(pool)
    study.benchmark(_command("benchmark", config, overrides)).save(study.benchmark_path)
    print(json.dumps({"benchmark": str(study.benchmark_path)}) if as_json else study.benchmark_path)


@main.command()
@click.argument("config")
@click.option(
    "--run",
    "run_folder",
    type=click.Path(path_type=Path),
    required=True,
    help="Run folder of a search; only read.",
)
@out_option
@click.option(
    "--benchmark",
    "benchmark_file",
    type=click.Path(path_type=Path),
    help="Benchmark file with stand-alone trainings that need not be done again.",
)
@data_option
@set_option
@workers_option
@resume_option
@json_option
@bad_input
def rank(
    config: str,
    run_folder: Path,
    out: Path,
    benchmark_file: Path | None,
    data: Path | None,
    overrides: tuple[str, ...],
    workers: str,
    resume: bool,
    as_json: bool,
) -> None:
    """Compare how a supernet ranks architectures with how stand-alone training ranks them.

    Example: oneshot-ednas rank configs/benchmark_streets_tiny.yaml --run runs/search --out
    runs/rank --benchmark runs/benchmark/benchmark.json
    """
    experiment = Experiment(with_data(load_config(Path(config), overrides), data), out)
    given, given_made = {}, {}
    if benchmark_file is not None:
        known = Benchmark.load(find_file(benchmark_file))
        given, given_made = given_by(known, experiment), known.made
    search = open_search(experiment, run_folder)
    with open_workers(workers) as pool:
        experiment.open(resume=resume)
        study = Study(experiment, given, given_made)
        if benchmark_file is not None:
            count = sum(job in given for job in study.jobs)
            note(f"rank: {count} of {len(study.jobs)} trainings are given by {benchmark_file}")
        study.run(pool)
    trained = study.benchmark(_command("rank", config, overrides))
    trained.save(study.benchmark_path)  # so that a next supernet needs no training
    scores = supernet_scores(
        search,
        experiment,
        [entry.architecture for entry in trained.entries],
        checkpoint=RunFiles(run_folder).checkpoint("search"),
    )
    results = rank_results(
        trained,
        scores,
        experiment,
        scored={
            "run": str(run_folder),
            "search_step": search.step,
            "search_steps": search.config.steps,
            "benchmark": None if benchmark_file is None else benchmark_file.name,
        },
    )
    write_rank(results, out)
    if as_json:
        print(json.dumps(results))
        return
    header, *rows = correlation_rows(results)
    table = Table(*header, title=f"{len(trained.entries)} architectures, 95 % intervals")
    for row in rows:
        table.add_row(*row)
    console().print(table)
    print(f"search step {search.step} of {search.config.steps}; more in {out / 'rank.md'}")


def _command(name: str, config: str, overrides: Sequence[str]) -> str:
    """The command for a file that others read: without the folders of this machine."""
    words = ["oneshot-ednas", name, Path(config).name if Path(config).is_absolute() else config]
    for override in overrides:
        key, _, value = override.partition("=")
        words += ["--set", f"{key}={Path(value).name if Path(value).is_absolute() else value}"]
    return shlex.join(words)
