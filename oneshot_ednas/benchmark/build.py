"""Building a benchmark: stratified architectures, trained one job at a time, resumable."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.benchmark.stratify import stratified_sample
from oneshot_ednas.benchmark.table import Benchmark, Entry, Training
from oneshot_ednas.config import what_defines
from oneshot_ednas.run_folder import Experiment, versions
from oneshot_ednas.schema import to_plain
from oneshot_ednas.store import append_json_line, read_json_lines
from oneshot_ednas.training import Interrupted, numpy_generator, progress_bar
from oneshot_ednas.trial import Outcome
from oneshot_ednas.trial_job import run_trial
from oneshot_ednas.workers import Workers


class Job(NamedTuple):
    """One training of the study."""

    architecture: Architecture
    seed: int


@dataclass(frozen=True)
class Study:
    """The stand-alone trainings of a config, kept in a run folder."""

    experiment: Experiment
    given: Mapping[Job, Training] = field(default_factory=dict)
    """Trainings that a benchmark has already, see `given_by`."""

    @property
    def trainings_path(self) -> Path:
        """One JSON line per finished training, in order of completion."""
        return self.experiment.files.folder / "trainings.jsonl"

    @property
    def benchmark_path(self) -> Path:
        """The benchmark file."""
        return self.experiment.files.folder / "benchmark.json"

    def jobs(self) -> list[Job]:
        """All trainings: first those of the repeated architectures, whose noise is of interest."""
        one, study = self.experiment, self.experiment.config.study
        architectures = stratified_sample(
            one.space,
            study.num_architectures,
            image_size=one.config.data.image_size,
            out_channels=one.out_channels,
            generator=numpy_generator(one.config.seed, "stratified"),
        )
        repeated = study.num_repeated
        return [
            Job(architecture, one.config.seed + number)
            for index, architecture in enumerate(architectures)
            for number in range(study.num_seeds if index < repeated else 1)
        ]

    def scored_steps(self) -> tuple[int, ...]:
        """Numbers of steps after which each training is scored."""
        config = self.experiment.config
        steps, count = config.multi_trial.steps, config.study.num_scorings
        return tuple(sorted({max(1, steps * i // count) for i in range(1, count + 1)}))

    def run(self, workers: Workers) -> None:
        """Do the trainings that are left.

        Raises:
            Interrupted: after Ctrl-C; finished trainings are kept.
            RuntimeError: if a training fails; those finished before are kept.
            ValueError: if the file of finished ones is damaged.
        """
        jobs, done = self.jobs(), self.finished()
        left = [job for job in jobs if job not in done]
        try:
            with progress_bar("trainings", len(jobs), len(jobs) - len(left)) as advance:
                for job, outcome in self._outcomes(left, workers):
                    training = Training(
                        seed=job.seed,
                        cpu_seconds=outcome.cpu_seconds,
                        curve=outcome.curve,
                        test_metrics=outcome.test_metrics or {},
                    )
                    self._keep(job, training)
                    advance()
        except KeyboardInterrupt:
            done = self.finished()
            count = sum(job in done for job in jobs)
            raise Interrupted(f"stopped with {count} of {len(jobs)} trainings finished") from None

    def _outcomes(self, jobs: Sequence[Job], workers: Workers) -> Iterator[tuple[Job, Outcome]]:
        """Outcomes as they come; no more is submitted than runs, so that each is kept at once."""
        folder, left = self.experiment.files.folder, iter(jobs)
        running: dict[Future[Outcome], Job] = {}
        while True:
            for job in islice(left, workers.count - len(running)):
                future = workers.executor.submit(run_trial, folder, *job, self.scored_steps(), True)
                running[future] = job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()

    def finished(self) -> dict[Job, Training]:
        """Finished trainings, and those given.

        Raises:
            ValueError: if a line of the file is damaged, other than a last one cut short.
        """
        return {**self.given, **dict(read_json_lines(self.trainings_path, _read_line))}

    def _keep(self, job: Job, training: Training) -> None:
        row = {"architecture": str(job.architecture), **asdict(training)}
        append_json_line(self.trainings_path, row)

    def benchmark(self, command: str) -> Benchmark:
        """The benchmark of the finished trainings.

        Args:
            command: how the study was run, for the file.

        Raises:
            ValueError: if a training is not finished.
        """
        done, jobs = self.finished(), self.jobs()
        missing = [job for job in jobs if job not in done]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(jobs)} trainings in {self.experiment.files.folder} are "
                f"not finished; go on with --resume"
            )
        trainings: dict[Architecture, list[Training]] = {}
        for job in jobs:
            trainings.setdefault(job.architecture, []).append(done[job])
        return Benchmark(
            space=self.experiment.space,
            config=to_plain(what_defines(self.experiment.config)),
            made={
                "command": command,
                "date": datetime.date.today().isoformat(),
                "versions": versions(self.experiment.device),
            },
            entries=tuple(
                Entry(architecture=architecture, trainings=tuple(found))
                for architecture, found in trainings.items()
            ),
        )


def _read_line(row: Mapping[str, Any]) -> tuple[Job, Training]:
    job = Job(Architecture.from_short(row["architecture"]), row["seed"])
    training = Training(
        seed=job.seed,
        cpu_seconds=row["cpu_seconds"],
        curve={int(step): metrics for step, metrics in row["curve"].items()},
        test_metrics=row["test_metrics"],
    )
    return job, training


def given_by(benchmark: Benchmark, experiment: Experiment) -> dict[Job, Training]:
    """Trainings of a benchmark that are what a study of this experiment would do itself.

    Raises:
        ValueError: if the benchmark was trained in another way, naming the keys.
    """
    now = to_plain(what_defines(experiment.config))
    differing = [] if benchmark.space == experiment.space else ["space"]
    for part in TRAINED_WITH:
        differing += _differing(_at(benchmark.config, part), _at(now, part), part)
    if differing:
        raise ValueError(
            f"the benchmark's trainings were made with other settings: {', '.join(differing)}; "
            f"use the config that made it, or do without it"
        )
    return {
        Job(entry.architecture, training.seed): training
        for entry in benchmark.entries
        for training in entry.trainings
    }


TRAINED_WITH = ("seed", "data", "tasks", "retrain", "search.splits", "multi_trial.steps")
"""Keys of the config that a trial's result depends on, besides the space."""
NOT_OF_TRIALS = ("retrain.steps", "retrain.num_seeds", "retrain.loop")
"""Those under them that it does not."""


def _at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for word in key.split("."):
        value = value[word]
    return value


def _differing(stored: object, now: object, where: str) -> Iterator[str]:
    """Dotted keys of what was stored that are not so now; a new key stands for its default."""
    if where in NOT_OF_TRIALS:
        return
    if isinstance(stored, dict) and isinstance(now, dict):
        for key, value in stored.items():
            yield from _differing(value, now.get(key), f"{where}.{key}")
        # Tasks and splits have no default.
        if where in ("tasks", "search.splits"):
            yield from (f"{where}.{key}" for key in now if key not in stored)
    elif stored != now:
        yield where
