"""Rank correlations: do two lists order the same things alike?"""

import numpy as np


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation, ties averaged.

    Returns:
        From -1 to 1; None where ranks say nothing: fewer than two values, or constant ones.

    Raises:
        ValueError: if the lists differ in length.

    Source:
        Spearman 1904, "The Proof and Measurement of Association between Two Things".
    """
    ranks = [_ranks(values) for values in _pair(a, b)]
    if any(np.ptp(rank) == 0 for rank in ranks if rank.size) or ranks[0].size < 2:
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float | None:
    """Kendall's tau-b: pairs ordered alike less pairs ordered apart, ties corrected for.

    Every pair is looked at, so time and memory grow with the square of the length.

    Returns:
        From -1 to 1; None where ranks say nothing: fewer than two values, or constant ones.

    Raises:
        ValueError: if the lists differ in length.

    Source:
        Kendall 1945, "The Treatment of Ties in Ranking Problems", Biometrika 33(3).
    """
    signs = [np.sign(values[:, None] - values[None, :]) for values in _pair(a, b)]
    # Each pair counts twice in every sum, which cancels.
    untied = [float((sign**2).sum()) for sign in signs]
    if 0.0 in untied:
        return None
    return float((signs[0] * signs[1]).sum() / np.sqrt(untied[0] * untied[1]))


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"expected two lists of one length, got shapes {first.shape} and {second.shape}"
        )
    return first, second


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
