from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from diffusion_policy.config import PolicyConfig, TrainConfig
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.trainer import Progress, Trainer, learning_rate_factor

CONFIG = PolicyConfig(prediction_horizon=8, action_horizon=4, widths=(16, 32), level_dim=32, levels=20)
RNG = np.random.default_rng(0)
DATA = {"state": RNG.normal(size=(60, 2)).astype(np.float32), "action": RNG.normal(size=(60, 2)).astype(np.float32)}
ENDS = np.array([20, 40, 60])


def new_trainer(**options) -> Trainer:
    torch.manual_seed(0)
    windows = Windows(DATA, ENDS, [0, 1], CONFIG.observation_horizon, CONFIG.prediction_horizon)
    validation = Windows(DATA, ENDS, [2], CONFIG.observation_horizon, CONFIG.prediction_horizon)
    policy = DiffusionPolicy.for_data(CONFIG, DATA)
    defaults = {"steps": 20, "batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 5, "validate_every": 10}
    return Trainer(policy, windows, validation, TrainConfig(**(defaults | options)))


def test_it_learns() -> None:
    trainer = new_trainer(steps=150)
    reports: list[Progress] = []
    trainer.run(reports.append)
    assert reports[-1].loss < 0.6 * reports[0].loss
    assert reports[-1].step == trainer.step == 150


def test_the_same_seed_gives_the_same_weights() -> None:
    trainers = [new_trainer(seed=3), new_trainer(seed=3), new_trainer(seed=4)]
    for trainer in trainers:
        trainer.run()
    a, b, c = (trainer.averaged.state_dict() for trainer in trainers)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_validation_comes_at_its_steps_with_the_same_noise_each_time() -> None:
    trainer = new_trainer(steps=25)
    reports: list[Progress] = []
    trainer.run(reports.append, report_every=7)
    assert [report.step for report in reports] == [7, 10, 14, 20, 21, 25]
    assert [report.step for report in reports if report.validation_loss is not None] == [10, 20, 25]
    assert trainer.validate() == trainer.validate() == reports[-1].validation_loss


def test_a_report_comes_whenever_a_checkpoint_is_due() -> None:
    trainer = new_trainer(steps=20, checkpoint_every=7, validate_every=100)
    reports: list[Progress] = []
    trainer.run(reports.append, report_every=100)
    assert [report.step for report in reports] == [7, 14, 20]


def test_it_stops_between_two_steps_when_asked() -> None:
    trainer = new_trainer()
    trainer.run(should_stop=lambda: trainer.step == 7)
    assert trainer.step == 7


def test_averaged_weights_follow_the_recurrence() -> None:
    trainer = new_trainer(steps=1)
    name = "network.out.1.bias"
    expected = None
    for step in range(1, 6):
        trainer.config = TrainConfig(steps=step)
        trainer.run()
        current = trainer.state()[f"weights.{name}"].clone()
        keep = min(trainer.config.average_limit, 1 - (1 + step - 1) ** -trainer.config.average_power)
        expected = current if expected is None else keep * expected + (1 - keep) * current
    torch.testing.assert_close(trainer.averaged.state_dict()[name], expected)


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    config = TrainConfig(steps=100, warmup_steps=10)  # a tenth, the most that is allowed
    factors = [learning_rate_factor(step, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == 1
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)
    assert learning_rate_factor(0, TrainConfig(steps=5, warmup_steps=200)) == 1


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    trainer = new_trainer(learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"by step \d+ the loss became .*; lower the learning rate"):
        trainer.run()


def test_the_state_names_every_weight_and_its_moments() -> None:
    trainer = new_trainer(steps=2)
    trainer.run()
    state = trainer.state()
    assert {"weights.network.out.1.bias", "optimizer.network.out.1.bias.exp_avg"} <= state.keys()
    assert state["optimizer.network.out.1.bias.step"].item() == 2


def test_the_modes_of_the_windows_reach_the_network() -> None:
    config = replace(CONFIG, condition_on_mode=True)
    horizons = config.observation_horizon, config.prediction_horizon
    modes = np.array([1, 0, 1])
    windows, validation = (Windows(DATA, ENDS, episodes, *horizons, modes=modes) for episodes in ([0, 1], [2]))
    policy = DiffusionPolicy.for_data(config, DATA, ("a", "b"))
    seen = []
    policy.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2][:, -2:]))
    trainer = Trainer(policy, windows, validation, TrainConfig(steps=1, batch_size=40))
    trainer.run()
    assert seen[0].sum(dim=0).tolist() == [20, 20]
    seen.clear()
    trainer.averaged.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2][:, -2:]))
    trainer.validate()
    assert torch.cat(seen).unique(dim=0).tolist() == [[0.0, 1.0]]
