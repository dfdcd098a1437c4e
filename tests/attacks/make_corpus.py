"""Files that attack a reader: bombs, lies, links and code where plain data belong.

    python tests/attacks/make_corpus.py FOLDER

The same files each time. `tests/test_attacks.py` says which reader takes each, and how it refuses
it. None of them harms: what would be run only makes a file `pwned` in the working directory.
"""

import io
import json
import os
import pickle
import sqlite3
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image
from safetensors.numpy import save as save_tensors

LAUGHS = "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" if before else f"{name}: &{name} [lol]\n"
    for before, name in zip(["", *"abcdefgh"], "abcdefghi", strict=True)
)
ARCHITECTURE = {"op": "ibn", "kernel_size": 3, "filters": 8, "expand_ratio": 1}
TABLE = """\
# device: toy
# source: simulated
# host: none
# runtime: toy 1.0
# date: 2024-01-01
# {more}
# space: small
# image_height: 32
# image_width: 48
# out_channels: {{depth: 1}}
# fixed_ms: 0.4
# input_ms_per_byte: 1.0e-06
# output_ms_per_byte: 1.0e-06
# cache_bytes: 1.0e+09
# streaming_ms_per_byte: 0.0
op,in_channels,out_channels,kernel_size,expand_ratio,stride,in_height,in_width,out_height,out_width,\
residual,latency_ms,spread_ms,parameter_bytes
"""
ROW = "conv,3,8,3,1,2,32,48,16,24,0,{ms},{spread},{size}\n"
NETWORK = {
    "group": "g",
    "model": "m",
    "device": "Coral USB Accelerator",
    "host": "PC",
    "bus": "USB 3",
    "measured_ms": 1.0,
    "input_bytes": 100,
    "output_bytes": 10,
    "layers": [["conv", 32, 32, 3, 16, 16, 8, 3, 3, 2]],
}
MANIFEST = """\
name: toy
image: {{folder: {folder}, suffix: .png}}
splits: {{train: {split}}}
targets: {{}}
"""
SESSION = {"type": "session", "format": 1, "unit": "ms"}


class Trap:
    """Makes a file where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, ("pwned",)


def corpus() -> dict[str, bytes]:
    """Content of each file by its name."""
    return dict(
        pair
        for part in (yaml, json_text, images, arrays, matlab, tables, checkpoints, bundles, tflite)
        for pair in part()
    )


def yaml() -> Iterator[tuple[str, bytes]]:
    """Configs and manifests."""
    texts = {
        "bomb": LAUGHS,
        "bomb_wide": f"a: &a [{'x, ' * 500}x]\nb: [{'*a, ' * 500}*a]\n",
        "bomb_merge": f"a: &a {{{', '.join(f'k{i}: 1' for i in range(200))}}}\n"
        + "".join(f"b{i}: {{<<: *a}}\n" for i in range(200)),
        "cycle_list": "seed: &a [*a]\n",
        "cycle_map": "data: &a\n  root: *a\n",
        "cycle_deep": "data: &a {b: {c: [1, {d: *a}]}}\n",
        "python_apply": 'seed: !!python/object/apply:os.mkdir ["pwned"]\n',
        "python_new": 'seed: !!python/object/new:os.mkdir ["pwned"]\n',
        "python_name": 'device: !!python/name:os.system ""\n',
        "python_module": 'device: !!python/module:antigravity ""\n',
        "include": "seed: !include /etc/passwd\n",
        "binary": "device: !!binary aGVsbG8=\n",
        "deep_flow": "seed: " + "[" * 100_000,
        "deep_map": "seed: " + "{a: " * 20_000,
        "deep_block": "\n".join("  " * i + "a:" for i in range(60)) + "\n",
        "large": "# " + "x" * 300_000 + "\n",
        "many_keys": "".join(f"a{i}: 1\n" for i in range(6_000)),
        "nul": "seed: \0\n",
        "half_pair": 'device: "\\uD800"\n',
        "steering": '"\\e]0;gotcha\\a": 1\n',
        "no_character": 'device: "\\UFFFFFFFF"\n',
        "huge_number": f"seed: {'9' * 5_000}\n",
        "long_number": f"seed: {'9' * 80}\n",
        "sixties": f"seed: 1{':30' * 50_000}\n",
        "lying_tag": "seed: !!int abc\n",
        "nan": "latency: {table: a.csv, target_ms: .nan}\n",
        "infinity": "latency: {table: a.csv, target_ms: 1e999}\n",
        "twice": "seed: 1\nseed: 2\n",
        "documents": "seed: 1\n---\nseed: 2\n",
        "undefined": "seed: *nothing\n",
        "list": "- 1\n",
    }
    for name, text in texts.items():
        yield f"{name}.yaml", text.encode()
    yield "latin1.yaml", "device: café\n".encode("latin-1")
    yield "utf16.yaml", "seed: 1\n".encode("utf-16")
    yield "not_text.yaml", bytes(range(256))
    for name, folder, split in (
        ("parent", "../outside", "train.txt"),
        ("absolute", "/etc", "train.txt"),
        ("split", "rgb", "../outside/list.txt"),
        ("backslash", "'..\\outside'", "train.txt"),
    ):
        yield f"manifest_{name}.yaml", MANIFEST.format(folder=folder, split=split).encode()
    yield "frames_parent.txt", b"a\n../outside/b\n"
    yield "frames_absolute.txt", b"/etc/passwd\n"
    yield "frames_latin1.txt", "café\n".encode("latin-1")


def json_text() -> Iterator[tuple[str, bytes]]:
    """Architectures, published networks, and a camera."""
    block = json.dumps(ARCHITECTURE)
    texts = {
        "deep": "[" * 100_000,
        "deep_whole": "[" * 200 + "]" * 200,
        "deep_objects": '{"a":' * 100_000,
        "nan": '{"blocks": [NaN]}',
        "infinity": '{"blocks": [1e999]}',
        "huge_number": f'{{"blocks": [{"9" * 5_000}]}}',
        "twice": '{"blocks": [], "blocks": []}',
        "half_pair": '{"space": "\\ud800", "blocks": []}',
        "types": '{"blocks": [[1, 2]]}',
        "list": "[]",
        "null": "null",
        "space_type": f'{{"space": [1], "blocks": [{block}]}}',
        "bool": f'{{"blocks": [{block.replace("8", "true")}]}}',
        "negative": f'{{"blocks": [{block.replace("8", "-8")}]}}',
        "many_blocks": f'{{"blocks": [{", ".join([block] * 2_000)}]}}',
        "steering": '{"blocks": [], "\\u001b[31m": 1}',
        "format": '{"format": [1], "blocks": []}',
    }
    for name, text in texts.items():
        yield f"{name}.json", text.encode()
    yield "not_text.json", bytes(range(128, 256))

    def networks(**changes: object) -> bytes:
        return json.dumps({"networks": [NETWORK | changes]}).encode()

    yield "networks_op.json", networks(layers=[[["conv"], *NETWORK["layers"][0][1:]]])  # type: ignore[index]
    yield "networks_size.json", networks(layers=[["conv", *[10**30] * 9]])
    yield "networks_ms.json", networks(measured_ms=1e-320)
    yield "networks_bytes.json", networks(input_bytes=1e300)
    yield "networks_model.json", networks(model={"a": 1})
    yield "networks_bus.json", networks(bus="<script>alert(1)</script>")


def image(form: str, array: np.ndarray | None = None) -> bytes:
    """A small picture in a format."""
    values = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64) if array is None else array
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form)
    return buffer.getvalue()


def png_header(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says how large it is, and holds a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    held = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in held
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def images() -> Iterator[tuple[str, bytes]]:
    """Pictures that are none, or far too large."""
    yield "bomb.png", png_header(60_000, 60_000)
    yield "large.png", png_header(10_001, 10_001)
    yield "empty.png", png_header(0, 0)
    yield "text_bomb.png", png_header(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27), 1)))
    yield "truncated.png", image("PNG")[:-100]
    yield "truncated.jpg", image("JPEG")[:400]
    scan = image("JPEG")
    start = scan.index(b"\xff\xda")
    yield "scans.jpg", scan[:-2] + scan[start:-2] * 200 + scan[-2:]
    for form in ("GIF", "TIFF", "BMP", "WEBP"):
        yield f"{form.lower()}.png", image(form)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(pwned) (w) file\n"
    yield "eps.png", eps
    yield "svg.png", b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    yield "zip.png", b"PK\x03\x04" + bytes(60)


def npy(text: str, data: bytes = b"") -> bytes:
    """An array file of a header and some bytes."""
    header = text.encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header + data


def arrays() -> Iterator[tuple[str, bytes]]:
    """Arrays with code, or fewer values than they say."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([[Trap()]], dtype=object), allow_pickle=True)
    yield "object.npy", buffer.getvalue()
    yield "pickle.npy", pickle.dumps(Trap())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("../../pwned.npy"), b"x")
    yield "archive.npy", buffer.getvalue()
    shape = "{{'descr': '<f4', 'fortran_order': False, 'shape': {}, }}"
    yield "short.npy", npy(shape.format((100, 100)), bytes(40))
    yield "large.npy", npy(shape.format((10**6, 10**6)))
    yield "overflow.npy", npy(shape.format((2**62, 2**62)))
    yield "negative.npy", npy(shape.format((-1, 4)))
    yield "code.npy", npy("__import__('os').mkdir('pwned')")
    yield "deep.npy", npy("[" * 5000)


def element(kind: int, content: bytes) -> bytes:
    """An element of a MATLAB file."""
    return struct.pack("<II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def variable(array_class: int, sides: tuple[int, ...], *content: bytes) -> bytes:
    """A MATLAB array that claims those sides."""
    sizes = struct.pack(f"<{len(sides)}i", *sides)
    head = [element(6, struct.pack("<II", array_class, 0)), element(5, sizes), element(1, b"x")]
    return element(14, b"".join([*head, *content]))


def matlab() -> Iterator[tuple[str, bytes]]:
    """MATLAB files that are deep or large."""
    start = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    nested = variable(9, (1, 1), element(2, bytes(1)))
    for _ in range(1_500):
        nested = variable(1, (1, 1), nested)
    yield "nested.mat", start + nested
    yield "claims.mat", start + variable(1, (2**31 - 1, 2**31 - 1))
    squeezed = zlib.compress(variable(9, (2**14, 2**14), element(2, bytes(2**28))), 1)
    yield "bomb.mat", start + struct.pack("<II", 15, len(squeezed)) + squeezed
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"x": np.zeros((30, 30))})
    # The text at the start tells the time.
    yield "truncated.mat", start[:124] + buffer.getvalue()[124:-40]


def tables() -> Iterator[tuple[str, bytes]]:
    """Latency tables."""
    good = {"ms": "0.5", "spread": "0", "size": "216"}
    for name, more, row in (
        ("rows", "rows: 10000000", {}),
        ("formula", "runs: 1", {"ms": '=cmd|"/c calc"!A1'}),
        ("formula_key", "=1+1: 2", {}),
        ("negative", "runs: 1", {"ms": "-0.5"}),
        ("nan", "runs: 1", {"ms": "nan"}),
        ("huge", "runs: 1", {"ms": "1e300"}),
        ("digits", "runs: 1", {"size": "9" * 5_000}),
        ("superscript", "runs: 1", {"size": "²"}),
        ("quotes", "runs: 1", {"ms": '"0.5\n\n'}),
        ("field", "runs: 1", {"ms": '"' + "x" * 200_000}),
        ("python", "note: !!python/object/apply:os.mkdir [pwned]", {}),
        ("header_bomb", "note: " + "[" * 10_000, {}),
    ):
        text = TABLE.format(more=more) + ROW.format(**(good | row))
        yield f"table_{name}.csv", text.encode()
    yield "table_large.csv", TABLE.format(more="runs: 1").encode() + bytes(2**24)


def safetensors(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of tensors with whatever header."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def checkpoints() -> Iterator[tuple[str, bytes]]:
    """Checkpoints."""
    tensor = '{"dtype": "F32", "shape": [2], "data_offsets": [0, %d]}'
    one = '{"__metadata__": {"format": "1", "state": %s, "sha256": "x"}}'
    yield "empty.safetensors", b""
    yield "offsets.safetensors", safetensors(f'{{"a": {tensor % 2**40}}}'.encode(), bytes(8))
    yield "header.safetensors", safetensors(b"{}", length=2**63)
    lies = tensor.replace("[2]", "[4611686018427387904, 4]") % 8
    yield "shape.safetensors", safetensors(f'{{"a": {lies}}}'.encode(), bytes(8))
    yield (
        "twice.safetensors",
        safetensors(f'{{"a": {tensor % 8}, "a": {tensor % 8}}}'.encode(), bytes(8)),
    )
    yield "deep.safetensors", safetensors((one % json.dumps("[" * 100_000)).encode())
    yield "header_deep.safetensors", safetensors(b'{"a":' * 100_000)
    yield "no_json.safetensors", safetensors((one % '"{"').encode())
    yield "wrong_digest.safetensors", safetensors((one % '"{}"').encode())
    yield "no_state.safetensors", save_tensors({"a": np.zeros(2, np.float32)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), pickle.dumps(Trap()))
    yield "torch.safetensors", buffer.getvalue()
    yield "pickle.safetensors", pickle.dumps(Trap())


def bundles() -> Iterator[tuple[str, bytes]]:
    """Manifests of bundles, what the compiler said, and measurements."""
    yield "manifest_deep.json", b"[" * 100_000
    yield "manifest_code.json", b"{\"format\": \"__import__('os').mkdir('pwned')\"}"
    entry = {
        "model": "a.tflite",
        "compiled": "../outside/a.tflite",
        "on_chip_bytes": 1,
        "off_chip_bytes": 0,
        "mapped": 1,
        "unmapped": 0,
        "compiler": "16",
    }
    yield "compiled_parent/compiled.jsonl", json.dumps(entry).encode() + b"\n"
    absolute = entry | {"compiled": "/etc/passwd"}
    yield "compiled_absolute/compiled.jsonl", json.dumps(absolute).encode() + b"\n"
    yield "compiled_list/compiled.jsonl", b"[1]\n"
    yield "measured_deep.jsonl", b"[" * 100_000 + b"\n{}\n"
    huge = SESSION | {"format": 10**400}
    yield "measured_huge.jsonl", json.dumps(huge).encode() + b"\n{}\n"
    yield "measured_list.jsonl", b"[1]\n{}\n"


def tflite() -> Iterator[tuple[str, bytes]]:
    """Files for the interpreter."""
    yield "text.tflite", b"hello"
    yield "identifier.tflite", b"\x1c\0\0\0TFL3" + bytes(200)
    yield "offsets.tflite", b"\xff\xff\xff\x7fTFL3" + b"\xff" * 200
    yield "empty.tflite", b""


def databases(folder: Path) -> None:
    """SQLite files in place of trials; made on the disk, where SQLite writes them."""
    columns = "number INTEGER, architecture TEXT, choices TEXT, seed, state, proposed, ended"
    columns += ", metrics, accuracy, latency_ms, reward, seconds, cpu_seconds, macs, error"
    table = f"CREATE TABLE trials ({columns})"
    row = "INSERT INTO trials (number, architecture, choices, state) VALUES (0, {}, '[0]', 'done')"
    forever = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n"
    for name, statements in {
        "view": [f"CREATE VIEW trials AS {forever}"],
        "trigger": [
            table,
            "CREATE TRIGGER t AFTER INSERT ON trials BEGIN DELETE FROM trials; END",
        ],
        "more": [table, "CREATE TABLE other (x)"],
        "types": [table, row.format("'i3e1c8'").replace("'[0]'", "5")],
        "words": [table, row.format("'no architecture'")],
    }.items():
        path = folder / f"{name}.sqlite"
        path.unlink(missing_ok=True)
        connection = sqlite3.connect(path)
        for statement in (*statements, "PRAGMA user_version = 1"):
            connection.execute(statement)
        connection.commit()
        connection.close()
    (folder / "text.sqlite").write_bytes(b"hello\n" * 100)


def write(folder: Path) -> list[Path]:
    """All files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in corpus().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    databases(folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    made = write(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: {len(made)} files, {sum(path.stat().st_size for path in made)} bytes")
