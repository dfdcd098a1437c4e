"""The page of the report: what a run found, section by section."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.config import ExperimentConfig
from oneshot_ednas.deploy import compiler_text, difference_text, latency_text
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
from oneshot_ednas.report.plots import (
    RunLog,
    RunPictures,
    outcome_plots,
    prediction_mosaic,
    search_plots,
)
from oneshot_ednas.schema import load_yaml, read_json
from oneshot_ednas.space import CHOICE_FIELDS, SearchSpace
from oneshot_ednas.store import write_bytes, write_text
from oneshot_ednas.tasks import Task

COLUMNS = {"op": "Operation", "kernel_size": "Kernel", "expand_ratio": "Expansion"} | {
    "filters": "Filters"
}


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What the report shows, as read from the run folder."""

    config: ExperimentConfig
    config_text: str
    results: dict[str, Any]
    candidates: dict[str, Any]
    seconds: dict[str, float]
    export: dict[str, Any] | None
    log: RunLog
    tasks: Mapping[str, Task]
    space: SearchSpace

    @property
    def networks(self) -> dict[str, dict[str, Any]]:
        """Figures of the derived network and the baselines."""
        return {"derived": self.results, **self.results["baselines"]}


def write_report(
    folder: Path,
    *,
    tasks: Mapping[str, Task],
    space: SearchSpace,
    pictures: RunPictures,
    class_names: Mapping[str, Sequence[str]],
) -> Path:
    """Write `report.html` and `predictions.png` into a run folder; returns the report's path.

    Args:
        folder: a run folder with `results.json`, `candidates.json`, `seconds.json` and
            `config.yaml`, `metrics.jsonl` for the curves, and `export.json` if it is exported.
        tasks: the tasks.
        space: the search space.
        pictures: test frames to show.
        class_names: names of the classes per task, in order; may be fewer than the classes.

    Raises:
        FileNotFoundError: if a file of the run is missing.
        ValueError: if one is damaged, or the pictures lack a task or a frame.
    """
    mosaic = prediction_mosaic(pictures, tasks)
    run = _Run(
        config=load_yaml(folder / "config.yaml", ExperimentConfig),
        config_text=(folder / "config.yaml").read_text(encoding="utf-8"),
        results=read_json(folder / "results.json"),
        candidates=read_json(folder / "candidates.json"),
        seconds=read_json(folder / "seconds.json"),
        export=read_json(exported) if (exported := folder / "export.json").exists() else None,
        log=RunLog.read(folder / "metrics.jsonl"),
        tasks=tasks,
        space=space,
    )
    text = report_text(run, mosaic, class_names)
    write_bytes(folder / "predictions.png", mosaic)
    write_text(folder / "report.html", text)
    return folder / "report.html"


def report_text(run: _Run, mosaic: bytes, class_names: Mapping[str, Sequence[str]]) -> str:
    """The page of a run, see `write_report`."""
    return document(
        f"oneshot-ednas: {run.space.name}, {run.results['target_ms']:g} ms",
        _headline(run),
        {
            "comparison": ("Comparison", _comparison(run)),
            "architecture": ("Architecture", _architecture(run)),
            "curves": ("Search and training", _curves(run)),
            "predictions": (
                "Predictions on test frames",
                predictions_section(mosaic, run.tasks, class_names),
            ),
            "gap": ("From supernet to derived network", _gap(run)),
            "export": ("Export", _export(run)),
            "run": (
                "The run",
                run_section(run.seconds, run.results["versions"], run.config_text),
            ),
        },
    )


def _headline(run: _Run) -> Html:
    results, data = run.results, run.config.data
    verdict = "Inside" if results["is_inside_target"] else "Over"
    latency, target = number(results["latency_ms"]), f"{results['target_ms']:.4g}"
    source = data.source if data.root is None else f"{data.source} {data.root}"
    frames, versions = results["num_frames"], results["versions"]
    alarms = results["supernet"]["alarms"]
    tiles = {
        "reward on the test split": number(results["reward"]),
        "of the latency target": f"{results['latency_ms'] / results['target_ms']:.1%}",
        "parameters": f"{results['parameters']:,}",
        "GMACs": number(results["gmacs"]),
    }
    parts = [
        tag("div", f"oneshot-ednas · {run.space.name} · {', '.join(run.tasks)}", class_="eyebrow"),
        tag("h1", f"{verdict} the budget: {latency} of {target} ms", class_=verdict.lower()),
        tag(
            "div",
            *(tag("div", tag("b", v), tag("span", k), class_="tile") for k, v in tiles.items()),
            class_="tiles",
        ),
        tag(
            "p",
            f"{source} {data.height}x{data.width}, {frames['train']:,} training and "
            f"{frames['test']:,} test frames · seed {results['seed']} · {versions['device']} · "
            f"{duration(sum(run.seconds.values()))} · {results['date']}",
            class_="note",
        ),
        tag("p", f"Latencies are from the table {results['table']}.", class_="note"),
    ]
    if alarms:
        what = "1 warning" if len(alarms) == 1 else f"{len(alarms)} warnings"
        parts.append(tag("p", tag("a", f"{what} about the search", href="#gap")))
    return join(parts)


def _comparison(run: _Run) -> Html:
    networks, results = run.networks, run.results
    is_inside = ["yes" if found["is_inside_target"] else "no" for found in networks.values()]
    rows: list[list[object]] = [
        _measure(run, "Latency, ms", "latency_ms", is_error=True),
        [
            f"Inside the target of {results['target_ms']:.4g} ms",
            *(tag("span", word, class_=word) for word in is_inside),
        ],
        _measure(run, "Reward", "reward", is_error=False),
        _measure(run, "Parameters", "parameters", is_error=True),
        _measure(run, "GMACs", "gmacs", is_error=True),
    ]
    for name, task in run.tasks.items():
        for metric in task.reward_metrics:
            is_error = metric in task.lower_is_better
            keys = ("metrics", name, metric)
            rows.append(_measure(run, metric_label(name, metric), *keys, is_error=is_error))
    seeds, config = len(results["reward_per_seed"]), run.config.retrain
    caption = (
        f"Each network is trained from scratch for {config.steps:,} steps of {config.batch_size} "
        f"frames and scored on the test split, the derived one with "
        + (f"{seeds} seeds (mean ± standard deviation)" if seeds > 1 else "one seed")
        + (
            f", {' and '.join(results['baselines'])} alike with one seed. Bold: best of the row."
            if len(networks) > 1
            else "; the run has no baselines."
        )
    )
    return join([table(["", *networks], rows, "numbers"), tag("p", caption, class_="note")])


def _measure(run: _Run, label: str, *keys: str, is_error: bool) -> list[object]:
    """A row of the comparison: the value under `keys` of each network, the best in bold."""
    values: list[Any] = [reduce(getitem, keys, found) for found in run.networks.values()]
    best = (min if is_error else max)(values)
    form = number if isinstance(best, float) else "{:,}".format
    cells: list[object] = [
        tag("b", form(value)) if value == best and len(values) > 1 else form(value)
        for value in values
    ]
    spread = None
    if keys[0] == "metrics" and run.results["metrics_std"] is not None:
        spread = reduce(getitem, keys[1:], run.results["metrics_std"])
    elif keys[0] == "reward" and len(run.results["reward_per_seed"]) > 1:
        spread = statistics.stdev(run.results["reward_per_seed"])
    if spread is not None:
        cells[0] = join([cells[0], tag("span", f" ± {spread:.2g}", class_="unit")])
    return [f"{label} {'↓' if is_error else '↑'}", *cells]


def _architecture(run: _Run) -> Html:
    derived = Architecture.from_json(run.candidates["candidates"][0]["architecture"])
    rows = []
    for index, (block, base, stride) in enumerate(
        zip(
            derived.blocks, run.space.base_architecture.blocks, run.space.block_strides, strict=True
        ),
        start=1,
    ):
        cells = [
            _choice(
                getattr(block, field),
                getattr(base, field),
                run.candidates["probabilities"].get(f"block_{index}.{field}", {}),
            )
            for field in CHOICE_FIELDS
        ]
        rows.append([index, f"1/{stride}", *cells])
    note = (
        "Each box is an option of the search; it is filled as high as the option's probability "
        "under alpha. The derived network's option has a blue frame; the base network's value is "
        "grey where it differs. Options are chosen to be the most probable within the latency "
        "target and the best with supernet weights, so a frame need not be the fullest box."
    )
    head = ["Block", "Scale", *(COLUMNS[field] for field in CHOICE_FIELDS)]
    return join([table(head, rows, "blocks"), tag("p", note, class_="note")])


def _choice(value: str | int, base: str | int, probabilities: Mapping[str, float]) -> Html:
    shown = [tag("b", value)]
    if value != base:
        shown.append(tag("span", f"base {base}", class_="base"))
    boxes = [
        tag(
            "div",
            option.removesuffix("_ibn"),
            class_="option kept" if option == str(value) else "option",
            title=f"{option}: {probability:.1%}",
            style=f"background: linear-gradient(to top, var(--pale) {probability:.1%}, "
            f"transparent {probability:.1%})",
        )
        for option, probability in probabilities.items()
    ]
    options = [tag("div", *boxes, class_="options")] if boxes else []
    return tag("div", tag("div", *shown, class_="value"), *options, class_="choice")


def _curves(run: _Run) -> Html:
    config, target_ms = run.config.search, run.results["target_ms"]
    search = search_plots(
        run.log,
        task_names=list(run.tasks),
        target_ms=target_ms,
        warmup_steps=config.warmup_steps,
        max_entropy=sum(math.log(len(choice.options)) for choice in run.space.choices),
    )
    outcome = outcome_plots(
        run.log,
        candidates=run.candidates["candidates"],
        front=run.candidates["pareto_front"],
        target_ms=target_ms,
    )
    return join(
        [
            figure(
                search,
                "The search. Grey: warm-up, in which only the weights learn. Losses per task are "
                "of weight steps; a running mean lies over the faint values of a long log.",
            ),
            figure(
                outcome,
                "Left and middle: the candidates, the most probable architectures inside the "
                "target and draws of alpha; the one with the highest reward is derived. Right: the "
                "trainings that "
                "the comparison rests on.",
            ),
        ]
    )


def predictions_section(
    mosaic: bytes,
    tasks: Mapping[str, Task],
    class_names: Mapping[str, Sequence[str]],
    network: str = "the derived network",
) -> Html:
    """The picture of predictions of a network, with the colours of the classes."""
    parts = []
    for name, task in tasks.items():
        if not task.row.has_classes:
            continue
        colours = task.picture(np.arange(task.out_channels).reshape(1, -1))[0]
        entries, names = [tag("b", name)], class_names.get(name, ())
        for index, colour in enumerate(colours.tolist()):
            known = names[index] if index < len(names) else f"class {index}"
            style = f"background: rgb({', '.join(map(str, colour))})"
            swatch = tag("span", class_="swatch", style=style)
            entries.append(tag("span", swatch, known))
        parts.append(tag("div", *entries, class_="legend"))
    caption = (
        f"By {network}, first seed. Black: invalid. Target and prediction share their "
        "colours; depth is bright near and dark far, over the range of the target; heat "
        "maps are bright where they are large, edges and saliency white."
    )
    return join([figure(mosaic, caption), *parts])


def _gap(run: _Run) -> Html:
    results, supernet = run.results, run.results["supernet"]
    target = results["target_ms"]
    latencies = {
        "Expected under alpha (soft)": supernet["expected_latency_ms"],
        "Most probable options, target ignored": supernet["argmax_latency_ms"],
        "Derived within the target": results["latency_ms"],
    }
    soft = [[what, number(ms), f"{(ms - target) / target:+.1%}"] for what, ms in latencies.items()]
    scores: list[list[object]] = [["Reward", number(supernet["reward"]), number(results["reward"])]]
    for name, task in run.tasks.items():
        for metric in task.reward_metrics:
            pair = (supernet["metrics"][name][metric], results["metrics"][name][metric])
            scores.append([metric_label(name, metric), *map(number, pair)])
    head = ["", "supernet weights", "retrained"]
    parts = [
        tag(
            "div",
            tag("div", table(["Latency", "ms", "to target"], soft, "numbers")),
            tag("div", table(head, scores, "numbers")),
            class_="columns",
        ),
        tag(
            "p",
            "Supernet weights are scored on the validation part of the training set, retrained "
            "ones on the test split.",
            class_="note",
        ),
    ]
    if supernet["alarms"]:
        listed = tag("ul", *(tag("li", alarm) for alarm in supernet["alarms"]))
        box = tag("div", tag("b", "Look at the search again"), listed, class_="warning")
        parts.insert(0, box)
    return join(parts)


def _export(run: _Run) -> Html:
    export = run.export
    if export is None:
        return tag("p", "The network is not exported.", class_="note")
    parts = []
    doubts = [f"On the Edge TPU, {line}" for line in export["unmapped"]]
    if export["not_verified"]:
        doubts.append(f"Not verified: {export['not_verified']}")
    if doubts:
        listed = tag("ul", *(tag("li", doubt) for doubt in doubts))
        parts.append(tag("div", tag("b", "Look at the file again"), listed, class_="warning"))
    if export["metrics"]:
        parts.append(_quantization(run, export["metrics"]))
    operators = [[name, row["count"], row["version"]] for name, row in export["operators"].items()]
    size = (
        f"{export['file']}: {export['size_bytes'] / 2**20:.2f} MiB, integers only, {export['io']} "
        f"in and out, calibrated on {export['num_calibration_images']} training frames."
    )
    return join(
        [
            *parts,
            tag("p", size),
            tag("p", "Latency: ", latency_text(export)),
            tag("p", "Edge TPU compiler: ", compiler_text(export)),
            tag(
                "details",
                tag("summary", "Operators"),
                table(["Operator", "count", "version"], operators, "numbers"),
            ),
        ]
    )


def _quantization(run: _Run, scores: Mapping[str, Any]) -> Html:
    """Metrics of the float network and of the file, on each split."""
    rows: list[list[object]] = []
    for name, task in run.tasks.items():
        for metric in task.reward_metrics:
            row: list[object] = [metric_label(name, metric)]
            for score in scores.values():
                found = score[name][metric]
                row += [number(found["float"]), number(found["int8"]), difference_text(found)]
            rows.append(row)
    head = ["", *(word for part in scores for word in (f"{part}: float", "int8", "difference"))]
    note = "Errors differ in percent, shares in percentage points."
    if "validation" in scores:
        note += " The validation frames are part of what the network was retrained on."
    return join([table(head, rows, "numbers"), tag("p", note, class_="note")])


def run_section(
    seconds: Mapping[str, float], versions: Mapping[str, str], config_text: str
) -> Html:
    """Times of the stages, versions of what computed them, and the config."""
    times = [[stage, duration(spent)] for stage, spent in seconds.items()]
    times.append([tag("b", "total"), tag("b", duration(sum(seconds.values())))])
    rows = [[name, version] for name, version in versions.items()]
    return join(
        [
            tag(
                "div",
                tag("div", table(["Stage", "time"], times, "numbers")),
                tag("div", table(["Version", ""], rows, "plain")),
                class_="columns",
            ),
            tag("details", tag("summary", "Config"), tag("pre", config_text)),
        ]
    )
