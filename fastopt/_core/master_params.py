"""The float32 parameters of an optimizer that keeps them in two halves, set from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastopt import backends
from fastopt._arrays import host
from fastopt._arrays.kinds import is_array, lives_on_gpu
from fastopt._core import tensors
from fastopt._core.record import Record


def load(optimizer: Record, params: Any) -> None:
    """See `Optimizer.load_master_params`."""
    if optimizer._structure == "single":
        values = [params]
    elif optimizer._structure == "mapping":
        if not isinstance(params, Mapping) or set(params) != set(optimizer._names or ()):
            raise ValueError(f"{optimizer._name}: params must be a dict with the names of the parameters")
        values = [params[name] for name in optimizer._names or ()]
    else:
        if not isinstance(params, Sequence) or len(params) != len(optimizer._tensors):
            raise ValueError(f"{optimizer._name}: params must be a list of {len(optimizer._tensors)} arrays")
        values = list(params)
    for tensor, value in zip(optimizer._tensors, values, strict=True):
        arrays = host if is_array(value) else optimizer._arrays
        arrays.check_array(value, f"{optimizer._name}: {tensor.label}", shape=tensor.shape, writable=False)
        tensors.check_parameter(optimizer, tensor.array, tensor.label, tensor.shape)
    halves = [half for tensor in optimizer._tensors for half in (tensor.array, tensor.low)]
    beside = [k for k, value in enumerate(values) if lives_on_gpu(value) == optimizer._backend.ON_DEVICE]
    ranges = optimizer._arrays.ranges(halves)
    if ranges.plus(optimizer._arrays.ranges([values[k] for k in beside])).first_overlap() is not None:
        for k in beside:  # values may overlap one another
            if ranges.plus(optimizer._arrays.ranges([values[k]])).first_overlap() is not None:
                label = optimizer._tensors[k].label
                raise ValueError(f"{optimizer._name}: the values for {label} overlap the parameters in memory")
    changes = backends.engine().Changes()
    for tensor, value in zip(optimizer._tensors, values, strict=True):
        optimizer._arrays.note_values(changes, tensor, value)
    changes.publish()
