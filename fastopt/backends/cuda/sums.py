"""Gradients on the device: where those of the last call were, and float32 sums of them.

What is checked of a gradient, and when sums are used, is in `fastopt.backends.cuda.plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastopt.backends.cuda import kernels, layout, memory

_P, _GRADIENT, _STORAGE, _N, _ALIGNED, _FIRST_TILE = (
    offset // 8 for offset in (layout.P, layout.GRADIENT, layout.STORAGE, layout.N, layout.ALIGNED, layout.FIRST_TILE)
)


class Given:
    """Where the gradients of the last call were, and the rows of a table that have it."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        self.places: list[tuple[int, int]] = [(-1, 0)] * len(rows)
        """Address and storage."""
        self.known: list[Any] = [None] * len(rows)
        """Weak references to arrays that never move."""
        self.has_moved = True


class Sums:
    """Float32 sums of gradients, and what the launch that adds to them needs."""

    def __init__(self, arrays: Sequence[Any], sizes: Sequence[int]) -> None:
        self.arrays = arrays
        rows = np.zeros((len(arrays), layout.ROW // 8), np.int64)
        rows[:, _P] = list(map(memory.address_of, arrays))
        rows[:, _N] = sizes
        self.given = Given(rows)
        self.pending: tuple[int, frozenset[int]] = (0, frozenset())
        """Calls whose gradients no step has used, and the tensors that they were for."""
        self._table = memory.allocate(rows.nbytes)
        self._table_host = memory.Ring(rows.nbytes, 2)
        self._active: tuple[int, ...] = ()
        self._n_segments = self._n_tiles = 0

    def add(self, active: tuple[int, ...], stream: int) -> None:
        """Queue the addition of the gradients of `given`."""
        table = memory.address_of(self._table)
        if self.given.has_moved or active != self._active:
            rows = self.given.rows[list(active)]
            rows = rows[rows[:, _N] > 0]
            gradient = rows[:, _GRADIENT]
            wide = np.where(rows[:, _STORAGE] == layout.FLOAT32, 16, 8)
            rows[:, _ALIGNED] = (rows[:, _P] % 16 == 0) & (gradient % wide == 0)
            tiles = -(-rows[:, _N] // kernels.TILE)
            rows[:, _FIRST_TILE] = np.cumsum(tiles) - tiles
            self._table_host.send(rows.tobytes(), table, stream)
            self._active, self._n_segments, self._n_tiles = active, len(rows), int(tiles.sum())
            self.given.has_moved = False
        if self._n_tiles:
            blocks = min(self._n_tiles, kernels.MAX_BLOCKS)
            kernels.shared("accumulate_gradients").launch(blocks, stream, table, self._n_segments, self._n_tiles)
        n_calls, tensors = self.pending
        self.pending = n_calls + 1, tensors | set(active)
