"""The manifest of a data folder: where each target lies and how it is encoded. No torch.

The manifest is `dataset.yaml` in the data folder, or a file of its own for folders that must not
be written to; `configs/datasets/` ships one per known data set.
"""

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from oneshot_ednas.data import files
from oneshot_ednas.data.dataset import DataSet
from oneshot_ednas.data.sources import (
    FileSource,
    ImageSource,
    Intrinsics,
    TargetSource,
    check_relative,
)
from oneshot_ednas.schema import load_yaml

MANIFEST_NAME = "dataset.yaml"
LIST_BYTES = 2**28
"""A list of millions of frames has these; a larger file is none."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Layout of one data set, as a user writes it."""

    name: str
    """Used in results and in names of cache folders: letters, digits, `_`, `-` and `.`."""
    image: ImageSource
    splits: dict[str, str]
    """Text file of each split, one frame id a line."""
    targets: dict[str, TargetSource] = field(default_factory=dict)
    """By name; a config's task of the same name learns from it."""
    intrinsics: Intrinsics | None = None

    def __post_init__(self) -> None:
        for split, path in self.splits.items():
            check_relative(path, f"splits.{split}")
        # Refuses at the line of the manifest what a data set refuses.
        DataSet(
            name=self.name,
            layout="manifest",
            root=Path(),
            image=self.image,
            targets=self.targets,
            splits=dict.fromkeys(self.splits, ()),
            intrinsics=self.intrinsics,
        )


def open_manifest(root: Path, manifest: Path | None = None) -> DataSet:
    """Read a manifest and check that the data folder has what it names.

    Args:
        root: the data folder.
        manifest: the manifest, if it is not `dataset.yaml` in the data folder.

    Raises:
        ValueError: if the folder, the manifest, a sub-folder or a split file is missing, or the
            manifest is not valid; the message names the file and line.
    """
    if not root.is_dir():
        raise ValueError(f"no data folder {root}; give the folder that holds the data set")
    path = root / MANIFEST_NAME if manifest is None else manifest
    if not path.is_file():
        raise ValueError(f"no manifest {path}; write one as in configs/datasets/, or give its path")
    loaded = load_yaml(path, Manifest)
    for name, source in {"image": loaded.image, **loaded.targets}.items():
        if not isinstance(source, FileSource) or "{parent}" in source.folder:
            continue
        if not (root / source.folder).is_dir():
            raise ValueError(f"no folder {source.folder} for {name} in {root}, named in {path}")
    return DataSet(
        name=loaded.name,
        layout=f"manifest {path.name}",
        root=root.resolve(),
        image=loaded.image,
        targets=loaded.targets,
        splits={
            split: read_frame_list(root, file, named_in=path)
            for split, file in loaded.splits.items()
        },
        intrinsics=loaded.intrinsics,
    )


def read_frame_list(root: Path, relative: str, *, named_in: Path | None = None) -> tuple[str, ...]:
    """Frame ids of a text file, one a line.

    Args:
        root: the data folder.
        relative: the file below it.
        named_in: what names the file, for the message.

    Raises:
        ValueError: for a missing, empty or very large file, text that is not UTF-8, a link or a
            frame that leaves the data folder, a frame that is listed twice.
    """
    path = root / relative
    if not path.is_file():
        source = f", named in {named_in}" if named_in is not None else ""
        raise ValueError(f"no file {relative} for a split in {root}{source}")
    files.check_inside(root.resolve(), path, relative)
    if path.stat().st_size > LIST_BYTES:
        raise ValueError(f"{relative}: expected at most {LIST_BYTES} bytes of frame ids")
    try:
        # Some editors begin a file with a byte order mark; other breaks than \n may be in names.
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{relative}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    # One spelling of each path: ./a is a, or one frame could be in two splits.
    frames = tuple(str(PurePosixPath(line.strip())) for line in lines if line.strip())
    if not frames:
        raise ValueError(f"{relative}: expected one frame id a line, got an empty file")
    seen: set[str] = set()
    for frame in frames:
        check_relative(frame, f"{relative}: frame")
        if frame in seen:
            raise ValueError(f"{relative}: frame {frame} is listed twice; keep one")
        seen.add(frame)
    return frames
