"""A data set at one size, written as a folder with a manifest. No torch.

Reading the folder gives the arrays that `DataSet.read_frame` gives of the source at that size:
images, labels and edges are lossless PNG; depth, disparity and values are float32 `.npy` in
their final unit; normals are float16 `.npy` in camera axes. 16-bit PNG would be smaller for
depth, but exact only for some sources. What was derived is stored, and so is the label map.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from oneshot_ednas.data.dataset import DataSet
from oneshot_ednas.data.manifest import MANIFEST_NAME, Manifest
from oneshot_ednas.data.parallel import Progress, chunks, run_chunks
from oneshot_ednas.data.sources import (
    DepthSource,
    DisparitySource,
    EdgesSource,
    FileSource,
    ImageSource,
    Intrinsics,
    LabelsSource,
    NormalsSource,
    TargetSource,
    ValuesSource,
)
from oneshot_ednas.data.targets import IGNORE
from oneshot_ednas.schema import dump_yaml, read_json, to_plain
from oneshot_ednas.store import write_bytes, write_json, write_text

SETTINGS_NAME = "prepare.json"
LEFT_OUT_NAME = "left_out.txt"
CHUNK = 4


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What is written. A folder is gone on with only under the same settings."""

    height: int
    """Rows of every frame."""
    width: int
    """Columns of every frame."""
    targets: tuple[str, ...] | None = None
    """The targets to write; None is all that the data set has."""
    splits: tuple[str, ...] | None = None
    """The splits to write; None is all that the data set has."""
    label_map: str | None = None
    """Name of a label map of `segmentation`; None keeps the stored classes."""

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(
                f"expected a height and a width of at least 1, got {self.height} and {self.width}"
            )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What was written."""

    num_frames: int
    """Frames in the folder."""
    num_kept: int
    """Those of them that an earlier call had written."""
    left_out: Mapping[str, str]
    """Broken frames and what is wrong with each."""


def prepare_data(
    data: DataSet,
    out: Path,
    config: PrepareConfig,
    *,
    skip_broken: bool = False,
    resume: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Write the frames of a data set, resized, into a folder with a manifest.

    Each file is written under another name and moved when whole, and the manifest is the last.

    Args:
        data: the source.
        out: the folder to write, absent or empty.
        config: what to write.
        skip_broken: leave broken frames out of the split files and list them in `left_out.txt`;
            else the first one ends the work.
        resume: keep what an earlier call with the same settings has written.
        workers: processes that read and write; None is one per processor, 1 is this process.
        progress: called with the frames done and the frames in all.

    Raises:
        ValueError: for an unknown split, target or label map, an empty split, a folder that is not
            empty, was made with other settings or lies inside the data folder, a broken frame.
        OSError: if a file cannot be written, as on a full disk; it names the file.
    """
    splits = data.splits if config.splits is None else config.splits
    frames_of = {split: data.frames(split) for split in splits}
    targets = tuple(data.targets) if config.targets is None else config.targets
    data.check_targets(targets)
    if config.label_map is not None:
        data.label_map(config.label_map)
    _open_folder(data, out, config, resume=resume)
    sources = {name: _written_source(data, name, config.label_map) for name in targets}
    work = partial(_write_frames, data, out, config, sources, skip_broken)
    frames = tuple(dict.fromkeys(frame for group in frames_of.values() for frame in group))
    left_out: dict[str, str] = {}
    num_kept = 0
    for kept, broken in run_chunks(
        work, chunks(tuple(frames), CHUNK), workers=workers, progress=progress
    ):
        num_kept += kept
        left_out |= broken
    kept_of = {s: [f for f in group if f not in left_out] for s, group in frames_of.items()}
    for split, kept_frames in kept_of.items():
        if not kept_frames:
            raise ValueError(
                f"every frame of split {split} is broken, for example "
                f"{left_out[frames_of[split][0]]}"
            )
        write_text(out / _split_file(split), "\n".join(kept_frames) + "\n")
    if left_out:
        write_text(out / LEFT_OUT_NAME, "".join(f"{line}\n" for line in left_out.values()))
    else:
        (out / LEFT_OUT_NAME).unlink(missing_ok=True)
    first = next(iter(kept_of.values()))[0]
    manifest = Manifest(
        name=data.name,
        image=_IMAGE,
        targets=sources,
        splits={split: _split_file(split) for split in kept_of},
        intrinsics=_scaled_intrinsics(data, first, config),
    )
    write_text(out / MANIFEST_NAME, dump_yaml(_spelt(manifest)))
    return Prepared(num_frames=len(frames) - len(left_out), num_kept=num_kept, left_out=left_out)


_IMAGE = ImageSource(folder="image", suffix=".png")


def _open_folder(data: DataSet, out: Path, config: PrepareConfig, *, resume: bool) -> None:
    """Make the folder, or see that what lies there may be gone on with."""
    if out.resolve().is_relative_to(data.root):
        raise ValueError(
            f"--out {out} lies inside the data folder {data.root}, which is only read; give a "
            f"folder elsewhere"
        )
    settings = json.loads(json.dumps(_settings(data, config)))  # as JSON gives them back
    path = out / SETTINGS_NAME
    if not (out.is_dir() and any(out.iterdir())):
        write_json(path, settings)
        return
    if not resume:
        raise ValueError(f"{out} is not empty; go on with --resume, or give another folder")
    if not path.is_file():
        raise ValueError(
            f"{out} has no {SETTINGS_NAME}, so it was not made by this command; give another folder"
        )
    held = read_json(path)
    if not isinstance(held, dict):
        raise ValueError(f"{path}: expected settings by name; give another folder")
    differing = [key for key in settings if settings[key] != held.get(key)]
    if differing:
        shown = (f"{key} was {held.get(key)}, is {settings[key]}" for key in differing)
        raise ValueError(
            f"{out} was made with other settings: {'; '.join(shown)}; give another folder"
        )


def _settings(data: DataSet, config: PrepareConfig) -> dict[str, Any]:
    return {
        **to_plain(config),
        "root": str(data.root),
        "sources": {
            name: to_plain(source) for name, source in {"image": data.image, **data.targets}.items()
        },
        "intrinsics": to_plain(data.intrinsics),
    }


def _write_frames(
    data: DataSet,
    out: Path,
    config: PrepareConfig,
    sources: Mapping[str, TargetSource],
    skip_broken: bool,
    frames: tuple[str, ...],
) -> tuple[int, dict[str, str]]:
    """Write some frames; returns how many were there, and what is wrong with broken ones."""
    num_kept = 0
    broken = {}
    for frame_id in frames:
        files: dict[str, FileSource] = {"image": _IMAGE}
        for name, source in sources.items():
            assert isinstance(source, FileSource)
            files[name] = source
        paths = {name: out / source.path(frame_id) for name, source in files.items()}
        if all(path.is_file() for path in paths.values()):
            num_kept += 1
            continue
        try:
            frame = data.read_frame(
                frame_id,
                height=config.height,
                width=config.width,
                targets=tuple(sources),
                label_map=config.label_map,
            )
        except ValueError as error:
            if not skip_broken:
                raise ValueError(f"{error} (or leave broken frames out: --skip-broken)") from None
            broken[frame_id] = " ".join(str(error).split())
            continue
        for name, path in paths.items():
            _write(path, frame[name])
    return num_kept, broken


def _write(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    if path.suffix == ".png":
        Image.fromarray(array).save(buffer, "PNG")
    else:
        np.save(buffer, array, allow_pickle=False)
    try:
        write_bytes(path, buffer.getvalue())
    except OSError as error:
        # The name of a file half written says nothing to a user.
        raise OSError(error.errno, error.strerror, str(path)) from None


def _written_source(data: DataSet, name: str, label_map: str | None) -> TargetSource:
    """How a target is stored in the new folder: in its final unit and axes."""
    kind = data.target_kind(name)
    if kind == "labels":
        classes = data.class_names(name, label_map)
        return LabelsSource(kind="labels", folder=name, suffix=".png", classes=classes)
    return _WRITTEN[kind](folder=name)


_WRITTEN: dict[str, Any] = {
    "edges": partial(EdgesSource, kind="edges", suffix=".png", ignore=float(IGNORE)),
    "depth": partial(DepthSource, kind="depth", suffix=".npy"),
    "disparity": partial(DisparitySource, kind="disparity", suffix=".npy"),
    "normals": partial(
        NormalsSource, kind="normals", suffix=".npy", axes=("right", "down", "forward")
    ),
    "values": partial(ValuesSource, kind="values", suffix=".npy"),
}
"""Of each row of `TARGET_KINDS` but labels; those have class names of their own."""


def _scaled_intrinsics(data: DataSet, frame: str, config: PrepareConfig) -> Intrinsics | None:
    """The camera in pixels of the new size; the centre of the first pixel is 0."""
    camera = data.intrinsics
    if camera is None:
        return None
    height, width = data.read_stored(frame, targets=())["image"].shape[:2]
    across, down = config.width / width, config.height / height
    return Intrinsics(
        fx=camera.fx * across,
        fy=camera.fy * down,
        cx=(camera.cx + 0.5) * across - 0.5,
        cy=(camera.cy + 0.5) * down - 0.5,
    )


def _split_file(split: str) -> str:
    return f"splits/{split}.txt"


def _spelt(manifest: Manifest) -> dict[str, Any]:
    """The manifest as a person would write it, without what is the default."""
    spelt = {"name": manifest.name, "image": _told(manifest.image), "splits": manifest.splits}
    spelt["targets"] = {name: _told(source) for name, source in manifest.targets.items()}
    if manifest.intrinsics is not None:
        spelt["intrinsics"] = to_plain(manifest.intrinsics)
    return spelt


def _told(source: Any) -> dict[str, Any]:
    return {
        field.name: to_plain(getattr(source, field.name))
        for field in fields(source)
        if field.default is MISSING or getattr(source, field.name) != field.default
        if field.default_factory is MISSING or getattr(source, field.name)
    }
