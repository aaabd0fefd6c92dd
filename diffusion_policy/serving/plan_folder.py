"""The folder of an exported policy: `plan.json` and the files that it names, written whole or not at all, read within
bounds.

The folder may be a stranger's. Its files are what `plan.json` says by SHA-256 and size, or it is refused, and so is a
graph that names a file of its own. Runs nothing, and needs neither torch nor onnx.
"""

import hashlib
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffusion_policy.basics.files import FileError, format_json, read_bytes, read_json, sync_folder, write_whole
from diffusion_policy.basics.images import is_image
from diffusion_policy.config import MAX_HORIZON, ConfigError, SampleConfig, decode, require_labels, to_json

PLAN = "plan.json"
FORMAT, VERSION = "diffusion-policy plan", 1
TABLE = "table.npy"
FILES = {"loop": ("plan.onnx",), "network": ("observe.onnx", "denoise.onnx", "act.onnx", TABLE)}
"""The files of each form, beside `plan.json`."""
OBSERVATION = "observation/"
"""What stands before an observation key in the name of a graph's input, so that a key may be called `noise`."""
NOISE, ACTIONS = "noise", "actions"
"""The graph's other input, and its output."""
GIVEN, KNOWN = "given/actions", "given/known"
"""Inputs of a policy that has learned to go on from given actions, (B, steps, A), and which steps are, (B, steps)."""
MAX_FILE_BYTES = 2 * 2**30
"""Of one file: what an ONNX file can hold."""
MAX_ROWS = 4096
"""Sequences that a graph samples at once."""
MAX_NUMBERS = 2**28
"""Of observations, or of noise, in one call: 1 or 2 GB."""
MAX_TABLE = 2**22
"""Numbers of a sampler's table, [of_noise | of_x0]: 16 MB, for some 2000 calls of the network."""


class ExportedError(FileError):
    """An exported policy cannot be loaded or run; the message says why, in one line."""


@dataclass(frozen=True)
class RecordedFile:
    """What `plan.json` says of one of its files."""

    sha256: str
    size: int
    """[bytes]"""


@dataclass(frozen=True)
class PlanConfig:
    """`plan.json`: what the graphs take and give."""

    format: str
    version: int
    form: Literal["loop", "network"]
    """One graph with the loop over the levels, or its three parts and the table between them."""
    precision: Literal["fp32", "int8"]
    """Of the network's weights in products."""
    dtype: Literal["float64", "float32"]
    """Of actions and of observations, but images, which are uint8."""
    batch: int
    """B: observations in one call."""
    samples: int
    """N: sequences for each of them."""
    observation_horizon: int
    steps: int
    """T - To + 1: steps of a plan, the first one is *now*."""
    action_horizon: int
    observation_shapes: dict[str, tuple[int, ...]]
    """Of each key at one step."""
    action_shape: tuple[int, ...]
    noise_shape: tuple[int, ...]
    """(draws, T, D), for one sequence."""
    calls: int
    """E: calls of the network for a plan."""
    sampling: SampleConfig
    """How the graph samples; it cannot sample otherwise."""
    control_rate: float | None
    """Of the robot [1/s]; null where nobody said it."""
    weights_sha256: str
    """Of the checkpoint."""
    action_error: float
    """Largest difference of an action to that of the checkpoint's policy, as a share of the normalizer's scale."""
    files: dict[str, RecordedFile]
    longest_prefix: int = 0
    """Steps that the policy has learned to be given."""
    action_reference: str = ""
    """Observation key that actions are differences from within the graph; empty where they are absolute."""

    def __post_init__(self) -> None:
        for name in ("batch", "samples", "observation_horizon", "steps", "action_horizon", "calls"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 <= self.longest_prefix < self.steps:
            raise ConfigError(f"longest_prefix must be from 0 to below {self.steps} steps; got {self.longest_prefix}")
        if self.action_reference and self.action_reference not in self.observation_shapes:
            known = ", ".join(self.observation_shapes)
            raise ConfigError(f"action_reference must be one of the keys {known}; got {self.action_reference!r:.100}")
        self._require_shapes()
        self._require_bounds()
        if set(self.files) != set(FILES[self.form]):
            raise ConfigError(
                f"the form {self.form} has the files {', '.join(FILES[self.form])}; got {list(self.files)}"
            )

    def type_of(self, key: str) -> str:
        """Type of an observation."""
        return "uint8" if is_image(self.observation_shapes[key]) else self.dtype

    @property
    def table_shape(self) -> tuple[int, int]:
        """Of `TABLE`, (E + 1, draws + E)."""
        return self.calls + 1, self.noise_shape[0] + self.calls

    def _require_shapes(self) -> None:
        if len(self.noise_shape) != 3 or len(self.action_shape) != 1 or min(*self.noise_shape, *self.action_shape) < 1:
            raise ConfigError(f"shapes must be (draws, T, D) and (A,); got {self.noise_shape} and {self.action_shape}")
        sampled, horizon = self.noise_shape[1], self.steps + self.observation_horizon - 1
        if horizon > MAX_HORIZON or horizon % sampled:  # in a latent space fewer are sampled
            raise ConfigError(
                f"steps must be T - To + 1, with T at most {MAX_HORIZON}; got {self.steps}, T = {sampled} and To = "
                f"{self.observation_horizon}"
            )
        if self.action_horizon > self.steps:
            raise ConfigError(f"action_horizon must be at most the {self.steps} steps; got {self.action_horizon}")
        require_labels(self.observation_shapes)
        for key, shape in self.observation_shapes.items():
            if not all(size >= 1 for size in shape):
                raise ConfigError(f"the observation {key} must have sizes of at least 1; got {shape}")

    def _require_bounds(self) -> None:
        rows = self.batch * self.samples
        if rows > MAX_ROWS:
            raise ConfigError(f"at most {MAX_ROWS} sequences are sampled at once; got {self.batch} x {self.samples}")
        if self.table_shape[0] * self.table_shape[1] > MAX_TABLE:
            raise ConfigError(
                f"the table of a sampler has at most {MAX_TABLE} numbers; {self.calls} calls of the network from "
                f"{self.noise_shape[0]} draws of noise need {self.table_shape[0]} x {self.table_shape[1]}"
            )
        observed = sum(map(math.prod, self.observation_shapes.values())) * self.batch * self.observation_horizon
        sequences = rows * math.prod(self.noise_shape[1:]) * max(self.noise_shape[0], self.calls + 1)
        for what, numbers in (("observations", observed), ("noise and sequences", sequences)):
            if numbers > MAX_NUMBERS:
                raise ConfigError(f"a call takes at most {MAX_NUMBERS} numbers of {what}; got {numbers}")


def is_exported(path: Path | str) -> bool:
    """Whether a folder holds an exported policy, rather than a checkpoint."""
    return (Path(path) / PLAN).exists()


def read_plan(folder: Path) -> PlanConfig:
    """What `plan.json` says; raises ExportedError."""
    try:
        tree = read_json(folder / PLAN)
        version = tree.get("version") if isinstance(tree, dict) else None
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise ExportedError(f"{folder / PLAN} does not describe an exported policy")
        if type(version) is not int or version != VERSION:
            raise ExportedError(f"{folder / PLAN} has the version {version!r:.50}; this package reads {VERSION}")
        return decode(tree, PlanConfig, "")
    except ExportedError:
        raise
    except FileError as error:  # it names the file
        raise ExportedError(str(error)) from error
    except ValueError as error:
        raise ExportedError(f"{folder / PLAN}: {error}") from error


def read_export(folder: Path) -> tuple[PlanConfig, dict[str, bytes]]:
    """What a folder holds: `plan.json`, and the files by their names. Raises ExportedError where one is missing, is not
    what `plan.json` says, or is a graph that names other files."""
    config = read_plan(folder)
    contents = {}
    for name in FILES[config.form]:
        recorded, path = config.files[name], folder / name
        if not 0 <= recorded.size <= MAX_FILE_BYTES:
            raise ExportedError(f"{folder / PLAN}: {name} has 0 to {MAX_FILE_BYTES} bytes; got {recorded.size}")
        try:
            content = read_bytes(path, recorded.size)
        except FileError as error:
            raise ExportedError(str(error)) from error
        if len(content) != recorded.size or hashlib.sha256(content).hexdigest() != recorded.sha256:
            raise ExportedError(f"{path} is damaged: its size or SHA-256 is not what {PLAN} says")
        if name != TABLE and names_other_files(content):
            raise ExportedError(f"{path} is no ONNX graph, or one whose weights lie in other files; it is not opened")
        contents[name] = content
    return config, contents


def record(contents: Mapping[str, bytes]) -> dict[str, RecordedFile]:
    """What `plan.json` says of files."""
    return {name: RecordedFile(hashlib.sha256(one).hexdigest(), len(one)) for name, one in contents.items()}


def write_export(folder: Path, config: PlanConfig, contents: Mapping[str, bytes]) -> None:
    """Make the folder, whole or not at all: under another name, then renamed. Raises ConfigError when it exists,
    OSError or FileError where it cannot be written."""
    require_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in contents.items():
            write_whole(temporary / name, content)
        write_whole(temporary / PLAN, format_json(to_json(config)))
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def require_new(folder: Path) -> None:
    """Raise ConfigError when something lies there."""
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder} already exists; choose another --output or delete it first")


# A graph is a protobuf message: fields, each a key (number and wire type) and a value. onnx.proto numbers them.
_WITHIN = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
"""Messages in which tensors lie, by the numbers of their fields."""
_EXTERNAL = (13, 14)
"""Fields of a tensor that say in which file its numbers are; ours have them inside."""
_VARINT, _BYTES, _FIXED = 0, 2, {1: 8, 5: 4}
"""How a value is written: a number, its size and then bytes, so many bytes."""
_MOST_FIELDS = 2**22
"""Of a graph, all together; ours have some thousand."""


def names_other_files(graph: bytes) -> bool:
    """Whether a tensor of an ONNX graph may lie in another file, which a runtime would open; also of what is no ONNX.
    Older versions of onnxruntime follow any path there."""
    waiting, seen = [("model", memoryview(graph))], 0
    try:
        while waiting:
            kind, message = waiting.pop()
            for number, value in _fields(message):
                seen += 1
                if (kind == "tensor" and number in _EXTERNAL and value != 0) or seen > _MOST_FIELDS:
                    return True
                if number in _WITHIN[kind] and isinstance(value, memoryview):
                    waiting.append((_WITHIN[kind][number], value))
    except (ValueError, IndexError):
        return True
    return False


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Numbers and values of a protobuf message's fields; raises ValueError or IndexError where it is none."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, wire = (key & (2**32 - 1)) >> 3, key & 7  # of a key, parsers read 32 bits
        if wire == _VARINT:
            value, place = _varint(message, place)
        elif wire == _BYTES or wire in _FIXED:
            size, place = _varint(message, place) if wire == _BYTES else (_FIXED[wire], place)
            value, place = message[place : place + size], place + size
        else:
            raise ValueError(f"no wire type {wire}")
        if not number or place > len(message):
            raise ValueError("no field, or one beyond the end")
        yield number, value


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """The number that begins there, and where it ends."""
    value = 0
    for i in range(10):
        byte = message[place + i]
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, place + i + 1
    raise ValueError("a number of more than ten bytes")
