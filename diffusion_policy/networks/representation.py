"""How actions and rotations are said to a network, and back: rotations as six numbers, actions as they are, relative to
what is observed now, or from step to step.

Knows tensors only. A rotation is three columns, a rotation vector [rad], or four, a quaternion x, y, z, w.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

ActionForm = Literal["absolute", "relative", "delta"]
SIX = 6
"""Numbers of a rotation as a network sees it."""
TINY = 1e-12


def to_quaternion(rotation: Tensor) -> Tensor:
    """A rotation (..., 3 or 4) as a unit quaternion x, y, z, w, (..., 4)."""
    if rotation.shape[-1] == 4:
        return rotation / rotation.norm(dim=-1, keepdim=True).clamp_min(TINY)
    half = rotation.norm(dim=-1, keepdim=True) / 2
    return torch.cat([rotation / 2 * torch.sinc(half / torch.pi), torch.cos(half)], dim=-1)


def from_quaternion(quaternion: Tensor, columns: int) -> Tensor:
    """The inverse: a quaternion of any length, of which w becomes at least 0, as a rotation (..., columns)."""
    quaternion = quaternion / quaternion.norm(dim=-1, keepdim=True).clamp_min(TINY)
    quaternion = torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)
    if columns == 4:
        return quaternion
    vector, w = quaternion[..., :3], quaternion[..., 3:]
    length = vector.norm(dim=-1, keepdim=True)
    # in the network's precision, as runtimes have it
    angle = 2 * torch.atan2(length.float(), w.float()).to(length)
    return vector * torch.where(length > TINY, angle / length.clamp_min(TINY), 2.0)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """The product of quaternions (..., 4)."""
    a, b = first[..., :3], second[..., :3]
    v, w = first[..., 3:], second[..., 3:]
    crossed = torch.linalg.cross(*torch.broadcast_tensors(a, b))
    return torch.cat([v * b + w * a + crossed, v * w - (a * b).sum(dim=-1, keepdim=True)], dim=-1)


def invert(quaternion: Tensor) -> Tensor:
    """Of a unit quaternion (..., 4)."""
    return torch.cat([-quaternion[..., :3], quaternion[..., 3:]], dim=-1)


def to_six(rotation: Tensor) -> Tensor:
    """The first two columns of the matrix of a rotation (..., 3 or 4), (..., 6): numbers without jumps (Zhou et al.
    2019, "On the Continuity of Rotation Representations in Neural Networks", eq. 15)."""
    x, y, z, w = to_quaternion(rotation).unbind(dim=-1)
    first = 1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w)
    second = 2 * (x * y - z * w), 1 - 2 * (x * x + z * z), 2 * (y * z + x * w)
    return torch.stack([*first, *second], dim=-1)


def from_six(numbers: Tensor, columns: int) -> Tensor:
    """The rotation (..., columns) nearest to any six numbers (..., 6): Gram-Schmidt (Zhou et al. 2019, eq. 16)."""
    first, second = numbers[..., :3], numbers[..., 3:]
    first = first / first.norm(dim=-1, keepdim=True).clamp_min(TINY)
    second = second - (first * second).sum(dim=-1, keepdim=True) * first
    second = second / second.norm(dim=-1, keepdim=True).clamp_min(TINY)
    third = torch.linalg.cross(first, second)
    (a, d, g), (b, e, h), (c, f, i) = (column.unbind(dim=-1) for column in (first, second, third))
    rows = torch.stack(  # 4 q q^T, each row the quaternion times one of its own numbers: the longest is exact
        [
            torch.stack([1 + a - e - i, b + d, c + g, h - f], dim=-1),
            torch.stack([b + d, 1 - a + e - i, f + h, c - g], dim=-1),
            torch.stack([c + g, f + h, 1 - a - e + i, d - b], dim=-1),
            torch.stack([h - f, c - g, d - b, 1 + a + e + i], dim=-1),
        ],
        dim=-2,
    )
    own = torch.diagonal(rows, dim1=-2, dim2=-1)  # (..., 4)
    longest = own.argmax(dim=-1)[..., None, None].expand(*own.shape[:-1], 1, 4)
    return from_quaternion(rows.gather(-2, longest)[..., 0, :], columns)


def take(x: Tensor, columns: Sequence[int]) -> Tensor:
    """These columns of (..., columns), cut out where they stand: a list of them would be sent to the device, which
    waits for it, and is not allowed while a CUDA graph is captured."""
    runs: list[list[int]] = []
    for column in columns:
        if runs and column == runs[-1][-1] + 1:
            runs[-1].append(column)
        else:
            runs.append([column])
    return torch.cat([x[..., run[0] : run[-1] + 1] for run in runs] or [x[..., :0]], dim=-1)


class ActionFrame:
    """Raw actions ↔ the same as a network learns them. With n columns r of an observed key as the reference of the
    first n columns of the actions a_k at the window's steps k, where *now* is step p = To - 1:

        relative   a_k - r_p
        delta      a_k - r_k up to now, a_k - a_(k-1) after it

    Further columns stay absolute. Of a rotation q, minus means q_r^-1 q, the turn as it is seen from the reference, and
    plus q_r q. Angles come back within [-pi, pi].
    """

    def __init__(
        self,
        form: ActionForm = "absolute",
        reference: tuple[str, tuple[int, ...]] = ("", ()),
        angles: Sequence[int] = (),
        rotations: Sequence[Sequence[int]] = (),
    ) -> None:
        """`reference`: an observation key and its columns; `angles` and `rotations`: those columns of the actions that
        are. Raises ValueError for a rotation of which the reference holds a part only."""
        self.form, (self.key, self.columns) = form, reference
        count = len(self.columns)
        split = [columns for columns in rotations if 0 < sum(column < count for column in columns) < len(columns)]
        if split and form != "absolute":
            raise ValueError(
                f"action-reference has {count} columns, in the middle of the rotation in the action's columns "
                f"{', '.join(map(str, split[0]))}"
            )
        self._rotations = [tuple(columns) for columns in rotations if max(columns) < count]
        turned = {column for columns in self._rotations for column in columns}
        self._angles = [column for column in angles if column < count]
        self._plain = [column for column in range(count) if column not in turned]

    def express(self, actions: Tensor, observations: Mapping[str, Tensor], first: int = 0) -> Tensor:
        """Raw actions of the steps from `first` on, (B, steps, A) → the same shape; `observations`: raw
        {key: (B, To, ...)}."""
        if self.form == "absolute":
            return actions
        seen, count = self._seen(actions, observations), len(self.columns)
        chosen, rest = actions[..., :count], actions[..., count:]
        base = seen[:, -1:].expand_as(chosen)
        if self.form == "delta":
            base = torch.cat([seen[:, first:], chosen[:, seen.shape[1] - 1 - first : -1]], dim=1)
        return torch.cat([self._combine(chosen, base, -1), rest], dim=-1)

    def restore(self, sequence: Tensor, observations: Mapping[str, Tensor]) -> Tensor:
        """The inverse, of whole sequences (B N, T, A), N for each of the observations (B, To, ...)."""
        if self.form == "absolute":
            return sequence
        seen, count = self._seen(sequence, observations), len(self.columns)
        seen = seen.repeat_interleave(len(sequence) // len(seen), dim=0)
        chosen, rest = sequence[..., :count], sequence[..., count:]
        if self.form == "relative":
            found = self._combine(chosen, seen[:, -1:].expand_as(chosen), 1)
        else:
            steps = [self._combine(chosen[:, : seen.shape[1]], seen, 1)]
            for step in range(seen.shape[1], chosen.shape[1]):
                steps.append(self._combine(chosen[:, step : step + 1], steps[-1][:, -1:], 1))
            found = torch.cat(steps, dim=1)
        return torch.cat([found, rest], dim=-1)

    def _seen(self, like: Tensor, observations: Mapping[str, Tensor]) -> Tensor:
        """The reference at the observed steps, (B, To, n)."""
        return take(observations[self.key].to(like), self.columns)

    def _combine(self, x: Tensor, base: Tensor, sign: int) -> Tensor:
        """x ± base, column by column, (..., n)."""
        parts: dict[int, Tensor] = {}
        for column in self._plain:
            found = x[..., column] + sign * base[..., column]
            if column in self._angles:
                found = found - 2 * torch.pi * torch.round(found / (2 * torch.pi))
            parts[column] = found
        for columns in self._rotations:
            own, other = (to_quaternion(torch.stack([one[..., c] for c in columns], dim=-1)) for one in (x, base))
            turned = from_quaternion(compose(other if sign > 0 else invert(other), own), len(columns))
            parts |= dict(zip(columns, turned.unbind(dim=-1), strict=True))
        return torch.stack([parts[column] for column in sorted(parts)], dim=-1)
