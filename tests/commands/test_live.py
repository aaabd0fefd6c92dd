"""A policy that is watched and steered: the session behind the page, who may open it, and the page in a browser."""

import http.client
import json
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import diffusion_policy as dp
from diffusion_policy.cli import main, parse
from diffusion_policy.commands import live_pictures, live_session
from diffusion_policy.commands.dataset.replay import run as replay
from diffusion_policy.commands.live import encode, read_command
from diffusion_policy.commands.live_commands import obey
from diffusion_policy.commands.live_painter import Painter, paint, step_env
from diffusion_policy.commands.live_pictures import Frame
from diffusion_policy.commands.live_recording import ACTOR
from diffusion_policy.commands.live_session import LiveSession
from diffusion_policy.commands.options.dataset import Replay
from diffusion_policy.commands.options.live import Live
from diffusion_policy.commands.policy_in_env import PolicyInEnv, load_with_environment
from diffusion_policy.config import ConfigError
from diffusion_policy.datasets.demonstration import PUSHED
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.envs.block_push_state import block_xy
from diffusion_policy.envs.protocols import Push, as_pushable

CHROMIUM = shutil.which("chromium")
TWELVE = '{"max_episode_steps": 12}'
SHORT = '{"rows": 1, "max_episode_steps": 20}'


@pytest.fixture(scope="module")
def options(run: Path) -> Live:
    command = ["live", "--checkpoint", str(run), "--env-kwargs", SHORT, "--device", "cpu", "--sampling-steps", "2"]
    parsed = parse([*command, "--fan", "3"])
    assert isinstance(parsed, Live)
    return parsed


@pytest.fixture(scope="module")
def loaded(options: Live) -> PolicyInEnv:
    return load_with_environment(options, options.sampling)


@pytest.fixture
def start(loaded: PolicyInEnv, options: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LiveSession]]:
    """Sessions that draw in this process."""
    monkeypatch.setattr(live_pictures, "PAINTERS", 0)
    made: list[LiveSession] = []

    def start(**changes: Any) -> LiveSession:
        told = {"fan": options.fan, "seed": options.seed, "delay_steps": options.delay_steps} | changes
        made.append(LiveSession(loaded, options.sampling, options.chunking, **told))
        return made[-1]

    yield start
    for one in made:
        one.close()


def see(session: LiveSession) -> dict[str, Any]:
    frame = session.look()
    assert isinstance(frame, Frame)
    assert frame.picture[:2] == b"\xff\xd8"
    json.dumps(frame.state, allow_nan=False)
    return frame.state


def end(session: LiveSession) -> dict[str, Any]:
    """The end of this episode."""
    for _ in range(30):
        if see(session)["ended"]:
            return see(session)
        session.advance()
    raise AssertionError("it does not end")


def test_the_policy_acts_as_in_a_rollout(start, run: Path, loaded: PolicyInEnv) -> None:
    session = start()
    controller = dp.load(run, device="cpu").controller(seed=session.episode.seed, sampling_steps=2)
    env = loaded.make_env()
    observation, _ = env.reset(seed=session.episode.seed)
    for _ in range(20):
        action = controller.act(observation)
        session.advance()
        np.testing.assert_array_equal(session.episode.actions[-1], action)
        observation, *_ = env.step(action.astype(np.float32))
    env.close()


def test_what_is_seen(start) -> None:
    session = start()
    before = see(session)
    assert before["plan"] == before["fan"] == before["denoising"] == []
    session.advance()
    state = see(session)
    assert (state["step"], state["seed"], state["driver"], state["ended"]) == (1, 100_000, 0, False)
    assert len(state["plan"]) == 16
    assert len(state["fan"]) == 3
    assert len(state["denoising"]) == 2
    assert np.allclose(state["denoising"][-1], state["fan"][0])  # the last denoising step is the plan
    assert state["latency_ms"] > 0
    small = session.look(0.5)
    assert small is not None
    assert small.state["size"] == [side // 2 for side in state["size"]]
    np.testing.assert_allclose(small.state["plan"], np.array(state["plan"]) / 2, atol=0.1)


def test_an_episode_that_ends_is_counted_and_followed_by_the_next_seed(start) -> None:
    session = start()
    state = end(session)
    assert state["episodes"] == 1
    assert state["successes"] == state["success"]
    assert state["step"] == 20
    for _ in range(live_session.LINGER):
        session.advance()
    assert (see(session)["seed"], see(session)["step"]) == (100_001, 0)


def test_commands_pause_step_and_reset(start) -> None:
    session = start()
    obey(session, {"do": "run", "on": False})
    assert not see(session)["running"]
    obey(session, {"do": "step"})
    obey(session, {"do": "step"})
    assert see(session)["step"] == 2
    obey(session, {"do": "reset", "seed": 5})
    assert (see(session)["seed"], see(session)["step"]) == (5, 0)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"sampler": "ddpm"}, {"sampler": "ddpm"}),
        ({"sampling_steps": 3, "chunking": "rtc"}, {"sampling_steps": 3, "chunking": "rtc"}),
        ({"delay_steps": 4, "roll_forward": True}, {"delay_steps": 4, "roll_forward": True}),
    ],
)
def test_settings_change_while_it_runs(start, settings: dict, found: dict) -> None:
    session = start()
    session.advance()
    obey(session, {"do": "set", "settings": settings})
    assert see(session)["settings"].items() >= found.items()
    for _ in range(10):
        session.advance()
    assert see(session)["step"] == 11


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ({}, "unknown command None; choose from run, step"),
        ({"do": ["run"]}, "unknown command"),
        ({"do": "fly"}, "unknown command 'fly'"),
        ({"do": "reset", "seed": -1}, "a seed is a whole number"),
        ({"do": "reset", "seed": "1"}, "a seed is a whole number"),
        ({"do": "set"}, "settings must be a map"),
        ({"do": "set", "settings": {"sampler": "magic"}}, "sampler"),
        ({"do": "set", "settings": {"sampling_steps": 0}}, "sampling-steps must be at least 1"),
        ({"do": "set", "settings": {"sampling_steps": 10**9}}, "sampling-steps must be at most"),
        ({"do": "set", "settings": {"guidance": 1}}, "condition-dropout"),
        ({"do": "set", "settings": {"guidance": "x"}}, "could not convert"),
        ({"do": "set", "settings": {"mode": "left"}}, "cannot be steered to mode 'left'"),
        ({"do": "set", "settings": {"instruction": "go left"}}, "trained without condition-on-instruction"),
        ({"do": "set", "settings": {"instruction": 5}}, "instruction must be one line"),
        ({"do": "set", "settings": {"chunking": "trained-rtc"}}, "max-delay"),
        ({"do": "set", "settings": {"delay_steps": 99}}, "delay-steps must be from 0 to 7"),
        ({"do": "set", "settings": {"delay_steps": 1.5}}, "delay-steps must be a whole number"),
        ({"do": "set", "settings": {"gravity": 1}}, "unknown option 'gravity'"),
        ({"do": "drive", "who": "nobody"}, "who drives is policy or person"),
        ({"do": "mouse", "down": True, "x": 9, "y": 0}, "a place in the picture is x and y"),
        ({"do": "mouse", "down": True, "x": None, "y": 0}, "a place in the picture is x and y"),
        ({"do": "mouse", "down": True, "x": "left", "y": 0}, "a place in the picture is x and y"),
        ({"do": "mouse", "down": True, "x": [0.5], "y": [0.5]}, "a place in the picture is x and y"),
        ({"do": "push", "down": True, "x": None, "y": 0}, "a place in the picture is x and y"),
        ({"do": "push", "down": True, "x": 0.5, "y": 0.5}, "no bodies that can be pushed"),
        ({"do": "set", "settings": {"guidance": 10**400}}, "too large"),
        ({"do": "record"}, "nothing is recorded without --record"),
        ({"do": "undo"}, "there is no episode to undo"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(start, command: dict, message: str) -> None:
    session = start()
    session.advance()
    before, untouched = see(session), start()
    with pytest.raises(ConfigError, match=re.escape(message)):
        obey(session, command)
    assert see(session) == before
    for one in (session, untouched, untouched):
        one.advance()
    np.testing.assert_array_equal(session.episode.actions, untouched.episode.actions)


# Teaching


def place(session: LiveSession, xy: list[float]) -> dict[str, Any]:
    """A mouse command at a point of the plane."""
    assert session._plane is not None
    x, y = session._plane.pixels(np.array(xy)) / see(session)["size"]
    return {"do": "mouse", "down": True, "x": float(x), "y": float(y)}


def test_the_robot_follows_the_mouse_as_fast_as_the_task_allows(start) -> None:
    session = start(seed=3)
    goal = [0.45, -0.2]
    obey(session, place(session, goal))
    far = np.linalg.norm(session.episode.observation["desired_xy"] - goal)
    for _ in range(15):
        before = session.episode.observation["desired_xy"].copy()
        session.advance()
        assert np.abs(session.episode.observation["desired_xy"] - before).max() <= 0.02 + 1e-6
    assert far > 0.05
    np.testing.assert_allclose(session.episode.observation["desired_xy"], goal, atol=1e-3)
    assert see(session)["held"]
    obey(session, {"do": "mouse", "down": False})
    obey(session, {"do": "drive", "who": "person"})  # without a button it stays where it is
    session.advance()
    np.testing.assert_allclose(session.episode.observation["desired_xy"], goal, atol=1e-3)


def test_corrections_are_recorded_with_who_acted_and_can_be_undone(start, tmp_path: Path) -> None:
    path = tmp_path / "taught.zarr"
    session = start(record=path)
    session.advance()
    obey(session, {"do": "record"})
    assert see(session)["step"] == 0  # an episode is recorded whole
    for step in range(20):
        obey(session, place(session, [0.45, -0.2]) if 5 <= step < 10 else {"do": "mouse", "down": False})
        session.advance()
    assert see(session)["can_undo"]
    obey(session, {"do": "undo"})
    assert sum(see(session)["recorded"].values()) == 0
    for seed in (7, 8):
        obey(session, {"do": "reset", "seed": seed})
        for step in range(20):
            obey(session, place(session, [0.45, -0.2]) if 5 <= step < 10 else {"do": "mouse", "down": False})
            session.advance()
    assert sum(see(session)["recorded"].values()) == 2
    obey(session, {"do": "record", "on": False})
    session.close()
    store = EpisodeStore.open(path)
    assert store.seeds().tolist() == [7, 8]
    assert store.read(ACTOR)[:20, 0].tolist() == [0] * 5 + [1] * 5 + [0] * 10
    assert "actor" not in store.observation_keys
    again = start(record=path)
    assert sum(see(again)["recorded"].values()) == 2
    dp.train(path, tmp_path / "run", steps=10, widths=(8,), level_dim=8, noise_levels=10, device="cpu")


# Pushing


@pytest.fixture(scope="module")
def pushable(tmp_path_factory: pytest.TempPathFactory) -> PolicyInEnv:
    """A policy, hardly trained, where there are blocks."""
    folder = tmp_path_factory.mktemp("block_push")
    tiny: dict[str, Any] = {"widths": (8,), "level_dim": 8, "noise_levels": 10, "validation_share": 0.0}
    dp.collect(folder / "demos.zarr", env="diffusion_policy/BlockPush-v0", episodes=1, workers=1)
    dp.train(folder / "demos.zarr", folder / "run", steps=5, device="cpu", **tiny)
    parsed = parse(["live", "--checkpoint", str(folder / "run"), "--device", "cpu", "--env-kwargs", TWELVE])
    assert isinstance(parsed, Live)
    return load_with_environment(parsed, parsed.sampling)


def push(session: LiveSession, xy: np.ndarray) -> None:
    obey(session, place(session, xy.tolist()) | {"do": "push"})


def test_a_body_is_pushed_while_the_policy_acts_and_the_store_says_when(
    pushable: PolicyInEnv, options: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(live_pictures, "PAINTERS", 0)
    path = tmp_path / "taught.zarr"
    session = LiveSession(pushable, options.sampling, options.chunking, fan=0, seed=5, record=path)
    obey(session, {"do": "record"})
    assert see(session)["can_push"]
    with pytest.raises(ConfigError, match="there is nothing here that can be pushed"):
        push(session, np.array([0.6, 0.45]))
    assert not see(session)["pushing"]
    start = block_xy(session.episode.observation["state"])
    for step in range(12):
        if step == 3:
            push(session, block_xy(session.episode.observation["state"])[0])
        if 3 <= step < 8:
            push(session, start[0] + [0.1, 0.0])
            assert (see(session)["pushing"], see(session)["held"], see(session)["driver"]) == (True, False, 0)
        else:
            obey(session, {"do": "push", "down": False})
        session.advance()
    moved = block_xy(session.episode.observation["state"]) - start
    assert moved[0, 0] > 0.05
    obey(session, {"do": "reset"})
    assert not see(session)["pushing"]
    session.close()
    store = EpisodeStore.open(path)
    assert store.read(PUSHED)[:, 0].tolist() == [0] * 3 + [1] * 5 + [0] * 4
    assert store.read(ACTOR).sum() == 0
    assert not {PUSHED, ACTOR} & set(store.observation_keys)
    assert max(replay(Replay(store=str(path))).values()) < 1e-6
    assert "a person pushed a body in some episodes" in capsys.readouterr().out


def test_a_new_episode_lets_go_of_what_was_pushed(
    pushable: PolicyInEnv, options: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_pictures, "PAINTERS", 0)
    session = LiveSession(pushable, options.sampling, options.chunking, fan=0, seed=5)
    for let_go in ({"do": "reset", "seed": 6}, {"do": "push", "down": False}, {"do": "mouse", "down": False}):
        push(session, block_xy(session.episode.observation["state"])[1])
        assert see(session)["pushing"]
        obey(session, let_go)
        assert not see(session)["pushing"]
    push(session, block_xy(session.episode.observation["state"])[1])
    obey(session, place(session, [0.4, 0.0]))  # one mouse, one thing
    assert (see(session)["pushing"], see(session)["held"]) == (False, True)
    session.close()


def test_a_painter_repeats_pushes_to_the_bit(pushable: PolicyInEnv) -> None:
    painter, env = Painter(pushable.make_env), pushable.make_env(render_mode="rgb_array")
    task = as_pushable(env)
    observation = env.reset(seed=3)[0]
    painter.reset(3)
    assert task is not None
    grip = task.grip(block_xy(observation["state"])[0])
    assert grip is not None
    for i in range(6):
        action, pushed = np.array([0.01, 0.02], np.float32), Push(grip, (0.5, 0.1)) if i != 3 else None
        step_env(env, action, pushed)
        painter.step(action, pushed)
    painter.ask(1.0)
    assert painter.take() == paint(env, 1.0)
    painter.close()
    env.close()


def test_a_picture_is_drawn_here_when_who_draws_has_ended(
    loaded: PolicyInEnv, options: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_pictures, "PAINTERS", 1)
    session = LiveSession(loaded, options.sampling, options.chunking, fan=0)
    assert session.look() is None
    assert session.look() is not None
    session._pictures._painters[0]._process.kill()
    session._pictures._painters[0]._process.join()
    for _ in range(3):
        session.advance()
        assert session.look() is not None
    assert session.ahead == 0
    session.close()


def test_a_window_that_goes_lets_go_of_the_mouse(start) -> None:
    session = start()
    obey(session, place(session, [0.45, -0.2]))
    session.mouse.release()
    assert not see(session)["held"]


def test_another_store_is_not_gone_on_with(start, demonstrations: Path, tmp_path: Path) -> None:
    with EpisodeStore.create(
        tmp_path / "other.zarr", {"environment": {"id": "Other-v0", "arguments": {}}}, ("left", "right")
    ):
        pass
    with pytest.raises(ConfigError, match="holds episodes of another environment"):
        start(record=tmp_path / "other.zarr")
    with pytest.raises(ConfigError, match="no column actor, which live writes in this environment"):
        start(record=demonstrations)


def test_a_painter_draws_what_happens_here(loaded: PolicyInEnv) -> None:
    painter, env = Painter(loaded.make_env), loaded.make_env(render_mode="rgb_array")
    env.reset(seed=3)
    painter.reset(3)
    for _ in range(5):
        action = np.array([0.01, 0.02], np.float32)
        env.step(action)
        painter.step(action)
    painter.ask(0.75)
    assert painter.take() == paint(env, 0.75)
    painter.close()
    with pytest.raises((EOFError, OSError)):
        painter.take()
    env.close()


def test_an_environment_without_pictures_is_refused(loaded: PolicyInEnv, options: Live) -> None:
    def make(render_mode: str | None = None) -> Any:
        env = loaded.make_env()
        env.unwrapped.metadata = {"render_modes": []}
        return env

    with pytest.raises(ConfigError, match=r"makes no pictures \(render mode rgb_array\)"):
        LiveSession(loaded._replace(make_env=make), options.sampling, options.chunking)


def test_options_that_cannot_work(options: Live) -> None:
    for change, message in (
        ({"port": -1}, "port"),
        ({"fan": 65}, "fan must be at most 64"),
        ({"delay_steps": -1}, "delay"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(options, **change)


@pytest.mark.parametrize("text", ["{", "[]", "1", '{"a": NaN', b"\xff", "[" * 5000])
def test_a_command_that_is_no_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(ConfigError, match="a command is"):
        read_command(text)


def test_a_frame_is_state_and_picture() -> None:
    message = encode(Frame({"a": 1}, b"picture"))
    (length,) = struct.unpack("<I", message[:4])
    assert json.loads(message[4 : 4 + length]) == {"a": 1}
    assert message[4 + length :] == b"picture"


# The page


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a page that is being shown, and the store that it records into."""
    store = tmp_path_factory.mktemp("live") / "taught.zarr"
    command = [sys.executable, "-m", "diffusion_policy.cli", "live", "--checkpoint", str(run), "--env-kwargs", SHORT]
    told = ["--device", "cpu", "--sampling-steps", "2", "--port", "0", "--record", str(store), "--seed", "100100"]
    process = subprocess.Popen([*command, *told], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r"open (http://\S+)", process.stdout.readline())
    assert found, process.communicate()
    yield found[1], store
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert f"demonstrations in {store}" in said
    assert "Traceback" not in said
    with EpisodeStore.open(store) as kept:
        assert len(kept.episode_ends) >= 1


def fetch(url: str, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(url.removeprefix("http://").partition("/")[0], timeout=10)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_only_who_has_the_token_may_look_and_steer(page) -> None:
    url, _ = page
    host, token = url.removeprefix("http://").partition("/")[0], url.partition("token=")[2]
    assert len(token) >= 32
    good = f"/?token={token}"
    assert fetch(url, good)[0] == 200
    assert fetch(url, "/")[0] == fetch(url, "/?token=x")[0] == 403
    assert fetch(url, good, Host="evil.example")[0] == 403
    assert fetch(url, good, Origin="http://evil.example")[0] == 403
    assert fetch(url, f"/else?token={token}")[0] == 404
    for address, origin in (
        (f"ws://{host}/live?token=x", None),
        (f"ws://{host}/live?token={token}", "http://evil.example"),
        (f"ws://{host}/live?token={token}", "null"),
    ):
        with pytest.raises(InvalidStatus, match="403"), connect(address, origin=origin, proxy=None):  # pyright: ignore
            pass
    assert "http://" not in re.sub(r"ws://\$\{", "", fetch(url, good)[1])  # nothing is fetched from elsewhere


def test_a_window_that_speaks_nonsense_hears_so(page) -> None:
    url, _ = page
    with connect(url.replace("http", "ws").replace("/?", "/live?"), proxy=None) as window:
        for text in ("nonsense", '{"do": "fly"}'):
            window.send(text)
            while isinstance(said := window.recv(timeout=20), bytes):
                window.send("shown")
            assert json.loads(said)["refused"]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
def test_a_person_watches_pauses_steers_and_teaches(page, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    url, store = page
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": 1240, "height": 900})
        complaints: list[str] = []
        window.on("console", lambda message: complaints.append(message.text))
        window.on("pageerror", lambda error: complaints.append(str(error)))
        window.goto(url)

        def wait(expression: str) -> None:
            for _ in range(300):
                if window.evaluate(f"Boolean({expression})"):
                    return
                time.sleep(0.1)
            raise AssertionError(f"never {expression}: {window.evaluate('JSON.stringify(live.state)')}")

        wait("live.frames > 5 && live.state.fan.length")
        assert int(window.input_value("#seed")) >= 100_100
        window.click("#run")
        wait("!live.state.running")
        step = window.evaluate("live.state.step")
        assert window.locator("#hand").is_hidden()  # there is nothing that can be pushed
        window.click("#step")
        wait(f"live.state.step !== {step} || live.state.ended")
        window.select_option("#chunking", "rtc")
        wait("live.state.settings.chunking === 'rtc'")
        window.fill("#delay_steps", "99")
        window.press("#delay_steps", "Enter")
        wait("document.getElementById('refused').textContent.includes('delay-steps must be from 0 to 7')")
        window.click("#record")
        wait("live.state.recording")
        window.click("#run")
        window.locator("#canvas").scroll_into_view_if_needed()
        box = window.locator("#canvas").bounding_box()
        window.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.7 * box["height"])
        window.mouse.down()
        wait("live.state.held")
        episodes = window.evaluate("live.state.episodes")
        wait(f"live.state.episodes >= {episodes} + 2")  # the second of them was steered from its beginning
        window.mouse.up()
        wait(f"live.state.episodes >= {episodes} + 3")  # so that it is written
        assert complaints == []
        browser.close()
    with EpisodeStore.open(store) as kept:
        assert 1 in kept.read(ACTOR)
    tiny = ["--steps", "10", "--widths", "8", "--level-dim", "8", "--noise-levels", "10", "--validation-share", "0"]
    assert main(["train", "--dataset", str(store), "--output", str(tmp_path / "run"), *tiny, "--device", "cpu"]) == 0
