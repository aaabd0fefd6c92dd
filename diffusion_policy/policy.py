"""DiffusionPolicy: encoder + network + schedule + prediction + normalizer.

Observations and actions are raw outside and normalized inside. The timeline, for To = 2, T = 16, Ta = 8:

    step        t-1   t   t+1  ...  t+7   t+8 ... t+14
    observed     x    x
    predicted    x    x    x   ...   x     x  ...   x
    executed          x    x   ...   x

The predicted sequence starts at the first observed step, so what is executed is `[To - 1 : To - 1 + Ta]`.
Knows no simulator and no file.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from diffusion_policy.config import PolicyConfig, SampleConfig
from diffusion_policy.networks.encoders import StateEncoder
from diffusion_policy.networks.temporal_unet import TemporalUnet
from diffusion_policy.normalizer import Normalizer
from diffusion_policy.prediction import PREDICTIONS
from diffusion_policy.samplers import SAMPLERS, choose_levels
from diffusion_policy.schedules import SCHEDULES


class Shapes(NamedTuple):
    """What one step of the data looks like."""

    observations: dict[str, tuple[int, ...]]
    """Shape of each observation key."""
    action: tuple[int, ...]
    """(A,)"""


class DiffusionPolicy(nn.Module):
    """Draws action sequences given observations, by denoising."""

    def __init__(self, config: PolicyConfig, shapes: Shapes) -> None:
        """Raises ValueError when an action is not one row of numbers."""
        super().__init__()
        if len(shapes.action) != 1:
            raise ValueError(f"an action must be one row of numbers, (A,); got shape {shapes.action}")
        self.config = config
        self.shapes = shapes
        self.normalizer = Normalizer({**shapes.observations, "action": shapes.action})
        self.encoder = StateEncoder(shapes.observations, config.observation_horizon)
        self.network = TemporalUnet(
            shapes.action[0], self.encoder.cond_dim, config.widths, config.kernel_size, config.groups, config.level_dim
        )
        self.schedule = SCHEDULES[config.schedule](config.levels)
        self.prediction = PREDICTIONS[config.prediction]
        self.register_buffer("alpha", self.schedule.alpha.float(), persistent=False)  # (K,) on the policy's device
        self.register_buffer("sigma", self.schedule.sigma.float(), persistent=False)

    @classmethod
    def for_data(cls, config: PolicyConfig, data: Mapping[str, np.ndarray]) -> "DiffusionPolicy":
        """A new policy with shapes and normalizer taken from rows {`action` and each observation key: (steps, ...)}."""
        observations = {key: rows.shape[1:] for key, rows in data.items() if key != "action"}
        policy = cls(config, Shapes(observations, data["action"].shape[1:]))
        policy.normalizer.fit(data)
        return policy

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.get_buffer("alpha").device

    def encode(self, observations: Mapping[str, Tensor]) -> Tensor:
        """Raw observations {key: (B, To, ...)} → conditioning vectors (B, C)."""
        return self.encoder({key: self.normalizer.normalize(key, observations[key]) for key in self.encoder.keys})

    def loss(self, observations: Mapping[str, Tensor], actions: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the prediction at random levels (Ho et al. 2020, eq. 14), ().

        `observations`: raw {key: (B, To, ...)}; `actions`: raw (B, T, A); `generator` draws levels and noise, on
        the CPU.
        """
        x0 = self.normalizer.normalize("action", actions)
        level = torch.randint(self.config.levels, x0.shape[:1], generator=generator).to(x0.device)
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        alpha, sigma = (self.get_buffer(name)[level, None, None] for name in ("alpha", "sigma"))  # (B, 1, 1)
        output = self.network(alpha * x0 + sigma * eps, level, self.encode(observations))
        return nn.functional.mse_loss(output, self.prediction.target(x0, eps, alpha, sigma))

    @torch.no_grad()
    def sample(
        self,
        observations: Mapping[str, Tensor],
        generators: Sequence[torch.Generator],
        num_samples: int = 1,
        config: SampleConfig | None = None,
    ) -> Tensor:
        """Draw N action sequences for each observation: raw {key: (B, To, ...)} → raw (B, N, T, A).

        One CPU generator a row draws that row's noise: a row's result does not depend on its neighbours. Raises
        ValueError for more sampling steps than noise levels.
        """
        config = config or SampleConfig()
        sampler = SAMPLERS[config.sampler]
        levels = choose_levels(self.schedule, config.sampling_steps)
        draws = 1 + len(levels) if sampler.needs_noise else 1
        shape = (draws, num_samples, self.config.prediction_horizon, *self.shapes.action)
        rows = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        noise = rearrange(rows, "b draws n t a -> draws (b n) t a").to(self.device)
        cond = repeat(self.encode(observations), "b c -> (b n) c", n=num_samples)
        x0 = self.denoise_from(noise[0], cond, levels, noise[1:] if sampler.needs_noise else None, config.sampler)
        actions = self.normalizer.unnormalize("action", x0)
        return rearrange(actions, "(b n) t a -> b n t a", n=num_samples)

    def denoise_from(
        self, xT: Tensor, cond: Tensor, levels: Sequence[int], noise: Tensor | None, sampler: str
    ) -> Tensor:
        """The sampling loop alone, on normalized sequences (B, T, A): no random numbers and no synchronisation inside,
        so it compiles as one graph."""

        def denoise(xt: Tensor, level: int) -> Tensor:
            rows = torch.full(xt.shape[:1], level, device=xt.device)
            alpha, sigma = self.get_buffer("alpha")[level], self.get_buffer("sigma")[level]
            x0, _ = self.prediction.decode(self.network(xt, rows, cond), xt, alpha, sigma)
            return x0.clamp(-1, 1) if self.config.clip else x0

        return SAMPLERS[sampler].function(denoise, xT, self.schedule, levels, noise)


def derive_generator(*entropy: int) -> torch.Generator:
    """A CPU generator of its own for each sequence of numbers, such as (seed, repeat)."""
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def choose_device(name: str) -> torch.device:
    """`auto`: CUDA, then MPS, then the CPU. Raises ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"no device {name!r} here; choose from auto, cpu, cuda, mps (only what is present)")
    return device
