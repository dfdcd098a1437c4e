"""Checks of Python, the package, and the packages and programs it uses."""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import oneshot_ednas
from oneshot_ednas import __version__
from oneshot_ednas.doctor.finding import Finding, ask, good, note, problem, version_of
from oneshot_ednas.processes import num_cores
from oneshot_ednas.schema import is_shipped, shipped

MIN_TORCH = (2, 4)
NEEDED_FILES = (
    "configs/demo.yaml",
    "configs/spaces/ednas_b0.yaml",
    "configs/architectures/ednas_table6.json",
    "latency_tables/edgetpu_sim_256x256.csv",
    "benchmarks",
)


def check_python() -> Iterator[Finding]:
    """Version of Python, and where it is."""
    found = f"{platform.python_version()} ({platform.machine()}, {sys.executable})"
    yield good("python", found)  # an older one does not get as far as this


def check_package() -> Iterator[Finding]:
    """The package, and the files that come with it."""
    place = Path(oneshot_ednas.__file__).parent
    installed = version_of("oneshot-ednas")
    if installed is not None and installed != __version__:
        yield note(
            "oneshot_ednas",
            f"{__version__} in {place}, but {installed} is what is installed",
            "install it again: pip install -e .",
        )
    else:
        yield good("oneshot_ednas", f"{__version__} in {place}")
    missing = [name for name in NEEDED_FILES if not is_shipped(name)]
    if missing:
        yield problem(
            "shipped files",
            f"missing: {', '.join(missing)}",
            "install the package again; a copy of its Python files alone is not enough",
        )
    else:
        count = len(list(shipped("latency_tables").glob("*.csv")))
        yield good("shipped files", f"configs, {count} latency tables, benchmarks")


def check_torch() -> Iterator[Finding]:
    """Build of torch, and its threads against the cores."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    found = f"{torch.__version__} ({build}, {torch.backends.cpu.get_cpu_capability()})"
    if version < MIN_TORCH:
        yield problem("torch", found, f"install torch {'.'.join(map(str, MIN_TORCH))} or newer")
    else:
        yield good("torch", found)
    threads, cores = torch.get_num_threads(), num_cores()
    asked = os.environ.get("OMP_NUM_THREADS")
    said = f"{threads} of torch, {cores} cores, OMP_NUM_THREADS {asked or 'not set'}"
    if threads > cores:
        yield note(
            "threads",
            said,
            f"more threads than cores wait for each other: OMP_NUM_THREADS={cores}",
        )
    else:
        yield good("threads", f"{said}; with --workers each process has 1")


def check_packages() -> Iterator[Finding]:
    """What needs a package of its own."""
    for package, purpose, extra, is_needed in (
        ("pyglove", "multi-trial search", None, True),
        ("ray", "trials on several machines, --workers ray", "ray", False),
        ("h5py", "the MATLAB 7.3 file of NYU Depth v2", "matlab", False),
    ):
        version = version_of(package)
        if version is not None and importlib.util.find_spec(package) is not None:
            yield good(package, f"{version}, for {purpose}")
            continue
        wanted = f"'oneshot-ednas[{extra}]'" if extra else package
        finding = problem if is_needed else note
        yield finding(package, f"not installed; for {purpose}", f"pip install {wanted}")


def check_compiler() -> Iterator[Finding]:
    """A C++ compiler, which torch.compile needs on a CPU."""
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name]
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        yield note(
            "C++ compiler",
            f"none of {', '.join(names)}; torch.compile falls back to plain torch",
            "install g++ (Debian: apt-get install g++) if you use torch.compile",
        )
    else:
        yield good(
            "C++ compiler", f"{path}, for torch.compile: {ask(path, '--version').splitlines()[0]}"
        )
