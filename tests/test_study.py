"""One small checkpoint under several samplers, rolled out for real."""

import json
from pathlib import Path

import pytest

from diffusion_policy.cli import main
from diffusion_policy.commands.common import Interrupted
from diffusion_policy.commands.study import Study


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
    study = Study("samplers", run, tmp_path / "study", samplers=("ddim",), steps=(1, 2), episodes=1, workers=1)
    measure = Study._cell

    def stop_at_two(self, loaded, sampling):
        if sampling.sampling_steps == 2:
            raise Interrupted("stopped")
        return measure(self, loaded, sampling)

    monkeypatch.setattr(Study, "_cell", stop_at_two)
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
