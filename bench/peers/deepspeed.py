"""DeepSpeed's CPUAdam, CPUAdagrad and CPULion; it builds them itself, on first use."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, ClassVar

from bench.buffers import Buffers
from bench.peers import Contestant, Peer, no_extras
from bench.peers.torch_optim import parameters, share_states
from bench.workloads import Mode, Workload

OPS = {"adam": "cpu_adam", "adamw": "cpu_adam", "adagrad": "cpu_adagrad", "lion": "cpu_lion"}
STATES = {"adagrad": {"exp_avg_sq": "sum"}}
"""Its names of states where they are not fastopt's."""


class Adapter(Peer):
    requires: ClassVar[dict[str, str]] = {"deepspeed": "deepspeed", "torch": "torch", "ninja": "ninja"}

    def __init__(self) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
        beside_python = str(Path(sys.executable).parent)  # ninja's program
        if beside_python not in os.environ["PATH"].split(os.pathsep):
            os.environ["PATH"] = os.pathsep.join([beside_python, os.environ["PATH"]])

    def refuses(self, workload: Workload) -> str | None:
        if workload.function not in OPS or "amsgrad" in dict(workload.hypers):
            return "has no such optimizer"
        return no_extras(workload)

    def too_slow(self, mode: Mode) -> str | None:
        if mode.builds_peers or all(built(op) for op in OPS.values()):
            return None
        return "its operators are not built yet, which takes minutes: use --full once"

    def set_threads(self, n_threads: int) -> None:
        import torch

        torch.set_num_threads(n_threads)  # sets OpenMP's number, which it reads

    def prepare(self, workload: Workload, buffers: Buffers) -> Contestant:
        optimizer = self._optimizer(workload, parameters(buffers))
        renamed = STATES.get(workload.function)
        return Contestant(optimizer.step, lambda: buffers.params, lambda: share_states(optimizer, buffers, renamed))

    def _optimizer(self, workload: Workload, tensors: list[Any]) -> Any:
        values = workload.values
        same = {name: values[name] for name in ("lr", "betas", "eps", "weight_decay") if name in values}
        if workload.function == "adagrad":
            from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad

            return DeepSpeedCPUAdagrad(tensors, **same)
        if workload.function == "lion":
            from deepspeed.ops.lion import DeepSpeedCPULion

            return DeepSpeedCPULion(tensors, **same)
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(tensors, adamw_mode=workload.function == "adamw", **same)


def built(op: str) -> bool:
    """Whether an earlier run left the compiled operator in torch's folder of extensions."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(folder) if folder else Path.home() / ".cache" / "torch_extensions"
    return any(root.glob(f"**/{op}/{op}.so"))
