"""The one training loop: AdamW, a cosine learning rate with warm-up, gradient clipping, EMA weights.

All that is random in a step derives from the seed and the step's number, and is drawn for the whole batch. So what goes
on from a checkpoint, or is divided among processes or into parts of a batch, is the same training.

Between two reports nothing reads a number from the device, so the next steps are prepared while a GPU still computes.

What is learned comes in: the model, its batches, the loss, what is drawn for it, validation and rollouts. Display,
trackers and checkpoints come in as callbacks.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from diffusion_policy.basics.streams import derive_entropy
from diffusion_policy.config import TrainConfig
from diffusion_policy.datasets.windows import Shard, Windows
from diffusion_policy.networks.sequences import TARGET
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training.distributed import Distributed
from diffusion_policy.training.losses import Loss, denoising_loss, derive_generator, draw
from diffusion_policy.training.validation import Validation, make_validation

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FUSED = ("cpu", "cuda")
"""Devices on which AdamW is one kernel in every torch that we allow."""


class Batches(Protocol):
    """Where batches come from, such as `Windows`."""

    def __len__(self) -> int:
        """How many rows there are; a batch has no more."""
        ...

    def batches(self, batch_size: int, seed: int, first_step: int = 0, shard: Shard = ...) -> Iterator[Any]:
        """Batches for ever, from that of step `first_step` on; of each the rows of `shard`. A batch has `part(first,
        last)`, some of its rows, and `rows`, where in the data they come from, or None."""
        ...


class BatchesOfWindows(Batches, Protocol):
    """Those of `Windows`, or streamed."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What a batch holds of each window, (To, ...) of each observation key and (T, A) of the target."""
        ...


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
    teacher_agreement: float | None
    teacher_spread: float | None
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
    """Trains a model. `ema` holds the weights to act with."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        config: TrainConfig,
        loss: Callable[[Any, Any, Any], Tensor],
        draw: Callable[[Any, int, torch.Generator], Any],
        *,
        undecayed: Collection[nn.Parameter] = (),
        distributed: Distributed | None = None,
        validate: Callable[[Any], Validation] | None = None,
        roll_out: Callable[[Any], float | None] | None = None,
    ) -> None:
        """`draw(model, rows, generator)`: the random numbers of a batch, with `rows(first, last)`, those of some of its
        rows; `loss(model, batch, draws)`: of each row, (B,); `undecayed`: parameters without weight decay;
        `distributed`: the processes that train this model together; `validate`, `roll_out`: what the EMA weights do
        on held-out data, and their success rate, None where it could not be measured. Raises ValueError for batches
        that cannot be divided so often."""
        self.config, self.step = config, 0
        self._distributed = distributed or Distributed()
        self._model, self._source = model, batches
        self._loss, self._draw, self._validate, self._roll_out = loss, draw, validate, roll_out
        self._device = next(model.parameters()).device
        self._optimizer = _make_optimizer(model, undecayed, config, self._device)
        self._ema = copy.deepcopy(model).eval()
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=config.precision == "fp16")
        self._batch_size = min(config.batch_size, len(batches))
        if self._batch_size < config.accumulation * self._distributed.world_size:
            raise ValueError(
                f"a batch of {self._batch_size} windows cannot be divided among {self._distributed.world_size} "
                f"processes in {config.accumulation} parts each"
            )
        self._batches = batches.batches(config.batch_size, config.seed, 0, self._distributed.shard)
        self._unreported: list[Tensor] = []  # loss and gradient norm of each step since the last report, (2,)

    @classmethod
    def for_policy(
        cls,
        policy: DiffusionPolicy,
        windows: BatchesOfWindows,
        validation: Windows | None,
        config: TrainConfig,
        *,
        loss: Loss = denoising_loss,
        validate: Callable[[DiffusionPolicy], Validation] | None = None,
        distributed: Distributed | None = None,
        roll_out: Callable[[DiffusionPolicy], float | None] | None = None,
    ) -> Trainer:
        """For a policy and its windows; `validation`: windows of held-out episodes, or None; `validate`: what is done
        with them instead of `make_validation`. Raises ValueError for windows that do not fit the policy."""
        for some in (windows, validation):
            if some is not None:
                _require_fit(policy, some)
        if config.compile:
            policy.network.compile()
        if validate is None and validation is not None:
            validate = make_validation(validation, config, loss)
        undecayed = policy.network.undecayed_parameters()
        return cls(
            policy,
            windows,
            config,
            loss,
            partial(draw, repeats=config.noise_draws),
            undecayed=undecayed,
            distributed=distributed,
            validate=validate,
            roll_out=roll_out,
        )

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self._distributed.is_main

    @property
    def ema(self) -> Any:
        """The model with EMA weights."""
        return self._ema

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
        votes = torch.zeros((), device=self._device)
        alone = self._distributed.world_size == 1
        self._model.train()
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
        weights = {f"weights.{name}": weight.contiguous() for name, weight in self._model.state_dict().items()}
        names = self._names_in_optimizer()
        moments = {
            f"optimizer.{names[index]}.{name}": torch.as_tensor(value).contiguous()
            for index, values in self._optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        scale = {f"scaler.{name}": torch.tensor(value) for name, value in self._scaler.state_dict().items()}
        return weights | moments | scale | ({"unreported": torch.stack(self._unreported)} if self._unreported else {})

    def restore(self, step: int, ema: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Go on after `step` steps, from EMA weights and a `state`. Raises ValueError for those of another policy
        or another precision."""
        groups: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}, "scaler": {}, "unreported": {}}
        for name, tensor in state.items():
            kind, _, rest = name.partition(".")
            groups.setdefault(kind, {})[rest] = tensor
        names = self._names_in_optimizer()
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
            self._model.load_state_dict(groups["weights"])
            self.ema.load_state_dict(dict(ema))
        except RuntimeError as error:
            raise ValueError(f"the training's state is not that of this policy: {error}") from error
        if groups["optimizer"]:
            saved = {"state": moments, "param_groups": self._optimizer.state_dict()["param_groups"]}
            self._optimizer.load_state_dict(saved)
        if groups["scaler"]:
            self._scaler.load_state_dict({name: value.item() for name, value in groups["scaler"].items()})
        self._unreported = list(groups["unreported"].get("", torch.empty(0, 2)).to(self._device))
        self._batches = self._source.batches(self.config.batch_size, self.config.seed, step, self._distributed.shard)
        self.step = step

    def _names_in_optimizer(self) -> list[str]:
        """Names of the parameters in the order in which the optimizer counts them."""
        names = {id(weight): name for name, weight in self._model.named_parameters()}
        return [names[id(weight)] for group in self._optimizer.param_groups for weight in group["params"]]

    def _train_step(self, votes: Tensor) -> None:
        """One step; `votes`, (), becomes the sum over all processes."""
        config, batch = self.config, next(self._batches)
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(self.step, config)
        self._optimizer.zero_grad()
        self._seed_layers()
        generator = derive_generator("training noise", config.seed, self.step)
        draws = self._draw(self._model, self._batch_size, generator)
        start, stop = self._distributed.shard.of(self._batch_size)
        loss = torch.zeros((), device=self._device)
        for part in range(config.accumulation):
            first, last = Shard(part, config.accumulation).of(stop - start)
            with self._autocast():
                losses = self._loss(self._model, batch.part(first, last), draws.rows(start + first, start + last))
            part_loss = losses.sum() / self._batch_size
            self._scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        gradients = [weight.grad for weight in self._model.parameters() if weight.grad is not None]
        self._distributed.all_reduce_sum([*gradients, loss, votes])
        self._scaler.unscale_(self._optimizer)
        gradient_norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), config.gradient_clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._average()
        self.step += 1
        self._unreported.append(torch.stack([loss, gradient_norm]))

    def _seed_layers(self) -> None:
        """Seed torch's own generator, which dropout and random crops draw from, by seed, step and process."""
        entropy = derive_entropy("layers in training", self.config.seed, self.step, self._distributed.shard.rank)
        torch.manual_seed(int(entropy.generate_state(1)[0]))

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        """The chosen precision."""
        dtype = DTYPES.get(self.config.precision)
        return torch.autocast(self._device.type, dtype) if dtype else contextlib.nullcontext()

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
                *(seen or (None,) * len(Validation._fields)),
                success_rate=self._roll_out(self.ema) if roll_out and self._roll_out else None,
                learning_rate=config.learning_rate * learning_rate_factor(self.step, config),
                gradient_norm=figures[-1][1],
                steps_per_second=steps_per_second,
            )
        )

    def validate(self) -> Validation | None:
        """What the EMA weights do on held-out data; None where there is none."""
        return self._validate(self.ema) if self._validate else None

    def _figures(self) -> list[list[float]]:
        """Loss and gradient norm of each step since the last report; raises Diverged when one is not finite. With fp16
        a gradient may overflow: its step is left out, and the scale lowered."""
        figures = torch.stack(self._unreported).tolist()
        for step, (loss, norm) in enumerate(figures, start=self.step - len(figures) + 1):
            if not math.isfinite(loss) or (not math.isfinite(norm) and not self._scaler.is_enabled()):
                batch = next(self._source.batches(self.config.batch_size, self.config.seed, step - 1))
                raise Diverged(step, loss, norm, batch.rows)
        return figures

    @torch.no_grad()
    def _average(self) -> None:
        """Let the EMA weights follow: an exponential average whose memory grows with the steps done. The buffers are
        those of the model. (`AveragedModel` would wait for the device at each step.)"""
        keep = min(self.config.ema_max_decay, 1 - (1 + self.step) ** -self.config.ema_power)
        get_ema_multi_avg_fn(keep)(tuple(self._ema.parameters()), tuple(self._model.parameters()), self.step)
        for kept, current in zip(self._ema.buffers(), self._model.buffers(), strict=True):
            kept.copy_(current)


def _require_fit(policy: DiffusionPolicy, windows: BatchesOfWindows) -> None:
    """Raise ValueError unless windows hold what a policy observes and does."""
    config, shapes = policy.config, policy.shapes
    needed = {key: (config.observation_horizon, *shape) for key, shape in shapes.observations.items()}
    needed[TARGET] = (config.prediction_horizon, *shapes.row)
    needed = {key: shape for key, shape in needed.items() if key not in policy.images or not policy.is_frozen(key)}
    found = {key: shape for key, shape in windows.shapes.items() if key in needed}
    if found != needed:
        raise ValueError(f"the policy needs windows of {needed}; got {windows.shapes}")


def _make_optimizer(
    model: nn.Module, undecayed: Collection[nn.Parameter], config: TrainConfig, device: torch.device
) -> torch.optim.AdamW:
    """AdamW over what learns, without weight decay for some parameters."""
    kept = {id(weight) for weight in undecayed}
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in learned if id(weight) not in kept]},
        {"params": [weight for weight in learned if id(weight) in kept], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.95, 0.999),
        fused=device.type in FUSED,
    )


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Share of the highest learning rate: linear warm-up, then a cosine to 0 at the last step."""
    warmup_steps = min(config.warmup_steps, config.steps // 10)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / (config.steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
