"""The memory of states and buffers on the host: aligned, on huge pages, neighbours beside one another."""

from __future__ import annotations

import contextlib
import itertools
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastopt import backends
from fastopt._arrays.types import Array

ALIGNMENT = 64
"""Bytes; a cache line, and the widest vector."""
_HUGE_PAGE = 2 << 20
_HUGE_FROM = 4 << 20
_PAGE = 4 << 10
_staggered = itertools.cycle(range(0, _PAGE, 5 * ALIGNMENT))
"""Where in a page large arrays start, one after the other. A load whose address has the low 12 bits of a store under
way waits for it, and streams that are walked together at the same place of their pages meet all the time: Adam with
bfloat16 states was 14% slower at 1e7 parameters (with float32 states, level)."""


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
