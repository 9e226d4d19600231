"""Adam, with AMSGrad and with decoupled weight decay (AdamW is a name for that)."""

from __future__ import annotations

import numpy as np

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.rules import Betas, Flag, LearningRate, NonNegative, maximum, register, sqrt


@register
class Adam(Optimizer):
    """Adam: a running mean of the gradient over the root of a running mean of its square.

    In step t, with ``beta1, beta2 = betas`` and the states m = `exp_avg` and v = `exp_avg_sq`::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        p = p - lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    Parameters
    ----------
    betas
        Decay of the two running means.
    eps
        Added to the denominator.
    amsgrad
        Take the largest v so far, the state `max_exp_avg_sq`, in the denominator.

    See Also
    --------
    AdamW : The same with decoupled weight decay: prefer it whenever weights decay.
    NAdam : With Nesterov's look ahead.
    RAdam : With a warm-up built in.
    Adamax : With the largest gradient in place of the root mean square.
    Lion : Half the state.

    Notes
    -----
    The usual first try. Steps are about `lr` long whatever the scale of the gradient, so one rate serves layers
    that differ widely. It wants a warm-up on transformers, and in image models it often ends behind well-tuned SGD
    with momentum. `amsgrad` helps where rare large gradients matter and the second moment forgets them too soon.

    References
    ----------
    Kingma, Ba: Adam: a method for stochastic optimization, arXiv:1412.6980; amsgrad: Reddi, Kale, Kumar:
    On the convergence of Adam and beyond, ICLR 2018.
    """

    states = {"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0}
    state_kinds = {"exp_avg_sq": "unsigned", "max_exp_avg_sq": "unsigned"}
    optional_states = {"max_exp_avg_sq": "amsgrad"}

    def __init__(
        self,
        params: Params | None = None,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
        amsgrad: Flag = False,
        *,
        maximize: Flag = False,
        decoupled_weight_decay: Flag = False,
        l1: NonNegative = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay,
            l1=l1,
            **options,
        )

    @staticmethod
    def scalars(step, lr, betas, eps):
        beta1, beta2 = betas
        return dict(
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            step_size=lr / (1 - beta1**step),
            root_scale=1 / sqrt(1 - beta2**step),
            eps=eps,
        )

    @staticmethod
    def rule(
        p,
        g,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sq,
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        step_size,
        root_scale,
        eps,
        *,
        amsgrad,
    ):
        exp_avg = beta1 * exp_avg + one_minus_beta1 * g
        exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * g * g
        if amsgrad:
            max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
            denominator = sqrt(max_exp_avg_sq) * root_scale + eps
        else:
            denominator = sqrt(exp_avg_sq) * root_scale + eps
        p = p - step_size * exp_avg / denominator
        return p, exp_avg, exp_avg_sq, max_exp_avg_sq

    @staticmethod
    def reference(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, *, step, lr, betas, eps, amsgrad):
        beta1, beta2 = betas
        m = beta1 * exp_avg + (1 - beta1) * g
        v = beta2 * exp_avg_sq + (1 - beta2) * np.square(g)
        largest_v = v
        if amsgrad:
            largest_v = max_exp_avg_sq = np.maximum(max_exp_avg_sq, v)
        m_hat = m / (1 - beta1**step)
        v_hat = largest_v / (1 - beta2**step)
        return p - lr * m_hat / (np.sqrt(v_hat) + eps), m, v, max_exp_avg_sq
