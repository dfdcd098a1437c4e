"""An architecture: what one network of a search space looks like, as plain values and JSON."""

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from reprlib import repr as clipped

from oneshot_ednas.parsing import one_line
from oneshot_ednas.schema import nearest, read_json
from oneshot_ednas.store import write_text

FORMAT = 1
MAX_BLOCKS = 1000
MAX_SIZE = 2**20
"""Of the numbers of a block: no network comes near."""
_SHORT_BLOCK = re.compile(r"([if])([0-9]{1,7})e([0-9]{1,7})c([0-9]{1,7})")


@dataclass(frozen=True, kw_only=True)
class BlockArchitecture:
    """What one block is: a row of EDNAS table 6."""

    op: str
    """`ibn` (inverted bottleneck) or `fused_ibn` (full convolution for expand + depthwise)."""
    kernel_size: int
    """Side of the square kernel, in pixels."""
    filters: int
    """Output channels."""
    expand_ratio: int
    """Hidden channels as a multiple of the input channels."""


@dataclass(frozen=True)
class Architecture:
    """One network: a `BlockArchitecture` per block, in order.

    Source: tables 6 and 7 of EDNAS (Vu et al., WACV 2023) print architectures in this form.
    """

    blocks: tuple[BlockArchitecture, ...]
    space: str = field(default="", compare=False)
    """Name of the search space that it was drawn from; for people, not part of equality."""

    def to_json(self) -> dict[str, object]:
        """JSON-ready form; `from_json` reads it back."""
        return {
            "format": FORMAT,
            "space": self.space,
            "blocks": [asdict(block) for block in self.blocks],
        }

    @classmethod
    def from_json(cls, data: object, *, source: str = "architecture") -> "Architecture":
        """Read the JSON form.

        Raises:
            ValueError: naming `source` and the block and key that are wrong.
        """
        if not isinstance(data, dict) or not isinstance(data.get("blocks"), list):
            raise ValueError(f'{source}: expected an object with a list "blocks"')
        if data.get("format", FORMAT) != FORMAT:
            raise ValueError(
                f"{source}: expected format {FORMAT}, got {clipped(data['format'])}; "
                f"a newer version of oneshot_ednas wrote it"
            )
        unknown = set(data) - {"format", "space", "blocks"}
        if unknown:
            known = ("format", "space", "blocks")
            raise ValueError(
                f"{source}: unknown key {one_line(min(unknown)[:40])}; "
                f"{nearest(min(unknown), known)}"
            )
        if not isinstance(data.get("space", ""), str):
            raise ValueError(f"{source}: space: expected text, got {clipped(data['space'])}")
        if len(data["blocks"]) > MAX_BLOCKS:
            raise ValueError(
                f"{source}: expected at most {MAX_BLOCKS} blocks, got {len(data['blocks'])}"
            )
        blocks = tuple(
            _read_block(block, f"{source}: block {number}")
            for number, block in enumerate(data["blocks"], start=1)
        )
        return cls(blocks, space=data.get("space", ""))

    def to_text(self) -> str:
        """The JSON form as text, one line per block."""
        rows = ",\n    ".join(json.dumps(asdict(block)) for block in self.blocks)
        return (
            f'{{\n  "format": {FORMAT},\n  "space": {json.dumps(self.space)},\n'
            f'  "blocks": [\n    {rows}\n  ]\n}}\n'
        )

    def save(self, path: str | Path) -> None:
        """Write the JSON form to a file."""
        write_text(Path(path), self.to_text())

    @classmethod
    def load(cls, path: str | Path) -> "Architecture":
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not an architecture; names the file and the place.
        """
        return cls.from_json(read_json(Path(path)), source=str(path))

    @classmethod
    def from_short(cls, text: str, *, space: str = "") -> "Architecture":
        """Read the short form that `str` gives.

        Raises:
            ValueError: naming the word that is none.
        """
        blocks = []
        for word in text.split():
            match = _SHORT_BLOCK.fullmatch(word)
            if match is None:
                raise ValueError(f"expected blocks such as f5e6c36, got {clipped(word)}")
            op, kernel_size, expand_ratio, filters = match.groups()
            blocks.append(
                BlockArchitecture(
                    op="fused_ibn" if op == "f" else "ibn",
                    kernel_size=int(kernel_size),
                    filters=int(filters),
                    expand_ratio=int(expand_ratio),
                )
            )
        if not blocks:
            raise ValueError("expected blocks such as f5e6c36, got none")
        return cls(tuple(blocks), space=space)

    def __str__(self) -> str:
        """Short form, one word per block: `f5e6c36` is a Fused-IBN, kernel 5, expansion 6."""
        return " ".join(
            f"{'f' if b.op == 'fused_ibn' else 'i'}{b.kernel_size}e{b.expand_ratio}c{b.filters}"
            for b in self.blocks
        )


def _read_block(data: object, where: str) -> BlockArchitecture:
    kinds = {f.name: f.type for f in fields(BlockArchitecture)}
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object with keys {', '.join(kinds)}")
    for key in data:
        if key not in kinds:
            raise ValueError(
                f"{where}: unknown key {one_line(str(key)[:40])}; {nearest(str(key), kinds)}"
            )
    for key, kind in kinds.items():
        if key not in data:
            raise ValueError(f"{where}: missing key {key}")
        value = data[key]
        if not isinstance(value, kind) or isinstance(value, bool):  # type: ignore[arg-type]
            word = "text" if kind is str else "a whole number"
            raise ValueError(f"{where}: {key}: expected {word}, got {clipped(value)}")
        if kind is int and not 0 < value <= MAX_SIZE:
            raise ValueError(f"{where}: {key}: expected 1 to {MAX_SIZE}, got {value}")
    return BlockArchitecture(**data)
