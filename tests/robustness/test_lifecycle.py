"""An optimizer between its steps: growing, loading before its names are known, copied with its buffer, set up oddly."""

import copy
import ctypes
import gc
import pickle
import time
import weakref

import numpy as np
import pytest

import fastopt
from fastopt import _threads
from fastopt.rules import registry
from tests.support.oracle import assert_same_bits

F32 = np.float32


def ones(*shape):
    return np.ones(shape, F32)


# --- Loaded state that waits for its name


def _trained(**options):
    """A state dict with parameters a and b, and their optimizer."""
    optimizer = fastopt.Adam(lr=0.5, **options)
    params = {"a": ones(2), "b": ones(70)}
    for _ in range(3):
        optimizer.update(params, {"a": ones(2), "b": ones(70)})
    return optimizer, optimizer.state_dict()


@pytest.mark.parametrize("state_dtype", ["float32", "8bit"])
@pytest.mark.parametrize("source_dtype", ["float32", "8bit"])
def test_state_that_waits_for_its_name_does_not_follow_the_callers_arrays(state_dtype, source_dtype):
    _, saved = _trained(state_dtype=source_dtype, ema_decay=0.5)
    twin, optimizer = (fastopt.Adam(lr=0.5, state_dtype=state_dtype, ema_decay=0.5) for _ in range(2))
    twin.load_state_dict(copy.deepcopy(saved))
    optimizer.load_state_dict(saved)
    for kept in (*saved["state"].values(), saved["ema"]):
        for value in kept.values():
            if isinstance(value, np.ndarray):
                value[...] = 0
    for loaded in (twin, optimizer):
        loaded.update({"b": ones(70)}, {"b": None})
    for name, expected in twin.state["b"].items():
        assert np.array_equal(optimizer.state["b"][name], expected), name
    assert_same_bits(optimizer.ema["b"], twin.ema["b"], "ema")


def test_state_that_waits_for_its_name_is_not_handed_out():
    _, saved = _trained()
    optimizer = fastopt.Adam()
    optimizer.load_state_dict(saved)
    first = optimizer.state_dict()
    first["state"][1]["exp_avg"][...] = 0
    assert optimizer.state_dict()["state"][1]["exp_avg"].all()


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_a_group_takes_the_state_that_waited_for_its_names(ema_decay):
    trained, saved = _trained(ema_decay=ema_decay)
    optimizer = fastopt.Adam(lr=0.5, ema_decay=ema_decay)
    optimizer.load_state_dict(saved)
    optimizer.add_param_group({"params": {"b": ones(70)}, "lr": 0.25})
    assert_same_bits(optimizer.state["b"]["exp_avg"], trained.state["b"]["exp_avg"], "exp_avg")
    assert int(optimizer.state["b"]["step"]) == 3
    if ema_decay is not None:
        assert_same_bits(optimizer.ema["b"], trained.ema["b"], "ema")


@pytest.mark.parametrize("grow", ["add_param_group", "update"])
def test_state_that_waited_for_its_name_is_saved_once(grow):
    _, saved = _trained()
    optimizer = fastopt.Adam()
    optimizer.load_state_dict(saved)
    if grow == "update":
        optimizer.update({"b": ones(70)}, {"b": ones(70)})
    else:
        optimizer.add_param_group({"params": {"b": ones(70)}})
    names = [name for group in optimizer.state_dict()["param_groups"] for name in group["param_names"]]
    assert sorted(names) == ["a", "b"]
    other = pickle.loads(pickle.dumps(optimizer))
    other.update({"a": ones(2)}, {"a": None})
    assert int(other.state["a"]["step"]) == 3


def test_a_group_that_does_not_fit_the_state_that_waits_is_refused_and_the_state_goes_on_waiting():
    _, saved = _trained()
    optimizer = fastopt.Adam()
    optimizer.load_state_dict(saved)
    before = pickle.dumps(optimizer.state_dict())
    with pytest.raises(ValueError, match="shape"):
        optimizer.add_param_group({"params": {"b": ones(71)}})
    assert len(optimizer.param_groups) == 1
    assert pickle.dumps(optimizer.state_dict()) == before
    optimizer.add_param_group({"params": {"b": ones(70)}})
    assert int(optimizer.state["b"]["step"]) == 3


@pytest.mark.parametrize("offsets", [None, [0, 1], "ab", {0: -1}, {0: 1.5}], ids=str)
def test_offsets_that_are_none_are_refused(offsets):
    optimizer, saved = _trained()
    saved["offsets"] = offsets
    before = pickle.dumps(optimizer.state_dict())
    with pytest.raises((TypeError, ValueError), match="offsets"):
        optimizer.load_state_dict(saved)
    assert pickle.dumps(optimizer.state_dict()) == before


# --- Names


@pytest.mark.parametrize("name", [1, b"w", ("w", 0), None], ids=repr)
@pytest.mark.parametrize("where", ["construction", "groups", "add_param_group", "update"])
def test_names_are_strings(name, where):
    params, optimizer = {"a": ones(3), name: ones(3)}, fastopt.Adam({"b": ones(3)})
    calls = {
        "construction": lambda: fastopt.Adam(params),
        "groups": lambda: fastopt.Adam([{"params": params}]),
        "add_param_group": lambda: optimizer.add_param_group({"params": params}),
        "update": lambda: optimizer.update(params, {"a": None, name: None}),
    }
    with pytest.raises(TypeError, match="Adam: names .*must be strings"):
        calls[where]()
    assert list(optimizer.state) == ["b"]


# --- Copies


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("together", [lambda *both: both, lambda *both: both[::-1]], ids=["buffer first", "last"])
def test_a_buffer_and_its_optimizer_stay_together_in_a_copy(through, together):
    buffer = fastopt.FlatBuffer({"w": np.full((3, 5), F32(2)), "b": 7})
    optimizer = fastopt.Adam(buffer, lr=0.5, ema_decay=0.5)
    grads = buffer.zeros_like()
    grads.flat[:] = 1
    optimizer.step(grads)
    copied = through({"both": together(optimizer, buffer)})["both"]
    other_optimizer, other = together(*copied)
    assert other.flat is not buffer.flat
    assert other.flat.ctypes.data % 64 == 0
    for name in buffer:
        assert np.shares_memory(other[name], other.flat)
        assert np.shares_memory(other_optimizer.param_groups[0]["params"][list(buffer).index(name)], other.flat)
    optimizer.step(grads)
    assert not np.array_equal(other.flat, buffer.flat)
    other_optimizer.step(grads)
    assert_same_bits(other.flat, buffer.flat, "the copy after its step")


def test_two_optimizers_of_one_buffer_stay_together_in_a_copy():
    buffer = fastopt.FlatBuffer({"a": 3, "b": 4})
    both = [fastopt.SGD({name: buffer[name]}, lr=1.0) for name in buffer]
    copied, other = copy.deepcopy((both, buffer))
    for optimizer, name in zip(copied, other, strict=True):
        optimizer.step({name: ones(other[name].size)})
    assert other.flat.tolist() == [-1] * 7
    assert not buffer.flat.any()


class Named(fastopt.Adam):
    """An optimizer that users gave attributes and a method."""

    def __init__(self, params, name, **options):
        super().__init__(params, **options)
        self.name = name
        self.seen = []

    def note(self):
        self.seen.append(int(self.state[0]["step"]))


def test_a_copy_keeps_the_attributes_of_a_subclass():
    optimizer = Named([ones(3)], "mine", lr=0.5)
    optimizer.step([ones(3)])
    optimizer.note()
    other = copy.deepcopy(optimizer)
    other.step([ones(3)])
    other.note()
    assert (type(other), other.name, other.seen, optimizer.seen) == (Named, "mine", [1, 2], [1])


# --- Groups


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("n_steps", [0, 1])
@pytest.mark.parametrize("change", [list.pop, list.clear, lambda groups: groups.append(dict(groups[0]))])
def test_groups_taken_from_the_list_are_refused(change, n_steps, backend):
    params = [ones(3), ones(3)]
    optimizer = fastopt.Adam([{"params": [p]} for p in params], backend=backend)
    for _ in range(n_steps):
        optimizer.step([ones(3), ones(3)])
    before = [p.tobytes() for p in params]
    groups = list(optimizer.param_groups)
    change(optimizer.param_groups)
    for operation in (
        lambda: optimizer.step([ones(3), ones(3)]),
        lambda: optimizer.add_param_group({"params": [ones(3)]}),
        optimizer.state_dict,
    ):
        with pytest.raises(ValueError, match="param_groups"):
            operation()
    assert [p.tobytes() for p in params] == before
    optimizer.param_groups[:] = groups
    optimizer.step([ones(3), ones(3)])
    assert int(optimizer.state[1]["step"]) == n_steps + 1


@pytest.mark.parametrize("kept", ["step", "mu_product"])
@pytest.mark.parametrize("how", ["add_param_group", "update"])
def test_a_parameter_must_not_lie_in_a_step_count_or_a_running_scalar(kept, how):
    optimizer = fastopt.NAdam({"a": ones(3)})
    p = optimizer.state["a"][kept].reshape(1).view(F32)
    grow = {
        "update": lambda: optimizer.update({"a": ones(3), "b": p}, {"a": None, "b": None}),
        "add_param_group": lambda: optimizer.add_param_group({"params": {"b": p}}),
    }[how]
    with pytest.raises(ValueError, match=r"params\['b'\] overlap|of params\['a'\] overlap"):
        grow()
    assert list(optimizer.state) == ["a"]


# --- Threads


@pytest.fixture
def forget_threads(monkeypatch):
    """Let the number of threads be found again, and restore it."""
    before = fastopt.get_num_threads()
    monkeypatch.delenv("FASTOPT_NUM_THREADS", raising=False)
    monkeypatch.setattr(_threads, "_n_threads", None)
    yield monkeypatch
    fastopt.set_num_threads(before)


@pytest.mark.parametrize("text", ["none", "0", "-1", "1.5", "99999999999", ",", " "])
def test_openmps_variable_is_ignored_where_openmp_ignores_it(forget_threads, text):
    forget_threads.delenv("OMP_NUM_THREADS", raising=False)
    expected = fastopt.get_num_threads()
    forget_threads.setattr(_threads, "_n_threads", None)
    forget_threads.setenv("OMP_NUM_THREADS", text)
    assert fastopt.get_num_threads() == expected


# --- Rounding


def _upward():
    """The C library and its code for rounding upward; skips where there is none."""
    libm = ctypes.CDLL(None)
    if not hasattr(libm, "fesetround") or libm.fesetround(0x800) != 0:
        pytest.skip("this C library or processor has no rounding upward of code 0x800")
    libm.fesetround(0)
    return libm


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("copy_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("master", [None, "split"])
def test_a_caller_who_rounds_upward_gets_the_same_copies_and_averages(copy_dtype, master, backend):
    libm = _upward()
    values = np.random.default_rng(0).standard_normal((2, 3000)).astype(F32)
    results = []
    for rounding in (0, 0x800):
        p = values[0].copy() if master is None else (values[0].view(np.uint32) >> 16).astype(np.uint16)
        libm.fesetround(rounding)
        try:
            options = {"ema_decay": 0.7, "copy_dtype": copy_dtype, "master": master, "backend": backend}
            optimizer = fastopt.SGD([p], lr=0.1, **options)
            optimizer.step([values[1]])
            if master is None:
                p *= F32(0.5)  # exact
            else:
                optimizer.load_master_params([values[1]])
            optimizer.refresh_params_copy()
            shown = [p.copy(), optimizer.ema[0].copy(), optimizer.params_copy[0].copy()]
            with optimizer.swap_ema():
                shown += [p.copy(), optimizer.params_copy[0].copy()]
            still = libm.fegetround()
        finally:
            libm.fesetround(0)
        assert still == rounding
        results.append([array.tobytes() for array in shown])
    names = ("parameters", "averages", "copy", "averages in their place", "their copy")
    differ = [name for name, a, b in zip(names, *results, strict=True) if a != b]
    assert not differ


# --- Zero divided by zero


WITH_EPS = [spec for spec in registry.values() if "eps" in spec.hypers]


@pytest.mark.parametrize("spec", WITH_EPS, ids=lambda spec: spec.name)
def test_without_eps_a_zero_gradient_gives_nan_just_where_it_does_in_torch(spec):
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, spec.name):
        pytest.skip(f"torch has no {spec.name}")
    p = np.array([1.0, 1.0, -2.0, 0.0], F32)
    hypers = {"eps": 0.0} | ({"initial_accumulator_value": 0.0} if spec.name == "Adagrad" else {})
    tensor = torch.tensor(p)
    theirs = getattr(torch.optim, spec.name)([tensor], foreach=False, **hypers)
    ours = spec.cls([p], **hypers)
    for step in range(8):  # RAdam divides from the sixth on
        g = np.array([0.0, 1.0, 0.0, 0.0 if step < 7 else 1.0], F32)
        tensor.grad = torch.tensor(g)
        theirs.step()
        ours.step([g])
        assert np.isnan(p).tolist() == torch.isnan(tensor).tolist(), f"step {step + 1}"
    assert not np.isnan(p[1])


# --- Cost


def _seconds(n, grow):
    """Of `n` calls of `grow`, the fastest of three tries."""
    times = []
    for _ in range(3):
        call = grow()
        start = time.process_time()
        for k in range(n):
            call(k)
        times.append(time.process_time() - start)
    return min(times)


def _by_update():
    optimizer, g = fastopt.SGD(), ones(2)
    return lambda k: optimizer.update({f"p{k}": ones(2)}, {f"p{k}": g})


def _by_groups():
    optimizer = fastopt.SGD({"a": ones(2)})
    return lambda k: optimizer.add_param_group({"params": {f"p{k}": ones(2)}})


def _by_moves():
    optimizer, g = fastopt.SGD(), ones(2)
    optimizer.update({f"p{k}": ones(2) for k in range(400)}, {f"p{k}": None for k in range(400)})
    return lambda k: optimizer.update({f"p{k % 400}": ones(2)}, {f"p{k % 400}": g})


def test_growing_group_by_group_is_not_quadratic():
    few, many = _seconds(250, _by_groups), _seconds(1000, _by_groups)
    assert many < 4 * 2.5 * few  # quadratic would be 16 times


def test_a_new_name_costs_little_more_than_a_step_of_as_many_names():
    update = _by_update()
    for k in range(2000):
        update(k)
    times = []
    for first in (2000, 0):  # new names, and some that are known
        start = time.process_time()
        for k in range(first, first + 200):
            update(k)
        times.append(time.process_time() - start)
    assert times[0] < 8 * times[1]


def test_moving_names_to_other_arrays_costs_no_more_the_later_it_is():
    few, many = _seconds(400, _by_moves), _seconds(1600, _by_moves)
    assert many < 4 * 2.5 * few


@pytest.fixture
def no_garbage_collection():
    """What it costs depends on all that lives in the process of the tests."""
    gc.disable()
    yield
    gc.enable()


def _per_array(n, work):
    """Microseconds of `work` on the names of `n` arrays, for each."""
    room = np.zeros((n, 2), F32)
    params = {f"layer.{k}.weight": room[k] for k in range(n)}
    times = []
    for _ in range(2):
        call = work(params)
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1e6 * min(times) / n


def _construct(params):
    return lambda: fastopt.Adam(params)


def _load(params):
    optimizer = fastopt.Adam(params)
    saved = optimizer.state_dict()
    return lambda: optimizer.load_state_dict(saved)


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("work", [_construct, _load])
def test_a_hundred_thousand_arrays_take_no_time(work):
    assert _per_array(100_000, work) < 10  # 3 to 6 on the machine where this was written


@pytest.mark.large
@pytest.mark.exhaustive
@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("work", [_construct, _load])
def test_a_million_arrays_take_seconds(work):
    assert _per_array(1_000_000, work) < 12


# --- Param groups that change while they are read


class _Setting(float):
    """A hyperparameter during whose check something else is set, as by another thread or a signal handler."""

    def __float__(self):
        self.action()
        return float.__float__(self)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_hyperparameter_that_is_set_while_a_step_reads_its_group_counts_at_the_next_step(backend):
    p = np.zeros(1, F32)
    optimizer = fastopt.SGD([p], lr=1.0, backend=backend)
    optimizer.step([ones(1)])
    group = optimizer.param_groups[0]
    group["dampening"] = _Setting(0.0)
    group["dampening"].action = lambda: group.update(lr=0.25)
    optimizer.step([ones(1)])
    assert group["lr"] == 0.25
    before = p[0]
    optimizer.step([ones(1)])
    assert p[0] == before - 0.25


@pytest.mark.parametrize("params", [ones(3), [ones(3)], {"w": ones(3)}, fastopt.FlatBuffer({"w": 3})], ids=type)
def test_an_optimizer_that_is_dropped_frees_its_states_at_once(params):
    optimizer = fastopt.Adam(params)
    dropped = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert dropped() is None
    finally:
        gc.enable()
