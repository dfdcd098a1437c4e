"""Multiply-adds counted by the walk over the space, against fvcore's trace."""

import numpy as np
import pytest
import torch

from oneshot_ednas import build_network, ednas_tiny
from oneshot_ednas.describe import multiply_adds
from oneshot_ednas.latency.operations import network_macs, relaxed_macs
from oneshot_ednas.relaxation import one_hot_gates

CHANNELS = {"segmentation": 10, "depth": 1}


@pytest.mark.parametrize("size", [(32, 64), (48, 80)])
def test_macs_of_a_network_are_those_that_fvcore_counts(size):
    space, generator = ednas_tiny(), np.random.default_rng(0)
    for architecture in [space.base_architecture, space.sample(generator)]:
        network = build_network(space.fix(architecture), CHANNELS)
        counted = multiply_adds(network, size)[""]
        assert network_macs(space, architecture, size, CHANNELS) == counted


def test_macs_of_a_relaxed_supernet_are_those_of_its_convolutions():
    space, size, counted = ednas_tiny(), (32, 64), []
    supernet = build_network(space, CHANNELS)
    plain = torch.nn.functional.conv2d

    def count(x, weight, *arguments, **options):
        y = plain(x, weight, *arguments, **options)
        counted.append(weight[0].numel() * y[0].numel())
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", count)
        supernet(torch.zeros(1, 3, *size), one_hot_gates(space, space.base_architecture))
    assert sum(counted) == relaxed_macs(space, size, CHANNELS)
