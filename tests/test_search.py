"""The one-shot search: which step changes what, schedules, alarms, and exact resumption."""

import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from tiny import CPU, FAST, SIZE, TARGET_MS

from oneshot_ednas.balancing import BalancingConfig
from oneshot_ednas.checkpoint import load_checkpoint, previous_checkpoint, save_checkpoint
from oneshot_ednas.config import load_config
from oneshot_ednas.data.order import split_indices
from oneshot_ednas.latency.operations import network_macs, relaxed_macs
from oneshot_ednas.models.blocks import SharingConfig
from oneshot_ednas.relaxation import largest_gates
from oneshot_ednas.search import (
    LatencyLossConfig,
    OneShotSearch,
    SearchConfig,
    check_target,
    resume_search,
)
from oneshot_ednas.training import Interrupted, LoopConfig, task_losses, weighted_sum

OFTEN = LoopConfig(log_every=1, checkpoint_every=1, max_skipped=0)


def no_validation() -> tuple[dict[str, float], float]:
    return {}, 0.0


def run(search: OneShotSearch, folder) -> OneShotSearch:
    search.run(folder, folder / "search.safetensors", no_validation)
    return search


def tensors(state) -> dict[str, torch.Tensor]:
    """Every tensor and number of a nested state, by path."""
    if isinstance(state, torch.Tensor):
        return {"": state}
    if isinstance(state, dict):
        pairs = state.items()
    elif isinstance(state, (list, tuple)):
        pairs = enumerate(state)
    else:
        return {"": torch.tensor(hash(state))}
    return {f"{key}/{path}": leaf for key, item in pairs for path, leaf in tensors(item).items()}


def differences(one: OneShotSearch, other: OneShotSearch) -> list[str]:
    a, b = tensors(one.state_dict()), tensors(other.state_dict())
    ours = [name for name in a.keys() | b.keys() if not name.startswith("torch_random_state")]
    assert len(ours) > 100
    return [n for n in ours if n not in a or n not in b or not torch.equal(a[n], b[n])]


def weights_of(search: OneShotSearch) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in search.supernet.named_parameters()}


def changed(before: dict[str, torch.Tensor], search: OneShotSearch) -> int:
    return sum(not torch.equal(before[n], p) for n, p in search.supernet.named_parameters())


# Steps --------------------------------------------------------------------------------------


def test_warm_up_trains_weights_and_leaves_alpha_alone(tiny, tmp_path):
    search = tiny.search(steps=4, warmup_fraction=0.75, loop=OFTEN)
    before = weights_of(search)
    for step in range(3):
        values = search.take_step(step)
        assert values["temperature"] == 0
        assert values["latency/expected_ms"] > 0
        assert "loss/alpha" not in values
    assert changed(before, search) > 20
    assert torch.count_nonzero(search.alpha.logits) == 0
    assert not search.alpha_optimizer.state_dict()["state"]
    values = search.take_step(3)
    assert values["temperature"] == 5.0
    assert torch.count_nonzero(search.alpha.logits) == len(search.alpha.logits)


def test_a_weight_step_changes_weights_only(tiny):
    search = tiny.search()
    before, alpha = weights_of(search), search.alpha.logits.detach().clone()
    search._weight_step(0, uniform=False)
    assert changed(before, search) > 20
    assert torch.equal(alpha, search.alpha.logits)
    assert search.alpha.logits.grad is None


@pytest.mark.parametrize("gates", ["hard", "soft"])
def test_an_alpha_step_changes_alpha_only(tiny, gates):
    search = tiny.search(gates=gates)
    search._weight_step(0, uniform=True)
    before = weights_of(search)
    buffers = {name: b.clone() for name, b in search.supernet.named_buffers()}
    gradients = [p.grad for p in search.supernet.parameters()]
    copies = [None if gradient is None else gradient.clone() for gradient in gradients]
    optimizer = tensors(search.optimizer.state_dict())
    search._alpha_step(5)
    assert changed(before, search) == 0
    assert torch.count_nonzero(search.alpha.logits) == len(search.alpha.logits)
    assert all(torch.equal(buffers[n], b) for n, b in search.supernet.named_buffers())
    for parameter, gradient, copy in zip(
        search.supernet.parameters(), gradients, copies, strict=True
    ):
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, copy)
    after = tensors(search.optimizer.state_dict())
    assert all(torch.equal(optimizer[name], after[name]) for name in optimizer)


def test_a_joint_step_changes_both_and_sees_both_splits(tiny, monkeypatch):
    search = tiny.search(mode="joint", warmup_fraction=0.0)
    asked, original = [], search._batch
    monkeypatch.setattr(search, "_batch", lambda *a: asked.append(a) or original(*a))
    before = weights_of(search)
    values = search.take_step(0)
    assert asked == [("weights", 0), ("alpha", 0)]
    assert changed(before, search) > 20
    assert torch.count_nonzero(search.alpha.logits) == len(search.alpha.logits)
    assert {"loss/weights", "loss/depth", "latency/mu", "temperature"} <= values.keys()


def test_alpha_steps_come_every_so_many_weight_steps(tiny):
    search = tiny.search(steps=8, warmup_fraction=0.25, alpha_every=3)
    values = [search.take_step(step) for step in range(8)]
    assert [step for step in range(8) if "loss/alpha" in values[step]] == [3, 6]
    assert [value["temperature"] > 0 for value in values] == [False] * 2 + [True] * 6


def test_weight_and_alpha_steps_read_their_own_split(tiny, monkeypatch):
    search = tiny.search(warmup_fraction=0.0)
    read = {"weights": set(), "alpha": set()}
    for name, split in search.splits.items():
        rows, original = read[name], split.batch

        def batch(indices, device, rows=rows, split=split, original=original):
            rows |= set(split.indices[indices].tolist())
            return original(indices, device)

        object.__setattr__(split, "batch", batch)
    for step in range(8):
        search.take_step(step)
    assert read["weights"] == set(range(16))
    assert read["alpha"] == set(range(16, 24))


def test_the_splits_of_a_config_are_disjoint_and_hold_every_frame():
    parts = split_indices(50, SearchConfig(steps=1, batch_size=1).splits, 7)
    assert [len(part) for part in parts.values()] == [30, 12, 8]
    assert sorted(frame for part in parts.values() for frame in part) == list(range(50))
    assert parts == split_indices(50, SearchConfig(steps=1, batch_size=1).splits, 7)
    assert parts != split_indices(50, SearchConfig(steps=1, batch_size=1).splits, 8)


def test_macs_are_those_of_every_network_that_was_run(tiny):
    def cost(forward: int, frames: int) -> float:
        return 3.0 * forward * frames  # forward, and backward to inputs and to weights

    channels = {"segmentation": 10, "depth": 1}
    relaxed = relaxed_macs(tiny.space, SIZE, channels)
    for settings in ({}, {"sandwich": True, "num_paths": 2}, {"mode": "joint"}):
        search = tiny.search(steps=3, warmup_fraction=0.34, **settings)
        trained = []
        original = search._count
        search._count = lambda a, original=original, trained=trained: (
            trained.append(a) or original(a)
        )
        search.take_step(0)
        runs = 4 if "sandwich" in settings else 1
        assert len(trained) == runs
        expected = sum(cost(network_macs(tiny.space, a, SIZE, channels), 4) for a in trained)
        assert search.macs == expected
        search.take_step(1)
        if "mode" in settings:
            expected += cost(relaxed, 8)  # both batches at once
        else:
            assert len(trained) == 2 * runs
            expected += cost(relaxed, 4)
            for architecture in trained[runs:]:
                expected += cost(network_macs(tiny.space, architecture, SIZE, channels), 4)
        assert search.macs == expected


def test_the_cost_of_a_checkpoint_that_did_not_count_is_unknown(tiny, tmp_path):
    search, path = tiny.search(), tmp_path / "search.safetensors"
    search.take_step(0)
    save_checkpoint(path, search.state_dict())
    other = tiny.search()
    resume_search(other, path)
    assert other.macs == search.macs > 0
    state = search.state_dict()
    del state["macs"]
    save_checkpoint(path, state)
    resume_search(other, path)
    assert math.isnan(other.macs)
    assert differences(search, other) == ["macs/"]


# Architectures of weight steps --------------------------------------------------------------


@pytest.mark.parametrize("num_paths", [1, 3])
def test_fair_paths_hold_every_option_equally_often(tiny, num_paths):
    search = tiny.search(path_sampling="fair", num_paths=num_paths)
    period = math.lcm(*(len(choice.options) for choice in tiny.space.choices))
    steps = 6 * period
    drawn = [path for step in range(steps) for path in search.sample_paths(step, uniform=True)]
    assert len(drawn) == steps * num_paths
    rows = np.array([tiny.space.encode(path) for path in drawn])
    orders = set()
    for position, choice in enumerate(tiny.space.choices):
        count = len(choice.options)
        deals = rows[:, position].reshape(-1, count)
        assert (np.sort(deals, axis=1) == np.arange(count)).all(), choice.name
        orders |= {(count, tuple(deal)) for deal in deals.tolist()}
    assert len(orders) >= 6  # shuffled anew, not one order for all
    again = tiny.search(path_sampling="fair", num_paths=num_paths)
    assert again.sample_paths(5, uniform=True) == search.sample_paths(5, uniform=True)
    other = tiny.search(path_sampling="fair", num_paths=num_paths, seed=1)
    assert other.sample_paths(5, uniform=True) != search.sample_paths(5, uniform=True)


def test_after_the_warm_up_the_uniform_share_is_dealt_fairly(tiny):
    search = tiny.search(path_sampling="fair", exploration=1.0)
    for step in range(4):
        dealt = search.sample_paths(step, uniform=True)
        assert search.sample_paths(step, uniform=False) == dealt
    # Half the options come from the deal, half from an alpha that is sure of the first option.
    search = tiny.search(path_sampling="fair", exploration=0.5)
    with torch.no_grad():
        search.alpha.logits[search.alpha.index[:, 0]] = 30.0
    differs = total = 0
    for step in range(200):
        (path,) = search.sample_paths(step, uniform=False)
        (dealt,) = search.sample_paths(step, uniform=True)
        pairs = zip(tiny.space.encode(path), tiny.space.encode(dealt), strict=True)
        for own, of_deal in pairs:
            assert own in (0, of_deal)
            if of_deal:
                total, differs = total + 1, differs + (own == 0)
    assert differs / total == pytest.approx(0.5, abs=0.05)


def test_several_paths_move_the_weights_by_their_mean_gradient(tiny):
    search = tiny.search(num_paths=3, optimizer=dataclasses.replace(FAST, clip_grad_norm=1e9))
    paths = search.sample_paths(0, uniform=True)
    assert len(set(paths)) == 3
    assert tiny.search().sample_paths(0, uniform=True) == paths[:1]
    gradients = []
    for path in paths:
        search.supernet.zero_grad()
        batch = search._batch("weights", 0)
        losses = task_losses(search.tasks, search.supernet(batch["image"], path), batch)
        weighted_sum(search.balancing.weights(), losses).backward()
        gradients.append(
            {n: p.grad for n, p in search.supernet.named_parameters() if p.grad is not None}
        )
        for parameter in search.supernet.parameters():
            parameter.grad = None
    search._weight_step(0, uniform=True)
    for name, parameter in search.supernet.named_parameters():
        of_paths = [g[name] for g in gradients if name in g]
        if not of_paths:
            assert parameter.grad is None
            continue
        torch.testing.assert_close(parameter.grad, sum(of_paths) / 3, rtol=1e-4, atol=1e-6)


def test_options_are_counted_as_they_are_trained(tiny):
    search = tiny.search(warmup_fraction=0.0)
    drawn = [search.sample_paths(step, uniform=False)[0] for step in range(3)]
    for step in range(3):
        search.take_step(step)
    start = 0
    for position, choice in enumerate(tiny.space.choices):
        counts = search.sampled[start : start + len(choice.options)].tolist()
        start += len(choice.options)
        picked = [tiny.space.encode(architecture)[position] for architecture in drawn]
        assert counts == [picked.count(i) for i in range(len(choice.options))], choice.name
    assert start == len(search.sampled)


def test_paths_follow_alpha_except_for_the_exploration(tiny):
    search = tiny.search(exploration=0.0)
    best = tiny.space.sample(np.random.default_rng(0))
    rows = torch.tensor(tiny.space.encode(best)).view(-1, 1)
    with torch.no_grad():
        search.alpha.logits[search.alpha.index.gather(1, rows).view(-1)] = 30.0
    assert {search.sample_paths(step, uniform=False)[0] for step in range(10)} == {best}
    assert len({search.sample_paths(step, uniform=True)[0] for step in range(10)}) > 5
    explorer = tiny.search(exploration=1.0)
    explorer.alpha.load_state_dict(search.alpha.state_dict())
    assert len({explorer.sample_paths(step, uniform=False)[0] for step in range(10)}) > 5


def test_the_sandwich_s_extremes_keep_the_ops_of_the_path(tiny):
    search = tiny.search()
    path = tiny.space.sample(np.random.default_rng(1))
    for largest, pick in ((True, max), (False, min)):
        for spec, block, own in zip(
            tiny.space.blocks,
            search.space.extreme(path, largest=largest).blocks,
            path.blocks,
            strict=True,
        ):
            assert block.op == own.op
            for field in ("kernel_size", "expand_ratio", "filters"):
                assert getattr(block, field) == pick(spec.options(field))


def test_sandwich_and_distillation_train_three_networks_a_step(tiny):
    runs = {}
    for name, settings in {
        "plain": {},
        "sandwich": {"sandwich": True},
        "distilled": {"sandwich": True, "distillation": True},
    }.items():
        search = tiny.search(**settings)
        values = [search.take_step(step) for step in range(2)]
        assert all(math.isfinite(float(v)) for row in values for v in row.values())
        runs[name] = search
        assert search.sampled.sum() == 2 * (1 if name == "plain" else 3) * len(tiny.space.choices)
    assert "supernet/heads.depth.classifier.weight/" in differences(
        runs["sandwich"], runs["distilled"]
    )


def test_distillation_uses_the_largest_as_teacher_in_place_of_the_labels(tiny, monkeypatch):
    search = tiny.search(sandwich=True, distillation=True)
    calls = []
    task = type(search.tasks["depth"])
    for name in ("loss", "distillation_loss"):
        original = getattr(task, name)

        def spy(self, output, other, name=name, original=original):
            calls.append((name, other.requires_grad))
            return original(self, output, other)

        monkeypatch.setattr(task, name, spy)
    search._weight_step(0, uniform=True)
    assert calls == [("loss", False)] * 2 + [("distillation_loss", False)] * 4


# The latency term ---------------------------------------------------------------------------


def updates(search: OneShotSearch, count: int, *, after: int = 0) -> list[dict]:
    """Alpha updates whose task losses are constant: only the latency term acts."""
    flat = torch.zeros_like(search.alpha.logits)
    first = search.config.warmup_steps + after
    return [search._alpha_update(first + step, flat, {}, str) for step in range(count)]


def test_the_dual_variable_rises_above_the_target_and_falls_below_it(tiny):
    for target_ms, sign in ((4.5, 1), (5.6, -1)):
        search = tiny.search(target_ms=target_ms, latency=LatencyLossConfig(dual_rate=0.1))
        ratio = math.log(float(search.expected_latency().detach()) / target_ms)
        assert math.copysign(1, ratio) == sign
        values = updates(search, 1)[0]
        assert search.mu == values["latency/mu"]
        assert float(search.mu) == pytest.approx(1.0 + 0.1 * ratio)


def test_the_dual_variable_stays_at_zero_or_above(tiny):
    latency = LatencyLossConfig(weight=0.001, dual_rate=10.0)
    search = tiny.search(target_ms=5.6, latency=latency)
    assert updates(search, 1)[0]["latency/mu"] == 0.0


def test_a_ramp_rises_over_the_first_half_and_a_fixed_weight_stays(tiny):
    settings = {"steps": 10, "warmup_fraction": 0.1}
    ramp = tiny.search(latency=LatencyLossConfig(schedule="ramp", weight=2.0), **settings)
    assert ramp.mu == 0.0
    mu = [float(updates(ramp, 1, after=step)[0]["latency/mu"]) for step in range(9)]
    assert mu == pytest.approx([0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0])
    fixed = tiny.search(latency=LatencyLossConfig(schedule="fixed", weight=2.0), **settings)
    assert {float(values["latency/mu"]) for values in updates(fixed, 9)} == {2.0}


@pytest.mark.parametrize("schedule", ["dual", "fixed"])
def test_the_latency_term_alone_brings_the_expected_latency_below_the_target(tiny, schedule):
    search = tiny.search(
        steps=1000,
        target_ms=4.7,
        alpha_learning_rate=0.05,
        latency=LatencyLossConfig(schedule=schedule),
    )
    path = [float(values["latency/expected_ms"]) for values in updates(search, 100)]
    assert path[0] > 5.0
    assert max(path[20:]) <= 4.7  # Adam's momentum goes on for a while, then it is left there
    assert min(path) > 4.5


def test_dual_ascent_meets_the_target_against_a_task_that_wants_a_slow_network(tiny):
    ends = {}
    for schedule in ("dual", "fixed"):
        search = tiny.search(
            steps=1000,
            target_ms=4.8,
            alpha_learning_rate=0.05,
            latency=LatencyLossConfig(schedule=schedule, dual_rate=0.5),
        )
        for step in range(250, 500):
            gain = 1.5 * search.expected_latency().log()
            (task_gradient,) = torch.autograd.grad(-gain, search.alpha.logits)
            values = search._alpha_update(step, task_gradient, {}, str)
        ends[schedule] = float(values["latency/expected_ms"])
    assert ends["fixed"] > 5.4
    assert ends["dual"] == pytest.approx(4.8, rel=0.02)


def test_below_the_target_the_latency_term_is_silent(tiny):
    search = tiny.search(target_ms=5.7, alpha_weight_decay=0.0)
    updates(search, 3)
    assert torch.count_nonzero(search.alpha.logits) == 0


def test_the_latency_gradient_is_that_of_mu_times_the_log_ratio(tiny):
    search = tiny.search(target_ms=4.5, alpha_weight_decay=0.0)
    task = torch.randn(search.alpha.logits.shape, generator=torch.Generator().manual_seed(0))
    loss = search.mu * (search.expected_latency() / 4.5).log()
    (expected,) = torch.autograd.grad(loss, search.alpha.logits)
    values = search._alpha_update(4, task, {}, str)
    torch.testing.assert_close(search.alpha.logits.grad, task + expected)
    ratio = float(expected.norm() / task.norm())
    assert float(values["alpha/latency_to_task_gradient"]) == pytest.approx(ratio, rel=1e-5)


def test_a_target_below_the_minimum_is_refused_with_both_figures(tiny):
    costs = tiny.table.costs(tiny.space, {"segmentation": 10, "depth": 1})
    message = f"is 4 ms, below the minimum of space small: {costs.min_latency_ms:.4g} ms"
    with pytest.raises(ValueError, match=message):
        tiny.search(target_ms=4.0)
    channels = {"segmentation": 10, "depth": 1}
    check_target(tiny.table, tiny.space, channels, costs.min_latency_ms)
    for wrong in (math.nextafter(costs.min_latency_ms, 0), math.nan):
        with pytest.raises(ValueError, match="below the minimum"):
            check_target(tiny.table, tiny.space, channels, wrong)


# Reproducibility ----------------------------------------------------------------------------

MODES = {
    "alternating": {},
    "joint": {"mode": "joint", "latency": LatencyLossConfig(schedule="ramp")},
    "sandwich": {"sandwich": True, "distillation": True, "alpha_every": 2},
    "fair": {"path_sampling": "fair", "num_paths": 2},
    "uncertainty": {"sandwich": True, "balancing": BalancingConfig(method="uncertainty")},
    "dwa": {"batch_size": 8, "balancing": BalancingConfig(method="dwa")},
    "dwa joint": {"mode": "joint", "batch_size": 8, "balancing": BalancingConfig(method="dwa")},
    "own": {"sharing": SharingConfig(bn_affine="per_width", kernel_transform=True)},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(tiny, tmp_path, mode):
    # Interrupted twice: in the warm-up (steps 0 and 1) and after it.
    settings = {"steps": 6, "warmup_fraction": 0.4, "loop": OFTEN} | MODES[mode]
    (tmp_path / "whole").mkdir()
    whole = run(tiny.search(**settings), tmp_path / "whole")

    checkpoint = tmp_path / "search.safetensors"
    for stop_after in (1, 4, None):
        torch.manual_seed(99)  # a new process has another global state
        search = tiny.search(**settings)
        resume_search(search, checkpoint)
        take_step = search.take_step

        def interrupted(step, take_step=take_step, stop_after=stop_after):
            if stop_after is not None and step == stop_after - 1:
                os.kill(os.getpid(), signal.SIGINT)
            return take_step(step)

        search.take_step = interrupted
        if stop_after is None:
            run(search, tmp_path)
        else:
            with pytest.raises(Interrupted, match=f"stopped after step {stop_after} of 6"):
                run(search, tmp_path)
            assert load_checkpoint(checkpoint)["step"] == stop_after

    assert search.step == whole.step == 6
    assert differences(whole, search) == []
    logs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "whole", tmp_path)
    ]
    assert logs[0] == logs[1]


def test_validation_is_logged_and_leaves_no_trace(tiny, tmp_path):
    searches = []
    for count in (0, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        search = tiny.search(num_validations=count, steps=5, warmup_fraction=0.4, loop=OFTEN)

        def validate(search=search):
            search.supernet.eval()
            return {"validation/reward": float(search.step)}, 1e5

        search.run(folder, folder / "search.safetensors", validate)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        scores = [line["validation/reward"] for line in lines if "validation/reward" in line]
        assert scores == ([] if count == 0 else [3.0, 5.0])
        searches.append(search)
    assert differences(*searches) == ["macs/"]
    assert searches[1].macs == searches[0].macs + 2e5


def test_the_same_seed_gives_the_same_search_and_another_seed_another(tiny, tmp_path):
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(found))
        search = tiny.search(seed=seed, steps=2, warmup_fraction=0.0)
        for step in range(2):
            search.take_step(step)
        found.append(search)
    assert differences(found[0], found[1]) == []
    assert {"alpha/logits/", "sampled/"} < set(differences(found[0], found[2]))


def test_building_a_search_leaves_the_global_random_state_alone(tiny):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    tiny.search()
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_of_another_seed_or_space_is_refused(tiny, tmp_path):
    path = tmp_path / "search.safetensors"
    save_checkpoint(path, tiny.search(seed=1).state_dict())
    with pytest.raises(ValueError, match="checkpoint has seed 1, the config 2"):
        resume_search(tiny.search(seed=2), path)
    save_checkpoint(path, {"stage": "retrain", "step": 3})
    with pytest.raises(ValueError, match="the checkpoint is of retrain, not of a search"):
        resume_search(tiny.search(seed=2), path)
    state = tiny.search(seed=1).state_dict()
    del state["supernet"]["heads.depth.classifier.weight"]
    save_checkpoint(path, state)
    with pytest.raises(ValueError, match="checkpoint is of another network"):
        resume_search(tiny.search(seed=1), path)
    resume_search(tiny.search(), tmp_path / "none.safetensors")


def test_a_damaged_checkpoint_is_refused_with_a_cure(tiny, tmp_path):
    path = tmp_path / "search.safetensors"
    save_checkpoint(path, tiny.search().state_dict())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"checkpoint is damaged .*; delete it to start"):
        resume_search(tiny.search(), path)


# Failures and alarms ------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_the_last_checkpoint_stays(tiny, tmp_path):
    search = tiny.search(steps=6, loop=OFTEN)
    path, take_step = tmp_path / "search.safetensors", search.take_step
    drawn = search.sample_paths(3, uniform=False)[0]

    def poisoned(step):
        if step == 3:
            with torch.no_grad():
                search.supernet.heads["depth"].classifier.weight[0, 0] = math.nan
        return take_step(step)

    search.take_step = poisoned
    with pytest.raises(RuntimeError, match="search step 3: the loss of depth is not finite") as e:
        run(search, tmp_path)
    assert "search ended: its last checkpoint is kept, of 3 steps" in str(e.value)
    assert f"architecture {drawn}" in str(e.value)
    state = load_checkpoint(path)
    assert state["step"] == 3
    assert all(torch.isfinite(v).all() for v in state["supernet"].values())
    assert previous_checkpoint(path).exists()


@pytest.mark.parametrize("mode", ["alternating", "joint"])
def test_a_gradient_that_is_not_finite_never_reaches_weights_or_alpha(tiny, monkeypatch, mode):
    search = tiny.search(warmup_fraction=0.0, mode=mode, loop=OFTEN)
    before, alpha = weights_of(search), search.alpha.logits.detach().clone()
    mu = float(search.mu)

    def losses(tasks, outputs, batch):
        # Finite, but with an infinite slope, as a careless square root of zero has.
        return {name: (output.sum() * 0).abs().sqrt() for name, output in outputs.items()}

    monkeypatch.setattr("oneshot_ednas.search.task_losses", losses)
    search.take_step(0)
    with pytest.raises(
        RuntimeError, match=r"search step 0.*the gradient is not finite, architecture"
    ):
        search.guard.read()
    assert changed(before, search) == 0
    assert torch.equal(alpha, search.alpha.logits)
    assert float(search.mu) == mu


def test_a_skipped_step_is_counted_logged_and_told_and_the_search_goes_on(tiny, tmp_path):
    loop = dataclasses.replace(OFTEN, max_skipped=1)
    search = tiny.search(steps=6, loop=loop)
    weight_step = search._weight_step

    def careless(step, *, uniform):
        if step != 3:
            return weight_step(step, uniform=uniform)
        before = weights_of(search)
        bias = search.supernet.heads["depth"].classifier.bias
        kept = bias.detach().clone()
        with torch.no_grad():
            bias.fill_(math.nan)
        values = weight_step(step, uniform=uniform)
        with torch.no_grad():
            bias.copy_(kept)
        assert changed(before, search) == 0
        return values

    search._weight_step = careless
    run(search, tmp_path)
    assert search.step == 6
    assert search.guard.num_skipped == 1
    assert load_checkpoint(tmp_path / "search.safetensors")["num_skipped"] == 1
    assert any(alarm.startswith("1 steps were skipped") for alarm in search.alarms())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    skipped = [line.get("skipped_steps") for line in lines if "loss/weights" in line]
    assert skipped == [None] * 3 + [1.0] * 3


def test_an_untrained_search_has_no_alarm_but_untrained_options(tiny):
    search = tiny.search(steps=10)
    assert [alarm.split(";")[0] for alarm in search.alarms()] == [
        f"{len(search.sampled)} of {len(search.sampled)} options were never trained"
    ]
    search.sampled += 1
    assert search.alarms() == []


def test_alarms_name_a_uniform_a_collapsed_and_an_over_budget_alpha(tiny):
    search = tiny.search(steps=10, target_ms=4.4)
    search.sampled += 1
    search.step = 10
    uniform, over = search.alarms()
    assert uniform.startswith("alpha is still almost uniform (entropy")
    assert over.startswith("E[latency] ")
    assert "ends above the target 4.4 ms; raise latency.weight" in over

    search = tiny.search(steps=10, target_ms=5.7)
    search.sampled += 1
    with torch.no_grad():
        search.alpha.logits.copy_(30 * torch.eye(len(search.sampled))[0])
        search.alpha.logits[search.alpha.index[:, 0]] = 30.0
    search.step = 10
    assert search.alarms() == []


def test_a_choice_that_is_decided_in_the_first_half_is_noted_and_kept(tiny, tmp_path):
    settings = {"steps": 8, "warmup_fraction": 0.25, "loop": OFTEN}
    search = tiny.search(**settings)
    with torch.no_grad():
        search.alpha.logits[search.alpha.index[1, 0]] = 30.0
    for search.step in range(8):
        search.take_step(search.step)
    name = tiny.space.choices[1].name
    assert search.collapsed == {name: 2}
    resumed = tiny.search(**settings)
    save_checkpoint(tmp_path / "search.safetensors", search.state_dict())
    resume_search(resumed, tmp_path / "search.safetensors")
    resumed.sampled += 1
    assert any(f"1 of {len(tiny.space.choices)} choices collapsed" in a for a in resumed.alarms())
    late = tiny.search(**settings)
    with torch.no_grad():
        late.alpha.logits[late.alpha.index[1, 0]] = 30.0
    late.take_step(7)
    assert late.collapsed == {}


@pytest.mark.parametrize("mode", ["alternating", "joint"])
def test_a_bad_alpha_step_names_the_architecture_that_was_drawn(tiny, mode):
    search = tiny.search(mode=mode, warmup_fraction=0.0, loop=OFTEN)
    gates = search._gates(3)
    with torch.no_grad():
        search.supernet.heads["depth"].classifier.bias.fill_(torch.nan)
    step = search._alpha_step if mode == "alternating" else search._joint_step
    drawn = str(largest_gates(tiny.space, gates))
    assert drawn != str(search.alpha.argmax())
    step(3)
    with pytest.raises(RuntimeError, match=f"step 3 .*depth is not finite, architecture {drawn};"):
        search.guard.read()


def test_joint_mode_counts_what_it_trains(tiny):
    search = tiny.search(mode="joint", warmup_fraction=0.0)
    for step in range(3):
        search.take_step(step)
    assert int(search.sampled.sum()) == 3 * len(tiny.space.choices)


def test_one_network_is_nothing_to_search(tiny):
    fixed = dataclasses.replace(tiny, space=tiny.space.fix(tiny.space.base_architecture))
    with pytest.raises(ValueError, match="space small is one network: there is nothing to search"):
        fixed.search()


def test_a_search_writes_its_log_and_the_text_of_the_bar(tiny, tmp_path):
    search = run(tiny.search(steps=4, warmup_fraction=0.5, loop=OFTEN), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("stage") == "search" for line in lines)
    lines = [line for line in lines if "loss/weights" in line]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert {"latency/expected_ms", "latency/mu", "alpha/entropy"} <= lines[0].keys()
    assert {"loss/alpha", "alpha/latency_to_task_gradient"} <= lines[3].keys()
    assert lines[2]["temperature"] == 5.0
    assert lines[3]["temperature"] == pytest.approx(0.1)
    numbers = [{name: float(value) for name, value in line.items()} for line in lines]
    text = search._describe(numbers[3])
    assert f"/{TARGET_MS:g} ms" in text
    assert "E[lat]" in text
    assert "T 0.10" in text
    assert "warm-up" in search._describe(numbers[0])
    assert search.device == CPU


# Config -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"alpha_every": 0}, "alpha_every: expected at least 1, got 0"),
        ({"num_paths": 0}, "num_paths: expected at least 1, got 0"),
        ({"num_paths": 2, "mode": "joint"}, "sandwich, distillation, num_paths and alpha_every"),
        ({"mode": "joint"}, "alternating; set sandwich: false"),
        ({"warmup_fraction": 1.0}, "warmup_fraction in 0..1"),
        ({"exploration": 1.5}, "exploration in 0..1"),
        ({"alpha_learning_rate": 0.0}, "alpha_learning_rate > 0"),
        ({"alpha_weight_decay": -1.0}, "alpha_weight_decay >= 0"),
        ({"distillation": True, "sandwich": False}, "distillation needs sandwich: true"),
        ({"splits": {"weights": 1.0}}, "splits: expected weights, alpha and validation, got we"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**({"steps": 4, "batch_size": 4, "optimizer": FAST} | settings))


def test_a_config_says_what_the_supernet_shares(project, tiny):
    overrides = ["search.sharing.bn_affine=per_width", "search.sharing.kernel_transform=true"]
    config = load_config(project / "config.yaml", overrides).search
    search = tiny.search(sharing=config.sharing)
    names = search.supernet.state_dict()
    assert "backbone.blocks.1.branches.ibn.kernel_maps.3" in names
    assert names["backbone.blocks.1.branches.ibn.project_bn.weight"].dim() == 2
    with pytest.raises(ValueError, match="the checkpoint is of another network"):
        search.load_state_dict(tiny.search().state_dict())
    with pytest.raises(ValueError, match="bn_affine"):
        load_config(project / "config.yaml", ["search.sharing.bn_affine=per_block"])


def test_latency_weights_below_zero_are_refused():
    for settings in ({"weight": -1.0}, {"dual_rate": -0.1}):
        with pytest.raises(ValueError, match="expected weight and dual_rate >= 0"):
            LatencyLossConfig(**settings)


@pytest.mark.parametrize("settings", [{}, {"mode": "joint"}, {"checkpoint_activations": True}])
def test_a_step_in_bfloat16_is_near_that_in_float32(tiny, settings):
    found = []
    for precision in ("float32", "bfloat16"):
        search = tiny.search(precision=precision, warmup_fraction=0.0, **settings)
        values = search.take_step(0)
        assert all(p.dtype == torch.float32 for p in search.supernet.parameters())
        found.append({name: float(values[name]) for name in ("loss/weights", "loss/depth")})
        assert all(torch.isfinite(p).all() for p in search.supernet.parameters())
    assert found[1] == pytest.approx(found[0], rel=0.05)
    assert found[1] != found[0]
