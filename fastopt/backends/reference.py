"""The NumPy reference as a backend: the optimizers' textbook text, on whole arrays, one thread."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastopt import _stages, backends

NAME = "reference"


def run_once(
    spec: Any,
    arrays: dict[str, np.ndarray],
    running: np.ndarray | None,
    step: int,
    values: dict[str, Any],
    n_threads: int | None = None,  # noqa: ARG001  at most: NumPy uses one
) -> bool:
    """One step of `spec` on the checked arrays p, g and states, float32 or float64, in place."""
    states = [arrays.get(name) for name in spec.states]
    carried = [] if running is None else [float(value) for value in running.ravel()]
    with np.errstate(all="ignore"):
        p, g = _stages.reference(arrays["p"], arrays["g"], **spec.stage_values(values))
        new = spec.reference(
            p, g, *states, *carried, step=step, **{name: values[name] for name in spec.reference_hypers}
        )
    for array, value in zip([arrays["p"], *states], new, strict=False):
        if array is not None:
            array[...] = value
    if running is not None:
        running[...] = np.reshape(new[1 + len(states) :], running.shape)
    return True


class _Plan:
    """The step of one optimizer: checked by the engine, computed by the reference."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._checked = backends.engine().Plan(optimizer, None)

    def step(self, gradients: Any) -> None:
        for position, gradient in self._checked.gather(gradients):
            tensor = self._optimizer._tensors[position]
            values = self._optimizer.param_groups[tensor.group]
            arrays = {"p": tensor.array, "g": gradient, **tensor.states}
            running = tensor.running if self._optimizer.spec.running else None
            run_once(self._optimizer.spec, arrays, running, int(tensor.step) + 1, values)
            tensor.step += 1


def make_plan(optimizer: Any) -> _Plan:
    """The step of `optimizer`."""
    return _Plan(optimizer)
