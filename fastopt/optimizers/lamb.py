"""LAMB: Adam with a trust ratio for every tensor."""

from __future__ import annotations

import numpy as np

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.optimizers.adam import Adam
from fastopt.rules import Betas, Flag, LearningRate, NonNegative, norm, register


@register
class LAMB(Adam):
    """LAMB: Adam's update, scaled in every tensor to the size of its parameters.

    In step t, with ``beta1, beta2 = betas`` and Adam's states m = `exp_avg` and v = `exp_avg_sq`::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        u = (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)
        u = u + weight_decay * p
        p = p - lr * norm(p) / norm(u) * u

    Where one of the norms is 0 the ratio is 1. The norms are those of each array of `params`, so here the result does
    depend on what is one array. The update takes 4 bytes per parameter of workspace, beside the state.

    Parameters
    ----------
    weight_decay
        Weight decay, inside the norm of the update.

    See Also
    --------
    AdamW : The same without the trust ratio, for batches of usual size.
    LARS : The same idea around momentum.

    Notes
    -----
    Choose it for batches of thousands, where a learning rate that suits one layer breaks another: every array moves
    by about `lr` times its own norm. Biases and the scales of normalisation layers are often left out of the ratio:
    give them to a second optimizer. With batches of usual size AdamW is as good and takes one pass less.

    References
    ----------
    You et al.: Large batch optimization for deep learning: training BERT in 76 minutes, arXiv:1904.00962.
    """

    fixed_flags = {"amsgrad": False}
    trust = "update"

    def __init__(
        self,
        params: Params | None = None,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: NonNegative = 1e-6,
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Flag = False,
        l1: NonNegative = 0.0,
        **options: Unpack[Options],
    ) -> None:
        Optimizer.__init__(
            self, params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, l1=l1, **options
        )

    @staticmethod
    def trust_ratio(p_norm, update_norm):
        return 1 if p_norm == 0 else (1 if update_norm == 0 else p_norm / update_norm)

    @staticmethod
    def reference(p, g, exp_avg, exp_avg_sq, *, step, lr, betas, eps, weight_decay):
        beta1, beta2 = betas
        m = beta1 * exp_avg + (1 - beta1) * g
        v = beta2 * exp_avg_sq + (1 - beta2) * np.square(g)
        m_hat = m / (1 - beta1**step)
        v_hat = v / (1 - beta2**step)
        u = m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p
        p_norm, u_norm = norm(p), norm(u)
        ratio = 1.0 if p_norm == 0 or u_norm == 0 else p_norm / u_norm
        return p - lr * ratio * u, m, v
