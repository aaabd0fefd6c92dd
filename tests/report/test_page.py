"""The page of an evaluation, used as people use it, in a real browser without a network."""

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import imageio.v3 as imageio
import numpy as np
import pytest

from diffusion_policy.envs.scene import Scene
from diffusion_policy.report.page import Fan, Moment, Pictures, PlanePath, Video, write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")

HOSTILE = "</script><img src=x onerror=alert(1)>"
MODES = ("left-near", "left-far", "right-near", HOSTILE)
TRIANGLE = ((0.4, 0.4), (0.6, 0.4), (0.6, 0.6))
SCENE = Scene((-1.0, 1.0), (0.0, 2.0), ((0.0, 1.0, 0.2),), 1.8, ((TRIANGLE, "tab:green"),))
EPISODES = 40
"""One in five fails, and completes no mode."""


def paths() -> list[PlanePath]:
    """Two repeats a seed."""
    drawn = []
    for i in range(EPISODES):
        turn = math.sin(i) * np.linspace(0, 1, 60)
        success = i % 5 != 0
        xy = np.stack([np.sin(turn), np.linspace(0.1, 1.9 if success else 0.9, 60)], axis=1)
        drawn.append(PlanePath(MODES[i % 4] if success else None, success, xy, 100 + i // 2, i % 2))
    return drawn


def fan_of(path: PlanePath) -> Fan:
    moments = [
        Moment(step, np.stack([path.xy[step] + [[0, 0], [0.1 * i, 0.2], [0.2 * i, 0.3]] for i in range(-3, 4)]))
        for step in (0, 20, 40)
    ]
    wanted = [(((0, 0), (0.1, 0), (0.1, 0.1)), "lightgreen")] * path.repeat
    return Fan(path.seed or 0, path.repeat, path.mode, path.success, path.xy, moments, wanted)


def pictures() -> Pictures:
    drawn = paths()
    fans = [fan_of(path) for path in drawn[:3]]
    videos = [Video(path.mode, path.success, path.seed or 0, b"") for path in drawn[:2]]
    return Pictures(SCENE, drawn[:4], drawn, fans, videos, [])


def results(modes: tuple[str, ...]) -> dict[str, Any]:
    """With no modes, the paths' modes count for nothing."""
    metric = {"value": 0.5, "low": 0.4, "high": 0.6}
    drawn = [path._replace(mode=path.mode if path.mode in modes else None) for path in paths()]
    taken = Counter(path.mode or "none" for path in drawn)
    solved = Counter(path.mode or "none" for path in drawn if path.success)
    names = "mode_coverage mode_entropy mode_entropy_corrected mode_divergence conditional_entropy commitment diversity"
    return {
        "environment": "tests/Plane-v0",
        "env_kwargs": {},
        "checkpoint": "run",
        "training_steps": 30,
        "episodes": EPISODES,
        "repeats": 2,
        "seeds": list(range(100, 100 + EPISODES // 2)),
        "success_rate": metric,
        "measures": {"score": metric},
        "modes": {
            label: {"episodes": taken[label], "successes": solved[label], "success_rate": metric}
            for label in (*modes, *(("none",) if modes else ()))
        },
        **dict.fromkeys((*names.split(), "jerk", "time_to_success"), metric),
        "planning_latency_ms": {"p50": metric, "p95": metric, "p99": metric},
        "mode_base": "environment" if modes else None,
        "demonstrations": {"episodes": 4, "modes": dict.fromkeys(modes, 1), "mode_entropy": 1.0},
        "errors": [],
        "delay": [{"steps": 0, "success_rate": metric, "mode_entropy": metric, "measures": {"score": metric}}],
        "control_period": 0.1,
        "sampling": {"sampler": "ddim", "sampling_steps": 8},
        "planning_batch": 25,
        "backend": {"device": "cpu", "threads": 2, "machine": "x86_64", "mode": "eager"},
        "versions": {"package": "0", "torch": "2", "python": "3"},
        "outcomes": [
            {"seed": p.seed, "repeat": p.repeat, "success": p.success, "mode": p.mode, "steps": 59, "measures": {}}
            for p in drawn
        ],
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened(NamedTuple):
    """A page in the browser, and what it complained about or asked for."""

    page: Any
    complaints: list[str]
    requests: list[str]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of evaluations of different tasks."""
    shown = pictures()
    written = {
        "modes": (results(MODES), shown),
        "no modes": (results(()), shown),
        "no scene": (results(()), Pictures(None, [], [], [], [], [])),
    }
    paths = {task: tmp_path_factory.mktemp("page") / "report.html" for task in written}
    for task, (numbers, drawn) in written.items():
        write_report(paths[task], numbers, drawn)
    return paths


@pytest.fixture
def open_page(browser: Any, reports: dict[str, Path]) -> Iterator[Callable[..., Opened]]:
    opened: list[Opened] = []

    def open_it(task: str = "modes", width: int = 1280) -> Opened:
        one = Opened(browser.new_page(viewport={"width": width, "height": 900}), [], [])
        opened.append(one)
        one.page.on("console", lambda message: one.complaints.append(message.text))
        one.page.on("pageerror", lambda error: one.complaints.append(str(error)))
        one.page.on("dialog", lambda dialog: (one.complaints.append(dialog.message), dialog.dismiss()))
        one.page.on("request", lambda request: one.requests.append(request.url))
        one.page.goto(reports[task].as_uri())
        return one

    yield open_it
    for one in opened:
        one.page.close()


def visible(page: Any, what: str) -> int:
    return page.locator(f"{what}:not(.hidden)").count()


def test_the_filter_shows_the_episodes_of_a_mode_or_an_outcome(open_page: Callable[..., Opened]) -> None:
    page, complaints, requests = open_page()
    assert (visible(page, ".card"), visible(page, "#paths polyline"), visible(page, ".video")) == (40, 40, 2)

    page.get_by_role("checkbox", name="success").uncheck()
    assert (visible(page, ".card"), visible(page, "#paths polyline"), visible(page, ".video")) == (8, 8, 1)
    assert page.locator("#shown").text_content() == "8 of 40 episodes shown."
    page.get_by_role("checkbox", name="success").check()

    page.get_by_role("button", name="none", exact=True).click()
    assert visible(page, ".card") == 0
    page.get_by_role("checkbox", name="left-far").check()
    labels = page.locator(".card:not(.hidden) .mode").all_text_contents()
    assert [label.strip() for label in labels] == ["left-far"] * 8
    page.get_by_role("button", name="all", exact=True).click()
    assert visible(page, ".card") == 40

    assert complaints == []
    assert all(url.startswith(("file:", "data:")) for url in requests)


def test_a_chosen_episode_stands_out_and_arrow_keys_move_on(open_page: Callable[..., Opened]) -> None:
    page, complaints, _ = open_page()
    page.locator(".card").nth(1).click()
    assert page.locator("#chosen").text_content() == "Seed 100, repeat 1: left-far, success after 59 steps (5.90 s)."
    assert page.locator("#paths polyline.chosen").count() == 1
    page.keyboard.press("ArrowRight")
    assert "Seed 101, repeat 0" in page.locator("#chosen").text_content()
    assert page.locator(".card[aria-pressed=true]").count() == page.locator(".card[tabindex='0']").count() == 1

    page.get_by_role("checkbox", name="failure").uncheck()
    page.locator("#failed").get_by_role("button", name="100, repeat 0", exact=True).click()
    assert "Seed 100, repeat 0: no mode completed, failure" in page.locator("#chosen").text_content()
    assert visible(page, ".card") == 40
    assert complaints == []


def test_the_slider_moves_the_sampled_sequences_along_the_episode(open_page: Callable[..., Opened]) -> None:
    page, complaints, _ = open_page()

    def drawn() -> tuple[list[str], str | None, str | None]:
        plans = page.locator("#plans polyline").evaluate_all("lines => lines.map(line => line.getAttribute('points'))")
        return plans, page.locator("#done").get_attribute("points"), page.locator("#moment-words").text_content()

    first, so_far, words = drawn()
    all_of_the_first = page.locator("#rest").get_attribute("points")
    assert (len(first), so_far, words) == (7, first[0].split(" ")[0], "step 0 (0.00 s) of 59, plan 1 of 3")
    page.locator("#moment").focus()
    page.keyboard.press("ArrowRight")
    second, so_far, words = drawn()
    assert (len(second), words) == (7, "step 20 (2.00 s) of 59, plan 2 of 3")
    assert set(first).isdisjoint(second)
    assert so_far is not None
    assert so_far.split(" ")[-1] == second[0].split(" ")[0]  # where it stands is where the plans begin

    page.locator("#close-up").check()
    assert page.locator("#fan").get_attribute("viewBox") != "0 0 1000 1000"
    assert page.locator("#wanted polygon").count() == 0
    page.locator("#fan-episode").select_option(label="100, repeat 1: left-far, success")
    assert page.locator("#wanted polygon").get_attribute("fill") == "#90ee90"
    assert drawn()[2] == "step 0 (0.00 s) of 59, plan 1 of 3"
    assert page.locator("#rest").get_attribute("points") != all_of_the_first
    assert complaints == []


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_drawn_and_fits_screens_wide_and_narrow(open_page: Callable[..., Opened], width: int) -> None:
    page, complaints, _ = open_page(width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for part in ("#panel", "#fan", "#cards"):
        pixels = imageio.imread(page.locator(part).screenshot(), extension=".png")
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 30
    assert complaints == []


@pytest.mark.parametrize("task", ["no modes", "no scene"])
def test_a_task_without_modes_or_without_a_scene_has_a_page_too(open_page: Callable[..., Opened], task: str) -> None:
    page, complaints, _ = open_page(task)
    page.get_by_role("checkbox", name="failure").uncheck()
    assert visible(page, ".card") == 32
    page.locator(".card:not(.hidden)").first.click()
    assert page.locator("[name=mode]").count() == page.locator(".tree").count() == 0
    assert page.locator("#panel").count() == (task == "no modes")
    assert complaints == []


def test_a_label_is_never_markup(open_page: Callable[..., Opened]) -> None:
    page, complaints, _ = open_page()
    assert page.get_by_role("checkbox", name=HOSTILE).count() == 1
    assert page.locator(".card .mode", has_text=HOSTILE).count() == 8
    assert page.locator("img[src=x]").count() == 0
    assert complaints == []
