"""State dicts, fastopt's and torch's: saving, and loading, which checks everything before anything is changed."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt import _formats, backends
from fastopt._arrays.checks import check_array
from fastopt._arrays.kinds import is_array
from fastopt._core import planning, refusals, tensors
from fastopt._core.groups import KEPT_FOR_OTHERS, OF_TORCH, check_grouping
from fastopt._core.options import check_seed
from fastopt._core.record import Loaded, Record
from fastopt._core.tensors import scale_name
from fastopt._messages import describe, few


def saved(optimizer: Record) -> dict[str, Any]:
    """See `state_dict`."""
    refusals.check_nothing_pending(optimizer, "state_dict()")
    check_grouping(optimizer)
    optimizer._settle()
    fetch = optimizer._arrays.fetch
    state: dict[int, Any] = {}
    for position, tensor in enumerate(optimizer._tensors):
        state[position] = {
            "step": int(tensor.step),
            **{name: float(tensor.running[k]) for k, name in enumerate(optimizer.spec.running)},
            **{name: fetch(array) for name, array in tensor.states.items()},
            **{scale_name(name): fetch(array) for name, array in tensor.scales.items()},
        }
    groups = []
    members: list[list[int]] = [[] for _ in optimizer._groups]
    for position, tensor in enumerate(optimizer._tensors):
        members[tensor.group].append(position)
    for group, positions in zip(optimizer._groups, members, strict=True):
        saved = {key: value for key, value in group.items() if key != "params"}
        saved["params"] = positions
        if optimizer._names is not None:
            saved["param_names"] = [optimizer._names[i] for i in positions]
        groups.append(saved)
    saved = {
        "optimizer": optimizer._name,
        "state": state,
        "param_groups": groups,
        "state_dtype": optimizer.state_dtype,
        "seed": optimizer._seed,
        "offsets": {k: tensor.index for k, tensor in enumerate(optimizer._tensors)},
    }
    if optimizer.master is not None:
        halves = [fetch(tensor.low) for tensor in optimizer._tensors if tensor.low is not None]
        saved["master_low"] = dict(enumerate(halves))
    if optimizer.ema_decay is not None:
        averages = [fetch(tensor.ema) for tensor in optimizer._tensors if tensor.ema is not None]
        saved["ema"] = dict(enumerate(averages))
    for name, awaited in optimizer._awaited.items():
        position = len(state)
        entry = awaited.entry.items()
        state[position] = {key: np.copy(v) if is_array(v) else v for key, v in entry}
        groups[0]["params"].append(position)
        groups[0]["param_names"].append(name)
        for where, kept in (("ema", awaited.average), ("master_low", awaited.low)):
            if where in saved:
                saved[where][position] = None if kept is None else kept.copy()
        if awaited.offset is not None:
            saved["offsets"][position] = awaited.offset
    return saved


def load(optimizer: Record, state_dict: Mapping[str, Any]) -> None:
    """See `Optimizer.load_state_dict`."""
    name = type(optimizer).__name__
    refusals.check_nothing_pending(optimizer, "load_state_dict()")
    check_grouping(optimizer)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{name}: state_dict must be a dict, got {describe(state_dict)}")
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise KeyError(f"{name}: state_dict must have the keys 'state' and 'param_groups', {key!r} is missing")
    ours = "optimizer" in state_dict
    if ours and state_dict["optimizer"] != name:
        raise ValueError(f"{name}: state_dict must be of {name}, got one of {state_dict['optimizer']}")
    saved_groups = state_dict["param_groups"]
    groups = optimizer._groups
    if not isinstance(saved_groups, list | tuple) or not all(isinstance(group, Mapping) for group in saved_groups):
        raise TypeError(f"{name}: 'param_groups' of the state_dict must be a list of dicts")
    if len(saved_groups) != len(groups):
        raise ValueError(f"{name}: state_dict must have {len(groups)} param groups, got {len(saved_groups)}")
    if ours and ("ema" in state_dict) != (optimizer.ema_decay is not None):
        has, wants = ("has", "no") if "ema" in state_dict else ("lacks", "an")
        raise ValueError(f"{name}: state_dict {has} averages, this optimizer has {wants} ema_decay")

    if ours and ("master_low" in state_dict) != (optimizer.master is not None):
        has, wants = ("has", "no") if "master_low" in state_dict else ("lacks", "a")
        raise ValueError(f"{name}: state_dict {has} lower halves of parameters, this optimizer has {wants} master")
    state_dtype = state_dict.get("state_dtype", "float32")
    if state_dtype not in _formats.STATE_DTYPES:
        known = ", ".join(map(repr, _formats.STATE_DTYPES))
        raise ValueError(f"{name}: state_dtype of the state_dict must be one of {known}, got {state_dtype!r}")
    seed = check_seed(name, state_dict.get("seed", optimizer.seed))

    hypers = [_hypers(optimizer, k, saved, ours) for k, saved in enumerate(saved_groups)]
    matched: list[tuple[Any, Any]] = []
    awaited: dict[str, Loaded] = {}
    members: list[list[Any]] = [[] for _ in groups]
    for tensor in optimizer._tensors:
        members[tensor.group].append(tensor)
    offsets = state_dict.get("offsets", {})
    if not isinstance(offsets, Mapping):
        raise TypeError(f"{name}: offsets of the state_dict must be a dict, got {describe(offsets)}")

    def read(key: Any, may_lack: bool) -> Loaded:
        return Loaded(
            _entry(optimizer, state_dict, key),
            _kept(optimizer, state_dict, "ema", key, "average", may_lack),
            _kept(optimizer, state_dict, "master_low", key, "lower half", may_lack),
            _offset(optimizer, offsets, key),
        )

    for k, saved in enumerate(saved_groups):
        keys, names = list(saved["params"]), saved.get("param_names")
        if names is not None and (len(names) != len(keys) or not all(isinstance(n, str) for n in names)):
            raise ValueError(f"{name}: param group {k} of the state_dict must have a name for each of its parameters")
        if optimizer._names is not None and names is not None:
            here = {tensor.key: tensor for tensor in members[k]}
            if not set(here) <= set(names) or (set(names) > set(here) and not (optimizer._by_update and k == 0)):
                odd = few(sorted(set(names) ^ set(here)))
                raise ValueError(f"{name}: param group {k} of the state_dict has other names: {odd} differ")
            pairs = [(here.get(n), n, key) for n, key in zip(names, keys, strict=True)]
        elif len(keys) != len(members[k]):
            raise ValueError(
                f"{name}: param group {k} of the state_dict must have {len(members[k])} parameters, got {len(keys)}"
            )
        else:
            pairs = [(tensor, "", key) for tensor, key in zip(members[k], keys, strict=True)]
        for tensor, parameter_name, key in pairs:
            if tensor is not None:
                matched.append((tensor, key))
                continue
            waiting = read(key, may_lack=True)
            entry = as_kept(optimizer, waiting.entry, state_dtype, None, f"parameter {parameter_name!r}")
            awaited[parameter_name] = _own(waiting._replace(entry=entry))

    changes = backends.engine().Changes()
    if ours and state_dtype == optimizer.state_dtype:
        matched = _note_plain(optimizer, changes, matched, state_dict, hypers, offsets)
    checked: list[tuple[Any, Loaded]] = []
    for tensor, key in matched:
        loaded = read(key, may_lack=False)
        values = hypers[tensor.group]
        entry = check_entry(optimizer, loaded.entry, tensor.shape, values, tensor.label, state_dtype)
        check_beside(optimizer, loaded, tensor.shape, tensor.label)
        checked.append((tensor, loaded._replace(entry=entry)))
    for group, values in zip(groups, hypers, strict=True):
        for key, value in values.items():
            changes.item(group, key, value)
    made: list[Any] = []
    for tensor, loaded in _apart(optimizer, checked):
        made += _note(optimizer, changes, tensor, loaded, hypers[tensor.group])
    changes.attribute(optimizer, "_ranges", optimizer._ranges.plus(optimizer._arrays.ranges(made)))
    changes.attribute(optimizer, "_seed", seed)
    changes.attribute(optimizer, "_awaited", awaited)
    planning.note_no_plan(optimizer, changes)
    changes.publish()


def _note_plain(
    optimizer: Record,
    changes: Any,
    matched: list[tuple[Any, Any]],
    state_dict: Mapping[str, Any],
    hypers: list[dict[str, Any]],
    offsets: Mapping[Any, Any],
) -> list[tuple[Any, Any]]:
    """Note the states that are just as the optimizer keeps them, all at once; return the other (tensor, key) pairs.

    What is to be converted, completed or explained is left to the caller, which takes one tensor after the other.
    """
    spec, states, engine = optimizer.spec, state_dict["state"], backends.engine()
    has_more = optimizer.ema_decay is not None or optimizer.copy_dtype is not None or optimizer.master is not None
    has_scales = any(tensors.codec_of(optimizer, name).has_scales for name in spec.states)
    if has_more or has_scales or optimizer._backend.ON_DEVICE or type(states) is not dict:
        return matched
    needed = [spec.states_for(spec.flags(values)) for values in hypers]
    expected = [{"step", *spec.running, *names} for names in needed]

    def is_plain(tensor: Any, key: Any) -> bool:
        entry, offset = states.get(key), offsets.get(key)
        return (
            type(entry) is dict
            and entry.keys() == expected[tensor.group]
            and tuple(tensor.states) == needed[tensor.group]
            and type(entry["step"]) is int
            and 0 <= entry["step"] < 2**53
            and all(type(entry[name]) is float and math.isfinite(entry[name]) for name in spec.running)
            and type(offset) is int
            and 0 <= offset < 2**62
        )

    plain = [pair for pair in matched if is_plain(*pair)]
    own = tensors.kept_ranges(optimizer, optimizer._tensors)
    odd: set[int] = set()
    columns = []
    for name in dict.fromkeys(itertools.chain.from_iterable(needed)):
        positions = [k for k, (tensor, _) in enumerate(plain) if name in tensor.states]
        targets = [plain[k][0].states[name] for k in positions]
        sources = [states[plain[k][1]][name] for k in positions]
        number = tensors.codec_of(optimizer, name).dtype.num
        found = engine.unusual(sources, number, [plain[k][0] for k in positions], False)
        odd.update(positions[k] for k in found or own.overlapping(sources))
        columns.append((positions, targets, sources))
    if odd:
        return matched
    for _, targets, sources in columns:
        changes.copy_all(targets, sources)
    entries = [states[key] for _, key in plain]
    steps = np.array([entry["step"] for entry in entries], np.int64)
    changes.copy_all([tensor.step for tensor, _ in plain], engine.carve_scalars(steps))
    if spec.running:
        running = np.array([[entry[name] for name in spec.running] for entry in entries], np.float64)
        changes.copy_all([tensor.running for tensor, _ in plain], list(running))
    for tensor, key in plain:
        if tensor.index != offsets[key]:
            changes.attribute(tensor, "index", offsets[key])
    if len(plain) == len(matched):
        return []
    noted = {id(tensor) for tensor, _ in plain}
    return [pair for pair in matched if id(pair[0]) not in noted]


def _own(loaded: Loaded) -> Loaded:
    """The same with arrays that nobody else has."""

    def own(value: Any) -> Any:
        return value.copy() if is_array(value) else value

    entry, average, low, offset = loaded
    return Loaded({key: own(value) for key, value in entry.items()}, own(average), own(low), offset)


def _apart(optimizer: Record, checked: list[tuple[Any, Loaded]]) -> list[tuple[Any, Loaded]]:
    """The same with copies of the arrays that are the optimizer's own, which loading would overwrite."""
    if not checked:
        return []
    columns = backends.engine().kept_beside(optimizer._tensors, tuple(optimizer.spec.states))
    own = backends.engine().Ranges([a for _, _, column in columns for a in column if is_array(a)])

    def apart(value: Any) -> Any:
        return value.copy() if is_array(value) and own.overlapping([value]) else value

    return [
        (tensor, Loaded({key: apart(value) for key, value in entry.items()}, apart(average), apart(low), offset))
        for tensor, (entry, average, low, offset) in checked
    ]


def _kept(optimizer: Record, state_dict: Mapping[str, Any], where: str, key: Any, what: str, may_lack: bool) -> Any:
    """What the state dict keeps under `where` for the parameter `key`, or None where it keeps none for any.

    For a parameter that is not here yet it may lack one (`may_lack`).
    """
    if where not in state_dict:
        return None
    kept = state_dict[where].get(key) if isinstance(state_dict[where], Mapping) else None
    if kept is None and not (may_lack and key in state_dict[where]):
        raise KeyError(f"{type(optimizer).__name__}: state_dict has no {what} for parameter {key!r}")
    return kept


def _offset(optimizer: Record, offsets: Mapping[Any, Any], key: Any) -> int | None:
    """Index of the first element of parameter `key` for the rounding, if the state dict tells."""
    offset = offsets.get(key)
    if offset is not None and (isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < 2**62):
        name = type(optimizer).__name__
        raise ValueError(f"{name}: offsets of the state_dict must be integers >= 0, got {offset!r} for {key!r}")
    return offset


def check_beside(optimizer: Record, loaded: Loaded, shape: tuple[int, ...], label: str) -> None:
    """Raise unless average and lower half, if there are any, are for a parameter of `shape`."""
    name = type(optimizer).__name__
    if loaded.average is not None:
        check_array(loaded.average, f"{name}: the average of {label}", shape=shape, writable=False)
    if loaded.low is not None:
        what = f"{name}: the lower half of {label}"
        check_array(loaded.low, what, shape=shape, dtypes=(np.uint16,), writable=False)


def _hypers(optimizer: Record, k: int, saved: Mapping[str, Any], ours: bool) -> dict[str, Any]:
    """The hyperparameters of saved group `k`, checked."""
    name = type(optimizer).__name__
    spec = optimizer.spec
    known = ("params", "param_names", *spec.hypers, *KEPT_FOR_OTHERS)
    values = {key: value for key, value in saved.items() if key in spec.hypers}
    if not ours:
        known = (*known, *OF_TORCH, "decoupled_weight_decay")
        decoupled = spec.cls.decoupled_weight_decay
        if "decoupled_weight_decay" not in spec.hypers and saved.get("decoupled_weight_decay", decoupled) != decoupled:
            raise ValueError(f"{name}: state_dict has decoupled_weight_decay={saved['decoupled_weight_decay']!r}")
        values = {name: _plain(value) for name, value in values.items()}
        values = {**{n: optimizer.param_groups[k][n] for n in spec.hypers}, **values}
    unknown = [key for key in saved if key not in known]
    missing = [key for key in spec.hypers if key not in values]
    if unknown or missing or "params" not in saved:
        raise KeyError(f"{name}: param group {k} of the state_dict does not fit: unknown {unknown}, missing {missing}")
    return {**spec.check(values), **{key: saved[key] for key in KEPT_FOR_OTHERS if key in saved}}


def _plain(value: Any) -> Any:
    """A hyperparameter of torch's, which may be a tensor or hold some, as numbers."""
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value.item() if hasattr(value, "item") else value


def _entry(optimizer: Record, state_dict: Mapping[str, Any], key: Any) -> Mapping[str, Any]:
    """State of the parameter `key`, in fastopt's words: step, running scalars, arrays."""
    name = type(optimizer).__name__
    states = state_dict["state"]
    ours = "optimizer" in state_dict
    if not isinstance(states, Mapping) or (ours and key not in states):
        raise KeyError(f"{name}: state_dict has no state for parameter {key!r}")
    saved = states.get(key, {})
    if not isinstance(saved, Mapping):
        raise TypeError(f"{name}: state of parameter {key!r} must be a dict, got {describe(saved)}")
    if ours:
        return dict(saved)
    # torch has no entry before the first step, keeps tensors, and has states that fastopt computes from the step count
    entry = {key: _on_host(value) for key, value in saved.items() if value is not None}
    scalars = {"step", *optimizer.spec.running}
    converted = {
        key: value.item() if key in scalars and value.size == 1 else value
        for key, value in entry.items()
        if key not in optimizer.spec.cls.derived_states
    }
    converted.setdefault("step", 1 if entry else 0)  # torch's SGD counts none; only the first differs
    return {**optimizer.spec.running, **converted}


def _on_host(value: Any) -> np.ndarray:
    """A tensor of torch's, wherever it is, or a number, as an array."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def check_entry(
    optimizer: Record,
    entry: Mapping[str, Any],
    shape: tuple[int, ...],
    values: Mapping[str, Any],
    label: str,
    state_dtype: str,
) -> Mapping[str, Any]:
    """Return `entry`, a state for a parameter of `shape` under the hyperparameters `values`, or raise.

    Its arrays are of `state_dtype`, and are returned as the optimizer keeps them.
    """
    name = type(optimizer).__name__
    spec = optimizer.spec
    needed = spec.states_for(spec.flags(values))
    missing = [key for key in ("step", *spec.running) if key not in entry]
    if entry.get("step") != 0:
        missing += [key for key in needed if key not in entry]
    coded = [key for key in spec.states if key in entry and _formats.codec(state_dtype, spec.kinds[key]).has_scales]
    missing += [scale_name(key) for key in coded if scale_name(key) not in entry]
    known = {"step", *spec.running, *spec.states, *map(scale_name, coded)}
    unknown = [key for key in entry if key not in known]
    if missing or unknown:
        raise KeyError(f"{name}: state of {label} does not fit: unknown {unknown}, missing {missing}")
    step = entry["step"]
    if isinstance(step, bool) or not isinstance(step, numbers.Real):
        raise TypeError(f"{name}: step of {label} must be a number, got {describe(step)}")
    if not (0 <= float(step) < 2**53 and float(step).is_integer()):
        raise ValueError(f"{name}: step of {label} must be an integer >= 0 and below 2**53, got {step!r}")
    for key in spec.running:
        if not isinstance(entry[key], numbers.Real):
            raise TypeError(f"{name}: {key} of {label} must be a number, got {describe(entry[key])}")
        if not math.isfinite(entry[key]):
            raise ValueError(f"{name}: {key} of {label} must be finite, got {entry[key]!r}")
    return as_kept(optimizer, entry, state_dtype, shape, label)


def as_kept(
    optimizer: Record, entry: Mapping[str, Any], state_dtype: str, shape: tuple[int, ...] | None, label: str
) -> Mapping[str, Any]:
    """`entry` with its arrays, of `state_dtype`, as the optimizer keeps them, if they are of `shape` (None: any)."""
    spec = optimizer.spec
    if shape is None and state_dtype == optimizer.state_dtype:
        return entry  # checked when its parameter comes
    result = dict(entry)
    for key in spec.states:
        if key not in entry:
            continue
        what = f"{type(optimizer).__name__}: state {key!r} of {label}"
        array = entry[key]
        source, kept = _formats.codec(state_dtype, spec.kinds[key]), tensors.codec_of(optimizer, key)
        if isinstance(array, np.ndarray) and array.dtype.name == "bfloat16" and source.dtype == np.uint16:
            array = array.view(np.uint16)
        check_array(array, what, shape=shape, dtypes=(source.dtype.type,), writable=False)
        scales = entry.get(scale_name(key), np.zeros(0, np.uint16))
        source.check_scales(scales, f"{type(optimizer).__name__}: scales of state {key!r} of {label}", array.size)
        if source is not kept:
            array, scales = kept.encode(source.decode(array, scales))
        result.pop(scale_name(key), None)
        result[key] = array
        if kept.has_scales:
            result[scale_name(key)] = scales
    return result


def fill_new(optimizer: Record, tensor: Any, loaded: Loaded, values: Mapping[str, Any]) -> None:
    """Check a state that waited for its name, and fill with it a tensor that the optimizer does not have yet."""
    entry = check_entry(optimizer, loaded.entry, tensor.shape, values, tensor.label, optimizer.state_dtype)
    check_beside(optimizer, loaded, tensor.shape, tensor.label)
    changes = backends.engine().Changes()
    _note(optimizer, changes, tensor, loaded._replace(entry=entry), values)
    changes.publish()


def _note(optimizer: Record, changes: Any, tensor: Any, loaded: Loaded, values: Mapping[str, Any]) -> list[Any]:
    """Note in `changes` what was loaded, and checked, for `tensor`; without an average the parameter itself is one.

    Returns the arrays that were made for states that the tensor did not have.
    """
    entry, average, low, offset = loaded
    spec = optimizer.spec
    note = optimizer._arrays.note
    needed = spec.states_for(spec.flags(values))
    states, scales = dict(tensor.states), dict(tensor.scales)
    made = []
    for name in spec.states:
        if name not in states and (name in needed or name in entry):
            (states[name],), new_scales = tensors.made_states(optimizer, [tensor], name, None)
            made += [states[name], *new_scales]
            if new_scales:
                (scales[name],) = new_scales
    for name, array in states.items():
        codec = tensors.codec_of(optimizer, name)
        if name in entry:
            codes, loaded_scales = entry[name], entry.get(scale_name(name), np.zeros(0, np.uint16))
        else:
            codes, loaded_scales = codec.encode(np.full(tensor.shape, spec.initial(name, values), np.float32))
        note(changes, array, codes)
        if codec.has_scales:
            note(changes, scales[name], loaded_scales)
    if made:
        for attribute, arrays in (("states", states), ("scales", scales)):
            changes.attribute(tensor, attribute, {name: arrays[name] for name in spec.states if name in arrays})
    changes.copy(tensor.step, np.array(int(entry["step"]), np.int64))
    if spec.running:
        changes.copy(tensor.running, np.array([float(entry[name]) for name in spec.running]))
    if offset is not None:
        changes.attribute(tensor, "index", offset)
    if low is not None and tensor.low is not None:
        note(changes, tensor.low, low)
    if tensor.ema is not None and average is not None:
        note(changes, tensor.ema, average)
    optimizer._arrays.note_beside(changes, optimizer, tensor, low, average is not None)
    return made
