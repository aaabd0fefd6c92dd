"""Trainings that are interrupted in every way, and go on as if nothing had happened."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.cli import main
from diffusion_policy.commands import runs
from diffusion_policy.commands.collect import Collect
from diffusion_policy.commands.interrupts import Interrupted
from diffusion_policy.commands.train import Train
from diffusion_policy.commands.training_plan import require_batch_memory
from diffusion_policy.config import ConfigError, PolicyConfig, TrainConfig, with_options
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.training.trainer import Trainer

TINY = with_options(PolicyConfig(), widths=(16, 32), level_dim=32, noise_levels=4)
TRAINING = TrainConfig(
    steps=24,
    batch_size=32,
    learning_rate=1e-3,
    warmup_steps=2,
    validate_every=5,
    checkpoint_every=4,
    keep_checkpoints=2,
)


def train(dataset: Path, run: Path, **options) -> Train:
    return Train(str(dataset), run, policy=TINY, training=replace(TRAINING, **options), device="cpu")


@pytest.fixture(scope="module")
def whole(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(demonstrations, run).run()
    return run


def left_by(run: Path) -> tuple[bytes, bytes, list[dict]]:
    """All that a run leaves but its speed: weights, the training's state, and its log."""
    newest = checkpoint.find(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["steps_per_second"]
    return (newest / "model.safetensors").read_bytes(), (newest / "training.safetensors").read_bytes(), lines


@pytest.fixture
def press(monkeypatch: pytest.MonkeyPatch):
    """Sends this process a signal in chosen steps."""

    def at(chosen: dict[int, signal.Signals]) -> None:
        original = Trainer._train_step

        def train_step(self, stop):
            original(self, stop)
            if self.step in chosen:
                os.kill(os.getpid(), chosen.pop(self.step))

        monkeypatch.setattr(Trainer, "_train_step", train_step)

    return at


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on_and_becomes_the_same(
    demonstrations: Path, whole: Path, tmp_path: Path, press, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    press({7: number, 18: number})
    with pytest.raises(Interrupted, match=rf"after step 7 of 24; .* go on with: diffusion-policy train --resume {run}"):
        train(demonstrations, run).run()
    with pytest.raises(Interrupted, match="after step 18"):
        Train.to_resume(run).run()
    assert main(["train", "--resume", str(run), "--device", "cpu"]) == 0
    assert left_by(run) == left_by(whole)


@pytest.fixture(scope="module")
def short(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """A short training, done without interruption, in which much is due."""
    options = {"steps": 8, "checkpoint_every": 2, "validate_every": 2, "keep_best": "validation_loss"}
    start = train(demonstrations, tmp_path_factory.mktemp("short") / "run", learning_rate=1e-2, **options)
    start.run()
    return start


@pytest.mark.parametrize("stops", [range(1, 8), [4]])
def test_stops_at_any_steps_leave_the_same_checkpoints_and_numbers_in_the_end(
    short: Train, tmp_path: Path, press, stops
) -> None:
    start = replace(short, output=tmp_path / "run")
    press(dict.fromkeys(stops, signal.SIGTERM))
    for stop in stops:
        with pytest.raises(Interrupted, match=f"after step {stop} of 8"):
            (start if stop == stops[0] else Train.to_resume(start.output)).run()
    Train.to_resume(start.output).run()
    assert left_by(start.output) == left_by(short.output)
    assert metrics_of(start.output) == metrics_of(short.output)
    assert os.readlink(start.output / "best") == os.readlink(short.output / "best")


def metrics_of(run: Path) -> dict[str, dict[str, float]]:
    """What each checkpoint of a run says of itself."""
    return {folder.name: checkpoint.load(folder).metrics for folder in checkpoint.steps_of(run)}


def test_what_a_killed_run_measured_but_did_not_save_is_measured_again(
    short: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = replace(short, output=tmp_path / "run")
    original, calls = checkpoint.save, []

    def killed(*arguments, **options) -> Path:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt  # between the line of numbers and the checkpoint
        return original(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(Interrupted, match=r"the last checkpoint is .*step-000004"):
        start.run()
    assert last_logged(start.output) == 6
    monkeypatch.undo()
    Train.to_resume(start.output).run()
    assert left_by(start.output) == left_by(short.output)
    assert metrics_of(start.output) == metrics_of(short.output)


def test_a_finished_run_has_nothing_left_to_do(whole: Path, capsys) -> None:
    before = left_by(whole)
    Train.to_resume(whole).run()
    assert "has all its 24 steps" in " ".join(capsys.readouterr().err.split())
    assert left_by(whole) == before


DRIVER = """
import os, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from diffusion_policy.commands.train import Train
for line in sys.stdin:  # one attempt a line, each in a fork, since imports take longest
    child = os.fork()
    if child == 0:
        Train.to_resume(Path(line.strip())).run()
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize(
    "kills, steps", [pytest.param(2, 40, marks=pytest.mark.slow), pytest.param(100, 4000, marks=pytest.mark.slow)]
)
def test_kills_at_any_moment_change_nothing(demonstrations: Path, tmp_path: Path, kills: int, steps: int) -> None:
    start = train(demonstrations, tmp_path / "run", steps=steps, validate_every=steps // 4, checkpoint_every=7)
    whole = tmp_path / "whole"
    replace(start, output=whole).run()
    begin_only(start)
    rng = random.Random(0)
    killed, status = 0, -signal.SIGKILL
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        while status == -signal.SIGKILL:
            driver.stdin.write(f"{start.output}\n")
            driver.stdin.flush()
            child = int(driver.stdout.readline())
            if killed < kills:
                target = last_logged(start.output) + rng.choice([0, 1])  # the log is written every 10 steps
                wait_for(lambda target=target: last_logged(start.output) >= target or not alive(child))  # noqa: B023
                time.sleep(rng.uniform(0, 0.1))
                kill(child)
            status = int(driver.stdout.readline())
            killed += status == -signal.SIGKILL
    assert status == 0
    assert killed == kills or (killed >= 3 and kills == 5)  # a fast machine may come to the end before
    assert left_by(start.output) == left_by(whole)


def begin_only(start: Train) -> None:
    """As if killed before the first checkpoint: the options are there, and nothing else."""
    original, Trainer.run = Trainer.run, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    try:
        with pytest.raises(Interrupted, match="stopped at once; there is no checkpoint yet"):
            start.run()
    finally:
        Trainer.run = original
    assert not checkpoint.steps_of(start.output)


def last_logged(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    steps = [int(line.split(",")[0].split()[1]) for line in lines if line.endswith("}")]
    return steps[-1] if steps else 0


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# What cannot go on


def test_another_training_is_refused_with_all_differences(whole: Path, demonstrations: Path) -> None:
    asked = Train.to_resume(whole)
    other = replace(
        asked,
        observation=("actual_xy",),
        policy=with_options(TINY, widths=(16, 64), noise_levels=5),
        training=replace(asked.training, batch_size=16, keep_checkpoints=3),
    )
    with pytest.raises(ConfigError) as caught:
        other.run()
    said = str(caught.value)
    for difference in ("widths 16 32, now 16 64", "noise-levels 4, now 5", "batch-size 32, now 16", "now actual_xy"):
        assert difference in said
    assert "keep" not in said


def test_flags_that_contradict_the_run_are_refused(whole: Path, capsys) -> None:
    assert main(["train", "--resume", str(whole), "--learning-rate", "0.1", "--widths", "16", "32"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "cannot go on as another training: learning-rate 0.001, now 0.1" in said
    assert "widths" not in said


def test_other_data_are_refused(whole: Path, demonstrations: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.zarr"
    from diffusion_policy.commands.collect import Collect

    Collect(other, env_kwargs='{"rows": 1}', episodes=12, seed=50, workers=1).run()
    with pytest.raises(ConfigError, match="the data are others"):
        replace(Train.to_resume(whole), dataset=str(other)).run()


def test_a_copy_of_the_data_elsewhere_is_the_same(demonstrations: Path, whole: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy.zarr"
    shutil.copytree(demonstrations, copy)
    replace(Train.to_resume(whole), dataset=str(copy)).run()


def test_there_must_be_a_run(tmp_path: Path, capsys) -> None:
    assert main(["train", "--resume", str(tmp_path / "nothing")]) == 2
    assert "holds no training to go on with: it has no run.json" in capsys.readouterr().err
    (tmp_path / "run.json").write_text('{"training": {}, "dataset": "x"}')
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "run.json does not say which dataset it was" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{")
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "is not JSON" in capsys.readouterr().err
    (tmp_path / "run.json").write_text(
        json.dumps({"training": {"stepz": 3}, "dataset": {"location": "x", "fingerprint": "y"}})
    )
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "unknown option 'stepz'; did you mean steps?" in capsys.readouterr().err


def test_a_run_in_use_is_left_alone(demonstrations: Path, tmp_path: Path) -> None:
    from diffusion_policy.datasets.storage import lock

    run = tmp_path / "run"
    begin_only(train(demonstrations, run))
    unlock = lock(run)
    with pytest.raises(ValueError, match=rf"{run} is being written by another process.*choose another --output"):
        Train.to_resume(run).run()
    unlock()


def test_a_full_disk_keeps_what_is_there_and_training_goes_on(
    demonstrations: Path, whole: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    original, calls = checkpoint.save, []

    def save(run: Path, point: checkpoint.Checkpoint, *rest, **options) -> Path:
        calls.append(point.step)
        if point.step == 12:
            raise checkpoint.CheckpointError("No space left on device")
        return original(run, point, *rest, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    run = tmp_path / "run"
    train(demonstrations, run).run()
    said = " ".join(capsys.readouterr().err.split())
    assert f"no checkpoint at step 12: No space left on device; the last checkpoint is {run}/step-000008" in said
    assert calls == [4, 8, 12, 16, 20, 24]
    assert left_by(run) == left_by(whole)


def test_what_made_the_loss_meaningless_is_said(demonstrations: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(FloatingPointError) as caught:
        train(demonstrations, run, learning_rate=1e30).run()
    said = str(caught.value)
    assert "its batch held episode " in said
    assert "there is no checkpoint yet; look at these steps, or begin a new run with a lower learning rate" in said
    report = json.loads((run / "diverged.json").read_text())
    lengths = np.diff(EpisodeStore.open(demonstrations).episode_ends, prepend=0)
    assert len(report["windows"]) == 32
    assert all(0 <= one["step"] < lengths[one["episode"]] for one in report["windows"])


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    demonstrations: Path, whole: Path, tmp_path: Path, press, capsys
) -> None:
    run = tmp_path / "run"
    press({18: signal.SIGTERM})
    with pytest.raises(Interrupted):
        train(demonstrations, run).run()
    newest = checkpoint.find(run) / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    Train.to_resume(run).run()
    said = " ".join(capsys.readouterr().err.split())
    assert "is damaged" in said
    assert f"going on from {run}/step-000016" in said
    assert left_by(run) == left_by(whole)


def test_what_may_change_is_remembered(demonstrations: Path, tmp_path: Path, press) -> None:
    run = tmp_path / "run"
    press({7: signal.SIGTERM, 15: signal.SIGTERM})
    with pytest.raises(Interrupted):
        replace(train(demonstrations, run), tracker=("tensorboard",)).run()
    assert Train.to_resume(run).tracker == ("tensorboard",)
    assert Train.to_resume(run).device == "cpu"
    assert main(["train", "--resume", str(run), "--keep-checkpoints", "9"]) == 130
    Train.to_resume(run).run()
    assert [int(folder.name[5:]) for folder in checkpoint.steps_of(run)] == [4, 8, 12, 16, 20, 24]


def test_a_stop_where_much_is_due_measures_it_first_and_nothing_is_lost(
    demonstrations: Path, whole: Path, tmp_path: Path, press
) -> None:
    run = tmp_path / "run"
    press({20: signal.SIGTERM})  # a validation, a checkpoint, and the end of a report
    with pytest.raises(Interrupted):
        train(demonstrations, run).run()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 20
    Train.to_resume(run).run()
    assert left_by(run) == left_by(whole)


def test_options_that_cannot_be_written_are_said_and_leave_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match=r"cannot write .*run\.json: No space left on device"):
        runs.write_options(tmp_path, {"policy": {}})
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_only_the_run_names_is_not_imported(demonstrations: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin_only(train(demonstrations, run))
    options = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(options | {"env": "stranger:Id-v0"}))
    with pytest.raises(ConfigError, match=r"by the module stranger, .* give it yourself: --env stranger:Id-v0"):
        Train.to_resume(run)
    assert Train.to_resume(run, trust=True).env == "stranger:Id-v0"


def test_what_cannot_be_measured_is_refused_before_training(demonstrations: Path, tmp_path: Path) -> None:
    start = train(demonstrations, tmp_path / "run", rollout_every=10)
    with pytest.raises(ValueError, match="this policy must be told a mode"):
        replace(start, policy=replace(TINY, condition_on_mode=True)).run()
    best = replace(start.training, keep_best="action_error", validate_every=4)
    with pytest.raises(ConfigError, match=r"a policy with condition-on-mode .*has no action error"):
        replace(start, policy=replace(TINY, condition_on_mode=True), training=best).run()
    assert not (tmp_path / "run").exists()


def test_a_batch_that_no_memory_holds_is_refused_before_training(tmp_path: Path) -> None:
    start = train(tmp_path, tmp_path / "run", batch_size=1000, accumulation=1000)
    require_batch_memory(start, 10**6, 4, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"of 100000000000 windows takes at least \d+ GB, and cpu has \d+ GB; lower"):
        require_batch_memory(start, 10**11, 1, torch.device("cpu"))


def test_rollouts_on_seeds_of_demonstrations_are_refused_before_training(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    Collect(store, env_kwargs='{"rows": 1}', episodes=2, seed=200_003, workers=1).run()
    start = train(store, tmp_path / "run", validation_share=0, rollout_every=10, rollout_episodes=4, keep_best=None)
    with pytest.raises(ConfigError, match="take the seeds 200000 to 200003, of which 1 are demonstrations' of"):
        start.run()
    assert not (tmp_path / "run").exists()


def test_rollouts_in_another_environment_than_the_policys_are_refused_before_training(
    demonstrations: Path, tmp_path: Path
) -> None:
    start = train(demonstrations, tmp_path / "run", rollout_every=10)
    with pytest.raises(ConfigError, match=r"observes .* offers"):
        replace(start, env="diffusion_policy/BlockPush-v0").run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("schedule, levels", [("cosine", 8), ("flow", 10)])
def test_policies_of_few_levels_are_measured_with_as_many_steps(
    demonstrations: Path, tmp_path: Path, schedule, levels: int
) -> None:
    start = train(demonstrations, tmp_path / "run", steps=4, rollout_every=4, rollout_episodes=1)
    replace(start, policy=replace(TINY, schedule=schedule, noise_levels=levels)).run()
    assert checkpoint.load(tmp_path / "run").metrics.keys() >= {"action_error", "success_rate"}


def test_the_best_checkpoint_by_a_metric_stays(demonstrations: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(
        demonstrations, run, keep_checkpoints=1, keep_best="validation_loss", validate_every=2, learning_rate=1e-2
    ).run()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["validation_loss"] for line in lines if line["step"] % 4 == 0}
    best = min(losses, key=losses.__getitem__)
    assert (run / "best").resolve().name == f"step-{best:06d}"
    loaded = checkpoint.load(run / "best")
    assert loaded.step == best
    assert loaded.metrics["validation_loss"] == losses[best]
    assert {int(folder.name[5:]) for folder in checkpoint.steps_of(run)} == {best, 24}


def test_rollouts_say_whether_it_learns(demonstrations: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(demonstrations, run, rollout_every=12, rollout_episodes=2).run()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["success_rate"] is not None] == [12, 24]
    assert checkpoint.load(run).metrics["success_rate"] in (0.0, 0.5, 1.0)
    assert left_by(run)[0] == left_by(whole)[0]  # they changed nothing


def test_a_run_of_an_older_version_goes_on(
    demonstrations: Path, whole: Path, tmp_path: Path, press, make_version_2
) -> None:
    run = tmp_path / "run"
    press({18: signal.SIGTERM})
    with pytest.raises(Interrupted):
        train(demonstrations, run).run()
    for folder in checkpoint.steps_of(run):
        make_version_2(folder)
    Train.to_resume(run).run()
    loaded, uninterrupted = (checkpoint.load(folder).policy.state_dict() for folder in (run, whole))
    for name, weight in uninterrupted.items():
        assert loaded[name].dtype == weight.dtype
        np.testing.assert_allclose(loaded[name], weight, atol=1e-3)


def test_a_url_that_only_the_run_names_is_not_opened(demonstrations: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    begin_only(train(demonstrations, run))
    options = json.loads((run / "run.json").read_text())
    for url in ("http://127.0.0.1:9/x.zarr", "https://a.b/x.zip", "s3://a/b", "simplecache::file:///x", "file:///x"):
        dataset = options["dataset"] | {"location": url}
        (run / "run.json").write_text(json.dumps(options | {"dataset": dataset}))
        capsys.readouterr()
        assert main(["train", "--resume", str(run)]) == 2
        said = capsys.readouterr().err
        assert f"names its dataset by the URL '{url}', which would be opened" in said
        assert "give it yourself with --dataset" in said
        assert said.count("\n") == 1
        assert Train.to_resume(run, dataset=str(demonstrations)).dataset == str(demonstrations)
        assert Train.to_resume(run, dataset=url).dataset == url
    (run / "run.json").write_text(json.dumps(options))
    assert Train.to_resume(run).dataset == str(demonstrations)
    assert f"the dataset is {demonstrations}, as {run} says" in capsys.readouterr().err


def test_a_pipe_that_a_run_names_as_its_data_is_not_waited_for(demonstrations: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    begin_only(train(demonstrations, run))
    options = json.loads((run / "run.json").read_text())
    os.mkfifo(tmp_path / "x.zip")
    for location in (tmp_path / "x.zip", "a\0b", "/dev/zero"):
        dataset = options["dataset"] | {"location": str(location)}
        (run / "run.json").write_text(json.dumps(options | {"dataset": dataset}))
        capsys.readouterr()
        assert main(["train", "--resume", str(run)]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "is no regular file" in said or "no dataset at" in said


def test_files_of_a_run_that_are_no_files_are_refused_and_never_written_to(
    demonstrations: Path, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    begin_only(train(demonstrations, run, steps=2, checkpoint_every=1, keep_checkpoints=1, validate_every=1))
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to("outside")  # a log that is begun anew
    Train.to_resume(run).run()
    assert not (run / "outside").exists()
    assert (run / "metrics.jsonl").is_file()
    options = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(options | {"training": options["training"] | {"steps": 3}}))
    for make in (
        os.mkfifo,
        os.mkdir,
        lambda path: path.symlink_to("outside"),
        lambda path: path.symlink_to("/dev/zero"),
    ):
        (run / "metrics.jsonl").rmdir() if (run / "metrics.jsonl").is_dir() else (run / "metrics.jsonl").unlink()
        make(run / "metrics.jsonl")
        assert main(["train", "--resume", str(run), "--device", "cpu"]) == 2
        assert "metrics.jsonl" in capsys.readouterr().err.splitlines()[-1]
    assert not (run / "outside").exists()
