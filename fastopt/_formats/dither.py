"""Random bits of stochastic rounding, in NumPy; why they are drawn so is in `kernels/state_codecs.h`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastopt._formats.constants import (
    CODE_BLOCK,
    RANDOM_BITS,
    SPLITMIX_FACTOR_1,
    SPLITMIX_FACTOR_2,
    SPLITMIX_INCREMENT,
)


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
    """The finalizer of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(SPLITMIX_FACTOR_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(SPLITMIX_FACTOR_2)
    return x ^ (x >> np.uint64(31))


_INCREMENT = np.uint64(SPLITMIX_INCREMENT)


def dither_key(seed: int, step: int) -> np.uint64:
    """What the rounding of one step draws its bits from."""
    with np.errstate(over="ignore"):
        key = _finalize(np.uint64(seed) + _INCREMENT) ^ np.uint64(step)
        return _finalize(key + _INCREMENT)


def dither(random: Random, first: np.ndarray) -> np.ndarray:
    """`RANDOM_BITS` random bits, uint32, for each run of elements that starts at one of `first`."""
    with np.errstate(over="ignore"):
        key = dither_key(random.seed, random.step)
        bits = _finalize(key + first.astype(np.uint64) * _INCREMENT)
    of_state = bits >> np.uint64(RANDOM_BITS * random.position)
    return (of_state & np.uint64(2**RANDOM_BITS - 1)).astype(np.uint32)


STRATA = np.array([int(f"{k:06b}"[::-1], 2) << RANDOM_BITS - 6 for k in range(CODE_BLOCK)], np.uint32)
"""What the random bits of a block's element are xored with, by its place: 64 different strata of [0, 1)."""
