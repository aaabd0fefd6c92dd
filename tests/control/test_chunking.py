"""How a new plan is joined to the one that runs: each strategy against what it says it does."""

import numpy as np
import pytest
import torch

from diffusion_policy.config import ChunkingConfig, ConfigError, PolicyConfig, SampleConfig, with_options
from diffusion_policy.control.chunking import (
    Candidates,
    Chunking,
    Coherence,
    Ensemble,
    Guided,
    Handover,
    Inpainted,
    follow_new,
    make_chunking,
    scored,
    split_options,
)
from diffusion_policy.control.controller import Controller
from diffusion_policy.control.planner import Steering
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.policy import DiffusionPolicy

RNG = np.random.default_rng(0)
NAN = np.nan


class Planner:
    """Its plans are its noise, (steps, A) each."""

    observation_horizon, steps, action_horizon = 1, 8, 3
    action_shape, noise_shape = (1,), (8, 1)
    guides, longest_prefix = True, 4

    def __init__(self) -> None:
        self.observation_shapes = {"x": (1,)}
        self.seen: list[tuple[dict, Steering | None]] = []

    def sample(self, observations, noise, steering=None):
        self.seen.append(({key: rows.copy() for key, rows in observations.items()}, steering))
        return noise.astype(np.float64)


def hand(known: list[int], delay: int, steps: int = 8, action_horizon: int = 3) -> Handover:
    """With a row for each number of known steps."""
    executing = np.full((len(known), steps, 1), NAN)
    for row, count in enumerate(known):
        executing[row, :count] = 10.0 * (row + 1) + np.arange(count)[:, None]
    return Handover(executing, delay, action_horizon, np.array([min(count, 1) for count in known]))


def test_the_receding_horizon_follows_the_old_plan_until_the_new_one_is_ready() -> None:
    joined = follow_new(hand([5, 0], delay=2), np.zeros((2, 8, 1)))
    assert joined[..., 0].tolist() == [[10, 11, 0, 0, 0, 0, 0, 0], [0] * 8]  # the first plan is waited for


@pytest.mark.parametrize(
    "mask, fallen",
    [
        ("linear", [3 / 4, 2 / 4, 1 / 4]),
        ("exp", [c * np.expm1(c) / np.expm1(1) for c in (3 / 4, 2 / 4, 1 / 4)]),
        ("ones", [1, 1, 1]),
        ("zeros", [0, 0, 0]),
    ],
)
def test_guidance_is_full_until_the_delay_and_falls_over_the_overlap(mask, fallen) -> None:
    steering = Guided(3.0, mask)(hand([5, 0], delay=2))
    assert steering.strength == 3
    np.testing.assert_allclose(steering.weights, [[1, 1, *fallen, 0, 0, 0], [0] * 8])


def test_what_is_given_is_what_is_committed() -> None:
    steering = Inpainted()(hand([5, 0], delay=2))
    assert steering.strength is None
    assert steering.weights.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [0] * 8]


def test_of_several_plans_the_closest_to_what_runs_is_followed_and_nothing_is_averaged() -> None:
    plans = RNG.normal(10, 3, (2, 6, 8, 1))
    plans[0, 4] = 10 + np.arange(8)[:, None] + 0.01
    joined = Chunking(score=Coherence(), samples=6).plan(Planner(), {"x": np.zeros((2, 1, 1))}, plans, hand([5, 0], 2))
    np.testing.assert_array_equal(joined.plans, [plans[0, 4], plans[1, 0]])  # without a plan before: the first
    assert joined.executed[0, :3, 0].tolist() == [10, 11, plans[0, 4, 2, 0]]


def test_early_steps_weigh_most_in_the_distance() -> None:
    early, late = np.zeros((2, 8, 1))
    early[0], late[4] = 1, 1
    handover = Handover(np.zeros((1, 8, 1)), 0, 3, np.ones(1, int))
    candidates = Candidates({}, np.zeros((1, 2, 1)), np.stack([early, late])[None], handover)
    weights = 0.5 ** np.arange(8)
    np.testing.assert_allclose(Coherence(0.5)(candidates)[0], -weights[[0, 4]] / weights.sum())
    np.testing.assert_allclose(Coherence(1.0)(candidates)[0], [-1 / 8, -1 / 8])


def test_a_weak_planner_drives_the_choice_away_from_its_plans() -> None:
    class Weak(Planner):
        def sample(self, observations, noise, steering=None):
            return np.full((1, 3, 8, 1), 1.0)

    plans = np.array([1.0, -1.0, 0.0])[None, :, None, None] * np.ones((1, 3, 8, 1))
    score = Coherence(weak=Weak())
    scores = score(Candidates({}, plans, plans, Handover(np.zeros((1, 8, 1)), 0, 3, np.ones(1, int))))[0]
    # backward 1, 1, 0; distance to the kept third of the strong (0): 1, 1, 0; to the weak (1): 0, 2, 1
    np.testing.assert_allclose(scores, [-2, 0, 1])
    other = Weak()
    other.noise_shape = (9, 1)
    with pytest.raises(ConfigError, match=r"--weak-checkpoint must have the policy's noise_shape \(8, 1\); it has"):
        Chunking(score=Coherence(weak=other)).require(Planner(), 0)


@pytest.mark.parametrize("decay", [0.0, 0.3, -0.2])
@pytest.mark.parametrize("action_horizon", [1, 3])
def test_an_ensemble_is_the_weighted_mean_of_all_plans_for_a_step(decay: float, action_horizon: int) -> None:
    planner, made = Planner(), []
    sample = planner.sample
    planner.sample = lambda *args: made.append(sample(*args)) or made[-1]  # type: ignore[method-assign]
    controller = Controller(
        planner, 1, action_horizon=action_horizon, chunking=Chunking(merge=Ensemble(decay)), plan_batch=1
    )
    controller.reset(np.ones(1, bool), [(0, 0)])
    executed = [controller.act({"x": np.zeros((1, 1))})[0, 0] for _ in range(12)]
    for step, action in enumerate(executed):
        plans = [
            (made[i][0, 0, step - i * action_horizon, 0])
            for i in range(len(made))
            if 0 <= step - i * action_horizon < 8
        ]
        weights = np.exp(-decay * np.arange(len(plans)))
        np.testing.assert_allclose(action, np.average(plans, weights=weights), rtol=1e-9)


def test_a_rolled_observation_is_planned_from_when_the_plan_is_ready() -> None:
    planner = Planner()
    chunking = Chunking(roll=lambda observations, actions: {"x": observations["x"] + actions.sum(axis=1)[:, None]})
    noise = RNG.normal(size=(2, 1, 8, 1)).astype(np.float32)
    joined = chunking.plan(planner, {"x": np.array([[[5.0]], [[7.0]]])}, noise, hand([5, 0], delay=2))
    seen = planner.seen[0][0]["x"][:, 0, 0]
    assert seen.tolist() == [5 + 10 + 11, 7]  # the first plan of an episode is waited for
    np.testing.assert_array_equal(joined.executed[0, :, 0], [10, 11, *noise[0, 0, :6, 0]])
    np.testing.assert_array_equal(joined.executed[1], noise[1, 0])
    np.testing.assert_array_equal(joined.plans, joined.executed)


def test_a_rolled_observation_leaves_no_delay_to_guide_over() -> None:
    planner = Planner()
    chunking = Chunking(Guided(mask="linear"), roll=lambda observations, actions: dict(observations))
    chunking.plan(planner, {"x": np.zeros((1, 1, 1))}, np.zeros((1, 1, 8, 1), np.float32), hand([5], delay=2))
    steering = planner.seen[0][1]
    assert steering is not None
    np.testing.assert_allclose(steering.weights[0], [3 / 4, 2 / 4, 1 / 4, 0, 0, 0, 0, 0])
    assert steering.actions[0, :3, 0].tolist() == [12, 13, 14]


def test_a_score_that_is_none_is_refused() -> None:
    for wrong in (np.zeros((1, 2)), np.full((1, 3), NAN), np.array([["a", "b", "c"]])):
        score = scored(lambda observations, plans, wrong=wrong: wrong)
        with pytest.raises(ValueError, match=r"a score must give finite numbers \(1, 3\); got"):
            score(Candidates({}, np.zeros(0), np.zeros((1, 3, 8, 1)), hand([0], 0)))


def test_a_plan_of_nan_is_stopped() -> None:
    with pytest.raises(FloatingPointError, match="the policy planned NaN or infinity"):
        Chunking().plan(Planner(), {}, np.full((1, 1, 8, 1), NAN), hand([0], 0))


def test_a_planner_that_cannot_follow_is_refused() -> None:
    planner = Planner()
    Chunking(Inpainted()).require(planner, 4)
    with pytest.raises(ConfigError, match=r"delays up to --max-delay 4; got 5: fewer --delay-steps, or train it"):
        Chunking(Inpainted()).require(planner, 5)
    Chunking(Inpainted(), roll=lambda observations, actions: dict(observations)).require(planner, 5)
    planner.longest_prefix, planner.guides = 0, False
    with pytest.raises(ConfigError, match="needs a policy that was trained with --max-delay; this one"):
        Controller(planner, 1, chunking=Chunking(Inpainted()))
    with pytest.raises(ConfigError, match="needs the network's gradient, which this backend has not"):
        Controller(planner, 1, chunking=Chunking(Guided()))


def test_options_name_strategies() -> None:
    def name(**options) -> Chunking:
        return make_chunking(with_options(ChunkingConfig(), **options))

    assert name() == Chunking()
    assert name(chunking="rtc", rtc_strength=2.0, rtc_mask="ones") == Chunking(Guided(2.0, "ones"))
    assert name(chunking="trained-rtc") == Chunking(Inpainted())
    assert name(chunking="ensemble", ensemble_decay=0.5) == Chunking(merge=Ensemble(0.5))
    assert name(chunking="bid", bid_decay=0.9) == Chunking(score=Coherence(0.9), samples=15)
    assert name(chunking="bid", plans=4).samples == 4
    with pytest.raises(ConfigError, match="--roll-forward needs an environment with a method roll_forward"):
        name(roll_forward=True)
    assert split_options("bid", {"plans": 3, "eta": 1.0}) == (ChunkingConfig("bid", plans=3), {"eta": 1.0})
    made = Chunking(samples=2)
    assert split_options(made, {"eta": 1.0}) == (made, {"eta": 1.0})
    with pytest.raises(ConfigError, match="plans: these are options of a chunking by name; got one that is made"):
        split_options(made, {"plans": 3})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chunking": "best"}, "unknown chunking 'best'"),
        ({"rtc_mask": "soft"}, "unknown rtc-mask 'soft'"),
        ({"rtc_strength": -1.0}, "rtc-strength must be at least 0; got -1"),
        ({"bid_decay": 0.0}, "bid-decay must be above 0 and at most 1; got 0"),
        ({"ensemble_decay": 11.0}, "ensemble-decay must be from -10 to 10; got 11"),
        ({"plans": 0}, "plans must be from 1 to 1024; got 0"),
        ({"plans": 2}, "one of 2 plans is chosen by a --score, or with --chunking bid; got neither"),
        ({"chunking": "bid", "score": "a:b"}, "bid chooses by its own score"),
        ({"weak_checkpoint": "runs/weak"}, "--weak-checkpoint is for --chunking bid"),
        ({"rtc_strength": float("nan")}, "rtc-strength must be at least 0; got nan"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_chunking(ChunkingConfig(**options))


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicy:
    torch.manual_seed(0)
    config = with_options(PolicyConfig(), widths=(8, 16), level_dim=16, observation_horizon=3, max_delay=5)
    data = {"state": RNG.normal(2, 3, (60, 4)), "action": RNG.uniform(5, 9, (60, 2))}
    return DiffusionPolicy.for_data(config, data).eval()


def plan(policy: DiffusionPolicy, steering: Steering | None, samples: int = 1) -> np.ndarray:
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((2, samples, 1, 16, 2)).astype(np.float32)
    return PolicyPlanner(policy, SampleConfig("ddim", 4)).sample(
        {"state": rng.normal(2, 3, (2, 3, 4))}, noise, steering
    )


def test_given_steps_are_in_the_plan_and_change_the_rest(policy: DiffusionPolicy) -> None:
    actions = np.full((2, 14, 2), NAN)
    actions[0, :3] = RNG.uniform(5, 9, (3, 2))
    given = plan(policy, Inpainted()(Handover(actions, 3, 8, np.ones(2, int))), samples=2)
    free = plan(policy, None, samples=2)
    np.testing.assert_allclose(given[0, :, :3], np.stack([actions[0, :3]] * 2), atol=1e-5)
    assert np.abs(given[0, :, 3:] - free[0, :, 3:]).max() > 1e-3
    np.testing.assert_allclose(given[1], free[1], atol=1e-6)  # nothing is given there


def test_guidance_of_weight_0_changes_nothing_to_the_bit(policy: DiffusionPolicy) -> None:
    actions = RNG.uniform(5, 9, (2, 14, 2))
    for steering in (Steering(actions, np.zeros((2, 14)), 5.0), Steering(actions * NAN, np.ones((2, 14)), 5.0)):
        np.testing.assert_array_equal(plan(policy, steering), plan(policy, None))
    near = plan(policy, Steering(actions, np.ones((2, 14)), 5.0))
    assert np.abs(near[:, 0] - actions).mean() < np.abs(plan(policy, None)[:, 0] - actions).mean() / 2
