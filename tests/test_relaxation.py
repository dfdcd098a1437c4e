"""Gates: probabilities, entropy, the Gumbel-softmax and its limits."""

import math

import numpy as np
import pytest
import torch
from conftest import SMALL_SPACE, random_alpha
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.relaxation import (
    ArchitectureParameters,
    TemperatureConfig,
    one_hot_gates,
)
from oneshot_ednas.space import CHOICE_FIELDS, SearchSpace, ednas_b0, ednas_tiny

SPACES = [ednas_b0(), ednas_tiny(), SearchSpace.from_yaml(SMALL_SPACE)]
seeds = st.integers(0, 2**31 - 1)
spaces = st.sampled_from(range(len(SPACES)))


def vectors(gates) -> list[torch.Tensor]:
    return [vector for block in gates for vector in block]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)
def test_zero_alpha_is_uniform_with_the_largest_entropy(space):
    alpha = ArchitectureParameters(space)
    expected = sum(math.log(len(choice.options)) for choice in space.choices)
    assert alpha.entropy().item() == pytest.approx(expected, rel=1e-6)
    assert sum(alpha.entropies().values()) == pytest.approx(expected, rel=1e-6)
    for vector in vectors(alpha.probabilities()):
        torch.testing.assert_close(vector, torch.full_like(vector, 1 / len(vector)))


@settings(max_examples=20)
@given(spaces, seeds, st.sampled_from([0.1, 1.0, 10.0]))
def test_probabilities_and_entropy_are_the_textbook_s(which, seed, scale):
    space = SPACES[which]
    alpha = random_alpha(space, seed, scale)
    start, entropies, by_choice = 0, {}, {}
    for choice in space.choices:
        logits = alpha.logits[start : start + len(choice.options)].detach().double().numpy()
        start += len(choice.options)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        by_choice[choice.block, choice.field] = p
        entropies[choice.name] = -(p * np.log(np.maximum(p, 1e-300))).sum()
    assert start == len(alpha.logits)
    assert alpha.entropies() == pytest.approx(entropies, abs=1e-5)
    log_p = alpha.log_probabilities()
    for number, block in enumerate(alpha.probabilities(), start=1):
        for field, vector in zip(CHOICE_FIELDS, block, strict=True):
            p = by_choice.get((number, field), np.ones(1))
            np.testing.assert_allclose(vector.detach().numpy(), p, atol=1e-6)
            log = getattr(log_p[number - 1], field)
            assert log.dtype == torch.float64
            np.testing.assert_allclose(log.exp().numpy(), p, atol=1e-12)


@settings(max_examples=20)
@given(spaces, seeds, st.sampled_from([0.05, 1.0, 5.0]), st.booleans())
def test_gates_are_probability_vectors_with_the_space_s_shapes(which, seed, temperature, hard):
    space = SPACES[which]
    gates = random_alpha(space, seed).gates(temperature, hard=hard, generator=generator(seed))
    assert len(gates) == len(space.blocks)
    for spec, block in zip(space.blocks, gates, strict=True):
        for field, vector in zip(CHOICE_FIELDS, block, strict=True):
            assert len(vector) == len(spec.options(field))
            assert vector.min() >= 0
            assert vector.sum().item() == pytest.approx(1, abs=1e-5)


@settings(max_examples=20)
@given(spaces, seeds, st.sampled_from([0.1, 1.0, 5.0]))
def test_hard_gates_are_exactly_one_hot_with_the_soft_gates_gradient(which, seed, temperature):
    alpha = random_alpha(SPACES[which], seed)
    hard = alpha.gates(temperature, hard=True, generator=generator(seed))
    soft = alpha.gates(temperature, generator=generator(seed))
    factors = [torch.randn(len(v), generator=generator(1)) for v in vectors(soft)]
    gradients = []
    for gates in (hard, soft):
        loss = sum((v * f).sum() for v, f in zip(vectors(gates), factors, strict=True))
        gradients.append(torch.autograd.grad(loss, alpha.logits)[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert torch.isfinite(gradients[0]).all()
    for one, relaxed in zip(vectors(hard), vectors(soft), strict=True):
        assert sorted(one.tolist()) == [0.0] * (len(one) - 1) + [1.0]
        assert one.argmax() == relaxed.argmax()


def test_gates_tend_to_one_hot_as_the_temperature_falls():
    alpha = random_alpha(ednas_tiny(), 0)
    sharpness = []
    for temperature in (5.0, 1.0, 0.3, 0.1, 0.01):
        gates = alpha.gates(temperature, generator=generator(0))
        peaks = torch.stack([v.max() for v in vectors(gates) if len(v) > 1])
        sharpness.append(peaks.mean().item())
    assert sharpness == sorted(sharpness)
    assert sharpness[0] < 0.6
    assert sharpness[-1] > 0.98


def test_sampled_frequencies_match_the_softmax():
    alpha = random_alpha(SPACES[2], 4)
    draws, source = 4000, generator(7)
    total = [torch.zeros_like(v) for v in vectors(alpha.probabilities())]
    with torch.no_grad():
        for _ in range(draws):
            for sum_, v in zip(
                total, vectors(alpha.gates(0.5, hard=True, generator=source)), strict=True
            ):
                sum_ += v
    for counts, p in zip(total, vectors(alpha.probabilities()), strict=True):
        deviation = (p * (1 - p) / draws).sqrt()
        assert ((counts / draws - p).abs() <= 5 * deviation + 1e-9).all()


def test_gates_repeat_with_their_seed_and_differ_without():
    alpha = random_alpha(ednas_tiny(), 0)
    first, again, other = (
        torch.cat(vectors(alpha.gates(1.0, generator=generator(seed)))) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_extreme_noise_and_logits_stay_finite(monkeypatch):
    alpha = random_alpha(ednas_tiny(), 0, scale=1e4)
    # float32 exponential_ may return exactly 0, whose log is infinite.
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, **_: self.zero_())
    gates = torch.cat(vectors(alpha.gates(0.1)))
    assert torch.isfinite(gates).all()
    gates.square().sum().backward()
    assert torch.isfinite(alpha.logits.grad).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        ArchitectureParameters(SPACES[2]).gates(temperature)


@settings(max_examples=20)
@given(spaces, seeds)
def test_one_hot_gates_name_the_architecture(which, seed):
    space = SPACES[which]
    architecture = space.sample(np.random.default_rng(seed))
    gates = one_hot_gates(space, architecture, dtype=torch.float64)
    for spec, block, row in zip(space.blocks, gates, architecture.blocks, strict=True):
        for field, vector in zip(CHOICE_FIELDS, block, strict=True):
            assert vector.dtype == torch.float64
            assert sorted(vector.tolist()) == [0.0] * (len(vector) - 1) + [1.0]
            assert spec.options(field)[int(vector.argmax())] == getattr(row, field)


@settings(max_examples=20)
@given(spaces, seeds)
def test_argmax_and_log_probability_agree_with_the_probabilities(which, seed):
    space = SPACES[which]
    alpha = random_alpha(space, seed)
    best = alpha.argmax()
    p = alpha.probabilities()
    expected = sum(math.log(v.max().item()) for v in vectors(p))
    assert alpha.log_probability(best).item() == pytest.approx(expected, abs=1e-3)
    other = space.sample(np.random.default_rng(seed))
    gates = one_hot_gates(space, other)
    picked = sum(
        math.log((a * b).sum().item()) for a, b in zip(vectors(p), vectors(gates), strict=True)
    )
    assert alpha.log_probability(other).item() == pytest.approx(picked, abs=1e-3)
    assert picked <= expected + 1e-6


def test_probabilities_of_all_architectures_sum_to_one(small_space):
    alpha = random_alpha(small_space, 2)
    log_p = torch.tensor(0.0)
    for vector in vectors(alpha.log_probabilities()):
        log_p = log_p + vector.logsumexp(0)
    assert log_p.item() == pytest.approx(0, abs=1e-9)


def test_log_probability_and_entropy_have_gradients_that_gradcheck_accepts(small_space):
    alpha = random_alpha(small_space, 1).double()
    logits = alpha.logits.detach().clone().requires_grad_()
    architecture = small_space.base_architecture

    def run(name):
        def value(x):
            arguments = (architecture,) if name == "log_probability" else ()
            module = _Method(alpha, name)
            return torch.func.functional_call(module, {"alpha.logits": x}, arguments)

        return value

    for name in ("entropy", "log_probability"):
        assert torch.autograd.gradcheck(run(name), (logits,))


class _Method(torch.nn.Module):
    def __init__(self, alpha, name) -> None:
        super().__init__()
        self.alpha, self.name = alpha, name

    def forward(self, *arguments):
        return getattr(self.alpha, self.name)(*arguments)


def test_a_foreign_architecture_has_no_gates_and_no_probability(small_space):
    foreign = ednas_tiny().base_architecture
    with pytest.raises(ValueError, match="architecture has 8 blocks, space small has 4"):
        one_hot_gates(small_space, foreign)
    with pytest.raises(ValueError, match="architecture has 8 blocks, space small has 4"):
        ArchitectureParameters(small_space).log_probability(foreign)


def test_alpha_of_a_fixed_space_has_no_logits_but_all_gates(small_space):
    fixed = small_space.fix(small_space.base_architecture)
    alpha = ArchitectureParameters(fixed)
    assert alpha.logits.numel() == 0
    assert alpha.argmax() == fixed.base_architecture
    assert alpha.entropy().item() == 0
    assert alpha.entropies() == {}
    for gates in (alpha.probabilities(), alpha.gates(1.0, hard=True)):
        assert all(v.tolist() == [1.0] for v in vectors(gates))
    assert all(v.tolist() == [0.0] for v in vectors(alpha.log_probabilities()))


def test_alpha_lives_in_the_state_dict(small_space):
    alpha = random_alpha(small_space, 5)
    other = ArchitectureParameters(small_space)
    assert list(alpha.state_dict()) == ["logits"]
    other.load_state_dict(alpha.state_dict())
    assert torch.equal(other.logits, alpha.logits)


@pytest.mark.parametrize(
    ("schedule", "halfway"), [("linear", 2.55), ("exponential", math.sqrt(0.5)), ("constant", 5.0)]
)
def test_the_temperature_follows_its_schedule(schedule, halfway):
    config = TemperatureConfig(start=5.0, end=0.1, schedule=schedule)
    end = 5.0 if schedule == "constant" else 0.1
    assert config.at(0.0) == 5.0
    assert config.at(0.5) == pytest.approx(halfway)
    assert config.at(1.0) == pytest.approx(end)
    assert config.at(-1.0) == config.at(0.0)
    assert config.at(2.0) == config.at(1.0)
    path = [config.at(i / 20) for i in range(21)]
    assert path == sorted(path, reverse=True)


@pytest.mark.parametrize(("start", "end"), [(0.1, 5.0), (1.0, 0.0), (1.0, -1.0), (math.nan, 0.1)])
def test_a_rising_or_non_positive_temperature_is_refused(start, end):
    with pytest.raises(
        ValueError, match=f"expected 0 < end <= start, got start {start}, end {end}"
    ):
        TemperatureConfig(start=start, end=end)
