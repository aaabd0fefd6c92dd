"""The page of a study of plans: what each way to plan comes to, the plans over the scene, and a film of how they come
out of noise.

Knows results as plain data.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from diffusion_policy.basics.files import write_whole
from diffusion_policy.report.page import embed, templates
from diffusion_policy.report.text import NOTHING, number, number_interval, share, share_interval

SHARES = ("valid", "any_valid", "coverage", "success_open", "success")
"""Figures that are told in percent."""


def write_plans_page(
    path: Path, results: Mapping[str, Any], labels: Mapping[str, str], picture: Figure, film: bytes | None
) -> None:
    """Write the page. `labels`: of the figures, in their order; `picture`: of the plans; `film`: an MP4."""
    cells = results["plans"].values()
    html = templates().get_template("plans.html.jinja").render(
        results=results,
        lines={label: [say(cell.get(name), name) for cell in cells] for name, label in labels.items()},
        picture=embed(picture),
        film=None if film is None else base64.b64encode(film).decode(),
    )  # fmt: skip
    write_whole(path, html)


def say(value: Any, name: str) -> tuple[str, str]:
    """A figure and its interval, if it has one."""
    if isinstance(value, Mapping):
        told, within = (share, share_interval) if name in SHARES else (number, number_interval)
        return (NOTHING, "") if value["value"] is None else (told(value["value"]), within(value))
    return (NOTHING if value is None else number(value), "")
