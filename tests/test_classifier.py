"""Classifier guidance: a classifier of noised sequences leads a policy that knows no modes to one of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.cli import main
from diffusion_policy.config import ConfigError, CostConfig, PolicyConfig, TrainConfig, with_options
from diffusion_policy.control.preference import Preference
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.diffusion.guidance import preferring
from diffusion_policy.diffusion.schedules import make_schedule
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training.losses import classifying_loss
from diffusion_policy.training.trainer import Trainer

TINY = with_options(
    PolicyConfig(observation_horizon=1, prediction_horizon=8, action_horizon=4),
    widths=(16, 16), level_dim=16, noise_levels=20, prediction="sample",
)  # fmt: skip
CLASSIFIER = with_options(TINY, objective="classifying", condition_on_mode=True)
MODES = ("down", "up")
RNG = np.random.default_rng(0)
EPISODES = 40


def make_data() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Walks from the same place, up or down; and the mode of each."""
    labels = np.arange(EPISODES) % 2
    path = np.linspace(0.1, 1, 8)
    action = np.stack([path * sign + RNG.normal(0, 0.02, 8) for sign in np.where(labels, 1, -1)])
    return {"action": action.reshape(-1, 1), "place": np.zeros((EPISODES * 8, 1))}, labels


DATA, LABELS = make_data()
ENDS = np.arange(1, EPISODES + 1) * 8


def test_the_exact_classifier_of_gaussian_data_samples_the_posterior() -> None:
    """With x0 of N(0, 1) and p(y | x0) of exp(a x0), x0 given y is of N(a, 1): its exact denoiser is that of x0 and
    the gradient a α of log p(y | xt)."""
    schedule, a = make_schedule("cosine", 50), 0.7
    alpha, sigma = schedule.alpha, schedule.sigma
    xt = torch.from_numpy(RNG.normal(size=(6, 4, 2)))
    led = preferring(
        lambda xt, level: alpha[level] * xt, lambda xt, level: xt * 0 + a * alpha[level], 1.0, alpha, sigma
    )
    for level in (0, 20, 49):
        posterior = a + alpha[level] * (xt - alpha[level] * a)
        torch.testing.assert_close(led(xt, level), posterior)
    strong = preferring(lambda xt, level: alpha[level] * xt, lambda xt, level: xt * 0 + 1, 3.0, alpha, sigma)
    torch.testing.assert_close(strong(xt, 20), alpha[20] * xt + 3 * sigma[20] ** 2 / alpha[20])


def make_policy(config: PolicyConfig) -> DiffusionPolicy:
    torch.manual_seed(0)
    return DiffusionPolicy.for_data(config, DATA, MODES if config.condition_on_mode else ())


def test_its_slope_is_that_of_finite_differences() -> None:
    classifier = make_policy(CLASSIFIER).eval()
    slope = classifier.classify({"place": torch.zeros(1, 1, 1)}, 2, "up")
    xt = torch.from_numpy(RNG.normal(size=(2, 8, 1))).float()
    level = torch.tensor([7, 7])
    cond = classifier.encode({"place": torch.zeros(2, 1, 1)})

    def of_mode(x: torch.Tensor) -> torch.Tensor:
        return classifier.diffusion.log_probabilities(classifier.network, x, level, cond)[:, 1].sum()

    found, step = slope(xt, 7), 1e-2
    for i in range(8):
        moved = torch.zeros_like(xt)
        moved[0, i] = step
        expected = (of_mode(xt + moved) - of_mode(xt - moved)) / (2 * step)
        assert found[0, i, 0].item() == pytest.approx(expected.item(), rel=0.05, abs=2e-4)


def learn(policy: DiffusionPolicy, **options) -> DiffusionPolicy:
    labels = LABELS if policy.labels else None
    windows = Windows(DATA, ENDS, range(EPISODES), 1, 8, labels=labels)
    config = TrainConfig(steps=120, batch_size=32, learning_rate=5e-3, warmup_steps=10, ema_max_decay=0.95)
    trainer = Trainer.for_policy(policy, windows, None, config, **options)
    trainer.run(lambda _: None)
    return trainer.ema.eval()


def test_a_policy_without_modes_is_led_to_the_one_that_is_asked_for() -> None:
    policy = learn(make_policy(TINY))
    classifier = learn(make_policy(CLASSIFIER), loss=classifying_loss)
    rng, seen = [np.random.default_rng(1)], {"place": torch.zeros(1, 1, 1)}
    plain = policy.sample(seen, rng, 64)[0, :, -1, 0]
    assert 0.3 < (plain > 0).double().mean() < 0.7
    for mode, sign in (("up", 1), ("down", -1)):
        shares = []
        for weight in (1.0, 4.0):
            led = policy.with_leads([Preference(classifier, mode, weight)], {})
            ends = led.sample(seen, rng, 64)[0, :, -1, 0] * sign
            assert ends.median() == pytest.approx(1, abs=0.2)  # as demonstrated
            shares.append((ends > 0).double().mean().item())
        assert 0.75 < shares[0] <= shares[1]
        assert shares[1] > 0.95
    assert torch.equal(
        policy.with_leads([Preference(classifier, "up", 0.0)], {}).sample(seen, [np.random.default_rng(2)], 3),
        policy.sample(seen, [np.random.default_rng(2)], 3),
    )


def test_a_classifier_is_trained_resumed_and_leads_from_the_command_line(demonstrations: Path, tmp_path: Path) -> None:
    small = "--widths 8 --groups 4 --level-dim 16 --noise-levels 10 --batch-size 16 --steps 4 --checkpoint-every 2"
    common = [*small.split(), "--dataset", str(demonstrations), "--device", "cpu", "--validation-share", "0.34"]
    assert main(["train", *common, "--output", str(tmp_path / "policy")]) == 0
    told = [*common, "--output", str(tmp_path / "classifier"), "--condition-dropout", "0.1", "--noise-draws", "2"]
    assert main(["train-classifier", *told]) == 0
    assert main(["train-classifier", "--resume", str(tmp_path / "classifier")]) == 0
    found = checkpoint.load(tmp_path / "classifier").policy
    assert found.config.objective == "classifying"
    few = "--episodes 2 --repeats 1 --sampling-steps 2 --workers 1 --videos 0 --device cpu"
    acting = [*few.split(), "--checkpoint", str(tmp_path / "policy"), "--env-kwargs", '{"max_episode_steps": 10}']
    led = [
        "--classifier",
        str(tmp_path / "classifier"),
        "--classifier-mode",
        found.modes[0],
        "--classifier-weight",
        "2",
    ]
    assert main(["evaluate", *acting, *led, "--output", str(tmp_path / "led")]) == 0
    results = json.loads((tmp_path / "led" / "results.json").read_text())
    assert results["costs"]["classifier_mode"] == found.modes[0]
    assert results["costs"]["classifier_weight"] == 2


def test_a_classifier_that_does_not_fit_is_said(demonstrations: Path, tmp_path: Path, capsys) -> None:
    def fails(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 2
        return " ".join(capsys.readouterr().err.split())

    small = "--widths 8 --groups 4 --level-dim 16 --batch-size 16 --steps 1 --device cpu --validation-share 0"
    common = [*small.split(), "--dataset", str(demonstrations)]
    assert main(["train", *common, "--output", str(tmp_path / "policy"), "--noise-levels", "10"]) == 0
    assert main(["train-classifier", *common, "--output", str(tmp_path / "other"), "--noise-levels", "20"]) == 0
    assert main(["train-classifier", *common, "--output", str(tmp_path / "classifier"), "--noise-levels", "10"]) == 0
    acting = ["evaluate", "--checkpoint", str(tmp_path / "policy"), "--output", str(tmp_path / "x"), "--device", "cpu"]
    for run, mode, why in (
        ("policy", "left", f"--classifier needs a run of train-classifier; {tmp_path}/policy is none"),
        ("other", "left", "a classifier has the noise-levels of the policy, 10; got 20"),
        ("classifier", "sideways", "classifier-mode must be one of"),
    ):
        told = fails(*acting, "--classifier", str(tmp_path / run), "--classifier-mode", mode)
        assert why in told
    assert "this is a classifier, which guides a policy" in fails(
        "evaluate", "--checkpoint", str(tmp_path / "classifier"), "--output", str(tmp_path / "y"), "--device", "cpu"
    )
    assert "train-classifier has no other objective" in fails(
        "train-classifier", *common, "--output", str(tmp_path / "z"), "--objective", "mip"
    )
    with pytest.raises(ConfigError, match="classifier and classifier-mode go together; got runs/c and None"):
        CostConfig(classifier="runs/c")
    with pytest.raises(ConfigError, match="classifying is of modes: it needs condition-on-mode"):
        with_options(TINY, objective="classifying")
