"""Arrays from the files of a data folder, which nobody vouches for.

Nothing is ever unpickled, no link is followed out of the folder, and no image is decoded that is
larger than any camera's. Messages name files relative to the data folder.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

MAX_PIXELS = 100_000_000
"""Images and maps with more pixels than this are refused."""


def find_file(root: Path, relative: str, frame_id: str) -> Path:
    """A file of a frame, which must exist inside the data folder.

    Args:
        root: the data folder, resolved.
        relative: path below it.
        frame_id: for the message.

    Raises:
        ValueError: if there is no such file, or it is a link to somewhere else.
    """
    path = root / relative
    if not path.is_file():
        raise ValueError(
            f"frame {frame_id}: no file {relative}; restore it or drop the frame from its split"
        )
    if not path.resolve().is_relative_to(root):
        raise ValueError(
            f"frame {frame_id}: {relative} is a link that leaves the data folder; copy the file "
            f"there, or give the folder that it links to as the data folder"
        )
    return path


def read_array(
    root: Path, relative: str, frame_id: str, *, colour: bool = False, stack: str | None = None
) -> np.ndarray:
    """A file as stored, [height, width] or [height, width, channels].

    Args:
        root: the data folder, resolved.
        relative: path below it: an image, a `.npy` array, or a stack.
        frame_id: for messages, and the index into a stack.
        colour: of a palette, whether the colours are wanted and not the indices.
        stack: name of the array in an HDF5 file that holds all frames.

    Raises:
        ValueError: for a file that is missing, unreadable, too large, or no map.
    """
    path = find_file(root, relative, frame_id)
    try:
        if stack is not None:
            array = _from_stack(path, stack, frame_id)
        elif path.suffix.lower() == ".npy":
            array = _from_npy(path)
        else:
            array = _from_image(path, colour=colour)
    except (OSError, ValueError, EOFError, SyntaxError, KeyError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"frame {frame_id}: {relative} cannot be read ({reason}); expected a whole "
            f"{path.suffix} file"
        ) from None
    if array.ndim not in (2, 3) or 0 in array.shape or array.dtype.kind not in "uifb":
        raise ValueError(
            f"frame {frame_id}: {relative}: expected numbers of shape height x width (x channels), "
            f"got {array.dtype} of shape {array.shape}"
        )
    return array


def read_json(root: Path, relative: str, frame_id: str) -> Any:
    """A JSON file of a frame.

    Raises:
        ValueError: if it is missing or no JSON.
    """
    path = find_file(root, relative, frame_id)
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"frame {frame_id}: {relative}: not valid JSON: {error}") from None


def read_matlab(root: Path, relative: str, frame_id: str) -> dict[str, Any]:
    """The variables of a MATLAB file before version 7.3.

    Raises:
        ValueError: if it is missing or cannot be read.
        ModuleNotFoundError: without SciPy; the message names the extra.
    """
    path = find_file(root, relative, frame_id)
    loadmat = needed_module("scipy.io").loadmat
    try:
        return dict(loadmat(path, squeeze_me=True, struct_as_record=False))
    except Exception as error:  # its errors have no common class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"frame {frame_id}: {relative} cannot be read ({reason}); expected a whole MATLAB file"
        ) from None


def needed_module(name: str) -> ModuleType:
    """A module of the `matlab` extra.

    Raises:
        ModuleNotFoundError: naming the extra.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"MATLAB files need {name.split('.')[0]}: pip install 'oneshot-ednas[matlab]'"
        ) from None


def _from_npy(path: Path) -> np.ndarray:
    # A memory map reads the header alone, which tells the size before anything is allocated.
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim >= 2:
        _check_pixels(array.shape[0] * array.shape[1])
    return np.array(array)


def _from_image(path: Path, *, colour: bool) -> np.ndarray:
    with Image.open(path) as image:
        _check_pixels(image.width * image.height)
        as_colour = colour and image.mode not in ("RGB", "L", "I;16")
        return np.asarray(image.convert("RGB") if as_colour else image)


def _from_stack(path: Path, stack: str, frame_id: str) -> np.ndarray:
    with needed_module("h5py").File(path, "r") as file:
        if stack not in file:
            raise ValueError(f"it has no array {stack}")
        arrays = file[stack]
        if not frame_id.isdecimal() or int(frame_id) >= len(arrays):
            raise ValueError(f"{stack} has frames 0..{len(arrays) - 1}")
        # MATLAB stores columns first.
        return np.asarray(arrays[int(frame_id)]).T


def _check_pixels(count: int) -> None:
    if count > MAX_PIXELS:
        raise ValueError(f"{count} pixels, more than the {MAX_PIXELS} that are read")
