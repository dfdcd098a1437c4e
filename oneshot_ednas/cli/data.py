"""Commands on data folders: check one, write one at another size, its statistics."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from oneshot_ednas.cli.common import bad_input, console, json_option, main, resume_option
from oneshot_ednas.data.check import DataCheck, check_data, sum_split, sums_figures
from oneshot_ednas.data.layouts import open_data
from oneshot_ednas.data.parallel import Progress
from oneshot_ednas.data.prepare import PrepareConfig, prepare_data
from oneshot_ednas.data.statistics import Classes
from oneshot_ednas.progress import counting_bar
from oneshot_ednas.report.data_sheet import choose_frames, data_sheet
from oneshot_ednas.store import write_bytes, write_json
from oneshot_ednas.training import Interrupted

manifest_option = click.option(
    "--manifest", type=click.Path(path_type=Path), help="Manifest that lies elsewhere."
)
layout_option = click.option("--layout", help="Layout of the folder, if not the one it shows.")
processes_option = click.option(
    "--workers", type=int, metavar="N", help="Processes; one per processor if not given."
)
label_map_option = click.option("--label-map", help="Label map of segmentation.")
folder_argument = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))


@main.group()
def data() -> None:
    """Data folders: check, resize, statistics."""


@data.command("check")
@folder_argument
@manifest_option
@layout_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder for check.json and .png.")
@processes_option
@json_option
@bad_input
def data_check(
    folder: Path,
    manifest: Path | None,
    layout: str | None,
    out: Path | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Read every frame: sizes, targets, classes, depths, broken files, shared frames.

    Ends with status 1 if frames are broken.

    Example: oneshot-ednas data check DIR --manifest configs/datasets/nyuv2_256x192.yaml
    --out runs/check
    """
    found = open_data(folder, manifest=manifest, layout=layout)
    with _progress("reading") as progress:
        check = check_data(found, workers=workers, progress=progress)
    figures = check.figures()
    if out is not None:
        write_json(out / "check.json", figures)
        frames = choose_frames(found, check.broken)
        if frames:
            write_bytes(out / "check.png", data_sheet(found, frames, _occurring(check)))
    if as_json:
        print(json.dumps(figures))
    else:
        _print_check(figures)
    if check.broken:
        total = len({frame for frames in found.splits.values() for frame in frames})
        raise RuntimeError(
            f"{len(check.broken)} of {total} frames are broken; restore their files, or leave the "
            f"frames out of the splits"
        )


@data.command("prepare")
@folder_argument
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--height", type=int, required=True, help="Rows of every frame.")
@click.option("--width", type=int, required=True, help="Columns of every frame.")
@manifest_option
@layout_option
@click.option("--targets", metavar="A,B", help="Targets to write, if not all.")
@click.option("--splits", metavar="A,B", help="Splits to write, if not all.")
@label_map_option
@click.option("--skip-broken", is_flag=True, help="Leave broken frames out and list them.")
@processes_option
@resume_option
@json_option
@bad_input
def data_prepare(
    folder: Path,
    out: Path,
    height: int,
    width: int,
    manifest: Path | None,
    layout: str | None,
    targets: str | None,
    splits: str | None,
    label_map: str | None,
    skip_broken: bool,
    workers: int | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Write all frames at one size, as a folder with a manifest.

    Example: oneshot-ednas data prepare DIR --out DIR_128 --height 128 --width 128
    """
    found = open_data(folder, manifest=manifest, layout=layout)
    config = PrepareConfig(
        height=height,
        width=width,
        targets=_names(targets, "--targets"),
        splits=_names(splits, "--splits"),
        label_map=label_map,
    )
    with _progress("writing") as progress:
        done = prepare_data(
            found,
            out,
            config,
            skip_broken=skip_broken,
            resume=resume,
            workers=workers,
            progress=progress,
        )
    if as_json:
        left_out = dict(done.left_out)
        print(
            json.dumps(
                {
                    "out": str(out),
                    "frames": done.num_frames,
                    "kept": done.num_kept,
                    "left_out": left_out,
                }
            )
        )
        return
    for line in done.left_out.values():
        print(f"left out: {line}")
    kept = f", {done.num_kept} of them from before" if done.num_kept else ""
    print(f"{out}: {done.num_frames} frames of {found.name} at {width}x{height}{kept}")


@data.command("stats")
@folder_argument
@manifest_option
@layout_option
@click.option("--split", help="Split to sum, if not the first.")
@label_map_option
@processes_option
@json_option
@bad_input
def data_stats(
    folder: Path,
    manifest: Path | None,
    layout: str | None,
    split: str | None,
    label_map: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Mean and spread of image and depth, frequencies and weights of classes, over a split.

    Example: oneshot-ednas data stats DIR --split train --json
    """
    found = open_data(folder, manifest=manifest, layout=layout)
    split = next(iter(found.splits)) if split is None else split
    with _progress(f"reading {split}") as progress:
        sums = sum_split(found, split, label_map=label_map, workers=workers, progress=progress)
    figures = {
        "name": found.name,
        "split": split,
        "label_map": label_map,
        "frames": sums.num_frames,
        **sums_figures(sums, found, label_map=label_map),
    }
    if as_json:
        print(json.dumps(figures))
        return
    _print_channels(figures)
    _print_targets({split: figures})
    _print_weights(figures)


def _names(text: str | None, option: str) -> tuple[str, ...] | None:
    """Names separated by commas.

    Raises:
        ValueError: for an empty name, or one given twice.
    """
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{option}: expected different names separated by commas, got {text!r}")
    return names


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    """A bar on the terminal; Ctrl-C ends the work with one line."""
    try:
        with counting_bar(what, unit="frames") as progress:
            yield progress
    except KeyboardInterrupt:
        raise Interrupted(f"stopped while {what}") from None


def _occurring(check: DataCheck) -> dict[str, list[int]]:
    """Of each target with classes, those that occur in any split."""
    found: dict[str, set[int]] = {}
    for split in check.splits.values():
        for name, sums in split.sums.targets.items() if split.sums is not None else ():
            if isinstance(sums.found, Classes):
                found.setdefault(name, set()).update(sums.found.pixels[:255].nonzero()[0].tolist())
    return {name: sorted(classes) for name, classes in found.items()}


# Tables -------------------------------------------------------------------------------------


def _print_check(figures: Mapping[str, Any]) -> None:
    print(f"{figures['name']}: {figures['layout']}, in {figures['root']}")
    table = _table("splits", "split", "frames", "broken", "width x height")
    for name, split in figures["splits"].items():
        sizes = [f"{size} ({count})" for size, count in split.get("sizes", {}).items()]
        shown = sizes if len(sizes) != 1 else list(split["sizes"])
        more = f" and {len(sizes) - 4} more sizes" if len(sizes) > 4 else ""
        table.add_row(
            name,
            str(split["frames"]),
            str(split["broken_frames"]),
            ", ".join(shown[:4]) + more,
        )
    console().print(table)
    readable = {name: split for name, split in figures["splits"].items() if "targets" in split}
    _print_targets(readable)
    _print_classes(readable)
    rules = {n: t for split in readable.values() for n, t in split["targets"].items()}
    for name, target in rules.items():
        print(f"invalid in {name}: {target['invalid_rule']}")
    for note in figures["notes"]:
        print(f"note: {note}")
    for shared in figures["shared_frames"]:
        first, second = shared["splits"]
        part = f": all of {shared['part']}" if shared["part"] else f", as {shared['example']}"
        print(f"shared: {shared['frames']} frames of {first} and {second}{part}")
    for lines in figures["broken"].values():
        for line in lines:
            print(f"broken: {line}")
    for warning in figures["warnings"]:
        print(f"warning: {warning}")


def _print_targets(splits: Mapping[str, Mapping[str, Any]]) -> None:
    table = _table("targets", "target", "kind", "split", "invalid", "empty frames", "what it holds")
    names = dict.fromkeys(name for split in splits.values() for name in split["targets"])
    for name in names:
        for number, (split, figures) in enumerate(splits.items()):
            target = figures["targets"][name]
            table.add_row(
                name if number == 0 else "",
                target["kind"] if number == 0 else "",
                split,
                f"{target['invalid_share']:.2%}",
                str(target["frames_without_valid_pixel"]),
                _summary(target),
            )
    if names:
        console().print(table)


def _summary(target: Mapping[str, Any]) -> str:
    if "classes" in target:
        shares = [row["share"] for row in target["classes"].values()]
        return f"{sum(share > 0 for share in shares)} of {len(shares)} classes occur"
    if "edge_share" in target:
        return f"{target['edge_share']:.2%} of the pixels are edges"
    if "median" in target:
        unit = " m" if target["kind"] == "depth" else ""
        percentiles = target["percentiles"]
        return (
            f"{target['minimum']:.4g} to {target['maximum']:.4g}{unit}, median "
            f"{target['median']:.3g}, 5 % to 95 %: {percentiles['5']:.3g} to "
            f"{percentiles['95']:.3g}, mean {target['mean']:.4g}, std {target['std']:.4g}"
        )
    if "mean_length" in target:
        x, y, z = target["mean_direction"]
        return (
            f"mean length {target['mean_length']:.3f}, mean direction ({x:.2f}, {y:.2f}, {z:.2f}), "
            f"{target['towards_camera_share']:.1%} towards the camera"
        )
    return "nothing valid"


def _print_classes(splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Share of each class; of hundreds of nameless ones, those that occur."""
    names = dict.fromkeys(
        name
        for split in splits.values()
        for name, target in split["targets"].items()
        if "classes" in target
    )
    for name in names:
        classes = {s: figures["targets"][name]["classes"] for s, figures in splits.items()}
        table = _table(f"classes of {name}, share of the valid pixels", "class", *classes)
        absent = []
        for label in next(iter(classes.values())):
            shares = [found[label]["share"] for found in classes.values()]
            if any(shares):
                cells = (f"{share:.3%}" if share else "-" for share in shares)
                table.add_row(label, *cells)
            else:
                absent.append(label)
        console().print(table)
        if absent:
            more = f" and {len(absent) - 12} more" if len(absent) > 12 else ""
            print(f"never in {name}: {', '.join(absent[:12])}{more}")


def _print_channels(figures: Mapping[str, Any]) -> None:
    title = f"{figures['name']}, {figures['split']}: {figures['frames']} frames"
    table = _table(f"{title}, image in 0..1", "channel", "mean", "std")
    image = figures["image"]
    for channel, mean, std in zip(
        ("red", "green", "blue"), image["mean"], image["std"], strict=True
    ):
        table.add_row(channel, f"{mean:.4f}", f"{std:.4f}")
    console().print(table)


def _print_weights(figures: Mapping[str, Any]) -> None:
    for name, target in figures["targets"].items():
        if "classes" not in target:
            continue
        table = _table(
            f"classes of {name}",
            "class",
            "share",
            "median-frequency weight",
            "inverse-log weight",
        )
        for label, row in target["classes"].items():
            weights = (row["median_frequency_weight"], row["inverse_log_weight"])
            cells = ("-" if weight is None else f"{weight:.4f}" for weight in weights)
            table.add_row(label, f"{row['share']:.3%}" if row["share"] else "-", *cells)
        console().print(table)


def _table(title: str, *columns: str) -> Table:
    """A table whose texts are on the left and whose numbers are on the right."""
    table = Table(title=title)
    left = {"target", "kind", "split", "class", "channel", "what it holds", "width x height"}
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table
