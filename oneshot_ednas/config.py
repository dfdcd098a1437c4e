"""The config of a run: the modules' configs together, read strictly from one YAML file."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal

from oneshot_ednas.data.source import DataConfig
from oneshot_ednas.ranking import DeriveConfig
from oneshot_ednas.retrain import RetrainConfig
from oneshot_ednas.schema import find_file, is_shipped, load_yaml
from oneshot_ednas.search import SearchConfig
from oneshot_ednas.tasks import TaskConfig
from oneshot_ednas.training import LoopConfig

BASELINES = ("base", "random")


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """The latency table and the budget."""

    table: str
    """A latency table: a path, also relative to the config, or one shipped with the package."""
    target_ms: float
    """The budget in milliseconds; no derived architecture exceeds it."""
    allow_uncalibrated: bool = False
    """Go on with a table whose error on whole networks is unknown."""

    def __post_init__(self) -> None:
        """The target is positive."""
        if not self.target_ms > 0:
            raise ValueError(f"target_ms: expected a positive time, got {self.target_ms}")


@dataclass(frozen=True, kw_only=True)
class MultiTrialConfig:
    """Multi-trial search; the defaults are those of EDNAS section 4.1."""

    num_trials: int = 2000
    """Proposals, with those whose architecture had its trial before and costs nothing."""
    steps: int = 5000
    """Steps of a trial: the proxy task. All else of its training is as in `retrain`."""
    population_size: int = 50
    """Evolution: the trials that can be parents, the most recent ones."""
    tournament_size: int = 10
    """Evolution: draws from the population, the best of which is the parent."""
    max_macs: float | None = None
    """No trial begins once the trials' training took this many multiply-adds."""

    def __post_init__(self) -> None:
        """Counts are positive, and a tournament is drawn from the population."""
        for name in ("num_trials", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 2 <= self.tournament_size <= self.population_size:
            raise ValueError(
                f"tournament_size: expected 2 to population_size {self.population_size}, "
                f"got {self.tournament_size}"
            )
        if self.max_macs is not None and not self.max_macs > 0:
            raise ValueError(f"max_macs: expected a positive number, got {self.max_macs}")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Stand-alone trainings of stratified architectures: a tabular benchmark, rank correlation.

    Each is a trial of `multi_trial.steps` steps.
    """

    num_architectures: int = 128
    num_repeated: int = 16
    """How many of them are trained with `num_seeds` seeds, for the noise; the others with one."""
    num_seeds: int = 3
    num_scorings: int = 4
    """Scorings per training, evenly spaced; the last is at its end."""

    def __post_init__(self) -> None:
        """Counts are positive, and there is something to repeat."""
        for name in ("num_architectures", "num_seeds", "num_scorings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.num_repeated <= self.num_architectures:
            raise ValueError(
                f"num_repeated: expected 0 to num_architectures {self.num_architectures}, "
                f"got {self.num_repeated}"
            )


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything that a run depends on."""

    method: Literal["one_shot", "evolution", "random"] = "one_shot"
    """How the architecture is found: in one supernet, or by trials that regularized evolution
    or uniform draws propose."""
    seed: int = 0
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps`."""
    space: str
    """Name of a shipped search space, or the path of a YAML file."""
    data: DataConfig
    tasks: dict[str, TaskConfig]
    latency: LatencyConfig
    search: SearchConfig
    derive: DeriveConfig = DeriveConfig()
    retrain: RetrainConfig
    baselines: tuple[str, ...] = ()
    """Trained like the derived network, for comparison: `base` is the space's base network,
    `random` an architecture drawn uniformly from those inside the target."""
    multi_trial: MultiTrialConfig = MultiTrialConfig()
    study: StudyConfig = StudyConfig()

    def __post_init__(self) -> None:
        """Check what no module can check alone."""
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}")
        if not self.tasks:
            raise ValueError("tasks: expected at least one")
        for name in self.baselines:
            if name not in BASELINES:
                raise ValueError(f"baselines: expected some of {', '.join(BASELINES)}, got {name}")
        if len(set(self.baselines)) != len(self.baselines):
            raise ValueError(f"baselines: each at most once, got {', '.join(self.baselines)}")


def load_config(path: Path, overrides: Iterable[str] = ()) -> ExperimentConfig:
    """Read a config, by its path or as shipped under `configs/`.

    Files that lie beside the config or in the working directory are named by absolute paths in
    the result, so that a run folder can be opened from anywhere; shipped ones keep their names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for anything wrong in it, with file and line.
    """
    path = find_file(path)
    config = load_yaml(path, ExperimentConfig, overrides=overrides)

    def absolute(name: str | None) -> str | None:
        return name if name is None else _absolute(name, path.parent)

    is_file = Path(config.space).suffix in (".yaml", ".yml")
    return replace(
        config,
        space=_absolute(config.space, path.parent) if is_file else config.space,
        latency=replace(config.latency, table=_absolute(config.latency.table, path.parent)),
        data=replace(
            config.data,
            root=absolute(config.data.root),
            manifest=absolute(config.data.manifest),
        ),
    )


def _absolute(name: str, folder: Path) -> str:
    if (folder / name).exists():
        return str((folder / name).absolute())
    return str(Path(name).absolute()) if Path(name).exists() and not is_shipped(name) else name


def what_defines(config: ExperimentConfig) -> ExperimentConfig:
    """The config without what may change between sittings of one run.

    That is where the data lies (its content is checked by itself), how many processes read it, the
    device, and how often the loops write.
    """
    data = replace(config.data, root=None, workers=None)
    search = replace(config.search, loop=LoopConfig())
    retrain = replace(config.retrain, loop=LoopConfig())
    return replace(config, device="auto", data=data, search=search, retrain=retrain)


def first_difference(one: object, other: object, where: str = "") -> str | None:
    """The first setting in which two configs differ, as `key: value against value`."""
    if is_dataclass(one) and type(one) is type(other):
        for field in fields(one):
            key = f"{where}.{field.name}" if where else field.name
            found = first_difference(getattr(one, field.name), getattr(other, field.name), key)
            if found:
                return found
        return None
    return None if one == other else f"{where}: {one} against {other}"
