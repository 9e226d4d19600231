"""Adadelta."""

from __future__ import annotations

import numpy as np

from fastopt._optimizer import Optimizer, Options, Params, Unpack
from fastopt._rule import Flag, Fraction, NonNegative, register, sqrt


@register
class Adadelta(Optimizer):
    r"""Adadelta: the ratio of two running root mean squares sets the step.

    .. math::
        v_t &= \rho v_{t-1} + (1 - \rho) g_t^2 \\
        \Delta_t &= \frac{\sqrt{u_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}} g_t \\
        u_t &= \rho u_{t-1} + (1 - \rho) \Delta_t^2 \\
        p_t &= p_{t-1} - \gamma \Delta_t

    Parameters
    ----------
    params
        One float32 array, a sequence or a dict of them, or a list of param groups.
    lr : float >= 0, default 1.0
        Factor on the step (gamma).
    rho : float in [0, 1], default 0.9
        Decay of both running means.
    eps : float >= 0, default 1e-6
        Added under both roots.
    weight_decay : float >= 0, default 0
        L2 penalty, added to the gradient.

    See Also
    --------
    RMSprop : One running mean instead of two, and a learning rate to tune.
    Adagrad : What it was made to mend: steps that only shrink.

    Notes
    -----
    Choose it where no learning rate can be tuned: the ratio of the two means has the units of the parameter, so 1.0
    is a sensible `lr` whatever the scale of the loss. It starts slowly, because the mean of squared steps starts
    from 0 and grows from `eps`. Where a learning rate can be tuned, Adam usually gets further in the same time.

    References
    ----------
    Zeiler: ADADELTA: an adaptive learning rate method, arXiv:1212.5701.
    """

    states = {"square_avg": 0.0, "acc_delta": 0.0}
    state_kinds = {"square_avg": "unsigned", "acc_delta": "unsigned"}

    def __init__(
        self,
        params: Params | None = None,
        lr: NonNegative = 1.0,
        rho: Fraction = 0.9,
        eps: NonNegative = 1e-6,
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Flag = False,
        l1: NonNegative = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, locals())

    @staticmethod
    def scalars(step, lr, rho, eps):
        return dict(lr=lr, rho=rho, one_minus_rho=1 - rho, eps=eps)

    @staticmethod
    def rule(p, g, square_avg, acc_delta, lr, rho, one_minus_rho, eps):
        square_avg = rho * square_avg + one_minus_rho * g * g
        delta = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * g
        acc_delta = rho * acc_delta + one_minus_rho * delta * delta
        p = p - lr * delta
        return p, square_avg, acc_delta

    @staticmethod
    def reference(p, g, square_avg, acc_delta, *, step, lr, rho, eps):
        v = rho * square_avg + (1 - rho) * np.square(g)
        delta = np.sqrt(acc_delta + eps) / np.sqrt(v + eps) * g
        u = rho * acc_delta + (1 - rho) * np.square(delta)
        return p - lr * delta, v, u
