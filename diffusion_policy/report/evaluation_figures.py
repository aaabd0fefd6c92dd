"""Figures of an evaluation, and what all figures share: colours, scenes, paths. Knows plain numbers and arrays only."""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Polygon
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

from diffusion_policy.basics.metric_table import METRICS
from diffusion_policy.evaluation.metrics import NONE
from diffusion_policy.report.svg import SceneLike

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
MOST_BARS, LONGEST_NAMED = 40, 40
"""Modes in one figure, and characters of a label."""
MOST_DRAWN = 500
"""Demonstrated paths in one picture."""
MOST_CURVES_NAMED = 12
"""More of them are drawn without a legend."""
FEW_COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
"""Told apart by the colour-blind too (Okabe & Ito 2008)."""
OBSTACLE, FINISH = "#c8402f", "#1a9850"


class PlanePath(NamedTuple):
    """One episode seen from above."""

    mode: str | None
    success: bool
    xy: np.ndarray
    """(steps, 2), in the scene's unit."""
    seed: int | None = None
    repeat: int = 0


class Sight(NamedTuple):
    """An image that a policy was given."""

    seed: int
    """Of the episode."""
    key: str
    """The camera."""
    step: int
    image: np.ndarray
    """As it was cut, (height, width, channels) uint8."""
    keypoints: np.ndarray | None
    """Where the spatial softmax looks, column and row, (K, 2) [px]; None where the encoder has none."""


def choose_drawn(count: int) -> np.ndarray:
    """Indices of the episodes that are drawn of so many, at random when they are many: modes take turns, and an even
    choice could miss some of them."""
    return np.sort(np.random.default_rng(0).choice(count, min(count, MOST_DRAWN), replace=False))


def mode_colors(modes: Sequence[str]) -> dict[str, str]:
    """One colour a mode: six that everyone can tell apart, or as many hues as needed; grey for no mode."""
    labels = [mode for mode in modes if mode != NONE]
    if len(labels) <= len(FEW_COLORS):
        return {**dict(zip(labels, FEW_COLORS, strict=False)), NONE: MUTED}
    hues = matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, len(labels)))
    return {**{label: matplotlib.colors.to_hex(hue) for label, hue in zip(labels, hues, strict=True)}, NONE: MUTED}


def draw_paths(
    scene: SceneLike,
    demonstrated: Sequence[PlanePath],
    rolled_out: Sequence[PlanePath],
    plans: np.ndarray | None,
    colors: Mapping[str, str],
) -> Figure:
    """Demonstrated paths, rolled-out paths and sampled plans (N, H + 1, 2), side by side over the scene."""
    panels: list[tuple[str, Sequence[PlanePath]]] = []
    if demonstrated:
        panels.append((f"{len(demonstrated)} demonstrations", demonstrated))
    panels.append((f"{len(rolled_out)} rollouts of the policy", rolled_out))
    width, height = (abs(high - low) for low, high in (scene.x_range, scene.y_range))
    count = len(panels) + (plans is not None)
    figure = Figure(figsize=(4 * count, 4 * height / width + 0.5), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, count, sharey=True))
    for axis, (title, paths) in zip(axes, panels, strict=False):
        draw_scene(axis, scene, title)
        draw_mode_paths(axis, paths, colors)
    if plans is not None:
        draw_scene(axes[-1], scene, f"{len(plans)} plans from one state")
        for plan in plans:
            axes[-1].plot(*plan.T, color=FEW_COLORS[0], linewidth=1, alpha=0.5, marker=".", markersize=2)
        axes[-1].plot(*plans[0, 0], marker="o", color=INK, markersize=6)
    axes[0].set_ylabel(f"y [{scene.unit}]")
    label_modes(figure, colors, columns=2 * count)
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
    named = {shorten(mode): color for mode, color in colors.items() if mode != NONE}
    lines = [Line2D([], [], color=color, linewidth=3, label=mode) for mode, color in named.items()]
    if 0 < len(lines) <= len(FEW_COLORS):
        figure.legend(handles=lines, loc="outside lower center", ncols=min(columns, len(lines)), frameon=False)


def shorten(label: str) -> str:
    """A label as a figure has room for it, and as matplotlib takes it for plain text."""
    short = label if len(label) <= LONGEST_NAMED else f"{label[: LONGEST_NAMED - 1]}\N{HORIZONTAL ELLIPSIS}"
    return short.replace("$", r"\$")


def draw_scene(axis: Axes, scene: SceneLike, title: str) -> None:
    """Places, obstacles and finish line of a plane, in an axis of its ranges."""
    for corners, color in scene.places:
        axis.add_patch(Polygon(corners, facecolor=color, edgecolor="none", alpha=0.3))
    for x, y, radius in scene.circles:
        axis.add_patch(Circle((x, y), radius, facecolor=OBSTACLE, edgecolor="none", zorder=3))
    if scene.finish_y is not None:
        axis.axhline(scene.finish_y, color=FINISH, linewidth=2)
    axis.set(xlim=scene.x_range, ylim=scene.y_range, aspect="equal", xlabel=f"x [{scene.unit}]")
    axis.set_title(title, color=INK, fontsize=12)
    axis.tick_params(colors=MUTED, labelsize=9)
    for spine in axis.spines.values():
        spine.set_color(GRID)


def draw_modes(results: Mapping[str, Any], colors: Mapping[str, str]) -> Figure:
    """Share of each mode among the demonstrations and among the successful rollouts; of many, those met most often."""
    named = [label for label, count in results["modes"].items() if label != NONE or count["successes"]]
    demonstrations, modes = results["demonstrations"]["modes"], results["modes"]
    often = sorted(named, key=lambda label: -modes[label]["successes"] - demonstrations.get(label, 0))[:MOST_BARS]
    labels = [label for label in named if label in set(often)]
    demonstrated = np.array([demonstrations.get(label, 0) for label in labels], float)
    solved = np.array([modes[label]["successes"] for label in labels], float)
    figure = Figure(figsize=(7, 0.6 + 0.55 * max(3, len(labels))), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(labels))
    axis.barh(places - 0.2, solved / max(1, solved.sum()), 0.38, color=[colors[label] for label in labels])
    axis.barh(places + 0.2, demonstrated / max(1, demonstrated.sum()), 0.38, color="#cbd2d9")
    for place, count in zip(places - 0.2, solved, strict=True):
        axis.annotate(f"{count:.0f}", (count / max(1, solved.sum()), place), (4, 0), textcoords="offset points",
                      va="center", fontsize=9, color=INK)  # fmt: skip
    axis.set_yticks(places, [shorten(label) for label in labels])
    if len(labels) < len(named):
        axis.set_title(f"the {len(labels)} of {len(named)} modes met most often", loc="left", color=INK, fontsize=11)
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_xlabel("coloured: successful rollouts, grey: demonstrations", color=MUTED)
    clean(axis)
    return figure


def draw_sights(sights: Sequence[Sight]) -> Figure:
    """Images as the policy was given them, a row for each camera of an episode; dots are where its spatial softmax
    looks."""
    rows: dict[tuple[int, str], list[Sight]] = {}
    for sight in sights:
        rows.setdefault((sight.seed, sight.key), []).append(sight)
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(1.9 * columns, 2.1 * len(rows) + 0.1), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, ((seed, key), row) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.axis("off")
        for axis, sight in zip(line, row, strict=False):
            grey = {"cmap": "gray", "vmin": 0, "vmax": 255} if sight.image.shape[2] == 1 else {}
            axis.imshow(sight.image[..., :3].squeeze(), interpolation="nearest", **grey)
            if sight.keypoints is not None:
                axis.plot(
                    *sight.keypoints.T, ".", color="#ffd400", markersize=5, markeredgecolor=INK, markeredgewidth=0.5
                )
            axis.set_title(f"step {sight.step}", loc="left", fontsize=9, color=MUTED)
        named = f"{shorten(key)}, seed {seed}\nstep {row[0].step}"
        line[0].set_title(named, loc="left", fontsize=9, color=INK)
    return figure


def draw_training(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Training and validation loss over the steps."""
    figure = Figure(figsize=(7, 3.9), layout="constrained")
    axis = figure.subplots()
    axis.plot([row["step"] for row in metrics], [row["loss"] for row in metrics], color="#9fb3c8", label="training")
    validated = [row for row in metrics if row["validation_loss"] is not None]
    if validated:
        steps, losses = [row["step"] for row in validated], [row["validation_loss"] for row in validated]
        axis.plot(steps, losses, color=FEW_COLORS[3], marker="o", markersize=4, label="validation, EMA weights")
    axis.set(xlabel="training step")
    axis.set_title("loss of the prediction", loc="left", color=INK, fontsize=11)
    _scale_losses(axis)
    axis.legend(frameon=False)
    clean(axis)
    return figure


def draw_delay(rows: Sequence[Mapping[str, Any]], control_period: float | None) -> Figure:
    """Success, mode entropy and the measures that lie between 0 and 1, with their intervals, over how long planning
    takes; `control_period` [s]."""
    rows = sorted(rows, key=lambda row: row["steps"])
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    curves = {METRICS[name].label: [row[name] for row in rows] for name in ("success_rate", "mode_entropy")}
    unknown = {"value": None}  # a measure that no episode of a row has
    for name in dict.fromkeys(name for row in rows for name in row["measures"]):
        metrics = [row["measures"].get(name, unknown) for row in rows]
        if all(0 <= (m["value"] or 0) <= 1 for m in metrics):
            curves[name] = metrics
    for i, (name, metrics) in enumerate(curves.items()):
        points = [(row["steps"], m) for row, m in zip(rows, metrics, strict=True) if m["value"] is not None]
        steps, color = [step for step, _ in points], FEW_COLORS[i % len(FEW_COLORS)]
        axis.plot(steps, [m["value"] for _, m in points], color=color, marker="o", markersize=4, label=name)
        low, high = (
            np.array([m.get(end) for _, m in points], float) for end in ("low", "high")
        )  # None becomes nan: no band
        axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axis.set(xlabel="steps that planning takes", ylim=(-0.03, 1.03))
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if control_period is not None:
        in_seconds = (lambda steps: steps * control_period, lambda seconds: seconds / control_period)
        seconds = axis.secondary_xaxis("top", functions=in_seconds)  # pyright: ignore[reportArgumentType]
        seconds.set_xlabel("seconds", color=MUTED)
        seconds.tick_params(colors=MUTED, labelsize=9)
        seconds.spines["top"].set_color(GRID)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    clean(axis)
    return figure


def draw_curves(rows: Sequence[Mapping[str, Any]], best: str | None) -> Figure:
    """Validation loss over the steps, a curve a trial; the best one is thick."""
    shown = [row for row in rows if row["curve"]]
    colors = mode_colors([row["name"] for row in shown])
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for row in shown:
        steps, losses = zip(*row["curve"], strict=True)
        width = 3 if row["name"] == best else 1.2
        axis.plot(steps, losses, color=colors[row["name"]], linewidth=width, marker=".", label=row["name"])
    axis.set(xlabel="training step")
    if min(loss for row in shown for _, loss in row["curve"]) > 0:
        _scale_losses(axis)
    axis.set_title("validation loss, EMA weights", loc="left", color=INK, fontsize=11)
    if len(shown) <= MOST_CURVES_NAMED:
        figure.legend(loc="outside right upper", frameon=False)
    clean(axis)
    return figure


def _scale_losses(axis: Axes) -> None:
    """A logarithmic axis with plain numbers."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")


def to_png(figure: Figure, dpi: int = 120) -> bytes:
    """A figure as the content of a PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter that no font has, a label without room
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def clean(axis: Axes) -> None:
    """Thin frame, light grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GRID)
    axis.tick_params(colors=INK, labelsize=10)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
