"""Differentiable expected latency under the architecture parameters."""

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from oneshot_ednas.latency.costs import SpaceCosts
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.relaxation import Gates
from oneshot_ednas.space import SearchSpace


def expected_latency(
    table: LatencyTable,
    space: SearchSpace,
    probabilities: Gates,
    out_channels: Mapping[str, int] | None = None,
) -> Float[Tensor, ""]:
    """Expected latency in milliseconds, with gradient.

    The choices are independent, so the mean of the summed times is exact: per block over
    (in-width, op, kernel, expansion, out-width), where the in-width is the out-width of the block
    before. Streaming is priced at the expected parameter bytes, which is exact where the network
    surely fits or surely exceeds the cache, and for one-hot probabilities.

    Args:
        table: the latency table.
        space: the search space.
        probabilities: `alpha.probabilities()`, or any gates; a probability vector per choice.
        out_channels: output channels per task; the table's where not given.

    Raises:
        ValueError: if a row is missing in the table.
    """
    costs = table.costs(space, out_channels)
    first = probabilities[0].filters
    prices = _prices(costs, first.dtype, first.device)
    filters = _stack([gates.filters for gates in probabilities])
    # The first block reads the stem, whose width is no choice.
    stem = torch.eye(1, filters.shape[1], dtype=filters.dtype, device=filters.device)
    in_width = torch.cat([stem, filters[:-1]])
    totals = prices
    for vectors in (
        filters,
        _stack([gates.expand_ratio for gates in probabilities]),
        _stack([gates.kernel_size for gates in probabilities]),
        _stack([gates.op for gates in probabilities]),
        in_width,
    ):
        shape = (1, vectors.shape[0], *(1,) * (totals.dim() - 3), vectors.shape[1])
        totals = (totals * vectors.view(shape)).sum(-1)
    ms, parameter_bytes = totals.sum(1)
    over = parameter_bytes + costs.constant_bytes - costs.cache_bytes
    return ms + costs.constant_ms + costs.streaming_ms_per_byte * over.clamp_min(0)


def _stack(vectors: list[Tensor]) -> Float[Tensor, "blocks options"]:
    width = max(vector.shape[0] for vector in vectors)
    return torch.stack([F.pad(vector, (0, width - vector.shape[0])) for vector in vectors])


@functools.lru_cache(maxsize=16)
def _prices(costs: SpaceCosts, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Milliseconds and bytes `[2, blocks, in-width, op, kernel, expansion, out-width]`, padded."""
    with torch.inference_mode(False):  # the cache outlives a caller's inference mode
        return _padded(costs).to(device=device, dtype=dtype)


def _padded(costs: SpaceCosts) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(ms.shape for ms in costs.block_ms), strict=True)]
    shape[0] = max(shape[0], shape[-1])
    prices = torch.zeros(2, len(costs.block_ms), *shape, dtype=torch.float64)
    for row, arrays in enumerate((costs.block_ms, costs.block_bytes)):
        for block, values in enumerate(arrays):
            window = tuple(slice(size) for size in values.shape)
            prices[row, block][window] = torch.from_numpy(values)
    return prices
