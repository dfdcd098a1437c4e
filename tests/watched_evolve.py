"""`oneshot-ednas evolve` that writes down, after each event, what its search then knows.

python watched_evolve.py LOG ARGUMENTS; and what tests compare such logs with.
"""

import hashlib
import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from oneshot_ednas.config import load_config
from oneshot_ednas.multi_trial.search import MultiTrialSearch
from oneshot_ednas.multi_trial.trials import Trial, TrialStore
from oneshot_ednas.run_folder import Problem, RunFiles

NUM_DRAWS = 30


def generators(value: object, seen: set[int]) -> Iterator[random.Random]:
    """Every generator of random numbers that can be reached, in a fixed order."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, random.Random):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from generators(item, seen)
    elif isinstance(value, dict):
        for item in value.values():
            yield from generators(item, seen)
    elif callable(value) and getattr(value, "__closure__", None):
        for cell in value.__closure__:
            yield from generators(cell.cell_contents, seen)
    elif type(value).__module__.startswith("pyglove") and hasattr(value, "__dict__"):
        yield from generators(vars(value), seen)


def knowledge(search: MultiTrialSearch) -> dict[str, Any]:
    """All that decides what a search proposes next."""
    proposals = search._proposals
    algorithm = proposals._generator
    own = [proposals._mutator, *generators(vars(algorithm), set())]
    return {
        "count": proposals.count,
        "open": {str(number): dna.to_numbers() for number, dna in proposals._open.items()},
        "population": [[dna.to_numbers(), dict(dna.metadata)] for dna in algorithm.population],
        "algorithm": [
            algorithm.num_proposals,
            algorithm.num_feedbacks,
            algorithm.num_generations,
            algorithm._population_initialized,
            len(algorithm._pending_proposals),
        ],
        "random": [hashlib.sha256(repr(one.getstate()).encode()).hexdigest() for one in own],
        "trained": {str(one): number for one, number in search._trained.items()},
        "rewards": [search._spent, search._worst, search._best],
    }


def draws(search: MultiTrialSearch) -> list[str]:
    return [str(search._proposals.propose()) for _ in range(NUM_DRAWS)]


def row(trial: Trial) -> dict[str, Any]:
    return plain(asdict(trial) | {"architecture": str(trial.architecture)})


def plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


class Rebuilt(MultiTrialSearch):
    """A search that is rebuilt from its trials, with what it knew after each event."""

    def __init__(self, folder: Path, store: TrialStore) -> None:
        self.known: list[Any] = []
        config = load_config(RunFiles(folder).config)
        super().__init__(Problem(config, folder, is_reopened=True), store, _no_training)

    def _tell(self, trial: Trial) -> None:
        super()._tell(trial)
        self.known.append(plain(knowledge(self)))

    def _register(self, trial: Trial) -> None:
        super()._register(trial)
        self.known.append(plain(knowledge(self)))


def _no_training(*_: object) -> Any:
    raise AssertionError("nothing is trained here")


class _Watched(MultiTrialSearch):
    log: Path

    def _propose(self) -> Trial:
        trial = super()._propose()
        self._write()
        return trial

    def _end(self, trial: Trial, *rest: Any) -> None:
        super()._end(trial, *rest)
        self._write(ended=row(self.store.trials[trial.number]))

    def run(self, *rest: Any) -> None:
        super().run(*rest)
        self._write()
        self._write(draws=draws(self))

    def _write(self, **more: Any) -> None:
        line = {"events": self.store.num_events, "known": knowledge(self), **more}
        handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        # At once, so that a kill leaves no half of it.
        os.write(handle, (json.dumps(line, default=str) + "\n").encode())
        os.close(handle)


if __name__ == "__main__":
    from oneshot_ednas import pipeline
    from oneshot_ednas.cli import main

    _Watched.log = Path(sys.argv.pop(1))
    pipeline.MultiTrialSearch = _Watched
    main()
