"""Who may import whom: read from the source, so that it holds for imports inside functions too."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for folder in ("diffusion_policy", "envs", "datasets")
    for path in (ROOT / folder).rglob("*.py")
    if not (folder == "diffusion_policy" and path.relative_to(ROOT / folder).parts[0] in ("envs", "datasets"))
)

LAW = {
    "basics": {"basics"},
    "config": {"basics"},
    "normalizer": {"basics.images", "datasets.statistics", "networks.representation"},
    "diffusion": {"diffusion"},
    "networks": {"networks"},
    "policy": {
        "basics.names", "basics.streams", "config", "datasets.statistics", "diffusion", "networks", "normalizer",
    },
    "checkpoints": {"basics", "checkpoints", "config", "policy"},
    "control": {"basics.images", "basics.streams", "config", "control", "policy"},
    "serving": {"basics", "config", "control", "policy", "serving"},
    "training": {
        "basics", "config", "datasets.statistics", "datasets.windows", "diffusion", "networks", "normalizer", "policy",
        "training",
    },
    "evaluation": {"basics", "config", "control", "evaluation"},
    "report": {"basics", "control.run_log", "evaluation", "report", "training.toy"},
}  # fmt: skip
"""What each room may import. The programs (commands, cli) may import everything; envs and datasets their own folder,
`basics`, and what KNOWN_TO says."""
KNOWN_TO = {"recorder": {f"envs.{name}" for name in ("contract", "protocols", "spaces", "wrappers")}}
"""What of the other room a file may know: the recorder records what an adapter would observe, and how it was made."""
PROGRAMS = {"commands", "cli", "__init__"}
LIBRARIES = {
    "envs": {"gymnasium", "numpy"},
    "envs.simulation": {"numpy", "gymnasium", "pybullet", "pybullet_data", "pybullet_utils"},
    "envs.images": {"gymnasium", "numpy", "PIL"},
    "envs.push_t": {"gymnasium", "numpy", "gym_pusht", "pymunk", "pygame"},
    "datasets": {"numpy", "zarr", "fsspec"},
    "datasets.windows": {"numpy", "torch"},
    "datasets.streaming": {"numpy", "torch"},
    "datasets.recorder": {"numpy", "zarr", "gymnasium"},
    "datasets.checksums": {"numpy", "google_crc32c"},
    "datasets.shards": {"numpy", "zarr", "numcodecs", "google_crc32c"},
    "datasets.web": {"zarr", "aiohttp"},
    "datasets.formats": {"numpy", "zarr", "fsspec", "h5py", "pyarrow", "minari", "gymnasium", "av"},
    "basics": {"numpy"},
    "config": set(),
    "policy": {"torch", "numpy", "einops"},
    "normalizer": {"torch", "numpy"},
    "diffusion": {"torch"},
    "networks": {"torch", "einops"},
    "networks.labels": {"torch", "numpy"},
    "control": {"numpy", "torch"},
    "serving": {"numpy", "torch", "einops", "onnx", "onnxruntime"},
    "serving.plan_folder": set(),
    "serving.exported": {"numpy"},
    "serving.runtimes": {"numpy", "onnxruntime", "openvino"},
    "serving.protocol": {"numpy", "msgpack"},
    "serving.batching": {"numpy"},
    "serving.sessions": {"numpy"},
    "serving.server": {"numpy", "websockets"},
    "serving.client": {"numpy", "websockets"},
    "serving.replicas": {"numpy", "ray"},
    "training": {"numpy", "torch", "wandb"},
    "checkpoints": {"torch", "safetensors"},
    "evaluation": {"numpy", "scipy", "gymnasium", "ray"},
    "report": {"numpy", "torch", "matplotlib", "jinja2", "imageio", "gymnasium", "PIL"},
}
"""Libraries that each room, or a file of its own kind, may use."""
TORCH_FREE = (
    "serving.exported", "serving.plan_folder", "serving.runtimes", "commands.loading", "control.single",
    "control.latency", "control.controller", "control.planner", "serving.protocol", "serving.batching",
    "serving.sessions", "serving.server", "serving.client", "serving.replicas", "commands.serve", "commands.replicas",
)  # fmt: skip
"""What runs on a robot."""
UNREACHABLE = {
    "policy": {"zarr", "fsspec", "pybullet", "gymnasium", "safetensors", "matplotlib"},
    "control": {"zarr", "fsspec", "pybullet", "gymnasium", "safetensors", "matplotlib"},
    "checkpoints": {"zarr", "fsspec", "pybullet", "gymnasium", "matplotlib"},
    "serving": {"zarr", "fsspec", "pybullet", "gymnasium", "safetensors", "matplotlib"},
    **{name: {"torch", "zarr", "fsspec", "einops", "onnx", "gymnasium"} for name in TORCH_FREE},
    "training": {"zarr", "fsspec", "pybullet", "gymnasium", "matplotlib", "safetensors"},
    "evaluation": {"pybullet", "zarr", "matplotlib", "safetensors"},
    "envs": {"torch", "zarr"},
    "datasets": {"pybullet", "scipy", "matplotlib"},
}
"""Libraries that a room must not reach, not even through what it imports."""


def walk(tree: ast.AST) -> Iterator[ast.AST]:
    """As `ast.walk`, but for what only type checkers see."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from walk(child)


def imports_of(path: Path, walk: Callable[[ast.AST], Iterator[ast.AST]] = ast.walk) -> set[str]:
    """With what is taken of a package, which may be a module: from diffusion_policy.serving import exported."""
    names = set()
    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            members = [alias.name for alias in node.names]
            if (node.module or "").startswith("diffusion_policy"):
                names |= {f"{node.module}.{name}" for name in members if name != "__version__"}
            else:
                names.add(node.module or "")
    return names


def name_of(path: Path) -> str:
    """A module's name within the package, such as diffusion.samplers or datasets.store."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "diffusion_policy" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): imports_of(path) for path in FILES}
RUNNING = {name_of(path): imports_of(path, walk) for path in FILES}
"""Without what only type checkers import."""


def ours_of(name: str, modules: dict[str, set[str]] = MODULES) -> set[str]:
    """Modules of ours that a module imports; packages are imported with what is taken of them."""
    inside = {one.removeprefix("diffusion_policy.") for one in modules[name] if one.startswith("diffusion_policy.")}
    return {one if one in MODULES else one.rpartition(".")[0] for one in inside} & MODULES.keys()


def within(name: str, rooms: Iterable[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


@pytest.mark.parametrize("name", [name for name in MODULES if name.partition(".")[0] not in PROGRAMS])
def test_a_module_imports_only_what_it_may_know(name: str) -> None:
    room, leaf = name.partition(".")[0], name.rpartition(".")[2]
    allowed = LAW[room] if room in LAW else {room, "basics"} | KNOWN_TO.get(leaf, set())
    assert {one for one in ours_of(name) if not within(one, allowed)} == set()
    libraries = {one.split(".")[0] for one in MODULES[name]} - set(sys.stdlib_module_names) - {"diffusion_policy"}
    of_its_own = [key for key in LIBRARIES if within(name, [key])]
    assert libraries <= LIBRARIES[max(of_its_own, key=len)]


@pytest.mark.parametrize("room", UNREACHABLE)
def test_a_room_does_not_reach_through_others_what_it_must_not_know(room: str) -> None:
    """A module also runs the packages that it lies in."""
    waiting, seen = [name for name in MODULES if within(name, [room])], set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += ours_of(name, RUNNING) | ({name.rpartition(".")[0]} & MODULES.keys())
    reached = {one.split(".")[0] for name in seen for one in RUNNING[name]}
    assert reached & UNREACHABLE[room] == set()


def test_the_law_is_short_and_the_top_holds_five_files() -> None:
    assert len(LAW) <= 12
    top = {path.name for path in (ROOT / "diffusion_policy").glob("*.py")}
    assert top == {"__init__.py", "cli.py", "config.py", "policy.py", "normalizer.py"}


def test_datasets_never_becomes_a_package_that_shadows_hugging_faces() -> None:
    assert not (ROOT / "datasets" / "__init__.py").exists()


def test_the_package_and_its_command_line_import_neither_torch_nor_a_simulator() -> None:
    code = (
        "import sys, diffusion_policy.cli; "
        "print([m for m in ('torch', 'pybullet', 'zarr', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
