"""The textbook, in NumPy: ``fastopt.reference.adam(p, g, exp_avg, exp_avg_sq, step=1, lr=1e-3)``.

The functions of `fastopt.functional`, with the same signatures, in place, on float32 or float64 arrays. What
they compute stands in each optimizer's file, as `reference`.
"""

from fastopt._core import functions
from fastopt.backends import reference as _reference

__all__ = functions.define(globals(), _reference, (functions.np.float32, functions.np.float64))
