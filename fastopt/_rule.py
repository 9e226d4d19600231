"""What an optimizer is made of: hyperparameters with bounds, states, a rule, host scalars, a reference.

The registry of optimizers lives here too. Loops, buffers and kernels do not.
"""

from __future__ import annotations

import inspect
import itertools
import math
import numbers
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np

from fastopt import _docstrings

# The functions that a rule may call, under the names it calls them by. The generators know them by
# name; imported from here, a rule is also plain Python that runs on NumPy arrays.
sqrt = np.sqrt
sign = np.sign
fabs = np.fabs
maximum = np.maximum
minimum = np.minimum
copysign = np.copysign


def norm(x: Any) -> Any:
    """L2 norm for references, summed in float64 whatever the type of `x`: float32 squares overflow at 1e19."""
    return np.linalg.norm(x * np.float64(1))


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
            raise TypeError(f"{owner}: {name} must be a real number, got {_describe(value)}")
        try:
            result = float(value)
        except OverflowError:  # an int beyond float64
            raise ValueError(f"{owner}: {name} must be a finite float32, got {_describe(value)}") from None
        below = result <= self.low if self.low_open else result < self.low
        above = result >= self.high if self.high_open else result > self.high
        if math.isnan(result) or below or above:
            raise ValueError(f"{owner}: {name} must be {self}, got {_describe(value)}")
        if abs(result) > _LARGEST:
            raise ValueError(f"{owner}: {name} must be a finite float32, got {_describe(value)}")
        if 0 < abs(result) < _SMALLEST_NORMAL and not self.vanishing:
            raise ValueError(
                f"{owner}: {name} must be 0 or at least {_SMALLEST_NORMAL:.4g}, the smallest normal float32, "
                f"got {_describe(value)}"
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
            raise TypeError(f"{owner}: {name} must be a tuple of two real numbers, got {_describe(value)}")
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
            raise TypeError(f"{owner}: {name} must be a bool, got {_describe(value)}")
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


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


@dataclass(frozen=True)
class Hyper:
    """One hyperparameter: its kind (type and bounds), its default and how its type is written."""

    kind: Kind
    default: Any
    annotation: str


STATE_KINDS = ("signed", "unsigned", "weights")
"""Kinds of state: numbers of either sign; numbers that are never negative; and averaged parameters, of which 8 bits
would lose what an average is for."""


RULE_WORDS = (
    *("rule", "scalars", "reference", "states", "state_kinds", "optional_states", "derived_states", "running", "trust"),
    *("trust_ratio", "flags", "fixed_flags", "check_together", "decoupled_weight_decay", "spec"),
)
"""Attributes of an optimizer's class that describe its rule, and the `Spec` that they end up in."""


class Spec:
    """Everything that the engine, the generators, the tests and the documentation know of one optimizer.

    Read once from the class: hyperparameters from the signature of its ``__init__``, the rest from its
    attributes ``states``, ``running``, ``flags``, ``scalars``, ``rule`` and ``reference``.
    """

    def __init__(self, cls: Any) -> None:
        self.cls = cls
        self.name = cls.__name__
        self.function = self.name.lower()
        """Name in `fastopt.functional` and `fastopt.reference`."""
        self.rule: Callable = cls.rule
        self.scalars: Callable = cls.scalars
        self.reference: Callable = cls.reference
        defining = next(base for base in cls.__mro__ if "rule" in vars(base))
        self.rule_name = cls.__name__.lower() if cls.trust else defining.__name__.lower()
        """The kernels' name: that of the optimizer that defines the rule, or its own if it has a trust ratio."""
        self.rule_states = tuple(cls.states)
        """State arrays in the rule's arguments."""
        self.fixed_flags: Mapping[str, bool] = dict(cls.fixed_flags)
        self.states: Mapping[str, float | str] = {
            state: initial
            for state, initial in cls.states.items()
            if self.fixed_flags.get(cls.optional_states.get(state, ""), True)
        }
        """State arrays; the initial value of each, or the name of the hyperparameter that gives it."""
        self.optional_states: Mapping[str, str] = {n: f for n, f in cls.optional_states.items() if n in self.states}
        """States that only a flag of the rule needs: state -> flag."""
        self.kinds: Mapping[str, str] = {state: cls.state_kinds.get(state, "signed") for state in cls.states}
        """What each state holds, one of `STATE_KINDS`: decides how it is kept in 8 bits."""
        if unknown := set(self.kinds.values()) - set(STATE_KINDS):
            raise ValueError(f"{self.name}: state_kinds must be of {', '.join(STATE_KINDS)}, got {sorted(unknown)}")
        self.trust: str | None = cls.trust
        """What a trust ratio per tensor scales: "update", "gradient" or None."""
        self.running: Mapping[str, float] = dict(cls.running)
        """Float64 scalars that a tensor carries from step to step, with their initial values."""
        hints = typing.get_type_hints(cls.__init__, include_extras=True)
        self.hypers: Mapping[str, Hyper] = {
            name: Hyper(kind, parameter.default, str(parameter.annotation))
            for name, parameter in inspect.signature(cls.__init__).parameters.items()
            if (kind := _kind(hints.get(name))) is not None
        }
        host = [cls.scalars, *([cls.trust_ratio] if cls.trust else [])]
        self.scalar_hypers = tuple(
            dict.fromkeys(n for function in host for n in inspect.signature(function).parameters if n in self.hypers)
        )
        """Hyperparameters that `scalars` and `trust_ratio` take, in their order."""
        self.host_hypers = tuple(n for n in inspect.signature(cls.scalars).parameters if n in self.hypers)
        """Hyperparameters that `scalars` takes."""
        self.reference_hypers = tuple(n for n in inspect.signature(cls.reference).parameters if n in self.hypers)
        """Hyperparameters that `reference` takes."""
        self._together = tuple(inspect.signature(cls.check_together).parameters)
        self._flag_sources = tuple(inspect.signature(cls.flags).parameters)
        self.flag_names = tuple(
            name
            for name, parameter in inspect.signature(cls.rule).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in self.fixed_flags
        )

    def check(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the hyperparameters `values`, normalised, or raise TypeError or ValueError."""
        checked = {name: hyper.kind.check(self.name, name, values[name]) for name, hyper in self.hypers.items()}
        if self._together:
            self.cls.check_together(**{name: checked[name] for name in self._together})
        return checked

    def flags(self, values: Mapping[str, Any]) -> dict[str, bool]:
        """Flags of the rule that the hyperparameters `values` ask for."""
        derived = self.cls.flags(**{name: values[name] for name in self._flag_sources})
        return {name: bool(derived[name] if name in derived else values[name]) for name in self.flag_names}

    def states_for(self, flags: Mapping[str, bool]) -> tuple[str, ...]:
        """State arrays that the rule uses under `flags`."""
        return tuple(n for n in self.states if flags.get(self.optional_states.get(n, ""), True))

    def kernel_name(self, flags: Mapping[str, bool], regularized: bool) -> str:
        """Name of the kernel that computes the rule under `flags`, its gradient stage regularized or not."""
        on = [name for name in self.flag_names if flags[name]] + ["regularized"] * regularized
        return "_".join([self.rule_name, *on])

    def needed_when(self, state: str) -> str:
        """In words, the hyperparameter that makes the rule use an optional state."""
        flag = self.optional_states[state]
        return f"{flag}=True" if flag in self.hypers else f"{flag.removeprefix('with_')} != 0"

    def flag_choices(self) -> list[dict[str, bool]]:
        """Every combination of the rule's flags, all off first."""
        choices = itertools.product((False, True), repeat=len(self.flag_names))
        return [dict(zip(self.flag_names, choice, strict=True)) for choice in choices]

    def stage_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Hyperparameters of the gradient stage (see `fastopt._stages`) for `values`."""
        decoupled = values.get("decoupled_weight_decay", self.cls.decoupled_weight_decay)
        return {
            "lr": values["lr"],
            "weight_decay": values.get("weight_decay", 0.0),
            "decoupled": bool(decoupled) and self.trust != "update",
            "inside": self.trust == "update",
            "l1": values.get("l1", 0.0),
            "maximize": values.get("maximize", False),
        }

    def reference_stage_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The same without what the optimizer's own reference takes care of."""
        stage = self.stage_values(values)
        return stage | {name: 0.0 for name in ("weight_decay", "l1") if name in self.reference_hypers}

    def initial(self, state: str, values: Mapping[str, Any]) -> float:
        """Initial value of every element of `state` under the hyperparameters `values`."""
        value = self.states[state]
        return float(values[value] if isinstance(value, str) else value)


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


def _kind(annotation: Any) -> Kind | None:
    for extra in getattr(annotation, "__metadata__", ()):
        if isinstance(extra, Real | Pair | Switch):
            return extra
    return None


registry: dict[str, Spec] = {}
"""Every optimizer of fastopt by the name of its function: ``registry["adamw"].cls is fastopt.AdamW``."""


Class = TypeVar("Class", bound=type)


def register(cls: Class) -> Class:
    """Put the optimizer `cls` into the registry, and what holds for all into its docstring (a class decorator)."""
    spec = Spec(cls)
    spec.cls.spec = spec
    spec.cls.__doc__ = _docstrings.Docstring(spec)
    registry[spec.function] = spec
    return cls
