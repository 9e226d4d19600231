"""The operations of `fastopt.backends.cuda.operations` as Python functions, for Numba's simulator.

Integers are Python's, cut to size by `uint32` and `uint64`; addresses are of the host's memory.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = [
    *("add", "add64", "bits", "device", "div", "div64", "float64", "from_bits", "int32", "int64", "load_f32"),
    *(
        "load_f32x4",
        "load_f64",
        "load_i32",
        "load_i64",
        "load_u16",
        "load_u16x4",
        "load_u32x2",
        "load_u32x4",
        "load_u8",
        "mul",
    ),
    *("mul", "mul64", "narrowed", "reverse", "shuffle_f64", "shuffle_u32", "sqrt", "sqrt64", "store_f32"),
    *("store_f32x4", "store_f64", "store_i32", "store_u16", "store_u16x4", "store_u32x4", "store_u8", "uint32"),
    *("uint64", "widened"),
]

_TINY = np.finfo(np.float32).tiny
_SCALE = 2.0**64


def device(signature: str) -> Callable[[Callable], Callable]:  # noqa: ARG001  of the compiler alone
    """The function itself."""
    return lambda function: function


def uint32(x: Any) -> int:
    return int(x) & 0xFFFFFFFF


def uint64(x: Any) -> int:
    return int(x) & 0xFFFFFFFFFFFFFFFF


def int32(x: Any) -> int:
    return (int(x) + 0x80000000 & 0xFFFFFFFF) - 0x80000000


def int64(x: Any) -> int:
    return int(x)


float64 = np.float64


def _flushed(x: np.float32) -> np.float32:
    return np.copysign(np.float32(0), x) if abs(x) < _TINY else x


def _rounded(exact: np.float64, single: np.float32) -> np.float32:
    """`single`, or zero if `exact` is tiny after rounding to 24 bits, however small."""
    if abs(single) > 2 * _TINY or single != single:
        return single
    if abs(np.float32(exact * _SCALE)) < np.float32(_TINY * _SCALE):
        return np.copysign(np.float32(0), single)
    return single


def _operation(of: Callable) -> Callable:
    def operation(*arguments: np.float32) -> np.float32:
        with np.errstate(all="ignore"):
            flushed = [_flushed(np.float32(x)) for x in arguments]
            return _rounded(of(*map(np.float64, flushed)), of(*flushed))

    return operation


def _operation64(of: Callable) -> Callable:
    def operation(*arguments: float) -> np.float64:
        with np.errstate(all="ignore"):
            return of(*map(np.float64, arguments))

    return operation


add, mul, div, sqrt = (_operation(of) for of in (np.add, np.multiply, np.divide, np.sqrt))
add64, mul64, div64, sqrt64 = (_operation64(of) for of in (np.add, np.multiply, np.divide, np.sqrt))


def bits(x: np.float32) -> int:
    return int(np.float32(x).view(np.uint32))


def from_bits(x: int) -> np.float32:
    return np.uint32(x).view(np.float32)


def widened(x: np.float32) -> np.float64:
    return np.float64(x)


def narrowed(x: float) -> np.float32:
    with np.errstate(all="ignore"):
        return np.float32(x)


def reverse(x: int) -> int:
    return int(f"{x:032b}"[::-1], 2)


def _loader(kind: Any, n: int, made: Callable) -> Callable:
    def load(address: int) -> Any:
        if address % (ctypes.sizeof(kind) * n):
            raise AssertionError(f"an access of {ctypes.sizeof(kind) * n} bytes at {address:#x}")
        values = (kind * n).from_address(address)
        return made(values[0]) if n == 1 else tuple(map(made, values))

    return load


def _storer(kind: Any, n: int, made: Callable) -> Callable:
    def store(address: int, *values: Any) -> None:
        if address % (ctypes.sizeof(kind) * n):
            raise AssertionError(f"an access of {ctypes.sizeof(kind) * n} bytes at {address:#x}")
        (kind * n).from_address(address)[:] = [made(value) for value in values]

    return store


def _float32(word: int) -> np.float32:
    return np.uint32(word).view(np.float32)


# Floats go by their bits: through ctypes' float a signalling NaN would change.
load_f32, load_f32x4 = (_loader(ctypes.c_uint32, n, _float32) for n in (1, 4))
load_f64 = _loader(ctypes.c_double, 1, np.float64)
load_i64, load_i32 = _loader(ctypes.c_int64, 1, int), _loader(ctypes.c_int32, 1, int)
load_u32x2, load_u32x4 = (_loader(ctypes.c_uint32, n, int) for n in (2, 4))
load_u16, load_u16x4 = (_loader(ctypes.c_uint16, n, int) for n in (1, 4))
load_u8 = _loader(ctypes.c_uint8, 1, int)
store_f32, store_f32x4 = (_storer(ctypes.c_uint32, n, bits) for n in (1, 4))
store_f64, store_i32 = _storer(ctypes.c_double, 1, float), _storer(ctypes.c_int32, 1, int)
store_u32x4 = _storer(ctypes.c_uint32, 4, int)
store_u16, store_u16x4 = (_storer(ctypes.c_uint16, n, lambda x: int(x) & 0xFFFF) for n in (1, 4))
store_u8 = _storer(ctypes.c_uint8, 1, lambda x: int(x) & 0xFF)


def _shuffled(x: Any, distance: int) -> Any:
    thread: Any = threading.current_thread()
    slots = thread._manager.__dict__.setdefault("shuffled", {})
    slots[thread.thread_id] = x
    thread.syncthreads()
    result = slots[thread.thread_id ^ distance]
    thread.syncthreads()
    return result


shuffle_u32 = shuffle_f64 = _shuffled
