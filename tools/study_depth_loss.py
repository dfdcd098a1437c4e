"""L1 against JAReD: mean and standard deviation over seeds, as in EDNAS table 1.

    python tools/study_depth_loss.py configs/depth_loss_nyuv2.yaml --data DIR --out runs/depth_loss

The base network of the config's space is trained with the config's depth loss and with plain L1,
all else equal, on all training frames but those of the validation split, and scored on the test
split. Seeds are seed, seed + 1, ... (`retrain.num_seeds`). It can be stopped and started again.
"""

import math
import statistics
from pathlib import Path

import click

from oneshot_ednas.benchmark.build import Job, outcomes
from oneshot_ednas.cli.common import bad_input, data_option, out_option, with_data, workers_option
from oneshot_ednas.config import ExperimentConfig, load_config
from oneshot_ednas.run_folder import Experiment
from oneshot_ednas.schema import read_json
from oneshot_ednas.store import write_json, write_text
from oneshot_ednas.tasks import LOWER_IS_BETTER
from oneshot_ednas.training import Metrics
from oneshot_ednas.workers import Workers, open_workers

LOSSES = {"L1": ("tasks.depth.relative_weight=0",), "JAReD": ()}
SHOWN = (("segmentation", "miou"), ("depth", "absolute_error"), ("depth", "relative_error"))


@click.command()
@click.argument("config")
@out_option
@data_option
@workers_option
@bad_input
def main(config: str, out: Path, data: Path | None, workers: str) -> None:
    """Train both losses with every seed and write the table."""
    path = Path(config)
    _check(path, load_config(path))
    configs = {name: with_data(load_config(path, each), data) for name, each in LOSSES.items()}
    with open_workers(workers) as pool:
        found = {
            name: _trainings(Experiment(one, out / name), pool) for name, one in configs.items()
        }
    text = _table(found)
    write_text(out / "depth_loss.md", text)
    write_json(out / "depth_loss.json", found)
    print(text)


def _check(path: Path, config: ExperimentConfig) -> None:
    """Refuse a config of which the two losses, or the figures shown, are not to be had."""
    missing = [task for task in dict(SHOWN) if task not in config.tasks]
    if missing:
        raise ValueError(f"{path}: tasks: expected segmentation and depth, {missing[0]} is missing")
    if config.tasks["depth"].relative_weight == 0:
        raise ValueError(f"{path}: tasks.depth.relative_weight is 0: that is L1; give a weight")


def _trainings(experiment: Experiment, pool: Workers) -> list[Metrics]:
    """Test metrics of every seed; those that a file holds are not trained again."""
    experiment.open(resume=True)
    config, folder = experiment.config, experiment.files.folder
    base, seeds = experiment.space.base_architecture, range(config.retrain.num_seeds)
    paths = {Job(base, config.seed + i): folder / f"seed_{config.seed + i}.json" for i in seeds}
    left = [job for job, path in paths.items() if not path.exists()]
    for job, outcome in outcomes(folder, left, (), pool):
        write_json(paths[job], outcome.test_metrics)
    return [dict(read_json(path)) for path in paths.values()]


def _table(found: dict[str, list[Metrics]]) -> str:
    lines = ["| depth loss | " + " | ".join(f"{m} | sigma %" for _, m in SHOWN) + " |"]
    lines.append("| --- |" + " ---: | ---: |" * len(SHOWN))
    rows: dict[str, list[tuple[float, float]]] = {}
    for name, trainings in found.items():
        rows[name] = []
        for task, metric in SHOWN:
            values = [metrics[task][metric] for metrics in trainings]
            mean = statistics.fmean(values)
            deviation = statistics.stdev(values) if len(values) > 1 else math.nan
            rows[name].append((mean, 100 * deviation / mean))
        cells = " | ".join(f"{mean:.4f} | {sigma:.2f}" for mean, sigma in rows[name])
        lines.append(f"| {name} | {cells} |")
    gains = []
    for (_, metric), one, other in zip(SHOWN, *rows.values(), strict=True):
        sign = -1 if metric in LOWER_IS_BETTER else 1
        better = sign * 100 * (other[0] - one[0]) / one[0]
        gains.append(f"{better:+.1f} | {100 * (one[1] - other[1]) / one[1]:+.1f}")
    lines.append("| % improved | " + " | ".join(gains) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
