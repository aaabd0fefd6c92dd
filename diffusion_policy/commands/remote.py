"""The server that plans for a command, if one is named: it must serve what the command would sample itself."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from diffusion_policy.checkpoints.checkpoint import Checkpoint
from diffusion_policy.commands.episodes import planning_threads
from diffusion_policy.commands.options.remote import RemoteOptions
from diffusion_policy.commands.options.serve import KEY_VARIABLE
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ConfigError, PlanningPrecision, SampleConfig

if TYPE_CHECKING:
    from diffusion_policy.serving.client import RemotePolicy

EXTRA = "'diffusion-policy-toolkit[serve]'"
"""What serving, and asking a server, needs."""


def find_server(options: RemoteOptions) -> RemotePolicy | None:
    """The server's policy; None where none is named. Raises as `serving.client.connect`."""
    if options.server is None:
        return None
    try:
        from diffusion_policy.serving.client import connect
    except ImportError as error:
        raise ConfigError(f"--server needs websockets and msgpack: pip install {EXTRA}") from error
    path = options.api_key_file
    key = path.read_text().strip() if path is not None else os.environ.get(KEY_VARIABLE)
    return connect(
        options.server,
        api_key=key or None,
        deadline=options.server_deadline,
        patience=options.server_patience,
        warn=lambda sentence: console.print(sentence, soft_wrap=True),
    )


def find_server_of(
    options: RemoteOptions, loaded: Checkpoint, sampling: SampleConfig, precision: PlanningPrecision = "fp32"
) -> RemotePolicy | None:
    """As `find_server`; raises ConfigError unless it serves these weights, sampled so. Says where last digits can
    differ from those of planning here."""
    remote = find_server(options)
    if remote is None:
        return None
    served = remote.served
    if served.weights_sha256 != loaded.weights_sha256:
        raise ConfigError(
            f"{remote.url} serves other weights ({served.weights_sha256[:12]}) than the checkpoint's "
            f"({loaded.weights_sha256[:12]})"
        )
    if served.sampling != sampling:
        names = [name for name in vars(sampling) if getattr(sampling, name) != getattr(served.sampling, name)]
        said = ", ".join(f"--{name.replace('_', '-')} {getattr(served.sampling, name)}" for name in names)
        raise ConfigError(f"{remote.url} samples otherwise: {said}; say the same here")
    if served.precision != precision:
        raise ConfigError(f"{remote.url} plans in {served.precision}, not {precision}")
    threads = planning_threads(loaded.policy)
    if served.backend == "eager" and served.threads != threads:
        console.print(
            f"{remote.url} plans with {served.threads} threads, here it would be {threads}: last digits can differ",
            soft_wrap=True,
        )
    return remote
