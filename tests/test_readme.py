"""The README is true: its table of optimizers is that of the registry, and its examples run.

``python tests/test_readme.py`` writes the table.
"""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import fastopt
from fastopt import _codecs, _codegen, _info
from fastopt._rule import registry

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
    assert len(blocks) == 4
    assert float((namespace["error"] ** 2).mean()) < 1.5


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
