"""The operations of a network: a walk over the search space, not over modules.

One `Operation` is one row of a latency table: a block, or one convolution, addition, pooling or
resize between blocks. Two networks that hold the same operation share its row.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from oneshot_ednas.architecture import Architecture, BlockArchitecture
from oneshot_ednas.space import BlockSpec, SearchSpace

OPERATION_KINDS = (
    "conv",  # convolution, BN, optional ReLU6
    "ibn",
    "fused_ibn",
    "separable_conv",  # depthwise 3x3, then 1x1
    "add",
    "max_pool",
    "resize",  # nearest neighbour
)


@dataclass(frozen=True, kw_only=True, order=True)
class Operation:
    """One distinct operation at one size; channels and sizes are those of the tensors."""

    op: str
    """One of `OPERATION_KINDS`."""
    in_channels: int
    out_channels: int
    kernel_size: int = 1
    expand_ratio: int = 1
    stride: int = 1
    in_height: int
    in_width: int
    out_height: int
    out_width: int
    residual: bool = False
    """Whether a block adds its input to its output."""

    @property
    def macs(self) -> int:
        """Multiply-adds of its convolutions for one image."""
        inside = self.in_height * self.in_width
        outside = self.out_height * self.out_width
        taps = self.kernel_size**2
        match self.op:
            case "conv":
                return self.in_channels * self.out_channels * taps * outside
            case "separable_conv":
                return self.in_channels * (taps + self.out_channels) * outside
            case "ibn" | "fused_ibn":
                hidden = self.expand_ratio * self.in_channels
                project = hidden * self.out_channels * outside
                if self.op == "fused_ibn":
                    return self.in_channels * hidden * taps * outside + project
                # At expansion 1 an IBN has no expanding convolution.
                expand = self.in_channels * hidden * inside if self.expand_ratio > 1 else 0
                return expand + hidden * taps * outside + project
        return 0

    def __str__(self) -> str:
        """For example `fused_ibn k5 e6 112->168 at 16x16`."""
        block = f" e{self.expand_ratio}" if self.op in ("ibn", "fused_ibn") else ""
        stride = f" s{self.stride}" if self.stride > 1 else ""
        size = f"{self.in_height}x{self.in_width}"
        if self.op == "resize":
            size += f" to {self.out_height}x{self.out_width}"
        channels = f"{self.in_channels}->{self.out_channels}"
        return f"{self.op} k{self.kernel_size}{block}{stride} {channels} at {size}"


class PlacedOperation(NamedTuple):
    """An operation and where in the network it stands."""

    where: str
    operation: Operation


Size = tuple[int, int]


def halved(size: Size, stride: int) -> Size:
    """Output size of a SAME-padded operation."""
    return math.ceil(size[0] / stride), math.ceil(size[1] / stride)


def block_operation(
    spec: BlockSpec, in_filters: int, block: BlockArchitecture, size: Size
) -> Operation:
    """The operation of one block at its input size."""
    out = halved(size, spec.stride)
    return Operation(
        op=block.op,
        in_channels=in_filters,
        out_channels=block.filters,
        kernel_size=block.kernel_size,
        expand_ratio=block.expand_ratio,
        stride=spec.stride,
        in_height=size[0],
        in_width=size[1],
        out_height=out[0],
        out_width=out[1],
        residual=spec.stride == 1 and in_filters == block.filters,
    )


def stem_operation(space: SearchSpace, image_size: Size) -> Operation:
    """The 3x3 stride-2 convolution on the image."""
    return _operation("conv", 3, space.stem_filters, image_size, kernel_size=3, stride=2)


def block_sizes(space: SearchSpace, image_size: Size) -> list[Size]:
    """Input size of each block."""
    size, sizes = halved(image_size, 2), []
    for block in space.blocks:
        sizes.append(size)
        size = halved(size, block.stride)
    return sizes


def level_sizes(space: SearchSpace, image_size: Size) -> list[Size]:
    """Size of each fused level, finest first."""
    inputs = block_sizes(space, image_size)
    sizes = [
        halved(inputs[tap - 1], space.blocks[tap - 1].stride) for tap in space.fusion.tap_blocks
    ]
    while len(sizes) < space.fusion.num_levels:
        sizes.append(halved(sizes[-1], 2))
    return sizes


def lateral_operations(
    space: SearchSpace, tap: int, filters: int, image_size: Size
) -> list[PlacedOperation]:
    """The 1x1 convolutions that read a tapped block: the only fusion parts that depend on widths.

    Args:
        space: the search space.
        tap: position of the tap, 0 for the finest.
        filters: output channels of the tapped block.
        image_size: height and width of the image.
    """
    size = level_sizes(space, image_size)[tap]
    operation = _operation("conv", filters, space.fusion.channels, size)
    names = ["bifpn.down_lateral"] + (["bifpn.up_lateral"] if tap > 0 else [])
    last = tap == len(space.fusion.tap_blocks) - 1
    if last and space.fusion.num_levels > len(space.fusion.tap_blocks):
        names.append("bifpn.extra")
    return [PlacedOperation(f"{name}_{tap + 1}", operation) for name in names]


def fixed_operations(
    space: SearchSpace, image_size: Size, out_channels: Mapping[str, int]
) -> Iterator[PlacedOperation]:
    """What every architecture of the space has: stem, fusion nodes and heads."""
    yield PlacedOperation("stem", stem_operation(space, image_size))
    sizes = level_sizes(space, image_size)
    channels = space.fusion.channels
    for level in range(len(space.fusion.tap_blocks), len(sizes)):
        yield PlacedOperation("bifpn.extra_pool", _pool(channels, sizes[level - 1]))
    coarsest = len(sizes) - 1
    for repeat in range(1, space.fusion.num_repeats + 1):
        where = f"bifpn.{repeat}"
        for level in range(coarsest - 1, -1, -1):
            yield PlacedOperation(where, _resize(channels, sizes[level + 1], sizes[level]))
            yield PlacedOperation(where, _add(channels, sizes[level]))
            yield PlacedOperation(where, _separable(channels, channels, sizes[level]))
        if repeat == space.fusion.num_repeats:
            break  # the last repeat is read at the finest level only
        for level in range(1, coarsest + 1):
            yield PlacedOperation(where, _pool(channels, sizes[level - 1]))
            for _ in range(2 if level < coarsest else 1):
                yield PlacedOperation(where, _add(channels, sizes[level]))
            yield PlacedOperation(where, _separable(channels, channels, sizes[level]))
    for task, count in out_channels.items():
        for _ in range(space.head.num_convs):
            yield PlacedOperation(f"head.{task}", _separable(channels, channels, sizes[0]))
        yield PlacedOperation(f"head.{task}", _separable(channels, count, sizes[0]))


def network_operations(
    space: SearchSpace,
    architecture: Architecture,
    image_size: Size,
    out_channels: Mapping[str, int],
) -> list[PlacedOperation]:
    """Every operation of one network.

    Raises:
        ValueError: if the architecture is not in the space.
    """
    space.check(architecture)
    fixed = list(fixed_operations(space, image_size, out_channels))
    placed, in_filters = fixed[:1], space.stem_filters
    sizes = block_sizes(space, image_size)
    for number, (spec, block, size) in enumerate(
        zip(space.blocks, architecture.blocks, sizes, strict=True), start=1
    ):
        operation = block_operation(spec, in_filters, block, size)
        placed.append(PlacedOperation(f"block_{number}", operation))
        in_filters = block.filters
    for tap, number in enumerate(space.fusion.tap_blocks):
        filters = architecture.blocks[number - 1].filters
        placed += lateral_operations(space, tap, filters, image_size)
    return placed + fixed[1:]


def network_macs(
    space: SearchSpace,
    architecture: Architecture,
    image_size: Size,
    out_channels: Mapping[str, int],
) -> int:
    """Convolution multiply-adds of one network for one image, without building it.

    Raises:
        ValueError: if the architecture is not in the space.
    """
    placed = network_operations(space, architecture, image_size, out_channels)
    return sum(one.operation.macs for one in placed)


def relaxed_macs(space: SearchSpace, image_size: Size, out_channels: Mapping[str, int]) -> int:
    """Convolution multiply-adds of a relaxed supernet for one image.

    Each block runs every op once, at the largest kernel, expansion, in-width and out-width.
    """
    total = sum(p.operation.macs for p in fixed_operations(space, image_size, out_channels))
    for index, (spec, size) in enumerate(
        zip(space.blocks, block_sizes(space, image_size), strict=True)
    ):
        for op in spec.ops:
            largest = BlockArchitecture(
                op=op,
                kernel_size=max(spec.kernel_sizes),
                expand_ratio=max(spec.expand_ratios),
                filters=max(spec.filters),
            )
            width = max(space.in_filters(index))
            total += block_operation(spec, width, largest, size).macs
    for tap, number in enumerate(space.fusion.tap_blocks):
        widest = max(space.blocks[number - 1].filters)
        total += sum(p.operation.macs for p in lateral_operations(space, tap, widest, image_size))
    return total


def distinct_operations(
    space: SearchSpace, image_size: Size, out_channels: Mapping[str, int]
) -> list[Operation]:
    """Every distinct operation that any architecture of the space can hold, sorted."""
    found = {placed.operation for placed in fixed_operations(space, image_size, out_channels)}
    for index, (spec, size) in enumerate(
        zip(space.blocks, block_sizes(space, image_size), strict=True)
    ):
        for in_filters in space.in_filters(index):
            for block in block_options(spec):
                found.add(block_operation(spec, in_filters, block, size))
    for tap, number in enumerate(space.fusion.tap_blocks):
        for filters in space.blocks[number - 1].filters:
            found.update(p.operation for p in lateral_operations(space, tap, filters, image_size))
    return sorted(found)


def block_options(spec: BlockSpec) -> Iterator[BlockArchitecture]:
    """Every option of a block, in row-major order of `CHOICE_FIELDS`."""
    for op in spec.ops:
        for kernel_size in spec.kernel_sizes:
            for expand_ratio in spec.expand_ratios:
                for filters in spec.filters:
                    yield BlockArchitecture(
                        op=op, kernel_size=kernel_size, expand_ratio=expand_ratio, filters=filters
                    )


def network_io_bytes(
    space: SearchSpace, image_size: Size, out_channels: Mapping[str, int]
) -> tuple[int, int]:
    """Bytes that cross the bus per inference: the int8 image in, the int8 maps out."""
    height, width = level_sizes(space, image_size)[0]
    return 3 * image_size[0] * image_size[1], sum(out_channels.values()) * height * width


def _operation(
    op: str,
    in_channels: int,
    out_channels: int,
    size: Size,
    out: Size | None = None,
    *,
    kernel_size: int = 1,
    stride: int = 1,
) -> Operation:
    """An operation that is no block; its output has `out`, or the input's size over the stride."""
    out_height, out_width = halved(size, stride) if out is None else out
    return Operation(
        op=op,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=kernel_size,
        stride=stride,
        in_height=size[0],
        in_width=size[1],
        out_height=out_height,
        out_width=out_width,
    )


def _separable(in_channels: int, out_channels: int, size: Size) -> Operation:
    return _operation("separable_conv", in_channels, out_channels, size, kernel_size=3)


def _add(channels: int, size: Size) -> Operation:
    return _operation("add", channels, channels, size)


def _pool(channels: int, size: Size) -> Operation:
    return _operation("max_pool", channels, channels, size, kernel_size=2, stride=2)


def _resize(channels: int, size: Size, out: Size) -> Operation:
    return _operation("resize", channels, channels, size, out)
