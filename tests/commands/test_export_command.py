"""`diffusion-policy export`, and the backends of `rollout` and `evaluate`, as a user meets them."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

import diffusion_policy as dp
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.cli import main
from diffusion_policy.commands import rollout
from diffusion_policy.config import ConfigError
from diffusion_policy.serving import export
from diffusion_policy.serving.graph import ExportError
from diffusion_policy.serving.plan_folder import read_plan

pytestmark = pytest.mark.usefixtures("graphs_made_once")
QUICK = ["--sampling-steps", "2"]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    """The user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail as a user's mistake; returns the one line that it says."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    text = capsys.readouterr().err
    assert status == 2, text
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def test_export_says_what_it_wrote_and_whether_a_plan_fits(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "exported"
    command = ["export", "--checkpoint", str(run), "--output", str(out), *QUICK, "--control-rate", "0.01"]
    assert main(command) == 0
    said = capsys.readouterr()
    first, second = said.out.splitlines()
    assert re.fullmatch(
        rf"plan\.onnx and plan\.json in {out}: \d\.\d MB, actions within [\d.]+e-\d\d of the checkpoint's "
        r"\(share of the action's scale\)",
        first,
    )
    assert re.fullmatch(r"a plan takes .* ms \(p99 .* ms\), which fits a control step of 100000\.0 ms", second)
    assert said.err == ""
    plan = read_plan(out)
    assert plan.weights_sha256 == checkpoint.load(run).weights_sha256
    assert (plan.control_rate, plan.sampling.sampling_steps) == (0.01, 2)
    assert (
        main(["export", "--checkpoint", str(run), "--output", str(tmp_path / "b"), *QUICK, "--control-rate", "1e6"])
        == 0
    )
    assert "longer than a control step of 0.0 ms: " in capsys.readouterr().out.replace("\n", "")


def test_an_exported_checkpoint_acts_as_the_checkpoint(run: Path, tmp_path: Path) -> None:
    loaded = dp.load(run, device="cpu")
    plan = loaded.export(tmp_path / "exported", sampling_steps=2)
    assert plan.action_error <= 1e-4
    controllers = [
        loaded.controller(seed=3, sampling_steps=2),
        dp.load(tmp_path / "exported", threads=1).controller(seed=3),
        loaded.controller(seed=3, sampling_steps=2, backend="onnx"),
    ]
    rng = np.random.default_rng(0)
    for _ in range(20):
        observation = {key: rng.uniform(-0.5, 0.5, shape) for key, shape in plan.observation_shapes.items()}
        expected, *found = [one.act(observation) for one in controllers]
        np.testing.assert_allclose(found, [expected, expected], rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="unknown option 'sampling_step'"):
        loaded.export(tmp_path / "no", sampling_step=2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch", "0"], "batch must be at least 1; got 0"),
        (["--samples", "0"], "samples must be at least 1; got 0"),
        (["--batch", "5000"], "at most 4096 sequences are sampled at once; got 5000 x 1"),
        (["--tolerance", "nan"], "tolerance must be above 0; got nan"),
        (["--tolerance", "1e-20"], "at most 1e-20 is allowed (diffusion-policy export --tolerance)"),
        (["--control-rate", "0"], "control-rate must be above 0; got 0.0"),
        (["--form", "unrolled"], "invalid choice 'unrolled' for argument '--form'"),
        (["--clip", "dynamic"], "--clip dynamic needs a quantile, which ONNX has no operator for; export with static"),
        (["--sampling-steps", "21"], "sampling steps must be from 1 to the 20 noise levels; got 21"),
        (["--mode", "left"], "cannot be steered to mode 'left'"),
    ],
)
def test_export_refuses(run: Path, tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    options = QUICK if "--sampling-steps" not in arguments else []
    text = fails(capsys, "export", "--checkpoint", run, "--output", tmp_path / "e", *options, *arguments)
    assert message in text
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_what_is_there_and_what_is_not(run: Path, tmp_path: Path, capsys) -> None:
    text = fails(capsys, "export", "--checkpoint", run, "--output", tmp_path)
    assert f"{tmp_path} already exists; choose another --output or delete it first" in text
    text = fails(capsys, "export", "--checkpoint", tmp_path / "nowhere", "--output", tmp_path / "e")
    assert "no checkpoint at" in text


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_package_that_is_missing_is_named_with_its_extra(
    run: Path, tmp_path: Path, capsys, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    text = fails(capsys, "export", "--checkpoint", run, "--output", tmp_path / "e")
    assert f"this needs {missing}: pip install 'diffusion-policy-toolkit[onnx]'" in text
    text = fails(capsys, "rollout", "--checkpoint", run, "--backend", "onnx", "--episodes", 1, "--device", "cpu")
    assert f"--backend onnx needs {missing}: pip install 'diffusion-policy-toolkit[onnx]'" in text


def test_a_rollout_ends_the_same_whatever_samples(run: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "PARALLEL", 1)  # plans for one row, as the exports above
    said = []
    for backend in ("eager", "onnx"):
        command = ["rollout", "--checkpoint", str(run), "--episodes", "2", "--workers", "1", "--device", "cpu", *QUICK]
        assert main([*command, "--backend", backend]) == 0
        said.append(re.findall(r"^seed \d+: \w+ after", capsys.readouterr().out, re.MULTILINE))
    assert len(said[0]) == 2
    assert said[0] == said[1]


def test_a_rollout_samples_in_bf16_but_not_with_onnxruntime(run: Path, capsys) -> None:
    command = ["rollout", "--checkpoint", str(run), "--episodes", "1", "--workers", "1", "--device", "cpu", *QUICK]
    assert main([*command, "--precision", "bf16"]) == 0
    text = fails(capsys, *command, "--precision", "bf16", "--backend", "onnx")
    assert "--precision bf16 is for the other backends" in text
    assert "--backend graph captures a CUDA graph; this policy is on cpu" in fails(
        capsys, *command, "--backend", "graph"
    )


def test_an_evaluation_says_what_sampled(blank_pictures: None, run: Path, tmp_path: Path) -> None:
    command = ["evaluate", "--checkpoint", str(run), "--output", str(tmp_path), "--episodes", "2", "--workers", "1"]
    options = ["--videos", "0", "--parallel", "1", "--device", "cpu", "--backend", "onnx", *QUICK]
    assert main([*command, *options]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["backend"]["mode"] == "onnx"
    assert results["planning_latency_ms"]["p50"]["value"] > 0


def test_a_policy_whose_graph_differs_too_much_is_rolled_out_by_eager(
    run: Path, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "PARALLEL", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("diffusion_policy.serving.backends.EXPORT_TIME", 0.0)
    monkeypatch.setitem(export.TOLERANCES, "fp32", 1e-20)
    command = ["rollout", "--checkpoint", str(run), "--episodes", "1", "--workers", "1", "--device", "cpu", *QUICK]
    assert main(command) == 0
    assert "seed" in capsys.readouterr().out
    with pytest.raises(ExportError):
        dp.load(run, device="cpu").export(tmp_path / "e", sampling_steps=2, tolerance=1e-20)
