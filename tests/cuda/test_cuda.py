"""The CUDA backend without a GPU: what its kernels compile to, what is kept, what is refused.

Bits are compared in `tests/cuda/device`, on a GPU or in Numba's simulator.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastopt
from fastopt import backends
from fastopt._formats import STATE_DTYPES
from fastopt.backends import compiled
from fastopt.rules import registry

try:
    backends.resolve("cuda")
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

from fastopt import cuda
from fastopt.backends.cuda import kernels, operations
from tests.support.configs import DEFAULTS

if operations.SIMULATED:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]


def run(code, **environment):
    """A Python process that sees no GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT
    )


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache folder of this module's own."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTOPT_CACHE_DIR", str(folder))
        yield folder


# --- What kernels compile to


def arithmetic(ptx):
    """Floating-point instructions that round, without their operands."""
    names = "add|sub|mul|fma|mad|div|sqrt|rcp|rsqrt|ex2|lg2"
    return re.findall(rf"^\s*(?:@!?%p\d+ )?((?:{names})\.[\w.]*f(?:32|64))\s", ptx, re.MULTILINE)


def assert_exactly_rounded(ptx, doubles=False):
    """Every operation rounds to nearest on its own; float64 only where it is asked for."""
    allowed = {f"{name}.rn.ftz.f32" for name in ("add", "mul", "div", "sqrt")}
    if doubles:
        allowed |= {f"{name}.rn.f64" for name in ("add", "mul", "div", "sqrt")}
    found = set(arithmetic(ptx))
    assert found, "no arithmetic at all"
    assert found <= allowed, found - allowed
    assert "fma" not in ptx
    assert not re.search(r"\bcall\b", ptx), "a call of a function that was not pasted in"


def count(pattern, ptx):
    return len(re.findall(pattern, ptx))


OF_DEFAULTS = {config.kernel for config in DEFAULTS}
RULES = [rule if rule in OF_DEFAULTS else pytest.param(rule, marks=pytest.mark.exhaustive) for rule in cuda.rules()]


@pytest.mark.covering(1)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_compiles_to_exactly_rounded_float32_and_wide_accesses(rule, state_dtype):
    ptx = cuda.ptx(rule, cc=(9, 0), state_dtype=state_dtype)
    assert ".target sm_90" in ptx
    assert_exactly_rounded(ptx)
    assert ".f64" not in re.sub(r"//.*", "", ptx)
    assert ".local" not in ptx, "values in memory that belong into registers"
    kernel = kernels.description(rule)
    codec = kernel.codec(state_dtype).name
    wide = 2 + (len(kernel.states) if codec == "float32" else 0)  # parameters, gradients, states
    # an update may not depend on the parameters: then the compiler leaves them where they are
    assert count(r"ld\.global\.v4\.[fbu]32", ptx) >= wide - kernel.gives_update
    assert count(r"st\.global\.v4\.[fb]32", ptx) >= wide - 1
    if codec == "bfloat16":
        assert count(r"st\.global\.v4\.[ub]16", ptx) >= len(kernel.states)
    # All of them in one basic block: a thread waits for the first at a branch, and the others would start only then.
    blocks = re.split(r"^\$L\w+:|\bbra", ptx, flags=re.MULTILINE)
    under_way = max(count(r"ld\.global\.v[24]\.[fbu]32", block) for block in blocks)
    assert under_way >= 2 + len(kernel.states) - kernel.gives_update


def test_the_check_of_arithmetic_can_fail():
    def plain(at, n):
        x = operations.load_f32(at)
        operations.store_f32(at, x * x + x)

    with pytest.raises(AssertionError, match="fma"):
        assert_exactly_rounded(kernels.compile_ptx(plain, 2, kernels.THREADS, (9, 0)))


@pytest.mark.parametrize("name", kernels.SHARED)
def test_stages_round_exactly_and_may_sum_in_float64(name):
    threads, n_arguments = kernels.SHARED[name]
    ptx = kernels.compile_ptx(kernels.shared_function(name)[0], n_arguments, threads, (9, 0))
    if arithmetic(ptx):
        assert_exactly_rounded(ptx, doubles=name == "decide" or name.startswith("sum_"))
    assert "fma" not in ptx
    if name in ("accumulate_gradients", "apply_update", "exchange_averages", "copy_parameters"):
        assert count(r"ld\.global\.v4\.[fb]32", ptx)
        assert count(r"st\.global\.v4\.[fb]32", ptx)


@pytest.mark.parametrize("spec", [s for s in registry.values() if s.trust], ids=lambda spec: spec.name)
def test_trust_ratios_round_exactly(spec):
    function, _ = kernels.trust_function(spec)
    assert_exactly_rounded(kernels.compile_ptx(function, 5, kernels.WARP_THREADS, (9, 0)), doubles=True)


def test_there_is_a_rule_for_every_kernel_of_the_cpu():
    assert cuda.rules() == sorted(compiled.kernels())


def test_older_and_newer_gpus_are_compiled_for():
    assert ".target sm_80" in cuda.ptx("adam", cc=(8, 0))
    assert ".target sm_100" in cuda.ptx("adam", cc=(10, 0))


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [(("adamant",), "fastopt.cuda.rules"), (("adam", (9, 0), "float64"), "float32, bfloat16, 8bit")],
)
def test_ptx_of_what_there_is_not(arguments, mentioned):
    with pytest.raises(ValueError, match=mentioned):
        cuda.ptx(*arguments)


# --- What is kept

TEXT = """
import inspect, sys
from fastopt.backends.cuda import kernels
print(inspect.getsource(sys.modules[kernels.function("lion", "float32")[0].__module__]))
"""


def test_the_text_of_a_kernel_is_written_once(cache):
    kernels.function("lion", "float32")
    (path,) = cache.glob("lion_float32_*.py")
    before = path.stat().st_mtime_ns
    assert run(TEXT, FASTOPT_CACHE_DIR=str(cache)).stdout == path.read_text() + "\n"
    assert path.stat().st_mtime_ns == before
    assert len(list(cache.glob("lion_float32_*.py"))) == 1


def test_a_spoiled_text_is_written_again(tmp_path):
    first = run(TEXT, FASTOPT_CACHE_DIR=str(tmp_path))
    (path,) = tmp_path.glob("*.py")
    path.write_text("def lion(): half a fi")
    again = run(TEXT, FASTOPT_CACHE_DIR=str(tmp_path))
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout


def test_a_cache_folder_that_cannot_be_made_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    finished = run(TEXT, FASTOPT_CACHE_DIR=str(tmp_path / "file" / "folder"))
    assert "def lion(" in finished.stdout, finished.stderr


# --- What is refused

STEP = "import numpy as np, fastopt; fastopt.Adam([np.ones(3, np.float32)]{}).step([np.ones(3, np.float32)])"


@pytest.mark.parametrize(
    ("code", "environment"),
    [
        (STEP.format(", backend='cuda'"), {}),
        (STEP.format(""), {"FASTOPT_BACKEND": "cuda"}),
        ("import fastopt; fastopt.FlatBuffer({'w': 3}, backend='cuda')", {}),
    ],
)
def test_without_a_gpu_there_is_one_clear_error(code, environment):
    finished = run(code, **environment)
    assert finished.returncode == 1
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: backend 'cuda' cannot run here: no NVIDIA ")
    assert "During handling" not in finished.stderr


def test_without_its_packages_the_error_says_what_to_install():
    hide = "import sys; sys.modules['numba'] = sys.modules['numba.cuda'] = None; "
    finished = run(hide + STEP.format(", backend='cuda'"))
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: backend 'cuda' needs Numba's CUDA target")
    assert "python -m pip install 'fastopt[cuda]'" in last
    assert run(hide + STEP.format("")).returncode == 0


def test_the_module_is_there_after_import_fastopt():
    finished = run("import fastopt; assert 'adam' in fastopt.cuda.rules()")
    assert finished.returncode == 0, finished.stderr


def test_a_name_that_fastopt_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fastopt' has no attribute 'cudaa'"):
        fastopt.cudaa  # noqa: B018


def test_nothing_of_numba_is_imported_before_it_is_asked_for():
    check = "fastopt.info(); import sys; assert not {'numba', 'numba_cuda', 'llvmlite'} & set(sys.modules)"
    finished = run(f"{STEP.format('')}; {check}")
    assert finished.returncode == 0, finished.stderr


def test_info_names_gpu_driver_and_package():
    finished = subprocess.run(
        [sys.executable, "-m", "fastopt", "info"], capture_output=True, text=True, timeout=120, check=True
    )
    section = finished.stdout.split("\n\n")[-1].splitlines()
    assert section[0] == "cuda"
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in section[1:])
    assert rows == cuda.describe()
    assert rows["numba-cuda"].startswith("0.30.")
    assert "cuda" in fastopt.info()["backends"]


def test_arrays_of_numpy_are_refused_in_the_simulator(tmp_path):
    finished = run(STEP.format(", backend='cuda'"), NUMBA_ENABLE_CUDASIM="1", FASTOPT_CACHE_DIR=str(tmp_path))
    last = finished.stderr.strip().splitlines()[-1]
    got = "got a NumPy array, float32 of shape (3,)"
    assert last == f"TypeError: Adam: params[0] must be an array on the GPU, float32, {got}"
