"""The planner of joint paths, in a plane where what is in the way is known."""

import numpy as np
import pytest

from diffusion_policy.envs.joint_planner import connect, dense, line, shortened, smoothed, timed

BOUNDS = np.array([(-1.0, 1.0), (-1.0, 1.0)])
START, GOAL = np.array([-0.8, 0.0]), np.array([0.8, 0.0])


def beside_the_wall(points: np.ndarray) -> np.ndarray:
    """A wall at x = 0 that leaves y > 0.5."""
    return (np.abs(points[:, 0]) > 0.1) | (points[:, 1] > 0.5)


def length(points: np.ndarray) -> float:
    return float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())


@pytest.mark.parametrize("seed", range(4))
def test_a_way_around_a_wall_is_found_and_shortened(seed: int) -> None:
    random = np.random.default_rng(seed)
    chain = connect(START, GOAL, beside_the_wall, BOUNDS, random, 400)
    assert chain is not None
    np.testing.assert_array_equal(chain[[0, -1]], [START, GOAL])
    assert beside_the_wall(dense(chain, 0.01)).all()
    shorter = shortened(chain, beside_the_wall, lambda _: True, random, 150)
    x, y = dense(shorter, 0.01).T
    assert ((np.abs(x) > 0.08) | (y > 0.48)).all()  # edges are looked at every 0.04
    assert length(shorter) <= length(chain)
    assert length(shorter) < 1.3 * 2 * np.hypot(0.75, 0.5)
    again = connect(START, GOAL, beside_the_wall, BOUNDS, np.random.default_rng(seed), 400)
    np.testing.assert_array_equal(again, chain)


def test_a_free_line_is_the_way_and_a_closed_wall_has_none() -> None:
    random = np.random.default_rng(0)
    chain = connect(START, GOAL, lambda points: np.ones(len(points), bool), BOUNDS, random, 1)
    np.testing.assert_array_equal(chain, [START, GOAL])
    assert connect(START, GOAL, lambda points: np.abs(points[:, 0]) > 0.1, BOUNDS, random, 30) is None


def test_a_chain_that_is_not_accepted_is_not_shortened() -> None:
    chain = np.array([START, (0.0, 0.9), GOAL])
    kept = shortened(chain, lambda points: np.ones(len(points), bool), lambda _: False, np.random.default_rng(0), 20)
    np.testing.assert_array_equal(kept, chain)


def test_points_on_chains() -> None:
    assert line(START, GOAL, 0.4).tolist() == pytest.approx(np.array([(-0.8 + 0.4 * i, 0) for i in range(5)]))
    points = dense(np.array([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)]), 0.1)
    np.testing.assert_allclose(np.linalg.norm(np.diff(points, axis=0), axis=1), 0.1, atol=1e-9)
    smooth = smoothed(points, 4)
    np.testing.assert_allclose(smooth[[0, -1]], points[[0, -1]], atol=1e-12)
    assert np.abs(np.diff(smooth, n=2, axis=0)).max() < np.abs(np.diff(points, n=2, axis=0)).max()
    np.testing.assert_allclose(smoothed(line(START, GOAL, 0.1), 5), line(START, GOAL, 0.1), atol=1e-12)


def test_times_keep_speed_and_acceleration() -> None:
    path = timed(dense(np.array([(0.0, 0.0), (4.0, 0.0)]), 0.04), 1.0, 2.0, 0.1)
    assert 45 <= len(path) - 1 <= 46  # 0.5 s to be fast, 3.5 s, 0.5 s to stand
    speed = np.linalg.norm(np.diff(path, axis=0), axis=1) / 0.1
    assert speed.max() == pytest.approx(1.0, abs=1e-6)
    assert np.abs(np.diff(speed)).max() / 0.1 <= 2.0 + 0.1
    np.testing.assert_allclose(path[-1], (4, 0), atol=1e-9)
