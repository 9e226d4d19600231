"""thinc's Cython Adam (`NumpyOps.adam`), the one under spaCy: one thread."""

from __future__ import annotations

from typing import ClassVar

from bench.buffers import Buffers
from bench.peers import Contestant, Peer, no_extras
from bench.workloads import Workload


class Adapter(Peer):
    requires: ClassVar[dict[str, str]] = {"thinc": "thinc"}
    note = "one thread; zeroes the gradient"

    def refuses(self, workload: Workload) -> str | None:
        return "has no such optimizer" if (workload.function, workload.hypers) != ("adam", ()) else no_extras(workload)

    def prepare(self, workload: Workload, buffers: Buffers) -> Contestant:
        from thinc.api import NumpyOps

        adam = NumpyOps().adam
        lr, eps = workload.values["lr"], workload.values["eps"]
        beta1, beta2 = workload.values["betas"]
        flat = [
            tuple(array.reshape(-1) for array in arrays)
            for arrays in zip(buffers.params, buffers.grads, *buffers.states.values(), strict=True)
        ]
        steps = 0

        def step() -> None:
            nonlocal steps
            steps += 1
            root = (1 - beta2**steps) ** 0.5
            rate = lr * root / (1 - beta1**steps)
            for p, g, exp_avg, exp_avg_sq in flat:
                adam(p, g, exp_avg, exp_avg_sq, beta1, beta2, eps * root, rate)  # its eps counts before the correction

        return Contestant(step, lambda: buffers.params, uses_up_gradients=True)
