"""What is measured, generated from the registry: optimizers x sizes, model shapes, the tail, hard inputs, threads.

No buffers and no clock: those are in `buffers` and `race`.
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import fastopt
from fastopt import _codegen, _formats
from fastopt._core.options import Options
from fastopt.rules import Spec, Switch, registry
from fastopt.rules.host_scalars import kernel_and_hypers

Shape = tuple[int, ...]
Hypers = tuple[tuple[str, Any], ...]
"""Hyperparameters that are not at their defaults, as pairs: a dict has no hash."""

SECTIONS = ("curves", "models", "tail", "states", "hard", "threads")
MOMENTUM: Hypers = (("momentum", 0.9),)
TAIL_OPTIONS: Hypers = (("copy_dtype", "bfloat16"), ("ema_decay", 0.999))
TAIL_BYTES = {"norm": 4, "average": 8, "bfloat16 copy": 2, "zero": 4}
"""Bytes a parameter that each part of the tail moves beside the update: every array read or written once."""


@dataclass(frozen=True)
class Input:
    """What gradients and states hold."""

    gradient: str
    """"normal", "zero", "tiny" (normal times 1e-20) or "NaN"."""
    state: float | None = None
    """Every element of every state; None for its initial value."""


INPUTS = {
    "normal": Input("normal"),
    # A moment that decays with nothing added rounds back to itself a few units above zero: there for good.
    "zero gradients, subnormal states": Input("zero", 1e-39),
    "gradients near 1e-20": Input("tiny", 1e-40),
    "NaN gradients": Input("NaN"),
}


@dataclass(frozen=True)
class Workload:
    """One step to be measured, by every contestant that can take it."""

    section: str
    function: str
    label: str
    shapes: tuple[Shape, ...]
    n_threads: int
    hypers: Hypers = ()
    form: str = "array"
    """How fastopt gets the tensors: one "array", a "list", or a "FlatBuffer"."""
    input: str = "normal"
    options: Hypers = ()
    """Of the optimizer: what it keeps, and how."""
    backend: str = "cpu"
    priority: int = 0
    """Lower ones are measured first, and so are the last to be left out for want of time."""

    @property
    def spec(self) -> Spec:
        return registry[self.function]

    @property
    def title(self) -> str:
        """The optimizer and what is not at its default."""
        words = [name if value is True else f"{name} {value:g}" for name, value in self.hypers]
        return ", ".join([self.spec.name, *words])

    @property
    def id(self) -> str:
        return f"{self.section}/{self.title}/{self.label}"

    @property
    def n(self) -> int:
        """Parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def values(self) -> dict[str, Any]:
        """Every hyperparameter."""
        defaults = {name: hyper.default for name, hyper in self.spec.hypers.items()}
        return self.spec.check(defaults | dict(self.hypers))

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state arrays."""
        return self.spec.states_for(self.spec.flags(self.values))

    @property
    def is_tail(self) -> bool:
        return self.section == "tail"

    @property
    def bytes_per_parameter(self) -> int:
        """What one step has to move at least, with states in float32."""
        once = bytes_moved(self.function, self.hypers)
        return once + sum(TAIL_BYTES.values()) if self.is_tail else once

    @property
    def footprint(self) -> int:
        """Bytes of parameters, gradients and states."""
        return 4 * (2 + len(self.states)) * self.n


@functools.cache
def bytes_held(function: str, hypers: Hypers, options: Hypers) -> float:
    """Bytes a parameter of all arrays that a step of the optimizer walks over."""
    spec = registry[function]
    values = spec.check({name: hyper.default for name, hyper in spec.hypers.items()} | dict(hypers))
    chosen = dict(options)
    dtype = chosen.get("state_dtype", "float32")
    states = spec.states_for(spec.flags(values))
    held = 8 + sum(_formats.codec(dtype, spec.kinds[state]).bytes_per_element for state in states)
    return held + 4 * ("ema_decay" in chosen) + 2 * ("copy_dtype" in chosen)


@functools.cache
def bytes_moved(function: str, hypers: Hypers) -> int:
    """Bytes a parameter that a step of the optimizer reads and writes, from its kernel."""
    spec = registry[function]
    values = spec.check({name: hyper.default for name, hyper in spec.hypers.items()} | dict(hypers))
    flags = spec.flags(values)
    name = kernel_and_hypers(spec, values)[0]
    kernels = {kernel.name: kernel for kernel in _codegen.kernels(spec)}
    return (kernels.get(name) or kernels[spec.kernel_name(flags, False)]).bytes_moved


def variants(function: str) -> list[Hypers]:
    """Defaults, each optional state switched on alone, and all of them together."""
    spec = registry[function]
    found: list[Hypers] = [()]
    switched = []
    for flag in dict.fromkeys(spec.optional_states.values()):
        name = flag if flag in spec.hypers else flag.removeprefix("with_")
        value: Any = True if isinstance(spec.hypers[name].kind, Switch) else 0.9
        switched.append((name, value))
        found.append(((name, value),))
    if len(switched) > 1:
        found.append(tuple(switched))
    if "decoupled_weight_decay" in spec.hypers:
        found.append((("decoupled_weight_decay", True), ("weight_decay", 0.01)))
    return found


def state_dtypes() -> list[str]:
    """Values of the option `state_dtype` beside float32, if optimizers have that option."""
    hints = typing.get_type_hints(Options)
    named = _strings(hints.get("state_dtype"))
    return [name for name in named if name != "float32"]


def masters() -> list[str]:
    """Values of the option `master`, if optimizers have that option."""
    return _strings(typing.get_type_hints(Options).get("master"))


def _strings(annotation: Any) -> list[str]:
    """The strings in a (union of a) Literal."""
    if typing.get_origin(annotation) is typing.Literal:
        return [value for value in typing.get_args(annotation) if isinstance(value, str)]
    return [text for part in typing.get_args(annotation) for text in _strings(part)]


# --- Sizes and shapes -------------------------------------------------------------------------------------


def size_name(n: int) -> str:
    """A power of two from 2^8 on as "2^16", another number as "1e5" or "5e7", or as it is."""
    if n >= 256 and n & (n - 1) == 0:
        return f"2^{n.bit_length() - 1}"
    mantissa, exponent = f"{n:e}".split("e")
    short = f"{float(mantissa):g}e{int(exponent)}"
    return short if n >= 1000 and float(short) == n and len(short) <= 5 else str(n)


def gpt2_small() -> list[Shape]:
    """124M parameters in 148 tensors."""
    d = 768
    block: list[Shape] = [
        *[(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)],
        *[(d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)],
    ]
    return [(50257, d), (1024, d), *block * 12, (d,), (d,)]


def resnet50() -> list[Shape]:
    """25.6M parameters in 161 tensors."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for k in range(blocks):
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if k == 0:
                convolutions.append((4 * width, inputs, 1, 1))
            for shape in convolutions:
                shapes += [shape, (shape[0],), (shape[0],)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


MODELS: dict[str, list[Shape]] = {
    "small MLP": [(64, 100), (100,), (100, 100), (100,), (100, 10), (10,)],
    "1,000 x 64": [(64,)] * 1000,
    "ResNet-50": resnet50(),
    "GPT-2 small": gpt2_small(),
}


# --- Modes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mode:
    """How much is measured, in how much time."""

    seconds: float
    """For the measurements; reading packages, report and plots come on top."""
    rounds: int
    sizes: tuple[int, ...]
    optimizers: tuple[tuple[str, Hypers], ...] | None
    """Of the curves; None for every optimizer of the registry and every variant."""
    step_limit: float
    """Seconds: a peer whose step takes longer is left out."""
    models: tuple[str, ...]
    hard: tuple[tuple[str, Hypers], ...] = (("adam", ()),)
    thread_sizes: tuple[int, ...] = (10**7,)
    block: float = 0.020
    """Seconds of measured steps of a contestant in a round."""
    gpu_sizes: tuple[int, ...] = tuple(10**k for k in range(3, 9))
    """Sizes of the curves on a GPU."""
    builds_peers: bool = False
    """Whether peers may build themselves first, for minutes."""


_QUICK_ON_GPU = (10**3, 10**5, 10**7)
_QUICK = tuple(2**k for k in range(8, 21, 4))
_SIZES = tuple(2**k for k in range(8, 27, 2))
TINY = 16
PROMISED = (TINY, 10**3, 10**5, 10**7)
FROM_MEMORY = 4
"""Times the last-level cache that the arrays of a step must fill for its figures to be those of memory."""
LARGEST = 5 * 10**7
"""Parameters of the largest steps; more where `FROM_MEMORY` asks for it."""
PROMISED_LARGE = ("adam", "adamw", "sgd", "adagrad")
"""Optimizers that torch fuses: measured from memory, too."""
GPU_SECTIONS = ("curves", "models", "tail", "states")
"""What is measured on a GPU: it has no threads to be counted, and no time for subnormals to be lost in."""
MODES = {
    "quick": Mode(
        88,
        5,
        _QUICK,
        (("adam", ()), ("sgd", MOMENTUM)),
        0.05,
        ("small MLP", "1,000 x 64"),
        block=0.01,
        gpu_sizes=_QUICK_ON_GPU,
    ),
    "default": Mode(
        540,
        7,
        _SIZES,
        (("adam", ()), ("sgd", MOMENTUM), ("adagrad", ()), ("lion", ()), ("adamw", ()), ("rmsprop", ())),
        0.4,
        tuple(MODELS),
        (("adam", ()), ("sgd", MOMENTUM)),
        (10**5, 10**7),
    ),
    "full": Mode(
        1650,
        11,
        _SIZES,
        None,
        1.0,
        tuple(MODELS),
        (("adam", ()), ("sgd", MOMENTUM), ("adagrad", ()), ("lion", ()), ("rmsprop", ())),
        (10**5, 10**7),
        gpu_sizes=tuple(10**k for k in range(3, 10)),
        builds_peers=True,
    ),
}


# --- The list ---------------------------------------------------------------------------------------------


def thread_counts(n_threads: int) -> list[int]:
    """1, 2, 4 and so on, and `n_threads` itself."""
    powers = [2**k for k in range(n_threads.bit_length()) if 2**k < n_threads]
    return [*powers, n_threads]


def workloads(
    mode: Mode,
    optimizers: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    backend: str = "cpu",
    cache: int | None = None,
    memory: int | None = None,
) -> list[Workload]:
    """Everything that `mode` measures, the most important first.

    `optimizers` and `sizes` replace those of the curves, and with either of them there are only curves. Of
    `threads` the largest is used everywhere, all of them for the scaling over threads. `cache` and `memory` are bytes
    of the machine's last-level cache and of its memory, by which the largest steps are chosen.
    """
    n_threads = max(threads) if threads else fastopt.get_num_threads()

    def largest(function: str, hypers: Hypers, options: Hypers = ()) -> int:
        return from_memory(bytes_held(function, hypers, options), cache, memory)

    found = list(_curves(mode, n_threads, optimizers, sizes, backend, largest))
    if not (optimizers or sizes):
        found += _models(mode, n_threads)
        found += _states(mode, n_threads, largest)
        found += _hard(mode, n_threads)
        found += _threads(mode, sorted(set(threads)) if threads else thread_counts(n_threads))
    if backend == "cuda":
        found = [one for one in found if one.section in GPU_SECTIONS and "master" not in dict(one.options)]
    ordered = sorted(found, key=lambda workload: workload.priority)
    return [replace(workload, backend=backend) for workload in ordered]


def from_memory(held: float, cache: int | None, memory: int | None) -> int:
    """Parameters of `held` bytes each from which on they fill the cache `FROM_MEMORY` times, at least `LARGEST`.

    As many as there is room for where that is less: then no figure is one of memory.
    """
    least = FROM_MEMORY * (cache or 0) / held
    choices = [digit * 10**power for power in range(7, 10) for digit in (1, 2, 3, 5)]
    fitting = [n for n in choices if n <= LARGEST or memory is None or 4 * held * n <= memory]
    return next((n for n in fitting if n >= max(least, LARGEST)), fitting[-1])


def _curves(
    mode: Mode,
    n_threads: int,
    optimizers: Sequence[str] | None,
    sizes: Sequence[int] | None,
    backend: str,
    largest: Callable[[str, Hypers], int],
) -> Iterator[Workload]:
    """Every size of the first optimizer, then the sizes that promises name, then the rest."""

    def cell(function: str, hypers: Hypers, n: int, priority: int) -> Workload:
        return Workload("curves", function, size_name(n), ((n,),), n_threads, hypers, priority=priority)

    if optimizers:
        chosen = [(name, MOMENTUM if name == "sgd" else ()) for name in optimizers]
    else:
        chosen = list(mode.optimizers or _all_variants())
    for k, (function, hypers) in enumerate(chosen):
        own = set(sizes or (mode.gpu_sizes if backend == "cuda" else mode.sizes))
        if not sizes and backend == "cuda" and hypers and function != "sgd":
            own = {10**8}
        elif not sizes and backend == "cpu":
            own |= set(PROMISED)
            large = mode.seconds > 1000 and function in PROMISED_LARGE and not bool(hypers) ^ (function == "sgd")
            own |= {largest(function, hypers)} if large or (mode.seconds > 200 and k < 2) else set()
            if hypers and function != "sgd":
                own = {10**7}  # variants: what one more state costs where memory is the limit
        for n in sorted(own):
            promised = not sizes and (n in PROMISED or n >= LARGEST)
            yield cell(function, hypers, n, 10 if k == 0 else 30 if promised else 40 + k)


def _all_variants() -> list[tuple[str, Hypers]]:
    """The optimizers of the default mode first, then the rest of the registry, variants last."""
    first = list(MODES["default"].optimizers or ())
    plain = [(name, ()) for name in registry if (name, ()) not in first]
    others = [(name, hypers) for name in registry for hypers in variants(name)[1:] if (name, hypers) not in first]
    return [*first, *plain, *others]


def _models(mode: Mode, n_threads: int) -> Iterator[Workload]:
    for k, name in enumerate(mode.models):
        shapes = tuple(MODELS[name])
        yield Workload("tail", "adamw", name, shapes, n_threads, (), "list", options=TAIL_OPTIONS, priority=20 + k)
        yield Workload("models", "adam", name, shapes, n_threads, (), "list", priority=22 + k)
        if name == "1,000 x 64":
            label = f"{name}, FlatBuffer"
            yield Workload("models", "adam", label, shapes, n_threads, (), "FlatBuffer", priority=22 + k)


def _states(mode: Mode, n_threads: int, largest: Callable[[str, Hypers, Hypers], int]) -> Iterator[Workload]:
    """Every way to keep fewer bytes, for Adam at some sizes; in long runs at the largest, and for two rules more."""
    choices: list[Hypers] = [(("state_dtype", name),) for name in state_dtypes()]
    choices += [(("master", name),) for name in masters()]
    long = mode.seconds > 200
    for options in choices:
        cells: list[tuple[str, Hypers, int]] = [("adam", (), n) for n in (10**3, 10**5, 10**7)]
        if long:
            n = largest("adam", (), options)
            cells += [("adam", (), n), ("lion", (), 10**7), ("sgd", MOMENTUM, 10**7)]
        for function, hypers, n in cells:
            words = ", ".join(f"{name} {value}" for name, value in options)
            label = f"{words}, {size_name(n)}"
            yield Workload("states", function, label, ((n,),), n_threads, hypers, options=options, priority=26)


def _hard(mode: Mode, n_threads: int) -> Iterator[Workload]:
    n = 10**5
    for function, hypers in mode.hard:
        for name in INPUTS:
            label = f"{name}, {size_name(n)}"
            yield Workload("hard", function, label, ((n,),), n_threads, hypers, input=name, priority=28)


def _threads(mode: Mode, counts: Sequence[int]) -> Iterator[Workload]:
    for n in mode.thread_sizes:
        for count in counts:
            yield Workload("threads", "adam", f"{size_name(n)}, {count} threads", ((n,),), count, priority=29)
