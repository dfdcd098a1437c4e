"""Which data set a run uses: the embedded streets, or a data folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from oneshot_ednas.data.dataset import with_num_classes
from oneshot_ednas.data.layouts import open_data
from oneshot_ednas.data.packed import PackedSplit, folder_split, streets_split
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.progress import counting_bar
from oneshot_ednas.tasks import Task


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images, their size, and how they are augmented."""

    source: Literal["streets", "folder"] = "streets"
    """`streets`: rendered by `data/streets.py`; `folder`: a data set on disk."""
    height: int
    """Rows of the images as the network sees them."""
    width: int
    train_frames: int | None = None
    """Streets: frames to render for training."""
    test_frames: int | None = None
    """Streets: frames to render for the final test."""
    root: str | None = None
    """Folder: where the data lies; the command line's --data sets it."""
    layout: str | None = None
    """Folder: one of `data.layouts.LAYOUTS`; null goes by the files that are there."""
    manifest: str | None = None
    """Folder: a manifest, if it is not `dataset.yaml` in the data folder."""
    label_map: str | None = None
    """Folder: a label map of the data set; null keeps the stored classes."""
    train_split: str = "train"
    test_split: str = "test"
    augment: AugmentConfig = AugmentConfig()
    workers: int | None = None
    """Processes that render or read; null is one per processor."""

    def __post_init__(self) -> None:
        """Each source needs its own settings and none of the other's."""
        if self.height < 16 or self.width < 16:
            raise ValueError(f"expected images of at least 16x16, got {self.height}x{self.width}")
        if self.train_split == self.test_split:
            raise ValueError(f"train_split and test_split are both {self.train_split}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers: expected at least 1, got {self.workers}")
        frames = (self.train_frames, self.test_frames)
        if self.source == "streets":
            if None in frames:
                raise ValueError("source streets needs train_frames and test_frames")
            for name in ("root", "layout", "manifest", "label_map"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} belongs to source folder, not to streets")
        elif frames != (None, None):
            raise ValueError("train_frames and test_frames belong to source streets")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


def load_data(config: DataConfig, tasks: Mapping[str, Task]) -> tuple[PackedSplit, PackedSplit]:
    """The training split and the test split.

    Args:
        config: what to load.
        tasks: the tasks; each needs its target.

    Raises:
        ValueError: for whatever is missing or wrong in the data, or a task without target.
        FileNotFoundError: if the data folder or the manifest is not there.
    """
    if config.source == "streets":
        assert config.train_frames is not None
        assert config.test_frames is not None
        counts = {config.train_split: config.train_frames, config.test_split: config.test_frames}

        def load(split: str, progress: Callable[[int, int], None]) -> PackedSplit:
            return streets_split(
                split,
                counts[split],
                height=config.height,
                width=config.width,
                workers=config.workers,
                progress=progress,
            )

    else:
        if config.root is None:
            raise ValueError("this config reads a data folder: name it with --data DIR")
        manifest = None if config.manifest is None else Path(config.manifest)
        data = open_data(Path(config.root), manifest=manifest, layout=config.layout)
        classes = {task.target: task.num_classes for task in tasks.values()}
        data = with_num_classes(data, {name: count for name, count in classes.items() if count})

        def load(split: str, progress: Callable[[int, int], None]) -> PackedSplit:
            return folder_split(
                data,
                split,
                height=config.height,
                width=config.width,
                label_map=config.label_map,
                targets={task.target for task in tasks.values()},
                workers=config.workers,
                progress=progress,
            )

    splits = []
    for name in (config.train_split, config.test_split):
        with counting_bar(f"preparing {name}") as progress:
            splits.append(load(name, progress))
    train, test = splits
    shared = set(train.sources) & set(test.sources)
    if shared:
        raise ValueError(
            f"{len(shared)} frames are in both {train.name} and {test.name}, for example "
            f"{min(shared)}; a test on frames that were trained on means nothing"
        )
    for split in (train, test):
        _check_tasks(split, tasks)
    return _by_task(train, tasks), _by_task(test, tasks)


def _check_tasks(split: PackedSplit, tasks: Mapping[str, Task]) -> None:
    for name, task in tasks.items():
        if task.target not in split.kinds:
            raise ValueError(
                f"task {name} has no target {task.target} in {split.name}; it has "
                f"{', '.join(split.kinds)}"
            )
        expected, found = task.row.target_kind, split.kinds[task.target]
        if found != expected:
            raise ValueError(
                f"task {name} is of kind {task.kind}, which learns from {expected}; "
                f"{task.target} of {split.name} has {found}"
            )
        names = split.class_names.get(task.target)
        count = task.num_classes
        if names is not None and count not in (None, len(names)):
            raise ValueError(
                f"task {name}: expected {count} classes, {task.target} of {split.name} has "
                f"{len(names)}; set num_classes, or choose another target or label map"
            )


def _by_task(split: PackedSplit, tasks: Mapping[str, Task]) -> PackedSplit:
    """The split with its targets under the names of the tasks that learn from them."""
    if all(task.target == name for name, task in tasks.items()):
        return split
    classes = {name: split.class_names.get(task.target, ()) for name, task in tasks.items()}
    return replace(
        split,
        arrays={"image": split.arrays["image"]}
        | {name: split.arrays[task.target] for name, task in tasks.items()},
        kinds={name: split.kinds[task.target] for name, task in tasks.items()},
        class_names={name: names for name, names in classes.items() if names},
    )
