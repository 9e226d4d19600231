"""`--site`: where the built site lies that `test_site.py` looks at."""

import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]


def pytest_addoption(parser):
    parser.addoption("--site", type=Path, default=DOCS.parent / "build" / "site", help="folder of the built site")


@pytest.fixture(scope="session")
def site(request):
    folder = request.config.getoption("--site").resolve()
    if not (folder / "index.html").exists():
        raise pytest.UsageError(f"no site in {folder}: python -m sphinx -b html docs {folder}")
    return folder
