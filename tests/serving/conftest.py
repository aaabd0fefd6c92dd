"""Policies that are exported, small, and their folders: torch's exporter takes seconds for each."""

import dataclasses
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from diffusion_policy.config import ChunkingConfig, PolicyConfig, SampleConfig, TransformerConfig, with_options
from diffusion_policy.control.planner import Steering
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.serving.export import Exporting, export
from diffusion_policy.serving.plan_folder import PLAN, record
from diffusion_policy.serving.protocol import Served

SMALL = with_options(PolicyConfig(), widths=(8, 16), level_dim=16, prediction_horizon=8, action_horizon=4)


class Exported(NamedTuple):
    """A policy, and how it is exported."""

    policy: DiffusionPolicy
    sampling: SampleConfig
    exporting: Exporting


@pytest.fixture(scope="session", autouse=True)
def _fast(graphs_made_once: None) -> None:
    """All tests here."""


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., DiffusionPolicy]:
    """Makes an untrained policy; its keys are called like parts of the graph."""

    def make(config: PolicyConfig = SMALL, seed: int = 0, **options: Any) -> DiffusionPolicy:
        rng = np.random.default_rng(seed)
        data = {
            "noise": rng.normal(2, 3, (60, 3)),
            "actions": rng.normal(size=(60, 2, 2)),
            "films/Ort der Füße": rng.normal(size=(60, 1)),
            "action": rng.uniform([-3, 5], [3, 9], (60, 2)),
        }
        torch.manual_seed(seed)
        policy = DiffusionPolicy.for_data(dataclasses.replace(config), data, ("left", "right"), **options)
        return policy.eval()

    return make


@pytest.fixture(scope="session")
def plain(make_policy: Callable[..., DiffusionPolicy]) -> Exported:
    """With angles among its columns, for one robot."""
    config = with_options(SMALL, prediction="sample", widths=(8,))
    policy = make_policy(config, angles={"noise": (1,), "action": (0,)})
    return Exported(policy, SampleConfig(sampling_steps=3), Exporting())


@pytest.fixture(scope="session", params=[pytest.param("adaln", marks=pytest.mark.slow), "cross-attention"])
def transformer(request: pytest.FixtureRequest, make_policy: Callable[..., DiffusionPolicy], stir: Any) -> Exported:
    """A transformer over seven steps, told the observations in either way, and guided; three sequences for each of two
    robots."""
    network = TransformerConfig(width=16, layers=2, heads=2, conditioning=request.param, level_dim=16)
    config = PolicyConfig(2, 7, 4, network, prediction="sample", condition_dropout=0.1)
    return Exported(
        stir(make_policy(config)), SampleConfig(sampling_steps=3, guidance=0.5, clip="none"), Exporting(2, 3)
    )


@pytest.fixture(scope="session")
def guided(make_policy: Callable[..., DiffusionPolicy]) -> Exported:
    """Guided to a mode, unclipped, with a learned variance; three sequences for each of two robots, in float32."""
    options = {"prediction": "velocity", "normalization": "moments", "learn_variance": True}
    config = with_options(SMALL, widths=(8,), condition_on_mode=True, condition_dropout=0.1, **options)
    sampling = SampleConfig("heun", 3, guidance=0.7, guidance_schedule="falling", mode="left", corrector_steps=1)
    return Exported(make_policy(config), sampling, Exporting(2, 3, dtype="float32"))


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports into a new folder."""

    def write(one: Exported, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("exported") / "policy"
        export(one.policy, folder, one.sampling, one.exporting._replace(**options), tolerance=10.0)
        return folder

    return write


@pytest.fixture(scope="session")
def loop_folder(plain: Exported, write: Callable[..., Path]) -> Path:
    return write(plain)


@pytest.fixture(scope="session")
def network_folder(plain: Exported, write: Callable[..., Path]) -> Path:
    return write(plain, form="network")


@pytest.fixture(scope="session")
def seal() -> Callable[..., None]:
    """Has plan.json tell the truth about files that were changed, and say something else where that is given."""

    def seal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
        tree = json.loads((folder / PLAN).read_text())
        files = {name: (folder / name).read_bytes() for name in tree["files"] if (folder / name).exists()}
        tree["files"] |= {name: dataclasses.asdict(one) for name, one in record(files).items()}
        change(tree)
        (folder / PLAN).write_text(json.dumps(tree))

    return seal


class ArithmeticPlanner:
    """Plans by a few operations on rows, so that a test knows what must come out; it remembers its calls, and waits
    where it is told to."""

    observation_horizon, steps, action_horizon = 2, 6, 3
    observation_shapes: dict[str, tuple[int, ...]] = {"xy": (2,), "speed": (1,)}  # noqa: RUF012
    action_shape, noise_shape = (2,), (1, 7, 2)
    guides, longest_prefix = True, 2

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        """(B, N) of each."""
        self.may_go = threading.Event()
        self.may_go.set()

    def sample(
        self, observations: Mapping[str, np.ndarray], noise: np.ndarray, steering: Steering | None = None
    ) -> np.ndarray:
        self.may_go.wait(30)
        self.calls.append(noise.shape[:2])
        xy, speed = observations["xy"], observations["speed"]
        assert xy.shape == (len(noise), 2, 2)
        if (xy == 13).any():
            raise ArithmeticError("thirteen")
        now, motion = xy[:, -1], xy[:, -1] - xy[:, 0]
        steps = np.arange(self.steps)[:, None]
        plans = now[:, None, None] + motion[:, None, None] * steps + 0.01 * noise[:, :, 0, 1:]
        if steering is not None:
            actions, weights = steering.filled()
            plans = plans + (actions * weights[..., None])[:, None] * (steering.strength or 1.0) * steering.deviation
        return plans + speed[:, -1, None, None]


@pytest.fixture
def arithmetic() -> ArithmeticPlanner:
    return ArithmeticPlanner()


@pytest.fixture(scope="session")
def served() -> Served:
    """What a server says of `arithmetic`."""
    one = ArithmeticPlanner
    return Served(
        observation_horizon=one.observation_horizon,
        steps=one.steps,
        action_horizon=one.action_horizon,
        observation_shapes=one.observation_shapes,
        action_shape=one.action_shape,
        noise_shape=one.noise_shape,
        guides=one.guides,
        longest_prefix=one.longest_prefix,
        sampling=SampleConfig(sampling_steps=3),
        chunking=ChunkingConfig(),
        backend="onnx",
        precision="fp32",
        threads=2,
        angles={"action": (1,)},
        environment="Here-v0",
        control_rate=10.0,
        weights_sha256="0" * 64,
        max_batch=4,
        max_frame_bytes=100_000,
    )
