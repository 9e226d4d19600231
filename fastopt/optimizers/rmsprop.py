"""RMSprop, plain and centered, with and without momentum."""

from __future__ import annotations

import numpy as np

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.rules import Flag, LearningRate, NonNegative, maximum, register, sqrt


@register
class RMSprop(Optimizer):
    """RMSprop: the gradient over a running root mean square of itself.

    In every step, with the states v = `square_avg` and b = `momentum_buffer`::

        v = alpha * v + (1 - alpha) * g**2
        b = momentum * b + g / (sqrt(v) + eps)
        p = p - lr * b

    With `centered`, ``v - a**2`` stands under the root, where a = `grad_avg` is the running mean of the gradient.
    Rounding can make that difference negative where the true one is nearly 0; fastopt then takes 0, where torch gives
    NaN.

    Parameters
    ----------
    alpha
        Decay of the running means.
    eps
        Added to the denominator.
    momentum
        Factor on the buffer before the step is added; 0 keeps no `momentum_buffer`.
    centered
        Normalise by the gradient's variance instead of its second moment.

    See Also
    --------
    Adam : With momentum on the gradient and bias correction.
    Adagrad : Remembers all gradients.
    Adadelta : Without a learning rate.

    Notes
    -----
    Choose it for recurrent networks and for targets that move, as in reinforcement learning, where momentum on the
    gradient would carry old directions along. There is no bias correction: the first steps are 1 / sqrt(1 - alpha)
    times `lr` long, ten times with the defaults.

    References
    ----------
    Tieleman, Hinton: Lecture 6.5 of Neural networks for machine learning, 2012; centered:
    Graves: Generating sequences with recurrent neural networks, arXiv:1308.0850.
    """

    states = {"square_avg": 0.0, "grad_avg": 0.0, "momentum_buffer": 0.0}
    state_kinds = {"square_avg": "unsigned"}
    optional_states = {"grad_avg": "centered", "momentum_buffer": "with_momentum"}

    def __init__(
        self,
        params: Params | None = None,
        lr: LearningRate = 1e-2,
        alpha: NonNegative = 0.99,
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
        momentum: NonNegative = 0.0,
        centered: Flag = False,
        *,
        maximize: Flag = False,
        l1: NonNegative = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            maximize=maximize,
            l1=l1,
            **options,
        )

    @staticmethod
    def flags(momentum):
        return dict(with_momentum=momentum != 0)

    @staticmethod
    def scalars(step, lr, alpha, eps, momentum):
        return dict(lr=lr, alpha=alpha, one_minus_alpha=1 - alpha, eps=eps, momentum=momentum, zero=0)

    @staticmethod
    def rule(
        p,
        g,
        square_avg,
        grad_avg,
        momentum_buffer,
        lr,
        alpha,
        one_minus_alpha,
        eps,
        momentum,
        zero,
        *,
        centered,
        with_momentum,
    ):
        square_avg = alpha * square_avg + one_minus_alpha * g * g
        if centered:
            grad_avg = alpha * grad_avg + one_minus_alpha * g
            mean_square = maximum(square_avg - grad_avg * grad_avg, zero)
        else:
            mean_square = square_avg
        denominator = sqrt(mean_square) + eps
        if with_momentum:
            momentum_buffer = momentum * momentum_buffer + g / denominator
            p = p - lr * momentum_buffer
        else:
            p = p - lr * g / denominator
        return p, square_avg, grad_avg, momentum_buffer

    @staticmethod
    def reference(p, g, square_avg, grad_avg, momentum_buffer, *, step, lr, alpha, eps, momentum, centered):
        v = alpha * square_avg + (1 - alpha) * np.square(g)
        mean_square = v
        if centered:
            grad_avg = alpha * grad_avg + (1 - alpha) * g
            mean_square = np.maximum(v - np.square(grad_avg), 0)
        update = g / (np.sqrt(mean_square) + eps)
        if momentum:
            update = momentum_buffer = momentum * momentum_buffer + update
        return p - lr * update, v, grad_avg, momentum_buffer
