"""Writes a policy as ONNX into a folder that `exported` reads: graphs and `plan.json`, whole or not at all.

What is written was run: its actions are compared with those of the policy, from the same noise.
"""

import io
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnx
import torch
from onnx import ModelProto

from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.config import ConfigError, SampleConfig
from diffusion_policy.control.planner import Steering
from diffusion_policy.control.policy_planner import EagerSampling, PolicyPlanner
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.serving.exported import OnnxPlanner
from diffusion_policy.serving.graph import ExportError, Graphs, join, make_graphs, quiet
from diffusion_policy.serving.plan_folder import (
    FILES,
    FORMAT,
    VERSION,
    PlanConfig,
    record,
    require_new,
    write_export,
)

TOLERANCES = {"fp32": 1e-4, "int8": 0.1}
"""Largest `action_error` that is written, unless another one is allowed."""
COMPARED = 16
"""Calls that parity is checked on."""


class Exporting(NamedTuple):
    """How a policy is exported; fields as `PlanConfig` has them."""

    batch: int = 1
    samples: int = 1
    form: Literal["loop", "network"] = "loop"
    precision: Literal["fp32", "int8"] = "fp32"
    dtype: Literal["float64", "float32"] = "float64"


def export(
    policy: DiffusionPolicy,
    folder: Path,
    sampling: SampleConfig | None = None,
    exporting: Exporting = Exporting(),  # noqa: B008  (immutable)
    *,
    control_rate: float | None = None,
    weights_sha256: str = "",
    tolerance: float | None = None,
) -> PlanConfig:
    """Write the policy into a new folder; returns what its `plan.json` says. Raises ConfigError when the folder exists,
    ExportError for a policy and sampling that have no graph, or whose graph acts otherwise than `tolerance` allows."""
    require_new(folder)
    config, contents = make_export(policy, sampling or SampleConfig(), exporting, tolerance)
    config = replace(config, control_rate=control_rate, weights_sha256=weights_sha256)
    write_export(folder, config, contents)
    return config


def make_export(
    policy: DiffusionPolicy, sampling: SampleConfig, exporting: Exporting, tolerance: float | None = None
) -> tuple[PlanConfig, dict[str, bytes]]:
    """What is written: `plan.json`, and the other files by their names. Raises as `export`, but for the folder."""
    if exporting.batch < 1 or exporting.samples < 1:
        raise ConfigError(f"batch and samples must be at least 1; got {exporting.batch} and {exporting.samples}")
    if policy.device.type != "cpu":
        raise ExportError(f"a policy is exported from the CPU; this one is on {policy.device}: load it with device cpu")
    sampling = policy.complete(sampling)
    steps = len(policy.resolve_sampling(sampling)[1])
    calls = steps + (steps - 1) * sampling.corrector_steps  # at least
    config = _describe(policy, sampling, exporting, calls)  # what cannot be is found before the work
    graphs = make_graphs(policy, sampling, exporting.batch, exporting.samples, getattr(torch, exporting.dtype))
    if exporting.precision == "int8":
        graphs = graphs._replace(denoise=_quantize(graphs.denoise))
    models = [join(graphs)] if exporting.form == "loop" else graphs[:3]
    contents = [model.SerializeToString() for model in models]
    if exporting.form == "network":
        contents.append(_write_table(graphs))
    files = dict(zip(FILES[exporting.form], contents, strict=True))
    config = replace(config, calls=graphs.of_x0.shape[1], files=record(files))
    error = compare(policy, OnnxPlanner(config, files, torch.get_num_threads(), "the exported graph"), config)
    allowed = TOLERANCES[exporting.precision] if tolerance is None else tolerance
    if not error <= allowed:
        raise ExportError(
            f"the graph's actions differ from the policy's by up to {error:.2g} of the action's scale; at most "
            f"{allowed:g} is allowed (diffusion-policy export --tolerance)"
        )
    return replace(config, action_error=error), files


def _write_table(graphs: Graphs) -> bytes:
    """The sampler, as numpy writes an array: [of_noise | of_x0]."""
    file = io.BytesIO()
    np.save(file, np.concatenate([graphs.of_noise, graphs.of_x0], axis=1))
    return file.getvalue()


def _describe(policy: DiffusionPolicy, sampling: SampleConfig, exporting: Exporting, calls: int) -> PlanConfig:
    """`plan.json`, but for what is known when the files are made."""
    return PlanConfig(
        FORMAT,
        VERSION,
        **{name: getattr(exporting, name) for name in ("form", "precision", "dtype", "batch", "samples")},
        observation_horizon=policy.config.observation_horizon,
        steps=policy.config.prediction_horizon - policy.config.observation_horizon + 1,
        action_horizon=policy.config.action_horizon,
        observation_shapes={key: policy.shapes.observations[key] for key in policy.keys},
        action_shape=policy.shapes.action,
        noise_shape=policy.noise_shape(sampling),
        calls=calls,
        sampling=sampling,
        control_rate=None,
        weights_sha256="",
        action_error=0.0,
        files=record(dict.fromkeys(FILES[exporting.form], b"")),
        longest_prefix=policy.config.max_delay,
        action_reference=policy.sequences.frame.key,
    )


def compare(policy: DiffusionPolicy, planner: OnnxPlanner, config: PlanConfig) -> float:
    """Largest difference between a graph's actions and the policy's, from observations in the range of the
    demonstrations and the same noise, as a share of the normalizer's scale; NaN where actions are not finite."""
    rng = derive_rng("parity of an export")
    calls = max(1, COMPARED // (config.batch * config.samples))
    reference = PolicyPlanner(policy, config.sampling, EagerSampling(policy, config.sampling, few_rows=False))
    worst = 0.0
    for _ in range(calls):
        observations = draw_observations(policy, config.batch, rng)
        noise = policy.draw_noise([rng] * config.batch, config.samples, config.sampling)
        steering = draw_prefix(policy, config, rng, observations) if config.longest_prefix else None
        expected = torch.from_numpy(reference.sample(observations, noise, steering))
        found = torch.from_numpy(planner.sample(observations, noise, steering))
        differences = policy.sequences.in_units(found) - policy.sequences.in_units(expected)
        worst = float(np.maximum(worst, differences.abs().max().item()))  # of NaN, NaN
    return worst


def draw_prefix(
    policy: DiffusionPolicy, config: PlanConfig, rng: np.random.Generator, observations: dict[str, np.ndarray]
) -> Steering:
    """Given actions such as the normalizer has seen, as many as the policy has learned, in every second row fewer."""
    normalized = torch.from_numpy(rng.uniform(-1, 1, (config.batch, *policy.sequences.shape))).to(policy.device)
    observed = {key: torch.from_numpy(rows) for key, rows in observations.items()}
    actions = (
        policy.sequences.unnormalize(normalized, 1, observed)[:, 0, -config.steps :].cpu().numpy().astype(np.float64)
    )
    lengths = np.where(np.arange(config.batch) % 2, config.longest_prefix // 2, config.longest_prefix)
    return Steering(actions, (np.arange(config.steps) < lengths[:, None]).astype(np.float64), None)


def draw_observations(policy: DiffusionPolicy, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Raw observations {key: (B, To, ...)} such as the normalizer has seen, each number for itself."""
    drawn = {}
    for key in policy.keys:
        shape = batch, policy.config.observation_horizon, *policy.normalizer.shapes[key]
        if key in policy.images:
            drawn[key] = rng.integers(0, 256, shape, np.uint8)
            continue
        normalized = torch.from_numpy(rng.uniform(-1, 1, shape)).to(policy.device)
        drawn[key] = policy.normalizer.unnormalize(key, normalized).cpu().numpy().astype(np.float64)
    return drawn


def _quantize(model: ModelProto) -> ModelProto:
    """The weights of products as int8, a scale each column; what they are multiplied with is quantized as it comes."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, quiet():
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        onnx.save(model, before)
        quantize_dynamic(
            before, after, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"]
        )
        return onnx.load(after)
