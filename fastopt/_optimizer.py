"""`Optimizer`: param groups, state, step(), update(), state_dict(). No math and no loops over elements."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NoReturn, TypeAlias

import numpy as np

from fastopt import _buffers, _stages, _threads, backends
from fastopt._rule import Spec

Array: TypeAlias = _buffers.Array
Params: TypeAlias = Array | Sequence[Array] | Mapping[str, Array] | Sequence[dict[str, Any]]
Gradients: TypeAlias = Array | Sequence[Array | None] | Mapping[str, Array | None]
Backend: TypeAlias = Literal["auto", "cpu", "reference"]
State: TypeAlias = Mapping[str, np.ndarray]

_KEPT_FOR_OTHERS = ("initial_lr",)
"""Keys of a param group that no kernel reads: learning rate schedulers keep them there."""
_OF_TORCH = ("foreach", "fused", "capturable", "differentiable")
"""Keys of torch's param groups that choose its implementation; state dicts from there carry them."""


class _Tensor:
    """One parameter and what the optimizer keeps for it."""

    __slots__ = ("array", "group", "label", "running", "state", "states", "step")

    def __init__(
        self, array: Array, label: str, group: int, states: dict[str, Array], step: np.ndarray, running: np.ndarray
    ) -> None:
        self.array = array
        self.label = label
        self.group = group
        self.states = states
        self.step = step
        self.running = running

    def expose(self, spec: Spec) -> State:
        """What users see as the state of this tensor: live arrays under fixed names."""
        running = {name: self.running[k : k + 1].reshape(()) for k, name in enumerate(spec.running)}
        return types.MappingProxyType({"step": self.step, **running, **self.states})


class Optimizer:
    """What all optimizers of fastopt share.

    Parameters
    ----------
    params
        What to optimise, in place: one float32 array, a sequence of them, a dict (or `FlatBuffer`) of them,
        or a list of param groups, dicts with ``"params"`` and the hyperparameters that differ there. Arrays
        must be C-contiguous, writable, of native byte order, and must not overlap. None leaves the
        parameters to `update`.
    n_threads : int >= 1 or None
        Threads of a step at most; None for the process-wide number (`set_num_threads`). Never changes a bit
        of the result.
    backend : {"auto", "cpu", "reference"}
        "cpu" runs the compiled kernels, "reference" the NumPy text. "auto" is "cpu", or what the environment
        variable FASTOPT_BACKEND says.

    Raises
    ------
    TypeError
        For arrays and hyperparameters of the wrong type, and unknown hyperparameters.
    ValueError
        For hyperparameters out of bounds, arrays of the wrong layout, overlapping or repeated arrays, an
        empty list of parameters and a backend that is not available.
    """

    spec: ClassVar[Spec]
    states: ClassVar[Mapping[str, float | str]] = {}
    optional_states: ClassVar[Mapping[str, str]] = {}
    derived_states: ClassVar[tuple[str, ...]] = ()
    """States of torch's that follow from the step count here; its state dicts carry them."""
    running: ClassVar[Mapping[str, float]] = {}
    decoupled_weight_decay: ClassVar[bool] = False

    @staticmethod
    def check_together() -> None:
        """Check hyperparameters, named by its arguments, that bound one another."""

    @staticmethod
    def flags() -> dict[str, bool]:
        """Flags of the rule that are not themselves hyperparameters, from those named by its arguments."""
        return {}

    def __init__(self, params: Params | None, arguments: Mapping[str, Any]) -> None:
        """`arguments`: those of the subclass's ``__init__``, of which the hyperparameters are taken."""
        self.defaults: dict[str, Any] = self.spec.check(arguments)
        """Hyperparameters of a param group that does not set its own."""
        self._backend = backends.resolve(arguments["backend"])
        self._param_groups: list[dict[str, Any]] = []
        self._tensors: list[_Tensor] = []
        self._names: tuple[str, ...] | None = None
        self._structure: Literal["single", "sequence", "mapping"]
        self._awaited: dict[str, Mapping[str, Any]] = {}
        self._plan: Any = None
        self.n_threads = arguments["n_threads"]
        if params is None:
            self._structure = "mapping"
            self._names = ()
            self._param_groups.append({"params": (), **self.defaults})
        elif isinstance(params, np.ndarray) or hasattr(params, "__array_interface__"):
            self._structure = "single"
            self._add_groups([{"params": params}])
        elif isinstance(params, Mapping):
            self._structure = "mapping"
            self._names = ()
            self._add_groups([{"params": params}])
        elif isinstance(params, Iterable) and not isinstance(params, str | bytes | set | frozenset):
            items = list(params)
            groups: list[Any] = (
                items if items and all(isinstance(item, dict) for item in items) else [{"params": items}]
            )
            self._structure = "sequence"
            if all(isinstance(group.get("params"), Mapping) for group in groups):
                self._structure = "mapping"
                self._names = ()
            self._add_groups(groups)
        else:
            raise TypeError(
                f"{self._name}: params must be a float32 array, a sequence or a dict of them, or a list of param "
                f"groups, got {_buffers.describe(params)}"
            )

    # --- What users see

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups: ``"params"`` (a tuple of arrays) and every hyperparameter.

        Live: a hyperparameter changed here is checked and counts at the next step. Groups themselves are
        added with `add_param_group`.
        """
        return self._param_groups

    @property
    def state(self) -> Any:
        """State of every parameter: a list in the order of the parameters, or a dict by their names.

        Each is a mapping of live arrays: ``"step"`` (int64, shape ()) and the state arrays, shaped like the
        parameter. Write into the arrays to change a state.
        """
        exposed = [tensor.expose(self.spec) for tensor in self._tensors]
        return exposed if self._names is None else dict(zip(self._names, exposed, strict=True))

    @property
    def state_nbytes(self) -> int:
        """Bytes of all state arrays together."""
        return sum(array.nbytes for tensor in self._tensors for array in tensor.states.values())

    @property
    def backend(self) -> str:
        """Name of the backend that runs the steps."""
        return self._backend.NAME

    @property
    def n_threads(self) -> int | None:
        """Threads of a step at most; None for the process-wide number."""
        return self._n_threads

    @n_threads.setter
    def n_threads(self, n_threads: int | None) -> None:
        self._n_threads = None if n_threads is None else _threads.check_n_threads(n_threads)
        self._plan = None

    def step(self, grads: Gradients) -> None:
        """Update every parameter in place.

        Parameters
        ----------
        grads
            Gradients in the structure of the parameters: one array, a list (for param groups: over all
            groups, in their order), or a dict with the same names. Each is a C-contiguous float32 array of
            its parameter's shape, which is only read, or None: that parameter, its state and its step count
            stay as they are.

        Raises
        ------
        TypeError, ValueError
            For gradients or hyperparameters that do not fit; nothing was written then.
        RuntimeError
            While another thread is inside `step`.
        """
        plan = self._plan
        if plan is None:
            plan = self._make_plan()
        plan.step(grads)

    def update(self, params: Mapping[str, Array], grads: Mapping[str, Array | None]) -> None:
        """Update the arrays in the dict `params` in place; state is made when a name is first seen.

        Parameters
        ----------
        params
            Name -> float32 array, as for the constructor. A name's state follows it to another array of the
            same shape. Names of earlier calls that are missing here are left alone.
        grads
            Name -> gradient, with the names of `params`.

        Raises
        ------
        TypeError, ValueError
            As in `step`, and when a name comes back with another shape.
        """
        if self._structure != "mapping":
            raise TypeError(f"{self._name}: update() is for dicts, this optimizer was made with a {self._structure}")
        for what, value in (("params", params), ("grads", grads)):
            if not isinstance(value, Mapping):
                raise TypeError(f"{self._name}: {what} must be a dict of arrays, got {_buffers.describe(value)}")
        if params.keys() != grads.keys():
            odd = sorted(map(repr, params.keys() ^ grads.keys()))
            raise ValueError(f"{self._name}: params and grads must have the same names, {', '.join(odd)} differ")
        known = dict(zip(self._names or (), self._tensors, strict=True))
        moved = {name: array for name, array in params.items() if name in known and known[name].array is not array}
        for name, array in moved.items():
            _buffers.check_array(array, f"{self._name}: params[{name!r}]", shape=known[name].array.shape)
        new = {name: array for name, array in params.items() if name not in known}
        if moved or new:
            self._rebind(moved, new)
        if len(params) < len(self._tensors):
            grads = {name: grads.get(name) for name in self._names or ()}
        self.step(grads)

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters with hyperparameters of their own.

        Parameters
        ----------
        group
            ``"params"`` (an array, or a sequence of arrays; a dict of them where the optimizer was made with a
            dict) and any hyperparameters; the others are those of the constructor.
        """
        if self._structure == "single":
            self._structure = "sequence"
            for k, tensor in enumerate(self._tensors):
                tensor.label = f"params[{k}]"
        self._add_groups([group])

    def state_dict(self) -> dict[str, Any]:
        """A snapshot that `load_state_dict` resumes from with the same bits.

        Returns
        -------
        dict
            Of plain types and copied arrays, in torch's form: ``"state"`` maps a parameter's position to its
            state, ``"param_groups"`` lists hyperparameters, positions (``"params"``) and, for dicts,
            ``"param_names"``.
        """
        state = {}
        for position, tensor in enumerate(self._tensors):
            state[position] = {
                "step": int(tensor.step),
                **{name: float(tensor.running[k]) for k, name in enumerate(self.spec.running)},
                **{name: array.copy() for name, array in tensor.states.items()},
            }
        groups = []
        for k, group in enumerate(self._param_groups):
            positions = [i for i, tensor in enumerate(self._tensors) if tensor.group == k]
            saved = {key: value for key, value in group.items() if key != "params"}
            saved["params"] = positions
            if self._names is not None:
                saved["param_names"] = [self._names[i] for i in positions]
            groups.append(saved)
        return {"optimizer": self._name, "state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over state, step counts and hyperparameters from a `state_dict`.

        State dicts of torch's optimizer of the same name load too (CPU tensors or arrays); what torch has no
        word for, such as ``l1``, stays as it is. An optimizer that has no parameters yet takes the state of
        each name when `update` first sees it.

        Raises
        ------
        TypeError, ValueError, KeyError
            For a state dict of another optimizer, other param groups, shapes, names or missing entries;
            nothing was changed then.
        """
        from fastopt import _state_dict

        _state_dict.load(self, state_dict)

    def __repr__(self) -> str:
        n = sum(tensor.array.size for tensor in self._tensors)
        values = ", ".join(f"{name}={value!r}" for name, value in self.defaults.items())
        return f"<{self._name}({values}) of {n} parameters in {len(self._tensors)} tensors, backend {self.backend}>"

    def __getstate__(self) -> dict[str, Any]:
        params: Any = [tensor.array for tensor in self._tensors]
        return {
            "structure": self._structure,
            "names": self._names,
            "params": params,
            "defaults": self.defaults,
            "n_threads": self._n_threads,
            "backend": self.backend,
            "state_dict": self.state_dict(),
            "awaited": self._awaited,
        }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        params, names = saved["params"], saved["names"]
        groups = [
            {
                "params": [params[i] for i in group["params"]]
                if names is None
                else {names[i]: params[i] for i in group["params"]}
            }
            for group in saved["state_dict"]["param_groups"]
        ]
        arguments = {**saved["defaults"], "n_threads": saved["n_threads"], "backend": saved["backend"]}
        Optimizer.__init__(self, groups if params else None, arguments)
        if saved["structure"] == "single":
            self._structure = "single"
            self._tensors[0].label = "params"
        self.load_state_dict(saved["state_dict"])
        self._awaited.update(saved["awaited"])

    # --- Inside

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _make_plan(self) -> Any:
        if not self._tensors and not self._names:
            raise ValueError(
                f"{self._name}: no parameters yet; pass params to the constructor or call update(params, grads)"
            )
        self._plan = self._backend.make_plan(self)
        return self._plan

    def _add_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Check `groups` and everything in them, then add them."""
        added: list[tuple[dict[str, Any], list[Array], list[str]]] = []
        names = list(self._names or ())
        start = len(self._tensors)
        for group in groups:
            if not isinstance(group, Mapping) or "params" not in group:
                raise TypeError(f"{self._name}: a param group must be a dict with 'params', got {group!r:.80}")
            unknown = [key for key in group if key not in ("params", *self.spec.hypers, *_KEPT_FOR_OTHERS)]
            if unknown:
                raise TypeError(
                    f"{self._name}: unknown hyperparameters {unknown} in a param group; known are "
                    f"{', '.join(self.spec.hypers)}"
                )
            extra = {key: group[key] for key in _KEPT_FOR_OTHERS if key in group}
            values = self.spec.check({**self.defaults, **{k: v for k, v in group.items() if k in self.spec.hypers}})
            params = group["params"]
            if self._structure == "mapping":
                if not isinstance(params, Mapping):
                    raise TypeError(
                        f"{self._name}: params of every group must be a dict, got {_buffers.describe(params)}"
                    )
                repeated = [name for name in params if name in names]
                if repeated:
                    raise ValueError(f"{self._name}: the names {repeated} are in another param group")
                names += params
                arrays = list(params.values())
                labels = [f"params[{name!r}]" for name in params]
            elif isinstance(params, np.ndarray) or not isinstance(params, Iterable) or isinstance(params, str | bytes):
                arrays = [params]
                labels = ["params" if self._structure == "single" else f"params[{start}]"]
            elif isinstance(params, Mapping):
                raise TypeError(f"{self._name}: params of every group must be a sequence, got a dict")
            else:
                arrays = list(params)
                labels = [f"params[{start + k}]" for k in range(len(arrays))]
            if not arrays:
                raise ValueError(f"{self._name}: params must hold at least one array, got none")
            for array, label in zip(arrays, labels, strict=True):
                _buffers.check_array(array, f"{self._name}: {label}")
            start += len(arrays)
            added.append(({"params": tuple(arrays), **values, **extra}, arrays, labels))
        self._check_disjoint([(a, lab) for _, arrays, labels in added for a, lab in zip(arrays, labels, strict=True)])
        for group, arrays, labels in added:
            self._param_groups.append(group)
            self._add_tensors(arrays, labels, len(self._param_groups) - 1)
        if self._names is not None:
            self._names = tuple(names)

    def _check_disjoint(self, new: list[tuple[Array, str]], leave: Iterable[str] = ()) -> None:
        """Raise ValueError if `new` arrays overlap each other, parameters not in `leave`, or states."""
        written = list(new)
        for tensor in self._tensors:
            if tensor.label not in leave:
                written.append((tensor.array, tensor.label))
            written += [(array, f"state {name!r} of {tensor.label}") for name, array in tensor.states.items()]
        overlap = backends.engine().Ranges([array for array, _ in written]).first_overlap()
        if overlap is not None:
            (a, first), (b, second) = (written[k] for k in overlap)
            same = "are the same array" if a is b else "overlap in memory"
            raise ValueError(f"{self._name}: {first} and {second} {same}")

    def _add_tensors(self, arrays: list[Array], labels: list[str], group: int) -> None:
        """Make state for checked arrays and append them."""
        values = self._param_groups[group]
        names = self.spec.states_for(self.spec.flags(values))
        columns = [_buffers.state_arrays(arrays, self.spec.initial(name, values)) for name in names]
        steps = np.zeros(len(arrays), np.int64)
        running = np.tile(np.array(list(self.spec.running.values()), np.float64), (len(arrays), 1))
        for k, (array, label) in enumerate(zip(arrays, labels, strict=True)):
            states = {name: column[k] for name, column in zip(names, columns, strict=True)}
            self._tensors.append(_Tensor(array, label, group, states, steps[k : k + 1].reshape(()), running[k]))
        self._plan = None

    def _add_missing_states(self, tensor: _Tensor, names: Iterable[str]) -> None:
        """Give `tensor` zeros for states that it does not have; the caller fills them."""
        for name in names:
            if name not in tensor.states:
                tensor.states[name] = _buffers.state_arrays([tensor.array], 0.0)[0]
        tensor.states = {name: tensor.states[name] for name in self.spec.states if name in tensor.states}
        self._plan = None

    def _rebind(self, moved: Mapping[str, Array], new: Mapping[str, Array]) -> None:
        """Let names point to other arrays and add new names to the first group."""
        from fastopt import _state_dict

        labelled = [(array, f"params[{name!r}]") for name, array in {**moved, **new}.items()]
        for array, label in labelled:
            _buffers.check_array(array, f"{self._name}: {label}")
        self._check_disjoint(labelled, leave=[f"params[{name!r}]" for name in moved])
        awaited = {name: self._awaited[name] for name in new if name in self._awaited}
        for name, saved in awaited.items():
            _state_dict.check_entry(self, saved, new[name].shape, self._param_groups[0], f"params[{name!r}]")
        names = self._names or ()
        for name, array in moved.items():
            self._tensors[names.index(name)].array = array
        if new:
            self._add_tensors(list(new.values()), [f"params[{name!r}]" for name in new], 0)
            self._names = (*names, *new)
            for name, saved in awaited.items():
                _state_dict.fill(self, self._tensors[self._names.index(name)], saved)
                del self._awaited[name]
        for k, group in enumerate(self._param_groups):
            group["params"] = tuple(tensor.array for tensor in self._tensors if tensor.group == k)
        self._plan = None

    def _read_group(self, k: int) -> tuple[str, tuple[float, ...]]:
        """Check the hyperparameters of group `k` as they are now; return its kernel and their float64 values."""
        group = self._param_groups[k]
        missing = [key for key in ("params", *self.spec.hypers) if key not in group]
        unknown = [key for key in group if key not in ("params", *self.spec.hypers, *_KEPT_FOR_OTHERS)]
        if missing or unknown:
            raise ValueError(
                f"{self._name}: param_groups[{k}] must have the keys 'params', "
                f"{', '.join(map(repr, self.spec.hypers))}"
                + (f"; missing {missing}" if missing else "")
                + (f"; unknown {unknown}" if unknown else "")
            )
        arrays = [tensor.array for tensor in self._tensors if tensor.group == k]
        params = group["params"]
        if len(params) != len(arrays) or any(a is not b for a, b in zip(params, arrays, strict=True)):
            raise ValueError(f"{self._name}: param_groups[{k}]['params'] is fixed; see add_param_group and update")
        values = self.spec.check(group)
        flags = self.spec.flags(values)
        for tensor in self._tensors:
            lacking = [name for name in self.spec.states_for(flags) if name not in tensor.states]
            if tensor.group == k and lacking:
                raise ValueError(
                    f"{self._name}: param_groups[{k}] now needs the state {lacking[0]!r}, which {tensor.label} does "
                    "not have: hyperparameters that add state are set at construction"
                )
        group.update(values)
        return kernel_and_hypers(self.spec, values)

    def _refuse_regrouping(self) -> NoReturn:
        raise ValueError(
            f"{self._name}: param_groups must keep its dicts: change values inside them, add with add_param_group"
        )


def kernel_and_hypers(spec: Spec, values: Mapping[str, Any]) -> tuple[str, tuple[float, ...]]:
    """Name of the kernel of `spec` for the hyperparameters `values`, and what its host scalars read of them."""
    stage = spec.stage_values(values)
    name = spec.kernel_name(spec.flags(values), _stages.regularized(stage))
    hyper = [float(value) for value in stage.values()]
    for own in spec.scalar_hypers:
        if own not in stage:
            hyper += spec.hypers[own].kind.flatten(values[own])
    return name, tuple(hyper)
