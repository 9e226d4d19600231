"""Optimizers as pickles and copies: what is saved of one, and how it is made again."""

from __future__ import annotations

import itertools
from typing import Any

from fastopt import backends
from fastopt._arrays import flat_buffer
from fastopt._arrays.types import Array
from fastopt._core import checkpoints, growth, tensors
from fastopt._core.record import Record


def pickled(optimizer: Record) -> dict[str, Any]:
    """What of an optimizer is pickled."""
    if optimizer._backend.ON_DEVICE:
        raise TypeError(f"{optimizer._name}: arrays on the GPU are not pickled; save state_dict() and the parameters")
    return {
        "structure": optimizer._structure,
        "by_update": optimizer._by_update,
        "names": optimizer._names,
        # Views of a FlatBuffer are saved as its parts, so that it shares them with the optimizer afterwards, too.
        "tensors": [
            (flat_buffer.part_of_buffer(tensor.array) or tensor.array, tensor.key, tensor.group)
            for tensor in optimizer._tensors
        ],
        "defaults": optimizer.defaults,
        "options": optimizer._options_now(),
        "state_dict": optimizer._guard.run("state_dict()", checkpoints.saved, optimizer),
        "attributes": dict(vars(optimizer)),
    }


def restore(optimizer: Record, saved: dict[str, Any]) -> None:
    """Make a new optimizer, without parameters, the one that was pickled."""
    vars(optimizer).update(saved["attributes"])
    optimizer._structure, optimizer._by_update = saved["structure"], saved["by_update"]
    optimizer._names = None if saved["names"] is None else ()
    made: list[Any] = []
    members: list[list[Array]] = [[] for _ in saved["state_dict"]["param_groups"]]
    groups = [{"params": (), **group} for group in saved["state_dict"]["param_groups"]]
    for group in groups:
        group.pop("param_names", None)
    for k, run in itertools.groupby(saved["tensors"], key=lambda tensor: tensor[2]):
        sources, keys, _ = zip(*run, strict=True)
        arrays = [flat_buffer.array_of(one) if isinstance(one, tuple) else one for one in sources]
        made += tensors.made_tensors(optimizer, arrays, keys, k, groups[k], tensors.next_index(made))
        members[k] += arrays
    for group, arrays in zip(groups, members, strict=True):
        group["params"] = tuple(arrays)
    optimizer._param_groups[:] = groups
    optimizer._groups = tuple(groups)
    changes = backends.engine().Changes()
    growth.note_growth(optimizer, changes, made, optimizer._ranges)
    changes.publish()
    checkpoints.load(optimizer, saved["state_dict"])
