"""A trial as a job for any worker: all that it needs comes from the run folder."""

from functools import lru_cache
from pathlib import Path

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.config import load_config
from oneshot_ednas.run_folder import Experiment, RunFiles
from oneshot_ednas.trial import Outcome, StandAloneTrainer


def run_trial(
    folder: Path,
    architecture: Architecture,
    seed: int,
    scored_steps: tuple[int, ...] = (),
    with_test: bool = False,
) -> Outcome:
    """Train and score one architecture as the run in a folder says.

    Args:
        folder: the run folder; its config, space, table and data are read once per process.
        architecture: what to train.
        seed: of the training.
        scored_steps: as of `StandAloneTrainer`.
        with_test: score the test split too.

    Raises:
        RuntimeError: if a loss is not finite.
        ValueError: if the run folder is not readable, or its data has gone.
    """
    return _trainer(folder, with_test)(architecture, seed, scored_steps)


@lru_cache(maxsize=2)
def _trainer(folder: Path, with_test: bool) -> StandAloneTrainer:
    config = load_config(RunFiles(folder).config)
    return Experiment(config, folder, is_reopened=True).trainer(with_test=with_test)
