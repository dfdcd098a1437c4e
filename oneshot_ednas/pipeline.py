"""A run: the stages search, derive, retrain, evaluate and report on one self-contained folder.

Each stage reads what the one before wrote, so a run can be cut anywhere and go on.
"""

import datetime
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from oneshot_ednas import distributed
from oneshot_ednas.architecture import Architecture
from oneshot_ednas.config import ExperimentConfig, load_config
from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.deploy import deploy, file_digest
from oneshot_ednas.derive import (
    BudgetSearch,
    DerivedArchitecture,
    pareto_front,
    sample_within_budget,
)
from oneshot_ednas.export.edgetpu import find_compiler
from oneshot_ednas.export.quantize import IoType
from oneshot_ednas.models.network import Network
from oneshot_ednas.multi_trial.search import MultiTrialSearch, keep_pick, search_cost, summary
from oneshot_ednas.multi_trial.trials import TrialStore, read_trials
from oneshot_ednas.progress import progress_bar
from oneshot_ednas.ranking import Candidate, rank_candidates
from oneshot_ednas.report import RunPictures, write_report
from oneshot_ednas.retrain import Watch, retrain, unwatched
from oneshot_ednas.run_folder import Experiment, RunFiles, versions
from oneshot_ednas.schema import read_json
from oneshot_ednas.search import OneShotSearch, resume_search
from oneshot_ednas.store import write_json, write_text
from oneshot_ednas.training import (
    Interrupted,
    Metrics,
    StageLog,
    derived_seed,
    evaluate,
    note,
    numpy_generator,
    take_in_log,
    training_macs,
)
from oneshot_ednas.trial_job import run_trial
from oneshot_ednas.workers import SerialExecutor, Workers

NUM_PICTURES = 4


class Run(Experiment, ABC):
    """What the runs of all methods share: an architecture is found, retrained and evaluated."""

    workers = Workers(SerialExecutor(), 1)
    """What runs trials and retrainings; set it to another before `find` and `retrain`."""

    @abstractmethod
    def find(self) -> None:
        """Find the architecture to retrain, where that is not done."""

    @property
    @abstractmethod
    def _find_command(self) -> str:
        """The command that finds it, for messages."""

    @abstractmethod
    def _search_figures(self) -> dict[str, Any]:
        """What the results tell of the search."""

    @abstractmethod
    def _search_cost(self) -> tuple[float | None, float]:
        """Multiply-adds, None where they are not known, and seconds of the search."""

    def finish(self) -> dict[str, Any]:
        """The stages after the trainings; returns the results."""
        return self.evaluate()

    def retrain(self) -> None:
        """Train the derived architecture from scratch, once per seed, and the baselines."""
        architecture = self._derived_architecture()
        seeds = range(self.config.retrain.num_seeds)
        trainings = [(architecture, f"retrain.seed_{number}", number) for number in seeds]
        trainings += [(one, f"baseline.{name}", 0) for name, one in self.baselines.items()]
        if distributed.is_main():
            for _, stage, _ in trainings:
                self._take_in(stage)  # what a stopped run on workers left
        distributed.barrier()
        trainings = [training for training in trainings if not self._is_trained(training[1])]
        if isinstance(self.workers.executor, SerialExecutor):
            for architecture, stage, number in trainings:
                with self.timed(stage) as add_time:
                    self.train_network(
                        architecture,
                        stage,
                        number,
                        self.files.folder,
                        add_time,
                        watch=partial(self.watched, stage),
                    )
        else:
            self._train_on_workers(trainings)

    def train_network(
        self,
        architecture: Architecture,
        stage: str,
        number: int,
        log_folder: Path,
        on_save: Callable[[], None] = lambda: None,
        watch: Watch = unwatched,
    ) -> Network:
        """Train one network, or read it back.

        Args:
            architecture: what to train.
            stage: name of the training, for example `retrain.seed_0`.
            number: of the seed: 0 is the run's own, others are derived from it.
            log_folder: where the log goes.
            on_save: called after each checkpoint.
            watch: what the steps run in.

        Raises:
            Interrupted: after Ctrl-C, once the checkpoint is written.
            RuntimeError: if a loss is not finite.
        """
        return retrain(
            self.config.retrain,
            self.space,
            architecture,
            self.tasks,
            self.train,
            stage=stage,
            folder=log_folder,
            checkpoint=self.files.checkpoint(stage),
            augmentation=self.config.data.augment,
            # Not the next whole number, which is the seed of the next run.
            seed=derived_seed(self.config.seed, "retrain", number) if number else self.config.seed,
            device=self.device,
            on_save=on_save,
            watch=watch,
        )

    def _train_on_workers(self, trainings: Sequence[tuple[Architecture, str, int]]) -> None:
        """Train networks, several at a time, each with a log of its own.

        Raises:
            Interrupted: after Ctrl-C.
        """
        futures = {
            self.workers.executor.submit(train_job, self.files.folder, *training): training[1]
            for training in trainings
        }
        try:
            with progress_bar("trainings", len(futures)) as advance:
                for future in as_completed(futures):
                    future.result()
                    self._take_in(futures[future])
                    advance()
        except KeyboardInterrupt:
            raise Interrupted("stopped while networks were trained") from None

    def _take_in(self, stage: str) -> None:
        """Add log and time of a training that ran on a worker to those of the run."""
        part = self.files.stage(stage)
        if (part / "metrics.jsonl").exists():
            take_in_log(self.files.folder, part, stage)
        if (part / "seconds.json").exists():
            self.add_seconds(stage, read_json(part / "seconds.json"))
            (part / "seconds.json").unlink()

    def evaluate(self) -> dict[str, Any]:
        """Score the trained networks on the test split and write `results.json`.

        Raises:
            ValueError: if a network is not trained to its end.
        """
        architecture = self._derived_architecture()
        seeds = range(self.config.retrain.num_seeds)
        with self.timed("evaluate"):
            scores = [
                self._score(self._trained(architecture, f"retrain.seed_{number}", number))
                for number in seeds
            ]
            baselines = {
                name: self.figures(
                    baseline, [self._score(self._trained(baseline, f"baseline.{name}", 0))]
                )
                for name, baseline in self.baselines.items()
            }
        results = {
            "method": self.config.method,
            "space": self.space.name,
            "table": self.table.name,
            "target_ms": self.target_ms,
            **self.figures(architecture, scores),
            **self._search_figures(),
            "baselines": baselines,
            "cost": self._cost(architecture),
            "seconds": self.seconds,
            "memory": self.memory,
            "seed": self.config.seed,
            "num_frames": {"train": len(self.train), "test": len(self.test)},
            "date": datetime.date.today().isoformat(),
            "versions": versions(self.device),
        }
        write_json(self.files.results, results)
        with StageLog(self.files.folder, "test", total=1) as log:
            figures = {"reward": results["reward"], "latency_ms": results["latency_ms"]}
            for task, metrics in results["metrics"].items():
                figures |= {f"{task}/{name}": value for name, value in metrics.items()}
            log.scalars(0, figures)
        return results

    def _cost(self, architecture: Architecture) -> dict[str, float | None]:
        """Training multiply-adds and seconds, without baselines and evaluation."""
        config, seconds = self.config.retrain, self.seconds
        frames = config.steps * config.batch_size * config.num_seeds
        macs, search_seconds = self._search_cost()
        return {
            "search_macs": macs,
            "search_seconds": search_seconds,
            "retrain_macs": training_macs(self.macs(architecture), frames),
            "retrain_seconds": sum(
                # A kill right after the last checkpoint loses the time of short trainings.
                seconds.get(f"retrain.seed_{number}", 0.0)
                for number in range(config.num_seeds)
            ),
        }

    def deploy(
        self,
        stage: str,
        path: Path,
        report_path: Path,
        *,
        splits: Mapping[str, PackedSplit],
        io: IoType = "int8",
        num_calibration: int = 128,
    ) -> dict[str, Any]:
        """Export the network of a finished training, see `oneshot_ednas.deploy`.

        Args:
            stage: the training, for example `retrain.seed_0` or `baseline.base`.
            path: the `.tflite` to write.
            report_path: the report to write.
            splits: by name, the frames to score the network and the file on.
            io: type of input and output.
            num_calibration: training frames that the ranges of activations come from.

        Raises:
            ValueError: if there is no such training, or it is not finished.
        """
        seeds = range(self.config.retrain.num_seeds)
        trainings = {f"retrain.seed_{number}": number for number in seeds}
        trainings |= {f"baseline.{name}": 0 for name in self.baselines}
        if stage not in trainings:
            raise ValueError(
                f"{self.files.folder} trains no {stage}; it has {', '.join(trainings)}"
            )
        if stage.startswith("baseline."):
            architecture = self.baselines[stage.removeprefix("baseline.")]
        else:
            architecture = self._derived_architecture()
        return deploy(
            self._trained(architecture, stage, trainings[stage]),
            path,
            report_path,
            name=stage,
            trained_sha256=file_digest(self.files.checkpoint(stage)),
            architecture=str(architecture),
            calibration=self.train,
            splits=splits,
            tasks=self.tasks,
            table=self.table,
            predicted_ms=self.costs.latency_ms(architecture),
            io=io,
            num_calibration=num_calibration,
            batch_size=self.config.derive.batch_size,
            seed=self.config.seed,
            device=self.device,
        )

    # Parts ----------------------------------------------------------------------------------

    def _derived_architecture(self) -> Architecture:
        if not self.files.architecture.exists():
            raise ValueError(
                f"{self.files.folder} has no derived architecture yet; run {self._find_command}"
            )
        architecture = Architecture.load(self.files.architecture)
        self.space.check(architecture)
        return architecture

    def _trained(self, architecture: Architecture, stage: str, number: int) -> Network:
        """The network of a finished training.

        Raises:
            ValueError: if it is not finished.
        """
        if not self._is_trained(stage):
            raise ValueError(
                f"{stage} is not trained to its end; run oneshot-ednas retrain {self.files.folder}"
            )
        return self.train_network(architecture, stage, number, self.files.folder)

    def _is_trained(self, stage: str) -> bool:
        return self.has_finished(stage, self.config.retrain.steps)

    def _score(self, network: Network) -> Metrics:
        return evaluate(
            network,
            self.test,
            self.tasks,
            batch_size=self.config.derive.batch_size,
            device=self.device,
        )


class OneShotRun(Run):
    """The architecture comes from one supernet."""

    @property
    def _find_command(self) -> str:
        return f"oneshot-ednas derive {self.files.folder}"

    def find(self) -> None:
        """Search, then derive."""
        self.search()
        if distributed.is_main() and not self.files.architecture.exists():
            self.derive()
        distributed.barrier()

    def finish(self) -> dict[str, Any]:
        """Evaluate, export and report; returns the results."""
        results = self.evaluate()
        try:
            self.export()
        finally:
            self.report()  # also of a network that the device does not take
        return results

    @cached_property
    def one_shot(self) -> OneShotSearch:
        """The search, from its checkpoint where there is one."""
        search = OneShotSearch(
            self.config.search,
            self.space,
            self.tasks,
            self.table,
            target_ms=self.target_ms,
            splits={name: self.part(name) for name in ("weights", "alpha")},
            augmentation=self.config.data.augment,
            seed=self.config.seed,
            device=self.device,
        )
        resume_search(search, self.files.checkpoint("search"))
        return search

    def search(self, on_save: Callable[[], None] = lambda: None) -> None:
        """Train the supernet and alpha.

        Args:
            on_save: called after each checkpoint.
        """
        search = self.one_shot
        if search.step == self.config.search.steps:
            return
        note(
            f"search: {self.space.name}, {self.space.num_architectures:.3g} architectures, "
            f"{self.config.search.steps} steps on {distributed.described(self.device)}, "
            f"target {self.target_ms:g} ms "
            f"of {self.costs.min_latency_ms:.4g}..{self.costs.max_latency_ms:.4g} ms"
        )
        if self.target_ms >= self.costs.max_latency_ms:
            note("search: warning: every architecture is inside this target; it asks for nothing")
        with self.timed("search") as add_time:

            def saved() -> None:
                add_time()
                on_save()

            with self.watched("search", search, self.config.search.steps - search.step):
                checkpoint = self.files.checkpoint("search")
                search.run(self.files.folder, checkpoint, self._validate, saved)
        for alarm in search.alarms():
            note(f"search: warning: {alarm}")

    def _validate(self) -> tuple[dict[str, float], float]:
        """Scores, with supernet weights, of the most probable architecture inside the target.

        Returns:
            Scores by name, and the multiply-adds of scoring.
        """
        found = BudgetSearch(self.one_shot.alpha, self.costs).best(self.target_ms, 1)
        (candidate,) = self._rank(found)
        values = {"validation/reward": candidate.reward}
        for task, metrics in candidate.metrics.items():
            values |= {f"validation/{task}/{name}": value for name, value in metrics.items()}
        return values, self._scoring_macs(candidate.derived.architecture)

    def _scoring_macs(self, architecture: Architecture) -> float:
        """Multiply-adds of one score with supernet weights."""
        num_frames = [len(self.indices[name]) for name in ("weights", "validation")]
        return float(self.config.derive.scoring_macs(self.macs(architecture), *num_frames))

    def _rank(self, found: Sequence[DerivedArchitecture]) -> list[Candidate]:
        return rank_candidates(
            found,
            self.one_shot.supernet,
            self.tasks,
            target_ms=self.target_ms,
            calibration=self.part("weights"),
            validation=self.part("validation"),
            config=self.config.derive,
            seed=self.config.seed,
            device=self.device,
        )

    def derive(self) -> None:
        """Find the most probable architectures inside the target, rank them, keep the best."""
        search = self._finished_search()
        config = self.config.derive
        with self.timed("derive"):
            budget = BudgetSearch(search.alpha, self.costs)
            found = budget.best(self.target_ms, config.num_candidates)
            found += sample_within_budget(
                search.alpha,
                self.costs,
                target_ms=self.target_ms,
                num_samples=config.num_samples,
                generator=numpy_generator(self.config.seed, "candidates"),
            )
            # Equal architectures once, in order of first appearance.
            found = list({one.architecture: one for one in reversed(found)}.values())[::-1]
            ranked = self._rank(found)
            front = pareto_front(
                search.alpha,
                self.table,
                self.space,
                num_budgets=config.num_budgets,
                out_channels=self.out_channels,
            )
        best = ranked[0]
        write_json(
            self.files.candidates,
            {
                "alarms": search.alarms(),
                "expected_latency_ms": float(search.expected_latency().detach()),
                "argmax_latency_ms": self.costs.latency_ms(search.alpha.argmax()),
                "entropies": search.alpha.entropies(),
                "probabilities": _probabilities(search),
                "candidates": [
                    {
                        "architecture": candidate.derived.architecture.to_json(),
                        "latency_ms": candidate.derived.latency_ms,
                        "log_probability": candidate.derived.log_probability,
                        "reward": candidate.reward,
                        "accuracy": candidate.accuracy,
                        "metrics": candidate.metrics,
                    }
                    for candidate in ranked
                ],
                "pareto_front": [
                    {
                        "architecture": point.architecture.to_json(),
                        "latency_ms": point.latency_ms,
                        "log_probability": point.log_probability,
                    }
                    for point in front
                ],
            },
        )
        # Last, since a run that has it takes this stage for done.
        write_text(self.files.architecture, best.derived.architecture.to_text())
        note(
            f"derive: {best.derived.latency_ms:.4g} ms of {self.target_ms:g} ms, "
            f"validation reward {best.reward:.4f} with supernet weights, best of {len(ranked)}"
        )

    def export(self) -> dict[str, Any]:
        """Write the derived network, first seed, as `model.tflite`, check it, and report.

        An export that is done is not done again, unless it could not be verified, or not compiled
        and there is a compiler now.

        Raises:
            ValueError: if the network is not trained to its end.
            RuntimeError: if the file is not what the Edge TPU takes.
        """
        if self._is_exported:
            return dict(read_json(self.files.export))
        with self.timed("export"):
            report = self.deploy(
                "retrain.seed_0",
                self.files.model,
                self.files.export,
                splits={"validation": self.part("validation"), "test": self.test},
            )
        note(f"export: {report['file']}, {report['size_bytes'] / 2**20:.2f} MiB")
        for check in ("not_verified", "not_compiled"):
            if report[check] is not None:
                note(f"export: {check.replace('_', ' ')}: {report[check]}")
        return report

    @property
    def _is_exported(self) -> bool:
        """Whether file and report are of each other and of the network, and no check is left."""
        model, report = self.files.model, self.files.export
        trained = self.files.checkpoint("retrain.seed_0")
        if not (trained.exists() and model.exists() and report.exists()):
            return False
        held = read_json(report)
        return (
            held.get("trained_sha256") == file_digest(trained)
            and held.get("sha256") == file_digest(model)
            and held["not_verified"] is None
            and (held["not_compiled"] is None or find_compiler() is None)
        )

    def report(self) -> Path:
        """Write `report.html` with curves and pictures of predictions."""
        architecture = self._derived_architecture()
        network = self._trained(architecture, "retrain.seed_0", 0)
        with self.timed("report"):
            pictures = RunPictures.taken(
                network, self.test, self.tasks, num_pictures=NUM_PICTURES, device=self.device
            )
        return write_report(
            self.files.folder,
            tasks=self.tasks,
            space=self.space,
            pictures=pictures,
            class_names=self.test.class_names,
        )

    # Parts ----------------------------------------------------------------------------------

    def _finished_search(self) -> OneShotSearch:
        search = self.one_shot
        if search.step < self.config.search.steps:
            raise ValueError(
                f"{self.files.folder}: the search is at step {search.step} of "
                f"{self.config.search.steps}; finish it with "
                f"oneshot-ednas search {self.files.folder}"
            )
        return search

    def _search_figures(self) -> dict[str, Any]:
        candidates = read_json(self.files.candidates)
        best = candidates["candidates"][0]
        return {
            "supernet": {
                "reward": best["reward"],
                "metrics": best["metrics"],
                "expected_latency_ms": candidates["expected_latency_ms"],
                "argmax_latency_ms": candidates["argmax_latency_ms"],
                "alarms": candidates["alarms"],
            },
        }

    def _search_cost(self) -> tuple[float | None, float]:
        """The supernet's training and validation, and the scoring of candidates."""
        candidates = read_json(self.files.candidates)["candidates"]
        ranking = sum(
            self._scoring_macs(Architecture.from_json(candidate["architecture"]))
            for candidate in candidates
        )
        # A supernet trained by an older version did not count.
        macs = None if math.isnan(self.one_shot.macs) else self.one_shot.macs + ranking
        return macs, sum(self.seconds.get(stage, 0.0) for stage in ("search", "derive"))


class MultiTrialRun(Run):
    """The architecture comes from trials: evolution or random search."""

    def __init__(
        self, config: ExperimentConfig, folder: Path, *, is_reopened: bool = False
    ) -> None:
        """As of `Experiment`, and what the trials need."""
        super().__init__(config, folder, is_reopened=is_reopened)
        self.trainer()  # refuses what no trial could do

    @property
    def _find_command(self) -> str:
        return f"oneshot-ednas evolve CONFIG --out {self.files.folder} --resume"

    def find(self) -> None:
        """Run the trials that are left, and keep the best architecture."""
        if self.files.architecture.exists():
            return
        config = self.config.multi_trial
        note(
            f"{self.config.method}: {self.space.name}, {self.space.num_architectures:.3g} "
            f"architectures, {config.num_trials} trials of {config.steps} steps, "
            f"{self.workers.count} at a time, target {self.target_ms:g} ms"
        )
        with self.timed("search"), TrialStore(self.files.trials) as store:
            train = partial(run_trial, self.files.folder)
            MultiTrialSearch(self, store, train).run(self.workers)
        keep_pick(self, store.trials.values())

    def _search_figures(self) -> dict[str, Any]:
        return {"trials": summary(read_trials(self.files.trials), self.target_ms)}

    def _search_cost(self) -> tuple[float, float]:
        """All trials; their seconds are added up, whatever ran at a time."""
        return search_cost(read_trials(self.files.trials))


def run_class(config: ExperimentConfig) -> type[Run]:
    """The runs of the config's method."""
    return OneShotRun if config.method == "one_shot" else MultiTrialRun


def train_job(folder: Path, architecture: Architecture, stage: str, number: int) -> None:
    """One training of a run as a job for any worker, with log and time in a folder of its own.

    Raises:
        RuntimeError: if a loss is not finite.
        ValueError: if the run folder is not readable, or its data has gone.
    """
    one = _reopened(folder)
    part = one.files.stage(stage)
    part.mkdir(parents=True, exist_ok=True)
    path, began = part / "seconds.json", time.perf_counter()
    before = read_json(path) if path.exists() else 0.0  # of a process that died

    def write_time() -> None:
        write_json(path, before + time.perf_counter() - began)

    try:
        one.train_network(architecture, stage, number, part, write_time)
    finally:
        write_time()


@lru_cache(maxsize=1)
def _reopened(folder: Path) -> Run:
    config = load_config(RunFiles(folder).config)
    return run_class(config)(config, folder, is_reopened=True)


def run_all(run: Run) -> dict[str, Any]:
    """All stages that are not done yet, in order; returns the results.

    Of several processes the main one alone derives, evaluates and writes; the others return {}.
    """
    run.find()
    run.retrain()
    return run.finish() if distributed.is_main() else {}


def _probabilities(search: OneShotSearch) -> dict[str, dict[str, float]]:
    rows = search.alpha.padded_logits().detach().cpu().double().softmax(1).tolist()
    return {
        choice.name: {str(option): row[i] for i, option in enumerate(choice.options)}
        for choice, row in zip(search.space.choices, rows, strict=True)
    }
