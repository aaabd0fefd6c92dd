"""The page of a study of chunking: what each way to join plans does, against how long planning takes.

Knows results as plain data.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diffusion_policy.basics.files import write_whole
from diffusion_policy.basics.metric_table import METRICS
from diffusion_policy.report.evaluation_figures import INK, clean
from diffusion_policy.report.figures import line_style
from diffusion_policy.report.page import embed, templates

FIGURES = ("success_rate", "mode_entropy", "commitment", "jerk")


def write_chunking_page(path: Path, results: Mapping[str, Any]) -> None:
    """Write the page."""
    labels = {name: METRICS[name].label for name in FIGURES}
    html = templates().get_template("chunking.html.jinja").render(
        results=results, labels=labels, picture=embed(draw_chunking(results))
    )  # fmt: skip
    write_whole(path, html)


def draw_chunking(results: Mapping[str, Any]) -> Figure:
    """Each figure over the delay, a line a strategy; and the time of a plan."""
    figure = Figure(figsize=(13, 8.2), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    for i, (name, cells) in enumerate(results["strategies"].items()):
        done = {int(delay): cell for delay, cell in cells.items() if "success_rate" in cell}
        for axis, figure_name in zip(axes, FIGURES, strict=False):
            values = [done[delay][figure_name]["value"] for delay in done]
            axis.plot(list(done), np.array(values, float), label=name, **line_style(i))
        times = [cell["milliseconds"] for cell in done.values()]
        axes[len(FIGURES)].plot(list(done), times, **line_style(i))
    titles = [METRICS[name].label for name in FIGURES] + ["time of a plan [ms]"]
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, loc="left", color=INK, fontsize=11)
        axis.set_xlabel("steps that planning takes")
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if title in ("jerk", titles[-1]) or title == METRICS["jerk"].label:
            axis.set_ylim(bottom=0)
        else:
            axis.set_ylim(-0.03, 1.03)
        clean(axis)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].axis("off")
    axes[-1].legend(handles, labels, loc="center left", frameon=False)
    return figure
