"""What commands that can let a server plan are told of it."""

from dataclasses import dataclass
from pathlib import Path

from diffusion_policy.config import ConfigError


@dataclass(frozen=True)
class RemoteOptions:
    """Where a policy server is, and how long it is waited for."""

    server: str | None = None
    """Address of a `diffusion-policy serve` that plans, such as ws://robot-lab:8000. It must serve the same weights,
    sampled the same way."""
    api_key_file: Path | None = None
    """File that holds the server's key; without it the environment variable DIFFUSION_POLICY_API_KEY."""
    server_deadline: float = 10.0
    """How long the server may take for a plan before that is said, and it is asked again [s]."""
    server_patience: float = 60.0
    """How long a server that does not answer is asked again before the command ends [s]."""

    def __post_init__(self) -> None:
        if not 0 < self.server_deadline < float("inf"):
            raise ConfigError(f"server-deadline must be above 0; got {self.server_deadline}")
        if not 0 <= self.server_patience < float("inf"):
            raise ConfigError(f"server-patience must be at least 0; got {self.server_patience}")
