"""What type checkers say of the installed package: nothing to what the README does, an error to every mistake."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TYPING = Path(__file__).resolve().parent / "typing"
MARK = "# expect error"


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Of mypy over the files in `typing`: file -> line -> message."""
    folder = tmp_path_factory.mktemp("mypy")
    finished = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", f"--cache-dir={folder}", *map(str, TYPING.glob("*.py"))],
        cwd=folder,  # outside the source tree, as users are
        env={**os.environ, "MYPYPATH": os.environ.get("PYTHONPATH", "")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode in (0, 1), finished.stdout + finished.stderr
    found = {}
    for name, line, message in re.findall(r"([^/\\\n]+\.py):(\d+): error: (.*)", finished.stdout):
        found.setdefault(name, {}).setdefault(int(line), message)
    return found


def lines_of(name):
    return (TYPING / name).read_text(encoding="utf-8").splitlines()


def test_type_checkers_accept_what_the_readme_does(errors):
    assert errors.get("accepted.py", {}) == {}


def test_every_backend_is_what_the_interface_says(errors):
    assert errors.get("backends.py", {}) == {}


@pytest.mark.parametrize("line", [k for k, text in enumerate(lines_of("mistakes.py"), 1) if text.endswith(MARK)])
def test_type_checkers_find_a_mistake(errors, line):
    assert line in errors["mistakes.py"], lines_of("mistakes.py")[line - 1]


def test_type_checkers_find_no_mistake_where_there_is_none(errors):
    assert [k for k in errors["mistakes.py"] if not lines_of("mistakes.py")[k - 1].endswith(MARK)] == []
