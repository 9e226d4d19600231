"""A second pytest, in which Numba simulates the GPU: it runs `tests/cuda/device` and tells the results one by one."""

import json
import os
import subprocess
import sys
import tempfile
import time

REPORTS = "SIMULATOR_REPORTS"
"""Environment variable: the file that the second pytest writes its reports to."""


class Simulator:
    """The results of the tests `names`, which start to run when it is made."""

    def __init__(self, names, root):
        self._folder = tempfile.TemporaryDirectory(prefix="fastopt-simulator-")
        self._log = open(os.path.join(self._folder.name, "log"), "w+")  # noqa: SIM115  closed below
        reports = os.path.join(self._folder.name, "reports")
        self._reports = open(reports, "a+")  # noqa: SIM115
        environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "FASTOPT_CACHE_DIR": self._folder.name}
        environment.pop("PYTEST_ADDOPTS", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "", *names],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=root,
            env={**environment, REPORTS: reports},
        )
        self._finished = {}

    def result(self, name):
        """Wait for the test `name`; its outcome and what there is to say about it."""
        found = ("passed", "")
        while name not in self._finished:
            has_ended = self._process.poll() is not None  # asked for before the last reports are read
            start, line = self._reports.tell(), self._reports.readline()
            if not line.endswith("\n") and not has_ended:
                self._reports.seek(start)
                time.sleep(0.05)
                continue
            if not line:
                self._log.seek(0)
                return "failed", f"the simulator ended without a result of this test:\n{self._log.read()[-5000:]}"
            reported, when, *outcome = json.loads(line)
            if found[0] == "passed":
                found = tuple(outcome)
            if when == "teardown":
                self._finished[reported], found = found, ("passed", "")
        return self._finished[name]

    def close(self):
        self._process.kill()
        self._process.wait()
        self._reports.close()
        self._log.close()
        self._folder.cleanup()


def report(result):
    """Write a report of pytest, in the simulator's process, for the one that started it."""
    if REPORTS not in os.environ:
        return
    text = result.longrepr[2] if result.skipped else result.longreprtext
    for title, content in result.sections if result.failed else ():
        text += f"\n--- {title} ---\n{content}"
    line = json.dumps([result.nodeid, result.when, result.outcome, text])
    with open(os.environ[REPORTS], "a") as file:
        file.write(f"{line}\n")
