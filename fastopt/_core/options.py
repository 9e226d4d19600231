"""The options of an optimizer and of a step: names, defaults, checks; and what a step returns."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypedDict

from fastopt import _formats
from fastopt._messages import did_you_mean
from fastopt.rules.hyperparameters import Real, Switch
from fastopt.rules.spec import Spec

if TYPE_CHECKING:
    from typing_extensions import Unpack
elif sys.version_info >= (3, 11):
    from typing import Unpack
else:  # only read by type checkers

    class Unpack:
        """Stands in for typing.Unpack."""

        def __class_getitem__(cls, options):
            return options


Backend: TypeAlias = Literal["auto", "cpu", "cuda", "reference"]


class Options(TypedDict, total=False):
    """What every optimizer takes beside its hyperparameters; see `Optimizer`."""

    n_threads: int | None
    backend: Backend
    ema_decay: float | None
    ema_warmup: bool
    copy_dtype: Literal["bfloat16", "float16"] | None
    grad_dtype: Literal["bfloat16"] | None
    state_dtype: Literal["float32", "bfloat16", "8bit"]
    seed: int
    master: Literal["split"] | None


class StepOptions(TypedDict, total=False):
    """What every step takes beside the gradients; see `Optimizer.step`."""

    grad_scale: float
    max_norm: float | None
    clip_value: float | None
    skip_nonfinite: bool
    zero_grads: bool
    stream: Any


class StepInfo(NamedTuple):
    """What became of a step."""

    applied: bool
    """False if `skip_nonfinite` found an inf or NaN: nothing was changed then."""
    grad_norm: float | None
    """Global L2 norm of the scaled gradients before clipping; None where nothing asked for it."""


OPTIONS: dict[str, Any] = {
    "n_threads": None,
    "backend": "auto",
    "ema_decay": None,
    "ema_warmup": False,
    "copy_dtype": None,
    "grad_dtype": None,
    "state_dtype": "float32",
    "seed": 0,
    "master": None,
}
"""The options and their defaults."""
STEP_OPTIONS = tuple(StepOptions.__annotations__)
APPLIED = StepInfo(True, None)
UNSCALED = 1.0
"""The default grad_scale, told from others by identity: the comparison costs a tenth of a small step."""
_NON_NEGATIVE = Real(0.0)


class _Accumulated:
    """In the place of gradients: the sums of those that were accumulated."""

    def __repr__(self) -> str:
        return "<accumulated>"


ACCUMULATED: Any = _Accumulated()


def check_options(owner: str, spec: Spec, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option, checked, but for what only a backend or an array can tell; those not `given` have their default."""
    unknown = [name for name in given if name not in OPTIONS]
    if unknown:
        words = ("params", *spec.hypers, *OPTIONS)
        hints = [
            f"; {name} is an option of step()" if name in STEP_OPTIONS else did_you_mean(name, words)
            for name in unknown
        ]
        raise TypeError(
            f"{owner}: unknown arguments {unknown}{''.join(hints)}; the hyperparameters are "
            f"{', '.join(spec.hypers)}; the options are {', '.join(OPTIONS)}"
        )
    options = {**OPTIONS, **given}
    options["ema_decay"] = optional(owner, "ema_decay", Real(0.0, 1.0), options["ema_decay"])
    options["ema_warmup"] = Switch().check(owner, "ema_warmup", options["ema_warmup"])
    if options["ema_warmup"] and options["ema_decay"] is None:
        raise ValueError(f"{owner}: ema_warmup=True needs ema_decay, got None")
    for name, known in (("copy_dtype", ("bfloat16", "float16")), ("grad_dtype", ("bfloat16",)), ("master", ("split",))):
        options[name] = one_of(owner, name, known, options[name])
    state_dtype = options["state_dtype"]
    if not isinstance(state_dtype, str) or state_dtype not in _formats.STATE_DTYPES:
        dtypes = " or ".join(map(repr, _formats.STATE_DTYPES))
        raise ValueError(f"{owner}: state_dtype must be {dtypes}, got {state_dtype!r}")
    options["seed"] = check_seed(owner, options["seed"])
    return options


def check_seed(owner: str, seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= int(seed) < 2**64:
        raise ValueError(f"{owner}: seed must be an integer in [0, 2**64), got {seed!r}")
    return int(seed)


def optional(owner: str, name: str, kind: Real, value: Any) -> float | None:
    return None if value is None else kind.check(owner, name, value)


def one_of(owner: str, name: str, known: tuple[str, ...], value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or value not in known):
        raise ValueError(f"{owner}: {name} must be None or {' or '.join(map(repr, known))}, got {value!r}")
    return value


def check_step_options(
    owner: str, grad_scale: Any, max_norm: Any, clip_value: Any, skip_nonfinite: Any, zero_grads: Any
) -> tuple[float, float | None, float | None, bool, bool]:
    if isinstance(max_norm, numbers.Real) and max_norm == math.inf:
        max_norm = math.inf
    else:
        max_norm = optional(owner, "max_norm", _NON_NEGATIVE, max_norm)
    return (
        Real().check(owner, "grad_scale", grad_scale),
        max_norm,
        optional(owner, "clip_value", _NON_NEGATIVE, clip_value),
        Switch().check(owner, "skip_nonfinite", skip_nonfinite),
        Switch().check(owner, "zero_grads", zero_grads),
    )


def step_options(
    owner: str,
    *,
    grad_scale: float = UNSCALED,
    max_norm: float | None = None,
    clip_value: float | None = None,
    skip_nonfinite: bool = False,
    zero_grads: bool = False,
    stream: Any = None,
) -> tuple[tuple[float, float | None, float | None, bool, bool], Any]:
    """The options of a step, checked, and its stream."""
    return check_step_options(owner, grad_scale, max_norm, clip_value, skip_nonfinite, zero_grads), stream
