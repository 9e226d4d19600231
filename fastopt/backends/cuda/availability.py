"""Whether steps can run on this machine's GPU, and if not, why."""

from __future__ import annotations

from fastopt.backends.cuda.operations import SIMULATED

_found: list[str] = []


def missing() -> str:
    """What a step lacks on this machine, or ""."""
    if SIMULATED:
        return ""
    if not _found:
        _found.append(_missing())
    return _found[0]


def _missing() -> str:
    from numba import cuda
    from numba.cuda.cudadrv.error import CudaSupportError

    try:
        count = len(cuda.gpus)
    except CudaSupportError as error:
        words = " ".join(str(error).split()).rstrip(" :.")
        return f"no NVIDIA driver that works: {words}"
    return "" if count else "no NVIDIA GPU was found"


def check() -> None:
    """Raise RuntimeError, saying what is missing, unless a step can run here."""
    if lack := missing():
        raise RuntimeError(f"backend 'cuda' cannot run here: {lack}. fastopt.cuda.ptx() works without a GPU")
