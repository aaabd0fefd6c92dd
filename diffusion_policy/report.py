"""Figures and the page of an evaluation: one HTML file that works offline.

Knows results and pictures as plain data. Knows no simulator, no policy and no data set.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jinja2
import matplotlib
import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.ticker import LogLocator, PercentFormatter

from diffusion_policy.metrics import NONE

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
FEW_COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
"""Told apart by the colour-blind too (Okabe & Ito 2008)."""


class Scene(Protocol):
    """The plane that paths are drawn in [m]."""

    @property
    def x_range(self) -> tuple[float, float]: ...
    @property
    def y_range(self) -> tuple[float, float]: ...
    @property
    def circles(self) -> Sequence[tuple[float, float, float]]: ...
    @property
    def finish_y(self) -> float: ...


class PlanePath(NamedTuple):
    """One episode seen from above."""

    mode: str | None
    success: bool
    xy: np.ndarray
    """(steps, 2) [m]"""


class Video(NamedTuple):
    """One filmed episode."""

    mode: str | None
    success: bool
    seed: int
    mp4: bytes


class Pictures(NamedTuple):
    """What the page shows beside numbers; a part that is empty or None is left out."""

    scene: Scene | None
    demonstrated: Sequence[PlanePath]
    rolled_out: Sequence[PlanePath]
    fan: np.ndarray | None
    """Planned paths from one start state, (N, T + 1, 2) [m]."""
    videos: Sequence[Video]
    training: Sequence[Mapping[str, Any]]
    """Lines of metrics.jsonl."""


def write_report(path: Path, results: Mapping[str, Any], pictures: Pictures) -> None:
    """Write the page; `results` is what results.json holds."""
    colors = mode_colors(list(results["modes"]))
    figures = {
        "paths": draw_paths(pictures, colors) if pictures.scene else None,
        "modes": draw_modes(results, colors),
        "training": draw_training(pictures.training) if pictures.training else None,
    }
    videos = [
        {
            "label": video.mode or "no mode",
            "color": colors.get(video.mode or NONE, MUTED),
            "caption": f"seed {video.seed}, {'success' if video.success else 'failure'}",
            "data": base64.b64encode(video.mp4).decode(),
        }
        for video in pictures.videos
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffusion_policy", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    embedded = {name: _embed(figure) for name, figure in figures.items() if figure}
    known = [count for label, count in results["modes"].items() if label != NONE]
    page = environment.get_template("report.html.jinja").render(
        results=results,
        known=len(known),
        solved=sum(count["successes"] > 0 for count in known),
        figures=embedded,
        videos=videos,
        colors=colors,
        no_mode=NONE,
    )
    path.write_text(page, encoding="utf-8")


def mode_colors(modes: Sequence[str]) -> dict[str, str]:
    """One colour a mode: six that everyone can tell apart, or as many hues as needed; grey for no mode."""
    labels = [mode for mode in modes if mode != NONE]
    if len(labels) <= len(FEW_COLORS):
        return {**dict(zip(labels, FEW_COLORS, strict=False)), NONE: MUTED}
    hues = matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, len(labels)))
    return {**{label: matplotlib.colors.to_hex(hue) for label, hue in zip(labels, hues, strict=True)}, NONE: MUTED}


def draw_paths(pictures: Pictures, colors: Mapping[str, str]) -> Figure:
    """Demonstrated paths, rolled-out paths and the fan of plans, side by side over the scene."""
    scene = pictures.scene
    assert scene is not None
    panels: list[tuple[str, Sequence[PlanePath]]] = []
    if pictures.demonstrated:
        panels.append((f"{len(pictures.demonstrated)} demonstrations", pictures.demonstrated))
    panels.append((f"{len(pictures.rolled_out)} rollouts of the policy", pictures.rolled_out))
    width, height = scene.x_range[1] - scene.x_range[0], scene.y_range[1] - scene.y_range[0]
    count = len(panels) + (pictures.fan is not None)
    figure = Figure(figsize=(4 * count, 4 * height / width + 0.5), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, count, sharey=True))
    for axis, (title, paths) in zip(axes, panels, strict=False):
        draw_scene(axis, scene, title)
        draw_mode_paths(axis, paths, colors)
    if pictures.fan is not None:
        draw_scene(axes[-1], scene, f"{len(pictures.fan)} plans from one start state")
        for plan in pictures.fan:
            axes[-1].plot(*plan.T, color=FEW_COLORS[0], linewidth=1, alpha=0.5, marker=".", markersize=2)
        axes[-1].plot(*pictures.fan[0, 0], marker="o", color=INK, markersize=6)
    axes[0].set_ylabel("y [m]")
    label_modes(figure, colors)
    return figure


def draw_mode_paths(axis: Axes, paths: Sequence[PlanePath], colors: Mapping[str, str]) -> None:
    """Paths in the colours of their modes; a failure is dotted and ends in a cross."""
    for path in paths:
        style: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.55}
        if not path.success:
            style = {"linewidth": 1.2, "linestyle": ":"}
        axis.plot(*path.xy.T, color=colors.get(path.mode or NONE, MUTED), **style)
        if not path.success:
            axis.plot(*path.xy[-1], marker="x", color=INK, markersize=6)


def label_modes(figure: Figure, colors: Mapping[str, str], columns: int = 6) -> None:
    """A legend of the modes below, while they are few, so many side by side."""
    lines = [Line2D([], [], color=color, linewidth=3, label=mode) for mode, color in colors.items() if mode != NONE]
    if 0 < len(lines) <= len(FEW_COLORS):
        figure.legend(handles=lines, loc="outside lower center", ncols=min(columns, len(lines)), frameon=False)


def draw_scene(axis: Axes, scene: Scene, title: str) -> None:
    """Obstacles and finish line of a plane, in an axis of its ranges."""
    for x, y, radius in scene.circles:
        axis.add_patch(Circle((x, y), radius, facecolor="#c8402f", edgecolor="none", zorder=3))
    axis.axhline(scene.finish_y, color="#1a9850", linewidth=2)
    axis.set(xlim=scene.x_range, ylim=scene.y_range, aspect="equal", xlabel="x [m]")
    axis.set_title(title, color=INK, fontsize=12)
    axis.tick_params(colors=MUTED, labelsize=9)
    for spine in axis.spines.values():
        spine.set_color(GRID)


def draw_modes(results: Mapping[str, Any], colors: Mapping[str, str]) -> Figure:
    """Share of each mode among the demonstrations and among the successful rollouts."""
    labels = [label for label, count in results["modes"].items() if label != NONE or count["successes"]]
    demonstrated = np.array([results["demonstrations"]["modes"].get(label, 0) for label in labels], float)
    solved = np.array([results["modes"][label]["successes"] for label in labels], float)
    figure = Figure(figsize=(7, 0.6 + 0.55 * max(3, len(labels))), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(labels))
    axis.barh(places - 0.2, solved / max(1, solved.sum()), 0.38, color=[colors[label] for label in labels])
    axis.barh(places + 0.2, demonstrated / max(1, demonstrated.sum()), 0.38, color="#cbd2d9")
    for place, count in zip(places - 0.2, solved, strict=True):
        axis.annotate(f"{count:.0f}", (count / max(1, solved.sum()), place), (4, 0), textcoords="offset points",
                      va="center", fontsize=9, color=INK)  # fmt: skip
    axis.set_yticks(places, labels)
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_xlabel("coloured: successful rollouts, grey: demonstrations", color=MUTED)
    clean(axis)
    return figure


def draw_training(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Training and validation loss over the steps."""
    figure = Figure(figsize=(7, 3.9), layout="constrained")
    axis = figure.subplots()
    axis.plot([row["step"] for row in metrics], [row["loss"] for row in metrics], color="#9fb3c8", label="training")
    validated = [row for row in metrics if row["validation_loss"] is not None]
    if validated:
        steps, losses = [row["step"] for row in validated], [row["validation_loss"] for row in validated]
        axis.plot(steps, losses, color=FEW_COLORS[3], marker="o", markersize=4, label="validation, averaged weights")
    axis.set(yscale="log", xlabel="training step")
    axis.set_title("loss of the prediction", loc="left", color=INK, fontsize=11)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.legend(frameon=False)
    clean(axis)
    return figure


def clean(axis: Axes) -> None:
    """Thin frame, light grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GRID)
    axis.tick_params(colors=INK, labelsize=10)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def _embed(figure: Figure) -> str:
    """A figure as the base64 of its PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return base64.b64encode(buffer.getvalue()).decode()
