"""One operation at a time works on an optimizer: what another thread wants meanwhile is refused and changes nothing."""

import sys
import threading
import time

import numpy as np
import pytest

import fastopt
from tests.support.faults import alone

F32 = np.float32
N = 3_000_000  # some milliseconds, in which other threads run


def ones(*shape):
    return np.ones(shape, F32)


class Beside:
    """Calls a function over and over in another thread while a with block runs; counts what was done and refused."""

    def __init__(self, call):
        self.call, self.n_done, self.refusals, self.stop = call, 0, set(), threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.error = None

    def run(self):
        while not self.stop.is_set() and self.error is None:
            try:
                self.call()
                self.n_done += 1
            except RuntimeError as error:
                self.refusals.add(str(error))
            except BaseException as error:
                self.error = error
            time.sleep(0.001)  # so that the others get their turn

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.stop.set()
        self.thread.join()
        if self.error is not None:
            raise self.error
        assert all("under way" in text or "inside swap_ema()" in text for text in self.refusals)


def tried(call, n=100):
    """How often `call` was done in `n` tries; the others must have been refused with a RuntimeError that says why."""
    n_done = 0
    for _ in range(n):
        try:
            call()
            n_done += 1
        except RuntimeError as error:
            said = str(error)
            assert "under way" in said or "inside swap_ema()" in said, said
    return n_done


def is_uniform(array):
    return bool((array == array.ravel()[0]).all())


@alone
def test_first_steps_at_once_are_refused_or_done():
    sys.setswitchinterval(1e-6)
    for _ in range(10):
        params = [ones(3) for _ in range(5000)]
        grads = [ones(3)] * 5000
        optimizer = fastopt.Momentum(params, lr=1.0, momentum=0.0)
        barrier, n_done = threading.Barrier(3), []

        def step(optimizer=optimizer, grads=grads, barrier=barrier, n_done=n_done):
            barrier.wait()
            n_done.append(tried(lambda: optimizer.step(grads), 1))

        threads = [threading.Thread(target=step) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(n_done) == 3
        assert sum(n_done) >= 1
        optimizer.step(grads)
        assert all(p.tolist() == [-float(sum(n_done))] * 3 for p in params)
        assert {int(state["step"]) for state in optimizer.state} == {sum(n_done) + 1}


@alone
def test_averages_are_not_swapped_beside_a_step():
    p, g = ones(N), ones(N)
    optimizer = fastopt.SGD(p, lr=1.0, ema_decay=0.5, copy_dtype="bfloat16")

    def swap():
        with optimizer.swap_ema():
            assert is_uniform(p)

    with Beside(lambda: optimizer.step(g)) as steps:
        n_swaps = tried(swap)
    assert is_uniform(p)
    assert is_uniform(optimizer.ema[0])
    assert p[0] == 1 - steps.n_done
    assert int(optimizer.state[0]["step"]) == steps.n_done
    assert steps.n_done + n_swaps > 0


@alone
def test_a_snapshot_is_of_one_step():
    p, g, options = ones(N), ones(N), {"lr": 1.0, "momentum": 1.0, "ema_decay": 0.5}
    optimizer = fastopt.Momentum(p, **options)
    found = []
    with Beside(lambda: optimizer.step(g)) as steps:
        tried(lambda: found.append(optimizer.state_dict()))
    found.append(optimizer.state_dict())
    twin = fastopt.Momentum(ones(1), **options)
    expected = {}
    for step in range(steps.n_done + 1):
        expected[step] = twin.state[0]["velocity"][0], twin.ema[0][0]
        twin.step(ones(1))
    for saved in found:
        state = saved["state"][0]
        assert is_uniform(state["velocity"])
        assert is_uniform(saved["ema"][0])
        assert (state["velocity"][0], saved["ema"][0][0]) == expected[state["step"]]
    assert found[-1]["state"][0]["step"] == steps.n_done


@alone
def test_a_state_is_not_loaded_beside_a_step():
    p, g = ones(N), ones(N)
    optimizer = fastopt.Momentum(p, lr=1.0, momentum=1.0)
    optimizer.step(g)
    saved = optimizer.state_dict()
    with Beside(lambda: optimizer.step(g)):
        tried(lambda: optimizer.load_state_dict(saved), 30)
    state = optimizer.state_dict()["state"][0]
    assert is_uniform(state["velocity"])
    assert state["velocity"][0] == -state["step"]


@alone
def test_groups_are_not_added_beside_a_step():
    p = {"a": ones(N)}
    optimizer = fastopt.LAMB(p, lr=1.0)

    def step():
        n = len(optimizer.param_groups)
        try:
            optimizer.step({"a": ones(N), **{f"b{k}": ones(3) for k in range(n - 1)}})
        except ValueError as error:  # a group came between
            said = str(error)
            assert "grads must have the names of params" in said

    def add():
        k = len(optimizer.param_groups) - 1
        optimizer.add_param_group({"params": {f"b{k}": ones(3)}})

    with Beside(step):
        n_added = tried(add, 50)
    assert len(optimizer.param_groups) == n_added + 1
    step()


@alone
def test_master_params_are_not_written_beside_a_step():
    p = np.zeros(N, np.uint16)
    optimizer = fastopt.SGD(p, lr=1.0, master="split")
    values = ones(N)
    with Beside(lambda: optimizer.step(ones(N))):
        tried(lambda: optimizer.load_master_params(values), 30)
    assert is_uniform(optimizer.master_params[0])


@alone
def test_a_copy_is_not_refreshed_beside_a_step():
    p = ones(N)
    optimizer = fastopt.SGD(p, lr=1.0, copy_dtype="float16")
    with Beside(lambda: optimizer.step(ones(N))):
        tried(optimizer.refresh_params_copy, 30)
    assert is_uniform(optimizer.params_copy[0])
    assert optimizer.params_copy[0][0] == np.float16(p[0])


@alone
def test_updates_at_once_are_refused_or_done():
    optimizer = fastopt.SGD(lr=1.0)
    params = [{f"{k} of {thread}": ones(300) for k in range(200)} for thread in range(2)]
    grads = [{name: ones(300) for name in named} for named in params]
    sys.setswitchinterval(1e-6)
    with Beside(lambda: optimizer.update(params[0], grads[0])) as others:
        n_done = tried(lambda: optimizer.update(params[1], grads[1]), 50)
    for n, named in ((others.n_done, params[0]), (n_done, params[1])):
        assert all(p.tolist() == [1.0 - n] * 300 for p in named.values())


@pytest.mark.parametrize("kept", ["state_float32", "master_params"])
@alone
def test_what_is_shown_is_of_one_step(kept):
    p = np.full(N, 0x3F80, np.uint16)
    optimizer = fastopt.SGD(p, lr=1.0, momentum=1.0, master="split", state_dtype="bfloat16")
    g = ones(N)
    found = []
    with Beside(lambda: optimizer.step(g)):
        tried(lambda: found.append(getattr(optimizer, kept)[0]), 20)
    arrays = found if kept == "master_params" else [shown["momentum_buffer"] for shown in found]
    assert all(is_uniform(array) for array in arrays if array.any())
