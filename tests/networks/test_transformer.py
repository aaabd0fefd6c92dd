"""The diffusion transformer: identity at the start, what it is told, and what it is told by."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from diffusion_policy.networks.encoders import CondPart
from diffusion_policy.networks.transformer import TemporalTransformer

PARTS = CondPart(2, 3), CondPart(2, 1), CondPart(1, 2)
"""Two keys of two observed steps, and marks."""
C = 10
FORMS = "adaln", "cross-attention"


def make(
    conditioning: str = "adaln", steps: int = 7, parts: Sequence[CondPart] = PARTS, **options
) -> TemporalTransformer:
    """As it is before any training."""
    torch.manual_seed(0)
    options = {"width": 16, "layers": 2, "heads": 2, "level_dim": 16} | options
    return TemporalTransformer(3, parts, steps, conditioning=conditioning, **options).double()


def trained(conditioning: str, **options) -> TemporalTransformer:
    """With weights of about one tenth where there were zeros, and nothing that makes two inputs alike."""
    network = make(conditioning, **options)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.3)
    return network


def inputs(rows: int = 2, steps: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    xt, cond = (torch.randn(rows, *shape, generator=generator).double() for shape in ((steps, 3), (C,)))
    return xt, torch.arange(rows).double() * 9 + 1, cond


@pytest.mark.parametrize("conditioning", FORMS)
def test_a_new_network_says_zero_and_its_blocks_pass_everything_on_as_it_is(conditioning: str) -> None:
    network, (xt, level, cond) = make(conditioning), inputs()
    before, after = [], []
    network.blocks[0].register_forward_pre_hook(lambda _, given: before.append(given[0]))
    for block in network.blocks:
        block.register_forward_hook(lambda _, given, found: after.append(found))
    assert (network(xt, level, cond) == 0).all()
    assert len(after) == 2
    assert all(torch.equal(one, before[0]) for one in after)
    torch.testing.assert_close(before[0], network.embed(xt) + network.positions)


@pytest.mark.parametrize("conditioning", FORMS)
def test_a_closed_gate_leaves_the_token_as_it_was_whatever_scale_and_shift_are(conditioning: str) -> None:
    """Not the normalized and modulated token, which is easily written over it."""
    block = trained(conditioning).blocks[0]
    sublayers = 3 if conditioning == "cross-attention" else 2
    vectors = torch.randn(2, sublayers, 3, 16).double()
    vectors[:, :, 2] = 0
    films = [vectors.flatten(1)] + [torch.randn(2, 5 * 32).double()] * (sublayers == 3)
    x = torch.randn(2, 7, 16).double()
    assert torch.equal(block(x, *films), x)
    for sublayer in range(sublayers):
        vectors[:, sublayer, 2] = 1
        assert not torch.allclose(block(x, vectors.flatten(1), *films[1:]), x)
        vectors[:, sublayer, 2] = 0


@pytest.mark.parametrize("conditioning", FORMS)
def test_every_weight_learns_and_every_input_matters(conditioning: str) -> None:
    network, (xt, level, cond) = trained(conditioning), inputs()
    given = [one.requires_grad_() for one in (xt, level, cond)]
    network(*given).square().sum().backward()
    for tensor in (*given, *network.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0
    assert cond.grad is not None
    assert (cond.grad != 0).all()  # each number of each key at each observed step, and each mark


@pytest.mark.parametrize("conditioning", FORMS)
def test_what_does_not_depend_on_the_sequence_is_computed_once_and_gives_the_same(conditioning: str) -> None:
    network, (xt, _, cond) = trained(conditioning), inputs(3)
    levels = torch.tensor([9.0, 5.0, 0.0, 1.0]).double()
    films = network.condition(levels, cond)
    assert all(one.shape == (4, other.shape[1]) for one, other in zip(films.of_levels, films.of_cond, strict=True))
    assert all(len(one) == 3 for one in films.of_cond)
    for i, level in enumerate(levels):
        expected = network(xt, level.expand(3), cond)
        torch.testing.assert_close(network.denoise(xt, films.at(i)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("conditioning", FORMS)
def test_rows_of_a_batch_do_not_mix_and_all_steps_of_a_row_do(conditioning: str) -> None:
    network, (xt, level, cond) = trained(conditioning), inputs(3)
    together = network(xt, level, cond)
    alone = torch.cat([network(xt[i : i + 1], level[i : i + 1], cond[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)
    for step in (0, 6):  # backwards in time too
        changed = xt.clone()
        changed[:, step, 0] += 1  # another direction than the one that the norm takes away
        assert ((network(changed, level, cond) - together).abs().amax(dim=2) > 1e-9).all()


def test_the_order_of_steps_matters_and_that_of_the_tokens_it_attends_to_does_not() -> None:
    network, (xt, level, cond) = trained("cross-attention"), inputs()
    films = network.condition(level, cond).at(...)
    turned = [
        one.unflatten(1, (5, 32)).flip(1).flatten(1) if i in (1, 3) else one  # keys and values of the two blocks
        for i, one in enumerate(films)
    ]
    expected = network.denoise(xt, films)
    torch.testing.assert_close(network.denoise(xt, turned), expected)
    assert not torch.allclose(network.denoise(xt.flip(1), films).flip(1), expected)


def test_a_token_is_made_of_one_row_of_the_condition() -> None:
    network, (_, _, cond) = trained("cross-attention"), inputs()
    assert network.observe is not None
    tokens = network.observe(cond)
    rows = [range(0, 3), range(3, 6), range(6, 7), range(7, 8), range(8, 10)]
    assert tokens.shape == (2, len(rows), 16)
    for i, columns in enumerate(rows):
        changed = cond.clone()
        changed[:, columns] += 1
        differs = (network.observe(changed) != tokens).any(dim=2)
        assert differs.tolist() == [[j == i for j in range(len(rows))]] * 2


@pytest.mark.parametrize("conditioning", FORMS)
@pytest.mark.parametrize("steps", [1, 7, 33])
def test_any_horizon(conditioning: str, steps: int) -> None:
    network, (xt, level, cond) = make(conditioning, steps, outputs=6), inputs(2, steps)
    assert network(xt, level, cond).shape == (2, steps, 6)
    with pytest.raises(ValueError, match=f"this network is for sequences of {steps} steps; got {steps + 1}"):
        network(torch.zeros(2, steps + 1, 3).double(), level, cond)


@pytest.mark.parametrize("conditioning", FORMS)
def test_weight_decay_leaves_out_biases_and_positions_and_nothing_else(conditioning: str) -> None:
    network = make(conditioning)
    without = {id(weight) for weight in network.undecayed_parameters()}
    names = {name for name, weight in network.named_parameters() if id(weight) in without}
    assert names == {n for n, _ in network.named_parameters() if n.endswith(("bias", "positions"))}
    assert not any("norm" in name for name, _ in network.named_parameters())  # they have no weights
    assert len(network.undecayed_parameters()) == len(without)


def test_dropout_acts_in_training_only_and_follows_the_seed() -> None:
    network, given = trained("cross-attention", dropout=0.5), inputs()

    def run() -> torch.Tensor:
        torch.manual_seed(3)
        return network(*given)

    learning = run()
    assert torch.equal(run(), learning)
    network.eval()
    assert not torch.allclose(run(), learning)
    assert torch.equal(network(*given), network(*given))
