"""Networks and encoders by the `kind` of their options. A new one is a file here, its options in `config`, and a line.

A network takes (target_dim, cond_dim, outputs=..., and its own options) and promises what `diffusion.process.Network`
says; an encoder takes (shape, observation_horizon), and has `features`.
"""

from collections.abc import Callable
from typing import Any

from diffusion_policy.networks.encoders import StateEncoder
from diffusion_policy.networks.unet import TemporalUnet
from diffusion_policy.networks.unet_rows import RowsUnet

NETWORKS: dict[str, Callable[..., Any]] = {"unet": TemporalUnet}
ENCODERS: dict[str, Callable[..., Any]] = {"state": StateEncoder}
FOR_FEW_ROWS: dict[type, Callable[[Any, int], Any]] = {TemporalUnet: RowsUnet}
"""The form of a network, with its weights as they are, for few sequences of T steps on the CPU, by its type."""
