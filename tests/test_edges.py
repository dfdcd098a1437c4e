"""The edge measure against brute force, and on maps whose matching is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from oneshot_ednas.tasks.edges import (
    EDGE_THRESHOLDS,
    Matching,
    edge_metrics,
    frame_counts,
    suppressed,
    thinned,
)

HEIGHT, WIDTH = 60, 80
DIAGONAL = 100.0


def drawing(shift: int = 0) -> np.ndarray:
    """A rectangle and a slanted line, one pixel wide, far from the border."""
    edges = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    edges[15 + shift, 20:50] = edges[40 + shift, 20:50] = 1
    edges[15 + shift : 41 + shift, 20] = edges[15 + shift : 41 + shift, 49] = 1
    steps = np.arange(20)
    edges[18 + shift + steps, 24 + steps] = 1
    return edges


def ods_f(prediction: np.ndarray, edges: np.ndarray, max_distance: float) -> float:
    metrics = edge_metrics(max_distance)
    metrics.update(torch.tensor(prediction[None], dtype=torch.float32), torch.tensor(edges[None]))
    return metrics.compute()["ods_f"]


def test_a_map_equal_to_the_truth_scores_one() -> None:
    assert ods_f(drawing(), drawing(), 0.0075) == 1
    assert ods_f(0.3 * drawing(), drawing(), 0.0075) == 1


def test_a_map_without_an_edge_scores_zero_and_one_where_there_is_none() -> None:
    nothing = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    assert ods_f(nothing, drawing(), 0.0075) == 0
    assert ods_f(drawing(), nothing, 0.0075) == 0
    assert ods_f(nothing, nothing, 0.0075) == 1


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_a_shift_within_the_tolerance_costs_nothing(shift: int) -> None:
    assert ods_f(drawing(shift), drawing(), shift / DIAGONAL) == 1
    assert ods_f(drawing(shift), drawing(), (shift - 0.01) / DIAGONAL) < 1


def test_a_shift_beyond_the_tolerance_matches_nothing() -> None:
    line = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    line[30, 10:70] = 1
    assert ods_f(np.roll(line, 4, axis=0), line, 4.0 / DIAGONAL) == 1
    assert ods_f(np.roll(line, 4, axis=0), line, 3.9 / DIAGONAL) == 0


def test_two_predicted_pixels_cannot_match_one() -> None:
    truth = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    prediction = truth.copy()
    truth[30, 40] = 1
    prediction[28, 40] = prediction[32, 40] = 1
    matched, predicted, num_true = frame_counts(prediction.astype(np.float32), truth, 0.05)
    assert (matched == 1).all()
    assert (predicted == 2).all()
    assert num_true == 1
    assert ods_f(prediction, truth, 0.05) == pytest.approx(2 * 0.5 * 1 / 1.5)


def test_one_threshold_serves_all_frames() -> None:
    weak, strong = 0.2 * drawing(), drawing().astype(float)
    strong[5, 5:75] = 0.4  # a false line in the second frame
    num_false, num_true = 70, int(thinned(drawing() == 1).sum())
    metrics = edge_metrics(0.01)
    for prediction in (weak, strong):
        metrics.update(
            torch.tensor(prediction[None], dtype=torch.float32), torch.tensor(drawing()[None])
        )
    # Below 0.2 both drawings and the false line count; above 0.4 one drawing alone.
    all_lines = 4 * num_true / (2 * num_true + num_false + 2 * num_true)
    one_drawing = 2 * num_true / (num_true + 2 * num_true)
    assert metrics.compute()["ods_f"] == pytest.approx(max(all_lines, one_drawing))


def test_edges_under_invalid_pixels_do_not_count() -> None:
    edges, prediction = drawing(), drawing().astype(np.float32)
    prediction[5, 5:75] = 1
    assert ods_f(prediction, edges, 0.0075) < 1
    edges[:10] = 255
    assert ods_f(prediction, edges, 0.0075) == 1


@pytest.mark.parametrize("fill", [0.0, 1.0, np.nan])
def test_predictions_under_invalid_pixels_change_nothing_beside_them(fill: float) -> None:
    generator = np.random.default_rng(3)
    edges = drawing()
    prediction = np.where(edges == 1, 0.6, 0) + 0.4 * generator.random(edges.shape)
    edges[:20] = 255
    other = prediction.copy()
    other[:20] = fill
    assert ods_f(other, edges, 0.0075) == ods_f(prediction, edges, 0.0075)


def test_thick_truth_and_blurred_predictions_are_thinned() -> None:
    thick = ndimage.binary_dilation(drawing() == 1)
    blurred = ndimage.gaussian_filter(drawing().astype(float), 1.0)
    assert thinned(thick).sum() < 0.6 * thick.sum()
    assert ods_f(thick.astype(float), thick.astype(np.int64), 0.0075) == 1
    assert ods_f(blurred / blurred.max(), drawing(), 0.02) > 0.97
    # Without suppression the blur would leave bands.
    found = suppressed(blurred) > 0.05
    assert found.sum() < 1.3 * (drawing() == 1).sum()


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.9))
def test_laws_of_thinning(seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((12, 14)) < share
    lines = thinned(mask)
    assert not (lines & ~mask).any()
    assert (thinned(lines) == lines).all()
    everywhere = np.ones((3, 3))
    assert ndimage.label(lines, everywhere)[1] == ndimage.label(mask, everywhere)[1]
    keep = mask & (np.random.default_rng(seed + 1).random(mask.shape) < 0.3)
    assert (thinned(mask, keep=keep) & keep == keep).all()
    assert (thinned(mask, keep=mask) == mask).all()


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 40), columns=st.integers(1, 40))
def test_a_growing_matching_is_as_large_as_any(seed: int, rows: int, columns: int) -> None:
    generator = np.random.default_rng(seed)
    near = csr_matrix(generator.random((rows, columns)) < generator.uniform(0, 0.3))
    matching, added = Matching(near), []
    for row in generator.permutation(rows).tolist():
        matching.add(row)
        added.append(row)
        best = maximum_bipartite_matching(near[added], perm_type="column")
        assert matching.size == (best >= 0).sum()


def brute_force_f(prediction: np.ndarray, edges: np.ndarray, distance: float) -> float:
    """F of sparse points by trying every assignment of the fewer to the more."""
    found, truth = np.argwhere(prediction > 0), np.argwhere(edges == 1)
    few, many = sorted((found, truth), key=len)
    best = max(
        sum(math.dist(a, b) <= distance for a, b in zip(few, chosen, strict=True))
        for chosen in itertools.permutations(many, len(few))
    )
    return 2 * best / (len(found) + len(truth))


@settings(max_examples=40)
@given(
    found=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=1, max_size=6),
    truth=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=1, max_size=6),
    offset=st.tuples(st.integers(-1, 1), st.integers(-1, 1)),
    reach=st.floats(0.5, 4.0),
)
def test_f_equals_brute_force_on_points(
    found: set, truth: set, offset: tuple[int, int], reach: float
) -> None:
    # Points on a grid of every third pixel are lines of one pixel already.
    prediction = np.zeros((24, 32), dtype=np.int64)
    edges = prediction.copy()
    for row, column in found:
        prediction[3 * row + 3 + offset[0], 3 * column + 3 + offset[1]] = 1
    for row, column in truth:
        edges[3 * row + 3, 3 * column + 3] = 1
    expected = brute_force_f(prediction, edges, reach)
    assert ods_f(prediction, edges, reach / 40) == pytest.approx(expected)


def test_counts_of_thresholds_equal_a_matching_of_each_alone() -> None:
    generator = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(generator.standard_normal((HEIGHT, WIDTH)), 1.5)
    blurred = ndimage.gaussian_filter(drawing(1).astype(float), 1.0)
    probability = (blurred / blurred.max() * 0.8 + noise).clip(0, 1).astype(np.float32)
    matched, predicted, num_true = frame_counts(probability, drawing(), 0.0201)
    values, lines = suppressed(probability), np.zeros((HEIGHT, WIDTH), dtype=bool)
    truth = np.argwhere(thinned(drawing() == 1))
    assert num_true == len(truth)
    for index in range(98, -1, -1):
        lines = thinned(values >= np.float32(EDGE_THRESHOLDS[index]), keep=lines)
        found = np.argwhere(lines)
        near = np.linalg.norm(found[:, None] - truth[None], axis=-1) <= 2.01
        best = maximum_bipartite_matching(csr_matrix(near), perm_type="column")
        assert predicted[index] == len(found)
        assert matched[index] == (best >= 0).sum()
    assert len(np.unique(matched)) > 20
    assert (np.diff(matched) <= 0).all()
    assert (np.diff(predicted) <= 0).all()


def test_labels_that_are_neither_edge_nor_none_are_refused() -> None:
    edges = drawing()
    edges[0, :3] = 7
    with pytest.raises(ValueError, match="edge target: 3 pixels are neither 0, 1 nor 255"):
        ods_f(drawing(), edges, 0.01)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan])
def test_a_tolerance_that_is_none_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="max_distance must be finite and above 0, got"):
        edge_metrics(wrong)
