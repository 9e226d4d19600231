"""How error messages speak of values, names and parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastopt._arrays.kinds import is_array


def describe(value: Any) -> str:
    """What `value` is, for an error message."""
    if is_array(value):
        return f"{value.dtype.name if value.dtype.isnative else value.dtype.str} of shape {value.shape}"
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def remedy(value: Any, keep: str = "") -> str:
    """The end of an error message about what is no NumPy array: how to make it one. `keep` says what to do with it."""
    if hasattr(value, "detach") and hasattr(value, "numpy"):
        return "; a CPU tensor's detach().numpy() shares its memory"
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return "; with their names, arrays come in a dict: dict(pairs) makes one of such pairs"
    if hasattr(value, "__array__") or isinstance(value, list | tuple | float | int):
        return f"; np.array(..., np.float32) makes one{keep}"
    return ""


def few(names: Sequence[Any]) -> str:
    """The first of `names`, for an error message."""
    return f"{list(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def parameter_label(key: Any) -> str:
    """What error messages call the parameter under `key`: a name, a position, or None where it is alone."""
    return "params" if key is None else f"params[{key!r}]"


def shown(value: Any) -> str:
    """Type and value, which is cut if it is long."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


_OTHER_WORDS = {"learning_rate": "lr", "wd": "weight_decay"}
"""What other libraries call a hyperparameter, where no spelling tells."""


def did_you_mean(name: Any, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of an error message: the word among `known` that `name` looks most like, or nothing."""
    import difflib  # not needed until somebody errs

    if not isinstance(name, str):
        return ""
    known = list(known)
    nearest = [word for word in known if word == _OTHER_WORDS.get(name)]
    nearest += difflib.get_close_matches(name, known, 1, cutoff)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
