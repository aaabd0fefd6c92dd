"""The numbers of an evaluation in words: values, intervals, and why a number is undefined.

Knows results as plain data. Knows no figure and no page.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from diffusion_policy.basics.metric_table import METRICS, MetricInfo, evaluated_metrics
from diffusion_policy.basics.text import three_digits
from diffusion_policy.evaluation.metrics import NONE

NOTHING = "\N{EN DASH}"
"""Stands where there is no number."""
SPACE = "\N{NO-BREAK SPACE}"


class Line(NamedTuple):
    """One number of the scorecard."""

    name: str
    value: str
    interval: str
    """95 %, `NOTHING` without one."""
    note: str
    """What it means; where it is undefined, why."""
    prominent: bool = False
    """Whether it is shown large."""


NO_MODES = Line("modes", NOTHING, NOTHING, "neither the environment nor the demonstrations name any")


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
    """Every number of `results` (what results.json holds), in the order in which it is read: that of the table of
    metrics."""
    lines = []
    for row in evaluated_metrics():
        if row.group == "modes" and not _has_modes(results):
            lines += [NO_MODES] if NO_MODES not in lines else []
        elif row.parts:
            for i, (part, metric) in enumerate(results[row.name].items()):
                of_part = row._replace(label=f"{row.label}, {part}", prominent=row.prominent and i == 0)
                lines.append(_line(results, of_part, metric))
        elif row.name == "mode_coverage":
            modes = known_modes(results)
            solved = sum(results["modes"][mode]["successes"] > 0 for mode in modes)
            lines.append(_line(results, row, results[row.name])._replace(value=f"{solved} of {len(modes)}"))
        else:
            lines.append(_line(results, row, results[row.name]))
        if row.group == "success":
            lines += _measure_lines(results)
    return lines


def _measure_lines(results: Mapping[str, Any]) -> list[Line]:
    """What the environment measured; measures that the table does not know are shown large, too."""
    lines = []
    for name, metric in results["measures"].items():
        row = METRICS.get(name)
        if row is None or row.group != "measure":
            row = MetricInfo(name, name, "measure", meaning="mean over the episodes")
        lines.append(_line(results, row._replace(prominent=True), metric))
    return lines


class Row(NamedTuple):
    """A figure of a student beside its teacher's."""

    name: str
    student: str
    teacher: str


def teacher_rows(results: Mapping[str, Any]) -> list[Row]:
    """A student's figures beside its teacher's, with 95 % intervals; none for a policy without a teacher."""
    teacher = results.get("teacher")
    if teacher is None:
        return []
    steps = [str(one["sampling"]["sampling_steps"]) for one in (results, teacher)]
    rows = [Row("sampling steps", *steps)]
    for name in ("success_rate", "mode_entropy", "commitment"):
        own, taught = (_with_interval(METRICS[name], one[name]) for one in (results, teacher))
        rows.append(Row(METRICS[name].label, own, taught))
    agreement = teacher["mode_agreement"]
    rows.append(Row("same mode as the teacher", f"{share(agreement['value'])} ({share_interval(agreement)})", NOTHING))
    times = (number(teacher["milliseconds"][name], "ms") for name in ("student", "teacher"))
    return [*rows, Row("time of a plan, median", *times)]


def _with_interval(row: MetricInfo, metric: Mapping[str, float | None]) -> str:
    if metric["value"] is None:
        return NOTHING
    if row.unit == "%":
        return f"{share(metric['value'])} ({share_interval(metric)})"
    return f"{number(metric['value'], row.unit)} ({number_interval(metric)})"


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


def tiles(lines: Iterable[Line]) -> list[Line]:
    """The lines that are shown large; undefined ones only stand in the table."""
    return [line for line in lines if line.prominent and line.value != NOTHING]


def _has_modes(results: Mapping[str, Any]) -> bool:
    return bool(known_modes(results)) and results["mode_base"] is not None


def _line(results: Mapping[str, Any], row: MetricInfo, metric: Mapping[str, float | None]) -> Line:
    """The line of one metric."""
    if metric["value"] is None:
        return Line(row.label, NOTHING, NOTHING, f"undefined: {_why(results, row)}", row.prominent)
    meaning = row.meaning.format(**_facts(results))
    if row.unit == "%":
        return Line(row.label, share(metric["value"]), share_interval(metric), meaning, row.prominent)
    return Line(row.label, number(metric["value"], row.unit), number_interval(metric, row.unit), meaning, row.prominent)


def _facts(results: Mapping[str, Any]) -> dict[str, str]:
    """What the meaning of a metric may name."""
    theirs = results["demonstrations"]["mode_entropy"]
    return {
        "all_modes": "all modes" if results["mode_base"] == "environment" else "all modes of the demonstrations",
        "demonstrated": "" if theirs is None else f"; of the demonstrations {number(theirs)}",
        "device": results["backend"]["device"],
    }


def _why(results: Mapping[str, Any], row: MetricInfo) -> str:
    """Why a number is undefined: no episodes, no successes where only they count, or else its own reason."""
    if not results["outcomes"]:
        return "no episode was finished"
    if row.of_successes and not any(outcome["success"] for outcome in results["outcomes"]):
        return "no successes"
    return "needs --repeats 2 or more" if row.needs_repeats and results["repeats"] <= 1 else row.undefined
