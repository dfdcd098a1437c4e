"""A tiny experiment for the tests of whole stages: 3,072 architectures, 32x32 street scenes."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from conftest import SMALL_SPACE, toy_table

from oneshot_ednas.config import load_config
from oneshot_ednas.data.packed import PackedSplit, streets_split
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.pipeline import OneShotRun, run_all
from oneshot_ednas.search import OneShotSearch, SearchConfig
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.tasks import Task, TaskConfig, make_tasks
from oneshot_ednas.training import OptimizerConfig

CPU = torch.device("cpu")
SIZE = (32, 32)
TARGET_MS = 5.0
"""In the middle of the tiny table's 4.36 to 5.72 ms."""
FAST = OptimizerConfig(learning_rate=0.01, warmup_fraction=0.0)

CONFIG = """\
seed: 3
device: cpu
space: space.yaml
data:
  source: streets
  height: 32
  width: 32
  train_frames: 32
  test_frames: 6
  augment: {flip: true, scale: [1.0, 1.3], brightness: 0.2}
  workers: 1
tasks:
  segmentation: {kind: segmentation, num_classes: 10}
  depth: {kind: depth, loss_weight: 0.1, relative_weight: 1.0, scale: 10.0}
latency: {table: table.csv, target_ms: 5.0}
search:
  steps: 6
  batch_size: 4
  loop: {log_every: 1, checkpoint_every: 2}
  sandwich: false
derive: {num_candidates: 2, num_samples: 2, calibration_batches: 2, batch_size: 8, num_budgets: 4}
retrain:
  steps: 5
  batch_size: 4
  num_seeds: 2
  calibration_batches: 2
  loop: {log_every: 1, checkpoint_every: 2}
baselines: [base, random]
"""


@dataclass(frozen=True)
class Tiny:
    """What every stage needs."""

    space: SearchSpace
    tasks: dict[str, Task]
    table: LatencyTable
    train: PackedSplit

    def search(self, *, seed: int = 0, target_ms: float = TARGET_MS, **settings) -> OneShotSearch:
        settings = {"steps": 6, "batch_size": 4, "optimizer": FAST, "sandwich": False} | settings
        return OneShotSearch(
            SearchConfig(**settings),
            self.space,
            self.tasks,
            self.table,
            target_ms=target_ms,
            splits={
                "weights": self.train.subset(range(16)),
                "alpha": self.train.subset(range(16, 24)),
            },
            augmentation=AugmentConfig(flip=True, brightness=0.2),
            seed=seed,
            device=CPU,
        )


def tiny_table(space: SearchSpace) -> LatencyTable:
    channels = {"segmentation": 10, "depth": 1}
    table = toy_table(space, SIZE, out_channels=channels)
    return LatencyTable(replace(table.header, held_out_mape=5.0), table.rows, "table.csv")


def make_tiny() -> Tiny:
    space = SearchSpace.from_yaml(SMALL_SPACE)
    tasks = {
        "segmentation": TaskConfig(kind="segmentation", num_classes=10),
        "depth": TaskConfig(kind="depth", loss_weight=0.1, relative_weight=1.0, scale=10.0),
    }
    train = streets_split("train", 32, height=SIZE[0], width=SIZE[1], workers=1)
    return Tiny(space, make_tasks(tasks), tiny_table(space), train)


def write_project(folder: Path, table: LatencyTable) -> Path:
    """Config, space and table beside each other, as a user would keep them."""
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "space.yaml").write_text(SMALL_SPACE)
    table.save(folder / "table.csv")
    return folder


def new_run(project: Path, out: Path, *, overrides=(), resume: bool = False) -> OneShotRun:
    path = project / "config.yaml"
    run = OneShotRun(load_config(path, overrides), out)
    run.open(resume=resume)
    return run


def finish_run(project: Path, out: Path) -> Path:
    """A whole run, from search to report."""
    run_all(new_run(project, out))
    return out
