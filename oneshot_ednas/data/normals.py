"""Surface normals from a depth map and the camera's intrinsics. NumPy only."""

import numpy as np
from jaxtyping import Float, Float32, Integer

# A plane has three unknowns; a few more points keep one noisy pixel from deciding the fit.
MIN_POINTS = 8


def normals_from_depth(
    depth: Float[np.ndarray, "height width"],
    fx: float,
    fy: float,
    cx: float,
    cy: float,
    *,
    window: int = 7,
    labels: Integer[np.ndarray, "..."] | None = None,
) -> Float32[np.ndarray, "height width 3"]:
    """Unit normals of the least-squares plane around each pixel, pointing towards the camera.

    A pinhole camera sees the plane n . P = d at P = Z * ((u - cx) / fx, (v - cy) / fy, 1), hence
    1 / Z = (n / d) . ((u - cx) / fx, (v - cy) / fy, 1): inverse depth is linear in the pixel
    coordinates. A fit 1 / Z = a (u - u0) + b (v - v0) + c around the pixel (u0, v0) gives
    n / d = (a fx, b fy, c - a (u0 - cx) - b (v0 - cy)), which points away from the camera.

    Args:
        depth: distance along the optical axis, in metres; 0, negative or not finite is invalid.
        fx: focal length in pixels, horizontally.
        fy: focal length in pixels, vertically.
        cx: column of the principal point, in pixels.
        cy: row of the principal point, in pixels.
        window: side of the square neighbourhood, odd, in pixels.
        labels: if given, only pixels of the centre pixel's label take part in its fit, so that
            planes do not bend around the borders of objects.

    Returns:
        Vectors in camera coordinates (x right, y down, z forward); (0, 0, 0) where the pixel has
        no depth or fewer than `MIN_POINTS` neighbours, or where these lie on one line.

    Raises:
        ValueError: if the window is even or below 3, a focal length is not positive, or the
            labels differ in shape.
    """
    if window < 3 or window % 2 == 0:
        raise ValueError(f"expected an odd window of at least 3 pixels, got {window}")
    if fx <= 0 or fy <= 0:
        raise ValueError(f"expected positive focal lengths in pixels, got fx={fx}, fy={fy}")
    if labels is not None and labels.shape != depth.shape:
        raise ValueError(f"expected labels of depth's shape {depth.shape}, got {labels.shape}")

    depth = depth.astype(np.float64)
    valid = np.isfinite(depth) & (depth > 0)
    inverse = np.divide(1.0, depth, out=np.zeros_like(depth), where=valid)
    groups = _groups(valid, labels)
    gu, gv, centre, usable = _fit_planes(inverse, groups, window // 2)

    rows, columns = np.arange(depth.shape[0])[:, None], np.arange(depth.shape[1])
    normal = np.stack([gu * fx, gv * fy, centre - gu * (columns - cx) - gv * (rows - cy)], axis=-1)
    length = np.sqrt(np.einsum("hwc,hwc->hw", normal, normal))
    # A plane that the ray of its pixel does not meet in front of the camera cannot be seen there.
    usable &= centre > 0
    scale = np.divide(-1.0, length, out=np.zeros_like(length), where=usable)
    return (normal * scale[..., None]).astype(np.float32)


def _groups(valid: np.ndarray, labels: np.ndarray | None) -> Integer[np.ndarray, "height width"]:
    """Group of each pixel; only pixels of one group are fitted together. -1 is no group."""
    if labels is None:
        return np.where(valid, 0, -1).astype(np.int16)
    # Ranks instead of the labels themselves: any label, even a negative one, is a group.
    ranks = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    return np.where(valid, ranks, -1).astype(np.int32)


def _fit_planes(
    inverse: np.ndarray, groups: np.ndarray, radius: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Slopes along u and v, value at the centre pixel, and where the fit is determined.

    The sums run over the shifts of the window, with offsets from the centre as coordinates:
    sums of offsets are exact integers, so a set of points on one line is recognised exactly.
    """
    height, width = inverse.shape
    padded = np.pad(inverse, radius)
    padded_groups = np.pad(groups, radius, constant_values=-1)
    # Of each: n, u, v, uu, uv, vv, then w, uw, vw, with w the inverse depth.
    n, su, sv, suu, suv, svv, sw, suw, svw = np.zeros((9, height, width))
    member = np.empty((height, width))
    value = np.empty((height, width))
    for dv in range(-radius, radius + 1):
        # Sums along one row of the window first: the row's offset then multiplies only once.
        row = np.zeros((5, height, width))
        down = slice(radius + dv, radius + dv + height)
        for du in range(-radius, radius + 1):
            right = slice(radius + du, radius + du + width)
            np.equal(padded_groups[down, right], groups, out=member)
            np.multiply(padded[down, right], member, out=value)
            row[0] += member
            row[3] += value
            if du:
                row[1] += np.multiply(member, du, out=member)
                row[2] += np.multiply(member, du, out=member)
                row[4] += np.multiply(value, du, out=value)
        for total, part in zip((n, su, suu, sw, suw), row, strict=True):
            total += part
        if dv:
            sv += row[0] * dv
            svv += row[0] * (dv * dv)
            suv += row[1] * dv
            svw += row[3] * dv

    # Covariances times n squared: integers where no inverse depth is in them.
    cuu, cvv, cuv = n * suu - su * su, n * svv - sv * sv, n * suv - su * sv
    cuw, cvw = n * suw - su * sw, n * svw - sv * sw
    determinant = cuu * cvv - cuv * cuv
    usable = (groups >= 0) & (n >= MIN_POINTS) & (determinant > 0)
    share = np.divide(1.0, determinant, out=np.zeros_like(determinant), where=usable)
    gu = (cvv * cuw - cuv * cvw) * share
    gv = (cuu * cvw - cuv * cuw) * share
    centre = np.divide(sw - gu * su - gv * sv, n, out=np.zeros_like(n), where=usable)
    return gu, gv, centre, usable
