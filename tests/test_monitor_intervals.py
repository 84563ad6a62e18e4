"""Bootstrap intervals: against what is known of means, of pairs, and of how often they should hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moect.monitor.measuring.intervals import share_interval, text_intervals

BITS = math.log(2)


def test_the_interval_of_equal_documents_is_that_of_their_mean():
    rng = np.random.default_rng(1)
    nll_G = rng.normal(700.0, 60.0, 400)
    bytes_G = np.full(400, 500.0)
    low, high = text_intervals(nll_G, bytes_G, nll_G, bytes_G, 4000)["bits_per_byte"]
    half = 1.96 * nll_G.std(ddof=1) / math.sqrt(400) / 500 / BITS
    mean = nll_G.mean() / 500 / BITS
    assert (low, high) == (pytest.approx(mean - half, abs=0.1 * half), pytest.approx(mean + half, abs=0.1 * half))


def test_what_makes_a_document_hard_for_both_cancels_in_the_difference():
    rng = np.random.default_rng(2)
    bytes_G = rng.integers(20, 2000, 300).astype(float)
    base_G = bytes_G * rng.uniform(0.5, 3.0, 300)
    found = text_intervals(1.05 * base_G, bytes_G, base_G, bytes_G, 500)
    assert found["retention"] == (pytest.approx(1 / 1.05), pytest.approx(1 / 1.05))
    assert found["gain"] == (pytest.approx(-0.05), pytest.approx(-0.05))
    width = lambda name: found[name][1] - found[name][0]  # noqa: E731
    assert width("delta") < 0.1 * width("bits_per_byte")


def test_a_model_that_is_its_base_has_no_difference_and_no_doubt_about_it():
    nll_G, bytes_G = np.array([3.0, 5.0, 9.0]), np.array([2.0, 4.0, 5.0])
    found = text_intervals(nll_G, bytes_G, nll_G, bytes_G, 100)
    assert found["delta"] == (0, 0) and found["retention"] == (1, 1) and found["gain"] == (0, 0)


def test_the_same_measurements_give_the_same_interval():
    rng = np.random.default_rng(3)
    columns = [rng.uniform(1, 9, 50) for _ in range(4)]
    assert text_intervals(*columns, 200) == text_intervals(*columns, 200)


def test_about_95_of_100_intervals_hold_the_truth():
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(400):
        bytes_G = rng.integers(50, 500, 60).astype(float)
        nll_G = bytes_G * BITS * rng.gamma(4.0, 0.5, 60)  # 2 bits a byte in the mean
        low, high = text_intervals(nll_G, bytes_G, nll_G, bytes_G, 300)["bits_per_byte"]
        held += low <= 2.0 <= high
    assert 0.90 <= held / 400 <= 0.98


def test_one_document_has_no_interval():
    one = np.ones(1)
    assert text_intervals(one, one, one, one, 100) == {}
    assert share_interval(one, one, 100) == (0, 1)


def test_a_ratio_without_a_value_is_left_out():
    nll_G, bytes_G = np.array([0.0, 0.0, 0.0]), np.array([1.0, 2.0, 3.0])
    found = text_intervals(np.array([1.0, 1.0, 2.0]), bytes_G, nll_G, bytes_G, 50)
    assert "gain" not in found and found["retention"] == (0, 0)


def test_many_documents_are_resampled_in_parts_with_the_same_result(monkeypatch):
    rng = np.random.default_rng(5)
    part_G, whole_G = rng.integers(0, 5, 30).astype(float), np.full(30, 5.0)
    at_once = share_interval(part_G, whole_G, 200)
    monkeypatch.setattr("moect.monitor.measuring.intervals.AT_ONCE", 60)
    assert share_interval(part_G, whole_G, 200) == at_once
