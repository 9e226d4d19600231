"""How far a step is from the exact one, in units in the last place (ULP) of the largest term that was added.

A sum of floats cannot be better than the last place of its largest term: ``1.0 - 0.9999999`` is exact to 1e-7
of the 1.0, not of the difference. So the unit of an error is not the ULP of the result but that of the largest
number that was added on the way to it. `trace` finds that number for every element of every result: it runs an
optimizer's float64 reference on `Term`s, numbers that carry their *scale*, the magnitude whose last place is
the unit. An input's scale is its own magnitude; from there

==================  ==========================================  ===============================================
result              its scale                                   because
==================  ==========================================  ===============================================
a + b, a - b        max(scale a, scale b, abs(result))          errors of the terms stay as large as they were
a * b               max(scale a * abs(b), abs(a) * scale b)     an error of one factor grows with the other
a / b               max(scale a, abs(result) * scale b) / b     likewise
sqrt(a)             scale a / sqrt(a)                           the derivative of the root, to a factor of 2
maximum(a, b)       of the larger; of both near a tie           the other one has no influence
sign(a)             1                                           it has no error, unless a might be 0
==================  ==========================================  ===============================================

Without cancellation a scale is the result's own magnitude, to a small factor, and the unit its plain ULP. Where
no digit is known, at the root or the sign of terms that cancel to nothing, the scale is infinite, and
`assert_close` refuses the data instead of accepting every result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt.rules import gradient_stage, registry


def float64_ulps(function: str) -> float:
    """ULP at most between one float64 step of the reference of `function` and a golden one.

    Both round, in another order of operations; the largest distance in all golden vectors is 3, and 4 with a trust
    ratio: the order in which its norms are summed is up to the BLAS, hence another 2. 1 ULP is 2.2e-16 of the
    largest term.
    """
    return 6 if registry[function].trust else 4


def float32_ulps(function: str) -> float:
    """ULP at most between one compiled step of `function` and the exact one.

    Over eight steps of 100,000 random elements, in every configuration of `configs` and of the golden vectors
    and with both penalties at once, the largest distance was 5.6 ULP (LAMB 5.3, LARS 3.8, whose norms are summed
    in float64). The golden vectors alone reach 3.9.
    Adadelta squares its whole update, at the end of the longest chain of all: 9.2 in `acc_delta`, 5.1 elsewhere.
    """
    return 10 if function == "adadelta" else 6


_BLUR = 2.0**-18
"""Terms that cancel to less than this fraction of their scale have an unknown sign in float32."""


class Term(np.lib.mixins.NDArrayOperatorsMixin):
    """An array of float64 values, each with the magnitude whose last place is the unit of its error."""

    __array_priority__ = 1

    def __init__(self, value: Any, scale: Any = None) -> None:
        self.value = np.asarray(value, np.float64)
        self.scale = np.abs(self.value) if scale is None else np.asarray(scale, np.float64)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__" or kwargs or ufunc not in _RULES:
            raise TypeError(f"Term has no rule for numpy.{ufunc.__name__}.{method}; add one to tests/support/ulp.py")
        with np.errstate(all="ignore"):
            return _RULES[ufunc](*map(_term, inputs))

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if kwargs or function not in _RULES:
            raise TypeError(f"Term has no rule for numpy.{function.__name__}; add one to tests/support/ulp.py")
        return _RULES[function](*args)

    def __setitem__(self, mask: np.ndarray, value: float) -> None:
        self.value[mask] = value
        self.scale[mask] = abs(value)


def _term(value: Any) -> Term:
    return value if isinstance(value, Term) else Term(value)


def _sum(ufunc: np.ufunc) -> Any:
    def rule(a: Term, b: Term) -> Term:
        value = ufunc(a.value, b.value)
        return Term(value, np.maximum(np.maximum(a.scale, b.scale), np.abs(value)))

    return rule


def _multiply(a: Term, b: Term) -> Term:
    return Term(a.value * b.value, np.maximum(a.scale * np.abs(b.value), np.abs(a.value) * b.scale))


def _divide(a: Term, b: Term) -> Term:
    value = a.value / b.value
    return Term(value, np.maximum(a.scale, np.abs(value) * b.scale) / np.abs(b.value))


def _sqrt(a: Term) -> Term:
    root = np.sqrt(a.value)
    return Term(root, np.where(a.scale == 0, 0, a.scale / root))


def _sign(a: Term) -> Term:
    sign = np.sign(a.value)
    unknown = (np.abs(a.value) <= _BLUR * a.scale) & (a.scale != 0)
    return Term(sign, np.where(unknown, np.inf, np.abs(sign)))


def _larger(ufunc: np.ufunc) -> Any:
    def rule(a: Term, b: Term) -> Term:
        tie = np.abs(a.value - b.value) <= _BLUR * np.maximum(a.scale, b.scale)
        value = ufunc(a.value, b.value)
        chosen = np.where(value == a.value, a.scale, b.scale)
        return Term(value, np.where(tie, np.maximum(a.scale, b.scale), chosen))

    return rule


def _compare(ufunc: np.ufunc) -> Any:
    return lambda a, b: ufunc(a.value, b.value)


def _where(condition: np.ndarray, a: Any, b: Any) -> Term:
    a, b = _term(a), _term(b)
    return Term(np.where(condition, a.value, b.value), np.where(condition, a.scale, b.scale))


_RULES = {
    np.add: _sum(np.add),
    np.subtract: _sum(np.subtract),
    np.multiply: _multiply,
    np.divide: _divide,
    np.square: lambda a: _multiply(a, a),
    np.sqrt: _sqrt,
    np.negative: lambda a: Term(-a.value, a.scale),
    np.absolute: lambda a: Term(np.abs(a.value), a.scale),
    np.sign: _sign,
    np.maximum: _larger(np.maximum),
    np.minimum: _larger(np.minimum),
    np.less: _compare(np.less),
    np.equal: _compare(np.equal),
    np.not_equal: _compare(np.not_equal),
    np.greater: _compare(np.greater),
    np.where: _where,
    np.clip: lambda a, low, high: np.minimum(np.maximum(a, low), high),
    np.ones_like: lambda a: Term(np.ones_like(a.value)),
    np.linalg.norm: lambda a: Term(np.linalg.norm(a.value), np.linalg.norm(a.scale)),
}


def trace(function: str, arrays: Mapping[str, Any], step: int, hypers: Mapping[str, Any]) -> dict[str, Any]:
    """One step of the reference of `function` in float64, from the values of `arrays`, which stay as they are.

    Parameters
    ----------
    function
        The optimizer's name in `fastopt.functional`.
    arrays
        ``p``, ``g``, the states and running scalars by their names: arrays, or `Term`s of an earlier step.
    step, hypers
        As for the function; hyperparameters that are missing have their defaults.

    Returns
    -------
    dict
        ``p`` and every state as `Term`s, and every running scalar, after the step.
    """
    spec = registry[function]
    values = spec.check({**{name: hyper.default for name, hyper in spec.hypers.items()}, **hypers})
    terms = {name: _term(arrays[name]) for name in ("p", "g", *spec.states) if arrays.get(name) is not None}
    running = [float(np.asarray(arrays[name]).item()) for name in spec.running]
    with np.errstate(all="ignore"):
        p, g = gradient_stage.reference(terms["p"], terms["g"], **spec.reference_stage_values(values))
        states = [terms.get(name) for name in spec.states]
        own = {name: values[name] for name in spec.reference_hypers}
        new = spec.reference(p, g, *states, *running, step=step, **own)
    results = dict(zip(("p", *spec.states, *spec.running), new, strict=True))
    return {name: value for name, value in results.items() if name in terms or name in spec.running}


def unit(scale: np.ndarray, dtype: Any) -> np.ndarray:
    """The last place of `dtype` at the magnitude `scale`; at least that of the smallest normal number."""
    finfo = np.finfo(dtype)
    _, exponent = np.frexp(np.maximum(scale, float(finfo.tiny)))
    return np.ldexp(1.0, exponent - 1 - finfo.nmant)


def ulps(actual: np.ndarray, expected: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Distance of `actual` from the float64 `expected`, in units of `actual`'s dtype at `scale`.

    Zero where both are NaN or the same infinity; infinite where only one is, and where `scale` is not finite.
    """
    with np.errstate(all="ignore"):
        error = np.abs(actual.astype(np.float64) - expected) / unit(scale, actual.dtype)
    error = np.where(np.isfinite(error) & np.isfinite(scale), error, np.inf)
    both = (np.isnan(actual) & np.isnan(expected)) | (np.isinf(expected) & (actual == expected))
    return np.where(both, 0.0, error)


def assert_close(
    bound: float,
    actual: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    terms: Mapping[str, Any],
    where: str,
) -> None:
    """Raise AssertionError unless every array of `expected` is matched to `bound` ULP; `terms` are from `trace`.

    Running scalars are Python floats there and float64 here: they are matched to `bound` ULP of float64.
    """
    complaints = []
    for name, right in expected.items():
        got = np.atleast_1d(np.asarray(actual[name]))
        right = np.atleast_1d(np.asarray(right, np.float64))
        assert got.shape == right.shape, f"{where}: {name} has shape {got.shape}, expected {right.shape}"
        scale = np.broadcast_to(_term(terms[name]).scale, right.shape)
        error = ulps(got, right, scale)
        if (error <= bound).all():
            continue
        worst = np.unravel_index(np.argmax(error), error.shape)
        known = "" if np.isfinite(scale[worst]) else " (nothing is known there: the test needs other data)"
        complaints.append(
            f"{where}, {got.dtype}: {name} is {error[worst]:.2f} ULP off, at most {bound:g} are allowed; "
            f"{(error > bound).sum()} of {error.size} elements are beyond that{known}\n"
            f"  worst element {worst if len(worst) > 1 else int(worst[0])}: got {got[worst]!r}, expected "
            f"{float(right[worst])!r}, largest term {scale[worst]:.9g}, ULP there "
            f"{unit(scale[worst], got.dtype):.3g}"
        )
    assert not complaints, "\n".join(complaints)
