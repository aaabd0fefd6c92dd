"""Sweeps of tiny trainings, each in a process of its own."""

import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from diffusion_policy.cli import main, parse
from diffusion_policy.commands import sweep
from diffusion_policy.commands.interrupts import Failed, Interrupted
from diffusion_policy.commands.points import draw_points, read_grid
from diffusion_policy.commands.sweep import Sweep, conclude, make_trials, write_results
from diffusion_policy.commands.train import Train
from diffusion_policy.commands.trials import CURVE, Trial, describe_trial, open_log
from diffusion_policy.commands.trials_table import OTHER_LOSS
from diffusion_policy.config import ConfigError, PolicyConfig, TrainConfig, list_types, with_options

TINY = with_options(PolicyConfig(), widths=(16, 32), level_dim=32, noise_levels=4)
TRAINING = TrainConfig(steps=4, batch_size=16, validate_every=2, validation_share=0.2)
GRID = ("learning-rate=1e-3,2e-3,1e30", "widths=16:32")
"""The last learning rate ends in numbers that are not finite."""


@pytest.fixture(scope="module")
def finished(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, dict[str, Any]]:
    """A 3 x 1 grid, the last of which fails; what run returned."""
    output = tmp_path_factory.mktemp("sweeps") / "grid"
    asked = Sweep(str(demonstrations), output, GRID, episodes=0, device="cpu", policy=TINY, training=TRAINING)
    return asked, asked.run()


def test_every_point_of_the_grid_is_a_trial(finished: tuple[Sweep, dict[str, Any]]) -> None:
    asked, results = finished
    assert [row["options"] for row in results["trials"]] == [
        {"learning_rate": rate, "widths": [16, 32]} for rate in (1e-3, 2e-3, 1e30)
    ]
    assert json.loads((asked.output / "sweep.json").read_text()) == json.loads(json.dumps(results))
    for row in results["trials"][:2]:
        config = json.loads((asked.output / row["name"] / "step-000004" / "config.json").read_text())
        assert config["policy"]["network"]["widths"] == row["options"]["widths"]
        assert [step for step, _ in row["curve"]] == [2, 4]
        assert row["validation_loss"] == row["curve"][-1][1] > 0


def test_a_failed_trial_is_told_in_one_line_and_ends_no_other(finished: tuple[Sweep, dict[str, Any]]) -> None:
    asked, results = finished
    assert [row["status"] for row in results["trials"]] == ["finished", "finished", "failed"]
    assert "loss" in results["trials"][2]["reason"]
    assert "\n" not in results["trials"][2]["reason"]
    assert "Traceback" in (asked.output / "trial-002.log").read_text()


def test_the_best_trial_comes_with_the_command_that_repeats_it(finished: tuple[Sweep, dict[str, Any]]) -> None:
    asked, results = finished
    losses = {row["name"]: row["validation_loss"] for row in results["trials"][:2]}
    assert results["best"] == min(losses, key=lambda name: losses[name])
    row = next(row for row in results["trials"] if row["name"] == results["best"])
    program, *arguments = shlex.split(row["command"])
    assert program == "diffusion-policy"
    again = parse(arguments)
    assert isinstance(again, Train)
    trial = next(trial for trial in make_trials(asked) if trial.name == results["best"])
    assert replace(again, output=trial.train.output) == trial.train


def test_the_page_shows_every_trial(finished: tuple[Sweep, dict[str, Any]]) -> None:
    asked, results = finished
    page = (asked.output / "sweep.html").read_text()
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    for row in results["trials"]:
        assert body.count(f">{row['name']}</td>") == 1
    assert body.count("failed") == 1
    assert 'class="best"' in body
    assert "data:image/png;base64," in page
    assert "http:" not in page  # it loads nothing
    assert "https:" not in page


def test_finished_trials_are_not_run_again(finished: tuple[Sweep, dict[str, Any]], tmp_path: Path) -> None:
    asked, results = finished
    output = tmp_path / "copy"
    shutil.copytree(asked.output, output)
    shutil.rmtree(output / "trial-001")
    resumed = replace(asked, output=output, resume=True)
    ran: list[str] = []
    again = spy(resumed, lambda trial: ran.append(trial.name))
    assert ran == ["trial-001", "trial-002"]
    for name in ("status", "options", "validation_loss"):
        assert again["trials"][0][name] == results["trials"][0][name]
    with pytest.raises(ConfigError, match="cannot go on as another sweep: trial-001 was another"):
        replace(resumed, grid=("learning-rate=1e-3,3e-3,1e30", "widths=16:32")).run()
    with pytest.raises(ConfigError, match="already holds something"):
        replace(resumed, resume=False).run()
    with pytest.raises(ConfigError, match="holds no sweep to go on with"):
        replace(resumed, output=tmp_path).run()


def spy(asked: Sweep, run: Callable[[Trial], object]) -> dict[str, Any]:
    """What a sweep returns whose trials all fail, and are given to `run` instead."""

    def alone(_function, trials, *_options):
        for trial in trials:
            run(trial)
            yield trial, "not run"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "run_isolated", alone)
        return asked.run()


def test_ctrl_c_keeps_what_has_finished(demonstrations: Path, tmp_path: Path) -> None:
    def stop_at_two(trial: Trial) -> None:
        if trial.name == "trial-001":
            raise KeyboardInterrupt

    asked = Sweep(str(demonstrations), tmp_path / "sweep", ("seed=0,1,2",), episodes=0, policy=TINY, training=TRAINING)
    with pytest.raises(Interrupted, match=r"stopped: 0 of 3 trials are finished .* goes on with --resume"):
        spy(asked, stop_at_two)
    statuses = [row["status"] for row in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["trials"]]
    assert statuses == ["failed", "waiting", "waiting"]
    with pytest.raises(Failed, match="no trial can be the best: not run"):
        spy(replace(asked, resume=True), lambda _: None)


@pytest.mark.slow
def test_each_policy_is_evaluated_on_unseen_seeds(demonstrations: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "base.json").write_text(
        json.dumps({"policy": {"widths": [16, 32], "level_dim": 32, "noise_levels": 20}})
    )
    command = ["sweep", "--dataset", str(demonstrations), "--output", str(tmp_path / "sweep"), "--steps", "4"]
    command += ["--config", str(tmp_path / "base.json"), "--random", "learning-rate=log:1e-4:1e-3", "--runs", "1"]
    command += [
        "--episodes",
        "2",
        "--metric",
        "success_rate",
        "--batch-size",
        "16",
        "--device",
        "cpu",
        "--sampling-steps",
        "1",
    ]
    assert main(command) == 0
    (row,) = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["trials"]
    assert (row["policy"]["network"]["widths"], row["policy"]["noise_levels"]) == ([16, 32], 20)
    assert 1e-4 <= row["options"]["learning_rate"] == row["training"]["learning_rate"] <= 1e-3
    assert 0 <= row["success_rate"]["low"] <= row["success_rate"]["value"] <= row["success_rate"]["high"] <= 1
    assert 'href="trial-000/evaluation/report.html"' in (tmp_path / "sweep" / "sweep.html").read_text()
    assert "best: trial-000" in capsys.readouterr().err


def test_random_points_come_from_the_seed() -> None:
    asked = ("learning-rate=log:1e-5:1e-3", "batch-size=choice:64,128", "steps=int:100:200",
             "condition-dropout=uniform:0:0.5", "widths=choice:32:64,64:128", "max-episodes=log:10:1000")  # fmt: skip
    points = draw_points(asked, 40, seed=0)
    assert points == draw_points(asked, 40, seed=0)
    assert points[:8] == draw_points(asked, 8, seed=0)
    assert points != draw_points(asked, 40, seed=1)
    rates = sorted(point["learning_rate"] for point in points)
    assert 1e-5 <= rates[0] < 1e-4 < rates[20] * 3 < 1e-3  # half of them on each side of the geometric middle
    assert {point["batch_size"] for point in points} == {64, 128}
    assert {tuple(point["widths"]) for point in points} == {(32, 64), (64, 128)}
    assert all(type(point["steps"]) is int and 100 <= point["steps"] <= 200 for point in points)
    assert all(0 <= point["condition_dropout"] <= 0.5 for point in points)
    assert all(type(point["max_episodes"]) is int for point in points)


def test_values_have_the_types_of_their_options() -> None:
    assert read_grid(["condition-on-mode=true,False", "max-episodes=none,5"]) == [
        {"condition_on_mode": on, "max_episodes": most} for on in (True, False) for most in (None, 5)
    ]
    assert read_grid(["widths=64,64:128", "prediction=noise"]) == [
        {"widths": [64], "prediction": "noise"},
        {"widths": [64, 128], "prediction": "noise"},
    ]


@pytest.mark.parametrize(
    "options, said",
    [
        (("--grid", "learning-rat=1e-3"), "unknown option 'learning-rat'; did you mean learning-rate?"),
        (
            ("--grid", "learning-rate=fast"),
            "trial-000 (learning-rate fast): learning_rate must be a finite number; got 'fast'",
        ),
        (("--grid", "learning-rate"), "--grid takes options with values, as in learning-rate=...; got 'learning-rate'"),
        (("--grid", "steps=1", "steps=2"), "--grid names steps twice"),
        (("--grid", "widths=64:60"), "trial-000 (widths 64 60): widths must be multiples of the 8 groups; got [60]"),
        (
            ("--grid", "prediction=nose"),
            "trial-000 (prediction nose): prediction must be one of noise, sample, velocity, flow; got 'nose'",
        ),
        (
            ("--grid", "validation-share=0"),
            "the metric validation_loss needs held-out episodes; got validation-share 0",
        ),
        (("--random", "steps=100:200"), "--random steps must be drawn like log:1e-5:1e-3, uniform:0:0.2"),
        (("--random", "learning-rate=log:0:1"), "--random learning-rate must be drawn like"),
        ((), "sweep needs either --grid learning-rate=1e-4,3e-4 or --random"),
        (("--grid", "steps=1", "--random", "steps=int:1:2"), "sweep needs either --grid"),
        (("--grid", "steps=1", "--metric", "success_rate", "--episodes", "0"), "needs episodes of at least 1; got 0"),
        (("--grid", "steps=1", "--gpus", "1"), "gpus are those of a Ray cluster: they need --engine ray; got 1"),
        (("--grid", "steps=1", "--workers", "0"), "workers must be at least 1; got 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(options: tuple, said: str, tmp_path: Path, capsys) -> None:
    assert main(["sweep", "--dataset", "none.zarr", "--output", str(tmp_path / "sweep"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "options, said",
    [
        (
            ("--grid", "noise-levels=20,10", "--sampling-steps", "16"),
            "trial-001 (noise-levels 10): sampling steps must be from 1 to the 10",
        ),
        (("--grid", "steps=1", "--guidance", "2"), "guidance 2.0 needs a policy trained with --condition-dropout"),
        (("--grid", "steps=1", "--mode", "left"), "cannot be steered to mode 'left'; it was trained without"),
        (("--grid", "condition-on-mode=true"), "this policy must be told a mode, one of left, right"),
        (("--grid", "schedule-options=0.1:0.2:0.3"), "the schedule cosine takes the options offset; got 3 numbers"),
        (("--grid", "widths=8192:8192"), "a policy has at most 268435456 weights"),
        (("--grid", "prediction-horizon=1024"), "no episode of"),
        (("--grid", "seed=0", "--validation-share", "0.99"), "cannot hold out 99% of 12 episodes"),
        (("--grid", "seed=0", "--device", "warp"), "no device 'warp' here"),
        (("--grid", "seed=0", "--observation", "pose"), "has no observation 'pose'"),
        (("--grid", "seed=0", "--action", "pose"), "has no action key 'pose'"),
        (("--grid", "seed=0", "--angles", "desired_xy:9"), "angles must name columns of a key"),
        (("--grid", "keep-best=success_rate"), "keep-best success_rate is measured by rollout-every"),
        (("--grid", "corrector-steps=1"), "unknown option 'corrector-steps'"),
        (("--grid", "condition-on-mode=true", "--episodes", "0", "--keep-best", "action_error"), "has no action error"),
        (("--grid", "condition-on-mode=true", "--episodes", "0", "--rollout-every", "500"), "must be told a mode"),
        (("--grid", f"seed={','.join(map(str, range(1001)))}"), "at most 1000 trials; this --grid has 1001"),
        (("--random", "learning-rate=uniform:-1e308:1e308"), "--random learning-rate must be drawn like"),
        (("--grid", f"widths={'[' * 5000}"), "widths[0] must be a whole number; got '[["),
    ],
)  # fmt: skip
def test_what_no_trial_could_do_is_found_before_the_first_one_begins(
    options: tuple, said: str, demonstrations: Path, tmp_path: Path, capsys
) -> None:
    command = ["--noise-levels", "20", "--widths", "16", "32", "--batch-size", "16"]
    named = {option.split("=")[0] for option in options}
    command = ["--widths", "16", "32"] if "levels" in named else command[:2] if "widths" in named else command
    assert main(["sweep", "--dataset", str(demonstrations), "--output", str(tmp_path / "s"), *command, *options]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_trials_without_an_environment_are_neither_rolled_out_nor_evaluated(tmp_path: Path, capsys) -> None:
    group = zarr.create_group(tmp_path / "other.zarr")
    group.create_array("data/pose", data=np.random.default_rng(0).normal(size=(40, 3)))
    group.create_array("data/action", data=np.zeros((40, 2)))
    group.create_array("meta/episode_ends", data=np.array([20, 40]))
    command = ["sweep", "--dataset", str(tmp_path / "other.zarr"), "--output", str(tmp_path / "s"), "--grid", "seed=1"]
    rollouts = ["--episodes", "0", "--rollout-every", "500", "--keep-best", "success_rate"]
    for options in ([], rollouts):
        assert main([*command, *options]) == 2
        assert "names no environment: give --episodes 0 and --rollout-every 0" in capsys.readouterr().err


SAME_LOSS = {
    "action_horizon", "widths", "kernel_size", "groups", "level_dim", "condition_dropout", "steps", "batch_size",
    "learning_rate", "weight_decay", "warmup_steps", "gradient_clip", "ema_power", "ema_max_decay",
    "validate_every", "checkpoint_every", "keep_checkpoints", "keep_best", "rollout_every", "rollout_episodes",
    "precision", "accumulation", "compile", "network", "width", "layers", "heads", "mlp_ratio", "dropout",
    "conditioning", "guard", "vision", "cnn_widths", "keypoints", "vit_width", "vit_layers", "vit_heads",
    "image_features", "image_crop", "color_jitter", "image_normalization", "share_encoder",
    "vision_weights", "freeze_vision", "hindsight", "hindsight_share", "mask_padding", "noise_draws",
}  # fmt: skip
"""Options under which the validation loss stays what it is: the mean over the same windows, of the EMA weights, in
single precision and with the condition."""


def test_of_each_option_it_is_known_whether_losses_compare() -> None:
    options = list_types(PolicyConfig).keys() | list_types(TrainConfig).keys()
    assert OTHER_LOSS.keys() | SAME_LOSS == options
    assert not OTHER_LOSS.keys() & SAME_LOSS


def judged(asked: Sweep) -> str | None:
    """Which of its trials a sweep calls the best, where the last one has the lowest loss."""
    asked.output.mkdir()
    trials = make_trials(asked)
    rows = [
        {**describe_trial(trial), "status": "finished", "validation_loss": 1 / (i + 1), "success_rate": {"value": 0.5}}
        for i, trial in enumerate(trials)
    ]
    return write_results(asked, rows)["best"]


def test_no_trial_is_the_best_where_losses_do_not_compare(tmp_path: Path, capsys) -> None:
    of_rates = Sweep("none.zarr", tmp_path / "a", ("learning-rate=1e-3,1e-4", "prediction=noise"))
    assert judged(of_rates) == "trial-001"
    of_levels = replace(of_rates, output=tmp_path / "b", grid=("learning-rate=1e-3,1e-4", "noise-levels=50,100"))
    assert judged(of_levels) is None
    assert judged(replace(of_levels, output=tmp_path / "c", metric="success_rate")) == "trial-003"
    conclude(of_levels, json.loads((tmp_path / "b" / "sweep.json").read_text()))
    said = capsys.readouterr().err
    assert "validation losses cannot be compared where noise-levels differs: other noise is taken away" in said
    assert "best:" not in said


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"trials": 5}', '{"trials": [5]}', '{"trials": [{}]}', "[" * 5000, '{"trials": [{"status": 3}]}',
     '{"trials": [{"policy": {"widths": 64}}]}', '{"trials": null, "trials": null}', "\xff\xfe", None],
)  # fmt: skip
def test_a_sweep_that_cannot_be_read_is_told_in_one_line(content: str | None, tmp_path: Path, capsys) -> None:
    file = tmp_path / "sweep.json"
    file.write_bytes(content.encode("latin-1")) if content is not None else os.mkfifo(file)
    assert main(["sweep", "--dataset", "d.zarr", "--output", str(tmp_path), "--grid", "seed=1", "--resume"]) == 2
    said = capsys.readouterr().err
    assert "holds no sweep to go on with: " in said
    assert said.count("\n") == 1


def test_a_folder_that_is_a_link_to_itself_is_told_in_one_line(demonstrations: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for command in (["sweep", "--grid", "seed=1"], ["train"]):
        arguments = ["--dataset", str(demonstrations), "--output", str(tmp_path / "loop"), "--device", "cpu"]
        assert main([*command, *arguments]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_two_sweeps_never_share_a_folder(demonstrations: Path, tmp_path: Path) -> None:
    asked = Sweep(str(demonstrations), tmp_path / "s", ("seed=0",), episodes=0, policy=TINY, training=TRAINING)

    def begin_another(_: Trial) -> None:
        with pytest.raises(ValueError, match="is being written by another process"):
            spy(replace(asked, resume=True), lambda _: None)

    with pytest.raises(Failed):
        spy(asked, begin_another)


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path: Path) -> None:
    asked = Sweep("none.zarr", tmp_path / "a [b] c", ("seed=0",), episodes=0)
    (trial,) = make_trials(asked)
    trial.train.output.mkdir(parents=True)
    lines = [json.dumps({"step": step, "validation_loss": 1 / step}) for step in range(1, 1002)]
    (trial.train.output / "metrics.jsonl").write_text("\n".join([*lines, "torn", '{"step": "x"}', "[" * 1000]) + "\n")
    row = describe_trial(trial, None)
    assert row["curve"][-1] == (1001, 1 / 1001)
    assert 50 < len(row["curve"]) <= CURVE
    assert row["validation_loss"] == 1 / 1001


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_table(demonstrations: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    tables = []
    for engine in ("local", "ray"):
        asked = Sweep(str(demonstrations), tmp_path / engine, GRID, episodes=2, workers=2, engine=engine,
                      device="cpu", policy=TINY, training=TRAINING)  # fmt: skip
        rows = asked.run()["trials"]
        tables.append([{name: row[name] for name in ("options", "status", "curve", "success_rate")} for row in rows])
    assert tables[0] == tables[1]


def test_defaults_of_the_command_line_are_those_of_the_class() -> None:
    parsed = parse(["sweep", "--dataset", "d", "--output", "o", "--grid", "steps=1", "--resume"])
    assert parsed == Sweep("d", Path("o"), ("steps=1",), resume=True, policy=PolicyConfig(), training=TrainConfig())


def test_the_log_of_a_trial_is_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    os.mkfifo(tmp_path / "pipe.log")
    (tmp_path / "link.log").symlink_to("elsewhere")
    for name in ("pipe.log", "link.log", "new.log"):
        for _ in range(2):
            with open_log(tmp_path / name) as log:
                log.write("x")
        assert (tmp_path / name).read_text() == "xx"
    assert (tmp_path / "elsewhere").read_text() == "mine"
