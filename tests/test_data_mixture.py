"""Shares of the corpora, their limits, and the order in which they are drawn."""

import numpy as np
import pytest

from moect.data.batches.mixture import Mixture, corpus_weights, limit_shares
from moect.errors import ConfigError


def weights(tokens, roles, explicit=None, replay=None, temperature=1.0):
    return corpus_weights(tokens, roles, explicit or [None] * len(tokens), replay, temperature).tolist()


def test_without_replay_corpora_share_by_tokens():
    assert weights([100, 300], ["old", "new"]) == [0.25, 0.75]


def test_temperature_flattens_the_shares():
    assert weights([100, 900], ["new", "new"], temperature=2.0) == pytest.approx([0.25, 0.75])


def test_replay_is_the_share_of_old_rows_and_weights_divide_it():
    got = weights([10, 30, 5, 5], ["old", "old", "new", "new"], [None, None, 3.0, 1.0], replay=0.2)
    assert got == pytest.approx([0.05, 0.15, 0.6, 0.2])


def test_replay_zero_leaves_old_corpora_out():
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


def test_no_corpus_is_a_whole_row_ahead_and_none_starves_among_many():
    rng = np.random.default_rng(0)
    for _ in range(10):
        shares = rng.dirichlet(np.full(30, 0.3)) + 1e-6
        shares /= shares.sum()
        mixture = Mixture(shares)
        for row in range(1, 1001):
            mixture.next()
            behind = shares * row - mixture.drawn
            assert behind.min() > -1 and behind.max() < 1.5


def test_a_corpus_of_weight_zero_is_never_drawn_and_ties_go_to_the_first():
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


def unimax(sizes: list[float], budget: float, epochs: float) -> list[float]:
    """Algorithm 1 of the paper: from the smallest language up, an equal part of what is left, or all it may give."""
    shares = [0.0] * len(sizes)
    for done, i in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        shares[i] = min(budget / (len(sizes) - done), sizes[i] * epochs)
        budget -= shares[i]
    return [share / sum(shares) for share in shares]


@pytest.mark.parametrize("epochs", [0.5, 1, 4, 16])
def test_equal_shares_with_limits_are_those_of_unimax(epochs):
    rng = np.random.default_rng(1)
    for _ in range(50):
        sizes = rng.lognormal(4, 2, 12)
        budget = sizes.sum() * rng.uniform(0.1, epochs)
        got, crowded = limit_shares(np.full(12, 1 / 12), sizes * epochs / budget, ["any"] * 12)
        assert crowded == [] and got == pytest.approx(unimax(sizes.tolist(), budget, epochs))


def test_what_limits_take_from_one_goes_to_the_others_of_its_group_in_proportion():
    """There is one factor for a group: every share is its own times the factor, or at its limit."""
    rng = np.random.default_rng(2)
    for _ in range(50):
        shares = rng.dirichlet(np.full(9, 0.7))
        groups = ["old"] * 3 + ["new"] * 6
        limits = shares * rng.uniform(0.3, 4.0, 9)
        for at in (slice(0, 3), slice(3, 9)):
            limits[at] *= max(1.0, 1.2 * shares[at].sum() / limits[at].sum())  # so that there is room
        got, crowded = limit_shares(shares, limits, groups)
        assert crowded == [] and (got <= limits * (1 + 1e-12)).all()
        for at in (slice(0, 3), slice(3, 9)):
            assert got[at].sum() == pytest.approx(shares[at].sum())
            low, high = 0.0, 1e6
            for _ in range(200):  # the factor by bisection
                factor = (low + high) / 2
                enough = np.minimum(limits[at], shares[at] * factor).sum() > shares[at].sum()
                low, high = (low, factor) if enough else (factor, high)
            assert got[at] == pytest.approx(np.minimum(limits[at], shares[at] * high), rel=1e-6)


def test_limits_that_leave_too_little_are_exceeded_by_the_same_factor_and_told():
    got, crowded = limit_shares(np.array([0.5, 0.3, 0.2]), np.array([1.0, 0.1, 0.15]), ["old", "new", "new"])
    assert got == pytest.approx([0.5, 0.2, 0.3]) and crowded == ["new"]


def test_limits_above_all_shares_change_no_bit_and_a_share_of_zero_stays():
    shares = np.array([0.1, 0.2, 0.7, 0.0])
    got, crowded = limit_shares(shares, np.full(4, np.inf), ["any"] * 4)
    assert got.tolist() == shares.tolist() and crowded == []
    got, _ = limit_shares(np.array([0.9, 0.1, 0.0]), np.array([0.5, 1.0, 1.0]), ["any"] * 3)
    assert got == pytest.approx([0.5, 0.5, 0.0])


def test_after_a_change_the_new_shares_are_exact_within_one_row_and_the_past_is_not_made_up_for():
    mixture = Mixture(np.array([0.9, 0.1]))
    for _ in range(1000):
        mixture.next()
    ahead = mixture.copy()
    mixture.change(np.array([0.2, 0.8]))
    for row in range(1, 501):
        mixture.next()
        since = np.array(mixture.drawn) - [900, 100]
        assert np.abs(np.array([0.2, 0.8]) * row - since).max() < 1
    assert mixture.drawn == [1000, 500] and ahead.drawn == [900, 100]
    assert [(s.row, s.drawn) for s in mixture.segments] == [(0, (0, 0)), (1000, (900, 100))]
    again = Mixture(mixture.weights, mixture.drawn, mixture.segments)
    assert [again.next() for _ in range(50)] == [mixture.next() for _ in range(50)]


@pytest.mark.parametrize("seed", range(20))
def test_crowded_corpora_come_to_the_same_multiple_of_their_limits_whatever_was_read_before(seed):
    draw = np.random.default_rng(seed)
    limits, read = draw.uniform(0.1, 2, 6), draw.uniform(0, 3, 6) * draw.integers(0, 2, 6)
    limits *= 0.5 / np.maximum(0, limits - read).sum() if np.maximum(0, limits - read).sum() > 0.5 else 1
    got, crowded = limit_shares(np.full(6, 1 / 6), limits, ["any"] * 6, read)
    assert crowded == ["any"] and got.sum() == pytest.approx(1) and (got >= 0).all()
    level = ((read + got) / limits)[got > 0]
    assert level == pytest.approx(np.full(len(level), level[0]))
    assert (read[got == 0] / limits[got == 0] >= level[0] - 1e-9).all()
