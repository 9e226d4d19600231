"""Host scalars: what a step reads that is the same for all elements, in float64.

The CPU's kernels have the same text compiled (`fastopt._codegen`); here it runs as Python, for the other backends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt.rules import gradient_stage
from fastopt.rules.spec import Spec

_LARGEST = float(np.finfo(np.float32).max)


def kernel_and_hypers(spec: Spec, values: Mapping[str, Any]) -> tuple[str, tuple[float, ...]]:
    """Name of the kernel of `spec` for the hyperparameters `values`, and what its host scalars read of them."""
    stage = spec.stage_values(values)
    name = spec.kernel_name(spec.flags(values), gradient_stage.regularized(stage))
    hyper = [float(value) for value in stage.values()]
    for own in spec.scalar_hypers:
        if own not in stage:
            hyper += spec.hypers[own].kind.flatten(values[own])
    return name, tuple(hyper)


def host_scalars(spec: Any, step: int, running: Mapping[str, float], values: Mapping[str, Any]) -> dict[str, float]:
    """What a rule's step reads that is the same for all elements, in float64; overflows and poles as C has them."""
    hypers = {name: values[name] for name in spec.host_hypers}
    if spec.trust == "update":
        hypers["lr"] = 1.0  # the rule gives the direction; its size comes with the ratio
    try:
        return dict(spec.scalars(step=step, **running, **hypers))
    except (ZeroDivisionError, OverflowError):  # Python's own; NumPy's numbers go on with inf and NaN
        given = {**running, **hypers}
        given = {name: np.float64(value) if isinstance(value, float) else value for name, value in given.items()}
        with np.errstate(all="ignore"):
            return {name: float(value) for name, value in spec.scalars(step=np.float64(step), **given).items()}


def scalars_fit(spec: Any, step: int, running: dict[str, float], values: dict[str, Any]) -> bool:
    """Whether every host scalar of this step is a finite float32."""
    scalars = {**gradient_stage.scalars(**spec.stage_values(values)), **host_scalars(spec, step, running, values)}
    return all(isinstance(x, int | float) and abs(x) <= _LARGEST for x in scalars.values())


def average_decay(optimizer: Any, step: int) -> float:
    """Decay of the parameters' average in step number `step` (1 is the first)."""
    decay = optimizer.ema_decay or 0.0
    return min(decay, (1.0 + step) / (10.0 + step)) if optimizer.ema_warmup else decay
