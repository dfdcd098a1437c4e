"""Networks of finished runs of one study of task sharing, side by side, as a Markdown table.

    python tools/tabulate_sharing.py runs/sharing/streets_*

Takes runs of `branch`, `share` and `run` on the same frames; gains are over the network `separate`
of the same seed. Where there are several seeds, figures are means, with the standard deviation of
the gain.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from oneshot_ednas.config import ExperimentConfig, TaskSharingConfig
from oneshot_ednas.report.markup import markdown_table
from oneshot_ednas.reward import deltas
from oneshot_ednas.schema import load_yaml, read_json
from oneshot_ednas.tasks import Task, lower_is_better, make_tasks

NAMES = {
    "separate": "single-task networks",
    "shared": "shared encoder",
    "vanilla": "vanilla branching",
    "random": "random branching",
    "permuted": "the found tree, tasks permuted",
    "branched": "branching search (BMTAS)",
    "operators": "operator sharing (AutoMTL)",
    "ednas": "EDNAS, unbranched",
    "joint": "blocks and branching",
}
"""The rows, in this order."""

Row = dict[str, Any]


def main() -> None:
    """Read the runs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished run folders")
    arguments = parser.parse_args()
    try:
        print(table(arguments.runs))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def table(folders: list[Path]) -> str:
    """The table of some runs.

    Raises:
        FileNotFoundError: if a run is not finished.
        ValueError: if the runs are of different frames or tasks, or a seed has no `separate`.
    """
    rows, tasks = defaultdict[str, dict[int, Row]](dict), dict[str, Task]()
    digests: dict[str, str] = {}
    for folder in folders:
        held = read_json(folder / "data.json")
        if digests and held != digests:
            raise ValueError(f"{folder} is on other frames than {folders[0]}; compare within one")
        digests = held
        results = read_json(folder / "results.json")
        tasks, found = _networks(folder, results)
        for name, row in found.items():
            if results["seed"] in rows[name] and name not in ("separate", "shared"):
                raise ValueError(
                    f"{folder} has a second network {name} of seed {results['seed']}; give one run "
                    f"of a kind and seed"
                )
            rows[name].setdefault(results["seed"], row)
    if "separate" not in rows:
        raise ValueError("none of the runs has the network separate; run branch with that baseline")
    errors, names = lower_is_better(tasks), {n: list(t.reward_metrics) for n, t in tasks.items()}
    columns = [(task, metrics[0]) for task, metrics in names.items()]
    lines = []
    for name, label in NAMES.items():
        if name not in rows:
            continue
        gains = []
        for seed, row in rows[name].items():
            if seed not in rows["separate"]:
                raise ValueError(f"seed {seed} has no network separate; run branch with that seed")
            base = rows["separate"][seed]["metrics"]
            counted = {t: [n for n in names[t] if base[t][n] > 0] for t in names}
            gain = deltas(row["metrics"], base, names=counted, lower_is_better=errors)
            gains.append([gain.overall, *gain.tasks.values()])
        mean = [statistics.fmean(column) for column in zip(*gains, strict=True)]
        held_rows = list(rows[name].values())
        lines.append(
            [
                label,
                _with_spread(mean[0], [gain[0] for gain in gains]),
                *(f"{value:+.1f}" for value in mean[1:]),
                *(
                    f"{statistics.fmean(row['metrics'][task][metric] for row in held_rows):.3f}"
                    for task, metric in columns
                ),
                f"{_mean(held_rows, 'parameters') / 1e6:.3f}",
                f"{1e3 * _mean(held_rows, 'gmacs'):.2f}",
                ""
                if held_rows[0]["latency_ms"] is None
                else f"{_mean(held_rows, 'latency_ms'):.2f}",
                "" if not held_rows[0]["search"] else f"{_mean(held_rows, 'search'):.0f}",
            ]
        )
    head = [
        "network",
        "gain %",
        *(f"{task} %" for task in tasks),
        *(f"{task} {metric.replace('_', ' ')}" for task, metric in columns),
        "params M",
        "MMACs",
        "ms",
        "search s",
    ]
    return markdown_table(head, lines)


def _networks(folder: Path, results: Row) -> tuple[dict[str, Task], dict[str, Row]]:
    """Tasks and networks of a run; permuted ones are averaged."""
    if results["method"] in ("one_shot", "evolution", "random"):
        config = load_yaml(folder / "config.yaml", ExperimentConfig)
        seconds = results["cost"]["search_seconds"]
        return make_tasks(config.tasks), {"ednas": {**results, "search": seconds}}
    sharing = load_yaml(folder / "config.yaml", TaskSharingConfig)
    found, permuted = dict[str, Row](), list[Row]()
    for name, row in results["networks"].items():
        is_found = name == results["found"]
        row["search"] = results["search"]["seconds"] if is_found else 0.0
        if name.startswith("permuted_"):
            permuted.append(row)
        elif is_found and sharing.backbone.has_choices:
            found["joint"] = row
        else:
            found[name] = row
    if permuted:
        metrics = {
            task: {
                metric: statistics.fmean(row["metrics"][task][metric] for row in permuted)
                for metric in values
            }
            for task, values in permuted[0]["metrics"].items()
        }
        found["permuted"] = {**permuted[0], "metrics": metrics}
    return make_tasks(sharing.tasks), found


def _mean(rows: list[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def _with_spread(mean: float, values: list[float]) -> str:
    return f"{mean:+.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
