"""Whether a plan fits the time between two control steps, without waiting for one."""

import numpy as np
import pytest

from diffusion_policy.config import ConfigError
from diffusion_policy.control import latency
from diffusion_policy.control.latency import WARM_UPS, Latency, advise, allowed, check_latency, time_plans
from diffusion_policy.control.single import SingleController


class Planner:
    """Plans zeros; remembers what it was asked."""

    observation_horizon, steps, action_horizon = 2, 15, 8
    observation_shapes = {"x": (3,), "frame": (4, 2)}  # noqa: RUF012
    action_shape = (2,)
    noise_shape = (1, 16, 2)
    guides, longest_prefix = False, 0

    def __init__(self) -> None:
        self.asked: list[tuple[dict[str, tuple[int, ...]], tuple[int, ...]]] = []

    def sample(self, observations, noise, steering=None) -> np.ndarray:
        self.asked.append(({key: rows.shape for key, rows in observations.items()}, noise.shape))
        assert noise.dtype == np.float32
        assert noise.std() > 0.5
        return np.zeros((*noise.shape[:2], self.steps, 2))


@pytest.fixture
def taking(monkeypatch: pytest.MonkeyPatch):
    """Has every plan take so many milliseconds, with one of a hundred `slowest`."""

    def take(milliseconds: float, slowest: float | None = None) -> Planner:
        times = [milliseconds] * 98 + [milliseconds if slowest is None else slowest] * 2
        monkeypatch.setattr(latency, "time_plans", lambda *arguments, **options: times)
        return Planner()

    return take


def test_plans_are_timed_after_a_warm_up_for_as_many_rows_as_asked() -> None:
    planner = Planner()
    times = time_plans(planner, rows=3, plans=5)
    assert len(times) == 5
    assert all(time >= 0 for time in times)
    assert planner.asked == [({"x": (3, 2, 3), "frame": (3, 2, 4, 2)}, (3, 1, 1, 16, 2))] * (WARM_UPS + 5)


def test_a_plan_fits_where_99_of_100_are_ready_in_a_control_step(taking) -> None:
    found = check_latency(taking(80.0, slowest=99.0), control_rate=10)
    assert found == Latency(80.0, 80.0, 99.0, 100.0, 0, ())
    assert found.fits
    assert str(found) == "a plan takes 80.0 ms (p99 99.0 ms), which fits a control step of 100.0 ms"
    late = check_latency(taking(80.0, slowest=101.0), control_rate=10)
    assert not late.fits
    assert late.p50 == 80
    assert str(late).startswith("a plan takes 80.0 ms (p99 101.0 ms), longer than a control step of 100.0 ms: ")


@pytest.mark.parametrize(
    "milliseconds, delay, fits", [(100, 0, True), (100.1, 0, False), (100, 1, True), (300, 3, True), (300.1, 3, False)]
)
def test_a_plan_may_take_the_steps_of_its_delay(taking, milliseconds: float, delay: int, fits: bool) -> None:
    found = check_latency(taking(milliseconds), control_rate=10, delay_steps=delay)
    assert found.fits == fits
    assert (found.advice == ()) == fits
    assert allowed(100, delay) == 100 * max(1, delay)
    what = f"{delay} control steps of 100.0 ms" if delay else "a control step of 100.0 ms"
    assert what in str(found)


def test_what_would_make_it_fit_is_said_in_numbers(taking) -> None:
    found = check_latency(taking(250.0), control_rate=10, sampling_steps=16)
    assert found.advice == (
        "about 6 --sampling-steps instead of 16 would fit",  # 16 * 100 / 250
        "--delay-steps 3 lets the plan before it run on meanwhile",
        "another --backend, or a narrower network, may be faster (diffusion-policy benchmark)",
    )
    assert str(found).endswith("; ".join(found.advice))


def test_what_cannot_help_is_not_advised(taking) -> None:
    found = check_latency(taking(2000.0), control_rate=10, sampling_steps=16)  # 15 steps, 8 of them executed
    assert found.advice[0] == "a delay would need 20 steps of the plan, and 7 are left beside Ta"
    assert not any("--sampling-steps" in advice for advice in found.advice)  # not even one would fit
    assert not any("--sampling-steps" in advice for advice in check_latency(taking(250.0), 10).advice)  # it is unknown
    waiting = check_latency(taking(250.0), 10, action_horizon=13)
    assert waiting.advice[0] == "a delay would need 3 steps of the plan, and 2 are left beside Ta"
    late = Latency(250.0, 250.0, 250.0, 100.0, 2, ())
    assert advise(late, spare_steps=7)[0] == "--delay-steps 3 lets the plan before it run on meanwhile"
    assert advise(late, spare_steps=-1)[0].endswith("and 0 are left beside Ta")


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"the control rate must be above 0 \[1/s\]; got"):
        check_latency(Planner(), rate)


def test_a_controller_says_it_of_itself(taking) -> None:
    planner = taking(250.0)
    controller = SingleController(planner, action_horizon=13, delay_steps=2, sampling_steps=16)
    found = controller.latency(control_rate=10, plans=3)
    assert (found.delay_steps, found.fits) == (2, False)
    assert found.advice[0] == "about 12 --sampling-steps instead of 16 would fit"
    assert found.advice[1] == "a delay would need 3 steps of the plan, and 2 are left beside Ta"
    assert controller.latency(control_rate=8).fits
    assert planner.asked == []
    with pytest.raises(ConfigError, match="delay-steps must be from 0 to 2"):
        SingleController(planner, action_horizon=13, delay_steps=3)
