"""Exported policies act without torch; and folders that a stranger may hand over end in our own error of one line, or
in a policy that acts."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import diffusion_policy as dp
from diffusion_policy.checkpoints.checkpoint import CheckpointError
from diffusion_policy.config import ConfigError
from diffusion_policy.control.chunking import Chunking, Guided, scored
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.control.single import SingleController
from diffusion_policy.serving import exported
from diffusion_policy.serving.plan_folder import (
    FILES,
    MAX_TABLE,
    PLAN,
    ExportedError,
    is_exported,
    names_other_files,
    read_export,
    read_plan,
)

HOSTILE_VALUES = [
    10**15, 2**62, 10**400, -1, 0, 1, 2, 3, 7, 4097, 0.5, 1e308, None, True, False, "", "a", "x" * 10_000,
    "../../../etc/passwd", "\ud800", "\x1b[2J\n", float("nan"), float("inf"), [], {}, [[]], {"a": 1}, [0], [1, 2],
    [10**9] * 3, [8] * 1025, [-3, 2, 2], [1, 8, 3], [4, 8, 3], "loop", "network", "int8", "float32", "ddpm",
]  # fmt: skip


@pytest.fixture
def copy(loop_folder: Path, tmp_path: Path) -> Path:
    """One that may be damaged."""
    return Path(shutil.copytree(loop_folder, tmp_path / "exported"))


@pytest.fixture
def parts(network_folder: Path, tmp_path: Path) -> Path:
    """One in parts that may be damaged."""
    return Path(shutil.copytree(network_folder, tmp_path / "parts"))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ExportedError, match=match) as info:
        exported.load(folder, threads=1)
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 1100


def observe(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One step."""
    return {"noise": rng.normal(2, 1, 3), "actions": rng.normal(size=(2, 2)), "films/Ort der Füße": rng.normal(size=1)}


# Acting


@pytest.mark.parametrize("form", FILES)
def test_the_same_seed_gives_the_actions_of_torch(plain, form: str, request) -> None:
    folder, rng = request.getfixturevalue(f"{form}_folder"), np.random.default_rng(0)
    for seed, options in ((0, {}), (3, {"action_horizon": 2, "delay_steps": 2})):
        controllers = (
            SingleController(PolicyPlanner(plain.policy, plain.sampling), seed, **options),
            exported.load(folder, threads=1).controller(seed, **options),
        )
        for _ in range(20):
            observation = observe(rng)
            actions = [one.act(observation) for one in controllers]
            np.testing.assert_allclose(*actions, rtol=1e-4, atol=1e-4)
            assert (controllers[0].plan is None) == (controllers[1].plan is None)


TORCH_FREE = """
import sys
heavy = (
    "torch", "zarr", "einops", "gymnasium", "pybullet", "fsspec", "google_crc32c", "scipy", "tyro", "rich",
    "matplotlib", "jinja2", "imageio", "safetensors", "onnx", "onnxscript", "openvino",
)
for name in heavy:
    sys.modules[name] = None  # importing it fails
import numpy as np
import diffusion_policy as dp

loaded = dp.load(sys.argv[1], threads=1)
controller = loaded.controller(seed=0, sampler="ddim")
rng = np.random.default_rng(0)
observation = {key: rng.normal(size=shape) for key, shape in loaded.config.observation_shapes.items()}
actions = [controller.act(observation).tolist() for _ in range(6)]
print(controller.latency(10, plans=3))
import json
print(json.dumps(actions))
"""


def test_a_robot_needs_numpy_and_onnxruntime_alone(loop_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TORCH_FREE, str(loop_folder)], capture_output=True, text=True, check=True
    )
    said, actions = done.stdout.splitlines()
    assert said.startswith("a plan takes ")
    controller = dp.load(loop_folder, threads=1).controller(seed=0)
    rng = np.random.default_rng(0)
    shapes = read_plan(loop_folder).observation_shapes
    observation = {key: rng.normal(size=shape) for key, shape in shapes.items()}
    np.testing.assert_allclose(json.loads(actions), [controller.act(observation) for _ in range(6)], atol=1e-6)


def test_without_torch_a_folder_that_holds_no_export_says_so(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None\nimport diffusion_policy as dp\ndp.load(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"no plan.json in {tmp_path}, and a checkpoint cannot be loaded without torch" in done.stderr


def test_a_checkpoint_is_no_export(loop_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert is_exported(loop_folder)
    assert not is_exported(tmp_path)
    assert not is_exported(tmp_path / "nowhere")
    with pytest.raises(CheckpointError):
        dp.load(tmp_path)


def test_onnxruntime_that_is_missing_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install onnxruntime, or 'diffusion-policy-toolkit\[onnx\]' to export"):
        exported.load(copy)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampling_steps": 8}, "exported with sampling_steps=3; got 8; export it again"),
        ({"sampler": "ddpm"}, "exported with sampler='ddim'; got 'ddpm'; export it again"),
        ({"mode": "left"}, "exported with mode=None; got 'left'"),
        ({"sampling_step": 8}, r"unknown option 'sampling_step'; did you mean sampling_steps\?"),
        ({"backend": "eager"}, "unknown option 'backend'"),
        ({"eta": 2.0}, "eta must be from 0 to 1; got 2.0"),
        ({"action_horizon": 8}, "action-horizon must be from 1 to the 7 steps of a plan; got 8"),
        ({"delay_steps": 4}, "delay-steps must be from 0 to 3"),
    ],
)
def test_another_sampling_than_the_exported_one_is_refused(loop_folder: Path, options: dict, message: str) -> None:
    loaded = exported.load(loop_folder, threads=1)
    loaded.controller(sampling_steps=3, sampler="ddim", mode=None)
    with pytest.raises(ConfigError, match=message):
        loaded.controller(**options)


@pytest.mark.parametrize("form", FILES)
def test_observations_of_other_shapes_or_not_finite_are_refused(request, form: str) -> None:
    planner = exported.load(request.getfixturevalue(f"{form}_folder"), threads=1).planner
    noise = np.zeros((2, 1, *planner.noise_shape), np.float32)
    sound = {key: np.zeros((2, 2, *shape)) for key, shape in planner.observation_shapes.items()}
    assert planner.sample(sound | {"beside": np.zeros(3)}, noise).shape == (2, 1, 7, 2)
    for change, message in (
        ({"noise": np.zeros((2, 2, 4))}, r"the policy observes noise of shape \(2, 2, 3\); got \(2, 2, 4\)"),
        ({"noise": np.zeros((1, 2, 3))}, r"noise of shape \(2, 2, 3\); got \(1, 2, 3\)"),
        ({"noise": np.full((2, 2, 3), np.nan)}, "the observation noise holds NaN or infinity"),
        ({"actions": np.full((2, 2, 2, 2), np.inf)}, "the observation actions holds NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            planner.sample(sound | change, noise)
    with pytest.raises(ValueError, match=r"the policy observes actions of shape \(2, 2, 2, 2\); got nothing"):
        planner.sample({"noise": sound["noise"]}, noise)
    for wrong in (noise[:0], noise[:, :, :, :4], np.zeros((2, 1, 5, 8, 3), np.float32)):
        with pytest.raises(
            ValueError, match=r"exported for noise of shape \(B, 1, 1, 8, 3\); got .*as it was exported"
        ):
            planner.sample({key: rows[: len(wrong)] for key, rows in sound.items()}, wrong)
    assert planner.sample(sound, noise.astype(np.float64)).shape == (2, 1, 7, 2)


def test_a_controller_says_how_many_sampling_steps_would_fit(loop_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("diffusion_policy.control.latency.time_plans", lambda *_, **options: [150.0] * 4)
    said = str(exported.load(loop_folder, threads=1).controller().latency(control_rate=10))
    assert "about 2 --sampling-steps instead of 3 would fit" in said


# Damaged


def within(tree: dict[str, Any], place: tuple[str, ...], value: object) -> str:
    """The JSON with another value somewhere."""
    tree = json.loads(json.dumps(tree))
    node = tree
    for name in place[:-1]:
        node = node[name]
    node[place[-1]] = value
    return json.dumps(tree)


@pytest.mark.parametrize("name", [name for names in FILES.values() for name in names])
def test_a_damaged_file_is_refused(copy: Path, parts: Path, name: str) -> None:
    folder = copy if name in FILES["loop"] else parts
    content = (folder / name).read_bytes()
    for changed in (content[:-1], content[: len(content) // 2], b"", content[:100] + b"\x00" + content[101:]):
        (folder / name).write_bytes(changed)
        refused(folder, rf"{name} is damaged: its size or SHA-256 is not what plan.json says")
    (folder / name).write_bytes(content + b"\0")
    refused(folder, rf"{name} has {len(content) + 1} bytes; at most {len(content)} are read")
    (folder / name).unlink()
    refused(folder, rf"{name} is missing")
    os.mkfifo(folder / name)
    refused(folder, rf"{name} is no regular file")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    refused(folder, rf"{name} is no regular file")
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    exported.load(folder, threads=1)


def test_a_plan_that_is_no_json_of_ours_is_refused(copy: Path) -> None:
    plan = copy / PLAN
    text = plan.read_text()
    for content, message in (
        (text[: len(text) // 2], "is not JSON that can be read"),
        ("", "is not JSON that can be read"),
        ("[]", "does not describe an exported policy"),
        ("{}", "does not describe an exported policy"),
        ("[" * 10_000, "is nested more than 32 levels deep"),
        (" " * (4 * 2**20 + 1), "at most 4194304 are read"),
        (text.replace("diffusion-policy plan", "diffusion-policy checkpoint"), "does not describe an exported policy"),
        (text.replace('"version": 1', '"version": 2'), "has the version 2; this package reads 1"),
        (text.replace('"version": 1', '"version": true'), "has the version True; this package reads 1"),
        (text.replace('"version": 1', '"version": "' + 3000 * "x" + '"'), "has the version 'xxx"),
        (text.replace('"form"', '"from"'), r"unknown option 'from'; did you mean form\?"),
        (text.replace('"batch": 1,', ""), "'batch' is missing"),
        (text.replace('"batch": 1', '"batch": NaN'), "batch must be a whole number; got nan"),
        (text.replace('"batch": 1', '"batch": 1e400'), "batch must be a whole number; got inf"),
        (text.replace('"batch": 1', f'"batch": {2**63}'), "batch must be a whole number; got 92"),
        (text.replace('"batch": 1', '"batch": 4097'), "at most 4096 sequences are sampled at once; got 4097 x 1"),
        (text.replace('"calls": 3', '"calls": 3000'), f"the table of a sampler has at most {MAX_TABLE} numbers"),
        (text.replace('"steps": 7', '"steps": 8'), "steps must be T - To \\+ 1"),
        (
            within(json.loads(text), ("observation_shapes", "actions"), [10**8, 2]),
            "a call takes at most 268435456",
        ),
        (
            within(json.loads(text), ("observation_shapes", "actions"), [0]),
            "actions must have sizes of at least 1",
        ),
        (within(json.loads(text), ("observation_shapes", "a\nb"), [1]), "keys and modes have at most 200 printable"),
        (within(json.loads(text), ("noise_shape",), [1, 8, 10**8]), "at most 268435456 numbers of noise and sequences"),
        (within(json.loads(text), ("noise_shape",), [8, 3]), r"shapes must be \(draws, T, D\) and \(A,\)"),
        (within(json.loads(text), ("action_horizon",), 8), "action_horizon must be at most the 7 steps; got 8"),
        (within(json.loads(text), ("files", "plan.onnx", "size"), -1), "plan.onnx has 0 to 2147483648 bytes; got -1"),
        (text.replace('"sampler": "ddim"', '"sampler": "dmid"'), "sampling, sampler must be one of ddim"),
        (text.replace('"plan.onnx"', '"../plan.onnx"'), "the form loop has the files plan.onnx; got"),
    ):
        assert content != text
        plan.write_text(content)
        refused(copy, message)
    plan.unlink()
    plan.symlink_to("/dev/zero")
    refused(copy, "plan.json is no regular file")


def test_any_value_in_any_field_of_the_plan_is_refused_or_acts(copy: Path, parts: Path) -> None:
    counts = {"refused": 0, "acted": 0}
    rng = random.Random(0)
    for folder in (copy, parts):
        tree = json.loads((folder / PLAN).read_text())
        places = [(name,) for name in tree]
        places += [(name, one) for name in ("files", "sampling", "observation_shapes") for one in tree[name]]
        places += [("files", name, what) for name in tree["files"] for what in ("size", "sha256")]
        for place in places:
            for value in rng.sample(HOSTILE_VALUES, 3):
                (folder / PLAN).write_text(within(tree, place, value))
                try:
                    loaded = exported.load(folder, threads=1)
                except ExportedError as error:
                    counts["refused"] += "\n" not in str(error) and len(str(error)) < 1100
                else:  # what only says where a policy is from may say anything
                    action = loaded.controller().act(observe(np.random.default_rng(0)))
                    counts["acted"] += action.shape == (2,)
        assert sum(counts.values()) % (3 * len(places)) == 0 or folder is parts
    assert counts["refused"] > 5 * counts["acted"] > 0


# Graphs of strangers


def graph_of(nodes: list, inputs: dict[str, list], outputs: dict[str, list], initializers: tuple = ()) -> bytes:
    def values(named: dict[str, list]) -> list:
        kinds = {"noise": TensorProto.FLOAT}
        return [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.DOUBLE), shape) for n, shape in named.items()]

    graph = helper.make_graph(nodes, "g", values(inputs), values(outputs), list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


INPUTS = {
    "observation/actions": [1, 2, 2, 2], "observation/films/Ort der Füße": [1, 2, 1], "observation/noise": [1, 2, 3],
    "noise": [1, 1, 1, 8, 3],
}  # fmt: skip
ACTIONS = {"actions": [1, 1, 7, 2]}


def constant(value: np.ndarray, **fields: Any) -> onnx.NodeProto:
    tensor = numpy_helper.from_array(value, "c")
    return helper.make_node("Constant", [], ["actions"], value=tensor, **fields)


def test_a_graph_that_is_what_it_says_is_run_whoever_made_it(copy: Path, seal) -> None:
    (copy / "plan.onnx").write_bytes(graph_of([constant(np.full((1, 1, 7, 2), 5.0))], INPUTS, ACTIONS))
    seal(copy)
    controller = exported.load(copy, threads=1).controller()
    assert controller.act(observe(np.random.default_rng(0))).tolist() == [5, 5]


def test_a_controller_makes_as_many_plans_as_were_exported(copy: Path, seal) -> None:
    inputs, outputs = INPUTS | {"noise": [1, 3, 1, 8, 3]}, {"actions": [1, 3, 7, 2]}
    plans = np.array([5.0, 1.0, 9.0])[None, :, None, None] * np.ones((1, 3, 7, 2))
    (copy / "plan.onnx").write_bytes(graph_of([constant(plans)], inputs, outputs))
    seal(copy, lambda tree: tree.update(samples=3))
    loaded = exported.load(copy, threads=1)
    message = "this chunking makes 1 plans for an observation; this policy was exported with --samples 3"
    with pytest.raises(ConfigError, match=message):
        loaded.controller()
    with pytest.raises(ConfigError, match="needs the network's gradient"):
        loaded.controller(chunking=Chunking(Guided(), samples=3))
    smallest = Chunking(score=scored(lambda observations, plans: -plans[:, :, 0, 0]), samples=3)
    controller = loaded.controller(chunking=smallest)
    assert controller.act(observe(np.random.default_rng(0))).tolist() == [1, 1]
    assert loaded.controller(chunking="bid", plans=3).act(observe(np.random.default_rng(0))).tolist() == [5, 5]


@pytest.mark.parametrize(
    "inputs, outputs, value",
    [
        (INPUTS | {"more": [1]}, ACTIONS, np.zeros((1, 1, 7, 2))),
        ({name: shape for name, shape in INPUTS.items() if name != "noise"}, ACTIONS, np.zeros((1, 1, 7, 2))),
        (INPUTS | {"observation/noise": [1, 2, 4]}, ACTIONS, np.zeros((1, 1, 7, 2))),
        (INPUTS | {"noise": ["B", 1, 1, 8, 3]}, ACTIONS, np.zeros((1, 1, 7, 2))),
        (INPUTS, {"actions": [1, 1, 8, 2]}, np.zeros((1, 1, 8, 2))),
        (INPUTS, {"actions": []}, np.zeros(())),
    ],
)
def test_a_graph_that_takes_or_gives_something_else_is_refused(copy: Path, seal, inputs, outputs, value) -> None:
    (copy / "plan.onnx").write_bytes(graph_of([constant(value)], inputs, outputs))
    seal(copy)
    refused(copy, r"a graph takes .* and gives .*; plan.json says \{'observation/actions'")


def test_actions_of_another_type_are_refused(copy: Path, seal) -> None:
    seal(copy, lambda tree: tree.update(dtype="float32"))
    refused(copy, "a graph takes .*float64.* plan.json says")


def test_a_graph_that_fails_or_gives_nan_says_so(copy: Path, seal) -> None:
    number = numpy_helper.from_array(np.array([1, 1, 7, 2]), "shape")
    fails = helper.make_node("Reshape", ["observation/noise", "shape"], ["actions"])
    (copy / "plan.onnx").write_bytes(graph_of([fails], INPUTS, ACTIONS, [number]))
    seal(copy)
    try:
        controller = exported.load(copy, threads=1).controller()
    except ExportedError:
        return  # a runtime may see it coming
    with pytest.raises(ExportedError, match="the graph fails: "):
        controller.act(observe(np.random.default_rng(0)))
    (copy / "plan.onnx").write_bytes(graph_of([constant(np.full((1, 1, 7, 2), np.nan))], INPUTS, ACTIONS))
    seal(copy)
    with pytest.raises(FloatingPointError, match="the policy planned NaN or infinity"):
        exported.load(copy, threads=1).controller().act(observe(np.random.default_rng(0)))


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 1000, b"\x08\x0a" * 500, b"ORTM" * 100])
def test_garbage_with_the_right_checksum_is_refused(copy: Path, seal, content: bytes) -> None:
    (copy / "plan.onnx").write_bytes(content)
    seal(copy)
    refused(copy, "is no ONNX graph|onnxruntime cannot read the graph")


def external(location: str, where: str) -> bytes:
    """A graph that takes its weights from another file, in one of the places where tensors can stand."""
    tensor = TensorProto(name="c", data_type=TensorProto.DOUBLE, dims=[1, 1, 7, 2])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(14 * 8))):
        tensor.external_data.add(key=key, value=value)
    if where == "initializer":
        return graph_of([helper.make_node("Identity", ["c"], ["actions"])], INPUTS, ACTIONS, [tensor])
    node = helper.make_node("Constant", [], ["actions"], value=tensor)
    if where == "constant":
        return graph_of([node], INPUTS, ACTIONS)
    true = numpy_helper.from_array(np.array(True), "true")
    branch = helper.make_graph([node], "b", [], [helper.make_tensor_value_info("actions", TensorProto.DOUBLE, None)])
    choice = helper.make_node("If", ["true"], ["actions"], then_branch=branch, else_branch=branch)
    return graph_of([choice], INPUTS, ACTIONS, [true])


@pytest.mark.parametrize("where", ["initializer", "constant", "branch"])
@pytest.mark.parametrize("location", ["weights.bin", "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "nowhere"])
def test_weights_in_other_files_are_not_opened(
    copy: Path, seal, location: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime 1.20 reads any file that is named so; 1.32 reads those below the working folder."""
    monkeypatch.chdir(copy)
    (copy / "weights.bin").write_bytes(np.zeros(14).tobytes())
    (copy / "plan.onnx").write_bytes(external(location, where))
    seal(copy)
    refused(copy, "plan.onnx is no ONNX graph, or one whose weights lie in other files; it is not opened")


def test_what_is_looked_for_in_a_graph_is_found_however_it_is_written(loop_folder: Path, network_folder: Path) -> None:
    for folder in (loop_folder, network_folder):
        graphs = [content for name, content in read_export(folder)[1].items() if name.endswith(".onnx")]
        assert not any(map(names_other_files, graphs))
        assert all(names_other_files(graph[:-1]) for graph in graphs)
    for where in ("initializer", "constant", "branch"):
        assert names_other_files(external("a", where))
    flag = external("a", "initializer").replace(b"\x70\x01", b"\xf0\x80\x80\x80\x00\x01")  # field 14, in more bytes
    assert names_other_files(flag)
    assert names_other_files(flag.replace(b"\xf0\x80\x80\x80\x00", b"\xf0\x80\x80\x80\x20"))  # and beyond 32 bits
    function = helper.make_function("d", "f", [], ["y"], [constant(np.zeros(1))], [helper.make_opsetid("", 20)])
    model = onnx.load_from_string(graph_of([], INPUTS, INPUTS))
    model.functions.append(function)
    assert not names_other_files(model.SerializeToString())
    model.functions[0].node[0].attribute[0].t.data_location = TensorProto.EXTERNAL
    assert names_other_files(model.SerializeToString())


FUZZ = """
import json, random, shutil, sys, traceback
from pathlib import Path
import numpy as np
from diffusion_policy.serving import exported, plan_folder

folder, rng, counts = Path(sys.argv[1]), random.Random(int(sys.argv[2])), {"refused": 0, "acted": 0, "failed": 0}
names = plan_folder.FILES[plan_folder.read_plan(folder).form]
sound = {name: (folder / name).read_bytes() for name in names}
tree = json.loads((folder / plan_folder.PLAN).read_text())
for _ in range(int(sys.argv[3])):
    name = rng.choice(names)
    content = bytearray(sound[name])
    for _ in range(rng.choice((1, 1, 2, 20))):
        content[rng.randrange(len(content))] = rng.choice((0, 1, 255, rng.randrange(256)))
    if rng.random() < 0.2:
        del content[rng.randrange(len(content)):]
    (folder / name).write_bytes(content)
    tree["files"][name] = vars(plan_folder.record({name: bytes(content)})[name])
    (folder / plan_folder.PLAN).write_text(json.dumps(tree))
    try:
        loaded = exported.load(folder, threads=1)
        shapes = loaded.planner.observation_shapes
        loaded.controller().act({key: np.zeros(shape) for key, shape in shapes.items()})
        counts["acted"] += 1
    except (exported.ExportedError, FloatingPointError) as error:
        assert "\\n" not in str(error), error
        counts["refused"] += 1
    (folder / name).write_bytes(sound[name])
    tree["files"][name] = vars(plan_folder.record({name: sound[name]})[name])
print(json.dumps(counts))
"""


@pytest.mark.parametrize("seed, count", [(0, 25), pytest.param(1, 1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FILES)
def test_random_damage_with_right_checksums_crashes_nothing(copy: Path, parts: Path, form: str, seed, count) -> None:
    folder = copy if form == "loop" else parts
    command = [sys.executable, "-c", FUZZ, str(folder), str(seed), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)  # and nothing else is printed
    assert counts["refused"] + counts["acted"] == count
    assert min(counts["refused"], counts["acted"]) > 0


# The table of the form network


def test_a_table_of_other_numbers_is_refused(parts: Path, seal: Callable[..., None]) -> None:
    table = parts / "table.npy"
    sound = np.load(table)
    for wrong in (
        sound[:-1], sound.astype(np.float64), np.asfortranarray(sound), np.full_like(sound, np.nan),
        np.where(sound > 0, np.inf, sound), sound[None],
    ):  # fmt: skip
        np.save(table, wrong)
        seal(parts)
        refused(parts, r"table.npy must hold an array of float32 \(4, 4\), all finite: ")
    np.save(table, np.array([[object()]]), allow_pickle=True)
    seal(parts)
    refused(parts, "table.npy must hold an array of float32")
    header = np.lib.format.magic(1, 0) + (118).to_bytes(2, "little")
    for content in (
        b"", b"\x93NUMPY", header, header + b"(" * 118, header + f"{'{'}{'0:' * 50}{'}'}".ljust(118).encode(),
        header + b"{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4), }".ljust(118) + b"\0" * 63,
        header + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }".ljust(118),
    ):  # fmt: skip
        table.write_bytes(content)
        seal(parts)
        refused(parts, "table.npy must hold an array of float32")


@pytest.mark.parametrize("one, other", [("denoise", "act"), ("observe", "denoise"), ("act", "observe")])
def test_parts_in_the_place_of_others_are_refused(parts: Path, seal, one: str, other: str) -> None:
    shutil.copy(parts / f"{one}.onnx", parts / f"{other}.onnx")
    seal(parts)
    refused(parts, "a graph takes .* and gives .*; plan.json says")
