"""Checkpoints that a stranger may hand over: mutated at random, or made to harm. Each must end in our own error of one
line, quickly and before it takes memory, or in a policy that acts."""

import ast
import dataclasses
import itertools
import json
import os
import pickle
import random
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_policy.basics.files import MAX_JSON_BYTES
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.checkpoints.checkpoint import Checkpoint, CheckpointError, Dataset, Environment
from diffusion_policy.checkpoints.safe_files import MAX_HEADER_BYTES, describe
from diffusion_policy.commands.sweep import Sweep, make_trials, write_results
from diffusion_policy.commands.trials import describe_trial
from diffusion_policy.config import PolicyConfig, TrainConfig, with_options
from diffusion_policy.policy import DiffusionPolicy

ROOT = Path(__file__).parents[2]
MODEL, TRAINING = "model.safetensors", "training.safetensors"
HOSTILE_VALUES = [
    10**15, 2**62, 10**400, 10**4000, -1, 0, 1, 2, 3, 4, 7, 64, 0.5, 1e308, -1e-300, None, True, False, "", "a",
    "x" * 10_000, "../../../etc", "/etc/passwd", "\ud800", "\x1b[2J\n", float("nan"), float("inf"), [], {}, [[]],
    {"a": 1}, [0], [1, 2], [10**9] * 3, [8] * 500, ["left"] * 3, [10**12], [-3, 2], "flow", "linear", "sample", "F16",
    "I64",
]  # fmt: skip
READER = """
import json, signal, sys, traceback
import numpy as np
from pathlib import Path
import torch
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.config import SampleConfig

def peak():  # of this process alone [KB]; getrusage counts what its parent had, too
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def late(*_):
    raise SystemExit("hangs")

def act(policy):
    rows = {key: torch.zeros(1, policy.config.observation_horizon, *shape)
            for key, shape in policy.shapes.observations.items()}
    config = SampleConfig(sampling_steps=1, mode=policy.modes[0] if policy.modes else None)
    return list(policy.sample(rows, [np.random.default_rng(0)], config=config).shape)

torch.set_num_threads(1)
signal.signal(signal.SIGALRM, late)
for line in sys.stdin:
    path, answer = Path(line.strip()), {}
    signal.alarm(10)
    for name, read in (("acts", lambda: act(checkpoint.load(path).policy)),
                       ("state", lambda: len(checkpoint.load_training(path)))):
        try:
            answer[name] = read()
        except checkpoint.CheckpointError as error:
            answer[name] = str(error)
        except Exception:
            answer["crash"] = traceback.format_exc()
    signal.alarm(0)
    answer["resident"] = peak()
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint that is sound."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    data = {"action": rng.normal(size=(30, 2)), "pose": rng.normal(size=(30, 3))}
    config = with_options(PolicyConfig(), widths=(16, 32), level_dim=16, noise_levels=20, kernel_size=3)
    policy = DiffusionPolicy.for_data(config, data, angles={"pose": (2,)})
    environment = Environment(
        "a/B-v0", {"rows": 1}, ("left", "right"), wrappers=({"entry_point": "a:B", "kwargs": {}},)
    )
    dataset = Dataset("/data", "abc", 2, 30, {"left": 2}, (0, 1))
    point = Checkpoint(policy, TrainConfig(steps=30), environment, dataset, 30, {"validation_loss": 0.5})
    state = {f"weights.{name}": value for name, value in policy.state_dict().items()}
    folder = checkpoint.save(tmp_path_factory.mktemp("original"), point, state | {"step": torch.tensor(30)})
    checkpoint.load(folder)  # what is imported at a first call is not measured
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """One that may be damaged."""
    return Path(shutil.copytree(original, tmp_path / "run" / "step-000030"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what config.json says."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def seal(folder: Path) -> None:
    """Have config.json tell the truth about both files."""
    files = {name: dataclasses.asdict(describe(folder / name)) for name in (MODEL, TRAINING)}
    edit(folder, lambda config: config.update(files=files))


def rewrite(folder: Path, name: str, header: Any, content: bytes) -> None:
    """A safetensors file with any header, sealed."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + content)
    seal(folder)


def tensor(dtype: str, shape: list[Any], begin: int) -> dict[str, Any]:
    """An entry of a safetensors header, of four bytes a number."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + 4 * sum(shape)]}


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and content of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def peak_memory() -> int:
    """Most memory since the last `forget_peak` [bytes]; 0 where the system does not say."""
    if not Path("/proc/self/status").exists():
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def refused(match: str, most_bytes: float = 200e6) -> Iterator[None]:
    """In one line, and without memory."""
    forget_peak()
    memory = peak_memory()
    with pytest.raises(CheckpointError, match=match) as info:
        yield
    assert peak_memory() - memory < most_bytes
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 1100


def test_the_measure_of_memory_notices_what_is_allocated_and_freed() -> None:
    if peak_memory() == 0:
        pytest.skip("the system does not say")
    forget_peak()
    before = peak_memory()
    assert len(bytearray(b"x") * 250_000_000) == 250_000_000
    assert peak_memory() - before > 200e6


# config.json


def test_a_configuration_that_is_no_regular_file_is_refused_at_once(copy: Path) -> None:
    config = copy / "config.json"
    for make in (
        lambda: os.mkfifo(config),
        lambda: config.symlink_to("/dev/zero"),
        lambda: config.symlink_to("/dev/tty"),
        lambda: config.mkdir(),
    ):
        config.unlink()
        make()
        with refused("is no regular file"):
            checkpoint.load(copy)
        with refused("is no regular file"):
            checkpoint.load(copy.parent)
        if config.is_dir():
            config.rmdir()
            config.touch()
    config.unlink()
    os.mkfifo(copy / "fifo")
    config.symlink_to("fifo")
    with refused("is no regular file"):
        checkpoint.load(copy)
    config.unlink()
    config.symlink_to("nowhere")
    with refused("is missing"):
        checkpoint.load(copy)
    config.unlink()
    config.symlink_to("config.json")
    with refused("cannot read"):
        checkpoint.load(copy)


def test_a_socket_is_no_regular_file(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / MODEL).unlink()
    monkeypatch.chdir(copy)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(MODEL)
        with refused("is no regular file"):
            checkpoint.load(copy)


@pytest.mark.parametrize("size", [MAX_JSON_BYTES + 1, 20_000_000])
def test_a_large_configuration_is_not_parsed(copy: Path, size: int) -> None:
    content = (copy / "config.json").read_text()
    (copy / "config.json").write_text(content + " " * (size - len(content)))
    with refused(rf"config.json has {size} bytes; at most {MAX_JSON_BYTES} are read"):
        checkpoint.load(copy)


@pytest.mark.parametrize("item", ["[]", "{}", "1.5", '"abc"', "10"])
def test_the_largest_configurations_are_refused_in_a_second(copy: Path, item: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    filled = "[" + ",".join([item] * ((MAX_JSON_BYTES - 10_000) // (len(item) + 1))) + "]"
    for part, where in (("observation", config), ("widths", config["policy"]["network"]), ("seeds", config["dataset"])):
        before, where[part] = where[part], "here"
        (copy / "config.json").write_text(json.dumps(config).replace('"here"', filled))
        where[part] = before
        with refused(f"config.json: .*{part} must be|lists and objects; at most 20000 are read|more than 524288 items"):
            checkpoint.load(copy)


@pytest.mark.parametrize("depth", [40, 900, 100_000])
def test_deep_nesting_is_refused(copy: Path, depth: int) -> None:
    text = (copy / "config.json").read_text()
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        nested = opening * depth + "1" + closing * depth
        (copy / "config.json").write_text(text.replace('"rows": 1', f'"rows": {nested}'))
        with refused(
            r"config.json is not JSON that can be read: it is nested more than 32 levels deep|lists and objects"
        ):
            checkpoint.load(copy)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{}", b"\x80" * 100, b"", b"null", b"[]", b"1" * 5000, b'{"format": NaN}']
)
def test_what_is_no_json_object_in_utf_8_is_refused(copy: Path, content: bytes) -> None:
    (copy / "config.json").write_bytes(content)
    with refused(r"is not JSON that can be read|is not the configuration of a checkpoint"):
        checkpoint.load(copy)


@pytest.mark.parametrize(
    "where, value, message",
    [
        ("policy.network.widths", [10**12], "widths must be at most 10 numbers up to 8192"),
        ("policy.network.widths", [8] * 11, "widths must be at most 10 numbers up to 8192"),
        ("policy.network.widths", [8] * 1025, "widths must be a list of at most 1024 items"),
        ("policy.network.widths", 64, "widths must be a list of at most 1024 items, each a whole number; got 64"),
        ("policy.network.widths", [True], r"widths\[0\] must be a whole number; got True"),
        ("policy.network.widths", [], "widths must be positive numbers"),
        ("policy.prediction_horizon", 2**40, "prediction-horizon must be at most 1024"),
        ("policy.network.kind", "mlp", "unknown kind 'mlp'; known are unet, transformer"),
        ("policy.network.kind", "transformer", "network: unknown option 'widths'; did you mean width"),
        ("policy.network.kernel_size", 10**9 + 1, "kernel-size must be at most 255"),
        ("policy.network.level_dim", 10**12, "level-dim must be at most 8192"),
        ("policy.noise_levels", 10**12, "noise-levels must be at most 100000"),
        ("policy.noise_levels", 10**400, "noise_levels must be a whole number"),
        ("policy.noise_levels", 20.0, "noise_levels must be a whole number; got 20.0"),
        ("policy.noise_levels", True, "noise_levels must be a whole number; got True"),
        ("policy.snr_gamma", float("nan"), "snr_gamma must be a finite number; got nan"),
        ("policy.condition_dropout", float("nan"), "condition_dropout must be a finite number"),
        ("policy.schedule_options", [float("inf")], r"schedule_options\[0\] must be a finite number; got inf"),
        ("policy.schedule_options", [0.1] * 5, "describes no policy: the schedule cosine takes"),
        ("policy.schedule", "x" * 10**6, "schedule must be one of cosine, .*; got 'xxx"),
        ("policy.condition_on_mode", 1, "condition_on_mode must be true or false; got 1"),
        ("policy.unheard", 1, "policy: unknown option 'unheard'"),
        ("policy." + "x" * 10**6, 1, "policy: unknown option 'xxx"),
        ("training.unheard", 1, "training: unknown option 'unheard'"),
        ("training.learning_rate", float("nan"), "learning_rate must be a finite number; got nan"),
        ("unheard", 1, "config.json: unknown option 'unheard'"),
        ("shapes.observations", {"pose": [10**12]}, "the size of an observation must be from 1 to 65536"),
        ("shapes.observations", {"pose": [10**6] * 1000}, "a shape has at most 8 numbers"),
        ("shapes.observations", {"pose": [1] * 70}, "a shape has at most 8 numbers"),
        ("shapes.observations", {"pose": [-3, -1]}, "a shape has at most 8 numbers, all positive"),
        ("shapes.observations", {"pose": [0]}, "a shape has at most 8 numbers, all positive"),
        ("shapes.observations", {}, "the number of keys must be from 1 to 256"),
        ("shapes.observations", {f"key {i}": [1] for i in range(300)}, "the number of keys must be from 1 to 256"),
        ("shapes.observations", {"x" * 300: [3]}, "keys and modes have at most 200 printable characters"),
        ("shapes.observations", {"action": [3]}, "an observation cannot be called 'action'"),
        ("shapes.observations", {"a.b": [3], "a/b": [3]}, "describes no policy"),
        ("shapes.action", [10**12], "the size of an action must be from 1 to 1024"),
        ("shapes.action", [2, 2], "an action must be one row of numbers"),
        ("shapes.angles", {"pose": [10**12]}, "angles must name columns of a key"),
        ("environment.modes", ["a"] * 2000, "modes must be a list of at most 1024 items, each a text"),
        ("environment.modes", ["\x1b[2J"], "keys and modes have at most 200 printable characters"),
        ("environment.modes", ["\ud800"], "half a surrogate pair"),
        ("dataset.episodes", 1.5, "episodes must be a whole number; got 1.5"),
        ("dataset.seeds", [1, 2, 3], "seeds must be a list of 2 items, each a whole number"),
        ("environment.arguments", {"pose": {"std": [1.0, float("nan")]}}, "the environment's arguments must be finite"),
        ("environment.wrappers", [{"kwargs": {"x": float("inf")}}], "the environment's arguments must be finite"),
        ("environment.wrappers", ["a:B"], r"wrappers\[0\] must be a JSON object; got 'a:B'"),
        ("metrics", {"validation_loss": float("inf")}, "'validation_loss' must be a finite number; got inf"),
        ("metrics", {"validation_loss": True}, "must be a finite number; got True"),
        ("step", -1, "the step must be from 0"),
        ("step", 10**30, "step must be a whole number"),
    ],
)  # fmt: skip
def test_a_configuration_beyond_reason_is_refused(copy: Path, where: str, value: Any, message: str) -> None:
    def change(config: dict[str, Any]) -> None:
        *path, name = where.split(".")
        for part in path:
            config = config[part]
        config[name] = value

    edit(copy, change)
    with refused(message):
        checkpoint.load(copy)


def test_weights_are_counted_before_they_take_memory(copy: Path) -> None:
    edit(copy, lambda config: config["policy"]["network"].update(widths=[8192, 8192], kernel_size=255))
    with refused(r"would have \d+ weights; at most 268435456 are loaded"):
        checkpoint.load(copy)
    edit(copy, lambda config: config["policy"]["network"].update(widths=[512, 1024], kernel_size=3))  # 80 million
    with refused(r"has shape .*; its configuration needs"):
        checkpoint.load(copy)


@pytest.mark.parametrize(
    "network, message",
    [
        ({"width": 10**12}, "width must be at most 8192; got 1000000000000"),
        ({"layers": 10**9}, "layers must be at most 128; got 1000000000"),
        ({"mlp_ratio": 10**9}, "mlp-ratio must be at most 128; got 1000000000"),
        ({"width": 8192, "layers": 128}, r"would have \d+ weights; at most 268435456 are loaded"),
        ({"width": 8192, "layers": 1, "mlp_ratio": 128}, r"would have \d+ weights; at most 268435456 are loaded"),
        ({"width": 1024, "layers": 8, "conditioning": "cross-attention"}, "does not fit its configuration"),
        ({"kind": "transformers"}, "policy, network: unknown kind 'transformers'; known are unet, transformer"),
    ],
)
def test_a_transformer_beyond_reason_is_refused_before_it_takes_memory(copy: Path, network: dict, message: str) -> None:
    edit(copy, lambda config: config["policy"].update(network={"kind": "transformer", **network}))
    with refused(message):
        checkpoint.load(copy)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "model.safetensors/../../x", "~/x", "extra.safetensors"])
def test_only_its_own_two_files_are_read(copy: Path, name: str) -> None:
    for change in (
        lambda files: files.update({name: files[MODEL]}),
        lambda files: files.update({name: files.pop(MODEL)}),
    ):
        edit(copy, lambda config, change=change: change(config["files"]))
        with refused(r"its files must be model.safetensors and training.safetensors"):
            checkpoint.load(copy)


def test_a_best_that_leads_outside_is_only_a_link_to_a_checkpoint(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "best").symlink_to(copy)
    assert checkpoint.load(tmp_path / "other" / "best").step == 30
    (tmp_path / "other" / "best").unlink()
    (tmp_path / "other" / "best").symlink_to("/etc")
    with refused("no checkpoint at"):
        checkpoint.load(tmp_path / "other" / "best")


# safetensors


def test_a_pickle_is_never_opened(copy: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    for name, load in ((MODEL, checkpoint.load), (TRAINING, checkpoint.load_training)):
        torch.save(Hostile(), copy / name)
        seal(copy)
        with refused("is no safetensors file that can be read"):
            load(copy)
        (copy / name).write_bytes(pickle.dumps(Hostile()))
        seal(copy)
        with refused("is no safetensors file that can be read"):
            load(copy)
    (copy / "config.json").write_bytes(pickle.dumps(Hostile()))
    with refused("is not JSON that can be read"):
        checkpoint.load(copy)
    assert not (tmp_path / "owned").exists()


def test_a_zip_bomb_is_not_unpacked(copy: Path) -> None:
    with (
        zipfile.ZipFile(copy / MODEL, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data.pkl", "w", force_zip64=True) as member,
    ):
        for _ in range(100):
            member.write(bytes(2**20))
    seal(copy)
    with refused("is no safetensors file that can be read"):
        checkpoint.load(copy)


def test_tensors_larger_than_their_file_are_refused(copy: Path) -> None:
    header, content = parts(copy / MODEL)
    name = "network.out.1.bias"
    for shape, offsets in (
        ([10**12], header[name]["data_offsets"]),
        ([10**12], [0, 4 * 10**12]),
        ([2**40, 2**40], [0, 2**62]),
        ([2**62, 4], [0, 0]),
        ([-2], header[name]["data_offsets"]),
        ([2**63], [0, 8]),
        ([1] * 20, [0, 4]),
    ):
        changed = header | {name: {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
        rewrite(copy, MODEL, changed, content)
        with refused("is no safetensors file that can be read"):
            checkpoint.load(copy)


def test_a_sparse_file_of_a_terabyte_is_not_read(copy: Path) -> None:
    for name, load, size in ((MODEL, checkpoint.load, 2**40), (TRAINING, checkpoint.load_training, 2**40)):
        header = json.dumps({"large": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, size]}}).encode()
        with (copy / name).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + size)
        with refused("is damaged: its size or SHA-256"):
            load(copy)
        true = 8 + len(header) + size
        edit(copy, lambda config, name=name, true=true: config["files"][name].update(size=true))
        with refused(r"at most 4294967296 are read"):
            load(copy)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda header: b"[" * 3_000_000, "is no safetensors file that can be read"),
        (lambda header: b"\xff" * 100, "is no safetensors file that can be read"),
        (lambda header: b"[]", "its header is no JSON object"),
        (lambda header: {"a": 1}, "must be a JSON object; got 1"),
        (lambda header: {**header, "more": 3}, "must be a JSON object; got 3"),
        (lambda header: {f"{i}": 0 for i in range(5000)}, "it has 5000 tensors; at most 4096 are read"),
        (lambda header: {f"{i}": tensor("F32", [1], 4 * i) for i in range(4000)}, "its tensors end at byte"),
        (lambda header: header | {"x": tensor("F8_E5M2", [0], 0)}, "is of dtype 'F8_E5M2'"),
        (lambda header: header | {"x": tensor("F32", [1], 0)}, "lies at"),
        (lambda header: header | {"x": tensor("F32", [True], 0)}, "must be a whole number; got True"),
        (lambda header: dict(list(header.items())[1:]), "lies at|end at byte"),
        (lambda header: b" " * (MAX_HEADER_BYTES + 1), f"at most {MAX_HEADER_BYTES} are read"),
    ],
)  # fmt: skip
def test_headers_that_lie_are_refused(copy: Path, change: Callable[[Any], Any], message: str) -> None:
    for name, load in ((MODEL, checkpoint.load), (TRAINING, checkpoint.load_training)):
        header, content = parts(copy / name)
        header.pop("__metadata__", None)
        rewrite(copy, name, change(header), content)
        with refused(message):
            load(copy)


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 10**6])
def test_a_header_longer_than_its_file_is_refused(copy: Path, length: int) -> None:
    content = (copy / MODEL).read_bytes()
    (copy / MODEL).write_bytes(struct.pack("<Q", length) + content[8:])
    seal(copy)
    with refused("is no safetensors file that can be read"):
        checkpoint.load(copy)
    (copy / MODEL).write_bytes(content[:5])
    seal(copy)
    with refused("is no safetensors file that can be read"):
        checkpoint.load(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["network.out.1.bias", "normalizer.pose_offset", "normalizer.action_scale"])
def test_weights_that_are_not_finite_are_refused(copy: Path, name: str, value: float) -> None:
    weights = load_file(copy / MODEL)
    weights[name][1] = value
    save_file(weights, copy / MODEL)
    seal(copy)
    with refused(f"{name} holds NaN or infinity"):
        checkpoint.load(copy)


@pytest.mark.parametrize("value", [-1e-300, -1.0])
def test_a_negative_scale_is_refused(copy: Path, value: float) -> None:
    weights = load_file(copy / MODEL)
    weights["normalizer.pose_scale"][2] = value
    save_file(weights, copy / MODEL)
    seal(copy)
    with refused(r"normalizer.pose_scale must be at least 0; got -1"):
        checkpoint.load(copy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_weights_of_another_dtype_are_refused(copy: Path, dtype: torch.dtype) -> None:
    save_file({name: value.to(dtype) for name, value in load_file(copy / MODEL).items()}, copy / MODEL)
    seal(copy)
    with refused(rf"is {dtype}; its configuration needs torch.float(32|64)"):
        checkpoint.load(copy)


# Mutations


def parse(content: bytes) -> Any:
    """JSON, or None where an earlier mutation has broken it."""
    try:
        return json.loads(content)
    except ValueError:
        return None


def edit_tree(tree: Any, rng: random.Random) -> str:
    """Replace, delete or add one value at any depth; returns where."""
    where = []
    while True:
        place = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree))) if tree else None
        where.append(place)
        if place is None or not isinstance(tree[place], dict | list) or not tree[place] or rng.random() < 0.25:
            break
        tree = tree[place]
    value = rng.choice(HOSTILE_VALUES)
    deed = rng.choice(["replace", "replace", "replace", "delete", "add", "swap"])
    if place is None or deed == "add":
        tree.update({"added": value}) if isinstance(tree, dict) else tree.append(value)
    elif deed == "delete":
        del tree[place]
    elif deed == "swap":
        other = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        tree[place], tree[other] = tree[other], tree[place]
    elif isinstance(tree[place], int | float) and rng.random() < 0.4:  # something close by
        tree[place] = rng.choice([-tree[place], 2 * tree[place], tree[place] + 1, tree[place] / 2, str(tree[place])])
    else:
        tree[place] = value
    return f"{deed} {where}"


def mutate(folder: Path, rng: random.Random) -> str:
    """Damage one file of a checkpoint; returns what was done, beginning with its name."""
    file = folder / rng.choice(["config.json", "config.json", MODEL, MODEL, TRAINING])
    content = file.read_bytes()
    deed = rng.choice(["flip", "flip", "cut", "noise", "swap", "double", *["edit"] * 6])
    length = int.from_bytes(content[:8], "little")
    tree = parse(content if file.suffix == ".json" else content[8 : 8 + length])
    if deed == "edit" and isinstance(tree, dict | list):
        deed = f"edit {edit_tree(tree, rng)}"
        text = json.dumps(tree).encode()
        file.write_bytes(
            text if file.suffix == ".json" else struct.pack("<Q", len(text)) + text + content[8 + length :]
        )
    elif deed == "cut":
        file.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif deed == "noise":
        file.write_bytes(rng.randbytes(rng.choice([0, 1, 8, 9, len(content)])))
    elif deed == "swap":
        file.write_bytes((folder / rng.choice([MODEL, TRAINING, "config.json"])).read_bytes())
    elif deed == "double":
        file.write_bytes(content * 2)
    else:
        deed = "flip"
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 1, 3, 20]) if content else 0):
            most = min(len(content), 2000) if rng.random() < 0.5 else len(content)  # as often in the header
            flipped[rng.randrange(most)] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
    return f"{file.name} {deed}"


def reseal(folder: Path) -> None:
    """`seal`, where config.json still is what it was."""
    config = parse((folder / "config.json").read_bytes())
    if isinstance(config, dict):
        config["files"] = {name: dataclasses.asdict(describe(folder / name)) for name in (MODEL, TRAINING)}
        (folder / "config.json").write_text(json.dumps(config))


def mutate_and_load(count: int, original: Path, tmp_path: Path) -> dict[str, int]:
    """Mutate checkpoints and load them in a process of their own; returns how often what happened."""
    rng = random.Random(0)
    outcomes: dict[str, int] = {}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        for i in range(count):
            folder = Path(shutil.copytree(original, tmp_path / str(i) / "step-000030"))
            deeds = [mutate(folder, rng) for _ in range(rng.choice([1, 1, 2]))]
            sealed = rng.random() < 0.5
            same = {name: (folder / name).read_bytes() == (original / name).read_bytes() for name in (MODEL, TRAINING)}
            if sealed:
                reseal(folder)
            reader.stdin.write(f"{folder}\n")
            reader.stdin.flush()
            line = reader.stdout.readline()
            assert line, f"the reader died or hung at {i}: {deeds}"
            answer = json.loads(line)
            assert "crash" not in answer, (i, sealed, deeds, answer["crash"])
            assert answer["resident"] < 2e6, deeds  # [KB]
            for name, outcome in ((MODEL, answer["acts"]), (TRAINING, answer["state"])):
                if isinstance(outcome, str):
                    assert "\n" not in outcome, deeds
                    assert len(outcome) < 1100, deeds
                else:  # only what is sealed, or as it was, is loaded
                    assert sealed or same[name], deeds
            kind = "acts" if isinstance(answer["acts"], list) else "refused"
            outcomes[kind] = outcomes.get(kind, 0) + 1
            shutil.rmtree(folder.parent)
    return outcomes


def test_mutated_checkpoints_are_refused_or_act(original: Path, tmp_path: Path) -> None:
    outcomes = mutate_and_load(50, original, tmp_path)
    assert outcomes["refused"] > 20
    assert outcomes["acts"] > 0


@pytest.mark.slow
def test_a_thousand_mutated_checkpoints(original: Path, tmp_path: Path) -> None:
    outcomes = mutate_and_load(1000, original, tmp_path)
    assert outcomes["refused"] > 500
    assert outcomes["acts"] > 20


# The commands that read what a stranger hands over

COMMANDER = """
import importlib, io, json, signal, sys, time, traceback, warnings
from pathlib import Path
import torch
from diffusion_policy import cli
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.commands import evaluate, terminal

def peak():  # of this process alone [KB]; getrusage counts what its parent had, too
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def late(*_):
    raise SystemExit("hangs")

warnings.simplefilter("ignore")
torch.set_num_threads(1)
for options in cli.VERBS.values():
    importlib.import_module(options.program)
evaluate.LATENCY_PLANS = 6
signal.signal(signal.SIGALRM, late)
for line in sys.stdin:
    terminal.console.file, terminal.console.quiet, answer, started = io.StringIO(), False, {}, time.perf_counter()
    signal.alarm(20)
    try:
        answer["status"] = cli.main(json.loads(line))
    except BaseException:
        answer["crash"] = traceback.format_exc()
    signal.alarm(0)
    answer |= {"said": terminal.console.file.getvalue(), "seconds": time.perf_counter() - started,
               "resident": peak()}
    print(json.dumps(answer), flush=True)
"""
"""Runs each command line that it reads, in one process that has imported everything."""


class Handed(NamedTuple):
    """What a stranger hands over: the folder of a run, of a sweep, and options."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def files(self) -> list[str]:
        """All that is read, the folders themselves too."""
        inner = [f"{STEP}/{name}" for name in ("config.json", MODEL, TRAINING)]
        return ["run/run.json", "run/metrics.jsonl", "sweep/sweep.json", "options.json", STEP, "run", "sweep", *inner]

    def commands(self) -> dict[str, list[str]]:
        """What is run on it."""
        evaluation, run = str(self.folder / "evaluation"), str(self.run)
        return {
            "resume": ["train", "--resume", run, "--device", "cpu"],
            "config": ["train", "--config", str(self.folder / "options.json"), "--dataset", "no.zarr", "--output", "o"],
            "sweep": ["sweep", "--dataset", "d.zarr", "--output", str(self.folder / "sweep"), "--grid", "seed=1,2",
                      "--resume"],
            "doctor": ["doctor", "--checkpoint", run, "--overfit-steps", "0", "--sampling-steps", "1",
                       "--device", "cpu"],
            "evaluate": ["evaluate", "--checkpoint", run, "--output", evaluation, "--episodes", "1", "--workers", "1",
                         "--videos", "0", "--sampling-steps", "1", "--device", "cpu"],
        }  # fmt: skip


@pytest.fixture(scope="module")
def handed(run: Path, demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Handed:
    """A sound run, its options in a file, and a sweep of which nothing has run."""
    folder = tmp_path_factory.mktemp("handed")
    shutil.copytree(run, folder / "run")
    shutil.copy(run / "run.json", folder / "options.json")
    shutil.copy(checkpoint.find(run) / "config.json", folder / "config.json")
    sweep = Sweep("d.zarr", folder / "sweep", ("seed=1,2",))
    sweep.output.mkdir()
    write_results(sweep, [describe_trial(trial) for trial in make_trials(sweep)])
    return Handed(folder)


@pytest.fixture(scope="module")
def commander() -> Iterator[Callable[[list[str]], dict[str, Any]]]:
    """Runs a command line; returns what came of it."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", COMMANDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(arguments: list[str]) -> dict[str, Any]:
            process.stdin.write(json.dumps(arguments) + "\n")  # pyright: ignore[reportOptionalMemberAccess]
            process.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]
            line = process.stdout.readline()  # pyright: ignore[reportOptionalMemberAccess]
            assert line, f"died or hung: {arguments}"
            return json.loads(line)

        yield run
        process.stdin.close()


def check_told(answer: dict[str, Any], deed: object) -> str:
    """Whether a command has ended as it should; returns how."""
    assert "crash" not in answer, (deed, answer["crash"])
    assert answer["status"] in (0, 1, 2), deed
    assert "Traceback" not in answer["said"], deed
    assert answer["resident"] < 1e6, (deed, answer["resident"])  # [KB]
    assert all(len(line) < 3000 for line in answer["said"].splitlines()), deed
    if answer["status"] == 2:
        assert answer["said"].splitlines()[-1].startswith("error: "), (deed, answer["said"])
        assert answer["seconds"] < 10, (deed, answer["seconds"])
        return "refused"
    return "works"


def put(path: Path, kind: str) -> None:
    """Something of this kind in the place of a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(path.parent)  # the name of a socket is short
            server.bind(path.name)
            os.chdir(here)
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(5 * 2**30)
    elif kind == "zeros":
        path.write_bytes(bytes(10**6))
    elif kind == "empty":
        path.touch()
    else:
        path.symlink_to(
            {"nowhere": "nowhere", "itself": path.name, "device": "/dev/zero", "terminal": "/dev/tty"}[kind]
        )


STEP = "run/step-000030"
NEEDED = {
    "resume": {"run", "run/run.json", f"{STEP}/config.json", f"{STEP}/{MODEL}", f"{STEP}/{TRAINING}"},
    "config": {"options.json"},
    "sweep": {"sweep", "sweep/sweep.json"},
    "doctor": {"run", STEP, f"{STEP}/config.json", f"{STEP}/{MODEL}"},
    "evaluate": {"run", STEP, f"{STEP}/config.json", f"{STEP}/{MODEL}"},
}
"""What each command cannot do without."""
KINDS = ("pipe", "folder", "socket", "large", "zeros", "empty", "nowhere", "itself", "device", "terminal")


def replace_files(cases: Sequence[tuple[str, str, str]], handed: Handed, commander, tmp_path: Path) -> dict[str, int]:
    """Put something else in a file's place, and run a command on it; returns how often what happened."""
    outcomes: dict[str, int] = {}
    for i, (name, kind, command) in enumerate(cases):
        copy = Handed(Path(shutil.copytree(handed.folder, tmp_path / str(i))))
        put(copy.folder / name, kind)
        outcome = check_told(commander(copy.commands()[command]), (name, kind, command))
        assert outcome == "refused" or name not in NEEDED[command], (name, kind, command)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        shutil.rmtree(copy.folder)
    return outcomes


def test_files_of_every_kind_in_every_place(handed: Handed, commander, tmp_path: Path) -> None:
    cases = list(itertools.product(handed.files, KINDS, handed.commands()))
    outcomes = replace_files(random.Random(1).sample(cases, 10), handed, commander, tmp_path)
    assert outcomes["refused"] > 2


@pytest.mark.slow
def test_all_files_of_every_kind_in_every_place(handed: Handed, commander, tmp_path: Path) -> None:
    cases = list(itertools.product(handed.files, KINDS, handed.commands()))
    outcomes = replace_files(cases, handed, commander, tmp_path)
    assert outcomes["refused"] > 200


def edit_some_json(copy: Handed, rng: random.Random) -> tuple[str, str, list[str]]:
    """Change a value of one of the JSON files; returns the file, what was done, and the commands that read it."""
    readers = {
        "run/run.json": ["resume"],
        "options.json": ["config"],
        "sweep/sweep.json": ["sweep"],
        "run/metrics.jsonl": ["resume", "evaluate"],
        "run/step-000030/config.json": ["resume", "doctor", "evaluate", "config"],
    }
    name = rng.choice([*readers, "run/step-000030/config.json", "run/run.json"])
    file = copy.folder / name
    lines = file.read_text().splitlines() if name.endswith("jsonl") else [file.read_text()]
    i = rng.randrange(len(lines))
    tree = json.loads(lines[i])
    deed = edit_tree(tree, rng)
    training = tree.setdefault("training", {}) if name == "run/run.json" else None
    if isinstance(training, dict) and isinstance(steps := training.get("steps", 3000), int):
        training["steps"] = min(30, steps)  # more of them would be trained
    lines[i] = json.dumps(tree)
    if rng.random() < 0.1:
        lines[i] = rng.choice(
            [lines[i][:-5], lines[i] * 2, "[" * 50_000, '{"a":' * 40, "\x00", lines[i].replace(":", "::")]
        )
    file.write_text("\n".join(lines))
    if name.endswith("config.json"):
        shutil.copy(file, copy.folder / "options.json")
    return name, deed, readers[name]


def edit_json_and_run(count: int, handed: Handed, commander, tmp_path: Path, seed: int = 0) -> dict[str, int]:
    """Change JSON and run the commands that read it; returns how often what happened."""
    rng = random.Random(seed)
    outcomes: dict[str, int] = {}
    for i in range(count):
        copy = Handed(Path(shutil.copytree(handed.folder, tmp_path / str(i))))
        name, deed, readers = edit_some_json(copy, rng)
        command = rng.choice(readers)
        outcome = check_told(commander(copy.commands()[command]), (i, name, deed, command))
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        shutil.rmtree(copy.folder)
    return outcomes


def test_every_field_of_the_files_of_a_run_is_checked(handed: Handed, commander, tmp_path: Path) -> None:
    outcomes = edit_json_and_run(10, handed, commander, tmp_path)
    assert outcomes["refused"] > 2


@pytest.mark.slow
def test_a_thousand_fields_of_the_files_of_a_run(handed: Handed, commander, tmp_path: Path) -> None:
    outcomes = edit_json_and_run(1000, handed, commander, tmp_path)
    assert outcomes["refused"] > 300


# Nothing is ever unpickled

UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
UNPICKLING = {"Unpickler", "read_pickle", "Pickle", "unsafe_load", "full_load", "load_state_dict_from_url"}


def unpicklers(source: str) -> set[str]:
    """What in a module could unpickle a file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS}
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in UNPICKLERS:
                found.add(node.module or "")
            loaders = {alias.name for alias in node.names if alias.name == "load" and node.module in ("torch", "numpy")}
            found |= loaders | {alias.name for alias in node.names if alias.name in UNPICKLING}
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in UNPICKLING or (owner in {"torch", *UNPICKLERS} and node.attr in ("load", "loads")):
                found.add(f"{owner}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            if not (node.arg == "allow_pickle" and isinstance(node.value, ast.Constant) and node.value.value is False):
                found.add(node.arg)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "__import__":
            found.add("__import__")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as json",
        "from pickle import loads",
        "def f():\n    import cloudpickle",
        "import torch\ntorch.load(path)",
        "from torch import load as read",
        "numpy.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=flag)",
        "import yaml",
        "import shelve",
        "pandas.read_pickle(path)",
        "numcodecs.Pickle()",
        "__import__('pickle')",
    ],
)
def test_an_unpickler_is_noticed(source: str) -> None:
    assert unpicklers(source)


def test_nothing_is_ever_unpickled_from_a_file() -> None:
    files = [
        path
        for folder in ("diffusion_policy", "envs", "datasets", "scripts")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    assert len(files) > 50
    assert {str(path): unpicklers(path.read_text()) for path in files if unpicklers(path.read_text())} == {}
