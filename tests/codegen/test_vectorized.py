"""Promise 3, the part that a compiler can be asked: every kernel's loop is vectorized, on every instruction set."""

import functools
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from fastopt import _codegen
from fastopt._instruction_sets import for_this_machine
from fastopt.rules import registry

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
FUNCTION = re.compile(r"^static .*__pyx_f_\d*part_\d_(\w+)\(.*\{$")
REPORT = re.compile(r"\.c:(\d+):\d+: optimized: loop vectorized")

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="asks GCC for its vectorization report"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64"),
]


ROWS = for_this_machine()
CASES = [
    pytest.param(row, part, id=f"{row.name}-{part}", marks=() if of_row == part else pytest.mark.exhaustive)
    for of_row, row in enumerate(ROWS)
    for part in range(len(ROWS))
]
"""Optimizers are compiled in as many parts as there are instruction sets: in the default tier, each for another one."""


@functools.cache
def source(folder, part):
    """The generated kernels of a part as C."""
    from Cython.Compiler.Main import compile as cythonize

    path = folder / f"part_{part}.pyx"
    specs = list(registry.values())[part :: len(ROWS)]
    path.write_text(_codegen.cython_source(specs, KERNELS / "kernels.pyx.in", "test"))
    return Path(cythonize(str(path), include_path=[str(KERNELS)], language_level=3).c_file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("Cython", reason="generating kernels needs Cython")
    folder = tmp_path_factory.mktemp("vectorized")
    (folder / "formats.h").write_text(_codegen.formats_header())
    return folder


@pytest.mark.parametrize(("instruction_set", "part"), CASES)
def test_every_loop_is_vectorized(folder, instruction_set, part):
    path = source(folder, part)
    include = [f"-I{place}" for place in (KERNELS, folder, sysconfig.get_paths()["include"])]
    command = ["gcc", "-fPIC", "-S", str(path), *include]
    report = ["-fopt-info-vec-optimized", "-o", os.devnull]
    compiled = subprocess.run(
        [*command, *_codegen.FLAGS, *instruction_set.flags, *report], capture_output=True, text=True
    )
    assert compiled.returncode == 0, compiled.stderr
    vectorized = {int(line) for line in REPORT.findall(compiled.stderr)}
    loops, function = {}, None
    for number, text in enumerate(path.read_text().splitlines(), 1):
        if match := FUNCTION.match(text):
            function = match[1]
        if function and function.endswith("_span") and re.match(r"\s+for \(", text):
            loops[number] = function
    assert len(loops) * len(ROWS) >= 30
    assert [function for number, function in loops.items() if number not in vectorized] == []
