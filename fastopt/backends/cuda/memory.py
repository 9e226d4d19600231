"""Memory of the device: what callers' arrays are, the optimizer's own, and copies between host and device.

Arrays of Numba, CuPy, PyTorch, or anything else with ``__cuda_array_interface__`` are taken as they are; nothing of
those packages is imported. Inside, an array is an address.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from fastopt import _messages
from fastopt.backends.cuda.operations import SIMULATED

if SIMULATED:
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
else:
    from cuda.bindings import driver as bindings
    from numba.cuda.cudadrv.devicearray import DeviceNDArray
    from numba.cuda.cudadrv.driver import driver

ALIGNMENT = 256
"""Bytes; where the optimizer's own arrays start."""
WHERE = "an array on the GPU"


class Seen(NamedTuple):
    """What there is to know of an array on the device."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    is_contiguous: bool
    is_writable: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def is_device_array(value: Any) -> bool:
    """Whether `value` lies on a GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return bool(value.is_cuda)
    if isinstance(value, np.ndarray):
        return False
    if SIMULATED:
        return isinstance(value, FakeCUDAArray)
    return hasattr(value, "__cuda_array_interface__")


def look(value: Any) -> Seen | None:
    """What `value` is, or None if it is no array on a GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if not value.is_cuda or value.layout is not torch.strided:
            return None
        dtype = str(value.dtype).removeprefix("torch.")
        return Seen(value.data_ptr(), tuple(value.shape), dtype, value.is_contiguous(), True)
    if not is_device_array(value):
        return None
    if SIMULATED:
        array = value._ary
        flags = array.flags
        return Seen(array.ctypes.data, array.shape, array.dtype.name, flags.c_contiguous, flags.writeable)
    interface = value.__cuda_array_interface__
    if interface.get("mask") is not None:
        return None
    address, is_read_only = interface["data"]
    shape = tuple(interface["shape"])
    kind, name, expected = _dtype_of(interface["typestr"])
    if kind == "V" and str(getattr(value, "dtype", "")) == "bfloat16":
        name = "bfloat16"
    strides = interface.get("strides")
    is_contiguous = True
    if strides is not None and 0 not in shape:
        for length, stride in zip(reversed(shape), reversed(strides), strict=True):
            is_contiguous = is_contiguous and (length == 1 or stride == expected)
            expected *= length
    return Seen(address, shape, name, is_contiguous, not is_read_only)


@functools.cache
def _dtype_of(typestr: str) -> tuple[str, str, int]:
    """Kind, name and bytes of an element."""
    dtype = np.dtype(typestr)
    return dtype.kind, dtype.name if dtype.isnative else dtype.str, dtype.itemsize


def check_array(
    value: Any,
    what: str,
    *,
    shape: tuple[int, ...] | None = None,
    dtypes: tuple[Any, ...] = (np.float32,),
    writable: bool = True,
) -> None:
    """Raise TypeError or ValueError unless `value` is an array that a kernel can work on in place."""
    checked(value, what, shape=shape, dtypes=tuple(np.dtype(dtype).name for dtype in dtypes), writable=writable)


def checked(
    value: Any, what: str, *, shape: tuple[int, ...] | None, dtypes: tuple[str, ...], writable: bool = True
) -> Seen:
    """What `value` is, if it can be worked on in place; dtypes by their names."""
    seen = look(value)
    wanted = " or ".join(dtypes) + (f" of shape {shape}" if shape is not None else "")
    if seen is None:
        got = "a NumPy array, " if isinstance(value, np.ndarray) else ""
        got += _messages.describe(value)
        if hasattr(value, "device") and not isinstance(value, np.ndarray):
            got += f" on {value.device}"
        raise TypeError(f"{what} must be {WHERE}, {wanted}, got {got}")
    got = f"{seen.dtype} of shape {seen.shape}"
    if seen.dtype not in dtypes:
        raise TypeError(f"{what} must be {wanted}, got {got}")
    if shape is not None and seen.shape != shape:
        raise ValueError(f"{what} must be {wanted}, got {got}")
    if not seen.is_contiguous:
        raise ValueError(f"{what} must be C-contiguous; fastopt works in place and makes no copies")
    itemsize = 4 if seen.dtype == "float32" else np.dtype(seen.dtype).itemsize if seen.dtype != "bfloat16" else 2
    if seen.size and seen.address % itemsize:
        raise ValueError(f"{what} must be aligned to {itemsize} bytes, got data at {seen.address:#x}")
    if writable and not seen.is_writable:
        raise ValueError(f"{what} must be writable, got a read-only array")
    if writable:
        check_device(value, seen.address, what)
    return seen


def nbytes(array: Any) -> int:
    """Bytes of an array's elements."""
    seen = look(array)
    assert seen is not None
    return seen.size * (2 if seen.dtype == "bfloat16" else np.dtype(seen.dtype).itemsize)


def first_overlap(arrays: Sequence[Any]) -> tuple[int, int] | None:
    """Positions of two arrays that overlap in memory, or None."""
    ranges = []
    for position, array in enumerate(arrays):
        seen, length = look(array), nbytes(array)
        if seen is not None and length:
            ranges.append((seen.address, seen.address + length, position))
    ranges.sort()
    for before, after in itertools.pairwise(ranges):
        if after[0] < before[1]:
            first, second = sorted((before[2], after[2]))
            return first, second
    return None


# --- Devices and streams


def current_device() -> int:
    """Number of the GPU that this thread works on; the first call of a thread makes it ready."""
    if SIMULATED:
        return 0
    error, device = bindings.cuCtxGetDevice()
    return int(cuda.current_context().device.id) if int(error) else int(device)


def device_of(value: Any, address: int) -> int:
    """Number of the GPU that an array lies on."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return int(value.device.index)
    if SIMULATED or not address:
        return current_device()
    error, device = bindings.cuPointerGetAttribute(
        bindings.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address
    )
    return current_device() if int(error) else int(device)


def check_device(value: Any, address: int, what: str) -> None:
    """Raise ValueError unless an array lies on the GPU that this thread works on."""
    current, device = current_device(), device_of(value, address)
    if device != current:
        raise ValueError(
            f"{what} is on GPU {device}, but GPU {current} is current: change that with torch.cuda.set_device, "
            "cupy.cuda.Device.use or numba.cuda.select_device"
        )


def stream_of(arrays: Sequence[Any], asked: Any = None) -> int:
    """Handle of the stream to work on: the one asked for, or the current one of the arrays' package."""
    if asked is not None:
        return _handle(asked)
    torch = sys.modules.get("torch")
    for array in arrays:
        if torch is not None and isinstance(array, torch.Tensor):
            return int(torch.cuda.current_stream(array.device).cuda_stream)
        if type(array).__module__.partition(".")[0] == "cupy":
            return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
        break
    return 0


def _handle(stream: Any) -> int:
    for attribute in ("cuda_stream", "ptr", "handle"):  # PyTorch, CuPy, Numba
        value = getattr(stream, attribute, None)
        value = getattr(value, "value", value)
        if value is not None and hasattr(value, "__int__"):
            return int(value)
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1])
    if SIMULATED and isinstance(stream, cuda.stream):
        return 0
    if isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0:
        return stream
    got = _messages.describe(stream)
    raise TypeError(f"stream must be a stream of PyTorch, CuPy or Numba, or its handle, got {got}")


_streams: dict[int, Any] = {}


def numba_stream(handle: int) -> Any:
    """The stream as Numba takes it."""
    if handle == 0 or SIMULATED:
        return 0
    if handle not in _streams:
        _streams[handle] = cuda.external_stream(handle)
    return _streams[handle]


def is_capturing(handle: int) -> bool:
    """Whether what the stream is given goes into a graph instead of being run."""
    if SIMULATED:
        return False
    error, status = bindings.cuStreamIsCapturing(handle)
    if int(error):
        raise RuntimeError(
            f"the stream of the step cannot be used now: {error.name}. While a graph is captured, the step must be "
            "given to the stream of the capture: step(..., stream=)"
        )
    return int(status) != 0


class Kernel:
    """A kernel that is loaded on the current device. Numba's own launch takes five times as long."""

    def __init__(self, overload: Any, n_arguments: int) -> None:
        self._overload = overload  # which owns the code
        self._function = bindings.CUfunction(int(overload._codelibrary.get_cufunc().handle))
        self._values: Any = ctypes.c_int64 * n_arguments
        self._pointers: Any = ctypes.c_void_p * n_arguments

    def launch(self, n_blocks: int, n_threads: int, stream: int, arguments: Sequence[int]) -> None:
        values = self._values(*arguments)
        first = ctypes.addressof(values)
        pointers = self._pointers(*range(first, first + 8 * len(arguments), 8))
        _check(
            bindings.cuLaunchKernel(
                *(self._function, n_blocks, 1, 1, n_threads, 1, 1, 0, stream, ctypes.addressof(pointers), 0)
            )
        )


class Event:
    """A point in a stream."""

    def __init__(self) -> None:
        self._event = cuda.event() if SIMULATED else cuda.event(timing=False)

    def record(self, stream: int) -> None:
        if not SIMULATED:
            _check(bindings.cuEventRecord(self._event.handle, stream))

    def has_passed(self) -> bool:
        # Numba's own query raises and logs an error when the answer is no.
        return SIMULATED or int(bindings.cuEventQuery(self._event.handle)[0]) == 0

    def wait(self) -> None:
        """Until it has passed."""
        if not SIMULATED:
            _check(bindings.cuEventSynchronize(self._event.handle))


def _check(result: tuple[Any, ...]) -> None:
    """Raise RuntimeError for an error of the driver, which may be one of earlier work."""
    if int(result[0]):
        raise RuntimeError(f"the GPU's driver reports {result[0].name}")


# --- The optimizer's own arrays


def allocate(n_bytes: int) -> Any:
    """Zeroed bytes on the device, aligned to `ALIGNMENT`."""
    owner = cuda.device_array(n_bytes + ALIGNMENT, np.uint8)
    address = address_of(owner)
    if SIMULATED:
        owner._ary[...] = 0
    else:
        driver.cuMemsetD8(address, 0, n_bytes + ALIGNMENT)
        driver.cuStreamSynchronize(0)  # other streams need not wait for this one
    start = -address % ALIGNMENT
    return view(owner, start, (n_bytes,), np.dtype(np.uint8))


def address_of(array: Any) -> int:
    """Address of an array of our own, or of a caller's that was checked."""
    seen = look(array)
    assert seen is not None
    return seen.address


def view(owner: Any, start: int, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """An array in the bytes of `owner`, from byte `start` on."""
    length = math.prod(shape) * dtype.itemsize
    if SIMULATED:
        return FakeCUDAArray(owner._ary[start : start + length].view(dtype).reshape(shape))
    strides = tuple(dtype.itemsize * math.prod(shape[k + 1 :]) for k in range(len(shape)))
    return DeviceNDArray(shape, strides, dtype, gpu_data=owner.gpu_data.view(start, start + length))


def zeros(n: int) -> Any:
    """`n` float32 zeros."""
    return view(allocate(4 * n), 0, (n,), np.dtype(np.float32))


def part(flat: Any, start: int, shape: tuple[int, ...]) -> Any:
    """The elements of a flat float32 array from `start` on, as an array of `shape`."""
    if SIMULATED:
        return view(FakeCUDAArray(flat._ary.view(np.uint8)), 4 * start, shape, np.dtype(np.float32))
    return view(flat, 4 * start, shape, np.dtype(np.float32))


def state_arrays(like: Sequence[Any], dtype: Any = np.float32, block: int = 1) -> list[Any]:
    """One zeroed array of `dtype` for each array in `like`, of its shape; neighbours follow each other."""
    itemsize = np.dtype(dtype).itemsize
    seen = [look(array) for array in like]
    offsets, end, previous = [], 0, -1
    for one in seen:
        assert one is not None
        width = 4 if one.dtype == "float32" else 2
        if one.address != previous or end % block:
            end += -end % (ALIGNMENT // itemsize)
        previous = one.address + one.size * width
        offsets.append(end)
        end += one.size
    owner = allocate(end * itemsize)
    return [
        view(owner, offset * itemsize, one.shape, np.dtype(dtype))
        for offset, one in zip(offsets, seen, strict=True)
        if one is not None
    ]


def scale_arrays(lengths: Sequence[int]) -> list[Any]:
    """One zeroed uint16 array of each of these lengths, one after the other in memory."""
    owner = allocate(2 * sum(lengths))
    ends = np.cumsum([0, *lengths]).tolist()
    return [view(owner, 2 * end, (n,), np.dtype(np.uint16)) for end, n in zip(ends, lengths, strict=False)]


# --- Between host and device


def copy_in(address: int, host: np.ndarray, stream: int = 0) -> None:
    """Copy a C-contiguous host array to the device; asynchronous if the host array is pinned."""
    if not host.nbytes:
        return
    if SIMULATED:
        ctypes.memmove(address, host.ctypes.data, host.nbytes)
    else:
        _check(bindings.cuMemcpyHtoDAsync(address, host.ctypes.data, host.nbytes, stream))


def copy_out(host: np.ndarray, address: int, stream: int = 0) -> None:
    """Copy device memory to the host."""
    if not host.nbytes:
        return
    if SIMULATED:
        ctypes.memmove(host.ctypes.data, address, host.nbytes)
    else:
        _check(bindings.cuMemcpyDtoHAsync(host.ctypes.data, address, host.nbytes, stream))


def copy_within(destination: int, source: int, n_bytes: int, stream: int = 0) -> None:
    """Copy bytes from one place of the device to another."""
    if not n_bytes:
        return
    if SIMULATED:
        ctypes.memmove(destination, source, n_bytes)
    else:
        _check(bindings.cuMemcpyDtoDAsync(destination, source, n_bytes, stream))


def free_bytes() -> float:
    """Bytes of the device that nobody has; infinite under the simulator."""
    return math.inf if SIMULATED else float(cuda.current_context().get_memory_info().free)


def release() -> None:
    """Free the memory of arrays that are gone, which Numba puts off."""
    if not SIMULATED:
        cuda.current_context().deallocations.clear()


def synchronize() -> None:
    """Wait for everything the device was given."""
    cuda.synchronize()


def fetch(array: Any) -> np.ndarray:
    """The elements of a device array on the host, after everything the device was given; bfloat16 as uint16."""
    seen = look(array)
    assert seen is not None
    host = np.empty(seen.shape, np.uint16 if seen.dtype == "bfloat16" else seen.dtype)
    synchronize()
    copy_out(host, seen.address)
    synchronize()
    return host


def overwrite(array: Any, values: Any) -> None:
    """Overwrite a device array."""
    seen = look(array)
    assert seen is not None
    host = np.empty(seen.shape, np.uint16 if seen.dtype == "bfloat16" else seen.dtype)
    host[...] = values.view(host.dtype) if values.dtype != host.dtype and values.itemsize == host.itemsize else values
    synchronize()
    copy_in(seen.address, host)
    synchronize()


def pinned(n_bytes: int) -> np.ndarray:
    """Zeroed page-locked host memory, from which copies are asynchronous."""
    host = cuda.pinned_array(n_bytes, np.uint8)
    host[...] = 0
    return host


class Ring:
    """Page-locked buffers that are written one after the other, each again only when its copy is done."""

    def __init__(self, n_bytes: int, slots: int = 32) -> None:
        self._whole = pinned(n_bytes * slots)
        self._views = [part.data for part in np.split(self._whole, slots)]
        first = self._whole.ctypes.data
        self._addresses = [first + n_bytes * k for k in range(slots)]
        self._events: list[Event | None] = [None] * slots
        self._at = 0

    def send(self, payload: bytes, destination: int, stream: int) -> None:
        """Queue a copy of `payload` to the device."""
        at = self._at = (self._at + 1) % len(self._views)
        event = self._events[at]
        if event is None:
            event = self._events[at] = Event()
        else:
            event.wait()
        self._copy(at, payload, destination, stream)
        event.record(stream)

    def send_again_and_again(self, payload: bytes, destination: int, stream: int) -> None:
        """The same in a graph that is being captured: every replay reads the buffer, so nobody writes it again."""
        self._copy(0, payload, destination, stream)

    def _copy(self, at: int, payload: bytes, destination: int, stream: int) -> None:
        n = len(payload)
        self._views[at][:n] = payload
        if not n:
            return
        if SIMULATED:
            ctypes.memmove(destination, self._addresses[at], n)
        else:
            _check(bindings.cuMemcpyHtoDAsync(destination, self._addresses[at], n, stream))


def never_moves(array: Any) -> bool:
    """Whether this object's memory and shape are the same as long as it lives."""
    return type(array) is (FakeCUDAArray if SIMULATED else DeviceNDArray)


def prepare_capture() -> None:
    """Finish everything that must not happen while a graph is captured."""
    synchronize()
    release()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Numba's warnings of small grids: small tensors have small grids."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
