"""The Panda as numbers: where its links are for joint angles, and balls that cover them.

Knows numpy alone, so that many configurations are looked at in one call. The simulator's arm is `robots.panda`.
"""

import numpy as np

LIMITS = np.array([(-2.8, 2.8), (-1.7, 1.7), (-2.8, 2.8), (-2.95, -0.15), (-2.8, 2.8), (0.05, 3.65), (-2.8, 2.8)])
"""Least and largest angle of each joint, (7, 2) [rad]: a little within those of the data sheet."""
ORIGINS = np.array([
    (0.0, 0.0, 0.333, 0.0),
    (0.0, 0.0, 0.0, -np.pi / 2),
    (0.0, -0.316, 0.0, np.pi / 2),
    (0.0825, 0.0, 0.0, np.pi / 2),
    (-0.0825, 0.384, 0.0, -np.pi / 2),
    (0.0, 0.0, 0.0, np.pi / 2),
    (0.088, 0.0, 0.0, np.pi / 2),
])  # fmt: skip
"""Each joint in the frame of the link before it: x, y, z [m] and the turn about x [rad], (7, 4). It turns about its own
z."""
TOOL = 0.212
"""The point between the fingertips lies so far along the axis of link 7 [m]."""
BALLS = np.array([
    (0, -0.077, -0.002, 0.019, 0.095), (0, -0.008, -0.004, 0.091, 0.084), (0, 0.001, 0.000, 0.012, 0.099),
    (1, -0.009, -0.014, -0.140, 0.092), (1, 0.006, -0.022, -0.022, 0.085), (1, 0.007, -0.070, -0.018, 0.079),
    (2, -0.001, -0.153, 0.001, 0.073), (2, -0.001, -0.002, 0.055, 0.082), (2, 0.008, -0.074, 0.026, 0.091),
    (3, 0.003, 0.004, -0.072, 0.081), (3, 0.072, 0.070, -0.018, 0.076), (3, 0.076, 0.023, -0.013, 0.077),
    (4, -0.082, 0.083, 0.002, 0.074), (4, -0.022, 0.028, 0.020, 0.089), (4, -0.002, 0.005, 0.044, 0.078),
    (5, -0.005, 0.037, -0.007, 0.067), (5, -0.001, 0.080, -0.065, 0.071), (5, 0.000, 0.000, -0.217, 0.073),
    (5, 0.002, 0.054, -0.174, 0.077), (5, 0.002, 0.089, -0.001, 0.058), (5, 0.013, -0.002, -0.102, 0.078),
    (6, 0.006, 0.003, 0.011, 0.064), (6, 0.073, 0.039, -0.001, 0.065), (6, 0.078, -0.019, 0.000, 0.066),
    (7, -0.004, -0.003, 0.075, 0.055), (7, 0.035, 0.035, 0.077, 0.051), (7, -0.045, -0.046, 0.104, 0.044),
    (7, -0.044, -0.046, 0.150, 0.048), (7, 0.005, 0.005, 0.128, 0.056), (7, 0.047, 0.049, 0.136, 0.050),
    (7, 0.000, 0.000, 0.176, 0.033), (7, 0.003, 0.005, 0.200, 0.031),
])  # fmt: skip
"""They cover the links as they are touched, hand and fingers with link 7: link, x, y, z in its frame, radius,
(32, 5) [m]."""
LINKS = BALLS[:, 0].astype(int)
MOVING = int(np.searchsorted(LINKS, 2))
"""From this ball on, balls can come to things beside the base."""
PAIRS = np.array(
    [
        (i, j)
        for i, link in enumerate(LINKS)
        for j, before in enumerate(LINKS)
        if (link == 5 and before <= 1) or (link > 5 and before <= 3)
    ]
)
"""Balls of links that could touch each other, (pairs, 2)."""
_RADII = BALLS[:, 4:].astype(np.float32)
_REACHES = _RADII[PAIRS].sum(axis=1)  # (pairs, 1)


def _frames(joints: np.ndarray) -> np.ndarray:
    """Of the base and the 7 links, for joint angles (n, 7) [rad]: the axes x, y and z of each and where it is [m],
    (8, 4, 3, n). The configurations come last, as numpy is fast then."""
    frame = np.zeros((4, 3, len(joints)))
    frame[0, 0] = frame[1, 1] = frame[2, 2] = 1
    found = [frame]
    for (*xyz, roll), angle in zip(ORIGINS, joints.T, strict=True):
        x, y, z, at = found[-1]
        at = at + xyz[0] * x + xyz[1] * y + xyz[2] * z
        y, z = np.cos(roll) * y + np.sin(roll) * z, np.cos(roll) * z - np.sin(roll) * y
        c, s = np.cos(angle), np.sin(angle)
        found.append(np.stack([c * x + s * y, c * y - s * x, z, at]))
    return np.stack(found)


def _flat(joints: np.ndarray) -> np.ndarray:
    return np.asarray(joints, np.float64).reshape(-1, 7)


def link_positions(joints: np.ndarray) -> np.ndarray:
    """Where the 7 links' frames are for joint angles (..., 7) [rad], (..., 7, 3) [m]."""
    return np.moveaxis(_frames(_flat(joints))[1:, 3], -1, 0).reshape(*np.shape(joints)[:-1], 7, 3)


def tool_positions(joints: np.ndarray, behind: float = 0.0) -> np.ndarray:
    """Where the tool is for joint angles (..., 7) [rad], (..., 3) [m]; or the point so far behind it in the hand."""
    _, _, z, at = _frames(_flat(joints))[-1]
    return (at + (TOOL - behind) * z).T.reshape(*np.shape(joints)[:-1], 3)


def _ball_centers(joints: np.ndarray) -> np.ndarray:
    """Where the balls are for joint angles (n, 7) [rad], (32, 3, n) [m]."""
    frames = _frames(joints).astype(np.float32)
    weights = np.concatenate([BALLS[:, 1:4], np.ones((len(BALLS), 1))], axis=1).astype(np.float32)
    count = len(joints)
    parts = [weights[link == LINKS] @ frames[link].reshape(4, 3 * count) for link in range(8)]
    return np.concatenate(parts).reshape(len(BALLS), 3, count)


def least_gaps(joints: np.ndarray, boxes: np.ndarray, spheres: np.ndarray) -> np.ndarray:
    """Arms (n, 7) [rad] are at least so far from a table at height 0, from boxes (m, 6: middle and half the size),
    from spheres (k, 4: middle and radius; a radius of 0 for none), and each from itself, (n,) [m]. Below zero they may
    touch."""
    centers = _ball_centers(_flat(joints))
    moving, radii = centers[MOVING:], _RADII[MOVING:]
    gaps = [(moving[:, 2] - radii).min(axis=0)]
    for box in boxes.astype(np.float32):
        beyond = np.abs(moving - box[:3, None]) - box[3:, None]
        outside = _length(np.maximum(beyond, 0)) + np.minimum(beyond.max(axis=1), 0)
        gaps.append((outside - radii).min(axis=0))
    for sphere in spheres[spheres[:, 3] > 0].astype(np.float32):
        gaps.append((_length(moving - sphere[:3, None]) - radii).min(axis=0) - sphere[3])
    apart = centers[PAIRS[:, 0]] - centers[PAIRS[:, 1]]
    gaps.append((_length(apart) - _REACHES).min(axis=0))
    return np.min(gaps, axis=0)


def _length(vectors: np.ndarray) -> np.ndarray:
    """Of vectors (k, 3, n), (k, n)."""
    x, y, z = vectors[:, 0], vectors[:, 1], vectors[:, 2]
    return np.sqrt(x * x + y * y + z * z)
