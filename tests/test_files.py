"""Files that nobody vouches for: each fault is one clear line, and nothing runs or explodes."""

import io
import json
import pickle
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import scipy.io
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from oneshot_ednas.data import files
from oneshot_ednas.data.files import MAX_PIXELS, read_array, read_json, read_matlab, read_vector

VALUES = np.arange(48, dtype=np.uint8).reshape(6, 8)


def png(array=VALUES, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **options)
    return buffer.getvalue()


def jpeg():
    buffer = io.BytesIO()
    Image.fromarray(np.tile(VALUES, (4, 4))).save(buffer, "JPEG")
    return buffer.getvalue()


def npy(array=VALUES):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_header(text):
    """An array file of a header and no values."""
    header = text.encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header


def png_header(width, height):
    """A PNG that says how large it is, and holds a few bytes."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" * 100)),
        (b"IEND", b""),
    ]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def read(root, name, content, **options):
    (root / name).write_bytes(content)
    return read_array(root.resolve(), name, "7", **options)


def refused(root, name, content, **options):
    """The one line that refuses a file."""
    with pytest.raises(ValueError, match=rf"^frame 7: {name} cannot be read \(") as caught:
        read(root, name, content, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(root) not in message
    return message


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.bool_])
def test_images_give_their_numbers(tmp_path, dtype):
    values = (VALUES > 20) if dtype is np.bool_ else VALUES.astype(dtype) * 5
    found = read(tmp_path, "a.png", png(values))
    assert found.dtype == dtype
    assert (found == values).all()


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", ">u2", "<i8", "|b1"])
def test_arrays_give_their_numbers_in_any_byte_order(tmp_path, dtype):
    for values in (VALUES, np.asfortranarray(VALUES), VALUES.reshape(6, 4, 2)):
        found = read(tmp_path, "a.npy", npy(values.astype(dtype)))
        assert (found == values.astype(dtype)).all()
        assert not isinstance(found, np.memmap)  # else the file stays open


def test_an_image_is_known_by_what_it_holds_and_only_png_and_jpeg_are(tmp_path):
    assert (read(tmp_path, "a.jpg", png()) == VALUES).all()
    buffer = io.BytesIO()
    Image.fromarray(VALUES).save(buffer, "GIF")
    assert "(no PNG or JPEG image); expected a whole .png file" in refused(
        tmp_path, "a.png", buffer.getvalue()
    )
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    assert "(no PNG or JPEG image)" in refused(tmp_path, "a.png", eps)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8])
@pytest.mark.parametrize(("name", "whole"), [("a.png", png), ("a.jpg", jpeg), ("a.npy", npy)])
def test_files_that_are_cut_short_are_refused(tmp_path, name, whole, share):
    content = whole()
    refused(tmp_path, name, content[: int(share * (len(content) - 16))])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.npy"])
def test_files_of_another_kind_are_refused(tmp_path, name):
    for content in (b"hello", b"\0" * 100, "<html>".encode("utf-16"), b"PK\x03\x04"):
        refused(tmp_path, name, content)


@given(
    which=st.sampled_from([("a.png", png()), ("a.jpg", jpeg()), ("a.npy", npy())]),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    keep=st.floats(0.3, 1),
)
def test_any_damage_gives_an_array_or_one_line(tmp_path_factory, which, damage, keep):
    name, content = which
    damaged = bytearray(content)
    for place, value in damage:
        damaged[int(place * (len(damaged) - 1))] = value
    root = tmp_path_factory.getbasetemp()
    lines = []
    try:
        assert read(root, name, bytes(damaged[: int(keep * len(damaged))])).ndim in (2, 3)
    except ValueError as error:
        lines.append(str(error))
    assert all(line.startswith(f"frame 7: {name} cannot be read (") for line in lines)
    assert not any("\n" in line for line in lines)


class Trap:
    """Ends the process where it is unpickled."""

    def __reduce__(self):
        return sys.exit, (3,)


def test_nothing_is_unpickled(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([[Trap()]], dtype=object), allow_pickle=True)
    assert "expected numbers of shape" in refused(tmp_path, "a.npy", buffer.getvalue())
    assert "magic string" in refused(tmp_path, "a.npy", pickle.dumps(Trap()))
    buffer = io.BytesIO()
    np.savez(buffer, VALUES)
    assert "magic string" in refused(tmp_path, "a.npy", buffer.getvalue())


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (10, 10), }" + " " * 20_000,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (10, 10), }",
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**62}, {2**62}), }}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': ('a', 4), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }",
        "__import__('os').abort()",
        "[" * 5000,
    ],
)
def test_headers_that_lie_are_refused_before_anything_is_allocated(tmp_path, header):
    refused(tmp_path, "a.npy", npy_header(header))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(5),
        np.zeros((2, 2, 2, 2)),
        np.zeros((2, 2), dtype=complex),
        np.full((2, 2), "text"),
        np.zeros((2, 2), dtype=[("a", "f4")]),
        np.zeros((2, 2), dtype="datetime64[s]"),
    ],
)
def test_arrays_that_are_no_maps_are_refused(tmp_path, array):
    assert "expected numbers of shape height x width" in refused(tmp_path, "a.npy", npy(array))


@pytest.mark.parametrize("side", [9_500, 10_001, 60_000])  # Pillow is quiet, warns, and raises
def test_images_larger_than_any_camera_s_are_refused_before_they_are_decoded(tmp_path, side):
    message = refused(tmp_path, "a.png", png_header(side, side))
    # The first is small enough to be decoded, and too short.
    assert (f"more than the {MAX_PIXELS}" in message) == (10_000 < side < 20_000)
    assert side < 20_000 or "decompression bomb" in message


def test_large_arrays_are_refused_before_they_are_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_PIXELS", 40)
    assert "48 pixels or values, more than the 40" in refused(tmp_path, "a.npy", npy())


def test_a_palette_gives_colours_where_they_are_wanted_else_indices(tmp_path):
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=b"\0\x80")  # of which Pillow warns when it converts
    assert (read(tmp_path, "a.png", buffer.getvalue()) == 1).all()
    colours = read(tmp_path, "a.png", buffer.getvalue(), colour=True)
    assert (colours == (10, 20, 30)).all()


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^frame 7: x+: File name too long$"):
        read_array(tmp_path, "x" * 5000, "7")
    with pytest.raises(ValueError, match=r"^frame 7: expected a path inside the data folder"):
        read_array(tmp_path, "../a.png", "7")
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=r"^frame 7: no file a; restore it or drop the frame"):
        read_array(tmp_path, "a", "7")


def test_json_is_read_or_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"x": 1}))
    assert read_json(tmp_path, "a.json", "7") == {"x": 1}
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"^frame 7: a\.json: not valid JSON: ") as caught:
            read_json(tmp_path, "a.json", "7")
        assert "\n" not in str(caught.value)


def test_matlab_files_are_read_or_refused(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    scipy_io.savemat(tmp_path / "a.mat", {"x": VALUES})
    assert (read_matlab(tmp_path, "a.mat", "7")["x"] == VALUES).all()
    content = (tmp_path / "a.mat").read_bytes()
    for damaged in (b"", b"hello", content[:100], content[:150], content[:-20]):
        (tmp_path / "a.mat").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^frame 7: a\.mat cannot be read \(") as caught:
            read_matlab(tmp_path, "a.mat", "7")
        assert "\n" not in str(caught.value)


def element(kind, content, order="<"):
    return struct.pack(f"{order}II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def variable(array_class, sides, *content, order="<", name=b"x"):
    """A MATLAB array of that class, which claims those sides."""
    parts = [
        element(6, struct.pack(f"{order}II", array_class, 0), order),
        element(5, struct.pack(f"{order}{len(sides)}i", *sides), order),
        element(1, name, order),
        *content,
    ]
    return element(14, b"".join(parts), order)


def matlab(*variables, order="<"):
    version = b"\x00\x01IM" if order == "<" else b"\x01\x00MI"
    return b"MATLAB 5.0 MAT-file".ljust(124) + version + b"".join(variables)


def mask(rows=6, columns=8, order="<", name=b"x"):
    values = element(2, bytes(rows * columns), order)
    return variable(9, (rows, columns), values, order=order, name=name)


def compressed(content, order="<"):
    squeezed = zlib.compress(content, 9)
    return struct.pack(f"{order}II", 15, len(squeezed)) + squeezed


NO_FIELDS = (struct.pack("<HHI", 5, 4, 8), element(1, b""))


def nested(depth):
    """Cells in cells."""
    content = mask()
    for _ in range(depth):
        content = variable(1, (1, 1), content)
    return content


def refused_matlab(root, content):
    (root / "a.mat").write_bytes(content)
    with pytest.raises(ValueError, match=r"^frame 7: a\.mat cannot be read \(") as caught:
        read_matlab(root, "a.mat", "7")
    message = str(caught.value)
    assert "\n" not in message
    assert str(root) not in message
    return message


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("squeeze", [compressed, lambda content, _: content])
def test_matlab_files_larger_than_any_annotation_are_refused(tmp_path, monkeypatch, order, squeeze):
    variables = [squeeze(mask(40, 50, order, name), order) for name in (b"x", b"y")]
    content = matlab(*variables, order=order)
    (tmp_path / "a.mat").write_bytes(content)
    monkeypatch.setattr(files, "MATLAB_BYTES", 2 * len(mask(40, 50)) + 128)
    found = read_matlab(tmp_path, "a.mat", "7")
    assert (found["x"].shape, found["y"].shape) == ((40, 50), (40, 50))
    limit = 2 * len(mask(40, 50)) - 1
    monkeypatch.setattr(files, "MATLAB_BYTES", limit)
    assert f"more than the {limit} bytes that are read" in refused_matlab(tmp_path, content)


def test_a_small_matlab_file_of_a_large_array_takes_no_memory(tmp_path):
    size = 2 * files.MATLAB_BYTES
    squeezer = zlib.compressobj(9)
    head = mask(0, 0)[:-8] + struct.pack("<II", 2, size)
    squeezed = squeezer.compress(struct.pack("<II", 14, len(head) - 8 + size) + head[8:])
    squeezed += b"".join(squeezer.compress(bytes(2**20)) for _ in range(size // 2**20))
    squeezed += squeezer.flush()
    content = matlab(struct.pack("<II", 15, len(squeezed)) + squeezed)
    assert len(content) < 10**6
    assert "more than the 268435456 bytes that are read" in refused_matlab(tmp_path, content)


@pytest.mark.parametrize("squeeze", [compressed, bytes])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (variable(2, (10**9, 1), *NO_FIELDS), "more than the 10000 cells, structures and char"),
        (variable(1, (2**31 - 1, 2**31 - 1)), "more than the 10000 cells, structures and char"),
        (variable(4, (1, 10**9), element(16, b"")), "more than the 10000 cells, structures and"),
        (variable(1, (10**4, 1), element(14, b"") * 10**4), "more than the 10000 cells"),
        (variable(9, (1, 1), element(2, b"") * 10**4), "more than the 10000 cells"),
        (variable(1, (1, -1)), r"an array of shape (1, -1)"),
        (nested(101), "more than the 100 arrays of cells and structures"),
        # Each cell says that it ends before what it holds, which is read all the same.
        (variable(1, (1, 1)) * 2_000, "more than the 100 arrays of cells and structures"),
        (mask()[:-1], "it ends within a variable"),
        (variable(9, (1, 1), struct.pack("<II", 2, 100)), "it ends within a variable"),
    ],
)
def test_matlab_files_that_claim_more_than_they_hold_are_refused(
    tmp_path, monkeypatch, squeeze, content, message
):
    monkeypatch.setattr(files, "MATLAB_OBJECTS", 10_000)
    monkeypatch.setattr(files, "MATLAB_CONTAINERS", 100)
    assert message in refused_matlab(tmp_path, matlab(squeeze(content)))


def test_damaged_compression_of_a_matlab_file_is_refused(tmp_path):
    whole = compressed(mask())
    cut = struct.pack("<II", 15, len(whole) - 16) + whole[8:-8]
    assert "it ends within a variable" in refused_matlab(tmp_path, matlab(cut))
    assert "it ends within a variable" in refused_matlab(tmp_path, matlab(whole[:-4]))
    flipped = whole[:12] + bytes(255 - value for value in whole[12:])
    assert "decompressing" in refused_matlab(tmp_path, matlab(flipped))


@pytest.mark.parametrize("options", [{}, {"do_compression": True}, {"format": "4"}])
def test_everything_that_matlab_files_may_hold_is_read(tmp_path, options):
    stored = {"mask": VALUES, "name": "left foot", "real": np.array([[1.5, -2.0]])}
    if options.get("format") != "4":
        parts = np.empty(2, object)
        parts[:] = [{"mask": VALUES % 2, "name": "leg"}, {"mask": VALUES > 3, "name": "arm"}]
        stored |= {
            "anno": {"parts": parts, "none": [], "flag": True},
            "deep": {"a": {"b": {"c": {"d": 5}}}},
        }
    scipy.io.savemat(tmp_path / "a.mat", stored, **options)
    found = read_matlab(tmp_path, "a.mat", "7")
    whole = scipy.io.loadmat(tmp_path / "a.mat", squeeze_me=True, struct_as_record=False)
    assert found.keys() == whole.keys()
    assert (found["mask"] == VALUES).all()
    assert (found["name"], found["real"].tolist()) == ("left foot", [1.5, -2])
    if "anno" in stored:
        assert [part.name for part in found["anno"].parts] == ["leg", "arm"]
        assert (found["anno"].parts[1].mask == (VALUES > 3)).all()
        assert found["deep"].a.b.c.d == 5


@given(
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    keep=st.floats(0.3, 1),
    squeeze=st.booleans(),
)
def test_any_damage_of_a_matlab_file_gives_variables_or_one_line(
    tmp_path_factory, damage, keep, squeeze
):
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"x": VALUES, "y": {"a": "text"}}, do_compression=squeeze)
    damaged = bytearray(buffer.getvalue())
    for place, value in damage:
        damaged[int(place * (len(damaged) - 1))] = value
    root = tmp_path_factory.getbasetemp()
    (root / "a.mat").write_bytes(damaged[: int(keep * len(damaged))])
    line = ""
    try:
        with warnings.catch_warnings(action="ignore"):
            assert isinstance(read_matlab(root, "a.mat", "7"), dict)
    except ValueError as error:
        line = str(error)
    assert not line or line.startswith("frame 7: a.mat cannot be read (")
    assert "\n" not in line


def test_a_list_of_numbers_is_read_from_inside_the_folder_only(tmp_path):
    (tmp_path / "data").mkdir()
    for values in (np.arange(5), np.arange(5, dtype=">f4")):
        (tmp_path / "data/a.npy").write_bytes(npy(values))
        assert (read_vector(tmp_path / "data", "a.npy") == values).all()
    (tmp_path / "outside.npy").write_bytes(npy(np.arange(5)))
    (tmp_path / "data/link.npy").symlink_to("../outside.npy")
    (tmp_path / "data/map.npy").write_bytes(npy())
    for relative, message in [
        ("link.npy", r"^link\.npy is a link that leaves the data folder; copy the file there"),
        ("../outside.npy", r"^\.\./outside\.npy: expected a path inside the data folder"),
        ("none.npy", r"^none\.npy cannot be read \(No such file or directory\)$"),
        ("map.npy", r"^map\.npy cannot be read \(expected a list of numbers, got uint8 of shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_vector(tmp_path / "data", relative)


def test_a_missing_module_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"need h5py: pip install 'oneshot-ednas\[matlab\]'"):
        read(tmp_path, "a.mat", b"", stack="depths")


def test_a_stack_gives_the_map_of_each_frame_as_matlab_shows_it(tmp_path):
    h5py = pytest.importorskip("h5py")
    colour = np.arange(2 * 6 * 8 * 3).reshape(6, 8, 3, 2)  # in MATLAB: rows, columns, 3, frames
    with h5py.File(tmp_path / "all.mat", "w") as file:
        file["depths"] = np.stack([VALUES, VALUES + 1], axis=-1).T
        file["images"] = colour.T
        file["group/x"] = 1
        file["scalar"] = 1
        file["elsewhere"] = h5py.ExternalLink("other.mat", "depths")
    with h5py.File(tmp_path / "other.mat", "w") as file:
        file["depths"] = np.zeros((2, 8, 6))
    for frame in range(2):
        found = read_array(tmp_path, "all.mat", str(frame), stack="depths")
        assert (found == VALUES + frame).all()
        found = read_array(tmp_path, "all.mat", str(frame), stack="images")
        assert (found == colour[..., frame]).all()
    for stack, frame, message in [
        ("depths", "2", r"depths has frames 0\.\.1"),
        ("depths", "a", r"depths has frames 0\.\.1"),
        ("depths", "-1", r"depths has frames 0\.\.1"),
        ("group", "0", "it has no array group"),
        ("absent", "0", "it has no array absent"),
        ("elsewhere", "0", "it has no array elsewhere"),
        ("scalar", "0", r"scalar has shape \(\), expected one map per frame"),
    ]:
        with pytest.raises(ValueError, match=rf"all\.mat cannot be read \({message}"):
            read_array(tmp_path, "all.mat", frame, stack=stack)
    assert "signature" in refused(tmp_path, "a.mat", b"hello" * 50, stack="depths")
