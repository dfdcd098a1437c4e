"""Constants that a step needs on its device: copied there once, since each copy would be a wait."""

from functools import lru_cache

import torch
from torch import Tensor


def constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    """The numbers as a tensor of the same type and device as another; not to be changed.

    Args:
        values: the numbers.
        like: gives type and device.
    """
    return _constant(values, like.dtype, like.device)


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Whoever asks first may be in inference mode, whose tensors no backward pass may use.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
