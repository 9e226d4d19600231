"""SGD with momentum and Nesterov momentum, in the form of torch.optim."""

from __future__ import annotations

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.rules import AnyReal, Flag, LearningRate, NonNegative, register


@register
class SGD(Optimizer):
    """Stochastic gradient descent, with momentum and Nesterov momentum.

    In every step, with the state b = `momentum_buffer`, in the first step g itself::

        b = momentum * b + (1 - dampening) * g
        p = p - lr * b  # with nesterov: p - lr * (g + momentum * b)

    The learning rate multiplies the whole buffer, as in torch; `Momentum` and `Nesterov` keep it inside the velocity,
    which differs as soon as `lr` changes.

    Parameters
    ----------
    momentum
        Factor on the buffer before the gradient is added; 0 keeps no state.
    dampening
        Share of the gradient that is left out of the buffer, but not in the first step.
    nesterov
        Nesterov momentum; needs momentum > 0 and dampening 0.

    See Also
    --------
    Momentum : The learning rate inside the velocity.
    Nesterov : That with a look ahead.
    ASGD : With an average of the parameters.
    LARS : For batches of thousands.
    Adam : A rate for every parameter.

    Notes
    -----
    Choose it with ``momentum=0.9, nesterov=True`` and a schedule for convolutional networks: it needs a tuned `lr`,
    keeps half of Adam's state or none, and often generalises best. Without momentum it zigzags in narrow valleys:
    see the examples.

    References
    ----------
    Sutskever, Martens, Dahl, Hinton: On the importance of initialization and momentum in deep learning,
    ICML 2013.
    """

    states = {"momentum_buffer": 0.0}
    optional_states = {"momentum_buffer": "with_momentum"}

    def __init__(
        self,
        params: Params | None = None,
        lr: LearningRate = 1e-3,
        momentum: NonNegative = 0.0,
        dampening: AnyReal = 0.0,
        weight_decay: NonNegative = 0.0,
        nesterov: Flag = False,
        *,
        maximize: Flag = False,
        l1: NonNegative = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            l1=l1,
            **options,
        )

    @staticmethod
    def check_together(momentum, dampening, nesterov):
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(
                "SGD: nesterov needs momentum > 0 and dampening 0, "
                f"got momentum={momentum!r} and dampening={dampening!r}"
            )

    @staticmethod
    def flags(momentum):
        return dict(with_momentum=momentum != 0)

    @staticmethod
    def scalars(step, lr, momentum, dampening):
        first = step == 1
        return dict(
            lr=lr,
            momentum=momentum,
            buffer_weight=0 if first else momentum,
            grad_weight=1 if first else 1 - dampening,
        )

    @staticmethod
    def rule(p, g, momentum_buffer, lr, momentum, buffer_weight, grad_weight, *, with_momentum, nesterov):
        if with_momentum:
            momentum_buffer = buffer_weight * momentum_buffer + grad_weight * g
            if nesterov:
                g = g + momentum * momentum_buffer
            else:
                g = momentum_buffer
        p = p - lr * g
        return p, momentum_buffer

    @staticmethod
    def reference(p, g, momentum_buffer, *, step, lr, momentum, dampening, nesterov):
        if momentum == 0:
            return p - lr * g, momentum_buffer
        b = g if step == 1 else momentum * momentum_buffer + (1 - dampening) * g
        return p - lr * (g + momentum * b if nesterov else b), b
