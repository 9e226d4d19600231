"""An optimizer on the CPU and one on the GPU (or in Numba's simulator), stepped together and compared."""

import math

import numpy as np
import pytest

from fastopt import backends
from tests.support.configs import DEFAULTS
from tests.support.oracle import assert_same_bits

try:
    backends.resolve("cuda")
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

from numba import cuda

SIZES = (1, 63, 64, 83)
BY_NAME = {config.spec.function: config for config in DEFAULTS}


def on_device(array):
    return cuda.to_device(np.array(array))


def host(array):
    return array.copy_to_host() if hasattr(array, "copy_to_host") else np.asarray(array)


def same(actual, expected, what):
    """The same bits, whatever the type; NaN may be any NaN."""
    actual, expected = host(actual), host(expected)
    if expected.dtype.name == "bfloat16":
        expected = expected.view(np.uint16)
    assert actual.dtype == expected.dtype, what
    if actual.dtype == np.float32:
        assert_same_bits(actual, expected, what)
    else:
        assert np.array_equal(actual, expected), what


class Lockstep:
    """An optimizer on the CPU and one on the simulated GPU, and arrays of the same values."""

    def __init__(self, make, params, **options):
        self.cpu_params = [p.copy() for p in params]
        self.gpu_params = [on_device(p) for p in params]
        self.cpu = make(self.cpu_params, backend="cpu", n_threads=1, **options)
        self.gpu = make(self.gpu_params, backend="cuda", **options)

    def step(self, grads, **options):
        cpu_grads = [None if g is None else g.copy() for g in grads]
        gpu_grads = [None if g is None else on_device(g) for g in grads]
        mine = self.gpu.step(gpu_grads, **options)
        theirs = self.cpu.step(cpu_grads, **options)
        assert mine.applied == theirs.applied
        assert mine.grad_norm == theirs.grad_norm or (math.isnan(mine.grad_norm) and math.isnan(theirs.grad_norm))
        for k, (a, b) in enumerate(zip(gpu_grads, cpu_grads, strict=True)):
            if b is not None:
                same(a, b, f"gradient {k}")

    def accumulate(self, grads):
        self.gpu.accumulate([None if g is None else on_device(g) for g in grads])
        self.cpu.accumulate(grads)

    def step_of_sums(self, **options):
        assert self.gpu.n_accumulated == self.cpu.n_accumulated
        mine, theirs = self.gpu.step(**options), self.cpu.step(**options)
        assert mine.applied == theirs.applied
        assert mine.grad_norm == theirs.grad_norm or (math.isnan(mine.grad_norm) and math.isnan(theirs.grad_norm))

    def check(self):
        for k, (a, b) in enumerate(zip(self.gpu_params, self.cpu_params, strict=True)):
            same(a, b, f"params[{k}]")
        for k, (mine, theirs) in enumerate(zip(self.gpu.state, self.cpu.state, strict=True)):
            assert mine.keys() == theirs.keys()
            for name, array in theirs.items():
                same(mine[name], array, f"state {name} of params[{k}]")
        for name in ("ema", "params_copy", "master_params"):
            try:
                theirs = getattr(self.cpu, name)
            except ValueError:
                continue
            for k, array in enumerate(theirs):
                same(getattr(self.gpu, name)[k], array, f"{name}[{k}]")


def arrays(rng, sizes=SIZES, scale=1.0):
    return [(scale * rng.standard_normal(n)).astype(np.float32) for n in sizes]
