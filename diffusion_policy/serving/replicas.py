"""Replicas of a policy on a Ray cluster, by Ray Serve: another engine of the batcher.

A call brings all that its plans are made of, noise included: any replica gives the same answer, and one that is lost
takes nothing with it, so its call is made again. Knows Ray Serve. Knows no policy, and connects to no cluster.
"""

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from diffusion_policy.basics.text import one_line
from diffusion_policy.serving.batching import Busy, Job

log = logging.getLogger(__name__)

Plan = Callable[[Sequence[Job]], list[np.ndarray]]
"""See `batching.plan_jobs`."""

DEPLOYMENT = "policy"
RETRIES = 3
"""How often a call is made again after its replica was lost."""
PATIENCE = 60.0
"""How long a call waits for a replica and its answer [s]."""
MORE_AFTER, FEWER_AFTER = 5.0, 60.0
"""How long calls queue before a replica is added, and replicas are idle before one ends [s]."""
CHECKED_EVERY = 1.0
"""How soon it is noticed that a replica is lost, so that another begins [s]."""
ENDS_WITHIN = 5.0
"""How long a replica that is to end may go on with its call [s]."""


class _Replica:
    """One copy of the policy, in a process of its own."""

    def __init__(self, make_plan: Callable[[], Plan]) -> None:
        self._plan = make_plan()

    async def plan(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        """In the only thread of the replica's event loop, so one call after the other."""
        return self._plan(jobs)


class Replicas:
    """See `batching.Engine`."""

    def __init__(self, handle: Any, application: str, calls: int) -> None:
        """`handle`: of the deployment."""
        self._handle, self._application, self.calls = handle, application, calls

    def plan(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        """See `Engine`. Raises Busy where no replica answers in time, OSError for a call at which replicas die."""
        for _ in range(RETRIES + 1):
            response = self._handle.plan.remote(jobs)
            try:
                return response.result(timeout_s=PATIENCE)
            except RayTaskError as error:
                raise error.cause from None  # what planning itself raised
            except TimeoutError:
                response.cancel()
                raise Busy(f"no replica has answered within {PATIENCE:g} s") from None
            except RayServeException as error:
                raise Busy(f"no replica is there: {one_line(str(error))}") from None
            except RayError:
                log.warning("a replica was lost; what it was asked is asked again")
        raise OSError(f"{RETRIES + 1} replicas died at one call")

    def count_replicas(self) -> int:
        """See `Engine`."""
        application = serve.status().applications.get(self._application)
        if application is None or DEPLOYMENT not in application.deployments:
            return 0
        states = application.deployments[DEPLOYMENT].replica_states
        return sum(n for state, n in states.items() if state == "RUNNING")


@contextlib.contextmanager
def deploy(
    make_plan: Callable[[], Plan], *, least: int, most: int, cores: int, threads: int, gpus: int
) -> Iterator[Replicas]:
    """Within the context, `least` to `most` replicas on the cluster that is connected, as many as there are calls to
    make at once. `make_plan`: picklable; `cores` and `gpus`: that a replica takes of the cluster; `threads`: of its
    torch. Raises OSError with the reason where none begins."""
    application = f"diffusion-policy-{uuid.uuid4().hex[:8]}"
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    begun = not _is_running()
    scaling = {
        "min_replicas": least,
        "max_replicas": most,
        "target_ongoing_requests": 1,
        "upscale_delay_s": MORE_AFTER,
        "downscale_delay_s": FEWER_AFTER,
    }
    deployment = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=2,  # one is computed, one is there when it ends
        autoscaling_config=scaling,
        health_check_period_s=CHECKED_EVERY,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=ENDS_WITHIN,
        ray_actor_options={
            "num_cpus": cores,
            "num_gpus": gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        },
    )(_Replica)
    try:
        if begun:
            serve.start(proxy_location="Disabled")
        yield Replicas(_run(deployment.bind(make_plan), application), application, most)
    finally:
        with contextlib.suppress(RayError, RayServeException, TimeoutError):  # of a cluster that is gone
            serve.delete(application)
            if begun and not serve.status().applications:
                serve.shutdown()


def _run(bound: Any, application: str) -> Any:
    try:
        return serve.run(bound, name=application, route_prefix=None)
    except RuntimeError as error:  # with a traceback in the deployment's status
        told = serve.status().applications[application].deployments[DEPLOYMENT].message
        raise OSError(f"no replica could begin: {one_line(told.strip().splitlines()[-1])}") from error


def _is_running() -> bool:
    """Whether Ray Serve runs on the cluster already."""
    named: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    return any(actor["namespace"] == "serve" for actor in named)


def cores_of_each(replicas: int, threads: int) -> int:
    """Cores that a replica of so many threads takes of the cluster that is connected, so that all have a place."""
    of_nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return max(1, min(threads, sum(of_nodes) // replicas, max(of_nodes)))
