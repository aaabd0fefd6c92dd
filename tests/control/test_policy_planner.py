"""What samples the plans of a policy."""

import numpy as np
import pytest
import torch

from diffusion_policy.config import PolicyConfig, SampleConfig, with_options
from diffusion_policy.control.planner import Planner
from diffusion_policy.control.policy_planner import FEW_STEPS, EagerSampling, PolicyPlanner, half_precision
from diffusion_policy.networks.unet_rows import RowsUnet
from diffusion_policy.policy import DiffusionPolicy

SAMPLING = SampleConfig("ddim", 4)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicy:
    torch.manual_seed(0)
    config = with_options(PolicyConfig(), widths=(8, 16), level_dim=16, prediction="sample", observation_horizon=3)
    data = {"state": RNG.normal(2, 3, (60, 4)), "action": RNG.uniform(5, 9, (60, 2))}
    return DiffusionPolicy.for_data(config, data).eval()


def observe(rows: int) -> dict[str, np.ndarray]:
    return {"state": RNG.normal(2, 3, (rows, 3, 4))}


def draw(rows: int, samples: int = 1) -> np.ndarray:
    return RNG.standard_normal((rows, samples, 1, 16, 2), np.float32)


def test_it_promises_what_a_planner_does(policy: DiffusionPolicy) -> None:
    planner: Planner = PolicyPlanner(policy, SAMPLING)
    assert (planner.observation_horizon, planner.steps, planner.action_horizon) == (3, 14, 8)
    assert (planner.observation_shapes, planner.action_shape) == ({"state": (4,)}, (2,))
    assert planner.noise_shape == (1, 16, 2)
    assert PolicyPlanner(policy, SampleConfig("ddpm", 4)).noise_shape == (5, 16, 2)
    assert (planner.guides, planner.longest_prefix) == (True, 0)
    plans = planner.sample(observe(2), draw(2, 3))
    assert (plans.shape, plans.dtype) == ((2, 3, 14, 2), np.float64)
    with pytest.raises(ValueError, match="sampling steps must be from 1 to the 100 noise levels"):
        PolicyPlanner(policy, SampleConfig(sampling_steps=101))


def test_a_plan_is_what_the_policy_samples_from_now_on(policy: DiffusionPolicy) -> None:
    observations, noise = observe(3), draw(3, 5)
    expected = policy.sample_from({"state": torch.from_numpy(observations["state"])}, noise, SAMPLING)
    planner = PolicyPlanner(policy, SAMPLING)
    found = planner.sample(observations, noise)
    assert found.shape == (3, 5, 14, 2)
    np.testing.assert_allclose(found, expected[:, :, 2:].numpy(), rtol=1e-5, atol=1e-5)
    first = planner.sample(observations, np.ascontiguousarray(noise[:, :1]))
    np.testing.assert_allclose(first, found[:, :1], rtol=1e-5, atol=1e-5)


def test_few_sequences_take_the_network_that_is_laid_out_for_them(policy: DiffusionPolicy) -> None:
    few = FEW_STEPS // policy.config.prediction_horizon
    sampling = EagerSampling(policy, SAMPLING)
    assert isinstance(sampling._choose(draw(few)).network, RowsUnet)
    assert isinstance(sampling._choose(draw(2, few // 2)).network, RowsUnet)
    assert sampling._choose(draw(few)) is sampling._choose(draw(1))  # laid out once
    assert sampling._choose(draw(few + 1)) is policy
    assert sampling._choose(draw(2, few)) is policy
    assert EagerSampling(policy, SAMPLING, few_rows=False)._choose(draw(1)) is policy
    assert EagerSampling(policy, SAMPLING, "bf16")._choose(draw(1)) is policy
    observations, noise = observe(few + 1), draw(few + 1)
    many = sampling({"state": torch.from_numpy(observations["state"])}, noise)
    each = [
        sampling({"state": torch.from_numpy(observations["state"][i : i + 1])}, noise[i : i + 1])
        for i in range(few + 1)
    ]
    torch.testing.assert_close(torch.cat(each), many, rtol=1e-5, atol=1e-5)


def test_bf16_is_near_and_leaves_the_policy_as_it_was(policy: DiffusionPolicy) -> None:
    observations, noise = observe(4), draw(4, 8)
    planners = [PolicyPlanner(policy, SAMPLING, EagerSampling(policy, SAMPLING, name)) for name in ("fp32", "bf16")]
    plain, half = (planner.sample(observations, noise) for planner in planners)
    assert half.dtype == np.float64
    difference = np.abs(half - plain).max() / 2  # the range of an action is 4
    assert 0 < difference < 0.1
    assert all(weight.dtype == torch.float32 for weight in policy.parameters())
    np.testing.assert_array_equal(planners[0].sample(observations, noise), plain)


def test_what_computes_in_bf16_is_what_the_network_computes() -> None:
    x = torch.randn(3, 3)
    with half_precision("bf16", torch.device("cpu")):
        assert (x @ x).dtype == torch.bfloat16
    with half_precision("fp32", torch.device("cpu")):
        assert (x @ x).dtype == torch.float32


def test_another_way_of_sampling_is_passed_in(policy: DiffusionPolicy) -> None:
    seen = []

    class Counting:
        guides = False

        def __call__(self, observations, noise, steering=None) -> torch.Tensor:
            seen.append((observations["state"].dtype, noise.shape, steering))
            return torch.arange(16.0)[None, None, :, None].expand(2, 1, 16, 2)

    planner = PolicyPlanner(policy, SAMPLING, Counting())
    plans = planner.sample(observe(2), draw(2))
    assert not planner.guides
    assert seen == [(torch.float64, (2, 1, 1, 16, 2), None)]
    assert plans[0, 0, :, 0].tolist() == list(range(2, 16))


def test_observations_that_are_not_finite_are_refused(policy: DiffusionPolicy) -> None:
    observations = observe(2)
    observations["state"][1, 0, 2] = np.inf
    with pytest.raises(ValueError, match="the observation state holds NaN or infinity"):
        PolicyPlanner(policy, SAMPLING).sample(observations, draw(2))
