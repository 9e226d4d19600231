"""The backends, each a module with NAME, make_plan(optimizer), run_once(...) and `arrays`, where its arrays live."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from fastopt._arrays.kinds import lives_on_gpu

NAMES = ("cpu", "cuda", "reference")


def resolve(name: str, params: Any = None) -> ModuleType:
    """The backend called `name`; for "auto" "cuda" if `params` live on a GPU, else FASTOPT_BACKEND's, or "cpu".

    Raises
    ------
    ValueError
        If there is no such backend; the message names those that there are.
    ImportError
        If packages that it needs are missing.
    """
    if name == "auto" and lives_on_gpu(_first(params)):
        name = "cuda"
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


def _first(params: Any) -> Any:
    """The first array in a structure of parameters, or what stands there instead."""
    while isinstance(params, Mapping | list | tuple) and len(params):
        if isinstance(params, Mapping):
            params = params["params"] if "params" in params else next(iter(params.values()))
        else:
            params = params[0]
    return params
