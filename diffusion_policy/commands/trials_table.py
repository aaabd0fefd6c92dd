"""The trials of a sweep side by side: which is the best, the table in the terminal, and the page.

Knows the rows of sweep.json. Runs nothing.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from diffusion_policy.basics.files import write_whole
from diffusion_policy.basics.metric_table import METRICS, lower_is_better
from diffusion_policy.commands.runs import say
from diffusion_policy.commands.terminal import console
from diffusion_policy.report import page, text
from diffusion_policy.report.evaluation_figures import draw_curves

LABELS = {name: METRICS[name].label for name in ("validation_loss", "success_rate")}
"""Of the numbers by which trials are compared."""
OTHER_LOSS = {
    **dict.fromkeys(("observation_horizon", "prediction_horizon", "prediction_stride"), "other steps are predicted"),
    **dict.fromkeys(("target", "inverse_dynamics", "inpaint_start", "inpaint_goal"), "other numbers are predicted"),
    **dict.fromkeys(("schedule", "schedule_options", "noise_levels"), "other noise is taken away"),
    **dict.fromkeys(("prediction", "snr_gamma", "learn_variance", "max_delay"), "the loss itself is another"),
    **dict.fromkeys(("objective", "student", "student_steps", "mixture_components"), "the loss itself is another"),
    **dict.fromkeys(("teacher", "teacher_weights", "teacher_steps", "pairs", "pair_noise"), "something else is taught"),
    **dict.fromkeys(("normalization", "rotations"), "it is measured in other units"),
    **dict.fromkeys(("action_form", "action_reference"), "it is measured in other units"),
    **dict.fromkeys(("condition_on_mode", "condition_on_instruction", "goal"), "the network is told something else"),
    **dict.fromkeys(
        ("latent", "latent_channels", "latent_stride", "latent_width", "latent_kl"), "it is in another space"
    ),
    **dict.fromkeys(("validation_share", "seed", "memory_gb", "whole_windows"), "it is measured on other windows"),
    "max_episodes": "other episodes decide the units that it is measured in",
}
"""Options that change what the validation loss is, or what it is measured on, and how. Under all others of policy and
training its values can be compared."""


def incomparable(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The options in which these trials differ and by which their validation losses cannot be compared, and why."""
    return {
        name: why
        for name, why in OTHER_LOSS.items()
        if len({json.dumps(row["options"][name]) for row in rows if name in row["options"]}) > 1
    }


def say_incomparable(rows: Sequence[Mapping[str, Any]]) -> None:
    """Say why no trial is the best, a line a reason."""
    for name, why in incomparable(rows).items():
        console.print(
            f"validation losses cannot be compared where {name.replace('_', '-')} differs: {why}; none of these "
            "trials is called the best; --metric success_rate compares them",
            soft_wrap=True,
        )


def find_best(rows: Sequence[Mapping[str, Any]], metric: str) -> str | None:
    """The name of the best trial by a metric; None where none has finished with it, or they cannot be compared."""
    if metric == "validation_loss" and incomparable(rows):
        return None
    finished = [row for row in rows if row["status"] == "finished" and row[metric] is not None]
    best = min(finished, key=lambda row: _merit(row, metric), default=None)
    return best["name"] if best else None


def _merit(row: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """What is smallest for the best trial; of equally successful ones that with the lower loss."""
    loss = math.inf if row["validation_loss"] is None else row["validation_loss"]
    value = row[metric]["value"] if isinstance(row[metric], Mapping) else row[metric]
    return (value if lower_is_better(metric) else -value), loss


def say_options(options: Mapping[str, Any]) -> str:
    """What is varied, in words."""
    return ", ".join(f"{name.replace('_', '-')} {say(value):.100}" for name, value in options.items())


def say_numbers(row: Mapping[str, Any]) -> str:
    """What came of a trial, in words."""
    success = row["success_rate"]
    loss = f"{LABELS['validation_loss']} {text.number(row['validation_loss'])}"
    return loss + (f", {LABELS['success_rate']} {text.share(success['value'])}" if success else "")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """A row a trial."""
    names = list(rows[0]["options"])
    table = Table("trial", *(name.replace("_", "-") for name in names), *LABELS.values(), "", box=None)
    for row in rows:
        success = row["success_rate"]
        table.add_row(
            row["name"],
            *(say(row["options"][name]) for name in names),
            text.number(row["validation_loss"]),
            f"{text.share(success['value'])} ({text.share_interval(success)})" if success else text.NOTHING,
            "failed" if row["reason"] else "",
        )
    console.print(table)


def write_page(path: Path, results: Mapping[str, Any]) -> None:
    """The sweep as one page that works offline; `results` is what sweep.json holds."""
    rows, metric = results["trials"], results["metric"]
    pages = {row["name"]: f"{row['name']}/evaluation/report.html" for row in rows}
    curves = any(row["curve"] for row in rows)
    html = (
        page.templates()
        .get_template("report_sweep.html.jinja")
        .render(
            results=results,
            best=next((row for row in rows if row["name"] == results["best"]), None),
            names=list(rows[0]["options"]),
            labels=list(LABELS.values()),
            best_by=f"{'lowest' if lower_is_better(metric) else 'highest'} {METRICS[metric].label}",
            pages={name: file for name, file in pages.items() if (path.parent / file).is_file()},
            picture=page.embed(draw_curves(rows, results["best"])) if curves else None,
            say=say,
            incomparable=metric == "validation_loss" and bool(incomparable(rows)),
        )
    )
    write_whole(path, html)
