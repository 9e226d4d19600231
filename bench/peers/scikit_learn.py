"""scikit-learn's optimizers of its multi-layer perceptron, whole-array NumPy: Adam and SGD with momentum."""

from __future__ import annotations

from typing import Any, ClassVar

from bench.buffers import Buffers
from bench.peers import Contestant, Peer, no_extras
from bench.workloads import Workload


class Adapter(Peer):
    requires: ClassVar[dict[str, str]] = {"sklearn": "scikit-learn"}
    note = "one thread; allocates its states"

    def refuses(self, workload: Workload) -> str | None:
        if workload.function not in ("adam", "momentum", "nesterov") or workload.hypers:
            return "has no such optimizer"
        return no_extras(workload)

    def prepare(self, workload: Workload, buffers: Buffers) -> Contestant:
        from sklearn.neural_network import _stochastic_optimizers as optimizers

        values = workload.values
        optimizer: Any
        if workload.function == "adam":
            optimizer = optimizers.AdamOptimizer(buffers.params, values["lr"], *values["betas"], values["eps"])
        else:
            nesterov = workload.function == "nesterov"
            optimizer = optimizers.SGDOptimizer(
                buffers.params, values["lr"], momentum=values["momentum"], nesterov=nesterov
            )

        def step() -> None:
            if workload.function == "adam":  # its eps counts before the correction
                optimizer.epsilon = values["eps"] * (1 - optimizer.beta_2 ** (optimizer.t + 1)) ** 0.5
            optimizer.update_params(buffers.params, buffers.grads)

        return Contestant(step, lambda: buffers.params)
