"""Arrays from the files of a data folder, which nobody vouches for.

Nothing is ever unpickled, no link is followed out of the folder, and nothing is decoded that is
larger than any camera's image. Messages name files relative to the data folder.
"""

import importlib
import json
import math
import struct
import tokenize
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import scipy.io
from PIL import Image, UnidentifiedImageError

from oneshot_ednas.data.sources import check_relative

MAX_PIXELS = 100_000_000
"""Images and maps with more pixels, or more values, than this are refused."""

FORMATS = ("PNG", "JPEG")
"""Image formats that are read, whatever a file's name ends in. Pillow reads many more, some of
them by running other programs."""

# What reading a file that is cut short, damaged or of another kind may raise.
_DAMAGE = (
    Image.DecompressionBombError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    tokenize.TokenError,
    zlib.error,
)

_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def find_file(root: Path, relative: str, frame_id: str) -> Path:
    """A file of a frame, which must exist inside the data folder.

    Args:
        root: the data folder, resolved.
        relative: path below it.
        frame_id: for the message.

    Raises:
        ValueError: if there is no such file, or its path or a link leads out of the folder.
    """
    check_relative(relative, f"frame {frame_id}")
    path = root / relative
    try:
        is_file = path.is_file()
    except OSError as error:
        raise ValueError(f"frame {frame_id}: {relative}: {error.strerror}") from None
    if not is_file:
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
        # Libraries warn of odd metadata, which do not matter, and of sizes, which are checked here.
        with warnings.catch_warnings(action="ignore"):
            if stack is not None:
                return _from_stack(path, stack, frame_id)
            if path.suffix.lower() == ".npy":
                return _from_npy(path)
            return _from_image(path, colour=colour)
    except _DAMAGE as error:
        raise ValueError(
            f"frame {frame_id}: {relative} cannot be read ({_reason(error)}); expected a whole "
            f"{path.suffix} file"
        ) from None


def read_json(root: Path, relative: str, frame_id: str) -> Any:
    """A JSON file of a frame.

    Raises:
        ValueError: if it is missing or no JSON.
    """
    path = find_file(root, relative, frame_id)
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(
            f"frame {frame_id}: {relative}: not valid JSON: {_reason(error)}"
        ) from None


def read_matlab(root: Path, relative: str, frame_id: str) -> dict[str, Any]:
    """The variables of a MATLAB file before version 7.3.

    Raises:
        ValueError: if it is missing or cannot be read, or without SciPy.
    """
    path = find_file(root, relative, frame_id)
    try:
        return dict(scipy.io.loadmat(path, squeeze_me=True, struct_as_record=False))
    except Exception as error:  # its errors have no common class
        raise ValueError(
            f"frame {frame_id}: {relative} cannot be read ({_reason(error)}); expected a whole "
            f"MATLAB file"
        ) from None


def import_h5py() -> ModuleType:
    """h5py, of the `matlab` extra.

    Raises:
        ValueError: if it is not installed; names the extra.
    """
    try:
        return importlib.import_module("h5py")
    except ModuleNotFoundError:
        raise ValueError(
            "MATLAB 7.3 files need h5py: pip install 'oneshot-ednas[matlab]'"
        ) from None


def _from_npy(path: Path) -> np.ndarray:
    # Not np.load, which also takes archives and pickles, and allocates what a header claims.
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in _NPY_HEADERS:
            raise ValueError(f"version {version} of the format has no maps")
        shape, is_fortran, dtype = _NPY_HEADERS[version](file)
        _check_map(shape, dtype)
        if path.stat().st_size - file.tell() < math.prod(shape) * dtype.itemsize:
            raise ValueError(f"it is too short for {dtype} of shape {shape}")
        values = np.fromfile(file, dtype, math.prod(shape))
    return values.reshape(shape, order="F" if is_fortran else "C")


def _from_image(path: Path, *, colour: bool) -> np.ndarray:
    with Image.open(path, formats=FORMATS) as image:
        _check_map((image.height, image.width), np.dtype(np.uint8))
        # Other modes of one channel hold numbers of more than 8 bits.
        as_colour = colour and image.mode in ("1", "P", "PA", "LA", "RGBA", "CMYK", "YCbCr")
        return np.asarray(image.convert("RGB") if as_colour else image)


def _from_stack(path: Path, stack: str, frame_id: str) -> np.ndarray:
    h5py = import_h5py()
    with h5py.File(path, "r") as file:
        arrays = file.get(stack)
        # Arrays may be links to other files, or lie in them.
        if (
            not isinstance(arrays, h5py.Dataset)
            or arrays.file.filename != file.filename
            or arrays.external
            or arrays.is_virtual
        ):
            raise ValueError(f"it has no array {stack}")
        if not 3 <= arrays.ndim <= 4:
            raise ValueError(f"{stack} has shape {arrays.shape}, expected one map per frame")
        if not (frame_id.isascii() and frame_id.isdigit()) or int(frame_id) >= len(arrays):
            raise ValueError(f"{stack} has frames 0..{len(arrays) - 1}")
        # MATLAB stores columns first.
        _check_map(arrays.shape[:0:-1], arrays.dtype)
        return np.asarray(arrays[int(frame_id)]).T


def _check_map(shape: Sequence[int], dtype: np.dtype) -> None:
    if len(shape) not in (2, 3) or min(shape) < 1 or dtype.kind not in "uifb":
        raise ValueError(
            f"expected numbers of shape height x width (x channels), "
            f"got {dtype} of shape {tuple(shape)}"
        )
    count = math.prod(shape)
    if count > MAX_PIXELS:
        raise ValueError(f"{count} pixels or values, more than the {MAX_PIXELS} that are read")


def _reason(error: Exception) -> str:
    """What went wrong, in one line without the path that some errors repeat."""
    if isinstance(error, UnidentifiedImageError):
        return f"no {' or '.join(FORMATS)} image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
