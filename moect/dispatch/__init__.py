"""Tokens to experts and back: one signature, several backends, one obvious reference.

    reference    the obvious loop, in any dtype: the oracle of all others
    segments     one product per expert segment, in torch alone: runs on any device
    grouped      two products over all experts, by torch's grouped_mm
    cpu          the same as `segments`, compiled from C++: the default on a CPU
    cuda         our own CUDA kernels around grouped products: the default on a GPU

`registry` holds the signature, the choice and the checks; docs/dispatch.md explains all of it.
"""

from moect.dispatch import cpu as _cpu
from moect.dispatch import cuda as _cuda
from moect.dispatch.registry import backends, choose, dispatch, register, unavailable

__all__ = ["backends", "choose", "dispatch", "register", "unavailable"]

register("cpu", _cpu.cpu, _cpu.cpu_unavailable)
register("cuda", _cuda.cuda, _cuda.cuda_unavailable)
