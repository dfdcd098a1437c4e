"""The command line: parse, call the package, print a table or one JSON object.

Exit status: 0 on success, 1 for a failure inside, 2 for bad input (one clear line), 130 when
stopped by the user.
"""

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TextIO

import click
from rich.console import Console
from rich.table import Table

from oneshot_ednas.schema import find_file, read_json

P = ParamSpec("P")
DEFAULT_TASKS = "segmentation=19,depth=1"
DEFAULT_IMAGE_SIZE = (256, 256)
HEAD_CHANNELS = 64
"""Simulated tables hold classifier rows for 1 to this many output channels."""


def bad_input(function: Callable[P, None]) -> Callable[P, None]:
    """Turn errors into one line and an exit status; `--debug` keeps the traceback."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        # Imported late: --help and bad arguments should not wait for torch.
        from oneshot_ednas.training import Interrupted

        warnings.showwarning = _show_warning
        if click.get_current_context().find_root().params.get("debug"):
            function(*args, **kwargs)
            return
        try:
            function(*args, **kwargs)
        except Interrupted as stop:
            _fail(f"{stop}; {_how_to_go_on()}", status=130)
        except (ValueError, OSError) as error:
            _fail(_one_line(error), status=2)
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
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _fail(message: str, *, status: int) -> None:
    print(f"error: {message}" if status != 130 else message, file=sys.stderr)
    sys.exit(status)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="oneshot-ednas")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """One-shot architecture search for multi-task dense prediction on the Coral Edge TPU."""


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
resume_option = click.option("--resume", is_flag=True, help="Go on with the run in the folder.")


# Runs ---------------------------------------------------------------------------------------


@main.command()
@click.argument("config")
@out_option
@data_option
@set_option
@resume_option
@json_option
@bad_input
def run(
    config: str,
    out: Path,
    data: Path | None,
    overrides: tuple[str, ...],
    resume: bool,
    as_json: bool,
) -> None:
    """Search, derive, retrain, evaluate and report.

    Example: oneshot-ednas run configs/demo.yaml --out runs/demo
    """
    from oneshot_ednas.pipeline import run_all

    one = _start(config, out, data, overrides, resume=resume)
    _print_results(run_all(one), out, as_json=as_json)


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Run folder.",
)
@resume_option
@json_option
@bad_input
def demo(out: Path, resume: bool, as_json: bool) -> None:
    """The whole pipeline on the embedded data, in minutes, on two CPU cores.

    Example: oneshot-ednas demo --out runs/demo
    """
    from oneshot_ednas.pipeline import run_all

    one = _start("configs/demo.yaml", out, None, (), resume=resume)
    _print_results(run_all(one), out, as_json=as_json)


@main.command()
@click.argument("config_or_run")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder, to start from a config.")
@data_option
@set_option
@resume_option
@json_option
@bad_input
def search(
    config_or_run: str,
    out: Path | None,
    data: Path | None,
    overrides: tuple[str, ...],
    resume: bool,
    as_json: bool,
) -> None:
    """Train the supernet and its architecture parameters.

    Example: oneshot-ednas search configs/demo.yaml --out runs/demo
    """
    if Path(config_or_run).is_dir():
        if out is not None or overrides:
            raise ValueError("a run folder keeps its config: --out and --set are for a new run")
        one = _reopen(Path(config_or_run), data)
    elif out is None:
        raise ValueError("search from a config needs --out DIR")
    else:
        one = _start(config_or_run, out, data, overrides, resume=resume)
    one.search()
    _print_stage(one, "search", as_json=as_json)


def _stage(name: str, help_text: str) -> None:
    @main.command(name, help=f"{help_text}\n\nExample: oneshot-ednas {name} runs/demo")
    @click.argument("run_folder", type=click.Path(path_type=Path))
    @data_option
    @json_option
    @bad_input
    def command(run_folder: Path, data: Path | None, as_json: bool) -> None:
        one = _reopen(run_folder, data)
        getattr(one, name)()
        if name == "evaluate":
            one.report()
            _print_results(_results(run_folder), run_folder, as_json=as_json)
        else:
            _print_stage(one, name, as_json=as_json)


_stage("derive", "Find the best architecture inside the latency target, exactly.")
_stage("retrain", "Train the derived architecture (and the baselines) from scratch.")
_stage("evaluate", "Score the trained networks on the test split; write results and report.")


def _start(
    config: str, out: Path, data: Path | None, overrides: tuple[str, ...], *, resume: bool
) -> Any:
    from oneshot_ednas.config import load_config
    from oneshot_ednas.pipeline import Run

    path = find_file(config)
    one = Run(_with_data(load_config(path, overrides), data), out)
    one.open(resume=resume)
    return one


def _reopen(folder: Path, data: Path | None) -> Any:
    from oneshot_ednas.config import load_config
    from oneshot_ednas.pipeline import Run, RunFiles

    path = RunFiles(folder).config
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.yaml")
    one = Run(_with_data(load_config(path), data), folder)
    one.open(resume=True)
    return one


def _with_data(config: Any, data: Path | None) -> Any:
    """The config with the data folder of --data, absolute, so that later stages find it."""
    if data is None:
        return config
    return replace(config, data=replace(config.data, root=str(data.resolve())))


def _print_stage(one: Any, name: str, *, as_json: bool) -> None:
    """What a stage before the evaluation has come to."""
    from oneshot_ednas.architecture import Architecture

    figures = {"run": str(one.files.folder), "stage": name, "target_ms": one.target_ms}
    if name == "search":
        figures["steps"] = one.one_shot.step
        figures["expected_latency_ms"] = float(one.one_shot.expected_latency().detach())
        figures["alarms"] = one.one_shot.alarms()
    elif name == "derive":
        best = read_json(one.files.candidates)["candidates"][0]
        figures["architecture"] = str(Architecture.load(one.files.architecture))
        figures |= {key: best[key] for key in ("latency_ms", "reward", "metrics")}
    elif name == "retrain":
        seeds = range(one.config.retrain.num_seeds)
        figures["networks"] = [f"retrain.seed_{number}" for number in seeds]
        figures["networks"] += [f"baseline.{baseline}" for baseline in one.config.baselines]
    if as_json:
        print(json.dumps(figures))
        return
    table = Table(show_header=False)
    for key, value in figures.items():
        table.add_row(key, _shown(value))
    _console().print(table)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(value) or "none"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_shown(item)}" for key, item in value.items())
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _results(folder: Path) -> Any:
    return read_json(folder / "results.json")


def _print_results(results: Mapping[str, Any], folder: Path, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(results))
        return
    table = Table(title=f"test split, target {results['target_ms']:g} ms")
    for column in ("network", "latency ms", "in budget", "reward", "params", "GMACs"):
        table.add_column(column, justify="left" if column == "network" else "right")
    columns = [(task, name) for task, values in results["metrics"].items() for name in values]
    shown = [c for c in columns if c[1] not in _DETAILS]
    for task, name in shown:
        table.add_column(f"{task}\n{name}", justify="right")
    rows = {"derived": results, **results["baselines"]}
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
    _console().print(table)
    seconds = sum(results["seconds"].values())
    print(f"architecture: {results['architecture']}")
    print(f"{seconds:.0f} s in all; report: {folder / 'report.html'}")


_DETAILS = ("rmse", "delta_1", "delta_2", "delta_3", "within_22", "within_30")
"""Metrics left to the report."""


def _console() -> Console:
    # Piped output is not folded to 80 columns.
    return Console(width=None if sys.stdout.isatty() else 200)


# Describe -----------------------------------------------------------------------------------


@main.command()
@click.argument("what")
@click.option("--space", help="Search space of an architecture JSON, if not the one it names.")
@click.option("--tasks", help="Output channels per task, as segmentation=19,depth=1.")
@click.option("--image-size", nargs=2, type=int, metavar="H W", help="Size of the image.")
@click.option("--table", "table_path", help="Latency table; without one there are no latencies.")
@json_option
@bad_input
def describe(
    what: str,
    space: str | None,
    tasks: str | None,
    image_size: tuple[int, int] | None,
    table_path: str | None,
    as_json: bool,
) -> None:
    """Parameters, multiply-adds and latency, one row per block.

    WHAT is an architecture JSON, an experiment config, a run folder, a search space YAML, or the
    name of a shipped space; of a config or space, the base network is described.

    Example: oneshot-ednas describe ednas_b0 --tasks segmentation=19,depth=1
    --table latency_tables/edgetpu_sim_256x256.csv
    """
    from oneshot_ednas.describe import describe_network, describe_space
    from oneshot_ednas.latency.table import LatencyTable

    subject = _subject(what, space)
    channels = _channels(tasks) if tasks else subject.out_channels or _channels(DEFAULT_TASKS)
    table = LatencyTable.load(find_file(table_path)) if table_path else subject.table
    size = image_size or subject.image_size or (table.image_size if table else DEFAULT_IMAGE_SIZE)
    figures = describe_network(
        subject.space, subject.architecture, out_channels=channels, image_size=size, table=table
    )
    if subject.is_space:
        figures |= describe_space(subject.space, out_channels=channels, table=table)
    if as_json:
        print(json.dumps(figures))
    else:
        _print_description(figures)


class _Subject:
    """What `describe` was pointed at."""

    def __init__(self, space: Any, architecture: Any = None) -> None:
        self.space = space
        self.is_space = architecture is None
        self.architecture = architecture or space.base_architecture
        self.out_channels: dict[str, int] | None = None
        self.image_size: tuple[int, int] | None = None
        self.table: Any = None


def _subject(what: str, space: str | None) -> _Subject:
    from oneshot_ednas.architecture import Architecture
    from oneshot_ednas.space import SearchSpace, named_space

    path = Path(what)
    if path.is_dir():
        subject = _config_subject(path / "config.yaml")
        subject.space = SearchSpace.load(path / "space.yaml")
        found = path / "architecture.json"
        if found.exists():
            subject.architecture, subject.is_space = Architecture.load(found), False
        return subject
    if path.suffix == ".json":
        architecture = Architecture.load(find_file(path))
        if not (space or architecture.space):
            raise ValueError(f"{what}: names no search space; give it with --space")
        return _Subject(named_space(space or architecture.space), architecture)
    if space:
        raise ValueError(f"--space is for an architecture JSON, {what} has its own")
    if path.suffix in (".yaml", ".yml"):
        path = find_file(path)
        if "\nblocks:" in "\n" + path.read_text(encoding="utf-8"):
            return _Subject(SearchSpace.load(path))
        return _config_subject(path)
    return _Subject(named_space(what))


def _config_subject(path: Path) -> _Subject:
    from oneshot_ednas.config import load_config
    from oneshot_ednas.latency.table import LatencyTable
    from oneshot_ednas.space import named_space
    from oneshot_ednas.tasks import make_tasks

    config = load_config(path)
    subject = _Subject(named_space(config.space))
    tasks = make_tasks(config.tasks)
    subject.out_channels = {name: task.out_channels for name, task in tasks.items()}
    subject.image_size = config.data.image_size
    subject.table = LatencyTable.load(find_file(config.latency.table, beside=path.parent))
    return subject


def _channels(text: str) -> dict[str, int]:
    channels: dict[str, int] = {}
    for part in text.split(","):
        name, separator, count = part.strip().partition("=")
        if not separator or not count.isdigit() or int(count) < 1 or not name:
            raise ValueError(f"--tasks: expected name=channels, as {DEFAULT_TASKS}; got {part!r}")
        if name in channels:
            raise ValueError(f"--tasks: {name} is given twice")
        channels[name] = int(count)
    return channels


def _print_description(figures: Mapping[str, Any]) -> None:
    height, width = figures["image_size"]
    tasks = ", ".join(f"{name}={count}" for name, count in figures["out_channels"].items())
    table = Table(title=f"{figures['space']}, {height}x{width}, {tasks}")
    for column in ("part", "layer", "stride", "kernel", "filters", "expansion"):
        table.add_column(column, justify="left" if column in ("part", "layer") else "right")
    for column in ("params", "MMACs", "ms"):
        table.add_column(column, justify="right")
    names = {"ibn": "IBN", "fused_ibn": "FusedIBN"}
    for row in figures["rows"]:
        cells = [row.get(key) for key in ("stride", "kernel_size", "filters", "expand_ratio")]
        table.add_row(
            row["name"],
            names.get(row.get("op", ""), ""),
            *("" if cell is None else str(cell) for cell in cells),
            f"{row['parameters']:,}",
            f"{row['gmacs'] * 1e3:.2f}",
            "" if row["latency_ms"] is None else f"{row['latency_ms']:.4f}",
        )
    _console().print(table)
    print(
        f"parameters {figures['parameters'] / 1e6:.2f} M   multiply-adds "
        f"{figures['gmacs']:.3f} G   GFLOPs {figures['gflops']:.2f}"
    )
    if figures["latency_ms"] is not None:
        print(f"latency {figures['latency_ms']:.3f} ms (with transfers and streaming)")
    if "num_architectures" in figures:
        print(f"architectures in the space: {figures['num_architectures']}")
        if figures["min_latency_ms"] is not None:
            print(
                f"latency over the space: {figures['min_latency_ms']:.3f} to "
                f"{figures['max_latency_ms']:.3f} ms"
            )


# Latency ------------------------------------------------------------------------------------


@main.group()
def latency() -> None:
    """Latency tables and the Edge TPU simulator."""


@latency.command("check")
@click.argument("networks_json", type=click.Path(path_type=Path))
@json_option
@bad_input
def latency_check(networks_json: Path, as_json: bool) -> None:
    """Score the simulator on published measurements.

    Example: oneshot-ednas latency check networks.json --json
    """
    from oneshot_ednas.latency.published import score_networks

    scores = score_networks(networks_json)
    if as_json:
        print(json.dumps(scores))
        return
    table = Table(title=f"simulator against {networks_json.name}, errors in percent")
    for column in ("group", "n", "MAPE", "median", "max", "Spearman", "left out: MAPE", "Spearman"):
        table.add_column(column, justify="left" if column == "group" else "right")
    left_out = scores["leave_one_out"]
    rows = {"all": (scores["all"], left_out.get("all"))}
    for name, row in scores["groups"].items():
        rows[name] = (row, left_out.get("groups", {}).get(name))
    for name, (row, left) in rows.items():
        cells = [f"{row[key]:.1f}" for key in ("mape", "median_ape", "max_ape")]
        table.add_row(
            name,
            str(row["n"]),
            *cells,
            _number(row["spearman"], 3),
            _number(left and left["mape"], 1),
            _number(left and left["spearman"], 3),
        )
    _console().print(table)
    print("left out: each network predicted by constants fitted without it (stored with the fit)")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


@latency.command("table")
@click.argument("space")
@click.option("--image-size", nargs=2, type=int, required=True, metavar="H W")
@click.option("--host", default="usb3-desktop", show_default=True, help="Host and bus.")
@click.option("--clock-mhz", type=int, default=500, show_default=True)
@click.option("--tasks", default=DEFAULT_TASKS, show_default=True, help="Assumed outputs.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="CSV to write.")
@json_option
@bad_input
def latency_table(
    space: str,
    image_size: tuple[int, int],
    host: str,
    clock_mhz: int,
    tasks: str,
    out: Path,
    as_json: bool,
) -> None:
    """Simulate a latency table for every operation of a search space.

    Example: oneshot-ednas latency table ednas_b0 --image-size 256 256 --host usb3-desktop
    --out edgetpu_sim_256x256.csv
    """
    from oneshot_ednas.latency.simulate import simulate_table
    from oneshot_ednas.space import named_space
    from oneshot_ednas.store import write_text

    if min(image_size) < 16:
        raise ValueError(f"--image-size: expected at least 16 16, got {image_size}")
    table = simulate_table(
        named_space(space),
        image_size,
        _channels(tasks),
        head_channels=range(1, HEAD_CHANNELS + 1),
        host=host,
        clock_mhz=clock_mhz,
    )
    write_text(out, table.to_text())
    if as_json:
        print(json.dumps({"table": str(out), "operations": len(table.rows)}))
    else:
        print(f"{out}: {len(table.rows)} operations, simulated for {host} at {clock_mhz} MHz")
