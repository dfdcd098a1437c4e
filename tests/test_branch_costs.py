"""Costs of branched networks against the single-task code, and expectations against enumeration."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGE_SIZE, SMALL_SPACE, toy_table
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas import LatencyTable, SearchSpace, ednas_tiny
from oneshot_ednas.latency.operations import network_macs, network_operations
from oneshot_ednas.models.deeplab import named_encoder
from oneshot_ednas.models.encoder import ednas_encoder
from oneshot_ednas.models.macs import encoder_macs, module_macs
from oneshot_ednas.relaxation import BlockGates, one_hot_gates
from oneshot_ednas.sharing.branched import Routes, branched_network
from oneshot_ednas.sharing.branching import Branching
from oneshot_ednas.sharing.costs import BranchCosts, latency_costs, mac_costs
from oneshot_ednas.space import CHOICE_FIELDS

SPACE = SearchSpace.from_yaml(SMALL_SPACE)
CHANNELS = {"segmentation": 4, "depth": 1, "normals": 3}
TASKS = tuple(CHANNELS)
NUM_LAYERS = len(SPACE.blocks) + 2
PLAIN = toy_table(SPACE, out_channels=CHANNELS)
STREAMING = toy_table(SPACE, out_channels=CHANNELS, cache_bytes=4000.0, streaming_ms_per_byte=1e-4)
TABLES = {"plain": PLAIN, "streaming": STREAMING}
MINI = SearchSpace.from_yaml(
    """
name: mini
stem_filters: 4
blocks:
  - stride: 1
    kernel_size: 3
    filters: 8
    expand_ratio: 2
    options: {filters: [4, 8]}
  - stride: 2
    kernel_size: 3
    filters: 8
    expand_ratio: 2
    options: {filters: [6, 8]}
fusion: {tap_blocks: [1, 2], num_levels: 2, channels: 4, num_repeats: 1}
head: {num_convs: 1}
"""
)
"""Two blocks with two widths each: all routes and all blocks of all candidates can be tried."""
WIDER = SearchSpace.from_yaml(
    """
name: wider
stem_filters: 4
blocks:
  - {stride: 1, kernel_size: 3, filters: 4, expand_ratio: 2}
  - stride: 2
    kernel_size: 3
    filters: 8
    expand_ratio: 2
    options: {filters: [4, 6, 8]}
  - {stride: 1, kernel_size: 5, filters: 4, expand_ratio: 2}
fusion: {tap_blocks: [2], num_levels: 2, channels: 4, num_repeats: 1}
head: {num_convs: 1}
"""
)
"""Only the second block varies, in three widths; the last is not read."""
laws = settings(deadline=None, derandomize=True, max_examples=40)


def path(seed: int):
    return SPACE.sample(np.random.default_rng(seed))


def random_branching(seed: int, tasks=TASKS, space=SPACE) -> Branching:
    generator = np.random.default_rng(seed)
    count = len(tasks)
    tree = Branching.random(tasks, len(space.blocks) + 2, generator)
    names = [generator.permutation(count) for _ in tree.groupings]
    routes = tuple(
        tuple(int(names[layer][row[t]]) for layer, row in enumerate(tree.groupings))
        for t in range(count)
    )
    return Routes(routes, tuple(space.sample(generator) for _ in tasks)).branching(tasks)


def by_operations(table: LatencyTable, branching: Branching, space=SPACE) -> float:
    """Milliseconds summed over the operations of each task's network, shared ones once."""
    header = table.header
    ms, size = header.fixed_ms, 0.0
    height, width = table.image_size
    ms += header.input_ms_per_byte * height * width * 3
    stride = space.output_stride
    pixels = -(-height // stride) * -(-width // stride)
    ms += header.output_ms_per_byte * pixels * sum(CHANNELS[task] for task in branching.tasks)
    names = ["stem", *(f"block_{i + 1}" for i in range(len(space.blocks))), "bifpn"]
    seen = set()
    for number, task in enumerate(branching.tasks):
        assert branching.paths is not None
        placed = network_operations(
            space, branching.paths[number], table.image_size, {task: CHANNELS[task]}
        )
        added = set()
        for one in placed:
            place = one.where.split(".")[0]
            key = (task,)
            if place != "head":
                layer = names.index(place)
                key = (place, branching.groupings[layer][number])
            if key in seen:
                continue
            added.add(key)
            row = table.row(one.operation)
            ms, size = ms + row.latency_ms, size + row.parameter_bytes
        seen |= added
    return ms + header.streaming_ms_per_byte * max(0.0, size - header.cache_bytes)


def test_the_streaming_table_streams_some_networks_and_not_others():
    costs = latency_costs(SPACE, STREAMING, CHANNELS)
    over = [costs.totals(random_branching(seed))[1] > costs.cache_bytes for seed in range(30)]
    assert 5 < sum(over) < 30


# One network --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_full_sharing_costs_what_the_table_says(name):
    table = TABLES[name]
    costs = latency_costs(SPACE, table, CHANNELS)
    assert costs.unit == "ms"
    for seed in range(20):
        shared = Branching.shared(TASKS, NUM_LAYERS, path(seed))
        assert costs.of(shared) == pytest.approx(
            table.latency_ms(SPACE, path(seed), CHANNELS), rel=1e-12
        )
        assert costs.of(shared) == pytest.approx(by_operations(table, shared), rel=1e-12)
    fixed = latency_costs(SPACE.fix(path(0)), table, CHANNELS)
    expected = pytest.approx(table.latency_ms(SPACE, path(0), CHANNELS), rel=1e-12)
    assert fixed.of(Branching.shared(TASKS, NUM_LAYERS)) == expected
    assert fixed.of(Branching.shared(TASKS, NUM_LAYERS, path(0))) == expected


def test_full_sharing_costs_the_macs_of_the_network():
    costs = mac_costs(ednas_encoder(SPACE), IMAGE_SIZE, CHANNELS)
    assert costs.unit == "GMACs"
    for seed in range(20):
        expected = network_macs(SPACE, path(seed), IMAGE_SIZE, CHANNELS) / 1e9
        found = costs.of(Branching.shared(TASKS, NUM_LAYERS, path(seed)))
        assert found == pytest.approx(expected, rel=1e-12)


def test_separate_networks_cost_the_macs_of_each():
    costs = mac_costs(ednas_encoder(SPACE), IMAGE_SIZE, CHANNELS)
    routes = tuple((t,) * NUM_LAYERS for t in range(3))
    paths = tuple(path(seed) for seed in range(3))
    separate = Routes(routes, paths).branching(TASKS)
    assert separate.paths == paths
    total = sum(
        network_macs(SPACE, own, IMAGE_SIZE, {task: count})
        for own, (task, count) in zip(paths, CHANNELS.items(), strict=True)
    )
    assert costs.of(separate) == pytest.approx(total / 1e9, rel=1e-12)


@pytest.mark.parametrize("name", TABLES)
@laws
@given(seed=st.integers(0, 10_000))
def test_a_branched_network_costs_its_operations(name, seed):
    branching = random_branching(seed)
    costs = latency_costs(SPACE, TABLES[name], CHANNELS)
    expected = by_operations(TABLES[name], branching)
    assert costs.of(branching) == pytest.approx(expected, rel=1e-12)
    assert costs.priced(costs.totals(branching)) == costs.of(branching)


@settings(laws, max_examples=10)
@given(st.integers(0, 10_000))
def test_macs_of_a_branched_network_are_those_counted_in_it(seed):
    branching = random_branching(seed)
    costs = mac_costs(ednas_encoder(SPACE), IMAGE_SIZE, CHANNELS)
    network = branched_network(ednas_encoder(SPACE), branching, CHANNELS)
    counted = module_macs(network, torch.empty(1, 3, *IMAGE_SIZE))
    assert costs.of(branching) == pytest.approx(counted / 1e9, rel=1e-12)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet34"])
def test_macs_of_a_named_backbone_are_those_counted_in_the_network(name):
    encoder = named_encoder(
        name, width=0.25, aspp_channels=16, low_level_channels=8, decoder_channels=16
    )
    costs = mac_costs(encoder, (64, 96), CHANNELS)
    depth = len(encoder.layers)
    assert costs.num_layers == depth
    x = torch.empty(2, 3, 64, 96)
    generator = np.random.default_rng(1)
    trees = [Branching.shared(TASKS, depth), Branching.random(TASKS, depth, generator)]
    for branching in trees:
        counted = module_macs(branched_network(encoder, branching, CHANNELS), x)
        assert costs.of(branching) == pytest.approx(counted / 1e9, rel=1e-12)
    routes = F.one_hot(torch.tensor([[0] * depth, [0] * (depth - 1) + [1], [0] * depth]), 3)
    tree = Branching.vanilla(TASKS, depth, depth - 1).groupings[:-1]
    branching = Branching(TASKS, (*tree, (0, 1, 0)))
    assert float(costs.expected(routes.double())) == pytest.approx(costs.of(branching), rel=1e-12)
    layers, decoders = encoder_macs(encoder, (64, 96), CHANNELS)
    assert set(decoders) == set(TASKS)
    assert min(layers) > 0


@laws
@given(seed=st.integers(0, 10_000), data=st.data())
def test_parting_tasks_never_gets_cheaper(seed, data):
    """Each part keeps its own copy of what was shared."""
    branching = random_branching(seed)
    layer = data.draw(st.integers(0, NUM_LAYERS - 1))
    task = data.draw(st.integers(0, 2))
    # From a layer on, a task goes alone; its blocks stay.
    routes = [
        [labels[t] if t != task or i < layer else 9 for i, labels in enumerate(branching.groupings)]
        for t in range(3)
    ]
    finer = Branching.from_routes(TASKS, routes, branching.paths)
    more = sum(finer.num_groups) - sum(branching.num_groups)
    for table in TABLES.values():
        costs = latency_costs(SPACE, table, CHANNELS)
        if more:
            assert costs.of(finer) > costs.of(branching)
        else:
            assert costs.of(finer) == costs.of(branching)
    macs = mac_costs(ednas_encoder(SPACE), IMAGE_SIZE, CHANNELS)
    assert macs.of(finer) >= macs.of(branching)


def test_branchings_of_something_else_are_refused():
    costs = latency_costs(SPACE, PLAIN, CHANNELS)
    with pytest.raises(ValueError, match="expected a branching of 6 layers, got 5"):
        costs.of(Branching.shared(TASKS, 5))
    with pytest.raises(ValueError, match="an architecture per task"):
        costs.of(Branching.shared(TASKS, 6))
    with pytest.raises(ValueError, match="blocks"):
        costs.of(Branching.shared(TASKS, 6, ednas_tiny().base_architecture))
    with pytest.raises(ValueError, match="no row"):
        latency_costs(ednas_tiny(), PLAIN, CHANNELS)


# Expectation --------------------------------------------------------------------------------


def random_gates(space, num_tasks, seed, scale=1.0):
    """Probabilities of routes and of the blocks of each candidate."""
    source = torch.Generator().manual_seed(seed)

    def draw(*shape):
        noise = torch.randn(*shape, generator=source, dtype=torch.float64)
        return (scale * noise).softmax(-1)

    routes = draw(num_tasks, len(space.blocks) + 2, num_tasks)
    options = tuple(
        tuple(
            BlockGates(*(draw(len(spec.options(name))) for name in CHOICE_FIELDS))
            for spec in space.blocks
        )
        for _ in range(num_tasks)
    )
    return routes, options


def enumerated(costs: BranchCosts, space, tasks, routes, options) -> tuple[float, float]:
    """The expected cost over all routes and all blocks of all candidates; the probability."""
    num_tasks, num_layers, _ = routes.shape
    architectures = [
        space.decode(i)
        for i in itertools.product(*(range(len(choice.options)) for choice in space.choices))
    ]
    odds = [
        [
            float(
                np.prod(
                    [
                        float(getattr(gates[b], f)[spec.options(f).index(getattr(block, f))])
                        for b, (spec, block) in enumerate(
                            zip(space.blocks, one.blocks, strict=True)
                        )
                        for f in CHOICE_FIELDS
                    ]
                )
            )
            for one in architectures
        ]
        for gates in options
    ]
    p = routes.numpy()
    total = mass = 0.0
    cost_of: dict = {}
    ways = list(itertools.product(range(num_tasks), repeat=num_layers))
    way_odds = [
        [float(np.prod([p[t, i, j] for i, j in enumerate(way)])) for way in ways]
        for t in range(num_tasks)
    ]
    for taken in itertools.product(range(len(ways)), repeat=num_tasks):
        weight = np.prod([way_odds[t][w] for t, w in enumerate(taken)])
        candidates = tuple(ways[w] for w in taken)
        for chosen in itertools.product(range(len(architectures)), repeat=num_tasks):
            q = weight * np.prod([odds[j][a] for j, a in enumerate(chosen)])
            run = Routes(candidates, tuple(architectures[a] for a in chosen))
            branching = run.branching(tasks)
            if branching not in cost_of:
                cost_of[branching] = costs.of(branching)
            total, mass = total + q * cost_of[branching], mass + q
    return total, mass


def enumerated_routes(costs: BranchCosts, tasks, routes) -> float:
    """The expected cost over all routes where blocks are fixed."""
    num_tasks, num_layers, _ = routes.shape
    p, total = routes.numpy(), 0.0
    held = {(((),) * num_tasks): 1.0}
    for layer in range(num_layers):
        after: dict = {}
        for ways, weight in held.items():
            for taken in itertools.product(range(num_tasks), repeat=num_tasks):
                labels = [(*way, j) for way, j in zip(ways, taken, strict=True)]
                q = weight * np.prod([p[t, layer, j] for t, j in enumerate(taken)])
                # Only who is together matters from here on: ways are renamed by grouping.
                key = tuple((*ways[t], labels.index(labels[t])) for t in range(num_tasks))
                after[key] = after.get(key, 0.0) + q
        held = after
    for ways, q in held.items():
        total += q * costs.of(Branching.from_routes(tasks, ways))
    return total


@pytest.mark.parametrize("space", [MINI, WIDER], ids=lambda space: space.name)
def test_the_expectation_of_two_tasks_equals_enumeration(space):
    tasks = TASKS[:2]
    channels = {task: CHANNELS[task] for task in tasks}
    table = toy_table(space, out_channels=channels)
    costs = latency_costs(space, table, channels)
    macs = mac_costs(ednas_encoder(space), IMAGE_SIZE, channels)
    routes, options = random_gates(space, 2, seed=0)
    for one in (costs, macs) if space is MINI else (costs,):
        expected, mass = enumerated(one, space, tasks, routes, options)
        assert mass == pytest.approx(1, abs=1e-12)
        assert float(one.expected(routes, options)) == pytest.approx(expected, rel=1e-9)


def test_the_expectation_of_three_tasks_equals_enumeration():
    """Of fixed blocks over all routes; of varying ones over samples of routes and all blocks."""
    fixed = MINI.fix(MINI.base_architecture)
    table = toy_table(MINI, out_channels=CHANNELS)
    costs = latency_costs(fixed, table, CHANNELS)
    routes, _ = random_gates(MINI, 3, seed=1)
    expected = enumerated_routes(costs, TASKS, routes)
    assert float(costs.expected(routes)) == pytest.approx(expected, rel=1e-9)


def test_the_expectation_of_three_tasks_over_blocks_equals_enumeration():
    """Routes that are sure but in two layers, and blocks that are not."""
    costs = latency_costs(MINI, toy_table(MINI, out_channels=CHANNELS), CHANNELS)
    routes, options = random_gates(MINI, 3, seed=2)
    architectures = [MINI.decode(i) for i in itertools.product(range(2), repeat=2)]
    held = [
        [
            float(g[0].filters[(4, 8).index(a.blocks[0].filters)])
            * float(g[1].filters[(6, 8).index(a.blocks[1].filters)])
            for a in architectures
        ]
        for g in options
    ]
    for free in ((1, 2), (0, 1), (2, 3)):
        sure = F.one_hot(torch.tensor([[0, 1, 2, 0], [0, 1, 2, 0], [0, 1, 1, 2]]), 3).double()
        # Of three candidates each task takes one of two, others in each task.
        two = routes * (1 - torch.eye(3, dtype=torch.float64))[:, None]
        two = two / two.sum(-1, keepdim=True)
        sure[:, list(free)] = two[:, list(free)]
        expected = 0.0
        rows = [
            [[(j, float(q)) for j, q in enumerate(layer) if q > 0] for layer in task]
            for task in sure
        ]
        ways = [list(itertools.product(*row)) for row in rows]
        for taken in itertools.product(*ways):
            weight = np.prod([q for way in taken for _, q in way])
            candidates = tuple(tuple(j for j, _ in way) for way in taken)
            for chosen in itertools.product(range(4), repeat=3):
                q = weight * np.prod([held[j][a] for j, a in enumerate(chosen)])
                run = Routes(candidates, tuple(architectures[a] for a in chosen))
                expected += q * _cached(costs, run.branching(TASKS))
        assert float(costs.expected(sure, options)) == pytest.approx(expected, rel=1e-9)


_KNOWN: dict = {}


def _cached(costs: BranchCosts, branching: Branching) -> float:
    if branching not in _KNOWN:
        _KNOWN[branching] = costs.of(branching)
    return _KNOWN[branching]


def test_the_expectation_is_the_mean_over_samples():
    """Three tasks, four blocks of many options, which nothing can enumerate."""
    costs = latency_costs(SPACE, PLAIN, CHANNELS)
    routes, options = random_gates(SPACE, 3, seed=3)
    generator = np.random.default_rng(0)
    found = []
    for _ in range(500):
        candidates = tuple(
            tuple(int(generator.choice(3, p=p / p.sum())) for p in task) for task in routes.numpy()
        )
        drawn = []
        for gates in options:
            indices = [
                int(generator.choice(len(v), p=v.numpy()))
                for choice in SPACE.choices
                for v in [getattr(gates[choice.block - 1], choice.field)]
            ]
            drawn.append(SPACE.decode(indices))
        found.append(costs.of(Routes(candidates, tuple(drawn)).branching(TASKS)))
    error = np.std(found) / np.sqrt(len(found))
    assert float(costs.expected(routes, options)) == pytest.approx(np.mean(found), abs=4 * error)


@pytest.mark.parametrize("name", TABLES)
@laws
@given(seed=st.integers(0, 10_000))
def test_one_hot_gates_cost_their_network(name, seed):
    costs = latency_costs(SPACE, TABLES[name], CHANNELS)
    generator = np.random.default_rng(seed)
    candidates = generator.integers(3, size=(3, NUM_LAYERS))
    candidates[:, : generator.integers(NUM_LAYERS)] = 1
    drawn = tuple(SPACE.sample(generator) for _ in TASKS)
    branching = Routes(tuple(map(tuple, candidates.tolist())), drawn).branching(TASKS)
    found = costs.expected(
        F.one_hot(torch.from_numpy(candidates), 3).double(),
        tuple(one_hot_gates(SPACE, one, dtype=torch.float64) for one in drawn),
    )
    assert float(found) == pytest.approx(costs.of(branching), rel=1e-12)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("num_tasks", [2, 3])
def test_the_gradient_equals_finite_differences(name, num_tasks):
    tasks = TASKS[:num_tasks]
    costs = latency_costs(SPACE, TABLES[name], {task: CHANNELS[task] for task in tasks})
    routes, options = random_gates(SPACE, num_tasks, seed=4)
    held = [routes, *(v for gates in options for block in gates for v in block)]
    leaves = [v.log().requires_grad_() for v in held if v.shape[-1] > 1]

    def expected(*leaves):
        rest = iter(leaves)
        numbers = [next(rest).softmax(-1) if v.shape[-1] > 1 else v for v in held]
        rest = iter(numbers[1:])
        gates = tuple(
            tuple(BlockGates(*(next(rest) for _ in block)) for block in one) for one in options
        )
        return costs.expected(numbers[0], gates)

    assert torch.autograd.gradcheck(expected, leaves)


def test_the_expectation_of_float32_gates_is_near():
    costs = latency_costs(SPACE, PLAIN, CHANNELS)
    routes, options = random_gates(SPACE, 3, seed=5)
    low = tuple(tuple(BlockGates(*(v.float() for v in b)) for b in gates) for gates in options)
    exact, found = costs.expected(routes, options), costs.expected(routes.float(), low)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(exact), rel=1e-5)
