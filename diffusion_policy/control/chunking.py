"""Chunking: how a new plan is joined to the one that is being executed. Others call a plan an action chunk.

A strategy has up to four parts, each of which leaves things as they are where it is not given:

    observation -> roll forward -> planner, steered -> choose one of N plans -> merge with what runs -> executed

Knows planners and plans, in numpy. Knows neither policy nor simulator.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.config import ChunkingConfig, ChunkingName, ConfigError, RtcMask, with_options
from diffusion_policy.control.planner import Planner, Steering

Observations = Mapping[str, np.ndarray]
"""Raw {key: (B, To, ...)}."""


class Handover(NamedTuple):
    """What a new plan follows."""

    executing: np.ndarray
    """What is left of what is executed, from *now* on, (B, steps, A); NaN beyond its end, and all NaN before an
    episode's first plan."""
    delay_steps: int
    """d: the new plan is ready after so many steps, which are taken from `executing`."""
    action_horizon: int
    """Ta: steps between two plans."""
    made: np.ndarray
    """Plans made before in each episode, (B,)."""

    @property
    def known(self) -> np.ndarray:
        """Which steps from now on have an action already, (B, steps)."""
        return np.asarray(~np.isnan(self.executing).any(axis=-1))

    @property
    def committed(self) -> np.ndarray:
        """Which steps from now on are executed before the new plan is ready, (B, steps)."""
        return self.known & (np.arange(self.executing.shape[1]) < self.delay_steps)


class Joined(NamedTuple):
    """What came of planning."""

    plans: np.ndarray
    """The plan for each row as it was sampled, from now on, (B, steps, A)."""
    executed: np.ndarray
    """What is executed from now on, (B, steps, A)."""


class Candidates(NamedTuple):
    """What is chosen from."""

    observations: Observations
    noise: np.ndarray
    """What the plans were made of, (B, N, *noise_shape)."""
    plans: np.ndarray
    """(B, N, steps, A)"""
    handover: Handover


Steer = Callable[[Handover], Steering]
"""What plans are to agree with while they are sampled."""
Score = Callable[[Candidates], np.ndarray]
"""How good each plan is, (B, N); the highest is followed."""
Merge = Callable[[Handover, np.ndarray], np.ndarray]
"""(handover, plans (B, steps, A)) → what is executed from now on, (B, steps, A)."""
Roll = Callable[[Observations, np.ndarray], Observations]
"""(observations, committed actions (B, d, A)) → what is expected to be observed once they have been executed."""


def follow_new(handover: Handover, plans: np.ndarray) -> np.ndarray:
    """The new plan as soon as it is ready, and the one before until then; the first plan of an episode is waited for
    (Chi et al. 2023, arXiv 2303.04137, section 2.2)."""
    return np.where(handover.committed[..., None], handover.executing, plans)


@dataclass(frozen=True)
class Chunking:
    """A strategy; without any part it is the receding horizon."""

    steer: Steer | None = None
    score: Score | None = None
    merge: Merge = follow_new
    roll: Roll | None = None
    samples: int = 1
    """N: plans that are made for each observation, to choose from."""

    def require(self, planner: Planner, delay_steps: int) -> None:
        """Raise ConfigError where this planner cannot follow it under this delay."""
        for part in (self.steer, self.score):
            check = getattr(part, "require", None)
            if check is not None:
                check(planner, 0 if self.roll else delay_steps)

    def plan(self, planner: Planner, observations: Observations, noise: np.ndarray, handover: Handover) -> Joined:
        """Plan for B observations, with noise (B, N, *noise_shape). Raises FloatingPointError when a plan is not
        finite."""
        if self.roll is None or not handover.delay_steps:
            return self._plan(planner, observations, noise, handover)
        d, rolled = handover.delay_steps, handover.committed[:, 0]
        committed = np.where(rolled[:, None, None], handover.executing[:, :d], 0)
        expected = self.roll(observations, committed)
        observations = {
            key: np.where(rolled.reshape(-1, *[1] * (rows.ndim - 1)), expected[key], rows)
            for key, rows in observations.items()
        }
        rest = np.full_like(handover.executing, np.nan)  # of what runs, from when the new plan is ready on
        rest[:, :-d] = handover.executing[:, d:]
        joined = self._plan(planner, observations, noise, handover._replace(executing=rest, delay_steps=0))
        return Joined(
            *(np.where(rolled[:, None, None], np.concatenate([committed, one[:, :-d]], axis=1), one) for one in joined)
        )

    def _plan(self, planner: Planner, observations: Observations, noise: np.ndarray, handover: Handover) -> Joined:
        steering = self.steer(handover) if self.steer is not None else None
        plans = planner.sample(observations, noise, steering).astype(handover.executing.dtype)
        if not np.isfinite(plans).all():
            raise FloatingPointError("the policy planned NaN or infinity; it is not trained, or its training diverged")
        best = 0
        if self.score is not None:
            best = self.score(Candidates(observations, noise, plans, handover)).argmax(axis=1)
        chosen = plans[np.arange(len(plans)), best]
        return Joined(chosen, self.merge(handover, chosen))


@dataclass(frozen=True)
class Guided:
    """Real-time chunking (Black et al. 2025, arXiv 2506.07339, algorithm 1): sampling is guided so that a plan begins
    as what is executed goes on, exactly where the plan is not ready in time, and loosely behind that."""

    strength: float = 5.0
    """β, the largest weight of the guidance."""
    mask: RtcMask = "exp"
    """How the weights fall behind the delay; `zeros`: none behind it."""
    deviation: float = 1.0
    """See `Steering`."""

    def __call__(self, handover: Handover) -> Steering:
        """Weights of the steps (eq. 5 there)."""
        overlap, delay = (mask.sum(axis=1, keepdims=True) for mask in (handover.known, handover.committed))
        step = np.arange(handover.known.shape[1])
        left = np.clip((overlap - step) / (overlap - delay + 1), 0, 1)  # 1 at the delay's end, 0 at the overlap's
        fallen = {
            "exp": left * np.expm1(left) / np.expm1(1),
            "linear": left,
            "ones": np.ones_like(left),
            "zeros": np.zeros_like(left),
        }[self.mask]
        weights = np.where(handover.committed, 1.0, np.where(handover.known, fallen, 0.0))
        return Steering(handover.executing, weights, self.strength, self.deviation)

    def require(self, planner: Planner, delay_steps: int) -> None:
        """Raise ConfigError for a planner without gradients."""
        if not planner.guides:
            raise ConfigError(
                "--chunking rtc needs the network's gradient, which this backend has not: --backend eager"
            )


@dataclass(frozen=True)
class Inpainted:
    """Training-time real-time chunking (Black et al. 2025, arXiv 2512.05964): the policy has learned to go on from the
    actions that are executed before a plan is ready."""

    def __call__(self, handover: Handover) -> Steering:
        """What is committed, and nothing behind it."""
        return Steering(handover.executing, handover.committed.astype(np.float64), None)

    def longest(self, planner: Planner) -> int:
        """The longest delay that it can bridge [steps]."""
        return planner.longest_prefix

    def require(self, planner: Planner, delay_steps: int) -> None:
        """Raise ConfigError for a policy that has not learned it, or not for so long a delay."""
        if not planner.longest_prefix:
            raise ConfigError(
                "--chunking trained-rtc needs a policy that was trained with --max-delay; this one was not"
            )
        if delay_steps > planner.longest_prefix:
            raise ConfigError(
                f"this policy was trained for delays up to --max-delay {planner.longest_prefix}; got {delay_steps}: "
                "fewer --delay-steps, or train it for more"
            )


@dataclass(frozen=True)
class Coherence:
    """Bidirectional decoding (Liu et al. 2024, arXiv 2408.17355): of N plans the one is followed that is closest to
    what is executed. With a weak planner, such as an earlier checkpoint, a plan is also to be close to the others of
    the strong one, and far from those of the weak one. It chooses, and never averages, so modes stay."""

    decay: float = 0.5
    """Weight of a step relative to the one before it."""
    weak: Planner | None = None

    def __call__(self, candidates: Candidates) -> np.ndarray:
        """Minus the loss (eq. 6 to 8 there)."""
        backward = self._distance_to_executed(candidates.plans, candidates.handover)
        if self.weak is None:
            return -backward
        weak = self.weak.sample(candidates.observations, candidates.noise)
        positive = _nearest(candidates.plans, backward)
        negative = _nearest(weak, self._distance_to_executed(weak, candidates.handover))
        forward = _mean_distance(candidates.plans, positive) - _mean_distance(candidates.plans, negative)
        return -(backward + forward)

    def _distance_to_executed(self, plans: np.ndarray, handover: Handover) -> np.ndarray:
        """Mean distance to what is executed, the first steps weighing most, (B, N); 0 where nothing is."""
        weights = handover.known * self.decay ** np.arange(plans.shape[2])  # (B, steps)
        weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
        apart = np.linalg.norm(plans - np.nan_to_num(handover.executing)[:, None], axis=-1)  # (B, N, steps)
        return np.einsum("bns,bs->bn", apart, weights)

    def require(self, planner: Planner, delay_steps: int) -> None:
        """Raise ConfigError for a weak planner of another form."""
        if self.weak is None:
            return
        for what in ("observation_shapes", "observation_horizon", "steps", "noise_shape"):
            strong, weak = getattr(planner, what), getattr(self.weak, what)
            if strong != weak:
                raise ConfigError(f"--weak-checkpoint must have the policy's {what} {strong}; it has {weak}")


def _nearest(plans: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """The third of the plans with the least loss, (B, N / 3, steps, A)."""
    kept = np.argsort(backward, axis=1, kind="stable")[:, : max(1, plans.shape[1] // 3)]
    return np.take_along_axis(plans, kept[..., None, None], axis=1)


def _mean_distance(plans: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of each plan to some others, (B, N): the mean over those and over the steps."""
    return np.linalg.norm(plans[:, :, None] - others[:, None], axis=-1).mean(axis=(2, 3))


@dataclass(frozen=True)
class Ensemble:
    """Temporal ensembling (Zhao et al. 2023, arXiv 2304.13705, section IV-B): each action is the mean of all plans for
    its step, the i-th of them, from the oldest on, weighed by exp(-decay i). A mean of two modes is none of them."""

    decay: float = 0.01

    def __call__(self, handover: Handover, plans: np.ndarray) -> np.ndarray:
        """The mean of so far goes on, with the new plan in it."""
        left = handover.known.sum(axis=1, keepdims=True) - np.arange(plans.shape[1])
        older = np.clip(-(-left // handover.action_horizon), 0, handover.made[:, None])  # plans in the mean, (B, steps)
        weights = np.exp(-self.decay * np.arange(older.max() + 1))
        share = (weights / np.cumsum(weights))[older][..., None]  # of the new plan
        mean = share * plans + (1 - share) * np.where(handover.known[..., None], handover.executing, plans)
        return follow_new(handover, mean)


def make_chunking(
    config: ChunkingConfig, *, roll: Roll | None = None, score: Score | None = None, weak: Planner | None = None
) -> Chunking:
    """The strategy that options name; `roll`, `score`, `weak`: what its flags of that name mean. Raises ConfigError for
    --roll-forward where nothing can be rolled."""
    config.require_consistent()
    if config.roll_forward and roll is None:
        raise ConfigError("--roll-forward needs an environment with a method roll_forward; this one has none")
    steer: dict[ChunkingName, Steer] = {
        "rtc": Guided(config.rtc_strength, config.rtc_mask, config.rtc_deviation),
        "trained-rtc": Inpainted(),
    }
    return Chunking(
        steer.get(config.chunking),
        Coherence(config.bid_decay, weak) if config.chunking == "bid" else score,
        Ensemble(config.ensemble_decay) if config.chunking == "ensemble" else follow_new,
        roll if config.roll_forward else None,
        config.samples,
    )


def split_options(
    chunking: ChunkingName | Chunking, options: Mapping[str, Any]
) -> tuple[ChunkingConfig | Chunking, dict[str, Any]]:
    """Keywords of a controller: those of chunking as its config, which a `Chunking` stands for too, and the others.
    Raises ConfigError for options that cannot work."""
    names = {one.name for one in fields(ChunkingConfig)}
    own = {name: value for name, value in options.items() if name in names}
    others = {name: value for name, value in options.items() if name not in names}
    if not isinstance(chunking, Chunking):
        return with_options(ChunkingConfig(), chunking=chunking, **own), others
    if own:
        raise ConfigError(f"{', '.join(own)}: these are options of a chunking by name; got one that is made")
    return chunking, others


def scored(function: Callable[[Observations, np.ndarray], np.ndarray]) -> Score:
    """A function of observations and plans as a score. It raises ValueError where what it gives is no finite score of
    each plan."""

    def score(candidates: Candidates) -> np.ndarray:
        found = np.asarray(function(candidates.observations, candidates.plans))
        wanted = candidates.plans.shape[:2]
        if found.shape != wanted or found.dtype.kind not in "biuf" or not np.isfinite(found).all():
            raise ValueError(f"a score must give finite numbers {wanted}; got {found.dtype} {found.shape}")
        return found

    return score
