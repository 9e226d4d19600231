"""Param groups: what one may hold, and what it holds now. New parameters are made in `growth`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from fastopt import backends
from fastopt._arrays.kinds import is_any_array
from fastopt._arrays.types import Array
from fastopt._core.record import Record
from fastopt._core.refusals import refuse_regrouping
from fastopt._messages import describe, did_you_mean, few
from fastopt.rules.host_scalars import kernel_and_hypers

KEPT_FOR_OTHERS = ("initial_lr",)
"""Keys of a param group that no kernel reads: learning rate schedulers keep them there."""
OF_TORCH = ("foreach", "fused", "capturable", "differentiable")
"""Keys of torch's param groups that choose its implementation; state dicts from there carry them."""


def check_group(
    optimizer: Record, group: Any, structure: str, taken: set[str], start: int
) -> tuple[dict[str, Any], list[Array], list[Any]]:
    """A param group as it is kept, its arrays, and under what key each goes."""
    if not isinstance(group, Mapping) or "params" not in group:
        raise TypeError(f"{optimizer._name}: a param group must be a dict with 'params', got {group!r:.80}")
    unknown = [key for key in group if key not in ("params", *optimizer.spec.hypers, *KEPT_FOR_OTHERS)]
    if unknown:
        hints = "".join(did_you_mean(key, optimizer.spec.hypers) for key in unknown)
        raise TypeError(
            f"{optimizer._name}: unknown hyperparameters {unknown} in a param group{hints}; known are "
            f"{', '.join(optimizer.spec.hypers)}"
        )
    extra = {key: group[key] for key in KEPT_FOR_OTHERS if key in group}
    values = optimizer.spec.check(
        {**optimizer.defaults, **{k: v for k, v in group.items() if k in optimizer.spec.hypers}}
    )
    params = group["params"]
    keys: list[Any]
    if structure == "mapping":
        if not isinstance(params, Mapping):
            raise TypeError(f"{optimizer._name}: params of every group must be a dict, got {describe(params)}")
        items = dict(params)
        check_names(optimizer, items)
        repeated = [name for name in items if name in taken or name in optimizer._by_name]
        if repeated:
            raise ValueError(f"{optimizer._name}: the names {repeated} are in another param group")
        keys, arrays = list(items), list(items.values())
    elif is_any_array(params) or not isinstance(params, Iterable) or isinstance(params, str | bytes):
        keys, arrays = [None if structure == "single" else start], [params]
    elif isinstance(params, Mapping):
        raise TypeError(f"{optimizer._name}: params of every group must be a sequence, got a dict")
    else:
        arrays = list(params)
        keys = list(range(start, start + len(arrays)))
    if not arrays:
        raise ValueError(f"{optimizer._name}: params must hold at least one array, got none")
    return {"params": tuple(arrays), **values, **extra}, arrays, keys


def check_names(optimizer: Record, names: Iterable[Any]) -> None:
    """Raise TypeError unless all names are strings, which alone can be saved and loaded."""
    odd = [name for name in names if type(name) is not str]
    if odd:
        raise TypeError(f"{optimizer._name}: names of parameters must be strings, got {few(odd)}")


def check_grouping(optimizer: Record) -> None:
    """Raise ValueError unless `param_groups` holds the dicts that it was given."""
    shown, own = optimizer._param_groups, optimizer._groups
    if len(shown) != len(own) or not all(map(operator.is_, shown, own)):
        refuse_regrouping(optimizer)


def listed(params: Any) -> Any:
    """`params` with lists for iterables, of parameters or of groups, so that one can look into them more than once."""
    if params is None or is_any_array(params) or isinstance(params, str | bytes | set | frozenset):
        return params
    if isinstance(params, Mapping) or not isinstance(params, Iterable) or hasattr(params, "__array__"):
        return params
    items = list(params)
    for k, item in enumerate(items):
        if isinstance(item, dict) and "params" in item:
            items[k] = {**item, "params": listed(item["params"])}
    return items


def read_group(optimizer: Record, k: int) -> tuple[str, tuple[float, ...], dict[str, Any]]:
    """Check the hyperparameters of group `k` as they are now.

    Returns its kernel, their float64 values, and what the group then held: what another thread or a signal handler sets
    meanwhile stays in the group, is none of it, and is read before the next step.
    """
    group = optimizer._groups[k]
    found = dict(group)
    missing = [key for key in ("params", *optimizer.spec.hypers) if key not in found]
    unknown = [key for key in found if key not in ("params", *optimizer.spec.hypers, *KEPT_FOR_OTHERS)]
    if missing or unknown:
        raise ValueError(
            f"{optimizer._name}: param_groups[{k}] must have the keys 'params', "
            f"{', '.join(map(repr, optimizer.spec.hypers))}"
            + (f"; missing {missing}" if missing else "")
            + (f"; unknown {unknown}" if unknown else "")
            + "".join(did_you_mean(key, optimizer.spec.hypers) for key in unknown)
        )
    values = optimizer.spec.check(found)
    needed = optimizer.spec.states_for(optimizer.spec.flags(values))
    params, read = found["params"], optimizer._read[k]
    engine = backends.engine()
    if read is None or read[0] is not params or read[1] != needed:
        members = optimizer._members[k]
        if not engine.holds(params, members):
            raise ValueError(f"{optimizer._name}: param_groups[{k}]['params'] is fixed; see add_param_group and update")
        lacking = engine.first_lacking(members, needed)
        if lacking is not None:
            raise ValueError(
                f"{optimizer._name}: param_groups[{k}] now needs the state {lacking[1]!r}, which {lacking[0].label} "
                "does not have: hyperparameters that add state are set at construction"
            )
        params = tuple(params)  # a list could change later
        optimizer._read[k] = (params, needed)
    checked = {**found, "params": params, **values}
    engine.replace_items(group, found, checked)
    return *kernel_and_hypers(optimizer.spec, values), checked
