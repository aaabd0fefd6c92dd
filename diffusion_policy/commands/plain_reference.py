"""The field's usual code, to measure against: each denoising step calls the whole network, and a scheduler of diffusers
makes the step; a training step is written out. The same weights and the same arithmetic as ours."""

from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusion_policy.config import SampleConfig
from diffusion_policy.control.planner import Steering
from diffusion_policy.policy import DiffusionPolicy

KINDS: dict[str, Any] = {"noise": "epsilon", "sample": "sample", "velocity": "v_prediction"}
"""Predictions by diffusers' names."""


class Scheduler(Protocol):
    """What takes a denoising step."""

    def step(
        self, model_output: Tensor, timestep: int, sample: Tensor, *, use_clipped_model_output: bool = False
    ) -> Any:
        """A result with `prev_sample`."""
        ...


class PlainSampling:
    """DDIM as Diffusion Policy's code runs it: network and scheduler in turn. See `control.policy_planner.Sample`."""

    guides = False

    def __init__(self, policy: DiffusionPolicy, sampling: SampleConfig) -> None:
        """Raises ImportError without diffusers, ValueError for what its DDIM cannot do as ours does."""
        self._policy, self._sampling = policy, sampling
        _, self._levels = policy.resolve_sampling(sampling)
        self._scheduler = make_scheduler(policy, sampling)
        self._next = dict(zip(self._levels, [*self._levels[1:], -1], strict=True))

    @torch.no_grad()
    def __call__(self, observations: dict[str, Tensor], noise: np.ndarray, steering: Steering | None = None) -> Tensor:
        """See `Sample`; it is not steered."""
        policy = self._policy
        xt = rearrange(torch.from_numpy(noise), "b n 1 t d -> (b n) t d").to(policy.device)
        cond = repeat(policy.encode(observations), "b c -> (b n) c", n=noise.shape[1])
        for level in self._levels:
            output = policy.network(xt, torch.full((len(xt),), level, device=xt.device), cond)
            xt = self._scheduler.step(output, level, xt, use_clipped_model_output=True).prev_sample
        return policy.sequences.unnormalize(xt, noise.shape[1], observations)


def make_scheduler(policy: DiffusionPolicy, sampling: SampleConfig) -> Scheduler:
    """diffusers' DDIM on this policy's schedule and levels; raises as `PlainSampling`."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    prediction, levels = policy.config.prediction, policy.config.noise_levels
    if sampling.sampler != "ddim" or sampling.eta or sampling.guidance or sampling.corrector_steps:
        raise ValueError("the reference samples with ddim, without eta, guidance and corrector")
    _, chosen = policy.resolve_sampling(sampling)
    if prediction not in KINDS or policy.config.learn_variance:
        raise ValueError("the reference takes noise, sample and velocity prediction")
    if policy.config.objective != "denoising" or policy.config.max_delay:
        raise ValueError("the reference denoises, and has no --max-delay")
    kept = policy.diffusion.schedule.alpha.double() ** 2  # ᾱ
    betas = 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    scheduler = DDIMScheduler(
        levels,
        trained_betas=betas.numpy(),
        prediction_type=KINDS[prediction],
        clip_sample=policy.choose_clip(sampling) == "static",
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(len(chosen))
    if scheduler.timesteps.tolist() != chosen:
        raise ValueError("the reference takes trailing levels")
    return scheduler


class PlainTraining:
    """A training step written out: AdamW with clipped gradients and EMA weights, on a batch that lies ready."""

    def __init__(self, policy: DiffusionPolicy, batch: Any) -> None:
        self._policy, self._batch = policy, batch
        self._weights = list(policy.parameters())
        self._ema = [weight.detach().clone() for weight in self._weights]
        self._optimizer = torch.optim.AdamW(self._weights, lr=1e-4, betas=(0.95, 0.999))

    def step(self) -> Tensor:
        """The loss, ()."""
        policy, batch = self._policy, self._batch
        cond = policy.encode(batch.observations, batch.labels)
        x0 = policy.sequences.normalize(batch.actions, batch.observations)
        loss = self._denoise(x0, cond) if policy.config.objective == "denoising" else self._learn(x0, cond)
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        with torch.no_grad():
            for average, weight in zip(self._ema, self._weights, strict=True):
                average.lerp_(weight, 0.01)
        return loss.detach()

    def _denoise(self, x0: Tensor, cond: Tensor) -> Tensor:
        """As loops of others are written."""
        policy = self._policy
        level = torch.randint(policy.config.noise_levels, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        alpha, sigma = policy.diffusion.tables(level, x0)
        output = policy.network(alpha * x0 + sigma * eps, level, cond)
        target = policy.diffusion.prediction.target(x0, eps, alpha, sigma)
        return torch.nn.functional.mse_loss(output[..., : x0.shape[-1]], target)

    def _learn(self, x0: Tensor, cond: Tensor) -> Tensor:
        """By another objective, which no loop of others has."""
        diffusion = self._policy.diffusion
        noising = diffusion.draw(x0.shape, torch.Generator().manual_seed(0))
        noising = noising._replace(level=noising.level.to(x0.device))
        return diffusion.loss(self._policy.network, x0, cond, noising).mean()


class PlainWindows(Dataset[dict[str, np.ndarray]]):
    """Windows one by one, as a torch `Dataset` gives them to a `DataLoader`."""

    def __init__(self, data: dict[str, np.ndarray], ends: np.ndarray, before: int, horizon: int) -> None:
        """`before`: To − 1; `horizon`: T."""
        self._data, self._before, self._horizon = data, before, horizon
        starts = np.concatenate([[0], ends[:-1]])
        self._spans = [(start, end) for start, end in zip(starts, ends, strict=True) for _ in range(end - start)]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, now: int) -> dict[str, np.ndarray]:
        start, end = self._spans[now]
        rows = np.clip(np.arange(now - self._before, now - self._before + self._horizon), start, end - 1)
        seen = {key: array[rows[: self._before + 1]] for key, array in self._data.items() if key != "action"}
        return seen | {"action": self._data["action"][rows]}


def plain_loader(windows: PlainWindows, batch_size: int) -> DataLoader[Any]:
    """Batches of it in random order, in this process."""
    return DataLoader(windows, batch_size, shuffle=True, drop_last=True)
