"""Memory and open files do not grow with the steps: a line is fitted to what a process holds."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

MIB = 2**20
MAX_SHARE = 0.01
"""Growth over a whole run that is let pass, as a share of what the process holds."""
MAX_NOISE = 8 * MIB
"""Growth that may be noise: below three standard errors, and below this."""

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@dataclass(frozen=True)
class Growth:
    """A line through what was held, from the end of the first quarter on: caches fill before."""

    held: float
    """Mean."""
    rise: float
    """Of the line, over as many samples as there were in all."""
    error: float
    """Standard error of the rise."""

    @classmethod
    def of(cls, held: list[int]) -> "Growth":
        rest = np.array(held[len(held) // 4 :], dtype=float)
        line = stats.linregress(np.arange(len(rest)), rest)
        return cls(rest.mean(), line.slope * len(held), line.stderr * len(held))

    @property
    def is_flat(self) -> bool:
        is_small = self.rise < MAX_SHARE * self.held
        return is_small or (self.rise < 3 * self.error and self.rise < MAX_NOISE)


def series(*, leak: float = 0.0, noise: float = 0.0, num: int = 100, seed: int = 0) -> list[int]:
    """400 MiB after a warm-up of 20 samples, with a leak per sample, in bytes."""
    steps = np.arange(num)
    warm_up = 100 * MIB * np.minimum(steps / 20, 1)
    drawn = np.random.default_rng(seed).normal(0, noise, num)
    return [int(x) for x in 300 * MIB + warm_up + leak * steps + drawn]


@pytest.mark.parametrize(
    ("leak", "noise", "is_flat"),
    [
        (0, 0, True),
        (0, 2 * MIB, True),
        (0.03 * MIB, 0, True),  # 3 MiB in all, below 1 %
        (0.05 * MIB, 0, False),  # 5 MiB
        (0.05 * MIB, 0.2 * MIB, False),
        (-1 * MIB, 0, True),
        (1 * MIB, 5 * MIB, False),
    ],
)
def test_a_line_tells_a_leak_from_a_warm_up_and_from_noise(leak, noise, is_flat):
    assert Growth.of(series(leak=leak, noise=noise)).is_flat == is_flat


def test_the_rise_is_that_of_the_line():
    growth = Growth.of(series(leak=1000, num=200))
    assert growth.rise == pytest.approx(200_000, rel=1e-3)


def test_flat_series_with_noise_are_flat_whatever_the_draw():
    assert all(Growth.of(series(noise=MIB, seed=seed)).is_flat for seed in range(50))


PROGRAM = """
import json, os, sys
import torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tiny import CPU, make_tiny
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.peak_memory import resident_memory
from oneshot_ednas.retrain import RetrainConfig, StandAloneTraining, train_to_end
from oneshot_ednas.training import LoopConfig

kind, steps, every = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
held, files, leak, tiny = [], [], [], make_tiny()
loop = LoopConfig(log_every=every, checkpoint_every=every)
folder, checkpoint = Path("run"), Path("run/one.safetensors")

def sample():
    held.append(resident_memory())
    files.append(len(os.listdir("/proc/self/fd")))

def leaking(take_step):
    def take(step):
        leak.append((torch.zeros(20_000), open(os.devnull)))
        return take_step(step)
    return take

if kind == "search":
    search = tiny.search(
        steps=steps, warmup_fraction=0.0, num_validations=0, loop=loop
    )
    search.run(folder, checkpoint, lambda: ({}, 0.0), sample)
else:
    training = StandAloneTraining(
        RetrainConfig(steps=steps, batch_size=4, loop=loop), tiny.space,
        tiny.space.base_architecture, tiny.tasks, tiny.train, stage="one",
        augmentation=AugmentConfig(flip=True), seed=0, device=CPU,
    )
    if kind == "leak":
        training.take_step = leaking(training.take_step)
    train_to_end(training, folder=folder, checkpoint=checkpoint, on_save=sample)
print(json.dumps({"held": held, "files": files}))
"""


def run(folder: Path, kind: str, steps: int, every: int) -> tuple[Growth, list[int]]:
    """What a process of its own holds while it takes these steps."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), kind, str(steps), str(every)],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    growth, files = Growth.of(found["held"]), found["files"]
    print(f"{kind}: {len(files)} samples, {growth}, open files {files[0]} to {files[-1]}")
    return growth, files[len(files) // 4 :]


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "steps", "every"),
    [("search", 2000, 20), ("retrain", 2000, 20), ("search", 60, 1)],
    ids=["search", "retrain", "checkpoints"],
)
def test_memory_and_open_files_stay_as_they_are(tmp_path, kind, steps, every):
    growth, files = run(tmp_path, kind, steps, every)
    assert growth.is_flat, growth
    assert len(set(files)) == 1, files


@needs_linux
@pytest.mark.slow
def test_tensors_and_files_that_are_kept_are_found(tmp_path):
    growth, files = run(tmp_path, "leak", 200, 2)
    assert not growth.is_flat, growth
    assert growth.rise == pytest.approx(200 * 80_000, rel=0.3)
    assert files[-1] == files[0] + 2 * (len(files) - 1)
