"""LARS: momentum with a trust ratio for every tensor."""

from __future__ import annotations

import numpy as np

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.optimizers.momentum import Momentum
from fastopt.rules import Flag, LearningRate, NonNegative, norm, register


@register
class LARS(Momentum):
    """LARS: classical momentum, whose gradient is scaled in every tensor to the size of its parameters.

    In every step, with the state v = `velocity`::

        size = norm(g) + weight_decay * norm(p) + eps
        ratio = trust_coefficient * norm(p) / size
        v = momentum * v - lr * ratio * (g + weight_decay * p)
        p = p + v

    Where the norm of the parameters or of the gradient is 0 the ratio is 1. The norms are those of each array of
    `params`, so here the result does depend on what is one array.

    Parameters
    ----------
    weight_decay
        L2 penalty, added to the gradient and counted in the ratio.
    trust_coefficient
        Factor on the trust ratio.
    eps
        Added to the ratio's denominator.

    See Also
    --------
    Momentum : The same without the trust ratio.
    LAMB : The same idea around Adam; better for transformers.

    Notes
    -----
    Choose it for convolutional networks with batches of thousands, with a warm-up and weight decay. With batches of
    usual size, Momentum or SGD does as well and takes one pass less.

    References
    ----------
    You, Gitman, Ginsburg: Large batch training of convolutional networks, arXiv:1708.03888.
    """

    trust = "gradient"

    def __init__(
        self,
        params: Params | None = None,
        lr: LearningRate = 1e-3,
        momentum: NonNegative = 0.9,
        weight_decay: NonNegative = 0.0,
        trust_coefficient: NonNegative = 1e-3,
        eps: NonNegative = 0.0,
        *,
        maximize: Flag = False,
        l1: NonNegative = 0.0,
        **options: Unpack[Options],
    ) -> None:
        Optimizer.__init__(
            self,
            params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            eps=eps,
            maximize=maximize,
            l1=l1,
            **options,
        )

    @staticmethod
    def trust_ratio(p_norm, gradient_norm, weight_decay, trust_coefficient, eps):
        denominator = gradient_norm + weight_decay * p_norm + eps
        return 1 if p_norm == 0 else (1 if gradient_norm == 0 else trust_coefficient * p_norm / denominator)

    @staticmethod
    def reference(p, g, velocity, *, step, lr, momentum, weight_decay, l1, trust_coefficient, eps):
        p_norm, g_norm = norm(p), norm(g)
        ratio = 1.0
        if p_norm != 0 and g_norm != 0:
            ratio = trust_coefficient * p_norm / (g_norm + weight_decay * p_norm + eps)
        v = momentum * velocity - lr * ratio * (g + weight_decay * p + l1 * np.sign(p))
        return p + v, v
