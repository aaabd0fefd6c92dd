"""Real miniatures that several tests share: demonstrations from the simulator, and a checkpoint trained on them."""

import signal
from functools import partial
from pathlib import Path

import hypothesis
import pytest

from diffusion_policy import envs
from diffusion_policy.commands.collect import Collect
from diffusion_policy.commands.train import Train
from diffusion_policy.config import PolicyConfig, TrainConfig
from diffusion_policy.datasets.store import EpisodeStore

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as after `make test &`: the commands under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("ours", deadline=None)  # a first call may import and compile
hypothesis.settings.load_profile("ours")

AVOID = "diffusion_policy/Avoid-v0"
TINY = PolicyConfig(widths=(16, 32), level_dim=32, levels=20)


@pytest.fixture(scope="session")
def make_env() -> partial:
    """A factory of the smallest task, two modes."""
    return partial(envs.make, AVOID, rows=1)


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve expert episodes of the smallest task."""
    path = tmp_path_factory.mktemp("data") / "demonstrations.zarr"
    Collect(path, env_kwargs='{"rows": 1}', episodes=12, workers=1).run()
    return path


@pytest.fixture(scope="session")
def store(demonstrations: Path) -> EpisodeStore:
    return EpisodeStore.open(demonstrations)


@pytest.fixture(scope="session")
def run(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of 30 steps."""
    folder = tmp_path_factory.mktemp("runs") / "policy"
    training = TrainConfig(steps=30, batch_size=64, learning_rate=1e-3, warmup_steps=5, validate_every=10)
    Train(str(demonstrations), folder, policy=TINY, training=training, device="cpu").run()
    return folder
