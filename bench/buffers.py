"""The arrays of one workload, which every contestant works on where it lets itself be handed memory.

The same pages, alignment and huge-page advice for all: the speed of one optimizer was seen to differ by 10%
between allocations, with the physical pages that they got.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import fastopt
from bench.workloads import INPUTS, Workload
from fastopt._arrays import allocation

LONGEST_SAMPLE = 100_000
"""Elements of a tensor that are compared at most."""


@functools.cache
def _patterns() -> tuple[np.ndarray, np.ndarray]:
    """Parameters in [1, 2) and normal gradients, repeated over every tensor."""
    rng = np.random.default_rng(7)
    return rng.uniform(1, 2, 1 << 16).astype(np.float32), rng.standard_normal(1 << 16, np.float32)


class Buffers:
    """Parameters, gradients and states of a workload, from fastopt's own allocator."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._make(workload)
        self.reset()

    def _make(self, workload: Workload) -> None:
        names = {f"t{k}": shape for k, shape in enumerate(workload.shapes)}
        self.flat: Any = None
        if workload.form == "FlatBuffer":
            self.flat = fastopt.FlatBuffer(names), fastopt.FlatBuffer(names)
            self.params, self.grads = (list(buffer.values()) for buffer in self.flat)
        else:
            self.params, self.grads = (
                [allocation.zeros(int(np.prod(shape))).reshape(shape) for shape in workload.shapes] for _ in range(2)
            )
        self.states: dict[str, list[Any]] = {name: allocation.state_arrays(self.params) for name in workload.states}
        self._touch()

    def _touch(self) -> None:
        """First touch by the threads that will work there, which decides on whose memory a page lies."""
        for arrays in (self.params, *self.states.values()):
            step = fastopt.SGD(arrays, lr=0.0, n_threads=self.workload.n_threads)
            step.step(self.grads, zero_grads=True)

    def reset(self) -> None:
        """Everything as before the first step."""
        self.reset_gradients()
        for p in self.params:
            self._fill(p, _patterns()[0])
        given = INPUTS[self.workload.input].state
        for name, arrays in self.states.items():
            initial = self.workload.spec.initial(name, self.workload.values)
            for array in arrays:
                self._fill_with(array, initial if given is None else given)

    def reset_gradients(self) -> None:
        """Gradients as before the first step: some contestants use them up."""
        kind = INPUTS[self.workload.input].gradient
        factor = {"normal": 1.0, "zero": 0.0, "tiny": 1e-20, "NaN": float("nan")}[kind]
        values = _patterns()[1] * np.float32(factor)
        for g in self.grads:
            self._fill(g, values)

    def _fill(self, array: Any, values: np.ndarray) -> None:
        """Repeat the values over a tensor."""
        flat = array.reshape(-1)
        for start in range(0, flat.size, values.size):
            flat[start : start + values.size] = values[: flat.size - start]

    def _fill_with(self, array: Any, value: float) -> None:
        array.fill(value)

    def tensor(self, array: Any) -> Any:
        """torch's tensor over one of the arrays."""
        import torch

        return torch.from_numpy(array)

    def host(self, array: Any) -> np.ndarray:
        """One of the arrays in host memory."""
        return np.asarray(array)

    def wait(self) -> None:
        """Until all steps are done: here they are when they return."""

    def sample(self, arrays: list[Any] | None = None) -> list[np.ndarray]:
        """A copy of some elements of every tensor, of the parameters if None."""
        flat = [array.reshape(-1) for array in (self.params if arrays is None else arrays)]
        return [array[:: max(1, array.size // LONGEST_SAMPLE)].copy() for array in flat]


def adopt(optimizer: fastopt.Optimizer, states: dict[str, list[Any]], names: dict[str, str]) -> None:
    """Let a fastopt optimizer that has not stepped yet keep its states in the given arrays: own name -> theirs."""
    for k, tensor in enumerate(optimizer._tensors):
        for name, theirs in names.items():
            tensor.states[name] = states[theirs][k]


def largest_difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest difference in ULP of float32; two NaN differ by 0, a NaN and a number by infinity.

    Parameters that came near 0 count as if still at 1, where they started and had their rounding errors.
    """
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        x, y = a.astype(np.float64), b.astype(np.float64)
        if not np.array_equal(np.isnan(x), np.isnan(y)):
            return float("inf")
        x, y = x[~np.isnan(x)], y[~np.isnan(y)]
        ulp = np.spacing(np.maximum(1, np.maximum(np.abs(x), np.abs(y))).astype(np.float32))
        worst = max(worst, float(np.max(np.abs(x - y) / ulp, initial=0.0)))
    return worst
