"""diffusion-policy serve: a policy for robots on other machines."""

import asyncio
import contextlib
import errno
import importlib
import logging
import os
import ssl
import stat
from dataclasses import replace
from typing import Any, NamedTuple

try:
    import resource
except ImportError:  # Windows
    resource = None

from diffusion_policy.basics.text import one_line
from diffusion_policy.commands.capacity import measure_calls, read_rate, tell
from diffusion_policy.commands.interrupts import hearing
from diffusion_policy.commands.loading import load
from diffusion_policy.commands.options.serve import KEY_VARIABLE, Serve
from diffusion_policy.commands.terminal import console, out
from diffusion_policy.config import ChunkingConfig, ConfigError, SampleConfig
from diffusion_policy.control.chunking import Chunking, make_chunking
from diffusion_policy.control.latency import time_plans
from diffusion_policy.control.planner import Planner
from diffusion_policy.evaluation.engines import available_cores
from diffusion_policy.serving.batching import CallsOfSizes, Engine, LocalEngine, rows_are_independent
from diffusion_policy.serving.exported import ExportedPolicy
from diffusion_policy.serving.plan_folder import is_exported
from diffusion_policy.serving.protocol import Served
from diffusion_policy.serving.runtimes import RuntimeName
from diffusion_policy.serving.server import PolicyServer, ServerOptions

SIZES = (1, 4, 16, 64)
"""Rows of the graphs that calls are made up of."""
SHORTEST_KEY = 16
"""Characters; a shorter key is warned of."""


class Chosen(NamedTuple):
    """What is served."""

    planner: Planner
    chunking: Chunking
    described: dict[str, Any]
    """What `Served` says of the policy beside the planner's own numbers."""
    resolved: Serve
    """The options, with what `auto` means here."""


def run(options: Serve) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises ConfigError for options that cannot work, OSError for a port in use."""
    if options.plan is not None:
        plan_capacity(options, options.plan)
        return
    key, tls = choose_key(options), choose_tls(options)
    with console.status("loading"):
        chosen = choose(options)
        chosen.chunking.require(chosen.planner, 0)
        batch = choose_batch(chosen, options.max_batch)
        time_plans(chosen.planner, 1, 3, chosen.chunking)  # before the first robot asks
    served = describe(options, chosen, batch)
    listening = ServerOptions(
        host=options.host,
        port=options.port,
        api_key=key,
        tls=tls,
        max_batch=batch,
        max_wait=options.max_wait_ms / 1000,
        queued=options.max_queue,
        connections=min(options.max_connections, allow_connections()),
        sessions=options.max_sessions,
        idle=options.session_idle,
    )
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it would tell of each stranger's connection
    with start_engine(options, chosen) as engine:
        server = PolicyServer(chosen.planner, served, chosen.chunking, listening, engine)
        try:
            asyncio.run(serve(server, "ws" if tls is None else "wss", options.host))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
                raise OSError(f"cannot listen on {options.host}:{options.port}: {os.strerror(error.errno)}") from error
            raise
    console.print("stopped")


def start_engine(options: Serve, chosen: Chosen) -> contextlib.AbstractContextManager[Engine]:
    """Where calls are computed. Raises ConfigError where Ray Serve is not installed."""
    if options.engine == "local":
        return contextlib.nullcontext(LocalEngine(chosen.planner, chosen.chunking))
    try:
        from diffusion_policy.commands.replicas import start_replicas
    except ImportError as error:
        extra = "pip install 'diffusion-policy-toolkit[ray]'"
        raise ConfigError(f"--engine ray needs Ray Serve: {extra} ({one_line(str(error), 200)})") from error
    return start_replicas(options, chosen)


def describe(options: Serve, chosen: Chosen, batch: int) -> Served:
    """What clients are told first."""
    planner = chosen.planner
    return Served(
        observation_horizon=planner.observation_horizon,
        steps=planner.steps,
        action_horizon=planner.action_horizon,
        observation_shapes=planner.observation_shapes,
        action_shape=planner.action_shape,
        noise_shape=planner.noise_shape,
        guides=planner.guides,
        longest_prefix=planner.longest_prefix,
        chunking=options.chunking,
        max_batch=batch,
        max_frame_bytes=int(options.max_frame_mb * 2**20),
        **chosen.described,
    )


def plan_capacity(options: Serve, asked: str) -> None:
    """Say how many servers a rate needs. Raises ConfigError for what is no rate."""
    rate = read_rate(asked)
    with console.status("measuring"):
        chosen, halved = choose(options), None
        exported = chosen.described["sampling"]
        steps = exported.sampling_steps
        if not is_exported(options.checkpoint) and steps > 1:
            fewer = replace(options.sampling, sampling_steps=steps // 2)
            with contextlib.suppress(ValueError):  # a student has its own number of steps
                halved = choose(replace(options, sampling=fewer, backend=chosen.described["backend"])).planner
        rows = [1] if options.max_batch == 1 or chosen.described["backend"] == "eager" else [1, options.max_batch]
        calls = measure_calls(chosen.planner, rows, exported.sampling_steps, halved)
    tell(calls, asked, rate, chosen.described)


def choose_batch(chosen: Chosen, most: int) -> int:
    """Plans that can be made in one call without a change of any bit."""
    backend, score = chosen.described["backend"], chosen.chunking.score
    alone = backend in ("eager", "compile") or getattr(score, "weak", None) is not None  # which plans by eager
    if most == 1 or (not alone and rows_are_independent(chosen.planner, most)):
        return most
    console.print(
        f"each request is planned by itself: with {backend}, last digits depend on how many are planned together",
        soft_wrap=True,
    )
    return 1


async def serve(server: PolicyServer, scheme: str, host: str) -> None:
    """Serve until a signal; says where, once it listens."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def ready() -> None:
        out.print(f"serving at {scheme}://{host}:{server.port}; Ctrl-C ends it", soft_wrap=True)

    def end(_number: int, _frame: object) -> None:
        loop.call_soon_threadsafe(stop.set)

    with hearing(end):
        await server.run(stop, ready)


def choose(options: Serve) -> Chosen:
    """The planner of a checkpoint or an export, with what is said of it."""
    runtime: RuntimeName = "openvino" if options.backend == "openvino" else "onnxruntime"
    loaded = load(options.checkpoint, options.device, runtime=runtime, precision=options.precision)
    if isinstance(loaded, ExportedPolicy):
        return choose_exported(options, loaded, runtime)
    with_torch = importlib.import_module("diffusion_policy.commands.served_checkpoint")
    sizes = [size for size in SIZES if size <= options.max_batch]
    return Chosen(*with_torch.choose_planner(options, loaded.checkpoint, sizes))


def choose_exported(options: Serve, loaded: ExportedPolicy, runtime: RuntimeName) -> Chosen:
    """An export samples and is computed as it was exported."""
    if options.backend not in ("auto", "onnx", "openvino"):
        raise ConfigError(f"an exported policy is served by onnx or openvino; got --backend {options.backend}")
    config = loaded.config
    if options.sampling not in (SampleConfig(), config.sampling):
        raise ConfigError("an exported policy samples as it was exported; leave the sampling options out")
    if config.samples != 1:
        raise ConfigError(f"serve takes a policy exported with --samples 1; this one has {config.samples}")
    if options.chunking.weak_checkpoint is not None:
        raise ConfigError("--weak-checkpoint is for a policy that is not exported")
    chunking = make_served_chunking(options.chunking)
    described = {
        "sampling": config.sampling,
        "backend": "openvino" if runtime == "openvino" else "onnx",
        "precision": options.precision,
        "threads": available_cores(),
        "angles": {},
        "environment": None,
        "control_rate": config.control_rate,
        "weights_sha256": config.weights_sha256,
    }
    resolved = replace(options, backend=described["backend"])
    return Chosen(CallsOfSizes({config.batch: loaded.planner}), chunking, described, resolved)


def make_served_chunking(config: ChunkingConfig) -> Chunking:
    """How the plans of sessions are joined. Raises ConfigError for what needs an environment or the user's function."""
    if config.roll_forward:
        raise ConfigError("--roll-forward asks an environment; it is an option of the client")
    if config.score is not None:
        raise ConfigError("--score is an option of the client, which chooses among the samples that it asks for")
    return make_chunking(config)


def choose_key(options: Serve) -> str | None:
    """The key that clients must know. Raises ConfigError where anyone could connect from elsewhere without one."""
    key = os.environ.get(KEY_VARIABLE) or None
    path = options.api_key_file
    if path is not None:
        key = path.read_text().strip()
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            console.print(f"others can read {path}: chmod 600 {path}", soft_wrap=True)
        if not key:
            raise ConfigError(f"{path} holds no key")
    if key is None and not options.stays_here and not options.insecure:
        raise ConfigError(
            f"on {options.host} anyone who reaches this machine could ask: give --api-key-file (or ${KEY_VARIABLE}), "
            "or --insecure"
        )
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError("a key is printable ASCII characters without spaces")
    if key is not None and len(key) < SHORTEST_KEY:
        console.print(f"a key of {len(key)} characters can be guessed; take at least {SHORTEST_KEY}", soft_wrap=True)
    return key


def allow_connections() -> int:
    """Clients that this process may have at once, with as many open files as the system lets it."""
    if resource is None:
        return 500
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if files == resource.RLIM_INFINITY else max(1, files // 2)  # the rest for those that are not let in


def choose_tls(options: Serve) -> ssl.SSLContext | None:
    """The certificate, where one is given; raises ConfigError for files that hold none."""
    if options.tls_certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(options.tls_certificate, options.tls_key)
    except (ssl.SSLError, OSError) as error:
        files = f"{options.tls_certificate} and {options.tls_key}"
        raise ConfigError(f"{files} hold no certificate with its key: {error}") from error
    return context
