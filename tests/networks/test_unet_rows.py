"""The network for few rows against the one that it is made of."""

import pytest
import torch

from diffusion_policy.networks.unet import TemporalUnet
from diffusion_policy.networks.unet_rows import RowsUnet


def new_network(widths: tuple[int, ...] = (8, 16), kernel_size: int = 5, outputs: int | None = None) -> TemporalUnet:
    torch.manual_seed(0)
    return TemporalUnet(3, 5, widths, kernel_size=kernel_size, groups=4, level_dim=16, outputs=outputs)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize(
    "widths, horizons", [((8,), (1, 5, 16)), ((8, 16), (2, 6, 16)), ((8, 16, 8), (4, 12)), ((8, 8, 8, 8), (8,))]
)
def test_it_gives_what_the_network_gives(widths: tuple[int, ...], horizons: tuple[int, ...], kernel_size: int) -> None:
    network = new_network(widths, kernel_size)
    for horizon in horizons:
        rows = RowsUnet(network, horizon)
        for batch in (1, 3):
            xt, cond = torch.randn(batch, horizon, 3), torch.randn(batch, 5)
            level = torch.randint(0, 50, (batch,))
            torch.testing.assert_close(rows(xt, level, cond), network(xt, level, cond), rtol=1e-5, atol=1e-5)


def test_it_denoises_under_what_was_computed_once() -> None:
    network = new_network(outputs=6).double()
    rows = RowsUnet(network, 8)
    xt, cond, levels = torch.randn(3, 8, 3).double(), torch.randn(3, 5).double(), torch.tensor([9, 5, 0])
    films, expected = rows.condition(levels, cond), network.condition(levels, cond)
    for i in range(3):
        found = rows.denoise(xt, films.at(i))
        assert found.shape == (3, 8, 6)
        torch.testing.assert_close(found, network.denoise(xt, expected.at(i)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("horizon", [4, 16])
def test_sequences_of_another_length_are_refused(horizon: int) -> None:
    rows = RowsUnet(new_network(), 8)
    films = rows.condition(torch.zeros(1), torch.zeros(1, 5)).at(0)
    with pytest.raises(ValueError, match=f"laid out for sequences of 8 steps; got {horizon}"):
        rows.denoise(torch.zeros(1, horizon, 3), films)


def test_an_impossible_length_is_refused_as_by_the_network() -> None:
    with pytest.raises(ValueError, match="the prediction horizon must be a multiple of 4; got 6"):
        RowsUnet(new_network((8, 8, 8)), 6)


def test_what_is_learned_later_does_not_reach_it_and_it_is_not_trained() -> None:
    network = new_network()
    rows = RowsUnet(network, 8)
    xt, level, cond = torch.randn(2, 8, 3), torch.tensor([3, 7]), torch.randn(2, 5)
    films = [one.detach() for one in rows.condition(level, cond).at(...)]
    before = rows.denoise(xt, films)
    with torch.no_grad():
        for weight in network.middle.parameters():
            weight.add_(1)
    torch.testing.assert_close(rows.denoise(xt, films), before, rtol=0, atol=0)
    assert list(rows.parameters()) == []
    assert rows.undecayed_parameters() == []
