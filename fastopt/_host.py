"""Arrays in host memory, as the optimizer handles them; `fastopt.backends.cuda.arrays` is the same on the GPU."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastopt import _buffers, _codecs, backends

check_array = _buffers.check_array
state_arrays = _buffers.state_arrays
scale_arrays = _buffers.scale_arrays


def bfloat16() -> np.dtype:
    """Type of arrays of bfloat16: that of ml_dtypes, or without it uint16 with its bits."""
    if importlib.util.find_spec("ml_dtypes") is None:
        return np.dtype(np.uint16)
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16)


def check() -> None:
    """Host memory is always there."""


def shape_of(array: np.ndarray) -> tuple[int, ...]:
    """Shape of a checked array."""
    return array.shape


def exposed(array: np.ndarray) -> np.ndarray:
    """What users see of an array of the optimizer's: a view, whose shape can be changed without harm."""
    return array.view()


def check_parameter(array: Any, what: str, shape: tuple[int, ...] | None, is_split: bool) -> None:
    """Raise TypeError or ValueError unless an array can be a parameter."""
    if not is_split:
        check_array(array, what, shape=shape)
    elif isinstance(array, np.ndarray) and array.dtype.name == "bfloat16":
        check_array(array, what, shape=shape, dtypes=(array.dtype.type,))
    else:
        check_array(array, f"{what}, bfloat16 with master='split',", shape=shape, dtypes=(np.uint16,))


def first_overlap(arrays: Sequence[Any]) -> tuple[int, int] | None:
    """Positions of two arrays that overlap in memory, or None."""
    return backends.engine().Ranges(list(arrays)).first_overlap()


def fetch(array: np.ndarray) -> np.ndarray:
    """A copy that needs no package but NumPy to be read: bfloat16 as uint16."""
    return array.view(np.uint16).copy() if array.dtype.name == "bfloat16" else array.copy()


def put(array: np.ndarray, values: np.ndarray) -> None:
    """Overwrite an array; codes of the same size count as its elements."""
    has_its_size = values.dtype.itemsize == array.dtype.itemsize
    (array.view(values.dtype) if has_its_size else array)[...] = values


def fill(array: np.ndarray, code: Any) -> None:
    """Set every element to the same number or code."""
    array.view(code.dtype).fill(code)


def values_of(tensor: Any) -> np.ndarray:
    """The parameter of a tensor in float32: its array, or put together from its halves."""
    return tensor.array if tensor.low is None else _codecs.join(tensor.array, tensor.low)


def set_values(tensor: Any, values: np.ndarray) -> None:
    """Overwrite the parameter of a tensor."""
    if tensor.low is None:
        tensor.array[...] = values
    else:
        _codecs.split(values, tensor.array, tensor.low)


def start_averages(optimizer: Any, tensors: Sequence[Any]) -> None:  # noqa: ARG001  of the GPU
    """Set averages to the parameters as they are."""
    for tensor in tensors:
        tensor.ema[...] = values_of(tensor)


def copy_parameters(optimizer: Any, tensors: Sequence[Any]) -> None:
    """Round the parameters as they are into their copies."""
    for tensor in tensors:
        optimizer._backend.copy_array(values_of(tensor), tensor.copy)


def exchange_averages(optimizer: Any, tensors: Sequence[Any]) -> None:  # noqa: ARG001  of the GPU
    """Let parameters and averages change places."""
    for tensor in tensors:
        kept = values_of(tensor).copy()
        set_values(tensor, tensor.ema)
        tensor.ema[...] = kept
