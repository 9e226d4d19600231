"""Optimizers in the middle of their training, whatever changes one, and everything that can be seen of it.

For the tests that let such a change fail halfway; the faults themselves are in `faults`.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

import fastopt

SHAPES = [(70,), (), (3,), (2, 5)]


@dataclass
class Scene:
    """An optimizer, and the arrays that it trains or will train; the same for the same kind and backend."""

    make: Callable
    """Makes the optimizer from parameters; takes options that differ."""
    structure: str
    """What it is made from: "single", "sequence", "mapping" or "groups" (two, of names)."""
    arrays: dict
    """All arrays that may be written, by name."""
    optimizer: fastopt.Optimizer | None = None
    given: dict = field(default_factory=dict)
    """What an operation is given beside the arrays: state dicts, values."""

    def params(self, names):
        """The arrays called `names`, in the structure of the optimizer."""
        if self.structure == "single":
            return self.arrays[names[0]]
        if self.structure == "sequence":
            return [self.arrays[name] for name in names]
        if self.structure == "mapping":
            return {name: self.arrays[name] for name in names}
        return [
            {"params": {names[0]: self.arrays[names[0]]}, "lr": 0.25},
            {"params": {names[1]: self.arrays[names[1]]}},
        ]

    def gradients(self, seed):
        """A gradient for each parameter that the optimizer has now; the second one is None in odd rounds."""
        rng = np.random.default_rng(seed)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        drawn = [np.array(rng.standard_normal(p.shape), np.float32) for p in params]
        if isinstance(self.optimizer.state, dict):  # names of all groups come in the order of the parameters
            return dict(zip(self.optimizer.state, drawn, strict=True))
        if seed % 2 and len(drawn) > 1:
            drawn[1] = None
        return drawn if self.structure != "single" or len(drawn) > 1 else drawn[0]

    def step(self, seed, **options):
        self.optimizer.step(self.gradients(seed), **options)


def _kinds():
    from fastopt import ASGD, LAMB, Adam, AdamW, NAdam

    tail = {"ema_decay": 0.75, "copy_dtype": "float16"}
    return {
        "lamb": (LAMB, "sequence", {"weight_decay": 0.1}, tail),
        "adam-8bit": (Adam, "mapping", {"amsgrad": True}, {"state_dtype": "8bit", "ema_decay": 0.5}),
        "adamw-split": (
            AdamW,
            "sequence",
            {},
            {"state_dtype": "bfloat16", "master": "split", "ema_decay": 0.9, "copy_dtype": "bfloat16"},
        ),
        "nadam": (NAdam, "groups", {"weight_decay": 0.1}, {"ema_decay": 0.5}),
        "asgd": (ASGD, "single", {}, {"copy_dtype": "bfloat16"}),
    }


KINDS = _kinds()


def scene(kind, backend, n_steps=1, with_params=True):
    """A scene after `n_steps` steps; without parameters the optimizer waits for `update`."""
    cls, structure, hypers, options = KINDS[kind]
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in zip("abcdefgh", SHAPES * 2, strict=True):
        values = np.array(rng.standard_normal(shape), np.float32)
        if options.get("master"):
            values = np.array(values.view(np.uint32) >> 16, np.uint16)
        arrays[name] = values

    def make(params, **others):
        return cls(params, lr=0.5, **hypers, **{"backend": backend, "n_threads": 1, **options, **others})

    made = Scene(make, structure, arrays)
    if with_params:
        made.optimizer = make(made.params("a" if structure == "single" else "ab"))
        for seed in range(n_steps):
            made.step(seed)
    else:
        made.optimizer = make(None)
    return made


# --- What can be seen


def frozen(value):
    """`value` with all its arrays as bytes, so that == compares everything."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return type(value).__name__, tuple((key, frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(frozen, value))
    return type(value).__name__, value


def seen(scene):
    """Everything that can be seen of a scene: its arrays, and what the optimizer keeps and shows."""
    found = {"arrays": frozen(scene.arrays), "given": frozen(scene.given)}
    optimizer = scene.optimizer
    if optimizer is None:
        return found
    names = {id(array): name for name, array in scene.arrays.items()}
    for k, group in enumerate(optimizer.param_groups):
        members = [names.get(id(array), "another array") for array in group["params"]]
        found[f"group {k}"] = members, {key: value for key, value in group.items() if key != "params"}
    found["state_dict"] = frozen(optimizer.state_dict())
    found["state"] = frozen(optimizer.state)
    found["n_threads"] = optimizer.n_threads
    for kept, option in (("ema", "ema_decay"), ("params_copy", "copy_dtype"), ("master_params", "master")):
        if getattr(optimizer, option) is not None:
            found[kept] = frozen(getattr(optimizer, kept))
    return found


def differences(found, expected):
    """Which of the things seen differ, for a message."""
    return sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))


# --- What changes an optimizer


def _construction(kind, backend):
    made = scene(kind, backend, 0, with_params=False)
    made.optimizer = None

    def construct(scene):
        scene.optimizer = scene.make(scene.params("a" if scene.structure == "single" else "ab"))

    return made, construct


def _added_group(kind, backend):
    def add(scene):
        arrays = [scene.arrays["c"], scene.arrays["d"]]
        if scene.structure in ("mapping", "groups"):
            arrays = dict(zip("cd", arrays, strict=True))
        scene.optimizer.add_param_group({"params": arrays, "lr": 0.125, "initial_lr": 0.5})

    return scene(kind, backend), add


def _loaded(saved_from):
    """Loading what `saved_from` makes of a scene that went on for some steps."""

    def operation(kind, backend):
        made, further = scene(kind, backend), scene(kind, backend, 5)
        further.optimizer.param_groups[0]["lr"] = 0.375
        made.given["state_dict"] = saved_from(further, kind, backend)
        return made, lambda scene: scene.optimizer.load_state_dict(scene.given["state_dict"])

    return operation


def _own_state_dict(further, kind, backend):
    return further.optimizer.state_dict()


def _converted_state_dict(further, kind, backend):
    """With states in another type than the optimizer keeps."""
    is_plain = further.optimizer.state_dtype == "float32"
    other = scene(kind, backend, 0)
    params = other.params("a" if other.structure == "single" else "ab")
    other.optimizer = other.make(params, state_dtype="bfloat16" if is_plain else "float32")
    other.step(7)
    return other.optimizer.state_dict()


def _torchs_state_dict(further, kind, backend):
    """In the form of torch's optimizers, whose states are float32."""
    saved = _converted_state_dict(further, kind, backend)
    if saved["state_dtype"] != "float32":
        saved = further.optimizer.state_dict()
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in saved["param_groups"]]
    return {"state": saved["state"], "param_groups": groups}


def _awaiting(kind, backend):
    """An optimizer that has seen no parameter and takes a state dict."""
    made, further = scene(kind, backend, with_params=False), scene(kind, backend, 5)
    made.given["state_dict"] = further.optimizer.state_dict()
    return made, lambda scene: scene.optimizer.load_state_dict(scene.given["state_dict"])


def _update(before, after, **options):
    """`update` with the parameters `after` of an optimizer that has seen `before`: name -> name of its array."""

    def operation(kind, backend):
        made = scene(kind, backend, with_params=False)
        arrays = made.arrays
        if before:
            params = {name: arrays[array] for name, array in before.items()}
            made.optimizer.update(params, {name: _ones(p) for name, p in params.items()})

        def update(scene):
            params = {name: scene.arrays[array] for name, array in after.items()}
            grads = {name: scene.arrays[f"gradient {name}"] for name in params}
            scene.optimizer.update(params, grads, **options)

        for name, array in after.items():
            made.arrays[f"gradient {name}"] = _ones(arrays[array])
        return made, update

    return operation


def _ones(p):
    return np.ones(p.shape, np.float32)


def _update_of_awaited(kind, backend):
    made, operate = _awaiting(kind, backend)
    operate(made)

    def update(scene):
        params = {name: scene.arrays[name] for name in "ab"}
        scene.optimizer.update(params, {name: _ones(p) for name, p in params.items()})

    return made, update


def _group_of_awaited(kind, backend):
    made, operate = _awaiting(kind, backend)
    operate(made)
    return made, lambda scene: scene.optimizer.add_param_group({"params": {"b": scene.arrays["b"]}})


def _step(n_steps=1, **options):
    def operation(kind, backend):
        made = scene(kind, backend, n_steps)
        drawn = made.gradients(6)
        named = drawn if isinstance(drawn, dict) else dict(enumerate(drawn if isinstance(drawn, list) else [drawn]))
        made.arrays |= {f"gradient {name}": g for name, g in named.items()}

        def step(scene):
            scene.optimizer.param_groups[0]["lr"] = 0.25
            scene.optimizer.step(drawn, **options)

        made.optimizer.param_groups[0]["lr"] = 0.25
        return made, step

    return operation


def _step_at_another_rate(kind, backend):
    """With a learning rate that counts for this step alone."""
    made, usual, another = scene(kind, backend), 0.5, 0.125
    made.optimizer.param_groups[0]["lr"] = usual
    made.step(5)
    grads = made.gradients(6)

    def step(scene):
        group = scene.optimizer.param_groups[0]
        group["lr"] = another
        try:
            scene.optimizer.step(grads)
        finally:
            group["lr"] = usual

    return made, step


def _refused_update(kind, backend):
    """New names, another array for a known one, and at the end a gradient that does not fit."""
    made, _ = _update({"x": "a", "y": "b"}, {})(kind, backend)

    def update(scene):
        params = {name: scene.arrays[array] for name, array in {"x": "e", "z": "c", "y": "b"}.items()}
        grads = {name: _ones(p) for name, p in params.items()} | {"y": np.ones(7, np.float32)}
        with contextlib.suppress(ValueError):
            scene.optimizer.update(params, grads)

    return made, update


def _swap(kind, backend):
    def swap(scene):
        with scene.optimizer.swap_ema():
            pass

    return scene(kind, backend), swap


def _swap_with_an_error(kind, backend):
    def swap(scene):
        try:
            with scene.optimizer.swap_ema():
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass

    return scene(kind, backend), swap


def _master_params(kind, backend):
    made = scene(kind, backend)
    made.given["values"] = [np.full(p.shape, np.float32(np.pi)) for p in made.optimizer.param_groups[0]["params"]]
    return made, lambda scene: scene.optimizer.load_master_params(scene.given["values"])


def _refreshed_copy(kind, backend):
    made = scene(kind, backend)
    for p in made.optimizer.param_groups[0]["params"]:
        p[...] = 2
    return made, lambda scene: scene.optimizer.refresh_params_copy()


def _looked_at(kind, backend):
    def look(scene):
        scene.optimizer.state_dict()
        repr(scene.optimizer)

    return scene(kind, backend), look


_EVERY_OPTION = {"grad_scale": 0.5, "max_norm": 1.0, "clip_value": 0.25, "skip_nonfinite": True, "zero_grads": True}

OPERATIONS = {
    "construction": (_construction, ("lamb", "adam-8bit", "adamw-split", "nadam", "asgd")),
    "add_param_group": (_added_group, ("lamb", "adam-8bit", "adamw-split", "nadam", "asgd")),
    "load_state_dict": (_loaded(_own_state_dict), ("lamb", "adam-8bit", "adamw-split", "nadam")),
    "load_state_dict, converted": (_loaded(_converted_state_dict), ("adam-8bit", "adamw-split")),
    "load_state_dict, torch's": (_loaded(_torchs_state_dict), ("lamb", "nadam")),
    "load_state_dict, awaiting names": (_awaiting, ("adam-8bit",)),
    "update, first": (_update({}, {"x": "a", "y": "b"}), ("adamw-split", "nadam")),
    "update, new name": (_update({"x": "a", "y": "b"}, {"x": "a", "z": "c"}), ("lamb", "adam-8bit")),
    "update, moved array": (_update({"x": "a", "y": "b"}, {"x": "e", "y": "b"}), ("nadam",)),
    "update, moved and new": (
        _update({"x": "a", "y": "b"}, {"y": "f", "z": "c", "x": "a"}, **_EVERY_OPTION),
        ("lamb",),
    ),
    "update, awaited": (_update_of_awaited, ("adam-8bit",)),
    "add_param_group, awaited": (_group_of_awaited, ("adam-8bit",)),
    "step, first": (_step(0), ("lamb", "nadam")),
    "step": (_step(), ("adam-8bit", "adamw-split", "asgd")),
    "step, every option": (_step(**_EVERY_OPTION), ("lamb", "adamw-split", "nadam")),
    "step, passing rate": (_step_at_another_rate, ("nadam",)),
    "update, refused": (_refused_update, ("nadam",)),
    "swap_ema": (_swap, ("lamb", "adamw-split")),
    "swap_ema, error inside": (_swap_with_an_error, ("adamw-split",)),
    "load_master_params": (_master_params, ("adamw-split",)),
    "refresh_params_copy": (_refreshed_copy, ("lamb", "adamw-split")),
    "state_dict": (_looked_at, ("adam-8bit", "adamw-split")),
}
"""Name -> what makes a scene and an operation on it from kind and backend, and the kinds it is for."""

CASES = [(name, kind) for name, (_, kinds) in OPERATIONS.items() for kind in kinds]


class Expected:
    """What an operation makes of its scene, if nothing fails: seen before, after, and a step later of both."""

    def __init__(self, name, kind, backend):
        self.prepare = lambda: OPERATIONS[name][0](kind, backend)
        made, operate = self.prepare()
        self.before = seen(made)
        self.later_before = self._later(made)
        made, operate = self.prepare()
        operate(made)
        self.after = seen(made)
        self.later_after = self._later(made)

    @staticmethod
    def _later(scene):
        if scene.optimizer is None or not scene.optimizer.state:
            return None
        scene.step(12, max_norm=1.0)
        return seen(scene)

    def check(self, scene, operate, fault, use, again):
        """Assert that a scene is as before the operation or as after it, to the bit; whether it is as before.

        With `use`, also that it is usable: a step is made, and where it is as before and `again` says so, the
        operation first.
        """
        found = seen(scene)
        is_before = found == self.before and found != self.after
        assert is_before or found == self.after, (
            f"{fault}: neither as before ({differences(found, self.before)} differ) "
            f"nor as after ({differences(found, self.after)} differ)"
        )
        if use and is_before and again:
            operate(scene)
            found = seen(scene)
            assert found == self.after, f"{fault}, then tried again: {differences(found, self.after)} differ"
        if use:
            later = self.later_before if is_before and not again else self.later_after
            found = self._later(scene)
            assert found == later, f"{fault}, then a step: {differences(found or {}, later or {})} differ"
        return is_before

    def survives(self, inject, every=1):
        """Run the operation with each fault, or one of `every`, that `inject(call, number)` can bring about.

        Each time all that can be seen must be as before the operation or as after it, and every seventh time it is
        used. An optimizer that is as before is kept for the next fault: damage that cannot be seen adds up.
        """
        scene, operate = self.prepare()
        for turn in itertools.count():
            number = turn * every
            came_so_far = inject(functools.partial(operate, scene), number)
            use = not came_so_far or turn % 7 == 0
            is_before = self.check(scene, operate, f"fault {number}", use, again=turn % 2 == 0)
            if not came_so_far:
                assert not is_before or self.before == self.after
                return number
            if use or not is_before:
                scene, operate = self.prepare()
        return None
