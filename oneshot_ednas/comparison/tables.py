"""The tables of a comparison, as text, and what may be said in one sentence."""

from collections.abc import Callable, Iterable, Sequence

from oneshot_ednas.comparison.compared import Comparison
from oneshot_ednas.comparison.methods import Found, Method, spread
from oneshot_ednas.report.markup import duration, metric_label, number

Row = list[str]

DIFFERENCE_HEAD = ["Difference in reward", "mean", "95 % interval", "seeds", "verdict"]
RUN_HEAD = ["Run", "method", "seed", "reward", "latency, ms", "architecture"]


def result_rows(found: Comparison) -> list[Row]:
    """What each method found and spent: a column per method."""
    methods = found.methods

    def over(value: Callable[[Found], float], form: Callable[[float], str] = number) -> Row:
        return [_spread_text((value(one) for one in method.found), form) for method in methods]

    def macs_text(macs: float) -> str:
        return number(macs / 10**found.macs_power) if macs else "0"

    macs = f"10^{found.macs_power} multiply-adds"
    rows = [
        ["Seeds", *(_seeds_text(method) for method in methods)],
        ["Reward ↑", *over(lambda one: one.reward)],
        ["Accuracy product ↑", *over(lambda one: one.accuracy)],
        ["Latency, ms ↓", *over(lambda one: one.latency_ms)],
        [
            f"Inside the target of {found.target_ms:.4g} ms",
            *(
                f"{sum(one.is_inside_target for one in method.found)} of {len(method.found)}"
                for method in methods
            ),
        ],
        ["Parameters ↓", *over(lambda one: one.figures["parameters"])],
        ["GMACs ↓", *over(lambda one: one.figures["gmacs"])],
    ]
    for name, task in found.tasks.items():
        for metric in task.reward_metrics:
            arrow = "↓" if metric in task.lower_is_better else "↑"
            values = [
                _spread_text(one.figures["metrics"][name][metric] for one in method.found)
                for method in methods
            ]
            rows.append([f"{metric_label(name, metric)} {arrow}", *values])
    search = "Search would have taken" if found.is_predicted else "Search"
    rows += [
        [f"{search}, {macs}", *over(lambda one: one.search.macs, macs_text)],
        [f"{search}, time", *over(lambda one: one.search.seconds, duration)],
    ]
    if found.is_predicted:  # picks are not retrained
        return rows
    return [
        *rows,
        [f"With retraining, {macs}", *over(lambda one: one.cost.macs, macs_text)],
        ["With retraining, time", *over(lambda one: one.cost.seconds, duration)],
    ]


def _seeds_text(method: Method) -> str:
    text = f"{len(method.found)} ({', '.join(map(str, method.seeds))})"
    missing = f"; missing {', '.join(map(str, method.missing))}" if method.missing else ""
    return text + missing


def _spread_text(values: Iterable[float], form: Callable[[float], str] = number) -> str:
    """Mean and standard deviation; figures with a unit of their own go without the latter."""
    both = spread(values)
    mean, std = both["mean"], both["std"]
    assert mean is not None
    return form(mean) if std is None or form is not number else f"{number(mean)} ± {_short(std)}"


def _short(std: float) -> str:
    return f"{std:,.0f}" if std >= 100 or std == 0 else f"{std:#.2g}".rstrip(".")


def gain_rows(found: Comparison) -> list[Row]:
    """The paper's table: gain per metric, per task and overall, in percent."""
    gains = list(found.gains.values())
    rows: list[Row] = []
    for name, task in found.tasks.items():
        for metric in task.reward_metrics:
            cells = [_signed_text([one.metrics[name][metric] for one in runs]) for runs in gains]
            rows.append([metric_label(name, metric), *cells])
        rows.append(
            [f"{name}: all", *(_signed_text([r.tasks[name] for r in runs]) for runs in gains)]
        )
    return [*rows, ["All tasks", *(_signed_text([one.overall for one in runs]) for runs in gains)]]


def _signed_text(values: Sequence[float]) -> str:
    both = spread(values)
    assert both["mean"] is not None
    std = "" if both["std"] is None else f" ± {both['std']:.2f}"
    return f"{round(both['mean'], 2) + 0.0:+.2f}{std}"  # + 0.0: no negative zero


def difference_rows(found: Comparison) -> list[Row]:
    """Every pair of methods, its interval, and which may be called better."""
    labels = {method.name: method.label for method in found.methods}
    rows = []
    for one in found.differences:
        has_interval = one.low is not None and one.high is not None
        interval = f"{one.low:+.4f} to {one.high:+.4f}" if has_interval else "none: one seed"
        verdict = f"{labels[one.winner]} is better" if one.winner else "no difference shown"
        rows.append(
            [
                f"{labels[one.one]} against {labels[one.other]}",
                f"{one.value:+.4f}",
                interval,
                f"{one.num_runs[0]}, {one.num_runs[1]}",
                verdict,
            ]
        )
    return rows


def run_rows(found: Comparison) -> list[Row]:
    """Every run folder, finished or not."""
    rows = []
    for run in found.runs:
        results = run.results
        figures = ["", "", "not finished"]
        if results is not None:
            figures = [number(results["reward"]), number(results["latency_ms"])]
            figures.append(results["architecture"])
        rows.append([str(run.folder), run.method, str(run.seed), *figures])
    return rows


def verdict(found: Comparison) -> str:
    """What may be said in one sentence."""
    best = max(found.methods, key=lambda method: method.reward)
    pairs = [one for one in found.differences if best.name in (one.one, one.other)]
    if not pairs:
        return f"Only {best.label} has finished runs."
    labels = {method.name: method.label for method in found.methods}
    beaten = [
        labels[one.other if one.one == best.name else one.one]
        for one in pairs
        if one.winner == best.name
    ]
    reward = "reward predicted by the benchmark" if found.is_predicted else "reward"
    start = f"Highest mean {reward}: {best.label}, {number(best.reward)}"
    if len(beaten) == len(pairs):
        return f"{start}; shown to be better than {_and(beaten)}."
    others = [
        labels[name]
        for one in pairs
        for name in (one.one, one.other)
        if name != best.name and one.winner is None
    ]
    better = f"; shown to be better than {_and(beaten)}" if beaten else ""
    return f"{start}{better}; against {_and(others)} no difference is shown."


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
