"""Kinds of hyperparameters: type, bounds, the check of a value, and the annotations that name them."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from fastopt import _messages

_FLOAT32 = np.finfo(np.float32)
_LARGEST = float(_FLOAT32.max)
_SMALLEST_NORMAL = float(_FLOAT32.tiny)


@dataclass(frozen=True)
class Real:
    """A real hyperparameter: a finite float32 between two bounds."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    vanishing: bool = False
    """Whether it may be below the smallest normal float32, and then counts as zero; else that is an error."""

    slots = 1

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.low_open else '>='} {self.low:g}"
        return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}{')' if self.high_open else ']'}"

    def check(self, owner: str, name: str, value: Any) -> float:
        """Return `value` as a float, or raise TypeError or ValueError."""
        if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
            raise TypeError(f"{owner}: {name} must be a real number, got {_messages.shown(value)}")
        try:
            result = float(value)
        except OverflowError:  # an int beyond float64
            raise ValueError(f"{owner}: {name} must be a finite float32, got {_messages.shown(value)}") from None
        below = result <= self.low if self.low_open else result < self.low
        above = result >= self.high if self.high_open else result > self.high
        if math.isnan(result) or below or above:
            raise ValueError(f"{owner}: {name} must be {self}, got {_messages.shown(value)}")
        if abs(result) > _LARGEST:
            raise ValueError(f"{owner}: {name} must be a finite float32, got {_messages.shown(value)}")
        if 0 < abs(result) < _SMALLEST_NORMAL and not self.vanishing:
            raise ValueError(
                f"{owner}: {name} must be 0 or at least {_SMALLEST_NORMAL:.4g}, the smallest normal float32, "
                f"got {_messages.shown(value)}"
            )
        return result

    def described(self) -> str:
        """Type and bounds, for a docstring."""
        return "float" if self == Real() else f"float {self}"

    def flatten(self, value: float) -> tuple[float, ...]:
        return (value,)


@dataclass(frozen=True)
class Pair:
    """Two reals, as `betas`."""

    first: Real
    second: Real

    slots = 2

    def __str__(self) -> str:
        return f"both {self.first}" if self.first == self.second else f"{self.first}, {self.second}"

    def check(self, owner: str, name: str, value: Any) -> tuple[float, float]:
        """Return `value` as a tuple of two floats, or raise TypeError or ValueError."""
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise TypeError(f"{owner}: {name} must be a tuple of two real numbers, got {_messages.shown(value)}")
        return (
            self.first.check(owner, f"{name}[0]", value[0]),
            self.second.check(owner, f"{name}[1]", value[1]),
        )

    def described(self) -> str:
        """Type and bounds, for a docstring."""
        same = self.first == self.second
        return f"(float, float), {self}" if same else f"({self.first.described()}, {self.second.described()})"

    def flatten(self, value: tuple[float, float]) -> tuple[float, ...]:
        return value


@dataclass(frozen=True)
class Switch:
    """A boolean hyperparameter."""

    slots = 1

    def __str__(self) -> str:
        return "True or False"

    def check(self, owner: str, name: str, value: Any) -> bool:
        """Return `value` as a bool, or raise TypeError."""
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{owner}: {name} must be a bool, got {_messages.shown(value)}")
        return bool(value)

    def described(self) -> str:
        """Type, for a docstring."""
        return "bool"

    def flatten(self, value: bool) -> tuple[float, ...]:
        return (float(value),)


Kind = Real | Pair | Switch
_FRACTION = Real(0.0, 1.0, high_open=True)
AnyReal = Annotated[float, Real()]
NonNegative = Annotated[float, Real(0.0)]
LearningRate = Annotated[float, Real(0.0, vanishing=True)]
"""Schedules let it decay for as long as they are stepped."""
Fraction = Annotated[float, Real(0.0, 1.0)]
Betas = Annotated[tuple[float, float], Pair(_FRACTION, _FRACTION)]
Flag = Annotated[bool, Switch()]
