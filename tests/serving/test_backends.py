"""One switch between what samples: the same actions from each, and what `auto` chooses, keeps and survives."""

import importlib.util
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_policy.config import ConfigError, PolicyConfig, SampleConfig, with_options
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.serving import backends, export
from diffusion_policy.serving.backends import (
    EXPECTED_SHARE,
    EXPORT_TIME,
    KEPT_GRAPHS,
    RUNTIMES,
    cache_folder,
    make_onnx_planner,
    make_planner,
    resolve_backend,
    why_not,
)
from diffusion_policy.serving.export import draw_observations
from diffusion_policy.serving.exported import OnnxPlanner
from diffusion_policy.serving.graph import ExportError

RNG = np.random.default_rng(0)
GRAPHS = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"no {package}"))
    for name, package in RUNTIMES.items()
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder; and a graph is compared with its policy by few calls."""
    monkeypatch.setattr(export, "COMPARED", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diffusion-policy"


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each policy that was exported."""
    made, make_export = [], export.make_export

    def count(*arguments):
        made.append(1)
        return make_export(*arguments)

    monkeypatch.setattr(export, "make_export", count)
    return made


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Has a plan take so many milliseconds by eager and by a graph; returns what was measured."""

    def take(eager: float, graph: float = 1.0) -> list[str]:
        measured = []

        def time_plans(planner, rows: int, plans: int) -> list[float]:
            measured.append(type(planner).__name__)
            return [eager if isinstance(planner, PolicyPlanner) else graph] * plans

        monkeypatch.setattr(backends, "time_plans", time_plans)
        return measured

    return take


@pytest.fixture
def only_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is installed that runs graphs."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))


def sample(policy: DiffusionPolicy, planners: list, sampling: SampleConfig, samples: int = 2) -> list[np.ndarray]:
    """What each makes of the same observations and noise, normalized."""
    observations = draw_observations(policy, 1, RNG)
    noise = policy.draw_noise([RNG], samples, sampling)
    plans = [planner.sample(observations, noise[:, :1]) for planner in planners]
    return [policy.normalizer.normalize("action", torch.from_numpy(plan)).numpy() for plan in plans]


@pytest.mark.parametrize("backend", [*GRAPHS, "auto", "compile"])
def test_every_backend_gives_the_actions_of_eager(plain, backend, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_as_it_is(function, **options):
        compiled.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_as_it_is)
    policy, sampling, _ = plain
    planners = [make_planner(policy, sampling, name) for name in ("eager", backend)]
    expected, found = sample(policy, planners, sampling)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert compiled == ([{"fullgraph": True}] if backend == "compile" else [])
    assert isinstance(planners[1], OnnxPlanner) or backend in ("auto", "compile")
    for name in ("observation_horizon", "steps", "action_horizon", "observation_shapes", "action_shape", "noise_shape"):
        assert getattr(planners[0], name) == getattr(planners[1], name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch.compile
@pytest.mark.parametrize("rows", [1, 40])
def test_a_network_that_is_compiled_gives_the_actions_of_eager(plain, rows: int) -> None:
    policy, sampling, _ = plain
    planners = [make_planner(policy, sampling, name, rows=rows) for name in ("eager", "compile")]
    observations, noise = draw_observations(policy, rows, RNG), policy.draw_noise([RNG] * rows, 1, sampling)
    plans = [planner.sample(observations, noise) for planner in planners]
    np.testing.assert_allclose(plans[1], plans[0], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch.compile
def test_a_transformer_that_is_compiled_gives_the_actions_of_eager(transformer) -> None:
    policy, sampling, _ = transformer
    expected, found = sample(policy, [make_planner(policy, sampling, name) for name in ("eager", "compile")], sampling)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", GRAPHS)
def test_a_graph_is_laid_out_for_rows_and_samples(plain, backend) -> None:
    policy, sampling, _ = plain
    planner = make_planner(policy, sampling, backend, rows=2, samples=3)
    observations, noise = draw_observations(policy, 5, RNG), policy.draw_noise([RNG] * 5, 3, sampling)
    plans = [one.sample(observations, noise) for one in (make_planner(policy, sampling, "eager"), planner)]
    np.testing.assert_allclose(plans[1], plans[0], rtol=0, atol=1e-4)


# What auto chooses


def test_the_choice_of_auto_is_measured_once_and_kept(plain, cache: Path, take, exports, only_onnx) -> None:
    policy, sampling, _ = plain
    measured = take(eager=10.0, graph=1.0)
    assert resolve_backend(policy, sampling, "auto", 1) == "onnx"
    assert (measured, exports) == (["PolicyPlanner", "OnnxPlanner"], [1])
    assert list(json.loads((cache / "backends.json").read_text()).values()) == ["onnx"]
    (folder,) = (cache / "graphs").iterdir()
    assert {path.name for path in folder.iterdir()} == {"plan.json", "plan.onnx"}
    measured.clear()
    assert isinstance(make_planner(policy, sampling), OnnxPlanner)
    assert resolve_backend(policy, sampling, "auto", 1, plans=1) == "onnx"  # it is there
    assert (measured, exports) == ([], [1])


def test_auto_is_eager_where_that_is_faster(plain, cache: Path, take, exports, only_onnx) -> None:
    policy, sampling, _ = plain
    measured = take(eager=10.0, graph=11.0)
    assert isinstance(make_planner(policy, sampling), PolicyPlanner)
    assert list(json.loads((cache / "backends.json").read_text()).values()) == ["eager"]
    measured.clear()
    assert resolve_backend(policy, sampling, "auto", 1) == "eager"
    assert (measured, exports) == ([], [1])


def test_another_number_of_rows_is_another_choice(plain, cache: Path, take, monkeypatch, only_onnx) -> None:
    policy, sampling, _ = plain
    monkeypatch.setattr(backends, "make_onnx_planner", lambda *_, **__: object())
    take(eager=10.0, graph=20.0)
    assert resolve_backend(policy, sampling, "auto", 1) == "eager"
    take(eager=10.0, graph=5.0)
    assert resolve_backend(policy, sampling, "auto", 16) == "onnx"
    assert resolve_backend(policy, sampling, "auto", 1) == "eager"
    assert resolve_backend(policy, SampleConfig(sampling_steps=4), "auto", 1) == "onnx"
    assert len(json.loads((cache / "backends.json").read_text())) == 3


def test_no_graph_is_made_for_few_plans(plain, take, exports, only_onnx) -> None:
    policy, sampling, _ = plain
    take(eager=100.0)
    enough = EXPORT_TIME / EXPECTED_SHARE / 0.1
    assert resolve_backend(policy, sampling, "auto", 1, plans=enough - 1) == "eager"
    assert exports == []
    assert resolve_backend(policy, sampling, "auto", 1, plans=enough + 1) == "onnx"
    assert exports == [1]


@pytest.mark.parametrize("kind, expected", [("cuda", "graph"), ("mps", "eager")])
def test_on_other_devices_nothing_is_measured(plain, take, monkeypatch, kind: str, expected: str) -> None:
    measured = take(eager=10.0)
    monkeypatch.setattr(DiffusionPolicy, "device", torch.device(kind))
    assert resolve_backend(plain.policy, plain.sampling, "auto", 1) == expected
    with pytest.raises(
        ConfigError, match=f"--backend onnx plans on the CPU; this policy is on {kind}: choose --device"
    ):
        make_planner(plain.policy, plain.sampling, "onnx")
    assert measured == []


def test_auto_is_eager_where_there_can_be_no_graph(make_policy, take, exports) -> None:
    measured = take(eager=1000.0)
    learned = make_policy(with_options(PolicyConfig(), widths=(8,), learn_variance=True))
    for policy, sampling in ((learned, SampleConfig("ddpm")), (learned, SampleConfig(clip="dynamic"))):
        assert isinstance(make_planner(policy, sampling), PolicyPlanner)
        with pytest.raises(ConfigError, match=r"learned variance|--clip dynamic"):
            make_planner(policy, sampling, "onnx")
    assert measured == exports == []


@pytest.mark.parametrize("error", [ExportError("no operator for that"), ImportError("cannot load libonnx")])
def test_auto_is_eager_where_the_export_fails_and_remembers(plain, cache: Path, take, monkeypatch, error) -> None:
    policy, sampling, _ = plain
    measured = take(eager=1000.0)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(export, "make_export", fail)
    with pytest.raises(ConfigError, match=f"^--backend onnx: {error}$"):
        make_planner(policy, sampling, "onnx")
    assert isinstance(make_planner(policy, sampling), PolicyPlanner)
    assert set(measured) == {"PolicyPlanner"}
    assert list(json.loads((cache / "backends.json").read_text()).values()) == ["eager"]
    assert not (cache / "graphs").exists()


def test_a_graph_that_differs_too_much_is_used_by_nobody(plain, cache: Path, take, monkeypatch) -> None:
    policy, sampling, _ = plain
    take(eager=1000.0)
    monkeypatch.setitem(export.TOLERANCES, "fp32", 1e-12)
    with pytest.raises(ConfigError, match=r"--backend onnx: the graph's actions differ from the policy's by up to"):
        make_planner(policy, sampling, "onnx")
    assert not (cache / "graphs").exists()
    assert resolve_backend(policy, sampling, "auto", 1) == "eager"


def test_what_was_chosen_for_other_weights_is_tried_for_these(plain, cache: Path, take, monkeypatch, only_onnx) -> None:
    """A choice holds for an architecture; a graph is made of weights, and may fail for them."""
    policy, sampling, _ = plain
    take(eager=1000.0)
    assert resolve_backend(policy, sampling, "auto", 1) == "onnx"
    for folder in list((cache / "graphs").iterdir()):
        backends.remove(folder)
    monkeypatch.setitem(export.TOLERANCES, "fp32", 1e-12)
    assert isinstance(make_planner(policy, sampling), PolicyPlanner)


# The cache folder


def without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", fail)


def in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Path(os.environ["XDG_CACHE_HOME"])
    cache.write_text("")


def that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Path(os.environ["XDG_CACHE_HOME"])

    def refuse(real: Callable[..., object], path: Path, *options: object, **more: object) -> object:
        if path.is_relative_to(cache):
            raise PermissionError(13, "Permission denied")
        return real(path, *options, **more)

    for name in ("exists", "mkdir"):
        refusing = partial(refuse, getattr(Path, name))
        monkeypatch.setattr(Path, name, lambda *given, refusing=refusing, **more: refusing(*given, **more))


@pytest.mark.parametrize("break_cache", [without_home, in_a_file, that_cannot_be_reached])
def test_a_cache_folder_that_cannot_be_written_is_silently_not_used(
    plain, take, exports, only_onnx, break_cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recwarn
) -> None:
    policy, sampling, _ = plain
    take(eager=1000.0)
    with pytest.MonkeyPatch.context() as patch:
        break_cache(patch)
        planners = [make_planner(policy, sampling, "eager"), make_planner(policy, sampling)]
        assert isinstance(planners[1], OnnxPlanner)
    expected, found = sample(policy, planners, sampling)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert 1 <= len(exports) <= 2
    assert [path for path in tmp_path.rglob("*") if path.is_file()] in ([], [tmp_path / "cache"])
    assert len(recwarn) == 0


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache" / "diffusion-policy"
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for given in ("", "relative/cache"):  # the standard says to ignore relative ones
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert cache_folder() == tmp_path / ".cache" / "diffusion-policy"


@pytest.mark.parametrize("content", ["", "[]", '{"a": [1]}'])
def test_choices_that_are_damaged_are_made_anew(plain, cache: Path, take, only_onnx, content: str) -> None:
    cache.mkdir(parents=True)
    (cache / "backends.json").write_text(content)
    take(eager=1000.0)
    assert resolve_backend(plain.policy, plain.sampling, "auto", 1) == "onnx"
    assert "onnx" in json.loads((cache / "backends.json").read_text()).values()


def truncate(folder: Path) -> None:
    content = (folder / "plan.onnx").read_bytes()
    (folder / "plan.onnx").write_bytes(content[: len(content) // 2])


def unplan(folder: Path) -> None:
    (folder / "plan.json").unlink()


def replace_by_a_file(folder: Path) -> None:
    backends.remove(folder)
    folder.write_text("mine")


def replace_by_a_link(folder: Path) -> None:
    backends.remove(folder)
    folder.symlink_to("nowhere")


@pytest.mark.parametrize("damage", [truncate, unplan, replace_by_a_file, replace_by_a_link])
def test_a_damaged_graph_is_made_anew(plain, cache: Path, exports, damage: Callable[[Path], None]) -> None:
    policy, sampling, _ = plain
    make_onnx_planner(policy, sampling, 1)
    make_onnx_planner(policy, sampling, 1)
    assert exports == [1]
    (folder,) = (cache / "graphs").iterdir()
    damage(folder)
    planners = [make_planner(policy, sampling, "eager"), make_onnx_planner(policy, sampling, 1)]
    assert exports == [1, 1]
    expected, found = sample(policy, planners, sampling)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    make_onnx_planner(policy, sampling, 1)
    assert exports == [1, 1]


def test_a_graph_belongs_to_its_weights(plain, exports, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, sampling, _ = plain
    folders = {backends._graph_folder(policy, sampling, rows, samples) for rows in (1, 2) for samples in (1, 2)}
    weight = next(policy.parameters())
    before = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[0] += 1e-6
    folders.add(backends._graph_folder(policy, sampling, 1))
    with torch.no_grad():
        weight.copy_(before)
    assert len(folders) == 5
    assert backends._graph_folder(policy, sampling, 1) in folders


def test_the_oldest_graphs_go(plain, cache: Path) -> None:
    for i in range(KEPT_GRAPHS + 3):
        folder = cache / "graphs" / f"old-{i}"
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text("{}")
        os.utime(folder, (1000 + i, 1000 + i))
    make_onnx_planner(plain.policy, plain.sampling, 1)
    left = {path.name for path in (cache / "graphs").iterdir()}
    assert len(left) == KEPT_GRAPHS
    assert {f"old-{i}" for i in range(4, KEPT_GRAPHS + 3)} < left


# What is refused


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"backend": "tensorrt"},
            "unknown backend 'tensorrt'; choose from eager, compile, graph, onnx, openvino, auto",
        ),
        ({"backend": ""}, "unknown backend ''; choose from"),
        ({"precision": "fp16"}, "unknown precision 'fp16'; choose from fp32, bf16"),
        ({"backend": "graph"}, "--backend graph captures a CUDA graph; this policy is on cpu"),
        ({"backend": "onnx", "precision": "bf16"}, "--precision bf16 is for the other backends"),
    ],
)
def test_what_is_not_there_is_refused(plain, exports, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_planner(plain.policy, plain.sampling, **{"backend": "auto", **options})
    assert exports == []


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_package_that_is_missing_is_named_with_its_extra(plain, take, monkeypatch, missing: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    take(eager=1000.0)
    words = rf"--backend onnx needs {missing}: pip install 'diffusion-policy-toolkit\[onnx\]'"
    with pytest.raises(ConfigError, match=words):
        make_planner(plain.policy, plain.sampling, "onnx")
    assert isinstance(make_planner(plain.policy, plain.sampling), PolicyPlanner)


def test_a_package_that_cannot_be_imported_is_said(plain, take, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusion_policy.serving.graph", None)
    assert "--backend onnx: " in (why_not("onnx", plain.policy, plain.sampling) or "")
    take(eager=1000.0)
    assert resolve_backend(plain.policy, plain.sampling, "auto", 1) == "eager"


def test_bf16_is_near_and_auto_is_eager_with_it(plain, take, exports) -> None:
    measured = take(eager=1000.0)
    policy, sampling, _ = plain
    planners = [make_planner(policy, sampling, "eager"), make_planner(policy, sampling, precision="bf16")]
    assert measured == exports == []
    expected, found = sample(policy, planners, sampling)
    assert 0 < np.median(np.abs(found - expected)) < 0.05  # an angle of an untrained network may turn further
