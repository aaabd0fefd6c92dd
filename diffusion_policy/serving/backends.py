"""What a policy is sampled by: operator by operator (eager, the reference), torch.compile, one CUDA graph, or
onnxruntime. All give the same actions from the same noise, but for rounding.

`auto` measures: what is fastest differs with the machine, the network and the number of rows. What it found, and the
graphs that it made, stay in the user's cache folder, where that can be written.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from diffusion_policy.basics.files import FileError, format_json, read_json, remove, write_whole
from diffusion_policy.config import BackendName, ConfigError, PlanningPrecision, SampleConfig, check_choice, to_json
from diffusion_policy.control.latency import time_plans
from diffusion_policy.control.policy_planner import FEW_STEPS, EagerSampling, PolicyPlanner
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.serving import exported
from diffusion_policy.serving.captured import CapturedSampling
from diffusion_policy.serving.plan_folder import VERSION, ExportedError, write_export

EXTRA = "'diffusion-policy-toolkit[onnx]'"
"""What is installed to export."""
EXPORT_TIME = 15.0
"""What making a graph for onnxruntime takes [s]."""
EXPECTED_SHARE = 0.4
"""Of a plan's eager time that onnxruntime may save; whether a graph pays is judged by it before there is one."""
MEASURED = 5
"""Plans that a choice is made by."""
KEPT_GRAPHS = 8
"""Graphs in the cache folder; the oldest goes."""


def make_planner(
    policy: DiffusionPolicy,
    sampling: SampleConfig | None = None,
    backend: BackendName = "auto",
    *,
    rows: int = 1,
    samples: int = 1,
    precision: PlanningPrecision = "fp32",
) -> PolicyPlanner | exported.OnnxPlanner:
    """A planner by a backend. `rows`, `samples`: observations in one call and sequences for each, which it is chosen
    and laid out for; `precision`: fp32, or bf16 for eager, compile and graph. Raises ConfigError for a backend that
    this policy, device or installation has not."""
    sampling = sampling or SampleConfig()
    check_choice("backend", backend, get_args(BackendName))
    check_choice("precision", precision, get_args(PlanningPrecision))
    if precision == "fp32" or policy.device.type == "cuda":
        backend = resolve_backend(policy, sampling, backend, rows)
    elif backend == "auto":
        backend = "eager"
    if backend == "onnx":
        if precision != "fp32":
            raise ConfigError("--precision bf16 is for eager, compile and graph; a graph for onnx is exported in fp32")
        return make_onnx_planner(policy, sampling, rows, samples)
    if backend == "graph":
        return PolicyPlanner(policy, sampling, CapturedSampling(policy, sampling, precision))
    if backend == "eager":
        return PolicyPlanner(policy, sampling, EagerSampling(policy, sampling, precision))
    few = rows * samples * policy.config.prediction_horizon <= FEW_STEPS and policy.device.type == "cpu"
    compiled = (policy.for_few_rows() if few else policy).compiled()
    return PolicyPlanner(policy, sampling, EagerSampling(compiled, sampling, precision, few_rows=False))


def resolve_backend(
    policy: DiffusionPolicy, sampling: SampleConfig, backend: BackendName, rows: int, plans: float = math.inf
) -> BackendName:
    """What `auto` means for so many rows, another backend as it is. On CUDA one graph; on the CPU the faster of eager
    and onnxruntime, where so many `plans` are to be expected that making a graph pays. (compile takes minutes before
    its first plan, so it must be asked for.)"""
    if backend != "auto":
        return backend
    if policy.device.type != "cpu":
        return "graph" if policy.device.type == "cuda" else "eager"
    if why_not_onnx(policy, sampling) is not None:
        return "eager"
    case = _name_case(policy, sampling, rows)
    known = _read_choices().get(case)
    if known == "eager" or (known == "onnx" and _exists(_graph_folder(policy, sampling, rows))):
        return known
    eager = float(np.median(time_plans(PolicyPlanner(policy, sampling), rows, MEASURED)))  # [ms]
    if eager / 1000 * EXPECTED_SHARE * plans < EXPORT_TIME:
        return "eager"
    try:
        planner = make_onnx_planner(policy, sampling, rows)
    except ConfigError:  # that can be told only after the work
        found = "eager"
    else:
        found = "onnx" if known or np.median(time_plans(planner, rows, MEASURED)) < eager else "eager"
    _write_choice(case, found)
    return found


def why_not_onnx(policy: DiffusionPolicy, sampling: SampleConfig) -> str | None:
    """Why onnxruntime cannot run this policy here; None where it can."""
    missing = list_missing()
    if missing:
        return f"--backend onnx needs {', '.join(missing)}: pip install {EXTRA}"
    if policy.device.type != "cpu":
        return f"--backend onnx plans on the CPU; this policy is on {policy.device}: choose --device cpu"
    try:
        from diffusion_policy.serving.graph import ExportError, require_exportable
    except ImportError as error:
        return f"--backend onnx: {error}; pip install {EXTRA}"
    try:
        require_exportable(policy, sampling)
    except ExportError as error:
        return str(error)
    return None


def make_onnx_planner(
    policy: DiffusionPolicy, sampling: SampleConfig, rows: int, samples: int = 1
) -> exported.OnnxPlanner:
    """A planner by onnxruntime for calls of so many rows; its graph is taken from the cache folder, or put there.
    Raises ConfigError where there can be none."""
    reason = why_not_onnx(policy, sampling)
    if reason is not None:
        raise ConfigError(reason)
    from diffusion_policy.serving.export import ExportError, Exporting, make_export

    folder = _graph_folder(policy, sampling, rows, samples)
    with contextlib.suppress(ExportedError, ImportError, OSError):
        return exported.load(folder, torch.get_num_threads()).planner
    try:
        config, contents = make_export(policy, sampling, Exporting(rows, samples))
    except (ExportError, ImportError) as error:
        raise ConfigError(f"--backend onnx: {error}") from error
    with contextlib.suppress(ValueError, OSError):
        remove(folder)  # what is damaged
        write_export(folder, config, contents)
        _forget_oldest(folder.parent)
    return exported.OnnxPlanner(config, contents, torch.get_num_threads())


def list_missing() -> list[str]:
    """Packages that exporting needs and that are not installed."""
    return [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]


def cache_folder() -> Path:
    """Where choices and graphs are kept: $XDG_CACHE_HOME/diffusion-policy, by default in ~/.cache; where there is no
    home, a path that cannot be."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "diffusion-policy"
    try:
        return Path.home() / ".cache" / "diffusion-policy"
    except RuntimeError:  # a user without a name, as in some containers
        return Path(os.devnull) / "diffusion-policy"


def _name_case(policy: DiffusionPolicy, sampling: SampleConfig, rows: int) -> str:
    """What a choice holds for: machine, versions, network and sampling; not the weights."""
    case = {
        "machine": [platform.machine(), platform.processor(), os.cpu_count(), torch.get_num_threads()],
        "versions": [torch.__version__, _version("onnxruntime")],
        "policy": to_json(policy.config),
        "shapes": to_json(policy.shapes),
        "modes": policy.modes,
        "sampling": to_json(sampling),
        "rows": rows,
    }
    return hashlib.sha256(json.dumps(case, sort_keys=True).encode()).hexdigest()[:32]


def _graph_folder(policy: DiffusionPolicy, sampling: SampleConfig, rows: int, samples: int = 1) -> Path:
    """Where the graph of this policy, with its weights as they are, is kept."""
    digest = hashlib.sha256(f"{_name_case(policy, sampling, rows)} {samples} {VERSION}".encode())
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return cache_folder() / "graphs" / digest.hexdigest()[:32]


def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


def _read_choices() -> dict[str, str]:
    with contextlib.suppress(FileError, OSError):
        found = read_json(cache_folder() / "backends.json")
        return found if isinstance(found, dict) else {}
    return {}


def _write_choice(key: str, choice: str) -> None:
    """Keep a choice where the cache folder can be written."""
    with contextlib.suppress(FileError, OSError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_whole(cache_folder() / "backends.json", format_json(_read_choices() | {key: choice}))


def _forget_oldest(folder: Path) -> None:
    """Delete the oldest graphs beyond `KEPT_GRAPHS`."""
    graphs = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    for path in graphs[:-KEPT_GRAPHS]:
        remove(path)


def _exists(path: Path) -> bool:
    """Whether something lies there that can be reached."""
    with contextlib.suppress(OSError):
        return path.exists()
    return False
