"""EarlyStopping: Keras's counting, the best parameters back in place, nothing allocated, nothing written on misuse."""

import copy
import itertools
import math
import tracemalloc

import numpy as np
import pytest

import fastopt

NAN = math.nan


def run(values, **arguments):
    """What `step` says to each of the values, and the object."""
    stopping = fastopt.EarlyStopping(restore_best=False, **arguments)
    return [stopping.step(value) for value in values], stopping


# --- Counting: "#" marks a step that says stop, "." one that does not


@pytest.mark.parametrize(
    ("arguments", "values", "expected"),
    [
        ({"patience": 3}, [5, 4, 4, 4, 4, 4], "....##"),
        ({"patience": 3}, [5, 4, 6, 6, 3, 4, 4, 4], ".......#"),
        ({"patience": 1}, [5, 4, 3, 3], "...#"),
        ({"patience": 0}, [5, 4, 3, 3], "...#"),
        ({"patience": 2, "mode": "max"}, [1, 2, 2, 1], "...#"),
        ({"patience": 2, "min_delta": 0.5}, [5, 4.6, 4.5, 4.4], "..#."),  # 4.5 is better by just 0.5: not more
        ({"patience": 2, "min_delta": 0.5, "mode": "max"}, [1, 1.5, 1.5, 1.75], "..#."),
        ({"patience": 2}, [5, NAN, NAN, 4, NAN, NAN], "..#..#"),
        ({"patience": 3}, [NAN, NAN, 5, 6, 6, 6], ".....#"),
        ({"patience": 2}, [NAN, NAN, NAN], ".##"),
        ({"patience": 2}, [math.inf, math.inf, 3, math.inf, -math.inf, NAN, -math.inf], "......#"),
        ({"patience": 3, "baseline": 2.0}, [5, 4, 3, 3, 1], "...#."),  # better, but not than the baseline
        ({"patience": 3, "baseline": 2.0}, [5, 4, 3, 2.5, 2.4, 2.4], ".....#"),  # an improvement never stops
        ({"patience": 3, "baseline": 2.0}, [1, 3, 3, 3], "...#"),
        ({"patience": 2, "baseline": 0.5, "mode": "max", "min_delta": 0.1}, [0.55, 0.7, 0.7, 0.7], "...#"),
    ],
)
def test_it_stops_where_keras_stops(arguments, values, expected):
    assert "".join(".#"[stop] for stop in run(values, **arguments)[0]) == expected


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("min_delta", [0.0, 0.25])
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_every_short_history_stops_after_patience_steps_that_are_no_improvement(mode, min_delta, patience):
    sign = 1 if mode == "min" else -1
    for values in itertools.product((0.0, 0.25, 0.5, 1.0, NAN), repeat=5):
        best, in_a_row, expected = None, 0, []
        for value in values:
            better = not math.isnan(value) and (best is None or sign * (best - value) > min_delta)
            best, in_a_row = (value, 0) if better else (best, in_a_row + 1)
            expected.append(in_a_row >= patience)
        said, stopping = run(values, mode=mode, min_delta=min_delta, patience=patience)
        assert (said, stopping.best, stopping.wait) == (expected, best, in_a_row), values


def test_its_attributes_tell_how_it_went():
    _, stopping = run([5, 4, 4, 4, 3], patience=2)
    assert (stopping.best, stopping.best_step, stopping.stopped_step) == (3.0, 4, 3)
    assert (stopping.wait, stopping.n_steps) == (0, 5)


@pytest.mark.parametrize("value", [3, np.float32(3), np.array(3.0), np.int64(3)])
def test_scalars_of_numpy_are_values(value):
    stopping = run([value])[1]
    assert type(stopping.best) is float
    assert stopping.best == 3


def test_a_scalar_tensor_is_a_value():
    torch = pytest.importorskip("torch")
    assert run([torch.tensor(3.0, requires_grad=True)])[1].best == 3


# --- The best parameters


def structures():
    rng = np.random.default_rng(0)
    w, b = rng.standard_normal((3, 4)).astype(np.float32), rng.standard_normal(()).astype(np.float32)
    return {
        "FlatBuffer": fastopt.FlatBuffer({"w": w, "b": (5,)}),
        "dict": {"w": w.copy(), "b": np.array(b)},
        "list": [w.copy(), np.array(b)],
        "tuple": (w.copy(),),
        "array": w.copy(),
        "strided": w.copy()[:, ::2],
        "float64 and uint16": [w.astype(np.float64), np.arange(5, dtype=np.uint16)],
    }


def arrays_of(params):
    if isinstance(params, np.ndarray):
        return [params]
    return list(params if isinstance(params, list | tuple) else params.values())


def change(params):
    for array in arrays_of(params):
        array += 1


@pytest.mark.parametrize("name", structures())
def test_the_best_parameters_are_in_place_when_it_stops(name):
    params = structures()[name]
    stopping = fastopt.EarlyStopping(patience=2)
    best = None
    for value in (5.0, 4.0, 4.5, 4.5):
        change(params)
        if value == 4.0:
            best = [array.copy() for array in arrays_of(params)]
        places = [array.ctypes.data for array in arrays_of(params)]
        stopped = stopping.step(value, params)
    assert stopped
    assert [array.ctypes.data for array in arrays_of(params)] == places
    for array, expected in zip(arrays_of(params), best, strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("name", structures())
def test_steps_that_do_not_stop_leave_the_parameters(name):
    params = structures()[name]
    stopping = fastopt.EarlyStopping(patience=5)
    for value in (5.0, 6.0, 4.0, NAN):
        change(params)
        before = [array.copy() for array in arrays_of(params)]
        assert not stopping.step(value, params)
        for array, expected in zip(arrays_of(params), before, strict=True):
            np.testing.assert_array_equal(array, expected)


def test_a_training_that_ends_by_itself_can_restore_them():
    p = np.zeros(3, np.float32)
    stopping = fastopt.EarlyStopping()
    for k, value in enumerate((3.0, 1.0, 2.0)):
        p[:] = k
        stopping.step(value, p)
    stopping.restore(p)
    np.testing.assert_array_equal(p, 1)


def test_without_any_number_those_of_the_first_step_are_put_back():
    p = np.zeros(3, np.float32)
    stopping = fastopt.EarlyStopping(patience=2)
    stopping.step(NAN, p)
    p += 7
    assert stopping.step(NAN, p)
    np.testing.assert_array_equal(p, 0)


def test_without_restore_best_nothing_is_kept_or_written():
    p = np.zeros(3, np.float32)
    stopping = fastopt.EarlyStopping(patience=1, restore_best=False)
    stopping.step(1.0, p)
    p += 1
    assert stopping.step(2.0, p)
    np.testing.assert_array_equal(p, 1)
    with pytest.raises(RuntimeError, match="no parameters to restore: restore_best=False"):
        stopping.restore(p)


def test_an_improvement_and_a_restore_allocate_no_memory():
    params = fastopt.FlatBuffer({"w": (1000, 500), "b": 500})
    stopping = fastopt.EarlyStopping(patience=1)
    stopping.step(100.0, params)
    tracemalloc.start()
    for value in (3.0, 2.0, 1.0, 1.0):
        stopping.step(value, params)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stopping.stopped_step == 4
    assert peak < 10_000  # the parameters are 2,002,000 bytes


def test_training_goes_on_from_the_restored_parameters():
    p = np.ones(5, np.float32)
    opt = fastopt.SGD(p, lr=0.25, ema_decay=0.5)
    stopping = fastopt.EarlyStopping(patience=1)
    stopping.step(1.0, {"p": p, "ema": opt.ema[0]})
    opt.step(p.copy())
    assert stopping.step(2.0, {"p": p, "ema": opt.ema[0]})
    np.testing.assert_array_equal(p, 1)
    np.testing.assert_array_equal(opt.ema[0], 1)
    opt.step(p.copy())
    np.testing.assert_array_equal(p, 0.75)


def test_a_module_of_torch_shares_its_memory_through_numpy():
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(3, 2)
    params = {name: p.detach().numpy() for name, p in module.named_parameters()}
    before = module.weight.detach().clone()
    stopping = fastopt.EarlyStopping(patience=1)
    stopping.step(1.0, params)
    with torch.no_grad():
        module.weight += 1
    assert stopping.step(1.0, params)
    assert torch.equal(module.weight, before)


# --- State dicts and text


@pytest.mark.parametrize("saved_at", range(6))
@pytest.mark.parametrize("name", structures())
def test_it_resumes_where_it_was_saved(name, saved_at):
    straight, resumed = structures()[name], structures()[name]
    a = fastopt.EarlyStopping(patience=3, min_delta=0.1, baseline=4.0)
    b = fastopt.EarlyStopping(patience=3, min_delta=0.1, baseline=4.0)
    for k, value in enumerate((5.0, NAN, 3.0, 3.0, 2.95, 3.5)):
        if k == saved_at:
            state = copy.deepcopy(b.state_dict())
            b = fastopt.EarlyStopping()
            b.load_state_dict(state)
        change(straight)
        change(resumed)
        assert b.step(value, resumed) == a.step(value, straight)
        assert repr(b) == repr(a)
    assert a.stopped_step == 5
    for array, expected in zip(arrays_of(resumed), arrays_of(straight), strict=True):
        np.testing.assert_array_equal(array, expected)


def test_a_state_dict_is_a_snapshot():
    p = np.zeros(3, np.float32)
    stopping = fastopt.EarlyStopping()
    stopping.step(2.0, [p])
    state = stopping.state_dict()
    p += 1
    stopping.step(1.0, [p])
    np.testing.assert_array_equal(state["params"][0], 0)
    assert state["best"] == 2.0


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda state: None, TypeError, "state_dict must be a dict, got NoneType"),
        (lambda state: {**state, "epoch": 3}, KeyError, "'epoch'"),
        (lambda state: {k: v for k, v in state.items() if k != "wait"}, KeyError, "'wait'"),
        (lambda state: {**state, "patience": 1.5}, TypeError, "patience must be an integer, got float 1.5"),
        (lambda state: {**state, "wait": -1}, ValueError, "wait must be >= 0, got -1"),
        (lambda state: {**state, "best": "1"}, TypeError, "best must be a real number, got str"),
        (lambda state: {**state, "params": {0: [1.0]}}, TypeError, "params[0] must be a NumPy array"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change, error, text):
    stopping = fastopt.EarlyStopping(patience=4)
    stopping.step(2.0, np.zeros(3, np.float32))
    other = fastopt.EarlyStopping(patience=7)
    other.step(1.0, np.ones(2, np.float32))
    before = repr(other)
    with pytest.raises(error) as caught:
        other.load_state_dict(change(stopping.state_dict()))
    assert text in str(caught.value)
    assert repr(other) == before


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "EarlyStopping(patience=2, mode='max'): no best yet, 0 since"),
        ([0.25], "EarlyStopping(patience=2, mode='max'): best 0.25 at step 0, 0 since"),
        ([0.25, 0.1], "EarlyStopping(patience=2, mode='max'): best 0.25 at step 0, 1 since"),
        ([0.25, 0.1, 0.1], "EarlyStopping(patience=2, mode='max'): best 0.25 at step 0, stopped at step 2"),
    ],
)
def test_it_prints_as_one_line(values, text):
    stopping = fastopt.EarlyStopping(patience=2, mode="max")
    for value in values:
        stopping.step(value, [])
    assert repr(stopping) == text


# --- Misuse


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"patience": -1}, ValueError, "EarlyStopping: patience must be >= 0, got -1"),
        ({"patience": 2.0}, TypeError, "EarlyStopping: patience must be an integer, got float 2.0"),
        ({"min_delta": -0.1}, ValueError, "EarlyStopping: min_delta must be >= 0, got float -0.1"),
        ({"min_delta": "0"}, TypeError, "EarlyStopping: min_delta must be a real number, got str '0'"),
        ({"mode": "auto"}, ValueError, "EarlyStopping: mode must be 'min' or 'max', got 'auto'"),
        ({"baseline": NAN}, ValueError, "EarlyStopping: baseline must be"),
        ({"baseline": "1"}, TypeError, "EarlyStopping: baseline must be a real number, got str '1'"),
        ({"restore_best": 1}, TypeError, "EarlyStopping: restore_best must be a bool, got int 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, text):
    with pytest.raises(error) as caught:
        fastopt.EarlyStopping(**arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize("value", ["1.0", None, [1.0], np.zeros(1), True])
def test_a_value_must_be_a_number(value):
    with pytest.raises(TypeError, match="EarlyStopping: value must be a real number"):
        fastopt.EarlyStopping().step(value, np.zeros(3, np.float32))


def read_only():
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("params", "error", "text"),
    [
        (None, TypeError, "params must be a NumPy array, or a dict or list of them, got NoneType"),
        ("w", TypeError, "params must be a NumPy array, or a dict or list of them, got str"),
        ({"w": [1.0, 2.0]}, TypeError, "params['w'] must be a NumPy array"),
        ([np.zeros(3, np.float32), None], TypeError, "params[1] must be a NumPy array"),
        (np.ma.zeros(3), TypeError, "params must be a NumPy array"),
        (read_only(), ValueError, "params[0] must be writable, got a read-only array"),
    ],
)
def test_parameters_must_be_arrays_that_can_be_restored(params, error, text):
    stopping = fastopt.EarlyStopping()
    with pytest.raises(error) as caught:
        stopping.step(1.0, params)
    assert text in str(caught.value)
    assert (stopping.best, stopping.n_steps) == (None, 0)


def test_a_module_or_tensors_of_torch_are_told_how_to_hand_over_their_memory():
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(3, 2)
    for params in (module, dict(module.named_parameters()), list(module.parameters())):
        with pytest.raises(TypeError, match=r"hand over \{name: p.detach\(\).numpy\(\) for name, p in"):
            fastopt.EarlyStopping().step(1.0, params)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"w": np.ones(3, np.float32)}, "params must have the names of the first step, ['w', 'b'], got ['w']"),
        ([np.ones(3, np.float32), np.ones(2)], "params must have the names of the first step, ['w', 'b'], got [0, 1]"),
        (
            {"w": np.ones(3, np.float32), "b": np.ones(3)},
            "params['b'] must be float64 of shape (2,) as in the first step, got float64 of shape (3,)",
        ),
        (
            {"w": np.ones(3, np.float64), "b": np.ones(2)},
            "params['w'] must be float32 of shape (3,) as in the first step, got float64 of shape (3,)",
        ),
        ({"w": np.ones(3, np.float32), "b": np.zeros((2, 1))}, "params['b'] must be float64 of shape (2,)"),
    ],
)
@pytest.mark.parametrize("value", [0.5, 2.0], ids=["improving", "stopping"])
def test_parameters_of_another_structure_are_refused_before_anything_is_written(other, text, value):
    params = {"w": np.zeros(3, np.float32), "b": np.zeros(2)}
    stopping = fastopt.EarlyStopping(patience=1)
    stopping.step(1.0, params)
    before, state = copy.deepcopy(other), stopping.state_dict()
    for use in (lambda: stopping.step(value, other), lambda: stopping.restore(other)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
            use()
        assert text in str(caught.value)
    for array, expected in zip(arrays_of(other), arrays_of(before), strict=True):
        np.testing.assert_array_equal(array, expected)
    assert repr(stopping.state_dict()) == repr(state)


def test_there_is_nothing_to_restore_before_the_first_step():
    with pytest.raises(RuntimeError, match="EarlyStopping: there are no parameters to restore: no step yet"):
        fastopt.EarlyStopping().restore(np.zeros(3, np.float32))
