"""Picture of what tasks share: a tree from the image, over groups of tasks, to their heads."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from oneshot_ednas.report.plots import CYCLE, GREY, STYLE, to_png

WIDTH_INCHES = 11.7
MIN_PITCH_INCHES = 0.44
"""Distance of two layers of a deep network; the picture grows beyond `WIDTH_INCHES` for it."""
ROW_INCHES = 0.62
OPTION_ROW_INCHES = 0.86
LANE_INCHES = 0.05
"""Distance of the lines of two tasks that run through one node."""
FONT_SIZE = 7.5
CHARACTER = 0.6
"""Width of a character in font sizes, on the safe side; of bold ones `BOLD` times that."""
BOLD = 1.12
INK = "#1d2733"


@dataclass(frozen=True)
class _Group:
    """Tasks that share a layer."""

    layer: int
    tasks: tuple[int, ...]
    """Indices, from top to bottom."""
    row: float
    """Where it stands, in rows of tasks from the top."""
    text: str
    """What stands in its node, if anything."""
    run: int
    """Number of layers from here on that the same tasks share; 0 if it is not the first."""


def branching_tree(
    tasks: Sequence[str],
    layers: Sequence[str],
    groupings: Sequence[Sequence[int]],
    options: Sequence[Mapping[int, str]] | None = None,
    image: np.ndarray | None = None,
) -> bytes:
    """The tree of a branched network from left to right, as in figure 3 of BMTAS.

    Each group of tasks has a node per layer, and each task a line in its colour through the nodes
    that it uses. Tasks are ordered so that no lines cross.

    Args:
        tasks: their names.
        layers: names of the encoder's layers, from the image on.
        groupings: per layer the group of each task; equal numbers share the layer.
        options: per layer and group what the layer is, such as "fused k5 e6 24".
        image: uint8 [height, width, 3], shown at the root.

    Returns:
        A PNG file.

    Raises:
        ValueError: for groupings that do not belong to the tasks and layers, or that join tasks
            that an earlier layer has parted.
    """
    check_groupings(tasks, layers, groupings)
    groups = _groups(groupings, options)
    row_inches = OPTION_ROW_INCHES if options else ROW_INCHES
    head = max(0.75, BOLD * _text_inches(max(tasks, key=len), FONT_SIZE) + 0.2)
    left, right = 1.15, head + 0.35
    pitch = max((WIDTH_INCHES - left - right) / len(layers), MIN_PITCH_INCHES)
    longest = max(_text_inches(name, FONT_SIZE) for name in layers)
    slanted = longest > pitch - 0.08
    top, bottom = 0.2, 0.3 + (0.72 * longest if slanted else 0.0)
    size = (left + len(layers) * pitch + right, top + len(tasks) * row_inches + bottom)
    with rc_context(STYLE):
        figure = Figure(figsize=size)
        # One unit is one inch, so that text and boxes can be laid out together.
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(size[1], 0))
        axes.set_axis_off()
        canvas = _Canvas(axes, tasks, left, pitch, top, row_inches)
        for index, name in enumerate(layers):
            place: dict[str, Any] = {"rotation": 40, "ha": "right"} if slanted else {"ha": "center"}
            axes.text(
                canvas.x(index) + (0.08 if slanted else 0),
                size[1] - bottom + 0.12,
                name,
                va="top",
                rotation_mode="anchor",
                color=GREY,
                fontsize=FONT_SIZE,
                parse_math=False,
                **place,
            )
        canvas.lines(groups, len(layers), size[0] - right)
        # One height for all, so that the label of a group stands above all of its nodes.
        height = max(canvas.node_height(group) for group in groups)
        for group in groups:
            canvas.node(group, height)
        canvas.root(image, 0.1, left - 0.3)
        first = size[0] - right + 0.2
        for row, task in enumerate(_order(groupings)):
            canvas.head(task, row, first, head)
        return to_png(figure)


def check_groupings(
    tasks: Sequence[str], layers: Sequence[str], groupings: Sequence[Sequence[int]]
) -> None:
    """Refuse groupings that are no tree of these tasks over these layers.

    Raises:
        ValueError: naming the layer.
    """
    if not tasks or not layers or len(groupings) != len(layers):
        raise ValueError(
            f"branching: expected a grouping of at least one task for each of {len(layers)} "
            f"layers, got {len(groupings)}"
        )
    before: Sequence[int] = [0] * len(tasks)
    for name, grouping in zip(layers, groupings, strict=True):
        if len(grouping) != len(tasks):
            raise ValueError(
                f"branching: layer {name}: expected a group for each of {len(tasks)} tasks, "
                f"got {len(grouping)}"
            )
        if len(set(zip(before, grouping, strict=True))) != len(set(grouping)):
            raise ValueError(
                f"branching: layer {name}: expected each group to be part of one group of the "
                f"layer before ({list(before)}), got {list(grouping)}"
            )
        before = grouping


def _order(groupings: Sequence[Sequence[int]]) -> list[int]:
    """Tasks from top to bottom: those that share stand together, those that share more closer."""
    return sorted(range(len(groupings[0])), key=lambda task: [layer[task] for layer in groupings])


def _groups(
    groupings: Sequence[Sequence[int]], options: Sequence[Mapping[int, str]] | None
) -> list[_Group]:
    order = _order(groupings)
    members = [
        {
            label: tuple(task for task in order if layer[task] == label)
            for label in dict.fromkeys(layer)
        }
        for layer in groupings
    ]
    groups = []
    for index, layer in enumerate(members):
        for label, tasks in layer.items():
            run = 0
            if index == 0 or tasks not in members[index - 1].values():
                run = sum(tasks in later.values() for later in members[index:])
            text = options[index].get(label, "") if options else ""
            row = fmean(order.index(task) for task in tasks)
            groups.append(_Group(index, tasks, row, text, run))
    return groups


def _text_inches(text: str, size: float) -> float:
    return len(text) * CHARACTER * size / 72


class _Canvas:
    """Axes in inches, with the places of layers and rows."""

    def __init__(
        self,
        axes: Axes,
        tasks: Sequence[str],
        left: float,
        pitch: float,
        top: float,
        row_inches: float,
    ) -> None:
        self.axes, self.tasks = axes, tasks
        self.left, self.pitch, self.top, self.row_inches = left, pitch, top, row_inches
        # Lines are level this far around the middle of a layer, and bend in between.
        self.reach = 0.39 * pitch
        self.half_width = min(self.reach, 0.42)

    def x(self, layer: int) -> float:
        return self.left + (layer + 0.5) * self.pitch

    def y(self, row: int | float) -> float:
        # Labels stand above the nodes, which therefore are below the middle of their row.
        return self.top + (row + 0.56) * self.row_inches

    def colour(self, task: int) -> str:
        return CYCLE[task % len(CYCLE)]

    def lines(self, groups: Sequence[_Group], num_layers: int, end: float) -> None:
        """A line per task: level through its nodes, slanted between them."""
        for task in range(len(self.tasks)):
            own = sorted((g for g in groups if task in g.tasks), key=lambda g: g.layer)
            middle = (len(self.tasks) - 1) / 2
            rank = _order_of(groups).index(task)
            xs = [self.left - 0.4, self.left - 0.08]
            ys = [self.y(middle) + self._lane(rank, len(self.tasks))] * 2
            for group in own:
                lane = self._lane(group.tasks.index(task), len(group.tasks))
                xs += [self.x(group.layer) - self.reach, self.x(group.layer) + self.reach]
                ys += [self.y(group.row) + lane] * 2
            xs += [end, end + 0.3]
            ys += [self.y(rank)] * 2
            self.axes.plot(xs, ys, color=self.colour(task), linewidth=2.2, zorder=1)

    def _lane(self, index: int, count: int) -> float:
        return (index - (count - 1) / 2) * LANE_INCHES

    def node_height(self, group: _Group) -> float:
        """Room for the lines of text and for those of the tasks."""
        lines, size = self._wrapped(group.text)
        return max(len(lines) * 1.22 * size / 72, len(group.tasks) * LANE_INCHES) + 0.09

    def node(self, group: _Group, tallest: float) -> None:
        """A box with the option, or a small one, and above the first of a group its tasks."""
        lines, size = self._wrapped(group.text)
        height = tallest if lines else self.node_height(group)
        width = 2 * self.half_width if lines else min(0.16, 2 * self.half_width)
        x, y = self.x(group.layer), self.y(group.row)
        only = self.colour(group.tasks[0]) if len(group.tasks) == 1 else INK
        self._box(x - width / 2, y - height / 2, width, height, edge=only, zorder=2)
        if lines:
            style: dict[str, Any] = {"ha": "center", "va": "center", "linespacing": 1.1}
            text = "\n".join(lines)
            self.axes.text(x, y, text, fontsize=size, zorder=3, parse_math=False, **style)
        if group.run:
            # From the left of this node to where lines bend behind the last one.
            room = (group.run - 1) * self.pitch + width / 2 + self.reach
            left = x - width / 2
            self.axes.text(
                left,
                y - tallest / 2 - 0.035,
                self._label(group.tasks, room),
                va="bottom",
                fontsize=FONT_SIZE,
                color=only,
                weight="bold",
                zorder=3,
                parse_math=False,
            )

    def _wrapped(self, text: str) -> tuple[list[str], float]:
        """Lines that fit a node, and their font size."""
        words = text.split()
        if not words:
            return [], FONT_SIZE
        room = (2 * self.half_width - 0.04) * 72 / CHARACTER
        longest = max(map(len, words))
        size = min(FONT_SIZE, room / longest)
        return textwrap.wrap(text, max(longest, int(room / size))), size

    def _label(self, tasks: Sequence[int], room: float) -> str:
        """The longest way to name the tasks for which there is room."""
        names, short = [self.tasks[i] for i in tasks], short_names(self.tasks)
        ways = [
            " + ".join(names),
            "+".join(short[i] for i in tasks),
            f"{len(tasks)} tasks" if len(tasks) > 1 else short[tasks[0]],
        ]
        fits = (way for way in ways if BOLD * _text_inches(way, FONT_SIZE) <= room)
        return next(fits, "")

    def root(self, image: np.ndarray | None, left: float, right: float) -> None:
        y, width = self.y((len(self.tasks) - 1) / 2), right - left
        if image is None:
            self._box(left, y - 0.2, width, 0.4, edge=INK, zorder=2)
        else:
            half = min(width * image.shape[0] / image.shape[1], 1.2) / 2
            place = (left, right, y + half, y - half)
            self.axes.imshow(image, extent=place, aspect="auto", zorder=2)
            y -= half + 0.1
        style: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 3}
        self.axes.text((left + right) / 2, y, "image", fontsize=FONT_SIZE, **style)

    def head(self, task: int, row: int, x: float, width: float) -> None:
        y, colour = self.y(row), self.colour(task)
        self._box(x, y - 0.13, width, 0.26, edge=colour, face=colour, zorder=2)
        style: dict[str, Any] = {
            "ha": "center",
            "va": "center",
            "color": "white",
            "weight": "bold",
            "zorder": 3,
        }
        name = self.tasks[task]
        self.axes.text(x + width / 2, y, name, fontsize=FONT_SIZE, parse_math=False, **style)

    def _box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        edge: str,
        zorder: int,
        face: str = "white",
    ) -> None:
        style = f"round,pad=0,rounding_size={min(0.06, height / 3, width / 3)}"
        patch = FancyBboxPatch((x, y), width, height, boxstyle=style, zorder=zorder)
        patch.set(facecolor=face, edgecolor=edge, linewidth=1.1)
        self.axes.add_patch(patch)


def _order_of(groups: Sequence[_Group]) -> list[int]:
    """Tasks from top to bottom, from the groups of the last layer."""
    last = max(group.layer for group in groups)
    leaves = sorted((group for group in groups if group.layer == last), key=lambda g: g.row)
    return [task for group in leaves for task in group.tasks]


def short_names(tasks: Sequence[str]) -> list[str]:
    """Each name cut after three letters, or after as many as tell it from the others."""
    for length in range(3, max(map(len, tasks), default=3)):
        cut = [name[:length] for name in tasks]
        if len(set(cut)) == len(cut):
            return cut
    return list(tasks)
