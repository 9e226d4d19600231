"""The documentation's sources are true: tests, examples, files and variables that they name exist, none is forgotten.

What is made when the site is built is tested by `docs/test_site.py`.
"""

import ast
import inspect
import re
from pathlib import Path

import pytest

import fastopt
from fastopt._instruction_sets import INSTRUCTION_SETS
from fastopt.rules import registry

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
if not DOCS.exists():
    pytest.skip("the documentation lies in the source checkout alone", allow_module_level=True)

PAGES = sorted(path for path in DOCS.rglob("*.md") if path.name != "benchmark_report.md")
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("plot_*.py"))


def read(name):
    return (DOCS / name).read_text(encoding="utf-8")


def test_every_promise_names_tests_that_exist():
    named = re.findall(r"`(\S+\.py)::(\w+)`", read("inside/promises.md"))
    assert len(named) > 30
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], f"{file}::{test}"


def test_every_example_has_a_topic_and_every_topic_an_example():
    rows = re.findall(r"^\| (?!topic|-)(.+?) \| (.+?) \|$", read("topics.md"), re.MULTILINE)
    linked = {name for _, links in rows for name in re.findall(r"gallery/(plot_\w+)\.rst", links)}
    assert linked == set(EXAMPLES)
    assert all("gallery/plot_" in links for _, links in rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_between_sources_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        made = path.suffix == ".rst" and (path.parent.name == "gallery" or path.stem in registry)
        assert path.exists() or made or path.name == "benchmark_report.md", target


def test_the_readme_links_to_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / target).exists(), target


def test_every_environment_variable_is_documented():
    code = [*ROOT.glob("fastopt/**/*.py"), *ROOT.glob("kernels/*.p*")]
    named = {name for path in code for name in re.findall(r"FASTOPT_[A-Z_]+", path.read_text(encoding="utf-8"))}
    used = {name for name in named if not name.endswith("_H")}  # those guard headers
    assert used == set(re.findall(r"^\| `(FASTOPT_[A-Z_]+)`", read("guide/environment.md"), re.MULTILINE))


def test_the_functions_of_fastopt_cuda_are_documented_as_they_are():
    """They cannot be imported where Numba CUDA is missing, so their page is written by hand."""
    found = {}
    for file in ("kernels.py", "__init__.py"):
        tree = ast.parse((ROOT / "fastopt" / "backends" / "cuda" / file).read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in ("rules", "ptx", "describe"):
                found[node.name] = [argument.arg for argument in node.args.args]
    shown = dict(re.findall(r"py:function:: (\w+)\((.*)\)", read("api/cuda.md")))
    assert {name: re.findall(r"([a-z_]+)(?==|,|$)", arguments) for name, arguments in shown.items()} == found


@pytest.mark.parametrize("spec", registry.values(), ids=lambda spec: spec.name)
def test_an_optimizer_says_when_to_choose_it_and_names_relatives_that_exist(spec):
    text = inspect.getdoc(spec.cls)
    also = re.search(r"^See Also\n-+\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)[1]
    relatives = re.findall(r"^(\w+) : ", also, re.MULTILINE)
    assert relatives
    assert spec.name not in relatives
    assert all(hasattr(fastopt, name) for name in relatives)
    assert len(re.search(r"^Notes\n-+\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)[1]) > 100


def test_the_guide_names_every_instruction_set():
    text = (DOCS / "guide" / "environment.md").read_text(encoding="utf-8")
    assert [name for name in INSTRUCTION_SETS if f"`{name}`" not in text] == []
