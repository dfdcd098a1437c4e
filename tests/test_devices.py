"""Every step runs on any device: nothing mixes devices, and the host waits nowhere in a step.

See `device_program`, which runs the steps on a device that has a name and nothing else.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no device to simulate one with",
)
COLLAPSE = "relaxation.py:entropies"
"""Asked for once per `log_every` steps, and so at step 0."""
HARD = "relaxation.py:gates"
"""Which ops a step runs with gradients is the host's to know: one transfer per alpha step."""
READS: dict[str, set[str]] = {
    "retrain": set(),
    "uncertainty": set(),
    "dwa": set(),
    "weights": set(),
    "alpha": {COLLAPSE, HARD},
    "joint": {COLLAPSE, HARD},
}
"""By the kind of step, the functions of the package that read values from the device."""


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    kinds = ["mixing", "reading", *READS]
    done = subprocess.run(
        [sys.executable, "device_program.py", *kinds],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_mixed_devices_and_reads_would_be_seen(found):
    assert "FakeTensorDeviceMismatchError" in found["mixing"]["error"]
    assert found["reading"] == {"error": None, "reads": ["outside"]}


@pytest.mark.parametrize("kind", READS)
def test_a_step_runs_on_any_device(found, kind):
    assert found[kind]["error"] is None, found[kind]["error"]


@pytest.mark.parametrize("kind", READS)
def test_a_step_waits_for_the_device_only_where_it_is_known_to(found, kind):
    assert set(found[kind]["reads"]) <= READS[kind]
