import pytest
import torch

from diffusion_policy.networks.blocks import LevelEmbedding, ResidualBlock
from diffusion_policy.networks.encoders import StateEncoder
from diffusion_policy.networks.layers import mish
from diffusion_policy.networks.unet import TemporalUnet


@pytest.mark.parametrize("widths, horizon", [((8,), 1), ((8,), 5), ((8, 16), 6), ((8, 16, 32), 4), ((8, 8, 8, 8), 16)])
def test_any_number_of_resolutions_keeps_the_shape(widths: tuple[int, ...], horizon: int) -> None:
    network = TemporalUnet(3, 5, widths, groups=4, level_dim=16)
    output = network(torch.randn(2, horizon, 3), torch.tensor([0, 9]), torch.randn(2, 5))
    assert output.shape == (2, horizon, 3)


def test_every_weight_learns_and_every_input_matters() -> None:
    network = TemporalUnet(2, 4, (8, 16), groups=4, level_dim=16)
    inputs = [torch.randn(2, 8, 2, requires_grad=True), torch.randn(2, 4, requires_grad=True)]
    level = torch.tensor([1.0, 7.0], requires_grad=True)
    network(inputs[0], level, inputs[1]).square().sum().backward()
    for tensor in (*inputs, level, *network.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_rows_of_a_batch_do_not_mix() -> None:
    network = TemporalUnet(2, 4, (8, 16), groups=4, level_dim=16).double()
    xt, level, cond = torch.randn(3, 8, 2).double(), torch.tensor([1.0, 5.0, 9.0]).double(), torch.randn(3, 4).double()
    together = network(xt, level, cond)
    alone = torch.cat([network(xt[i : i + 1], level[i : i + 1], cond[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_an_impossible_horizon_is_one_sentence() -> None:
    network = TemporalUnet(2, 4, (8, 8, 8), groups=4, level_dim=16)
    with pytest.raises(ValueError, match="the prediction horizon must be a multiple of 4; got 6"):
        network(torch.randn(1, 6, 2), torch.zeros(1), torch.randn(1, 4))


def test_the_published_size_has_about_the_published_number_of_weights() -> None:
    """(256, 512, 1024), kernel 5, level embedding 256, condition 40: 65.8 M there. Ours has the skip connection of the
    full resolution in the place of that of the lowest one."""
    with torch.device("meta"):
        network = TemporalUnet(2, 40, (256, 512, 1024), level_dim=256)
    assert sum(weight.numel() for weight in network.parameters()) == pytest.approx(65.8e6, rel=0.06)


def test_level_embeddings_differ_between_levels() -> None:
    embedded = LevelEmbedding(32)(torch.arange(100))
    distances = torch.cdist(embedded, embedded) + torch.eye(100)
    assert distances.min() > 1e-4


def test_the_encoder_lays_the_observed_steps_side_by_side() -> None:
    encoder = StateEncoder((3, 2))
    encoded = encoder(torch.arange(12.0).reshape(1, 2, 3, 2))
    assert encoded.shape == (1, 2 * encoder.numbers) == (1, 12)
    assert encoded[0].tolist() == list(range(12))


def test_what_does_not_depend_on_the_sequence_is_computed_once_and_gives_the_same() -> None:
    network = TemporalUnet(2, 4, (8, 16), groups=4, level_dim=16).double()
    xt, cond = torch.randn(3, 8, 2).double(), torch.randn(3, 4).double()
    levels = torch.tensor([9.0, 5.0, 0.0]).double()
    films = network.condition(levels, cond)
    for i, level in enumerate(levels):
        expected = network(xt, level.expand(3), cond)
        torch.testing.assert_close(network.denoise(xt, films.at(i)), expected, rtol=1e-12, atol=1e-12)


def test_a_linear_layer_of_two_vectors_is_the_sum_of_one_of_each() -> None:
    block = ResidualBlock(4, 8, 6, 5, kernel_size=3, groups=2).double()
    level, cond = torch.randn(3, 6).double(), torch.randn(3, 5).double()
    of_level, of_cond = block.condition(mish(level), mish(cond))
    torch.testing.assert_close(of_level + of_cond, block.film(torch.cat([level, cond], dim=-1)))
