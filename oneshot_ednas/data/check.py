"""What a data set holds, and what is wrong with it: every frame read once. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import combinations
from operator import add
from typing import Any

from oneshot_ednas.data.dataset import DataSet
from oneshot_ednas.data.parallel import Progress, chunks, run_chunks
from oneshot_ednas.data.statistics import (
    QUANTILES,
    Classes,
    Directions,
    FrameSums,
    Numbers,
    TargetSums,
    frame_sums,
    inverse_log_weights,
    median_frequency_weights,
)
from oneshot_ednas.data.targets import PLAUSIBLE_MEDIAN_M, TARGET_KINDS, is_in_metres

CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class SplitCheck:
    """One split."""

    num_frames: int
    num_broken: int
    sums: FrameSums | None
    """Over the frames that can be read; None if there are none."""


@dataclass(frozen=True, kw_only=True)
class SharedFrames:
    """Two splits that list the same frames."""

    splits: tuple[str, str]
    num_frames: int
    example: str
    part: str | None
    """The split all of whose frames the other one has too."""

    @property
    def is_by_design(self) -> bool:
        """Whether names say that one is a part of the other, as `train_fit` is of `train`."""
        words = (re.findall("[a-z]+", split.lower()) for split in self.splits)
        first, second = words
        named = any(a in b or b in a for a in first for b in second)
        return self.part is not None and named

    def __str__(self) -> str:
        first, second = self.splits
        which = f"all of {self.part}" if self.part else f"for example {self.example}"
        return f"{self.num_frames} frames are in both {first} and {second} ({which})"


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """What was found."""

    data: DataSet
    splits: Mapping[str, SplitCheck]
    broken: Mapping[str, tuple[str, ...]]
    """What is wrong with each broken frame, one line for each file."""
    shared: tuple[SharedFrames, ...]
    warnings: tuple[str, ...]

    def figures(self) -> dict[str, Any]:
        """All of it, fit for JSON."""
        return {
            "name": self.data.name,
            "layout": self.data.layout,
            "root": str(self.data.root),
            "notes": list(self.data.notes),
            "splits": {
                name: {
                    "frames": split.num_frames,
                    "broken_frames": split.num_broken,
                    **({} if split.sums is None else sums_figures(split.sums, self.data)),
                }
                for name, split in self.splits.items()
            },
            "shared_frames": [
                {
                    "splits": list(shared.splits),
                    "frames": shared.num_frames,
                    "example": shared.example,
                    "part": shared.part,
                }
                for shared in self.shared
            ],
            "broken": {frame: list(lines) for frame, lines in self.broken.items()},
            "warnings": list(self.warnings),
        }


def check_data(
    data: DataSet, *, workers: int | None = None, progress: Progress | None = None
) -> DataCheck:
    """Read every frame of every split once, and go on after broken ones.

    Args:
        data: the data set.
        workers: processes that read; None is one per processor, 1 is this process.
        progress: called with the frames done and the frames in all.
    """
    # Frames in the same splits are summed together, and each frame is read once.
    splits_of: dict[str, tuple[str, ...]] = {}
    for split, frames in data.splits.items():
        for frame in frames:
            splits_of[frame] = (*splits_of.get(frame, ()), split)
    groups: dict[tuple[str, ...], list[str]] = {}
    for frame, splits in splits_of.items():
        groups.setdefault(splits, []).append(frame)
    jobs = [
        (splits, job) for splits, group in groups.items() for job in chunks(tuple(group), CHUNK)
    ]
    sums: dict[str, FrameSums] = {}
    broken: dict[str, tuple[str, ...]] = {}
    results = run_chunks(
        partial(_check_frames, data), [job for _, job in jobs], workers=workers, progress=progress
    )
    for (splits, _), (found, wrong) in zip(jobs, results, strict=True):
        broken |= wrong
        if found is None:
            continue
        for split in splits:
            sums[split] = sums[split] + found if split in sums else found
    checked = {
        split: SplitCheck(
            num_frames=len(frames),
            num_broken=sum(frame in broken for frame in frames),
            sums=sums.get(split),
        )
        for split, frames in data.splits.items()
    }
    shared = shared_frames(data.splits)
    return DataCheck(
        data=data,
        splits=checked,
        broken={frame: broken[frame] for frame in splits_of if frame in broken},
        shared=shared,
        warnings=(*_split_warnings(checked), *_leaks(shared), *_target_warnings(checked)),
    )


def sum_split(
    data: DataSet,
    split: str,
    *,
    label_map: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> FrameSums:
    """The sums of all frames of a split.

    Args:
        data: the data set.
        split: one of its splits.
        label_map: name of a label map of `segmentation`; None keeps the stored classes.
        workers: processes that read; None is one per processor, 1 is this process.
        progress: called with the frames done and the frames in all.

    Raises:
        ValueError: for an unknown or empty split, an unknown label map, the first broken frame.
    """
    jobs = chunks(data.frames(split), CHUNK)
    if label_map is not None:
        data.label_map(label_map)
    work = partial(_sum_frames, data, label_map)
    return reduce(add, run_chunks(work, jobs, workers=workers, progress=progress))


def shared_frames(splits: Mapping[str, Sequence[str]]) -> tuple[SharedFrames, ...]:
    """Each pair of splits with frames in common."""
    found = []
    for (first, a), (second, b) in combinations(splits.items(), 2):
        common = set(a) & set(b)
        if common:
            smaller, count = min((second, len(set(b))), (first, len(set(a))), key=lambda x: x[1])
            found.append(
                SharedFrames(
                    splits=(first, second),
                    num_frames=len(common),
                    example=min(common),
                    part=smaller if count == len(common) else None,
                )
            )
    return tuple(found)


def sums_figures(sums: FrameSums, data: DataSet, *, label_map: str | None = None) -> dict[str, Any]:
    """The statistics of some frames, fit for JSON; null where nothing is valid."""
    return {
        "sizes": {f"{w}x{h}": count for (h, w), count in sorted(sums.sizes.items())},
        "image": {
            "mean": (sums.image.mean / 255).tolist(),
            "std": (sums.image.std / 255).tolist(),
        },
        "targets": {
            name: _target_figures(target, data.class_names(name, label_map))
            for name, target in sums.targets.items()
        },
    }


def _target_figures(sums: TargetSums, class_names: Sequence[str]) -> dict[str, Any]:
    found = sums.found
    figures: dict[str, Any] = {
        "kind": sums.kind,
        "invalid_rule": TARGET_KINDS[sums.kind].rule,
        "invalid_share": 1 - sums.num_valid / sums.num_pixels,
        "frames_without_valid_pixel": sums.num_empty_frames,
    }
    count = max(sums.num_valid, 1)
    if isinstance(found, Classes) and class_names:
        weights = zip(
            class_names,
            found.pixels.tolist(),
            median_frequency_weights(found, len(class_names)),
            inverse_log_weights(found, len(class_names)),
            strict=False,
        )
        return figures | {
            "classes": {
                name: {
                    "share": pixels / count,
                    "median_frequency_weight": median_frequency,
                    "inverse_log_weight": inverse_log,
                }
                for name, pixels, median_frequency, inverse_log in weights
            }
        }
    if isinstance(found, Classes):
        return figures | {"edge_share": int(found.pixels[1]) / count}
    if not sums.num_valid:
        return figures
    if isinstance(found, Numbers):
        return figures | {
            "minimum": found.minimum,
            "maximum": found.maximum,
            "mean": float(found.moments.mean[0]),
            "std": float(found.moments.std[0]),
            "median": found.quantile(0.5),
            "percentiles": {f"{100 * q:g}": found.quantile(q) for q in QUANTILES},
        }
    return figures | {
        "mean_length": found.total_length / count,
        "mean_direction": found.moments.mean.tolist(),
        "towards_camera_share": found.num_facing / count,
    }


def _check_frames(
    data: DataSet, frames: tuple[str, ...]
) -> tuple[FrameSums | None, dict[str, tuple[str, ...]]]:
    """Sums of the frames that can be read, and what is wrong with the others."""
    sums: FrameSums | None = None
    broken = {}
    for frame in frames:
        try:
            found = frame_sums(data, frame)
        except ValueError as error:
            broken[frame] = _all_errors(data, frame) or (str(error),)
        else:
            sums = found if sums is None else sums + found
    return sums, broken


def _all_errors(data: DataSet, frame: str) -> tuple[str, ...]:
    """Reading stops at the first wrong file of a frame; this tells all of them."""
    errors: dict[str, None] = {}
    for targets in ((), *((name,) for name in data.targets)):
        try:
            data.read_stored(frame, targets=targets)
        except ValueError as error:
            errors[" ".join(str(error).split())] = None
    return tuple(errors)


def _sum_frames(data: DataSet, label_map: str | None, frames: tuple[str, ...]) -> FrameSums:
    return reduce(add, (frame_sums(data, frame, label_map=label_map) for frame in frames))


def _split_warnings(splits: Mapping[str, SplitCheck]) -> list[str]:
    return [f"split {name} is empty" for name, split in splits.items() if not split.num_frames]


def _leaks(shared: Sequence[SharedFrames]) -> list[str]:
    return [
        f"{pair}; if one is your test split, it means nothing after training on the other"
        for pair in shared
        if not pair.is_by_design
    ]


def _target_warnings(splits: Mapping[str, SplitCheck]) -> list[str]:
    """What holds of several splits is said once, of all of them."""
    found: dict[str, list[str]] = {}
    for split, check in splits.items():
        for name, sums in check.sums.targets.items() if check.sums is not None else ():
            message = _implausible(name, sums)
            if message:
                found.setdefault(message, []).append(split)
    return [f"{', '.join(names)}: {message}" for message, names in found.items()]


def _implausible(name: str, sums: TargetSums) -> str | None:
    found = sums.found
    if not sums.num_valid:
        return f"{name} has no valid pixel; compare what is stored with the invalid values"
    if isinstance(found, Numbers) and sums.kind == "depth":
        low, high = PLAUSIBLE_MEDIAN_M
        median = found.quantile(0.5)
        if is_in_metres(median, found.maximum):
            return None
        span = f"{name} is {found.minimum:.4g} to {found.maximum:.4g} m, median {median:.3g} m"
        if median > high:
            return f"{span}: millimetres read as metres? Then set its scale to 0.001"
        if median < low:
            return f"{span}: not in metres? Correct its scale, or make it a disparity"
        return f"{span}: invalid values taken for depths? Correct them, or set max_metres"
    if isinstance(found, Directions) and found.num_facing < sums.num_valid / 2:
        away = 1 - found.num_facing / sums.num_valid
        return f"{name}: {away:.0%} of the normals point away from the camera; correct its axes"
    return None
