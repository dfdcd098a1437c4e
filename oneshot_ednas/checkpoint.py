"""Checkpoints: one safetensors file each, checked when read, with the one before kept beside it.

Tensors are stored as they are, everything else as JSON in the header, with a SHA-256 over both. No
pickle.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from oneshot_ednas.store import write_bytes

FORMAT = 2
"""1 had each entry of the header under a key of its own, in any order."""


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a nested state of tensors, numbers, text, lists and dicts; keep the one before.

    The file that was there is kept as `<name>.previous.safetensors`, unless it is damaged: then the
    one before it stays there. At every moment the newest whole checkpoint is found under one of
    both names.

    Raises:
        OSError: if it could not be written, and read back as it is; the file that was there stays.
    """
    # First, so that the old state is gone from memory before the new one is packed.
    previous = previous_checkpoint(path) if _is_whole(path) else None
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    header = {"format": FORMAT, "sha256": _digest(tensors, tree, FORMAT), "state": tree}
    # One entry, since safetensors keeps several in no order: equal states give equal files.
    data = save_tensors(tensors, metadata={"checkpoint": json.dumps(header)})
    write_bytes(path, data, previous=previous)


def state_digest(state: object) -> str:
    """SHA-256 of a state or a part of one: types, shapes and bits of all tensors, and the rest."""
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    return _digest(tensors, tree, FORMAT)


def previous_checkpoint(path: Path) -> Path:
    """Where the checkpoint before the newest one is kept."""
    return path.with_suffix(f".previous{path.suffix}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU; a damaged one gives the one before.

    Warns where it does.

    Raises:
        FileNotFoundError: if there is neither.
        OSError: if it cannot be opened.
        ValueError: if it is of another format, or damaged and the one before is not whole; the
            message says what to do.
    """
    if not has_checkpoint(path):
        raise FileNotFoundError(f"no checkpoint {path}")
    previous = previous_checkpoint(path)
    try:
        if not path.is_file():
            raise DamageError(f"{path}: the checkpoint is missing")
        return _read(path)
    except DamageError as damage:
        cure = "delete it to start this stage anew"
        if previous.is_file():
            try:
                state = _read(previous)
            except DamageError:
                cure = f"so is {previous}; delete both to start this stage anew"
            else:
                warnings.warn(f"{damage}; going on from the one before it", stacklevel=2)
                return state
        raise ValueError(f"{damage}; {cure}") from None


def has_checkpoint(path: Path) -> bool:
    """Whether `load_checkpoint` finds a file, this one or the one before."""
    return path.is_file() or previous_checkpoint(path).is_file()


class DamageError(ValueError):
    """A checkpoint is not as it was written."""


def _is_whole(path: Path) -> bool:
    try:
        _read(path)
    except (OSError, ValueError):
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    """The state in a file.

    Raises:
        DamageError: if it is not as it was written.
        OSError: if it cannot be opened.
        ValueError: if it is of another format.
    """
    path.open("rb").close()  # safetensors says of a file that it cannot open that there is none
    try:
        with safe_open(str(path), framework="pt") as file:
            header = _header(file.metadata() or {})
        # Not through `file`, which leaves some hundred bytes behind for each tensor.
        tensors = load_tensors(path.read_bytes())
        form, tree, stored = header["format"], header["state"], header["sha256"]
    except (SafetensorError, KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        raise DamageError(_damaged(path, str(error))) from None
    try:
        is_whole = _digest(tensors, tree, 1 if form == 1 else FORMAT) == stored
        result = _unpack(tree, tensors) if is_whole else None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamageError(_damaged(path, repr(error)[:200])) from None
    # The digest is over the format, too: one that agrees with ours tells of a damaged number.
    if form not in (1, FORMAT) and not is_whole:
        raise ValueError(
            f"{path}: expected checkpoint format 1 to {FORMAT}, got {form}; another version of "
            f"oneshot_ednas wrote it: go on with that one, or start anew with another --out"
        )
    if not is_whole or form not in (1, FORMAT):
        raise DamageError(_damaged(path, "its SHA-256 does not match"))
    if not isinstance(result, dict) or not all(isinstance(key, str) for key in result):
        raise DamageError(_damaged(path, "it holds no state"))
    return result


def _header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Format, state and SHA-256."""
    if "checkpoint" in metadata:
        header: dict[str, Any] = json.loads(metadata["checkpoint"])
        return header
    return {
        "format": int(metadata["format"]),
        "sha256": metadata["sha256"],
        "state": json.loads(metadata["state"]),
    }


def _damaged(path: Path, reason: str) -> str:
    return f"{path}: the checkpoint is damaged ({reason})"


def _digest(tensors: Mapping[str, Tensor], tree: object, form: int) -> str:
    digest = hashlib.sha256(json.dumps(tree if form == 1 else [form, tree]).encode())
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
