"""Building a benchmark: stratified architectures, trained one job at a time, resumable."""

import datetime
import json
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.benchmark.stratify import stratified_sample
from oneshot_ednas.benchmark.table import Benchmark, Entry, Training
from oneshot_ednas.config import what_defines
from oneshot_ednas.run_folder import Experiment, versions
from oneshot_ednas.schema import to_plain
from oneshot_ednas.store import write_text
from oneshot_ednas.training import Interrupted, numpy_generator, progress_bar
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
        """
        jobs, done = self.jobs(), self.finished()
        left = [job for job in jobs if job not in done]
        folder = self.experiment.files.folder
        try:
            with progress_bar("trainings", len(jobs), len(jobs) - len(left)) as advance:
                futures = {
                    workers.executor.submit(run_trial, folder, *job, self.scored_steps(), True): job
                    for job in left
                }
                for future in as_completed(futures):
                    job = futures[future]
                    outcome = future.result()
                    training = Training(
                        seed=job.seed,
                        cpu_seconds=outcome.cpu_seconds,
                        curve=outcome.curve,
                        test_metrics=outcome.test_metrics or {},
                    )
                    self._keep(job, training)
                    advance()
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped with {len(self.finished())} of {len(jobs)} trainings finished"
            ) from None

    def finished(self) -> dict[Job, Training]:
        """Finished trainings.

        Raises:
            ValueError: if a line of the file is damaged, other than the last.
        """
        if not self.trainings_path.exists():
            return {}
        lines = self.trainings_path.read_text(encoding="utf-8").split("\n")
        found = {}
        # What follows the last line end was torn by a crash: that training is done again.
        for number, line in enumerate(lines[:-1], start=1):
            try:
                row = json.loads(line)
                job = Job(Architecture.from_short(row["architecture"]), row["seed"])
                curve = {int(step): metrics for step, metrics in row["curve"].items()}
                found[job] = Training(
                    seed=job.seed,
                    cpu_seconds=row["cpu_seconds"],
                    curve=curve,
                    test_metrics=row["test_metrics"],
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.trainings_path}:{number}: damaged: {error}") from None
        return found

    def _keep(self, job: Job, training: Training) -> None:
        row = {"architecture": str(job.architecture), **asdict(training)}
        text = json.dumps(row) + "\n"
        if self.trainings_path.exists():
            held = self.trainings_path.read_text(encoding="utf-8")
            if held and not held.endswith("\n"):
                write_text(self.trainings_path, held[: held.rfind("\n") + 1])
        with self.trainings_path.open("a", encoding="utf-8") as file:
            file.write(text)

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
