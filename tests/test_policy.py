"""Policies: their JSON, their draws, the regularisation's known values and gradients."""

import json
import math

import pytest
import torch

from oneshot_ednas.sharing.policy import (
    OWN,
    SHARED,
    SKIP,
    Policy,
    PolicyParameters,
    policy_of_gates,
    policy_regularization,
    task_correlation,
)

TASKS = ("segmentation", "depth", "normals")
OPERATORS = ("stem", "block_1.conv", "block_1.bn", "block_2")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


# Policies -----------------------------------------------------------------------------------


def test_a_policy_survives_json():
    policy = Policy.random(TASKS, OPERATORS, generator())
    data = json.loads(json.dumps(policy.to_json()))
    assert Policy.from_json(data) == policy
    assert set(data["policy"][0]) <= {"shared", "own", "skip"}
    # As in a run folder, where operators are described.
    described = data | {"operators": [{"name": n, "depth": 1} for n in OPERATORS], "num_layers": 4}
    assert Policy.from_json(described) == policy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": [["shared"] * 4] * 2}, "a row for each of 3 tasks, got 2"),
        ({"policy": [["shared"] * 3] * 3}, "expected 4 choices of 0"),
        ({"policy": [["all"] * 4] * 3}, "a word of shared, own, skip"),
        ({"operators": [{"kind": "Conv2d"}]}, "KeyError"),
        ({"tasks": ["depth", "depth", "normals"]}, "tasks with names of their own"),
        ({"policy": None}, "TypeError"),
    ],
)
def test_json_of_another_shape_is_refused(change, message):
    data = Policy.all_shared(TASKS, OPERATORS).to_json() | change
    with pytest.raises(ValueError, match=message) as caught:
        Policy.from_json(data)
    assert "\n" not in str(caught.value)


def test_random_policies_are_uniform_and_repeatable():
    operators = [str(number) for number in range(1000)]
    policy = Policy.random(TASKS, operators, generator(1))
    assert policy == Policy.random(TASKS, operators, generator(1))
    assert policy != Policy.random(TASKS, operators, generator(2))
    for share in policy.shares().values():
        assert share == pytest.approx(1 / 3, abs=0.03)
    assert Policy.all_own(TASKS, operators).shares() == {"shared": 0, "own": 1, "skip": 0}


def test_one_hot_gates_are_those_of_the_policy():
    policy = Policy.random(TASKS, OPERATORS, generator())
    assert policy_of_gates(TASKS, OPERATORS, policy.one_hot()) == policy
    assert policy.one_hot().sum() == 12


# Draws --------------------------------------------------------------------------------------


def test_a_policy_begins_uniform():
    parameters = PolicyParameters(TASKS, OPERATORS)
    torch.testing.assert_close(parameters.probabilities(), torch.full((3, 4, 3), 1 / 3))
    assert float(parameters.entropy().detach()) == pytest.approx(math.log(3))


def test_gates_sum_to_one_and_become_one_hot_as_the_temperature_falls():
    parameters = PolicyParameters(TASKS, OPERATORS)
    warm = parameters.gates(5.0, generator=generator()).detach()
    cold = parameters.gates(0.01, generator=generator()).detach()
    for gates in (warm, cold):
        torch.testing.assert_close(gates.sum(-1), torch.ones(3, 4))
    assert warm.max() < 0.9
    assert cold.max(-1).values.mean() > 0.97
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        parameters.gates(0.0)


def test_hard_gates_are_one_hot_with_the_gradient_of_soft_ones():
    parameters = PolicyParameters(TASKS, OPERATORS)
    weights = torch.randn(3, 4, 3, generator=generator(5))
    gradients = []
    for hard in (False, True):
        gates = parameters.gates(0.7, hard=hard, generator=generator(3))
        (gradient,) = torch.autograd.grad((gates * weights).sum(), parameters.logits)
        gradients.append(gradient)
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(*gradients)
    assert gradients[0].count_nonzero() == 36


def test_draws_follow_the_probabilities():
    operators = [str(number) for number in range(4000)]
    parameters = PolicyParameters(("depth",), operators)
    with torch.no_grad():
        parameters.logits.copy_(torch.tensor([0.6, 0.3, 0.1]).log().expand(1, 4000, 3))
    expected = {"shared": 0.6, "own": 0.3, "skip": 0.1}
    assert parameters.sample(generator()).shares() == pytest.approx(expected, abs=0.03)
    gates = parameters.gates(1.0, hard=True, generator=generator()).detach()
    drawn = policy_of_gates(("depth",), operators, gates)
    assert drawn.shares() == pytest.approx(expected, abs=0.03)
    assert parameters.argmax() == Policy.all_shared(("depth",), operators)


# Regularisation -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "per_operator"),
    [
        (SHARED, 2 * softplus(-1)),
        (OWN, softplus(1) + softplus(0)),
        (SKIP, softplus(0) + softplus(1)),
    ],
)
def test_the_regularisation_of_one_choice_is_known(choice, per_operator):
    gates = Policy.uniform(TASKS, OPERATORS, choice).one_hot()
    # Of depths 1 to 4 the weights are 3/4, 2/4, 1/4 and 0.
    found = float(policy_regularization(gates, [1, 2, 3, 4]))
    assert found == pytest.approx(3 * 1.5 * per_operator, rel=1e-6)


def test_the_regularisation_of_a_uniform_policy_is_known():
    uniform = PolicyParameters(TASKS, OPERATORS).probabilities().detach()
    # Depths 1, 3, 3 of 4: 3/4 + 1/4 + 1/4, and nothing for the last operator.
    found = float(policy_regularization(uniform, [1, 3, 3, 4]))
    assert found == pytest.approx(3 * 1.25 * 2 * math.log(2), rel=1e-6)


def test_depths_that_do_not_fit_are_refused():
    gates = Policy.all_own(TASKS, OPERATORS).one_hot()
    for depths in ([1, 2, 3], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="depths: expected a number from 1 on for each of 4"):
            policy_regularization(gates, depths)


def test_the_regularisation_s_gradient_is_that_of_finite_differences():
    logits = torch.randn(3, 4, 3, generator=generator(), dtype=torch.double, requires_grad=True)

    def loss(values):
        return policy_regularization(values.softmax(-1), [1, 2, 2, 3])

    assert torch.autograd.gradcheck(loss, (logits,))


def test_descent_on_the_regularisation_shares_all_but_the_last_operator():
    parameters = PolicyParameters(TASKS, OPERATORS)
    optimizer = torch.optim.Adam(parameters.parameters(), lr=0.1)
    for step in range(60):
        optimizer.zero_grad()
        gates = parameters.gates(1.0, generator=generator(step))
        policy_regularization(gates, [1, 2, 3, 4]).backward()
        optimizer.step()
    probabilities = parameters.probabilities().detach()
    assert probabilities[:, :3, SHARED].min() > 0.8
    torch.testing.assert_close(probabilities[:, 3], torch.full((3, 3), 1 / 3))


# Correlation --------------------------------------------------------------------------------


def test_the_correlation_of_tasks_is_the_cosine_of_their_policies():
    choices = ((SHARED,) * 4, (SHARED, SHARED, SHARED, OWN), (SKIP,) * 4)
    found = task_correlation(Policy(TASKS, OPERATORS, choices).one_hot())
    expected = torch.tensor([[1, 0.75, 0], [0.75, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(found, expected)
