"""Random states and deterministic algorithms: what equal results depend on besides seeds."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def use_deterministic(*, is_wanted: bool) -> None:
    """Let torch take deterministic algorithms only, for the whole process, or any again.

    A CPU with the same number of threads is deterministic anyway. Where a GPU has no such
    algorithm, torch warns and goes on: of the networks here that is the backward pass of
    max-pooling, whose windows do not overlap in the feature pyramid, so that its result is exact
    there, too.
    """
    if is_wanted:
        # cuBLAS reads it once, when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(is_wanted, warn_only=True)
    torch.backends.cudnn.deterministic = is_wanted


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of torch's own generators, for code that draws from them, such as dropout.

    Everything in this package draws by seed and step, so this is for users' tasks and backbones.
    """
    found = {"torch_random_state": torch.get_rng_state()}
    if device.type == "cuda":
        found["device_random_state"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        found["device_random_state"] = torch.mps.get_rng_state()
    return found


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Go on from `random_state`; a state of another kind of device or an older version has less."""
    if "torch_random_state" in state:
        torch.set_rng_state(state["torch_random_state"])
    if "device_random_state" not in state:
        return
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["device_random_state"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state["device_random_state"])
