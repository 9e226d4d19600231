"""Adagrad."""

from __future__ import annotations

import numpy as np

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.rules import Flag, LearningRate, NonNegative, register, sqrt


@register
class Adagrad(Optimizer):
    """Adagrad: every parameter's step shrinks with the sum of its squared gradients.

    In step t, with the state s = `sum`::

        s = s + g**2
        p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)

    Parameters
    ----------
    lr_decay
        Decay of the learning rate.
    initial_accumulator_value
        Value of the state `sum` before the first step.
    eps
        Added to the denominator.

    See Also
    --------
    RMSprop : Forgets old gradients, so its steps do not die out.
    Adadelta : Forgets, and needs no learning rate.
    Adam : Forgets, and adds momentum.

    Notes
    -----
    Choose it for features that appear seldom: each parameter's rate falls only with its own gradients, so what is
    rare keeps large steps. On long runs of dense networks the sum grows without bound and learning comes to a halt,
    which RMSprop and Adam mend. The first step is `lr` long for every parameter, however small its gradient.

    References
    ----------
    Duchi, Hazan, Singer: Adaptive subgradient methods for online learning and stochastic optimization,
    JMLR 2011.
    """

    states = {"sum": "initial_accumulator_value"}
    state_kinds = {"sum": "unsigned"}

    def __init__(
        self,
        params: Params | None = None,
        lr: LearningRate = 1e-2,
        lr_decay: NonNegative = 0.0,
        weight_decay: NonNegative = 0.0,
        initial_accumulator_value: NonNegative = 0.0,
        eps: NonNegative = 1e-10,
        *,
        maximize: Flag = False,
        l1: NonNegative = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            maximize=maximize,
            l1=l1,
            **options,
        )

    @staticmethod
    def scalars(step, lr, lr_decay, eps):
        return dict(step_size=lr / (1 + (step - 1) * lr_decay), eps=eps)

    @staticmethod
    def rule(p, g, sum, step_size, eps):
        sum = sum + g * g
        p = p - step_size * g / (sqrt(sum) + eps)
        return p, sum

    @staticmethod
    def reference(p, g, sum, *, step, lr, lr_decay, eps):
        s = sum + np.square(g)
        return p - lr / (1 + (step - 1) * lr_decay) * (g / (np.sqrt(s) + eps)), s
