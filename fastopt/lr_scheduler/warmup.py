"""What torch lacks: warm-up for any schedule, and the two schedules of transformers that begin with one."""

from __future__ import annotations

import math
from typing import Literal, SupportsFloat

from fastopt._messages import describe
from fastopt.lr_scheduler.arguments import SHARE, HasParamGroups, integer, measured, one_of
from fastopt.lr_scheduler.base import LRScheduler
from fastopt.rules import Switch


class WarmupLR(LRScheduler):
    r"""A warm-up in front of any schedule, or on top of it.

    In the first :math:`w` steps, counted from 0, the learning rates of the schedule are multiplied by

    .. math:: s + (1 - s) \frac{t + 1}{w}

    Parameters
    ----------
    scheduler
        What is warmed up, `ReduceLROnPlateau` included.
    warmup_steps : int >= 0
        :math:`w`.
    start_factor : float in [0, 1], default 0
        :math:`s`.
    delay : bool, default True
        The schedule waits at its first epoch and begins after `warmup_steps`; False: it runs on underneath.

    References
    ----------
    Goyal et al.: Accurate, large minibatch SGD, arXiv:1706.02677, section 2.2.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> from fastopt.lr_scheduler import ExponentialLR, WarmupLR
    >>> opt = fastopt.SGD(np.zeros(2, np.float32), lr=1.0)
    >>> schedule = WarmupLR(ExponentialLR(opt, gamma=0.5), warmup_steps=2)
    >>> for _ in range(5):
    ...     print(opt.param_groups[0]["lr"])
    ...     schedule.step()
    0.5
    1.0
    1.0
    0.5
    0.25
    """

    def __init__(
        self, scheduler: LRScheduler, warmup_steps: int, start_factor: float = 0.0, delay: bool = True
    ) -> None:
        if not isinstance(scheduler, LRScheduler):
            raise TypeError(f"{self._name}: scheduler must be a schedule of fastopt, got {describe(scheduler)}")
        self.warmup_steps = integer(self._name, "warmup_steps", warmup_steps, 0)
        self.start_factor = SHARE.check(self._name, "start_factor", start_factor)
        self.delay = Switch().check(self._name, "delay", delay)
        self.scheduler = scheduler
        self.optimizer = scheduler.optimizer
        self.last_epoch = 0
        self._warm()

    def _warm(self) -> None:
        """Keep the learning rates that the schedule has set, and set their warmed-up part."""
        self._unwarmed = [float(lr) for lr in self._lrs()]
        step = self.last_epoch + 1
        factor = 1.0
        if step < self.warmup_steps:
            factor = self.start_factor + (1 - self.start_factor) * step / self.warmup_steps
        self._write([lr * factor for lr in self._unwarmed])

    def _begin(self) -> None:
        self.scheduler._begin()
        self._warm()

    def _begin_again(self) -> None:
        self.last_epoch = 0
        self.scheduler._begin_again()
        self._warm()

    @property
    def _needs_metrics(self) -> bool:
        return self.scheduler._needs_metrics

    def step(self, metrics: SupportsFloat | None = None) -> None:
        """Set the learning rates of the next epoch.

        Parameters
        ----------
        metrics : float
            For `ReduceLROnPlateau` alone, which sees it once it has begun.
        """
        if self._needs_metrics:
            metrics = measured(self._name, "metrics", metrics)
        elif metrics is not None:
            raise TypeError(f"{self._name}: {self.scheduler._name} takes no metrics, got {metrics!r:.60}")
        self.last_epoch += 1
        try:
            for group, lr in zip(self.optimizer.param_groups, self._unwarmed, strict=False):
                group["lr"] = lr  # groups that are new have theirs already
            if not self.delay or self.last_epoch > self.warmup_steps:
                self.scheduler.step(*([metrics] if self._needs_metrics else []))
        except BaseException:
            self.last_epoch -= 1
            raise
        self._warm()


class InverseSquareRootLR(LRScheduler):
    r"""The schedule of the transformer, "Noam": up along a line, then down as the inverse square root of the step.

    With the step :math:`t` counted from 1 and :math:`w` steps of warm-up,

    .. math:: \eta_t = \eta \, d_{model}^{-1/2} \min(t^{-1/2}, t \, w^{-3/2})

    and without `d_model` scaled so that it peaks, at :math:`t = w`, at the optimizer's own learning rate:
    :math:`\eta_t = \eta \min(t / w, \sqrt{w / t})`.

    Parameters
    ----------
    optimizer
        See `LRScheduler`.
    warmup_steps : int >= 1, default 4000
        :math:`w`.
    d_model : int >= 1 or None, default None
        Width of the model: the paper's scale, for an optimizer with a learning rate of about 1.
    last_epoch : int >= -1, default -1
        See `LRScheduler`; here a number of steps.

    References
    ----------
    Vaswani et al.: Attention is all you need, arXiv:1706.03762, equation 3.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.Adam(np.zeros(2, np.float32), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    >>> schedule = fastopt.lr_scheduler.InverseSquareRootLR(opt, warmup_steps=4)
    >>> for _ in range(15):
    ...     schedule.step()
    >>> schedule
    InverseSquareRootLR(warmup_steps=4): epoch 15, lr 0.5
    """

    def __init__(
        self, optimizer: HasParamGroups, warmup_steps: int = 4000, d_model: int | None = None, last_epoch: int = -1
    ) -> None:
        self.warmup_steps = integer(self._name, "warmup_steps", warmup_steps, 1)
        self.d_model = None if d_model is None else integer(self._name, "d_model", d_model, 1)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        step, warmup = self.last_epoch + 1, self.warmup_steps
        factor = min(step / warmup, math.sqrt(warmup / step))
        if self.d_model is not None:
            factor /= math.sqrt(self.d_model * warmup)
        return [lr * factor for lr in self.base_lrs]


class WarmupStableDecayLR(LRScheduler):
    r"""Warm-up, stable, decay (WSD): up along a line, level for most of the training, down at the end.

    With the step :math:`t` counted from 0, and the share :math:`x` of the decay that is behind,

    .. math:: \eta_t = \eta_0 \begin{cases}
        (t + 1) / w & t < w \\
        1 & t < w + s \\
        m + (1 - m) f(x), \; x = \min((t - w - s) / d, 1) & \text{else}
        \end{cases}

    Parameters
    ----------
    optimizer
        See `LRScheduler`.
    warmup_steps : int >= 0
        :math:`w`.
    stable_steps : int >= 0
        :math:`s`. The attribute may be changed before the decay begins: one training then serves for several lengths.
    decay_steps : int >= 1
        :math:`d`.
    decay : {"1-sqrt", "linear", "cosine"}
        :math:`f`: :math:`1 - \sqrt{x}`, :math:`1 - x` or :math:`(1 + \cos \pi x) / 2`.
    min_factor : float in [0, 1], default 0
        :math:`m`, what is left of the learning rate in the end.
    last_epoch : int >= -1, default -1
        See `LRScheduler`; here a number of steps.

    References
    ----------
    Hu et al.: MiniCPM, arXiv:2404.06395; "1-sqrt": Hägele et al.: Scaling laws and compute-optimal training beyond
    fixed training durations, arXiv:2405.18392.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.AdamW(np.zeros(2, np.float32), lr=1.0)
    >>> schedule = fastopt.lr_scheduler.WarmupStableDecayLR(opt, 2, 2, 4, decay="linear")
    >>> lrs = []
    >>> for _ in range(8):
    ...     lrs += schedule.get_last_lr()
    ...     schedule.step()
    >>> lrs
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    def __init__(
        self,
        optimizer: HasParamGroups,
        warmup_steps: int,
        stable_steps: int,
        decay_steps: int,
        decay: Literal["1-sqrt", "linear", "cosine"] = "1-sqrt",
        min_factor: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.warmup_steps = integer(self._name, "warmup_steps", warmup_steps, 0)
        self.stable_steps = integer(self._name, "stable_steps", stable_steps, 0)
        self.decay_steps = integer(self._name, "decay_steps", decay_steps, 1)
        self.decay: str = one_of(self._name, "decay", decay, ("1-sqrt", "linear", "cosine"))
        self.min_factor = SHARE.check(self._name, "min_factor", min_factor)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        step = self.last_epoch
        if step < self.warmup_steps:
            factor = (step + 1) / self.warmup_steps
        elif step < self.warmup_steps + self.stable_steps:
            factor = 1.0
        else:
            x = min((step - self.warmup_steps - self.stable_steps) / self.decay_steps, 1.0)
            if self.decay == "1-sqrt":
                left = 1 - math.sqrt(x)
            else:
                left = 1 - x if self.decay == "linear" else (1 + math.cos(math.pi * x)) / 2
            factor = self.min_factor + (1 - self.min_factor) * left
        return [lr * factor for lr in self.base_lrs]
