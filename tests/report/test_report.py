import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_policy.envs.scene import Scene
from diffusion_policy.evaluation.comparison import compare
from diffusion_policy.report.comparison_page import write_comparison
from diffusion_policy.report.evaluation_figures import draw_delay, draw_paths, mode_colors
from diffusion_policy.report.page import Fan, Moment, Pictures, PlanePath, Video, write_report
from diffusion_policy.report.svg import LEAF_HEIGHT, MOST_POINTS, Plane, Tree, mode_tree
from diffusion_policy.report.text import Line, number, number_interval, scorecard_lines, share, share_interval, tiles

NOTHING = Pictures(None, [], [], [], [], [])
UNDEFINED = {"value": None, "low": None, "high": None}
MODE_METRICS = (
    *("mode_coverage", "mode_entropy", "mode_entropy_corrected", "mode_divergence"),
    *("conditional_entropy", "commitment"),
)


def results(modes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Of an evaluation with so many episodes and successes in each mode."""
    rate = {"value": 0.5, "low": 0.4, "high": 0.6}
    outcomes = [
        {"success": i < successes, "mode": None if mode == "none" else mode, "steps": 20, "measures": {"score": 0.25}}
        for mode, (episodes, successes) in modes.items()
        for i in range(episodes)
    ]
    return {
        "environment": "diffusion_policy/Avoid-v0",
        "env_kwargs": {"rows": 1},
        "checkpoint": "runs/<demo>/policy",
        "training_steps": 30,
        "episodes": 10,
        "repeats": 1,
        "seeds": list(range(100, 110)),
        "success_rate": rate,
        "measures": {"score": {"value": 0.9583, "low": 0.94, "high": 0.97}},
        "modes": {
            label: {"episodes": episodes, "successes": successes, "success_rate": rate}
            for label, (episodes, successes) in modes.items()
        },
        **{name: {"value": 0.87, "low": 0.8, "high": 0.9} for name in MODE_METRICS},
        **{name: {"value": 1234.5, "low": None, "high": None} for name in ("diversity", "jerk", "time_to_success")},
        "planning_latency_ms": {name: {"value": 12.0, "low": 11.0, "high": None} for name in ("p50", "p95", "p99")},
        "mode_base": "environment",
        "demonstrations": {"episodes": 4, "modes": {"left": 2, "right": 2}, "mode_entropy": 1.0},
        "errors": [],
        "delay": [{"steps": 0, "success_rate": rate, "mode_entropy": rate, "measures": {"score": rate}}],
        "control_period": 0.1,
        "sampling": {"sampler": "ddim", "sampling_steps": 8},
        "planning_batch": 25,
        "backend": {"device": "cpu", "threads": 2, "machine": "x86_64", "mode": "eager"},
        "versions": {"package": "0", "torch": "2", "python": "3"},
        "outcomes": [{"seed": 100 + i, "repeat": 0, **outcome} for i, outcome in enumerate(outcomes)],
    }


def two_modes() -> dict[str, Any]:
    return results({"left": (6, 4), "right": (3, 1), "none": (1, 0)})


def pictures() -> Pictures:
    triangle = ((0.4, 0.2), (0.45, 0.2), (0.4, 0.25))
    scene = Scene((0.28, 0.72), (-0.35, 0.4), ((0.5, -0.1, 0.03),), 0.35, ((triangle, "tab:green"),))
    line = np.linspace([0.5, -0.28], [0.4, 0.3], 20)
    modes = ["left"] * 6 + ["right"] * 3 + [None]
    paths = [PlanePath(mode, mode is not None, line + 0.01 * i, 100 + i) for i, mode in enumerate(modes)]
    fan = Fan(100, 0, "left", True, line, [Moment(step, np.stack([line[step : step + 5]] * 3)) for step in (0, 8)])
    metrics = [{"step": step, "loss": 1 / step, "validation_loss": 0.5 if step == 20 else None} for step in (10, 20)]
    return Pictures(scene, paths[:2], paths, [fan], [Video("left", True, 100, b"film")], metrics)


class Page(HTMLParser):
    """Collects tags, what they load, and what the page's script reads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.data: Any = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        self.is_data = ("type", "application/json") in attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script" and self.is_data:
            self.data = json.loads(data)


def write(path: Path, results: dict[str, Any], pictures: Pictures) -> tuple[Page, str]:
    """The page, and its text with all white space alike."""
    write_report(path / "report.html", results, pictures)
    text = (path / "report.html").read_text()
    return Page(text), re.sub(r"\s+", " ", text)


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    page, text = write(tmp_path, two_modes(), pictures())
    assert page.open == []
    loaded = [source for source in page.loaded if source != "#scene"]  # a part of the page itself
    assert len(loaded) == 4  # paths, modes, one video, training
    assert all(source.startswith("data:") for source in loaded)
    assert not re.search(r"https?://", text)
    for i in (0, 1, 3):
        assert base64.b64decode(loaded[i].split(",")[1]).startswith(b"\x89PNG")
    assert base64.b64decode(loaded[2].split(",")[1]) == b"film"


def test_numbers_and_names_are_shown_and_escaped(tmp_path: Path) -> None:
    _, text = write(tmp_path, two_modes(), pictures())
    assert "<b>50 %</b> <span>success</span>" in text
    assert "95 %: 40 to 60 %" in text
    assert "<b>2 of 2</b>" in text
    assert "<b>0.958</b> <span>score</span>" in text
    assert "runs/&lt;demo&gt;/policy" in text
    assert "no mode completed" in text
    assert "at least 11 ms" in text  # one end of an interval is known


def test_the_script_gets_every_episode_and_every_moment(tmp_path: Path) -> None:
    page, _ = write(tmp_path, two_modes(), pictures())
    first, *_, last = page.data["episodes"]
    assert len(page.data["episodes"]) == 10
    assert (first["seed"], first["mode"], first["outcome"], first["measures"]) == (
        100,
        "left",
        "success",
        {"score": 0.25},
    )
    assert (last["mode"], last["outcome"]) == ("none", "failure")
    assert len(first["path"].split(" ")) == 20
    (fan,) = page.data["fans"]
    assert [moment["step"] for moment in fan["moments"]] == [0, 8]
    assert fan["moments"][1]["plans"] == [" ".join(fan["path"].split(" ")[8:13])] * 3


def test_labels_and_reasons_that_look_like_markup_stay_text(tmp_path: Path) -> None:
    hostile = '</script><script>alert("1")</script>'
    outcome = results({hostile: (3, 2), "b": (1, 1)})
    outcome["errors"] = [{"seed": 7, "repeat": 0, "reason": hostile}]
    outcome["measures"][hostile] = UNDEFINED
    page, text = write(tmp_path, outcome, NOTHING)
    assert page.open == []
    assert text.count("<script") == 2  # the data and the script
    assert page.data["episodes"][0]["mode"] == hostile


def test_measures_that_are_no_numbers_do_not_break_the_data(tmp_path: Path) -> None:
    outcome = two_modes()
    outcome["outcomes"][0]["measures"] = {"score": float("nan"), "tries": 3.14159, "return": -12345.6}
    page, _ = write(tmp_path, outcome, NOTHING)
    assert page.data["episodes"][0]["measures"] == {"score": None, "tries": 3.142, "return": -12346.0}


def test_what_must_be_known_of_the_numbers_is_said(tmp_path: Path) -> None:
    outcome = two_modes() | {
        "repeats": 2,
        "seeds_repeat": False,
        "capped_steps": 1000,
        "wrappers": [
            {"entry_point": "gymnasium.wrappers:RescaleAction", "kwargs": {}},
            {"entry_point": None, "name": "X"},
        ],
        "mode_failures": [{"seed": 3, "repeat": 0, "reason": "the mode function failed: <KeyError>"}],
    }
    text = write(tmp_path, outcome, NOTHING._replace(remarks=("no film of seed 3: <no display>",)))[1]
    for words in (
        "The environment acts under RescaleAction, X.",
        "1 episode counts without a mode, such as seed 3: the mode function failed: &lt;KeyError&gt;",
        "does not repeat an episode by its seed",
        "and the entropy for one initial state is that of different ones.",
        "no time limit of their own, ended after 1000 steps",
        "no film of seed 3: &lt;no display&gt;",
    ):
        assert words in text
    assert 'id="remarks"' not in write(tmp_path, two_modes(), NOTHING)[1]


@pytest.mark.parametrize("labels", [[f"mode {i}" for i in range(1000)], ["$x^{$", "_x", "x" * 200, "日本語", "مرحبا"]])
def test_a_page_holds_many_modes_and_labels_of_any_writing(tmp_path: Path, labels: list[str]) -> None:
    outcome = results(dict.fromkeys(labels, (1, 1)))
    page, text = write(tmp_path, outcome, NOTHING)
    assert page.open == []
    assert all(f"<bdi>{label}</bdi>" in text for label in labels)
    assert [one["mode"] for one in page.data["episodes"]] == labels


def test_a_page_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, two_modes(), NOTHING)
    before = (tmp_path / "report.html").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match=r"cannot write .*report.html: No space left on device"):
        write_report(tmp_path / "report.html", two_modes(), pictures())
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == before


def test_lost_episodes_are_listed_with_their_reasons(tmp_path: Path) -> None:
    outcome = two_modes()
    assert "lost" not in write(tmp_path, outcome, NOTHING)[1]
    outcome["errors"] = [{"seed": 123456, "repeat": 2, "reason": "the worker was killed, twice"}]
    text = write(tmp_path, outcome, NOTHING)[1]
    assert "1 episode lost" in text
    assert '<td>123456</td><td>2</td><td class="words">the worker was killed, twice</td>' in text


def test_several_delays_make_a_curve_and_one_does_not(tmp_path: Path) -> None:
    outcome = two_modes()
    assert 'id="delay"' not in write(tmp_path, outcome, NOTHING)[1]
    outcome["delay"].append({**outcome["delay"][0], "steps": 3, "mode_entropy": UNDEFINED})
    page, text = write(tmp_path, outcome, NOTHING)
    assert 'id="delay"' in text
    assert "<td>3</td> <td>0.3</td>" in text  # steps and seconds
    assert len(page.loaded) == 2  # modes and delay


def test_a_measure_that_only_successes_have_may_be_missing_under_a_delay(tmp_path: Path) -> None:
    outcome = two_modes()
    (first,) = outcome["delay"]
    rows = [{**first, "measures": {}}, {**first, "steps": 3, "measures": {"path_ratio": first["success_rate"]}}]
    outcome["delay"][:] = rows
    _, text = write(tmp_path, outcome, NOTHING)
    assert text.count("<th>path_ratio</th>") == 1
    assert str(draw_delay(rows, None).axes[0].lines[-1].get_label()) == "path_ratio"
    assert np.asarray(draw_delay(rows, None).axes[0].lines[-1].get_xdata()).tolist() == [3]


def test_the_curve_runs_over_growing_delays_and_holds_what_lies_between_0_and_1() -> None:
    half, below = {"value": 0.5, "low": 0.4, "high": 0.6}, {"value": -200.0, "low": None, "high": None}
    measures = {"score": half, "return": below}
    rows = [
        {"steps": steps, "success_rate": half, "mode_entropy": UNDEFINED if steps else half, "measures": measures}
        for steps in (4, 0, 2)
    ]
    lines = {
        str(line.get_label()): np.asarray(line.get_xdata()).tolist() for line in draw_delay(rows, None).axes[0].lines
    }
    assert lines == {
        "success": [0, 2, 4],
        "mode entropy": [0],
        "score": [0, 2, 4],
    }


def test_an_evaluation_without_success_or_pictures_still_has_a_page(tmp_path: Path) -> None:
    outcome = results({"left": (3, 0), "right": (0, 0)})
    outcome |= dict.fromkeys(
        ("mode_entropy", "mode_entropy_corrected", "mode_divergence", "time_to_success"), UNDEFINED
    )
    page, text = write(tmp_path, outcome, NOTHING)
    assert len(page.loaded) == 1  # the mode chart
    assert "undefined: no successes" in text


def test_an_evaluation_of_a_task_without_modes_has_no_figure_of_modes(tmp_path: Path) -> None:
    outcome = results({})
    outcome |= {**dict.fromkeys(MODE_METRICS, UNDEFINED), "mode_base": None, "outcomes": two_modes()["outcomes"][-1:]}
    page, text = write(tmp_path, outcome, NOTHING)
    assert page.loaded == []
    assert '<svg class="tree"' not in text
    assert "neither the environment nor the demonstrations name any" in text


# Two evaluations side by side


def changed(outcome: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same evaluation with the other outcome at one seed, and other sampling steps."""
    outcomes = [{**one, "success": one["success"] != (one["seed"] == seed)} for one in outcome["outcomes"]]
    return {**outcome, "outcomes": outcomes, "sampling": {"sampler": "ddim", "sampling_steps": 4}}


def write_both(path: Path, a: dict[str, Any], b: dict[str, Any]) -> tuple[Page, str]:
    comparison = dataclasses.asdict(compare(a["outcomes"], b["outcomes"]))
    write_comparison(path / "comparison.html", a, b, comparison)
    text = (path / "comparison.html").read_text()
    return Page(text), re.sub(r"\s+", " ", text)


def test_a_comparison_says_what_was_found_and_where_only_one_succeeds(tmp_path: Path) -> None:
    a = two_modes()
    page, text = write_both(tmp_path, a, changed(a, seed=100))
    assert page.open == []
    assert len(page.loaded) == 2  # the modes of both
    assert "The difference may be chance" in text
    assert "<td>A succeeds</td><td>4</td><td><b>1</b></td>" in text
    assert "<td>A fails</td><td><b>0</b></td><td>5</td>" in text
    assert '<td>sampling_steps</td><td class="words">8</td><td class="words">4</td>' in text
    assert "Where only one succeeds: 1 episode<" in text
    assert "<td>100</td><td>0</td>" in text
    assert '<td>score</td><td class="number">0</td>' in text


def test_a_comparison_of_the_same_without_modes_has_a_page(tmp_path: Path) -> None:
    a = results({})
    a |= {"mode_base": None, "outcomes": two_modes()["outcomes"][-1:]}
    page, text = write_both(tmp_path, a, a)
    assert page.loaded == []
    assert "no setting" in text
    assert "Where only one succeeds: 0 episodes" in text


# The words of the scorecard


def line(results: dict[str, Any], name: str) -> Line:
    return next(line for line in scorecard_lines(results) if line.name == name)


@pytest.mark.parametrize(
    "key, name, change, why",
    [
        ("mode_entropy", "mode entropy", {"outcomes": []}, "no episode was finished"),
        ("mode_divergence", "divergence from the demonstrations", {}, "the demonstrations carry no modes"),
        ("conditional_entropy", "entropy for one initial state", {}, "needs --repeats 2 or more"),
        ("conditional_entropy", "entropy for one initial state", {"repeats": 3}, "no initial state was solved twice"),
        ("commitment", "commitment", {}, "no two plans faced the same decision"),
        ("time_to_success", "time to success", {}, "no successes"),
    ],
)
def test_an_undefined_number_says_why(key: str, name: str, change: dict[str, Any], why: str) -> None:
    assert line({**two_modes(), key: UNDEFINED, **change}, name).note == f"undefined: {why}"


def test_the_entropy_says_whose_modes_it_counts() -> None:
    outcome = {**two_modes(), "mode_base": "demonstrations"}
    assert (
        "all modes of the demonstrations equally often; of the demonstrations 1" in line(outcome, "mode entropy").note
    )


def test_undefined_numbers_are_no_tiles() -> None:
    shown = [line.name for line in tiles(scorecard_lines({**two_modes(), "commitment": UNDEFINED}))]
    assert shown[:4] == ["success", "score", "modes solved", "mode entropy"]
    assert shown[4:] == ["divergence from the demonstrations", "planning, p50"]


def test_numbers_have_three_digits_and_their_unit() -> None:
    numbers = [number(value) for value in (None, 0.0, 6.9e-16, 0.95834, 12.34, 999.6, 1234.5, np.nan)]
    assert numbers == ["\N{EN DASH}", "0", "0", "0.958", "12.3", "1000", "1234", "\N{EN DASH}"]
    assert share(0.963) == "96.3\N{NO-BREAK SPACE}%"
    assert share_interval({"value": 0.5, "low": 0.4, "high": 1.0}) == "40 to 100\N{NO-BREAK SPACE}%"
    assert number_interval({"value": 0.5, "low": 0.4, "high": None}, "s") == "at least 0.4\N{NO-BREAK SPACE}s"
    assert number_interval(UNDEFINED) == "\N{EN DASH}"


# What the page draws itself


@pytest.mark.parametrize("y_range, top", [((-1.0, 2.0), 2.0), ((512.0, 0.0), 0.0)])
def test_the_corners_of_a_scene_are_the_corners_of_its_picture(y_range: tuple[float, float], top: float) -> None:
    plane = Plane(Scene((10.0, 20.0), y_range))
    bottom = next(y for y in y_range if y != top)
    corners = plane.pixels(np.array([[10.0, top], [20.0, top], [10.0, bottom]]))
    np.testing.assert_array_equal(corners, [[0, 0], [1000, 0], [0, plane.height]])


@pytest.mark.parametrize("steps", [1, 2, MOST_POINTS, 5 * MOST_POINTS])
def test_a_long_path_is_thinned_out_between_its_ends(steps: int) -> None:
    plane = Plane(Scene((0.0, 1.0), (0.0, 1.0)))
    path = np.linspace([0, 0], [1, 1], steps)
    points = plane.outline(path).split(" ")
    assert len(points) == min(steps, MOST_POINTS)
    assert (points[0], points[-1]) == (plane.points(path[:1]), plane.points(path[-1:]))


def grown(*modes: str, succeeded: int = 1) -> Tree:
    tree = mode_tree(modes, dict.fromkeys(modes, succeeded), dict.fromkeys(modes, 2))
    assert tree is not None
    return tree


def test_modes_of_several_words_make_a_tree() -> None:
    tree = grown("a-x", "b-x", "a-y", "b-y")
    assert [branch.name for branch in tree.branches] == ["a", "b", "x", "y", "x", "y"]
    assert [branch.mode for branch in tree.branches] == [None, None, "a-x", "a-y", "b-x", "b-y"]
    assert [branch.successes for branch in tree.branches] == [2, 2, 1, 1, 1, 1]
    assert (tree.root.successes, tree.root.demonstrations) == (4, 8)


@pytest.mark.parametrize("modes", [(), ("a-b",), ("a", "b"), ("a-b", "c"), ("a-b", "a-b-c")])
def test_other_labels_make_no_tree(modes: tuple[str, ...]) -> None:
    assert mode_tree(modes, {}, {}) is None


@pytest.mark.parametrize("succeeded", [{}, {"0-0-0": 1}, {"0-0-0": 90, "2-1-1": 10}])
def test_the_bands_of_a_tree_lie_within_it_and_apart(succeeded: dict[str, int]) -> None:
    modes = [f"{i}-{j}-{k}" for i in range(3) for j in range(2) for k in range(2)]
    tree = mode_tree(modes, succeeded, {"0-0-0": 5})
    assert tree is not None
    leaves = [branch for branch in tree.branches if branch.mode]
    edges = [(branch.y - branch.widths[0], branch.y + branch.widths[1]) for branch in leaves]
    assert edges[0][0] >= 0
    assert edges[-1][1] <= tree.height
    assert all(below <= above for (_, below), (above, _) in pairwise(edges))
    assert tree.height >= LEAF_HEIGHT * len(modes)
    for level in range(1, 4):
        widths = [
            branch.widths for branch in tree.branches if branch.x == pytest.approx(level * leaves[0].x / 3, abs=0.1)
        ]
        np.testing.assert_allclose(np.sum(widths, axis=0), tree.root.widths, atol=0.3)


@pytest.mark.parametrize("count", [2, 6, 7, 24])
def test_every_mode_has_its_own_colour(count: int) -> None:
    labels = [str(i) for i in range(count)]
    colors = mode_colors([*labels, "none"])
    assert len({colors[label] for label in labels}) == count
    assert colors["none"] not in {colors[label] for label in labels}


@pytest.mark.parametrize("panels", [1, 2, 3])
def test_the_legend_of_the_paths_lies_within_the_picture_however_many_panels_there_are(panels: int) -> None:
    modes = [f"{first}-{second}" for first in ("left", "right") for second in ("left", "middle", "right")]
    line = np.linspace([0.4, -0.3], [0.5, 0.4], 20)
    paths = [PlanePath(mode, True, line) for mode in modes]
    scene = Scene((0.28, 0.72), (-0.35, 0.4))
    plans = line[None] if panels == 3 else None
    figure = draw_paths(scene, paths if panels > 1 else [], paths, plans, mode_colors(modes))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
