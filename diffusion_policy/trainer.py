"""The one training loop: AdamW, a cosine learning rate with warm-up, gradient clipping, averaged weights, validation.

Knows a policy and windows. Display, trackers and checkpoints come in as a callback.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from diffusion_policy.config import TrainConfig
from diffusion_policy.datasets.windows import StreamedWindows, Windows
from diffusion_policy.policy import DiffusionPolicy, derive_generator

VALIDATION_WINDOWS = 2048
"""At most so many windows are looked at in a validation."""


class Progress(NamedTuple):
    """What is known after a training step."""

    step: int
    """Steps done, from 1."""
    loss: float
    """Training loss, averaged over the steps since the last report."""
    validation_loss: float | None
    """Loss of the averaged weights on held-out episodes, with the same noise each time; None between validations."""
    learning_rate: float
    gradient_norm: float
    """Before clipping, at this step."""
    steps_per_second: float


class Trainer:
    """Trains a policy. `averaged` holds the weights to act with."""

    def __init__(
        self,
        policy: DiffusionPolicy,
        windows: Windows | StreamedWindows,
        validation: Windows | None,
        config: TrainConfig,
    ) -> None:
        """`validation`: windows of held-out episodes, or None."""
        self.config = config
        self._policy = policy
        self._validation = validation
        self._optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.95, 0.999)
        )
        self._scheduler = LambdaLR(self._optimizer, lambda step: learning_rate_factor(step, config))
        self._averaged = AveragedModel(policy, avg_fn=self._average)
        self._generator = derive_generator(config.seed, 0)  # levels and noise
        self._batches = windows.batches(config.batch_size, config.seed)
        self.step = 0

    @property
    def averaged(self) -> DiffusionPolicy:
        """The policy with averaged weights."""
        policy = self._averaged.module
        assert isinstance(policy, DiffusionPolicy)
        return policy

    def run(
        self,
        on_progress: Callable[[Progress], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
        report_every: int = 10,
    ) -> None:
        """Train to the last step, or until `should_stop` between two steps; `on_progress` hears every `report_every`
        steps, at each validation and when a checkpoint is due. Raises FloatingPointError when loss or gradient is not
        finite."""
        losses: list[Tensor] = []
        since = time.perf_counter()
        self._policy.train()
        while self.step < self.config.steps and not should_stop():
            loss, gradient_norm = self._train_step()
            losses.append(loss)
            validate = self.step % self.config.validate_every == 0 or self.step == self.config.steps
            if validate or self.step % report_every == 0 or self.step % self.config.checkpoint_every == 0:
                mean_loss, norm = torch.stack([torch.stack(losses).mean(), gradient_norm]).tolist()
                if not (math.isfinite(mean_loss) and math.isfinite(norm)):
                    raise FloatingPointError(
                        f"by step {self.step} the loss became {mean_loss}, its gradient's norm {norm}; "
                        "lower the learning rate"
                    )
                rate = len(losses) / (time.perf_counter() - since)
                validation_loss = self.validate() if validate else None
                learning_rate = float(self._optimizer.param_groups[0]["lr"])
                on_progress(Progress(self.step, mean_loss, validation_loss, learning_rate, norm, rate))
                losses, since = [], time.perf_counter()

    def state(self) -> dict[str, Tensor]:
        """What training holds beside the averaged policy, by name: raw weights and the optimizer's moments."""
        weights = {f"weights.{name}": weight.contiguous() for name, weight in self._policy.state_dict().items()}
        names = [name for name, _ in self._policy.named_parameters()]
        moments = {
            f"optimizer.{names[index]}.{name}": torch.as_tensor(value).contiguous()
            for index, values in self._optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        return weights | moments

    def _train_step(self) -> tuple[Tensor, Tensor]:
        batch = next(self._batches)
        loss = self._policy.loss(batch.observations, batch.actions, self._generator, batch.modes)
        self._optimizer.zero_grad()
        loss.backward()
        gradient_norm = torch.nn.utils.clip_grad_norm_(self._policy.parameters(), self.config.gradient_clip)
        self._optimizer.step()
        self._scheduler.step()
        self._averaged.update_parameters(self._policy)
        self.step += 1
        return loss.detach(), gradient_norm

    @torch.no_grad()
    def validate(self) -> float | None:
        """Loss of the averaged weights on held-out windows, with noise that is the same at each call."""
        if self._validation is None:
            return None
        generator = derive_generator(self.config.seed, 2)
        chosen = torch.randperm(len(self._validation), generator=generator)[:VALIDATION_WINDOWS]
        total = 0.0
        for indices in chosen.split(self.config.batch_size):
            batch = self._validation.gather(indices)
            total += len(indices) * self.averaged.loss(batch.observations, batch.actions, generator, batch.modes).item()
        return total / len(chosen)

    def _average(self, averaged: Tensor, current: Tensor, _count: Tensor | int) -> Tensor:
        """Exponential average whose memory grows with the steps done."""
        keep = min(self.config.average_limit, 1 - (1 + self.step) ** -self.config.average_power)
        return torch.lerp(current, averaged, keep)


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Share of the highest learning rate: linear warm-up, then a cosine to 0 at the last step."""
    warmup_steps = min(config.warmup_steps, config.steps // 10)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / (config.steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
