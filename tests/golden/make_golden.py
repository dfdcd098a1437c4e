"""Makes the golden artefacts of the installed version: `python make_golden.py tests/golden/0.2.0`.

Each release adds a folder under its version; test_golden.py finds it there. Folders of older
versions are never made again: they show that what users have on their disks still loads. It takes a
minute, needs no data but the rendered one, and uses the command line alone, so that any version can
run it.
"""

import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors import safe_open

SPACE = """\
name: golden
stem_filters: 4
options:
  ops: [ibn, fused_ibn]
  kernel_sizes: [3]
blocks:
  - {stride: 1, kernel_size: 3, filters: 4, expand_ratio: 1, options: {ops: [ibn]}}
  - stride: 2
    kernel_size: 3
    filters: 4
    expand_ratio: 2
    options: {expand_ratios: [2, 3], filters: [2, 4]}
fusion: {tap_blocks: [1, 2], num_levels: 2, channels: 4, num_repeats: 1}
head: {num_convs: 1}
"""
DATA = """\
seed: 3
device: cpu
data: {source: streets, height: 32, width: 32, train_frames: 16, test_frames: 4, workers: 1}
tasks:
  segmentation: {kind: segmentation, num_classes: 10}
  depth: {kind: depth, loss_weight: 0.1, relative_weight: 1.0, scale: 10.0}
"""
EXPERIMENT = """\
space: space.yaml
latency: {table: latency_table.csv, target_ms: 0.615, allow_uncalibrated: true}
search:
  steps: 4
  batch_size: 2
  num_validations: 1
  loop: {log_every: 1, checkpoint_every: 2}
derive: {num_candidates: 2, num_samples: 0, calibration_batches: 1, batch_size: 4, num_budgets: 2}
retrain:
  steps: 3
  batch_size: 2
  calibration_batches: 1
  loop: {log_every: 1, checkpoint_every: 1}
multi_trial: {num_trials: 4, steps: 1, population_size: 2, tournament_size: 2}
baselines: [base]
"""
SHARING = """\
backbone: {name: ednas, space: space.yaml}
latency: {table: latency_table.csv, target_ms: 0.615, allow_uncalibrated: true}
branching: {steps: 4, batch_size: 2, objective: budget}
operators: {pretrain_steps: 1, policy_steps: 2, batch_size: 2}
retrain: {steps: 2, batch_size: 2}
derive: {calibration_batches: 1, batch_size: 4}
"""
PLACE = "GOLDEN"
"""Stands in a run's config for the folder of the artefacts."""
LEFT_OUT = ("tensorboard", "predictions.png", "report.html", ".lock", "*.previous.safetensors")
"""Of runs, what later versions only write."""


def make(folder: Path) -> None:
    """Make the artefacts of this version in a new folder."""
    folder.mkdir(parents=True)
    (folder / "space.yaml").write_text(SPACE)
    (folder / "experiment.yaml").write_text(DATA + EXPERIMENT)
    (folder / "sharing.yaml").write_text(DATA + SHARING)
    tasks = ("--tasks", "segmentation=10,depth=1")
    size = ("--image-size", "32", "32")
    table = folder / "latency_table.csv"
    command("latency", "table", folder / "space.yaml", *size, *tasks, "--out", table)
    config = folder / "experiment.yaml"
    for kind, options in (("run", ()), ("evolve", ("--set", "baselines=[]"))):
        made = folder.parent / f".{kind}"
        command(kind, config, "--out", made, *options)
        shutil.copytree(made, folder / kind, ignore=shutil.ignore_patterns(*LEFT_OUT))
        shutil.rmtree(made)
        held = folder / kind / "config.yaml"
        # A config names its files by where they are; of a copy that is elsewhere.
        held.write_text(held.read_text().replace(str(folder.absolute()), PLACE))
    shutil.rmtree(folder / "evolve" / "checkpoints")
    (folder / "facts.json").write_text(json.dumps(facts(folder), indent=1) + "\n")


def command(*arguments: object) -> None:
    """Run a command of the installed version."""
    line = [sys.executable, "-m", "oneshot_ednas", *map(str, arguments)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def facts(folder: Path) -> dict[str, Any]:
    """What a later version must find in the artefacts, told without this version's own readers."""
    results = {kind: json.loads((folder / kind / "results.json").read_text()) for kind in RUNS}
    with closing(sqlite3.connect(folder / "evolve" / "trials.sqlite")) as database:
        (num_trials,) = database.execute("SELECT count(*) FROM trials").fetchone()
    return {
        "versions": results["run"]["versions"],
        "checkpoints": {
            path.stem: digest(path) for path in sorted((folder / "run/checkpoints").iterdir())
        },
        "num_trials": num_trials,
        "results": {
            kind: {
                name: found[name] for name in ("architecture", "latency_ms", "reward", "metrics")
            }
            for kind, found in results.items()
        },
        "base_latency_ms": results["run"]["baselines"]["base"]["latency_ms"],
    }


RUNS = ("run", "evolve")


def digest(path: Path) -> str:
    """SHA-256 of all tensors of a checkpoint, whatever their names and order."""
    with safe_open(path, framework="np") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    parts = sorted(hashlib.sha256(tensor.tobytes()).hexdigest() for tensor in tensors)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
