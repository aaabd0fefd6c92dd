"""How fast windows come, what streaming costs, and what writing costs: python scripts/benchmark_data.py

Take the figures with nothing else running; ratios compare two figures of the same run. The streamed store, of 8 GB, is
made in a temporary folder and deleted. So is the store of images, of 20 GB unpacked, which takes 7.5 GB on the disk.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
import zarr

from diffusion_policy import envs
from diffusion_policy.config import PolicyConfig, TrainConfig, with_options
from diffusion_policy.datasets.collect import Demonstrator, collect
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.streaming import hold_windows, load_windows
from diffusion_policy.datasets.summary import summarize
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.envs.experts import EXPERTS
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training.trainer import Trainer

HORIZONS = 2, 16
BATCH = 256
IMAGE_BATCH = 64
WIDE = {"state": "state", "action": "action"}
NARROW_NETWORK = with_options(PolicyConfig(), widths=(32, 64), level_dim=32)


@dataclass(frozen=True)
class Args:
    """Measure windows, streaming and collecting."""

    what: tyro.conf.Positional[
        Literal["all", "windows", "stream", "images", "collect", "one-training", "one-reading"]
    ] = "all"
    """Which part; one-training and one-reading are what `stream` and `images` run in processes of their own."""
    pusht: Path = Path("../shared/data/pusht_cchi_v7_replay.zarr")
    """The published Push-T store."""
    gigabytes: float = 8.0
    """Size of the streamed store."""
    image_gigabytes: float = 20.0
    """Unpacked size of the streamed store of images."""
    reader: Literal["streamed", "items"] = "streamed"
    """How one-reading reads: in blocks that are shuffled, or one window after the other."""
    steps: int = 300
    """Training steps with each store."""
    store: Path | None = None
    """Store of one-training and one-reading."""
    memory_gb: float = 4.0
    """Memory of one-training and one-reading."""
    repeats: int = 5
    """Figures of each kind; the median and the spread are printed."""


class PerItem(torch.utils.data.Dataset):
    """What most training code does: an item is sliced and padded in Python."""

    def __init__(self, data: dict[str, np.ndarray], ends: np.ndarray) -> None:
        self._data, self._ends = data, ends
        self._starts = np.concatenate([[0], ends[:-1]])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, now: int) -> dict[str, torch.Tensor]:
        episode = int(np.searchsorted(self._ends, now, side="right"))
        first, last = self._starts[episode], self._ends[episode] - 1
        start = now - HORIZONS[0] + 1
        item = {}
        for key, rows in self._data.items():
            length = HORIZONS[1] if key == "action" else HORIZONS[0]
            piece = rows[max(start, first) : min(start + length, last + 1)]
            before, after = max(0, first - start), max(0, start + length - last - 1)
            item[key] = torch.from_numpy(np.concatenate([piece[:1]] * before + [piece] + [piece[-1:]] * after))
        return item


class ImageItems(torch.utils.data.Dataset):
    """What most training code does with images: an item is read and unpacked when it is asked for."""

    def __init__(self, store: EpisodeStore) -> None:
        self._store, self._ends = store, store.episode_ends
        self._starts = np.concatenate([[0], self._ends[:-1]])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, now: int) -> dict[str, torch.Tensor]:
        episode = int(np.searchsorted(self._ends, now, side="right"))
        item = {}
        for key, length in zip(("camera", "action"), HORIZONS, strict=True):
            rows = np.clip(np.arange(length) + now - HORIZONS[0] + 1, self._starts[episode], self._ends[episode] - 1)
            read = self._store.read_rows(key, int(rows[0]), int(rows[-1]) + 1)
            item[key] = torch.from_numpy(read[rows - rows[0]])
        return item


def rate(batches: Iterator, count: int, repeats: int, batch: int = BATCH) -> list[float]:
    """Windows a second, sorted."""
    next(batches)
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(count):
            next(batches)
        rates.append(count * batch / (time.perf_counter() - started))
    return sorted(rates)


def print_rates(name: str, rates: list[float], unit: str = "windows/s") -> float:
    """Print median and spread; returns the median."""
    median = statistics.median(rates)
    print(f"{name}: {median:,.0f} {unit} ({rates[0]:,.0f} to {rates[-1]:,.0f})", flush=True)
    return median


def measure_windows(args: Args) -> None:
    """Batches of windows from the Push-T store: gathered, one by one, and beside a training step."""
    store = EpisodeStore.open(args.pusht)
    windows = hold_windows(store, WIDE, range(len(store.episode_ends)), *HORIZONS)
    data = {key: store.read(key).astype(np.float32) for key in WIDE}
    loader = torch.utils.data.DataLoader(PerItem(data, store.episode_ends), BATCH, shuffle=True, drop_last=True)
    gathered = print_rates("gathered batches", rate(windows.batches(BATCH, 0), 500, args.repeats))
    one_by_one = print_rates("one item at a time", rate(iter(loader), 15, args.repeats))
    policy = DiffusionPolicy.for_data(PolicyConfig(), data)
    trainer = Trainer.for_policy(policy, windows, None, TrainConfig(steps=10**6))
    seconds = []
    for _ in range(args.repeats + 1):
        started, first = time.perf_counter(), trainer.step
        trainer.run(should_stop=lambda first=first: trainer.step == first + 10)
        seconds.append((time.perf_counter() - started) / 10)
    step = statistics.median(seconds[1:])
    print(f"ratio: {gathered / one_by_one:.0f} times as fast")
    print(f"training step of the default network: {step * 1e3:.0f} ms; its batch takes {BATCH / gathered / step:.2%}")


def synthetic(path: Path, gigabytes: float) -> None:
    """A store of random walks of 64 + 8 numbers, in episodes of 200 steps."""
    rng = np.random.default_rng(0)
    batch = 1000  # episodes, 58 MB
    with EpisodeStore.create(path, {}, []) as store:
        for _ in range(max(1, round(gigabytes * 1e9 / (batch * 200 * 72 * 4)))):
            steps = rng.normal(size=(batch, 200, 72)).astype(np.float32)
            walks = np.cumsum(steps, axis=1)
            store.append([Demonstration({"state": walk[:, :64], "action": walk[:, 64:]}) for walk in walks])


def one_training(args: Args) -> None:
    """Train for some steps; print windows/s alone, steps/s, and the largest resident memory [MB]."""
    assert args.store is not None
    torch.set_num_threads(2)
    store = EpisodeStore.open(args.store)
    episodes = np.arange(len(store.episode_ends))
    summary = summarize(store, ["state"], "action", episodes)
    policy = DiffusionPolicy.for_statistics(NARROW_NETWORK, summary.statistics)
    windows = load_windows(
        store, WIDE, episodes, *HORIZONS, device="cpu", labels=None, memory_bytes=args.memory_gb * 1e9
    )
    trainer = Trainer.for_policy(policy, windows, None, TrainConfig(steps=args.steps, batch_size=BATCH))
    started = time.perf_counter()
    trainer.run()
    steps_per_second = args.steps / (time.perf_counter() - started)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rates = rate(windows.batches(BATCH, 1), 2000, args.repeats)
    held = isinstance(windows, Windows)
    print(json.dumps({"held": held, "steps": steps_per_second, "resident": resident, "rates": rates}))


def measure_stream(args: Args) -> None:
    """The same training on a small store in memory and on a large one that is streamed."""
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for name, gigabytes, memory in (("small", 0.05, 4.0), ("large", args.gigabytes, 0.5)):
            path = Path(folder) / f"{name}.zarr"
            synthetic(path, gigabytes)
            command = [sys.executable, __file__, "one-training", "--store", str(path), "--memory-gb", str(memory)]
            command += ["--steps", str(args.steps), "--repeats", str(args.repeats)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout))
            steps, episodes = EpisodeStore.open(path).episode_ends[-1], len(EpisodeStore.open(path).episode_ends)
            on_disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            print(
                f"{name}: {episodes} episodes, {steps * 72 * 4 / 1e9:.2f} GB, on disk {on_disk / 1e9:.2f} GB",
                flush=True,
            )
    small, large = results
    assert small["held"]
    assert not large["held"]
    medians = [print_rates(name, result["rates"]) for name, result in (("in memory", small), ("streamed", large))]
    print(f"ratio of window rates: {medians[1] / medians[0]:.2f}")
    print(f"training: {small['steps']:.1f} steps/s in memory, {large['steps']:.1f} streamed")
    more = large["resident"] - small["resident"]
    print(f"resident: {small['resident']:.0f} MB in memory, {large['resident']:.0f} MB streamed: {more:+.0f} MB")


def films(episodes: int, seed: int) -> Iterator[Demonstration]:
    """Episodes of 200 images of 96 x 96: three squares that move over a floor, under the noise of a camera in half of
    the image, and where the squares are."""
    rng = np.random.default_rng(seed)
    for _ in range(episodes):
        floor = np.kron(rng.integers(90, 160, (12, 12, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        frames = np.repeat(floor[None], 200, axis=0)
        frames[:, :48] += rng.integers(0, 4, (200, 48, 96, 3), np.uint8)
        steps = rng.normal(size=(200, 3, 2)).astype(np.float32)
        places = np.abs((np.cumsum(steps, axis=0) + rng.uniform(0, 160, (3, 2))) % 160 - 80).astype(np.float32)
        for t, squares in enumerate(places.astype(int)):
            for (x, y), color in zip(squares, ((220, 30, 30), (30, 200, 30), (30, 30, 220)), strict=True):
                frames[t, y : y + 16, x : x + 16] = color
        yield Demonstration({"camera": frames, "action": places.reshape(200, 6)})


def one_reading(args: Args) -> None:
    """Read batches of windows of images; print windows/s, and by how much the resident memory rose [MB]."""
    assert args.store is not None
    torch.set_num_threads(2)
    store = EpisodeStore.open(args.store)
    keys, episodes = {"camera": "camera", "action": "action"}, np.arange(len(store.episode_ends))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if args.reader == "streamed":
        windows = load_windows(
            store, keys, episodes, *HORIZONS, device="cpu", labels=None, memory_bytes=args.memory_gb * 1e9
        )
        assert not isinstance(windows, Windows)
        rates = rate(windows.batches(IMAGE_BATCH, 0), 400, args.repeats, IMAGE_BATCH)
    else:
        loader = torch.utils.data.DataLoader(ImageItems(store), IMAGE_BATCH, shuffle=True, drop_last=True)
        rates = rate(iter(loader), 5, args.repeats, IMAGE_BATCH)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rates": rates, "before": before, "resident": resident}))


def measure_images(args: Args) -> None:
    """Windows of images from a store that does not fit the memory it is given: streamed, and one at a time."""
    with tempfile.TemporaryDirectory() as folder:
        path, batch = Path(folder) / "images.zarr", 10
        count = max(batch, round(args.image_gigabytes * 1e9 / (200 * 96 * 96 * 3)))
        started = time.perf_counter()
        with EpisodeStore.create(path, {}, [], sync=False) as store:
            for seed in range(count // batch):
                store.append(list(films(batch, seed)))
        raw = count // batch * batch * 200 * 96 * 96 * 3
        files = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
        print(
            f"images: {raw / 1e9:.1f} GB of {raw // (96 * 96 * 3)} images, on disk {sum(files) / 1e9:.2f} GB in "
            f"{len(files)} files, written in {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        medians = []
        for reader in ("streamed", "items"):
            command = [sys.executable, __file__, "one-reading", "--store", str(path), "--memory-gb", "0.5"]
            command += ["--reader", reader, "--repeats", str(args.repeats)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            medians.append(print_rates(f"{reader}: windows of 2 images", found["rates"]))
            print(f"resident: {found['resident']:.0f} MB, {found['resident'] - found['before']:+.0f} MB by reading")
        print(f"ratio: {medians[0] / medians[1]:.0f} times as fast")


def measure_collect(args: Args) -> None:
    """The time that a collection in one process spends on writing, beside that of simulating."""
    make_env = partial(envs.make, envs.ENV_IDS[0])
    env = make_env()
    shares = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            store = EpisodeStore.create(Path(folder) / "store.zarr", {}, env.get_wrapper_attr("modes"))
            append, spent = store.append, [0.0]

            def timed(episodes: Sequence[Demonstration], append=append, spent=spent) -> None:
                started = time.perf_counter()
                append(episodes)
                spent[0] += time.perf_counter() - started

            store.append = timed
            started = time.perf_counter()
            collect(store, partial(Demonstrator, make_env, EXPERTS[envs.ENV_IDS[0]], 0.4), 240, 0)
            shares.append(spent[0] / (time.perf_counter() - started - spent[0]))
            store.close()
    shares.sort()
    print(
        f"writing 240 episodes: {statistics.median(shares):.1%} of the simulation ({shares[0]:.1%} to {shares[-1]:.1%})"
    )


def describe_machine() -> str:
    """Processor, cores, and the versions that matter."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, zarr, np))
    return f"{model}, {len(os.sched_getaffinity(0))} cores; Python {platform.python_version()}, {versions}"


def main(args: Args) -> None:
    """Print the figures of the parts asked for."""
    if args.what == "one-training":
        one_training(args)
        return
    if args.what == "one-reading":
        one_reading(args)
        return
    print(describe_machine())
    if args.what in ("all", "windows"):
        measure_windows(args)
    if args.what in ("all", "stream"):
        measure_stream(args)
    if args.what in ("all", "images"):
        measure_images(args)
    if args.what in ("all", "collect"):
        measure_collect(args)


if __name__ == "__main__":
    main(tyro.cli(Args))
