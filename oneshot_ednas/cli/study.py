"""Commands on studies: the tabular benchmark."""

import json
import shlex
import sys
from pathlib import Path

import click

from oneshot_ednas.benchmark.build import Study
from oneshot_ednas.cli.common import (
    bad_input,
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
from oneshot_ednas.run_folder import Experiment
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
    study.benchmark(shlex.join(["oneshot-ednas", *sys.argv[1:]])).save(study.benchmark_path)
    print(json.dumps({"benchmark": str(study.benchmark_path)}) if as_json else study.benchmark_path)
