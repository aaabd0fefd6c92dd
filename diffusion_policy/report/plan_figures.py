"""The picture of a study of plans: each way to come to a plan a row, each seed a column.

Knows a scene and plans that were judged.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

from diffusion_policy.report.evaluation_figures import INK

BAD = "rosybrown"


class Judged(NamedTuple):
    """The plans of one seed."""

    seed: int
    paths: np.ndarray
    """(N, steps, 2)"""
    verdicts: Sequence[Any]
    """With `valid` and `mode`."""
    places: Sequence[Any]
    """Of its episode: (points, color) each."""


def draw_plans(scene: Any, ways: Mapping[str, Sequence[Judged]]) -> Figure:
    """Plans over the scene: those that come to the goal and touch nothing in the color of their mode, others gray."""
    ways = {name: some for name, some in ways.items() if some} or {"no plans": []}
    columns = max(1, max((len(some) for some in ways.values()), default=1))
    figure = Figure(figsize=(3.2 * columns, 3.4 * len(ways)), layout="constrained")
    axes = figure.subplots(len(ways), columns, squeeze=False)
    for row, (name, some) in zip(axes, ways.items(), strict=True):
        for axis in row[len(some) :]:
            axis.axis("off")
        for axis, judged in zip(row, some, strict=False):
            _draw(axis, scene, judged, name)
    return figure


def _draw(axis: Any, scene: Any, judged: Judged, name: str) -> None:
    for points, color in (*scene.places, *judged.places):
        axis.add_patch(Polygon(np.asarray(points), closed=True, facecolor=color, edgecolor="none", zorder=1))
    modes = sorted({one.mode for one in judged.verdicts if one.valid and one.mode})
    order = sorted(range(len(judged.paths)), key=lambda i: judged.verdicts[i].valid)
    for i in order:
        verdict, path = judged.verdicts[i], judged.paths[i]
        color = f"C{modes.index(verdict.mode) % 10}" if verdict.valid and verdict.mode in modes else BAD
        axis.plot(path[:, 0], path[:, 1], color=color, linewidth=0.9, alpha=0.8, zorder=2 + bool(verdict.valid))
    axis.plot(*judged.paths[0, 0], marker="o", color=INK, markersize=5, zorder=4)
    good = sum(one.valid for one in judged.verdicts)
    axis.set_title(
        f"{name}, seed {judged.seed}\n{good} of {len(judged.paths)} valid", loc="left", fontsize=9, color=INK
    )
    axis.set(xlim=scene.x_range, ylim=scene.y_range, aspect="equal", xticks=[], yticks=[])
