"""The page of a forecast: figures of each forecaster side by side, how reliable its probabilities are, and fans of
futures over the scene.

Knows results as plain data, and arrays. Knows no policy and no store.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from diffusion_policy.basics.files import write_whole
from diffusion_policy.basics.metric_table import MetricInfo, metrics_of
from diffusion_policy.evaluation.metrics import NONE
from diffusion_policy.report.evaluation_figures import FEW_COLORS, INK, MUTED, clean, mode_colors, shorten
from diffusion_policy.report.page import embed, templates, to_svg_units
from diffusion_policy.report.svg import Plane, SceneLike
from diffusion_policy.report.text import NOTHING, number, number_interval, share, share_interval

MOST_DRAWN = 60
"""Samples of one forecaster in one fan."""
MARGIN = 40
"""Around what a fan shows [SVG units]."""


class Sampled(NamedTuple):
    """What one forecaster says of an episode."""

    row: str
    samples: np.ndarray
    """(N, steps, agents, 2), in the scene's unit."""
    modes: Sequence[str | None]
    """Of each sample."""


class Fan(NamedTuple):
    """An episode that is shown."""

    episode: int
    history: np.ndarray
    """(now + 1, agents, 2), in the scene's unit."""
    truth: np.ndarray
    """(steps, agents, 2)"""
    forecasts: Sequence[Sampled]
    probabilities: Mapping[str, float] | None
    """True ones of the modes."""


def write_forecast_page(path: Path, results: Mapping[str, Any], scene: SceneLike, fans: Sequence[Fan]) -> None:
    """Write the page; `results` is what results.json holds."""
    colors = mode_colors(results["modes"])
    reliable = [row for row, of in results["rows"].items() if of.get("reliability")]
    html = templates().get_template("forecast.html.jinja").render(
        results=results,
        lines=table_lines(results),
        forecasters=list(dict.fromkeys(one.row for fan in fans for one in fan.forecasts)),
        colors=colors,
        picture=embed(draw_reliability(results, reliable)) if reliable else None,
        plane=to_svg_units(scene),
        fans=[_to_svg(fan, Plane(scene), colors) for fan in fans],
        no_mode=MUTED,
    )  # fmt: skip
    write_whole(path, html)


def table_lines(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each figure and number of samples, with a cell (value, interval, whether it is the best) for each
    forecaster, and what the data themselves come to."""
    lines = []
    for info in metrics_of("forecast"):
        found = {row: of[info.name] for row, of in results["rows"].items() if info.name in of}
        counts = dict.fromkeys(k for of in found.values() for k in of) if info.parts else [""]
        for k in counts if found else ():
            metrics = {row: of.get(k) if info.parts else of for row, of in found.items()}
            values = [metric["value"] for metric in metrics.values() if metric and metric["value"] is not None]
            best = min(values) if len(set(values)) > 1 else None
            data = results["data"].get(info.name)
            lines.append(
                {
                    "name": f"{info.label}, k = {k}" if k else info.label,
                    "meaning": info.meaning,
                    "cells": [_cell(info, metrics.get(row), best) for row in results["rows"]],
                    "data": _cell(info, data, None),
                }
            )
    return lines


def _cell(info: MetricInfo, metric: Mapping[str, Any] | None, best: float | None) -> dict[str, Any]:
    if metric is None:
        return {"value": NOTHING, "interval": "", "best": False}
    value, interval = (share, share_interval) if info.unit == "%" else (number, number_interval)
    told = interval(metric)
    return {
        "value": value(metric["value"]),
        "interval": "" if told == NOTHING else told,
        "best": best is not None and metric["value"] == best,
    }


def draw_reliability(results: Mapping[str, Any], rows: Sequence[str]) -> Figure:
    """Of predictions that are alike, what was true of them, over what was predicted: the true probabilities where they
    are known, else the share that came; a panel a forecaster."""
    figure = Figure(figsize=(4.2 * len(rows), 4.4), layout="constrained")
    axes = figure.subplots(1, len(rows), squeeze=False, sharey=True)[0]
    for axis, row in zip(axes, rows, strict=True):
        bins = results["rows"][row]["reliability"]
        known = all(one["true"]["value"] is not None for one in bins)
        axis.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--")
        shown = {"true": ("true probability", FEW_COLORS[0])} if known else {}
        for name, (label, color) in (shown | {"happened": ("share that came", FEW_COLORS[1])}).items():
            x = np.array([one["predicted"] for one in bins]) + (0.008 if name == "happened" and known else 0)
            value, low, high = (np.array([one[name][end] for one in bins], float) for end in ("value", "low", "high"))
            ends = np.nan_to_num(np.abs(np.stack([value - low, high - value])))
            axis.errorbar(x, value, ends, color=color, marker="o", markersize=5, linewidth=1, capsize=2, label=label)
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="predicted probability")
        axis.set_title(shorten(row), loc="left", color=INK, fontsize=11)
        clean(axis)
    axes[0].legend(frameon=False, loc="upper left", fontsize=9)
    return figure


def _to_svg(fan: Fan, plane: Plane, colors: Mapping[str, str]) -> dict[str, Any]:
    """An episode in SVG units."""
    drawn = [one._replace(samples=one.samples[:MOST_DRAWN]) for one in fan.forecasts]
    now = fan.history[-1]  # (agents, 2)
    shown = [fan.history, fan.truth, *(one.samples for one in drawn)]
    corners = plane.pixels(np.concatenate([points.reshape(-1, 2) for points in shown]))
    low, high = np.maximum(corners.min(0), -1000) - MARGIN, np.minimum(corners.max(0), 2000) + MARGIN
    middle, side = (low + high) / 2, int((high - low).max())
    agents = range(fan.history.shape[1])
    return {
        "episode": fan.episode,
        "box": f"{int(middle[0] - side / 2)} {int(middle[1] - side / 2)} {side} {side}",
        "history": [plane.points(fan.history[:, i]) for i in agents],
        "truth": [plane.points(np.concatenate([now[None, i], fan.truth[:, i]])) for i in agents],
        "now": [_place(plane, now[i]) for i in agents],
        "ends": [_place(plane, fan.truth[-1, i]) for i in agents],
        "radius": side / 60,
        "probabilities": fan.probabilities,
        "forecasts": [
            {
                "row": one.row,
                "shares": {
                    mode: sum(label == mode for label in one.modes) / len(one.modes) for mode in colors if mode != NONE
                },
                "lines": [
                    {
                        "points": plane.points(np.concatenate([now[None, i], sample[:, i]])),
                        "end": _place(plane, sample[-1, i]),
                        "color": colors.get(mode or NONE, MUTED),
                    }
                    for sample, mode in zip(one.samples, one.modes, strict=False)
                    for i in agents
                ],
            }
            for one in drawn
        ],
    }


def _place(plane: Plane, xy: np.ndarray) -> dict[str, int]:
    """A point (2,) in SVG units."""
    column, row = plane.pixels(xy).tolist()
    return {"x": column, "y": row}
