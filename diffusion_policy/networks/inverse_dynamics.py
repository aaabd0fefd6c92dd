"""The action that leads from one state to the next, where diffusion is over states alone (Ajay et al. 2023, arXiv
2211.15657, section 3.1).

    normalized states (B, T, S) → normalized actions (B, T, A)

Knows tensors.
"""

import torch
from torch import Tensor, nn

WIDTH = 256
"""Of its two hidden layers."""


class InverseDynamics(nn.Module):
    """An MLP of each state and the next one; the last state is its own next one."""

    def __init__(self, states: int, actions: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * states, WIDTH), nn.Mish(), nn.Linear(WIDTH, WIDTH), nn.Mish(), nn.Linear(WIDTH, actions)
        )

    def forward(self, states: Tensor) -> Tensor:
        following = torch.cat([states[:, 1:], states[:, -1:]], dim=1)
        seen = torch.cat([states, following - states], dim=-1)
        return self.mlp(seen.to(next(self.parameters()))).to(states)
