"""Networks and encoders by the `kind` of their options. A new one is a file here, its options in `config`, and a line.

A network takes (target_dim, cond_parts, steps, outputs=..., and its own options) and promises what
`diffusion.process.Network` says; an encoder takes the shape of one step, and has `numbers`, how many features a step
becomes. Encoders of images are in `vision`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from diffusion_policy.networks.encoders import CondPart, StateEncoder
from diffusion_policy.networks.transformer import TemporalTransformer
from diffusion_policy.networks.unet import TemporalUnet
from diffusion_policy.networks.unet_rows import RowsUnet


def make_unet(target_dim: int, cond_parts: Sequence[CondPart], steps: int, **options: Any) -> TemporalUnet:
    """A U-Net takes a condition as one vector, and any sequence whose length it can halve as often as it must."""
    network = TemporalUnet(target_dim, sum(map(math.prod, cond_parts)), **options)
    network.require_steps(steps)
    return network


NETWORKS: dict[str, Callable[..., Any]] = {"unet": make_unet, "transformer": TemporalTransformer}
ENCODERS: dict[str, Callable[..., Any]] = {"state": StateEncoder}
FOR_FEW_ROWS: dict[type, Callable[[Any, int], Any]] = {TemporalUnet: RowsUnet}
"""The form of a network, with its weights as they are, for few sequences of T steps on the CPU, by its type."""
