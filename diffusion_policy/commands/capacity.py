"""How many servers a rate of plans needs: `diffusion-policy serve --plan 1000/min`.

    latency = sampling steps x cost of a step        throughput = rows of a call / latency

The cost of a step is the difference of two plans, one with half of the steps. What is measured stands beside it.
"""

import math
import re
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from rich.table import Table

from diffusion_policy.commands.terminal import console, out
from diffusion_policy.config import ConfigError
from diffusion_policy.control.latency import time_plans
from diffusion_policy.control.planner import Planner
from diffusion_policy.report.text import NOTHING

PER_SECOND = {"s": 1.0, "min": 60.0, "h": 3600.0}
BUSY = 0.7
"""Share of the time for which a server may plan: beyond that requests queue up."""
PLANS = 20
"""That a time is taken from."""


class Call(NamedTuple):
    """A call of so many rows."""

    rows: int
    milliseconds: float
    predicted: float | None
    """By the formula; None where the steps cannot be changed, as in an export."""

    @property
    def per_second(self) -> float:
        """Plans that such calls, one after the other, give in a second."""
        return 1000 * self.rows / self.milliseconds


def read_rate(text: str) -> float:
    """Plans a second of a text such as 1000/min; raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*/\s*(s|min|h)", text.strip())
    if found is None or not 0 < float(found[1]) < 1e9:
        raise ConfigError(f"plan must be a rate such as 1000/min, 20/s or 500/h; got {text!r:.60}")
    return float(found[1]) / PER_SECOND[found[2]]


def measure_calls(planner: Planner, rows: list[int], steps: int, halved: Planner | None) -> list[Call]:
    """Calls of so many rows. `halved`: plans with `steps` // 2 steps."""
    calls = []
    for count in rows:
        took = statistics.median(time_plans(planner, count, PLANS))
        predicted = None
        if halved is not None:
            cost = (took - statistics.median(time_plans(halved, count, PLANS))) / (steps - steps // 2)
            predicted = steps * max(cost, 0.0)
        calls.append(Call(count, took, predicted))
    return calls


def count_servers(calls: list[Call], rate: float) -> int:
    """Servers that give so many plans a second, each busy for at most `BUSY` of the time."""
    return math.ceil(rate / (BUSY * max(call.per_second for call in calls)))


def tell(calls: list[Call], asked: str, rate: float, described: Mapping[str, object]) -> None:
    """Print what was measured, and how many servers it comes to."""
    table = Table("plans in a call", "measured", "steps x step cost", "plans a second", box=None)
    for call in calls:
        predicted = NOTHING if call.predicted is None else f"{call.predicted:.1f} ms"
        table.add_row(str(call.rows), f"{call.milliseconds:.1f} ms", predicted, f"{call.per_second:.0f}")
    console.print(table)
    servers = count_servers(calls, rate)
    best = max(calls, key=lambda call: call.per_second)
    out.print(
        f"{asked} is {rate:.3g} plans a second, by {described['backend']} {rate / best.per_second:.0%} of what one "
        f"such machine gives: {servers} {'server' if servers == 1 else 'servers'}"
        f"{f' (or one with --engine ray --replicas {servers})' if servers > 1 else ''}, each at most {BUSY:.0%} busy",
        soft_wrap=True,
    )
