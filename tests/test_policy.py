import numpy as np
import pytest
import torch
from torch import nn

from diffusion_policy.config import PolicyConfig, SampleConfig
from diffusion_policy.controller import planning_generator
from diffusion_policy.policy import DiffusionPolicy, Shapes, choose_device

CONFIG = PolicyConfig(widths=(16, 32), level_dim=32, levels=20)
RNG = np.random.default_rng(0)
DATA = {
    "state": RNG.normal(2, 3, (100, 4)).astype(np.float32),
    "goal": RNG.normal(size=(100, 2)).astype(np.float32),
    "action": RNG.uniform(5, 9, (100, 2)).astype(np.float32),
}


def new_policy(config: PolicyConfig = CONFIG) -> DiffusionPolicy:
    torch.manual_seed(0)
    return DiffusionPolicy.for_data(config, DATA)


def observe(batch: int, horizon: int = 2) -> dict[str, torch.Tensor]:
    return {"state": torch.randn(batch, horizon, 4), "goal": torch.randn(batch, horizon, 2)}


@pytest.mark.parametrize("sampler, steps", [("ddim", 4), ("ddim", 20), ("ddpm", 1), ("ddpm", 7)])
@pytest.mark.parametrize("horizons", [(2, 16, 8), (1, 2, 1), (3, 4, 2)])
def test_samples_are_raw_actions_within_the_demonstrated_range(sampler: str, steps: int, horizons) -> None:
    policy = new_policy(PolicyConfig(*horizons, widths=(16, 32), level_dim=32, levels=20))
    generators = [planning_generator(seed) for seed in range(3)]
    actions = policy.sample(observe(3, horizons[0]), generators, 5, SampleConfig(sampler, steps))
    assert actions.shape == (3, 5, horizons[1], 2)
    low, high = torch.from_numpy(DATA["action"]).aminmax(dim=0)
    assert (actions >= low - 1e-4).all()
    assert (actions <= high + 1e-4).all()


def test_a_row_depends_on_its_own_observation_and_generator_alone() -> None:
    policy = new_policy()
    observations = observe(4)
    together = policy.sample(observations, [planning_generator(seed) for seed in range(4)], 2)
    swapped = {key: value[[3, 1, 0, 2]] for key, value in observations.items()}
    shuffled = policy.sample(swapped, [planning_generator(seed) for seed in (3, 1, 0, 2)], 2)
    torch.testing.assert_close(shuffled, together[[3, 1, 0, 2]], rtol=1e-5, atol=1e-5)


def test_other_noise_and_other_observations_give_other_plans() -> None:
    policy = new_policy()
    observations = observe(1)
    plan = policy.sample(observations, [planning_generator(0)])
    assert torch.equal(plan, policy.sample(observations, [planning_generator(0)]))
    assert not torch.allclose(plan, policy.sample(observations, [planning_generator(1)]))
    assert not torch.equal(plan, policy.sample(observe(1), [planning_generator(0)]))


def test_more_sampling_steps_than_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="sampling steps must be from 1 to the 20 noise levels of the policy; got 21"):
        new_policy().sample(observe(1), [planning_generator(0)], config=SampleConfig("ddim", 21))


def test_the_loss_of_a_network_that_says_nothing_is_the_power_of_the_noise() -> None:
    policy = new_policy()
    last = policy.network.out[-1]
    assert isinstance(last, nn.Conv1d)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # pyright: ignore[reportArgumentType]
    loss = policy.loss(observe(512), torch.full((512, 16, 2), 7.0), torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(1.0, abs=0.03)


def test_the_normalizer_is_among_the_saved_weights_and_the_schedule_is_not() -> None:
    names = new_policy().state_dict()
    assert {"normalizer.action_scale", "normalizer.state_offset"} <= names.keys()
    assert not {"alpha", "sigma"} & names.keys()


def test_actions_must_be_one_row_of_numbers() -> None:
    with pytest.raises(ValueError, match=r"an action must be one row of numbers, \(A,\); got shape \(2, 3\)"):
        DiffusionPolicy(CONFIG, Shapes({"state": (4,)}, (2, 3)))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_sampling_loop_compiles_as_one_graph_and_gives_the_same(sampler: str) -> None:
    policy = new_policy().eval()
    xT, noise = torch.randn(2, 16, 2), torch.randn(3, 2, 16, 2)
    cond = policy.encode(observe(2))
    levels = [19, 10, 3]
    compiled = torch.compile(policy.denoise_from, fullgraph=True, backend="eager")
    with torch.no_grad():
        eager = policy.denoise_from(xT, cond, levels, noise, sampler)
        torch.testing.assert_close(compiled(xT, cond, levels, noise, sampler), eager, rtol=1e-4, atol=1e-5)


def test_an_absent_device_is_refused() -> None:
    with pytest.raises(ValueError, match="no device 'warp' here; choose from auto, cpu, cuda, mps"):
        choose_device("warp")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_sampling_loop_never_waits_for_the_gpu(sampler: str) -> None:
    policy = new_policy().cuda().eval()
    xT, noise = torch.randn(2, 16, 2, device="cuda"), torch.randn(3, 2, 16, 2, device="cuda")
    cond = policy.encode({key: value.cuda() for key, value in observe(2).items()})
    policy.denoise_from(xT, cond, [19, 10, 3], noise, sampler)  # warm up
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy.denoise_from(xT, cond, [19, 10, 3], noise, sampler)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_and_cpu_draw_the_same_plans() -> None:
    observations = observe(2)
    plans = [
        policy.sample({key: value.to(policy.device) for key, value in observations.items()}, generators).cpu()
        for policy in (new_policy().eval(), new_policy().eval().cuda())
        for generators in [[planning_generator(0), planning_generator(1)]]
    ]
    torch.testing.assert_close(*plans, rtol=1e-3, atol=1e-3)
