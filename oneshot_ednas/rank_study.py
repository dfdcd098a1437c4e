"""Rank correlation of a supernet: its scores against stand-alone trainings of a benchmark."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.benchmark.table import Benchmark
from oneshot_ednas.config import ExperimentConfig
from oneshot_ednas.deploy import file_digest
from oneshot_ednas.models.network import build_network
from oneshot_ednas.progress import progress_bar
from oneshot_ednas.rank_correlation import (
    Agreement,
    Array,
    Estimate,
    agreement,
    expected_ceiling,
    group_means,
    noise_ceiling,
    rank_differences,
    resample_counts,
)
from oneshot_ednas.ranking import score_with_supernet
from oneshot_ednas.report.markup import markdown_table
from oneshot_ednas.report.plots import CYCLE, GREY, PANEL_INCHES, STYLE, draw_panels, to_png
from oneshot_ednas.reward import reward
from oneshot_ednas.run_folder import Experiment, RunFiles
from oneshot_ednas.schema import load_yaml, read_json
from oneshot_ednas.search import OneShotSearch, resume_search
from oneshot_ednas.space import CHOICE_FIELDS, SearchSpace
from oneshot_ednas.store import (
    append_json_line,
    read_json_lines,
    write_bytes,
    write_json,
    write_text,
)
from oneshot_ednas.training import (
    Interrupted,
    Metrics,
    StopRequest,
    accuracy_of,
    numpy_generator,
)

MIN_ARCHITECTURES = 4
"""Below this there is nothing to rank."""
CEILING = "expected_ceiling_of_all"
RATIO = "supernet_over_expected_ceiling"
TITLES = {
    "kendall_tau": "Kendall tau",
    "spearman": "Spearman",
    "top_10_percent": "top 10 %",
    "top_25_percent": "top 25 %",
}


# Scores with supernet weights -----------------------------------------------------------------


def open_search(experiment: Experiment, folder: Path) -> OneShotSearch:
    """The search of a run folder, which is only read, on the frames of a study.

    Raises:
        FileNotFoundError: if it is no run folder, or its search has not begun.
        ValueError: if the run is of another space, data, splits or tasks than the study.
    """
    files = RunFiles(folder)
    checkpoint = files.checkpoint("search")
    for path in (files.config, checkpoint):
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no supernet: {path} is missing; train one with oneshot-ednas search"
            )
    config = load_yaml(files.config, ExperimentConfig)
    ours = experiment.config
    same = {
        "space": SearchSpace.load(files.space) == experiment.space,
        "data": read_json(files.data) == experiment.data_digests,
        "splits (search.splits, split_seed, seed)": read_json(files.splits)
        == experiment.split_sources,
        "tasks": config.tasks == ours.tasks,
    }
    differing = [name for name, is_same in same.items() if not is_same]
    if differing:
        raise ValueError(
            f"{folder} and the study differ in {', '.join(differing)}; scores are comparable only "
            f"where these are the same: search with the study's config"
        )
    search = OneShotSearch(
        config.search,
        experiment.space,
        experiment.tasks,
        experiment.table,
        target_ms=experiment.target_ms,
        splits={name: experiment.part(name) for name in ("weights", "alpha")},
        augmentation=config.data.augment,
        seed=config.seed,
        device=experiment.device,
    )
    resume_search(search, checkpoint)
    return search


def supernet_scores(
    search: OneShotSearch,
    experiment: Experiment,
    architectures: Sequence[Architecture],
    *,
    checkpoint: Path,
) -> dict[Architecture, Metrics]:
    """Validation metrics with supernet weights and recalibrated BN statistics, resumable.

    Each score is a line of `supernet_scores.jsonl` in the study's folder, with the digest of the
    checkpoint that it is of; lines of other checkpoints are left alone.

    Args:
        search: the search, from this checkpoint.
        experiment: the study.
        architectures: what to score.
        checkpoint: the search's checkpoint file.

    Raises:
        Interrupted: after Ctrl-C; finished scores are kept.
        ValueError: if a line of the file is damaged.
    """
    path, digest = experiment.files.folder / "supernet_scores.jsonl", file_digest(checkpoint)
    rows = read_json_lines(
        path, lambda row: (row["sha256"], Architecture.from_short(row["architecture"]), row)
    )
    scores = {name: row["metrics"] for of, name, row in rows if of == digest}
    left = [architecture for architecture in architectures if architecture not in scores]
    total = len(architectures)
    with StopRequest() as stop, progress_bar("scores", total, total - len(left)) as advance:
        for architecture in left:
            metrics = score_with_supernet(
                search.supernet,
                architecture,
                experiment.tasks,
                calibration=experiment.part("weights"),
                validation=experiment.part("validation"),
                config=experiment.config.derive,
                seed=experiment.config.seed,
                device=experiment.device,
            )
            scores[architecture] = metrics
            row = {"sha256": digest, "architecture": str(architecture), "metrics": metrics}
            append_json_line(path, row)
            advance()
            if stop.is_set:
                raise Interrupted(f"stopped with {len(scores)} of {total} architectures scored")
    return {architecture: scores[architecture] for architecture in architectures}


# Correlations ---------------------------------------------------------------------------------


def rank_results(
    benchmark: Benchmark,
    scores: Mapping[Architecture, Metrics],
    experiment: Experiment,
    *,
    scored: Mapping[str, Any],
) -> dict[str, Any]:
    """All statistics of supernet scores against the stand-alone trainings of a benchmark.

    The scores of all architectures are compared with single trainings (those of the first seed),
    as the noise ceiling compares single trainings; and, over the repeated architectures, with the
    mean of their seeds. A share of the ceiling is that of the one expected of all architectures.

    Args:
        benchmark: the stand-alone trainings.
        scores: with supernet weights.
        experiment: the study.
        scored: what the scores are of: `run`, `search_step`, `search_steps`, and the file name of
            the `benchmark` or None.

    Returns:
        What `rank.json` holds, see the README.

    Raises:
        ValueError: if there are too few architectures.
    """
    entries, repeated = benchmark.entries, benchmark.repeated
    if len(entries) < MIN_ARCHITECTURES:
        raise ValueError(
            f"expected at least {MIN_ARCHITECTURES} architectures to rank, got {len(entries)}"
        )
    architectures = [entry.architecture for entry in entries]
    names = [entry.architecture for entry in repeated]
    seed = experiment.config.seed
    counts = resample_counts(len(entries), numpy_generator(seed, "bootstrap"))
    predictors = {
        name: np.array([predict(one) for one in architectures], dtype=float)
        for name, predict in {
            "multiply_adds": experiment.macs,
            "parameters": lambda one: _num_parameters(experiment, one),
            "latency_ms": experiment.costs.latency_ms,
        }.items()
    }
    supernet = _table(experiment, architectures, [scores[one] for one in architectures])
    alone = _table(experiment, architectures, [entry.trainings[0].metrics for entry in entries])
    per_seed, mean_counts = [], np.zeros((0, 0))
    if len(repeated) >= MIN_ARCHITECTURES:
        for number in range(len(repeated[0].trainings)):
            metrics = [entry.trainings[number].metrics for entry in repeated]
            per_seed.append(_table(experiment, names, metrics))
        generator = numpy_generator(seed, "bootstrap", "repeated")
        mean_counts = resample_counts(len(repeated), generator)
    is_repeated = np.isin(np.arange(len(entries)), [architectures.index(one) for one in names])
    targets = {}
    for target, values in alone.items():
        found: dict[str, Agreement] = {"supernet": agreement(supernet[target], values, counts)}
        ratio = None
        if per_seed:
            by_seed = np.array([table[target] for table in per_seed])
            found["noise_ceiling"] = noise_ceiling(by_seed, mean_counts)
            found[CEILING] = expected_ceiling(
                values, by_seed, numpy_generator(seed, "ceiling", target)
            )
            ratio = found["supernet"].over(found[CEILING])
            found["supernet_on_mean_of_seeds"] = agreement(
                supernet[target][is_repeated], by_seed.mean(0), mean_counts
            )
        found |= {name: agreement(row, values, counts) for name, row in predictors.items()}
        rows = {name: one.estimates() for name, one in found.items()}
        if ratio is not None:
            # The best few are drawn with too much chance for a ratio.
            rows[RATIO] = {name: ratio[name] for name in ("kendall_tau", "spearman")}
        targets[target] = {name: _plain(row) for name, row in rows.items()}
    differences = rank_differences(supernet["accuracy"], alone["accuracy"])
    return {
        **scored,
        "num_architectures": len(entries),
        "num_repeated": len(names) if per_seed else 0,
        "num_seeds": len(per_seed) or 1,
        "steps": benchmark.steps,
        "targets": targets,
        "mean_accuracy": {
            "supernet": float(supernet["accuracy"].mean()),
            "stand_alone": float(alone["accuracy"].mean()),
        },
        "bias": _bias(experiment.space, architectures, differences, counts),
        "architectures": [
            {
                "architecture": str(architecture),
                "seeds": [training.seed for training in entry.trainings],
                **{name: float(row[i]) for name, row in predictors.items()},
                "supernet": {name: float(row[i]) for name, row in supernet.items()},
                "stand_alone": {name: float(row[i]) for name, row in alone.items()},
            }
            for i, (architecture, entry) in enumerate(zip(architectures, entries, strict=True))
        ],
    }


def _table(
    experiment: Experiment, architectures: Sequence[Architecture], metrics: Sequence[Metrics]
) -> dict[str, Array]:
    """Accuracy product, reward and reward metrics: [architectures] each; errors are negated."""
    tasks, rows = experiment.tasks, []
    for architecture, one in zip(architectures, metrics, strict=True):
        accuracy = accuracy_of(tasks, one)
        latency_ms = experiment.costs.latency_ms(architecture)
        row = {
            "accuracy": accuracy,
            "reward": reward(accuracy, latency_ms, experiment.target_ms),
        }
        for name, task in tasks.items():
            for metric in task.reward_metrics:
                sign = -1 if metric in task.lower_is_better else 1
                row[f"{name}.{metric}"] = sign * one[name][metric]
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _num_parameters(experiment: Experiment, architecture: Architecture) -> int:
    return build_network(experiment.space.fix(architecture), experiment.out_channels).num_parameters


def _bias(
    space: SearchSpace, architectures: Sequence[Architecture], differences: Array, counts: Array
) -> list[dict[str, Any]]:
    """Mean rank difference of the architectures that have an option, per choice and option."""
    rows, members = {}, {}
    for choice in space.choices:
        values = [getattr(one.blocks[choice.block - 1], choice.field) for one in architectures]
        for option in choice.options:
            name = f"{choice.name} {option}"
            members[name] = [value == option for value in values]
            rows[name] = {"block": choice.block, "field": choice.field, "option": option}
    means = group_means(differences, members, counts)
    return [row | {"count": sum(members[n]), **asdict(means[n])} for n, row in rows.items()]


def _plain(row: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: asdict(one) for name, one in row.items()}


# Files ----------------------------------------------------------------------------------------


def write_rank(results: Mapping[str, Any], folder: Path) -> None:
    """Write `rank.json`, `rank.md`, `rank_scatter.png` and `rank_bias.png`."""
    write_bytes(folder / "rank_scatter.png", scatter_plot(results))
    write_bytes(folder / "rank_bias.png", bias_plot(results["bias"]))
    write_text(folder / "rank.md", markdown(results))
    write_json(folder / "rank.json", results)


def correlation_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows of the table of correlations."""
    rows = [("score", "ranked by", *TITLES.values())]
    for target, found in results["targets"].items():
        for name, row in found.items():
            cells = [
                str(Estimate(**row[statistic])) if statistic in row else "" for statistic in TITLES
            ]
            rows.append((target, name.replace("_", " "), *cells))
    return rows


def markdown(results: Mapping[str, Any]) -> str:
    """The correlations and the bias per option as Markdown tables."""
    mean = results["mean_accuracy"]
    head, *rows = correlation_rows(results)
    bias_head = ("block", "choice", "option", "architectures", "rank difference")
    bias = [
        (str(row["block"]), row["field"], str(row["option"]), str(row["count"]), _signed(row))
        for row in results["bias"]
    ]
    repeated = (
        f"the noise ceiling is the mean agreement of two single trainings of "
        f"{results['num_repeated']} of them with {results['num_seeds']} seeds, and the expected "
        f"one of all is drawn with the noise of these and the spread of all"
        if results["num_repeated"]
        else "no architecture was trained with several seeds, so there is no noise ceiling"
    )
    return (
        f"# Rank correlation\n\n"
        f"{results['num_architectures']} architectures, each trained stand-alone for "
        f"{results['steps']} steps; scores are those of the validation split, and compare with "
        f"the training of the first seed; {repeated}. In brackets the 95 % bootstrap interval "
        f"over architectures. Mean accuracy product: {mean['supernet']:.4f} with supernet weights "
        f"(search step {results['search_step']} of {results['search_steps']}), "
        f"{mean['stand_alone']:.4f} stand-alone.\n\n"
        f"{markdown_table(head, rows)}\n\n"
        f"## Bias\n\n"
        f"Mean of (rank with supernet weights - stand-alone rank) / architectures, by accuracy "
        f"product, over the architectures that have an option: above 0 the supernet overrates "
        f"it.\n\n"
        f"{markdown_table(bias_head, bias)}\n"
    )


def _signed(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return "none"
    return f"{row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def scatter_plot(results: Mapping[str, Any]) -> bytes:
    """Supernet score against stand-alone training, one panel per score, as PNG."""
    rows, targets = results["architectures"], results["targets"]
    size = np.array([row["multiply_adds"] for row in rows]) / 1e6

    def draw(axes: Axes, target: str) -> None:
        found = targets[target]
        # Errors are kept negated, so that higher is better; they are drawn as they are.
        x, y = (np.abs([row[kind][target] for row in rows]) for kind in ("stand_alone", "supernet"))
        axes.scatter(x, y, c=size, s=14, cmap="viridis", linewidths=0)
        title = f"{target}\ntau {Estimate(**found['supernet']['kendall_tau'])}"
        if CEILING in found:
            ceiling = found[CEILING]["kendall_tau"]["value"]
            title += "" if ceiling is None else f", expected ceiling {ceiling:.2f}"
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("stand-alone, first seed")
        axes.set_ylabel("supernet weights")

    figure, grid = draw_panels(
        {target: partial(draw, target=target) for target in targets}, columns=min(3, len(targets))
    )
    with rc_context(STYLE):
        points = grid[0].collections[0]
        figure.colorbar(points, ax=grid, label="million multiply-adds", shrink=0.8)
        return to_png(figure)


def bias_plot(bias: Sequence[Mapping[str, Any]]) -> bytes:
    """Rank difference per option, one panel per kind of choice, as PNG."""
    with rc_context(STYLE):
        figure = Figure(
            figsize=(2 * PANEL_INCHES[0] * 1.5, 2 * PANEL_INCHES[1]), layout="constrained"
        )
        for axes, field in zip(figure.subplots(2, 2, sharey=True).flat, CHOICE_FIELDS, strict=True):
            rows = [row for row in bias if row["field"] == field and row["value"] is not None]
            blocks = sorted({row["block"] for row in rows})
            for block in blocks:
                options = [row for row in rows if row["block"] == block]
                width = 0.84 / len(options)
                at = block + (np.arange(len(options)) - (len(options) - 1) / 2) * width
                values, low, high = (
                    np.array([row[key] for row in options]) for key in ("value", "low", "high")
                )
                errors = np.maximum([values - low, high - values], 0)
                style = {"ecolor": GREY, "error_kw": {"linewidth": 0.8}}
                axes.bar(at, values, 0.9 * width, color=CYCLE, yerr=errors, **style)
                for x, row, end in zip(at, options, high, strict=True):
                    text = axes.annotate(
                        str(row["option"]).replace("_ibn", ""),
                        (x, max(end, 0)),
                        (0, 2),
                        textcoords="offset points",
                        ha="center",
                        va="bottom",
                        fontsize=6.5,
                        rotation=90 if len(options) > 2 else 0,
                    )
                    text.set_in_layout(False)  # which would take seconds
            axes.axhline(0, color=GREY, linewidth=0.8)
            axes.margins(y=0.2)
            axes.set_title(f"{field.replace('_', ' ')}: rank with supernet weights - stand-alone")
            axes.set_xticks(blocks)
            axes.set_xlabel("block")
        return to_png(figure)
