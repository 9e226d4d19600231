"""How many threads a step may use: affinity, cgroup quota, environment, `set_num_threads`."""

from __future__ import annotations

import math
import os
from pathlib import Path

from fastopt import backends

_n_threads: int | None = None


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
    global _n_threads
    _n_threads = check_n_threads(n_threads)
    backends.engine().set_default_n_threads(_n_threads)


def get_num_threads() -> int:
    """Threads that steps use at most, where their optimizer does not say.

    At first the CPUs this process may use: its affinity, the quota of its cgroup, OMP_NUM_THREADS, whichever
    is least; or FASTOPT_NUM_THREADS, which overrides them.
    """
    if _n_threads is None:
        set_num_threads(_available())
    assert _n_threads is not None
    return _n_threads


def _available() -> int:
    own = os.environ.get("FASTOPT_NUM_THREADS", "").strip()
    if own:
        threads = _number_of_threads(own)
        if threads is None:
            raise ValueError(f"FASTOPT_NUM_THREADS must be a number of threads from 1 to 4096, got {own!r}")
        return threads
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [cpus, _cgroup_quota(), _number_of_threads(os.environ.get("OMP_NUM_THREADS", ""))]
    return max(1, min(limit for limit in limits if limit is not None))


def _number_of_threads(text: str) -> int | None:
    """The number that an environment variable holds, of OpenMP's list "4,2" the first; None for anything else.

    OpenMP ignores what it cannot read, and so does fastopt in OpenMP's variable.
    """
    first = text.split(",")[0].strip()
    return int(first) if first.isdecimal() and len(first) < 9 and 1 <= int(first) <= 4096 else None


def _cgroup_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """CPUs that the cgroups of this process grant, rounded up; None without a quota. Versions 1 and 2."""
    try:
        groups = [line.split(":", 2) for line in membership.read_text().splitlines()]
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
