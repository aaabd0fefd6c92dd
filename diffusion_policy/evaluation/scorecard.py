"""Everything that episodes tell about a policy: the formula of each metric of the table that is measured of episodes.

Knows episodes and the names of `basics.metric_table`. Knows no simulator and no policy.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.evaluation import metrics
from diffusion_policy.evaluation.episode import Episode, Observations
from diffusion_policy.evaluation.intervals import Metric
from diffusion_policy.evaluation.metrics import ModeCount

PathOf = Callable[[Observations], np.ndarray]
Choice = Callable[[Observations, np.ndarray], tuple[str, str] | None]


class Sample(NamedTuple):
    """What metrics are measured of."""

    episodes: Sequence[Episode]
    """In the order of seeds and repeats."""
    solved: Mapping[str, float]
    """Effective successes by mode."""
    modes: Sequence[str]
    demonstrated: Mapping[str, int]
    period: float
    path: PathOf | None
    choice: Choice | None


FORMULAS: dict[str, Callable[[Sample], Metric]] = {
    "success_rate": lambda of: metrics.success_rate(of.episodes),
    "mode_coverage": lambda of: metrics.behaviour_coverage(of.solved, of.modes),
    "mode_entropy": lambda of: metrics.behaviour_entropy(of.solved, of.modes),
    "mode_entropy_corrected": lambda of: metrics.behaviour_entropy(of.solved, of.modes, corrected=True),
    "mode_divergence": lambda of: metrics.mode_divergence(of.solved, of.demonstrated, of.modes),
    "conditional_entropy": lambda of: metrics.conditional_entropy(of.episodes, of.modes),
    "commitment": lambda of: Metric(None) if of.choice is None else metrics.commitment(of.episodes, of.choice),
    "jerk": lambda of: metrics.jerk(of.episodes, of.path, of.period),
    "time_to_success": lambda of: metrics.time_to_success(of.episodes, of.period),
}
"""By name in the table of metrics."""


@dataclass(frozen=True)
class Scorecard:
    """The metrics of some episodes. A value is None where nothing is there to measure."""

    metrics: Mapping[str, Metric]
    """By name in the table of metrics."""
    measures: Mapping[str, Metric]
    modes: Mapping[str, ModeCount]

    def without(self, name: str) -> "Scorecard":
        """The same with one metric undefined."""
        return dataclasses.replace(self, metrics={**self.metrics, name: Metric(None)})

    def fields(self) -> dict[str, Any]:
        """What results.json holds of it."""
        tree = dataclasses.asdict(self)
        return tree.pop("metrics") | tree


def scorecard(
    episodes: Sequence[Episode],
    modes: Sequence[str],
    demonstrated: Mapping[str, int],
    period: float,
    *,
    path: PathOf | None = None,
    choice: Choice | None = None,
) -> Scorecard:
    """All metrics of episodes, which may come in any order. `modes`: all labels, `()` where unknown; `demonstrated`:
    how many demonstrations took each; `period`: of control [s]; `path` as in `metrics.jerk`; `choice` as in
    `metrics.commitment`."""
    episodes = sorted(episodes, key=lambda episode: (episode.seed, episode.repeat))
    solved = metrics.effective_successes(episodes)
    sample = Sample(episodes, solved, modes, demonstrated, period, path, choice)
    return Scorecard(
        {name: formula(sample) for name, formula in FORMULAS.items()},
        metrics.mean_measures(episodes),
        metrics.count_modes(episodes, modes),
    )
