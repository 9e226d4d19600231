"""Schedules that multiply the learning rates by a factor every epoch. Cycles and warm-up are elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from fastopt.lr_scheduler.arguments import (
    NON_NEGATIVE,
    SHARE,
    HasParamGroups,
    for_each_group,
    function,
    groups_of,
    integer,
    integers,
)
from fastopt.lr_scheduler.base import LRScheduler
from fastopt.rules import Real

Factor: TypeAlias = Callable[[int], float]
"""Epoch -> factor of a learning rate."""


class LambdaLR(LRScheduler):
    r"""A function of the epoch times the learning rate at the beginning.

    .. math:: \eta_t = \eta_0 \, \lambda(t)

    Parameters
    ----------
    optimizer
        See `LRScheduler`.
    lr_lambda : function or list of functions
        Epoch -> factor, for all groups or one for each.
    last_epoch : int >= -1, default -1
        See `LRScheduler`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.SGD(np.zeros(2, np.float32), lr=1.0)
    >>> schedule = fastopt.lr_scheduler.LambdaLR(opt, lambda epoch: 1 / (1 + epoch))
    >>> schedule.step()
    >>> opt.param_groups[0]["lr"]
    0.5
    """

    def __init__(self, optimizer: HasParamGroups, lr_lambda: Factor | Sequence[Factor], last_epoch: int = -1) -> None:
        n = len(groups_of(self._name, optimizer))
        self.lr_lambda: Factor | list[Factor] = for_each_group(self._name, "lr_lambda", lr_lambda, n, function)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        return [lr * factor(self.last_epoch) for lr, factor in zip(self.base_lrs, self._each("lr_lambda"), strict=True)]


class MultiplicativeLR(LRScheduler):
    r"""A function of the epoch times the learning rate of the epoch before.

    .. math:: \eta_t = \eta_{t-1} \, \lambda(t)

    Parameters
    ----------
    optimizer
        See `LRScheduler`.
    lr_lambda : function or list of functions
        Epoch, from 1 -> factor, for all groups or one for each.
    last_epoch : int >= -1, default -1
        See `LRScheduler`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.SGD(np.zeros(2, np.float32), lr=1.0)
    >>> schedule = fastopt.lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.5 if epoch < 3 else 1.0)
    >>> for _ in range(5):
    ...     schedule.step()
    >>> opt.param_groups[0]["lr"]
    0.25
    """

    def __init__(self, optimizer: HasParamGroups, lr_lambda: Factor | Sequence[Factor], last_epoch: int = -1) -> None:
        n = len(groups_of(self._name, optimizer))
        self.lr_lambda: Factor | list[Factor] = for_each_group(self._name, "lr_lambda", lr_lambda, n, function)
        super().__init__(optimizer, last_epoch)

    def _first_lr(self) -> list[float]:
        return self._lrs()

    def _begin_again(self) -> None:
        self.last_epoch = 0
        self._advance()

    def get_lr(self) -> list[float]:
        return [lr * factor(self.last_epoch) for lr, factor in zip(self._lrs(), self._each("lr_lambda"), strict=True)]


class StepLR(LRScheduler):
    r"""Decay by `gamma` every `step_size` epochs.

    .. math:: \eta_t = \eta_{t-1} \, \gamma^{[t > 0 \text{ and } s \mid t]}

    Parameters
    ----------
    optimizer
        See `LRScheduler`.
    step_size : int >= 1
        Epochs from one decay to the next.
    gamma : float >= 0, default 0.1
        Factor.
    last_epoch : int >= -1, default -1
        See `LRScheduler`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.SGD(np.zeros(2, np.float32), lr=1.0)
    >>> schedule = fastopt.lr_scheduler.StepLR(opt, step_size=30, gamma=0.5)
    >>> for _ in range(60):
    ...     schedule.step()
    >>> schedule
    StepLR(step_size=30, gamma=0.5): epoch 60, lr 0.25
    """

    def __init__(self, optimizer: HasParamGroups, step_size: int, gamma: float = 0.1, last_epoch: int = -1) -> None:
        self.step_size = integer(self._name, "step_size", step_size, 1)
        self.gamma = NON_NEGATIVE.check(self._name, "gamma", gamma)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        decays = self.last_epoch > 0 and self.last_epoch % self.step_size == 0
        return [lr * self.gamma for lr in self._lrs()] if decays else self._lrs()


class MultiStepLR(LRScheduler):
    r"""Decay by `gamma` at every one of the `milestones`.

    .. math:: \eta_t = \eta_{t-1} \, \gamma^{|\{m : m = t\}|}

    Parameters
    ----------
    optimizer
        See `LRScheduler`.
    milestones : list of int >= 0
        Epochs of the decays; one that is there twice decays twice.
    gamma : float >= 0, default 0.1
        Factor.
    last_epoch : int >= -1, default -1
        See `LRScheduler`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.SGD(np.zeros(2, np.float32), lr=1.0)
    >>> schedule = fastopt.lr_scheduler.MultiStepLR(opt, milestones=[30, 80], gamma=0.5)
    >>> for _ in range(100):
    ...     schedule.step()
    >>> opt.param_groups[0]["lr"]
    0.25
    """

    def __init__(
        self, optimizer: HasParamGroups, milestones: Iterable[int], gamma: float = 0.1, last_epoch: int = -1
    ) -> None:
        self.milestones = integers(self._name, "milestones", milestones, 0)
        self.gamma = NON_NEGATIVE.check(self._name, "gamma", gamma)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        decays = self.milestones.count(self.last_epoch)
        return [lr * self.gamma**decays for lr in self._lrs()] if decays else self._lrs()


class ConstantLR(LRScheduler):
    r"""A part of the learning rate for the first epochs, then all of it.

    .. math:: \eta_0 \to f \eta_0, \qquad \eta_t = \eta_{t-1} \, (1 / f)^{[t = T]}

    Parameters
    ----------
    optimizer
        See `LRScheduler`.
    factor : float in (0, 1], default 1/3
        Of the learning rate at the beginning.
    total_iters : int >= 1, default 5
        Epochs with this factor.
    last_epoch : int >= -1, default -1
        See `LRScheduler`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.SGD(np.zeros(2, np.float32), lr=1.0)
    >>> schedule = fastopt.lr_scheduler.ConstantLR(opt, factor=0.5, total_iters=2)
    >>> for epoch in range(3):
    ...     print(opt.param_groups[0]["lr"])
    ...     schedule.step()
    0.5
    0.5
    1.0
    """

    def __init__(
        self, optimizer: HasParamGroups, factor: float = 1 / 3, total_iters: int = 5, last_epoch: int = -1
    ) -> None:
        self.factor = Real(0.0, 1.0, low_open=True).check(self._name, "factor", factor)
        self.total_iters = integer(self._name, "total_iters", total_iters, 1)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        if self.last_epoch == 0:
            return [lr * self.factor for lr in self._lrs()]
        if self.last_epoch == self.total_iters:
            return [lr * (1.0 / self.factor) for lr in self._lrs()]
        return self._lrs()


class LinearLR(LRScheduler):
    r"""A factor that goes along a line from `start_factor` to `end_factor`.

    .. math:: \eta_t = \eta_{t-1} \left(1 + \frac{e - s}{T s + (t - 1)(e - s)}\right) \text{ for } t \le T,
        \qquad \text{so } \eta_t = \eta_0 \left(s + (e - s) \frac{\min(t, T)}{T}\right)

    Parameters
    ----------
    optimizer
        See `LRScheduler`.
    start_factor : float in (0, 1], default 1/3
        In the first epoch.
    end_factor : float in [0, 1], default 1
        From epoch `total_iters` on. With 0, rounding leaves some 1e-17 of the learning rate, in torch of either sign;
        what is negative there is 0 here, because optimizers refuse it.
    total_iters : int >= 1, default 5
        Epochs from one to the other.
    last_epoch : int >= -1, default -1
        See `LRScheduler`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.SGD(np.zeros(2, np.float32), lr=1.0)
    >>> schedule = fastopt.lr_scheduler.LinearLR(opt, start_factor=0.5, total_iters=2)
    >>> for epoch in range(3):
    ...     print(opt.param_groups[0]["lr"])
    ...     schedule.step()
    0.5
    0.75
    1.0
    """

    def __init__(
        self,
        optimizer: HasParamGroups,
        start_factor: float = 1 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        self.start_factor = Real(0.0, 1.0, low_open=True).check(self._name, "start_factor", start_factor)
        self.end_factor = SHARE.check(self._name, "end_factor", end_factor)
        self.total_iters = integer(self._name, "total_iters", total_iters, 1)
        super().__init__(optimizer, last_epoch)

    def _first_lr(self) -> list[float]:
        return self.get_lr() if self.last_epoch == 0 else self._lrs()

    def get_lr(self) -> list[float]:
        if self.last_epoch == 0:
            return [lr * self.start_factor for lr in self._lrs()]
        if self.last_epoch > self.total_iters:
            return self._lrs()
        way = self.end_factor - self.start_factor
        factor = 1.0 + way / (self.total_iters * self.start_factor + (self.last_epoch - 1) * way)
        return [max(lr * factor, 0.0) for lr in self._lrs()]


class ExponentialLR(LRScheduler):
    r"""Decay by `gamma` every epoch.

    .. math:: \eta_t = \gamma \, \eta_{t-1}

    Parameters
    ----------
    optimizer
        See `LRScheduler`.
    gamma : float >= 0
        Factor.
    last_epoch : int >= -1, default -1
        See `LRScheduler`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.SGD(np.zeros(2, np.float32), lr=1.0)
    >>> schedule = fastopt.lr_scheduler.ExponentialLR(opt, gamma=0.5)
    >>> for _ in range(3):
    ...     schedule.step()
    >>> opt.param_groups[0]["lr"]
    0.125
    """

    def __init__(self, optimizer: HasParamGroups, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = NON_NEGATIVE.check(self._name, "gamma", gamma)
        super().__init__(optimizer, last_epoch)

    def _first_lr(self) -> list[float]:
        return self._lrs()

    def get_lr(self) -> list[float]:
        return [lr * self.gamma for lr in self._lrs()]


class PolynomialLR(LRScheduler):
    r"""Down to 0 along a power of the epochs that are left.

    .. math:: \eta_t = \eta_{t-1} \left(\frac{1 - t / T}{1 - (t - 1) / T}\right)^p \text{ for } t \le T,
        \qquad \text{so } \eta_t = \eta_0 \left(1 - \frac{\min(t, T)}{T}\right)^p

    Parameters
    ----------
    optimizer
        See `LRScheduler`.
    total_iters : int >= 1, default 5
        Epochs until 0.
    power : float >= 0, default 1
        1 is a line.
    last_epoch : int >= -1, default -1
        See `LRScheduler`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.SGD(np.zeros(2, np.float32), lr=1.0)
    >>> schedule = fastopt.lr_scheduler.PolynomialLR(opt, total_iters=4, power=2.0)
    >>> schedule.step()
    >>> opt.param_groups[0]["lr"]
    0.5625
    """

    def __init__(
        self, optimizer: HasParamGroups, total_iters: int = 5, power: float = 1.0, last_epoch: int = -1
    ) -> None:
        self.total_iters = integer(self._name, "total_iters", total_iters, 1)
        self.power = NON_NEGATIVE.check(self._name, "power", power)
        super().__init__(optimizer, last_epoch)

    def _first_lr(self) -> list[float]:
        return self._lrs()

    def get_lr(self) -> list[float]:
        if self.last_epoch > self.total_iters:
            return self._lrs()
        left, left_before = (1.0 - epoch / self.total_iters for epoch in (self.last_epoch, self.last_epoch - 1))
        return [lr * (left / left_before) ** self.power for lr in self._lrs()]


class CosineAnnealingLR(LRScheduler):
    r"""Along half a cosine from the learning rate to `eta_min`, and back again if it goes on.

    .. math:: \eta_t = \eta_{\min} + (\eta_{t-1} - \eta_{\min}) \frac{1 + \cos(\pi t / T)}{1 + \cos(\pi (t - 1) / T)},
        \qquad \text{so } \eta_t = \eta_{\min} + \tfrac{1}{2} (\eta_0 - \eta_{\min}) (1 + \cos(\pi t / T))

    Parameters
    ----------
    optimizer
        See `LRScheduler`.
    T_max : int >= 1
        Epochs from the learning rate to `eta_min`.
    eta_min : float >= 0, default 0
        The lowest learning rate.
    last_epoch : int >= -1, default -1
        See `LRScheduler`.

    References
    ----------
    Loshchilov, Hutter: SGDR: stochastic gradient descent with warm restarts, arXiv:1608.03983; without the restarts.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.SGD(np.zeros(2, np.float32), lr=1.0)
    >>> schedule = fastopt.lr_scheduler.CosineAnnealingLR(opt, T_max=100)
    >>> for _ in range(50):
    ...     schedule.step()
    >>> schedule
    CosineAnnealingLR(T_max=100): epoch 50, lr 0.5
    """

    def __init__(
        self,
        optimizer: HasParamGroups,
        T_max: int,  # noqa: N803 - torch's name
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.T_max = integer(self._name, "T_max", T_max, 1)
        self.eta_min = NON_NEGATIVE.check(self._name, "eta_min", eta_min)
        super().__init__(optimizer, last_epoch)

    def _first_lr(self) -> list[float]:
        return self._lrs()

    def _begin_again(self) -> None:
        self._join_new_groups()
        self.last_epoch = 0
        self._write_all([self.eta_min + (lr - self.eta_min) for lr in self.base_lrs])

    def get_lr(self) -> list[float]:
        if (self.last_epoch - 1 - self.T_max) % (2 * self.T_max) == 0:  # one after the lowest: the quotient is x / 0
            rise = 1 - math.cos(math.pi / self.T_max)
            return [lr + (base - self.eta_min) * rise / 2 for lr, base in zip(self._lrs(), self.base_lrs, strict=True)]
        above, above_before = (
            1 + math.cos(math.pi * epoch / self.T_max) for epoch in (self.last_epoch, self.last_epoch - 1)
        )
        return [above / above_before * (lr - self.eta_min) + self.eta_min for lr in self._lrs()]


class CosineAnnealingWarmRestarts(LRScheduler):
    r"""Along half a cosine to `eta_min`, and again from the top, every time `T_mult` times as long.

    .. math:: \eta_t = \eta_{\min} + \tfrac{1}{2} (\eta_0 - \eta_{\min}) (1 + \cos(\pi \, T_{cur} / T_i))

    Parameters
    ----------
    optimizer
        See `LRScheduler`.
    T_0 : int >= 1
        Epochs until the first restart.
    T_mult : int >= 1, default 1
        Factor from the length of one run to that of the next.
    eta_min : float >= 0, default 0
        The lowest learning rate.
    last_epoch : int >= -1, default -1
        See `LRScheduler`.

    Attributes
    ----------
    T_cur : float
        Epochs since the last restart.
    T_i : int
        Length of this run.

    References
    ----------
    Loshchilov, Hutter: SGDR: stochastic gradient descent with warm restarts, arXiv:1608.03983. Where this run began
    is computed in integers: torch's logarithms miss restarts for some `T_mult`, 3 and 10 among them, and its
    constructor those before `last_epoch`.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.SGD(np.zeros(2, np.float32), lr=1.0)
    >>> schedule = fastopt.lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=2)
    >>> for batch in range(5):
    ...     schedule.step(batch / 2)  # two batches an epoch
    >>> schedule
    CosineAnnealingWarmRestarts(T_0=2): epoch 2, lr 1
    """

    def __init__(
        self,
        optimizer: HasParamGroups,
        T_0: int,  # noqa: N803 - torch's name
        T_mult: int = 1,  # noqa: N803 - torch's name
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.T_0 = integer(self._name, "T_0", T_0, 1)
        self.T_mult = integer(self._name, "T_mult", T_mult, 1)
        self.eta_min = NON_NEGATIVE.check(self._name, "eta_min", eta_min)
        self.T_cur: float
        self.T_i: int
        self.T_cur, self.T_i = self._place(integer(self._name, "last_epoch", last_epoch, -1) + 1)
        super().__init__(optimizer, last_epoch)

    def _place(self, epoch: float) -> tuple[float, int]:
        """Epochs since the last restart, and the length of the run that began there."""
        if self.T_mult == 1:
            return epoch % self.T_0, self.T_0
        start, length = 0, self.T_0
        while epoch >= start + length:
            start, length = start + length, length * self.T_mult
        return epoch - start, length

    def _begin_again(self) -> None:
        self.step(0)

    def step(self, epoch: float | None = None) -> None:
        """Set the learning rates of the next epoch, or of `epoch`.

        Parameters
        ----------
        epoch : float >= 0 or None
            Where to go, in epochs and parts of them; a following ``step()`` goes one further.
        """
        if epoch is None:
            cur, length = self.T_cur + 1, self.T_i
            if cur >= length:
                cur, length = cur % length, length * self.T_mult
            last_epoch = self.last_epoch + 1
        else:
            epoch = epoch if isinstance(epoch, int) else NON_NEGATIVE.check(self._name, "epoch", epoch)
            if epoch < 0:
                raise ValueError(f"{self._name}: epoch must be >= 0, got {epoch}")
            cur, length = self._place(epoch)
            last_epoch = math.floor(epoch)
        self._join_new_groups()
        self.last_epoch, self.T_cur, self.T_i = last_epoch, cur, length
        self._write_all(self.get_lr())

    def get_lr(self) -> list[float]:
        above = 1 + math.cos(math.pi * self.T_cur / self.T_i)
        return [self.eta_min + (lr - self.eta_min) * above / 2 for lr in self.base_lrs]
