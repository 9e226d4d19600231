"""Promise 3, the part that a compiler can be asked: every kernel's loop is vectorized, on every instruction set."""

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
FUNCTION = re.compile(r"^static .*__pyx_f_\d*probe_(\w+)\(.*\{$")
REPORT = re.compile(r"\.c:(\d+):\d+: optimized: loop vectorized")

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="asks GCC for its vectorization report"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The generated kernels as C."""
    pytest.importorskip("Cython", reason="generating kernels needs Cython")
    from Cython.Compiler.Main import compile as cythonize

    path = tmp_path_factory.mktemp("vectorized") / "probe.pyx"
    path.write_text(_codegen.cython_source(registry.values(), KERNELS / "kernels.pyx.in", "test"))
    return Path(cythonize(str(path), include_path=[str(KERNELS)], language_level=3).c_file)


@pytest.fixture(scope="module")
def compilers(source):
    """GCC, compiling for every instruction set at once."""
    command = ["gcc", "-fPIC", "-c", str(source), f"-I{KERNELS}", f"-I{sysconfig.get_paths()['include']}"]
    started = {}
    for row in for_this_machine():
        report = ["-fopt-info-vec-optimized", "-o", str(source.with_suffix(f".{row.name}.o"))]
        started[row.name] = subprocess.Popen(
            [*command, *_codegen.FLAGS, *row.flags, *report], stderr=subprocess.PIPE, text=True
        )
    yield started
    for compiler in started.values():
        compiler.kill()
        compiler.wait()
        compiler.stderr.close()


@pytest.mark.parametrize("instruction_set", for_this_machine(), ids=lambda row: row.name)
def test_every_loop_is_vectorized(compilers, source, instruction_set):
    compiler = compilers[instruction_set.name]
    report = compiler.communicate()[1]
    assert compiler.returncode == 0, report
    vectorized = {int(line) for line in REPORT.findall(report)}
    loops, function = {}, None
    for number, text in enumerate(source.read_text().splitlines(), 1):
        if match := FUNCTION.match(text):
            function = match[1]
        if function and function.endswith("_span") and re.match(r"\s+for \(", text):
            loops[number] = function
    assert len(loops) >= 30
    assert [function for number, function in loops.items() if number not in vectorized] == []
