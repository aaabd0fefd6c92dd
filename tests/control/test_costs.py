"""Costs: closed forms, gradients against finite differences, and what they do to the samples of a policy."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_policy.commands.costs import find_cost, with_costs
from diffusion_policy.commands.options.evaluate import Evaluate
from diffusion_policy.commands.options.remote import RemoteOptions
from diffusion_policy.commands.options.rollout import Rollout
from diffusion_policy.config import ConfigError, CostConfig, PolicyConfig, SampleConfig, with_options
from diffusion_policy.control import costs
from diffusion_policy.control.costs import (
    PLACE,
    Barriers,
    CostError,
    Costs,
    Weighed,
    clearance,
    length,
    smoothness,
    to_goal,
)
from diffusion_policy.control.planner import planning_rng
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.diffusion.guidance import descending
from diffusion_policy.envs import maze_map
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.serving.backends import make_planner

RNG = np.random.default_rng(0)
ROOM = torch.tensor([0.0, 0.0, 2.0, 2.0])
MAZE = Barriers(
    torch.tensor([(*block.center, *block.half) for block in maze_map.BLOCKS], dtype=torch.float64), ROOM, 0.1, 0.05
)
CONFIG = with_options(
    PolicyConfig(), widths=(8,), level_dim=16, noise_levels=20, prediction_horizon=16, action_horizon=8
)
DATA = {"position": RNG.uniform(-2, 2, (80, 2)), "action": RNG.uniform(-2, 2, (80, 2))}


def sequences(path) -> dict[str, torch.Tensor]:
    return {PLACE: torch.as_tensor(path, dtype=torch.float64)}


def test_costs_of_paths_in_closed_form() -> None:
    line = np.stack([np.linspace(0, 3, 4), np.zeros(4)], axis=1)[None]
    bent = np.array([[[0, 0], [1, 0], [1, 1], [2, 1]]])
    nothing: dict[str, torch.Tensor] = {}
    assert smoothness(sequences(line), nothing).tolist() == [0]
    assert smoothness(sequences(bent), nothing).tolist() == [4]
    assert length(sequences(bent), nothing).tolist() == pytest.approx([3], abs=1e-5)
    goal = {"goal": torch.tensor([[[9.0, 9], [0, 1]]])}
    assert to_goal(sequences(bent), goal).tolist() == [4]


def test_distances_are_those_of_the_map() -> None:
    points = torch.from_numpy(RNG.uniform(-2.2, 2.2, (3, 50, 2)))
    obstacles = torch.tensor([[[1.0, 0.2, 0.15], [-1, 1.5, 0.2], [0, 0, 0]]]).double().repeat(3, 1, 1)[:, None]
    found = costs._distances(MAZE, points, obstacles).amin(dim=-1)
    expected = maze_map.distance(points.numpy(), obstacles[0, 0].numpy())
    inside = maze_map.box_distance(points.numpy(), (0, 0), (2, 2)) < 0
    np.testing.assert_allclose(found.numpy()[inside], expected[inside], atol=1e-5)


def test_clearance_counts_what_lies_within_the_margin_and_between_the_steps() -> None:
    alone = Barriers(torch.zeros(0, 4), torch.tensor([0.0, 0, 10, 10]), 0.1, 0.1)
    obstacles = {"obstacles": torch.tensor([[[[0.0, 0.0, 0.5], [5, 5, 0]]]])}
    far = [[[-5, 3], [0, 3], [5, 3]]]
    through = [[[-4, 0], [4, 0]]]  # its middle place alone is near
    assert clearance(alone, sequences(far), obstacles).tolist() == [0]
    assert clearance(alone, sequences(through), obstacles).tolist() == pytest.approx([0.7], abs=1e-4)
    assert clearance(alone, sequences([[[-9.9, 0], [-9.9, 0]]]), {}).tolist() == pytest.approx([0.5], abs=1e-4)


@pytest.mark.parametrize("name", ["smoothness", "length", "goal", "clearance", "apart"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    with_more = {"clearance": partial(clearance, MAZE), "apart": partial(costs.apart, 2.0)}
    cost = {**costs.COSTS, **with_more}[name]
    seen = {"goal": torch.tensor([[[0.5, 1.0]]]).double(), "obstacles": torch.tensor([[[[0.2, -0.4, 0.2]]]]).double()}
    path = torch.from_numpy(RNG.uniform(-1.8, 1.8, (1, 6, 6 if name == "apart" else 2))).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cost({PLACE: x}, seen), (path,), atol=1e-4)


def test_agents_pay_for_coming_nearer_than_the_margin() -> None:
    places = [[[0, 0, 3, 4, 0, 1], [0, 0, 0, 9, 0, 7]]]  # distances 5, 1, √18 and 9, 7, 2
    assert costs.apart(4.5, sequences(places), {}).tolist() == pytest.approx([3.5 + 4.5 - 18**0.5 + 2.5])
    for columns in (2, 5):
        with pytest.raises(costs.CostError, match=f"x and y of two agents at least; got {columns} columns"):
            costs.apart(1.0, sequences(np.zeros((1, 2, columns)).tolist()), {})


def test_a_gradient_step_moves_no_step_of_a_sequence_farther_than_its_size() -> None:
    x0 = torch.zeros(2, 3, 2)
    slope = torch.zeros(2, 3, 2)
    slope[0, 1] = torch.tensor([30.0, 40])
    slope[1, 2] = torch.tensor([0.3, 0.4])
    led = descending(lambda xt, level: x0, lambda x: slope, torch.tensor([0.1, 0.0]), steps=2)
    torch.testing.assert_close(led(x0, 0)[0, 1], torch.tensor([-0.12, -0.16]))
    torch.testing.assert_close(led(x0, 0)[1, 2], torch.tensor([-0.06, -0.08]))
    assert torch.equal(led(x0, 1), x0)


def make_policy(config: PolicyConfig = CONFIG) -> DiffusionPolicy:
    torch.manual_seed(0)
    return DiffusionPolicy.for_data(config, DATA)


def led_by(cost, policy: DiffusionPolicy, **options) -> np.ndarray:
    """A plan of 8 for one observation, (8, steps, 2)."""
    led = policy.with_leads([Costs((Weighed("it", cost, 1.0),), **options)], {"obstacles": (1, 3)})
    planner = PolicyPlanner(led, SampleConfig(sampling_steps=8))
    assert planner.observation_shapes == {"position": (2,), "obstacles": (1, 3)}
    observed = {"position": np.zeros((1, 2, 2)), "obstacles": np.array([[[[1.0, 1.0, 0.5]]] * 2])}
    noise = policy.draw_noise([planning_rng(0)], 8, SampleConfig(sampling_steps=8))
    return planner.sample(observed, noise)[0]


def test_samples_are_led_down_a_cost_by_what_is_observed_beside_the_policys_keys() -> None:
    policy = make_policy()

    def near_the_obstacle(told, seen):
        return (told["action"] - seen["obstacles"][:, -1:, 0, :2]).square().sum(dim=(1, 2))

    plain = led_by(near_the_obstacle, policy, steps=0)
    led = led_by(near_the_obstacle, policy, steps=10, size=0.2)
    away, toward = (np.linalg.norm(plans - 1, axis=-1).mean() for plans in (plain, led))
    assert toward < 0.6 * away
    late = led_by(near_the_obstacle, policy, steps=10, size=0.2, begins=0.2)
    assert toward < np.linalg.norm(late - 1, axis=-1).mean() < away


@pytest.mark.parametrize(
    "cost, why",
    [
        (lambda told, seen: told["action"].sum(), r"the cost it must give a tensor of shape \(8,\); got \(\)"),
        (lambda told, seen: 3.0, r"must give a tensor of shape \(8,\); got float"),
        (lambda told, seen: told["action"].sum(dim=(1, 2)) * torch.nan, "the cost it gives NaN or infinity"),
        (
            lambda told, seen: told["action"].detach().sum(dim=(1, 2)),
            "the costs it have no gradient by what is planned",
        ),
        (lambda told, seen: (0 * told["action"]).sqrt().sum(dim=(1, 2)), "the gradient of the costs it is NaN"),
    ],
)
def test_a_cost_without_numbers_or_gradient_is_named(cost, why: str) -> None:
    with pytest.raises(CostError, match=why):
        led_by(cost, make_policy())


def test_the_best_plan_is_that_of_the_least_cost() -> None:
    chosen = Costs((Weighed("length", length, 2.0), Weighed("smoothness", smoothness, 0.1)))
    plans = RNG.normal(size=(2, 5, 6, 2))
    scores = chosen.score({"position": np.zeros((2, 2, 2))}, plans)
    expected = [
        [-2 * length(sequences(p[None]), {}) - 0.1 * smoothness(sequences(p[None]), {}) for p in row] for row in plans
    ]
    np.testing.assert_allclose(scores, np.array(expected)[..., 0], rtol=1e-6)


def test_costs_of_more_than_actions_are_of_what_is_predicted() -> None:
    config = replace(CONFIG, target=("position", "action"), inpaint_start=True)
    data = {**DATA, "action": np.concatenate([DATA["position"], DATA["action"]], axis=1)}
    torch.manual_seed(0)
    from diffusion_policy.datasets.statistics import measure

    measured = {key: measure(rows) for key, rows in data.items()}
    policy = DiffusionPolicy.for_statistics(config, measured, target={"position": 2, "action": 2})
    seen = []

    def look(told, observed):
        seen.append({key: tuple(rows.shape) for key, rows in told.items()})
        return told["position"].square().sum(dim=(1, 2))

    led_by(look, policy, keys=("position", "action"))
    assert seen[:2] == [{"position": (8, 16, 2), "action": (8, 16, 2), PLACE: (8, 16, 2)}] * 2


def test_what_names_no_cost_is_refused() -> None:
    from diffusion_policy import envs

    maze, avoid = envs.make("diffusion_policy/Maze-v0"), envs.make("diffusion_policy/Avoid-v0")
    for text, env, why in (
        ("speed", maze, "unknown cost 'speed'; choose from apart, clearance, goal, length, smoothness, or a function"),
        ("length=much", maze, "must be a name and a number, as clearance=0.5; got 'length=much'"),
        ("clearance", avoid, "needs an environment that says what stands in it, as Maze-v0 does"),
        ("goal", avoid, "the cost goal needs an observation `goal`; there are x"),
    ):
        with pytest.raises(ConfigError, match=why):
            find_cost(text, env, ["x"], 0.1)
    assert find_cost("clearance=0.5", maze, [], 0.1).weight == 0.5
    with pytest.raises(ConfigError, match="cost-from must be above 0 and at most 1; got 0"):
        CostConfig(cost_from=0)
    led = make_policy().with_leads([Costs(())], {})
    with pytest.raises(
        ConfigError, match="costs lead samples by gradients, which --backend onnx has not: choose eager"
    ):
        make_planner(led, SampleConfig(), "onnx")
    assert with_costs  # what evaluate does with them is in tests/commands


@pytest.mark.parametrize(("kind", "outputs"), [(Evaluate, {"output": Path("runs/x")}), (Rollout, {})])
def test_a_server_that_plans_knows_no_costs(kind: type, outputs: dict) -> None:
    served = RemoteOptions("ws://somewhere:8000")
    for asked in (CostConfig(("length=1",)), CostConfig(classifier="runs/c", classifier_mode="left")):
        with pytest.raises(
            ConfigError, match=r"lead samples that are drawn here, not by a --server; got (length=1|runs/c)"
        ):
            kind(Path("runs/p"), **outputs, remote=served, costs=asked)
