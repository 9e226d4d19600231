"""The validation of arrays: what a kernel can work on in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastopt._arrays.kinds import is_array
from fastopt._messages import describe, remedy


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
