"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from fastopt._optimizer import Optimizer, Options, Params, Unpack
from fastopt._rule import Betas, Flag, LearningRate, NonNegative, register
from fastopt.optimizers.adam import Adam


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
        Optimizer.__init__(self, params, locals())
