"""Writes a policy as ONNX into a folder that `exported` reads: graphs and `plan.json`, whole or not at all.

What is written was run: its actions are compared with those of the policy, from the same noise.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnx
import torch
from onnx import ModelProto

from diffusion_policy.basics.files import format_json, sync_folder, write_whole
from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.config import ConfigError, SampleConfig, to_json
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.serving.exported import FORMAT, GRAPHS, PLAN, VERSION, OnnxPlanner, PlanConfig, RecordedFile
from diffusion_policy.serving.graph import ExportError, Graphs, join, make_graphs, quiet

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
    if folder.exists():
        raise ConfigError(f"{folder} already exists; choose another --output or delete it first")
    config, contents = make_export(policy, sampling or SampleConfig(), exporting)
    config = replace(config, control_rate=control_rate, weights_sha256=weights_sha256)
    allowed = TOLERANCES[exporting.precision] if tolerance is None else tolerance
    if not config.action_error <= allowed:
        raise ExportError(
            f"the graph's actions differ from the policy's by up to {config.action_error:.2g} of the action's scale; "
            f"at most {allowed:g} is allowed (--tolerance)"
        )
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
    return config


def make_export(
    policy: DiffusionPolicy, sampling: SampleConfig, exporting: Exporting
) -> tuple[PlanConfig, dict[str, bytes]]:
    """What is written: `plan.json` and the graphs by their names, compared with the policy. Raises ExportError."""
    if exporting.batch < 1 or exporting.samples < 1:
        raise ConfigError(f"batch and samples must be at least 1; got {exporting.batch} and {exporting.samples}")
    cpu = next(policy.parameters()).device.type == "cpu"
    if not cpu:
        raise ExportError("a policy is exported from the CPU; load it with device='cpu'")
    graphs = make_graphs(policy, sampling, exporting.batch, exporting.samples, getattr(torch, exporting.dtype))
    if exporting.precision == "int8":
        graphs = graphs._replace(denoise=_quantize(graphs.denoise))
    models = [join(graphs)] if exporting.form == "loop" else list(graphs[:3])
    contents = {name: model.SerializeToString() for name, model in zip(GRAPHS[exporting.form], models, strict=True)}
    config = _describe(policy, sampling, exporting, graphs, contents)
    planner = OnnxPlanner(config, list(contents.values()), where="the exported graph")
    return replace(config, action_error=compare(policy, planner, config)), contents


def _describe(
    policy: DiffusionPolicy,
    sampling: SampleConfig,
    exporting: Exporting,
    graphs: Graphs,
    contents: Mapping[str, bytes],
) -> PlanConfig:
    table = exporting.form == "network"
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
        sampling=sampling,
        control_rate=None,
        weights_sha256="",
        action_error=0.0,
        files={name: RecordedFile(hashlib.sha256(one).hexdigest(), len(one)) for name, one in contents.items()},
        of_noise=tuple(map(tuple, graphs.of_noise.tolist())) if table else (),
        of_x0=tuple(map(tuple, graphs.of_x0.tolist())) if table else (),
    )


def compare(policy: DiffusionPolicy, planner: OnnxPlanner, config: PlanConfig) -> float:
    """Largest difference between a graph's actions and the policy's, from observations in the range of the
    demonstrations and the same noise, as a share of the normalizer's scale; NaN where actions are not finite."""
    rng = derive_rng("parity of an export")
    calls = max(1, COMPARED // (config.batch * config.samples))
    worst = 0.0
    for _ in range(calls):
        observations = draw_observations(policy, config.batch, rng)
        noise = policy.draw_noise([rng] * config.batch, config.samples, config.sampling)
        tensors = {key: torch.from_numpy(rows) for key, rows in observations.items()}
        expected = policy.sample_from(tensors, noise, config.sampling)[:, :, config.observation_horizon - 1 :]
        found = torch.from_numpy(planner.sample(observations, noise))
        normalize = policy.normalizer.normalize
        differences = normalize(policy.target.key, found) - normalize(policy.target.key, expected)
        worst = float(np.maximum(worst, differences.abs().max()))
    return worst


def draw_observations(policy: DiffusionPolicy, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Raw observations {key: (B, To, ...)} such as the normalizer has seen, each number for itself."""
    drawn = {}
    for key in policy.keys:
        shape = batch, policy.config.observation_horizon, *policy.normalizer.shapes[key]
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
