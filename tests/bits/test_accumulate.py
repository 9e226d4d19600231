"""Micro-batches: gradients added up by `accumulate`, used and cleared by a step without gradients, to the bit."""

import copy
import itertools
import math
import pickle
import threading
import tracemalloc
import weakref

import numpy as np
import pytest

import fastopt
from fastopt import backends
from fastopt._arrays import allocation
from fastopt._formats import STATE_DTYPES
from fastopt.backends import compiled
from tests.support.configs import DEFAULTS
from tests.support.faults import interrupted
from tests.support.oracle import assert_same_bits
from tests.support.unfused import Unfused, as_bfloat16, decoded

F32 = np.float32
TILE = backends.engine().TILE
EACH = pytest.mark.parametrize("config", DEFAULTS, ids=str)
CUTS = (5, 5, 70, TILE + 33)
TYPES = (F32, np.float16, np.uint16)
TAIL = {"grad_scale": 0.3, "max_norm": 0.7, "clip_value": 0.05}


def draw(seed, n, dtype=F32):
    values = np.random.default_rng(seed).standard_normal(n).astype(F32)
    return as_bfloat16(values) if dtype == np.uint16 else values.astype(dtype)


def split(flat, cuts=CUTS):
    return np.split(flat, [min(cut, flat.size) for cut in cuts])


def added_up(batches):
    """The documented sum: one float32 addition a batch, in order, from 0."""
    total = np.zeros(batches[0].size, F32)
    with np.errstate(all="ignore"):
        for g in batches:
            total = total + decoded(g)
    return total


def assert_equals_unfused(optimizer, params, unfused, what):
    assert_same_bits(np.concatenate(params), unfused.p, f"{what}, p")
    for name, array in unfused.arrays.items():
        if name != "p":
            assert_same_bits(np.concatenate([s[name] for s in optimizer.state]), array, f"{what}, {name}")
    assert_same_bits(np.concatenate(optimizer.ema), unfused.ema, f"{what}, ema")


def everything(optimizer):
    """Bytes of all that a step writes."""
    arrays = [tensor.array for tensor in optimizer._tensors]
    arrays += [array for state in optimizer.state for array in state.values()]
    arrays += optimizer.ema if optimizer.ema_decay is not None else []
    return [array.tobytes() for array in arrays]


# --- Bits


@pytest.mark.bits
@EACH
def test_a_step_of_accumulated_gradients_is_that_of_separate_steps(config):
    n = 2 * TILE + 77
    params = split(draw(0, n))
    unfused = Unfused(config, draw(0, n), 0.9, cuts=CUTS)
    optimizer = config.make(params, ema_decay=0.9, grad_dtype="bfloat16")
    for round_ in (1, 2):
        batches = [draw(10 * round_ + k, n, dtype) for k, dtype in enumerate(TYPES)]
        for batch in batches:
            optimizer.accumulate(split(batch))
        info = optimizer.step(skip_nonfinite=True, **TAIL)
        norm = unfused.step(added_up(batches), **TAIL)
        assert info == (True, norm)
        assert_equals_unfused(optimizer, params, unfused, f"round {round_}")


@pytest.mark.covering(2)
@pytest.mark.bits
@pytest.mark.usefixtures("parallel_from_the_first_element")
@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("isa", compiled.available_isas())
@pytest.mark.parametrize("cuts", [(), CUTS, range(64, 40_000, 64)], ids=["one", "few", "many"])
@pytest.mark.parametrize("name", ["AdamW", "LAMB", "LARS"])
def test_instruction_sets_threads_and_splits_change_no_bit(name, cuts, isa, n_threads, use_isa):
    use_isa(isa)
    config = next(c for c in DEFAULTS if c.spec.name == name)
    n = 40_001
    params = split(draw(0, n), cuts)
    unfused = Unfused(config, draw(0, n), 0.9, cuts=cuts)
    optimizer = config.make(params, ema_decay=0.9, grad_dtype="bfloat16", n_threads=n_threads)
    batches = [draw(k, n, dtype) for k, dtype in enumerate(TYPES)]
    for batch in batches:
        optimizer.accumulate(split(batch, cuts))
    assert optimizer.step(**TAIL).grad_norm == unfused.step(added_up(batches), **TAIL)
    assert_equals_unfused(optimizer, params, unfused, f"{isa}, {n_threads} threads")


@pytest.mark.bits
@pytest.mark.parametrize("step", [{}, {**TAIL, "zero_grads": True}], ids=["plain", "whole tail"])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@EACH
def test_accumulated_gradients_do_what_their_sum_does(config, state_dtype, step):
    """With halves for parameters and any kind of state; also in a second round, from sums that the first cleared."""
    batches = [draw(k, 333) for k in range(4)]
    both = []
    for accumulates in (True, False):
        params = [as_bfloat16(part) for part in split(draw(5, 333))]
        optimizer = config.make(params, master="split", state_dtype=state_dtype, ema_decay=0.9)
        for pair in (batches[:2], batches[2:]):
            if accumulates:
                for batch in pair:
                    optimizer.accumulate(split(batch))
                optimizer.step(**step)
            else:
                optimizer.step(split(added_up(pair)), **step)
        both.append(everything(optimizer))
    assert both[0] == both[1]


def test_the_order_of_calls_is_the_order_of_the_sum():
    batches = [np.full(4, F32(x)) for x in (1.0, 2.0**24, 1.0, -(2.0**24))]
    p = [np.zeros(4, F32)]
    optimizer = fastopt.SGD(p, lr=1.0)
    for batch in batches:
        optimizer.accumulate([batch])
    optimizer.step()
    assert p[0].tolist() == [0, 0, 0, 0]  # float32 keeps neither 1, in this order


@pytest.mark.parametrize("isa", compiled.available_isas())
@pytest.mark.parametrize("dtype", [F32, np.uint16], ids=["float32", "bfloat16"])
def test_subnormal_gradients_count_as_zero_in_the_sum(dtype, isa, use_isa):
    use_isa(isa)
    tiny = np.array([1e-40, -1e-40, 1.5e-38], F32)
    g = (tiny.view(np.uint32) >> 16).astype(np.uint16) if dtype == np.uint16 else tiny
    p = [np.zeros(3, F32)]
    optimizer = fastopt.SGD(p, lr=2.0**20, grad_dtype="bfloat16")
    for _ in range(2):
        optimizer.accumulate([g])
    optimizer.step()
    assert p[0][:2].tolist() == [0, 0]
    assert p[0][2] < 0


def test_a_sum_that_overflows_is_infinite_and_skipped():
    p = [np.ones(3, F32)]
    optimizer = fastopt.SGD(p)
    for _ in range(2):
        optimizer.accumulate([np.full(3, F32(3e38))])
    assert optimizer.step(skip_nonfinite=True) == (False, math.inf)
    assert p[0].tolist() == [1, 1, 1]


@EACH
def test_the_reference_backend_does_the_same(config):
    results = []
    for backend in ("cpu", "reference"):
        params = split(draw(0, 5000))
        optimizer = config.make(params, backend=backend, grad_dtype="bfloat16")
        for round_ in (1, 2):
            for k, dtype in enumerate(TYPES):
                gradients = split(draw(10 * round_ + k, 5000, dtype))
                gradients[1] = gradients[k] = None
                optimizer.accumulate(gradients)
            info = optimizer.step(grad_scale=1 / optimizer.n_accumulated, max_norm=1.0)
        results.append((np.concatenate(params), info.grad_norm, [int(s["step"]) for s in optimizer.state]))
    (p, norm, steps), (q, other_norm, other_steps) = results
    np.testing.assert_allclose(p, q, rtol=2e-6, atol=2e-6)
    assert norm == pytest.approx(other_norm, rel=1e-12)
    assert steps == other_steps == [2, 0, 2, 2, 2]


# --- What a step makes of it

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


@BACKENDS
def test_a_parameter_that_no_call_gave_a_gradient_stays_as_it_is(backend):
    p = [np.zeros(2, F32) for _ in range(3)]
    optimizer = fastopt.SGD(p, lr=1.0, ema_decay=0.5, backend=backend)
    optimizer.accumulate([np.ones(2, F32), None, None])
    optimizer.accumulate([None, None, np.ones(2, F32)])
    optimizer.accumulate([np.ones(2, F32), None, None])
    optimizer.step()
    assert [q.tolist() for q in p] == [[-2, -2], [0, 0], [-1, -1]]
    assert [int(state["step"]) for state in optimizer.state] == [1, 0, 1]


@BACKENDS
def test_a_step_clears_what_it_used(backend):
    p = [np.zeros(2, F32), np.zeros(2, F32)]
    optimizer = fastopt.SGD(p, lr=1.0, backend=backend)
    optimizer.accumulate([np.ones(2, F32), np.ones(2, F32)])
    optimizer.step()
    optimizer.accumulate([np.ones(2, F32), None])
    optimizer.step()
    assert [q.tolist() for q in p] == [[-2, -2], [-1, -1]]
    optimizer.step([np.ones(2, F32), None])
    assert [q.tolist() for q in p] == [[-3, -3], [-1, -1]]


@BACKENDS
def test_a_skipped_step_clears_them_too(backend):
    p = [np.zeros(2, F32)]
    optimizer = fastopt.SGD(p, lr=1.0, backend=backend)
    optimizer.accumulate([np.full(2, F32(np.nan))])
    assert optimizer.step(skip_nonfinite=True).applied is False
    assert optimizer.n_accumulated == 0
    optimizer.accumulate([np.ones(2, F32)])
    assert optimizer.step(skip_nonfinite=True).applied is True
    assert p[0].tolist() == [-1, -1]


@BACKENDS
def test_a_step_that_raises_keeps_them(backend):
    p = [np.zeros(2, F32)]
    optimizer = fastopt.SGD(p, lr=1.0, backend=backend)
    optimizer.accumulate([np.ones(2, F32)])
    with pytest.raises(ValueError, match="max_norm"):
        optimizer.step(max_norm=-1.0)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.0
    p[0].flags.writeable = False
    with pytest.raises(ValueError, match=r"params\[0\] must be writable"):
        optimizer.step()
    p[0].flags.writeable = True
    assert optimizer.n_accumulated == 1
    optimizer.step()
    assert p[0].tolist() == [-1, -1]


@BACKENDS
def test_calls_are_counted(backend):
    optimizer = fastopt.SGD([np.zeros(2, F32)], backend=backend)
    counts = [optimizer.n_accumulated]
    for call in (
        lambda: optimizer.accumulate([np.ones(2, F32)]),
        lambda: optimizer.accumulate([None]),
        optimizer.step,
        lambda: optimizer.accumulate([None]),
        optimizer.discard_accumulated,
    ):
        call()
        counts.append(optimizer.n_accumulated)
    assert counts == [0, 1, 2, 0, 1, 0]


@pytest.mark.parametrize(
    ("params", "grads"),
    [
        (np.zeros(2, F32), np.ones(2, F32)),
        ({"a": np.zeros(2, F32), "b": np.zeros((), F32)}, {"b": np.ones((), F32), "a": np.ones(2, F32)}),
        (fastopt.FlatBuffer({"a": (2, 3), "b": 4}), fastopt.FlatBuffer({"a": np.ones((2, 3), F32), "b": 4})),
        ([{"params": [np.zeros(2, F32)]}, {"params": np.zeros(3, F32), "lr": 2.0}], [np.ones(2, F32), np.ones(3, F32)]),
        (np.zeros((0, 3), F32), np.zeros((0, 3), F32)),
    ],
    ids=["one array", "dict", "FlatBuffer", "groups", "empty"],
)
@BACKENDS
def test_gradients_come_in_the_structure_of_the_parameters(params, grads, backend):
    mine, theirs = (fastopt.SGD(copy.deepcopy(params), lr=1.0, backend=backend) for _ in range(2))
    for _ in range(2):
        mine.accumulate(grads)
    mine.step(grad_scale=0.5)
    theirs.step(grads)
    assert everything_of(mine) == everything_of(theirs)


def everything_of(optimizer):
    return [tensor.array.tobytes() for tensor in optimizer._tensors]


def test_update_takes_over_after_a_step_has_used_them():
    params = {"a": np.zeros(2, F32)}
    optimizer = fastopt.SGD(lr=1.0)
    optimizer.update(params, {"a": np.ones(2, F32)})
    optimizer.accumulate({"a": np.ones(2, F32)})
    optimizer.step()
    params["b"] = np.zeros(3, F32)
    optimizer.update(params, {"a": np.ones(2, F32), "b": np.ones(3, F32)})
    optimizer.accumulate({"a": np.ones(2, F32), "b": np.ones(3, F32)})
    optimizer.step()
    assert (params["a"].tolist(), params["b"].tolist()) == ([-4, -4], [-2, -2, -2])


def test_parameters_can_be_evaluated_at_their_averages_in_between():
    p = [np.zeros(2, F32)]
    optimizer = fastopt.SGD(p, lr=1.0, ema_decay=0.5)
    optimizer.accumulate([np.ones(2, F32)])
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="inside swap_ema"):
        optimizer.accumulate([np.ones(2, F32)])
    optimizer.accumulate([np.ones(2, F32)])
    optimizer.step()
    assert p[0].tolist() == [-2, -2]


# --- Nothing is lost or left out in silence


@BACKENDS
def test_gradients_for_a_step_are_refused_while_others_are_accumulated(backend):
    p = [np.zeros(2, F32)]
    optimizer = fastopt.SGD(p, lr=1.0, backend=backend)
    optimizer.accumulate([np.ones(2, F32)])
    message = r"SGD: step\(grads\) while gradients are accumulated: step\(\) .* uses .*, discard_accumulated\(\) drops"
    for options in ({}, {"max_norm": 1.0}):
        with pytest.raises(RuntimeError, match=message):
            optimizer.step([np.ones(2, F32)], **options)
    assert p[0].tolist() == [0, 0]
    optimizer.step()
    assert p[0].tolist() == [-1, -1]


@BACKENDS
def test_a_step_without_gradients_needs_accumulated_ones(backend):
    optimizer = fastopt.SGD([np.zeros(2, F32)], backend=backend)
    for options in ({}, {"max_norm": 1.0}):
        with pytest.raises(RuntimeError, match=r"SGD: step\(\) needs grads where none were given to accumulate\(\)"):
            optimizer.step(**options)
    assert int(optimizer.state[0]["step"]) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda o: o.state_dict(),
        lambda o: o.load_state_dict(fastopt.SGD({"a": np.ones(3, F32)}).state_dict()),
        lambda o: o.update({"a": np.ones(3, F32)}, {"a": np.ones(3, F32)}),
        lambda o: o.add_param_group({"params": {"b": np.ones(3, F32)}}),
        pickle.dumps,
        copy.copy,
        copy.deepcopy,
    ],
    ids=["state_dict", "load_state_dict", "update", "add_param_group", "pickle", "copy", "deepcopy"],
)
@BACKENDS
def test_what_would_lose_accumulated_gradients_is_refused_until_they_are_used_or_dropped(call, backend):
    p = {"a": np.zeros(3, F32)}
    optimizer = fastopt.SGD(p, lr=1.0, backend=backend)
    optimizer.accumulate({"a": np.ones(3, F32)})
    with pytest.raises(RuntimeError, match=r"SGD: \w+\(\) while gradients are accumulated"):
        call(optimizer)
    optimizer.step()
    assert p["a"].tolist() == [-1, -1, -1]
    call(optimizer)
    optimizer.discard_accumulated()


@BACKENDS
def test_discarded_gradients_count_for_nothing(backend):
    p = [np.zeros(2, F32), np.zeros(2, F32)]
    optimizer = fastopt.SGD(p, lr=1.0, backend=backend)
    optimizer.discard_accumulated()
    optimizer.accumulate([np.ones(2, F32), np.ones(2, F32)])
    optimizer.discard_accumulated()
    with pytest.raises(RuntimeError, match="needs grads"):
        optimizer.step()
    optimizer.accumulate([np.ones(2, F32), None])
    optimizer.step()
    assert [q.tolist() for q in p] == [[-1, -1], [0, 0]]


@pytest.mark.parametrize("bad", [np.ones(3, F32), np.ones(2), "grad", np.ones((2, 2), F32)[:, 0]], ids=repr)
@BACKENDS
def test_gradients_of_which_one_does_not_fit_are_not_added_at_all(bad, backend):
    p = [np.zeros(2, F32), np.zeros(2, F32)]
    optimizer = fastopt.SGD(p, lr=1.0, backend=backend)
    optimizer.accumulate([np.ones(2, F32), None])
    with pytest.raises((TypeError, ValueError), match=r"grads\[1\] must be"):
        optimizer.accumulate([np.ones(2, F32), bad])
    with pytest.raises(ValueError, match="one entry for each"):
        optimizer.accumulate([np.ones(2, F32)])
    assert optimizer.n_accumulated == 1
    optimizer.step()
    assert [q.tolist() for q in p] == [[-1, -1], [0, 0]]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_sums_that_cannot_be_allocated_change_nothing(error, monkeypatch):
    p = [np.zeros(2, F32)]
    optimizer = fastopt.SGD(p, lr=1.0)

    def refuse(n):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(allocation, "zeros", refuse)
        with pytest.raises(error):
            optimizer.accumulate([np.ones(2, F32)])
    assert optimizer.n_accumulated == 0
    optimizer.step([np.ones(2, F32)])
    optimizer.accumulate([np.ones(2, F32)])
    optimizer.step()
    assert p[0].tolist() == [-2, -2]


@pytest.mark.parametrize(
    ("operation", "n_before", "n_after"),
    [("accumulate", 0, 1), ("accumulate", 1, 2), ("step", 2, 0), ("step with options", 2, 0), ("discard", 2, 0)],
)
@BACKENDS
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.exhaustive), 17])
def test_an_interrupted_operation_happened_or_did_not(backend, operation, n_before, n_after, every):
    for at in itertools.count(step=every):
        p = [np.zeros(2, F32), np.zeros(3, F32)]
        g = [np.ones(2, F32), np.ones(3, np.float16)]
        optimizer = fastopt.SGD(p, lr=1.0, backend=backend)
        for _ in range(n_before):
            optimizer.accumulate(g)
        call = {
            "accumulate": lambda: optimizer.accumulate(g),  # noqa: B023  called in this round
            "step": optimizer.step,
            "step with options": lambda: optimizer.step(max_norm=math.inf),  # noqa: B023
            "discard": optimizer.discard_accumulated,
        }[operation]
        was_interrupted = interrupted(call, at)
        n = optimizer.n_accumulated
        assert n in (n_before, n_after)
        applied = -p[0][0]
        assert applied == (n_before if operation.startswith("step") and n == n_after else 0)
        if n:
            optimizer.step()
        assert [q.tolist() for q in p] == [[-applied - n] * 2, [-applied - n] * 3]
        if not was_interrupted:
            break
    assert n == n_after
    assert at > 10


@BACKENDS
def test_gradients_are_only_read_and_let_go(backend):
    g = np.ones(3, np.float16)
    g.flags.writeable = False
    kept = weakref.ref(g)
    optimizer = fastopt.SGD([np.zeros(3, F32)], backend=backend)
    optimizer.accumulate([g])
    optimizer.step(zero_grads=True)
    assert g.tolist() == [1, 1, 1]
    del g
    assert kept() is None


def test_a_gradient_that_is_the_parameter_is_refused():
    p = np.ones(3, F32)
    with pytest.raises(ValueError, match=r"grads\[0\] overlaps params\[0\]"):
        fastopt.SGD([p]).accumulate([p])


def test_a_stream_is_for_arrays_on_a_gpu():
    optimizer = fastopt.SGD([np.ones(3, F32)])
    with pytest.raises(ValueError, match="stream is for arrays on a GPU"):
        optimizer.accumulate([np.ones(3, F32)], stream=0)
    assert optimizer.n_accumulated == 0


def test_an_optimizer_without_parameters_has_nothing_to_accumulate_for():
    with pytest.raises(ValueError, match="no parameters yet"):
        fastopt.SGD().accumulate({"a": np.ones(3, F32)})


def test_calls_of_two_threads_at_once_are_refused_and_none_is_half_done():
    n = 30_000_000
    p = np.zeros(n, F32)
    optimizer = fastopt.SGD(p, lr=1.0, n_threads=1)
    g = np.ones(n, F32)
    optimizer.accumulate(g)
    refused = []

    def run():
        for _ in range(4):
            try:
                optimizer.accumulate(g)
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert optimizer.n_accumulated == 9 - len(refused)
    assert all("of this optimizer is under way" in text for text in refused)
    n_accumulated = optimizer.n_accumulated
    optimizer.step()
    assert (p == -n_accumulated).all()


def test_nothing_that_grows_with_n_is_allocated_after_the_first_call():
    peaks = []
    for n in (1_000, 3_000_000):
        p, g = np.ones(n, F32), np.ones(n, np.float16)
        optimizer = fastopt.Adam(p)
        for _ in range(2):
            optimizer.accumulate(g)
            optimizer.step(max_norm=1.0)
        tracemalloc.start()
        optimizer.accumulate(g)
        optimizer.step(max_norm=1.0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 10_000


def test_steps_with_gradients_of_their_own_keep_no_memory_for_sums():
    peaks = []
    for accumulates in (False, True):
        p, g = np.ones(100_000, F32), np.ones(100_000, F32)
        tracemalloc.start()
        optimizer = fastopt.SGD(p)
        if accumulates:
            optimizer.accumulate(g)
            optimizer.step()
        else:
            optimizer.step(g)
        peaks.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert peaks[0] < 50_000
    assert peaks[1] > 400_000
