"""The page of two evaluations side by side: one HTML file that works offline.

Knows results and paths as plain data. Knows no simulator, no policy and no dataset.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.basics.files import write_whole
from diffusion_policy.report import text
from diffusion_policy.report.evaluation_figures import FEW_COLORS, draw_modes
from diffusion_policy.report.page import choose_colors, embed, make_tree, templates, to_svg_units
from diffusion_policy.report.svg import Plane, SceneLike

SETTINGS = ("checkpoint", "training_steps", "repeats", "planning_batch", "action_horizon")
"""Fields of results.json that are compared, beside sampling and backend."""
MOST_OVERLAYS = 48
"""Episodes whose two paths one comparison draws."""


class PathPairs(NamedTuple):
    """What two policies did in the same episodes, seen from above."""

    scene: SceneLike
    paths: Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]]
    """Of A and of B, (steps + 1, 2) each, by seed and repeat."""


def write_comparison(
    path: Path,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    comparison: Mapping[str, Any],
    pairs: PathPairs | None = None,
) -> None:
    """Write the page of two evaluations side by side: `a` and `b` are what their results.json hold, `comparison` is a
    `comparison.Comparison` as a dictionary, `pairs` the paths of both where they are known."""
    colors = choose_colors({"modes": {**a["modes"], **b["modes"]}})
    of_a, of_b = ({(one["seed"], one["repeat"]): one for one in results["outcomes"]} for results in (a, b))
    discordant = sorted(map(tuple, (*comparison["only_a_seeds"], *comparison["only_b_seeds"])))
    by_name = {line.name: line for line in text.scorecard_lines(b)}
    template = templates().get_template("report_compare.html.jinja")
    html = template.render(
        a=_side(a, colors),
        b=_side(b, colors),
        comparison=comparison,
        discordant=[(of_a[name], of_b[name]) for name in discordant],
        plane=to_svg_units(pairs.scene) if pairs else None,
        overlays=_overlays(pairs, discordant) if pairs else [],
        side_colors=FEW_COLORS,
        differences=_differences(a, b),
        lines=[(line, by_name[line.name]) for line in text.scorecard_lines(a) if line.name in by_name],
        colors=colors,
    )
    write_whole(path, html)


def _overlays(pairs: PathPairs, names: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """The paths of A and B in the same episodes, at most MOST_OVERLAYS of those named."""
    plane = Plane(pairs.scene)
    known = [name for name in names if name in pairs.paths][:MOST_OVERLAYS]
    return [
        {"seed": seed, "repeat": repeat, "paths": [plane.outline(xy) for xy in pairs.paths[seed, repeat]]}
        for seed, repeat in known
    ]


def _side(results: Mapping[str, Any], colors: Mapping[str, str]) -> dict[str, Any]:
    """One of two evaluations."""
    tree = make_tree(results)
    bars = embed(draw_modes(results, colors)) if text.known_modes(results) and not tree else None
    tiles = text.tiles(text.scorecard_lines(results))
    return {"results": results, "tiles": tiles, "tree": tree, "modes": bars}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings in which two evaluations differ: name, that of A, that of B."""
    settings_a, settings_b = (
        {name: results.get(name) for name in SETTINGS}
        | results["sampling"]
        | results["backend"]
        | (results.get("chunking") or {})
        for results in (a, b)
    )
    names = dict.fromkeys((*settings_a, *settings_b))
    both = [(name, settings_a.get(name), settings_b.get(name)) for name in names]
    return [(name, one, other) for name, one, other in both if one != other]
