"""Arrays in host memory, as the optimizer handles them; `fastopt.backends.cuda.arrays` is the same on the GPU."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastopt import _formats, backends
from fastopt._arrays.allocation import scale_arrays, state_arrays  # noqa: F401  of the interface of arrays
from fastopt._arrays.checks import check_array
from fastopt._arrays.kinds import is_array
from fastopt._messages import parameter_label
from fastopt.backends import compiled


def bfloat16() -> np.dtype:
    """Type of arrays of bfloat16: that of ml_dtypes, or without it uint16 with its bits."""
    if importlib.util.find_spec("ml_dtypes") is None:
        return np.dtype(np.uint16)
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16)


def check() -> None:
    """Host memory is always there."""


def shape_of(array: np.ndarray) -> tuple[int, ...]:
    """Shape of a checked array, whatever its class says."""
    return np.ndarray.view(array, np.ndarray).shape


def exposed(array: np.ndarray) -> np.ndarray:
    """What users see of an array of the optimizer's: a view, whose shape can be changed without harm."""
    return array.view()


def check_parameter(array: Any, what: str, shape: tuple[int, ...] | None, is_split: bool) -> None:
    """Raise TypeError or ValueError unless an array can be a parameter."""
    dtype = np.ndarray.view(array, np.ndarray).dtype if is_array(array) else None  # whatever a subclass says
    if not is_split:
        check_array(array, what, shape=shape)
    elif dtype is not None and dtype.name == "bfloat16":
        check_array(array, what, shape=shape, dtypes=(dtype.type,))
    else:
        check_array(array, f"{what}, bfloat16 with master='split',", shape=shape, dtypes=(np.uint16,))


def check_parameters(
    optimizer: Any, arrays: Sequence[Any], tensors: Sequence[Any] | None = None, keys: Sequence[Any] = ()
) -> None:
    """Raise TypeError or ValueError unless arrays can be parameters: those of `tensors`, or new ones under `keys`."""
    number = np.dtype(np.float32 if optimizer.master is None else np.uint16).num
    for k in backends.engine().unusual(list(arrays), number, tensors, True):
        label = tensors[k].label if tensors else parameter_label(keys[k])
        what = f"{type(optimizer).__name__}: {label}"
        check_parameter(arrays[k], what, tensors[k].shape if tensors else None, optimizer.master is not None)


def ranges(arrays: Sequence[Any], gap: int = 0) -> Any:
    """The memory of arrays, which is one piece where there are at most `gap` bytes of an allocation between them."""
    return backends.engine().Ranges(list(arrays), gap)


def first_overlap(arrays: Sequence[Any]) -> tuple[int, int] | None:
    """Positions of two arrays that overlap in memory, or None."""
    return backends.engine().Ranges(list(arrays)).first_overlap()


def fetch(array: np.ndarray) -> np.ndarray:
    """A copy that needs no package but NumPy to be read: bfloat16 as uint16."""
    return array.view(np.uint16).copy() if array.dtype.name == "bfloat16" else array.copy()


def overwrite(array: np.ndarray, values: np.ndarray) -> None:
    """Overwrite an array; codes of the same size count as its elements."""
    has_its_size = values.dtype.itemsize == array.dtype.itemsize
    (array.view(values.dtype) if has_its_size else array)[...] = values


def fill(array: np.ndarray, code: Any) -> None:
    """Set every element to the same number or code."""
    array.view(code.dtype).fill(code)


def values_of(tensor: Any) -> np.ndarray:
    """The parameter of a tensor in float32: its array, or put together from its halves."""
    return tensor.array if tensor.low is None else _formats.join(tensor.array, tensor.low)


def note_values(changes: Any, tensor: Any, values: np.ndarray) -> None:
    """Note in `changes` that the parameter of a tensor is overwritten."""
    if tensor.low is None:
        changes.copy(tensor.array, values)
    else:
        high, low = np.empty(tensor.shape, np.uint16), np.empty(tensor.shape, np.uint16)
        _formats.split(values, high, low)
        changes.copy(tensor.array, high)
        changes.copy(tensor.low, low)


def note(changes: Any, target: np.ndarray, values: np.ndarray) -> None:
    """Note in `changes` that an array of the optimizer's is overwritten by values of its type or by codes."""
    changes.copy(target, values)


def note_beside(
    changes: Any,
    optimizer: Any,  # noqa: ARG001  of the GPU
    tensor: Any,
    low: np.ndarray | None,
    has_average: bool,
) -> None:
    """Note that the copy follows the parameter, whose lower half is `low`, and the average if it was not loaded."""
    values = tensor.array if tensor.low is None else _formats.join(tensor.array, tensor.low if low is None else low)
    if tensor.ema is not None and not has_average:
        changes.copy(tensor.ema, values)
    if tensor.copy is not None:
        copy = np.empty_like(tensor.copy)
        compiled.copy_array(values, copy)
        changes.copy(tensor.copy, copy)


def start_averages(optimizer: Any, tensors: Sequence[Any]) -> None:  # noqa: ARG001  of the GPU
    """Set averages to the parameters as they are."""
    for tensor in tensors:
        tensor.ema[...] = values_of(tensor)


def copy_parameters(optimizer: Any, tensors: list[Any]) -> None:
    """Round the parameters as they are into their copies."""
    backends.engine().copy_parameters(tensors, compiled.stages(), optimizer.copy_dtype == "bfloat16")


def average_swap(optimizer: Any) -> Any:
    """The context manager in which averages stand in the parameters' place."""
    is_bfloat16 = optimizer.copy_dtype == "bfloat16"
    return backends.engine().AverageSwap(
        optimizer._guard, optimizer._prepare_swap, compiled.stages(), is_bfloat16, None
    )
