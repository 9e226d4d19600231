"""`Optimizer`: param groups, state, step(), update(), state_dict(). No math and no loops over elements."""

from __future__ import annotations

import itertools
import math
import numbers
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, NoReturn, TypeAlias, TypedDict

import numpy as np

from fastopt import _buffers, _codecs, _stages, _threads, backends
from fastopt._rule import RULE_WORDS, Real, Spec, Switch, did_you_mean
from fastopt._types import Array, Gradient, Gradients, Parameter, Params, PerParameter, State

if TYPE_CHECKING:
    from typing_extensions import Unpack
elif sys.version_info >= (3, 11):
    from typing import Unpack
else:  # only read by type checkers

    class Unpack:
        """Stands in for typing.Unpack."""

        def __class_getitem__(cls, options):
            return options


Backend: TypeAlias = Literal["auto", "cpu", "cuda", "reference"]


class Options(TypedDict, total=False):
    """What every optimizer takes beside its hyperparameters; see `Optimizer`."""

    n_threads: int | None
    backend: Backend
    ema_decay: float | None
    ema_warmup: bool
    copy_dtype: Literal["bfloat16", "float16"] | None
    grad_dtype: Literal["bfloat16"] | None
    state_dtype: Literal["float32", "bfloat16", "8bit"]
    seed: int
    master: Literal["split"] | None


class StepOptions(TypedDict, total=False):
    """What every step takes beside the gradients; see `Optimizer.step`."""

    grad_scale: float
    max_norm: float | None
    clip_value: float | None
    skip_nonfinite: bool
    zero_grads: bool
    stream: Any


class StepInfo(NamedTuple):
    """What became of a step."""

    applied: bool
    """False if `skip_nonfinite` found an inf or NaN: nothing was changed then."""
    grad_norm: float | None
    """Global L2 norm of the scaled gradients before clipping; None where nothing asked for it."""


_OPTIONS: dict[str, Any] = {
    "n_threads": None,
    "backend": "auto",
    "ema_decay": None,
    "ema_warmup": False,
    "copy_dtype": None,
    "grad_dtype": None,
    "state_dtype": "float32",
    "seed": 0,
    "master": None,
}
"""The options and their defaults."""
_STEP_OPTIONS = tuple(StepOptions.__annotations__)
_APPLIED = StepInfo(True, None)
_UNSCALED = 1.0
"""The default grad_scale, told from others by identity: the comparison costs a tenth of a small step."""
_NON_NEGATIVE = Real(0.0)

_KEPT_FOR_OTHERS = ("initial_lr",)
"""Keys of a param group that no kernel reads: learning rate schedulers keep them there."""
_OF_TORCH = ("foreach", "fused", "capturable", "differentiable")
"""Keys of torch's param groups that choose its implementation; state dicts from there carry them."""


class Loaded(NamedTuple):
    """What a state dict holds for one parameter."""

    entry: Mapping[str, Any]
    """Step, running scalars and states, as the optimizer keeps them."""
    average: Array | None
    low: np.ndarray | None
    offset: int | None
    """Index for the rounding of its first element."""


def scale_name(state: str) -> str:
    """Under what name the scales of an 8-bit state are shown and saved."""
    return f"{state}_scale"


def exposed_state(tensor: Any, spec: Spec, arrays: Any) -> State:
    """What users see as the state of a tensor: live arrays under fixed names."""
    running = {name: tensor.running[k : k + 1].reshape(()) for k, name in enumerate(spec.running)}
    states = {name: arrays.exposed(array) for name, array in tensor.states.items()}
    scales = {scale_name(name): arrays.exposed(array) for name, array in tensor.scales.items()}
    return types.MappingProxyType({"step": tensor.step.view(), **running, **states, **scales})


class _Listing(type):
    # Leaves the words of the rule language out of `dir` and `help`: they speak to the engine, not to users.

    __doc__ = vars(type)["__doc__"]  # of the class itself: `help` would show one of this metaclass in its place

    def __dir__(cls) -> list[str]:
        return [name for name in super().__dir__() if name not in RULE_WORDS]


class Optimizer(metaclass=_Listing):
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

    # Fixed places, so that `vars` holds what a subclass of yours adds, and reading one in `step` is quick.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_arrays",
        "_awaited",
        "_backend",
        "_backend_asked",
        "_by_name",
        "_by_update",
        "_copy_dtype",
        "_defaults",
        "_ema_decay",
        "_ema_warmup",
        "_given",
        "_grad_dtype",
        "_groups",
        "_guard",
        "_kept_for_graphs",
        "_master",
        "_members",
        "_n_threads",
        "_names",
        "_param_groups",
        "_plan",
        "_ranges",
        "_read",
        "_seed",
        "_state_dtype",
        "_structure",
        "_tensors",
    )

    _backend: Any
    _arrays: Any

    spec: ClassVar[Spec]
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

    def __init__(self, params: Params | None, arguments: Mapping[str, Any]) -> None:
        # `arguments` are those of the subclass's __init__: the hyperparameters and `options` among them.
        options: dict[str, Any] = {**_OPTIONS, **arguments["options"]}
        unknown = [name for name in options if name not in _OPTIONS]
        if unknown:
            words = ("params", *self.spec.hypers, *_OPTIONS)
            hints = [
                f"; {name} is an option of step()" if name in _STEP_OPTIONS else did_you_mean(name, words)
                for name in unknown
            ]
            raise TypeError(
                f"{self._name}: unknown arguments {unknown}{''.join(hints)}; the hyperparameters are "
                f"{', '.join(self.spec.hypers)}; the options are {', '.join(_OPTIONS)}"
            )
        self._defaults = self.spec.check(arguments)
        params = _listed(params)
        self._backend_asked = options["backend"]
        self._backend = self._resolved_backend(params)
        self._arrays: Any = self._backend.arrays
        self._ema_decay = self._optional("ema_decay", Real(0.0, 1.0), options["ema_decay"])
        self._ema_warmup = Switch().check(self._name, "ema_warmup", options["ema_warmup"])
        if self._ema_warmup and self._ema_decay is None:
            raise ValueError(f"{self._name}: ema_warmup=True needs ema_decay, got None")
        self._copy_dtype = self._one_of("copy_dtype", ("bfloat16", "float16"), options["copy_dtype"])
        self._grad_dtype = self._one_of("grad_dtype", ("bfloat16",), options["grad_dtype"])
        state_dtype = options["state_dtype"]
        if not isinstance(state_dtype, str) or state_dtype not in _codecs.STATE_DTYPES:
            known = " or ".join(map(repr, _codecs.STATE_DTYPES))
            raise ValueError(f"{self._name}: state_dtype must be {known}, got {state_dtype!r}")
        self._state_dtype: str = state_dtype
        self._seed = self._check_seed(options["seed"])
        self._master = self._one_of("master", ("split",), options["master"])
        self._guard = backends.engine().Guard(self._name)
        self._param_groups: list[dict[str, Any]] = []
        self._groups: tuple[dict[str, Any], ...] = ()
        """The dicts that `param_groups` must hold."""
        self._tensors: list[Any] = []
        self._names: tuple[str, ...] | None = None
        self._by_name: dict[str, Any] = {}
        self._ranges: Any = self._arrays.ranges([])
        """All memory that a step writes."""
        self._structure: Literal["single", "sequence", "mapping"] = "sequence"
        self._awaited: dict[str, Loaded] = {}
        self._plan: Any = None
        self._kept_for_graphs: list[Any] = []
        """Buffers of dropped plans whose addresses are in captured graphs."""
        self._members: list[list[Any]] = []
        self._read: list[tuple[Any, tuple[str, ...]] | None] = []
        """Of each group the parameters and states that were last found to fit."""
        self._by_update = params is None
        self._given: dict[str, Any] | None = None
        """The dict of the parameters, until the first step: later it could only be watched at a cost."""
        self._n_threads: int | None = None
        self.n_threads = options["n_threads"]
        if params is None:
            self._structure, self._names = "mapping", ()
            group = {"params": (), **self.defaults}
            self._param_groups.append(group)
            self._groups = (group,)
        elif _is_array(params):
            self._structure = "single"
            self._grow([{"params": params}])
        elif isinstance(params, Mapping):
            self._structure, self._names = "mapping", ()
            self._grow([{"params": params}])
            self._given = params if type(params) is dict else None
        elif isinstance(params, list):
            is_grouped = bool(params) and all(isinstance(item, dict) for item in params)
            groups: list[Any] = params if is_grouped else [{"params": params}]
            if all(isinstance(group.get("params"), Mapping) for group in groups):
                self._structure, self._names = "mapping", ()
            self._grow(groups)
        else:
            raise TypeError(
                f"{self._name}: params must be a float32 array, a sequence or a dict of them, or a list of param "
                f"groups, got {_buffers.describe(params)}{_buffers.remedy(params)}"
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
    def defaults(self) -> dict[str, Any]:
        """Hyperparameters of a param group that does not set its own, as the constructor got them."""
        return self._defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups: ``"params"`` (a tuple of arrays) and every hyperparameter.

        Live: a hyperparameter changed here is checked and counts at the next step. Groups themselves are
        added with `add_param_group`.
        """
        return self._param_groups

    @property
    def state(self) -> PerParameter[State]:
        """State of every parameter: a list in the order of the parameters, or a dict by their names.

        Each is a mapping of live arrays: ``"step"`` (int64, shape ()) and the state arrays, shaped like the
        parameter. Write into the arrays to change a state. With `state_dtype` "bfloat16" they are of that type
        (uint16 without ml_dtypes); with "8bit" uint8 codes, in an order of their own, and ``"..._scale"`` beside
        them: see `state_float32`.
        """
        self._settle()
        return self._from_tensors(lambda tensor: exposed_state(tensor, self.spec, self._arrays))

    @property
    def ema(self) -> PerParameter[Array]:
        """Averages of the parameters, a list or a dict as `state`; needs `ema_decay`. Live arrays."""
        self._need("ema_decay", self._ema_decay)
        return self._from_tensors(lambda tensor: self._arrays.exposed(tensor.ema))

    @property
    def params_copy(self) -> PerParameter[np.ndarray]:
        """The parameters in low precision, a list or a dict as `state`; needs `copy_dtype`. Live arrays.

        float16 arrays, or bfloat16: arrays of that type if ml_dtypes is installed, else uint16 with its bits.
        What is written into a parameter between two steps is copied at the next, or by `refresh_params_copy`.
        """
        self._need("copy_dtype", self._copy_dtype)
        return self._from_tensors(lambda tensor: self._arrays.exposed(tensor.copy))

    @property
    def ema_decay(self) -> float | None:
        """Decay of the moving average, or None."""
        return self._ema_decay

    @property
    def ema_warmup(self) -> bool:
        """Whether the decay of the first averages is smaller."""
        return self._ema_warmup

    @property
    def copy_dtype(self) -> str | None:
        """Type of the copy of the parameters, or None."""
        return self._copy_dtype

    @property
    def grad_dtype(self) -> str | None:
        """What uint16 gradients are, or None."""
        return self._grad_dtype

    @property
    def state_dtype(self) -> str:
        """How states are kept: "float32", "bfloat16" or "8bit"."""
        return self._state_dtype

    @property
    def seed(self) -> int:
        """Of the rounding of states in low precision."""
        return self._seed

    @property
    def master(self) -> str | None:
        """ "split" if parameters are bfloat16 halves of float32 numbers."""
        return self._master

    @property
    def master_params(self) -> PerParameter[Array]:
        """The float32 parameters, a list or a dict as `state`: copies, put together from their halves.

        Needs ``master="split"``. `load_master_params` writes them.
        """
        self._need("master", self._master)
        return self._guard.run_also_swapped("master_params", self._from_tensors, self._arrays.values_of)

    @property
    def state_float32(self) -> PerParameter[Mapping[str, Array]]:
        """The arrays of `state` as float32 numbers, a list or a dict as there: copies, whatever `state_dtype`."""
        return self._guard.run_also_swapped("state_float32", self._from_tensors, self._decoded)

    @property
    def state_nbytes(self) -> int:
        """Bytes of all state arrays and their scales, without `ema`, `params_copy` and the halves of parameters."""
        return sum(a.nbytes for t in self._tensors for kept in (t.states, t.scales) for a in kept.values())

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
        if self._plan is not None:
            self._plan.n_threads = self._n_threads or 0

    @property
    def n_accumulated(self) -> int:
        """Calls of `accumulate` whose gradients no step has used yet."""
        return 0 if self._plan is None else self._plan.n_accumulated

    def step(
        self,
        grads: Gradients = _buffers.ACCUMULATED,
        *,
        grad_scale: float = _UNSCALED,
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
            plan = self._guard.run("step()", self._planned)
        if (
            grad_scale is _UNSCALED
            and max_norm is None
            and clip_value is None
            and skip_nonfinite is False
            and zero_grads is False
            and stream is None
        ):
            plan.step(grads)
            return _APPLIED
        options = self._check_step_options(grad_scale, max_norm, clip_value, skip_nonfinite, zero_grads)
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
        if self.backend == "cuda":
            self._planned().accumulate(grads, stream)
        else:
            self._refuse_stream(stream)
            self._planned().accumulate(grads)

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
        self._check_nothing_pending("update()")
        for what, value in (("params", params), ("grads", grads)):
            if not isinstance(value, Mapping):
                raise TypeError(f"{self._name}: {what} must be a dict of arrays, got {_buffers.describe(value)}")
        arrays = dict(params)
        if arrays.keys() != grads.keys():
            odd = sorted(map(repr, arrays.keys() ^ grads.keys()))
            raise ValueError(f"{self._name}: params and grads must have the same names, {_buffers.few(odd)} differ")
        chosen = self._step_options(**options)
        self._given = None
        known = self._by_name
        moved = {name: array for name, array in arrays.items() if name in known and known[name].array is not array}
        new = {name: array for name, array in arrays.items() if name not in known}
        if not self._tensors and self._backend_asked == "auto":
            backend = self._resolved_backend(arrays)
            changes.attribute(self, "_backend", backend)
            changes.attribute(self, "_arrays", backend.arrays)
            changes.attribute(self, "_ranges", backend.arrays.ranges([]))
            changes.publish()
        if moved or new:
            self._bind(changes, moved, new)
            changes.publish()
        if len(arrays) < len(self._tensors):
            grads = {**dict.fromkeys(self._names or ()), **grads}
        return self._step_with(self._planned().step_held, grads, *chosen)

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
        self._need("ema_decay", self._ema_decay)
        swap: AbstractContextManager[None] = self._arrays.average_swap(self)
        return swap

    def refresh_params_copy(self) -> None:
        """Copy the parameters as they are now into `params_copy`."""
        self._need("copy_dtype", self._copy_dtype)
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
        self._need("master", self._master)
        self._guard.run("load_master_params()", self._load_master_params, params)

    def _load_master_params(self, params: Any) -> None:
        if self._structure == "single":
            values = [params]
        elif self._structure == "mapping":
            if not isinstance(params, Mapping) or set(params) != set(self._names or ()):
                raise ValueError(f"{self._name}: params must be a dict with the names of the parameters")
            values = [params[name] for name in self._names or ()]
        else:
            if not isinstance(params, Sequence) or len(params) != len(self._tensors):
                raise ValueError(f"{self._name}: params must be a list of {len(self._tensors)} arrays")
            values = list(params)
        for tensor, value in zip(self._tensors, values, strict=True):
            arrays = _buffers if _buffers.is_array(value) else self._arrays
            arrays.check_array(value, f"{self._name}: {tensor.label}", shape=tensor.shape, writable=False)
            self._check_parameter(tensor.array, tensor.label, tensor.shape)
        halves = [half for tensor in self._tensors for half in (tensor.array, tensor.low)]
        beside = [k for k, value in enumerate(values) if backends.lives_on_gpu(value) == (self.backend == "cuda")]
        ranges = self._arrays.ranges(halves)
        if ranges.plus(self._arrays.ranges([values[k] for k in beside])).first_overlap() is not None:
            for k in beside:  # values may overlap one another
                if ranges.plus(self._arrays.ranges([values[k]])).first_overlap() is not None:
                    label = self._tensors[k].label
                    raise ValueError(f"{self._name}: the values for {label} overlap the parameters in memory")
        changes = backends.engine().Changes()
        for tensor, value in zip(self._tensors, values, strict=True):
            self._arrays.note_values(changes, tensor, value)
        changes.publish()

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters with hyperparameters of their own.

        Parameters
        ----------
        group
            ``"params"`` (an array, or a sequence of arrays; a dict of them where the optimizer was made with a
            dict) and any hyperparameters; the others are those of the constructor.
        """
        self._guard.run("add_param_group()", self._grow, [group])

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
        saved: dict[str, Any] = self._guard.run("state_dict()", self._saved)
        return saved

    def _saved(self) -> dict[str, Any]:
        """See `state_dict`."""
        self._check_nothing_pending("state_dict()")
        self._check_grouping()
        self._settle()
        fetch = self._arrays.fetch
        state: dict[int, Any] = {}
        for position, tensor in enumerate(self._tensors):
            state[position] = {
                "step": int(tensor.step),
                **{name: float(tensor.running[k]) for k, name in enumerate(self.spec.running)},
                **{name: fetch(array) for name, array in tensor.states.items()},
                **{scale_name(name): fetch(array) for name, array in tensor.scales.items()},
            }
        groups = []
        members: list[list[int]] = [[] for _ in self._groups]
        for position, tensor in enumerate(self._tensors):
            members[tensor.group].append(position)
        for group, positions in zip(self._groups, members, strict=True):
            saved = {key: value for key, value in group.items() if key != "params"}
            saved["params"] = positions
            if self._names is not None:
                saved["param_names"] = [self._names[i] for i in positions]
            groups.append(saved)
        saved = {
            "optimizer": self._name,
            "state": state,
            "param_groups": groups,
            "state_dtype": self._state_dtype,
            "seed": self._seed,
            "offsets": {k: tensor.index for k, tensor in enumerate(self._tensors)},
        }
        if self._master is not None:
            halves = [fetch(tensor.low) for tensor in self._tensors if tensor.low is not None]
            saved["master_low"] = dict(enumerate(halves))
        if self._ema_decay is not None:
            averages = [fetch(tensor.ema) for tensor in self._tensors if tensor.ema is not None]
            saved["ema"] = dict(enumerate(averages))
        for name, awaited in self._awaited.items():
            position = len(state)
            entry = awaited.entry.items()
            state[position] = {key: np.copy(v) if _buffers.is_array(v) else v for key, v in entry}
            groups[0]["params"].append(position)
            groups[0]["param_names"].append(name)
            for where, kept in (("ema", awaited.average), ("master_low", awaited.low)):
                if where in saved:
                    saved[where][position] = None if kept is None else kept.copy()
            if awaited.offset is not None:
                saved["offsets"][position] = awaited.offset
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
        from fastopt import _state_dict

        self._guard.run("load_state_dict()", _state_dict.load, self, state_dict)

    def __repr__(self) -> str:
        """The hyperparameters of every param group as they are now, and the options that are not at their defaults."""
        n = sum(tensor.size for tensor in self._tensors)
        options = {"backend": self.backend} | {
            name: value for name, value in self._options().items() if name != "backend" and value != _OPTIONS[name]
        }
        tensors = "1 tensor" if len(self._tensors) == 1 else f"{len(self._tensors):,} tensors"
        of = f"of {n:,} parameters in {tensors}, {_shown(options)}"
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self._param_groups]
        if len(groups) == 1:
            return f"<{self._name}({_shown(groups[0])}) {of}>"
        sizes = [sum(tensor.size for tensor in self._tensors if tensor.group == k) for k in range(len(groups))]
        lines = [
            f"\n  param_groups[{k}] of {size:,} parameters: {_shown(group)}"
            for k, (group, size) in enumerate(zip(groups, sizes, strict=True))
        ]
        return f"<{self._name} {of}{''.join(lines)}>"

    def __getstate__(self) -> dict[str, Any]:
        if self.backend == "cuda":
            raise TypeError(f"{self._name}: arrays on the GPU are not pickled; save state_dict() and the parameters")
        return {
            "structure": self._structure,
            "by_update": self._by_update,
            "names": self._names,
            # Views of a FlatBuffer are saved as its parts, so that it shares them with the optimizer afterwards, too.
            "tensors": [
                (_buffers.part_of_buffer(tensor.array) or tensor.array, tensor.key, tensor.group)
                for tensor in self._tensors
            ],
            "defaults": self.defaults,
            "options": self._options(),
            "state_dict": self.state_dict(),
            "attributes": dict(vars(self)),
        }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        from fastopt import _state_dict

        Optimizer.__init__(self, None, {**saved["defaults"], "options": saved["options"]})
        vars(self).update(saved["attributes"])
        self._structure, self._by_update = saved["structure"], saved["by_update"]
        self._names = None if saved["names"] is None else ()
        tensors: list[Any] = []
        members: list[list[Array]] = [[] for _ in saved["state_dict"]["param_groups"]]
        groups = [{"params": (), **group} for group in saved["state_dict"]["param_groups"]]
        for group in groups:
            group.pop("param_names", None)
        for k, run in itertools.groupby(saved["tensors"], key=lambda tensor: tensor[2]):
            sources, keys, _ = zip(*run, strict=True)
            arrays = [_buffers.array_of(one) if isinstance(one, tuple) else one for one in sources]
            tensors += self._made_tensors(arrays, keys, k, groups[k], _next_index(tensors))
            members[k] += arrays
        for group, arrays in zip(groups, members, strict=True):
            group["params"] = tuple(arrays)
        self._param_groups[:] = groups
        self._groups = tuple(groups)
        changes = backends.engine().Changes()
        self._note_growth(changes, tensors, self._ranges)
        changes.publish()
        _state_dict.load(self, saved["state_dict"])

    # --- Inside

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_settable(self, name: str) -> None:
        """Raise AttributeError unless setting the public attribute `name` is of use."""
        cls = type(self)
        if name in self.spec.hypers:
            raise AttributeError(
                f"{self._name}: {name} is a value of each param group: set opt.param_groups[0][{name!r}]"
            )
        if name in _OPTIONS and name != "n_threads":
            raise AttributeError(f"{self._name}: {name} is chosen at construction: {self._name}(..., {name}=...)")
        if name in vars(self) or (hasattr(cls, name) and name not in RULE_WORDS):
            return  # properties say themselves what cannot be set
        known = (*self.spec.hypers, *_OPTIONS)
        is_of_a_user = cls is not self.spec.cls
        hint = did_you_mean(name, known, 0.8) if is_of_a_user else did_you_mean(name, (*known, *dir(cls)))
        if hint or not is_of_a_user:
            raise AttributeError(f"{self._name}: no attribute {name!r} to set{hint}")

    def _options(self) -> dict[str, Any]:
        """The options as they are now, under the names that the constructor takes them by."""
        return {
            "n_threads": self._n_threads,
            "backend": self.backend,
            "ema_decay": self._ema_decay,
            "ema_warmup": self._ema_warmup,
            "copy_dtype": self._copy_dtype,
            "grad_dtype": self._grad_dtype,
            "state_dtype": self._state_dtype,
            "seed": self._seed,
            "master": self._master,
        }

    def _structured(self, values: list[Any]) -> Any:
        """`values`, one for each parameter, as a list or as a dict by their names."""
        return values if self._names is None else dict(zip(self._names, values, strict=True))

    def _from_tensors(self, function: Callable[[Any], Any]) -> Any:
        """What `function` makes of every tensor, as a list or as a dict by the names of the parameters."""
        tensors = list(self._tensors)  # another thread may add some meanwhile
        if self._names is None:
            return [function(tensor) for tensor in tensors]
        return {tensor.key: function(tensor) for tensor in tensors}

    def _need(self, option: str, value: Any) -> None:
        if value is None:
            raise ValueError(f"{self._name}: needs {option}= at construction")

    def _optional(self, name: str, kind: Real, value: Any) -> float | None:
        return None if value is None else kind.check(self._name, name, value)

    def _check_seed(self, seed: Any) -> int:
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= int(seed) < 2**64:
            raise ValueError(f"{self._name}: seed must be an integer in [0, 2**64), got {seed!r}")
        return int(seed)

    def _codec(self, state: str) -> _codecs.Codec:
        return _codecs.codec(self._state_dtype, self.spec.kinds[state])

    def _decoded(self, tensor: Any) -> dict[str, Array]:
        """The states of `tensor` in float32, new arrays."""
        decoded = {}
        for name, array in tensor.states.items():
            scales = tensor.scales.get(name)
            kept = np.zeros(0, np.uint16) if scales is None else self._arrays.fetch(scales)
            decoded[name] = self._codec(name).decode(self._arrays.fetch(array), kept)
        return decoded

    def _check_parameter(self, array: Any, label: str, shape: tuple[int, ...] | None = None) -> None:
        """Raise unless `array` can be a parameter."""
        self._arrays.check_parameter(array, f"{self._name}: {label}", shape, self._master is not None)

    def _one_of(self, name: str, known: tuple[str, ...], value: Any) -> str | None:
        if value is not None and (not isinstance(value, str) or value not in known):
            raise ValueError(f"{self._name}: {name} must be None or {' or '.join(map(repr, known))}, got {value!r}")
        return value

    def _check_step_options(
        self, grad_scale: Any, max_norm: Any, clip_value: Any, skip_nonfinite: Any, zero_grads: Any
    ) -> tuple[float, float | None, float | None, bool, bool]:
        if isinstance(max_norm, numbers.Real) and max_norm == math.inf:
            max_norm = math.inf
        else:
            max_norm = self._optional("max_norm", _NON_NEGATIVE, max_norm)
        return (
            Real().check(self._name, "grad_scale", grad_scale),
            max_norm,
            self._optional("clip_value", _NON_NEGATIVE, clip_value),
            Switch().check(self._name, "skip_nonfinite", skip_nonfinite),
            Switch().check(self._name, "zero_grads", zero_grads),
        )

    def _refuse_stream(self, stream: Any) -> None:
        if stream is not None:
            raise ValueError(f"{self._name}: stream is for arrays on a GPU, these are in host memory")

    def _step_options(
        self,
        *,
        grad_scale: float = _UNSCALED,
        max_norm: float | None = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        stream: Any = None,
    ) -> tuple[tuple[float, float | None, float | None, bool, bool], Any]:
        """The options of a step, checked, and its stream."""
        return self._check_step_options(grad_scale, max_norm, clip_value, skip_nonfinite, zero_grads), stream

    def _step_with(self, step: Callable[..., Any], grads: Any, options: tuple, stream: Any) -> StepInfo:
        """What became of the plan's `step` with these options."""
        if self.backend == "cuda":
            return step(grads, options, stream) or _APPLIED
        self._refuse_stream(stream)
        return StepInfo(*step(grads, options))

    def _prepare_swap(self) -> list[Any]:
        """Check that parameters and averages can change places; return the tensors."""
        self._arrays.check_parameters(self, [tensor.array for tensor in self._tensors], self._tensors)
        self._settle()
        return list(self._tensors)

    def _check_nothing_pending(self, what: str) -> None:
        """Raise RuntimeError while an operation would lose accumulated gradients."""
        if self.n_accumulated:
            _buffers.refuse_pending_gradients(self, what)

    def _resolved_backend(self, params: Any) -> Any:
        """The backend asked for, or with "auto" that of `params`."""
        backend: Any = backends.resolve(self._backend_asked, params)
        backend.arrays.check()
        return backend

    def _planned(self) -> Any:
        """The plan of the next step; the caller has taken the guard."""
        if self._plan is not None:
            return self._plan
        if not self._tensors and not self._names:
            raise ValueError(
                f"{self._name}: no parameters yet; pass params to the constructor or call update(params, grads)"
            )
        given = self._given or {}
        for key, tensor in self._by_name.items():
            if given.get(key, tensor.array) is not tensor.array:
                raise ValueError(
                    f"{self._name}: params[{key!r}] is another array than the one that {self._name} was made with, and "
                    f"would not be updated; write into that one, params[{key!r}][...] = values, or use update()"
                )
        self._given = None
        self._check_grouping()
        self._arrays.check_parameters(self, [tensor.array for tensor in self._tensors], self._tensors)
        members: list[list[Any]] = [[] for _ in self._groups]
        if len(members) == 1:
            members[0] += self._tensors
        else:
            for tensor in self._tensors:
                members[tensor.group].append(tensor)
        self._members = members
        self._read = [None] * len(members)
        self._plan = self._backend.make_plan(self)
        return self._plan

    def _check_grouping(self) -> None:
        """Raise ValueError unless `param_groups` holds the dicts that it was given."""
        if len(self._param_groups) != len(self._groups) or any(
            shown is not own for shown, own in zip(self._param_groups, self._groups, strict=True)
        ):
            self._refuse_regrouping()

    # --- Growing: everything is checked and made, then added at once

    def _grow(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Check `groups` and everything in them, make what is kept for their parameters, and add it all."""
        from fastopt import _state_dict

        self._check_nothing_pending("add_param_group()")
        self._check_grouping()
        structure = "sequence" if self._structure == "single" and self._tensors else self._structure
        changes = backends.engine().Changes()
        names = set(self._by_name)
        start = len(self._tensors)
        checked = []
        arrays: list[Array] = []
        keys: list[Any] = []
        for group in groups:
            values, own_arrays, own_keys = self._check_group(group, structure, names, start + len(arrays))
            arrays += own_arrays
            keys += own_keys
            names.update(own_keys)
            checked.append((values, own_arrays, own_keys))
        self._arrays.check_parameters(self, arrays, keys=keys)
        self._check_disjoint(arrays, keys)
        index = _next_index(self._tensors)
        added: list[Any] = []
        for position, (values, own_arrays, own_keys) in enumerate(checked, len(self._groups)):
            added += self._made_tensors(own_arrays, own_keys, position, values, index)
            index = _next_index(added)
        if structure == "mapping":
            awaited = {key: self._awaited[key] for key in keys if key in self._awaited}
            for tensor in added:
                if tensor.key in awaited:
                    values = checked[tensor.group - len(self._groups)][0]
                    _state_dict.fill_new(self, tensor, awaited[tensor.key], values)
            if awaited:
                left = {name: loaded for name, loaded in self._awaited.items() if name not in awaited}
                changes.attribute(self, "_awaited", left)
        new_groups = [values for values, _, _ in checked]
        changes.extend(self._param_groups, new_groups)
        changes.attribute(self, "_groups", (*self._groups, *new_groups))
        if structure != self._structure:
            changes.attribute(self, "_structure", structure)
            changes.attribute(self._tensors[0], "key", 0)
        self._note_growth(changes, added, self._ranges)
        changes.publish()

    def _check_group(
        self, group: Any, structure: str, taken: set[str], start: int
    ) -> tuple[dict[str, Any], list[Array], list[Any]]:
        """A param group as it is kept, its arrays, and under what key each goes."""
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f"{self._name}: a param group must be a dict with 'params', got {group!r:.80}")
        unknown = [key for key in group if key not in ("params", *self.spec.hypers, *_KEPT_FOR_OTHERS)]
        if unknown:
            hints = "".join(did_you_mean(key, self.spec.hypers) for key in unknown)
            raise TypeError(
                f"{self._name}: unknown hyperparameters {unknown} in a param group{hints}; known are "
                f"{', '.join(self.spec.hypers)}"
            )
        extra = {key: group[key] for key in _KEPT_FOR_OTHERS if key in group}
        values = self.spec.check({**self.defaults, **{k: v for k, v in group.items() if k in self.spec.hypers}})
        params = group["params"]
        keys: list[Any]
        if structure == "mapping":
            if not isinstance(params, Mapping):
                raise TypeError(f"{self._name}: params of every group must be a dict, got {_buffers.describe(params)}")
            items = dict(params)
            self._check_names(items)
            repeated = [name for name in items if name in taken]
            if repeated:
                raise ValueError(f"{self._name}: the names {repeated} are in another param group")
            keys, arrays = list(items), list(items.values())
        elif _is_array(params) or not isinstance(params, Iterable) or isinstance(params, str | bytes):
            keys, arrays = [None if structure == "single" else start], [params]
        elif isinstance(params, Mapping):
            raise TypeError(f"{self._name}: params of every group must be a sequence, got a dict")
        else:
            arrays = list(params)
            keys = list(range(start, start + len(arrays)))
        if not arrays:
            raise ValueError(f"{self._name}: params must hold at least one array, got none")
        return {"params": tuple(arrays), **values, **extra}, arrays, keys

    def _check_names(self, names: Iterable[Any]) -> None:
        """Raise TypeError unless all names are strings, which alone can be saved and loaded."""
        odd = [name for name in names if type(name) is not str]
        if odd:
            raise TypeError(f"{self._name}: names of parameters must be strings, got {_buffers.few(odd)}")

    def _check_disjoint(self, arrays: list[Array], keys: Sequence[Any]) -> None:
        """Raise ValueError if new parameters overlap each other or what the optimizer has."""
        if self._ranges.plus(self._arrays.ranges(arrays)).first_overlap() is not None:
            new = [(array, _buffers.parameter_label(key)) for array, key in zip(arrays, keys, strict=True)]
            _buffers.refuse_overlap(self, [*new, *_buffers.written_arrays(self)])

    def _made_tensors(
        self, arrays: list[Array], keys: Sequence[Any], group: int, values: Mapping[str, Any], index: int
    ) -> list[Any]:
        """New tensors with their state for checked arrays; the optimizer does not know them yet."""
        engine = backends.engine()
        steps = engine.carve_scalars(np.zeros(len(arrays), np.int64))
        carried = np.array(list(self.spec.running.values()), np.float64)
        running = [carried] * len(arrays) if not carried.size else list(np.tile(carried, (len(arrays), 1)))
        shapes = list(map(self._arrays.shape_of, arrays))
        made: list[Any] = engine.make_tensors(arrays, keys, group, index, steps, running, shapes)
        for name in self.spec.states_for(self.spec.flags(values)):
            engine.give(made, name, *self._made_states(made, name, values))
        if self._master is not None:
            for tensor, low in zip(made, self._arrays.state_arrays(arrays, np.uint16), strict=True):
                tensor.low = low
        if self.spec.trust == "update":
            for tensor, update in zip(made, self._arrays.state_arrays(arrays), strict=True):
                tensor.update = update
        if self._ema_decay is not None:
            for tensor, ema in zip(made, self._arrays.state_arrays(arrays), strict=True):
                tensor.ema = ema
            self._arrays.start_averages(self, made)
        if self._copy_dtype is not None:
            for tensor, copy in zip(made, self._arrays.state_arrays(arrays, self._copy_type()), strict=True):
                tensor.copy = copy
            self._arrays.copy_parameters(self, made)
        return made

    def _made_states(
        self, tensors: Sequence[Any], name: str, values: Mapping[str, Any] | None
    ) -> tuple[list[Any], list[Any]]:
        """For each tensor an array for the state `name`, with its first value or 0 without `values`; and their scales.

        The second list is empty where the state has no scales.
        """
        initial = 0.0 if values is None else self.spec.initial(name, values)
        codec = self._codec(name)
        dtype = self._arrays.bfloat16() if isinstance(codec, _codecs.Bfloat16) else codec.dtype
        block = _codecs.BLOCK if codec.has_scales else 1
        arrays = self._arrays.state_arrays([tensor.array for tensor in tensors], dtype, block)
        code, scale = codec.encode(np.full(1, initial, np.float32))
        if code.any():
            for array in arrays:
                self._arrays.fill(array, code[0])
        if not codec.has_scales:
            return arrays, []
        scales = self._arrays.scale_arrays([codec.n_scales(tensor.size) for tensor in tensors])
        for array in scales:
            self._arrays.fill(array, scale[0])
        return arrays, scales

    def _note_growth(self, changes: Any, added: list[Any], ranges: Any) -> None:
        """Note that the optimizer has these tensors, too; `ranges` are those of what it had."""
        parameters = self._arrays.ranges([tensor.array for tensor in added])
        changes.attribute(self, "_ranges", ranges.plus(parameters).plus(self._kept_ranges(added)))
        changes.extend(self._tensors, added)
        if self._names is not None:
            changes.attribute(self, "_names", (*self._names, *(tensor.key for tensor in added)))
            for tensor in added:
                changes.item(self._by_name, tensor.key, tensor)
        self._note_no_plan(changes)

    def _kept_ranges(self, tensors: list[Any]) -> Any:
        """The memory of what is kept beside parameters."""
        columns = backends.engine().kept_beside(tensors, tuple(self.spec.states))
        arrays = itertools.chain.from_iterable(column for _, _, column in columns)
        return self._arrays.ranges(list(arrays), _buffers.ALIGNMENT)

    def _note_no_plan(self, changes: Any) -> None:
        """Note that the next step makes a new plan."""
        self._settle()
        if self._plan is not None and self.backend == "cuda":
            changes.extend(self._kept_for_graphs, self._plan.captured())
        changes.attribute(self, "_plan", None)
        changes.attribute(self._guard, "plan", None)
        changes.attribute(self, "_members", [])  # of that plan
        changes.attribute(self, "_read", [])

    def _copy_type(self) -> np.dtype:
        """Type of the arrays in `params_copy`."""
        return np.dtype(np.float16) if self._copy_dtype == "float16" else self._arrays.bfloat16()

    def _bind(self, changes: Any, moved: Mapping[str, Array], new: Mapping[str, Array]) -> None:
        """Note that names point to other arrays, and that new names join the first group."""
        from fastopt import _state_dict

        self._check_grouping()
        self._check_names(new)
        if moved and self._master is not None:
            raise ValueError(
                f"{self._name}: with master='split' a name keeps its array, whose other halves are here; "
                f"{_buffers.few(list(moved))} came with another"
            )
        tensors = [self._by_name[name] for name in moved]
        self._arrays.check_parameters(self, list(moved.values()), tensors)
        self._arrays.check_parameters(self, list(new.values()), keys=list(new))
        ranges = self._ranges
        if moved:
            others = [tensor.array for tensor in self._tensors if tensor.key not in moved]
            ranges = self._arrays.ranges(others).plus(self._kept_ranges(self._tensors))
        both = [*moved.values(), *new.values()]
        if ranges.plus(self._arrays.ranges(both)).first_overlap() is not None:
            labelled = [(array, _buffers.parameter_label(name)) for name, array in {**moved, **new}.items()]
            _buffers.refuse_overlap(self, [*labelled, *_buffers.written_arrays(self, without=moved)])
        values = self._groups[0]
        added = self._made_tensors(list(new.values()), list(new), 0, values, _next_index(self._tensors)) if new else []
        awaited = dict(self._awaited)
        for tensor in added:
            if tensor.key in awaited:
                _state_dict.fill_new(self, tensor, awaited.pop(tensor.key), values)
        changes.attribute(self, "_awaited", awaited)
        for name, array in moved.items():
            changes.attribute(self._by_name[name], "array", array)
        shown: list[list[Array]] = [list(group["params"]) for group in self._groups]
        if moved:
            shown = [[] for _ in self._groups]
            for tensor in self._tensors:
                shown[tensor.group].append(moved.get(tensor.key, tensor.array))
        shown[0] += [tensor.array for tensor in added]
        for group, arrays in zip(self._groups, shown, strict=True):
            changes.item(group, "params", tuple(arrays))
        self._note_growth(changes, added, ranges.plus(self._arrays.ranges(list(moved.values()))))

    def _read_group(self, k: int) -> tuple[str, tuple[float, ...]]:
        """Check the hyperparameters of group `k` as they are now; return its kernel and their float64 values."""
        group = self._groups[k]
        missing = [key for key in ("params", *self.spec.hypers) if key not in group]
        unknown = [key for key in group if key not in ("params", *self.spec.hypers, *_KEPT_FOR_OTHERS)]
        if missing or unknown:
            raise ValueError(
                f"{self._name}: param_groups[{k}] must have the keys 'params', "
                f"{', '.join(map(repr, self.spec.hypers))}"
                + (f"; missing {missing}" if missing else "")
                + (f"; unknown {unknown}" if unknown else "")
                + "".join(did_you_mean(key, self.spec.hypers) for key in unknown)
            )
        values = self.spec.check(group)
        needed = self.spec.states_for(self.spec.flags(values))
        params, read = group["params"], self._read[k]
        if read is None or read[0] is not params or read[1] != needed:
            engine, members = backends.engine(), self._members[k]
            if not engine.holds(params, members):
                raise ValueError(f"{self._name}: param_groups[{k}]['params'] is fixed; see add_param_group and update")
            lacking = engine.first_lacking(members, needed)
            if lacking is not None:
                raise ValueError(
                    f"{self._name}: param_groups[{k}] now needs the state {lacking[1]!r}, which {lacking[0].label} "
                    "does not have: hyperparameters that add state are set at construction"
                )
            group["params"] = tuple(params)  # a list could change later
            self._read[k] = (group["params"], needed)
        group.update(values)
        return kernel_and_hypers(self.spec, values)

    def _settle(self) -> None:
        """Know of every step whether it was applied: on a GPU that can take waiting."""
        if self._plan is not None and self.backend == "cuda":
            self._plan.settle()

    def _on_gpu(self, what: str) -> Any:
        """The plan of an optimizer on a GPU."""
        if self.backend != "cuda":
            raise RuntimeError(f"{self._name}: {what} is for arrays on a GPU")
        return self._planned()

    def _refuse_regrouping(self) -> NoReturn:
        raise ValueError(
            f"{self._name}: param_groups must keep its dicts: change values inside them, add with add_param_group"
        )


def _listed(params: Any) -> Any:
    """`params` with lists for iterables, of parameters or of groups, so that one can look into them more than once."""
    if params is None or _is_array(params) or isinstance(params, str | bytes | set | frozenset):
        return params
    if isinstance(params, Mapping) or not isinstance(params, Iterable) or hasattr(params, "__array__"):
        return params
    items = list(params)
    for k, item in enumerate(items):
        if isinstance(item, dict) and "params" in item:
            items[k] = {**item, "params": _listed(item["params"])}
    return items


def _shown(values: Mapping[str, Any]) -> str:
    """Values as arguments are written."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _is_array(value: Any) -> bool:
    """Whether `value` is one array, of the host or a GPU."""
    return issubclass(type(value), np.ndarray) or hasattr(value, "__array_interface__") or backends.lives_on_gpu(value)


def _next_index(tensors: Sequence[Any]) -> int:
    """Index of the element after those of `tensors`."""
    return tensors[-1].index + tensors[-1].size if tensors else 0


def kernel_and_hypers(spec: Spec, values: Mapping[str, Any]) -> tuple[str, tuple[float, ...]]:
    """Name of the kernel of `spec` for the hyperparameters `values`, and what its host scalars read of them."""
    stage = spec.stage_values(values)
    name = spec.kernel_name(spec.flags(values), _stages.regularized(stage))
    hyper = [float(value) for value in stage.values()]
    for own in spec.scalar_hypers:
        if own not in stage:
            hyper += spec.hypers[own].kind.flatten(values[own])
    return name, tuple(hyper)
