"""The rule evaluated with NumPy float32, one operation at a time: what every kernel must equal to the bit.

Also the flushing variant, which treats subnormals as zero, as the kernels do; and exact comparison.
"""

import functools
import inspect

import numpy as np

from fastopt import _codegen
from fastopt.rules import Spec, gradient_stage

TINY = np.finfo(np.float32).tiny


@functools.cache
def _function(spec: Spec, kernel: str):
    """The evaluated kernel, and its description."""
    chosen = next(k for k in _codegen.kernels(spec) if k.name == kernel)
    namespace = {name: globals()[f"_{name}"] for name in (*_codegen.FUNCTIONS, "where")}
    exec(compile(_codegen.numpy_source(chosen), f"<rule {kernel}>", "exec"), namespace)
    return namespace[kernel], chosen


class Flushing:
    """Float32 whose operations read subnormals as zero and flush tiny results to zero."""

    def __init__(self, values):
        values = np.asarray(values, np.float32)
        self.values = np.where(np.abs(values) < TINY, np.copysign(np.float32(0), values), values)

    @staticmethod
    def of(exact):
        """Round a float64 result; what is tiny after rounding to 24 bits, however small, becomes zero."""
        rounded = exact.astype(np.float32)
        tiny = np.abs((exact * 2.0**64).astype(np.float32)) < np.float32(TINY * 2.0**64)
        return Flushing(np.where(tiny, np.copysign(np.float32(0), rounded), rounded))

    def _with(self, other, operation):
        a, b = self.values.astype(np.float64), Flushing.plain(other).astype(np.float64)
        result = Flushing.of(operation(a, b))
        single = operation(self.values, Flushing.plain(other))
        normal = ~(np.abs(single) < 2 * TINY)
        return Flushing(np.where(normal, single, result.values))

    @staticmethod
    def plain(value):
        return value.values if isinstance(value, Flushing) else np.float32(value)

    def __add__(self, other):
        return self._with(other, np.add)

    def __sub__(self, other):
        return self._with(other, np.subtract)

    def __mul__(self, other):
        return self._with(other, np.multiply)

    def __truediv__(self, other):
        return self._with(other, np.divide)

    def __neg__(self):
        return Flushing(-self.values)

    def __gt__(self, other):
        return self.values > Flushing.plain(other)

    def __lt__(self, other):
        return self.values < Flushing.plain(other)

    def __ge__(self, other):
        return self.values >= Flushing.plain(other)

    def __le__(self, other):
        return self.values <= Flushing.plain(other)


def _lifted(function):
    """`function` on NumPy arrays or on `Flushing` ones."""

    def call(*arguments):
        result = function(*(Flushing.plain(a) if isinstance(a, Flushing) else a for a in arguments))
        return Flushing(result) if any(isinstance(a, Flushing) for a in arguments) else result

    return call


_sqrt, _sign, _fabs, _maximum, _minimum, _copysign, _where = (
    _lifted(getattr(np, name)) for name in ("sqrt", "sign", "fabs", "maximum", "minimum", "copysign", "where")
)


def at_most_largest(x):
    """Round to float32, an overflow to the largest."""
    return np.float32(min(x, float(np.finfo(np.float32).max))) if x == x else np.float32(x)


LANES, BLOCK = 32, 16384


def sum_of_lanes(numbers):
    """Number i goes to lane i % LANES, in order; lanes are added up as a tree."""
    rows = np.zeros((-(-len(numbers) // LANES), LANES))
    rows.ravel()[: len(numbers)] = numbers
    lanes = np.zeros(LANES)
    for row in rows:
        lanes = lanes + row
    while lanes.size > 1:
        half = lanes.size // 2
        lanes = lanes[:half] + lanes[half:]
    return float(lanes[0])


def sum_squares(x):
    """Sum of squares in the documented order: elements within blocks, then blocks."""
    with np.errstate(all="ignore"):
        squares = np.square(x.astype(np.float64))
        return sum_of_lanes([sum_of_lanes(squares[start : start + BLOCK]) for start in range(0, x.size, BLOCK)])


class Oracle:
    """Steps a set of flat arrays as the kernels must.

    Parameters
    ----------
    config
        Optimizer and hyperparameters.
    p
        Flat float32 parameters; copied.
    flushing
        Treat subnormals as zero.
    """

    def __init__(self, config, p, flushing=False):
        self.spec, self.values, self.flushing = config.spec, config.values, flushing
        self.function, self.kernel = _function(self.spec, config.kernel)
        self.arrays = {"p": p.copy()}
        for state in self.kernel.states:
            self.arrays[state] = np.full(p.shape, self.spec.initial(state, self.values), np.float32)
        self.running = dict(self.spec.running)
        self.steps = 0

    def scalars(self):
        """Host scalars of the next step in Python's float64, rounded once; the running ones are advanced."""
        stage = gradient_stage.scalars(**self.spec.stage_values(self.values))
        hypers = self.hypers_of(self.spec.scalars)
        if self.spec.trust == "update":
            hypers["lr"] = 1.0
        own = self.spec.scalars(step=self.steps + 1, **self.running, **hypers)
        self.running = {name: own[name] for name in self.running}
        return {name: np.float32(value) for name, value in {**stage, **own}.items()}

    def hypers_of(self, function):
        """The hyperparameters that a host function of the optimizer takes."""
        return {n: self.values[n] for n in inspect.signature(function).parameters if n in self.values}

    def trust(self, other):
        """The trust ratio from the parameters' norm and that of `other`, in Python's float64."""
        norms = {"p_norm": self.norm(self.arrays["p"]), f"{self.spec.trust}_norm": self.norm(other)}
        with np.errstate(all="ignore"):
            return np.float64(self.spec.cls.trust_ratio(**norms, **self.hypers_of(self.spec.cls.trust_ratio)))

    def norm(self, x):
        return np.sqrt(np.float64(sum_squares(Flushing(x).values if self.flushing else x)))

    def step(self, g):
        scalars = self.scalars()
        self.steps += 1
        wrap = Flushing if self.flushing else np.asarray
        if self.spec.trust == "gradient":
            scalars["trust"] = at_most_largest(self.trust(g))
        with np.errstate(all="ignore"):
            streams = [wrap(self.arrays[name] if name != "g" else g) for name in self.kernel.loaded]
            results = self.function(*streams, *(wrap(scalars[n]) for n in self.kernel.used_scalars))
        for name, result in zip(self.kernel.stored, results, strict=True):
            self.arrays[name] = np.asarray(Flushing.plain(result) if self.flushing else result, np.float32)
            assert self.arrays[name].dtype == np.float32
        if self.spec.trust == "update":
            update = self.arrays.pop("update")
            size = at_most_largest(self.values["lr"] * self.trust(update))
            with np.errstate(all="ignore"):
                p = wrap(self.arrays["p"]) - wrap(size) * wrap(update)
            self.arrays["p"] = np.asarray(Flushing.plain(p) if self.flushing else p, np.float32)


def assert_same_bits(actual, expected, what):
    """Every element has the bits of `expected`; NaN may be any NaN."""
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    same = actual.view(np.int32) == expected.view(np.int32)
    same |= np.isnan(actual) & np.isnan(expected)
    if not same.all():
        k = np.flatnonzero(~same.ravel())
        raise AssertionError(
            f"{what}: {k.size} of {same.size} elements differ, first at {k[0]}: "
            f"{actual.ravel()[k[0]]!r} is not {expected.ravel()[k[0]]!r}"
        )
