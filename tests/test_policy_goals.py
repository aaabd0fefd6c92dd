"""Goals: encoded once, droppable, and taken in hindsight."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion_policy.commands.training_plan import parse_hindsight
from diffusion_policy.config import ConfigError, PolicyConfig, SampleConfig, with_options
from diffusion_policy.control.planner import planning_rng
from diffusion_policy.datasets.windows import Hindsight, Shard, Windows
from diffusion_policy.policy import DiffusionPolicy

RNG = np.random.default_rng(0)
DATA = {
    "state": np.arange(120, dtype=np.float32).reshape(40, 3),
    "agent": RNG.normal(size=(40, 2)).astype(np.float32),
    "goal": np.full((40, 2), -5, np.float32),
    "action": RNG.uniform(5, 9, (40, 2)).astype(np.float32),
}
ENDS = np.array([15, 40])
CONFIG = with_options(PolicyConfig(goal=("goal",)), widths=(16, 32), level_dim=32, noise_levels=20)


def new_policy(**options) -> DiffusionPolicy:
    torch.manual_seed(0)
    data = {**DATA, "goal": RNG.normal(size=(40, 2)).astype(np.float32)}
    return DiffusionPolicy.for_data(replace(CONFIG, **options), data, ("left", "right")).eval()


def observe(rows: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"state": 3, "agent": 2, "goal": 2}
    return {key: torch.randn(rows, 2, size, generator=generator) for key, size in shapes.items()}


def test_a_goal_is_encoded_from_its_last_step_behind_what_is_observed() -> None:
    policy = new_policy()
    assert policy.keys == ("agent", "state", "goal")
    observations = observe()
    cond = policy.encode(observations)
    assert cond.shape == (2, policy.cond_dim) == (2, 2 * (3 + 2) + 2)
    torch.testing.assert_close(cond[:, -2:], policy.normalizer.normalize("goal", observations["goal"][:, -1]))
    earlier = observations["goal"].clone()
    earlier[:, 0] += 1
    assert torch.equal(policy.encode({**observations, "goal": earlier}), cond)


@pytest.mark.parametrize("condition_on_mode", [False, True], ids=["goal", "goal and mode"])
def test_what_is_dropped_are_the_goals_and_the_mode(condition_on_mode: bool) -> None:
    policy = new_policy(condition_dropout=0.2, condition_on_mode=condition_on_mode)
    cond = policy.encode(observe(), torch.tensor([0, 1]))
    dropped = policy.unconditional(cond)
    assert torch.equal(dropped[:, :10], cond[:, :10])
    assert not dropped[:, 10:].any()
    assert cond[:, 12:].tolist() == ([[1, 0], [0, 1]] if condition_on_mode else [[1], [1]])


def test_guidance_leads_towards_the_goal() -> None:
    policy, observations = new_policy(condition_dropout=0.2), observe(1)
    mode = SampleConfig(sampling_steps=4, guidance=2.0)
    plain, guided = (policy.sample(observations, [planning_rng(0)], 1, one) for one in (SampleConfig("ddim", 4), mode))
    assert not torch.allclose(plain, guided)


@pytest.mark.parametrize("goal", [("nowhere",), ("agent", "state", "goal")])
def test_a_goal_is_one_of_several_observations(goal: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="a goal is one of several observations, state, agent, goal; got"):
        new_policy(goal=goal)


# Hindsight


def windows(share: float = 1.0, columns: tuple[int, ...] = (0, 2)) -> Windows:
    return Windows(DATA, ENDS, [0, 1], 2, 8, hindsight=Hindsight({"goal": ("state", columns)}, share))


def test_a_goal_in_hindsight_is_a_later_state_of_the_same_episode() -> None:
    cut = windows()
    seen: dict[int, set[int]] = {row: set() for row in range(40)}
    for _, batch in zip(range(400), cut.batches(40, 0), strict=False):
        assert batch.rows is not None
        goals = batch.observations["goal"].numpy()
        assert (goals[:, 0] == goals[:, 1]).all()
        for row, goal in zip(batch.rows, goals[:, 1], strict=True):
            seen[int(row)].add(int(goal[0] // 3) if goal[0] >= 0 else -1)
            assert goal[0] < 0 or goal[1] == goal[0] + 2
    assert seen[14] == seen[39] == {-1}  # no step is left
    assert seen[0] == set(range(1, 15))
    assert seen[20] == set(range(21, 40))


def test_some_windows_keep_their_goal() -> None:
    batch = next(windows(share=0.3).batches(40, 3))
    replaced = (batch.observations["goal"][:, 1, 0] >= 0).float().mean()
    assert 0.1 < replaced < 0.5
    assert (DATA["goal"] == -5).all()
    assert (windows().gather([3]).observations["goal"] == -5).all()  # as held-out windows are


def test_goals_in_hindsight_are_those_of_the_step_whatever_the_shard() -> None:
    cut = windows(0.5)
    later = [batch for _, batch in zip(range(5), cut.batches(10, 1), strict=False)][4]
    parts = [next(cut.batches(10, 1, 4, Shard(rank, 2))) for rank in range(2)]
    goals = torch.cat([part.observations["goal"] for part in parts])
    assert torch.equal(goals, later.observations["goal"])


@pytest.mark.parametrize(
    "sources, message",
    [
        ({"goal": ("nowhere", ())}, "hindsight takes goals from observations, state, agent, goal; got 'nowhere'"),
        ({"goal": ("action", ())}, "hindsight takes goals from observations, .*; got 'action'"),
        ({"goal": ("state", ())}, r"the goal goal has the shape \(2,\), its source \(3,\)"),
        ({"goal": ("state", (0, 3))}, r"state has the shape \(3,\) a step; got the columns \[0, 3\]"),
    ],
)
def test_hindsight_that_cannot_be_is_refused(sources: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Windows(DATA, ENDS, [0], 2, 8, hindsight=Hindsight(sources, 1.0))


def test_hindsight_is_written_as_goal_and_source() -> None:
    keys = ("state", "agent", "goal")
    assert parse_hindsight((), 0.5, keys) is None
    assert parse_hindsight(("goal=agent",), 0.5, keys) == Hindsight({"goal": ("agent", ())}, 0.5)
    assert parse_hindsight(("goal=state:0,2",), 1.0, keys) == Hindsight({"goal": ("state", (0, 2))}, 1.0)
    for text, why in (
        ("goal", "a goal and where it comes from is told as goal=state or goal=state:2,3,4; got 'goal'"),
        ("goal=x", "--hindsight must name a goal and where it comes from, of the keys state"),
        ("x=state", "--hindsight must name a goal and where it comes from, of the keys state"),
        ("goal=state:a", "columns are told as key:0,1; got 'state:a'"),
    ):
        with pytest.raises(ConfigError, match=why):
            parse_hindsight((text,), 0.5, keys)
