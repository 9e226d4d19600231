"""The README is short and true: its optimizers are those of the registry, and its examples run. So do docstrings'."""

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastopt
from fastopt.backends import compiled
from fastopt.rules import registry

README = Path(__file__).resolve().parents[2] / "README.md"


def read():
    return README.read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert len(read().splitlines()) <= 130


def test_the_readme_names_the_optimizers_of_the_registry():
    listed = re.search(r"^## Optimizers\n\n([\w, \n]+):", read(), re.MULTILINE)[1]
    assert sorted(re.findall(r"\w+", listed)) == sorted(spec.name for spec in registry.values())


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", read(), re.DOTALL)
    namespace = {"print": lambda *values: None}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert len(blocks) == 3


def test_the_first_example_learns_and_prints_what_it_says():
    block = re.search(r"```python\n(.*?)```", read(), re.DOTALL)[1]
    printed = []
    exec(compile(block, "README.md", "exec"), {"print": lambda *values: printed.append(values)})
    (said,) = re.findall(r"# (0 .*)$", block, re.MULTILINE)
    steps, losses = zip(*((int(step), float(loss)) for step, loss in map(str.split, said.split(", "))), strict=True)
    assert [step for step, _ in printed] == list(steps)
    for (_, loss), shown in zip(printed, losses, strict=True):
        assert loss == pytest.approx(shown, rel=0.05, abs=1e-5)


@pytest.mark.exhaustive
@pytest.mark.skipif(len(compiled.available_isas()) < 3, reason="fewer instruction sets have fewer tests")
def test_as_many_tests_compare_bits_as_the_readme_says():
    said = re.search(r"More\s+than\s+([\d,]+)\s+tests\s+compare\s+bits", read())[1]
    command = [sys.executable, "-m", "pytest", "-m", "bits", "--collect-only", "-p", "no:cacheprovider", "tests/bits"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=README.parent, timeout=300)
    found = re.search(r"^(\d+)/\d+ tests collected", finished.stdout, re.MULTILINE)
    assert int(found[1]) > int(said.replace(",", ""))


def test_what_was_not_shown_on_hardware_is_called_experimental_at_the_top():
    top = read().partition("\n## ")[0]
    assert "NVIDIA" not in top or "experimental" in top
    assert "CUDA" not in (README.parent / "pyproject.toml").read_text(encoding="utf-8").partition("[project.opt")[0]


SCHEDULES = [f"lr_scheduler.{name}" for name in ("base", "composed", "cycles", "decay", "plateau", "warmup")]


@pytest.mark.parametrize("module", ["_arrays.flat_buffer", "_info", "_core.optimizer", "early_stopping", *SCHEDULES])
def test_the_examples_in_docstrings_run(module):
    failed, attempted = doctest.testmod(importlib.import_module(f"fastopt.{module}"))
    assert failed == 0
    assert attempted > 0


@pytest.mark.parametrize("spec", registry.values(), ids=lambda spec: spec.name)
def test_an_optimizers_docstring_names_its_source(spec):
    assert "\nReferences\n" in inspect.getdoc(spec.cls)


def test_every_public_name_is_documented():
    public = [name for name in dir(fastopt) if not name.startswith("_")]
    assert all(getattr(fastopt, name).__doc__ for name in public)
