"""Architectures spread over a whole space, from its smallest networks to its largest.

Uniform draws are much alike: every network has about half of its blocks wide, half of its kernels
large. Rankings of such a sample show noise more than anything else.
"""

from collections.abc import Mapping

import numpy as np

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.latency.operations import Size, network_macs
from oneshot_ednas.space import CHOICE_FIELDS, SearchSpace

STRONGEST_TILT = 3.0
"""Largest log-odds of a decision's last option against its first."""
POOL_FACTOR = 32
"""Draws per stratum, on average."""


def stratified_sample(
    space: SearchSpace,
    count: int,
    *,
    image_size: Size,
    out_channels: Mapping[str, int],
    generator: np.random.Generator,
) -> list[Architecture]:
    """Distinct architectures, about as many small as large ones, in random order.

    A pool is drawn in which each network leans, by a random amount, to small or large kernels,
    expansions and widths and to one op. The range of log multiply-adds of the pool is cut into
    `count` strata of equal width, and one network is taken from each; a stratum without one is
    made up for by a network from anywhere.

    Args:
        space: the search space.
        count: how many.
        image_size: height and width of the images.
        out_channels: output channels per task.
        generator: of all draws.

    Raises:
        ValueError: if the space has fewer architectures.
    """
    if count > space.num_architectures:
        raise ValueError(
            f"space {space.name} has {space.num_architectures} architectures, "
            f"{count} distinct ones were asked for"
        )
    pool: dict[Architecture, None] = {}  # an ordered set
    while len(pool) < min(POOL_FACTOR * count, (space.num_architectures + 1) // 2):
        pool[_leaning(space, generator)] = None
    while len(pool) < count:  # a tiny space, of which almost all is asked for
        pool[space.sample(generator)] = None
    names = list(pool)
    sizes = np.log([network_macs(space, one, image_size, out_channels) for one in names])
    inner = np.linspace(sizes.min(), sizes.max(), count + 1)[1:-1]
    strata = np.searchsorted(inner, sizes)
    _, first = np.unique(strata, return_index=True)
    rest = np.setdiff1d(np.arange(len(names)), first)
    chosen = [*first, *rest[: count - len(first)]]
    return [names[i] for i in generator.permutation(chosen)]


def _leaning(space: SearchSpace, generator: np.random.Generator) -> Architecture:
    """A draw in which all choices of a field lean the same way."""
    tilts = dict(
        zip(CHOICE_FIELDS, generator.uniform(-STRONGEST_TILT, STRONGEST_TILT, 4), strict=True)
    )
    indices = []
    for choice in space.choices:
        weights = np.exp(tilts[choice.field] * np.linspace(-0.5, 0.5, len(choice.options)))
        indices.append(int(generator.choice(len(weights), p=weights / weights.sum())))
    return space.decode(indices)
