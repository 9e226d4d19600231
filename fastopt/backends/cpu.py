"""The compiled kernels: which instruction set to run, and the way from an optimizer to the engine."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import numpy as np

from fastopt import _host as arrays  # noqa: F401  of the backend's interface
from fastopt import _threads, backends
from fastopt._instruction_sets import INSTRUCTION_SETS

NAME = "cpu"


def _module(isa: str) -> str:
    return f"fastopt.backends.{INSTRUCTION_SETS[isa].module}"


@functools.cache
def available_isas() -> tuple[str, ...]:
    """Instruction sets that were built and that this processor runs, the widest last."""
    supported = backends.engine().supported_features()
    return tuple(
        isa
        for isa, row in INSTRUCTION_SETS.items()
        if importlib.util.find_spec(_module(isa)) is not None
        and all(supported.get(feature, False) for feature in row.features)
    )


def isa() -> str:
    """The instruction set in use: FASTOPT_ISA, or the widest available.

    Raises
    ------
    ValueError
        If FASTOPT_ISA names one that is not available.
    """
    asked = os.environ.get("FASTOPT_ISA")
    if not asked:
        return available_isas()[-1]
    if asked not in available_isas():
        raise ValueError(f"FASTOPT_ISA must be one of {', '.join(available_isas())} here, got {asked!r}")
    return asked


@functools.cache
def _load(isa: str) -> Any:
    return importlib.import_module(_module(isa))


def kernels() -> dict[str, Any]:
    """The compiled kernels of the instruction set in use: name -> (capsule, states, number of scalars)."""
    return _load(isa()).KERNELS | _added


def stages() -> Any:
    """The compiled stages that surround the rules, of the instruction set in use."""
    return _load(isa()).STAGES


def copy_array(source: np.ndarray, out: np.ndarray) -> None:
    """Round the float32 array `source` into `out`, float16 or bfloat16 (or uint16 with its bits)."""
    backends.engine().copy_array(stages(), source, out, out.dtype != np.float16)


_added: dict[str, Any] = {}


def add_kernels(compiled: dict[str, Any]) -> None:
    """Make the KERNELS of a module built from rules outside fastopt available to steps made from now on."""
    _added.update(compiled)


def _after_fork() -> None:
    backends.engine().mark_forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def make_plan(optimizer: Any) -> Any:
    """The engine's prebuilt step of `optimizer`."""
    n_threads = _threads.get_num_threads()  # sets the engine's default
    plan = backends.engine().Plan(optimizer, kernels(), stages())
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
    from fastopt._optimizer import kernel_and_hypers

    name, hyper = kernel_and_hypers(spec, values)
    capsule, states, _ = kernels()[name]
    ordered = [streams["p"], streams["g"], *(streams[state] for state in states)]
    if spec.trust == "update":
        ordered.append(np.empty_like(streams["p"]))
    n_threads = n_threads or _threads.get_num_threads()
    return backends.engine().run_once(capsule, stages(), ordered, hyper, step, running, spec.trust, n_threads)
