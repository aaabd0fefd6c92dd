"""Costs that lead samples while they are denoised, and by which the best of several plans is chosen.

A cost is a function of sequences {key: (B, T, n)}, raw, of what the policy predicts, and of observations {key: (B, To,
...)}, that gives a number for each row, (B,): the lower the better. By its gradient samples are led, so it is written
in torch. Those here are of the places that the sequences hold beside it as `place`, (B, T, 2) in a plane, (B, T,
joints) of an arm.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_policy.policy import DiffusionPolicy, Wrap

Tensors = Mapping[str, Tensor]
Cost = Callable[[Tensors, Tensors], Tensor]
PLACE = "place"
"""Key under which costs find the places of a plan [m or px], or its joint angles [rad]."""
OBSTACLES, GOAL = "obstacles", "goal"
"""Observations (k, 3), the discs x, y, radius, or (k, 4), the balls x, y, z, radius; and (2,) or (joints,)."""


class CostError(ValueError):
    """A cost gives no numbers, or no gradient."""


class Barriers(NamedTuple):
    """What stands in the plane of a task, the same in all episodes."""

    boxes: Tensor
    """(m, 4), middle x, y and half the width and height."""
    room: Tensor
    """(4,), likewise: what lies outside is a wall."""
    radius: float
    """Of the body that moves."""
    margin: float
    """How far it shall keep away."""


class Weighed(NamedTuple):
    """A cost in a sum."""

    name: str
    cost: Cost
    weight: float


def path_in(sequences: Tensors) -> Tensor:
    """The places in sequences, (B, T, 2), or joint angles (B, T, joints)."""
    return sequences[PLACE]


def smoothness(sequences: Tensors, observations: Tensors) -> Tensor:
    """The sum of squared second differences of the places, (B,)."""
    return path_in(sequences).diff(n=2, dim=1).square().sum(dim=(1, 2))


def length(sequences: Tensors, observations: Tensors) -> Tensor:
    """The length of the path, (B,)."""
    return (path_in(sequences).diff(dim=1).square().sum(dim=-1) + 1e-12).sqrt().sum(dim=1)


def to_goal(sequences: Tensors, observations: Tensors) -> Tensor:
    """The squared distance of the last place to the observation `goal`, (B,)."""
    end = path_in(sequences)[:, -1]
    return (end - observations[GOAL][:, -1, : end.shape[-1]]).square().sum(dim=-1)


def clearance(barriers: Barriers, sequences: Tensors, observations: Tensors) -> Tensor:
    """How far the body comes within the margin of walls, boxes and the observed `obstacles`, summed over the steps and
    over four places between each two, (B,)."""
    path = path_in(sequences)
    between = [path[:, :-1] + share * path.diff(dim=1) for share in (0.25, 0.5, 0.75)]
    points = torch.cat([path, *between], dim=1)
    near = barriers.radius + barriers.margin - _distances(barriers, points, observations.get(OBSTACLES))
    return near.clamp(min=0).sum(dim=(1, 2))


def apart(margin: float, sequences: Tensors, observations: Tensors) -> Tensor:
    """How far agents come within the margin of each other, whose places lie side by side, x, y, x, y ..., summed over
    their pairs and the steps, (B,). Raises CostError for fewer than two agents."""
    path = path_in(sequences)
    if path.shape[-1] % 2 or path.shape[-1] < 4:
        raise CostError(f"the cost apart needs x and y of two agents at least; got {path.shape[-1]} columns")
    agents = path.unflatten(-1, (-1, 2))  # (B, T, agents, 2)
    first, second = torch.triu_indices(agents.shape[2], agents.shape[2], 1, device=path.device)
    between = ((agents[:, :, first] - agents[:, :, second]).square().sum(dim=-1) + 1e-12).sqrt()
    return (margin - between).clamp(min=0).sum(dim=(1, 2))


def _distances(barriers: Barriers, points: Tensor, obstacles: Tensor | None) -> Tensor:
    """Signed distances of points (B, P, 2) to each thing, (B, P, things)."""
    boxes = barriers.boxes.to(points)
    beyond = (points[:, :, None] - boxes[:, :2]).abs() - boxes[:, 2:]  # (B, P, m, 2)
    outside = (beyond.clamp(min=0).square().sum(dim=-1) + 1e-12).sqrt()
    found = [outside + beyond.amax(dim=-1).clamp(max=0)]
    room = barriers.room.to(points)
    found.append((room[2:] - (points - room[:2]).abs()).amin(dim=-1, keepdim=True))
    if obstacles is not None:
        discs = obstacles[:, -1].to(points)[:, None]  # (B, 1, k, 3)
        away = ((points[:, :, None] - discs[..., :2]).square().sum(dim=-1) + 1e-12).sqrt() - discs[..., 2]
        found.append(torch.where(discs[..., 2] > 0, away, torch.inf))
    return torch.cat(found, dim=-1)


COSTS: dict[str, Cost] = {"smoothness": smoothness, "length": length, "goal": to_goal}
"""Those that need nothing but what is planned and observed; `clearance` needs barriers too, `apart` a margin."""


def total(
    costs: Sequence[Weighed], sequences: Tensors, observations: Tensors, keys: Sequence[str], columns: int = 2
) -> Tensor:
    """The weighed sum, (B,), over the keys whose first columns, so many, are places. Raises CostError for a cost that
    is not one finite number a row."""
    rows, found = len(next(iter(sequences.values()))), []
    for (name, cost, weight), key in itertools.product(costs, keys):
        value = cost({**sequences, PLACE: sequences[key][..., :columns]}, observations)
        if not isinstance(value, Tensor) or value.shape != (rows,):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CostError(f"the cost {name} must give a tensor of shape ({rows},); got {got}")
        if not torch.isfinite(value).all():
            raise CostError(f"the cost {name} gives NaN or infinity")
        found.append(weight * value)
    return torch.stack(found).sum(dim=0)


@dataclass(frozen=True)
class Costs:
    """Leads samples down a weighed sum of costs, and scores plans by it."""

    weighed: tuple[Weighed, ...]
    keys: tuple[str, ...] = ("action",)
    """What is predicted whose first columns are places: each is led."""
    begins: float = 1.0
    """Share of the noise levels, from the least noised one, at which samples are led."""
    steps: int = 1
    """Gradient steps at each of them; with 0 samples are not led."""
    size: float = 0.05
    """Of a gradient step: how far a step of a sequence moves at most, in normalized numbers."""
    columns: int = 2
    """So many are places: of a plane two, of an arm as many as it has joints."""

    def __call__(self, policy: DiffusionPolicy, observations: Tensors, number: int) -> Wrap:
        """See `policy.Lead`."""
        levels = policy.config.noise_levels
        sizes = torch.zeros(levels)
        sizes[: max(1, round(self.begins * levels))] = self.size
        seen = {key: rows.repeat_interleave(number, dim=0) for key, rows in observations.items()}
        return lambda denoise: policy.descend(denoise, partial(self.slope, policy, seen), sizes, self.steps)

    def slope(self, policy: DiffusionPolicy, observations: Tensors, x0: Tensor) -> Tensor:
        """The gradient by normalized sequences (B, T, D). Raises CostError where there is none."""
        names = ", ".join(one.name for one in self.weighed)
        with torch.enable_grad():
            x0 = x0.detach().requires_grad_()
            planned = policy.sequences.tell_apart(x0, observations)
            summed = total(self.weighed, planned, observations, self.keys, self.columns)
            if not summed.requires_grad:
                raise CostError(f"the costs {names} have no gradient by what is planned")
            (gradient,) = torch.autograd.grad(summed.sum(), x0)
        if not torch.isfinite(gradient).all():
            raise CostError(f"the gradient of the costs {names} is NaN or infinite")
        return gradient

    def score(self, observations: Mapping[str, np.ndarray], plans: np.ndarray) -> np.ndarray:
        """Minus the costs of plans (B, N, steps, A) for observations {key: (B, To, ...)}, (B, N)."""
        number = plans.shape[1]
        seen = {key: torch.from_numpy(rows).repeat_interleave(number, dim=0) for key, rows in observations.items()}
        with torch.no_grad():
            flat = {"action": torch.from_numpy(plans).flatten(0, 1)}
            summed = total(self.weighed, flat, seen, ("action",), self.columns)
        return -summed.reshape(plans.shape[:2]).numpy()
