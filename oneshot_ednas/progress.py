"""Progress bars on a terminal's stderr, all of one look; elsewhere they write nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


def terminal_progress(
    *more: ProgressColumn, unit: str = "", is_transient: bool = False
) -> Progress:
    """Bars that are shown while the result is entered.

    Args:
        more: columns on the right of the common ones.
        unit: of what is counted.
        is_transient: whether they vanish at the end.
    """
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *([TextColumn(unit, markup=False)] if unit else []),
        TimeRemainingColumn(),
        *more,
        console=console,
        disable=not console.is_terminal,
        transient=is_transient,
    )


@contextmanager
def progress_bar(text: str, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
    """A bar over jobs of some seconds or more; gives what moves it by one."""
    with terminal_progress() as progress:
        bar = progress.add_task(text, total=total, completed=done)
        yield lambda: progress.advance(bar)


@contextmanager
def counting_bar(text: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """A bar that vanishes at the end; gives what sets it to what is done and what there is."""
    with terminal_progress(unit=unit, is_transient=True) as progress:
        bar = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)
