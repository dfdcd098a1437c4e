"""What a comparison writes: JSON, Markdown, pictures, and one HTML page that needs nothing else."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from oneshot_ednas.comparison.bootstrap import LEVEL, NUM_DRAWS
from oneshot_ednas.comparison.compared import Comparison, compared
from oneshot_ednas.comparison.curves import final_point, search_curve, trial_band
from oneshot_ednas.comparison.methods import Found, Method, spread
from oneshot_ednas.comparison.plots import anytime_plots, look_of, pareto_plots, reward_plots
from oneshot_ednas.comparison.tables import (
    DIFFERENCE_HEAD,
    RUN_HEAD,
    Row,
    difference_rows,
    gain_rows,
    result_rows,
    run_rows,
    verdict,
)
from oneshot_ednas.report.markup import (
    Html,
    document,
    figure,
    join,
    markdown_table,
    markdown_text,
    number,
    table,
    tag,
)
from oneshot_ednas.reward import Deltas
from oneshot_ednas.schema import read_json
from oneshot_ednas.store import write_bytes, write_json, write_text

HOW_RESULTS = {
    False: (
        "Mean ± standard deviation over seeds of what each method's network, trained from "
        "scratch, scores on the test split. Multiply-adds are those of training, three times those "
        "of the forward pass; the time of a search is summed over its workers."
    ),
    True: (
        "Nothing was trained. Mean ± standard deviation over seeds of what each method's network "
        "scores on the test split as predicted by the benchmark. Multiply-adds, three times those "
        "of the forward pass, and time are what the trainings of the search would have taken."
    ),
}
"""By whether the metrics are predicted by a benchmark."""
HOW_GAINS = (
    "In percent; positive is better. Per metric (EDNAS eq. 9-10), mean over metrics (eq. 11) and "
    "over tasks (eq. 12), each run against the mean of the baseline, ± standard deviation over "
    "seeds."
)
HOW_DIFFERENCES = (
    f"Bootstrap of {NUM_DRAWS:,} draws over runs, each the mean of its trainings, at {LEVEL:.0%}, "
    f"widened by Student's t for few seeds. Only where the interval leaves out 0 is a method "
    f"called better. With many pairs some interval leaves out 0 by chance."
)
HOW_LINES = (
    "Lines: the best reward so far inside the target, on the validation split, mean over seeds "
    "with the range as a band; trials are"
)
KIND_OF_TRIALS = {False: "short trainings.", True: "predicted by the benchmark."}
HOW_DOTTED = (
    "Dotted: a one-shot search's most probable architecture inside the target, scored with "
    "supernet weights; its time is taken as its share of the multiply-adds."
)
HOW_MARKS = {
    False: (
        "Marks: the network of each run, retrained, on the test split, at the cost of search and "
        "retraining."
    ),
    True: (
        "Marks: the network of each run on the test split, predicted by the benchmark, at what the "
        "search would have taken."
    ),
}
HOW_PARETO = {
    False: (
        "Left: what the searches saw; a black rim marks what they picked. Right: what came of the "
        "picks. The splits and the lengths of training differ between the two."
    ),
    True: (
        "Left: the trials of the searches on the validation split; a black rim marks what they "
        "picked. Right: the picks on the test split. All metrics are predicted by the benchmark."
    ),
}


def compare_runs(folders: Sequence[Path], out: Path, *, baseline: str | None = None) -> Comparison:
    """Compare the methods of some runs and write the comparison.

    Args:
        folders: run folders, one per method and seed.
        out: folder for `comparison.json`, `comparison.md`, `comparison.html` and the pictures.
        baseline: method that the paper's gains are relative to; None is `base` where some run
            trained it.

    Raises:
        FileNotFoundError: if a folder holds no run.
        ValueError: if the runs cannot be compared, a file is damaged, no run is finished, no run
            has the baseline, or the folder holds a run or a comparison of other runs; nothing is
            written then.
    """
    found = compared(folders, baseline=baseline)
    _check_out(out, found)
    look = look_of(found.methods)
    methods, kind = found.methods, {"is_predicted": found.is_predicted}
    pictures = {
        "rewards": reward_plots(methods, found.differences, look, **kind),
        "anytime": anytime_plots(methods, look, macs_power=found.macs_power, **kind),
        "pareto": pareto_plots(methods, look, found.target_ms, **kind),
    }
    for name, png in pictures.items():
        write_bytes(out / f"{name}.png", png)
    write_json(out / "comparison.json", to_json(found))
    write_text(out / "comparison.md", to_markdown(found))
    write_text(out / "comparison.html", to_html(found, pictures))
    return found


def _check_out(out: Path, found: Comparison) -> None:
    """Refuse a folder whose files are not an earlier comparison of these runs or some of them."""
    if (out / "config.yaml").exists():
        raise ValueError(f"{out} holds a run; choose another --out")
    path = out / "comparison.json"
    if not path.exists():
        return
    written = read_json(path)
    rows = written.get("runs", []) if isinstance(written, dict) else []
    missing = _identities(rows) - _identities(_runs_json(found))
    if missing or not rows:
        name = "{} ({}, seed {})".format(*min(missing, key=str)) if missing else "something else"
        raise ValueError(
            f"--out {out}: expected an empty folder or a comparison of these runs or some of them, "
            f"got one of {name}; choose another --out"
        )


def _identities(rows: Iterable[Mapping[str, Any]]) -> set[tuple[str, Any, Any]]:
    """What tells runs apart; whether they are finished may change."""
    return {
        (str(Path(row.get("folder", "")).resolve()), row.get("method"), row.get("seed"))
        for row in rows
    }


# JSON ---------------------------------------------------------------------------------------


def to_json(found: Comparison) -> dict[str, Any]:
    """The content of `comparison.json`."""
    return {
        "target_ms": found.target_ms,
        "is_predicted": found.is_predicted,
        "runs": _runs_json(found),
        "methods": {method.name: _method_json(method) for method in found.methods},
        "missing": {
            method.name: {str(seed): why for seed, why in method.missing.items()}
            for method in (*found.methods, *found.unfinished)
            if method.missing
        },
        "baseline": None if found.baseline is None else found.baseline.name,
        "gains": {name: _gains_json(rows) for name, rows in found.gains.items()},
        "differences": [
            {
                "one": one.one,
                "other": one.other,
                "difference": one.value,
                "interval": None if one.low is None else [one.low, one.high],
                "num_seeds": list(one.num_runs),
                "better": one.winner,
            }
            for one in found.differences
        ],
        "notes": list(found.notes),
    }


def _runs_json(found: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "folder": str(run.folder),
            "method": run.method,
            "seed": run.seed,
            "is_finished": run.results is not None,
        }
        for run in found.runs
    ]


def _method_json(method: Method) -> dict[str, Any]:
    def over(value: Callable[[Found], float]) -> dict[str, float | None]:
        return spread(value(one) for one in method.found)

    return {
        "seeds": method.seeds,
        "reward": over(lambda one: one.reward) | {"per_run": method.rewards},
        "accuracy": over(lambda one: one.accuracy),
        "latency_ms": over(lambda one: one.latency_ms),
        "num_inside_target": sum(one.is_inside_target for one in method.found),
        "parameters": over(lambda one: one.figures["parameters"]),
        "gmacs": over(lambda one: one.figures["gmacs"]),
        "metrics": {
            task: {
                name: spread(one.figures["metrics"][task][name] for one in method.found)
                for name in values
            }
            for task, values in method.found[0].figures["metrics"].items()
        },
        "cost": {
            "search_macs": over(lambda one: one.search.macs),
            "search_seconds": over(lambda one: one.search.seconds),
            "retrain_macs": over(lambda one: one.retrain.macs),
            "retrain_seconds": over(lambda one: one.retrain.seconds),
        },
        "architectures": [one.figures["architecture"] for one in method.found],
        "curves": [
            {
                "seed": one.seed,
                "points": [
                    {"macs": point.cost.macs, "seconds": point.cost.seconds, "reward": point.reward}
                    for point in search_curve(one)
                ],
                "kind": "trials" if one.run.trials else "supernet weights",
                "final": {
                    "macs": final_point(one).cost.macs,
                    "seconds": final_point(one).cost.seconds,
                    "reward": one.reward,
                },
            }
            for one in method.found
        ],
    }


def _gains_json(rows: Sequence[Deltas]) -> dict[str, Any]:
    first = rows[0]
    return {
        "metrics": {
            task: {name: spread(row.metrics[task][name] for row in rows) for name in values}
            for task, values in first.metrics.items()
        },
        "tasks": {task: spread(row.tasks[task] for row in rows) for task in first.tasks},
        "overall": spread(row.overall for row in rows),
    }


def to_markdown(found: Comparison) -> str:
    """The content of `comparison.md`."""
    labels = [method.label for method in found.methods]
    parts = ["# Comparison", markdown_text(verdict(found))]
    notes = [f"- {markdown_text(note)}" for note in found.notes]
    parts += ["\n".join(notes)] if notes else []
    parts += ["## Results", markdown_table(["", *labels], result_rows(found))]
    parts.append(HOW_RESULTS[found.is_predicted])
    if found.differences:
        parts += ["## Differences", markdown_table(DIFFERENCE_HEAD, difference_rows(found))]
        parts += [HOW_DIFFERENCES, "![Rewards and differences](rewards.png)"]
    else:
        parts += ["## Rewards", "![Rewards](rewards.png)"]
    if found.gains:
        assert found.baseline is not None
        parts.append(f"## Gain over {markdown_text(found.baseline.label)}")
        parts += [markdown_table(["", *labels], gain_rows(found)), HOW_GAINS]
    parts += ["## Anytime", "![Reward against cost](anytime.png)", _how_anytime(found)]
    parts += ["## Accuracy and latency", "![Accuracy against latency](pareto.png)"]
    parts.append(HOW_PARETO[found.is_predicted])
    parts += ["## Runs", markdown_table(RUN_HEAD, run_rows(found))]
    return "\n\n".join(parts) + "\n"


def _how_anytime(found: Comparison) -> str:
    """What the lines and marks are, of those that there are."""
    parts = []
    if any(trial_band(method, lambda point: point.cost.macs) for method in found.methods):
        parts += [HOW_LINES, KIND_OF_TRIALS[found.is_predicted]]
    every = [one for method in found.methods for one in method.found if not one.run.trials]
    if any(search_curve(one) for one in every):
        parts.append(HOW_DOTTED)
    return " ".join([*parts, HOW_MARKS[found.is_predicted]])


# HTML ---------------------------------------------------------------------------------------


def to_html(found: Comparison, pictures: dict[str, bytes]) -> str:
    """The content of `comparison.html`.

    Args:
        found: the comparison.
        pictures: PNG files `rewards`, `anytime` and `pareto`.
    """
    labels = [method.label for method in found.methods]

    def section(head: Sequence[str], rows: Iterable[Row], how: str) -> Html:
        return join([table(head, rows, "numbers"), tag("p", how, class_="note")])

    how_results = HOW_RESULTS[found.is_predicted]
    sections = {"results": ("Results", section(["", *labels], result_rows(found), how_results))}
    if found.differences:
        rewards = figure(pictures["rewards"], "Every run, and every pair of methods.")
        differences = section(DIFFERENCE_HEAD, difference_rows(found), HOW_DIFFERENCES)
        sections["differences"] = ("Differences", join([rewards, differences]))
    else:
        sections["rewards"] = ("Rewards", figure(pictures["rewards"], "Every run."))
    if found.gains:
        assert found.baseline is not None
        gains = section(["", *labels], gain_rows(found), HOW_GAINS)
        sections["gains"] = (f"Gain over {found.baseline.label}, percent", gains)
    sections["anytime"] = ("Reward against cost", figure(pictures["anytime"], _how_anytime(found)))
    how_pareto = HOW_PARETO[found.is_predicted]
    sections["pareto"] = ("Accuracy and latency", figure(pictures["pareto"], how_pareto))
    sections["runs"] = ("Runs", table(RUN_HEAD, run_rows(found), "plain"))
    return document("oneshot-ednas: comparison", _headline(found), sections)


def _headline(found: Comparison) -> Html:
    config = found.runs[0].config
    tiles = [
        tag("div", tag("b", number(method.reward)), tag("span", method.label), class_="tile")
        for method in found.methods
    ]
    predicted = ", predicted by the benchmark" if found.is_predicted else ""
    setup = (
        f"{config.data.source} {config.data.height}x{config.data.width} · target "
        f"{found.target_ms:.4g} ms · {len(found.runs)} runs · mean reward on the test split"
        f"{predicted}:"
    )
    parts = [
        tag("div", f"oneshot-ednas · {', '.join(found.tasks)}", class_="eyebrow"),
        tag("h1", verdict(found)),
        tag("p", setup, class_="note"),
        tag("div", *tiles, class_="tiles"),
    ]
    if found.notes:
        listed = tag("ul", *(tag("li", note) for note in found.notes))
        parts.append(tag("div", tag("b", "Before you read on"), listed, class_="warning"))
    return join(parts)
