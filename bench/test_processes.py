"""Cold start and memory of steps, entered into pytest-benchmark like the races."""

import importlib.util

import pytest

from bench import processes
from bench.suite import CLOCK
from bench.workloads import MOMENTUM
from fastopt.rules import registry

pytestmark = pytest.mark.benchmark(timer=CLOCK.read)
MODULES = {"fastopt": "fastopt", "torch": "torch-fused", "optax": "optax"}
"""Who starts cold -> the peer that must have been asked for."""


@pytest.fixture(scope="session")
def cold(suite):
    """Seconds of imports and first steps, each beside a bare process."""
    names = [name for name, peer in MODULES.items() if name == "fastopt" or peer in suite.present]
    rounds = (3, 1) if suite.mode.seconds < 120 else (suite.mode.rounds, 3)
    return {
        "import": processes.cold({name: processes.IMPORTS[name] for name in names}, processes.BASE, *rounds),
        "first step": processes.cold({name: processes.FIRST_STEPS[name] for name in names}, processes.ARRAYS, *rounds),
    }


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("what", ["import", "first step"])
def test_cold_start(what, name, suite, record, request):
    if not suite.plain:
        pytest.skip("curves alone were asked for")
    if importlib.util.find_spec(name) is None or (name != "fastopt" and MODULES[name] not in suite.present):
        pytest.skip("not installed or not asked for")
    times = request.getfixturevalue("cold")[what][name]
    record(f"cold/{what}", name, times, {"section": "cold", "title": what, "label": "after NumPy"})


@pytest.mark.parametrize("function", registry)
def test_memory(function, suite, record):
    if not suite.plain or (suite.mode.seconds < 120 and function not in ("adam", "sgd", "rmsprop")):
        pytest.skip("not in this run")
    hypers = MOMENTUM if function == "sgd" else ()
    growth, peaks, seconds = processes.growth(function, hypers)
    info = {"section": "memory", "optimizer": function, "title": registry[function].name, "label": "1e6 to 1e7"}
    record(f"memory/{registry[function].name}", "fastopt", [seconds], {**info, "growth": growth, "peaks": peaks})
