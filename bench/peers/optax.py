"""optax under jax.jit, with parameters and state donated, so that XLA may update them in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

import fastopt
from bench.buffers import Buffers
from bench.peers import Contestant, Peer, no_extras
from bench.workloads import INPUTS, Workload


def _made(optax: Any, function: str, v: dict[str, Any]) -> Any:
    """The optimizer of the same formula with the hyperparameters `v`."""
    b1, b2 = v.get("betas", (0.0, 0.0))
    makers: dict[str, Callable[[], Any]] = {
        "adam": lambda: optax.adam(v["lr"], b1, b2, v["eps"]),
        "adamw": lambda: optax.adamw(v["lr"], b1, b2, v["eps"], weight_decay=v["weight_decay"]),
        "adamax": lambda: optax.adamax(v["lr"], b1, b2, v["eps"]),
        "radam": lambda: optax.radam(v["lr"], b1, b2, v["eps"]),
        "lion": lambda: optax.lion(v["lr"], b1, b2, weight_decay=v["weight_decay"]),
        "lamb": lambda: optax.lamb(v["lr"], b1, b2, v["eps"], weight_decay=v["weight_decay"]),
        "sgd": lambda: optax.sgd(v["lr"], v["momentum"] or None),
        "adagrad": lambda: optax.adagrad(v["lr"], 0.0, v["eps"] ** 2),  # inside the root
        "adadelta": lambda: optax.adadelta(v["lr"], v["rho"], v["eps"]),
        "rmsprop": lambda: optax.rmsprop(
            v["lr"],
            v["alpha"],
            v["eps"],
            eps_in_sqrt=False,
            centered=v["centered"],
            momentum=v["momentum"] or None,
        ),
    }
    return makers[function]()


FUNCTIONS = ("adam", "adamw", "adamax", "radam", "lion", "lamb", "sgd", "adagrad", "adadelta", "rmsprop")


class Adapter(Peer):
    requires: ClassVar[dict[str, str]] = {"optax": "optax", "jax": "jax"}
    note = "allocates its own arrays, and XLA takes a thread for every processor"

    def refuses(self, workload: Workload) -> str | None:
        hypers = dict(workload.hypers)
        if workload.function not in FUNCTIONS or {"amsgrad", "decoupled_weight_decay"} & set(hypers):
            return "has no such optimizer"
        if INPUTS[workload.input].state is not None:
            return "its states lie in arrays of its own"
        if workload.n_threads != fastopt.get_num_threads():
            return "the number of its threads is that of the processors"
        return no_extras(workload, ("cpu", "cuda"))

    def missing_on_gpu(self) -> str | None:
        import jax

        return None if jax.default_backend() == "gpu" else "this JAX has no CUDA"

    def prepare(self, workload: Workload, buffers: Buffers) -> Contestant:
        import jax
        import optax

        optimizer = _made(optax, workload.function, workload.values)

        def update(params: Any, state: Any, grads: Any) -> Any:
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(update, donate_argnums=(0, 1))
        params = [jax.numpy.array(buffers.host(p)) for p in buffers.params]
        grads = [jax.numpy.array(buffers.host(g)) for g in buffers.grads]
        live = [params, jax.jit(optimizer.init)(params)]
        waits = workload.backend == "cpu"  # on the GPU all contestants queue

        def step() -> None:
            live[:] = compiled(live[0], live[1], grads)
            if waits:
                jax.block_until_ready(live[0])

        return Contestant(step, lambda: [np.asarray(p) for p in live[0]])
