"""The cost that keeps an arm of joints away from what stands around it, differentiable by its joint angles.

The arm is balls on links that turn about joints; what stands around it is a table, boxes and the observed balls. Knows
torch. Knows no robot and no simulator.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_policy.control.costs import OBSTACLES, Tensors, path_in


class ArmBarriers(NamedTuple):
    """An arm, and what it must not touch."""

    origins: Tensor
    """Each joint in the frame of the link before it: x, y, z [m] and the turn about x [rad], (joints, 4). It turns
    about its own z."""
    balls: Tensor
    """On the links: the number of the link (the base is 0), x, y, z in its frame, radius, (n, 5) [m]."""
    boxes: Tensor
    """The middle and half the size, (m, 6) [m]; a table lies at height 0."""
    margin: float
    """How far the arm shall keep away [m]."""


def forward_kinematics(origins: Tensor, joints: Tensor) -> tuple[Tensor, Tensor]:
    """How the base and the links are turned, (..., 1 + joints, 3, 3), and where they are, (..., 1 + joints, 3) [m], for
    joint angles (..., joints) [rad]."""
    origins = origins.to(joints)
    turned = torch.eye(3, dtype=joints.dtype, device=joints.device).expand(*joints.shape[:-1], 3, 3)
    at = torch.zeros_like(turned[..., 0])
    turns, places = [turned], [at]
    for i, (xyz, roll) in enumerate(zip(origins[:, :3], origins[:, 3], strict=True)):
        at = at + turned @ xyz
        x, y, z = turned.unbind(dim=-1)
        y, z = roll.cos() * y + roll.sin() * z, roll.cos() * z - roll.sin() * y
        c, s = joints[..., i, None].cos(), joints[..., i, None].sin()
        turned = torch.stack([c * x + s * y, c * y - s * x, z], dim=-1)
        turns.append(turned)
        places.append(at)
    return torch.stack(turns, dim=-3), torch.stack(places, dim=-2)


def ball_centers(barriers: ArmBarriers, joints: Tensor) -> Tensor:
    """Where the balls are for joint angles (..., joints) [rad], (..., n, 3) [m]."""
    turned, at = forward_kinematics(barriers.origins, joints)
    links, inside = barriers.balls[:, 0].long().to(joints.device), barriers.balls[:, 1:4].to(joints)
    return at[..., links, :] + (turned[..., links, :, :] @ inside[..., None]).squeeze(-1)


def arm_clearance(barriers: ArmBarriers, sequences: Tensors, observations: Tensors) -> Tensor:
    """How far the arm comes within the margin of the table, of boxes and of the observed `obstacles`, summed over its
    balls, over the steps and over one configuration between each two, (B,)."""
    path = path_in(sequences)
    joints = torch.cat([path, path[:, :-1] + path.diff(dim=1) / 2], dim=1)  # (B, P, joints)
    centers, radii = ball_centers(barriers, joints), barriers.balls[:, 4].to(joints)
    near = barriers.margin + radii[:, None] - _distances(barriers, centers, observations.get(OBSTACLES))
    return near.clamp(min=0).sum(dim=(1, 2, 3))


def _distances(barriers: ArmBarriers, points: Tensor, obstacles: Tensor | None) -> Tensor:
    """Signed distances of points (B, P, n, 3) to each thing, (B, P, n, things) [m]."""
    boxes = barriers.boxes.to(points)
    beyond = (points[..., None, :] - boxes[:, :3]).abs() - boxes[:, 3:]
    outside = (beyond.clamp(min=0).square().sum(dim=-1) + 1e-12).sqrt()
    found = [points[..., 2:], outside + beyond.amax(dim=-1).clamp(max=0)]
    if obstacles is not None:
        balls = obstacles[:, -1].to(points)[:, None, None]  # (B, 1, 1, k, 4)
        away = ((points[..., None, :] - balls[..., :3]).square().sum(dim=-1) + 1e-12).sqrt() - balls[..., 3]
        found.append(torch.where(balls[..., 3] > 0, away, torch.inf))
    return torch.cat(found, dim=-1)
