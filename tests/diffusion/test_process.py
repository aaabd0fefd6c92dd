"""A sampler as a table of numbers: run by hand it gives what the loop gives."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from diffusion_policy.diffusion.guidance import static_clip
from diffusion_policy.diffusion.prediction import PREDICTIONS
from diffusion_policy.diffusion.process import Diffusion, SamplingTable, count_draws
from diffusion_policy.diffusion.samplers import SAMPLERS, Denoise, Sampler, ddim
from diffusion_policy.diffusion.schedules import cosine, flow, linear

SHAPE = (2, 8, 3)


class Case(NamedTuple):
    sampler: Sampler
    steps: int = 5
    corrector_steps: int = 0
    corrector_size: float = 0.05
    spacing: str = "trailing"


CASES = {
    **{name: Case(sampler) for name, sampler in SAMPLERS.items()},
    **{f"{name} in one step": Case(SAMPLERS[name], 1) for name in ("ddim", "ddpm", "unipc", "heun")},
    "ddim with noise": Case(Sampler(partial(ddim, eta=0.7), needs_noise=True)),
    "ddpm with Langevin steps": Case(SAMPLERS["ddpm"], 4, corrector_steps=2),
    "unipc with Langevin steps": Case(SAMPLERS["unipc"], 4, corrector_steps=1, corrector_size=0.2),
    "heun with Langevin steps": Case(SAMPLERS["heun"], 3, corrector_steps=1, spacing="even"),
    "dpm-solver-2m in log-SNR": Case(SAMPLERS["dpm-solver-2m"], 6, spacing="log-snr"),
}


def run_by_hand(table: SamplingTable, noise: Tensor, denoise: Denoise) -> Tensor:
    """What a runtime does: sums with the numbers of the table, and nothing else."""
    inputs = torch.einsum("ed,d...->e...", table.of_noise.to(noise), noise)
    of_x0 = table.of_x0.to(noise)
    for place, level in enumerate(table.levels):
        x0 = denoise(inputs[place], level)
        inputs = inputs + of_x0[:, place].reshape(-1, *[1] * x0.ndim) * x0
    return inputs[-1]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    "schedule, prediction", [(cosine(30), "velocity"), (linear(30), "sample"), (flow(30), "flow")],
    ids=["cosine", "linear", "flow"],
)  # fmt: skip
def test_a_sampler_is_what_its_table_says(schedule, prediction: str, case: Case, clip: bool) -> None:
    diffusion = Diffusion(schedule, PREDICTIONS[prediction])
    levels = diffusion.choose_levels(case.sampler, case.steps, case.spacing)
    options = (case.sampler, levels, case.corrector_steps, case.corrector_size)
    generator = torch.Generator().manual_seed(0)
    draws = count_draws(*options[:3])
    noise = torch.randn(draws, *SHAPE, generator=generator, dtype=torch.float64)
    denoise = diffusion.decode(lambda xt, level: 0.8 * torch.tanh(xt + 0.005 * level))
    denoise = static_clip(denoise) if clip else denoise
    table = diffusion.tabulate(*options)
    expected = diffusion.sample(denoise, noise, *options)
    torch.testing.assert_close(run_by_hand(table, noise, denoise), expected, rtol=1e-6, atol=1e-6)
    in_float32 = run_by_hand(table, noise.float(), denoise)
    assert (in_float32 - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_call_depends_on_those_before_it_alone(case: Case) -> None:
    diffusion = Diffusion(cosine(30), PREDICTIONS["sample"])
    levels = diffusion.choose_levels(case.sampler, case.steps, case.spacing)
    table = diffusion.tabulate(case.sampler, levels, case.corrector_steps)
    calls, draws = len(table.levels), count_draws(case.sampler, levels, case.corrector_steps)
    assert table.of_noise.shape == (calls + 1, draws)
    assert table.of_x0.shape == (calls + 1, calls)
    assert table.of_noise.dtype == table.of_x0.dtype == torch.float64
    assert not torch.triu(table.of_x0[:calls]).any()
    assert torch.isfinite(torch.cat([table.of_noise, table.of_x0], dim=1)).all()
    assert table.of_noise[0].tolist() == [1.0] + [0.0] * (draws - 1)  # it starts from xT
    assert set(table.levels) == set(levels)
    twice = case.sampler is SAMPLERS["heun"]
    langevin = case.corrector_steps * (len(levels) - 1)
    assert calls == len(levels) + twice * (len(levels) - 1) + langevin


def test_a_table_that_is_made_again_is_the_same() -> None:
    diffusion = Diffusion(linear(20), PREDICTIONS["noise"])
    tables = [diffusion.tabulate(SAMPLERS["ddpm"], [19, 10, 3]) for _ in range(2)]
    assert tables[0].levels == tables[1].levels == [19, 10, 3]
    for one, other in zip(tables[0][1:], tables[1][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
