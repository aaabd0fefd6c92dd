"""Figures of the toy problems, the sampler study and the doctor. Knows plain numbers and arrays only."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from diffusion_policy.report import FEW_COLORS, INK, clean

STYLES = ("-", "--", ":")


def draw_study(results: Mapping[str, Any]) -> Figure:
    """Success and mode entropy over the steps, and success over the time of a plan: one line a sampler."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for i, (name, cells) in enumerate(results["samplers"].items()):
        done = {int(steps): cell for steps, cell in cells.items() if "success_rate" in cell}
        success = [cell["success_rate"]["value"] for cell in done.values()]
        entropy = [cell["mode_entropy"]["value"] for cell in done.values()]
        times = [cell["milliseconds"] for cell in done.values()]
        for axis, x, y in ((axes[0], list(done), success), (axes[1], list(done), entropy), (axes[2], times, success)):
            axis.plot(x, y, label=name, **line_style(i))
    steps = sorted({int(steps) for cells in results["samplers"].values() for steps in cells})
    titles = ("success over steps", "mode entropy over steps", "success over time of a plan [ms]")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left", color=INK, fontsize=11)
        axis.set(xscale="log", ylim=(-0.03, 1.03))
        clean(axis)
    for axis in axes[:2]:
        show_steps(axis, steps)
    axes[2].xaxis.set_major_formatter("{x:g}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def line_style(i: int) -> dict[str, Any]:
    """A look of its own for the i-th line: six colours, then the same dashed, then dotted."""
    shape = STYLES[i // len(FEW_COLORS) % len(STYLES)]
    color = FEW_COLORS[i % len(FEW_COLORS)]
    return {"color": color, "linestyle": shape, "marker": "o", "markersize": 4, "linewidth": 1.5, "alpha": 0.85}


def show_steps(axis: Axes, steps: Sequence[int]) -> None:
    """Exactly these numbers along a logarithmic axis."""
    axis.xaxis.set_major_locator(FixedLocator(steps))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")
