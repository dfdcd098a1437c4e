import time

import numpy as np
import pytest

from oneshot_ednas.data.normals import MIN_POINTS, normals_from_depth

HEIGHT, WIDTH = 48, 64
CAMERA = (60.0, 55.0, 30.0, 22.0)


def rays():
    fx, fy, cx, cy = CAMERA
    v, u = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    return np.stack([(u - cx) / fx, (v - cy) / fy, np.ones_like(u)], axis=-1)


def plane_depth(normal, distance):
    """Depth of the plane normal . P = -distance, which faces the camera."""
    return -distance / (rays() @ normal)


def degrees(a, b):
    return np.degrees(np.arccos(np.clip((a * b).sum(-1), -1, 1)))


def test_a_frontal_wall_faces_the_camera():
    normals = normals_from_depth(np.full((HEIGHT, WIDTH), 2.5), *CAMERA)
    assert np.abs(normals - np.array([0, 0, -1])).max() < 1e-6
    assert normals.dtype == np.float32


@pytest.mark.parametrize(
    "normal", [(0, -0.8, -0.6), (0.5, 0.1, -0.9), (-0.4, 0.4, -0.7), (0.3, -0.5, -0.9)]
)
@pytest.mark.parametrize("window", [3, 7])
def test_a_slanted_plane_has_its_own_normal_up_to_the_border(normal, window):
    normal = np.array(normal) / np.linalg.norm(normal)
    depth = plane_depth(normal, 1.5)
    normals = normals_from_depth(np.where(depth > 0, depth, 0), *CAMERA, window=window)
    found = np.abs(normals).sum(-1) > 0
    assert found.sum() > 0.4 * found.size
    assert degrees(normals[found], normal).max() < 0.5


def test_a_sphere_has_radial_normals_inside():
    ray, centre, radius = rays(), np.array([0.1, -0.1, 4.0]), 1.2
    a, b = (ray**2).sum(-1), ray @ centre
    under = b**2 - a * (centre @ centre - radius**2)
    depth = np.where(under > 0, (b - np.sqrt(np.maximum(under, 0))) / a, 0)
    expected = (depth[..., None] * ray - centre) / radius
    normals = normals_from_depth(depth, *CAMERA, window=3)
    interior = (depth > 0) & (expected[..., 2] < -0.75)
    assert interior.sum() > 200
    assert degrees(normals[interior], expected[interior]).max() < 2


def test_labels_keep_two_walls_apart():
    left, right = np.array([0.6, 0, -0.8]), np.array([-0.6, 0, -0.8])
    labels = np.where(np.arange(WIDTH) < 30, 7, 255)[None].repeat(HEIGHT, 0).astype(np.uint8)
    truth = np.where((labels == 7)[..., None], left, right)
    depth = np.where(labels == 7, plane_depth(left, 1.0), plane_depth(right, 1.0))
    assert degrees(normals_from_depth(depth, *CAMERA, labels=labels), truth).max() < 0.5
    assert degrees(normals_from_depth(depth, *CAMERA), truth).max() > 10


def test_pixels_without_depth_take_no_part():
    depth = np.full((HEIGHT, WIDTH), 2.0)
    depth[10:14, 20:24] = (0, np.nan, -1, np.inf)
    normals = normals_from_depth(depth, *CAMERA)
    invalid = np.zeros_like(depth, dtype=bool)
    invalid[10:14, 20:24] = True
    assert (normals[invalid] == 0).all()
    assert np.abs(normals[~invalid] - np.array([0, 0, -1])).max() < 1e-6


def test_every_normal_points_against_its_ray_even_for_wild_depths():
    depth = np.random.default_rng(0).lognormal(sigma=2.0, size=(HEIGHT, WIDTH))
    depth[np.random.default_rng(1).random(depth.shape) < 0.7] = 0
    normals = normals_from_depth(depth, *CAMERA)
    found = np.abs(normals).sum(-1) > 0
    assert found.sum() > 500
    assert ((normals * rays()).sum(-1)[found] < 0).all()


def test_too_few_points_or_points_on_one_line_give_no_normal():
    depth = np.zeros((20, 20))
    depth[10] = 2.0  # a row of 9 or more points, all on one line
    assert not normals_from_depth(depth, *CAMERA, window=15).any()
    depth = np.zeros((20, 20))
    depth.flat[[0, 1, 2, 20, 21, 22, 40]] = 2.0
    assert (depth > 0).sum() == MIN_POINTS - 1
    assert not normals_from_depth(depth, *CAMERA).any()
    depth[2, 1] = 2.0
    assert (np.abs(normals_from_depth(depth, *CAMERA)).sum(-1) > 0).sum() == MIN_POINTS


def test_a_full_frame_is_fast():
    depth = np.random.default_rng(0).uniform(1, 5, (192, 256))
    labels = np.random.default_rng(1).integers(0, 40, (192, 256))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        normals_from_depth(depth, 237.0, 234.0, 130.0, 94.0, labels=labels)
        seconds.append(time.perf_counter() - start)
    # About 0.02 s on an idle core; the margin is for busy machines.
    assert min(seconds) < 0.15


def test_bad_arguments_are_refused():
    depth = np.ones((8, 8))
    with pytest.raises(ValueError, match="expected an odd window of at least 3 pixels, got 4"):
        normals_from_depth(depth, *CAMERA, window=4)
    with pytest.raises(ValueError, match=r"positive focal lengths in pixels, got fx=0.0, fy=1.0"):
        normals_from_depth(depth, 0.0, 1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"labels of depth's shape \(8, 8\), got \(8, 9\)"):
        normals_from_depth(depth, *CAMERA, labels=np.zeros((8, 9), dtype=int))
