"""Where kernels find things: the words of a segment in the table, and of the numbers that change from step to step.

A step hands every kernel two device buffers. The *table* says which arrays there are, one row of 8-byte words for each
segment (a tensor, or neighbours in memory); it is uploaded when an array changes. The *numbers* are a header and the
host scalars, uploaded for every step; a captured graph reads them anew, so it sees a changed learning rate.
"""

from __future__ import annotations

import functools
import struct

from fastopt._formats.constants import CODE_BLOCK as CODE_BLOCK
from fastopt._formats.constants import LANES as LANES
from fastopt._formats.constants import MAX_SCALARS, MAX_STATES
from fastopt._formats.constants import NORM_BLOCK as NORM_BLOCK

# --- A row of the table: byte offsets of its int64 words
P = 0
"""Address of the parameters, or of their upper halves."""
LOW = 8
"""Address of their lower halves, or 0."""
GRADIENT = 16
STORAGE = 24
"""Of the gradient: `FLOAT32`, `BFLOAT16` or `FLOAT16`."""
EMA = 32
COPY = 40
"""Addresses, or 0."""
UPDATE = 48
"""Address of what a rule with a trust ratio subtracts, or 0."""
N = 56
ALIGNED = 64
"""Whether every array of it starts on 16 bytes (those of 2 bytes an element on 8)."""
INDEX = 72
"""Of its first element among all elements of the optimizer."""
FIRST_TILE = 80
"""Number of its first tile in the launch."""
SCALARS = 88
"""Bytes from the first host scalars to its own."""
NORM_START = 96
"""Index of its first element in the space of the global norm."""
FIRST_BLOCK = 104
"""Number of its first block in the norms of a trust ratio."""
RATIO = 112
"""float32: trust ratio, or size of its update; written on the device."""
STATES = 120
SCALES = STATES + 8 * MAX_STATES
ROW = SCALES + 8 * MAX_STATES

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2

# --- The header of the numbers: byte offsets
APPLIED = 0
"""int32: whether the step is applied."""
CHOICE = 4
"""int32: index of the row of host scalars to use: how many of the pending steps before this one were applied."""
CLIPS = 8
"""int32: whether gradients are clamped element by element."""
ZEROES = 12
"""int32: whether gradients are zeroed."""
SCALE = 16
COEFFICIENT = 20
CLIP_VALUE = 24
"""float32."""
COPY_STORAGE = 28
"""int32: `BFLOAT16` or `FLOAT16`."""
ROW_BYTES = 32
"""int32: bytes of one row of host scalars."""
SKIPS = 36
"""int32: whether a norm that is not finite cancels the step."""
LIMITS = 40
"""int32: whether there is a largest norm."""
DECIDED = 44
"""int32: how many steps with `SKIPS` the host knows to have been applied, when it sent this step."""
GRAD_SCALE = 48
MAX_NORM = 56
"""float64."""
NORM = 64
"""float64: the norm, written on the device."""
ROWS = 72
"""int32: how many rows of host scalars there are."""
RESULT = 76
"""int32: `APPLIED` of the step's first run. Replaying a graph without preparing the step does not change it."""
HEADER = 128
header = struct.Struct("<4i3f4iI3d2i48x")
"""All of it, in this order."""

# --- Host scalars of one kind of tensor: float32 words of its rule, what its rounding draws from, its average's
KEY = 4 * MAX_SCALARS
"""uint64: hash of seed and step."""
STEP = KEY + 8
"""int32."""
EMA_DECAY = STEP + 4
EMA_WEIGHT = EMA_DECAY + 4
"""float32."""
HYPERS = EMA_WEIGHT + 8
"""float64 hyperparameters, for a trust ratio."""
MAX_TRUST_HYPERS = 8
SCALAR_BYTES = HYPERS + 8 * MAX_TRUST_HYPERS


@functools.cache
def scalars(n: int) -> struct.Struct:
    """`n` float32 scalars, `KEY`, `STEP`, `EMA_DECAY`, `EMA_WEIGHT` and `HYPERS`."""
    return struct.Struct(f"<{n}f{KEY - 4 * n}xQi2f4x{MAX_TRUST_HYPERS}d")


# --- What outlives a step on the device
COUNT = 0
"""int32: how many steps with `SKIPS` were applied."""
CONTROL = 16
