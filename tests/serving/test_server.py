"""A server and its clients in one process, over real connections; the planner is a few sums in NumPy."""

import asyncio
import contextlib
import http.client
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as open_connection

from diffusion_policy.control.chunking import Chunking, Guided
from diffusion_policy.control.planner import Steering
from diffusion_policy.control.single import SingleController
from diffusion_policy.serving.client import Refused, RemotePolicy, ServerLost, connect
from diffusion_policy.serving.protocol import ProtocolError, Served, pack, unpack
from diffusion_policy.serving.server import PolicyServer, ServerOptions

RNG = np.random.default_rng(0)
KEY = "a-key-of-many-characters"


class Running:
    """A server in a thread."""

    def __init__(self, planner: Any, served: Served, chunking: Any, options: ServerOptions) -> None:
        self.server = PolicyServer(planner, served, chunking, options)
        ready = threading.Event()

        async def run() -> None:
            self._stop, self._loop = asyncio.Event(), asyncio.get_running_loop()
            await self.server.run(self._stop, ready.set)

        self._thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        assert self.server.port is not None
        self.port = self.server.port
        self.url = f"ws://127.0.0.1:{self.port}"

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._stop.set)

    def end(self) -> None:
        self.stop()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@pytest.fixture
def start(arithmetic, served: Served) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def start(planner: Any = arithmetic, chunking: Any = None, served: Served = served, **options: Any) -> Running:
        running.append(Running(planner, served, chunking, ServerOptions(**{"port": 0, **options})))
        return running[-1]

    yield start
    arithmetic.may_go.set()
    for one in running:
        one.end()


class Robot:
    """A client that knows no more than the protocol: bytes in, bytes out."""

    def __init__(self, url: str, **headers: str) -> None:
        self._stack = contextlib.ExitStack()
        opening = open_connection(url, compression=None, additional_headers=headers, proxy=None)
        self.connection = self._stack.enter_context(opening)
        self.served = unpack(self.take())

    def take(self) -> Any:
        return self.connection.recv(timeout=20)

    def ask(self, **request: Any) -> Any:
        self.connection.send(pack(request))
        answer = self.take()
        return unpack(answer) if isinstance(answer, bytes) else answer

    def close(self) -> None:
        self._stack.close()


@contextlib.contextmanager
def robot(url: str, **headers: str) -> Iterator[Robot]:
    client = Robot(url, **headers)
    yield client
    client.close()


def observe() -> dict[str, np.ndarray]:
    return {"xy": RNG.normal(size=2).astype(np.float32), "speed": RNG.normal(size=1)}


# The protocol


def test_the_server_describes_the_policy_then_answers(start) -> None:
    with robot(start().url) as client:
        assert client.served["observation_shapes"] == {"xy": [2], "speed": [1]}
        assert client.served["action_shape"] == [2]
        answer = client.ask(**observe(), prompt="go left")
        assert answer["actions"].shape == (6, 2)
        assert answer["actions"].dtype == np.float64
        assert set(answer["server_timing"]) == {"infer_ms"}
        again = client.ask(**observe())
        assert again["server_timing"]["prev_total_ms"] >= answer["server_timing"]["infer_ms"] > 0


def test_a_session_plans_as_a_controller_does_here(start, arithmetic) -> None:
    """History, noise of each plan and reset are those of the local controller."""
    local = SingleController(arithmetic, 5)
    with robot(start().url) as client:
        for seed in (5, 6):
            local.reset(seed)
            for step in range(8):
                now = observe()
                local.act(now)
                told = {"reset": True, "seed": seed} if step == 0 else {}
                answer = client.ask(**now, **told, observe=bool(step % 3))
                if local.plan is None:
                    assert answer == {"observed": 1}
                else:
                    np.testing.assert_array_equal(answer["actions"], local.plan)


def test_several_steps_at_once_are_the_same_history(start) -> None:
    steps = [observe() for _ in range(3)]
    with robot(start().url) as one, robot(start().url) as other:
        for step in steps[:-1]:
            assert one.ask(**step, observe=True) == {"observed": 1}
        together = {key: np.stack([step[key] for step in steps]) for key in steps[0]}
        np.testing.assert_array_equal(one.ask(**steps[-1])["actions"], other.ask(**together)["actions"])
        assert other.ask(**together, observe=True) == {"observed": 3}


def test_seeds_and_samples(start) -> None:
    now = observe()
    with robot(start().url) as client:
        plans = [client.ask(**now, seed=seed)["actions"] for seed in (1, 2, 1)]
        np.testing.assert_array_equal(plans[0], plans[2])
        assert not np.array_equal(plans[0], plans[1])
        many = client.ask(**now, seed=1, samples=5)["actions"]
        assert many.shape == (5, 6, 2)
        assert client.ask(**now, samples=1)["actions"].shape == (1, 6, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xy": np.zeros(3)}, "xy must have the shape (2,), or (steps, ...); got (3,)"),
        ({"xy": np.zeros((0, 2))}, "xy must have the shape"),
        ({"xy": np.array([1, np.nan])}, "xy holds NaN or infinity"),
        ({"speed": "fast"}, "speed must be an array of numbers; got a str"),
        ({"speed": [1.0]}, "speed must be an array of numbers; got a list"),
        ({"xy": np.zeros((2, 2)), "speed": np.zeros((3, 1))}, "all observations need as many steps"),
        ({"xy": None}, "xy must be an array"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 1.5}, "seed must be a whole number from 0"),
        ({"samples": 0}, "samples must be a whole number from 1 to"),
        ({"samples": 1024 * 1024}, "samples must be a whole number from 1 to"),
        ({"observe": np.array([1, 0])}, "observe must be true or false"),
        ({"reset": "yes"}, "reset must be true or false"),
        ({"deadline_ms": 0}, "deadline_ms must be above 0"),
        ({"deadline_ms": "soon"}, "deadline_ms must be above 0"),
        ({"session": "other"}, "unknown session 'other': begin it with reset"),
        ({"session": ""}, "session must be a name"),
        ({"session": "x" * 101}, "session must be a name"),
        ({"consumed": 1}, "consumed counts steps of previous"),
        ({"previous": np.zeros((7, 2))}, "previous must be at most 6 actions"),
        ({"previous": np.zeros((3, 1))}, "previous must be at most 6 actions"),
        ({"previous": np.full((3, 2), np.inf)}, "previous holds NaN"),
        ({"previous": np.zeros((2, 2)), "consumed": 3}, "consumed is 3 of 2 previous actions"),
        ({"previous": np.zeros((6, 2)), "consumed": 6}, "action-horizon must be from 1"),
        ({"previous": np.zeros((3, 2)), "samples": 2}, "previous or samples, not both"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong_and_harms_nothing(start, change: dict, message: str) -> None:
    now = observe()
    with robot(start().url) as client, robot(start().url) as untouched:
        expected = [untouched.ask(**now)["actions"], untouched.ask(**now)["actions"]]
        found = [client.ask(**now)["actions"]]
        answer = client.ask(**(now | change))
        assert answer.startswith("invalid: ")
        assert message in answer
        assert "Traceback" not in answer
        found.append(client.ask(**now)["actions"])
        np.testing.assert_array_equal(found, expected)


def test_a_missing_observation_is_named(start) -> None:
    with robot(start().url) as client:
        answer = client.ask(position=np.zeros(2), speed=np.zeros(1))
        assert answer == "invalid: the policy observes xy; got position, speed"
        client.connection.send("hello")
        assert client.take() == "invalid: a request is a binary frame of msgpack"


def test_a_plan_that_fails_is_said_without_a_traceback(start) -> None:
    with robot(start().url) as client:
        assert client.ask(xy=np.full(2, 13.0), speed=np.zeros(1)) == "failed: thirteen"
        assert client.ask(**observe())["actions"].shape == (6, 2)


# Sessions


def test_a_named_session_goes_on_over_another_connection(start) -> None:
    steps = [observe() for _ in range(4)]
    server = start()
    with robot(server.url) as client:
        whole = [client.ask(**step)["actions"] for step in steps]
    with robot(server.url) as client:
        parts = [client.ask(**step, session="arm", reset=i == 0)["actions"] for i, step in enumerate(steps[:2])]
    with robot(server.url) as client:
        parts += [client.ask(**step, session="arm")["actions"] for step in steps[2:]]
    np.testing.assert_array_equal(parts, whole)


def test_sessions_are_forgotten_when_they_are_silent_and_those_in_use_are_kept(start) -> None:
    server = start(sessions=2, idle=0.3)
    with robot(server.url) as client:
        for name in ("a", "b"):
            client.ask(**observe(), session=name, reset=True)
        assert client.ask(**observe(), session="c", reset=True) == "busy: 2 sessions are in use already"
        assert client.ask(**observe(), session="a")["actions"].shape == (6, 2)
        time.sleep(0.4)
        assert "unknown session 'a'" in client.ask(**observe(), session="a")
        assert client.ask(**observe(), session="c", reset=True)["actions"].shape == (6, 2)


def test_a_request_that_got_no_plan_can_be_sent_again(start, arithmetic) -> None:
    steps = [observe() for _ in range(2)]
    server = start(max_batch=1)
    with robot(server.url) as client, robot(server.url) as other:
        expected = [client.ask(**step, seed=3 if i == 0 else None)["actions"] for i, step in enumerate(steps)]
        client.ask(**steps[0], seed=3)
        arithmetic.may_go.clear()
        with ThreadPoolExecutor(2) as threads:
            busy = threads.submit(other.ask, **observe())
            time.sleep(0.1)
            late = threads.submit(client.ask, **steps[1], deadline_ms=20)
            time.sleep(0.1)
            arithmetic.may_go.set()
            assert late.result().startswith("late: ")
            busy.result()
        np.testing.assert_array_equal(client.ask(**steps[1])["actions"], expected[1])


def test_a_request_whose_client_has_gone_is_not_planned_for_and_leaves_its_session_as_it_was(start, arithmetic) -> None:
    steps = [observe() for _ in range(2)]
    server = start(max_batch=1)
    with robot(server.url) as client:
        expected = [client.ask(**step, session="x", reset=i == 0)["actions"] for i, step in enumerate(steps)]
    arithmetic.calls.clear()
    with robot(server.url) as busy:
        client = Robot(server.url)
        assert np.array_equal(client.ask(**steps[0], session="y", reset=True)["actions"], expected[0])
        arithmetic.may_go.clear()
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(busy.ask, **observe())
            time.sleep(0.1)
            client.connection.send(pack({**steps[1], "session": "y"}))
            time.sleep(0.1)
            client.close()
            time.sleep(0.1)
            arithmetic.may_go.set()
            first.result()
        with robot(server.url) as again:
            np.testing.assert_array_equal(again.ask(**steps[1], session="y")["actions"], expected[1])
    assert len(arithmetic.calls) == 3


def test_a_session_holds_no_more_than_its_last_steps(start) -> None:
    server = start()
    with robot(server.url) as client:
        client.ask(xy=np.zeros((2000, 2)), speed=np.zeros((2000, 1)), session="x", reset=True, observe=True)
        history = server.server._sessions._named["x"]._history
        assert [rows.base is None and len(rows) == 2 for rows in history.values()] == [True, True]


def test_a_plan_that_is_not_finite_is_no_answer(start, arithmetic) -> None:
    plain = arithmetic.sample

    def sample(observations, noise, steering=None):
        plans = plain(observations, noise, steering)
        plans[observations["xy"][:, -1, 0] > 100] = np.inf
        return plans

    arithmetic.sample = sample
    with robot(start().url) as client:
        assert client.ask(xy=np.full(2, 200.0), speed=np.zeros(1)).startswith("failed: the policy planned NaN")
        assert client.ask(**observe())["actions"].shape == (6, 2)


def test_a_plan_follows_what_a_robot_says_that_it_executes(start) -> None:
    previous, now = RNG.normal(size=(4, 2)), observe()
    with robot(start().url) as client:
        plain = client.ask(**now, seed=1)["actions"]
        joined = client.ask(**now, seed=1, previous=previous, consumed=2)["actions"]
        np.testing.assert_array_equal(joined[:2], previous[:2])
        np.testing.assert_array_equal(joined[2:], plain[2:])
        np.testing.assert_array_equal(client.ask(**now, seed=1, previous=previous)["actions"], plain)
    guided = start(chunking=Chunking(Guided()))
    with robot(guided.url) as client:
        assert not np.array_equal(client.ask(**now, seed=1, previous=previous, consumed=2)["actions"][2:], plain[2:])


# Who may ask


def test_a_wrong_key_is_refused_before_anything_else(start, arithmetic) -> None:
    server = start(api_key=KEY)
    for headers in (
        {},
        {"Authorization": KEY},
        {"Authorization": f"Api-Key {KEY}x"},
        {"Authorization": f"Basic {KEY}"},
    ):
        with pytest.raises(InvalidStatus, match="401"):
            Robot(server.url, **headers)
        assert server.get("/metrics", **headers)[0] == 401
        assert server.get("/healthz", **headers) == (200, "OK\n")
    with pytest.raises(Refused, match="asks for a key"):
        connect(server.url, api_key="wrong")
    assert arithmetic.calls == []
    for scheme in ("Api-Key", "Bearer"):
        with robot(server.url, Authorization=f"{scheme} {KEY}") as client:
            assert client.ask(**observe())["actions"].shape == (6, 2)
    assert connect(server.url, api_key=KEY).served.steps == 6


def test_pages_of_a_browser_cannot_connect(start) -> None:
    with pytest.raises(InvalidStatus, match="403"):
        Robot(start().url, Origin="http://evil.example")


def test_more_clients_than_may_be_are_turned_away(start) -> None:
    server = start(connections=2)
    with robot(server.url), robot(server.url), pytest.raises(InvalidStatus, match="503"):
        Robot(server.url)
    time.sleep(0.2)
    Robot(server.url).close()


def test_a_frame_that_is_too_large_ends_its_own_connection_alone(start) -> None:
    server = start()
    with robot(server.url) as client, robot(server.url) as other:
        client.connection.send(b"\0" * 200_000)
        with pytest.raises(ConnectionClosed, match="1009"):
            client.take()
        assert other.ask(**observe())["actions"].shape == (6, 2)


def test_mutated_requests_are_answered_and_disturb_nobody(start) -> None:
    rng = random.Random(0)
    server = start()
    good = pack({**observe(), "session": "x", "reset": True, "previous": np.zeros((3, 2)), "consumed": 1})
    planning = pack({"observations": {"xy": np.zeros((1, 2, 2)), "speed": np.zeros((1, 2, 1))}, "noise": draw(1)})
    with robot(server.url) as other:
        now = observe()
        expected = other.ask(**now, seed=1)["actions"]
        client = Robot(server.url)
        for i in range(1000):
            frame = bytearray(rng.choice((good, planning)))
            for _ in range(rng.randint(1, 5)):
                frame[rng.randrange(len(frame))] = rng.randrange(256)
            if rng.random() < 0.2:
                del frame[rng.randrange(len(frame)) :]
            client.connection.send(bytes(frame))
            answer = client.take()
            assert isinstance(answer, bytes) or answer.partition(": ")[0] in ("invalid", "failed", "late"), answer
            if i % 100 == 0:
                np.testing.assert_array_equal(other.ask(**now, seed=1)["actions"], expected)
        client.close()


def test_mutated_handshakes_and_half_open_connections_do_no_harm(start) -> None:
    rng = random.Random(0)
    server = start()
    handshake = (
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    open_ones = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]  # that say nothing
    with robot(server.url) as other:
        for i in range(200):
            said = bytearray(handshake)
            for _ in range(rng.randint(1, 8)):
                said[rng.randrange(len(said))] = rng.randrange(256)
            with socket.create_connection(("127.0.0.1", server.port)) as one, contextlib.suppress(OSError):
                one.sendall(bytes(said))
                one.settimeout(0.02)
                one.recv(1000)
            if i % 50 == 0:
                assert other.ask(**observe())["actions"].shape == (6, 2)
    for one in open_ones:
        one.close()
    assert server.get("/readyz") == (200, "OK\n")


def test_a_client_that_does_not_read_holds_up_nobody(start) -> None:
    server = start()
    with robot(server.url) as slow, robot(server.url) as other:
        frame = pack({**observe(), "samples": 1000})
        slow.connection.recv_bufsize = 1024
        for _ in range(50):
            slow.connection.send(frame)
        started = time.perf_counter()
        assert other.ask(**observe())["actions"].shape == (6, 2)
        assert time.perf_counter() - started < 20


# What operators see


def test_metrics_count_what_was_answered(start) -> None:
    server = start()
    with robot(server.url) as client:
        for _ in range(3):
            client.ask(**observe())
        client.ask(xy=np.zeros(3), speed=np.zeros(1))
        client.ask(**observe(), session="x", reset=True, observe=True)
        status, text = server.get("/metrics")
    assert status == 200
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['diffusion_policy_requests_total{answer="ok"}'] == "3"
    assert lines['diffusion_policy_requests_total{answer="invalid"}'] == "1"
    assert lines['diffusion_policy_requests_total{answer="observed"}'] == "1"
    assert lines['diffusion_policy_batch_size_bucket{le="1"}'] == "3"
    assert lines["diffusion_policy_connections"] == "1"
    assert lines["diffusion_policy_sessions"] == "1"
    assert lines["diffusion_policy_calls"] == "0"
    assert lines["diffusion_policy_replicas"] == "1"
    assert 0 < float(lines['diffusion_policy_request_seconds{quantile="0.5"}']) < 1
    assert server.get("/nothing")[0] == 426


def test_a_server_that_stops_answers_what_has_come(start, arithmetic) -> None:
    server = start()
    client, idle = Robot(server.url), Robot(server.url)
    arithmetic.may_go.clear()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(client.ask, **observe())
        time.sleep(0.1)
        server.stop()
        time.sleep(0.1)
        assert server.get("/readyz") == (503, "stopping\n")
        assert idle.ask(**observe()) == "stopping: the server stops"
        arithmetic.may_go.set()
        assert asked.result()["actions"].shape == (6, 2)
    with pytest.raises(ConnectionClosed, match="1001"):
        client.take()


def test_a_server_that_is_told_to_stop_does_not_wait_for_ever(
    start, arithmetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion_policy.serving.server.DRAIN", 0.3)
    server = start(max_batch=1)
    clients = [Robot(server.url) for _ in range(3)]
    arithmetic.may_go.clear()
    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(client.ask, **observe()) for client in clients]
        time.sleep(0.2)
        server.stop()
        assert [one.result(timeout=5) for one in asked] == ["stopping: the server stops"] * 3
        arithmetic.may_go.set()


def test_a_policy_that_observes_an_option_cannot_be_served(arithmetic, served: Served) -> None:
    shapes = {"session": (1,)}
    with pytest.raises(ValueError, match="observes 'session', which is the name of an option"):
        PolicyServer(arithmetic, replace(served, observation_shapes=shapes))


# The client


def draw(rows: int, samples: int = 1) -> np.ndarray:
    return RNG.standard_normal((rows, samples, 1, 7, 2), np.float32)


def rows_of(rows: int) -> dict[str, np.ndarray]:
    return {"xy": RNG.normal(size=(rows, 2, 2)), "speed": RNG.normal(size=(rows, 2, 1)).astype(np.float32)}


def test_a_remote_policy_is_a_planner_like_the_one_that_is_served(start, arithmetic) -> None:
    remote = connect(start().url)
    assert isinstance(remote, RemotePolicy)
    for name in ("observation_horizon", "steps", "action_horizon", "observation_shapes", "action_shape", "noise_shape"):
        assert getattr(remote, name) == getattr(arithmetic, name)
    for rows, samples in ((1, 1), (3, 4)):
        observations, noise = rows_of(rows), draw(rows, samples)
        actions = RNG.normal(size=(rows, 6, 2))
        actions[:, 3:] = np.nan
        for steering in (
            None,
            Steering(actions, np.ones((rows, 6)), 2.0, 0.5),
            Steering(actions, np.ones((rows, 6)), None),
        ):
            found = remote.sample(observations | {"other": np.zeros(1)}, noise, steering)
            np.testing.assert_array_equal(found, arithmetic.sample(observations, noise, steering))
    local, far = SingleController(arithmetic, 3, delay_steps=2), remote.controller(3, delay_steps=2)
    for _ in range(10):
        now = observe()
        np.testing.assert_array_equal(local.act(now), far.act(now))
    remote.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": np.zeros((1, 1, 1, 7, 3), np.float32)}, "noise must be (B, N, 1, 7, 2)"),
        ({"noise": np.zeros((0, 1, 1, 7, 2), np.float32)}, "noise must be"),
        ({"noise": np.full((1, 1, 1, 7, 2), np.nan)}, "noise holds NaN"),
        ({"observations": {"xy": np.zeros((1, 2, 2))}}, "the policy observes xy, speed; got xy"),
        (
            {"observations": {"xy": np.zeros((1, 1, 2)), "speed": np.zeros((1, 2, 1))}},
            "xy must have the shape (1, 2, 2)",
        ),
        ({"observations": 3}, "observations must be a map"),
        ({"steering": 3}, "steering has actions, weights, strength, deviation"),
        ({"surprise": 3}, "got 'surprise'"),
        ({"noise": np.full((1, 1, 1, 7, 2), 1e300)}, "noise holds NaN or infinity"),
        ({"noise": np.zeros((5, 1000, 1, 7, 2), bool)}, "at most 4096 sequences are sampled for a request"),
    ],
)
def test_a_wrong_planning_request_is_refused(start, change: dict, message: str) -> None:
    request = {"observations": rows_of(1), "noise": draw(1)} | change
    with robot(start().url) as client:
        answer = client.ask(**request)
        assert answer.startswith("invalid: ")
        assert message in answer


def test_steering_that_the_policy_cannot_follow_is_refused(start, served: Served) -> None:
    actions, weights = np.zeros((1, 6, 2)), np.ones((1, 6))
    remote = connect(start(served=replace(served, guides=False, longest_prefix=0)).url)
    for steering, message in (
        (Steering(actions, weights, 2.0), "no gradients to guide by: serve with --backend eager"),
        (Steering(actions, weights, None), "has not learned to be given actions"),
        (Steering(actions[:, :3], weights, None), r"steering must be actions \(1, 6, 2\)"),
        (Steering(actions, weights, -1.0), "no gradients|strength must be above 0"),
    ):
        with pytest.raises(Refused, match=message):
            remote.sample(rows_of(1), draw(1), steering)


def test_a_server_that_was_lost_is_waited_for_and_the_result_is_the_same(start, arithmetic, served: Served) -> None:
    said: list[str] = []
    server = start()
    remote = connect(server.url, deadline=0.5, warn=said.append)
    observations, noise = rows_of(2), draw(2)
    expected = remote.sample(observations, noise)
    server.end()
    threading.Timer(1.0, lambda: start(port=server.port)).start()
    np.testing.assert_array_equal(remote.sample(observations, noise), expected)
    assert len(said) == 1
    assert f"no plan from {server.url}" in said[0]
    assert "trying again for 60 s" in said[0]


def test_patience_ends(start, arithmetic) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.warns(UserWarning, match="trying again"), pytest.raises(ServerLost, match=f"no plan from {url}"):
            connect(url, patience=0.2)
    server = start()
    remote = connect(server.url, deadline=0.2, patience=0.5)
    arithmetic.may_go.clear()
    with pytest.warns(UserWarning, match="its deadline passed"), pytest.raises(ServerLost):
        remote.sample(rows_of(1), draw(1))


def test_a_busy_server_is_asked_again_without_a_word(start, arithmetic) -> None:
    server = start(queued=1, max_batch=1)
    said: list[str] = []
    remotes = [connect(server.url, warn=said.append) for _ in range(6)]
    observations, noise = rows_of(1), draw(1)
    with ThreadPoolExecutor(6) as threads:
        plans = list(threads.map(lambda one: [one.sample(observations, noise) for _ in range(20)], remotes))
    np.testing.assert_array_equal(plans, np.broadcast_to(arithmetic.sample(observations, noise), np.shape(plans)))
    assert said == []


def test_a_request_that_the_server_would_not_take_is_not_sent(start, served: Served) -> None:
    remote = connect(start(served=replace(served, max_frame_bytes=2000)).url)
    with pytest.raises(Refused, match="takes requests of 2000 bytes; this one has"):
        remote.sample(rows_of(30), draw(30))
    assert remote.sample(rows_of(2), draw(2)).shape == (2, 1, 6, 2)


def test_another_policy_at_the_same_place_is_refused(start, served: Served) -> None:
    server = start()
    remote = connect(server.url)
    server.end()
    start(port=server.port, served=replace(served, weights_sha256="1" * 64))
    with pytest.warns(UserWarning, match="no plan"), pytest.raises(Refused, match="serves another policy now"):
        remote.sample(rows_of(1), draw(1))


@pytest.mark.parametrize("url", ["localhost:8000", "http://localhost:8000", "ws://", "ws://localhost:port"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="a server's address is ws://host:port"):
        connect(url, patience=0)


def test_another_kind_of_server_is_refused() -> None:
    from websockets.sync.server import serve

    for first, message in ((pack({"protocol": "theirs"}), "it speaks 'theirs'"), (b"\xc1", "must hold msgpack")):
        with serve(lambda connection, first=first: connection.send(first), "127.0.0.1", 0) as other:
            threading.Thread(target=other.serve_forever, daemon=True).start()
            with pytest.raises(ProtocolError, match=message):
                connect(f"ws://127.0.0.1:{other.socket.getsockname()[1]}")
            other.shutdown()


@contextlib.contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that does this with each connection, in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    one, _ = server.accept()
                    stack.callback(one.close)
                    threading.Thread(target=serve, args=(one,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"ws://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def test_the_deadline_is_that_of_connection_description_and_answer_together(start) -> None:
    """Whatever the server says comes 0.4 s later: each part in time, all of them not."""
    server = start()

    def delay(client: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", server.port)) as behind, contextlib.suppress(OSError):

            def send_on() -> None:
                with contextlib.suppress(OSError):
                    while part := client.recv(2**16):
                        behind.sendall(part)

            threading.Thread(target=send_on, daemon=True).start()
            while part := behind.recv(2**16):
                time.sleep(0.4)
                client.sendall(part)

    remote = connect(server.url, deadline=0.6, patience=0.0)
    with listening(delay) as url:
        remote.close()
        remote.url = url
        started = time.monotonic()
        with pytest.raises(ServerLost, match="its deadline passed"):
            remote.sample(rows_of(1), draw(1))
        assert 0.5 < time.monotonic() - started < 10


def test_a_server_that_reads_nothing_does_not_hold_up_a_client_beyond_its_deadline(start, served: Served) -> None:
    server = start(served=replace(served, max_frame_bytes=2**27))
    remote = connect(server.url, deadline=0.5, patience=0.0)
    remote._threads.link.connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    frame = b"x" * 2**26
    held = threading.Event()
    server._loop.call_soon_threadsafe(held.wait, 3)  # the server's event loop reads nothing meanwhile
    started = time.monotonic()
    with pytest.raises(ServerLost, match="its deadline passed"):
        remote._persist(lambda ends: remote._ask(frame, ends))
    assert 0.4 < time.monotonic() - started < 2.5
    held.set()


def test_the_connection_of_a_thread_ends_with_it(start) -> None:
    server = start()
    remote = connect(server.url)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: remote.sample(rows_of(1), draw(1)), range(20)))
        assert server.server.metrics.connections > 1
    ends = time.monotonic() + 10
    while server.server.metrics.connections > 1 and time.monotonic() < ends:
        time.sleep(0.01)
    assert server.server.metrics.connections == 1
    assert remote.sample(rows_of(1), draw(1)).shape == (1, 1, 6, 2)
