"""NAdam: Adam with Nesterov momentum."""

from __future__ import annotations

import numpy as np

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.rules import Betas, Flag, LearningRate, NonNegative, register, sqrt


@register
class NAdam(Optimizer):
    """NAdam: Adam with Nesterov momentum and a schedule for it.

    In step t, with ``beta1, beta2 = betas``, the states m = `exp_avg` and v = `exp_avg_sq`, and the product of all mu
    so far, which is carried in float64 as `mu_product`, one number a tensor::

        mu = beta1 * (1 - 0.5 * 0.96**(t * momentum_decay))
        next_mu = beta1 * (1 - 0.5 * 0.96**((t + 1) * momentum_decay))
        mu_product = mu_product * mu
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        d = (1 - mu) * g / (1 - mu_product)
        d = d + next_mu * m / (1 - mu_product * next_mu)
        p = p - lr * d / (sqrt(v / (1 - beta2**t)) + eps)

    Parameters
    ----------
    betas
        Decay of the two running means.
    eps
        Added to the denominator.
    momentum_decay
        Decay of the momentum's schedule.

    See Also
    --------
    Adam : Without the look ahead.
    Nesterov : The look ahead without the second moment.

    Notes
    -----
    Choose it where Adam works and should react a little faster: the step already counts the gradient of now with
    the weight that it has in the next. The weight of the momentum grows from half of `betas[0]` to the whole of it,
    over some 25 / `momentum_decay` steps.

    References
    ----------
    Dozat: Incorporating Nesterov momentum into Adam, ICLR 2016 workshop.
    """

    states = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
    state_kinds = {"exp_avg_sq": "unsigned"}
    running = {"mu_product": 1.0}

    def __init__(
        self,
        params: Params | None = None,
        lr: LearningRate = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
        momentum_decay: NonNegative = 4e-3,
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
            momentum_decay=momentum_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            l1=l1,
            **options,
        )

    @staticmethod
    def scalars(step, mu_product, lr, betas, eps, momentum_decay):
        beta1, beta2 = betas
        mu = beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))
        next_mu = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
        mu_product = mu_product * mu
        return dict(
            mu_product=mu_product,
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            grad_size=lr * (1 - mu) / (1 - mu_product),
            step_size=lr * next_mu / (1 - mu_product * next_mu),
            root_scale=1 / sqrt(1 - beta2**step),
            eps=eps,
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
        grad_size,
        step_size,
        root_scale,
        eps,
    ):
        exp_avg = beta1 * exp_avg + one_minus_beta1 * g
        exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * g * g
        denominator = sqrt(exp_avg_sq) * root_scale + eps
        p = p - (step_size * exp_avg + grad_size * g) / denominator
        return p, exp_avg, exp_avg_sq

    @staticmethod
    def reference(p, g, exp_avg, exp_avg_sq, mu_product, *, step, lr, betas, eps, momentum_decay):
        beta1, beta2 = betas
        mu = beta1 * (1 - 0.96 ** (step * momentum_decay) / 2)
        next_mu = beta1 * (1 - 0.96 ** ((step + 1) * momentum_decay) / 2)
        mu_product = mu_product * mu
        m = beta1 * exp_avg + (1 - beta1) * g
        v = beta2 * exp_avg_sq + (1 - beta2) * np.square(g)
        m_hat = next_mu / (1 - mu_product * next_mu) * m + (1 - mu) / (1 - mu_product) * g
        v_hat = v / (1 - beta2**step)
        return p - lr * m_hat / (np.sqrt(v_hat) + eps), m, v, mu_product
