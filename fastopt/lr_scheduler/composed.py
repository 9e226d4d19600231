"""Schedules made of schedules: one after another, or all at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

from fastopt._messages import describe
from fastopt.lr_scheduler.arguments import HasParamGroups, groups_of, integer, integers
from fastopt.lr_scheduler.base import LRScheduler


def _check_members(owner: str, optimizer: Any, schedulers: Any) -> list[LRScheduler]:
    """`schedulers` as a list, if they all are schedules of `optimizer` that step without a metric."""
    if isinstance(schedulers, LRScheduler | str | Mapping) or not isinstance(schedulers, Iterable):
        raise TypeError(f"{owner}: schedulers must be a list of schedules, got {describe(schedulers)}")
    members = list(schedulers)
    if not members:
        raise ValueError(f"{owner}: schedulers must hold at least one schedule, got none")
    for k, member in enumerate(members):
        if not isinstance(member, LRScheduler):
            raise TypeError(f"{owner}: schedulers[{k}] must be a schedule of fastopt, got {describe(member)}")
        if member._needs_metrics:
            raise ValueError(f"{owner}: schedulers[{k}] is a {member._call()}, whose step() needs a metric")
        if member.optimizer is not (optimizer or members[0].optimizer):
            raise ValueError(f"{owner}: schedulers[{k}], {member._call()}, is of another optimizer")
    return members


class SequentialLR(LRScheduler):
    """One schedule after another, each from its beginning.

    Parameters
    ----------
    optimizer
        That of all `schedulers`.
    schedulers : list of schedules
        They may be sequences and chains themselves.
    milestones : list of int >= 0
        Epochs at which the second, third, ... schedule begins: one fewer than `schedulers`, in order.
    last_epoch : int >= -1, default -1
        The count begins at the epoch after it; the first schedule begins in any case. Resume with
        `load_state_dict`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> from fastopt.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
    >>> opt = fastopt.SGD(np.zeros(2, np.float32), lr=1.0)
    >>> up, down = LinearLR(opt, start_factor=0.5, total_iters=5), CosineAnnealingLR(opt, T_max=10)
    >>> schedule = SequentialLR(opt, [up, down], milestones=[5])
    >>> for _ in range(10):
    ...     schedule.step()
    >>> schedule  # doctest: +NORMALIZE_WHITESPACE
    SequentialLR(schedulers=[LinearLR(start_factor=0.5), CosineAnnealingLR(T_max=10)], milestones=[5]): epoch 10,
    lr 0.5
    """

    def __init__(
        self,
        optimizer: HasParamGroups,
        schedulers: Iterable[LRScheduler],
        milestones: Iterable[int],
        last_epoch: int = -1,
    ) -> None:
        name = self._name
        groups = groups_of(name, optimizer)
        self.optimizer = optimizer
        self.schedulers = _check_members(name, optimizer, schedulers)
        self.milestones = integers(name, "milestones", milestones, 0)
        if len(self.milestones) != len(self.schedulers) - 1:
            raise ValueError(
                f"{name}: milestones must be one fewer than schedulers, got {len(self.milestones)} for "
                f"{len(self.schedulers)}"
            )
        if self.milestones != sorted(self.milestones):
            raise ValueError(f"{name}: milestones must be in order, got {self.milestones}")
        self.last_epoch = integer(name, "last_epoch", last_epoch, -1) + 1
        for group in groups:
            group["lr"] = float(group["initial_lr"])
        self._begin()

    def _begin(self) -> None:
        first = self.schedulers[bisect_right(self.milestones, 0)]
        first._begin()
        self._last_lr = first.get_last_lr()

    def _begin_again(self) -> None:
        self.last_epoch = 0
        first = self.schedulers[bisect_right(self.milestones, 0)]
        first._begin_again()
        self._last_lr = first.get_last_lr()

    def _advance(self) -> None:
        k = bisect_right(self.milestones, self.last_epoch)
        current = self.schedulers[k]
        if k > 0 and self.milestones[k - 1] == self.last_epoch:
            current._begin_again()
        else:
            current.step()
        self._last_lr = current.get_last_lr()


class ChainedScheduler(LRScheduler):
    """Several schedules at once: each multiplies what the one before it has left.

    Parameters
    ----------
    schedulers : list of schedules
        All of one optimizer; they step in this order.
    optimizer
        That of the schedules, which it is if None is given.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> from fastopt.lr_scheduler import ChainedScheduler, ConstantLR, ExponentialLR
    >>> opt = fastopt.SGD(np.zeros(2, np.float32), lr=1.0)
    >>> schedule = ChainedScheduler([ConstantLR(opt, 0.5, total_iters=2), ExponentialLR(opt, 0.5)])
    >>> for _ in range(3):
    ...     print(opt.param_groups[0]["lr"])
    ...     schedule.step()
    0.5
    0.25
    0.25
    """

    def __init__(self, schedulers: Iterable[LRScheduler], optimizer: HasParamGroups | None = None) -> None:
        self.schedulers = _check_members(self._name, optimizer, schedulers)
        self.optimizer = self.schedulers[0].optimizer
        self.last_epoch = self.schedulers[0].last_epoch
        self._last_lr = self._lrs()

    def _begin(self) -> None:
        for scheduler in self.schedulers:
            scheduler._begin()
        self._last_lr = self._lrs()

    def _begin_again(self) -> None:
        self.last_epoch = 0
        first, *others = self.schedulers
        first._begin_again()
        for scheduler in others:
            scheduler._begin()
        self._last_lr = self._lrs()

    def _advance(self) -> None:
        for scheduler in self.schedulers:
            scheduler.step()
        self._last_lr = self._lrs()
