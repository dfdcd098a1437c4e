"""Run folders written without training, for the tests of the comparison."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from conftest import SMALL_SPACE
from tiny import CONFIG

from oneshot_ednas.config import ExperimentConfig
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.multi_trial.trials import Trial, TrialStore
from oneshot_ednas.reward import accuracy_product, reward
from oneshot_ednas.schema import dump_yaml, parse_yaml
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.store import write_json

CHANNELS = {"segmentation": 10, "depth": 1}
QUALITY = {"one_shot": 1.05, "evolution": 1.04, "random": 1.0, "base": 0.95, "random_network": 0.9}
SPENT = {"one_shot": 1.0, "evolution": 8.0, "random": 8.0}
"""Search cost, in 10^15 multiply-adds."""


def metrics_of(quality: float) -> dict[str, dict[str, float]]:
    """Metrics whose accuracy product grows in proportion to a quality."""
    return {
        "segmentation": {"miou": 0.42 * quality, "pixel_accuracy": 0.8 * quality},
        "depth": {"absolute_error": 3.0 / quality, "relative_error": 0.2 / quality, "rmse": 6.0},
    }


class Recorder:
    """Writes run folders of one experiment; change what it holds to write other ones."""

    def __init__(self, table: LatencyTable) -> None:
        self.config = parse_yaml(CONFIG, ExperimentConfig, source="config")
        self.table, self.space = table, SearchSpace.from_yaml(SMALL_SPACE)
        self.data = {"train": "a" * 64, "test": "b" * 64}
        self.num_trials = 40
        self.noise = 0.01

    def write(
        self,
        folder: Path,
        method: str = "one_shot",
        seed: int = 0,
        *,
        quality: float | None = None,
        is_finished: bool = True,
        baselines: tuple[str, ...] = ("base", "random"),
    ) -> Path:
        """One run; with a quality every training reaches exactly that."""
        rng = np.random.default_rng([seed, *method.encode()])
        config = replace(self.config, method=method, seed=seed, baselines=baselines)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_yaml(config))
        (folder / "space.yaml").write_text(self.space.to_yaml())
        self.table.save(folder / "latency_table.csv")
        write_json(folder / "data.json", self.data)
        parts = {"weights": 20, "alpha": 8, "validation": 4}
        frames = {name: [f"{seed}_{i}" for i in range(n)] for name, n in parts.items()}
        write_json(folder / "splits.json", frames)
        if not is_finished:
            return folder
        of_seed = np.random.default_rng(seed)  # baselines are the same in all runs of a seed
        found = self._figures(rng, method, 2, quality)
        kinds = {"base": "base", "random": "random_network"}
        results: dict[str, Any] = {
            "method": method,
            "seed": seed,
            **found,
            "baselines": {name: self._figures(of_seed, kinds[name], 1, None) for name in baselines},
            "seconds": {"search": 500.0, "baseline.base": 60.0, "baseline.random": 55.0},
            "cost": {
                "search_macs": SPENT[method] * 1e15,
                "search_seconds": 600 * SPENT[method],
                "retrain_macs": 0.1e15,
                "retrain_seconds": 120.0,
            },
        }
        if method == "one_shot":
            self._write_supernet(folder, rng, found)
        else:
            found |= self._write_trials(folder, rng, method, seed)
            results |= found
        write_json(folder / "results.json", results)
        return folder

    def _figures(
        self, rng: np.random.Generator, method: str, num_seeds: int, quality: float | None
    ) -> dict[str, Any]:
        architecture = self.space.base_architecture
        while not architecture or (
            method != "base" and not 4.9 <= self.latency_ms(architecture) <= 5.0
        ):
            architecture = self.space.sample(rng)
        of_run = rng.normal()
        latency_ms, target_ms = self.latency_ms(architecture), self.config.latency.target_ms
        qualities = [
            quality or QUALITY[method] + self.noise * (of_run + 0.3 * rng.normal())
            for _ in range(num_seeds)
        ]
        rewards = [
            reward(accuracy_product(metrics_of(q)), latency_ms, target_ms) for q in qualities
        ]
        return {
            "architecture": str(architecture),
            "latency_ms": latency_ms,
            "is_inside_target": latency_ms <= target_ms,
            "parameters": int(rng.integers(20_000, 40_000)),
            "gmacs": 0.01 * latency_ms,
            "reward": float(np.mean(rewards)),
            "reward_per_seed": rewards,
            "metrics": metrics_of(float(np.mean(qualities))),
            "metrics_std": None,
        }

    def latency_ms(self, architecture: Any) -> float:
        return self.table.latency_ms(self.space, architecture, CHANNELS)

    def _write_supernet(
        self, folder: Path, rng: np.random.Generator, found: dict[str, Any]
    ) -> None:
        lines = [
            {
                "stage": "search",
                "step": step,
                "validation/reward": 0.5 + 0.05 * step,
                "validation/macs": share * SPENT["one_shot"] * 1e15,
            }
            for step, share in ((2, 0.25), (4, 0.75), (5, 1.0))
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
        candidates = [
            {
                "latency_ms": found["latency_ms"] - 0.1 * rng.random(),
                "accuracy": 0.8 * found["reward"] - 0.01 * i,
            }
            for i in range(8)
        ]
        write_json(folder / "candidates.json", {"candidates": candidates})

    def _write_trials(
        self, folder: Path, rng: np.random.Generator, method: str, seed: int
    ) -> dict[str, Any]:
        store = TrialStore(folder / "trials.sqlite", commit_every=10_000)
        best: Trial | None = None
        for number in range(self.num_trials):
            architecture = self.space.sample(rng)
            latency_ms = self.latency_ms(architecture)
            drift = 0.1 * number / self.num_trials if method == "evolution" else 0.0
            metrics = metrics_of(0.85 + drift + 0.03 * rng.normal() + 0.05 * (latency_ms - 5))
            accuracy = accuracy_product(metrics)
            trial = Trial(
                number=number,
                architecture=architecture,
                choices=self.space.encode(architecture),
                seed=number,
                state="running",
                proposed=2 * number,
                latency_ms=latency_ms,
            )
            store.propose(trial)
            trial = replace(
                trial,
                state="done",
                ended=2 * number + 1,
                metrics=metrics,
                accuracy=accuracy,
                reward=reward(accuracy, latency_ms, self.config.latency.target_ms),
                seconds=600 * SPENT[method] / self.num_trials,
                cpu_seconds=600 * SPENT[method] / self.num_trials,
                macs=1e15 * SPENT[method] / self.num_trials,
            )
            store.end(trial)
            inside = latency_ms <= self.config.latency.target_ms
            if inside and (best is None or trial.reward > best.reward):
                best = trial
        store.close()
        if best is None:
            return {}
        return {"architecture": str(best.architecture), "latency_ms": best.latency_ms}
