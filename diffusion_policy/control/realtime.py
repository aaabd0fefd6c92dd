"""A control loop that keeps time: observe and act at a fixed rate, while plans are made beside it.

    robot.observe() -> history -> planner, in its own thread -> joined to what runs -> limits -> robot.act(action)

The clock is absolute, so that one late step does not delay those after it. A plan's delay is counted in actions: those
that were consumed while it was made. Whatever ends the run, `robot.stop()` is called, and the log says what happened.
Knows planners and what a robot promises. Knows neither policy nor simulator.
"""

import concurrent.futures
import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from diffusion_policy.basics.images import as_observed, is_image
from diffusion_policy.config import ConfigError
from diffusion_policy.control.chunking import Chunking, Handover, Joined
from diffusion_policy.control.controller import require_horizons
from diffusion_policy.control.latency import time_plans
from diffusion_policy.control.limits import Limits
from diffusion_policy.control.planner import Planner, planning_rng
from diffusion_policy.control.run_log import LATE, PlanRecord, RunLog

T = TypeVar("T")

REMEMBERED = 10
"""Plans whose delays say how long the next one may take."""
AT_ONCE = 0.2
"""Share of a period for which a plan is waited for, rather than joined a step later."""
FIRST_PLAN = 120.0
"""Longest wait for the first plan of a run [s]."""


class Robot(Protocol):
    """What is controlled. Its methods are called from one thread, `stop` from any, also while another one hangs."""

    def observe(self) -> Mapping[str, np.ndarray] | None:
        """What is observed now, {key: (...)}; None ends the run."""
        ...

    def act(self, action: np.ndarray) -> None:
        """Take an action (A,), and return at once."""
        ...

    def stop(self) -> None:
        """Come to rest."""
        ...


class Fault(Exception):
    """The run must end; the message says why."""


class Stopped(Exception):
    """The run was told to end."""


class RealTimeRunner:
    """Steers one robot at a fixed rate."""

    def __init__(
        self,
        planner: Planner,
        rate: float,
        *,
        chunking: Chunking | None = None,
        action_horizon: int | None = None,
        delay_steps: int | None = None,
        limits: Limits | None = None,
        watchdog: float = 1.0,
        dry_run: bool = False,
        seed: int = 0,
    ) -> None:
        """`rate`: steps a second; `delay_steps`: steps for which plans are made to be late, by default as many as the
        last ten took; 0: each plan is waited for; `watchdog`: longest time [s] for which the robot may not answer, or
        be without a plan; `dry_run`: all but `robot.act`; `seed`: of the planning noise; the others as `Controller` has
        them. Raises ConfigError for what cannot work, and for plans that take longer than they last."""
        if not 0 < rate < math.inf:
            raise ConfigError(f"the rate must be above 0 steps a second; got {rate}")
        if not watchdog > 0:
            raise ConfigError(f"the watchdog must be above 0 seconds; got {watchdog}")
        self.planner, self.chunking, self.seed = planner, chunking or Chunking(), seed
        self.period, self.watchdog, self.dry_run = 1 / rate, watchdog, dry_run
        self.horizon = planner.action_horizon if action_horizon is None else action_horizon
        require_horizons(planner.steps, self.horizon, delay_steps or 0)
        self.chunking.require(planner, delay_steps or 0)
        self.bounds = (limits or Limits()).resolve(int(np.prod(planner.action_shape)), self.period)
        self.delay_steps = delay_steps
        # one plan is made at a time, and the next is asked for once this one is followed
        self.longest = min(planner.steps - self.horizon, planner.steps // 2)
        steer = getattr(self.chunking.steer, "longest", None)
        if steer is not None and self.chunking.roll is None:
            self.longest = min(self.longest, steer(planner))
        self.remedy = (
            f"plans can bridge {self.longest}: fewer --sampling-steps, a faster --backend, a lower --hz, or a smaller "
            "--action-horizon"
        )
        if delay_steps is not None and delay_steps > self.longest:
            raise ConfigError(
                f"delay-steps must be at most {self.longest} while plans are made one at a time; got {delay_steps}"
            )
        self.log = RunLog(self.period)
        self.first_delay = self._measure_delay()

    @property
    def patience(self) -> float:
        """For how long a plan is waited for, rather than joined a step later [s]."""
        return min(AT_ONCE * self.period, LATE / 2)

    def _measure_delay(self) -> int:
        """The delay to begin with: of some plans before the start, the first, compiling ones left out."""
        delay = min(1, self.longest) if self.delay_steps is None else self.delay_steps
        options = {"delay_steps": delay, "action_horizon": self.horizon}
        took = float(np.median(time_plans(self.planner, 1, 5, self.chunking, **options))) / 1000
        if took <= self.patience:
            return 0
        delay = math.ceil(took / self.period)
        if delay > self.longest:
            raise ConfigError(
                f"a plan takes {1000 * took:.0f} ms, {delay} steps of {1000 * self.period:.0f} ms; {self.remedy}"
            )
        return delay

    def run(self, robot: Robot, steps: int | None = None, stop: threading.Event | None = None) -> RunLog:
        """Control until so many steps are done, the robot observes None, `stop` is set, or a fault; returns the log,
        which is also `self.log`. It never raises for what robot and planner do; KeyboardInterrupt, once the robot is
        stopped."""
        self.log = log = RunLog(self.period)
        if self.delay_steps is not None and self.first_delay > max(1, self.delay_steps):
            log.warn(f"plans take {self.first_delay} steps here, more than the {self.delay_steps} of --delay-steps")
        run = _Run(self, robot, log, stop or threading.Event())
        try:
            log.ended = run.loop(steps)
        except Stopped:
            log.ended = "stopped"
        except Fault as fault:
            log.ended, log.failed = str(fault), True
        except BaseException as error:
            log.ended, log.failed = f"interrupted by {type(error).__name__}", True
            raise
        finally:
            run.halt()
        return log


class _Run:
    """One run of a runner."""

    def __init__(self, runner: RealTimeRunner, robot: Robot, log: RunLog, stop: threading.Event) -> None:
        self.r, self.robot, self.log, self.stop = runner, robot, log, stop
        self.hands, self.brain = _Worker("robot"), _Worker("planner")
        self.history: dict[str, np.ndarray] = {}
        self.queue = np.full((runner.planner.steps, *runner.planner.action_shape), np.nan)
        self.position = 0  # of the next action in the queue
        self.consumed = 0  # actions since the first
        self.made = 0
        self.waiting: _Asked | None = None
        self.delays: deque[int] = deque(maxlen=REMEMBERED)
        self.before: np.ndarray | None = None
        self.fed = 0.0  # when there was an action last
        self.following, self.follow_from = 0, 0  # which plan, and from which of its steps on
        self.halted = threading.Event()
        self.under_way: Future[Any] | None = None  # the last call to the robot

    def loop(self, steps: int | None) -> str:
        """Until it ends; says why. Raises Fault."""
        if not self._look():
            return "the robot's episode has ended"
        self._ask(0)
        if not self._take(FIRST_PLAN):
            raise Fault(f"the first plan was not ready for {FIRST_PLAN:g} s")
        start = self.fed = time.perf_counter()
        tick = done = 0
        while steps is None or done < steps:
            if done:
                if self.stop.wait(max(0.0, start + tick * self.r.period - time.perf_counter())):
                    raise Stopped
                behind = int((time.perf_counter() - start) / self.r.period) - tick
                if behind > 0:  # those are left out
                    self.log.missed += behind
                    tick += behind
                if not self._look():
                    return "the robot's episode has ended"
            if self.stop.is_set():
                raise Stopped
            self._follow_plans()
            self._act(start, tick)
            tick, done = tick + 1, done + 1
        return f"{steps} steps are done"

    def _look(self) -> bool:
        """Observe; False where the episode has ended."""
        observation = self._call(self.robot.observe, "observe")
        if observation is None:
            return False
        if not isinstance(observation, Mapping):
            raise Fault(f"the robot's observe() must give {{key: numbers}} or None; got {type(observation).__name__}")
        for key, shape in self.r.planner.observation_shapes.items():
            try:
                now = as_observed(observation[key], key, shape)
            except Exception:  # whatever the user's values are
                now = None
            if now is None or now.size != math.prod(shape):
                found = f"{observation.get(key)!r:.60}" if now is None else f"shape {now.shape}"
                raise Fault(f"the robot's observe() must give {key} of shape {shape}; got {found}")
            if not np.isfinite(now).all():
                raise Fault(f"the robot observed NaN or infinity in {key}")
            now = now.reshape(shape)
            rows = self.history.get(key)
            if rows is None:
                rows = np.stack([now] * self.r.planner.observation_horizon)
            self.history[key] = np.concatenate([rows[1:], now[None]])
        return True

    def _follow_plans(self) -> None:
        """Take a plan that is ready; ask for the next one once Ta actions of this one are consumed."""
        if self.waiting is not None:
            self._take(0.0)
        if self.waiting is None and self.position >= self.r.horizon:
            delay = self._expect()
            self._ask(delay)
            if delay == 0:
                told = self.r.delay_steps == 0
                if not self._take(self.r.watchdog if told else self.r.patience) and told:
                    raise Fault(f"no plan was ready for {self.r.watchdog:g} s")

    def _expect(self) -> int:
        """The delay of the next plan [steps]."""
        if self.r.delay_steps is not None:
            return self.r.delay_steps
        delay = max(self.delays, default=self.r.first_delay)
        if delay > self.r.longest:
            self.log.warn(f"planning takes {delay} steps; {self.r.remedy}")
        return min(delay, self.r.longest)

    def _ask(self, delay: int) -> None:
        """Have a plan made from what is observed now."""
        planner, chunking = self.r.planner, self.r.chunking
        executing = np.full_like(self.queue, np.nan)
        left = self.queue[self.position :]
        executing[: len(left)] = left
        handover = Handover(executing[None], delay, self.r.horizon, np.array([self.made]))
        delay = min(delay, int(handover.known.sum()))  # fewer where the plan before was late itself
        before = self.before
        for step in range(delay):  # as they will be executed
            before = executing[step] = self.r.bounds.apply(executing[step], before)
        handover = handover._replace(delay_steps=delay)
        observations = {key: rows[None] for key, rows in self.history.items()}
        shape = (1, chunking.samples, *planner.noise_shape)
        noise = planning_rng(self.r.seed, 0, self.made).standard_normal(shape, np.float32)

        def plan() -> tuple[Joined, float]:
            began = time.perf_counter()
            joined = chunking.plan(planner, observations, noise, handover)
            return joined, time.perf_counter() - began

        self.waiting = _Asked(self.brain.submit(plan), self.consumed, delay)
        self.made += 1

    def _take(self, patience: float) -> bool:
        """Follow the plan that was asked for, if it is ready within so many seconds; False if it is not. Raises Fault
        where planning failed, and Stopped."""
        asked = self.waiting
        assert asked is not None
        if not self._ready(asked.future, patience):
            if self.stop.is_set():
                raise Stopped
            return False
        try:
            joined, seconds = asked.future.result()
        except BaseException as error:
            raise Fault(f"planning failed: {type(error).__name__}: {error}") from error
        self.waiting = None
        delay = self.consumed - asked.consumed
        if self.log.plans:  # the first is waited for
            self.delays.append(delay)
        self.queue, self.position, self.follow_from = joined.executed[0], delay, asked.delay
        self.log.plans.append(PlanRecord(asked.consumed, self.consumed, asked.delay, seconds, joined.plans[0]))
        return True

    def _act(self, start: float, tick: int) -> None:
        """Hand the next action to the robot."""
        now = time.perf_counter()
        if self.position >= len(self.queue) or np.isnan(self.queue[self.position]).any():
            self.log.starved += 1
            self.log.warn("the plan ended before the next one was ready; the robot got no action meanwhile")
            if now - self.fed > self.r.watchdog:
                raise Fault(f"no plan was ready for {self.r.watchdog:g} s")
            return
        planned = self.queue[self.position]
        action = self.r.bounds.apply(planned, self.before)
        self.log.limited += bool((action != planned).any())
        due = start + tick * self.r.period
        if self.position >= self.follow_from:  # until then it is the plan before that goes on
            self.following = len(self.log.plans) - 1
        if not self.r.dry_run:
            self._call(lambda: None if self.halted.is_set() else self.robot.act(action.copy()), "act")
        self.log.times.append(now - start)
        self.log.lateness.append(now - due)
        for key, rows in self.history.items():
            if not is_image(rows.shape[1:]):  # a long run would fill the memory
                self.log.observations.setdefault(key, []).append(rows[-1])
        self.log.actions.append(action)
        self.log.plan_of.append(self.following)
        if self.log.lateness[-1] > LATE:
            self.log.warn("some actions were over 10 ms late")
        self.before, self.fed = action, now
        self.position += 1
        self.consumed += 1

    def _call(self, function: Callable[[], T], what: str) -> T:
        """One call to the robot. Raises Fault where it raises, or does not return in time."""
        future = self.under_way = self.hands.submit(function)
        if not self._ready(future, self.r.watchdog):
            if self.stop.is_set():
                raise Stopped
            raise Fault(f"the robot's {what}() has not returned for {self.r.watchdog:g} s")
        try:
            return future.result()
        except BaseException as error:
            raise Fault(f"the robot's {what}() raised {type(error).__name__}: {error}") from error

    def _ready(self, future: Future[Any], patience: float) -> bool:
        """Whether it is done within so many seconds; a stop is obeyed within a period."""
        deadline = time.perf_counter() + patience
        while not future.done():
            left = deadline - time.perf_counter()
            if left <= 0 or (self.stop.is_set() and patience > 0):
                return future.done()
            concurrent.futures.wait([future], timeout=min(left, self.r.period / 2))
        return True

    def halt(self) -> None:
        """Stop the robot, whatever its other methods do, and wait for that at most as long as the watchdog has it. An
        action that is under way is given a period; where it ends later, the robot is stopped once more."""
        self.halted.set()
        last = _Worker("stop")
        if self.under_way is not None:
            _wait(self.under_way, self.r.period / 2)
        late = self.under_way is not None and not self.under_way.done()
        future = last.submit(self.robot.stop)
        if late and self.under_way is not None:
            self.under_way.add_done_callback(lambda _: self.robot.stop())
        done = _wait(future, self.r.watchdog)
        error = future.exception() if done else None
        if not done or error is not None:
            why = f"raised {type(error).__name__}: {error}" if done else f"has not returned for {self.r.watchdog:g} s"
            self.log.ended, self.log.failed = f"{self.log.ended}; the robot's stop() {why}".lstrip("; "), True
        for worker in (self.hands, self.brain, last):
            worker.close()


def _wait(future: "Future[Any]", seconds: float) -> bool:
    """Whether it is done within so many seconds, also where Ctrl-C comes again meanwhile."""
    with contextlib.suppress(KeyboardInterrupt):
        concurrent.futures.wait([future], timeout=seconds)
    return future.done()


class _Asked(NamedTuple):
    """A plan that is being made."""

    future: Future[tuple[Joined, float]]
    consumed: int
    """Actions consumed before."""
    delay: int


class _Worker:
    """A thread that calls functions one after another. It does not keep the program from ending, even where one
    hangs."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, function: Callable[[], T]) -> "Future[T]":
        """Have it called."""
        future: Future[T] = Future()
        self._calls.put((future, function))
        return future

    def close(self) -> None:
        """End the thread once its calls are done."""
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
