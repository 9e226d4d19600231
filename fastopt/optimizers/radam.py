"""RAdam: Adam with a rectified variance."""

from __future__ import annotations

import numpy as np

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.rules import Betas, Flag, LearningRate, NonNegative, register, sqrt


@register
class RAdam(Optimizer):
    """RAdam: Adam whose adaptive step is rectified while its variance is not yet tractable.

    In step t, with ``beta1, beta2 = betas`` and the states m = `exp_avg` and v = `exp_avg_sq`::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        last = 2 / (1 - beta2) - 1
        rho = last - 2 * t * beta2**t / (1 - beta2**t)
        if rho > 5:
            r = (rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho)
            r = sqrt(r * (1 - beta2**t)) / (sqrt(v) + eps)
            p = p - lr * m / (1 - beta1**t) * r
        else:
            p = p - lr * m / (1 - beta1**t)

    The bound 5 and the place of `eps` are torch's; the paper has 4.

    Parameters
    ----------
    betas
        Decay of the two running means.
    eps
        Added to the denominator.

    See Also
    --------
    Adam : Without rectification: give it a warm-up instead.
    AdamW : The usual choice with a warm-up and decay.

    Notes
    -----
    Choose it where Adam needs a warm-up and none is wanted: in the first steps, in which the second moment is an
    average of few gradients, it moves as momentum does; then the adaptive step fades in, the slower the larger
    `betas[1]`, until it is Adam's.

    References
    ----------
    Liu, Jiang, He, Chen, Liu, Gao, Han: On the variance of the adaptive learning rate and beyond,
    arXiv:1908.03265.
    """

    states = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
    state_kinds = {"exp_avg_sq": "unsigned"}

    def __init__(
        self,
        params: Params | None = None,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
        decoupled_weight_decay: Flag = False,
        *,
        maximize: Flag = False,
        l1: NonNegative = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            l1=l1,
            **options,
        )

    @staticmethod
    def scalars(step, lr, betas, eps):
        beta1, beta2 = betas
        correction2 = 1 - beta2**step
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * step * beta2**step / correction2
        rectified = 1 if rho > 5 else 0
        rectification = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) if rho > 5 else 1
        return dict(
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            step_size=lr / (1 - beta1**step) * rectification * (sqrt(correction2) if rho > 5 else 1),
            rectified=rectified,
            eps=eps,
            zero=0,
            one=1,
        )

    @staticmethod
    def rule(
        p,
        g,
        exp_avg,
        exp_avg_sq,
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        step_size,
        rectified,
        eps,
        zero,
        one,
    ):
        exp_avg = beta1 * exp_avg + one_minus_beta1 * g
        exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * g * g
        denominator = sqrt(exp_avg_sq) + eps if rectified > zero else one
        p = p - step_size * exp_avg / denominator
        return p, exp_avg, exp_avg_sq

    @staticmethod
    def reference(p, g, exp_avg, exp_avg_sq, *, step, lr, betas, eps):
        beta1, beta2 = betas
        m = beta1 * exp_avg + (1 - beta1) * g
        v = beta2 * exp_avg_sq + (1 - beta2) * np.square(g)
        m_hat = m / (1 - beta1**step)
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * step * beta2**step / (1 - beta2**step)
        if rho <= 5:
            return p - lr * m_hat, m, v
        r = np.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        return p - lr * m_hat * float(r * np.sqrt(1 - beta2**step)) / (np.sqrt(v) + eps), m, v
