"""The page of a run that searched what tasks share: networks, trees, policies, predictions."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.report.branching_tree import branching_tree
from oneshot_ednas.report.markup import (
    Html,
    document,
    duration,
    figure,
    join,
    metric_label,
    number,
    table,
    tag,
)
from oneshot_ednas.report.page import predictions_section, run_section
from oneshot_ednas.report.plots import RunPictures, prediction_mosaic
from oneshot_ednas.report.sharing_curves import (
    SEARCHES,
    search_curves,
    tradeoff_plot,
    training_curves,
)
from oneshot_ednas.report.sharing_files import FILES, SharingFiles
from oneshot_ednas.report.sharing_plots import (
    correlation_heatmap,
    grouping_heatmap,
    policy_heatmaps,
    route_heatmaps,
    sharing_pattern,
)
from oneshot_ednas.sharing.policy import CHOICES, task_correlation
from oneshot_ednas.store import write_bytes, write_text
from oneshot_ednas.tasks import Task

UNKNOWN = "n/a"


def write_sharing_report(
    folder: Path,
    *,
    tasks: Mapping[str, Task],
    pictures: RunPictures,
    class_names: Mapping[str, Sequence[str]],
) -> Path:
    """Write `report.html` and `predictions.png` into a run folder; returns the report's path.

    Args:
        folder: a run folder with `results.json`, `seconds.json`, `config.yaml`, what the search
            left (`branching.json`, `policy.json`), and `metrics.jsonl` for the curves.
        tasks: the tasks.
        pictures: test frames with the predictions of the found network.
        class_names: names of the classes per task, in order; may be fewer than the classes.

    Raises:
        FileNotFoundError: if a file of the run is missing.
        ValueError: if one is damaged or does not belong to the others, or the pictures lack a
            task or a frame.
    """
    mosaic = prediction_mosaic(pictures, tasks)
    run = SharingFiles.read(folder, tasks, pictures.images[0])
    sections = {
        "comparison": ("Comparison", _comparison(run)),
    }
    if any(row["delta"] is not None for row in run.networks.values()):
        sections["tradeoff"] = ("Gain and cost", _tradeoff(run))
    if any(row["branching"] is not None for row in run.networks.values()):
        sections["branching"] = ("Branching", _trees(run))
    if run.branching is not None:
        drawn = _drawn(folder / FILES["branching"], lambda: _routes(run))
        sections["routes"] = ("The search over branchings", drawn)
    if run.policy is not None:
        drawn = _drawn(folder / FILES["operators"], lambda: _policy(run))
        sections["policy"] = ("The search over operators", drawn)
    sections |= {
        "curves": ("Search and training", _curves(run)),
        "predictions": (
            "Predictions on test frames",
            predictions_section(
                mosaic, tasks, class_names, f"the found network ({run.results['found']})"
            ),
        ),
        "run": (
            "The run",
            run_section(run.seconds, run.results["versions"], run.config_text),
        ),
    }
    text = document(
        f"oneshot-ednas: task sharing, {run.results['backbone']}", _headline(run), sections
    )
    write_bytes(folder / "predictions.png", mosaic)
    write_text(folder / "report.html", text)
    return folder / "report.html"


def _drawn(path: Path, draw: Callable[[], Html]) -> Html:
    """A section from a file whose lists may not fit each other: then the error names it."""
    try:
        return draw()
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{path}: {error}") from error


def _headline(run: SharingFiles) -> Html:
    results, found = run.results, run.networks[run.results["found"]]
    baseline, frames = run.networks[results["baseline"]], results["num_frames"]
    target, latency = results["target_ms"], found["latency_ms"]
    word = {}
    if target is not None and latency is not None:
        word = {"class_": "inside" if latency <= target else "over"}
    verdict = f"{results['found']}: {number(float(found['gmacs']))} GMACs per frame"
    if results["baseline"] != results["found"]:
        share = found["gmacs"] / baseline["gmacs"]
        verdict = f"{results['found']}: {share:.0%} of the multiply-adds of {results['baseline']}"
    if found["delta"] is not None:
        verdict += f" at {found['delta']['overall']:+.2f}% overall gain"
    tiles = {
        "parameters": f"{found['parameters']:,}",
        "GMACs per frame": number(float(found["gmacs"])),
        "of the encoder's parameters shared": f"{found['shared_parameters']:.0%}",
    }
    if latency is not None:
        goal = "" if target is None else f", target {target:.4g}"
        tiles[f"ms latency{goal}"] = number(float(latency))
    if found["delta"] is not None:
        tiles = {f"gain over {results['baseline']}": f"{found['delta']['overall']:+.2f}%"} | tiles
    line = f"oneshot-ednas · task sharing · {results['backbone']} · {', '.join(run.tasks)}"
    parts = [
        tag("div", line, class_="eyebrow"),
        tag("h1", verdict, **word),
        tag(
            "div",
            *(tag("div", tag("b", v), tag("span", k), class_="tile") for k, v in tiles.items()),
            class_="tiles",
        ),
        tag(
            "p",
            f"{found['what']} · {frames['train']:,} training and {frames['test']:,} test frames · "
            f"seed {results['seed']} · {results['versions'].get('device', 'device unknown')} · "
            f"{duration(sum(run.seconds.values()))} · {results['date']}",
            class_="note",
        ),
    ]
    alarms = results["search"].get("alarms", ())
    if alarms:
        what = "1 warning" if len(alarms) == 1 else f"{len(alarms)} warnings"
        parts.append(tag("p", tag("a", f"{what} about the search", href="#curves")))
    return join(parts)


def _comparison(run: SharingFiles) -> Html:
    networks, results = run.networks, run.results
    rows = [
        _measure(run, "Parameters", "parameters", is_error=True),
        _measure(run, "GMACs per frame", "gmacs", is_error=True),
    ]
    if any(row["latency_ms"] is not None for row in networks.values()):
        rows.append(_measure(run, "Latency, ms", "latency_ms", is_error=True))
    rows.append(
        _measure(run, "Encoder parameters shared", "shared_parameters", form="{:.1%}".format)
    )
    for name, task in run.tasks.items():
        for metric in task.reward_metrics:
            is_error = metric in task.lower_is_better
            keys = ("metrics", name, metric)
            rows.append(_measure(run, metric_label(name, metric), *keys, is_error=is_error))
    has_gains = any(row["delta"] is not None for row in networks.values())
    if has_gains:
        for name in run.tasks:
            rows.append(_gain(run, f"{name}: gain, %", "tasks", name))
        rows.append(_gain(run, tag("b", "Overall gain, %"), "overall"))
    found = tag("span", results["found"], tag("span", "found", class_="base"))
    head = ["", *(found if name == results["found"] else name for name in networks)]
    seeds = {row["seeds"] for row in networks.values()}
    trained = " and ".join(map(str, sorted(seeds)))
    gains = (
        f"Gains are over {results['baseline']}, the mean over a task's metrics, and overall the "
        f"mean over tasks; positive is better. "
    )
    caption = (
        f"{gains if has_gains else ''}Networks are trained with {trained} "
        f"{'seed' if seeds == {1} else 'seeds'}"
        f"{'' if max(seeds) == 1 else ' (mean ± standard deviation)'} and scored on the test "
        f"split. An arrow says which way is better; bold: best of the row."
    )
    what = [[name, row["what"]] for name, row in networks.items()]
    return join(
        [
            table(head, rows, "numbers"),
            tag("p", caption, class_="note"),
            tag("details", tag("summary", "The networks"), table(["", ""], what, "plain"), open=""),
        ]
    )


def _measure(
    run: SharingFiles,
    label: object,
    *keys: str,
    is_error: bool | None = None,
    form: Callable[[Any], str] = lambda value: (
        number(value) if isinstance(value, float) else f"{value:,}"
    ),
) -> list[object]:
    """A row: the value under `keys` of each network, the best in bold if one way is better."""
    values = [_at(row, keys) for row in run.networks.values()]
    known = [value for value in values if value is not None]
    best = None
    if is_error is not None and len(known) > 1:
        best = (min if is_error else max)(known)
    cells: list[object] = []
    for row, value in zip(run.networks.values(), values, strict=True):
        if value is None:
            cells.append(UNKNOWN)
            continue
        cell: object = tag("b", form(value)) if value == best else form(value)
        spread = _at(row, ("metrics_std", *keys[1:])) if keys[0] == "metrics" else None
        if spread is not None:
            cell = join([cell, tag("span", f" ± {spread:.2g}", class_="unit")])
        cells.append(cell)
    arrow = "" if is_error is None else " ↓" if is_error else " ↑"
    return [join([label, arrow]), *cells]


def _at(row: Any, keys: Sequence[str]) -> Any:
    """The value under nested keys; None if one is missing or holds none."""
    for key in keys:
        row = None if row is None else row.get(key)
    return row


def _gain(run: SharingFiles, label: object, *keys: str) -> list[object]:
    return _measure(run, label, "delta", *keys, is_error=False, form="{:+.2f}".format)


def _tradeoff(run: SharingFiles) -> Html:
    results = run.results
    drawn = tradeoff_plot(results["networks"], baseline=results["baseline"], found=results["found"])
    caption = (
        f"Gain of each network over {results['baseline']} (circle, dashed line at 0) against what "
        f"it costs. Star: the found network."
    )
    return tag("div", figure(drawn, caption), style="max-width: 880px")


def _trees(run: SharingFiles) -> Html:
    found, branching = run.results["found"], run.branching
    parts = []
    for name, row in run.networks.items():
        groupings = row["branching"]
        if groupings is None:
            continue
        tasks, layers = list(run.tasks), [f"layer {i + 1}" for i in range(len(groupings))]
        if branching is not None:
            tasks = branching["tasks"]
            if len(branching["layers"]) == len(groupings):
                layers = branching["layers"]
        options = None
        if name == found and branching is not None and branching["architectures"]:
            options = _options(tasks, layers, groupings, branching["architectures"])
        heading = f"{name} (found)" if name == found else name
        parts.append(tag("h3", heading))
        tree = branching_tree(tasks, layers, groupings, options, run.image)
        parts.append(figure(tree, row["what"]))
    note = (
        "Each box is a layer of the encoder, and each line a task that uses it; the coloured boxes "
        "on the right are the decoders."
    )
    return join([*parts, tag("p", note, class_="note")])


def _options(
    tasks: Sequence[str],
    layers: Sequence[str],
    groupings: Sequence[Sequence[int]],
    architectures: Mapping[str, object],
) -> list[dict[int, str]]:
    """What the blocks of each group are, from the architectures of its tasks' paths."""
    paths = {
        task: Architecture.from_json(architectures[task], source=f"architecture of {task}")
        for task in tasks
    }
    options = []
    for layer, grouping in zip(layers, groupings, strict=True):
        prefix, _, index = layer.rpartition("_")
        texts: dict[int, str] = {}
        for label, task in zip(grouping, tasks, strict=True):
            if prefix != "block" or not index.isdigit():
                continue
            block = paths[task].blocks[int(index) - 1]
            op = "fused" if block.op == "fused_ibn" else block.op
            # Tasks of one group have one block: the first says what it is.
            text = f"{op} k{block.kernel_size} e{block.expand_ratio} {block.filters}"
            texts.setdefault(label, text)
        options.append(texts)
    return options


def _routes(run: SharingFiles) -> Html:
    found = run.branching
    assert found is not None
    tasks, layers = found["tasks"], found["layers"]
    groupings = grouping_heatmap(
        layers, found["grouping_probabilities"], tasks, chosen=found["groupings"]
    )
    routes = route_heatmaps(tasks, layers, found["probabilities"])
    return join(
        [
            figure(
                groupings,
                "Probability that a layer is shared in each way, after the search; tasks that "
                "stand together share it. White squares: what was derived.",
            ),
            figure(routes, "Probability that each task takes each candidate of a layer."),
        ]
    )


def _policy(run: SharingFiles) -> Html:
    found = run.policy
    assert found is not None
    tasks, operators = found["tasks"], [operator["name"] for operator in found["operators"]]
    probabilities = np.array(found["probabilities"], dtype=np.float64)
    if probabilities.shape != (len(tasks), len(operators), len(CHOICES)):
        raise ValueError(
            f"probabilities: expected {len(tasks)} tasks x {len(operators)} operators x "
            f"{len(CHOICES)} choices, got shape {probabilities.shape}"
        )
    correlation = task_correlation(torch.from_numpy(probabilities).float()).numpy()
    counts = [
        [task, *(f"{row.count(choice) / len(operators):.0%}" for choice in CHOICES)]
        for task, row in zip(tasks, found["policy"], strict=True)
    ]
    return join(
        [
            figure(
                policy_heatmaps(tasks, operators, probabilities),
                "Probability that a task uses the shared operator, one of its own, or none; "
                "operators in the order of the network.",
            ),
            figure(
                sharing_pattern(tasks, operators, found["policy"]),
                "What was derived from it.",
            ),
            tag(
                "div",
                tag(
                    "div",
                    figure(
                        correlation_heatmap(tasks, correlation),
                        "Cosine similarity of the tasks' policies.",
                    ),
                    style=f"flex: 0 1 {260 + 60 * len(tasks)}px",
                ),
                tag("div", table(["Operators", *CHOICES], counts, "numbers")),
                class_="columns",
            ),
        ]
    )


def _curves(run: SharingFiles) -> Html:
    search = run.results["search"]
    parts = []
    if search.get("alarms"):
        listed = tag("ul", *(tag("li", alarm) for alarm in search["alarms"]))
        parts.append(tag("div", tag("b", "Look at the search again"), listed, class_="warning"))
    if search.get("expected") is not None:
        target, unit = run.results["target_ms"], search.get("unit") or ""
        goal = f"; the target is {target:.4g} ms" if target is not None and unit == "ms" else ""
        cost = f"{number(float(search['expected']))} {'GMACs' if unit == 'gmacs' else unit}"
        parts.append(tag("p", f"Expected cost under the search's probabilities: {cost}{goal}."))
    for prefix in SEARCHES:
        for stage in run.log.stages(prefix):
            caption = (
                f"The search over {'branchings' if prefix == 'branching' else prefix}"
                f"{'' if stage == prefix else f' ({stage})'}. A running mean lies over the faint "
                f"values of a long log."
            )
            parts.append(figure(search_curves(run.log, list(run.tasks), stage), caption))
    trainings = training_curves(run.log)
    if trainings is not None:
        caption = "The trainings that the comparison rests on."
        parts.append(tag("div", figure(trainings, caption), style="max-width: 880px"))
    if not parts:
        parts.append(tag("p", "Nothing was logged.", class_="note"))
    return join(parts)
