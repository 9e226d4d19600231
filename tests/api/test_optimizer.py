"""The optimizer as users hold it: groups, state, None gradients, dicts, snapshots, threads, backends."""

import collections.abc
import copy
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref

import numpy as np
import pytest

import fastopt
from fastopt.rules import registry
from tests.support.configs import CONFIGS, DEFAULTS
from tests.support.oracle import assert_same_bits

F32 = np.float32
ALL = pytest.mark.parametrize("config", CONFIGS, ids=str)
EACH = pytest.mark.parametrize("config", DEFAULTS, ids=str)
SHAPES = [(3, 5), (), (17,), (0,), (2, 1, 4)]


def draw(seed):
    """Arrays of several shapes."""
    rng = np.random.default_rng(seed)
    return [np.array(rng.standard_normal(shape), F32) for shape in SHAPES]


def run(optimizer, seeds, structure=list):
    for seed in seeds:
        optimizer.step(structure(draw(seed)))


# --- Structures


@EACH
def test_one_array_a_list_a_dict_and_groups_step_alike(config):
    g = draw(7)
    lists, dicts, groups = draw(0), dict(zip("abcde", draw(0), strict=True)), draw(0)
    config.make(lists).step(g)
    config.make(dicts).step(dict(zip("abcde", g, strict=True)))
    config.make([{"params": groups[:2]}, {"params": groups[2:]}]).step(g)
    for k, (single, gradient) in enumerate(zip(draw(0), g, strict=True)):
        config.make(single).step(gradient)
        assert_same_bits(lists[k], single, "list")
        assert_same_bits(list(dicts.values())[k], single, "dict")
        assert_same_bits(groups[k], single, "groups")


def test_params_may_come_from_a_generator():
    arrays = draw(0)
    optimizer = fastopt.SGD(array for array in arrays)
    optimizer.step(draw(1))
    assert len(optimizer.state) == len(SHAPES)


def test_gradients_may_come_as_a_tuple():
    expected, actual = draw(0), draw(0)
    fastopt.SGD(expected).step(draw(1))
    fastopt.SGD(actual).step(tuple(draw(1)))
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b, "p")


def test_the_order_of_names_in_a_gradient_dict_does_not_matter():
    p = {"a": np.ones(2, F32), "b": np.ones(3, F32)}
    fastopt.SGD(p, lr=1.0).step({"b": np.full(3, F32(3)), "a": np.full(2, F32(2))})
    assert p["a"].tolist() == [-1, -1]
    assert p["b"].tolist() == [-2, -2, -2]


def test_a_memmap_is_updated_in_its_file(tmp_path):
    p = np.memmap(tmp_path / "p", F32, "w+", shape=(8,))
    fastopt.SGD(p, lr=1.0).step(np.ones(8, F32))
    p.flush()
    assert np.fromfile(tmp_path / "p", F32).tolist() == [-1] * 8


class _Fresh(collections.abc.Mapping):
    """Gradients that exist only while somebody holds them."""

    def __getitem__(self, name):
        return np.full(300_000, F32(ord(name)))

    def __iter__(self):
        return iter("ab")

    def __len__(self):
        return 2


def test_gradients_that_nobody_else_holds_live_until_the_step_is_done():
    p = {name: np.zeros(300_000, F32) for name in "ab"}
    fastopt.SGD(p, lr=1.0).step(_Fresh())
    assert (p["a"] == -97).all()
    assert (p["b"] == -98).all()


# --- Groups


def test_every_group_has_its_own_hyperparameters():
    p, q = np.zeros(2, F32), np.zeros(2, F32)
    optimizer = fastopt.SGD([{"params": [p]}, {"params": [q], "lr": 0.5}], lr=0.25)
    optimizer.step([np.ones(2, F32), np.ones(2, F32)])
    assert p.tolist() == [-0.25, -0.25]
    assert q.tolist() == [-0.5, -0.5]


def test_a_changed_learning_rate_counts_at_the_next_step():
    p = np.zeros(2, F32)
    optimizer = fastopt.SGD(p, lr=1.0)
    optimizer.step(np.ones(2, F32))
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step(np.ones(2, F32))
    assert p.tolist() == [-1.25, -1.25]


@ALL
def test_changed_hyperparameters_have_the_bits_of_new_ones(config):
    """Two optimizers in the same state step alike when one got its hyperparameters later."""
    p, q = draw(0), draw(0)
    early, late = config.make(p), config.make(q)
    run(early, [1, 2])
    late.load_state_dict(early.state_dict())
    for a, b in zip(p, q, strict=True):
        b[...] = a
    values = {"lr": 0.03, "weight_decay": 0.07, "betas": (0.7, 0.8), "maximize": True}
    for optimizer in (early, late):
        optimizer.param_groups[0].update({k: v for k, v in values.items() if k in config.spec.hypers})
    late.load_state_dict(late.state_dict())
    run(early, [3])
    run(late, [3])
    for a, b in zip(p, q, strict=True):
        assert_same_bits(a, b, str(config))


def test_integers_and_numpy_scalars_are_hyperparameters_too():
    p = np.zeros(2, F32)
    optimizer = fastopt.SGD(p, lr=1, momentum=np.float64(0.5))
    optimizer.param_groups[0]["lr"] = np.float32(0.5)
    optimizer.step(np.ones(2, F32))
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert p.tolist() == [-0.5, -0.5]


def test_a_group_added_later_starts_with_its_own_step_count():
    p, q = np.ones(3, F32), np.ones(3, F32)
    optimizer = fastopt.Adam(p)
    optimizer.step(np.ones(3, F32))
    optimizer.add_param_group({"params": [q], "lr": 0.1})
    optimizer.step([np.ones(3, F32), np.ones(3, F32)])
    assert [int(state["step"]) for state in optimizer.state] == [2, 1]
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)
    assert abs(float(q[0]) - 0.9) < 1e-6


def test_schedulers_may_keep_their_initial_lr_in_a_group():
    optimizer = fastopt.Adam([np.ones(3, F32)])
    optimizer.param_groups[0]["initial_lr"] = 0.1
    optimizer.step([np.ones(3, F32)])
    assert optimizer.state_dict()["param_groups"][0]["initial_lr"] == 0.1


# --- None gradients and step counts


@ALL
def test_a_none_gradient_skips_its_tensor_altogether(config):
    p = draw(0)
    optimizer = config.make(p)
    run(optimizer, [1])
    before = optimizer.state_dict()["state"][2], p[2].tobytes()
    gradients = draw(2)
    gradients[2] = None
    optimizer.step(gradients)
    assert p[2].tobytes() == before[1]
    for name, value in optimizer.state_dict()["state"][2].items():
        assert np.array_equal(value, before[0][name])
    assert [int(state["step"]) for state in optimizer.state] == [2, 2, 1, 2, 2]


@ALL
def test_tensors_with_different_step_counts_step_as_if_alone(config):
    p, alone = draw(0), draw(0)
    together = config.make(p)
    for k in range(4):
        together.step([g if (k + i) % 2 else None for i, g in enumerate(draw(k))])
    for i, q in enumerate(alone):
        optimizer = config.make(q)
        for k in range(4):
            optimizer.step(draw(k)[i] if (k + i) % 2 else None)
        assert_same_bits(p[i], q, f"{config}, params[{i}]")


# --- State


@ALL
def test_states_have_the_shape_of_their_parameter_and_are_live(config):
    p = draw(0)
    optimizer = config.make(p)
    run(optimizer, [1])
    names = config.spec.states_for(config.spec.flags(config.values))
    for state, array in zip(optimizer.state, p, strict=True):
        assert set(state) == {"step", *config.spec.running, *names}
        assert all(state[name].shape == array.shape for name in names)
    before = {name: optimizer.state[0][name] for name in names}
    run(optimizer, [2])
    for name in names:
        assert np.shares_memory(before[name], optimizer.state[0][name])
        assert_same_bits(before[name], optimizer.state[0][name], name)


@pytest.mark.filterwarnings("ignore:Setting the:DeprecationWarning")  # of NumPy 2.5
def test_reshaping_what_state_shows_does_not_reshape_the_state():
    optimizer = fastopt.Adam(np.ones((2, 3), F32))
    optimizer.state[0]["exp_avg"].shape = (6,)
    assert optimizer.state[0]["exp_avg"].shape == (2, 3)


def test_what_is_written_into_a_state_counts():
    p = np.zeros(2, F32)
    optimizer = fastopt.Momentum({"w": p}, lr=1.0, momentum=0.5)
    optimizer.state["w"]["velocity"][:] = 8
    optimizer.step({"w": np.zeros(2, F32)})
    assert p.tolist() == [4, 4]


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_parameter"),
    [
        (lambda p: fastopt.SGD(p), 0),
        (lambda p: fastopt.SGD(p, momentum=0.9), 4),
        (lambda p: fastopt.Adam(p), 8),
        (lambda p: fastopt.Adam(p, amsgrad=True), 12),
        (lambda p: fastopt.RMSprop(p, centered=True, momentum=0.9), 12),
        (lambda p: fastopt.Lion(p), 4),
    ],
)
def test_state_nbytes_is_what_the_state_takes(optimizer, bytes_per_parameter):
    assert optimizer(np.ones(1000, F32)).state_nbytes == 1000 * bytes_per_parameter


def test_states_of_one_array_are_aligned_to_a_cache_line():
    for n in (10, 3_000_000):
        optimizer = fastopt.Adam(np.ones(n, F32))
        for name in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[0][name].ctypes.data % 64 == 0


# --- state_dict


@ALL
@pytest.mark.parametrize("through", ["memory", "pickle"])
def test_resuming_in_the_middle_of_a_run_changes_no_bit(config, through):
    p = draw(0)
    optimizer = config.make(p)
    run(optimizer, range(1, 4))
    saved = optimizer.state_dict()
    snapshot = copy.deepcopy(p)
    run(optimizer, range(4, 7))
    resumed = config.spec.cls(snapshot)
    resumed.load_state_dict(pickle.loads(pickle.dumps(saved)) if through == "pickle" else saved)
    run(resumed, range(4, 7))
    for k, (a, b) in enumerate(zip(snapshot, p, strict=True)):
        assert_same_bits(a, b, f"{config}, params[{k}]")
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@EACH
def test_a_snapshot_does_not_follow_the_optimizer(config):
    optimizer = config.make(draw(0))
    run(optimizer, [1])
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    run(optimizer, [2, 3])
    for k in saved["state"]:
        for name, value in saved["state"][k].items():
            assert np.array_equal(value, kept["state"][k][name])


@ALL
def test_a_pickled_optimizer_goes_on_with_the_same_bits(config):
    names = "abcde"
    for structure in (list, lambda values: dict(zip(names, values, strict=True))):
        optimizer = config.make(structure(draw(0)), n_threads=2)
        run(optimizer, [1, 2], structure)
        other = pickle.loads(pickle.dumps(optimizer))
        run(optimizer, [3], structure)
        run(other, [3], structure)
        for a, b in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
            assert a is not b
            assert_same_bits(a, b, str(config))
        assert other.n_threads == 2


def test_a_pickled_single_array_keeps_its_structure():
    optimizer = fastopt.Adam(np.ones(3, F32))
    other = copy.deepcopy(optimizer)
    other.step(np.ones(3, F32))
    assert int(other.state[0]["step"]) == 1
    assert int(optimizer.state[0]["step"]) == 0


def test_names_decide_where_a_state_goes():
    saved = fastopt.Momentum({"a": np.ones(2, F32), "b": np.ones(3, F32)})
    saved.step({"a": np.full(2, F32(1)), "b": np.full(3, F32(2))})
    other = fastopt.Momentum({"b": np.ones(3, F32), "a": np.ones(2, F32)})
    other.load_state_dict(saved.state_dict())
    assert_same_bits(other.state["b"]["velocity"], saved.state["b"]["velocity"], "b")


def _broken(saved, kind):
    """`saved` with one thing wrong."""
    state, groups = saved["state"], saved["param_groups"]
    if kind == "another optimizer":
        saved["optimizer"] = "Lion"
    elif kind == "no groups":
        del saved["param_groups"]
    elif kind == "two groups":
        groups.append(groups[0])
    elif kind == "a missing parameter":
        groups[0]["params"].pop()
    elif kind == "a missing state":
        del state[2]["exp_avg"]
    elif kind == "a missing tensor":
        del state[4]
    elif kind == "an unknown state":
        state[2]["exp_avrg"] = state[2]["exp_avg"]
    elif kind == "another shape":
        state[2]["exp_avg"] = np.ones(18, F32)
    elif kind == "another dtype":
        state[2]["exp_avg"] = np.ones(17)
    elif kind == "a bad step":
        state[2]["step"] = -1
    elif kind == "half a step":
        state[2]["step"] = 1.5
    elif kind == "a huge step":
        state[2]["step"] = 2**63
    elif kind == "an infinite step":
        state[2]["step"] = float("inf")
    elif kind == "a complex step":
        state[2]["step"] = 1 + 2j
    elif kind == "groups that are none":
        saved["param_groups"] = ["x"]
    elif kind == "a state that is none":
        state[2] = 5
    elif kind == "a bad learning rate":
        groups[0]["lr"] = -1.0
    elif kind == "an unknown hyperparameter":
        groups[0]["learning_rate"] = 1.0
    elif kind == "a missing hyperparameter":
        del groups[0]["eps"]
    return saved


@pytest.mark.parametrize(
    "kind",
    [
        "another optimizer",
        "no groups",
        "two groups",
        "a missing parameter",
        "a missing state",
        "a missing tensor",
        "an unknown state",
        "another shape",
        "another dtype",
        "a bad step",
        "half a step",
        "a bad learning rate",
        "a huge step",
        "an infinite step",
        "a complex step",
        "groups that are none",
        "a state that is none",
        "an unknown hyperparameter",
        "a missing hyperparameter",
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(kind):
    saved = fastopt.Adam(draw(0), lr=0.5)
    run(saved, [1, 2])
    optimizer = fastopt.Adam(draw(0))
    run(optimizer, [1])
    before = optimizer.state_dict()
    with pytest.raises((TypeError, ValueError, KeyError), match="Adam"):
        optimizer.load_state_dict(_broken(saved.state_dict(), kind))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for k in before["state"]:
        for name, value in before["state"][k].items():
            assert np.array_equal(value, after["state"][k][name])


def test_a_state_dict_with_another_switch_brings_its_state_along():
    saved = fastopt.Adam(draw(0), amsgrad=True)
    run(saved, [1])
    optimizer = fastopt.Adam(draw(0))
    optimizer.load_state_dict(saved.state_dict())
    run(optimizer, [2])
    assert optimizer.param_groups[0]["amsgrad"] is True
    assert set(optimizer.state[0]) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


# --- update()


@ALL
def test_update_makes_state_on_first_use_and_steps_like_step(config):
    p, q = dict(zip("abcde", draw(0), strict=True)), dict(zip("abcde", draw(0), strict=True))
    optimizer = config.spec.cls(**config.hypers)
    assert optimizer.state == {}
    other = config.make(q)
    for seed in (1, 2, 3):
        g = dict(zip("abcde", draw(seed), strict=True))
        optimizer.update(p, g)
        other.step(g)
    for name in p:
        assert_same_bits(p[name], q[name], f"{config}, {name}")


def test_update_leaves_names_alone_that_it_is_not_given():
    optimizer = fastopt.Adam()
    p = {"a": np.ones(2, F32), "b": np.ones(2, F32)}
    g = {"a": np.ones(2, F32), "b": np.ones(2, F32)}
    optimizer.update(p, g)
    b = p["b"].tobytes()
    optimizer.update({"a": p["a"]}, {"a": g["a"]})
    assert p["b"].tobytes() == b
    assert {name: int(state["step"]) for name, state in optimizer.state.items()} == {"a": 2, "b": 1}


def test_update_follows_a_name_to_another_array():
    optimizer = fastopt.Momentum(lr=1.0, momentum=1.0)
    first, second = np.zeros(2, F32), np.zeros(2, F32)
    optimizer.update({"w": first}, {"w": np.ones(2, F32)})
    optimizer.update({"w": second}, {"w": np.zeros(2, F32)})
    assert first.tolist() == [-1, -1]
    assert second.tolist() == [-1, -1]
    assert optimizer.param_groups[0]["params"][0] is second


def _refusals():
    fine = {"a": np.ones(2, F32), "b": np.ones(3, F32)}
    return {
        "another dtype": (fine, {"a": np.ones(2), "b": None}, {}),
        "a bad option": (fine, fine, {"max_norm": -1.0}),
        "a bad new parameter": ({"a": fine["a"], "b": np.ones(3)}, fine, {}),
    }


@pytest.mark.parametrize("kind", _refusals())
def test_a_refused_update_leaves_names_arrays_and_states_as_they_were(kind):
    p = {"a": np.ones(2, F32)}
    optimizer = fastopt.Adam()
    optimizer.update(p, {"a": np.ones(2, F32)})
    before = optimizer.state_dict()
    params, grads, options = _refusals()[kind]
    with pytest.raises((TypeError, ValueError)):
        optimizer.update(params, grads, **options)
    assert list(optimizer.state) == ["a"]
    assert optimizer.param_groups[0]["params"][0] is p["a"]
    assert pickle.dumps(optimizer.state_dict()) == pickle.dumps(before)
    optimizer.update({"a": p["a"], "b": np.ones(7, F32)}, {"a": np.ones(2, F32), "b": np.ones(7, F32)})


def test_after_a_refused_update_with_a_new_name_hyperparameters_can_be_changed():
    p = {"a": np.ones(2, F32)}
    optimizer = fastopt.SGD(lr=1.0)
    optimizer.update(p, {"a": np.ones(2, F32)})
    with pytest.raises(ValueError, match="shape"):
        optimizer.update({**p, "b": np.ones(3, F32)}, {"a": np.ones(2, F32), "b": np.ones(4, F32)})
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step({"a": np.ones(2, F32)})
    assert p["a"].tolist() == [-0.5, -0.5]


def test_state_can_be_read_while_another_thread_adds_names(monkeypatch):
    optimizer = fastopt.SGD({"a": np.ones(2, F32)}, ema_decay=0.5)
    exposed = optimizer._arrays.exposed

    def adding(array):
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": {"b": np.ones(3, F32)}})
        return exposed(array)

    monkeypatch.setattr(optimizer._arrays, "exposed", adding)
    assert list(optimizer.ema) == ["a"]
    assert list(optimizer.ema) == ["a", "b"]


def test_states_that_wait_for_their_names_are_not_lost():
    saved = fastopt.Adam(ema_decay=0.5)
    p = {"a": np.ones(2, F32), "b": np.ones(3, F32)}
    saved.update(p, {"a": np.ones(2, F32), "b": np.ones(3, F32)})
    snapshot = saved.state_dict()
    resumed = fastopt.Adam(ema_decay=0.5)
    resumed.load_state_dict(snapshot)
    resumed.update({"a": p["a"].copy()}, {"a": None})
    assert_same_bits(resumed.ema["a"], saved.ema["a"], "ema")
    for other in (fastopt.Adam(ema_decay=0.5), pickle.loads(pickle.dumps(resumed))):
        other.load_state_dict(resumed.state_dict())
        other.update({"b": p["b"].copy()}, {"b": None})
        assert_same_bits(other.state["b"]["exp_avg"], saved.state["b"]["exp_avg"], "exp_avg")
        assert_same_bits(other.ema["b"], saved.ema["b"], "ema")


def test_a_group_beside_the_one_of_update_survives_pickling():
    optimizer = fastopt.Adam()
    optimizer.add_param_group({"params": {"a": np.ones(3, F32)}, "lr": 0.5})
    optimizer.step({"a": np.ones(3, F32)})
    other = pickle.loads(pickle.dumps(optimizer))
    assert other.param_groups[1]["lr"] == 0.5
    assert_same_bits(other.state["a"]["exp_avg"], optimizer.state["a"]["exp_avg"], "exp_avg")


def test_update_takes_a_learning_rate_set_before_its_first_call():
    optimizer = fastopt.SGD(lr=1.0)
    optimizer.param_groups[0]["lr"] = 0.5
    p = {"w": np.zeros(2, F32)}
    optimizer.update(p, {"w": np.ones(2, F32)})
    assert p["w"].tolist() == [-0.5, -0.5]


@EACH
def test_update_resumes_from_a_state_dict_loaded_before_its_first_call(config):
    p = dict(zip("abcde", draw(0), strict=True))
    optimizer = config.spec.cls(**config.hypers)
    optimizer.update(p, dict(zip("abcde", draw(1), strict=True)))
    saved, q = optimizer.state_dict(), copy.deepcopy(p)
    resumed = config.spec.cls()
    resumed.load_state_dict(saved)
    for target, arrays in ((optimizer, p), (resumed, q)):
        target.update(arrays, dict(zip("abcde", draw(2), strict=True)))
    for name in p:
        assert_same_bits(q[name], p[name], f"{config}, {name}")


def test_a_state_dict_may_hold_the_optimizers_own_copy_of_the_parameters():
    p = [np.ones(4, F32), np.ones(4, F32)]
    optimizer = fastopt.Momentum(p, lr=1.0, copy_dtype="bfloat16", state_dtype="bfloat16")
    optimizer.step([np.ones(4, F32)] * 2)
    saved = optimizer.state_dict()
    saved["state"][1]["velocity"] = optimizer.params_copy[0].view(np.uint16)
    before = saved["state"][1]["velocity"].copy()
    p[0][:] = 5
    optimizer.load_state_dict(saved)
    assert optimizer.state[1]["velocity"].view(np.uint16).tolist() == before.tolist()


# --- FlatBuffer


def test_a_flat_buffer_holds_its_tensors_one_after_the_other():
    buffer = fastopt.FlatBuffer({"w": np.arange(6, dtype=F32).reshape(2, 3), "b": 2, "s": ()})
    assert buffer.flat.tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0]
    assert {name: view.shape for name, view in buffer.items()} == {"w": (2, 3), "b": (2,), "s": ()}
    assert all(np.shares_memory(view, buffer.flat) for view in buffer.values())
    assert buffer.flat.ctypes.data % 64 == 0


def test_a_flat_buffer_copies_what_it_is_made_from():
    w = np.ones(3, F32)
    buffer = fastopt.FlatBuffer({"w": w})
    buffer["w"][:] = 2
    assert w.tolist() == [1, 1, 1]
    other = buffer.copy()
    other["w"][:] = 3
    assert buffer.flat.tolist() == [2, 2, 2]
    assert buffer.zeros_like().flat.tolist() == [0, 0, 0]


def test_assignment_to_a_flat_buffer_copies_in():
    buffer = fastopt.FlatBuffer({"w": np.ones((2, 2), F32), "s": ()})
    view, values = buffer["w"], np.arange(4, dtype=F32).reshape(2, 2)
    buffer["w"] = values.T
    assert view is buffer["w"]
    assert buffer.flat.tolist() == [0, 2, 1, 3, 0]
    buffer["s"] = np.float32(7)
    assert buffer.flat[4] == 7


def test_arithmetic_in_place_works_on_a_flat_buffer():
    buffer = fastopt.FlatBuffer({"w": np.ones(3, F32)})
    buffer["w"] -= 0.25
    buffer["w"] *= buffer["w"]
    assert buffer.flat.tolist() == [0.5625] * 3


def test_a_flat_buffer_survives_pickling():
    buffer = pickle.loads(pickle.dumps(fastopt.FlatBuffer({"a": np.ones(2, F32), "b": (0, 3)})))
    assert list(buffer) == ["a", "b"]
    assert np.shares_memory(buffer["a"], buffer.flat)


class NamedBuffer(fastopt.FlatBuffer):
    """A buffer of a user's own kind."""

    def __init__(self, name):
        super().__init__({"a": 2})
        self.name = name


def test_a_subclass_of_flat_buffer_survives_pickling_with_its_attributes():
    buffer = NamedBuffer("layer 1")
    buffer["a"][:] = 3
    for other in (copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))):
        assert type(other) is NamedBuffer
        assert other.name == "layer 1"
        assert other.flat.tolist() == [3, 3]


def test_the_flat_array_stays_shared_when_buffer_and_optimizer_are_copied_together():
    buffer = fastopt.FlatBuffer({"a": 2, "b": (0, 3)})
    optimizer = fastopt.SGD(buffer.flat, lr=1.0)
    for other, others in (copy.deepcopy((buffer, optimizer)), pickle.loads(pickle.dumps((buffer, optimizer)))):
        others.step(np.ones(2, F32))
        assert other["a"].tolist() == [-1, -1]
    assert buffer["a"].tolist() == [0, 0]


# --- Backends


@ALL
def test_the_reference_backend_agrees_with_the_compiled_one(config):
    p, q = draw(0), draw(0)
    compiled, reference = config.make(p), config.make(q, backend="reference")
    assert (compiled.backend, reference.backend) == ("cpu", "reference")
    for seed in range(1, 4):
        run(compiled, [seed])
        run(reference, [seed])
    for a, b in zip(p, q, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
    for a, b in zip(compiled.state, reference.state, strict=True):
        assert int(a["step"]) == int(b["step"]) == 3


def test_the_environment_chooses_what_auto_means(monkeypatch):
    monkeypatch.setenv("FASTOPT_BACKEND", "reference")
    assert fastopt.SGD([np.ones(2, F32)]).backend == "reference"
    assert fastopt.SGD([np.ones(2, F32)], backend="cpu").backend == "cpu"


@pytest.mark.parametrize("isa", fastopt.info()["isas"])
def test_the_environment_chooses_the_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FASTOPT_ISA", isa)
    assert fastopt.info()["isa"] == isa
    p = np.zeros(2, F32)
    fastopt.SGD(p, lr=1.0).step(np.ones(2, F32))
    assert p.tolist() == [-1, -1]


def test_info_says_what_runs_here():
    info = fastopt.info()
    assert set(info) == {"version", "isa", "isas", "n_threads", "n_threads_from", "openmp", "backends"}
    assert info["isa"] in info["isas"]
    assert info["isas"][0] == "baseline"
    assert set(info["backends"]) - {"cuda"} == {"cpu", "reference"}
    assert info["n_threads"] == fastopt.get_num_threads()


# --- Forks


def _step_in_a_child(queue):
    p = np.ones(200_000, F32)
    fastopt.SGD(p, lr=1.0, n_threads=2).step(np.ones(200_000, F32))
    queue.put(float(p.sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_does_not_write_into_its_parents_memory():
    n = 2_000_000  # states and buffers of this size are mapped, not allocated
    buffer = fastopt.FlatBuffer({"w": n})
    optimizer = fastopt.Adam(buffer)
    optimizer.step({"w": np.ones(n, F32)})
    before = buffer.flat.copy(), optimizer.state["w"]["exp_avg"].copy()
    child = os.fork()
    if child == 0:
        try:
            optimizer.step({"w": np.full(n, F32(5))})
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert_same_bits(buffer.flat, before[0], "p")
    assert_same_bits(optimizer.state["w"]["exp_avg"], before[1], "exp_avg")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_steps_after_its_parent_ran_in_parallel():
    p = np.ones(200_000, F32)
    fastopt.SGD(p, n_threads=2).step(p.copy())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_step_in_a_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == 0
    finally:
        child.kill()
        child.join()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_that_was_forked_while_a_thread_accumulated_steps():
    n = 3_000_000
    p, g = np.zeros(n, F32), np.ones(n, F32)
    optimizer = fastopt.SGD(p, lr=1.0, n_threads=1)
    optimizer.accumulate(g)
    done = threading.Event()

    def accumulate():
        while not done.is_set():
            optimizer.accumulate(g)

    thread = threading.Thread(target=accumulate)
    thread.start()
    try:
        for _ in range(10):
            time.sleep(0.002)  # when this returns, the other thread is most likely inside a loop over elements
            child = os.fork()
            if child == 0:
                is_right = False
                try:
                    optimizer.discard_accumulated()
                    optimizer.step(g)
                    is_right = (p == -1).all()
                finally:
                    os._exit(0 if is_right else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        thread.join()


# --- Cost


@EACH
def test_a_step_allocates_nothing_that_grows_with_n(config):
    peaks = []
    for n in (1_000, 3_000_000):
        p, g = np.ones(n, F32), np.ones(n, F32)
        optimizer = config.make(p)
        optimizer.step(g)
        tracemalloc.start()
        optimizer.step(g)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 10_000


def test_changing_every_groups_learning_rate_costs_no_more_than_the_groups():
    def seconds(n):
        optimizer = fastopt.Adam([{"params": [np.ones(2, F32)]} for _ in range(n)])
        g = [np.ones(2, F32)] * n
        times = []
        for k in range(5):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (k + 1)
            start = time.perf_counter()
            optimizer.step(g)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(1600) < 4 * 3 * seconds(400)  # quadratic would be 16 times


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_states_are_freed_with_their_optimizer(backend):
    """Without waiting for the garbage collector: they may be most of the memory there is."""
    optimizer = fastopt.Adam(np.ones(1000, F32), backend=backend)
    optimizer.step(np.ones(1000, F32))
    state = weakref.ref(optimizer._tensors[0].states["exp_avg"])
    gc.disable()
    try:
        del optimizer
        assert state() is None
    finally:
        gc.enable()


def test_importing_fastopt_imports_nothing_optional():
    code = (
        "import sys, numpy; before = set(sys.modules); import fastopt; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["fastopt"]


@pytest.mark.parametrize("spec", registry.values(), ids=lambda spec: spec.name)
def test_repr_names_the_hyperparameters_and_sizes(spec):
    text = repr(spec.cls([np.ones((2, 3), F32)]))
    assert text.startswith(f"<{spec.name}(lr=")
    assert "of 6 parameters in 1 tensor, backend='cpu'>" in text


def test_repr_shows_the_values_of_every_group_as_they_are_now():
    optimizer = fastopt.Adam([{"params": [np.ones(3, F32)]}, {"params": [np.ones(5, F32)], "lr": 0.5}])
    optimizer.param_groups[0]["lr"] = 0.25
    _, first, second = repr(optimizer).splitlines()
    assert "param_groups[0] of 3 parameters: lr=0.25, betas=(0.9, 0.999)" in first
    assert "param_groups[1] of 5 parameters: lr=0.5, betas=(0.9, 0.999)" in second


def test_repr_shows_the_options():
    text = repr(fastopt.Adam(np.ones(3, F32), ema_decay=0.99, state_dtype="8bit", n_threads=1))
    assert "backend='cpu', n_threads=1, ema_decay=0.99, state_dtype='8bit'>" in text


@pytest.mark.exhaustive
def test_a_step_is_index_safe_beyond_two_to_the_31_elements():
    n = 2**31 + 70_001
    if _available_bytes() < 5 * n:
        pytest.skip(f"needs {5 * n / 1e9:.0f} GB of free memory")
    p = np.zeros(n, F32)
    g = np.zeros(n, F32)  # pages that are only read are all the same one
    at = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, n - 35_000, n - 1]
    g[at] = np.arange(1, len(at) + 1)
    fastopt.SGD(p, lr=1.0).step(g)
    assert p[at].tolist() == [-1, -2, -3, -4, -5, -6, -7]
    assert np.count_nonzero(p) == len(at)


def _available_bytes():
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except OSError:
        return 0


def test_what_is_imported_when_asked_for_is_listed_and_found():
    code = """
import sys, fastopt
assert not {"fastopt.functional", "fastopt.reference", "fastopt.lr_scheduler"} & set(sys.modules)
assert {"functional", "reference", "lr_scheduler", "EarlyStopping", "Adam"} <= set(dir(fastopt))
assert all(getattr(fastopt, name) is not None for name in dir(fastopt) if name[0] != "_")
from fastopt import EarlyStopping, lr_scheduler
assert fastopt.EarlyStopping is EarlyStopping and fastopt.lr_scheduler is lr_scheduler
fastopt.functional.adam
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
