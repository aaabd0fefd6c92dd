"""Push-T against gym-pusht itself and against the published human demonstrations."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs.protocols import Push
from diffusion_policy.envs.push_t import HAND_SPEED, PICTURE_SIZE, PushTEnv, published_start
from diffusion_policy.envs.push_t_block import CORNERS, keypoints, place

pytest.importorskip("gym_pusht", reason="gym-pusht is not installed (the extra `pusht`)")
import shapely

DEMONSTRATIONS = Path(__file__).parents[3] / "shared" / "data" / "pusht_cchi_v7_replay.zarr"
needs_demonstrations = pytest.mark.skipif(
    not DEMONSTRATIONS.exists(), reason=f"the published Push-T demonstrations are not at {DEMONSTRATIONS}"
)
AT_HOME = (400.0, 100.0, 256.0, 256.0, np.pi / 4)
"""A state with the block on its outline and the agent far away."""


@pytest.fixture
def env() -> PushTEnv:
    return PushTEnv()


def reference() -> Any:
    """gym-pusht's own environment."""
    from gym_pusht.envs import PushTEnv as Reference

    return Reference(obs_type="state")


def play(env: PushTEnv, seed: int, steps: int = 40) -> np.ndarray:
    """The states of an episode of targets near the block, so that it is pushed, (steps + 1, 5)."""
    observation, _ = env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    states = [observation["state"]]
    for _ in range(steps):
        observation, *_ = env.step(states[-1][2:4] + rng.uniform(-100, 100, 2))
        states.append(observation["state"])
    return np.array(states)


# Against gym-pusht


@pytest.mark.parametrize("seed", [0, 100_000, 100_001, 2**32 - 1])
def test_resets_and_steps_are_those_of_the_published_protocol(env: PushTEnv, seed: int) -> None:
    random = np.random.RandomState(seed)
    agent_and_block = [
        random.randint(50, 450),
        random.randint(50, 450),
        random.randint(100, 400),
        random.randint(100, 400),
    ]
    drawn = [*agent_and_block, random.randn() * 2 * np.pi - np.pi]
    peer = reference()
    expected, _ = peer.reset(options={"reset_to_state": drawn})
    observation, info = env.reset(seed=seed)
    np.testing.assert_array_equal(observation["state"], expected.astype(np.float32))
    rewards = []
    for target in np.random.default_rng(seed).uniform(100, 400, (30, 2)):
        expected, expected_reward, expected_end, _, expected_info = peer.step(target)
        observation, reward, terminated, truncated, info = env.step(target)
        np.testing.assert_array_equal(observation["state"], expected.astype(np.float32))
        assert (reward, terminated, truncated) == (expected_reward, expected_end, False)
        rewards.append(expected_reward)
        assert info["measures"] == {"score": max(rewards), "final_coverage": expected_info["coverage"]}


def test_the_published_start_of_a_seed_is_known() -> None:
    # What gym-pusht 0.1.5, the last with these draws, reads back after its own reset(seed=100000).
    observation, _ = PushTEnv().reset(seed=100_000)
    np.testing.assert_allclose(observation["state"], (235, 124, 299.612885, 145.201581, 5.378258), rtol=1e-6)
    np.testing.assert_allclose(published_start(100_000), (235, 124, 335, 128, -0.9049274), rtol=1e-6)


def test_without_a_seed_the_next_start_is_drawn_from_the_last_seed(env: PushTEnv) -> None:
    starts = []
    for _ in range(2):
        env.reset(seed=5)
        starts.append([env.reset()[0]["state"] for _ in range(3)])
    np.testing.assert_array_equal(*starts)
    assert len(np.unique(starts[0], axis=0)) == 3


# Against the demonstrations


def replay(env: PushTEnv, states: np.ndarray, actions: np.ndarray) -> float:
    """The largest distance [px] between the block and the recorded one, with the actions played blindly."""
    observation, _ = env.reset(options={"state": states[0]})
    distances = [np.linalg.norm(observation["state"][2:4] - states[0, 2:4])]
    for state, action in zip(states[1:], actions, strict=False):
        observation, *_ = env.step(action)
        distances.append(np.linalg.norm(observation["state"][2:4] - state[2:4]))
    return float(max(distances))


def replays(env: PushTEnv, count: int) -> np.ndarray:
    """`replay` of so many demonstrations, spread over all."""
    store = EpisodeStore.open(DEMONSTRATIONS)
    states, actions = store.read("state"), store.read("action")
    ends = store.episode_ends
    starts = np.concatenate([[0], ends[:-1]])
    chosen = np.linspace(0, len(ends) - 1, count).round().astype(int)
    return np.array([replay(env, states[a:b], actions[a:b]) for a, b in zip(starts[chosen], ends[chosen], strict=True)])


@needs_demonstrations
def test_human_demonstrations_played_blindly_end_as_recorded(env: PushTEnv) -> None:
    assert replays(env, count=30).max() < 0.01


@needs_demonstrations
@pytest.mark.slow
def test_all_206_demonstrations_played_blindly_end_as_recorded(env: PushTEnv) -> None:
    distances = replays(env, count=206)
    assert np.mean(distances < 0.01) > 0.99
    assert distances.max() < 1


@needs_demonstrations
def test_keypoints_are_those_of_the_published_data() -> None:
    store = EpisodeStore.open(DEMONSTRATIONS)
    states, recorded = store.read("state").astype(np.float64), store.read("keypoint")
    error = np.abs(keypoints(states) - recorded).max(axis=(1, 2))
    assert np.median(error) < 1e-4
    assert np.quantile(error, 0.99) < 0.05


@needs_demonstrations
def test_observations_have_the_shapes_and_types_of_the_published_data(env: PushTEnv) -> None:
    store = EpisodeStore.open(DEMONSTRATIONS)
    observation, _ = env.reset(seed=0)
    for key, value in observation.items():
        assert (value.shape, value.dtype) == (store.read(key).shape[1:], store.read(key).dtype)


# Resets, success, scores


def test_an_episode_begins_exactly_in_the_state_asked_for(env: PushTEnv) -> None:
    state = np.array([50.5, 60.25, 200.0, 300.0, 1.0], np.float32)
    observation, _ = env.reset(options={"state": state})
    np.testing.assert_allclose(observation["state"], state, rtol=1e-6)
    observation, _ = env.reset(options={"state": (*state[:4], -1.0)})
    assert observation["state"][4] == pytest.approx(2 * np.pi - 1)


@pytest.mark.parametrize(
    "state", [(1.0, 2.0), (1, 2, 3, 4, np.nan), (1, 2, 3, 4, np.inf), (-1, 2, 3, 4, 5), (1, 2, 3, 513, 5), "home", None]
)
def test_other_states_are_refused(env: PushTEnv, state: object) -> None:
    with pytest.raises(ValueError, match=r"a state is agent x, y and block x, y between 0 and 512 \[px\].*; got"):
        env.reset(options={"state": state})


def test_the_block_on_its_outline_is_success(env: PushTEnv) -> None:
    _, info = env.reset(options={"state": AT_HOME})
    assert info["is_success"] is True
    assert info["measures"] == pytest.approx({"score": 1, "final_coverage": 1})
    _, reward, terminated, truncated, info = env.step(np.array([400.0, 100.0]))
    assert (reward, terminated, truncated, info["is_success"]) == (1, True, False, True)


def test_half_a_bar_off_is_no_success(env: PushTEnv) -> None:
    # Half of the bar (120 px) is then beyond the outline, and the whole stem (90 px, as wide).
    along = 60 * np.array([np.cos(np.pi / 4), np.sin(np.pi / 4)])
    _, info = env.reset(options={"state": (400, 100, *(np.array(AT_HOME[2:4]) + along), np.pi / 4)})
    assert info["is_success"] is False
    assert info["measures"]["final_coverage"] == pytest.approx(60 / 210, abs=1e-6)
    assert info["measures"]["score"] == pytest.approx(60 / 210 / 0.95, abs=1e-6)


def test_the_score_is_the_best_of_the_episode_and_coverage_the_present(env: PushTEnv) -> None:
    near = (330.0, 256.0, 262.0, 256.0, np.pi / 4)
    env.reset(options={"state": near})
    scores, coverages = [], []
    for target in np.linspace((330, 256), (200, 256), 25):
        *_, info = env.step(target)
        scores.append(info["measures"]["score"])
        coverages.append(info["measures"]["final_coverage"])
    np.testing.assert_allclose(scores, np.maximum.accumulate(np.clip(np.array(coverages) / 0.95, 0, 1)))
    assert coverages[-1] < max(coverages) - 0.2
    assert env.reset(seed=0)[1]["measures"]["score"] < scores[-1]  # a new episode begins anew


def test_targets_outside_the_plane_are_moved_to_its_edge_and_meaningless_ones_refused(env: PushTEnv) -> None:
    ends = []
    for target in ([-500.0, 900.0], [0.0, 512.0]):
        env.reset(seed=1)
        ends.append([env.step(np.array(target))[0]["state"] for _ in range(5)])
    np.testing.assert_array_equal(*ends)
    for action in ([np.nan, 0.0], [np.inf, 0.0], [0.0, 0.0, 0.0]):
        with pytest.raises(ValueError, match="an action is two finite numbers"):
            env.step(np.array(action))


def test_observations_stay_within_their_space(env: PushTEnv) -> None:
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    for i in range(400):
        corner = rng.integers(0, 2, 2) * 512.0  # the block is driven into corners
        observation, *_ = env.step(corner if i % 40 < 30 else rng.uniform(0, 512, 2))
        assert env.observation_space.contains(observation)


# The contract


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized space")  # actions are places in the plane
def test_gymnasium_checks_the_environment(env: PushTEnv) -> None:
    check_env(env, skip_render_check=True)


def test_the_same_seed_gives_the_same_episode_whatever_came_before(env: PushTEnv) -> None:
    first = play(env, seed=3)
    play(env, seed=4)
    np.testing.assert_array_equal(play(env, seed=3), first)


def test_a_restored_episode_goes_on_identically(env: PushTEnv) -> None:
    targets = np.linspace((100, 250), (400, 300), 20)  # right through the block
    env.reset(options={"state": (100, 250, 220, 230, 0.5)})
    for target in targets[:10]:
        env.step(target)
    saved = env.save_state()
    expected = [env.step(target) for target in targets[10:]]
    moves = np.diff([observation["state"][2] for observation, *_ in expected])
    assert (moves != 0).all()  # it is being pushed
    another = PushTEnv()
    another.reset(seed=9)
    for other, handle in ((env, saved), (another, pickle.loads(pickle.dumps(saved)))):  # noqa: S301  (our own)
        other.restore_state(handle)
        for target, (observation, *outcome) in zip(targets[10:], expected, strict=True):
            restored, *restored_outcome = other.step(target)
            np.testing.assert_array_equal(restored["state"], observation["state"])
            assert restored_outcome == outcome


# A hand that pushes the block


def push(env: PushTEnv, point: tuple[float, float], goal: tuple[float, float], steps: int) -> np.ndarray:
    """The states while the agent stays and the block is pushed by hand, gripped at a point of its own frame, (steps +
    1, 5)."""
    state = np.asarray(env._observation()["state"], np.float64)
    grip = env.grip(place(np.array([point]), state[2:4], state[4])[0])
    assert grip is not None
    np.testing.assert_allclose(grip.point, point, atol=1e-3)
    states = [state]
    for _ in range(steps):
        env.push(Push(grip, goal))
        states.append(env.step(state[:2])[0]["state"])
    return np.stack(states)


def test_a_hand_leads_the_gripped_point_no_faster_than_it_may(env: PushTEnv) -> None:
    env.reset(options={"state": (480, 480, 200, 200, 0.5)})
    states = push(env, (0.0, 100.0), (300.0, 350.0), 15)
    gripped = np.array([place(np.array([(0.0, 100.0)]), state[2:4], state[4])[0] for state in states])
    assert np.linalg.norm(np.diff(gripped, axis=0), axis=1).max() <= HAND_SPEED * 0.1 + 1
    np.testing.assert_allclose(gripped[-1], (300, 350), atol=2)
    np.testing.assert_array_equal(states[:, :2], np.full((16, 2), 480))
    np.testing.assert_allclose(env.step(states[0, :2])[0]["state"], states[-1], atol=0.1)  # let go, it stays
    assert env.grip(np.array([20.0, 20.0])) is None


def test_a_pushed_block_stops_at_the_agent_and_the_walls(env: PushTEnv) -> None:
    env.reset(options={"state": (350, 220, 200, 200, 0.0)})
    push(env, (50.0, 15.0), (500.0, 215.0), 25)
    shapes, agent = env._simulation.block.shapes, env._simulation.agent.position
    assert min(shape.point_query(agent).distance for shape in shapes) > 14  # the agent's radius is 15
    env.reset(options={"state": (480, 480, 200, 200, 0.0)})
    state = push(env, (0.0, 15.0), (0.0, 215.0), 25)[-1].astype(np.float64)
    assert place(CORNERS, state[2:4], state[4]).min() > 3  # the wall stands at 5


def test_a_restored_episode_was_pushed_too(env: PushTEnv) -> None:
    env.reset(seed=3)
    push(env, (0.0, 100.0), (256.0, 256.0), 8)
    saved = env.save_state()
    expected = env.step(np.array([250.0, 250.0]))[0]["state"]
    other = PushTEnv()
    other.reset(seed=9)
    other.restore_state(pickle.loads(pickle.dumps(saved)))  # noqa: S301  (our own)
    np.testing.assert_array_equal(other.step(np.array([250.0, 250.0]))[0]["state"], expected)


def test_a_plan_is_the_way_from_the_agent_through_the_targets(env: PushTEnv) -> None:
    observation = {"state": np.array([100.0, 200.0, 0, 0, 0])}
    path = env.planned_path(observation, np.full((3, 4, 2), 50.0))
    assert path.shape == (3, 5, 2)
    np.testing.assert_array_equal(path[1], [[100, 200], *[[50, 50]] * 4])
    np.testing.assert_array_equal(env.path({"state": np.arange(10.0).reshape(2, 5)}), [[0, 1], [5, 6]])
    assert env.modes == ()
    assert env.mode({"state": np.zeros((4, 5))}) is None


def test_pictures_show_the_agent_where_pixels_says() -> None:
    env = PushTEnv(render_mode="rgb_array")
    observation, _ = env.reset(options={"state": (100, 400, 350, 100, 0)})
    picture = env.render()
    assert picture is not None
    assert (picture.shape, picture.dtype) == ((PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
    red, green, blue = np.moveaxis(picture.astype(int), -1, 0)
    rows, columns = np.nonzero((blue > 200) & (red < 120) & (green < 160))
    np.testing.assert_allclose((columns.mean(), rows.mean()), env.pixels(observation["state"][:2]), atol=1.5)
    env.step(np.array([100.0, 300.0]))
    assert ((env.render() == (255, 0, 0)).all(-1)).any()  # the cross at the target
    env.reset(seed=0)
    assert not ((env.render() == (255, 0, 0)).all(-1)).any()  # is not there in a new episode
    env.close()
    env.close()


def test_other_render_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown render_mode 'ansi'; choose from human, rgb_array"):
        PushTEnv(render_mode="ansi")


def test_the_window_is_missed_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.warns(UserWarning, match="no window: DISPLAY is not set"):
        env = PushTEnv(render_mode="human")
    env.reset(seed=0)
    env.step(np.array([256.0, 256.0]))
    assert env.render() is None
    env.close()


def test_the_window_opens_and_closes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # a window that nobody sees
    env = PushTEnv(render_mode="human")
    env.reset(seed=0)
    env.step(np.array([256.0, 256.0]))
    assert env.render() is None
    env.close()
    env.close()


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    with pytest.raises(ValueError, match=r"^Push-T needs gym-pusht: pip install 'diffusion-policy-toolkit\[pusht\]'$"):
        PushTEnv()


def test_a_package_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gym_pusht.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("gym_pusht", "gym_pusht.envs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ValueError, match=r"gym-pusht is installed, but cannot be loaded: libGL.so.1: cannot open"):
        PushTEnv()


def test_the_outline_in_the_plane_is_the_simulators_goal() -> None:
    env = PushTEnv()
    env.reset(seed=0)
    goal = shapely.Polygon(env.scene.places[0][0])
    whole = env._simulation.get_goal_pose_body(env._simulation.goal_pose)
    parts = [
        [whole.local_to_world(corner) for corner in shape.get_vertices()] for shape in env._simulation.block.shapes
    ]
    drawn = shapely.union_all([shapely.Polygon(corners) for corners in parts])
    assert goal.symmetric_difference(drawn).area < 1e-6 * drawn.area
