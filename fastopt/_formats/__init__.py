"""States in low precision, in NumPy: what the kernels' codecs (`kernels/state_codecs.h`, with the reasons) must equal.

The compiled step decodes and encodes on its own; this is the reference backend's and the tests' text, and what
loads, converts and shows states.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

STATE_DTYPES = ("float32", "bfloat16", "8bit")
BLOCK = 64
"""Elements of a tensor that share a scale in 8 bits, and elements that share random bits."""
FLAGGED = 0x100
"""In a scale: the block holds inf or NaN."""

_LARGEST_SCALE = 254
_LOWERED_EVERY = 16
_TINY = np.finfo(np.float32).tiny
_NO_SCALES = np.zeros(0, np.uint16)


class Random(NamedTuple):
    """Where a rounding takes its random bits from."""

    seed: int
    step: int
    """Number of the step that rounds, 1 is the first."""
    offset: int
    """Index of the array's first element among all elements of the optimizer."""
    position: int
    """Of the state among those that its kernel uses."""


def _finalize(x: Any) -> Any:
    """The finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def dither_key(seed: int, step: int) -> np.uint64:
    """What the rounding of one step draws its bits from."""
    with np.errstate(over="ignore"):
        key = _finalize(np.uint64(seed) + _GOLDEN) ^ np.uint64(step)
        return _finalize(key + _GOLDEN)


def dither(random: Random, first: np.ndarray) -> np.ndarray:
    """20 random bits, uint32, for each run of elements that starts at one of `first`."""
    with np.errstate(over="ignore"):
        key = dither_key(random.seed, random.step)
        bits = _finalize(key + first.astype(np.uint64) * _GOLDEN)
    return (bits >> np.uint64(20 * random.position) & np.uint64(0xFFFFF)).astype(np.uint32)


_LANES = np.array([int(f"{lane:06b}"[::-1], 2) << 14 for lane in range(BLOCK)], np.uint32)


def _flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)


class Codec:
    """How an array of float32 numbers is kept.

    Arrays of codes have the shape of what they stand for. `scales` is one uint16 for every 64 elements, in 8
    bits; other codecs have none, an empty array.
    """

    dtype: np.dtype = np.dtype(np.float32)
    has_scales = False

    @property
    def bytes_per_element(self) -> float:
        """Of memory, scales included."""
        return self.dtype.itemsize + (2 / BLOCK if self.has_scales else 0)

    def n_scales(self, n: int) -> int:
        """Number of scales for `n` elements."""
        return -(-n // BLOCK) if self.has_scales else 0

    def decode(self, codes: np.ndarray, scales: np.ndarray = _NO_SCALES) -> np.ndarray:  # noqa: ARG002
        """The float32 numbers that `codes` stand for; a new array."""
        return codes.copy()

    def encode(
        self,
        values: np.ndarray,
        random: Random | None = None,  # noqa: ARG002
        scales: np.ndarray | None = None,  # noqa: ARG002
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales for float32 `values`.

        Parameters
        ----------
        random
            Of the stochastic rounding; None rounds to nearest.
        scales
            Those of the codes that these replace, where they still fit; None chooses all anew.
        """
        return values.copy(), _NO_SCALES


class Bfloat16(Codec):
    """The upper half of a float32, as uint16."""

    dtype = np.dtype(np.uint16)

    def decode(self, codes: np.ndarray, scales: np.ndarray = _NO_SCALES) -> np.ndarray:  # noqa: ARG002
        return _flushed((codes.view(np.uint16).astype(np.uint32) << 16).view(np.float32))

    def encode(
        self,
        values: np.ndarray,
        random: Random | None = None,
        scales: np.ndarray | None = None,  # noqa: ARG002
    ) -> tuple[np.ndarray, np.ndarray]:
        values = _flushed(values)
        bits = values.view(np.uint32)
        if random is None:
            added = 0x7FFF + (bits >> 16 & 1)
        else:
            element = random.offset + np.arange(values.size)
            added = (_LANES[element % BLOCK] ^ dither(random, element - element % BLOCK)) >> 4
            added = added.reshape(values.shape)
        with np.errstate(over="ignore"):
            rounded = (bits + added) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16), _NO_SCALES


class EightBit(Codec):
    """Blocks of 64 one-byte floats under a common scale, with a sign or without."""

    dtype = np.dtype(np.uint8)
    has_scales = True

    def __init__(self, is_signed: bool) -> None:
        self.is_signed = is_signed
        self.binades = 15 if is_signed else 31
        """Between the top binade and the one of delta."""
        self.smallest_scale = self.binades + 4
        self.largest_code = 127 if is_signed else 255

    def _unit(self, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bits of the unit, and delta, of every block (as columns)."""
        base = ((scales & 0xFF).astype(np.uint32) - self.binades) << 23
        unit = base.view(np.float32)
        return base[:, None], (unit if self.is_signed else unit * np.float32(0.9375))[:, None]

    def decode(self, codes: np.ndarray, scales: np.ndarray = _NO_SCALES) -> np.ndarray:
        blocks = self._in_order(codes.ravel())
        base, delta = self._unit(scales)
        magnitude = blocks & self.largest_code
        with np.errstate(all="ignore"):
            values = _flushed(((magnitude.astype(np.uint32) << 20) + base).view(np.float32) - delta)
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
        x = np.zeros((n, BLOCK), np.float32)
        x.ravel()[: values.size] = _flushed(values).ravel()
        if random is None:
            added = np.full((n, BLOCK), 0x80000, np.uint32)
            lowers = np.zeros(n, bool)
        else:
            first = random.offset + BLOCK * np.arange(n)
            added = _LANES ^ dither(random, first)[:, None]
            lowers = (first // BLOCK + random.step) % _LOWERED_EVERY == 0
        finite = np.isfinite(x)
        with np.errstate(all="ignore"):
            counts = finite & (x > 0) if not self.is_signed else finite
            largest = np.where(counts, np.abs(x), 0).max(axis=1, initial=0).astype(np.float32)
            fitting = (largest.view(np.uint32) + 0x3FFFFF >> 23) + (1 if self.is_signed else 2)
            chosen = np.clip(fitting, self.smallest_scale, _LARGEST_SCALE).astype(np.uint16)
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
        return (y.view(np.uint32).astype(np.int64) + added - base) >> 20

    @staticmethod
    def _in_order(codes: np.ndarray, n: int = 0, back: bool = False) -> np.ndarray:
        """Stored bytes as blocks of elements in their order; or back, `n` of them. A short block is not permuted."""
        n = n or codes.size
        full = n // BLOCK
        blocks = np.zeros((-(-n // BLOCK), BLOCK), np.uint8)
        blocks.ravel()[: codes.size] = codes
        shape = (full, 4, 16) if back else (full, 16, 4)
        blocks[:full] = blocks[:full].reshape(shape).transpose(0, 2, 1).reshape(full, BLOCK)
        return blocks.ravel()[:n] if back else blocks

    def check_scales(self, scales: Any, what: str, n: int) -> None:
        """Raise TypeError or ValueError unless `scales` are ones for `n` elements."""
        wanted = f"{what} must be uint16 of shape ({self.n_scales(n)},)"
        if not isinstance(scales, np.ndarray) or scales.dtype != np.uint16 or scales.shape != (self.n_scales(n),):
            got = f"{scales.dtype} of shape {scales.shape}" if isinstance(scales, np.ndarray) else type(scales).__name__
            raise TypeError(f"{wanted}, got {got}")
        exponents = scales & 0xFF
        if ((exponents < self.smallest_scale) | (exponents > _LARGEST_SCALE) | (scales >= 2 * FLAGGED)).any():
            raise ValueError(f"{wanted} with exponents in [{self.smallest_scale}, {_LARGEST_SCALE}], got others")


@functools.cache
def codec(state_dtype: str, kind: str) -> Codec:
    """How a state of `kind` (`STATE_KINDS`) is kept under `state_dtype`."""
    if state_dtype == "float32":
        return Codec()
    if state_dtype == "bfloat16" or kind == "weights":
        return Bfloat16()
    return EightBit(kind == "signed")


# --- Split parameters


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
