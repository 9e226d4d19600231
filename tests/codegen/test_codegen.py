"""The rule language and its generators; and that an optimizer really is one file."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import fastopt
from fastopt import _codegen, backends
from fastopt._codegen import cython
from fastopt._core import functions
from fastopt.backends import compiled, cpu
from fastopt.rules import Spec, registry
from tests.support.configs import Config
from tests.support.oracle import Oracle, assert_same_bits

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "kernels" / "kernels.pyx.in"

OPTIMIZER = '''
from fastopt._core.optimizer import Optimizer
from fastopt.rules import {imports}


class {name}(Optimizer):
    """A test."""

    states = {states}

    def __init__(self, params=None, lr: NonNegative = 0.5, **options):
        super().__init__(params, lr=lr, **options)

    @staticmethod
    def scalars(step, lr):
        {scalars}

    @staticmethod
    def rule({arguments}):
        {rule}

    @staticmethod
    def reference(p, g, *, step, lr):
        return (p - lr * g,)
'''


def optimizer(
    folder,
    rule="p = p - lr * g; return p,",
    *,
    arguments="p, g, lr",
    scalars="return dict(lr=lr)",
    states="{}",
    imports="NonNegative, sqrt",
    name="Probe",
):
    """The spec of an optimizer made from text, in a file of its own."""
    path = folder / "probe.py"
    body = "\n        ".join(line for part in rule.split(";") for line in [part.removeprefix(" ")])
    path.write_text(
        OPTIMIZER.format(rule=body, arguments=arguments, scalars=scalars, states=states, imports=imports, name=name)
    )
    spec = importlib.util.spec_from_file_location("probe", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["probe"] = module
    spec.loader.exec_module(module)
    return Spec(getattr(module, name))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("p = p - 1.0 * g; return p,", "no literals in a rule: make 1.0 a host scalar"),
        ("p = p - g ** lr; return p,", "Pow is not part of the rule language"),
        ("p = p - g if p > g > lr else p; return p,", "one comparison at a time"),
        ("p = p - exp(g); return p,", "only sqrt, .* may be called, got exp\\(g\\)"),
        ("p = p - g.sum(); return p,", "may be called"),
        ("p = p - g[lr]; return p,", "Subscript is not part of the rule language"),
        ("p -= g; return p,", "expected `name = expression`, got 'p -= g'"),
        ("p, g = g, p; return p,", "expected `name = expression`"),
        ("p = p - momentum; return p,", "unknown name 'momentum'"),
        ("p = p and g; return p,", "BoolOp is not part of the rule language"),
        ("if lr:;    p = p - g; return p,", "`if` is for flags"),
        ("for p in g:;    p = p; return p,", "expected `name = expression`"),
        ("p = p - g; return g,", "must end with `return p`"),
        ("p = p - g", "must end with `return p`"),
    ],
)
def test_what_is_not_in_the_rule_language_is_refused_with_file_and_line(tmp_path, rule, message):
    spec = optimizer(tmp_path, rule)
    with pytest.raises(_codegen.RuleError, match=rf"probe\.py:\d+: Probe\.rule: .*{message}") as raised:
        _codegen.kernels(spec)
    line = int(re.search(r":(\d+):", str(raised.value)).group(1))
    text = (tmp_path / "probe.py").read_text().splitlines()
    assert any(part.strip() in text[line - 1] for part in [*rule.split(";"), "def rule("])


def test_a_rule_argument_that_nothing_provides_is_refused(tmp_path):
    spec = optimizer(tmp_path, arguments="p, g, momentum", rule="p = p - momentum; return p,")
    with pytest.raises(_codegen.RuleError, match="'momentum' is neither a state nor a host scalar"):
        _codegen.kernels(spec)


def test_a_scalar_with_a_name_of_the_gradient_stage_is_refused(tmp_path):
    spec = optimizer(tmp_path, scalars="return dict(lr=lr, decay=lr)")
    with pytest.raises(_codegen.RuleError, match=r"\['decay'\] are names of the gradient stage"):
        _codegen.kernels(spec)


def test_a_state_that_the_rule_never_uses_is_refused(tmp_path):
    spec = optimizer(
        tmp_path, states='{"memory": 0.0}', arguments="p, g, memory, lr", rule="p = p - lr * g; return p, memory"
    )
    with pytest.raises(_codegen.RuleError, match="memory"):
        _codegen.kernels(spec)


def test_states_that_a_state_dtype_keeps_in_two_formats_are_refused(tmp_path):
    spec = optimizer(
        tmp_path,
        "average = a; a = b; b = average; p = p - lr * g; return p, a, b",
        states='{"a": 0.0, "b": 0.0}\n    state_kinds = {"b": "weights"}',
        arguments="p, g, a, b, lr",
    )
    (kernel,) = _codegen.kernels(spec)
    assert kernel.codec("bfloat16").name == "bfloat16"
    with pytest.raises(_codegen.RuleError, match="8bit keeps these states in different formats: 8bit, bfloat16"):
        kernel.codec("8bit")


@pytest.mark.parametrize(
    ("scalars", "message"),
    [
        ("return lr,", "must end with `return dict"),
        ("return dict(lr=exp(lr))", "may be called"),
        ("return dict(lr=rate)", "unknown name 'rate'"),
    ],
)
def test_host_scalars_outside_their_language_are_refused(tmp_path, scalars, message):
    spec = optimizer(tmp_path, scalars=scalars)
    with pytest.raises(_codegen.RuleError, match=message):
        _codegen.cython_source([spec], TEMPLATE, "test")


@pytest.mark.parametrize("spec", registry.values(), ids=lambda spec: spec.name)
def test_the_engine_sets_the_numbers_that_a_kernel_reads_under_these_names(spec):
    engine = backends.engine()
    scalars = _codegen.scalar_names(spec)
    hypers = [name for name, width in _codegen.hyper_slots(spec) for _ in range(width)]
    assert {name: scalars.index(name) for name in engine.SCALAR_POSITIONS} == engine.SCALAR_POSITIONS
    assert {name: hypers.index(name) for name in engine.HYPER_POSITIONS} == engine.HYPER_POSITIONS


@pytest.mark.parametrize("spec", registry.values(), ids=lambda spec: spec.name)
def test_no_kernel_has_a_branch_or_a_float64_operation(spec):
    """Literals and `if` statements are what would bring them in."""
    for kernel in _codegen.kernels(spec):
        text = cython.kernel_source(kernel)
        loops = re.findall(r"^cdef inline void \w+_span\(.*?\n\n\n", text, re.MULTILINE | re.DOTALL)
        assert len(loops) == len(kernel.formats())
        for loop in loops:
            assert not re.search(r"\d\.\d|\bdouble\b", loop)
            assert not re.search(r"^\s+if ", loop, re.MULTILINE)


@pytest.mark.parametrize("spec", registry.values(), ids=lambda spec: spec.name)
def test_a_kernel_never_writes_the_gradient(spec):
    for kernel in _codegen.kernels(spec):
        assert "g" not in kernel.stored
        assert not re.search(r"\bg_stream\[i\] =", cython.kernel_source(kernel))


def test_adam_and_adamw_are_one_rule():
    assert registry["adam"].rule is registry["adamw"].rule
    assert registry["adam"].rule_name == registry["adamw"].rule_name == "adam"


# --- One file

SIGNUM = '''
"""Signum, for the test that an optimizer is one file."""

from fastopt._arrays.types import Params
from fastopt._core.optimizer import Optimizer
from fastopt._core.options import Options, Unpack
from fastopt.rules import Flag, Fraction, NonNegative, register, sign


@register
class Signum(Optimizer):
    """The sign of a running mean of the gradient.

    References
    ----------
    Bernstein et al.: signSGD: compressed optimisation for non-convex problems, arXiv:1802.04434.
    """

    states = {"momentum_buffer": 0.0}

    def __init__(
        self,
        params: Params | None = None,
        lr: NonNegative = 1e-2,
        momentum: Fraction = 0.9,
        weight_decay: NonNegative = 0.0,
        *,
        maximize: Flag = False,
        l1: NonNegative = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay, maximize=maximize, l1=l1, **options
        )

    @staticmethod
    def scalars(step, lr, momentum):
        return dict(lr=lr, momentum=momentum, one_minus_momentum=1 - momentum)

    @staticmethod
    def rule(p, g, momentum_buffer, lr, momentum, one_minus_momentum):
        momentum_buffer = momentum * momentum_buffer + one_minus_momentum * g
        p = p - lr * sign(momentum_buffer)
        return p, momentum_buffer

    @staticmethod
    def reference(p, g, momentum_buffer, *, step, lr, momentum):
        import numpy as np

        m = momentum * momentum_buffer + (1 - momentum) * g
        return p - lr * np.sign(m), m
'''


@pytest.fixture(scope="module")
def signum(tmp_path_factory):
    """An optimizer defined outside the package tree, generated, built and loaded."""
    pytest.importorskip("Cython", reason="building kernels needs Cython")
    folder = tmp_path_factory.mktemp("signum")
    (folder / "signum.py").write_text(SIGNUM)
    loader = importlib.util.spec_from_file_location("signum", folder / "signum.py")
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    source = folder / "signum_kernels.pyx"
    source.write_text(_codegen.cython_source([module.Signum.spec], TEMPLATE, "baseline"))
    (folder / "formats.h").write_text(_codegen.formats_header())
    built = _build(folder, source)
    compiled.add_kernels(built.KERNELS)
    yield module.Signum
    del registry["signum"]
    for name in built.KERNELS:
        del compiled._added[name]


def _build(folder, source):
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    extension = Extension(
        source.stem,
        [str(source)],
        include_dirs=[str(TEMPLATE.parent), str(folder)],
        extra_compile_args=list(_codegen.FLAGS),
    )
    made = cythonize([extension], include_path=[str(TEMPLATE.parent)], build_dir=str(folder), quiet=True)
    command = Distribution({"ext_modules": made}).get_command_obj("build_ext")
    command.build_lib = command.build_temp = str(folder)
    command.ensure_finalized()
    command.run()
    path = command.get_ext_fullpath(source.stem)
    loader = importlib.util.spec_from_file_location(source.stem, path)
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    return module


def test_an_optimizer_outside_the_package_has_the_bits_of_its_rule(signum):
    rng = np.random.default_rng(0)
    p, *gradients = rng.standard_normal((4, 70_001)).astype(np.float32)
    for hypers in ({}, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1, "l1": 0.2, "maximize": True}):
        config = Config(signum.spec, "test", hypers)
        oracle, actual = Oracle(config, p), p.copy()
        step = config.make(actual)
        for g in gradients:
            step.step(g)
            oracle.step(g)
        assert_same_bits(actual, oracle.arrays["p"], f"Signum {hypers}")
        assert_same_bits(step.state[0]["momentum_buffer"], oracle.arrays["momentum_buffer"], "state")


def test_an_optimizer_outside_the_package_has_functions_and_a_reference(signum):
    module = types.ModuleType("made")
    functions.define(vars(module), cpu, (np.float32,))
    p, g, m = np.ones(3, np.float32), np.ones(3, np.float32), np.zeros(3, np.float32)
    module.signum(p, g, m, lr=0.25)
    assert p.tolist() == [0.75] * 3
    q = np.ones(3, np.float32)
    signum(q, lr=0.25, backend="reference").step(g)
    assert q.tolist() == p.tolist()
    assert "def signum(p: Array, g: Gradient, momentum_buffer: Array, *, step: int = 1" in functions.stub("cpu")


def test_no_file_but_its_own_knows_an_optimizer():
    """Outside fastopt/optimizers/ no file of the library names one in code."""
    names = re.compile("|".join(rf"\b{name}\b" for s in registry.values() for name in (s.name, s.function)))
    allowed = {"momentum", "nesterov", "Momentum", "Nesterov"}  # hyperparameters and words, too
    for path in [
        *ROOT.glob("fastopt/*.py"),
        *ROOT.glob("fastopt/backends/*.py"),
        *ROOT.glob("kernels/*"),
        ROOT / "setup.py",
    ]:
        if path.name == "demo.py":  # learning rates
            continue
        code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
        found = set(names.findall(re.sub(r"#.*", "", code))) - allowed
        assert not found, f"{path.name} names {found}"


def test_the_optimizers_folder_has_one_file_and_one_line_for_each():
    folder = Path(fastopt.optimizers.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == set(registry) - {"signum"}
    lines = [line for line in (folder / "__init__.py").read_text().splitlines() if line.startswith("from")]
    assert len(lines) == len(files)
