"""Promise 4: every misuse is a TypeError or ValueError that says what was expected, before anything is written."""

import threading

import numpy as np
import pytest

import fastopt
from fastopt.rules import Pair, Switch, registry

F32 = np.float32


def ones(*shape):
    return np.ones(shape, F32)


def read_only():
    array = ones(4)
    array.flags.writeable = False
    return array


def misaligned():
    return np.frombuffer(bytearray(17), np.uint8)[1:].view(F32)


BAD_ARRAYS = {
    "float64": (lambda: np.ones(4), TypeError, "float32.*got float64 of shape"),
    "unsigned": (lambda: np.ones(4, np.uint16), TypeError, "uint16"),
    "integer": (lambda: np.ones(4, np.int32), TypeError, "float32.*got int32"),
    "complex": (lambda: np.ones(4, np.complex64), TypeError, "float32.*got complex64"),
    "object": (lambda: np.ones(4, object), TypeError, "float32.*got object"),
    "big-endian": (lambda: np.ones(4, ">f4"), TypeError, "float32.*got >f4"),
    "strided": (lambda: ones(8)[::2], ValueError, "C-contiguous.*strides"),
    "reversed": (lambda: ones(4)[::-1], ValueError, "C-contiguous.*strides"),
    "misaligned": (misaligned, ValueError, "aligned to 4 bytes"),
    "masked": (lambda: np.ma.masked_array(ones(4), [0, 0, 0, 1]), TypeError, "masked"),
    "list": (lambda: [1.0, 2.0, 3.0, 4.0], TypeError, "NumPy array"),
    "float": (lambda: 1.0, TypeError, "NumPy array|sequence or a dict"),
    "text": (lambda: "abcd", TypeError, "NumPy array|sequence or a dict"),
}


@pytest.mark.parametrize("bad", BAD_ARRAYS)
def test_a_bad_parameter_is_refused(bad):
    make, error, message = BAD_ARRAYS[bad]
    with pytest.raises(error, match=message):
        fastopt.Adam([ones(3), make()])


@pytest.mark.parametrize("bad", ["list", "float", "text"])
def test_params_that_are_no_arrays_at_all_are_refused(bad):
    make, error, message = BAD_ARRAYS[bad]
    with pytest.raises(error, match=message):
        fastopt.Adam(make())


def test_a_read_only_parameter_is_refused():
    with pytest.raises(ValueError, match=r"params\[0\] must be writable, got a read-only array"):
        fastopt.SGD([read_only()])


def test_a_parameter_that_became_read_only_is_refused():
    p = ones(4)
    optimizer = fastopt.SGD(p)
    p.flags.writeable = False
    with pytest.raises(ValueError, match="params must be writable"):
        optimizer.step(ones(4))


@pytest.mark.filterwarnings("ignore:Setting the:DeprecationWarning")  # NumPy 2.5 discourages what is refused here
@pytest.mark.parametrize("change", ["dtype", "shape", "memory"])
def test_a_parameter_that_was_changed_in_place_is_refused(change):
    p = np.ones(6, F32)
    optimizer = fastopt.SGD([p])
    optimizer.step([ones(6)])
    if change == "dtype":
        p.dtype = np.int32
    elif change == "shape":
        p.shape = (2, 3)
    else:
        p.resize(600_000, refcheck=False)
    with pytest.raises((TypeError, ValueError), match=r"params\[0\]"):
        optimizer.step([ones(6)])


@pytest.mark.filterwarnings("ignore:Setting the:DeprecationWarning")
def test_a_parameter_of_another_type_than_before_is_not_copied():
    p = np.ones(1000, F32)
    optimizer = fastopt.SGD([p], copy_dtype="float16")
    p.dtype = np.uint8
    with pytest.raises(TypeError, match=r"params\[0\] must be float32 of shape \(1000,\), got uint8"):
        optimizer.refresh_params_copy()
    assert (optimizer.params_copy[0] == 1).all()


def test_a_parameter_that_grew_is_not_copied_beyond_its_copy():
    p = np.ones(6, F32)
    optimizer = fastopt.SGD([p], copy_dtype="float16")
    saved = optimizer.state_dict()
    p.resize(600_000, refcheck=False)
    with pytest.raises(ValueError, match="expected 6 elements"):
        optimizer.load_state_dict(saved)
    assert optimizer.params_copy[0].tolist() == [1] * 6


class Lying(np.ndarray):
    """Bytes that say they are bfloat16."""

    class dtype:  # noqa: N801  stands in for NumPy's
        """What `array.dtype` looks like."""

        name, type, isnative, str, kind, itemsize = "bfloat16", np.int8, True, "bfloat16", "V", 1


def test_what_a_subclass_says_of_its_type_is_not_believed():
    optimizer = fastopt.SGD([ones(1000)])
    with pytest.raises(TypeError, match=r"grads\[0\] must be float32 of shape \(1000,\), got int8"):
        optimizer.step([np.ones(1000, np.int8).view(Lying)])
    with pytest.raises(TypeError, match="must be uint16, got int8"):
        fastopt.SGD([np.ones(1000, np.int8).view(Lying)], master="split")


def test_a_step_of_an_optimizer_that_changes_while_it_begins_is_refused():
    first, second = np.zeros(2, F32), np.zeros(2, F32)
    optimizer = fastopt.SGD(lr=1.0)
    optimizer.update({"a": first}, {"a": None})

    class Rebinding(np.float32):
        def __float__(self):
            optimizer.update({"a": second}, {"a": None})
            return 1.0

    for _ in range(2):
        with pytest.raises(RuntimeError, match="parameters or states of this optimizer were changed"):
            optimizer.step({"a": ones(2)}, grad_scale=Rebinding(1.0))
        assert first.tolist() == second.tolist() == [0, 0]
        first, second = second, first
    optimizer.step({"a": ones(2)})


def test_a_fortran_ordered_parameter_is_refused():
    with pytest.raises(ValueError, match="C-contiguous"):
        fastopt.SGD(np.ones((3, 4), F32, order="F"))


def test_repeated_parameters_are_refused():
    p = ones(4)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[2\] are the same array"):
        fastopt.SGD([p, ones(4), p])


def test_overlapping_parameters_are_refused():
    p = ones(8)
    with pytest.raises(ValueError, match=r"params\['a'\] and params\['b'\] overlap in memory"):
        fastopt.SGD({"a": p[:5], "b": p[4:]})


def test_a_new_group_that_overlaps_is_refused_and_nothing_is_added():
    p = ones(8)
    optimizer = fastopt.SGD([p])
    with pytest.raises(ValueError, match=r"overlap|same"):
        optimizer.add_param_group({"params": [ones(3), p[2:]]})
    assert len(optimizer.param_groups) == 1
    optimizer.step([ones(8)])


@pytest.mark.parametrize("params", [[], {}, (), [{"params": []}]], ids=str)
def test_no_parameters_at_all_are_refused(params):
    with pytest.raises(ValueError, match="at least one array"):
        fastopt.SGD(params)


def test_an_unordered_set_is_refused():
    with pytest.raises(TypeError, match="sequence or a dict"):
        fastopt.SGD({1.0, 2.0})


def test_a_step_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameters yet"):
        fastopt.SGD().step({})


# --- Gradients


@pytest.mark.parametrize("bad", BAD_ARRAYS)
def test_a_refused_gradient_changes_nothing_at_all(bad):
    make, error, message = BAD_ARRAYS[bad]
    params = [ones(3), ones(4), ones(5)]
    optimizer = fastopt.NAdam(params)
    optimizer.step([ones(3), ones(4), ones(5)])
    before = [p.tobytes() for p in params], optimizer.state_dict()
    with pytest.raises(error, match=message) as raised:
        optimizer.step([ones(3), make(), ones(5)])
    assert "NAdam: grads[1]" in str(raised.value)
    assert [p.tobytes() for p in params] == before[0]
    for k, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert np.array_equal(value, before[1]["state"][k][name])


def test_a_gradient_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"Adam: grads must be float32 of shape \(2, 3\), got float32 of shape \(6,\)"):
        fastopt.Adam(ones(2, 3)).step(ones(6))


def test_a_fortran_ordered_gradient_is_refused():
    with pytest.raises(ValueError, match=r"grads\[0\] must be C-contiguous"):
        fastopt.Adam([ones(2, 3)]).step([np.ones((2, 3), F32, order="F")])


def test_a_parameter_in_the_workspace_of_another_is_refused():
    optimizer = fastopt.LAMB([np.zeros(3, np.float32)])
    with pytest.raises(ValueError, match=r"the workspace of params\[0\]"):
        optimizer.add_param_group({"params": [optimizer._tensors[0].update]})
    assert len(optimizer.param_groups) == 1


def test_a_gradient_that_overlaps_any_parameter_is_refused():
    p, q = ones(4), ones(4)
    with pytest.raises(ValueError, match=r"grads\['p'\] overlaps params\['q'\] in memory"):
        fastopt.SGD({"p": p, "q": q}).step({"p": q, "q": None})


def test_a_gradient_that_overlaps_a_state_is_refused():
    optimizer = fastopt.Adam([ones(4)])
    with pytest.raises(ValueError, match=r"grads\[0\] overlaps state 'exp_avg_sq' of params\[0\]"):
        optimizer.step([optimizer.state[0]["exp_avg_sq"]])


def test_a_gradient_that_overlaps_only_later_is_refused():
    p, q = ones(4), ones(4)
    optimizer = fastopt.SGD([p, q])
    optimizer.step([ones(4), ones(4)])
    with pytest.raises(ValueError, match="overlaps"):
        optimizer.step([ones(4), p])


@pytest.mark.parametrize("grads", [[], [ones(3)], [ones(3)] * 3], ids=len)
def test_a_wrong_number_of_gradients_is_refused(grads):
    with pytest.raises(ValueError, match=f"one entry for each of 2 parameters, got {len(grads)}"):
        fastopt.Adam([ones(3), ones(3)]).step(grads)


@pytest.mark.parametrize(
    "grads", [None, ones(2, 3), {"a": ones(3)}, 1.0, "ab", iter([])], ids=lambda g: type(g).__name__
)
def test_gradients_for_a_list_must_be_a_sequence(grads):
    with pytest.raises(TypeError, match="grads must be a list"):
        fastopt.Adam([ones(3), ones(3)]).step(grads)


def test_gradients_for_a_dict_must_have_its_names():
    optimizer = fastopt.Adam({"a": ones(3), "b": ones(3)})
    with pytest.raises(ValueError, match=r"names of params, missing \['b'\], unknown \['c'\]"):
        optimizer.step({"a": ones(3), "c": ones(3)})


def test_gradients_for_a_dict_must_be_a_dict():
    with pytest.raises(TypeError, match="grads must be a dict with the names of params, got list"):
        fastopt.Adam({"a": ones(3)}).step([ones(3)])


# --- Hyperparameters


def bad_values(kind):
    """Values that `kind` must refuse, with the error."""
    if isinstance(kind, Switch):
        return [(1, TypeError), ("yes", TypeError), (None, TypeError), (0.0, TypeError)]
    if isinstance(kind, Pair):
        inner = [((value, 0.9), error) for value, error in bad_values(kind.first)]
        return [*inner, (0.9, TypeError), ((0.9,), TypeError), ((0.9, 0.9, 0.9), TypeError), ("ab", TypeError)]
    values = [
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (1e39, ValueError),
        (10**400, ValueError),
        ("0.1", TypeError),
        (None, TypeError),
        (True, TypeError),
        (1j, TypeError),
        (np.ones(1), TypeError),
        (np.ones(()), TypeError),
        (np.ones(2), TypeError),
    ]
    if not kind.vanishing:
        values.append((1e-40, ValueError))
    if kind.low > -1e30:
        values += [(kind.low - 1, ValueError)] + [(kind.low, ValueError)] * kind.low_open
    if kind.high < 1e30:
        values += [(kind.high + 1, ValueError)] + [(kind.high, ValueError)] * kind.high_open
    return values


BAD_HYPERS = [
    pytest.param(spec, name, value, error, id=f"{spec.name}-{name}-{value!r:.40}")
    for spec in registry.values()
    for name, hyper in spec.hypers.items()
    for value, error in bad_values(hyper.kind)
]


@pytest.mark.parametrize(("spec", "name", "value", "error"), BAD_HYPERS)
def test_a_bad_hyperparameter_is_refused_at_construction(spec, name, value, error):
    with pytest.raises(error, match=f"{spec.name}: {name}"):
        spec.cls([ones(3)], **{name: value})


@pytest.mark.parametrize(("spec", "name", "value", "error"), BAD_HYPERS)
def test_a_bad_hyperparameter_set_later_is_refused_before_anything_is_written(spec, name, value, error):
    p, q = ones(3), ones(3)
    optimizer = spec.cls([{"params": [p]}, {"params": [q]}])
    optimizer.step([ones(3), ones(3)])
    before = p.tobytes()
    optimizer.param_groups[1][name] = value
    with pytest.raises(error, match=f"{spec.name}: {name}"):
        optimizer.step([ones(3), ones(3)])
    assert p.tobytes() == before
    assert int(optimizer.state[0]["step"]) == 1


@pytest.mark.parametrize("spec", registry.values(), ids=lambda spec: spec.name)
def test_an_unknown_hyperparameter_is_refused(spec):
    with pytest.raises(TypeError, match="learning_rate"):
        spec.cls([ones(3)], learning_rate=0.1)


def test_an_unknown_name_in_a_group_is_refused():
    with pytest.raises(TypeError, match=r"unknown hyperparameters \['learning_rate'\]"):
        fastopt.Adam([{"params": [ones(3)], "learning_rate": 0.1}])


def test_an_unknown_name_that_appears_later_is_refused():
    optimizer = fastopt.Adam([ones(3)])
    optimizer.param_groups[0]["learning_rate"] = 0.1
    with pytest.raises(ValueError, match=r"unknown \['learning_rate'\]"):
        optimizer.step([ones(3)])


def test_a_hyperparameter_that_disappears_is_refused():
    optimizer = fastopt.Adam([ones(3)])
    optimizer.step([ones(3)])
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"missing \['lr'\]"):
        optimizer.step([ones(3)])


@pytest.mark.parametrize("hypers", [{"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}], ids=str)
def test_nesterov_needs_momentum_and_no_dampening(hypers):
    with pytest.raises(ValueError, match="nesterov needs momentum > 0 and dampening 0"):
        fastopt.SGD([ones(3)], **hypers)


def test_a_switch_that_would_need_new_state_is_refused():
    optimizer = fastopt.Adam([ones(3)])
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="state 'max_exp_avg_sq', which params\\[0\\] does not have"):
        optimizer.step([ones(3)])


def test_hyperparameters_that_leave_float32_together_are_refused_before_anything_is_written():
    p = ones(3)
    optimizer = fastopt.Adam(p, lr=3e38)
    with pytest.raises(ValueError, match="outside the range of float32"):
        optimizer.step(ones(3))
    assert p.tolist() == [1, 1, 1]
    assert int(optimizer.state[0]["step"]) == 0


def test_replacing_a_param_group_is_refused():
    optimizer = fastopt.Adam([ones(3)])
    optimizer.step([ones(3)])
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match="must keep its dicts"):
        optimizer.step([ones(3)])


def test_replacing_a_groups_params_is_refused():
    optimizer = fastopt.Adam([ones(3)])
    optimizer.step([ones(3)])
    optimizer.param_groups[0]["params"] = [ones(3)]
    with pytest.raises(ValueError, match="is fixed"):
        optimizer.step([ones(3)])


def test_a_negative_step_count_is_refused():
    optimizer = fastopt.Adam([ones(3)])
    optimizer.state[0]["step"][...] = -1
    with pytest.raises(ValueError, match=r"step count of params\[0\] must be >= 0 .*, got -1"):
        optimizer.step([ones(3)])


@pytest.mark.parametrize("step", [2**53, 2**63 - 1])
def test_a_step_count_that_float64_cannot_count_is_refused(step):
    optimizer = fastopt.Adam([ones(3)])
    optimizer.state[0]["step"][...] = step
    with pytest.raises(ValueError, match="step count"):
        optimizer.step([ones(3)])


def test_a_gradient_that_overlaps_a_step_count_is_refused():
    optimizer = fastopt.SGD([ones(2)])
    g = optimizer.state[0]["step"].reshape(1).view(F32)
    with pytest.raises(ValueError, match="overlaps the step count"):
        optimizer.step([g])


def test_a_failed_group_leaves_a_single_array_single():
    optimizer = fastopt.SGD(ones(3))
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": "x"})
    optimizer.n_threads = 1
    optimizer.step(ones(3))


def test_state_names_cannot_be_rebound():
    with pytest.raises(TypeError):
        fastopt.Adam([ones(3)]).state[0]["exp_avg"] = ones(3)


@pytest.mark.parametrize(
    ("n_threads", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)]
)
def test_a_bad_number_of_threads_is_refused(n_threads, error):
    with pytest.raises(error, match="n_threads must be"):
        fastopt.Adam([ones(3)], n_threads=n_threads)
    with pytest.raises(error, match="n_threads must be"):
        fastopt.set_num_threads(n_threads)
    with pytest.raises(error, match="n_threads must be"):
        fastopt.functional.sgd(ones(3), ones(3), n_threads=n_threads)


def test_a_step_inside_a_step_of_another_thread_is_refused():
    n = 30_000_000
    optimizer = fastopt.Adam(np.zeros(n, F32), n_threads=1)
    g = np.zeros(n, F32)
    refused = []

    def run():
        for _ in range(2):
            try:
                optimizer.step(g)
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert int(optimizer.state[0]["step"]) + len(refused) == 4
    assert all("another step of this optimizer is under way" in text for text in refused)


# --- The functional form


@pytest.mark.parametrize("module", [fastopt.functional, fastopt.reference], ids=lambda m: m.__name__)
@pytest.mark.parametrize("bad", [*(b for b in BAD_ARRAYS if b != "float64"), "int64"])
@pytest.mark.parametrize("which", range(4), ids=["p", "g", "exp_avg", "exp_avg_sq"])
def test_functions_refuse_bad_arrays_before_anything_is_written(module, bad, which):
    make, error, message = BAD_ARRAYS.get(bad, (lambda: np.ones(4, np.int64), TypeError, "got int64"))
    arrays = [ones(4), ones(4), np.zeros(4, F32), np.zeros(4, F32)]
    arrays[which] = make()
    with pytest.raises(error, match=f"adam: .*({message})"):
        module.adam(*arrays)
    assert all(a.tolist() in ([1, 1, 1, 1], [0, 0, 0, 0]) for k, a in enumerate(arrays) if k != which)


@pytest.mark.parametrize("module", [fastopt.functional, fastopt.reference], ids=lambda m: m.__name__)
def test_functions_refuse_overlapping_arrays(module):
    p, room = ones(4), ones(6)
    with pytest.raises(ValueError, match="g and exp_avg overlap in memory"):
        module.adam(p, room[:4], room[2:], ones(4))


@pytest.mark.parametrize("module", [fastopt.functional, fastopt.reference], ids=lambda m: m.__name__)
@pytest.mark.parametrize(("step", "error"), [(0, ValueError), (-3, ValueError), (1.0, TypeError), (True, TypeError)])
def test_functions_refuse_a_bad_step(module, step, error):
    with pytest.raises(error, match="step must be"):
        module.sgd(ones(3), ones(3), step=step)


@pytest.mark.parametrize("module", [fastopt.functional, fastopt.reference], ids=lambda m: m.__name__)
def test_functions_refuse_a_state_that_would_be_ignored(module):
    with pytest.raises(ValueError, match="state 'momentum_buffer' is used only with momentum != 0, pass None"):
        module.sgd(ones(3), ones(3), ones(3))


@pytest.mark.parametrize("module", [fastopt.functional, fastopt.reference], ids=lambda m: m.__name__)
def test_functions_refuse_a_missing_state(module):
    with pytest.raises(TypeError, match="state 'max_exp_avg_sq' must be a NumPy array"):
        module.adam(ones(3), ones(3), ones(3), ones(3), amsgrad=True)


@pytest.mark.parametrize("module", [fastopt.functional, fastopt.reference], ids=lambda m: m.__name__)
def test_functions_refuse_mixed_dtypes(module):
    with pytest.raises(TypeError, match="must be float32"):
        module.adam(ones(3), ones(3), ones(3), np.ones(3))


def test_functional_refuses_float64_throughout():
    with pytest.raises(TypeError, match="p must be float32, got float64"):
        fastopt.functional.sgd(np.ones(3), np.ones(3))


# --- Backends


def test_an_unknown_backend_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="backend must be 'auto' or one of 'cpu', 'cuda', 'reference', got 'gpu'"):
        fastopt.Adam([ones(3)], backend="gpu")


def test_an_unknown_backend_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("FASTOPT_BACKEND", "tpu")
    with pytest.raises(ValueError, match="FASTOPT_BACKEND must be .* got 'tpu'"):
        fastopt.Adam([ones(3)])


def test_an_unavailable_instruction_set_is_refused_with_those_there_are(monkeypatch):
    monkeypatch.setenv("FASTOPT_ISA", "sse9")
    with pytest.raises(ValueError, match="FASTOPT_ISA must be one of baseline.*, got 'sse9'"):
        fastopt.Adam([ones(3)]).step([ones(3)])


# --- update()


def test_update_refuses_grads_with_other_names():
    with pytest.raises(ValueError, match="same names, .*b.*c.* differ"):
        fastopt.Adam().update({"a": ones(3), "b": ones(3)}, {"a": ones(3), "c": ones(3)})


def test_update_refuses_a_name_that_comes_back_with_another_shape():
    optimizer = fastopt.Adam()
    optimizer.update({"a": ones(3)}, {"a": ones(3)})
    with pytest.raises(ValueError, match=r"params\['a'\] must be float32 of shape \(3,\), got float32 of shape \(4,\)"):
        optimizer.update({"a": ones(4)}, {"a": ones(4)})


def test_update_refuses_lists():
    with pytest.raises(TypeError, match="params must be a dict of arrays, got list"):
        fastopt.Adam().update([ones(3)], [ones(3)])


def test_update_refuses_an_optimizer_made_with_a_list():
    with pytest.raises(TypeError, match="made with a sequence"):
        fastopt.Adam([ones(3)]).update({"a": ones(3)}, {"a": ones(3)})


# --- FlatBuffer


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ([1, 2], TypeError),
        ({1: 2}, TypeError),
        ({"a": 1.5}, TypeError),
        ({"a": -1}, ValueError),
        ({"a": 2**61}, ValueError),
        ({"a": np.ones(3)}, TypeError),
        ({"a": (2, "x")}, TypeError),
    ],
    ids=str,
)
def test_a_flat_buffer_refuses_what_is_no_tensor(tensors, error):
    with pytest.raises(error, match="FlatBuffer"):
        fastopt.FlatBuffer(tensors)


@pytest.mark.parametrize(
    ("name", "values", "error", "message"),
    [
        ("v", ones(3), KeyError, r"no 'v' to copy into, there are \['w'\]"),
        ("w", np.ones(3), TypeError, "'w' must be a float32 array, got float64"),
        ("w", ones(1), ValueError, r"'w' must be set to float32 of shape \(3,\), got float32 of shape \(1,\)"),
        ("w", 1.0, TypeError, r"'w' must be set to float32 of shape \(3,\), got float"),
        ("w", 3, TypeError, r"'w' must be set to float32 of shape \(3,\), got int"),
        ("w", [1.0, 2.0, 3.0], TypeError, r"'w' must be set to float32 of shape \(3,\), got list"),
    ],
)
def test_a_flat_buffer_refuses_values_that_do_not_fit_and_keeps_its_own(name, values, error, message):
    buffer = fastopt.FlatBuffer({"w": 3})
    with pytest.raises(error, match=f"FlatBuffer: {message}"):
        buffer[name] = values
    assert buffer.flat.tolist() == [0, 0, 0]


@pytest.mark.parametrize("grads", [[np.ones(3, F32)], (np.ones(3, F32),), {"w": np.ones(3, F32)}])
def test_the_gradient_of_one_array_comes_without_a_container(grads):
    p = np.zeros(3, F32)
    optimizer = fastopt.SGD(p, lr=1.0)
    with pytest.raises(TypeError, match=f"grads must be one array, as params is, got a {type(grads).__name__}"):
        optimizer.step(grads)
    assert not p.any()
