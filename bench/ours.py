"""fastopt as a contestant: the optimizer of a workload on its buffers."""

from __future__ import annotations

from typing import Any

import numpy as np

import fastopt
from bench.buffers import Buffers, adopt
from bench.peers import Contestant
from bench.workloads import Workload
from fastopt._arrays import allocation

NAME = "fastopt"
PROBE = "probe"
ALONE = "fastopt, update alone"
"""The tail's update without the rest of the tail, for the price of that."""

FLOAT32 = "fastopt, float32 states"
"""The same step without the options that keep states in low precision."""
OTHERS = (PROBE, ALONE, FLOAT32)
"""Contestants that are neither fastopt's entry nor peers."""


def version(workload: Workload) -> str:
    """fastopt's, with the instruction set or what compiles for the GPU."""
    if workload.backend == "cuda":
        from bench import device

        return device.VERSION
    info = fastopt.info()
    return f"fastopt {info['version']}, {info['isa']}"


def prepare(workload: Workload, buffers: Buffers) -> tuple[Contestant, float]:
    """The optimizer, not stepped yet, and the bytes a parameter that one of its steps moves."""
    options: dict[str, Any] = {**dict(workload.options), "backend": workload.backend}
    if workload.backend == "cpu":
        options["n_threads"] = workload.n_threads
    params: Any = buffers.params
    grads: Any = buffers.grads
    if buffers.flat is not None:
        params, grads = buffers.flat
    elif workload.form == "array":
        (params,), (grads,) = buffers.params, buffers.grads
    if options.get("master") == "split":
        params = allocation.zeros(-(-workload.n // 2)).view(np.uint16)[: workload.n].reshape(workload.shapes[0])
    optimizer: Any = workload.spec.cls(params, **dict(workload.hypers), **options)
    if options.get("master") == "split":
        optimizer.load_master_params(buffers.params[0])
    if workload.section == "states":  # its own, in low precision
        float32 = 8 * len(workload.states)
        moved = workload.bytes_per_parameter - float32 + 2 * optimizer.state_nbytes / workload.n
        return Contestant(lambda: optimizer.step(grads), lambda: buffers.params), moved
    adopt(optimizer, buffers.states, {name: name for name in workload.states})
    if not workload.is_tail:
        step = optimizer.step
        return Contestant(lambda: step(grads), lambda: buffers.params), workload.bytes_per_parameter

    def results() -> list[Any]:
        return [*buffers.params, *optimizer.ema]

    def tail() -> None:
        optimizer.step(grads, max_norm=1.0, zero_grads=True)

    return Contestant(tail, results, uses_up_gradients=True), workload.bytes_per_parameter


def prepare_alone(workload: Workload, buffers: Buffers) -> Contestant:
    """The update of a workload by itself, with states in float32."""
    threads = {"n_threads": workload.n_threads} if workload.backend == "cpu" else {}
    optimizer = workload.spec.cls(buffers.params, **threads, **dict(workload.hypers))
    adopt(optimizer, buffers.states, {name: name for name in workload.states})
    return Contestant(lambda: optimizer.step(buffers.grads), lambda: buffers.params)
