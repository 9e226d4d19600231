"""Adamax."""

from __future__ import annotations

import numpy as np

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.rules import Betas, Flag, LearningRate, NonNegative, fabs, maximum, register


@register
class Adamax(Optimizer):
    """Adamax: Adam with the infinity norm in place of the second moment.

    In step t, with ``beta1, beta2 = betas`` and the states m = `exp_avg` and u = `exp_inf`::

        m = beta1 * m + (1 - beta1) * g
        u = maximum(beta2 * u, abs(g) + eps)
        p = p - lr / (1 - beta1**t) * m / u

    The place of `eps` is torch's; the paper has none.

    Parameters
    ----------
    betas
        Decay of the running mean and of the infinity norm.
    eps
        Added to the gradient's absolute value.

    See Also
    --------
    Adam : The root mean square instead of the largest gradient.

    Notes
    -----
    Choose it where gradients come in bursts, as of embeddings: the largest recent gradient sets the step at once,
    and a run of small ones lets it grow again only slowly. It is otherwise close to Adam, and is less often tuned
    for.

    References
    ----------
    Kingma, Ba: Adam: a method for stochastic optimization, arXiv:1412.6980, section 7.
    """

    states = {"exp_avg": 0.0, "exp_inf": 0.0}
    state_kinds = {"exp_inf": "unsigned"}

    def __init__(
        self,
        params: Params | None = None,
        lr: LearningRate = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Flag = False,
        l1: NonNegative = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, l1=l1, **options
        )

    @staticmethod
    def scalars(step, lr, betas, eps):
        beta1, beta2 = betas
        return dict(
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            step_size=lr / (1 - beta1**step),
            eps=eps,
        )

    @staticmethod
    def rule(p, g, exp_avg, exp_inf, beta1, one_minus_beta1, beta2, step_size, eps):
        exp_avg = beta1 * exp_avg + one_minus_beta1 * g
        exp_inf = maximum(beta2 * exp_inf, fabs(g) + eps)
        p = p - step_size * exp_avg / exp_inf
        return p, exp_avg, exp_inf

    @staticmethod
    def reference(p, g, exp_avg, exp_inf, *, step, lr, betas, eps):
        beta1, beta2 = betas
        m = beta1 * exp_avg + (1 - beta1) * g
        u = np.maximum(beta2 * exp_inf, np.abs(g) + eps)
        return p - lr / (1 - beta1**step) * (m / u), m, u
