"""Numbers that NumPy, C and CUDA must agree on to the bit. C has them from `formats.h`, which is generated from here.

Names and whole numbers alone. What the numbers of a format mean is explained in `kernels/state_codecs.h`.
"""

MAX_STATES = 4
"""State arrays of a kernel."""
MAX_SCALARS = 32
"""Host scalars of a kernel."""

# --- The order in which norms are summed
LANES = 32
"""Independent sums: element i of what is summed belongs to lane i % LANES."""
NORM_BLOCK = 16384
"""Elements of one partial sum; a multiple of a tile."""

# --- Random bits of stochastic rounding
CODE_BLOCK = 64
"""Elements of a tensor that share random bits and, in 8 bits, a scale; divides a tile."""
RANDOM_BITS = 20
"""For one state, of the 64 that are drawn for a block."""
MAX_ROUNDED_STATES = 3
"""States of a kernel that there are random bits for."""
SPLITMIX_INCREMENT = 0x9E3779B97F4A7C15
SPLITMIX_FACTOR_1 = 0xBF58476D1CE4E5B9
SPLITMIX_FACTOR_2 = 0x94D049BB133111EB
"""Of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""

# --- 8 bits
CODE_SHIFT = 20
"""Bits of a float32 below those that a code keeps: its exponent and 3 bits of its fraction."""
FLAGGED = 0x100
"""In a scale: the block holds inf or NaN."""
LARGEST_SCALE = 254
"""Biased exponent of the top binade."""
LOWERED_EVERY = 16
"""Steps after which a block is looked at for a lower scale."""
SIGNED_LARGEST_CODE = 127
UNSIGNED_LARGEST_CODE = 255
SIGNED_BINADES = 15
UNSIGNED_BINADES = 31
"""Between the top binade and the one of delta."""
SIGNED_SMALLEST_SCALE = 19
UNSIGNED_SMALLEST_SCALE = 35
"""Under which the step next to 0 is the smallest normal float32."""
SIGNED_HEADROOM = 1
UNSIGNED_HEADROOM = 2
"""Binades that a new scale leaves free above the largest value: they cost range at the lower end, no precision. A
second moment that starts from 0 grows by a factor of 1000."""
