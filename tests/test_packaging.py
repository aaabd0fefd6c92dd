"""The wheel, installed beside Hugging Face's `datasets`, imports everything and shadows nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_everything_and_leaves_other_packages_alone(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "datasets").mkdir(parents=True)
    (site / "datasets" / "__init__.py").write_text("owner = 'Hugging Face'\n")
    source = tmp_path / "source"  # a copy, so that no build folder of an earlier version plays a part
    leave = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, source, symlinks=True, ignore=leave)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)

    modules = [
        ".".join(("diffusion_policy", *path.relative_to(folder).with_suffix("").parts)).replace(".__init__", "")
        if folder.name == "diffusion_policy"
        else ".".join(("diffusion_policy", folder.name, *path.relative_to(folder).with_suffix("").parts))
        for folder in (ROOT / "diffusion_policy", ROOT / "envs", ROOT / "datasets")
        for path in folder.rglob("*.py")
        if folder.name != "diffusion_policy" or path.relative_to(folder).parts[0] not in ("envs", "datasets")
    ]
    modules = [module.removesuffix(".__init__") for module in modules]
    assert len(modules) > 30
    templates = {path.name for path in (ROOT / "diffusion_policy" / "report" / "templates").glob("*.jinja")}
    code = f"""
import importlib, importlib.resources, pathlib, sys
for module in {modules!r}:
    found = importlib.import_module(module)
    assert found.__file__ is None or pathlib.Path(found.__file__).is_relative_to({str(site)!r}), found.__file__
assert "torch._dynamo" not in sys.modules  # the compiler takes a second to import: programs do so when they use it
import datasets
assert datasets.owner == 'Hugging Face'
installed = {{path.name for path in (importlib.resources.files('diffusion_policy.report') / 'templates').iterdir()}}
assert {templates!r} <= installed
"""
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
