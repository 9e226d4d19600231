"""Averaged stochastic gradient descent."""

from __future__ import annotations

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.rules import AnyReal, Flag, LearningRate, NonNegative, register


@register
class ASGD(Optimizer):
    """Averaged SGD: SGD with a decaying step, and a running mean `ax` of the parameters.

    In step t::

        eta = lr / (1 + lambd * lr * (t - 1))**alpha
        p = (1 - lambd * eta) * p - eta * g
        mu = 1 / maximum(1, t - 1 - t0)
        ax = ax + mu * (p - ax)

    Torch keeps eta and mu of the next step as state, so that there a changed `lr` counts one step late; here both
    follow from the step count, and it counts at once.

    Parameters
    ----------
    lambd
        Decay term.
    alpha
        Power of the decay of the step.
    t0
        Step at which the averaging starts; until then `ax` is a copy of the parameter.

    See Also
    --------
    SGD : The same steps with a constant rate, without an average.

    Notes
    -----
    Choose it for convex problems with noisy gradients, where the average of the path converges faster than its end:
    evaluate with the state `ax`, and set `t0` to the step from which on to average. For networks, take any
    optimizer with the option `ema_decay`, whose average forgets.

    References
    ----------
    Polyak, Juditsky: Acceleration of stochastic approximation by averaging, 1992; the schedule of the
    step is Bottou's.
    """

    states = {"ax": 0.0}
    state_kinds = {"ax": "weights"}
    derived_states = ("eta", "mu")

    def __init__(
        self,
        params: Params | None = None,
        lr: LearningRate = 1e-2,
        lambd: NonNegative = 1e-4,
        alpha: AnyReal = 0.75,
        t0: NonNegative = 1e6,
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Flag = False,
        l1: NonNegative = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            lambd=lambd,
            alpha=alpha,
            t0=t0,
            weight_decay=weight_decay,
            maximize=maximize,
            l1=l1,
            **options,
        )

    @staticmethod
    def scalars(step, lr, lambd, alpha, t0):
        eta = lr / (1 + lambd * lr * (step - 1)) ** alpha
        mu = 1 / (step - 1 - t0) if step - 1 - t0 > 1 else 1
        return dict(eta=eta, shrink=1 - lambd * eta, mu=mu, one_minus_mu=1 - mu)

    @staticmethod
    def rule(p, g, ax, eta, shrink, mu, one_minus_mu):
        p = shrink * p - eta * g
        ax = one_minus_mu * ax + mu * p
        return p, ax

    @staticmethod
    def reference(p, g, ax, *, step, lr, lambd, alpha, t0):
        eta = lr / (1 + lambd * lr * (step - 1)) ** alpha
        mu = 1 / max(1, step - 1 - t0)
        p = (1 - lambd * eta) * p - eta * g
        return p, ax + mu * (p - ax)
