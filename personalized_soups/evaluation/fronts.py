"""Pareto fronts of models that are scored in several objectives, and the hypervolume below a front.

All objectives are maximised. A point dominates another if it is at least as good in every objective and better in one.

Shapes: N = points, D = objectives.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def pareto_front(points: npt.ArrayLike) -> Floats:
    """Return [M, D], float64: the points that no other point dominates, each once, in ascending order.

    Raises:
        ValueError: if the points are not a table of finite numbers.

    Example:
        >>> pareto_front([[1, 3], [2, 2], [1, 2], [3, 1], [2, 2]]).tolist()
        [[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]
    """
    points_ND = np.unique(_checked(points), axis=0)
    is_as_good_NN = (points_ND[:, None, :] <= points_ND[None, :, :]).all(axis=2)
    # without repeated points, a point that is as good in every objective is better in one
    is_dominated_N = is_as_good_NN.sum(axis=1) > 1
    front_MD: Floats = points_ND[~is_dominated_N]
    return front_MD


def hypervolume(points: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Return the volume that is dominated by at least one point and lies above the reference point.

    It is exact: the volume is the sum, over the heights of the points in the last objective, of slices whose base is
    the hypervolume in the other objectives (Fonseca et al. 2006). The cost grows as N^(D-1), so it is for a few
    objectives.

    Args:
        points: the points, [N, D].
        reference: [D], the worst value of each objective. Points that are not above it in every objective add nothing.

    Raises:
        ValueError: if the points are not a table of finite numbers, or the reference has another number of objectives.

    Example:
        >>> hypervolume([[0.5, 1.0], [1.0, 0.5]], [0.0, 0.0])
        0.75
    """
    points_ND, worst_D = _checked(points), np.asarray(reference, dtype=np.float64)
    if worst_D.shape != (points_ND.shape[1],) or not np.isfinite(worst_D).all():
        raise ValueError(f"the reference has the shape {worst_D.shape}, but points have {points_ND.shape[1]} numbers")
    above_ND = points_ND[(points_ND > worst_D).all(axis=1)] - worst_D
    return _volume(above_ND)


def _volume(points_ND: Floats) -> float:
    """Return the hypervolume above 0 of points with positive coordinates."""
    if len(points_ND) == 0:
        return 0.0
    if points_ND.shape[1] == 1:
        return float(points_ND.max())
    heights = np.unique(points_ND[:, -1])
    below = np.concatenate([[0.0], heights[:-1]])
    return sum(
        float(top - bottom) * _volume(points_ND[points_ND[:, -1] >= top, :-1])
        for bottom, top in zip(below, heights, strict=True)
    )


def _checked(points: npt.ArrayLike) -> Floats:
    points_ND = np.asarray(points, dtype=np.float64)
    if points_ND.ndim != 2 or not points_ND.size or not np.isfinite(points_ND).all():
        raise ValueError(f"points must be a table of finite numbers, but have the shape {points_ND.shape}")
    return points_ND
