"""Procedural street scenes with exact labels, depth and normals: data that never runs out.

Each frame index seeds one street made of convex solids, which is ray cast without anti-aliasing.
World axes are the camera's at zero pitch and yaw: x right, y down, z along the street, in metres;
the ground is y = 0. Random draws depend only on (RENDERER_VERSION, split, index), and sensor noise
is drawn last, so a frame shows the same scene at every resolution.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from oneshot_ednas.data.street_scene import (
    BALL,
    BLOCK,
    BUILDING,
    CAR,
    GLASS,
    ROAD,
    SIDEWALK,
    SIGN,
    SKY,
    SOLID,
    TUBE,
    VEGETATION,
    Array,
    Street,
)

RENDERER_VERSION = 1
"""Part of every seed; raise it when a change alters any frame."""
SPLITS = ("train", "val", "test")
MAX_DEPTH_M = 80.0
"""Farther surfaces keep their label and normal but have depth 0 (invalid)."""
MIN_SIZE_PX = 16
TARGETS = {"segmentation": "labels", "depth": "depth", "normals": "normals"}
"""Targets of a frame and their kinds."""


class _Solids:
    """The solids of a street as arrays; row 0 is the ground."""

    def __init__(self, rows: Sequence[tuple]) -> None:
        self.table = table = np.array(rows, dtype=SOLID)
        cos, sin, zero = np.cos(table["yaw"]), np.sin(table["yaw"]), 0 * table["yaw"]
        turn = np.stack((cos, zero, -sin, zero, zero + 1, zero, sin, zero, cos), 1)
        self.turn = turn.reshape(-1, 3, 3)  # world axes to the solid's
        self.to_local = self.turn / table["half"][:, :, None]
        signs = np.array(list(np.ndindex(2, 2, 2))) * 2 - 1
        self.corners = table["center"][:, None] + (signs * table["half"][:, None]) @ self.turn
        self.faces = np.concatenate((np.eye(3), -np.eye(3))) + np.zeros((len(rows), 1, 1))
        self.faces[:, [0, 3, 2, 5], 1] = np.repeat(table["top"] - 1, 2, 1) / 2  # outward normals
        self.reach = 1 + np.where(np.abs(self.faces[:, :, 1]) < 1, self.faces[:, :, 1], 0)

    def hit(self, k: int, origin: Array, direction: Array) -> Array:
        """Distance to solid `k`, in units of `direction`; inf for a miss or a start inside it."""
        start = self.to_local[k] @ (origin - self.table["center"][k][:, None])
        step = self.to_local[k] @ direction
        if self.table["shape"][k] == BLOCK:
            speed = self.faces[k] @ step
            speed = np.where(np.abs(speed) < 1e-12, 1e-12, speed)
            reach = (self.reach[k][:, None] - self.faces[k] @ start) / speed
            enter = np.where(speed < 0, reach, -np.inf).max(0)
            found = enter < np.where(speed > 0, reach, np.inf).min(0)
        else:
            weight = np.array((1.0, self.table["shape"][k] == BALL, 1.0))
            a, b = np.maximum(weight @ step**2, 1e-12), weight @ (start * step)
            root = b * b - a * (weight @ start**2 - 1)
            enter = (-b - np.sqrt(np.maximum(root, 0))) / a
            x, y, z = start + enter * step
            found = (root > 0) & (np.abs(y) < 1 + 1e-9)
            if self.table["label"][k] == VEGETATION:  # ragged: rays that graze a crown may pass
                found &= root > a * 0.5 * _noise(7 * x + 5 * z, 9 * y, self.table["seed"][k])
        return np.where(found & (enter > 1e-6), enter, np.inf)

    def surface(self, which: Array, point: Array) -> tuple[Array, ...]:
        """Position (-1..1) and unit normal in the solids' frames; unit normal in the world."""
        half, shape = self.table["half"][which].T, self.table["shape"][which]
        local = point - self.table["center"][which].T
        local = np.einsum("nij,jn->in", self.to_local[which], local)
        depth = np.einsum("nfj,jn->fn", self.faces[which], local) - self.reach[which].T
        normal = np.where(shape == BLOCK, self.faces[which, depth.argmax(0)].T, local)
        normal[1, shape == TUBE] = 0
        normal /= half
        normal /= np.sqrt((normal**2).sum(0))
        return local, normal, np.einsum("nji,jn->in", self.turn[which], normal)


def _candidates(spot: Array, low: Array, high: Array) -> Iterator[tuple[int, Array]]:
    """Yields each solid and the spots [2, n] that lie in its bounds (low, high [solids, 2])."""
    order = np.argsort(spot[0])
    first, last = (np.searchsorted(spot[0, order], edge[:, 0]) for edge in (low, high))
    for k in range(len(low)):
        near = order[first[k] : last[k]]
        near = near[(spot[1, near] > low[k, 1]) & (spot[1, near] < high[k, 1])]
        if near.size:
            yield k, near


def _first_hits(solids: _Solids, eye: Array, turn: Array, sight: Array) -> tuple[Array, Array]:
    """The z-depth (inf for none) and the index of the first solid on each ray (0 for none)."""
    depth, which = np.full(sight.shape[1], np.inf), np.zeros(sight.shape[1], int)
    corners, rays = (solids.corners - eye) @ turn, turn @ sight
    seen = corners[:, :, :2] / np.maximum(corners[:, :, 2:], 0.1)
    beside = np.where(corners[:, :, 2].min(1) < 0.1, np.inf, 0)[:, None]  # reaches behind us
    for k, near in _candidates(sight[:2], seen.min(1) - beside, seen.max(1) + beside):
        reach = solids.hit(k, eye[:, None], rays[:, near])
        closer = reach < depth[near]
        depth[near[closer]], which[near[closer]] = reach[closer], k
    return depth, which


def _sunlit(solids: _Solids, points: Array, sun: Array) -> Array:
    """Whether no solid stands between each point and the sun."""
    across = np.cross(sun, (0.0, 0.0, 1.0))
    plane = np.stack((across, np.cross(sun, across)))
    corners, lit = solids.corners @ plane.T, np.ones(points.shape[1], bool)
    corners[0] = np.inf  # the ground shades nothing
    for k, near in _candidates(plane @ points, corners.min(1), corners.max(1)):
        lit[near] &= np.isinf(solids.hit(k, points[:, near], sun[:, None]))
    return lit


def _hash(x: Array, y: Array, seed: Array | np.int64 | int) -> Array:
    """A value in 0..1 for each pair of whole numbers, from integer arithmetic."""
    key = (
        np.asarray(x, np.int64) * 0x9E3779B1
        + np.asarray(y, np.int64) * 0x85EBCA77
        + seed * 0xC2B2AE3D
    )
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        key &= 0xFFFFFFFF
        key = (key ^ (key >> shift)) * factor
    return ((key >> 7) & 0xFFFF) / 65535


def _noise(x: Array, y: Array, seed: Array | np.int64 | int) -> Array:
    """Smooth random values in 0..1 with a unit lattice."""
    left, top = np.floor(x), np.floor(y)
    s, t = (part * part * (3 - 2 * part) for part in (x - left, y - top))
    upper = _hash(left, top, seed) * (1 - s) + _hash(left + 1, top, seed) * s
    lower = _hash(left, top + 1, seed) * (1 - s) + _hash(left + 1, top + 1, seed) * s
    return upper * (1 - t) + lower * t


def _reflectance(table: Array, local: Array, facing: Array) -> Array:
    """Textured colours where `local` and `facing` are position and normal on each table row."""
    seed, texture, half = table["seed"], table["texture"], table["half"].T
    flat, sideways = np.abs(facing[1]) > 0.75, np.abs(facing[0]) > np.abs(facing[2])
    across = np.where(sideways & ~flat, local[2], local[0])
    u = np.where(sideways & ~flat, local[2] * half[2], local[0] * half[0])
    v = np.where(flat, local[2] * half[2], local[1] * half[1])
    leafy = np.where(texture == VEGETATION, 1.4 * _noise(u * 5, v * 5, seed) - 0.6, 0)
    colour = table["colour"].T * (
        0.6 + 0.4 * _noise(u * 0.7, v * 0.7, seed) + 0.4 * _noise(u * 9, v * 9, seed) + leafy
    )
    joint = (texture == SIDEWALK) & ((u % 1.0 < 0.07) | (v % 1.0 < 0.07))
    colour *= np.where(joint | ((texture == CAR) & (local[1] > 0.6)), 0.55, 1)
    lamp = (texture == CAR) & (np.abs(local[0]) > 0.55) & (np.abs(local[1]) < 0.5)
    lamps = np.where(facing[2] < 0, [[0.5], [0.02], [0.02]], [[0.8], [0.8], [0.7]])
    colour = np.where(lamp & (np.abs(facing[2]) > 0.8), lamps, colour)
    rim = np.maximum(np.abs(across), np.abs(local[1])) > 0.8
    bar = (np.abs(local[1]) < 0.2) & (np.abs(across) < 0.6) & (seed % 2 == 0)
    ink = np.where(table["colour"].sum(1) < 1.2, 0.75, 0.04)
    colour = np.where((texture == SIGN) & (rim | bar), ink, colour)
    # Windows: a grid whose pitch and openings are each building's own.
    pitch, storey, wide, tall, shine = (_hash(seed, 0 * seed + i, 7) for i in range(5))
    column, floor = u / (1.5 + 2 * pitch), (half[1] - v) / (2.6 + storey)
    window = (texture == BUILDING) & (np.abs(column % 1 - 0.5) < 0.15 + 0.25 * wide)
    window &= np.abs(floor % 1 - 0.55) < 0.15 + 0.22 * tall
    pane = window | ((texture == GLASS) & (np.abs(across) < 0.86))
    blind = 0.5 + 9 * (shine * _hash(np.floor(column), np.floor(floor), seed)) ** 3
    return np.where(pane & ~flat, np.array([[0.05], [0.06], [0.08]]) * blind, colour)


def _ground(street: Street, x: Array, z: Array) -> tuple[Array, Array]:
    """Whether points of the ground are road, and their colours."""
    rng, beyond = street.rng, z - street.cross_near
    fine, coarse = _noise(x * 12, z * 12, 1), _noise(x * 0.4, z * 0.15, 2)
    on_street = np.abs(x) < street.road_half
    lane = np.abs((x + street.lane / 2) % street.lane - street.lane / 2) < 0.08
    edge = np.abs(np.abs(x) - street.road_half + 0.25) < 0.06
    zebra = (beyond > -3.6) & (beyond < -0.8) & (x % 1.2 < 0.6)
    clear = (beyond < -4) | (z > street.cross_far)
    paint = on_street & (zebra | (clear & (edge | (lane & (z % 6 < 3)))))
    paint &= coarse + 0.5 * fine > rng.uniform(0, 0.7)  # worn
    asphalt, white = rng.uniform((0.04, 0.35), (0.2, 0.7))[:, None] * rng.uniform(0.9, 1.1, (2, 3))
    grass = rng.uniform((0.05, 0.1, 0.02), (0.25, 0.25, 0.08))
    is_road = on_street | ((beyond > 0) & (z < street.cross_far))
    colour = np.where(paint, white[:, None], np.where(is_road, asphalt[:, None], grass[:, None]))
    return is_road, colour * (0.6 + 0.4 * coarse + 0.4 * fine)


def _light(
    rng: np.random.Generator,
    solids: _Solids,
    colour: Array,
    point: Array,
    normal: Array,
    depth: Array,
    skyward: Array,
) -> tuple[Array, Array]:
    """Light from surfaces, under a sun and sky drawn here, and from the sky in some directions."""
    cloudy = rng.uniform(0, 1) ** 2 if rng.random() < 0.6 else rng.uniform(0.8, 1)
    elevation = rng.uniform(0.3, 1.2) * (1 - cloudy) + 1.5 * cloudy  # grey light falls from above
    azimuth, level = rng.uniform(0, 2 * math.pi), math.cos(elevation)
    sun = np.array((level * math.cos(azimuth), -math.sin(elevation), level * math.sin(azimuth)))
    sunshine = (1.9 - 1.4 * cloudy) * np.array((1.0, 0.75, 0.45)) ** (rng.uniform() * (1 - cloudy))
    zenith = np.array((0.1, 0.25, 0.6)) * (1 - cloudy) + 0.55 * cloudy
    haze = np.array((0.55, 0.65, 0.8)) * (1 - cloudy) + 0.75 * cloudy
    lambert = np.maximum(sun @ normal, 0)
    lambert[lambert > 0] *= _sunlit(solids, (point + 0.01 * normal)[:, lambert > 0], sun)
    ambient = (0.3 + 0.35 * cloudy) * (0.75 - 0.25 * normal[1]) * (zenith + haze)[:, None]
    clear = np.exp(-depth / rng.choice((60, 150, 400, 900)))  # the rest is fog
    surface = colour * (ambient + sunshine[:, None] * lambert) * clear
    up, seed = np.maximum(-skyward[1], 0), int(rng.integers(1 << 20))
    x, z = skyward[[0, 2]] / (up + 0.12)
    cloud = 0.65 * _noise(1.3 * x, 1.3 * z, seed) + 0.35 * _noise(4 * x, 4 * z, seed)
    cover = np.clip((cloud - rng.uniform(0.25, 0.9)) * 4, 0, 1) * np.minimum(1, up * 5)
    sky = zenith[:, None] + (haze - zenith)[:, None] * (1 - np.minimum(up * 1.6, 1)) ** 2
    sky += (0.9 * haze[:, None] + 0.1 - sky) * cover
    return surface + haze[:, None] * (1 - clear), sky


def intrinsics(height: int, width: int) -> tuple[float, float, float]:
    """Focal length and principal point (x, y) in pixels: both follow from the size alone.

    The pixel in row r and column c sees along ((c + .5 - x) / focal, (r + .5 - y) / focal, 1).
    """
    return 0.9 * width, width / 2, height / 2


def render_frame(
    index: int, *, height: int = 64, width: int = 128, split: str = "train"
) -> dict[str, Array]:
    """One street as an image with exact ground truth, the same at every call.

    Args:
        index: number of the frame in its split, from 0; any size of split is possible.
        height: rows of the frame; a scene keeps its field of view across sizes of one aspect.
        width: columns of the frame.
        split: one of `SPLITS`; no two splits share a scene.

    Returns:
        `image` uint8 [height, width, 3] RGB; `segmentation` uint8 [height, width], an index into
        `CLASSES`; `depth` float32 [height, width], metres along the optical axis, 0 for sky and
        beyond `MAX_DEPTH_M`; `normals` float16 [height, width, 3], unit vectors towards the camera
        (x right, y down, z forward), (0, 0, 0) for sky.

    Raises:
        ValueError: for an unknown split, a negative index or a size below `MIN_SIZE_PX`.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"expected a frame index of 0 or more, got {index}")
    if min(height, width) < MIN_SIZE_PX:
        raise ValueError(f"expected at least {MIN_SIZE_PX} rows and columns, got {height}x{width}")
    seed = np.random.SeedSequence((RENDERER_VERSION, SPLITS.index(split), index))
    rng = np.random.Generator(np.random.PCG64(seed))
    street = Street(rng)
    solids = _Solids(street.rows)
    aside = street.traffic_side * rng.uniform(0, min(1.6, street.road_half - 2.6))
    eye = np.array((aside, -rng.uniform(1.2, 2.3), 0.0))
    sin_pitch, sin_yaw = np.sin(rng.normal((0.02, 0.0), (0.03, 0.1)))
    cos_pitch, cos_yaw = math.sqrt(1 - sin_pitch**2), math.sqrt(1 - sin_yaw**2)
    tilt = np.array(((1, 0, 0), (0, cos_pitch, sin_pitch), (0, -sin_pitch, cos_pitch)))
    pan = np.array(((cos_yaw, 0, sin_yaw), (0, 1, 0), (-sin_yaw, 0, cos_yaw)))
    turn = pan @ tilt  # camera axes to the world's
    focal, x, y = intrinsics(height, width)
    v, u = np.indices((height, width)).reshape(2, -1) + 0.5 - np.array(((y,), (x,)))
    sight = np.stack((u / focal, v / focal, np.ones_like(u)))
    depth, which = _first_hits(solids, eye, turn, sight)
    rays, hit = turn @ sight, np.isfinite(depth)
    which, point = which[hit], eye[:, None] + depth[hit] * rays[:, hit]
    table = solids.table[which]
    local, facing, normal = solids.surface(which, point)
    is_road, ground = _ground(street, point[0], point[2])
    label, normals = np.full(hit.shape, SKY, np.uint8), np.zeros((3, *hit.shape))
    label[hit] = np.where((which == 0) & is_road, ROAD, table["label"])
    normals[:, hit] = turn.T @ normal
    colour = np.where(which == 0, ground, _reflectance(table, local, facing))

    light = np.empty((3, *hit.shape))
    light[:, hit], light[:, ~hit] = _light(
        rng, solids, colour, point, normal, depth[hit], rays[:, ~hit]
    )

    gain = rng.uniform(0.65, 1.4) * rng.uniform(0.88, 1.12, (3, 1))
    image = np.sqrt(light * gain * (1 - rng.uniform(0, 0.5) * (sight[0] ** 2 + sight[1] ** 2)))
    image += rng.uniform(0.004, 0.035) * rng.standard_normal(image.shape)
    image = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    depth = np.where(depth <= MAX_DEPTH_M, depth, 0).astype(np.float32)
    return {
        "image": image.T.copy().reshape(height, width, 3),
        "segmentation": label.reshape(height, width),
        "depth": depth.reshape(height, width),
        "normals": normals.T.astype(np.float16, order="C").reshape(height, width, 3),
    }
