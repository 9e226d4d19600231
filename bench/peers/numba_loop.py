"""The loop that one would write oneself: Numba, parallel, one pass."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from bench.buffers import Buffers
from bench.peers import Contestant, Peer, no_extras
from bench.workloads import MOMENTUM, Workload


@functools.cache
def _loops() -> dict[str, Callable[..., None]]:
    """Compiled at first call."""
    from numba import njit, prange

    @njit(parallel=True)
    def adam(p, g, m, v, b1, c1, b2, c2, size, root, eps):  # type: ignore[no-untyped-def]
        for i in prange(p.size):
            m[i] = b1 * m[i] + c1 * g[i]
            v[i] = b2 * v[i] + c2 * g[i] * g[i]
            p[i] -= size * m[i] / (np.sqrt(v[i]) * root + eps)

    @njit(parallel=True)
    def sgd(p, g, momentum_buffer, momentum, lr):  # type: ignore[no-untyped-def]
        for i in prange(p.size):
            momentum_buffer[i] = momentum * momentum_buffer[i] + g[i]
            p[i] -= lr * momentum_buffer[i]

    @njit(parallel=True)
    def lion(p, g, exp_avg, b1, c1, b2, c2, lr):  # type: ignore[no-untyped-def]
        for i in prange(p.size):
            update = b1 * exp_avg[i] + c1 * g[i]
            p[i] -= lr * np.sign(update)
            exp_avg[i] = b2 * exp_avg[i] + c2 * g[i]

    return {"adam": adam, "sgd": sgd, "lion": lion}


@functools.cache
def _launch_threads() -> None:
    """Let Numba launch its threads, then switch nested parallelism off again, which that switches on.

    It would stay on for the whole process, and MKL's square roots inside torch then take milliseconds.
    """
    from numba import njit, prange

    @njit(parallel=True)
    def count(x):  # type: ignore[no-untyped-def]
        for i in prange(x.size):
            x[i] += 1

    count(np.zeros(1000, np.float32))
    with contextlib.suppress(OSError, AttributeError):  # another OpenMP
        ctypes.CDLL("libgomp.so.1").omp_set_max_active_levels(1)


class Adapter(Peer):
    requires: ClassVar[dict[str, str]] = {"numba": "numba"}
    note = "a parallel region for every tensor"

    def refuses(self, workload: Workload) -> str | None:
        if (workload.function, workload.hypers) not in (("adam", ()), ("sgd", MOMENTUM), ("lion", ())):
            return "no loop written"
        return no_extras(workload)

    def set_threads(self, n_threads: int) -> None:
        import numba

        numba.set_num_threads(min(n_threads, numba.config.NUMBA_NUM_THREADS))

    def prepare(self, workload: Workload, buffers: Buffers) -> Contestant:
        _launch_threads()
        loop = _loops()[workload.function]
        arrays = zip(buffers.params, buffers.grads, *buffers.states.values(), strict=True)
        flat = [tuple(array.reshape(-1) for array in one) for one in arrays]
        values = workload.values
        steps = 0

        def scalars() -> tuple[Any, ...]:
            lr = np.float32(values["lr"])
            if workload.function == "sgd":
                return np.float32(values["momentum"]), lr
            b1, b2 = values["betas"]
            means = tuple(map(np.float32, (b1, 1 - b1, b2, 1 - b2)))
            if workload.function == "lion":
                return *means, lr
            size, root = values["lr"] / (1 - b1**steps), (1 - b2**steps) ** -0.5
            return *means, np.float32(size), np.float32(root), np.float32(values["eps"])

        def step() -> None:
            nonlocal steps
            steps += 1
            given = scalars()
            for one in flat:
                loop(*one, *given)

        return Contestant(step, lambda: buffers.params)
