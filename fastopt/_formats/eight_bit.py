"""8 bits: blocks of codes under a common scale, in NumPy. The format is explained in `kernels/state_codecs.h`."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastopt._formats.codec import NO_SCALES, Codec, flushed
from fastopt._formats.constants import (
    CODE_BLOCK,
    CODE_SHIFT,
    FLAGGED,
    LARGEST_SCALE,
    LOWERED_EVERY,
    SIGNED_BINADES,
    SIGNED_HEADROOM,
    SIGNED_LARGEST_CODE,
    SIGNED_SMALLEST_SCALE,
    UNSIGNED_BINADES,
    UNSIGNED_HEADROOM,
    UNSIGNED_LARGEST_CODE,
    UNSIGNED_SMALLEST_SCALE,
)
from fastopt._formats.dither import STRATA, Random, dither


class EightBit(Codec):
    """Blocks of 64 one-byte floats under a common scale, with a sign or without."""

    name = "8bit"
    dtype = np.dtype(np.uint8)
    is_rounded = True
    has_scales = True

    def __init__(self, is_signed: bool) -> None:
        self.is_signed = is_signed
        self.binades = SIGNED_BINADES if is_signed else UNSIGNED_BINADES
        self.smallest_scale = SIGNED_SMALLEST_SCALE if is_signed else UNSIGNED_SMALLEST_SCALE
        self.largest_code = SIGNED_LARGEST_CODE if is_signed else UNSIGNED_LARGEST_CODE
        self.headroom = SIGNED_HEADROOM if is_signed else UNSIGNED_HEADROOM

    def _unit(self, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bits of the unit, and delta, of every block (as columns)."""
        base = ((scales & 0xFF).astype(np.uint32) - self.binades) << 23
        unit = base.view(np.float32)
        return base[:, None], (unit if self.is_signed else unit * np.float32(0.9375))[:, None]

    def decode(self, codes: np.ndarray, scales: np.ndarray = NO_SCALES) -> np.ndarray:
        blocks = self._in_order(codes.ravel())
        base, delta = self._unit(scales)
        magnitude = blocks & self.largest_code
        with np.errstate(all="ignore"):
            values = flushed(((magnitude.astype(np.uint32) << CODE_SHIFT) + base).view(np.float32) - delta)
        flagged = (scales & FLAGGED != 0)[:, None]
        values = np.where(flagged & (magnitude == self.largest_code - 1), np.float32(np.inf), values)
        values = np.where(flagged & (magnitude == self.largest_code), np.float32(np.nan), values)
        if self.is_signed:
            values = np.where(blocks & 0x80 != 0, -values, values)
        return values.ravel()[: codes.size].reshape(codes.shape)

    def encode(
        self, values: np.ndarray, random: Random | None = None, scales: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        n = self.n_scales(values.size)
        x = np.zeros((n, CODE_BLOCK), np.float32)
        x.ravel()[: values.size] = flushed(values).ravel()
        if random is None:
            added = np.full((n, CODE_BLOCK), 1 << CODE_SHIFT - 1, np.uint32)
            lowers = np.zeros(n, bool)
        else:
            first = random.offset + CODE_BLOCK * np.arange(n)
            added = STRATA ^ dither(random, first)[:, None]
            lowers = (first // CODE_BLOCK + random.step) % LOWERED_EVERY == 0
        finite = np.isfinite(x)
        with np.errstate(all="ignore"):
            counts = finite & (x > 0) if not self.is_signed else finite
            largest = np.where(counts, np.abs(x), 0).max(axis=1, initial=0).astype(np.float32)
            fitting = (largest.view(np.uint32) + 0x3FFFFF >> 23) + self.headroom
            chosen = np.clip(fitting, self.smallest_scale, LARGEST_SCALE).astype(np.uint16)
            chosen[~finite.all(axis=1)] |= FLAGGED
            if scales is not None:
                highest = np.where(finite, self._encoded(x, scales, added), 1 << 31).max(axis=1, initial=0)
                fits = (scales & FLAGGED == 0) & (highest <= self.largest_code)
                low = lowers & (highest <= self.largest_code // 2) & (scales > self.smallest_scale)
                chosen = np.where(fits & ~low, scales, chosen)
            limit = self.largest_code - np.where(chosen & FLAGGED != 0, 2, 0)[:, None]
            codes = np.minimum(self._encoded(x, chosen, added), limit)
            infinite = np.isinf(x) if self.is_signed else x == np.inf
            codes = np.where(finite, codes, limit + np.where(infinite, 1, 2))
        if self.is_signed:
            codes |= np.signbit(x).astype(np.int64) << 7
        return self._in_order(codes.astype(np.uint8).ravel(), values.size, back=True).reshape(values.shape), chosen

    def _encoded(self, x: np.ndarray, scales: np.ndarray, added: np.ndarray) -> np.ndarray:
        """Codes under `scales`, int64, however large."""
        base, delta = self._unit(scales)
        y = np.abs(x) + delta if self.is_signed else np.maximum(x + delta, base.view(np.float32))
        return (y.view(np.uint32).astype(np.int64) + added - base) >> CODE_SHIFT

    @staticmethod
    def _in_order(codes: np.ndarray, n: int = 0, back: bool = False) -> np.ndarray:
        """Stored bytes as blocks of elements in their order; or back, `n` of them. A short block is not permuted."""
        n = n or codes.size
        full = n // CODE_BLOCK
        blocks = np.zeros((-(-n // CODE_BLOCK), CODE_BLOCK), np.uint8)
        blocks.ravel()[: codes.size] = codes
        shape = (full, 4, 16) if back else (full, 16, 4)
        blocks[:full] = blocks[:full].reshape(shape).transpose(0, 2, 1).reshape(full, CODE_BLOCK)
        return blocks.ravel()[:n] if back else blocks

    def check_scales(self, scales: Any, what: str, n: int) -> None:
        """Raise TypeError or ValueError unless `scales` are ones for `n` elements."""
        wanted = f"{what} must be uint16 of shape ({self.n_scales(n)},)"
        if not isinstance(scales, np.ndarray) or scales.dtype != np.uint16 or scales.shape != (self.n_scales(n),):
            got = f"{scales.dtype} of shape {scales.shape}" if isinstance(scales, np.ndarray) else type(scales).__name__
            raise TypeError(f"{wanted}, got {got}")
        exponents = scales & 0xFF
        if ((exponents < self.smallest_scale) | (exponents > LARGEST_SCALE) | (scales >= 2 * FLAGGED)).any():
            raise ValueError(f"{wanted} with exponents in [{self.smallest_scale}, {LARGEST_SCALE}], got others")
