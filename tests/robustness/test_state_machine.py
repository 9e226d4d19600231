"""Whatever a user does with an optimizer, in any order, with failures between: it equals the model to the bit."""

import contextlib
import copy
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastopt import _formats, backends
from fastopt.rules import Switch
from tests.support.configs import CONFIGS, away
from tests.support.faults import interrupted
from tests.support.model import Model, lower_half

SHAPES = ((3,), (), (67,), (0,), (2, 5))
CHANGING = ("lr", "weight_decay", "l1", "maximize", "eps", "betas")
"""Hyperparameters that can change at any time: they add no state."""
OPTIONS = ("grad_scale", "max_norm", "clip_value", "skip_nonfinite", "zero_grads")

settled = precondition(lambda self: not self.model.n_accumulated)
pending = precondition(lambda self: self.model.n_accumulated > 0)
seeds = st.integers(0, 2**16)
option_sets = st.sets(st.sampled_from(OPTIONS))
faults = st.none() | st.tuples(st.sampled_from([KeyboardInterrupt, MemoryError]), st.integers(0, 6000))
"""What is raised, and before which bytecode; where there are fewer, nothing is."""


def bits(array):
    """An array as type, shape and bytes; bfloat16 as uint16, however it is called."""
    array = array.view(np.uint16) if array.dtype.itemsize == 2 else array
    return array.dtype.str, array.shape, array.tobytes()


class OptimizerMachine(RuleBasedStateMachine):
    """An optimizer and its model."""

    @initialize(
        config=st.sampled_from(CONFIGS),
        is_named=st.booleans(),
        state_dtype=st.sampled_from(_formats.STATE_DTYPES),
        ema=st.sampled_from([(None, False), (0.75, False), (0.75, True)]),
        copy_dtype=st.sampled_from([None, "float16", "bfloat16"]),
        master=st.sampled_from([None, None, "split"]),
        seed=seeds,
        n_params=st.integers(0, 3),
    )
    def construct(self, config, is_named, state_dtype, ema, copy_dtype, master, seed, n_params):
        self.config, self.is_named, self.master = config, is_named, master
        self.options = {"ema_decay": ema[0], "ema_warmup": ema[1], "copy_dtype": copy_dtype}
        self.options |= {"state_dtype": state_dtype, "seed": seed}
        self.model = Model(config.spec, config.hypers, **self.options, is_split=bool(master))
        self.arrays = {}
        """What the parameters are now; name (or position) -> array."""
        self.n_named = 0
        if not is_named:
            n_params = max(n_params, 1)
        if n_params == 0:
            self.optimizer = self.make(None)
            self.model.add_group({})
            return
        self.arrays = self.drawn(seed, n_params)
        self.model.add_group({name: self.values(array) for name, array in self.arrays.items()})
        self.optimizer = self.make(self.structured(self.arrays))

    def make(self, params, **others):
        options = {**self.options, "master": self.master, "grad_dtype": "bfloat16", "backend": "cpu", **others}
        return self.config.make(params, n_threads=1, **options)

    def drawn(self, seed, n):
        """New arrays with new names."""
        rng = np.random.default_rng(seed)
        arrays = {}
        for _ in range(n):
            values = np.array(rng.standard_normal(SHAPES[rng.integers(len(SHAPES))]), np.float32)
            if self.master:
                values = np.array(values.view(np.uint32) >> 16, np.uint16)
            arrays[f"p{self.n_named}" if self.is_named else self.n_named] = values
            self.n_named += 1
        return arrays

    @staticmethod
    def values(array):
        """A parameter's array as float32."""
        return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array

    def structured(self, arrays):
        return dict(arrays) if self.is_named else list(arrays.values())

    def gradients(self, seed, names, has_infinity=False):
        """A gradient of some type for each name, or None."""
        rng, grads = np.random.default_rng(seed), {}
        for name in names:
            g = np.array(rng.standard_normal(self.arrays[name].shape) * (rng.random() < 0.9), np.float32)
            if has_infinity and g.size and rng.random() < 0.5:
                g.ravel()[0] = np.inf
            kind = rng.integers(6)
            grads[name] = [g, g, g, g.astype(np.float16), np.array(g.view(np.uint32) >> 16, np.uint16), None][kind]
        return grads

    def do(self, operation, after, fault):
        """Run `operation`, which makes the model `after`; with a fault, either that or nothing must have happened."""
        if fault is None:
            operation()
            self.model = after
            return True
        error, at = fault
        interrupted(operation, at, error)
        if self.found() == self.expected(after):
            self.model = after
            return True
        return False

    # --- Rules

    @settled
    @rule(seed=seeds, options=option_sets, fault=faults)
    def step(self, seed, options, fault):
        if not self.arrays:
            return
        grads = self.gradients(seed, self.arrays, "skip_nonfinite" in options)
        self.step_with(grads, options, fault, lambda given: self.optimizer.step(self.structured(grads), **given))

    @staticmethod
    def given(options):
        """These options of a step, with values."""
        values = {"grad_scale": 0.5, "max_norm": 1.0, "clip_value": 0.25, "skip_nonfinite": True, "zero_grads": True}
        return {name: value for name, value in values.items() if name in options}

    def step_with(self, grads, options, fault, operation, before=None):
        """Step with `operation`; `before` changes the model first."""
        given = self.given(options)
        after = self.model.clone()
        if before is not None:
            before(after)
        zeroes = given.pop("zero_grads", False)
        expected = after.step(grads, **given)
        found = []
        untouched = {name: g.tobytes() for name, g in grads.items() if g is not None}
        was_done = self.do(lambda: found.append(operation({**given, "zero_grads": zeroes})), after, fault)
        if found:
            assert (found[0].applied, found[0].grad_norm) == expected
        for name, g in grads.items():
            if g is None:
                continue
            is_zero = not g.view(np.uint8 if g.shape else g.dtype).any()
            if fault is None:
                assert is_zero if zeroes else g.tobytes() == untouched[name]
            else:
                assert is_zero or g.tobytes() == untouched[name]
        return was_done

    @rule(seed=seeds, fault=faults)
    def accumulate(self, seed, fault):
        if not self.arrays:
            return
        grads, after = self.gradients(seed, self.arrays), self.model.clone()
        after.accumulate(grads)
        self.do(lambda: self.optimizer.accumulate(self.structured(grads)), after, fault)

    @pending
    @rule(options=option_sets, fault=faults)
    def step_with_the_sums(self, options, fault):
        given, after, found = self.given(options), self.model.clone(), []
        expected = after.step_accumulated(**{name: value for name, value in given.items() if name != "zero_grads"})
        self.do(lambda: found.append(self.optimizer.step(**given)), after, fault)
        if found:
            assert (found[0].applied, found[0].grad_norm) == expected

    @pending
    @rule(seed=seeds)
    def be_refused_what_would_lose_the_sums(self, seed):
        arrays, grads = {"another": np.ones(3, np.float32)}, self.gradients(seed, self.arrays)
        calls = [
            lambda: self.optimizer.step(self.structured(grads)),
            lambda: self.optimizer.add_param_group({"params": self.structured(arrays)}),
            lambda: self.optimizer.load_state_dict({}),
            self.optimizer.state_dict,
            lambda: copy.deepcopy(self.optimizer),
        ]
        for call in calls:
            with pytest.raises(RuntimeError, match="accumulated"):
                call()

    @pending
    @rule(fault=faults)
    def discard_the_sums(self, fault):
        after = self.model.clone()
        after.discard()
        self.do(self.optimizer.discard_accumulated, after, fault)

    @rule(group=st.integers(0, 3), name=st.sampled_from(CHANGING), is_away=st.booleans())
    def change_a_hyperparameter(self, group, name, is_away):
        group %= len(self.model.groups)
        hyper = self.config.spec.hypers.get(name)
        if hyper is None:
            return
        value = away(hyper.kind, hyper.default) if is_away else hyper.default
        if isinstance(hyper.kind, Switch):
            value = is_away
        self.optimizer.param_groups[group][name] = value
        self.model.groups[group] = self.config.spec.check({**self.model.groups[group], name: value})

    @settled
    @precondition(lambda self: len(self.model.groups) < 4)
    @rule(seed=seeds, n=st.integers(1, 2), lr=st.sampled_from([0.5, 0.125]), fault=faults)
    def add_a_group(self, seed, n, lr, fault):
        arrays = self.drawn(seed, n)
        waiting = list(self.model.awaited)
        if waiting and seed % 2:
            arrays = self.like(waiting[:n], seed)
        if not self.arrays and not self.is_named:
            return
        after = self.model.clone()
        after.add_group({name: self.values(array) for name, array in arrays.items()}, lr=lr)
        group = {"params": self.structured(arrays), "lr": lr}
        if self.do(lambda: self.optimizer.add_param_group(group), after, fault):
            self.arrays |= arrays
        elif not self.is_named:
            self.n_named -= len(arrays)

    def like(self, names, seed):
        """New arrays for `names` that have been seen, or wait."""
        rng, arrays = np.random.default_rng(seed), {}
        for name in names:
            known = self.model.parameters.get(name) or self.model.awaited[name]
            arrays[name] = np.array(rng.standard_normal(known.shape), np.float32)
            if self.master:
                arrays[name] = np.array(arrays[name].view(np.uint32) >> 16, np.uint16)
        return arrays

    @settled
    @precondition(lambda self: self.is_named)
    @rule(
        seed=seeds,
        n_new=st.integers(0, 2),
        chosen=st.sets(st.integers(0, 7), max_size=3),
        moves=st.booleans(),
        options=option_sets,
        fault=faults,
    )
    def update(self, seed, n_new, chosen, moves, options, fault):
        known = [name for k, name in enumerate(self.arrays) if k in chosen]
        if not self.arrays:
            n_new = max(n_new, 1)
        params = {name: self.arrays[name] for name in known}
        moved = self.like(known[:1], seed) if moves and not self.master else {}
        new = self.drawn(seed, n_new) | self.like(list(self.model.awaited)[: seed % 3], seed)
        params |= moved | new
        if len(self.arrays) + len(new) > 8:
            return
        before, self.arrays = self.arrays, {**self.arrays, **moved, **new}
        grads = self.gradients(seed, params, "skip_nonfinite" in options)

        def rebind(model):
            for name, array in moved.items():
                model.move(name, array)
            model.add({name: self.values(array) for name, array in new.items()}, 0)

        def update(given):
            return self.optimizer.update(dict(params), grads, **given)

        was_done = self.step_with(grads, options, fault, update, rebind)
        if not was_done or not self.by_name(self.optimizer.param_groups).keys() >= moved.keys():
            self.arrays = before  # an update that moves empty arrays alone changes nothing the model could tell

    @precondition(lambda self: self.options["ema_decay"] is not None)
    @rule(fault=faults, raises=st.booleans())
    def swap(self, fault, raises):
        after = self.model.clone()
        after.refresh()

        def look():
            with self.optimizer.swap_ema():
                shown = self.optimizer.master_params if self.master else self.by_name(self.optimizer.param_groups)
                shown = shown if isinstance(shown, dict) else dict(enumerate(shown))
                for name, one in self.model.parameters.items():
                    assert bits(shown[name].ravel()) == bits(one.ema)
                if raises:
                    raise ZeroDivisionError

        def swap():
            with contextlib.suppress(ZeroDivisionError):
                look()

        self.do(swap, after, fault)

    def by_name(self, groups):
        """The arrays in the param groups that are known, by name."""
        arrays = [array for group in groups for array in group["params"]]
        own = {id(array): name for name, array in self.arrays.items()}
        return {own[id(array)]: array for array in arrays if id(array) in own}

    @precondition(lambda self: self.master is None)
    @rule(seed=seeds)
    def write_a_parameter(self, seed):
        for name, array in list(self.arrays.items())[: seed % 3]:
            array[...] = np.float32(seed % 7 - 3)
            self.model.parameters[name].p[...] = np.float32(seed % 7 - 3)

    @precondition(lambda self: self.master is not None)
    @rule(seed=seeds, fault=faults)
    def load_master_params(self, seed, fault):
        rng, after = np.random.default_rng(seed), self.model.clone()
        values = {}
        for name, one in after.parameters.items():
            values[name] = np.array(rng.standard_normal(one.shape), np.float32)
            one.p = values[name].ravel().copy()
        self.do(lambda: self.optimizer.load_master_params(self.structured(values)), after, fault)

    @precondition(lambda self: self.options["copy_dtype"] is not None)
    @rule(fault=faults)
    def refresh_the_copies(self, fault):
        after = self.model.clone()
        after.refresh()
        self.do(self.optimizer.refresh_params_copy, after, fault)

    @rule(value=st.integers(-3, 3))
    def write_a_state_and_an_average(self, value):
        state = self.optimizer.state
        for name, one in list(self.model.parameters.items())[:1]:
            state[name]["step"][...] = one.step = one.step + 1
            if self.model.state_dtype == "float32":
                for kept, (codes, _) in one.kept.items():
                    state[name][kept][...] = codes[...] = abs(value) / 4  # such as may be
            if one.ema is not None:
                self.optimizer.ema[name][...] = one.ema[...] = value

    @rule(n_threads=st.sampled_from([None, 1, 2, 3]), is_parallel=st.booleans())
    def change_the_threads(self, n_threads, is_parallel):
        self.optimizer.n_threads = n_threads
        backends.engine().set_serial_below(0 if is_parallel else 32768)

    @settled
    @rule(fault=faults, seed=seeds)
    def load_a_later_state_dict(self, fault, seed):
        """Of a copy that went on."""
        if not self.arrays:
            return
        other = copy.deepcopy(self.optimizer)
        after = self.model.clone()
        grads = self.gradients(seed, self.arrays)
        other.step(self.structured(grads))
        after.step(grads)
        for name, one in after.parameters.items():
            one.p = self.model.parameters[name].p.copy()
        if self.master:  # lower halves are loaded, upper ones are the user's
            stepped = other.master_params if self.is_named else dict(enumerate(other.master_params))
            for name, one in after.parameters.items():
                one.p = _formats.join(self.arrays[name].ravel(), lower_half(stepped[name].ravel()))
        after.refresh()
        saved = other.state_dict()
        before = pickle.dumps(saved)
        self.do(lambda: self.optimizer.load_state_dict(saved), after, fault)
        assert pickle.dumps(saved) == before

    @settled
    @rule(state_dtype=st.sampled_from(_formats.STATE_DTYPES), fault=faults)
    def convert_the_state(self, state_dtype, fault):
        """Another optimizer of the same parameters loads the state dict."""
        if not self.arrays or self.model.awaited:
            return
        saved = self.optimizer.state_dict()
        after = self.model.converted(state_dtype)
        groups = []
        for k in range(len(after.groups)):
            members = {name: self.arrays[name] for name, one in after.parameters.items() if one.group == k}
            groups.append({"params": self.structured(members), **after.groups[k]})
        if not all(group["params"] for group in groups):
            return
        after.parameters = {n: one for k in range(len(groups)) for n, one in after.parameters.items() if one.group == k}
        names = list(after.parameters)
        if not self.is_named:
            assert names == sorted(names)
        other = self.make(groups, state_dtype=state_dtype)
        if not self.do_with(other, lambda: other.load_state_dict(saved), after, fault):
            other.load_state_dict(saved)
            self.model = after
        self.optimizer, self.options["state_dtype"] = other, state_dtype
        self.arrays = {name: self.arrays[name] for name in names}

    def do_with(self, other, operation, after, fault):
        """`do` for an optimizer that takes the place of this one's; its state before is not the model's."""
        if fault is None:
            operation()
        else:
            interrupted(operation, fault[1], fault[0])
        was_done = self.found_of(other) == self.expected(after)
        if was_done:
            self.model = after
        return was_done or fault is None

    @settled
    @precondition(lambda self: self.is_named and len(self.model.groups) == 1)
    @rule()
    def forget_the_parameters(self):
        """Another optimizer loads the state dict before it has seen a parameter."""
        saved = self.optimizer.state_dict()
        self.optimizer = self.make(None)
        self.optimizer.load_state_dict(saved)
        for kept in saved["state"].values():
            for value in kept.values():
                if isinstance(value, np.ndarray):
                    value[...] = 1
        self.model = self.model.forgotten()
        self.arrays = {}

    @settled
    @rule(through=st.sampled_from([copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))]))
    def copy_everything(self, through):
        self.optimizer, self.arrays = through((self.optimizer, self.arrays))
        self.model.refresh()

    # --- What must hold

    @invariant()
    def is_the_model(self):
        if not hasattr(self, "optimizer"):
            return
        found, expected = self.found(), self.expected(self.model)
        assert found == expected, [key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)]

    def found(self):
        return self.found_of(self.optimizer)

    def found_of(self, optimizer):
        """Everything of the optimizer that the model knows."""
        state, found = optimizer.state, {"groups": []}
        names = list(state if self.is_named else range(len(state)))
        for k, name in enumerate(names):
            one = state[name] if self.is_named else state[k]
            found[name, "state"] = {
                kept: array.item() if kept in ("step", *self.config.spec.running) else bits(array)
                for kept, array in one.items()
            }
        for group in optimizer.param_groups:
            found["groups"].append({key: value for key, value in group.items() if key != "params"})
        kept = {
            "p": optimizer.master_params if self.master else [a for g in optimizer.param_groups for a in g["params"]]
        }
        if optimizer.ema_decay is not None:
            kept["ema"] = optimizer.ema
        if optimizer.copy_dtype is not None:
            kept["copy"] = optimizer.params_copy
        order = self.in_groups(optimizer) if self.is_named else names
        for what, arrays in kept.items():
            named = arrays if isinstance(arrays, dict) else dict(zip(order, arrays, strict=True))
            for name, array in named.items():
                found[name, what] = bits(array)
        found["n_accumulated"] = optimizer.n_accumulated
        if not optimizer.n_accumulated:
            saved = optimizer.state_dict()
            found["names"] = sorted(n for group in saved["param_groups"] for n in group.get("param_names", ()))
            found["offsets"] = [saved["offsets"][k] for k in range(len(names))]
        return found

    def in_groups(self, optimizer):
        """Names in the order of the param groups."""
        if optimizer.n_accumulated:  # then none can have been added
            return sorted(self.model.parameters, key=lambda name: self.model.parameters[name].group)
        groups = optimizer.state_dict()["param_groups"]
        names = [name for group in groups for name in group["param_names"]]
        return [name for name in names if name in optimizer.state]

    def expected(self, model):
        """The same of the model."""
        found = {"groups": [dict(values) for values in model.groups]}
        for name, one in model.parameters.items():
            state = {"step": one.step, **{kept: float(value) for kept, value in one.running.items()}}
            for kept, (codes, scales) in one.kept.items():
                state[kept] = bits(codes.reshape(one.shape))
                if model.codec(kept).has_scales:
                    state[f"{kept}_scale"] = bits(scales)
            found[name, "state"] = state
            found[name, "p"] = bits(one.p.reshape(one.shape))
            if one.ema is not None:
                found[name, "ema"] = bits(one.ema.reshape(one.shape))
            if one.copy is not None:
                found[name, "copy"] = bits(one.copy.reshape(one.shape))
        found["n_accumulated"] = model.n_accumulated
        if not model.n_accumulated:
            found["names"] = sorted([*model.parameters, *model.awaited]) if self.is_named else []
            found["offsets"] = [one.index for one in model.parameters.values()]
        return found

    def teardown(self):
        backends.engine().set_serial_below(32768)


class LongMachine(OptimizerMachine):
    """The same, for many more examples."""


TestOptimizer = OptimizerMachine.TestCase
TestOptimizer.settings = settings(max_examples=200, stateful_step_count=15, deadline=None)
TestOptimizerAtLength = pytest.mark.exhaustive(LongMachine.TestCase)
TestOptimizerAtLength.settings = settings(
    max_examples=10_000,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,  # the same examples every time; the first tier draws new ones
    suppress_health_check=list(HealthCheck),
)
