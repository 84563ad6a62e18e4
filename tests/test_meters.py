"""The peak that MFU is given against, with a clock of the test's own."""

import itertools

import pytest
import torch

from moect.train import meters

CPU = torch.device("cpu")


@pytest.mark.parametrize(("seconds", "size"), [(1.0, 128), (0.005, 256), (1e-6, 1024)])
def test_a_slow_device_multiplies_small_matrices_only(monkeypatch, seconds, size):
    """One reading before and one after each product; ten of the next size would be eight times as long."""
    sizes = []
    monkeypatch.setattr(meters.torch, "randn", lambda n, m, device: sizes.append(n) or torch.zeros(n, m))
    ticks = itertools.accumulate(itertools.chain.from_iterable((0, seconds * (n / 128) ** 3) for n in numbers(sizes)))
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(ticks))
    rate = meters.product_flops(CPU, torch.float32)
    assert sizes[-1] == size and sizes.count(size) == 2
    assert rate == pytest.approx(2 * 128**3 / seconds, rel=1e-3)


def numbers(sizes):
    """The size that is being measured, again and again."""
    while True:
        yield sizes[-1]


@pytest.mark.parametrize(("fp32", "told"), [(60.0, True), (1.5, False)])
def test_a_cpu_without_bf16_is_told_of(monkeypatch, fp32, told):
    monkeypatch.setattr(meters, "product_flops", lambda device, dtype: fp32)
    advice = meters.slow_precision(CPU, torch.bfloat16, 1.0)
    assert bool(advice) == told and (not told or "60 times" in advice)
    assert meters.slow_precision(CPU, torch.float32, 1e-9) is None
    assert meters.slow_precision(torch.device("cuda"), torch.bfloat16, 1e-9) is None
