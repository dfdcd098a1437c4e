"""What a street holds: solids with their class, size, place and colour, drawn from a generator."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

CLASSES = (
    *("road", "sidewalk", "building", "pole", "vegetation"),
    *("sky", "car", "person", "grass", "sign"),
)
ROAD, SIDEWALK, BUILDING, POLE, VEGETATION, SKY, CAR, PERSON, GRASS, SIGN = range(len(CLASSES))
GLASS, PLAIN = 10, 11  # textures besides the classes' own
BLOCK, BALL, TUBE = range(3)  # shapes: a block may taper, a tube is an open upright cylinder
_COLOURS = {  # linear reflectances of the classes that have typical ones; the rest may have any
    VEGETATION: ((0.05, 0.13, 0.03), (0.09, 0.2, 0.04), (0.2, 0.22, 0.05), (0.35, 0.16, 0.04)),
    POLE: ((0.25, 0.26, 0.27), (0.05, 0.06, 0.06), (0.05, 0.12, 0.08), (0.22, 0.14, 0.08)),
    SIGN: ((0.6, 0.04, 0.04), (0.03, 0.1, 0.5), (0.7, 0.5, 0.03), (0.02, 0.3, 0.1), (0.7,) * 3),
    PERSON: ((0.6, 0.38, 0.27), (0.4, 0.22, 0.13), (0.2, 0.1, 0.06), (0.7, 0.5, 0.4)),
}
# A solid fills -1..1 on each axis of its own frame. `half` is half its size in metres; `top` is a
# block's width and length at its top, relative to its bottom.
SOLID = np.dtype(
    [
        *(("label", np.int64), ("texture", np.int64), ("shape", np.int64), ("seed", np.int64)),
        *(("center", float, 3), ("half", float, 3), ("yaw", float)),
        *(("top", float, 2), ("colour", float, 3)),
    ]
)
Array = np.ndarray
Vector = Sequence[float | int] | Array  # beartype, which tests use, takes no int for a float
Pose = tuple[float, float, float]  # x and z in metres, yaw in radians


class Street:
    """Draws the solids of one street, and what the ground's texture must know of its layout."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.rows = rng, list[tuple]()
        self.road_half, self.walk = rng.uniform((4.2, 2.0), (7.0, 4.5))
        self.lane = self.road_half / round(self.road_half / 3.3)
        self.cross_near = rng.uniform(12, 45) if rng.random() < 0.5 else 200.0
        self.cross_far = self.cross_near + rng.uniform(6, 10)
        self.traffic_side = rng.choice((-1, 1))
        self._add(GRASS, (0.0, 0.0, 0.0), (1200, 1, 1200), -1.0)
        paving = rng.uniform(0.12, 0.45) * rng.uniform(0.85, 1.1, 3)
        for side in (-1, 1):
            for near, far in ((-20, self.cross_near), (self.cross_far, 250)):
                pose = (side * (self.road_half + self.walk / 2), (near + far) / 2, 0.0)
                self._add(SIDEWALK, pose, (self.walk, 0.14, far - near), 0.0, paving)
            self._buildings(side)
            self._kerbside(side)
            self._cars(side)
        for _ in range(rng.integers(3, 13)):
            on_walk = self.road_half + rng.uniform(0.4, self.walk)
            x = on_walk if rng.random() < 0.75 else rng.uniform(0, self.road_half)
            self._person((x * rng.choice((-1, 1)), rng.uniform(4, 26), rng.uniform(-3, 3)))
        for x in rng.uniform(-60, 60, rng.integers(3, 9)):  # a skyline, beyond MAX_DEPTH_M
            self._add(BUILDING, (x, rng.uniform(100, 160), 0.0), rng.uniform((8, 3, 8), 30))

    def _add(
        self,
        label: int,
        pose: Pose,
        size: Vector,
        bottom: float = 0.0,
        colour: Vector | None = None,
        shape: int = BLOCK,
        *,
        shift: Vector = (0.0, 0.0),
        top: Vector = (1.0, 1.0),
        texture: int | None = None,
    ) -> None:
        """Adds a solid of a size in metres, shifted (right, ahead) in the frame of its pose."""
        cos, sin, half = math.cos(pose[2]), math.sin(pose[2]), np.array(size) / 2
        x, z = pose[0] + cos * shift[0] + sin * shift[1], pose[1] + cos * shift[1] - sin * shift[0]
        colour = self._colour(label) if colour is None else colour
        look = (label if texture is None else texture, shape, self.rng.integers(1 << 20))
        place = ((x, -bottom - half[1], z), half, pose[2], top)
        self.rows.append((label, *look, *place, colour))

    def _colour(self, label: int) -> Array:
        if label in _COLOURS:
            return self.rng.choice(_COLOURS[label]) * self.rng.uniform(0.7, 1.3, 3)
        tint = 1 - self.rng.uniform(0, 1) ** 2 * self.rng.uniform(0, 1, 3)
        return self.rng.uniform(0.03, 0.75) * tint

    def _spots(self, start: float, low: float, high: float) -> Iterator[tuple[float, float]]:
        """Yields the near end and length of places along the street, none on the crossing."""
        while start < 85:
            length = self.rng.uniform(low, high)
            if start > self.cross_far or start + length < self.cross_near:
                yield start, length
            start += length

    def _buildings(self, side: int) -> None:
        rng, setback = self.rng, self.rng.uniform(0, 1) ** 2 * 7
        tallest, edge = rng.uniform(5, 24), side * (self.road_half + self.walk)
        for z, length in self._spots(rng.uniform(-9, -3), 6.0, 17.0):
            pose = (edge + side * (setback + rng.uniform(4.5, 5.3)), z + length / 2, 0.0)
            if setback > 3 and rng.random() < 0.5:
                hedge = (0.8, rng.uniform(0.7, 1.7), length * 0.9)
                self._add(VEGETATION, (edge + side * 0.8, *pose[1:]), hedge)
            if rng.random() < 0.2:
                self._tree(pose)
                continue
            height, width = rng.uniform(0.45, 1) * tallest, length * rng.choice((0.7, 0.98, 0.98))
            self._add(BUILDING, pose, (9, height, width))
            if height < 9:
                eaves, ridge = (9.8, rng.uniform(1.5, 3.5), width), (0.02, rng.uniform(0.5, 1))
                self._add(BUILDING, pose, eaves, height, top=ridge)
            if rng.random() < 0.5:  # a sign that hangs out from the wall, or lies flat on it
                board = ((0.9, 0.9, 0.12), (0.2, 0.8, width * 0.5))[rng.integers(2)]
                shift = (-side * (4.5 + board[0] / 2), 0.0)
                self._add(SIGN, pose, board, rng.uniform(2.6, 3.4), shift=shift)

    def _kerbside(self, side: int) -> None:
        rng, tree_share = self.rng, self.rng.uniform(0, 0.7)
        for z, _ in self._spots(rng.uniform(3, 8), 4.0, 10.0):
            pose = (side * (self.road_half + rng.uniform(0.3, 0.7)), z, rng.normal(0, 0.15))
            if rng.random() < tree_share:
                self._tree(pose)
                continue
            colour, kind, thick = self._colour(POLE), rng.random(), rng.uniform(0.1, 0.24)
            height = 1.0 if kind < 0.15 else rng.uniform(2.4, 3.6)  # a bollard or a traffic sign
            if kind > 0.65:  # a lamp
                height, reach = rng.uniform(5, 8), rng.uniform(0.8, 2.2)
                arm, shift = (reach, 0.14, 0.2), (-side * reach / 2, 0.0)
                self._add(POLE, pose, arm, height, colour, shift=shift)
            elif kind > 0.15:
                plate, shape = rng.uniform((0.6, 0.6, 0.08), (1.1, 1.3, 0.08)), int(rng.integers(2))
                self._add(SIGN, pose, plate, height - plate[1], None, shape, shift=(0, -thick))
            self._add(POLE, pose, (thick, height, thick), 0.0, colour, TUBE)

    def _tree(self, pose: Pose) -> None:
        rng, leaves = self.rng, self._colour(VEGETATION)
        trunk, spread = rng.uniform((1.8, 1.3), (3.2, 2.2))
        wood = (spread / 6, trunk + 0.8, spread / 6)
        self._add(VEGETATION, pose, wood, 0.0, (0.13, 0.09, 0.06), TUBE)
        for level in range(rng.integers(3, 7)):
            crown, shift = spread * rng.uniform(0.8, 1.5, 3), rng.normal(0, spread / 4, 2)
            bottom = trunk + level * spread * 0.3
            self._add(VEGETATION, pose, crown, bottom, leaves, BALL, shift=shift)

    def _cars(self, side: int) -> None:
        rng, parked_share = self.rng, self.rng.uniform(0, 0.8)
        x, heading = side * (self.road_half - 1.05), math.pi * (side != self.traffic_side)
        for z, _ in self._spots(rng.uniform(3, 8), 5.8, 8.0):
            if rng.random() < parked_share:
                self._car((x, z, rng.normal(heading, 0.03)))
        for z, _ in self._spots(rng.uniform(8, 30), 9.0, 40.0):
            driving = side * min(self.lane / 2, self.road_half - 3.2)
            self._car((driving, z, rng.normal(heading, 0.04)))

    def _car(self, pose: Pose) -> None:
        rng, paint = self.rng, self._colour(CAR)
        width, low, length = rng.uniform((1.65, 0.6, 3.7), (1.9, 0.8, 4.7))
        cabin, ahead, top = length * rng.uniform(0.45, 0.7), -0.2, (0.8, rng.uniform(0.5, 0.8))
        if rng.random() < 0.15:  # a van: a short cabin and a box behind it
            cabin, ahead, top = length * 0.33, length * 0.3, (0.9, 0.7)
            box = (width, rng.uniform(1.5, 2.2), length * 0.65)
            self._add(CAR, pose, box, 0.4, shift=(0, -length * 0.17))
        self._add(CAR, pose, (width, low, length), 0.22, paint, top=(0.94, 0.96))
        roof, shift = (width * 0.92, rng.uniform(0.5, 0.7), cabin), (0.0, ahead)
        self._add(CAR, pose, roof, 0.22 + low, paint, texture=GLASS, shift=shift, top=top)
        for right, front in ((-0.46, -0.3), (0.46, -0.3), (-0.46, 0.31), (0.46, 0.31)):
            wheel, shift = (0.24, 0.64, 0.64), (right * width, front * length)
            self._add(CAR, pose, wheel, 0.0, (0.02,) * 3, BALL, texture=PLAIN, shift=shift)

    def _person(self, pose: Pose) -> None:
        coat, trousers = self._colour(CAR), self._colour(CAR)
        tall, stride = self.rng.uniform((1.15, 0.0), (1.9, 0.2))
        for side in (-1, 1):
            leg, arm = (side * 0.1, side * stride), (side * 0.26, -side * stride)
            sleeve = (0.14, tall * 0.38, 0.16)
            self._add(PERSON, pose, (0.17, tall / 2, 0.2), 0.0, trousers, TUBE, shift=leg)
            self._add(PERSON, pose, sleeve, tall * 0.44, coat, BALL, shift=arm)
        self._add(PERSON, pose, (0.48, tall * 0.46, 0.32), tall * 0.42, coat, BALL)
        self._add(PERSON, pose, (0.22, 0.27, 0.24), tall - 0.27, None, BALL)
