"""Pictures of what tasks share as PNG: probabilities of groupings, routes and policies."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from oneshot_ednas.report.branching_tree import WIDTH_INCHES, branching_tree, short_names
from oneshot_ednas.report.plots import BLUE, GREY, ORANGE, STYLE, to_png
from oneshot_ednas.report.sharing_curves import search_curves, tradeoff_plot, training_curves
from oneshot_ednas.sharing.policy import CHOICES

__all__ = [
    "branching_tree",
    "correlation_heatmap",
    "grouping_heatmap",
    "policy_heatmaps",
    "route_heatmaps",
    "search_curves",
    "sharing_pattern",
    "tradeoff_plot",
    "training_curves",
]

MAX_GROUPINGS = 12
MAX_TICKS = 50
"""More columns than these are named in part."""
MAX_NAMES = 30
"""With more letters than these together, tasks are abbreviated in groupings."""
COLOURS = "magma"
"""Bright is probable."""
CHOICE_COLOURS = {"shared": BLUE, "own": ORANGE, "skip": "#e4e8ec"}


def grouping_heatmap(
    layers: Sequence[str],
    grouping_probabilities: Sequence[Mapping[str, float]],
    tasks: Sequence[str],
    chosen: Sequence[Sequence[int]] | None = None,
) -> bytes:
    """Probability of each grouping of the tasks at each layer: the chosen and most probable ones.

    Args:
        layers: names of the layers.
        grouping_probabilities: per layer the probability of each grouping, such as "0,0,1".
        tasks: their names.
        chosen: the grouping of each layer that was derived; gets a mark.

    Raises:
        ValueError: if there is none for a layer, or one does not group the tasks.
    """
    _check_count("grouping_probabilities", grouping_probabilities, layers, "layers")
    totals: dict[str, float] = {}
    for layer in grouping_probabilities:
        for key, probability in layer.items():
            totals[key] = totals.get(key, 0.0) + probability
    marked = [",".join(map(str, grouping)) for grouping in chosen or ()]
    totals = dict.fromkeys(marked, 0.0) | totals
    shown = sorted(totals, key=lambda key: (key not in marked, -totals[key], key))
    names = [_grouping_name(key, tasks) for key in shown]
    values = np.array([[layer.get(key, 0.0) for layer in grouping_probabilities] for key in shown])
    if len(shown) > MAX_GROUPINGS:
        rest = values[MAX_GROUPINGS:].sum(axis=0, keepdims=True)
        values = np.concatenate([values[:MAX_GROUPINGS], rest])
        names = [*names[:MAX_GROUPINGS], f"{len(shown) - MAX_GROUPINGS} others, summed"]
    with rc_context(STYLE):
        figure, (axes,) = _rows(1, 0.75 + 0.27 * len(names))
        _heatmap(axes, values, names, layers)
        for column, key in enumerate(marked):
            row = min(shown.index(key), len(names) - 1)
            axes.plot(column, row, "s", color="white", markeredgecolor="black", ms=6)
        _colour_bar(figure, [axes])
        return to_png(figure)


def route_heatmaps(
    tasks: Sequence[str],
    layers: Sequence[str],
    probabilities: Sequence[Sequence[Sequence[float]]],
) -> bytes:
    """How probably each task takes each candidate of each layer, one panel per task.

    Args:
        tasks: their names.
        layers: names of the layers.
        probabilities: per task, layer and candidate; layers may differ in their candidates.

    Raises:
        ValueError: if there is none for a task or a layer.
    """
    _check_count("probabilities", probabilities, tasks, "tasks")
    for route in probabilities:
        _check_count("probabilities", route, layers, "layers")
    count = max(len(options) for route in probabilities for options in route)
    with rc_context(STYLE):
        figure, grid = _rows(len(tasks), 0.35 + 0.2 * count, last=0.5)
        for axes, name, route in zip(grid, tasks, probabilities, strict=True):
            values = np.full((count, len(layers)), np.nan)
            for column, options in enumerate(route):
                values[: len(options), column] = options
            numbers = [str(i + 1) for i in range(count)]
            _heatmap(axes, values, numbers, layers if axes is grid[-1] else ())
            axes.set_title(name, parse_math=False)
            axes.set_ylabel("candidate")
        _colour_bar(figure, grid)
        return to_png(figure)


def policy_heatmaps(
    tasks: Sequence[str],
    operators: Sequence[str],
    probabilities: Float[np.ndarray, "tasks operators 3"],
) -> bytes:
    """How probably each task shares, owns and skips each operator, as in figure 5 of AutoMTL.

    Args:
        tasks: their names.
        operators: their names, in the order of the network.
        probabilities: of shared, own and skip.

    Raises:
        ValueError: if there is none for a task or an operator.
    """
    _check_count("probabilities", probabilities, tasks, "tasks")
    _check_count("probabilities", probabilities[0], operators, "operators")
    with rc_context(STYLE):
        figure, grid = _rows(len(tasks), 0.85, last=_names_inches(operators))
        for axes, name, policy in zip(grid, tasks, probabilities, strict=True):
            _heatmap(axes, policy.T, CHOICES, operators if axes is grid[-1] else ())
            axes.set_title(name, parse_math=False)
        _colour_bar(figure, grid)
        return to_png(figure)


def sharing_pattern(
    tasks: Sequence[str], operators: Sequence[str], policy: Sequence[Sequence[str]]
) -> bytes:
    """What each task does with each operator: a row of coloured cells per task.

    Args:
        tasks: their names.
        operators: their names, in the order of the network.
        policy: per task and operator "shared", "own" or "skip".

    Raises:
        ValueError: if there is none for a task or an operator, or another word.
    """
    _check_count("policy", policy, tasks, "tasks")
    for name, row in zip(tasks, policy, strict=True):
        _check_count("policy", row, operators, "operators")
        unknown = set(row) - set(CHOICES)
        if unknown:
            raise ValueError(
                f"policy: task {name}: expected {', '.join(CHOICES)}, got {min(unknown)!r}"
            )
    values = np.array([[CHOICES.index(word) for word in row] for row in policy])
    with rc_context(STYLE):
        figure, (axes,) = _rows(1, 0.75 + 0.32 * len(tasks) + _names_inches(operators))
        colours = ListedColormap([CHOICE_COLOURS[word] for word in CHOICES])
        axes.pcolormesh(values, cmap=colours, vmin=-0.5, vmax=2.5, edgecolors="white", linewidth=1)
        axes.invert_yaxis()
        _names(axes, tasks, operators, offset=0.5)
        keys = [Patch(color=CHOICE_COLOURS[word], label=word) for word in CHOICES]
        axes.legend(handles=keys, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderpad=0.2)
        return to_png(figure)


def correlation_heatmap(tasks: Sequence[str], matrix: Float[np.ndarray, "tasks tasks"]) -> bytes:
    """How similar the policies of each two tasks are, as numbers in coloured cells.

    Args:
        tasks: their names.
        matrix: similarity, 1 for the same policy.

    Raises:
        ValueError: for a matrix of other tasks.
    """
    if matrix.shape != (len(tasks), len(tasks)):
        raise ValueError(
            f"correlation: expected {len(tasks)} x {len(tasks)} values, got shape {matrix.shape}"
        )
    side = 1.5 + 0.62 * len(tasks)
    with rc_context(STYLE):
        figure = Figure(figsize=(side + 1.4, side), layout="constrained")
        axes = figure.subplots()
        # Similarities of policies that were trained for long lie far above 0.
        low = min(float(matrix.min()), 0.5)
        drawn = axes.imshow(matrix, cmap="Blues", vmin=low, vmax=1)
        _names(axes, tasks, tasks, slanted=True)
        for (row, column), value in np.ndenumerate(matrix):
            colour = "white" if (value - low) / (1 - low) > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
        figure.colorbar(drawn, ax=axes, pad=0.02).outline.set_visible(False)
        return to_png(figure)


def _rows(count: int, inches: float, *, last: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Axes above each other, each of this height and the last with more for its names."""
    size = (WIDTH_INCHES, count * inches + last)
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(count, 1, squeeze=False).flat)


def _heatmap(axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.imshow(values, cmap=COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_facecolor("#d5dae0")  # where there is no value
    _names(axes, rows, columns)


def _names(
    axes: Axes,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    offset: float = 0.0,
    slanted: bool = False,
) -> None:
    """Name rows and columns; many columns only in part, long names of columns upright."""
    axes.grid(False)
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_yticks(np.arange(len(rows)) + offset, rows, parse_math=False)
    every = -(-len(columns) // MAX_TICKS) if columns else 1
    kept = range(0, len(columns), every)
    style: dict[str, Any] = {}
    if slanted or _are_wide(columns):
        angle = 90 if len(kept) > 24 else 40
        style = {"rotation": angle, "ha": "right", "rotation_mode": "anchor"}
        if angle == 90:
            style["va"] = "center"
    labels = [columns[i] for i in kept]
    axes.set_xticks(np.array(kept) + offset, labels, parse_math=False, **style)
    if every > 1:
        axes.set_xlabel(f"1 in {every} of {len(columns)} is named", color=GREY, fontsize=8)


def _are_wide(columns: Sequence[str]) -> bool:
    """Whether names of columns would run into each other."""
    kept = min(len(columns), MAX_TICKS)
    return kept > 0 and max(map(len, columns)) * 0.075 > 0.85 * WIDTH_INCHES / kept


def _names_inches(columns: Sequence[str]) -> float:
    return 0.25 + (0.07 * max(map(len, columns)) if _are_wide(columns) else 0.0)


def _colour_bar(figure: Figure, grid: Sequence[Axes]) -> None:
    bar = figure.colorbar(grid[0].images[0], ax=list(grid), pad=0.01, aspect=14, fraction=0.03)
    bar.outline.set_visible(False)
    bar.set_label("probability")


def _grouping_name(key: str, tasks: Sequence[str]) -> str:
    """Groups as names: "seg dep | nor"."""
    labels = key.split(",")
    if len(labels) != len(tasks):
        raise ValueError(
            f"grouping_probabilities: expected a group for each of {len(tasks)} tasks, got {key!r}"
        )
    names = tasks if sum(map(len, tasks)) < MAX_NAMES else short_names(tasks)
    groups = [
        " ".join(name for name, own in zip(names, labels, strict=True) if own == label)
        for label in dict.fromkeys(labels)
    ]
    return " | ".join(groups)


def _check_count(what: str, given: Any, expected: Sequence[str], of: str) -> None:
    if not expected or len(given) != len(expected):
        raise ValueError(f"{what}: expected values of {len(expected)} {of}, got {len(given)}")
