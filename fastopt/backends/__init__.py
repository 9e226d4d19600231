"""The backends, each a module with NAME, make_plan(optimizer) and run_once(...): cpu and reference."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

NAMES = ("cpu", "reference")


def resolve(name: str) -> ModuleType:
    """The backend called `name`; for "auto" the one that FASTOPT_BACKEND names, or "cpu".

    Raises
    ------
    ValueError
        If there is no such backend, or it is not available; the message names those that are.
    """
    asked = "backend"
    if name == "auto" and os.environ.get("FASTOPT_BACKEND"):
        asked, name = "FASTOPT_BACKEND", os.environ["FASTOPT_BACKEND"]
    if name == "auto":
        name = "cpu"
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"{asked} must be 'auto' or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return importlib.import_module(f"fastopt.backends.{name}")


def engine() -> Any:
    """The compiled engine, imported when first needed."""
    try:
        from fastopt.backends import _engine
    except ImportError as error:
        raise ImportError(
            "fastopt's compiled engine is missing: install fastopt, or build it in place with "
            "`python -m pip install -e .`"
        ) from error
    return _engine
