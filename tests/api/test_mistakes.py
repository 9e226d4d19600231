"""What is easily mistyped or misunderstood in the first hour is refused with the word that mends it."""

import numpy as np
import pytest

import fastopt

F32 = np.float32


def ones(*shape):
    return np.ones(shape, F32)


# --- Attributes


def test_a_hyperparameter_set_as_an_attribute_is_refused_with_the_place_where_it_is_set():
    optimizer = fastopt.Adam([ones(3)])
    with pytest.raises(
        AttributeError, match=r"Adam: lr is a value of each param group: set opt.param_groups\[0\]\['lr'\]"
    ):
        optimizer.lr = 0.1


def test_a_misspelt_attribute_is_refused_with_the_nearest_word():
    optimizer = fastopt.Adam([ones(3)])
    with pytest.raises(AttributeError, match="no attribute 'n_treads' to set; did you mean 'n_threads'"):
        optimizer.n_treads = 3


def test_an_option_set_after_construction_is_refused():
    optimizer = fastopt.Adam([ones(3)])
    with pytest.raises(AttributeError, match=r"Adam: ema_decay is chosen at construction: Adam\(..., ema_decay=...\)"):
        optimizer.ema_decay = 0.9


def test_words_of_the_rule_language_cannot_be_set_on_an_optimizer():
    optimizer = fastopt.Adam([ones(3)])
    with pytest.raises(AttributeError, match="no attribute 'rule' to set"):
        optimizer.rule = None


def test_a_users_subclass_may_have_attributes_of_its_own():
    class Counting(fastopt.Adam):
        def __init__(self, params):
            super().__init__(params)
            self.steps = 0
            self.history = []

    assert Counting([ones(3)]).history == []


def test_a_users_subclass_cannot_misspell_a_word_either():
    class Own(fastopt.Adam):
        pass

    optimizer = Own([ones(3)])
    with pytest.raises(AttributeError, match="did you mean 'n_threads'"):
        optimizer.n_treads = 3
    with pytest.raises(AttributeError, match="Own: lr is a value of each param group"):
        optimizer.lr = 0.1


def test_a_method_can_be_wrapped_as_learning_rate_schedulers_do():
    optimizer = fastopt.SGD([p := ones(3)], lr=1.0)
    step, calls = optimizer.step, []
    optimizer.step = lambda grads: (calls.append(1), step(grads))
    optimizer.step([ones(3)])
    assert (calls, p.tolist()) == ([1], [0, 0, 0])


# --- Arguments


def test_a_misspelt_option_is_answered_with_every_word_and_the_nearest():
    with pytest.raises(TypeError, match=r"unknown arguments \['ema_decy'\]; did you mean 'ema_decay'\?") as raised:
        fastopt.AdamW([ones(3)], ema_decy=0.9)
    listed = str(raised.value).split("; ", 2)[2]
    known = [
        *fastopt.AdamW([ones(3)]).defaults,
        "n_threads",
        "backend",
        "ema_decay",
        "copy_dtype",
        "state_dtype",
        "master",
    ]
    assert [word for word in known if word not in listed] == []


@pytest.mark.parametrize(("wrong", "right"), [("learning_rate", "lr"), ("beta", "betas"), ("epsilon", "eps")])
def test_what_others_call_a_hyperparameter_is_answered_with_its_name_here(wrong, right):
    with pytest.raises(TypeError, match=f"did you mean '{right}'"):
        fastopt.Adam([ones(3)], **{wrong: 0.1})


def test_an_option_of_step_given_to_the_constructor_is_said_to_be_one():
    with pytest.raises(TypeError, match=r"max_norm is an option of step\(\)"):
        fastopt.Adam([ones(3)], max_norm=1.0)


def test_a_misspelt_hyperparameter_of_a_group_is_answered_with_the_nearest_word():
    with pytest.raises(TypeError, match=r"unknown hyperparameters \['weightdecay'\].*did you mean 'weight_decay'"):
        fastopt.Adam([{"params": [ones(3)], "weightdecay": 0.1}])


def test_a_misspelt_key_of_a_group_is_answered_with_the_nearest_word_at_the_next_step():
    optimizer = fastopt.Adam([ones(3)])
    optimizer.param_groups[0]["weightdecay"] = 0.1
    with pytest.raises(ValueError, match=r"unknown \['weightdecay'\]; did you mean 'weight_decay'"):
        optimizer.step([ones(3)])


# --- Arrays


class Frame:
    """What is an array only on request, as a DataFrame is, whose iterator gives the names of columns."""

    def __array__(self, dtype=None, copy=None):
        return np.ones((2, 2))

    def __iter__(self):
        return iter(["a", "b"])


KEEP = "keep that copy, it is what is updated"
PARAMETERS = {
    "pairs with names": ([("w", ones(3))], r"params\[0\] .* got tuple; .*dict\(pairs\) makes one"),
    "a data frame": (Frame(), r"params must be .* got .*Frame; np.array\(..., np.float32\) makes one"),
    "a list of data frames": ([Frame()], rf"params\[0\] .* np.array\(..., np.float32\) makes one: {KEEP}"),
    "a list of numbers": ([0.5, 1.5], rf"params\[0\] .* got float; np.array\(..., np.float32\) makes one: {KEEP}"),
    "float64": ([np.ones(3)], rf"got float64 of shape \(3,\); .astype\(np.float32\) converts: {KEEP}"),
    "strided": ([ones(6)[::2]], rf"fastopt makes no copies, np.ascontiguousarray does: {KEEP}"),
}


@pytest.mark.parametrize("params", PARAMETERS)
def test_parameters_that_are_refused_come_with_what_mends_them(params):
    value, message = PARAMETERS[params]
    with pytest.raises((TypeError, ValueError), match=f"Adam: .*{message}"):
        fastopt.Adam(value)


GRADIENTS = {
    "a data frame": (Frame(), r"got .*Frame; np.array\(..., np.float32\) makes one$"),
    "a list of numbers": ([1.0, 1.0, 1.0], r"got list; np.array\(..., np.float32\) makes one$"),
    "float64": (np.ones(3), r"got float64 of shape \(3,\); .astype\(np.float32\) converts$"),
    "strided": (ones(6)[::2], "fastopt makes no copies, np.ascontiguousarray does$"),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_that_are_refused_come_with_what_mends_them(gradient):
    value, message = GRADIENTS[gradient]
    with pytest.raises((TypeError, ValueError), match=rf"Adam: grads\[0\] .*{message}"):
        fastopt.Adam([ones(3)]).step([value])


def test_a_missing_state_comes_with_what_makes_it():
    with pytest.raises(
        TypeError, match=r"adam: state 'exp_avg_sq' must be a NumPy array, got None; .* np.zeros_like\(p\) makes it"
    ):
        fastopt.functional.adam(ones(3), ones(3), ones(3), None)
    with pytest.raises(TypeError, match=r"rprop: state 'step_size' .* np.full_like\(p, 0.5\)"):
        fastopt.functional.rprop(ones(3), ones(3), ones(3), None, lr=0.5)


# --- Names that are bound to other arrays


def test_a_dict_that_got_another_array_before_the_first_step_is_refused():
    params = {"w": ones(3), "b": ones(1)}
    optimizer = fastopt.SGD(params, lr=1.0)
    old, params["w"] = params["w"], np.zeros(3, F32)
    with pytest.raises(ValueError, match=r"SGD: params\['w'\] is another array than .* params\['w'\]\[...\] = values"):
        optimizer.step({"w": ones(3), "b": ones(1)})
    assert old.tolist() == [1, 1, 1]
    params["w"] = old
    optimizer.step({"w": ones(3), "b": ones(1)})
    assert old.tolist() == [0, 0, 0]


def test_update_follows_a_name_to_another_array():
    params = {"w": ones(3)}
    optimizer = fastopt.SGD(params, lr=1.0)
    params["w"] = ones(3)
    optimizer.update(params, {"w": ones(3)})
    assert params["w"].tolist() == [0, 0, 0]


# --- Scalars


def test_what_mean_returns_is_a_gradient_of_a_parameter_of_shape_empty():
    params = {"b": np.zeros((), F32)}
    optimizer = fastopt.SGD(params, lr=1.0)
    optimizer.step({"b": np.array([1, 2, 3], F32).mean()})
    assert params["b"] == -2
    optimizer.step({"b": np.float16(0.5)}, max_norm=float("inf"))
    assert params["b"] == -2.5


@pytest.mark.parametrize("module", [fastopt.functional, fastopt.reference], ids=lambda module: module.__name__)
def test_functions_take_a_scalar_gradient_too(module):
    p = np.zeros((), F32)
    module.sgd(p, np.array([1, 2, 3], F32).mean(), lr=1.0)
    assert p == -2


def test_a_scalar_cannot_be_zeroed():
    with pytest.raises(ValueError, match=r"grads\['b'\] must be writable for zero_grads"):
        fastopt.SGD({"b": np.zeros((), F32)}).step({"b": F32(1)}, zero_grads=True)


def test_a_scalar_of_float64_is_refused():
    with pytest.raises(TypeError, match=r"grads\['b'\] must be float32 .* got float64"):
        fastopt.SGD({"b": np.zeros((), F32)}).step({"b": np.float64(1)})
