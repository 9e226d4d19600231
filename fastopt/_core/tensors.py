"""Tensors: a parameter and what is kept beside it, made, decoded, shown. Who has which is decided in `growth`."""

from __future__ import annotations

import itertools
import types
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np

from fastopt import _formats, backends
from fastopt._arrays.allocation import ALIGNMENT
from fastopt._arrays.types import Array, State
from fastopt._core.record import Record
from fastopt.rules.spec import Spec


def scale_name(state: str) -> str:
    """Under what name the scales of an 8-bit state are shown and saved."""
    return f"{state}_scale"


def exposed_state(tensor: Any, spec: Spec, arrays: Any) -> State:
    """What users see as the state of a tensor: live arrays under fixed names."""
    running = {name: tensor.running[k : k + 1].reshape(()) for k, name in enumerate(spec.running)}
    states = {name: arrays.exposed(array) for name, array in tensor.states.items()}
    scales = {scale_name(name): arrays.exposed(array) for name, array in tensor.scales.items()}
    return types.MappingProxyType({"step": tensor.step.view(), **running, **states, **scales})


def codec_of(optimizer: Record, state: str) -> _formats.Codec:
    return _formats.codec(optimizer.state_dtype, optimizer.spec.kinds[state])


def decoded(optimizer: Record, tensor: Any) -> dict[str, Array]:
    """The states of `tensor` in float32, new arrays."""
    decoded = {}
    for name, array in tensor.states.items():
        scales = tensor.scales.get(name)
        kept = np.zeros(0, np.uint16) if scales is None else optimizer._arrays.fetch(scales)
        decoded[name] = codec_of(optimizer, name).decode(optimizer._arrays.fetch(array), kept)
    return decoded


def check_parameter(optimizer: Record, array: Any, label: str, shape: tuple[int, ...] | None = None) -> None:
    """Raise unless `array` can be a parameter."""
    optimizer._arrays.check_parameter(array, f"{optimizer._name}: {label}", shape, optimizer.master is not None)


def made_tensors(
    optimizer: Record, arrays: list[Array], keys: Sequence[Any], group: int, values: Mapping[str, Any], index: int
) -> list[Any]:
    """New tensors with their state for checked arrays; the optimizer does not know them yet."""
    engine = backends.engine()
    steps = engine.carve_scalars(np.zeros(len(arrays), np.int64))
    carried = np.array(list(optimizer.spec.running.values()), np.float64)
    running = [carried] * len(arrays) if not carried.size else list(np.tile(carried, (len(arrays), 1)))
    shapes = list(map(optimizer._arrays.shape_of, arrays))
    made: list[Any] = engine.make_tensors(arrays, keys, group, index, steps, running, shapes)
    for name in optimizer.spec.states_for(optimizer.spec.flags(values)):
        engine.give(made, name, *made_states(optimizer, made, name, values))
    if optimizer.master is not None:
        for tensor, low in zip(made, optimizer._arrays.state_arrays(arrays, np.uint16), strict=True):
            tensor.low = low
    if optimizer.spec.trust == "update":
        for tensor, update in zip(made, optimizer._arrays.state_arrays(arrays), strict=True):
            tensor.update = update
    if optimizer.ema_decay is not None:
        for tensor, ema in zip(made, optimizer._arrays.state_arrays(arrays), strict=True):
            tensor.ema = ema
        optimizer._arrays.start_averages(optimizer, made)
    if optimizer.copy_dtype is not None:
        for tensor, copy in zip(made, optimizer._arrays.state_arrays(arrays, copy_type(optimizer)), strict=True):
            tensor.copy = copy
        optimizer._arrays.copy_parameters(optimizer, made)
    return made


def made_states(
    optimizer: Record, tensors: Sequence[Any], name: str, values: Mapping[str, Any] | None
) -> tuple[list[Any], list[Any]]:
    """For each tensor an array for the state `name`, with its first value or 0 without `values`; and their scales.

    The second list is empty where the state has no scales.
    """
    initial = 0.0 if values is None else optimizer.spec.initial(name, values)
    codec = codec_of(optimizer, name)
    dtype = optimizer._arrays.bfloat16() if codec.is_bfloat16 else codec.dtype
    arrays = optimizer._arrays.state_arrays([tensor.array for tensor in tensors], dtype, codec.block)
    code, scale = codec.encode(np.full(1, initial, np.float32))
    if code.any():
        for array in arrays:
            optimizer._arrays.fill(array, code[0])
    if not codec.has_scales:
        return arrays, []
    scales = optimizer._arrays.scale_arrays([codec.n_scales(tensor.size) for tensor in tensors])
    for array in scales:
        optimizer._arrays.fill(array, scale[0])
    return arrays, scales


def kept_ranges(optimizer: Record, tensors: list[Any]) -> Any:
    """The memory of what is kept beside parameters."""
    columns = backends.engine().kept_beside(tensors, tuple(optimizer.spec.states))
    arrays = itertools.chain.from_iterable(column for _, _, column in columns)
    return optimizer._arrays.ranges(list(arrays), ALIGNMENT)


def copy_type(optimizer: Record) -> np.dtype:
    """Type of the arrays in `params_copy`."""
    return np.dtype(np.float16) if optimizer.copy_dtype == "float16" else optimizer._arrays.bfloat16()


def next_index(tensors: Sequence[Any]) -> int:
    """Index of the element after those of `tensors`."""
    return tensors[-1].index + tensors[-1].size if tensors else 0


_KEPT = {
    "ema": "the average",
    "copy": "the copy",
    "low": "the lower half",
    "update": "the workspace",
    "step": "the step count",
    "running": "the running scalars",
    "states": "state",
    "scales": "scales of state",
}
"""What error messages call the arrays beside a parameter, by the attribute of its tensor that has them."""


def written_arrays(optimizer: Record, without: Container[Any] = ()) -> list[tuple[Any, str]]:
    """Everything that a step writes, with labels; not the parameters under the keys in `without`."""
    tensors = optimizer._tensors
    written = [(tensor.array, tensor.label) for tensor in tensors if tensor.key not in without]
    for attribute, name, column in backends.engine().kept_beside(tensors, tuple(optimizer.spec.states)):
        what = _KEPT[attribute] if name is None else f"{_KEPT[attribute]} {name!r}"
        kept = zip(tensors, column, strict=True)
        written += [(array, f"{what} of {tensor.label}") for tensor, array in kept if array is not None]
    return written


def refuse_overlap(optimizer: Record, labelled: Sequence[tuple[Any, str]]) -> None:
    """Explain which two of these arrays overlap."""
    found = optimizer._arrays.first_overlap([array for array, _ in labelled])
    if found is not None:
        (a, first), (b, second) = (labelled[k] for k in found)
        same = "are the same array" if a is b else "overlap in memory"
        raise ValueError(f"{type(optimizer).__name__}: {first} and {second} {same}")
