"""A whole optimizer in NumPy, one parameter and one stage after another: what an `Optimizer` must equal to the bit.

It knows groups, names, averages, copies, split parameters and how states are kept; the rule comes from `oracle`, and
the codecs are those of `fastopt._formats`. No threads, no plans, no memory that is shared.
"""

import copy
import math
from dataclasses import dataclass, field

import numpy as np

from fastopt import _formats
from tests.support.configs import Config
from tests.support.oracle import Oracle, sum_squares
from tests.support.unfused import as_bfloat16, decoded


@dataclass
class Parameter:
    """One parameter and what is kept for it; arrays are flat."""

    p: np.ndarray
    shape: tuple
    group: int
    index: int
    """Of its first element, for the rounding of its states."""
    running: dict
    kept: dict = field(default_factory=dict)
    """State -> codes and scales."""
    step: int = 0
    ema: np.ndarray | None = None
    copy: np.ndarray | None = None


def as_float16(p):
    """The nearest float16 of float32 values, as their bits; every NaN becomes the quiet one without a payload."""
    with np.errstate(over="ignore"):
        halves = p.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(p), (halves & 0x8000) | 0x7E00, halves)


def lower_half(p):
    """What float32 parameters have beside their nearest bfloat16."""
    high, low = np.empty(p.shape, np.uint16), np.empty(p.shape, np.uint16)
    _formats.split(p, high, low)
    return low


class Model:
    """The parameters of one optimizer by name (or position), in their order."""

    def __init__(self, spec, hypers, *, state_dtype, seed, ema_decay, ema_warmup, copy_dtype, is_split):
        self.spec, self.state_dtype, self.seed, self.is_split = spec, state_dtype, seed, is_split
        self.ema_decay, self.ema_warmup, self.copy_dtype = ema_decay, ema_warmup, copy_dtype
        self.defaults = Config(spec, "", hypers).values
        self.groups = []
        self.parameters = {}
        self.awaited = {}
        self.sums = {}
        """Accumulated gradients, by name."""
        self.n_accumulated = 0

    def clone(self):
        """Another model of the same values."""
        return copy.deepcopy(self, {id(self.spec): self.spec})

    def codec(self, state):
        return _formats.codec(self.state_dtype, self.spec.kinds[state])

    # --- Growing

    def add_group(self, arrays, **hypers):
        """A group with float32 `arrays` (name -> array), and hyperparameters of its own."""
        self.groups.append(self.spec.check({**self.defaults, **hypers}))
        self.add(arrays, len(self.groups) - 1)

    def add(self, arrays, group):
        """Parameters in `group`, with new states or those that waited for their names."""
        values = self.groups[group]
        for name, array in arrays.items():
            last = next(reversed(self.parameters.values()), None)
            index = last.index + last.p.size if last else 0
            p = array.ravel().copy()
            made = Parameter(p, array.shape, group, index, dict(self.spec.running))
            for state in self.spec.states_for(self.spec.flags(values)):
                initial = np.full(p.shape, self.spec.initial(state, values), np.float32)
                made.kept[state] = self.codec(state).encode(initial)
            made.ema = None if self.ema_decay is None else p.copy()
            waited = self.awaited.pop(name, None)
            if waited is not None:
                made.kept, made.running, made.step = waited.kept, waited.running, waited.step
                made.ema, made.index = waited.ema, waited.index
                if self.is_split:
                    high = (p.view(np.uint32) >> 16).astype(np.uint16)
                    made.p = _formats.join(high, lower_half(waited.p))
            self.parameters[name] = made
            self.refresh(name)

    def move(self, name, array):
        """`name` goes on with another array."""
        self.parameters[name].p = array.ravel().copy()

    # --- Stepping

    def accumulate(self, grads):
        """Add gradients to the sums of the calls before."""
        for name, g in grads.items():
            if g is not None:
                self.sums[name] = self.sums.get(name, np.zeros(g.size, np.float32)) + decoded(g.ravel())
        self.n_accumulated += 1

    def step_accumulated(self, **options):
        """One step with the sums, which are gone then."""
        grads = {name: self.sums.get(name) for name in self.parameters}
        self.discard()
        return self.step(grads, **options)

    def discard(self):
        self.sums, self.n_accumulated = {}, 0

    def step(self, grads, grad_scale=1.0, max_norm=None, clip_value=None, skip_nonfinite=False):
        """One step with `grads`, an array or None for each name; whether it was applied, and the norm if asked for."""
        with np.errstate(all="ignore"):
            scaled = {n: np.float32(grad_scale) * decoded(g.ravel()) for n, g in grads.items() if g is not None}
            norm = None
            if max_norm is not None or skip_nonfinite:
                order = [scaled[name] for name in self.parameters if name in scaled]
                norm = math.sqrt(sum_squares(np.concatenate([np.zeros(0, np.float32), *order])))
            if skip_nonfinite and not math.isfinite(norm):
                return False, norm
            for name, g in scaled.items():
                if max_norm is not None:
                    g = np.float32(min(1.0, max_norm / (norm + 1e-6))) * g
                if clip_value is not None:
                    g = np.minimum(np.maximum(g, np.float32(-clip_value)), np.float32(clip_value))
                self.step_one(self.parameters[name], g)
                self.refresh(name)
        return True, norm

    def step_one(self, one, g):
        values = self.groups[one.group]
        oracle = Oracle(Config(self.spec, "", values), one.p)
        for state in oracle.kernel.states:
            oracle.arrays[state] = self.codec(state).decode(*one.kept[state])
        oracle.running, oracle.steps = one.running, one.step
        oracle.step(g)
        one.p, one.running, one.step = oracle.arrays["p"], oracle.running, oracle.steps
        for position, state in enumerate(oracle.kernel.states):
            random = _formats.Random(self.seed, one.step, one.index, position)
            one.kept[state] = self.codec(state).encode(oracle.arrays[state], random, one.kept[state][1])
        if one.ema is not None:
            decay = min(self.ema_decay, (1.0 + one.step) / (10.0 + one.step)) if self.ema_warmup else self.ema_decay
            one.ema = np.float32(decay) * one.ema + np.float32(1.0 - decay) * one.p

    def refresh(self, *names):
        """Round the parameters into their copies; all of them without `names`."""
        for name in names or self.parameters:
            one = self.parameters[name]
            if self.copy_dtype == "bfloat16":
                one.copy = as_bfloat16(one.p)
            elif self.copy_dtype == "float16":
                one.copy = as_float16(one.p)

    # --- Saving and loading

    def converted(self, state_dtype):
        """A model that loaded this one's state dict and keeps its states in another type."""
        other = self.clone()
        other.state_dtype = state_dtype
        for one in [*other.parameters.values(), *other.awaited.values()]:
            for state, kept in one.kept.items():
                if self.codec(state) is not other.codec(state):
                    one.kept[state] = other.codec(state).encode(self.codec(state).decode(*kept))
        other.refresh()
        return other

    def forgotten(self):
        """A model that loaded this one's state dict before it had seen a parameter."""
        other = self.clone()
        other.awaited |= other.parameters
        other.parameters = {}
        return other
