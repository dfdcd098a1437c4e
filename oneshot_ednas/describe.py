"""What a network is and costs: parameters, multiply-adds, latency, one row per block."""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.latency.operations import network_operations
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.models.network import Network, build_network
from oneshot_ednas.space import SearchSpace


def multiply_adds(network: Network, image_size: tuple[int, int]) -> dict[str, int]:
    """Convolution multiply-adds for one image, by the name of the module that does them.

    Counted by fvcore over a trace; the key "" is the whole network. BN, activations and resizes
    are left out, as in the papers' figures.
    """
    # fvcore warns about each operator that it does not count, such as additions.
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    was_training = network.training
    image = torch.zeros(1, 3, *image_size, device=next(network.parameters()).device)
    with warnings.catch_warnings():
        # fvcore is built on torch.jit, which newer versions of torch deprecate.
        warnings.simplefilter("ignore", DeprecationWarning)
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(network.eval(), image)
        analysis.unsupported_ops_warnings(False)
        analysis.uncalled_modules_warnings(False)
        counts = {
            name: int(operators.get("conv", 0))
            for name, operators in analysis.by_module_and_operator().items()
        }
    network.train(was_training)
    return counts


def describe_network(
    space: SearchSpace,
    architecture: Architecture,
    *,
    out_channels: Mapping[str, int],
    image_size: tuple[int, int],
    table: LatencyTable | None = None,
) -> dict[str, Any]:
    """Figures of one network.

    Args:
        space: the search space.
        architecture: the network.
        out_channels: output channels per task.
        image_size: height and width of the image.
        table: latency table; without one the latencies are None.

    Returns:
        `parameters`, `gmacs`, `gflops` (twice `gmacs`), `latency_ms`, and `rows`: per block (and
        stem, BiFPN, heads) what EDNAS table 6 prints, with parameters, gmacs and latency.

    Raises:
        ValueError: if the architecture is not in the space, the table is for another image size,
            or one of its rows is missing.
    """
    if table is not None:
        table.check_image_size(*image_size)
    network = build_network(space.fix(architecture), out_channels)
    macs = multiply_adds(network, image_size)
    modules = dict(network.named_modules())
    block_ms: dict[str, float] = {}
    for placed in network_operations(space, architecture, image_size, out_channels):
        part = placed.where.split(".")[0]
        if table is not None:
            block_ms[part] = block_ms.get(part, 0.0) + table.row(placed.operation).latency_ms
    parts: list[tuple[str, str, dict[str, Any]]] = [("stem", "backbone.stem", {})]
    for number, (spec, block) in enumerate(
        zip(space.blocks, architecture.blocks, strict=True), start=1
    ):
        columns = {"op": block.op, "stride": spec.stride, "kernel_size": block.kernel_size}
        columns |= {"filters": block.filters, "expand_ratio": block.expand_ratio}
        parts.append((f"block_{number}", f"backbone.blocks.{number - 1}", columns))
    parts += [("bifpn", "bifpn", {}), ("head", "heads", {})]
    rows = [
        {
            "name": name,
            **columns,
            "parameters": sum(p.numel() for p in modules[module].parameters()),
            "gmacs": macs[module] / 1e9,
            "latency_ms": block_ms.get(name),
        }
        for name, module, columns in parts
    ]
    latency_ms = None if table is None else table.latency_ms(space, architecture, out_channels)
    return {
        "space": space.name,
        "architecture": str(architecture),
        "image_size": list(image_size),
        "out_channels": dict(out_channels),
        "parameters": network.num_parameters,
        "gmacs": macs[""] / 1e9,
        "gflops": 2 * macs[""] / 1e9,
        "latency_ms": latency_ms,
        "rows": rows,
    }


def describe_space(
    space: SearchSpace,
    *,
    out_channels: Mapping[str, int],
    table: LatencyTable | None = None,
) -> dict[str, Any]:
    """Figures of a whole space: its exact size, and its least and largest latency."""
    costs = None if table is None else table.costs(space, out_channels)
    return {
        "num_architectures": str(space.num_architectures),
        "min_latency_ms": None if costs is None else costs.min_latency_ms,
        "max_latency_ms": None if costs is None else costs.max_latency_ms,
    }
