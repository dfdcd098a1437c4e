"""Build a bundle: every operation of a space and random whole networks, as `.tflite` files."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from oneshot_ednas import measure
from oneshot_ednas.architecture import Architecture
from oneshot_ednas.bundle.manifest import (
    MANIFEST,
    SPACE,
    Bundle,
    ModelFile,
    NetworkModel,
    OperationModels,
    Progress,
    bundle_digest,
    silent,
)
from oneshot_ednas.bundle.models import layout_adds, layout_of, operation_graph, repeated
from oneshot_ednas.export.calibration import calibrate
from oneshot_ednas.export.flatbuffer import write_tflite
from oneshot_ednas.export.graph import trace
from oneshot_ednas.latency.operations import Operation, Size, distinct_operations
from oneshot_ednas.models.network import build_network, recalibrate_bn
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.store import PARTIAL, sync_folder, write_json

COPIES = (2, 8)
"""Copies of an operation in its two files. Not 1 in the smaller one: the first copy has no copy
before it, so it may cost something else than the others."""
MAX_WEIGHT_BYTES = 2 * 2**20
"""Weights per file: well inside the 5-8 MiB that an Edge TPU keeps on the chip, since streaming is
no part of a row. Heavy operations take long enough for a difference of one copy."""
DRAWS_PER_NETWORK = 20
"""Draws from a small space repeat themselves; after this many there are fewer networks."""
MIN_IMAGE_SIDE = 16

README = """\
Latency bundle of the search space {space}, images of {height}x{width} pixels.
{operations} operations as {operation_models} models, {networks} whole networks.

Copy this folder to the device. There, with Python 3.7 or newer, numpy, and tflite_runtime or
ai_edge_litert:

    python3 measure.py . --out measured.jsonl

For a Coral Edge TPU the models must have been compiled first, on an x86-64 Debian or Ubuntu with
edgetpu_compiler (tools/build_latency_table.py compile, before copying). With the libedgetpu of
Coral's Debian packages goes {coral}. Then:

    python3 measure.py . --out measured.jsonl --edgetpu --clock-mhz 500

The same command goes on where it was stopped. Bring measured.jsonl back (and compiled.jsonl to
where the bundle stays), and make the table with tools/build_latency_table.py assemble.
"""


def build_bundle(
    space: SearchSpace,
    image_size: Size,
    out_channels: Mapping[str, int],
    folder: Path,
    *,
    num_networks: int = 64,
    seed: int = 0,
    copies: tuple[int, int] = COPIES,
    max_weight_bytes: int = MAX_WEIGHT_BYTES,
    progress: Progress = silent,
) -> Bundle:
    """Write a bundle folder; it appears whole or not at all.

    Args:
        space: the search space.
        image_size: height and width of the image.
        out_channels: output channels per task.
        folder: where to; it must not exist, or be empty.
        num_networks: random whole networks that calibrate and check the table; fewer where the
            space has fewer.
        seed: of networks and weights.
        copies: of an operation in its smaller and its larger file.
        max_weight_bytes: operations whose larger file would have more weights get fewer copies,
            down to 1 and 2.
        progress: called after each operation and network.

    Returns:
        The manifest.

    Raises:
        ValueError: if the folder holds something, or an argument is out of range.
    """
    if min(image_size) < MIN_IMAGE_SIDE:
        raise ValueError(
            f"image size: expected at least {MIN_IMAGE_SIDE}x{MIN_IMAGE_SIDE}, "
            f"got {image_size[0]}x{image_size[1]}"
        )
    if not 1 <= copies[0] < copies[1]:
        raise ValueError(f"copies: expected two ascending numbers, got {copies}")
    if num_networks < 0:
        raise ValueError(f"networks: expected at least 0, got {num_networks}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} exists and is not empty; give a new folder, or go on with compile or "
            f"measure if it is the bundle that you want"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Built under another name, so that an interrupted build cannot be taken for a bundle.
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}{PARTIAL}")
    for part in ("operations", "networks"):
        (unfinished / part).mkdir(parents=True)
    try:
        builder = _Builder(space, image_size, dict(out_channels), unfinished, seed)
        bundle = builder.build(num_networks, copies, max_weight_bytes, progress)
        os.sync()  # once for thousands of files; then the name says that all are there
        os.replace(unfinished, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    return bundle


def choose_copies(
    weight_bytes: int, copies: tuple[int, int], max_weight_bytes: int
) -> tuple[int, int]:
    """Copies in the smaller and the larger file of an operation with so many weights."""
    few, many = copies
    if many * weight_bytes <= max_weight_bytes:
        return few, many
    fewer = max(2, max_weight_bytes // weight_bytes)
    return max(1, few * fewer // many), fewer


def random_networks(space: SearchSpace, count: int, seed: int) -> list[Architecture]:
    """Distinct architectures drawn uniformly; fewer where a small space runs out of them."""
    generator = np.random.default_rng(seed)
    draws = (space.sample(generator) for _ in range(DRAWS_PER_NETWORK * count))
    return list(dict.fromkeys(draws))[:count]


class _Builder:
    """One bundle on its way to disk."""

    def __init__(
        self,
        space: SearchSpace,
        image_size: Size,
        out_channels: dict[str, int],
        folder: Path,
        seed: int,
    ) -> None:
        self.space, self.image_size, self.out_channels = space, image_size, out_channels
        self.folder, self.seed = folder, seed

    def build(
        self, num_networks: int, copies: tuple[int, int], max_weight_bytes: int, progress: Progress
    ) -> Bundle:
        rows = distinct_operations(self.space, self.image_size, self.out_channels)
        needed = {add for row in rows for add in layout_adds(row)}
        wanted = [(row, True) for row in rows]
        wanted += [(add, False) for add in sorted(needed.difference(rows))]
        architectures = random_networks(self.space, num_networks, self.seed)
        total = len(wanted) + len(architectures)
        operations, networks = [], []
        for number, (operation, is_row) in enumerate(wanted, start=1):
            entry = self._operation(number, operation, copies, max_weight_bytes)
            operations.append(replace(entry, is_row=is_row))
            progress(number, total)
        for number, architecture in enumerate(architectures, start=1):
            networks.append(self._network(number, architecture))
            progress(len(wanted) + number, total)
        return self._finish(tuple(operations), tuple(networks))

    def _operation(
        self, number: int, operation: Operation, copies: tuple[int, int], max_weight_bytes: int
    ) -> OperationModels:
        single, layout = operation_graph(operation, self.seed), layout_of(operation)
        files = []
        for count in choose_copies(single.weight_bytes, copies, max_weight_bytes):
            model = f"operations/{number:06d}_{_file_name(operation)}_x{count}.tflite"
            calibrated = repeated(single, count, layout)
            data = write_tflite(calibrated.graph, calibrated.ranges, description=str(operation))
            (self.folder / model).write_bytes(data)
            files.append(ModelFile(copies=count, model=model))
        return OperationModels(
            operation=operation,
            layout=layout,
            adds=layout_adds(operation),
            files=tuple(files),
            weight_bytes=single.weight_bytes,
        )

    def _network(self, number: int, architecture: Architecture) -> NetworkModel:
        model = f"networks/{number:03d}.tflite"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = build_network(self.space.fix(architecture), self.out_channels)
            # Two images, since a map of one pixel has no variance over one.
            images = torch.randn(2, 3, *self.image_size)
        with torch.no_grad():
            recalibrate_bn(network, [images])
        graph = trace(network, (1, 3, *self.image_size))
        data = write_tflite(graph, calibrate(graph, [images]), description=str(architecture))
        (self.folder / model).write_bytes(data)
        return NetworkModel(architecture=architecture, model=model)

    def _finish(
        self, operations: tuple[OperationModels, ...], networks: tuple[NetworkModel, ...]
    ) -> Bundle:
        height, width = self.image_size
        (self.folder / SPACE).write_text(self.space.to_yaml(), encoding="utf-8")
        shutil.copyfile(measure.__file__, self.folder / "measure.py")
        readme = README.format(
            space=self.space.name,
            height=height,
            width=width,
            operations=len(operations),
            operation_models=sum(len(entry.files) for entry in operations),
            networks=len(networks),
            coral=measure.CORAL_PACKAGES,
        )
        (self.folder / "README.txt").write_text(readme, encoding="utf-8")
        bundle = Bundle(
            digest="",
            space=self.space.name,
            image_height=height,
            image_width=width,
            out_channels=self.out_channels,
            seed=self.seed,
            models=tuple(_in_order(operations, networks)),
            operations=operations,
            networks=networks,
        )
        bundle = replace(bundle, digest=bundle_digest(bundle, self.folder))
        write_json(self.folder / MANIFEST, bundle.to_json())
        return bundle


def _in_order(
    operations: tuple[OperationModels, ...], networks: tuple[NetworkModel, ...]
) -> Iterator[str]:
    """The order of measuring: files to be subtracted side by side, networks in between.

    A device that slows down in the course of a round then slows rows and networks alike.
    """
    waiting = list(networks)
    for number, entry in enumerate(operations, start=1):
        yield from (file.model for file in entry.files)
        while waiting and (len(networks) - len(waiting)) * len(operations) < number * len(networks):
            yield waiting.pop(0).model


def _file_name(operation: Operation) -> str:
    """For example `fused_ibn_k5_e6_16-24_s2_32x64`."""
    o = operation
    parts = [o.op]
    if o.kernel_size > 1:
        parts.append(f"k{o.kernel_size}")
    if o.expand_ratio > 1:
        parts.append(f"e{o.expand_ratio}")
    parts.append(f"{o.in_channels}-{o.out_channels}")
    if o.stride > 1:
        parts.append(f"s{o.stride}")
    parts.append(f"{o.in_height}x{o.in_width}")
    if o.op == "resize":
        parts.append(f"{o.out_height}x{o.out_width}")
    return "_".join(parts)
