"""The Numba CUDA backend: the same rules on the GPU, the same bits. Imported only when asked for."""

from __future__ import annotations

from typing import Any

import numpy as np


def _check_available() -> None:
    """Raise ImportError, saying what is missing, unless Numba's CUDA target is there."""
    try:
        import numba.cuda
    except ImportError as error:
        raise ImportError(
            "backend 'cuda' needs Numba's CUDA target, which is not installed: python -m pip install 'fastopt[cuda]'"
        ) from error
    if not hasattr(numba.cuda, "config"):
        raise ImportError(
            "backend 'cuda' needs the package numba-cuda, here is the target that older versions of Numba bring along: "
            "python -m pip install 'fastopt[cuda]'"
        )


_check_available()

# ruff: noqa: E402  only where the packages are there
from fastopt import backends
from fastopt.backends.cuda import arrays, availability, kernels, memory
from fastopt.backends.cuda import plan as _plan
from fastopt.backends.cuda.operations import SIMULATED
from fastopt.rules import host_scalars

NAME = "cuda"
ON_DEVICE = True


def describe() -> dict[str, str]:
    """GPU, driver and version of numba-cuda, for ``python -m fastopt info``."""
    known = {"numba-cuda": kernels._version("numba-cuda")}
    if SIMULATED:
        return {"GPU": "Numba's simulator", **known}
    if lack := availability.missing():
        return {"GPU": lack, **known}
    from numba import cuda

    device = cuda.get_current_device()
    name = device.name.decode() if isinstance(device.name, bytes) else str(device.name)
    major, minor = device.compute_capability[:2]
    number = cuda.cudadrv.driver.driver.get_version()
    return {"GPU": f"{name} (compute capability {major}.{minor})", "driver": ".".join(map(str, number)), **known}


def make_plan(optimizer: Any) -> Any:
    """The prebuilt step of `optimizer`."""
    availability.check()
    return _plan.Plan(optimizer)


def run_once(
    spec: Any,
    streams: dict[str, Any],
    running: np.ndarray | None,
    step: int,
    values: dict[str, Any],
    n_threads: int | None = None,  # noqa: ARG001  of the CPU
) -> bool:
    """One step of `spec` on the checked device arrays p, g and states; False if a host scalar leaves float32."""
    availability.check()
    carried = {} if running is None else dict(zip(spec.running, running.ravel().tolist(), strict=True))
    if not host_scalars.scalars_fit(spec, step, carried, values):
        return False
    optimizer = spec.cls(None, **values, backend="cuda")
    tensor = _adopt(optimizer, streams, running, step)
    _plan.Plan(optimizer, is_once=True).step(streams["g"])
    if running is not None:
        running[...] = tensor.running
    return True


def _adopt(optimizer: Any, streams: dict[str, Any], running: np.ndarray | None, step: int) -> Any:
    """Give an optimizer without parameters one tensor, whose arrays are the caller's, before step number `step`."""
    p = streams["p"]
    carried = np.zeros(0) if running is None else np.array(running, np.float64).ravel()
    tensor = backends.engine().Tensor(p, None, 0, 0, np.array(step - 1, np.int64), carried, arrays.shape_of(p))
    tensor.states = {name: array for name, array in streams.items() if name not in ("p", "g")}
    if optimizer.spec.trust == "update":
        tensor.update = memory.state_arrays([p])[0]
    optimizer._structure, optimizer._names = "single", None
    optimizer._tensors, optimizer._members, optimizer._read = [tensor], [[tensor]], [None]
    optimizer.param_groups[0]["params"] = (p,)
    return tensor
