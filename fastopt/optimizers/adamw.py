"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from fastopt._optimizer import Optimizer, Options, Params, Unpack
from fastopt._rule import Betas, Flag, NonNegative, register
from fastopt.optimizers.adam import Adam


@register
class AdamW(Adam):
    r"""AdamW: Adam with decoupled weight decay.

    .. math::
        p_t = (1 - \gamma \lambda) p_{t-1}
            - \gamma \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    with Adam's running means :math:`m` and :math:`v`; rule, states and reference are Adam's.

    Parameters
    ----------
    params
        One float32 array, a sequence or a dict of them, or a list of param groups.
    lr : float >= 0, default 1e-3
        Learning rate (gamma).
    betas : (float, float), both in [0, 1), default (0.9, 0.999)
        Decay of the two running means.
    eps : float >= 0, default 1e-8
        Added to the denominator.
    weight_decay : float >= 0, default 1e-2
        Weight decay (lambda), decoupled from the gradient.
    amsgrad : bool, default False
        Take the largest :math:`v` seen so far in the denominator.

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
        lr: NonNegative = 1e-3,
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
