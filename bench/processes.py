"""What needs processes of its own or looks at this one: import time, the first step, memory of steps."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.workloads import Hypers
from fastopt._arrays import allocation
from fastopt.rules import registry

# --- Cold start -------------------------------------------------------------------------------------------

BASE = "import numpy"
IMPORTS = {"fastopt": "import fastopt", "torch": "import torch", "optax": "import optax"}
FIRST_STEPS = {
    "fastopt": "import fastopt\nopt = fastopt.Adam(p)\nopt.step(g)",
    "torch": "import torch\nq = torch.nn.Parameter(torch.from_numpy(p))\nq.grad = torch.from_numpy(g)\n"
    "torch.optim.Adam([q], fused=True).step()",
    "optax": "import jax, optax\nopt = optax.adam(1e-3)\nq = jax.numpy.array(p)\nstate = opt.init(q)\n"
    "u, state = jax.jit(opt.update)(jax.numpy.array(g), state)\njax.block_until_ready(optax.apply_updates(q, u))",
}
"""Import, construction and one step of 1e5 parameters."""
ARRAYS = "import numpy\np, g = numpy.ones((2, 100_000), numpy.float32)\n"


def cold(texts: dict[str, str], before: str, rounds: int, rounds_of_others: int) -> dict[str, list[float]]:
    """Seconds that each text adds to a process that runs `before` alone, interleaved; bytecode cached, as installed."""
    times: dict[str, list[float]] = {name: [] for name in texts}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    _seconds(f"{before}\n{texts['fastopt']}", environment)  # caches bytecode
    for k in range(rounds):
        base = _seconds(before, environment)
        for name, text in texts.items():
            if name == "fastopt" or k < rounds_of_others:
                times[name].append(max(1e-6, _seconds(f"{before}\n{text}", environment) - base))
    return times


def _seconds(text: str, environment: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", text], env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


# --- Memory -----------------------------------------------------------------------------------------------

MEMORY_SIZES = (10**6, 10**7)


def growth(function: str, hypers: Hypers) -> tuple[dict[str, float], dict[str, list[float]], float]:
    """Bytes a parameter by which what steps allocate grows, the peaks at either size, and seconds a step."""
    peaks: list[dict[str, float]] = []
    seconds = 0.0
    for n in (MEMORY_SIZES[0], *MEMORY_SIZES):  # the first one fills what is filled once
        p, g = allocation.zeros(n), allocation.zeros(n)
        p.fill(1)
        g.fill(1)
        optimizer = registry[function].cls(p, **dict(hypers))
        start = time.perf_counter()
        peaks.append(allocated(lambda optimizer=optimizer, g=g: optimizer.step(g)))  # type: ignore[misc]
        seconds = (time.perf_counter() - start) / 6
    del peaks[0]
    kinds = [kind for kind in peaks[0] if kind in peaks[1]]
    per_parameter = {kind: (peaks[1][kind] - peaks[0][kind]) / (MEMORY_SIZES[1] - MEMORY_SIZES[0]) for kind in kinds}
    return per_parameter, {kind: [peak[kind] for peak in peaks] for kind in kinds}, seconds


def allocated(step: Callable[[], Any]) -> dict[str, float]:
    """Bytes beyond those before that steps took: Python's peak, the process's peak, malloc's in use after.

    The last two on Linux with glibc. The process's peak is exact to some 256 KiB: the kernel counts pages in
    batches.
    """
    tracemalloc.start()
    for _ in range(3):
        step()
    gc.collect()
    in_use, resident = _malloc_in_use(), _resident(reset_peak=True)
    tracemalloc.reset_peak()
    python = tracemalloc.get_traced_memory()[0]
    for _ in range(3):
        step()
    python = tracemalloc.get_traced_memory()[1] - python
    tracemalloc.stop()
    found = {"python": float(python)}
    if in_use is not None:
        found["malloc"] = float((_malloc_in_use() or 0) - in_use)
    if resident is not None:
        found["resident"] = float((_resident(reset_peak=False) or 0) - resident)
    return found


def _resident(reset_peak: bool) -> int | None:
    """Resident bytes of this process after setting the peak back to it, or else the peak since then."""
    try:
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"{'VmRSS' if reset_peak else 'VmHWM'}:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else None


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "k")
    ]


def _malloc_in_use() -> int | None:
    """Bytes that malloc has handed out, mapped blocks included."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    mallinfo2.restype = _MallInfo
    now = mallinfo2()
    return now.uordblks + now.hblkhd
