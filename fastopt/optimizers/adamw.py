"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.optimizers.adam import Adam
from fastopt.rules import Betas, Flag, LearningRate, NonNegative, register


@register
class AdamW(Adam):
    """AdamW: Adam with decoupled weight decay.

    In step t, with ``beta1, beta2 = betas`` and Adam's states m = `exp_avg` and v = `exp_avg_sq`::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        p = p - lr * weight_decay * p
        p = p - lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    See Also
    --------
    Adam : Weight decay in the gradient: an L2 penalty, which the second moment then rescales.
    LAMB : For batches of thousands.
    Lion : Half the state, decoupled decay as well.

    Notes
    -----
    The usual choice for transformers and most new networks. The decay is not divided by the second moment, so it
    shrinks all weights alike, and can be tuned apart from `lr`. As it is multiplied by `lr`, a schedule takes the
    decay along.

    References
    ----------
    Loshchilov, Hutter: Decoupled weight decay regularization, arXiv:1711.05101.
    """

    decoupled_weight_decay = True

    def __init__(
        self,
        params: Params | None = None,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 1e-2,
        amsgrad: Flag = False,
        *,
        maximize: Flag = False,
        l1: NonNegative = 0.0,
        **options: Unpack[Options],
    ) -> None:
        Optimizer.__init__(
            self,
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            l1=l1,
            **options,
        )
