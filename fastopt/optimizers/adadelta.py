"""Adadelta."""

from __future__ import annotations

import numpy as np

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.rules import Flag, Fraction, LearningRate, NonNegative, register, sqrt


@register
class Adadelta(Optimizer):
    """Adadelta: the ratio of two running root mean squares sets the step.

    In every step, with the states v = `square_avg` and u = `acc_delta`::

        v = rho * v + (1 - rho) * g**2
        d = sqrt(u + eps) / sqrt(v + eps) * g
        u = rho * u + (1 - rho) * d**2
        p = p - lr * d

    Parameters
    ----------
    lr
        Factor on the step.
    rho
        Decay of both running means.
    eps
        Added under both roots.

    See Also
    --------
    RMSprop : One running mean instead of two, and a learning rate to tune.
    Adagrad : What it was made to mend: steps that only shrink.

    Notes
    -----
    Choose it where no learning rate can be tuned: the ratio of the two means has the units of the parameter, so 1.0
    is a sensible `lr` whatever the scale of the loss. It starts slowly, because the mean of squared steps starts
    from 0 and grows from `eps`. Where a learning rate can be tuned, Adam usually gets further in the same time.

    References
    ----------
    Zeiler: ADADELTA: an adaptive learning rate method, arXiv:1212.5701.
    """

    states = {"square_avg": 0.0, "acc_delta": 0.0}
    state_kinds = {"square_avg": "unsigned", "acc_delta": "unsigned"}

    def __init__(
        self,
        params: Params | None = None,
        lr: LearningRate = 1.0,
        rho: Fraction = 0.9,
        eps: NonNegative = 1e-6,
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Flag = False,
        l1: NonNegative = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr=lr, rho=rho, eps=eps, weight_decay=weight_decay, maximize=maximize, l1=l1, **options
        )

    @staticmethod
    def scalars(step, lr, rho, eps):
        return dict(lr=lr, rho=rho, one_minus_rho=1 - rho, eps=eps)

    @staticmethod
    def rule(p, g, square_avg, acc_delta, lr, rho, one_minus_rho, eps):
        square_avg = rho * square_avg + one_minus_rho * g * g
        delta = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * g
        acc_delta = rho * acc_delta + one_minus_rho * delta * delta
        p = p - lr * delta
        return p, square_avg, acc_delta

    @staticmethod
    def reference(p, g, square_avg, acc_delta, *, step, lr, rho, eps):
        v = rho * square_avg + (1 - rho) * np.square(g)
        delta = np.sqrt(acc_delta + eps) / np.sqrt(v + eps) * g
        u = rho * acc_delta + (1 - rho) * np.square(delta)
        return p - lr * delta, v, u
