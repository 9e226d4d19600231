"""Makes the golden vectors: what torch.optim, optax and a paper compute in float64, step after step.

Run by hand, with torch and optax installed: ``python tests/numerics/golden/make.py``. It writes, for each of the three
sources, ``NAME.npz`` (arrays) and ``NAME.json`` (which case is which, and the versions that computed them);
`tests/numerics/test_golden.py` reads them and needs neither library. The same versions give the same files.

Arrays: ``p`` (n,) and ``g`` (steps, n), the start and the gradients of every case; ``OPTIMIZER/NAME``
(cases, steps, n), parameters and states after every step, under fastopt's names; NaN where a case has no such
state. ``nadam/mu_product`` is (cases, steps).

Two keys of a case change that. ``"tensors"``: the n elements are tensors of these sizes, one behind the other,
each with its own trust ratio. ``"zero"``: "p", the case starts from zero parameters instead; "g", the gradients
of steps 1, 3, 5 and 7 are zero.

optax takes a function of the step count as learning rate, and its `trace` stands behind the learning rate as
well as before it. So `Momentum` and `Nesterov`, whose velocity carries the learning rate and which torch does
not have, are composed of its transforms: ``chain(scale_by_learning_rate(lr), trace(momentum, nesterov))``.

optax's LARS divides by the norm of g + weight_decay * p; its paper, and fastopt, by ||g|| + weight_decay * ||p||.
The two agree where `weight_decay` is 0, and only such cases are optax's. The others are in ``paper.npz``: the
paper's Algorithm 1, worked out by `paper_steps` in Python's floats.
"""

from __future__ import annotations

import json
import math
import pathlib
import platform
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
LARS = {"lr": 0.2, "momentum": 0.8, "trust_coefficient": 0.3, "eps": 0.5}

TENSORS = {"LAMB": [13, N - 13], "LARS": [13, N - 13]}
"""Sizes of the tensors of the optimizers for which it matters."""

ZERO = {"zero parameters": "p", "zero gradients": "g"}
"""What is zero in the cases whose names begin like this."""


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
    "LAMB": [
        *flagged(ADAM, "maximize"),
        ("no weight decay", {**ADAM, "weight_decay": 0.0}),
        ("changing lr", {"lr": LRS, "weight_decay": 0.3}),
        ("zero parameters", ADAM),
        ("zero gradients", ADAM),
        ("zero gradients, no weight decay", {}),
    ],
    "LARS": [
        *flagged(LARS, "maximize"),
        ("no eps", {**LARS, "eps": 0.0}),
        ("changing lr", {**LARS, "lr": LRS}),
        ("zero parameters", LARS),
        ("zero gradients", LARS),
    ],
}

PAPER: dict[str, list[Case]] = {
    "LARS": [
        *flagged({**LARS, "weight_decay": 0.1}, "maximize"),
        ("weight decay", {"weight_decay": 0.1}),
        ("large weight decay", {**LARS, "weight_decay": 100.0}),
        ("changing lr", {**LARS, "weight_decay": 0.1, "lr": LRS}),
        ("zero parameters", {**LARS, "weight_decay": 0.1}),
        ("zero gradients", {**LARS, "weight_decay": 0.1}),
    ],
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


def zero_in(case: str) -> str | None:
    """What is zero in the case called `case`: "p", "g" or None."""
    return ZERO.get(case.partition(",")[0])


def zeroed(case: str, p: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`p` and `g` as the case called `case` has them."""
    p, g = p.copy(), g.copy()
    if zero_in(case) == "p":
        p[:] = 0
    if zero_in(case) == "g":
        g[::2] = 0
    return p, g


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
    eps: float | None = None,
    momentum: float | None = None,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    trust_coefficient: float = 1e-3,
) -> tuple[optax.GradientTransformation, dict[str, str]]:
    """optax's optimizer `name` with fastopt's hyperparameters, and its word for each of fastopt's states."""
    rates = jax.numpy.array(lr) if isinstance(lr, list) else None
    sign = optax.scale(-1.0) if maximize else optax.identity()
    own_decay = decoupled_weight_decay or name in ("Lion", "LAMB", "LARS")
    l2 = optax.identity() if own_decay else optax.add_decayed_weights(weight_decay)

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
    if name == "LARS":
        assert weight_decay == 0, "here optax has another formula"
        decay = 0.9 if momentum is None else momentum
        lars = optax.lars(schedule(1e-3), 0.0, True, trust_coefficient, eps or 0.0, True, decay)
        return optax.chain(sign, lars), {"velocity": "trace"}
    b1, b2 = betas or (0.9, 0.999)
    if name == "LAMB":
        lamb = optax.lamb(schedule(1e-3), b1, b2, 1e-6 if eps is None else eps, weight_decay=weight_decay)
        return optax.chain(sign, lamb), {"exp_avg": "mu", "exp_avg_sq": "nu"}
    eps = 1e-8 if eps is None else eps
    adam = optax.adam(schedule(1e-3), b1, b2, eps)
    if decoupled_weight_decay:
        adam = optax.adamw(schedule(1e-3), b1, b2, eps, weight_decay=weight_decay)
    return optax.chain(sign, l2, adam), {"exp_avg": "mu", "exp_avg_sq": "nu"}


def optax_steps(name: str, kwargs: dict[str, Any], p0: np.ndarray, g: np.ndarray) -> list[dict[str, Any]]:
    """Parameters and states after every step of optax's optimizer `name`."""
    transform, states = optax_transform(name, **kwargs)
    p = tensors(name, p0)
    state = transform.init(p)
    after = []
    for t in range(STEPS):
        updates, state = transform.update(tensors(name, g[t]), state, p)
        p = optax.apply_updates(p, updates)
        words = {ours: optax.tree.get(state, theirs) for ours, theirs in states.items()}
        after.append({k: np.concatenate(v) for k, v in {"p": p, **words}.items()})
    return after


def tensors(name: str, elements: np.ndarray) -> list[jax.Array]:
    """`elements` as the tensors of optimizer `name`: one, if it is all the same to it."""
    ends = np.cumsum(TENSORS.get(name, [N]))
    return [jax.numpy.array(tensor) for tensor in np.split(elements, ends[:-1])]


def paper_steps(name: str, kwargs: dict[str, Any], p0: np.ndarray, g: np.ndarray) -> list[dict[str, Any]]:
    """Parameters and velocity after every step of LARS, You, Gitman, Ginsburg, arXiv:1708.03888, Algorithm 1.

    For every tensor (layer) w with gradient g::

        local_lr = eta * ||w|| / (||g|| + beta * ||w||)
        v = m * v + lr * local_lr * (g + beta * w)
        w = w - v

    with fastopt's `weight_decay` as beta, `trust_coefficient` as eta and `momentum` as m; its `velocity` is -v.
    The paper does not say what a zero norm gives: `local_lr` is 1 then, as in optax. `eps` is optax's too.
    """
    assert name == "LARS"
    hypers = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 1e-3, "eps": 0.0, **kwargs}
    m, beta, eta, eps = (hypers[key] for key in ("momentum", "weight_decay", "trust_coefficient", "eps"))
    lrs = hypers["lr"] if isinstance(hypers["lr"], list) else [hypers["lr"]] * STEPS
    w, v, after = p0.tolist(), [0.0] * N, []
    for t in range(STEPS):
        gradient = [-x if hypers.get("maximize") else x for x in g[t].tolist()]
        end = 0
        for size in TENSORS[name]:
            layer, end = range(end, end + size), end + size
            w_norm = math.hypot(*(w[k] for k in layer))
            g_norm = math.hypot(*(gradient[k] for k in layer))
            local_lr = eta * w_norm / (g_norm + beta * w_norm + eps) if w_norm and g_norm else 1.0
            for k in layer:
                v[k] = m * v[k] + lrs[t] * local_lr * (gradient[k] + beta * w[k])
                w[k] = w[k] - v[k]
        after.append({"p": np.array(w), "velocity": -np.array(v)})
    return after


def make(library: str, versions: dict[str, str], table: dict[str, list[Case]], steps: Callable[..., Any]) -> None:
    """Compute every case of `table` and write the two files of the source `library`."""
    p0, g = start()
    arrays = {"p": p0, "g": g}
    described = []
    for name, cases in table.items():
        results = [steps(name, kwargs, *zeroed(case, p0, g)) for case, kwargs in cases]
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
            entry = {"optimizer": name.lower(), "case": case, "row": k, "states": states, "hypers": kwargs}
            if name in TENSORS:
                entry["tensors"] = TENSORS[name]
            if zero_in(case):
                entry["zero"] = zero_in(case)
            described.append(entry)
    np.savez_compressed(HERE / f"{library}.npz", **arrays)
    lines = ",\n".join("  " + json.dumps(case) for case in described)
    text = f'{{"versions": {json.dumps(versions)},\n "cases": [\n{lines}\n]}}\n'
    (HERE / f"{library}.json").write_text(text)


def main() -> None:
    """Write the golden vectors of both libraries and of the paper."""
    torch.set_default_dtype(torch.float64)  # mu_product, eta and mu follow the default
    torch.set_num_threads(1)
    jax.config.update("jax_enable_x64", True)
    make("torch", {"torch": torch.__version__, "numpy": np.__version__}, TORCH, torch_steps)
    make("optax", {"optax": optax.__version__, "jax": jax.__version__, "numpy": np.__version__}, OPTAX, optax_steps)
    make("paper", {"python": platform.python_version(), "numpy": np.__version__}, PAPER, paper_steps)


if __name__ == "__main__":
    main()
