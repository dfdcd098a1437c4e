"""Checks of what a run can compute on, and of what exported files run on."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from oneshot_ednas import measure
from oneshot_ednas.doctor.finding import Finding, ask, good, note, problem, version_of
from oneshot_ednas.export.edgetpu import COMPILER, find_compiler
from oneshot_ednas.measure import EDGETPU_LIBRARY, MissingRuntime, find_runtime
from oneshot_ednas.peak_memory import gib
from oneshot_ednas.processes import num_cores

CORAL_USB = {("1a6e", "089a"): "not yet initialised", ("18d1", "9302"): "initialised"}
"""Vendor and product of a Coral USB Accelerator: it changes them when its firmware is loaded."""
CORAL_PCI = ("0x1ac1", "0x089a")


def check_cpu() -> Iterator[Finding]:
    """Cores and half precision."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags", "").split()
    fast = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    yield good("cpu", f"{name}, {num_cores()} cores, bfloat16 {' '.join(fast) or 'emulated'}")


def check_cuda() -> Iterator[Finding]:
    """NVIDIA's GPUs, and why torch does not use them if it does not."""
    has_node = Path("/dev/nvidiactl").exists()
    program = shutil.which("nvidia-smi")
    if program is None:
        if has_node:
            yield problem(
                "cuda",
                "a driver is loaded, but there is no nvidia-smi to ask",
                "install the driver's tools, or give the container NVIDIA_DRIVER_CAPABILITIES="
                "compute,utility",
            )
        else:
            yield note(
                "cuda",
                "no NVIDIA driver: runs go to the CPU",
                "none needed without an NVIDIA GPU; else install its driver, and start a container "
                "with --gpus all",
            )
        return
    query = "--query-gpu=name,driver_version,memory.total,memory.free,compute_cap"
    rows = ask(program, query, "--format=csv,noheader,nounits").splitlines()
    for index, row in enumerate(rows):
        name, driver, total, free, capability = (part.strip() for part in row.split(","))
        bf16 = "bfloat16" if int(capability.split(".")[0]) >= 8 else "no fast bfloat16"
        said = f"{name}, driver {driver}, {free} of {total} MiB free, {bf16}"
        reason = why_no_cuda()
        if reason is None:
            yield good(f"cuda:{index}", said)
        else:
            yield problem(f"cuda:{index}", f"{said}; torch does not use it", reason)


def why_no_cuda() -> str | None:
    """What to do so that torch uses the GPU; None if it does. CUDA is not initialised here."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA: pip install torch from pytorch.org's CUDA index"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides it: unset it"
    # Counts by the driver's management library: a process that has initialised CUDA cannot fork.
    if torch.cuda.device_count() == 0:
        return f"the driver is too old for CUDA {torch.version.cuda}, or damaged: update it"
    return None


def check_mps() -> Iterator[Finding]:
    """Apple's GPUs."""
    if torch.backends.mps.is_available():
        said = f"Metal, {gib(torch.mps.recommended_max_memory())} recommended at most, no float64"
        yield good("mps", said)
    elif torch.backends.mps.is_built():
        yield note("mps", "torch has it, macOS does not", "update macOS to 14 or newer")


def check_interpreter() -> Iterator[Finding]:
    """What runs exported files."""
    tensorflow = version_of("tensorflow") or version_of("tensorflow-cpu")
    beside = f"; tensorflow {tensorflow} is there for comparisons only" if tensorflow else ""
    try:
        runtime = find_runtime()
    except MissingRuntime as missing:
        yield note("interpreter", f"none{beside}", str(missing))
    else:
        others = [
            f"{name} {version}"
            for name in ("tflite_runtime", "ai_edge_litert")
            if name != runtime.name and (version := version_of(name.replace("_", "-")))
        ]
        unused = f", not {others[0]}" if others else ""
        yield good("interpreter", f"{runtime.name} {runtime.version}{unused}{beside}")


def coral_devices(
    usb: Path = Path("/sys/bus/usb/devices"), pci: Path = Path("/sys/bus/pci/devices")
) -> list[str]:
    """Edge TPUs that are plugged in, in words."""
    found = []
    for device in sorted(usb.glob("*")) if usb.is_dir() else []:
        state = CORAL_USB.get((_word(device / "idVendor"), _word(device / "idProduct")))
        if state is not None:
            speed = _word(device / "speed")
            slow = " (USB 2: transfers take several times as long)" if speed == "480" else ""
            found.append(f"USB Accelerator, {state}{slow}")
    for device in sorted(pci.glob("*")) if pci.is_dir() else []:
        if (_word(device / "vendor"), _word(device / "device")) == CORAL_PCI:
            found.append("PCIe module")
    return found


def _word(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""


def check_edgetpu() -> Iterator[Finding]:
    """The Edge TPU: its library, a device, and whether one opens the other."""
    devices = coral_devices()
    plugged = ", ".join(devices) or "no Edge TPU is plugged in"
    program = f"import ctypes; ctypes.CDLL({EDGETPU_LIBRARY!r})"
    try:
        ask(sys.executable, "-c", program)
    except RuntimeError as error:
        finding = problem if devices else note
        yield finding(
            "edge tpu",
            f"{plugged}; {EDGETPU_LIBRARY} does not load ({error})",
            "to measure on a Coral, install libedgetpu1-std of Coral's Debian packages; latencies "
            "of the shipped tables need none",
        )
        return
    if not devices:
        yield note(
            "edge tpu", f"{EDGETPU_LIBRARY} loads; {plugged}", "plug one in to measure on it"
        )
        return
    # As a file: importing the package would import torch too.
    place = measure.__file__
    program = f"import runpy; runpy.run_path({place!r})['load_delegate']({EDGETPU_LIBRARY!r})"
    try:
        ask(sys.executable, "-c", program)
    except RuntimeError as error:
        yield problem(
            "edge tpu",
            f"{plugged}; the delegate does not open it ({error})",
            "add this user to the group plugdev (USB) or apex (PCIe), log in anew, and see that no "
            "other program uses it",
        )
    else:
        yield good("edge tpu", f"{plugged}; {EDGETPU_LIBRARY} opens it")


def check_edgetpu_compiler() -> Iterator[Finding]:
    """The Edge TPU compiler, for x86-64 Linux alone."""
    path = find_compiler()
    if path is None:
        is_possible = sys.platform == "linux" and platform.machine() == "x86_64"
        where = "" if is_possible else ", on x86-64 Linux (it runs nowhere else)"
        yield note(
            COMPILER,
            "not installed: exported files are checked, not compiled",
            f"install edgetpu-compiler of Coral's Debian packages{where}",
        )
        return
    yield good(COMPILER, f"{ask(path, '--version').splitlines()[0]} ({path})")
