"""The NumPy reference as a backend: the optimizers' textbook text, on whole arrays, one thread."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np

from fastopt import _formats, backends
from fastopt._arrays import host
from fastopt._arrays import host as arrays  # noqa: F401  of the backend's interface
from fastopt._core import refusals, tensors
from fastopt._core.options import ACCUMULATED
from fastopt.rules import gradient_stage, host_scalars

NAME = "reference"
ON_DEVICE = False

_PLAIN = (1.0, None, None, False, False)


def run_once(
    spec: Any,
    streams: dict[str, np.ndarray],
    running: np.ndarray | None,
    step: int,
    values: dict[str, Any],
    n_threads: int | None = None,  # noqa: ARG001  at most: NumPy uses one
) -> bool:
    """One step of `spec` on the checked arrays p, g and states, float32 or float64, in place.

    False, with nothing written, if a host scalar leaves float32.
    """
    carried_in = dict(zip(spec.running, [] if running is None else running.ravel().tolist(), strict=True))
    if streams["p"].dtype == np.float32 and not host_scalars.scalars_fit(spec, step, carried_in, values):
        return False
    states = [streams.get(name) for name in spec.states]
    carried = [] if running is None else [float(value) for value in running.ravel()]
    with np.errstate(all="ignore"):
        p, g = gradient_stage.reference(streams["p"], streams["g"], **spec.reference_stage_values(values))
        new = spec.reference(
            p, g, *states, *carried, step=step, **{name: values[name] for name in spec.reference_hypers}
        )
    for array, value in zip([streams["p"], *states], new, strict=False):
        if array is not None:
            array[...] = value
    if running is not None:
        running[...] = np.reshape(new[1 + len(states) :], running.shape)
    return True


class _Plan:
    """The step of one optimizer: checked by the engine, computed by the reference."""

    def __init__(self, optimizer: Any) -> None:
        self._reference = weakref.ref(optimizer)  # in a cycle, large states would wait for the garbage collector
        self._checked = backends.engine().Plan(optimizer, None)
        self._guard = optimizer._guard
        self._reduce_sum = optimizer._reduce_sum
        self.n_threads = 1
        self._accumulated: tuple[int, list[np.ndarray | None]] = (0, [])
        """Calls of `accumulate`, and the sum of every tensor that they gave gradients."""

    @property
    def _optimizer(self) -> Any:
        return self._reference()

    @property
    def n_accumulated(self) -> int:
        """Calls of `accumulate` whose gradients no step has used."""
        return self._accumulated[0]

    def accumulate(self, gradients: Any) -> None:
        """Check every gradient, then add it to its tensor's sum, for a caller that has taken the optimizer's guard."""
        n_calls, sums = self._accumulated
        sums = list(sums) or [None] * len(self._optimizer._tensors)
        with np.errstate(all="ignore"):
            for position, gradient in self._checked.gather(gradients):
                before = sums[position]
                sums[position] = np.asarray(decoded(gradient) + (0 if before is None else before))
        self._accumulated = n_calls + 1, sums

    def discard(self) -> None:
        """Drop the sums."""
        self._accumulated = 0, []

    def settle(self) -> None:
        """Nothing is undecided: a step's result is known when it returns."""

    def captured(self) -> list[Any]:
        """Nothing is in a graph."""
        return []

    def _sums(self) -> Any:
        """What was accumulated, in the structure of gradients."""
        n_calls, sums = self._accumulated
        if not n_calls:
            refusals.refuse_missing_gradients(self._optimizer)
        return sums[0] if self._optimizer._structure == "single" else self._optimizer._structured(sums)

    def step(self, gradients: Any, options: tuple = _PLAIN) -> tuple[bool, float | None]:
        """Check everything, then update every tensor that has a gradient, in place."""
        result: tuple[bool, float | None] = self._guard.run("step()", self.step_held, gradients, options)
        return result

    def step_held(self, gradients: Any, options: tuple = _PLAIN) -> tuple[bool, float | None]:
        """The same for a caller that has taken the optimizer's guard."""
        grad_scale, max_norm, clip_value, skip_nonfinite, zero_grads = options
        if gradients is ACCUMULATED:
            gradients = self._sums()
        elif self.n_accumulated:
            refusals.refuse_pending_gradients(self._optimizer, "step(grads)")
        gathered = self._checked.gather(gradients, zero_grads)
        for position, _ in gathered:
            self._check_scalars(position)
        with np.errstate(all="ignore"):
            scaled = [(position, decoded(gradient) * np.float32(grad_scale)) for position, gradient in gathered]
            norm = None
            if max_norm is not None or skip_nonfinite:
                total = sum(float(np.sum(np.square(g, dtype=np.float64))) for _, g in scaled)
                norm = math.sqrt(total if self._reduce_sum is None else self._reduce_sum(total))
            applied = not skip_nonfinite or math.isfinite(norm or 0.0)
            if max_norm is not None and norm is not None and not math.isinf(max_norm):
                coefficient = np.float64(gradient_stage.clip_coefficient(norm, max_norm))
                scaled = [(position, (g * coefficient).astype(np.float32)) for position, g in scaled]
            if clip_value is not None:
                scaled = [(position, np.clip(g, -clip_value, clip_value)) for position, g in scaled]
        changes = backends.engine().Changes()
        if applied:
            for position, g in scaled:
                self._note_update(changes, self._optimizer._tensors[position], g)
        if zero_grads:
            for _, gradient in gathered:
                changes.copy(gradient, np.zeros(gradient.shape, gradient.dtype))
        changes.attribute(self, "_accumulated", (0, []))
        changes.attribute(self._guard, "steps", self._guard.steps + 1)
        changes.publish()
        return applied, norm

    def _check_scalars(self, position: int) -> None:
        """Refuse what the compiled kernels refuse: factors outside float32, before anything is written."""
        tensor, spec = self._optimizer._tensors[position], self._optimizer.spec
        values = self._optimizer.param_groups[tensor.group]
        running = dict(zip(spec.running, tensor.running.tolist(), strict=True))
        if not host_scalars.scalars_fit(spec, int(tensor.step) + 1, running, values):
            refusals.refuse_scalars(self._optimizer, position, int(tensor.step) + 1)

    def _note_update(self, changes: Any, tensor: Any, gradient: np.ndarray) -> None:
        """Note in `changes` what a step makes of a tensor and what is kept for it."""
        optimizer = self._optimizer
        spec, values, step = optimizer.spec, optimizer.param_groups[tensor.group], int(tensor.step) + 1
        states, running = tensors.decoded(optimizer, tensor), tensor.running.copy()
        p = np.array(host.values_of(tensor))
        run_once(spec, {"p": p, "g": gradient, **states}, running if spec.running else None, step, values)
        host.note_values(changes, tensor, p)
        changes.copy(tensor.running, running)
        changes.copy(tensor.step, np.array(step, np.int64))
        for position, name in enumerate(spec.states_for(spec.flags(values))):
            random = _formats.Random(optimizer.seed, step, tensor.index, position)
            codes, scales = tensors.codec_of(optimizer, name).encode(states[name], random, tensor.scales.get(name))
            changes.copy(tensor.states[name], codes)
            if name in tensor.scales:
                changes.copy(tensor.scales[name], scales)
        if tensor.ema is not None:
            decay = host_scalars.average_decay(optimizer, step)
            changes.copy(tensor.ema, np.asarray(decay * tensor.ema + (1 - decay) * p, np.float32))
        if tensor.copy is not None:
            copy = np.empty_like(tensor.copy)
            copy_array(p, copy)
            changes.copy(tensor.copy, copy)


def decoded(gradient: np.ndarray) -> np.ndarray:
    """A gradient of any type in float32; uint16 holds the bits of bfloat16."""
    if gradient.dtype == np.uint16:
        return (gradient.astype(np.uint32) << 16).view(np.float32)
    return gradient.astype(np.float32)


def copy_array(source: np.ndarray, out: np.ndarray) -> None:
    """Round the float32 array `source` into `out`, float16 or bfloat16 (or uint16 with its bits)."""
    with np.errstate(all="ignore"):
        if out.dtype == np.uint16:
            bits = source.view(np.uint32)
            rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            out[...] = np.where(np.isnan(source), bits >> 16 | 0x40, rounded)
        else:
            out[...] = source.astype(out.dtype)


def make_plan(optimizer: Any) -> _Plan:
    """The step of `optimizer`."""
    return _Plan(optimizer)
