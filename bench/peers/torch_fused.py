"""torch.optim with fused=True; for the tail, torch's fastest call for each part."""

from __future__ import annotations

from typing import ClassVar

from bench.buffers import Buffers
from bench.peers import Contestant
from bench.peers.torch_optim import FUSED, TorchOptim, share_states
from bench.workloads import Workload


class Adapter(TorchOptim):
    implementation: ClassVar[dict[str, bool]] = {"fused": True}
    functions = FUSED

    def refuses(self, workload: Workload) -> str | None:
        if workload.is_tail:
            return None
        return super().refuses(workload)

    def prepare(self, workload: Workload, buffers: Buffers) -> Contestant:
        return self._tail(workload, buffers) if workload.is_tail else super().prepare(workload, buffers)

    def _tail(self, workload: Workload, buffers: Buffers) -> Contestant:
        import torch

        optimizer = self.optimizer(workload, buffers)
        parameters = optimizer.param_groups[0]["params"]
        data = [parameter.detach() for parameter in parameters]
        grads = [parameter.grad for parameter in parameters]
        ema = [tensor.clone() for tensor in data]
        copy = [tensor.bfloat16() for tensor in data]
        weight = 1 - dict(workload.options)["ema_decay"]

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()
            torch._foreach_lerp_(ema, data, weight)
            torch._foreach_copy_(copy, data)
            torch._foreach_zero_(grads)

        def results() -> list:
            return [*buffers.params, *(tensor.cpu().numpy() for tensor in ema)]

        return Contestant(step, results, lambda: share_states(optimizer, buffers), uses_up_gradients=True)
