"""Opens TFLite interpreters, and times the models of a bundle on the machine that it runs on.

    python measure.py BUNDLE --out FILE.jsonl [--edgetpu]

A stand-alone file: Python 3.7 or newer, numpy, and tflite_runtime or ai_edge_litert. A bundle
holds a copy of it beside `manifest.json` and the models.

FILE grows by one line of JSON per model and round, flushed to the disk, so that the same command
goes on after Ctrl-C, a crash or a power cut. The interpreter lives in a process of its own: a
model that crashes it or hangs costs that one line, and is tried again at the next start. Rounds
go over all models in turn, so that slow drift of the machine hits all of them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fnmatch
import gc
import importlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 1
UNIT = "ms"
INFORMATION = ("python", "numpy", "date")
"""Fields of a session that may change within a file; the others tell machine and runtime."""
KERNELS = {
    "default": "AUTO",
    "builtin": "BUILTIN_WITHOUT_DEFAULT_DELEGATES",
    "reference": "BUILTIN_REF",
}
"""Op resolvers of the interpreter; the default one applies XNNPACK where the runtime has it."""
EDGETPU_LIBRARY = {"Darwin": "libedgetpu.1.dylib", "Windows": "edgetpu.dll"}.get(
    platform.system(), "libedgetpu.so.1"
)
MEMORY_BYTES = 2 * 2**30
"""What the interpreter process may take, on Linux: a model that wants more fails, and not the
machine."""
TIME_LIMIT_S = 60.0
"""Beyond the time a request was given, a silent interpreter process is ended after this."""
RESTART_PAUSES_S = (0.0, 1.0, 3.0, 10.0)
"""Waits before each try to start a lost one again: a device needs a moment to come back."""
MAX_FIRST_FAILURES = 10
"""When so many models fail before any runs, the delegate and the interpreter do not go together."""
CORAL_PACKAGES = 'Python 3.7 to 3.9 and pip install "tflite-runtime<=2.9.1" "numpy<2"'
"""Goes together with the libedgetpu of Coral's Debian packages."""
_SERVE = "--serve"
_SESSION_START = b'{"type": "session"'


class MissingRuntime(ValueError):  # noqa: N818
    """No interpreter or delegate works here; the message says the cure."""


class Failure(RuntimeError):  # noqa: N818
    """A model could not be measured."""


class Runtime(NamedTuple):
    """A package that runs TFLite models."""

    name: str
    version: str
    module: Any
    """Its module `interpreter`: Interpreter, load_delegate, OpResolverType."""


def find_runtime() -> Runtime:
    """The first of tflite_runtime and ai_edge_litert that works.

    Raises:
        MissingRuntime: if neither does.
    """
    problems = []
    for name in ("tflite_runtime", "ai_edge_litert"):
        try:
            version = getattr(importlib.import_module(name), "__version__", "unknown")
            numpy = importlib.import_module("numpy").__version__
            # Built for numpy 1, these import beside numpy 2 and fail once an interpreter is made.
            if name == "tflite_runtime" and _numbers(version) < [2, 15] and _numbers(numpy) >= [2]:
                problems.append(
                    f"tflite_runtime {version} does not work with numpy {numpy} "
                    f'(_ARRAY_API not found): pip install "numpy<2"'
                )
                continue
            module = importlib.import_module(name + ".interpreter")
        except ImportError as error:
            if error.name != name:
                problems.append(f"{name} is installed but does not import: {error}")
            continue
        return Runtime(name, version, module)
    problems.append(
        f"no TFLite interpreter is installed for Python {platform.python_version()}: "
        f"pip install ai-edge-litert (Python 3.9 or newer); for a Coral with its stock "
        f"libedgetpu, {CORAL_PACKAGES}"
    )
    raise MissingRuntime(problems[0])


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def load_delegate(library: str) -> Any:
    """The delegate in a shared library.

    Raises:
        MissingRuntime: if there is no such library, no device, or no interpreter.
    """
    runtime = find_runtime()
    try:
        return runtime.module.load_delegate(library)
    except OSError as error:
        problem = f"cannot open the delegate ({error})"
        cure = (
            "install the Edge TPU runtime, libedgetpu1-std (250 MHz) or libedgetpu1-max (500 MHz) "
            "of Coral's Debian packages, or name the file with --delegate"
        )
    except AttributeError as error:
        problem, cure = f"{library} is no delegate ({error})", "name another with --delegate"
    except ValueError as error:
        problem = " ".join(str(error).split())
        cure = (
            "is the Edge TPU plugged in, may this user open it (group plugdev for USB, "
            "/dev/apex_0 for PCIe), and does no other program use it?"
        )
    raise MissingRuntime(f"{problem}: {cure}")


def open_interpreter(
    model: str | Path | bytes,
    *,
    threads: int = 1,
    delegate: str | None = None,
    kernels: str = "default",
) -> Any:
    """An interpreter with its tensors allocated.

    Args:
        model: a `.tflite` file, or its bytes.
        threads: threads of the kernels on the CPU.
        delegate: shared library of a delegate; it is loaded for this interpreter alone.
        kernels: a key of `KERNELS`.

    Raises:
        MissingRuntime: if there is no interpreter, or no such delegate.
        ValueError, RuntimeError: from the runtime, for a model that it cannot run.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels: expected one of {', '.join(KERNELS)}, got {kernels!r}")
    runtime = find_runtime()
    source = {"model_content": model} if isinstance(model, bytes) else {"model_path": str(model)}
    interpreter = runtime.module.Interpreter(
        num_threads=threads,
        experimental_delegates=[load_delegate(delegate)] if delegate else None,
        experimental_op_resolver_type=getattr(runtime.module.OpResolverType, KERNELS[kernels]),
        **source,
    )
    interpreter.allocate_tensors()
    return interpreter


def fill_inputs(interpreter: Any, seed: int = 0) -> None:
    """Set every input to random integers over the whole range of its type."""
    import numpy as np

    generator = np.random.RandomState(seed)
    for tensor in interpreter.get_input_details():
        limits = np.iinfo(tensor["dtype"])
        values = generator.randint(limits.min, limits.max + 1, tensor["shape"], tensor["dtype"])
        interpreter.set_tensor(tensor["index"], values)


def time_invocations(
    interpreter: Any,
    *,
    runs: int = 30,
    warmup: int = 5,
    min_seconds: float = 0.0,
    max_seconds: float = 10.0,
) -> list[float]:
    """Milliseconds of each `invoke`, on the inputs as they are.

    Args:
        interpreter: with its tensors allocated.
        runs: invocations to time.
        warmup: invocations before these; an Edge TPU loads the weights in the first.
        min_seconds: go on until the timed ones add up to this.
        max_seconds: stop, after one at least, when they have added up to this.
    """
    invoke, clock = interpreter.invoke, time.perf_counter
    for _ in range(warmup):
        invoke()
    times: list[float] = []
    total = 0.0
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        while not times or (total < max_seconds and (len(times) < runs or total < min_seconds)):
            start = clock()
            invoke()
            seconds = clock() - start
            times.append(1000 * seconds)
            total += seconds
    finally:
        if was_enabled:
            gc.enable()
    return times


def summarize(times: list[float]) -> dict[str, Any]:
    """Median, half the interquartile range and minimum."""
    import numpy as np

    low, median, high = (float(value) for value in np.percentile(times, [25, 50, 75]))
    values = {"median_ms": median, "spread_ms": (high - low) / 2, "min_ms": min(times)}
    return {"runs": len(times), **{name: round(value, 6) for name, value in values.items()}}


def describe_session(settings: dict[str, Any]) -> dict[str, Any]:
    """What a file of measurements says of where they come from; no name of a host or user.

    Args:
        settings: bundle, device, delegate, kernels, threads, clock_mhz and compiler.
    """
    runtime = find_runtime()
    delegate = settings["delegate"] or "CPU"
    board = (
        _find("/proc/device-tree/model", r"([^\0]+)")
        or _find("/proc/cpuinfo", r"model name\s*:\s*(.+)")
        or platform.processor()
        or platform.machine()
    )
    system = _find("/etc/os-release", r'PRETTY_NAME="?([^"\n]+)') or platform.platform(terse=True)
    return {
        "type": "session",
        "format": FORMAT,
        "unit": UNIT,
        **settings,
        "device": settings["device"] or ("Coral Edge TPU" if "edgetpu" in delegate else delegate),
        "machine": f"{board}, {platform.machine()}, {system}",
        "host": board,
        "runtime": runtime.name,
        "runtime_version": runtime.version,
        "python": platform.python_version(),
        "numpy": importlib.import_module("numpy").__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _find(path: str, pattern: str) -> str | None:
    text = Path(path).read_text(errors="replace") if os.path.isfile(path) else ""
    found = re.search(pattern, text)
    return found.group(1).strip() if found else None


class InterpreterProcess:
    """This file as a child process, which opens one model after the other and times it.

    Requests and replies are lines of JSON: the settings of `describe_session`, answered by the
    session; then paths with the arguments of `time_invocations`, answered by the summary.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        """Start it; raises MissingRuntime as `find_runtime` and `load_delegate` do."""
        self._settings = settings
        self.session = self._start()

    def measure(self, path: Path | None, timing: dict[str, Any]) -> dict[str, Any]:
        """Summary of the times of a model.

        Raises:
            MissingRuntime: if the interpreter or delegate, once lost, cannot be had again.
            Failure: if there is no path, or the model fails, crashes or hangs.
        """
        if path is None:
            raise Failure("not compiled for the delegate, see compiled.jsonl")
        if self._process.poll() is not None:
            self.close()  # it may have died by itself, between two models
            self._restart()
        reply = self._reply({"path": str(path), **timing}, timing["max_seconds"])
        if "error" in reply:
            # What failed may have left the runtime or the device in disorder.
            self.close()
            raise Failure(reply["error"])
        return reply

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._noise):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]

    def _restart(self) -> None:
        for pause in RESTART_PAUSES_S:
            time.sleep(pause)
            try:
                self._start()
            except (MissingRuntime, Failure) as error:
                problem = str(error)
            else:
                return
        raise MissingRuntime(problem)

    def _start(self) -> dict[str, Any]:
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            universal_newlines=True,
            start_new_session=True,  # Ctrl-C is for the parent alone
        )
        reply = self._reply(self._settings)
        if "error" in reply:
            self.close()
            raise (MissingRuntime if reply.get("is_missing") else Failure)(reply["error"])
        return reply

    def _reply(self, request: dict[str, Any], seconds: float = 0.0) -> dict[str, Any]:
        limit = TIME_LIMIT_S + seconds
        start, timer = time.monotonic(), threading.Timer(limit, self._process.kill)
        timer.start()
        line = ""
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass  # it is dead, as the missing line says
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return dict(json.loads(line))
        if time.monotonic() - start >= limit:
            return {"error": f"no answer in {limit:.0f} s"}
        code = self._process.wait()
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self._noise.seek(0)
        noise = self._noise.read().decode("utf-8", "replace").split("\n")
        last = next((f": {text.strip()}" for text in reversed(noise) if text.strip()), "")
        return {"error": f"the interpreter's process ended with {cause}{last}"}


def serve() -> int:
    """Be the child of an `InterpreterProcess`."""
    # What lies beside this file must not stand in for a module that the runtime imports.
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    if sys.platform == "linux":
        _limit_memory()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    settings: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = _time_model(request, settings) if settings else _begin(request)
        except Exception as error:
            is_missing = isinstance(error, MissingRuntime)
            text = str(error) if is_missing else f"{type(error).__name__}: {error}"
            reply = {"error": " ".join(text.split()), "is_missing": is_missing}
        settings = settings or request
        print(json.dumps(reply), file=replies, flush=True)
    return 0


def _limit_memory() -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or hard > MEMORY_BYTES:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, hard))


def _begin(settings: dict[str, Any]) -> dict[str, Any]:
    if settings["delegate"]:
        load_delegate(settings["delegate"])  # a missing device is told before the first model
    return describe_session(settings)


def _time_model(request: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    options = {name: settings[name] for name in ("threads", "delegate", "kernels")}
    interpreter = open_interpreter(request.pop("path"), **options)
    fill_inputs(interpreter)
    return summarize(time_invocations(interpreter, **request))


def read_bundle(
    folder: Path, pattern: str, delegate: str | None
) -> tuple[str, dict[str, Path | None], str | None]:
    """The digest, the file to open for each model whose name matches, and the compiler.

    For a delegate the files are the compiled ones, none where the compiler made none.

    Raises:
        FileNotFoundError: if the folder is no bundle, or is not compiled for an Edge TPU.
        ValueError: for damaged files, or if no model matches.
    """
    path, compiled_path = folder / "manifest.json", folder / "compiled.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no bundle: it holds no {path.name}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        digest, models = manifest["digest"], fnmatch.filter(manifest["models"], pattern)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no manifest of a bundle: {error!r}") from None
    if not models:
        raise ValueError(f"no model of {folder} matches {pattern}")
    if delegate and compiled_path.is_file():
        records = read_records(compiled_path)[0]
        compiled = {str(r.get("model")): r for r in records if "compiled" in r}
        compilers = sorted({str(record.get("compiler")) for record in compiled.values()})
        found = {m: str(compiled[m]["compiled"]) for m in models if m in compiled}
        files = {m: _inside(folder, found[m]) if m in found else None for m in models}
        return digest, files, ", ".join(compilers) or None
    if delegate and "edgetpu" in delegate:
        raise FileNotFoundError(
            f"{folder} holds no {compiled_path.name}, and an Edge TPU runs compiled models only: "
            f"run the step compile on the bundle where edgetpu_compiler is installed"
        )
    return digest, {model: _inside(folder, model) for model in models}, None


def _inside(folder: Path, name: str) -> Path:
    """A file of the bundle, which no path or link may leave."""
    if "\0" in name or folder.resolve() not in (folder / name).resolve().parents:
        raise ValueError(f"{folder}: expected paths and links inside the bundle, got {name!r}")
    return folder / name


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of JSON lines, and its size without a torn last line."""
    *lines, torn = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{path}:{number}: expected JSON, got {line[:60]!r}") from None
    return records, path.stat().st_size - len(torn)


def read_done(path: Path, session: dict[str, Any]) -> tuple[set[tuple[str, int]], set[str], int]:
    """What a file of measurements holds.

    Returns:
        Models and rounds that were measured, models that failed, and the size without a torn line.

    Raises:
        ValueError: if it is damaged, something else, or from another machine or runtime.
    """
    if not path.exists():
        return set(), set(), 0
    with path.open("rb") as file:
        if not _SESSION_START.startswith(file.read(len(_SESSION_START))):
            raise ValueError(f"{path} is no file of measurements: name another with --out")
    records, size = read_records(path)
    identity = [name for name in session if name not in INFORMATION]
    for record in (record for record in records if record.get("type") == "session"):
        for name in identity:
            if record.get(name) != session[name]:
                raise ValueError(
                    f"{path} holds measurements with {name} {record.get(name)!r}, these would have "
                    f"{session[name]!r}, and a table takes one only: name another with --out"
                )
    done = {(r["model"], r["round"]) for r in records if r.get("type") == "model"}
    return done, {r["model"] for r in records if r.get("type") == "failure"}, size


def measure_bundle(args: argparse.Namespace) -> None:
    """Append to a file of measurements what it lacks; raises Failure at the end if some failed."""
    digest, files, compiler = read_bundle(args.bundle, args.models, args.delegate)
    settings = {name: getattr(args, name) for name in ("device", "delegate", "kernels", "threads")}
    settings.update(bundle=digest, compiler=compiler, clock_mhz=args.clock_mhz)
    timing = {n: getattr(args, n) for n in ("runs", "warmup", "min_seconds", "max_seconds")}
    failures: list[str] = []
    with contextlib.closing(InterpreterProcess(settings)) as process:
        done, failed, size = read_done(args.out, process.session)
        todo = [(r, m) for r in range(args.rounds) for m in files if (m, r) not in done]
        # What failed before may fail again and take the device along: the others go first.
        todo.sort(key=lambda pair: pair[1] in failed or files[pair[1]] is None)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        start = shown = time.monotonic()
        with args.out.open("ab", buffering=0) as file:
            file.truncate(size)
            file.seek(size)
            for count, (round_, model) in enumerate(todo):
                if not count:
                    _append(file, process.session)
                record = {"type": "model", "model": model, "round": round_}
                try:
                    record.update(process.measure(files[model], timing))
                except Failure as error:
                    record.update(type="failure", error=str(error))
                    failures.append(f"{model}: {error}")
                    _say(f"failed: {failures[-1]}")
                _append(file, record)
                if args.delegate and files[model] and not done:
                    _check_first(failures, count + 1)
                now = time.monotonic()
                if now - shown > 10 or count + 1 == len(todo):
                    shown, left = now, (now - start) / (count + 1) * (len(todo) - count - 1)
                    _say(
                        f"round {round_ + 1} of {args.rounds}: {count + 1} of {len(todo)} "
                        f"measured, {len(failures)} failed, about {left / 60:.0f} min left"
                    )
    if not todo:
        _say(f"nothing to do: {args.out} holds {args.rounds} rounds of {len(files)} models")
    if failures:
        cure = "the same command tries them again"
        missing = list(files.values()).count(None)
        if missing:
            cure = f"{missing} models are not compiled: run the step compile on the bundle"
        raise Failure(
            f"{len(failures)} of {len(todo)} measurements failed, first {failures[0]}; {cure}"
        )


def _check_first(failures: list[str], count: int) -> None:
    if len(failures) == count == MAX_FIRST_FAILURES:
        raise Failure(
            f"none of the first {count} models runs, the last is {failures[-1]}; the interpreter "
            f"may not fit the delegate: for a Coral with its stock libedgetpu, {CORAL_PACKAGES}"
        )


def _append(file: Any, record: dict[str, Any]) -> None:
    if os.fstat(file.fileno()).st_size != file.tell():
        raise RuntimeError(f"another process writes to {file.name}: end one of the two")
    data = memoryview(json.dumps(record).encode("ascii") + b"\n")
    while data:
        data = data[file.write(data) :]  # unbuffered, so it may take a part only
    os.fsync(file.fileno())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="measure.py",
        description="Time the models of a bundle. The same command goes on where it stopped.",
        epilog="example: python3 measure.py . --out coral.jsonl --edgetpu --clock-mhz 500",
    )
    add = parser.add_argument
    add("bundle", type=Path, help="folder with manifest.json")
    add("--out", type=Path, required=True, metavar="FILE", help="file of JSON lines to append to")
    add(
        "--edgetpu", action="store_const", dest="delegate", const=EDGETPU_LIBRARY, help="on a Coral"
    )
    add("--delegate", metavar="LIBRARY", help="on the device of another delegate")
    add("--device", metavar="TEXT", help="its name, such as 'Coral USB Accelerator'")
    add("--clock-mhz", type=_positive, help="500 with libedgetpu1-max, 250 with libedgetpu1-std")
    add("--kernels", choices=list(KERNELS), default="default", help="those of the CPU")
    add("--threads", type=_positive, default=1, help="on the CPU (1)")
    add("--models", default="*", metavar="GLOB", help="measure a part")
    add("--rounds", type=_positive, default=3, help="over all models (3)")
    add("--runs", type=_positive, default=30, help="timed invocations per model and round (30)")
    add("--warmup", type=_positive, default=5, help="invocations before these (5)")
    add("--min-seconds", type=float, default=0.05, help="runs beyond --runs up to this sum (0.05)")
    add("--max-seconds", type=float, default=10.0, help="no more runs beyond this sum (10)")
    args = parser.parse_args(argv)
    try:
        measure_bundle(args)
    except KeyboardInterrupt:
        _say(f"stopped: {args.out} keeps what was measured, the same command goes on")
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        _say(f"error: {error}")
        return 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1
    return 0


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == [_SERVE] else main())
