"""torch.optim with foreach=False: one tensor after another, often faster than foreach for large tensors."""

from __future__ import annotations

from typing import ClassVar

from bench.peers.torch_optim import TorchOptim


class Adapter(TorchOptim):
    implementation: ClassVar[dict[str, bool]] = {"foreach": False}
