"""The config of a run: the modules' configs together, read strictly from one YAML file."""

from collections.abc import Iterable
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, overload, runtime_checkable

from oneshot_ednas.data.source import DataConfig
from oneshot_ednas.ranking import DeriveConfig, ScoringConfig
from oneshot_ednas.retrain import RetrainConfig
from oneshot_ednas.schema import find_file, is_shipped, load_yaml
from oneshot_ednas.search import SearchConfig
from oneshot_ednas.sharing.backbone import EDNAS, BackboneConfig
from oneshot_ednas.sharing.branching_search import BranchingConfig
from oneshot_ednas.sharing.groupings import check_num_tasks
from oneshot_ednas.sharing.operator_search import OperatorSharingConfig
from oneshot_ednas.tasks import TaskConfig
from oneshot_ednas.training import LoopConfig

BASELINES = ("base", "random")
SHARING_BASELINES = ("separate", "shared", "vanilla", "random", "permuted")
FILE_SETTINGS = ("space", "architecture", "table", "root", "manifest")
"""Settings that name a file or folder, wherever they are in a config."""


@runtime_checkable
class RunConfig(Protocol):
    """What the config of every kind of run has, a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def seed(self) -> int:
        """Of all that is drawn."""

    @property
    def device(self) -> str:
        """`auto`, `cpu`, `cuda`, `cuda:N` or `mps`."""

    @property
    def deterministic(self) -> bool:
        """Whether a GPU may take deterministic algorithms only."""

    @property
    def data(self) -> DataConfig:
        """The frames."""

    @property
    def tasks(self) -> dict[str, TaskConfig]:
        """What is learned."""


C = TypeVar("C", bound=RunConfig)


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
    deterministic: bool = False
    """Let a GPU take deterministic algorithms only, which are slower; a CPU needs no such thing."""
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


@dataclass(frozen=True, kw_only=True)
class TaskSharingConfig:
    """Everything that a run depends on which searches what tasks share."""

    seed: int = 0
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps`."""
    deterministic: bool = False
    """Let a GPU take deterministic algorithms only, which are slower; a CPU needs no such thing."""
    data: DataConfig
    tasks: dict[str, TaskConfig]
    backbone: BackboneConfig
    latency: LatencyConfig | None = None
    """Of an EDNAS backbone; null leaves latencies out."""
    branching: BranchingConfig | None = None
    """Of `oneshot-ednas branch`."""
    operators: OperatorSharingConfig | None = None
    """Of `oneshot-ednas share`."""
    derive: ScoringConfig = ScoringConfig()
    """How candidates are scored; how many there are, the search says."""
    retrain: RetrainConfig
    divide_learning_rate: bool | None = None
    """Whether the learning rate of a layer is divided by the number of tasks that share it (BMTAS
    appendix A), whose gradients add up in it. null is yes for `sgd` and no for `adam`, whose steps
    do not grow with the gradient."""
    baselines: tuple[str, ...] = ("separate", "shared")
    """Trained like the found network: `separate` has an encoder per task, its single-task network,
    and is what gains are counted from; `shared` has one for all. Of a branching, `vanilla` parts
    all tasks at the layer, and `random` is the drawn tree, whose cost is nearest to the found one;
    `permuted` is the found tree with other tasks at its ends."""
    num_permutations: int = 5
    """Networks of `permuted`."""

    def __post_init__(self) -> None:
        """Check what no module can check alone."""
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}")
        check_num_tasks(len(self.tasks))
        for name in self.baselines:
            if name not in SHARING_BASELINES:
                raise ValueError(
                    f"baselines: expected some of {', '.join(SHARING_BASELINES)}, got {name}"
                )
        if len(set(self.baselines)) != len(self.baselines):
            raise ValueError(f"baselines: each at most once, got {', '.join(self.baselines)}")
        if self.num_permutations < 1:
            raise ValueError(f"num_permutations: expected at least 1, got {self.num_permutations}")
        if self.latency is not None and self.backbone.name != EDNAS:
            raise ValueError(
                f"latency tables are of EDNAS spaces, the backbone is {self.backbone.name}; leave "
                f"latency out"
            )
        if self.branching is not None:
            needs = self.branching.objective == "budget" or self.branching.resource == "latency"
            if needs and self.latency is None:
                raise ValueError(
                    "objective: budget and resource: latency need latency with a table of an EDNAS "
                    "space; give it, or use objective: weighted with resource: macs"
                )

    @property
    def divides_learning_rate(self) -> bool:
        """`divide_learning_rate`, decided."""
        if self.divide_learning_rate is None:
            return self.retrain.optimizer.kind == "sgd"
        return self.divide_learning_rate


@overload
def load_config(path: Path, overrides: Iterable[str] = ()) -> ExperimentConfig: ...


@overload
def load_config(path: Path, overrides: Iterable[str] = (), *, kind: type[C]) -> C: ...


def load_config(path: Path, overrides: Iterable[str] = (), *, kind: Any = ExperimentConfig) -> Any:
    """Read a config, by its path or as shipped under `configs/`.

    Files that lie beside the config or in the working directory are named by absolute paths in
    the result, so that a run folder can be opened from anywhere; shipped ones keep their names.

    Args:
        path: the config.
        overrides: `dotted.key=value` settings.
        kind: the class of the config.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for anything wrong in it, with file and line.
    """
    path = find_file(path)
    return _with_absolute(load_yaml(path, kind, overrides=overrides), path.parent)


def _with_absolute(part: Any, folder: Path) -> Any:
    changes: dict[str, Any] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if is_dataclass(value):
            changes[field.name] = _with_absolute(value, folder)
        elif field.name in FILE_SETTINGS and isinstance(value, str):
            # A shipped space goes by a name, beside which a folder may have the same one; so do
            # the base architecture and that which is searched.
            is_name = field.name in ("space", "architecture") and not Path(value).suffix
            changes[field.name] = value if is_name else _absolute(value, folder)
    return replace(part, **changes)


def _absolute(name: str, folder: Path) -> str:
    if (folder / name).exists():
        return str((folder / name).absolute())
    return str(Path(name).absolute()) if Path(name).exists() and not is_shipped(name) else name


def what_defines(config: C) -> C:
    """The config without what may change between sittings of one run.

    That is where the data lies (its content is checked by itself), how many processes read it, the
    device, and how often the loops write.
    """
    changes: dict[str, Any] = {
        "device": "auto",
        "data": replace(config.data, root=None, workers=None),
    }
    for field in fields(config):
        part = getattr(config, field.name)
        if isinstance(getattr(part, "loop", None), LoopConfig):
            changes[field.name] = replace(part, loop=LoopConfig())
    return replace(config, **changes)


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
