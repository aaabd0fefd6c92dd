import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion_policy.networks import layers
from diffusion_policy.networks.layers import Conv, ConvTranspose, Mish, arrange
from diffusion_policy.networks.unet import TemporalUnet


def with_gradients(layer: nn.Module, x: Tensor, *others: Tensor) -> list[Tensor]:
    """What a layer makes of x, and the gradients of x and of its weights."""
    x = x.clone().requires_grad_()
    y = layer(x, *others)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)]


@pytest.mark.parametrize("dtype, most", [(torch.float32, 5e-6), (torch.float64, 0.0), (torch.bfloat16, 2**-7)])
def test_mish_is_that_of_torch(dtype: torch.dtype, most: float) -> None:
    many = torch.linspace(-30, 30, layers.MANY_NUMBERS).to(dtype)
    far = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], dtype=dtype).repeat(layers.MANY_NUMBERS // 4)
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
    x = torch.randn(layers.MANY_NUMBERS, requires_grad=True)
    with pytest.raises(RuntimeError, match="this Mish has no second derivative; compute it in float64"):
        torch.autograd.grad(Mish()(x).sum(), x, create_graph=True)
    x = x.detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(Mish()(x).sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("kernel_size, stride, padding", [(5, 1, 2), (3, 2, 1), (1, 1, 0)])
def test_a_convolution_of_images_is_that_of_sequences(kernel_size: int, stride: int, padding: int) -> None:
    x = torch.randn(layers.MANY_ROWS, 6, 8)
    for conv in (Conv(6, 4, kernel_size, stride, padding), ConvTranspose(6, 4, kernel_size, stride, padding)):
        as_image = with_gradients(nn.Sequential(Arranged(), conv, nn.Flatten(2)), x)
        for mine, other in zip(as_image, with_gradients(conv, x), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-5)


class Arranged(nn.Module):
    """See `arrange`."""

    def forward(self, x: Tensor) -> Tensor:
        arranged = arrange(x)
        assert arranged.shape == (len(x), x.shape[1], 1, x.shape[2])
        assert arranged.is_contiguous(memory_format=torch.channels_last)
        return arranged


def test_a_network_learns_the_same_from_images_as_from_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    network = TemporalUnet(3, 5, (8, 16, 32), groups=4, level_dim=16)
    xt, level, cond = torch.randn(70, 8, 3), torch.arange(70), torch.randn(70, 5)
    found = []
    for many in (64, 1000):
        monkeypatch.setattr(layers, "MANY_ROWS", many)
        found.append(with_gradients(network, xt, level, cond))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-4)
    seen = []
    network.middle.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].ndim))
    monkeypatch.setattr(layers, "MANY_ROWS", 64)
    network(xt, level, cond)
    network(xt[:63], level[:63], cond[:63])
    network.eval()(xt, level, cond)
    with torch.no_grad():
        network.train()(xt, level, cond)
    assert seen == [4, 3, 3, 3]
