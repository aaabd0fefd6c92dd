"""Who may import whom: read from the source, so that it holds for imports inside functions too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for folder in ("diffusion_policy", "envs", "datasets")
    for path in (ROOT / folder).rglob("*.py")
    if not (folder == "diffusion_policy" and path.relative_to(ROOT / folder).parts[0] in ("envs", "datasets"))
)

LEARNING = {"config", "diffusion", "guidance", "networks", "normalizer", "prediction", "samplers", "schedules"}
OURS_ALLOWED = {
    "bounds": set(),
    "config": {"bounds"},
    "files": set(),
    "lines": set(),
    "names": {"bounds"},
    "schedules": set(),
    "streams": set(),
    "prediction": set(),
    "guidance": set(),
    "variance": {"samplers", "schedules"},
    "diffusion": {"prediction", "samplers", "schedules", "variance"},
    "likelihood": {"samplers", "schedules"},
    "samplers": {"schedules"},
    "networks": {"networks"},
    "normalizer": {"datasets.statistics"},
    "policy": LEARNING | {"datasets.statistics", "streams"},
    "controller": {"config", "policy"},
    "processes": set(),
    "trainer": {"config", "diffusion", "policy", "processes", "samplers", "datasets.windows"},
    "trackers": {"config", "files"},
    "checkpoint": {"checkpoint_contents", "checkpoint_files", "config", "files", "policy"},
    "checkpoint_contents": {"checkpoint_files", "config", "files", "policy"},
    "checkpoint_files": {"config", "files"},
    "engines": {"lines", "ray_cluster", "spawned"},
    "ray_cluster": {"lines"},
    "pool": {"engines", "host", "lines", "ray_cluster", "spawned"},
    "spawned": {"lines"},
    "host": {"bounds", "lines"},
    "metrics": {"intervals"},
    "rollout": {"controller", "engines", "host", "lines", "metrics", "names", "pool"},
    "intervals": set(),
    "comparison": {"intervals"},
    "results": {"config", "files", "intervals"},
    "report": {"drawing", "files", "gallery", "metrics", "wording"},
    "digits": set(),
    "gallery": set(),
    "drawing": {"gallery", "metrics"},
    "wording": {"digits", "metrics"},
    "figures": {"drawing", "gallery", "metrics", "toy"},
    "toy": {"diffusion", "guidance", "likelihood", "networks", "prediction", "samplers", "schedules"},
    "doctor": {"config", "datasets.statistics", "datasets.windows", "likelihood", "normalizer", "policy", "schedules"},
    "video": {"files", "lines"},
}
"""Modules of ours that each module may import. Commands and cli may import everything."""


LIBRARIES = {
    "envs": {"gymnasium", "numpy", "pybullet", "pybullet_data", "pybullet_utils"},
    "push_t.py": {"gymnasium", "numpy", "gym_pusht", "pymunk", "pygame"},
    "datasets": {"numpy", "zarr", "fsspec"},
    "diffusion_policy": {"torch", "numpy", "einops", "safetensors", "gymnasium", "scipy"},
    "report.py": {"matplotlib", "jinja2", "numpy"},
    "figures.py": {"matplotlib", "numpy", "torch"},
    "drawing.py": {"matplotlib", "numpy"},
    "video.py": {"imageio", "gymnasium", "numpy", "PIL"},
    "bounds.py": set(),
    "config.py": set(),
    "files.py": set(),
    "digits.py": set(),
    "trackers.py": {"torch", "wandb"},
    "ray_cluster.py": {"ray"},
    "windows.py": {"numpy", "torch"},
    "checksums.py": {"numpy", "google_crc32c"},
    "web.py": {"zarr", "aiohttp"},
    "robomimic.py": {"numpy", "h5py"},
    "lerobot.py": {"numpy", "pyarrow"},
    "minari.py": {"numpy", "minari", "gymnasium"},
    "recorder.py": {"numpy", "zarr", "gymnasium"},
}
"""Libraries that each room may use; some files have a list of their own."""


KNOWN_TO = {"recorder.py": {f"envs.{name}" for name in ("contract", "protocols", "spaces", "wrappers")}}
"""What of the other room a file may know: the recorder records what an adapter would observe, and how it was made."""


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            members = [alias.name for alias in node.names]
            if node.module == "diffusion_policy":  # from diffusion_policy import trainer: a module, unless __version__
                names |= {f"diffusion_policy.{name}" for name in members if name != "__version__"}
            else:
                names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_it_may_know(path: Path) -> None:
    relative = path.relative_to(ROOT)
    names = imports_of(path)
    external = {name.split(".")[0] for name in names}
    ours = {name.removeprefix("diffusion_policy").strip(".") for name in names if name.startswith("diffusion_policy")}
    if relative.parts[1] in ("commands", "cli.py", "__init__.py") and relative.parts[0] == "diffusion_policy":
        return
    libraries = external - set(sys.stdlib_module_names) - {"diffusion_policy"}
    assert libraries <= LIBRARIES.get(relative.name, LIBRARIES[relative.parts[0]])
    if relative.parts[0] in ("envs", "datasets"):
        known = {"bounds", "files", "lines", "names", "streams"} | KNOWN_TO.get(relative.name, set())
        assert all(name.startswith(relative.parts[0]) for name in ours - known)
        assert relative.name == "simulation.py" or not libraries & {"pybullet", "pybullet_data", "pybullet_utils"}
    else:
        allowed = OURS_ALLOWED[relative.parts[1].removesuffix(".py")]
        assert {name if name in allowed else name.split(".")[0] for name in ours} <= allowed


def test_datasets_never_becomes_a_package_that_shadows_hugging_faces() -> None:
    assert not (ROOT / "datasets" / "__init__.py").exists()


def test_the_package_and_its_command_line_import_neither_torch_nor_a_simulator() -> None:
    code = (
        "import sys, diffusion_policy.cli; "
        "print([m for m in ('torch', 'pybullet', 'zarr', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
