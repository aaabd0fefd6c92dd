"""`diffusion-policy dataset`, and what collect, train and rollout do with datasets, as a user meets them."""

import json
from pathlib import Path

import gymnasium
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import zarr

from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.cli import main
from diffusion_policy.commands import training_plan
from diffusion_policy.commands.collect import Collect
from diffusion_policy.commands.dataset.plot import choose_films
from diffusion_policy.commands.options.dataset import Inspect, Merge, Replay, Validate
from diffusion_policy.commands.rollout import Rollout
from diffusion_policy.commands.stores import parse_angles
from diffusion_policy.commands.train import Train
from diffusion_policy.config import ConfigError, PolicyConfig, SampleConfig, TrainConfig, with_options
from diffusion_policy.datasets import durable, streaming
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.recorder import Recorder
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs import experts
from diffusion_policy.envs.adapters import EnvSpec

TINY = with_options(PolicyConfig(), widths=(16, 32), level_dim=16, noise_levels=10)
SHORT = TrainConfig(steps=4, batch_size=16, validate_every=2)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def push_t_like(path: Path, key: str = "action") -> Path:
    """Zarr v2 as the published Push-T dataset: agent and block [px], the block's angle [rad]; absolute actions."""
    rng = np.random.default_rng(0)
    state = np.cumsum(rng.normal(size=(400, 5)), axis=0).astype(np.float32)
    state[:, 4] %= 2 * np.pi
    group = zarr.create_group(path, zarr_format=2)
    group.create_array("data/state", data=state, chunks=(161, 5))
    group.create_array(f"data/{key}", data=state[:, :2] + 1, chunks=(161, 2))
    group.create_array("data/n_contacts", data=np.zeros((400, 1), np.float32))
    group.create_array("meta/episode_ends", data=np.array([120, 200, 290, 400]))
    return path


def test_inspect_says_what_is_there(demonstrations: Path, capsys) -> None:
    status, out, _ = run(capsys, "dataset", "inspect", demonstrations)
    assert status == 0
    assert "observation: actual_xy, desired_xy; action: action" in out
    assert "12 episodes" in out
    assert "modes: left 6, right 6" in out
    assert "crc32c" in out
    assert max(map(len, out.splitlines())) <= 80 or "observation_keys" in out
    found = json.loads(run(capsys, "dataset", "inspect", demonstrations, "--json")[1])
    assert found == json.loads(json.dumps(Inspect(str(demonstrations)).run()))
    assert found["keys"]["action"]["max"][1] == pytest.approx(0.01, abs=1e-3)


def test_validate_finds_problems_and_fails(demonstrations: Path, tmp_path: Path, capsys) -> None:
    status, out, err = run(capsys, "dataset", "validate", demonstrations)
    assert (status, out) == (0, "")
    assert "no problems" in err
    assert Validate(str(demonstrations)).run() == []
    bad = push_t_like(tmp_path / "bad.zarr")
    zarr.open_group(bad, mode="r+")["data/state"][130, 2] = np.nan
    status, out, err = run(capsys, "dataset", "validate", bad)
    assert status == 1
    assert "problem: data/state: NaN or infinity in 1 rows of episode 1, first in row 130" in out
    assert "no checksum protects the values" in out
    assert "1 problem" in err
    (problem, _note) = json.loads(run(capsys, "dataset", "validate", bad, "--json")[1])
    assert (problem["episode"], problem["row"]) == (1, 130)


def test_convert_there_and_back(demonstrations: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("h5py")
    assert run(capsys, "dataset", "convert", demonstrations, tmp_path / "x.hdf5")[0] == 0
    assert run(capsys, "dataset", "convert", tmp_path / "x.hdf5", tmp_path / "x.zarr")[0] == 0
    assert files_of(tmp_path / "x.zarr") == files_of(demonstrations)
    status, _, err = run(capsys, "dataset", "convert", demonstrations, tmp_path / "x.hdf5")
    assert (status, "already exists" in err) == (2, True)
    status, _, err = run(capsys, "train", "--dataset", tmp_path / "x.hdf5", "--output", tmp_path / "run")
    assert "other formats come in with: dataset convert" in err


def test_split_and_merge_give_the_episodes_again(demonstrations: Path, tmp_path: Path, capsys) -> None:
    parts = tmp_path / "a.zarr", tmp_path / "b.zarr"
    assert run(capsys, "dataset", "split", demonstrations, "--output", *parts, "--share", 0.75)[0] == 0
    assert run(capsys, "dataset", "merge", *parts, "--output", tmp_path / "c.zarr")[0] == 0
    seeds = [episode.seed for episode in EpisodeStore.open(tmp_path / "c.zarr").episodes()]
    assert sorted(seeds, key=str) == sorted(range(12), key=str)
    assert run(capsys, "dataset", "replay", tmp_path / "c.zarr")[0] == 0  # the noise is still known
    status, _, err = run(capsys, "collect", "--resume", tmp_path / "c.zarr")
    assert (status, "was not made by collect" in err) == (2, True)
    assert "at least two stores; got 1" in run(capsys, "dataset", "merge", parts[0], "--output", tmp_path / "d.zarr")[2]
    assert "share must be above 0" in run(capsys, "dataset", "split", parts[0], "--output", "x", "y", "--share", 1)[2]


ENCODER = """
def measure(text):
    return [len(text), text.count("l")]
"""


def test_instruct_gives_episodes_texts_that_inspect_shows(
    demonstrations: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("letters_of_texts.py").write_text(ENCODER)
    told = ["--instruction", "left=go left", "--instruction=right=go right, then on"]
    encoder = ["--instruction-encoder", "letters_of_texts:measure"]
    status, _, err = run(capsys, "dataset", "instruct", demonstrations, "--output", "a.zarr", *told, *encoder)
    assert (status, "12 of 12 episodes in a.zarr have an instruction" in err) == (0, True)
    out = run(capsys, "dataset", "inspect", "a.zarr")[1]
    assert "instruction 'go right, then on': 6 episodes (right 6)" in out
    assert json.loads(run(capsys, "dataset", "inspect", "a.zarr", "--json")[1])["instructions"] == {
        "go left": {"episodes": 6, "modes": {"left": 6}},
        "go right, then on": {"episodes": 6, "modes": {"right": 6}},
    }
    assert run(capsys, "dataset", "validate", "a.zarr")[0] == 0
    for arguments, message in (
        ([], "needs an --instruction, or an --instruction-encoder"),
        (["--instruction", "lft=go left"], "there is no mode 'lft'; the modes are left, right"),
        (["--instruction", "left=a", "--instruction", "left=b"], "gives mode 'left' two texts; got 'a' and 'b'"),
        (["--instruction", "go", "--instruction", "stop"], "gives all other episodes two texts"),
        (["--instruction", "go", "--instruction-encoder", "letters_of_texts:mesure"], "did you mean 'measure'?"),
    ):
        status, _, err = run(capsys, "dataset", "instruct", demonstrations, "--output", "b.zarr", *arguments)
        assert (status, message in " ".join(err.split())) == (2, True), err


def test_repair_drops_the_tail_and_says_so(demonstrations: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "store.zarr"
    with EpisodeStore.create(path, {"observation_keys": ["state"]}, []) as store:
        store.append([Demonstration({key: np.ones((20, 2)) for key in ("state", "action")})])
    before = files_of(path)
    zarr.open_group(path, mode="r+")["data/state"].resize((30, 2))
    said = run(capsys, "dataset", "inspect", path)[2]
    assert "10 rows beyond its last complete episode are not read" in " ".join(said.split())
    status, _, err = run(capsys, "dataset", "repair", path)
    assert status == 0
    assert "data/state: dropped 10 uncommitted rows" in err
    assert files_of(path) == before
    assert "nothing to mend" in run(capsys, "dataset", "repair", path)[2]


@pytest.mark.parametrize("plane", [(), ("--plane", "state:2,3")])
def test_plot_draws_three_pictures(demonstrations: Path, tmp_path: Path, capsys, plane: tuple[str, ...]) -> None:
    source = push_t_like(tmp_path / "p.zarr") if plane else demonstrations
    assert run(capsys, "dataset", "plot", source, "--output", tmp_path / "plots", *plane)[0] == 0
    for name in ("trajectories", "actions", "lengths"):
        picture = imageio.imread(tmp_path / "plots" / f"{name}.png")
        assert picture.shape[0] > 300
        assert picture.std() > 10
    status, _, err = run(capsys, "dataset", "plot", source, "--output", tmp_path / "new", "--plane", "state:0,9")
    assert (status, "--plane must be a key and two of its columns" in err) == (2, True)


@pytest.mark.parametrize("dtype, channels", [(np.uint8, 3), (np.float32, 3), (np.uint16, 1)])
def test_pictures_are_measured_and_shown(tmp_path: Path, capsys, dtype: type, channels: int) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "store.zarr"
    with EpisodeStore.create(path, {"observation_keys": ["camera", "state"]}, ["left", "right"], sync=False) as store:
        for seed in range(7):
            frames = rng.integers(20, 200, (12, 24, 32, channels)).astype(dtype)
            frames[5:8] = 20
            data = {"camera": frames, "state": rng.normal(size=(12, 2)), "action": rng.normal(size=(12, 2))}
            store.append([Demonstration(data, seed, ("left", "right")[seed % 2], seed > 2)])
    _, out, _ = run(capsys, "dataset", "inspect", path)
    (row,) = [line.split() for line in out.splitlines() if line.strip().startswith("camera   24 x 32")]
    assert row[1:5] == ["24", "x", "32", str(channels)]
    assert row[-2:] == ["25.00%", "16.67%"]
    image = json.loads(run(capsys, "dataset", "inspect", path, "--json")[1])["keys"]["camera"]
    assert (image["min"], image["max"]) == ([20] * channels, [199] * channels)
    assert image["image"]["mean"] == pytest.approx(EpisodeStore.open(path).read("camera").mean(axis=(0, 1, 2)))
    assert run(capsys, "dataset", "plot", path, "--output", tmp_path / "plots")[0] == 0
    sheet = imageio.imread(tmp_path / "plots" / "frames_camera.png")
    assert sheet.std() > 30
    assert len(list((tmp_path / "plots").iterdir())) == 4


def test_films_take_turns_among_the_modes() -> None:
    assert choose_films(["a"]) == [0]
    assert choose_films([None] * 100) == [0, 16, 33, 50, 66, 83]
    assert choose_films(["a", "b"] * 50) == [0, 1, 32, 33, 66, 67]
    assert choose_films(["a"] * 9 + ["b"]) == [0, 3, 6, 9]
    assert len(choose_films([str(i) for i in range(40)])) == 6


def test_replay_repeats_every_step_and_notices_when_it_does_not(
    demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert Replay(str(demonstrations), episodes=4).run() == {"actual_xy": 0.0, "desired_xy": 0.0}
    video = tmp_path / "replay.mp4"
    episodes = list(EpisodeStore.open(demonstrations).episodes([0, 1]))
    attributes = EpisodeStore.open(demonstrations).attributes
    begun = {key: rows[:20] for key, rows in episodes[0].data.items()}
    with EpisodeStore.create(tmp_path / "begun.zarr", attributes, ["left", "right"]) as store:
        store.append([Demonstration(begun, episodes[0].seed)])
    made, make = [], EnvSpec.__call__
    with monkeypatch.context() as patch:
        patch.setattr(EnvSpec, "__call__", lambda task, **given: made.append(given) or make(task, **given))
        assert run(capsys, "dataset", "replay", tmp_path / "begun.zarr", "--episodes", 1, "--video", video)[0] == 0
    assert made == [{}, {"render_mode": "rgb_array"}]  # none but to compare in and to film
    assert len(imageio.mimread(video, memtest=False)) > 15
    episodes[1].data["action"][30] += 0.005
    with EpisodeStore.create(tmp_path / "wrong.zarr", attributes, ["left", "right"]) as store:
        store.append(episodes)
    status, out, err = run(capsys, "dataset", "replay", tmp_path / "wrong.zarr")
    assert status == 1
    assert "episode 1, step 31: " in err
    assert "off by" in out
    status, _, err = run(capsys, "dataset", "replay", push_t_like(tmp_path / "p.zarr"))
    assert (status, "does not say the seeds" in err) == (2, True)


def test_a_collection_goes_on_where_it_stopped_and_ends_the_same(tmp_path: Path, capsys) -> None:
    options = {"env_kwargs": '{"rows": 1}', "noise": 0.3, "seed": 5, "workers": 1}
    Collect(tmp_path / "whole.zarr", episodes=4, **options).run()
    Collect(tmp_path / "parts.zarr", episodes=1, **options).run()
    zarr.open_group(tmp_path / "parts.zarr", mode="r+").attrs["collection"] = {"episodes": 4, "seed": 5}
    assert run(capsys, "collect", "--resume", tmp_path / "parts.zarr", "--workers", 1)[0] == 0
    assert files_of(tmp_path / "parts.zarr") == files_of(tmp_path / "whole.zarr")
    assert "4 episodes" in run(capsys, "collect", "--resume", tmp_path / "parts.zarr")[2]  # nothing is left to do
    for wrong, message in (
        (("--noise", 0.1), "was begun with --noise 0.3; got 0.1"),
        (("--seed", 7), "was begun with --seed 5; got 7"),
        (("--env-kwargs", '{"rows": 2}'), "was begun with --env-kwargs {'rows': 1}; got {'rows': 2}"),
    ):
        status, _, err = run(capsys, "collect", "--resume", tmp_path / "parts.zarr", *wrong)
        assert (status, message in err) == (2, True), err
    with pytest.raises(ConfigError, match="either --output"):
        Collect()


def test_a_full_disk_in_a_collection_keeps_what_is_committed(tmp_path: Path, capsys, monkeypatch) -> None:
    real, left = durable.put, [40]

    def put(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    path = tmp_path / "store.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(durable, "put", put)
        arguments = ("--output", path, "--env-kwargs", '{"rows": 1}', "--episodes", 300, "--workers", 1)
        status, _, err = run(capsys, "collect", *arguments)
    assert status == 2
    assert "No space left on device; " in err
    kept = len(EpisodeStore.open(path).episode_ends)
    assert f"{kept} of 300 episodes are safe in {path}, go on with --resume {path}" in err
    assert run(capsys, "collect", "--resume", path, "--workers", 1, "--episodes", kept + 3)[0] == 0
    assert len(EpisodeStore.open(path).episode_ends) == kept + 3


def test_keys_and_angles_are_chosen_on_the_command_line(tmp_path: Path, capsys) -> None:
    path = push_t_like(tmp_path / "p.zarr", key="target")
    assert (
        "has no action key 'action'; it has n_contacts, state, target; choose with --action"
        in run(capsys, "train", "--dataset", path, "--output", tmp_path / "run")[2]
    )
    choice = {"observation": ("state",), "action": "target", "angles": ("state:4",)}
    Train(str(path), tmp_path / "run", policy=TINY, training=SHORT, device="cpu", **choice).run()
    loaded = checkpoint.load(tmp_path / "run")
    assert loaded.policy.shapes.angles == {"state": (4,)}
    assert loaded.policy.features == 2 * 6
    assert loaded.dataset.action_key == "target"
    state = torch.zeros(1, 2, 5)
    turned = state + torch.tensor([0, 0, 0, 0, 2 * torch.pi])
    torch.testing.assert_close(loaded.policy.encode({"state": state}), loaded.policy.encode({"state": turned}))
    for wrong in ("state", "state:x", "pose:1", "state:"):
        text = run(
            capsys, "train", "--dataset", path, "--output", tmp_path / "x", "--action", "target", "--angles", wrong
        )[2]
        assert "--angles must name one of the keys" in text
    text = run(
        capsys, "train", "--dataset", path, "--output", tmp_path / "x", "--action", "target", "--angles", "state:5"
    )[2]
    assert "angles must name columns of a key, each once; state has the shape (5,) a step, got [5]" in text
    assert not (tmp_path / "x").exists()


def test_angles_that_a_store_declares_are_used_for_actions_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    attributes = {"observation_keys": ["state"], "angles": {"state": [0], "action": [1]}}
    with EpisodeStore.create(tmp_path / "store.zarr", attributes, []) as store:
        for _ in range(4):
            data = {"state": rng.uniform(-3, 3, (30, 2)), "action": rng.uniform(-3, 3, (30, 2))}
            store.append([Demonstration(data)])
    Train(str(tmp_path / "store.zarr"), tmp_path / "run", policy=TINY, training=SHORT, device="cpu").run()
    policy = checkpoint.load(tmp_path / "run").policy
    assert policy.shapes.angles == {"state": (0,), "action": (1,)}
    actions = policy.sample(
        {"state": torch.zeros(3, 2, 2)}, [np.random.default_rng(0)] * 3, config=SampleConfig(sampling_steps=4)
    )
    assert actions.shape == (3, 1, 16, 2)
    assert actions[..., 1].abs().max() <= torch.pi


def test_training_streams_what_does_not_fit_and_learns_the_same_numbers(tmp_path: Path, capsys) -> None:
    path = push_t_like(tmp_path / "p.zarr")
    for name, memory in (("held", 4.0), ("streamed", 0.0)):
        training = TrainConfig(steps=4, batch_size=16, memory_gb=memory, validation_share=0.3)
        Train(str(path), tmp_path / name, policy=TINY, training=training, device="cpu").run()
        assert ("streamed from the store" in capsys.readouterr().err) == (memory == 0)
    held, streamed = (checkpoint.load(tmp_path / name) for name in ("held", "streamed"))
    assert held.dataset == streamed.dataset
    for name, value in held.policy.normalizer.state_dict().items():
        assert torch.equal(value, streamed.policy.normalizer.state_dict()[name])


def test_training_uses_as_many_episodes_as_asked_and_refuses_episodes_shorter_than_a_window(
    tmp_path: Path, capsys
) -> None:
    path = push_t_like(tmp_path / "p.zarr")
    training = TrainConfig(steps=2, batch_size=16, max_episodes=2)
    Train(str(path), tmp_path / "run", policy=TINY, training=training, device="cpu").run()
    assert "2 training and 1 validation episodes" in capsys.readouterr().err
    group = zarr.open_group(path, mode="r+")
    group["meta/episode_ends"][:] = [10, 22, 30, 40]
    status, _, err = run(capsys, "train", "--dataset", path, "--output", tmp_path / "x", "--device", "cpu")
    assert status == 2
    assert "is as long as a window: the longest has 12 steps, the prediction-horizon is 16; lower it" in err
    group["meta/episode_ends"][:] = [10, 22, 30, 90]
    Train(str(path), tmp_path / "y", policy=TINY, training=SHORT, device="cpu").run()
    assert "are shorter than a window of 16 steps" in capsys.readouterr().err


def test_rollouts_can_be_recorded_and_replayed(run_folder: Path, tmp_path: Path, capsys) -> None:
    record = tmp_path / "rolled.zarr"
    sampling = SampleConfig(sampling_steps=1)
    Rollout(run_folder, episodes=2, record=record, sampling=sampling, workers=1, device="cpu").run()
    store = EpisodeStore.open(record)
    assert [episode.seed for episode in store.episodes()] == [100_000, 100_001]
    assert store.attributes["environment"] == {"id": "diffusion_policy/Avoid-v0", "arguments": {"rows": 1}}
    assert Replay(str(record)).run() == {"actual_xy": 0.0, "desired_xy": 0.0}
    status, _, err = run(capsys, "rollout", "--checkpoint", run_folder, "--record", record)
    assert (status, "already exists; choose another --record" in err) == (2, True)


@pytest.fixture
def run_folder(request: pytest.FixtureRequest) -> Path:
    """The shared training, under a name of its own: `run` runs a command here."""
    return request.getfixturevalue("run")


def test_replay_says_when_there_is_nothing_to_compare(demonstrations: Path, tmp_path: Path, capsys) -> None:
    for env, said in (("Pendulum-v1", f"does not fit {demonstrations}"), ("CartPole-v1", "takes actions of Discrete")):
        command = ("dataset", "replay", demonstrations, "--env", env, "--env-kwargs", "{}")
        status, _, err = run(capsys, *command)
        assert (status, f"{env} {said}" in err) == (2, True)
    with Recorder(gymnasium.make("Pendulum-v1"), tmp_path / "swing.zarr") as env:
        env.reset(seed=3)
        for _ in range(200):
            env.step(np.ones(1, np.float32))
    assert Replay(str(tmp_path / "swing.zarr")).run() == {"observation": 0.0}
    command = ("dataset", "replay", tmp_path / "swing.zarr", "--env-kwargs", '{"max_episode_steps": 5}')
    status, _, err = run(capsys, *command)
    assert (status, "episode 0 ends after 5 of its 200 steps" in err) == (1, True)


def test_options_of_a_checkpoint_bring_its_keys_and_angles(tmp_path: Path) -> None:
    path = push_t_like(tmp_path / "p.zarr", key="target")
    choice = {"observation": ("state",), "action": "target", "angles": ("state:4",)}
    Train(str(path), tmp_path / "a", policy=TINY, training=SHORT, device="cpu", **choice).run()
    config = tmp_path / "a" / "step-000004" / "config.json"
    assert main(["train", "--dataset", str(path), "--output", str(tmp_path / "b"), "--config", str(config)]) == 0
    first, second = (checkpoint.load(tmp_path / name) for name in ("a", "b"))
    assert second.policy.shapes == first.policy.shapes
    assert second.dataset == first.dataset


def in_parts(path: Path) -> Path:
    """A store of others: actions in two arrays, a sensor that was unplugged, pictures that no one here can unpack."""
    push_t_like(path, key="pos")
    group = zarr.open_group(path, mode="r+")
    group.create_array("data/yaw", data=np.linspace(-3, 3, 400))
    group.create_array("data/force", data=np.full((400, 6), np.nan))
    (path / "data/rgb").mkdir()
    (path / "data/rgb/.zarray").write_text(
        '{"zarr_format": 2, "shape": [400, 4], "chunks": [1, 4], "dtype": "|u1", "fill_value": 0, "order": "C", '
        '"filters": null, "compressor": {"id": "imagecodecs_jpegxl"}}'
    )
    return path


def test_what_nobody_needs_and_nobody_can_read_is_left_out_and_said(tmp_path: Path, capsys) -> None:
    path = in_parts(tmp_path / "p.zarr")
    status, out, err = run(capsys, "dataset", "inspect", path)
    assert status == 0
    assert "observation: n_contacts, pos, state, yaw" in out
    err = " ".join(err.split())
    assert "data/force is left out: it has NaN or infinity in 400 rows" in err
    assert err.count("data/rgb is left out") == 1
    found = json.loads(run(capsys, "dataset", "inspect", path, "--json")[1])
    assert found["left_out"].keys() == {"force", "rgb"}
    status, _, err = run(capsys, "train", "--dataset", path, "--output", tmp_path / "x", "--action", "rgb")
    assert (status, "data/rgb cannot be used: it is packed with the codec" in err) == (2, True)
    plots = tmp_path / "plots"
    status, _, err = run(capsys, "dataset", "plot", path, "--output", plots, "--action", "pos", "yaw")
    assert status == 0, err
    assert len(list(plots.iterdir())) == 3


def test_actions_of_several_arrays_are_learned_side_by_side(tmp_path: Path, capsys) -> None:
    path = in_parts(tmp_path / "p.zarr")
    chosen = ("--dataset", path, "--observation", "state", "--action", "pos", "yaw")
    tiny = (
        "--widths",
        16,
        32,
        "--level-dim",
        16,
        "--noise-levels",
        10,
        "--steps",
        2,
        "--batch-size",
        16,
        "--device",
        "cpu",
    )
    status, _, err = run(capsys, "train", *chosen, *tiny, "--output", tmp_path / "a", "--angles", "yaw:0", "state:4")
    assert status == 0, err
    loaded = checkpoint.load(tmp_path / "a")
    assert loaded.dataset.action_key == "pos+yaw"
    assert loaded.policy.shapes.action == (3,)
    assert loaded.policy.shapes.angles == {"action": (2,), "state": (4,)}
    assert json.loads((tmp_path / "a" / "run.json").read_text())["action"] == "pos+yaw"
    assert run(capsys, "train", "--resume", tmp_path / "a")[0] == 0
    config = checkpoint.steps_of(tmp_path / "a")[-1] / "config.json"
    assert run(capsys, "train", "--dataset", path, "--output", tmp_path / "b", "--config", config)[0] == 0
    second = checkpoint.load(tmp_path / "b")
    assert (second.policy.shapes, second.dataset) == (loaded.policy.shapes, loaded.dataset)
    looked = ("doctor", "--checkpoint", tmp_path / "a", "--overfit-steps", 0, "--sampling-steps", 4, "--device", "cpu")
    for data in ((), ("--dataset", path)):
        assert "400 steps of state, action" in run(capsys, *looked, *data)[2]
    for wrong, said in (
        (("--action", "pos", "pose"), "has no action key 'pose'; it has "),
        (("--angles", "yaw:1"), "angles must name columns of a key; yaw has 1, got 1"),
    ):
        status, _, err = run(capsys, "train", *chosen, *tiny, "--output", tmp_path / "c", *wrong)
        assert (status, said in err) == (2, True), err


def test_a_collection_and_recorded_rollouts_are_merged(demonstrations: Path, run_folder: Path, tmp_path: Path) -> None:
    sampling = SampleConfig(sampling_steps=1)
    Rollout(run_folder, episodes=1, record=tmp_path / "b.zarr", sampling=sampling, workers=1, device="cpu").run()
    assert Merge((str(demonstrations), str(tmp_path / "b.zarr")), tmp_path / "all.zarr").run() == 13
    store = EpisodeStore.open(tmp_path / "all.zarr")
    assert store.seeds()[-1] == 100_000
    assert Validate(str(tmp_path / "all.zarr")).run() == []


def test_a_copy_can_declare_keys_and_angles(tmp_path: Path, capsys) -> None:
    path = push_t_like(tmp_path / "p.zarr", key="target")
    declared = ("--observation", "state", "--action", "target", "--angles", "state:4")
    assert run(capsys, "dataset", "convert", path, tmp_path / "q.zarr", *declared)[0] == 0
    store = EpisodeStore.open(tmp_path / "q.zarr")
    assert (store.observation_keys, store.action_key) == (("state",), "target")
    assert store.attributes["angles"] == {"state": [4]}
    status, _, err = run(capsys, "dataset", "convert", path, tmp_path / "r.zarr", "--observation", "pose")
    assert status == 2
    assert "there is no" in err


def test_a_collection_that_never_succeeds_can_be_tried_again(tmp_path: Path, capsys, monkeypatch) -> None:
    class IntoTheCylinder:
        def act(self, observation: dict[str, np.ndarray]) -> np.ndarray:
            return np.array([0.5 - observation["actual_xy"][0], 0.02], np.float32)

    monkeypatch.setitem(experts.EXPERTS, "diffusion_policy/Avoid-v0", lambda mode: IntoTheCylinder())
    command = ("collect", "--output", tmp_path / "store.zarr", "--noise", 0, "--workers", 1)
    status, _, err = run(capsys, *command)
    assert (status, "only 0 of 100 episodes succeeded; lower the noise" in err) == (2, True)
    assert not (tmp_path / "store.zarr").exists()


def test_angles_of_one_key_may_be_given_one_by_one_and_outputs_must_differ(tmp_path: Path, capsys) -> None:
    assert parse_angles(["a:1", "a:2,3", "b:0"], ["a", "b"]) == {"a": (1, 2, 3), "b": (0,)}
    path = push_t_like(tmp_path / "p.zarr")
    status, _, err = run(capsys, "dataset", "split", path, "--share", 0.5, "--output", *[tmp_path / "x.zarr"] * 2)
    assert (status, "the two parts need two outputs" in err) == (2, True)
    assert not (tmp_path / "x.zarr").exists()


def test_held_out_windows_stay_within_the_memory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = push_t_like(tmp_path / "p.zarr")
    kept: list[int] = []
    real = streaming.hold_windows

    def counted(store, keys, episodes, *arguments, **options):
        kept.append(len(episodes))
        return real(store, keys, episodes, *arguments, **options)

    monkeypatch.setattr(streaming, "hold_windows", counted)
    monkeypatch.setattr(training_plan, "hold_windows", counted)
    budget = 130 * (4 * (5 + 1 + 2) + 32) / 1e9  # one episode
    training = TrainConfig(steps=2, batch_size=16, validation_share=0.7, max_episodes=1, memory_gb=budget)
    Train(str(path), tmp_path / "run", policy=TINY, training=training, device="cpu").run()
    assert kept == [1, 1]
