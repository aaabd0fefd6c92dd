"""The traffic of Intersection, as pure functions: lanes, drivers, what the other driver intends and how likely it is.

A lane is measured from where a car waits at the line, s = 0, forwards [m]; (0, 0) is the middle of the junction, x to
the east and y to the north, and cars keep to the right. Knows numbers. Knows no environment.
"""

import math
from typing import NamedTuple

import numpy as np

MODES = ("yields", "merges", "brakes")
"""What car 1 intends: it stops at its line until the others have passed, gently; it goes first, and so crosses or turns
in before the ego car; it drives on as if to go first, and then brakes hard."""
CONTROL_PERIOD, SUBSTEPS = 0.1, 5
"""[s], and steps of the integration in it."""
HIDDEN_STEPS = 20
"""Control steps in which nothing depends on the intention."""
LENGTH, WIDTH = 4.6, 1.9
"""Of a car [m]."""
OFFSET = 1.75
"""From the middle of the road to that of a lane [m]."""
HALF = 10.0
"""From the middle of the junction to its edge, where turns begin [m]."""
STOP = HALF + LENGTH / 2 + 0.5
"""From the middle of the junction to the middle of a car that waits [m]."""
LEAST_ACCELERATION, MOST_ACCELERATION = -8.0, 3.0
"""[m/s^2]"""
ACCELERATION, DECELERATION, HEADWAY, JAM_DISTANCE = 2.0, 3.0, 1.0, 2.0
"""Of the drivers [m/s^2, m/s^2, s, m]."""
GOING, GIVING_WAY = 1.02, 0.9
"""Shares of its usual speed above which a driver shows that it goes first, and below which that it waits."""
COMMITTED = 7.0
"""Who could wait only by braking more than this drives on [m/s^2]."""
REACH = (LENGTH + WIDTH) / 2 + 1
"""Two cars whose lanes cross are apart where one of them is farther than this from the crossing [m]."""
READ_STEP, YIELDING = 31, 0.5
"""Step at which a trajectory tells gentle from hard braking, and the share of a gentle driver's loss of way until then
that is taken for one."""


class Lane(NamedTuple):
    """Where a car drives."""

    heading: float
    """On the way to the junction [rad]."""
    turn: int = 0
    """1: left, -1: right, 0: straight on."""

    def place(self, s: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Of places s (...): positions (..., 2) [m] and headings (...) [rad]."""
        s = np.asarray(s, dtype=np.float64)
        ahead = np.array([math.cos(self.heading), math.sin(self.heading)])
        left = np.array([-ahead[1], ahead[0]])
        if not self.turn:
            return (s - STOP)[..., None] * ahead - OFFSET * left, np.full(s.shape, self.heading)
        radius, entry = HALF + self.turn * OFFSET, STOP - HALF
        angle = np.clip((s - entry) / radius, 0, math.pi / 2)
        beyond = np.maximum(s - entry - radius * math.pi / 2, 0)
        forwards = np.minimum(s - STOP, -HALF) + radius * np.sin(angle)
        sideways = self.turn * (radius * (1 - np.cos(angle)) + beyond) - OFFSET
        return forwards[..., None] * ahead + sideways[..., None] * left, self.heading + self.turn * angle

    @property
    def conflict(self) -> tuple[float, float]:
        """Where this lane meets the ego car's: the place in this lane, and in the ego car's [m]."""
        if self.turn:
            return STOP - HALF + (HALF + self.turn * OFFSET) * math.pi / 2, STOP + HALF
        side = OFFSET * math.cos(self.heading)  # from the west it crosses the ego car's lane later, and nearer to it
        return STOP + side, STOP - side


EGO_LANE = Lane(math.pi / 2)
"""Northwards, straight on."""
OTHER_LANES = (Lane(math.pi), Lane(0.0), Lane(math.pi, -1), Lane(0.0, 1))
"""Of car 1: from the east and from the west, straight on or into the ego car's lane."""


class Style(NamedTuple):
    """How car 1 drives, whatever it intends."""

    pull: float
    """Acceleration with which it shows that it goes first [m/s^2]."""
    brake: float
    """Deceleration of its hard braking [m/s^2]."""


def mode_probabilities(time_ahead: float, eagerness: float) -> np.ndarray:
    """Of MODES, (3,): a softmax. `time_ahead`: by how much sooner car 1 reaches its line than the ego car at the speeds
    of the start [s]; `eagerness`: its speed, from -1 for the slowest drivers of its lane to 1 for the fastest."""
    lead = (time_ahead - 0.1) / 0.35
    scores = np.array([-0.85 * lead, 0.85 * lead, 1.2 * eagerness - 0.3])
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def idm(speed: float, usual: float, gap: float = math.inf, closing: float = 0.0) -> float:
    """Acceleration of the Intelligent Driver Model (Treiber et al. 2000, Phys. Rev. E 62), bounded [m/s^2]. `usual`:
    the desired speed; `gap`: to the car in front, bumper to bumper [m]; `closing`: speed towards it [m/s]."""
    free = 1 - (speed / usual) ** 4
    wanted = JAM_DISTANCE + max(0.0, speed * HEADWAY + speed * closing / (2 * math.sqrt(ACCELERATION * DECELERATION)))
    acceleration = ACCELERATION * (free - (wanted / max(gap, 0.1)) ** 2)
    return min(max(acceleration, LEAST_ACCELERATION), MOST_ACCELERATION)


def follow(speed: float, usual: float, s: float, ahead: list[tuple[float, float]]) -> float:
    """`idm` behind the nearest of the cars `ahead` in the lane, each a place and a speed."""
    before = [(place - s - LENGTH, speed - its) for place, its in ahead if place > s]
    return idm(speed, usual, *min(before)) if before else idm(speed, usual)


def stop_at(speed: float, gap: float) -> float:
    """The constant deceleration that ends in a gap [m/s^2]."""
    return max(-(speed**2) / (2 * gap), LEAST_ACCELERATION) if gap > 0.05 else LEAST_ACCELERATION


def ego_expert(
    s: float,
    speed: float,
    usual: float,
    other: tuple[float, float, float],
    lane: Lane,
    ahead: list[tuple[float, float]],
) -> float:
    """Acceleration of the ego car's driver. `other`: place, speed and usual speed of car 1, in its `lane`; `ahead`:
    cars in the ego car's lane. It waits at its line while car 1 shows that it goes first, if it still can."""
    acceleration = follow(speed, usual, s, ahead)
    place, its, its_usual = other
    gone = place > lane.conflict[0] + (0 if lane.turn else REACH)
    waits = place < 0.5 and its < GIVING_WAY * its_usual
    goes_first = not gone and not waits and (its > GOING * its_usual or place > 0.5)
    if goes_first and s < 0 and speed**2 / (2 * -s) < COMMITTED:
        acceleration = min(acceleration, idm(speed, usual, JAM_DISTANCE - s, speed))
    return acceleration


def drive_other(
    mode: str, style: Style, s: float, speed: float, usual: float, clear: bool, ahead: list[tuple[float, float]]
) -> float:
    """Acceleration of car 1 once it does what it intends. `clear`: whether those that it waits for have passed;
    `ahead`: cars in the lane that it is in."""
    if mode == "merges":
        return min(follow(speed, 1.2 * usual, s, ahead), style.pull) if speed < 1.15 * usual else 0.0
    if clear:
        return follow(speed, usual, s, ahead)
    needed = stop_at(speed, -s)
    if mode == "brakes" and -needed < style.brake and speed > GIVING_WAY * usual:
        return style.pull if speed < 1.15 * usual else 0.0
    return needed


def classify(positions: np.ndarray) -> np.ndarray:
    """What car 1 did, as an index of MODES, of trajectories (..., steps, cars, 2) [m] that begin at an episode's first
    step, whether they were driven or forecast: (...) int64, -1 where they are too short to tell.

    It merges if it is beyond its line before the ego car has passed the middle of the junction. Else it yields if,
    1.1 s after its intention shows, it has lost at least half as much way as by braking evenly to its line; else it
    brakes.
    """
    steps = positions.shape[-3]
    if steps <= READ_STEP + 10:
        return np.full(positions.shape[:-3], -1)
    ego, other = positions[..., 0, :], positions[..., 1, :]  # (..., steps, 2)
    known = other[..., HIDDEN_STEPS - 1, :]
    way = known - other[..., HIDDEN_STEPS - 6, :]  # of half a second
    speed = np.linalg.norm(way, axis=-1) / (5 * CONTROL_PERIOD)
    ahead = way / np.maximum(np.linalg.norm(way, axis=-1, keepdims=True), 1e-9)
    s = STOP + (other * ahead[..., None, :]).sum(-1)  # (..., steps), true before it turns
    first = _first(s > 1.5) < _first(ego[..., 1] > 0)
    seconds = CONTROL_PERIOD * (READ_STEP - HIDDEN_STEPS)
    even = speed**2 / np.maximum(-4 * s[..., HIDDEN_STEPS - 1], 0.1) * seconds**2
    driven = s[..., READ_STEP] - s[..., HIDDEN_STEPS - 1]
    lost = speed * (seconds + CONTROL_PERIOD) - driven
    return np.where(first, 1, np.where(lost > YIELDING * even, 0, 2))


def _first(reached: np.ndarray) -> np.ndarray:
    """The first step at which (..., steps) is true; the number of steps where it never is."""
    return np.where(reached.any(-1), reached.argmax(-1), reached.shape[-1])


def overlap(places: np.ndarray, headings: np.ndarray) -> bool:
    """Whether any two of the cars at `places` (cars, 2) with `headings` (cars,) touch: no side of either parts them."""
    ahead = np.stack([np.cos(headings), np.sin(headings)], -1)  # (cars, 2)
    axes = np.stack([ahead, np.stack([-ahead[:, 1], ahead[:, 0]], -1)], 1)  # (cars, 2 axes, 2)
    half = np.array([LENGTH / 2, WIDTH / 2])
    i, j = np.triu_indices(len(places), 1)
    sides = np.concatenate([axes[i], axes[j]], 1)  # (pairs, 4, 2) that may part them
    apart = np.abs(np.einsum("pkx,px->pk", sides, places[j] - places[i]))
    reach = sum(np.abs(np.einsum("pkx,pax->pka", sides, axes[each])) @ half for each in (i, j))
    return bool((apart <= reach).all(1).any())
