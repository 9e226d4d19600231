"""The CPU backend: the way from an optimizer to the compiled engine."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from fastopt import _threads, backends
from fastopt._arrays import host as arrays  # noqa: F401  of the backend's interface
from fastopt.backends import compiled
from fastopt.rules.host_scalars import kernel_and_hypers

NAME = "cpu"
ON_DEVICE = False


def _after_fork() -> None:
    backends.engine().mark_forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def make_plan(optimizer: Any) -> Any:
    """The engine's prebuilt step of `optimizer`."""
    n_threads = _threads.get_num_threads()  # sets the engine's default
    plan = backends.engine().Plan(optimizer, compiled.kernels(), compiled.stages())
    plan.n_threads = optimizer.n_threads or 0
    return plan if n_threads else None


def run_once(
    spec: Any,
    streams: dict[str, np.ndarray],
    running: np.ndarray | None,
    step: int,
    values: dict[str, Any],
    n_threads: int | None,
) -> bool:
    """One step of `spec` on the checked arrays p, g and states; False if a host scalar leaves float32."""
    name, hyper = kernel_and_hypers(spec, values)
    capsule, states, _ = compiled.kernels()[name]
    ordered = [streams["p"], streams["g"], *(streams[state] for state in states)]
    if spec.trust == "update":
        ordered.append(np.empty_like(streams["p"]))
    n_threads = n_threads or _threads.get_num_threads()
    return backends.engine().run_once(capsule, compiled.stages(), ordered, hyper, step, running, spec.trust, n_threads)
