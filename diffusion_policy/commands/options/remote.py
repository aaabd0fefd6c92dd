"""What commands that can let a server plan are told of it."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from diffusion_policy.config import ConfigError, CostConfig


@dataclass(frozen=True)
class RemoteOptions:
    """Where a policy server is, and how long it is waited for."""

    server: str | None = None
    """Address of a `diffusion-policy serve` that plans, such as ws://robot-lab:8000. It must serve the same weights,
    sampled the same way."""
    api_key_file: Path | None = None
    """File that holds the server's key; without it the environment variable DIFFUSION_POLICY_API_KEY."""
    server_deadline: float = 10.0
    """How long the server may take for a plan, the connection included where there is none, before that is said, and it
    is asked again [s]."""
    server_patience: float = 60.0
    """How long a server that does not answer is asked again before the command ends [s]."""

    def __post_init__(self) -> None:
        if not 0 < self.server_deadline < float("inf"):
            raise ConfigError(f"server-deadline must be above 0; got {self.server_deadline}")
        if not 0 <= self.server_patience < float("inf"):
            raise ConfigError(f"server-patience must be at least 0; got {self.server_patience}")

    def refuse(self, command: Any, *names: str) -> None:
        """Raise ConfigError where a command whose server plans is told how to plan here, by options of these names."""
        for option in fields(command):
            value = getattr(command, option.name)
            if self.server is not None and option.name in names and value != option.default:
                raise ConfigError(f"--{option.name} is an option of serve where --server plans; got {value}")

    def refuse_costs(self, costs: CostConfig) -> None:
        """Raise ConfigError for costs, or a classifier, where a server plans, which knows none."""
        if self.server is not None and costs.leads:
            given = " ".join([*costs.cost, *filter(None, [costs.classifier])])
            raise ConfigError(
                f"costs and a classifier lead samples that are drawn here, not by a --server; got {given}"
            )
