"""What a student learns of a teacher that denoises in many steps, so that it is sampled in few.

Both are functions (xt, level) → x0, with a level for each row. Every lesson gives the errors of the student for each
row, (B,). Knows tensors of any shape (B, ...). Knows no network and no policy.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_policy.diffusion.process import Diffusion, Noising, mean_square
from diffusion_policy.diffusion.samplers import SAMPLERS
from diffusion_policy.diffusion.schedules import Schedule

SMOOTH = 0.03
"""Below this the pseudo-Huber loss of consistency is square."""

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(xt (B, ...), level (B,)) → x0."""


class Jumped(NamedTuple):
    """Jumps of a path that a teacher took."""

    xts: Tensor
    """Where each begins, the first one with noise, (B, jumps, ...)."""
    x0s: Tensor
    """The x0 by which DDIM jumps from each to the next, the last one to the teacher's clean sequence."""


class Ladder:
    """Some levels from the noisiest down to the clean sequence, level −1, and DDIM between them."""

    def __init__(self, schedule: Schedule, levels: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.schedule, self.levels = schedule, list(levels)
        self.path = torch.tensor([*levels, -1], device=device)
        """(jumps + 1,)"""
        one = schedule.alpha.new_ones(1)
        tables = torch.cat([schedule.alpha, one]), torch.cat([schedule.sigma, 0 * one])
        self._alpha, self._sigma = (table.float().to(device) for table in tables)

    def __len__(self) -> int:
        """How many jumps."""
        return len(self.levels)

    def choose(self, noising: Noising) -> Tensor:
        """Which jump each row learns, (B,), by the level that was drawn for it."""
        return noising.level.to(self.path.device) % len(self)

    def at(self, level: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of each row, (B, 1, ...)."""
        shape = (-1, *[1] * (like.ndim - 1))
        return self._alpha[level].reshape(shape), self._sigma[level].reshape(shape)

    def noise(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """Sequences at a level each."""
        alpha, sigma = self.at(level, x0)
        return alpha * x0 + sigma * eps.to(x0)

    def jump(self, xt: Tensor, x0: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """DDIM from level to level (Song et al. 2021, arXiv 2010.02502, eq. 12)."""
        (alpha, sigma), (next_alpha, next_sigma) = self.at(start, xt), self.at(end, xt)
        return next_alpha * x0 + next_sigma * (xt - alpha * x0) / sigma

    def solve(self, xt: Tensor, there: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """The x0 by which `jump` leads from xt to `there` (Salimans & Ho 2022, arXiv 2202.00512, appendix G)."""
        (alpha, sigma), (next_alpha, next_sigma) = self.at(start, xt), self.at(end, xt)
        ratio = next_sigma / sigma
        return (there - ratio * xt) / (next_alpha - ratio * alpha)


@torch.no_grad()
def follow(teacher: Denoiser, start: Tensor, ladder: Ladder, chosen: Sequence[int]) -> Jumped:
    """The teacher's path from noise (B, ...) down the ladder, in jumps between the chosen ones of its levels."""
    passed = {ladder.levels[0]: start}

    def keep(xt: Tensor, i: int) -> Tensor:
        passed[ladder.levels[i]] = xt
        return xt

    def denoise(xt: Tensor, level: int) -> Tensor:
        return teacher(xt, torch.full((len(xt),), level, device=xt.device))

    clean = SAMPLERS["ddim"](denoise, start, ladder.schedule, ladder.levels, None, [keep])
    xts = [passed[level] for level in chosen]
    ends = [torch.full((len(start),), level, device=start.device) for level in (*chosen, -1)]
    x0s = [
        ladder.solve(xt, there, first, last)
        for xt, there, first, last in zip(xts, [*xts[1:], clean], ends, ends[1:], strict=False)
    ]
    return Jumped(torch.stack(xts, dim=1), torch.stack(x0s, dim=1))


def repeat_pairs(student: Denoiser, jumped: Jumped, ladder: Ladder, noising: Noising) -> Tensor:
    """Mean absolute error of what the teacher made of the same noise (Luhman & Luhman 2021, arXiv 2101.02388), on one
    jump of each row. `ladder`: of the student's levels."""
    place = ladder.choose(noising)
    rows = torch.arange(len(place), device=place.device)
    x0 = student(jumped.xts[rows, place], ladder.path[place])
    return (x0 - jumped.x0s[rows, place]).abs().flatten(1).mean(dim=1)


def velocity_of(teacher: Denoiser, diffusion: Diffusion) -> Denoiser:
    """(xt, level) → eps - x0 as the teacher sees it, on its schedule."""

    @torch.no_grad()
    def velocity(xt: Tensor, level: Tensor) -> Tensor:
        alpha, sigma = diffusion.tables(level, xt)
        x0 = teacher(xt, level)
        return (xt - alpha * x0) / sigma - x0

    return velocity


def halve_steps(student: Denoiser, teacher: Denoiser, x0: Tensor, fine: Ladder, noising: Noising) -> Tensor:
    """Two jumps of the teacher in one (Salimans & Ho 2022, arXiv 2202.00512, algorithm 2), weighed by the truncated SNR
    of section 4. `fine`: of the teacher's levels, twice as many as the student's."""
    place = 2 * (noising.level.to(x0.device) % (len(fine) // 2))
    start, middle, end = (fine.path[place + i] for i in range(3))
    xt = fine.noise(x0, noising.eps, start)
    with torch.no_grad():
        between = fine.jump(xt, teacher(xt, start), start, middle)
        there = fine.jump(between, teacher(between, middle), middle, end)
        target = fine.solve(xt, there, start, end)
    alpha, sigma = fine.at(start, xt)
    return (alpha / sigma).square().clamp(min=1).flatten() * mean_square(student(xt, start) - target)


def agree_along(
    student: Denoiser, teacher: Denoiser, x0: Tensor, ladder: Ladder, ends: Tensor, noising: Noising
) -> Tensor:
    """One end of a stretch from all its levels, on a path of the teacher (Song et al. 2023, arXiv 2303.01469, algorithm
    2; in several stretches Heek et al. 2024, arXiv 2403.06807): after a jump of the teacher the student comes to the
    same end, there without its gradient. Pseudo-Huber loss of Song & Dhariwal 2023, arXiv 2310.14189, section 3.3.

    `ends`: level at the end of each of the ladder's jumps' stretch, (jumps,); see `find_ends`."""
    place = ladder.choose(noising)
    start, after, end = ladder.path[place], ladder.path[place + 1], ends[place]
    xt = ladder.noise(x0, noising.eps, start)
    with torch.no_grad():
        there = ladder.jump(xt, teacher(xt, start), start, after)
        onwards = ladder.jump(there, student(there, after.clamp(min=0)), after.clamp(min=0), end)
        arrived = (after == end).reshape(-1, *[1] * (x0.ndim - 1))
        target = ladder.solve(xt, torch.where(arrived, there, onwards), start, end)
    return (mean_square(student(xt, start) - target) + SMOOTH**2).sqrt() - SMOOTH


def find_ends(ladder: Ladder, coarse: Sequence[int]) -> Tensor:
    """Of each of the ladder's jumps the first of the coarse levels behind it, or the clean sequence, (jumps,)."""
    ends = [next((one for one in coarse if one < level), -1) for level in ladder.levels]
    return torch.tensor(ends, device=ladder.path.device)
