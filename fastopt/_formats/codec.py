"""What a codec is, and the codec of float32: nothing to do."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastopt._formats.constants import CODE_BLOCK
from fastopt._formats.dither import Random

NO_SCALES = np.zeros(0, np.uint16)


def flushed(x: np.ndarray) -> np.ndarray:
    """`x` with zeros for subnormal numbers, of the same sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


class Codec:
    """How an array of float32 numbers is kept.

    Arrays of codes have the shape of what they stand for. `scales` is one uint16 for every block of elements, where
    there are any; other codecs have none, an empty array.
    """

    name = "float32"
    """Of the format; generators have a text for each."""
    dtype: np.dtype = np.dtype(np.float32)
    """Of arrays of codes."""
    is_bfloat16 = False
    """Whether they have the type bfloat16 where there is one."""
    is_rounded = False
    """Whether encoding rounds, and so draws random bits."""
    has_scales = False

    @property
    def block(self) -> int:
        """Elements that an array is divided into: a step never takes less of it, but at its end."""
        return CODE_BLOCK if self.has_scales else 1

    @property
    def bytes_per_element(self) -> float:
        """Of memory, scales included."""
        return self.dtype.itemsize + (2 / self.block if self.has_scales else 0)

    def n_scales(self, n: int) -> int:
        """Number of scales for `n` elements."""
        return -(-n // self.block) if self.has_scales else 0

    def decode(self, codes: np.ndarray, scales: np.ndarray = NO_SCALES) -> np.ndarray:  # noqa: ARG002
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
        return values.copy(), NO_SCALES

    def check_scales(self, scales: Any, what: str, n: int) -> None:
        """Raise TypeError or ValueError unless `scales` are ones for `n` elements, where codes have any."""
