"""A multi-trial search on a tabular benchmark: trials are looked up or predicted, not trained."""

import datetime
import json
from pathlib import Path
from typing import Any

from oneshot_ednas.benchmark.settings import training_differences
from oneshot_ednas.benchmark.surrogate import BenchmarkTrainer
from oneshot_ednas.benchmark.table import Benchmark
from oneshot_ednas.config import ExperimentConfig
from oneshot_ednas.deploy import file_digest
from oneshot_ednas.multi_trial.search import (
    MultiTrialSearch,
    keep_pick,
    search_cost,
    summary,
)
from oneshot_ednas.multi_trial.trials import TrialStore
from oneshot_ednas.run_folder import Problem, versions
from oneshot_ednas.store import write_json
from oneshot_ednas.workers import SerialExecutor, Workers

EVENTS_PER_COMMIT = 200
"""A search that is killed repeats at most so many events, in a second or two."""


class BenchmarkSearch(Problem):
    """Searches with the outcomes of a benchmark, without data and training."""

    def __init__(self, config: ExperimentConfig, folder: Path, path: Path) -> None:
        """Load and check config and benchmark.

        Args:
            config: the config; its method is `evolution` or `random`.
            folder: the run folder; need not exist yet.
            path: the benchmark file.

        Raises:
            ValueError: for whatever is wrong in config or benchmark, or if trials of the config
                are trained in another way than those of the benchmark; names the key.
            FileNotFoundError: for a missing file.
        """
        super().__init__(config, folder)
        self.path, self.digest = path, file_digest(path)
        self.benchmark = Benchmark.load(path)
        if self.benchmark.space != self.space:
            raise ValueError(
                f"{path} is of space {self.benchmark.space.name}, the config's space "
                f"{self.space.name} is another; search with the benchmark's own config"
            )
        differing = training_differences(self.benchmark.config, config)
        if differing:
            raise ValueError(
                f"{path}: its trainings were made with other settings: {', '.join(differing)}; "
                f"search with the benchmark's own config"
            )

    @property
    def _contents(self) -> dict[Path, tuple[str, str]]:
        text = json.dumps({"benchmark": self.digest}, indent=1) + "\n"
        return {self.files.data: ("benchmark", text), **super()._contents}

    def run(self) -> dict[str, Any]:
        """Search, and write `results.json`; returns it.

        Raises:
            Interrupted: after Ctrl-C.
        """
        trainer = BenchmarkTrainer(self.benchmark)
        workers = Workers(SerialExecutor(), 1)
        with (
            self.timed("search"),
            TrialStore(self.files.trials, commit_every=EVENTS_PER_COMMIT) as store,
        ):
            MultiTrialSearch(self, store, trainer).run(workers)
        trials = list(store.trials.values())
        chosen = keep_pick(self, trials)
        outcome = trainer(chosen.architecture, chosen.seed)
        assert outcome.test_metrics is not None
        macs, seconds = search_cost(trials)
        results = {
            "method": self.config.method,
            "space": self.space.name,
            "table": self.table.name,
            "target_ms": self.target_ms,
            "benchmark": {"file": self.path.name, "sha256": self.digest},
            **self.figures(chosen.architecture, [outcome.test_metrics]),
            "trials": summary(trials, self.target_ms),
            "baselines": {},
            "cost": {
                "search_macs": macs,
                "search_seconds": seconds,
                "retrain_macs": 0.0,
                "retrain_seconds": 0.0,
            },
            "seconds": self.seconds,
            "seed": self.config.seed,
            "date": datetime.date.today().isoformat(),
            "versions": versions(self.device),
        }
        write_json(self.files.results, results)
        return results
