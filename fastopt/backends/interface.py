"""What a backend is: a module with what `Backend` lists. `cpu`, `cuda` and `reference` are such modules.

An optimizer asks a backend for the arrays that it keeps, and for a plan: the prebuilt step, which it calls. It never
asks which backend it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np


class Plan(Protocol):
    """The prebuilt step of one optimizer; a new one is made when parameters or states have changed."""

    n_threads: int
    """Threads at most; 0 for the process-wide number."""

    @property
    def n_accumulated(self) -> int:
        """Calls of `accumulate` whose gradients no step has used."""

    def step(self, gradients: Any, options: tuple[Any, ...] = ..., /) -> Any:
        """Take the optimizer's guard, check everything, then update every tensor that has a gradient, in place.

        `options` are (grad_scale, max_norm, clip_value, skip_nonfinite, zero_grads), checked. A stream may follow on
        a device. Returns None where nothing was asked for, a tuple (applied, norm), or on a device an object with
        these attributes, which waits for them.
        """

    def step_held(self, gradients: Any, options: tuple[Any, ...] = ..., /) -> Any:
        """The same for a caller that has taken the optimizer's guard."""

    def accumulate(self, gradients: Any, /) -> None:
        """Check every gradient, then add it to its tensor's float32 sums; a stream may follow on a device.

        The caller has taken the optimizer's guard, here and below.
        """

    def discard(self) -> None:
        """Drop the sums."""

    def settle(self) -> None:
        """Wait until it is known of every step whether it was applied."""

    def captured(self) -> list[Any]:
        """Buffers whose addresses are in a captured graph, and which must outlive the plan."""


class DevicePlan(Plan, Protocol):
    """What the plan of a device has beside that: captured graphs."""

    def prepare_capture(self) -> None:
        """Make what a captured step needs."""

    def prepare_replay(self, stream: Any = None) -> Any:
        """Count one replay of the captured step, and queue its numbers before it."""


class Arrays(Protocol):
    """What an optimizer does with arrays, where the backend has them: in host memory or on a device.

    `tensor` is a `Tensor` of the engine, `optimizer` a `Record`, `changes` a `Changes`.
    """

    def check(self) -> None:
        """Raise RuntimeError, saying what is missing, unless there is such memory."""

    def check_array(
        self,
        value: Any,
        what: str,
        *,
        shape: tuple[int, ...] | None = None,
        dtypes: tuple[type, ...] = ...,
        writable: bool = True,
    ) -> None:
        """Raise TypeError or ValueError unless `value` is an array that a kernel can work on in place."""

    def check_parameter(self, array: Any, what: str, shape: tuple[int, ...] | None, is_split: bool) -> None:
        """Raise TypeError or ValueError unless an array can be a parameter."""

    def check_parameters(
        self, optimizer: Any, arrays: Sequence[Any], tensors: Sequence[Any] | None = None, keys: Sequence[Any] = ()
    ) -> None:
        """The same for many: those of `tensors`, or new ones under `keys`."""

    def shape_of(self, array: Any) -> tuple[int, ...]:
        """Shape of a checked array."""

    def exposed(self, array: Any) -> Any:
        """What users see of an array of the optimizer's."""

    def bfloat16(self) -> np.dtype[Any]:
        """Type of arrays of bfloat16."""

    def state_arrays(self, like: Sequence[Any], dtype: Any = ..., block: int = 1) -> list[Any]:
        """One array of zeros for each in `like`, of its shape; none begins inside a `block` of elements."""

    def scale_arrays(self, lengths: Sequence[int]) -> list[Any]:
        """One uint16 array of each of these lengths."""

    def fill(self, array: Any, code: Any) -> None:
        """Set every element to the same number or code."""

    def fetch(self, array: Any) -> np.ndarray:
        """A copy in host memory; bfloat16 as uint16."""

    def overwrite(self, array: Any, values: np.ndarray) -> None:
        """Overwrite an array."""

    def ranges(self, arrays: Sequence[Any], gap: int = 0) -> Any:
        """The memory of arrays, which is one piece where there are at most `gap` bytes between them."""

    def first_overlap(self, arrays: Sequence[Any]) -> tuple[int, int] | None:
        """Positions of two arrays that overlap in memory, or None."""

    def values_of(self, tensor: Any) -> np.ndarray:
        """The parameter of a tensor in float32, in host memory."""

    def note(self, changes: Any, target: Any, values: np.ndarray) -> None:
        """Note in `changes` that an array of the optimizer's is overwritten."""

    def note_values(self, changes: Any, tensor: Any, values: Any) -> None:
        """Note in `changes` that the parameter of a tensor is overwritten."""

    def note_beside(self, changes: Any, optimizer: Any, tensor: Any, low: Any, has_average: bool) -> None:
        """Note that the copy follows the parameter, whose lower half is `low`, and the average if none was loaded."""

    def start_averages(self, optimizer: Any, tensors: Sequence[Any]) -> None:
        """Set averages to the parameters as they are."""

    def copy_parameters(self, optimizer: Any, tensors: list[Any]) -> None:
        """Round the parameters as they are into their copies."""

    def average_swap(self, optimizer: Any) -> AbstractContextManager[None]:
        """The context manager in which averages stand in the parameters' place."""


class Backend(Protocol):
    """Where and how steps run."""

    @property
    def NAME(self) -> str:  # noqa: N802  a constant of the module
        """As users choose it."""

    @property
    def ON_DEVICE(self) -> bool:  # noqa: N802
        """Whether arrays are on a device, with streams and graphs, and not in host memory."""

    @property
    def arrays(self) -> Arrays:
        """What is done with arrays there."""

    def make_plan(self, optimizer: Any) -> Plan:
        """The prebuilt step of an optimizer, a `fastopt._core.record.Record`."""

    def run_once(
        self,
        spec: Any,
        streams: dict[str, Any],
        running: np.ndarray | None,
        step: int,
        values: dict[str, Any],
        n_threads: int | None,
    ) -> bool:
        """One step of the optimizer `spec` on the checked arrays p, g and states; for `fastopt.functional`.

        Returns False, with nothing written, if a host scalar leaves float32.
        """
