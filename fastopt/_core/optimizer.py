"""`Optimizer`: param groups, state, step(), update(), state_dict(). No math and no loops over elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fastopt import backends
from fastopt._arrays.kinds import is_any_array
from fastopt._arrays.types import Array, Gradient, Gradients, Parameter, Params, PerParameter, State
from fastopt._core import checkpoints, growth, master_params, pickling, planning, refusals, tensors
from fastopt._core.groups import listed
from fastopt._core.options import (
    ACCUMULATED,
    APPLIED,
    OPTIONS,
    UNSCALED,
    StepInfo,
    StepOptions,
    Unpack,
    check_options,
    check_step_options,
    step_options,
)
from fastopt._core.record import Record
from fastopt._messages import describe, did_you_mean, few, remedy
from fastopt.rules.spec import RULE_WORDS


class _Listing(type):
    # Leaves the attributes that describe a rule (`RULE_WORDS`) out of `dir` and `help`.

    __doc__ = vars(type)["__doc__"]  # of the class itself: `help` would show one of this metaclass in its place

    def __dir__(cls) -> list[str]:
        return [name for name in super().__dir__() if name not in RULE_WORDS]


class Optimizer(Record, metaclass=_Listing):
    """What all optimizers of fastopt share.

    Parameters
    ----------
    params
        What to optimise, in place: one float32 array, a sequence of them, a dict (or `FlatBuffer`) of them,
        or a list of param groups, dicts with ``"params"`` and the hyperparameters that differ there. Arrays
        must be C-contiguous, writable, of native byte order, and must not overlap. None leaves the
        parameters to `update`.
    n_threads : int >= 1 or None, default None
        Threads of a step at most; None for the process-wide number (`set_num_threads`). Never changes a bit
        of the result.
    backend : {"auto", "cpu", "cuda", "reference"}, default "auto"
        "cpu" runs the compiled kernels, "reference" the NumPy text, "cuda" the kernels for NVIDIA GPUs, on arrays of
        Numba, CuPy or PyTorch (experimental: not yet run on a GPU). "auto" is "cuda" for such arrays, else "cpu", or
        what the environment variable FASTOPT_BACKEND says.
    ema_decay : float in [0, 1] or None, default None
        Keep an exponential moving average of the parameters, ``ema = ema_decay * ema + (1 - ema_decay) * p``
        after every step, starting from the parameters as they are now: see `ema` and `swap_ema`.
    ema_warmup : bool, default False
        Average with ``min(ema_decay, (1 + t) / (10 + t))`` in place of `ema_decay`, so that the first averages are
        not those of the initial parameters, as TensorFlow's `tf.train.ExponentialMovingAverage` does with
        ``num_updates`` and the package torch-ema. t is the parameter's own ``"step"`` after the step: 1 in its first,
        whose decay is 2/11; a step without its gradient, or one that is skipped, does not count.
    copy_dtype : {"bfloat16", "float16"} or None, default None
        Keep a copy of the parameters in low precision, rounded to nearest even after every step: see
        `params_copy`.
    grad_dtype : "bfloat16" or None, default None
        Take uint16 gradients for bfloat16 numbers. Float32, float16 and (from ml_dtypes) bfloat16 gradients
        need no word.
    state_dtype : {"float32", "bfloat16", "8bit"}, default "float32"
        How state arrays are kept: 4, 2 or 1.03 bytes a parameter each. The step still computes in float32; only what
        stays in memory is rounded, stochastically, so that averages neither stall nor drift. In 8 bits, 64
        neighbours in an array share a scale; averaged parameters take bfloat16 there.
    seed : int in [0, 2**64), default 0
        Of the stochastic rounding: the same seed gives the same bits, whatever the threads and instruction set.
    master : "split" or None, default None
        Parameters are bfloat16 (uint16, or `ml_dtypes.bfloat16`), and the optimizer keeps the 16 bits that each
        lacks beside them: together they are exactly the float32 parameter that is trained, see `master_params`.
        The array holds the nearest bfloat16, halfway cases away from zero.

    Raises
    ------
    TypeError
        For arrays and hyperparameters of the wrong type, and unknown hyperparameters.
    ValueError
        For hyperparameters out of bounds, arrays of the wrong layout, overlapping or repeated arrays, an
        empty list of parameters and a backend that is not available.
    AttributeError
        When an attribute is set that would count for nothing: a hyperparameter, which belongs into `param_groups`,
        an option, or a name that there is not. A subclass of yours may have attributes of its own, unless their names
        are almost that of a hyperparameter or an option.
    """

    __slots__ = ("__dict__", "__weakref__")

    states: ClassVar[Mapping[str, float | str]] = {}
    state_kinds: ClassVar[Mapping[str, str]] = {}
    """What states hold that are not plain numbers with a sign: "unsigned" or "weights"."""
    optional_states: ClassVar[Mapping[str, str]] = {}
    fixed_flags: ClassVar[Mapping[str, bool]] = {}
    """Flags of an inherited rule that are not for this optimizer to choose."""
    derived_states: ClassVar[tuple[str, ...]] = ()
    """States of torch's that follow from the step count here; its state dicts carry them."""
    running: ClassVar[Mapping[str, float]] = {}
    decoupled_weight_decay: ClassVar[bool] = False
    trust: ClassVar[Literal["update", "gradient"] | None] = None
    """What the trust ratio, ``trust_ratio(p_norm, update_norm or gradient_norm, ...)``, scales in every tensor."""

    @staticmethod
    def check_together() -> None:
        """Check hyperparameters, named by its arguments, that bound one another."""

    @staticmethod
    def flags() -> dict[str, bool]:
        """Flags of the rule that are not themselves hyperparameters, from those named by its arguments."""
        return {}

    def __init__(self, params: Params | None, **arguments: Any) -> None:
        # `arguments` are every hyperparameter of the subclass and the options that were given.
        hypers = {name: arguments.pop(name) for name in self.spec.hypers if name in arguments}
        options = check_options(self._name, self.spec, arguments)
        if missing := [name for name in self.spec.hypers if name not in hypers]:
            raise TypeError(f"{self._name}: __init__ must pass on all hyperparameters, missing {missing}")
        defaults = self.spec.check(hypers)
        params = listed(params)
        backend: Any = backends.resolve(options["backend"], params)
        super().__init__(backend, defaults, options, by_update=params is None)
        if params is None:
            self._structure, self._names = "mapping", ()
            group = {"params": (), **self.defaults}
            self._param_groups.append(group)
            self._groups = (group,)
        elif is_any_array(params):
            self._structure = "single"
            growth.grow(self, [{"params": params}])
        elif isinstance(params, Mapping):
            self._structure, self._names = "mapping", ()
            growth.grow(self, [{"params": params}])
            self._given = params if type(params) is dict else None
        elif isinstance(params, list):
            is_grouped = bool(params) and all(isinstance(item, dict) for item in params)
            groups: list[Any] = params if is_grouped else [{"params": params}]
            if all(isinstance(group.get("params"), Mapping) for group in groups):
                self._structure, self._names = "mapping", ()
            growth.grow(self, groups)
        else:
            raise TypeError(
                f"{self._name}: params must be a float32 array, a sequence or a dict of them, or a list of param "
                f"groups, got {describe(params)}{remedy(params)}"
            )

    # --- What users see

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in RULE_WORDS]

    if not TYPE_CHECKING:  # a type checker that saw this method would let any attribute be set

        def __setattr__(self, name, value):
            """Set what can be set, such as `n_threads`, and refuse what would count for nothing: see `Optimizer`."""
            if not name.startswith("_"):
                self._check_settable(name)
            object.__setattr__(self, name, value)

    @property
    def state(self) -> PerParameter[State]:
        """State of every parameter: a list in the order of the parameters, or a dict by their names.

        Each is a mapping of live arrays: ``"step"`` (int64, shape ()) and the state arrays, shaped like the
        parameter. Write into the arrays to change a state. With `state_dtype` "bfloat16" they are of that type
        (uint16 without ml_dtypes); with "8bit" uint8 codes, in an order of their own, and ``"..._scale"`` beside
        them: see `state_float32`.
        """
        self._settle()
        return self._from_tensors(lambda tensor: tensors.exposed_state(tensor, self.spec, self._arrays))

    @property
    def ema(self) -> PerParameter[Array]:
        """Averages of the parameters, a list or a dict as `state`; needs `ema_decay`. Live arrays."""
        self._need("ema_decay", self.ema_decay)
        return self._from_tensors(lambda tensor: self._arrays.exposed(tensor.ema))

    @property
    def params_copy(self) -> PerParameter[np.ndarray]:
        """The parameters in low precision, a list or a dict as `state`; needs `copy_dtype`. Live arrays.

        float16 arrays, or bfloat16: arrays of that type if ml_dtypes is installed, else uint16 with its bits.
        What is written into a parameter between two steps is copied at the next, or by `refresh_params_copy`.
        """
        self._need("copy_dtype", self.copy_dtype)
        return self._from_tensors(lambda tensor: self._arrays.exposed(tensor.copy))

    @property
    def master_params(self) -> PerParameter[Array]:
        """The float32 parameters, a list or a dict as `state`: copies, put together from their halves.

        Needs ``master="split"``. `load_master_params` writes them.
        """
        self._need("master", self.master)
        return self._guard.run_also_swapped("master_params", self._from_tensors, self._arrays.values_of)

    @property
    def state_float32(self) -> PerParameter[Mapping[str, Array]]:
        """The arrays of `state` as float32 numbers, a list or a dict as there: copies, whatever `state_dtype`."""
        return self._guard.run_also_swapped("state_float32", self._from_tensors, partial(tensors.decoded, self))

    @property
    def state_nbytes(self) -> int:
        """Bytes of all state arrays and their scales, without `ema`, `params_copy` and the halves of parameters."""
        return sum(a.nbytes for t in self._tensors for kept in (t.states, t.scales) for a in kept.values())

    def step(
        self,
        grads: Gradients = ACCUMULATED,
        *,
        grad_scale: float = UNSCALED,
        max_norm: float | None = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        stream: Any = None,
    ) -> StepInfo:
        """Update every parameter in place, and what is kept beside it, in one pass.

        Parameters
        ----------
        grads
            Gradients in the structure of the parameters: one array, a list (for param groups: over all
            groups, in their order), or a dict with the same names. Each is a C-contiguous array of its
            parameter's shape, float32, float16 or bfloat16, or None: that parameter and all that is kept for it
            stay as they are. Only read, unless `zero_grads`. Without gradients the step takes what `accumulate` added
            up, and clears it.
        grad_scale : float, default 1
            Multiplies every gradient, before anything else looks at it.
        max_norm : float >= 0 or inf, default None
            Clip by the global L2 norm over all gradients: multiply them by min(1, max_norm / (norm + 1e-6)),
            torch's formula. inf only computes the norm.
        clip_value : float >= 0, default None
            Then clamp every element to [-clip_value, clip_value].
        skip_nonfinite : bool, default False
            With an inf or NaN in any scaled gradient change nothing: no parameter, no state, no step count.
        zero_grads : bool, default False
            Leave the gradients zero, also after a skipped step.
        stream
            On the GPU alone: the stream to queue the step on, of PyTorch, CuPy or Numba, or its handle. None takes
            the current stream of the package that the parameters are from, and for Numba the default stream.

        Returns
        -------
        StepInfo
            ``applied`` and ``grad_norm``, the norm before clipping, where `max_norm` or `skip_nonfinite` asked. On the
            GPU an object whose attributes have the same names; reading them waits until the device knows.

        Raises
        ------
        TypeError, ValueError
            For gradients, hyperparameters or options that do not fit; nothing was written then.
        RuntimeError
            While another thread is inside `step`, and inside `swap_ema`; with gradients while some are accumulated, and
            without gradients while none are.
        """
        plan = self._plan
        if plan is None:
            plan = self._guard.run("step()", planning.planned, self)
        if (
            grad_scale is UNSCALED
            and max_norm is None
            and clip_value is None
            and skip_nonfinite is False
            and zero_grads is False
            and stream is None
        ):
            plan.step(grads)
            return APPLIED
        options = check_step_options(self._name, grad_scale, max_norm, clip_value, skip_nonfinite, zero_grads)
        return self._step_with(plan.step, grads, options, stream)

    def accumulate(self, grads: Gradients, *, stream: Any = None) -> None:
        """Add gradients of a micro-batch to those of the calls before; the next `step` without gradients uses the sums.

        Every call is one float32 addition for each element, ``sum = sum + float32(grad)``, in the order of the calls
        and starting from 0 (so -0 becomes 0; subnormal numbers count as zero): the same bits for any threads,
        instruction set and split, on the CPU and the GPU. The first call allocates the sums, 4 bytes a parameter.

        Parameters
        ----------
        grads
            Gradients as for `step`; only read. A parameter whose entry is None is left out, and one that no call gave a
            gradient has none in the step.
        stream
            On the GPU alone, as for `step`: this call and the step must follow each other there.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As in `step`, for gradients that do not fit and while another operation is under way; nothing was added.

        Notes
        -----
        The step that uses the sums takes every option; ``grad_scale=1 / opt.n_accumulated`` makes them means. It clears
        them also when `skip_nonfinite` skips it, and keeps them if it raises. While gradients are accumulated, `step`
        refuses others, and `update`, `add_param_group`, `state_dict`, `load_state_dict` and pickling, which would lose
        them, are refused; `discard_accumulated` drops them.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> p = np.zeros(2, np.float32)
        >>> opt = fastopt.SGD([p], lr=1.0)
        >>> opt.accumulate([np.array([1, 2], np.float32)])
        >>> opt.accumulate([np.array([3, 4], np.float16)])
        >>> opt.step(grad_scale=1 / opt.n_accumulated)
        StepInfo(applied=True, grad_norm=None)
        >>> p
        array([-2., -3.], dtype=float32)
        """
        self._guard.run("accumulate()", self._accumulate, grads, stream)

    def _accumulate(self, grads: Gradients, stream: Any) -> None:
        planning.planned(self).accumulate(grads, *self._stream(stream))

    def discard_accumulated(self) -> None:
        """Drop the gradients that were given to `accumulate` since the last step, and the memory of their sums."""
        self._guard.run_also_swapped("discard_accumulated()", self._discard)

    def _discard(self) -> None:
        if self._plan is not None:
            self._plan.discard()

    def prepare_capture(self) -> None:
        """Make what a `step` needs that is captured into a CUDA graph: call it before the capture begins.

        The captured step counts nothing, is not run by the capture, and its StepInfo says nothing: see
        `prepare_replay`. Capture one step for each `prepare_capture`; a graph with an earlier one is not to be
        replayed any more, nor is any after `load_state_dict`, `add_param_group` or `update` with new arrays.

        Raises
        ------
        RuntimeError
            Unless this optimizer is on a GPU and has run a step there, which compiles its kernels.
        """
        self._guard.run("prepare_capture()", lambda: self._on_gpu("prepare_capture()").prepare_capture())

    def prepare_replay(self, stream: Any = None) -> StepInfo | None:
        """Count a step, and queue its numbers for the replay of a captured `step`: call it right before each.

        The replay must follow on the same stream. So each has its own step count, and the learning rate and other
        hyperparameters as they are now.

        Returns
        -------
        StepInfo or None
            Of the replay, to be read after it was queued, if the captured step had `max_norm` or `skip_nonfinite`.

        Raises
        ------
        RuntimeError
            If no step was captured, or if hyperparameters or step counts changed so that it no longer fits. With
            `skip_nonfinite`, `state` and the like raise it between this call and the replay.
        """
        info: StepInfo | None = self._guard.run(
            "prepare_replay()", lambda: self._on_gpu("prepare_replay()").prepare_replay(stream)
        )
        return info

    def update(
        self, params: Mapping[str, Parameter], grads: Mapping[str, Gradient | None], **options: Unpack[StepOptions]
    ) -> StepInfo:
        """Update the arrays in the dict `params` in place; state is made when a name is first seen.

        Parameters
        ----------
        params
            Name -> float32 array, as for the constructor. A name's state follows it to another array of the
            same shape. Names of earlier calls that are missing here are left alone.
        grads
            Name -> gradient, with the names of `params`.
        options
            As for `step`.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As in `step`, and when a name comes back with another shape.
        """
        if self._structure != "mapping":
            raise TypeError(f"{self._name}: update() is for dicts, this optimizer was made with a {self._structure}")
        changes = backends.engine().Changes()
        info: StepInfo = self._guard.run_or_undo("update()", changes, self._update, params, grads, options)
        return info

    def _update(
        self, changes: Any, params: Mapping[str, Array], grads: Mapping[str, Array | None], options: StepOptions
    ) -> StepInfo:
        refusals.check_nothing_pending(self, "update()")
        for what, value in (("params", params), ("grads", grads)):
            if not isinstance(value, Mapping):
                raise TypeError(f"{self._name}: {what} must be a dict of arrays, got {describe(value)}")
        arrays = dict(params)
        if arrays.keys() != grads.keys():
            odd = sorted(map(repr, arrays.keys() ^ grads.keys()))
            raise ValueError(f"{self._name}: params and grads must have the same names, {few(odd)} differ")
        chosen = step_options(self._name, **options)
        self._given = None
        known = self._by_name
        moved = {name: array for name, array in arrays.items() if name in known and known[name].array is not array}
        new = {name: array for name, array in arrays.items() if name not in known}
        if not self._tensors and self._options["backend"] == "auto":
            backend = self._resolved_backend(arrays)
            changes.attribute(self, "_backend", backend)
            changes.attribute(self, "_arrays", backend.arrays)
            changes.attribute(self, "_ranges", backend.arrays.ranges([]))
            changes.publish()
        if moved or new:
            growth.bind(self, changes, moved, new)
            changes.publish()
        if len(arrays) < len(self._tensors):
            grads = {**dict.fromkeys(self._names or ()), **grads}
        return self._step_with(planning.planned(self).step_held, grads, *chosen)

    def swap_ema(self) -> AbstractContextManager[None]:
        """Put the averages in the place of the parameters for the length of a with block.

        Parameters and averages are exchanged in place, `params_copy` follows, and all of it is undone at the
        end, also after an exception and in arrays that became read-only meanwhile. Inside, the optimizer cannot
        step, save, load or grow.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> p = np.zeros(2, np.float32)
        >>> opt = fastopt.SGD([p], lr=1.0, ema_decay=0.75)
        >>> opt.step([np.ones(2, np.float32)])
        StepInfo(applied=True, grad_norm=None)
        >>> with opt.swap_ema():
        ...     print(p)
        [-0.25 -0.25]
        >>> p
        array([-1., -1.], dtype=float32)
        """
        self._need("ema_decay", self.ema_decay)
        swap: AbstractContextManager[None] = self._arrays.average_swap(self)
        return swap

    def refresh_params_copy(self) -> None:
        """Copy the parameters as they are now into `params_copy`."""
        self._need("copy_dtype", self.copy_dtype)
        self._guard.run_also_swapped("refresh_params_copy()", self._refresh_params_copy)

    def _refresh_params_copy(self) -> None:
        self._arrays.check_parameters(self, [tensor.array for tensor in self._tensors], self._tensors)
        self._arrays.copy_parameters(self, self._tensors)

    def load_master_params(self, params: Any) -> None:
        """Set the float32 parameters; the arrays get their bfloat16 halves. Needs ``master="split"``.

        Parameters
        ----------
        params
            Float32 arrays in the structure of the parameters; read.

        Raises
        ------
        TypeError, ValueError
            For another structure, shapes or types; nothing was written then.
        """
        self._need("master", self.master)
        self._guard.run("load_master_params()", master_params.load, self, params)

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters with hyperparameters of their own.

        Parameters
        ----------
        group
            ``"params"`` (an array, or a sequence of arrays; a dict of them where the optimizer was made with a
            dict) and any hyperparameters; the others are those of the constructor.
        """
        self._guard.run("add_param_group()", growth.grow, self, [group])

    def state_dict(self) -> dict[str, Any]:
        """A snapshot that `load_state_dict` resumes from with the same bits.

        Returns
        -------
        dict
            Of plain types and copied arrays, in torch's form: ``"state"`` maps a parameter's position to its
            state, ``"param_groups"`` lists hyperparameters, positions (``"params"``) and, for dicts,
            ``"param_names"``; ``"ema"`` maps positions to averages, with `ema_decay`, and ``"master_low"`` to the
            lower halves of the parameters, with `master` (None for a name that `update` has not seen).
            ``"state_dtype"`` says how the state is kept, bfloat16 as uint16, 8 bits as uint8 with scales;
            ``"seed"`` and ``"offsets"`` are those of its rounding.
        """
        saved: dict[str, Any] = self._guard.run("state_dict()", checkpoints.saved, self)
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over state, step counts and hyperparameters from a `state_dict`.

        State dicts of torch's optimizer of the same name load too (CPU tensors or arrays); what torch has no
        word for, such as ``l1``, stays as it is, and averages start anew from the parameters. An optimizer that
        has no parameters yet takes the state of each name when `update` first sees it. State in another `state_dtype`
        is converted, rounded to nearest; the `seed` is taken over.

        Raises
        ------
        TypeError, ValueError, KeyError
            For a state dict of another optimizer, other param groups, shapes, names or missing entries;
            nothing was changed then.
        """
        self._guard.run("load_state_dict()", checkpoints.load, self, state_dict)

    def __repr__(self) -> str:
        """The hyperparameters of every param group as they are now, and the options that are not at their defaults."""
        n = sum(tensor.size for tensor in self._tensors)
        options = {"backend": self.backend} | {
            name: value for name, value in self._options_now().items() if name != "backend" and value != OPTIONS[name]
        }
        tensors = "1 tensor" if len(self._tensors) == 1 else f"{len(self._tensors):,} tensors"
        of = f"of {n:,} parameters in {tensors}, {shown_values(options)}"
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self._param_groups]
        if len(groups) == 1:
            return f"<{self._name}({shown_values(groups[0])}) {of}>"
        sizes = [sum(tensor.size for tensor in self._tensors if tensor.group == k) for k in range(len(groups))]
        lines = [
            f"\n  param_groups[{k}] of {size:,} parameters: {shown_values(group)}"
            for k, (group, size) in enumerate(zip(groups, sizes, strict=True))
        ]
        return f"<{self._name} {of}{''.join(lines)}>"

    def __getstate__(self) -> dict[str, Any]:
        return pickling.pickled(self)

    def __setstate__(self, saved: dict[str, Any]) -> None:
        Optimizer.__init__(self, None, **saved["defaults"], **saved["options"])
        pickling.restore(self, saved)

    # --- Inside

    def _check_settable(self, name: str) -> None:
        """Raise AttributeError unless setting the public attribute `name` is of use."""
        cls = type(self)
        if name in self.spec.hypers:
            raise AttributeError(
                f"{self._name}: {name} is a value of each param group: set opt.param_groups[0][{name!r}]"
            )
        if name in OPTIONS and name != "n_threads":
            raise AttributeError(f"{self._name}: {name} is chosen at construction: {self._name}(..., {name}=...)")
        if name in vars(self) or (hasattr(cls, name) and name not in RULE_WORDS):
            return  # a property without a setter raises its own error
        known = (*self.spec.hypers, *OPTIONS)
        is_of_a_user = cls is not self.spec.cls
        hint = did_you_mean(name, known, 0.8) if is_of_a_user else did_you_mean(name, (*known, *dir(cls)))
        if hint or not is_of_a_user:
            raise AttributeError(f"{self._name}: no attribute {name!r} to set{hint}")

    def _need(self, option: str, value: Any) -> None:
        if value is None:
            raise ValueError(f"{self._name}: needs {option}= at construction")

    def _stream(self, stream: Any) -> tuple[Any, ...]:
        """The arguments of a plan that say on which stream, if one was given."""
        if stream is None:
            return ()
        if not self._backend.ON_DEVICE:
            raise ValueError(f"{self._name}: stream is for arrays on a GPU, these are in host memory")
        return (stream,)

    def _step_with(self, step: Callable[..., Any], grads: Any, options: tuple, stream: Any) -> StepInfo:
        """What became of the plan's `step` with these options."""
        info = step(grads, options, *self._stream(stream))
        if info is None:
            return APPLIED
        return StepInfo(*info) if type(info) is tuple else info

    def _prepare_swap(self) -> list[Any]:
        """Check that parameters and averages can change places; return the tensors."""
        self._arrays.check_parameters(self, [tensor.array for tensor in self._tensors], self._tensors)
        self._settle()
        return list(self._tensors)

    def _resolved_backend(self, params: Any) -> Any:
        """The backend asked for, or with "auto" that of `params`."""
        backend: Any = backends.resolve(self._options["backend"], params)
        backend.arrays.check()
        return backend

    def _on_gpu(self, what: str) -> Any:
        """The plan of an optimizer on a GPU."""
        if not self._backend.ON_DEVICE:
            raise RuntimeError(f"{self._name}: {what} is for arrays on a GPU")
        return planning.planned(self)


def shown_values(values: Mapping[str, Any]) -> str:
    """Values as arguments are written."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
