"""F-measure of edge maps at the best scale of the data set (ODS-F), with matching in a tolerance.

The protocol is that of the boundary benchmark: predictions are thinned to lines, cut at 99
thresholds, and matched one to one with the true edge pixels within a share of the image diagonal;
precision and recall come from the counts of all frames, and one threshold serves them all.

What differs from the benchmark's own code: matchings have the largest number of pairs, where it
takes an assignment of least total distance that pays far more for a lone pixel than for any
distance, so that the counts agree or nearly do; F is not interpolated between thresholds; there is
one annotation per frame; truth is thinned as predictions are, since label maps give thick borders.

It runs on the host, about half a second for a frame of 481 x 321: for evaluation, not for training.

Source:
    Martin et al., Learning to Detect Natural Image Boundaries Using Local Brightness, Color, and
    Texture Cues, TPAMI 2004; Arbelaez et al., Contour Detection and Hierarchical Image
    Segmentation, TPAMI 2011
"""

import collections
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from scipy import ndimage
from scipy.sparse import csr_matrix
from scipy.spatial import cKDTree
from torch import Tensor

from oneshot_ednas.tasks.losses import INVALID_LABEL
from oneshot_ednas.tasks.metrics import PooledMetrics, check_binary, common_counts

EDGE_METRICS = ("ods_f",)
EDGE_THRESHOLDS = tuple(k / 100 for k in range(1, 100))
"""A pixel is an edge at each of these probabilities that it reaches."""

_SMOOTHING_PIXELS = 2.0
# Of the map whose curvature gives the direction of a line: wider than the ridges of noise.
_TIE = 1.01
# A pixel stays unless a neighbour across the line is larger by more than this, so that flat
# stretches stay whole for the thinning.
_NEIGHBOURS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
# From the north clockwise: bit k of a pixel's code in the tables below.


def edge_metrics(max_distance: float) -> PooledMetrics:
    """`ods_f`, a fraction.

    Args:
        max_distance: how far apart matched pixels may lie, as a share of the image diagonal; the
            literature has .0075 for BSDS and PASCAL, .011 for NYUD.

    Raises:
        ValueError: if the distance is not above 0.
    """
    if not (math.isfinite(max_distance) and max_distance > 0):
        raise ValueError(f"max_distance must be finite and above 0, got {max_distance}")
    return PooledMetrics(
        EDGE_METRICS, lambda pred, target: edge_sums(pred, target, max_distance), edge_scores
    )


def edge_sums(
    pred: Float[Tensor, "batch height width"],
    target: Shaped[Tensor, "batch height width"],
    max_distance: float,
) -> Int64[Tensor, " sums"]:
    """Counts of a batch; the maps are copied to the host, and the counts stay there.

    Args:
        pred: probability of an edge.
        target: 1 for an edge, 0 for none, 255 for invalid.
        max_distance: as for `edge_metrics`.

    Returns:
        Matched pairs per threshold, predicted pixels per threshold, true pixels, and the three
        common counts.

    Raises:
        ValueError: if the shapes differ, or a target is neither 0, 1 nor 255.
    """
    if pred.shape != target.shape:
        raise ValueError(
            f"expected pred and target of one shape, "
            f"got {tuple(pred.shape)} and {tuple(target.shape)}"
        )
    labels = target.cpu()
    check_binary(int(((labels != 0) & (labels != 1) & (labels != INVALID_LABEL)).sum()), "edge")
    counts = np.zeros(2 * len(EDGE_THRESHOLDS) + 1, dtype=np.int64)
    for probability, edges in zip(pred.float().cpu().numpy(), labels.numpy(), strict=True):
        counts += np.concatenate(frame_counts(probability, edges, max_distance), axis=None)
    return torch.cat([torch.from_numpy(counts), common_counts(labels != INVALID_LABEL)])


def edge_scores(sums: Sequence[int | float]) -> tuple[float, ...]:
    """(ods_f,) of summed `edge_sums`; 0 where nothing matches, 1 where there is nothing at all."""
    matched, predicted = np.array(sums[:-4], dtype=np.float64).reshape(2, -1)
    total = predicted + sums[-4]
    # 2 P R / (P + R), with P = matched / predicted and R = matched / true.
    return (float(np.divide(2 * matched, total, out=np.ones_like(total), where=total > 0).max()),)


def frame_counts(
    probability: Float[np.ndarray, "height width"],
    edges: Shaped[np.ndarray, "height width"],
    max_distance: float,
) -> tuple[Int64[np.ndarray, " thresholds"], Int64[np.ndarray, " thresholds"], int]:
    """Matched pairs and predicted pixels at each threshold, and true pixels, of one frame.

    From the highest threshold to the lowest, lines only grow: what is thin already stays, and only
    the pixels that a threshold adds are thinned (`suppressed` has left few too many). So one
    matching that grows with them serves all thresholds, in place of 99.
    """
    valid = edges != INVALID_LABEL
    truth = np.argwhere(thinned(edges == 1) & valid)
    values = suppressed(np.where(valid, np.nan_to_num(probability), 0))
    is_candidate = (values >= EDGE_THRESHOLDS[0]) & valid
    distance = max_distance * math.hypot(*edges.shape)
    matching = Matching(_pairs(np.argwhere(is_candidate), truth, distance))
    row_of = np.cumsum(is_candidate).reshape(is_candidate.shape) - 1
    matched, predicted = np.zeros((2, len(EDGE_THRESHOLDS)), dtype=np.int64)
    lines, num_pixels = np.zeros(edges.shape, dtype=bool), 0
    for index in reversed(range(len(EDGE_THRESHOLDS))):
        above = values >= values.dtype.type(EDGE_THRESHOLDS[index])
        grown = thinned(above, keep=lines)
        rows = row_of[grown & ~lines & valid]
        for row in rows.tolist():
            matching.add(row)
        num_pixels += len(rows)
        matched[index], predicted[index], lines = matching.size, num_pixels, grown
    return matched, predicted, len(truth)


class Matching:
    """A largest matching of the rows added so far with the columns of a bipartite graph.

    Each row costs one search for an augmenting path. Columns that a search in vain has reached can
    lead no later search to a free column either, and are left out from then on.
    """

    def __init__(self, near: csr_matrix) -> None:
        """Start without a pair; stored entries are the edges."""
        self.size = 0
        """Number of pairs."""
        starts, columns = near.indptr.tolist(), near.indices.tolist()
        self._columns = [columns[a:b] for a, b in itertools.pairwise(starts)]
        self._column_of: dict[int, int] = {}
        self._row_of: dict[int, int] = {}
        self._dead: set[int] = set()

    def add(self, row: int) -> None:
        """Take one more row in, and enlarge the matching if that is possible."""
        reached_from: dict[int, int] = {}
        queue = collections.deque([row])
        while queue:
            current = queue.popleft()
            for column in self._columns[current]:
                if column in reached_from or column in self._dead:
                    continue
                reached_from[column] = current
                if column not in self._row_of:
                    self._augment(column, reached_from)
                    return
                queue.append(self._row_of[column])
        self._dead.update(reached_from)

    def _augment(self, column: int | None, reached_from: dict[int, int]) -> None:
        while column is not None:
            row = reached_from[column]
            self._row_of[column] = row
            # The column that this row gives up is matched with the row before it, and so on.
            freed = self._column_of.get(row)
            self._column_of[row] = column
            column = freed
        self.size += 1


def suppressed(values: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "height width"]:
    """The map with 0 wherever a neighbour across the line is larger (non-maximum suppression).

    The direction of a line is that in which the smoothed map bends least. Equal neighbours stay,
    so a map of 0 and 1 is returned as it is.
    """
    bend_yy, bend_xx, bend_xy = (
        ndimage.gaussian_filter(values, _SMOOTHING_PIXELS, order=order, mode="nearest")
        for order in ((2, 0), (0, 2), (1, 1))
    )
    along = 0.5 * np.arctan2(2 * bend_xy, bend_xx - bend_yy)
    step = np.stack([np.cos(along), -np.sin(along)])  # rows, columns: a right angle to the line
    place = np.indices(values.shape)
    is_largest = values > 0
    for sign in (-1, 1):
        beside = ndimage.map_coordinates(values, place + sign * step, order=1, mode="nearest")
        is_largest &= values * _TIE >= beside
    return np.where(is_largest, values, 0)


def thinned(
    mask: Bool[np.ndarray, "height width"],
    *,
    keep: Bool[np.ndarray, "height width"] | None = None,
) -> Bool[np.ndarray, "height width"]:
    """Lines one pixel wide with the connections of the mask; thinning twice changes nothing.

    Args:
        mask: the pixels to thin.
        keep: those of them that stay in any case; None keeps none.

    Source:
        Guo and Hall, Parallel Thinning with Two-Subiteration Algorithms, CACM 1989 (algorithm A1)
    """
    height, width = mask.shape
    # A border of zeros, so that every pixel has eight neighbours.
    flat = np.pad(mask, 1).ravel()
    offsets = [row * (width + 2) + column for row, column in _NEIGHBOURS]
    is_open = flat if keep is None else flat & ~np.pad(keep, 1).ravel()
    pixels, num_idle = np.flatnonzero(is_open), 0
    turn = 0
    while num_idle < 2:
        code = np.zeros(len(pixels), dtype=np.uint8)
        for bit, offset in enumerate(offsets):
            code |= flat[pixels + offset].view(np.uint8) << bit
        is_gone = _REMOVABLE[turn][code]
        flat[pixels[is_gone]] = False
        pixels = pixels[~is_gone]
        num_idle = 0 if is_gone.any() else num_idle + 1
        turn = 1 - turn
    return flat.reshape(height + 2, width + 2)[1:-1, 1:-1]


def _removable() -> np.ndarray:
    """For both subiterations, whether a pixel whose neighbours have that code goes."""
    n, ne, e, se, s, sw, w, nw = (
        (np.arange(256) >> bit & 1).astype(bool) for bit in range(len(_NEIGHBOURS))
    )
    num_crossings = sum(
        (~side & (corner | following)).astype(int)
        for side, corner, following in ((n, ne, e), (e, se, s), (s, sw, w), (w, nw, n))
    )
    pairs = ((nw | n, ne | e, se | s, sw | w), (n | ne, e | se, s | sw, w | nw))
    num_pairs = np.minimum(*(np.sum(group, axis=0) for group in pairs))
    may_go = (num_crossings == 1) & (num_pairs >= 2) & (num_pairs <= 3)
    return np.stack([may_go & ~((n | ne | ~se) & e), may_go & ~((s | sw | ~nw) & w)])


_REMOVABLE = _removable()


def _pairs(found: np.ndarray, truth: np.ndarray, distance: float) -> csr_matrix:
    """Which found pixel (row) and true pixel (column) lie within a distance, in pixels."""
    shape = (len(found), len(truth))
    if 0 in shape:
        return csr_matrix(shape, dtype=np.int8)
    # The rounding of a distance must not decide about a pair that is just that far apart.
    pairs = cKDTree(found).sparse_distance_matrix(
        cKDTree(truth), distance * (1 + 1e-9), output_type="ndarray"
    )
    return csr_matrix((np.ones(len(pairs), dtype=np.int8), (pairs["i"], pairs["j"])), shape=shape)
