"""Derivation against brute force: nothing exceeds the target, nothing better is missed."""

import itertools

import numpy as np
import pytest
import torch
from conftest import OUT_CHANNELS, SMALL_SPACE, toy_table
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CPU

from oneshot_ednas.models.encoder import ednas_encoder
from oneshot_ednas.models.network import recalibrate_bn
from oneshot_ednas.ranking import DeriveConfig
from oneshot_ednas.reward import reward
from oneshot_ednas.search import LatencyLossConfig
from oneshot_ednas.sharing.branched import branched_network, inherit_branched
from oneshot_ednas.sharing.branching import Branching
from oneshot_ednas.sharing.branching_parameters import BranchingParameters
from oneshot_ednas.sharing.branching_search import BranchingConfig, BranchingSearch
from oneshot_ednas.sharing.costs import latency_costs, mac_costs
from oneshot_ednas.sharing.derive_blocks import LogProbabilities, best_paths
from oneshot_ednas.sharing.derive_branched import derive_branched, smallest_cost
from oneshot_ednas.sharing.derive_routes import NUM_BINS, best_routes
from oneshot_ednas.sharing.rank_branched import inherited, rank_branchings
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.training import accuracy_of, calibration_images, evaluate

TWO = ("segmentation", "depth")
CHANNELS = {"segmentation": 4, "depth": 1, "normals": 3}
# A light BiFPN, so that blocks weigh.
LIGHT = SMALL_SPACE.replace(
    "num_levels: 3, channels: 8, num_repeats: 2", "num_levels: 2, channels: 4, num_repeats: 1"
)
SPACE = SearchSpace.from_yaml(LIGHT)
FIXED = SPACE.fix(SPACE.base_architecture)
MINI = SearchSpace.from_yaml(
    """
name: mini
stem_filters: 4
blocks:
  - stride: 1
    kernel_size: 3
    filters: 8
    expand_ratio: 2
    options: {filters: [4, 8], kernel_sizes: [3, 5]}
  - stride: 2
    kernel_size: 3
    filters: 8
    expand_ratio: 2
    options: {filters: [6, 8], expand_ratios: [2, 3]}
fusion: {tap_blocks: [1, 2], num_levels: 2, channels: 4, num_repeats: 1}
head: {num_convs: 1}
"""
)
STREAMS = {
    "plain": {},
    "over": {"cache_bytes": 300.0, "streaming_ms_per_byte": 1e-3},
    "near": {"cache_bytes": 2500.0, "streaming_ms_per_byte": 1e-3},
    "under": {"cache_bytes": 6000.0, "streaming_ms_per_byte": 1e-3},
}
laws = settings(deadline=None, derandomize=True, max_examples=8)


def costs_of(space, tasks=TWO, stream="plain", seed=3):
    channels = {task: CHANNELS[task] for task in tasks}
    table = toy_table(space, out_channels=channels, seed=seed, **STREAMS[stream])
    return latency_costs(space, table, channels)


def random_parameters(space, num_tasks, seed, scale=1.0) -> BranchingParameters:
    parameters = BranchingParameters(ednas_encoder(space), num_tasks)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=source))
    return parameters


def log_softmax(parameters) -> np.ndarray:
    return parameters.routes.detach().double().log_softmax(-1).numpy()


def all_routes(num_tasks: int, num_layers: int) -> list:
    ways = list(itertools.product(range(num_tasks), repeat=num_layers))
    return list(itertools.product(ways, repeat=num_tasks))


def score(log_p: np.ndarray, routes) -> float:
    return float(sum(log_p[t, i, j] for t, way in enumerate(routes) for i, j in enumerate(way)))


def names(count: int) -> tuple[str, ...]:
    return tuple(CHANNELS)[:count]


# Routes -------------------------------------------------------------------------------------


def spent(layer_costs, routes) -> float:
    """Beyond one computation of each layer."""
    return float(
        sum(
            cost * (len({way[: i + 1] for way in routes}) - 1) for i, cost in enumerate(layer_costs)
        )
    )


@pytest.mark.parametrize("num_tasks", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_routes_are_those_of_brute_force_up_to_bins(num_tasks, seed):
    num_layers = 3
    generator = np.random.default_rng(seed)
    log_p = np.log(generator.dirichlet(np.ones(num_tasks), size=(num_tasks, num_layers)))
    layer_costs = generator.uniform(0.2, 2.0, size=num_layers)
    every = all_routes(num_tasks, num_layers)
    scores = np.array([score(log_p, routes) for routes in every])
    spends = np.array([spent(layer_costs, routes) for routes in every])
    most = (num_tasks - 1) * layer_costs.sum()
    assert spends.max() == pytest.approx(most)
    distinct = set()
    for slack in (0.0, *np.linspace(0.03, 1.05, 5) * most):
        found = best_routes(log_p, layer_costs, float(slack))
        cost = spent(layer_costs, found)
        assert cost <= slack * (1 + 1e-9)
        # Rounding up takes less than a bin per layer.
        surely = spends <= slack * (1 - num_layers / NUM_BINS)
        best_inside = scores[spends <= slack * (1 + 1e-9)].max()
        assert scores[surely].max() - 1e-6 <= score(log_p, found) <= best_inside + 1e-9
        distinct.add(found)
    assert len(distinct) > 1
    found = best_routes(log_p, layer_costs, 2 * most)
    assert found == tuple(map(tuple, log_p.argmax(-1).tolist()))


def test_of_equally_probable_routes_the_cheaper_are_taken():
    log_p = np.log(np.full((3, 4, 3), 1 / 3))
    found = best_routes(log_p, np.ones(4), 100.0)
    assert spent(np.ones(4), found) == 0


@laws
@given(st.integers(0, 10_000), st.integers(4, 5), st.integers(2, 8), st.floats(0, 1.2))
def test_routes_of_many_tasks_stay_inside_the_slack(seed, num_tasks, num_layers, share):
    generator = np.random.default_rng(seed)
    log_p = np.log(generator.dirichlet(np.ones(num_tasks), size=(num_tasks, num_layers)))
    layer_costs = generator.uniform(0.0, 1.0, size=num_layers)
    slack = share * float(layer_costs.sum()) * (num_tasks - 1)
    found = best_routes(log_p, layer_costs, slack)
    assert len(found) == num_tasks
    assert all(len(way) == num_layers for way in found)
    assert spent(layer_costs, found) <= slack * (1 + 1e-9)


# Blocks -------------------------------------------------------------------------------------


def all_paths(routes, space):
    """Every choice of blocks for every group, as paths per task."""
    tasks = names(len(routes))
    groupings = Branching.from_routes(tasks, routes).groupings
    blocks = [
        [one.blocks[index] for one in map(space.decode, options)]
        for index in range(len(space.blocks))
        for options in [
            sorted(
                {
                    tuple(
                        choice_index if choice.block == index + 1 else 0
                        for choice, choice_index in zip(space.choices, indices, strict=True)
                    )
                    for indices in itertools.product(
                        *(range(len(c.options)) for c in space.choices)
                    )
                }
            )
        ]
    ]
    slots = [
        (index, group)
        for index in range(len(space.blocks))
        for group in range(max(groupings[index + 1]) + 1)
    ]
    make = type(space.base_architecture)
    for chosen in itertools.product(*(blocks[index] for index, _ in slots)):
        held = dict(zip(slots, chosen, strict=True))
        yield tuple(
            make(
                tuple(held[i, groupings[i + 1][t]] for i in range(len(space.blocks))),
                space=space.name,
            )
            for t in range(len(routes))
        )


@pytest.mark.parametrize(
    "routes",
    [
        ((0, 0, 0, 0), (0, 0, 0, 0)),
        ((0, 0, 0, 0), (0, 0, 0, 1)),
        ((0, 1, 0, 0), (0, 1, 1, 1)),
        ((0, 0, 1, 0), (0, 1, 1, 0)),
        ((0, 0, 1, 0), (1, 1, 1, 0)),
        ((0, 0, 1, 0), (0, 0, 2, 0), (0, 0, 2, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", ["plain", "over"])
def test_the_best_paths_are_those_of_brute_force_up_to_bins(routes, stream):
    count = len(routes)
    tasks = names(count)
    costs = costs_of(MINI, tasks, stream)
    log_p = LogProbabilities.of(random_parameters(MINI, count, seed=1))
    every = list(all_paths(routes, MINI))
    trees = [Branching.from_routes(tasks, routes, paths) for paths in every]
    prices = np.array([costs.of(tree) for tree in trees])
    scores = np.array([log_p.of_network(routes, tree, MINI) for tree in trees])
    least, most = prices.min(), prices.max()
    assert len(every) == 4 ** sum(max(row) + 1 for row in trees[0].groupings[1:3])
    bins = sum(trees[0].num_groups)
    for share in (0.0, 0.3, 0.7):
        target = float(least + share * (most - least))
        paths = best_paths(routes, log_p, costs, tasks, target)
        assert paths is not None
        found = Branching.from_routes(tasks, routes, paths)
        assert costs.of(found) <= target
        surely = prices <= least + (target - least) * (1 - bins / NUM_BINS) + 1e-12
        assert log_p.of_network(routes, found, MINI) >= scores[surely].max() - 1e-6
    assert best_paths(routes, log_p, costs, tasks, float(least) * 0.999) is None


# The whole derivation -----------------------------------------------------------------------


@pytest.mark.parametrize("stream", STREAMS)
def test_fixed_blocks_give_the_most_probable_branching_inside_the_target(stream):
    costs = costs_of(FIXED, stream=stream)
    every = all_routes(2, costs.num_layers)
    trees = [Branching.from_routes(TWO, routes) for routes in every]
    known = {tree: costs.of(tree) for tree in set(trees)}
    prices = np.array([known[tree] for tree in trees])
    assert smallest_cost(costs, TWO) == pytest.approx(prices.min(), rel=1e-12)
    for seed in range(2):
        parameters = random_parameters(FIXED, 2, seed)
        log_p = log_softmax(parameters)
        scores = np.array([score(log_p, routes) for routes in every])
        for share in (0.0, 0.3, 0.7, 1.1):
            target = float(prices.min() + share * (prices.max() - prices.min()))
            found = derive_branched(
                parameters,
                costs,
                TWO,
                target=target,
                num_candidates=1,
                generator=np.random.default_rng(0),
            )
            # "near" straddles the cache: what a share of the slack leaves may be missed.
            room = 0.85 if stream == "near" else 1 - costs.num_layers / NUM_BINS
            surely = prices <= prices.min() + room * (target - prices.min()) + 1e-12
            assert found[0].log_probability >= scores[surely].max() - 1e-6
            assert found[0].log_probability <= scores[prices <= target].max() + 1e-9
            for one in found:
                assert one.log_probability == pytest.approx(score(log_p, one.candidates))


@pytest.mark.parametrize("space", [FIXED, SPACE], ids=["fixed", "searchable"])
@laws
@given(
    stream=st.sampled_from(sorted(STREAMS)),
    seed=st.integers(0, 10_000),
    share=st.floats(0, 1.2),
    num_tasks=st.integers(2, 3),
)
def test_every_derived_branching_is_inside_the_target(space, stream, seed, share, num_tasks):
    tasks = names(num_tasks)
    costs = costs_of(space, tasks, stream)
    least = smallest_cost(costs, tasks)
    largest = SPACE.extreme(SPACE.base_architecture, largest=True)
    path = largest if space is SPACE else space.base_architecture
    most = costs.of(Branching.separate(tasks, costs.num_layers, path))
    target = least + share * (most - least)
    found = derive_branched(
        random_parameters(space, num_tasks, seed, scale=2.0),
        costs,
        tasks,
        target=target,
        num_candidates=2,
        generator=np.random.default_rng(seed),
    )
    assert 1 <= len(found) <= 2
    assert len({one.branching for one in found}) == len(found)
    for one in found:
        assert one.cost == costs.of(one.branching)
        assert least * (1 - 1e-12) <= one.cost <= target
        assert one.branching == Branching.from_routes(tasks, one.candidates, one.branching.paths)
        for path in one.branching.paths or ():
            space.check(path)


@pytest.mark.parametrize("space", [FIXED, MINI, SPACE], ids=["fixed", "mini", "searchable"])
@pytest.mark.parametrize("stream", ["plain", "over", "under"])
def test_at_the_smallest_cost_the_cheapest_comes_back_and_below_it_nothing(space, stream):
    costs = costs_of(space, stream=stream)
    least = smallest_cost(costs, TWO)
    every = [
        costs.of(Branching.shared(TWO, costs.num_layers, space.decode(indices)))
        for indices in itertools.product(*(range(len(c.options)) for c in space.choices))
    ]
    assert least == pytest.approx(min(every), rel=1e-12)
    settings = {"num_candidates": 2, "generator": np.random.default_rng(0)}
    parameters = random_parameters(space, 2, seed=0, scale=3.0)
    found = derive_branched(parameters, costs, TWO, target=least, **settings)
    assert [one.cost for one in found] == [least]
    assert found[0].branching.num_groups == (1,) * costs.num_layers
    for target in (least * 0.99, 0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="below the smallest branched network") as caught:
            derive_branched(parameters, costs, TWO, target=target, **settings)
        assert f"{target:.4g} ms" in str(caught.value)
        assert f"{least:.4g} ms" in str(caught.value)


def test_a_large_target_gives_the_argmax_and_draws_are_reproducible():
    costs = costs_of(SPACE)
    parameters = random_parameters(SPACE, 2, seed=5, scale=2.0)
    settings = {"target": 1e3, "num_candidates": 6}
    one, other = (
        derive_branched(parameters, costs, TWO, **settings, generator=np.random.default_rng(1))
        for _ in range(2)
    )
    assert one == other
    assert one[0].branching == parameters.argmax().branching(TWO)
    assert len(one) == 6
    assert one[0].log_probability == max(r.log_probability for r in one)


# Ranking ------------------------------------------------------------------------------------


def test_ranked_scores_are_those_of_the_stand_alone_networks(tiny):
    channels = {name: task.out_channels for name, task in tiny.tasks.items()}
    encoder = ednas_encoder(tiny.space)
    costs = latency_costs(tiny.space, tiny.table, channels)
    search = BranchingSearch(
        BranchingConfig(steps=2, batch_size=4, latency=LatencyLossConfig(), sandwich=False),
        encoder,
        tiny.tasks,
        costs=costs,
        macs=mac_costs(encoder, (32, 32), channels),
        target=None,
        splits={"weights": tiny.train.subset(range(8)), "alpha": tiny.train.subset(range(8, 16))},
        augmentation=tiny.search().augmentation,
        seed=0,
        device=CPU,
    )
    search.take_step(0)
    tasks = list(tiny.tasks)
    target = 1.3 * smallest_cost(costs, tasks)
    found = derive_branched(
        search.parameters,
        costs,
        tasks,
        target=target,
        num_candidates=3,
        generator=np.random.default_rng(0),
    )
    assert len(found) == 3
    config = DeriveConfig(calibration_batches=2, batch_size=8)
    splits = {
        "calibration": tiny.train.subset(range(16)),
        "validation": tiny.train.subset(range(16, 24)),
    }
    ranked = rank_branchings(found, search, target=target, config=config, **splits)
    assert {id(one.derived) for one in ranked} == {id(one) for one in found}
    assert [one.reward for one in ranked] == sorted((one.reward for one in ranked), reverse=True)
    for one in ranked:
        alone = branched_network(encoder, one.derived.branching, channels)
        inherit_branched(alone, search.network, one.derived.candidates, one.derived.branching)
        state = inherited(search, one.derived).state_dict()
        assert all(torch.equal(state[name], v) for name, v in alone.state_dict().items())
        images = calibration_images(
            splits["calibration"], num_batches=2, batch_size=8, seed=0, device=CPU
        )
        recalibrate_bn(alone, images)
        metrics = evaluate(alone, splits["validation"], tiny.tasks, batch_size=8, device=CPU)
        assert metrics == one.metrics
        expected = reward(accuracy_of(tiny.tasks, metrics), one.derived.cost, target)
        assert one.reward == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("cache_bytes", [0.0, 3e3, 4e3, 5e3, 6e3, 1e4, 1e9])
def test_the_smallest_cost_is_exact_whatever_streams(small_space, cache_bytes):
    table = toy_table(small_space, cache_bytes=cache_bytes, streaming_ms_per_byte=1e-3)
    costs, exact = latency_costs(small_space, table, OUT_CHANNELS), table.costs(small_space)
    least = smallest_cost(costs, list(OUT_CHANNELS))
    assert least == pytest.approx(exact.min_latency_ms, rel=1e-12)
    encoder = ednas_encoder(small_space)
    (found, *_) = derive_branched(
        BranchingParameters(encoder, len(OUT_CHANNELS)),
        costs,
        list(OUT_CHANNELS),
        target=least,
        num_candidates=1,
        generator=np.random.default_rng(0),
    )
    assert found.cost <= least
