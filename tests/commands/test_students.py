"""Students from the command line and from Python: trained, resumed, evaluated beside their teacher, and studied."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import diffusion_policy as dp
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.cli import main
from diffusion_policy.commands import beside_teacher, distilling, study_policies
from diffusion_policy.commands.beside_teacher import agree
from diffusion_policy.commands.distilling import Guard
from diffusion_policy.commands.interrupts import Interrupted
from diffusion_policy.commands.options.train import fields_of_teacher
from diffusion_policy.commands.policy_in_env import PolicyInEnv
from diffusion_policy.config import SampleConfig
from diffusion_policy.evaluation.episode import Episode
from diffusion_policy.evaluation.results import read_results
from diffusion_policy.training.trainer import Progress

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # inside torch.func.jvp
    pytest.mark.usefixtures("blank_pictures"),
]
STEPS = ["--steps", "6", "--batch-size", "32", "--validate-every", "3", "--checkpoint-every", "3", "--device", "cpu"]


def train(demonstrations: Path, teacher: Path, output: Path, *options: str, student: str = "pairs") -> int:
    asked = ["--teacher", str(teacher), "--student", student, "--pairs", "64", "--teacher-steps", "2"]
    return main(["train", "--dataset", str(demonstrations), "--output", str(output), *asked, *STEPS, *options])


@pytest.fixture(scope="module")
def student(demonstrations: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "pairs"
    assert train(demonstrations, run, folder) == 0
    return folder


def test_a_student_is_a_checkpoint_that_names_its_teacher(student: Path, run: Path) -> None:
    loaded, teacher = checkpoint.load(student), checkpoint.load(run)
    asked = loaded.training.distillation
    assert (asked.student, asked.teacher, asked.teacher_steps) == ("pairs", str(checkpoint.find(run).resolve()), 2)
    assert asked.teacher_weights == teacher.weights_sha256
    assert loaded.policy.config.network == teacher.policy.config.network
    assert (loaded.policy.config.student_steps, loaded.policy.config.prediction) == (1, "sample")
    own, taught = (one.policy.normalizer.state_dict() for one in (loaded, teacher))
    assert all(torch.equal(own[name], taught[name]) for name in taught)
    lines = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    seen = [line for line in lines if line["teacher_agreement"] is not None]
    assert [line["step"] for line in seen] == [3, 6]
    assert all(0 <= line["teacher_agreement"] <= 1 and line["teacher_spread"] > 0 for line in seen)


def test_a_stopped_student_goes_on_to_the_same_bits(
    student: Path, demonstrations: Path, run: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    assert train(demonstrations, run, half, "--keep-checkpoints", "2") == 0
    shutil.rmtree(half / "step-000006")
    assert main(["train", "--resume", str(half)]) == 0
    own, other = (checkpoint.load(folder).policy.state_dict() for folder in (half, student))
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_a_student_is_evaluated_beside_its_teacher(student: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--checkpoint", str(student), "--episodes", "2", "--workers", "1", "--videos", "0"]
    assert main(["evaluate", *arguments, "--output", str(tmp_path / "e")]) == 0
    results = read_results(tmp_path / "e")
    assert results["sampling"]["sampling_steps"] == 1
    assert results["teacher"]["sampling"]["sampling_steps"] == 16
    assert set(results["teacher"]["milliseconds"]) == {"teacher", "student"}
    assert "same mode as the teacher" in capsys.readouterr().err
    page = (tmp_path / "e" / "report.html").read_text()
    assert "Beside its teacher" in page
    assert main(["evaluate", *arguments, "--output", str(tmp_path / "n"), "--no-teacher"]) == 0
    assert "teacher" not in read_results(tmp_path / "n")
    assert main(["evaluate", *arguments, "--output", str(tmp_path / "o"), "--sampling-steps", "4"]) == 2
    assert "this policy was trained for sampling steps 1; got 4" in capsys.readouterr().err


def test_a_teacher_that_is_gone_is_a_remark(
    student: Path, demonstrations: Path, run: Path, tmp_path: Path, capsys
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(run, teacher)
    assert train(demonstrations, teacher, tmp_path / "s") == 0
    shutil.rmtree(teacher)
    arguments = ["--checkpoint", str(tmp_path / "s"), "--episodes", "1", "--workers", "1", "--videos", "0"]
    assert main(["evaluate", *arguments, "--output", str(tmp_path / "e")]) == 0
    assert "the teacher could not be run beside it" in capsys.readouterr().err
    assert "teacher" not in read_results(tmp_path / "e")


def test_what_no_student_can_learn_is_said_in_one_line(demonstrations: Path, run: Path, tmp_path: Path, capsys) -> None:
    for options, said in (
        (["--prediction-horizon", "32"], "a student has the prediction-horizon of its teacher, 16; got 32"),
        (["--observation-horizon", "1"], "a student has the observation-horizon of its teacher, 2; got 1"),
        (["--observation", "desired_xy"], "the teacher observes"),
        (["--teacher-weights", "0" * 64], "has other weights than those of --teacher-weights 000"),
        (["--student-steps", "3"], "teacher-steps must be a multiple of the 3 student-steps; got 2"),
        (["--pairs", "20000000"], "20000000 pairs take 6.4 GB, --memory-gb is 4; fewer --pairs"),
        (["--objective", "mip"], "the student pairs has the objective denoising; got --objective mip"),
    ):
        assert train(demonstrations, run, tmp_path / "s", *options) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in error
        assert not (tmp_path / "s").exists()
    assert train(demonstrations, tmp_path / "nobody", tmp_path / "s") == 2
    assert "no teacher at" in capsys.readouterr().err


def test_python_trains_a_student_as_the_command_does(demonstrations: Path, run: Path, tmp_path: Path) -> None:
    dp.train(demonstrations, tmp_path / "s", teacher=run, student="meanflow", steps=2, batch_size=32, device="cpu")
    policy = dp.load(tmp_path / "s").policy
    assert policy.config.network == checkpoint.load(run).policy.config.network
    assert policy.config.objective == "meanflow"
    controller = dp.load(tmp_path / "s").controller(sampling_steps=3)
    action = controller.act({key: torch.zeros(2).numpy() for key in policy.keys})
    assert action.shape == (2,)
    assert fields_of_teacher(run)["policy"] == checkpoint.load(run).policy.config


def test_policies_are_studied_on_the_same_seeds(
    student: Path, demonstrations: Path, run: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_policies, "resolve_backend", lambda *_: "eager")  # or it would make a graph for each
    again = tmp_path / "again"
    assert train(demonstrations, run, again, "--seed", "7") == 0
    arguments = ["--checkpoint", str(run), "--episodes", "2", "--workers", "1", "--beside", str(student), str(again)]
    assert main(["study", "students", *arguments, "--output", str(tmp_path / "st"), "--steps", "1"]) == 0
    results = json.loads((tmp_path / "st" / "results.json").read_text())
    counts = {name: len(cells) for name, cells in results["rows"].items()}
    assert sorted(counts.values()) == [1, 1, 2]
    assert next(name for name, count in counts.items() if count == 2).endswith("student (pairs), 1 step")
    cells = [cell for cells in results["rows"].values() for cell in cells]
    assert [cell["training_seed"] for cell in cells] == [0, 0, 0, 7]
    assert cells[0]["mode_agreement"] is None
    assert all(cell["training_minutes"] > 0 and cell["milliseconds"]["eager"] > 0 for cell in cells)
    page = (tmp_path / "st" / "students.html").read_text()
    assert all(name in page for name in results["rows"])
    assert main(["study", "samplers", *arguments, "--output", str(tmp_path / "no")]) == 2
    assert "--beside is for networks and students" in capsys.readouterr().err


def test_the_guard_speaks_where_plans_spread_too_little() -> None:
    said: list[str] = []

    def hear(guard: Guard, **spreads: float | None) -> str:
        said.clear()
        for step, spread in spreads.items():
            numbers = dict.fromkeys(Progress._fields, None) | {"step": int(step[1:]), "teacher_spread": spread}
            guard.hear(Progress(**numbers), said.append)  # pyright: ignore
        return guard.reason

    assert not hear(Guard("stop", 100), s10=0.2, s40=1.8, s50=None, s60=0.95, s100=0.9)
    assert not said
    sentence = "step 60: plans spread 0.70 times as far as the teacher's: modes may be lost"
    assert not hear(Guard("warn", 100), s50=0.9, s60=0.7)
    assert said == [sentence]
    assert hear(Guard("stop", 100), s60=0.7) == sentence
    assert not hear(Guard("stop", 100), s100=0.7)  # it is over
    assert len(said) == 1
    assert not hear(Guard("off", 100), s60=0.1)
    assert not said


def test_a_guard_that_stops_leaves_a_checkpoint_and_says_why(
    demonstrations: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(distilling, "LEAST_SPREAD", 1e9)
    assert train(demonstrations, run, tmp_path / "s", "--guard", "stop") == 1
    assert "stopped by --guard, step 3: plans spread" in capsys.readouterr().err.replace("\n", " ")
    assert (tmp_path / "s" / "step-000003" / "config.json").exists()
    assert train(demonstrations, run, tmp_path / "n", "--guard", "stop", "--validation-share", "0") == 2
    assert "--guard stop hears of validations" in capsys.readouterr().err


def test_a_student_of_a_policy_that_is_told_a_mode_is_told_it_too(demonstrations: Path, tmp_path: Path, capsys) -> None:
    teacher = ["--output", str(tmp_path / "t"), "--condition-on-mode", "--widths", "16", "32", "--noise-levels", "20"]
    assert main(["train", "--dataset", str(demonstrations), *teacher, *STEPS]) == 0
    for name in ("pairs", "consistency"):
        options = ["--pairs", "64"] if name == "pairs" else []
        asked = ["--teacher", str(tmp_path / "t"), "--student", name, "--teacher-steps", "2", *options, *STEPS]
        assert main(["train", "--dataset", str(demonstrations), "--output", str(tmp_path / name), *asked]) == 0
    policy = checkpoint.load(tmp_path / "pairs").policy
    assert policy.modes == ("left", "right")
    lines = [json.loads(line) for line in (tmp_path / "pairs" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["teacher_agreement"] is not None
    assert policy.complete(SampleConfig(mode="left")).sampling_steps == 1


def test_ctrl_c_while_the_teacher_runs_keeps_the_results(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def stop(*_: object) -> None:
        raise Interrupted("stopped after 0 episodes; nothing was written")

    arguments = ["evaluate", "--checkpoint", str(student), "--output", str(tmp_path / "e"), "--episodes", "1"]
    arguments += ["--workers", "1", "--videos", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(beside_teacher, "compare_with_teacher", stop)
        assert main(arguments) == 130
    assert "the results are in" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "teacher" in read_results(tmp_path / "e")


def test_rows_are_told_apart_by_all_but_the_seed(student: Path, run: Path) -> None:
    loaded = checkpoint.load(student)

    def asked(path: str, seed: int, rate: float) -> study_policies.Asked:
        training = dataclasses.replace(loaded.training, seed=seed, learning_rate=rate)
        policy_in_env = PolicyInEnv(dataclasses.replace(loaded, training=training), "", {}, None, None, None)  # pyright: ignore
        return study_policies.Asked("row", path, policy_in_env, SampleConfig())

    given = [
        asked("a/s0", 0, 1e-3),
        asked("b/s0", 0, 1e-4),
        asked("a/s1", 1, 1e-3),
        asked("b/s1", 1, 1e-4),
        asked("c", 0, 1),
    ]
    rows = [one.row for one in study_policies.tell_apart(given)]
    assert rows == ["row", "row (b/s0)", "row", "row (b/s0)", "row (c)"]


def test_modes_agree_by_seed_and_repeat() -> None:
    def episode(seed: int, mode: str | None) -> Episode:
        return Episode(seed, True, mode, {}, np.zeros((1, 2)))

    own = [episode(seed, mode) for seed, mode in enumerate(["a", "b", "a", None])]
    taught = [episode(seed, mode) for seed, mode in enumerate(["a", "a", None, "b"])]
    found = agree(own, taught)
    assert found.value == pytest.approx(1 / 3)
    assert agree(own, []).value is None
