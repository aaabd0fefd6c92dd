"""A policy server as a process of its own, and the commands that let it plan."""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffusion_policy as dp
from diffusion_policy.checkpoints import checkpoint
from diffusion_policy.cli import main, parse
from diffusion_policy.commands.capacity import Call, count_servers, read_rate
from diffusion_policy.commands.episodes import make_group_planner, sharing_cores
from diffusion_policy.commands.serve import choose, choose_key, choose_tls
from diffusion_policy.config import SampleConfig
from diffusion_policy.serving.client import Refused

SAMPLING = ("--sampling-steps", "3")
TIMES = ("planning_latency_ms", "checkpoint")
"""What differs between two evaluations that are the same."""


class Process:
    """`diffusion-policy serve`, once it listens."""

    def __init__(self, policy: Path, *options: str, **environment: str) -> None:
        command = [sys.executable, "-m", "diffusion_policy.cli", "serve", "--checkpoint", str(policy), *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
        )
        self.said = ""
        assert self.process.stdout is not None
        for line in iter(self.process.stdout.readline, ""):
            self.said += line
            found = re.search(r"serving at (wss?://(.*):(\d+));", line)
            if found:
                self.url, self.host, self.port = found[1], found[2], int(found[3])
                return
        raise AssertionError(f"ended with {self.process.wait()}: {self.said}")

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            self.said += stdout.read()
        return self.process.wait(20)


@pytest.fixture
def serve() -> Iterator[Callable[..., Process]]:
    running: list[Process] = []

    def serve(policy: Path, *options: str, **environment: str) -> Process:
        running.append(Process(policy, *options, "--device", "cpu", **environment))
        return running[-1]

    yield serve
    for one in running:
        if not one.process.stdout.closed:  # pyright: ignore[reportOptionalMemberAccess]
            one.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Process]:
    """One that plans as `evaluate` does, for all tests that only ask it."""
    process = Process(run, *SAMPLING, "--port", "0", "--backend", "eager", "--device", "cpu", "--max-frame-mb", "2")
    yield process
    assert process.end() == 0


@pytest.fixture(scope="module")
def evaluate(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """results.json of an evaluation, but for the times."""

    def evaluate(*options: str) -> dict[str, Any]:
        output = tmp_path_factory.mktemp("evaluations") / "one"
        command = ["evaluate", "--checkpoint", str(run), "--output", str(output), "--episodes", "6", "--videos", "0"]
        assert main([*command, *SAMPLING, "--device", "cpu", "--workers", "1", *options]) == 0
        results = json.loads((output / "results.json").read_text())
        return {name: value for name, value in results.items() if name not in TIMES}

    return evaluate


@pytest.fixture(scope="module")
def local(evaluate: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return evaluate()


@pytest.mark.usefixtures("blank_pictures")
def test_an_evaluation_by_a_server_is_that_of_here_to_the_bit(server, evaluate, local) -> None:
    assert evaluate("--server", server.url) == local


@pytest.mark.usefixtures("blank_pictures")
def test_a_server_killed_in_the_middle_changes_nothing(
    run: Path, serve, evaluate, local, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*SAMPLING, "--backend", "eager")
    first = serve(run, *options, "--port", "0")
    killer = subprocess.Popen(
        [sys.executable, "-c", f"import os,time; time.sleep(1.5); os.kill({first.process.pid}, 9)"]
    )
    again = subprocess.Popen(
        [sys.executable, "-c", "import sys,time,runpy; time.sleep(3); runpy.run_module('diffusion_policy.cli', "
         "run_name='__main__')", "serve", "--checkpoint", str(run), *options, "--port", str(first.port),
         "--device", "cpu"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        found = evaluate("--server", first.url, "--server-deadline", "2", "--server-patience", "90", "--seed", "100000")
    finally:
        killer.wait()
        again.kill()
        again.wait()
    assert found == local
    assert "no plan from ws://" in capsys.readouterr().err


def test_a_server_plans_to_the_bit_as_rollouts_do_at_the_sizes_that_users_have(serve, tmp_path: Path) -> None:
    """Last digits depend on threads and rows, more so in wider networks."""
    dp.collect(tmp_path / "d.zarr", env_kwargs={"rows": 1}, episodes=3, workers=1)
    dp.train(tmp_path / "d.zarr", tmp_path / "r", steps=1, widths=(32, 64, 128), device="cpu")
    process = serve(tmp_path / "r", "--port", "0", "--backend", "eager", *SAMPLING)
    remote, policy = dp.connect(process.url), dp.load(tmp_path / "r", device="cpu").policy
    local = make_group_planner(policy, SampleConfig(sampling_steps=3), "eager", 25)
    rng = np.random.default_rng(0)
    for rows in (1, 2, 13):
        observations = {key: rng.uniform(0, 1, (rows, 2, *shape)) for key, shape in remote.observation_shapes.items()}
        noise = rng.standard_normal((rows, 1, *remote.noise_shape), np.float32)
        with sharing_cores(policy):
            np.testing.assert_array_equal(remote.sample(observations, noise), local.sample(observations, noise))


def test_rollouts_and_robots_ask_a_server(
    server, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["rollout", "--checkpoint", str(run), "--episodes", "2", "--workers", "1", "--device", "cpu", *SAMPLING]
    said = []
    for options in (["--server", server.url], ["--backend", "eager"]):
        assert main([*common, *options]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    command = [
        "run-robot",
        "diffusion_policy.envs.simulated_robot:SimulatedRobot",
        "--server",
        server.url,
        "--hz",
        "10",
    ]
    robot = ["--steps", "5", "--output", str(tmp_path / "robot"), "--robot-kwargs", '{"env_kwargs": {"rows": 1}}']
    assert main([*command, *robot, "--watchdog", "20"]) == 0
    assert json.loads((tmp_path / "robot" / "results.json").read_text())["server"] == server.url


def test_python_asks_a_server(server, run: Path) -> None:
    far = dp.connect(server.url).controller(seed=4, delay_steps=2, chunking="rtc")
    near = dp.load(run, device="cpu").controller(seed=4, delay_steps=2, chunking="rtc", sampling_steps=3)
    with sharing_cores(dp.load(run, device="cpu").policy):
        for i in range(12):
            observation = {key: np.array([0.5, 0.01 * i]) for key in ("desired_xy", "actual_xy")}
            np.testing.assert_array_equal(far.act(observation), near.act(observation))
    control_rate = checkpoint.load(run).dataset.control_rate
    assert control_rate == dp.connect(server.url).served.control_rate
    assert control_rate
    with pytest.raises(ValueError, match="the server samples as it was told; eta is an option of serve"):
        dp.connect(server.url).controller(eta=0.5)


def test_without_ray_serve_its_engine_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["serve", "--checkpoint", str(run), "--port", "0", "--backend", "eager", "--device", "cpu", *SAMPLING]
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    monkeypatch.delattr("ray.serve", raising=False)  # where another test has imported it
    monkeypatch.setattr("diffusion_policy.commands.serve.serve", None)  # it must not come to that
    monkeypatch.delitem(sys.modules, "diffusion_policy.commands.replicas", raising=False)
    monkeypatch.delitem(sys.modules, "diffusion_policy.serving.replicas", raising=False)
    assert main([*command, "--engine", "ray"]) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "error: --engine ray needs Ray Serve: pip install 'diffusion-policy-toolkit[ray]'" in said


@pytest.mark.parametrize(
    "options", [["--backend", "onnx"], ["--precision", "bf16"], ["--device", "cpu"]], ids=lambda options: options[0]
)
def test_what_only_the_server_decides_is_refused_beside_it(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {
        "run-robot": ["run-robot", "m:R", "--hz", "5", "--output", "o"],
        "evaluate": ["evaluate", "--checkpoint", "c", "--output", "o"],
        "rollout": ["rollout", "--checkpoint", "c"],
    }
    for verb, command in asked.items():
        if verb == "run-robot" or options[0] == "--backend":  # evaluate and rollout draw with the checkpoint, too
            assert main([*command, "--server", "ws://b:1", *options]) == 2
            said = f"error: {options[0]} is an option of serve where --server plans; got {options[1]}"
            assert said in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sampling-steps", "4"], r"samples otherwise: --sampling-steps 3; say the same here"),
        (["--server", "localhost:1"], r"a server's address is ws://host:port"),
        (["--server-deadline", "0"], "server-deadline must be above 0"),
        (["--server-patience", "-1"], "server-patience must be at least 0"),
        (["--api-key-file", "missing"], "missing"),
    ],
)
def test_what_a_server_cannot_do_is_said(
    server, run: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--checkpoint", str(run), "--output", str(tmp_path / "e"), "--server", server.url, *SAMPLING]
    assert main([*command, *options]) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_run_robot_takes_a_checkpoint_or_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--checkpoint", "a", "--server", "ws://b:1"]):
        assert main(["run-robot", "m:R", "--hz", "5", "--output", "o", *options]) == 2
        assert "run-robot takes --checkpoint or --server, one of them" in capsys.readouterr().err


@pytest.mark.usefixtures("blank_pictures")
def test_other_weights_are_refused(
    server, demonstrations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dp.train(demonstrations, tmp_path / "other", steps=1, widths=(8,), level_dim=8, noise_levels=10, device="cpu")
    command = ["rollout", "--checkpoint", str(tmp_path / "other"), "--server", server.url, *SAMPLING]
    assert main([*command, "--device", "cpu"]) == 2
    assert "serves other weights" in capsys.readouterr().err


def test_keys_certificates_and_limits(run: Path, serve, tmp_path: Path) -> None:
    """All options with other values than their defaults; the key's file can be read by others, which is said."""
    key, certificate = tmp_path / "key", tmp_path / "certificate.pem"
    key.write_text("long-enough-a-key\n")
    key.chmod(0o644)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", str(tmp_path / "tls.key"), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    process = serve(
        run, "--port", "0", "--host", "0.0.0.0", "--api-key-file", str(key), "--tls-certificate", str(certificate),
        "--tls-key", str(tmp_path / "tls.key"), "--max-batch", "4", "--max-wait-ms", "2", "--max-queue", "7",
        "--max-connections", "3", "--max-sessions", "2", "--session-idle", "5", "--max-frame-mb", "0.5", "--chunking",
        "rtc", "--backend", "auto", "--precision", "bf16", "--sampling-steps", "2", "--insecure",
    )  # fmt: skip
    assert f"others can read {key}: chmod 600" in process.said.replace("\n", " ")
    assert process.url.startswith("wss://")
    url, trusted = f"wss://127.0.0.1:{process.port}", ssl.create_default_context(cafile=certificate)
    with pytest.raises(Refused, match="is not trusted"):
        dp.connect(url, api_key="long-enough-a-key")
    with pytest.raises(Refused, match="asks for a key"):
        dp.connect(url, tls=trusted)
    remote = dp.connect(url, api_key="long-enough-a-key", tls=trusted)
    assert remote.served.max_frame_bytes == 2**19
    assert remote.served.chunking.chunking == "rtc"
    assert remote.served.sampling.sampling_steps == 2
    remote.close()
    assert process.end(signal.SIGINT) == 0
    assert "stopped" in process.said
    assert "Traceback" not in process.said


def refuse(run: Path, *options: str, **environment: str) -> str:
    """What `serve` says when it does not."""
    command = [sys.executable, "-m", "diffusion_policy.cli", "serve", "--checkpoint", str(run), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr.replace("\n", " ")


def test_what_cannot_be_served_is_said_at_the_start(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = refuse(run, "--port", port, "--backend", "eager", "--device", "cpu", *SAMPLING)
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in said
    for options, message in (
        (["--host", "0.0.0.0"], "on 0.0.0.0 anyone who reaches this machine could ask"),
        (["--api-key-file", str(tmp_path / "empty")], "holds no key"),
        (["--api-key-file", str(tmp_path / "missing")], "missing"),
        (["--port", "70000"], "port must be from 0 to 65535"),
        (["--max-batch", "0"], "max-batch must be at least 1"),
        (["--session-idle", "0"], "session-idle must be above 0"),
        (["--tls-key", "a"], "belong together"),
        (["--tls-key", str(tmp_path / "empty"), "--tls-certificate", str(tmp_path / "empty")], "hold no certificate"),
        (["--roll-forward"], "roll-forward asks an environment"),
        (["--chunking", "trained-rtc"], "max-delay"),
        (["--sampling-steps", "1000"], "1000"),
        (["--replicas", "2"], "replicas are those of Ray Serve: they need --engine ray; got 2"),
        (["--engine", "ray", "--replicas", "0"], "replicas must be at least 1; got 0"),
        (["--engine", "ray", "--replicas", "2", "--min-replicas", "3"], "min-replicas must be at most 2, the replicas"),
    ):
        assert main_says(run, options).count(message) == 1, options


def main_says(run: Path, options: list[str]) -> str:
    try:
        command: Any = parse(["serve", "--checkpoint", str(run), "--device", "cpu", "--backend", "eager", *options])
        choose_key(command)
        choose_tls(command)
        chosen = choose(command)
        chosen.chunking.require(chosen.planner, 0)
    except (ValueError, OSError) as error:
        return str(error)
    raise AssertionError("it would be served")


def test_the_key_may_come_from_the_environment(run: Path, serve) -> None:
    process = serve(run, "--port", "0", "--backend", "eager", *SAMPLING, DIFFUSION_POLICY_API_KEY="short")
    assert "a key of 5 characters can be guessed" in process.said
    with pytest.raises(Refused):
        dp.connect(process.url)
    assert dp.connect(process.url, api_key="short").steps == 15


@pytest.mark.usefixtures("graphs_made_once")
def test_an_export_is_served_without_torch(run: Path, serve, tmp_path: Path) -> None:
    dp.load(run, device="cpu").export(tmp_path / "exported", sampling_steps=2)
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('there is no torch here')")
    process = serve(tmp_path / "exported", "--port", "0", PYTHONPATH=str(blocked))
    local = dp.load(tmp_path / "exported").controller(seed=1)
    far = dp.connect(process.url).controller(seed=1)
    for i in range(9):
        observation = {key: np.array([0.5, 0.01 * i]) for key in ("desired_xy", "actual_xy")}
        np.testing.assert_array_equal(far.act(observation), local.act(observation))
    assert "each request is planned by itself" not in process.said


def test_how_many_servers_a_rate_needs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["serve", "--checkpoint", str(run), "--backend", "eager", "--device", "cpu", *SAMPLING, "--plan"]
    assert main([*command, "1000/min"]) == 0
    said = capsys.readouterr()
    assert re.search(
        r"1000/min is 16.7 plans a second, by eager \d+% of what one such machine gives: 1 server,", said.out
    )
    assert "steps x step cost" in said.err
    assert main([*command, "100000/s"]) == 0
    assert re.search(r"(\d+) servers \(or one with --engine ray --replicas \1\), each at most", capsys.readouterr().out)
    for wrong in ("many", "10/year", "0/s", "-1/s"):
        assert main([*command, wrong]) == 2
        assert "plan must be a rate such as 1000/min" in capsys.readouterr().err
    calls = [Call(1, 10.0, None), Call(16, 40.0, None)]
    assert [count_servers(calls, rate) for rate in (1.0, 280.0, 280.1, 3000.0)] == [1, 1, 2, 11]
    assert (read_rate("1000/min"), read_rate("7.5 / s"), read_rate("36/h")) == (pytest.approx(50 / 3), 7.5, 0.01)


@pytest.mark.slow
def test_evaluations_at_once_are_all_those_of_here(run: Path, server, local, tmp_path: Path) -> None:
    outputs = [tmp_path / f"far{i}" for i in range(16)]
    command = [sys.executable, "-m", "diffusion_policy.cli", "evaluate", "--checkpoint", str(run), *SAMPLING]
    asked = ["--episodes", "6", "--videos", "0", "--workers", "1", "--device", "cpu", "--server", server.url]
    running = [
        subprocess.Popen(
            [*command, *asked, "--server-patience", "600", "--output", str(output)], stderr=subprocess.DEVNULL
        )
        for output in outputs
    ]
    assert [one.wait(600) for one in running] == [0] * len(outputs)
    for output in outputs:
        results = json.loads((output / "results.json").read_text())
        assert {name: value for name, value in results.items() if name not in TIMES} == local


def processes_with(name: str, value: str) -> dict[int, str]:
    """Those that have this in their environment, with what they call themselves."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{name}={value}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_bytes().split(b"\0")[0].decode()
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="what runs cannot be read here")
@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_replicas_plan_as_evaluate_does_and_one_that_is_killed_is_replaced(
    run: Path, serve, evaluate, local, tmp_path: Path, number: int
) -> None:
    pytest.importorskip("ray.serve", exc_type=ImportError)
    options = ("--engine", "ray", "--replicas", "2", "--min-replicas", "2", "--backend", "eager", *SAMPLING)
    process = serve(run, "--port", "0", *options, MARK=str(tmp_path))
    replicas = [one for one, name in processes_with("MARK", str(tmp_path)).items() if "ServeReplica" in name]
    assert len(replicas) == 2
    killer = threading.Timer(1.0, os.kill, [replicas[0], signal.SIGKILL])
    killer.start()
    assert evaluate("--server", process.url) == local
    killer.join()
    assert process.end(number) == 0
    assert process.said.endswith("stopped\n")
    assert "Traceback" not in process.said
    assert processes_with("MARK", str(tmp_path)) == {}


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """The environment that says where a Ray cluster of two cores is, with a token of its own."""
    pytest.importorskip("ray.serve", exc_type=ImportError)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    options = ("--head", "--block", "--port", str(port), "--num-cpus", "2", "--include-dashboard", "false")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
    head = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **secret})
    assert head.stdout is not None
    for line in iter(head.stdout.readline, b""):
        if b"block forever" in line:
            break
    yield {**secret, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    head.terminate()
    with head.stdout:
        head.stdout.read()
    head.wait(30)


WHAT_IS_LEFT = """
import ray
ray.init(log_to_driver=False, logging_level="ERROR")
print(ray.util.list_named_actors(all_namespaces=True), ray.available_resources()["CPU"])
"""


@pytest.mark.slow
def test_replicas_run_on_the_cluster_that_there_is_and_leave_it_as_it_was(run: Path, serve, cluster) -> None:
    options = ("--engine", "ray", "--backend", "eager", *SAMPLING)
    process = serve(run, "--port", "0", *options, **cluster)
    assert dp.connect(process.url).served.backend == "eager"
    assert process.end() == 0
    asked = [sys.executable, "-c", WHAT_IS_LEFT]
    left = subprocess.run(asked, capture_output=True, text=True, check=True, env={**os.environ, **cluster})
    assert left.stdout == "[] 2.0\n"
    said = refuse(run, "--device", "cpu", "--replicas", "3", *options, **cluster)
    assert "replicas must be at most 2, the cores of the Ray cluster; got 3" in said


@pytest.mark.slow
def test_ten_thousand_requests_leave_memory_and_latency_flat(run: Path, serve) -> None:
    process = serve(run, "--port", "0", "--backend", "onnx", "--sampling-steps", "2", "--max-batch", "4")
    remote = dp.connect(process.url)
    observations = {key: np.zeros((1, 2, *shape)) for key, shape in remote.observation_shapes.items()}
    noise = np.zeros((1, 1, *remote.noise_shape), np.float32)

    def memory() -> int:
        return int(Path(f"/proc/{process.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    times, held = [], []
    for i in range(10_500):
        started = time.perf_counter()
        remote.sample(observations, noise)
        times.append(time.perf_counter() - started)
        if i % 500 == 0:
            held.append(memory())
    assert held[-1] - held[1] < 10 * 2**20
    assert np.median(times[-1000:]) < 2 * np.median(times[500:1500])
