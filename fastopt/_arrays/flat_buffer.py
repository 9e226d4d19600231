"""`FlatBuffer`: named tensors in one piece of memory."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from fastopt import backends
from fastopt._arrays.allocation import zeros
from fastopt._arrays.kinds import is_array, lives_on_gpu
from fastopt._arrays.types import Array, DeviceArray
from fastopt._messages import describe, few

_buffer_of: weakref.WeakValueDictionary[int, FlatBuffer] = weakref.WeakValueDictionary()
"""By the id of a view, or of the flat array, the buffer that it is a part of."""


def part_of_buffer(array: Any) -> tuple[FlatBuffer, str | None] | None:
    """The `FlatBuffer` that an array is a view of, and its name there: None for the flat array."""
    buffer = _buffer_of.get(id(array))
    return None if buffer is None else (buffer, buffer._name_of[id(array)])


def array_of(part: tuple[FlatBuffer, str | None]) -> Any:
    """The array that `part_of_buffer` told the place of."""
    buffer, name = part
    return buffer.flat if name is None else buffer[name]


class FlatBuffer(Mapping[str, Array]):
    """One aligned float32 buffer that holds named tensors, one after the other, as views.

    A mapping from names to arrays, so an optimizer takes it wherever it takes a dict, and then walks the
    whole buffer as one array. `flat` is that array, for everything else.

    Parameters
    ----------
    tensors : mapping
        Name -> shape (an int or a tuple of ints: the tensor starts as zeros) or name -> float32 array (its
        values are copied). A `FlatBuffer` is such a mapping.
    backend : {"cpu", "cuda"}
        Where the buffer is: in host memory, or on the GPU, where arrays are Numba's device arrays.

    Raises
    ------
    TypeError, ValueError
        For names that are not strings, arrays that are not float32, shapes that are none, and another backend.
    ImportError, RuntimeError
        For "cuda" without its packages or without a GPU.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> params = fastopt.FlatBuffer({"w": np.ones((2, 3), np.float32), "b": 3})
    >>> params["w"].shape, params["b"].shape, params.flat.size
    ((2, 3), (3,), 9)
    >>> grads = params.zeros_like()
    >>> params["b"][:] = 7
    >>> params.flat
    array([1., 1., 1., 1., 1., 1., 7., 7., 7.], dtype=float32)
    """

    __slots__ = ("__weakref__", "_name_of", "_views", "backend", "flat")

    flat: Array
    """The whole buffer: float32, one dimension, 64-byte aligned."""
    backend: Literal["cpu", "cuda"]
    """Where it is: "cpu" or "cuda"."""

    def __init__(
        self,
        tensors: Mapping[str, Array | DeviceArray | int | tuple[int, ...]],
        backend: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        if backend not in ("cpu", "cuda"):
            raise ValueError(f"FlatBuffer: backend must be 'cpu' or 'cuda', got {backend!r}")
        if not isinstance(tensors, Mapping):
            raise TypeError(f"FlatBuffer: tensors must map names to shapes or arrays, got {describe(tensors)}")
        shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in tensors.items():
            if not isinstance(name, str):
                raise TypeError(f"FlatBuffer: names must be strings, got {name!r}")
            shapes[sys.intern(name)] = _shape(name, tensor)  # names are then compared by identity
        total = sum(_size(shape) for shape in shapes.values())
        if total > 2**58:
            raise ValueError(f"FlatBuffer: {total} numbers are more than any memory holds")
        memory: Any = backends.resolve(backend).arrays
        memory.check()
        self.backend = backend
        self.flat = zeros(total) if backend == "cpu" else memory.zeros(total)
        self._views: dict[str, Array] = {}
        start = 0
        for name, shape in shapes.items():
            end = start + _size(shape)
            if backend == "cpu":
                self._views[name] = self.flat[start:end].reshape(shape)
            else:
                self._views[name] = memory.part(self.flat, start, shape)
            start = end
        self._name_of: dict[int, str | None] = {id(view): name for name, view in self._views.items()}
        self._name_of[id(self.flat)] = None
        _buffer_of.update(dict.fromkeys(self._name_of, self))
        for name, tensor in tensors.items():
            if is_array(tensor) or lives_on_gpu(tensor):
                self._overwrite(name, tensor)

    def zeros_like(self) -> FlatBuffer:
        """A new buffer with the same names and shapes, all zeros: for gradients."""
        return FlatBuffer({name: view.shape for name, view in self._views.items()}, self.backend)

    def copy(self) -> FlatBuffer:
        """A new buffer with the same names and values."""
        return FlatBuffer(self._views, self.backend)

    def __getitem__(self, name: str) -> Array:
        return self._views[name]

    def __setitem__(self, name: str, values: Array | DeviceArray) -> None:
        """Copy `values`, float32 of the tensor's shape, into the buffer: ``weights["w"] -= 0.1 * grads["w"]``.

        Raises
        ------
        KeyError
            For a name that is not in the buffer: tensors are named at construction.
        TypeError, ValueError
            For values of another type or shape; nothing was written then.
        """
        if name not in self._views:
            raise KeyError(f"FlatBuffer: no {name!r} to copy into, there are {few(list(self._views))}")
        view = self._views[name]
        if values is view:  # `buffer["w"] -= 1` has already written into the view
            return
        if isinstance(values, np.float32):
            values = np.asarray(values)
        shape = backends.resolve(self.backend).arrays.shape_of(view)
        has_values = is_array(values) or lives_on_gpu(values)
        if not has_values or _shape(name, values) != shape:
            error = ValueError if has_values else TypeError
            raise error(f"FlatBuffer: {name!r} must be set to float32 of shape {shape}, got {describe(values)}")
        self._overwrite(name, values)

    def _overwrite(self, name: str, values: Any) -> None:
        """Copy a checked array into the buffer."""
        values = values if isinstance(values, np.ndarray) else backends.resolve("cuda").arrays.fetch(values)
        backends.resolve(self.backend).arrays.overwrite(self._views[name], values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __reduce__(self) -> tuple[Any, ...]:
        fetch = backends.resolve(self.backend).arrays.fetch
        arrays = {name: fetch(view) for name, view in self._views.items()}
        return _buffer_again, (type(self), arrays, self.backend), getattr(self, "__dict__", None)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {view.shape}" for name, view in self._views.items())
        where = "" if self.backend == "cpu" else " on the GPU"
        return f"FlatBuffer({{{shapes}}}, {self.flat.size} float32{where})"


def _buffer_again(cls: type[FlatBuffer], arrays: Mapping[str, Array], backend: Literal["cpu", "cuda"]) -> FlatBuffer:
    """A pickled buffer; a subclass's own `__init__` is not called, as always in unpickling."""
    buffer = cls.__new__(cls)
    FlatBuffer.__init__(buffer, arrays, backend)
    return buffer


def _shape(name: str, tensor: Any) -> tuple[int, ...]:
    if is_array(tensor):
        plain = np.ndarray.view(tensor, np.ndarray)
        if plain.dtype != np.float32 or issubclass(type(tensor), np.ma.MaskedArray):
            raise TypeError(f"FlatBuffer: {name!r} must be a float32 array, got {describe(plain)}")
        return plain.shape
    if lives_on_gpu(tensor):
        memory = backends.resolve("cuda").arrays
        memory.check_array(tensor, f"FlatBuffer: {name!r}", writable=False)
        return memory.shape_of(tensor)
    sizes = tensor if isinstance(tensor, tuple) else (tensor,)
    if not all(isinstance(size, int | np.integer) and not isinstance(size, bool) for size in sizes):
        raise TypeError(f"FlatBuffer: {name!r} must be a shape or a float32 array, got {describe(tensor)}")
    if any(size < 0 for size in sizes):
        raise ValueError(f"FlatBuffer: {name!r} must have sizes >= 0, got {tensor!r}")
    return tuple(int(size) for size in sizes)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
