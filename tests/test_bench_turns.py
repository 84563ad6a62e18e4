"""The order and number of turns in a benchmark, against a clock that says what the test wants."""

from collections import Counter
from itertools import pairwise

import pytest

from moect.bench.contestants import Contestant
from moect.bench.turns import dense_flops_per_second, take_turns


def scripted(costs):
    """Contestants, a clock that gives each its cost, and the order in which they were called."""
    called = []

    def measure(call):
        name, part = call()
        called.append((name, part))
        return costs[name] * (1 if part == "forward" else 3)

    contestants = [
        Contestant(name, "moect", lambda name=name: (name, "forward"), lambda name=name: (name, "both"))
        for name in costs
    ]
    return contestants, measure, called


def orders(seed):
    """The order of each of 60 rounds."""
    contestants, measure, called = scripted({"floor": 1.0, "a": 2.0, "b": 3.0})
    times = take_turns(contestants, "cpu", rounds=60, seed=seed, measure=measure)
    assert {name: (t.forward, t.forward_backward) for name, t in times.items()} == {
        "floor": ([1.0] * 60, [3.0] * 60),
        "a": ([2.0] * 60, [6.0] * 60),
        "b": ([3.0] * 60, [9.0] * 60),
    }
    names = [name for name, part in called if part == "forward"]
    assert called[1::2] == [(name, "both") for name in names]
    return [tuple(names[n : n + 3]) for n in range(0, len(names), 3)][1:]  # after the warm-up


def test_each_round_is_everybody_once_in_an_order_of_its_own():
    drawn = orders(seed=0)
    assert {frozenset(order) for order in drawn} == {frozenset({"floor", "a", "b"})}
    times_each = Counter(drawn)
    assert len(times_each) == 6 and min(times_each.values()) >= 4  # so nobody always comes after the same one
    assert orders(seed=0) == drawn != orders(seed=1)


def test_the_very_slow_take_part_in_a_quarter_of_the_rounds_evenly_spread():
    contestants, measure, called = scripted({"floor": 1.0, "slow": 8.1, "fair": 7.9})
    times = take_turns(contestants, "cpu", rounds=40, measure=measure)
    assert {name: t.rounds for name, t in times.items()} == {"floor": 40, "slow": 10, "fair": 40}
    floors = [sum(c == ("floor", "both") for c in called[:n]) for n, c in enumerate(called) if c == ("slow", "both")]
    assert {b - a for a, b in pairwise(floors[1:])} <= {3, 4, 5}
    times = take_turns(contestants, "cpu", rounds=6, measure=measure)
    assert times["slow"].rounds == 5


@pytest.mark.parametrize(
    ("cost", "seconds", "rounds"),
    [(0.01, 20, 101), (250.0, 20, 10), (60_000.0, 20, 5), (250.0, 60, 30), (250.0, 1e300, 101), (250.0, 1e-9, 5)],
)
def test_rounds_are_what_the_time_allows(cost, seconds, rounds):
    contestants, measure, _ = scripted({"floor": cost, "ours": cost})  # a round takes 8 x cost, in ms
    assert take_turns(contestants, "cpu", seconds=seconds, measure=measure)["ours"].rounds == rounds


def test_the_dense_rate_is_a_rate():
    assert dense_flops_per_second("cpu", size=32, rounds=2) > 0
