"""Sequences of which a step stands for several."""

import numpy as np
import pytest
import torch

from diffusion_policy.config import ConfigError, PolicyConfig, TrainConfig, with_options
from diffusion_policy.datasets.statistics import measure
from diffusion_policy.datasets.windows import Batch, Windows
from diffusion_policy.networks.sequences import interpolation
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training.losses import denoising_loss, draw
from diffusion_policy.training.trainer import Trainer

STEPS = np.arange(64)
DATA = {
    "action": np.stack([STEPS / 10, np.sin(STEPS / 9)], axis=1).astype(np.float32),
    "place": np.stack([STEPS / 10, np.cos(STEPS / 9)], axis=1).astype(np.float32),
    "goal": np.tile(np.array([3.0, 0.2], np.float32), (64, 1)),
}
CONFIG = with_options(
    PolicyConfig(),
    widths=(16, 32),
    level_dim=32,
    noise_levels=20,
    observation_horizon=1,
    prediction_horizon=32,
    prediction_stride=4,
    target=("place", "action"),
    inpaint_start=True,
    inpaint_goal="goal",
)


def make_policy(config: PolicyConfig) -> DiffusionPolicy:
    rows = {**DATA, "action": np.concatenate([DATA[key] for key in config.target or ("action",)], axis=1)}
    sizes = {key: DATA[key].shape[1] for key in config.target}
    return DiffusionPolicy.for_statistics(config, {key: measure(part) for key, part in rows.items()}, target=sizes)


@pytest.fixture
def batch() -> Batch:
    starts = [0, 11, 32]
    rows = np.concatenate([DATA["place"], DATA["action"]], axis=1)
    return Batch(
        {key: torch.from_numpy(np.stack([DATA[key][i : i + 1] for i in starts])) for key in ("place", "goal")},
        torch.from_numpy(np.stack([rows[i : i + 32] for i in starts])),
    )


def test_a_row_between_two_predicted_ones_is_interpolated_and_the_last_one_stays():
    weights = interpolation(12, 4)
    assert weights.shape == (12, 3)
    np.testing.assert_allclose(weights.sum(dim=1), 1)
    knots = torch.tensor([[0.0], [8.0], [4.0]], dtype=torch.float64)
    assert (weights @ knots)[:, 0].tolist() == [0, 2, 4, 6, 8, 7, 6, 5, 4, 4, 4, 4]
    assert torch.equal(interpolation(5, 1), torch.eye(5, dtype=torch.float64))


def test_every_fourth_step_is_learned_and_a_plan_has_all_steps(batch: Batch):
    policy = make_policy(CONFIG)
    x0 = policy.sequences.normalize(batch.actions, batch.observations)
    assert x0.shape == (3, *policy.sequences.shape) == (3, 8, 4)
    rows = policy.sequences.rows_of(x0.double(), batch.observations)
    np.testing.assert_allclose(rows[:, ::4], batch.actions[:, ::4], atol=1e-6)
    np.testing.assert_allclose(rows[:, 2:28:4], (rows[:, :28:4] + rows[:, 4::4]) / 2, atol=1e-6)  # straight between
    np.testing.assert_allclose(rows[:, 29:], rows[:, 28:29].expand(-1, 3, -1), atol=1e-6)
    plans = policy.sample(batch.observations, [np.random.default_rng(i) for i in range(3)], 2)
    assert plans.shape == (3, 2, 32, 2)


def test_start_and_goal_are_held_in_the_steps_that_are_predicted(batch: Batch):
    policy = make_policy(CONFIG)
    held = policy.hold(batch.observations)
    assert held is not None
    assert held.mask.nonzero().tolist() == [[0, 0], [0, 1], [7, 0], [7, 1]]
    rows = policy.sequences.rows_of(held.sequence.double(), batch.observations)[..., :2]
    np.testing.assert_allclose(rows[:, 0], batch.observations["place"][:, 0], atol=1e-6)
    np.testing.assert_allclose(rows[:, -1], batch.observations["goal"][:, 0], atol=1e-6)


def test_steps_without_loss_are_those_that_were_not_demonstrated(batch: Batch):
    policy = make_policy(CONFIG)
    draws = draw(policy, 3, torch.Generator().manual_seed(0))
    demonstrated = torch.ones(3, 32, dtype=torch.bool)
    demonstrated[:, 20:] = False
    losses = denoising_loss(policy, batch._replace(demonstrated=demonstrated), draws)
    wild = batch.actions.clone()
    wild[:, 20:] += 1.0  # only seen by convolutions: the loss of these steps does not count
    assert not torch.allclose(losses, denoising_loss(policy, batch, draws))
    grown = denoising_loss(policy, batch._replace(actions=wild), draws)
    masked = denoising_loss(policy, batch._replace(actions=wild, demonstrated=demonstrated), draws)
    assert ((masked - losses).abs() < (grown - losses).abs()).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prediction_stride": 5}, "prediction-stride must divide the prediction-horizon 32; got 5"),
        (
            {"prediction_stride": 32},
            "prediction-horizon must be a multiple of 64, since 2 widths halve the time axis of ",
        ),
        ({"prediction_stride": 0}, "prediction-stride must be at least 1"),
    ],
)
def test_a_stride_that_does_not_fit_is_said(changes: dict[str, int], said: str):
    with pytest.raises(ConfigError, match=said):
        with_options(CONFIG, **changes)


def test_a_stride_is_refused_where_each_step_is_needed():
    plain = with_options(CONFIG, target=(), inpaint_start=False, inpaint_goal=None)
    with pytest.raises(ValueError, match="without a latent space and max-delay"):
        make_policy(with_options(plain, max_delay=3))
    with pytest.raises(ValueError, match="without a latent space and max-delay"):
        make_policy(with_options(plain, latent_channels=2))
    with pytest.raises(ValueError, match="which a prediction-stride of 4 skips with an observation-horizon of 3"):
        make_policy(with_options(CONFIG, observation_horizon=3))
    policy = make_policy(plain)
    with pytest.raises(ValueError, match="plans of every 4th step are joined by --chunking receding alone"):
        policy.sequences.place(torch.zeros(1, 8, 2), torch.ones(1, 8), 1, {})


def test_a_transformer_takes_any_number_of_predicted_steps():
    asked = {"network": "transformer", "width": 32, "layers": 1, "heads": 2, "level_dim": 32, "noise_levels": 20}
    asked |= {"observation_horizon": 1, "prediction_horizon": 33, "prediction_stride": 3}
    assert make_policy(with_options(PolicyConfig(), **asked)).sequences.shape == (11, 2)


INVERSE = with_options(CONFIG, target=("action", "place"), inverse_dynamics=True)


def test_states_alone_are_denoised_and_actions_follow_from_them(batch: Batch):
    policy = make_policy(INVERSE)
    swapped = batch._replace(actions=batch.actions[..., [2, 3, 0, 1]])  # as the target says: action, place
    assert policy.sequences.shape == (8, 2)
    x0 = policy.sequences.normalize(swapped.actions, swapped.observations)
    with torch.no_grad():
        rows = policy.sequences.rows_of(x0.double(), swapped.observations)
    np.testing.assert_allclose(rows[:, ::4, 2:], swapped.actions[:, ::4, 2:], atol=1e-6)
    assert policy.sequences.inverse is not None
    said = policy.sequences.inverse(policy.sequences.between.float() @ x0).clamp(-1, 1)
    columns = policy.normalizer.normalize("action", rows)[..., :2]
    np.testing.assert_allclose(columns, said.detach(), atol=1e-5)
    assert policy.sample(batch.observations, [np.random.default_rng(i) for i in range(3)], 2).shape == (3, 2, 32, 2)
    held = policy.hold(batch.observations)
    assert held is not None
    assert held.mask.sum() == 4


def test_the_actions_of_states_are_learned_beside_them():
    config = with_options(INVERSE, prediction_horizon=16, prediction_stride=1, inpaint_goal=None, inpaint_start=False)
    torch.manual_seed(0)
    policy = make_policy(config)
    rows = np.concatenate([DATA["action"], DATA["place"]], axis=1)
    windows = Windows({"place": DATA["place"], "goal": DATA["goal"], "action": rows}, [64], [0], 1, 16)
    training = TrainConfig(steps=80, batch_size=32, learning_rate=3e-3, ema_max_decay=0.95, warmup_steps=5)
    trainer = Trainer.for_policy(policy, windows, None, training)
    trainer.run(lambda _: None)
    learned = trainer.ema
    batch = windows.gather(torch.arange(5, 30))
    back = learned.sequences.unnormalize(
        learned.sequences.normalize(batch.actions, batch.observations), 1, batch.observations
    )
    away = (back[:, 0] - batch.actions[..., :2]).norm(dim=-1)[:, :-1]  # the last state says no next one
    assert away.mean() < 0.15  # of actions that span 6
    assert policy.inverse is not None


def test_inverse_dynamics_need_states_and_an_action():
    for target in ((), ("place",), ("action",)):
        config = with_options(INVERSE, target=target, inpaint_start=False, inpaint_goal=None)
        with pytest.raises(ValueError, match="inverse-dynamics needs an observation and the action in --target"):
            make_policy(config)
