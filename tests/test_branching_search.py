"""The branching search: which step changes what, what resources weigh, exact resumption."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import CPU, FAST

from oneshot_ednas.balancing import BalancingConfig
from oneshot_ednas.checkpoint import load_checkpoint, save_checkpoint
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.models.encoder import ednas_encoder
from oneshot_ednas.relaxation import one_hot_gates
from oneshot_ednas.search import LatencyLossConfig
from oneshot_ednas.sharing.branching import Branching
from oneshot_ednas.sharing.branching_parameters import BranchingParameters
from oneshot_ednas.sharing.branching_search import BranchingConfig, BranchingSearch, mixed_macs
from oneshot_ednas.sharing.costs import latency_costs, mac_costs
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.training import LoopConfig, OptimizerConfig, training_macs

MINI = SearchSpace.from_yaml(
    """
name: mini
stem_filters: 4
blocks:
  - {stride: 1, kernel_size: 3, filters: 4, expand_ratio: 2}
  - {stride: 2, kernel_size: 3, filters: 8, expand_ratio: 2}
fusion: {tap_blocks: [1, 2], num_levels: 2, channels: 4, num_repeats: 1}
head: {num_convs: 1}
"""
)
OFTEN = LoopConfig(log_every=1, checkpoint_every=1)
SIZE = (32, 32)
KINDS = pytest.mark.parametrize("is_fixed", [True, False], ids=["fixed", "searchable"])
GATES = pytest.mark.parametrize("gates", ["soft", "hard"])


def make(tiny, *, is_fixed=True, seed=0, target=None, space=None, **settings) -> BranchingSearch:
    space = space or tiny.space
    if is_fixed:
        space = space.fix(space.base_architecture)
    channels = {name: task.out_channels for name, task in tiny.tasks.items()}
    encoder = ednas_encoder(space)
    plain = {
        "steps": 6,
        "batch_size": 4,
        "optimizer": FAST,
        "warmup_fraction": 0.34,
        "cycle_steps": 2,
    }
    macs = mac_costs(encoder, SIZE, channels)
    config = BranchingConfig(**plain | settings)
    is_latency = config.objective == "budget" or config.resource == "latency"
    return BranchingSearch(
        config,
        encoder,
        tiny.tasks,
        costs=latency_costs(space, tiny.table, channels) if is_latency else macs,
        macs=macs,
        target=target,
        splits={
            "weights": tiny.train.subset(range(16)),
            "alpha": tiny.train.subset(range(16, 24)),
        },
        augmentation=AugmentConfig(flip=True, brightness=0.2),
        seed=seed,
        device=CPU,
    )


def leaves(state, path="") -> dict:
    if isinstance(state, dict):
        pairs = state.items()
    elif isinstance(state, (list, tuple)):
        pairs = enumerate(state)
    else:
        return {path: state}
    return {k: v for key, item in pairs for k, v in leaves(item, f"{path}/{key}").items()}


def assert_same(one: BranchingSearch, other: BranchingSearch) -> None:
    a, b = leaves(one.state_dict()), leaves(other.state_dict())
    assert a.keys() == b.keys()
    assert len(a) > 100
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            if "random_state" not in name:
                assert torch.equal(value, b[name]), name
        else:
            assert value == b[name], name


def numbers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    return {n for n, p in module.named_parameters() if not torch.equal(before[n], p)}


# Steps --------------------------------------------------------------------------------------


@KINDS
def test_in_the_warm_up_each_candidate_learns_its_own_task(tiny, is_fixed):
    search = make(tiny, is_fixed=is_fixed)
    assert search.config.warmup_steps == 2
    captured = []
    original = search.network.forward
    search.network.forward = lambda images, run=None, tasks=None: (
        captured.append(original(images, run, tasks)) or captured[-1]
    )
    search.take_step(0)
    del search.network.forward
    assert captured
    for outputs in captured:
        assert list(outputs) == list(tiny.tasks)
    # Of a loss of one task alone, the other task's candidates have no gradient.
    routes = search._own_routes(1)
    assert routes.candidates == ((0,) * 6, (1,) * 6)
    batch = search._batch("weights", 1)
    for number, (name, task) in enumerate(tiny.tasks.items()):
        search.network.zero_grad(set_to_none=True)
        task.loss(search.network(batch["image"], routes)[name], batch[name]).backward()
        touched = {
            n.split(".")[2]
            for n, p in search.network.named_parameters()
            if n.startswith("layers") and p.grad is not None and bool(p.grad.any())
        }
        assert touched == {str(number)}
    assert torch.count_nonzero(search.parameters.routes) == 0
    values = search.take_step(1)
    assert values["temperature"] == 0
    assert "loss/alpha" not in values
    assert torch.count_nonzero(search.parameters.routes) == 0
    assert search.num_alpha_steps == 0
    values = search.take_step(2)
    assert "loss/alpha" in values
    assert values["temperature"] == 5.0
    assert torch.count_nonzero(search.parameters.routes) == search.parameters.routes.numel()


@KINDS
@GATES
def test_alpha_steps_change_alpha_only_and_weight_steps_weights_only(tiny, is_fixed, gates):
    search = make(tiny, is_fixed=is_fixed, gates=gates)
    search.take_step(0)
    weights, alpha = numbers(search.network), numbers(search.parameters)
    buffers = {n: b.clone() for n, b in search.network.named_buffers()}
    gradients = {n: p.grad for n, p in search.network.named_parameters()}
    search._alpha_step(3)
    assert not changed(weights, search.network)
    assert changed(alpha, search.parameters) == set(alpha)
    assert all(torch.equal(buffers[n], b) for n, b in search.network.named_buffers())
    assert all(p.grad is gradients[n] for n, p in search.network.named_parameters())
    alpha = numbers(search.parameters)
    if gates == "soft":
        search._mixed_step(3)
        expected = {n for n, p in search.network.named_parameters() if p.requires_grad}
        assert changed(weights, search.network) == expected
    else:
        search._routed_step(3, search.parameters.sample(np.random.default_rng(0), exploration=1.0))
        assert len(changed(weights, search.network)) > 20
    assert not changed(alpha, search.parameters)
    frozen = {n for n, p in search.network.named_parameters() if not p.requires_grad}
    assert frozen
    assert not changed(weights, search.network) & frozen


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_momentum_is_forgotten_after_alpha_steps(tiny, kind, monkeypatch):
    optimizer = OptimizerConfig(kind=kind, learning_rate=0.01, warmup_fraction=0.0)
    search = make(tiny, optimizer=optimizer)
    name = "exp_avg" if kind == "adam" else "momentum_buffer"

    def held() -> float:
        return sum(float(s[name].abs().sum()) for s in search.optimizer.state.values())

    search.take_step(0)
    seen = []
    for method in ("_alpha_step", "_mixed_step"):
        original = getattr(search, method)
        monkeypatch.setattr(
            search,
            method,
            lambda step, original=original, method=method: (
                seen.append((step, method, held() > 0)) or original(step)
            ),
        )
    for step in range(2, 5):
        search.take_step(step)
    # A fifth of all steps are alpha's: of two weight steps half a step, at least one.
    assert seen == [
        (2, "_alpha_step", True),
        (2, "_mixed_step", False),
        (3, "_mixed_step", True),
        (4, "_alpha_step", True),
        (4, "_mixed_step", False),
    ]
    if kind == "adam":  # the scale of the gradients stays
        assert all(bool(s["exp_avg_sq"].any()) for s in search.optimizer.state.values())


def test_cycles_hold_the_share_of_alpha_steps(tiny):
    search = make(tiny, steps=6, warmup_fraction=0.0, cycle_steps=3, alpha_share=0.4)
    found = []
    for step in range(6):
        search.take_step(step)
        found.append(search.num_alpha_steps)
    assert found == [2] * 3 + [4] * 3
    # Null is a pass over the split: 16 frames in batches of 4.
    search = make(tiny, steps=5, warmup_fraction=0.0, cycle_steps=None, alpha_share=0.2)
    for step in range(5):
        search.take_step(step)
    assert search.num_alpha_steps == 2


def test_weight_and_alpha_steps_read_their_own_split(tiny):
    search = make(tiny, warmup_fraction=0.0, steps=8, alpha_share=0.5)
    read = {"weights": set(), "alpha": set()}
    for name, split in search.splits.items():

        def batch(indices, device, rows=read[name], split=split, original=split.batch):
            rows |= set(split.indices[indices].tolist())
            return original(indices, device)

        object.__setattr__(split, "batch", batch)
    for step in range(8):
        search.take_step(step)
    assert read == {"weights": set(range(16)), "alpha": set(range(16, 24))}


def test_the_macs_of_routed_and_mixed_steps_are_counted(tiny):
    search = make(tiny, gates="hard", exploration=1.0)
    costs = search._mac_costs
    search.take_step(0)
    separate = Branching.separate(list(tiny.tasks), 6)
    one = training_macs(int(costs.of(separate) * 1e9), 4)
    assert search.macs == one
    search.macs = 0.0
    search._mixed_step(3)
    assert search.macs == training_macs(int(mixed_macs(costs, 2)), 4)
    # Two tasks run two candidates of each layer each: twice the layers of separate networks.
    once = 1e9 * costs.of(separate)
    decoders = 1e9 * costs.constant[0]
    assert mixed_macs(costs, 2) == pytest.approx(2 * (once - decoders) + decoders, rel=1e-9)


# Seeds and checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_fixed", "gates", "method"),
    [
        (True, "soft", "uncertainty"),
        (True, "hard", "fixed"),
        (False, "soft", "fixed"),
        (False, "hard", "uncertainty"),
    ],
)
def test_a_resumed_search_ends_where_an_uninterrupted_one_does(
    tiny, tmp_path, is_fixed, gates, method
):
    settings = {
        "is_fixed": is_fixed,
        "gates": gates,
        "balancing": BalancingConfig(method=method),
        "objective": "budget",
        "target": 5.0,
        "steps": 5,
    }
    whole, first = make(tiny, **settings), make(tiny, **settings)
    for step in range(5):
        whole.take_step(step)
    whole.step = 5
    for step in range(3):  # between the alpha steps of one cycle and the next
        first.take_step(step)
    first.step = 3
    save_checkpoint(tmp_path / "state", first.state_dict())
    second = make(tiny, **settings)
    torch.rand(7)
    second.resume(tmp_path / "state")
    assert_same(first, second)
    assert second.step == 3
    for step in range(3, 5):
        second.take_step(step)
    second.step = 5
    assert_same(whole, second)
    assert whole.macs > 0
    if method == "uncertainty":
        assert float(leaves(whole.state_dict())["/balancing/log_variances"].abs().sum()) > 0


def test_a_run_writes_its_log_and_goes_on_from_its_checkpoint(tiny, tmp_path):
    whole, parts = make(tiny, steps=4, loop=OFTEN), make(tiny, steps=4, loop=OFTEN)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole.run(tmp_path / "whole", tmp_path / "whole" / "state")

    class Stop(Exception):  # noqa: N818
        pass

    saves = []

    def stop_at_two() -> None:
        saves.append(None)
        if len(saves) == 2:
            raise Stop

    with pytest.raises(Stop):
        parts.run(tmp_path / "parts", tmp_path / "parts" / "state", stop_at_two)
    other = make(tiny, steps=4, loop=OFTEN)
    other.resume(tmp_path / "parts" / "state")
    assert other.step == 2
    other.run(tmp_path / "parts", tmp_path / "parts" / "state")
    assert_same(whole, other)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert logs[0].count("\n") == 4
    assert load_checkpoint(tmp_path / "whole" / "state")["step"] == 4


def test_the_same_seed_gives_the_same_search_and_another_one_another(tiny):
    searches = [make(tiny, seed=seed) for seed in (0, 0, 1)]
    for search in searches:
        for step in range(3):
            search.take_step(step)
    assert_same(searches[0], searches[1])
    assert changed(numbers(searches[0].network), searches[2].network)
    assert changed(numbers(searches[0].parameters), searches[2].parameters)


def test_states_of_something_else_are_refused(tiny):
    search = make(tiny)
    state = search.state_dict()
    with pytest.raises(ValueError, match="checkpoint has seed 0, the config 1"):
        make(tiny, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="of another network"):
        make(tiny, is_fixed=False).load_state_dict(state)
    with pytest.raises(ValueError, match="not of a search of branching"):
        search.load_state_dict(state | {"stage": "search"})
    with pytest.raises(ValueError, match="balancing"):
        make(tiny, balancing=BalancingConfig(method="uncertainty")).load_state_dict(state)


# Resources ----------------------------------------------------------------------------------


def test_the_more_resources_weigh_the_cheaper_the_search_ends(tiny):
    """With lambda 0 tasks tend apart; the warm-up has taught each candidate its own task."""
    ends = []
    for weight in (0.0, 0.02, 0.5, 100.0):
        search = make(
            tiny,
            space=MINI,
            steps=8,
            warmup_fraction=0.5,
            cycle_steps=4,
            alpha_share=0.9,
            resource_weight=weight,
            alpha_learning_rate=0.1,
            alpha_weight_decay=0.0,
        )
        start = float(search.expected_cost().detach())
        for step in range(8):
            values = search.take_step(step)
        assert search.num_alpha_steps == 36
        ends.append(float(values["cost/expected"]))
    # Adam takes steps of one size however large lambda is: two that share all end side by side.
    room = 0.02 * search.shared_cost
    assert all(after <= before + room for before, after in pairwise(ends)), ends
    assert ends[0] > ends[2] + 10 * room
    assert ends[0] > start
    # Fully shared at the most probable candidates, at the cost that lambda counts in.
    shared = search.parameters.argmax().branching(list(tiny.tasks))
    assert shared.num_groups == (1,) * 4
    assert search.costs.of(shared) == pytest.approx(search.shared_cost)
    assert ends[-1] - search.shared_cost < 0.5 * (start - search.shared_cost)


@KINDS
def test_the_gradient_of_the_cost_is_that_of_the_objective(tiny, is_fixed):
    search = make(tiny, is_fixed=is_fixed, resource_weight=2.0)
    term, weight = search._cost_term(search.expected_cost(), 5)
    assert weight == 2.0
    expected = float(search.expected_cost().detach()) / search.shared_cost
    assert float(term.detach()) == pytest.approx(expected, rel=1e-6)
    search = make(tiny, is_fixed=is_fixed, objective="budget", target=4.0)
    search.mu = 0.7
    term, weight = search._cost_term(search.expected_cost(), 5)
    assert weight == 0.7
    assert float(term.detach()) == pytest.approx(
        math.log(float(search.expected_cost().detach()) / 4.0), rel=1e-5
    )
    above = make(tiny, is_fixed=is_fixed, objective="budget", target=100.0)
    assert float(above._cost_term(above.expected_cost(), 5)[0].detach()) == 0


def test_a_dual_weight_rises_above_the_target_and_falls_below(tiny):
    for target, sign in ((4.0, 1), (100.0, -1)):
        search = make(tiny, objective="budget", target=target, warmup_fraction=0.0)
        before = search.mu
        search._alpha_step(5)  # the target has come down by the end
        assert (search.mu - before) * sign > 0


def test_a_ramp_starts_at_nothing(tiny):
    latency = LatencyLossConfig(schedule="ramp", weight=2.0)
    search = make(
        tiny, objective="budget", target=4.0, latency=latency, warmup_fraction=0.0, cycle_steps=1
    )
    found = []
    for step in range(6):
        search.take_step(step)
        found.append(search.mu)
    assert found == pytest.approx([0.0, 0.8, 1.6, 2.0, 2.0, 2.0])


# Parameters ---------------------------------------------------------------------------------


def test_draws_follow_alpha_except_for_the_exploration(tiny):
    parameters = BranchingParameters(ednas_encoder(tiny.space), 2)
    generator = np.random.default_rng(0)
    best = tiny.space.sample(generator)
    with torch.no_grad():
        parameters.routes[0, :, 1] = 30.0
        parameters.routes[1, :, 0] = 30.0
        for one in parameters.candidates:
            rows = torch.tensor(tiny.space.encode(best)).view(-1, 1)
            one.logits[one.index.gather(1, rows).view(-1)] = 30.0
    sure = {parameters.sample(generator, exploration=0.0) for _ in range(10)}
    assert sure == {parameters.argmax()}
    assert parameters.argmax().candidates == ((1,) * 6, (0,) * 6)
    assert parameters.argmax().options == (best, best)
    many = [parameters.sample(generator, exploration=0.5) for _ in range(400)]
    share = np.mean([np.array(one.candidates)[0] == 1 for one in many])
    assert share == pytest.approx(0.75, abs=0.03)
    gates = one_hot_gates(tiny.space, best)
    for block, own in zip(parameters.probabilities().options[0], gates, strict=True):
        for p, q in zip(block, own, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_entropy_is_that_of_all_choices(tiny):
    parameters = BranchingParameters(ednas_encoder(tiny.space), 2)
    choices = sum(math.log(len(choice.options)) for choice in tiny.space.choices)
    assert parameters.max_entropy == pytest.approx(2 * 6 * math.log(2) + 2 * choices)
    assert float(parameters.entropy().detach()) == pytest.approx(parameters.max_entropy, rel=1e-6)
    with torch.no_grad():
        parameters.routes[..., 0] = 50.0
    assert float(parameters.entropy().detach()) == pytest.approx(2 * choices, rel=1e-6)


def test_hard_gates_are_one_hot(tiny):
    parameters = BranchingParameters(ednas_encoder(tiny.space), 2)
    gates = parameters.gates(1.0, hard=True, generator=torch.Generator().manual_seed(0))
    assert set(gates.routes.unique().tolist()) == {0.0, 1.0}
    assert bool((gates.routes.sum(-1) == 1).all())
    soft = parameters.gates(1.0, generator=torch.Generator().manual_seed(0))
    assert bool((soft.routes > 0).all())
    assert torch.equal(soft.routes.argmax(-1), gates.routes.argmax(-1))


# Refusals and alarms ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resource_weight": -1.0}, "lambda.*got -1.0"),
        ({"resource_weight": math.nan}, "lambda.*got nan"),
        ({"resource_weight": math.inf}, "lambda.*got inf"),
        ({"splits": {"weights": 0.5, "alpha": 0.5}}, "splits: expected"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_candidates": 0}, "num_candidates"),
        ({"cycle_steps": 0}, "cycle_steps: expected at least 1 or null"),
        ({"warmup_fraction": 1.0}, "warmup_fraction"),
        ({"warmup_fraction": -0.1}, "warmup_fraction"),
        ({"exploration": 1.1}, "exploration"),
        ({"alpha_share": 0.0}, "alpha_share: expected above 0"),
        ({"alpha_share": 1.0}, "alpha_share.*got 1.0"),
        ({"alpha_learning_rate": 0.0}, "alpha_learning_rate > 0"),
        ({"alpha_weight_decay": -1.0}, "alpha_weight_decay >= 0"),
    ],
    ids=str,
)
def test_configs_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BranchingConfig(**{"steps": 10, "batch_size": 4} | settings)


def test_a_budget_needs_a_target(tiny):
    with pytest.raises(ValueError, match="objective budget needs a latency target"):
        make(tiny, objective="budget")


@pytest.mark.parametrize("gates", ["soft", "hard"])
@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_loss_that_is_not_finite_stops_the_search(tiny, gates, step):
    search = make(tiny, gates=gates)
    with torch.no_grad():
        next(search.network.decoders["depth"].parameters()).fill_(math.nan)
    weights, alpha = numbers(search.network), numbers(search.parameters)
    mu = search.mu
    search.take_step(step)
    search.guard.max_skipped = 0
    with pytest.raises(RuntimeError, match=f"branching step {step}.*: the loss of depth"):
        search.guard.read()
    assert search.mu == mu
    found = changed(weights, search.network)  # a number that is none equals nothing
    assert len(found) == 1
    assert all(name.startswith("decoders.depth") for name in found)
    assert not changed(alpha, search.parameters)


def test_alarms_tell_of_an_undecided_alpha_and_a_missed_target(tiny):
    search = make(tiny, objective="budget", target=5.0)
    expected = float(search.expected_cost().detach())
    search.target = expected / 1.2
    assert search.alarms() == []  # before the end nothing is known
    search.step = search.config.steps
    uniform, above = search.alarms()
    assert "almost uniform" in uniform
    assert f"E[cost] {expected:.3g} ms ends above the target {search.target:.3g}" in above
    search.target = expected
    assert len(search.alarms()) == 1
    with torch.no_grad():
        search.parameters.routes[..., 0] = 20.0
    assert search.alarms() == []
