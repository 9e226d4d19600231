"""The NumPy reference as a backend: the optimizers' textbook text, on whole arrays, one thread."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt import _buffers, _codecs, _host, _stages, backends
from fastopt import _host as arrays  # noqa: F401  of the backend's interface

NAME = "reference"

_PLAIN = (1.0, None, None, False, False)
_LARGEST = float(np.finfo(np.float32).max)


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
    if streams["p"].dtype == np.float32 and not scalars_fit(spec, step, carried_in, values):
        return False
    states = [streams.get(name) for name in spec.states]
    carried = [] if running is None else [float(value) for value in running.ravel()]
    with np.errstate(all="ignore"):
        p, g = _stages.reference(streams["p"], streams["g"], **spec.reference_stage_values(values))
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

    def _sums(self) -> Any:
        """What was accumulated, in the structure of gradients."""
        n_calls, sums = self._accumulated
        if not n_calls:
            _buffers.refuse_missing_gradients(self._optimizer)
        return sums[0] if self._optimizer._structure == "single" else self._optimizer._structured(sums)

    def step(self, gradients: Any, options: tuple = _PLAIN) -> tuple[bool, float | None]:
        """Check everything, then update every tensor that has a gradient, in place."""
        result: tuple[bool, float | None] = self._guard.run("step()", self.step_held, gradients, options)
        return result

    def step_held(self, gradients: Any, options: tuple = _PLAIN) -> tuple[bool, float | None]:
        """The same for a caller that has taken the optimizer's guard."""
        grad_scale, max_norm, clip_value, skip_nonfinite, zero_grads = options
        if gradients is _buffers.ACCUMULATED:
            gradients = self._sums()
        elif self.n_accumulated:
            _buffers.refuse_pending_gradients(self._optimizer, "step(grads)")
        gathered = self._checked.gather(gradients, zero_grads)
        for position, _ in gathered:
            self._check_scalars(position)
        with np.errstate(all="ignore"):
            scaled = [(position, decoded(gradient) * np.float32(grad_scale)) for position, gradient in gathered]
            norm = None
            if max_norm is not None or skip_nonfinite:
                norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for _, g in scaled))
            applied = not skip_nonfinite or math.isfinite(norm or 0.0)
            if max_norm is not None and norm is not None and not math.isinf(max_norm):
                coefficient = np.minimum(np.float64(max_norm) / (norm + 1e-6), 1.0)
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
        if not scalars_fit(spec, int(tensor.step) + 1, running, values):
            _buffers.refuse_scalars(self._optimizer, position, int(tensor.step) + 1)

    def _note_update(self, changes: Any, tensor: Any, gradient: np.ndarray) -> None:
        """Note in `changes` what a step makes of a tensor and what is kept for it."""
        optimizer = self._optimizer
        spec, values, step = optimizer.spec, optimizer.param_groups[tensor.group], int(tensor.step) + 1
        states, running = optimizer._decoded(tensor), tensor.running.copy()
        p = np.array(_host.values_of(tensor))
        run_once(spec, {"p": p, "g": gradient, **states}, running if spec.running else None, step, values)
        _host.note_values(changes, tensor, p)
        changes.copy(tensor.running, running)
        changes.copy(tensor.step, np.array(step, np.int64))
        for position, name in enumerate(spec.states_for(spec.flags(values))):
            random = _codecs.Random(optimizer.seed, step, tensor.index, position)
            codes, scales = optimizer._codec(name).encode(states[name], random, tensor.scales.get(name))
            changes.copy(tensor.states[name], codes)
            if name in tensor.scales:
                changes.copy(tensor.scales[name], scales)
        if tensor.ema is not None:
            decay = average_decay(optimizer, step)
            changes.copy(tensor.ema, np.asarray(decay * tensor.ema + (1 - decay) * p, np.float32))
        if tensor.copy is not None:
            copy = np.empty_like(tensor.copy)
            copy_array(p, copy)
            changes.copy(tensor.copy, copy)


def average_decay(optimizer: Any, step: int) -> float:
    """Decay of the parameters' average in step number `step` (1 is the first)."""
    decay = optimizer.ema_decay or 0.0
    return min(decay, (1.0 + step) / (10.0 + step)) if optimizer.ema_warmup else decay


def scalars_fit(spec: Any, step: int, running: dict[str, float], values: dict[str, Any]) -> bool:
    """Whether every host scalar of this step is a finite float32."""
    scalars = {**_stages.scalars(**spec.stage_values(values)), **host_scalars(spec, step, running, values)}
    return all(isinstance(x, int | float) and abs(x) <= _LARGEST for x in scalars.values())


def host_scalars(spec: Any, step: int, running: Mapping[str, float], values: Mapping[str, Any]) -> dict[str, float]:
    """What a rule's step reads that is the same for all elements, in float64; overflows and poles as C has them."""
    hypers = {name: values[name] for name in spec.host_hypers}
    if spec.trust == "update":
        hypers["lr"] = 1.0  # the rule gives the direction; its size comes with the ratio
    try:
        return dict(spec.scalars(step=step, **running, **hypers))
    except (ZeroDivisionError, OverflowError):  # Python's own; NumPy's numbers go on with inf and NaN
        taken = {**running, **hypers}
        taken = {name: np.float64(value) if isinstance(value, float) else value for name, value in taken.items()}
        with np.errstate(all="ignore"):
            return {name: float(value) for name, value in spec.scalars(step=np.float64(step), **taken).items()}


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
