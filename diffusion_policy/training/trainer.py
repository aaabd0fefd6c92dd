"""The one training loop: AdamW, a cosine learning rate with warm-up, gradient clipping, EMA weights, validation.

All that is random in a step derives from the seed and the step's number, and is drawn for the whole batch. So what goes
on from a checkpoint, or is divided among processes or into parts of a batch, is the same training.

Knows a policy and windows. Display, trackers, rollouts and checkpoints come in as callbacks.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from diffusion_policy.config import PolicyConfig, SampleConfig, TrainConfig
from diffusion_policy.datasets.windows import Batch, Share, StreamedWindows, Windows
from diffusion_policy.diffusion.process import Part
from diffusion_policy.diffusion.samplers import SAMPLERS
from diffusion_policy.policy import DiffusionPolicy, derive_generator
from diffusion_policy.training.distributed import Distributed

VALIDATION_WINDOWS = 2048
"""At most so many windows are looked at in a validation, ..."""
SAMPLED_WINDOWS = 64
"""... and actions are sampled for so many of them, ..."""
SAMPLES = 4
"""... so many sequences for each (N) ..."""
SAMPLING_STEPS = 16
"""... in at most so many steps of DDIM."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Validation(NamedTuple):
    """What the EMA weights do on held-out windows, with the same noise each time."""

    loss: float
    action_error: float | None
    """Distance of a sampled action from the demonstrated one, in raw units, a mean over the Ta executed steps and N
    samples; None for a policy that must be told a mode."""
    action_error_best: float | None
    """The same of the best of N samples."""


class Progress(NamedTuple):
    """What is known after a training step."""

    step: int
    """Steps done, from 1."""
    loss: float
    """Training loss, averaged over the steps since the last report."""
    validation_loss: float | None
    """See `Validation`; None between validations."""
    action_error: float | None
    action_error_best: float | None
    success_rate: float | None
    """Of rollouts; None between them."""
    learning_rate: float
    gradient_norm: float
    """Before clipping, at this step."""
    steps_per_second: float


class Diverged(FloatingPointError):
    """The loss or its gradient is no longer finite."""

    def __init__(self, step: int, loss: float, gradient_norm: float, rows: np.ndarray | None) -> None:
        super().__init__(f"at step {step} the loss became {loss}, its gradient's norm {gradient_norm}")
        self.step = step
        self.rows = rows
        """Rows of the store that were *now* in the batch of that step, (B,)."""


class Trainer:
    """Trains a policy. `ema` holds the weights to act with."""

    def __init__(
        self,
        policy: DiffusionPolicy,
        windows: Windows | StreamedWindows,
        validation: Windows | None,
        config: TrainConfig,
        processes: Distributed | None = None,
        roll_out: Callable[[DiffusionPolicy], float | None] | None = None,
    ) -> None:
        """`validation`: windows of held-out episodes, or None; `processes`: those that train this policy together;
        `roll_out`: the success rate of a policy, None where it failed. Raises ValueError for windows that do not fit
        the policy, and for batches that cannot be divided so often."""
        for some in (windows, validation):
            if some is not None:
                _require_fit(policy, some)
        self.config = config
        self._processes = processes or Distributed()
        self._policy = policy
        self._windows, self._validation = windows, validation
        self._roll_out = roll_out
        self._optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.95, 0.999)
        )
        self._ema_model = AveragedModel(policy, avg_fn=self._average).eval()  # its buffers are those of the policy
        self._scaler = torch.amp.GradScaler(policy.device.type, enabled=config.precision == "fp16")
        self._share = Share(self._processes.index, self._processes.count)
        self._batch_size = min(config.batch_size, len(windows))
        if self._batch_size < config.accumulation * self._processes.count:
            raise ValueError(
                f"a batch of {self._batch_size} windows cannot be divided among {self._processes.count} processes in "
                f"{config.accumulation} parts each"
            )
        if config.compile:
            policy.network.compile()
        self._batches = windows.batches(config.batch_size, config.seed, 0, self._share)
        self._unreported: list[Tensor] = []  # loss and gradient norm of each step since the last report, (2,)
        self.step = 0

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self._processes.is_main

    @property
    def ema(self) -> DiffusionPolicy:
        """The policy with EMA weights."""
        policy = self._ema_model.module
        assert isinstance(policy, DiffusionPolicy)
        return policy

    def run(
        self,
        on_progress: Callable[[Progress], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
        report_every: int = 10,
    ) -> None:
        """Train to the last step, or until `should_stop` between two steps; `on_progress` hears every `report_every`
        steps, at each validation and rollout and when a checkpoint is due, also where it stops then, so that all is
        measured that would be without a stop. Of several processes, all stop when one should, at the next report.
        Raises Diverged when loss or gradient is not finite."""
        started, since = self.step, time.perf_counter()
        votes = torch.zeros((), device=self._policy.device)
        alone = self._processes.count == 1
        self._policy.train()
        while True:
            due = bool(self._unreported) and self._report_is_due(report_every)
            if due:
                self._report(on_progress, (self.step - started) / (time.perf_counter() - since))
                started, since = self.step, time.perf_counter()
            if self.step == self.config.steps or (should_stop() if alone else due and bool(votes)):
                break
            votes.fill_(float(not alone and should_stop()))
            self._train_step(votes)
        if self._unreported:
            self._figures()  # so that no checkpoint is made of weights that are not finite

    def state(self) -> dict[str, Tensor]:
        """What training holds beside the EMA policy and the number of steps, by name: raw weights, the optimizer's
        moments, the scale of fp16 and what the next report is to average."""
        weights = {f"weights.{name}": weight.contiguous() for name, weight in self._policy.state_dict().items()}
        names = [name for name, _ in self._policy.named_parameters()]
        moments = {
            f"optimizer.{names[index]}.{name}": torch.as_tensor(value).contiguous()
            for index, values in self._optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        scale = {f"scaler.{name}": torch.tensor(value) for name, value in self._scaler.state_dict().items()}
        return weights | moments | scale | ({"unreported": torch.stack(self._unreported)} if self._unreported else {})

    def restore(self, step: int, averaged: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Go on after `step` steps, from EMA weights and a `state`. Raises ValueError for those of another policy
        or another precision."""
        groups: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}, "scaler": {}, "unreported": {}}
        for name, tensor in state.items():
            kind, _, rest = name.partition(".")
            groups.setdefault(kind, {})[rest] = tensor
        names = [name for name, _ in self._policy.named_parameters()]
        moments = {
            index: {key: groups["optimizer"].get(f"{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
            for index, name in enumerate(names)
        }
        missing = [names[index] for index, values in moments.items() if any(v is None for v in values.values())]
        if missing and groups["optimizer"]:
            raise ValueError(f"the training's state lacks what the optimizer knew of {missing[0]}")
        if bool(groups["scaler"]) != self._scaler.is_enabled():
            raise ValueError(f"the training's state is not that of the precision {self.config.precision}")
        try:
            self._policy.load_state_dict(groups["weights"])
            self.ema.load_state_dict(dict(averaged))
        except RuntimeError as error:
            raise ValueError(f"the training's state is not that of this policy: {error}") from error
        if groups["optimizer"]:
            saved = {"state": moments, "param_groups": self._optimizer.state_dict()["param_groups"]}
            self._optimizer.load_state_dict(saved)
        if groups["scaler"]:
            self._scaler.load_state_dict({name: value.item() for name, value in groups["scaler"].items()})
        self._ema_model.n_averaged.fill_(step)
        self._unreported = list(groups["unreported"].get("", torch.empty(0, 2)).to(self._policy.device))
        self._batches = self._windows.batches(self.config.batch_size, self.config.seed, step, self._share)
        self.step = step

    def _train_step(self, votes: Tensor) -> None:
        """One step; `votes`, (), becomes the sum over all processes."""
        config, batch = self.config, next(self._batches)
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(self.step, config)
        self._optimizer.zero_grad()
        loss = torch.zeros((), device=self._policy.device)
        rows = len(batch.actions)
        for part in range(config.accumulation):
            first, last = Share(part, config.accumulation).of(rows)
            part_loss = self._part_of_loss(batch, first, last)
            self._scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        gradients = [weight.grad for weight in self._policy.parameters() if weight.grad is not None]
        self._processes.all_reduce_sum([*gradients, loss, votes])
        self._scaler.unscale_(self._optimizer)
        gradient_norm = torch.nn.utils.clip_grad_norm_(self._policy.parameters(), config.gradient_clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._ema_model.update_parameters(self._policy)
        self.step += 1
        self._unreported.append(torch.stack([loss, gradient_norm]))

    def _part_of_loss(self, batch: Batch, first: int, last: int) -> Tensor:
        """What rows `first` to `last` of this process's share contribute to the mean loss of the whole batch, ()."""
        observations = {key: values[first:last] for key, values in batch.observations.items()}
        modes = None if batch.modes is None else batch.modes[first:last]
        part = Part(self._share.of(self._batch_size)[0] + first, self._batch_size)
        generator = derive_generator("training noise", self.config.seed, self.step)
        with self._autocast():
            loss = self._policy.loss(observations, batch.actions[first:last], generator, modes, part)
        return loss * ((last - first) / self._batch_size)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        """The chosen precision."""
        dtype = DTYPES.get(self.config.precision)
        return torch.autocast(self._policy.device.type, dtype) if dtype else contextlib.nullcontext()

    def _report_is_due(self, report_every: int) -> bool:
        config = self.config
        periods = report_every, config.validate_every, config.checkpoint_every, config.rollout_every
        return self.step == config.steps or any(period and self.step % period == 0 for period in periods)

    def _report(self, on_progress: Callable[[Progress], None], steps_per_second: float) -> None:
        """Tell what is known after this step; only the main process looks at held-out windows and rolls out."""
        config, last = self.config, self.step == self.config.steps
        figures = self._figures()
        self._unreported = []
        if not self.is_main:
            return
        seen = self.validate() if last or self.step % config.validate_every == 0 else None
        roll_out = config.rollout_every and (last or self.step % config.rollout_every == 0)
        on_progress(
            Progress(
                self.step,
                float(np.mean([loss for loss, _ in figures])),
                *(seen or (None, None, None)),
                success_rate=self._roll_out(self.ema) if roll_out and self._roll_out else None,
                learning_rate=config.learning_rate * learning_rate_factor(self.step, config),
                gradient_norm=figures[-1][1],
                steps_per_second=steps_per_second,
            )
        )

    def _figures(self) -> list[list[float]]:
        """Loss and gradient norm of each step since the last report; raises Diverged when one is not finite. With fp16
        a gradient may overflow: its step is left out, and the scale lowered."""
        figures = torch.stack(self._unreported).tolist()
        for step, (loss, norm) in enumerate(figures, start=self.step - len(figures) + 1):
            if not math.isfinite(loss) or (not math.isfinite(norm) and not self._scaler.is_enabled()):
                batch = next(self._windows.batches(self.config.batch_size, self.config.seed, step - 1))
                raise Diverged(step, loss, norm, batch.rows)
        return figures

    @torch.no_grad()
    def validate(self) -> Validation | None:
        """Look at held-out windows; None where there are none."""
        if self._validation is None:
            return None
        generator = derive_generator("validation", self.config.seed)
        chosen = torch.randperm(len(self._validation), generator=generator)[:VALIDATION_WINDOWS]
        total = 0.0
        for indices in chosen.split(self.config.batch_size):
            batch = self._validation.gather(indices)
            total += len(indices) * self.ema.loss(batch.observations, batch.actions, generator, batch.modes).item()
        errors = self._action_errors(self._validation.gather(chosen[:SAMPLED_WINDOWS]))
        mean, best = (None, None) if errors is None else (errors.mean().item(), errors.amin(dim=1).mean().item())
        return Validation(total / len(chosen), mean, best)

    def _action_errors(self, batch: Batch) -> Tensor | None:
        """Distance of each sampled sequence from the demonstrated one, (B, N); see `Validation`."""
        policy, config = self.ema, self.ema.config
        if policy.modes and not config.condition_dropout:
            return None
        generators = [
            derive_generator("validation samples", self.config.seed, row) for row in range(len(batch.actions))
        ]
        sampled = policy.sample(batch.observations, generators, SAMPLES, quick_sampling(policy))  # (B, N, T, A)
        difference = sampled - batch.actions[:, None]
        for column in policy.shapes.angles.get("action", ()):
            difference[..., column] = torch.remainder(difference[..., column] + math.pi, 2 * math.pi) - math.pi
        first = config.observation_horizon - 1
        return difference[:, :, first : first + config.action_horizon].norm(dim=-1).mean(dim=-1)

    def _average(self, averaged: Tensor, current: Tensor, _count: Tensor | int) -> Tensor:
        """Exponential average whose memory grows with the steps done."""
        keep = min(self.config.ema_max_decay, 1 - (1 + self.step) ** -self.config.ema_power)
        return torch.lerp(current, averaged, keep)


def _require_fit(policy: DiffusionPolicy, windows: Windows | StreamedWindows) -> None:
    """Raise ValueError unless windows hold what a policy observes and does."""
    config, shapes = policy.config, policy.shapes
    needed = {key: (config.observation_horizon, *shape) for key, shape in shapes.observations.items()}
    needed["action"] = (config.prediction_horizon, *shapes.action)
    found = {key: shape for key, shape in windows.shapes.items() if key in needed}
    if found != needed:
        raise ValueError(f"the policy needs windows of {needed}; got {windows.shapes}")


def least_memory(config: PolicyConfig, windows: int) -> int:
    """Bytes that so many windows take at least while the network learns from them: each resolution keeps its channels
    some 16 times, for four residual blocks."""
    steps = config.prediction_horizon
    return 4 * 16 * windows * sum(width * (steps >> i) for i, width in enumerate(config.widths))


def quick_sampling(policy: DiffusionPolicy) -> SampleConfig:
    """How actions are sampled while a policy is trained: in 16 steps of DDIM, or as many as it has."""
    return SampleConfig(sampling_steps=min(SAMPLING_STEPS, policy.diffusion.most_steps(SAMPLERS["ddim"])))


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Share of the highest learning rate: linear warm-up, then a cosine to 0 at the last step."""
    warmup_steps = min(config.warmup_steps, config.steps // 10)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / (config.steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
