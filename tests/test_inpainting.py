"""Policies that predict more than the action, whose start and goal are held in place: planners and forecasters."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.cli import main
from diffusion_policy.config import PolicyConfig, SampleConfig, TrainConfig, with_options
from diffusion_policy.control.planner import planning_rng
from diffusion_policy.datasets.statistics import measure
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.diffusion.process import Noising
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.serving.export import Exporting, make_export
from diffusion_policy.training import doctor
from diffusion_policy.training.losses import denoising_loss, draw
from diffusion_policy.training.trainer import Trainer

PLANNER = with_options(
    PolicyConfig(),
    widths=(16, 16),
    level_dim=16,
    noise_levels=20,
    prediction_horizon=16,
    action_horizon=4,
    target=("pose", "action"),
    inpaint_start=True,
    inpaint_goal="goal",
)
ENDS = np.array([40, 100])


def make_data() -> dict[str, np.ndarray]:
    """Straight walks from a random place to a random goal, and the heading [rad] of each step; the action is the next
    place."""
    rng, rows = np.random.default_rng(0), []
    for first, end in zip([0, *ENDS[:-1]], ENDS, strict=True):
        start, goal = rng.uniform(-5, 5, (2, 2))
        path = start + np.linspace(0, 1, end - first + 1)[:, None] * (goal - start)
        heading = np.full((end - first, 1), np.arctan2(*(goal - start)[::-1]))
        there = np.tile([*goal, heading[0, 0]], (end - first, 1))
        rows.append((np.concatenate([path[:-1], heading], axis=1), there, path[1:]))
    pose, goal, action = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return {"pose": pose, "goal": goal, "action": action}


DATA = make_data()
ANGLES = {"pose": (2,), "goal": (2,), "action": (2,)}
"""Those of `action` are of the row that is predicted: pose, then action."""


def row_of(config: PolicyConfig) -> dict[str, np.ndarray]:
    """What windows hold: `action` is the row that is predicted."""
    return {**DATA, "action": np.concatenate([DATA[key] for key in config.target or ("action",)], axis=1)}


def make_policy(config: PolicyConfig = PLANNER, angles: dict | None = None) -> DiffusionPolicy:
    torch.manual_seed(0)
    data = row_of(config)
    measured = {key: measure(rows) for key, rows in data.items()}
    target = {key: DATA[key].shape[1] for key in config.target}
    return DiffusionPolicy.for_statistics(config, measured, angles=ANGLES if angles is None else angles, target=target)


def test_a_row_of_what_is_predicted_holds_the_action_that_is_executed() -> None:
    policy = make_policy()
    assert policy.shapes.row == (5,)
    assert policy.shapes.action == (2,)
    assert policy.shapes.executed == slice(3, 5)
    batch = Windows(row_of(PLANNER), ENDS, [0, 1], 2, 16).gather([0, 30, 70])
    x0 = policy.sequences.normalize(batch.actions, batch.observations)
    assert x0.shape == (3, 16, 6)  # one of them an angle
    actions = policy.sequences.unnormalize(x0, 1, batch.observations)[:, 0]
    torch.testing.assert_close(actions.float(), batch.actions[..., 3:].float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver-2m", "unipc"])
@pytest.mark.parametrize("options", [{}, {"guidance": 1.0}], ids=["plain", "guided"])
def test_start_and_goal_stand_in_every_sample_and_at_every_step(sampler: str, options: dict) -> None:
    policy = make_policy(replace(PLANNER, condition_dropout=0.1))
    seen = []

    def watch(denoise):
        return lambda xt, level: seen.append(xt) or denoise(xt, level)

    observed = {"pose": torch.tensor([[[1.0, 2, 3], [1.5, 2.5, -3]]]), "goal": torch.tensor([[[4.0, -4, 1]] * 2])}
    sampling = SampleConfig(sampler, 4, **options)  # type: ignore[arg-type]
    held = policy.hold(observed, 3)
    assert held is not None
    noise = torch.from_numpy(policy.draw_noise([planning_rng(0)], 3, sampling))
    cond = policy.encode(observed).repeat_interleave(3, dim=0)
    _, levels = policy.resolve_sampling(sampling)
    x0 = policy.denoise_from(noise[0].transpose(0, 1), cond, levels, sampling, [watch], None, held)
    raw = policy.normalizer.unnormalize("action", x0)
    torch.testing.assert_close(raw[:, :2, :3], observed["pose"].double().expand(3, 2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(raw[:, -1, :3], observed["goal"][:, -1].double().expand(3, 3), atol=1e-5, rtol=0)
    assert ((raw[1:, 2:-1] - raw[:1, 2:-1]).abs().amax(dim=(0, 2)) > 0).all()  # the rest is free
    assert len(seen) >= 4


def test_the_loss_sees_them_clean_and_leaves_them_out() -> None:
    policy = make_policy()
    inputs = []

    class Network:
        def __call__(self, xt, level, cond):
            inputs.append(xt)
            return torch.where(policy.sequences.held, 1e6, 0.0).expand(xt.shape)

    x0, eps = torch.randn(2, 3, 16, 6, generator=torch.manual_seed(0))
    noising = Noising(torch.tensor([19, 10, 19]), eps, held=policy.sequences.held)
    loss = policy.diffusion.loss(Network(), x0, torch.zeros(3, 1), noising)  # type: ignore[arg-type]
    assert torch.equal(inputs[0][:, policy.sequences.held], x0[:, policy.sequences.held])
    torch.testing.assert_close(loss, eps[:, ~policy.sequences.held].square().mean(dim=1))
    assert policy.sequences.held.sum() == 2 * 4 + 4
    assert policy.sequences.held[0].tolist() == [True, True, False, False, True, True]  # x, y, action, cosine, sine


def test_a_planner_learns_to_connect_what_is_held() -> None:
    """On straight walks, the middle of a plan comes to lie between its ends."""
    config = replace(PLANNER, prediction="sample")
    policy = make_policy(config, {})
    windows = Windows(row_of(config), ENDS, [0, 1], 2, 16)
    trainer = Trainer.for_policy(policy, windows, windows, TrainConfig(steps=300, batch_size=32, learning_rate=3e-3))
    reports = []
    trainer.run(reports.append)
    assert reports[-1].validation_loss < 0.1 * reports[0].loss
    assert reports[-1].action_error < 1  # places lie up to 10 apart


def test_an_exported_graph_holds_them_too() -> None:
    asked = replace(PLANNER, condition_dropout=0.1, prediction="sample", observation_horizon=3, prediction_stride=2)
    asked = replace(asked, inverse_dynamics=True)
    policy = make_policy(asked).eval()
    sampling = SampleConfig(sampling_steps=2, guidance=0.5)
    plan, _ = make_export(policy, sampling, Exporting(batch=2, samples=2, form="network"))
    assert plan.action_error < 1e-4
    assert plan.action_shape == (2,)


def test_a_planner_is_trained_resumed_and_exported_from_the_command_line(tmp_path: Path, capsys) -> None:
    group = zarr.open_group(tmp_path / "walks.zarr", mode="w")
    for key, rows in (*((f"data/{key}", rows) for key, rows in DATA.items()), ("meta/episode_ends", ENDS)):
        group.create_array(key, data=rows)
    small = "--widths 8 --level-dim 16 --noise-levels 10 --prediction-horizon 16 --action-horizon 4 --batch-size 16"
    common = [*small.split(), "--steps", "4", "--checkpoint-every", "2", "--validation-share", "0", "--device", "cpu"]
    told = ["train", "--dataset", str(tmp_path / "walks.zarr"), *common, "--observation", "pose", "goal"]
    planner = "--target pose action --inpaint-start --inpaint-goal goal --angles pose:2 goal:2 --prediction-horizon 64"
    planner = [
        *planner.split(),
        "--observation-horizon",
        "5",
        "--prediction-stride",
        "4",
        "--inverse-dynamics",
    ]  # longer than any episode
    assert main([*told, "--output", str(tmp_path / "plan"), *planner]) == 0
    policy = checkpoint.load(tmp_path / "plan").policy
    assert (policy.shapes.target, policy.shapes.angles["action"]) == ({"pose": 3, "action": 2}, (2,))
    assert policy.sequences.shape[0] == 16
    assert main(["train", "--resume", str(tmp_path / "plan")]) == 0
    assert main(["doctor", "--checkpoint", str(tmp_path / "plan"), "--overfit-steps", "0"]) in (0, 1)
    assert main([*told, "--output", str(tmp_path / "forecast"), "--target", "pose"]) == 0
    forecaster = checkpoint.load(tmp_path / "forecast").policy
    assert (forecaster.shapes.row, forecaster.shapes.target) == ((3,), {"pose": 3})
    again = [*told, "--output", str(tmp_path / "wrong")]
    for wrong, why in (
        (["--target", "place"], "has no 'place' to predict; it has"),
        (["--inpaint-start"], "need an observation in --target"),
        (["--target", "pose", "action", "--inpaint-goal", "pose0"], "inpaint-goal must be an observation of 3 numbers"),
    ):
        assert main([*again, *wrong]) == 2
        assert why in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "options, why",
    [
        ({"target": ("pose", "pose")}, "target must name each key once; got pose, pose"),
        ({"max_delay": 2}, "inpaint-start and inpaint-goal are without max-delay; got 2"),
        ({"learn_variance": True}, "are without learn-variance; got True"),
        ({"objective": "regression"}, "are without objective; got regression"),
        (
            {"max_delay": 2, "inpaint_start": False, "inpaint_goal": None},
            "of a policy that predicts actions alone; got 2",
        ),
    ],
)
def test_what_does_not_go_together_is_said(options: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make_policy(replace(PLANNER, **options))


def test_the_doctor_sees_whether_samples_come_to_what_is_held() -> None:
    policy = make_policy(replace(PLANNER, prediction="sample"), {})
    windows = Windows(row_of(PLANNER), ENDS, [0, 1], 2, 16)
    batch = windows.gather([26, 30, 38, 90, 95, 98])  # the goal is near
    untrained = doctor.check_held(policy, batch, SampleConfig(sampling_steps=4), 0)
    assert untrained.status == "fail"
    perfect = make_policy(replace(PLANNER, prediction="sample"), {})
    x0 = perfect.sequences.normalize(batch.actions, batch.observations)
    perfect.network.denoise = lambda xt, films: x0  # type: ignore[method-assign]
    assert doctor.check_held(perfect, batch, SampleConfig(sampling_steps=4), 0).status == "pass"


def test_plans_of_more_than_actions_are_not_steered() -> None:
    policy = make_policy()
    with pytest.raises(ValueError, match="plans of pose, action are joined by --chunking receding alone"):
        policy.sequences.place(torch.zeros(1, 15, 2), torch.zeros(1, 15), 1, {})


def test_a_policy_without_inpainting_has_the_loss_that_it_had() -> None:
    plain = make_policy(replace(PLANNER, inpaint_start=False, inpaint_goal=None, target=()), {})
    assert plain.sequences.held is None
    assert plain.hold({"pose": torch.zeros(1, 2, 3)}) is None
    batch = Windows(DATA, ENDS, [0, 1], 2, 16).gather([0, 30])
    losses = denoising_loss(plain, batch, draw(plain, 2, torch.Generator().manual_seed(0)))
    assert losses.shape == (2,)
