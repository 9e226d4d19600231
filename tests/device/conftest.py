"""Where this folder's tests run: in Numba's simulator if NUMBA_ENABLE_CUDASIM is set, else on a GPU, or nowhere."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
HERE = Path(__file__).parent

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
        item.add_marker(pytest.mark.gpu)
        if lack:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {lack}"))
