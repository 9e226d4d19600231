"""The schedule that goes by what is measured in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, SupportsFloat

from fastopt.lr_scheduler.arguments import (
    NON_NEGATIVE,
    HasParamGroups,
    for_each_group,
    groups_of,
    integer,
    measured,
    one_of,
)
from fastopt.lr_scheduler.base import LRScheduler
from fastopt.rules import Real


class ReduceLROnPlateau(LRScheduler):
    r"""Reduce the learning rates when what is measured has stopped improving.

    .. math:: \eta \leftarrow \max(f \eta, \eta_{\min})

    after more than `patience` epochs in a row without an improvement.

    Parameters
    ----------
    optimizer
        See `LRScheduler`.
    mode : {"min", "max"}
        Whether small or large values are good.
    factor : float in [0, 1), default 0.1
        :math:`f`.
    patience : int >= 0, default 10
        Epochs without an improvement that are let pass.
    threshold : float >= 0, default 1e-4
        An improvement is more than this.
    threshold_mode : {"rel", "abs"}
        Relative to the best value (below ``best * (1 - threshold)``, above ``best * (1 + threshold)``), or absolute.
    cooldown : int >= 0, default 0
        Epochs after a reduction that do not count.
    min_lr : float >= 0 or list of floats, default 0
        :math:`\eta_{\min}`, for all groups or for each.
    eps : float >= 0, default 1e-8
        Reductions by no more than this are left out.

    Attributes
    ----------
    best : float
        The best value so far.
    num_bad_epochs : int
        Epochs in a row without an improvement.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.SGD(np.zeros(2, np.float32), lr=1.0)
    >>> schedule = fastopt.lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=2)
    >>> for loss in (3.0, 2.0, 2.0, 2.0, 2.0):
    ...     schedule.step(loss)
    >>> schedule
    ReduceLROnPlateau(factor=0.5, patience=2): epoch 5, lr 0.5
    """

    def __init__(
        self,
        optimizer: HasParamGroups,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: float | Sequence[float] = 0.0,
        eps: float = 1e-8,
    ) -> None:
        name = self._name
        n = len(groups_of(name, optimizer))
        self.mode: str = one_of(name, "mode", mode, ("min", "max"))
        self.factor = Real(0.0, 1.0, high_open=True).check(name, "factor", factor)
        self.patience = integer(name, "patience", patience, 0)
        self.threshold = NON_NEGATIVE.check(name, "threshold", threshold)
        self.threshold_mode: str = one_of(name, "threshold_mode", threshold_mode, ("rel", "abs"))
        self.cooldown = integer(name, "cooldown", cooldown, 0)
        self.min_lr = for_each_group(name, "min_lr", min_lr, n, NON_NEGATIVE.check)
        self.eps = NON_NEGATIVE.check(name, "eps", eps)
        self.optimizer = optimizer
        self.last_epoch = 0
        self.best = math.inf if mode == "min" else -math.inf
        self.num_bad_epochs = 0
        self.cooldown_counter = 0
        self._last_lr = [float(lr) for lr in self._lrs()]

    @property
    def _needs_metrics(self) -> bool:
        return True

    @property
    def in_cooldown(self) -> bool:
        """Whether epochs do not count now, because learning rates have just been reduced."""
        return self.cooldown_counter > 0

    def _improves(self, value: float) -> bool:
        if self.threshold_mode == "rel":
            bound = self.best * (1.0 - self.threshold if self.mode == "min" else 1.0 + self.threshold)
        else:
            bound = self.best - self.threshold if self.mode == "min" else self.best + self.threshold
        return value < bound if self.mode == "min" else value > bound

    def step(self, metrics: SupportsFloat) -> None:  # type: ignore[override] # the only one that measures
        """Reduce the learning rates if it is time.

        Parameters
        ----------
        metrics : float
            What is watched, as measured after this epoch; NaN is no improvement.
        """
        value = measured(self._name, "metrics", metrics)
        lowest = self._each("min_lr")
        self.last_epoch += 1
        if self._improves(value):
            self.best = value
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1
        if self.in_cooldown:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            for group, bound in zip(self.optimizer.param_groups, lowest, strict=True):
                lr = float(group["lr"])
                reduced = max(lr * self.factor, bound)
                if lr - reduced > self.eps:
                    group["lr"] = reduced
            self.cooldown_counter = self.cooldown
            self.num_bad_epochs = 0
        self._last_lr = [float(lr) for lr in self._lrs()]
