"""How step time and memory grow with image area, batch, number of tasks and width of the space."""

from collections.abc import Mapping
from functools import partial

from oneshot_ednas.performance.plan import Plan, Row
from oneshot_ednas.performance.timing import (
    MIB,
    Spread,
    Work,
    activation_bytes,
    fitted_exponent,
    interleaved,
)
from oneshot_ednas.performance.workload import Workload
from oneshot_ednas.search import OneShotSearch

STEPS = ("weight step", "alpha step")


def axes(plan: Plan) -> dict[str, dict[float, Workload]]:
    """Workloads by what grows, and by how large that is."""
    base, factors = plan.growth, plan.growth_factors
    height, width = base.image_size
    batch_size = base.config.search.batch_size
    # Sides of 1, 1.5 and 2 times the smallest, for factors of 1, 2 and 4.
    sides = [
        (1 + i / 2, (height * (2 + i) // 2, width * (2 + i) // 2)) for i in range(len(factors))
    ]
    return {
        "image area": {side**2: base.resized(image_size=size) for side, size in sides},
        "batch": {float(f): base.resized(batch_size=f * batch_size) for f in factors},
        "tasks": {float(f): base.resized(num_tasks=f) for f in factors},
        "width": {float(f): base.resized(width_factor=f) for f in factors},
    }


def growth(plan: Plan) -> list[Row]:
    """Exponents of time and activation memory of a weight step and of an alpha step.

    A weight step has one network, drawn uniformly by the same choices at each size.
    """
    rows = []
    for axis, workloads in axes(plan).items():
        searches = {size: one.warm_up_only().search() for size, one in workloads.items()}
        for kind in STEPS:
            rows += _exponents(plan, axis, kind, searches)
    return rows


def _exponents(
    plan: Plan, axis: str, kind: str, searches: Mapping[float, OneShotSearch]
) -> list[Row]:
    works = {size: _work(kind, search) for size, search in searches.items()}
    named = {str(size): work for size, work in works.items()}
    seconds = interleaved(named, repeats=plan.repeats, device=plan.device)
    values = {
        "time": {size: Spread.of(seconds[str(size)]).median for size in works},
        "memory": {
            size: activation_bytes(work, searches[size].supernet, searches[size].alpha) / MIB
            for size, work in works.items()
        },
    }
    rows = []
    for what, found in values.items():
        fit = fitted_exponent(list(found), list(found.values()))
        around = 0.0 if fit.standard_error is None else fit.standard_error
        rows.append(
            Row(
                name=f"growth.{axis.replace(' ', '_')}.{kind.replace(' ', '_')}.{what}",
                what=f"{what} of a{'n' * (kind[0] == 'a')} {kind} against {axis}, from "
                f"{plan.growth.size}",
                measured=Spread(
                    median=fit.exponent,
                    low=fit.exponent - around,
                    high=fit.exponent + around,
                    count=len(found),
                ),
                unit="exponent",
                details={
                    "standard_error": fit.standard_error,
                    "sizes": list(found),
                    "seconds" if what == "time" else "mib": list(found.values()),
                },
            )
        )
    return rows


def _work(kind: str, search: OneShotSearch) -> Work:
    return partial(search.take_step if kind == STEPS[0] else search._alpha_step, 0)
