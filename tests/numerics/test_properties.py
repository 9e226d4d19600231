"""Promise 4 on arbitrary input: special values, subnormals, misaligned memory; no surprise, no slow step."""

import ctypes
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastopt
from fastopt import backends
from fastopt.backends import compiled
from tests.support.configs import CONFIGS, DEFAULTS
from tests.support.oracle import TINY, Oracle, assert_same_bits

ANY_FLOAT = st.one_of(
    st.floats(width=32, allow_subnormal=True),
    st.sampled_from([0.0, -0.0, np.inf, -np.inf, np.nan, float(TINY), 1e-40, -1e-42, 3e38, -3e38, 1e19, 1e-20]),
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=40)


def arrays(shape, elements=ANY_FLOAT):
    return hnp.arrays(np.float32, shape, elements=elements)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@given(data=st.data())
def test_any_float_gives_the_bits_of_the_rule_with_subnormals_as_zero(config, data):
    n = data.draw(st.integers(1, 150))
    p, *gradients = (data.draw(arrays(n)) for _ in range(4))
    oracle = Oracle(config, p, flushing=True)
    for isa in compiled.available_isas():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FASTOPT_ISA", isa)
            actual = p.copy()
            optimizer = config.make(actual)
            for g in gradients:
                optimizer.step(g)
        if oracle.steps == 0:
            for g in gradients:
                oracle.step(g)
        assert_same_bits(actual, oracle.arrays["p"], f"{config} on {isa}, p")
        for name, state in oracle.arrays.items():
            if name != "p":
                assert_same_bits(optimizer.state[0][name], state, f"{config} on {isa}, {name}")


@given(shape=SHAPES, seed=st.integers(0, 9))
def test_the_shape_changes_no_bit(shape, seed):
    p, g = np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)
    p, flat = np.array(p), p.flatten()
    optimizer = fastopt.Adam(p)
    optimizer.step(np.asarray(g))
    fastopt.Adam(flat).step(g.flatten())
    assert_same_bits(p.ravel(), flat, f"shape {shape}")
    assert optimizer.state[0]["exp_avg"].shape == shape


@pytest.mark.parametrize("isa", compiled.available_isas())
@pytest.mark.parametrize("config", DEFAULTS, ids=str)
@given(at=st.tuples(*[st.integers(0, 17)] * 2), n=st.integers(0, 300))
def test_arrays_aligned_to_four_bytes_alone_change_no_bit(config, isa, at, n):
    rng = np.random.default_rng(n)
    room = rng.standard_normal((2, n + 20)).astype(np.float32)
    p, g = (room[k, i : i + n] for k, i in enumerate(at))
    before, after = room[0].copy(), room[0].copy()
    oracle = Oracle(config, p)
    oracle.step(g)
    after[at[0] : at[0] + n] = oracle.arrays["p"]
    assert (p.ctypes.data - before.ctypes.data) % 4 == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTOPT_ISA", isa)
        config.make(p).step(g)
    assert_same_bits(room[0], after, f"{config}, offsets {at}, also around the array")


def assert_nan(p, where, config):
    """NaN just there; everywhere if a trust ratio spreads it over the tensor."""
    assert np.flatnonzero(np.isnan(p)).tolist() == (list(range(p.size)) if config.spec.trust else where)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_nan_gradient_is_never_hidden(config):
    p = np.ones(67, np.float32)
    g = np.full(67, np.float32(0.5))
    g[[0, 15, 16, 33, 66]] = np.nan
    config.make(p).step(g)
    assert_nan(p, [0, 15, 16, 33, 66], config)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_nan_parameter_is_never_hidden(config):
    p = np.ones(67, np.float32)
    p[[0, 15, 16, 33, 66]] = np.nan
    config.make(p).step(np.full(67, np.float32(0.5)))
    assert_nan(p, [0, 15, 16, 33, 66], config)


@pytest.mark.parametrize("config", DEFAULTS, ids=str)
def test_zero_gradient_zero_state_and_no_decay_leave_a_parameter_as_it_is(config):
    largest = np.finfo(np.float32).max
    p = np.array([0.0, -0.0, 1.0, -1.5, TINY, -TINY, 1e-30, largest, np.inf, -np.inf] * 7, np.float32)
    hypers = {name: 0.0 for name in ("weight_decay", "lambd") if name in config.spec.hypers}
    before = p.copy()
    optimizer = config.spec.cls(p, **hypers)
    for _ in range(3):
        optimizer.step(np.zeros_like(p))
    assert p.tobytes() == before.tobytes()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradients_are_never_changed(config):
    g = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    g[:3] = 1e-40, np.nan, -0.0
    before = g.tobytes()
    g.flags.writeable = False
    config.make(np.ones(5000, np.float32)).step(g)
    assert g.tobytes() == before


def _milliseconds(optimizer, g):
    """The fastest of some steps: what a processor does to numbers it does in all of them, other processes in some."""
    times = []
    for _ in range(15):
        start = time.perf_counter()
        optimizer.step(g)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


@pytest.mark.parametrize("value", [1e-20, 1e-40, 3e38, np.inf, np.nan], ids=str)
@pytest.mark.parametrize("config", DEFAULTS, ids=str)
def test_no_input_makes_a_step_slow(config, value):
    n = 100_000
    p = np.ones(n, np.float32)
    usual = _milliseconds(config.make(p, n_threads=1), np.full(n, np.float32(0.1)))
    p = np.full(n, np.float32(value))
    odd = _milliseconds(config.make(p, n_threads=1), np.full(n, np.float32(value)))
    assert odd < 3 * usual  # without flushing, subnormals cost ten to a hundred times as much


@pytest.mark.parametrize("config", DEFAULTS, ids=str)
def test_states_that_fade_away_do_not_make_a_step_slow(config):
    n = 100_000
    g = np.full(n, np.float32(1e-3))
    optimizer = config.make(np.ones(n, np.float32), n_threads=1)
    optimizer.step(g)
    usual = _milliseconds(optimizer, g)
    for state in (array for name, array in optimizer.state[0].items() if array.shape):
        state[...] = 1e-39
    assert _milliseconds(optimizer, np.zeros(n, np.float32)) < 3 * usual


@pytest.mark.parametrize("n", [10, 100_000])
def test_the_callers_floating_point_control_word_is_as_before(n):
    engine = backends.engine()
    p = np.ones(n, np.float32)
    optimizer, gradient = fastopt.Adam(p), np.full(n, np.float32(1e-40))
    before = engine.control_word_now()
    optimizer.step(gradient)
    assert engine.control_word_now() == before


def test_a_caller_who_rounds_upward_gets_the_same_bits_and_keeps_rounding_upward():
    libm = ctypes.CDLL(None)
    if not hasattr(libm, "fesetround"):
        pytest.skip("this C library has no fesetround")
    g = np.random.default_rng(0).standard_normal((2, 1000)).astype(np.float32)
    expected, actual = g[0].copy(), g[0].copy()
    fastopt.SGD(expected, lr=0.1, momentum=0.9).step(g[1])
    optimizer = fastopt.SGD(actual, lr=0.1, momentum=0.9)
    nearest, upward = libm.fegetround(), 0x800
    if libm.fesetround(upward) != 0:
        pytest.skip("this processor has another code for rounding upward")
    try:
        optimizer.step(g[1])
        still = libm.fegetround()
    finally:
        libm.fesetround(nearest)
    assert still == upward
    assert_same_bits(actual, expected, "p")


@pytest.mark.parametrize("config", DEFAULTS, ids=str)
def test_ten_thousand_steps_do_not_drift(config):
    """The scalars after many steps are those computed from the step count alone, not accumulated ones."""
    p = np.ones(3, np.float32)
    optimizer = config.make(p)
    g = np.array([1e-3, -1.0, 0.0], np.float32)
    for _ in range(10_000):
        optimizer.step(g)
    state = {name: array.copy() for name, array in optimizer.state[0].items()}
    oracle = Oracle(config, p)
    oracle.steps = 10_000
    oracle.arrays |= {name: array for name, array in state.items() if array.shape}
    oracle.running = {name: _product(config, name) for name in oracle.running}
    optimizer.step(g)
    oracle.step(g)
    assert_same_bits(p, oracle.arrays["p"], str(config))


def _product(config, name):
    """The running scalar after 10,000 steps, in extended precision where it can be known in closed form."""
    assert (config.spec.name, name) == ("NAdam", "mu_product")
    beta1, decay = config.values["betas"][0], config.values["momentum_decay"]
    steps = np.arange(1, 10_001, dtype=np.longdouble)
    return float(np.prod(beta1 * (1 - 0.5 * np.longdouble(0.96) ** (steps * decay))))
