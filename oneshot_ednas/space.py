"""The search space as frozen data: what may vary per block, and the fixed rest of the network.

A space with one option left per choice (`space.fix(architecture)`) describes one network; the
same builder, latency walk and JSON serve both.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, SupportsInt, runtime_checkable

from oneshot_ednas.architecture import MAX_BLOCKS, MAX_SIZE, Architecture, BlockArchitecture
from oneshot_ednas.schema import dump_yaml, find_file, load_yaml, parse_yaml, shipped

OPS = ("ibn", "fused_ibn")
MAX_REPEATS = 100
"""Levels and repetitions of the fusion, and convolutions of a head: no network has more."""
CHOICE_FIELDS = ("op", "kernel_size", "expand_ratio", "filters")
"""The decisions of a block, in the order in which choices are listed and encoded."""


@runtime_checkable
class _NumpyGenerator(Protocol):
    """What we use of `numpy.random.Generator`, so that this module needs no NumPy."""

    def integers(self, high: int, /) -> SupportsInt: ...


Generator = random.Random | _NumpyGenerator


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One decision of the space: two or more options for one field of one block."""

    block: int
    """Number of the block, from 1 as in the paper's tables."""
    field: str
    """One of `CHOICE_FIELDS`."""
    options: tuple[str | int, ...]

    @property
    def name(self) -> str:
        """For example `block_3.kernel_size`."""
        return f"block_{self.block}.{self.field}"


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One block: its stride, its base row, and the options of its four decisions."""

    stride: int
    base: BlockArchitecture
    ops: tuple[str, ...]
    kernel_sizes: tuple[int, ...]
    expand_ratios: tuple[int, ...]
    filters: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse options that the elastic blocks cannot hold."""
        if self.stride not in (1, 2):
            raise ValueError(f"stride: expected 1 or 2, got {self.stride}")
        for op in self.ops:
            if op not in OPS:
                raise ValueError(f"ops: expected some of {', '.join(OPS)}, got {op}")
        for field in CHOICE_FIELDS:
            options = self.options(field)
            if not options or len(set(options)) != len(options):
                raise ValueError(f"{field}: expected distinct options, got {list(options)}")
            if field != "op" and (
                not 1 <= min(options) <= max(options) <= MAX_SIZE
                or list(options) != sorted(options)
            ):
                raise ValueError(
                    f"{field}: expected ascending positive options, got {list(options)}"
                )
            if getattr(self.base, field) not in options:
                raise ValueError(
                    f"{field}: base value {getattr(self.base, field)} is none of {list(options)}"
                )
        if any(size % 2 == 0 for size in self.kernel_sizes):
            raise ValueError(f"kernel_size: expected odd sizes, got {list(self.kernel_sizes)}")
        if "ibn" in self.ops and 1 in self.expand_ratios and len(self.expand_ratios) > 1:
            # An IBN of expansion 1 has no expanding convolution, so it shares no weights
            # with one of expansion 3.
            raise ValueError("expand_ratio: 1 cannot be mixed with other ratios in an IBN")

    def options(self, field: str) -> tuple[Any, ...]:
        """The options of one of `CHOICE_FIELDS`."""
        names = {"op": "ops", "kernel_size": "kernel_sizes", "expand_ratio": "expand_ratios"}
        return getattr(self, names.get(field, field))


@dataclass(frozen=True, kw_only=True)
class FusionSpec:
    """The BiFPN between backbone and heads.

    Source: EfficientDet (Tan et al., CVPR 2020), with plain sums and ReLU6 as in EDNAS 3.1.
    """

    tap_blocks: tuple[int, ...]
    """Numbers (from 1) of the blocks whose output enters; each has twice the stride before it."""
    num_levels: int
    """Levels in all; those past the taps are made by a 1x1 convolution and max-pooling."""
    channels: int
    num_repeats: int


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The head of each task, at the finest fused level."""

    num_convs: int
    """Separable convolutions before the separable classifier."""


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """All networks that the search may return."""

    name: str
    stem_filters: int
    blocks: tuple[BlockSpec, ...]
    fusion: FusionSpec
    head: HeadSpec

    def __post_init__(self) -> None:
        """Check that the taps exist and double their stride one after the other."""
        taps = self.fusion.tap_blocks
        if not self.blocks:
            raise ValueError("blocks: expected at least one")
        if (
            not taps
            or list(taps) != sorted(set(taps))
            or not 1 <= taps[0] <= taps[-1] <= len(self.blocks)
        ):
            raise ValueError(
                f"fusion.tap_blocks: expected ascending numbers from 1 to {len(self.blocks)}, "
                f"got {list(taps)}"
            )
        strides = [self.block_strides[tap - 1] for tap in taps]
        if any(after != 2 * before for before, after in pairwise(strides)):
            raise ValueError(
                f"fusion.tap_blocks: each tap needs twice the stride of the one before, "
                f"got {strides}"
            )
        if len(self.blocks) > MAX_BLOCKS:
            raise ValueError(f"blocks: expected at most {MAX_BLOCKS}, got {len(self.blocks)}")
        for label, value, most in (
            ("stem_filters", self.stem_filters, MAX_SIZE),
            ("fusion.channels", self.fusion.channels, MAX_SIZE),
            ("fusion.num_levels", self.fusion.num_levels, MAX_REPEATS),
            ("fusion.num_repeats", self.fusion.num_repeats, MAX_REPEATS),
            ("head.num_convs", self.head.num_convs, MAX_REPEATS),
        ):
            if value > most:
                raise ValueError(f"{label}: expected at most {most}, got {value}")
        if self.fusion.num_levels < max(2, len(taps)) or self.fusion.num_repeats < 1:
            raise ValueError(
                f"fusion: expected num_levels >= {max(2, len(taps))} and num_repeats >= 1, "
                f"got {self.fusion.num_levels} and {self.fusion.num_repeats}"
            )
        for label, value in (
            ("stem_filters", self.stem_filters),
            ("fusion.channels", self.fusion.channels),
            ("head.num_convs", self.head.num_convs),
        ):
            if value < 1:
                raise ValueError(f"{label}: expected at least 1, got {value}")

    # Shapes ---------------------------------------------------------------------------------

    @cached_property
    def block_strides(self) -> tuple[int, ...]:
        """Stride of each block's output with respect to the image."""
        stride, strides = 2, []
        for block in self.blocks:
            stride *= block.stride
            strides.append(stride)
        return tuple(strides)

    @property
    def output_stride(self) -> int:
        """Stride of the maps that the network returns."""
        return self.block_strides[self.fusion.tap_blocks[0] - 1]

    def in_filters(self, index: int) -> tuple[int, ...]:
        """Options of the input channels of block `index` (from 0)."""
        return self.blocks[index - 1].filters if index else (self.stem_filters,)

    # Choices --------------------------------------------------------------------------------

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """The decisions that are left: those with two options or more."""
        return tuple(
            Choice(block=number, field=field, options=block.options(field))
            for number, block in enumerate(self.blocks, start=1)
            for field in CHOICE_FIELDS
            if len(block.options(field)) > 1
        )

    @property
    def num_architectures(self) -> int:
        """Exact size of the space."""
        return math.prod(len(choice.options) for choice in self.choices)

    @property
    def is_fixed(self) -> bool:
        """Whether the space is one network."""
        return not self.choices

    @property
    def base_architecture(self) -> Architecture:
        """The network that seeds the space; of a fixed space, its only one."""
        return Architecture(tuple(block.base for block in self.blocks), space=self.name)

    def check(self, architecture: Architecture) -> None:
        """Raise unless the architecture is in the space.

        Raises:
            ValueError: naming the block, the decision, its value and the options.
        """
        if len(architecture.blocks) != len(self.blocks):
            raise ValueError(
                f"architecture has {len(architecture.blocks)} blocks, "
                f"space {self.name} has {len(self.blocks)}"
            )
        for number, (spec, block) in enumerate(
            zip(self.blocks, architecture.blocks, strict=True), start=1
        ):
            for field in CHOICE_FIELDS:
                if getattr(block, field) not in spec.options(field):
                    raise ValueError(
                        f"architecture is not in space {self.name}: block {number} has {field} "
                        f"{getattr(block, field)}, the options are {list(spec.options(field))}"
                    )

    def __contains__(self, architecture: object) -> bool:
        """Whether `check` passes."""
        if not isinstance(architecture, Architecture):
            return False
        try:
            self.check(architecture)
        except ValueError:
            return False
        return True

    def fix(self, architecture: Architecture) -> "SearchSpace":
        """The space with only this architecture left.

        Raises:
            ValueError: if the architecture is not in the space.
        """
        self.check(architecture)
        blocks = tuple(
            replace(
                spec,
                base=block,
                ops=(block.op,),
                kernel_sizes=(block.kernel_size,),
                expand_ratios=(block.expand_ratio,),
                filters=(block.filters,),
            )
            for spec, block in zip(self.blocks, architecture.blocks, strict=True)
        )
        return replace(self, blocks=blocks)

    # Encode, sample, mutate -----------------------------------------------------------------

    def encode(self, architecture: Architecture) -> tuple[int, ...]:
        """One option index per choice; `decode` inverts it.

        Raises:
            ValueError: if the architecture is not in the space.
        """
        self.check(architecture)
        return tuple(
            choice.options.index(getattr(architecture.blocks[choice.block - 1], choice.field))
            for choice in self.choices
        )

    def decode(self, indices: tuple[int, ...] | list[int]) -> Architecture:
        """The architecture with these option indices, one per choice.

        Raises:
            ValueError: for a wrong number of indices or one out of range.
        """
        if len(indices) != len(self.choices):
            raise ValueError(f"expected {len(self.choices)} indices, got {len(indices)}")
        rows = [
            {field: block.options(field)[0] for field in CHOICE_FIELDS} for block in self.blocks
        ]
        for choice, index in zip(self.choices, indices, strict=True):
            if not 0 <= index < len(choice.options):
                raise ValueError(
                    f"{choice.name}: expected an index below {len(choice.options)}, got {index}"
                )
            rows[choice.block - 1][choice.field] = choice.options[index]
        return Architecture(tuple(BlockArchitecture(**row) for row in rows), space=self.name)

    def sample(self, generator: Generator) -> Architecture:
        """An architecture drawn uniformly.

        Args:
            generator: a `numpy.random.Generator` or a `random.Random`.
        """
        return self.decode([_draw(generator, len(choice.options)) for choice in self.choices])

    def extreme(self, architecture: Architecture, *, largest: bool) -> Architecture:
        """The largest or smallest architecture with the ops of another.

        Raises:
            ValueError: if the other is not in the space.
        """
        indices = [
            index if choice.field == "op" else (len(choice.options) - 1 if largest else 0)
            for index, choice in zip(self.encode(architecture), self.choices, strict=True)
        ]
        return self.decode(indices)

    def mutate(self, architecture: Architecture, generator: Generator) -> Architecture:
        """The architecture with one choice, drawn uniformly, set to another of its options.

        Raises:
            ValueError: if the architecture is not in the space, or nothing can vary.
        """
        if self.is_fixed:
            raise ValueError(f"space {self.name} is one network: nothing to mutate")
        indices = list(self.encode(architecture))
        which = _draw(generator, len(self.choices))
        shift = 1 + _draw(generator, len(self.choices[which].options) - 1)
        indices[which] = (indices[which] + shift) % len(self.choices[which].options)
        return self.decode(indices)

    # PyGlove --------------------------------------------------------------------------------

    def to_pyglove(self) -> Any:
        """The space as a symbolic value of PyGlove, with a `pg.oneof` per choice.

        A `pg.Dict` of blocks `block_1`, `block_2`, ..., each with the `CHOICE_FIELDS`. Its DNA has
        one number per choice, the one that `encode` gives.
        """
        import pyglove as pg  # takes half a second

        def decision(options: tuple[Any, ...]) -> Any:
            return pg.oneof(list(options)) if len(options) > 1 else options[0]

        return pg.Dict(
            {
                f"block_{number}": pg.Dict(
                    {field: decision(block.options(field)) for field in CHOICE_FIELDS}
                )
                for number, block in enumerate(self.blocks, start=1)
            }
        )

    def from_pyglove(self, value: Mapping[str, Mapping[str, Any]]) -> Architecture:
        """The architecture of a value of `to_pyglove` without choices, as PyGlove decodes a DNA.

        Raises:
            ValueError: if the value is not of this space.
        """
        names = [f"block_{number}" for number in range(1, len(self.blocks) + 1)]
        if list(value) != names or any(set(row) != set(CHOICE_FIELDS) for row in value.values()):
            raise ValueError(
                f"expected a value of the {len(names)} blocks of space {self.name}, each with "
                f"{', '.join(CHOICE_FIELDS)}; got {dict(value)}"
            )
        rows = [{field: value[name][field] for field in CHOICE_FIELDS} for name in names]
        architecture = Architecture(tuple(BlockArchitecture(**r) for r in rows), space=self.name)
        self.check(architecture)
        return architecture

    # Files ----------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> "SearchSpace":
        """Read a space from YAML (see `configs/spaces/`).

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for anything wrong in it, with file and line.
        """
        return load_yaml(Path(path), _SpaceFile).space()

    @classmethod
    def from_yaml(cls, text: str, *, source: str = "space") -> "SearchSpace":
        """Like `load`, for text."""
        return parse_yaml(text, _SpaceFile, source=source).space()

    def to_yaml(self) -> str:
        """YAML text that `from_yaml` reads back to an equal space."""
        rows = tuple(
            _BlockRow(
                stride=block.stride,
                op=block.base.op,
                kernel_size=block.base.kernel_size,
                filters=block.base.filters,
                expand_ratio=block.base.expand_ratio,
                options=_Options(
                    ops=block.ops,
                    kernel_sizes=block.kernel_sizes,
                    expand_ratios=block.expand_ratios,
                    filters=block.filters,
                ),
            )
            for block in self.blocks
        )
        return dump_yaml(
            _SpaceFile(
                name=self.name,
                stem_filters=self.stem_filters,
                blocks=rows,
                fusion=self.fusion,
                head=self.head,
            )
        )


def _draw(generator: Generator, options: int) -> int:
    if isinstance(generator, random.Random):
        return generator.randrange(options)
    return int(generator.integers(options))


def named_space(name: str) -> SearchSpace:
    """A space shipped under `configs/spaces/`, by name, or read from a YAML file by its path.

    Raises:
        FileNotFoundError: if it is neither.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        return SearchSpace.load(find_file(name))
    folder = shipped("configs/spaces")
    if not (folder / f"{name}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise FileNotFoundError(f"no search space {name}; shipped: {known}; or give a YAML file")
    return _shipped_space(folder / f"{name}.yaml")


@lru_cache
def _shipped_space(path: Path) -> SearchSpace:
    return SearchSpace.load(path)


def ednas_b0() -> SearchSpace:
    """The paper's space: EfficientNet-B0's 16 blocks, BiFPN 4 x 88 channels, heads at stride 8.

    Source: EDNAS, Vu et al., WACV 2023, section 3.1; EfficientNet, Tan and Le, ICML 2019, table 1.
    """
    return named_space("ednas_b0")


def ednas_tiny() -> SearchSpace:
    """A thin space of the same structure for small images, demos and tests."""
    return named_space("ednas_tiny")


# What a space file may say ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Options:
    ops: tuple[str, ...] | None = None
    kernel_sizes: tuple[int, ...] | None = None
    expand_ratios: tuple[int, ...] | None = None
    filter_multipliers: tuple[float, ...] | None = None
    filters: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """An empty list is no way to say "the default"."""
        for field in fields(self):
            if getattr(self, field.name) == ():
                raise ValueError(f"{field.name}: expected at least one option")


@dataclass(frozen=True, kw_only=True)
class _BlockRow:
    stride: int
    op: str = "ibn"
    kernel_size: int
    filters: int
    expand_ratio: int
    options: _Options = _Options()

    def spec(self, defaults: _Options) -> BlockSpec:
        own, base = self.options, self
        return BlockSpec(
            stride=self.stride,
            base=BlockArchitecture(
                op=base.op,
                kernel_size=base.kernel_size,
                filters=base.filters,
                expand_ratio=base.expand_ratio,
            ),
            ops=own.ops or defaults.ops or (base.op,),
            kernel_sizes=own.kernel_sizes or defaults.kernel_sizes or (base.kernel_size,),
            expand_ratios=own.expand_ratios or defaults.expand_ratios or (base.expand_ratio,),
            filters=own.filters or self._multiplied(own, defaults),
        )

    def _multiplied(self, own: _Options, defaults: _Options) -> tuple[int, ...]:
        widths = []
        for multiplier in own.filter_multipliers or defaults.filter_multipliers or (1.0,):
            width = self.filters * multiplier
            if not abs(width) <= MAX_SIZE or width != int(width):
                raise ValueError(
                    f"filters: {self.filters} x {multiplier} = {width:g} is not a whole number; "
                    f"list the filters of this block instead"
                )
            widths.append(int(width))
        return tuple(widths)


@dataclass(frozen=True, kw_only=True)
class _SpaceFile:
    name: str
    stem_filters: int
    options: _Options = _Options()
    blocks: tuple[_BlockRow, ...]
    fusion: FusionSpec
    head: HeadSpec

    def __post_init__(self) -> None:
        """Build the space once, so that what it refuses is reported with file and line."""
        self.space()

    def space(self) -> SearchSpace:
        blocks = []
        for number, row in enumerate(self.blocks, start=1):
            try:
                blocks.append(row.spec(self.options))
            except ValueError as error:
                raise ValueError(f"block {number}: {error}") from None
        return SearchSpace(
            name=self.name,
            stem_filters=self.stem_filters,
            blocks=tuple(blocks),
            fusion=self.fusion,
            head=self.head,
        )
