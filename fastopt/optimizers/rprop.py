"""Resilient backpropagation."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.rules import Flag, LearningRate, Pair, Real, maximum, minimum, register, sign

Etas = Annotated[
    tuple[float, float],
    Pair(Real(0.0, 1.0, low_open=True, high_open=True), Real(1.0, low_open=True)),
]
StepSizes = Annotated[tuple[float, float], Pair(Real(0.0), Real(0.0))]


@register
class Rprop(Optimizer):
    """Rprop: only the gradient's sign counts; every parameter has a step size of its own.

    In every step, with the states s = `step_size` and `prev`, the gradient before::

        if sign(g) * sign(prev) > 0:
            s = minimum(s * etas[1], step_sizes[1])
        if sign(g) * sign(prev) < 0:
            s = maximum(s * etas[0], step_sizes[0])
            g = 0
        p = p - s * sign(g)
        prev = g

    After a change of sign the parameter rests for one step. Signs are compared, where torch compares the product of two
    gradients with 0, which underflows when they are tiny.

    Parameters
    ----------
    lr
        Step size of every parameter before the first step.
    etas
        Factors on the step size when the sign changes and when it stays.
    step_sizes
        Smallest and largest step size.

    See Also
    --------
    RMSprop : The idea of it made fit for mini-batches.
    Lion : Signs as well, of a running mean.

    Notes
    -----
    Choose it for gradients of the whole data set, without noise: it needs no learning rate to speak of and does not
    care for the scale of the loss. With mini-batches the signs flip by chance and all steps shrink to nothing.

    References
    ----------
    Riedmiller, Braun: A direct adaptive method for faster backpropagation learning: the RPROP algorithm,
    ICNN 1993 (the variant without weight backtracking, iRprop-).
    """

    states = {"prev": 0.0, "step_size": "lr"}
    state_kinds = {"step_size": "unsigned"}

    def __init__(
        self,
        params: Params | None = None,
        lr: LearningRate = 1e-2,
        etas: Etas = (0.5, 1.2),
        step_sizes: StepSizes = (1e-6, 50.0),
        *,
        maximize: Flag = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr=lr, etas=etas, step_sizes=step_sizes, maximize=maximize, **options)

    @staticmethod
    def check_together(step_sizes):
        if step_sizes[0] > step_sizes[1]:
            raise ValueError(f"Rprop: step_sizes must be (smallest, largest), got {step_sizes!r}")

    @staticmethod
    def scalars(step, etas, step_sizes):
        eta_minus, eta_plus = etas
        smallest, largest = step_sizes
        return dict(eta_minus=eta_minus, eta_plus=eta_plus, smallest=smallest, largest=largest, zero=0, one=1)

    @staticmethod
    def rule(p, g, prev, step_size, eta_minus, eta_plus, smallest, largest, zero, one):
        agreement = sign(g) * sign(prev)
        factor = eta_plus if agreement > zero else (eta_minus if agreement < zero else one + agreement)
        step_size = minimum(maximum(factor * step_size, smallest), largest)
        prev = zero if agreement < zero else g
        p = p - step_size * sign(prev)
        return p, prev, step_size

    @staticmethod
    def reference(p, g, prev, step_size, *, step, etas, step_sizes):
        eta_minus, eta_plus = etas
        agreement = np.sign(g) * np.sign(prev)
        unchanged = 1 + 0 * agreement  # 1, but NaN stays NaN
        factor = np.where(agreement > 0, eta_plus, np.where(agreement < 0, eta_minus, unchanged))
        step_size = np.clip(step_size * factor, *step_sizes)
        g = np.where(agreement < 0, 0, g)
        return p - step_size * np.sign(g), g, step_size
