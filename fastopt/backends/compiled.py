"""The compiled modules: which instruction sets were built, which one runs, its kernels and stages."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import numpy as np

from fastopt import backends
from fastopt._instruction_sets import INSTRUCTION_SETS


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
