"""What server and client say to each other: one msgpack map a frame, with NumPy arrays in it.

Byte for byte that of openpi-client, so robots that speak it need no other client. The server speaks first: a map that
describes the policy. Then one request and one answer at a time. An array is a map of bytes keys, `__ndarray__`, `data`,
`dtype` and `shape`. What is wrong with a request is answered in a text frame, a word for the kind and a sentence.

A frame may be a stranger's: it is read within bounds, and only numbers become arrays; nothing is unpickled.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgpack
import numpy as np

from diffusion_policy.config import (
    MAX_HORIZON,
    BackendName,
    ChunkingConfig,
    ConfigError,
    PlanningPrecision,
    SampleConfig,
    decode,
    require_at_least,
    require_labels,
    to_json,
)

PROTOCOL = "diffusion-policy 1"
OPTIONS = ("session", "reset", "seed", "deadline_ms", "previous", "consumed", "samples", "observe")
"""Keys of a robot's request beside its observations; each may be left out."""
PLANNING = ("observations", "noise", "steering", "deadline_ms")
"""Keys of a request that brings its own noise: a planner's, see `control.planner.Planner.sample`."""
MAX_NESTING = 6
MAX_LENGTH, MAX_CONTAINERS = 1024, 1000
"""Items of a list or map, and lists and maps in a frame; numbers come as arrays."""
MAX_AXES = 8
MAX_TEXT = 10_000
"""Characters of a text, in a frame or as an error."""
Fault = Literal["invalid", "busy", "late", "failed", "stopping"]
"""The word before an error: the request is wrong; too many wait; its deadline has passed; planning failed; the server
stops. After busy, late and stopping the same request can be sent again."""


class ProtocolError(ValueError):
    """A frame is not what this protocol allows; the message says why."""


def pack(message: Mapping[str, Any]) -> bytes:
    """A frame. Raises ProtocolError for what has no place in one."""
    try:
        packed = msgpack.packb(message, default=_pack_array)
        assert packed is not None
        return packed
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"this cannot be sent: {error}") from error


def unpack(frame: bytes) -> dict[str, Any]:
    """The map in a frame, its arrays read-only views of it. Raises ProtocolError for anything else."""
    bounds = {
        "max_str_len": len(frame),
        "max_bin_len": len(frame),
        "max_array_len": MAX_LENGTH,
        "max_map_len": MAX_LENGTH,
    }
    containers = itertools.count(1)

    def count(found: Any) -> Any:
        if next(containers) > MAX_CONTAINERS:
            raise ProtocolError(f"a frame has more than {MAX_CONTAINERS} lists and maps")
        return found

    hooks = {"object_hook": count, "list_hook": count}
    try:
        found = msgpack.unpackb(frame, raw=False, strict_map_key=False, max_ext_len=0, **bounds, **hooks)
    except ProtocolError:
        raise
    except Exception as error:  # msgpack has many kinds, some without a message
        raise ProtocolError(f"a frame must hold msgpack: {str(error) or type(error).__name__:.100}") from error
    try:
        found = _read(found, MAX_NESTING)
    except (ValueError, OverflowError) as error:  # of NumPy; ours are ValueErrors too
        raise ProtocolError(str(error)) from error
    if not isinstance(found, dict):
        raise ProtocolError(f"a frame must hold a map; got {type(found).__name__}")
    return found


def _pack_array(value: object) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in "biuf":
        raise TypeError(f"arrays of {value.dtype}")
    if isinstance(value, np.ndarray):
        data, dtype = np.ascontiguousarray(value).tobytes(), value.dtype.str
        return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": list(value.shape)}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a {type(value).__name__}")


def _read(value: Any, depth: int) -> Any:
    """What msgpack found, with arrays made of their maps."""
    if depth < 0:
        raise ProtocolError(f"a frame nests more than {MAX_NESTING} deep")
    if isinstance(value, list):
        return [_read(item, depth - 1) for item in value]
    if not isinstance(value, dict):
        return value
    if b"__ndarray__" in value:
        return _read_array(value)
    if b"__npgeneric__" in value:
        return _read_scalar(value)
    if not all(isinstance(key, str) for key in value):
        raise ProtocolError("keys must be texts")
    return {key: _read(item, depth - 1) for key, item in value.items()}


def _read_array(value: Mapping[Any, Any]) -> np.ndarray:
    dtype, shape, data = _read_dtype(value.get(b"dtype")), value.get(b"shape"), value.get(b"data")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise ProtocolError(f"an array's shape must be at most {MAX_AXES} numbers from 0 on; got {shape!r:.60}")
    if not isinstance(data, bytes):
        raise ProtocolError(f"an array's data must be bytes; got a {type(data).__name__}")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ProtocolError(f"an array of {dtype} {tuple(shape)} has {len(data)} bytes of data")
    return np.frombuffer(data, dtype).reshape(shape)


def _read_dtype(name: Any) -> np.dtype:
    """Booleans, whole numbers and floats of up to 8 bytes."""
    if not isinstance(name, str) or not re.fullmatch(r"[<>|=]?([iu][1248]|f[248])|[|]?b1", name):
        raise ProtocolError(f"arrays hold booleans, whole numbers or floats, such as <f4; got {name!r:.60}")
    return np.dtype(name)


def _read_scalar(value: Mapping[Any, Any]) -> np.generic:
    dtype, number = _read_dtype(value.get(b"dtype")), value.get(b"data")
    try:
        if isinstance(number, bool | int | float):
            return dtype.type(number)
    except OverflowError:
        pass
    raise ProtocolError(f"a scalar of {dtype} must hold such a number; got {number!r:.60}")


@dataclass(frozen=True)
class Served:
    """The server's first frame: what a client must know of the policy."""

    observation_horizon: int
    """To. The server keeps the last To steps of each session, so every step is to be sent: with `observe` where no plan
    is wanted, or several at once, oldest first, with an axis for them."""
    steps: int
    """T - To + 1: steps of a plan, the first one is *now*."""
    action_horizon: int
    observation_shapes: dict[str, tuple[int, ...]]
    """Of each key at one step; numbers of any type."""
    action_shape: tuple[int, ...]
    noise_shape: tuple[int, ...]
    guides: bool
    longest_prefix: int
    sampling: SampleConfig
    chunking: ChunkingConfig
    """How a session's plan follows the `previous` one."""
    backend: BackendName
    precision: PlanningPrecision
    threads: int
    """That plan, on which last digits can depend."""
    angles: dict[str, tuple[int, ...]]
    """Columns that are angles [rad], of observations and of `action`; no client normalizes anything."""
    environment: str | None
    control_rate: float | None
    """Of the demonstrations [1/s]; None where they do not say."""
    weights_sha256: str
    max_batch: int
    max_frame_bytes: int
    pictures: bool = False
    """Whether pictures are observed."""
    options: tuple[str, ...] = OPTIONS
    protocol: str = PROTOCOL

    def __post_init__(self) -> None:
        require_at_least(self, 1, ("observation_horizon", "steps", "action_horizon", "max_batch", "max_frame_bytes"))
        require_at_least(self, 0, ("longest_prefix",))
        require_labels(self.observation_shapes)
        shapes = [self.action_shape, self.noise_shape, *self.observation_shapes.values()]
        if any(min(shape, default=0) < 0 or math.prod(shape) > 2**28 for shape in shapes):
            raise ConfigError("a shape is not one")
        if max(self.observation_horizon, self.steps) > MAX_HORIZON or self.action_horizon > self.steps:
            raise ConfigError(f"horizons are at most {MAX_HORIZON}, and the action horizon at most the steps of a plan")


def describe(served: Served) -> bytes:
    """The server's first frame."""
    return pack(to_json(served))


def read_description(frame: bytes | str) -> Served:
    """What the server's first frame says. Raises ProtocolError for another server's."""
    if isinstance(frame, str):
        raise ProtocolError(f"the server says {frame!r:.200}")
    found = unpack(frame)
    if found.get("protocol") != PROTOCOL:
        raise ProtocolError(f"it speaks {found.get('protocol')!r:.60}, not {PROTOCOL}")
    try:
        return decode(found, Served, "the server's description")
    except ConfigError as error:
        raise ProtocolError(str(error)) from error
