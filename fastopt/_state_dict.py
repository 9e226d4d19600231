"""Loading state dicts, fastopt's and torch's: everything is checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt import _buffers
from fastopt._optimizer import _KEPT_FOR_OTHERS, _OF_TORCH, Optimizer, _Tensor


def load(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """See `Optimizer.load_state_dict`."""
    name = type(optimizer).__name__
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{name}: state_dict must be a dict, got {_buffers.describe(state_dict)}")
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise KeyError(f"{name}: state_dict must have the keys 'state' and 'param_groups', {key!r} is missing")
    ours = "optimizer" in state_dict
    if ours and state_dict["optimizer"] != name:
        raise ValueError(f"{name}: state_dict must be of {name}, got one of {state_dict['optimizer']}")
    saved_groups = state_dict["param_groups"]
    groups = optimizer.param_groups
    if len(saved_groups) != len(groups):
        raise ValueError(f"{name}: state_dict must have {len(groups)} param groups, got {len(saved_groups)}")

    hypers = [_hypers(optimizer, k, saved, ours) for k, saved in enumerate(saved_groups)]
    unbound = not optimizer._tensors
    matched: dict[int, Any] = {}
    averages: dict[int, Any] = {}
    if ours and not unbound and ("ema" in state_dict) != (optimizer.ema_decay is not None):
        has, wants = ("has", "no") if "ema" in state_dict else ("lacks", "an")
        raise ValueError(f"{name}: state_dict {has} averages, this optimizer has {wants} ema_decay")
    awaited: dict[str, Mapping[str, Any]] = {}
    for k, saved in enumerate(saved_groups):
        names = saved.get("param_names")
        if unbound:
            if names is None and saved["params"]:
                raise ValueError(f"{name}: state_dict must name its parameters: this optimizer has none yet")
            awaited |= {
                n: _entry(optimizer, state_dict, key) for n, key in zip(names or (), saved["params"], strict=True)
            }
            continue
        positions = [i for i, tensor in enumerate(optimizer._tensors) if tensor.group == k]
        if len(saved["params"]) != len(positions):
            raise ValueError(
                f"{name}: param group {k} of the state_dict must have {len(positions)} parameters, "
                f"got {len(saved['params'])}"
            )
        if names is not None and optimizer._names is not None:
            here = {optimizer._names[i]: i for i in positions}
            if set(names) != set(here):
                odd = sorted(set(names) ^ set(here))
                raise ValueError(f"{name}: param group {k} of the state_dict has other names: {odd} differ")
            positions = [here[n] for n in names]
        for position, key in zip(positions, saved["params"], strict=True):
            tensor = optimizer._tensors[position]
            entry = _entry(optimizer, state_dict, key)
            check_entry(optimizer, entry, tensor.array.shape, hypers[k], tensor.label)
            matched[position] = entry
            averages[position] = _average(optimizer, state_dict, key, tensor)

    for group, values in zip(groups, hypers, strict=True):
        group.update(values)
    for position, entry in matched.items():
        tensor = optimizer._tensors[position]
        fill(optimizer, tensor, entry)
        if tensor.ema is not None:
            tensor.ema[...] = averages[position]
        if tensor.copy is not None:
            optimizer._backend.copy_array(tensor.array, tensor.copy)
    optimizer._awaited = dict(awaited)


def _average(optimizer: Optimizer, state_dict: Mapping[str, Any], key: Any, tensor: _Tensor) -> Any:
    """The average of the parameter `key`; where the state dict is torch's, the parameter itself."""
    if "ema" not in state_dict:
        return tensor.array
    name = type(optimizer).__name__
    if key not in state_dict["ema"]:
        raise KeyError(f"{name}: state_dict has no average for parameter {key!r}")
    average = state_dict["ema"][key]
    _buffers.check_array(average, f"{name}: the average of {tensor.label}", shape=tensor.array.shape, writable=False)
    return average


def _hypers(optimizer: Optimizer, k: int, saved: Mapping[str, Any], ours: bool) -> dict[str, Any]:
    """The hyperparameters of saved group `k`, checked."""
    name = type(optimizer).__name__
    spec = optimizer.spec
    known = ("params", "param_names", *spec.hypers, *_KEPT_FOR_OTHERS)
    values = {key: value for key, value in saved.items() if key in spec.hypers}
    if not ours:
        known = (*known, *_OF_TORCH, "decoupled_weight_decay")
        decoupled = spec.cls.decoupled_weight_decay
        if "decoupled_weight_decay" not in spec.hypers and saved.get("decoupled_weight_decay", decoupled) != decoupled:
            raise ValueError(f"{name}: state_dict has decoupled_weight_decay={saved['decoupled_weight_decay']!r}")
        values = {name: _plain(value) for name, value in values.items()}
        values = {**{n: optimizer.param_groups[k][n] for n in spec.hypers}, **values}
    unknown = [key for key in saved if key not in known]
    missing = [key for key in spec.hypers if key not in values]
    if unknown or missing or "params" not in saved:
        raise KeyError(f"{name}: param group {k} of the state_dict does not fit: unknown {unknown}, missing {missing}")
    return {**spec.check(values), **{key: saved[key] for key in _KEPT_FOR_OTHERS if key in saved}}


def _plain(value: Any) -> Any:
    """A hyperparameter of torch's, which may be a tensor or hold some, as numbers."""
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value.item() if hasattr(value, "item") else value


def _entry(optimizer: Optimizer, state_dict: Mapping[str, Any], key: Any) -> Mapping[str, Any]:
    """State of the parameter `key`, in fastopt's words: step, running scalars, arrays."""
    if "optimizer" in state_dict:
        if key not in state_dict["state"]:
            raise KeyError(f"{type(optimizer).__name__}: state_dict has no state for parameter {key!r}")
        return dict(state_dict["state"][key])
    # torch: no entry before the first step, tensors, and words that fastopt computes from the step
    entry = {name: value for name, value in state_dict["state"].get(key, {}).items() if value is not None}
    converted: dict[str, Any] = {}
    for name, value in entry.items():
        value = np.asarray(value)
        if name == "step" or name in optimizer.spec.running:
            converted[name] = value.item()
        elif name not in optimizer.derived_states:
            converted[name] = value
    converted.setdefault("step", 1 if entry else 0)  # SGD counts no steps there; only the first is special
    for name, value in optimizer.spec.running.items():
        converted.setdefault(name, value)
    return converted


def check_entry(
    optimizer: Optimizer, entry: Mapping[str, Any], shape: tuple[int, ...], values: Mapping[str, Any], label: str
) -> None:
    """Raise unless `entry` is a state for a parameter of `shape` under the hyperparameters `values`."""
    name = type(optimizer).__name__
    spec = optimizer.spec
    needed = spec.states_for(spec.flags(values))
    allowed = {"step", *spec.running, *spec.states}
    missing = [key for key in ("step", *spec.running) if key not in entry]
    if entry.get("step") != 0:
        missing += [key for key in needed if key not in entry]
    unknown = [key for key in entry if key not in allowed]
    if missing or unknown:
        raise KeyError(f"{name}: state of {label} does not fit: unknown {unknown}, missing {missing}")
    step = entry["step"]
    if isinstance(step, bool) or step != int(step) or step < 0:
        raise ValueError(f"{name}: step of {label} must be an integer >= 0, got {step!r}")
    for key in spec.running:
        if not np.isfinite(entry[key]):
            raise ValueError(f"{name}: {key} of {label} must be finite, got {entry[key]!r}")
    for key in spec.states:
        if key in entry:
            _buffers.check_array(entry[key], f"{name}: state {key!r} of {label}", shape=shape, writable=False)


def fill(optimizer: Optimizer, tensor: _Tensor, entry: Mapping[str, Any]) -> None:
    """Copy the checked `entry` into `tensor`."""
    spec = optimizer.spec
    values = optimizer.param_groups[tensor.group]
    needed = spec.states_for(spec.flags(values))
    optimizer._add_missing_states(tensor, [*needed, *(name for name in spec.states if name in entry)])
    for name, array in tensor.states.items():
        array[...] = entry[name] if name in entry else spec.initial(name, values)
    tensor.step[...] = int(entry["step"])
    for k, name in enumerate(spec.running):
        tensor.running[k] = entry[name]
