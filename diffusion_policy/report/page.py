"""The page of an evaluation: one HTML file that works offline; and what all pages share.

Knows results and pictures as plain data. Knows no simulator, no policy and no dataset.
"""

import base64
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib.colors
import numpy as np
from matplotlib.figure import Figure

from diffusion_policy.basics.files import open_regular, write_whole
from diffusion_policy.evaluation.metrics import NONE
from diffusion_policy.evaluation.results import fingerprint
from diffusion_policy.report import text
from diffusion_policy.report.evaluation_figures import (
    FEW_COLORS,
    PlanePath,
    Sight,
    draw_delay,
    draw_modes,
    draw_paths,
    draw_sights,
    draw_training,
    mode_colors,
    to_png,
)
from diffusion_policy.report.svg import WIDTH, Plane, SceneLike, Tree, mode_tree


class Moment(NamedTuple):
    """One time at which an episode was planned again."""

    step: int
    """Steps done before."""
    plans: np.ndarray
    """Paths of the sampled sequences, (N, H + 1, 2), in the scene's unit; each begins where the episode stands."""


class Fan(NamedTuple):
    """One episode with the sequences that the policy could have taken on its way."""

    seed: int
    repeat: int
    mode: str | None
    success: bool
    xy: np.ndarray
    """(steps + 1, 2), in the scene's unit."""
    moments: Sequence[Moment]


class Video(NamedTuple):
    """One filmed episode."""

    mode: str | None
    success: bool
    seed: int
    mp4: bytes


class PageMark(NamedTuple):
    """What a page says of itself."""

    evaluation: str
    """`results.fingerprint` of its results."""
    shows: tuple[str, ...]
    """What only checkpoint and simulator give: films, demonstrations, sampled plans."""


class Pictures(NamedTuple):
    """What the page shows beside numbers; a part that is empty or None is left out."""

    scene: SceneLike | None
    demonstrated: Sequence[PlanePath]
    rolled_out: Sequence[PlanePath]
    """With seed and repeat."""
    fans: Sequence[Fan]
    videos: Sequence[Video]
    training: Sequence[Mapping[str, Any]]
    """Lines of metrics.jsonl."""
    sights: Sequence[Sight] = ()
    """Images that the policy was given, in the order in which they are shown."""
    remarks: Sequence[str] = ()
    """What could not be shown, and why, a sentence each."""


MARK_WITHIN = 2**17
"""A page says in its first bytes what it is."""
NO_PICTURES = Pictures(None, (), (), (), (), ())


def write_report(path: Path, results: Mapping[str, Any], pictures: Pictures) -> None:
    """Write the page of one evaluation, whole or not at all; `results` is what results.json holds."""
    colors = choose_colors(results)
    lines = text.scorecard_lines(results)
    tree = make_tree(results)
    figures = {
        "paths": _draw_paths(pictures, pictures.scene, colors) if pictures.scene else None,
        "modes": draw_modes(results, colors) if text.known_modes(results) and not tree else None,
        "training": draw_training(pictures.training) if pictures.training else None,
        "sights": draw_sights(pictures.sights) if pictures.sights else None,
        "delay": draw_delay(results["delay"], results["control_period"]) if len(results["delay"]) > 1 else None,
    }
    videos = [
        {
            "mode": video.mode or NONE,
            "outcome": _outcome(video.success),
            "seed": video.seed,
            "data": base64.b64encode(video.mp4).decode(),
        }
        for video in pictures.videos
    ]
    template = templates().get_template("report.html.jinja")
    html = template.render(
        results=results,
        lines=lines,
        tiles=text.tiles(lines),
        beside=text.teacher_rows(results),
        figures={name: embed(figure) for name, figure in figures.items() if figure},
        tree=tree,
        colors=colors,
        episodes_of=_episodes_of(results),
        plane=to_svg_units(pictures.scene) if pictures.scene else None,
        videos=videos,
        data=_page_data(results, pictures, colors),
        remarks=(*text.caveats(results), *pictures.remarks),
        mark=_mark(results, pictures),
        sampled=_are_sampled(pictures),
    )
    write_whole(path, html)


def read_mark(path: Path) -> PageMark | None:
    """What a page says of itself; None for a page of another kind. Raises FileError for no regular file."""
    with open_regular(path) as file:
        head = file.read(MARK_WITHIN).decode(errors="replace")
    found = re.search(r'<meta name="evaluation" content="([0-9a-f]{64})" data-shows="([a-z, ]*)">', head)
    return PageMark(found[1], tuple(filter(None, found[2].split(", ")))) if found else None


def _mark(results: Mapping[str, Any], pictures: Pictures) -> PageMark:
    shows = {
        "films": pictures.videos,
        "demonstrations": pictures.demonstrated,
        "sampled plans": _are_sampled(pictures),
    }
    return PageMark(fingerprint(results), tuple(name for name, there in shows.items() if there))


def _are_sampled(pictures: Pictures) -> bool:
    """Whether several plans are shown for a moment: what might have been planned, not what was."""
    return any(len(moment.plans) > 1 for fan in pictures.fans for moment in fan.moments)


def templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffusion_policy.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.globals |= {
        "share": text.share,
        "share_interval": text.share_interval,
        "number": text.number,
        "number_interval": text.number_interval,
        "NONE": NONE,
        "NOTHING": text.NOTHING,
        "SPACE": text.SPACE,
    }
    return environment


def choose_colors(results: Mapping[str, Any]) -> dict[str, str]:
    """A colour for every mode; paths of an environment without modes are not grey."""
    return mode_colors(text.known_modes(results)) if text.known_modes(results) else {NONE: FEW_COLORS[0]}


def make_tree(results: Mapping[str, Any]) -> Tree | None:
    succeeded = {label: count["successes"] for label, count in results["modes"].items()}
    return mode_tree(text.known_modes(results), succeeded, results["demonstrations"]["modes"])


def _draw_paths(pictures: Pictures, scene: SceneLike, colors: Mapping[str, str]) -> Figure:
    """All paths, and the first fan at its first moment."""
    first = next((fan.moments[0].plans for fan in pictures.fans if fan.moments and _are_sampled(pictures)), None)
    return draw_paths(scene, pictures.demonstrated, pictures.rolled_out, first, colors)


def _outcome(success: bool) -> str:
    return "success" if success else "failure"


def _episodes_of(results: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """What the gallery is filtered by, {"mode": {label: episodes}, "outcome": ...}; modes only where there are any."""
    outcomes = Counter(_outcome(outcome["success"]) for outcome in results["outcomes"])
    modes = Counter(outcome["mode"] or NONE for outcome in results["outcomes"])
    order = dict.fromkeys((*text.known_modes(results), *modes))
    return {
        "mode": {label: modes[label] for label in order} if set(order) - {NONE} else {},
        "outcome": {label: outcomes[label] for label in ("success", "failure")},
    }


def to_svg_units(scene: SceneLike) -> dict[str, Any]:
    """The scene in SVG units."""
    plane = Plane(scene)

    def place(x: float, y: float) -> dict[str, Any]:
        column, row = plane.pixels(np.array([x, y])).tolist()
        return {"x": column, "y": row}

    return {
        "width": WIDTH,
        "height": plane.height,
        "finish_y": None if scene.finish_y is None else place(0, scene.finish_y)["y"],
        "circles": [{**place(x, y), "radius": round(radius * plane.scale)} for x, y, radius in scene.circles],
        "places": [
            {"points": plane.points(np.array(corners)), "color": matplotlib.colors.to_hex(color)}
            for corners, color in scene.places
        ],
    }


def _page_data(results: Mapping[str, Any], pictures: Pictures, colors: Mapping[str, str]) -> dict[str, Any]:
    """What the page's script reads."""
    plane = Plane(pictures.scene) if pictures.scene else None
    outlines = {(path.seed, path.repeat): plane.outline(path.xy) for path in pictures.rolled_out} if plane else {}
    return {
        "colors": colors,
        "noMode": NONE,
        "controlPeriod": results["control_period"],
        "episodes": [
            {
                "seed": outcome["seed"],
                "repeat": outcome["repeat"],
                "mode": outcome["mode"] or NONE,
                "outcome": _outcome(outcome["success"]),
                "steps": outcome["steps"],
                "measures": {name: _short(value) for name, value in outcome["measures"].items()},
                "path": outlines.get((outcome["seed"], outcome["repeat"])),
            }
            for outcome in results["outcomes"]
        ],
        "fans": [
            {
                "seed": fan.seed,
                "repeat": fan.repeat,
                "mode": fan.mode or NONE,
                "outcome": _outcome(fan.success),
                "path": plane.points(fan.xy),
                "moments": [
                    {"step": moment.step, "plans": [plane.points(plan) for plan in moment.plans]}
                    for moment in fan.moments
                ],
            }
            for fan in pictures.fans
            if fan.moments
        ]
        if plane
        else [],
    }


def _short(value: float | None) -> float | None:
    """Four digits, more only before the point; None for what JSON has no number for."""
    if value is None or not math.isfinite(value):
        return None
    return float(round(value)) if abs(value) >= 1000 else float(f"{value:.4g}")


def embed(figure: Figure) -> str:
    """A figure as the base64 of its PNG."""
    return base64.b64encode(to_png(figure)).decode()
