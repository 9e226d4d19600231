"""Checks of what schedules are given: numbers, lists for param groups, functions, optimizers, metrics."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from fastopt._messages import describe
from fastopt.rules import Real


class HasParamGroups(Protocol):
    """What a schedule needs of an optimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Dicts with ``"lr"``, a number, and whatever else the optimizer keeps there."""


NON_NEGATIVE = Real(0.0)
POSITIVE = Real(0.0, low_open=True)
SHARE = Real(0.0, 1.0)


def integer(owner: str, name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{owner}: {name} must be an integer, got {type(value).__name__} {value!r:.60}")
    if value < low:
        raise ValueError(f"{owner}: {name} must be >= {low}, got {value}")
    return int(value)


def integers(owner: str, name: str, values: Iterable[Any], low: int) -> list[int]:
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{owner}: {name} must be a list of integers, got {describe(values)}")
    return [integer(owner, f"{name}[{k}]", value, low) for k, value in enumerate(values)]


def one_of(owner: str, name: str, value: Any, known: tuple[str, ...]) -> Any:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{owner}: {name} must be {' or '.join(map(repr, known))}, got {value!r}")
    return value


def for_each_group(owner: str, name: str, value: Any, n: int, check: Callable[[str, str, Any], Any]) -> Any:
    """`value` checked: one for all param groups, or a list with one for each of the `n`."""
    if not isinstance(value, list | tuple):
        return check(owner, name, value)
    if len(value) != n:
        raise ValueError(f"{owner}: {name} must have one value for each of {n} param groups, got {len(value)}")
    return [check(owner, f"{name}[{k}]", item) for k, item in enumerate(value)]


def function(owner: str, name: str, value: Any) -> Any:
    if not callable(value):
        raise TypeError(f"{owner}: {name} must be a function, got {type(value).__name__} {value!r:.60}")
    return value


def measured(owner: str, name: str, value: Any) -> float:
    """`value`, a number or a scalar array or tensor that was measured in training, as a float; it may be NaN."""
    if not isinstance(value, bool) and hasattr(value, "__float__") and getattr(value, "shape", ()) == ():
        return float(value.item() if hasattr(value, "item") else value)  # a tensor that has a gradient warns at float
    raise TypeError(f"{owner}: {name} must be a real number, got {describe(value)}")


def groups_of(owner: str, optimizer: Any) -> list[dict[str, Any]]:
    """The param groups of `optimizer`, each with a learning rate."""
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, Sequence) or not all(isinstance(group, dict) for group in groups):
        raise TypeError(
            f"{owner}: optimizer must have param_groups, a list of dicts with 'lr', got {describe(optimizer)}"
        )
    for k, group in enumerate(groups):
        lr = group.get("lr")
        if isinstance(lr, bool) or not isinstance(lr, numbers.Real):
            raise TypeError(f"{owner}: param_groups[{k}]['lr'] must be a real number, got {describe(lr)}")
    return list(groups)
