"""The peers: one adapter each, in a file of its own, imported only when asked for.

Each runs in its own best configuration, on the arrays of `bench.buffers` where it takes memory from outside.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bench.buffers import Buffers
from bench.workloads import Mode, Workload

MODULES = {
    "torch-fused": "torch_fused",
    "torch-foreach": "torch_foreach",
    "torch-loop": "torch_loop",
    "torch-compile": "torch_compile",
    "deepspeed": "deepspeed",
    "optax": "optax",
    "thinc": "thinc",
    "scikit-learn": "scikit_learn",
    "numba-loop": "numba_loop",
    "numpy": "numpy_reference",
}
"""Name of a peer, as in reports and on the command line -> its file in this folder."""


@dataclass
class Contestant:
    """One library's optimizer, ready to step."""

    step: Callable[[], object]
    params: Callable[[], list[np.ndarray]]
    """The parameters as they are now."""
    adopt: Callable[[], object] = lambda: None
    """Let its states lie in the workload's buffers from now on, where it can."""
    uses_up_gradients: bool = False
    """Its step overwrites the gradients; they are made anew before every block, and blocks are short."""
    leaves_garbage: bool = False
    """Its step leaves in the buffers what would be no state for the next contestant."""


class Peer:
    """What an adapter says of its library, and how it makes a contestant of a workload."""

    requires: ClassVar[dict[str, str]] = {}
    """Modules to import -> packages to install."""
    note: ClassVar[str] = ""
    """What cannot be made equal, for the report."""

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        absent = [package for module, package in self.requires.items() if importlib.util.find_spec(module) is None]
        return f"not installed: python -m pip install {' '.join(absent)}" if absent else None

    def missing_on_gpu(self) -> str | None:
        """Why it cannot run on the GPU here, or None; asked for only where it is not missing."""
        return "runs on the CPU"

    def version(self) -> str:
        """Of the packages that it needs."""
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in self.requires.values())

    def refuses(self, workload: Workload) -> str | None:
        """Why it has no part in the workload, whatever the time, or None; imports nothing."""
        raise NotImplementedError

    def too_slow(self, mode: Mode) -> str | None:  # noqa: ARG002  most always have the time
        """Why it takes no part in a run of that length, or None."""
        return None

    def set_threads(self, n_threads: int) -> None:
        """Before a workload."""

    def prepare(self, workload: Workload, buffers: Buffers) -> Contestant:
        """Its optimizer over the workload's parameters, not stepped yet."""
        raise NotImplementedError


def load(name: str) -> Peer:
    """The adapter of the peer `name`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"bench.peers.{MODULES[name]}").Adapter()


def no_extras(workload: Workload, backends: tuple[str, ...] = ("cpu",)) -> str | None:
    """The refusal of peers that know nothing but plain steps, or None."""
    if workload.backend not in backends:
        return f"runs on the CPU, not on {workload.backend}"
    if workload.is_tail:
        return "no calls for the whole tail"
    if workload.form == "FlatBuffer":
        return "its tensors are those of the list"
    return "keeps float32 states alone" if workload.section == "states" else None
