"""What a training step minimizes where the policy learns to go on from given actions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_policy.config import PolicyConfig, with_options
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.diffusion.prediction import PREDICTIONS
from diffusion_policy.diffusion.process import Diffusion, Noising
from diffusion_policy.diffusion.schedules import cosine
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training.losses import Draws, denoising_loss, draw


def make_policy(max_delay: int) -> DiffusionPolicy:
    config = with_options(PolicyConfig(), widths=(8, 16), level_dim=16, observation_horizon=3, max_delay=max_delay)
    rng = np.random.default_rng(0)
    return DiffusionPolicy.for_data(config, {"state": rng.normal(size=(60, 4)), "action": rng.normal(size=(60, 2))})


def test_delays_up_to_the_longest_are_drawn_and_mark_the_steps_from_now_on() -> None:
    draws = draw(make_policy(5), 600, torch.Generator().manual_seed(0))
    known = draws.noising.known
    assert known is not None
    assert known.shape == (600, 16, 1)
    delays = known.sum(dim=(1, 2))
    assert sorted(delays.unique().tolist()) == list(range(6))
    assert ((torch.bincount(delays) - 100).abs() < 40).all()
    for row, delay in zip(known[:20, :, 0].tolist(), delays.tolist(), strict=False):
        assert row == [2 <= step < 2 + delay for step in range(16)]
    part = draws.rows(3, 7).noising.known
    assert part is not None
    assert torch.equal(part, known[3:7])


def test_a_policy_without_delay_draws_what_it_always_did() -> None:
    draws = [draw(make_policy(delay), 8, torch.Generator().manual_seed(0)).noising for delay in (0, 3)]
    assert draws[0].known is None
    assert torch.equal(draws[0].level, draws[1].level)
    assert torch.equal(draws[0].eps, draws[1].eps)


def test_the_network_sees_given_steps_clean_and_marked_and_its_loss_is_of_the_others() -> None:
    x0, eps = torch.randn(2, 4, 6, 2, generator=torch.Generator().manual_seed(0))
    known = torch.zeros(4, 6, 1, dtype=torch.bool)
    known[1, 1:3], known[2, :5] = True, True
    seen: list[Tensor] = []

    class Network:
        def __call__(self, xt: Tensor, level: Tensor, cond: Tensor) -> Tensor:
            seen.append(xt)
            return torch.where(known, 1e6, 0.0).expand(4, 6, 2)

    diffusion = Diffusion(cosine(10), PREDICTIONS["noise"])
    loss = diffusion.loss(Network(), x0, torch.zeros(4, 1), Noising(torch.arange(4), eps, known))  # type: ignore[arg-type]
    assert torch.equal(seen[0][..., 2:], known.float())
    assert torch.equal(seen[0][1, 1:3, :2], x0[1, 1:3])
    assert not torch.equal(seen[0][1, 3:, :2], x0[1, 3:])
    squares = eps.square()
    expected = [squares[0].mean(), squares[1, [0, 3, 4, 5]].mean(), squares[2, 5].mean(), squares[3].mean()]
    torch.testing.assert_close(loss, torch.stack(expected))


@pytest.mark.parametrize("options", [{}, {"condition_dropout": 0.5}, {"max_delay": 3}], ids=["", "dropout", "delay"])
def test_a_window_that_is_noised_often_has_the_mean_loss_and_is_encoded_once(options: dict, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    data = {"state": rng.normal(size=(30, 4)), "action": rng.normal(size=(30, 2))}
    config = replace(with_options(PolicyConfig(), widths=(8, 16), level_dim=16), **options)
    policy = DiffusionPolicy.for_data(config, data)
    batch = Windows(data, np.array([12, 30]), [0, 1], 2, 16, mark_padding=True).gather([0, 8, 14])
    draws = draw(policy, 3, torch.Generator().manual_seed(1), repeats=4)
    assert len(draws.dropped) == len(draws.noising.eps) == 12
    singly = torch.cat([denoising_loss(policy, batch.part(i // 4, i // 4 + 1), only(draws, i)) for i in range(12)])
    encoded: list[tuple] = []
    monkeypatch.setattr(
        policy, "encode", lambda *given: encoded.append(given) or DiffusionPolicy.encode(policy, *given)
    )
    losses = denoising_loss(policy, batch, draws)
    assert len(encoded) == 1
    torch.testing.assert_close(losses, singly.reshape(3, 4).mean(dim=1))
    torch.testing.assert_close(denoising_loss(policy, batch.part(1, 3), draws.rows(1, 3)), losses[1:])


def only(draws: Draws, place: int) -> Draws:
    """A single noising of a single row."""
    noising = Noising(*(None if part is None else part[place : place + 1] for part in draws.noising))
    return Draws(noising, draws.dropped[place : place + 1])
