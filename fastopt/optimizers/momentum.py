"""Momentum in the classical velocity form."""

from __future__ import annotations

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.rules import Flag, LearningRate, NonNegative, register


@register
class Momentum(Optimizer):
    """Classical momentum: a velocity that carries the learning rate.

    In every step, with the state v = `velocity`::

        v = momentum * v - lr * g
        p = p + v

    With a constant `lr` the parameters follow `SGD(momentum=...)`; when `lr` changes, the velocity keeps what earlier
    steps put into it.

    Parameters
    ----------
    momentum
        Factor on the velocity before the gradient is added.

    See Also
    --------
    SGD : The learning rate outside of the buffer, as torch has it.
    Nesterov : With a look ahead.

    Notes
    -----
    The classical form of textbooks. Choose it over SGD where the learning rate changes during training and what
    earlier steps put into the velocity should keep its size: after a drop of `lr` it rolls on for some 1 / (1 -
    momentum) steps.

    References
    ----------
    Polyak: Some methods of speeding up the convergence of iteration methods, 1964.
    """

    states = {"velocity": 0.0}

    def __init__(
        self,
        params: Params | None = None,
        lr: LearningRate = 1e-3,
        momentum: NonNegative = 0.9,
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Flag = False,
        l1: NonNegative = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay, maximize=maximize, l1=l1, **options
        )

    @staticmethod
    def scalars(step, lr, momentum):
        return dict(lr=lr, momentum=momentum)

    @staticmethod
    def rule(p, g, velocity, lr, momentum):
        decrease = lr * g - momentum * velocity  # subtracted, so that a zero one leaves even p = -0 alone
        velocity = momentum * velocity - lr * g
        p = p - decrease
        return p, velocity

    @staticmethod
    def reference(p, g, velocity, *, step, lr, momentum):
        v = momentum * velocity - lr * g
        return p + v, v
