"""What a live page shows of the images that the policy plans from: the images, their crops and keypoints, and when they
are sent."""

import io
import json
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from websockets.sync.client import connect

import diffusion_policy as dp
from diffusion_policy.cli import parse
from diffusion_policy.commands import live_pictures
from diffusion_policy.commands.live import encode
from diffusion_policy.commands.live_commands import obey
from diffusion_policy.commands.live_pictures import Frame
from diffusion_policy.commands.live_session import LiveSession
from diffusion_policy.commands.live_sights import MOST_CAMERAS, MOST_SIDE, LiveSight, see
from diffusion_policy.commands.options.live import Live
from diffusion_policy.commands.policy_in_env import load_with_environment
from diffusion_policy.commands.sights import list_sights
from diffusion_policy.config import CnnConfig, ImageConfig, PolicyConfig, VitConfig, with_options
from diffusion_policy.evaluation.episode import Episode
from diffusion_policy.policy import DiffusionPolicy

CHROMIUM = shutil.which("chromium")
SIZE = 24
TINY: dict[str, Any] = {"widths": (8,), "level_dim": 8, "noise_levels": 10, "steps": 2, "image_features": 4}


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, hardly trained, that observes an image and a position."""
    folder = tmp_path_factory.mktemp("images")
    task = {"rows": 1, "image_size": SIZE}
    dp.collect(folder / "demos.zarr", env="diffusion_policy/Avoid-v0", env_kwargs=task, episodes=1, workers=1)
    told = {"observation": ("image", "desired_xy"), "cnn_widths": (4, 4), "keypoints": 3, "image_crop": 0.75}
    dp.train(folder / "demos.zarr", folder / "run", validation_share=0.0, device="cpu", **told, **TINY)
    return folder / "run"


def start(run: Path) -> LiveSession:
    options = parse(["live", "--checkpoint", str(run), "--device", "cpu", "--sampling-steps", "2", "--fan", "0"])
    assert isinstance(options, Live)
    return LiveSession(load_with_environment(options, options.sampling), options.sampling, options.chunking, fan=0)


def look(session: LiveSession) -> tuple[LiveSight, ...]:
    frame = session.look()
    assert frame is not None
    return frame.sights


def pixels(sight: LiveSight) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sight.jpeg)))


def make_policy(images: ImageConfig, shapes: dict[str, tuple[int, ...]]) -> DiffusionPolicy:
    rng = np.random.default_rng(0)
    data = {key: rng.integers(0, 256, (20, *shape), np.uint8) for key, shape in shapes.items()}
    config = with_options(PolicyConfig(images=images), widths=(8,), level_dim=16)
    return DiffusionPolicy.for_data(config, data | {"action": np.ones((20, 2))}).eval()


def test_a_session_shows_the_images_of_its_last_plan(image_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_pictures, "PAINTERS", 0)
    session = start(image_run)
    assert session.policy.cameras == ("image",)
    assert look(session) == ()
    shown, observed = [], []
    for _ in range(9):
        observed.append(session.episode.observation["image"])
        session.advance()
        shown.append(look(session))
    steps = [sights[0].step for sights in shown]
    assert steps == [0] * 8 + [8]  # Ta is 8
    assert shown[0] is shown[7]
    for sights in (shown[0], shown[8]):
        (sight,) = sights
        assert np.abs(pixels(sight).astype(int) - observed[sight.step]).mean() < 4  # a JPEG
    obey(session, {"do": "mouse", "down": True, "x": 0.5, "y": 0.5})
    session.advance()
    assert look(session) == ()  # a person acts: the plan is dropped
    obey(session, {"do": "mouse", "down": False})
    session.advance()
    assert look(session)[0].step == 10
    obey(session, {"do": "reset"})
    assert look(session) == ()
    session.close()


def test_a_session_without_images_shows_none(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_pictures, "PAINTERS", 0)
    session = start(run)
    session.advance()
    assert (look(session), session.policy.cameras) == ((), ())
    session.close()


@pytest.mark.parametrize("vision", [CnnConfig((4, 4), 3), VitConfig(8, 1, 2)])
def test_the_crop_and_the_keypoints_are_those_of_the_page_of_an_evaluation(vision: CnnConfig | VitConfig) -> None:
    policy = make_policy(ImageConfig(vision, image_crop=0.75), {"image": (32, 24, 3)})
    images = np.random.default_rng(1).integers(0, 256, (1, 32, 24, 3), np.uint8)
    episode = Episode(7, True, None, {"image": images}, np.ones((0, 2)), 0, {}, ())
    (known,) = list_sights(policy, episode, [0])
    (sight,) = see(policy, {"image": images[0]}, 0)
    assert (sight.key, sight.crop) == ("image", [0.125, 0.125, 0.75, 0.75])
    if known.keypoints is None:
        assert sight.keypoints == []
    else:
        in_image = np.array(sight.keypoints) * [24, 32] - 0.5
        np.testing.assert_allclose(in_image, known.keypoints + np.array([3, 4]), atol=0.01)


@pytest.mark.parametrize(("shape", "sent"), [
    ((20, 32, 1), (20, 32)), ((20, 32, 4), (20, 32, 3)), ((2 * MOST_SIDE, 100, 3), (MOST_SIDE, 50, 3)),
])  # fmt: skip
def test_images_of_any_channels_are_sent_at_a_bounded_size(shape: tuple[int, int, int], sent: tuple[int, ...]) -> None:
    policy = make_policy(ImageConfig(CnnConfig((4, 4), 3), image_crop=1.0), {"image": shape})
    (sight,) = see(policy, {"image": np.full(shape, 200, np.uint8)}, 0)
    assert pixels(sight).shape == sent
    assert abs(int(pixels(sight).mean()) - 200) < 3
    assert sight.crop == [0, 0, 1, 1]
    assert np.shape(sight.keypoints) == (3, 2)


def test_of_many_cameras_the_first_are_shown() -> None:
    shapes = {f"camera_{i}": (16, 16, 3) for i in range(MOST_CAMERAS + 2)}
    policy = make_policy(ImageConfig(CnnConfig((4, 4), 3)), shapes)
    sights = see(policy, {key: np.zeros(shape, np.uint8) for key, shape in shapes.items()}, 0)
    assert [sight.key for sight in sights] == list(policy.images[:MOST_CAMERAS])


def test_a_frame_holds_images_where_they_are_new() -> None:
    sight = LiveSight("</script>\udc80", 3, [0.0, 0.0, 1.0, 1.0], [[0.5, 0.25]], b"image")
    frame = Frame({"a": 1}, b"picture", (sight,))
    assert read(encode(frame)) == SimpleNamespace(state={"a": 1}, rest=b"picture")
    told = read(encode(frame, frame.sights))
    assert told.rest == b"imagepicture"
    assert told.state["sights"] == [sight._asdict() | {"jpeg": 5}]
    assert read(encode(frame, ())).state == {"a": 1, "sights": []}


def read(message: bytes) -> SimpleNamespace:
    (length,) = struct.unpack("<I", message[:4])
    return SimpleNamespace(state=json.loads(message[4 : 4 + length]), rest=message[4 + length :])


# The page


@pytest.fixture(scope="module")
def url(image_run: Path) -> Iterator[str]:
    """The address of a page that is being shown."""
    command = [sys.executable, "-m", "diffusion_policy.cli", "live", "--checkpoint", str(image_run), "--port", "0"]
    told = ["--device", "cpu", "--sampling-steps", "2", "--fan", "0"]
    process = subprocess.Popen([*command, *told], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r"open (http://\S+)", process.stdout.readline())
    assert found, process.communicate()
    yield found[1]
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in said


def test_each_window_is_sent_each_image_once(url: str) -> None:
    for _ in range(2):  # a window that comes later is sent what the others have
        with connect(url.replace("http", "ws").replace("/?", "/live?"), proxy=None) as window:
            told: list[int | None] = []
            while len([step for step in told if step is not None]) < 3:
                message = window.recv(timeout=20)
                assert isinstance(message, bytes)
                frame = read(message)
                told += [sight["step"] for sight in frame.state.get("sights", ())] or [None]
                start = sum(sight["jpeg"] for sight in frame.state.get("sights", ()))
                assert start < 10_000
                assert frame.rest[start : start + 2] == b"\xff\xd8"  # the picture
                window.send("shown")
            steps = [step for step in told if step is not None]
            assert len(set(steps)) == 3
            assert None in told  # frames between them are sent without


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
def test_the_page_shows_what_the_policy_saw(url: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
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

        window.wait_for_selector("#cameras canvas", timeout=30_000)
        assert window.inner_text("#cameras") == "image"
        assert window.inner_text("#seen").startswith("at step")
        assert (
            window.inner_text("#looks") == "Framed: the crop that it was given. Dots: where its spatial softmax looks."
        )
        colors = window.evaluate(
            "(canvas => { const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);"
            " return new Set(data).size; })(document.querySelector('#cameras canvas'))"
        )
        assert colors > 10  # it is no blank
        window.click("#run")
        window.click("#reset")
        wait("!live.state.running && live.state.step === 0")
        window.click("#step")
        wait("live.state.step === 1")
        wait(f"live.frames > {window.evaluate('live.frames')} + 5")  # what was on its way has come
        window.evaluate(
            "createImageBitmap(new ImageData(9, 9)).then(image => see([{ key: '<b>camera</b>', step: 5,"
            " crop: [0, 0, 1, 1], keypoints: [] }], [image]))"
        )
        assert window.inner_text("#cameras") == "<b>camera</b>"  # a name is text
        assert window.inner_text("#looks") == ""
        window.click("#reset")
        window.wait_for_selector("#cameras.past")
        assert window.inner_text("#seen") == "at an older plan"
        assert complaints == []
        browser.close()
