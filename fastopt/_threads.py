"""How many threads a step may use: affinity, cgroup quota, environment, other processes of a launcher."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from fastopt import backends

RANKS = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")
"""Variables in which launchers tell how many of their processes share a machine: torchrun, Open MPI, MPICH and Intel
MPI, MVAPICH. Slurm's are read by `_slurm_tasks`."""
SLURM_RANKS = "SLURM_STEP_TASKS_PER_NODE"

_n_threads: int | None = None
_source = ""
"""What decided on the number, as `info` tells."""


def check_n_threads(n_threads: int) -> int:
    """Return `n_threads` if it is an int >= 1, else raise TypeError or ValueError."""
    if isinstance(n_threads, bool) or not isinstance(n_threads, int):
        raise TypeError(f"n_threads must be an int, got {type(n_threads).__name__} {n_threads!r}")
    if not 1 <= n_threads <= 4096:
        raise ValueError(f"n_threads must be between 1 and 4096, got {n_threads}")
    return n_threads


def set_num_threads(n_threads: int) -> None:
    """Set the threads that steps use at most, where their optimizer does not say.

    Parameters
    ----------
    n_threads : int, 1 to 4096
        Threads. Results do not depend on it.

    Raises
    ------
    TypeError, ValueError
        For anything else.
    """
    _use(check_n_threads(n_threads), "set_num_threads")


def get_num_threads() -> int:
    """Threads that steps use at most, where their optimizer does not say.

    At first the CPUs this process may use: its affinity, the quota of its cgroup, OMP_NUM_THREADS, whichever is least;
    under a launcher (torchrun, MPI, Slurm) its share of the launcher's CPUs, if that is less. FASTOPT_NUM_THREADS
    overrides them. `info` tells which it was.

    Notes
    -----
    The 1 that torchrun writes into OMP_NUM_THREADS by itself does not count: say FASTOPT_NUM_THREADS=1 to mean it.
    """
    if _n_threads is None:
        _use(*_found())
    assert _n_threads is not None
    return _n_threads


def source() -> str:
    """What decided on the number of threads: an environment variable, "affinity", "cgroup" or "set_num_threads"."""
    get_num_threads()
    return _source


def _use(n_threads: int, source: str) -> None:
    global _n_threads, _source
    backends.engine().set_default_n_threads(n_threads)
    _n_threads, _source = n_threads, source


def _found() -> tuple[int, str]:
    """The number of threads that this process should use, and what decided on it."""
    own = os.environ.get("FASTOPT_NUM_THREADS", "").strip()
    if own:
        threads = _number_of_threads(own)
        if threads is None:
            raise ValueError(f"FASTOPT_NUM_THREADS must be a number of threads from 1 to 4096, got {own!r}")
        return threads, "FASTOPT_NUM_THREADS"
    limits = {
        "affinity": _cpus(),
        "cgroup": _cgroup_quota(),
        "OMP_NUM_THREADS": _number_of_threads(os.environ.get("OMP_NUM_THREADS", "")),
    }
    if limits["OMP_NUM_THREADS"] == 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        limits["OMP_NUM_THREADS"] = None  # torchrun's own choice
    n_ranks, variable = _ranks()
    if n_ranks > 1:
        shared = min(n for n in (_launchers_cpus(variable), limits["cgroup"]) if n is not None)
        limits[variable] = shared // n_ranks
    found = {source: max(1, n) for source, n in limits.items() if n is not None}
    chosen = min(found, key=lambda source: found[source])
    if n_ranks > 1:
        chosen = variable if found[variable] == found[chosen] else chosen
        import logging  # takes longer than a first step, and only here there is a choice to report

        message = "%d threads a step, by %s; %d processes share this machine, says %s; FASTOPT_NUM_THREADS overrides it"
        logging.getLogger("fastopt").info(message, found[chosen], chosen, n_ranks, variable)
    return found[chosen], chosen


def _cpus(pid: int = 0) -> int:
    """CPUs that a process may run on; 0 is this one."""
    return len(os.sched_getaffinity(pid)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ranks() -> tuple[int, str]:
    """Processes of this process's launcher on this machine, and the variable that says so; 1 without a launcher."""
    for variable in RANKS:
        n_ranks = _number_of_threads(os.environ.get(variable, ""))
        if n_ranks is not None:
            return n_ranks, variable
    return _slurm_tasks(os.environ.get(SLURM_RANKS, ""), os.environ.get("SLURM_NODEID", "0")), SLURM_RANKS


def _slurm_tasks(counts: str, node: str) -> int:
    """Tasks of a Slurm step on node number `node`, of counts such as "4(x2),1"; 1 where there are none."""
    if not re.fullmatch(r"[0-9]{1,7}", node):
        return 1
    first = 0
    for count in counts.split(","):
        parts = re.fullmatch(r"([0-9]{1,4})(?:\(x([0-9]{1,7})\))?", count.strip())
        if parts is None:
            return 1
        first += int(parts[2] or 1)
        if int(node) < first:
            return max(1, int(parts[1]))
    return 1


def _launchers_cpus(variable: str) -> int:
    """CPUs that the launcher of this process may run on: all that its processes share, bound to parts of them or not.

    The launcher is the nearest ancestor that was not itself started with `variable`, or whose environment may not be
    read because it is another user's, as Slurm's daemon.
    """
    process = Path("/proc/self")
    try:
        while found := re.search(rb"^PPid:\s*([0-9]+)", (process / "status").read_bytes(), re.MULTILINE):
            parent = int(found[1])
            process = Path("/proc", str(parent))
            try:
                variables = (process / "environ").read_bytes().split(b"\0")
            except PermissionError:
                variables = []
            if not any(entry.startswith(f"{variable}=".encode()) for entry in variables):
                return max(_cpus(parent), _cpus())
    except OSError:  # a system without /proc, or the launcher has ended
        pass
    return _cpus()


def _number_of_threads(text: str) -> int | None:
    """The number that an environment variable holds, of OpenMP's list "4,2" the first; None for anything else.

    OpenMP ignores what it cannot read, and so does fastopt in OpenMP's variable.
    """
    first = text.split(",")[0].strip()
    return int(first) if first.isdecimal() and len(first) < 9 and 1 <= int(first) <= 4096 else None


def _cgroup_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """CPUs that the cgroups of this process grant, rounded up; None without a quota. Versions 1 and 2."""
    try:
        groups = [line.split(":", 2) for line in membership.read_text(errors="replace").splitlines()]
    except OSError:
        return None
    quotas = []
    for _, controllers, path in groups:
        files: list[tuple[Path, ...]]
        if controllers == "":
            files = [(folder / "cpu.max",) for folder in _upwards(root, path)]
        elif "cpu" in controllers.split(","):
            folders = _upwards(root / "cpu", path)
            files = [(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us") for folder in folders]
        else:
            continue
        for names in files:
            try:
                quota, period = " ".join(name.read_text().strip() for name in names).split()
                if quota not in ("max", "-1"):
                    quotas.append(math.ceil(int(quota) / int(period)))
            except (OSError, ValueError):  # no such file: no limit at this level
                continue
    return min(quotas) if quotas else None


def _upwards(root: Path, path: str) -> list[Path]:
    """The folder of the cgroup `path` and those above it, up to `root`."""
    folder = root / path.lstrip("/")
    return [folder, *(parent for parent in folder.parents if parent == root or root in parent.parents)]
