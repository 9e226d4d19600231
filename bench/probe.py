"""The roof: kernels that move the same bytes as a rule, with at most one addition, run by the same engine.

A step reads p, g and k states and writes p and the states: 12 + 8 k bytes a parameter. The probe for k states
reads and writes just those streams, through the loop, the blocks, the prefetch and the threads of every other
kernel, and passes their values round: each is read to be stored somewhere else, so that no load can be left out
(a test compares what comes out).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from bench.buffers import Buffers, adopt
from bench.peers import Contestant
from bench.workloads import Workload
from fastopt import _codegen
from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt._instruction_sets import INSTRUCTION_SETS
from fastopt.backends import compiled
from fastopt.rules import NonNegative, Spec

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "probes"
STAGE = "g = clip_coefficient * (grad_scale * g)"
"""What the gradient stage puts in front of every rule; not for the probes."""


class _Probe(Optimizer):
    def __init__(self, params: Params | None = None, lr: NonNegative = 0.0, **options: Unpack[Options]) -> None:
        super().__init__(params, lr=lr, **options)

    @staticmethod
    def scalars(step, lr):
        return dict(lr=lr)  # noqa: C408  the rule language


class Probe0(_Probe):
    """Reads two streams, writes one."""

    @staticmethod
    def rule(p, g):
        p = p + g
        return (p,)

    @staticmethod
    def reference(p, g, *, step):
        return (p + g,)


class Probe1(_Probe):
    """Reads three streams, writes two."""

    states = {"a": 0.0}

    @staticmethod
    def rule(p, g, a):
        old = p
        p = a + g
        a = old
        return p, a

    @staticmethod
    def reference(p, g, a, *, step):
        return a + g, p


class Probe2(_Probe):
    """Reads four streams, writes three."""

    states = {"a": 0.0, "b": 0.0}

    @staticmethod
    def rule(p, g, a, b):
        old = p
        p = a + g
        a = b
        b = old
        return p, a, b

    @staticmethod
    def reference(p, g, a, b, *, step):
        return a + g, b, p


class Probe3(_Probe):
    """Reads five streams, writes four."""

    states = {"a": 0.0, "b": 0.0, "c": 0.0}

    @staticmethod
    def rule(p, g, a, b, c):
        old = p
        p = a + g
        a = b
        b = c
        c = old
        return p, a, b, c

    @staticmethod
    def reference(p, g, a, b, c, *, step):
        return a + g, b, c, p


PROBES = (Probe0, Probe1, Probe2, Probe3)
for _made in PROBES:
    _made.spec = Spec(_made)  # like `register`, but no optimizer of the registry


def bytes_of(n_states: int) -> int:
    """Bytes a parameter that the probe with so many states moves."""
    return 12 + 8 * n_states


def passes(bytes_per_parameter: float) -> list[int]:
    """Numbers of states of the probes that, run one after the other, move at most so many bytes, and nearly all.

    One for most rules. 40 bytes (LAMB: norms, then the update) are one of 28 and one of 12. What is left over, as
    with states in low precision, is accounted for by the ratio of the bytes.
    """
    n_states = max(0, min(len(PROBES) - 1, int(bytes_per_parameter - 12) // 8))
    left = bytes_per_parameter - bytes_of(n_states)
    if left > 0 and left % 8 == 4 and n_states:  # an odd number of streams more: a pass of three, and one of the rest
        return [*passes(bytes_per_parameter - 12), 0]
    return [n_states]


# --- Building ---------------------------------------------------------------------------------------------


def source(isa: str) -> str:
    """The Cython text of the probes for one instruction set."""
    specs = [made.spec for made in PROBES]
    text = _codegen.cython_source(specs, ROOT / "kernels" / "kernels.pyx.in", isa)
    if text.count(STAGE) < len(PROBES):  # and once more in every kernel for states in low precision
        raise AssertionError(f"expected {STAGE!r} in the kernel of every probe")
    return text.replace(STAGE, "g = g")


@functools.cache
def build() -> None:
    """Make the probes of the instruction set in use known to the engine; compile them unless done before."""
    isa = compiled.isa()
    text = source(isa)
    flags = [*_codegen.FLAGS, *INSTRUCTION_SETS[isa].flags]
    files = sorted(path for path in (ROOT / "kernels").iterdir() if path.suffix in (".h", ".pxd"))
    headers = _codegen.formats_header() + "".join(path.read_text(encoding="utf-8") for path in files)
    made = hashlib.sha256(repr((text, headers, flags, sys.version)).encode()).hexdigest()[:16]
    compiled.add_kernels(_module(text, flags, CACHE / made).KERNELS)


def _module(text: str, flags: list[str], folder: Path) -> Any:
    name = "fastopt_probes"
    found = list(folder.glob(f"{name}.*.so")) + list(folder.glob(f"{name}*.pyd"))
    path = found[0] if found else _compile(text, flags, folder, name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(text: str, flags: list[str], folder: Path, name: str) -> Path:
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pyx"
    path.write_text(text, encoding="utf-8")
    (folder / "formats.h").write_text(_codegen.formats_header(), encoding="utf-8")
    include = [str(ROOT / "kernels"), str(folder)]
    extension = Extension(name, [str(path)], include_dirs=include, extra_compile_args=flags)
    made = cythonize([extension], include_path=include, build_dir=str(folder), quiet=True)
    command: Any = Distribution({"ext_modules": made}).get_command_obj("build_ext")
    command.build_lib = command.build_temp = str(folder)
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(name))


# --- The contestant ---------------------------------------------------------------------------------------


def prepare(workload: Workload, buffers: Buffers) -> tuple[Contestant, int]:
    """The probe of a workload on its buffers, and the bytes a parameter that one of its steps moves."""
    build()
    steps = []
    moved = 0
    names = list(buffers.states)
    for n_states in passes(workload.bytes_per_parameter):
        optimizer = PROBES[n_states](buffers.params, n_threads=workload.n_threads)
        adopt(optimizer, buffers.states, dict(zip(optimizer.spec.states, names, strict=False)))
        steps.append(optimizer)
        moved += bytes_of(n_states)
    grads = buffers.grads

    def step() -> None:
        for optimizer in steps:
            optimizer.step(grads)

    return Contestant(step, lambda: buffers.params, leaves_garbage=True), moved
