"""The only validation of arrays, the memory of states, and `FlatBuffer`.

The compiled engine checks gradients at first sight; whatever does not pass there is explained here.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import sys
import weakref
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from fastopt import backends
from fastopt._types import Array, DeviceArray

if TYPE_CHECKING:
    from fastopt._optimizer import Optimizer

ALIGNMENT = 64
"""Bytes; a cache line, and the widest vector."""
_HUGE_PAGE = 2 << 20
_HUGE_FROM = 4 << 20
_PAGE = 4 << 10
_staggered = itertools.cycle(range(0, _PAGE, 5 * ALIGNMENT))
"""Where in a page large arrays start, one after the other. A load whose address has the low 12 bits of a store under
way waits for it, and streams that are walked together at the same place of their pages meet all the time: Adam with
bfloat16 states was 14% slower at 1e7 parameters (with float32 states, level)."""


# --- Arrays -----------------------------------------------------------------------------------------------


def describe(value: Any) -> str:
    """What `value` is, for an error message."""
    if is_array(value):
        return f"{value.dtype.name if value.dtype.isnative else value.dtype.str} of shape {value.shape}"
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def remedy(value: Any, keep: str = "") -> str:
    """The end of an error message about what is no NumPy array: how to make it one. `keep` says what to do with it."""
    if hasattr(value, "detach") and hasattr(value, "numpy"):
        return "; a CPU tensor's detach().numpy() shares its memory"
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return "; with their names, arrays come in a dict: dict(pairs) makes one of such pairs"
    if hasattr(value, "__array__") or isinstance(value, list | tuple | float | int):
        return f"; np.array(..., np.float32) makes one{keep}"
    return ""


def check_array(
    value: Any,
    what: str,
    *,
    shape: tuple[int, ...] | None = None,
    dtypes: tuple[type, ...] = (np.float32,),
    writable: bool = True,
) -> None:
    """Raise TypeError or ValueError unless `value` is an array that a kernel can work on in place.

    That is a C-contiguous NumPy array of native byte order and of one of `dtypes`, aligned to its items,
    writable if asked, of the given `shape` if any.
    """
    wanted = " or ".join(np.dtype(dtype).name for dtype in dtypes)
    if shape is not None:
        wanted += f" of shape {shape}"
    keep = ": keep that copy, it is what is updated" if writable else ""
    if not is_array(value):
        raise TypeError(f"{what} must be a NumPy array, {wanted}, got {describe(value)}{remedy(value, keep)}")
    if issubclass(type(value), np.ma.MaskedArray):
        raise TypeError(f"{what} must be a plain NumPy array, got a masked array, whose mask would be ignored")
    plain = np.ndarray.view(value, np.ndarray)  # what a subclass says of itself is not what a kernel sees
    if plain.dtype not in dtypes or not plain.dtype.isnative:
        numbers = plain.dtype.kind in "biuf" and np.float32 in dtypes
        hint = f"; .astype(np.float32) converts{keep}" if numbers else ""
        raise TypeError(f"{what} must be {wanted}, got {describe(plain)}{hint}")
    if shape is not None and plain.shape != shape:
        raise ValueError(f"{what} must be {wanted}, got {describe(plain)}")
    if not plain.flags.c_contiguous:
        raise ValueError(
            f"{what} must be C-contiguous, got strides {plain.strides} for shape {plain.shape}; "
            f"fastopt makes no copies, np.ascontiguousarray does{keep}"
        )
    if not plain.flags.aligned:
        raise ValueError(f"{what} must be aligned to {plain.itemsize} bytes, got data at {plain.ctypes.data:#x}")
    if writable and not plain.flags.writeable:
        raise ValueError(f"{what} must be writable, got a read-only array")


def is_array(value: Any) -> bool:
    """Whether `value` is a NumPy array by its real type: objects can claim another class."""
    return issubclass(type(value), np.ndarray)


def zeros(n: int) -> Array:
    """`n` float32 zeros, aligned to `ALIGNMENT`; large ones on huge pages, where the system has them.

    Pages of a large array come into being when they are first touched, so a thread that owns a run of
    tiles from the first step on has them in its own memory.
    """
    nbytes = 4 * n
    if nbytes >= _HUGE_FROM:
        # Private: mmap's default is shared, which a forked child would write into, and has no huge pages.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        try:
            memory = mmap.mmap(-1, nbytes + _HUGE_PAGE + _PAGE, **private)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"cannot allocate {nbytes} bytes: {error}") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        raw = np.frombuffer(memory, np.uint8)
        start = -raw.ctypes.data % _HUGE_PAGE + next(_staggered)
    else:
        raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(np.float32)


def state_arrays(like: Sequence[Array], dtype: Any = np.float32, block: int = 1) -> list[Any]:
    """One array of `dtype` for each array in `like`, of its shape, all zeros.

    All lie in one allocation. Neighbours in memory get neighbouring states, so that the engine can walk
    them as one; every other state starts on a cache line, and so does one that would begin inside a `block` of
    elements.
    """
    engine = backends.engine()
    itemsize = np.dtype(dtype).itemsize
    offsets, end = engine.places(list(like), ALIGNMENT // itemsize, block)
    return engine.carve(zeros(-(-end * itemsize // 4)).view(dtype), list(like), offsets)


def scale_arrays(lengths: Sequence[int]) -> list[Any]:
    """One uint16 array of each of these lengths, one after the other in memory."""
    flat = zeros(-(-sum(lengths) // 2)).view(np.uint16)
    ends = itertools.accumulate(lengths, initial=0)
    return [flat[start : start + length] for start, length in zip(ends, lengths, strict=False)]


# --- The memory of an optimizer ---------------------------------------------------------------------------


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


def written_arrays(optimizer: Optimizer, without: Container[Any] = ()) -> list[tuple[Any, str]]:
    """Everything that a step writes, with labels; not the parameters under the keys in `without`."""
    tensors = optimizer._tensors
    written = [(tensor.array, tensor.label) for tensor in tensors if tensor.key not in without]
    for attribute, name, column in backends.engine().kept_beside(tensors, tuple(optimizer.spec.states)):
        what = _KEPT[attribute] if name is None else f"{_KEPT[attribute]} {name!r}"
        kept = zip(tensors, column, strict=True)
        written += [(array, f"{what} of {tensor.label}") for tensor, array in kept if array is not None]
    return written


def refuse_overlap(optimizer: Optimizer, labelled: Sequence[tuple[Any, str]]) -> None:
    """Explain which two of these arrays overlap."""
    found = optimizer._arrays.first_overlap([array for array, _ in labelled])
    if found is not None:
        (a, first), (b, second) = (labelled[k] for k in found)
        same = "are the same array" if a is b else "overlap in memory"
        raise ValueError(f"{type(optimizer).__name__}: {first} and {second} {same}")


class _Accumulated:
    """In the place of gradients: the sums of those that were accumulated."""

    def __repr__(self) -> str:
        return "<accumulated>"


ACCUMULATED: Any = _Accumulated()


# --- Gradients that the engine did not like ---------------------------------------------------------------


def parameter_label(key: Any) -> str:
    """What error messages call the parameter under `key`: a name, a position, or None where it is alone."""
    return "params" if key is None else f"params[{key!r}]"


def _gradient_label(optimizer: Optimizer, index: int) -> str:
    return f"{type(optimizer).__name__}: " + optimizer._tensors[index].label.replace("params", "grads", 1)


def check_gradient(optimizer: Optimizer, index: int, gradient: Any) -> tuple[np.ndarray, str]:
    """Raise TypeError or ValueError unless `gradient` fits parameter number `index`; return it and what it holds.

    A NumPy scalar, which reductions return in the place of arrays of shape (), becomes a read-only array.
    """
    shape = optimizer._tensors[index].shape
    what = _gradient_label(optimizer, index)
    if issubclass(type(gradient), np.generic):
        gradient = np.asarray(gradient)
        gradient.flags.writeable = False
    if is_array(gradient):
        dtype = np.ndarray.view(gradient, np.ndarray).dtype  # not what a subclass says
        name = dtype.name
        if name == "uint16" and optimizer.grad_dtype == "bfloat16":
            name = "bfloat16"
        if name in ("float16", "bfloat16"):
            check_array(gradient, what, shape=shape, dtypes=(dtype.type,), writable=False)
            return gradient, name
        if name == "uint16":
            raise TypeError(f"{what} is uint16; with grad_dtype='bfloat16' at construction that means bfloat16")
    check_array(gradient, what, shape=shape, writable=False)
    return gradient, "float32"


def refuse_changed_parameter(optimizer: Optimizer, index: int) -> NoReturn:
    """Explain a parameter that is no longer what the optimizer was given."""
    tensor = optimizer._tensors[index]
    optimizer._check_parameter(tensor.array, tensor.label, tensor.shape)
    raise ValueError(f"{type(optimizer).__name__}: the memory of {tensor.label} was reallocated since it was given")


def gradient_mapping(optimizer: Optimizer, gradients: Any) -> dict[str, Any]:
    """Turn a mapping that is not a dict into one."""
    if isinstance(gradients, FlatBuffer):
        return gradients._views
    if isinstance(gradients, Mapping):
        return dict(gradients)
    raise TypeError(
        f"{type(optimizer).__name__}: grads must be a dict with the names of params, got {describe(gradients)}"
    )


def gradient_list(optimizer: Optimizer, gradients: Any) -> list[Any]:
    """Turn a sequence that is not a list into one."""
    if isinstance(gradients, Sequence) and not isinstance(gradients, str | bytes):
        return list(gradients)
    raise TypeError(
        f"{type(optimizer).__name__}: grads must be a list with one float32 array or None for each of "
        f"{len(optimizer._tensors)} parameters, got {describe(gradients)}"
    )


def refuse_gradient_names(optimizer: Optimizer, gradients: Mapping[str, Any]) -> NoReturn:
    """Explain gradients whose names are not those of the parameters."""
    names = set(optimizer._names or ())
    missing = [name for name in optimizer._names or () if name not in gradients]
    unknown = [name for name in gradients if name not in names]
    raise ValueError(
        f"{type(optimizer).__name__}: grads must have the names of params"
        + (f", missing {few(missing)}" if missing else "")
        + (f", unknown {few(unknown)}" if unknown else "")
    )


def few(names: Sequence[Any]) -> str:
    """The first of `names`, for an error message."""
    return f"{list(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def refuse_gradient_count(optimizer: Optimizer, gradients: Sequence[Any]) -> NoReturn:
    """Explain a wrong number of gradients."""
    raise ValueError(
        f"{type(optimizer).__name__}: grads must have one entry for each of {len(optimizer._tensors)} "
        f"parameters, got {len(gradients)}"
    )


def refuse_overlapping_gradient(optimizer: Optimizer, index: int, gradient: Any) -> NoReturn:
    """Explain a gradient in memory that the step writes."""
    what, other = _gradient_label(optimizer, index), "memory that the step writes"
    for array, label in written_arrays(optimizer):
        if optimizer._arrays.first_overlap([gradient, array]) is not None:
            other = label
            break
    raise ValueError(f"{what} overlaps {other} in memory")


def refuse_read_only_gradient(optimizer: Optimizer, index: int) -> NoReturn:
    """Explain a gradient that cannot be zeroed."""
    raise ValueError(f"{_gradient_label(optimizer, index)} must be writable for zero_grads, got a read-only array")


def refuse_shared_gradients(optimizer: Optimizer, first: int, second: int) -> NoReturn:
    """Explain gradients of which one would be zeroed before the other is read."""
    raise ValueError(
        f"{_gradient_label(optimizer, first)} and {optimizer._tensors[second].label.replace('params', 'grads', 1)} "
        "overlap in memory, and zero_grads would zero one before the other is read"
    )


def refuse_step(optimizer: Optimizer, index: int, step: int) -> NoReturn:
    """Explain a step count that was set to nonsense."""
    label = optimizer._tensors[index].label
    raise ValueError(f"{type(optimizer).__name__}: the step count of {label} must be >= 0 and below 2**53, got {step}")


def refuse_scalars(optimizer: Optimizer, index: int, step: int) -> NoReturn:
    """Explain hyperparameters that together leave float32's range."""
    tensor = optimizer._tensors[index]
    group = {k: v for k, v in optimizer.param_groups[tensor.group].items() if k in optimizer.spec.hypers}
    raise ValueError(
        f"{type(optimizer).__name__}: at step {step} of {tensor.label} the hyperparameters {group} give a factor "
        "outside the range of float32"
    )


def refuse_missing_gradients(optimizer: Optimizer) -> NoReturn:
    """Explain a step without gradients that has nothing to take in their place."""
    raise RuntimeError(f"{type(optimizer).__name__}: step() needs grads where none were given to accumulate() before")


def refuse_pending_gradients(optimizer: Optimizer, what: str) -> NoReturn:
    """Explain an operation that would lose accumulated gradients, or leave them out."""
    raise RuntimeError(
        f"{type(optimizer).__name__}: {what} while gradients are accumulated: step() without grads uses them, "
        "discard_accumulated() drops them"
    )


# --- FlatBuffer -------------------------------------------------------------------------------------------


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
            shapes[sys.intern(name)] = _shape(name, tensor)  # so that equal names are the same object
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
            if is_array(tensor) or backends.lives_on_gpu(tensor):
                self._put(name, tensor)

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
        if values is view:  # an operation in place has written already
            return
        if isinstance(values, np.float32):
            values = np.asarray(values)
        shape = backends.resolve(self.backend).arrays.shape_of(view)
        has_values = is_array(values) or backends.lives_on_gpu(values)
        if not has_values or _shape(name, values) != shape:
            error = ValueError if has_values else TypeError
            raise error(f"FlatBuffer: {name!r} must be set to float32 of shape {shape}, got {describe(values)}")
        self._put(name, values)

    def _put(self, name: str, values: Any) -> None:
        """Copy a checked array into the buffer."""
        values = values if isinstance(values, np.ndarray) else backends.resolve("cuda").arrays.fetch(values)
        backends.resolve(self.backend).arrays.put(self._views[name], values)

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
    if backends.lives_on_gpu(tensor):
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
