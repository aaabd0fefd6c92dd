"""What a server remembers of each robot: its last observations, its seed, and how many plans it got.

Turns a robot's request into what is planned, and refuses what is wrong with it by name. Knows no connection.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.basics.bounds import MOST_SEED
from diffusion_policy.basics.images import as_observed
from diffusion_policy.config import MAX_PLANS, ConfigError
from diffusion_policy.control.chunking import Chunking, Handover
from diffusion_policy.control.controller import require_horizons
from diffusion_policy.control.planner import Planner, Steering, planning_rng
from diffusion_policy.serving.batching import Busy, Job
from diffusion_policy.serving.protocol import OPTIONS, PLANNING, ProtocolError, Served

MOST_ROWS = 1024
"""Observations in one planner's request."""
MOST_NUMBERS = 2**24
"""Of noise in one request: 64 MB."""
MOST_SEQUENCES = 4096
"""Sampled for one request, of all its observations."""
MOST_NAME = 100
IN_USE = 60.0
"""How long after its last request a session is not dropped for a new one [s]."""


class Session:
    """One robot's episode."""

    def __init__(self, served: Served, seed: int = 0) -> None:
        self._served = served
        self.used = time.monotonic()
        self._asked = 0  # requests
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Begin an episode."""
        self._seed, self._plans = seed, 0
        self._history: dict[str, np.ndarray] = {}

    def undoing(self) -> Callable[[], None]:
        """What, called later, has it be as it is now, unless another request has come since but one."""
        before, asked = (self._seed, self._plans, dict(self._history)), self._asked

        def undo() -> None:
            if self._asked == asked + 1:
                self._seed, self._plans, self._history = before
                self._asked = -1  # so that it is undone once

        return undo

    def observe(self, observations: Mapping[str, np.ndarray]) -> None:
        """Take steps, {key: (steps, ...)}, into the history of {key: (To, ...)}; before the first stands that."""
        horizon = self._served.observation_horizon
        for key, rows in observations.items():
            before = self._history.get(key, np.repeat(rows[:1], horizon, axis=0))
            self._history[key] = np.concatenate([before, rows[-horizon:]])[-horizon:].copy()

    def ask(self, samples: int, handover: Handover | None) -> Job:
        """What the next plan is made of."""
        self._asked += 1
        rng = planning_rng(self._seed, 0, self._plans)
        noise = rng.standard_normal((1, samples, *self._served.noise_shape), np.float32)
        if handover is not None:
            handover = handover._replace(made=np.array([self._plans]))
        self._plans += 1
        return Job({key: rows[None] for key, rows in self._history.items()}, noise, None, handover)


class Asked(NamedTuple):
    """What a robot's request came to."""

    job: Job | None
    """What is to be planned; None where it was only to be observed."""
    observed: int
    """Steps, in that case."""
    undo: Callable[[], None]
    """Has the session forget the request."""


class Sessions:
    """Those of all robots by name; the one used longest ago goes when there are too many, and whoever was silent for
    `idle` seconds."""

    def __init__(
        self, served: Served, planner: Planner, chunking: Chunking, most: int = 4096, idle: float = 3600.0
    ) -> None:
        """`chunking`: how a plan of `planner` is joined to what a robot executes."""
        self._served, self._planner, self._chunking = served, planner, chunking
        self._most, self._idle = most, idle
        self._named: OrderedDict[str, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._named)

    def read(self, request: Mapping[str, Any], own: Session) -> Asked:
        """What a robot's request asks for. `own`: the connection's session, for a request that names none. Raises
        ProtocolError."""
        served, options = self._served, {name: request[name] for name in OPTIONS if name in request}
        steps = {key: _steps(request, key, shape) for key, shape in served.observation_shapes.items()}
        if len({len(rows) for rows in steps.values()}) > 1:
            raise ProtocolError(f"all observations need as many steps; got { {k: len(v) for k, v in steps.items()} }")
        for name in ("reset", "observe"):
            if not isinstance(options.get(name), bool | np.bool_ | None):
                raise ProtocolError(f"{name} must be true or false; got {options[name]!r:.60}")
        seed = _whole(options, "seed", 0, MOST_SEED)
        samples = _whole(options, "samples", 1, MAX_PLANS)
        handover = self._read_handover(options)
        if handover is not None and samples is not None:
            raise ProtocolError("a request has previous or samples, not both")
        if samples is not None and samples * math.prod(served.noise_shape) > MOST_NUMBERS:
            raise ProtocolError(f"{samples} samples take more than {MOST_NUMBERS} numbers of noise")
        session = self._find(options, own)  # what is wrong with a request leaves its session as it was
        session.used, undo = time.monotonic(), session.undoing()
        if options.get("reset") or seed is not None:
            session.reset(seed or 0)
        session.observe(steps)
        if options.get("observe"):
            return Asked(None, len(next(iter(steps.values()), ())), lambda: None)
        job = session.ask(samples or (self._chunking.samples if handover is not None else 1), handover)
        return Asked(job, 0, undo)

    def _find(self, options: Mapping[str, Any], own: Session) -> Session:
        self.forget_idle()
        name = options.get("session")
        if name is None:
            return own
        if not isinstance(name, str) or not 1 <= len(name) <= MOST_NAME:
            raise ProtocolError(f"session must be a name of at most {MOST_NAME} characters; got {name!r:.60}")
        if name not in self._named:
            if not options.get("reset"):
                raise ProtocolError(
                    f"unknown session {name!r}: begin it with reset; sessions are forgotten {self._idle:g} s after "
                    "their last request, and when the server ends"
                )
            if len(self._named) >= self._most:
                oldest = next(iter(self._named.values()))
                if time.monotonic() - oldest.used < IN_USE:
                    raise Busy(f"{self._most} sessions are in use already")
                self._named.popitem(last=False)
            self._named[name] = Session(self._served)
        self._named.move_to_end(name)
        return self._named[name]

    def forget_idle(self) -> None:
        """Drop the sessions that were silent too long."""
        while self._named:
            name, oldest = next(iter(self._named.items()))
            if time.monotonic() - oldest.used < self._idle:
                return
            del self._named[name]

    def _read_handover(self, options: Mapping[str, Any]) -> Handover | None:
        """What a robot says that it executes: `previous`, from now on, of which `consumed` steps will be over when the
        plan is ready."""
        if "previous" not in options:
            if "consumed" in options:
                raise ProtocolError("consumed counts steps of previous, which is not there")
            return None
        served = self._served
        delay = _whole(options, "consumed", 0, served.steps) or 0
        try:
            require_horizons(served.steps, min(served.action_horizon, served.steps - delay), delay)
            self._chunking.require(self._planner, delay)
        except ConfigError as error:
            raise ProtocolError(str(error)) from error
        rows = _numbers(options["previous"], "previous")
        if rows.ndim != 2 or rows.shape[1:] != served.action_shape or len(rows) > served.steps:
            raise ProtocolError(
                f"previous must be at most {served.steps} actions, (steps, {served.action_shape[0]}); got {rows.shape}"
            )
        if len(rows) < delay:
            raise ProtocolError(f"consumed is {delay} of {len(rows)} previous actions")
        executing = np.full((1, served.steps, *served.action_shape), np.nan)
        executing[0, : len(rows)] = rows
        return Handover(executing, delay, served.action_horizon, np.zeros(1, int))


def read_planning(request: Mapping[str, Any], served: Served) -> Job:
    """What a planner's request asks for: observations of all To steps and noise, of several robots at once. Raises
    ProtocolError."""
    unknown = sorted(set(request) - set(PLANNING))
    if unknown:
        raise ProtocolError(f"beside noise there are {', '.join(PLANNING)}; got {unknown[0]!r:.60}")
    noise = _numbers(request.get("noise"), "noise")
    whole = noise.ndim == 2 + len(served.noise_shape) and noise.shape[2:] == served.noise_shape
    if not whole or not 1 <= len(noise) <= MOST_ROWS or not 1 <= noise.shape[1] <= MAX_PLANS:
        raise ProtocolError(f"noise must be (B, N, {', '.join(map(str, served.noise_shape))}); got {noise.shape}")
    if len(noise) * noise.shape[1] > MOST_SEQUENCES:
        raise ProtocolError(f"at most {MOST_SEQUENCES} sequences are sampled for a request; got {noise.shape[:2]}")
    if noise.size > MOST_NUMBERS:
        raise ProtocolError(f"noise has at most {MOST_NUMBERS} numbers; got {noise.size}")
    observations = request.get("observations")
    if not isinstance(observations, dict):
        raise ProtocolError("observations must be a map of arrays")
    shapes = {key: (len(noise), served.observation_horizon, *one) for key, one in served.observation_shapes.items()}
    if set(observations) != set(shapes):
        raise ProtocolError(f"the policy observes {', '.join(shapes)}; got {', '.join(map(str, observations)):.200}")
    found = {key: _observed(observations[key], key, one) for key, one in served.observation_shapes.items()}
    for key, shape in shapes.items():
        if found[key].shape != shape:
            raise ProtocolError(f"the observation {key} must have the shape {shape}; got {found[key].shape}")
    noise = _numbers(noise, "noise", np.float32)
    return Job(found, noise, _read_steering(request.get("steering"), len(noise), served))


def _read_steering(asked: Any, rows: int, served: Served) -> Steering | None:
    if asked is None:
        return None
    if not isinstance(asked, dict) or set(asked) != set(Steering._fields):
        raise ProtocolError(f"steering has {', '.join(Steering._fields)}")
    actions, weights = (_numbers(asked[name], name, finite=False) for name in ("actions", "weights"))
    if np.isinf(actions).any() or not np.isfinite(weights).all():
        raise ProtocolError("steering holds infinity, or weights that are none")
    if actions.shape != (rows, served.steps, *served.action_shape) or weights.shape != actions.shape[:2]:
        raise ProtocolError(
            f"steering must be actions ({rows}, {served.steps}, {served.action_shape[0]}) and weights "
            f"({rows}, {served.steps}); got {actions.shape} and {weights.shape}"
        )
    strength, deviation = asked["strength"], asked["deviation"]
    if strength is None and not served.longest_prefix:
        raise ProtocolError("this policy has not learned to be given actions: train --max-delay")
    if strength is not None and not served.guides:
        raise ProtocolError(f"the backend {served.backend} has no gradients to guide by: serve with --backend eager")
    for name, number in (("strength", 1.0 if strength is None else strength), ("deviation", deviation)):
        if not isinstance(number, int | float) or not 0 < number < math.inf:
            raise ProtocolError(f"{name} must be above 0; got {number!r:.60}")
    return Steering(actions, weights, strength, deviation)


def _steps(request: Mapping[str, Any], key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Steps of an observation (steps, ...), of one step (...) or several."""
    if key not in request:
        raise ProtocolError(f"the policy observes {key}; got {', '.join(map(str, request)) or 'nothing':.200}")
    rows = _observed(request[key], key, shape)
    one = () if shape == (1,) and rows.ndim == 0 else shape
    if rows.shape == one:
        return rows.reshape(1, *shape)
    if rows.shape[1:] != shape or len(rows) < 1:
        raise ProtocolError(f"the observation {key} must have the shape {shape}, or (steps, ...); got {rows.shape}")
    return rows


def _observed(value: Any, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """An observation as it is planned from; raises ProtocolError for what is none."""
    try:
        return as_observed(_numbers(value, key, None), key, shape)
    except ValueError as error:
        raise ProtocolError(str(error)) from error


def _numbers(value: Any, name: str, dtype: Any = np.float64, finite: bool = True) -> np.ndarray:
    """As an array of this type, or of its own; raises ProtocolError for what is not finite in it."""
    if isinstance(value, bool | int | float):
        value = np.array(value)
    if not isinstance(value, np.ndarray | np.generic):
        raise ProtocolError(f"{name} must be an array of numbers; got a {type(value).__name__}")
    with np.errstate(over="ignore"):
        array = np.asarray(value) if dtype is None else np.asarray(value).astype(dtype, copy=False)
    if finite and not np.isfinite(array).all():
        raise ProtocolError(f"{name} holds NaN or infinity")
    return array


def _whole(options: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, np.integer):
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        raise ProtocolError(f"{name} must be a whole number from {least} to {most}; got {value!r:.60}")
    return value
