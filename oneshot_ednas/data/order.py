"""Which frames each training step sees, and which part of a data set they come from.

Both are pure functions of a seed, so a resumed run needs no state of a loader.
"""

import numpy as np
from jaxtyping import Int64


def batch_indices(
    num_samples: int, batch_size: int, step: int, seed: int
) -> Int64[np.ndarray, " batch"]:
    """Samples of one training step.

    Each epoch is a permutation of its own, cut into batches; what is left over is dropped.

    Args:
        num_samples: size of the split.
        batch_size: samples per step.
        step: training step, counted from 0 over all epochs.
        seed: of the permutations.

    Raises:
        ValueError: if the split is smaller than a batch, or a number is out of range.
    """
    if batch_size < 1 or step < 0 or seed < 0:
        raise ValueError(
            f"expected a batch size of at least 1, and a step and a seed of at least 0, "
            f"got {batch_size}, {step} and {seed}"
        )
    if batch_size > num_samples:
        raise ValueError(
            f"expected at least one batch of {batch_size} samples, got a split of {num_samples}; "
            f"lower the batch size or use more frames"
        )
    epoch, position = divmod(step, num_samples // batch_size)
    permutation = np.random.default_rng([seed, epoch]).permutation(num_samples)
    return permutation[position * batch_size : (position + 1) * batch_size]


def split_indices(num_samples: int, fractions: dict[str, float], seed: int) -> dict[str, list[int]]:
    """Random disjoint parts that together hold every sample, each in rising order.

    Args:
        num_samples: samples in all.
        fractions: share of each part; they sum to 1.
        seed: of the drawing.

    Raises:
        ValueError: if a share is not positive, they do not sum to 1, or a part stays empty.
    """
    if not fractions or min(fractions.values()) <= 0:
        raise ValueError(f"expected positive shares, got {fractions}")
    if abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"expected shares that sum to 1, got {fractions}")
    if seed < 0:
        raise ValueError(f"expected a seed of at least 0, got {seed}")
    bounds = np.rint(np.cumsum([0.0, *fractions.values()]) * num_samples).astype(int)
    order = np.random.default_rng(seed).permutation(num_samples)
    parts = {}
    for name, start, stop in zip(fractions, bounds[:-1], bounds[1:], strict=True):
        if start == stop:
            raise ValueError(
                f"part {name} with a share of {fractions[name]:g} of {num_samples} samples is "
                f"empty; use more samples or a larger share"
            )
        parts[name] = sorted(order[start:stop].tolist())
    return parts
