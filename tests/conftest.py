"""Real miniatures that several tests share: demonstrations from the simulator, and a checkpoint trained on them."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_policy import envs
from diffusion_policy.checkpoints.safe_files import describe
from diffusion_policy.commands.collect import Collect
from diffusion_policy.commands.train import Train
from diffusion_policy.config import PolicyConfig, TrainConfig, with_options
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.report import page

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as after `make test &`: the commands under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("ours", deadline=None)  # a first call may import and compile
hypothesis.settings.load_profile("ours")

AVOID = "diffusion_policy/Avoid-v0"
TINY = with_options(PolicyConfig(), widths=(16, 32), level_dim=32, noise_levels=20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of which many are long come first, so that no process of several is left with one at the end; what is
    marked `gpu` is skipped without one."""
    items.sort(key=lambda item: item.path.parent.name not in ("tests", "training"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def never_waiting() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which an operation that waits for the GPU raises RuntimeError."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context


@pytest.fixture(scope="session")
def stir() -> Callable[[DiffusionPolicy], DiffusionPolicy]:
    """Gives weights to a new transformer where it has zeros, by which its plans depend on nothing but noise."""

    def stir(policy: DiffusionPolicy) -> DiffusionPolicy:
        generator = torch.Generator().manual_seed(0)
        for weight in policy.network.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.2, generator=generator)
        return policy

    return stir


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
    training = TrainConfig(steps=30, batch_size=64, learning_rate=1e-3, warmup_steps=5, validate_every=30)
    Train(str(demonstrations), folder, policy=TINY, training=training, device="cpu").run()
    return folder


@pytest.fixture(scope="module")
def blank_pictures() -> Iterator[None]:
    """Pages hold empty pictures: drawing them takes longest of an evaluation in miniature."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "to_png", lambda _: b"")
        yield


@pytest.fixture(scope="session")
def make_version_3() -> Callable[[Path], None]:
    """Makes a checkpoint what the package wrote before its network had options of their own."""

    def make(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        policy, training = config["policy"], config["training"]
        del config["dataset"]["control_rate"]
        policy["levels"] = policy.pop("noise_levels")
        policy |= {name: value for name, value in policy.pop("network").items() if name != "kind"}
        del policy["encoder"]
        for today, before in (("ema_power", "average_power"), ("ema_max_decay", "average_limit")):
            training[before] = training.pop(today)
        training["keep"] = training.pop("keep_checkpoints")
        file.write_text(json.dumps(config | {"format_version": 3}))

    return make


@pytest.fixture(scope="session")
def make_version_2(make_version_3: Callable[[Path], None]) -> Callable[[Path], None]:
    """Makes a checkpoint what the package wrote before it normalized in double precision."""

    def make(folder: Path) -> None:
        make_version_3(folder)
        file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
        weights = load_file(file)
        save_file({n: value.float() if n.startswith("normalizer.") else value for n, value in weights.items()}, file)
        config["files"][file.name] = dataclasses.asdict(describe(file))
        del config["environment"]["wrappers"]
        config["dataset"]["statistics"] = {"pose": {"rows": 30, "std": [1.0, 1.0, 0.5]}}
        (folder / "config.json").write_text(json.dumps(config | {"format_version": 2}))

    return make


@pytest.fixture(scope="session")
def graphs_made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """torch's exporter takes seconds a policy: what it wrote in this run of tests is taken again, in all processes."""
    import onnx
    from torch.onnx._internal.exporter import _registration

    from diffusion_policy.serving import export

    folder, make_graphs = tmp_path_factory.getbasetemp(), export.make_graphs
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def remember(policy, sampling, *options):
        digest = hashlib.sha256(repr((policy.config, policy.shapes, policy.modes, sampling, options)).encode())
        for value in policy.state_dict().values():
            digest.update(value.numpy().tobytes())
        file = folder / f"{digest.hexdigest()}.npz"
        with open(file.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                *models, of_noise, of_x0 = make_graphs(policy, sampling, *options)
                written = [np.frombuffer(model.SerializeToString(), np.uint8) for model in models]
                np.savez(file, *written, of_noise, of_x0)
        *written, of_noise, of_x0 = np.load(file).values()
        models = [onnx.load_from_string(one.tobytes()) for one in written]
        return export.Graphs(*models, of_noise, of_x0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "make_graphs", remember)
        operators = functools.cache(_registration.ONNXRegistry.from_torchlib)  # a second for each graph
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(operators))
        yield
