"""torch.optim with foreach=True."""

from __future__ import annotations

from typing import ClassVar

from bench.peers.torch_optim import TorchOptim


class Adapter(TorchOptim):
    implementation: ClassVar[dict[str, bool]] = {"foreach": True}
