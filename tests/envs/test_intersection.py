"""Intersection: what is hidden, what is known of it, and how a trajectory is read."""

import time

import gymnasium
import numpy as np
import pytest

from diffusion_policy import envs
from diffusion_policy.envs.intersection import IntersectionExpert
from diffusion_policy.envs.intersection_traffic import (
    EGO_LANE,
    HIDDEN_STEPS,
    LENGTH,
    MODES,
    OTHER_LANES,
    STOP,
    WIDTH,
    classify,
    idm,
    mode_probabilities,
    overlap,
)

INTERSECTION = "diffusion_policy/Intersection-v0"


def drive(env: gymnasium.Env, seed: int, intention: str | None = None) -> tuple[dict[str, np.ndarray], dict]:
    """An episode of the expert, {key: (steps + 1, ...)}, and its last info."""
    observation, info = env.reset(seed=seed, options={"intention": intention} if intention else None)
    expert, rows, ended = IntersectionExpert(None), [observation], False
    while not ended:
        observation, _, terminated, truncated, info = env.step(expert.act(observation))
        rows.append(observation)
        ended = terminated or truncated
    return {key: np.stack([row[key] for row in rows]) for key in observation}, info


@pytest.fixture(scope="module")
def driven() -> dict[str, list[tuple[dict[str, np.ndarray], dict]]]:
    """Five scenes, three times each: the same seed under each intention, with four cars."""
    env = envs.make(INTERSECTION, cars=4)
    return {mode: [drive(env, seed, mode) for seed in range(5)] for mode in MODES}


def test_nothing_shows_the_intention_before_it_acts_and_then_it_does(driven) -> None:
    for episodes in zip(*driven.values(), strict=True):
        first, *others = [path for path, _ in episodes]
        for path in others:
            for key, rows in path.items():
                np.testing.assert_array_equal(rows[: HIDDEN_STEPS + 1], first[key][: HIDDEN_STEPS + 1])
            assert np.abs(path["position"][60] - first["position"][60]).max() > 1


def test_a_trajectory_tells_the_intention_and_nobody_collides(driven) -> None:
    env = envs.make(INTERSECTION, cars=4).unwrapped
    for mode, episodes in driven.items():
        for path, info in episodes:
            assert len(path["position"]) == 81
            assert info == {"is_success": True, "collision": False}
            assert env.mode(path) == env.mode({"position": path["position"][:80]}) == mode
            assert env.mode({"position": path["position"][:30]}) is None


def test_joint_futures_are_read_many_at_once_and_in_spite_of_small_errors(driven) -> None:
    rows = np.stack([[path["position"] for path, _ in episodes] for episodes in driven.values()])
    rows = rows.reshape(*rows.shape[:3], -1, 2)  # (modes, seeds, steps, cars, 2)
    np.testing.assert_array_equal(classify(rows), np.arange(3)[:, None] * np.ones((1, 5), int))
    noise = np.random.default_rng(0).normal(0, 0.1, rows[..., HIDDEN_STEPS:, :, :].shape)
    sampled = np.concatenate([rows[..., :HIDDEN_STEPS, :, :], rows[..., HIDDEN_STEPS:, :, :] + noise], axis=2)
    np.testing.assert_array_equal(classify(sampled), classify(rows))


def test_probabilities_are_those_of_the_scene_and_stay(driven) -> None:
    for path, _ in driven["yields"]:
        told = path["mode_probabilities"]
        assert (told == told[0]).all()
        assert told[0].sum() == pytest.approx(1, abs=1e-6)
        for step, error in ((0, 1e-5), (HIDDEN_STEPS - 1, 0.03)):  # two seconds later it can still be told
            ways = path["scene"][step].reshape(-1, 3)
            (slow, fast), times = (5.0, 6.0) if ways[1, 2] else (7.5, 10.0), ways[:2, 0] / ways[:2, 1]
            eagerness = (ways[1, 1] - (slow + fast) / 2) / (fast - slow) * 2
            np.testing.assert_allclose(mode_probabilities(times[0] - times[1], eagerness), told[0], atol=error)


def test_the_seed_draws_intentions_as_often_as_it_says() -> None:
    env = envs.make(INTERSECTION).unwrapped
    expected, drawn = np.zeros(3), np.zeros(3)
    for seed in range(600):
        expected += env.reset(seed=seed)[0]["mode_probabilities"]
        drawn[MODES.index(env.save_state().traffic.intention)] += 1
    assert np.abs(expected - drawn).max() < 40  # a deviation of about 11 is usual
    spread = [mode_probabilities(time, eager) for time in (-0.5, 0.7) for eager in (-1, 1)]
    assert np.min(spread) < 0.06
    assert 0.85 < np.max(spread) < 0.95


def test_an_ego_car_that_does_not_give_way_collides() -> None:
    env = envs.make(INTERSECTION)
    collided = 0
    for seed in range(6):
        env.reset(seed=seed, options={"intention": "merges"})
        for _ in range(80):
            _, _, terminated, _, info = env.step(np.array([0.3], np.float32))
            if terminated:
                assert info == {"is_success": False, "collision": True}
                collided += 1
                break
    assert collided >= 1


def test_lanes_are_smooth_and_meet_where_they_say() -> None:
    for lane in OTHER_LANES:
        s = np.linspace(-30, 40, 7001)
        places, headings = lane.place(s)
        steps = np.diff(places, axis=0) / 0.01
        np.testing.assert_allclose(np.linalg.norm(steps, axis=1), 1, atol=1e-3)
        middle = (headings[1:] + headings[:-1]) / 2
        np.testing.assert_allclose(steps, np.stack([np.cos(middle), np.sin(middle)], -1), atol=1e-3)
        mine, theirs = lane.conflict
        np.testing.assert_allclose(lane.place(mine)[0], EGO_LANE.place(theirs)[0], atol=1e-9)
        assert np.linalg.norm(lane.place(0.0)[0]) == pytest.approx(np.hypot(STOP, 1.75))


def test_cars_overlap_as_rectangles_do() -> None:
    def touch(x: float, y: float, heading: float) -> bool:
        return overlap(np.array([[0.0, 0.0], [x, y]]), np.array([0.0, heading]))

    assert touch(LENGTH - 0.01, 0, 0)
    assert not touch(LENGTH + 0.01, 0, 0)
    assert not touch(0, WIDTH + 0.01, 0)
    assert touch((LENGTH + WIDTH) / 2 - 0.01, 0, np.pi / 2)
    assert not touch((LENGTH + WIDTH) / 2 + 0.01, 0, np.pi / 2)
    assert not touch(2.7, 2.7, -np.pi / 4)  # discs of the same size would touch


def test_idm_drives_at_its_speed_and_keeps_its_distance() -> None:
    assert idm(10, 10) == pytest.approx(0)
    assert idm(5, 10) > 1
    assert idm(10, 10, gap=5, closing=5) == -8
    assert idm(10, 12, gap=100, closing=-20) > 0  # who gets away does not slow anybody down


@pytest.mark.parametrize("cars", [1, 5, 2.0, True, "3"])
def test_other_numbers_of_cars_are_refused(cars: object) -> None:
    with pytest.raises(ValueError, match="cars must be 2, 3 or 4; got"):
        envs.make(INTERSECTION, cars=cars)


def test_unknown_intentions_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown intention 'waits'; choose from yields, merges, brakes"):
        envs.make(INTERSECTION).reset(options={"intention": "waits"})
    with pytest.raises(ValueError, match="unknown mode 'waits'; Intersection has yields"):
        IntersectionExpert("waits")


def test_a_plan_leads_where_the_car_goes() -> None:
    env = envs.make(INTERSECTION).unwrapped
    observation, _ = env.reset(seed=2)
    actions = np.random.default_rng(0).uniform(-9, 4, (15, 1)).astype(np.float32)
    foreseen = env.planned_path(observation, actions)
    driven = [env.step(action)[0]["position"][:2] for action in actions]
    np.testing.assert_allclose(foreseen[1:], driven, atol=0.02)  # a car that stands has stopped within a step


def test_an_episode_takes_little_time() -> None:
    env = envs.make(INTERSECTION, cars=4)
    began = time.process_time()
    drive(env, 0)
    assert time.process_time() - began < 0.4
