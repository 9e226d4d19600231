"""`LRScheduler`: what all schedules share, and their state dicts. No formulas."""

from __future__ import annotations

import copy
import inspect
import numbers
import types
from collections.abc import Mapping, Sequence
from typing import Any

from fastopt._messages import describe
from fastopt.lr_scheduler.arguments import HasParamGroups, groups_of, integer


class LRScheduler:
    """What all schedules share; and the base for schedules of your own, which override `get_lr`.

    A schedule sets the learning rates of its first epoch when it is made, and those of the next one in every `step`. An
    epoch is whatever lies between two calls: a pass over the data, or a batch. Most schedules multiply the learning
    rates that they find, so several can act on one optimizer, and changes from outside last.

    Parameters
    ----------
    optimizer
        An optimizer of fastopt, or any object with `param_groups`, a list of dicts with ``"lr"``. The schedule writes
        ``"lr"`` there, as a float, and ``"initial_lr"`` where a group has none: the learning rate that it began with.
        Groups that are added later join in.
    last_epoch : int >= -1, default -1
        -1 begins. Another number says that the groups are already at the epoch after it and have their
        ``"initial_lr"``. To resume, `load_state_dict` is simpler, and exact for every schedule.

    Attributes
    ----------
    last_epoch : int
        The epoch whose learning rates are set, from 0.
    base_lrs : list of float
        The learning rates that the schedule began with, one for each group.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or out of bounds; `param_groups` are untouched then.
    KeyError
        For a `last_epoch` other than -1 and groups without ``"initial_lr"``.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> class Halving(fastopt.lr_scheduler.LRScheduler):
    ...     def get_lr(self):
    ...         return [lr / 2**self.last_epoch for lr in self.base_lrs]
    >>> opt = fastopt.SGD(np.zeros(2, np.float32), lr=1.0)
    >>> schedule = Halving(opt)
    >>> schedule.step()
    >>> opt.param_groups[0]["lr"]
    0.5
    """

    optimizer: HasParamGroups
    last_epoch: int
    base_lrs: list[float]
    _last_lr: list[float]

    def __init__(self, optimizer: HasParamGroups, last_epoch: int = -1) -> None:
        groups = groups_of(self._name, optimizer)
        last_epoch = integer(self._name, "last_epoch", last_epoch, -1)
        for k, group in enumerate(groups):
            if last_epoch >= 0 and "initial_lr" not in group:
                raise KeyError(
                    f"{self._name}: param_groups[{k}] must have 'initial_lr' for last_epoch={last_epoch}: load the "
                    "optimizer's state first, or begin with last_epoch=-1"
                )
        self.optimizer = optimizer
        self.last_epoch = last_epoch + 1
        self.base_lrs = self._first_base_lrs(groups)
        self._begin()

    # --- For schedules to override

    def get_lr(self) -> list[float]:
        """The learning rates of `last_epoch`, one for each group; those of the epoch before are in `param_groups`.

        `step` calls it. What is set now is `get_last_lr`.
        """
        raise NotImplementedError(f"{self._name} must define get_lr()")

    def _first_lr(self) -> list[float]:
        """The learning rates that the schedule sets when it is made."""
        return self.get_lr()

    def _first_base_lrs(self, groups: list[dict[str, Any]]) -> list[float]:
        return [float(group.get("initial_lr", group["lr"])) for group in groups]

    def _begin(self) -> None:
        """Set the learning rates of the first epoch, from those that the groups have."""
        self._write_all(self._first_lr())

    def _begin_again(self) -> None:
        """Go to epoch 0, whatever the learning rates are now: a sequence has come to this schedule."""
        self._join_new_groups()
        self.last_epoch = 0
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr
        self._begin()

    def _advance(self) -> None:
        """Set the learning rates of `last_epoch`."""
        self._join_new_groups()
        self._write_all(self.get_lr())

    @property
    def _needs_metrics(self) -> bool:
        """Whether `step` takes a measured value."""
        return False

    # --- For users

    def step(self) -> None:
        """Set the learning rates of the next epoch. Call it after the optimizer's steps of this one."""
        self.last_epoch += 1
        try:
            self._advance()
        except BaseException:
            self.last_epoch -= 1
            raise

    def get_last_lr(self) -> list[float]:
        """The learning rates that the schedule set last, one for each group."""
        return list(self._last_lr)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, in plain types.

        Functions that were given are not in it; of callable objects it holds the attributes. The learning rates
        themselves are in the optimizer's state dict: save both.
        """
        saved = {name: _saved(value) for name, value in vars(self).items() if name != "optimizer"}
        return {"class": self._name, **saved}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, its arguments included; load the optimizer's, too, before or after.

        Raises
        ------
        TypeError, ValueError, KeyError
            For a state dict of another schedule, or for another number of groups; nothing was changed then.
        """
        self._check_state_dict(state_dict)
        self._restore(state_dict)

    def __repr__(self) -> str:
        lrs = [f"{lr:.6g}" for lr in self._last_lr]
        shown = lrs[0] if len(set(lrs)) == 1 else f"[{', '.join(lrs)}]"
        return f"{self._call()}: epoch {self.last_epoch}, lr {shown}"

    # --- Inside

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _lrs(self) -> list[float]:
        """The learning rates that the groups have."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def _each(self, name: str) -> list[Any]:
        """The argument `name` for each group."""
        value = getattr(self, name)
        n = len(self.optimizer.param_groups)
        if not isinstance(value, list):
            return [value] * n
        if len(value) != n:
            raise ValueError(f"{self._name}: {name} has {len(value)} values, the optimizer now has {n} param groups")
        return value

    def _join_new_groups(self) -> None:
        groups = self.optimizer.param_groups
        if len(groups) < len(self.base_lrs):
            raise ValueError(
                f"{self._name}: the optimizer had {len(self.base_lrs)} param groups, now it has {len(groups)}"
            )
        for group in groups[len(self.base_lrs) :]:
            self.base_lrs.append(float(group.get("initial_lr", group["lr"])))

    def _write_all(self, lrs: Sequence[float]) -> None:
        """Write the learning rates, and those at the beginning where a group has none."""
        self._write(lrs)
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group.setdefault("initial_lr", lr)

    def _write(self, lrs: Sequence[float]) -> None:
        groups = self.optimizer.param_groups
        if len(lrs) != len(groups):
            raise ValueError(f"{self._name}: {len(lrs)} learning rates for {len(groups)} param groups")
        for lr in lrs:
            if isinstance(lr, bool) or not isinstance(lr, numbers.Real):
                raise TypeError(f"{self._name}: a learning rate must be a real number, got {describe(lr)}")
        self._last_lr = [float(lr) for lr in lrs]
        for group, lr in zip(groups, self._last_lr, strict=True):
            group["lr"] = lr

    def _call(self) -> str:
        """The call that made this schedule, without the optimizer and what has its default."""
        arguments = []
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            value = getattr(self, name, parameter.default)
            if name not in ("self", "optimizer", "last_epoch") and value != parameter.default:
                arguments.append(f"{name}={_shown(value)}")
        return f"{self._name}({', '.join(arguments)})"

    def _check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"{self._name}: state_dict must be a dict, got {describe(state_dict)}")
        if state_dict.get("class") != self._name:
            raise ValueError(f"{self._name}: state_dict must be of {self._name}, got {state_dict.get('class')!r}")
        expected = {"class", *vars(self)} - {"optimizer"}
        if odd := sorted(map(str, expected ^ set(state_dict))):
            raise KeyError(f"{self._name}: state_dict must have the keys {sorted(expected)}; {odd} differ")
        for name, value in vars(self).items():
            if name != "optimizer":
                _check_saved(f"{self._name}: {name!r} of the state_dict", value, state_dict[name])

    def _restore(self, state_dict: Mapping[str, Any]) -> None:
        for name, value in vars(self).items():
            if name != "optimizer":
                setattr(self, name, _restored(value, state_dict[name]))


def _saved(value: Any) -> Any:
    if isinstance(value, LRScheduler):
        return value.state_dict()
    if isinstance(value, list):
        return [_saved(item) for item in value]
    if isinstance(value, types.FunctionType | types.MethodType):
        return None
    if callable(value):
        return copy.deepcopy(getattr(value, "__dict__", None))
    return value


def _check_saved(what: str, value: Any, saved: Any) -> None:
    """Raise unless `saved` can take the place of `value`."""
    if isinstance(value, LRScheduler):
        value._check_state_dict(saved)
    elif isinstance(value, list):
        if not isinstance(saved, list) or len(saved) != len(value):
            raise ValueError(f"{what} must be a list of {len(value)}, got {saved!r:.60}")
        for item, saved_item in zip(value, saved, strict=True):
            _check_saved(what, item, saved_item)
    elif callable(value):
        if saved is not None and not isinstance(saved, dict):
            raise TypeError(f"{what} must be None or a dict of attributes, got {saved!r:.60}")
    elif isinstance(value, bool | str):
        if type(saved) is not type(value):
            raise TypeError(f"{what} must be a {type(value).__name__}, got {saved!r:.60}")
    elif saved is not None and (isinstance(saved, bool) or not isinstance(saved, int | float)):
        raise TypeError(f"{what} must be a number, got {saved!r:.60}")


def _restored(value: Any, saved: Any) -> Any:
    """What `saved` stands for; schedules and callable objects in `value` are changed in place."""
    if isinstance(value, LRScheduler):
        value._restore(saved)
        return value
    if isinstance(value, list):
        return [_restored(item, saved_item) for item, saved_item in zip(value, saved, strict=True)]
    if callable(value):
        if saved is not None:
            vars(value).update(copy.deepcopy(saved))
        return value
    return saved


def _shown(value: Any) -> str:
    if isinstance(value, LRScheduler):
        return value._call()
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return getattr(value, "__name__", None) or repr(value)
