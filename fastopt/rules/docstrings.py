"""Docstrings of optimizers: what their own file says, with what holds for every optimizer filled in at registration.

A class explains its formula and, in a section Parameters, the hyperparameters whose meaning is its own. Types, bounds
and defaults come from its signature, the meaning of the other hyperparameters from here, options from `Optimizer`.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastopt.rules.spec import Spec

WIDTH = 76
"""Columns: a terminal has 80, and `help` puts four before every line."""
SHARED = {
    "lr": "Learning rate.",
    "weight_decay": "L2 penalty: ``weight_decay * p`` is added to the gradient.",
    "decoupled_weight_decay": "Let a step first subtract ``lr * weight_decay * p`` from the parameter, and leave the "
    "gradient alone.",
    "maximize": "Go up the gradient instead of down.",
    "l1": "L1 penalty: ``l1 * sign(p)`` is added to the gradient.",
}
"""Meaning of hyperparameters that is the same for every optimizer which does not say otherwise."""
DECOUPLED = "Decay of the parameter: a step first subtracts ``lr * weight_decay * p``. The gradient is left alone."
"""Meaning of `weight_decay` where it is always decoupled."""

Entry = tuple[str, str]
"""Of a list such as Parameters: the line that names something, and what is said of it."""


class Docstring:
    """The docstring of an optimizer's class, put together when somebody reads it: at import it would take too long."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.own = vars(spec.cls).get("__doc__")
        """What the class itself says."""

    def __get__(self, _: Any, owner: type) -> str | None:
        return filled(self.spec)


@functools.cache
def sections(cls: type) -> dict[str, str]:
    """What a class itself says, by the titles of the sections; what stands before the first of them under ""."""
    docstring = vars(cls).get("__doc__")
    text = inspect.cleandoc((docstring.own if isinstance(docstring, Docstring) else docstring) or "")
    before, *parts = re.split(r"^([A-Z][A-Za-z ]+)\n-+\n", text, flags=re.MULTILINE)
    titled = zip(parts[::2], parts[1::2], strict=True)
    return {"": before.strip("\n"), **{title: body.strip("\n") for title, body in titled}}


def summary(cls: type) -> str:
    """The first paragraph, on one line."""
    return " ".join(sections(cls)[""].partition("\n\n")[0].split())


def entries(section: str) -> list[Entry]:
    """What a section that is a list holds."""
    found = []
    for entry in re.split(r"\n(?=\S)", section) if section else ():
        head, _, body = entry.partition("\n")
        found.append((head, " ".join(body.split())))
    return found


@functools.cache
def parameters(cls: type) -> dict[str, Entry]:
    """The parameters that a class itself explains, by their names."""
    section = sections(cls).get("Parameters", "")
    return {head.partition(" : ")[0]: (head, body) for head, body in entries(section)}


def hyperparameters(spec: Spec) -> list[Entry]:
    """Every hyperparameter of an optimizer: in its own words, in shared ones, or in those of the class it extends."""
    inherited: dict[str, Entry] = {}
    for base in reversed(spec.cls.__mro__[1:]):
        inherited |= parameters(base)
    own = parameters(spec.cls)
    shared = SHARED | ({"weight_decay": DECOUPLED} if spec.cls.decoupled_weight_decay else {})
    found = []
    for name, hyper in spec.hypers.items():
        said = own[name][1] if name in own else shared.get(name) or inherited.get(name, ("", ""))[1]
        found.append((f"{name} : {hyper.kind.described()}, default {hyper.default!r}", said))
    return found


def filled(spec: Spec) -> str | None:
    """The whole docstring of an optimizer, or None where Python keeps none."""
    explained = next((base for base in spec.cls.__mro__ if "params" in parameters(base)), None)
    if explained is None:
        return None
    own = sections(spec.cls)
    params, *options = parameters(explained).values()
    parts = {
        "Parameters": listed([params, *hyperparameters(spec), *options]),
        "Attributes": listed([("state", _state(spec))]),
        "Raises": listed(entries(sections(explained)["Raises"])),
        "See Also": listed(entries(own.get("See Also", ""))),
        "Notes": prose(own.get("Notes", "")),
        "References": prose(own.get("References", "")),
        "Examples": own.get("Examples") or _example(spec),
    }
    titled = [f"{title}\n{'-' * len(title)}\n{text}" for title, text in parts.items() if text]
    return "\n\n".join([prose(own[""] or f"{spec.name}."), *titled]) + "\n"


def _state(spec: Spec) -> str:
    kept = ['``"step"``, int64 of shape ()']
    for name, first in spec.states.items():
        initial = f"`{first}`" if isinstance(first, str) else f"{first:g}"
        needed = f", with ``{spec.needed_when(name)}`` alone" if name in spec.optional_states else ""
        kept.append(f'``"{name}"``, {initial} before the first step{needed}')
    kept += [f'``"{name}"``, float64 of shape (), {first:g} at first' for name, first in spec.running.items()]
    return f"For each parameter, arrays of its shape that can be written: {'; '.join(kept)}."


def _example(spec: Spec) -> str:
    return f""">>> import numpy as np, fastopt
>>> p = np.ones(3, np.float32)
>>> opt = fastopt.{spec.name}([p], lr={spec.hypers["lr"].default!r})
>>> opt.step([np.array([1, 0, -1], np.float32)])
StepInfo(applied=True, grad_norm=None)
>>> int(opt.state[0]["step"])
1"""


def listed(items: Iterable[Entry]) -> str:
    """The text of a section that is a list."""
    return "\n".join(
        _wrapped(head, later="    ") + ("\n" + _wrapped(body, "    ", "    ") if body else "") for head, body in items
    )


def prose(text: str) -> str:
    """The paragraphs of a text in lines of `WIDTH`; formulas, which are indented, stay as they are."""
    return "\n\n".join(part if part[:1] == " " else _wrapped(part) for part in text.split("\n\n"))


def _wrapped(text: str, first: str = "", later: str = "") -> str:
    """One paragraph, whose `first` and `later` lines are indented by so much."""
    text = first + " ".join(text.split())
    return text if len(text) <= WIDTH else textwrap.fill(text, WIDTH, subsequent_indent=later)
