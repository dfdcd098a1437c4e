"""Shared fixtures: small spaces, a toy latency table, and every architecture of a small space."""

import itertools
import signal
from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import settings

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.latency.costs import SpaceCosts
from oneshot_ednas.latency.operations import Operation, distinct_operations
from oneshot_ednas.latency.table import LatencyTable, TableHeader, TableRow
from oneshot_ednas.relaxation import ArchitectureParameters
from oneshot_ednas.space import CHOICE_FIELDS, SearchSpace

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


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """A command that is stopped no longer listens to signals; its process would end next."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def small_space() -> SearchSpace:
    return SearchSpace.from_yaml(SMALL_SPACE)


def all_architectures(space: SearchSpace) -> Iterator[Architecture]:
    """Every architecture, by brute force over the product of the options."""
    for indices in itertools.product(*(range(len(choice.options)) for choice in space.choices)):
        yield space.decode(indices)


@lru_cache
def brute_force(space: SearchSpace) -> tuple[list[Architecture], np.ndarray]:
    """Every architecture of a small space, and its options `[architectures, blocks, field]`."""
    architectures = list(all_architectures(space))
    options = [
        [
            [spec.options(field).index(getattr(block, field)) for field in CHOICE_FIELDS]
            for spec, block in zip(space.blocks, architecture.blocks, strict=True)
        ]
        for architecture in architectures
    ]
    return architectures, np.array(options)


def all_latencies(costs: SpaceCosts) -> np.ndarray:
    """Latency of every architecture, in the order of `brute_force`."""
    _, options = brute_force(costs.space)
    totals = np.zeros((2, len(options)))
    totals += [[costs.constant_ms], [costs.constant_bytes]]
    in_width = np.zeros(len(options), dtype=int)
    for index in range(options.shape[1]):
        cell = (in_width, *options[:, index].T)
        totals += [costs.block_ms[index][cell], costs.block_bytes[index][cell]]
        in_width = options[:, index, -1]
    ms, size = totals
    return ms + costs.streaming_ms_per_byte * np.maximum(0, size - costs.cache_bytes)


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


# Whole stages on a tiny experiment; `tiny` imports the stages only where they are tested.


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Rendered frames go to a folder of the test session, never to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONESHOT_EDNAS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny(own_cache):
    """Space, tasks, table and frames of the tiny experiment."""
    from tiny import make_tiny

    return make_tiny()


@pytest.fixture(scope="session")
def project(tmp_path_factory, tiny):
    """A folder with the tiny experiment's config, space and table. Read only."""
    from tiny import write_project

    return write_project(tmp_path_factory.mktemp("project"), tiny.table)


@pytest.fixture(scope="session")
def finished_run(project, tmp_path_factory):
    """The folder of a whole run. Read only: copy it to change it."""
    from tiny import finish_run

    return finish_run(project, tmp_path_factory.mktemp("runs") / "finished")
