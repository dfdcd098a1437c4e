"""A sheet of pictures of a data set: some frames with all their targets, as one PNG."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oneshot_ednas.data.dataset import DataSet
from oneshot_ednas.report.plots import GREY, STYLE, to_png
from oneshot_ednas.tasks import pictures

NUM_FRAMES = 6
CELL_INCHES = 2.6
LEGEND_COLUMN_INCHES = 1.55
LEGEND_ROW_INCHES = 0.2
RAMP_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class _Column:
    """Pictures of one target."""

    pictures: list[np.ndarray]
    """uint8 [height, width, 3] of each frame, in colours that mean the same in all."""
    values: tuple[float, float] | None
    """Range of the colours, for numbers."""
    ramp: np.ndarray | None
    """Colours from the lower to the upper end of the range."""


def choose_frames(
    data: DataSet, broken: Mapping[str, object], count: int = NUM_FRAMES
) -> list[tuple[str, str]]:
    """Split and id of some frames that can be read, spread over the splits.

    A split all of whose frames an earlier one lists is left out.
    """
    seen = set(broken)
    groups: dict[str, list[str]] = {}
    for split, frames in data.splits.items():
        groups[split] = [frame for frame in frames if frame not in seen]
        seen.update(frames)
    groups = {split: own for split, own in groups.items() if own}
    chosen = []
    for number, (split, own) in enumerate(groups.items()):
        share = (count * (number + 1)) // len(groups) - (count * number) // len(groups)
        at = (np.arange(share) * 2 + 1) * len(own) // max(2 * share, 1)
        chosen += [(split, own[i]) for i in np.unique(at)]
    return chosen


def data_sheet(
    data: DataSet, frames: Sequence[tuple[str, str]], occurring: Mapping[str, Sequence[int]]
) -> bytes:
    """A row for each frame: the image and its targets; below them what the colours mean.

    Depths, disparities and values have one scale of colours for all frames. Invalid pixels are
    black.

    Args:
        data: the data set.
        frames: split and id of each frame, see `choose_frames`.
        occurring: of each target with classes, those that its legend shows.

    Returns:
        A PNG file.

    Raises:
        ValueError: for no frames, or one that cannot be read.
    """
    if not frames:
        raise ValueError(f"no frame of {data.name} can be drawn")
    read = [data.read_stored(frame) for _, frame in frames]
    columns = {
        name: _column(data.target_kind(name), [frame[name] for frame in read], data, name)
        for name in data.targets
    }
    legends = {
        name: [(index, data.class_names(name)[index]) for index in occurring.get(name, ())]
        for name in data.targets
        if data.class_names(name)
    }
    legends = {name: entries for name, entries in legends.items() if entries}
    height, width = read[0]["image"].shape[:2]
    cell = (CELL_INCHES, CELL_INCHES * height / width)
    num_columns = 1 + len(columns)
    total_width = max(num_columns * cell[0], 4.0) + 0.3
    per_row = max(1, int((total_width - 0.4) // LEGEND_COLUMN_INCHES))
    legend_rows = {name: -(-len(entries) // per_row) for name, entries in legends.items()}
    below = [0.42]
    below += [0.3 + LEGEND_ROW_INCHES * rows for rows in legend_rows.values()]
    ratios = [cell[1] + 0.12] * len(frames) + below
    with rc_context(STYLE):
        figure = Figure(figsize=(total_width, sum(ratios) + 0.75))
        figure.suptitle(
            f"{data.name}, {data.layout}: {len(frames)} frames, invalid pixels black",
            x=0.15 / total_width,
            y=1 - 0.12 / figure.get_figheight(),
            ha="left",
            va="top",
            fontsize=11,
            parse_math=False,
        )
        grid = figure.add_gridspec(
            len(ratios),
            num_columns,
            height_ratios=ratios,
            left=0.3 / total_width,
            right=1 - 0.08 / total_width,
            top=1 - 0.68 / figure.get_figheight(),
            bottom=0.05 / figure.get_figheight(),
            wspace=0.03,
            hspace=0,
        )
        for row, ((split, frame_id), frame) in enumerate(zip(frames, read, strict=True)):
            cells = [frame["image"], *(column.pictures[row] for column in columns.values())]
            for number, picture in enumerate(cells):
                axes = figure.add_subplot(grid[row, number])
                _show(axes, picture)
                if row == 0:
                    name = ("image", *columns)[number]
                    kind = name if number == 0 else data.target_kind(name)
                    axes.set_title(name if name == kind else f"{name} ({kind})", parse_math=False)
                if number == 0:
                    axes.set_ylabel(f"{split}: {frame_id}", color=GREY, parse_math=False)
        for number, (name, column) in enumerate(columns.items(), start=1):
            holder = figure.add_subplot(grid[len(frames), number])
            holder.set_axis_off()
            key = _KEYS.get(data.target_kind(name))
            if key is not None:
                holder.text(0, 0.55, key, fontsize=8, transform=holder.transAxes)
            if column.ramp is not None:
                unit = " m" if data.target_kind(name) == "depth" else ""
                _draw_ramp(holder.inset_axes((0.06, 0.5, 0.88, 0.3)), column, unit)
        for number, (name, entries) in enumerate(legends.items()):
            axes = figure.add_subplot(grid[len(frames) + 1 + number, :])
            colours = pictures.class_colours(len(data.class_names(name)))
            _draw_legend(axes, name, entries, colours, per_row, legend_rows[name])
        return to_png(figure, dpi=110)


def _column(kind: str, maps: Sequence[np.ndarray], data: DataSet, name: str) -> _Column:
    if kind == "labels":
        count = len(data.class_names(name))
        drawn = [pictures.segmentation_picture(labels, count) for labels in maps]
        return _Column(pictures=drawn, values=None, ramp=None)
    if kind == "normals":
        drawn = [pictures.normals_picture(normals) for normals in maps]
        return _Column(pictures=drawn, values=None, ramp=None)
    if kind == "edges":
        drawn = [pictures.binary_picture(edges) for edges in maps]
        return _Column(pictures=drawn, values=None, ramp=None)
    # Drawn together, since colours span the range of what is drawn.
    numbers = np.concatenate([values.ravel() for values in maps])
    finite = numbers[np.isfinite(numbers) & ((numbers > 0) | (kind == "values"))]
    if not finite.size:
        blank = [np.zeros((*values.shape, 3), np.uint8) for values in maps]
        return _Column(pictures=blank, values=None, ramp=None)
    low, high = float(finite.min()), float(finite.max())
    space = np.linspace if kind == "values" else np.geomspace
    ramp = space(low, high, RAMP_SIZE).clip(low, high)
    colours = _NUMBER_PICTURES[kind](np.concatenate([numbers, ramp])[None])[0]
    ends = np.cumsum([values.size for values in maps])
    parts = np.split(colours[: ends[-1]], ends[:-1])
    return _Column(
        pictures=[part.reshape(*m.shape, 3) for part, m in zip(parts, maps, strict=True)],
        values=(low, high),
        ramp=colours[ends[-1] :],
    )


_NUMBER_PICTURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "depth": pictures.depth_picture,
    "disparity": pictures.disparity_picture,
    "values": pictures.heatmap_picture,
}
_KEYS = {"normals": "red right, green down, blue forward", "edges": "edges white, others dark grey"}
"""What the colours of a kind mean."""


def _show(axes: Axes, picture: np.ndarray) -> None:
    axes.imshow(picture, interpolation="nearest" if picture.shape[1] < 200 else "antialiased")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_ramp(axes: Axes, column: _Column, unit: str) -> None:
    assert column.ramp is not None
    assert column.values is not None
    axes.imshow(column.ramp[None], aspect="auto", interpolation="nearest")
    axes.set_yticks([])
    axes.grid(False)
    low, high = column.values
    axes.set_xticks([0, RAMP_SIZE - 1], [f"{low:.3g}{unit}", f"{high:.3g}{unit}"])
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_legend(
    axes: Axes,
    name: str,
    entries: Sequence[tuple[int, str]],
    colours: np.ndarray,
    per_row: int,
    rows: int,
) -> None:
    """Class colours column by column, in the order of the classes."""
    axes.set_axis_off()
    axes.set(xlim=(0, per_row), ylim=(rows + 1.4, 0))
    axes.text(
        0, 0.75, f"classes of {name}", weight="bold", fontsize=9, va="center", parse_math=False
    )
    for number, (index, label) in enumerate(entries):
        x, y = number // rows, 1.75 + number % rows
        axes.barh(y, 0.12, left=x, height=0.72, color=colours[index] / 255)
        axes.text(x + 0.16, y, label[:19], va="center", fontsize=8, parse_math=False)
