"""The page of a study of policies: each as a point between what it does and what it costs.

Knows results as plain data.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_policy.basics.files import write_whole
from diffusion_policy.basics.metric_table import METRICS
from diffusion_policy.report.evaluation_figures import mode_colors
from diffusion_policy.report.page import templates

FIGURES = ("success_rate", "mode_entropy", "commitment", "jerk")
"""Of the scorecard."""


def write_policies_page(path: Path, results: Mapping[str, Any]) -> None:
    """Write the page."""
    rows = {name: [one for one in cells if "refused" not in one] for name, cells in results["rows"].items()}
    points = [_point(name, cell) for name, cells in rows.items() for cell in cells]
    html = templates().get_template("policies.html.jinja").render(
        results=results,
        labels={name: METRICS[name].label for name in FIGURES},
        colors=mode_colors(list(results["rows"])),
        points=points,
        axes=_axes(points),
    )  # fmt: skip
    write_whole(path, html)


def _point(name: str, cell: Mapping[str, Any]) -> dict[str, Any]:
    """What the scatter knows of one policy."""
    figures = {figure: cell[figure]["value"] for figure in FIGURES}
    measures = {measure: metric["value"] for measure, metric in cell["measures"].items()}
    agreement = cell["mode_agreement"] and cell["mode_agreement"]["value"]
    return {
        "row": name,
        "seed": cell["training_seed"],
        **measures,
        **figures,
        "mode_agreement": agreement,
        "milliseconds": min(cell["milliseconds"].values()),
        "parameters": cell["parameters"] / 1e6,
        "training_minutes": cell["training_minutes"],
    }


def _axes(points: list[dict[str, Any]]) -> dict[str, str]:
    """What can be an axis, and what it is called: what at least one policy has."""
    words = {
        **{name: METRICS[name].label for name in FIGURES},
        "mode_agreement": "same mode as the teacher",
        "milliseconds": "time of a plan [ms]",
        "parameters": "parameters [M]",
        "training_minutes": "training [min]",
    }
    known = {name for point in points for name, value in point.items() if isinstance(value, int | float)}
    measured = [name for name in known - words.keys() if name != "seed"]
    return {name: words.get(name, name) for name in [*words, *sorted(measured)] if name in known}
