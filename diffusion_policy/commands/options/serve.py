"""What `diffusion-policy serve` can be told."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from diffusion_policy.commands.options.acting import anchor
from diffusion_policy.commands.options.command import Command
from diffusion_policy.config import (
    BackendName,
    ChunkingConfig,
    ConfigError,
    Group,
    PlanningPrecision,
    SampleConfig,
    require_at_least,
)
from diffusion_policy.evaluation.engines import Engine, require_engine

KEY_VARIABLE = "DIFFUSION_POLICY_API_KEY"


@dataclass(frozen=True)
class Serve(Command):
    """Serve a policy to robots and simulators on other machines, over WebSocket, until Ctrl-C or SIGTERM.

    It speaks the protocol of openpi-client, so such clients work as they are; `evaluate`, `rollout` and `run-robot` use
    it with --server ws://HOST:PORT, Python with dp.connect. Requests of several robots are planned together where that
    changes no bit. /healthz, /readyz and /metrics (Prometheus) answer HTTP on the same port. Needs the extra serve.
    """

    program: ClassVar[str] = "diffusion_policy.commands.serve"

    checkpoint: Path
    """Folder of a run (its newest checkpoint), of one checkpoint, or of an exported policy, which needs no torch."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address to listen on: 127.0.0.1 is this machine alone, 0.0.0.0 every network it is in."""
    api_key_file: Annotated[Path | None, Group("access")] = None
    """File that holds the key which clients must know; without it the environment variable DIFFUSION_POLICY_API_KEY."""
    insecure: bool = False
    """Listen on other addresses than this machine's without a key."""
    tls_certificate: Path | None = None
    """Certificate (PEM), for wss://; with --tls-key."""
    tls_key: Path | None = None
    """The certificate's private key (PEM)."""
    plan: Annotated[str | None, Group("load")] = None
    """Serve nothing; measure how long plans take, and say how many such servers or replicas a rate needs: 1000/min,
    20/s."""
    engine: Engine = "local"
    """Where plans are made: in this process, or in replicas of the policy by Ray Serve, on the Ray cluster of the
    environment variable RAY_ADDRESS (without it, one is started here). Clients get the same answers."""
    replicas: int = 1
    """Replicas at most, with --engine ray. They begin when calls queue up, and end when they are idle."""
    min_replicas: int = 1
    """Replicas that stay when they are idle."""
    max_batch: int = 16
    """Plans made in one call at most."""
    max_wait_ms: float = 3.0
    """How long a request waits for those that were planned together last [ms]; a client that is alone waits for
    nobody."""
    max_queue: int = 1024
    """Requests that wait at most; further ones are told that the server is busy."""
    max_connections: int = 4096
    """Clients at once."""
    max_sessions: int = 4096
    """Named sessions that are remembered; the one used longest ago goes first."""
    session_idle: float = 3600.0
    """How long a session is remembered after its last request [s]."""
    max_frame_mb: float = 16.0
    """Largest request [MB]."""
    chunking: Annotated[ChunkingConfig, Group("control")] = field(default_factory=ChunkingConfig)
    sampling: Annotated[SampleConfig, Group("sampling")] = field(default_factory=SampleConfig)
    backend: Annotated[BackendName, Group("sampling")] = "auto"
    """What samples, as in rollout; of an exported policy onnx (auto) or openvino. With eager each request is planned by
    itself, as `evaluate` plans it."""
    precision: PlanningPrecision = "fp32"
    """Numbers that the network computes with: fp32, or bf16, which onnx has not."""
    device: Annotated[str, Group("")] = "auto"
    """Device that plans: auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1 or mps."""

    def run(self) -> None:
        """See `Command.run`; raises ConfigError without the extra."""
        try:
            super().run()
        except ModuleNotFoundError as error:
            if error.name not in ("websockets", "msgpack"):
                raise
            extra = "pip install 'diffusion-policy-toolkit[serve]'"
            raise ConfigError(f"serve needs websockets and msgpack: {extra}") from error

    def __post_init__(self) -> None:
        anchor(self)
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port must be from 0 to 65535; got {self.port}")
        names = ("max_batch", "max_queue", "max_connections", "max_sessions", "replicas", "min_replicas")
        require_at_least(self, 1, names)
        require_engine(self.engine)
        if self.engine == "local" and self.replicas > 1:
            raise ConfigError(f"replicas are those of Ray Serve: they need --engine ray; got {self.replicas}")
        if self.min_replicas > self.replicas:
            raise ConfigError(f"min-replicas must be at most {self.replicas}, the replicas; got {self.min_replicas}")
        require_at_least(self, 0, ("max_wait_ms",))
        for name in ("session_idle", "max_frame_mb"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name.replace('_', '-')} must be above 0; got {getattr(self, name)}")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("--tls-certificate and --tls-key belong together")

    @property
    def stays_here(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
