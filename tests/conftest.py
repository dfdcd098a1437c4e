"""Shared fixtures: small spaces, a toy latency table, and every architecture of a small space."""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from hypothesis import settings

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.latency.operations import Operation, distinct_operations
from oneshot_ednas.latency.table import LatencyTable, TableHeader, TableRow
from oneshot_ednas.relaxation import ArchitectureParameters
from oneshot_ednas.space import SearchSpace

# One thread: the tensors are tiny, and test processes share the cores.
torch.set_num_threads(1)
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

OUT_CHANNELS = {"segmentation": 4, "depth": 1}
IMAGE_SIZE = (32, 48)

SMALL_SPACE = """
name: small
stem_filters: 8
options:
  ops: [ibn, fused_ibn]
  kernel_sizes: [3, 5]
blocks:
  - {stride: 1, kernel_size: 3, filters: 8, expand_ratio: 1}
  - stride: 2
    kernel_size: 3
    filters: 8
    expand_ratio: 3
    options: {expand_ratios: [2, 3], filters: [4, 8, 12]}
  - stride: 1
    kernel_size: 5
    filters: 8
    expand_ratio: 2
    options: {ops: [ibn], expand_ratios: [2, 4], filters: [8, 12]}
  - stride: 2
    kernel_size: 3
    filters: 12
    expand_ratio: 2
    options: {kernel_sizes: [3], filters: [6, 12]}
fusion: {tap_blocks: [3, 4], num_levels: 3, channels: 8, num_repeats: 2}
head: {num_convs: 1}
"""
"""Four blocks, 3,072 architectures: small enough to try them all."""


@pytest.fixture(scope="session")
def small_space() -> SearchSpace:
    return SearchSpace.from_yaml(SMALL_SPACE)


def all_architectures(space: SearchSpace) -> Iterator[Architecture]:
    """Every architecture, by brute force over the product of the options."""
    for indices in itertools.product(*(range(len(choice.options)) for choice in space.choices)):
        yield space.decode(indices)


def parameter_count(operation: Operation) -> int:
    """Roughly how many weights an operation has; zero for those without weights."""
    if operation.op in ("add", "max_pool", "resize"):
        return 0
    hidden = operation.expand_ratio * operation.in_channels
    return hidden * operation.out_channels + operation.kernel_size**2 * hidden


def toy_table(
    space: SearchSpace,
    image_size: tuple[int, int] = IMAGE_SIZE,
    cache_bytes: float = 1e9,
    streaming_ms_per_byte: float = 0.0,
    seed: int = 0,
    out_channels: Mapping[str, int] = OUT_CHANNELS,
) -> LatencyTable:
    """A table that prices every operation of a space with random but plausible numbers."""
    generator = np.random.default_rng(seed)
    rows = {
        operation: TableRow(
            latency_ms=float(generator.uniform(0.005, 0.3)),
            spread_ms=float(generator.uniform(0.0, 0.01)),
            parameter_bytes=parameter_count(operation),
        )
        for operation in distinct_operations(space, image_size, out_channels)
    }
    header = TableHeader(
        device="toy",
        source="simulated",
        host="none",
        runtime="toy 1.0",
        date="2024-01-01",
        space=space.name,
        image_height=image_size[0],
        image_width=image_size[1],
        out_channels=dict(out_channels),
        fixed_ms=0.4,
        input_ms_per_byte=1e-6,
        output_ms_per_byte=2e-6,
        cache_bytes=cache_bytes,
        streaming_ms_per_byte=streaming_ms_per_byte,
    )
    return LatencyTable(header, rows, "toy.csv")


def random_alpha(space: SearchSpace, seed: int, scale: float = 1.0) -> ArchitectureParameters:
    """Architecture parameters drawn from a normal distribution."""
    alpha = ArchitectureParameters(space)
    noise = torch.randn(alpha.logits.shape, generator=torch.Generator().manual_seed(seed))
    alpha.logits.data.copy_(scale * noise)
    return alpha
