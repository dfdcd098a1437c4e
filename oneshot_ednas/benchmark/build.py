"""Building a benchmark: stratified architectures, trained one job at a time, resumable."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.benchmark.settings import split_seed, training_differences
from oneshot_ednas.benchmark.stratify import stratified_sample
from oneshot_ednas.benchmark.table import Benchmark, Entry, Training
from oneshot_ednas.config import ExperimentConfig, what_defines
from oneshot_ednas.progress import progress_bar
from oneshot_ednas.run_folder import Experiment, versions
from oneshot_ednas.schema import to_plain
from oneshot_ednas.store import append_json_line, read_json_lines
from oneshot_ednas.training import Interrupted, numpy_generator
from oneshot_ednas.trial import Outcome
from oneshot_ednas.trial_job import run_trial
from oneshot_ednas.workers import Workers

NOT_RECORDED = "not recorded"
"""Revision of trainings whose lines do not tell it."""


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
    given_made: Mapping[str, Any] = field(default_factory=dict)
    """How that benchmark was made."""

    @property
    def trainings_path(self) -> Path:
        """One JSON line per finished training, in order of completion."""
        return self.experiment.files.folder / "trainings.jsonl"

    @property
    def benchmark_path(self) -> Path:
        """The benchmark file."""
        return self.experiment.files.folder / "benchmark.json"

    @cached_property
    def jobs(self) -> tuple[Job, ...]:
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
        return tuple(
            Job(architecture, one.config.seed + number)
            for index, architecture in enumerate(architectures)
            for number in range(study.num_seeds if index < repeated else 1)
        )

    @cached_property
    def _versions(self) -> dict[str, str]:
        """Those of this process, also where a checkout changes while it runs."""
        return versions(self.experiment.device)

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
        jobs, done, folder = self.jobs, self.finished(), self.experiment.files.folder
        left = [job for job in jobs if job not in done]
        made = {"date": datetime.date.today().isoformat(), "versions": self._versions}
        try:
            with progress_bar("trainings", len(jobs), len(jobs) - len(left)) as advance:
                for job, outcome in outcomes(folder, left, self.scored_steps(), workers):
                    training = Training(
                        seed=job.seed,
                        cpu_seconds=outcome.cpu_seconds,
                        curve=outcome.curve,
                        test_metrics=outcome.test_metrics or {},
                    )
                    row = {"architecture": str(job.architecture), **asdict(training), "made": made}
                    append_json_line(self.trainings_path, row)
                    advance()
        except KeyboardInterrupt:
            done = self.finished()
            count = sum(job in done for job in jobs)
            raise Interrupted(f"stopped with {count} of {len(jobs)} trainings finished") from None

    def finished(self) -> dict[Job, Training]:
        """Finished trainings, and those given.

        Raises:
            ValueError: if a line of the file is damaged, other than a last one cut short.
        """
        return {**self.given, **dict(read_json_lines(self.trainings_path, _read_line))}

    def benchmark(self, command: str) -> Benchmark:
        """The benchmark of the finished trainings.

        Args:
            command: how the study was run, for the file.

        Raises:
            ValueError: if a training is not finished.
        """
        done = self.finished()
        missing = [job for job in self.jobs if job not in done]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self.jobs)} trainings in {self.experiment.files.folder} "
                f"are not finished; go on with --resume"
            )
        trainings: dict[Architecture, list[Training]] = {}
        for job in self.jobs:
            trainings.setdefault(job.architecture, []).append(done[job])
        return Benchmark(
            space=self.experiment.space,
            config=to_plain(_without_folders(what_defines(self.experiment.config))),
            made=self._made(command),
            entries=tuple(
                Entry(architecture=architecture, trainings=tuple(found))
                for architecture, found in trainings.items()
            ),
        )

    def _made(self, command: str) -> dict[str, Any]:
        """How the trainings were made: those of this folder, and those given."""
        rows = read_json_lines(self.trainings_path, _read_made)
        if self.given and not rows:
            return dict(self.given_made)
        seen: dict[str, list[str]] = {}
        for row in rows:
            for name, version in row["versions"].items():
                if version not in seen.setdefault(name, []):
                    seen[name].append(version)
        dates = [row["date"] for row in rows if "date" in row]
        return {
            "command": command,
            "date": max(dates, default=datetime.date.today().isoformat()),
            "versions": self._versions | {name: ", ".join(found) for name, found in seen.items()},
            "data": self.experiment.data_digests,
            **({"given": dict(self.given_made)} if self.given else {}),
        }


def outcomes(
    folder: Path, jobs: Sequence[Job], scored_steps: tuple[int, ...], workers: Workers
) -> Iterator[tuple[Job, Outcome]]:
    """Train and score jobs of a run folder, on the test split too; outcomes as they come.

    No more is submitted than runs, so that each can be kept at once; of those that are done
    together, failed ones come last.

    Raises:
        RuntimeError: if a training fails.
    """
    left, running = iter(jobs), dict[Future[Outcome], Job]()
    while True:
        for job in islice(left, workers.count - len(running)):
            future = workers.executor.submit(run_trial, folder, *job, scored_steps, True)
            running[future] = job
        if not running:
            return
        done = wait(running, return_when=FIRST_COMPLETED).done
        for future in sorted(done, key=lambda one: one.exception() is not None):
            yield running.pop(future), future.result()


def _without_folders(config: ExperimentConfig) -> ExperimentConfig:
    """File names alone, since folders are those of one machine."""
    manifest = config.data.manifest
    return replace(
        config,
        space=Path(config.space).name,
        latency=replace(config.latency, table=Path(config.latency.table).name),
        data=replace(config.data, manifest=manifest and Path(manifest).name),
    )


def _read_made(row: Mapping[str, Any]) -> Mapping[str, Any]:
    made: Mapping[str, Any] = row.get("made", {"versions": {"git_revision": NOT_RECORDED}})
    return made


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
    stored, now = benchmark.config, to_plain(experiment.config)
    data = benchmark.made.get("data")
    same = {
        "space": benchmark.space == experiment.space,
        "seed": stored.get("seed") == now["seed"],
        "search.split_seed": split_seed(stored) == split_seed(now),
        # Older files do not tell.
        "data (its content)": data is None or data == experiment.data_digests,
    }
    differing = [name for name, is_same in same.items() if not is_same]
    differing += training_differences(stored, experiment.config)
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
