"""What a network predicts: normalized sequences, and the raw rows that they mean.

    raw rows (B, T, columns) → as actions are said → normalized → every s-th step, or a latent space → (B, T / s, D)

and back. The timeline of T steps is that of `policy`. With inverse dynamics the states alone are predicted, and the
actions follow from them. A predicted sequence is shorter where a step of it stands for several: the steps between are
interpolated (Diffusion Veteran's jumps: Lu et al. 2025, arXiv 2503.00535), or an autoencoder says them. Knows tensors.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from diffusion_policy.networks.autoencoder import Autoencoder
from diffusion_policy.networks.inverse_dynamics import InverseDynamics
from diffusion_policy.networks.representation import ActionFrame, take

TARGET = "action"
"""Name of what is predicted, in windows, statistics and normalizer."""


class Shapes(NamedTuple):
    """What one step of the data looks like."""

    observations: dict[str, tuple[int, ...]]
    """Shape of each observation key."""
    action: tuple[int, ...]
    """(A,)"""
    angles: dict[str, tuple[int, ...]] = {}  # noqa: RUF012  (never changed)
    """Columns of a key, `action` among them, that are angles [rad]; the network sees their cosine and sine. Those of
    `action` are of what is predicted."""
    target: dict[str, int] = {}  # noqa: RUF012
    """Columns of each key that the network predicts, in order, the executed action called `action`; empty where that
    is all."""

    @property
    def row(self) -> tuple[int, ...]:
        """Of one step as it is predicted."""
        return (sum(self.target.values()),) if self.target else self.action

    def place_of(self, key: str) -> slice:
        """Which columns of a predicted row are those of a key."""
        if not self.target:
            return slice(0, self.action[0])
        first = 0
        for name, count in self.target.items():
            if name == key:
                return slice(first, first + count)
            first += count
        raise ValueError(f"predicted are {', '.join(self.target)}; got {key}")

    @property
    def executed(self) -> slice:
        """Which columns of a predicted row are the action; all of a forecast, of which nothing is executed."""
        acts = "action" in self.target or not self.target
        return self.place_of("action") if acts else slice(0, self.row[0])


class Inpainting(NamedTuple):
    """What of a sequence is inpainted."""

    start: bool = False
    """What is observed until now, of the observations that are predicted."""
    goal: str | None = None
    """The observation that the last step comes to, in the columns of the first observation that is predicted."""


class Horizons(NamedTuple):
    """Steps of a window."""

    observed: int
    """To"""
    predicted: int
    """T"""
    stride: int = 1
    """Steps from one that is predicted to the next."""


class Numbers(Protocol):
    """Raw rows ↔ normalized ones, as `normalizer.Normalizer`."""

    @property
    def precision(self) -> torch.dtype: ...
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def normalize(self, key: str, x: Tensor) -> Tensor: ...
    def unnormalize(self, key: str, x: Tensor) -> Tensor: ...
    def places(self, key: str, columns: Sequence[int]) -> list[int]: ...


class Sequences(nn.Module):
    """Raw rows of all that is predicted ↔ the sequences that the network denoises. It has no weights of its own, and
    none of its parts': their owner keeps them."""

    held: Tensor | None
    """Which numbers of a sequence are inpainted, (T / stride, D) bool; None for none."""
    between: Tensor
    """How each step is made of those that are predicted, (T, T / stride)."""

    def __init__(
        self,
        horizons: Horizons,
        shapes: Shapes,
        numbers: Numbers,
        frame: ActionFrame,
        inpainting: Inpainting = Inpainting(),  # noqa: B008  (never changed)
        autoencoder: Autoencoder | None = None,
        inverse: InverseDynamics | None = None,
        limit: float = math.inf,
    ) -> None:
        """`limit`: how large the normalized numbers become at most that an autoencoder or inverse dynamics say. Raises
        ValueError for inpainting that does not fit what is predicted and observed."""
        super().__init__()
        self.horizons, self.shapes, self.frame = horizons, shapes, frame
        self._inpainting, self._limit = inpainting, limit
        self._parts = numbers, autoencoder, inverse  # in a tuple, where torch looks for no weights
        acts = [] if inverse is None else numbers.places(TARGET, range(shapes.row[0])[shapes.executed])
        states = [place for place in range(numbers.shapes[TARGET][0]) if place not in acts]
        self._states, self._acts = states, acts
        self._order = [[*states, *acts].index(place) for place in range(len(states) + len(acts))]
        self._seen = [key for key in shapes.target if key != "action"]
        self.register_buffer("held", self._find_held(), persistent=False)
        self.register_buffer("between", interpolation(horizons.predicted, horizons.stride), persistent=False)

    @property
    def numbers(self) -> Numbers:
        """Raw rows ↔ normalized ones."""
        return self._parts[0]

    @property
    def autoencoder(self) -> Autoencoder | None:
        """Of the sequences, where diffusion runs in a latent space."""
        return self._parts[1]

    @property
    def inverse(self) -> InverseDynamics | None:
        """The actions of states, where diffusion is over these alone."""
        return self._parts[2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sequence as the network sees it, (T / stride, D); of a latent one (T / its stride, channels)."""
        steps, latent = self.between.shape[1], self.autoencoder
        return (steps, len(self._states)) if latent is None else (steps // latent.stride, latent.channels)

    def normalize(self, raw: Tensor, observations: Mapping[str, Tensor], first: int = 0) -> Tensor:
        """Raw rows of the steps from `first` on, (B, steps, columns), under raw observations {key: (B, To, ...)} → as
        the network learns them, (B, steps / stride, D)."""
        return self.shorten(self.normalize_steps(raw, observations, first))

    def normalize_steps(self, raw: Tensor, observations: Mapping[str, Tensor], first: int = 0) -> Tensor:
        """The same of all steps and in no latent space, (B, steps, D)."""
        raw = raw.to(self.between.device, self.numbers.precision)
        return self.numbers.normalize(TARGET, self.frame.express(raw, observations, first))

    def shorten(self, rows: Tensor) -> Tensor:
        """Normalized rows of all steps (B, steps, numbers) → what the network learns of them, (B, steps / stride,
        D)."""
        if self.autoencoder is not None:
            return self.autoencoder.encode(rows)
        return self.keep(take(rows, self._states) if self._acts else rows)

    def inverse_errors(self, rows: Tensor) -> Tensor | None:
        """Errors of the actions that follow from the states of normalized rows (B, steps, numbers), (B, steps, A); None
        without inverse dynamics."""
        return None if self.inverse is None else self.inverse(take(rows, self._states)) - take(rows, self._acts)

    def keep(self, steps: Tensor) -> Tensor:
        """Of something of each step, (B, T, ...), that of the steps that are predicted."""
        return steps[:, :: self.horizons.stride]

    def rows_of(self, x0: Tensor, observations: Mapping[str, Tensor]) -> Tensor:
        """Sequences (B N, T / stride, D) under raw observations {key: (B, To, ...)} → raw rows of all that is
        predicted, (B N, T, columns)."""
        if self.autoencoder is not None:
            x0 = self._bound(self.autoencoder.decode(x0))
        elif self.horizons.stride > 1:
            x0 = self.between.to(x0) @ x0
        if self.inverse is not None:
            x0 = take(torch.cat([x0, self._bound(self.inverse(x0))], dim=-1), self._order)
        return self.frame.restore(self.numbers.unnormalize(TARGET, x0), observations)

    def _bound(self, numbers: Tensor) -> Tensor:
        return numbers.clamp(-self._limit, self._limit) if math.isfinite(self._limit) else numbers

    def unnormalize(self, x0: Tensor, number: int, observations: Mapping[str, Tensor]) -> Tensor:
        """Sequences (B N, T / stride, D) under raw observations {key: (B, To, ...)} → raw actions (B, N, T, A)."""
        rows = self.rows_of(x0, observations)
        return rearrange(rows[..., self.shapes.executed], "(b n) t a -> b n t a", n=number)

    def tell_apart(self, x0: Tensor, observations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What sequences (B, T / stride, D) mean under raw observations {key: (B, To, ...)}: raw {key: (B, T, n)} of
        each key that is predicted."""
        rows = self.rows_of(x0, observations)
        return {key: rows[..., self.shapes.place_of(key)] for key in self.shapes.target or ("action",)}

    def in_units(self, actions: Tensor) -> Tensor:
        """Raw actions that are executed, (..., A), in the normalizer's units, as distances between them are told,
        (..., D); where more than the action is predicted, the rest is that of a row of zeros."""
        if self.shapes.row != self.shapes.action:
            row = torch.zeros(*actions.shape[:-1], *self.shapes.row, dtype=actions.dtype, device=actions.device)
            row[..., self.shapes.executed] = actions
            actions = row
        return self.numbers.normalize(TARGET, actions)

    def place(
        self, actions: Tensor, weights: Tensor, number: int, observations: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Raw actions from *now* on, (B, steps, A), and a weight of each step, (B, steps) → the normalized sequences
        that they are in, (B N, T, D), and weights of all steps, (B N, T, 1); 0 before now. Raises ValueError for
        sequences that say more than the actions, or not each of them."""
        others = {
            "a latent space": self.autoencoder is not None,
            ", ".join(self.shapes.target): self.shapes.row != self.shapes.action,
            f"every {self.horizons.stride}th step": self.horizons.stride > 1,
        }
        for what, is_so in others.items():
            if is_so:
                raise ValueError(f"plans of {what} are joined by --chunking receding alone")
        before = self.horizons.observed - 1
        sequence = self.normalize(actions, observations, before)
        sequence, weights = (functional.pad(one, (0, 0, before, 0)) for one in (sequence, weights[..., None]))
        return sequence.repeat_interleave(number, 0), weights.to(sequence).repeat_interleave(number, 0)

    def hold(self, observations: Mapping[str, Tensor], number: int = 1) -> Tensor:
        """Sequences that hold what is inpainted under raw observations {key: (B, To, ...)}, N for each, zeros
        elsewhere: (B N, T / stride, D)."""
        horizons, shapes = self.horizons, self.shapes
        rows = next(iter(observations.values()))
        raw = torch.zeros(
            len(rows), horizons.predicted, *shapes.row, device=self.between.device, dtype=self.numbers.precision
        )
        if self._inpainting.start:
            for key in self._seen:
                raw[:, : horizons.observed, shapes.place_of(key)] = observations[key].flatten(2).to(raw)
        if self._inpainting.goal is not None:
            goal = observations[self._inpainting.goal][:, -1:].flatten(2).to(raw)
            raw[:, -horizons.stride :, shapes.place_of(self._seen[0])] = goal
        return self.shorten(self.numbers.normalize(TARGET, raw)).repeat_interleave(number, 0)

    def _find_held(self) -> Tensor | None:
        start, goal = self._inpainting
        if not start and goal is None:
            return None
        shapes, horizons = self.shapes, self.horizons
        lacking = [key for key in self._seen if key not in shapes.observations]
        if not self._seen or lacking:
            raise ValueError(
                "inpaint-start and inpaint-goal need an observation in --target, as in --target position action; got "
                f"{', '.join(lacking or shapes.target) or 'the action alone'}"
            )
        mask = torch.zeros(1, horizons.predicted, *self.numbers.shapes[TARGET], dtype=torch.bool)
        columns = {key: range(shapes.row[0])[shapes.place_of(key)] for key in self._seen}
        if start:
            for key in self._seen:
                mask[:, : horizons.observed, self.numbers.places(TARGET, columns[key])] = True
        if goal is not None:
            size, first = math.prod(shapes.observations.get(goal, ())), self._seen[0]
            if goal not in shapes.observations or size != len(columns[first]):
                raise ValueError(
                    f"inpaint-goal must be an observation of {len(columns[first])} numbers, as {first} has; got {goal}"
                )
            mask[:, -horizons.stride :, self.numbers.places(TARGET, columns[first])] = True
        return self.shorten(mask)[0]


def interpolation(steps: int, stride: int) -> Tensor:
    """Weights (T, T / stride) by which T = `steps` rows are made of every `stride`-th one of them: linear in between,
    and like the last one behind it."""
    knots = torch.arange(steps // stride, dtype=torch.float64)
    at = (torch.arange(steps, dtype=torch.float64) / stride).clamp(max=knots[-1])
    return (1 - (at[:, None] - knots).abs()).clamp(min=0)
