"""A closed-form latency simulator of the Coral Edge TPU, and its score on published measurements.

One op takes `max(compute, traffic) + overhead`. A network adds what happens once per inference:

    fixed + input * bytes_in + output * bytes_out + streaming * relu(parameter_bytes - cache_bytes)

so latency is no plain sum over ops. Compute is the smallest number of units over the ways to split
an output over the 4 x 4 tiles by rows, columns and channels; one unit is about 1 ns at 500 MHz.
The constants are fitted to published latencies of whole networks by `tools/fit_edgetpu.py`.

Not modelled: ops that fall back to the CPU, activations beyond the 3 MiB of on-chip memory, and
weights streamed more than once per inference (seen in chains of wide convolutions).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oneshot_ednas.schema import nearest, shipped

OPS = ("conv", "dw", "fc", "tconv", "pool", "add", "mul", "concatenation", "resize")
CACHED_OPS = ("conv", "dw", "fc", "tconv")
ELEMENTWISE_OPS = ("add", "mul", "concatenation", "resize")
CLOCKS_MHZ = (500, 250)  # libedgetpu1-max and -std
BIAS_BYTES = 8  # per channel: the int32 bias and as much again, as compiler reports add up
_PARTITIONS = tuple((y, x, 16 // (y * x)) for y in (1, 2, 4) for x in (1, 2, 4))


class Layer(NamedTuple):
    """One op with static shapes; `op` is one of `OPS`."""

    op: str
    in_height: int
    in_width: int
    in_channels: int
    out_height: int
    out_width: int
    out_channels: int
    kernel_height: int
    kernel_width: int
    stride: int


class Work(NamedTuple):
    """What an op asks of the chip."""

    conv_units: int
    depthwise_units: int
    activation_bytes: int
    fc_weight_bytes: int


def work(layer: Layer) -> Work:
    """Units of compute and bytes moved on chip by one op.

    Raises:
        ValueError: if the op is unknown.
    """
    op, in_height, in_width, in_channels, height, width, channels, kernel, kernel_w, stride = layer
    if op not in OPS:
        raise ValueError(f"unknown Edge TPU op {op!r}; known: {', '.join(OPS)}")
    inputs = in_height * in_width * _padded(in_channels, 4)
    traffic = inputs + height * width * _padded(channels, 4)
    depth = kernel * kernel_w * math.ceil(in_channels / 4)
    cells = math.ceil(channels / 16)
    if op in ("conv", "tconv"):  # transposed: each input pixel is spread over the kernel
        size = (height, width) if op == "conv" else (in_height, in_width)
        return Work(depth * split_units(*size, cells), 0, traffic, 0)
    if op == "fc":
        weights = _padded(in_channels, 4) * _padded(channels, 64)
        return Work(math.ceil(in_channels / 4) * split_units(1, 1, cells), 0, traffic, weights)
    # A pooling window is a depthwise one; a global pool only reads its input.
    if op == "dw" or (op == "pool" and height * width > 1):
        # 3 units a pixel at 3x3 and 5 at stride 2, as the compiler has it; else extrapolated.
        factor = math.ceil(kernel * kernel_w / (3 if stride == 1 else 1.8))
        return Work(0, factor * split_units(height, width, math.ceil(channels / 4)), traffic, 0)
    return Work(0, 0, traffic + (inputs if op == "add" else 0), 0)


def split_units(height: int, width: int, depth: int) -> int:
    """Smallest share of an output of height x width x depth over the 16 tiles' partitions."""
    return min(
        math.ceil(height / y) * math.ceil(width / x) * math.ceil(depth / z)
        for y, x, z in _PARTITIONS
    )


@dataclass(frozen=True, kw_only=True)
class HostConstants:
    """What a host and its bus add to each inference."""

    fixed_ms: float
    input_ns_per_byte: float
    output_ns_per_byte: float
    streaming_ns_per_byte: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"Edge TPU host constant {name} must be 0 or more, got {value}")


@dataclass(frozen=True, kw_only=True)
class EdgeTpuConstants:
    """Constants of the chip at 500 MHz, and of the hosts."""

    conv_ns_per_unit: float
    depthwise_ns_per_unit: float
    activation_bytes_per_ns: float
    fc_weight_bytes_per_ns: float
    compute_overhead_ns: float
    """Per convolution, depthwise convolution, fully connected layer or pooling."""
    elementwise_overhead_ns: float
    """Per op that the compiler tends to fuse: add, mul, concatenation, resize."""
    cache_bytes: float
    hosts: Mapping[str, HostConstants]
    leave_one_out: Mapping[str, Any] = field(default_factory=dict)
    """Error on networks left out of the fit, as in `score`: `all` and `groups`."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and not 0 < value < math.inf:
                raise ValueError(f"Edge TPU constant {name} must be positive, got {value}")

    @classmethod
    def load(cls, path: Path | None = None) -> "EdgeTpuConstants":
        """Read constants; by default those shipped with the package.

        Raises:
            ValueError: if a constant is missing, unknown or out of range.
        """
        path = path or shipped("latency_tables/edgetpu_constants.json")
        values = _read_json(path)
        try:
            hosts = {name: HostConstants(**host) for name, host in values["hosts"].items()}
            notes = {key: values.get(key, {}) for key in ("leave_one_out", "provenance")}
            return cls(**values["chip"], **notes, hosts=hosts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected Edge TPU constants ({error}); refit with tools/fit_edgetpu.py"
            ) from None


@dataclass(frozen=True)
class EdgeTpu:
    """An Edge TPU at one clock on one host."""

    constants: EdgeTpuConstants
    host: str = "usb3-desktop"
    clock_mhz: int = 500

    def __post_init__(self) -> None:
        if self.host not in self.constants.hosts:
            hint = nearest(self.host, self.constants.hosts)
            raise ValueError(f"unknown Edge TPU host {self.host!r}; {hint}")
        if self.clock_mhz not in CLOCKS_MHZ:
            raise ValueError(f"the Edge TPU runs at 500 or 250 MHz, got {self.clock_mhz}")

    @classmethod
    def load(cls, host: str = "usb3-desktop", clock_mhz: int = 500) -> "EdgeTpu":
        """The shipped constants, for one host and clock."""
        return cls(EdgeTpuConstants.load(), host, clock_mhz)

    @property
    def fixed_ms(self) -> float:
        """Time of an inference that moves and computes nothing."""
        return self.constants.hosts[self.host].fixed_ms

    @property
    def input_ms_per_byte(self) -> float:
        """Transfer of the network's input."""
        return self.constants.hosts[self.host].input_ns_per_byte * 1e-6

    @property
    def output_ms_per_byte(self) -> float:
        """Transfer of the network's output."""
        return self.constants.hosts[self.host].output_ns_per_byte * 1e-6

    @property
    def streaming_ms_per_byte(self) -> float:
        """Transfer, at each inference, of parameters beyond the cache."""
        return self.constants.hosts[self.host].streaming_ns_per_byte * 1e-6

    @property
    def cache_bytes(self) -> float:
        """Parameters that stay on the chip between inferences."""
        return self.constants.cache_bytes

    def parameter_bytes(self, layer: Layer) -> int:
        """Bytes one op's int8 weights and biases take in the cache: channels padded to 4 and 64."""
        if layer.op not in CACHED_OPS:
            return 0
        depth = 1 if layer.op == "dw" else _padded(layer.in_channels, 4)
        window = layer.kernel_height * layer.kernel_width
        return _padded(layer.out_channels, 64) * (window * depth + BIAS_BYTES)

    def layer_ms(self, layer: Layer) -> float:
        """On-chip time of one op, its parameters in the cache.

        Raises:
            ValueError: if the op is unknown.
        """
        c, load = self.constants, work(layer)
        busy_ns = max(
            c.conv_ns_per_unit * load.conv_units,
            c.depthwise_ns_per_unit * load.depthwise_units,
            load.activation_bytes / c.activation_bytes_per_ns,
            load.fc_weight_bytes / c.fc_weight_bytes_per_ns,
        )
        elementwise = layer.op in ELEMENTWISE_OPS
        overhead_ns = c.elementwise_overhead_ns if elementwise else c.compute_overhead_ns
        return (busy_ns + overhead_ns) * (500 / self.clock_mhz) * 1e-6

    def network_ms(
        self,
        layers: Iterable[Layer],
        *,
        input_bytes: int | float,
        output_bytes: int | float,
        offchip_parameter_bytes: int | float | None = None,
    ) -> float:
        """Time of one inference.

        Args:
            layers: the ops mapped to the Edge TPU.
            input_bytes: bytes sent per inference.
            output_bytes: bytes received per inference.
            offchip_parameter_bytes: parameters streamed per inference; by default those that
                exceed the cache, so the time is continuous in the parameter bytes.

        Raises:
            ValueError: for an unknown op or a negative number of bytes.
        """
        layers = list(layers)
        if offchip_parameter_bytes is None:
            excess = sum(map(self.parameter_bytes, layers)) - self.cache_bytes
            offchip_parameter_bytes = max(0.0, excess)
        if min(input_bytes, output_bytes, offchip_parameter_bytes) < 0:
            raise ValueError(
                f"expected input, output and off-chip bytes of 0 or more, "
                f"got {input_bytes}, {output_bytes} and {offchip_parameter_bytes}"
            )
        return (
            self.fixed_ms
            + self.input_ms_per_byte * input_bytes
            + self.output_ms_per_byte * output_bytes
            + self.streaming_ms_per_byte * offchip_parameter_bytes
            + sum(map(self.layer_ms, layers))
        )


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
    content = source if isinstance(source, Mapping) else _read_json(Path(source))
    networks = content.get("networks") if isinstance(content, Mapping) else None
    if not isinstance(networks, list) or not networks:
        raise ValueError('expected a JSON object with a non-empty list "networks"')
    return [_network(values, f"network {i}") for i, values in enumerate(networks)]


def score_networks(
    source: Path | str | Mapping[str, Any], constants: EdgeTpuConstants | None = None
) -> dict[str, Any]:
    """Hold the simulator against published latencies.

    Returns:
        `all` and `groups.<name>` (see `score`), one row per network under `networks`, and the
        error on networks left out, from the fit, under `leave_one_out`.

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
    return EdgeTpu(constants, network.host).network_ms(
        network.layers,
        input_bytes=network.input_bytes,
        output_bytes=network.output_bytes,
        offchip_parameter_bytes=network.offchip_param_bytes,
    )


def score(networks: Sequence[PublishedNetwork], predicted_ms: Sequence[float]) -> dict[str, Any]:
    """`all` and `groups.<name>`: n, mape, median_ape, max_ape (percent) and spearman.

    `spearman` is None where ranks say nothing: fewer than two networks, or all equal.
    """
    measured = np.array([network.measured_ms for network in networks])
    predicted = np.asarray(predicted_ms, dtype=float)
    names = np.array([network.group for network in networks])

    def errors(chosen: np.ndarray) -> dict[str, Any]:
        ape = 100 * np.abs(predicted[chosen] / measured[chosen] - 1)
        return {
            "n": int(chosen.sum()),
            "mape": float(ape.mean()),
            "median_ape": float(np.median(ape)),
            "max_ape": float(ape.max()),
            "spearman": spearman(predicted[chosen], measured[chosen]),
        }

    groups = {name: errors(names == name) for name in dict.fromkeys(names.tolist())}
    return {"all": errors(np.ones(len(names), dtype=bool)), "groups": groups}


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation, ties averaged; None for fewer than two values or constant ones."""
    ranks = []
    for values in (a, b):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place])
    if any(len(set(rank.tolist())) < 2 for rank in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _padded(channels: int, multiple: int) -> int:
    return multiple * math.ceil(channels / multiple)


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def _network(values: object, where: str) -> PublishedNetwork:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected an object, got {values!r}")
    where = f"{where} ({values.get('model', 'no model')})"
    for key in ("group", "model", "device", "host", "bus"):
        if not isinstance(values.get(key), str):
            raise ValueError(f"{where}: {key} must be text, got {values.get(key)!r}")
    offchip = "offchip_param_bytes"
    for key in ("measured_ms", "input_bytes", "output_bytes", *{offchip} & values.keys()):
        value: Any = values.get(key)
        # `type` because true and false are integers to isinstance.
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(f"{where}: {key} must be a number of 0 or more, got {value!r}")
    if values["measured_ms"] == 0:
        raise ValueError(f"{where}: measured_ms must be positive, got 0")
    layers = values.get("layers")
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"{where}: layers must be a non-empty list, got {layers!r}")
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
        raise ValueError(f"{where}: expected {len(fields)} values ({fields}), got {values!r}")
    op, *sizes = values
    if op not in OPS:
        raise ValueError(f"{where}: unknown op {op!r}; known: {', '.join(OPS)}")
    if any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"{where}: sizes must be whole numbers of 1 or more, got {sizes}")
    return Layer(op, *sizes)


def _host(device: str, bus: str, where: str) -> str:
    """The simulator's host for a device and bus as published."""
    bus_name = bus.upper().replace(" ", "")
    # The one source that states no bus (HW-NAS-Bench) is taken as a Coral Dev Board.
    on_board = not bus_name or "Dev Board" in device
    hosts = {"USB3": "usb3-desktop", "USB2": "usb2-raspberry-pi", "PCIE": "pcie-desktop"}
    host = "pcie-devboard" if on_board else hosts.get(bus_name[:4])
    if host is None:
        raise ValueError(f"{where}: bus must be USB 2, USB 3, PCIe or empty, got {bus!r}")
    return host
