"""What an optimizer consists of. What it does, and what users are told of it, is in `optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from fastopt import _threads, backends
from fastopt._arrays.types import Array
from fastopt.rules.spec import Spec

if TYPE_CHECKING:
    from fastopt.backends.interface import Arrays, Backend, Plan


class Loaded(NamedTuple):
    """What a state dict holds for one parameter."""

    entry: Mapping[str, Any]
    """Step, running scalars and states, as the optimizer keeps them."""
    average: Array | None
    low: np.ndarray | None
    offset: int | None
    """Index for the rounding of its first element."""


class Record:
    """An optimizer's options, param groups and tensors, and the plan of its steps.

    The functions of `fastopt._core` work on it, and backends make plans from it.
    """

    # Slots, so that `vars` of an optimizer holds what a user's subclass adds, and reading one in `step` is quick.
    __slots__ = (
        "_arrays",
        "_awaited",
        "_backend",
        "_by_name",
        "_by_update",
        "_defaults",
        "_given",
        "_groups",
        "_guard",
        "_kept_for_graphs",
        "_members",
        "_n_threads",
        "_names",
        "_options",
        "_param_groups",
        "_plan",
        "_ranges",
        "_read",
        "_reduce_sum",
        "_seed",
        "_structure",
        "_tensors",
    )

    spec: ClassVar[Spec]

    def __init__(self, backend: Backend, defaults: dict[str, Any], options: dict[str, Any], by_update: bool) -> None:
        backend.arrays.check()
        self._options = options
        self._defaults = defaults
        self._seed: int = options["seed"]
        self._backend: Backend = backend
        self._arrays: Arrays = backend.arrays
        self._guard: Any = backends.engine().Guard(self._name)
        self._param_groups: list[dict[str, Any]] = []
        self._groups: tuple[dict[str, Any], ...] = ()
        """The dicts that `param_groups` must hold."""
        self._tensors: list[Any] = []
        self._names: tuple[str, ...] | None = None
        self._by_name: dict[str, Any] = {}
        self._ranges: Any = backend.arrays.ranges([])
        """All memory that a step writes."""
        self._structure: Literal["single", "sequence", "mapping"] = "sequence"
        self._awaited: dict[str, Loaded] = {}
        """What was loaded for names that `update` has not seen."""
        self._plan: Plan | None = None
        self._kept_for_graphs: list[Any] = []
        """Buffers of dropped plans whose addresses are in captured graphs."""
        self._members: list[list[Any]] = []
        """The tensors of each group, for the plan."""
        self._read: list[tuple[Any, tuple[str, ...]] | None] = []
        """Of each group the parameters and states that were last found to fit."""
        self._reduce_sum: Callable[[float], float] | None = None
        """Turns a sum of squares over the gradients of this process into that over all processes."""
        self._by_update = by_update
        """Whether parameters come with `update`."""
        self._given: dict[str, Any] | None = None
        """The dict of the parameters, until the first step: later it could only be watched at a cost."""
        self._n_threads: int | None = None
        self.n_threads = options["n_threads"]

    @property
    def defaults(self) -> dict[str, Any]:
        """Hyperparameters of a param group that does not set its own, as the constructor got them."""
        return self._defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups: ``"params"`` (a tuple of arrays) and every hyperparameter.

        Live: a hyperparameter changed here is checked and counts at the next step. Groups themselves are
        added with `add_param_group`.
        """
        return self._param_groups

    @property
    def ema_decay(self) -> float | None:
        """Decay of the moving average, or None."""
        value: float | None = self._options["ema_decay"]
        return value

    @property
    def ema_warmup(self) -> bool:
        """Whether the decay of the first averages is smaller."""
        value: bool = self._options["ema_warmup"]
        return value

    @property
    def copy_dtype(self) -> str | None:
        """Type of the copy of the parameters, or None."""
        value: str | None = self._options["copy_dtype"]
        return value

    @property
    def grad_dtype(self) -> str | None:
        """What uint16 gradients are, or None."""
        value: str | None = self._options["grad_dtype"]
        return value

    @property
    def state_dtype(self) -> str:
        """How states are kept: "float32", "bfloat16" or "8bit"."""
        value: str = self._options["state_dtype"]
        return value

    @property
    def seed(self) -> int:
        """Of the rounding of states in low precision."""
        return self._seed

    @property
    def master(self) -> str | None:
        """ "split" if parameters are bfloat16 halves of float32 numbers."""
        value: str | None = self._options["master"]
        return value

    @property
    def backend(self) -> str:
        """Name of the backend that runs the steps."""
        return self._backend.NAME

    @property
    def n_threads(self) -> int | None:
        """Threads of a step at most; None for the process-wide number."""
        return self._n_threads

    @n_threads.setter
    def n_threads(self, n_threads: int | None) -> None:
        self._n_threads = None if n_threads is None else _threads.check_n_threads(n_threads)
        plan = self._plan  # another thread may drop it meanwhile
        if plan is not None:
            plan.n_threads = self._n_threads or 0

    @property
    def n_accumulated(self) -> int:
        """Calls of `accumulate` whose gradients no step has used yet."""
        plan = self._plan  # another thread may drop it meanwhile
        return 0 if plan is None else plan.n_accumulated

    # --- Inside

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _options_now(self) -> dict[str, Any]:
        """The options as they are now, under the names that the constructor takes them by."""
        return {**self._options, "backend": self.backend, "n_threads": self._n_threads, "seed": self._seed}

    def _structured(self, values: list[Any]) -> Any:
        """`values`, one for each parameter, as a list or as a dict by their names."""
        return values if self._names is None else dict(zip(self._names, values, strict=True))

    def _from_tensors(self, function: Callable[[Any], Any]) -> Any:
        """What `function` makes of every tensor, as a list or as a dict by the names of the parameters."""
        tensors = list(self._tensors)  # another thread may add some meanwhile
        if self._names is None:
            return [function(tensor) for tensor in tensors]
        return {tensor.key: function(tensor) for tensor in tensors}

    def _settle(self) -> None:
        """Know of every step whether it was applied: on a GPU that can take waiting."""
        if self._plan is not None:
            self._plan.settle()
