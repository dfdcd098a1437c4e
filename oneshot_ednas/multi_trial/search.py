"""The loop of a multi-trial search: propose, train, score, tell, and keep every event."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, replace
from typing import Any

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.multi_trial.proposals import Proposals
from oneshot_ednas.multi_trial.trials import Trial, TrialStore
from oneshot_ednas.reward import reward
from oneshot_ednas.run_folder import Problem
from oneshot_ednas.store import write_text
from oneshot_ednas.training import (
    Interrupted,
    StageLog,
    accuracy_of,
    derived_seed,
    note,
    training_macs,
)
from oneshot_ednas.trial import Outcome
from oneshot_ednas.workers import Interruptible, Workers

MAX_FAILURES_IN_A_ROW = 10
"""More than chance explains: the search stops instead of failing to its end."""
MAX_ERROR_LENGTH = 500


@dataclass(frozen=True)
class Picks:
    """The best trials of a search; of equal ones the first."""

    best: Trial
    """Best reward."""
    best_inside_target: Trial | None
    """Best reward inside the latency target; None if no trial is inside it."""

    @property
    def chosen(self) -> Trial:
        """What is retrained: a network inside the budget where there is one."""
        return self.best_inside_target or self.best


def pick(trials: Iterable[Trial], target_ms: float) -> Picks:
    """The best of the finished trials.

    Raises:
        RuntimeError: if none has finished.
    """
    done = [trial for trial in trials if trial.state == "done"]
    if not done:
        raise RuntimeError("no trial has finished, so there is no architecture to retrain")

    def rank(trial: Trial) -> tuple[float, int]:
        assert trial.reward is not None
        return -trial.reward, trial.number

    inside = [trial for trial in done if trial.latency_ms <= target_ms]
    return Picks(min(done, key=rank), min(inside, key=rank) if inside else None)


def summary(trials: Iterable[Trial], target_ms: float) -> dict[str, Any]:
    """What `results.json` holds of the trials.

    Raises:
        RuntimeError: if none has finished.
    """
    trials = list(trials)
    picks = pick(trials, target_ms)
    states = [trial.state for trial in trials]
    return {
        "proposed": len(trials),
        **{state: states.count(state) for state in ("done", "failed", "duplicate")},
        "best": _figures(picks.best),
        "best_inside_target": _figures(picks.best_inside_target),
    }


def _figures(trial: Trial | None) -> dict[str, Any] | None:
    if trial is None:
        return None
    names = ("number", "accuracy", "latency_ms", "reward", "metrics")
    figures = asdict(trial)
    return {"architecture": str(trial.architecture), **{name: figures[name] for name in names}}


def search_cost(trials: Iterable[Trial]) -> tuple[float, float]:
    """Multiply-adds and seconds of all trainings.

    A failed trial has the multiply-adds of a whole one, since it is not known where it stopped.
    """
    trials = list(trials)
    macs = math.fsum(trial.macs or 0.0 for trial in trials)
    return macs, math.fsum(trial.seconds or 0.0 for trial in trials)


def keep_pick(problem: Problem, trials: Iterable[Trial]) -> Trial:
    """Write the architecture of the best trial, and say what it is.

    Raises:
        RuntimeError: if none has finished.
    """
    picks = pick(trials, problem.target_ms)
    chosen = picks.chosen
    write_text(problem.files.architecture, chosen.architecture.to_text())
    note(
        f"{problem.config.method}: {chosen.latency_ms:.4g} ms of {problem.target_ms:g} ms, "
        f"validation reward {chosen.reward:.4f}, trial {chosen.number}"
    )
    if picks.best_inside_target is None:
        note(
            f"{problem.config.method}: warning: no trial is inside the target; this is the best "
            f"of those above it"
        )
    return chosen


class MultiTrialSearch:
    """A search over trials, from where its store left it.

    A failed trial is told as the worst reward so far (0 if there is none), so that the search
    moves away from it. An architecture with a trial that is done or still runs is not trained
    again: the proposal is a `duplicate`, with the same figures and without cost.
    """

    def __init__(
        self, problem: Problem, store: TrialStore, train: Callable[[Architecture, int], Outcome]
    ) -> None:
        """Rebuild the state of the search by going through the events of the store.

        Args:
            problem: space, reward, seed and settings; its method is `evolution` or `random`.
            store: the trials so far.
            train: trains and scores an architecture with a seed; runs on the workers.

        Raises:
            ValueError: if the trials in the store are not those that this search proposes.
        """
        config = problem.config
        assert config.method != "one_shot"
        self.problem, self.store, self.train = problem, store, train
        self.config = config.multi_trial
        self._proposals = Proposals(config.method, problem.space, self.config, config.seed)
        self._trained: dict[Architecture, int] = {}
        """Number of the last trial of each architecture that is no duplicate."""
        self._spent = 0.0
        """Multiply-adds of all trainings that were begun."""
        self._worst: float | None = None
        self._best: float | None = None
        self._failures = 0
        self._running: dict[Future[Outcome], tuple[Trial, float]] = {}
        """Trials on the workers, and when they began."""
        self._waiting: list[Trial] = []
        """Duplicates of those."""
        self._replayed: list[dict[str, float]] = []
        """What the log says of the trials that had ended."""
        self._replay()

    def _replay(self) -> None:
        trials = self.store.trials.values()
        events = [(trial.proposed, trial, False) for trial in trials]
        events += [(trial.ended, trial, True) for trial in trials if trial.ended is not None]
        for number, (_, trial, is_end) in enumerate(sorted(events, key=lambda event: event[0])):
            if is_end:
                self._tell(trial)
                self._replayed.append(self._logged(trial))
            else:
                self._check_equal(trial, self._next_trial(event=number))
                self._register(trial)

    def _check_equal(self, held: Trial, proposed: Trial) -> None:
        for name in ("number", "choices", "seed"):
            if getattr(held, name) != getattr(proposed, name):
                raise ValueError(
                    f"{self.store.path}: trial {held.number} has {name} {getattr(held, name)}, "
                    f"this search proposes {getattr(proposed, name)}; the trials are of another "
                    f"search or version of PyGlove: choose another --out"
                )

    # The loop -------------------------------------------------------------------------------

    def run(self, workers: Workers) -> None:
        """Propose and train until trials or multiply-adds are spent.

        Raises:
            Interrupted: after Ctrl-C; trials that have ended are kept.
            RuntimeError: if a trial cannot be kept, or many fail one after the other.
            ValueError: if the trials' file is damaged.
        """
        left = deque(trial for trial in self.store.trials.values() if trial.ended is None)
        total = self.config.num_trials
        # From the first trial on: a kill may have lost the lines of trials that the store has.
        with StageLog(self.problem.files.folder, "search", total=total) as log:
            for step, values in enumerate(self._replayed):
                log.scalars(step, values)
            log.advance(self._num_ended, "")
            try:
                with Interruptible() as self._signals:
                    self._run_until_error(workers, left, log)
            except KeyboardInterrupt:
                raise Interrupted(f"stopped after {self._num_ended} of {total} trials") from None

    def _run_until_error(self, workers: Workers, left: deque[Trial], log: StageLog) -> None:
        try:
            self._run(workers, left, log)
        except BaseException:
            self._keep_finished()
            raise

    def _run(self, workers: Workers, left: deque[Trial], log: StageLog) -> None:
        while True:
            while self._num_open - len(left) < workers.count and (left or self._may_propose):
                self._begin(left.popleft() if left else self._propose(), workers, log)
            if not self._running:
                return
            with self._signals.allowed():
                done, _ = wait(self._running, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda future: self._running[future][0].number):
                self._finish(future, log)

    @property
    def _may_propose(self) -> bool:
        limit = self.config.max_macs
        has_budget = limit is None or self._spent < limit
        return has_budget and len(self.store.trials) < self.config.num_trials

    @property
    def _num_ended(self) -> int:
        return self.store.num_events - len(self.store.trials)

    @property
    def _num_open(self) -> int:
        """Trials that have not ended, with duplicates of running ones."""
        return 2 * len(self.store.trials) - self.store.num_events

    def _next_trial(self, event: int) -> Trial:
        """The next proposal, which is not stored yet."""
        number = self._proposals.count
        architecture = self._proposals.propose()
        return Trial(
            number=number,
            architecture=architecture,
            choices=self.problem.space.encode(architecture),
            seed=derived_seed(self.problem.config.seed, "trial", number),
            state="duplicate" if self._has_trial(architecture) else "running",
            proposed=event,
            latency_ms=self.problem.costs.latency_ms(architecture),
        )

    def _propose(self) -> Trial:
        trial = self._next_trial(self.store.num_events)
        self.store.propose(trial)
        self._register(trial)
        return trial

    def _has_trial(self, architecture: Architecture) -> bool:
        """Whether a trial of it is done or runs; one that failed may have failed by chance."""
        number = self._trained.get(architecture)
        return number is not None and self.store.trials[number].state != "failed"

    def _register(self, trial: Trial) -> None:
        if trial.state != "duplicate":
            self._trained[trial.architecture] = trial.number
            self._spent += self._macs(trial)

    def _macs(self, trial: Trial) -> float:
        frames = self.config.steps * self.problem.config.retrain.batch_size
        return training_macs(self.problem.macs(trial.architecture), frames)

    def _begin(self, trial: Trial, workers: Workers, log: StageLog) -> None:
        if trial.state == "duplicate":
            original = self.store.trials[self._trained[trial.architecture]]
            if original.ended is None:
                self._waiting.append(trial)
            else:
                self._end_duplicate(trial, original, log)
            return
        began = time.perf_counter()
        with self._signals.allowed():  # a single worker trains here
            future = workers.executor.submit(self.train, trial.architecture, trial.seed)
        self._running[future] = trial, began

    def _finish(self, future: Future[Outcome], log: StageLog) -> None:
        ended = self._ended(future, *self._running.pop(future))
        self._failures = self._failures + 1 if ended.state == "failed" else 0
        self._end(ended, log)
        for duplicate in [one for one in self._waiting if one.architecture == ended.architecture]:
            self._waiting.remove(duplicate)
            self._end_duplicate(duplicate, ended, log)
        if self._failures == MAX_FAILURES_IN_A_ROW:
            raise RuntimeError(
                f"{MAX_FAILURES_IN_A_ROW} trials failed one after the other, the last with: "
                f"{ended.error}; mend the cause, then go on with --resume"
            )

    def _ended(self, future: Future[Outcome], trial: Trial, began: float) -> Trial:
        """The trial with what came of it.

        Raises:
            ValueError: if config, data or run folder are wrong, which the next trial's are too.
        """
        error = future.exception()
        if error is None:
            return self._scored(trial, future.result(), began)
        if isinstance(error, ValueError) or not isinstance(error, Exception):
            raise error
        text = " ".join(str(error).split())
        if not isinstance(error, RuntimeError) or not text:
            text = f"{type(error).__name__}: {text}".removesuffix(": ")
        return self._failed(trial, text, began)

    def _failed(self, trial: Trial, error: str, began: float) -> Trial:
        return replace(
            trial,
            state="failed",
            error=error[:MAX_ERROR_LENGTH],
            seconds=time.perf_counter() - began,
            macs=self._macs(trial),
        )

    def _scored(self, trial: Trial, outcome: Outcome, began: float) -> Trial:
        """The trial with its figures; failed if a metric is not finite."""
        try:
            accuracy = accuracy_of(self.problem.tasks, outcome.metrics)
        except ValueError as error:
            return self._failed(trial, f"no reward: {error}", began)
        return replace(
            trial,
            state="done",
            metrics=outcome.metrics,
            accuracy=accuracy,
            reward=reward(accuracy, trial.latency_ms, self.problem.target_ms),
            seconds=outcome.seconds,
            cpu_seconds=outcome.cpu_seconds,
            macs=outcome.macs,
        )

    def _end_duplicate(self, trial: Trial, original: Trial, log: StageLog) -> None:
        ended = replace(
            trial,
            metrics=original.metrics,
            accuracy=original.accuracy,
            reward=original.reward,
            error=original.error,
            seconds=0.0,
            cpu_seconds=0.0,
            macs=0.0,
        )
        self._end(ended, log)

    def _end(self, trial: Trial, log: StageLog) -> None:
        trial = replace(trial, ended=self.store.num_events)
        self.store.end(trial)
        self._tell(trial)
        log.scalars(self._num_ended - 1, self._logged(trial))
        log.advance(
            self._num_ended,
            f"validation reward {trial.reward or 0:.4f}  best {self._best or 0:.4f}",
        )

    def _logged(self, trial: Trial) -> dict[str, float]:
        """What the log says of a trial that has just ended."""
        values = {"macs": self._spent, "latency_ms": trial.latency_ms}
        if trial.reward is not None:
            values |= {"reward": trial.reward, "best_reward": self._best or 0.0}
        return values

    def _tell(self, trial: Trial) -> None:
        if trial.reward is not None:
            self._worst = min(trial.reward, math.inf if self._worst is None else self._worst)
            self._best = max(trial.reward, -math.inf if self._best is None else self._best)
        told = self._worst if trial.reward is None else trial.reward
        self._proposals.feedback(trial.number, 0.0 if told is None else told)

    def _keep_finished(self) -> None:
        """Lose no trial that is done when the search stops."""
        failure: Exception | None = None
        for future, (trial, began) in self._running.items():
            # A failure may come of the stop itself; its trial is done again.
            if future.done() and not future.cancelled() and future.exception() is None:
                ended = self._scored(trial, future.result(), began)
                if ended.state == "done":
                    try:
                        self.store.end(replace(ended, ended=self.store.num_events))
                    except (RuntimeError, ValueError) as error:  # the others are kept beside it
                        failure = failure or error
        if failure is not None:
            raise failure
