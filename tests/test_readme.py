"""What README.md and the pages of docs/ show is what runs.

The commands and the Python of a page run one after another, in miniature, in a folder where those of the README have
run before. What needs a cluster, or files that only users have, is parsed.
"""

import atexit
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import zarr
from torch.distributed.run import get_args_parser

from diffusion_policy import envs
from diffusion_policy.cli import VERBS, main, parse
from diffusion_policy.commands import demo, evaluate, study_policies
from diffusion_policy.diffusion.samplers import SAMPLERS

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": (ROOT / "README.md").read_text()} | {
    f"docs/{path.name}": path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))
}
"""The text of each page, by its place in the repository."""


class Block(NamedTuple):
    """What stands between two fences."""

    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block without comments, each command on one line."""
        lines = (line.split("    #")[0].strip() for line in self.text.replace("\\\n", " ").splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def blocks(page: str) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    return [Block(language, text) for language, text in found]


def commands_of(page: str) -> list[str]:
    return [line for block in blocks(page) if block.language == "sh" for line in block.commands]


def has_code(page: str) -> bool:
    return any(block.language == "python" for block in blocks(page)) or any(
        command.startswith("diffusion-policy ") for command in commands_of(page)
    )


SMALL = "--widths 16 32 --groups 4 --level-dim 16 --noise-levels 20 --steps 2 --batch-size 16 --device cpu"
SMALL_TRANSFORMER = SMALL.replace("--widths 16 32 --groups 4", "--width 16 --layers 2 --heads 2")
SHORT = "--env-kwargs '{\"max_episode_steps\": 10}'"
IMAGES = '{"image_size": 96, "max_episode_steps": 10}'
MINIATURE = {
    "collect": "--episodes 4 --workers 1",
    "train": SMALL,
    "train-latent": SMALL,
    "train-classifier": SMALL,
    "evaluate": f"--episodes 2 --repeats 1 --sampling-steps 1 --workers 1 --videos 0 --device cpu {SHORT}",
    "rollout": f"--episodes 1 --sampling-steps 1 --workers 1 --device cpu {SHORT}",
    "study": "--samplers ddim --steps 1 --delay-steps 2 --strategies receding rtc+roll --episodes 1 --workers 1 "
    "--device cpu",
    "run-robot": "--steps 5 --hz 20 --sampling-steps 1 --backend eager --device cpu --watchdog 30",
    "doctor": "--overfit-steps 2 --device cpu",
    "sweep": f"{SMALL} --episodes 1 --sampling-steps 2",
    "forecast": "--samples 2 --episodes 2 --sampling-steps 1 --device cpu",
    "compare": "",
    "report": "",
    "dataset": "",
    "toy": "",
    "demo": "",
    "benchmark": "--only planning data --rows 1 --samples 1 --plans 2 --backends eager --sampling-steps 2 --device cpu",
    "serve": "--sampling-steps 1 --device cpu",
    "live": "--sampling-steps 1 --device cpu --port 0",
    "export": "--sampling-steps 2 --tolerance 0.1",  # of a network that has learned nothing, which amplifies rounding
}
"""What is added to a command, so that it takes seconds; a flag given twice counts as given last."""
LONG = {"sweep", "toy", "demo"}
"""Commands that take long all the same."""
LEFT = {"benchmark": "runs/speed", "export": "runs/robot"}
"""What commands of some seconds leave in the README; in miniature those of another page leave the same."""
MY_ENCODER = "def embed(text): return [text.count(letter) for letter in 'abcdefghijklmnopqrstuvwxyz']"
MY_ROBOT = "from diffusion_policy.envs.simulated_robot import SimulatedRobot as Robot"
OF_OTHERS = {
    "pusht_cchi_v7_replay.zarr": {"state": (5,), "keypoint": (9, 2), "action": (2,)},
    "runs/merging.zarr": {"position": (8,), "velocity": (8,), "action": (1,)},
}
"""Datasets that a page's own commands do not make, with what they observe."""
SERVED_AT = 20_000 + os.getpid() % 10_000
"""A port of this process's own."""
FEW = {
    "episodes=40)": "episodes=4, workers=1)",
    "episodes=40,": "episodes=4,",
    "range(40)": "range(4)",
    "steps=500": "steps=2",
    "episodes=20)": "episodes=2, workers=1, videos=0, sampling_steps=1)",
    "100_020": "100_002",
    "range(20)": "range(2)",
}
"""What is put in the place of numbers of the Python blocks, so that they take seconds."""


def run_page(page: str, folder: Path, *, only_long: bool = False) -> None:
    """Run what a page shows, in the folder; `only_long`: of its commands, the long ones alone; else all others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(demo, "STEPS", 4)
        patch.setattr(demo, "EPISODES", 2)
        patch.setattr(evaluate, "LATENCY_PLANS", 6)
        patch.setattr(study_policies, "resolve_backend", lambda *_: "eager")  # or it would make a graph for each
        Path("my_robot.py").write_text(MY_ROBOT)
        Path("language.py").write_text(MY_ENCODER)
        for path, shapes in OF_OTHERS.items():
            if f"{path} --output" in PAGES[page]:
                make_store(Path(path), shapes)
        for block in blocks(page):
            if block.language == "python" and not only_long:
                exec(in_miniature(block.text), {"observation": observation()})
            for command in block.commands if block.language == "sh" else []:
                if command.startswith("diffusion-policy ") and is_long(command) == only_long:
                    run_command(command)


def make_store(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A store of a few random episodes."""
    group, rng = zarr.open_group(path, mode="w"), np.random.default_rng(0)
    for key, shape in shapes.items():
        group.create_array(f"data/{key}", data=rng.uniform(100, 300, (120, *shape)).astype(np.float32))
    group.create_array("meta/episode_ends", data=np.array([40, 80, 120]))


def is_long(command: str) -> bool:
    return command.startswith("diffusion-policy ") and command.split()[1] in LONG


def run_command(command: str) -> None:
    command = command.removeprefix("diffusion-policy ").replace(
        "--dataset D ", "--dataset runs/demo/demonstrations.zarr "
    )
    command = command.replace("int:1000:2000", "int:2:3").replace("8000", str(SERVED_AT))
    verb, *_ = words = shlex.split(command)
    if verb == "compare" and not Path("runs/other").exists():  # the demo is long
        shutil.copytree("runs/demo/evaluation", "runs/other/evaluation")
    if "--resume" not in words:
        added = SMALL_TRANSFORMER if verb == "train" and "transformer" in words else MINIATURE[verb]
        if verb == "run-robot" and "--server" in words:  # where the server decides these
            added = added.replace("--backend eager --device cpu", "")
        if "plans" in words and verb == "study":
            added += " --plan-samples 3 --chunking receding"
        if "networks" in words:  # which are taken in their own steps
            added = added.replace("--steps 1", "")
        words += shlex.split(added)
        words += shlex.split("--pairs 40 --teacher-steps 4" if "pairs" in words else "")
        if "runs/maze_obstacles" in words:
            words += ["--env-kwargs", '{"obstacles": 1, "max_episode_steps": 10}']
        if "runs/image_policy" in words and verb == "evaluate":
            words += ["--env-kwargs", IMAGES]
    if verb in LEFT and Path(LEFT[verb]).exists():
        parse(words)
        shutil.copytree(LEFT[verb], words[words.index("--output") + 1])
        return
    if verb in ("serve", "live"):
        start_server(words)
        return
    status = main(words)
    assert status in ((0, 1) if verb == "doctor" else (0,)), command


def start_server(words: list[str]) -> None:
    """A server that the commands after it ask; it ends with the tests."""
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusion_policy.cli", *words], stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.kill)
    assert process.stdout is not None
    assert re.match("serving at|open http", process.stdout.readline())


def in_miniature(code: str) -> str:
    for number, few in FEW.items():
        code = code.replace(number, few)
    return code


def observation() -> dict[str, np.ndarray]:
    """What the user of a robot has, for the policies of these pages."""
    return envs.make("diffusion_policy/Avoid-v0", rows=1).reset(seed=0)[0]


@pytest.fixture(scope="module")
def after_readme(blank_pictures: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's blocks have run, but for the long commands."""
    folder = tmp_path_factory.mktemp("session")
    run_page("README.md", folder)
    return folder


@pytest.fixture
def session(after_readme: Path, tmp_path: Path) -> Path:
    """A copy of that folder, in which another page's blocks run."""
    return Path(shutil.copytree(after_readme, tmp_path / "session"))


def test_what_the_readme_shows_runs_as_it_stands_there(after_readme: Path) -> None:
    for left in ("avoid/evaluation/results.json", "demo/evaluation/report.html", "demo/rollout.mp4", "demo/doctor"):
        assert (after_readme / "runs" / left).exists()


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and has_code(page)])
def test_what_a_page_shows_runs_after_that(page: str, session: Path) -> None:
    run_page(page, session)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(map(is_long, commands_of(page)))])
def test_the_long_commands_of_a_page_run_too(page: str, session: Path) -> None:
    shutil.rmtree(session / "runs/other")
    run_page(page, session, only_long=True)


@pytest.mark.slow
def test_the_five_lines_learn_something_as_they_stand_there(tmp_path: Path) -> None:
    (code,) = (block.text for block in blocks("README.md") if block.language == "python")
    lines = [line for line in code.splitlines() if line and not line.startswith("import")]
    assert len(lines) == 5
    robot = "envs.make('diffusion_policy/Avoid-v0', rows=1).reset(seed=0)[0]"
    given = f"from diffusion_policy import envs\nobservation = {robot}\n"
    run_python(given + code, tmp_path)
    results = json.loads((tmp_path / "runs/avoid/evaluation/results.json").read_text())
    assert results["success_rate"]["value"] > 0


@pytest.mark.slow
def test_the_parts_learn_something_as_they_stand_there(tmp_path: Path) -> None:
    (code,) = (block.text for block in blocks("docs/training.md") if block.language == "python")
    printed = run_python(code, tmp_path)
    counts = re.findall(r"^(left|right|none): (\d+) of (\d+)$", printed, re.MULTILINE)
    assert sum(int(episodes) for _, _, episodes in counts) == 20
    successes = sum(int(succeeded) for _, succeeded, _ in counts)
    assert successes > 0
    assert f"success: Metric(value={successes / 20}" in printed


def run_python(code: str, folder: Path) -> str:
    """Run Python in a process of its own; returns what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_line_of_a_shell_block_is_run_or_understood() -> None:
    commands = [command for page in PAGES for command in commands_of(page)]
    assert len(commands) >= 30
    for command in commands:
        first, *rest = shlex.split(command)
        if first == "make":
            assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        elif first.startswith("scripts/"):
            understand_script(ROOT / first)
        elif first in ("torchrun", "accelerate") or first.startswith("RAY_ADDRESS="):
            understand_launch([first, *rest])
        else:
            assert first == "diffusion-policy", f"{command} is neither run nor understood"
            assert rest[0] in MINIATURE, command


def understand_script(path: Path) -> None:
    """Parse the commands of a script; bash gives its variables their values."""
    assert os.access(path, os.X_OK), path
    told = f'diffusion-policy() {{ printf "%q " "$@"; echo; }}\nset -- A B\n{path.read_text()}'
    done = subprocess.run(["bash", "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout
    for command in done.stdout.splitlines():
        parse(shlex.split(command))


def understand_launch(words: list[str]) -> None:
    """Parse what a launcher is given, and the command that it starts."""
    if words[0] == "torchrun":
        started = get_args_parser().parse_args(words[1:])
        assert started.module
        assert started.training_script == "diffusion_policy.cli"
        parse(started.training_script_args)
    elif words[0] == "accelerate":
        launch = pytest.importorskip("accelerate.commands.launch")
        started = launch.launch_command_parser().parse_args(words[2:])
        assert started.module
        parse(started.training_script_args)
    else:
        assert words[1] == "diffusion-policy"
        parse(words[2:])


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Every flag of every command, and of the launchers that docs/cluster.md names."""
    texts = [help_of(*verb.split()) for verb in VERBS]
    launchers = [
        line for line in PAGES["docs/cluster.md"].splitlines() if "torchrun" in line or "accelerate launch" in line
    ]
    return set(re.findall(r"--[a-z][a-z_-]*[a-z]", "\n".join(texts + launchers)))


def help_of(*words: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        parse([*words, "--help"])
    return said.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_the_flags_that_a_page_names_exist(page: str, flags: set[str]) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", PAGES[page]))
    of_others = {"--no-deps"}  # of pip
    assert named - flags - {"--help", "--debug", "--version"} - of_others == set()


@pytest.mark.parametrize("page", PAGES)
def test_the_links_and_pictures_of_a_page_exist(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text()), target


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_listed_in_both_indexes() -> None:
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/README.md":
            assert f"]({page})" in PAGES["README.md"]
            assert f"]({page.removeprefix('docs/')})" in PAGES["docs/README.md"]


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].encode()) <= 10_000


WORDS_OF_OTHERS = (
    *("EMA", "inference", "imitation learning", "behaviour cloning", "behavior cloning", "action chunk"),
    *("action chunking", "rollout", "policy", "normalization", "observation horizon", "DDIM"),
    *("classifier-free guidance", "receding horizon", "hyperparameter search", "teleoperation"),
)


def test_the_words_of_others_are_found() -> None:
    listed = PAGES["docs/README.md"][PAGES["docs/README.md"].index("## Words others use") :].lower()
    for word in WORDS_OF_OTHERS:
        assert re.search(rf"^\|[^|]*\b{re.escape(word.lower())}\b", listed, re.MULTILINE), word


def test_the_extras_that_pages_name_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"diffusion-policy-toolkit\[([a-z,]+)\]", "".join(PAGES.values()))
    assert named
    assert {extra for names in named for extra in names.split(",")} <= extras.keys()


def tree() -> Iterator[str]:
    """The paths of the tree in docs/architecture.md: two spaces of indentation a folder."""
    (text,) = (block.text for block in blocks("docs/architecture.md") if not block.language)
    folders: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"((?:  )*)([\w./]+)(?: |$)", line):
            indentation, name = match.groups()
            folders = [*folders[: len(indentation) // 2], name]
            yield "".join(folders)


def test_the_tree_is_what_is_on_the_disk() -> None:
    shown = list(tree())
    assert len(shown) == len(set(shown))
    for path in shown:
        assert (ROOT / path).exists(), path
    modules = {
        str(path.relative_to(ROOT))
        for folder in ("diffusion_policy", "envs", "datasets", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        if path.stem != "__init__" and not (ROOT / folder / path.relative_to(ROOT / folder).parts[0]).is_symlink()
    }
    assert {path for path in shown if path.endswith(".py") and not path.endswith("__init__.py")} == modules


def test_the_files_that_pages_name_exist() -> None:
    text = "".join(PAGES.values()) + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`([\w/]+/\w+\.py)`", text)) - {"datasets/__init__.py"}  # which must never exist
    assert named
    assert {
        path for path in named if not any((ROOT / top / path).is_file() for top in (".", "diffusion_policy"))
    } == set()


def test_the_table_of_samplers_is_the_committed_study() -> None:
    study = json.loads((ROOT / ".github" / "studies" / "demo_samplers.json").read_text())
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \| (\d.*) \|$", PAGES["docs/diffusion.md"], re.MULTILINE))
    assert rows.keys() == study["samplers"].keys() == SAMPLERS.keys()
    for name, cells in study["samplers"].items():
        shown = [
            f"{cell['success_rate']['value']:.2f} · {cell['mode_entropy']['value']:.2f} · {cell['milliseconds']:.0f}"
            for cell in cells.values()
        ]
        assert rows[name].split(" | ") == shown
