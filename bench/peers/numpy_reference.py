"""fastopt's own NumPy reference: the textbook on whole arrays, one thread."""

from __future__ import annotations

from bench.buffers import Buffers, adopt
from bench.peers import Contestant, Peer, no_extras
from bench.workloads import Workload


class Adapter(Peer):
    note = "one thread; whole arrays"

    def version(self) -> str:
        import numpy as np

        return f"numpy {np.__version__}"

    def refuses(self, workload: Workload) -> str | None:
        return no_extras(workload)

    def prepare(self, workload: Workload, buffers: Buffers) -> Contestant:
        optimizer = workload.spec.cls(buffers.params, backend="reference", **dict(workload.hypers))
        adopt(optimizer, buffers.states, {name: name for name in workload.states})
        return Contestant(lambda: optimizer.step(buffers.grads), lambda: buffers.params)
