"""The numbers of an evaluation in words: values, intervals, and why a number is undefined.

Knows results as plain data. Knows no figure and no page.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion_policy.basics.digits import three_digits
from diffusion_policy.evaluation.metrics import NONE

NOTHING = "\N{EN DASH}"
"""Stands where there is no number."""
SPACE = "\N{NO-BREAK SPACE}"

KNOWN_MEASURES = {
    "score": "mean over the episodes, the number that the literature reports",
    "p1": "share of the episodes that did at least one part of the task",
    "p2": "share of the episodes that did at least two parts of the task",
}
TILES = ("success", "modes solved", "mode entropy", "divergence from the demonstrations", "commitment", "planning, p50")
"""Numbers shown large, besides every measure of the environment."""


class Line(NamedTuple):
    """One number of the scorecard."""

    name: str
    value: str
    interval: str
    """95 %, `NOTHING` without one."""
    note: str
    """What it means; where it is undefined, why."""


def number(value: float | None, unit: str = "") -> str:
    """Three digits, more only before the point, and the unit."""
    if value is None or math.isnan(value):
        return NOTHING
    digits = three_digits(round(value, 9))  # 1e-16 is 0
    return f"{digits}{SPACE}{unit}" if unit else digits


def share(value: float | None) -> str:
    """A number from 0 to 1 as percent."""
    return number(None if value is None else 100 * value, "%")


def number_interval(metric: Mapping[str, float | None], unit: str = "") -> str:
    """`0.4 to 0.6`, or one end of it where the other is unknown."""
    low, high = metric.get("low"), metric.get("high")
    if low is None or high is None:
        return f"at least {number(low, unit)}" if low is not None else NOTHING
    return f"{number(low)} to {number(high, unit)}"


def share_interval(metric: Mapping[str, float | None]) -> str:
    """`40 to 60 %`."""
    return number_interval({end: None if value is None else 100 * value for end, value in metric.items()}, "%")


def known_modes(results: Mapping[str, Any]) -> list[str]:
    """The labels of all modes, without `none`."""
    return [label for label in results["modes"] if label != NONE]


def scorecard_lines(results: Mapping[str, Any]) -> list[Line]:
    """Every number of `results` (what results.json holds), in the order in which it is read."""
    none_measured = _why(results, "not measured")
    lines = [_line("success", results["success_rate"], "%", "episodes that reached the goal", none_measured)]
    for name, metric in results["measures"].items():
        lines.append(_line(name, metric, "", KNOWN_MEASURES.get(name, "mean over the episodes"), none_measured))
    lines += _mode_lines(results)
    for name, key, unit, meaning, why in (
        (
            "commitment",
            "commitment",
            "%",
            "re-plans that decide as the plan before",
            "no two plans faced the same decision",
        ),
        (
            "diversity",
            "diversity",
            "",
            "mean distance of sequences sampled at one state; an action's range is 2",
            "not measured",
        ),
        (
            "jerk",
            "jerk",
            "",
            "third derivative of the path, per s\N{SUPERSCRIPT THREE}: lower is smoother",
            "no episode is long enough",
        ),
        ("time to success", "time_to_success", "s", "mean over the successes", "no successes"),
    ):
        lines.append(_line(name, results[key], unit, meaning, _why(results, why)))
    for quantile, metric in results["planning_latency_ms"].items():
        meaning = f"for one robot on {results['backend']['device']}"
        lines.append(_line(f"planning, {quantile}", metric, "ms", meaning, "not measured"))
    return lines


def caveats(results: Mapping[str, Any]) -> list[str]:
    """What must be known of these numbers, a sentence each; the fields are missing in older results."""
    sentences = []
    if results.get("wrappers"):
        points = [str(one.get("entry_point") or one.get("name")) for one in results["wrappers"]]
        sentences.append(f"The environment acts under {', '.join(point.rpartition(':')[2] for point in points)}.")
    if results.get("mode_failures"):
        first, count = results["mode_failures"][0], len(results["mode_failures"])
        counts = "1 episode counts" if count == 1 else f"{count} episodes count"
        sentences.append(f"{counts} without a mode, such as seed {first['seed']}: {first['reason']}")
    if results.get("seeds_repeat") is False:
        sentences.append(
            "The environment does not repeat an episode by its seed: another evaluation of these seeds sees other "
            "episodes, so the two cannot be paired"
            + (", and the entropy for one initial state is that of different ones." if results["repeats"] > 1 else ".")
        )
    return sentences


def tiles(lines: list[Line], measures: Mapping[str, Any]) -> list[Line]:
    """The lines that are shown large; undefined ones only stand in the table."""
    return [line for line in lines if (line.name in TILES or line.name in measures) and line.value != NOTHING]


def _mode_lines(results: Mapping[str, Any]) -> list[Line]:
    """What the modes of the successes tell; one line that says so where modes are unknown."""
    modes = known_modes(results)
    if not modes or results["mode_base"] is None:
        return [Line("modes", NOTHING, NOTHING, "neither the environment nor the demonstrations name any")]
    solved = sum(results["modes"][mode]["successes"] > 0 for mode in modes)
    all_modes = "all modes" if results["mode_base"] == "environment" else "all modes of the demonstrations"
    theirs = results["demonstrations"]["mode_entropy"]
    beside = "" if theirs is None else f"; of the demonstrations {number(theirs)}"
    few = _why(results, "needs at least two modes", of_successes=True)
    unlabelled = _why(results, "the demonstrations carry no modes", of_successes=True)
    once = "no initial state was solved twice" if results["repeats"] > 1 else "needs --repeats 2 or more"
    return [
        Line("modes solved", f"{solved} of {len(modes)}", share_interval(results["mode_coverage"]),
             "at least one success each; the interval is of the share"),
        _line("mode entropy", results["mode_entropy"], "", f"0: one mode, 1: {all_modes} equally often{beside}", few),
        _line("mode entropy, corrected", results["mode_entropy_corrected"], "",
              "Miller\N{EN DASH}Madow, as few episodes make entropy look small", few),
        _line("divergence from the demonstrations", results["mode_divergence"], "",
              "Jensen\N{EN DASH}Shannon, of the modes; 0: the same shares", unlabelled),
        _line("entropy for one initial state", results["conditional_entropy"], "",
              "mean over the initial states of the entropy of each", _why(results, once, of_successes=True)),
    ]  # fmt: skip


def _line(name: str, metric: Mapping[str, float | None], unit: str, meaning: str, why: str) -> Line:
    if metric["value"] is None:
        return Line(name, NOTHING, NOTHING, f"undefined: {why}")
    if unit == "%":
        return Line(name, share(metric["value"]), share_interval(metric), meaning)
    return Line(name, number(metric["value"], unit), number_interval(metric, unit), meaning)


def _why(results: Mapping[str, Any], otherwise: str = "not measured", of_successes: bool = False) -> str:
    """Why a number is undefined: no episodes, no successes where only they count, or else its own reason."""
    if not results["outcomes"]:
        return "no episode was finished"
    if of_successes and not any(outcome["success"] for outcome in results["outcomes"]):
        return "no successes"
    return otherwise
