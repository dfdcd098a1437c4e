"""Pictures of a comparison as PNG: anytime curves, Pareto plot, rewards and differences."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator

from oneshot_ednas.comparison.bootstrap import Difference
from oneshot_ednas.comparison.curves import Point, final_point, search_curve, trial_band
from oneshot_ednas.comparison.methods import Found, Method
from oneshot_ednas.report.plots import CYCLE, GREY, STYLE, draw_panels, to_png

MARKERS = "*DsoXP^v"
SIZES = {"*": 13.0}
RIM: Any = {"markeredgecolor": "white", "markeredgewidth": 0.5}
WIDE_INCHES = (5.6, 3.9)

Look = dict[str, tuple[str, str]]
"""Colour and marker of each method, by name; the same in all pictures."""
Kinds = dict[str, dict[str, Any]]
"""What kinds of lines and marks there are, each with the style of its sample in the legend.

Lines bear their kind as `gid`, so that a legend lists no kind that is not drawn.
"""
TRIALS, TRIAL, SUPERNET = "best trial so far", "trial", "with supernet weights"


def look_of(methods: Sequence[Method]) -> Look:
    """Colours and markers in the order of the methods; both begin anew when they run out."""
    return {
        method.name: (CYCLE[i % len(CYCLE)], MARKERS[i % len(MARKERS)])
        for i, method in enumerate(methods)
    }


def anytime_plots(
    methods: Sequence[Method], look: Look, *, macs_power: int, is_predicted: bool
) -> bytes:
    """Best reward so far against multiply-adds, in 10 to this power, and against seconds."""
    final = _final(is_predicted)

    def macs(point: Point) -> float:
        return point.cost.macs / 10**macs_power

    def seconds(point: Point) -> float:
        return point.cost.seconds

    def draw(axes: Axes, cost: Callable[[Point], float]) -> None:
        for method in methods:
            _anytime(axes, method, *look[method.name], cost, final)
        axes.set_xscale("log")
        # 0.1, 1, 10: no powers beside that of the unit.
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
        axes.margins(x=0.05, y=0.08)
        axes.set_ylabel("reward")

    figure, grid = draw_panels(
        {
            "Reward against training multiply-adds": lambda axes: draw(axes, macs),
            "Reward against training time": lambda axes: draw(axes, seconds),
        },
        columns=2,
        inches=WIDE_INCHES,
    )
    would = ", as it would have taken" if is_predicted else ""
    grid[0].set_xlabel(f"$10^{{{macs_power}}}$ multiply-adds{would}", parse_math=True)
    grid[1].set_xlabel(f"seconds{would or ', summed over workers'}")
    kinds: Kinds = {
        TRIALS: {"color": GREY},
        SUPERNET: {"color": GREY, "linestyle": ":", "marker": ".", "markersize": 7},
        final: {"color": GREY, "linestyle": "", "marker": "s", "markersize": 7},
    }
    return _with_legend(figure, methods, look, kinds)


def _final(is_predicted: bool) -> str:
    """How legends name the networks that were found."""
    return "pick, test split, predicted" if is_predicted else "retrained, test split"


def _anytime(
    axes: Axes,
    method: Method,
    colour: str,
    marker: str,
    cost: Callable[[Point], float],
    final: str,
) -> None:
    for found in method.found:
        points = search_curve(found)
        if points and not found.run.trials:
            line = [*map(cost, points)], _rewards(points)
            dotted: dict[str, Any] = {"markersize": 7, "linewidth": 1.2, "alpha": 0.8}
            axes.plot(*line, ".:", color=colour, gid=SUPERNET, **dotted)
    band = trial_band(method, cost)
    if band is not None:
        grid, mean, low, high = band
        axes.fill_between(grid, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
        axes.step(grid, mean, where="post", color=colour, gid=TRIALS)
    finals = [final_point(found) for found in method.found]
    where = [*map(cost, finals)], _rewards(finals)
    size = SIZES.get(marker, 8.0)
    axes.plot(*where, marker, color=colour, markersize=size, **RIM, zorder=3, gid=final)


def pareto_plots(
    methods: Sequence[Method], look: Look, target_ms: float, *, is_predicted: bool
) -> bytes:
    """Accuracy product against latency: what the searches saw, and what came of their picks."""

    def seen(axes: Axes) -> None:
        for method in methods:
            colour, marker = look[method.name]
            for found in method.found:
                _seen(axes, found, colour, marker)
        finish(axes)

    def picks(axes: Axes) -> None:
        for method in methods:
            colour, marker = look[method.name]
            latencies = [found.latency_ms for found in method.found]
            values = [found.accuracy for found in method.found]
            style: dict[str, Any] = {"color": colour, "markersize": SIZES.get(marker, 8.0)}
            axes.plot(latencies, values, marker, **RIM, **style)
        finish(axes)

    target = f"target, {target_ms:.4g} ms"

    def finish(axes: Axes) -> None:
        axes.axvline(target_ms, color=GREY, linestyle="--", linewidth=1.2, zorder=0, gid=target)
        axes.set_xlabel("latency, ms")
        axes.set_ylabel("accuracy product")
        axes.margins(0.06)

    figure, _ = draw_panels(
        {
            "What the searches saw, validation split": seen,
            f"Picks, {'predicted' if is_predicted else 'retrained'}, test split": picks,
        },
        columns=2,
        inches=WIDE_INCHES,
    )
    kinds: Kinds = {
        TRIAL: {"color": GREY, "linestyle": "", "marker": ".", "markersize": 6},
        SUPERNET: {
            "color": GREY,
            "linestyle": "",
            "marker": "o",
            "markerfacecolor": "none",
            "markersize": 4,
        },
        target: {"color": GREY, "linestyle": "--"},
    }
    return _with_legend(figure, methods, look, kinds)


def _seen(axes: Axes, found: Found, colour: str, marker: str) -> None:
    """The trials or candidates of a search as dots, and the one that it picked as a mark."""
    if found.search.macs == 0:
        return
    run, dots = found.run, list[tuple[str, float, float]]()
    for trial in run.trials:
        if trial.accuracy is not None:
            dots.append((str(trial.architecture), trial.latency_ms, trial.accuracy))
    style: dict[str, Any] = {"marker": ".", "markersize": 5, "alpha": 0.35, "markeredgewidth": 0}
    style["gid"] = TRIAL
    if not run.trials:
        dots = [("", one["latency_ms"], one["accuracy"]) for one in run.candidates]
        style = {"marker": "o", "markersize": 4, "markerfacecolor": "none", "alpha": 0.7}
        style["gid"] = SUPERNET
    axes.plot([x for _, x, _ in dots], [y for _, _, y in dots], linestyle="", color=colour, **style)
    # Candidates are ranked; a trial is known by its architecture.
    picked = [dot for dot in dots if dot[0] == found.figures["architecture"] or not run.trials]
    for _, x, y in picked[:1]:
        size = SIZES.get(marker, 8.0)
        axes.plot(x, y, marker, color=colour, markersize=size, markeredgecolor="black", zorder=4)


def reward_plots(
    methods: Sequence[Method],
    differences: Sequence[Difference],
    look: Look,
    *,
    is_predicted: bool,
) -> bytes:
    """The reward of every run, and the interval of every difference, if there is one."""
    labels = {method.name: method.label for method in methods}

    def rewards(axes: Axes) -> None:
        for row, method in enumerate(methods):
            colour, marker = look[method.name]
            values = [found.reward for found in method.found]
            size = SIZES.get(marker, 8.0)
            height = np.full(len(values), row)
            axes.plot([method.reward] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=2.4)
            axes.plot(values, height, marker, color=colour, ms=size, **RIM)
        _name_rows(axes, [method.label for method in methods])
        axes.set_xlabel("reward, one mark per run; line: mean")

    def intervals(axes: Axes) -> None:
        axes.axvline(0, color=GREY, linewidth=1.2)
        for row, one in enumerate(differences):
            colour = GREY if one.winner is None else look[one.winner][0]
            if one.low is not None and one.high is not None:
                axes.plot([one.low, one.high], [row, row], color=colour, linewidth=2.4)
            axes.plot(one.value, row, "o", color=colour, markersize=6)
        _name_rows(axes, [f"{labels[one.one]} against {labels[one.other]}" for one in differences])
        axes.set_xlabel("difference in reward, 95 % interval; grey: it holds 0")
        axes.xaxis.set_major_locator(MaxNLocator(5))

    rows = max(len(methods), len(differences))
    kind = "Predicted reward of the picks" if is_predicted else "Reward of retrained networks"
    panels = {f"{kind}, test split": rewards}
    if differences:
        panels["Differences"] = intervals
    figure, _ = draw_panels(
        panels,
        columns=len(panels),
        inches=(2 * WIDE_INCHES[0] / len(panels), max(2.4, 1.0 + 0.27 * rows)),
    )
    return to_png(figure)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _with_legend(figure: Figure, methods: Sequence[Method], look: Look, kinds: Kinds) -> bytes:
    """Methods in colour, and below them the kinds of lines and marks that are drawn, in grey."""
    lines = [line for axes in figure.axes for line in axes.lines]
    drawn = {line.get_gid() for line in lines if np.size(line.get_xdata())}
    with rc_context(STYLE):
        handles = []
        for method in methods:
            colour, marker = look[method.name]
            size = 0.8 * SIZES.get(marker, 8.0)
            handles.append(
                Line2D([], [], ls="", color=colour, marker=marker, ms=size, label=method.label)
            )
        handles += [
            Line2D([], [], label=label, **style) for label, style in kinds.items() if label in drawn
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
        return to_png(figure)


def _rewards(points: Sequence[Point]) -> np.ndarray:
    return np.array([point.reward for point in points])
