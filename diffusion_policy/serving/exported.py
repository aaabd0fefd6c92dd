"""An exported policy, to act with: its folder, run by onnxruntime (or OpenVINO) and numpy. No torch.

A stranger's graph holds numbers and operators, no code. What it can still do is take long, or much memory. Knows no
simulator.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_policy.basics.images import as_observed
from diffusion_policy.config import ChunkingName, ConfigError, PlanningPrecision, with_options
from diffusion_policy.control.chunking import Chunking, make_chunking, split_options
from diffusion_policy.control.planner import Steering
from diffusion_policy.control.single import SingleController
from diffusion_policy.serving.plan_folder import (
    ACTIONS,
    GIVEN,
    KNOWN,
    NOISE,
    OBSERVATION,
    PLAN,
    TABLE,
    ExportedError,
    PlanConfig,
    read_export,
)
from diffusion_policy.serving.runtimes import RuntimeName, open_graph


def load(
    path: Path | str,
    threads: int | None = None,
    runtime: RuntimeName = "onnxruntime",
    precision: PlanningPrecision = "fp32",
) -> "ExportedPolicy":
    """The policy that `diffusion-policy export` wrote into a folder. `threads`: of the runtime, by default one a core;
    `precision`: fp32, or bf16 with openvino. Raises ExportedError where it is damaged, or not what it says, ImportError
    without the runtime."""
    config, contents = read_export(Path(path))
    planner = OnnxPlanner(config, contents, threads, str(path), runtime=runtime, precision=precision)
    return ExportedPolicy(config, planner)


@dataclass(frozen=True)
class ExportedPolicy:
    """An exported policy with what its folder says of it."""

    config: PlanConfig
    planner: "OnnxPlanner"

    def controller(
        self,
        seed: int = 0,
        *,
        action_horizon: int | None = None,
        delay_steps: int = 0,
        chunking: ChunkingName | Chunking = "receding",
        **options: Any,
    ) -> SingleController:
        """As `LoadedPolicy.controller`, with the same actions but for rounding. Raises ConfigError for another sampling
        than the exported one, and for a chunking that this graph cannot follow, such as one of several plans where one
        is sampled for an observation."""
        joined, sampling = split_options(chunking, options)
        if not isinstance(joined, Chunking):
            if joined.weak_checkpoint or joined.score:
                raise ConfigError("an exported policy takes its weak policy or score as chunking=Chunking(...)")
            joined = make_chunking(joined)
        exported = self.config.sampling
        asked = with_options(exported, **sampling)
        for name in sampling:
            if getattr(asked, name) != getattr(exported, name):
                raise ConfigError(
                    f"this policy was exported with {name}={getattr(exported, name)!r}; got {sampling[name]!r}; export "
                    "it again"
                )
        self.require_samples(joined)
        return SingleController(
            self.planner,
            seed,
            action_horizon=action_horizon,
            delay_steps=delay_steps,
            chunking=joined,
            sampling_steps=exported.sampling_steps,
        )

    def require_samples(self, chunking: Chunking) -> None:
        """Raise ConfigError for a chunking that makes another number of plans than was exported."""
        if self.config.samples != chunking.samples:
            raise ConfigError(
                f"this chunking makes {chunking.samples} plans for an observation; this policy was exported with "
                f"--samples {self.config.samples}"
            )


class OnnxPlanner:
    """Plans with ONNX graphs; see `control.planner.Planner`."""

    guides = False

    def __init__(
        self,
        config: PlanConfig,
        contents: Mapping[str, bytes],
        threads: int | None = None,
        where: str = "",
        *,
        runtime: RuntimeName = "onnxruntime",
        precision: PlanningPrecision = "fp32",
    ) -> None:
        """`contents`: the files of the config's form, by name; `where`: named in messages; the others as `load` has
        them. Raises ExportedError for graphs that do not take and give what the config says."""
        self._config, self._where = config, where
        self.observation_horizon, self.steps = config.observation_horizon, config.steps
        self.action_horizon = config.action_horizon
        self.observation_shapes = dict(config.observation_shapes)
        self.action_shape, self.noise_shape = config.action_shape, config.noise_shape
        self.longest_prefix = config.longest_prefix
        self._references = [OBSERVATION + config.action_reference] if config.action_reference else []
        graphs = {name: content for name, content in contents.items() if name != TABLE}
        self._graphs = [open_graph(one, runtime, threads, precision, where) for one in graphs.values()]
        self._sequences = config.batch * config.samples, *config.noise_shape[1:]  # (B N, T, D)
        if config.form == "network":
            table = _read_table(contents[TABLE], config.table_shape, where)
            self._of_noise, self._of_x0 = np.split(table, [config.noise_shape[0]], axis=1)
        self._require_interface()

    def sample(
        self, observations: Mapping[str, np.ndarray], noise: np.ndarray, steering: Steering | None = None
    ) -> np.ndarray:
        """See `Planner.sample`; N as exported. Any B from 1 on: it is cut into calls of the exported size, the last one
        filled up. Raises ValueError for observations or noise of other shapes, or not finite, ExportedError where the
        graph fails."""
        count, batch = len(noise), self._config.batch
        if count < 1 or noise.shape[1:] != (self._config.samples, *self.noise_shape):
            raise ValueError(
                f"the policy was exported for noise of shape (B, {self._config.samples}, "
                f"{', '.join(map(str, self.noise_shape))}); got {noise.shape}: sample as it was exported"
            )
        noise = np.ascontiguousarray(noise, np.float32)
        named = {OBSERVATION + key: self._require_observed(key, observations, count) for key in self.observation_shapes}
        if self.longest_prefix:
            named |= self._name_given(steering, count)
        parts = []
        for start in range(0, count, batch):
            rows = np.resize(np.arange(start, min(start + batch, count)), batch)
            parts.append(self._call({name: value[rows] for name, value in named.items()}, noise[rows]))
        return np.concatenate(parts)[:count]

    def _name_given(self, steering: Steering | None, count: int) -> dict[str, np.ndarray]:
        """The inputs that say what is given."""
        actions = np.zeros((count, self.steps, *self.action_shape))
        known = np.zeros((count, self.steps))
        if steering is not None:
            actions, weights = steering.filled()
            known = weights == 1
        return {GIVEN: np.asarray(actions, self._config.dtype), KNOWN: np.asarray(known, np.float32)}

    def _call(self, observed: dict[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
        """One call of the exported size."""
        if self._config.form == "loop":
            return self._run(0, ACTIONS, {**observed, NOISE: noise})
        films = self._run(0, "films", observed)
        draws = noise.transpose(2, 0, 1, 3, 4).reshape(noise.shape[2], -1)
        inputs = (self._of_noise @ draws).reshape(-1, *self._sequences)  # (E + 1, B N, T, D)
        for place in range(self._config.calls):
            x0 = self._run(1, "denoised", {"xt": inputs[place], "place": np.array(place), "films": films})
            inputs[place + 1 :] += self._of_x0[place + 1 :, place, None, None, None] * x0
        return self._run(2, ACTIONS, {"x0": inputs[-1], **{name: observed[name] for name in self._references}})

    def _run(self, part: int, output: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """One call of a graph; raises ExportedError where it fails."""
        try:
            return self._graphs[part].run(output, inputs)
        except Exception as error:  # runtimes have their own for each
            raise ExportedError(f"{self._where}: the graph fails: {error!s:.300}") from error

    def _require_observed(self, key: str, observations: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        shape = (count, self.observation_horizon, *self.observation_shapes[key])
        found = np.asarray(observations[key]).shape if key in observations else None
        if found != shape:
            raise ValueError(f"the policy observes {key} of shape {shape}; got {found or 'nothing'}")
        observed = as_observed(observations[key], f"the observation {key}", self.observation_shapes[key])
        values = np.ascontiguousarray(observed, self._config.type_of(key))
        if not np.isfinite(values).all():
            raise ValueError(f"the observation {key} holds NaN or infinity")
        return values

    def _require_interface(self) -> None:
        """Raise ExportedError unless inputs and outputs are those of the config."""
        config, dtype = self._config, self._config.dtype
        observed = {
            OBSERVATION + key: (config.type_of(key), [config.batch, self.observation_horizon, *shape])
            for key, shape in self.observation_shapes.items()
        }
        if config.longest_prefix:
            observed[GIVEN] = dtype, [config.batch, self.steps, *self.action_shape]
            observed[KNOWN] = "float32", [config.batch, self.steps]
        noise = {NOISE: ("float32", [config.batch, config.samples, *self.noise_shape])}
        actions = {ACTIONS: (dtype, [config.batch, config.samples, self.steps, *self.action_shape])}
        sequences = ("float32", list(self._sequences))
        wanted = [(observed | noise, actions)]
        if config.form == "network":
            films = {name: one for name, one in self._graphs[0].outputs.items() if name == "films"}
            call = {"xt": sequences, "place": ("int64", []), **films}
            act = {"x0": sequences, **{name: observed[name] for name in self._references}}
            wanted = [(observed, films), (call, {"denoised": sequences}), (act, actions)]
        for graph, (takes, gives) in zip(self._graphs, wanted, strict=True):
            if graph.inputs != takes or graph.outputs != gives:
                found = f"takes {graph.inputs} and gives {graph.outputs}"
                raise ExportedError(f"{self._where}: a graph {found}; {PLAN} says {takes} and {gives}")


def _read_table(content: bytes, shape: tuple[int, int], where: str) -> np.ndarray:
    """The sampler's table; raises ExportedError where the file holds another array, or numbers that are not finite."""
    try:
        file = io.BytesIO(content)
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version of numpy's format")
        found, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        if (found, by_columns, dtype) != (shape, False, np.dtype(np.float32)):
            raise ValueError(f"an array of {dtype} {found}")
        table = np.frombuffer(file.read(), np.float32).reshape(shape)
        if not np.isfinite(table).all():
            raise ValueError("NaN or infinity")
    except Exception as error:  # also of what stands in the header
        raise ExportedError(
            f"{where}/{TABLE} must hold an array of float32 {shape}, all finite: {error!s:.200}"
        ) from error
    return table
