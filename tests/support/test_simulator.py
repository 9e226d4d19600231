"""Tests of the simulator report as themselves: what fails or is skipped there does so here."""

import os
from pathlib import Path

import pytest

from tests.support.simulator import Simulator

TESTS = """
import pytest

def test_passes(): pass
def test_is_skipped(): pytest.skip("no reason")
def test_fails(): print("on the way"); assert [1] == [2]
@pytest.fixture
def broken(): yield; raise OSError("while it was closed")
def test_is_closed(broken): pass
def test_ends_the_process(): import os; os._exit(3)
def test_is_never_reached(): pass
"""
CONFTEST = """
import pytest
from tests.support import simulator

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    simulator.report(report)
    return report
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    (folder / "test_some.py").write_text(TESTS)
    (folder / "conftest.py").write_text(CONFTEST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
        simulator = Simulator(["test_some.py"], folder)
    yield lambda test: simulator.result(f"test_some.py::{test}")
    simulator.close()


def test_one_that_passes_passes(result):
    assert result("test_passes") == ("passed", "")


def test_one_that_is_skipped_says_why(result):
    assert result("test_is_skipped") == ("skipped", "Skipped: no reason")


def test_one_that_fails_shows_the_assertion_and_the_output(result):
    outcome, text = result("test_fails")
    assert outcome == "failed"
    assert "assert [1] == [2]" in text
    assert "on the way" in text


def test_one_whose_fixture_fails_fails(result):
    outcome, text = result("test_is_closed")
    assert outcome == "failed"
    assert "while it was closed" in text


@pytest.mark.parametrize("test", ["test_ends_the_process", "test_is_never_reached"])
def test_one_without_a_result_fails(result, test):
    outcome, text = result(test)
    assert outcome == "failed"
    assert "ended without a result" in text
