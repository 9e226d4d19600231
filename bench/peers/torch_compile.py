"""torch.compile of torch.optim's foreach step, the form that its documentation compiles."""

from __future__ import annotations

from typing import ClassVar

from bench.buffers import Buffers
from bench.peers import Contestant
from bench.peers.torch_optim import TorchOptim, share_states
from bench.workloads import Mode, Workload


class Adapter(TorchOptim):
    implementation: ClassVar[dict[str, bool]] = {"foreach": True}
    functions = ("adam", "adamw", "sgd", "adagrad", "rmsprop")
    note = "compiled anew for every optimizer and shape, outside the measured time"

    def refuses(self, workload: Workload) -> str | None:
        if refusal := super().refuses(workload):
            return refusal
        return None if workload.section == "curves" else "compiled anew for every shape: in the curves alone"

    def too_slow(self, mode: Mode) -> str | None:
        return "compiling takes longer than a quick run" if mode.seconds < 120 else None

    def prepare(self, workload: Workload, buffers: Buffers) -> Contestant:
        import torch

        torch._dynamo.reset()
        optimizer = self.optimizer(workload, buffers)
        step = torch.compile(optimizer.step)
        return Contestant(step, lambda: buffers.params, lambda: share_states(optimizer, buffers))
