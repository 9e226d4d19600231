"""Parameters in two halves, a bfloat16 and the 16 bits that it lacks, in NumPy."""

from __future__ import annotations

import numpy as np


def join(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The float32 parameters whose bfloat16 half is `high`; exact."""
    bits = np.empty(high.shape, np.uint32)
    np.left_shift(high.view(np.uint16).astype(np.uint32), 16, out=bits)
    bits += low.view(np.int16).astype(np.int32).view(np.uint32)
    return bits.view(np.float32)


def split(values: np.ndarray, high: np.ndarray, low: np.ndarray) -> None:
    """Write float32 `values` as the nearest bfloat16 (halfway away from zero) and the 16 bits that it lacks."""
    bits = values.view(np.uint32)
    with np.errstate(over="ignore"):
        rounded = (bits + np.uint32(0x8000)) >> 16
    high.view(np.uint16)[...] = np.where(np.isnan(values), 0x7FC0, rounded)
    low[...] = np.where(np.isnan(values), 0, bits & 0xFFFF)
