"""Ranges of activations over calibration images."""

from collections.abc import Iterable

import torch
from torch import Tensor

from oneshot_ednas.export.graph import Graph

Ranges = dict[str, tuple[float, float]]
"""Smallest and largest value of each tensor."""


@torch.inference_mode()
def calibrate(graph: Graph, batches: Iterable[Tensor]) -> Ranges:
    """Run a graph with one input on batches of images and keep every tensor's extremes.

    Args:
        graph: the graph.
        batches: images `[batch, channels, height, width]`, any number per batch.

    Raises:
        ValueError: if there is no image, or a value is not finite (the first tensor is named).
    """
    ranges: Ranges = {}
    for images in batches:
        if not len(images):
            continue
        for name, value in graph.tensors(images):
            low, high = (float(bound) for bound in torch.aminmax(value))
            if not (-torch.inf < low <= high < torch.inf):
                raise ValueError(f"{name} holds values from {low} to {high}: cannot be quantized")
            before = ranges.get(name, (low, high))
            ranges[name] = (min(low, before[0]), max(high, before[1]))
    if not ranges:
        raise ValueError("calibration needs at least one image")
    return ranges
