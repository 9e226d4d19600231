"""fastopt beside torch.optim, live: the same numbers, the same hyperparameters, and torch's checkpoints load.

The golden vectors hold what one version of torch computed; here it is the installed one, over the option sets
that torch tests itself with.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fastopt
from fastopt.rules import registry
from tests.support.ulp import assert_close, float32_ulps, trace

torch = pytest.importorskip("torch")

# The option sets of torch 2.13, torch/testing/_internal/common_optimizers.py, `optim_inputs_func_*` with
# device="cpu", in their order; that module itself needs `expecttest`. Left out is what fastopt does not have by
# design: a tensor as learning rate, and capturable, foreach, fused and differentiable.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "Adadelta": [
        {},
        {"lr": 0.01},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"weight_decay": 0.1, "maximize": True},
        {"rho": 0.95, "weight_decay": 0.9},
    ],
    "Adagrad": [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"lr": 0.1},
        {"initial_accumulator_value": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1},
    ],
    "Adam": [
        {},
        {"lr": 0.01},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "amsgrad": True},
    ],
    "Adamax": [
        {},
        {"lr": 0.1},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"weight_decay": 0.1, "maximize": True},
    ],
    "AdamW": [
        {},
        {"lr": 0.01},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "amsgrad": True},
    ],
    "ASGD": [
        {},
        {"lambd": 0.1},
        {"lr": 0.02},
        {"t0": 100},
        {"maximize": True},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
    ],
    "NAdam": [
        {},
        {"lr": 1e-3},
        {"momentum_decay": 6e-3},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "momentum_decay": 6e-3},
        {"weight_decay": 0.1, "momentum_decay": 6e-3, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, "maximize": True},
    ],
    "RAdam": [
        {},
        {"lr": 2e-3},
        {"eps": 1e-6},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, "maximize": True},
    ],
    "RMSprop": [
        {},
        {"lr": 1e-3},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"weight_decay": 0.1, "centered": True},
        {"maximize": True, "weight_decay": 0.1},
        {"weight_decay": 0.1, "centered": True, "momentum": 0.1},
        {"weight_decay": 0.1, "centered": True, "momentum": 0.1, "maximize": True},
    ],
    "Rprop": [
        {},
        {"lr": 2e-4},
        {"etas": (0.5, 1.5)},
        {"step_sizes": (2e-6, 100)},
        {"maximize": True},
    ],
    "SGD": [
        {},
        {"lr": 1e-2},
        {"weight_decay": 0.5},
        {"momentum": 0.9},
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
}

IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
"""Arguments of torch's optimizers that choose an implementation; fastopt has none of them."""
OURS = ("l1", "options")
"""Arguments of fastopt's optimizers that torch does not have."""
NOT_OURS = ("step", "eta", "mu")
"""Entries of torch's states that fastopt has elsewhere or computes from the step."""

STEPS = 8  # RAdam's rectified branch starts at the sixth
SHAPES = ((4, 5), (), (23,))
FLOAT64_ULPS = 8
"""At most for one float64 step, 1.8e-15 of the largest term; 4 on the machine where this was written.

Torch's float64 depends on the machine: it has kernels with and without fused multiply-add.
"""
CONTINUED_STEPS = 4
"""Steps on both sides from a loaded state, apart by at most two steps' bound: both round.

Found: 7 ULP for Adadelta, 4 for the others.
"""


def _options() -> list[Any]:
    return [
        pytest.param(name, kwargs, id="-".join([name, *(f"{k}={v}" for k, v in kwargs.items())]).replace(" ", ""))
        for name, sets in OPTIONS.items()
        for kwargs in sets
    ]


def _data() -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Parameters, and gradients for every step: float32, of magnitudes from 1e-4 to 1e2, with zeros."""
    rng = np.random.default_rng(5)
    parameters = [np.float32(rng.standard_normal(shape)) for shape in SHAPES]
    magnitudes = [10.0 ** rng.uniform(-4, 2, shape) for shape in SHAPES]
    gradients = [
        [
            np.asarray(rng.standard_normal(shape) * magnitude * (rng.random(shape) < 0.9), np.float32)
            for shape, magnitude in zip(SHAPES, magnitudes, strict=True)
        ]
        for _ in range(STEPS)
    ]
    return [np.asarray(p) for p in parameters], gradients


@pytest.fixture
def float64_default() -> Iterator[None]:
    """torch keeps mu_product, eta and mu in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class _Torch:
    """An optimizer of torch, one parameter of each shape, fed with NumPy arrays."""

    def __init__(self, name: str, kwargs: dict[str, Any], parameters: list[np.ndarray]) -> None:
        self.parameters = [torch.from_numpy(p.copy()) for p in parameters]
        self.optimizer = getattr(torch.optim, name)(self.parameters, **kwargs, foreach=False)

    def step(self, gradients: list[np.ndarray]) -> None:
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = torch.from_numpy(g.copy())
        self.optimizer.step()

    def arrays(self, k: int) -> dict[str, np.ndarray]:
        """Copies of parameter `k` and its states, under fastopt's names."""
        p = self.parameters[k]
        states = {n: v for n, v in self.optimizer.state[p].items() if v is not None and n not in NOT_OURS}
        return {name: np.array(tensor.numpy()) for name, tensor in {"p": p, **states}.items()}

    def round_to_float32(self) -> None:
        """Round parameters and states, except running scalars, to numbers that float32 has too."""
        for p in self.parameters:
            for name, tensor in {"p": p, **self.optimizer.state[p]}.items():
                if tensor is not None and tensor.shape == p.shape and name not in (*NOT_OURS, "mu_product"):
                    tensor.copy_(tensor.float())


def _before(name: str, kwargs: dict[str, Any], p: np.ndarray, dtype: Any) -> dict[str, np.ndarray]:
    """fastopt's arrays before the first step."""
    spec = registry[name.lower()]
    values = spec.check({**{n: hyper.default for n, hyper in spec.hypers.items()}, **kwargs})
    arrays = {n: np.full(p.shape, spec.initial(n, values), dtype) for n in spec.states_for(spec.flags(values))}
    return {"p": p.astype(dtype), **arrays, **{n: np.array([value]) for n, value in spec.running.items()}}


def _shaped(torch_arrays: dict[str, np.ndarray], like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Torch's arrays that fastopt has, with running scalars in its shape."""
    return {name: torch_arrays[name].reshape(array.shape) for name, array in like.items()}


# --- The same numbers


@pytest.mark.usefixtures("float64_default")
@pytest.mark.parametrize("tensor", range(len(SHAPES)), ids=[f"shape{shape}".replace(" ", "") for shape in SHAPES])
@pytest.mark.parametrize(("name", "kwargs"), _options())
def test_the_reference_follows_torch_in_float64(name: str, kwargs: dict[str, Any], tensor: int) -> None:
    parameters, gradients = _data()
    theirs = _Torch(name, kwargs, [p.astype(np.float64) for p in parameters])
    ours = _before(name, kwargs, parameters[tensor], np.float64)
    for step in range(1, STEPS + 1):
        g = gradients[step - 1][tensor].astype(np.float64)
        terms = trace(name.lower(), {**ours, "g": g}, step, kwargs)
        getattr(fastopt.reference, name.lower())(**ours, g=g, step=step, **kwargs)
        theirs.step([gradient.astype(np.float64) for gradient in gradients[step - 1]])
        right = _shaped(theirs.arrays(tensor), ours)
        assert_close(FLOAT64_ULPS, ours, right, terms, f"{name}, {kwargs}, step {step}")
        ours = right


@pytest.mark.usefixtures("float64_default")
@pytest.mark.parametrize("tensor", range(len(SHAPES)), ids=[f"shape{shape}".replace(" ", "") for shape in SHAPES])
@pytest.mark.parametrize(("name", "kwargs"), _options())
def test_a_compiled_step_is_torchs_in_float64_to_a_few_ulps(name: str, kwargs: dict[str, Any], tensor: int) -> None:
    parameters, gradients = _data()
    theirs = _Torch(name, kwargs, [p.astype(np.float64) for p in parameters])
    running = registry[name.lower()].running
    exact = _before(name, kwargs, parameters[tensor], np.float64)
    for step in range(1, STEPS + 1):
        g = gradients[step - 1][tensor]
        compiled = {n: a.copy() if n in running else a.astype(np.float32) for n, a in exact.items()}
        terms = trace(name.lower(), {**compiled, "g": g}, step, kwargs)
        getattr(fastopt.functional, name.lower())(**compiled, g=g, step=step, **kwargs)
        theirs.step([gradient.astype(np.float64) for gradient in gradients[step - 1]])
        right = _shaped(theirs.arrays(tensor), compiled)
        assert_close(float32_ulps(name.lower()), compiled, right, terms, f"{name}, {kwargs}, step {step}")
        theirs.round_to_float32()
        exact = _shaped(theirs.arrays(tensor), compiled)


# --- Checkpoints


@pytest.mark.parametrize("taken_after", [0, 1, 4])
@pytest.mark.parametrize(("name", "kwargs"), _options())
def test_a_state_dict_of_torch_continues_here(name: str, kwargs: dict[str, Any], taken_after: int) -> None:
    parameters, gradients = _data()
    theirs = _Torch(name, kwargs, parameters)
    for k in range(taken_after):
        theirs.step(gradients[k])
    ours = [p.numpy().copy() for p in theirs.parameters]
    optimizer = getattr(fastopt, name)(ours)
    optimizer.load_state_dict(theirs.optimizer.state_dict())
    terms: list[dict[str, Any]] = [
        {"p": p, **{n: array for n, array in state.items() if n != "step"}}
        for p, state in zip(ours, optimizer.state, strict=True)
    ]
    for k in range(taken_after, taken_after + CONTINUED_STEPS):
        terms = [trace(name.lower(), {**terms[i], "g": gradients[k][i]}, k + 1, kwargs) for i in range(len(parameters))]
        theirs.step(gradients[k])
        optimizer.step(gradients[k])
    actual = {f"tensor {i}: {n}": a for i, p in enumerate(ours) for n, a in {"p": p, **optimizer.state[i]}.items()}
    right = {f"tensor {i}: {n}": theirs.arrays(i)[n] for i in range(len(ours)) for n in terms[i] if n != "mu_product"}
    scales = {f"tensor {i}: {n}": term for i, traced in enumerate(terms) for n, term in traced.items()}
    where = f"{name}, {kwargs}, {CONTINUED_STEPS} steps after step {taken_after}"
    assert_close(2 * float32_ulps(name.lower()), actual, right, scales, where)


@pytest.mark.parametrize(("name", "kwargs"), _options())
def test_a_state_dict_of_torch_brings_its_hyperparameters(name: str, kwargs: dict[str, Any]) -> None:
    parameters, _ = _data()
    optimizer = getattr(fastopt, name)(parameters)
    optimizer.load_state_dict(_Torch(name, kwargs, parameters).optimizer.state_dict())
    expected = getattr(fastopt, name)(parameters, **kwargs).param_groups[0]
    del expected["params"]
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected


def test_every_param_group_of_a_torch_state_dict_brings_its_own() -> None:
    parameters, _ = _data()
    tensors = [torch.from_numpy(p.copy()) for p in parameters]
    theirs = torch.optim.Adam([{"params": tensors[:2], "lr": 0.5}, {"params": tensors[2:], "eps": 0.25}])
    ours = fastopt.Adam([{"params": parameters[:2]}, {"params": parameters[2:]}])
    ours.load_state_dict(theirs.state_dict())
    assert [(group["lr"], group["eps"]) for group in ours.param_groups] == [(0.5, 1e-8), (1e-3, 0.25)]


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "SGD"])  # torch's SGD counts no steps
def test_a_state_dict_of_torch_brings_the_step_count(name: str) -> None:
    parameters, gradients = _data()
    theirs = _Torch(name, {}, parameters)
    for k in range(3):
        theirs.step(gradients[k])
    optimizer = getattr(fastopt, name)(parameters)
    optimizer.load_state_dict(theirs.optimizer.state_dict())
    assert [int(state["step"]) for state in optimizer.state] == [3, 3, 3]


# --- The same hyperparameters


def _arguments(cls: type, without: tuple[str, ...]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(cls.__init__).parameters
    return {name: value for name, value in parameters.items() if name not in ("self", "params", *without)}


def test_every_optimizer_that_torch_has_is_compared() -> None:
    both = {spec.name for spec in registry.values() if hasattr(torch.optim, spec.name)}
    assert both == set(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_hyperparameters_and_defaults_are_those_of_torch(name: str) -> None:
    theirs = {n: p.default for n, p in _arguments(getattr(torch.optim, name), IMPLEMENTATION).items()}
    ours = {n: p.default for n, p in _arguments(getattr(fastopt, name), OURS).items()}
    assert ours == theirs


@pytest.mark.parametrize("name", OPTIONS)
def test_positional_hyperparameters_come_in_the_order_of_torch(name: str) -> None:
    """Up to the first argument of torch that fastopt does not have."""
    theirs = []
    for n, parameter in _arguments(getattr(torch.optim, name), ()).items():
        if parameter.kind is parameter.KEYWORD_ONLY or n in IMPLEMENTATION:
            break
        theirs.append(n)
    ours = _arguments(getattr(fastopt, name), OURS)
    assert [n for n, p in ours.items() if p.kind is not p.KEYWORD_ONLY] == theirs


@pytest.mark.parametrize("name", OPTIONS)
def test_fastopt_adds_only_its_own_arguments(name: str) -> None:
    theirs = _arguments(getattr(torch.optim, name), ())
    added = [n for n in _arguments(getattr(fastopt, name), ()) if n not in theirs]
    assert added == [n for n in OURS if not (n == "l1" and name == "Rprop")]


def test_a_state_dict_with_tensors_for_hyperparameters_loads():
    parameter = torch.nn.Parameter(torch.ones(3))
    theirs = torch.optim.Adam([parameter], lr=torch.tensor(0.25), betas=(0.5, 0.75))
    saved = theirs.state_dict()
    saved["param_groups"][0]["betas"] = (torch.tensor(0.5), torch.tensor(0.75))
    ours = fastopt.Adam([np.ones(3, np.float32)])
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["lr"] == 0.25
    assert ours.param_groups[0]["betas"] == (0.5, 0.75)


# --- By hand, as docs/guide/start.md says


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def gradients_of(model):
    return [None if p.grad is None else p.grad.numpy() for p in model.parameters()]


def test_a_model_with_a_frozen_layer_trains_by_hand_as_with_torch():
    ours, theirs = small_model(), small_model()
    x = torch.linspace(-1, 1, 64).reshape(16, 4)
    for model in (ours, theirs):
        model[0].weight.requires_grad_(False)
    frozen = ours[0].weight.clone()
    optimizer = fastopt.AdamW([p.detach().numpy() for p in ours.parameters()], lr=0.01)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    for _ in range(20):
        for model in (ours, theirs):
            model.zero_grad()
            ((model(x) - x.sum(1, keepdim=True)) ** 2).mean().backward()
        optimizer.step(gradients_of(ours))
        reference.step()
    assert torch.equal(ours[0].weight, frozen)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_step_by_hand_does_not_raise_torchs_version_counters():
    model = small_model()
    model(torch.ones(1, 4)).sum().backward()
    versions = [p._version for p in model.parameters()]
    before = model[2].weight.clone()
    fastopt.SGD([p.detach().numpy() for p in model.parameters()], lr=0.1).step(gradients_of(model))
    assert not torch.equal(model[2].weight, before)
    assert [p._version for p in model.parameters()] == versions
