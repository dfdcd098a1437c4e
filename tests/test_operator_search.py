"""The search for a policy: which step changes what, exact resumption, candidates, alarms."""

import math
import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_operators import Backbone, Decoder
from tiny import CPU, FAST

from oneshot_ednas import ednas_tiny
from oneshot_ednas.balancing import BalancingConfig
from oneshot_ednas.checkpoint import load_checkpoint
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.models.encoder import Chain, ednas_encoder
from oneshot_ednas.relaxation import TemperatureConfig
from oneshot_ednas.sharing.operator_search import (
    OperatorSearch,
    OperatorSharingConfig,
    rank_policies,
)
from oneshot_ednas.sharing.operators import EDNAS_OPERATORS
from oneshot_ednas.sharing.policy import SHARED, Policy
from oneshot_ednas.training import Interrupted, LoopConfig, evaluate

OFTEN = LoopConfig(log_every=1, checkpoint_every=1)


@pytest.fixture
def search_of(tiny):
    """Makes searches on the small backbone."""

    def make(*, seed: int = 0, **settings) -> OperatorSearch:
        given = {"pretrain_steps": 2, "policy_steps": 4, "batch_size": 2, "optimizer": FAST}
        return OperatorSearch(
            OperatorSharingConfig(**(given | settings)),
            Backbone,
            Decoder,
            tiny.tasks,
            splits={
                "weights": tiny.train.subset(range(16)),
                "alpha": tiny.train.subset(range(16, 24)),
            },
            augmentation=AugmentConfig(flip=True, brightness=0.2),
            seed=seed,
            device=CPU,
        )

    return make


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


def differences(one: OperatorSearch, other: OperatorSearch) -> list[str]:
    a, b = tensors(one.state_dict()), tensors(other.state_dict())
    ours = [name for name in a.keys() | b.keys() if not name.startswith("torch_random_state")]
    assert len(ours) > 100
    return [n for n in ours if n not in a or n not in b or not torch.equal(a[n], b[n])]


def weights_of(search: OperatorSearch) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in search.supermodel.named_parameters()}


def changed(before: dict[str, torch.Tensor], search: OperatorSearch) -> set[str]:
    now = weights_of(search)
    return {name for name in before if not torch.equal(before[name], now[name])}


# Steps --------------------------------------------------------------------------------------


def test_pretraining_trains_all_weights_and_leaves_the_policy_alone(search_of):
    search = search_of()
    before = weights_of(search)
    values = search.take_step(0)
    assert values["temperature"] == 0
    assert "loss/policy" not in values
    assert changed(before, search) == set(before)
    assert not search.policy.logits.count_nonzero()
    assert values["policy/shared"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("gates", ["soft", "hard"])
def test_a_policy_step_changes_every_logit_and_no_weight(search_of, gates):
    search = search_of(gates=gates)
    before = weights_of(search)
    values = search._policy_step(2)
    assert not changed(before, search)
    assert search.policy.logits.count_nonzero() == search.policy.logits.numel() == 2 * 12 * 3
    assert all(parameter.grad is None for parameter in search.supermodel.parameters())
    assert math.isfinite(float(values["loss/policy"]))


def test_weight_steps_follow_the_gates(search_of):
    soft, hard = search_of(), search_of(gates="hard")
    before = weights_of(soft)
    soft._weight_step(2)
    hard._weight_step(2)
    assert changed(before, soft) == set(before)
    # Of hard gates, only what the draw chose is trained.
    some = changed(before, hard)
    assert {name.split(".")[0] for name in some} == {"shared", "own", "rest", "decoders"}
    assert len(some) < 0.8 * len(before)
    assert not soft.policy.logits.count_nonzero()


def test_losses_and_regularisation_of_a_policy_step_take_one_draw(search_of, monkeypatch):
    search, draws = search_of(), []
    plain = search.policy.gates
    monkeypatch.setattr(search.policy, "gates", lambda *a, **k: draws.append(1) or plain(*a, **k))
    search._policy_step(3)
    assert len(draws) == 1


def test_policy_steps_come_as_often_as_asked(search_of):
    search = search_of(pretrain_steps=1, policy_steps=5, alternation=2)
    log = [search.take_step(step) for step in range(6)]
    expected = [False, True, False, True, False, True]
    assert ["loss/policy" in values for values in log] == expected
    # Linear over the steps after pre-training.
    found = [values["temperature"] for values in log]
    assert found == pytest.approx([0, 5, 3.775, 2.55, 1.325, 0.1])


def test_a_large_lambda_drives_towards_sharing(search_of):
    warm = TemperatureConfig(start=1.0, end=1.0, schedule="constant")
    settings = {
        "pretrain_steps": 0,
        "policy_steps": 25,
        "policy_learning_rate": 0.1,
        "temperature": warm,
    }
    shares = {}
    for strength in (0.0, 10.0):
        search = search_of(regularization=strength, **settings)
        for step in range(25):
            values = search.take_step(step)
        shares[strength] = float(values["policy/shared"])
        if strength:
            # All but the deepest operator, which the regularisation leaves to the tasks.
            shared = search.policy.probabilities().detach()[:, :-1, SHARED]
            assert shared.min() > 0.5
    assert shares[10.0] > 0.7 > shares[0.0] + 0.2


def test_the_search_runs_on_an_ednas_encoder(tiny):
    space = ednas_tiny()
    encoder = ednas_encoder(space.fix(space.base_architecture))
    split = tiny.train.subset(range(8))
    search = OperatorSearch(
        OperatorSharingConfig(pretrain_steps=1, policy_steps=1, batch_size=2),
        partial(Chain, encoder),
        encoder.build_decoder,
        tiny.tasks,
        splits={"weights": split, "alpha": split},
        augmentation=AugmentConfig(),
        seed=0,
        device=CPU,
        operator_types=EDNAS_OPERATORS,
    )
    before = weights_of(search)
    search.take_step(0)
    assert len(changed(before, search)) == len(before)
    search.take_step(1)
    assert search.policy.logits.count_nonzero() == search.policy.logits.numel()


# Reproducibility ----------------------------------------------------------------------------


def test_first_weights_depend_on_the_seed_alone(search_of):
    one = search_of(seed=4)
    torch.manual_seed(99)
    assert not differences(one, search_of(seed=4))
    assert differences(one, search_of(seed=5))


@pytest.mark.parametrize(
    "settings",
    [
        {"alternation": 2},
        {"gates": "hard", "batch_size": 8, "balancing": BalancingConfig(method="dwa")},
        {"balancing": BalancingConfig(method="uncertainty")},
    ],
)
def test_a_resumed_search_equals_an_uninterrupted_one_bit_by_bit(search_of, tmp_path, settings):
    settings = {"loop": OFTEN} | settings
    (tmp_path / "whole").mkdir()
    whole = search_of(**settings)
    whole.run(tmp_path / "whole", tmp_path / "whole" / "search.safetensors")
    checkpoint = tmp_path / "search.safetensors"
    # Interrupted twice: in pre-training (steps 0 and 1) and after it.
    for stop_after in (1, 4, None):
        torch.manual_seed(99)  # a new process has another global state
        search = search_of(**settings)
        search.resume(checkpoint)
        take_step = search.take_step

        def interrupted(step, take_step=take_step, stop_after=stop_after):
            if stop_after is not None and step == stop_after - 1:
                os.kill(os.getpid(), signal.SIGINT)
            return take_step(step)

        search.take_step = interrupted
        if stop_after is None:
            search.run(tmp_path, checkpoint)
        else:
            with pytest.raises(Interrupted, match=f"stopped after step {stop_after} of 6"):
                search.run(tmp_path, checkpoint)
            assert load_checkpoint(checkpoint)["step"] == stop_after
    assert not differences(whole, search)
    logs = [(folder / "metrics.jsonl").read_text() for folder in (tmp_path, tmp_path / "whole")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 6


def test_a_checkpoint_of_something_else_is_refused(search_of):
    search = search_of()
    for change, message in (
        ({"stage": "search"}, "the checkpoint is of search, not of a search of operators"),
        ({"seed": 7}, "checkpoint has seed 7, the config 0"),
        ({"supermodel": {}}, "the checkpoint is of another network"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            search.load_state_dict(search.state_dict() | change)
        assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_stops_the_search(search_of):
    search = search_of()
    with torch.no_grad():
        search.supermodel.decoders["depth"].conv.bias.fill_(math.nan)
    search.take_step(0)
    search.guard.max_skipped = 0
    with pytest.raises(RuntimeError, match="operators step 0: the loss of depth"):
        search.guard.read()


# Results ------------------------------------------------------------------------------------


def test_candidates_are_distinct_and_the_most_probable_comes_first(search_of):
    search = search_of(num_candidates=5)
    with torch.no_grad():
        search.policy.logits[..., 1] += 0.5
    found = search.candidates()
    assert len(found) == len(set(found)) == 5
    assert found[0] == search.policy.argmax()
    assert found == search.candidates()
    with torch.no_grad():
        search.policy.logits[..., 1] += 100
    assert search.candidates() == [Policy.all_own(found[0].tasks, found[0].operators)]
    assert len(search_of(discretize="argmax").candidates()) == 1


def test_policies_are_ranked_by_networks_with_their_own_bn_statistics(search_of, tiny):
    search = search_of(num_candidates=3)
    for step in range(2):
        search.take_step(step)
    before = weights_of(search)
    validation = tiny.train.subset(range(24, 32))
    ranked = rank_policies(
        search,
        search.candidates(),
        calibration=search.splits["weights"],
        validation=validation,
        calibration_batches=2,
        batch_size=4,
    )
    assert {one.policy for one in ranked} == set(search.candidates())
    accuracies = [one.accuracy for one in ranked]
    assert accuracies == sorted(accuracies, reverse=True)
    assert all(math.isfinite(accuracy) for accuracy in accuracies)
    assert not changed(before, search)
    assert search.supermodel.training
    plain = search.supermodel.standalone(ranked[0].policy)
    unknown = evaluate(plain, validation, search.tasks, batch_size=4, device=CPU)
    assert unknown != ranked[0].metrics


def test_alarms_name_an_undecided_policy_and_a_task_that_skips_all(search_of):
    search = search_of()
    assert search.alarms() == []
    search.step = search.config.steps
    (alarm,) = search.alarms()
    assert "still almost uniform (entropy 1.10 of 1.10 nats" in alarm
    with torch.no_grad():
        search.policy.logits[0, :, 0] = 5.0
        search.policy.logits[1, :, 2] = 5.0
    (alarm,) = search.alarms()
    assert alarm.startswith("depth skips every operator")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pretrain_steps": -1}, "pretrain_steps: expected 0 or more, got -1"),
        ({"policy_steps": 0}, "policy_steps: expected at least 1, got 0"),
        ({"alternation": 0}, "alternation: expected at least 1"),
        ({"num_candidates": 0}, "num_candidates: expected at least 1"),
        ({"regularization": -1.0}, "regularization >= 0, both finite, got 0.01 and -1.0"),
        ({"regularization": math.inf}, "both finite"),
        ({"regularization": math.nan}, "both finite"),
        ({"policy_learning_rate": 0.0}, "expected policy_learning_rate > 0"),
        ({"splits": {"weights": 1.0}}, "splits: expected weights, alpha and validation"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    config = OperatorSharingConfig(pretrain_steps=1, policy_steps=1, batch_size=1)
    with pytest.raises(ValueError, match=message):
        replace(config, **change)
