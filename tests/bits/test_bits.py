"""Promise 1: the bits of a step are those of its rule, whatever the instruction set, threads and splits."""

import functools
import itertools

import numpy as np
import pytest

import fastopt
from fastopt import backends
from fastopt.backends import compiled
from fastopt.rules import registry
from tests.support.configs import CONFIGS
from tests.support.oracle import assert_same_bits
from tests.support.unfused import Unfused

TILE = backends.engine().TILE
SIZES = [0, 1, 7, 15, 16, 17, TILE - 1, TILE, TILE + 1, 3 * TILE + 5, 70001]
N_STEPS = 3

pytestmark = pytest.mark.usefixtures("parallel_from_the_first_element")


@functools.cache
def inputs(n):
    """Parameters and gradients over many magnitudes, zeros among them; nothing near the subnormals."""
    rng = np.random.default_rng(n)
    values = rng.standard_normal((N_STEPS + 1, n)) * 10.0 ** rng.integers(-6, 4, (N_STEPS + 1, n))
    values[rng.random(values.shape) < 0.05] = 0
    return values.astype(np.float32)


@functools.lru_cache(maxsize=64)
def expected(config, n, ends=()):
    """Parameters and states after the steps; `ends` of the tensors, where there is a trust ratio for each."""
    unfused = Unfused(config, inputs(n)[0], cuts=ends)
    for g in inputs(n)[1:]:
        unfused.step(g)
    return unfused.arrays


def cuts(n):
    """Where to split n elements into tensors: tiny, empty and uneven ones."""
    return sorted({min(n, k) for k in (0, 0, 1, 4, 21, TILE // 2 + 21, n // 2 + 3, n)} | {0, n})


def split(flat):
    at = cuts(flat.size)
    return [flat[i:j] for i, j in itertools.pairwise(at)] or [flat]


def joined(optimizer, arrays, name):
    parts = arrays if name == "p" else [state[name] for state in optimizer.state]
    return np.concatenate([part.ravel() for part in parts])


def check(config, n, params, gradients, n_threads):
    """Step `params` and compare them, and the states, with the oracle."""
    optimizer = config.make(params, n_threads=n_threads)
    for g in gradients:
        optimizer.step(g)
    ends = tuple(np.cumsum([p.size for p in params])[:-1].tolist())
    for name, array in expected(config, n, ends if config.spec.trust else ()).items():
        assert_same_bits(joined(optimizer, params, name), array, f"{config}, {name}")


@pytest.mark.covering(2)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("isa", compiled.available_isas())
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.bits
def test_one_tensor_has_the_bits_of_the_rule(config, isa, n_threads, n, use_isa):
    use_isa(isa)
    p, *gradients = inputs(n)
    check(config, n, [p.copy()], [[g] for g in gradients], n_threads)


@pytest.mark.covering(2)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("isa", compiled.available_isas())
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.bits
def test_splitting_into_tensors_changes_no_bit(config, isa, n_threads, n, use_isa):
    use_isa(isa)
    p, *gradients = inputs(n)
    params = [part.copy() for part in split(p)]
    check(config, n, params, [split(g) for g in gradients], n_threads)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.bits
def test_tensors_that_are_neighbours_in_memory_change_no_bit(config, n_threads):
    n = SIZES[-2]
    p, *gradients = inputs(n)
    check(config, n, split(p.copy()), [split(g) for g in gradients], n_threads)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.bits
def test_a_flat_buffer_changes_no_bit(config):
    n = SIZES[-2]
    p, *gradients = inputs(n)
    buffer = fastopt.FlatBuffer({str(k): part for k, part in enumerate(split(p))})
    optimizer = config.make(buffer)
    for g in gradients:
        optimizer.step(fastopt.FlatBuffer({str(k): part for k, part in enumerate(split(g))}))
    ends = tuple(cuts(n)[1:-1]) if config.spec.trust else ()
    assert_same_bits(buffer.flat, expected(config, n, ends)["p"], str(config))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.bits
def test_the_functional_form_has_the_same_bits(config):
    n = SIZES[-2]
    p, *gradients = inputs(n)
    p = p.copy()
    spec, values = config.spec, config.values
    states = {name: np.full(n, spec.initial(name, values), np.float32) for name in spec.states_for(spec.flags(values))}
    running = {name: np.array(first) for name, first in spec.running.items()}
    for k, g in enumerate(gradients):
        getattr(fastopt.functional, spec.function)(p, g, **states, **running, step=k + 1, **config.hypers)
    for name, array in expected(config, n).items():
        assert_same_bits(p if name == "p" else states[name], array, f"{config}, {name}")


@pytest.mark.parametrize("isa", compiled.available_isas())
def test_the_configurations_reach_every_compiled_kernel(isa, use_isa):
    use_isa(isa)
    assert {config.kernel for config in CONFIGS} == set(compiled.kernels())


@pytest.mark.parametrize("spec", registry.values(), ids=lambda spec: spec.name)
def test_every_hyperparameter_is_away_from_its_default_somewhere(spec):
    changed = set()
    for config in CONFIGS:
        if config.spec is spec:
            changed |= {name for name, value in config.values.items() if value != spec.hypers[name].default}
    assert changed == set(spec.hypers)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 7, 64])
def test_many_small_and_few_large_tensors_are_all_updated(n_threads):
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(0, 90, 500), 3 * TILE + 1, *rng.integers(0, 90, 500), 5 * TILE, 0]
    params = [rng.standard_normal(n).astype(np.float32) for n in sizes]
    grads = [rng.standard_normal(n).astype(np.float32) for n in sizes]
    want = [p - np.float32(0.5) * g for p, g in zip(params, grads, strict=True)]
    fastopt.SGD(params, lr=0.5, n_threads=n_threads).step(grads)
    for k, (p, expected_p) in enumerate(zip(params, want, strict=True)):
        assert_same_bits(p, expected_p, f"params[{k}]")
