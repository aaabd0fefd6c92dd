"""Students of a small policy: what they are taught, how they are sampled, and what is refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_policy.config import (
    ConfigError,
    DistillationConfig,
    PolicyConfig,
    SampleConfig,
    TrainConfig,
    TransformerConfig,
    with_options,
)
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.diffusion.distillation import Ladder
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training.students import LOSSES, Pairs, Teacher, make_pairs, student_options
from diffusion_policy.training.trainer import Trainer
from diffusion_policy.training.validation import compare_plans

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch.func.jvp

CONFIG = with_options(
    PolicyConfig(), widths=(8, 16), level_dim=8, groups=4, noise_levels=64, prediction_horizon=8, action_horizon=4
)


def data(steps: int = 200) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    state = rng.uniform(-1, 1, (steps, 3)).astype(np.float32)
    action = np.where(rng.random((steps, 1)) < 0.5, 1, -1) * np.ones((steps, 2), np.float32)
    return {"state": state, "action": (action + 0.05 * rng.standard_normal((steps, 2))).astype(np.float32)}


def windows() -> Windows:
    return Windows(data(), np.array([100, 200]), [0, 1], 2, 8)


def make(config: PolicyConfig = CONFIG, seed: int = 0) -> DiffusionPolicy:
    torch.manual_seed(seed)
    return DiffusionPolicy.for_data(config, data())


def make_student(name: str, steps: int = 1, **options: object) -> tuple[DiffusionPolicy, PolicyConfig]:
    asked = DistillationConfig(teacher="t", student=name)  # pyright: ignore[reportArgumentType]
    config = student_options(dataclasses.replace(CONFIG, student_steps=steps, **options), asked)  # pyright: ignore
    return make(config, seed=1), config


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_pairs_hold_what_the_teacher_makes_of_the_same_noise(steps: int) -> None:
    teacher, (student, _) = Teacher(make(), 4), make_student("pairs", steps)
    pairs = make_pairs(student, teacher, windows(), 70, 0.0, seed=3)
    assert len(pairs) == 70
    batch = pairs.gather(torch.arange(70))
    policy = teacher.policy
    made = policy.denoise_from(
        batch.jumped.xts[:, 0][None], policy.encode(batch.observations), teacher.levels, teacher.sampling
    )
    ladder = Ladder(policy.diffusion.schedule, student.resolve_sampling(SampleConfig())[1])
    xt = batch.jumped.xts[:, 0]
    for i in range(steps):
        xt = ladder.jump(xt, batch.jumped.x0s[:, i], *(ladder.path[i + j].expand(70) for j in (0, 1)))
    assert torch.allclose(xt, made, atol=1e-4)


def test_pairs_repeat_by_seed_and_their_noise_is_in_normalized_numbers() -> None:
    teacher, (student, _) = Teacher(make(), 2), make_student("pairs")
    first, again, other = (make_pairs(student, teacher, windows(), 64, 0.1, seed) for seed in (0, 0, 1))
    all_of = [pairs.gather(torch.arange(64)) for pairs in (first, again, other)]
    assert torch.equal(all_of[0].jumped.x0s, all_of[1].jumped.x0s)
    assert not torch.equal(all_of[0].jumped.x0s, all_of[2].jumped.x0s)
    rows = {tuple(row) for row in data()["state"].round(4).tolist()}
    seen = all_of[0].observations["state"].reshape(-1, 3)
    assert not any(tuple(row) in rows for row in seen.numpy().round(4).tolist())
    clean = make_pairs(student, teacher, windows(), 64, 0.0, 0).gather(torch.arange(64)).observations["state"]
    moved = student.normalizer.normalize("state", seen) - student.normalizer.normalize("state", clean.reshape(-1, 3))
    assert moved.std() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    "name, network",
    [
        *((name, CONFIG.network) for name in LOSSES),
        ("meanflow", TransformerConfig(width=16, layers=1, heads=2, level_dim=8)),
    ],
)
def test_every_student_learns_by_the_one_trainer_and_is_sampled_in_its_steps(name: str, network: Any) -> None:
    teacher = Teacher(make(), 2)
    student, config = make_student(name, network=network)
    loss, lessons = LOSSES[name](student, teacher), windows()
    if name == "pairs":
        lessons = make_pairs(student, teacher, windows(), 64, 0.02, 0)
    training = TrainConfig(steps=30, batch_size=32, learning_rate=3e-3, warmup_steps=1, validate_every=100)
    losses: list[float] = []
    trainer = Trainer.for_policy(student, lessons, None, training, loss=loss)
    before = [weight.clone() for weight in teacher.policy.parameters()]
    trainer.run(lambda progress: losses.append(progress.loss), report_every=10)
    assert losses[-1] < losses[0]
    assert all(torch.equal(old, now) for old, now in zip(before, teacher.policy.parameters(), strict=True))
    rows = {"state": torch.zeros(3, 2, 3)}
    generators = [np.random.default_rng(i) for i in range(3)]
    assert trainer.ema.sample(rows, generators).shape == (3, 1, 8, 2)
    assert trainer.ema.complete(SampleConfig()).sampling_steps == 1
    assert config.is_few_step
    with pytest.raises(ValueError, match="is sampled by ddim with trailing levels, without eta, corrector and jump"):
        trainer.ema.resolve_sampling(SampleConfig(sampler="heun"))


@pytest.mark.parametrize("name", ["pairs", "progressive", "consistency"])
def test_a_student_is_asked_for_its_own_steps_alone(name: str) -> None:
    student, _ = make_student(name, 2)
    assert student.resolve_sampling(SampleConfig())[1] == [63, 31]
    with pytest.raises(ValueError, match="this policy was trained for sampling steps 2; got 16"):
        student.resolve_sampling(SampleConfig(sampling_steps=16))


def test_what_no_student_can_be_is_refused() -> None:
    for given in ({"student": "pairs"}, {"teacher": "t"}):
        with pytest.raises(ConfigError, match="--teacher and --student belong together"):
            student_options(CONFIG, DistillationConfig(**given))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="these are options of a student, which has a --teacher and a --student"):
        student_options(CONFIG, DistillationConfig(pairs=5))
    with pytest.raises(ConfigError, match="--pairs and --pair-noise are options of the student"):
        student_options(CONFIG, DistillationConfig(teacher="t", student="meanflow", pairs=5))
    with pytest.raises(ConfigError, match="student-steps are those of a student"):
        student_options(dataclasses.replace(CONFIG, student_steps=2), DistillationConfig())
    with pytest.raises(ConfigError, match="the student pairs has the objective denoising; got --objective shortcut"):
        make_student("pairs", objective="shortcut")
    with pytest.raises(ConfigError, match="a teacher denoises; this one has the objective regression"):
        Teacher(make(dataclasses.replace(CONFIG, objective="regression")))
    student, _ = make_student("pairs", 3)
    with pytest.raises(ConfigError, match="teacher-steps must be a multiple of the 3 student-steps; got 4"):
        make_pairs(student, Teacher(make(), 4), windows(), 8, 0.0, 0)
    with pytest.raises(ConfigError, match="teacher-steps must be a multiple of the 3 student-steps; got 8"):
        LOSSES["consistency"](student, Teacher(make()))
    taught = Teacher(make_student("pairs", 2)[0])
    assert taught.sampling.sampling_steps == 2
    with pytest.raises(ConfigError, match=r"needs a teacher that takes twice its steps: .* sampling steps 2; got 4"):
        LOSSES["progressive"](make_student("progressive", 2)[0], taught)
    LOSSES["progressive"](make_student("progressive", 1)[0], taught)


def test_agreement_and_spread_tell_lost_modes() -> None:
    generator = torch.Generator().manual_seed(0)
    sides = torch.where(torch.rand(64, 1, 1, generator=generator) < 0.5, 1.0, -1.0)
    taught = sides * torch.ones(64, 8, 2)
    near = taught + 0.05 * torch.randn(64, 8, 2, generator=generator)
    agreement, spread = compare_plans(near, taught, 8)
    assert agreement == 1
    assert spread == pytest.approx(1, abs=0.1)
    agreement, spread = compare_plans(taught.abs(), taught, 8)  # one mode alone
    assert agreement == pytest.approx(float((sides > 0).float().mean()))
    assert spread == 0
    agreement, _ = compare_plans(-taught, taught, 8)  # both modes, and each the wrong one
    assert agreement == 0


def test_pairs_come_in_batches_as_windows_do() -> None:
    teacher, (student, _) = Teacher(make(), 2), make_student("pairs")
    pairs = make_pairs(student, teacher, windows(), 40, 0.0, 0)
    assert isinstance(pairs, Pairs)
    assert pairs.shapes == windows().shapes
    whole = pairs.batches(16, seed=0)
    first, second, third = (next(whole) for _ in range(3))
    later = next(pairs.batches(16, seed=0, first_step=2))
    assert torch.equal(third.jumped.xts, later.jumped.xts)
    together = torch.cat([first.jumped.xts, second.jumped.xts]).flatten(1)
    assert len(together.unique(dim=0)) == 32
    assert torch.equal(first.part(3, 5).jumped.x0s, first.jumped.x0s[3:5])
