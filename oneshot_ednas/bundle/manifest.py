"""What a bundle folder holds, as data: `manifest.json`, and what the compiler reported.

A bundle is a folder with one or more `.tflite` files per operation of a search space, whole
networks of that space, the space itself, the stand-alone `measure.py`, and the manifest.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.latency.operations import OPERATION_KINDS, Operation
from oneshot_ednas.parsing import parse_json
from oneshot_ednas.schema import load_json, to_plain
from oneshot_ednas.space import SearchSpace

FORMAT = 1
MIN_NETWORKS = 16
"""Whole networks without which neither the terms of a table nor its error would mean anything."""
MANIFEST, SPACE, COMPILED = "manifest.json", "space.yaml", "compiled.jsonl"

Layout = Literal["chain", "sum", "ladder"]
"""How the copies of an operation hang together in one model, see `models.repeated`."""
Progress = Callable[[int, int], None]
"""Called with what is done and the total."""


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A model that holds an operation several times."""

    copies: int
    model: str
    """Path inside the bundle."""


@dataclass(frozen=True, kw_only=True)
class OperationModels:
    """One operation and the models that time it."""

    operation: Operation
    layout: Layout
    adds: tuple[Operation, ...]
    """Additions that one more copy brings along besides the operation."""
    files: tuple[ModelFile, ...]
    """Two or more, by ascending number of copies."""
    weight_bytes: int
    """Weights and biases of one copy, as the file holds them."""
    is_row: bool = True
    """Whether the space has this operation; others are timed to be subtracted."""

    def __post_init__(self) -> None:
        """Differences between files are what counts, so there are two or more."""
        copies = [file.copies for file in self.files]
        if len(copies) < 2 or copies[0] < 1 or copies != sorted(set(copies)):
            raise ValueError(f"files: expected two or more of ascending copies, got {copies}")
        for operation in (self.operation, *self.adds):
            if operation.op not in OPERATION_KINDS:
                known = ", ".join(OPERATION_KINDS)
                raise ValueError(f"op: expected one of {known}, got {operation.op}")
        if self.weight_bytes < 0:
            raise ValueError(f"weight_bytes: expected at least 0, got {self.weight_bytes}")


@dataclass(frozen=True, kw_only=True)
class NetworkModel:
    """A whole network of the space."""

    architecture: Architecture
    model: str
    """Path inside the bundle."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The manifest of a bundle folder."""

    format: int = FORMAT
    digest: str
    """SHA-256 over the rest of the manifest, the space and every model, see `bundle_digest`."""
    space: str
    """Name of the search space, which `space.yaml` holds in full."""
    image_height: int
    image_width: int
    out_channels: dict[str, int]
    """Output channels per task of the networks."""
    seed: int
    models: tuple[str, ...]
    """Every model, in the order of measuring: all of this file that the device needs."""
    operations: tuple[OperationModels, ...]
    networks: tuple[NetworkModel, ...]

    def __post_init__(self) -> None:
        """The parts agree: each model is listed once, each subtracted addition is timed."""
        if self.format != FORMAT:
            raise ValueError(
                f"format: expected {FORMAT}, got {self.format}; "
                f"another version of oneshot_ednas wrote this bundle"
            )
        for name in ("image_height", "image_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        self._check_models()
        timed = {entry.operation for entry in self.operations}
        if len(timed) < len(self.operations):
            raise ValueError("operations: expected distinct ones, got one twice")
        for entry in self.operations:
            for add in entry.adds:
                if add not in timed:
                    raise ValueError(f"operations: {entry.operation} needs {add}, which is missing")

    def _check_models(self) -> None:
        named = [file.model for entry in self.operations for file in entry.files]
        named += [network.model for network in self.networks]
        if Counter(self.models) != Counter(named) or len(set(named)) < len(named):
            raise ValueError(
                f"models: expected each of the {len(named)} models of operations and networks "
                f"once, got {len(self.models)}"
            )
        for model in self.models:
            _check_inside(model, "models")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image that the operations are for."""
        return self.image_height, self.image_width

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form, which `read_bundle` reads back to an equal one."""
        return cast(dict[str, Any], to_plain(self))


def _check_inside(path: object, what: str) -> None:
    if not isinstance(path, str):
        raise ValueError(f"{what}: expected text, got {path!r}")
    pure = PurePosixPath(path)
    if not path or "\\" in path or "\0" in path or pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{what}: expected paths inside the bundle, got {path}")


def read_bundle(folder: Path) -> Bundle:
    """Read the manifest of a bundle; that its files are whole is for `bundle_digest` to tell.

    Raises:
        FileNotFoundError: if the folder, its manifest or one of its files is missing.
        ValueError: if the manifest is damaged or of another format, or names a file outside the
            folder or a link that leaves it; names the key.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no bundle folder {folder}; make one with tools/build_latency_table.py export"
        )
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {MANIFEST}, so it is no bundle, or not a whole one; make one with "
            f"tools/build_latency_table.py export"
        )
    bundle = load_json(folder / MANIFEST, Bundle)
    inside = folder.resolve()
    for name in (SPACE, *bundle.models):
        if not (folder / name).resolve().is_relative_to(inside):
            raise ValueError(f"{folder / name} is a link that leaves the bundle; copy the file")
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing, though {MANIFEST} lists it; copy the whole bundle"
            )
    return bundle


def read_space(folder: Path) -> SearchSpace:
    """The search space of a bundle."""
    return SearchSpace.load(folder / SPACE)


def bundle_digest(bundle: Bundle, folder: Path, progress: Progress = silent) -> str:
    """SHA-256 over the manifest without its digest, the space and the models.

    Args:
        bundle: the manifest.
        folder: where the files are.
        progress: called after each file.
    """
    digest = hashlib.sha256(json.dumps(replace(bundle, digest="").to_json()).encode())
    names = (SPACE, *bundle.models)
    for done, name in enumerate(names, start=1):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        progress(done, len(names))
    return digest.hexdigest()


# What the compiler made of it ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CompiledModel:
    """One model, compiled for the Edge TPU."""

    model: str
    """Path of the original inside the bundle."""
    compiled: str
    """Path of the compiled model inside the bundle."""
    on_chip_bytes: int
    """Parameter bytes that stay in the chip's memory."""
    off_chip_bytes: int
    """Parameter bytes that are streamed in every inference."""
    mapped: int
    """Operators that run on the Edge TPU."""
    unmapped: int
    """Operators that run on the host."""
    compiler: str
    """Version of the compiler."""


def read_compiled(folder: Path) -> dict[str, CompiledModel]:
    """What `compiled.jsonl` says, by model; nothing if there is no such file.

    A model that failed is left out, unless a later line says that it was compiled. A last line
    that was cut off is skipped: the compile step writes it anew.

    Raises:
        ValueError: for a damaged line; names file and line.
    """
    path = folder / COMPILED
    if not path.is_file():
        return {}
    compiled: dict[str, CompiledModel] = {}
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last end of line is cut off
    for number, line in enumerate(lines, start=1):
        try:
            entry = _read_compiled_line(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: damaged ({error}); delete it and compile anew"
            ) from None
        if entry is not None:
            compiled[entry.model] = entry
    return compiled


def _read_compiled_line(line: bytes) -> CompiledModel | None:
    values: Mapping[str, Any] = parse_json(line.decode(), "line")
    if "error" in values:
        return None
    entry = CompiledModel(**values)
    for name in ("model", "compiled"):
        _check_inside(getattr(entry, name), name)
    for name in ("on_chip_bytes", "off_chip_bytes", "mapped", "unmapped"):
        value = getattr(entry, name)
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: expected a whole number >= 0, got {value!r}")
    return entry
