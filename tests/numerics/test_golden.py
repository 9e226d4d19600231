"""Promise 2, "right", against golden vectors: what torch.optim, optax and a paper computed in float64.

`golden/make.py` made them and says what is in them. Here the reference is held against them in float64, and the
compiled kernels against the reference, both in ULP of the largest term (see `ulp`).
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
from typing import Any

import numpy as np
import pytest

import fastopt
from fastopt.rules import registry
from tests.support.ulp import assert_close, float32_ulps, float64_ulps, trace, unit

GOLDEN = pathlib.Path(__file__).parent / "golden"
STEPS = range(1, 9)


def trajectory_ulps(function: str) -> float:
    """ULP at most after eight float64 steps in a row; the largest distances found are 7, and 15 for LARS.

    One error of LARS's ratio is in every velocity that follows, and the parameter adds up eight of them.
    """
    return 24 if function == "lars" else 8


def _cases() -> list[Any]:
    """Every case; those of several tensors once for each, with ``part``, the tensor's place among the elements."""
    cases = []
    for library in ("torch", "optax", "paper"):
        for case in json.loads((GOLDEN / f"{library}.json").read_text())["cases"]:
            name = f"{library}-{case['optimizer']}-{case['case'].replace(' ', '_').replace(',', '')}"
            ends = list(itertools.accumulate(case.get("tensors", [])))
            parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
            for part in parts or [slice(None)]:
                label = f"{name}-{part.start}:{part.stop}" if parts else name
                cases.append(pytest.param({**case, "library": library, "label": label, "part": part}, id=label))
    return cases


@functools.cache
def _arrays(library: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{library}.npz") as file:
        return dict(file)


def _hypers(case: dict[str, Any], step: int) -> dict[str, Any]:
    """Hyperparameters of `case` at `step`."""
    hypers = dict(case["hypers"])
    if isinstance(hypers.get("lr"), list):
        hypers["lr"] = hypers["lr"][step - 1]
    return hypers


def _after(case: dict[str, Any], step: int) -> dict[str, np.ndarray]:
    """Copies of parameters and states of `case` after `step`, in float64; 0 is before the first."""
    arrays = _arrays(case["library"])
    names = ("p", *case["states"])
    if step:
        rows = {name: arrays[f"{case['optimizer']}/{name}"][case["row"], step - 1] for name in names}
        return {name: np.atleast_1d(row)[case["part"]].copy() for name, row in rows.items()}
    spec = registry[case["optimizer"]]
    values = {**{name: hyper.default for name, hyper in spec.hypers.items()}, **_hypers(case, 1)}
    p = arrays["p"][case["part"]]
    before = {"p": np.zeros_like(p) if case.get("zero") == "p" else p.copy()}
    for name in case["states"]:
        if name in spec.running:
            before[name] = np.array([spec.running[name]])
        else:
            before[name] = np.full_like(p, spec.initial(name, values))
    return before


def _gradient(case: dict[str, Any], step: int) -> np.ndarray:
    g = _arrays(case["library"])["g"][step - 1, case["part"]]
    return np.zeros_like(g) if case.get("zero") == "g" and step % 2 else g


# --- The yardstick


def test_the_unit_of_an_error_is_the_last_place_of_the_largest_term() -> None:
    """2 - 1.9999 is known to the last place of the 2."""
    terms = trace("sgd", {"p": np.array([2.0]), "g": np.array([1.9999])}, 1, {"lr": 1.0})
    assert unit(terms["p"].scale, np.float32) == np.spacing(np.float32(2))


def test_a_result_of_which_no_digit_is_known_is_refused() -> None:
    """0.5 * 1 - 0.5 * (1 - 1e-9) has no sign in float32."""
    arrays = {"p": np.array([2.0]), "g": np.array([1e-9 - 1]), "exp_avg": np.array([1.0])}
    terms = trace("lion", arrays, 1, {"betas": (0.5, 0.5)})
    right = terms["p"].value
    with pytest.raises(AssertionError, match="nothing is known there"):
        assert_close(4, {"p": right}, {"p": right}, terms, "lion")


# --- fastopt


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("case", _cases())
def test_a_reference_step_is_the_golden_one(case: dict[str, Any], step: int) -> None:
    start = {**_after(case, step - 1), "g": _gradient(case, step)}
    terms = trace(case["optimizer"], start, step, _hypers(case, step))
    getattr(fastopt.reference, case["optimizer"])(**start, step=step, **_hypers(case, step))
    bound = float64_ulps(case["optimizer"])
    assert_close(bound, start, _after(case, step), terms, f"{case['label']}, step {step}")


@pytest.mark.parametrize("case", _cases())
def test_the_reference_stays_on_the_golden_trajectory(case: dict[str, Any]) -> None:
    arrays = _after(case, 0)
    terms: dict[str, Any] = dict(arrays)
    for step in STEPS:
        terms = trace(case["optimizer"], {**terms, "g": _gradient(case, step)}, step, _hypers(case, step))
        function = getattr(fastopt.reference, case["optimizer"])
        function(**arrays, g=_gradient(case, step), step=step, **_hypers(case, step))
    bound = trajectory_ulps(case["optimizer"])
    assert_close(bound, arrays, _after(case, STEPS[-1]), terms, f"{case['label']}, {STEPS[-1]} steps")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("case", _cases())
def test_a_compiled_step_is_the_reference_to_a_few_ulps(case: dict[str, Any], step: int) -> None:
    start = {**_after(case, step - 1), "g": _gradient(case, step)}
    running = registry[case["optimizer"]].running
    compiled = {name: array if name in running else array.astype(np.float32) for name, array in start.items()}
    exact = {name: array.astype(np.float64) for name, array in compiled.items()}
    terms = trace(case["optimizer"], exact, step, _hypers(case, step))
    getattr(fastopt.reference, case["optimizer"])(**exact, step=step, **_hypers(case, step))
    getattr(fastopt.functional, case["optimizer"])(**compiled, step=step, **_hypers(case, step))
    del exact["g"]
    bound = float32_ulps(case["optimizer"])
    assert_close(bound, compiled, exact, terms, f"{case['label']}, step {step}")
