"""The command line as a user meets it: real processes, real files."""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tyro
import zarr

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.cli import VERBS, main, parse
from diffusion_policy.commands.evaluate import Evaluate
from diffusion_policy.commands.options.acting import FIRST_ROLLOUT_SEED, FIRST_TEST_SEED
from diffusion_policy.commands.options.flags import list_flags
from diffusion_policy.commands.policy_in_env import load_with_environment, refuse_seen_seeds
from diffusion_policy.commands.rollout import Rollout
from diffusion_policy.commands.train import Train
from diffusion_policy.config import SampleConfig
from diffusion_policy.datasets.store import EpisodeStore

CLI = [sys.executable, "-m", "diffusion_policy.cli"]
SMALL = ["--widths", "16", "32", "--level-dim", "32", "--noise-levels", "20", "--batch-size", "32", "--device", "cpu"]
QUICK = SampleConfig(sampling_steps=1)


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail as a user's mistake; returns the one line that it says."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    text = capsys.readouterr().err
    assert status == 2, text
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def explain(verb: str) -> str:
    """What --help says, without the colours of a terminal."""
    said = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as left:
        parse([*verb.split(), "--help"])
    assert left.value.code in (0, None)
    said.seek(0)
    return re.sub(r"\x1b\[[0-9;]*m", "", said.read())


TITLES = {
    "collect": ["options", "environment", "episode", "simulation"],
    "train": [
        "options", "data", "rollout", "policy", "network", "images", "diffusion", "objective", "latent",
        "training", "validation", "checkpoint", "student",
    ],
    "sweep": [
        "options", "data", "search", "evaluation", "policy", "network", "images", "diffusion", "objective", "latent",
        "training", "validation", "checkpoint", "rollout", "student", "sampling",
    ],
    "dataset replay": ["positional arguments", "options", "episode", "environment"],
    "dataset render": ["positional arguments", "options", "environment", "simulation"],
    "evaluate": ["options", "environment", "control", "costs", "simulation", "episode", "sampling", "server"],
    "rollout": ["options", "environment", "control", "costs", "simulation", "episode", "sampling", "server"],
    "run-robot": ["positional arguments", "options", "control", "safety", "sampling", "server"],
    "serve": ["options", "access", "load", "control", "sampling"],
    "forecast": ["options", "forecast", "judging", "sampling", "costs"],
    "live": ["options", "environment", "control", "costs", "simulation", "episode", "sampling"],
    "export": ["options", "graph", "sampling"],
    "benchmark": [
        "options", "rollout", "planning", "policy", "network", "images", "diffusion", "objective", "latent",
        "sampling",
    ],
    "study": [
        "positional arguments", "options", "environment", "control", "costs", "simulation", "sampling", "episode",
    ],
    "doctor": ["options", "data", "sampling", "policy", "network", "images", "diffusion", "objective", "latent"],
}  # fmt: skip
TITLES["train-latent"] = TITLES["train-classifier"] = TITLES["train"]
"""Groups of flags; verbs of few flags have no groups."""


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_every_flag_under_the_title_of_its_group(verb: str) -> None:
    text = explain(verb)
    found = [title.removesuffix(" options") for title in re.findall(r"╭─ (.*?) ─", text)]
    without = ["positional arguments", "options"]
    assert found == TITLES.get(verb, [title for title in without if title in found])
    boxes = dict(zip(found, text.split("╭─ ")[1:], strict=True))
    for flag in list_flags(VERBS[verb]):
        if tyro.conf.Positional not in getattr(flag.hint, "__metadata__", ()):
            assert re.search(rf"^│ --{flag.name.replace('_', '-')}\b", boxes[flag.title or "options"], re.MULTILINE)


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_flag_in_whole_sentences(verb: str) -> None:
    for flag in list_flags(VERBS[verb]):
        assert re.fullmatch(r"[A-Z].*\.", flag.help), f"{flag.name}: {flag.help!r}"
        assert not flag.help.endswith(".."), f"{flag.name} goes on in the next flag: {flag.help!r}"


def test_help_needs_neither_torch_nor_a_simulator() -> None:
    code = (
        "import sys; from diffusion_policy.cli import VERBS, main\n"
        "for verb in VERBS:\n"
        "    try: main([*verb.split(), '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = ('torch', 'pybullet', 'gymnasium', 'zarr', 'matplotlib', 'scipy')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_help_lists_the_commands() -> None:
    done = subprocess.run([*CLI, "--help"], capture_output=True, text=True, check=True)
    for verb in VERBS:
        assert verb.split()[0] in done.stdout
    assert "--debug" in done.stdout


def test_unknown_commands_and_options_name_what_there_is(capsys) -> None:
    assert "collect" in fails(capsys, "colect")
    assert "--steps" in fails(capsys, "train", "--dataset", "x", "--output", "y", "--stepz", "3")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--env", "Nope-v0"], "unknown environment 'Nope-v0'; choose from diffusion_policy/Avoid-v0"),
        (["--env", "Pendulum-v1"], "no expert for 'Pendulum-v1'; experts exist for diffusion_policy/Avoid-v0"),
        (["--env-kwargs", "{"], "--env-kwargs must be a JSON object"),
        (["--env-kwargs", "[1]"], "--env-kwargs must be a JSON object"),
        (["--env-kwargs", "[" * 5000], "--env-kwargs must be a JSON object"),
        (["--env-kwargs", '{"rows": NaN}'], "--env-kwargs must be a JSON object"),
        (["--env-kwargs", '{"rows": "\\ud800"}'], "half a surrogate pair"),
        (["--env-kwargs", '{"rows": 1, "rows": 2}'], "the key 'rows' stands there twice"),
        (["--env-kwargs", '{"rows": 5}'], "rows must be 1, 2 or 3; got 5"),
        (["--env-kwargs", '{"colour": 5}'], "does not take the arguments {'colour': 5}"),
        (["--episodes", "0"], "episodes must be at least 1; got 0"),
        (["--noise", "nan"], "noise must be at least 0; got nan"),
    ],
)
def test_collect_refuses(tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    text = fails(capsys, "collect", "--output", tmp_path / "new.zarr", *arguments)
    assert message in text
    assert not (tmp_path / "new.zarr").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prediction-horizon", "10"], "prediction-horizon must be a multiple of 4"),
        (["--action-horizon", "99"], "action-horizon must be at most 15"),
        (
            ["--schedule", "cubic"],
            "invalid choice 'cubic' for argument '--schedule'. Expected one of ('cosine', 'linear', 'sigmoid',",
        ),
        (["--schedule-options", "1", "2", "3"], "the schedule cosine takes the options offset; got 3 numbers"),
        (["--schedule", "linear", "--schedule-options", "0", "0"], "every beta must be above 0 and below 1; got 0"),
        (["--condition-dropout", "1"], "condition-dropout must be from 0 to below 1; got 1.0"),
        (["--snr-gamma", "-1"], "snr-gamma must be at least 0; got -1.0"),
        (["--steps", "0"], "steps must be at least 1; got 0"),
        (["--observation", "pose"], "has no observation 'pose'; it has action, actual_xy, desired_xy"),
        (["--device", "warp"], "no device 'warp' here"),
        (["--device", "meta"], "no device 'meta' here"),
        (["--validation-share", "0.99"], "cannot hold out 99% of 12 episodes"),
        (["--config", "/nowhere.json"], "/nowhere.json is missing"),
        (["--config", "/dev/zero"], "/dev/zero is no regular file"),
        (["--config", "/tmp"], "/tmp is no regular file"),
        (["--noise-levels", "100001"], "noise-levels must be at most 100000; got 100001"),
        (["--learning-rate", "1e400"], "learning-rate must be finite"),
        (["--steps", str(2**63)], "steps must be at most 1000000000000"),
        (["--keep-checkpoints", str(2**63)], "keep-checkpoints must be finite, and whole numbers below 2^63"),
        (["--accumulation", "300"], "accumulation must be at most the batch-size; got 300"),
        (["--widths", "8192", "8192", "--prediction-horizon", "16"], "a policy has at most 268435456 weights"),
    ],
)
def test_train_refuses(demonstrations: Path, tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    text = fails(capsys, "train", "--dataset", demonstrations, "--output", tmp_path / "run", *arguments)
    assert message in text
    assert not (tmp_path / "run").exists()


def test_train_refuses_bad_data(demonstrations: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    assert "no dataset at" in fails(capsys, "train", "--dataset", tmp_path / "no.zarr", "--output", out)
    EpisodeStore.create(tmp_path / "empty.zarr", {}, [])
    empty = fails(capsys, "train", "--dataset", tmp_path / "empty.zarr", "--output", out)
    assert "holds no episodes" in empty
    group = zarr.create_group(tmp_path / "nan.zarr")
    group.create_array("data/state", data=np.full((40, 1), np.nan))
    group.create_array("data/action", data=np.zeros((40, 1)))
    group.create_array("meta/episode_ends", data=np.array([20, 40]))
    assert "data/state has NaN" in fails(capsys, "train", "--dataset", tmp_path / "nan.zarr", "--output", out)
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--env", "Nope-v0"], "unknown environment 'Nope-v0'"),
        (["--env", "CartPole-v1"], "CartPole-v1 takes actions of Discrete(2); a policy can only give those of a Box"),
        (["--env", "Pendulum-v1"], "Pendulum-v1 offers {'observation': (3,)}"),
        (["--success", "return>90"], "success must be 'return>=NUMBER', such as 'return>=90', module:function"),
        (["--mode-function", "nowhere:mode"], "there is no module 'nowhere'"),
        (["--delay-steps", "8"], "delay-steps must be from 0 to 7 (prediction-horizon"),
        (["--delay-steps", "0", "0"], "delay-steps must be different numbers, at least one; got (0, 0)"),
        (["--repeats", "0"], "repeats must be at least 1; got 0"),
        (["--hang-after", "0"], "hang-after must be above 0; got 0.0"),
        (["--sampler", "dmp"], "invalid choice 'dmp' for argument '--sampler'. Expected one of ('ddim', 'ddpm',"),
        (["--sampling-steps", "21"], "sampling steps must be from 1 to the 20 noise levels; got 21"),
        (["--sampling-steps", "0"], "sampling-steps must be at least 1; got 0"),
        (["--guidance", "2"], "guidance 2.0 needs a policy trained with --condition-dropout above 0"),
        (["--guidance", "nan"], "guidance must be at least -1; got nan"),
        (["--mode", "left"], "cannot be steered to mode 'left'; it was trained without condition-on-mode"),
        (["--eta", "2"], "eta must be from 0 to 1; got 2.0"),
        (["--sampler", "ddpm", "--eta", "0.5"], "eta must be 0 with the sampler ddpm; got 0.5"),
        (["--seed", "5"], "overlap the demonstrations' seeds 0 to 11; choose another --seed, such as 100000"),
        (["--seed", "4294967290"], "seeds go up to 4294967295; got 4294967290 to 4294967389; choose a lower --seed"),
        (["--episodes", "1000000000"], "at most 100000 episodes are run, all repeats and delays counted; got 10000000"),
        (["--repeats", "1001"], "at most 100000 episodes are run, all repeats and delays counted; got 100100"),
        (["--delay-steps", "0", "1", "--episodes", "50001"], "at most 100000 episodes are run"),
        (["--parallel", "1000000000"], "parallel must be at most 1024; got 1000000000"),
        (["--videos", "1000000"], "videos must be at most 200, since one page holds them; got 1000000"),
        (
            ["--corrector-steps", "1000", "--parallel", "1024"],
            "GB of noise, at most 0.5 GB are used; lower --sampling-steps",
        ),
        (["--episodes", "-1"], "episodes must be at least 1; got -1"),
    ],
)
def test_evaluate_refuses(run: Path, tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    text = fails(capsys, "evaluate", "--checkpoint", run, "--output", tmp_path / "e", *arguments)
    assert message in text
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("seed, free", [(200_000, 200_021), (199_950, 200_021), (200_020, 200_021)])
def test_seeds_of_rollouts_in_training_are_no_test(run: Path, seed: int, free: int) -> None:
    loaded = load_with_environment(Rollout(run, device="cpu"))
    refuse_seen_seeds(loaded, range(200_000, 200_100))  # this one was trained without rollouts
    training = dataclasses.replace(loaded.checkpoint.training, rollout_every=10, rollout_episodes=21)
    seen = loaded._replace(checkpoint=dataclasses.replace(loaded.checkpoint, training=training))
    words = f"overlap the training rollouts' seeds 200000 to 200020; choose another --seed, such as {FIRST_TEST_SEED}"
    with pytest.raises(ValueError, match=words):
        refuse_seen_seeds(seen, range(seed, seed + 100))
    with pytest.raises(ValueError, match=f"such as {free}"):
        refuse_seen_seeds(seen, range(seed, seed + 150_000))
    refuse_seen_seeds(seen, range(FIRST_TEST_SEED, FIRST_ROLLOUT_SEED))
    refuse_seen_seeds(seen, range(free, free + 150_000))


def test_study_and_rollout_refuse_what_no_machine_holds(run: Path, tmp_path: Path, capsys) -> None:
    many = ["--checkpoint", run, "--episodes", 10**9]
    assert "at most 100000 episodes are run" in fails(capsys, "rollout", *many)
    assert "at most 100000 episodes are run" in fails(capsys, "study", "samplers", *many, "--output", tmp_path / "s")


def test_a_rollout_whose_film_cannot_be_made_says_so_after_its_results(run: Path, tmp_path: Path, capsys) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion_policy.envs.avoid.AvoidEnv.render", lambda _: None)
        arguments = ["--checkpoint", run, "--episodes", 1, "--workers", 1, "--sampling-steps", 1]
        files = ["--video", tmp_path / "v.mp4", "--record", tmp_path / "r.zarr"]
        assert main([str(argument) for argument in ("rollout", *arguments, *files)]) == 1
    said = capsys.readouterr()
    assert "seed 100000: " in said.out
    assert "no video: render() must give an array (height, width, 3) of uint8; got NoneType" in said.err
    assert len(EpisodeStore.open(tmp_path / "r.zarr").episode_ends) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["r.zarr"]


def test_evaluate_names_the_shapes_that_do_not_fit(demonstrations: Path, tmp_path: Path, capsys) -> None:
    group = zarr.create_group(tmp_path / "other.zarr")
    group.create_array("data/pose", data=np.random.default_rng(0).normal(size=(40, 3)))
    group.create_array("data/action", data=np.zeros((40, 2)))
    group.create_array("meta/episode_ends", data=np.array([20, 40]))
    command = ["train", "--dataset", tmp_path / "other.zarr", "--output", tmp_path / "run", "--steps", 1, *SMALL]
    assert main([str(argument) for argument in command]) == 0
    evaluate = ["evaluate", "--checkpoint", tmp_path / "run", "--output", tmp_path / "evaluation"]
    assert "names no environment; give one with --env" in fails(capsys, *evaluate)
    text = fails(capsys, *evaluate, "--env", "diffusion_policy/Avoid-v0")
    assert "observes {'pose': (3,)}; diffusion_policy/Avoid-v0 offers {'actual_xy': (2,), 'desired_xy': (2,)}" in text


def test_nothing_that_exists_is_overwritten(demonstrations: Path, run: Path, tmp_path: Path, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in (*demonstrations.rglob("*"), *run.rglob("*"))}
    assert "already exists" in fails(capsys, "collect", "--output", demonstrations)
    holds = "already holds something; choose another --output or delete it first"
    assert holds in fails(capsys, "train", "--dataset", demonstrations, "--output", run)
    assert holds in fails(capsys, "evaluate", "--checkpoint", run, "--output", run)
    assert holds in fails(capsys, "demo", "--output", run)
    (tmp_path / "v.mp4").touch()
    assert "already exists" in fails(capsys, "rollout", "--checkpoint", run, "--video", tmp_path / "v.mp4")
    assert before == {path: path.stat().st_mtime_ns for path in (*demonstrations.rglob("*"), *run.rglob("*"))}


def test_debug_shows_where_a_mistake_was_found(tmp_path: Path, capsys) -> None:
    assert main(["--debug", "evaluate", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "e")]) == 2
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert "no checkpoint at" in text.splitlines()[-1]


def test_options_of_a_checkpoint_are_taken_and_flags_override_them(run: Path) -> None:
    config = str(checkpoint.find(run) / "config.json")
    command = parse(["train", "--dataset", "d", "--output", "o", "--config", config, "--batch-size", "7"])
    assert isinstance(command, Train)
    assert command.policy.network.widths == (16, 32)
    assert command.training.steps == 30
    assert command.training.batch_size == 7
    assert set(command.observation) == {"actual_xy", "desired_xy"}
    assert parse(["train", "--dataset", "d", "--output", "o", f"--config={config}"]).policy.noise_levels == 20  # pyright: ignore


def test_an_option_file_with_an_unknown_key_names_the_nearest(tmp_path: Path, capsys) -> None:
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"training": {"step": 3}}))
    text = fails(capsys, "train", "--dataset", "d", "--output", "o", "--config", path)
    assert "unknown option 'step'; did you mean steps?" in text
    path.write_text("[]")
    text = fails(capsys, "train", "--dataset", "d", "--output", "o", "--config", path)
    assert "must be a JSON object" in text
    for content, said in (
        ('{"policy": {"widths": 64}}', f"{path}: policy, network, widths must be a list of at most 1024 items, each a"),
        ('{"policy": {"schedule": {}}}', f"{path}: policy, schedule must be one of cosine, linear"),
        ('{"policy": {"schedule_options": [1e400]}}', "schedule_options[0] must be a finite number; got inf"),
        ('{"training": {"steps": 9223372036854775808}}', "steps must be a whole number; got 9223372036854775808"),
        ('{"training": {"steps": 1, "steps": 2}}', "the key 'steps' stands there twice"),
        ('{"training": []}', "training must be a JSON object; got []"),
        ('{"training": {}, "tracker": ["mlflow"]}', "tracker[0] must be one of tensorboard, wandb; got 'mlflow'"),
        ('{"policy": "\\ud800"}', "half a surrogate pair"),
        ('{"policy": ' + "[" * 10_000, "is nested more than 32 levels deep"),
    ):
        path.write_text(content)
        assert said in fails(capsys, "train", "--dataset", "d", "--output", "o", "--config", path)
    for content in ("{}", '{"polcy": {}}'):
        path.write_text(content)
        text = fails(capsys, "train", "--dataset", "d", "--output", "o", "--config", path)
        assert "must be a JSON object with `policy` or `training`" in text


@pytest.mark.slow
def test_a_policy_trained_on_modes_is_steered_to_one(demonstrations: Path, tmp_path: Path, capsys) -> None:
    run, out = tmp_path / "run", tmp_path / "evaluation"
    options = [*SMALL, "--steps", "30", "--condition-on-mode", "--condition-dropout", "0.1"]
    assert main(["train", "--dataset", str(demonstrations), "--output", str(run), *options]) == 0
    assert checkpoint.load(run).policy.modes == ("left", "right")
    steer = ["--mode", "right", "--guidance", "2", "--sampling-steps", "4", "--episodes", "2", "--workers", "1"]
    assert main(["evaluate", "--checkpoint", str(run), "--output", str(out), *steer]) == 0
    sampling = json.loads((out / "results.json").read_text())["sampling"]
    assert (sampling["mode"], sampling["guidance"]) == ("right", 2.0)
    text = fails(capsys, "rollout", "--checkpoint", run, "--mode", "up", "--sampling-steps", 4)
    assert "cannot be steered to mode 'up'; choose from left, right" in text
    text = fails(capsys, "rollout", "--checkpoint", run, "--guidance", 2, "--sampling-steps", 4)
    assert "guidance needs a mode to guide to, one of left, right" in text


def interrupt_when(command: list[str], ready, timeout: float = 60) -> tuple[int, str]:
    """Start a command, send Ctrl-C to it and its workers once `ready()`; returns status and what it said."""
    process = subprocess.Popen([*CLI, *command], stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + timeout
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, text = process.communicate(timeout=timeout)
    return process.returncode, text


def committed(path: Path) -> bool:
    """Whether a store that is being written holds its first episodes."""
    try:
        return len(EpisodeStore.open(path).episode_ends) >= 1
    except ValueError:
        return False


def test_ctrl_c_in_collect_keeps_the_finished_episodes(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    command = ["collect", "--output", str(path), "--episodes", "5000", "--workers", "2"]
    status, text = interrupt_when(command, lambda: committed(path))
    assert status == 130
    assert "Traceback" not in text
    kept = int(re.findall(r"stopped: (\d+) of 5000 episodes", text)[0])
    assert kept >= 1
    store = EpisodeStore.open(path)
    assert len(store.episode_ends) == kept
    assert store.read("action").shape == (store.episode_ends[-1], 2)


def test_ctrl_c_in_train_leaves_a_checkpoint(demonstrations: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def trained() -> bool:
        metrics = run / "metrics.jsonl"
        return metrics.exists() and metrics.read_text().count("\n") >= 2

    command = ["train", "--dataset", str(demonstrations), "--output", str(run), "--steps", "100000", *SMALL]
    status, text = interrupt_when(command, trained)
    assert status == 130
    assert "Traceback" not in text
    assert re.search(r"stopped after step \d+ of 100000; checkpoint in", text)
    assert checkpoint.load(run).step >= 20


@pytest.mark.parametrize("delay", [0.1, 0.6, 1.2, pytest.param(2.0, marks=pytest.mark.slow)])
def test_ctrl_c_at_any_moment_of_the_start_leaves_no_traceback(tmp_path: Path, delay: float) -> None:
    due = time.monotonic() + delay
    command = ["collect", "--output", str(tmp_path / "store.zarr"), "--episodes", "5000", "--workers", "2"]
    status, text = interrupt_when(command, lambda: time.monotonic() > due)
    if "init_import_site" in text:  # Python itself had not started yet
        return
    assert status in (130, -signal.SIGINT)  # before Python runs our code, the signal itself ends it
    assert "Traceback" not in text or status == -signal.SIGINT


def test_ctrl_c_in_evaluate_says_what_was_done(run: Path, tmp_path: Path) -> None:
    command = ["evaluate", "--checkpoint", str(run), "--output", str(tmp_path / "e"), "--episodes", "500"]
    status, text = interrupt_when(command, (tmp_path / "e").exists)
    assert status == 130
    assert re.search(r"stopped after \d+ episodes; nothing was written", text)
    assert "Traceback" not in text


def alive(group: int) -> bool:
    """Whether a process of this group still runs (a dead one that nobody waited for does not)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(process_group) == group and state != "Z":
            return True
    return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_a_killed_collection_leaves_a_store_that_opens_and_no_workers(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    command = [*CLI, "collect", "--output", str(path), "--episodes", "5000", "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not committed(path) and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            process.kill()
    assert len(EpisodeStore.open(path).episode_ends) >= 1
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(process.pid)


def test_evaluating_with_other_rows_still_has_a_page(run: Path, tmp_path: Path) -> None:
    results = Evaluate(
        run, tmp_path / "e", episodes=2, env_kwargs='{"rows": 2}', workers=1, videos=0, device="cpu", sampling=QUICK
    ).run()
    assert len(results["modes"]) - ("none" in results["modes"]) == 6
    assert (tmp_path / "e" / "report.html").exists()


def test_an_output_that_cannot_be_written_is_found_at_once(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    started = time.monotonic()
    fails(capsys, "evaluate", "--checkpoint", run, "--output", tmp_path / "file" / "e", "--episodes", 100_000)
    assert time.monotonic() - started < 30  # not after the rollouts


def test_evaluate_from_python_returns_what_it_writes(run: Path, tmp_path: Path) -> None:
    results = Evaluate(run, tmp_path / "e", episodes=2, workers=1, videos=0, device="cpu", sampling=QUICK).run()
    assert json.loads((tmp_path / "e" / "results.json").read_text()) == json.loads(json.dumps(results))
