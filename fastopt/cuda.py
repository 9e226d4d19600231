"""The kernels for NVIDIA GPUs: what there is, and their PTX. Steps on the GPU need no word of this module.

Experimental: they have the CPU's bits in Numba's simulator, and have not yet run on a GPU.
An optimizer whose parameters are arrays on a GPU (of Numba, CuPy or PyTorch) steps there, and so do the functions of
`fastopt.functional`. Needs ``python -m pip install 'fastopt[cuda]'``; without a GPU,
`rules` and `ptx` work all the same.
"""

from fastopt.backends import resolve as _resolve

_resolve("cuda")

from fastopt.backends.cuda import describe as describe  # noqa: E402
from fastopt.backends.cuda.kernels import ptx as ptx  # noqa: E402
from fastopt.backends.cuda.kernels import rules as rules  # noqa: E402

__all__ = ["describe", "ptx", "rules"]
