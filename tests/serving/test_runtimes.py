"""What runs a graph: onnxruntime, and OpenVINO where it is installed, from the same bytes."""

import importlib.util
import sys
import threading

import numpy as np
import pytest
import torch

from diffusion_policy.config import ConfigError
from diffusion_policy.serving import exported
from diffusion_policy.serving.export import draw_observations
from diffusion_policy.serving.plan_folder import ExportedError
from diffusion_policy.serving.runtimes import RUNTIMES, open_graph

RNG = np.random.default_rng(0)
HERE = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"no {name}"))
    for name in RUNTIMES
]


@pytest.mark.parametrize("runtime", HERE)
@pytest.mark.parametrize("form", ["loop", "network"])
def test_a_folder_acts_the_same_in_every_runtime(plain, request, runtime, form: str) -> None:
    loaded = exported.load(request.getfixturevalue(f"{form}_folder"), 1, runtime)
    observations = draw_observations(plain.policy, 2, RNG)
    noise = plain.policy.draw_noise([RNG] * 2, 1, plain.sampling)
    tensors = {key: torch.from_numpy(rows) for key, rows in observations.items()}
    expected = plain.policy.sample_from(tensors, noise, plain.sampling)[:, :, 1:]
    np.testing.assert_allclose(loaded.planner.sample(observations, noise), expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runtime", HERE)
def test_a_transformer_acts_the_same_in_every_runtime(transformer, write, runtime) -> None:
    policy, sampling, _ = transformer
    loaded = exported.load(write(transformer), 1, runtime)
    observations, noise = draw_observations(policy, 3, RNG), policy.draw_noise([RNG] * 3, 3, sampling)
    tensors = {key: torch.from_numpy(rows) for key, rows in observations.items()}
    expected = policy.sample_from(tensors, noise, sampling)[:, :, 1:].numpy()
    np.testing.assert_allclose(loaded.planner.sample(observations, noise), expected, rtol=1e-4, atol=1e-4)
    other = policy.sample_from({key: rows + 1 for key, rows in tensors.items()}, noise, sampling)[:, :, 1:].numpy()
    assert np.abs(other - expected).max() > 0.01  # it does look at what it observes


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="no openvino")
def test_bf16_is_near_where_the_runtime_has_it(plain, loop_folder) -> None:
    planners = [exported.load(loop_folder, 1, "openvino", name).planner for name in ("fp32", "bf16")]
    observations = draw_observations(plain.policy, 1, RNG)
    noise = plain.policy.draw_noise([RNG], 1, plain.sampling)
    plain_plan, half = (planner.sample(observations, noise) for planner in planners)
    assert np.abs(plain_plan - half).max() < 0.3  # exactly the same where the processor has no bf16


def test_onnxruntime_computes_as_the_graph_says(loop_folder) -> None:
    with pytest.raises(ConfigError, match="the precision bf16 is for openvino"):
        exported.load(loop_folder, 1, "onnxruntime", "bf16")


@pytest.mark.parametrize("runtime", HERE)
@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x0a" * 50])
def test_what_is_no_graph_is_refused_in_a_line(runtime, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportedError, match=f"^here: {runtime} cannot read the graph: ") as info:
        open_graph(content, runtime, 1, "fp32", "here")
    assert "\n" not in str(info.value)
    said = capfd.readouterr()
    assert said.out + said.err == ""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_that_is_missing_is_named(runtime, loop_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, runtime, None)
    with pytest.raises(
        ImportError, match=rf"this needs {runtime}: pip install {runtime}, or 'diffusion-policy-toolkit"
    ):
        exported.load(loop_folder, 1, runtime)


@pytest.mark.parametrize("runtime", HERE)
def test_threads_that_plan_at_once_do_not_mix(plain, loop_folder, runtime) -> None:
    planner = exported.load(loop_folder, 1, runtime).planner
    observations = [draw_observations(plain.policy, 1, RNG) for _ in range(4)]
    noise = [plain.policy.draw_noise([RNG], 1, plain.sampling) for _ in range(4)]
    expected = [planner.sample(*one) for one in zip(observations, noise, strict=True)]
    found: dict[int, list[np.ndarray]] = {}

    def plan(i: int) -> None:
        found[i] = [planner.sample(observations[i], noise[i]) for _ in range(20)]

    threads = [threading.Thread(target=plan, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, one in enumerate(expected):
        for plans in found[i]:
            np.testing.assert_allclose(plans, one, rtol=1e-6, atol=1e-6)
