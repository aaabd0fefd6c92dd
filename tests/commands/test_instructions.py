"""From demonstrations with instructions to what a policy does when it is told them."""

import json
from pathlib import Path

import pytest

from diffusion_policy import envs
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.cli import main
from diffusion_policy.commands import study_cells
from diffusion_policy.commands.episodes import RolledOut
from diffusion_policy.commands.interrupts import Interrupted
from diffusion_policy.commands.live_policy import LivePolicy
from diffusion_policy.commands.study import Study
from diffusion_policy.commands.study_instructions import summarize
from diffusion_policy.commands.train import Train
from diffusion_policy.config import ChunkingConfig, ConfigError, PolicyConfig, SampleConfig, TrainConfig, with_options
from diffusion_policy.datasets.instructing import instruct
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.evaluation.episode import FailedEpisode
from diffusion_policy.report.instructions_page import count_done, draw_instructions

LEFT, RIGHT = TEXTS = "go round the left", "pass it on the right side"
ENCODER = """
def measure(text):
    return [text.count("l"), text.count("r"), len(text)]
"""
POLICY = with_options(
    PolicyConfig(condition_on_instruction=True, condition_dropout=0.2),
    widths=(16, 32), level_dim=16, noise_levels=20, groups=4,
)  # fmt: skip
SHORT = '{"rows": 1, "max_episode_steps": 6}'


def measure(text: str) -> list[int]:
    return [text.count("l"), text.count("r"), len(text)]


@pytest.fixture(scope="module")
def told(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("told")
    instruct(demonstrations, folder / "a.zarr", {"left": LEFT, "right": RIGHT}, measure)
    instruct(demonstrations, folder / "b.zarr", {"left": LEFT, "right": RIGHT})
    return folder


def train(told: Path, store: str, run: str, **options) -> Path:
    if not (told / run).exists():
        training = TrainConfig(steps=2, batch_size=16, validation_share=0.2)
        policy = with_options(POLICY, **options)
        Train(str(told / store), told / run, policy=policy, training=training, device="cpu").run()
    return told / run


@pytest.fixture(scope="module")
def run(told: Path) -> Path:
    return train(told, "a.zarr", "run")


def fails(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("store, size", [("a.zarr", 3), ("b.zarr", 0)])
def test_a_training_keeps_what_it_was_told(told: Path, store: str, size: int) -> None:
    loaded = checkpoint.load(train(told, store, f"run-{size}"))
    assert loaded.policy.instructions == TEXTS
    assert loaded.policy.label_rows.size == size
    assert loaded.dataset.instructions == {LEFT: {"left": 6}, RIGHT: {"right": 6}}


def test_a_training_goes_on_only_with_the_instructions_that_it_began_with(told: Path, run: Path, capsys) -> None:
    assert main(["train", "--resume", str(run), "--steps", "2"]) == 0
    capsys.readouterr()
    instruct(told / "a.zarr", told / "others.zarr", {"left": RIGHT, "right": LEFT}, measure)
    text = fails(capsys, "train", "--resume", run, "--dataset", told / "others.zarr")
    assert "cannot go on as another training: the data are others" in text


def test_instructions_of_no_episode_are_not_learned(told: Path, capsys) -> None:
    one = told / "one.zarr"
    with EpisodeStore.create(one, {"instructions": [*TEXTS]}, ["left"]) as store:
        few = EpisodeStore.open(told / "b.zarr").episodes(range(2), ("actual_xy", "action"))
        store.append([episode._replace(instruction=LEFT, mode=None) for episode in few])
    text = fails(capsys, "train", "--dataset", one, "--output", told / "none", "--condition-on-instruction")
    assert "condition-on-instruction needs data with at least two instructions; it has 1" in text


def test_a_teacher_and_its_student_are_told_the_same(told: Path, run: Path, capsys) -> None:
    command = ["train", "--teacher", str(run), "--student", "pairs", "--student-steps", "1", "--teacher-steps", "2"]
    command += ["--pairs", "20", "--steps", "2", "--batch-size", "8", "--device", "cpu"]
    assert main([*command, "--dataset", str(told / "a.zarr"), "--output", str(told / "student")]) == 0
    rows = [checkpoint.load(one).policy.label_rows.state_dict() for one in (run, told / "student")]
    assert all((rows[0][name] == rows[1][name]).all() for name in rows[0])
    capsys.readouterr()
    text = fails(capsys, *command, "--dataset", told / "b.zarr", "--output", told / "other")
    assert "the teacher knows embeddings of as many numbers as 3; of this dataset the student" in text


def test_the_doctor_looks_at_a_policy_that_is_told_instructions(told: Path, run: Path, capsys) -> None:
    command = ["doctor", "--checkpoint", str(run), "--dataset", str(told / "a.zarr"), "--overfit-steps", "2"]
    assert main([*command, "--instruction", LEFT, "--sampling-steps", "2", "--device", "cpu"]) in (0, 1)
    untrained = ["doctor", "--dataset", str(told / "a.zarr"), "--overfit-steps", "2", "--condition-on-instruction"]
    assert main([*untrained, "--widths", "16", "32", "--device", "cpu"]) in (0, 1)
    assert "overfits 32 windows" in " ".join(capsys.readouterr().err.split())


def test_a_rollout_is_told_a_new_text_by_its_encoder(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("letters_for_rollouts.py").write_text(ENCODER)
    fixed = ["rollout", "--checkpoint", str(run), "--env-kwargs", SHORT, "--workers", "1", "--episodes", "1"]
    fixed += ["--sampling-steps", "2", "--backend", "eager"]
    text = fails(capsys, *fixed, "--instruction", "pass on the right side")
    assert f"does not know the instruction 'pass on the right side'; the nearest known are: {RIGHT!r}; {LEFT!r}" in text
    assert "take any with its dataset's --instruction-encoder" in text
    encoder = ["--instruction-encoder", "letters_for_rollouts:measure"]
    assert "encodes an --instruction; got none" in fails(capsys, *fixed, *encoder)
    new = ["--instruction", "pass on the right side", "--record", "recorded.zarr"]
    assert main([*fixed, *encoder, *new]) == 0
    assert EpisodeStore.open("recorded.zarr").episode_instructions() == ["pass on the right side"]
    other = ["--instruction-encoder", "letters_for_rollouts:mesure", "--instruction", "go"]
    assert "did you mean 'measure'?" in fails(capsys, *fixed, *other)


def test_a_live_policy_is_told_another_instruction_while_it_runs(run: Path) -> None:
    policy, env = checkpoint.load(run).policy, envs.make("diffusion_policy/Avoid-v0", rows=1)
    sampling = SampleConfig(sampling_steps=1, instruction=LEFT)
    live = LivePolicy(policy, env, sampling, ChunkingConfig(), delay_steps=0, action_horizon=None, fan=0)
    live.begin(0, env.reset(seed=0)[0])
    assert (live.tell()["instructions"], live.tell()["settings"]["instruction"]) == ([LEFT, RIGHT], LEFT)
    live.change({"instruction": RIGHT, "guidance": 1})
    assert live.tell()["settings"]["instruction"] == RIGHT
    with pytest.raises(ValueError, match="does not know the instruction 'stop'"):
        live.change({"instruction": "stop"})
    with pytest.raises(ValueError, match="guidance needs an instruction to guide to"):
        live.change({"instruction": None})


def test_a_policy_without_embeddings_takes_no_new_text(told: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("letters_for_none.py").write_text(ENCODER)
    run = train(told, "b.zarr", "run-0")
    told_new = ["--instruction", "pass it", "--instruction-encoder", "letters_for_none:measure"]
    text = fails(capsys, "rollout", "--checkpoint", run, "--episodes", "1", *told_new)
    assert "only a policy that was trained with embeddings of instructions can be told a new one" in text


def test_the_study_counts_what_was_asked_and_what_was_done(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "study"
    fixed = ["study", "instructions", "--checkpoint", str(run), "--output", str(out), "--workers", "1"]
    assert main([*fixed, "--episodes", "2", "--steps", "2", "--guidances", "0", "1.5", "--env-kwargs", SHORT]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["asked"] == {LEFT: ["left"], RIGHT: ["right"]}
    assert {text: list(cells) for text, cells in results["instructions"].items()} == {
        text: ["0", "1.5"] for text in TEXTS
    }
    assert {weight: cell["episodes"] for weight, cell in results["all"].items()} == {"0": 4, "1.5": 4}
    for cells in results["instructions"].values():
        for cell in cells.values():
            assert cell["episodes"] == 2
            assert 0 <= cell["success_rate"]["low"] <= cell["success_rate"]["value"] <= 1
    assert f"{LEFT!r}, guidance 0: asked left; done " in " ".join(capsys.readouterr().err.split())
    html = (out / "instructions.html").read_text()
    assert html.count(f"<bdi>{LEFT}</bdi>") == 2
    assert "embeddings of 3 numbers" in html


def test_the_study_asks_for_new_texts_of_a_mode(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("letters_for_a_study.py").write_text(ENCODER)
    fixed = ["study", "instructions", "--checkpoint", str(run), "--episodes", "1", "--workers", "1", "--steps", "1"]
    fixed += ["--instruction-encoder", "letters_for_a_study:measure", "--env-kwargs", SHORT, "--guidances", "0"]
    new = ["--instruction", "left=turn left", "--instruction", RIGHT, "--instruction", "do something"]
    assert main([*fixed, *new, "--output", "a"]) == 0
    results = json.loads(Path("a/results.json").read_text())
    assert results["asked"] == {"turn left": ["left"], RIGHT: ["right"], "do something": []}
    text = fails(capsys, *fixed, "--instruction", "lft=turn left", "--output", "b")
    assert "--instruction names the mode 'lft'; the modes are left, right" in text


@pytest.mark.parametrize(
    "what, options, message",
    [
        ("instructions", {"mode": "left"}, "takes its weights from --guidances, and steers to no --mode"),
        ("instructions", {"guidance": 1.0}, "takes its weights from --guidances"),
        ("instructions", {"guidances": (1.0, 1.0)}, "guidances must be different numbers"),
        ("instructions", {"guidances": (-2.0,)}, "guidance must be at least -1; got -2.0"),
        ("samplers", {"guidances": (1.0,)}, "study samplers tells a policy one --instruction, under one --guidance"),
        ("networks", {"instruction": ("a", "b")}, "study networks tells a policy one --instruction"),
    ],
)
def test_a_study_refuses_what_it_does_not_take(what, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        Study(tmp_path, tmp_path / "study", what=what, **options)


def test_other_studies_tell_the_policy_one_instruction(run: Path, tmp_path: Path) -> None:
    fixed = {"samplers": ("ddim",), "steps": (1,), "episodes": 1, "workers": 1, "env_kwargs": SHORT}
    results = Study(run, tmp_path / "a", what="samplers", instruction=(LEFT,), **fixed).run()
    assert results["instruction"] == LEFT
    assert "success_rate" in results["samplers"]["ddim"]["1"]


def test_a_policy_that_is_told_nothing_has_no_such_study(told: Path, tmp_path: Path) -> None:
    plain = train(told, "b.zarr", "plain", condition_on_instruction=False)
    with pytest.raises(ConfigError, match="was trained without --condition-on-instruction: it is told nothing"):
        Study(plain, tmp_path / "study", what="instructions", episodes=1, workers=1).run()


def test_an_interrupted_study_keeps_what_is_done_and_lost_episodes_are_counted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    calls = iter((1, 2))

    def lose(loaded, seeds: range, planner, **options) -> RolledOut:
        if next(calls) == 2:
            raise Interrupted("stopped")
        return RolledOut([], [FailedEpisode(seed, 0, "RuntimeError: it fell") for seed in seeds], [])

    monkeypatch.setattr(study_cells, "run_episodes", lose)
    study = Study(run, tmp_path / "study", what="instructions", episodes=1, workers=1, guidances=(0.0,))
    with pytest.raises(Interrupted, match="stopped at 'pass it on the right side', 0; the others are in"):
        study.run()
    kept = json.loads((tmp_path / "study" / "results.json").read_text())
    assert kept["instructions"][LEFT]["0"] == {"refused": "every episode failed: RuntimeError: it fell", "lost": 1}
    assert "not possible: every episode failed: RuntimeError: it fell" in capsys.readouterr().err
    draw_instructions(kept).canvas.draw()


class Ended:
    """What the study looks at of an episode."""

    def __init__(self, seed: int, success: bool, mode: str | None) -> None:
        self.seed, self.success, self.mode = seed, success, mode


def test_shares_are_of_the_successes_that_were_asked_for_something() -> None:
    ended = [Ended(0, True, "left"), Ended(1, True, "right"), Ended(2, False, "left"), Ended(3, True, None)]
    found = summarize([(one, ["left"]) for one in ended])  # pyright: ignore
    assert found["success_rate"]["value"] == 0.75
    assert found["as_asked"]["value"] == pytest.approx(1 / 3)
    cell = {**found, "done": {"left": 1, "right": 1}}
    assert count_done(cell, ["left", "right", "up", "no mode", "no success"]) == [1, 1, 0, 1, 1]
    assert summarize([(one, ["left", "right"]) for one in ended])["as_asked"]["value"] == pytest.approx(2 / 3)  # pyright: ignore
    assert summarize([(one, []) for one in ended])["as_asked"]["value"] is None  # pyright: ignore
    assert summarize([])["success_rate"]["value"] is None
