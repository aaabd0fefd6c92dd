"""Exports: what is written acts as the policy does, or nothing is written."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from diffusion_policy.basics.files import FileError
from diffusion_policy.config import ConfigError, PolicyConfig, SampleConfig, with_options
from diffusion_policy.control.chunking import Chunking, Handover, Inpainted
from diffusion_policy.diffusion.guidance import CLIPS
from diffusion_policy.diffusion.prediction import PREDICTIONS
from diffusion_policy.diffusion.samplers import SAMPLERS
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.serving import export as exporting_module
from diffusion_policy.serving import exported, plan_folder
from diffusion_policy.serving.backends import make_planner
from diffusion_policy.serving.export import TOLERANCES, Exporting, draw_observations, export, make_export
from diffusion_policy.serving.exported import OnnxPlanner
from diffusion_policy.serving.graph import ExportError, Graphs
from diffusion_policy.serving.plan_folder import FILES, PLAN, read_export, read_plan

RNG = np.random.default_rng(0)
TINY = with_options(PolicyConfig(), widths=(8,), level_dim=16, prediction_horizon=8, action_horizon=4)


def difference(policy: DiffusionPolicy, planner: OnnxPlanner, sampling: SampleConfig, rows: int, samples: int) -> float:
    """Largest difference of an action, as a share of the normalizer's scale."""
    observations = draw_observations(policy, rows, RNG)
    noise = policy.draw_noise([RNG] * rows, samples, sampling)
    tensors = {key: torch.from_numpy(values) for key, values in observations.items()}
    expected = policy.sample_from(tensors, noise, sampling)[:, :, policy.config.observation_horizon - 1 :]
    found = planner.sample(observations, noise)
    assert found.shape == (rows, samples, planner.steps, *policy.shapes.action)
    normalize = policy.normalizer.normalize
    return float((normalize("action", torch.from_numpy(found)) - normalize("action", expected)).abs().max())


@pytest.mark.parametrize("form", FILES)
def test_a_graph_acts_as_the_policy_whatever_its_keys_are_called(plain, form: str, request) -> None:
    folder = request.getfixturevalue(f"{form}_folder")
    loaded = exported.load(folder, threads=1)
    assert loaded.config.form == form
    assert set(loaded.config.observation_shapes) == {"noise", "actions", "films/Ort der Füße"}
    assert loaded.config.action_error <= TOLERANCES["fp32"]
    for rows in (1, 4):
        assert difference(plain.policy, loaded.planner, plain.sampling, rows, 1) <= 1e-4
    assert {path.name for path in folder.iterdir()} == {PLAN, *FILES[form]}


@pytest.mark.parametrize("form", FILES)
def test_several_sequences_for_several_robots_in_float32_and_guided(guided, write, form: str) -> None:
    folder = write(guided, form=form)
    loaded = exported.load(folder, threads=1)
    assert (loaded.config.batch, loaded.config.samples, loaded.config.dtype) == (2, 3, "float32")
    for rows in (1, 2, 5):
        assert difference(guided.policy, loaded.planner, guided.sampling, rows, 3) <= 2e-3  # unclipped, beyond the data
    noise = np.zeros((2, 3, *loaded.planner.noise_shape))
    assert loaded.planner.sample(draw_observations(guided.policy, 2, RNG), noise).dtype == np.float32


def test_an_instruction_is_part_of_the_graph(make_policy, plain, write) -> None:
    embeddings = RNG.normal(size=(3, 5)).astype(np.float32)
    config = dataclasses.replace(TINY, condition_on_instruction=True, condition_dropout=0.1)
    policy = make_policy(config, instructions=("go left", "go right", "stop"), embeddings=embeddings)
    sampling = SampleConfig(sampling_steps=2, instruction="go on", guidance=0.5)
    told = policy.with_instruction("go on", embeddings[:2].mean(axis=0))
    folder = write(plain._replace(policy=told, sampling=sampling))
    assert exported.load(folder).config.sampling.instruction == "go on"
    assert difference(told, exported.load(folder, threads=1).planner, sampling, 2, 1) <= 1e-4


def test_both_forms_give_the_same(plain, guided, loop_folder, network_folder, write) -> None:
    of_guided = write(guided), write(guided, form="network")
    for one, folders in ((plain, (loop_folder, network_folder)), (guided, of_guided)):
        loop, network = (exported.load(folder, threads=1).planner for folder in folders)
        observations = draw_observations(one.policy, 3, RNG)
        noise = RNG.standard_normal((3, one.exporting.samples, *loop.noise_shape), np.float32)
        np.testing.assert_allclose(loop.sample(observations, noise), network.sample(observations, noise), 1e-4, 1e-4)


def test_the_folder_says_what_the_graph_is(plain, loop_folder: Path, network_folder: Path) -> None:
    config = read_plan(loop_folder)
    assert (config.batch, config.samples, config.dtype, config.precision) == (1, 1, "float64", "fp32")
    assert (config.observation_horizon, config.steps, config.action_horizon, config.calls) == (2, 7, 4, 3)
    assert config.sampling == plain.sampling
    assert config.noise_shape == (1, 8, 3)
    assert config.action_shape == (2,)
    said = json.loads((loop_folder / PLAN).read_text())
    assert (said["format"], said["version"]) == ("diffusion-policy plan", 1)
    assert (loop_folder / PLAN).stat().st_size < 3000
    model = onnx.load(loop_folder / "plan.onnx")
    names = [one.name for one in model.graph.input]
    assert names == ["observation/actions", "observation/films/Ort der Füße", "observation/noise", "noise"]
    assert [one.name for one in model.graph.output] == ["actions"]
    assert {one.domain: one.version for one in model.opset_import}[""] == 20
    assert {one.domain for one in model.opset_import} <= {"", "ai.onnx"}  # no operators but ONNX's own
    content = (loop_folder / "plan.onnx").read_bytes()
    assert len(content) < 250_000
    assert b"/diffusion_policy/" not in content  # where the exporting machine has its source
    for value in (*model.graph.input, *model.graph.output):
        assert all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
    table = np.load(network_folder / "table.npy")
    assert (table.shape, table.dtype) == (read_plan(network_folder).table_shape, np.float32)


def count_weights(graph: onnx.GraphProto) -> Counter[int]:
    """Numbers in matrices within the loop, by their type."""
    (loop,) = (node for node in graph.node if node.op_type == "Loop")
    counts: Counter[int] = Counter()
    for one in loop.attribute[0].g.initializer:
        counts[one.data_type] += math.prod(one.dims) if len(one.dims) == 2 and min(one.dims) > 3 else 0
    return counts


def test_weights_in_int8_are_so_and_their_error_is_told(plain, write, loop_folder: Path) -> None:
    folder = write(plain, precision="int8")
    config = read_plan(folder)
    assert config.precision == "int8"
    assert TOLERANCES["fp32"] < config.action_error < 2.1  # an angle of an untrained network may turn around
    numbers = [count_weights(onnx.load(one / "plan.onnx").graph) for one in (folder, loop_folder)]
    assert numbers[0][TensorProto.INT8] > 0.9 * numbers[1][TensorProto.FLOAT]
    assert numbers[0][TensorProto.FLOAT] < 0.1 * numbers[1][TensorProto.FLOAT]
    planner = exported.load(folder, threads=1).planner
    assert 0 < difference(plain.policy, planner, plain.sampling, 8, 1) < 2.1


def test_what_differs_too_much_is_not_written(plain, tmp_path: Path) -> None:
    message = r"the graph's actions differ from the policy's by up to .*e-\d+ of the action's scale; at most 1e-12 is"
    with pytest.raises(ExportError, match=message):
        export(plain.policy, tmp_path / "new" / "p", plain.sampling, plain.exporting, tolerance=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_is_not_written(plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting_module, "compare", lambda *_: float("nan"))
    with pytest.raises(ExportError, match="differ from the policy's by up to nan"):
        export(plain.policy, tmp_path / "p", plain.sampling, plain.exporting, tolerance=1e9)


def test_a_folder_that_exists_is_left_alone(plain, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("", "file", "link"):
        with pytest.raises(ConfigError, match="already exists; choose another --output or delete it first"):
            export(plain.policy, tmp_path / name, plain.sampling)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_policy_on_a_gpu_is_not_exported(plain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionPolicy, "device", torch.device("cuda", 1))
    with pytest.raises(ExportError, match="exported from the CPU; this one is on cuda:1: load it with device cpu"):
        make_export(plain.policy, plain.sampling, Exporting())


@pytest.mark.parametrize(
    "options, sampling, message",
    [
        ({"batch": 0}, {}, "batch and samples must be at least 1; got 0 and 1"),
        ({"samples": -1}, {}, "batch and samples must be at least 1; got 1 and -1"),
        ({"batch": 4096, "samples": 2}, {}, "at most 4096 sequences are sampled at once; got 4096 x 2"),
        ({}, {"sampling_steps": 101}, "sampling steps must be from 1 to the 100 noise levels; got 101"),
        ({}, {"sampling_steps": 100, "corrector_steps": 40}, "the table of a sampler has at most 4194304 numbers"),
        ({}, {"mode": "left"}, "cannot be steered to mode 'left'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(plain, monkeypatch, options, sampling, message) -> None:
    def refuse(*_: object) -> Graphs:
        raise AssertionError("it was begun")

    monkeypatch.setattr(exporting_module, "make_graphs", refuse)
    with pytest.raises(ValueError, match=message):
        make_export(plain.policy, SampleConfig(**sampling), Exporting(**options))


KILLED = """
import os, signal, sys
from pathlib import Path
from diffusion_policy.serving import plan_folder

folder, new, after = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
write, written = plan_folder.write_whole, []

def write_and_die(path, content):
    if len(written) == after:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path)
    write(path, content)

plan_folder.write_whole = write_and_die
config, contents = plan_folder.read_export(folder)
assert "torch" not in sys.modules
plan_folder.write_export(new, config, contents)
"""


def test_a_kill_leaves_a_whole_folder_or_none(network_folder: Path, tmp_path: Path) -> None:
    for after in (0, 2, 4):
        new = tmp_path / "exported"
        done = subprocess.run([sys.executable, "-c", KILLED, str(network_folder), str(new), str(after)])
        assert done.returncode == -signal.SIGKILL
        assert not new.exists()
        assert all(path.name.startswith(".exported.") for path in tmp_path.iterdir())
    subprocess.run([sys.executable, "-c", KILLED, str(network_folder), str(new), "99"], check=True)
    assert read_export(new) == read_export(network_folder)
    assert os.stat(new).st_mode & 0o777 == 0o755


def test_a_disk_that_fills_up_leaves_nothing(loop_folder: Path, tmp_path: Path, monkeypatch) -> None:
    config, contents = read_export(loop_folder)
    write = plan_folder.write_whole

    def fill(path: Path, content: bytes) -> None:
        if path.name == PLAN:
            raise FileError("cannot write: no space left on device")
        write(path, content)

    monkeypatch.setattr(plan_folder, "write_whole", fill)
    with pytest.raises(FileError, match="no space left"):
        plan_folder.write_export(tmp_path / "new", config, contents)
    assert list(tmp_path.iterdir()) == []


def test_what_the_robot_and_the_checkpoint_are_is_kept(plain, tmp_path: Path) -> None:
    told = export(plain.policy, tmp_path / "p", plain.sampling, control_rate=12.5, weights_sha256="ab" * 32)
    assert (told.control_rate, told.weights_sha256) == (12.5, "ab" * 32)
    assert read_plan(tmp_path / "p") == told


def test_observations_to_compare_with_are_such_as_were_demonstrated(plain) -> None:
    observations = draw_observations(plain.policy, 500, RNG)
    for key, rows in observations.items():
        assert rows.shape == (500, 2, *plain.policy.shapes.observations[key])
        normalized = plain.policy.normalizer.normalize(key, torch.from_numpy(rows))
        assert normalized.abs().max() <= 1 + 1e-5
        assert (normalized.flatten(0, 1).std(dim=0) > 0.4).all()
    assert (np.abs(observations["noise"][..., 1]) <= np.pi).all()


CLIPPED = [name for name in CLIPS if name != "dynamic"]
GRID = [
    *((name, "velocity", "static", 0.0, 1) for name in SAMPLERS if name != "ddpm"),
    *(("ddim", prediction, clip, w, 0) for prediction in PREDICTIONS for clip in CLIPPED for w in (0.0, 0.7)),
    ("ddpm", "sample", "none", -0.5, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("sampler, prediction, clip, guidance, corrector", GRID)
def test_any_sampling_is_exported(
    make_policy: Callable[..., DiffusionPolicy], sampler, prediction, clip, guidance, corrector, tmp_path: Path
) -> None:
    options = {"prediction": prediction, "condition_dropout": 0.1, "schedule": "linear"}
    policy = make_policy(dataclasses.replace(TINY, **options), angles={"action": (1,)})
    sampling = SampleConfig(sampler, 4, clip=clip, guidance=guidance, corrector_steps=corrector)
    exporting = Exporting(form="network" if corrector else "loop", samples=2)
    told = export(policy, tmp_path / "p", sampling, exporting, tolerance=1e-2)
    scale = 1 if clip == "static" else 20  # of what an untrained network says without a clip
    assert told.action_error <= 1e-4 * scale
    planner = exported.load(tmp_path / "p", threads=1).planner
    assert difference(policy, planner, sampling, 1, 2) <= 1e-4 * scale


@pytest.mark.slow
@pytest.mark.parametrize("form", FILES)
def test_a_thousand_steps_are_exported(make_policy: Callable[..., DiffusionPolicy], tmp_path: Path, form) -> None:
    policy = make_policy(dataclasses.replace(TINY, noise_levels=1000, prediction="sample"))
    sampling = SampleConfig("ddpm", 1000)
    export(policy, tmp_path / "p", sampling, Exporting(form=form), tolerance=1e-2)
    planner = exported.load(tmp_path / "p", threads=1).planner
    found = [difference(policy, planner, sampling, 1, 1) for _ in range(5)]
    assert np.median(found) <= 1e-4
    assert max(found) <= 1e-2  # so many steps of an untrained network amplify rounding, in torch too


@pytest.mark.parametrize("form", ["loop", "network"])
@pytest.mark.parametrize("guidance", [0.0, 0.7])
def test_a_graph_goes_on_from_given_actions_as_the_policy_does(make_policy, tmp_path: Path, form, guidance) -> None:
    config = with_options(TINY, prediction="sample", max_delay=3, condition_dropout=0.1)
    policy = make_policy(config, angles={"action": (0,)})
    sampling = SampleConfig("ddim", 3, guidance=guidance)
    plan = export(policy, tmp_path / "out", sampling, Exporting(batch=2, samples=2, form=form))
    assert plan.longest_prefix == 3
    planner = exported.load(tmp_path / "out", 1).planner
    eager = make_planner(policy, sampling, "eager")
    observations, noise = draw_observations(policy, 3, RNG), policy.draw_noise([RNG] * 3, 2, sampling)
    actions = np.full((3, planner.steps, *policy.shapes.action), np.nan)
    actions[0, :3], actions[1, :1] = 0.3, -0.2
    steering = Inpainted()(Handover(actions, 3, 4, np.ones(3, int)))
    found = planner.sample(observations, noise, steering)
    np.testing.assert_allclose(found, eager.sample(observations, noise, steering), atol=1e-4)
    np.testing.assert_allclose(found[0, :, :3], np.full((2, 3, 2), 0.3), atol=1e-4)
    np.testing.assert_allclose(planner.sample(observations, noise), eager.sample(observations, noise), atol=1e-4)
    Chunking(Inpainted(), samples=2).require(planner, 3)
