"""The registry of optimizers, and the decorator that puts one there."""

from __future__ import annotations

from typing import TypeVar

from fastopt.rules import docstrings
from fastopt.rules.spec import Spec

registry: dict[str, Spec] = {}
"""Every optimizer of fastopt by the name of its function: ``registry["adamw"].cls is fastopt.AdamW``."""
Class = TypeVar("Class", bound=type)


def register(cls: Class) -> Class:
    """Put the optimizer `cls` into the registry, and what holds for all into its docstring (a class decorator)."""
    spec = Spec(cls)
    spec.cls.spec = spec
    spec.cls.__doc__ = docstrings.Docstring(spec)
    registry[spec.function] = spec
    return cls
