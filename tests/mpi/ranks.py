"""What every process of `mpiexec -n N python ranks.py CHECK` does, one function for each promise; see test_mpi.py."""

import copy
import gc
import pickle
import sys
import weakref

import numpy as np
from mpi4py import MPI

import fastopt
from fastopt._formats import STATE_DTYPES
from fastopt.mpi import ZeroRedundancyOptimizer
from fastopt.rules import registry

COMM = MPI.COMM_WORLD
SHARDED = [spec.cls for spec in registry.values() if spec.trust is None]
OPTIONS = {"max_norm": 2.0, "clip_value": 0.25, "grad_scale": 0.5}


def buffer(n, seed=0):
    values = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    return fastopt.FlatBuffer({"w": values[: n // 2], "b": values[n // 2 :]})


def gradients(n, step):
    """Of every process: small integers, whose sums and squares are exact in any order."""
    return [np.random.default_rng((step, rank)).integers(-9, 9, n).astype(np.float32) for rank in range(COMM.size)]


def train(optimizer, params, steps, comm=COMM, **options):
    """Steps with this process's gradients; in another communicator its first process has the others' as well."""
    for step in steps:
        own = params.zeros_like()
        shares = np.array_split(np.arange(COMM.size), comm.size)[comm.rank]
        own.flat[:] = sum(gradients(params.flat.size, step)[k] for k in shares)
        info = optimizer.step(own, **options)
    return info


def alone(cls, params, steps, average=True, **options):
    """The same in one process: the optimizer, and the last step's info."""
    step_options = {name: options.pop(name) for name in OPTIONS if name in options}
    optimizer = cls([params.flat], **options)
    scale = step_options.pop("grad_scale", 1.0) / (COMM.size if average else 1)
    for step in steps:
        info = optimizer.step([sum(gradients(params.flat.size, step))], grad_scale=scale, **step_options)
    return optimizer, info


def assert_same(a, b):
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes(), np.flatnonzero(a != b)[:5]


def every_optimizer_has_the_bits_of_one_process():
    for cls in SHARDED:
        for state_dtype in STATE_DTYPES:
            sharded, whole = buffer(1000), buffer(1000)
            optimizer = ZeroRedundancyOptimizer(sharded, cls, state_dtype=state_dtype, seed=5)
            train(optimizer, sharded, range(5))
            alone(cls, whole, range(5), state_dtype=state_dtype, seed=5)
            assert_same(sharded.flat, whole.flat)


def any_size_is_sharded():
    for n in (0, 1, 63, 64, 65, 200, 4097):
        sharded, whole = buffer(n), buffer(n)
        train(ZeroRedundancyOptimizer(sharded, fastopt.Adam), sharded, range(3))
        alone(fastopt.Adam, whole, range(3))
        assert_same(sharded.flat, whole.flat)


def options_count_over_all_processes():
    for average in (True, False):
        sharded, whole = buffer(500), buffer(500)
        optimizer = ZeroRedundancyOptimizer(sharded, fastopt.AdamW, average=average, lr=0.1)
        info = train(optimizer, sharded, range(4), **OPTIONS)
        _, expected = alone(fastopt.AdamW, whole, range(4), average, lr=0.1, **OPTIONS)
        assert info == expected
        assert_same(sharded.flat, whole.flat)


def an_infinity_in_one_process_skips_the_step_in_all():
    params = buffer(300)
    before, grads = params.flat.copy(), params.zeros_like()
    optimizer = ZeroRedundancyOptimizer(params, fastopt.SGD, lr=1.0)
    if COMM.rank == COMM.size - 1:
        grads.flat[0] = np.inf
    info = optimizer.step(grads, skip_nonfinite=True, zero_grads=True)
    assert not info.applied
    assert not grads.flat.any()
    assert_same(params.flat, before)
    assert int(optimizer.optimizer.state[0]["step"]) == 0


def all_start_with_the_parameters_of_rank_0():
    params = buffer(200, seed=COMM.rank)
    ZeroRedundancyOptimizer(params, fastopt.SGD)
    assert_same(params.flat, buffer(200, seed=0).flat)


def state_is_divided():
    params = buffer(6400)
    optimizer = ZeroRedundancyOptimizer(params, fastopt.Adam)
    assert sum(COMM.allgather(optimizer.optimizer.state_nbytes)) == 8 * 6400
    assert optimizer.optimizer.state_nbytes <= 8 * (6400 // COMM.size + 64)


def a_state_goes_on_in_other_numbers_of_processes():
    for state_dtype in STATE_DTYPES:
        for n_later in range(1, COMM.size + 1):
            options = {"state_dtype": state_dtype, "ema_decay": 0.9, "lr": 0.1}
            whole = buffer(700)
            expected, _ = alone(fastopt.AdamW, whole, range(6), **options)
            params = buffer(700)
            first = ZeroRedundancyOptimizer(params, fastopt.AdamW, **options)
            train(first, params, range(3))
            saved = first.state_dict(root=0)
            later = COMM.Split(int(COMM.rank < n_later), COMM.rank)
            if COMM.rank >= n_later:
                continue
            second = ZeroRedundancyOptimizer(params, fastopt.AdamW, comm=later, average=False, **options)
            second.load_state_dict(saved, root=0)
            train(second, params, range(3, 6), later, grad_scale=1 / COMM.size)
            assert_same(params.flat, whole.flat)
            assert_same(second.optimizer.ema[0], expected.ema[0][second.shard])


def a_state_goes_on_in_one_process_without_mpi():
    params = buffer(700)
    optimizer = ZeroRedundancyOptimizer(params, fastopt.Adam, state_dtype="8bit")
    train(optimizer, params, range(3))
    saved = optimizer.state_dict(root=COMM.size - 1)
    assert (saved is None) == (COMM.rank != COMM.size - 1)
    whole = buffer(700)
    expected, _ = alone(fastopt.Adam, whole, range(3), state_dtype="8bit")
    if saved is not None:
        assert_same(saved["state"][0]["exp_avg"], expected.state_dict()["state"][0]["exp_avg"])
        resumed = fastopt.Adam([params.flat], state_dtype="8bit")
        resumed.load_state_dict(saved)
        g = sum(gradients(700, 9))
        resumed.step([g])
        expected.step([g])
        assert_same(params.flat, whole.flat)


def a_state_that_does_not_fit_is_refused_in_all_processes():
    params = buffer(700)
    optimizer = ZeroRedundancyOptimizer(params, fastopt.Adam)
    train(optimizer, params, range(2))
    good = optimizer.state_dict()
    before = optimizer.optimizer.state_dict()
    for spoil, error in (
        (lambda saved: saved.pop("optimizer"), TypeError),
        (lambda saved: saved["state"][0].update(exp_avg=np.zeros(3, np.float32)), ValueError),
        (lambda saved: saved["state"][0].update(exp_avg=np.zeros(700, np.float64)), TypeError),
        (lambda saved: saved["state"][0].update(step=-1), ValueError),
        (lambda saved: saved["state"].update({1: {}}), ValueError),
        (lambda saved: saved["state"][0].pop("exp_avg_sq"), KeyError),
        (lambda saved: saved.update(optimizer="SGD"), ValueError),
        (lambda saved: saved.update(ema=None), TypeError),
        (lambda saved: saved.update(state=None), ValueError),
        (lambda saved: saved["state"].update({0: None}), ValueError),
    ):
        bad = None
        if good is not None:
            bad = {**good, "state": {0: dict(good["state"][0])}}
            spoil(bad)
        try:
            optimizer.load_state_dict(bad)
        except error:
            pass
        else:
            raise AssertionError(f"rank {COMM.rank} took a state that does not fit")
        after = optimizer.optimizer.state_dict()
        assert after["state"][0]["step"] == before["state"][0]["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            assert_same(after["state"][0][name], before["state"][0][name])


def a_state_that_one_process_refuses_changes_none():
    params = buffer(700)
    optimizer = ZeroRedundancyOptimizer(params, fastopt.Adam, state_dtype="8bit")
    train(optimizer, params, range(2))
    bad = optimizer.state_dict()
    if bad is not None:
        bad["state"][0]["exp_avg_scale"][-1] = 0xFFFF  # of the last shard
    train(optimizer, params, range(2, 4))
    before = optimizer.optimizer.state_dict()["state"][0]
    try:
        optimizer.load_state_dict(bad)
    except ValueError:
        pass
    else:
        raise AssertionError("not refused")
    after = optimizer.optimizer.state_dict()["state"][0]
    assert after["step"] == before["step"]
    for name in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"):
        assert_same(after[name], before[name])


def a_dropped_optimizer_frees_its_state_at_once():
    optimizer = ZeroRedundancyOptimizer(buffer(200), fastopt.Adam)
    train(optimizer, buffer(200), range(1), max_norm=1.0)
    gc.disable()
    state = weakref.ref(optimizer.optimizer)
    del optimizer
    assert state() is None


def what_does_not_fit_is_refused_before_anything_is_sent():
    params = buffer(200)
    other_size = fastopt.FlatBuffer({"w": 200 + COMM.rank})
    read_only = buffer(200)
    read_only.flat.flags.writeable = False
    refused = [
        (TypeError, lambda: ZeroRedundancyOptimizer([params.flat], fastopt.Adam)),
        (TypeError, lambda: ZeroRedundancyOptimizer(params, "adam")),
        (ValueError, lambda: ZeroRedundancyOptimizer(params, fastopt.LAMB)),
        (ValueError, lambda: ZeroRedundancyOptimizer(params, fastopt.LARS)),
        (ValueError, lambda: ZeroRedundancyOptimizer(params, fastopt.Adam, master="split")),
        (TypeError, lambda: ZeroRedundancyOptimizer(params, fastopt.Adam, learning_rate=1)),
        (TypeError, lambda: ZeroRedundancyOptimizer(params, fastopt.Adam).step([params.flat])),
        (TypeError, lambda: ZeroRedundancyOptimizer(params, fastopt.Adam).step(buffer(199))),
        (TypeError, lambda: ZeroRedundancyOptimizer(params, fastopt.Optimizer)),
        (TypeError, lambda: ZeroRedundancyOptimizer(params, fastopt.Adam, 3)),
        (TypeError, lambda: ZeroRedundancyOptimizer(params, fastopt.Adam, average="no")),
        (TypeError, lambda: copy.deepcopy(ZeroRedundancyOptimizer(params, fastopt.Adam))),
        (TypeError, lambda: pickle.dumps(ZeroRedundancyOptimizer(params, fastopt.Adam))),
        (ValueError, lambda: ZeroRedundancyOptimizer(params, fastopt.Adam).step(read_only, zero_grads=True)),
        (ValueError, lambda: ZeroRedundancyOptimizer(params, fastopt.Adam).step(params)),
        (ValueError, lambda: ZeroRedundancyOptimizer(params, fastopt.Adam).step(buffer(200), max_norm=-1.0)),
    ]
    if COMM.size > 1:
        refused.append((ValueError, lambda: ZeroRedundancyOptimizer(other_size, fastopt.Adam)))
    for error, call in refused:
        before = params.flat.copy()
        try:
            call()
        except error:
            pass
        else:
            raise AssertionError("not refused")
        assert_same(params.flat, before)


if __name__ == "__main__":
    try:
        globals()[sys.argv[1]]()
    except BaseException:
        import traceback

        traceback.print_exc()
        COMM.Abort(1)
