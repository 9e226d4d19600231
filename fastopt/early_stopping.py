"""`EarlyStopping`: when a training ends, and the best parameters. Learning rates are for `fastopt.lr_scheduler`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, SupportsFloat

import numpy as np

from fastopt._messages import describe, few
from fastopt.lr_scheduler.arguments import integer, measured, one_of
from fastopt.rules import Real, Switch

_OWN = ("patience", "min_delta", "mode", "baseline", "restore_best")
_PROGRESS = ("best", "best_step", "wait", "n_steps", "stopped_step")


class EarlyStopping:
    r"""End a training when what is measured no longer improves, with the best parameters in place.

    It counts as Keras does: with a best value :math:`v^*`, a value :math:`v` is an improvement if
    :math:`v + \delta < v^*` (in mode "max" :math:`v - \delta > v^*`). The first number is one, NaN never is.

    Parameters
    ----------
    patience : int >= 0, default 10
        Stop at this many steps in a row without an improvement; 0 is as 1.
    min_delta : float >= 0, default 0
        :math:`\delta`: an improvement is more than this.
    mode : {"min", "max"}
        Whether small or large values are good.
    baseline : float or None, default None
        Improvements that are not also better than this by more than `min_delta` are kept as the best, but do not start
        the count anew.
    restore_best : bool, default True
        Keep a copy of the parameters at the best value, and put it back into them when it stops. It is allocated in the
        first step; an improvement only copies. The optimizer's state stays as it is; with ``master="split"`` that is
        half of every parameter, so keep its `state_dict` there instead.

    Attributes
    ----------
    best : float or None
        The best value so far.
    best_step : int or None
        The step that it came from, counted from 0.
    wait : int
        Steps in a row without an improvement.
    n_steps : int
        Steps so far.
    stopped_step : int or None
        The step that said stop first.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or out of bounds.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> p = np.ones(1, np.float32)
    >>> opt = fastopt.SGD(p, lr=1.5)
    >>> stopping = fastopt.EarlyStopping(patience=2)
    >>> for epoch in range(100):  # with this learning rate the loss grows
    ...     info = opt.step(2 * p)
    ...     if stopping.step(p[0] ** 2, p):
    ...         break
    >>> stopping
    EarlyStopping(patience=2): best 4 at step 0, stopped at step 2
    >>> p
    array([-2.], dtype=float32)
    """

    def __init__(
        self,
        patience: int = 10,
        min_delta: float = 0.0,
        mode: Literal["min", "max"] = "min",
        baseline: float | None = None,
        restore_best: bool = True,
    ) -> None:
        self.patience = integer("EarlyStopping", "patience", patience, 0)
        self.min_delta = Real(0.0).check("EarlyStopping", "min_delta", min_delta)
        self.mode: str = one_of("EarlyStopping", "mode", mode, ("min", "max"))
        self.baseline = None if baseline is None else Real().check("EarlyStopping", "baseline", baseline)
        self.restore_best = Switch().check("EarlyStopping", "restore_best", restore_best)
        self.best: float | None = None
        self.best_step: int | None = None
        self.wait = 0
        self.n_steps = 0
        self.stopped_step: int | None = None
        self._kept: dict[Any, np.ndarray] | None = None
        """The best parameters, by name or position; those of a first step that was no number, until there is a best."""

    def step(self, value: SupportsFloat, params: Any = None) -> bool:
        """Take note of a value, and of the parameters that gave it.

        Parameters
        ----------
        value : float
            What is watched; a number, or a scalar array or tensor.
        params
            What the optimizer trains: a `FlatBuffer`, a dict or a list of NumPy arrays, or one array, of any type. In
            every step of the same names, or number, shapes and types. Not read without `restore_best`.

        Returns
        -------
        bool
            Whether to stop. If so, `params` hold the best parameters.

        Raises
        ------
        TypeError, ValueError
            For a value that is no number, and parameters that are no arrays or do not fit those of earlier steps;
            nothing was changed then.
        """
        number = measured("EarlyStopping", "value", value)
        improves = self._improves(number, self.best)
        wait = 0 if improves and self._improves(number, self.baseline) else self.wait + 1
        stops = not improves and wait >= self.patience
        if self.restore_best:
            arrays = self._arrays(params)
            if self._kept is None:
                self._kept = {name: array.copy() for name, array in arrays.items()}
            elif improves:
                _copy(arrays, self._kept)
            elif stops:
                _copy(self._kept, arrays)
        if improves:
            self.best, self.best_step = number, self.n_steps
        if stops and self.stopped_step is None:
            self.stopped_step = self.n_steps
        self.wait = wait
        self.n_steps += 1
        return stops

    def restore(self, params: Any) -> None:
        """Put the best parameters into `params`: for a training that ends without `step` saying so.

        Parameters
        ----------
        params
            As in `step`.

        Raises
        ------
        TypeError, ValueError
            For parameters that do not fit; nothing was changed then.
        RuntimeError
            If there are none yet, or none are kept.
        """
        if self._kept is None:
            why = "no step yet" if self.restore_best else "restore_best=False"
            raise RuntimeError(f"EarlyStopping: there are no parameters to restore: {why}")
        _copy(self._kept, self._arrays(params))

    def state_dict(self) -> dict[str, Any]:
        """A snapshot: arguments, progress, and ``"params"``, copies of the best parameters by name or position."""
        kept = None if self._kept is None else {name: array.copy() for name, array in self._kept.items()}
        return {**{name: getattr(self, name) for name in (*_OWN, *_PROGRESS)}, "params": kept}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, its arguments included.

        Raises
        ------
        TypeError, ValueError, KeyError
            For anything else; nothing was changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"EarlyStopping: state_dict must be a dict, got {describe(state_dict)}")
        expected = {*_OWN, *_PROGRESS, "params"}
        if odd := sorted(map(str, expected ^ set(state_dict))):
            raise KeyError(f"EarlyStopping: state_dict must have the keys {sorted(expected)}; {odd} differ")
        loaded = EarlyStopping(**{name: state_dict[name] for name in _OWN})
        for name in ("wait", "n_steps"):
            setattr(loaded, name, integer("EarlyStopping", name, state_dict[name], 0))
        for name in ("best_step", "stopped_step"):
            if state_dict[name] is not None:
                setattr(loaded, name, integer("EarlyStopping", name, state_dict[name], 0))
        if state_dict["best"] is not None:
            loaded.best = measured("EarlyStopping", "best", state_dict["best"])
        if state_dict["params"] is not None:
            loaded._kept = {name: array.copy() for name, array in _named(state_dict["params"]).items()}
        vars(self).update(vars(loaded))

    def __repr__(self) -> str:
        defaults = vars(EarlyStopping())
        changed = [f"{name}={getattr(self, name)!r}" for name in _OWN if getattr(self, name) != defaults[name]]
        best = "no best yet" if self.best is None else f"best {self.best:.6g} at step {self.best_step}"
        since = f"{self.wait} since" if self.stopped_step is None else f"stopped at step {self.stopped_step}"
        return f"EarlyStopping({', '.join(changed)}): {best}, {since}"

    # --- Inside

    def _improves(self, value: float, other: float | None) -> bool:
        if other is None:
            return not math.isnan(value)
        return value + self.min_delta < other if self.mode == "min" else value - self.min_delta > other

    def _arrays(self, params: Any) -> dict[Any, np.ndarray]:
        """The arrays of `params` by name or position, checked to fit those that are kept."""
        arrays = _named(params)
        kept = arrays if self._kept is None else self._kept
        if arrays.keys() != kept.keys():
            raise ValueError(
                f"EarlyStopping: params must have the names of the first step, {few(list(kept))}, got "
                f"{few(list(arrays))}"
            )
        for name, array in arrays.items():
            if array.shape != kept[name].shape or array.dtype != kept[name].dtype:
                raise ValueError(
                    f"EarlyStopping: params[{name!r}] must be {describe(kept[name])} as in the first step, got "
                    f"{describe(array)}"
                )
            if not array.flags.writeable:
                raise ValueError(f"EarlyStopping: params[{name!r}] must be writable, got a read-only array")
        return arrays


def _named(params: Any) -> dict[Any, np.ndarray]:
    """The arrays of `params` by name or position; one array is a list of one."""
    if isinstance(params, Mapping):
        arrays = dict(params)
    elif isinstance(params, Sequence) and not isinstance(params, str | bytes):
        arrays = dict(enumerate(params))
    else:
        arrays = {0: params}
    hint = "; of a PyTorch module hand over {name: p.detach().numpy() for name, p in module.named_parameters()}"
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
            what = "params" if array is params else f"params[{name!r}]"
            of_torch = hasattr(array, "named_parameters") or hasattr(array, "detach")
            raise TypeError(
                f"EarlyStopping: {what} must be a NumPy array, or a dict or list of them, got {describe(array)}"
                + hint * of_torch
            )
    return arrays


def _copy(source: Mapping[Any, np.ndarray], target: Mapping[Any, np.ndarray]) -> None:
    for name, array in target.items():
        np.copyto(array, source[name])
