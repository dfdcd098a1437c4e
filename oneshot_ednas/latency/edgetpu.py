"""A closed-form latency simulator of the Coral Edge TPU.

One op takes `max(compute, traffic)`, and depthwise convolutions and poolings an overhead on top. A
network adds what happens once per inference:

    fixed + input * bytes_in + output * bytes_out + streaming * relu(parameter_bytes - cache_bytes)

so latency is no plain sum over ops. Compute is the smallest number of units over the ways to split
an output over the 4 x 4 tiles by rows, columns and channels; one unit is about 1 ns at 500 MHz.
The constants are fitted to published latencies of whole networks by `tools/fit_edgetpu.py`.

Not modelled: ops that fall back to the CPU, activations beyond the 3 MiB of on-chip memory (these
are warned of), and weights streamed more than once per inference (seen in chains of wide
convolutions).
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from oneshot_ednas.schema import nearest, read_json, shipped

OPS = ("conv", "dw", "fc", "tconv", "pool", "add", "mul", "concatenation", "resize")
CACHED_OPS = ("conv", "dw", "fc", "tconv")
WINDOW_OPS = ("dw", "pool")
CLOCKS_MHZ = (500, 250)  # libedgetpu1-max and -std
BIAS_BYTES = 8  # per channel: the int32 bias and as much again, as compiler reports add up
ON_CHIP_BYTES = 3 * 2**20  # for activations: 16 tiles of 196,608 bytes
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

    def __str__(self) -> str:
        """For example `dw k5 s2 144->144 at 128x128`."""
        op, height, width, channels, _, _, out_channels, kernel, _, stride = self
        return f"{op} k{kernel} s{stride} {channels}->{out_channels} at {height}x{width}"


class OutsideCalibration(UserWarning):
    """A simulated time that no published measurement backs."""


class Work(NamedTuple):
    """What an op asks of the chip."""

    conv_units: int
    depthwise_units: int
    moved_bytes: int


def work(layer: Layer) -> Work:
    """Units of compute and bytes moved on chip by one op.

    Raises:
        ValueError: if the op is unknown.
    """
    op, in_height, in_width, in_channels, height, width, channels, kernel, kernel_w, stride = layer
    if op not in OPS:
        raise ValueError(f"unknown Edge TPU op {op!r}; known: {', '.join(OPS)}")
    traffic = activation_bytes(layer)
    depth = kernel * kernel_w * math.ceil(in_channels / 4)
    cells = math.ceil(channels / 16)
    if op in ("conv", "tconv"):  # transposed: each input pixel is spread over the kernel
        size = (height, width) if op == "conv" else (in_height, in_width)
        return Work(depth * split_units(*size, cells), 0, traffic)
    if op == "fc":
        weights = _padded(in_channels, 4) * _padded(channels, 64)
        return Work(math.ceil(in_channels / 4) * split_units(1, 1, cells), 0, traffic + weights)
    # A pooling window is a depthwise one; a global pool only reads its input.
    if op == "dw" or (op == "pool" and height * width > 1):
        # 3 units a pixel at 3x3 and 5 at stride 2, as the compiler has it; else extrapolated.
        factor = math.ceil(kernel * kernel_w / (3 if stride == 1 else 1.8))
        return Work(0, factor * split_units(height, width, math.ceil(channels / 4)), traffic)
    # An addition reads two inputs.
    return Work(0, 0, traffic + in_height * in_width * _padded(in_channels, 4) * (op == "add"))


def activation_bytes(layer: Layer) -> int:
    """Bytes of one input and the output as stored: channels padded to 4."""
    inputs = layer.in_height * layer.in_width * _padded(layer.in_channels, 4)
    return inputs + layer.out_height * layer.out_width * _padded(layer.out_channels, 4)


def beyond_memory(layers: Iterable[Layer]) -> str:
    """One line on the layers whose input and output exceed the on-chip memory; "" if none does."""
    sizes = {layer: activation_bytes(layer) for layer in dict.fromkeys(layers)}
    num_large = sum(size > ON_CHIP_BYTES for size in sizes.values())
    if not num_large:
        return ""
    largest = max(sizes, key=sizes.__getitem__)
    return (
        f"input + output of {num_large} of {len(sizes)} distinct layers pass the "
        f"{ON_CHIP_BYTES / 2**20:g} MiB on chip, outside the calibrated range; "
        f"the largest, {largest}, has {sizes[largest] / 2**20:.2f} MiB"
    )


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
    bytes_per_ns: float
    """Activations, and weights of fully connected layers, moved on chip."""
    window_overhead_ns: float
    """Per depthwise convolution or pooling; other ops show no overhead in published latencies."""
    cache_bytes: float
    hosts: Mapping[str, HostConstants]
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """5 and 95 percent points of the fitted constants, those of a host as `host.constant`."""
    leave_one_out: Mapping[str, Any] = field(default_factory=dict)
    """Error on networks left out of the fit, as in `score`: `all`, `groups` and `hosts`."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and not 0 < value < math.inf:
                raise ValueError(f"Edge TPU constant {name} must be positive, got {value}")
        for name, ends in self.ranges.items():
            if len(ends) != 2 or not 0 <= ends[0] <= ends[1] < math.inf:
                raise ValueError(f"Edge TPU range of {name} must be [low, high], got {list(ends)}")

    @classmethod
    def load(cls, path: Path | None = None) -> "EdgeTpuConstants":
        """Read constants; by default those shipped with the package.

        Raises:
            ValueError: if a constant is missing, unknown or out of range.
        """
        path = path or shipped("latency_tables/edgetpu_constants.json")
        values = read_json(path)
        try:
            hosts = {name: HostConstants(**host) for name, host in values["hosts"].items()}
            ranges = {name: tuple(ends) for name, ends in values.get("ranges", {}).items()}
            notes = {key: values.get(key, {}) for key in ("leave_one_out", "provenance")}
            return cls(**values["chip"], **notes, hosts=hosts, ranges=ranges)
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
        return self.constants.hosts[self.host].input_ns_per_byte / 1e6

    @property
    def output_ms_per_byte(self) -> float:
        """Transfer of the network's output."""
        return self.constants.hosts[self.host].output_ns_per_byte / 1e6

    @property
    def streaming_ms_per_byte(self) -> float:
        """Transfer, at each inference, of parameters beyond the cache."""
        return self.constants.hosts[self.host].streaming_ns_per_byte / 1e6

    @property
    def cache_bytes(self) -> float:
        """Parameters that stay on the chip between inferences."""
        return self.constants.cache_bytes

    @staticmethod
    def parameter_bytes(layer: Layer) -> int:
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
            load.moved_bytes / c.bytes_per_ns,
        )
        overhead_ns = c.window_overhead_ns if layer.op in WINDOW_OPS else 0.0
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

        Warns `OutsideCalibration` where a layer's input and output exceed the on-chip memory.

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
        if note := beyond_memory(layers):
            warnings.warn(note, OutsideCalibration, stacklevel=2)
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


def _padded(channels: int, multiple: int) -> int:
    return multiple * math.ceil(channels / multiple)
