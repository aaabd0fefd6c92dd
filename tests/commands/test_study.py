"""One small checkpoint under several samplers, rolled out for real."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffusion_policy.cli import main
from diffusion_policy.commands import study as study_module
from diffusion_policy.commands import study_cells
from diffusion_policy.commands.episodes import RolledOut
from diffusion_policy.commands.interrupts import Interrupted
from diffusion_policy.commands.study import Study
from diffusion_policy.evaluation.episode import FailedEpisode
from diffusion_policy.evaluation.rollout import RolloutError
from diffusion_policy.report.figures import draw_study


def test_the_study_measures_each_sampler_at_each_number_of_steps(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "study"
    arguments = ["--samplers", "ddim", "heun", "--steps", "1", "3", "21", "--episodes", "2", "--workers", "1"]
    assert main(["study", "samplers", "--checkpoint", str(run), "--output", str(out), *arguments]) == 0
    results = json.loads((out / "results.json").read_text())
    assert {name: list(cells) for name, cells in results["samplers"].items()} == {
        "ddim": ["1", "3", "21"],
        "heun": ["1", "3", "21"],
    }
    for cells in results["samplers"].values():
        assert "sampling steps must be from 1 to the 20 noise levels; got 21" in cells["21"]["refused"]
        for steps in ("1", "3"):
            assert 0 <= cells[steps]["success_rate"]["low"] <= cells[steps]["success_rate"]["value"] <= 1
            assert set(cells[steps]["modes"]) == {"left", "right"}
            assert cells[steps]["milliseconds"] > 0
    assert (out / "samplers.png").stat().st_size > 10_000
    assert "mode entropy, by steps" in capsys.readouterr().err
    assert main(["study", "samplers", "--checkpoint", str(run), "--output", str(out)]) == 2
    assert "already holds something" in capsys.readouterr().err


def test_an_interrupted_study_keeps_what_is_done(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(run, tmp_path / "study", what="samplers", samplers=("ddim",), steps=(1, 2), episodes=1, workers=1)
    measure = study_module.measure

    def stop_at_two(options, loaded, sampling):
        if sampling.sampling_steps == 2:
            raise Interrupted("stopped")
        return measure(options, loaded, sampling)

    monkeypatch.setattr(study_module, "measure", stop_at_two)
    with pytest.raises(Interrupted, match="stopped at ddim, 2 steps; the others are in"):
        study.run()
    assert list(json.loads((tmp_path / "study" / "results.json").read_text())["samplers"]["ddim"]) == ["1"]


def test_impossible_steps_are_refused_at_once(run: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--checkpoint", str(run), "--output", str(tmp_path / "study")]
    assert main(["study", "samplers", *arguments, "--steps", "0"]) == 2
    assert "sampling-steps must be at least 1; got 0" in capsys.readouterr().err
    assert main(["study", "speed", *arguments]) == 2
    assert "invalid choice" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_lost_episodes_are_counted_and_the_study_goes_on_where_all_are_lost(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    roll_out = study_cells.run_episodes

    calls = iter((1, 2, 3))

    def lose(loaded: Any, seeds: range, planner: Any, **options: Any) -> RolledOut:
        lost = [FailedEpisode(seed, 0, "RuntimeError: it fell [over]") for seed in seeds]
        call = next(calls)
        if call == 1:
            return RolledOut([], lost, [])
        if call == 2:
            raise RolloutError("the first 3 episodes failed 2 times each: it fell")
        return roll_out(loaded, seeds, planner, **options)._replace(lost=lost[:1])

    monkeypatch.setattr(study_cells, "run_episodes", lose)
    study = Study(run, tmp_path / "s [1]", what="samplers", samplers=("ddim",), steps=(1, 2, 3), episodes=1, workers=1)
    results = study.run()
    assert json.loads((study.output / "results.json").read_text()) == results
    first, second, third = results["samplers"]["ddim"].values()
    assert first == {"refused": "every episode failed: RuntimeError: it fell [over]", "lost": 1}
    assert "the first 3 episodes failed" in second["refused"]
    assert (third["lost"], third["errors"][0]["reason"]) == (1, "RuntimeError: it fell [over]")
    said = capsys.readouterr().err
    assert "not possible: every episode failed: RuntimeError: it fell [over]" in said
    assert "episodes lost, by steps" in " ".join(said.split())
    assert (study.output / "samplers.png").exists()


def test_a_study_of_which_nothing_was_possible_has_a_picture() -> None:
    draw_study({"samplers": {"ddim": {"1": {"refused": "no"}}, "heun": {}}}).canvas.draw()


def test_a_picture_that_cannot_be_drawn_costs_no_results(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(study_module, "draw_study", fail)
    Study(run, tmp_path / "s", what="samplers", samplers=("ddim",), steps=(1,), episodes=1, workers=1).run()
    assert "no picture: RuntimeError: no fonts" in capsys.readouterr().err
    assert [each.name for each in (tmp_path / "s").iterdir()] == ["results.json"]


def test_the_study_of_chunking_measures_each_strategy_under_each_delay(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "study"
    fixed = ["--checkpoint", str(run), "--output", str(out), "--workers", "1", "--steps", "1", "--episodes", "2"]
    strategies = ["--strategies", "receding", "rtc+roll", "trained-rtc"]
    assert main(["study", "chunking", *fixed, *strategies, "--delay-steps", "0", "2", "--action-noise", "0.5"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["action_noise"] == 0.5
    assert {name: list(cells) for name, cells in results["strategies"].items()} == {
        name: ["0", "2"] for name in ("receding", "rtc+roll", "trained-rtc")
    }
    for name, cells in results["strategies"].items():
        for cell in cells.values():
            if name == "trained-rtc":
                assert "trained with --max-delay" in cell["refused"]
            else:
                assert 0 <= cell["success_rate"]["low"] <= cell["success_rate"]["high"] <= 1
                assert cell["milliseconds"] > 0
                assert "commitment" in cell
    page = (out / "chunking.html").read_text()
    assert page.count("data:image/png") == 1
    assert "rtc+roll" in page
    assert "commitment, by delay" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (("--strategies", "best"), "unknown chunking 'best'"),
        (("--strategies", "rtc+fast"), "with +roll behind it; got 'rtc+fast'"),
        (("--delay-steps", "1", "1"), "delay-steps must be different numbers from 0 on; got (1, 1)"),
        (("--action-noise", "-1"), "action-noise must be at least 0; got -1"),
        (("--chunking", "rtc"), "name them with --strategies instead of --chunking"),
    ],
)
def test_a_study_of_chunking_that_cannot_be_is_refused(run: Path, tmp_path: Path, capsys, options, message) -> None:
    arguments = ["--checkpoint", str(run), "--output", str(tmp_path / "study")]
    assert main(["study", "chunking", *arguments, *options]) == 2
    assert message in capsys.readouterr().err
