"""The functions that a rule may call, under the names it calls them by.

The generators know them by name; imported from here, a rule is also plain Python that runs on NumPy arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# The functions that a rule may call, under the names it calls them by. The generators know them by
# name; imported from here, a rule is also plain Python that runs on NumPy arrays.
sqrt = np.sqrt
sign = np.sign
fabs = np.fabs
maximum = np.maximum
minimum = np.minimum
copysign = np.copysign


def norm(x: Any) -> Any:
    """L2 norm for references, summed in float64 whatever the type of `x`: float32 squares overflow at 1e19."""
    return np.linalg.norm(x * np.float64(1))
