"""An exported policy, to act with: ONNX graphs and a JSON in a folder, run by onnxruntime and numpy. No torch.

The folder may be a stranger's. Its files are what `plan.json` says by SHA-256 and size, or it is refused; a graph holds
numbers and operators, no code. What it can still do is take long, or much memory. Knows no simulator.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffusion_policy.basics.files import FileError, read_bytes, read_json
from diffusion_policy.config import ConfigError, SampleConfig, decode
from diffusion_policy.control.single import SingleController

PLAN = "plan.json"
FORMAT, VERSION = "diffusion-policy plan", 1
MAX_GRAPH_BYTES = 2 * 2**30
"""Of one file: what an ONNX file can hold."""
MAX_ROWS = 4096
"""Sequences that a graph samples at once."""
GRAPHS = {"loop": ("plan.onnx",), "network": ("observe.onnx", "denoise.onnx", "act.onnx")}
"""The files of each form."""


class ExportedError(FileError):
    """An exported policy cannot be loaded; the message says why, in one line."""


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
    """One graph with the loop over the levels, or its three parts."""
    precision: Literal["fp32", "int8"]
    """Of the network's weights in products."""
    dtype: Literal["float64", "float32"]
    """Of observations and actions."""
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
    sampling: SampleConfig
    """How the graph samples; it cannot sample otherwise."""
    control_rate: float | None
    """[1/s]; null where the environment does not say."""
    weights_sha256: str
    """Of the checkpoint."""
    action_error: float
    """Largest difference of an action to that of the checkpoint's policy, as a share of the normalizer's scale."""
    files: dict[str, RecordedFile]
    of_noise: tuple[tuple[float, ...], ...] = field(default=())
    """The sampler as a table (`SamplingTable`), of the form network; empty in the other one."""
    of_x0: tuple[tuple[float, ...], ...] = field(default=())

    def __post_init__(self) -> None:
        numbers = {"batch": self.batch, "samples": self.samples, "observation_horizon": self.observation_horizon}
        numbers |= {"steps": self.steps, "action_horizon": self.action_horizon}
        for name, value in numbers.items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1; got {value}")
        if self.batch * self.samples * math.prod(self.noise_shape) > 2**28 or self.batch * self.samples > MAX_ROWS:
            raise ConfigError(f"at most {MAX_ROWS} sequences are sampled at once; got {self.batch} x {self.samples}")
        if len(self.noise_shape) != 3 or len(self.action_shape) != 1 or min(*self.noise_shape, *self.action_shape) < 1:
            raise ConfigError(f"shapes must be (draws, T, D) and (A,); got {self.noise_shape} and {self.action_shape}")
        if set(self.files) != set(GRAPHS[self.form]):
            raise ConfigError(
                f"the form {self.form} has the files {', '.join(GRAPHS[self.form])}; got {list(self.files)}"
            )


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
        if version != VERSION:
            raise ExportedError(f"{folder / PLAN} has the version {version!r}; this package reads {VERSION}")
        return decode(tree, PlanConfig, "")
    except ExportedError:
        raise
    except ValueError as error:
        raise ExportedError(f"{folder / PLAN}: {error}") from error


def load(path: Path | str, threads: int | None = None) -> "ExportedPolicy":
    """The policy that `diffusion-policy export` wrote into a folder. `threads`: of onnxruntime, by default one a core.
    Raises ExportedError where it is damaged, or not what it says, ImportError without onnxruntime."""
    folder = Path(path)
    config = read_plan(folder)
    graphs = []
    for name in GRAPHS[config.form]:
        recorded = config.files[name]
        try:
            content = read_bytes(folder / name, min(recorded.size, MAX_GRAPH_BYTES))
        except FileError as error:
            raise ExportedError(str(error)) from error
        if len(content) != recorded.size or hashlib.sha256(content).hexdigest() != recorded.sha256:
            raise ExportedError(f"{folder / name} is damaged: its size or SHA-256 is not what {PLAN} says")
        graphs.append(content)
    return ExportedPolicy(config, OnnxPlanner(config, graphs, threads, str(folder)))


@dataclass(frozen=True)
class ExportedPolicy:
    """An exported policy with what its folder says of it."""

    config: PlanConfig
    planner: "OnnxPlanner"

    def controller(
        self, seed: int = 0, *, action_horizon: int | None = None, delay_steps: int = 0, **sampling: Any
    ) -> SingleController:
        """As `LoadedPolicy.controller`, with the same actions but for rounding. Raises ConfigError for another sampling
        than the exported one."""
        for name, value in sampling.items():
            exported = getattr(self.config.sampling, name, None)
            if value != exported:
                raise ConfigError(f"this policy was exported with {name}={exported}; got {value!r}; export it again")
        return SingleController(self.planner, seed, action_horizon=action_horizon, delay_steps=delay_steps)


class OnnxPlanner:
    """Plans with onnxruntime; see `control.planner.Planner`."""

    def __init__(self, config: PlanConfig, graphs: list[bytes], threads: int | None = None, where: str = "") -> None:
        """`graphs`: the files of the config's form; `where`: named in messages. Raises ExportedError for graphs that do
        not take and give what the config says."""
        self._config = config
        self.observation_horizon, self.steps = config.observation_horizon, config.steps
        self.action_horizon = config.action_horizon
        self.observation_shapes = dict(config.observation_shapes)
        self.action_shape, self.noise_shape = config.action_shape, config.noise_shape
        self._sessions = [_open(graph, threads, where) for graph in graphs]
        self._of_noise = np.array(config.of_noise, np.float32)
        self._of_x0 = np.array(config.of_x0, np.float32)
        rows = config.batch * config.samples
        self._sequences = rows, *config.noise_shape[1:]
        self._require_interface(where)

    def plan(
        self, observations: Mapping[str, np.ndarray], noise: np.ndarray, previous: np.ndarray | None = None
    ) -> np.ndarray:
        """See `Planner.plan`. Raises ValueError where the graph samples several sequences for an observation."""
        if self._config.samples != 1:
            raise ValueError(f"a controller follows one sequence; this policy was exported with {self._config.samples}")
        return self.sample(observations, noise[:, None])[:, 0]

    def sample(self, observations: Mapping[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
        """Raw {key: (B, To, ...)}, (B, N, draws, T, D) float32 → raw actions (B, N, steps, A). Any B: it is cut into
        calls of the exported size, the last one filled up. Raises ValueError for observations of other shapes, or not
        finite."""
        count, batch = len(noise), self._config.batch
        observed = {key: self._require_observed(key, observations, count) for key in self.observation_shapes}
        parts = []
        for start in range(0, count, batch):
            rows = np.resize(np.arange(start, min(start + batch, count)), batch)
            parts.append(self._call({key: value[rows] for key, value in observed.items()}, noise[rows]))
        return np.concatenate(parts)[:count]

    def _call(self, observed: dict[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
        """One call of the exported size."""
        if self._config.form == "loop":
            (session,) = self._sessions
            return session.run(["actions"], {**observed, "noise": noise})[0]
        observe, denoise, act = self._sessions
        (films,) = observe.run(["films"], observed)
        draws = noise.transpose(2, 0, 1, 3, 4).reshape(noise.shape[2], -1)
        inputs = (self._of_noise @ draws).reshape(-1, *self._sequences)  # (E + 1, B N, T, D)
        for place in range(self._of_x0.shape[1]):
            call = {"xt": inputs[place], "place": np.array(place), "films": films}
            (x0,) = denoise.run(["denoised"], call)
            inputs[place + 1 :] += self._of_x0[place + 1 :, place, None, None, None] * x0
        return act.run(["actions"], {"x0": inputs[-1]})[0]

    def _require_observed(self, key: str, observations: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        shape = (count, self.observation_horizon, *self.observation_shapes[key])
        found = np.asarray(observations[key]).shape if key in observations else None
        if found != shape:
            raise ValueError(f"the policy observes {key} of shape {shape}; got {found or 'nothing'}")
        values = np.ascontiguousarray(observations[key], self._config.dtype)
        if not np.isfinite(values).all():
            raise ValueError(f"the observation {key} holds NaN or infinity")
        return values

    def _require_interface(self, where: str) -> None:
        """Raise ExportedError unless inputs and outputs are those of the config."""
        config = self._config
        takes = {
            key: [config.batch, self.observation_horizon, *shape] for key, shape in self.observation_shapes.items()
        }
        gives = {"actions": [config.batch, config.samples, self.steps, *self.action_shape]}
        noise = {"noise": [config.batch, config.samples, *self.noise_shape]} if config.form == "loop" else {}
        inputs = {one.name: one.shape for one in self._sessions[0].get_inputs()}
        outputs = {one.name: one.shape for one in self._sessions[-1].get_outputs()}
        if inputs != takes | noise or outputs != gives:
            raise ExportedError(f"{where} takes {inputs} and gives {outputs}; {PLAN} says {takes | noise} and {gives}")
        calls = self._of_x0.shape[-1]
        table = self._of_noise.shape == (calls + 1, self.noise_shape[0]) and self._of_x0.shape == (calls + 1, calls)
        if config.form == "network" and not (table and np.isfinite(self._of_noise).all()):
            raise ExportedError(f"{where}/{PLAN} holds no table of its sampler")


def _open(graph: bytes, threads: int | None, where: str) -> Any:
    """A session; raises ExportedError for what is no graph."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "this needs onnxruntime: pip install onnxruntime, or 'diffusion-policy-toolkit[onnx]' to export as well"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4  # what is wrong is raised
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own for each
        raise ExportedError(f"{where}: onnxruntime cannot read the graph: {str(error).splitlines()[0]:.200}") from error
