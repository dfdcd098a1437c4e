"""Train what searches found, all in the same way and with fresh seeds, and compare the methods.

    python tools/retrain_picks.py configs/benchmark_streets_tiny.yaml RUN... --out runs/picks

Each run folder gives its `architecture.json`, its method and its seed; the base network of the
space stands beside them. All are trained as the config's trials are (`multi_trial.steps` steps, on
all training frames but those of the validation split) with seeds that no search has seen, and
scored on the test split. So searches on a benchmark, which train nothing, stand beside searches
that do. It can be stopped and started again.
"""

import statistics
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import click

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.benchmark.build import Job, outcomes
from oneshot_ednas.cli.common import bad_input, data_option, out_option, with_data, workers_option
from oneshot_ednas.comparison.bootstrap import difference
from oneshot_ednas.config import load_config
from oneshot_ednas.run_folder import Experiment, RunFiles
from oneshot_ednas.store import append_json_line, read_json_lines, write_json, write_text
from oneshot_ednas.training import Metrics, accuracy_of, progress_bar
from oneshot_ednas.workers import Workers, open_workers

FIRST_SEED = 1000
"""Of the trainings here; searches count theirs from the seed of the config."""


class Pick(NamedTuple):
    """What one search found."""

    method: str
    seed: int
    architecture: Architecture


@click.command()
@click.argument("config")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@out_option
@data_option
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1))
@workers_option
@bad_input
def main(
    config: str, runs: tuple[Path, ...], out: Path, data: Path | None, seeds: int, workers: str
) -> None:
    """Train the picks of the runs and write the table."""
    with open_workers(workers) as pool:
        experiment = Experiment(with_data(load_config(Path(config)), data), out)
        picks = [_pick(folder, experiment) for folder in runs]
        picks.append(Pick("base", 0, experiment.space.base_architecture))
        experiment.open(resume=True)
        metrics = _trainings(experiment, picks, seeds, pool)
    rows = [_row(experiment, pick, metrics, seeds) for pick in picks]
    text = _table(rows)
    write_json(out / "picks.json", rows)
    write_text(out / "picks.md", text)
    print(text)


def _pick(folder: Path, experiment: Experiment) -> Pick:
    files = RunFiles(folder)
    for path in (files.config, files.architecture):
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} is no run that found an architecture: no {path.name}"
            )
    config = load_config(files.config)
    architecture = Architecture.load(files.architecture)
    experiment.space.check(architecture)
    return Pick(config.method, config.seed, architecture)


def _trainings(
    experiment: Experiment, picks: list[Pick], seeds: int, pool: Workers
) -> dict[Job, Metrics]:
    """Test metrics of each architecture and seed; those that the file holds are not made again."""
    path = experiment.files.folder / "picks.jsonl"

    def read(row: dict[str, Any]) -> tuple[Job, Metrics]:
        return Job(Architecture.from_short(row["architecture"]), row["seed"]), row["metrics"]

    found = dict(read_json_lines(path, read))
    jobs = [Job(pick.architecture, FIRST_SEED + i) for pick in picks for i in range(seeds)]
    left = [job for job in dict.fromkeys(jobs) if job not in found]
    with progress_bar("trainings", len(left)) as advance:
        for job, outcome in outcomes(experiment.files.folder, left, (), pool):
            assert outcome.test_metrics is not None
            found[job] = outcome.test_metrics
            row = {"architecture": str(job.architecture), "seed": job.seed}
            append_json_line(path, row | {"metrics": outcome.test_metrics})
            advance()
    return found


def _row(
    experiment: Experiment, pick: Pick, metrics: Mapping[Job, Metrics], seeds: int
) -> dict[str, Any]:
    scores = [metrics[Job(pick.architecture, FIRST_SEED + i)] for i in range(seeds)]
    accuracies = [accuracy_of(experiment.tasks, one) for one in scores]
    latency_ms = experiment.costs.latency_ms(pick.architecture)
    return {
        "method": pick.method,
        "seed": pick.seed,
        "architecture": str(pick.architecture),
        "latency_ms": latency_ms,
        "gmacs": experiment.macs(pick.architecture) / 1e9,
        "accuracy_per_seed": accuracies,
        "reward_per_seed": [experiment.reward(pick.architecture, one) for one in scores],
        "metrics": scores,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| method | seed | latency ms | MMACs | accuracy product | reward | architecture |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    rewards: dict[str, list[list[float]]] = {}
    for row in rows:
        rewards.setdefault(row["method"], []).append(row["reward_per_seed"])
        lines.append(
            f"| {row['method']} | {row['seed']} | {row['latency_ms']:.4f} "
            f"| {1e3 * row['gmacs']:.1f} | {_spread(row['accuracy_per_seed'])} "
            f"| {_spread(row['reward_per_seed'])} | `{row['architecture']}` |"
        )
    lines += ["", "| difference in reward | value | 95 % interval |", "| --- | ---: | ---: |"]
    for one, other in combinations(rewards, 2):
        found = difference(one, other, (rewards[one], rewards[other]))
        interval = "none: one run" if found.low is None else f"{found.low:+.4f}..{found.high:+.4f}"
        lines.append(f"| {one} - {other} | {found.value:+.4f} | {interval} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    main()
