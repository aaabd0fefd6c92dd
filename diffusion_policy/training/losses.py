"""What a training step minimizes, and what is random in it.

All that is random is drawn for the whole batch, on the CPU, from a generator that derives from the seed and the step's
number; whoever computes some rows takes theirs. So a batch that is divided among processes, or into parts, is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diffusion_policy.basics.streams import derive_entropy
from diffusion_policy.datasets.windows import Batch, send
from diffusion_policy.diffusion.objectives import Classifying
from diffusion_policy.diffusion.process import Noising, mean_square
from diffusion_policy.policy import DiffusionPolicy


class Draws(NamedTuple):
    """The random numbers of one batch."""

    noising: Noising
    """Of R sequences for each row, one after the other."""
    dropped: Tensor
    """Which of the sequences to denoise lose their condition, (B R,) bool."""
    augmentation: Tensor | None = None
    """How the images of each row are changed, see `DiffusionPolicy.encode`."""
    repeats: int = 1
    """R: how often each row is noised."""

    def rows(self, first: int, last: int) -> Draws:
        """Those of some rows."""
        augmentation = None if self.augmentation is None else self.augmentation[first:last]
        several = self._map(lambda part: part[first * self.repeats : last * self.repeats])
        return several._replace(augmentation=augmentation)

    def to(self, device: torch.device) -> Draws:
        """The same on a device."""
        return self._map(lambda part: send(part, device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Draws:
        noising = Noising(*(None if part is None else change(part) for part in self.noising))  # pyright: ignore
        augmentation = None if self.augmentation is None else change(self.augmentation)
        return self._replace(noising=noising, dropped=change(self.dropped), augmentation=augmentation)


Loss = Callable[[DiffusionPolicy, Batch, Draws], Tensor]
"""The loss of each window, (B,)."""


def draw(
    policy: DiffusionPolicy, rows: int, generator: torch.Generator, learning: bool = True, repeats: int = 1
) -> Draws:
    """The random numbers for so many windows, each noised `repeats` times; for `learning`, conditions are dropped and
    images changed as the policy's options say."""
    share, count = policy.config.condition_dropout if learning else 0.0, rows * repeats
    dropped = torch.rand(count, generator=generator) < share if share else torch.zeros(count, dtype=torch.bool)
    shape = (count, *policy.sequences.shape)
    noising = policy.diffusion.draw(shape, generator)
    if policy.config.max_delay:
        delay = torch.randint(policy.config.max_delay + 1, (count, 1), generator=generator)
        step = torch.arange(shape[1]) - (policy.config.observation_horizon - 1)  # from now
        noising = noising._replace(known=((step >= 0) & (step < delay))[..., None])
    return Draws(noising, dropped, policy.draw_augmentation(rows, generator) if learning else None, repeats)


def denoising_loss(policy: DiffusionPolicy, batch: Batch, draws: Draws) -> Tensor:
    """Squared error of the prediction at random levels, (B,); see `Diffusion.loss`. What is observed is encoded once,
    however often a window is noised. Inverse dynamics add the squared error of their actions. Raises ValueError where a
    policy that is conditioned on modes or instructions gets none."""
    if policy.labels and batch.labels is None:
        what = "condition-on-mode is trained with the modes"
        if policy.instructions:
            what = "condition-on-instruction is trained with the instructions"
        raise ValueError(f"a policy with {what} of its windows; got none")
    draws = draws.to(policy.device)
    encoded = policy.encode(batch.observations, batch.labels, draws.augmentation)
    rows = policy.sequences.normalize_steps(batch.actions, batch.observations)
    normalized = policy.sequences.shorten(rows)
    cond, x0 = (part.repeat_interleave(draws.repeats, dim=0) for part in (encoded, normalized))
    if policy.config.condition_dropout:
        cond = torch.where(draws.dropped[:, None], policy.unconditional(cond), cond)
    counted = None
    if batch.demonstrated is not None:
        counted = policy.sequences.keep(batch.demonstrated[..., None]).repeat_interleave(draws.repeats, dim=0)
    noising = draws.noising._replace(counted=counted, held=policy.sequences.held)
    losses = policy.diffusion.loss(policy.network, x0, cond, noising)
    losses = losses.unflatten(0, (-1, draws.repeats)).mean(dim=1)
    errors = policy.sequences.inverse_errors(rows)
    demonstrated = None if batch.demonstrated is None else batch.demonstrated[..., None]
    return losses if errors is None else losses + mean_square(errors, demonstrated)


def autoencoding_loss(policy: DiffusionPolicy, batch: Batch, draws: Draws) -> Tensor:
    """The loss of a policy's autoencoder, (B,); see `networks.autoencoder`."""
    assert policy.autoencoder is not None
    sequences = policy.sequences.normalize_steps(batch.actions, batch.observations)
    return policy.autoencoder.loss(sequences, draws.to(policy.device).noising.eps, policy.config.latent.latent_kl)


def classifying_loss(policy: DiffusionPolicy, batch: Batch, draws: Draws) -> Tensor:
    """Cross-entropy of the mode of a noised window, 0 for one without mode, (B,). [nats] What a network is told beside
    the sequence are the observations alone."""
    assert batch.labels is not None
    assert isinstance(policy.diffusion, Classifying)
    draws = draws.to(policy.device)
    encoded = policy.encode(batch.observations, None, draws.augmentation)
    normalized = policy.sequences.normalize(batch.actions, batch.observations)
    cond, x0, labels = (part.repeat_interleave(draws.repeats, dim=0) for part in (encoded, normalized, batch.labels))
    level, eps = draws.noising.level, draws.noising.eps.to(x0)
    alpha, sigma = policy.diffusion.tables(level, x0)
    found = policy.diffusion.log_probabilities(policy.network, alpha * x0 + sigma * eps, level, cond)
    losses = functional.nll_loss(found, labels.to(found.device), ignore_index=-1, reduction="none")
    return losses.unflatten(0, (-1, draws.repeats)).mean(dim=1)


OWN_LOSSES: dict[str, Loss] = {"autoencoding": autoencoding_loss, "classifying": classifying_loss}
"""Of the objectives that sample nothing."""


def derive_generator(tag: str, *numbers: int) -> torch.Generator:
    """A CPU generator of its own for each tag and sequence of numbers, such as ("planning", seed, repeat). All its
    state is filled, since `manual_seed` takes 32 bits of a seed, by which some of 100,000 streams would be the same."""
    generator = torch.Generator()
    state = generator.manual_seed(0).get_state()
    state[24 : 24 + 8 * 624].view(torch.int64).copy_(
        torch.from_numpy(derive_entropy(tag, *numbers).generate_state(624).astype(np.int64))  # the Mersenne Twister's
    )
    return generator.set_state(state)
