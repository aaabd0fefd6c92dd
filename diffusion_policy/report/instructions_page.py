"""The page of a study of instructions: what was asked, and what was done, a table of confusions for each weight of
guidance.

Knows results as plain data.
"""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from diffusion_policy.basics.files import write_whole
from diffusion_policy.report.evaluation_figures import INK
from diffusion_policy.report.page import embed, templates

FAILED = "no success"
OTHER = "no mode"
"""Of a success."""
LETTERS, MOST_LINES = 30, 3
"""In a line of an instruction beside the picture, and lines of it; the table has it whole."""


def write_instructions_page(path: Path, results: Mapping[str, Any]) -> None:
    """Write the page."""
    html = templates().get_template("instructions.html.jinja").render(
        results=results, picture=embed(draw_instructions(results))
    )  # fmt: skip
    write_whole(path, html)


def list_columns(results: Mapping[str, Any]) -> list[str]:
    """What an episode can come to: the modes, a success without one, and none."""
    return [*results["modes"], OTHER, FAILED]


def count_done(cell: Mapping[str, Any], columns: list[str]) -> list[int]:
    """Episodes that came to each of `list_columns`."""
    done = [cell["done"].get(mode, 0) for mode in columns[:-2]]
    successes = round(cell["success_rate"]["value"] * cell["episodes"])
    return [*done, successes - sum(done), cell["episodes"] - successes]


def draw_instructions(results: Mapping[str, Any]) -> Figure:
    """A table of confusions for each weight of guidance: rows are instructions, columns what was done; frames are
    around what was asked."""
    columns, rows = list_columns(results), results["instructions"]
    weights = list(results["all"])
    size = 3 + 0.75 * len(columns) * len(weights), 1.9 + 0.5 * len(rows)
    figure = Figure(figsize=(min(size[0], 40), min(size[1], 40)), layout="constrained")
    axes = figure.subplots(1, len(weights), squeeze=False, sharey=True)[0]
    for axis, weight in zip(axes, weights, strict=True):
        counts = np.array([_counts(of_text.get(weight, {}), columns) for of_text in rows.values()], float)
        shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for (i, j), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[i, j] > 0.6 else INK
                axis.text(j, i, f"{count:.0f}", ha="center", va="center", color=color, fontsize=9)
        for i, text in enumerate(rows):
            for mode in results["asked"][text]:
                corner = columns.index(mode) - 0.5, i - 0.5
                axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=INK, linewidth=1.5))
        axis.set_title(f"guidance {weight}", loc="left", color=INK, fontsize=11)
        axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=9)
    axes[0].set_yticks(range(len(rows)), [_in_lines(text) for text in rows], fontsize=9)
    return figure


def _counts(cell: Mapping[str, Any], columns: list[str]) -> list[int]:
    return count_done(cell, columns) if "done" in cell else [0] * len(columns)


def _in_lines(text: str) -> str:
    """A text beside the picture; no dollar signs, between which matplotlib would set mathematics."""
    lines = textwrap.wrap(text, LETTERS, max_lines=MOST_LINES, placeholder=" …")
    return "\n".join(lines).replace("$", "\\$")
