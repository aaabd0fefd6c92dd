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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from diffusion_policy.basics.files import FileError, format_json, read_json, remove, write_whole
from diffusion_policy.config import BackendName, ConfigError, PlanningPrecision, SampleConfig, check_choice, to_json
from diffusion_policy.control.latency import time_plans
from diffusion_policy.control.planner import Planner
from diffusion_policy.control.policy_planner import FEW_STEPS, EagerSampling, PolicyPlanner
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.serving import exported
from diffusion_policy.serving.captured import CapturedSampling
from diffusion_policy.serving.plan_folder import VERSION, ExportedError, write_export
from diffusion_policy.serving.runtimes import RuntimeName

EXTRA = "'diffusion-policy-toolkit[onnx]'"
"""What is installed to export."""
RUNTIMES: dict[BackendName, RuntimeName] = {"onnx": "onnxruntime", "openvino": "openvino"}
"""What runs the graph of these backends."""
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
    tolerance: float | None = None,
) -> PolicyPlanner | exported.OnnxPlanner:
    """A planner by a backend. `rows`, `samples`: observations in one call and sequences for each, which it is chosen
    and laid out for; `precision`: fp32, or bf16, which onnx has not; `tolerance`: largest difference of a
    graph's action, as a share of its scale, if not 1e-4. Raises ConfigError for a backend that this policy, device or
    installation has not."""
    sampling = sampling or SampleConfig()
    check_choice("backend", backend, get_args(BackendName))
    check_choice("precision", precision, get_args(PlanningPrecision))
    if precision == "fp32" or policy.device.type == "cuda":
        backend = resolve_backend(policy, sampling, backend, rows)
    elif backend == "auto" or policy.leads:
        backend = "eager"
    if backend in RUNTIMES:
        options = {"runtime": RUNTIMES[backend], "precision": precision, "tolerance": tolerance}
        return make_onnx_planner(policy, sampling, rows, samples, **options)
    if backend == "graph":
        return PolicyPlanner(policy, sampling, CapturedSampling(policy, sampling, precision))
    if backend == "eager":
        return PolicyPlanner(policy, sampling, EagerSampling(policy, sampling, precision))
    if policy.device.type == "cuda":
        return PolicyPlanner(policy, sampling, CapturedSampling(policy.compiled(), sampling, precision))
    few = rows * samples * policy.config.prediction_horizon <= FEW_STEPS and policy.device.type == "cpu"
    compiled = (policy.for_few_rows() if few else policy).compiled()
    return PolicyPlanner(policy, sampling, EagerSampling(compiled, sampling, precision, few_rows=False))


def resolve_backend(
    policy: DiffusionPolicy, sampling: SampleConfig, backend: BackendName, rows: int, plans: float = math.inf
) -> BackendName:
    """What `auto` means for so many rows, another backend as it is. On CUDA one graph; on the CPU the faster of eager
    and onnxruntime, where so many `plans` are to be expected that making a graph pays. (compile takes minutes before
    its first plan, so it must be asked for.)"""
    if policy.leads and backend not in ("auto", "eager"):
        raise ConfigError(f"costs lead samples by gradients, which --backend {backend} has not: choose eager")
    if backend != "auto":
        return backend
    if policy.leads:
        return "eager"
    if policy.device.type != "cpu":
        return "graph" if policy.device.type == "cuda" else "eager"
    here: list[BackendName] = [name for name in RUNTIMES if why_not(name, policy, sampling) is None]
    if not here:
        return "eager"
    case = _name_case(policy, sampling, rows, here)
    known = _read_choices().get(case)
    if known == "eager" or (known in here and _exists(_graph_folder(policy, sampling, rows))):
        return known
    times: dict[BackendName, float] = {"eager": _time(PolicyPlanner(policy, sampling), rows)}
    if times["eager"] / 1000 * EXPECTED_SHARE * plans < EXPORT_TIME:
        return "eager"
    asked: list[BackendName] = [known] if known in here else here
    with contextlib.suppress(ConfigError):  # what can be told only after the work
        for name in asked:
            planner = make_onnx_planner(policy, sampling, rows, runtime=RUNTIMES[name])
            times[name] = 0.0 if name == known else _time(planner, rows)
    found = min(times, key=lambda name: times[name])
    _write_choice(case, found)
    return found


def _time(planner: Planner, rows: int) -> float:
    """Median time of a plan [ms]."""
    return float(np.median(time_plans(planner, rows, MEASURED)))


def why_not(backend: BackendName, policy: DiffusionPolicy, sampling: SampleConfig) -> str | None:
    """Why onnx or openvino cannot run this policy here; None where it can."""
    missing = list_missing()
    if missing:
        return f"--backend {backend} needs {', '.join(missing)}: pip install {EXTRA}"
    if importlib.util.find_spec(RUNTIMES[backend]) is None:
        return f"--backend {backend} needs {RUNTIMES[backend]}: pip install {RUNTIMES[backend]}"
    if policy.device.type != "cpu":
        return f"--backend {backend} plans on the CPU; this policy is on {policy.device}: choose --device cpu"
    try:
        from diffusion_policy.serving.graph import ExportError, require_exportable
    except ImportError as error:
        return f"--backend {backend}: {error}; pip install {EXTRA}"
    try:
        require_exportable(policy, sampling)
    except ExportError as error:
        return str(error)
    return None


def make_onnx_planner(
    policy: DiffusionPolicy,
    sampling: SampleConfig,
    rows: int,
    samples: int = 1,
    *,
    runtime: RuntimeName = "onnxruntime",
    precision: PlanningPrecision = "fp32",
    tolerance: float | None = None,
) -> exported.OnnxPlanner:
    """A planner by a graph for calls of so many rows, which is taken from the cache folder, or put there unless it was
    allowed a `tolerance` of its own. Raises ConfigError where there can be none."""
    backend: BackendName = next(name for name, one in RUNTIMES.items() if one == runtime)
    reason = why_not(backend, policy, sampling)
    if backend == "onnx" and precision != "fp32":
        reason = f"onnxruntime computes as the graph says; --precision {precision} is for the other backends"
    if reason is not None:
        raise ConfigError(reason)
    from diffusion_policy.serving.export import ExportError, Exporting, make_export

    folder, threads = _graph_folder(policy, sampling, rows, samples), torch.get_num_threads()
    with contextlib.suppress(ExportedError, ImportError, OSError):
        return exported.load(folder, threads, runtime, precision).planner
    try:
        config, contents = make_export(policy, sampling, Exporting(rows, samples), tolerance)
        planner = exported.OnnxPlanner(config, contents, threads, "the graph", runtime=runtime, precision=precision)
    except (ExportError, ExportedError, ImportError) as error:
        raise ConfigError(f"--backend {backend}: {error}") from error
    if tolerance is not None:
        return planner
    with contextlib.suppress(ValueError, OSError):
        remove(folder)  # what is damaged
        write_export(folder, config, contents)
        _forget_oldest(folder.parent)
    return planner


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


def _name_case(
    policy: DiffusionPolicy, sampling: SampleConfig, rows: int, here: Sequence[BackendName] = tuple(RUNTIMES)
) -> str:
    """What a choice holds for: machine, versions, network and sampling; not the weights."""
    case = {
        "machine": [platform.machine(), platform.processor(), os.cpu_count(), torch.get_num_threads()],
        "versions": [torch.__version__, *(_version(RUNTIMES[name]) for name in here)],
        "policy": to_json(policy.config),
        "shapes": to_json(policy.shapes),
        "labels": policy.labels,
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


def _read_choices() -> dict[str, Any]:
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
