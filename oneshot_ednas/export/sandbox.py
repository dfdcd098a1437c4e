"""A `.tflite` file of which nobody knows who made it, tried in a process of its own.

Interpreters are written in C++ and trust their files: one that lies about a size may crash the
process that opens it, hang, or take all memory. So the file is opened and run once by a child,
which is this file as a script, with bounds on time and memory; what goes wrong there is one error
here.
"""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 60.0
"""Most networks for an Edge TPU take less than one, on a loaded machine too."""
MEBIBYTES = 2048
"""Beyond what the interpreter itself takes, which is some hundred."""
_REFUSED = 3
"""Exit status of the child if the interpreter raises an error."""
_MEASURE = Path(__file__).resolve().parent.parent / "measure.py"


def check_model(
    model: bytes,
    *,
    name: str = "model",
    kernels: str = "default",
    seconds: float = SECONDS,
    mebibytes: int = MEBIBYTES,
) -> None:
    """Open a model, allocate its tensors and run it once on zeros, in a child process.

    What passes can be opened here; the parent should open the very bytes that were checked.

    Args:
        model: content of a `.tflite` file.
        name: of the file, for messages.
        kernels: as of `oneshot_ednas.measure.open_interpreter`.
        seconds: how long that may take, the start of the process included.
        mebibytes: how much memory it may take (Linux only; elsewhere it has no bound).

    Raises:
        ValueError: if the interpreter refuses the file, crashes, takes too long or too much memory.
    """
    command = [sys.executable, "-P", __file__, kernels, str(mebibytes), str(int(seconds) + 1)]
    try:
        done = subprocess.run(
            command,
            input=model,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=seconds,
            # A thread per processor would only take memory.
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            _refusal(name, f"it was not opened and run in {seconds:g} s and {mebibytes} MiB")
        ) from None
    if done.returncode == 0:
        return
    said = done.stderr.decode("utf-8", "replace").splitlines()
    last = next((" ".join(line.split()) for line in reversed(said) if line.strip()), "")
    if done.returncode != _REFUSED:
        cause = f"exit status {done.returncode}"
        if done.returncode < 0:
            cause = f"signal {signal.Signals(-done.returncode).name}"
        last = f"its process ended with {cause}{f': {last}' if last else ''}"
    raise ValueError(_refusal(name, last[:300]))


def _refusal(name: str, reason: str) -> str:
    return (
        f"{name}: the TFLite interpreter cannot run it ({reason}); it is damaged or no model for "
        f"this interpreter: export it anew"
    )


# In the child -------------------------------------------------------------------------------


def _limit(mebibytes: int, seconds: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent's time limit is left
        return
    for what, limit in (
        (resource.RLIMIT_DATA, mebibytes * 2**20),
        (resource.RLIMIT_CPU, seconds),  # if the parent dies
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        if hard == resource.RLIM_INFINITY or limit <= hard:
            resource.setrlimit(what, (limit, hard))


def _load_measure() -> Any:
    # By its place: as a part of the package it would bring torch along.
    specification = importlib.util.spec_from_file_location("measure", _MEASURE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _main(kernels: str, mebibytes: str, seconds: str) -> int:
    import numpy as np

    measure = _load_measure()
    model = sys.stdin.buffer.read()
    measure.find_runtime()
    _limit(int(mebibytes), int(seconds))
    try:
        interpreter = measure.open_interpreter(model, kernels=kernels)
        for tensor in interpreter.get_input_details():
            interpreter.set_tensor(tensor["index"], np.zeros(tensor["shape"], tensor["dtype"]))
        interpreter.invoke()
        for tensor in interpreter.get_output_details():
            interpreter.get_tensor(tensor["index"])
    except Exception as error:
        text = " ".join(str(error).split())
        print(f"{type(error).__name__}: {text}" if text else type(error).__name__, file=sys.stderr)
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
