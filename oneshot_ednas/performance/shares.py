"""What a whole search costs beside one retraining, and the share of data loading in a step."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.config import load_config
from oneshot_ednas.latency.operations import network_macs, relaxed_macs
from oneshot_ednas.performance.plan import Plan, Row
from oneshot_ednas.performance.timing import Spread, Work, interleaved, ratio
from oneshot_ednas.performance.workload import Workload
from oneshot_ednas.retrain import StandAloneTraining
from oneshot_ednas.schema import read_json
from oneshot_ednas.search import OneShotSearch
from oneshot_ednas.training import training_batch

MAX_SEARCH_RATIO = 3.0
MAX_DATA_PERCENT = 5.0


def phase_shares(search: OneShotSearch) -> tuple[float, float]:
    """Shares of the weight steps that are warm-up, and that have an alpha step with them."""
    config = search.config
    warm_up = config.warmup_steps
    num_alpha = sum(step % config.alpha_every == 0 for step in range(warm_up, config.steps))
    return warm_up / config.steps, num_alpha / config.steps


def weight_step_macs(workload: Workload, search: OneShotSearch, step: int) -> int:
    """Forward multiply-adds per frame of a weight step of the warm-up."""
    runs = search.sample_paths(step, uniform=True)
    if workload.config.search.sandwich:
        largest = workload.space.extreme(runs[0], largest=True)
        runs = [largest, *runs, workload.space.extreme(runs[-1], largest=False)]
    return sum(_macs(workload, one) for one in runs)


def search_macs_ratio(workload: Workload, *, num_draws: int) -> float:
    """Multiply-adds of all steps of the search over those of as many steps of retraining.

    Args:
        workload: of the config.
        num_draws: weight steps and results of the search behind a mean.
    """
    search = workload.search()
    _, alpha_share = phase_shares(search)
    weights = [weight_step_macs(workload, search, step) for step in range(num_draws)]
    relaxed = relaxed_macs(workload.space, workload.image_size, workload.out_channels)
    derived = [_macs(workload, one) for one in workload.derived(num_draws)]
    above = sum(weights) / len(weights) + alpha_share * relaxed
    batches = workload.config.search.batch_size / workload.config.retrain.batch_size
    return batches * above / (sum(derived) / len(derived))


def _macs(workload: Workload, architecture: Architecture) -> int:
    return network_macs(workload.space, architecture, workload.image_size, workload.out_channels)


class _Steps:
    """The same steps of a search or of some trainings, one after the other."""

    def __init__(
        self, searches: Sequence[OneShotSearch | StandAloneTraining], steps: Sequence[int]
    ) -> None:
        self.searches, self.steps = searches, steps

    def __call__(self) -> None:
        for one in self.searches:
            for step in self.steps:
                one.take_step(step)


def search_seconds(
    workload: Workload, *, repeats: int, num_steps: int
) -> tuple[list[float], list[float], Mapping[str, float]]:
    """Seconds per step of a search, its phases weighted by their shares, and of retraining.

    Returns:
        Of each round, of the search and of retraining; and the median of each part.
    """
    search = workload.search()
    config = search.config
    warm_up_share, alpha_share = phase_shares(search)
    first = -(-config.warmup_steps // config.alpha_every) * config.alpha_every
    trainings = [workload.training(one) for one in workload.derived(num_steps)]
    works = {
        "warm_up": _Steps([search], range(num_steps)),
        "alternating": _Steps([search], [first + i * config.alpha_every for i in range(num_steps)]),
        "retrain": _Steps(trainings, [0]),
    }
    if warm_up_share == 0:
        del works["warm_up"]
    seconds = interleaved(works, repeats=repeats, device=workload.device)
    per_step = {name: [value / num_steps for value in values] for name, values in seconds.items()}
    # Steps after the warm-up without an alpha step cost as those of the warm-up.
    weights = per_step.get("warm_up", per_step["alternating"])
    above = [
        (1 - alpha_share) * weight + alpha_share * both
        for weight, both in zip(weights, per_step["alternating"], strict=True)
    ]
    medians = {name: Spread.of(values).median for name, values in per_step.items()}
    return above, per_step["retrain"], medians


def whole_search(plan: Plan) -> list[Row]:
    """The search against one retraining as long, of networks drawn inside the target."""
    rows = []
    for name, workload in plan.defaults.items():
        what = (
            f"whole search over one retraining of a network drawn inside the target, for as "
            f"many steps, {name} as shipped ({workload.size})"
        )
        rows.append(
            Row(
                name=f"whole_search.{name}.macs",
                what=f"{what}: multiply-adds",
                measured=Spread.exactly(search_macs_ratio(workload, num_draws=plan.num_draws)),
                unit="x",
                bound=MAX_SEARCH_RATIO,
            )
        )
        if name not in plan.timed:
            continue
        above, below, parts = search_seconds(
            workload, repeats=plan.repeats, num_steps=plan.num_steps
        )
        rows.append(
            Row(
                name=f"whole_search.{name}.time",
                what=f"{what}: time",
                measured=ratio(above, below),
                unit="x",
                bound=MAX_SEARCH_RATIO,
                details={"seconds_per_step": parts},
            )
        )
    return rows


def finished_run(folder: Path) -> list[Row]:
    """What the search of a run has cost beside one retraining of what it found.

    Args:
        folder: of a finished one-shot run.

    Raises:
        ValueError: if it is none.
    """
    path = folder / "results.json"
    results = read_json(path) if path.is_file() else {}
    if results.get("method") != "one_shot":
        raise ValueError(f"{folder}: expected a finished one-shot run, with its results.json")
    config = load_config(folder / "config.yaml")
    cost, search, retrain = results["cost"], config.search, config.retrain
    lengths = {
        "run": (
            1.0,
            f"of {search.steps} steps over one retraining of its result, of "
            f"{retrain.steps} steps, as run",
        ),
        "step": (
            retrain.steps / search.steps,
            "over one retraining of its result for as many steps, from a run",
        ),
    }
    kinds = (("macs", "macs", "multiply-adds"), ("time", "seconds", "time"))
    return [
        Row(
            name=f"whole_search.{length}.{name}",
            what=f"search {what}: {folder.name}: {words}",
            measured=Spread.exactly(
                factor * cost[f"search_{key}"] / cost[f"retrain_{key}"] * retrain.num_seeds
            ),
            unit="x",
            bound=MAX_SEARCH_RATIO,
            details=cost,
        )
        for length, (factor, what) in lengths.items()
        for name, key, words in kinds
    ]


def data_loading(plan: Plan) -> list[Row]:
    """Reading and augmenting a batch as a share of a training step, the shortest there is."""
    rows = []
    for name, workload in plan.defaults.items():
        (architecture,) = workload.derived(1)
        training = workload.training(architecture)
        batch = partial(
            training_batch,
            training.split,
            name="retrain",
            step=0,
            batch_size=training.config.batch_size,
            seed=training.seed,
            augmentation=training.augmentation,
            device=workload.device,
        )
        # After a step, as in a training, and not after what comes between the rounds.
        works: dict[str, Work] = {"step": partial(training.take_step, 0), "batch": batch}
        seconds = interleaved(works, repeats=plan.repeats, device=workload.device)
        rows.append(
            Row(
                name=f"data_loading.{name}",
                what=f"batch of a retraining step, {name} as shipped ({workload.size})",
                measured=ratio([100 * value for value in seconds["batch"]], seconds["step"]),
                unit="%",
                bound=MAX_DATA_PERCENT,
                details={key: Spread.of(values).median for key, values in seconds.items()},
            )
        )
    return rows
