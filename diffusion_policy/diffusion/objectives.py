"""What a network can learn beside denoising: each objective is a `Diffusion` with a loss of its own, and says how it is
sampled. A new one is a class and a line in `OBJECTIVES`.

    denoising    noise, sample, velocity or flow at every level; sampled in many steps
    regression   the sequence itself, in one call and without noise: the mean of all modes
    mip          two calls without noise, the second of which refines the first
    mixture      several sequences with their weights, in one call
    shortcut     the average velocity over jumps of many lengths; sampled in 1, 2, 4 ... steps
    meanflow     the average velocity over any jump; sampled in any number of steps
    classifying  the mode of a noised sequence; not sampled, it guides others

Knows tensors. Knows no policy.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion_policy.diffusion.prediction import PREDICTIONS
from diffusion_policy.diffusion.process import Diffusion, Network, Noising, mean_square
from diffusion_policy.diffusion.samplers import Denoise, Levels, Sampler
from diffusion_policy.diffusion.schedules import Schedule, choose_levels

NEAR = 0.9
"""How near to the sequence mip's second call is, t* (arXiv 2512.01809)."""
LEAST_DEVIATION = 0.01
"""Of a component of a mixture, in normalized numbers: else the likelihood of one demonstration has no bound."""
FINEST = 32
"""Most steps that a shortcut is sampled in."""
BOOTSTRAPPED = 0.25
"""Share of the rows that learn a shortcut of two halves; the others learn the velocity itself."""
AT_ONE_LEVEL = 0.5
"""Share of the rows of meanflow that learn the velocity itself."""

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(xt (B, ..., D), level (B,)) → eps - x0 as a teacher sees it, like xt."""


class Regression(Diffusion):
    """The sequence itself in one call that is given no noise: least squares. One observation has one answer, the mean
    of what was demonstrated."""

    starts_at_zero = True

    def __init__(self, schedule: Schedule, trained_steps: Sequence[int] = (1,)) -> None:
        super().__init__(schedule, PREDICTIONS["sample"], trained_steps=trained_steps)

    def loss(self, network: Network, x0: Tensor, cond: Tensor, noising: Noising) -> Tensor:
        """Squared error of each row, (B,)."""
        output = self._call(network, torch.zeros_like(x0), len(self.schedule) - 1, cond)
        return mean_square(output - x0, noising.counted)

    def _call(self, network: Network, xt: Tensor, level: int, cond: Tensor) -> Tensor:
        return network(xt, torch.full((len(xt),), level, device=xt.device), cond)


class MinimalIterative(Regression):
    """The minimal iterative policy (arXiv 2512.01809): a first call as in regression, then one that corrects it, and
    that was trained on demonstrations with little noise. It draws nothing at random either."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule, (2,))

    def choose_levels(
        self, sampler: Sampler, steps: int, spacing: str = "trailing", jump_from: float = 0.0
    ) -> list[int]:
        """The last level, by which the network knows the first call, and the first one, by which it knows the other."""
        return [len(self.schedule) - 1, 0]

    def adapt(self, sampler: Sampler) -> Sampler:
        """The second call is given what the first one said, as it is."""
        return Sampler(lambda path: path.x0s[-1])

    def loss(self, network: Network, x0: Tensor, cond: Tensor, noising: Noising) -> Tensor:
        """Squared errors of both calls, each as a share of the variance that it was left with, (B,)."""
        near = x0 + (1 - NEAR) * noising.eps.to(x0)
        refined = mean_square(self._call(network, near, 0, cond) - x0, noising.counted)
        return super().loss(network, x0, cond, noising) / NEAR**2 + refined / (1 - NEAR) ** 2


class Classifying(Diffusion):
    """Which mode a noised sequence is of, for classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233, section
    4)."""

    def count_outputs(self, target_dim: int, labels: int) -> int:
        """See `Diffusion.count_outputs`: a logit of each mode, of which the mean over time counts."""
        return labels

    def log_probabilities(self, network: Network, xt: Tensor, level: Tensor, cond: Tensor) -> Tensor:
        """Of each mode for sequences (B, T, D) at levels (B,), (B, M)."""
        return network(xt, level, cond).mean(dim=1).log_softmax(dim=-1)


class Mixture(Diffusion):
    """A mixture of Gaussians over whole sequences (Bishop 1994, "Mixture density networks"): behaviour cloning that can
    hold modes. What is sampled is the mean of one component, chosen by its weight."""

    def __init__(self, schedule: Schedule, components: int) -> None:
        super().__init__(schedule, PREDICTIONS["sample"], trained_steps=(1,))
        self.components = components

    def count_outputs(self, target_dim: int, labels: int) -> int:
        """See `Diffusion.count_outputs`: of each component a mean; its weight and deviation are means over time."""
        return self.components * (target_dim + 2)

    def read(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs (B, T, M (D + 2)) → means (B, M, T, D), log-weights (B, M) and deviations (B, M)."""
        means, of_sequence = output.split([output.shape[-1] - 2 * self.components, 2 * self.components], dim=-1)
        means = means.unflatten(-1, (self.components, -1)).transpose(1, 2)
        logits, raw = of_sequence.mean(dim=1).chunk(2, dim=-1)
        return means, logits.log_softmax(dim=-1), LEAST_DEVIATION + functional.softplus(raw)

    def loss(self, network: Network, x0: Tensor, cond: Tensor, noising: Noising) -> Tensor:
        """−log p of each row, a mean over its numbers, (B,)."""
        level = torch.full((len(x0),), len(self.schedule) - 1, device=x0.device)
        means, log_weights, deviations = self.read(network(torch.zeros_like(x0), level, cond))
        counted = torch.ones_like(x0) if noising.counted is None else noising.counted.expand_as(x0).to(x0)
        errors = ((x0[:, None] - means).square() * counted[:, None]).flatten(2).sum(dim=-1)  # (B, M)
        numbers = counted.flatten(1).sum(dim=1, keepdim=True)  # (B, 1)
        log_densities = -0.5 * errors / deviations**2 - numbers * (deviations.log() + 0.5 * math.log(2 * math.pi))
        return -torch.logsumexp(log_weights + log_densities, dim=-1) / numbers[:, 0]

    def decode(self, outputs: Denoise) -> Denoise:
        """See `Diffusion.decode`. xt is noise, by which a component is chosen; the network is not shown it."""

        def denoise(xt: Tensor, level: int) -> Tensor:
            means, log_weights, _ = self.read(outputs(torch.zeros_like(xt), level))
            normal = xt.flatten(1).sum(dim=1) / math.sqrt(xt[0].numel())
            uniform = 0.5 * (1 + torch.erf(normal / math.sqrt(2)))  # (B,)
            chosen = (log_weights.exp().cumsum(dim=-1) < uniform[:, None]).sum(dim=-1).clamp(max=self.components - 1)
            index = chosen[:, None, None, None].expand(-1, 1, *means.shape[2:])
            return means.gather(1, index)[:, 0]

        return denoise


class Jumps(Diffusion):
    """The average velocity from one level to a less noised one, by which a jump between them is one step.

    In the coordinates of a flow, z = xt / (alpha + sigma) and t = sigma / (alpha + sigma), the velocity is dz/dt = eps
    − x0, and a jump from t to r is z + (r − t) u(z, t, r): what DDIM does with x0 and eps that u says, on any schedule.
    The network is told t and t − r, both times K, and sees z.
    """

    level_inputs = 2

    def __init__(self, schedule: Schedule, trained_steps: Sequence[int] = ()) -> None:
        super().__init__(schedule, PREDICTIONS["flow"], trained_steps=trained_steps)
        times = schedule.sigma / (schedule.alpha + schedule.sigma)
        self.register_buffer("times", torch.cat([times, times.new_zeros(1)]).float(), persistent=False)  # −1: clean

    def list_levels(self, levels: Levels) -> Tensor:
        """The jumps from each level to the next, the last one to the clean sequence, (L, 2)."""
        every = levels == range(len(self.schedule))
        after = range(-1, len(levels) - 1) if every else [*levels[1:], -1]
        device = self.get_buffer("times").device
        starts, ends = (torch.cat([torch.full((1,), i, device=device) for i in some]) for some in (levels, after))
        return self.tell(self.get_buffer("times")[starts], self.get_buffer("times")[ends])

    def tell(self, t: Tensor, r: Tensor) -> Tensor:
        """What the network is told of jumps from t to r, (B,) each → (B, 2)."""
        return len(self.schedule) * torch.stack([t, t - r], dim=-1)

    def decode(self, outputs: Denoise) -> Denoise:
        """See `Diffusion.decode`."""

        def denoise(xt: Tensor, level: int) -> Tensor:
            alpha, sigma = self.tables(level, xt)
            return self.prediction.decode(outputs(xt / (alpha + sigma), level), xt, alpha, sigma)[0]

        return denoise

    def noise(self, x0: Tensor, eps: Tensor, level: Tensor, velocity: Velocity | None) -> tuple[Tensor, Tensor]:
        """Sequences noised to a level each (B,), in the flow's coordinates, and the velocity there: that of this data
        and noise, or a teacher's."""
        alpha, sigma = self.tables(level, x0)
        xt = alpha * x0 + sigma * eps
        return xt / (alpha + sigma), eps - x0 if velocity is None else velocity(xt, level)


class Shortcut(Jumps):
    """Shortcuts (Frans et al. 2024, arXiv 2410.12557): a jump equals the two of half its length that it is made of; the
    shortest ones are the velocity itself. Sampled in 1, 2, 4 ... steps."""

    def __init__(self, schedule: Schedule, usual_steps: int = 1) -> None:
        """`usual_steps`: a power of two. Raises ValueError for another."""
        counts = [2**i for i in range(FINEST.bit_length()) if 2 ** (i + 1) <= len(schedule)]
        if usual_steps not in counts:
            raise ValueError(f"shortcuts are sampled in {', '.join(map(str, counts))} steps; got {usual_steps}")
        super().__init__(schedule, [usual_steps, *(n for n in counts if n != usual_steps)])
        halves = []  # of each jump of 1 step, 2 steps, ...: level, level in between, level after
        for n in counts:
            fine = [*choose_levels(schedule, 2 * n), -1]
            halves += list(zip(fine[:-1:2], fine[1::2], fine[2::2], strict=True))
        self._halves = torch.tensor(halves)  # (jumps, 3), those of n from n - 1 on; on the CPU, where jumps are drawn
        self._counts = len(counts)
        self._shortest = math.ceil(len(schedule) / counts[-1])  # levels

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Noising:
        """As `Diffusion.draw`; a level is (level, level in between, level after), all the same where the velocity is
        learned, (B, 3)."""
        rows = shape[0]
        level = torch.randint(len(self.schedule), (rows, 1), generator=generator).expand(-1, 3)
        n = 2 ** torch.randint(self._counts, (rows,), generator=generator)
        place = (torch.rand(rows, generator=generator) * n).long()
        jump = self._halves[n - 1 + place]
        halved = torch.rand(rows, 1, generator=generator) < BOOTSTRAPPED
        return Noising(torch.where(halved, jump, level), torch.randn(*shape, generator=generator))

    def loss(
        self, network: Network, x0: Tensor, cond: Tensor, noising: Noising, velocity: Velocity | None = None
    ) -> Tensor:
        """Squared error of the average velocity, (B,)."""
        start, middle, end = noising.level.to(x0.device).unbind(dim=-1)
        z, target = self.noise(x0, noising.eps.to(x0), start, velocity)
        t, m, r = (self.get_buffer("times")[one] for one in (start, middle, end))
        shape = (-1, *[1] * (x0.ndim - 1))
        with torch.no_grad():
            shortest = start - end <= self._shortest  # whose halves are the velocity itself
            first = network(z, self.tell(t, torch.where(shortest, t, m)), cond)
            there = z + (m - t).reshape(shape) * first
            second = network(there, self.tell(m, torch.where(shortest, m, r)), cond)
            span = (t - r).clamp(min=1e-6)
            mean = ((t - m) / span).reshape(shape) * first + ((m - r) / span).reshape(shape) * second
            target = torch.where((start != end).reshape(shape), mean, target)
        return mean_square(network(z, self.tell(t, r), cond) - target, noising.counted)


class MeanFlow(Jumps):
    """MeanFlow (Geng et al. 2025, arXiv 2505.13447): the average velocity satisfies u = v − (t − r) du/dt along the
    path, which is a loss without a teacher; its derivative is one pass in forward mode."""

    def __init__(self, schedule: Schedule, usual_steps: int = 1) -> None:
        super().__init__(schedule)
        self._usual_steps = usual_steps

    def choose_steps(self, sampler: Sampler, steps: int | None) -> int:
        """See `Diffusion.choose_steps`: any number."""
        return self._usual_steps if steps is None else steps

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Noising:
        """As `Diffusion.draw`; a level is (level, level after), −1 for the clean sequence, (B, 2)."""
        rows = shape[0]
        start = torch.randint(len(self.schedule), (rows,), generator=generator)
        end = (torch.rand(rows, generator=generator) * (start + 1)).long() - 1  # any below
        end = torch.where(torch.rand(rows, generator=generator) < AT_ONE_LEVEL, start, end)
        return Noising(torch.stack([start, end], dim=-1), torch.randn(*shape, generator=generator))

    def loss(
        self, network: Network, x0: Tensor, cond: Tensor, noising: Noising, velocity: Velocity | None = None
    ) -> Tensor:
        """Error of the average velocity, its square weighed by 1 / sqrt(itself + 1e-3), (B,)."""
        start, end = noising.level.to(x0.device).unbind(dim=-1)
        z, v = self.noise(x0, noising.eps.to(x0), start, velocity)
        t, r = self.get_buffer("times")[start], self.get_buffer("times")[end]

        def average(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return network(z, self.tell(t, r), cond)

        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the other attentions have no derivative forwards
            slope = torch.func.jvp(average, (z, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))[1]
            target = v - (t - r).reshape(-1, *[1] * (z.ndim - 1)) * slope
        errors = mean_square(average(z, t, r) - target, noising.counted)
        return errors / (errors.detach() + 1e-3).sqrt()


OBJECTIVES: dict[str, Callable[[Schedule, Any], Diffusion]] = {
    "denoising": lambda schedule, asked: Diffusion(
        schedule,
        PREDICTIONS[asked.prediction],
        asked.snr_gamma,
        asked.learn_variance,
        (asked.student_steps,) if asked.student_steps else (),
    ),
    "autoencoding": lambda schedule, asked: Diffusion(schedule, PREDICTIONS[asked.prediction]),
    "classifying": lambda schedule, asked: Classifying(schedule, PREDICTIONS[asked.prediction]),
    "regression": lambda schedule, _: Regression(schedule),
    "mip": lambda schedule, _: MinimalIterative(schedule),
    "mixture": lambda schedule, asked: Mixture(schedule, asked.mixture_components),
    "shortcut": lambda schedule, asked: Shortcut(schedule, asked.student_steps or 1),
    "meanflow": lambda schedule, asked: MeanFlow(schedule, asked.student_steps or 1),
}
"""By name: makes it of a schedule and the options of a policy, `config.PolicyConfig`."""
JUMPING = ("shortcut", "meanflow")
"""Objectives that a teacher can teach too."""
