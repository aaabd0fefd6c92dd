"""What ties a network to diffusion: a schedule, a prediction and its loss. Training and sampling read both from here.

Knows tensors of any shape (B, ...) and a network (xt, level (B,), cond (B, C)) → output like xt. Knows no policy.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion_policy.diffusion.prediction import Prediction, loss_weight
from diffusion_policy.diffusion.samplers import Denoise, Levels, Sampler, langevin
from diffusion_policy.diffusion.schedules import Schedule, choose_levels
from diffusion_policy.diffusion.variance import LearnedVariance

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(xt (B, ..., A), level (B,), cond (B, C)) → output like xt, or (B, ..., 2 A) where a variance is learned."""


class Part(NamedTuple):
    """Where some rows stand in a batch that is computed in parts, on several processes or one after the other. Random
    numbers are drawn for the whole batch, so that the division does not change them."""

    first: int
    whole: int
    """Rows of the batch."""

    def of(self, drawn: Tensor, rows: int) -> Tensor:
        """Of what was drawn for the batch, (whole, ...), that for these rows, (rows, ...)."""
        return drawn[self.first : self.first + rows]


class Diffusion(nn.Module):
    """A schedule and a prediction, with their tables on the device. It has no weights and saves nothing."""

    def __init__(
        self, schedule: Schedule, prediction: Prediction, snr_gamma: float = 0.0, learn_variance: bool = False
    ) -> None:
        """`snr_gamma`: γ of the min-SNR loss weights; 0 weighs all levels alike. `learn_variance`: the network's last
        axis is twice as long, prediction first, then what says the variance of a step.

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

    def tables(self, level: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at one level, (), or at a level for each row (B,) of `like`, (B, 1, ...)."""
        alpha, sigma = (self.get_buffer(name)[level] for name in ("alpha", "sigma"))
        shape = (-1, *[1] * (like.ndim - 1)) if alpha.ndim else ()
        return alpha.reshape(shape), sigma.reshape(shape)

    def loss(
        self, network: Network, x0: Tensor, cond: Tensor, generator: torch.Generator, part: Part | None = None
    ) -> Tensor:
        """Mean squared error of the prediction at random levels (Ho et al. 2020, eq. 14), with the bound where a
        variance is learned, (); `generator` draws levels and noise, on the CPU, for the batch that these rows are
        `part` of."""
        part = part or Part(0, len(x0))
        level = part.of(torch.randint(len(self.schedule), (part.whole,), generator=generator), len(x0)).to(x0.device)
        eps = part.of(torch.randn((part.whole, *x0.shape[1:]), generator=generator), len(x0)).to(x0)
        alpha, sigma = self.tables(level, x0)
        xt = alpha * x0 + sigma * eps
        output, share = self._split(network(xt, level, cond))
        errors = (output - self.prediction.target(x0, eps, alpha, sigma)).square().flatten(1).mean(dim=1)  # (B,)
        losses = self.get_buffer("weight")[level] * errors
        if self.variance is not None and share is not None:
            predicted_x0, _ = self.prediction.decode(output, xt, alpha, sigma)
            losses = losses + self.variance.hybrid_term(share, x0, predicted_x0, level)
        return losses.mean()

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network says: the prediction, and the share of the larger variance where that is learned."""
        if self.variance is None:
            return output, None
        prediction, raw = output.chunk(2, dim=-1)
        return prediction, (raw + 1) / 2

    def denoiser(self, network: Network, cond: Tensor) -> Denoise:
        """The network under these conditions, as a function (xt, level) → x0."""

        silent = len(self.schedule) - 1 if self.prediction.needs_signal and self.schedule.ends_silent else None

        def denoise(xt: Tensor, level: int) -> Tensor:
            if level == silent:
                raise ValueError(f"level {level} holds no signal, so noise prediction cannot tell x0 there")
            rows = torch.full(xt.shape[:1], level, device=xt.device)
            output, _ = self._split(network(xt, rows, cond))
            return self.prediction.decode(output, xt, *self.tables(level, xt))[0]

        return denoise

    def learned_share(self, network: Network, cond: Tensor) -> Denoise | None:
        """What `ddpm` takes as `share`, which calls the network again; None where no variance is learned."""
        if self.variance is None:
            return None

        def share(xt: Tensor, level: int) -> Tensor:
            found = self._split(network(xt, torch.full(xt.shape[:1], level, device=xt.device), cond))[1]
            assert found is not None
            return found

        return share

    def most_steps(self, sampler: Sampler) -> int:
        """Levels that this sampler can start from: not a last one without signal where it or the prediction needs
        some."""
        needs_signal = self.prediction.needs_signal or sampler.needs_signal
        return len(self.schedule) - (needs_signal and self.schedule.ends_silent)

    def choose_levels(self, sampler: Sampler, steps: int, spacing: str = "trailing") -> list[int]:
        """Levels to sample on: without a last level that holds no signal where prediction or sampler need some."""
        return choose_levels(self.schedule, steps, spacing, self.most_steps(sampler) < len(self.schedule))

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
        correct = None
        if corrector_steps:
            rows = noise[-corrector_steps * len(levels) :].unflatten(0, (corrector_steps, len(levels)))
            correct = langevin(denoise, self.schedule, levels, rows, corrector_size)
        return sampler.function(denoise, noise[0], self.schedule, levels, own, correct=correct)


def count_draws(sampler: Sampler, levels: Levels, corrector_steps: int = 0) -> int:
    """Rows of noise that `Diffusion.sample` needs."""
    return 1 + len(levels) * (sampler.needs_noise + corrector_steps)
