"""The plan of an optimizer's steps: made before the next one, dropped when what it is made from changes."""

from __future__ import annotations

from typing import Any

from fastopt._core.groups import check_grouping
from fastopt._core.record import Record


def planned(optimizer: Record) -> Any:
    """The plan of the next step; the caller has taken the guard."""
    if optimizer._plan is not None:
        return optimizer._plan
    if not optimizer._tensors and not optimizer._names:
        raise ValueError(
            f"{optimizer._name}: no parameters yet; pass params to the constructor or call update(params, grads)"
        )
    given = optimizer._given or {}
    for key, tensor in optimizer._by_name.items():
        if given.get(key, tensor.array) is not tensor.array:
            raise ValueError(
                f"{optimizer._name}: params[{key!r}] is another array than the one that "
                f"{optimizer._name} was made with, and would not be updated; write into that one, "
                f"params[{key!r}][...] = values, or use update()"
            )
    optimizer._given = None
    check_grouping(optimizer)
    optimizer._arrays.check_parameters(optimizer, [tensor.array for tensor in optimizer._tensors], optimizer._tensors)
    members: list[list[Any]] = [[] for _ in optimizer._groups]
    if len(members) == 1:
        members[0] += optimizer._tensors
    else:
        for tensor in optimizer._tensors:
            members[tensor.group].append(tensor)
    optimizer._members = members
    optimizer._read = [None] * len(members)
    optimizer._plan = optimizer._backend.make_plan(optimizer)
    return optimizer._plan


def note_no_plan(optimizer: Record, changes: Any) -> None:
    """Note that the next step makes a new plan."""
    optimizer._settle()
    if optimizer._plan is not None:
        changes.extend(optimizer._kept_for_graphs, optimizer._plan.captured())
    changes.attribute(optimizer, "_plan", None)
    changes.attribute(optimizer._guard, "plan", None)
    changes.attribute(optimizer, "_members", [])  # those of the plan that is dropped
    changes.attribute(optimizer, "_read", [])
