"""Whether every frame of a data set has all of its files. No torch."""

import os
import posixpath
from pathlib import Path

from oneshot_ednas.data.dataset import DataSet


def check_counterparts(data: DataSet) -> DataSet:
    """The data set itself, once each file that its splits and targets name is there.

    A layout calls it when it opens a folder: a file that is missing in the last frame would
    otherwise be found after hours of reading.

    Raises:
        ValueError: naming the first missing file and how many there are.
    """
    wanted = {
        path: (split, frame)
        for split, frames in data.splits.items()
        for frame in frames
        for path in data.files(frame, data.targets)
    }
    there = _files_in(data.root, {posixpath.dirname(path) for path in wanted})
    missing = [path for path in wanted if path not in there]
    if missing:
        split, frame = wanted[missing[0]]
        raise ValueError(
            f"{len(missing)} of {len(wanted)} files are missing, the first is {missing[0]} of "
            f"frame {frame} in split {split}; restore them or leave their frames out of the split"
        )
    return data


def _files_in(root: Path, folders: set[str]) -> set[str]:
    # A list per folder: asking for each file alone takes minutes on network drives.
    return {
        posixpath.join(folder, name)
        for folder in folders
        if (root / folder).is_dir()
        for name in os.listdir(root / folder)
    }
