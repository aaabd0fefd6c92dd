"""`dataset render`: images beside recorded states."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import diffusion_policy as dp
from diffusion_policy.cli import main
from diffusion_policy.commands.options.dataset import Render
from diffusion_policy.config import ConfigError
from diffusion_policy.datasets.demonstration import PUSHED, Demonstration
from diffusion_policy.datasets.recorder import Recorder
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs.adapters import EnvSpec

PUSH_T = "diffusion_policy/PushT-v0"
needs_push_t = pytest.mark.skipif(find_spec("gym_pusht") is None, reason="gym-pusht is not installed")
SIZE = 16


def record(path: Path, env_id: str, seeds: range, steps: int = 8, **arguments: object) -> Path:
    """Random episodes, with what was observed last."""
    env = EnvSpec(env_id, {"max_episode_steps": steps, **arguments}, success="none")()
    with Recorder(env, path, {"environment": env.described} if "render_mode" in arguments else None) as env:
        for seed in seeds:
            env.reset(seed=seed)
            rng, over = np.random.default_rng(seed), False
            while not over:
                action = rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
                _, _, terminated, truncated, _ = env.step(action)
                over = terminated or truncated
    return path


def changed(source: Path, target: Path, change: object, attributes: dict[str, object] | None = None) -> Path:
    """A copy of a store whose episodes are what `change(number, episode)` makes of them."""
    store = EpisodeStore.open(source)
    said = {"observation_keys", "action_key", "environment", "noise", "control_frequency"}
    kept = {name: value for name, value in store.attributes.items() if name in said}
    with EpisodeStore.create(target, kept if attributes is None else attributes, store.modes) as copy:
        copy.append([change(i, episode) for i, episode in enumerate(store.episodes())])
    return target


def contents(path: Path, without: tuple[str, ...] = ()) -> list[tuple[object, ...]]:
    """Everything that is known of each episode."""
    found = []
    for episode in EpisodeStore.open(path).episodes():
        rows = {key: values.tolist() for key, values in episode.data.items() if key not in without}
        final = {key: values.tolist() for key, values in (episode.final or {}).items() if key not in without}
        found.append((rows, final, episode.seed, episode.mode, episode.success))
    return found


def test_images_are_those_of_the_episodes_and_all_else_stays(demonstrations: Path, tmp_path: Path) -> None:
    source = tmp_path / "few.zarr"
    with EpisodeStore.create(source, EpisodeStore.open(demonstrations).attributes, ("left", "right")) as few:
        few.append(list(EpisodeStore.open(demonstrations).episodes(range(3))))
    paths = [tmp_path / f"{workers}.zarr" for workers in (1, 2)]
    for workers, path in zip((1, 2), paths, strict=True):
        options = {"key": ["image", "wrist_image"], "size": SIZE, "workers": workers}
        assert dp.render_dataset(source, path, **options) == 3
    assert contents(paths[0]) == contents(paths[1])
    assert contents(paths[0], ("image", "wrist_image")) == contents(source)
    store = EpisodeStore.open(paths[0])
    assert store.observation_keys == ("actual_xy", "desired_xy", "image", "wrist_image")
    assert store.dtype("image") == np.uint8
    environment = store.attributes["environment"]
    assert environment["arguments"] | {"image_size": SIZE, "wrist_image": True} == environment["arguments"]
    (first,) = store.episodes([2])
    env = EnvSpec(environment["id"], environment["arguments"])()
    observation, _ = env.reset(seed=first.seed)
    for key in ("image", "wrist_image"):
        np.testing.assert_array_equal(first.data[key][0], observation[key])
    assert main(["dataset", "replay", str(paths[0])]) == 0  # the images come out again as well
    assert main(["collect", "--resume", str(paths[0])]) == 2  # no one goes on with a part


def test_episodes_that_go_otherwise_are_left_out_and_named(demonstrations: Path, tmp_path: Path, capsys) -> None:
    def spoil(number: int, episode: Demonstration) -> Demonstration:
        if number in (1, 4):
            episode.data["actual_xy"][3] += 0.01 * number
        pushed = np.full((len(episode.data["action"]), 1), number == 7, np.uint8)
        return episode._replace(data=episode.data | {PUSHED: pushed})

    path = changed(demonstrations, tmp_path / "spoilt.zarr", spoil)
    assert Render(str(path), tmp_path / "out.zarr", size=SIZE, workers=1).run() == 9
    said = " ".join(capsys.readouterr().err.split())
    assert "left out episode 1, step 3: actual_xy is off by 0.01, more than 0.0001" in said
    assert "left out episode 4, step 3: actual_xy is off by 0.04" in said
    assert "left out episode 7: a person pushed a body, which no action repeats" in said
    assert "9 of 12 episodes in" in said
    seeds = [episode.seed for episode in EpisodeStore.open(tmp_path / "out.zarr").episodes()]
    assert seeds == [seed for seed in range(12) if seed not in (1, 4, 7)]
    assert Render(str(path), tmp_path / "more.zarr", size=SIZE, workers=1, tolerance=0.02).run() == 10


def test_where_no_episode_comes_out_again_there_is_no_store(demonstrations: Path, tmp_path: Path) -> None:
    def spoil(_: int, episode: Demonstration) -> Demonstration:
        return episode._replace(data=episode.data | {"actual_xy": episode.data["actual_xy"] + 1})

    path = changed(demonstrations, tmp_path / "spoilt.zarr", spoil)
    with pytest.raises(ConfigError, match=r"no episode of .* goes as it was recorded: episode 0, step 0: actual_xy is"):
        Render(str(path), tmp_path / "out.zarr", size=SIZE, workers=1).run()
    assert [one.name for one in tmp_path.iterdir()] == ["spoilt.zarr"]


@needs_push_t
def test_push_t_is_drawn_from_its_states_without_seeds(tmp_path: Path) -> None:
    with_images = record(tmp_path / "seen.zarr", PUSH_T, range(3), image_size=SIZE)
    attributes = {"observation_keys": ["state"], "action_key": "action"}

    def blind(_: int, episode: Demonstration) -> Demonstration:
        pushed = np.ones((len(episode.data["action"]), 1), np.uint8)
        data = {"state": episode.data["state"], "action": episode.data["action"], PUSHED: pushed}
        return Demonstration(data, final={"state": episode.final["state"]})

    path = changed(with_images, tmp_path / "blind.zarr", blind, attributes)
    assert dp.render_dataset(path, tmp_path / "drawn.zarr", env=PUSH_T, size=SIZE, workers=1) == 3
    drawn = list(EpisodeStore.open(tmp_path / "drawn.zarr").episodes())
    for one, other in zip(EpisodeStore.open(with_images).episodes(), drawn, strict=True):
        np.testing.assert_array_equal(one.data["image"], other.data["image"])
        np.testing.assert_array_equal(one.final["image"], other.final["image"])
        np.testing.assert_array_equal(one.data["state"], other.data["state"])
        assert other.data[PUSHED].all()


def test_other_environments_are_drawn_by_their_own_render(tmp_path: Path) -> None:
    pytest.importorskip("pygame")
    path = record(tmp_path / "car.zarr", "MountainCarContinuous-v0", range(2))
    options = {"key": ("picture",), "size": 24, "workers": 1}
    assert dp.render_dataset(path, tmp_path / "out.zarr", **options) == 2
    store = EpisodeStore.open(tmp_path / "out.zarr")
    assert store.shape("picture") == (24, 24, 3)
    environment = store.attributes["environment"]
    drawn = {"entry_point": "diffusion_policy.envs.images:RenderedImage", "kwargs": {"size": 24, "key": "picture"}}
    assert environment["wrappers"] == [drawn]
    assert main(["dataset", "replay", str(tmp_path / "out.zarr")]) == 0


def test_what_cannot_be_drawn_is_refused_before_anything_is(demonstrations: Path, tmp_path: Path) -> None:
    target, source = tmp_path / "out.zarr", str(demonstrations)
    wrong = {
        ("actual_xy",): "holds actual_xy already; choose another --key",
        ("depth",): "Avoid-v0 gives no depth; it gives actual_xy, desired_xy, image",
        (): "key must name each image to add once; got nothing",
        ("image", "image"): "key must name each image to add once; got image image",
    }
    for key, said in wrong.items():
        with pytest.raises(ConfigError, match=said):
            Render(source, target, key=key, size=SIZE, workers=1).run()
    with pytest.raises(ValueError, match="image_size must be a whole number of 8 to 512, or 0; got 4"):
        Render(source, target, size=4, workers=1).run()
    with pytest.raises(ConfigError, match="size must be at least 1"):
        Render(source, target, size=0)
    with pytest.raises(ValueError, match="already exists"):
        Render(source, demonstrations, size=SIZE, workers=1).run()
    nameless = changed(demonstrations, tmp_path / "nameless.zarr", lambda _, one: one, {"observation_keys": []})
    with pytest.raises(ConfigError, match="names no environment; give one with --env"):
        Render(str(nameless), target, size=SIZE, workers=1).run()
    seedless = changed(demonstrations, tmp_path / "seedless.zarr", lambda _, one: one._replace(seed=None))
    with pytest.raises(ConfigError, match="does not say the seeds of its episodes"):
        Render(str(seedless), target, size=SIZE, workers=1).run()
    car = record(tmp_path / "car.zarr", "MountainCarContinuous-v0", range(1))
    with pytest.raises(ConfigError, match="draws one picture; got the keys image, wrist_image"):
        Render(str(car), target, key=("image", "wrist_image"), size=SIZE, workers=1).run()
    assert not target.exists()
