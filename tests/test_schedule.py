"""The learning rate against values worked out by hand."""

import math

import pytest

from moect.config import TrainConfig
from moect.train.schedule import learning_rate


def rates(**values):
    train = TrainConfig(**{"lr": 1.0, "min_lr": 0.2, **values})
    return [learning_rate(step, train) for step in range(train.steps)]


def test_cosine_warms_up_linearly_and_ends_at_the_smallest_rate():
    # 4 steps of warm-up, then 5 points of half a cosine from 1 to 0.2: the middle 0.6, the quarters 0.6 ± 0.4·cos 45°
    quarter = 0.4 * math.sqrt(0.5)
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.6 + quarter, 0.6, 0.6 - quarter, 0.2]
    assert rates(schedule="cosine", steps=9, warmup=4) == pytest.approx(expected)


def test_wsd_stays_and_then_falls_linearly_over_the_last_share():
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert rates(schedule="wsd", steps=10, warmup=2, decay=0.4) == pytest.approx(expected)


def test_constant_is_flat_after_the_warm_up():
    assert rates(schedule="constant", steps=5, warmup=2) == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0])


def test_wsd_without_decay_is_flat():
    assert rates(schedule="wsd", steps=4, decay=0.0) == [1.0] * 4


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_every_rate_is_positive_and_at_most_the_peak(schedule):
    found = rates(schedule=schedule, steps=17, warmup=5, min_lr=0.0, decay=1.0, lr=3e-4)
    assert all(0 <= rate <= 3e-4 for rate in found) and found[4] == 3e-4
    assert [rate for rate in found[:-1] if rate == 0] == []


def test_one_step_without_warm_up_has_the_peak_rate():
    assert rates(schedule="cosine", steps=1) == [1.0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_rate_depends_on_the_step_alone(schedule):
    train = TrainConfig(schedule=schedule, steps=50, warmup=7, lr=1.0)
    forwards = {step: learning_rate(step, train) for step in range(50)}
    assert {step: learning_rate(step, train) for step in reversed(range(50))} == forwards
