"""What `help` shows is complete, true, and readable in a terminal."""

import doctest
import inspect
import pydoc
import re

import numpy as np
import pytest

import fastopt
from fastopt._core.options import OPTIONS
from fastopt.rules import registry
from fastopt.rules.spec import RULE_WORDS

ALL = pytest.mark.parametrize("spec", registry.values(), ids=lambda spec: spec.name)


def words_of(cls):
    """Names in the sections Parameters and Attributes, with what stands behind them on their lines."""
    return dict(re.findall(r"^(\w+)(?: : (.*))?$", inspect.getdoc(cls), re.MULTILINE))


@ALL
def test_every_hyperparameter_has_its_bounds_default_and_meaning(spec):
    shown = words_of(spec.cls)
    for name, hyper in spec.hypers.items():
        kind, default = shown[name].rsplit(", default ", 1)
        assert kind == hyper.kind.described()
        assert eval(default, {}) == hyper.default
        assert re.search(rf"^{name} : .*\n    \S.*\.$", inspect.getdoc(spec.cls), re.MULTILINE | re.DOTALL)


@ALL
def test_every_option_has_its_default(spec):
    shown = words_of(spec.cls)
    for name, default in OPTIONS.items():
        assert eval(re.search(r"default (.*)$", shown[name])[1], {}) == default


@ALL
def test_the_state_is_described(spec):
    text = re.search(r"^state\n((?: {4}.*\n)+)", inspect.getdoc(spec.cls), re.MULTILINE)[1]
    assert re.findall(r'``"(\w+)"``', text) == ["step", *spec.states, *spec.running]


@ALL
def test_help_fits_a_terminal_and_has_no_latex(spec):
    described = pydoc.plain(pydoc.render_doc(spec.cls)).partition("Method resolution order")[0].splitlines()[3:]
    text = [line for line in described if not line.lstrip(" |").startswith(f"{spec.name}(")]  # the signature
    assert [line for line in text if len(line) > 80 or "\\" in line or ":math:" in line] == []


@ALL
def test_help_opens_with_the_docstring(spec):
    described = pydoc.plain(pydoc.render_doc(spec.cls)).partition("Method resolution order")[0]
    for name, hyper in spec.hypers.items():
        assert f"{name} : {hyper.kind.described()}, default {hyper.default!r}" in described


@ALL
def test_help_hides_what_speaks_to_the_engine(spec):
    text = pydoc.plain(pydoc.render_doc(spec.cls)).partition("Method resolution order")[2]
    assert [word for word in RULE_WORDS if re.search(rf"^ \|  {word}\b", text, re.MULTILINE)] == []
    assert not set(RULE_WORDS) & (set(dir(spec.cls)) | set(dir(spec.cls())))
    assert "step(self, grads" in text


@ALL
@pytest.mark.parametrize("module", ["functional", "reference"])
def test_a_function_explains_its_own_hyperparameters(spec, module):
    shown = dict(re.findall(r"^(\w+) : (.*)$", getattr(getattr(fastopt, module), spec.function).__doc__, re.MULTILINE))
    for name, hyper in spec.hypers.items():
        assert shown[name] == f"{hyper.kind.described()}, default {hyper.default!r}"


@ALL
def test_examples_run(spec):
    for documented in (spec.cls, fastopt.functional.__dict__[spec.function], fastopt.reference.__dict__[spec.function]):
        (test,) = doctest.DocTestFinder(recurse=False).find(documented, spec.function, globs={})
        assert test.examples
        assert doctest.DocTestRunner().run(test).failed == 0


def formula(spec):
    """The formula in the docstring, and which of its letters are states."""
    text = inspect.getdoc(spec.cls).partition("\nParameters\n")[0]
    return re.search(r"::\n\n((?: {4}.*\n)+)", text)[1], dict(re.findall(r"(\w+)\s=\s`(\w+)`", text))


@ALL
def test_the_formula_is_that_of_the_reference(spec):
    text, letters = formula(spec)
    values = {name: hyper.default for name, hyper in spec.hypers.items()} | {"lr": 0.125}
    if "momentum" in values:
        values["momentum"] = 0.75
    if "weight_decay" in values and re.search(r"\bweight_decay\b", text):
        values["weight_decay"] = 0.25
    named = {state: letter for letter, state in letters.items()}
    names = {"sqrt": np.sqrt, "maximum": max, "minimum": min, "sign": np.sign, "norm": abs, "p": 0.5, **values}
    states = spec.states_for(spec.flags(values))
    initial = {name: spec.initial(name, values) for name in states} | dict(spec.running)
    arrays = {name: np.full(1, first) for name, first in initial.items()}
    names |= {named.get(name, name): first for name, first in initial.items()}
    p = np.full(1, 0.5)
    for step, gradient in enumerate([0.5, -1.0, -0.25, 2.0, 2.0, 1.0, 0.125], 1):
        names |= {"g": gradient, "t": step, "beta1": 0, "beta2": 0}
        if "betas" in values:
            names["beta1"], names["beta2"] = values["betas"]
        exec(inspect.cleandoc("\n" + text), names)
        getattr(fastopt.reference, spec.function)(p, np.full(1, gradient), **arrays, step=step, **values)
        assert names["p"] == pytest.approx(p[0], rel=1e-12), step
