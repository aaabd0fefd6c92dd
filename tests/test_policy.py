from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion_policy.config import PolicyConfig, SampleConfig, TransformerConfig, with_options
from diffusion_policy.control.planner import planning_rng
from diffusion_policy.datasets.windows import Batch
from diffusion_policy.diffusion.prediction import PREDICTIONS
from diffusion_policy.diffusion.process import count_draws
from diffusion_policy.diffusion.samplers import SAMPLERS, Denoise
from diffusion_policy.diffusion.schedules import SCHEDULES
from diffusion_policy.networks.unet import TemporalUnet
from diffusion_policy.networks.unet_rows import RowsUnet
from diffusion_policy.policy import DiffusionPolicy, Shapes, choose_device
from diffusion_policy.training.losses import denoising_loss, draw

CONFIG = with_options(PolicyConfig(), widths=(16, 32), level_dim=32, noise_levels=20)
RNG = np.random.default_rng(0)
DATA = {
    "state": RNG.normal(2, 3, (100, 4)).astype(np.float32),
    "goal": RNG.normal(size=(100, 2)).astype(np.float32),
    "action": RNG.uniform(5, 9, (100, 2)).astype(np.float32),
}


GUIDABLE = replace(CONFIG, condition_dropout=0.1)
ONE_RESOLUTION = with_options(GUIDABLE, widths=(16,))  # compiles faster
TRANSFORMERS = [
    replace(GUIDABLE, network=TransformerConfig(16, 2, 2, level_dim=16, conditioning=name))
    for name in ("adaln", "cross-attention")
]
STEERABLE = replace(GUIDABLE, condition_on_mode=True)
MODES = ("left", "middle", "right")


def new_policy(config: PolicyConfig = CONFIG) -> DiffusionPolicy:
    torch.manual_seed(0)
    return DiffusionPolicy.for_data(config, DATA, MODES)


def observe(batch: int, horizon: int = 2) -> dict[str, torch.Tensor]:
    return {"state": torch.randn(batch, horizon, 4), "goal": torch.randn(batch, horizon, 2)}


def loss_of(policy: DiffusionPolicy, rows: int) -> torch.Tensor:
    """The mean training loss of some windows whose actions are all 7."""
    batch = Batch(observe(rows), torch.full((rows, 16, 2), 7.0))
    return denoising_loss(policy, batch, draw(policy, rows, torch.Generator().manual_seed(0))).mean()


@pytest.mark.parametrize("sampler, steps", [("ddim", 4), ("ddim", 20), ("ddpm", 1), ("ddpm", 7), ("unipc", 5)])
@pytest.mark.parametrize("horizons", [(2, 16, 8), (1, 2, 1), (3, 4, 2)])
def test_samples_are_raw_actions_within_the_demonstrated_range(sampler: str, steps: int, horizons) -> None:
    policy = new_policy(PolicyConfig(*horizons, network=CONFIG.network, noise_levels=20))
    generators = [planning_rng(seed) for seed in range(3)]
    actions = policy.sample(observe(3, horizons[0]), generators, 5, SampleConfig(sampler, steps))
    assert actions.shape == (3, 5, horizons[1], 2)
    low, high = torch.from_numpy(DATA["action"]).aminmax(dim=0)
    assert (actions >= low - 1e-4).all()
    assert (actions <= high + 1e-4).all()


def test_a_row_depends_on_its_own_observation_and_generator_alone() -> None:
    policy = new_policy()
    observations = observe(4)
    together = policy.sample(observations, [planning_rng(seed) for seed in range(4)], 2)
    swapped = {key: value[[3, 1, 0, 2]] for key, value in observations.items()}
    shuffled = policy.sample(swapped, [planning_rng(seed) for seed in (3, 1, 0, 2)], 2)
    torch.testing.assert_close(shuffled, together[[3, 1, 0, 2]], rtol=1e-5, atol=1e-5)


def test_other_noise_and_other_observations_give_other_plans() -> None:
    policy = new_policy()
    observations = observe(1)
    plan = policy.sample(observations, [planning_rng(0)])
    assert torch.equal(plan, policy.sample(observations, [planning_rng(0)]))
    assert not torch.allclose(plan, policy.sample(observations, [planning_rng(1)]))
    assert not torch.equal(plan, policy.sample(observe(1), [planning_rng(0)]))


def test_more_sampling_steps_than_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="sampling steps must be from 1 to the 20 noise levels; got 21"):
        new_policy().sample(observe(1), [planning_rng(0)], config=SampleConfig("ddim", 21))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_schedule_and_prediction_trains_and_samples_with_every_sampler(schedule, prediction) -> None:
    policy = new_policy(replace(CONFIG, schedule=schedule, prediction=prediction, snr_gamma=5.0))
    loss = loss_of(policy, 4)
    loss.backward()
    assert torch.isfinite(loss)
    for sampler in SAMPLERS:
        actions = policy.sample(observe(1), [planning_rng(0)], config=SampleConfig(sampler, 3))
        assert torch.isfinite(actions).all()


def test_langevin_steps_and_noise_change_a_plan() -> None:
    policy, observations = new_policy(), observe(1)
    plain = policy.sample(observations, [planning_rng(0)])
    for config in (SampleConfig(corrector_steps=1), SampleConfig(eta=1.0), SampleConfig(clip="none")):
        assert not torch.allclose(policy.sample(observations, [planning_rng(0)], config=config), plain)


def test_a_dropped_condition_leaves_the_observations_only_where_there_is_a_mode() -> None:
    policy, observations = new_policy(GUIDABLE), observe(3)
    cond = policy.encode(observations)
    assert (cond[:, -1] == 1).all()
    assert (policy.unconditional(cond) == 0).all()
    policy = new_policy(STEERABLE)
    cond = policy.encode(observations, torch.tensor([2, 0, -1]))
    assert cond[:, -3:].tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]
    unconditional = policy.unconditional(cond)
    assert torch.equal(unconditional, policy.encode(observations))
    assert torch.equal(unconditional[:, :-3], cond[:, :-3])


def test_conditions_are_dropped_as_often_as_asked() -> None:
    policy = new_policy(replace(GUIDABLE, condition_dropout=0.3))
    seen = []
    policy.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    loss_of(policy, 4000)
    (cond,) = seen
    assert (cond[:, -1] == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert ((cond == 0).all(dim=1) == (cond[:, -1] == 0)).all()


def test_guidance_of_zero_is_the_plain_policy_and_more_of_it_another() -> None:
    policy, observations = new_policy(GUIDABLE).eval(), observe(2)

    def plan(**options) -> torch.Tensor:
        generators = [planning_rng(0), planning_rng(1)]
        return policy.sample(observations, generators, config=SampleConfig(sampling_steps=4, clip="none", **options))

    assert torch.equal(plan(), plan(guidance=0.0))
    assert not torch.allclose(plan(), plan(guidance=3.0))
    assert not torch.allclose(plan(guidance=3.0), plan(guidance=3.0, guidance_schedule="falling"))


def test_a_policy_is_steered_to_the_mode_that_is_asked() -> None:
    policy, observations = new_policy(STEERABLE).eval(), observe(1)

    def plan(mode: str | None) -> torch.Tensor:
        return policy.sample(observations, [planning_rng(0)], config=SampleConfig(mode=mode))

    plans = [plan(mode) for mode in (None, *MODES)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(plans) for b in plans[:i])


@pytest.mark.parametrize(
    "config, options, message",
    [
        (CONFIG, {"guidance": 1.0}, "guidance 1.0 needs a policy trained with --condition-dropout above 0"),
        (CONFIG, {"mode": "left"}, "cannot be steered to mode 'left'; it was trained without condition-on-mode"),
        (STEERABLE, {"mode": "up"}, "cannot be steered to mode 'up'; choose from left, middle, right"),
        (replace(CONFIG, condition_on_mode=True), {}, "must be told a mode, one of left, middle, right"),
        (STEERABLE, {"guidance": 1.0}, "guidance needs a mode to guide to, one of left, middle, right"),
        (replace(CONFIG, schedule="flow"), {"sampling_steps": 20}, "from 1 to the 19 noise levels that hold signal"),
    ],
)
def test_options_that_a_policy_cannot_follow_are_refused(config, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        new_policy(config).sample(observe(1), [planning_rng(0)], config=SampleConfig(**options))


def test_observations_with_nan_are_refused() -> None:
    observations = observe(2)
    observations["goal"][1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="the observation goal holds NaN or infinity"):
        new_policy().sample(observations, [planning_rng(0), planning_rng(1)])


@pytest.mark.parametrize(
    "observations", [{"state": torch.zeros(3, 2, 4)}, {"state": torch.zeros(3, 4), "goal": torch.zeros(3, 2, 2)}]
)
def test_observations_of_other_keys_or_shapes_are_refused_in_a_line(observations: dict) -> None:
    with pytest.raises(ValueError, match=r"the policy observes \{'goal': \(2, 2\), 'state': \(2, 4\)\} .*got \{"):
        new_policy().sample(observations, [planning_rng(seed) for seed in range(3)])


def test_constant_actions_come_back_as_the_constant_and_small_ones_are_learned_as_large_ones() -> None:
    data = DATA | {"action": (DATA["action"] * [1e-5, 0] + [0, 0.1]).astype(np.float32)}
    torch.manual_seed(0)
    policy = DiffusionPolicy.for_data(CONFIG, data)
    actions = policy.sample(observe(5), [planning_rng(seed) for seed in range(5)], config=SampleConfig(clip="none"))
    assert (actions[..., 1] == float(np.float32(0.1))).all()
    assert policy.normalizer.normalize("action", torch.from_numpy(data["action"]))[:, 0].abs().max() == pytest.approx(1)


def test_a_small_step_at_a_large_position_changes_the_plan_and_reaches_the_robot() -> None:
    x = RNG.uniform(-1, 1, (100, 2)) + 5.4e6
    torch.manual_seed(0)
    policy = DiffusionPolicy.for_data(CONFIG, {"state": x, "action": x})
    here = torch.from_numpy(np.stack([x[:2], x[:2] + 0.01]))
    actions = policy.sample({"state": here}, [planning_rng(0), planning_rng(0)])
    assert actions.dtype == torch.float64
    assert 0 < (actions[0] - actions[1]).abs().max() < 0.1
    cond = policy.encode({"state": here})
    torch.testing.assert_close((cond[1] - cond[0])[:2], torch.full((2,), 0.01), rtol=0.15, atol=0)


@pytest.mark.parametrize("normalization, cut", [("limits", True), ("moments", False), ("quantiles", False)])
def test_nothing_that_was_demonstrated_is_cut_off_by_default(normalization: str, cut: bool) -> None:
    policy = new_policy(replace(CONFIG, normalization=normalization))
    beyond = torch.full((1, 16, 2), 3.0)
    policy.diffusion.decode = lambda _: lambda xt, level: beyond  # pyright: ignore
    for config, clipped in (
        (SampleConfig(), cut),
        (SampleConfig(clip="static"), True),
        (SampleConfig(clip="none"), False),
    ):
        x0 = policy.denoiser(torch.zeros(1, policy.cond_dim), config)(torch.zeros(1, 16, 2), 3)
        assert torch.equal(x0, beyond.clamp(-1, 1) if clipped else beyond)


def test_sampling_that_would_fill_the_memory_is_refused_at_once() -> None:
    policy = new_policy(replace(CONFIG, noise_levels=100_000))
    with pytest.raises(ValueError, match=r"needs 1 x 100000001 draws of noise of 32 numbers, at most 268435456"):
        policy.sample(observe(1), [planning_rng(0)], config=SampleConfig(sampling_steps=100_000, corrector_steps=1000))


def test_training_on_modes_needs_modes() -> None:
    with pytest.raises(ValueError, match="trained with the modes of its windows; got none"):
        loss_of(new_policy(STEERABLE), 2)


def test_a_level_without_signal_is_never_decoded_to_garbage() -> None:
    policy = new_policy(replace(CONFIG, schedule="flow"))
    with pytest.raises(ValueError, match="level 19 holds no signal, so noise prediction cannot tell x0 there"):
        policy.denoise_from(torch.randn(1, 1, 16, 2), policy.encode(observe(1)), [19, 5], SampleConfig())
    with pytest.raises(ValueError, match="needs 3 draws of noise; got 1"):
        policy.denoise_from(torch.randn(1, 1, 16, 2), policy.encode(observe(1)), [9, 5], SampleConfig("ddpm"))


def test_modes_to_condition_on_must_be_there() -> None:
    with pytest.raises(ValueError, match="condition-on-mode needs data with at least two modes; it has 0"):
        DiffusionPolicy.for_data(STEERABLE, DATA)


def test_the_loss_of_a_network_that_says_nothing_is_the_power_of_the_noise() -> None:
    policy = new_policy()
    last = policy.network.out[-1]
    assert isinstance(last, nn.Conv1d)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # pyright: ignore[reportArgumentType]
    loss = loss_of(policy, 512)
    assert loss.item() == pytest.approx(1.0, abs=0.03)


def test_the_normalizer_is_among_the_saved_weights_and_the_schedule_is_not() -> None:
    names = new_policy().state_dict()
    assert {"normalizer.action_scale", "normalizer.state_offset"} <= names.keys()
    assert not any(name.startswith("diffusion.") for name in names)


def test_actions_must_be_one_row_of_numbers() -> None:
    with pytest.raises(ValueError, match=r"an action must be one row of numbers, \(A,\); got shape \(2, 3\)"):
        DiffusionPolicy(CONFIG, Shapes({"state": (4,)}, (2, 3)))


def test_a_policy_that_learns_its_variance_samples_with_it() -> None:
    policy = new_policy(replace(CONFIG, learn_variance=True))
    loss = loss_of(policy, 4)
    loss.backward()
    last = policy.network.out[-1]
    assert isinstance(last, nn.Conv1d)
    assert last.weight.grad is not None
    assert (last.weight.grad.abs().flatten(1).sum(dim=1) > 0).all()  # of prediction and variance alike
    plans = {
        name: policy.sample(observe(1), [planning_rng(0)], config=SampleConfig(name, 5, clip="none"))
        for name in SAMPLERS
    }
    assert all(torch.isfinite(plan).all() for plan in plans.values())
    observations = observe(1)
    config, generators = SampleConfig("ddpm", 5, clip="none"), [planning_rng(0)]
    own = policy.sample(observations, generators, config=config)
    fixed = policy.sample(observations, [planning_rng(0)], config=replace(config, sampler="ddim", eta=1.0))
    assert not torch.allclose(own, fixed)


SAMPLINGS = [SampleConfig(name, 3) for name in SAMPLERS] + [
    SampleConfig("ddim", 3, eta=0.5, guidance=2.0, guidance_schedule="falling", clip="dynamic"),
    SampleConfig("unipc", 3, corrector_steps=2),
    SampleConfig("dpm-solver-2m", 3, spacing="log-snr"),
]


def sampling_id(config: SampleConfig) -> str:
    return (
        f"{config.sampler} {config.spacing}, eta {config.eta}, w {config.guidance}, {config.corrector_steps} Langevin"
    )


BY_UNET = [pytest.param(config, ONE_RESOLUTION, id=sampling_id(config)) for config in SAMPLINGS]
BY_TRANSFORMER = [
    pytest.param(SampleConfig("ddim", 1, guidance=2.0), one, id=one.network.conditioning) for one in TRANSFORMERS
]  # pyright: ignore


@pytest.mark.parametrize("config, by", BY_UNET + BY_TRANSFORMER[1:])
def test_encoder_sampling_loop_and_normalizer_compile_as_one_graph_and_give_the_same(
    config: SampleConfig, by: PolicyConfig, stir
) -> None:
    torch.manual_seed(0)
    policy = stir(DiffusionPolicy.for_data(by, DATA, angles={"goal": (1,), "action": (0,)})).eval()
    noise = torch.randn(2, 1, *policy.noise_shape(config))
    observations = observe(2)
    torch.compiler.reset()
    compiled = torch.compile(policy.sample_on_device, fullgraph=True, backend="eager")
    with torch.no_grad():
        eager = policy.sample_on_device(observations, noise, config)
        torch.testing.assert_close(compiled(observations, noise, config), eager, rtol=1e-4, atol=1e-4)


class OnDevice(TorchDispatchMode):
    """Refuses operators that need a number of a tensor on the device `meta`, or bring a tensor of numbers to it: on a
    GPU both wait, and a captured graph can do neither. (A single number goes along with the launch.)"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        found = func(*args, **(kwargs or {}))
        made = [one for one in tree_leaves(found) if isinstance(one, torch.Tensor)]
        there = [one.device.type == "meta" for one in (*given, *made)]
        sent = [one for one in (*given, *made) if one.device.type == "cpu" and one.ndim]
        if any(there):
            assert not sent, f"{func} mixes devices"
            assert func not in (torch.ops.aten.index.Tensor, torch.ops.aten.nonzero.default), func
        return found


@pytest.mark.parametrize("angles", [{}, {"goal": (1,), "action": (0,)}], ids=["plain", "angles"])
@pytest.mark.parametrize("config, by", BY_UNET + BY_TRANSFORMER)
def test_sampling_on_the_device_needs_no_number_of_it(config: SampleConfig, by: PolicyConfig, angles: dict) -> None:
    """The device `meta` has no numbers, so that whatever asks for one fails there."""
    policy = DiffusionPolicy.for_data(by, DATA, angles=angles).eval().to("meta")
    noise = torch.zeros(2, 3, *policy.noise_shape(config), device="meta")
    observations = {key: rows.double().to("meta") for key, rows in observe(2).items()}
    with torch.no_grad(), OnDevice():
        sequences = policy.sample_on_device(observations, noise, config)
    assert (sequences.device.type, sequences.shape) == ("meta", (2, 3, 16, 2))


def test_the_watch_over_the_device_notices_what_waits_for_it() -> None:
    x = torch.zeros(3, device="meta")
    for wait in (lambda: x[[0, 2]], lambda: x + torch.ones(3), lambda: x.to("cpu"), lambda: x.sum().item()):
        with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), OnDevice():
            wait()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch.compile
@pytest.mark.parametrize("few_rows", [False, True])
def test_a_compiled_policy_gives_the_same_but_for_rounding(few_rows: bool) -> None:
    policy, observations = new_policy(ONE_RESOLUTION).eval(), observe(2)
    other = (policy.for_few_rows() if few_rows else policy).compiled()
    plans = [
        one.sample(observations, [planning_rng(0), planning_rng(1)], 1, SampleConfig("ddim", 3))
        for one in (policy, other)
    ]
    torch.testing.assert_close(*plans, rtol=1e-4, atol=1e-4)
    assert policy.network is not other.network


def test_a_policy_laid_out_for_few_rows_shares_all_but_its_network() -> None:
    policy = new_policy(GUIDABLE)
    other = policy.for_few_rows()
    assert isinstance(policy.network, TemporalUnet)
    assert isinstance(other.network, RowsUnet)
    assert other.for_few_rows() is other
    assert other.diffusion is policy.diffusion
    assert {name for name, _ in other.named_parameters()} == set()  # there is nothing in it to train
    observations, config = observe(3), SampleConfig("heun", 4, guidance=0.5, clip="none")
    plans = [one.sample(observations, [planning_rng(seed) for seed in range(3)], 2, config) for one in (policy, other)]
    torch.testing.assert_close(*plans, rtol=1e-4, atol=1e-4)
    assert policy.training
    assert other.training
    assert not policy.eval().for_few_rows().training


@pytest.mark.parametrize("config", TRANSFORMERS, ids=lambda config: config.network.conditioning)
def test_a_transformer_observes_each_key_at_each_step_and_the_mode(config: PolicyConfig, stir) -> None:
    policy = stir(new_policy(replace(config, condition_on_mode=True, prediction_horizon=7, action_horizon=5))).eval()
    observations, sampling = observe(1), SampleConfig(sampling_steps=2, mode="left", clip="none")

    def plan(observed: dict[str, torch.Tensor], sampling: SampleConfig = sampling) -> torch.Tensor:
        return policy.sample(observed, [planning_rng(0)], config=sampling)

    plain = plan(observations)
    assert plain.shape == (1, 1, 7, 2)
    for key, values in observations.items():
        for step in range(2):
            moved = values.clone()
            moved[:, step] += 1
            assert (plan(observations | {key: moved}) - plain).abs().max() > 1e-3
    assert (plan(observations, replace(sampling, mode="right")) - plain).abs().max() > 1e-3
    assert (plan(observations, replace(sampling, guidance=1.0)) - plain).abs().max() > 1e-3
    assert policy.for_few_rows() is policy


def test_both_networks_are_of_one_size_by_default() -> None:
    """For the observations of Avoid: two steps of 20 numbers."""
    sizes = [
        sum(weight.numel() for weight in DiffusionPolicy(config, Shapes({"a": (20,)}, (2,))).parameters())
        for config in (PolicyConfig(), with_options(PolicyConfig(), network="transformer"))
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_an_absent_device_is_refused() -> None:
    with pytest.raises(ValueError, match="no device 'warp' here; choose from auto, cpu, cuda, mps"):
        choose_device("warp")


@pytest.mark.gpu
@pytest.mark.parametrize("config", SAMPLINGS, ids=sampling_id)
def test_the_sampling_loop_never_waits_for_the_gpu(config: SampleConfig, never_waiting) -> None:
    policy = new_policy(GUIDABLE).cuda().eval()
    levels = [19, 10, 3]
    noise = torch.randn(
        count_draws(policy.resolve_sampling(config)[0], levels, config.corrector_steps), 2, 16, 2, device="cuda"
    )
    cond = policy.encode({key: value.cuda() for key, value in observe(2).items()})
    policy.denoise_from(noise, cond, levels, config)  # warm up
    with never_waiting():
        policy.denoise_from(noise, cond, levels, config)


@pytest.mark.gpu
def test_gpu_and_cpu_draw_the_same_plans() -> None:
    observations = observe(2)
    plans = [
        policy.sample({key: value.to(policy.device) for key, value in observations.items()}, generators).cpu()
        for policy in (new_policy().eval(), new_policy().eval().cuda())
        for generators in [[planning_rng(0), planning_rng(1)]]
    ]
    torch.testing.assert_close(*plans, rtol=1e-3, atol=1e-3)


def test_observations_stand_side_by_side_in_the_order_of_their_names() -> None:
    policy = DiffusionPolicy(CONFIG, Shapes({"b": (2,), "a": (3, 2)}, (2,)))
    observations = {"b": torch.full((1, 2, 2), 2.0), "a": torch.full((1, 2, 3, 2), 1.0)}
    assert policy.encode(observations)[0].tolist() == [1.0] * 12 + [2.0] * 4
    assert policy.features == 16


def test_wrappers_of_the_denoiser_change_a_plan_and_may_compute_gradients() -> None:
    """The gradient of a cost pulls the samples towards a place (Janner et al. 2022, arXiv 2205.09991, algorithm 1)."""
    policy, place, calls = new_policy().eval(), torch.tensor([0.5, -0.5]), []

    def inside(denoise: Denoise) -> Denoise:
        return lambda xt, level: denoise(xt, level).clamp(-0.9, 0.9)

    def towards(denoise: Denoise) -> Denoise:
        def guided(xt: torch.Tensor, level: int) -> torch.Tensor:
            with torch.enable_grad():
                xt = xt.detach().requires_grad_()
                x0 = denoise(xt, level)
                (slope,) = torch.autograd.grad((x0 - place).square().sum(), xt)
            calls.append(slope)
            return x0.detach() + 0.8 * (place - x0.detach())

        return guided

    sampling = SampleConfig(sampling_steps=4)
    plain, guided = (
        policy.normalizer.normalize("action", policy.sample(observe(1), [planning_rng(0)], 8, sampling, wrap))
        for wrap in ((), (inside, towards))
    )
    assert len(calls) == 4
    assert all(torch.isfinite(slope).all() for slope in calls)
    assert calls[-1].abs().sum() > 0  # at the noisier levels x0 lies at the bounds of the clipping
    assert (guided - place).abs().mean() < 0.5 * (plain - place).abs().mean()
