"""Promise 2, "right", by hand: every optimizer's first steps worked out as arithmetic, and what peers got wrong.

Each test runs on the reference in float64 and float32 and on the compiled kernels.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from decimal import Decimal
from math import hypot, sqrt
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastopt
from fastopt.rules import Spec, registry
from tests.support.configs import CONFIGS, Config, away
from tests.support.ulp import assert_close, float32_ulps, trace

SPECS = list(registry.values())


class Implementation(NamedTuple):
    """Where a step is computed: a module with a function for every optimizer, and its dtype."""

    module: Any
    dtype: Any

    @property
    def tolerance(self) -> float:
        """Relative distance from a value worked out by hand: 4 ULP at most."""
        return 4 * float(np.finfo(self.dtype).eps)


IMPLEMENTATIONS = {
    "reference-float64": Implementation(fastopt.reference, np.float64),
    "reference-float32": Implementation(fastopt.reference, np.float32),
    "compiled-float32": Implementation(fastopt.functional, np.float32),
}


@pytest.fixture(params=IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
def implementation(request: pytest.FixtureRequest) -> Implementation:
    return request.param


def _start(spec: Spec, p: Any, dtype: Any, **hypers: Any) -> dict[str, np.ndarray]:
    """`p` and its states before the first step."""
    values = spec.check({**{name: hyper.default for name, hyper in spec.hypers.items()}, **hypers})
    p = np.array(p, dtype, ndmin=1)
    states = {name: np.full_like(p, spec.initial(name, values)) for name in spec.states_for(spec.flags(values))}
    return {"p": p, **states, **{name: np.array([value]) for name, value in spec.running.items()}}


def _step(
    implementation: Implementation, spec: Spec, arrays: dict[str, np.ndarray], g: Any, step: int, **hypers: Any
) -> None:
    g = np.array(g, implementation.dtype, ndmin=1)
    getattr(implementation.module, spec.function)(**arrays, g=g, step=step, **hypers)


def _assert_same_bits(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], where: str) -> None:
    different = []
    for name, right in expected.items():
        got = actual[name]
        assert (got.dtype, got.shape) == (right.dtype, right.shape), f"{where}: {name}"
        unsigned = f"u{right.itemsize}"
        for k in np.flatnonzero(got.view(unsigned) != right.view(unsigned)):
            different.append(f"{where}, {got.dtype}: {name}[{k}] is {got[k]!r}, expected {right[k]!r}")
    assert not different, "\n".join(different)


def _named(specs: list[Spec]) -> Callable:
    return pytest.mark.parametrize("spec", specs, ids=[spec.function for spec in specs])


# --- First steps, by hand


class ByHand(NamedTuple):
    """Parameter 2.0, some gradients, and what stands in the arrays after each."""

    function: str
    hypers: dict[str, Any]
    gradients: tuple[float, ...]
    after: tuple[dict[str, float], ...]
    first_step: int = 1


BETAS = (0.5, 0.75)  # 1 - beta^t: 0.5, 0.75 and 0.25, 0.4375

# NAdam with momentum_decay 2: mu_t and the product up to it
MU_1, MU_2, MU_3 = (0.5 * (1 - 0.5 * 0.96**2), 0.5 * (1 - 0.5 * 0.96**4), 0.5 * (1 - 0.5 * 0.96**6))

# RAdam with beta2 0.75 at step 10: rho_inf is 7
RHO_10 = 7 - 2 * 10 * 0.75**10 / (1 - 0.75**10)
RECT_10 = sqrt((RHO_10 - 4) * (RHO_10 - 2) * 7 / ((7 - 4) * (7 - 2) * RHO_10))

BY_HAND = {
    "sgd": ByHand("sgd", {"lr": 0.1}, (3, -1), ({"p": 2 - 0.1 * 3}, {"p": 2 - 0.1 * 3 + 0.1 * 1})),
    "sgd_momentum": ByHand(
        "sgd",
        {"lr": 0.1, "momentum": 0.5, "dampening": 0.25},
        (3, -1),
        (
            {"momentum_buffer": 3, "p": 2 - 0.1 * 3},  # no dampening at the first step
            {"momentum_buffer": 0.5 * 3 - 0.75 * 1, "p": 1.7 - 0.1 * 0.75},
        ),
    ),
    "sgd_nesterov": ByHand(
        "sgd",
        {"lr": 0.1, "momentum": 0.5, "nesterov": True},
        (3, -1),
        (
            {"momentum_buffer": 3, "p": 2 - 0.1 * (3 + 0.5 * 3)},
            {"momentum_buffer": 0.5 * 3 - 1, "p": 1.55 - 0.1 * (-1 + 0.5 * 0.5)},
        ),
    ),
    "sgd_weight_decay": ByHand(
        "sgd",
        {"lr": 0.1, "weight_decay": 0.5},
        (3, -1),
        ({"p": 2 - 0.1 * (3 + 0.5 * 2)}, {"p": 1.6 - 0.1 * (-1 + 0.5 * 1.6)}),
    ),
    "sgd_maximize": ByHand(
        "sgd",
        {"lr": 0.1, "weight_decay": 0.5, "maximize": True},  # turns the gradient, not the penalty
        (3, -1),
        ({"p": 2 - 0.1 * (-3 + 0.5 * 2)}, {"p": 2.2 - 0.1 * (1 + 0.5 * 2.2)}),
    ),
    "sgd_l1": ByHand(
        "sgd",
        {"lr": 1.0, "l1": 0.25},
        (3, 1),
        ({"p": 2 - (3 + 0.25)}, {"p": -1.25 - (1 - 0.25)}),
    ),
    "momentum": ByHand(
        "momentum",
        {"lr": 0.1, "momentum": 0.5},
        (3, -1),
        (
            {"velocity": -0.1 * 3, "p": 2 - 0.1 * 3},
            {"velocity": 0.5 * -0.3 + 0.1 * 1, "p": 1.7 + 0.5 * -0.3 + 0.1 * 1},
        ),
    ),
    "nesterov": ByHand(
        "nesterov",
        {"lr": 0.1, "momentum": 0.5},
        (3, -1),
        (
            {"velocity": -0.1 * 3, "p": 2 + 0.5 * -0.3 - 0.1 * 3},
            {"velocity": 0.5 * -0.3 + 0.1 * 1, "p": 1.55 + 0.5 * -0.05 + 0.1 * 1},
        ),
    ),
    "adagrad": ByHand(
        "adagrad",
        {"lr": 0.5, "lr_decay": 0.25, "eps": 0.5, "initial_accumulator_value": 2.25},
        (2, -6),
        (
            {"sum": 2.25 + 4, "p": 2 - 0.5 * 2 / (2.5 + 0.5)},
            {"sum": 2.25 + 4 + 36, "p": 2 - 1 / 3 + 0.5 / 1.25 * 6 / (6.5 + 0.5)},
        ),
    ),
    "adadelta": ByHand(
        "adadelta",
        {"lr": 0.5, "rho": 0.75, "eps": 0.25},
        (2, -4),
        (
            {"square_avg": 0.25 * 4, "acc_delta": 0.25 * 4 * 0.25 / 1.25, "p": 2 - 0.5 * 2 * sqrt(0.25 / 1.25)},
            {
                "square_avg": 0.75 * 1 + 0.25 * 16,
                "acc_delta": 0.75 * 0.2 + 0.25 * 16 * (0.2 + 0.25) / (4.75 + 0.25),
                "p": 2 - 0.5 * 2 * sqrt(0.2) + 0.5 * 4 * sqrt(0.45 / 5),
            },
        ),
    ),
    "rmsprop": ByHand(
        "rmsprop",
        {"lr": 0.1, "alpha": 0.75, "eps": 0.5},
        (2, -1),
        (
            {"square_avg": 0.25 * 4, "p": 2 - 0.1 * 2 / (1 + 0.5)},
            {"square_avg": 0.75 * 1 + 0.25 * 1, "p": 2 - 0.1 * 2 / 1.5 + 0.1 * 1 / (1 + 0.5)},
        ),
    ),
    "rmsprop_momentum": ByHand(
        "rmsprop",
        {"lr": 0.1, "alpha": 0.75, "eps": 0.5, "momentum": 0.25},
        (2, -1),
        (
            {"momentum_buffer": 2 / 1.5, "p": 2 - 0.1 * 2 / 1.5},
            {"momentum_buffer": 0.25 * 2 / 1.5 - 1 / 1.5, "p": 2 - 0.1 * 2 / 1.5 + 0.1 * 0.5 / 1.5},
        ),
    ),
    "rmsprop_centered": ByHand(
        "rmsprop",
        {"lr": 0.1, "alpha": 0.75, "eps": 0.5, "centered": True},
        (2, -1),
        (
            {"square_avg": 1, "grad_avg": 0.25 * 2, "p": 2 - 0.1 * 2 / (sqrt(1 - 0.25) + 0.5)},
            {
                "square_avg": 0.75 * 1 + 0.25 * 1,
                "grad_avg": 0.75 * 0.5 - 0.25 * 1,
                "p": 2 - 0.1 * 2 / (sqrt(0.75) + 0.5) + 0.1 * 1 / (sqrt(1 - 0.125**2) + 0.5),
            },
        ),
    ),
    "rprop": ByHand(
        "rprop",
        {"lr": 0.1, "etas": (0.5, 1.25)},
        (2, 3, -1, -7, 5),
        (
            {"step_size": 0.1, "prev": 2, "p": 2 - 0.1},
            {"step_size": 0.1 * 1.25, "prev": 3, "p": 1.9 - 0.125},
            {"step_size": 0.125 * 0.5, "prev": 0, "p": 1.775},  # the sign changed: rest and forget
            {"step_size": 0.0625, "prev": -7, "p": 1.775 + 0.0625},
            {"step_size": 0.0625 * 0.5, "prev": 0, "p": 1.8375},
        ),
    ),
    "rprop_step_sizes": ByHand(
        "rprop",
        {"lr": 0.1, "etas": (0.5, 1.25), "step_sizes": (0.09, 0.11)},
        (2, 3, -1),
        (
            {"step_size": 0.1, "prev": 2, "p": 2 - 0.1},
            {"step_size": 0.11, "prev": 3, "p": 1.9 - 0.11},
            {"step_size": 0.09, "prev": 0, "p": 1.79},
        ),
    ),
    "asgd": ByHand(
        "asgd",
        {"lr": 0.5, "lambd": 0.1, "alpha": 2.0, "t0": 0.0},
        (1, -1, 1),
        (
            {"p": (1 - 0.1 * 0.5) * 2 - 0.5, "ax": 1.4},
            {
                "p": (1 - 0.1 * 0.5 / 1.05**2) * 1.4 + 0.5 / 1.05**2,
                "ax": (1 - 0.1 * 0.5 / 1.05**2) * 1.4 + 0.5 / 1.05**2,
            },
            {
                "p": (1 - 0.1 * 0.5 / 1.1**2) * ((1 - 0.1 * 0.5 / 1.05**2) * 1.4 + 0.5 / 1.05**2) - 0.5 / 1.1**2,
                "ax": (  # the mean of the last two
                    ((1 - 0.1 * 0.5 / 1.05**2) * 1.4 + 0.5 / 1.05**2) * (1 + 1 - 0.1 * 0.5 / 1.1**2) - 0.5 / 1.1**2
                )
                / 2,
            },
        ),
    ),
    "asgd_t0": ByHand(
        "asgd",
        {"lr": 0.5, "lambd": 0.0, "t0": 1.0},
        (1, 1, 1, -1),
        ({"p": 1.5, "ax": 1.5}, {"p": 1, "ax": 1}, {"p": 0.5, "ax": 0.5}, {"p": 1, "ax": (0.5 + 1) / 2}),
    ),
    "adam": ByHand(
        "adam",
        {"lr": 0.1, "betas": BETAS, "eps": 0.5},
        (2, 3),
        (
            {"exp_avg": 0.5 * 2, "exp_avg_sq": 0.25 * 4, "p": 2 - 0.1 * (1 / 0.5) / (sqrt(1 / 0.25) + 0.5)},
            {
                "exp_avg": 0.5 * 1 + 0.5 * 3,
                "exp_avg_sq": 0.75 * 1 + 0.25 * 9,
                "p": 2 - 0.1 * 2 / 2.5 - 0.1 * (2 / 0.75) / (sqrt(3 / 0.4375) + 0.5),
            },
        ),
    ),
    "adam_amsgrad": ByHand(
        "adam",
        {"lr": 0.1, "betas": BETAS, "eps": 0.5, "amsgrad": True},
        (2, 0),
        (
            {"exp_avg": 1, "exp_avg_sq": 1, "max_exp_avg_sq": 1, "p": 2 - 0.1 * 2 / 2.5},
            {
                "exp_avg": 0.5,
                "exp_avg_sq": 0.75,
                "max_exp_avg_sq": 1,
                "p": 2 - 0.1 * 2 / 2.5 - 0.1 * (0.5 / 0.75) / (sqrt(1 / 0.4375) + 0.5),
            },
        ),
    ),
    "adamw": ByHand(
        "adamw",
        {"lr": 0.1, "betas": BETAS, "eps": 0.5, "weight_decay": 0.5},
        (2, 3),
        (
            {"exp_avg": 1, "exp_avg_sq": 1, "p": 2 * (1 - 0.1 * 0.5) - 0.1 * 2 / 2.5},
            {
                "exp_avg": 2,
                "exp_avg_sq": 3,
                "p": (2 * 0.95 - 0.1 * 2 / 2.5) * (1 - 0.1 * 0.5) - 0.1 * (2 / 0.75) / (sqrt(3 / 0.4375) + 0.5),
            },
        ),
    ),
    "adamax": ByHand(
        "adamax",
        {"lr": 0.1, "betas": BETAS, "eps": 0.5},
        (2, 1),
        (
            {"exp_avg": 0.5 * 2, "exp_inf": 2 + 0.5, "p": 2 - 0.1 / 0.5 * 1 / 2.5},
            {
                "exp_avg": 0.5 * 1 + 0.5 * 1,
                "exp_inf": 0.75 * 2.5,  # more than 1 + 0.5
                "p": 2 - 0.1 / 0.5 * 1 / 2.5 - 0.1 / 0.75 * 1 / 1.875,
            },
        ),
    ),
    "nadam": ByHand(
        "nadam",
        {"lr": 0.1, "betas": BETAS, "eps": 0.5, "momentum_decay": 2.0},
        (2, 3),
        (
            {
                "exp_avg": 1,
                "exp_avg_sq": 1,
                "mu_product": MU_1,
                "p": 2 - 0.1 * (MU_2 * 1 / (1 - MU_1 * MU_2) + (1 - MU_1) * 2 / (1 - MU_1)) / (2 + 0.5),
            },
            {
                "exp_avg": 2,
                "exp_avg_sq": 3,
                "mu_product": MU_1 * MU_2,
                "p": 2
                - 0.1 * (MU_2 * 1 / (1 - MU_1 * MU_2) + (1 - MU_1) * 2 / (1 - MU_1)) / (2 + 0.5)
                - 0.1
                * (MU_3 * 2 / (1 - MU_1 * MU_2 * MU_3) + (1 - MU_2) * 3 / (1 - MU_1 * MU_2))
                / (sqrt(3 / 0.4375) + 0.5),
            },
        ),
    ),
    "radam": ByHand(
        "radam",
        {"lr": 0.1, "betas": BETAS, "eps": 0.5},
        (2, 3),
        (
            {"exp_avg": 1, "exp_avg_sq": 1, "p": 2 - 0.1 * 1 / 0.5},  # rho is 1, then 1.86: not adaptive
            {"exp_avg": 2, "exp_avg_sq": 3, "p": 1.8 - 0.1 * 2 / 0.75},
        ),
    ),
    "radam_rectified": ByHand(
        "radam",
        {"lr": 0.1, "betas": BETAS, "eps": 0.5},
        (2,),
        (
            {
                "exp_avg": 1,
                "exp_avg_sq": 1,
                "p": 2 - 0.1 * 1 / (1 - 0.5**10) * RECT_10 * sqrt(1 - 0.75**10) / (1 + 0.5),
            },
        ),
        first_step=10,
    ),
    "lion": ByHand(
        "lion",
        {"lr": 0.1, "betas": BETAS, "weight_decay": 0.5},
        (2, -1),
        (
            {"exp_avg": 0.25 * 2, "p": 2 * (1 - 0.1 * 0.5) - 0.1},
            {"exp_avg": 0.75 * 0.5 - 0.25 * 1, "p": 1.8 * (1 - 0.1 * 0.5) + 0.1},  # 0.5 * 0.5 - 0.5 * 1 < 0
        ),
    ),
}


@pytest.mark.parametrize("case", BY_HAND.values(), ids=BY_HAND.keys())
def test_first_steps_are_those_worked_out_by_hand(case: ByHand, implementation: Implementation) -> None:
    spec = registry[case.function]
    arrays = _start(spec, 2.0, implementation.dtype, **case.hypers)
    found = []
    for k, g in enumerate(case.gradients):
        _step(implementation, spec, arrays, g, case.first_step + k, **case.hypers)
        found.append({name: float(arrays[name][0]) for name in case.after[k]})
    assert found == [pytest.approx(after, rel=implementation.tolerance, abs=0) for after in case.after]


# --- Trust ratios, by hand

TRUSTED = [spec for spec in SPECS if spec.trust]


class TrustByHand(NamedTuple):
    """An array of two parameters, most often of norm 5, some gradients, and what stands in the arrays after each."""

    function: str
    hypers: dict[str, Any]
    p: tuple[float, float]
    gradients: tuple[tuple[float, float], ...]
    after: tuple[dict[str, tuple[float, float]], ...]


# the gradient (2, -6) gives m_hat = (2, -6) and the roots (2, 6): u = (2 / 4, -6 / 8) = (0.5, -0.75)
LAMB = {"lr": 0.1, "betas": BETAS, "eps": 2.0}
LAMB_P = (3 - 0.1 * 5 / hypot(0.5, 0.75) * 0.5, 4 + 0.1 * 5 / hypot(0.5, 0.75) * 0.75)
LAMB_U = (2 / 0.75 / (sqrt(3 / 0.4375) + 2), -0.5 / 0.75 / (sqrt(7.75 / 0.4375) + 2))
LAMB_DECAYED = (3 - 0.1 * 5 / hypot(1.25, 0.25) * 1.25, 4 - 0.1 * 5 / hypot(1.25, 0.25) * 0.25)

# the gradient (8, -6) has norm 10: a ratio of 0.5 * 5 / 10 = 0.25
LARS = {"lr": 0.1, "momentum": 0.5, "trust_coefficient": 0.5}
LARS_DECAYED = {"velocity": (-0.1 / 6 * (8 + 3), 0.1 / 6 * (6 - 4)), "p": (3 - 1.1 / 6, 4 + 0.2 / 6)}

TRUST_BY_HAND = {
    "lamb": TrustByHand(
        "lamb",
        LAMB,
        (3, 4),
        ((2, -6), (3, 2)),
        (
            {"exp_avg": (0.5 * 2, -0.5 * 6), "exp_avg_sq": (0.25 * 4, 0.25 * 36), "p": LAMB_P},
            {
                "exp_avg": (0.5 * 1 + 0.5 * 3, -0.5 * 3 + 0.5 * 2),
                "exp_avg_sq": (0.75 * 1 + 0.25 * 9, 0.75 * 9 + 0.25 * 4),
                "p": (
                    LAMB_P[0] - 0.1 * hypot(*LAMB_P) / hypot(*LAMB_U) * LAMB_U[0],
                    LAMB_P[1] - 0.1 * hypot(*LAMB_P) / hypot(*LAMB_U) * LAMB_U[1],
                ),
            },
        ),
    ),
    "lamb_weight_decay": TrustByHand(  # u = (0.5 + 0.25 * 3, -0.75 + 0.25 * 4)
        "lamb", {**LAMB, "weight_decay": 0.25}, (3, 4), ((2, -6),), ({"exp_avg": (1, -3), "p": LAMB_DECAYED},)
    ),
    "lamb_maximize": TrustByHand(  # turns the gradient, not the decay
        "lamb",
        {**LAMB, "weight_decay": 0.25, "maximize": True},
        (3, 4),
        ((-2, 6),),
        ({"exp_avg": (1, -3), "p": LAMB_DECAYED},),
    ),
    "lamb_l1": TrustByHand(  # in the gradient, hence in the moments: 1 + 1 and -5 - 1
        "lamb",
        {**LAMB, "l1": 1.0},
        (3, -4),
        ((1, -5),),
        ({"exp_avg": (1, -3), "exp_avg_sq": (1, 9), "p": (LAMB_P[0], -4 + (LAMB_P[1] - 4))},),
    ),
    "lamb_zero_parameters": TrustByHand(
        "lamb", {**LAMB, "weight_decay": 0.25}, (0, 0), ((2, -6),), ({"p": (-0.1 * 0.5, 0.1 * 0.75)},)
    ),
    "lamb_zero_gradient": TrustByHand(  # u = 0.25 * p, the ratio 4: lr alone says how far
        "lamb", {**LAMB, "weight_decay": 0.25}, (3, 4), ((0, 0),), ({"p": (3 - 0.1 * 3, 4 - 0.1 * 4)},)
    ),
    "lamb_zero_update": TrustByHand("lamb", LAMB, (3, 4), ((0, 0),), ({"exp_avg": (0, 0), "p": (3, 4)},)),
    "lars": TrustByHand(
        "lars",
        LARS,
        (3, 4),
        ((8, -6), (0, 5)),
        (
            {"velocity": (-0.1 * 0.25 * 8, 0.1 * 0.25 * 6), "p": (2.8, 4.15)},
            {
                "velocity": (0.5 * -0.2, 0.5 * 0.15 - 0.1 * 0.5 * hypot(2.8, 4.15) / 5 * 5),
                "p": (2.8 - 0.5 * 0.2, 4.15 + 0.5 * 0.15 - 0.1 * 0.5 * hypot(2.8, 4.15) / 5 * 5),
            },
        ),
    ),
    "lars_weight_decay": TrustByHand(  # 0.5 * 5 / (10 + 1 * 5) = 1 / 6; optax would divide by hypot(8 + 3, -6 + 4)
        "lars", {**LARS, "weight_decay": 1.0}, (3, 4), ((8, -6),), (LARS_DECAYED,)
    ),
    "lars_maximize": TrustByHand(
        "lars", {**LARS, "weight_decay": 1.0, "maximize": True}, (3, 4), ((-8, 6),), (LARS_DECAYED,)
    ),
    "lars_eps": TrustByHand(  # 0.5 * 5 / (10 + 1 * 5 + 10) = 0.1
        "lars",
        {**LARS, "weight_decay": 1.0, "eps": 10.0},
        (3, 4),
        ((8, -6),),
        ({"velocity": (-0.01 * (8 + 3), 0.01 * (6 - 4)), "p": (3 - 0.11, 4 + 0.02)},),
    ),
    "lars_l1": TrustByHand(  # not in the ratio
        "lars",
        {**LARS, "l1": 2.0},
        (3, -4),
        ((8, -6),),
        ({"velocity": (-0.1 * 0.25 * (8 + 2), 0.1 * 0.25 * (6 + 2)), "p": (3 - 0.25, -4 + 0.2)},),
    ),
    "lars_zero_parameters": TrustByHand(  # the ratio is 1, not 0.5
        "lars",
        {**LARS, "weight_decay": 1.0, "eps": 1.0},
        (0, 0),
        ((8, -6),),
        ({"velocity": (-0.1 * 8, 0.1 * 6), "p": (-0.8, 0.6)},),
    ),
    "lars_zero_gradient": TrustByHand(
        "lars",
        {**LARS, "weight_decay": 0.5, "eps": 1.0},
        (3, 4),
        ((8, -6), (0, 0)),
        (
            {"velocity": (-0.1 * 0.5 * 5 / 13.5 * 9.5, 0.1 * 0.5 * 5 / 13.5 * 4)},
            {
                "velocity": (
                    -0.5 * 0.25 / 13.5 * 9.5 - 0.1 * 0.5 * (3 - 0.25 / 13.5 * 9.5),
                    0.5 * 0.25 / 13.5 * 4 - 0.1 * 0.5 * (4 + 0.25 / 13.5 * 4),
                )
            },
        ),
    ),
}


@pytest.mark.parametrize("case", TRUST_BY_HAND.values(), ids=TRUST_BY_HAND.keys())
def test_first_steps_with_a_trust_ratio_are_those_worked_out_by_hand(
    case: TrustByHand, implementation: Implementation
) -> None:
    spec = registry[case.function]
    arrays = _start(spec, case.p, implementation.dtype, **case.hypers)
    for k, g in enumerate(case.gradients):
        _step(implementation, spec, arrays, g, 1 + k, **case.hypers)
        found = {name: tuple(map(float, arrays[name])) for name in case.after[k]}
        near = {
            name: pytest.approx(value, rel=implementation.tolerance, abs=0) for name, value in case.after[k].items()
        }
        assert found == near, f"step {1 + k}"


# --- The gradient stage: numbers with few bits, so that nothing rounds and bits can be compared

P = np.array([0.5, -0.25, 0.0, 2.0, -1.5, 1.0, -3.0, 0.125] * 3)[:19]
G = np.array([0.25, 1.5, -2.0, 0.0, 1.0, -0.5, 0.75] * 3)[:19]


def _one_step(
    implementation: Implementation,
    spec: Spec,
    gradient: Callable[[np.ndarray], np.ndarray] = lambda _: G,
    shrink: float = 1.0,
    **hypers: Any,
) -> dict[str, np.ndarray]:
    """Arrays after one step on `gradient` of the parameters, which are multiplied by `shrink` before it."""
    arrays = _start(spec, P, implementation.dtype, **hypers)
    arrays["p"] *= implementation.dtype(shrink)
    _step(implementation, spec, arrays, gradient(P), 1, **hypers)
    return arrays


def _decoupled(spec: Spec) -> bool:
    return spec.cls.decoupled_weight_decay or "decoupled_weight_decay" in spec.hypers


UNTRUSTED = [spec for spec in SPECS if spec.trust is None]
"""Those without a trust ratio, in which penalty and gradient would count in their own way."""


@_named([spec for spec in UNTRUSTED if "weight_decay" in spec.hypers and not spec.cls.decoupled_weight_decay])
def test_weight_decay_is_added_to_the_gradient(spec: Spec, implementation: Implementation) -> None:
    by_hand = _one_step(implementation, spec, lambda p: G + 0.25 * p)
    _assert_same_bits(_one_step(implementation, spec, weight_decay=0.25), by_hand, spec.function)


@_named([spec for spec in SPECS if _decoupled(spec)])
def test_decoupled_weight_decay_shrinks_the_parameter_only(spec: Spec, implementation: Implementation) -> None:
    flag = {} if spec.cls.decoupled_weight_decay else {"decoupled_weight_decay": True}
    by_hand = _one_step(implementation, spec, shrink=1 - 0.5 * 0.25, lr=0.5, weight_decay=0.0)
    _assert_same_bits(_one_step(implementation, spec, lr=0.5, weight_decay=0.25, **flag), by_hand, spec.function)


@_named([spec for spec in SPECS if "maximize" in spec.hypers])
def test_maximize_turns_the_gradient(spec: Spec, implementation: Implementation) -> None:
    by_hand = _one_step(implementation, spec, lambda _: -G)
    _assert_same_bits(_one_step(implementation, spec, maximize=True), by_hand, spec.function)


@_named([spec for spec in UNTRUSTED if "l1" in spec.hypers])
def test_l1_adds_the_sign_of_the_parameter(spec: Spec, implementation: Implementation) -> None:
    by_hand = _one_step(implementation, spec, lambda p: G + 0.25 * np.sign(p))
    _assert_same_bits(_one_step(implementation, spec, l1=0.25), by_hand, spec.function)


@_named([spec for spec in SPECS if _decoupled(spec)])
def test_a_small_decay_is_not_lost_in_a_factor_near_1(spec: Spec, implementation: Implementation) -> None:
    """1 - 1e-5 is 0.14% off in float32. Rounding is not: over 10,000 parameters it evens out."""
    hypers = {} if spec.cls.decoupled_weight_decay else {"decoupled_weight_decay": True}
    before = np.random.default_rng(1).uniform(1, 2, 10_000).astype(implementation.dtype)
    arrays = _start(spec, before, implementation.dtype)
    _step(implementation, spec, arrays, np.zeros(10_000), 1, lr=1e-3, weight_decay=1e-2, **hypers)
    decay = (before.astype(np.float64) - arrays["p"]).sum() / before.sum(dtype=np.float64)
    assert decay == pytest.approx(1e-5, rel=2e-4)


# --- Trust ratios


def _nan_where(spec: Spec, where: list[int]) -> list[int]:
    """Where NaN stands after a step that met NaN at `where`: a trust ratio spreads it over the array."""
    return list(range(P.size)) if spec.trust else where


@_named(TRUSTED)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_is_one_array_matters_to_a_trust_ratio(spec: Spec, backend: str) -> None:
    """Two halves are two arrays with a ratio each: as if each were alone, and other than one array of both."""
    whole, halves, alone = [P.astype(np.float32)], np.split(P.astype(np.float32), [9]), np.split(np.float32(P), [9])
    g = G.astype(np.float32)
    spec.cls(whole, backend=backend).step([g])
    spec.cls(halves, backend=backend).step(np.split(g, [9]))
    for half, gradient in zip(alone, np.split(g, [9]), strict=True):
        spec.cls([half], backend=backend).step([gradient])
    for half, other, of_whole in zip(halves, alone, np.split(whole[0], [9]), strict=True):
        assert half.tolist() == other.tolist()
        assert half.tolist() != of_whole.tolist()


@_named(TRUSTED)
def test_a_step_with_a_trust_ratio_is_as_long_as_the_parameters(spec: Spec, implementation: Implementation) -> None:
    """Even where the square of the norm is beyond float32."""
    small = _one_step(implementation, spec, lr=0.5)["p"]
    for scale in (2.0**100, 2.0**-80):
        arrays = _one_step(implementation, spec, shrink=scale, lr=0.5)
        assert (arrays["p"] / implementation.dtype(scale)).tolist() == small.tolist()


@_named(TRUSTED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_a_trust_ratio_does_not_hide_a_gradient_that_is_not_finite(
    spec: Spec, value: float, implementation: Implementation
) -> None:
    g = G.copy()
    g[[2, 17]] = value
    arrays = _one_step(implementation, spec, lambda _: g)
    assert np.isnan(arrays["p"][[2, 17]]).all()
    assert not np.isfinite(arrays[next(iter(spec.states))][[2, 17]]).any()


# --- Every kernel against its reference


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_compiled_step_is_the_reference_to_a_few_ulps(config: Config) -> None:
    """On random numbers; the golden vectors and torch know no l1, and not every combination of flags."""
    function = config.spec.function
    rng = np.random.default_rng(1)
    p = rng.standard_normal(1000) * 10 ** rng.uniform(-2, 1, 1000)
    magnitude = 10 ** rng.uniform(-6, 3, 1000)
    compiled = _start(config.spec, p, np.float32, **config.hypers)
    for step in range(1, 9):
        g = (rng.standard_normal(1000) * magnitude).astype(np.float32)
        exact = {name: array.astype(np.float64) for name, array in compiled.items()}
        terms = trace(function, {**exact, "g": g}, step, config.hypers)
        getattr(fastopt.reference, function)(**exact, g=g.astype(np.float64), step=step, **config.hypers)
        getattr(fastopt.functional, function)(**compiled, g=g, step=step, **config.hypers)
        assert_close(float32_ulps(function), compiled, exact, terms, f"{config}, step {step}")


# --- What peers got wrong


def test_adagrad_has_weight_decay_in_the_numerator(implementation: Implementation) -> None:
    arrays = _start(registry["adagrad"], 2.0, implementation.dtype)
    _step(implementation, registry["adagrad"], arrays, 0.0, 1, lr=0.5, weight_decay=0.5, eps=0.0)
    assert float(arrays["p"][0]) == 2 - 0.5 * (0.5 * 2) / sqrt((0.5 * 2) ** 2)


def test_lion_rests_on_a_zero_gradient_and_a_zero_state(implementation: Implementation) -> None:
    arrays = _start(registry["lion"], P, implementation.dtype)
    before = _start(registry["lion"], P, implementation.dtype)
    _step(implementation, registry["lion"], arrays, np.zeros_like(P), 1, lr=0.5)
    _assert_same_bits(arrays, before, "lion")


in_the_reference = pytest.mark.parametrize(
    "implementation", [IMPLEMENTATIONS["reference-float64"]], ids=["reference-float64"]
)
"""For what `test_properties` holds the kernels to."""


@_named(SPECS)
@in_the_reference
def test_zero_gradient_and_state_leave_a_parameter_unchanged(spec: Spec, implementation: Implementation) -> None:
    none = {name: 0.0 for name in ("weight_decay", "lambd") if name in spec.hypers}
    arrays = _start(spec, P / 3, implementation.dtype, **none)
    _step(implementation, spec, arrays, np.zeros_like(P), 1, **none)
    _assert_same_bits(arrays, {"p": P / 3}, spec.function)


@_named(SPECS)
@in_the_reference
def test_a_nan_gradient_reaches_its_parameter_only(spec: Spec, implementation: Implementation) -> None:
    arrays = _start(spec, P, implementation.dtype)
    g = G.copy()
    g[[2, 17]] = np.nan
    _step(implementation, spec, arrays, g, 1)
    assert np.flatnonzero(np.isnan(arrays["p"])).tolist() == _nan_where(spec, [2, 17])


@_named(SPECS)
@in_the_reference
def test_a_nan_parameter_stays_nan(spec: Spec, implementation: Implementation) -> None:
    p = P.copy()
    p[[2, 17]] = np.nan
    arrays = _start(spec, p, implementation.dtype)
    _step(implementation, spec, arrays, G, 1)
    assert np.flatnonzero(np.isnan(arrays["p"])).tolist() == _nan_where(spec, [2, 17])


def test_asgd_averages_nothing_from_before_the_first_step(implementation: Implementation) -> None:
    """At t0 = 0 the mean begins with the first parameter; below -1 it would count what `ax` held before."""
    spec = registry["asgd"]
    arrays = _start(spec, 2.0, implementation.dtype)
    arrays["ax"][:] = 7
    for t0 in (-2.0, -0.5):
        with pytest.raises(ValueError, match=r"t0 must be >= 0"):
            _step(implementation, spec, arrays, 1.0, 1, t0=t0)
        with pytest.raises(ValueError, match=r"ASGD: t0 must be >= 0"):
            fastopt.ASGD(np.ones(1, np.float32), t0=t0)
    assert (float(arrays["p"][0]), float(arrays["ax"][0])) == (2, 7)
    _step(implementation, spec, arrays, 1.0, 1, t0=0.0)
    assert float(arrays["p"][0]) < 2
    assert float(arrays["ax"][0]) == pytest.approx(float(arrays["p"][0]), rel=implementation.tolerance, abs=0)


def test_amsgrad_keeps_the_largest_second_moment(implementation: Implementation) -> None:
    hypers = {"betas": (0.5, 0.5), "amsgrad": True}
    arrays = _start(registry["adam"], 2.0, implementation.dtype, **hypers)
    _step(implementation, registry["adam"], arrays, 4.0, 1, **hypers)
    for step in range(2, 20):
        _step(implementation, registry["adam"], arrays, 0.25, step, **hypers)
    assert float(arrays["max_exp_avg_sq"][0]) == 0.5 * 4.0**2


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_centered_rmsprop_stays_finite_on_a_constant_gradient(momentum: float, implementation: Implementation) -> None:
    """The variance goes to 0, and rounding takes it below: torch's root is NaN then."""
    hypers = {"alpha": 0.9, "centered": True, "momentum": momentum}
    g = np.linspace(-3, 3, 19)
    arrays = _start(registry["rmsprop"], P, implementation.dtype, **hypers)
    for step in range(1, 1001):
        _step(implementation, registry["rmsprop"], arrays, g, step, **hypers)
    assert np.isfinite(arrays["p"]).all(), arrays["p"]


CONTEXT: dict[str, dict[str, Any]] = {
    "nesterov": {"momentum": 0.5},
    "dampening": {"momentum": 0.5},
    "decoupled_weight_decay": {"weight_decay": 0.25},
    "alpha": {"lambd": 0.5},
}
"""What a hyperparameter needs to have an effect."""


def _eight_steps(spec: Spec, backend: str, hypers: dict[str, Any]) -> dict[str, np.ndarray]:
    p = P.astype(np.float32)
    optimizer = spec.cls(p, **hypers, backend=backend)
    for k in range(8):
        optimizer.step((0.5**k * G).astype(np.float32))
    return {"p": p, **optimizer.state[0]}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("spec", "name"),
    [pytest.param(spec, name, id=f"{spec.function}-{name}") for spec in SPECS for name in spec.hypers],
)
def test_no_hyperparameter_is_accepted_and_ignored(spec: Spec, name: str, backend: str) -> None:
    context = {k: v for k, v in CONTEXT.get(name, {}).items() if k in spec.hypers}
    value = away(spec.hypers[name].kind, spec.hypers[name].default)
    without = _eight_steps(spec, backend, context)
    changed = _eight_steps(spec, backend, {**context, name: value})
    effect = [array for array in without if not np.array_equal(changed[array], without[array])]
    assert effect, f"{spec.name}, {backend}: {name}={value} gives what {spec.hypers[name].default} gives"


# --- 10,000 steps

LONG = 10_000
LONG_BETAS = (0.9999, 0.99999)  # after 10,000 steps, 0.37 and 0.90 are left of the first
LONG_HYPERS = {"lr": 0.5, "betas": LONG_BETAS, "eps": 0.5}


def _after_a_long_rest(cls: type, second_moment: str, backend: str, **hypers: Any) -> tuple[float, Any]:
    """Parameter 2.0 after step 10,000 with both moments 1 before it and gradient 0.5; the state too.

    The steps before it had zero gradients.
    """
    p = np.array([2.0], np.float32)
    optimizer = cls(p, **LONG_HYPERS, **hypers, backend=backend)
    zero = np.zeros(1, np.float32)
    for _ in range(LONG - 1):
        optimizer.step(zero)
    state = optimizer.state[0]
    state["exp_avg"][...] = 1
    state[second_moment][...] = 1
    optimizer.step(np.array([0.5], np.float32))
    return float(p[0]), state


class Exact(NamedTuple):
    """Step 10,000 in 50 digits: bias corrections and moments."""

    correction1: Decimal
    correction2: Decimal
    exp_avg: Decimal
    exp_avg_sq: Decimal
    beta1: Decimal
    beta2: Decimal


@pytest.fixture
def exact() -> Exact:
    with decimal.localcontext() as context:
        context.prec = 50
        beta1, beta2 = map(Decimal, LONG_BETAS)
        m = beta1 + (1 - beta1) / 2
        v = beta2 + (1 - beta2) / 4
        return Exact(1 - beta1**LONG, 1 - beta2**LONG, m, v, beta1, beta2)


both_backends = pytest.mark.parametrize("backend", ["cpu", "reference"])
close = IMPLEMENTATIONS["compiled-float32"].tolerance


@both_backends
@pytest.mark.parametrize("cls", [fastopt.Adam, fastopt.AdamW], ids=lambda cls: cls.__name__)
def test_bias_corrections_of_adam_do_not_drift(cls: type, backend: str, exact: Exact) -> None:
    p, _ = _after_a_long_rest(cls, "exp_avg_sq", backend, weight_decay=0.0)
    root = (exact.exp_avg_sq / exact.correction2).sqrt()
    expected = 2 - exact.exp_avg / exact.correction1 / (root + Decimal("0.5")) / 2
    assert p == pytest.approx(float(expected), rel=close, abs=0)


@both_backends
def test_bias_correction_of_adamax_does_not_drift(backend: str, exact: Exact) -> None:
    p, _ = _after_a_long_rest(fastopt.Adamax, "exp_inf", backend)
    infinity_norm = max(exact.beta2, Decimal("0.5") + Decimal("0.5"))
    expected = 2 - exact.exp_avg / exact.correction1 / infinity_norm / 2
    assert p == pytest.approx(float(expected), rel=close, abs=0)


@both_backends
def test_bias_correction_and_rectification_of_radam_do_not_drift(backend: str, exact: Exact) -> None:
    p, _ = _after_a_long_rest(fastopt.RAdam, "exp_avg_sq", backend)
    infinite = 2 / (1 - exact.beta2) - 1
    rho = infinite - 2 * LONG * (1 - exact.correction2) / exact.correction2
    rectification = ((rho - 4) * (rho - 2) * infinite / ((infinite - 4) * (infinite - 2) * rho)).sqrt()
    root = exact.exp_avg_sq.sqrt()
    adaptive = exact.correction2.sqrt() / (root + Decimal("0.5")) * rectification
    expected = 2 - exact.exp_avg / exact.correction1 * adaptive / 2
    assert p == pytest.approx(float(expected), rel=close, abs=0)


def _mu(step: int) -> float:
    return LONG_BETAS[0] * (1 - 0.5 * 0.96 ** (step * 100.0))


@both_backends
def test_the_momentum_product_of_nadam_does_not_drift(backend: str) -> None:
    _, state = _after_a_long_rest(fastopt.NAdam, "exp_avg_sq", backend, momentum_decay=100.0)
    product = math.exp(math.fsum(math.log(_mu(step)) for step in range(1, LONG + 1)))
    assert float(state["mu_product"]) == pytest.approx(product, rel=1e-12, abs=0)


@both_backends
def test_bias_corrections_of_nadam_do_not_drift(backend: str, exact: Exact) -> None:
    p, _ = _after_a_long_rest(fastopt.NAdam, "exp_avg_sq", backend, momentum_decay=100.0)
    product = math.exp(math.fsum(math.log(_mu(step)) for step in range(1, LONG + 1)))
    ahead = _mu(LONG + 1) * float(exact.exp_avg) / (1 - product * _mu(LONG + 1))
    m_hat = ahead + (1 - _mu(LONG)) * 0.5 / (1 - product)
    expected = 2 - 0.5 * m_hat / (sqrt(exact.exp_avg_sq / exact.correction2) + 0.5)
    assert p == pytest.approx(expected, rel=close, abs=0)


@pytest.mark.parametrize("module", [fastopt.functional, fastopt.reference], ids=lambda module: module.__name__)
def test_sgd_starts_its_buffer_from_the_first_gradient_whatever_the_buffer_holds(module):
    p, g, buffer = np.full(1, np.float32(2)), np.ones(1, np.float32), np.full(1, np.float32(4))
    module.sgd(p, g, buffer, step=1, lr=0.5, momentum=0.5, dampening=0.5)
    assert p.tolist() == [1.5]
    assert buffer.tolist() == [1.0]
