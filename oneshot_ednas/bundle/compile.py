"""Compile a bundle for the Edge TPU, resumably; a model that fails stops nothing."""

import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from oneshot_ednas.bundle.manifest import (
    COMPILED,
    CompiledModel,
    Progress,
    bundle_digest,
    read_bundle,
    read_compiled,
    silent,
)
from oneshot_ednas.export.edgetpu import COMPILER, compile_model, compiled_path, find_compiler
from oneshot_ednas.schema import to_plain

FOLDER = "compiled"
"""Inside the bundle; below it the same folders as those of the models."""


@dataclass(frozen=True, kw_only=True)
class CompileSummary:
    """What a bundle's `compiled.jsonl` says in all."""

    num_models: int
    failures: dict[str, str]
    """Models that the compiler refused just now, and its words."""
    partly_mapped: tuple[str, ...]
    """Models of which some operators run on the host: their times are not of the Edge TPU alone."""
    streaming: tuple[str, ...]
    """Models with parameters beyond the chip's memory."""
    compiler: str
    """Version; empty if nothing was compiled."""


def compile_bundle(folder: Path, *, progress: Progress = silent) -> CompileSummary:
    """Run the Edge TPU compiler over the models that are not compiled yet.

    Each result is a line of `compiled.jsonl`, written at once. A model that fails is recorded there
    with the compiler's words, and tried again by the next call.

    Args:
        folder: the bundle.
        progress: called after each model, with those compiled before counted in.

    Raises:
        FileNotFoundError: if there is no compiler or no such bundle.
        ValueError: if the bundle is damaged, or was compiled in part by another version.
    """
    bundle = read_bundle(folder)
    if find_compiler() is None:
        raise FileNotFoundError(
            f"no {COMPILER} on PATH; it is Google's compiler for x86-64 Debian and Ubuntu, see "
            f"https://coral.ai/docs/edgetpu/compiler; the bundle can be compiled on another "
            f"machine: copy {folder} there and run this step. A CPU needs no compiled models: go "
            f"on with measure"
        )
    if bundle_digest(bundle, folder) != bundle.digest:
        raise ValueError(
            f"{folder} is damaged: its files do not have the digest of its manifest; copy it anew"
        )
    compiled = {
        model: entry
        for model, entry in read_compiled(folder).items()
        if (folder / entry.compiled).is_file()
    }
    failures: dict[str, str] = {}
    with _open_for_appending(folder / COMPILED) as file:
        for done, model in enumerate(bundle.models, start=1):
            if model not in compiled:
                try:
                    entry = _compile(folder, model)
                except RuntimeError as error:
                    failures[model] = str(error)
                    _append(file, {"model": model, "error": str(error)})
                else:
                    _check_version(entry, compiled, folder)
                    _append(file, to_plain(entry))
                    compiled[model] = entry
            progress(done, len(bundle.models))
    return CompileSummary(
        num_models=len(bundle.models),
        failures=failures,
        partly_mapped=tuple(m for m, entry in compiled.items() if entry.unmapped),
        streaming=tuple(m for m, entry in compiled.items() if entry.off_chip_bytes),
        compiler=next((entry.compiler for entry in compiled.values()), ""),
    )


def _compile(folder: Path, model: str) -> CompiledModel:
    target = folder / FOLDER / PurePosixPath(model).parent
    report = compile_model(folder / model, target)
    return CompiledModel(
        model=model,
        compiled=compiled_path(folder / model, target).relative_to(folder).as_posix(),
        on_chip_bytes=report.on_chip_bytes,
        off_chip_bytes=report.off_chip_bytes,
        mapped=report.mapped,
        unmapped=report.unmapped,
        compiler=report.version,
    )


def _check_version(entry: CompiledModel, compiled: dict[str, CompiledModel], folder: Path) -> None:
    before = next((other.compiler for other in compiled.values()), entry.compiler)
    if before != entry.compiler:
        raise ValueError(
            f"{folder / COMPILED} is of {COMPILER} {before}, this is {entry.compiler}, and a table "
            f"takes one only; delete it to compile all models anew"
        )


def _open_for_appending(path: Path) -> BinaryIO:
    """The file, without a last line that was cut off."""
    file = path.open("ab")
    content = path.read_bytes()
    file.truncate(content.rfind(b"\n") + 1)
    return file


def _append(file: BinaryIO, record: object) -> None:
    file.write(json.dumps(record).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())
