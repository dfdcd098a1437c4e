"""Files that must last: written whole or not at all, and checked when read.

Checkpoints are one safetensors file each: tensors as they are, everything else as JSON in its
header, with a SHA-256 over the tensors. No pickle.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

FORMAT = 1
T = TypeVar("T")


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file by new content, atomically: readers see the old or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        # mkstemp makes private files; what lasts gets the permissions of any other new file.
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(handle, 0o666 & ~umask)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """`write_bytes` for JSON; non-finite numbers are an error, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_json_line(path: Path, row: object) -> None:
    """Add a line to a file of JSON lines; what a crash left of a line is cut off first.

    Raises:
        ValueError: for a non-finite number, as of `write_json`.
    """
    line = json.dumps(row, allow_nan=False) + "\n"
    if path.exists():
        held = path.read_bytes()
        if held and not held.endswith(b"\n"):
            write_bytes(path, held[: held.rfind(b"\n") + 1])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path, read: Callable[[Any], T]) -> list[T]:
    """The rows of a file of JSON lines; none if there is no file.

    What follows the last line end was torn by a crash and is left out.

    Args:
        path: the file.
        read: from the value of a line to what it stands for.

    Raises:
        ValueError: if a line is no JSON, or `read` does not take it; names file and line.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            rows.append(read(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: damaged: {error!r}; delete that line") from None
    return rows


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a nested state of tensors, numbers, text, lists and dicts; keep the one before.

    The file that was there is kept beside it as `<name>.previous.safetensors`.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    header = {
        "format": str(FORMAT),
        "state": json.dumps(tree),
        "sha256": _digest(tensors, tree),
    }
    data = save_tensors(tensors, metadata=header)
    if path.exists():
        # A copy: at no moment is there no whole checkpoint under its own name.
        write_bytes(previous_checkpoint(path), path.read_bytes())
    write_bytes(path, data)


def previous_checkpoint(path: Path) -> Path:
    """Where the checkpoint before the newest one is kept."""
    return path.with_suffix(f".previous{path.suffix}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or of another format; the message says what to do.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tree = json.loads(header["state"])
        stored = header["sha256"]
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(_damaged(path, str(error))) from None
    if header.get("format") != str(FORMAT):
        raise ValueError(
            f"{path}: expected checkpoint format {FORMAT}, got {header.get('format')}; "
            f"another version of oneshot_ednas wrote it"
        )
    if _digest(tensors, tree) != stored:
        raise ValueError(_damaged(path, "its SHA-256 does not match"))
    result = _unpack(tree, tensors)
    assert isinstance(result, dict)
    return result


def _damaged(path: Path, reason: str) -> str:
    previous = previous_checkpoint(path)
    cure = (
        f"move {previous} over it to go on from the checkpoint before"
        if previous.exists()
        else "delete it to start this stage anew"
    )
    return f"{path}: the checkpoint is damaged ({reason}); {cure}"


def _digest(tensors: Mapping[str, Tensor], tree: object) -> str:
    digest = hashlib.sha256(json.dumps(tree).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON tree of a state; tensors go to `tensors` and leave their name."""
    if isinstance(value, Tensor):
        # A clone, since safetensors refuses tensors that share memory.
        key = f"{len(tensors)}{name}"  # the number keeps {1: ...} and {"1": ...} apart
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, Mapping):
        # Optimizers key their state by whole numbers, which JSON would turn into text.
        pairs = [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]
        return {"dict": pairs}
    if isinstance(value, (list, tuple)):
        return [_pack(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"checkpoint entry {name} is of type {type(value).__name__}")


def _unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        return {key: _unpack(item, tensors) for key, item in tree["dict"]}
    if isinstance(tree, list):
        return [_unpack(item, tensors) for item in tree]
    return tree
