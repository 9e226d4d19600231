"""Kernels by name: generated, written to the cache, compiled when first launched, kept configured.

The text of a kernel is a Python module of its own in the cache folder (FASTOPT_CACHE_DIR, or fastopt/cuda in the user's
cache folder), so Numba keeps the compiled code beside it and the next process compiles nothing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from numba import cuda

from fastopt import _codegen, _formats
from fastopt._codegen import cuda as codegen
from fastopt._formats import constants
from fastopt._info import __version__
from fastopt.backends.cuda import memory, stages
from fastopt.backends.cuda.operations import SIMULATED
from fastopt.rules.registry import registry
from fastopt.rules.spec import Spec

THREADS = 16 if SIMULATED else 256
"""Threads of a block, in kernels that loop over tiles: a multiple of 16, since 16 threads encode a block of 8-bit codes
together."""
TILE = 4 * THREADS
"""Elements that the threads of a block process in one iteration."""
MAX_BLOCKS = 16 if SIMULATED else 132 * 32
"""Blocks of a launch at most; each then processes every MAX_BLOCKS-th tile."""
WARP_THREADS = 32 if SIMULATED else 256
"""Threads of a block, in kernels where each warp has a task of its own."""
BLOCKS_PER_MULTIPROCESSOR = 4
"""Blocks that must fit on a multiprocessor together: the compiler may then use 64 registers a thread, and the loads of
1,024 threads are in flight at once."""


def cache_folder() -> Path:
    """Where generated kernels are kept."""
    if folder := os.environ.get("FASTOPT_CACHE_DIR"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "fastopt", "cuda")


@functools.cache
def _origin() -> bytes:
    """What a kernel depends on beside its own text."""
    digest = hashlib.sha256(f"{__version__} {sys.version} {_version('numba-cuda')} {_version('numba')}".encode())
    for module in ("codecs", "kernels", "layout", "operations", "stages"):
        digest.update(Path(__file__).with_name(f"{module}.py").read_bytes())
    digest.update(Path(constants.__file__).read_bytes())
    digest.update("".join(stages.TEXTS).encode())
    return digest.digest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _module(name: str, text: str) -> tuple[ModuleType, bool]:
    """The module of a generated kernel, and whether it could be kept in the cache."""
    source = codegen.module_source(name, text, __version__)
    key = hashlib.sha256(_origin() + source.encode()).hexdigest()[:16]
    is_kept = True
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}_{key}.py"
        if not path.exists() or path.read_text(encoding="utf-8") != source:
            _write(path, source)
    except OSError:  # a cache that cannot be written costs compiling in every process, nothing else
        is_kept = False
        path = Path(tempfile.mkdtemp(prefix="fastopt-")) / f"{name}_{key}.py"
        _write(path, source)
    spec = importlib.util.spec_from_file_location(f"fastopt_kernels_{name}_{key}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module, is_kept


def _write(path: Path, text: str) -> None:
    """In one go: another process may be doing the same."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)


@functools.cache
def _kernels() -> dict[str, tuple[Spec, _codegen.Kernel]]:
    found: dict[str, tuple[Spec, _codegen.Kernel]] = {}
    for spec in registry.values():
        for kernel in _codegen.kernels(spec):
            found.setdefault(kernel.name, (spec, kernel))
    return found


def rules() -> list[str]:
    """Names of the rules that have a kernel, one for each combination of an optimizer's flags."""
    return sorted(_kernels())


def description(rule: str) -> _codegen.Kernel:
    """What is known of a rule's kernel."""
    return _kernels()[rule][1]


def function(rule: str, state_dtype: str) -> tuple[Any, bool]:
    """The Python function of a rule's kernel, and whether it is in the cache."""
    module, is_kept = _module(f"{rule}_{state_dtype}", codegen.kernel_source(_kernels()[rule][1], state_dtype))
    return getattr(module, rule), is_kept


def trust_function(spec: Spec) -> tuple[Any, bool]:
    """The same for the kernel that computes trust ratios."""
    module, is_kept = _module(f"{spec.rule_name}_trust", codegen.trust_source(spec))
    return getattr(module, f"{spec.rule_name}_trust"), is_kept


SHARED = {
    "accumulate_gradients": (THREADS, 3),
    "apply_update": (THREADS, 4),
    "decide": (32, 4),
    "exchange_averages": (THREADS, 4),
    "copy_parameters": (THREADS, 4),
    "fill_words": (THREADS, 3),
    **{f"sum_{what}": (WARP_THREADS, 5) for what in codegen.SUMS},
}
"""Kernels that are the same for all rules: threads of a block, number of arguments."""


def shared_function(name: str) -> tuple[Any, bool]:
    """The same for one of `SHARED`; hand-written ones are copied into the cache, which notices when they change."""
    if name.startswith("sum_"):
        text = codegen.sum_source(name.removeprefix("sum_"))
    else:
        text = "\n" + inspect.getsource(getattr(stages, name))
    module, is_kept = _module(name, text)
    return getattr(module, name), is_kept


def options(threads: int) -> dict[str, Any]:
    """How kernels are compiled."""
    return {} if SIMULATED else {"launch_bounds": (threads, BLOCKS_PER_MULTIPROCESSOR)}


class Compiled:
    """A kernel that is compiled and loaded when first launched; later launches go straight to the driver."""

    def __init__(self, function: Any, is_kept: bool, threads: int) -> None:
        self.threads = threads
        self._compiled = cuda.jit(cache=is_kept, **options(threads))(function)
        self._loaded: dict[int, memory.Kernel] = {}

    def launch(self, n_blocks: int, stream: int, *arguments: int) -> None:
        device = memory.current_device()
        loaded = self._loaded.get(device)
        if loaded is not None:
            loaded.launch(n_blocks, self.threads, stream, arguments)
            return
        if SIMULATED:
            self._compiled[n_blocks, self.threads](*arguments)
            return
        with memory.quiet():
            self._compiled[n_blocks, self.threads, memory.numba_stream(stream)](*arguments)
        (overload,) = self._compiled.overloads.values()
        self._loaded[device] = memory.Kernel(overload, len(arguments))


@functools.cache
def compiled(rule: str, state_dtype: str) -> Compiled:
    """The kernel of a rule."""
    return Compiled(*function(rule, state_dtype), THREADS)


@functools.cache
def compiled_trust(rule_name: str) -> Compiled:
    """The kernel of an optimizer's trust ratio."""
    spec = next(spec for spec in registry.values() if spec.rule_name == rule_name)
    return Compiled(*trust_function(spec), WARP_THREADS)


@functools.cache
def shared(name: str) -> Compiled:
    """A kernel that is the same for all rules."""
    return Compiled(*shared_function(name), SHARED[name][0])


def ptx(rule: str, cc: tuple[int, int] = (9, 0), state_dtype: str = "float32") -> str:
    """PTX of a rule's kernel, compiled without a GPU.

    Parameters
    ----------
    rule
        One of `rules`.
    cc : (int, int), default (9, 0)
        Compute capability to compile for.
    state_dtype : {"float32", "bfloat16", "8bit"}
        Of the states.

    Raises
    ------
    ValueError
        For an unknown rule or state_dtype.
    RuntimeError
        Under Numba's simulator, which compiles nothing.
    """
    if rule not in _kernels():
        raise ValueError(f"rule must be one of fastopt.cuda.rules(), got {rule!r}")
    if state_dtype not in _formats.STATE_DTYPES:
        raise ValueError(f"state_dtype must be one of {', '.join(_formats.STATE_DTYPES)}, got {state_dtype!r}")
    return compile_ptx(function(rule, state_dtype)[0], 4, THREADS, cc)


def compile_ptx(function: Any, n_arguments: int, threads: int, cc: tuple[int, int]) -> str:
    """PTX of a kernel that takes so many addresses and numbers."""
    if SIMULATED:
        raise RuntimeError("Numba's simulator (NUMBA_ENABLE_CUDASIM=1) makes no PTX")
    from numba.cuda import types

    signature = types.void(*[types.int64] * n_arguments)
    return cuda.compile_ptx(function, signature, cc=cc, **options(threads))[0]
