"""What was built and what runs here."""

from __future__ import annotations

import importlib.util
from typing import TypedDict

from fastopt import _formats, _threads, backends
from fastopt.backends import compiled
from fastopt.rules.spec import Spec

__version__ = "0.1.0"


class Info(TypedDict):
    """The result of `info`."""

    version: str
    isa: str
    isas: list[str]
    n_threads: int
    n_threads_from: str
    openmp: bool
    backends: list[str]


def info() -> Info:
    """What was built and what runs here.

    Returns
    -------
    dict
        ``version``; ``isa``, the instruction set in use, and ``isas``, those that were built and run on this
        processor; ``n_threads``, threads of a step at most, and ``n_threads_from``, what decided on it: an
        environment variable, "affinity", "cgroup" or "set_num_threads"; ``openmp``, whether steps can use more than
        one; ``backends``, those whose packages are installed.

    Examples
    --------
    >>> import fastopt
    >>> sorted(fastopt.info())
    ['backends', 'isa', 'isas', 'n_threads', 'n_threads_from', 'openmp', 'version']
    """
    return {
        "version": __version__,
        "isa": compiled.isa(),
        "isas": list(compiled.available_isas()),
        "n_threads": _threads.get_num_threads(),
        "n_threads_from": _threads.source(),
        "openmp": backends.engine().OPENMP,
        "backends": [name for name in backends.NAMES if name != "cuda" or importlib.util.find_spec("numba_cuda")],
    }


def cuda() -> dict[str, str]:
    """What the backend "cuda" has to work with: GPU, driver and version of numba-cuda, or what is missing."""
    try:
        backend = backends.resolve("cuda")
    except ImportError as error:
        return {"numba-cuda": str(error).removeprefix("backend 'cuda' needs ")}
    described: dict[str, str] = backend.describe()
    return described


def state_bytes(spec: Spec, state_dtype: str) -> float:
    """Bytes of state that an optimizer keeps for a parameter, with its default hyperparameters."""
    flags = spec.flags({name: hyper.default for name, hyper in spec.hypers.items()})
    return sum(_formats.codec(state_dtype, spec.kinds[state]).bytes_per_element for state in spec.states_for(flags))
