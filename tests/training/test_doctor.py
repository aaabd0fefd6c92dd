"""The doctor passes what is healthy and names what is not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

from diffusion_policy.cli import main
from diffusion_policy.config import PolicyConfig, SampleConfig, with_options
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.statistics import measure
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.windows import Batch, Windows
from diffusion_policy.diffusion.schedules import SCHEDULES, constant, linear, make_schedule
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training import doctor

CONFIG = with_options(PolicyConfig(), widths=(16, 32), level_dim=32, noise_levels=20)
ENDS = np.array([60, 130, 200])


def walk() -> dict[str, np.ndarray]:
    """Three episodes of a random walk whose steps turn slowly, and the steps as actions."""
    rng = np.random.default_rng(0)
    angle = np.cumsum(rng.normal(0, 0.2, 200))
    action = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    return {"position": np.cumsum(action, axis=0).astype(np.float32), "action": action}


@pytest.fixture(scope="module")
def batch() -> Batch:
    windows = Windows(walk(), ENDS, range(3), 2, 16)
    return windows.gather(torch.arange(0, 200, 2))


def policy_that_says(answer: Callable[[Tensor, Tensor, int], Tensor], config: PolicyConfig = CONFIG) -> DiffusionPolicy:
    """A policy whose denoiser is `answer(cond, xt, level) -> x0`."""
    policy = DiffusionPolicy.for_data(config, walk())
    policy.diffusion.condition = lambda network, cond, levels: lambda xt, level: answer(cond, xt, level)  # pyright: ignore
    policy.diffusion.decode = lambda outputs: outputs
    return policy


def oracle(batch: Batch, config: PolicyConfig = CONFIG) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Finds the right answer for the observations of a batch, and a wrong one for others."""
    policy = DiffusionPolicy.for_data(config, walk())
    known, answers = policy.encode(batch.observations), policy.normalizer.normalize("action", batch.actions)
    return lambda cond, xt, level: answers[torch.cdist(cond, known).argmin(dim=1)]


def test_schedules_that_end_in_noise_pass_and_others_fail() -> None:
    for name, make in SCHEDULES.items():
        assert doctor.check_last_level(make(100)).status == "pass"
        assert doctor.check_first_level(make(100)).status == ("fail" if name == "constant" else "pass")
    short = doctor.check_last_level(linear(40, 1e-4, 0.02))
    assert short.status == "fail"
    assert "66." in short.figure or "67." in short.figure
    assert "larger last beta" in short.advice
    assert doctor.check_first_level(constant(10, 0.3)).status == "fail"


def test_a_schedule_that_does_not_decrease_is_a_finding() -> None:
    check, schedule = doctor.check_decreasing(lambda: make_schedule("linear", 10, (0.0, 0.0)))
    assert check.status == "fail"
    assert "every beta must be above 0" in check.figure
    assert schedule is None
    assert doctor.check_decreasing(lambda: linear(10))[0].status == "pass"


def test_constant_columns_are_named() -> None:
    data = walk()

    def look(normalization: str = "limits") -> doctor.Check:
        return doctor.check_constant({f"data/{key}": measure(rows) for key, rows in data.items()}, normalization)

    assert look().status == "pass"
    data["action"] *= 2e-5  # small is not constant
    assert look().figure == "all 4 columns vary"
    data["position"][:, 1] = 3.0
    assert look().status == "warn"
    assert look().figure == "constant, so that nothing is learned of them: data/position[1]"
    data["position"][7, 1] = 4.0
    assert look().status == "pass"
    assert look("quantiles").figure.endswith("normalized by their limits: data/position[1]")


def test_padding_is_counted_as_windows_pad() -> None:
    check = doctor.check_padding(np.array([60, 70, 70]), CONFIG)
    steps = torch.arange(16) - 1
    outside = sum(
        int(((now + steps < 0) | (now + steps >= length)).sum()) for length in (60, 70, 70) for now in range(length)
    )
    assert check.figure.startswith(f"{outside / (200 * 16):.1%} ")
    assert check.status == "pass"
    assert doctor.check_padding(np.array([8, 9]), CONFIG).status == "warn"


def test_episodes_shorter_than_the_prediction_are_counted() -> None:
    assert doctor.check_horizons(np.array([60, 70]), CONFIG).status == "pass"
    assert doctor.check_horizons(np.array([10, 60, 70]), CONFIG).status == "warn"
    assert doctor.check_horizons(np.array([10, 11, 70]), CONFIG).status == "fail"


def test_the_timeline_is_drawn() -> None:
    config = with_options(PolicyConfig(), widths=(16, 32), prediction_horizon=4, action_horizon=2)
    assert doctor.draw_timeline(config).splitlines() == [
        "step         -1   0   1   2",
        "observed      x   x",
        "predicted     x   x   x   x",
        "executed          x   x",
    ]


def test_clipping_must_fit_the_normalizer() -> None:
    inside, outside = torch.linspace(-1, 1, 1000), torch.linspace(-2, 2, 1000)
    assert doctor.check_clipping(inside[:, None], "static").status == "pass"
    assert doctor.check_clipping(outside[:, None], "static").status == "fail"
    assert doctor.check_clipping(outside[:, None], "none").status == "pass"


@pytest.mark.parametrize("normalization", ["limits", "moments", "quantiles"])
def test_an_oracle_passes_every_check_of_a_policy(batch: Batch, normalization: str) -> None:
    config = replace(CONFIG, normalization=normalization)
    policy = policy_that_says(oracle(batch, config), config)
    probes = doctor.probe(policy, batch, 0)
    assert probes[0].level == 0
    assert probes[-1].level == 19
    jumps = doctor.largest_jumps(walk()["action"], ENDS)
    for check in (
        doctor.check_noise_scale(probes),
        doctor.check_one_step(probes),
        doctor.check_conditioning(policy, batch, 0),
        doctor.check_copying(policy, batch, 0),
        doctor.check_jumps(policy, batch, jumps, SampleConfig(sampling_steps=4), 0),
        doctor.check_bound(policy, batch, 0),
        doctor.check_clipping(policy.normalizer.normalize("action", batch.actions), policy.choose_clip(SampleConfig())),
    ):
        assert check.status == "pass", check


def test_noise_of_the_wrong_scale_is_found(batch: Batch) -> None:
    def half(cond: Tensor, xt: Tensor, level: int) -> Tensor:
        alpha, sigma = policy.diffusion.tables(level, xt)
        eps = (xt - alpha * right(cond, xt, level)) / sigma
        return (xt - 0.5 * sigma * eps) / alpha

    right = oracle(batch)
    policy = policy_that_says(half)
    assert doctor.check_noise_scale(doctor.probe(policy, batch, 0)).status == "fail"


def test_a_step_that_makes_things_worse_is_found(batch: Batch) -> None:
    policy = policy_that_says(lambda cond, xt, level: 100 * torch.ones_like(xt))
    check = doctor.check_one_step(doctor.probe(policy, batch, 0))
    assert check.status == "fail"
    assert "does not make its input better" in check.advice


def test_a_policy_that_ignores_its_observations_is_found(batch: Batch) -> None:
    policy = policy_that_says(lambda cond, xt, level: torch.zeros_like(xt))
    check = doctor.check_conditioning(policy, batch, 0)
    assert check.status == "fail"
    assert "1.00 times" in check.figure


def test_a_policy_that_goes_on_with_its_last_motion_is_found(batch: Batch) -> None:
    def copier(cond: Tensor, xt: Tensor, level: int) -> Tensor:
        first, last = cond.unflatten(1, (2, 2)).unbind(dim=1)  # normalized positions
        scale = policy.normalizer.get_buffer("position_scale") / policy.normalizer.get_buffer("action_scale")
        return ((last - first) * scale)[:, None].expand_as(xt)

    policy = policy_that_says(copier)
    assert doctor.check_conditioning(policy, batch, 0).status == "pass"
    assert doctor.check_copying(policy, batch, 0).status in ("warn", "fail")
    one = DiffusionPolicy.for_data(replace(CONFIG, observation_horizon=1), walk())
    assert doctor.check_copying(one, batch, 0).status == "pass"


def test_jumps_beyond_the_demonstrated_range_are_found(batch: Batch) -> None:
    jumps = doctor.largest_jumps(walk()["action"], ENDS)
    signs = torch.tensor([1.0, -1.0]).repeat(8)[:, None]
    policy = policy_that_says(lambda cond, xt, level: signs.expand_as(xt))
    check = doctor.check_jumps(policy, batch, jumps, SampleConfig(sampling_steps=4), 0)
    assert check.status == "fail"


def test_jumps_between_episodes_do_not_count() -> None:
    actions = np.array([[0.0], [0.1], [9.0], [9.3], [9.4]])
    assert doctor.largest_jumps(actions, np.array([2, 5])) == pytest.approx([0.3])


def test_a_network_that_says_nothing_is_found(batch: Batch) -> None:
    policy = policy_that_says(lambda cond, xt, level: xt / policy.diffusion.tables(level, xt)[0])  # eps = 0
    probes = doctor.probe(policy, batch, 0)
    assert doctor.check_noise_scale(probes).status == "fail"
    assert doctor.check_one_step(probes).status == "fail"


def test_nan_fails_every_check_of_a_policy(batch: Batch) -> None:
    policy = policy_that_says(lambda cond, xt, level: torch.full_like(xt, torch.nan))
    probes = doctor.probe(policy, batch, 0)
    jumps = doctor.largest_jumps(walk()["action"], ENDS)
    for check in (
        doctor.check_noise_scale(probes),
        doctor.check_one_step(probes),
        doctor.check_conditioning(policy, batch, 0),
        doctor.check_copying(policy, batch, 0),
        doctor.check_bound(policy, batch, 0),
        doctor.check_jumps(policy, batch, jumps, SampleConfig("ddim", 1, clip="none"), 0),
    ):
        assert check.status == "fail", check


def test_the_bound_of_very_many_levels_is_taken_over_some_of_them(batch: Batch, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "BOUND_LEVELS", 7)
    seen = []
    right = oracle(batch)
    policy = policy_that_says(lambda cond, xt, level: seen.append(level) or right(cond, xt, level))
    check = doctor.check_bound(policy, batch, 0)
    assert check.status == "pass"
    assert check.figure.endswith("over 7 of 20 levels")
    assert seen == [19, 16, 13, 10, 6, 3, 0]


def test_no_more_than_two_hundred_levels_are_looked_at(batch: Batch) -> None:
    policy = policy_that_says(oracle(batch), replace(CONFIG, noise_levels=100_000))
    few = Batch({key: rows[:2] for key, rows in batch.observations.items()}, batch.actions[:2])
    assert "over 200 of 100000 levels" in doctor.check_bound(policy, few, 0).figure


def test_overfitting_needs_a_network_that_learns() -> None:
    windows = Windows(walk(), ENDS, range(3), 2, 16)
    torch.manual_seed(0)
    seen = []
    check = doctor.check_overfit(DiffusionPolicy.for_data(CONFIG, walk()), windows, 20, 0, seen.append)
    assert check.status == "fail"
    assert seen == list(range(1, 21))
    assert check.name == "overfits 32 windows"


@pytest.mark.slow
def test_a_healthy_network_overfits_32_windows() -> None:
    torch.manual_seed(0)
    windows = Windows(walk(), ENDS, range(3), 2, 16)
    policy = DiffusionPolicy.for_data(with_options(PolicyConfig(), widths=(32, 64, 128)), walk())
    assert doctor.check_overfit(policy, windows, 2000, 0).status == "pass"


def test_the_command_looks_at_a_checkpoint_and_its_data(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "doctor"
    arguments = ["doctor", "--checkpoint", run, "--output", out, "--overfit-steps", 3, "--sampling-steps", 4]
    assert main([str(argument) for argument in arguments]) == 1
    assert "checks failed: " in capsys.readouterr().err
    checks = {check["name"]: check for check in json.loads((out / "doctor.json").read_text())["checks"]}
    assert len(checks) >= 15
    assert checks["overfits 32 windows"]["status"] == "fail"
    assert checks["clipping fits the normalizer"]["status"] == "pass"
    assert (out / "noised.png").stat().st_size > 10_000


def test_the_command_looks_at_data_alone(demonstrations: Path, capsys) -> None:
    options = ["--overfit-steps", "0", "--widths", "16", "32", "--level-dim", "32"]
    assert main(["doctor", "--dataset", str(demonstrations), *options]) == 0
    text = " ".join(capsys.readouterr().err.split())
    assert "pass last level is standard normal" in text
    assert "observed x x" in text
    too_clean = ["--schedule", "linear", "--noise-levels", "40", "--schedule-options", "1e-4", "0.02"]
    assert main(["doctor", "--dataset", str(demonstrations), *options, *too_clean]) == 1
    assert "checks failed: last level is standard normal" in " ".join(capsys.readouterr().err.split())


def test_data_that_cannot_be_read_is_a_finding(tmp_path: Path, capsys) -> None:
    group = zarr.create_group(tmp_path / "nan.zarr")
    group.create_array("data/state", data=np.full((40, 1), np.nan))
    group.create_array("data/action", data=np.zeros((40, 1)))
    group.create_array("meta/episode_ends", data=np.array([20, 40]))
    assert main(["doctor", "--dataset", str(tmp_path / "nan.zarr")]) == 1
    text = " ".join(capsys.readouterr().err.split())
    assert "data/state has NaN or infinity in 40 rows" in text


def test_a_checkpoint_whose_data_has_gone_is_still_looked_at(run: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(run, tmp_path / "run")
    (path,) = (tmp_path / "run").glob("step-*/config.json")
    config = json.loads(path.read_text())
    config["dataset"]["location"] = "/nowhere.zarr"
    path.write_text(json.dumps(config))
    arguments = ["doctor", "--checkpoint", tmp_path / "run", "--sampling-steps", 4, "--output", tmp_path / "doctor"]
    assert main([str(argument) for argument in arguments]) == 0
    report = json.loads((tmp_path / "doctor" / "doctor.json").read_text())
    assert report["dataset"] is None
    assert "warn" in {check["status"] for check in report["checks"]}
    assert "name one with --dataset" in " ".join(capsys.readouterr().err.split())


def test_a_url_that_only_the_checkpoint_names_is_not_opened(run: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(run, tmp_path / "run")
    (path,) = (tmp_path / "run").glob("step-*/config.json")
    config = json.loads(path.read_text())
    config["dataset"]["location"] = "http://127.0.0.1:1/s.zarr"
    path.write_text(json.dumps(config))
    assert main(["doctor", "--checkpoint", str(tmp_path / "run"), "--sampling-steps", "4"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "warn dataset is there: the checkpoint names its dataset by the URL" in said
    assert "refused" not in said


def test_data_that_does_not_fit_the_checkpoint_is_refused(run: Path, tmp_path: Path, capsys) -> None:
    group = zarr.create_group(tmp_path / "other.zarr")
    group.create_array("data/desired_xy", data=np.zeros((40, 3)))
    group.create_array("data/action", data=np.zeros((40, 2)))
    group.create_array("meta/episode_ends", data=np.array([20, 40]))
    arguments = ["doctor", "--checkpoint", run, "--sampling-steps", 4, "--dataset", tmp_path / "other.zarr"]
    assert main([str(argument) for argument in arguments]) == 2
    assert "the policy needs" in capsys.readouterr().err


def test_sampling_that_the_policy_cannot_do_is_refused_before_any_check(run: Path, tmp_path: Path, capsys) -> None:
    arguments = ["doctor", "--checkpoint", run, "--sampling-steps", 99, "--output", tmp_path / "doctor"]
    assert main([str(argument) for argument in arguments]) == 2
    assert "from 1 to the 20 noise levels; got 99" in capsys.readouterr().err
    assert not (tmp_path / "doctor").exists()


def test_an_interrupted_doctor_keeps_its_checks(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "check_overfit", stop)
    arguments = ["doctor", "--checkpoint", run, "--sampling-steps", 4, "--output", tmp_path / "doctor"]
    assert main([str(argument) for argument in arguments]) == 130
    assert len(json.loads((tmp_path / "doctor" / "doctor.json").read_text())["checks"]) >= 14


def test_nothing_to_look_at_is_refused(capsys) -> None:
    assert main(["doctor"]) == 2
    assert "needs a --dataset, a --checkpoint, or both" in capsys.readouterr().err


def test_a_store_of_absurd_width_is_refused_before_a_network_is_made(tmp_path: Path, capsys) -> None:
    with EpisodeStore.create(tmp_path / "wide.zarr", {}, ()) as store:
        rows = {"x": np.zeros((20, 80_000), np.float32), "action": np.arange(20, dtype=np.float32)[:, None]}
        store.append([Demonstration(rows)])
    assert main(["doctor", "--dataset", str(tmp_path / "wide.zarr")]) == 2
    assert "a policy has at most 268435456 weights; got 577" in capsys.readouterr().err
