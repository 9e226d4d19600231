"""What an optimizer is made of: hyperparameters, states, a rule, host scalars, a reference, as read from its class."""

from __future__ import annotations

import inspect
import itertools
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastopt.rules.hyperparameters import Kind, Pair, Real, Switch


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
        """Hyperparameters of the gradient stage (see `gradient_stage`) for `values`."""
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


def _kind(annotation: Any) -> Kind | None:
    for extra in getattr(annotation, "__metadata__", ()):
        if isinstance(extra, Real | Pair | Switch):
            return extra
    return None
