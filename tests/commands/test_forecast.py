"""From recorded scenes to a page of forecasts, in miniature."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import diffusion_policy as dp
from diffusion_policy.cli import main
from diffusion_policy.commands import forecasting
from diffusion_policy.commands.collect import Collect
from diffusion_policy.commands.forecast import Forecast
from diffusion_policy.commands.interrupts import Interrupted
from diffusion_policy.commands.train import Train
from diffusion_policy.config import ConfigError, PolicyConfig, TrainConfig, with_options
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs.intersection_traffic import MODES
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.report import forecast_page, page

POLICY = with_options(
    PolicyConfig(observation_horizon=20, prediction_horizon=80, action_horizon=1),
    widths=(16, 32), level_dim=16, noise_levels=20, groups=4,
)  # fmt: skip
OBSERVED = ("position", "velocity", "scene")


def learn(store: Path, run: Path, policy: PolicyConfig = POLICY, action: str = "position", **options) -> Path:
    training = TrainConfig(steps=2, batch_size=4, validation_share=0.5, whole_windows=True)
    training = with_options(training, **options)
    Train(str(store), run, observation=OBSERVED, action=(action,), policy=policy, training=training, device="cpu").run()
    return run


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of six scenes, and two trainings on it."""
    folder = tmp_path_factory.mktemp("scenes")
    Collect(
        folder / "scenes.zarr", env="diffusion_policy/Intersection-v0", episodes=6, noise=0.0, workers=1, sync=False
    ).run()
    learn(folder / "scenes.zarr", folder / "run")
    learn(folder / "scenes.zarr", folder / "plain", with_options(POLICY, objective="regression"))
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "to_png", lambda _: b"")


def fails(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["forecast", *map(str, arguments)]) == 2
    text = capsys.readouterr().err
    return " ".join(text[text.index("error: ") :].split())


@pytest.fixture(scope="module")
def results(scenes: Path) -> dict:
    return dp.forecast(
        scenes / "run", scenes / "scenes.zarr", scenes / "forecast", beside=(scenes / "plain",), samples=7,
        sampling_steps=3, seed=3, miss_distance=1.5, collision_distance=1.2, shown=2, device="cpu",
    )  # fmt: skip


def test_held_out_episodes_are_forecast_and_judged_beside_others(scenes: Path, results: dict) -> None:
    assert results == json.loads((scenes / "forecast" / "results.json").read_text())
    assert (results["episodes"], results["held_out"], results["now"], results["steps"]) == (3, True, 19, 60)
    assert (results["agents"], results["control_period"], results["modes"]) == (2, 0.1, ["yields", "merges", "brakes"])
    assert list(results["rows"]) == ["run", "plain", "constant velocity"]
    for row in results["rows"].values():
        assert row["min_ade"].keys() == row["miss_rate"].keys() == {"1", "6"}
        assert row["min_ade"]["6"]["value"] <= row["min_ade"]["1"]["value"]
        assert sum(row["modes"].values()) == pytest.approx(1)
        assert 0 <= row["mode_error"]["value"] <= 1
    straight = results["rows"]["constant velocity"]
    assert straight["min_fde"]["6"] == straight["min_fde"]["1"]
    assert results["data"]["collision_rate"]["value"] == 0
    assert sum(results["data"]["modes"].values()) == 3


def test_costs_lead_the_same_samples_elsewhere_in_a_row_of_their_own(scenes: Path, results: dict) -> None:
    led = dp.forecast(
        scenes / "run", scenes / "scenes.zarr", scenes / "led", samples=7, sampling_steps=3, seed=3, device="cpu",
        cost=("apart=-1",), cost_margin=120.0, cost_size=0.5, cost_steps=9, collision_distance=32.0, shown=1,
        miss_distance=1.5,
    )  # fmt: skip
    assert list(led["rows"]) == ["run", "run, led by apart=-1", "constant velocity"]
    assert led["rows"]["run"]["min_ade"] == results["rows"]["run"]["min_ade"]
    plain, together = (led["rows"][row]["collision_rate"]["value"] for row in ("run", "run, led by apart=-1"))
    assert together > plain
    assert led["costs"]["cost"] == ["apart=-1"]
    assert results["costs"] is None
    assert "led by apart=-1" in (scenes / "led" / "forecast.html").read_text()


def test_what_is_drawn_begins_where_the_history_ends(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that knows the truth is right at every step."""
    store = EpisodeStore.open(scenes / "scenes.zarr")
    truth = {tuple(one.data["position"][19].tolist()): one.data["position"] for one in store.episodes()}

    def tell(self, observations, generators, number, config) -> torch.Tensor:
        rows = [truth[tuple(row[-1].tolist())] for row in observations["position"].numpy()]
        return torch.from_numpy(np.repeat(np.stack(rows)[:, None], number, axis=1)).double()

    monkeypatch.setattr(DiffusionPolicy, "sample", tell)
    found = Forecast(scenes / "run", str(scenes / "scenes.zarr"), scenes / "told", shown=0, device="cpu").run()
    row = found["rows"]["run"]
    for name in ("min_ade", "min_fde", "miss_rate"):
        assert {k: metric["value"] for k, metric in row[name].items()} == {"1": 0, "6": 0, "20": 0}
    assert row["energy_score"]["value"] == 0
    assert row["modes"] == {mode: count / 3 for mode, count in found["data"]["modes"].items()}


def test_the_page_shows_fans_by_each_forecaster(scenes: Path, results: dict) -> None:
    html = (scenes / "forecast" / "forecast.html").read_text()
    assert html.count("<figure data-row=") == 4  # two episodes, two forecasters
    assert html.count('class="sample"') == 2 * 2 * 7 * 2
    assert "that the policies were not trained on" in html
    assert "minADE, k = 6" in html
    figure = forecast_page.draw_reliability(results, ["run", "constant velocity"])
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["run", "constant velocity"]


def test_the_same_seed_gives_the_same_forecasts_in_any_batch(scenes: Path, results: dict, monkeypatch) -> None:
    monkeypatch.setattr(forecasting, "TOGETHER", 1)
    again = Forecast(
        scenes / "run", str(scenes / "scenes.zarr"), scenes / "again", samples=7, seed=3, device="cpu", shown=0
    )
    again = with_options(again, sampling_steps=3).run()
    for name in ("min_ade", "energy_score"):
        one, other = again["rows"]["run"][name], results["rows"]["run"][name]
        value = (lambda metric: metric["1"]["value"]) if name == "min_ade" else (lambda metric: metric["value"])
        assert value(one) == pytest.approx(value(other), rel=1e-4)


def test_another_store_is_forecast_whole_with_a_mode_function_at_another_now(scenes: Path, tmp_path: Path) -> None:
    store = EpisodeStore.open(scenes / "scenes.zarr")
    keys = (*OBSERVED, "action")
    with EpisodeStore.create(tmp_path / "other.zarr", {}, []) as other:
        episodes = [one._replace(mode=None, final=None) for one in store.episodes(keys=keys)]
        longer = [
            one._replace(data={key: np.concatenate([rows, rows[-5:]]) for key, rows in one.data.items()})
            for one in episodes[:3]
        ]
        other.append([*longer, *episodes[3:]])
    found = Forecast(
        scenes / "run", str(tmp_path / "other.zarr"), tmp_path / "out", now=22, episodes=2, samples=1, device="cpu",
        mode_function="tests_modes_of_forecasts:side", mode_labels=("left", "right"),
    )  # fmt: skip
    (tmp_path / "tests_modes_of_forecasts.py").write_text(
        "def side(rows):\n    assert rows['position'].shape == (83, 4)\n    return 'left'\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        results = found.run()
    assert (results["episodes"], results["too_short"], results["held_out"]) == (2, 3, False)
    assert results["rows"]["run"]["modes"] == {"left": 1, "right": 0}
    assert "mode_error" not in results["rows"]["run"]
    assert "mode_error" not in results["data"]
    assert (tmp_path / "out" / "forecast.html").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 0}, "samples must be at least 1; got 0"),
        ({"samples": 10_001}, "samples must be at most 10000; got 10001"),
        ({"shown": 51}, "shown must be at most 50; got 51"),
        ({"now": 0}, "now must be at least 1; got 0"),
        ({"episodes": 0}, "episodes must be at least 1; got 0"),
        ({"miss_distance": 0.0}, "miss-distance must be above 0; got 0.0"),
        ({"collision_distance": float("inf")}, "collision-distance must be above 0; got inf"),
        ({"mode_labels": ("a",)}, "give all modes of --mode-function with --mode-labels"),
    ],
)
def test_impossible_options_are_refused(options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Forecast(Path("c"), "d", Path("o"), **options)


def test_what_cannot_be_forecast_is_said_in_one_line(scenes: Path, tmp_path: Path, capsys) -> None:
    led = ["--checkpoint", scenes / "run", "--dataset", scenes / "scenes.zarr", "--output", tmp_path / "led", "--cost"]
    assert "the cost clearance needs an environment" in fails(capsys, *led, "clearance")
    assert "unknown cost 'hurry'; choose from apart, clearance" in fails(capsys, *led, "hurry")
    given = ["--checkpoint", scenes / "run", "--dataset", scenes / "scenes.zarr", "--device", "cpu"]
    output = ["--output", tmp_path / "none"]
    store = EpisodeStore.open(scenes / "scenes.zarr")
    with EpisodeStore.create(tmp_path / "less.zarr", {}, MODES, sync=False) as less:
        less.append([one._replace(final=None) for one in store.episodes([0], ("velocity", "scene", "action"))])
    assert "has no 'position', which" in fails(capsys, *given[:2], "--dataset", tmp_path / "less.zarr", *output)
    assert "now must be at least 19" in fails(capsys, *given, *output, "--now", 12)
    text = fails(capsys, *given, *output, "--now", 25)
    assert "the longest has 80 steps; now 25 and 60 steps to forecast need 86" in text
    assert "the same checkpoint is given twice" in fails(capsys, *given, *output, "--beside", scenes / "run")
    assert "already holds something" in fails(capsys, *given, "--output", scenes)
    learn(scenes / "scenes.zarr", tmp_path / "acts", action="action", steps=1)
    text = fails(capsys, "--checkpoint", tmp_path / "acts", *given[2:], *output)
    assert "predicts action, 1 columns; a forecast is pairs of x and y" in text
    learn(scenes / "scenes.zarr", tmp_path / "all", validation_share=0.0, steps=1)
    text = fails(capsys, *given, *output, "--beside", tmp_path / "all")
    assert "no episode of" in text
    assert "is unseen" in text
    assert not (tmp_path / "none").exists()


def test_a_stop_and_numbers_that_are_none_keep_what_is_done(scenes: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(forecasting, "TOGETHER", 1)
    real, calls = forecasting._sample_chunk, []

    def stopping(*arguments):
        calls.append(signal.raise_signal(signal.SIGINT) if len(calls) == 1 else None)
        return real(*arguments)

    def ask(name: str) -> Forecast:
        return Forecast(scenes / "run", str(scenes / "scenes.zarr"), tmp_path / name, samples=1, device="cpu")

    monkeypatch.setattr(forecasting, "_sample_chunk", stopping)
    with pytest.raises(Interrupted, match=r"stopped after 2 of 3 episodes; .* has these"):
        ask("stopped").run()
    assert json.loads((tmp_path / "stopped" / "results.json").read_text())["episodes"] == 2
    assert "stopped before the others" in (tmp_path / "stopped" / "forecast.html").read_text()
    monkeypatch.setattr(forecasting, "_sample_chunk", real)
    drawn = DiffusionPolicy.sample
    unwell = [1.0, float("nan")]
    monkeypatch.setattr(DiffusionPolicy, "sample", lambda *arguments: drawn(*arguments) * unwell.pop(0))
    with pytest.raises(FloatingPointError, match=r"run forecasts NaN or infinity in episode . after 1 of 3 episodes"):
        ask("unwell").run()
    assert json.loads((tmp_path / "unwell" / "results.json").read_text())["episodes"] == 1


def test_positions_that_are_none_are_named(scenes: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(forecasting, "_read", lambda store, rows, key: np.full_like(rows[key], np.nan))
    given = ["--checkpoint", scenes / "run", "--dataset", scenes / "scenes.zarr", "--output", tmp_path / "out"]
    text = fails(capsys, *given)
    assert "position of" in text
    assert "holds NaN or infinity in episode" in text
