"""The one table of metrics: what each is called, its unit, what it means, and whether less of it is better.

A metric is a row here and, where it is measured of episodes, a formula in `evaluation.scorecard`. Every table, page and
choice of the best reads this one. Knows names and words. Knows no values and no formulas.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

Group = Literal["success", "measure", "modes", "plans", "movement", "training", "forecast"]


class MetricInfo(NamedTuple):
    """What is said of one metric."""

    name: str
    """Its field in results.json, in metrics.jsonl or in a checkpoint; of a measure, what the environment calls it."""
    label: str
    """What people read."""
    group: Group
    """What it is measured of; a measure is a number that an environment gives at the end of an episode."""
    unit: str = ""
    """`%` for a share, which is kept as a number from 0 to 1."""
    lower_is_better: bool | None = None
    """None where neither less nor more is better."""
    meaning: str = ""
    """May name {all_modes}, {demonstrated} and {device}."""
    undefined: str = "not measured"
    """Why there is no number, where there are episodes."""
    of_successes: bool = False
    """Whether only successful episodes count."""
    needs_repeats: bool = False
    """Whether it takes several episodes of a seed."""
    prominent: bool = False
    """Whether it is shown large; of `parts`, the first."""
    parts: bool = False
    """Whether it is several numbers by name, such as percentiles."""


_ROWS = (
    MetricInfo(
        "success_rate", "success", "success", "%", False, meaning="episodes that reached the goal", prominent=True
    ),
    MetricInfo(
        "score", "score", "measure", "", False, meaning="mean over the episodes, the number that the literature reports"
    ),
    MetricInfo(
        "p1", "p1", "measure", "", False, meaning="share of the episodes that did at least one part of the task"
    ),
    MetricInfo(
        "p2", "p2", "measure", "", False, meaning="share of the episodes that did at least two parts of the task"
    ),
    MetricInfo(
        "path_ratio",
        "path length over the shortest",
        "measure",
        "",
        True,
        meaning="mean over the successes",
    ),
    MetricInfo(
        "smoothness",
        "squared acceleration",
        "measure",
        "m\N{SUPERSCRIPT TWO}/s\N{SUPERSCRIPT FOUR}",
        True,
        meaning="mean over the steps",
    ),
    MetricInfo("collision", "collisions", "measure", "%", True, meaning="episodes in which something was touched"),
    MetricInfo(
        "mode_coverage",
        "modes solved",
        "modes",
        "%",
        False,
        meaning="at least one success each; the interval is of the share",
        prominent=True,
    ),
    MetricInfo(
        "mode_entropy",
        "mode entropy",
        "modes",
        "",
        False,
        meaning="0: one mode, 1: {all_modes} equally often{demonstrated}",
        undefined="needs at least two modes",
        of_successes=True,
        prominent=True,
    ),
    MetricInfo(
        "mode_entropy_corrected",
        "mode entropy, corrected",
        "modes",
        "",
        False,
        meaning="Miller\N{EN DASH}Madow, as few episodes make entropy look small",
        undefined="needs at least two modes",
        of_successes=True,
    ),
    MetricInfo(
        "mode_divergence",
        "divergence from the demonstrations",
        "modes",
        "",
        True,
        meaning="Jensen\N{EN DASH}Shannon, of the modes; 0: the same shares",
        undefined="the demonstrations carry no modes",
        of_successes=True,
        prominent=True,
    ),
    MetricInfo(
        "conditional_entropy",
        "entropy for one initial state",
        "modes",
        "",
        False,
        meaning="mean over the initial states of the entropy of each",
        undefined="no initial state was solved twice",
        of_successes=True,
        needs_repeats=True,
    ),
    MetricInfo(
        "commitment",
        "commitment",
        "plans",
        "%",
        False,
        meaning="re-plans that decide as the plan before",
        undefined="no two plans faced the same decision",
        prominent=True,
    ),
    MetricInfo(
        "diversity",
        "diversity",
        "plans",
        meaning="mean distance of sequences sampled at one state; an action's range is 2",
    ),
    MetricInfo(
        "jerk",
        "jerk",
        "movement",
        "",
        True,
        meaning="third derivative of the path, per s\N{SUPERSCRIPT THREE}: lower is smoother",
        undefined="no episode is long enough",
    ),
    MetricInfo(
        "time_to_success",
        "time to success",
        "movement",
        "s",
        True,
        meaning="mean over the successes",
        undefined="no successes",
    ),
    MetricInfo(
        "planning_latency_ms",
        "planning",
        "plans",
        "ms",
        True,
        meaning="for one robot on {device}",
        prominent=True,
        parts=True,
    ),
    MetricInfo("validation_loss", "validation loss", "training", "", True),
    MetricInfo("action_error", "action error", "training", "", True),
    MetricInfo("action_error_best", "best sample", "training", "", True),
    MetricInfo("teacher_agreement", "as the teacher", "training", "%", False),
    MetricInfo("teacher_spread", "spread", "training", "", None),
    MetricInfo(
        "min_ade",
        "minADE",
        "forecast",
        "",
        True,
        meaning="distance from what came, mean over agents and steps, of the best of k samples",
        parts=True,
    ),
    MetricInfo(
        "min_fde", "minFDE", "forecast", "", True, meaning="the same at the last step, of the best there", parts=True
    ),
    MetricInfo(
        "miss_rate", "misses", "forecast", "%", True, meaning="none of k samples ends near what came", parts=True
    ),
    MetricInfo(
        "brier_min_fde",
        "brier-minFDE",
        "forecast",
        "",
        True,
        meaning="minFDE + (1 \N{MINUS SIGN} 1/k)\N{SUPERSCRIPT TWO}, each of k samples being as likely",
        parts=True,
    ),
    MetricInfo(
        "energy_score",
        "energy score",
        "forecast",
        "",
        True,
        meaning="of the joint futures of all agents: a proper score, least on average for the true distribution",
    ),
    MetricInfo("collision_rate", "collisions", "forecast", "%", True, meaning="samples in which two agents collide"),
    MetricInfo(
        "mode_error",
        "error of mode shares",
        "forecast",
        "",
        True,
        meaning="mean difference between the share of samples in a mode and its true probability",
        undefined="true probabilities are not recorded",
    ),
    MetricInfo(
        "log_score",
        "log score",
        "forecast",
        "nats",
        True,
        meaning="\N{MINUS SIGN}log of the predicted probability of the mode that came",
        undefined="no modes are known",
    ),
)

METRICS = {row.name: row for row in _ROWS}
"""By name, in the order in which they are read."""


def metrics_of(*groups: Group) -> Iterable[MetricInfo]:
    """The rows of these groups, in the order of the table."""
    return [row for row in _ROWS if row.group in groups]


def evaluated_metrics() -> Iterable[MetricInfo]:
    """The rows that are fields of results.json."""
    return metrics_of("success", "modes", "plans", "movement")


def lower_is_better(name: str) -> bool:
    """Whether the best of several values is the smallest; of a metric that is in no table, such as a loss of one's
    own, by the last word of its name."""
    row = METRICS.get(name)
    return bool(row.lower_is_better) if row else name.endswith(("loss", "error"))
