"""Pictures of a run as PNG: curves of its log, its candidates, and predictions beside targets."""

import io
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from torch import nn

from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.tasks import Task

BLUE, ORANGE, GREY, PALE = "#2166ac", "#d9822b", "#8a949e", "#eef1f4"
CYCLE = (BLUE, ORANGE, "#1b7f4d", "#8a5aa8", "#b3361b", "#4a9fb0", "#a08a2c", "#d06fa5")
STYLE: Any = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=CYCLE),
    "grid.color": "#e6eaee",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.5,
    "legend.handletextpad": 0.5,
    "lines.linewidth": 1.6,
    # Names of tasks, classes and networks may hold dollars, and are no formulas.
    "text.parse_math": False,
}
PIXELS_PER_INCH = 160
PANEL_INCHES = (3.9, 2.8)
MIN_CELL_PIXELS = 240
"""Width of a map in the picture of predictions; smaller maps are enlarged by a whole number."""
SMOOTHED_SHARE = 25
"""Losses are averaged over one such part of their curve."""


@dataclass(frozen=True, kw_only=True)
class RunPictures:
    """Some test frames with their targets and predictions."""

    images: list[np.ndarray]
    """uint8 [height, width, 3]."""
    targets: dict[str, list[np.ndarray]]
    """Per task, one frame of a batch each: [H, W], [1, H, W] or [3, H, W]."""
    predictions: dict[str, list[np.ndarray]]
    """Per task, in the layout of the targets."""

    @classmethod
    def taken(
        cls,
        network: nn.Module,
        split: PackedSplit,
        tasks: Mapping[str, Task],
        *,
        num_pictures: int,
        device: torch.device,
    ) -> "RunPictures":
        """Of evenly spaced frames, the same for every network on a split.

        Args:
            network: images to raw maps by task.
            split: the frames.
            tasks: the tasks.
            num_pictures: the most frames to show.
            device: where the network is.
        """
        rows = np.linspace(0, len(split) - 1, min(num_pictures, len(split)))
        indices = rows.astype(int)
        batch = split.batch(indices, device)
        with torch.inference_mode():
            outputs = network.eval()(batch["image"])
        size = (split.height, split.width)
        return cls(
            images=[split.frame(int(index))["image"] for index in indices],
            targets={
                name: [batch[name][i].cpu().numpy() for i in range(len(indices))] for name in tasks
            },
            predictions={
                name: list(task.predict(outputs[name], size).cpu().numpy())
                for name, task in tasks.items()
            },
        )


@dataclass(frozen=True)
class RunLog:
    """The lines of `metrics.jsonl`; not every line has every key."""

    lines: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> "RunLog":
        """Read what there is: no file is no lines, and a line torn by a crash is left out."""
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with suppress(ValueError, RecursionError):
                lines.append(json.loads(line))
        rows = (line for line in lines if isinstance(line, dict))
        return cls([row for row in rows if "stage" in row and "step" in row])

    def stages(self, prefix: str) -> list[str]:
        """Stages whose name begins so, in order of their first line."""
        return [s for s in dict.fromkeys(x["stage"] for x in self.lines) if s.startswith(prefix)]

    def curve(self, stage: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of the lines of a stage that have a key; NaN for null."""
        lines = [line for line in self.lines if line["stage"] == stage and key in line]
        values = [math.nan if line[key] is None else float(line[key]) for line in lines]
        return np.array([line["step"] for line in lines]), np.array(values)


def search_plots(
    log: RunLog,
    *,
    task_names: Sequence[str],
    target_ms: float,
    warmup_steps: int,
    max_entropy: float,
) -> bytes:
    """Curves of the search: losses, expected latency and mu, entropy and temperature.

    Args:
        log: the run's log.
        task_names: whose losses to draw.
        target_ms: the latency target, in ms.
        warmup_steps: steps before alpha moves; shaded.
        max_entropy: entropy of a uniform alpha, in nats.
    """

    def losses(axes: Axes, labels: Sequence[str]) -> None:
        for label in labels:
            running_mean(axes, *log.curve("search", f"loss/{label}"), label)
        log_scale_if_wide(axes)

    def latency(axes: Axes) -> None:
        axes.plot(*log.curve("search", "latency/expected_ms"), label="expected under alpha")
        axes.axhline(target_ms, color=ORANGE, linestyle="--", label="target")
        axes.margins(y=0.15)

    def mu(axes: Axes) -> None:
        axes.plot(*log.curve("search", "latency/mu"))
        axes.set_ylim(bottom=0)

    def entropy(axes: Axes) -> None:
        axes.plot(*log.curve("search", "alpha/entropy"), label="alpha")
        axes.axhline(max_entropy, color=GREY, linestyle=":", label="uniform")
        axes.set_ylim(0, 1.08 * max(max_entropy, 1e-6))

    def temperature(axes: Axes) -> None:
        steps, values = log.curve("search", "temperature")
        # Lines without an alpha step, such as those of the warm-up, say 0.
        axes.plot(steps[values > 0], values[values > 0])
        axes.set_ylim(bottom=0)

    panels: dict[str, Callable[[Axes], None]] = {
        "Loss": lambda axes: losses(axes, ("weights", "alpha")),
        "Loss per task": lambda axes: losses(axes, task_names),
        "Expected latency, ms": latency,
        "Weight of the latency term, mu": mu,
        "Entropy of alpha, nats": entropy,
        "Temperature": temperature,
    }
    figure, grid = draw_panels(panels)
    last = max((line["step"] for line in log.lines if line["stage"] == "search"), default=1)
    for axes in grid:
        axes.set_xlabel("step")
        axes.set_xlim(0, max(last, 1))
        if warmup_steps:
            axes.axvspan(0, min(warmup_steps, max(last, 1)), color=PALE, zorder=0)
    if warmup_steps:  # the temperature's panel is empty there
        grid[-1].annotate("warm-up", (0, 0), (4, 4), "axes fraction", "offset points", color=GREY)
    return to_png(figure)


def outcome_plots(
    log: RunLog,
    *,
    candidates: Sequence[Mapping[str, Any]],
    front: Sequence[Mapping[str, Any]],
    target_ms: float,
) -> bytes:
    """The Pareto front, the candidates' rewards, and the losses of training from scratch.

    Args:
        log: the run's log.
        candidates: of `candidates.json`, the derived one first.
        front: its `pareto_front`.
        target_ms: the latency target, in ms.
    """
    winner = candidates[0]

    def scatter(axes: Axes, key: str) -> None:
        others = candidates[1:]
        axes.axvline(target_ms, color=ORANGE, linestyle="--", label="target")
        axes.plot(
            [c["latency_ms"] for c in others],
            [c[key] for c in others],
            "o",
            color=BLUE,
            markerfacecolor="white",
            label="candidates",
        )
        axes.plot(winner["latency_ms"], winner[key], "*", color=BLUE, ms=13, label="derived")
        axes.set_xlabel("latency, ms")
        axes.margins(0.1)

    def pareto(axes: Axes) -> None:
        latencies = [point["latency_ms"] for point in front]
        scores = [point["log_probability"] for point in front]
        axes.step(latencies, scores, where="post", color=GREY, label="Pareto front")
        axes.plot(latencies, scores, ".", color=GREY, markersize=4)
        scatter(axes, "log_probability")

    def training(axes: Axes) -> None:
        for stage in [*log.stages("retrain."), *log.stages("baseline.")]:
            label = stage.removeprefix("baseline.").replace("retrain.", "derived, ")
            running_mean(axes, *log.curve(stage, "loss/weights"), label.replace("_", " "))
        axes.set_xlabel("step")
        axes.set_xlim(left=0)

    figure, _ = draw_panels(
        {
            "Log-probability under alpha": pareto,
            "Reward with supernet weights": lambda axes: scatter(axes, "reward"),
            "Loss when trained from scratch": training,
        }
    )
    return to_png(figure)


def prediction_mosaic(pictures: RunPictures, tasks: Mapping[str, Task]) -> bytes:
    """Per frame the image, and per task the target above the prediction.

    Raises:
        ValueError: if a task or a frame lacks a map.
    """
    _check_pictures(pictures, tasks)
    height, width, _ = pictures.images[0].shape
    scale, gap, top, left = -(-MIN_CELL_PIXELS // width), 6, 40, 26
    rows, columns = scale * height + gap, scale * width + gap
    num_frames = len(pictures.images)
    canvas = np.full(
        (2 * rows * num_frames + top, (2 + len(tasks)) * columns + left, 3), 255, dtype=np.uint8
    )

    def paste(picture: np.ndarray, row: int, x: int, zoom: int) -> None:
        large = picture.repeat(zoom, axis=0).repeat(zoom, axis=1)
        y = top + row * rows
        canvas[y : y + large.shape[0], x : x + large.shape[1]] = large

    for i, image in enumerate(pictures.images):
        paste(image, 2 * i, 0, 2 * scale)
        for j, (name, task) in enumerate(tasks.items()):
            pair = _pair(task, pictures.targets[name][i], pictures.predictions[name][i])
            for k, picture in enumerate(pair):
                paste(picture, 2 * i + k, left + (2 + j) * columns, scale)
    size = (canvas.shape[1] / 100, canvas.shape[0] / 100)
    with rc_context(STYLE):
        figure = Figure(figsize=size, dpi=100)
        figure.figimage(canvas, origin="upper")

        def write(text: str, x: int, y: int, **style: Any) -> None:
            at = x / canvas.shape[1], 1 - y / canvas.shape[0]
            figure.text(*at, text, ha="center", va="center", fontsize=13, **style)

        write("image", columns, top // 2, weight="bold", parse_math=False)
        for j, name in enumerate(tasks):
            middle = left + (5 + 2 * j) * columns // 2
            write(name, middle, top // 2, weight="bold", parse_math=False)
        for row in range(2 * num_frames):
            word = ("target", "prediction")[row % 2]
            x, y = 2 * columns + (left - gap) // 2, top + (2 * row + 1) * rows // 2
            write(word, x, y, rotation=90, color=GREY)
        return to_png(figure, dpi=100)


def _check_pictures(pictures: RunPictures, tasks: Mapping[str, Task]) -> None:
    count = len(pictures.images)
    for label, maps in (("targets", pictures.targets), ("predictions", pictures.predictions)):
        for name in tasks:
            if len(maps.get(name, ())) != count or not count:
                raise ValueError(
                    f"{label}: expected one map of task {name} for each of {count} images "
                    f"(at least one), got {len(maps.get(name, ()))}"
                )


def _pair(task: Task, target: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Target and prediction as RGB, in the same colours."""
    prediction = task.in_range_of(target, prediction)
    joined = task.picture(np.concatenate([target, prediction], axis=-1))
    middle = joined.shape[1] // 2
    return joined[:, :middle], joined[:, middle:]


def running_mean(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str) -> None:
    """Draw a curve faintly, and over it its mean over one `SMOOTHED_SHARE`-th of its length."""
    half = len(values) // (2 * SMOOTHED_SHARE)
    (line,) = axes.plot(steps, values, alpha=0.3 if half else 1.0, linewidth=1.0)
    # The window shrinks towards the ends, so that the mean starts and ends on the curve.
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, index[::-1]), half)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means = (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
    axes.plot(steps, means, color=line.get_color(), label=label)


def log_scale_if_wide(axes: Axes) -> None:
    """A logarithmic axis where curves of different size would flatten each other."""
    values = np.concatenate([[], *(np.asarray(line.get_ydata()) for line in axes.lines)])
    if values.size and (values > 0).all() and values.max() > 20 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")


def draw_panels(
    panels: Mapping[str, Callable[[Axes], None]],
    *,
    columns: int = 3,
    inches: tuple[float, float] = PANEL_INCHES,
) -> tuple[Figure, list[Axes]]:
    """Titled panels, some in a row, each of this width and height."""
    rows = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        size = (columns * inches[0], rows * inches[1])
        figure = Figure(figsize=size, layout="constrained")
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, draw) in zip(grid, panels.items(), strict=False):
            axes.set_title(title)
            draw(axes)
            count = len(axes.get_legend_handles_labels()[1])
            if count > 1:
                below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22)}
                axes.legend(**below, ncols=4 if count == 4 else 3)
            if not axes.collections and not any(len(line.get_xdata()) for line in axes.lines):
                axes.text(0.5, 0.5, "not logged", color=GREY, ha="center", transform=axes.transAxes)
    return figure, grid[: len(panels)]


def to_png(figure: Figure, dpi: int = PIXELS_PER_INCH) -> bytes:
    """The bytes of a PNG file of a figure."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the page beside it has the name.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
