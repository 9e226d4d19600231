"""One step on arrays that you hold: ``fastopt.functional.adam(p, g, exp_avg, exp_avg_sq, step=1, lr=1e-3)``.

One compiled function for every optimizer, in place, on C-contiguous float32 arrays of one shape.
`fastopt.reference` has the same functions in NumPy.
"""

from fastopt._core import functions
from fastopt.backends import cpu as _cpu

__all__ = functions.define(globals(), _cpu, (functions.np.float32,))  # pyright: ignore
