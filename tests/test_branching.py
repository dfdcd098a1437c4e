"""Branchings: trees from routes, shapes, JSON, and what is no tree."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from conftest import SMALL_SPACE
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.sharing.branching import Branching, nearest
from oneshot_ednas.sharing.groupings import all_groupings
from oneshot_ednas.space import SearchSpace

SPACE = SearchSpace.from_yaml(SMALL_SPACE)
NUM_LAYERS = len(SPACE.blocks) + 2
TASKS = ("segmentation", "depth", "normals")
laws = settings(deadline=None, derandomize=True, max_examples=60)


@st.composite
def routes(draw, num_layers=None):
    num_tasks = draw(st.integers(2, 5))
    count = draw(st.integers(1, 7)) if num_layers is None else num_layers
    route = st.lists(st.integers(0, num_tasks - 1), min_size=count, max_size=count)
    return draw(st.lists(route, min_size=num_tasks, max_size=num_tasks))


def names(count: int) -> tuple[str, ...]:
    return tuple(f"task_{i}" for i in range(count))


def path(seed: int) -> Architecture:
    return SPACE.sample(np.random.default_rng(seed))


# From routes --------------------------------------------------------------------------------


@laws
@given(routes())
def test_tasks_share_a_layer_where_their_routes_agree_up_to_it(routes):
    branching = Branching.from_routes(names(len(routes)), routes)
    for layer, (one, other) in itertools.product(
        range(branching.num_layers), itertools.combinations(range(len(routes)), 2)
    ):
        labels = branching.groupings[layer]
        together = routes[one][: layer + 1] == routes[other][: layer + 1]
        assert (labels[one] == labels[other]) == together
    for layer, count in enumerate(branching.num_groups):
        assert count == len({tuple(route[: layer + 1]) for route in routes})
        assert sum(branching.sharing_tasks(layer, g) for g in range(count)) == len(routes)
        for group in range(count):
            task = branching.first_task(layer, group)
            assert branching.groupings[layer][task] == group
            assert group not in branching.groupings[layer][:task]
            if layer:
                assert branching.parent(layer, group) == branching.groupings[layer - 1][task]


@laws
@given(routes(), st.randoms(use_true_random=False))
def test_permuting_forth_and_back_changes_nothing(routes, random):
    tasks = names(len(routes))
    branching = Branching.from_routes(tasks, routes)
    order = list(range(len(routes)))
    random.shuffle(order)
    other = branching.permuted(order)
    assert other == Branching.from_routes(tasks, [routes[i] for i in order])
    assert other.tasks == tasks
    assert other.num_groups == branching.num_groups
    inverse = [order.index(i) for i in range(len(order))]
    assert other.permuted(inverse) == branching


def test_permuting_moves_paths_with_their_places():
    paths = (path(0), path(1), path(2))
    branching = Branching(TASKS, ((0, 0, 0),) + ((0, 1, 2),) * (NUM_LAYERS - 1), paths)
    assert branching.permuted([2, 0, 1]).paths == (paths[2], paths[0], paths[1])
    for order in ([0, 1], [0, 0, 1], [0, 1, 3]):
        with pytest.raises(ValueError, match="permutation of the tasks"):
            branching.permuted(order)


@laws
@given(routes(num_layers=NUM_LAYERS), st.booleans(), st.integers(0, 99))
def test_json_round_trip(routes, has_paths, seed):
    tasks = names(len(routes))
    paths = None
    if has_paths:
        options = [path(seed + j) for j in range(len(routes))]
        paths = tuple(
            Architecture(
                tuple(options[route[i + 1]].blocks[i] for i in range(len(SPACE.blocks))),
                space=SPACE.name,
            )
            for route in routes
        )
    branching = Branching.from_routes(tasks, routes, paths)
    text = json.dumps(branching.to_json())
    assert Branching.from_json(json.loads(text)) == branching
    assert hash(Branching.from_json(json.loads(text))) == hash(branching)


# Shapes -------------------------------------------------------------------------------------


def test_shared_separate_and_vanilla():
    shared = Branching.shared(TASKS, 5)
    assert shared.groupings == ((0, 0, 0),) * 5
    assert shared.num_groups == (1,) * 5
    separate = Branching.separate(TASKS, 5)
    assert separate.groupings == ((0, 1, 2),) * 5
    assert separate.num_groups == (3,) * 5
    half = Branching.vanilla(TASKS, 5, 2)
    assert half.groupings == ((0, 0, 0),) * 2 + ((0, 1, 2),) * 3
    assert Branching.vanilla(TASKS, 5, 5) == shared
    assert Branching.vanilla(TASKS, 5, 0) == separate
    own = path(0)
    assert Branching.vanilla(TASKS, NUM_LAYERS, 2, own).paths == (own,) * 3
    for count in (-1, 6):
        with pytest.raises(ValueError, match=f"num_shared: expected 0 to 5, got {count}"):
            Branching.vanilla(TASKS, 5, count)


@pytest.mark.parametrize("num_tasks", [2, 3, 4])
def test_random_branchings_reach_every_group_count_and_every_grouping(num_tasks):
    generator, tasks = np.random.default_rng(0), names(num_tasks)
    found = [Branching.random(tasks, 4, generator) for _ in range(1500)]
    assert all(one.num_layers == 4 and one.tasks == tasks for one in found)
    for layer in range(4):
        assert {one.num_groups[layer] for one in found} == set(range(1, num_tasks + 1))
        assert {one.groupings[layer] for one in found} == set(all_groupings(num_tasks))
    ends = [one.num_groups[-1] for one in found]
    # As many leaves as drawn, each number as probable as the others.
    for count in range(1, num_tasks + 1):
        assert ends.count(count) / len(ends) == pytest.approx(1 / num_tasks, abs=0.05)
    again = np.random.default_rng(0)
    assert [Branching.random(tasks, 4, again) for _ in range(20)] == found[:20]


def test_random_branchings_keep_the_path():
    one = Branching.random(TASKS, NUM_LAYERS, np.random.default_rng(0), path(3))
    assert one.paths == (path(3),) * 3


def test_nearest_takes_the_first_of_equals():
    candidates = [Branching.vanilla(TASKS, 5, count) for count in range(6)]
    cost = lambda one: float(sum(one.num_groups))  # noqa: E731
    assert nearest(candidates, cost, 9.4) == candidates[3]
    assert nearest(candidates, cost, 8.0) == candidates[3]  # 9 and 7 are as near
    assert nearest(candidates[::-1], cost, 8.0) == candidates[4]
    assert nearest(candidates, cost, 1e9) == candidates[0]


def test_text_names_layers_and_groups():
    branching = Branching(TASKS, ((0, 0, 0), (0, 0, 0), (0, 1, 0), (0, 1, 2), (0, 1, 2)))
    assert str(branching) == (
        "layers 1-2: all tasks; layers 3: segmentation+normals | depth; "
        "layers 4-5: segmentation | depth | normals"
    )
    assert str(Branching.shared(TASKS, 1)) == "layers 1: all tasks"


# Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groupings", "message"),
    [
        ((), "at least one layer"),
        (((0, 0),), "label for each of 3 tasks"),
        (((0, 0, 0, 0),), "label for each of 3 tasks"),
        (((1, 0, 0),), "order of first appearance"),
        (((0, 2, 1),), "order of first appearance"),
        (((0, 0, 0), (0, 0, 2)), "layer 1: .*order of first appearance"),
        (((0, 1, 1), (0, 0, 1)), r"layer 1: \[0, 0, 1\] joins tasks that \[0, 1, 1\] had parted"),
        (((0, 1, 2), (0, 0, 0)), "joins tasks"),
        (((0, 0, 1), (0, 0, 1), (0, 1, 1)), "layer 2: .*joins"),
    ],
)
def test_what_is_no_tree_is_refused(groupings, message):
    with pytest.raises(ValueError, match=message):
        Branching(TASKS, groupings)


def test_numbers_of_tasks_are_checked():
    for count in (1, 8):
        with pytest.raises(ValueError, match="tasks"):
            Branching.shared(names(count), 3)
        with pytest.raises(ValueError, match="tasks"):
            Branching.random(names(count), 3, np.random.default_rng(0))


def test_a_shared_block_is_the_same_on_all_paths():
    one = SPACE.base_architecture
    blocks = list(one.blocks)
    blocks[2] = dataclasses.replace(blocks[2], filters=12)
    other = Architecture(tuple(blocks), space=SPACE.name)
    groupings = [(0, 0, 0)] * NUM_LAYERS
    with pytest.raises(ValueError, match="layer 3: segmentation and normals share it"):
        Branching(TASKS, tuple(groupings), (one, one, other))
    groupings[3:] = [(0, 0, 1)] * (NUM_LAYERS - 3)
    assert Branching(TASKS, tuple(groupings), (one, one, other)).paths is not None
    with pytest.raises(ValueError, match="layer 3: segmentation and depth share it"):
        Branching(TASKS, tuple(groupings), (one, other, one))
    with pytest.raises(ValueError, match="expected 3 paths, got 2"):
        Branching(TASKS, tuple(groupings), (one, one))


GOOD = Branching.vanilla(TASKS, NUM_LAYERS, 3, SPACE.base_architecture).to_json()


@pytest.mark.parametrize(
    "junk",
    [
        {},
        {**GOOD, "tasks": None},
        {**GOOD, "tasks": 3},
        {**GOOD, "groupings": None},
        {**GOOD, "groupings": [0, 1]},
        {**GOOD, "groupings": [["x", 0, 0]]},
        {**GOOD, "groupings": [[None, 0, 0]]},
        {**GOOD, "groupings": [[0, 1, 1], [0, 0, 1]]},
        {**GOOD, "groupings": []},
        {**GOOD, "architectures": {"segmentation": {}}},
        {**GOOD, "architectures": dict.fromkeys(TASKS)},
        {**GOOD, "architectures": {task: {"blocks": 1} for task in TASKS}},
        {**GOOD, "architectures": []},
        {**GOOD, "architectures": 1},
        {k: v for k, v in GOOD.items() if k != "architectures"},
    ],
)
def test_json_that_is_no_branching_is_refused(junk):
    with pytest.raises(ValueError, match=r"\w") as caught:
        Branching.from_json(junk)
    assert "\n" not in str(caught.value)
    assert not str(caught.value).startswith("invalid literal")


def test_a_wrong_number_of_routes_is_refused():
    with pytest.raises(ValueError, match=r"\w"):
        Branching.from_routes(TASKS, [(0, 1), (0, 0)])
    with pytest.raises(ValueError, match=r"\w"):
        Branching.from_routes(TASKS, [(0, 1), (0, 0), (1,)])
