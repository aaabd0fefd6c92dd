"""The toy problems meet their numbers, with the real core and a small network."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats
import torch

from diffusion_policy.commands.toy import Toy
from diffusion_policy.diffusion.likelihood import variational_bound
from diffusion_policy.diffusion.samplers import SAMPLERS
from diffusion_policy.training import toy, toy_students


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def ring() -> toy.Fitted:
    return toy.fit(toy.PROBLEMS["ring"])


@pytest.fixture(scope="module")
def mixture() -> toy.Fitted:
    return toy.fit(toy.PROBLEMS["mixture"])


@pytest.fixture(scope="module")
def two_class() -> toy.Fitted:
    return toy.fit(toy.PROBLEMS["two-class"])


def test_the_data_is_what_it_says() -> None:
    radius = toy.draw_ring(20_000, generator()).x.norm(dim=1)
    assert radius.mean() == pytest.approx(2.0, abs=0.002)
    assert radius.std() == pytest.approx(0.05, abs=0.002)
    assert (toy.draw_mixture(20_000, generator()).x < 0).double().mean() == pytest.approx(0.3, abs=0.01)
    points = toy.draw_two_class(20_000, generator())
    assert ((points.x[:, 0] > 0) == points.label.bool()).double().mean() == pytest.approx(0.8, abs=0.01)
    moons = toy.draw_moons(20_000, generator()).x
    assert moons.mean(dim=0).abs().max() < 0.05


def test_the_energy_distance_is_that_of_scipy() -> None:
    x, y = torch.randn(2, 3000, generator=generator(), dtype=torch.float64)
    y = 0.5 + 2 * y
    expected = scipy.stats.energy_distance(x.numpy(), y.numpy()) ** 2
    assert toy.energy_distance(x[:, None], y[:, None]) == pytest.approx(expected, abs=0.003)
    assert abs(toy.energy_distance(x[:1500, None], x[1500:, None])) < 0.005


@pytest.mark.slow
def test_the_ring_is_learned(ring: toy.Fitted) -> None:
    assert sum(ring.losses[:50]) / 50 == pytest.approx(0.55, abs=0.1)
    assert sum(ring.losses[-500:]) / 500 == pytest.approx(0.28, abs=0.03)
    found = toy.measure_ring(ring)
    assert found["radius_mean"] == pytest.approx(2.0, abs=0.02)
    assert found["share_within_0.3"] >= 0.99
    assert all(0.7 / 8 < share < 1.3 / 8 for share in found["sector_shares"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_one_network_draws_the_ring_under_every_sampler(name: str, ring: toy.Fitted) -> None:
    data = toy.draw_ring(1000, generator()).x
    points = toy.sample(ring, name, 50, 1000)
    assert toy.energy_distance(points, data) < 0.05
    assert toy.energy_distance(toy.sample(ring, name, 1, 1000), data) > 0.2  # one step gives the mean


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch.func.jvp
@pytest.mark.parametrize("name", toy_students.LESSONS)
def test_each_student_of_a_toy_is_made_for_few_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_students, "STUDENT_STEPS", 3)
    problem = toy.PROBLEMS["two-class"]
    teacher = toy.fit(problem, training_steps=3)
    students = dict(toy_students.fit_students(problem, teacher, name))
    assert list(students) == [4, 2, 1]
    for steps, student in students.items():
        assert toy.sample(student, "ddim", steps, 20).shape == (20, 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch.func.jvp
@pytest.mark.parametrize("name", toy_students.LESSONS)
def test_a_student_of_a_toy_is_nearer_to_the_data_in_one_step_than_its_teacher(
    name: str, two_class: toy.Fitted
) -> None:
    data = toy.draw_two_class(2000, generator()).x
    (*_, (steps, student)) = toy_students.fit_students(toy.PROBLEMS["two-class"], two_class, name)
    assert steps == 1
    taught, own = (toy.energy_distance(toy.sample(one, "ddim", 1, 2000), data) for one in (two_class, student))
    assert own < taught / 2


@pytest.mark.slow
def test_both_weights_of_the_mixture_are_recovered(mixture: toy.Fitted) -> None:
    found = toy.measure_weights(mixture)
    assert found["weights"] == pytest.approx(toy.SHARES, abs=0.05)
    assert not found["collapsed"]


@pytest.mark.slow
def test_too_little_noise_loses_the_weights_of_the_mixture() -> None:
    schedule = toy.linear(40, 1e-4, 0.02)
    assert schedule.alpha[-1] ** 2 == pytest.approx(0.67, abs=0.01)
    fitted = toy.fit(toy.PROBLEMS["mixture"], schedule=schedule, training_steps=1000)
    assert toy.measure_weights(fitted)["collapsed"]
    assert not toy.measure_weights(toy.fit(toy.PROBLEMS["mixture"], training_steps=1000))["collapsed"]


@pytest.mark.slow
def test_guidance_brings_samples_into_the_asked_class(two_class: toy.Fitted) -> None:
    shares = list(toy.measure_guidance(two_class)["share_in_asked_class"].values())
    assert 0.75 <= shares[0] <= 0.90
    assert shares == sorted(shares)
    assert shares[2] >= 0.99


@pytest.mark.slow
def test_the_bound_lies_above_the_entropy_of_the_mixture(mixture: toy.Fitted) -> None:
    points = toy.draw_mixture(1000, generator())
    bound = toy.measure_bound(mixture, points)
    centers, shares = torch.tensor([-1.0, 1.0]), torch.tensor(toy.SHARES)
    entropy = -float((shares * torch.distributions.Normal(centers, 0.2).log_prob(points.x).exp()).sum(1).log().mean())
    assert bound["nats"] > entropy
    assert bound["nats"] == pytest.approx(bound["prior_nats"] + sum(bound["terms_nats"]), rel=1e-5)
    assert len(bound["terms_nats"]) == 40
    assert 0 <= bound["prior_nats"] < 0.01

    schedule = mixture.diffusion.schedule  # with 40 levels even the exact denoiser has a bound far above the entropy

    def exact(xt: torch.Tensor, level: int) -> torch.Tensor:
        alpha, sigma = schedule.alpha[level], schedule.sigma[level]
        variance = 0.2**2 * alpha**2 + sigma**2
        weights = torch.softmax(shares.log() - (xt - alpha * centers) ** 2 / (2 * variance), dim=1)
        return (weights * (centers + alpha * 0.2**2 / variance * (xt - alpha * centers))).sum(dim=1, keepdim=True)

    levels = list(reversed(range(len(schedule))))
    noise = torch.randn(len(levels), *points.x.shape, generator=torch.Generator().manual_seed(2))
    best = float(variational_bound(exact, points.x, schedule, levels, noise).nats.mean())
    assert best - 0.05 < bound["nats"] < best + 0.2


def test_the_same_seed_gives_the_same_network() -> None:
    a, b = (toy.fit(toy.PROBLEMS["moons"], training_steps=20) for _ in range(2))
    assert a.losses == b.losses
    assert torch.equal(toy.sample(a, "ddpm", 10, 50), toy.sample(b, "ddpm", 10, 50))


@pytest.mark.parametrize(
    "problem", ["moons", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ring", "two-class", "mixture"))]
)
def test_the_command_writes_numbers_and_a_picture(problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(toy.PROBLEMS[problem], training_steps=30, schedule=toy.linear(20))
    monkeypatch.setitem(toy.PROBLEMS, problem, short)
    monkeypatch.setattr(toy, "COUNT", 200)
    monkeypatch.setattr(toy, "STEPS", (1, 4))
    monkeypatch.setattr(toy, "SWEEP_STEPS", 10)
    results = Toy(problem, tmp_path / "toy", prediction="velocity").run()
    assert json.loads((tmp_path / "toy" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (tmp_path / "toy" / "toy.png").stat().st_size > 10_000
    assert results["samplers"].keys() == SAMPLERS.keys()
    assert all(list(cells) == ["1", "4", "20"] for cells in results["samplers"].values())
    if problem == "mixture":
        assert results["too_little_noise"]["doctor"]["status"] == "fail"
        assert {row["levels"] for row in results["sweep"]} == {5, 10, 15, 20, 30, 40}
