"""What a branched network costs, exactly, and what one is expected to cost under gates.

A layer that tasks share is counted once, each branch once. The same arrays serve both, and the
exact derivation, so they cannot disagree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from oneshot_ednas.latency.costs import (
    Price,
    SpaceCosts,
    block_cells,
    block_prices,
    lateral_prices,
)
from oneshot_ednas.latency.operations import Operation, fixed_operations, network_io_bytes
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.models.encoder import Encoder
from oneshot_ednas.models.macs import encoder_macs
from oneshot_ednas.relaxation import Gates
from oneshot_ednas.sharing.branching import Branching
from oneshot_ednas.sharing.groupings import agreement, set_agreement, set_signs, shared_so_far
from oneshot_ednas.space import CHOICE_FIELDS, SearchSpace

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class BranchCosts:
    """Costs per layer of an encoder; numbers come as pairs of cost and parameter bytes."""

    unit: str
    """Of the cost: `ms` or `GMACs`."""
    constant: Array
    """`[2]`: what every branched network of these tasks has: decoders, transfers, fixed time."""
    layers: Array
    """`[layers, 2]`: of one computation of a layer, without what depends on widths."""
    blocks: tuple[Array, ...] = ()
    """Of an EDNAS backbone, block `i` being layer `i + 1`: `[in-width, op, kernel, expansion,
    out-width, 2]`."""
    laterals: Mapping[int, Array] = field(default_factory=dict)
    """By block index `[out-width, 2]`: what the last layer adds for each block that it reads."""
    space: SearchSpace | None = None
    cache_bytes: float = 0.0
    """Parameter bytes that stay on the chip."""
    streaming_per_byte: float = 0.0
    """Cost of each parameter byte beyond."""

    @property
    def num_layers(self) -> int:
        """Layers of the encoder."""
        return len(self.layers)

    # One network ----------------------------------------------------------------------------

    def of(self, branching: Branching) -> float:
        """The cost of one branched network.

        Raises:
            ValueError: if the branching has another number of layers, or no paths where blocks
                vary.
        """
        return self.priced(self.totals(branching))

    def totals(self, branching: Branching) -> Array:
        """`[2]`: cost without streaming, and parameter bytes; errors as of `of`."""
        if branching.num_layers != self.num_layers:
            raise ValueError(
                f"expected a branching of {self.num_layers} layers, got {branching.num_layers}"
            )
        total = self.constant + np.array(branching.num_groups) @ self.layers
        for layer, count in enumerate(branching.num_groups):
            for group in range(count):
                cells = self._path_cells(branching, branching.first_task(layer, group))
                if 1 <= layer <= len(self.blocks):
                    total = total + self.blocks[layer - 1][cells[layer - 1]]
                elif layer == self.num_layers - 1:
                    for block, laterals in self.laterals.items():
                        total = total + laterals[cells[block][-1]]
        return total

    def priced(self, totals: Array) -> float:
        """The cost with what streams past the cache."""
        over = max(0.0, float(totals[1]) - self.cache_bytes)
        return float(totals[0]) + self.streaming_per_byte * over

    def _path_cells(self, branching: Branching, task: int) -> list[tuple[int, ...]]:
        if self.space is None:
            return []
        if branching.paths is not None:
            return block_cells(self.space, branching.paths[task])
        if not self.space.is_fixed:
            raise ValueError("blocks vary: the branching needs an architecture per task")
        return block_cells(self.space, self.space.base_architecture)

    @cached_property
    def unbranched(self) -> SpaceCosts:
        """The costs of networks with one encoder for all tasks, over a space of blocks."""
        assert self.space is not None
        blocks = [prices.copy() for prices in self.blocks]
        for index, laterals in self.laterals.items():
            blocks[index] += laterals
        constant = self.constant + self.layers.sum(0)
        return SpaceCosts(
            space=self.space,
            block_ms=tuple(prices[..., 0].copy() for prices in blocks),
            block_bytes=tuple(prices[..., 1].copy() for prices in blocks),
            constant_ms=float(constant[0]),
            constant_bytes=float(constant[1]),
            cache_bytes=self.cache_bytes,
            streaming_ms_per_byte=self.streaming_per_byte,
        )

    # Expectation ----------------------------------------------------------------------------

    def expected(
        self,
        routes: Float[Tensor, "tasks layers candidates"],
        options: Sequence[Gates] | None = None,
    ) -> Float[Tensor, ""]:
        """The expected cost, with gradient (BMTAS eq. 5-6, generalised to blocks that vary).

        Exact: what a layer costs depends on its own candidate, the candidate before (whose width
        comes in) and, for the last layer, on those it reads, all drawn independently; the number
        of distinct ways to a layer is taken apart by inclusion and exclusion over sets of tasks.
        Streaming is priced at the expected bytes, which is exact where the network surely fits or
        surely exceeds the cache, and for one-hot gates.

        Args:
            routes: probability of each candidate per task and layer.
            options: of elastic candidates: the probabilities of candidate `j` of every layer.
        """
        sets = set_agreement(routes)
        shared, signs = shared_so_far(sets), set_signs(routes.shape[0]).to(routes)
        total = self._numbers(self.constant, routes)
        total = total + (signs @ shared) @ self._numbers(self.layers, routes)
        if self.blocks:
            pairs, widths = self._pair_costs(routes, options)
            # Ways that agree up to the layer before the last two; those are summed apart.
            before = F.pad(shared, (1, 0), value=1.0)[:, : len(self.blocks)]
            ways = torch.einsum("s,sb,sbi,sbj->bij", signs, before, sets[:, :-2], sets[:, 1:-1])
            total = total + torch.einsum("bij,bijn->n", ways, pairs)
            total = total + self._expected_laterals(sets, shared, signs, widths)
        over = (total[1] - self.cache_bytes).clamp_min(0)
        return total[0] + self.streaming_per_byte * over

    def _expected_laterals(
        self, sets: Tensor, shared: Tensor, signs: Tensor, widths: Tensor
    ) -> Tensor:
        """What the last layer adds: its tasks agree everywhere, and one of the layers is read."""
        total = sets.new_zeros(2)
        agreed = agreement(sets)
        for block, laterals in self.laterals.items():
            layer = block + 1
            others = shared[:, layer - 1] * agreed[:, layer + 1 :].prod(1)
            ways = torch.einsum("s,s,sc->c", signs, others, sets[:, layer])
            prices = self._numbers(laterals, sets)
            width = widths[:, block, : prices.shape[0]]
            total = total + ways @ (width @ prices)
        return total

    def _pair_costs(
        self, routes: Tensor, options: Sequence[Gates] | None
    ) -> tuple[
        Float[Tensor, "blocks before candidates 2"], Float[Tensor, "candidates blocks widths"]
    ]:
        """Expected cost of each block per candidate before it and own candidate; the widths."""
        prices = self._numbers(self._padded, routes)
        num_blocks, in_width, op, kernel, expansion, out, _ = prices.shape
        if options is None:
            sizes = (op, kernel, expansion, out)
            vectors = [routes.new_ones(routes.shape[2], num_blocks, size) for size in sizes]
        else:
            vectors = [
                torch.stack([_stack([getattr(b, name) for b in gates], size) for gates in options])
                for name, size in zip(CHOICE_FIELDS, (op, kernel, expansion, out), strict=True)
            ]
        ops, kernels, expansions, widths = vectors
        own = torch.einsum(
            "biokewn,cbo,cbk,cbe,cbw->bcin", prices, ops, kernels, expansions, widths
        )
        first = routes.new_zeros(routes.shape[2], 1, in_width)
        first[..., 0] = 1.0  # the stem has one width
        before = torch.cat([first, F.pad(widths, (0, in_width - out))[:, :-1]], dim=1)
        return torch.einsum("pbi,bcin->bpcn", before, own), widths

    @cached_property
    def _padded(self) -> Array:
        shape = [max(sizes) for sizes in zip(*(p.shape for p in self.blocks), strict=True)]
        shape[0] = max(shape[0], shape[-2])
        padded = np.zeros((len(self.blocks), *shape))
        for index, prices in enumerate(self.blocks):
            padded[index][tuple(slice(size) for size in prices.shape)] = prices
        return padded

    def _numbers(self, values: Array, like: Tensor) -> Tensor:
        return torch.as_tensor(values, dtype=like.dtype, device=like.device)


def latency_costs(
    space: SearchSpace, table: LatencyTable, out_channels: Mapping[str, int]
) -> BranchCosts:
    """Milliseconds of branched networks of a space, from a latency table.

    Raises:
        ValueError: if a row is missing.
    """
    header, size = table.header, table.image_size
    input_bytes, output_bytes = network_io_bytes(space, size, out_channels)
    once = header.fixed_ms + header.input_ms_per_byte * input_bytes
    once += header.output_ms_per_byte * output_bytes

    def price(operation: Operation) -> tuple[float, float]:
        row = table.row(operation)
        return row.latency_ms, float(row.parameter_bytes)

    return _space_costs(
        space,
        size,
        out_channels,
        price,
        unit="ms",
        once=once,
        cache_bytes=header.cache_bytes,
        streaming_per_byte=header.streaming_ms_per_byte,
    )


def mac_costs(
    encoder: Encoder, image_size: tuple[int, int], out_channels: Mapping[str, int]
) -> BranchCosts:
    """Billions of multiply-adds of branched networks, for one image.

    Args:
        encoder: the backbone.
        image_size: height and width of the image.
        out_channels: output channels per task.
    """
    if encoder.space is not None:
        return _space_costs(
            encoder.space,
            image_size,
            out_channels,
            lambda operation: (operation.macs / 1e9, 0.0),
            unit="GMACs",
        )
    layers, decoders = encoder_macs(encoder, image_size, out_channels)
    return BranchCosts(
        unit="GMACs",
        constant=np.array([sum(decoders.values()) / 1e9, 0.0]),
        layers=np.array([[macs / 1e9, 0.0] for macs in layers]),
    )


def _space_costs(
    space: SearchSpace,
    image_size: tuple[int, int],
    out_channels: Mapping[str, int],
    price: Price,
    *,
    unit: str,
    once: float = 0.0,
    cache_bytes: float = 0.0,
    streaming_per_byte: float = 0.0,
) -> BranchCosts:
    constant, layers = np.array([once, 0.0]), np.zeros((len(space.blocks) + 2, 2))
    for placed in fixed_operations(space, image_size, out_channels):
        prices = price(placed.operation)
        match placed.where.split(".")[0]:
            case "stem":
                layers[0] += prices
            case "bifpn":
                layers[-1] += prices
            case _:
                constant += prices
    return BranchCosts(
        unit=unit,
        constant=constant,
        layers=layers,
        blocks=tuple(block_prices(space, image_size, price)),
        laterals=lateral_prices(space, image_size, price),
        space=space,
        cache_bytes=cache_bytes,
        streaming_per_byte=streaming_per_byte,
    )


def _stack(vectors: Sequence[Tensor], width: int) -> Float[Tensor, "blocks options"]:
    return torch.stack([F.pad(vector, (0, width - vector.shape[0])) for vector in vectors])
