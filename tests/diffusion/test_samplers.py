"""Samplers against diffusers step for step, and against the exact denoiser of Gaussian data."""

import ast
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_dpmsolver_multistep as dpmsolver
from diffusers.schedulers import scheduling_euler_discrete as euler_discrete
from diffusers.schedulers import scheduling_flow_match_euler_discrete as flow_euler
from diffusers.schedulers import scheduling_flow_match_heun_discrete as flow_heun
from torch import Tensor

from diffusion_policy.diffusion.prediction import PREDICTIONS
from diffusion_policy.diffusion.samplers import (
    SAMPLERS,
    Formula,
    Sampler,
    ddim,
    ddpm,
    dpm_solver_pp,
    dpm_solver_pp_sde,
    euler,
    heun,
    karras_scale,
    langevin,
    unipc,
)
from diffusion_policy.diffusion.schedules import SCHEDULES as SCHEDULE_FUNCTIONS
from diffusion_policy.diffusion.schedules import Schedule, choose_levels, constant, cosine, flow, linear, sigmoid

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2

SHAPE = (3, 8, 2)
K = 100
STEPS = (1, 5, 16, 50, K)
SCHEDULES = {"cosine": cosine(K), "linear": linear(K), "sigmoid": sigmoid(K), "constant": constant(K)}
WIDE = SimpleNamespace(**{**vars(torch), "float32": torch.float64})
"""For modules of diffusers that cast to torch.float32."""
TYPES = {"noise": "epsilon", "sample": "sample", "velocity": "v_prediction", "flow": "flow_prediction"}
"""diffusers' names of our predictions."""


def fake_network(xt: Tensor, level: int) -> Tensor:
    """A smooth stand-in for a network."""
    return 0.8 * torch.tanh(xt + 0.005 * level)


def denoiser(schedule: Schedule, prediction: str = "noise", clip: bool = False):
    def denoise(xt: Tensor, level: int) -> Tensor:
        alpha, sigma = schedule.alpha[level], schedule.sigma[level]
        x0, _ = PREDICTIONS[prediction].decode(fake_network(xt, level), xt, alpha, sigma)
        return x0.clamp(-1, 1) if clip else x0

    return denoise


def draw(steps: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """xT and the noise of every step, in float64 but with no more digits than `dtype` has."""
    rows = torch.randn((1 + steps, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return rows[0].to(dtype).double(), rows[1:].to(dtype).double()


def assert_equal_trajectories(sampler: Callable[..., Tensor], dtype, denoise, xT, schedule, levels, noise, reference):
    """Ours in `dtype` against diffusers in float64 with float64 tables: its float32 alone is off by 1.2e-5."""
    assert torch.isfinite(reference).all()
    ours = sampler(denoise, xT.to(dtype), schedule, levels, noise.to(dtype))
    assert ours.dtype == dtype
    error = (ours - reference).abs().max() / reference.abs().max()
    assert error <= (1e-10 if dtype == torch.float64 else 1e-5)


def prepare(reference, schedule: Schedule, levels: list[int], flows: bool = False) -> None:
    """Give a scheduler of diffusers our levels and float64 tables; its own are float32."""
    reference.alphas_cumprod = schedule.alpha**2
    reference.one = reference.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    reference.num_inference_steps = len(levels)
    reference.timesteps = torch.tensor(levels)
    if hasattr(reference, "sigmas"):
        alphas = torch.ones(K) if flows else schedule.alpha
        reference.sigmas = torch.cat([(schedule.sigma / alphas)[levels], torch.zeros(1)])
    if isinstance(reference, HeunDiscreteScheduler | FlowMatchHeunDiscreteScheduler):  # it counts each step twice
        sigmas, times = reference.sigmas, reference.timesteps
        reference.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        reference.timesteps = torch.cat([times[:1], times[1:].repeat_interleave(2)])


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=SCHEDULES)
def name(request: pytest.FixtureRequest) -> str:
    """Each schedule that diffusers has too."""
    return request.param


@pytest.fixture(params=["noise", "sample", "velocity"])
def prediction(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_equals_diffusers(name: str, prediction: str, dtype: torch.dtype, clip: bool) -> None:
    schedule = SCHEDULES[name]
    for steps in STEPS:
        levels = choose_levels(schedule, steps, "leading")
        for eta in (0.0, 0.5, 1.0):
            reference = DDIMScheduler(K, prediction_type=TYPES[prediction], clip_sample=clip)
            reference.set_timesteps(steps)  # leading
            assert levels == reference.timesteps.tolist()
            prepare(reference, schedule, levels)
            xT, noise = draw(steps, dtype)
            x = xT
            for i, level in enumerate(levels):
                options = {"eta": eta, "use_clipped_model_output": True, "variance_noise": noise[i] if eta else None}
                x = reference.step(fake_network(x, level), level, x, **options).prev_sample
            denoise = denoiser(schedule, prediction, clip)
            assert_equal_trajectories(Sampler(partial(ddim, eta=eta)), dtype, denoise, xT, schedule, levels, noise, x)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_equals_diffusers(name, prediction, dtype, clip, large, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = SCHEDULES[name]
    kind = "fixed_large" if large else "fixed_small"
    for steps in STEPS:
        levels = choose_levels(schedule, steps, "leading")
        reference = DDPMScheduler(K, prediction_type=TYPES[prediction], clip_sample=clip, variance_type=kind)
        reference.set_timesteps(steps)
        prepare(reference, schedule, levels)
        xT, noise = draw(steps, dtype)
        rows = iter(noise)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(rows))  # noqa: B023
        x = xT
        for level in levels:
            x = reference.step(fake_network(x, level), level, x).prev_sample
        sampler = Sampler(partial(ddpm, large_variance=large))
        assert_equal_trajectories(sampler, dtype, denoiser(schedule, prediction, clip), xT, schedule, levels, noise, x)


def test_ddpm_with_a_learned_variance_equals_diffusers(name, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = SCHEDULES[name]

    def share(xt: Tensor, level: int) -> Tensor:
        return torch.sigmoid(xt + 0.02 * level)

    for steps in STEPS:
        levels = choose_levels(schedule, steps, "leading")
        reference = DDPMScheduler(K, clip_sample=False, variance_type="learned_range")
        reference.set_timesteps(steps)
        prepare(reference, schedule, levels)
        xT, noise = draw(steps, dtype)
        rows = iter(noise)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(rows))  # noqa: B023
        x = xT
        for level in levels:
            output = torch.cat([fake_network(x, level), 2 * share(x, level) - 1], dim=1)
            x = reference.step(output, level, x).prev_sample
        sampler = Sampler(partial(ddpm, share=share))
        assert_equal_trajectories(sampler, dtype, denoiser(schedule), xT, schedule, levels, noise, x)


LOG_SNR_SOLVERS = {
    "1": (partial(dpm_solver_pp, order=1), DPMSolverMultistepScheduler, {"solver_order": 1}),
    "2m": (dpm_solver_pp, DPMSolverMultistepScheduler, {"solver_order": 2}),
    "sde-1": (
        partial(dpm_solver_pp_sde, order=1),
        DPMSolverMultistepScheduler,
        {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"},
    ),
    "sde-2m": (
        dpm_solver_pp_sde,
        DPMSolverMultistepScheduler,
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
    ),
    "unipc": (unipc, UniPCMultistepScheduler, {"solver_order": 2}),
}


def check_log_snr_solver(solver: str, schedule: Schedule, prediction: str, dtype: torch.dtype, **options) -> None:
    ours, kind, more = LOG_SNR_SOLVERS[solver]
    for steps in (1, 5, 16, K // 2, K - schedule.ends_silent):
        if steps > K // 2 and not solver.endswith("1"):
            continue  # where the multistep reference is finite
        levels = choose_levels(schedule, steps, with_signal=True)
        reference = kind(K, prediction_type=TYPES[prediction], final_sigmas_type="zero", **more, **options)
        reference.set_timesteps(steps)
        prepare(reference, schedule, levels, flows=prediction == "flow")
        xT, noise = draw(steps, dtype)
        x = xT
        for i, level in enumerate(levels):
            drawn = {"variance_noise": noise[i]} if solver.startswith("sde") else {}
            x = reference.step(fake_network(x, level), reference.timesteps[i], x, **drawn).prev_sample
        assert_equal_trajectories(Sampler(ours), dtype, denoiser(schedule, prediction), xT, schedule, levels, noise, x)


@pytest.mark.parametrize("solver", LOG_SNR_SOLVERS)
def test_log_snr_solvers_equal_diffusers(name, prediction, dtype, solver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpmsolver, "torch", WIDE)
    check_log_snr_solver(solver, SCHEDULES[name], prediction, dtype)


@pytest.mark.parametrize("solver", LOG_SNR_SOLVERS)
def test_log_snr_solvers_on_a_flow_equal_diffusers(dtype, solver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpmsolver, "torch", WIDE)
    check_log_snr_solver(solver, flow(K), "flow", dtype, use_flow_sigmas=True)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_ode_samplers_equal_diffusers(name, prediction, dtype, kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(euler_discrete, "torch", WIDE)
    schedule = SCHEDULES[name]
    for steps in STEPS:
        levels = choose_levels(schedule, steps)
        reference = kind(K, prediction_type=TYPES[prediction])
        reference.set_timesteps(steps)
        prepare(reference, schedule, levels)
        reference.is_scale_input_called = True
        xT, noise = draw(steps, dtype)
        x = xT * (1 + reference.sigmas[0] ** 2) ** 0.5
        for i, level in enumerate(reference.timesteps):
            sigma = reference.sigmas[reference.step_index if i else 0]
            network = fake_network(x / (1 + sigma**2) ** 0.5, int(level))
            x = reference.step(network, level.double(), x).prev_sample
        function = euler if kind is EulerDiscreteScheduler else partial(heun, scale=karras_scale)
        assert_equal_trajectories(
            Sampler(function), dtype, denoiser(schedule, prediction), xT, schedule, levels, noise, x
        )


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_flow_samplers_equal_diffusers(dtype: torch.dtype, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_euler, "torch", WIDE)
    monkeypatch.setattr(flow_heun, "torch", WIDE)
    schedule = flow(K)
    for steps in STEPS:
        levels = choose_levels(schedule, steps)
        reference = kind(K)
        reference.set_timesteps(steps)
        prepare(reference, schedule, levels, flows=True)
        xT, noise = draw(steps, dtype)
        x = xT
        for level in reference.timesteps:
            x = reference.step(fake_network(x, int(level)), level.double(), x).prev_sample
        function = euler if kind is FlowMatchEulerDiscreteScheduler else heun
        assert_equal_trajectories(Sampler(function), dtype, denoiser(schedule, "flow"), xT, schedule, levels, noise, x)


def gaussian_denoiser(schedule: Schedule, mean: float, deviation: float):
    """E[x0 | xt] where x0 ~ N(mean, deviation²)."""

    def denoise(xt: Tensor, level: int) -> Tensor:
        alpha, sigma = schedule.alpha[level], schedule.sigma[level]
        gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        return mean + gain * (xt - alpha * mean)

    return denoise


def carried_moments(sampler, schedule: Schedule, steps: int, mean: float, deviation: float) -> tuple[float, float]:
    """Mean and standard deviation of what a sampler makes of the true distribution at its first level, exactly: with
    the exact denoiser it is affine in xT and in each row of noise, so unit inputs give its coefficients."""
    levels = choose_levels(schedule, steps, "even", with_signal=True)
    count = len(levels)
    xT = torch.zeros(count + 2, dtype=torch.float64)  # rows: everything 0; xT = 1; noise i = 1
    xT[1] = 1
    noise = torch.cat([torch.zeros(count, 2), torch.eye(count)], dim=1).double()
    outputs = sampler(gaussian_denoiser(schedule, mean, deviation), xT, schedule, levels, noise)
    offset, gains = outputs[0], outputs[1:] - outputs[0]
    alpha, sigma = schedule.alpha[levels[0]], schedule.sigma[levels[0]]
    variance = gains[0] ** 2 * (alpha**2 * deviation**2 + sigma**2) + (gains[1:] ** 2).sum()
    return float(offset + gains[0] * alpha * mean), float(variance.sqrt())


FIRST_ORDER = {
    "ddim": ddim,
    "ddim with noise": partial(ddim, eta=0.5),
    "ddpm": ddpm,
    "ddpm-large": partial(ddpm, large_variance=True),
    "dpm-solver-1": partial(dpm_solver_pp, order=1),
    "sde-1": partial(dpm_solver_pp_sde, order=1),
    "euler": euler,
}
SECOND_ORDER = {
    "2m": dpm_solver_pp,
    "sde-2m": dpm_solver_pp_sde,
    "unipc": unipc,
    "heun": heun,
    "heun of Karras": partial(heun, scale=karras_scale),
}


@pytest.mark.parametrize("solver", [*FIRST_ORDER, *SECOND_ORDER])
def test_the_error_on_gaussian_data_falls_with_the_order_of_the_sampler(solver: str) -> None:
    sampler = Sampler((FIRST_ORDER | SECOND_ORDER)[solver])
    mean, deviation = 0.7, 2.0
    errors = []
    for steps in (80, 160):
        found = carried_moments(sampler, linear(4000), steps, mean, deviation)
        errors.append(abs(found[0] - mean) + abs(found[1] - deviation))
    low, high = (1.6, 2.4) if solver in FIRST_ORDER else (3.2, 4.8)
    assert low <= errors[0] / errors[1] <= high
    assert errors[1] < 0.04


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_samplers_that_are_the_same_mathematics_agree(steps: int) -> None:
    schedule = linear(50)
    levels = choose_levels(schedule, steps)
    xT, noise = draw(steps, torch.float64)
    denoise = denoiser(schedule, "velocity")

    def run(formula: Formula) -> Tensor:
        return Sampler(formula)(denoise, xT, schedule, levels, noise)

    for same in (euler, partial(dpm_solver_pp, order=1)):
        torch.testing.assert_close(run(same), run(ddim), rtol=1e-9, atol=1e-9)
    for same in (ddpm, partial(dpm_solver_pp_sde, order=1)):
        torch.testing.assert_close(run(same), run(partial(ddim, eta=1.0)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_gives_the_denoised_noise(name: str) -> None:
    schedule = constant(10, 0.3)
    denoise = denoiser(schedule, clip=True)
    xT, noise = draw(1, torch.float64)
    x0 = SAMPLERS[name](denoise, xT, schedule, [9], noise)
    torch.testing.assert_close(x0, denoise(xT, 9))


@pytest.mark.parametrize("name", SAMPLERS)
def test_langevin_steps_bring_samples_to_the_distribution_of_their_level(name: str) -> None:
    schedule, count, deviation = cosine(100), 4000, 0.4
    levels = choose_levels(schedule, 25)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((2 + 20, len(levels), count), generator=generator, dtype=torch.float64)
    sampler = partial(SAMPLERS[name], gaussian_denoiser(schedule, 0.5, deviation))
    correct = langevin(gaussian_denoiser(schedule, 0.5, deviation), schedule, levels, noise[2:], size=0.1)
    too_wide = 2 * noise[0, 0]
    corrected = sampler(too_wide, schedule, levels, noise[1], hooks=[correct]).std().item()
    assert corrected == pytest.approx(deviation, abs=0.1)
    if not SAMPLERS[name].needs_noise:  # on its own the ODE keeps what it was given
        assert sampler(too_wide, schedule, levels, None).std().item() > 0.6


def test_a_langevin_step_leaves_the_true_distribution_of_a_level_as_it_is() -> None:
    # x' = x + δ score + sqrt(2 δ) z: variance v' = v (1 - δ / v)² + 2 δ = v + δ² / v for Gaussian data, so exact in δ
    schedule, mean, deviation, size = linear(50), 0.5, 0.4, 0.05
    level = 20
    alpha, sigma = schedule.alpha[level], schedule.sigma[level]
    inputs = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    noise = torch.tensor([[[0.0, 0.0, 1.0]]], dtype=torch.float64)
    correct = langevin(gaussian_denoiser(schedule, mean, deviation), schedule, [level], noise, size)
    offset, gain, noise_gain = (row := correct(inputs, 0))[0], row[1] - row[0], row[2] - row[0]
    variance = alpha**2 * deviation**2 + sigma**2
    torch.testing.assert_close(offset + gain * alpha * mean, alpha * mean)
    expected = variance + (size * sigma**2) ** 2 / variance
    torch.testing.assert_close(gain**2 * variance + noise_gain**2, expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_nan_and_levels_that_cannot_be_are_refused(name: str) -> None:
    sampler, schedule = SAMPLERS[name], linear(10)
    xT, noise = draw(3, torch.float32)
    denoise = denoiser(schedule)
    for levels in ([], [3, 3, 1], [1, 5], [10, 5], [5, -1]):
        with pytest.raises(ValueError, match="levels must decrease from at most 9 to at least 0; got"):
            sampler(denoise, xT, schedule, levels, noise)
    xT[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="the noised sequence holds NaN or infinity"):
        sampler(denoise, xT, schedule, [9, 4, 0], noise)


def test_an_impossible_eta_is_refused() -> None:
    xT, noise = draw(1, torch.float32)
    with pytest.raises(ValueError, match="eta must be from 0 to 1; got 2"):
        Sampler(partial(ddim, eta=2.0))(denoiser(linear(10)), xT, linear(10), [9], noise)


def test_samplers_that_need_noise_or_signal_say_so() -> None:
    xT, _ = draw(1, torch.float32)
    for name, sampler in SAMPLERS.items():
        if sampler.needs_noise:
            with pytest.raises(ValueError, match="this sampler adds noise"):
                sampler(denoiser(linear(10)), xT, linear(10), [9, 2], None)
        if sampler.needs_signal:
            with pytest.raises(ValueError, match=r"level 9 holds no signal.*start one level lower"):
                sampler(denoiser(flow(10), "flow"), xT, flow(10), [9, 2], torch.zeros(2, *xT.shape))
        assert sampler.needs_noise == (name in ("ddpm", "ddpm-large", "dpm-solver-sde"))


def test_no_sampler_is_longer_than_forty_lines_and_no_schedule_than_eight() -> None:
    lengths = {}
    for module in ("samplers", "schedules"):
        source = (Path(__file__).parents[2] / "diffusion_policy" / "diffusion" / f"{module}.py").read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                lengths[node.name] = node.end_lineno - node.lineno + 1
    assert all(lengths[make.__name__] <= 8 for make in SCHEDULE_FUNCTIONS.values())
    assert max(lengths.values()) <= 40
