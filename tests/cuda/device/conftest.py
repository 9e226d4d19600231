"""Where this folder's tests run: on a GPU, or in Numba's simulator where there is none.

The simulator needs a process in which NUMBA_ENABLE_CUDASIM is set. Where it is not, `tests/support/simulator.py`
starts one; every test reports here as itself.
"""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support import simulator

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
HERE = Path(__file__).parent
IN_THE_SIMULATOR = pytest.StashKey[bool]()
SIMULATOR = pytest.StashKey[simulator.Simulator]()

if SIMULATED:
    os.environ.setdefault("FASTOPT_CACHE_DIR", tempfile.mkdtemp(prefix="fastopt-simulated-"))
    sys.setswitchinterval(1e-4)  # the simulator spins while a block's threads wait for each other: 5 times faster


def pytest_collection_modifyitems(items):
    here = [item for item in items if HERE in item.path.parents]
    if SIMULATED or not here:  # without numba-cuda none is collected
        return
    from fastopt.backends.cuda import availability

    lack = availability.missing()
    for item in here:
        if item.get_closest_marker("gpu") and lack:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {lack}"))
        elif item.get_closest_marker("simulator") or lack:
            item.stash[IN_THE_SIMULATOR] = True
        else:
            item.add_marker(pytest.mark.gpu)
    items.sort(key=lambda item: IN_THE_SIMULATOR in item.stash)  # last: the simulator runs beside the others


def pytest_collection_finish(session):
    names = [item.nodeid for item in session.items if IN_THE_SIMULATOR in item.stash]
    if names and not session.config.option.collectonly:
        session.stash[SIMULATOR] = simulator.Simulator(names, session.config.rootpath)
        session.config.add_cleanup(session.stash[SIMULATOR].close)


def pytest_pyfunc_call(pyfuncitem):
    if IN_THE_SIMULATOR not in pyfuncitem.stash:
        return None
    outcome, text = pyfuncitem.session.stash[SIMULATOR].result(pyfuncitem.nodeid)
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    simulator.report(report)
    return report
