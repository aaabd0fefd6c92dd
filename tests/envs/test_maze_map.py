"""The maze as geometry: distances, classes of paths, shortest ways."""

import heapq
import math
from collections import Counter

import numpy as np
import pytest

from diffusion_policy.envs import maze_map
from diffusion_policy.envs.maze_map import BLOCKS, CUTS, DISC_RADIUS, MODES, ROOM, WORDS, class_of, reduced, word_of
from diffusion_policy.envs.maze_paths import FACTOR, GROWN, classes, graph, shortest_length, shortest_ways

A, B, C, D, E = BLOCKS


def free_points(count: int, seed: int, gap: float = 0.15) -> np.ndarray:
    """Points (count, 2) at least so far from the walls."""
    points = np.random.default_rng(seed).uniform(-ROOM, ROOM, (20 * count, 2))
    return points[maze_map.wall_distance(points) > gap][:count]


def around(block: maze_map.Block, turns: int = 1, gap: float = 0.2) -> np.ndarray:
    """A loop clockwise around a block, from below."""
    (x, y), (w, h) = block.center, (block.half[0] + gap, block.half[1] + gap)
    corners = [(x, y - h), (x - w, y - h), (x - w, y + h), (x + w, y + h), (x + w, y - h), (x, y - h)]
    return np.array([corners[0], *corners[1:] * turns])


# Distances


def test_distances_to_the_walls_are_those_of_the_nearest_point_of_a_dense_outline() -> None:
    outline = []
    for (x, y), (w, h) in [*((block.center, block.half) for block in BLOCKS), ((0.0, 0.0), (ROOM, ROOM))]:
        side = np.linspace(-1, 1, 2001)
        for sign in (-1, 1):
            outline += [np.stack([x + w * side, np.full(2001, y + sign * h)], 1)]
            outline += [np.stack([np.full(2001, x + sign * w), y + h * side], 1)]
    outline = np.concatenate(outline)
    points = np.random.default_rng(0).uniform(-2.2, 2.2, (200, 2))
    nearest = np.array([np.linalg.norm(outline - point, axis=1).min() for point in points])
    signed = maze_map.wall_distance(points)
    np.testing.assert_allclose(np.abs(signed), nearest, atol=1e-3)
    inside = (np.abs(points) > ROOM).any(axis=1)
    for block in BLOCKS:
        inside |= (np.abs(points - block.center) < block.half).all(axis=1)
    np.testing.assert_array_equal(signed < 0, inside)


def test_discs_of_no_radius_are_none_and_the_nearest_counts() -> None:
    discs = np.array([(0.5, 0.0, 0.1), (0.0, 0.0, 0.0), (-1.0, 0.0, 0.2)])
    points = np.array([[(0.0, 0.0), (0.5, 0.05)], [(-1.0, 0.5), (0.5, 0.3)]])
    np.testing.assert_allclose(maze_map.disc_distance(points, discs), [[0.4, -0.05], [0.3, 0.2]])
    assert (maze_map.disc_distance(points, discs[1:2]) == np.inf).all()
    assert (maze_map.distance(points) == maze_map.wall_distance(points)).all()


def test_the_clearance_of_a_path_is_that_of_its_nearest_point() -> None:
    x = E.center[0]
    paths = np.array([[(x - 0.4, 0.5), (x, 0.5), (x + 0.4, 0.5)], [(x - 0.4, 0.35), (x, 0.35), (x + 0.4, 0.35)]])
    np.testing.assert_allclose(maze_map.clearance(paths), [0.1, -0.05], atol=1e-9)
    obstacle = np.array([(x + 0.2, 0.5, 0.1)])  # between two points of the path
    assert maze_map.clearance(paths[0], obstacle) == pytest.approx(-0.2)


# Classes


@pytest.mark.parametrize("path, label", [
    ([(-1.8, 0.0), (-1.8, 1.7), (1.8, 1.7)], "A-C-B"),
    ([(1.8, 1.7), (-1.8, 1.7)], "b-c-a"),
    ([(-0.6, -1.7), (1.8, -1.7)], "below"),
    ([(-0.6, -0.5), (1.8, -0.5)], "C"),
    ([(-0.6, 0.5), (0.5, 0.5)], "E"),
    ([(-1.8, 0.45), (0.5, 0.45), (0.5, -0.5), (-0.6, -0.5)], "D-E"),
])  # fmt: skip
def test_a_class_names_the_blocks_above_which_a_path_passes(path: list, label: str) -> None:
    assert class_of(np.array(path)) == label


@pytest.mark.parametrize("block, word", [(A, "dAe"), (B, "B"), (C, "C"), (D, "D"), (E, "E")])
def test_a_loop_around_a_block_is_a_word_as_often_as_it_turns(block: maze_map.Block, word: str) -> None:
    for turns in (1, 2, 3):
        assert word_of(around(block, turns)) == word * turns  # the cuts of D and E end in A
        assert word_of(around(block, turns)[::-1]) == word.swapcase()[::-1] * turns
    there_and_back = np.concatenate([around(block), around(block)[::-1]])
    assert word_of(there_and_back) == ""


def test_words_are_a_group() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        one, other, third = ("".join(rng.choice(list("ABab"), rng.integers(0, 8))) for _ in range(3))
        assert reduced(reduced(one + other) + third) == reduced(one + reduced(other + third))
        assert reduced(one + one.swapcase()[::-1]) == ""


def test_small_deformations_and_other_samplings_keep_the_class() -> None:
    rng = np.random.default_rng(1)
    for start, goal in free_points(40, 2).reshape(20, 2, 2):
        for way in shortest_ways(start, goal):
            at = np.sort(np.concatenate([[0, 1], rng.uniform(0, 1, 200)]))
            length = np.append(0, np.cumsum(np.linalg.norm(np.diff(way.points, axis=0), axis=1)))
            dense = np.stack([np.interp(at * length[-1], length, way.points[:, axis]) for axis in range(2)], 1)
            dense[1:-1] += rng.uniform(-0.05, 0.05, (200, 2))
            assert word_of(dense) == way.word


def test_cuts_leave_no_gap() -> None:
    for cut in CUTS:
        ends = np.array([(cut.x, cut.low), (cut.x, cut.high)])
        assert (maze_map.wall_distance(ends) < -0.1).all()


def test_modes_are_there_and_back_and_none_takes_a_crossing_back() -> None:
    assert len(MODES) == len(set(MODES)) == len(WORDS) == 57
    assert {word.swapcase()[::-1] for word in WORDS} == WORDS
    assert all(reduced(word) == word for word in WORDS)


def test_almost_all_classes_that_exist_are_modes() -> None:
    found = Counter()
    for start, goal in free_points(400, 3, gap=0.2).reshape(200, 2, 2):
        found.update(way.word for way in graph().ways(start, goal, FACTOR))
    assert sum(found[word] for word in found.keys() - WORDS) <= 0.01 * found.total()
    assert len(found.keys() & WORDS) > 35


@pytest.mark.slow
def test_every_mode_exists_for_some_start_and_goal() -> None:
    found: set[str] = set()
    for start, goal in free_points(16_000, 4, gap=0.15).reshape(-1, 2, 2):
        found |= set(classes(start, goal))
    assert found == set(MODES)


# Shortest ways


def on_a_grid(start: np.ndarray, goal: np.ndarray, most: float, step: float = 0.05) -> dict[str, float]:
    """The shortest way of each class over the points of a grid and their 16 neighbours, by Dijkstra in the covering
    space."""
    places = np.arange(-ROOM, ROOM + step / 2, step)
    free = maze_map.wall_distance(np.stack(np.meshgrid(places, places, indexing="ij"), -1)) >= DISC_RADIUS - 1e-9
    moves = [(i, j) for i in range(-2, 3) for j in range(-2, 3) if math.gcd(i, j) == 1]
    begin, end = (tuple(round((x + ROOM) / step) for x in point) for point in (start, goal))
    queue, done, found = [(0.0, begin, "")], set(), {}
    while queue:
        length, (i, j), word = heapq.heappop(queue)
        if length > most:
            break
        if ((i, j), word) in done:
            continue
        done.add(((i, j), word))
        if (i, j) == end:
            found[word] = length
        for di, dj in moves:
            to = (i + di, j + dj)
            half = (i + di // 2, j + dj // 2), (i - -di // 2, j - -dj // 2)  # between them, where it jumps
            if all(0 <= k < len(places) for k in to) and free[to] and all(free[k] for k in half):
                crossed = ""
                for cut in CUTS:
                    x0, x1 = places[i], places[to[0]]
                    if (x0 < cut.x) != (x1 < cut.x):
                        y = places[j] + (cut.x - x0) / (x1 - x0) * (places[to[1]] - places[j])
                        crossed += (cut.name if x0 < cut.x else cut.name.lower()) if cut.low < y < cut.high else ""
                heapq.heappush(queue, (length + step * math.hypot(di, dj), to, reduced(word + crossed)))
    return found


@pytest.mark.parametrize("start, goal", [((1.75, -0.5), (-1.75, 0.5)), ((-0.6, -0.55), (1.75, 1.0))])
def test_the_classes_are_those_that_a_search_over_a_grid_finds(start: tuple, goal: tuple) -> None:
    start, goal = np.array(start), np.array(goal)
    ways = {way.word: way.length for way in graph().ways(start, goal, FACTOR)}
    shortest = min(ways.values())
    over_grid = on_a_grid(start, goal, most=1.05 * FACTOR * shortest)
    assert len(ways) >= 4
    for word, length in ways.items():  # sixteen directions lengthen a way by at most 2.8 %
        assert length - 0.01 <= over_grid.get(word, 0) <= 1.04 * length + 0.05
    missing = over_grid.keys() - ways.keys()
    assert all(over_grid[word] > FACTOR * shortest for word in missing)


def test_ways_touch_nothing_and_have_the_word_and_the_length_that_they_say() -> None:
    for start, goal in free_points(60, 5).reshape(30, 2, 2):
        ways = graph().ways(start, goal, FACTOR)
        assert [way.length for way in ways] == sorted(way.length for way in ways)
        assert len({way.word for way in ways}) == len(ways)
        for way in ways:
            assert word_of(way.points) == way.word
            assert np.linalg.norm(np.diff(way.points, axis=0), axis=1).sum() == pytest.approx(way.length)
            assert maze_map.clearance(way.points, parts=100) > GROWN - DISC_RADIUS - 1e-6
            alone = graph().ways(start, goal, FACTOR, wanted=way.word)
            assert [(one.word, one.length) for one in alone] == [(way.word, way.length)]


def test_there_and_back_are_the_same_ways() -> None:
    for start, goal in free_points(20, 6).reshape(10, 2, 2):
        there = {way.word.swapcase()[::-1]: round(way.length, 9) for way in graph().ways(start, goal, FACTOR)}
        assert there == {way.word: round(way.length, 9) for way in graph().ways(goal, start, FACTOR)}


def test_the_shortest_way_around_a_corner_is_two_tangents_and_an_arc() -> None:
    x, y = C.center[0] - C.half[0], C.center[1] + C.half[1]
    start, goal = (
        np.array([x - 0.1, y - 0.4]),
        np.array([x + 0.5, y + 0.1]),
    )  # straight up, then straight right, at the disc's radius
    exact = 0.4 + math.pi / 2 * DISC_RADIUS + 0.5
    assert exact - 0.02 <= shortest_ways(start, goal)[0].length <= exact + 1e-9


def test_shortest_lengths_obey_the_triangle() -> None:
    for start, goal, other in free_points(60, 7).reshape(20, 3, 2):
        around = shortest_length(start, other) + shortest_length(other, goal)
        assert np.linalg.norm(goal - start) - 1e-9 <= shortest_length(start, goal) <= around + 1e-9


def test_obstacles_close_classes_and_lengthen_ways() -> None:
    start, goal = np.array([-0.6, -0.5]), np.array([0.45, 0.6])
    before = shortest_ways(start, goal)
    dam = np.array([(-0.6, 0.0, 0.2)])  # fills the corridor between D and E
    after = shortest_ways(start, goal, dam)
    assert "E" in {way.word for way in before} - {way.word for way in after}
    assert after[0].length > before[0].length
    beside = np.array([(0.35, 0.55 - 0.4, 0.1)])
    lengths = {way.word: way.length for way in shortest_ways(start, goal, beside)}
    assert all(lengths.get(way.word, math.inf) >= way.length - 1e-9 for way in before)
    assert classes(start, np.array(A.center)) == ()
    closed = np.array([(x, y, 0.2) for x, y in [(-0.6, -0.2), (-0.9, -0.5), (-0.6, -0.75), (-0.3, -0.55)]])
    assert shortest_ways(start, goal, closed) == []
    assert shortest_length(start, goal, closed) == math.inf
