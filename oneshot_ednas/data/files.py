"""Arrays from the files of a data folder, which nobody vouches for.

Nothing is ever unpickled, no link is followed out of the folder, and nothing is decoded that is
larger than any camera's image, or than annotations of one. Messages name files relative to the data
folder.
"""

import importlib
import io
import math
import struct
import tokenize
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import scipy.io
import scipy.io.matlab
from PIL import Image, UnidentifiedImageError

from oneshot_ednas.data.sources import check_relative
from oneshot_ednas.parsing import JSON_BYTES, one_line, parse_json

MAX_PIXELS = 100_000_000
"""Images and maps with more pixels, or more values, than this are refused."""

MATLAB_BYTES = 2**28
"""MATLAB files of more bytes, decompressed, are refused. It is room for 1000 masks of 512 x 512,
more than the objects and parts of an annotated photo, and little enough for several processes
that read at once."""

MATLAB_OBJECTS = 1_000_000
"""Elements, cells, structures and characters that are read of a MATLAB file. Each may take some
hundred bytes of memory, and a few bytes of the file may claim any number of them."""

MATLAB_CONTAINERS = 1000
"""Arrays of cells or structures that are read of a MATLAB file. They nest, and SciPy reads them by
recursion that ends the process where it is too deep."""

JPEG_SCANS = 100
"""Scans of a JPEG file. A progressive one has about ten; each costs time as the whole image does,
and takes a few bytes."""

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

# Types of the elements of a MATLAB file, and classes of its arrays: cells, structures, objects,
# functions, opaque.
_MATRIX, _COMPRESSED = 14, 15
_CONTAINERS = (1, 2, 3, 16, 17)
_CHARACTERS = 4

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
    check_inside(root, path, f"frame {frame_id}: {relative}")
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
                return _from_npy(path, _check_map)
            return _from_image(path, colour=colour)
    except _DAMAGE as error:
        raise ValueError(
            f"frame {frame_id}: {relative} cannot be read ({_reason(error)}); expected a whole "
            f"{path.suffix} file"
        ) from None


def read_vector(root: Path, relative: str) -> np.ndarray:
    """A `.npy` array of the whole data set and not of a frame: numbers of one dimension.

    Args:
        root: the data folder.
        relative: path below it.

    Raises:
        ValueError: for a file that is missing, unreadable, too large, leaves the folder by its path
            or a link, or is no list of numbers.
    """
    check_relative(relative, relative)
    root = root.resolve()
    path = root / relative
    check_inside(root, path, relative)
    try:
        return _from_npy(path, _check_vector)
    except _DAMAGE as error:
        raise ValueError(f"{relative} cannot be read ({_reason(error)})") from None


def read_json(root: Path, relative: str, frame_id: str) -> Any:
    """A JSON file of a frame.

    Raises:
        ValueError: if it is missing or no JSON.
    """
    where, path = f"frame {frame_id}: {relative}", find_file(root, relative, frame_id)
    try:
        if path.stat().st_size > JSON_BYTES:
            raise ValueError(f"more than the {JSON_BYTES} bytes that are read")
        text = path.read_text("utf-8-sig")
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: not valid JSON: {_reason(error)}") from None
    return parse_json(text, where)


def read_matlab(root: Path, relative: str, frame_id: str | None = None) -> dict[str, Any]:
    """The variables of a MATLAB file before version 7.3.

    Args:
        root: the data folder.
        relative: path below it.
        frame_id: for messages; None for a file of the whole data set.

    Raises:
        ValueError: if it is missing, too large, or cannot be read.
    """
    if frame_id is None:
        where, path = relative, root / relative
        check_inside(root.resolve(), path, where)
    else:
        where, path = f"frame {frame_id}: {relative}", find_file(root, relative, frame_id)
    try:
        content = io.BytesIO(_bounded_matlab(path))
        return dict(scipy.io.loadmat(content, squeeze_me=True, struct_as_record=False))
    except Exception as error:  # its errors have no common class
        raise ValueError(
            f"{where} cannot be read ({_reason(error)}); expected a whole MATLAB file"
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


def hdf5_array(file: Any, name: str) -> Any:
    """An array of an open HDF5 file, all of which lies in that very file.

    Args:
        file: a `h5py.File`.
        name: of the array, with those of the groups that hold it.

    Raises:
        ValueError: if there is none, or it is a link to another file or lies in others.
    """
    h5py = import_h5py()
    found = file
    for part in name.split("/"):
        links = found.id.links if isinstance(found, h5py.Group) else None
        # Asked for by its name alone, a link would be followed: to a pipe, for example.
        if (
            links is None
            or not links.exists(part.encode())
            or links.get_info(part.encode()).type != h5py.h5l.TYPE_HARD
        ):
            raise ValueError(f"it has no array {name}")
        found = found[part]
    if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
        raise ValueError(f"it has no array {name}")
    return found


def check_inside(root: Path, path: Path, where: str) -> None:
    """Refuse a path that leaves the data folder by a link.

    Args:
        root: the data folder, resolved.
        path: of the file, or where it may be.
        where: names it in the message.

    Raises:
        ValueError: if it does.
    """
    if not path.resolve().is_relative_to(root):
        raise ValueError(
            f"{where} is a link that leaves the data folder; copy the file there, or give the "
            f"folder that it links to as the data folder"
        )


def _bounded_matlab(path: Path) -> bytes:
    """A MATLAB file with each variable decompressed, once its size is known to be sane.

    Source:
        MathWorks, "MAT-File Level 5 File Format"
    """
    if path.stat().st_size > MATLAB_BYTES:
        raise ValueError(f"it has more than the {MATLAB_BYTES} bytes that are read")
    content = path.read_bytes()
    # Version 4 is 0: it has no compression, and its arrays are no larger than the file.
    if scipy.io.matlab.matfile_version(io.BytesIO(content))[0] != 1:
        return content
    order = "<" if content[126:128] == b"IM" else ">"
    parts = [content[:128]]
    at, num_bytes, objects, containers = 128, 0, 0, 0
    while at < len(content):
        kind, size = struct.unpack_from(f"{order}II", content, at)
        part = content[at : at + 8 + size]
        at += 8 + size
        if at > len(content):
            raise ValueError("it ends within a variable")
        if kind == _COMPRESSED:
            part = _decompressed(part[8:], MATLAB_BYTES - num_bytes)
        num_bytes += len(part)
        more = _matlab_objects(part, order)
        objects, containers = objects + more[0], containers + more[1]
        for found, limit, what in (
            (num_bytes, MATLAB_BYTES, "bytes"),
            (objects, MATLAB_OBJECTS, "cells, structures and characters"),
            (containers, MATLAB_CONTAINERS, "arrays of cells and structures"),
        ):
            if found > limit:
                raise ValueError(f"it has more than the {limit} {what} that are read")
        parts.append(part)
    return b"".join(parts)


def _decompressed(block: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj()
    # One more byte tells what is larger; and 0 would be no limit.
    part = stream.decompress(block, limit + 1)
    if len(part) > limit:
        raise ValueError(f"it has more than the {MATLAB_BYTES} bytes that are read")
    if not stream.eof:
        raise ValueError("it ends within a variable")
    return part


def _matlab_objects(variable: bytes, order: str) -> tuple[int, int]:
    """How many objects, and how many containers, a variable claims; see `MATLAB_OBJECTS`.

    Elements are taken one after the other, whatever size an array has that holds them, since this
    is how SciPy reads them. Beyond the limit none are.
    """
    at, objects, containers = 0, 0, 0
    array_class = None
    while at < len(variable) and objects <= MATLAB_OBJECTS:
        kind, start, size, end = _matlab_element(variable, at, order)
        objects += 1
        if kind != _MATRIX:
            # Names of fields, of any number of bytes each.
            objects += size if array_class in _CONTAINERS else 0
            at = end
            continue
        at += 8
        if size == 0:
            continue
        array_class = struct.unpack_from(f"{order}I", variable, start + 8)[0] & 0xFF
        at += 16
        if array_class in _CONTAINERS:
            containers += 1
        if array_class in _CONTAINERS[:3] or array_class == _CHARACTERS:
            _, start, size, at = _matlab_element(variable, at, order)
            sides = struct.unpack_from(f"{order}{size // 4}i", variable, start)
            if min(sides, default=-1) < 0:
                raise ValueError(f"it has an array of shape {sides}")
            objects += math.prod(sides)
    if at != len(variable) and objects <= MATLAB_OBJECTS:
        raise ValueError("it ends within a variable")
    return objects, containers


def _matlab_element(content: bytes, at: int, order: str) -> tuple[int, int, int, int]:
    """Type, start, size and end of the element at a place, padding included."""
    kind, size = struct.unpack_from(f"{order}II", content, at)
    # Up to 4 bytes may stand in the place of their size.
    if kind >> 16:
        return kind & 0xFFFF, at + 4, kind >> 16, at + 8
    return kind, at + 8, size, at + 8 + size + -size % 8


def _from_npy(path: Path, check: Callable[[Sequence[int], np.dtype], None]) -> np.ndarray:
    # Not np.load, which also takes archives and pickles, and allocates what a header claims.
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in _NPY_HEADERS:
            raise ValueError(f"version {version} of the format has no numbers")
        shape, is_fortran, dtype = _NPY_HEADERS[version](file)
        check(shape, dtype)
        if path.stat().st_size - file.tell() < math.prod(shape) * dtype.itemsize:
            raise ValueError(f"it is too short for {dtype} of shape {shape}")
        values = np.fromfile(file, dtype, math.prod(shape))
    return values.reshape(shape, order="F" if is_fortran else "C")


def _from_image(path: Path, *, colour: bool) -> np.ndarray:
    with Image.open(path, formats=FORMATS) as image:
        _check_map((image.height, image.width), np.dtype(np.uint8))
        if image.format == "JPEG" and path.read_bytes().count(b"\xff\xda") > JPEG_SCANS:
            raise ValueError(f"more than the {JPEG_SCANS} scans that are decoded")
        # Other modes of one channel hold numbers of more than 8 bits.
        as_colour = colour and image.mode in ("1", "P", "PA", "LA", "RGBA", "CMYK", "YCbCr")
        return np.asarray(image.convert("RGB") if as_colour else image)


def _from_stack(path: Path, stack: str, frame_id: str) -> np.ndarray:
    h5py = import_h5py()
    with h5py.File(path, "r") as file:
        arrays = hdf5_array(file, stack)
        if not 3 <= arrays.ndim <= 4:
            raise ValueError(f"{stack} has shape {arrays.shape}, expected one map per frame")
        if not (frame_id.isascii() and frame_id.isdigit()) or int(frame_id) >= len(arrays):
            raise ValueError(f"{stack} has frames 0..{len(arrays) - 1}")
        # MATLAB stores columns first.
        _check_map(arrays.shape[:0:-1], arrays.dtype)
        _check_count(arrays.chunks or ())  # a chunk is decompressed as a whole
        return np.asarray(arrays[int(frame_id)]).T


def _check_map(shape: Sequence[int], dtype: np.dtype) -> None:
    if len(shape) not in (2, 3) or min(shape) < 1 or dtype.kind not in "uifb":
        raise ValueError(
            f"expected numbers of shape height x width (x channels), "
            f"got {dtype} of shape {tuple(shape)}"
        )
    _check_count(shape)


def _check_vector(shape: Sequence[int], dtype: np.dtype) -> None:
    if len(shape) != 1 or min(shape) < 1 or dtype.kind not in "uif":
        raise ValueError(f"expected a list of numbers, got {dtype} of shape {tuple(shape)}")
    _check_count(shape)


def _check_count(shape: Sequence[int]) -> None:
    count = math.prod(shape)
    if count > MAX_PIXELS:
        raise ValueError(f"{count} pixels or values, more than the {MAX_PIXELS} that are read")


def _reason(error: Exception) -> str:
    """What went wrong, in one line without the path that some errors repeat."""
    if isinstance(error, UnidentifiedImageError):
        return f"no {' or '.join(FORMATS)} image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(str(error).splitlines()[0][:200]) if str(error) else type(error).__name__
