"""Whatever changes an optimizer does so altogether or not at all, wherever it is interrupted or runs out of memory."""

import errno
import itertools
import mmap
import signal
import time

import numpy as np
import pytest

import fastopt
from tests.support import operations
from tests.support.faults import interrupted, starve

OF_THE_BACKEND = ("construction", "update, first", "step, first", "step", "step, every option")
"""Operations that run other code in another backend."""
CASES = [(name, kind, "cpu") for name, kind in operations.CASES]
CASES += [(name, kind, "reference") for name, kind in operations.CASES if name in OF_THE_BACKEND]


def each(n):
    """Every fault, or in the default tier every `n`-th."""
    return pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.exhaustive), n])


@pytest.mark.covering(1)
@pytest.mark.parametrize(("name", "kind", "backend"), CASES)
@each(47)
def test_an_interrupt_at_any_bytecode_leaves_all_as_before_or_as_after(name, kind, backend, every):
    assert operations.Expected(name, kind, backend).survives(interrupted, every) > 10


@pytest.mark.covering(1)
@pytest.mark.parametrize(("name", "kind", "backend"), [case for case in CASES if case[0] != "update, refused"])
@each(11)
def test_a_failure_of_any_allocation_leaves_all_as_before_or_as_after(name, kind, backend, every):
    assert starve(name, kind, backend, every) > 5


class Unmapped:
    """Mappings of memory of which one fails, with `error`."""

    def __init__(self, error):
        self.error = error

    def inject(self, call, number):
        """Run `call`, in which mapping `number` fails; whether there were that many."""
        count = itertools.count()
        real = mmap.mmap

        def mapped(*arguments, **options):
            if next(count) == number:
                raise self.error
            return real(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mmap, "mmap", mapped)
            try:
                call()
            except (type(self.error), MemoryError):
                pass
        return next(count) > number


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOMEM, "out of memory"), MemoryError()], ids=["OSError", "MemoryError"]
)
@pytest.mark.parametrize("name", ["construction", "add_param_group", "update, new name"])
def test_a_failure_of_any_mapping_of_a_large_state_leaves_all_as_before_or_as_after(name, error, monkeypatch):
    monkeypatch.setattr(operations, "SHAPES", [(1 << 20,), (), (1 << 20,), (2, 5)])
    assert operations.Expected(name, "lamb", "cpu").survives(Unmapped(error).inject) > 3


# --- swap_ema


def _many(n, **options):
    """An optimizer of `n` arrays, averages away from the parameters, and bytes of both."""
    params = [np.full(50, np.float32(k)) for k in range(n)]
    optimizer = fastopt.SGD(params, lr=1.0, ema_decay=0.5, **options)
    optimizer.step([np.ones(50, np.float32)] * n)
    return params, optimizer


def _bits(arrays):
    return [array.tobytes() for array in arrays]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that interrupts")
def test_control_c_at_any_moment_of_a_swap_loses_nothing():
    params, optimizer = _many(300, copy_dtype="bfloat16")
    before = _bits(params), _bits(optimizer.ema), _bits(optimizer.params_copy)
    rng, start = np.random.default_rng(0), time.perf_counter()
    with optimizer.swap_ema():
        pass
    seconds = 1.5 * (time.perf_counter() - start)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(400):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, seconds))
                with optimizer.swap_ema():
                    pass
                while True:  # it may have come already
                    time.sleep(1e-4)
            except KeyboardInterrupt:
                pass
            assert (_bits(params), _bits(optimizer.ema), _bits(optimizer.params_copy)) == before
    finally:
        signal.signal(signal.SIGALRM, handler)
    optimizer.step([np.ones(50, np.float32)] * 300)
    assert int(optimizer.state[7]["step"]) == 2


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")  # NumPy 2.5 discourages it
@pytest.mark.parametrize("kept", ["ema", "params_copy"])
@pytest.mark.parametrize("change", ["read-only", "reshaped", "of another type"])
def test_what_is_done_to_the_shown_arrays_is_not_done_to_the_kept_ones(kept, change):
    params, optimizer = _many(3, copy_dtype="float16")
    before = _bits(params), _bits(optimizer.ema)
    shown = getattr(optimizer, kept)[1]
    if change == "read-only":
        shown.flags.writeable = False
    elif change == "reshaped":
        shown.shape = (5, 10)
    else:
        shown.dtype = np.uint8
    with optimizer.swap_ema():
        assert _bits(params) == before[1]
    assert (_bits(params), _bits(optimizer.ema)) == before
    optimizer.step([np.ones(50, np.float32)] * 3)
    assert getattr(optimizer, kept)[1].shape == (50,)


def test_what_is_written_into_a_shown_average_counts():
    params, optimizer = _many(3)
    optimizer.ema[1][:] = 7
    with optimizer.swap_ema():
        assert params[1].tolist() == [7] * 50


def test_a_parameter_that_became_read_only_inside_is_put_back():
    params, optimizer = _many(300, copy_dtype="float16")
    before = _bits(params), _bits(optimizer.ema), _bits(optimizer.params_copy)
    with optimizer.swap_ema():
        params[150].flags.writeable = False
    assert (_bits(params), _bits(optimizer.ema), _bits(optimizer.params_copy)) == before
    assert not params[150].flags.writeable
    with pytest.raises(ValueError, match=r"params\[150\] must be writable"):
        optimizer.step([np.ones(50, np.float32)] * 300)
    params[150].flags.writeable = True
    optimizer.step([np.ones(50, np.float32)] * 300)


def test_a_parameter_that_was_reallocated_inside_is_an_error_and_steps_stay_refused():
    params, optimizer = _many(3)
    with pytest.raises(ValueError, match=r"params\[1\]"), optimizer.swap_ema():
        params[1].resize(600_000, refcheck=False)
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.step([np.ones(50, np.float32)] * 3)


def test_threads_set_inside_a_swap_count_afterwards():
    _params, optimizer = _many(3)
    with optimizer.swap_ema():
        optimizer.n_threads = 3
    assert optimizer.n_threads == 3
    assert optimizer._plan.n_threads == 3
