"""Weights of the sources, and the order in which they are drawn."""

import numpy as np
import pytest

from moect.data.mixture import Mixture, source_weights
from moect.errors import ConfigError


def weights(tokens, roles, explicit=None, replay=None, temperature=1.0):
    return source_weights(tokens, roles, explicit or [None] * len(tokens), replay, temperature).tolist()


def test_without_replay_sources_share_by_tokens():
    assert weights([100, 300], ["old", "new"]) == [0.25, 0.75]


def test_temperature_flattens_the_shares():
    assert weights([100, 900], ["new", "new"], temperature=2.0) == pytest.approx([0.25, 0.75])


def test_replay_is_the_share_of_old_rows_and_weights_divide_it():
    got = weights([10, 30, 5, 5], ["old", "old", "new", "new"], [None, None, 3.0, 1.0], replay=0.2)
    assert got == pytest.approx([0.05, 0.15, 0.6, 0.2])


def test_replay_zero_leaves_old_sources_out():
    assert weights([10, 30], ["old", "new"], replay=0.0) == [0.0, 1.0]


def test_a_role_that_is_alone_gets_everything():
    assert weights([10, 30], ["old", "old"], replay=0.2) == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize(
    ("explicit", "replay", "roles", "message"),
    [
        ([0.0, 0.0], None, ["old", "new"], "no source is left"),
        ([0.0, 1.0], 0.5, ["old", "new"], "role `old` has weight 0"),
        ([None, None], 0.0, ["old", "old"], "no source is left"),
        ([float("inf"), 1.0], None, ["old", "new"], "not a finite number"),
    ],
)
def test_weights_that_leave_nothing_to_draw_are_refused(explicit, replay, roles, message):
    with pytest.raises(ConfigError, match=message):
        weights([10, 10], roles, explicit, replay)


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.5], [0.9, 0.1], [0.25, 0.35, 0.4], [0.7, 0.2, 0.05, 0.05]], ids=str)
def test_shares_are_exact_within_one_row_at_every_moment(shares):
    mixture = Mixture(np.array(shares))
    for row in range(1, 2001):
        mixture.next()
        assert np.abs(np.array(shares) * row - mixture.drawn).max() < 1
    assert sum(mixture.drawn) == 2000


def test_no_source_is_a_whole_row_ahead_and_none_starves_among_many():
    rng = np.random.default_rng(0)
    for _ in range(10):
        shares = rng.dirichlet(np.full(30, 0.3)) + 1e-6
        shares /= shares.sum()
        mixture = Mixture(shares)
        for row in range(1, 1001):
            mixture.next()
            behind = shares * row - mixture.drawn
            assert behind.min() > -1 and behind.max() < 1.5


def test_a_source_of_weight_zero_is_never_drawn_and_ties_go_to_the_first():
    mixture = Mixture(np.array([0.0, 0.5, 0.5]))
    assert [mixture.next() for _ in range(6)] == [1, 2, 1, 2, 1, 2]
    resumed = Mixture(np.array([0.0, 0.1, 0.9]), [500, 0, 500])  # drawn under other weights
    assert {resumed.next() for _ in range(2000)} == {1, 2}


def test_the_order_goes_on_from_the_drawn_counts_alone():
    shares = np.array([0.3, 0.6, 0.1])
    whole = Mixture(shares)
    order = [whole.next() for _ in range(100)]
    first = Mixture(shares)
    assert [first.next() for _ in range(37)] == order[:37]
    assert [Mixture.next(second) for second in [Mixture(shares, first.drawn)] * 63] == order[37:]
