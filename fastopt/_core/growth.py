"""How an optimizer grows and rebinds names: everything is checked and made, then added at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastopt import backends
from fastopt._arrays.types import Array
from fastopt._core import checkpoints, planning, refusals, tensors
from fastopt._core.groups import check_group, check_grouping, check_names
from fastopt._core.record import Record
from fastopt._messages import few, parameter_label


def grow(optimizer: Record, groups: Sequence[Mapping[str, Any]]) -> None:
    """Check `groups` and everything in them, make what is kept for their parameters, and add it all."""

    refusals.check_nothing_pending(optimizer, "add_param_group()")
    check_grouping(optimizer)
    structure = "sequence" if optimizer._structure == "single" and optimizer._tensors else optimizer._structure
    changes = backends.engine().Changes()
    names: set[Any] = set()
    start = len(optimizer._tensors)
    checked = []
    arrays: list[Array] = []
    keys: list[Any] = []
    for group in groups:
        values, own_arrays, own_keys = check_group(optimizer, group, structure, names, start + len(arrays))
        arrays += own_arrays
        keys += own_keys
        names.update(own_keys)
        checked.append((values, own_arrays, own_keys))
    optimizer._arrays.check_parameters(optimizer, arrays, keys=keys)
    check_disjoint(optimizer, arrays, keys)
    index = tensors.next_index(optimizer._tensors)
    added: list[Any] = []
    for position, (values, own_arrays, own_keys) in enumerate(checked, len(optimizer._groups)):
        added += tensors.made_tensors(optimizer, own_arrays, own_keys, position, values, index)
        index = tensors.next_index(added)
    if structure == "mapping":
        awaited = {key: optimizer._awaited[key] for key in keys if key in optimizer._awaited}
        for tensor in added:
            if tensor.key in awaited:
                values = checked[tensor.group - len(optimizer._groups)][0]
                checkpoints.fill_new(optimizer, tensor, awaited[tensor.key], values)
        if awaited:
            left = {name: loaded for name, loaded in optimizer._awaited.items() if name not in awaited}
            changes.attribute(optimizer, "_awaited", left)
    new_groups = [values for values, _, _ in checked]
    changes.extend(optimizer._param_groups, new_groups)
    changes.attribute(optimizer, "_groups", (*optimizer._groups, *new_groups))
    if structure != optimizer._structure:
        changes.attribute(optimizer, "_structure", structure)
        changes.attribute(optimizer._tensors[0], "key", 0)
    note_growth(optimizer, changes, added, optimizer._ranges)
    changes.publish()


def check_disjoint(optimizer: Record, arrays: list[Array], keys: Sequence[Any]) -> None:
    """Raise ValueError if new parameters overlap each other or what the optimizer has."""
    if optimizer._ranges.plus(optimizer._arrays.ranges(arrays)).first_overlap() is not None:
        new = [(array, parameter_label(key)) for array, key in zip(arrays, keys, strict=True)]
        tensors.refuse_overlap(optimizer, [*new, *tensors.written_arrays(optimizer)])


def note_growth(optimizer: Record, changes: Any, added: list[Any], ranges: Any) -> None:
    """Note that the optimizer has these tensors, too; `ranges` are those of what it had."""
    parameters = optimizer._arrays.ranges([tensor.array for tensor in added])
    changes.attribute(optimizer, "_ranges", ranges.plus(parameters).plus(tensors.kept_ranges(optimizer, added)))
    changes.extend(optimizer._tensors, added)
    if optimizer._names is not None:
        changes.attribute(optimizer, "_names", (*optimizer._names, *(tensor.key for tensor in added)))
        for tensor in added:
            changes.item(optimizer._by_name, tensor.key, tensor)
    planning.note_no_plan(optimizer, changes)


def bind(optimizer: Record, changes: Any, moved: Mapping[str, Array], new: Mapping[str, Array]) -> None:
    """Note that names point to other arrays, and that new names join the first group."""

    check_grouping(optimizer)
    check_names(optimizer, new)
    if moved and optimizer.master is not None:
        raise ValueError(
            f"{optimizer._name}: with master='split' a name keeps its array, whose other halves are here; "
            f"{few(list(moved))} came with another"
        )
    bound = [optimizer._by_name[name] for name in moved]
    optimizer._arrays.check_parameters(optimizer, list(moved.values()), bound)
    optimizer._arrays.check_parameters(optimizer, list(new.values()), keys=list(new))
    ranges = optimizer._ranges
    if moved:
        others = [tensor.array for tensor in optimizer._tensors if tensor.key not in moved]
        ranges = optimizer._arrays.ranges(others).plus(tensors.kept_ranges(optimizer, optimizer._tensors))
    both = [*moved.values(), *new.values()]
    if ranges.plus(optimizer._arrays.ranges(both)).first_overlap() is not None:
        labelled = [(array, parameter_label(name)) for name, array in {**moved, **new}.items()]
        tensors.refuse_overlap(optimizer, [*labelled, *tensors.written_arrays(optimizer, without=moved)])
    values = optimizer._groups[0]
    added = (
        tensors.made_tensors(
            optimizer, list(new.values()), list(new), 0, values, tensors.next_index(optimizer._tensors)
        )
        if new
        else []
    )
    awaited = dict(optimizer._awaited)
    for tensor in added:
        if tensor.key in awaited:
            checkpoints.fill_new(optimizer, tensor, awaited.pop(tensor.key), values)
    changes.attribute(optimizer, "_awaited", awaited)
    for name, array in moved.items():
        changes.attribute(optimizer._by_name[name], "array", array)
    shown: list[list[Array]] = [list(group["params"]) for group in optimizer._groups]
    if moved:
        shown = [[] for _ in optimizer._groups]
        for tensor in optimizer._tensors:
            shown[tensor.group].append(moved.get(tensor.key, tensor.array))
    shown[0] += [tensor.array for tensor in added]
    for group, arrays in zip(optimizer._groups, shown, strict=True):
        changes.item(group, "params", tuple(arrays))
    note_growth(optimizer, changes, added, ranges.plus(optimizer._arrays.ranges(list(moved.values()))))
