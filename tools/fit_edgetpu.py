"""Fit the Edge TPU simulator's constants to published latencies of whole networks.

    python tools/fit_edgetpu.py networks.json --out latency_tables/edgetpu_constants.json
    python tools/fit_edgetpu.py networks.json --variants

The first prints the error of the fit and of leave-one-out per group, and writes constants, their
ranges over refits to resampled networks, both errors and provenance. The second changes one thing
at a time in the model and prints what that does to the leave-one-out error.
"""

import argparse
import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from oneshot_ednas.latency.edgetpu import (
    ON_CHIP_BYTES,
    WINDOW_OPS,
    EdgeTpu,
    EdgeTpuConstants,
    HostConstants,
    Layer,
    activation_bytes,
    work,
)
from oneshot_ednas.latency.published import PublishedNetwork, predict_ms, read_networks, score
from oneshot_ednas.store import write_json

Bounds = Mapping[str, tuple[float, float, float]]

# start, lowest, highest. The bounds of USB 3's fixed time and input are what was published for it;
# the others only keep refits to few networks sane. NOTES tells of the one that the fit ends on.
BOUNDS: Bounds = {
    "conv_ns_per_unit": (1.0, 0.9, 1.2),
    "depthwise_ns_per_unit": (8.0, 4.0, 16.0),
    "bytes_per_ns": (16.0, 8.0, 64.0),
    "window_overhead_ns": (15000.0, 1000.0, 40000.0),
    "usb3-desktop.fixed_ms": (0.5, 0.3, 0.8),
    "usb3-desktop.input_ns_per_byte": (1.9, 1.0, 3.0),
    "usb3-desktop.output_ns_per_byte": (10.0, 3.0, 20.0),
    "usb3-desktop.streaming_ns_per_byte": (2.0, 1.0, 4.0),
    "pcie-devboard.input_ns_per_byte": (3.0, 0.3, 12.0),
    "pcie-devboard.streaming_ns_per_byte": (2.5, 1.0, 4.0),
    "pcie-desktop.fixed_ms": (0.5, 0.1, 0.8),
    "pcie-desktop.output_ns_per_byte": (7.0, 2.0, 20.0),
}
FITTED_HOSTS = ("usb3-desktop", "pcie-devboard", "pcie-desktop")
CACHE_BYTES = 6.9 * 2**20
USB2_BYTE_NS = {"input": 28.0, "streaming": 31.0}
PCIE_STREAMING_NS = 2.6
SMOOTHING = 0.03
MAX_STEPS = 60
LOG_STEP = 1e-5
REFITS = 400
SEED = 0
NOTES = {
    "cache_bytes": "typical of the 5.0-8.0 MiB that compiled models report; not fitted",
    "pcie-devboard.fixed": "assumed equal to USB 3: fitted apart, it ends within 0.04 ms of it",
    "pcie-devboard.output": "assumed equal to its input: every network in the fit returns 1 kB",
    "pcie-desktop.fixed": "on its bound, the most that is published for any host: the small "
    "convolution chains that could tell scatter by 30 %, and without the bound predict worse",
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
            "pcie-devboard",
            fixed_ms=usb3.fixed_ms,
            output_ns_per_byte=p["pcie-devboard.input_ns_per_byte"],
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

    def __init__(
        self, networks: Sequence[PublishedNetwork], term: "Callable[[Layer], float] | None" = None
    ) -> None:
        """Take networks and, to try a variant, a further term per layer."""
        layers = [(i, layer) for i, net in enumerate(networks) for layer in net.layers]
        self.owner = np.array([i for i, _ in layers])
        self.work = np.array([work(layer) for _, layer in layers], dtype=float).T
        self.is_window = np.array([layer.op in WINDOW_OPS for _, layer in layers])
        self.host = np.array([FITTED_HOSTS.index(net.host) for net in networks])
        self.bytes = np.array(
            [(n.input_bytes, n.output_bytes, n.offchip_param_bytes or 0.0) for n in networks]
        )
        self.measured = np.array([net.measured_ms for net in networks])
        _, self.group = np.unique([net.group for net in networks], return_inverse=True)
        terms = [term(layer) if term else 0.0 for _, layer in layers]
        self.term = np.bincount(self.owner, terms, minlength=len(networks))

    def predict(self, p: Mapping[str, float]) -> np.ndarray:
        """Latency of every network in ms; the same formula as the package's, on arrays.

        A parameter `extra` is the weight in nanoseconds of the further term.
        """
        c = constants_from({name: value for name, value in p.items() if name != "extra"})
        conv, depthwise, moved = self.work
        busy = np.maximum.reduce(
            [
                c.conv_ns_per_unit * conv,
                c.depthwise_ns_per_unit * depthwise,
                moved / c.bytes_per_ns,
            ]
        )
        busy += c.window_overhead_ns * self.is_window
        chip_ns = np.bincount(self.owner, busy, minlength=len(self.host))
        chip_ns = chip_ns + p.get("extra", 0.0) * self.term
        hosts = np.array([list(asdict(c.hosts[name]).values()) for name in FITTED_HOSTS])[self.host]
        return chip_ns * 1e-6 + hosts[:, 0] + (hosts[:, 1:] * self.bytes).sum(1) * 1e-6

    def weight(self, votes: np.ndarray) -> np.ndarray:
        """Share of each network in the loss, given how often each one counts."""
        sizes = np.maximum(1, np.bincount(self.group, votes))
        # Between one vote per network and one per group: 48 near-equal chains must not decide all.
        weight = votes / np.sqrt(sizes[self.group])
        return weight / weight.sum()


def fit(
    features: Features,
    votes: np.ndarray | None = None,
    start: Mapping[str, float] | None = None,
    bounds: Bounds = BOUNDS,
) -> Parameters:
    """Parameters of least loss inside the bounds.

    The loss is the weighted mean of `sqrt(e^2 + SMOOTHING^2)`, e the relative error. The search is
    Levenberg-Marquardt on the logarithms of the parameters, reweighted in each step; parameters
    that a bound holds back sit the step out.

    Args:
        features: the networks.
        votes: how often each network counts; once each where not given.
        start: where to start; the bounds' own start where not given.
        bounds: start, lowest and highest value per parameter.
    """
    names = list(bounds)
    point, low, high = np.log([bounds[name] for name in names]).T
    if start is not None:
        point = np.clip(np.log([start[name] for name in names]), low, high)
    weight = features.weight(np.ones(len(features.host)) if votes is None else votes)

    def errors(logs: np.ndarray) -> np.ndarray:
        p = dict(zip(names, np.exp(logs).tolist(), strict=True))
        return features.predict(p) / features.measured - 1

    error, damping = errors(point), 1e-3
    loss = weight @ np.hypot(error, SMOOTHING)
    for _ in range(MAX_STEPS):
        nudges = LOG_STEP * np.eye(len(names))
        slopes = np.stack([(errors(point + nudge) - error) / LOG_STEP for nudge in nudges])
        scale = weight / np.hypot(error, SMOOTHING)
        gradient, curvature = slopes @ (scale * error), (slopes * scale) @ slopes.T
        is_held = ((point <= low) & (gradient > 0)) | ((point >= high) & (gradient < 0))
        free = np.flatnonzero(~is_held)
        before = loss
        while loss == before and damping < 1e8:
            damped = curvature + damping * np.diag(curvature.diagonal() + 1e-6)
            step = np.zeros(len(names))
            step[free] = -np.linalg.solve(damped[np.ix_(free, free)], gradient[free])
            trial = np.clip(point + step.clip(-1, 1), low, high)
            trial_error = errors(trial)
            trial_loss = weight @ np.hypot(trial_error, SMOOTHING)
            if trial_loss < loss:
                point, error, loss = trial, trial_error, trial_loss
            damping *= 0.1 if loss < before else 4
        if before - loss < 1e-8:
            break
    return dict(zip(names, np.exp(point).tolist(), strict=True))


def leave_one_out(features: Features, bounds: Bounds = BOUNDS) -> np.ndarray:
    """Latency of each network in ms under constants fitted to all the others."""
    start = fit(features, bounds=bounds)
    count = len(features.host)
    return np.array(
        [
            features.predict(fit(features, 1.0 - np.eye(count)[i], start, bounds))[i]
            for i in range(count)
        ]
    )


def bootstrap_ranges(features: Features) -> dict[str, tuple[float, float]]:
    """5 and 95 percent points of each parameter over refits to networks drawn with replacement.

    Groups keep their sizes.
    """
    generator = np.random.default_rng(SEED)
    start = fit(features)
    refits = []
    for _ in range(REFITS):
        votes = np.zeros(len(features.host))
        for group in np.unique(features.group):
            members = np.flatnonzero(features.group == group)
            np.add.at(votes, generator.choice(members, len(members)), 1)
        refits.append(fit(features, votes, start))
    return {
        name: (
            float(np.percentile([refit[name] for refit in refits], 5)),
            float(np.percentile([refit[name] for refit in refits], 95)),
        )
        for name in BOUNDS
    }


_ELEMENTWISE = ("add", "mul", "concatenation")


def _is(*ops: str) -> Callable[[Layer], float]:
    return lambda layer: float(layer.op in ops)


def _moved_by(*ops: str) -> Callable[[Layer], float]:
    return lambda layer: float(work(layer).moved_bytes * (layer.op in ops))


def _spilled_bytes(layer: Layer) -> float:
    return max(0, activation_bytes(layer) - ON_CHIP_BYTES)


def _padding_units(layer: Layer) -> float:
    """Units more with output channels padded to 64."""
    padded = layer._replace(out_channels=-(-layer.out_channels // 64) * 64)
    return work(padded).conv_units - work(layer).conv_units


def _wide_parameter_bytes(layer: Layer) -> float:
    is_wide = min(layer.in_channels, layer.out_channels, layer.out_height, layer.out_width) >= 64
    return is_wide * EdgeTpu.parameter_bytes(layer)


# What the model leaves out: bounds that are added to its own, and what a parameter `extra`, in ns,
# counts per layer.
VARIANTS: Mapping[str, tuple[Bounds, Callable[[Layer], float] | None]] = {
    "spill: per byte of input + output beyond 3 MiB": ({"extra": (0.3, 1e-4, 20)}, _spilled_bytes),
    "instructions: per op": ({"extra": (1000, 10, 40000)}, lambda layer: 1.0),
    "instructions: per byte of activations": ({"extra": (0.01, 1e-6, 1)}, activation_bytes),
    "parameters streamed again: per byte": ({"extra": (0.1, 1e-5, 10)}, EdgeTpu.parameter_bytes),
    "the same, 64 or more channels at 64x64 or more": (
        {"extra": (0.1, 1e-5, 10)},
        _wide_parameter_bytes,
    ),
    "overhead of convolutions": ({"extra": (1000, 10, 40000)}, _is("conv", "tconv", "fc")),
    "overhead of add, mul, concatenation": ({"extra": (1000, 10, 40000)}, _is(*_ELEMENTWISE)),
    "overhead of depthwise apart from pooling": ({"extra": (1000, 10, 40000)}, _is("dw")),
    "bandwidth of elementwise ops apart": ({"extra": (0.01, 1e-6, 1)}, _moved_by(*_ELEMENTWISE)),
    "bandwidth of fully connected ops apart": ({"extra": (0.01, 1e-6, 1)}, _moved_by("fc")),
    "output channels padded to 64": ({"extra": (0.1, 1e-4, 1.2)}, _padding_units),
    "fixed time of the Dev Board apart, ms": ({"pcie-devboard.fixed_ms": (0.5, 0.1, 0.8)}, None),
    "one overhead of all computing ops instead": (
        {"window_overhead_ns": (1e-3, 1e-3, 1e-3), "extra": (8000, 10, 40000)},
        _is("conv", "tconv", "fc", *WINDOW_OPS),
    ),
}


def compare_variants(networks: Sequence[PublishedNetwork]) -> None:
    """Print the leave-one-out error with one change at a time; `*` marks a value on its bound.

    The difference to the model is paired: 5 to 95 percent points of its mean over networks drawn
    with replacement, in points of MAPE.
    """
    groups = np.array([network.group for network in networks])
    measured = np.array([network.measured_ms for network in networks])
    is_coral = groups == "coral"

    def errors(predicted: np.ndarray) -> np.ndarray:
        return 100 * np.abs(predicted / measured - 1)

    def difference(values: np.ndarray) -> str:
        draws = np.random.default_rng(SEED).choice(values, (4000, len(values))).mean(1)
        low, high = np.percentile(draws, (5, 95))
        return f"{values.mean():+.2f} ({low:+.2f} to {high:+.2f})"

    model = errors(leave_one_out(Features(networks)))
    print("| left out: MAPE | value, ns | all | difference | coral | difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| the model | | {model.mean():.2f} | | {model[is_coral].mean():.2f} | |")
    for name, (added, term) in VARIANTS.items():
        bounds, features = {**BOUNDS, **added}, Features(networks, term)
        constant = list(added)[-1]
        _, low, high = bounds[constant]
        value = fit(features, bounds=bounds)[constant]
        on_bound = "" if 1.001 * low < value < high / 1.001 else "*"
        variant = errors(leave_one_out(features, bounds))
        print(
            f"| {name} | {value:.3g}{on_bound} | {variant.mean():.2f} "
            f"| {difference(variant - model)} "
            f"| {variant[is_coral].mean():.2f} | {difference((variant - model)[is_coral])} |"
        )


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
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="constants JSON to write")
    what.add_argument("--variants", action="store_true", help="try further terms instead")
    arguments = parser.parse_args()
    networks = read_networks(arguments.networks)
    if arguments.variants:
        compare_variants(networks)
        return
    features = Features(networks)
    parameters = {name: float(f"{value:.4g}") for name, value in fit(features).items()}
    constants = constants_from(parameters)
    ranges = bootstrap_ranges(features)
    fitted = score(networks, [predict_ms(network, constants) for network in networks])
    left_out = score(networks, leave_one_out(features).tolist())
    print_score("fit", fitted)
    print_score("leave-one-out", left_out)
    print(f"constants, and 5 to 95 % over {REFITS} refits to resampled networks")
    for name, (low, high) in ranges.items():
        print(f"  {name:36s} {parameters[name]:8.4g}  ({low:.4g} to {high:.4g})")
    chip = {name: value for name, value in asdict(constants).items() if isinstance(value, float)}
    content = {
        "chip": chip,
        "hosts": {name: asdict(host) for name, host in constants.hosts.items()},
        "ranges": {name: list(ends) for name, ends in ranges.items()},
        "provenance": {
            "device": "Coral Edge TPU, 500 MHz; simulated, calibrated on public measurements",
            "data": arguments.networks.name,
            "num_networks": len(networks),
            "date": datetime.date.today().isoformat(),
            "script": "tools/fit_edgetpu.py",
            "method": "Levenberg-Marquardt in bounds on the mean of sqrt(e^2 + 0.03^2), e the "
            "relative error, networks weighted by 1/sqrt(size of their group)",
            "ranges": f"5 and 95 percent points over {REFITS} refits (seed {SEED}) to networks "
            "drawn with replacement within their groups",
            "units": "one unit: one step of the 16 tiles, about 1 ns at 500 MHz; else in the names",
            "bounds": {name: [low, high] for name, (_, low, high) in BOUNDS.items()},
            "assumptions": NOTES,
        },
        "fit": fitted,
        "leave_one_out": left_out,
    }
    write_json(arguments.out, _rounded(content))
    print(f"wrote {arguments.out}")


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
