"""A latency table laid out over a search space, as arrays that every consumer reads.

Evaluation of one architecture, the differentiable expectation and the exact derivation all use
these arrays, so they cannot disagree.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.latency.operations import (
    Operation,
    block_operation,
    block_options,
    block_sizes,
    fixed_operations,
    lateral_operations,
    network_io_bytes,
)
from oneshot_ednas.space import CHOICE_FIELDS, SearchSpace

Array = npt.NDArray[np.float64]
Price = Callable[[Operation], tuple[float, float]]
"""Milliseconds and parameter bytes of an operation."""


@dataclass(frozen=True, eq=False)
class SpaceCosts:
    """Costs of every option of every block, and of the parts that do not vary.

    The block arrays have the axes (in-width, op, kernel, expansion, out-width) and include the
    1x1 laterals that read a tapped block, since those depend on its out-width only.
    """

    space: SearchSpace
    block_ms: tuple[Array, ...]
    block_bytes: tuple[Array, ...]
    """Parameter bytes."""
    constant_ms: float
    """Fixed time, transfers, stem, fusion nodes and heads."""
    constant_bytes: float
    cache_bytes: float
    streaming_ms_per_byte: float

    def latency_ms(self, architecture: Architecture) -> float:
        """Latency of one architecture.

        Raises:
            ValueError: if it is not in the space.
        """
        on_chip_ms, parameter_bytes = self.totals(architecture)
        return on_chip_ms + self.streaming_ms(parameter_bytes)

    def latencies_ms(self, architectures: Sequence[Architecture]) -> Array:
        """Latencies of many architectures, equal to `latency_ms` of each to the last bit.

        Args:
            architectures: any number of them.

        Returns:
            `[architectures]`, in milliseconds.

        Raises:
            ValueError: if one is not in the space.
        """
        if not architectures:
            return np.zeros(0)
        cells = self._cells(architectures)
        ms = np.full(len(architectures), self.constant_ms)
        size = np.full(len(architectures), self.constant_bytes)
        in_width = np.zeros(len(architectures), dtype=np.intp)
        # Block by block, in the order of `totals`.
        for cell, block_ms, block_bytes in zip(cells, self.block_ms, self.block_bytes, strict=True):
            num_ways, num_options = block_ms.shape[0], block_ms[0].size
            ms += block_ms.reshape(num_ways, num_options)[in_width, cell]
            size += block_bytes.reshape(num_ways, num_options)[in_width, cell]
            in_width = cell % block_ms.shape[-1]
        return ms + self.streaming_ms_per_byte * np.maximum(0.0, size - self.cache_bytes)

    def _cells(self, architectures: Sequence[Architecture]) -> list[npt.NDArray[np.intp]]:
        """Per block, the flat index of each architecture's option in `block_ms[in-width]`."""
        count, read = len(architectures), attrgetter(*CHOICE_FIELDS)
        try:
            columns = zip(*(architecture.blocks for architecture in architectures), strict=True)
            # What a block is, is the key of a look-up: no Python code runs for each of them.
            return [
                np.fromiter(map(index.__getitem__, map(read, blocks)), np.intp, count)
                for index, blocks in zip(self._flat_index, columns, strict=True)
            ]
        except (KeyError, ValueError):
            for architecture in architectures:
                self.space.check(architecture)
            raise

    @cached_property
    def _flat_index(self) -> tuple[dict[tuple[object, ...], int], ...]:
        """Per block, by what it is, the flat index of an option."""
        return tuple(
            {
                tuple(getattr(block, field) for field in CHOICE_FIELDS): number
                for number, block in enumerate(block_options(spec))
            }
            for spec in self.space.blocks
        )

    def totals(self, architecture: Architecture) -> tuple[float, float]:
        """Milliseconds without streaming, and parameter bytes.

        Raises:
            ValueError: if the architecture is not in the space.
        """
        ms, size = self.constant_ms, self.constant_bytes
        for index, cell in enumerate(block_cells(self.space, architecture)):
            ms += float(self.block_ms[index][cell])
            size += float(self.block_bytes[index][cell])
        return ms, size

    def streaming_ms(self, parameter_bytes: float) -> float:
        """Time to stream what does not fit the cache, once per inference."""
        return self.streaming_ms_per_byte * max(0.0, parameter_bytes - self.cache_bytes)

    @cached_property
    def max_latency_ms(self) -> float:
        """Largest latency in the space, exactly.

        The latency is the larger of two sums (with streaming priced from the first byte less the
        cache, and without), so its maximum is the larger of their maxima.
        """
        return max(
            -self.suffix_minima(-1.0, -weight)[0][0] + self.offset(weight)
            for weight in (0.0, self.streaming_ms_per_byte)
        )

    @cached_property
    def min_latency_ms(self) -> float:
        """Smallest latency in the space, exactly, by best-first search."""
        weights = np.linspace(0.0, self.streaming_ms_per_byte, 5)
        suffixes = [self.suffix_minima(1.0, weight) for weight in weights]

        def bound(depth: int, in_width: int, ms: float, size: float) -> float:
            # Every weighting of the two sums is a lower bound of the larger one.
            rest = np.array([suffix[depth][in_width] for suffix in suffixes])
            return float((ms + weights * (size - self.cache_bytes) + rest).max())

        count, start = 0, (0, 0, self.constant_ms, self.constant_bytes)
        heap = [(bound(*start), count, *start)]
        while heap:
            _, _, depth, in_width, ms, size = heapq.heappop(heap)
            if depth == len(self.block_ms):
                # Summed in the same order as `totals`, so the two are equal to the last bit.
                return ms + self.streaming_ms(size)
            block_ms, block_bytes = (
                self.block_ms[depth][in_width],
                self.block_bytes[depth][in_width],
            )
            for cell in np.ndindex(block_ms.shape):
                count += 1
                after = (
                    depth + 1,
                    cell[-1],
                    ms + float(block_ms[cell]),
                    size + float(block_bytes[cell]),
                )
                heapq.heappush(heap, (bound(*after), -count, *after))
        raise AssertionError("a space holds at least one architecture")

    def offset(self, weight: float) -> float:
        """Constant part of `ms + weight * (bytes - cache)` summed over the network."""
        return self.constant_ms + weight * (self.constant_bytes - self.cache_bytes)

    def suffix_minima(self, ms_weight: float, bytes_weight: float) -> list[Array]:
        """Least `ms_weight * ms + bytes_weight * bytes` of blocks d.., per in-width of block d."""
        rest: Array = np.zeros(len(self.space.blocks[-1].filters))
        suffix = [rest]
        for ms, size in zip(reversed(self.block_ms), reversed(self.block_bytes), strict=True):
            rest = (ms_weight * ms + bytes_weight * size + rest).min(axis=(1, 2, 3, 4))
            suffix.append(rest)
        return suffix[::-1]


def space_costs(
    space: SearchSpace,
    image_size: tuple[int, int],
    out_channels: Mapping[str, int],
    *,
    price: Price,
    fixed_ms: float,
    input_ms_per_byte: float,
    output_ms_per_byte: float,
    cache_bytes: float,
    streaming_ms_per_byte: float,
) -> SpaceCosts:
    """Lay prices out over a space.

    Args:
        space: the search space.
        image_size: height and width of the image.
        out_channels: output channels per task.
        price: milliseconds and parameter bytes of an operation.
        fixed_ms: paid once per inference.
        input_ms_per_byte: transfer of the image.
        output_ms_per_byte: transfer of the output maps.
        cache_bytes: parameter bytes that stay on the chip.
        streaming_ms_per_byte: per parameter byte beyond the cache.

    Raises:
        ValueError: if a block's option costs nothing, or `price` refuses an operation.
    """
    blocks = block_prices(space, image_size, price)
    for index, laterals in lateral_prices(space, image_size, price).items():
        blocks[index] += laterals
    input_bytes, output_bytes = network_io_bytes(space, image_size, out_channels)
    fixed = [price(p.operation) for p in fixed_operations(space, image_size, out_channels)]
    transfer_ms = input_ms_per_byte * input_bytes + output_ms_per_byte * output_bytes
    return SpaceCosts(
        space=space,
        block_ms=tuple(prices[..., 0].copy() for prices in blocks),
        block_bytes=tuple(prices[..., 1].copy() for prices in blocks),
        constant_ms=fixed_ms + transfer_ms + sum(ms for ms, _ in fixed),
        constant_bytes=sum(size for _, size in fixed),
        cache_bytes=cache_bytes,
        streaming_ms_per_byte=streaming_ms_per_byte,
    )


def block_cells(space: SearchSpace, architecture: Architecture) -> list[tuple[int, ...]]:
    """Index of each block's option in its cost array.

    Raises:
        ValueError: if the architecture is not in the space.
    """
    space.check(architecture)
    cells, in_width = list[tuple[int, ...]](), 0
    for spec, block in zip(space.blocks, architecture.blocks, strict=True):
        choice = [spec.options(field).index(getattr(block, field)) for field in CHOICE_FIELDS]
        cells.append((in_width, *choice))
        in_width = choice[-1]
    return cells


def block_prices(space: SearchSpace, image_size: tuple[int, int], price: Price) -> list[Array]:
    """Prices of every option of every block, without the laterals that read it.

    Returns:
        Per block, `[in-width, op, kernel, expansion, out-width, 2]`.

    Raises:
        ValueError: if an option costs no time, or `price` refuses an operation.
    """
    found = []
    for index, (spec, size) in enumerate(
        zip(space.blocks, block_sizes(space, image_size), strict=True)
    ):
        shape = tuple(len(spec.options(field)) for field in CHOICE_FIELDS)
        ways = space.in_filters(index)
        prices: Array = np.array(
            [
                price(block_operation(spec, in_filters, block, size))
                for in_filters in ways
                for block in block_options(spec)
            ]
        ).reshape(len(ways), *shape, 2)
        if not (prices[..., 0] > 0).all():
            raise ValueError(f"block {index + 1} has an option of 0 ms; no operation is free")
        found.append(prices)
    return found


def lateral_prices(
    space: SearchSpace, image_size: tuple[int, int], price: Price
) -> dict[int, Array]:
    """Prices of the 1x1 convolutions that read a tapped block.

    Returns:
        By the block's index, `[out-width, 2]`.
    """
    found = {}
    for tap, number in enumerate(space.fusion.tap_blocks):
        laterals = [
            [price(p.operation) for p in lateral_operations(space, tap, filters, image_size)]
            for filters in space.blocks[number - 1].filters
        ]
        found[number - 1] = np.array(laterals).sum(axis=1)
    return found
