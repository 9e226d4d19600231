"""Hyperparameters to test every optimizer of the registry with; found from its spec, not listed by name."""

import itertools
from dataclasses import dataclass

from fastopt._formats import STATE_DTYPES
from fastopt.rules import Pair, Real, Spec, Switch, registry
from fastopt.rules.host_scalars import kernel_and_hypers

LOW_PRECISION = [state_dtype for state_dtype in STATE_DTYPES if state_dtype != "float32"]
"""What states can be kept in beside float32."""
_AWAY = {"nesterov": {"dampening": 0.0}}
"""Hyperparameters that must be at a certain value while a switch is on."""


@dataclass(frozen=True)
class Config:
    """One optimizer with hyperparameters."""

    spec: Spec
    name: str
    hypers: dict

    def __str__(self):
        return f"{self.spec.function}-{self.name}"

    def __hash__(self):
        return hash(str(self))

    @property
    def values(self):
        """Every hyperparameter, checked."""
        return self.spec.check({**{n: h.default for n, h in self.spec.hypers.items()}, **self.hypers})

    @property
    def kernel(self):
        return kernel_and_hypers(self.spec, self.values)[0]

    def make(self, params, **options):
        return self.spec.cls(params, **self.hypers, **options)


def away(kind, default):
    """A value inside the bounds of `kind` that is not the default."""
    if isinstance(kind, Pair):
        return (away(kind.first, default[0]), away(kind.second, default[1]))
    if isinstance(kind, Switch):
        return not default
    assert isinstance(kind, Real)
    value = 0.0625 + 0.53 * default if default < 1000 else 2.0
    if kind.low >= 1:
        value = 0.9 * default + 0.1 * kind.low
    assert value != default
    kind.check("test", "value", value)
    return value


def candidates(spec):
    """Defaults; everything away from its default; then every combination of switches, near and far."""
    yield Config(spec, "defaults", {})
    switches = [name for name, hyper in spec.hypers.items() if isinstance(hyper.kind, Switch)]
    far = {n: away(h.kind, h.default) for n, h in spec.hypers.items() if n not in switches}
    for on in sorted(itertools.product((True, False), repeat=len(switches)), key=sum, reverse=True):
        flags = dict(zip(switches, on, strict=True))
        forced = {k: v for name, value in flags.items() if value for k, v in _AWAY.get(name, {}).items()}
        suffix = "-".join(name for name in switches if flags[name])
        yield Config(spec, f"away-{suffix}".strip("-"), {**far, **flags, **forced})
        for single in ("weight_decay", "momentum", "l1"):
            if single in far:
                yield Config(spec, f"{single}-{suffix}".strip("-"), {single: far[single], **flags})
        yield Config(spec, f"plain-{suffix}".strip("-"), flags)


def configs(spec):
    """Defaults, everything away, everything away but the switches, and what else reaches another kernel."""
    result, kernels = [], set()
    for candidate in candidates(spec):
        try:
            kernel = candidate.kernel
        except ValueError:  # hyperparameters that exclude each other
            continue
        always = candidate.name in ("defaults", "away") or len(result) == 1
        if always or kernel not in kernels:
            result.append(candidate)
            kernels.add(kernel)
    return result


CONFIGS = [config for spec in registry.values() for config in configs(spec)]
DEFAULTS = [config for config in CONFIGS if config.name == "defaults"]
