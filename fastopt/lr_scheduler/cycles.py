"""Schedules that cycle the learning rate between bounds, and the momentum against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from fastopt.lr_scheduler.arguments import (
    NON_NEGATIVE,
    POSITIVE,
    SHARE,
    HasParamGroups,
    for_each_group,
    function,
    groups_of,
    integer,
    one_of,
)
from fastopt.lr_scheduler.base import LRScheduler
from fastopt.rules import Real, Switch

_MOMENTUM = Real(0.0, 1.0, high_open=True)


class _Cycle(LRScheduler):
    """A learning rate that goes up and down between bounds, and a momentum that goes down and up if asked."""

    cycle_momentum: bool
    base_momentum: float | list[float]
    max_momentum: float | list[float]

    def _take_momentum(self, groups: list[dict[str, Any]], cycle: Any, base: Any, largest: Any) -> None:
        """Check and keep the arguments that are about momentum."""
        self.cycle_momentum = Switch().check(self._name, "cycle_momentum", cycle)
        n = len(groups)
        self.base_momentum = for_each_group(self._name, "base_momentum", base, n, _MOMENTUM.check)
        self.max_momentum = for_each_group(self._name, "max_momentum", largest, n, _MOMENTUM.check)
        for k, group in enumerate(groups):
            if self.cycle_momentum and "betas" not in group and "momentum" not in group:
                raise ValueError(
                    f"{self._name}: cycle_momentum=True needs 'momentum' or 'betas' in every param group, "
                    f"param_groups[{k}] has {', '.join(map(repr, group))}"
                )

    def _momenta(self) -> list[float]:
        """The momentum of `last_epoch` for each group."""
        raise NotImplementedError

    def _write(self, lrs: Sequence[float]) -> None:
        momenta = self._momenta() if self.cycle_momentum else []
        super()._write(lrs)
        for group, momentum in zip(self.optimizer.param_groups, momenta, strict=False):
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            else:
                group["momentum"] = momentum


class CyclicLR(_Cycle):
    r"""Up and down between two bounds, over and over; momentum down and up.

    With :math:`x \in [0, 1]` the way up in this cycle, and :math:`a` the policy's amplitude in it,

    .. math:: \eta_t = \eta_{base} + (\eta_{\max} - \eta_{base}) \, x \, a, \qquad
        \mu_t = \mu_{\max} - (\mu_{\max} - \mu_{base}) \, x \, a

    Parameters
    ----------
    optimizer
        See `LRScheduler`.
    base_lr, max_lr : float >= 0 or list of floats
        Lower and upper bound, for all groups or for each.
    step_size_up : float > 0, default 2000
        Steps from the lower to the upper bound.
    step_size_down : float >= 0 or None, default None
        Steps back; None for as many.
    mode : {"triangular", "triangular2", "exp_range"}
        The amplitude is always 1; halved every cycle; `gamma` to the power of the step.
    gamma : float >= 0, default 1
        For "exp_range".
    scale_fn : function or None, default None
        The amplitude, instead of `mode`'s, as a function of what `scale_mode` says.
    scale_mode : {"cycle", "iterations"}
        The number of the cycle, from 1, or of the step, from 0. Only counts with `scale_fn`.
    cycle_momentum : bool, default True
        Cycle ``"momentum"``, or the first of ``"betas"``, against the learning rate. The optimizer must have
        been made with a momentum.
    base_momentum, max_momentum : float in [0, 1) or list of floats, default 0.8, 0.9
        Momentum at `max_lr` and at `base_lr`.
    last_epoch : int >= -1, default -1
        See `LRScheduler`; here a number of steps.

    References
    ----------
    Smith: Cyclical learning rates for training neural networks, arXiv:1506.01186.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.SGD(np.zeros(2, np.float32), momentum=0.9)
    >>> schedule = fastopt.lr_scheduler.CyclicLR(opt, base_lr=0.25, max_lr=0.75, step_size_up=2)
    >>> for step in range(5):
    ...     print(opt.param_groups[0]["lr"], round(opt.param_groups[0]["momentum"], 3))
    ...     schedule.step()
    0.25 0.9
    0.5 0.85
    0.75 0.8
    0.5 0.85
    0.25 0.9
    """

    def __init__(
        self,
        optimizer: HasParamGroups,
        base_lr: float | Sequence[float],
        max_lr: float | Sequence[float],
        step_size_up: float = 2000,
        step_size_down: float | None = None,
        mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
        gamma: float = 1.0,
        scale_fn: Callable[[float], float] | None = None,
        scale_mode: Literal["cycle", "iterations"] = "cycle",
        cycle_momentum: bool = True,
        base_momentum: float | Sequence[float] = 0.8,
        max_momentum: float | Sequence[float] = 0.9,
        last_epoch: int = -1,
    ) -> None:
        name = self._name
        groups = groups_of(name, optimizer)
        self.base_lr = for_each_group(name, "base_lr", base_lr, len(groups), NON_NEGATIVE.check)
        self.max_lr = for_each_group(name, "max_lr", max_lr, len(groups), NON_NEGATIVE.check)
        self.step_size_up = POSITIVE.check(name, "step_size_up", step_size_up)
        self.step_size_down = (
            None if step_size_down is None else NON_NEGATIVE.check(name, "step_size_down", step_size_down)
        )
        self.mode: str = one_of(name, "mode", mode, ("triangular", "triangular2", "exp_range"))
        self.gamma = NON_NEGATIVE.check(name, "gamma", gamma)
        self.scale_fn = None if scale_fn is None else function(name, "scale_fn", scale_fn)
        self.scale_mode: str = one_of(name, "scale_mode", scale_mode, ("cycle", "iterations"))
        self._take_momentum(groups, cycle_momentum, base_momentum, max_momentum)
        super().__init__(optimizer, last_epoch)

    def _first_base_lrs(self, groups: list[dict[str, Any]]) -> list[float]:
        return self._bounds("base_lr", len(groups))

    def _bounds(self, name: str, n: int) -> list[float]:
        value = getattr(self, name)
        return list(value) if isinstance(value, list) else [value] * n

    def _way_and_amplitude(self) -> tuple[float, float]:
        """How far up this cycle is, in [0, 1], and the amplitude of its policy."""
        total = self.step_size_up + (self.step_size_up if self.step_size_down is None else self.step_size_down)
        up = self.step_size_up / total
        cycle = math.floor(1 + self.last_epoch / total)
        x = 1.0 + self.last_epoch / total - cycle
        way = x / up if x <= up else (x - 1) / (up - 1)
        if self.scale_fn is not None:
            return way, self.scale_fn(cycle if self.scale_mode == "cycle" else self.last_epoch)
        if self.mode == "triangular2":
            return way, 1 / 2.0 ** (cycle - 1)
        return way, self.gamma**self.last_epoch if self.mode == "exp_range" else 1.0

    def get_lr(self) -> list[float]:
        way, amplitude = self._way_and_amplitude()
        bounds = zip(self._each("base_lr"), self._each("max_lr"), strict=True)
        return [low + (high - low) * way * amplitude for low, high in bounds]

    def _momenta(self) -> list[float]:
        way, amplitude = self._way_and_amplitude()
        bounds = zip(self._each("base_momentum"), self._each("max_momentum"), strict=True)
        return [high - (high - low) * way * amplitude for low, high in bounds]


class OneCycleLR(_Cycle):
    r"""One cycle: up to `max_lr`, then down to far below the start; momentum down and up.

    The learning rate begins at :math:`\eta_{\max} / d`, is :math:`\eta_{\max}` after the share `pct_start` of the
    steps, and ends at :math:`\eta_{\max} / (d \, d_{final})`. Between two of them, at the share :math:`x` of the way,

    .. math:: \eta = \eta_{to} + \tfrac{1}{2} (\eta_{from} - \eta_{to}) (1 + \cos \pi x)
        \quad \text{or} \quad \eta = \eta_{from} + (\eta_{to} - \eta_{from}) \, x

    Parameters
    ----------
    optimizer
        See `LRScheduler`.
    max_lr : float >= 0 or list of floats
        The highest learning rate, for all groups or for each.
    total_steps : int >= 1 or None, default None
        Steps of the cycle; None for ``epochs * steps_per_epoch``.
    epochs, steps_per_epoch : int >= 1 or None, default None
        Instead of `total_steps`.
    pct_start : float in [0, 1], default 0.3
        Share of the steps on the way up.
    anneal_strategy : {"cos", "linear"}
        The first or the second formula.
    cycle_momentum : bool, default True
        Cycle ``"momentum"``, or the first of ``"betas"``, against the learning rate. The optimizer must have
        been made with a momentum.
    base_momentum, max_momentum : float in [0, 1) or list of floats, default 0.85, 0.95
        Momentum at `max_lr`, and at both ends.
    div_factor : float > 0, default 25
        :math:`d`.
    final_div_factor : float > 0, default 1e4
        :math:`d_{final}`.
    three_phase : bool, default False
        Go down to the start in as many steps as up, and from there to the end.
    last_epoch : int >= -1, default -1
        See `LRScheduler`; here a number of steps.

    Raises
    ------
    ValueError
        From `step`, also after more than `total_steps`.

    References
    ----------
    Smith, Topin: Super-convergence: very fast training of neural networks using large learning rates,
    arXiv:1708.07120.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.Adam(np.zeros(2, np.float32))
    >>> schedule = fastopt.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10)
    >>> for step in range(2):
    ...     schedule.step()
    >>> opt.param_groups[0]["lr"], opt.param_groups[0]["betas"]
    (0.1, (0.85, 0.999))
    """

    def __init__(
        self,
        optimizer: HasParamGroups,
        max_lr: float | Sequence[float],
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        cycle_momentum: bool = True,
        base_momentum: float | Sequence[float] = 0.85,
        max_momentum: float | Sequence[float] = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        name = self._name
        groups = groups_of(name, optimizer)
        self.max_lr = for_each_group(name, "max_lr", max_lr, len(groups), NON_NEGATIVE.check)
        if total_steps is not None:
            self.total_steps = integer(name, "total_steps", total_steps, 1)
        elif epochs is not None and steps_per_epoch is not None:
            epochs = integer(name, "epochs", epochs, 1)
            self.total_steps = epochs * integer(name, "steps_per_epoch", steps_per_epoch, 1)
        else:
            raise ValueError(f"{name}: needs total_steps, or both epochs and steps_per_epoch")
        self.pct_start = SHARE.check(name, "pct_start", pct_start)
        self.anneal_strategy: str = one_of(name, "anneal_strategy", anneal_strategy, ("cos", "linear"))
        self._take_momentum(groups, cycle_momentum, base_momentum, max_momentum)
        self.div_factor = POSITIVE.check(name, "div_factor", div_factor)
        self.final_div_factor = POSITIVE.check(name, "final_div_factor", final_div_factor)
        self.three_phase = Switch().check(name, "three_phase", three_phase)
        super().__init__(optimizer, last_epoch)
        for group, lr in zip(groups, self.base_lrs, strict=True):
            group["initial_lr"] = lr

    def _first_base_lrs(self, groups: list[dict[str, Any]]) -> list[float]:
        n = len(groups)
        highest = self.max_lr if isinstance(self.max_lr, list) else [self.max_lr] * n
        return [lr / self.div_factor for lr in highest]

    def _phase(self) -> tuple[str, str, float]:
        """Between which of "start", "top" and "end" this step is, and at which share of the way."""
        ends = [(self.pct_start * self.total_steps - 1, "top"), (self.total_steps - 1, "end")]
        if self.three_phase:
            ends.insert(1, (2 * self.pct_start * self.total_steps - 2, "start"))
        begin, place = 0.0, "start"
        for end, target in ends[:-1]:
            if self.last_epoch <= end:
                break
            begin, place = end, target
        else:
            end, target = ends[-1]
        return place, target, (self.last_epoch - begin) / (end - begin) if end != begin else 1.0

    def _between(self, values: Mapping[str, float], phase: tuple[str, str, float]) -> float:
        place, target, share = phase
        start, end = values[place], values[target]
        if self.anneal_strategy == "cos":
            return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1)
        return (end - start) * share + start

    def get_lr(self) -> list[float]:
        if self.last_epoch > self.total_steps:
            raise ValueError(f"{self._name}: step {self.last_epoch} of {self.total_steps}")
        phase = self._phase()
        lrs = []
        for top in self._each("max_lr"):
            start = top / self.div_factor
            lrs.append(self._between({"start": start, "top": top, "end": start / self.final_div_factor}, phase))
        return lrs

    def _momenta(self) -> list[float]:
        phase = self._phase()
        bounds = zip(self._each("base_momentum"), self._each("max_momentum"), strict=True)
        return [self._between({"start": high, "top": low, "end": high}, phase) for low, high in bounds]
