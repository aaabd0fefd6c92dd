import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_policy import envs
from diffusion_policy.report import Pictures, PlanePath, Video, mode_colors, write_report

NOTHING = Pictures(None, [], [], None, [], [])


def results(modes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    rate = {"value": 0.5, "low": 0.4, "high": 0.6}
    return {
        "environment": "diffusion_policy/Avoid-v0",
        "env_kwargs": {"rows": 1},
        "checkpoint": "runs/<demo>/policy",
        "training_steps": 30,
        "episodes": 10,
        "seeds": list(range(100, 110)),
        "success_rate": rate,
        "modes": {
            label: {"episodes": episodes, "successes": successes, "success_rate": rate}
            for label, (episodes, successes) in modes.items()
        },
        "mode_entropy": {"value": 0.87, "low": None, "high": None},
        "mode_coverage": {"value": 1.0, "low": None, "high": None},
        "demonstrations": {"episodes": 4, "modes": {"left": 2, "right": 2}, "mode_entropy": 1.0},
        "planning_latency_ms": {"p50": 12.0, "p95": 15.0},
        "sampling": {"sampler": "ddim", "sampling_steps": 8},
        "backend": {"device": "cpu", "threads": 2, "machine": "x86_64"},
        "versions": {"package": "0", "torch": "2", "python": "3"},
    }


def pictures() -> Pictures:
    scene = envs.make("diffusion_policy/Avoid-v0").unwrapped.scene
    line = np.linspace([0.5, -0.28], [0.4, 0.3], 20)
    paths = [PlanePath("left", True, line), PlanePath("right", True, line + 0.05), PlanePath(None, False, line[:9])]
    metrics = [{"step": step, "loss": 1 / step, "validation_loss": 0.5 if step == 20 else None} for step in (10, 20)]
    return Pictures(scene, paths[:2], paths, np.stack([line[:5]] * 3), [Video("left", True, 100, b"film")], metrics)


class Page(HTMLParser):
    """Collects tags and what they load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", results({"left": (6, 4), "right": (3, 1), "none": (1, 0)}), pictures())
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.loaded) == 4  # paths, modes, training, one video
    assert all(source.startswith("data:") for source in page.loaded)
    assert not re.search(r"https?://", text)
    for source in page.loaded[:3]:
        assert base64.b64decode(source.split(",")[1]).startswith(b"\x89PNG")
    assert base64.b64decode(page.loaded[3].split(",")[1]) == b"film"


def test_numbers_and_names_are_shown_and_escaped(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", results({"left": (6, 4), "right": (3, 1), "none": (1, 0)}), pictures())
    text = re.sub(r"\s+", " ", (tmp_path / "report.html").read_text())
    assert "50&nbsp;%</b>" in text
    assert "interval&nbsp;40\N{EN DASH}60&nbsp;%" in text
    assert "2 of 2</b>" in text
    assert "0.87" in text
    assert "runs/&lt;demo&gt;/policy" in text
    assert "no mode completed" in text


@pytest.mark.parametrize("value", [None, 0.0])
def test_an_evaluation_without_success_or_pictures_still_has_a_page(tmp_path: Path, value: float | None) -> None:
    outcome = results({"left": (0, 0), "right": (0, 0)})
    outcome["mode_entropy"]["value"] = value
    write_report(tmp_path / "report.html", outcome, NOTHING)
    assert len(Page((tmp_path / "report.html").read_text()).loaded) == 1  # the mode chart


@pytest.mark.parametrize("count", [2, 6, 7, 24])
def test_every_mode_has_its_own_colour(count: int) -> None:
    labels = [str(i) for i in range(count)]
    colors = mode_colors([*labels, "none"])
    assert len({colors[label] for label in labels}) == count
    assert colors["none"] not in {colors[label] for label in labels}
