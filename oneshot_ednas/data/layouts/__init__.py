"""Known layouts of data folders, and which of them a folder has. No torch.

`LAYOUTS` is the only place that lists them. Each has a module that turns a folder into a `DataSet`;
reading, resizing and every encoding are the same for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from oneshot_ednas.data.dataset import DataSet
from oneshot_ednas.data.layouts import adashare, astmt, cityscapes, mtan, nyuv2_mat
from oneshot_ednas.data.manifest import MANIFEST_NAME, open_manifest
from oneshot_ednas.schema import find_file, nearest

__all__ = ["LAYOUTS", "Layout", "open_data"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One row of `LAYOUTS`."""

    expected: str
    """The files that tell it, for people."""
    is_in: Callable[[Path], bool]
    """Whether a folder has the files that tell it."""
    open: Callable[[Path], DataSet]
    """The data set of such a folder; raises ValueError for what is missing or wrong."""


LAYOUTS: dict[str, Layout] = {
    "manifest": Layout(
        expected=MANIFEST_NAME,
        is_in=lambda root: (root / MANIFEST_NAME).is_file(),
        open=open_manifest,
    ),
    # Before MTAN: AdaShare's folder of Cityscapes holds the same arrays beside its list.
    **{
        name: Layout(expected=row.file, is_in=row.is_in, open=row.open)
        for name, row in adashare.LISTS.items()
    },
    "mtan": Layout(expected=mtan.EXPECTED, is_in=mtan.is_mtan, open=mtan.open_mtan),
    "cityscapes": Layout(
        expected="leftImg8bit/ and gtFine/",
        is_in=cityscapes.is_cityscapes,
        open=cityscapes.open_cityscapes,
    ),
    "nyuv2_mat": Layout(
        expected=nyuv2_mat.FRAMES,
        is_in=nyuv2_mat.is_nyuv2_mat,
        open=nyuv2_mat.open_nyuv2_mat,
    ),
    "astmt_nyud": Layout(
        expected="images/ and gt_sets/", is_in=astmt.is_nyud_mt, open=astmt.open_nyud_mt
    ),
    "astmt_pascal": Layout(
        expected="JPEGImages/ and ImageSets/Context/",
        is_in=astmt.is_pascal_mt,
        open=astmt.open_pascal_mt,
    ),
}
"""By the name that a config gives them, the most telling first."""


def open_data(root: Path, *, manifest: Path | None = None, layout: str | None = None) -> DataSet:
    """The data set in a folder.

    Args:
        root: the data folder.
        manifest: a manifest that lies elsewhere, maybe one shipped with the package; then the
            folder's own files tell nothing.
        layout: one of `LAYOUTS`; None takes the first whose files are there.

    Raises:
        FileNotFoundError: if there is no such folder or manifest.
        ValueError: for an unknown layout, a folder of none, or what is missing or wrong in it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no data folder {root}")
    if manifest is not None:
        return open_manifest(root, find_file(manifest, beside=root))
    if layout is not None:
        if layout not in LAYOUTS:
            raise ValueError(f"unknown data layout {layout}; {nearest(layout, LAYOUTS)}")
        return LAYOUTS[layout].open(root)
    for row in LAYOUTS.values():
        if row.is_in(root):
            return row.open(root)
    found = sorted(path.name + ("/" if path.is_dir() else "") for path in root.iterdir())
    shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") if found else "nothing"
    known = "; ".join(f"{name}: {row.expected}" for name, row in LAYOUTS.items())
    raise ValueError(f"{root} has no known layout: found {shown}; expected one of {known}")
