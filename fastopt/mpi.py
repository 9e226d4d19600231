"""ZeRO-1 over MPI: every process keeps and updates the optimizer state of its share of the parameters alone.

Needs ``python -m pip install 'fastopt[mpi]'`` and an MPI library. Nothing of a step is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

try:
    from mpi4py import MPI
except ImportError as error:
    raise ImportError("fastopt.mpi needs mpi4py and an MPI library: python -m pip install 'fastopt[mpi]'") from error

from fastopt import _messages
from fastopt._arrays.flat_buffer import FlatBuffer
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import StepInfo, check_step_options
from fastopt._formats import CODE_BLOCK
from fastopt.rules.hyperparameters import Switch

__all__ = ["ZeroRedundancyOptimizer"]


class ZeroRedundancyOptimizer:
    """An optimizer whose state is divided among the processes of an MPI communicator (ZeRO, stage 1).

    A step adds the gradients of all processes up and leaves every process the sums of its shard (reduce-scatter),
    updates that shard, and sends the new parameters to all (all-gather). All processes end a step with the same bits.

    Parameters
    ----------
    params : FlatBuffer
        The parameters, in host memory. Those of rank 0 are sent to all processes at construction.
    optimizer_class : type
        An optimizer of fastopt that treats every element alone: all but LAMB and LARS.
    comm : mpi4py.MPI.Comm or None, default None
        The processes; None for ``MPI.COMM_WORLD``.
    average : bool, default True
        Divide the sum of the gradients by the number of processes.
    **arguments
        Hyperparameters and options of the optimizer; not ``backend``, ``master`` and ``grad_dtype``.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for buffers that differ in size between processes.

    Notes
    -----
    Every method is collective: all processes call it, with equal options. An exception in one of them, say for a
    gradient of the wrong size, leaves the others waiting, as it does with any MPI program.

    Parameters and states have the bits that one process would compute from the sum of the gradients with
    ``optimizer_class([params.flat])``, whatever the number of processes; only a norm that is not exact in float64 can
    differ in its last bit.

    References
    ----------
    Rajbhandari et al.: ZeRO: memory optimizations toward training trillion parameter models, arXiv:1910.02054.

    Examples
    --------
    >>> import numpy as np, fastopt, fastopt.mpi
    >>> params = fastopt.FlatBuffer({"w": np.ones(3, np.float32)})
    >>> grads = params.zeros_like()
    >>> opt = fastopt.mpi.ZeroRedundancyOptimizer(params, fastopt.SGD, lr=0.5)
    >>> grads["w"][:] = 1
    >>> opt.step(grads)
    StepInfo(applied=True, grad_norm=None)
    >>> params["w"]
    array([0.5, 0.5, 0.5], dtype=float32)
    """

    def __init__(
        self,
        params: FlatBuffer,
        optimizer_class: type[Optimizer],
        comm: Any = None,
        *,
        average: bool = True,
        **arguments: Any,
    ) -> None:
        name = type(self).__name__
        if not isinstance(params, FlatBuffer) or params.backend != "cpu":
            raise TypeError(f"{name}: params must be a FlatBuffer in host memory, got {_messages.describe(params)}")
        is_optimizer = isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)
        if not is_optimizer or not hasattr(optimizer_class, "spec"):
            raise TypeError(f"{name}: optimizer_class must be an optimizer of fastopt, got {optimizer_class!r}")
        if optimizer_class.trust is not None:
            raise ValueError(
                f"{name}: {optimizer_class.__name__} takes norms of whole tensors, which no process has; choose one "
                "that treats every element alone"
            )
        if refused := [option for option in ("backend", "master", "grad_dtype") if option in arguments]:
            raise ValueError(f"{name}: the options {refused} are not for sharded optimizers")
        if not isinstance(comm, MPI.Comm | None):
            raise TypeError(f"{name}: comm must be a communicator of mpi4py, got {_messages.describe(comm)}")
        average = Switch().check(name, "average", average)
        self._comm = MPI.COMM_WORLD if comm is None else comm
        sizes = self._comm.allgather(params.flat.size)
        if len(set(sizes)) > 1:
            raise ValueError(f"{name}: params must be of the same size in all processes, got {sizes}")
        self._params = params
        self._divisor = self._comm.size if average else 1
        n_units = -(-params.flat.size // CODE_BLOCK)  # a cut elsewhere would change 8-bit states, which share scales
        ends = [
            min(params.flat.size, CODE_BLOCK * (n_units * k // self._comm.size)) for k in range(self._comm.size + 1)
        ]
        self._counts = np.diff(ends).tolist()
        self._starts = ends[:-1]
        self.shard = slice(ends[self._comm.rank], ends[self._comm.rank + 1])
        """The elements of ``params.flat`` that this process updates."""
        self._comm.Bcast(params.flat, root=0)
        self.optimizer = optimizer_class([params.flat[self.shard]], **arguments)
        """The optimizer of this process's shard: learning rate, state, averages and copies of that shard alone."""
        self.optimizer._tensors[0].index = self.shard.start
        self.optimizer._reduce_sum = partial(_sum_of_all, self._comm)
        self._gradient = np.empty(self._counts[self._comm.rank], np.float32)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The one param group, for schedules: equal changes in all processes."""
        return self.optimizer.param_groups

    def step(
        self,
        grads: FlatBuffer,
        *,
        grad_scale: float = 1.0,
        max_norm: float | None = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> StepInfo:
        """Add up the gradients of all processes and update the parameters in all of them.

        Parameters
        ----------
        grads : FlatBuffer
            This process's gradients, of the size of the parameters; only read, unless `zero_grads`.
        grad_scale, max_norm, clip_value, skip_nonfinite, zero_grads
            As in `fastopt.Optimizer.step`; the norm, and what is not finite, are those of the sum over all processes.

        Returns
        -------
        StepInfo
            The same in all processes.

        Raises
        ------
        TypeError, ValueError
            As there; no parameter was written then.
        """
        name = type(self).__name__
        if not isinstance(grads, FlatBuffer) or grads.flat.shape != self._params.flat.shape or grads.backend != "cpu":
            expected = f"a FlatBuffer of {self._params.flat.size} elements in host memory"
            got = f"one of {grads.flat.size}" if isinstance(grads, FlatBuffer) else _messages.describe(grads)
            raise TypeError(f"{name}: grads must be {expected}, got {got}")
        if np.shares_memory(grads.flat, self._params.flat):
            raise ValueError(f"{name}: grads and params are the same memory")
        if zero_grads and not grads.flat.flags.writeable:
            raise ValueError(f"{name}: grads must be writable for zero_grads, got a read-only buffer")
        options = check_step_options(name, grad_scale, max_norm, clip_value, skip_nonfinite, zero_grads)
        self._comm.Reduce_scatter(grads.flat, self._gradient, self._counts, MPI.SUM)
        info = self.optimizer.step(
            [self._gradient],
            grad_scale=options[0] / self._divisor,
            max_norm=max_norm,
            clip_value=clip_value,
            skip_nonfinite=skip_nonfinite,
        )
        self._comm.Allgatherv(MPI.IN_PLACE, [self._params.flat, self._counts, self._starts, MPI.FLOAT])
        if zero_grads:
            grads.flat.fill(0)
        return info

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            f"{type(self).__name__}: a share of several processes is not copied or pickled; save state_dict()"
        )

    # --- Saving and loading

    def state_dict(self, root: int = 0) -> dict[str, Any] | None:
        """The state of the whole optimizer in process `root`, None in the others.

        Returns
        -------
        dict or None
            As of ``optimizer_class([params.flat])`` in one process, which it can be loaded into; and into any number of
            processes.
        """
        saved = self.optimizer.state_dict()
        for where, key in _arrays_in(saved):
            part = where[key]
            counts = self._comm.allgather(part.size)
            where[key] = np.empty(sum(counts), part.dtype) if self._comm.rank == root else None
            self._comm.Gatherv(part, None if where[key] is None else [where[key], counts], root)
        saved["offsets"] = {0: 0}
        return saved if self._comm.rank == root else None

    def load_state_dict(self, state_dict: Mapping[str, Any] | None, root: int = 0) -> None:
        """Take over the state that process `root` passes; what the others pass is ignored.

        Parameters
        ----------
        state_dict : dict or None
            From `state_dict`, of any number of processes, or from one process's ``optimizer_class([params.flat])``.

        Raises
        ------
        TypeError, ValueError, KeyError
            In all processes, for a state that does not fit; nothing was changed then.
        """
        outline: Any = None
        whole: list[tuple[np.ndarray, np.dtype[Any], bool]] = []
        error: Exception | None = None
        if self._comm.rank == root:
            try:
                outline, whole = self._outlined(state_dict)
            except Exception as found:  # whatever it is, the others wait for it
                error = found
        outline, kinds, error = self._comm.bcast((outline, [one[1:] for one in whole], error), root)
        if error is not None:
            raise error
        for k, ((where, key), (dtype, is_scale)) in enumerate(zip(_arrays_in(outline), kinds, strict=True)):
            counts = [-(-count // CODE_BLOCK) for count in self._counts] if is_scale else self._counts
            where[key] = np.empty(counts[self._comm.rank], dtype)
            self._comm.Scatterv([whole[k][0], counts] if whole else None, where[key], root)
        outline["offsets"] = {0: self.shard.start}
        before = self.optimizer.state_dict()
        try:
            self.optimizer.load_state_dict(outline)
        except Exception as found:
            error = found
        errors = [one for one in self._comm.allgather(error) if one is not None]
        if errors:
            self.optimizer.load_state_dict(before)
            raise errors[0]

    def _outlined(self, state_dict: Any) -> tuple[dict[str, Any], list[tuple[np.ndarray, np.dtype[Any], bool]]]:
        """A state dict without its arrays; and these, each with its type and whether it has one element a block."""
        name, total = type(self).__name__, self._params.flat.size
        if not isinstance(state_dict, Mapping) or "optimizer" not in state_dict:
            raise TypeError(
                f"{name}: state_dict must be of this optimizer or fastopt's own, got {_messages.describe(state_dict)}"
            )
        outline = {key: dict(value) if isinstance(value, Mapping) else value for key, value in state_dict.items()}
        if list(outline.get("state") or ()) != [0] or not isinstance(outline["state"][0], Mapping):
            raise ValueError(f"{name}: state_dict must be of one flat parameter, params.flat")
        if not isinstance(outline.get("ema", {}), Mapping):
            raise TypeError(f"{name}: 'ema' of the state_dict must be a dict, got {_messages.describe(outline['ema'])}")
        outline["state"] = {0: dict(outline["state"][0])}
        whole = []
        for where, key in _arrays_in(outline):
            array = np.ascontiguousarray(where[key], where[key].dtype.newbyteorder("=")).ravel()
            is_scale = str(key).endswith("_scale")
            expected = -(-total // CODE_BLOCK) if is_scale else total
            if array.size != expected:
                raise ValueError(f"{name}: {key!r} of the state_dict must have {expected} elements, got {array.size}")
            whole.append((array, array.dtype, is_scale))
            where[key] = _THERE
        return outline, whole


def _sum_of_all(comm: Any, own: float) -> float:
    """The sum over all processes, added in the order of their ranks: the same bits in all of them."""
    total: float = sum(comm.allgather(own))
    return total


_THERE = np.zeros(0)
"""In an outline, where an array belongs."""


def _arrays_in(state_dict: dict[str, Any]) -> list[tuple[dict[Any, Any], Any]]:
    """Where a state dict of one parameter has arrays: a dict and a key of it."""
    dicts = [state_dict["state"][0], state_dict.get("ema", {})]
    return [(where, key) for where in dicts for key, value in where.items() if isinstance(value, np.ndarray)]
