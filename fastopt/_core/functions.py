"""The text of `fastopt.functional` and `fastopt.reference`: one function an optimizer, equal signatures.

Made from the registry when either module is imported, and at build time into their type stubs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from fastopt import _threads, backends
from fastopt import optimizers as optimizers  # the registry is filled by importing them
from fastopt._arrays import host
from fastopt._arrays.checks import check_array
from fastopt._arrays.kinds import lives_on_gpu
from fastopt._messages import describe
from fastopt.rules import docstrings
from fastopt.rules.registry import registry
from fastopt.rules.spec import Spec


def define(module: dict[str, Any], backend: ModuleType, dtypes: tuple[type, ...]) -> list[str]:
    """Put a function for every optimizer into the namespace `module`; return their names."""
    for name, spec in registry.items():
        namespace: dict[str, Any] = {"_call": _call, "_spec": spec, "_backend": backend, "_dtypes": dtypes}
        exec(compile(source(spec), f"<fastopt {name}>", "exec"), namespace)
        function: Callable = namespace[name]
        function.__module__ = module["__name__"]
        function.__doc__ = documentation(spec, backend.NAME)
        module[name] = function
    return list(registry)


def arguments(spec: Spec) -> tuple[list[str], list[str]]:
    """Arrays of the function of `spec` that are required, and those that depend on hyperparameters."""
    required = ["p", "g", *(name for name in spec.states if name not in spec.optional_states), *spec.running]
    return required, [name for name in spec.states if name in spec.optional_states]


def signature(spec: Spec, typed: bool) -> str:
    """The arguments of the function of `spec`."""
    required, optional = arguments(spec)
    kinds = {"g": "Gradient"} | dict.fromkeys(spec.running, "ndarray")
    integer = ": int" if typed else ""
    parts = [f"{name}: {kinds.get(name, 'Array')}" if typed else name for name in required]
    parts += [f"{name}: Array | None = None" if typed else f"{name}=None" for name in optional]
    parts += ["*", f"step{integer} = 1" if typed else "step=1"]
    for name, hyper in spec.hypers.items():
        kind = {float: "float", bool: "bool", tuple: "tuple[float, float]"}[type(hyper.default)]
        parts.append(f"{name}: {kind} = {hyper.default!r}" if typed else f"{name}={hyper.default!r}")
    parts.append("n_threads: int | None = None" if typed else "n_threads=None")
    return ", ".join(parts)


def source(spec: Spec) -> str:
    """The function of `spec` as Python text."""
    required, optional = arguments(spec)
    arrays = ", ".join(f"{name!r}: {name}" for name in [*required, *optional])
    hypers = ", ".join(f"{name!r}: {name}" for name in spec.hypers)
    return f"""def {spec.function}({signature(spec, typed=False)}):
    _call(_spec, _backend, _dtypes, {{{arrays}}}, step, {{{hypers}}}, n_threads)
"""


def documentation(spec: Spec, backend: str) -> str:
    """The docstring of the function of `spec`."""
    required, optional = arguments(spec)
    dtypes = "float32" if backend == "cpu" else "float32 or float64"
    threads = "" if backend == "cpu" else " NumPy uses one."
    entries = [("p", f"Parameters: {dtypes}, C-contiguous, of any shape; updated.")]
    entries.append(("g", "Gradient, of the same shape and dtype; only read."))
    for name in [*(name for name in required[2:] if name not in spec.running), *optional]:
        where = f"; needed with {spec.needed_when(name)}, else None" if name in spec.optional_states else ""
        entries.append((name, f"State, like p; {spec.states[name]} before the first step; updated{where}."))
    for name, first in spec.running.items():
        entries.append((name, f"State, float64 with one element; {first} before the first step; updated."))
    entries.append(("step : int >= 1, default 1", "Number of this step; 1 is the first."))
    entries += docstrings.hyperparameters(spec)
    entries.append(
        ("n_threads : int >= 1 or None, default None", f"Threads at most; None for the process-wide number.{threads}")
    )
    raised = [("TypeError, ValueError", "For arrays and hyperparameters that do not fit; nothing was written then.")]
    made = ["p", "g", *(name for name in required[2:] if name not in spec.running)]
    module = "functional" if backend == "cpu" else "reference"
    example = [
        f">>> {', '.join(made)} = np.ones(({len(made)}, 3), np.float32)",
        *(f">>> {name} = np.full(1, {first})" for name, first in spec.running.items()),
        f">>> fastopt.{module}.{spec.function}({', '.join(required)}, step=1, lr={spec.hypers['lr'].default!r})",
    ]
    return "\n".join(
        [
            docstrings.prose(f"One step of {spec.name} in place. {docstrings.summary(spec.cls)}"),
            f"\nParameters\n----------\n{docstrings.listed(entries)}",
            f"\nRaises\n------\n{docstrings.listed(raised)}",
            "\nExamples\n--------\n>>> import numpy as np, fastopt",
            *example,
            "",
        ]
    )


def stub(backend: str) -> str:
    """The type stub of `fastopt.functional` or `fastopt.reference`."""
    array = "float32]] | DeviceArray" if backend == "cpu" else "floating[Any]]]"
    lines = [
        f"# Generated from the registry of optimizers ({backend}).",
        "from typing import Any, TypeAlias",
        "",
        "from numpy import dtype, floating, float32, ndarray",
        "",
        "from fastopt._arrays.types import DeviceArray, Gradient",
        "",
        f"Array: TypeAlias = ndarray[Any, dtype[{array}",
        "",
        *(f"def {spec.function}({signature(spec, typed=True)}) -> None: ..." for spec in registry.values()),
    ]
    return "\n".join(lines) + "\n"


def _call(
    spec: Spec,
    backend: Any,
    dtypes: tuple[type, ...],
    arrays: dict[str, Any],
    step: int,
    hypers: dict[str, Any],
    n_threads: int | None,
) -> None:
    """Check everything, then one step."""
    owner = spec.function
    values = spec.check(hypers)
    if isinstance(step, bool) or not isinstance(step, int | np.integer):
        raise TypeError(f"{owner}: step must be an int, got {describe(step)}")
    if not 1 <= step < 2**53:
        raise ValueError(f"{owner}: step must be >= 1 and below 2**53, got {step}")
    if n_threads is not None:
        _threads.check_n_threads(n_threads)
    p = arrays["p"]
    if backend.NAME == "cpu" and lives_on_gpu(p):
        backend = backends.resolve("cuda")
        backend.arrays.check()
    memory = backend.arrays
    memory.check_array(p, f"{owner}: p", dtypes=dtypes)
    shape = memory.shape_of(p)
    dtypes = (p.dtype.type,) if memory is host else dtypes
    if memory is host and isinstance(arrays["g"], np.generic):  # reductions return scalars, not arrays of shape ()
        arrays["g"] = np.asarray(arrays["g"])
    memory.check_array(arrays["g"], f"{owner}: g", dtypes=dtypes, shape=shape, writable=False)
    needed = spec.states_for(spec.flags(values))
    for name in spec.states:
        if name in needed and arrays[name] is None:
            first = spec.initial(name, values)
            made = f"np.full_like(p, {first:g})" if first else "np.zeros_like(p)"
            raise TypeError(
                f"{owner}: state {name!r} must be a NumPy array, got None; before the first step {made} makes it"
            )
        if name in needed:
            memory.check_array(arrays[name], f"{owner}: state {name!r}", dtypes=dtypes, shape=shape)
        elif arrays[name] is not None:
            raise ValueError(f"{owner}: state {name!r} is used only with {spec.needed_when(name)}, pass None")
    running = None
    for name in spec.running:
        running = arrays.pop(name)
        check_array(running, f"{owner}: {name}", dtypes=(np.float64,))
        if running.size != 1:
            raise ValueError(f"{owner}: {name} must have one element, got shape {running.shape}")
    arrays = {name: array for name, array in arrays.items() if array is not None}
    names = [*arrays, *spec.running]
    beside = [running] if running is not None and memory is host else []
    found = memory.first_overlap([*arrays.values(), *beside])
    if found is not None:
        raise ValueError(f"{owner}: {names[found[0]]} and {names[found[1]]} overlap in memory")
    if not backend.run_once(spec, arrays, running, int(step), values, n_threads):
        text = re.sub(r"[{}']", "", str(values))
        raise ValueError(f"{owner}: at step {step} the hyperparameters {text} give a factor outside float32's range")
