"""The simulator held against published latencies of whole networks."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as clipped
from typing import Any, NamedTuple

import numpy as np

from oneshot_ednas.correlation import spearman
from oneshot_ednas.latency.edgetpu import (
    OPS,
    EdgeTpu,
    EdgeTpuConstants,
    Layer,
    OutsideCalibration,
)
from oneshot_ednas.parsing import one_line
from oneshot_ednas.schema import read_json

MOST, MOST_SIZE, LEAST_MS = 1e12, 2**20, 1e-6
"""The most of a time in ms or of bytes, of the size of a layer, and the shortest time in ms: no
network comes near."""


class PublishedNetwork(NamedTuple):
    """A network with a published Edge TPU latency."""

    group: str
    model: str
    host: str
    """One of the simulator's hosts."""
    measured_ms: float
    input_bytes: float
    output_bytes: float
    offchip_param_bytes: float | None
    layers: tuple[Layer, ...]


def read_networks(source: Path | str | Mapping[str, Any]) -> list[PublishedNetwork]:
    """Networks with published latencies, checked field by field.

    Raises:
        ValueError: naming the network and the field that is missing or wrong.
    """
    content = source if isinstance(source, Mapping) else read_json(Path(source))
    networks = content.get("networks") if isinstance(content, Mapping) else None
    if not isinstance(networks, list) or not networks:
        raise ValueError('expected a JSON object with a non-empty list "networks"')
    return [_network(values, f"network {i}") for i, values in enumerate(networks)]


def score_networks(
    source: Path | str | Mapping[str, Any], constants: EdgeTpuConstants | None = None
) -> dict[str, Any]:
    """Hold the simulator against published latencies.

    Returns:
        `all`, `groups.<name>` and `hosts.<name>` (see `score`), one row per network under
        `networks`, and the error on networks left out, from the fit, under `leave_one_out`.

    Raises:
        ValueError: if the networks cannot be read.
    """
    constants = constants or EdgeTpuConstants.load()
    networks = read_networks(source)
    predicted_ms = [predict_ms(network, constants) for network in networks]
    shown = ("group", "model", "host", "measured_ms")
    rows = [
        {**{key: getattr(network, key) for key in shown}, "predicted_ms": predicted}
        for network, predicted in zip(networks, predicted_ms, strict=True)
    ]
    leave_one_out = dict(constants.leave_one_out)
    return {**score(networks, predicted_ms), "networks": rows, "leave_one_out": leave_one_out}


def predict_ms(network: PublishedNetwork, constants: EdgeTpuConstants) -> float:
    """Simulated latency of a published network on its host."""
    with warnings.catch_warnings():
        # The score itself tells how far off the networks with large layers are.
        warnings.simplefilter("ignore", OutsideCalibration)
        return EdgeTpu(constants, network.host).network_ms(
            network.layers,
            input_bytes=network.input_bytes,
            output_bytes=network.output_bytes,
            offchip_parameter_bytes=network.offchip_param_bytes,
        )


def score(networks: Sequence[PublishedNetwork], predicted_ms: Sequence[float]) -> dict[str, Any]:
    """`all`, `groups.<name>` and `hosts.<name>`: n, mape, median_ape, max_ape and spearman.

    Errors are in percent.

    `spearman` is None where ranks say nothing: fewer than two networks, or all equal.
    """
    measured = np.array([network.measured_ms for network in networks])
    predicted = np.asarray(predicted_ms, dtype=float)

    def errors(chosen: np.ndarray) -> dict[str, Any]:
        ape = 100 * np.abs(predicted[chosen] / measured[chosen] - 1)
        return {
            "n": int(chosen.sum()),
            "mape": float(ape.mean()),
            "median_ape": float(np.median(ape)),
            "max_ape": float(ape.max()),
            "spearman": spearman(predicted[chosen], measured[chosen]),
        }

    def by(names: list[str]) -> dict[str, Any]:
        return {name: errors(np.array(names) == name) for name in dict.fromkeys(names)}

    return {
        "all": errors(np.ones(len(networks), dtype=bool)),
        "groups": by([network.group for network in networks]),
        "hosts": by([network.host for network in networks]),
    }


def _network(values: object, where: str) -> PublishedNetwork:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected an object, got {clipped(values)}")
    where = one_line(f"{where} ({clipped(values.get('model', 'no model'))[1:-1]})")
    for key in ("group", "model", "device", "host", "bus"):
        if not isinstance(values.get(key), str):
            raise ValueError(f"{where}: {key} must be text, got {clipped(values.get(key))}")
    offchip = "offchip_param_bytes"
    for key in ("measured_ms", "input_bytes", "output_bytes", *{offchip} & values.keys()):
        value: Any = values.get(key)
        # `type` because true and false are integers to isinstance.
        if type(value) not in (int, float) or not 0 <= value <= MOST:
            raise ValueError(f"{where}: {key} must be a number of 0 or more, got {clipped(value)}")
    if values["measured_ms"] < LEAST_MS:
        raise ValueError(f"{where}: measured_ms must be positive, got {values['measured_ms']}")
    layers = values.get("layers")
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"{where}: layers must be a non-empty list, got {clipped(layers)}")
    return PublishedNetwork(
        group=values["group"],
        model=values["model"],
        host=_host(values["device"], values["bus"], where),
        measured_ms=float(values["measured_ms"]),
        input_bytes=float(values["input_bytes"]),
        output_bytes=float(values["output_bytes"]),
        offchip_param_bytes=float(values[offchip]) if offchip in values else None,
        layers=tuple(_layer(layer, f"{where}: layers[{i}]") for i, layer in enumerate(layers)),
    )


def _layer(values: object, where: str) -> Layer:
    fields = Layer._fields
    if not isinstance(values, (list, tuple)) or len(values) != len(fields):
        raise ValueError(
            f"{where}: expected {len(fields)} values ({fields}), got {clipped(values)}"
        )
    op, *sizes = values
    if op not in OPS:
        raise ValueError(f"{where}: unknown op {clipped(op)}; known: {', '.join(OPS)}")
    if any(type(size) is not int or not 1 <= size <= MOST_SIZE for size in sizes):
        raise ValueError(
            f"{where}: sizes must be whole numbers of 1 or more, below 2^20, got {clipped(sizes)}"
        )
    return Layer(op, *sizes)


def _host(device: str, bus: str, where: str) -> str:
    """The simulator's host for a device and bus as published."""
    bus_name = bus.upper().replace(" ", "")
    # The one source that states no bus (HW-NAS-Bench) is taken as a Coral Dev Board.
    on_board = not bus_name or "Dev Board" in device
    hosts = {"USB3": "usb3-desktop", "USB2": "usb2-raspberry-pi", "PCIE": "pcie-desktop"}
    host = "pcie-devboard" if on_board else hosts.get(bus_name[:4])
    if host is None:
        raise ValueError(f"{where}: bus must be USB 2, USB 3, PCIe or empty, got {clipped(bus)}")
    return host
