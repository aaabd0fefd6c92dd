"""An image beside what any environment observes, and that it is kept where the environment is."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest

from diffusion_policy.commands.collect import Collect
from diffusion_policy.commands.dataset.replay import run as replay
from diffusion_policy.commands.options.dataset import Replay
from diffusion_policy.config import ConfigError, SuccessAndModes
from diffusion_policy.datasets.recorder import Recorder
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs.adapters import EnvSpec
from diffusion_policy.envs.images import RenderedImage
from diffusion_policy.envs.protocols import as_choosing, as_drawable, as_foreseeing, as_multimodal, as_pictured
from diffusion_policy.envs.spaces import EnvSpecError
from diffusion_policy.envs.wrappers import describe_env, foreign, lost

AVOID = "diffusion_policy/Avoid-v0"
KWARGS = {"size": 16, "key": "image"}
WRITTEN = {"entry_point": "diffusion_policy.envs.images:RenderedImage", "kwargs": KWARGS}


class Striped(gymnasium.Env):
    """Draws a picture whose left half is of one colour, whose right half is of another; observes what it is told."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode="rgb_array", space=None, picture=None):
        self.render_mode = render_mode
        self.observation_space = space or gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self.picture = picture
        self.drawn = 0

    def reset(self, *, seed=None, options=None):
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {"is_success": False}

    def render(self):
        self.drawn += 1
        if isinstance(self.picture, Exception):
            raise self.picture
        if self.picture is not None:
            return self.picture
        picture = np.zeros((40, 60, 3), np.uint8)
        picture[:, :30], picture[:, 30:] = (200, 0, 0), (0, 100, 0)
        return picture


def test_the_picture_is_reduced_by_area_and_squeezed_into_a_square() -> None:
    env = RenderedImage(Striped(), 9, "view")
    observation, _ = env.reset(seed=0)
    assert observation.keys() == {"observation", "view"}
    assert env.observation_space.contains(observation)
    view = observation["view"]
    np.testing.assert_array_equal(view[:, :4], np.broadcast_to([200, 0, 0], (9, 4, 3)))
    np.testing.assert_array_equal(view[:, 5:], np.broadcast_to([0, 100, 0], (9, 4, 3)))
    np.testing.assert_array_equal(view[:, 4], np.broadcast_to([100, 50, 0], (9, 3)))
    np.testing.assert_array_equal(env.step(np.zeros(1, np.float32))[0]["view"], view)


def test_what_is_observed_keeps_its_names_and_numbers() -> None:
    space = gymnasium.spaces.Dict({
        "camera": gymnasium.spaces.Dict({"depth": gymnasium.spaces.Box(0, 1, (3,), np.float64)}),
        "phase": gymnasium.spaces.Discrete(3),
    })  # fmt: skip
    plain, seen = Striped(space=space), RenderedImage(Striped(space=space), 8)
    first, observed = plain.reset(seed=4)[0], seen.reset(seed=4)[0]
    assert observed.keys() == {"camera.depth", "phase", "image"}
    np.testing.assert_array_equal(observed["camera.depth"], first["camera"]["depth"])
    assert observed["phase"].tolist() == np.eye(3)[first["phase"]].tolist()


def test_nothing_is_drawn_while_nobody_looks() -> None:
    env = RenderedImage(Striped(), 8)
    env.looking = False
    assert not env.reset(seed=0)[0]["image"].any()
    assert env.unwrapped.drawn == 0


@pytest.mark.parametrize("arguments, said", [
    (({"render_mode": None}, 8), r"must be made with render_mode 'rgb_array' to give an image; got None; it knows"),
    (({}, 8, "observation"), "observes 'observation' itself; call the image of its pictures otherwise"),
    (({}, 0), "an image of Striped needs a size; got 0"),
    (({}, 4), "image_size must be a whole number of 8 to 512, or 0; got 4"),
])  # fmt: skip
def test_what_cannot_give_an_image_is_refused(arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RenderedImage(Striped(**arguments[0]), *arguments[1:])


@pytest.mark.parametrize("picture, said", [
    (np.zeros((4, 4), np.uint8), r"must give a picture \(height, width, 3\) of uint8; got uint8 of shape \(4, 4\)"),
    (np.zeros((4, 4, 3)), r"got float64 of shape \(4, 4, 3\)"),
    (OSError("no GPU"), "Striped cannot draw itself: OSError: no GPU"),
])  # fmt: skip
def test_a_picture_that_is_none_is_named(picture: object, said: str) -> None:
    with pytest.raises(EnvSpecError, match=said):
        RenderedImage(Striped(picture=picture), 8).reset(seed=0)


def test_it_is_written_and_made_again() -> None:
    pytest.importorskip("pygame")
    env = RenderedImage(gymnasium.make("Pendulum-v1", render_mode="rgb_array"), 16)
    described = describe_env(env)
    assert described == {"id": "Pendulum-v1", "arguments": {"render_mode": "rgb_array"}, "wrappers": [WRITTEN]}
    assert (lost(described["wrappers"]), foreign(described["wrappers"])) == ([], [])
    again = EnvSpec("Pendulum-v1", described["arguments"], "none", wrappers=(WRITTEN,))()
    for one, other in ((env.reset(seed=3)[0], again.reset(seed=3)[0]),):
        assert one.keys() == other.keys() == {"observation", "image"}
        np.testing.assert_array_equal(one["image"], other["image"])
        assert one["image"].std() > 10
    env.close()
    again.close()


def test_a_recorder_keeps_it(tmp_path: Path) -> None:
    pytest.importorskip("pygame")
    limited = gymnasium.make("Pendulum-v1", render_mode="rgb_array", max_episode_steps=4)
    with Recorder(RenderedImage(limited, 16), tmp_path / "swing.zarr") as env:
        env.reset(seed=1)
        for _ in range(4):
            env.step(np.array([0.5], np.float32))
    store = EpisodeStore.open(tmp_path / "swing.zarr")
    assert (store.shape("image"), store.dtype("image")) == ((16, 16, 3), np.uint8)
    assert replay(Replay(str(tmp_path / "swing.zarr"))) == {"image": 0.0, "observation": 0.0}


def test_a_task_whose_observation_is_only_added_to_keeps_modes_and_drawing() -> None:
    env = RenderedImage(gymnasium.make(AVOID, render_mode="rgb_array"), 16, "picture")
    task = env.unwrapped
    for find in (as_multimodal, as_drawable, as_pictured, as_choosing, as_foreseeing):
        assert find(env) is task
    less = gymnasium.wrappers.FilterObservation(env, ["actual_xy", "picture"])
    for find in (as_multimodal, as_drawable, as_choosing):
        assert find(less) is None
    env.close()


# From the command line


def collect(path: Path, env: str, **options: object) -> EpisodeStore:
    Collect(path, env=env, episodes=1, workers=1, **options).run()
    return EpisodeStore.open(path)


def test_a_collection_with_images_goes_on_with_them(tmp_path: Path) -> None:
    pytest.importorskip("pygame")
    expert = "diffusion_policy.envs.examples:MountainCarExpert"
    path = tmp_path / "car.zarr"
    signals = SuccessAndModes("return>=90", "diffusion_policy.envs.examples:mountain_car_mode", ("left", "right"))
    car = {"expert": expert, "signals": signals, "noise": 0.1}
    store = collect(path, "MountainCarContinuous-v0", image_size=16, **car)
    assert store.attributes["environment"]["wrappers"] == [WRITTEN]
    assert store.shape("image") == (16, 16, 3)
    Collect(resume=path, expert=expert, episodes=2, workers=1).run()
    assert len(EpisodeStore.open(path).episode_ends) == 2
    with pytest.raises(ConfigError, match="--image-size is for --output; a collection goes on with the images it was"):
        Collect(resume=path, image_size=16)


def test_for_our_tasks_the_flag_is_their_argument(tmp_path: Path) -> None:
    environment = collect(tmp_path / "a.zarr", AVOID, image_size=16, noise=0.2).attributes["environment"]
    assert environment == {"id": AVOID, "arguments": {"image_size": 16}}
