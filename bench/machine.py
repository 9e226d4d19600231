"""What figures depend on: processor, caches, memory, threads, versions."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import fastopt

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class Cache(TypedDict):
    """One level of the data caches."""

    level: int
    bytes: int
    shared_by: int
    """Processors that share one of them."""


def description() -> dict[str, Any]:
    """Everything about this machine that a reader of the figures wants to know."""
    found = caches()
    return {
        "processor": _processor(),
        "cpus": fastopt._threads._cpus(),
        "memory_bytes": memory(),
        "caches": found,
        "last_level_cache": last_level_cache(found, fastopt.get_num_threads()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "fastopt": fastopt.info(),
        "openmp": _openmp(),
    }


def caches(root: Path = _CACHES) -> list[Cache]:
    """The data caches of the first processor, the smallest first; none where Linux does not tell."""
    found: list[Cache] = []
    for folder in sorted(root.glob("index*")):
        try:
            level, kind, size, shared = (
                (folder / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        if kind in ("Data", "Unified"):
            scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1], 1)
            number = int(re.sub(r"\D", "", size)) * scale
            found.append({"level": int(level), "bytes": number, "shared_by": _count(shared)})
    return sorted(found, key=lambda cache: cache["level"])


def _count(cpus: str) -> int:
    """Processors in a list such as "0-3,8"."""
    total = 0
    for part in cpus.split(","):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return total


def reachable(cache: Cache, n_threads: int) -> int:
    """Bytes of one level that so many threads have together, each on a core of its own."""
    return cache["bytes"] * max(1, -(-n_threads // cache["shared_by"]))


def last_level_cache(found: Sequence[Cache], n_threads: int) -> int | None:
    """Bytes of the largest caches that so many threads have together; None where none are known."""
    return reachable(found[-1], n_threads) if found else None


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def memory() -> int | None:
    try:
        found = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _openmp() -> list[str]:
    """OpenMP runtimes in this process: with two that work, the idle one's threads would spin on the other's cores.

    By file and the folder that it lies in; the whole path says more of the owner than of the machine.
    """
    try:
        maps = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    except OSError:
        return []
    found = [path for path in maps if re.search(r"lib[gi]?omp[^/]*$", path)]
    return sorted({"/".join(path.split("/")[-2:]) for path in found})
