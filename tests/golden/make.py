"""Makes the golden vectors: what torch.optim and optax compute in float64, step after step.

Run by hand, with torch and optax installed: ``python tests/golden/make.py``. It writes, for each of the two
libraries, ``NAME.npz`` (arrays) and ``NAME.json`` (which case is which, and the versions that computed them);
`tests/test_golden.py` reads them and needs neither library. The same versions give the same files.

Arrays: ``p`` (n,) and ``g`` (steps, n), the start and the gradients of every case; ``OPTIMIZER/NAME``
(cases, steps, n), parameters and states after every step, under fastopt's names; NaN where a case has no such
state. ``nadam/mu_product`` is (cases, steps).

optax takes a function of the step count as learning rate, and its `trace` stands behind the learning rate as
well as before it. So `Momentum` and `Nesterov`, whose velocity carries the learning rate and which torch does
not have, are composed of its transforms: ``chain(scale_by_learning_rate(lr), trace(momentum, nesterov))``.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import torch

HERE = pathlib.Path(__file__).parent
N = 36
STEPS = 8

Case = tuple[str, dict[str, Any]]

LRS = [0.05, 0.02, 0.02, 0.1, 0.003, 0.07, 0.04, 0.0]
"""What the cases "changing lr" set before each step."""

ADAM = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
MOMENTUM = {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.1}


def flagged(away: dict[str, Any], *flags: str) -> list[Case]:
    """Defaults; every number away from its default; then with each flag, and with all of them."""
    cases: list[Case] = [("default", {}), ("all numbers", away)]
    cases += [(flag, {**away, flag: True}) for flag in flags]
    if len(flags) > 1:
        cases.append(("all flags", {**away, **dict.fromkeys(flags, True)}))
    return cases


TORCH: dict[str, list[Case]] = {
    "SGD": [
        *flagged({"lr": 0.02, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}, "maximize"),
        ("momentum", {"momentum": 0.9}),
        ("nesterov", dict(**MOMENTUM, nesterov=True)),
        ("changing lr", {"momentum": 0.9, "dampening": 0.1, "lr": LRS}),
    ],
    "Adagrad": [
        *flagged(
            {"lr": 0.3, "lr_decay": 0.2, "weight_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-3}, "maximize"
        ),
        ("changing lr", {"lr_decay": 0.1, "lr": LRS}),
    ],
    "Adadelta": [
        *flagged({"lr": 0.3, "rho": 0.7, "eps": 1e-3, "weight_decay": 0.1}, "maximize"),
        ("changing lr", {"lr": LRS}),
    ],
    "RMSprop": [
        *flagged({"lr": 0.03, "alpha": 0.8, "eps": 1e-3, "weight_decay": 0.1, "momentum": 0.7}, "centered", "maximize"),
        ("centered, no momentum", {"centered": True}),
        ("changing lr", {"momentum": 0.9, "lr": LRS}),
    ],
    "Rprop": flagged({"lr": 0.03, "etas": (0.4, 1.5), "step_sizes": (0.02, 0.06)}, "maximize"),
    "ASGD": [
        *flagged({"lr": 0.03, "lambd": 0.2, "alpha": 0.6, "t0": 1.5, "weight_decay": 0.1}, "maximize"),
        ("t0", {"t0": 2.0}),
    ],
    "Adam": [
        *flagged(ADAM, "amsgrad", "maximize", "decoupled_weight_decay"),
        ("changing lr", {"lr": LRS}),
    ],
    "AdamW": [*flagged(ADAM, "amsgrad", "maximize"), ("changing lr", {"lr": LRS})],
    "Adamax": [*flagged(ADAM, "maximize"), ("changing lr", {"lr": LRS})],
    "NAdam": [
        *flagged({**ADAM, "momentum_decay": 0.3}, "decoupled_weight_decay", "maximize"),
        ("changing lr", {"lr": LRS}),
    ],
    # the variance is tractable from the sixth step on, with beta2 = 0.8 from the seventh, with 0.7 not here
    "RAdam": [
        *flagged(ADAM, "decoupled_weight_decay", "maximize"),
        ("beta2 0.8", {"betas": (0.9, 0.8)}),
        ("beta2 0.7", {"betas": (0.9, 0.7)}),
        ("changing lr", {"lr": LRS, "betas": (0.9, 0.97)}),
    ],
}

OPTAX: dict[str, list[Case]] = {
    "Lion": [
        *flagged({"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1}, "maximize"),
        ("changing lr", {"lr": LRS, "weight_decay": 0.3}),
    ],
    "Momentum": [*flagged(MOMENTUM, "maximize"), ("changing lr", {"lr": LRS})],
    "Nesterov": [*flagged(MOMENTUM, "maximize"), ("changing lr", {"lr": LRS})],
    "SGD": [
        ("default", {}),
        ("momentum", MOMENTUM),
        ("nesterov", dict(**MOMENTUM, nesterov=True)),
        ("maximize", dict(**MOMENTUM, maximize=True)),
        ("changing lr", {"momentum": 0.9, "lr": LRS}),
    ],
    "Adam": [*flagged(ADAM, "maximize", "decoupled_weight_decay"), ("changing lr", {"lr": LRS})],
}


def start() -> tuple[np.ndarray, np.ndarray]:
    """Parameters and gradients, all representable in float32.

    Gradients have magnitudes from 1e-6 to 1e3, each element its own; every fifth is zero at some steps, element
    3 at all. One parameter is zero.
    """
    rng = np.random.default_rng(20260101)
    p = rng.standard_normal(N) * 10.0 ** rng.uniform(-2, 1, N)
    p[11] = 0
    magnitude = 10.0 ** np.linspace(-6, 3, N)
    g = rng.standard_normal((STEPS, N)) * rng.permutation(magnitude)
    g[:, ::5] *= rng.random(g[:, ::5].shape) < 0.5
    g[:, 3] = 0
    return p.astype(np.float32).astype(np.float64), g.astype(np.float32).astype(np.float64)


def torch_steps(name: str, kwargs: dict[str, Any], p0: np.ndarray, g: np.ndarray) -> list[dict[str, Any]]:
    """Parameters and states after every step of torch's optimizer `name`."""
    lrs = kwargs.get("lr")
    if isinstance(lrs, list):
        kwargs = {**kwargs, "lr": lrs[0]}
    p = torch.from_numpy(p0.copy())
    optimizer = getattr(torch.optim, name)([p], **kwargs, foreach=False)
    after = []
    for t in range(STEPS):
        if isinstance(lrs, list):
            optimizer.param_groups[0]["lr"] = lrs[t]
        p.grad = torch.from_numpy(g[t].copy())
        optimizer.step()
        states = {k: v for k, v in optimizer.state[p].items() if v is not None and k not in ("step", "eta", "mu")}
        after.append({k: np.array(v.numpy()) for k, v in {"p": p, **states}.items()})
    return after


def optax_transform(
    name: str,
    *,
    lr: Any = None,
    betas: tuple[float, float] | None = None,
    eps: float = 1e-8,
    momentum: float | None = None,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> tuple[optax.GradientTransformation, dict[str, str]]:
    """optax's optimizer `name` with fastopt's hyperparameters, and its word for each of fastopt's states."""
    rates = jax.numpy.array(lr) if isinstance(lr, list) else None
    sign = optax.scale(-1.0) if maximize else optax.identity()
    l2 = optax.identity() if decoupled_weight_decay or name == "Lion" else optax.add_decayed_weights(weight_decay)

    def schedule(default: float) -> Any:
        if rates is not None:
            return lambda count: rates[count]
        return default if lr is None else lr

    if name == "Lion":
        b1, b2 = betas or (0.9, 0.99)
        return optax.chain(sign, l2, optax.lion(schedule(1e-4), b1, b2, weight_decay=weight_decay)), {"exp_avg": "mu"}
    if name in ("Momentum", "Nesterov"):
        decay = 0.9 if momentum is None else momentum
        by_rate = optax.scale_by_learning_rate(schedule(1e-3))
        return optax.chain(sign, l2, by_rate, optax.trace(decay, name == "Nesterov")), {"velocity": "trace"}
    if name == "SGD":
        sgd = optax.sgd(schedule(1e-3), momentum, nesterov)
        return optax.chain(sign, l2, sgd), {"momentum_buffer": "trace"} if momentum else {}
    b1, b2 = betas or (0.9, 0.999)
    adam = optax.adam(schedule(1e-3), b1, b2, eps)
    if decoupled_weight_decay:
        adam = optax.adamw(schedule(1e-3), b1, b2, eps, weight_decay=weight_decay)
    return optax.chain(sign, l2, adam), {"exp_avg": "mu", "exp_avg_sq": "nu"}


def optax_steps(name: str, kwargs: dict[str, Any], p0: np.ndarray, g: np.ndarray) -> list[dict[str, Any]]:
    """Parameters and states after every step of optax's optimizer `name`."""
    transform, states = optax_transform(name, **kwargs)
    p = jax.numpy.array(p0)
    state = transform.init(p)
    after = []
    for t in range(STEPS):
        updates, state = transform.update(jax.numpy.array(g[t]), state, p)
        p = optax.apply_updates(p, updates)
        words = {ours: optax.tree.get(state, theirs) for ours, theirs in states.items()}
        after.append({k: np.array(v) for k, v in {"p": p, **words}.items()})
    return after


def make(library: str, versions: dict[str, str], table: dict[str, list[Case]], steps: Callable[..., Any]) -> None:
    """Compute every case of `table` and write the two files of `library`."""
    p0, g = start()
    arrays = {"p": p0, "g": g}
    described = []
    for name, cases in table.items():
        results = [steps(name, kwargs, p0, g) for _, kwargs in cases]
        for kept in dict.fromkeys(key for after in results for key in after[-1]):
            like = next(after[-1][kept] for after in results if kept in after[-1])
            stacked = np.full((len(cases), STEPS, *like.shape), np.nan)
            for k, after in enumerate(results):
                for t in range(STEPS):
                    stacked[k, t] = after[t].get(kept, np.nan)
            assert like.dtype == np.float64
            arrays[f"{name.lower()}/{kept}"] = stacked
        for k, (case, kwargs) in enumerate(cases):
            states = sorted(set(results[k][-1]) - {"p"})
            described.append({"optimizer": name.lower(), "case": case, "row": k, "states": states, "hypers": kwargs})
    np.savez_compressed(HERE / f"{library}.npz", **arrays)
    lines = ",\n".join("  " + json.dumps(case) for case in described)
    text = f'{{"versions": {json.dumps(versions)},\n "cases": [\n{lines}\n]}}\n'
    (HERE / f"{library}.json").write_text(text)


def main() -> None:
    """Write the golden vectors of both libraries."""
    torch.set_default_dtype(torch.float64)  # mu_product, eta and mu follow the default
    torch.set_num_threads(1)
    jax.config.update("jax_enable_x64", True)
    make("torch", {"torch": torch.__version__, "numpy": np.__version__}, TORCH, torch_steps)
    make("optax", {"optax": optax.__version__, "jax": jax.__version__, "numpy": np.__version__}, OPTAX, optax_steps)


if __name__ == "__main__":
    main()
