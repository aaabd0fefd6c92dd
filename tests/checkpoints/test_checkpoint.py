import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.checkpoints import schema as checkpoint_contents
from diffusion_policy.checkpoints.checkpoint import Checkpoint, CheckpointError, Dataset, Environment
from diffusion_policy.checkpoints.safe_files import describe
from diffusion_policy.config import PolicyConfig, TrainConfig, with_options
from diffusion_policy.control.planner import planning_rng
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.windows import Batch
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training.losses import denoising_loss, draw

STATE = {"a.exp_avg": torch.arange(6.0).reshape(2, 3), "scaler.steps": torch.tensor(7), "none": torch.empty(0)}
SAVER = """
import os, sys
from dataclasses import replace
from pathlib import Path
import torch
from diffusion_policy.checkpoints import checkpoint

original, run = checkpoint.load(sys.argv[1]), Path(sys.argv[2])
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        step = int(line)
        while True:
            point = replace(original, step=step, metrics={"success_rate": float(step % 3)})
            state = {"large": torch.full((500_000,), float(step)), "small": torch.tensor(step)}
            checkpoint.save(run, point, state, keep=2, best="success_rate")
            step += 1
    print(child, flush=True)
    os.waitpid(child, 0)
    print(flush=True)
"""
"""Imports once, then saves from the step that it reads until it is killed, again and again."""


@pytest.fixture(scope="module")
def point() -> Checkpoint:
    """A policy that was never trained."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    data = {"action": rng.normal(size=(30, 2)), "pose": rng.normal(size=(30, 3))}
    config = with_options(PolicyConfig(), widths=(16, 32), level_dim=32, noise_levels=20)
    policy = DiffusionPolicy.for_data(config, data, angles={"pose": (2,)})
    environment = Environment("a/B-v0", {"rows": 1}, ("left", "right"))
    dataset = Dataset("/data", "abc", 2, 30, {"left": 2}, (0, 1))
    return Checkpoint(policy, TrainConfig(steps=30), environment, dataset, 30, {"validation_loss": 0.5})


@pytest.fixture
def copy(point: Checkpoint, tmp_path: Path) -> Path:
    """A checkpoint folder that may be damaged."""
    return checkpoint.save(tmp_path / "copy", point, STATE)


def at(point: Checkpoint, step: int, **metrics: float) -> Checkpoint:
    return dataclasses.replace(point, step=step, metrics=metrics)


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    weights = other.policy.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in one.policy.state_dict().items())


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def rewrite_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """New weights with a true checksum."""
    save_file(weights, folder / "model.safetensors")
    files = json.loads((folder / "config.json").read_text())["files"]
    files["model.safetensors"] = dataclasses.asdict(describe(folder / "model.safetensors"))
    edit_config(folder, files=files)


def make_version_1(folder: Path) -> None:
    """What the first versions of the package wrote, of a checkpoint of version 2."""
    config = json.loads((folder / "config.json").read_text())
    config["format_version"] = 1
    for part, missing in (
        (config, ("metrics", "observation", "action", "angles")),
        (config["shapes"], ("angles",)),
        (config["environment"], ("signals",)),
        (config["dataset"], ("action_key", "statistics")),
        (config["policy"], ("snr_gamma", "normalization")),
        (config["training"], ("memory_gb",)),
    ):
        for name in missing:
            del part[name]
    (folder / "config.json").write_text(json.dumps(config))


# Loading


def test_what_is_loaded_acts_as_what_was_saved(point: Checkpoint, tmp_path: Path) -> None:
    loaded = checkpoint.load(checkpoint.save(tmp_path / "run", point, {}))
    again = checkpoint.load(checkpoint.save(tmp_path / "again", loaded, {}))
    observations = {"pose": torch.full((1, 2, 3), 0.4)}
    plans = [each.policy.sample(observations, [planning_rng(0)]) for each in (point, loaded, again)]
    assert torch.equal(plans[0], plans[1])
    assert torch.equal(plans[1], plans[2])
    for field in ("training", "environment", "dataset", "step", "metrics"):
        assert getattr(again, field) == getattr(point, field)


def test_what_is_loaded_can_be_trained_further(copy: Path) -> None:
    policy = checkpoint.load(copy).policy
    batch = Batch({"pose": torch.ones(4, 2, 3)}, torch.ones(4, 16, 2))
    loss = denoising_loss(policy, batch, draw(policy, 4, torch.Generator())).mean()
    loss.backward()
    assert all(weight.grad is not None for weight in policy.parameters())
    assert not any(buffer.is_meta for buffer in policy.buffers())


def test_it_says_what_it_was_trained_for_and_on(run: Path, demonstrations: Path) -> None:
    loaded = checkpoint.load(run)
    assert loaded.step == 30
    assert loaded.environment.id == "diffusion_policy/Avoid-v0"
    assert loaded.environment.arguments == {"rows": 1}
    assert loaded.environment.modes == ("left", "right")
    assert loaded.dataset.location == str(demonstrations)
    assert loaded.dataset.modes == {"left": 6, "right": 6}
    assert loaded.dataset.seeds == (0, 11)
    assert loaded.dataset.control_rate == EpisodeStore.open(demonstrations).attributes["control_frequency"]
    assert np.isfinite([weight.abs().max().item() for weight in loaded.policy.state_dict().values()]).all()


def test_the_training_state_comes_back(copy: Path) -> None:
    found = checkpoint.load_training(copy)
    assert found.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    (copy / "training.safetensors").write_bytes((copy / "training.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"training.safetensors is damaged: its size or SHA-256"):
        checkpoint.load_training(copy)
    checkpoint.load(copy)  # acting needs none of it
    (copy / "training.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"training.safetensors is missing"):
        checkpoint.load_training(copy)


def test_only_whole_checkpoints_are_found_and_the_newest_wins(point: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = checkpoint.save(folder, point, {})
    (folder / ".writing-step-000099").mkdir()
    (folder / ".writing-step-000099" / "config.json").touch()
    (folder / "step-000098").touch()
    (folder / "step-000097").mkdir()
    (folder / "step-x").mkdir()
    assert checkpoint.find(folder) == first
    assert checkpoint.find(first) == first
    second = checkpoint.save(folder, at(point, 1_000_000), {})
    assert checkpoint.find(folder) == second
    assert not first.exists()


def test_no_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            checkpoint.load(path)


def test_files_that_are_links_into_a_cache_are_loaded(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(list(copy.iterdir())):
        shutil.move(file, tmp_path / "blobs" / str(i))
        file.symlink_to(Path("..", "..", "blobs", str(i)))
    assert checkpoint.load(copy).step == 30
    assert checkpoint.load_training(copy).keys() == STATE.keys()


def test_damaged_weights_are_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="is damaged: its size or SHA-256"):
        checkpoint.load(copy)
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint.load(copy)


def test_a_checkpoint_without_its_normalizer_is_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    rewrite_weights(copy, {name: value for name, value in weights.items() if not name.startswith("normalizer.")})
    with pytest.raises(CheckpointError, match="has no normalizer"):
        checkpoint.load(copy)


def test_shapes_that_disagree_with_the_configuration_are_named(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    rewrite_weights(copy, {**weights, "network.out.1.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"network.out.1.bias has shape \(3,\); its configuration needs \(2,\)"):
        checkpoint.load(copy)
    rewrite_weights(copy, {**weights, "network.out.1.bias": torch.zeros(2).half()})
    with pytest.raises(CheckpointError, match=r"bias is torch.float16; its configuration needs torch.float32"):
        checkpoint.load(copy)
    rewrite_weights(copy, {**weights, "extra": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"unknown \['extra'\]"):
        checkpoint.load(copy)


def test_newer_formats_and_other_files_are_refused(copy: Path) -> None:
    newest = checkpoint_contents.FORMAT_VERSION
    for version in (newest + 1, 0, True, "1", None):
        edit_config(copy, format_version=version)
        with pytest.raises(CheckpointError, match=f"has format version {version!r}; this package reads up to {newest}"):
            checkpoint.load(copy)
    edit_config(copy, format="something else")
    with pytest.raises(CheckpointError, match="is not the configuration of a checkpoint"):
        checkpoint.load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON that can be read"):
        checkpoint.load(copy)


@pytest.mark.parametrize("part", ["policy", "training", "shapes", "environment", "dataset", "files", "step", "metrics"])
def test_an_incomplete_configuration_is_refused(copy: Path, part: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config[part]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"config.json(: '{part}' is missing| is incomplete: '{part}')"):
        checkpoint.load(copy)


# Older versions


def test_a_checkpoint_of_version_3_has_other_names_and_its_network_beside_the_policys_options(
    copy: Path, point: Checkpoint, make_version_3
) -> None:
    make_version_3(copy)
    config = json.loads((copy / "config.json").read_text())
    assert {"widths", "level_dim", "levels"} <= config["policy"].keys()
    assert {"keep", "average_power", "average_limit"} <= config["training"].keys()
    loaded = checkpoint.load(copy)
    assert (loaded.policy.config, loaded.training) == (point.policy.config, point.training)
    assert same_weights(loaded, point)


def test_a_checkpoint_of_version_2_normalizes_with_the_same_numbers_in_double_precision(
    copy: Path, point: Checkpoint, make_version_2
) -> None:
    make_version_2(copy)
    loaded = checkpoint.load(copy)
    assert loaded.environment == point.environment
    assert loaded.dataset == point.dataset
    for name, value in point.policy.state_dict().items():
        found = loaded.policy.state_dict()[name]
        assert found.dtype == value.dtype
        assert torch.equal(found, value.float().to(value.dtype))
    assert loaded.policy.state_dict()["normalizer.pose_scale"].dtype == torch.float64
    again = checkpoint.load(checkpoint.save(copy.parent / "again", loaded, {}))
    assert same_weights(again, loaded)


def test_an_option_that_a_checkpoint_does_not_know_yet_takes_its_default(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["policy"]["learn_variance"], config["training"]["precision"]
    (copy / "config.json").write_text(json.dumps(config))
    assert checkpoint.load(copy).policy.config.learn_variance is False


def test_a_checkpoint_of_version_1_is_migrated(copy: Path, point: Checkpoint, make_version_2) -> None:
    make_version_2(copy)
    make_version_1(copy)
    config = json.loads((copy / "config.json").read_text())
    config["shapes"]["angles"] = {"pose": [2]}
    (copy / "config.json").write_text(json.dumps(config))
    loaded = checkpoint.load(copy)
    assert loaded.metrics == {}
    assert loaded.environment == point.environment
    assert loaded.dataset == point.dataset
    assert loaded.policy.config == point.policy.config
    assert torch.equal(
        loaded.policy.state_dict()["network.out.1.bias"], point.policy.state_dict()["network.out.1.bias"]
    )
    again = checkpoint.save(copy.parent / "again", loaded, {})
    assert json.loads((again / "config.json").read_text())["format_version"] == checkpoint_contents.FORMAT_VERSION


def test_migrations_and_new_names_are_applied_in_turn(
    copy: Path, point: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = checkpoint_contents.FORMAT_VERSION + 2
    monkeypatch.setattr(checkpoint_contents, "FORMAT_VERSION", newest)
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", newest)

    def triple(config: dict) -> dict:
        return {**config, "step": 3 * config["step"]}

    def add_one(config: dict) -> dict:
        return {**config, "step": config["step"] + 1}

    monkeypatch.setitem(checkpoint_contents.MIGRATIONS, newest - 2, triple)
    monkeypatch.setitem(checkpoint_contents.MIGRATIONS, newest - 1, add_one)
    monkeypatch.setitem(
        checkpoint_contents.TENSORS, newest - 1, lambda name, dtype: (name.replace("old.", "network."), dtype)
    )
    weights = load_file(copy / "model.safetensors")
    rewrite_weights(copy, {name.replace("network.", "old."): value for name, value in weights.items()})
    loaded = checkpoint.load(copy)
    assert loaded.step == 91
    assert torch.equal(
        loaded.policy.state_dict()["network.out.1.bias"], point.policy.state_dict()["network.out.1.bias"]
    )


# Saving


def test_the_newest_and_the_best_stay(point: Checkpoint, tmp_path: Path) -> None:
    for step, loss in ((10, 0.5), (20, 0.1), (30, 0.3), (40, 0.2), (50, 0.4)):
        checkpoint.save(tmp_path, at(point, step, validation_loss=loss), {}, keep=2, best="validation_loss")
    assert names(tmp_path) == ["best", "step-000020", "step-000040", "step-000050"]
    assert os.readlink(tmp_path / "best") == "step-000020"
    assert checkpoint.load(tmp_path / "best").metrics == {"validation_loss": 0.1}
    assert checkpoint.load(tmp_path).step == 50
    checkpoint.save(tmp_path, at(point, 60, validation_loss=0.05), {}, keep=1, best="validation_loss")
    assert names(tmp_path) == ["best", "step-000060"]
    assert checkpoint.load(tmp_path / "best").step == 60


@pytest.mark.parametrize(
    "metric, winner",
    [("validation_loss", 10), ("action_error", 10), ("action_error_best", 10), ("my_error", 10), ("success_rate", 20)],
)
def test_what_is_best_depends_on_the_metric(point: Checkpoint, tmp_path: Path, metric: str, winner: int) -> None:
    for step, value in ((5, None), (10, 0.1), (20, 0.9), (30, 0.5), (40, None), (50, float("nan"))):
        measured = {} if value is None else {metric: value}
        checkpoint.save(tmp_path, at(point, step, **measured), {}, best=metric)
    assert names(tmp_path) == ["best", f"step-{winner:06d}", "step-000050"]
    assert checkpoint.load(tmp_path / "best").step == winner
    assert checkpoint.load(tmp_path).metrics == {}  # what is not finite is not kept


def test_the_later_of_two_equals_is_best(point: Checkpoint, tmp_path: Path) -> None:
    for metric in ("success_rate", "validation_loss"):
        for step in (10, 20, 30):
            checkpoint.save(tmp_path / metric, at(point, step, **{metric: float(step == 30)}), {}, 9, metric)
    assert checkpoint.load(tmp_path / "success_rate" / "best").step == 30
    assert checkpoint.load(tmp_path / "validation_loss" / "best").step == 20


def test_without_links_there_is_no_best_but_all_else(
    point: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for step in (10, 20):
        checkpoint.save(tmp_path, at(point, step, success_rate=1 / step), {}, best="success_rate")
    assert names(tmp_path) == ["step-000010", "step-000020"]


def test_an_earlier_step_deletes_no_later_one(point: Checkpoint, tmp_path: Path) -> None:
    for step in (20, 30, 10):
        checkpoint.save(tmp_path, at(point, step), {})
    assert names(tmp_path) == ["step-000010", "step-000030"]
    with pytest.raises(ValueError, match="keep must be at least 1; got 0"):
        checkpoint.save(tmp_path, at(point, 40), {}, keep=0)


def test_a_step_is_written_once_unless_it_is_damaged(point: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, point, STATE)
    before = (folder / "model.safetensors").stat()
    checkpoint.save(tmp_path, at(point, 30, success_rate=1.0), {})
    assert (folder / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    assert checkpoint.load(folder).metrics == point.metrics
    for name in ("model.safetensors", "training.safetensors", "config.json"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-7])
        checkpoint.save(tmp_path, point, STATE)
        assert checkpoint.load(folder).metrics == point.metrics
        assert checkpoint.load_training(folder).keys() == STATE.keys()
    assert names(tmp_path) == ["step-000030"]


def test_what_a_killed_run_left_is_removed(point: Checkpoint, tmp_path: Path) -> None:
    for name in (".writing-step-000001", ".deleting-step-000002"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "file").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".deleting-step-000003").symlink_to("elsewhere")
    os.mkfifo(tmp_path / ".deleting-step-000004")
    os.mkfifo(tmp_path / "step-000030")
    checkpoint.save(tmp_path, point, {})
    assert names(tmp_path) == ["elsewhere", "step-000030"]


@pytest.mark.parametrize(
    "where, error",
    [
        ("os.fsync", OSError(errno.ENOSPC, "No space left on device")),
        (
            "diffusion_policy.checkpoints.checkpoint.save_file",
            SafetensorError("I/O error: No space left on device (os error 28)"),
        ),
        ("pathlib.Path.write_text", OSError(errno.EDQUOT, "No space left on device for you")),
        ("pathlib.Path.rename", OSError(errno.EIO, "No space left on device, somehow")),
    ],
)
def test_what_cannot_be_written_leaves_the_last_checkpoint(
    point: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    checkpoint.save(tmp_path, point, {})

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(CheckpointError, match=r"^cannot write the checkpoint .*step-000040: .*No space left.*$"):
            checkpoint.save(tmp_path, at(point, 40), {})
    assert names(tmp_path) == ["step-000030"]
    assert checkpoint.load(tmp_path).step == 30
    checkpoint.save(tmp_path, at(point, 40), {})
    assert checkpoint.load(tmp_path).step == 40


def test_a_disk_that_is_full_leaves_the_last_checkpoint(point: Checkpoint, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        first = checkpoint.save(disk / "run", point, {})
        left = shutil.disk_usage(disk).free - (first / "model.safetensors").stat().st_size  # [bytes]
        for size in (left - 4096, left, 10**7):
            with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*[Nn]o space left"):
                checkpoint.save(disk / "run", at(point, 40), {"large": torch.zeros(size, dtype=torch.uint8)})
            assert names(disk / "run") == ["step-000030"]
            assert checkpoint.load(disk / "run").step == 30
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_that_is_a_file_is_a_mistake_in_one_line(point: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        checkpoint.save(tmp_path / "run", point, {})


def test_what_could_not_be_read_again_is_not_written(point: Checkpoint, tmp_path: Path) -> None:
    hostile = dataclasses.replace(point, environment=Environment(None, {}, ("left\x1b[2J",)))
    diverged = dataclasses.replace(point, policy=deepcopy(point.policy))
    diverged.policy.state_dict()["network.out.1.bias"][0] = float("nan")
    for wrong, state in ((hostile, {}), (diverged, {}), (point, {"mask": torch.ones(3, dtype=torch.bool)})):
        with pytest.raises(CheckpointError, match=r"printable characters|bias holds NaN|is of dtype 'BOOL'"):
            checkpoint.save(tmp_path, wrong, state)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "change, said",
    [
        ({"environment": Environment(None, {}, ("left\x1b[2J",))}, "printable characters"),
        ({"environment": Environment(None, {}, ("x" * 201,))}, "printable characters"),
        ({"environment": Environment(None, {}, tuple(map(str, range(1025))))}, "at most 1024 items|from 0 to 1024"),
        ({"environment": Environment("a", {"map": "x" * 2**22}, ())}, "it would have .* bytes; at most"),
        ({"environment": Environment("a", {"x": float("nan")}, ())}, "arguments must be finite"),
        ({"environment": Environment("a", {"x": object()}, ())}, "no config.json of a checkpoint can hold this"),
        ({"environment": Environment("a", {"x": "\ud800"}, ())}, "half a surrogate pair"),
        ({"environment": Environment("a", {"x": [[] for _ in range(20_001)]}, ())}, "lists and objects"),
        ({"step": 10**13}, "step must be from 0"),
    ],
)
def test_what_could_never_be_saved_is_found_before_the_training(point: Checkpoint, change: dict, said: str) -> None:
    checkpoint.require_savable(point)
    with pytest.raises(CheckpointError, match=said) as caught:
        checkpoint.require_savable(dataclasses.replace(point, **change))
    assert "\n" not in str(caught.value)


def test_a_policy_that_is_too_large_is_found_without_its_memory(point: Checkpoint) -> None:
    with checkpoint.without_memory():
        large = DiffusionPolicy(with_options(PolicyConfig(), widths=(4096, 8192)), point.policy.shapes)
    with pytest.raises(CheckpointError, match="a policy has at most 268435456 weights"):
        checkpoint.require_savable(dataclasses.replace(point, policy=large))


def test_data_of_many_numbers_a_step_are_trained_on_and_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = {"action": rng.normal(size=(30, 2)), "wide": rng.normal(size=(30, 30_000))}
    policy = DiffusionPolicy.for_data(
        with_options(PolicyConfig(), widths=(8,), level_dim=8, noise_levels=20, observation_horizon=1), data
    )
    dataset = Dataset("/data", "abc", 2, 30, {"left": 2}, (0, 1))
    point = Checkpoint(policy, TrainConfig(steps=30), Environment(None, {}, ()), dataset, 30)
    checkpoint.require_savable(point)
    assert same_weights(checkpoint.load(checkpoint.save(tmp_path, point, {})), point)


def kill_again_and_again(kills: int, point: Checkpoint, tmp_path: Path) -> int:
    """Kill a process that saves at random moments; returns how often it was in the middle of it."""
    original, run = checkpoint.save(tmp_path / "original", point, {}), tmp_path / "run"
    rng, step, interrupted = random.Random(0), 1, 0
    command = [sys.executable, "-c", SAVER, str(original), str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as saver:
        assert saver.stdin is not None
        assert saver.stdout is not None
        for _ in range(kills):
            saver.stdin.write(f"{step}\n")
            saver.stdin.flush()
            child = int(saver.stdout.readline())
            time.sleep(rng.uniform(0.02, 0.15) + (0.3 if step == 1 else 0))
            os.kill(child, signal.SIGKILL)
            saver.stdout.readline()
            interrupted += any(path.name.startswith(".") for path in run.iterdir())
            loaded, state = checkpoint.load(run), checkpoint.load_training(checkpoint.find(run))
            assert loaded.step >= step - 1
            assert state["small"] == loaded.step
            assert (state["large"] == loaded.step).all()
            checkpoint.load(run / "best")
            step = loaded.step + 1
    checkpoint.save(run, at(point, step, success_rate=9.0), {}, keep=2, best="success_rate")
    assert names(run) == ["best", f"step-{step - 1:06d}", f"step-{step:06d}"]
    return interrupted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_leaves_checkpoints_that_can_be_loaded(point: Checkpoint, tmp_path: Path) -> None:
    assert kill_again_and_again(10, point, tmp_path) > 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_hundred_killed_processes(point: Checkpoint, tmp_path: Path) -> None:
    assert kill_again_and_again(200, point, tmp_path) > 100
