"""What ties a network to diffusion: a schedule, a prediction and its loss. Training and sampling read both from here.

Knows tensors of any shape (B, ...) and a network (xt, level (B,), cond (B, C)) → output like xt. Knows no policy.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion_policy.prediction import Prediction, loss_weight
from diffusion_policy.samplers import Denoise, Levels, Sampler, langevin
from diffusion_policy.schedules import Schedule, choose_levels

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(xt (B, ...), level (B,), cond (B, C)) → output like xt."""


class Diffusion(nn.Module):
    """A schedule and a prediction, with their tables on the device. It has no weights and saves nothing."""

    def __init__(self, schedule: Schedule, prediction: Prediction, snr_gamma: float = 0.0) -> None:
        """`snr_gamma`: γ of the min-SNR loss weights; 0 weighs all levels alike."""
        super().__init__()
        self.schedule = schedule
        self.prediction = prediction
        weight = loss_weight(prediction, schedule.alpha, schedule.sigma, snr_gamma)
        for name, table in (("alpha", schedule.alpha), ("sigma", schedule.sigma), ("weight", weight)):
            self.register_buffer(name, table.float(), persistent=False)  # (K,)

    def tables(self, level: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at one level, (), or at a level for each row (B,) of `like`, (B, 1, ...)."""
        alpha, sigma = (self.get_buffer(name)[level] for name in ("alpha", "sigma"))
        shape = (-1, *[1] * (like.ndim - 1)) if alpha.ndim else ()
        return alpha.reshape(shape), sigma.reshape(shape)

    def loss(self, network: Network, x0: Tensor, cond: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the prediction at random levels (Ho et al. 2020, eq. 14), (); `generator` draws levels
        and noise, on the CPU."""
        level = torch.randint(len(self.schedule), x0.shape[:1], generator=generator).to(x0.device)
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        alpha, sigma = self.tables(level, x0)
        output = network(alpha * x0 + sigma * eps, level, cond)
        errors = (output - self.prediction.target(x0, eps, alpha, sigma)).square().flatten(1).mean(dim=1)  # (B,)
        return (self.get_buffer("weight")[level] * errors).mean()

    def denoiser(self, network: Network, cond: Tensor) -> Denoise:
        """The network under these conditions, as a function (xt, level) → x0."""

        def denoise(xt: Tensor, level: int) -> Tensor:
            rows = torch.full(xt.shape[:1], level, device=xt.device)
            output = network(xt, rows, cond)
            return self.prediction.decode(output, xt, *self.tables(level, xt))[0]

        return denoise

    def choose_levels(self, sampler: Sampler, steps: int, spacing: str = "trailing") -> list[int]:
        """Levels to sample on: without a last level that holds no signal where prediction or sampler need some."""
        return choose_levels(self.schedule, steps, spacing, self.prediction.needs_signal or sampler.needs_signal)

    def sample(self, denoise: Denoise, noise: Tensor, sampler: Sampler, levels: Levels, size: float = 0.05) -> Tensor:
        """Run a sampler. `noise` (draws, B, ...): xT, then len(levels) rows if the sampler needs noise, then
        len(levels) rows for each Langevin step; `size`: step size of those."""
        count = len(levels)
        xT, rest = noise[0], noise[1:]
        own, rest = (rest[:count], rest[count:]) if sampler.needs_noise else (None, rest)
        correct = None
        if len(rest):
            correct = langevin(denoise, self.schedule, levels, rest.unflatten(0, (-1, count)), size)
        return sampler.function(denoise, xT, self.schedule, levels, own, correct=correct)


def count_draws(sampler: Sampler, levels: Levels, corrector_steps: int = 0) -> int:
    """Rows of noise that `Diffusion.sample` needs."""
    return 1 + len(levels) * (sampler.needs_noise + corrector_steps)
