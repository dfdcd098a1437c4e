"""Latency tables from the Edge TPU simulator: every operation of a space, without a device."""

import datetime
import warnings
from collections.abc import Mapping

from oneshot_ednas.latency.edgetpu import EdgeTpu, Layer, OutsideCalibration, beyond_memory
from oneshot_ednas.latency.operations import Operation, distinct_operations
from oneshot_ednas.latency.table import LatencyTable, TableHeader, TableRow
from oneshot_ednas.space import SearchSpace


def operation_layers(operation: Operation) -> list[Layer]:
    """The device's ops that one operation compiles to; BN and ReLU6 are folded into them."""
    height, width = operation.in_height, operation.in_width
    out = operation.out_height, operation.out_width
    kernel, stride = operation.kernel_size, operation.stride
    in_channels, out_channels = operation.in_channels, operation.out_channels

    def layer(
        op: str, size: tuple[int, int], c: int, to: tuple[int, int], d: int, k: int, s: int
    ) -> Layer:
        return Layer(op, *size, c, *to, d, k, k, s)

    size = (height, width)
    if operation.op == "separable_conv":
        return [
            layer("dw", size, in_channels, size, in_channels, kernel, 1),
            layer("conv", size, in_channels, size, out_channels, 1, 1),
        ]
    if operation.op not in ("ibn", "fused_ibn"):
        op = {"max_pool": "pool"}.get(operation.op, operation.op)
        return [layer(op, size, in_channels, out, out_channels, kernel, stride)]
    hidden = operation.expand_ratio * in_channels
    if operation.op == "fused_ibn":
        layers = [layer("conv", size, in_channels, out, hidden, kernel, stride)]
    else:
        layers = []
        if operation.expand_ratio > 1:
            layers.append(layer("conv", size, in_channels, size, hidden, 1, 1))
        layers.append(layer("dw", size, hidden, out, hidden, kernel, stride))
    layers.append(layer("conv", out, hidden, out, out_channels, 1, 1))
    if operation.residual:
        layers.append(layer("add", out, out_channels, out, out_channels, 1, 1))
    return layers


def simulate_table(
    space: SearchSpace,
    image_size: tuple[int, int],
    out_channels: Mapping[str, int],
    *,
    head_channels: range = range(0),
    host: str = "usb3-desktop",
    clock_mhz: int = 500,
    date: datetime.date | None = None,
) -> LatencyTable:
    """Price every distinct operation of a space with the simulator.

    The error on whole networks is that of the host's own, and unknown where none were published.
    Warns `OutsideCalibration`, once, where input and output of layers exceed the on-chip memory;
    the header's note says so too.

    Args:
        space: the search space.
        image_size: height and width of the image.
        out_channels: output channels per task that the table assumes where none are given.
        head_channels: further output channels that get a classifier row, so that one table
            serves other sets of tasks.
        host: name of the host, see `EdgeTpu.load`.
        clock_mhz: 500 (`libedgetpu1-max`) or 250 (`-std`).
        date: date for the header; today where not given.

    Raises:
        ValueError: for an unknown host or clock.
    """
    tpu = EdgeTpu.load(host, clock_mhz)
    wanted = dict(out_channels) | {f"head_{count}": count for count in head_channels}
    layers = {
        operation: operation_layers(operation)
        for operation in distinct_operations(space, image_size, wanted)
    }
    rows = {
        operation: TableRow(
            latency_ms=sum(map(tpu.layer_ms, parts)),
            parameter_bytes=sum(map(tpu.parameter_bytes, parts)),
        )
        for operation, parts in layers.items()
    }
    note = "single operations have no direct measurement behind them; whole networks have"
    if too_large := beyond_memory(layer for parts in layers.values() for layer in parts):
        warnings.warn(too_large, OutsideCalibration, stacklevel=2)
        note += f"; {too_large}"
    # What was published is at 500 MHz; the error of other hosts and clocks is unknown.
    left_out = tpu.constants.leave_one_out["hosts"].get(host, {}) if clock_mhz == 500 else {}
    held_out_note = f"unknown: no latency is published for {host} at {clock_mhz} MHz"
    if left_out:
        held_out_note = f"leave-one-out over {left_out['n']} published networks on this host"
    header = TableHeader(
        device=f"Coral Edge TPU, {clock_mhz} MHz",
        source="simulated",
        host=host,
        runtime="oneshot_ednas.latency.edgetpu, calibrated on public measurements",
        date=(date or datetime.date.today()).isoformat(),
        rows=len(rows),
        note=note,
        space=space.name,
        image_height=image_size[0],
        image_width=image_size[1],
        out_channels=dict(out_channels),
        fixed_ms=tpu.fixed_ms,
        input_ms_per_byte=tpu.input_ms_per_byte,
        output_ms_per_byte=tpu.output_ms_per_byte,
        cache_bytes=tpu.cache_bytes,
        streaming_ms_per_byte=tpu.streaming_ms_per_byte,
        held_out_mape=left_out.get("mape"),
        held_out_spearman=left_out.get("spearman"),
        held_out_networks=left_out.get("n"),
        held_out_note=held_out_note,
    )
    return LatencyTable(header, rows, f"simulated {space.name} {image_size[0]}x{image_size[1]}")
