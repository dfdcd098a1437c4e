"""Procedural street scenes with exact labels, depth and normals: data that never runs out.

Each frame index seeds one street made of convex solids, which is ray cast without anti-aliasing.
World axes are the camera's at zero pitch and yaw: x right, y down, z along the street, in metres;
the ground is y = 0. Random draws depend only on (RENDERER_VERSION, split, index), and sensor noise
is drawn last, so a frame shows the same scene at every resolution.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

RENDERER_VERSION = 1
"""Part of every seed; raise it when a change alters any frame."""
SPLITS = ("train", "val", "test")
CLASSES = tuple("road sidewalk building pole vegetation sky car person grass sign".split())
ROAD, SIDEWALK, BUILDING, POLE, VEGETATION, SKY, CAR, PERSON, GRASS, SIGN = range(10)
PALETTE = np.array(
    [0x804080, 0xE878DC, 0x5A5A64, 0xBEBE96, 0x287828, 0x64AADC, 0x1E28AA, 0xDC283C, 0x96E682]
    + [0xF0D214],
    dtype=">u4",
).view(np.uint8).reshape(-1, 4)[:, 1:]  # fmt: skip
"""One RGB colour per class, for pictures of label maps."""
MAX_DEPTH_M = 80.0
"""Farther surfaces keep their label and normal but have depth 0 (invalid)."""
MIN_SIZE_PX = 16

PLAIN, FACADE, LEAVES, PANEL, BODY, CABIN, PAVING, GROUND = range(8)  # textures
BLOCK, BALL, TUBE = range(3)  # shapes; a block may taper, a tube is an open vertical cylinder
# A solid fills -1..1 on each axis of its own frame; `top` is a block's width and length at its top
# relative to its bottom.
_SOLID = np.dtype(
    [("label", "i8"), ("center", "f8", 3), ("half", "f8", 3), ("yaw", "f8"), ("colour", "f8", 3)]
    + [("texture", "i8"), ("shape", "i8"), ("top", "f8", 2), ("seed", "i8")]
)
# Linear reflectances. Only these things have typical colours; all others may have any.
_LEAVES = ((0.05, 0.13, 0.03), (0.09, 0.2, 0.04), (0.2, 0.22, 0.05), (0.35, 0.16, 0.04))
_POLES = ((0.25, 0.26, 0.27), (0.05, 0.06, 0.06), (0.05, 0.12, 0.08), (0.22, 0.14, 0.08))
_SIGNS = ((0.6, 0.04, 0.04), (0.03, 0.1, 0.5), (0.7, 0.5, 0.03), (0.02, 0.3, 0.1), (0.7, 0.7, 0.7))
_SKINS = ((0.6, 0.38, 0.27), (0.4, 0.22, 0.13), (0.2, 0.1, 0.06), (0.7, 0.5, 0.4))
_BARK, _TYRE = (0.13, 0.09, 0.06), (0.02, 0.02, 0.02)

_Pose = tuple[float, float, float]  # x, z in metres and yaw in radians
_Colour = Sequence[float] | np.ndarray


class _Street:
    """Draws the solids of one street, and what the ground's texture must know of its layout."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.rows = rng, list[tuple]()
        self.road_half = rng.uniform(4.2, 7.0)
        self.walk = rng.uniform(1.6, 3.5)
        self.cross_near = rng.uniform(12, 45) if rng.random() < 0.5 else 200.0
        self.cross_far = self.cross_near + rng.uniform(6, 10)
        self.lane = self.road_half / round(self.road_half / 3.3)
        self.traffic_side = rng.choice((-1, 1))
        self._add(GRASS, (0, 0, 0), (1200, 1, 1200), bottom=-1, texture=GROUND)
        paving = rng.uniform(0.12, 0.45) * rng.uniform(0.85, 1.1, 3)
        for side in (-1, 1):
            for near, far in ((-20, self.cross_near), (self.cross_far, 250)):
                pose = (side * (self.road_half + self.walk / 2), (near + far) / 2, 0)
                self._add(SIDEWALK, pose, (self.walk, 0.14, far - near), 0, paving, PAVING)
            self._buildings(side)
            self._kerbside(side)
            self._cars(side)
        for _ in range(rng.integers(2, 10)):
            on_walk = self.road_half + rng.uniform(0.4, self.walk)
            x = on_walk if rng.random() < 0.75 else rng.uniform(0, self.road_half)
            self._person((x * rng.choice((-1, 1)), rng.uniform(5, 28), rng.uniform(-3, 3)))
        for x in rng.uniform(-60, 60, rng.integers(3, 9)):  # a skyline, beyond MAX_DEPTH_M
            size = rng.uniform((8, 3, 8), (30, 30, 30))
            self._add(BUILDING, (x, rng.uniform(100, 160), 0), size, texture=FACADE)

    def _add(
        self,
        label: int,
        pose: _Pose,
        size: Sequence[float] | np.ndarray,
        bottom: float = 0.0,
        colour: _Colour | None = None,
        texture: int = PLAIN,
        shape: int = BLOCK,
        *,
        shift: tuple[float, float] = (0.0, 0.0),
        top: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Adds a solid of a size in metres, shifted (right, ahead) in the frame of its pose."""
        x, z, yaw = pose
        x += math.cos(yaw) * shift[0] + math.sin(yaw) * shift[1]
        z += math.cos(yaw) * shift[1] - math.sin(yaw) * shift[0]
        half, seed = np.array(size) / 2, self.rng.integers(1 << 20)
        paint = self._paint() if colour is None else colour
        center = (x, -bottom - half[1], z)
        self.rows.append((label, center, half, yaw, paint, texture, shape, top, seed))

    def _paint(self) -> Float[np.ndarray, " 3"]:
        """Any colour, mostly dull: few classes own a hue."""
        tint = 1 - self.rng.uniform(0, 1) ** 2 * self.rng.uniform(0, 1, 3)
        return self.rng.uniform(0.03, 0.75) * tint

    def _pick(self, colours: Sequence[_Colour]) -> Float[np.ndarray, " 3"]:
        return np.array(colours[self.rng.integers(len(colours))]) * self.rng.uniform(0.7, 1.3, 3)

    def _spots(self, start: float, low: float, high: float) -> Iterator[tuple[float, float]]:
        """Yields the near end and length of places along the street, none on the crossing."""
        z = start
        while z < 85:
            length = self.rng.uniform(low, high)
            if z > self.cross_far or z + length < self.cross_near:
                yield z, length
            z += length

    def _buildings(self, side: int) -> None:
        rng, edge = self.rng, self.road_half + self.walk
        setback, tallest = rng.uniform(0, 1) ** 2 * 7, rng.uniform(5, 24)
        for z, length in self._spots(rng.uniform(-9, -3), 6, 17):
            pose = (side * (edge + setback + rng.uniform(4.5, 5.3)), z + length / 2, 0.0)
            if setback > 3 and rng.random() < 0.5:
                hedge, colour = (0.8, rng.uniform(0.7, 1.7), length * 0.9), self._pick(_LEAVES)
                self._add(VEGETATION, (side * (edge + 0.8), *pose[1:]), hedge, 0, colour, LEAVES)
            if rng.random() < 0.2:
                self._tree((pose[0], z + rng.uniform(1, length), 0))
                continue
            height, width = rng.uniform(0.45, 1) * tallest, length * rng.choice((0.7, 0.98, 0.98))
            self._add(BUILDING, pose, (9, height, width), texture=FACADE)
            if height < 9:
                eaves, ridge = (9.8, rng.uniform(1.5, 3.5), width), (0.02, rng.uniform(0.5, 1))
                self._add(BUILDING, pose, eaves, height, top=ridge)
            if rng.random() < 0.5:  # a sign that hangs out from the wall, or lies flat on it
                board = ((0.9, 0.9, 0.12), (0.2, 0.8, width * 0.5))[rng.integers(2)]
                shift, low = (-side * (4.5 + board[0] / 2), 0), rng.uniform(2.6, 3.4)
                self._add(SIGN, pose, board, low, self._pick(_SIGNS), PANEL, shift=shift)

    def _kerbside(self, side: int) -> None:
        rng, tree_share = self.rng, self.rng.uniform(0, 0.7)
        for z, _ in self._spots(rng.uniform(3, 8), 4, 10):
            pose = (side * (self.road_half + rng.uniform(0.3, 0.7)), z, rng.normal(0, 0.15))
            if rng.random() < tree_share:
                self._tree(pose)
                continue
            colour, kind, thick = self._pick(_POLES), rng.random(), rng.uniform(0.1, 0.24)
            height = 1.0 if kind < 0.15 else rng.uniform(2.4, 3.6)  # a bollard or a traffic sign
            if kind > 0.65:  # a lamp
                height, reach = rng.uniform(5, 8), -side * rng.uniform(0.8, 2.2)
                self._add(POLE, pose, (abs(reach), 0.1, 0.1), height, colour, shift=(reach / 2, 0))
                self._add(POLE, pose, (0.7, 0.16, 0.3), height - 0.1, shift=(reach, 0))
            elif kind > 0.15:
                size = rng.uniform((0.6, 0.6, 0.08), (1.1, 1.3, 0.08))
                shape, paint, shift = rng.integers(2), self._pick(_SIGNS), (0.0, -thick)
                self._add(SIGN, pose, size, height - size[1], paint, PANEL, shape, shift=shift)
            self._add(POLE, pose, (thick, height, thick), 0, colour, PLAIN, TUBE)

    def _tree(self, pose: _Pose) -> None:
        rng, trunk, spread = self.rng, self.rng.uniform(1.8, 3.2), self.rng.uniform(1.3, 2.2)
        leaves, thick = self._pick(_LEAVES), spread / 6
        self._add(VEGETATION, pose, (thick, trunk + 0.8, thick), 0, _BARK, PLAIN, TUBE)
        for level in range(rng.integers(3, 7)):
            size, shift = spread * rng.uniform(0.8, 1.5, 3), tuple(rng.normal(0, spread / 4, 2))
            bottom = trunk + level * spread * 0.3
            self._add(VEGETATION, pose, size, bottom, leaves, LEAVES, BALL, shift=shift)

    def _cars(self, side: int) -> None:
        rng, parked_share = self.rng, self.rng.uniform(0, 0.9)
        x, heading = side * (self.road_half - 1.05), math.pi * (side != self.traffic_side)
        for z, _ in self._spots(rng.uniform(3, 8), 5.8, 8):
            if rng.random() < parked_share:
                self._car((x, z, rng.normal(heading, 0.03)))
        for z, _ in self._spots(rng.uniform(8, 30), 9, 40):
            driving = side * min(self.lane / 2, self.road_half - 3.2)
            self._car((driving, z, rng.normal(heading, 0.04)))
        if self.cross_near < 60 and rng.random() < 0.4:  # from a side street
            z = (self.cross_near + self.cross_far) / 2
            self._car((side * rng.uniform(3, 9), z + 1.6 * side, side * math.pi / 2))

    def _car(self, pose: _Pose) -> None:
        rng, paint = self.rng, self._paint()
        width, low, length = rng.uniform((1.65, 0.6, 3.7), (1.9, 0.8, 4.7))
        cabin, ahead, top = length * rng.uniform(0.45, 0.7), -0.2, (0.8, rng.uniform(0.5, 0.8))
        if rng.random() < 0.15:  # a van: a short cabin and a box behind it
            cabin, ahead, top = length * 0.33, length * 0.3, (0.9, 0.7)
            box, shift = (width, rng.uniform(1.5, 2.2), length * 0.65), (0, -length * 0.17)
            self._add(CAR, pose, box, 0.4, texture=BODY, shift=shift)
        self._add(CAR, pose, (width, low, length), 0.22, paint, BODY, top=(0.94, 0.96))
        glass, bottom = (width * 0.92, rng.uniform(0.5, 0.7), cabin), 0.22 + low
        self._add(CAR, pose, glass, bottom, paint, CABIN, shift=(0, ahead), top=top)
        for shift in ((-0.46, -0.3), (0.46, -0.3), (-0.46, 0.31), (0.46, 0.31)):
            place = (shift[0] * width, shift[1] * length)
            self._add(CAR, pose, (0.24, 0.64, 0.64), 0, _TYRE, PLAIN, BALL, shift=place)

    def _person(self, pose: _Pose) -> None:
        rng, tall, stride = self.rng, self.rng.uniform(1.15, 1.9), self.rng.uniform(0, 0.2)
        coat, trousers, skin = self._paint(), self._paint(), self._pick(_SKINS)
        for side in (-1, 1):
            leg, arm = (side * 0.1, side * stride), (side * 0.26, -side * stride)
            size = (0.14, tall * 0.38, 0.16)
            self._add(PERSON, pose, (0.17, tall / 2, 0.2), 0, trousers, PLAIN, TUBE, shift=leg)
            self._add(PERSON, pose, size, tall * 0.44, coat, PLAIN, BALL, shift=arm)
        self._add(PERSON, pose, (0.48, tall * 0.46, 0.32), tall * 0.42, coat, PLAIN, BALL)
        self._add(PERSON, pose, (0.22, 0.27, 0.24), tall - 0.27, skin, PLAIN, BALL)


class _Solids:
    """The solids of a street as arrays; row 0 is the ground."""

    def __init__(self, rows: Sequence[tuple]) -> None:
        table = np.array(rows, dtype=_SOLID)
        self.center, self.half, self.colour = table["center"], table["half"], table["colour"]
        self.label, self.texture, self.seed = table["label"], table["texture"], table["seed"]
        self.shape = table["shape"]
        turn = np.zeros((len(table), 3, 3))  # world axes to the solid's axes
        turn[:, 0, 0] = turn[:, 2, 2] = np.cos(table["yaw"])
        turn[:, 2, 0] = np.sin(table["yaw"])
        turn[:, 0, 2], turn[:, 1, 1] = -turn[:, 2, 0], 1
        self.to_local = turn / self.half[:, :, None]
        signs = np.stack(np.meshgrid((-1, 1), (-1, 1), (-1, 1)), -1).reshape(8, 3)
        self.corners = self.center[:, None] + (signs * self.half[:, None]) @ turn
        self.faces = np.zeros((len(table), 6, 4))  # outward normal and offset, in local axes
        self.faces[:, :, :3] = np.repeat(np.eye(3), 2, 0) * np.tile([[1.0], [-1.0]], (3, 1))
        self.faces[:, 0:2, 1] = (table["top"][:, :1] - 1) / 2
        self.faces[:, 4:6, 1] = (table["top"][:, 1:] - 1) / 2
        self.faces[:, :, 3] = 1 + self.faces[:, :, 1] * (np.arange(6) // 2 != 1)

    def hit(self, k: int, origin: np.ndarray, direction: np.ndarray) -> Float[np.ndarray, "..."]:
        """Distance to solid `k`, in units of `direction`; inf for a miss or a start inside it."""
        offset = origin - self.center[k].reshape(3, *[1] * (origin.ndim - 1))
        start = np.einsum("ij,j...->i...", self.to_local[k], offset)
        step = np.einsum("ij,j...->i...", self.to_local[k], direction)
        if self.shape[k] == BLOCK:
            normal = self.faces[k, :, :3]
            gap = -np.einsum("ij,j...->i...", normal, start)
            gap += self.faces[k, :, 3].reshape(6, *[1] * (gap.ndim - 1))
            speed = np.einsum("ij,j...->i...", normal, step)
            speed = np.where(np.abs(speed) < 1e-12, 1e-12, speed)
            reach = gap / speed
            enter = np.where(speed < 0, reach, -np.inf).max(0)
            leave = np.where(speed > 0, reach, np.inf).min(0)
            return np.where((enter < leave) & (enter > 1e-6), enter, np.inf)
        weight = np.array([1.0, self.shape[k] == BALL, 1.0])
        a = np.maximum(np.einsum("i,i...->...", weight, step * step), 1e-12)
        b = np.einsum("i,i...->...", weight, start * step)
        root = b * b - a * (np.einsum("i,i...->...", weight, start * start) - 1)
        enter = (-b - np.sqrt(np.maximum(root, 0))) / a
        point = start + enter * step
        found = (root > 0) & (enter > 1e-6) & (np.abs(point[1]) < 1 + 1e-9)
        if self.texture[k] == LEAVES:  # ragged: rays that graze the crown may pass
            ragged = _noise(4 * point[0] + 3 * point[2], 5 * point[1], self.seed[k])
            found &= root > a * ragged * 0.6
        return np.where(found, enter, np.inf)


def _noise(x: np.ndarray, y: np.ndarray, seed: np.ndarray | int) -> Float[np.ndarray, "..."]:
    """Smooth random values in 0..1, one per point, with a unit lattice."""
    left, top = np.floor(x), np.floor(y)
    right, down = x - left, y - top
    right, down = right * right * (3 - 2 * right), down * down * (3 - 2 * down)
    upper = _hash(left, top, seed) * (1 - right) + _hash(left + 1, top, seed) * right
    lower = _hash(left, top + 1, seed) * (1 - right) + _hash(left + 1, top + 1, seed) * right
    return upper * (1 - down) + lower * down


def _hash(x: np.ndarray, y: np.ndarray, seed: np.ndarray | int) -> Float[np.ndarray, "..."]:
    """A value in 0..1 for each pair of whole numbers, by an integer hash (exact everywhere)."""
    key = (np.asarray(x, np.int64) * 0x9E3779B1 + np.asarray(y, np.int64) * 0x85EBCA77) & 0xFFFFFFFF
    key = (key + seed * 0xC2B2AE3D) & 0xFFFFFFFF
    key = ((key ^ (key >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    key = ((key ^ (key >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return (key ^ (key >> 15)) / 2.0**32


def _first_hits(
    solids: _Solids, eye: np.ndarray, turn: np.ndarray, rays: Float[np.ndarray, "3 height width"]
) -> tuple[Float[np.ndarray, "height width"], Int[np.ndarray, "height width"]]:
    """The z-depth (inf for none) and the index of the first solid on each ray (-1 for none).

    A solid is tested only at the pixels that its bounding box covers, nearest solids first.
    """
    height, width = rays.shape[1:]
    focal, *middle = intrinsics(height, width)
    corners = (solids.corners - eye) @ turn
    nearest = corners[:, :, 2].min(1)
    pixel = corners[:, :, :2] / np.maximum(corners[:, :, 2:], 0.1) * focal + np.array(middle)
    crosses = (nearest < 0.1)[:, None]  # bounding boxes that reach behind the camera
    low = np.where(crosses, 0, np.clip(np.floor(pixel.min(1) - 0.5), 0, (width, height)))
    high = np.where(crosses, (width, height), np.clip(pixel.max(1) + 1.5, 0, (width, height)))
    depth, solid = np.full((height, width), np.inf), np.full((height, width), -1)
    for k in np.argsort(nearest):
        window = tuple(slice(int(low[k, i]), int(high[k, i])) for i in (1, 0))
        if depth[window].size and nearest[k] < depth[window].max():
            reach = solids.hit(k, eye[:, None, None], rays[:, *window])
            closer = reach < depth[window]
            depth[window][closer] = reach[closer]
            solid[window][closer] = k
    return depth, solid


def _sunlit(
    solids: _Solids, points: Float[np.ndarray, "3 pixels"], sun: Float[np.ndarray, " 3"]
) -> Bool[np.ndarray, " pixels"]:
    """Whether the sun reaches each point. A solid is tested only near its outline, sun seen."""
    across = np.cross(sun, (0.0, 0.0, 1.0))
    plane = np.stack((across, np.cross(sun, across)))
    spot, corners = plane @ points, solids.corners @ plane.T
    low, high, order = corners.min(1), corners.max(1), np.argsort(spot[0])
    first, last = (np.searchsorted(spot[0, order], edge[:, 0]) for edge in (low, high))
    lit = np.ones(points.shape[1], bool)
    for k in range(1, len(first)):  # the ground shades nothing
        near = order[first[k] : last[k]]
        near = near[lit[near] & (spot[1, near] > low[k, 1]) & (spot[1, near] < high[k, 1])]
        if near.size:
            lit[near] = np.isinf(solids.hit(k, points[:, near], sun[:, None]))
    return lit


def _reflectance(
    solids: _Solids, which: np.ndarray, local: np.ndarray, facing: np.ndarray
) -> Float[np.ndarray, "3 pixels"]:
    """The textured colour of surfaces: local position (-1..1) and normal on solids `which`."""
    seed, texture, metres = solids.seed[which], solids.texture[which], local * solids.half[which].T
    flat, sideways = np.abs(facing[1]) > 0.75, np.abs(facing[0]) > np.abs(facing[2])
    u, across = (np.where(sideways & ~flat, part[2], part[0]) for part in (metres, local))
    v = np.where(flat, metres[2], metres[1])
    coarse, fine = _noise(u * 0.7, v * 0.7, seed), _noise(u * 9, v * 9, seed)
    colour = solids.colour[which].T * (0.6 + 0.4 * coarse + 0.4 * fine)
    colour = np.where(texture == LEAVES, colour * (0.3 + 1.4 * _noise(u * 5, v * 5, seed)), colour)
    joint = ((u % 1.0 < 0.07) | (v % 1.0 < 0.07)) & (texture == PAVING)
    lamp = (texture == BODY) & (np.abs(local[0]) > 0.55) & (np.abs(local[1]) < 0.5)
    lamp &= np.abs(facing[2]) > 0.8
    colour *= np.where(joint | (texture == BODY) & (local[1] > 0.6), 0.55, 1)
    lamps = np.where(facing[2] < 0, [[0.5], [0.02], [0.02]], [[0.8], [0.8], [0.7]])
    colour = np.where(lamp, lamps, colour)
    pane = (texture == CABIN) & ~flat & (np.abs(across) < 0.86)
    ink = np.where(solids.colour[which].sum(1) < 1.2, 0.75, 0.04)
    rim = np.maximum(np.abs(across), np.abs(local[1])) > 0.8
    bar = (np.abs(local[1]) < 0.2) & (np.abs(across) < 0.6) & (seed % 2 == 0)
    colour = np.where((texture == PANEL) & (rim | bar), ink, colour)
    # Windows: a grid whose pitch and openings are each building's own.
    kind = [_hash(seed, 0 * seed + i, 7) for i in range(5)]
    column, storey = u / (1.5 + 2 * kind[0]), (solids.half[which, 1] - v) / (2.6 + kind[1])
    window = np.abs(column % 1 - 0.5) < 0.15 + 0.25 * kind[2]
    window &= (np.abs(storey % 1 - 0.55) < 0.15 + 0.22 * kind[3]) & ~flat & (texture == FACADE)
    blind = _hash(np.floor(column), np.floor(storey), seed)
    glass = np.array([[0.05], [0.06], [0.08]]) * (0.5 + 9 * (blind * kind[4]) ** 3)
    return np.where(window | pane, glass * (0.8 + 0.6 * coarse), colour)


def _paint_ground(street: _Street, rng: np.random.Generator, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether ground points are road, and their colour."""
    crossing = (z > street.cross_near) & (z < street.cross_far)
    is_road = (np.abs(x) < street.road_half) | crossing
    asphalt = rng.uniform(0.04, 0.2) * rng.uniform(0.9, 1.1, 3)
    grass = np.array((0.12, 0.2, 0.05)) * rng.uniform(0.5, 1.5) + rng.uniform(0, 0.12) * np.array((1.0, 0.6, 0.1))
    patch, grit = _noise(x * 0.4, z * 0.15, 1), _noise(x * 14, z * 14, 2)
    tuft = _noise(x * 3, z * 3, 3)
    road = asphalt[:, None] * (0.65 + 0.4 * patch + 0.35 * grit)
    lane = street.lane
    offset = np.abs((x + lane / 2) % lane - lane / 2)
    dashed = (offset < 0.08) & ((z % 6 < 3) | (np.abs(x) < 0.1) & (patch.size > 0))
    edge = np.abs(np.abs(x) - street.road_half + 0.25) < 0.06
    ahead = street.cross_near - z
    zebra = (ahead > 0.8) & (ahead < 3.6) & (x % 1.2 < 0.6)
    paint = ((dashed | edge) & (ahead > 4) | (dashed | edge) & (z > street.cross_far) | zebra) & (np.abs(x) < street.road_half)
    worn = paint & (grit * 0.5 + patch > rng.uniform(0.0, 0.7))
    road = np.where(worn, rng.uniform(0.35, 0.7) * (0.8 + 0.4 * grit), road)
    return is_road, np.where(is_road, road, grass[:, None] * (0.5 + 0.6 * tuft + 0.5 * grit))


def intrinsics(height: int, width: int) -> tuple[float, float, float]:
    """Focal length and principal point (x, y) in pixels.

    The pixel in row r and column c sees along ((c + .5 - x) / focal, (r + .5 - y) / focal, 1).
    """
    return 0.9 * width, width / 2, height / 2


def render_frame(
    index: int, *, height: int = 64, width: int = 128, split: str = "train"
) -> dict[str, np.ndarray]:
    """x."""
    rng = np.random.Generator(np.random.PCG64([RENDERER_VERSION, SPLITS.index(split), index]))
    street = _Street(rng)
    solids = _Solids(street.rows)
    focal, *middle = intrinsics(height, width)
    v, u = (np.indices((height, width)) + 0.5 - np.array(middle[::-1])[:, None, None]) / focal
    pitch, yaw = rng.normal(0.02, 0.03), rng.normal(0, 0.1)
    eye = np.array((street.traffic_side * rng.uniform(0, min(1.6, street.road_half - 2.6)), -rng.uniform(1.2, 2.3), 0))
    cp, sp, cy, sy = math.cos(pitch), math.sin(pitch), math.cos(yaw), math.sin(yaw)
    turn = np.array([[cy, -sy * sp, sy * cp], [0, cp, sp], [-sy, -cy * sp, cy * cp]])
    rays = np.einsum("ij,jhw->ihw", turn, np.stack((u, v, np.ones_like(u))))
    depth, solid = _first_hits(solids, eye, turn, rays)

    hit = solid >= 0
    which = solid[hit]
    point = eye[:, None] + depth[hit] * rays[:, hit]
    to_local = solids.to_local[which]
    local = np.einsum("nij,jn->in", to_local, point - solids.center[which].T)
    faces = solids.faces[which]
    side = (np.einsum("nfj,jn->nf", faces[:, :, :3], local) - faces[:, :, 3]).argmax(1)
    outward = np.where(solids.shape[which] == BLOCK, faces[np.arange(len(side)), side, :3].T, local)
    outward[1, solids.shape[which] == TUBE] = 0
    facing = outward / solids.half[which].T
    facing /= np.sqrt((facing * facing).sum(0))
    normal = np.einsum("nji,jn->in", to_local, facing * solids.half[which].T)

    labels = np.full((height, width), SKY, np.uint8)
    labels[hit] = solids.label[which]
    colour = _reflectance(solids, which, local, facing)
    is_road, ground = _paint_ground(street, rng, point[0], point[2])
    colour = np.where(which == 0, ground, colour)
    labels[hit] = np.where((which == 0) & is_road, ROAD, solids.label[which])

    overcast = rng.uniform(0, 1) ** 2 if rng.random() < 0.6 else rng.uniform(0.8, 1)
    elevation, azimuth = rng.uniform(0.3, 1.2) * (1 - overcast) + 1.5 * overcast, rng.uniform(0, 2 * math.pi)
    sun = np.array((math.cos(azimuth) * math.cos(elevation), -math.sin(elevation), math.sin(azimuth) * math.cos(elevation)))
    warm = np.array((1.0, 0.75, 0.45)) ** (rng.uniform(0.1, 1) * (1 - overcast))
    sunshine = (1.9 - 1.4 * overcast) * warm
    zenith = np.array((0.1, 0.25, 0.6)) * (1 - overcast) + 0.55 * overcast
    haze = np.array((0.55, 0.65, 0.8)) * (1 - overcast) + 0.75 * overcast * np.array((1, 1, 1.02))
    lambert = np.maximum(sun @ normal, 0)
    bright = lambert > 0
    lit = np.zeros(len(which))
    lit[bright] = _sunlit(solids, point[:, bright] + normal[:, bright] * 0.01, sun)
    sky_light = (0.3 + 0.35 * overcast) * (0.75 - 0.25 * normal[1]) * (zenith + haze)[:, None]
    colour = colour * (sky_light + sunshine[:, None] * lambert * lit)
    fog_m = math.exp(rng.uniform(math.log(50), math.log(900)))
    clear = np.exp(-depth[hit] / fog_m)
    light = np.empty((3, height, width))
    light[:, hit] = colour * clear + haze[:, None] * (1 - clear)

    way = rays[:, ~hit] / np.sqrt((rays[:, ~hit] ** 2).sum(0))
    up = np.maximum(-way[1], 0)
    cx, cz = way[0] / (up + 0.12), way[2] / (up + 0.12)
    seed = int(rng.integers(1 << 20))
    cloud = 0.65 * _noise(1.3 * cx, 1.3 * cz, seed) + 0.35 * _noise(4 * cx, 4 * cz, seed)
    cover = np.clip((cloud - rng.uniform(0.25, 0.9)) * 4, 0, 1) * np.minimum(1, up * 5)
    fade = (1 - np.minimum(up * 1.6, 1)) ** 2
    sky = haze[:, None] * fade + zenith[:, None] * (1 - fade)
    sky = sky + (0.9 * haze[:, None] + 0.1 - sky) * cover
    glow = np.maximum(sun @ way, 0) ** 24
    light[:, ~hit] = sky + 0.6 * (1 - overcast) * warm[:, None] * glow

    gain = rng.uniform(0.55, 1.25) * rng.uniform(0.88, 1.12, 3)
    vignette = 1 - rng.uniform(0, 0.5) * (u * u + v * v)
    image = np.sqrt(light * gain[:, None, None] * vignette)
    image += rng.uniform(0.004, 0.035) * rng.standard_normal(image.shape)
    normals = np.zeros((height, width, 3), np.float16)
    normals[hit] = np.einsum("ji,jn->ni", turn, normal)
    return {
        "image": (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0).copy(),
        "segmentation": labels,
        "depth": np.where(hit & (depth <= MAX_DEPTH_M), depth, 0).astype(np.float32),
        "normals": normals,
    }
