"""Fit the Edge TPU simulator's constants to published latencies of whole networks.

    python tools/fit_edgetpu.py networks.json --out latency_tables/edgetpu_constants.json

Prints the error of the fit and of leave-one-out per group; writes constants, both errors and
provenance. The search is a deterministic coordinate descent within physical bounds.
"""

import argparse
import datetime
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from oneshot_ednas.latency.edgetpu import ELEMENTWISE_OPS, EdgeTpuConstants, HostConstants, work
from oneshot_ednas.latency.published import PublishedNetwork, predict_ms, read_networks, score

# start, lowest, highest. The bounds are what public sources and datasheets leave open:
# 0.97-1.02 TMAC/s sustained, 0-10 us per op, 10-32 bytes/ns on chip, 0.3-0.8 ms fixed over USB.
BOUNDS: Mapping[str, tuple[float, float, float]] = {
    "conv_ns_per_unit": (1.0, 1.0, 1.05),
    "depthwise_ns_per_unit": (8.0, 6.0, 10.0),
    "activation_bytes_per_ns": (16.0, 10.0, 32.0),
    "fc_weight_bytes_per_ns": (8.0, 2.0, 16.0),
    "compute_overhead_ns": (8000.0, 500.0, 10000.0),
    "elementwise_overhead_ns": (3000.0, 1000.0, 10000.0),
    "usb3-desktop.fixed_ms": (0.5, 0.3, 0.8),
    "usb3-desktop.input_ns_per_byte": (1.9, 1.0, 3.0),
    "usb3-desktop.output_ns_per_byte": (10.0, 3.0, 12.0),
    "usb3-desktop.streaming_ns_per_byte": (2.0, 1.5, 3.0),
    "pcie-devboard.fixed_ms": (0.1, 0.1, 0.5),
    "pcie-devboard.input_ns_per_byte": (3.0, 0.3, 6.0),
    "pcie-devboard.streaming_ns_per_byte": (2.5, 1.5, 3.5),
    "pcie-desktop.fixed_ms": (0.5, 0.1, 0.8),
    "pcie-desktop.output_ns_per_byte": (7.0, 2.0, 12.0),
}
FITTED_HOSTS = ("usb3-desktop", "pcie-devboard", "pcie-desktop")
CACHE_BYTES = 6.9 * 2**20
USB2_BYTE_NS = {"input": 28.0, "streaming": 31.0}
PCIE_STREAMING_NS = 2.6
SMOOTHING = 0.03
STEPS = (0.3, 0.1, 0.03, 0.01)
MAX_SWEEPS = 40
NOTES = {
    "cache_bytes": "typical of the 5.0-8.0 MiB that compiled models report; not fitted",
    "pcie-devboard.output": "assumed equal to its input: every network in the fit returns 1 kB",
    "pcie-desktop.input": "assumed equal to USB 3: every network in the fit sends 12 kB",
    "pcie-desktop.streaming": "2.6 ns/B as published for PCIe: no network in the fit streams",
    "usb2-raspberry-pi": "streaming 31 ns/B and input 28 ns/B as published for USB 2; fixed as USB "
    "3, output as USB 3 plus the same extra per byte as the input: assumed, not fitted",
}

Parameters = dict[str, float]


def constants_from(p: Mapping[str, float]) -> EdgeTpuConstants:
    """All constants from the free parameters and the stated assumptions."""

    def host(name: str, **assumed: float) -> HostConstants:
        fitted = {k.partition(".")[2]: v for k, v in p.items() if k.startswith(f"{name}.")}
        return HostConstants(**{**assumed, **fitted})

    usb3 = host("usb3-desktop")
    hosts = {
        "usb3-desktop": usb3,
        "pcie-devboard": host(
            "pcie-devboard", output_ns_per_byte=p["pcie-devboard.input_ns_per_byte"]
        ),
        "pcie-desktop": host(
            "pcie-desktop",
            input_ns_per_byte=usb3.input_ns_per_byte,
            streaming_ns_per_byte=PCIE_STREAMING_NS,
        ),
        "usb2-raspberry-pi": HostConstants(
            fixed_ms=usb3.fixed_ms,
            input_ns_per_byte=USB2_BYTE_NS["input"],
            output_ns_per_byte=usb3.output_ns_per_byte
            + (USB2_BYTE_NS["input"] - usb3.input_ns_per_byte),
            streaming_ns_per_byte=USB2_BYTE_NS["streaming"],
        ),
    }
    chip = {name: value for name, value in p.items() if "." not in name}
    return EdgeTpuConstants(**chip, cache_bytes=CACHE_BYTES, hosts=hosts)


class Features:
    """The networks as arrays, so that one prediction of all costs microseconds."""

    def __init__(self, networks: Sequence[PublishedNetwork]) -> None:
        layers = [(i, layer) for i, net in enumerate(networks) for layer in net.layers]
        self.owner = np.array([i for i, _ in layers])
        self.work = np.array([work(layer) for _, layer in layers], dtype=float).T
        self.elementwise = np.array([layer.op in ELEMENTWISE_OPS for _, layer in layers])
        self.host = np.array([FITTED_HOSTS.index(net.host) for net in networks])
        self.bytes = np.array(
            [(n.input_bytes, n.output_bytes, n.offchip_param_bytes or 0.0) for n in networks]
        )
        self.measured = np.array([net.measured_ms for net in networks])
        sizes = Counter(net.group for net in networks)
        # Between one vote per network and one per group: 48 near-equal chains must not decide all.
        self.weight = np.array([1 / math.sqrt(sizes[net.group]) for net in networks])

    def predict(self, p: Mapping[str, float]) -> np.ndarray:
        """Latency of every network in ms; the same formula as the package's, on arrays."""
        c = constants_from(p)
        conv, depthwise, activation, weights = self.work
        busy = np.maximum.reduce(
            [
                c.conv_ns_per_unit * conv,
                c.depthwise_ns_per_unit * depthwise,
                activation / c.activation_bytes_per_ns,
                weights / c.fc_weight_bytes_per_ns,
            ]
        )
        busy += np.where(self.elementwise, c.elementwise_overhead_ns, c.compute_overhead_ns)
        chip_ms = np.bincount(self.owner, busy, minlength=len(self.host)) * 1e-6
        hosts = np.array([list(asdict(c.hosts[name]).values()) for name in FITTED_HOSTS])[self.host]
        return chip_ms + hosts[:, 0] + (hosts[:, 1:] * self.bytes).sum(1) * 1e-6

    def loss(self, p: Mapping[str, float]) -> float:
        """Weighted mean of relative errors, rounded off near zero."""
        error = self.predict(p) / self.measured - 1
        return float((self.weight * np.hypot(error, SMOOTHING)).sum() / self.weight.sum())


def fit(features: Features, start: Parameters) -> Parameters:
    """Coordinate descent by factors, coarse to fine, inside the bounds."""
    best, best_loss = dict(start), features.loss(start)
    for step in STEPS:
        for _ in range(MAX_SWEEPS):
            before = best_loss
            for name, (_, low, high) in BOUNDS.items():
                for factor in (1 + step, 1 / (1 + step)):
                    trial = {**best, name: min(high, max(low, best[name] * factor))}
                    if (loss := features.loss(trial)) < best_loss - 1e-7:
                        best, best_loss = trial, loss
                        break
            if best_loss == before:
                break
    return best


def leave_one_out(networks: Sequence[PublishedNetwork], start: Parameters) -> dict[str, Any]:
    """Score of each network under constants fitted to all the others, each fit from scratch."""
    predicted_ms = []
    for i, network in enumerate(networks):
        rest = Features([*networks[:i], *networks[i + 1 :]])
        predicted_ms.append(predict_ms(network, constants_from(fit(rest, start))))
    return score(networks, predicted_ms)


def print_score(title: str, report: Mapping[str, Any]) -> None:
    """One line per group."""
    print(title)
    for name, row in [("all", report["all"]), *report["groups"].items()]:
        rank = "-" if row["spearman"] is None else f"{row['spearman']:.3f}"
        print(
            f"  {name:10s} n {row['n']:3d}  MAPE {row['mape']:5.1f} %  "
            f"median {row['median_ape']:5.1f} %  max {row['max_ape']:5.1f} %  Spearman {rank}"
        )


def main() -> None:
    """Read networks, fit, report, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", type=Path, help="JSON with published latencies")
    parser.add_argument("--out", type=Path, required=True, help="constants JSON to write")
    arguments = parser.parse_args()
    networks = read_networks(arguments.networks)
    start = {name: value for name, (value, _, _) in BOUNDS.items()}
    parameters = fit(Features(networks), start)
    parameters = {name: float(f"{value:.4g}") for name, value in parameters.items()}
    constants = constants_from(parameters)
    fitted = score(networks, [predict_ms(network, constants) for network in networks])
    left_out = leave_one_out(networks, start)
    print_score("fit", fitted)
    print_score("leave-one-out", left_out)
    chip = {name: value for name, value in asdict(constants).items() if isinstance(value, float)}
    content = {
        "chip": chip,
        "hosts": {name: asdict(host) for name, host in constants.hosts.items()},
        "provenance": {
            "device": "Coral Edge TPU, 500 MHz; simulated, calibrated on public measurements",
            "data": arguments.networks.name,
            "num_networks": len(networks),
            "date": datetime.date.today().isoformat(),
            "script": "tools/fit_edgetpu.py",
            "method": "coordinate descent in bounds on the mean of sqrt(e^2 + 0.03^2), e the "
            "relative error, networks weighted by 1/sqrt(size of their group)",
            "units": "one unit: one step of the 16 tiles, about 1 ns at 500 MHz; else in the names",
            "bounds": {name: [low, high] for name, (_, low, high) in BOUNDS.items()},
            "assumptions": NOTES,
        },
        "fit": fitted,
        "leave_one_out": left_out,
    }
    arguments.out.write_text(json.dumps(_rounded(content), indent=2) + "\n", encoding="utf-8")
    print(f"wrote {arguments.out}")


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
