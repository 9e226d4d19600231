"""bfloat16, in NumPy."""

from __future__ import annotations

import numpy as np

from fastopt._formats.codec import NO_SCALES, Codec, flushed
from fastopt._formats.constants import CODE_BLOCK, RANDOM_BITS
from fastopt._formats.dither import STRATA, Random, dither


class Bfloat16(Codec):
    """The upper half of a float32, as uint16."""

    name = "bfloat16"
    dtype = np.dtype(np.uint16)
    is_bfloat16 = True
    is_rounded = True

    def decode(self, codes: np.ndarray, scales: np.ndarray = NO_SCALES) -> np.ndarray:  # noqa: ARG002
        return flushed((codes.view(np.uint16).astype(np.uint32) << 16).view(np.float32))

    def encode(
        self,
        values: np.ndarray,
        random: Random | None = None,
        scales: np.ndarray | None = None,  # noqa: ARG002
    ) -> tuple[np.ndarray, np.ndarray]:
        values = flushed(values)
        bits = values.view(np.uint32)
        if random is None:
            added = 0x7FFF + (bits >> 16 & 1)
        else:
            element = random.offset + np.arange(values.size)
            added = (STRATA[element % CODE_BLOCK] ^ dither(random, element - element % CODE_BLOCK)) >> RANDOM_BITS - 16
            added = added.reshape(values.shape)
        with np.errstate(over="ignore"):
            rounded = (bits + added) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16), NO_SCALES
