"""The suite's options, its races, and how pytest-benchmark gets to know of them.

All that is used of pytest-benchmark stands here and in `test_races`: the `benchmark` fixture's `pedantic`,
`group` and `extra_info`, its marker's `timer`, and two of its hooks.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from bench import machine
from bench.suite import CLOCK, Suite
from bench.workloads import MODES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastopt")
    group.addoption("--bench-mode", choices=tuple(MODES), default="default", help="how much is measured")
    group.addoption("--bench-optimizers", type=str.split, help="names of optimizers, for the curves alone")
    group.addoption("--bench-sizes", type=str.split, help="numbers of parameters, for the curves alone")
    group.addoption("--bench-peers", type=str.split, help="names of peers; all by default")
    group.addoption("--bench-threads", type=str.split, help="numbers of threads")
    group.addoption("--bench-backend", default="cpu", help="backend of fastopt")
    group.addoption("--bench-progress", action="store_true", help="say on standard output what is being done")


_SUITE = pytest.StashKey[Suite]()


def suite_of(config: pytest.Config) -> Suite:
    if _SUITE not in config.stash:
        config.stash[_SUITE] = Suite(config)
    return config.stash[_SUITE]


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> Suite:
    return suite_of(request.config)


@pytest.fixture
def record(benchmark: Any) -> Any:
    """Call with a workload's id, a contestant, seconds of rounds and extra_info: pytest-benchmark's entry of them."""

    def recorded(group: str, contestant: str, times: list[float], info: dict[str, Any]) -> None:
        benchmark.group = group
        benchmark.extra_info.update(info, workload=group, contestant=contestant)
        CLOCK.times = list(times)
        benchmark.pedantic(CLOCK.pass_by, setup=CLOCK.set_back, rounds=len(times))

    return recorded


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for every workload and contestant."""
    if {"workload", "contestant"} <= set(metafunc.fixturenames):
        suite = suite_of(metafunc.config)
        pairs = [(workload, name) for workload in suite.workloads for name in suite.contestants(workload)]
        ids = [f"{workload.id}-{name}" for workload, name in pairs]
        metafunc.parametrize(("workload", "contestant"), pairs, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Processes first, while nothing else has been imported; then workloads as they are listed."""
    del config
    items.sort(key=lambda item: "test_processes" not in item.nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    _say_done(nodeid)


def _say_done(nodeid: str) -> None:
    if _RUNNING:
        _RUNNING[0].say(done=nodeid.split("::", 1)[-1])


_RUNNING: list[Suite] = []


def pytest_collection_finish(session: pytest.Session) -> None:
    with contextlib.suppress(KeyError):
        suite = session.config.stash[_SUITE]
        suite.say(total=len(session.items), peers=suite.versions, missing=suite.missing)
        _RUNNING[:] = [suite]


# --- pytest-benchmark's hooks


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fastopt"] = machine.description()
    if config.getoption("--bench-backend") == "cuda":
        from bench import device

        machine_info["fastopt"] |= {"gpu": device.description(), "caches": []}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    del benchmarks
    output_json["run"] = suite_of(config).summary()
