"""Bootstrap statistics of rankings, against their definitions on resamples written out."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneshot_ednas.correlation import kendall_tau, spearman
from oneshot_ednas.rank_correlation import (
    Agreement,
    Estimate,
    agreement,
    estimate,
    expected_ceiling,
    group_means,
    mean_agreement,
    noise_ceiling,
    rank_differences,
    resample_counts,
    weighted_kendall_tau,
    weighted_spearman,
    weighted_top_overlap,
)


@st.composite
def weighted_lists(draw):
    """Two lists with ties, and some resamples of them."""
    length = draw(st.integers(2, 9))
    scores = st.lists(st.integers(-3, 3), min_size=length, max_size=length)
    a, b = (np.array(draw(scores), dtype=float) for _ in range(2))
    seed = draw(st.integers(0, 1000))
    return a, b, resample_counts(length, np.random.default_rng(seed), 5)


def written_out(values, counts) -> np.ndarray:
    return np.repeat(values, counts.astype(int))


def test_resamples_have_as_many_items_and_are_seeded():
    counts = resample_counts(7, np.random.default_rng(0), 500)
    assert counts.shape == (500, 7)
    assert (counts.sum(1) == 7).all()
    assert counts.mean() == 1
    assert counts.var() == pytest.approx(6 / 7, rel=0.1)  # binomial: 7 x 1/7 x 6/7
    assert (counts == resample_counts(7, np.random.default_rng(0), 500)).all()


@pytest.mark.parametrize(
    ("weighted", "plain"), [(weighted_kendall_tau, kendall_tau), (weighted_spearman, spearman)]
)
@given(lists=weighted_lists())
def test_weighted_correlations_are_those_of_the_lists_written_out(weighted, plain, lists):
    a, b, counts = lists
    for value, row in zip(weighted(a, b, counts), counts, strict=True):
        expected = plain(written_out(a, row), written_out(b, row))
        if expected is None:
            assert math.isnan(value)
        else:
            assert value == pytest.approx(expected, abs=1e-12)


def overlap_by_definition(a, b, size) -> float:
    """Share of common items among the best of lists without ties."""
    best = [set(np.argsort(-values)[:size]) for values in (a, b)]
    return len(best[0] & best[1]) / size


@given(st.integers(1, 12), st.integers(0, 1000), st.floats(0.01, 1.0))
def test_top_overlap_without_ties_counts_common_items(length, seed, share):
    generator = np.random.default_rng(seed)
    a, b = (generator.permutation(length).astype(float) for _ in range(2))
    size = max(1, round(share * length))
    (value,) = weighted_top_overlap(a, b, np.ones((1, length)), share=share)
    assert value == pytest.approx(overlap_by_definition(a, b, size))


@given(weighted_lists(), st.sampled_from([0.1, 0.25, 0.5, 1.0]))
def test_laws_of_top_overlap(lists, share):
    a, b, counts = lists
    value = weighted_top_overlap(a, b, counts, share=share)
    assert ((value > -1e-12) & (value < 1 + 1e-12)).all()
    assert value == pytest.approx(weighted_top_overlap(b, a, counts, share=share))
    assert weighted_top_overlap(a, a, counts, share=share) == pytest.approx(1)
    assert value == pytest.approx(weighted_top_overlap(np.exp(a), b, counts, share=share))
    order = np.random.default_rng(0).permutation(len(a))
    permuted = weighted_top_overlap(a[order], b[order], counts[:, order], share=share)
    assert value == pytest.approx(permuted)
    # An item drawn twice is two items.
    for one, row in zip(value, counts, strict=True):
        x, y = written_out(a, row), written_out(b, row)
        (expected,) = weighted_top_overlap(x, y, np.ones((1, len(x))), share=share)
        assert one == pytest.approx(expected)


def test_a_tie_at_the_border_counts_in_part():
    # One place for two equal items: each takes half of it.
    a, b = np.array([1.0, 1.0, 0.0]), np.array([2.0, 1.0, 0.0])
    (value,) = weighted_top_overlap(a, b, np.ones((1, 3)), share=0.3)
    assert value == 0.5


def test_agreement_estimates_the_items_as_they_are():
    generator = np.random.default_rng(0)
    b = generator.normal(size=40)
    a = b + generator.normal(size=40)
    counts = resample_counts(40, np.random.default_rng(1))
    found = agreement(a, b, counts).estimates()
    assert set(found) == {"kendall_tau", "spearman", "top_10_percent", "top_25_percent"}
    assert found["kendall_tau"].value == pytest.approx(kendall_tau(a, b))
    assert found["spearman"].value == pytest.approx(spearman(a, b))
    assert found["top_25_percent"].value == overlap_by_definition(a, b, 10)
    for one in found.values():
        assert one.low <= one.value <= one.high
        assert one.low < one.high
    perfect = agreement(b, np.exp(b), counts).estimates()
    assert all(one == Estimate(1.0, 1.0, 1.0) for one in map(rounded, perfect.values()))
    assert agreement(-b, b, counts).estimates()["kendall_tau"].high == pytest.approx(-1)


def rounded(one: Estimate) -> Estimate:
    return Estimate(*(round(value, 9) for value in (one.value, one.low, one.high)))


def test_intervals_cover_the_true_tau_as_often_as_they_say():
    # Of two normals with correlation r, tau is 2/pi arcsin r (Kendall and Gibbons 1990).
    r, covered, trials = 0.7, 0, 60
    truth = 2 / math.pi * math.asin(r)
    for seed in range(trials):
        generator = np.random.default_rng(seed)
        a, noise = generator.normal(size=(2, 60))
        b = r * a + math.sqrt(1 - r**2) * noise
        one = agreement(a, b, resample_counts(60, generator, 400)).estimates()["kendall_tau"]
        covered += one.low <= truth <= one.high
    assert 52 <= covered <= 60


def test_a_noise_ceiling_is_the_mean_over_pairs_of_seeds():
    scores = np.random.default_rng(0).normal(size=(3, 12)) + np.arange(12) / 2
    counts = resample_counts(12, np.random.default_rng(1), 100)
    ceiling = noise_ceiling(scores, counts)
    taus = [kendall_tau(a, b) for a, b in itertools.combinations(scores, 2)]
    assert ceiling.estimates()["kendall_tau"].value == pytest.approx(np.mean(taus))
    # Against itself a ceiling is 1, and a score at half of it is a half.
    half = mean_agreement([(scores[0], scores[1]), (scores[0], -scores[1])], counts)
    assert half.estimates()["kendall_tau"].value == pytest.approx(0)
    assert ceiling.over(ceiling)["kendall_tau"] == Estimate(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="a noise ceiling needs 2 seeds or more, got 1"):
        noise_ceiling(scores[:1], counts)


def test_a_constant_score_says_nothing():
    counts = resample_counts(5, np.random.default_rng(0), 50)
    found = agreement(np.ones(5), np.arange(5.0), counts)
    assert found.estimates()["kendall_tau"] == Estimate(None, None, None)
    assert found.estimates()["spearman"] == Estimate(None, None, None)
    assert str(found.estimates()["spearman"]) == "none"
    whole = agreement(np.arange(5.0), np.arange(5.0), counts)
    assert whole.over(found)["kendall_tau"] == Estimate(None, None, None)


def test_resamples_without_a_value_are_left_out():
    values = np.array([0.5, np.nan, 0.1, 0.9])
    assert rounded(estimate(values)) == Estimate(0.5, 0.12, 0.88)
    assert estimate(np.array([0.5, np.nan])) == Estimate(None, None, None)


@pytest.mark.parametrize("bad", [[1.0, 2.0], [1.0, 2.0, math.nan], [1.0, 2.0, math.inf]])
def test_lists_that_do_not_fit_or_are_not_finite_are_refused(bad):
    counts = resample_counts(3, np.random.default_rng(0), 5)
    bad, well = np.array(bad), np.arange(3.0)
    for pair in ((bad, well), (well, bad)):
        with pytest.raises(ValueError, match=r"expected two lists of 3 scores|expected finite"):
            agreement(*pair, counts)


# Bias ---------------------------------------------------------------------------------------


@given(weighted_lists())
def test_rank_differences_are_those_of_mid_ranks(lists):
    a, b, _ = lists

    def mid_ranks(values):
        return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])

    found = rank_differences(a, b)
    assert found == pytest.approx((mid_ranks(a) - mid_ranks(b)) / len(a))
    assert found.sum() == pytest.approx(0)
    assert rank_differences(b, a) == pytest.approx(-found)


def test_an_overrated_option_is_found():
    # Members of a group are scored higher by 30 of 100 places than they are worth.
    generator = np.random.default_rng(0)
    truth = generator.permutation(100).astype(float)
    is_member = generator.random(100) < 0.5
    counts = resample_counts(100, np.random.default_rng(1))
    differences = rank_differences(truth + 30 * is_member, truth)
    groups = {"member": is_member, "other": ~is_member, "nobody": np.zeros(100, dtype=bool)}
    found = group_means(differences, groups, counts)
    assert found["member"].low > 0 > found["other"].high
    assert found["nobody"] == Estimate(None, None, None)
    for name, members in list(groups.items())[:2]:
        assert found[name].value == pytest.approx(differences[members].mean())
    honest = rank_differences(truth + generator.normal(size=100), truth)
    one = group_means(honest, {"member": is_member}, counts)["member"]
    assert one.low < 0 < one.high


def test_the_expected_ceiling_of_normal_scores_is_that_of_their_correlation():
    rng = np.random.default_rng(0)
    truth, few = rng.normal(size=150), rng.normal(size=60)
    noise, offsets = 0.5, np.array([[0.0], [3.0], [-2.0]])
    single = truth + noise * rng.normal(size=150)
    repeated = few + noise * rng.normal(size=(3, 60)) + offsets
    found = expected_ceiling(single, repeated, rng, num_pairs=100, num_resamples=20)
    tau = found.estimates()["kendall_tau"]
    correlation = 1 / (1 + noise**2)
    assert tau.value == pytest.approx(2 / math.pi * math.asin(correlation), abs=0.06)
    assert tau.low < tau.value < tau.high


def test_intervals_of_the_expected_ceiling_cover_it_as_often_as_they_say():
    noise, covered, trials = 0.5, 0, 30
    truth = 2 / math.pi * math.asin(1 / (1 + noise**2))
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        single = rng.normal(size=60) + noise * rng.normal(size=60)
        repeated = rng.normal(size=16) + noise * rng.normal(size=(3, 16))
        settings = {"num_pairs": 10, "num_resamples": 30, "pairs_per_resample": 4}
        one = expected_ceiling(single, repeated, rng, **settings).estimates()["kendall_tau"]
        covered += one.low <= truth <= one.high
    assert 24 <= covered <= 30


def test_a_share_of_a_ceiling_with_fewer_resamples_uses_them_again():
    one = Agreement({"tau": np.array([0.5, 0.4, 0.6, 0.4, 0.6])})
    ceiling = Agreement({"tau": np.array([1.0, 0.8, 1.2])})
    assert one.over(ceiling)["tau"] == Estimate(0.5, 0.5, 0.5)


def test_the_expected_ceiling_is_one_without_noise_and_none_without_spread():
    rng, single = np.random.default_rng(0), np.arange(30.0)
    same = np.stack([single[:8]] * 2)
    found = expected_ceiling(single, same, rng, num_resamples=20).estimates()
    assert all(one.value == 1 for one in found.values())
    noise = rng.normal(size=(2, 8))
    flat = expected_ceiling(np.full(30, 2.0), noise, rng, num_resamples=20)
    assert abs(flat.estimates()["kendall_tau"].value) < 0.05
    with pytest.raises(ValueError, match="expected 2 seeds and 2 items or more, got 1 and 8"):
        expected_ceiling(single, same[:1], rng)
