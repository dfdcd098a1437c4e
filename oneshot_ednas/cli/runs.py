"""Commands on runs: demo, run, and the stages one by one."""

import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from oneshot_ednas import distributed
from oneshot_ednas.architecture import Architecture
from oneshot_ednas.cli.common import (
    bad_input,
    console,
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
from oneshot_ednas.pipeline import OneShotRun, Run, run_all, run_class
from oneshot_ednas.run_folder import RunFiles
from oneshot_ednas.schema import read_json
from oneshot_ednas.training import choose_device
from oneshot_ednas.workers import open_workers


@main.command()
@click.argument("config")
@out_option
@data_option
@set_option
@uncalibrated_option
@workers_option
@resume_option
@json_option
@bad_input
def run(
    config: str,
    out: Path,
    data: Path | None,
    overrides: tuple[str, ...],
    allow_uncalibrated: bool,
    workers: str,
    resume: bool,
    as_json: bool,
) -> None:
    """Search, derive, retrain, evaluate and report.

    With method: evolution or random in the config, trials take the place of the supernet, as in
    evolve.

    Example: oneshot-ednas run configs/demo.yaml --out runs/demo
    """
    one = _made(config, out, data, with_consent(overrides, is_given=allow_uncalibrated))
    _check_workers(workers)
    with open_workers(workers) as one.workers:
        one.open(resume=resume)
        results = run_all(one)
    if distributed.is_main():
        print_results(results, out, as_json=as_json)


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Run folder.",
)
@resume_option
@json_option
@bad_input
def demo(out: Path, resume: bool, as_json: bool) -> None:
    """The whole pipeline on the embedded data, in minutes, on two CPU cores.

    Example: oneshot-ednas demo --out runs/demo
    """
    one = _start("configs/demo.yaml", out, None, (), resume=resume)
    results = run_all(one)
    if distributed.is_main():
        print_results(results, out, as_json=as_json)


@main.command()
@click.argument("config_or_run")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder, to start from a config.")
@data_option
@set_option
@uncalibrated_option
@resume_option
@json_option
@bad_input
def search(
    config_or_run: str,
    out: Path | None,
    data: Path | None,
    overrides: tuple[str, ...],
    allow_uncalibrated: bool,
    resume: bool,
    as_json: bool,
) -> None:
    """Train the supernet and its architecture parameters.

    Example: oneshot-ednas search configs/demo.yaml --out runs/demo
    """
    overrides = with_consent(overrides, is_given=allow_uncalibrated)
    if Path(config_or_run).is_dir():
        if out is not None or overrides:
            raise ValueError(
                "a run folder keeps its config: --out, --set and --allow-uncalibrated are for a "
                "new run"
            )
        one = _one_shot(reopen(Path(config_or_run), data))
    elif out is None:
        raise ValueError("search from a config needs --out DIR")
    else:
        one = _one_shot(_start(config_or_run, out, data, overrides, resume=resume))
    one.search()
    _print_stage(one, "search", as_json=as_json)


def _stage(name: str, help_text: str) -> None:
    @main.command(name, help=f"{help_text}\n\nExample: oneshot-ednas {name} runs/demo")
    @click.argument("run_folder", type=click.Path(path_type=Path))
    @data_option
    @json_option
    @bad_input
    def command(run_folder: Path, data: Path | None, as_json: bool) -> None:
        one = reopen(run_folder, data)
        if name == "evaluate":
            print_results(one.finish(), run_folder, as_json=as_json)
        else:
            _one_shot(one).derive()
            _print_stage(one, name, as_json=as_json)


_stage("derive", "Find the best architecture inside the latency target, exactly.")
_stage("evaluate", "Score the trained networks on the test split, export, and write the report.")


@main.command("retrain")
@click.argument("run_folder", type=click.Path(path_type=Path))
@data_option
@workers_option
@json_option
@bad_input
def retrain_command(run_folder: Path, data: Path | None, workers: str, as_json: bool) -> None:
    """Train the derived architecture (and the baselines) from scratch.

    Example: oneshot-ednas retrain runs/demo
    """
    one = reopen(run_folder, data)
    _check_workers(workers)
    with open_workers(workers) as one.workers:
        one.retrain()
    _print_stage(one, "retrain", as_json=as_json)


def _start(
    config: str, out: Path, data: Path | None, overrides: tuple[str, ...], *, resume: bool
) -> Run:
    one = _made(config, out, data, overrides)
    one.open(resume=resume)
    return one


def _made(config: str, out: Path, data: Path | None, overrides: tuple[str, ...]) -> Run:
    """The run, checked; its folder is not opened yet."""
    return _joined(with_data(load_config(Path(config), overrides), data), out)


def _joined(config: ExperimentConfig, folder: Path, *, is_reopened: bool = False) -> Run:
    """The run, checked, in each of the processes that torchrun started.

    Raises:
        ValueError: if the run is of a method for one process, besides what is wrong in it.
    """
    if distributed.is_launched() and config.method != "one_shot":
        raise ValueError(
            f"method {config.method} has trials, each in one process: leave out torchrun, and "
            f"give --workers N"
        )
    distributed.start(choose_device(config.device))
    with distributed.main_first():  # it may have to prepare the data
        return run_class(config)(config, folder, is_reopened=is_reopened)


def _check_workers(workers: str) -> None:
    if distributed.is_launched() and workers != "1":
        raise ValueError("--workers and torchrun exclude each other: leave out one of them")


def _one_shot(run: Run) -> OneShotRun:
    """The run, of which stages of a supernet are asked for.

    Raises:
        ValueError: if it has no supernet.
    """
    if not isinstance(run, OneShotRun):
        raise ValueError(
            f"{run.files.folder} is a run of method {run.config.method}, without a supernet; use "
            f"oneshot-ednas evolve"
        )
    return run


def reopen(folder: Path, data: Path | None) -> Run:
    """The run in a folder, to go on with.

    Raises:
        FileNotFoundError: if it is no run folder, or lacks its space or table.
        ValueError: if the data that the run began with has changed, or it trains no networks.
    """
    files = RunFiles(folder)
    if not files.config.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.yaml")
    if (folder / "method.json").is_file():
        raise ValueError(
            f"{folder} is a run of {read_json(folder / 'method.json')}, which its own command goes "
            f"on with: oneshot-ednas branch or share CONFIG --out {folder} --resume; the model of "
            f"a branched EDNAS network is its model.tflite"
        )
    if files.data.is_file() and "benchmark" in read_json(files.data):
        raise ValueError(
            f"{folder} is a search on a benchmark, which trains no networks; see its results.json, "
            f"or go on with oneshot-ednas evolve --benchmark --resume"
        )
    one = _joined(with_data(load_config(files.config), data), folder, is_reopened=True)
    one.open(resume=True)
    return one


def _print_stage(one: Run, name: str, *, as_json: bool) -> None:
    """What a stage before the evaluation has come to."""
    if not distributed.is_main():
        return
    figures: dict[str, Any] = {
        "run": str(one.files.folder),
        "stage": name,
        "target_ms": one.target_ms,
    }
    if name == "search":
        one = _one_shot(one)
        figures["steps"] = one.one_shot.step
        figures["expected_latency_ms"] = float(one.one_shot.expected_latency().detach())
        figures["alarms"] = one.one_shot.alarms()
    elif name == "derive":
        best = read_json(one.files.candidates)["candidates"][0]
        figures["architecture"] = str(Architecture.load(one.files.architecture))
        figures |= {key: best[key] for key in ("latency_ms", "reward", "metrics")}
    elif name == "retrain":
        seeds = range(one.config.retrain.num_seeds)
        figures["networks"] = [f"retrain.seed_{number}" for number in seeds]
        figures["networks"] += [f"baseline.{baseline}" for baseline in one.config.baselines]
    if as_json:
        print(json.dumps(figures))
        return
    table = Table(show_header=False)
    for key, value in figures.items():
        table.add_row(key, _shown(value))
    console().print(table)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(value) or "none"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_shown(item)}" for key, item in value.items())
    return f"{value:.5g}" if isinstance(value, float) else str(value)
