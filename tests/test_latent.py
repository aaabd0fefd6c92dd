"""Diffusion in a learned latent space: the autoencoder, policies in its space, and their trainings."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import diffusion_policy as dp
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.cli import main
from diffusion_policy.config import ConfigError, LatentConfig, PolicyConfig, SampleConfig, TrainConfig, with_options
from diffusion_policy.control.planner import planning_rng
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.networks.autoencoder import Autoencoder
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.serving.export import Exporting, make_export
from diffusion_policy.training.losses import autoencoding_loss
from diffusion_policy.training.trainer import Trainer

LATENT = LatentConfig(latent_channels=3, latent_stride=4, latent_width=16)
CONFIG = with_options(
    PolicyConfig(latent=LATENT), widths=(8,), level_dim=16, noise_levels=20, prediction_horizon=16, action_horizon=8
)
T = np.linspace(0, 40, 400)
DATA = {
    "state": np.stack([np.sin(T), np.cos(T)], axis=1),
    "action": np.stack([np.sin(T + 0.3), np.cos(T + 0.3), np.sin(2 * T)], axis=1),
}
ENDS = np.array([200, 400])


def make_policy(config: PolicyConfig = CONFIG) -> DiffusionPolicy:
    torch.manual_seed(0)
    return DiffusionPolicy.for_data(config, DATA)


def test_latents_are_shorter_and_standardized_and_come_back_as_long() -> None:
    torch.manual_seed(0)
    network = Autoencoder(3, 5, 8, 16)
    sequences = torch.randn(40, 32, 3)
    network.fit(sequences)
    latents = network.encode(sequences)
    assert latents.shape == (40, 4, 5)
    torch.testing.assert_close(latents.mean(dim=(0, 1)), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 1)), torch.ones(5), atol=1e-2, rtol=0)
    assert network.decode(latents).shape == (40, 32, 3)
    mean, _ = network.distribution(sequences)
    torch.testing.assert_close(network.decode(latents), network.decode_raw(mean), atol=1e-5, rtol=1e-4)


def test_the_loss_is_the_bound_in_closed_form() -> None:
    network = Autoencoder(2, 3, 2, 8)
    x, noise = torch.randn(5, 8, 2), torch.randn(5, 4, 3)
    mean, log_variance = network.distribution(x)
    latent = torch.distributions.Normal(mean, (log_variance / 2).exp())
    divergence = torch.distributions.kl_divergence(latent, torch.distributions.Normal(0.0, 1.0)).mean(dim=(1, 2))
    error = (network.decode_raw(mean + latent.stddev * noise) - x).square().mean(dim=(1, 2))
    torch.testing.assert_close(network.loss(x, noise, 0.3), error + 0.3 * divergence)


def trained_autoencoder(steps: int = 300) -> tuple[DiffusionPolicy, list]:
    policy = make_policy(replace(CONFIG, objective="autoencoding"))
    policy.requires_grad_(False)
    policy.autoencoder.requires_grad_(True)
    windows = Windows(DATA, ENDS, [0, 1], 2, 16)
    config = TrainConfig(steps=steps, batch_size=64, learning_rate=3e-3, validate_every=steps)
    trainer = Trainer.for_policy(policy, windows, windows, config, loss=autoencoding_loss)
    reports: list = []
    trainer.run(reports.append)
    return trainer.ema, reports


def test_an_autoencoder_learns_and_diffusion_in_its_space_comes_back_bounded() -> None:
    autoencoder, reports = trained_autoencoder()
    assert reports[-1].action_error < 0.15  # of circles of radius 1
    assert reports[-1].loss < 0.02
    policy = make_policy(with_options(CONFIG, widths=(32,), level_dim=32))
    policy.autoencoder.load_state_dict(autoencoder.autoencoder.state_dict())
    policy.autoencoder.requires_grad_(False)
    windows = Windows(DATA, ENDS, [0, 1], 2, 16)
    batch = windows.gather(list(range(0, 400, 7)))
    raw = policy.normalizer.normalize("action", batch.actions)
    policy.autoencoder.fit(raw)
    before = {name: weight.clone() for name, weight in policy.autoencoder.named_parameters()}
    assert policy.sequences.shape == (4, 3)
    assert policy.sequences.normalize(batch.actions, batch.observations).shape == (len(batch.actions), 4, 3)
    trainer = Trainer.for_policy(policy, windows, windows, TrainConfig(steps=300, batch_size=64, learning_rate=3e-3))
    reports = []
    trainer.run(reports.append)
    for name, weight in trainer.ema.autoencoder.named_parameters():
        assert torch.equal(weight, before[name])
    assert reports[-1].validation_loss < 0.6 * reports[0].loss
    plans = trainer.ema.sample({"state": torch.full((1, 2, 2), 50.0)}, [planning_rng(0)], 20)
    assert plans.shape == (1, 20, 16, 3)
    low, high = torch.from_numpy(DATA["action"]).aminmax(dim=0)
    assert (plans >= low - 1e-6).all()
    assert (plans <= high + 1e-6).all()


def test_an_exported_graph_decodes_too() -> None:
    policy = make_policy(replace(CONFIG, prediction="sample")).eval()
    plan, _ = make_export(policy, SampleConfig(sampling_steps=2), Exporting())
    assert plan.action_error < 1e-4
    assert (plan.noise_shape[1:], plan.action_shape) == ((4, 3), (3,))


SMALL = "--widths 8 --level-dim 16 --noise-levels 10 --prediction-horizon 16 --action-horizon 4 --batch-size 16"
COMMON = [*SMALL.split(), "--groups", "4", "--steps", "4", "--checkpoint-every", "2", "--validate-every", "2"]


def test_both_trainings_from_the_command_line(demonstrations: Path, tmp_path: Path, capsys) -> None:
    told = ["--dataset", str(demonstrations), *COMMON, "--device", "cpu"]
    latent = ["--latent-channels", "4", "--latent-stride", "2", "--latent-width", "8", "--latent-kl", "0.01"]
    run, policy = tmp_path / "latent", tmp_path / "policy"
    assert main(["train-latent", *told, "--output", str(run), *latent]) == 0
    learned = checkpoint.load(run).policy
    assert (learned.config.objective, learned.config.latent) == ("autoencoding", LatentConfig(4, 2, 8, 0.01))
    assert main(["train-latent", "--resume", str(run)]) == 0
    assert main(["train", *told, "--output", str(policy), "--latent", str(run)]) == 0
    found = checkpoint.load(policy).policy
    assert found.config.latent == learned.config.latent
    for name, weight in learned.autoencoder.named_parameters():
        assert torch.equal(dict(found.autoencoder.named_parameters())[name], weight)
    assert found.autoencoder.scale.min() > 0
    assert not torch.equal(found.autoencoder.scale, torch.ones(4))
    run.rename(tmp_path / "gone")  # the policy holds both
    assert main(["train", "--resume", str(policy)]) == 0
    output = tmp_path / "e"
    brief = ["--episodes", "1", "--workers", "1", "--videos", "0", "--env-kwargs", '{"rows":1,"max_episode_steps":10}']
    assert (
        main(["evaluate", "--checkpoint", str(policy), "--output", str(output), *brief, "--sampling-steps", "2"]) == 0
    )
    assert json.loads((output / "results.json").read_text())["episodes"] == 1
    capsys.readouterr()
    gone = str(tmp_path / "gone")
    for wrong, why in (
        (
            ["evaluate", "--checkpoint", gone, "--output", str(tmp_path / "x"), *brief],
            "this is an autoencoder, which acts",
        ),
        (["train", *told, "--output", str(tmp_path / "y"), "--latent", str(policy)], "needs a run of train-latent"),
        (
            ["train", *told, "--output", str(tmp_path / "y"), "--latent-channels", "4"],
            "are those of an autoencoder",
        ),
        (
            ["train-latent", *told, "--output", str(tmp_path / "y"), "--latent", gone],
            "trains an autoencoder of its own",
        ),
        (
            ["train", *told, "--output", str(tmp_path / "y"), "--latent", gone, "--normalization", "moments"],
            "a policy has the normalization of its autoencoder, limits; got moments",
        ),
        (
            ["train-latent", *told, "--output", str(tmp_path / "y"), "--objective", "regression"],
            "train-latent has no other objective; got --objective regression",
        ),
    ):
        assert main(wrong) == 2
        assert why in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "options, why",
    [
        ({"objective": "autoencoding", "latent": LatentConfig()}, "needs latent-channels above 0"),
        ({"latent": LatentConfig(2, 32)}, "latent-stride must divide the prediction-horizon 16; got 32"),
        ({"max_delay": 2}, "a latent space is without inpaint-start, inpaint-goal and max-delay"),
    ],
)
def test_what_no_latent_space_can_be_is_said(options: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make_policy(replace(CONFIG, **options))


def test_strides_that_are_no_powers_and_plans_that_are_steered_are_refused() -> None:
    with pytest.raises(ConfigError, match="latent-stride must be a power of two; got 3"):
        LatentConfig(latent_stride=3)
    with pytest.raises(ValueError, match="plans of a latent space are joined by --chunking receding alone"):
        make_policy().sequences.place(torch.zeros(1, 15, 3), torch.zeros(1, 15), 1, {})
    assert dp.__version__
