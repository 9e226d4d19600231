"""Arrays on the GPU, as the optimizer handles them; `fastopt._arrays.host` is the same in host memory.

What is here is for construction, saving and evaluation, not for steps: it waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastopt import _formats, _messages, backends
from fastopt.backends.cuda import availability, kernels, layout, memory
from fastopt.backends.cuda import plan as _plan

check_array = memory.check_array
first_overlap = memory.first_overlap
state_arrays = memory.state_arrays
zeros = memory.zeros
part = memory.part
scale_arrays = memory.scale_arrays
fetch = memory.fetch
overwrite = memory.overwrite


def bfloat16() -> np.dtype:
    """Type of arrays of bfloat16: Numba has none, so uint16 with its bits."""
    return np.dtype(np.uint16)


def check() -> None:
    """Raise RuntimeError, saying what is missing, unless there is a GPU."""
    availability.check()


def shape_of(array: Any) -> tuple[int, ...]:
    """Shape of a checked array."""
    seen = memory.look(array)
    assert seen is not None
    return seen.shape


def exposed(array: Any) -> Any:
    """What users see of an array of the optimizer's."""
    return array


def check_parameter(array: Any, what: str, shape: tuple[int, ...] | None, is_split: bool) -> None:
    """Raise TypeError or ValueError unless an array can be a parameter."""
    if is_split:
        memory.checked(array, f"{what}, bfloat16 with master='split',", shape=shape, dtypes=("bfloat16", "uint16"))
    else:
        memory.checked(array, what, shape=shape, dtypes=("float32",))


def values_of(tensor: Any) -> np.ndarray:
    """The parameter of a tensor in float32, on the host."""
    return fetch(tensor.array) if tensor.low is None else _formats.join(fetch(tensor.array), fetch(tensor.low))


def check_parameters(
    optimizer: Any, arrays: Sequence[Any], tensors: Sequence[Any] | None = None, keys: Sequence[Any] = ()
) -> None:
    """Raise TypeError or ValueError unless arrays can be parameters: those of `tensors`, or new ones under `keys`."""
    for k, array in enumerate(arrays):
        label = tensors[k].label if tensors else _messages.parameter_label(keys[k])
        what = f"{type(optimizer).__name__}: {label}"
        check_parameter(array, what, tensors[k].shape if tensors else None, optimizer.master is not None)


class Ranges:
    """The memory of arrays."""

    def __init__(self, arrays: Sequence[Any]) -> None:
        self._arrays = [array for array in arrays if memory.look(array) is not None]

    def plus(self, others: Ranges) -> Ranges:
        """That of both."""
        return Ranges([*self._arrays, *others._arrays])

    def first_overlap(self) -> tuple[int, int] | None:
        """Positions of two arrays that overlap, or None."""
        return first_overlap(self._arrays)


def ranges(arrays: Sequence[Any], gap: int = 0) -> Ranges:  # noqa: ARG001  of the host
    """The memory of arrays."""
    return Ranges(arrays)


def note(changes: Any, target: Any, values: np.ndarray) -> None:
    """Note in `changes` that an array of the optimizer's is overwritten by values of its type or by codes."""
    changes.call(overwrite, target, values)


def note_values(changes: Any, tensor: Any, values: Any) -> None:
    """Note in `changes` that the parameter of a tensor is overwritten, with values of the host or the device."""
    values = values if isinstance(values, np.ndarray) else fetch(values)
    if tensor.low is None:
        changes.call(overwrite, tensor.array, values)
    else:
        high, low = np.empty(values.shape, np.uint16), np.empty(values.shape, np.uint16)
        _formats.split(values, high, low)
        changes.call(overwrite, tensor.array, high)
        changes.call(overwrite, tensor.low, low)


def note_beside(changes: Any, optimizer: Any, tensor: Any, low: Any, has_average: bool) -> None:  # noqa: ARG001
    """Note that the copy follows the parameter, and the average if it was not loaded."""
    if tensor.ema is not None and not has_average:
        changes.call(start_averages, optimizer, [tensor])
    if tensor.copy is not None:
        changes.call(copy_parameters, optimizer, [tensor])


def average_swap(optimizer: Any) -> Any:
    """The context manager in which averages stand in the parameters' place."""

    def exchange(tensors: Sequence[Any]) -> None:
        _walk("exchange_averages", tensors, [(layout.EMA, "ema")], optimizer)
        if optimizer.copy_dtype is not None:
            copy_parameters(optimizer, tensors)

    return backends.engine().AverageSwap(optimizer._guard, optimizer._prepare_swap, None, False, exchange)


def _rows(tensors: Sequence[Any], words: Sequence[tuple[int, str]]) -> tuple[Any, int, int]:
    """A table on the device with a row for each tensor, its length, and the number of tiles."""
    rows = np.zeros((len(tensors), layout.ROW // 8), np.int64)
    tiles = 0
    kept = [tensor for tensor in tensors if tensor.size]
    for row, tensor in zip(rows, kept, strict=False):
        addresses = [(layout.P, tensor.array), (layout.LOW, tensor.low)]
        addresses += [(offset, getattr(tensor, name)) for offset, name in words]
        for offset, array in addresses:
            row[offset // 8] = 0 if array is None else memory.address_of(array)
        odd = [row[offset // 8] % 16 for offset, _ in addresses]
        row[layout.N // 8] = tensor.size
        row[layout.ALIGNED // 8] = not any(odd)
        row[layout.FIRST_TILE // 8] = tiles
        tiles += -(-tensor.size // kernels.TILE)
    table = memory.allocate(rows.nbytes)
    memory.copy_in(memory.address_of(table), rows)
    return table, len(kept), tiles


def _walk(kernel: str, tensors: Sequence[Any], words: Sequence[tuple[int, str]], optimizer: Any) -> None:
    """Run a stage over whole tensors, after and before everything else on the device."""
    memory.synchronize()
    table, n_rows, n_tiles = _rows(tensors, words)
    if n_tiles:
        header = np.frombuffer(_plan.header(optimizer), np.uint8)
        numbers = memory.allocate(layout.HEADER)
        memory.copy_in(memory.address_of(numbers), header)
        arguments = (memory.address_of(table), memory.address_of(numbers), n_rows, n_tiles)
        kernels.shared(kernel).launch(min(n_tiles, kernels.MAX_BLOCKS), 0, *arguments)
    memory.synchronize()


def start_averages(optimizer: Any, tensors: Sequence[Any]) -> None:
    """Set averages to the parameters as they are."""
    _walk("copy_parameters", tensors, [(layout.EMA, "ema")], optimizer)


def copy_parameters(optimizer: Any, tensors: Sequence[Any]) -> None:
    """Round the parameters as they are into their copies."""
    _walk("copy_parameters", tensors, [(layout.COPY, "copy")], optimizer)


def fill(array: Any, code: Any) -> None:
    """Set every element of one of the optimizer's arrays to the same number or code."""
    seen = memory.look(array)
    assert seen is not None
    dtype = np.dtype(seen.dtype)
    n_words = math.prod(seen.shape) * dtype.itemsize // 4
    if n_words < 1 << 16 or seen.address % 4 or math.prod(seen.shape) * dtype.itemsize % 4:
        memory.overwrite(array, np.full(seen.shape, code, dtype))
        return
    word = int(np.full(4 // dtype.itemsize, code, dtype).view(np.int32)[0])
    kernels.shared("fill_words").launch(min(-(-n_words // kernels.THREADS), 4096), 0, seen.address, n_words, word)
    memory.synchronize()
