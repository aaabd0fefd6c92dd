import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion_policy.networks import layers
from diffusion_policy.networks.layers import GroupNorm, Mish


def with_gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What a layer makes of x, and the gradients of x and of its weights."""
    x = x.clone().requires_grad_()
    y = layer(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)]


@pytest.mark.parametrize("dtype, most", [(torch.float32, 5e-6), (torch.float64, 0.0), (torch.bfloat16, 2**-7)])
def test_mish_is_that_of_torch(dtype: torch.dtype, most: float) -> None:
    many = torch.linspace(-30, 30, layers.MANY).to(dtype)
    far = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], dtype=dtype).repeat(layers.MANY // 4)
    for x in (many, far, many[::100]):
        for mine, other in zip(with_gradients(Mish(), x), with_gradients(nn.Mish(), x), strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine, other, atol=most, rtol=most)
        torch.testing.assert_close(Mish()(x), functional.mish(x), atol=0, rtol=0)  # without gradients


def test_mish_is_the_same_where_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.linspace(-30, 30, 1000)
    for mine, other in zip(with_gradients(Mish(), x), with_gradients(nn.Mish(), x), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_a_second_derivative_of_mish_is_refused_rather_than_wrong() -> None:
    x = torch.randn(layers.MANY, requires_grad=True)
    with pytest.raises(RuntimeError, match="this Mish has no second derivative; compute it in float64"):
        torch.autograd.grad(Mish()(x).sum(), x, create_graph=True)
    x = x.detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(Mish()(x).sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("rows", [1, 5])
def test_group_norm_is_that_of_torch(steps: int, rows: int) -> None:
    mine, other = GroupNorm(4, 16), nn.GroupNorm(4, 16)
    nn.init.normal_(mine.weight)
    other.load_state_dict(mine.state_dict())
    x = torch.randn(rows, 16, steps)
    for a, b in zip(with_gradients(mine, x), with_gradients(other, x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(mine(x), other(x))
