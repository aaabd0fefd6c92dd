"""What the network predicts: its target in training, and how its output becomes (x0, eps) in sampling.

Both halves of a prediction stand side by side, so that training and sampling cannot disagree.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """A prediction type. `alpha` and `sigma` broadcast against the sequences."""

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(x0, eps, alpha, sigma) → what the network should say."""
    decode: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(output, xt, alpha, sigma) → (x0, eps)."""


PREDICTIONS = {
    "noise": Prediction(
        target=lambda x0, eps, alpha, sigma: eps,
        decode=lambda output, xt, alpha, sigma: ((xt - sigma * output) / alpha, output),
    ),
}
