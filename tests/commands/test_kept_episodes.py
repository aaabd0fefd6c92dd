"""The episodes that an evaluation keeps, and the pages that are made of them without policy and simulator."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from diffusion_policy.basics.files import WRITING
from diffusion_policy.cli import main
from diffusion_policy.commands import evaluate, kept_episodes
from diffusion_policy.commands.kept_episodes import PATH, PLAN, keep_episodes, read_kept, read_paths, trace
from diffusion_policy.commands.options.compare import Compare
from diffusion_policy.commands.options.evaluate import Evaluate
from diffusion_policy.commands.options.report import Report
from diffusion_policy.config import SampleConfig
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.evaluation.episode import Episode, Plan
from diffusion_policy.evaluation.results import read_results
from diffusion_policy.report.page import read_mark

QUICK = SampleConfig(sampling_steps=1)

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture(scope="module")
def rolled(run: Path, blank_pictures: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Episode]]:
    """An evaluation, and its episodes as they were in memory."""
    episodes: list[Episode] = []

    def choose(rolled_out: list[Episode]) -> Any:
        episodes.extend(rolled_out)
        return kept_episodes.choose_kept(rolled_out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "LATENCY_PLANS", 6)
        patch.setattr(evaluate, "choose_kept", choose)
        output = tmp_path_factory.mktemp("kept") / "e [1]"
        Evaluate(
            run, output, episodes=3, repeats=2, sampling=QUICK, workers=1, videos=0, device="cpu", delay_steps=(2, 0)
        ).run()
    return output, episodes


@pytest.fixture
def folder(rolled: tuple[Path, list[Episode]], tmp_path: Path) -> Path:
    """A copy to do as one likes with."""
    return Path(shutil.copytree(rolled[0], tmp_path / "e [1]"))


def equal(a: Episode, b: Episode) -> bool:
    return (
        (a.seed, a.repeat, a.success, a.mode, dict(a.measures))
        == (b.seed, b.repeat, b.success, b.mode, dict(b.measures))
        and a.observations.keys() == b.observations.keys()
        and all(np.array_equal(a.observations[key], b.observations[key]) for key in a.observations)
        and all(a.observations[key].dtype == b.observations[key].dtype for key in a.observations)
        and np.array_equal(a.actions, b.actions)
        and [plan.step for plan in a.plans] == [plan.step for plan in b.plans]
        and all(np.array_equal(one.actions, other.actions) for one, other in zip(a.plans, b.plans, strict=True))
    )


def test_what_is_kept_are_the_episodes_of_the_first_delay_as_they_were(rolled: tuple[Path, list[Episode]]) -> None:
    output, episodes = rolled
    kept = read_kept(output, read_results(output))
    assert len(kept.episodes) == 6
    assert all(equal(one, other) for one, other in zip(kept.episodes, episodes, strict=True))
    assert all(len(one.path) == len(episode.actions) + 1 for one, episode in zip(kept.traces, episodes, strict=True))
    assert all(
        list(one.plans) == [plan.step for plan in of.plans] for one, of in zip(kept.traces, episodes, strict=True)
    )
    scene, paths = read_paths(output, read_results(output))
    assert scene == kept.scene
    for episode, one in zip(episodes, kept.traces, strict=True):
        np.testing.assert_array_equal(paths[episode.seed, episode.repeat], one.path)


def test_kept_episodes_are_a_dataset(rolled: tuple[Path, list[Episode]], capsys) -> None:
    store = EpisodeStore.open(rolled[0] / "episodes.zarr")
    assert [one.seed for one in store.episodes()] == [100_000, 100_000, 100_001, 100_001, 100_002, 100_002]
    assert set(store.observation_keys) == set(rolled[1][0].observations)
    assert store.attributes["environment"]["id"] == "diffusion_policy/Avoid-v0"
    assert main(["dataset", "validate", str(rolled[0] / "episodes.zarr")]) == 0


def test_the_page_is_made_again_without_policy_and_simulator(folder: Path, tmp_path: Path, capsys) -> None:
    page = Report(folder, tmp_path / "pages" / "again.html").run()
    assert page == tmp_path / "pages" / "again.html"
    html, before = page.read_text(), (folder / "report.html").read_text()
    assert "What was planned" in html
    assert "planned sequence<" in html
    assert "this page was made again without films, demonstrations and other plans" in html
    assert [one["path"] for one in data_of(html)["episodes"]] == [one["path"] for one in data_of(before)["episodes"]]
    assert {len(moment["plans"]) for fan in data_of(html)["fans"] for moment in fan["moments"]} == {1}
    assert Report(folder, page).run() == page  # the same page of the same evaluation
    assert "made again without films" in " ".join(capsys.readouterr().err.split())


def data_of(html: str) -> dict[str, Any]:
    """What the page's script reads."""
    return json.loads(html.partition('id="data">')[2].partition("</script>")[0])


def test_a_page_that_shows_more_or_something_else_is_not_replaced(folder: Path, capsys) -> None:
    before = (folder / "report.html").read_bytes()
    mark = read_mark(folder / "report.html")
    assert mark is not None
    assert mark.shows == ("demonstrations", "sampled plans")
    assert main(["report", str(folder)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "report.html shows demonstrations, sampled plans, which this one would not; choose another --output" in said
    assert (folder / "report.html").read_bytes() == before
    for other in (b"", b"mine", before.replace(mark.evaluation.encode(), b"0" * 64)):
        (folder / "report.html").write_bytes(other)
        assert main(["report", str(folder)]) == 2
        assert "is not known as a page of this evaluation" in " ".join(capsys.readouterr().err.split())
        assert (folder / "report.html").read_bytes() == other
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert main(["report", str(folder)]) == 0


def test_a_folder_without_results_and_an_output_that_is_no_page_are_one_line(
    folder: Path, tmp_path: Path, capsys
) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "there is no results.json of an evaluation" in capsys.readouterr().err
    assert main(["report", str(folder), "--output", str(tmp_path / "page")]) == 2
    assert "must be a file that ends in .html" in " ".join(capsys.readouterr().err.split())


def delete(folder: Path) -> None:
    shutil.rmtree(folder / "episodes.zarr")


def of_another(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    results["outcomes"][0]["steps"] += 1
    (folder / "results.json").write_text(json.dumps(results))


def change_attribute(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        group = zarr.open_group(str(folder / "episodes.zarr"), mode="r+")
        own: Any = group.attrs["evaluation"]
        group.attrs["evaluation"] = {**own, name: value}

    return change


def change_scene(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        group = zarr.open_group(str(folder / "episodes.zarr"), mode="r+")
        own: Any = group.attrs["evaluation"]
        group.attrs["evaluation"] = {**own, "scene": {**own["scene"], **changes}}

    return change


def lose_an_array(key: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / "episodes.zarr" / "data" / key)


def damage(key: str) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        chunk = min((folder / "episodes.zarr" / "data" / key).glob("c*"))
        content = bytearray(chunk.read_bytes())
        content[len(content) // 2] ^= 255
        chunk.write_bytes(content)

    return flip


def empty(folder: Path) -> None:
    delete(folder)
    (folder / "episodes.zarr").mkdir()


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (delete, "has no episodes.zarr"),
    (empty, "episodes.zarr"),
    (of_another, "holds the episodes of another evaluation"),
    (change_attribute("sha256", 3), "holds the episodes of another evaluation"),
    (change_attribute("scene", "a plane"), "must be a JSON object"),
    (change_scene(x_range=[0, 0]), "the scene must be a plane"),
    (change_scene(y_range=[0, 1e300]), "the scene must be a plane"),
    (change_scene(circles=[[1e30, 0, 1]]), "far outside of its scene"),
    (change_scene(places=[[[[0, 0], [1, 0], [0, 1]], "javascript:"]]), "a place whose colour is none"),
    (change_scene(unit="$\\frac"), "unit must be a short word"),
    (lose_an_array("action"), "action"),
    (lose_an_array(PLAN), "has no plans of its actions"),
    (lose_an_array(PATH), "no paths of two columns"),
    (damage("action"), "data/action is damaged"),
    (damage(PATH), f"data/{PATH} is damaged"),
]


@pytest.mark.parametrize("harm, message", DAMAGES, ids=[str(i) for i in range(len(DAMAGES))])
def test_episodes_that_are_damaged_missing_or_of_another_evaluation_are_refused(
    folder: Path, harm: Callable[[Path], None], message: str
) -> None:
    harm(folder)
    with pytest.raises(ValueError, match=message):
        read_kept(folder, read_results(folder))


@pytest.mark.parametrize(
    "harm, remark",
    [(delete, "has no episodes.zarr"), (of_another, "of another evaluation"), (damage("action"), "action is damaged")],
)
def test_episodes_that_cannot_be_read_cost_the_paths_only(
    folder: Path, tmp_path: Path, capsys, harm: Callable[[Path], None], remark: str
) -> None:
    harm(folder)
    assert main(["report", str(folder), "--output", str(tmp_path / "again.html")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "without paths, plans, films" in said
    assert remark in said
    html = (tmp_path / "again.html").read_text()
    assert "<h2>Scorecard</h2>" in html
    assert "What was planned" not in html


def test_an_evaluation_that_was_killed_before_its_page_draws_the_kept_episodes(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """As it would be after a kill: no page, and what was being written lies there."""
    before = data_of((folder / "report.html").read_text())
    (folder / "report.html").unlink()
    (folder / f"{WRITING}report.html").write_text("<html")
    (folder / f"{WRITING}episodes.zarr" / "episodes.zarr").mkdir(parents=True)
    monkeypatch.setattr(evaluate, "run_episodes", None)
    Evaluate(
        run, folder, episodes=3, repeats=2, sampling=QUICK, workers=1, videos=0, device="cpu", delay_steps=(2, 0)
    ).run()
    assert data_of((folder / "report.html").read_text()) == before
    assert sorted(each.name for each in folder.iterdir()) == ["episodes.zarr", "report.html", "results.json"]
    assert "no episode was run again" in " ".join(capsys.readouterr().err.split())


def test_damaged_episodes_cost_an_evaluation_that_goes_on_its_paths_only(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (folder / "report.html").unlink()
    damage("action")(folder)
    monkeypatch.setattr(evaluate, "run_episodes", None)
    Evaluate(
        run, folder, episodes=3, repeats=2, sampling=QUICK, workers=1, videos=0, device="cpu", delay_steps=(2, 0)
    ).run()
    said = " ".join(capsys.readouterr().err.split())
    assert "its page is without paths, plans and films:" in said
    assert "data/action is damaged" in said
    assert data_of((folder / "report.html").read_text())["fans"] == []


# Keeping


class Line:
    """A plane with one straight path."""

    scene: Any = None

    def path(self, observations: Any) -> np.ndarray:
        return observations["state"][:, :2]

    def planned_path(self, observation: Any, actions: np.ndarray) -> np.ndarray:
        return observation["state"][:2] + np.concatenate([np.zeros((1, 2)), np.cumsum(actions, axis=0)])


def made(seed: int, steps: int = 4, **more: np.ndarray) -> Episode:
    actions = np.full((steps, 2), 0.5, np.float32)
    state = np.arange(2.0 * (steps + 1)).reshape(-1, 2)
    plans = Plan(0, actions[:4]), Plan(2, -actions[:4])
    return Episode(seed, True, "left", {"state": state, **more}, actions, plans=plans)


def results_of(episodes: list[Episode]) -> dict[str, Any]:
    return {
        "environment": "Any-v0", "env_kwargs": {}, "signals": {}, "wrappers": [], "control_period": 0.1,
        "modes": {"left": {}, "none": {}},
        "outcomes": [
            {"seed": one.seed, "repeat": one.repeat, "success": one.success, "mode": one.mode,
             "steps": len(one.actions), "measures": {}}
            for one in episodes
        ],
    }  # fmt: skip


def test_only_as_many_episodes_are_kept_as_the_bound_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = [made(seed, image=np.zeros((5, 8, 8, 3), np.uint8)) for seed in range(10)]
    monkeypatch.setattr(kept_episodes, "MOST_BYTES", 4 * kept_episodes._size(episodes[0]) + 1)
    kept = kept_episodes.choose_kept(episodes)
    assert [one.seed for one in kept] == [0, 1, 2, 3]
    keep_episodes(tmp_path, results_of(episodes), kept, None, [])
    read = read_kept(tmp_path, results_of(episodes))
    assert all(equal(one, other) for one, other in zip(read.episodes, episodes, strict=False))
    assert (len(read.episodes), read.scene, read.traces) == (4, None, [])
    monkeypatch.setattr(kept_episodes, "MOST_BYTES", 10)
    with pytest.raises(ValueError, match="at most 0 MB are read"):
        read_kept(tmp_path, results_of(episodes))
    with pytest.raises(ValueError, match="one alone takes more than"):
        keep_episodes(tmp_path, results_of(episodes), kept_episodes.choose_kept(episodes), None, [])


def test_many_episodes_are_written_in_several_appends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_episodes, "AT_ONCE", 3)
    episodes = [made(seed, steps=4 + seed) for seed in range(8)]
    line: Any = Line()
    keep_episodes(tmp_path, results_of(episodes), episodes, None, [trace(one, line) for one in episodes])
    read = read_kept(tmp_path, results_of(episodes))
    assert all(equal(one, other) for one, other in zip(read.episodes, episodes, strict=True))


def test_observations_that_no_store_can_hold_are_left_out(tmp_path: Path) -> None:
    odd = {"a key": np.ones((5, 1)), "nan": np.full((5, 1), np.nan), "action": np.ones((5, 1)), "none": np.ones((5, 0))}
    keep_episodes(tmp_path, results_of([made(0)]), [made(0, **odd)], None, [])
    (read,) = read_kept(tmp_path, results_of([made(0)])).episodes
    assert equal(read, made(0))


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_episodes, "sync_tree", fail)
    with pytest.raises(OSError, match="No space left"):
        keep_episodes(tmp_path, results_of([made(0)]), [made(0)], None, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [np.zeros((3, 2)), np.full((5, 2), np.nan), np.zeros((5, 3))])
def test_paths_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch, wrong: np.ndarray) -> None:
    line: Any = Line()
    monkeypatch.setattr(Line, "path", lambda *_: wrong)
    with pytest.raises(ValueError, match=r"path\(\) must give"):
        trace(made(0), line)


# Comparing


def with_failures(folder: Path) -> Path:
    """The same evaluation, in which other episodes failed, its kept episodes among them."""
    other = Path(shutil.copytree(folder, folder.parent / "b"))
    results = json.loads((folder / "results.json").read_text())
    kept = read_kept(folder, read_results(folder))
    for outcome in results["outcomes"]:
        outcome["success"] = not outcome["success"]
    (other / "results.json").write_text(json.dumps(results))
    shutil.rmtree(other / "episodes.zarr")
    changed = [Episode(**{**vars(one), "success": not one.success}) for one in kept.episodes]
    keep_episodes(other, read_results(other), changed, kept.scene, kept.traces)
    return other


def test_a_comparison_draws_both_paths_where_only_one_succeeds(folder: Path, tmp_path: Path, capsys) -> None:
    other = with_failures(folder)
    Compare(folder, other, output=tmp_path / "both").run()
    html = (tmp_path / "both" / "comparison.html").read_text()
    assert html.count("<figure><svg") == 6
    assert html.count("<polyline") == 12
    assert "<script" not in html
    shutil.rmtree(other / "episodes.zarr")
    Compare(folder, other, output=tmp_path / "without").run()
    assert "<polyline" not in (tmp_path / "without" / "comparison.html").read_text()
    assert "without paths" not in capsys.readouterr().err


def test_damaged_episodes_cost_a_comparison_its_paths_only(folder: Path, tmp_path: Path, capsys) -> None:
    other = with_failures(folder)
    damage(PATH)(other)
    assert main(["compare", str(folder), str(other), "--output", str(tmp_path / "page")]) == 0
    assert "the page is without paths:" in " ".join(capsys.readouterr().err.split())
    assert "<polyline" not in (tmp_path / "page" / "comparison.html").read_text()


def test_the_page_is_made_again_without_torch_and_pybullet(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom diffusion_policy.commands.options.report import Report\n"
        "Report(Path(sys.argv[1]), Path(sys.argv[2])).run()\n"
        "print([name for name in ('torch', 'pybullet') if name in sys.modules])"
    )
    arguments = [sys.executable, "-c", code, str(folder), str(tmp_path / "again.html")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
