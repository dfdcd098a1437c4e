"""Curves of a search for what tasks share, and its networks by gain and cost, as PNG."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox, BboxBase

from oneshot_ednas.report.branching_tree import WIDTH_INCHES
from oneshot_ednas.report.plots import (
    BLUE,
    GREY,
    STYLE,
    RunLog,
    draw_panels,
    log_scale_if_wide,
    running_mean,
    to_png,
)
from oneshot_ednas.sharing.policy import CHOICES

GROUPS = {"cost": "Cost: ", "alpha": "Alpha: ", "policy": "Policy: "}
"""Of keys of the log, with the titles that their panels begin with."""
SEARCHES = ("branching", "operators")
"""Stages of the log that train what is searched in, by the first word of their name."""


def tradeoff_plot(
    networks: Mapping[str, Mapping[str, Any]],
    *,
    baseline: str = "separate",
    found: str | None = None,
) -> bytes:
    """Overall gain of each network against its latency, or its multiply-adds if one has none.

    Args:
        networks: of `results.json`; those without a `delta` are left out.
        baseline: against which gains are; it stands at 0.
        found: gets a star.
    """
    gains = {
        name: 0.0 if name == baseline else row["delta"]["overall"]
        for name, row in networks.items()
        if name == baseline or row["delta"] is not None
    }
    has_latency = bool(gains) and all(networks[name]["latency_ms"] is not None for name in gains)
    key, unit = ("latency_ms", "latency, ms") if has_latency else ("gmacs", "GMACs per frame")
    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color=GREY, linestyle="--", linewidth=1.1, zorder=1)
        points = {name: (float(networks[name][key]), gain) for name, gain in gains.items()}
        for name, point in points.items():
            style: dict[str, Any] = {"marker": "o", "color": GREY, "ms": 7}
            if name == found:
                style = {"marker": "*", "color": BLUE, "ms": 15}
            elif name == baseline:
                style |= {"markerfacecolor": "white"}
            axes.plot(*point, linestyle="none", zorder=3, **style)
        axes.set(xlabel=unit, ylabel="gain over the baseline, %")
        axes.margins(0.14)
        if points:
            axes.set_xlim(left=0)
        figure.draw_without_rendering()
        _name_points(axes, points, bold=found)
        return to_png(figure)


def _name_points(
    axes: Axes, points: Mapping[str, tuple[float, float]], *, bold: str | None
) -> None:
    """Names beside points, each at the first place that nothing else takes."""
    scale = axes.figure.dpi / 72
    half = 5.5 * scale
    centres = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [Bbox.from_bounds(x - half, y - half, 2 * half, 2 * half) for x, y in centres.values()]
    frame = axes.get_window_extent()
    for name, (x, y) in centres.items():
        beside = 1.6 * half
        width, height = (len(name) * 6.1 + 2) * scale, 11 * scale
        places = [
            (x + shift, y + (step - 0.5) * height, side)
            for step in (0, 1, -1, 2, -2, 3, -3, 4, -4)
            for shift, side in (
                (1.6 * half, "left"),
                (-1.6 * half - width, "right"),
                (-width / 2, "center"),
            )
            if side != "center" or step
        ]
        free = (
            (box, side)
            for left, bottom, side in places
            if _is_inside(box := Bbox.from_bounds(left, bottom, width, height), frame)
            and not box.count_overlaps(taken)
        )
        default = (Bbox.from_bounds(x + beside, y - height / 2, width, height), "left")
        box, side = next(free, default)
        taken.append(box)
        at = {"left": box.x0, "right": box.x1, "center": (box.x0 + box.x1) / 2}[side]
        left, middle = axes.transData.inverted().transform((at, (box.y0 + box.y1) / 2))
        axes.text(
            left,
            middle,
            name,
            ha=side,
            va="center",
            fontsize=9,
            weight="bold" if name == bold else "normal",
            parse_math=False,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            zorder=2,
        )


def _is_inside(box: BboxBase, frame: BboxBase) -> bool:
    return bool(frame.containsx(box.x0) and frame.containsx(box.x1)) and bool(
        frame.containsy(box.y0) and frame.containsy(box.y1)
    )


def search_curves(log: RunLog, tasks: Sequence[str], stage: str) -> bytes:
    """Curves of a search over branchings or operators: losses, cost, shares, temperature.

    Args:
        log: the run's log.
        tasks: whose losses to draw.
        stage: "branching" or "operators".
    """
    keys = dict.fromkeys(key for line in log.lines if line["stage"] == stage for key in line)
    panels: dict[str, Callable[[Axes], None]] = {
        "Loss": partial(_draw_losses, log, stage, ("weights", "alpha", "policy")),
        "Loss per task": partial(_draw_losses, log, stage, tasks),
    }
    shares = [f"policy/{choice}" for choice in CHOICES if f"policy/{choice}" in keys]
    for key in keys:
        group, _, name = key.partition("/")
        if group in GROUPS and key not in shares:
            panels[f"{GROUPS[group]}{name.replace('_', ' ')}"] = partial(_draw, log, stage, [key])
    if shares:
        panels["Mean probability of each choice"] = partial(_draw, log, stage, shares)
    if "temperature" in keys:
        panels["Temperature"] = partial(_draw_temperature, log, stage)
    columns = 2 if len(panels) == 4 else 3
    figure, grid = draw_panels(panels, columns=columns, inches=(WIDTH_INCHES / columns, 2.8))
    for axes in grid:
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
    return to_png(figure)


def _draw_losses(log: RunLog, stage: str, names: Sequence[str], axes: Axes) -> None:
    for name in names:
        steps, values = log.curve(stage, f"loss/{name}")
        if len(steps):
            running_mean(axes, steps, values, name)
    log_scale_if_wide(axes)


def _draw(log: RunLog, stage: str, keys: Sequence[str], axes: Axes) -> None:
    for key in keys:
        axes.plot(*log.curve(stage, key), label=key.split("/")[-1])
    axes.margins(y=0.15)


def _draw_temperature(log: RunLog, stage: str, axes: Axes) -> None:
    steps, values = log.curve(stage, "temperature")
    # Lines of steps of the weights alone may say 0.
    axes.plot(steps[values > 0], values[values > 0])
    axes.set_ylim(bottom=0)


def training_curves(log: RunLog) -> bytes | None:
    """Losses of the networks that were trained to be compared; None if none was logged."""
    stages = [name for name in log.stages("") if name.split(".")[0] not in SEARCHES]
    curves = {name: log.curve(name, "loss/weights") for name in stages}
    curves = {name: curve for name, curve in curves.items() if len(curve[0])}
    if not curves:
        return None

    def draw(axes: Axes) -> None:
        for name, (steps, values) in curves.items():
            running_mean(axes, steps, values, _stage_name(name))
        log_scale_if_wide(axes)
        axes.set_xlabel("step")
        axes.set_xlim(left=0)

    figure, _ = draw_panels(
        {"Loss when trained from scratch": draw}, columns=1, inches=(WIDTH_INCHES * 0.7, 3.6)
    )
    return to_png(figure)


def _stage_name(stage: str) -> str:
    return stage.removeprefix("retrain.").replace(".", ", ").replace("_", " ")
