"""Sums over frames, from which all statistics of a data set follow. No torch.

The sums of one frame add up with those of any other (`+`), so that a data set of any size is summed
in bounded memory and by any number of processes.
"""

import functools
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, Shaped, UInt8

from oneshot_ednas.data.dataset import DataSet
from oneshot_ednas.data.sources import Intrinsics
from oneshot_ednas.data.targets import TARGET_KINDS, is_valid

KEY_BITS = 18
"""Numbers are counted by the first bits of their float32: sign, exponent and 9 of 23 bits of the
mantissa. A quantile is off by at most a thousandth of itself."""
_KEYS_OF_ZERO = ((1 << (KEY_BITS - 1)) - 1, 1 << (KEY_BITS - 1))
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and spread of vectors.

    Source:
        Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample
        variances, 1979: deviations from means add up without the cancellation of sums of squares.
    """

    count: int
    mean: Float64[np.ndarray, " channels"]
    """Zero where there is nothing to average."""
    deviations: Float64[np.ndarray, " channels"]
    """Squared differences from the mean, summed."""

    @classmethod
    def of(cls, values: Shaped[np.ndarray, "count channels"]) -> "Moments":
        """Of vectors, one a row; there may be none."""
        count, channels = values.shape
        if count == 0:
            return cls(count=0, mean=np.zeros(channels), deviations=np.zeros(channels))
        mean = values.mean(axis=0, dtype=np.float64)
        return cls(count=count, mean=mean, deviations=np.square(values - mean).sum(axis=0))

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + shift * (other.count / count),
            deviations=self.deviations
            + other.deviations
            + np.square(shift) * (self.count * other.count / count),
        )

    @property
    def std(self) -> Float64[np.ndarray, " channels"]:
        """Standard deviation (of the population) of each channel; zero of nothing."""
        return np.sqrt(self.deviations / max(self.count, 1))


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Counts of labels, or of edges."""

    pixels: Int64[np.ndarray, " values"]
    """Valid pixels of each stored value 0..255."""
    pixels_beside: Int64[np.ndarray, " values"]
    """Valid pixels of the frames in which each value occurs."""

    @classmethod
    def of(cls, values: Shaped[np.ndarray, " valid"]) -> "Classes":
        """Of one frame's valid pixels."""
        pixels = np.bincount(values, minlength=256)
        return cls(pixels=pixels, pixels_beside=(pixels > 0) * pixels.sum())

    def __add__(self, other: "Classes") -> "Classes":
        return Classes(
            pixels=self.pixels + other.pixels,
            pixels_beside=self.pixels_beside + other.pixels_beside,
        )


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Distribution of depths, disparities or values."""

    moments: Moments
    minimum: float
    """Infinite of nothing, as is the maximum."""
    maximum: float
    counts: Int64[np.ndarray, " bins"]
    """How many numbers have each key, see `KEY_BITS`."""

    @classmethod
    def of(cls, values: Float32[np.ndarray, " valid"]) -> "Numbers":
        """Of one frame's valid pixels."""
        return cls(
            moments=Moments.of(values[:, None]),
            minimum=float(values.min(initial=np.inf)),
            maximum=float(values.max(initial=-np.inf)),
            counts=np.bincount(_keys(values), minlength=2**KEY_BITS),
        )

    def __add__(self, other: "Numbers") -> "Numbers":
        return Numbers(
            moments=self.moments + other.moments,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            counts=self.counts + other.counts,
        )

    def quantile(self, share: float) -> float:
        """The smallest number that at least this share of all does not exceed.

        Off by at most a thousandth of itself. There must be a number.
        """
        rank = max(share * self.moments.count, 1)
        key = int(np.searchsorted(np.cumsum(self.counts), rank))
        return float(np.clip(_key_centre(key), self.minimum, self.maximum))


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Where normals point."""

    moments: Moments
    """Of the three components: x right, y down, z forward."""
    total_length: float
    num_facing: int
    """Normals that a camera can see: not along its ray through the pixel, but against it."""

    def __add__(self, other: "Directions") -> "Directions":
        return Directions(
            moments=self.moments + other.moments,
            total_length=self.total_length + other.total_length,
            num_facing=self.num_facing + other.num_facing,
        )


Found = Classes | Numbers | Directions


@dataclass(frozen=True, kw_only=True)
class TargetSums:
    """What is known of one target over some frames."""

    kind: str
    """Its row in `TARGET_KINDS`."""
    num_frames: int
    num_empty_frames: int
    """Frames without a single valid pixel."""
    num_pixels: int
    num_valid: int
    found: Found
    """Over the valid pixels."""

    def __add__(self, other: "TargetSums") -> "TargetSums":
        assert self.kind == other.kind
        return TargetSums(
            kind=self.kind,
            num_frames=self.num_frames + other.num_frames,
            num_empty_frames=self.num_empty_frames + other.num_empty_frames,
            num_pixels=self.num_pixels + other.num_pixels,
            num_valid=self.num_valid + other.num_valid,
            found=self.found + other.found,  # type: ignore[operator]
        )


@dataclass(frozen=True, kw_only=True)
class FrameSums:
    """What is known of some frames."""

    num_frames: int
    sizes: Counter[tuple[int, int]]
    """How many frames have each height and width."""
    image: Moments
    """Of red, green and blue in 0..255."""
    targets: Mapping[str, TargetSums]

    def __add__(self, other: "FrameSums") -> "FrameSums":
        return FrameSums(
            num_frames=self.num_frames + other.num_frames,
            sizes=self.sizes + other.sizes,
            image=self.image + other.image,
            targets={name: sums + other.targets[name] for name, sums in self.targets.items()},
        )


def frame_sums(
    data: DataSet,
    frame_id: str,
    *,
    targets: Collection[str] | None = None,
    label_map: str | None = None,
) -> FrameSums:
    """The sums of one frame at its stored size.

    Args:
        data: the data set.
        frame_id: one entry of a split.
        targets: the targets to read; None is all that the data set has.
        label_map: name of a label map of `segmentation`; None keeps the stored classes.

    Raises:
        ValueError: as `DataSet.read_stored`.
    """
    frame = data.read_stored(frame_id, targets=targets, label_map=label_map)
    image: UInt8[np.ndarray, "height width 3"] = frame.pop("image")
    return FrameSums(
        num_frames=1,
        sizes=Counter([(image.shape[0], image.shape[1])]),
        image=Moments.of(image.reshape(-1, 3)),
        targets={
            name: target_sums(data.target_kind(name), array, data.intrinsics)
            for name, array in frame.items()
        },
    )


def target_sums(
    kind: str, array: Shaped[np.ndarray, "..."], intrinsics: Intrinsics | None = None
) -> TargetSums:
    """The sums of one decoded map.

    Args:
        kind: its row in `TARGET_KINDS`.
        array: as that row describes it.
        intrinsics: the camera that looked at normals, in pixels of the map. Without one, as a
            guess: in the middle, with a focal length of the longer side.
    """
    valid = is_valid(kind, array)
    num_valid = int(np.count_nonzero(valid))
    return TargetSums(
        kind=kind,
        num_frames=1,
        num_empty_frames=int(num_valid == 0),
        num_pixels=valid.size,
        num_valid=num_valid,
        found=_found(kind, array, valid, intrinsics),
    )


def _found(kind: str, array: np.ndarray, valid: np.ndarray, intrinsics: Intrinsics | None) -> Found:
    if TARGET_KINDS[kind].is_whole:
        return Classes.of(array[valid])
    if TARGET_KINDS[kind].channels == 1:
        return Numbers.of(array[valid].astype(np.float32))
    vectors = array[valid].astype(np.float64)
    rays = _rays(*valid.shape, intrinsics)[valid]
    # The rounding of float16 must not turn a surface away that is seen edge-on.
    facing = np.einsum("nc,nc->n", vectors, rays) <= 1e-3 * np.linalg.norm(rays, axis=1)
    return Directions(
        moments=Moments.of(vectors),
        total_length=float(np.linalg.norm(vectors, axis=1).sum()),
        num_facing=int(np.count_nonzero(facing)),
    )


@functools.lru_cache(maxsize=4)
def _rays(
    height: int, width: int, intrinsics: Intrinsics | None
) -> Float[np.ndarray, "height width 3"]:
    """Direction in which the camera looks through each pixel; z is 1."""
    focal = float(max(height, width))
    camera = intrinsics or Intrinsics(fx=focal, fy=focal, cx=(width - 1) / 2, cy=(height - 1) / 2)
    rows, columns = np.mgrid[:height, :width]
    return np.stack(
        [
            (columns - camera.cx) / camera.fx,
            (rows - camera.cy) / camera.fy,
            np.ones((height, width)),
        ],
        axis=-1,
    )


def _keys(values: Float32[np.ndarray, " count"]) -> Int64[np.ndarray, " count"]:
    """Whole numbers in the order of the values: the bits of a float32, signs turned about."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    ordered = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> (32 - KEY_BITS)).astype(np.int64)


def _key_centre(key: int) -> float:
    """A number in the middle of those that have this key; 0 for the key of 0 itself.

    Next to 0 are numbers below 1e-40 only, which nobody means.
    """
    if key in _KEYS_OF_ZERO:
        return 0.0
    ordered = (key << (32 - KEY_BITS)) | (1 << (31 - KEY_BITS))
    bits = ordered & 0x7FFFFFFF if ordered >> 31 else ~ordered & 0xFFFFFFFF
    return float(np.array([bits], np.uint32).view(np.float32)[0])


# Class weights ------------------------------------------------------------------------------


def median_frequency_weights(classes: Classes, num_classes: int) -> tuple[float | None, ...]:
    """Median over the classes' frequencies, over the frequency of each; None for absent classes.

    The frequency of a class is its share of the valid pixels of those frames that have it.

    Source:
        Eigen, Fergus, Predicting depth, surface normals and semantic labels with a common
        multi-scale convolutional architecture, ICCV 2015, section 4.3.2
    """
    pixels, beside = classes.pixels[:num_classes], classes.pixels_beside[:num_classes]
    occurs = pixels > 0
    if not occurs.any():
        return (None,) * num_classes
    frequency = np.divide(pixels, beside, out=np.full(num_classes, np.nan), where=occurs)
    median = float(np.median(frequency[occurs]))
    return tuple(
        median / float(f) if present else None for f, present in zip(frequency, occurs, strict=True)
    )


def inverse_log_weights(classes: Classes, num_classes: int) -> tuple[float | None, ...]:
    """1 / ln(1.02 + share of all valid pixels); None for absent classes.

    Source:
        Paszke et al., ENet: a deep neural network architecture for real-time semantic
        segmentation, 2016, section 5.2
    """
    pixels = classes.pixels[:num_classes]
    shares = pixels / max(int(pixels.sum()), 1)
    return tuple(
        float(1 / np.log(1.02 + share)) if count else None
        for share, count in zip(shares, pixels, strict=True)
    )
