"""The page of a run on a robot: rate, jitter, latency, late actions, and what was planned and executed over time.

Knows a log as plain arrays.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from diffusion_policy.basics.files import write_whole
from diffusion_policy.report.evaluation_figures import FEW_COLORS, INK, clean
from diffusion_policy.report.page import embed, templates

if TYPE_CHECKING:
    from diffusion_policy.control.run_log import RunLog

MOST_COLUMNS = 8
"""Numbers of an action that are drawn."""
MOST_DRAWN_PLANS = 400


def summarize(log: "RunLog") -> dict[str, Any]:
    """The figures of a run, as JSON."""
    between = 1000 * np.diff(log.times)  # [ms]
    planning = [1000 * plan.seconds for plan in log.plans]
    delays = [plan.ready - plan.asked for plan in log.plans[1:]]  # the first is waited for

    def spread(values: Any) -> dict[str, float] | None:
        if not len(values):
            return None
        names = ("p50", "p95", "p99", "max")
        return dict(zip(names, map(float, np.percentile(values, [50, 95, 99, 100])), strict=True))

    seconds = log.times[-1] - log.times[0] if len(log.times) > 1 else 0.0
    return {
        "ended": log.ended,
        "failed": log.failed,
        "actions": len(log.actions),
        "rate": (len(log.actions) - 1) / seconds if seconds else None,
        "period_ms": spread(between),
        "jitter_ms": float(np.std(between)) if len(between) else None,
        "lateness_ms": spread(1000 * np.array(log.lateness)),
        "late": log.late,
        "missed": log.missed,
        "starved": log.starved,
        "limited": log.limited,
        "plans": len(log.plans),
        "planning_ms": spread(planning),
        "delay_steps": spread(delays),
        "warnings": log.warnings,
    }


def write_run_page(path: Path, results: Mapping[str, Any], log: "RunLog") -> None:
    """Write the page."""
    pictures = [] if not log.actions else [
        ("Time", "Lateness of each action, and how long each plan took", embed(draw_timing(log))),
        ("Actions", "Executed actions, dark, over the plans that they follow", embed(draw_actions(log))),
    ]  # fmt: skip
    write_whole(path, templates().get_template("run.html.jinja").render(results=results, pictures=pictures))


def draw_timing(log: "RunLog") -> Figure:
    """Lateness of each action, and planning time and delay of each plan."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(log.times, 1000 * np.array(log.lateness), color=FEW_COLORS[0], lw=1)
    above.set_title("action after its due time [ms]", loc="left", color=INK, fontsize=11)
    times = np.array([*log.times, log.times[-1]])
    asked = times[[min(plan.asked, len(log.times)) for plan in log.plans]]
    below.plot(asked, [1000 * plan.seconds for plan in log.plans], ".", color=FEW_COLORS[1], label="planning")
    delays = [1000 * log.period * (plan.ready - plan.asked) for plan in log.plans]
    below.step(asked, delays, where="post", color=FEW_COLORS[0], lw=1, label="bridged by the plan before")
    below.set_title("time of a plan [ms]", loc="left", color=INK, fontsize=11)
    below.set_xlabel("time [s]")
    below.legend(frameon=False, ncols=2, loc="upper right")
    for axis in (above, below):
        axis.set_ylim(0, 1.3 * axis.get_ylim()[1])  # room for the legend
        clean(axis)
    return figure


def draw_actions(log: "RunLog") -> Figure:
    """Each number of the action over time, with the plans."""
    actions, times = np.stack(log.actions).reshape(len(log.actions), -1), np.array(log.times)
    columns = min(actions.shape[1], MOST_COLUMNS)
    figure = Figure(figsize=(11, 1 + 2.0 * columns), layout="constrained")
    axes = figure.subplots(columns, 1, sharex=True, squeeze=False)[:, 0]
    for column, axis in enumerate(axes):
        for i, plan in enumerate(log.plans[:MOST_DRAWN_PLANS]):
            begin = times[min(plan.asked, len(times) - 1)]
            rows = plan.plan.reshape(len(plan.plan), -1)[:, column]
            color = FEW_COLORS[i % len(FEW_COLORS)]
            axis.plot(begin + log.period * np.arange(len(rows)), rows, color=color, lw=1, alpha=0.5)
        axis.step(times, actions[:, column], where="post", color=INK, lw=1.4)
        axis.set_title(f"action {column}", loc="left", color=INK, fontsize=11)
        clean(axis)
    axes[-1].set_xlabel("time [s]")
    return figure
