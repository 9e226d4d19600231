"""What the four adapters of torch.optim share: the same optimizer, with another implementation chosen."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from bench.buffers import Buffers
from bench.peers import Contestant, Peer, no_extras
from bench.workloads import Workload

FUSED = ("adam", "adamw", "sgd", "adagrad")
UNFUSED = ("rmsprop", "nadam", "radam", "adamax", "adadelta", "rprop", "asgd")


class TorchOptim(Peer):
    """An optimizer of torch.optim over tensors that share the workload's memory."""

    requires: ClassVar[dict[str, str]] = {"torch": "torch"}
    implementation: ClassVar[dict[str, bool]] = {}
    functions: ClassVar[tuple[str, ...]] = (*FUSED, *UNFUSED)

    def refuses(self, workload: Workload) -> str | None:
        if workload.function not in self.functions:
            return "has no such optimizer"
        return no_extras(workload, ("cpu", "cuda"))

    def missing_on_gpu(self) -> str | None:
        import torch

        return None if torch.cuda.is_available() else "this PyTorch has no CUDA"

    def set_threads(self, n_threads: int) -> None:
        import torch

        torch.set_num_threads(n_threads)

    def prepare(self, workload: Workload, buffers: Buffers) -> Contestant:
        optimizer = self.optimizer(workload, buffers)
        return Contestant(optimizer.step, lambda: buffers.params, lambda: share_states(optimizer, buffers))

    def optimizer(self, workload: Workload, buffers: Buffers) -> Any:
        import torch

        cls = getattr(torch.optim, workload.spec.name)
        return cls(parameters(buffers), **self.implementation, **dict(workload.hypers))


def parameters(buffers: Buffers) -> list[Any]:
    """Tensors over the buffers, with gradients."""
    import torch

    made = [torch.nn.Parameter(buffers.tensor(p)) for p in buffers.params]
    for parameter, g in zip(made, buffers.grads, strict=True):
        parameter.grad = buffers.tensor(g)
    return made


def share_states(optimizer: Any, buffers: Buffers, renamed: dict[str, str] | None = None) -> None:
    """Put the buffers' states in the place of those that the optimizer made at its first steps."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for k, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        for name in list(state):
            arrays = buffers.states.get((renamed or {}).get(name, name))
            if arrays is not None and np.shape(state[name]) == arrays[k].shape:
                state[name] = buffers.tensor(arrays[k])
