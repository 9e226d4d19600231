"""`fastopt.mpi` in 1, 2 and 3 processes: what each must find is in ranks.py."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mpi4py", reason="fastopt.mpi needs mpi4py: python -m pip install 'fastopt[mpi]'")
MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
pytestmark = pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec here: python -m pip install mpich")

RANKS = Path(__file__).with_name("ranks.py")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "zero_with_mpi.py"
CHECKS = re.findall(r"^def (\w+)\(\):", RANKS.read_text(encoding="utf-8"), re.MULTILINE)


def run(n, *command):
    finished = subprocess.run(
        [MPIEXEC, "-n", str(n), sys.executable, *command], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.covering(1)
def test_in_every_process(check, n):
    run(n, str(RANKS), check)


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples lie in the source checkout alone")
def test_the_example_learns_and_all_processes_agree():
    assert "every process has the same parameters: True" in run(2, str(EXAMPLE))


def test_the_docstrings_example_runs():
    code = "import doctest, fastopt.mpi; raise SystemExit(doctest.testmod(fastopt.mpi).failed)"
    run(1, "-c", code)
