"""Fixtures that pin the instruction set and let small arrays run on many threads; which tests are exhaustive."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for small matrices: other threads would spin more than work

import pytest
from hypothesis import settings

from fastopt import backends
from tests.support import tiers

settings.register_profile("default tier", max_examples=5, deadline=None)
settings.register_profile("exhaustive", max_examples=300, deadline=None)


def pytest_configure(config):
    settings.load_profile("default tier" if "not exhaustive" in config.option.markexpr else "exhaustive")


@pytest.hookimpl(tryfirst=True)  # before pytest looks at markers
def pytest_collection_modifyitems(items):
    tiers.mark_exhaustive(items)


@pytest.fixture
def use_isa(monkeypatch):
    """Call with a name to run the following optimizers on that instruction set."""
    return lambda isa: monkeypatch.setenv("FASTOPT_ISA", isa)


@pytest.fixture
def parallel_from_the_first_element():
    """Open a parallel region however small the step."""
    engine = backends.engine()
    before = engine.set_serial_below(0)
    yield
    engine.set_serial_below(before)
