"""Small linear fits that a few wrong times do not sway: non-negative, Huber's weights."""

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_HUBER = 1.345  # 95 % as efficient as least squares where the noise is normal
MAD_TO_DEVIATION = 1.4826
"""For normal noise: the deviation over the median absolute one."""
_STEPS = 100


def fit_nonnegative(columns: Array, target: Array, deviation: Array) -> Array:
    """Coefficients of 0 or more with `columns @ coefficients` close to the target.

    Least squares in units of the deviation, weighted down for residuals beyond 1.345 times their
    median size.

    Args:
        columns: `[n, terms]`; few terms, since every subset of them is tried.
        target: `[n]`.
        deviation: `[n]`, positive: how far off each target may be, up to a common factor.

    Source:
        Huber 1964, "Robust Estimation of a Location Parameter"; the weights by Holland and Welsch
        1977, "Robust regression using iteratively reweighted least-squares".
    """
    weights = np.ones(len(target))
    coefficients = np.zeros(columns.shape[1])
    exact = 1e-13 * float(np.median(np.abs(target) / deviation))
    for _ in range(_STEPS):
        scale = np.sqrt(weights) / deviation
        before = coefficients
        coefficients = _least_squares(columns * scale[:, None], target * scale)
        residual = np.abs(target - columns @ coefficients) / deviation
        usual = MAD_TO_DEVIATION * float(np.median(residual))
        if usual <= exact or np.allclose(coefficients, before, rtol=1e-9, atol=0):
            break
        weights = np.minimum(1, _HUBER * usual / np.maximum(residual, 1e-300))
    return coefficients


def _least_squares(columns: Array, target: Array) -> Array:
    """Non-negative least squares: of all subsets of columns, the best one without a negative."""
    terms = columns.shape[1]
    size = np.linalg.norm(columns, axis=0)
    size[size == 0] = 1  # a column of zeros keeps the coefficient 0
    # The triangular factor holds all that matters, in terms + 1 rows.
    factor = np.linalg.qr(np.column_stack([columns / size, target])).R
    left, right = factor[:, :terms], factor[:, terms]
    best, least = np.zeros(terms), float(np.linalg.norm(right))
    for count in range(1, terms + 1):
        for subset in itertools.combinations(range(terms), count):
            chosen = list(subset)
            solution = np.linalg.lstsq(left[:, chosen], right, rcond=None)[0]
            residual = float(np.linalg.norm(right - left[:, chosen] @ solution))
            if (solution >= 0).all() and residual < least:
                best, least = np.zeros(terms), residual
                best[chosen] = solution
    return best / size


def jackknife(fit: Callable[[npt.NDArray[np.bool_]], Array], count: int) -> Array:
    """Standard errors of a fit, from fits that leave a part of the data out.

    Args:
        fit: coefficients from the chosen data.
        count: how many data there are; each of at most 20 interleaved parts is left out once.

    Source:
        Efron 1982, "The Jackknife, the Bootstrap and Other Resampling Plans", chapter 3.
    """
    parts = min(count, 20)
    left_out = np.array([fit(np.arange(count) % parts != part) for part in range(parts)])
    deviation = ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0)
    return np.sqrt((parts - 1) / parts * deviation)
