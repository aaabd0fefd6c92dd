"""How a policy server does under load: closed-loop clients in processes of their own, on this machine.

Usage: python scripts/benchmark_serving.py CHECKPOINT [--seconds 10] [--clients 1 2 4 8 16 64] [SERVE OPTIONS]

Each client asks for a plan, and asks again as soon as it has it. `one at a time` is the same server with --max-batch 1;
`eager, one at a time` plans as most servers do, operator by operator. Run nothing else meanwhile.
"""

import argparse
import multiprocessing
import re
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np

import diffusion_policy as dp

PROCESSES = 4
"""That the clients are divided among."""


def ask(url: str, clients: int, seconds: float, times: Any) -> None:
    """Clients of one process, a thread each; what each request took, and what its plan took in the server [ms]."""
    found: list[tuple[float, float]] = []

    def work() -> None:
        remote = dp.connect(url, deadline=60)
        shapes, horizon = remote.observation_shapes.items(), remote.observation_horizon
        observations = {key: np.full((1, horizon, *shape), 0.3) for key, shape in shapes}
        noise = np.zeros((1, 1, *remote.noise_shape), np.float32)
        remote.sample(observations, noise)
        barrier.wait()
        ends = time.perf_counter() + seconds
        while (started := time.perf_counter()) < ends:
            remote.sample(observations, noise)
            found.append((1000 * (time.perf_counter() - started), remote.last_planning_ms))
        remote.close()

    barrier = threading.Barrier(clients)
    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times.put(found)


def measure(url: str, clients: int, seconds: float) -> np.ndarray:
    """(requests, 2) of `ask`, of all clients at once."""
    times = multiprocessing.Queue()
    shares = [len(part) for part in np.array_split(range(clients), min(PROCESSES, clients))]
    workers = [multiprocessing.Process(target=ask, args=(url, share, seconds, times)) for share in shares]
    for worker in workers:
        worker.start()
    found = np.concatenate([times.get() for _ in workers])
    for worker in workers:
        worker.join()
    return found


def serve(checkpoint: str, options: list[str]) -> tuple[subprocess.Popen[str], str]:
    """A server, and where it listens."""
    command = [sys.executable, "-m", "diffusion_policy.cli", "serve", "--checkpoint", checkpoint, "--port", "0"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in iter(process.stdout.readline, ""):
        found = re.search(r"serving at (\S+);", line)
        if found:
            return process, found[1]
    raise SystemExit("the server did not start")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    asked, options = parser.parse_known_args()
    kinds = {
        "batched": options,
        "one at a time": [*options, "--max-batch", "1"],
        "eager, one at a time": [*options, "--max-batch", "1", "--backend", "eager"],
    }
    print(f"{'server':22s} clients  requests/s     p50      p95      p99   [ms]   p50 less its plan")
    for name, told in kinds.items():
        process, url = serve(asked.checkpoint, told)
        try:
            for clients in asked.clients:
                times = measure(url, clients, asked.seconds)
                p50, p95, p99 = np.percentile(times[:, 0], (50, 95, 99))
                over = np.median(times[:, 0] - times[:, 1])
                rate = len(times) / asked.seconds
                print(
                    f"{name:22s} {clients:7d} {rate:10.1f}  {p50:8.2f} {p95:8.2f} {p99:8.2f}   {over:17.2f}", flush=True
                )
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
