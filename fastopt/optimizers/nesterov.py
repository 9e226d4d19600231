"""Nesterov momentum in the classical velocity form."""

from __future__ import annotations

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.rules import Flag, LearningRate, NonNegative, register


@register
class Nesterov(Optimizer):
    """Nesterov's accelerated gradient: a velocity that carries the learning rate, and a look ahead.

    In every step, with the state v = `velocity`::

        v = momentum * v - lr * g
        p = p + momentum * v - lr * g

    With a constant `lr` the parameters follow `SGD(momentum=..., nesterov=True)`.

    Parameters
    ----------
    momentum
        Factor on the velocity before the gradient is added.

    See Also
    --------
    SGD : With ``nesterov=True`` the same at constant `lr`, in torch's form.
    Momentum : Without the look ahead.
    NAdam : With a second moment.

    Notes
    -----
    Choose it wherever momentum is used: it overshoots less in narrow valleys at the same cost, which allows larger
    values of `momentum`.

    References
    ----------
    Nesterov: A method of solving a convex programming problem with convergence rate O(1/k^2), 1983;
    in this form Bengio, Boulanger-Lewandowski, Pascanu: Advances in optimizing recurrent networks, 2013.
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
        velocity = momentum * velocity - lr * g
        p = p - (lr * g - momentum * velocity)  # subtracted, so that zeros leave even p = -0 alone
        return p, velocity

    @staticmethod
    def reference(p, g, velocity, *, step, lr, momentum):
        v = momentum * velocity - lr * g
        return p + momentum * v - lr * g, v
