"""`python -m fastopt bench`: a run with a progress display, and the folder that it leaves."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import compare, peers, plots, promises, report, results, suite, workloads

ROOT = Path(__file__).resolve().parents[1]
LOG = "log.txt"
FELL_SHORT = 1


def run(
    mode: str,
    output: Path,
    optimizers: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    chosen_peers: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    backend: str = "cpu",
    check: bool = False,
) -> int:
    """Measure, write results, report and plots into `output`, and return the exit code.

    Raises
    ------
    ImportError, RuntimeError
        If the backend cannot run here.
    RuntimeError
        If the measurements failed; says where their output is.
    """
    if backend == "cuda":
        importlib.import_module("bench.device")  # says what is missing
    output.mkdir(parents=True, exist_ok=True)
    file = output / results.FILE
    file.unlink(missing_ok=True)
    arguments = [f"--bench-mode={mode}", f"--bench-backend={backend}", f"--benchmark-json={file.resolve()}"]
    for name, values in (("optimizers", optimizers), ("sizes", sizes), ("peers", chosen_peers), ("threads", threads)):
        if values is not None:
            arguments.append(f"--bench-{name}={' '.join(map(str, values))}")
    code = _measure(arguments, output / LOG)
    if code != 0 or not file.exists():
        raise RuntimeError(f"the measurements failed (pytest's exit code {code}): see {output / LOG}")
    return finish(output, check)


def finish(output: Path, check: bool) -> int:
    """Write report and plots of the results in `output`, print the essence, and return the exit code."""
    found = results.load(output)
    (output / report.FILE).write_text(report.text(found), encoding="utf-8")
    drawn = plots.draw_all(found, output)
    fell_short = [verdict for verdict in promises.verdicts(found) if not verdict.kept]
    behind = report.behind(found)
    print("ns: nanoseconds a parameter; faster: how many times faster than the fastest peer\n")
    print(report.summary(found) + "\n")
    for line in report.left_out(found):
        print(f"left out: {line}")
    for warning in report.noisy(found):
        print(f"warning: {warning}")
    for cell, shortfall in behind:
        print(f"behind: {cell.workload}: {shortfall}")
    for verdict in fell_short:
        print(f"fell short: {verdict}")
    workloads_measured = sum(cell.info["section"] in workloads.SECTIONS for cell in found.cells)
    print(
        f"{workloads_measured} workloads in {found.run['seconds']:.0f} s; behind in "
        f"{len({cell.workload for cell, _ in behind})}; {len(fell_short)} promises fell short"
    )
    print(f"written: {output / results.FILE}, {report.FILE} and {len(drawn)} pictures")
    return FELL_SHORT if check and fell_short else 0


def _measure(arguments: Sequence[str], log: Path) -> int:
    """Run the suite in a process of its own, its output into `log`, its progress on the terminal."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    fixed = ["-p", "no:cacheprovider", "-q", "-s", "-rs", "--benchmark-only", "--benchmark-quiet"]
    fixed += ["-W", "ignore"]  # a peer's warnings are its own
    command = [sys.executable, "-m", "pytest", str(ROOT / "bench"), f"--rootdir={ROOT}", *fixed, "--bench-progress"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    # The threads of NumPy's BLAS, which only norms would use, spin for some 20 ms after a call: whoever came next had
    # steps of 8 ms where 0.02 is normal.
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX takes most of a GPU's memory
    with (
        log.open("w", encoding="utf-8", buffering=1) as file,
        tqdm(unit="measurement", leave=False, disable=None) as bar,
        subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            cwd=ROOT,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            before, mark, after = line.partition(suite.PROGRESS)
            if mark:
                _show(json.loads(after), bar)
            if not mark or before.strip():
                file.write(before if mark else line)
    return process.returncode


def _show(what: dict[str, Any], bar: Any) -> None:
    if "total" in what:
        bar.reset(total=what["total"])
        for name, version in what["peers"].items():
            bar.write(f"peer {name}: {version}")
        for name, reason in what["missing"].items():
            bar.write(f"peer {name}: left out, {reason}")
    elif "race" in what:
        bar.set_description(what["race"])
    else:
        bar.update()


def compare_folders(before: Path, after: Path) -> int:
    """Print what changed between two runs."""
    print(compare.text(results.load(before), results.load(after)), end="")
    return 0


PEERS = tuple(peers.MODULES)
MODES = tuple(workloads.MODES)
