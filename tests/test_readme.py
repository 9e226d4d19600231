"""The README is true: its table of optimizers is that of the registry, and its examples run.

``python tests/test_readme.py`` writes the table.
"""

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastopt
from fastopt import _codecs, _codegen, _info
from fastopt._rule import registry
from fastopt.backends import cpu

README = Path(__file__).resolve().parents[1] / "README.md"
TABLE = re.compile(r"(<!-- optimizers: .*? -->\n).*(<!-- end of optimizers -->)", re.DOTALL)


def table():
    """The optimizers with what a step with default hyperparameters keeps and moves, in Markdown."""
    lines = [
        "| optimizer | function | hyperparameters | state, bytes per parameter: float32, bfloat16, 8bit | "
        "memory moved, bytes per parameter |",
        "|---|---|---|---|---|",
    ]
    for spec in registry.values():
        values = {name: hyper.default for name, hyper in spec.hypers.items()}
        flags = spec.flags(values)
        kernel = next(k for k in _codegen.kernels(spec) if k.name == spec.kernel_name(flags, False))
        hypers = ", ".join(f"`{name}={hyper.default!r}`" for name, hyper in spec.hypers.items())
        states = ", ".join(f"{_info.state_bytes(spec, dtype):.3g}" for dtype in _codecs.STATE_DTYPES)
        if spec.optional_states:
            needs = []
            for state in spec.optional_states:
                sizes = [_codecs.codec(d, spec.kinds[state]).bytes_per_element for d in _codecs.STATE_DTYPES]
                needs.append(f"+{', '.join(f'{size:.3g}' for size in sizes)} with `{spec.needed_when(state)}`")
            states += " (" + "; ".join(needs) + ")"
        states += " (+4 of workspace)" * kernel.gives_update
        lines.append(f"| `{spec.name}` | `{spec.function}` | {hypers} | {states} | {kernel.bytes_moved} |")
    return "\n".join(lines) + "\n"


def with_table(text):
    return TABLE.sub(lambda match: match[1] + table() + match[2], text)


def test_the_table_of_optimizers_is_that_of_the_registry():
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run `python tests/test_readme.py`"


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    namespace = {"print": lambda *values: None}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert len(blocks) == 5


def test_the_first_example_learns_and_prints_what_it_says():
    block = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    printed = []
    exec(compile(block, "README.md", "exec"), {"print": lambda *values: printed.append(values)})
    (said,) = re.findall(r"# (0 .*)$", block, re.MULTILINE)
    steps, losses = zip(*((int(step), float(loss)) for step, loss in map(str.split, said.split(", "))), strict=True)
    assert [step for step, _ in printed] == list(steps)
    for (_, loss), shown in zip(printed, losses, strict=True):
        assert loss == pytest.approx(shown, rel=0.05, abs=1e-5)


@pytest.mark.exhaustive
@pytest.mark.skipif(len(cpu.available_isas()) < 3, reason="fewer instruction sets have fewer tests")
def test_as_many_tests_compare_bits_as_the_readme_says():
    said = int(
        re.search(r"More than ([\d,]+) tests compare bits", README.read_text(encoding="utf-8"))[1].replace(",", "")
    )
    files = [str(README.parent / "tests" / f"test_{name}.py") for name in ("bits", "fused", "low_precision")]
    command = [sys.executable, "-m", "pytest", "-m", "bits", "--collect-only", "-p", "no:cacheprovider", *files]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=README.parent, timeout=300)
    found = re.search(r"^(\d+)/\d+ tests collected", finished.stdout, re.MULTILINE)
    assert int(found[1]) > said


def test_what_was_not_shown_on_hardware_is_called_experimental_at_the_top():
    top = README.read_text(encoding="utf-8").partition("\n## ")[0]
    assert "NVIDIA" not in top or "experimental" in top
    assert "CUDA" not in (README.parent / "pyproject.toml").read_text(encoding="utf-8").partition("[project.opt")[0]


SCHEDULES = [f"lr_scheduler.{name}" for name in ("base", "composed", "cycles", "decay", "plateau", "warmup")]


@pytest.mark.parametrize("module", ["_buffers", "_info", "_optimizer", "early_stopping", *SCHEDULES])
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


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
