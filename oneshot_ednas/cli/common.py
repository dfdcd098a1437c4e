"""What all commands share: the group, options, errors as one line, tables on the console."""

import json
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TextIO

import click
from rich.console import Console
from rich.table import Table

from oneshot_ednas import distributed
from oneshot_ednas.config import C
from oneshot_ednas.parsing import one_line
from oneshot_ednas.run_folder import RunFiles
from oneshot_ednas.schema import read_json
from oneshot_ednas.training import Interrupted
from oneshot_ednas.workers import sigterm_as_ctrl_c

P = ParamSpec("P")
DEFAULT_TASKS = "segmentation=19,depth=1"
IN_SEVERAL_PROCESSES = ("run", "demo", "search", "retrain")
"""Commands for torchrun."""
DETAILS = ("rmse", "delta_1", "delta_2", "delta_3", "within_22", "within_30")
"""Metrics left to the report."""


def bad_input(function: Callable[P, None]) -> Callable[P, None]:
    """Turn errors into one line and an exit status; `--debug` keeps the traceback.

    SIGTERM stops a command as Ctrl-C does.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        warnings.showwarning = _show_warning
        if click.get_current_context().find_root().params.get("debug"):
            function(*args, **kwargs)
            distributed.finish()
            return
        try:
            try:
                with sigterm_as_ctrl_c():
                    function(*args, **kwargs)
                    distributed.finish()
            except Interrupted as stop:
                _stop(f"{stop}; {_how_to_go_on()}")
        except KeyboardInterrupt:  # also while the one before is being told
            _stop(f"stopped; {_how_to_go_on()}")
        except (ValueError, OSError) as error:
            _fail(_one_line(error), status=2)
        except MemoryError as error:
            _fail(
                f"out of memory ({_one_line(error) or 'nothing is left'}); lower the batch sizes",
                status=1,
            )
        except RuntimeError as error:
            _fail(_one_line(error), status=1)

    return wrapper


def _how_to_go_on() -> str:
    has_resume = any(o.name == "resume" for o in click.get_current_context().command.params)
    return "go on with --resume" if has_resume else "go on with the same command"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line, without the place in our code that Python would print."""
    del category, filename, lineno, file, line
    if distributed.is_main():
        print(f"warning: {one_line(str(message))}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return one_line(f"{error.filename}: {error.strerror}")
    return one_line(str(error))


def _stop(message: str) -> NoReturn:
    # One more Ctrl-C would end the interpreter on its way out, with another status.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    _fail(message, status=130)


def _fail(message: str, *, status: int) -> NoReturn:
    if distributed.is_first_to_fail():
        text = f"error: {message}" if status != 130 else message
        print(text, file=sys.stderr, flush=True)
    sys.exit(status)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="oneshot-ednas")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """One-shot architecture search for multi-task dense prediction on the Coral Edge TPU."""
    command = click.get_current_context().invoked_subcommand
    if distributed.is_launched() and command not in IN_SEVERAL_PROCESSES:
        known = ", ".join(IN_SEVERAL_PROCESSES)
        _fail(f"{command} runs in one process; leave out torchrun, which is for {known}", status=2)


out_option = click.option(
    "--out", "out", type=click.Path(path_type=Path), required=True, help="Run folder."
)
data_option = click.option(
    "--data", "data", type=click.Path(path_type=Path), help="Data folder, for source: folder."
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
workers_option = click.option(
    "--workers",
    default="1",
    show_default=True,
    metavar="N|ray[:N]",
    help="Trainings at a time: in N processes, or as Ray tasks.",
)
uncalibrated_option = click.option(
    "--allow-uncalibrated",
    is_flag=True,
    help="Go on with a latency table whose error on whole networks is unknown.",
)
resume_option = click.option("--resume", is_flag=True, help="Go on with the run in the folder.")


def with_data(config: C, data: Path | None) -> C:
    """The config with the data folder of --data, absolute, so that later stages find it."""
    if data is None:
        return config
    changed: dict[str, Any] = {"data": replace(config.data, root=str(data.resolve()))}
    return replace(config, **changed)


def with_consent(overrides: tuple[str, ...], *, is_given: bool) -> tuple[str, ...]:
    """The settings of --set, and that of --allow-uncalibrated where it is given."""
    return (*overrides, "latency.allow_uncalibrated=true") if is_given else overrides


def console() -> Console:
    """Standard output, as wide as the terminal; names in brackets or colons are but names."""
    # Piped output is not folded to 80 columns.
    return Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False)


def read_channels(text: str) -> dict[str, int]:
    """Output channels per task from `name=channels,...`.

    Raises:
        ValueError: for another form, or a name given twice.
    """
    channels: dict[str, int] = {}
    for part in text.split(","):
        name, separator, count = part.strip().partition("=")
        if not separator or not count.isdigit() or int(count) < 1 or not name:
            raise ValueError(f"--tasks: expected name=channels, as {DEFAULT_TASKS}; got {part!r}")
        if name in channels:
            raise ValueError(f"--tasks: {name} is given twice")
        channels[name] = int(count)
    return channels


def print_results(results: Mapping[str, Any], folder: Path, *, as_json: bool) -> None:
    """The results of a run as a table, or as one JSON object."""
    if as_json:
        print(json.dumps(results))
        return
    table = Table(title=f"test split, target {results['target_ms']:g} ms")
    for column in ("network", "latency ms", "in budget", "reward", "params", "GMACs"):
        table.add_column(column, justify="left" if column == "network" else "right")
    columns = [(task, name) for task, values in results["metrics"].items() for name in values]
    shown = [c for c in columns if c[1] not in DETAILS]
    for task, name in shown:
        table.add_column(f"{task}\n{name}", justify="right")
    name = "derived" if results["method"] == "one_shot" else "best trial"
    rows = {name: results, **results["baselines"]}
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['latency_ms']:.3f}",
            "yes" if row["is_inside_target"] else "no",
            f"{row['reward']:.4f}",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['gmacs']:.3f}",
            *(f"{row['metrics'][task][metric]:.3f}" for task, metric in shown),
        )
    console().print(table)
    # Those in the results end with the evaluation.
    seconds = sum(read_json(RunFiles(folder).seconds).values())
    written = folder / ("report.html" if results["method"] == "one_shot" else "results.json")
    print(f"architecture: {results['architecture']}")
    print(f"{seconds:.0f} s in all; {written.stem}: {written}")
