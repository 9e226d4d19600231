"""A race on the GPU: arrays there, the copy that is the roof, and waiting for the device before the clock is read.

Imported only for `--backend cuda`. All contestants queue steps and none waits; a reading of the clock is of some steps
and of waiting for the last of them, so small sizes show what a step costs the host, large ones the device.
"""

from __future__ import annotations

import importlib.metadata
import math
from typing import Any

import numpy as np

import fastopt
from bench.buffers import LONGEST_SAMPLE, Buffers
from bench.peers import Contestant
from bench.workloads import Workload
from fastopt import cuda
from fastopt.backends.cuda import arrays, availability, memory

VERSION = f"fastopt {fastopt.__version__}, numba-cuda {importlib.metadata.version('numba-cuda')}"
"""Of fastopt as a contestant."""

# RuntimeError, before any measurement, says what is missing
availability.check()


def description() -> dict[str, str]:
    """What figures depend on: GPU, driver, memory."""
    free = available_memory()
    return cuda.describe() | ({} if math.isinf(free) else {"free memory": f"{free / 2**30:.0f} GiB"})


def available_memory() -> float:
    """Bytes of the device that can still be had; infinite under Numba's simulator."""
    return memory.free_bytes()


class DeviceBuffers(Buffers):
    """Parameters, gradients and states of a workload in the GPU's memory."""

    def _make(self, workload: Workload) -> None:
        self.flat = None
        if workload.form == "FlatBuffer":
            names: dict[str, Any] = {f"t{k}": shape for k, shape in enumerate(workload.shapes)}
            self.flat = tuple(fastopt.FlatBuffer(names, backend="cuda") for _ in range(2))
            self.params, self.grads = (list(buffer.values()) for buffer in self.flat)
        else:
            self.params, self.grads = ([_array(shape) for shape in workload.shapes] for _ in range(2))
        self.states = {name: memory.state_arrays(self.params) for name in workload.states}

    def _fill(self, array: Any, values: np.ndarray) -> None:
        """Send the values once, and double what is there."""
        at, n = memory.address_of(array), memory.nbytes(array) // 4
        there = min(n, values.size)
        memory.copy_in(at, values[:there])
        memory.synchronize()
        while there < n:
            more = min(there, n - there)
            memory.copy_within(at + 4 * there, at, 4 * more)
            there += more
        memory.synchronize()

    def _fill_with(self, array: Any, value: float) -> None:
        arrays.fill(array, np.float32(value))

    def sample(self, arrays: list[Any] | None = None) -> list[np.ndarray]:
        """The first and the last elements of every tensor, of the parameters if None."""
        return [_ends(array) for array in (self.params if arrays is None else arrays)]

    def tensor(self, array: Any) -> Any:
        import torch

        return torch.as_tensor(array, device="cuda")

    def host(self, array: Any) -> np.ndarray:
        return memory.fetch(array)

    def wait(self) -> None:
        memory.synchronize()


def _array(shape: tuple[int, ...]) -> Any:
    n = math.prod(shape)
    return memory.view(memory.allocate(4 * n), 0, tuple(shape), np.dtype(np.float32))


def _ends(array: Any) -> np.ndarray:
    half = LONGEST_SAMPLE // 2
    if isinstance(array, np.ndarray):
        flat = array.reshape(-1)
        return flat if flat.size <= 2 * half else np.concatenate([flat[:half], flat[-half:]])
    seen = memory.look(array)
    assert seen is not None
    if seen.size <= 2 * half:
        return memory.fetch(array).reshape(-1)
    ends = np.empty(2 * half, np.float32)
    memory.synchronize()
    memory.copy_out(ends[:half], seen.address)
    memory.copy_out(ends[half:], seen.address + 4 * (seen.size - half))
    memory.synchronize()
    return ends


def probe(workload: Workload) -> tuple[Contestant, float]:
    """The device's own copy of as many bytes as the step moves, half of them read and half written."""
    n_bytes = workload.bytes_per_parameter * workload.n // 2
    source, destination = memory.allocate(n_bytes), memory.allocate(n_bytes)
    at, to = memory.address_of(source), memory.address_of(destination)

    def step() -> None:
        memory.copy_within(to, at, n_bytes)

    return Contestant(step, lambda: [source, destination]), 2 * n_bytes / workload.n


def release() -> None:
    """Give back what Numba and torch keep of arrays that are gone."""
    import sys

    memory.release()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
