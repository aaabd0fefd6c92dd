"""What ties a network to diffusion: a schedule, a prediction and its loss. Training and sampling read both from here.

Knows tensors of any shape (B, ...) and what a network promises. Knows no policy.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffusion_policy.diffusion.prediction import Prediction, loss_weight
from diffusion_policy.diffusion.samplers import SAMPLERS, Denoise, Levels, Sampler, langevin
from diffusion_policy.diffusion.schedules import Schedule, choose_levels
from diffusion_policy.diffusion.variance import LearnedVariance

USUAL_STEPS = 16
"""Sampling steps where nothing else is asked for."""


class Films(Protocol):
    """What noise levels and conditions say to the layers of a network: all that does not depend on xt. Their parts add
    up."""

    @property
    def of_levels(self) -> tuple[Tensor, ...]:
        """A layer each, (L, features)."""
        ...

    @property
    def of_cond(self) -> tuple[Tensor, ...]:
        """A layer each, (B, features)."""
        ...

    def at(self, level: int) -> Sequence[Tensor]:
        """That of the i-th of the levels for every row, (B, features) a layer."""
        ...


class Network(Protocol):
    """Predicts from noised sequences. `network(xt, level, cond)`, with a level for each row (B,), is what it learns."""

    def __call__(self, xt: Tensor, level: Tensor, cond: Tensor) -> Tensor:
        """xt (B, ..., D), level (B,), cond (B, C) → like xt, or (B, ..., 2 D) where a variance is learned."""
        ...

    def condition(self, level: Tensor, cond: Tensor) -> Films:
        """For levels (L,) that all rows share, and conditions (B, C); computed once a plan."""
        ...

    def denoise(self, xt: Tensor, films: Sequence[Tensor]) -> Tensor:
        """As called, under `films.at` one level."""
        ...

    def undecayed_parameters(self) -> Sequence[nn.Parameter]:
        """Those that take no weight decay in training."""
        ...


class Noising(NamedTuple):
    """What is drawn to noise some sequences, of a whole batch: so that a division of the batch does not change it."""

    level: Tensor
    """(B,) int64, or what else an objective draws for each row."""
    eps: Tensor
    """(B, ..., D)"""
    known: Tensor | None = None
    """Steps that the network is given clean and marked, and that its loss leaves out, (B, T, 1) bool."""
    counted: Tensor | None = None
    """Steps that the loss is a mean over, (B, T, 1) bool; by default all. It leaves out what was never demonstrated."""
    held: Tensor | None = None
    """Numbers that stay clean at every level, and that the loss leaves out, (T, D) bool, of every row."""


class Diffusion(nn.Module):
    """A schedule and a prediction, with their tables on the device. It has no weights and saves nothing."""

    level_inputs = 1
    """Numbers by which the network is told a level."""
    starts_at_zero = False
    """Whether sampling starts from zeros instead of noise."""

    def __init__(
        self,
        schedule: Schedule,
        prediction: Prediction,
        snr_gamma: float = 0.0,
        learn_variance: bool = False,
        trained_steps: Sequence[int] = (),
    ) -> None:
        """`snr_gamma`: γ of the min-SNR loss weights; 0 weighs all levels alike. `learn_variance`: the network's last
        axis is twice as long, prediction first, then what says the variance of a step. `trained_steps`: numbers of
        sampling steps that it can be sampled in, the usual one first; empty for any.

        Raises ValueError for a learned variance where a level without signal cannot be decoded.
        """
        super().__init__()
        if learn_variance and prediction.needs_signal and schedule.ends_silent:
            raise ValueError("learn-variance with noise prediction needs a schedule that holds signal at every level")
        self.schedule = schedule
        self.prediction = prediction
        weight = loss_weight(prediction, schedule.alpha, schedule.sigma, snr_gamma)
        for name, table in (("alpha", schedule.alpha), ("sigma", schedule.sigma), ("weight", weight)):
            self.register_buffer(name, table.float(), persistent=False)  # (K,)
        self.variance = LearnedVariance(schedule) if learn_variance else None
        self.trained_steps = tuple(trained_steps)

    def count_outputs(self, target_dim: int, labels: int) -> int:
        """Numbers that the network says of each step of a sequence of D = `target_dim` numbers, in data of so many
        modes."""
        return (1 if self.variance is None else 2) * target_dim

    def tables(self, level: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at one level, (), or at a level for each row (B,) of `like`, (B, 1, ...)."""
        alpha, sigma = (self.get_buffer(name)[level] for name in ("alpha", "sigma"))
        shape = (-1, *[1] * (like.ndim - 1)) if alpha.ndim else ()
        return alpha.reshape(shape), sigma.reshape(shape)

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Noising:
        """Levels and noise for sequences of this shape (B, ..., D), on the CPU."""
        level = torch.randint(len(self.schedule), (shape[0],), generator=generator)
        return Noising(level, torch.randn(*shape, generator=generator))

    def loss(self, network: Network, x0: Tensor, cond: Tensor, noising: Noising) -> Tensor:
        """Squared error of the prediction (Ho et al. 2020, eq. 14) for each row, with the bound where a variance is
        learned, (B,)."""
        level, eps = noising.level.to(x0.device), noising.eps.to(x0)
        alpha, sigma = self.tables(level, x0)
        xt, known = alpha * x0 + sigma * eps, noising.known
        if known is not None:
            known = known.to(x0.device)
            xt = torch.where(known, x0, xt)
        if noising.held is not None:
            xt = torch.where(noising.held, x0, xt)
        marked = xt if known is None else torch.cat([xt, known.to(xt)], dim=-1)
        output, share = self._split(network(marked, level, cond))
        counted = noising.counted
        if known is not None:
            counted = ~known if counted is None else ~known & counted
        errors = output - self.prediction.target(x0, eps, alpha, sigma)
        if noising.held is not None:
            errors = errors.masked_fill(noising.held, 0) / (1 - noising.held.float().mean()).sqrt()
        errors = mean_square(errors, counted)  # (B,)
        losses = self.get_buffer("weight")[level] * errors
        if self.variance is not None and share is not None:
            predicted_x0, _ = self.prediction.decode(output, xt, alpha, sigma)
            predicted_x0 = predicted_x0 if known is None else torch.where(known, x0, predicted_x0)
            losses = losses + self.variance.hybrid_term(share, x0, predicted_x0, level)
        return losses

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network says: the prediction, and the share of the larger variance where that is learned."""
        if self.variance is None:
            return output, None
        prediction, raw = output.chunk(2, dim=-1)
        return prediction, (raw + 1) / 2

    def decode(self, outputs: Denoise) -> Denoise:
        """What the network's outputs mean: (xt, level) → output becomes (xt, level) → x0."""
        silent = len(self.schedule) - 1 if self.prediction.needs_signal and self.schedule.ends_silent else None

        def denoise(xt: Tensor, level: int) -> Tensor:
            if isinstance(level, int) and level == silent:
                raise ValueError(f"level {level} holds no signal, so noise prediction cannot tell x0 there")
            output, _ = self._split(outputs(xt, level))
            return self.prediction.decode(output, xt, *self.tables(level, xt))[0]

        return denoise

    def denoiser(self, network: Network, cond: Tensor, levels: Levels | None = None) -> Denoise:
        """The network under these conditions (B, C), as a function (xt, level) → x0 for `levels`, by default all."""
        return self.decode(self.condition(network, cond, levels))

    def learned_share(self, outputs: Denoise) -> Denoise | None:
        """What `ddpm` takes as `share`, of the network's outputs; None where no variance is learned."""
        if self.variance is None:
            return None

        def share(xt: Tensor, level: int) -> Tensor:
            found = self._split(outputs(xt, level))[1]
            assert found is not None
            return found

        return share

    def condition(self, network: Network, cond: Tensor, levels: Levels | None = None) -> Denoise:
        """The network's output under these conditions (B, C), (xt, level) → like xt, for `levels`, by default all; what
        does not depend on xt is computed here, once."""
        chosen = range(len(self.schedule)) if levels is None else levels
        places = {level: place for place, level in enumerate(chosen)}
        films = network.condition(self.list_levels(chosen), cond)
        return lambda xt, level: network.denoise(xt, films.at(places[level]))

    def list_levels(self, levels: Levels) -> Tensor:
        """Levels as a tensor on the device, made without waiting for it, (L,) int64."""
        device = self.get_buffer("alpha").device
        if levels == range(len(self.schedule)):
            return torch.arange(len(self.schedule), device=device)
        return torch.cat([torch.full((1,), level, device=device) for level in levels])

    def most_steps(self, sampler: Sampler) -> int:
        """Levels that this sampler can start from: not a last one without signal where it or the prediction needs
        some."""
        needs_signal = self.prediction.needs_signal or sampler.needs_signal
        return len(self.schedule) - (needs_signal and self.schedule.ends_silent)

    def choose_steps(self, sampler: Sampler, steps: int | None) -> int:
        """The number of sampling steps; where none is asked for, the usual one. Raises ValueError for one that it was
        not trained for."""
        if steps is None:
            return self.trained_steps[0] if self.trained_steps else min(USUAL_STEPS, self.most_steps(sampler))
        if self.trained_steps and steps not in self.trained_steps:
            allowed = ", ".join(map(str, sorted(self.trained_steps)))
            raise ValueError(f"this policy was trained for sampling steps {allowed}; got {steps}")
        return steps

    def choose_levels(
        self, sampler: Sampler, steps: int, spacing: str = "trailing", jump_from: float = 0.0
    ) -> list[int]:
        """Levels to sample on (see `schedules.choose_levels`): without a last level that holds no signal where
        prediction or sampler need some."""
        return choose_levels(self.schedule, steps, spacing, self.most_steps(sampler) < len(self.schedule), jump_from)

    def ddim_levels(self, steps: int | None = None) -> list[int]:
        """Levels of so many steps of DDIM, by default the usual ones. Raises ValueError for what it cannot take."""
        ddim = SAMPLERS["ddim"]
        return self.choose_levels(ddim, self.choose_steps(ddim, steps))

    def adapt(self, sampler: Sampler) -> Sampler:
        """A sampler as this objective takes its steps: as it is."""
        return sampler

    def sample(
        self,
        denoise: Denoise,
        noise: Tensor,
        sampler: Sampler,
        levels: Levels,
        corrector_steps: int = 0,
        corrector_size: float = 0.05,
    ) -> Tensor:
        """Run a sampler, with Langevin steps after each of its steps if asked.

        `noise` (draws, B, ...): xT, then len(levels) rows if the sampler needs noise, then len(levels) rows for each
        Langevin step; raises ValueError unless there are as many as `count_draws` says.
        """
        draws = count_draws(sampler, levels, corrector_steps)
        if len(noise) != draws:
            raise ValueError(f"this needs {draws} draws of noise; got {len(noise)}")
        own = noise[1 : 1 + len(levels)] if sampler.needs_noise else None
        hooks = []
        if corrector_steps:
            rows = noise[-corrector_steps * len(levels) :].unflatten(0, (corrector_steps, len(levels)))
            hooks.append(langevin(denoise, self.schedule, levels, rows, corrector_size))
        start = torch.zeros_like(noise[0]) if self.starts_at_zero else noise[0]
        return sampler(denoise, start, self.schedule, levels, own, hooks)

    def tabulate(
        self, sampler: Sampler, levels: Levels, corrector_steps: int = 0, corrector_size: float = 0.05
    ) -> "SamplingTable":
        """`sample` as a table, found by running it on unit vectors: one for each draw of noise and for each x0."""
        draws = count_draws(sampler, levels, corrector_steps)
        called: list[int] = []
        inputs: list[Tensor] = []

        def denoise(xt: Tensor, level: int) -> Tensor:
            called.append(level)
            inputs.append(xt)
            x0 = torch.zeros_like(xt)
            x0[..., min(draws + len(called), x0.shape[-1]) - 1] = 1
            return x0

        def run(width: int) -> Tensor:
            called.clear()
            inputs.clear()
            noise = torch.eye(draws, width, dtype=torch.float64)[:, None]  # (draws, 1, width)
            return self.sample(denoise, noise, sampler, levels, corrector_steps, corrector_size)

        run(draws)  # how often it denoises is known afterwards
        last = run(draws + len(called))
        of_noise, of_x0 = torch.cat([*inputs, last]).tensor_split([draws], dim=1)
        return SamplingTable(called, of_noise, of_x0)


class SamplingTable(NamedTuple):
    """A sampler as numbers. Every sequence that is denoised, and the clean one at the end, is a weighted sum of the
    noise that was drawn and of what was denoised before: so runtimes need no formula."""

    levels: list[int]
    """Of each call of the denoiser, (E,)."""
    of_noise: Tensor
    """What each drawn noise adds to the input of each call, and to the result, (E + 1, draws) float64."""
    of_x0: Tensor
    """What each x0 adds to the input of each later call, and to the result, (E + 1, E) float64; zeros from its own call
    back."""


def mean_square(errors: Tensor, counted: Tensor | None = None) -> Tensor:
    """Of each row, (B, ...) → (B,); over the `counted` steps (B, T, 1) alone, of a row without any 0."""
    if counted is None:
        return errors.square().flatten(1).mean(dim=1)
    share = counted.float().mean(dim=1, keepdim=True).clamp(min=1 / counted.shape[1])
    return (errors.square() * counted / share).flatten(1).mean(dim=1)


def count_draws(sampler: Sampler, levels: Levels, corrector_steps: int = 0) -> int:
    """Rows of noise that `Diffusion.sample` needs."""
    return 1 + len(levels) * (sampler.needs_noise + corrector_steps)
