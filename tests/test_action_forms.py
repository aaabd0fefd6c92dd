"""Policies that learn actions as differences, and rotations as six numbers: raw outside, whatever is learned inside."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from scipy.spatial.transform import Rotation

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.cli import main
from diffusion_policy.config import ConfigError, PolicyConfig, SampleConfig, TrainConfig, with_options
from diffusion_policy.control.planner import Steering, planning_rng
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.datasets.statistics import measure
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.serving.export import Exporting, make_export
from diffusion_policy.training.trainer import Trainer

STEPS = 120
CONFIG = with_options(
    PolicyConfig(),
    widths=(16,),
    level_dim=16,
    noise_levels=20,
    prediction_horizon=8,
    action_horizon=4,
    rotations=("action:2,3,4", "pose:2,3,4"),
)
FORMS = {
    "absolute": CONFIG,
    "relative": replace(CONFIG, action_form="relative", action_reference="pose"),
    "delta": replace(CONFIG, action_form="delta", action_reference="pose"),
    "of positions": replace(CONFIG, action_form="relative", action_reference="pose:0,1"),
}


def make_data() -> dict[str, np.ndarray]:
    """A hand that wanders far from the origin and turns: its pose, and the pose that is wanted two steps later, with a
    gripper."""
    rng = np.random.default_rng(0)
    place = 400 + np.cumsum(rng.normal(size=(STEPS + 2, 2)), axis=0)
    turn = Rotation.from_rotvec([2.5, 1.5, 0])
    turns = []
    for step in rng.normal(0, 0.2, (STEPS + 2, 3)):
        turn = turn * Rotation.from_rotvec(step)
        turns.append(turn.as_rotvec())
    pose = np.concatenate([place, turns], axis=1)
    gripper = rng.integers(0, 2, (STEPS, 1)).astype(float)
    return {"pose": pose[:STEPS], "action": np.concatenate([pose[2:], gripper], axis=1)}


DATA = make_data()
ENDS = np.array([50, STEPS])


def make_policy(config: PolicyConfig) -> DiffusionPolicy:
    torch.manual_seed(0)
    episodes = [{key: rows[:50] for key, rows in DATA.items()}, {key: rows[50:] for key, rows in DATA.items()}]
    measured = {key: measure(rows) for key, rows in DATA.items()}
    return DiffusionPolicy.for_statistics(config, measured, episodes=episodes)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_learned_fills_its_range_and_comes_back_raw(form: str) -> None:
    policy = make_policy(FORMS[form])
    batch = Windows(DATA, ENDS, [0, 1], 2, 8).gather(list(range(STEPS)))
    x0 = policy.sequences.normalize(batch.actions, batch.observations)
    assert x0.shape == (STEPS, 8, 9)  # two places, a gripper, a rotation
    torch.testing.assert_close(x0.abs().amax(dim=(0, 1))[:3], torch.ones(3))
    raw = policy.sequences.unnormalize(x0.double(), 1, batch.observations)[:, 0]
    torch.testing.assert_close(raw[..., [0, 1, 5]], batch.actions[..., [0, 1, 5]].double(), atol=1e-3, rtol=0)
    turned = (Rotation.from_rotvec(one[..., 2:5].reshape(-1, 3).numpy()) for one in (raw, batch.actions))
    assert (next(turned).inv() * next(turned)).magnitude().max() < 1e-3
    if form != "absolute":
        assert (
            x0.square().mean()
            != make_policy(CONFIG).sequences.normalize(batch.actions, batch.observations).square().mean()
        )


@pytest.mark.parametrize("form", FORMS)
def test_actions_that_are_given_lie_where_the_whole_sequence_has_them(form: str) -> None:
    policy = make_policy(FORMS[form])
    batch = Windows(DATA, ENDS, [0, 1], 2, 8).gather([3, 70])
    weights = torch.ones(2, 7)
    sequence, known = policy.sequences.place(batch.actions[:, 1:], weights, 2, batch.observations)
    whole = policy.sequences.normalize(batch.actions, batch.observations).repeat_interleave(2, dim=0)
    torch.testing.assert_close(sequence[:, 1:], whole[:, 1:])
    assert known[:, :, 0].tolist() == [[0, *[1] * 7]] * 4


@pytest.mark.parametrize("form", ["relative", "delta"])
def test_the_same_motion_from_another_place_is_the_same_plan(form: str) -> None:
    """The observation itself is told apart, so only the differences are compared: of the same x0."""
    policy = make_policy(FORMS[form])
    batch = Windows(DATA, ENDS, [0, 1], 2, 8).gather([20])
    x0 = policy.sequences.normalize(batch.actions, batch.observations)
    moved = {"pose": batch.observations["pose"] + torch.tensor([30.0, -10, 0, 0, 0])}
    there, here = policy.sequences.unnormalize(x0, 1, moved), policy.sequences.unnormalize(x0, 1, batch.observations)
    expected = torch.tensor([30.0, -10, 0, 0, 0, 0]).to(here).expand_as(here)
    torch.testing.assert_close(there - here, expected, atol=1e-4, rtol=0)


def test_an_exported_graph_gives_what_the_policy_gives() -> None:
    """The export itself compares them on observations and given actions of all kinds, and refuses what differs."""
    policy = make_policy(replace(FORMS["delta"], max_delay=2, prediction="sample")).eval()
    plan, _ = make_export(policy, SampleConfig(sampling_steps=2), Exporting(batch=2, samples=2))
    assert plan.action_reference == "pose"
    assert plan.action_error < 1e-4


def test_such_a_policy_trains_and_is_steered() -> None:
    policy = make_policy(replace(FORMS["relative"], max_delay=2))
    windows = Windows(DATA, ENDS, [0, 1], 2, 8)
    trainer = Trainer.for_policy(policy, windows, windows, TrainConfig(steps=3, batch_size=16, validate_every=3))
    reports = []
    trainer.run(reports.append)
    assert np.isfinite(reports[-1].action_error)
    planner = PolicyPlanner(trainer.ema, SampleConfig(sampling_steps=2))
    noise = trainer.ema.draw_noise([planning_rng(0)], 1, SampleConfig(sampling_steps=2))
    given = np.full((1, 7, 6), 400.0)
    given[..., 2:] = [2.5, 1.5, 0, 1]
    observed = {"pose": DATA["pose"][None, :2]}
    plan = planner.sample(observed, noise, Steering(given, np.array([[1.0, 1, 0, 0, 0, 0, 0]]), None))
    np.testing.assert_allclose(plan[0, 0, :2], given[0, :2], atol=2e-3)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"action_form": "relative"}, "action-form relative needs an action-reference; got None"),
        ({"action_reference": "pose"}, "action-form absolute takes no action-reference; got pose"),
        ({"action_form": "turned"}, "unknown action-form 'turned'; choose from absolute, relative, delta"),
        ({"rotations": ("pose:1,2",)}, "rotations must be a key with 3 or 4 columns; got pose:1,2"),
        ({"rotations": ("pose:a",)}, "columns are told as key:0,1; got 'pose:a'"),
        (
            {"rotations": ("pose:3,4,5",)},
            r"a rotation must name columns of a key, each once; pose has the shape \(5,\)",
        ),
        ({"rotations": ("pose:2,3,4", "pose:4,1,0")}, "column 4 of pose is both or twice"),
        (
            {"action_form": "delta", "action_reference": "state"},
            "must be an observation of numbers in a row, pose; got state",
        ),
        ({"action_form": "delta", "action_reference": "pose:7"}, "at most 6 of the 5 columns of pose, .* got 7"),
        (
            {"action_form": "delta", "action_reference": "pose:0,1,2"},
            "in the middle of the rotation in the action's columns",
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_line(options: dict, why: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=why) as info:
        DiffusionPolicy.for_data(replace(CONFIG, **options), DATA)
    assert "\n" not in str(info.value)


def test_a_dataset_with_rotations_is_trained_on_resumed_and_looked_at(tmp_path: Path, capsys) -> None:
    group = zarr.open_group(tmp_path / "poses.zarr", mode="w")
    for key, rows in (*((f"data/{key}", rows) for key, rows in DATA.items()), ("meta/episode_ends", ENDS)):
        group.create_array(key, data=rows)
    options = "--observation pose --rotations action:2,3,4 pose:2,3,4 --action-form relative --action-reference pose"
    small = "--widths 8 --level-dim 16 --noise-levels 10 --prediction-horizon 8 --action-horizon 4 --batch-size 16"
    run = tmp_path / "run"
    told = ["train", "--dataset", str(tmp_path / "poses.zarr"), "--output", str(run), *options.split(), *small.split()]
    assert main([*told, "--steps", "4", "--checkpoint-every", "2", "--validation-share", "0", "--device", "cpu"]) == 0
    policy = checkpoint.load(run).policy
    assert policy.normalizer.shapes == {"pose": (8,), "action": (9,)}
    assert (policy.sequences.frame.form, policy.sequences.frame.key) == ("relative", "pose")
    fresh = make_policy(replace(FORMS["relative"], rotations=policy.config.rotations))
    for name, numbers in fresh.normalizer.state_dict().items():  # that of the windows of both episodes
        torch.testing.assert_close(policy.normalizer.state_dict()[name], numbers)
    assert main(["train", "--resume", str(run)]) == 0
    assert main(["doctor", "--checkpoint", str(run), "--overfit-steps", "0"]) in (
        0,
        1,
    )  # so little trained, it may fail
    assert main([*told[:4], str(tmp_path / "other"), *small.split(), "--rotations", "place:0,1,2", "--steps", "1"]) == 2
    assert "a rotation must name columns of a key, each once; place is not used" in capsys.readouterr().err
