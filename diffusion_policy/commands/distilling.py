"""What a training of a student needs beside that of another policy: its teacher, its losses and batches, and the guard
over its modes.

Knows checkpoints and policies. Writes nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.commands.options.train import Train
from diffusion_policy.commands.terminal import console, progress_bar
from diffusion_policy.config import OF_NOISE, OF_SEQUENCES, ConfigError, GuardName
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training.losses import OWN_LOSSES, Loss, denoising_loss
from diffusion_policy.training.students import LOSSES, Teacher, make_pairs, student_options
from diffusion_policy.training.trainer import BatchesOfWindows, Progress
from diffusion_policy.training.validation import VALIDATION_WINDOWS, Validation, make_validation, sample_shared

LEAST_SPREAD = 0.9
"""Of a student's plans, as a share of the spread of its teacher's."""


class Lessons(NamedTuple):
    """What the trainer is given."""

    windows: BatchesOfWindows
    """Or pairs."""
    loss: Loss
    validate: Callable[[DiffusionPolicy], Validation] | None = None
    """Where it is not that of the held-out windows."""


def complete(options: Train, device: torch.device) -> tuple[Train, Teacher | None]:
    """The options with those that follow from the student's, and its teacher. Raises ConfigError where they do not fit,
    CheckpointError where there is no teacher."""
    asked = options.training.distillation
    policy = student_options(options.policy, asked)
    if asked.teacher is None:
        return dataclasses.replace(options, policy=policy), None
    if options.training.noise_draws > 1:
        raise ConfigError(f"--noise-draws is for trainings without a teacher; got {options.training.noise_draws}")
    if asked.guard == "stop" and options.training.validation_share == 0:
        raise ConfigError("--guard stop hears of validations: it needs held-out episodes; got validation-share 0")
    folder = checkpoint.find(Path(asked.teacher))
    loaded = checkpoint.load(folder, device)
    if asked.teacher_weights not in (None, loaded.weights_sha256):
        raise ConfigError(f"{asked.teacher} has other weights than those of --teacher-weights {asked.teacher_weights}")
    set_by_it = [name for name, value in vars(policy).items() if value != getattr(options.policy, name)]
    if set_by_it:
        said = ", ".join(f"{name.replace('_', '-')} {getattr(policy, name)}" for name in set_by_it)
        console.print(f"as a student it has {said}", soft_wrap=True)
    teacher = Teacher(loaded.policy, asked.teacher_steps)
    _require_like(policy, loaded.policy.config)
    known = dataclasses.replace(
        asked,
        teacher=str(folder.resolve()),
        teacher_weights=loaded.weights_sha256,
        teacher_steps=teacher.sampling.sampling_steps,
    )
    training = dataclasses.replace(options.training, distillation=known)
    return dataclasses.replace(options, policy=policy, training=training), teacher


def _require_like(policy: Any, teacher: Any) -> None:
    """Raise ConfigError where a student could not see, plan or be noised as its teacher is."""
    told = "condition_on_mode", "condition_on_instruction"
    for name in (*OF_SEQUENCES, *told, *OF_NOISE):
        own, taught = getattr(policy, name), getattr(teacher, name)
        if own != taught:
            raise ConfigError(f"a student has the {name.replace('_', '-')} of its teacher, {taught}; got {own}")


def begin(policy: DiffusionPolicy, teacher: Teacher) -> None:
    """Give a new student its teacher's normalizer, and of its weights those that have the same place and shape. Raises
    ConfigError for a teacher that observes or does something else."""
    taught = teacher.policy
    for what, own, other in (
        ("observes", policy.shapes.observations, taught.shapes.observations),
        ("acts with", policy.shapes.action, taught.shapes.action),
        ("knows the modes", policy.modes, taught.modes),
        ("knows the instructions", policy.instructions, taught.instructions),
        ("knows embeddings of as many numbers as", policy.label_rows.size, taught.label_rows.size),
        ("knows the angles", policy.shapes.angles, taught.shapes.angles),
    ):
        if own != other:
            raise ConfigError(f"the teacher {what} {other}; of this dataset the student {what} {own}")
    policy.normalizer.load_state_dict(taught.normalizer.state_dict())
    policy.label_rows.load_state_dict(taught.label_rows.state_dict())
    for part in ("network", "encoders", "inverse"):
        learner, source = getattr(policy, part), getattr(taught, part)
        own = learner.state_dict() if learner else {}
        for name, weights in source.state_dict().items() if source else ():
            if name in own and own[name].shape == weights.shape:
                own[name].copy_(weights)


def make_lessons(
    options: Train, policy: DiffusionPolicy, teacher: Teacher | None, windows: Any, validation: Windows | None
) -> Lessons:
    """The batches, the loss and the validation of this training."""
    if teacher is None:
        return Lessons(windows, OWN_LOSSES.get(policy.config.objective, denoising_loss))
    asked, seed = options.training.distillation, options.training.seed
    assert asked.student is not None
    loss = LOSSES[asked.student](policy, teacher)
    held = None
    if asked.student == "pairs":
        _require_memory(options, policy)
        with progress_bar("pairs") as bar:
            task = bar.add_task("asking the teacher", total=asked.pairs, note="")
            windows = make_pairs(
                policy, teacher, windows, asked.pairs, asked.pair_noise, seed, lambda n: bar.update(task, completed=n)
            )
            if validation is not None:
                few = min(VALIDATION_WINDOWS, asked.pairs)
                held = make_pairs(policy, teacher, validation, few, asked.pair_noise, seed + 1)
    if validation is None:
        return Lessons(windows, loss)

    taught = partial(sample_shared, teacher.policy, levels=teacher.levels)
    validate = make_validation(validation, options.training, loss, lessons=held, teacher=taught)
    return Lessons(windows, loss, validate)


def _require_memory(options: Train, policy: DiffusionPolicy) -> None:
    """Raise ConfigError for more pairs than windows may take of the memory."""
    config, training = policy.config, options.training
    observed = config.observation_horizon * sum(math.prod(shape) for shape in policy.shapes.observations.values())
    jumps = 2 * config.student_steps * math.prod(policy.sequences.shape)
    needed = training.distillation.pairs * (8 * observed + 4 * jumps)
    if needed > training.memory_gb * 1e9:
        raise ConfigError(
            f"{training.distillation.pairs} pairs take {needed / 1e9:.1f} GB, --memory-gb is {training.memory_gb:g}; "
            "fewer --pairs"
        )


class Guard:
    """Hears of each validation, and says when a student's plans spread less than its teacher's, once half of the
    training is over."""

    def __init__(self, kind: GuardName, steps: int) -> None:
        """`steps`: of the training."""
        self._kind: GuardName = kind
        self._steps = steps
        self.reason = ""
        """Why the training is to stop; empty where it is not."""

    def hear(self, progress: Progress, say: Callable[[str], None]) -> None:
        """Take the numbers of a step."""
        spread = progress.teacher_spread
        if spread is None or self._kind == "off" or 2 * progress.step < self._steps or spread >= LEAST_SPREAD:
            return
        sentence = f"step {progress.step}: plans spread {spread:.2f} times as far as the teacher's: modes may be lost"
        say(sentence)
        if self._kind == "stop" and progress.step < self._steps:
            self.reason = sentence
