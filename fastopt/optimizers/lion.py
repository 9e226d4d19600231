"""Lion."""

from __future__ import annotations

import numpy as np

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.rules import Betas, Flag, LearningRate, NonNegative, register, sign


@register
class Lion(Optimizer):
    """Lion: the sign of an interpolated momentum, with decoupled weight decay.

    In every step, with ``beta1, beta2 = betas`` and the state m = `exp_avg`::

        p = p - lr * weight_decay * p
        p = p - lr * sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g

    sign(0) is 0: a zero gradient and a zero state move nothing.

    Parameters
    ----------
    betas
        Weight of the momentum in the update, and its decay.

    See Also
    --------
    AdamW : Twice the state, steps that shrink with the gradient's noise.
    SGD : As little state, with momentum.

    Notes
    -----
    Choose it for large networks with large batches, where half of Adam's state is worth having. Every element moves
    by `lr` at every step, so `lr` should be a third to a tenth of AdamW's and `weight_decay` as much larger; and
    the rate has to be lowered towards the end, or the parameters keep jumping.

    References
    ----------
    Chen et al.: Symbolic discovery of optimization algorithms, arXiv:2302.06675.
    """

    states = {"exp_avg": 0.0}
    decoupled_weight_decay = True

    def __init__(
        self,
        params: Params | None = None,
        lr: LearningRate = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Flag = False,
        l1: NonNegative = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize, l1=l1, **options)

    @staticmethod
    def scalars(step, lr, betas):
        beta1, beta2 = betas
        return dict(lr=lr, beta1=beta1, one_minus_beta1=1 - beta1, beta2=beta2, one_minus_beta2=1 - beta2)

    @staticmethod
    def rule(p, g, exp_avg, lr, beta1, one_minus_beta1, beta2, one_minus_beta2):
        p = p - lr * sign(beta1 * exp_avg + one_minus_beta1 * g)
        exp_avg = beta2 * exp_avg + one_minus_beta2 * g
        return p, exp_avg

    @staticmethod
    def reference(p, g, exp_avg, *, step, lr, betas):
        beta1, beta2 = betas
        c = beta1 * exp_avg + (1 - beta1) * g
        return p - lr * np.sign(c), beta2 * exp_avg + (1 - beta2) * g
