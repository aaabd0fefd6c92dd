"""What follows the rollouts of an evaluation may fail in any way: the results stay, and the page is written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_policy.basics.files import WRITING, FileError
from diffusion_policy.checkpoints.checkpoint import find
from diffusion_policy.checkpoints.safe_files import describe
from diffusion_policy.commands import afterwards, evaluate, losses, pictures
from diffusion_policy.commands.afterwards import RESULTS
from diffusion_policy.commands.episodes import observe
from diffusion_policy.commands.evaluate import Evaluate
from diffusion_policy.commands.interrupts import Failed, Interrupted
from diffusion_policy.commands.rollout import Rollout
from diffusion_policy.config import SampleConfig
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs import protocols
from diffusion_policy.envs.avoid import AvoidEnv
from diffusion_policy.evaluation.episode import Episode
from diffusion_policy.evaluation.results import ASKED
from diffusion_policy.report import page, video

NO_OPTIONS: Any = ()
"""Of what `rolled_out` puts in the place of functions."""
QUICK = SampleConfig(sampling_steps=1)


@pytest.fixture(scope="module")
def rolled_out(run: Path, blank_pictures: None) -> Iterator[None]:
    """Every evaluation here finds the same checkpoint and the same two episodes, run once."""
    loaded = evaluate.load_with_environment(Rollout(run, device="cpu"), QUICK)
    planner = evaluate.make_group_planner(loaded.policy, QUICK, "eager", parallel=2)
    episodes = evaluate.run_episodes(loaded, range(100_000, 100_002), planner, parallel=2, workers=1)
    first, second = episodes.episodes
    ended = [replace(first, success=True, mode="left"), replace(second, success=False, mode=None)]  # both are shown
    episodes = episodes._replace(episodes=ended)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load_with_environment", lambda *_: loaded)
        patch.setattr(evaluate, "run_episodes", lambda *_, **__: episodes)
        patch.setattr(evaluate, "repeats_by_seed", lambda *_: True)
        patch.setattr(evaluate, "LATENCY_PLANS", 6)
        yield


@pytest.fixture
def command(run: Path, tmp_path: Path, rolled_out: None) -> Evaluate:
    return Evaluate(run, tmp_path / "e [1]", episodes=2, sampling=QUICK, workers=1, videos=0, device="cpu")


def no_rollouts(*_: Any, **__: Any) -> Any:
    raise AssertionError("episodes were run again")


def fail(error: BaseException) -> Callable[..., Any]:
    def raise_it(*_: Any, **__: Any) -> Any:
        raise error

    return raise_it


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def kept(command: Evaluate) -> dict[str, Any]:
    results = json.loads((command.output / "results.json").read_text())
    assert [one["seed"] for one in results["outcomes"]] == [100_000, 100_001]
    return results


def test_whatever_render_does_costs_films_only(command: Evaluate, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(AvoidEnv, "render", fail(RuntimeError("no display [/dev/null]")))
    filmed = Evaluate(**{**vars(command), "videos": 2})
    assert filmed.run() == kept(filmed)
    said = " ".join(capsys.readouterr().err.split())
    assert len(re.findall(r"no film of seeds \d+, \d+: RuntimeError: no display \[/dev/null\]", said)) == 1
    html = (filmed.output / "report.html").read_text()
    assert "no film of seeds" in html
    assert "<video" not in html


AFTER = [
    (
        AvoidEnv,
        "path",
        lambda env, rows: np.full((3, 2), np.nan),
        "no paths could be drawn: path() must give (steps, 2)",
    ),
    (AvoidEnv, "path", lambda env, rows: rows["xyz"], "jerk and commitment are not measured: KeyError: 'xyz'"),
    (AvoidEnv, "planned_path", lambda env, row, actions: np.zeros((7, 3)), "no sampled plans are drawn"),
    (AvoidEnv, "choice", lambda env, row, actions: 1 / 0, "jerk and commitment are not measured: ZeroDivisionError"),
    (evaluate, "time_plans", fail(MemoryError()), "the time of planning could not be measured: MemoryError"),
    (evaluate, "sample_starts", fail(RuntimeError("CUDA out of memory")), "diversity could not be measured: RuntimeE"),
    (pictures, "choose_shown", fail(ValueError("odd")), "no episodes could be chosen to show: odd"),
    (pictures, "open_recorded", fail(OSError(5, "Input/output error")), "no demonstrations are drawn: OSError"),
    (page, "draw_training", fail(ValueError("image too large")), "could not be written with its pictures: image too"),
]


@pytest.mark.parametrize("where, name, failing, remark", AFTER, ids=[remark for *_, remark in AFTER])
def test_whatever_fails_after_the_rollouts_is_a_remark(
    command: Evaluate, monkeypatch: pytest.MonkeyPatch, capsys, where: Any, name: str, failing: Any, remark: str
) -> None:
    monkeypatch.setattr(where, name, failing)
    assert command.run() == kept(command)
    assert remark in " ".join(capsys.readouterr().err.split())
    assert remark.replace("'", "&#39;") in (command.output / "report.html").read_text()


def test_a_film_that_ffmpeg_cannot_make_costs_no_other(
    command: Evaluate, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(video.imageio, "mimwrite", fail(RuntimeError("No ffmpeg exe could be found")))
    monkeypatch.setattr(AvoidEnv, "render", lambda _: np.zeros((8, 8, 3), np.uint8))
    Evaluate(**{**vars(command), "videos": 2}).run()
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"no film of seeds \d+, \d+: RuntimeError: No ffmpeg exe", said)


def test_a_page_that_no_disk_holds_leaves_the_results_and_is_written_by_the_same_command(
    command: Evaluate, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    with pytest.MonkeyPatch.context() as full:
        full.setattr(page, "write_whole", fail(FileError("cannot write the page: No space left on device")))
        results = command.run()
    assert "the same command tries the page again" in " ".join(capsys.readouterr().err.split())
    assert names(command.output) == ["episodes.zarr", "results.json"]
    monkeypatch.setattr(evaluate, "run_episodes", no_rollouts)
    assert command.run() == results == kept(command)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{RESULTS} was there already: no episode was run again" in said
    assert "without paths" not in said
    assert "was there already" in (command.output / "report.html").read_text()
    assert "What might have been planned" in (command.output / "report.html").read_text()
    with pytest.raises(ValueError, match="already holds something"):
        command.run()


def test_an_evaluation_is_known_by_all_that_was_asked(command: Evaluate) -> None:
    asked = evaluate.tell_asked(command, evaluate.load_with_environment(*NO_OPTIONS))
    assert tuple(asked) == ASKED


def test_results_of_other_weights_at_the_same_place_are_not_taken_for_its_own(
    command: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = command.run()
    assert results["weights_sha256"] == describe(find(command.checkpoint) / "model.safetensors").sha256
    (command.output / "report.html").unlink()
    (command.output / "results.json").write_text(json.dumps(results | {"weights_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="holds the results of another evaluation: weights_sha256"):
        command.run()


def test_a_simulator_may_change_the_working_folder(
    command: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    beside = Evaluate(command.checkpoint, Path("relative"), episodes=2, sampling=QUICK, workers=1, videos=0)
    monkeypatch.setattr(evaluate, "run_episodes", moving(evaluate.run_episodes, tmp_path / "elsewhere"))
    beside.run()
    assert (tmp_path / "relative" / "report.html").exists()


def moving(function: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """The function, in another working folder from then on."""

    def moved(*arguments: Any, **options: Any) -> Any:
        folder.mkdir()
        os.chdir(folder)
        return function(*arguments, **options)

    return moved


@pytest.mark.parametrize("stop_at", ["time_plans", "print_scorecard"])
def test_an_evaluation_that_is_stopped_after_the_rollouts_goes_on(
    command: Evaluate, monkeypatch: pytest.MonkeyPatch, stop_at: str
) -> None:
    with pytest.MonkeyPatch.context() as stopping:
        stopping.setattr(evaluate, stop_at, fail(KeyboardInterrupt()))
        with pytest.raises(Interrupted, match=r"stopped; the results are in .*, and the same command writes"):
            command.run()
    kept(command)
    monkeypatch.setattr(evaluate, "run_episodes", no_rollouts)
    command.run()
    assert (command.output / "report.html").exists()


@pytest.mark.parametrize(
    "change, name",
    [
        ({"sampling": SampleConfig(sampling_steps=2)}, "sampling"),
        ({"seed": 100_007}, "seeds"),
        ({"repeats": 2}, "repeats"),
        ({"parallel": 3}, "planning_batch"),
    ],
)
def test_results_of_another_evaluation_are_never_taken_for_these(
    command: Evaluate, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], name: str
) -> None:
    with pytest.MonkeyPatch.context() as full:
        full.setattr(page, "write_whole", fail(FileError("full")))
        command.run()
    before = (command.output / "results.json").read_bytes()
    monkeypatch.setattr(evaluate, "run_episodes", no_rollouts)
    with pytest.raises(ValueError, match=f"holds the results of another evaluation: {name} .* choose another --output"):
        Evaluate(**{**vars(command), **change}).run()
    assert (command.output / "results.json").read_bytes() == before
    (command.output / "results.json").write_text('{"outcomes": [')
    with pytest.raises(ValueError, match=r"results.json is not JSON that can be read"):
        command.run()


def test_what_a_killed_evaluation_left_is_removed_and_nothing_else(command: Evaluate) -> None:
    command.output.mkdir()
    (command.output / f"{WRITING}results.json").write_text('{"half')
    command.run()
    assert names(command.output) == ["episodes.zarr", "report.html", "results.json"]
    for name in ("notes.txt", "report.html", f"{WRITING}notes.txt"):
        shutil.rmtree(command.output)
        command.output.mkdir()
        (command.output / name).write_text("mine")
        with pytest.raises(ValueError, match="already holds something"):
            command.run()
        assert (command.output / name).read_text() == "mine"


def test_two_evaluations_never_share_a_folder(command: Evaluate) -> None:
    with afterwards.hold_output(command.output), pytest.raises(ValueError, match="by another process; wait for it, or"):
        command.run()


def test_a_later_delay_that_cannot_be_run_costs_no_earlier_one(
    command: Evaluate, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    whole = evaluate.run_episodes(*NO_OPTIONS)
    later = fail(Failed("gone"))
    monkeypatch.setattr(evaluate, "run_episodes", lambda *_, delay_steps, **__: later() if delay_steps else whole)
    delayed = Evaluate(**{**vars(command), "delay_steps": (0, 2)})
    assert [row["steps"] for row in delayed.run()["delay"]] == [0]
    assert "no results for planning that takes 2 control steps: gone" in " ".join(capsys.readouterr().err.split())


def test_where_a_seed_repeats_no_episode_that_is_said_and_nothing_is_filmed(
    command: Evaluate, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(evaluate, "repeats_by_seed", lambda *_: False)
    monkeypatch.setattr(pictures, "_videos", lambda _, chosen, *__: [] if not chosen else no_rollouts())
    results = Evaluate(**{**vars(command), "videos": 2}).run()
    assert results["seeds_repeat"] is False
    said = " ".join(capsys.readouterr().err.split())
    html = " ".join((command.output / "report.html").read_text().split())
    for words in ("does not repeat an episode by its seed", "no films: they replay episodes from their seeds"):
        assert words in said
        assert words in html


def test_only_a_metrics_file_of_losses_is_drawn(command: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        b'{"step": 1, "loss": 0.5, "validation_loss": null}',
        b'{"step": 2, "loss": "high"}',
        b'{"step": 3, "loss": NaN}',
        b'{"step": 3, "loss": 1e999}',
        b"[1, 2]",
        b'{"step": [[[[1]]]], "loss": 1}',
        b"\xff\xfe",
        b"[" * 5000,
        b'{"step": 4, "loss": 0.25, "validation_loss": 0.5}',
        b'{"step": 5, "lo',
    ]
    drawn = [{"step": 1, "loss": 0.5, "validation_loss": None}, {"step": 4, "loss": 0.25, "validation_loss": 0.5}]
    assert losses.parse_losses(b"\n".join(lines)) == drawn
    assert losses.parse_losses(b"") == []
    assert len(losses.parse_losses(b'{"step": 1, "loss": 1}\n' * 50_000)) <= losses.MOST_LOSSES


def test_a_metrics_file_that_is_a_pipe_is_not_waited_for(run: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    remarks = afterwards.Remarks()
    assert losses.read_losses(tmp_path, remarks) == []
    assert "is no regular file" in remarks.sentences[0]


def test_failed_demonstrations_are_drawn_as_failures(
    command: Evaluate, demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = EpisodeStore.open(demonstrations)
    episodes = [episode._replace(success=i % 2 == 0) for i, episode in enumerate(store.episodes())]
    with EpisodeStore.create(tmp_path / "mixed.zarr", store.attributes, store.modes) as mixed:
        mixed.append(episodes)
    monkeypatch.setattr(pictures, "open_recorded", lambda *_: EpisodeStore.open(tmp_path / "mixed.zarr"))
    loaded = evaluate.load_with_environment(*NO_OPTIONS)
    plane = protocols.as_drawable(loaded.env)
    assert plane is not None
    drawn = pictures._demonstrated_paths(loaded, plane)
    assert [path.success for path in drawn] == [True, False] * 6


def test_what_is_observed_keeps_its_precision() -> None:
    far = 5.4e6 + np.arange(3)[:, None] / 1000
    rows = {"far": far, "near": far.astype(np.float32), "mask": np.ones((3, 2, 2, 3), np.uint8)}
    watched = {key: value.shape[1:] for key, value in rows.items()}
    policy: Any = SimpleNamespace(config=SimpleNamespace(observation_horizon=2), watched=watched, device="cpu")
    seen = observe(policy, Episode(0, True, None, rows, np.zeros((2, 1), np.float32)), 2)
    assert {value.dtype for value in seen.values()} == {torch.float64}
    assert seen["far"][0].tolist() == far[1:].tolist()


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_whole_results_or_none_and_the_same_command_goes_on(
    run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "e"
    arguments = ["evaluate", "--checkpoint", run, "--output", output, "--episodes", 3, "--workers", 1]
    command = [sys.executable, "-m", "diffusion_policy.cli", *map(str, arguments)]
    for delay in (2, 4, 5, 6, 7, 8, 9, 10, 12):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        if (output / "results.json").exists():
            assert len(json.loads((output / "results.json").read_text())["outcomes"]) == 3
        if (output / "report.html").exists():
            break
    else:
        assert subprocess.run(command, check=False).returncode == 0
    assert (output / "report.html").read_text().rstrip().endswith("</html>")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_costs_the_page_only(run: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=36k", "none", disk], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        arguments = ["evaluate", "--checkpoint", run, "--output", disk / "e", "--episodes", 3, "--workers", 1]
        command = [sys.executable, "-m", "diffusion_policy.cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "No space left on device" in done.stderr
        assert names(disk / "e") == ["results.json"]
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert subprocess.run(command, check=False, capture_output=True).returncode == 0
        assert (disk / "e" / "report.html").exists()
    finally:
        subprocess.run(["umount", disk], check=False)
