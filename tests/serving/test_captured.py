"""A captured CUDA graph against sampling operator by operator. Without a GPU a stand-in records and replays."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion_policy.config import ConfigError, SampleConfig
from diffusion_policy.control.latency import time_plans
from diffusion_policy.control.policy_planner import EagerSampling, PolicyPlanner
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.serving.backends import make_planner
from diffusion_policy.serving.captured import CapturedSampling
from diffusion_policy.serving.export import draw_observations

SAMPLINGS = [
    SampleConfig("ddim", 3),
    SampleConfig("ddpm", 3),
    SampleConfig("heun", 3, corrector_steps=1),
    SampleConfig("dpm-solver-2m", 4, spacing="log-snr"),
]
DYNAMIC = SampleConfig("unipc", 3, clip="dynamic")


class Graph(TorchDispatchMode):
    """Stands in for a CUDA graph: it records operators with their tensors, and runs them again into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_leaves(found)))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, found in self.calls:
            for before, now in zip(found, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(before, Tensor):
                    before.copy_(now)


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs that were captured, on the CPU."""
    graphs: list[Graph] = []

    def capture() -> Graph:
        graphs.append(Graph())
        return graphs[-1]

    for name, stand_in in (
        ("CUDAGraph", capture),
        ("graph", lambda graph: graph),
        ("Stream", lambda device: Stream()),
        ("current_stream", lambda device: Stream()),
        ("stream", lambda stream: contextlib.nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return graphs


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch, recorded: list[Graph]) -> Callable[..., CapturedSampling]:
    """Makes one that takes the CPU for a GPU."""

    def make(policy: DiffusionPolicy, *options: Any) -> CapturedSampling:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DiffusionPolicy, "device", torch.device("cuda"))
            return CapturedSampling(policy, *options)

    return make


def draw(policy: DiffusionPolicy, sampling: SampleConfig, rows: int, seed: int) -> tuple[dict[str, Tensor], np.ndarray]:
    rng = np.random.default_rng(seed)
    observations = {key: torch.from_numpy(one) for key, one in draw_observations(policy, rows, rng).items()}
    return observations, policy.draw_noise([rng] * rows, 2, sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda sampling: sampling.sampler)
def test_a_recorded_graph_reads_all_its_inputs_from_its_buffers(plain, capture, recorded, sampling) -> None:
    sample = capture(plain.policy, sampling)
    eager = EagerSampling(plain.policy, sampling, few_rows=False)
    for rows in (1, 3):
        plans = []
        for seed in range(3):
            observations, noise = draw(plain.policy, sampling, rows, seed)
            expected = eager(observations, noise)
            plans.append(sample({key: one.clone() for key, one in observations.items()}, noise.copy()).clone())
            torch.testing.assert_close(plans[-1], expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(plans[0], plans[1])
    assert [graph.replays for graph in recorded] == [3, 3]  # one graph for each number of rows


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_transformer_is_captured_too(transformer, capture, precision: str) -> None:
    policy, sampling, _ = transformer
    sample, eager = capture(policy, sampling, precision), EagerSampling(policy, sampling, precision)
    for seed in range(2):
        observations, noise = draw(policy, sampling, 2, seed)
        found = sample({key: one.clone() for key, one in observations.items()}, noise.copy())
        torch.testing.assert_close(found, eager(observations, noise), rtol=1e-5, atol=1e-5)


def test_a_graph_in_bf16_is_near(plain, capture) -> None:
    sampling = plain.sampling
    sample = capture(plain.policy, sampling, "bf16")
    expected = EagerSampling(plain.policy, sampling, "bf16")
    for seed in range(2):
        observations, noise = draw(plain.policy, sampling, 2, seed)
        found = sample({key: one.clone() for key, one in observations.items()}, noise.copy())
        torch.testing.assert_close(found, expected(observations, noise), rtol=1e-5, atol=1e-5)


def test_observations_that_are_not_finite_are_refused_before_they_are_sent(plain, capture, recorded) -> None:
    sample = capture(plain.policy, plain.sampling)
    observations, noise = draw(plain.policy, plain.sampling, 1, 0)
    observations["noise"][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="the observation noise holds NaN or infinity"):
        sample(observations, noise)
    assert recorded == []


def test_observations_of_other_shapes_are_refused_before_the_capture(plain, capture, recorded) -> None:
    sample = capture(plain.policy, plain.sampling)
    observations, noise = draw(plain.policy, plain.sampling, 1, 0)
    with pytest.raises(ValueError, match=r"the policy observes .* got"):
        sample(observations | {"noise": torch.zeros(1, 2, 4)}, noise)
    assert recorded == []


def test_a_policy_on_the_cpu_has_no_cuda_graph(plain) -> None:
    with pytest.raises(ConfigError, match="--backend graph captures a CUDA graph; this policy is on cpu"):
        CapturedSampling(plain.policy, plain.sampling)


# On a GPU


@pytest.fixture
def on_gpu(plain) -> Iterator[DiffusionPolicy]:
    yield plain.policy.cuda()
    plain.policy.cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [*SAMPLINGS, DYNAMIC], ids=lambda sampling: sampling.sampler)
def test_a_captured_graph_gives_what_eager_gives(on_gpu: DiffusionPolicy, sampling: SampleConfig) -> None:
    sample, eager = CapturedSampling(on_gpu, sampling), EagerSampling(on_gpu, sampling)
    for rows in (1, 3, 1):
        plans = []
        for seed in range(3):
            observations, noise = draw(on_gpu, sampling, rows, seed)
            sent = {key: one.cuda() for key, one in observations.items()}
            plans.append(sample(observations, noise))
            torch.testing.assert_close(plans[-1], eager(sent, noise).cpu(), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(plans[0], plans[1])
    assert len(sample._graphs) == 2  # one for each number of rows


@pytest.mark.gpu
def test_bf16_is_near_fp32(on_gpu: DiffusionPolicy, plain) -> None:
    observations, noise = draw(on_gpu, plain.sampling, 4, 0)
    plans = [CapturedSampling(on_gpu, plain.sampling, name)(observations, noise) for name in ("fp32", "bf16")]
    normalized = [on_gpu.normalizer.normalize("action", plan.cuda()) for plan in plans]
    assert 0 < (normalized[0] - normalized[1]).abs().median() < 0.05


@pytest.mark.gpu
def test_auto_is_one_graph_and_a_planner_like_any_other(on_gpu: DiffusionPolicy, plain) -> None:
    planner = make_planner(on_gpu, plain.sampling, "auto")
    assert isinstance(planner, PolicyPlanner)
    assert len(time_plans(planner, 1, 3)) == 3
    observations, noise = draw(on_gpu, plain.sampling, 2, 0)
    rows = {key: one.numpy() for key, one in observations.items()}
    found = planner.sample(rows, noise)  # before the weights, which the graph reads, leave their place
    expected = make_planner(plain.policy.cpu(), plain.sampling, "eager").sample(rows, noise)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_memory_is_flat_over_many_plans(on_gpu: DiffusionPolicy, plain) -> None:
    sample = CapturedSampling(on_gpu, plain.sampling)
    observations, noise = draw(on_gpu, plain.sampling, 1, 0)
    sample(observations, noise)
    before = torch.cuda.memory_allocated()
    for _ in range(200):
        sample(observations, noise)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch.compile
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_network_is_captured_too(on_gpu: DiffusionPolicy, plain, precision: str) -> None:
    planners = [make_planner(on_gpu, plain.sampling, name, precision=precision) for name in ("graph", "compile")]
    for seed in range(2):
        observations, noise = draw(on_gpu, plain.sampling, 2, seed)
        rows = {key: one.numpy() for key, one in observations.items()}
        plans = [planner.sample(rows, noise) for planner in planners]
        difference = np.abs(plans[0] - plans[1])
        assert difference.max() < 1e-3 if precision == "fp32" else np.median(difference) < 0.05
